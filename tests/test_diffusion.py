"""Schedule, loss and sampler."""

from __future__ import annotations

import pytest
import torch

from synthaug.generators.diffusion import build_scheduler, denoise, diffusion_loss


@pytest.mark.parametrize(
    ("schedule", "prediction"), [("squaredcos_cap_v2", "v_prediction"), ("scaled_linear", "epsilon")]
)
def test_the_perfect_network_recovers_the_data(schedule, prediction):
    """With the exact denoiser of a one-point distribution, DDIM ends at that point from any noise."""
    scheduler = build_scheduler(schedule, prediction)
    target = torch.linspace(-1, 1, 12).reshape(1, 3, 2, 2).expand(4, -1, -1, -1)

    def predict(x, t):
        alpha = scheduler.alphas_cumprod[t].sqrt()[:, None, None, None]
        sigma = (1 - scheduler.alphas_cumprod[t]).sqrt()[:, None, None, None]
        noise = (x - alpha * target) / sigma.clamp_min(1e-4)
        return noise if prediction == "epsilon" else alpha * noise - sigma * target

    out = denoise(scheduler, predict, torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)), 10)
    # Stable Diffusion's schedule stops at its first noise level, 3 %, instead of 0.
    torch.testing.assert_close(out, target, atol=0.15 if prediction == "epsilon" else 1e-3, rtol=0)


def test_loss_is_zero_for_the_true_velocity():
    scheduler = build_scheduler("squaredcos_cap_v2", "v_prediction")
    g = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(5, 1, 4, 4, generator=g), torch.randn(5, 1, 4, 4, generator=g)
    t = torch.tensor([0, 100, 500, 900, 999])
    velocity = scheduler.get_velocity(clean, noise, t)
    assert float(diffusion_loss(scheduler, lambda x, s: velocity, clean, noise, t)) == 0.0
    assert float(diffusion_loss(scheduler, lambda x, s: velocity + 1, clean, noise, t)) == pytest.approx(1.0)


def test_training_reaches_pure_noise():
    """Zero terminal SNR: the last timestep holds nothing of the data, as the sampler assumes."""
    scheduler = build_scheduler("squaredcos_cap_v2", "v_prediction")
    assert float(scheduler.alphas_cumprod[-1]) < 1e-6


def test_eta_zero_is_deterministic_and_eta_one_uses_its_noise():
    scheduler = build_scheduler("squaredcos_cap_v2", "v_prediction")
    g = torch.Generator().manual_seed(0)
    x, steps = torch.randn(2, 1, 4, 4, generator=g), torch.randn(5, 2, 1, 4, 4, generator=g)

    def predict(sample, t):
        return 0.3 * sample

    assert torch.equal(denoise(scheduler, predict, x, 5), denoise(scheduler, predict, x, 5))
    a = denoise(scheduler, predict, x, 5, eta=1.0, variance_noise=steps)
    b = denoise(scheduler, predict, x, 5, eta=1.0, variance_noise=steps.flip(0))
    assert not torch.allclose(a, b)
