"""What lies between the cells, and the camera: level, illumination, haze, noise; fitted to real frames.

A frame is  level * field(x, y) + haze + texture + brightness * light  in camera counts, seen by the camera of
`camera.py`. `field` is the slow unevenness of the background, `haze` the light that cells throw wider than their own
halo (wide Gaussian blurs of the cells), `texture` dim debris and what is out of focus. All of it is measured frame by
frame (`frame_fit.py`) and kept as one row of a table, so that level, brightness, density, haze and noise of a synthetic
frame belong together as in a real one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from synthaug.errors import InputError
from synthaug.generators.camera import (
    correlate_noise,
    expose,
    legendre,
    random_texture,
    saturation_of,
    skew,
    texture_grid,
    wide_blur,
)
from synthaug.generators.frame_fit import (
    BLOCK,
    CLING_SIGMA,
    FIELDS,
    HAZE_SIGMAS,
    HAZES,
    NAMES,
    POSITIVE,
    TEXTURE_SIGMAS,
    TEXTURES,
    FrameMeasure,
    cell_contrasts,
    fill_rows,
    fit_jitter,
    fit_kernel,
    fit_light_field,
    free_area,
    inpaint,
    measure_frame,
    modulation,
)
from synthaug.generators.stage import Noise, Stage
from synthaug.randomness import SampleKey, normal, uniform
from synthaug.types import FrameStyles

__all__ = ["NAMES", "Background", "BackgroundConfig", "BackgroundMode", "cell_contrasts"]

BackgroundMode = Literal["model", "real"]


@dataclass
class BackgroundConfig:
    """What a fitted `Background` needs beside its tables.

    Attributes:
        integer: Whether the camera gives whole counts.
        saturation: Largest count of the camera.
        bandwidth: Width of the kernel density around each real frame's row, as a share of the spread between frames.
    """

    integer: bool = True
    saturation: float = 65535.0
    bandwidth: float = 0.2


class Background(Stage):
    """Turns the light of placed cells into a camera image, with the background and noise of real frames.

    Buffers (all fitted): `table` float32 [F, K], a row of `NAMES` for each real frame; `jitter` float32 [K], kernel
    width of each column (of its logarithm for those in `POSITIVE`); `light_field` float32 [5], logarithm of the
    illumination of the cells over the frame (see `legendre`); `kernel` float32 [2r+1, 2r+1], the filter that correlates
    the noise; `tiles` [N, T, T], real background with cells removed, counts (uint16 for cameras with whole counts, else
    float32); `tile_levels` float32 [N], level of the frame of each tile, counts.
    """

    config_class = BackgroundConfig
    config: BackgroundConfig
    table: Tensor
    jitter: Tensor
    light_field: Tensor
    kernel: Tensor
    tiles: Tensor
    tile_levels: Tensor
    names: ClassVar[tuple[str, ...]] = NAMES

    def __init__(self, config: BackgroundConfig) -> None:
        super().__init__(config)
        self.register_buffer("table", torch.zeros(0, len(NAMES)))
        self.register_buffer("jitter", torch.zeros(len(NAMES)))
        self.register_buffer("light_field", torch.zeros(5))
        self.register_buffer("kernel", torch.ones(1, 1))
        self.register_buffer("tiles", torch.zeros(0, 1, 1))
        self.register_buffer("tile_levels", torch.zeros(0))

    @classmethod
    def fit(
        cls,
        frames: Sequence[NDArray[np.float32]],
        labels: Sequence[NDArray[np.int32]],
        *,
        num_tiles: int = 8,
        tile_size: int = 256,
    ) -> Self:
        """Measure real frames.

        Args:
            frames: float [Y, X] each, camera counts; sizes may differ.
            labels: int32 [Y, X] each, contiguous from 1, 0 = background.
            num_tiles: How many background tiles to keep for `background="real"`.
            tile_size: Their side in pixels; the smallest frame's side if that is less.

        Raises:
            InputError: no frames, or a frame and its labels do not match.
        """
        if not len(frames) or len(frames) != len(labels):
            raise InputError(
                "frames", expected="at least one, each with labels", got=f"{len(frames)} and {len(labels)}"
            )
        for i, (frame, label) in enumerate(zip(frames, labels)):
            if frame.ndim != 2 or frame.shape != label.shape or min(frame.shape) < 2 * BLOCK:
                got = f"{frame.shape} and {label.shape}"
                raise InputError(f"frames[{i}]", expected=f"[Y, X] as its labels, {2 * BLOCK} or more a side", got=got)
            if not np.isfinite(frame).all():
                raise InputError(f"frames[{i}]", expected="finite counts", got="NaN or infinity")
        integer = all(bool((f == np.round(f)).all()) for f in frames)
        saturation = saturation_of(max(float(f.max()) for f in frames), integer)
        stage = cls(BackgroundConfig(integer=integer, saturation=saturation))
        measures = [
            measure_frame(np.asarray(f, np.float64), np.asarray(n, np.int32), saturation=saturation)
            for f, n in zip(frames, labels)
        ]
        kernel = fit_kernel(measures, integer)
        fill_rows(measures, kernel, integer)
        stage.kernel = torch.from_numpy(kernel)
        stage.table = torch.tensor([[m.row[name] for name in NAMES] for m in measures], dtype=torch.float32)
        stage.jitter = torch.from_numpy(fit_jitter(stage.table.numpy(), stage.config.bandwidth))
        stage.light_field = torch.from_numpy(fit_light_field(measures))
        side = min(tile_size, *(n for f in frames for n in f.shape))
        stage._fit_tiles(frames, measures, num_tiles, side)
        return stage.eval()

    def _fit_tiles(
        self, frames: Sequence[NDArray[np.float32]], measures: Sequence[FrameMeasure], num_tiles: int, side: int
    ) -> None:
        """Keep the emptiest window of each of the emptiest frames, cells replaced by smooth background plus noise."""
        found = []
        for i, m in enumerate(measures):
            total = np.pad(m.covered.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
            rows = sorted({*range(0, m.covered.shape[0] - side + 1, 16), m.covered.shape[0] - side})
            columns = sorted({*range(0, m.covered.shape[1] - side + 1, 16), m.covered.shape[1] - side})
            top, left = np.meshgrid(rows, columns, indexing="ij")
            sums = total[top + side, left + side] - total[top, left + side] - total[top + side, left] + total[top, left]
            best = int(sums.argmin())
            found.append((float(sums.flat[best]), i, int(top.flat[best]), int(left.flat[best])))
        tiles, levels = [], []
        for _, i, top, left in sorted(found)[:num_tiles]:
            m = measures[i]
            window = (slice(top, top + side), slice(left, left + side))
            image = np.asarray(frames[i], np.float64)[window]
            # four pixels more than the fit leaves out, so that no halo is left around a hole
            hole = ndimage.binary_dilation(m.covered[window], iterations=4)
            hole = hole if not hole.all() else m.covered[window]
            expected = inpaint(image, hole, m.row["level"])
            variance = m.row["flat_variance"] + m.row["gain"] * (expected - m.row["level"])
            white = torch.from_numpy(
                SampleKey(0, ("tile", i))
                .numpy()
                .standard_normal([1, 1, *(n + len(self.kernel) - 1 for n in hole.shape)])
            ).float()
            filled = expose(
                torch.from_numpy(expected)[None, None].float(),
                torch.from_numpy(variance)[None, None].float(),
                correlate_noise(white, self.kernel),
                integer=self.config.integer,
                saturation=self.config.saturation,
            )[0, 0].numpy()
            tiles.append(np.where(hole, filled, image))
            levels.append(m.row["level"])
        whole = self.config.integer and self.config.saturation <= 65535
        self.tiles = torch.from_numpy(np.stack(tiles).astype(np.uint16 if whole else np.float32))
        self.tile_levels = torch.tensor(levels, dtype=torch.float32)

    def draw_styles(self, keys: Sequence[SampleKey]) -> FrameStyles:
        """Looks of frames: real frames' rows, jittered; row i depends on `keys[i]` alone.

        Raises:
            InputError: the stage was never fitted.
        """
        self._require_fit()
        table, jitter = self.table.cpu(), self.jitter.cpu()
        pick = uniform([k.child("style", "row") for k in keys], (1,))[:, 0]
        index = (pick * len(table)).long().clamp(max=len(table) - 1)
        shift = normal([k.child("style", "jitter") for k in keys], (len(NAMES),)).clamp(-2.5, 2.5) * jitter
        rows = table[index]
        positive = torch.tensor([name in POSITIVE for name in NAMES])
        # the vectorised exponential may differ in its last bit with the place in the batch: one row at a time
        factor = torch.stack([row.exp() for row in shift.unbind()]) if len(keys) else shift
        return FrameStyles(torch.where(positive, rows * factor, rows + shift).to(self.device), NAMES)

    def styles_of(self, image: Tensor, labels: Tensor) -> FrameStyles:
        """The look of a real frame, for adding cells to it: the most similar row, with its own level and brightness.

        Args:
            image: float32 [1, Y, X], camera counts.
            labels: int32 [1, Y, X], contiguous from 1; without cells the most similar row also gives the brightness.

        Returns:
            One row.
        """
        self._require_fit()
        picture, instances = image[0].cpu().numpy().astype(np.float32), labels[0].cpu().numpy()
        contrasts, _ = cell_contrasts(picture, instances)
        seen = contrasts[contrasts > 0]
        table = self.table.cpu().double()
        own = {"level": float(np.median(picture[free_area(picture.astype(np.float64), instances)]))}
        if len(seen):
            own["brightness"] = float(np.median(seen))
        distance = torch.zeros(len(table), dtype=torch.float64)
        for name, value in own.items():
            column = table[:, NAMES.index(name)].clamp(min=1e-3).log()
            distance += ((column - np.log(max(value, 1e-3))) / (column.std(correction=0) + 0.05)) ** 2
        row = self.table.cpu()[int(distance.argmin())].clone()
        for name, value in own.items():
            row[NAMES.index(name)] = value
        return FrameStyles(row[None].to(self.device), NAMES)

    def draw(self, keys: Sequence[SampleKey], size: tuple[int, int]) -> Noise:  # type: ignore[override]  # needs a size
        """All random numbers of `forward` and `add_cells`; row i depends on `keys[i]` alone.

        Args:
            keys: One a frame.
            size: Canvas (Y, X) in pixels.

        Returns:
            `camera` float32 [B, 1, Y+2r, X+2r] and `texture_*` (on a coarse grid), standard normal; `place` float32
            [B, 6], uniform: window of the illumination (2), choice, position and flips of a tile (4).
        """
        keys = [k.child("background") for k in keys]
        margin = self.kernel.shape[0] - 1
        noise = {"camera": normal([k.child("camera") for k in keys], (1, size[0] + margin, size[1] + margin))}
        noise["place"] = uniform([k.child("place") for k in keys], (6,))
        for name, sigma in zip(TEXTURES, TEXTURE_SIGMAS):
            noise[name] = normal([k.child(name) for k in keys], (1, *texture_grid(size, sigma)))
        return {name: value.to(self.device) for name, value in noise.items()}

    def forward(
        self, light: Tensor, labels: Tensor, styles: FrameStyles, noise: Noise, background: BackgroundMode = "model"
    ) -> Tensor:
        """Finish frames.

        Args:
            light: float32 [B, 1, Y, X], light of the cells, 1 = the median cell of the frame.
            labels: int32 [B, 1, Y, X], 0 = background.
            styles: One row a frame, from `draw_styles`.
            noise: From `draw` for the same size.
            background: "model" draws level, field, haze and texture from `styles`; "real" takes a real background tile
                of similar level, which brings its own noise (a canvas larger than the tile is covered by mirroring).

        Returns:
            float32 [B, 1, Y, X], camera counts; whole, and clipped as by the camera, if the real frames are.
        """
        self._require_fit()
        if background not in ("model", "real"):
            raise InputError("background", expected="'model' or 'real'", got=repr(background))
        if light.shape != labels.shape or light.ndim != 4 or light.shape[1] != 1:
            got = f"{tuple(light.shape)} and {tuple(labels.shape)}"
            raise InputError("light and labels", expected="[B, 1, Y, X] both", got=got)
        render = self._on_model if background == "model" else self._on_tile
        return self._by_rows(render, styles, light, labels, noise)

    def add_cells(self, image: Tensor, light: Tensor, styles: FrameStyles, noise: Noise) -> Tensor:
        """Add the light of cells to real images, with the shot noise it brings; where it is 0 nothing changes.

        Args:
            image: float32 [B, 1, Y, X], camera counts.
            light: float32 [B, 1, Y, X], 1 = the median cell of the frame.
            styles: One row an image, from `styles_of`.
            noise: From `draw` for the same size.

        Returns:
            float32 [B, 1, Y, X], camera counts.
        """
        return self._by_rows(self._on_image, styles, light, image, noise)

    def _by_rows(
        self, render: Callable[..., Tensor], styles: FrameStyles, one: Tensor, two: Tensor, noise: Noise
    ) -> Tensor:
        if one.device.type != "cpu":
            return render(styles, one, two, noise)
        # CPU loops treat the last elements of a tensor differently from the others: one frame at a time keeps its bits
        # the same wherever in a batch it stands. The copies put every frame at an aligned address.
        rows = []
        for i in range(len(one)):
            at = slice(i, i + 1)
            own = {name: value[at].clone() for name, value in noise.items()}
            rows.append(render(styles.select(at), one[at].clone(), two[at].clone(), own))
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
        expected = base + lit
        flat = column("flat_variance")
        variance = torch.maximum(flat + column("gain") * (expected - column("level")), 0.1 * flat)
        return self._expose(expected, variance, noise)

    def _on_tile(self, styles: FrameStyles, light: Tensor, labels: Tensor, noise: Noise) -> Tensor:
        side, place = self.tiles.shape[1], noise["place"]
        # a tile of the frame's own level, loosely: the nearest one after a random handicap
        gap = (self.tile_levels.clamp(min=1e-3).log() - styles["level"].clamp(min=1e-3).log()[:, None]).abs()
        index = torch.arange(len(self.tile_levels), device=light.device)
        handicap = 0.3 * ((place[:, 2, None] * len(index) + index) % len(index)) / len(index)
        tile = self.tiles.to(torch.float32)[(gap + handicap).argmin(1)]
        turned = torch.where((place[:, 5, None, None] * 8).long() % 2 == 0, tile, tile.transpose(1, 2))
        for axis, share in ((1, place[:, 3]), (2, place[:, 4])):
            length = light.shape[axis + 1]
            span = max(side - length, 0) + 1 if length <= side else 2 * side
            start = (share * span).long().clamp(max=span - 1)
            folded = (start[:, None] + torch.arange(length, device=light.device)) % (2 * side)
            folded = torch.minimum(folded, 2 * side - 1 - folded)
            flip = (place[:, 5] * 8).long() // (2 if axis == 1 else 4) % 2 == 1
            folded = torch.where(flip[:, None], side - 1 - folded, folded)
            shape = (len(light), length, turned.shape[2]) if axis == 1 else (len(light), turned.shape[1], length)
            turned = turned.gather(axis, folded.unsqueeze(3 - axis).expand(shape))
        return self._on_image(styles, light, turned[:, None], noise)

    def _on_image(self, styles: FrameStyles, light: Tensor, image: Tensor, noise: Noise) -> Tensor:
        lit = light * styles["brightness"][:, None, None, None]
        return self._expose(image + lit, styles["gain"][:, None, None, None] * lit, noise)

    def _expose(self, expected: Tensor, variance: Tensor, noise: Noise) -> Tensor:
        correlated = correlate_noise(noise["camera"], self.kernel)
        config = self.config
        return expose(expected, variance, correlated, integer=config.integer, saturation=config.saturation)

    @staticmethod
    def _window(frame: Tensor, share: Tensor, length: int) -> Tensor:
        """[B, length], places in a frame of `frame` pixels, -1 to 1; a canvas larger than the frame is all of it."""
        pixel = torch.arange(length, device=frame.device) + 0.5
        start = share * (frame - length).clamp(min=0)
        return (start[:, None] + pixel) / frame.clamp(min=length)[:, None] * 2 - 1

    def _require_fit(self) -> None:
        if not len(self.table):
            raise InputError("Background", expected="a fitted stage", got="no frames", remedy="Use Background.fit.")
