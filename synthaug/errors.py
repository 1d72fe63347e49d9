"""What a user can get wrong, as exceptions that say what was expected, what came, and what to do.

Every class also derives from the built-in error a caller would expect (`ValueError`, `FileNotFoundError`, ...), so that
`except ValueError` keeps working in training code that knows nothing of this library.
"""

from __future__ import annotations


class SynthAugError(Exception):
    """Base of everything this library raises on purpose."""


class InputError(SynthAugError, ValueError):
    """An argument, file or array is not what it has to be.

    Args:
        what: The argument, file or array in question.
        expected: What it has to be.
        got: What came.
        remedy: What to do about it.

    >>> raise InputError("synthetic_ratio", expected="a number in [0, 1]", got=1.5, remedy="Pass 0.5 for a 50:50 mix.")
    Traceback (most recent call last):
    ...
    synthaug.errors.InputError: synthetic_ratio: expected a number in [0, 1], got 1.5. Pass 0.5 for a 50:50 mix.
    """

    def __init__(self, what: str, *, expected: str | None = None, got: object = None, remedy: str = "") -> None:
        self.what, self.expected, self.got, self.remedy = what, expected, got, remedy
        # A DataLoader raises a worker's error again from its text alone; without the rest the text is the message.
        text = what if expected is None else f"{what}: expected {expected}, got {got}.{' ' + remedy if remedy else ''}"
        super().__init__(text)


class DataError(InputError):
    """A data set on disk cannot be used as it is; `what` names the file."""


class CheckpointError(InputError):
    """A cascade folder is missing, incomplete or of another kind."""


class ProducerError(SynthAugError, RuntimeError):
    """The producer of fresh cells failed; `__cause__` holds the first error."""
