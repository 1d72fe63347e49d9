"""A key alone decides its noise: whatever else is in the batch, in the process, or in the global random state."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from synthaug.errors import InputError
from synthaug.randomness import SampleKey, normal, uniform

KEYS = [SampleKey(7, ("cell", i)) for i in range(5)]


def test_the_digest_of_a_key_never_changes() -> None:
    """Other bytes here would give every published seed another stream."""
    assert SampleKey(0).digest().hex() == "1240a4684403b160e6597a653a88f56c"
    assert SampleKey(-3, ("cell", 1, "view", 20)).digest().hex() == "d8625d04cd51759c103007907bf81dac"


def test_the_digest_is_the_same_in_another_process() -> None:
    code = "from synthaug.randomness import SampleKey; print(SampleKey(5, ('a', 1)).digest().hex())"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == SampleKey(5, ("a", 1)).digest().hex()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (SampleKey(0), SampleKey(1)),
        (SampleKey(0), SampleKey(0, (0,))),
        (SampleKey(0, (1,)), SampleKey(0, ("1",))),
        (SampleKey(0, (1, 23)), SampleKey(0, (12, 3))),
        (SampleKey(0, ("a", "b")), SampleKey(0, ("ab",))),
        (SampleKey(0, ("a", "b")), SampleKey(0, ("b", "a"))),
        (SampleKey(1, (2,)), SampleKey(12)),
    ],
)
def test_different_keys_have_different_noise(one: SampleKey, other: SampleKey) -> None:
    assert one.digest() != other.digest()
    assert one.integer() != other.integer()
    assert not torch.equal(normal([one], [8]), normal([other], [8]))
    assert not np.array_equal(one.numpy().random(8), other.numpy().random(8))


def test_many_keys_do_not_collide() -> None:
    keys = [SampleKey(0, ("cell", lane, i)) for lane in range(8) for i in range(5000)]
    assert len({key.digest() for key in keys}) == len(keys)
    assert len({key.integer() for key in keys}) == len(keys)


def test_noise_uses_more_than_32_bits_of_a_key() -> None:
    """Torch's CPU generator does not: it gives these two keys the same numbers."""
    one, other = SampleKey(0, ("cell", 50094)), SampleKey(0, ("cell", 187348))
    assert one.integer() % 2**32 == other.integer() % 2**32
    for draw in (normal, uniform):
        assert not torch.equal(draw([one], [8]), draw([other], [8]))


def test_child_extends_the_path() -> None:
    assert SampleKey(3).child("cell").child(1, "texture") == SampleKey(3, ("cell", 1, "texture"))
    assert len({SampleKey(3, ("a",)), SampleKey(3).child("a")}) == 1
    assert pickle.loads(pickle.dumps(KEYS)) == KEYS  # keys travel to DataLoader workers


def test_integer_suits_every_generator() -> None:
    values = [SampleKey(seed).integer() for seed in range(200)]
    assert all(0 <= value < 2**63 for value in values)
    assert max(values) > 2**62
    assert min(values) < 2**61


def test_a_seed_may_be_a_numpy_integer() -> None:
    assert SampleKey(np.int64(9)).digest() == SampleKey(9).digest()  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [1.0, "1", None, torch.tensor(1)])
def test_a_seed_that_is_no_integer_is_refused(seed: object) -> None:
    with pytest.raises(InputError, match="seed: expected an integer, got"):
        SampleKey(seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("draw", [normal, uniform])
def test_a_row_depends_on_its_own_key_alone(draw) -> None:
    batch = draw(KEYS, (3, 17))
    assert batch.shape == (5, 3, 17)
    assert batch.dtype == torch.float32
    assert batch.device.type == "cpu"
    for i, key in enumerate(KEYS):
        assert torch.equal(draw([key], (3, 17))[0], batch[i])
    order = [4, 0, 2]
    assert torch.equal(draw([KEYS[i] for i in order], (3, 17)), batch[order])
    assert draw([], (3, 17)).shape == (0, 3, 17)
    assert draw(KEYS, ()).shape == (5,)


def test_every_call_starts_the_stream_of_a_key_anew() -> None:
    key = SampleKey(1, ("x",))
    for make in (lambda: torch.rand(4, generator=key.generator()), lambda: torch.from_numpy(key.numpy().random(4))):
        assert torch.equal(make(), make())
    stream = key.generator()
    assert not torch.equal(torch.rand(4, generator=stream), torch.rand(4, generator=stream))


def test_noise_has_the_distribution_it_says() -> None:
    """5 standard errors on 400 keys x 256 numbers, neighbouring keys included."""
    keys = [SampleKey(0, ("cell", i)) for i in range(400)]
    count = 400 * 256
    noise = normal(keys, [256])
    assert abs(noise.mean()) < 5 / count**0.5
    assert abs(noise.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((noise[1:] * noise[:-1]).mean()) < 5 / count**0.5
    flat = uniform(keys, [256])
    assert flat.min() >= 0
    assert flat.max() < 1
    assert abs(flat.mean() - 0.5) < 5 * (1 / 12 / count) ** 0.5
    assert abs(flat.var() - 1 / 12) < 5 * (1 / 180 / count) ** 0.5
    assert abs(((flat[1:] - 0.5) * (flat[:-1] - 0.5)).mean()) < 5 / 12 / count**0.5


@pytest.mark.usefixtures("untouched_random_state")
def test_the_global_random_state_is_not_touched() -> None:
    normal(KEYS, [64])
    uniform(KEYS, [64])
    KEYS[0].numpy().normal(size=64)


def test_the_global_random_state_is_not_read() -> None:
    before = normal(KEYS, [64])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        torch.rand(10)
        assert torch.equal(normal(KEYS, [64]), before)


def test_the_guard_on_the_global_state_fires() -> None:
    """The fixture of conftest.py sees a single draw from either library."""
    from tests.conftest import global_random_state

    numpy_state = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        before = global_random_state()
        torch.rand(1)
        assert global_random_state() != before
    assert global_random_state() == before
    try:
        np.random.rand()  # noqa: NPY002
        assert global_random_state() != before
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
