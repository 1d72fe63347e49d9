"""What the stages of a fit learn from: cells of frames, or outlines in single planes of volumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from synthaug.cascade import Cascade
from synthaug.datasets.crops import CropSet, extract_crops
from synthaug.datasets.volumes import (
    annotated_planes,
    extract_slice_crops,
    fit_axial,
    slice_pairs,
    thin_annotations,
)
from synthaug.errors import DataError, SynthAugError
from synthaug.generators.axial import axial_extent, axial_sigma, expected_half_length
from synthaug.generators.background import Background
from synthaug.generators.cameras import VIEW_RADIUS
from synthaug.generators.ghosts import fit_ghosts
from synthaug.generators.population import PopulationSynthesis
from synthaug.generators.slicing import Slicing, SlicingConfig, slices_needed
from synthaug.generators.texture import TextureDiffusion
from synthaug.generators.volume_fit import dark_level, measure_sections
from synthaug.randomness import SampleKey
from synthaug.training.background_fit import fit_background
from synthaug.training.correlation import extract_patches, fit_rho
from synthaug.training.half_light import match_half_light
from synthaug.training.population_fit import fit_population
from synthaug.types import UNLABELLED, Pair

SAME_SIZE, LEAST_SCALE = 0.75, 0.25
"""Ratio of sizes of cells from which they are drawn as they are, and the strongest enlargement."""

MIN_OUTLINES = 12
"""Outlines near the middle of cells below which the larger half of all is learned from instead."""

BULGE = 1.2
"""`SlicingConfig.bulge`: sections of the surfaces fill 0.62 to 0.64 of length times largest section, those of an ellipsoid
0.67, annotated nuclei (BBBC050) 0.68, and 0.67 with this."""

CALIBRATION_CELLS, CALIBRATION_VOLUMES = 32, 48
"""Fresh cells, and volumes made of them, by which the brightness of volumes is set."""

LEAST_BUDGET = 0.5
"""Minutes of a fit from which on frames are made to see where their light ends, which takes a quarter of a minute."""

VOLUME_MARGIN = 2.0
"""How far beyond the volumes that the real outlines tell a generated cell may be, as a factor."""


class Frames:
    """2D: every whole cell serves the outlines and the textures.

    Args:
        pairs: Images and labels.
        source: The cascade that is adapted, whose crop size is kept; or None.
        voxel_size_um, slice_step: Of volumes.
    """

    latent_size = 16

    def __init__(
        self,
        pairs: Sequence[Pair],
        source: Cascade | None,
        voxel_size_um: tuple[float, float, float] | None,
        slice_step: int,
    ) -> None:
        self.pairs = pairs
        self.crops: CropSet = extract_crops(pairs, crop_size=source.crop_size if source else None)
        self.least_scale = matching_scale(self.crops, source)
        if self.least_scale < 1:
            self.crops = extract_crops(pairs, crop_size=self.crops.image.shape[-1], least_scale=self.least_scale)
        self.outlines = self.crops

    def remarks(self) -> list[str]:
        """What was found in the data, a line each."""
        return [f"cells are drawn {1 / self.least_scale:.1f} times enlarged"] if self.least_scale < 1 else []

    def fit_background(self) -> Background:
        """Background and camera of the images."""
        return fit_background(*self._apart())

    def fit_population(self) -> PopulationSynthesis:
        """Placement of the cells."""
        return fit_population(self._apart()[1], min_area=self.crops.min_area)

    def finish(self, texture: TextureDiffusion, background: Background, seed: int) -> list[str]:
        """What is set after training; a line about each."""
        return []

    def calibrate(self, cascade: Cascade, seed: int, budget_minutes: float) -> list[str]:
        """What is set once all stages are there; a line about each."""
        if budget_minutes < LEAST_BUDGET:
            return []
        try:
            return match_half_light(cascade, self.pairs, self.pairs[0][0].shape, seed)
        except SynthAugError as error:  # trained for seconds: the cascade is saved all the same
            return [f"the light's place left as measured on crops: {error}"]

    def slicing(self) -> Slicing:
        """Only volumes are cut."""
        raise NotImplementedError

    def _apart(self) -> tuple[list[NDArray[np.float32]], list[NDArray[np.int32]]]:
        return [p[0] for p in self.pairs], [p[1] for p in self.pairs]


class Volumes(Frames):
    """3D: outlines near the middle of cells serve the shapes, all outlines the textures.

    Args:
        pairs: Volumes; dense labels are used plane by plane, every `slice_step`-th one.
        source, voxel_size_um, slice_step: See `training.fit.fit`.
    """

    latent_size = 8

    def __init__(
        self,
        pairs: Sequence[Pair],
        source: Cascade | None,
        voxel_size_um: tuple[float, float, float] | None,
        slice_step: int,
    ) -> None:
        self.pairs = [
            (image, thin_annotations(labels, slice_step) if len(annotated_planes(labels)) == len(labels) else labels)
            for image, labels in pairs
        ]
        crops = extract_slice_crops(self.pairs, crop_size=source.crop_size if source else None)
        self.least_scale = matching_scale(crops, source)
        if self.least_scale < 1:
            size = crops.image.shape[-1]
            crops = extract_slice_crops(self.pairs, crop_size=size, least_scale=self.least_scale)
        self.crops = crops
        self.outlines = crops.select(crops.central.nonzero()[:, 0])
        if len(self.outlines) < MIN_OUTLINES:
            # Planes cut cells anywhere, and a shape is made from a cell's largest outline. Of the sections of a sphere the
            # larger half have 87 % of its radius or more (stereology, Wicksell 1925); the mean of all has 79 %.
            self.outlines = crops.select((crops.radius >= crops.radius.median()).nonzero()[:, 0])
        # What is said of sections leaves saturated pixels in: they matter to the noise alone.
        self.sections = [
            section
            for image, labels in self.pairs
            for section in measure_sections(image.astype(np.float64), labels, np.inf)[0]
        ]
        self.axial = fit_axial(self.pairs, voxel_size_um, expected_half_length(self.sections))
        if not np.isfinite(self.axial.stretch) or self.axial.stretch <= 0:
            raise DataError(
                "the annotated volumes", expected="outlines whose cells end within the stack", got=str(self.axial)
            )
        # Ellipsoids over the outlines, as long as the cells are annotated.
        area = (self.outlines.sdf < 0).flatten(1).sum(1).numpy() * self.outlines.scale.numpy() ** 2
        self.lengths = 2 * np.sqrt(area / np.pi) * self.axial.stretch / self.axial.z_spacing
        self.volumes = np.maximum(area * self.lengths * 2 / 3, 1.0)

    def remarks(self) -> list[str]:
        planes = sum(len(annotated_planes(labels)) for _, labels in self.pairs)
        fit = self.axial
        return [
            *super().remarks(),
            f"{planes} annotated planes; {len(self.outlines)} outlines serve the shapes",
            f"cells are {fit.stretch:.2f} times as long along z as in plane, their light {fit.light_stretch:.2f} times",
            f"about {np.mean(fit.counts):.1f} cells a volume",
        ]

    def fit_background(self) -> Background:
        return fit_background(*self._apart(), counts=self.axial.counts)

    def fit_population(self) -> PopulationSynthesis:
        return fit_population(
            self._apart()[1],
            min_area=max(int(0.02 * np.median(self.volumes)), 20),
            z_spacing=self.axial.z_spacing,
            depth=float(np.median(self.lengths)),
            counts_per_volume=self.axial.counts,
            centres=self.axial.centres,
            moments=self.axial.moments,
        )

    def slicing(self) -> Slicing:
        """Cut as the data are: at their plane spacing, as deep as the largest cell needs."""
        crop_size = self.crops.image.shape[-1]
        half_side = float(self.outlines.radius.max()) / VIEW_RADIUS
        spacing, stretch = self.axial.z_spacing, self.axial.stretch
        low, high = np.quantile(self.volumes, [0.01, 0.99])
        return Slicing(
            SlicingConfig(
                crop_size=crop_size,
                num_slices=slices_needed(half_side, spacing, stretch),
                z_spacing=spacing,
                stretch=stretch,
                bulge=BULGE,
                least_scale=self.least_scale,
                volume_range=(float(low / VOLUME_MARGIN), float(high * VOLUME_MARGIN)),
            )
        )

    def finish(self, texture: TextureDiffusion, background: Background, seed: int) -> list[str]:
        found = fit_rho(texture, extract_patches(self._enlarged(), texture.config.crop_size), seed=seed)
        sigma, extent = axial_sigma(self.sections), axial_extent(self.sections)
        texture.config = replace(
            texture.config, rho=found.rho, slice_sigma=found.slice_sigma, axial_sigma=sigma, axial_extent=extent
        )
        # The texture stage paints no light above and below a cell's outlines: what is seen there counts as a blob, too.
        contrasts = background.table[:, background.names.index("brightness")].tolist()
        rate, contrast = fit_ghosts(*self._apart(), contrasts)
        background.config = replace(background.config, ghost_rate=rate, ghost_contrast=contrast)
        # Planes come blurred from the texture stage; the camera must not do it again.
        background.table[:, background.names.index("axial_sigma")] = 0
        alike = ["{:.2f} / {:.2f}".format(*s.correlation) for s in (found.real, found.synthetic, found.independent)]
        return [
            (
                f"rho {found.rho:.2f}, unique noise blurred over {found.slice_sigma:.1f} planes: correlation of planes one / "
                f"two apart {alike[0]} real, {alike[1]} synthetic, {alike[2]} with independent noise"
            ),
            f"axial blur of {sigma:.2f} planes; light {extent:.2f} times as long as masks",
            (f"{rate:.2f} dim blobs a cell that nobody annotated, {contrast:.2f} times as bright as cells"),
        ]

    def _enlarged(self) -> Sequence[Pair]:
        """The annotated planes with their neighbours, as large as crops show them."""
        if self.least_scale == 1:
            return self.pairs
        out = []
        for image, labels in self.pairs:
            for z in annotated_planes(labels):
                if 0 < z < len(labels) - 1:
                    near = slice(z - 1, z + 2)
                    zoom = (1, 1 / self.least_scale, 1 / self.least_scale)
                    own = np.full_like(labels[near], UNLABELLED)
                    own[1] = labels[z]
                    out.append((ndimage.zoom(image[near], zoom, order=1), ndimage.zoom(own, zoom, order=0)))
        return out

    def calibrate(self, cascade: Cascade, seed: int, budget_minutes: float) -> list[str]:
        """Set where light ends, as for frames, and each volume's brightness so that labelled voxels are as bright as in it.

        Haze and neighbours add to the light of a cell, most of all above and below it, where no ring tells the background;
        and the median of a few cells can be that of a mitosis.
        """
        background = cascade.background
        column = background.names.index("brightness")
        try:
            cells = cascade.cells([SampleKey(seed, ("calibration", i)) for i in range(CALIBRATION_CELLS)])
        except SynthAugError as error:  # trained for seconds: the cascade is saved all the same
            return [f"brightness left as measured: {error}"]
        shape = self.pairs[0][0].shape
        planes = [(plane.image, plane.labels) for plane in slice_pairs(self.pairs)]
        notes, ratios = match_half_light(cascade, planes, shape, seed, cells), []
        for i in range(CALIBRATION_VOLUMES):
            keys = [SampleKey(seed, ("calibration", "volume", i))]
            count = min(cascade.num_cells(keys, shape)[0], len(cells))
            made = cascade.populate(cells, keys, shape, num_cells=count)
            contrast = _contrast(made.image[0, 0].numpy(), made.labels[0, 0].numpy())
            ratios.append(contrast / float(cascade.styles(keys)["brightness"][0]))
        ratio = float(np.nanmedian(ratios))
        if not ratio > 0:
            return notes
        real = torch.tensor([_contrast(image, labels) / ratio for image, labels in self.pairs])
        before = background.table[:, column]
        background.table[:, column] = torch.where(real > 0, real.to(before), before)
        return [*notes, f"labelled voxels were {ratio:.2f} of their volume's brightness, which was set accordingly"]


def matching_scale(crops: CropSet, source: Cascade | None) -> float:
    """Image pixels per crop pixel at which the cells are as large as those the cascade has learned, at most 1.

    Networks have learned grain and blur at the size of their own cells: cells of a third of it would come out with too little
    texture and too wide a border. Differences up to `SAME_SIZE` are left alone.
    """
    if source is None:
        return 1.0
    theirs = source.masks.usual_radius / source.least_scale
    factor = float(crops.radius.median()) / theirs
    return 1.0 if factor > SAME_SIZE else max(factor, LEAST_SCALE)


def _contrast(image: NDArray[np.float32], labels: NDArray[np.int32]) -> float:
    """Mean of the labelled voxels over the dark level, counts; NaN without any."""
    inside = labels > 0
    return float(image[inside].mean() - dark_level(image.astype(np.float64))) if inside.any() else np.nan
