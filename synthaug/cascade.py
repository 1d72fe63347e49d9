"""Cascade: joins the stages, and nothing else does.

    2D  keys -> MaskDDPM -> TextureDiffusion -> Cells                                     the costly half, `cells`
        (a share of the cells by stages of another cascade, "lent" ones, where few cells were annotated)
    3D  keys -> MaskDDPM -> MultiviewDiffusion -> NeuSSurface -> Slicing -> TextureDiffusion -> Cells
        Cells, keys -> PopulationSynthesis -> Background -> Population                    the cheap half, `populate`

On disk a cascade is a diffusers-style folder: `model_index.json`, a subfolder a stage, a model card `README.md`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from synthaug.errors import CheckpointError, InputError, SynthAugError
from synthaug.generators.background import Background, BackgroundMode
from synthaug.generators.masks import MaskDDPM
from synthaug.generators.multiview import MultiviewDiffusion
from synthaug.generators.population import PopulationSynthesis
from synthaug.generators.priors import ShapePrior
from synthaug.generators.shapes import ShapeKind
from synthaug.generators.slicing import Slicing
from synthaug.generators.stage import Stage, write_atomic
from synthaug.generators.surface import NeuSSurface
from synthaug.generators.texture import TextureDiffusion
from synthaug.hub import find_cascade
from synthaug.randomness import SampleKey
from synthaug.types import CellMasks, Cells, FrameStyles, Population, Slices

MAX_ATTEMPTS = 12
"""How often a rejected cell is redrawn. At 5 % rejects, the chance to run out is 1 in 10^15."""

REACHED = 0.8
"""Share of the cells below which a population warns that was asked for a number or density of them; one, unless it was the
only one, may always be missing."""

NumCells = int | tuple[int, int] | None

STAGES: dict[str, type[Stage]] = {
    "masks": MaskDDPM,
    "multiview": MultiviewDiffusion,
    "surface": NeuSSurface,
    "prior": ShapePrior,
    "slicing": Slicing,
    "texture": TextureDiffusion,
    "population": PopulationSynthesis,
    "background": Background,
    "lent_masks": MaskDDPM,
    "lent_texture": TextureDiffusion,
}
"""Every stage a cascade can have, in the order of the flow."""


@dataclass(frozen=True)
class CascadeConfig:
    """What belongs to the cascade as a whole.

    Attributes:
        name: Shown by `synthaug info`.
        block_size: Cells generated together, a multiple of 8; always padded to this number, so that a key's bits never
            depend on its company.
        min_area: Smallest instance, pixels (3D: voxels).
        voxel_size_um: (Z, Y, X) of the real data in micrometres, Z of no meaning in 2D; None if unknown.
        intensity: Data type of the real images, for writing synthetic ones ("uint8", "uint16" or "float32").
        lent_share: Share of the cells that the lent stages make, by blocks of `block_size`.
        lent_zoom: Size that a lent cell is brought to, between 1, its own, and this (even odds for every factor).
    """

    name: str = "unnamed"
    block_size: int = 8
    min_area: int = 20
    voxel_size_um: tuple[float, float, float] | None = None
    intensity: str = "uint16"
    lent_share: float = 0.0
    lent_zoom: float = 1.0

    def __post_init__(self) -> None:
        if self.block_size < 8 or self.block_size % 8:
            # Vectorised CPU loops treat the elements beyond a multiple of their width differently, in the last bit.
            raise InputError("block_size", expected="a multiple of 8", got=self.block_size)
        if self.voxel_size_um is not None and (len(self.voxel_size_um) != 3 or min(self.voxel_size_um) <= 0):
            raise InputError("voxel_size_um", expected="(Z, Y, X) > 0 in micrometres", got=self.voxel_size_um)
        if not 0 <= self.lent_share <= 1 or self.lent_zoom <= 0:
            got = f"{self.lent_share} and {self.lent_zoom}"
            raise InputError("lent_share, lent_zoom", expected="one in [0, 1] and one > 0", got=got)


class Origin(NamedTuple):
    """The stages that make some of the cells asked for, which of them, and the factor each one's size is multiplied by."""

    masks: MaskDDPM
    texture: TextureDiffusion
    which: list[int]
    zoom: dict[int, float]


class Cascade(nn.Module):
    """Fresh cells and populations from keys.

    Args:
        config: See `CascadeConfig`.
        masks, texture, background, population: The trained stages.
        multiview, surface, slicing: Those that only a 3D cascade has.
        prior: Shapes without weights, in place of what MaskDDPM draws (2D) or of views and surface (3D).
        lent_masks, lent_texture: Those of another 2D cascade, which make `lent_share` of the cells: whoever learns from the
            cells of a few annotated ones meets others, too.

    >>> cascade = Cascade.from_pretrained("nuclei-2d")
    >>> population = cascade.generate([SampleKey(0, ("frame", 0))], size=(256, 256))
    >>> population.image.shape, population.labels.dtype
    (torch.Size([1, 1, 256, 256]), torch.int32)
    """

    def __init__(
        self,
        config: CascadeConfig,
        masks: MaskDDPM,
        texture: TextureDiffusion,
        background: Background,
        population: PopulationSynthesis,
        *,
        multiview: MultiviewDiffusion | None = None,
        surface: NeuSSurface | None = None,
        slicing: Slicing | None = None,
        prior: ShapePrior | None = None,
        lent_masks: MaskDDPM | None = None,
        lent_texture: TextureDiffusion | None = None,
    ) -> None:
        super().__init__()
        lent = (lent_masks, lent_texture)
        lends = None not in lent
        if lends != (config.lent_share > 0) or (not lends and lent != (None, None)) or (lends and slicing is not None):
            expected = "lent_masks, lent_texture and a lent_share in 2D, or none of them"
            raise InputError("Cascade", expected=expected, got=f"lent_share {config.lent_share}")
        sizes = {s.config.crop_size for s in (masks, texture, slicing, *lent) if s is not None}
        if len(sizes) > 1:
            raise InputError("Cascade", expected="masks, slicing and texture of one crop size", got=sorted(sizes))
        if slicing is not None and prior is None and (multiview is None or surface is None):
            raise InputError(
                "Cascade", expected="multiview and surface, or a prior, beside slicing", got="slicing alone"
            )
        self.config = config
        self.masks, self.texture, self.background, self.population = masks, texture, background, population
        self.multiview, self.surface, self.slicing, self.prior = multiview, surface, slicing, prior
        self.lent_masks, self.lent_texture = lent
        self.rejects: Counter[str] = Counter()
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the costly half runs."""
        return self.masks.device

    def networks_to(self, device: str | torch.device) -> Cascade:
        """Move the networks alone, in place: cells are made on `device` and come back to where they are placed.

        Placement, light and camera run in kernels of the CPU, beside which a GPU would only wait. `to` moves all.
        """
        for stage in (self.masks, self.multiview, self.texture, self.lent_masks, self.lent_texture):
            if stage is not None:
                stage.to(device)
        return self

    @property
    def block_size(self) -> int:
        """Cells generated together."""
        return self.config.block_size

    @property
    def crop_size(self) -> int:
        """Side of a cell's crop, pixels."""
        return self.masks.config.crop_size

    @property
    def least_scale(self) -> float:
        """Image pixels per crop pixel of cells that fit the crop."""
        return self.masks.config.least_scale

    @property
    def ndim(self) -> int:
        """2 for frames, 3 for volumes."""
        return 2 if self.slicing is None else 3

    @property
    def num_slices(self) -> int:
        """Planes of a cell; 1 in 2D."""
        return 1 if self.slicing is None else self.slicing.config.num_slices

    @property
    def voxel_size_um(self) -> tuple[float, float, float] | None:
        """(Z, Y, X) in micrometres, or None where the real data carried none."""
        return self.config.voxel_size_um

    # The costly half ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def cells(self, keys: Sequence[SampleKey]) -> Cells:
        """One cell a key; row i depends on `keys[i]` alone.

        Masks that are empty, in several parts, holed, too small or at the crop's edge, and volumes that `Slicing` rejects,
        are redrawn from child keys and counted in `rejects` (`drawn` counts all masks drawn, without the padding).
        """
        if not keys:
            raise InputError("keys", expected="at least one SampleKey", got="none")
        origins = self._origins(keys)
        found: dict[int, Any] = {}  # CellMasks or Slices
        waiting = set(range(len(keys)))
        for attempt in range(MAX_ATTEMPTS):
            for origin in origins:
                rest = origin._replace(which=[i for i in origin.which if i in waiting])
                outlines = self._outlines(keys, rest, attempt)
                found.update(outlines if self.slicing is None else self._volumes(keys, outlines, attempt))
            waiting -= found.keys()
            if not waiting:
                break
        if waiting:
            raise SynthAugError(
                f"{len(waiting)} of {len(keys)} cells were rejected {MAX_ATTEMPTS} times in a row ({dict(self.rejects)}): "
                "this cascade's shapes are not trained enough; fit it with a larger --budget."
            )
        out = []
        for origin in origins:
            for block in _blocks(origin.which, self.block_size):
                rows = _pad(block, self.block_size)
                shapes = type(found[0]).cat([found[i] for i in rows])
                noise = origin.texture.draw([keys[i].child("texture") for i in rows], self.num_slices)
                out.append(origin.texture(shapes, noise).select(slice(0, len(block))).to(self.background.device))
        order = torch.tensor([i for origin in origins for i in origin.which], device=self.background.device)
        return Cells.cat(out).select(order.argsort())

    def _origins(self, keys: Sequence[SampleKey]) -> list[Origin]:
        """Who makes which of the cells."""
        share, zoom = self.config.lent_share, self.config.lent_zoom
        own, lent = list(range(len(keys))), {}
        if share > 0:
            # Whole blocks of keys numbered one after the other: two half-filled blocks would cost twice as much.
            groups = [key.group(self.block_size) for key in keys]
            is_lent = {group: group.child("lent").numpy().random() < share for group in set(groups)}
            places = {i: key.child("size").numpy().random() for i, key in enumerate(keys) if is_lent[groups[i]]}
            lent = {i: zoom**place for i, place in places.items()}
            own = [i for i in own if i not in lent]
        origins = [Origin(self.masks, self.texture, own, {})]
        if lent:
            assert self.lent_masks is not None
            assert self.lent_texture is not None
            origins.append(Origin(self.lent_masks, self.lent_texture, list(lent), lent))
        return origins

    def _outlines(self, keys: Sequence[SampleKey], origin: Origin, attempt: int) -> dict[int, CellMasks]:
        """The masks of `keys` at `origin.which` that are good, by index."""
        good = {}
        for block in _blocks(origin.which, self.block_size):
            drawn = _pad([keys[i].child("mask", attempt) for i in block], self.block_size)
            masks, rejects = origin.masks(origin.masks.draw(drawn))
            if origin.zoom:
                zoom = torch.tensor([origin.zoom[i] for i in _pad(block, self.block_size)], device=masks.scale.device)
                masks = replace(masks, scale=masks.scale * zoom)
            if self.prior is not None and self.slicing is None:
                masks = self.prior.outlines(masks, self.prior.draw(drawn))
                rejects = [None] * len(masks)
            area = masks.mask.flatten(1).sum(1) * masks.scale**2
            self.rejects["drawn"] += len(block)
            for row, i in enumerate(block):
                # In 3D the smallest instance is one of voxels: the volume decides.
                too_small = self.slicing is None and area[row] < self.config.min_area
                why = rejects[row] or ("too small" if too_small else None)
                if why is None:
                    good[i] = masks.select(slice(row, row + 1))
                else:
                    self.rejects[why] += 1
        return good

    def _volumes(self, keys: Sequence[SampleKey], outlines: dict[int, CellMasks], attempt: int) -> dict[int, Slices]:
        """The volumes around these outlines that are good, cut into slices, by index."""
        assert self.slicing is not None
        good = {}
        for block in _blocks(sorted(outlines), self.block_size):
            rows = _pad(block, self.block_size)
            outline = CellMasks.cat([outlines[i] for i in rows])
            own = [keys[i].child("shape", attempt) for i in rows]
            noise = self.slicing.draw([k.child("slicing") for k in own])
            if self.prior is not None:
                surface = self.prior(outline, self.prior.draw([k.child("prior") for k in own]))
                slices, rejects = self.slicing(surface, None, noise)
            else:
                assert self.multiview is not None
                assert self.surface is not None
                views = self.multiview(outline, self.multiview.draw([k.child("views") for k in own]))
                surface = self.surface(views, self.multiview.cameras, self.surface.draw(own))
                slices, rejects = self.slicing(surface, outline, noise)
            volume = slices.mask.flatten(1).sum(1) * slices.scale**2
            for row, i in enumerate(block):
                why = rejects[row] or ("too small" if volume[row] < self.config.min_area else None)
                if why is None:
                    good[i] = slices.select(slice(row, row + 1))
                else:
                    self.rejects[why] += 1
        return good

    # The cheap half -----------------------------------------------------------------------------------------------

    def styles(self, keys: Sequence[SampleKey], density: float | None = None) -> FrameStyles:
        """How each frame looks: level, brightness, density and noise, drawn jointly from the real frames.

        Args:
            keys: One a frame.
            density: Cells per pixel (3D: per voxel); default: as drawn.
        """
        styles = self.background.draw_styles(keys)
        if density is None:
            return styles
        if density < 0:
            raise InputError("density", expected="cells per pixel, >= 0", got=density)
        values = styles.values.clone()
        values[:, styles.names.index("density")] = density
        return replace(styles, values=values)

    def num_cells(
        self,
        keys: Sequence[SampleKey],
        size: Sequence[int],
        *,
        num_cells: NumCells = None,
        density: float | None = None,
    ) -> list[int]:
        """How many cells each frame asks for; needs no cells, so that a stream can plan ahead.

        Args:
            keys: One a frame.
            size: (Y, X) in pixels, or (Z, Y, X) in voxels.
            num_cells: Fixed number, or (least, most); default: from the density.
            density: Cells per pixel (3D: per voxel); default: from the real frames' own distribution.
        """
        styles = self.styles(keys, density)
        counts = [k.child("count") for k in keys]
        return self.population.num_cells(counts, self._size(size), styles["density"], num_cells=num_cells)

    @torch.no_grad()
    def populate(
        self,
        cells: Cells,
        keys: Sequence[SampleKey],
        size: Sequence[int],
        *,
        picks: Sequence[Tensor] | None = None,
        num_cells: NumCells = None,
        density: float | None = None,
        clustering: float | None = None,
        background: BackgroundMode = "model",
    ) -> Population:
        """Frames made of given cells.

        Args:
            cells: The cells to place.
            keys: One a frame; they decide everything but the cells.
            size: (Y, X) in pixels, or (Z, Y, X) in voxels.
            picks: For each frame the indices into `cells` to place, int64; default: as many as `num_cells` says, drawn
                without replacement as far as there are enough.
            num_cells, density: See `num_cells`; warns where much fewer than asked for here find a place.
            clustering: Probability that a cell is placed next to another one; default: fitted.
            background: "model", or "real" for the free regions of real frames.

        Returns:
            float32 image in camera counts and int32 labels.
        """
        shape = self._size(size)
        styles = self.styles(keys, density)
        if picks is None:
            asked = self.num_cells(keys, shape, num_cells=num_cells, density=density)
            picks = [_pick(k.child("pick"), n, len(cells)) for k, n in zip(keys, asked)]
        noise = self.population.draw([k.child("place") for k in keys], shape, [len(p) for p in picks])
        cells = cells.to(self.background.device)  # those of a frame without any are made where the networks are
        scenes = self.population(cells, picks, noise, shape, clustering=clustering)
        asked_for, placed = int(scenes.num_requested.sum()), int(scenes.num_placed.sum())
        is_short = placed < REACHED * (asked_for - 1) or placed == 0 < asked_for
        # What nobody asked for is only counted: densities that few annotated frames borrow may be larger than fits.
        if is_short and (num_cells is not None or density is not None):
            units = len(keys) * math.prod(shape) / 10 ** (2 * self.ndim)
            unit = "100 x 100 px" if self.ndim == 2 else "100 x 100 x 100 voxels"
            warnings.warn(
                f"only {placed} of {asked_for} cells found a free place: {placed / units:.1f} cells per {unit} "
                f"instead of {asked_for / units:.1f}. Ask for fewer cells or a larger size.",
                stacklevel=2,
            )
        camera = self.background.draw(keys, shape)
        image = self.background(scenes.light, scenes.labels, styles, camera, background)
        return Population(
            image=image,
            labels=scenes.labels,
            num_requested=scenes.num_requested,
            num_placed=scenes.num_placed,
            voxel_size_um=self.config.voxel_size_um,
        )

    @torch.no_grad()
    def paste(
        self,
        cells: Cells,
        image: Tensor,
        labels: Tensor,
        key: SampleKey,
        *,
        num_cells: NumCells = None,
        clustering: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A real image with synthetic cells in its free space.

        Args:
            cells: The cells to place.
            image: float32 [1, (Z,) Y, X], any intensity scale.
            labels: int32 [1, (Z,) Y, X], contiguous from 1.
            key: Decides everything but the cells.
            num_cells: Fixed number, or (least, most); default: as many as the image already has, at least 1.
            clustering: See `populate`.

        Returns:
            The image with their light added, and the labels with theirs appended.
        """
        shape = self._size(image.shape[1:])
        existing = int(labels.max())
        asked = max(existing, 1) if num_cells is None else num_cells
        density = torch.zeros(1)
        count = self.population.num_cells([key.child("count")], shape, density, num_cells=asked)[0]
        noise = self.population.draw([key.child("place")], shape, [count])
        picks = [_pick(key.child("pick"), count, len(cells))]
        cells = cells.to(self.background.device)
        scenes = self.population(cells, picks, noise, shape, clustering=clustering, occupied=labels[None])
        styles = self.background.styles_of(image, labels)
        out = self.background.add_cells(image[None], scenes.light, styles, self.background.draw([key], shape))
        added = scenes.labels[0]
        return out[0], torch.where(added > 0, added + existing, labels)

    def generate(
        self,
        keys: Sequence[SampleKey],
        size: Sequence[int],
        *,
        num_cells: NumCells = None,
        density: float | None = None,
        clustering: float | None = None,
        background: BackgroundMode = "model",
    ) -> Population:
        """Frames of fresh cells, none of which appears twice; arguments as in `populate`."""
        asked = self.num_cells(keys, size, num_cells=num_cells, density=density)
        names = [k.child("cell", i) for k, n in zip(keys, asked) for i in range(n)]
        starts = [sum(asked[:i]) for i in range(len(asked))]
        picks = [torch.arange(s, s + n) for s, n in zip(starts, asked)]
        cells = self.cells(names or [keys[0].child("cell", 0)])
        return self.populate(
            *(cells, keys, size),
            picks=picks,
            num_cells=num_cells,
            density=density,
            clustering=clustering,
            background=background,
        )

    # On disk ------------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """SHA-256 over all weights, tables and configs: two cascades with the same one stream the same bits."""
        digest = hashlib.sha256()
        for name, stage in self.stages().items():
            digest.update(f"{name}{sorted(asdict(stage.config).items())}".encode())
            for key, tensor in sorted(stage.state_dict().items()):
                digest.update(key.encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        config = asdict(self.config)
        digest.update(str([config["block_size"], config["min_area"]]).encode())
        if self.config.lent_share:
            digest.update(str([config["lent_share"], config["lent_zoom"]]).encode())
        return digest.hexdigest()

    def with_prior(self, kind: ShapeKind, *, num_masks: int = 256) -> Cascade:
        """The same cascade with shapes of a prior without weights, for comparisons.

        In 2D the prior's outlines replace those of MaskDDPM, in 3D its surfaces those of views and NeuS; sizes and
        brightness stay MaskDDPM's. It is fitted to `num_masks` outlines that MaskDDPM draws.

        Args:
            kind: "spherical-harmonics", "ellipsoid" or "bezier".
            num_masks: Outlines it is fitted to.
        """
        keys = [SampleKey(0, ("prior", i)) for i in range(num_masks)]
        plain = copy.copy(self)
        plain.rejects = Counter()
        drawn = plain._outlines(keys, Origin(self.masks, self.texture, list(range(num_masks)), {}), 0)
        prior = ShapePrior.fit(CellMasks.cat([drawn[i] for i in sorted(drawn)]).mask.cpu(), kind)
        stages = {name: stage for name, stage in self.stages().items() if name not in ("multiview", "surface", "prior")}
        if self.slicing is not None:  # the prior's surfaces need no other ends than they have
            stages["slicing"] = Slicing(replace(self.slicing.config, bulge=1.0))
        return Cascade(self.config, **stages, prior=prior)

    def at_voxel_size(self, voxel_size_um: Sequence[float]) -> Cascade:
        """The same cells, seen with other voxels; a copy.

        Sizes, distances and densities follow. What belongs to the camera stays as it is voxel by voxel: noise, halo, grain of
        the texture. Good for steps between similar microscopes, not for another magnification.

        Args:
            voxel_size_um: (Z, Y, X) in micrometres, each within a factor of 2 of the cascade's own; Z has no meaning in 2D.

        Raises:
            InputError: The cascade's own voxel size is not known, or the other one is too far from it or stretched in plane.
        """
        own, new = self.config.voxel_size_um, tuple(float(n) for n in voxel_size_um)
        if own is None:
            raise InputError(
                "voxel_size_um",
                expected="a cascade whose own voxel size is known",
                got=f"{self.config.name}, fitted to data without one",
                remedy="Fit it with --voxel-size, or leave voxel_size_um out.",
            )
        factors = [n / o for n, o in zip(new, own)] if len(new) == 3 else []
        if self.ndim == 2:
            factors[:1] = [1.0] * len(factors[:1])
        if not factors or not all(0.5 <= f <= 2 for f in factors) or abs(factors[1] / factors[2] - 1) > 0.01:
            raise InputError(
                "voxel_size_um",
                expected=f"(Z, Y, X), each within a factor of 2 of {own}, with the same proportion of Y to X",
                got=tuple(voxel_size_um),
                remedy="Resample in the transform, or fit a cascade to data of that voxel size.",
            )
        z, plane = factors[0], factors[1]
        scaled = copy.deepcopy(self)
        scaled.config = replace(
            self.config,
            voxel_size_um=(new[0], new[1], new[2]),
            min_area=max(round(self.config.min_area / (z * plane**2)), 1),
        )
        for masks in (scaled.masks, scaled.lent_masks):
            if masks is not None:
                masks.attributes[:, 0] -= math.log(plane)
        scaled.population.config = self.population.config.at_scale(z, plane)
        scaled.background.scale_table(z, plane)
        if scaled.slicing is not None:
            texture = self.texture.config
            scaled.texture.config = replace(
                texture, axial_sigma=texture.axial_sigma / z, slice_sigma=texture.slice_sigma / z
            )
            scaled.slicing.config = scaled.slicing.config.at_scale(z, plane)
        return scaled

    def stages(self) -> dict[str, Any]:
        """The stages by name, in the order of the flow; those that this cascade does not have are left out."""
        every = {name: getattr(self, name) for name in STAGES}
        return {name: stage for name, stage in every.items() if stage is not None}

    def _size(self, size: Sequence[int]) -> tuple[int, ...]:
        if len(size) != self.ndim or min(size) < (8 if self.ndim == 2 else 4):
            expected = "(Y, X), at least 8 pixels each" if self.ndim == 2 else "(Z, Y, X), at least 4 voxels each"
            raise InputError(f"size, for a {self.ndim}D cascade", expected=expected, got=tuple(size))
        return tuple(int(n) for n in size)

    def save_pretrained(self, folder: str | Path, *, half: bool = False, card: str | None = None) -> None:
        """Write the cascade; the folder appears complete or not at all.

        Args:
            folder: Replaced if it is a cascade already.
            half: Store network weights as float16: half the size, read back as float32.
            card: Text of the model card.

        Raises:
            CheckpointError: If the folder exists and holds something else.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / "model_index.json").is_file() and any(folder.iterdir()):
            raise CheckpointError(
                str(folder), expected="a new folder or a cascade", got="other files", remedy="Choose another folder."
            )
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        index: dict[str, Any] = {"_class_name": "Cascade", "config": asdict(self.config)}
        for name, stage in self.stages().items():
            stage.save_pretrained(temporary / name, half=half)
            index[name] = ["synthaug", type(stage).__name__]
        (temporary / "README.md").write_text(
            card or f"# {self.config.name}\n\nA synthaug cascade without a model card.\n"
        )
        write_atomic(temporary / "model_index.json", (json.dumps(index, indent=2) + "\n").encode())
        # The old one is not deleted before the new one is in its place.
        replaced = folder.with_name(f".{folder.name}.replaced")
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
        try:
            temporary.rename(folder)
        except BaseException:
            if replaced.exists():
                replaced.rename(folder)
            raise
        shutil.rmtree(replaced, ignore_errors=True)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Cascade:
        """Load an embedded cascade by name, a folder, or a repository of the Hugging Face hub.

        Raises:
            CheckpointError: If there is no such cascade, or a part of it is missing.
        """
        folder = find_cascade(name)
        index = json.loads((folder / "model_index.json").read_text())
        if index.get("_class_name") != "Cascade":
            raise CheckpointError(str(folder), expected="a synthaug cascade", got=index.get("_class_name"))
        config: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in index["config"].items()}
        stages: dict[str, Any] = {
            name: kind.from_pretrained(folder / name) for name, kind in STAGES.items() if name in index
        }
        return cls(CascadeConfig(**config), **stages)


def _blocks(items: list[int], length: int) -> list[list[int]]:
    return [items[i : i + length] for i in range(0, len(items), length)]


def _pad(items: list[Any], length: int) -> list[Any]:
    return items + items[-1:] * (length - len(items))


def _pick(key: SampleKey, count: int, available: int) -> Tensor:
    """`count` indices below `available`, each used once more only when all have been used."""
    generator = key.generator()
    rounds = [torch.randperm(available, generator=generator) for _ in range(-(-count // available))]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *rounds])[:count]
