"""Schedule, loss and sampler that every diffusion stage shares, on diffusers' DDIM scheduler.

Equations: v-prediction of Salimans and Ho 2022, eq. 11-12; DDIM of Song et al. 2021, eq. 12; zero terminal SNR and trailing
timesteps of Lin et al. 2024, without which a sampler never starts from the noise the network was trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


def build_scheduler(schedule: str, prediction_type: str) -> Any:
    """A diffusers `DDIMScheduler`.

    Args:
        schedule: `squaredcos_cap_v2`, `scaled_linear` (Stable Diffusion: beta 0.00085-0.012) or `linear`.
        prediction_type: `v_prediction` (with zero terminal SNR) or `epsilon` (as Stable Diffusion 1.5 was trained).
    """
    from diffusers import DDIMScheduler

    velocity = prediction_type == "v_prediction"
    return DDIMScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule=schedule,
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=velocity,
        rescale_betas_zero_snr=velocity,
        timestep_spacing="trailing" if velocity else "leading",
        steps_offset=0 if velocity else 1,
    )


def diffusion_loss(
    scheduler: Any, predict: Callable[[Tensor, Tensor], Tensor], clean: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """Mean squared error of the network's prediction (noise or velocity), float32 scalar.

    Args:
        scheduler: From `build_scheduler`.
        predict: (noisy [B, ...], timesteps [B]) -> prediction of the same shape.
        clean: float32 [B, ...].
        noise: float32 [B, ...], standard normal.
        timesteps: int64 [B] in [0, 1000).
    """
    noisy = scheduler.add_noise(clean, noise, timesteps)
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(clean, noise, timesteps)
    else:
        target = noise
    return torch.nn.functional.mse_loss(predict(noisy, timesteps), target)


def denoise(
    scheduler: Any,
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    num_inference_steps: int,
    eta: float = 0.0,
    variance_noise: Tensor | None = None,
) -> Tensor:
    """DDIM sampling.

    Args:
        scheduler: From `build_scheduler`; not changed (a copy is stepped, so that threads may share it).
        predict: (noisy [B, ...], timesteps [B]) -> prediction of the same shape.
        noise: float32 [B, ...], standard normal, the sample at the last timestep.
        num_inference_steps: At least 1.
        eta: 0 makes the map from noise to sample deterministic (what eq. 2 of the paper needs); 1 is DDPM.
        variance_noise: float32 [num_inference_steps, B, ...], needed where eta > 0.

    Returns:
        The clean sample, same shape as `noise`.
    """
    own = type(scheduler).from_config(scheduler.config)
    own.set_timesteps(num_inference_steps, device=noise.device)
    sample = noise * own.init_noise_sigma
    for i, t in enumerate(own.timesteps):
        step_noise = variance_noise[i] if variance_noise is not None and eta > 0 else None
        prediction = predict(sample, t.expand(len(sample)))
        sample = own.step(prediction, t, sample, eta=eta, variance_noise=step_noise).prev_sample
    return sample
