"""A thread that works for the stream: in order, alone, and under conditions that do not depend on who iterates.

What a sum of floats gives depends on how many threads share it, so the same frame could differ between a training
process with 16 threads and a DataLoader worker with one. Cells and frames are therefore made in threads of our own with
one intra-op thread each. Autograd, autocast and the default device are settings of a thread, too: those of the training
loop do not reach in here.
"""

from __future__ import annotations

import atexit
import inspect
import os
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

_Tasks = queue.SimpleQueue  # of (future, what gives the function or None, arguments), or None to stop


class SerialThread:
    """Runs tasks one after another in one daemon thread that starts with the first task (so never before a fork).

    Not a ThreadPoolExecutor: that one finishes its whole queue when the interpreter exits, this one only the task at
    hand.

    Args:
        name: Name of the thread, for debuggers.
        device: Where the tasks compute. On CUDA the thread has a stream of its own at the lowest priority, so that the
            training's kernels go first; every result is complete when its future is.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        self._tasks: _Tasks = queue.SimpleQueue()
        self._thread = threading.Thread(target=_run, args=(self._tasks, torch.device(device)), name=name, daemon=True)
        self._finalizer: Callable[[], Any] | None = None

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        """Queue `function(*args)`; its result or exception arrives in the future. A queued future can be cancelled.

        A method does not keep its object alive while it is queued: who drops a stream wants nothing more from it, and the
        thread would work for it for minutes. Its future is cancelled.
        """
        if self._finalizer is None:
            self._thread.start()
            self._finalizer = weakref.finalize(self, _stop, self._tasks, self._thread, os.getpid())
            _STARTED.add(self)
        future: Future = Future()
        find = weakref.WeakMethod(function) if inspect.ismethod(function) else lambda: function
        self._tasks.put((future, find, args))
        return future

    def close(self) -> None:
        """Cancel what is queued and wait for the task at hand."""
        if self._finalizer is not None:
            self._finalizer()


_STARTED: weakref.WeakSet[SerialThread] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread inside torch while the interpreter goes away can crash it.

    Finalizers are too late: they run from the last one made to the first, and torch takes operators that were registered
    after a thread had started (kernels are imported where they are used) away before that thread would be stopped. What
    is registered with `atexit` after torch's import runs before all finalizers.
    """
    for thread in list(_STARTED):
        thread.close()


def _run(tasks: _Tasks, device: torch.device) -> None:
    use_one_thread()
    torch.set_grad_enabled(False)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream(device, priority=0))  # 0 is the lowest there is
    while (task := tasks.get()) is not None:
        future, find, args = task
        if (function := find()) is None:
            future.cancel()
        if future.set_running_or_notify_cancel():
            try:
                result = function(*args)
                if device.type == "cuda":
                    torch.cuda.current_stream(device).synchronize()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
                del result
        del task, future, find, function, args  # while we wait for the next task, nothing is kept alive


def use_one_thread() -> None:
    """Give the calling thread one intra-op thread and leave all others as they are.

    `torch.set_num_threads` does two things: it sets OpenMP's number for the calling thread, and it stores the number as
    the default for threads that have not computed yet. The second is put back here, from a thread that then ends.
    """
    default = torch.get_num_threads()
    torch.set_num_threads(1)
    restore = threading.Thread(target=torch.set_num_threads, args=(default,))
    restore.start()
    restore.join()


def _stop(tasks: _Tasks, thread: threading.Thread, pid: int) -> None:
    if os.getpid() != pid:
        return  # a forked child inherits the object, not the thread
    while True:
        try:
            task = tasks.get_nowait()
        except queue.Empty:
            break
        if task is not None:
            task[0].cancel()
    tasks.put(None)
    if thread is not threading.current_thread():  # the garbage collector may call from anywhere
        thread.join(timeout=30)
