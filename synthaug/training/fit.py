"""One command from annotated images to a cascade: crops, background, placement, masks, autoencoder, texture.

Volumes are learned from outlines in single planes, annotated here and there or taken from dense labels plane by plane; the
shapes in between come from the multiview stage, which no data set has to train again.

Progress lives in a folder beside the result (`OUT.fit`), written so that a kill at any moment loses at most the minutes
since the last checkpoint; a finished stage is never trained again. The folder goes when the cascade is complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from synthaug.cascade import Cascade, CascadeConfig
from synthaug.datasets.crops import CropSet, extract_crops
from synthaug.datasets.volumes import extract_slice_crops
from synthaug.errors import CheckpointError, InputError
from synthaug.generators.background import Background
from synthaug.generators.masks import MaskDDPM
from synthaug.generators.multiview import MultiviewDiffusion
from synthaug.generators.population import PopulationSynthesis
from synthaug.generators.stage import Stage, write_atomic
from synthaug.generators.surface import NeuSSurface, SurfaceConfig
from synthaug.generators.texture import TextureDiffusion
from synthaug.hub import ALIASES, embedded_cascades
from synthaug.training import recipes
from synthaug.training.borrowing import (
    USUAL,
    add_cytoplasm,
    add_fragments,
    borrow_placement,
    borrow_styles,
    lend_cells,
    mottle_of_lent,
    press_cells,
)
from synthaug.training.loop import LoopResult
from synthaug.training.material import Frames, Volumes
from synthaug.training.multiview import fit_multiview
from synthaug.types import Pair

S = TypeVar("S", bound=Stage)

RESERVE = 0.08
"""Share of the budget kept for what follows training: saving, the sheet, the numbers."""

VIEWS_SHARE = 0.3
"""Share of the training time that the multiview stage takes where it has to be trained."""

SCRATCH = "scratch"

VIEWS = "nuclei-3d"
"""The embedded cascade that lends its views where a 2D cascade is adapted to volumes: they were trained on spherical harmonics
alone, so that nothing of its data comes along."""


@dataclass(frozen=True)
class FitRequest:
    """What was asked for; a resumed fit has to ask for the same.

    Attributes:
        data: SHA-256 over all images and labels.
        start: Name or folder of the cascade to adapt, or "scratch".
        budget_minutes: Wall-clock minutes for everything, interruptions not counted.
        seed: Of all training.
        voxel_size_um: (Z, Y, X), or None.
        slice_step: See `fit`.
    """

    data: str
    start: str
    budget_minutes: float
    seed: int
    voxel_size_um: tuple[float, float, float] | None = None
    slice_step: int = 3


def fit(
    pairs: Sequence[Pair],
    out: str | Path,
    *,
    start: str = "nuclei-2d",
    budget_minutes: float = 20.0,
    seed: int = 0,
    resume: bool = False,
    voxel_size_um: tuple[float, float, float] | None = None,
    slice_step: int = 3,
    data_card: str = "",
    device: str | torch.device = "cpu",
    log: Callable[[str], None] = print,
) -> Cascade:
    """Train every stage on image-label pairs and save the cascade.

    Args:
        pairs: (image [Y, X] float32 in camera counts, labels [Y, X] int32 contiguous from 1), or both [Z, Y, X]; planes of a
            volume that nobody annotated are `UNLABELLED` in its labels.
        out: Folder of the new cascade.
        start: Cascade to adapt (embedded name, folder or hub id), or "scratch". One of frames serves volumes as well: it
            brings outlines and textures, see `VIEWS`.
        budget_minutes: Wall-clock minutes for everything.
        seed: Of all training.
        resume: Go on with an interrupted fit of the same request.
        voxel_size_um: (Z, Y, X) of the data, kept in the cascade; without it planes of volumes count as one pixel apart.
        slice_step: Of densely annotated volumes every so many planes are used, each by itself.
        data_card: Text for the model card about the data: source, licence, citation.
        device: Where the networks are trained. The views of volumes are always trained on the CPU.
        log: Called with lines of progress.

    Raises:
        InputError, DataError: If the data cannot be used.
        CheckpointError: If `out` holds something else, or an unfinished fit that is not to be resumed.
    """
    begun = time.monotonic()
    out = Path(out)
    if budget_minutes <= 0:
        raise InputError("budget", expected="minutes > 0", got=budget_minutes)
    work = out.with_name(f"{out.name}.fit")
    if resume and (out / "model_index.json").is_file() and not work.exists():
        log(f"{out}: already finished")
        return Cascade.from_pretrained(out)
    request = FitRequest(_hash(pairs), start, budget_minutes, seed, voxel_size_um, slice_step)
    _open_work(work, out, request, resume)
    source = None if start == SCRATCH else Cascade.from_pretrained(start)
    ndim = pairs[0][0].ndim if len(pairs) else 2
    if source is not None and source.ndim > ndim:
        raise InputError(
            "start",
            expected="a 2D cascade, as the images are frames",
            got=f"{start}, which is {source.ndim}D",
            remedy='Name another, or train with "scratch".',
        )
    material = (Volumes if ndim == 3 else Frames)(pairs, source, voxel_size_um, slice_step)
    crops = material.crops
    log(f"{len(crops)} cells on {crops.image.shape[-1]}x{crops.image.shape[-1]} crops; {dict(crops.counts)}")
    for line in material.remarks():
        log(line)

    background = _once(work, "background", Background, material.fit_background, log)

    def fit_population() -> PopulationSynthesis:
        stage = material.fit_population()
        if source is not None:
            borrow_placement(stage, source.population, len(pairs))
        return stage

    population = _once(work, "population", PopulationSynthesis, fit_population, log)
    preparation = time.monotonic() - begun
    budget_s = max(60 * budget_minutes * (1 - RESERVE) - preparation, 0.3 * 60 * budget_minutes)
    shares = {name: r.share for name, r in (recipes.ADAPT if source else recipes.SCRATCH).items()}
    learns_views = ndim == 3 and (source is None or (source.ndim == 3 and source.multiview is None))
    if learns_views:
        shares = {name: share * (1 - VIEWS_SHARE) for name, share in shares.items()} | {"multiview": VIEWS_SHARE}
    results: dict[str, LoopResult] = {}

    def learn(name: str, kind: type[S], run: Callable[[float, Path, recipes.Log], tuple[S, LoopResult]]) -> S:
        history = work / f"{name}.json"

        def once() -> S:
            stage, result = run(budget_s * shares[name], work / f"{name}.pt", lambda line: log(f"{name}: {line}"))
            write_atomic(history, json.dumps(vars(result)).encode())
            return stage

        stage = _once(work, name, kind, once, log)
        results[name] = LoopResult(**json.loads(history.read_text()))
        (work / f"{name}.pt").unlink(missing_ok=True)
        return stage

    outlines = material.outlines
    masks = learn(
        "masks",
        MaskDDPM,
        lambda s, path, say: recipes.fit_masks(
            *(outlines, source.masks if source else None, s, seed, path, say, device),
            least_scale=material.least_scale,
            whole=ndim == 2,
        ),
    )
    extra: dict[str, Any] = {}
    if ndim == 3:
        if learns_views:
            extra["multiview"] = learn(
                "multiview", MultiviewDiffusion, lambda s, path, say: fit_multiview(s, seed, path, say)
            )
        else:
            assert source is not None
            lender = source if source.ndim == 3 else Cascade.from_pretrained(VIEWS)
            extra["multiview"] = lender.multiview
        extra["surface"] = NeuSSurface(SurfaceConfig())
        extra["slicing"] = material.slicing()
    learn(
        "vae",
        TextureDiffusion,
        lambda s, path, say: recipes.fit_vae(
            *(crops, source.texture if source else None, s, seed, path, say),
            latent_size=material.latent_size,
            device=device,
        ),
    )
    # Read back what was saved: an interrupted and an uninterrupted fit go on from the same bits.
    vae = TextureDiffusion.from_pretrained(work / "vae")
    texture = learn(
        "texture",
        TextureDiffusion,
        lambda s, path, say: recipes.fit_texture(
            *(crops, vae, source is not None, s, seed, path, say, device), outlines=material.outlines
        ),
    )
    notes, lent_share, lent_zoom = [], 0.0, 1.0
    if source is not None and ndim == 2:
        lender = Cascade.from_pretrained(start)  # once more, as `source` was trained in place
        lent_share, lent_zoom = lend_cells(masks, lender.masks, len(pairs))
        if lent_share > 0:
            lender.masks.config = replace(lender.masks.config, usual=USUAL)
            lender.texture.config = replace(lender.texture.config, mottle_rate=mottle_of_lent(lent_zoom))
            extra |= {"lent_masks": lender.masks, "lent_texture": lender.texture}
            mottle = "mottled" if lender.texture.config.mottle_rate else "not mottled"
            notes.append(
                f"{lent_share:.0%} of the cells are those of {start} as it is, 1 to {lent_zoom:.2f} times their size, {mottle}"
            )
    notes += material.finish(texture, background, seed)
    cascade = Cascade(
        CascadeConfig(
            name=out.name,
            min_area=population.config.min_area,
            voxel_size_um=voxel_size_um,
            intensity=_intensity([p[0] for p in pairs]),
            lent_share=lent_share,
            lent_zoom=lent_zoom,
        ),
        masks=masks,
        texture=texture,
        background=background,
        population=population,
        **extra,
    )
    notes += material.calibrate(cascade, seed, budget_minutes)
    border = cascade.texture.config
    notes.append(f"light ends {border.outline_shift:.2f} px inside the outlines and is blurred by {border.blur:.2f} px")
    if source is not None:
        borrow_styles(cascade.background, source.background)  # last, as what comes before goes by a row for each image
        if ndim == 2:
            add_cytoplasm(cascade.background, masks.usual_radius, len(pairs))
            add_fragments(cascade.population, masks.usual_radius, len(pairs))
            press_cells(cascade.population, masks.usual_radius, len(pairs))
            notes.append(
                f"{cascade.background.config.cytoplasm_rate:.0%} of the frames have light of the cytoplasm; "
                f"for each cell there are {cascade.population.config.fragment_rate:.3f} groups of fragments"
            )
    for line in notes:
        log(line)
    card = model_card(out.name, request, len(pairs), crops, results, data_card, [*material.remarks(), *notes])
    cascade.save_pretrained(out, half=True, card=card)
    shutil.rmtree(work)
    log(f"{out}: finished after {(time.monotonic() - begun) / 60:.1f} min")
    return Cascade.from_pretrained(out)


def model_card(
    name: str,
    request: FitRequest,
    num_images: int,
    crops: CropSet,
    results: dict[str, LoopResult],
    data_card: str,
    notes: Sequence[str] = (),
) -> str:
    """The README.md of a cascade, with the metadata header that model hubs read."""
    rows = "\n".join(
        f"| {stage} | {r.num_steps} | {r.seconds / 60:.1f} | {r.best_loss:.4f} |" for stage, r in results.items()
    )
    counts = ", ".join(f"{n} {why}" for why, n in crops.counts.items())
    voxel = request.voxel_size_um
    size = f" --voxel-size {'x'.join(f'{n:g}' for n in voxel)}" if voxel else ""
    remarks = "".join(f"- {note}\n" for note in notes)
    return f"""---
library_name: synthaug
tags: [microscopy, segmentation, synthetic-data, diffusion]
---

# {name}

A synthaug cascade: it generates fluorescence microscopy images of single-cell masks, textures and populations, with exact
instance labels, to train segmentation networks. Images are in the camera counts of the training data.

## Data

{data_card.strip() or "The user's own images; licence and citation were not stated."}

{num_images} images, {len(crops)} whole cells ({counts}), crops of {crops.image.shape[-1]} px.
{remarks}
## Training

`synthaug fit DATA --out {name} --from {request.start} --budget {request.budget_minutes:g} --seed {request.seed}{size}`

| stage | steps | minutes | held-out loss |
|---|---|---|---|
{rows}

## Limits

Trained on the images above only: other stains, magnifications or cell types need a fit of their own. Synthetic images
support training; they are no measurement.

Method: Cascaded Diffusion Models for 2D and 3D Microscopy Image Synthesis to Enhance Cell Segmentation, ISBI 2025.
"""


def _once(work: Path, name: str, kind: type[S], make: Callable[[], S], log: Callable[[str], None]) -> S:
    """The stage saved under `name`, made first if it is not there."""
    folder = work / name
    if not folder.is_dir():
        begun = time.monotonic()
        stage = make()
        temporary = work / f".{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        stage.save_pretrained(temporary)
        temporary.rename(folder)
        log(f"{name}: done in {time.monotonic() - begun:.0f} s")
    else:
        log(f"{name}: already done")
    return kind.from_pretrained(folder)


def _open_work(work: Path, out: Path, request: FitRequest, resume: bool) -> None:
    """Make the progress folder, or check that the one there belongs to this request."""
    note = work / "fit.json"
    if (out / "model_index.json").is_file() and not resume:
        raise CheckpointError(
            str(out), expected="a new folder", got="a finished cascade", remedy="Choose another --out."
        )
    if out.exists() and not (out / "model_index.json").is_file() and any(out.iterdir()):
        raise CheckpointError(str(out), expected="a new folder", got="other files", remedy="Choose another --out.")
    if note.is_file():
        before = json.loads(note.read_text())
        if not resume:
            raise CheckpointError(
                str(work), expected="no unfinished fit", got="one", remedy="Pass --resume, or delete the folder."
            )
        asked = json.loads(json.dumps(asdict(request)))
        changed = [k for k, v in asked.items() if before.get(k) != v]
        if changed:
            raise CheckpointError(
                str(work),
                expected=f"the request this fit began with ({', '.join(f'{k} {before.get(k)}' for k in changed)})",
                got=", ".join(f"{k} {getattr(request, k)}" for k in changed),
                remedy="Repeat the first command with --resume, or choose another --out.",
            )
    work.mkdir(parents=True, exist_ok=True)
    write_atomic(note, (json.dumps(asdict(request), indent=2) + "\n").encode())


def _hash(pairs: Sequence[Pair]) -> str:
    digest = hashlib.sha256()
    for image, labels in pairs:
        digest.update(np.ascontiguousarray(image, np.float32).tobytes())
        digest.update(np.ascontiguousarray(labels, np.int32).tobytes())
    return digest.hexdigest()


def _intensity(images: Sequence[NDArray[np.float32]]) -> str:
    """Smallest of uint8, uint16 and float32 that holds the real images."""
    if any((image != np.round(image)).any() or image.min() < 0 for image in images):
        return "float32"
    top = max(float(image.max()) for image in images)
    return "uint8" if top <= 255 else "uint16" if top <= 65535 else "float32"


def choose_start(pairs: Sequence[Pair]) -> str:
    """The embedded cascade of these dimensions whose crops fit the cells best, or "scratch" where there is none."""
    ndim = pairs[0][0].ndim if len(pairs) else 2
    names = [n for n in embedded_cascades() if n not in ALIASES]
    sizes = {n: c.crop_size for n in names if (c := Cascade.from_pretrained(n)).ndim == ndim}
    if not sizes:
        return SCRATCH
    crop_size = (extract_slice_crops if ndim == 3 else extract_crops)(pairs).image.shape[-1]
    return min(sizes, key=lambda n: abs(sizes[n] - crop_size))
