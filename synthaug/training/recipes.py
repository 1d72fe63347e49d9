"""How each stage is trained: a function a stage, which returns the trained stage; all numbers in typed configs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synthaug.datasets.crops import CropSet
from synthaug.generators.diffusion import NUM_TRAIN_TIMESTEPS, diffusion_loss
from synthaug.generators.masks import MaskConfig, MaskDDPM, measure_attributes, principal_angle, usual_rows
from synthaug.generators.stage import untouched_generator
from synthaug.generators.texture import TextureDiffusion, tiny_config
from synthaug.randomness import SampleKey
from synthaug.training.border import fit_border
from synthaug.training.borrowing import PRIOR_CELLS, USUAL, borrow_spread, mean_of_columns, median_of_columns
from synthaug.training.loop import LoopConfig, LoopResult, train
from synthaug.types import CellMasks

Log = Callable[[str], None]


@dataclass(frozen=True)
class StageRecipe:
    """Numbers of one stage's training: batch size, peak learning rate, EMA decay, share of the time budget."""

    batch_size: int
    learning_rate: float
    ema_decay: float
    share: float


SCRATCH = {
    "masks": StageRecipe(batch_size=64, learning_rate=1e-3, ema_decay=0.999, share=0.45),
    "vae": StageRecipe(batch_size=8, learning_rate=2e-3, ema_decay=0.998, share=0.20),
    "texture": StageRecipe(batch_size=32, learning_rate=8e-4, ema_decay=0.999, share=0.35),
}
"""From random weights."""

ADAPT = {
    "masks": StageRecipe(batch_size=32, learning_rate=1e-4, ema_decay=0.999, share=0.30),
    "vae": StageRecipe(batch_size=16, learning_rate=2e-4, ema_decay=0.995, share=0.25),
    "texture": StageRecipe(batch_size=16, learning_rate=1e-4, ema_decay=0.999, share=0.45),
}
"""From an embedded cascade, on few images: low rates and a strong EMA against over-fitting (paper, Table 1c)."""


def split_crops(crops: CropSet, seed: int) -> tuple[CropSet, CropSet]:
    """Training and held-out crops: a tenth is held out, at least 4 and at most 128, chosen by the seed."""
    order = torch.randperm(len(crops), generator=SampleKey(seed, ("split",)).generator())
    num_held_out = min(max(len(crops) // 10, min(4, len(crops) // 2)), 128)
    return crops.select(order[num_held_out:]), crops.select(order[:num_held_out])


def _timesteps(num: int, generator: torch.Generator) -> Tensor:
    """One random timestep in each of `num` equal strata: the same mean loss at less variance."""
    timesteps = ((torch.arange(num) + torch.rand(num, generator=generator)) / num * NUM_TRAIN_TIMESTEPS).long()
    return timesteps.clamp(max=NUM_TRAIN_TIMESTEPS - 1)  # the last stratum's upper end may be rounded to


def _dihedral(x: Tensor, which: int) -> Tensor:
    """One of the eight turns and flips of the last two axes."""
    x = torch.rot90(x, which % 4, (-2, -1))
    return x.flip(-1) if which >= 4 else x


def _loop_config(recipe: StageRecipe, budget_s: float, seed: int, adapt: bool) -> LoopConfig:
    return LoopConfig(
        budget_s=budget_s,
        learning_rate=recipe.learning_rate,
        ema_decay=recipe.ema_decay,
        patience=5 if adapt else 1_000,
        seed=seed,
    )


def initialise(network: nn.Module, key: SampleKey) -> None:
    """Draw a new network's weights again from `key`, so that a seed names a whole training.

    diffusers draws them from torch's global generator. Uniform in +-1/sqrt(fan-in), torch's own default for linear and
    convolution layers; what is all zeros on purpose (the control branch's exits), and the norms, are left alone.
    """
    with torch.no_grad():
        for name, module in network.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) or not bool(module.weight.any()):
                continue
            bound = module.weight[0].numel() ** -0.5
            generator = key.child(name).generator()
            module.weight.uniform_(-bound, bound, generator=generator)
            if module.bias is not None:
                module.bias.uniform_(-bound, bound, generator=generator)


def _held_out_loss(
    stage: MaskDDPM | TextureDiffusion, clean: Tensor, condition: Tensor, seed: int
) -> Callable[[], float]:
    """The diffusion loss on held-out samples, at the same noise and timesteps every time it is called."""
    generator = SampleKey(seed, ("validation",)).generator()
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    timesteps = _timesteps(len(clean), generator).to(clean.device)

    @torch.no_grad()
    def validate() -> float:
        return float(
            diffusion_loss(stage.scheduler, lambda x, t: stage.predict(x, t, condition), clean, noise, timesteps)
        )

    return validate


def fit_masks(
    crops: CropSet,
    start: MaskDDPM | None,
    budget_s: float,
    seed: int,
    checkpoint: Path,
    log: Log,
    device: str | torch.device = "cpu",
    *,
    least_scale: float = 1.0,
    whole: bool = True,
) -> tuple[MaskDDPM, LoopResult]:
    """Train the outlines on the crops' signed distances, long axis along x, flipped at random.

    `whole` says that they are those of cells; sections of cells vary more, so that odd ones are borrowed, too.
    """
    recipe = (ADAPT if start else SCRATCH)["masks"]
    with untouched_generator():
        stage = start or MaskDDPM(MaskConfig(crop_size=crops.image.shape[-1]))
    if not start:
        initialise(stage.unet, SampleKey(seed, ("masks",)))
    stage.config = replace(stage.config, least_scale=least_scale)

    def attributes(part: CropSet) -> Tensor:
        return measure_attributes(part.sdf < 0, part.radius, part.brightness, stage.config.attributes)

    table = attributes(crops)
    if start:
        theirs = usual_rows(start.attributes, USUAL if whole else None)
        table = borrow_spread(table, theirs, PRIOR_CELLS, centre=median_of_columns if whole else mean_of_columns)
    stage.set_tables({"attributes": table})
    training, held_out = split_crops(crops, seed)

    def grids(part: CropSet) -> tuple[Tensor, Tensor]:
        clean = stage.to_grid(part.sdf, part.radius / part.scale, principal_angle(part.sdf < 0))
        return clean, stage.condition(attributes(part))

    clean, condition = (x.to(device) for x in grids(training))
    held_out_clean, held_out_condition = (x.to(device) for x in grids(held_out))
    stage.to(device)
    validate = _held_out_loss(stage, held_out_clean, held_out_condition, seed)

    def loss(key: SampleKey) -> Tensor:
        g = key.generator()
        index = torch.randint(len(clean), (recipe.batch_size,), generator=g).to(device)
        flip = int(torch.randint(4, (1,), generator=g))
        axes = [axis for axis, on in ((-1, flip & 1), (-2, flip & 2)) if on]
        full = F.pixel_shuffle(clean[index], stage.config.patch_size)
        batch = F.pixel_unshuffle(full.flip(axes) if axes else full, stage.config.patch_size)
        noise = torch.randn(batch.shape, generator=g).to(device)
        cond = condition[index]
        # Smears the condition a little, so that drawn sizes and brightnesses between the real ones are familiar.
        cond = cond + 0.1 * torch.randn(cond.shape, generator=g).to(device)
        timesteps = _timesteps(len(batch), g).to(device)
        return diffusion_loss(stage.scheduler, lambda x, t: stage.predict(x, t, cond), batch, noise, timesteps)

    result = train(
        [stage.unet], loss, validate, _loop_config(recipe, budget_s, seed, start is not None), checkpoint, log
    )
    return stage.eval(), result


def _vae_loss(stage: TextureDiffusion, image: Tensor, sdf: Tensor, noise: Tensor) -> Tensor:
    """Squared error of values and of gradients (texture, not only its mean), mostly in and near the cell, and a slight KL."""
    mean, logvar = stage.encode_moments(image)
    logvar = logvar.clamp(-30, 20)
    out = stage.decode_raw(mean + noise * (0.5 * logvar).exp())
    weight = torch.where(sdf < 6, 1.0, 0.1)
    weight = weight / weight.mean()
    # A speck of debris is ten times brighter than its own mean: without a bound it would outweigh a hundred nuclei.
    error = out - image
    loss = (weight * F.huber_loss(out, image, reduction="none", delta=0.5)).mean()
    for axis in (-1, -2):
        slope = error.diff(dim=axis).clamp(-0.5, 0.5)
        loss = loss + 2 * (weight.narrow(axis, 1, weight.shape[axis] - 1) * slope**2).mean()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return loss + 1e-5 * kl


def fit_vae(
    crops: CropSet,
    start: TextureDiffusion | None,
    budget_s: float,
    seed: int,
    checkpoint: Path,
    log: Log,
    *,
    latent_size: int = 16,
    device: str | torch.device = "cpu",
) -> tuple[TextureDiffusion, LoopResult]:
    """Train the autoencoder on the crops; when adapting, its decoder alone, so that latents keep their meaning."""
    recipe = (ADAPT if start else SCRATCH)["vae"]
    if start:
        stage = start
    else:
        low, high = (float(q) for q in torch.quantile(_sample(crops.image), torch.tensor([0.0005, 0.9995])))
        span = max(high - low, 1.0)
        image_range = (low - 0.05 * span, high + 0.05 * span)
        with untouched_generator():
            stage = TextureDiffusion(
                tiny_config(crops.image.shape[-1], latent_size=latent_size, image_range=image_range)
            )
        for name in ("vae", "unet", "controlnet"):
            # The same key for unet and controlnet: the control branch begins as a copy of the UNet's encoder (paper).
            initialise(getattr(stage, name), SampleKey(seed, ("vae" if name == "vae" else "unet",)))
    log_brightness = crops.brightness.log()
    moments = torch.stack([log_brightness.mean(), log_brightness.std(unbiased=False).clamp_min(0.1)])
    stage.set_tables({"brightness_moments": moments})
    stage.to(device)
    training, held_out = (part.to(device) for part in split_crops(crops, seed))
    zeros = torch.zeros(len(held_out), *stage.latent_shape, device=device)

    def loss(key: SampleKey) -> Tensor:
        g = key.generator()
        index = torch.randint(len(training), (recipe.batch_size,), generator=g).to(device)
        turn = int(torch.randint(8, (1,), generator=g))
        noise = torch.randn((recipe.batch_size, *stage.latent_shape), generator=g).to(device)
        return _vae_loss(stage, _dihedral(training.image[index], turn), _dihedral(training.sdf[index], turn), noise)

    @torch.no_grad()
    def validate() -> float:
        return float(_vae_loss(stage, held_out.image, held_out.sdf, zeros))

    trained = [stage.vae.decoder, stage.vae.post_quant_conv] if start else [stage.vae]
    result = train(trained, loss, validate, _loop_config(recipe, budget_s, seed, start is not None), checkpoint, log)
    if not start:
        with torch.no_grad():
            latents = torch.cat([stage.encode_moments(x)[0] for x in training.image[:512].split(64)])
        moments = torch.stack([latents.mean((0, 2, 3)), latents.std((0, 2, 3)).clamp_min(1e-3)])
        stage.set_tables({"latent_moments": moments})
    return stage.eval(), result


def fit_texture(
    crops: CropSet,
    start: TextureDiffusion,
    adapt: bool,
    budget_s: float,
    seed: int,
    checkpoint: Path,
    log: Log,
    device: str | torch.device = "cpu",
    *,
    outlines: CropSet | None = None,
) -> tuple[TextureDiffusion, LoopResult]:
    """Train UNet and control branch together on the latents of a trained autoencoder (paper: both are learned).

    The border is then set by `outlines`, by default by all crops: in volumes by those near the middle of their cell, as light
    from above and below blurs the others.
    """
    recipe = (ADAPT if adapt else SCRATCH)["texture"]
    stage = start.to(device)
    training, held_out = (part.to(device) for part in split_crops(crops, seed))

    with torch.no_grad():
        latents = stage.encode(held_out.image)
    validate = _held_out_loss(stage, latents, stage.condition(held_out.sdf, held_out.brightness), seed)

    def loss(key: SampleKey) -> Tensor:
        g = key.generator()
        index = torch.randint(len(training), (recipe.batch_size,), generator=g).to(device)
        turn = int(torch.randint(8, (1,), generator=g))
        sdf = _dihedral(training.sdf[index], turn)
        with torch.no_grad():
            clean = stage.encode(_dihedral(training.image[index], turn))
        condition = stage.condition(sdf, training.brightness[index])
        noise = torch.randn(clean.shape, generator=g).to(device)
        timesteps = _timesteps(len(clean), g).to(device)
        return diffusion_loss(stage.scheduler, lambda x, t: stage.predict(x, t, condition), clean, noise, timesteps)

    modules = [stage.unet, stage.controlnet]
    result = train(modules, loss, validate, _loop_config(recipe, budget_s, seed, adapt), checkpoint, log)
    stage.eval()
    border = fit_border(stage, (crops if outlines is None else outlines).to(device), seed)
    stage.config = replace(stage.config, outline_shift=border.outline_shift, blur=border.blur)
    log(f"light ends {border.outline_shift:.2f} px inside the outline, blurred by {border.blur:.2f} px")
    if adapt and float(crops.scale.median()) < 1:
        # Enlarged, the camera's noise is as coarse as texture, and would be measured with it.
        return stage, result
    # All crops, not only the few held out: one factor cannot over-fit, but ten cells are too few to measure it.
    some = torch.randperm(len(crops), generator=SampleKey(seed, ("calibration",)).generator())[:96]
    stage.config = replace(stage.config, noise_scale=calibrate_contrast(stage, crops.select(some).to(device), seed))
    log(f"noise scale {stage.config.noise_scale:.3f}")
    return stage, result


def texture_contrast(image: Tensor, sdf: Tensor) -> float:
    """Standard deviation, inside cells, of what differs between a pixel's 3 x 3 and its 9 x 9 surroundings.

    Args:
        image: float32 [N, S, S].
        sdf: float32 [N, S, S]; only pixels deeper than 3 px count, so that outlines do not.
    """
    fine = F.avg_pool2d(image[:, None], 3, 1, 1) - F.avg_pool2d(image[:, None], 9, 1, 4)
    inside = fine[:, 0][sdf < -3]
    return float(inside.std()) if inside.numel() > 1 else 0.0


@torch.no_grad()
def calibrate_contrast(stage: TextureDiffusion, crops: CropSet, seed: int) -> float:
    """The `noise_scale` at which generated textures have the contrast of real ones, in [1, 1.3].

    Real crops are taken through the autoencoder first, which takes their camera noise out. By interpolation between three
    scales; 1 if no cell is deep enough to measure.
    """
    masks = CellMasks(sdf=crops.sdf, brightness=crops.brightness, scale=crops.scale)
    target = texture_contrast(stage.decode(stage.encode(crops.image)), crops.sdf)
    if target == 0:
        return 1.0
    noise = stage.draw([SampleKey(seed, ("contrast", i)) for i in range(len(crops))])
    plain, scales, contrasts = stage.config, (1.0, 1.15, 1.3), []
    for scale in scales:
        stage.config = replace(plain, noise_scale=scale)
        contrasts.append(texture_contrast(stage(masks, noise).image[:, 0], crops.sdf))
    stage.config = plain
    return float(np.interp(target, contrasts, scales))


def _sample(x: Tensor, most: int = 2_000_000) -> Tensor:
    """Every n-th value, so that `torch.quantile` takes it."""
    flat = x.flatten()
    return flat[:: max(1, -(-len(flat) // most))]
