"""What lies between the cells, and the camera: level, illumination, haze, noise; fitted to real frames.

A frame is  level * field(x, y) + haze + texture + brightness * light  in camera counts, seen by the camera of
`camera.py`. `field` is the slow unevenness of the background, `haze` the light that cells throw wider than their own
halo (wide Gaussian blurs of the cells), `texture` dim debris and what is out of focus. All of it is measured frame by
frame (`frame_fit.py`, `training/background_fit.py`) and kept as one row of a table, so that level, brightness, density,
haze and noise of a synthetic frame belong together as in a real one.

A stack is the same over (z, y, x), and its light is first blurred along the optical axis and attenuated with depth
(`axial.py`, `volume_fit.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from synthaug.errors import InputError
from synthaug.generators.axial import (
    attenuate,
    blur_axis,
    blur_widely,
    random_texture_volume,
    texture_grid_volume,
)
from synthaug.generators.camera import (
    correlate_noise,
    expose,
    legendre,
    random_texture,
    skew,
    texture_grid,
    wide_blur,
)
from synthaug.generators.cytoplasm import cytoplasm_light, draw_cytoplasm
from synthaug.generators.electrons import ELECTRONS, QUANTILES, multiplied_noise, shape_noise
from synthaug.generators.frame_fit import (
    CLING_SIGMA,
    FIELDS,
    HAZE_SIGMAS,
    HAZES,
    NAMES,
    POSITIVE,
    TEXTURE_SIGMAS,
    TEXTURES,
    cell_contrasts,
    free_area,
    modulation,
)
from synthaug.generators.ghosts import draw_ghosts, ghost_light
from synthaug.generators.stage import Noise, Stage
from synthaug.generators.volume_fit import (
    CLING_BLUR,
    HAZE_BLURS,
    TEXTURE_BLURS,
    VOLUME_HAZES,
    VOLUME_NAMES,
    VOLUME_POSITIVE,
    VOLUME_TEXTURES,
    cell_brightness,
    dark_level,
)
from synthaug.randomness import SampleKey, normal, uniform
from synthaug.types import FrameStyles

BackgroundMode = Literal["model", "real"]


@dataclass
class BackgroundConfig:
    """What a fitted `Background` needs beside its tables.

    Attributes:
        integer: Whether the camera gives whole counts.
        saturation: Largest count of the camera.
        bandwidth: Width of the kernel density around each real frame's row, as a share of the spread between frames.
        ndim: 2 for frames, 3 for stacks.
        read_noise: Of an electron-multiplying camera, in counts of one multiplied electron; 0 for Gaussian noise.
            Told apart in stacks only.
        ghost_rate, ghost_contrast: Of stacks: dim blobs nobody annotated, for each cell, and their brightness over that of
            cells; see `ghosts.py`.
        cytoplasm_rate, cytoplasm_width: Of frames: the share in which dim light with edges lies around the cells, and how
            coarse it is, pixels; see `cytoplasm.py`.
    """

    integer: bool = True
    saturation: float = 65535.0
    bandwidth: float = 0.2
    ndim: int = 2
    read_noise: float = 0.0
    ghost_rate: float = 0.0
    ghost_contrast: float = 0.0
    cytoplasm_rate: float = 0.0
    cytoplasm_width: float = 5.0


class Background(Stage):
    """Turns the light of placed cells into a camera image, with the background and noise of real frames.

    Buffers (all fitted): `table` float32 [F, K], a row of `NAMES` for each real frame; `jitter` float32 [K], kernel
    width of each column (of its logarithm for those in `POSITIVE`); `light_field` float32 [5], logarithm of the
    illumination of the cells over the frame (see `legendre`); `kernel` float32 [2r+1, 2r+1], the filter that correlates
    the noise; `tiles` [N, (D,) T, T], real background with cells removed, counts (uint16 for cameras with whole counts,
    else float32); `tile_levels` float32 [N], level of the frame of each tile, counts. `noise_table` is not fitted but
    computed from the config's `read_noise`.
    """

    config_class = BackgroundConfig
    config: BackgroundConfig
    table: Tensor
    jitter: Tensor
    light_field: Tensor
    kernel: Tensor
    tiles: Tensor
    tile_levels: Tensor
    noise_table: Tensor

    def __init__(self, config: BackgroundConfig) -> None:
        super().__init__(config)
        self.register_buffer("table", torch.zeros(0, len(self.names)))
        self.register_buffer("jitter", torch.zeros(len(self.names)))
        self.register_buffer("light_field", torch.zeros(5))
        self.register_buffer("kernel", torch.ones(1, 1))
        self.register_buffer("tiles", torch.zeros(0, 1, 1))
        self.register_buffer("tile_levels", torch.zeros(0))
        table = multiplied_noise(config.read_noise) if config.read_noise > 0 else np.zeros((0, 0), np.float32)
        self.register_buffer("noise_table", torch.from_numpy(table), persistent=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Columns of the table."""
        return VOLUME_NAMES if self.config.ndim == 3 else NAMES

    def _positive(self) -> Tensor:
        """Which columns are positive numbers that vary by factors; bool [K], on the CPU."""
        return torch.tensor([name in (VOLUME_POSITIVE if self.config.ndim == 3 else POSITIVE) for name in self.names])

    def scale_table(self, z: float, plane: float) -> None:
        """Make table and cytoplasm those of voxels `z` times as deep, `plane` times as wide; the camera's own columns stay."""
        factors = {
            "density": z * plane**2,
            "height": 1 / plane,
            "width": 1 / plane,
            "depth": 1 / z,
            "axial_sigma": 1 / z,
            "attenuation": z,
        }
        self.config = replace(self.config, cytoplasm_width=self.config.cytoplasm_width / plane)
        scale = torch.tensor([factors.get(name, 1.0) for name in self.names], device=self.table.device)
        self.table = self.table * scale
        self.jitter = torch.where(self._positive().to(self.device), self.jitter, self.jitter * scale)

    def draw_styles(self, keys: Sequence[SampleKey]) -> FrameStyles:
        """Looks of frames: real frames' rows, jittered; row i depends on `keys[i]` alone.

        Raises:
            InputError: the stage was never fitted.
        """
        self._require_fit()
        table, jitter = self.table.cpu(), self.jitter.cpu()
        pick = uniform([k.child("style", "row") for k in keys], (1,))[:, 0]
        index = (pick * len(table)).long().clamp(max=len(table) - 1)
        shift = normal([k.child("style", "jitter") for k in keys], (len(self.names),)).clamp(-2.5, 2.5) * jitter
        rows = table[index]
        # the vectorised exponential may differ in its last bit with the place in the batch: one row at a time
        factor = torch.stack([row.exp() for row in shift.unbind()]) if len(keys) else shift
        return FrameStyles(torch.where(self._positive(), rows * factor, rows + shift).to(self.device), self.names)

    def styles_of(self, image: Tensor, labels: Tensor) -> FrameStyles:
        """The look of a real frame, for adding cells to it: the most similar row, with its own level and brightness.

        Args:
            image: float32 [1, (Z,) Y, X], camera counts.
            labels: int32 [1, (Z,) Y, X], contiguous from 1, planes of a stack that nobody annotated `UNLABELLED`; without
                cells the most similar row also gives the brightness.

        Returns:
            One row.
        """
        self._require_fit()
        if image.ndim != self.config.ndim + 1:
            raise InputError("image", expected=f"[1, {self._axes}]", got=tuple(image.shape))
        picture, instances = image[0].cpu().numpy().astype(np.float32), labels[0].cpu().numpy()
        if self.config.ndim == 3:
            seen = np.asarray(cell_brightness(picture, instances, self.config.saturation))
            own = {"level": dark_level(picture.astype(np.float64))}
        else:
            contrasts = cell_contrasts(picture, instances)[0]
            seen = contrasts[contrasts > 0]
            own = {"level": float(np.median(picture[free_area(picture.astype(np.float64), instances)]))}
        table = self.table.cpu().double()
        if len(seen):
            own["brightness"] = float(np.median(seen))
        distance = torch.zeros(len(table), dtype=torch.float64)
        for name, value in own.items():
            column = table[:, self.names.index(name)].clamp(min=1e-3).log()
            distance += ((column - np.log(max(value, 1e-3))) / (column.std(correction=0) + 0.05)) ** 2
        row = self.table.cpu()[int(distance.argmin())].clone()
        for name, value in own.items():
            row[self.names.index(name)] = value
        return FrameStyles(row[None].to(self.device), self.names)

    def draw(self, keys: Sequence[SampleKey], size: Sequence[int]) -> Noise:  # type: ignore[override]  # needs a size
        """All random numbers of `forward` and `add_cells`; row i depends on `keys[i]` alone.

        Args:
            keys: One a frame.
            size: Canvas ((Z,) Y, X) in pixels.

        Returns:
            `camera` float32 [B, 1, (Z,) Y+2r, X+2r] and `texture_*` (on a coarse grid), standard normal; `place` float32
            [B, 6], uniform: window of the illumination (2), choice, position and flips of a tile (4); in stacks [B, 8],
            with window and position along z.
        """
        if len(size) != self.config.ndim:
            raise InputError("size", expected=f"({self._axes})", got=tuple(size))
        keys = [k.child("background") for k in keys]
        margin = self.kernel.shape[0] - 1
        camera = (1, *size[:-2], size[-2] + margin, size[-1] + margin)
        noise = {"camera": normal([k.child("camera") for k in keys], camera)}
        noise["place"] = uniform([k.child("place") for k in keys], (6 if self.config.ndim == 2 else 8,))
        if self.config.ndim == 2:
            grids: dict[str, tuple[int, ...]] = {
                name: texture_grid((size[0], size[1]), s) for name, s in zip(TEXTURES, TEXTURE_SIGMAS)
            }
        else:
            grids = {n: texture_grid_volume(size, (z, s, s)) for n, (z, s) in zip(VOLUME_TEXTURES, TEXTURE_BLURS)}
        for name, grid in grids.items():
            noise[name] = normal([k.child(name) for k in keys], (1, *grid))
        if self.config.ghost_rate > 0:
            noise |= draw_ghosts(keys, size)
        if self.config.cytoplasm_rate > 0:
            noise |= draw_cytoplasm(keys, size, self.config.cytoplasm_width)
        return {name: value.to(self.device) for name, value in noise.items()}

    def forward(
        self, light: Tensor, labels: Tensor, styles: FrameStyles, noise: Noise, background: BackgroundMode = "model"
    ) -> Tensor:
        """Finish frames.

        Args:
            light: float32 [B, 1, (Z,) Y, X], light of the cells, 1 = the median cell of the frame.
            labels: int32, same shape, 0 = background.
            styles: One row a frame, from `draw_styles`.
            noise: From `draw` for the same size.
            background: "model" draws level, field, haze and texture from `styles`; "real" takes a real background tile
                of similar level, which brings its own noise (a canvas larger than the tile is covered by mirroring).

        Returns:
            float32 [B, 1, (Z,) Y, X], camera counts; whole, and clipped as by the camera, if the real frames are.
        """
        self._require_fit()
        if background not in ("model", "real"):
            raise InputError("background", expected="'model' or 'real'", got=repr(background))
        if light.shape != labels.shape or light.ndim != self.config.ndim + 2 or light.shape[1] != 1:
            got = f"{tuple(light.shape)} and {tuple(labels.shape)}"
            raise InputError("light and labels", expected=f"[B, 1, {self._axes}] both", got=got)
        model = self._on_model if self.config.ndim == 2 else self._on_volume_model
        render = model if background == "model" else self._on_tile
        return self._by_rows(render, styles, light, labels, noise)

    def add_cells(self, image: Tensor, light: Tensor, styles: FrameStyles, noise: Noise) -> Tensor:
        """Add the light of cells to real images, with the shot noise it brings; where it is 0 nothing changes.

        Args:
            image: float32 [B, 1, (Z,) Y, X], camera counts.
            light: float32, same shape, 1 = the median cell of the frame. In stacks it is blurred along z first.
            styles: One row an image, from `styles_of`.
            noise: From `draw` for the same size.

        Returns:
            float32, same shape, camera counts.
        """
        return self._by_rows(self._on_image, styles, light, image, noise)

    def _by_rows(
        self, render: Callable[..., Tensor], styles: FrameStyles, one: Tensor, two: Tensor, noise: Noise
    ) -> Tensor:
        if one.device.type != "cpu" and self.config.ndim == 2:
            return render(styles, one, two, noise)
        # CPU loops treat the last elements of a tensor differently from the others: one frame at a time keeps its bits
        # the same wherever in a batch it stands. The copies put every frame at an aligned address; volumes are large, and
        # what is done to them voxel by voxel does not depend on it.
        rows = []
        for i in range(len(one)):
            at = slice(i, i + 1)
            inputs = [one[at], two[at]]
            own = {name: value[at] for name, value in noise.items()}
            if self.config.ndim == 2:
                inputs, own = [value.clone() for value in inputs], {name: value.clone() for name, value in own.items()}
            rows.append(render(styles.select(at), *inputs, own))
        if len(rows) == 1:
            return rows[0]
        return torch.cat(rows) if rows else torch.empty_like(one)

    def _on_model(self, styles: FrameStyles, light: Tensor, labels: Tensor, noise: Noise) -> Tensor:
        def column(name: str) -> Tensor:
            return styles[name][:, None, None, None]

        rows, columns = light.shape[2:]
        y = self._window(styles["height"], noise["place"][:, 0], rows)
        x = self._window(styles["width"], noise["place"][:, 1], columns)
        unevenness = legendre(torch.stack([styles[name] for name in FIELDS], 1), y, x)
        base = column("level") * (1 + unevenness).clamp(min=0.2)
        lit = light * column("brightness") * legendre(self.light_field.expand(len(light), 5), y, x).exp()
        cells = torch.where(labels > 0, lit, torch.zeros_like(lit))
        blurs = {sigma: wide_blur(cells, sigma) for sigma in {*HAZE_SIGMAS, CLING_SIGMA}}
        for name, sigma in zip(HAZES, HAZE_SIGMAS):
            base = base + column(name) * blurs[sigma]
        amplitude = modulation(blurs[CLING_SIGMA] / column("brightness"), column("cling"), column("glow"))
        for i, (name, sigma) in enumerate(zip(TEXTURES, TEXTURE_SIGMAS)):
            field = random_texture(noise[name], (rows, columns), sigma)
            field = field if i == len(TEXTURES) - 1 else skew(field, column("tail"))
            base = base + column(name) * (field * amplitude if i else field)
        config = self.config
        if config.cytoplasm_rate > 0:
            glow = cytoplasm_light(labels, noise, config.cytoplasm_rate, config.cytoplasm_width)
            base = base + column("brightness") * glow
        expected = base + lit
        flat = column("flat_variance")
        variance = torch.maximum(flat + column("gain") * (expected - column("level")), 0.1 * flat)
        return self.camera_counts(expected, variance, noise["camera"], styles["gain"])

    def _on_volume_model(self, styles: FrameStyles, light: Tensor, labels: Tensor, noise: Noise) -> Tensor:
        """One stack at a time: the blurs' widths are its own."""
        style = {name: float(styles[name][0]) for name in styles.names}
        place, size = noise["place"], light.shape[2:]
        z, y, x = (
            self._window(styles[name], place[:, i], n)
            for name, i, n in zip(("depth", "height", "width"), (6, 0, 1), size)
        )
        # Plane by plane and in place: large volumes leave the cache, and new memory for them costs more than the sums
        across = style["field_y"] * y[0, :, None] + style["field_x"] * x[0]
        base, lit = torch.empty_like(light, memory_format=torch.contiguous_format), self._through_optics(styles, light)
        if self.config.ghost_rate > 0:
            ghosts = ghost_light(lit, noise, self.config.ghost_rate, self.config.ghost_contrast)
            lit += ghosts.sub_(ghosts.mean())  # on average their light is in the haze already
        for plane, height in zip(base[0, 0], z[0]):
            torch.add(across, style["field_z"] * height, out=plane)
            plane.add_(1).clamp_(min=0.2).mul_(style["level"])
        hazes = {name: widths for name, widths in zip(VOLUME_HAZES, HAZE_BLURS) if style[name] > 0}
        blurs = {(s, w): blur_widely(lit, (s, w, w)) for s, w in {*hazes.values(), CLING_BLUR}}
        for name, widths in hazes.items():
            blurs[widths].add_to(base, style[name])
        textures = {name: widths for name, widths in zip(VOLUME_TEXTURES, TEXTURE_BLURS) if style[name] > 0}
        amplitude = torch.zeros_like(base)
        blurs[CLING_BLUR].add_to(amplitude, 1 / style["brightness"])
        for plane in amplitude[0, 0]:
            plane.copy_(modulation(plane, style["cling"], style["glow"]))
        for name, (axial, wide) in textures.items():
            random_texture_volume(noise[name], (axial, wide, wide)).add_to(base, style[name], amplitude)
        base += lit
        return self._expose_volume(base, base, style["level"], style["flat_variance"], style["gain"], noise["camera"])

    def _through_optics(self, styles: FrameStyles, light: Tensor) -> Tensor:
        """Counts that the cells' light makes in focus: [1, 1, (Z,) Y, X]."""
        lit = light * styles["brightness"].reshape(-1, *[1] * (light.ndim - 1))
        if self.config.ndim == 2:
            return lit
        lit = attenuate(lit, float(styles["attenuation"][0]))
        return blur_axis(lit, float(styles["axial_sigma"][0]), 2)

    def _on_tile(self, styles: FrameStyles, light: Tensor, labels: Tensor, noise: Noise) -> Tensor:
        place, stack = noise["place"], light.ndim == 5
        # a tile of the frame's own level, loosely: the nearest one after a random handicap
        gap = (self.tile_levels.clamp(min=1e-3).log() - styles["level"].clamp(min=1e-3).log()[:, None]).abs()
        index = torch.arange(len(self.tile_levels), device=light.device)
        handicap = 0.3 * ((place[:, 2, None] * len(index) + index) % len(index)) / len(index)
        tile = self.tiles.to(torch.float32)[(gap + handicap).argmin(1)]
        turn = (place[:, 5] * 8).long() % 2 == 0
        # tiles are square across the axis, which stays upright: haze is not the same above and below
        tile = torch.where(turn.reshape(-1, *[1] * (tile.ndim - 1)), tile, tile.transpose(-2, -1))
        axes = [(tile.ndim - 2, place[:, 3], 2), (tile.ndim - 1, place[:, 4], 4)]
        for axis, share, flips in [(1, place[:, 7], 0), *axes] if stack else axes:
            side, length = tile.shape[axis], light.shape[axis + 1]
            span = max(side - length, 0) + 1 if length <= side else 2 * side
            start = (share * span).long().clamp(max=span - 1)
            folded = (start[:, None] + torch.arange(length, device=light.device)) % (2 * side)
            folded = torch.minimum(folded, 2 * side - 1 - folded)
            if flips:
                flip = (place[:, 5] * 8).long() // flips % 2 == 1
                folded = torch.where(flip[:, None], side - 1 - folded, folded)
            place_of = folded.reshape(len(light), *[length if a == axis else 1 for a in range(1, tile.ndim)])
            shape = [*tile.shape]
            shape[axis] = length
            tile = tile.gather(axis, place_of.expand(shape))
        return self._on_image(styles, light, tile[:, None], noise)

    def _on_image(self, styles: FrameStyles, light: Tensor, image: Tensor, noise: Noise) -> Tensor:
        lit = self._through_optics(styles, light)
        gain = styles["gain"]
        if light.ndim == 5:
            return self._expose_volume(image + lit, lit, 0.0, 0.0, float(gain[0]), noise["camera"])
        return self.camera_counts(image + lit, gain[:, None, None, None] * lit, noise["camera"], gain)

    def _expose_volume(
        self, expected: Tensor, signal: Tensor, level: float, flat: float, gain: float, camera: Tensor
    ) -> Tensor:
        """One stack [1, 1, Z, Y, X]; its variance is flat + gain * (signal - level), a tenth of `flat` or more."""
        config = self.config
        if expected.device.type == "cpu":
            from synthaug.kernels.exposure import read_out  # imports numba, which reading a cascade does not need

            affine, read, camera_range = (level, flat, gain), config.read_noise, (config.integer, config.saturation)
            spans = (float(ELECTRONS[0]), float(ELECTRONS[-1]), float(QUANTILES[-1]))
            rows = (expected[0, 0], signal[0, 0], camera[0, 0], self.kernel, self.noise_table)
            return read_out(*rows, *affine, read, *spans, *camera_range)[None, None]
        variance = (flat + gain * (signal - level)).clamp(min=0.1 * flat)
        return self.camera_counts(expected, variance, camera, torch.tensor([gain], device=expected.device))

    def camera_counts(self, expected: Tensor, variance: Tensor, camera: Tensor, gain: Tensor) -> Tensor:
        """What the camera makes of light.

        Args:
            expected, variance: float32 [B, 1, (Z,) Y, X], counts and their variance.
            camera: Standard normal, as `draw` has it.
            gain: float32 [B], counts a photon.

        Returns:
            float32 [B, 1, (Z,) Y, X], camera counts.
        """
        noise = correlate_noise(camera, self.kernel)
        config = self.config
        if config.read_noise > 0:
            one = (0.5 * gain.clamp(min=1e-6)).reshape(-1, *[1] * (expected.ndim - 1))  # counts of one electron
            electrons = (variance / one**2 - config.read_noise**2) / 2
            noise = shape_noise(noise, electrons, self.noise_table)
        return expose(expected, variance, noise, integer=config.integer, saturation=config.saturation)

    @staticmethod
    def _window(frame: Tensor, share: Tensor, length: int) -> Tensor:
        """[B, length], places in a frame of `frame` pixels, -1 to 1; a canvas larger than the frame is all of it."""
        pixel = torch.arange(length, device=frame.device) + 0.5
        start = share * (frame - length).clamp(min=0)
        return (start[:, None] + pixel) / frame.clamp(min=length)[:, None] * 2 - 1

    @property
    def _axes(self) -> str:
        return "Z, Y, X" if self.config.ndim == 3 else "Y, X"

    def _require_fit(self) -> None:
        if not len(self.table):
            raise InputError(
                "Background",
                expected="a fitted stage",
                got="no frames",
                remedy="Use training.background_fit.fit_background.",
            )
