"""The training loop: it learns, resumes to the same weights, keeps the best, and stops in time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from synthaug.randomness import SampleKey
from synthaug.training.loop import LoopConfig, train

CONFIG = LoopConfig(budget_s=1e6, max_steps=60, learning_rate=0.05, warmup_steps=2, ema_decay=0.8, num_validations=6)


def problem(seed: int = 0) -> tuple[nn.Linear, object, object]:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Linear(3, 1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    truth = torch.tensor([1.0, -2.0, 0.5])

    def loss(key: SampleKey):
        x = torch.randn(32, 3, generator=key.generator())
        return ((net(x)[:, 0] - x @ truth) ** 2).mean()

    def validate() -> float:
        with torch.no_grad():
            return float(loss(SampleKey(99)))

    return net, loss, validate


def test_it_learns_and_ends_with_the_best_average(tmp_path):
    net, loss, validate = problem()
    before = validate()
    result = train([net], loss, validate, CONFIG, tmp_path / "c.pt")
    assert result.num_steps == 60
    assert validate() < 0.2 * before
    assert validate() == pytest.approx(result.best_loss)
    assert len(result.history) >= 6


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path):
    net, loss, validate = problem()
    train([net], loss, validate, CONFIG, tmp_path / "whole.pt")

    broken, loss_b, validate_b = problem()

    def interrupted(key: SampleKey):
        if key.path == ("step", 31):
            raise KeyboardInterrupt
        return loss_b(key)

    with pytest.raises(KeyboardInterrupt):
        train([broken], interrupted, validate_b, CONFIG, tmp_path / "broken.pt")
    again, loss_c, validate_c = problem(seed=7)  # other initial weights: everything has to come from the checkpoint
    result = train([again], loss_c, validate_c, CONFIG, tmp_path / "broken.pt")
    assert result.num_steps == 60
    for a, b in zip(net.parameters(), again.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_a_finished_run_is_not_trained_again(tmp_path):
    net, loss, validate = problem()
    train([net], loss, validate, CONFIG, tmp_path / "c.pt")

    def forbidden(key: SampleKey):
        raise AssertionError("trained again")

    other, _, validate_o = problem(seed=3)
    train([other], forbidden, validate_o, CONFIG, tmp_path / "c.pt")
    assert torch.equal(other.weight, net.weight)


def test_early_stop_keeps_the_best_weights(tmp_path):
    net, loss, _ = problem()
    series = iter([1.0, 0.5, 0.9, 0.9, 0.9, 0.9])
    result = train([net], loss, lambda: next(series), replace(CONFIG, patience=2), tmp_path / "c.pt")
    assert result.num_steps < 60
    assert result.best_loss == 0.5


def test_a_diverging_loss_is_an_error(tmp_path):
    net, _, validate = problem()
    with pytest.raises(FloatingPointError, match="step 0"):
        train([net], lambda key: net(torch.full((1, 3), float("nan"))).sum(), validate, CONFIG, tmp_path / "c.pt")


def test_the_budget_ends_training(tmp_path):
    net, loss, validate = problem()
    result = train([net], loss, validate, replace(CONFIG, budget_s=0.0), tmp_path / "c.pt")
    assert result.num_steps == 0
