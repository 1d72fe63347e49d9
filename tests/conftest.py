"""What all tests share: few threads, no network, no window, and GPU tests only where there is a GPU."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator

# Before torch and numba are imported, and inherited by subprocesses. Two and not one: DataLoader workers run on one
# thread, so that the tests which compare them with the main process also compare numbers of threads.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the core to the tests beside them
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def global_random_state() -> tuple[bytes, bytes]:
    """The global states of torch's CPU generator and of numpy, for comparison."""
    # Pickled, because numpy's state is a tuple with an array in it.
    return torch.get_rng_state().numpy().tobytes(), pickle.dumps(np.random.get_state())  # noqa: NPY002


@pytest.fixture
def untouched_random_state() -> Iterator[None]:
    """Fails the test if it left torch's or numpy's global random state other than it found it."""
    before = global_random_state()
    yield
    assert global_random_state() == before, "the global random state of torch or numpy was read or set"
