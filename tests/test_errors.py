"""Errors say what was expected, what came and what to do, also from a worker process."""

from __future__ import annotations

import pickle

import pytest
from torch.utils.data import DataLoader, Dataset

from synthaug.errors import DataError, InputError, SynthAugError


class Faulty(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        raise InputError("a.tif", expected="grey", got="colour", remedy="Convert it.")


def test_the_message_has_all_parts():
    error = InputError("size", expected="(Y, X)", got=(3,), remedy="Pass two.")
    assert str(error) == "size: expected (Y, X), got (3,). Pass two."
    assert isinstance(error, ValueError | SynthAugError)


def test_a_worker_process_raises_the_same_type():
    with pytest.raises(InputError, match=r"a\.tif: expected grey, got colour\. Convert it\."):
        next(iter(DataLoader(Faulty(), num_workers=1)))


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(DataError("x.tif", expected="a file", got="nothing")))
    assert isinstance(error, DataError)
    assert "expected a file" in str(error)
