"""An error's way through a loader that would swallow it.

MONAI's ThreadDataLoader reads its source in a thread. An error there ends the thread, and the training loop with it, as if the
epoch were over. So the error travels as a batch, and is raised where the training looks into it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, NoReturn, Self


def swallows_errors() -> bool:
    """Whether this is the thread of a `monai.data.ThreadBuffer`, in which an error is lost."""
    return threading.current_thread().name.endswith("(enqueue_values)")


class FailedBatch(dict):
    """Stands for a batch that could not be made, and raises why as soon as it is used.

    Args:
        error: What went wrong.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def __copy__(self) -> Self:
        return self  # a loader's `default_convert` copies what it hands on

    def __iter__(self) -> Iterator[Any]:
        return iter(())  # may not raise: the loader goes over the keys in the thread that swallows errors

    def _fail(self, *_: Any, **__: Any) -> NoReturn:
        raise self.error

    __missing__ = __contains__ = get = keys = values = items = pop = _fail
