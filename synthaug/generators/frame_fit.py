"""What real frames tell about background and camera: measured one by one, then joined into the tables of `background.py`.

Everything is robust against what is not labelled (fibres, debris, saturated pixels): Tukey weights for the slow fields,
medians over cells for the noise, bright patches left out. A frame without cells takes what it cannot tell from the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, optimize
from torch import Tensor

from synthaug.generators.camera import (
    NOISE_RADIUS,
    QUANTISATION,
    autocovariance,
    filter_correlation,
    high_pass,
    legendre,
    noise_kernel,
    tail_of,
    wide_blur,
)

RING_INNER, RING_OUTER = 6, 14
"""Distance in pixels from every outline between which the local background of a cell is read."""

HAZE_SIGMAS = (10.0, 25.0, 60.0)
"""Widths in pixels of the blurs that make the haze."""

TEXTURE_SIGMAS = (1.5, 4.0, 12.0)
"""Widths in pixels of the blurs that make the texture of the background: dim debris at the optics' own resolution, and
what is out of focus."""

CLING_SIGMA = 25.0
"""Width in pixels of the blur of the cells that the texture's amplitude follows."""

FIELDS = ("field_x", "field_y", "field_xx", "field_xy", "field_yy")
HAZES = tuple(f"haze_{s:g}" for s in HAZE_SIGMAS)
TEXTURES = tuple(f"texture_{s:g}" for s in TEXTURE_SIGMAS)
POSITIVE = ("level", "brightness", "density", "flat_variance", "gain", *HAZES, *TEXTURES)
NAMES = (*POSITIVE, "tail", "cling", "glow", *FIELDS, "height", "width")
"""Columns of the table: level, brightness, texture_* in counts; density in cells per pixel; flat_variance in counts^2;
gain in counts; haze_* and field_* relative; tail, skewness of the texture (see `skew`);
cling, how much the amplitude of the wider textures grows with the blurred cells beyond glow, their usual value; height
and width of the real frame in pixels."""

UNDER_ROUNDING = 4.0
"""Noise of less than so many times the variance of rounding to whole counts shows no correlation to go by."""

T = TypeVar("T")

BLOCK = 8  # pixels on a side of the blocks the slow fields are fitted to
NEAR = [(dy, dx) for dy in range(NOISE_RADIUS + 1) for dx in range(-NOISE_RADIUS, NOISE_RADIUS + 1) if dy or dx >= 0]
FAR = (4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40)
LAGS = NEAR + [(r, 0) for r in FAR] + [(0, r) for r in FAR]


def spaced(items: Sequence[T], most: int) -> list[T]:
    """At most so many of the items, evenly from the first to the last.

    >>> spaced("abcdefg", 3), spaced("ab", 3)
    (['a', 'd', 'g'], ['a', 'b'])
    """
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def far_level(image: NDArray[np.floating], labels: NDArray[np.integer]) -> tuple[NDArray[np.bool_], float]:
    """The pixels more than `RING_INNER` from all cells, and their median, counts; the frame's minimum where there are none."""
    free = ndimage.distance_transform_edt(labels == 0) > RING_INNER
    return free, float(np.median(image[free])) if free.any() else float(image.min())


def cell_contrasts(
    image: NDArray[np.float32], labels: NDArray[np.int32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean intensity of each instance over its local background.

    The local background of a cell is the median of the unlabelled pixels 6-14 px away from its outline and at least
    6 px away from every other one; where there are fewer than 30 such pixels, the median of the frame's unlabelled
    pixels.

    Args:
        image: float32 [Y, X], camera counts.
        labels: int32 [Y, X], contiguous from 1.

    Returns:
        contrast float32 [n] and local background float32 [n], in counts, for labels 1..n.
    """
    free, level = far_level(image, labels)
    contrast, local = [], []
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            contrast.append(0.0)
            local.append(level)
            continue
        wide = tuple(
            slice(max(s.start - RING_OUTER, 0), min(s.stop + RING_OUTER, n)) for s, n in zip(box, labels.shape)
        )
        own = labels[wide] == index
        ring = free[wide] & (ndimage.distance_transform_edt(~own) < RING_OUTER)
        base = float(np.median(image[wide][ring])) if ring.sum() >= 30 else level
        local.append(base)
        contrast.append(float(image[wide][own].mean()) - base)
    return np.asarray(contrast, np.float32), np.asarray(local, np.float32)


def positions(size: int, length: int) -> NDArray[np.float64]:
    """Centres of `length` pixels of a frame of `size` pixels in [-1, 1]."""
    return (np.arange(length) + 0.5) / size * 2 - 1


def _blocks(values: NDArray[np.float64], valid: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means of the valid pixels in blocks of `BLOCK`, and how many they are."""
    pad = [(0, -n % BLOCK) for n in values.shape]
    rows, columns = ((n + p[1]) // BLOCK for n, p in zip(values.shape, pad))
    shape = (rows, BLOCK, columns, BLOCK)
    count = np.pad(valid.astype(np.float64), pad).reshape(shape).sum((1, 3))
    total = np.pad(np.where(valid, values, 0.0), pad).reshape(shape).sum((1, 3))
    return total / np.maximum(count, 1), count


def spread_of(values: NDArray[np.float64]) -> float:
    """Robust standard deviation."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values)))) if len(values) else 0.0


def texture_correlation(sigma: float, distance: NDArray[np.floating]) -> NDArray[np.float64]:
    """Autocorrelation of white noise blurred by a Gaussian."""
    return np.exp(-(distance.astype(np.float64) ** 2) / (4 * sigma**2))


def _masked_blur(values: NDArray[np.float64], valid: NDArray[np.bool_], sigma: float) -> NDArray[np.float64]:
    """Gaussian mean of the valid pixels around each pixel."""
    weight = ndimage.gaussian_filter(valid.astype(np.float64), sigma, truncate=3)
    return ndimage.gaussian_filter(np.where(valid, values, 0.0), sigma, truncate=3) / np.maximum(weight, 1e-6)


@dataclass
class FrameMeasure:
    """What one real frame tells; `row` is filled from it when all frames are known."""

    row: dict[str, float]
    covariance: NDArray[np.float64]  # [len(LAGS)], of the flat area around its smooth fit, counts^2
    texture: NDArray[np.float64]  # [len(TEXTURE_SIGMAS)], variances, counts^2; the first is found when noise is known
    flat: float  # variance of the flat area after the high-pass, counts^2
    cells: NDArray[np.float64]  # [n, 4]: contrast, high-pass variance in its inside, y, x in [-1, 1]
    smooth: NDArray[np.float64]  # [Y, X], fitted background
    covered: NDArray[np.bool_]  # [Y, X], cells with their halo, and bright things that are not labelled
    excess: float = 0.0  # counts over the level in the area that `flat` was read from


def free_area(image: NDArray[np.float64], labels: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Pixels fit to tell the background: far from cells, or as far as the frame allows."""
    distance = ndimage.distance_transform_edt(labels == 0) if labels.any() else np.full(labels.shape, np.inf)
    for margin in (RING_INNER, 3, 0):
        free = distance > margin
        if free.sum() >= max(200, 0.01 * free.size):
            return free
    return image <= np.quantile(image, 0.02)


def _fit_smooth(
    image: NDArray[np.float64], free: NDArray[np.bool_], glow: NDArray[np.float64], brightness: float
) -> tuple[float, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Level, relative field coefficients [5] and haze amplitudes of one frame, and the background they make [Y, X].

    Non-negative least squares on block means with Tukey weights, so that fibres and debris count for nothing.
    """
    height, width = image.shape
    where = (torch.from_numpy(positions(height, height))[None], torch.from_numpy(positions(width, width))[None])
    maps = [np.ones_like(image)]
    maps += [legendre(one[None], *where)[0, 0].numpy() for one in torch.eye(5, dtype=torch.float64)]
    light = torch.from_numpy(glow)[None, None]
    maps += [wide_blur(light, sigma)[0, 0].numpy() for sigma in HAZE_SIGMAS] if glow.any() else []
    target, count = _blocks(image, free)
    use = count >= BLOCK * BLOCK / 4
    if use.sum() < 30:
        use = count > 0
    design = np.stack([_blocks(m, free)[0][use] for m in maps], axis=1)
    y, base = target[use], np.sqrt(count[use])
    # no haze brighter than half a cell where all around are cells: more is something else that fits by chance
    lower = np.concatenate([np.full(6, -np.inf), np.zeros(len(maps) - 6)])
    upper = np.concatenate([np.full(6, np.inf), np.full(len(maps) - 6, 0.5 * brightness)])
    # a weak pull of the field towards 0 keeps crowded frames, where it is told by a few blocks, from running away
    level = float(np.median(y))
    noise = max(spread_of(y), 1e-3)
    pull = np.zeros((5, len(maps)))
    pull[np.arange(5), np.arange(1, 6)] = noise / max(0.15 * abs(level), 1e-6) * np.sqrt(BLOCK * BLOCK)
    keep = np.abs(y - level) < 6 * noise + 1e-3
    weight = base * keep
    solution = np.zeros(len(maps))
    for _ in range(8):
        system = np.vstack([design * weight[:, None], pull])
        q, r = np.linalg.qr(system)
        rhs = q.T @ np.concatenate([y * weight, np.zeros(5)])
        solution = optimize.lsq_linear(r, rhs, bounds=(lower, upper), method="bvls").x
        residual = y - design @ solution
        scale = max(spread_of(residual), 1e-3)
        weight = base * np.clip(1 - (residual / (5 * scale)) ** 2, 0.0, None)
    smooth = sum(s * m for s, m in zip(solution, maps))
    haze = np.zeros(len(HAZE_SIGMAS))
    haze[: len(maps) - 6] = solution[6:]
    return float(solution[0]), solution[1:6] / max(abs(solution[0]), 1e-6), haze, np.asarray(smooth)


def measure_frame(image: NDArray[np.float64], labels: NDArray[np.int32], *, saturation: float) -> FrameMeasure:
    """Everything one frame tells by itself."""
    height, width = image.shape
    contrasts, local = cell_contrasts(image.astype(np.float32), labels)
    seen = contrasts[contrasts > 0]
    brightness = float(np.median(seen)) if len(seen) else 0.0
    free = free_area(image, labels)

    # relative light of the labelled cells, as a scene would have it, without the peaks of labelled debris
    base = np.concatenate([[0.0], local])[labels]
    cap = 6 * brightness
    glow = (
        np.clip(np.where(labels > 0, image - base, 0.0), 0.0, cap) / brightness if brightness else np.zeros_like(image)
    )
    level, field, haze, smooth = _fit_smooth(image, free, glow, brightness)

    residual = image - smooth
    low = _masked_blur(residual, free, 1.5)
    spread = max(spread_of(low[free][::7]), 1e-3)
    pixel = max(spread_of(residual[free][::7]), 0.5)
    odd = free & ((low > 8 * spread) | (np.abs(residual) > 9 * pixel))
    # the last of the cells' own halos ends some pixels beyond the margin
    clean = ndimage.binary_erosion(free, iterations=3, border_value=1) & ~ndimage.binary_dilation(odd, iterations=3)
    if clean.sum() < max(200, 0.02 * clean.size):
        clean = free & ~odd if (free & ~odd).sum() >= 100 else free
    level += float(residual[clean].mean())  # the fit itself follows the mode of a skewed background
    residual = residual - residual[clean].mean()
    covariance = autocovariance(residual, clean, LAGS)
    far = covariance[len(NEAR) :].reshape(2, -1).mean(0)
    cling, mean_glow, power = 0.0, 0.0, 1.0
    if glow.any():
        blurred = wide_blur(torch.from_numpy(glow)[None, None], CLING_SIGMA)[0, 0].numpy()
        cling, mean_glow, power = fit_cling(residual, clean, blurred)
    wide, _ = optimize.nnls(np.stack([texture_correlation(s, np.array(FAR)) for s in TEXTURE_SIGMAS[1:]], 1), far)
    texture = np.concatenate([[0.0], wide / power])

    sharp = high_pass(image) ** 2
    inside = ndimage.binary_erosion(clean, iterations=2)
    flat = sharp[inside if inside.sum() >= 100 else clean]
    flat_variance = float(flat[flat < 30 * max(np.median(flat), 1e-3)].mean())  # 30 medians: 1 in 10^5 of a Gaussian's
    cells = cell_noise(image, labels, sharp, contrasts, saturation)
    unknown = ndimage.binary_dilation((low > 0.2 * brightness) & free, iterations=RING_INNER) if brightness else odd
    row = {"level": level, "brightness": brightness, "density": len(contrasts) / image.size}
    row |= dict(zip(HAZES, haze / brightness if brightness else np.full(len(haze), np.nan)))
    row |= {"cling": cling, "glow": mean_glow}
    row["tail"] = float((residual[clean] ** 3).mean())  # third moment for now
    row |= {"height": float(height), "width": float(width)} | dict(zip(FIELDS, field))
    return FrameMeasure(row, covariance, texture, flat_variance, cells, smooth, ~free | unknown)


def modulation(blurred: Tensor, cling: Tensor | float, glow: Tensor | float) -> Tensor:
    """Amplitude of the wider textures, relative to its usual value."""
    return (1 + cling * (blurred - glow)).clamp(0.2, 3.0)


def fit_cling(
    residual: NDArray[np.float64], clean: NDArray[np.bool_], blurred: NDArray[np.float64]
) -> tuple[float, float, float]:
    """How the texture's amplitude follows the blurred cells: slope, their mean, mean square of the modulation."""
    # pairs at a lag without noise measure the texture alone
    lag = NOISE_RADIUS + 1
    both = clean[..., lag:] & clean[..., :-lag]
    product, near = (residual[..., lag:] * residual[..., :-lag])[both], blurred[..., lag:][both]
    if both.sum() < 400:
        return 0.0, 0.0, 1.0
    order = np.argsort(near)
    parts = np.array_split(order, 4)
    amplitude = np.sqrt(np.clip([product[p].mean() for p in parts], 0.0, None))
    place = np.array([near[p].mean() for p in parts])
    slope, _ = np.polyfit(place, amplitude, 1)
    mean = float(near.mean())
    cling = float(np.clip(slope / max(amplitude.mean(), 1e-6), 0.0, 1 / max(mean, 1e-6)))
    return cling, mean, float((modulation(torch.from_numpy(near), cling, mean) ** 2).mean())


def cell_noise(
    image: NDArray[np.float64],
    labels: NDArray[np.int32],
    sharp: NDArray[np.float64],
    contrasts: NDArray[np.float32],
    saturation: float,
) -> NDArray[np.float64]:
    """[n, 4]: contrast, high-pass variance well inside it, and place, of each cell large enough to tell."""
    if not len(contrasts):
        return np.zeros((0, 4))
    same = (ndimage.maximum_filter(labels, 11) == labels) & (ndimage.minimum_filter(labels, 11) == labels)
    inner = np.where(same & (image < saturation), labels, 0).ravel()
    bins = len(contrasts) + 1
    count = np.bincount(inner, minlength=bins)[1:]
    safe = np.maximum(count, 1)
    whole = np.maximum(np.bincount(labels.ravel(), minlength=bins)[1:], 1)
    mean = np.bincount(inner, image.ravel(), minlength=bins)[1:] / safe
    outer = np.bincount(labels.ravel(), image.ravel(), minlength=bins)[1:] / whole
    variance = np.bincount(inner, sharp.ravel(), minlength=bins)[1:] / safe
    rows, columns = np.indices(labels.shape)
    y = np.bincount(labels.ravel(), rows.ravel(), minlength=bins)[1:] / whole
    x = np.bincount(labels.ravel(), columns.ravel(), minlength=bins)[1:] / whole
    # the inside is brighter than the whole cell, whose border is blurred
    contrast = contrasts + (mean - outer)
    table = np.stack(
        [contrast, variance, (y + 0.5) / labels.shape[0] * 2 - 1, (x + 0.5) / labels.shape[1] * 2 - 1], axis=1
    )
    return table[(count >= 40) & (contrasts > 0)]


_NEAR_DISTANCE = np.array([np.hypot(dy, dx) for dy, dx in NEAR])
_ORIGIN = NEAR.index((0, 0))


def _near_covariance(m: FrameMeasure) -> NDArray[np.float64]:
    """Covariance at the short lags without the wide textures' share."""
    wide = [v * texture_correlation(s, _NEAR_DISTANCE) for v, s in zip(m.texture[1:], TEXTURE_SIGMAS[1:])]
    return m.covariance[: len(NEAR)] - np.sum(wide, axis=0)


def fit_kernel(measures: Sequence[FrameMeasure], integer: bool, *, gate: float = 0.12) -> NDArray[np.float32]:
    """The noise filter all frames share, from the median of their autocorrelations; `gate` as in `noise_kernel`."""
    correlations = []
    for m in measures:
        near = _near_covariance(m)
        near[_ORIGIN] -= QUANTISATION if integer else 0.0
        # Where rounding hides the noise, what is left is structure: taken for noise, it would drown the cells.
        told = near[_ORIGIN] > (UNDER_ROUNDING * QUANTISATION if integer else 0.0)
        if told and near[_ORIGIN] > 0.02 * m.covariance[_ORIGIN]:
            correlations.append(near / near[_ORIGIN])
    square = np.zeros((2 * NOISE_RADIUS + 1, 2 * NOISE_RADIUS + 1))
    square[NOISE_RADIUS, NOISE_RADIUS] = 1
    if correlations:
        for (dy, dx), value in zip(NEAR, np.median(correlations, axis=0)):
            square[NOISE_RADIUS + dy, NOISE_RADIUS + dx] = square[NOISE_RADIUS - dy, NOISE_RADIUS - dx] = value
    return noise_kernel(square, gate=gate)


def fill_rows(measures: Sequence[FrameMeasure], kernel: NDArray[np.float32], integer: bool) -> None:
    """Noise and texture of every row, and what frames without cells cannot tell, from the others."""
    quantisation = QUANTISATION if integer else 0.0
    response = 1.0
    if kernel.size > 1:
        # what the high-pass leaves of correlated noise is little, and no filter is known that well: take it as observed
        seen = [(m.flat - quantisation) / max(_near_covariance(m)[_ORIGIN] - quantisation, 1e-12) for m in measures]
        response = float(np.clip(np.median(seen), 1e-3, 10.0))
    own_correlation = filter_correlation(kernel.astype(np.float64), NEAR)
    fine = texture_correlation(TEXTURE_SIGMAS[0], _NEAR_DISTANCE)
    fine[_ORIGIN] = 0.0
    slopes = []
    for m in measures:
        m.row["flat_variance"] = max((m.flat - quantisation) / response, 0.0)
        # short-range correlation that the noise does not explain is structure at the optics' resolution
        rest = _near_covariance(m) - m.row["flat_variance"] * own_correlation
        m.texture[0] = max(float(fine @ rest) / float(fine @ fine), 0.0)
        m.row |= {name: float(np.sqrt(v)) for name, v in zip(TEXTURES, m.texture)}
        m.row["tail"] = tail_of(m.row["tail"] / max(float((m.texture[:-1] ** 1.5).sum()), 1e-9))
        slopes.append((m.cells[:, 1] - m.flat) / np.maximum(m.cells[:, 0], 1e-6) / response)
    known = [float(np.median(s)) for s in slopes if len(s) >= 3]
    common = max(float(np.median(known)), 0.0) if known else 0.0
    for m, slope in zip(measures, slopes):
        own = float(np.median(slope)) if len(slope) else common
        m.row["gain"] = max((len(slope) * own + 10 * common) / (len(slope) + 10), 0.0)
    for m in measures:
        # what the flat area shows includes the noise of the haze that lies over it
        m.row["flat_variance"] = max(m.row["flat_variance"] - m.row["gain"] * m.excess, 0.05 * m.row["flat_variance"])
    for name in ("brightness", *(n for n in measures[0].row if n.startswith("haze_"))):
        told = [m.row[name] for m in measures if m.row["brightness"] > 0 and np.isfinite(m.row[name])]
        usual = float(np.median(told)) if told else 0.0
        for m in measures:
            if not np.isfinite(m.row[name]):
                m.row[name] = usual
    told = [m.row["brightness"] for m in measures if m.row["brightness"] > 0]
    for m in measures:
        if m.row["brightness"] <= 0:
            # no cells anywhere: something visible, ten times the noise
            m.row["brightness"] = float(np.median(told)) if told else 10 * float(np.sqrt(m.row["flat_variance"])) + 1


def inpaint(image: NDArray[np.float64], hole: NDArray[np.bool_], level: float) -> NDArray[np.float64]:
    """Smooth background under holes: the mean of what is around, from ever wider around where a hole is wide."""
    expected = np.full(image.shape, level)
    for sigma in (40.0, 20.0, 10.0, 5.0):
        weight = ndimage.gaussian_filter((~hole).astype(np.float64), sigma, truncate=3)
        trust = np.clip(weight / 0.1, 0.0, 1.0)
        expected = trust * _masked_blur(image, ~hole, sigma) + (1 - trust) * expected
    return expected


def fit_jitter(
    table: NDArray[np.float32], bandwidth: float, names: Sequence[str] = NAMES, positive: Sequence[str] = POSITIVE
) -> NDArray[np.float32]:
    """Kernel width of each column; 0 for the frame's size."""
    out = np.zeros(len(names), np.float32)
    for i, name in enumerate(names):
        if name in positive:
            some = table[:, i][table[:, i] > 0].astype(np.float64)
            out[i] = bandwidth * min(spread_of(np.log(some)), 0.5)
        elif name.startswith("field_"):
            out[i] = bandwidth * spread_of(table[:, i].astype(np.float64))
    return out


def fit_light_field(measures: Sequence[FrameMeasure]) -> NDArray[np.float32]:
    """Logarithm of the illumination, from how bright cells are where; terms within three standard errors are 0."""
    points = [
        np.column_stack([m.cells[:, 2:], np.log(m.cells[:, 0] / np.median(m.cells[:, 0]))])
        for m in measures
        if len(m.cells) >= 5
    ]
    cells = np.concatenate([p[np.isfinite(p).all(1)] for p in points]) if points else np.zeros((0, 3))
    if len(cells) < 200:
        return np.zeros(5, np.float32)
    y, x, target = cells.T
    design = np.stack([np.ones_like(x), x, y, 1.5 * x * x - 0.5, x * y, 1.5 * y * y - 0.5], axis=1)
    weight = np.ones(len(cells))
    for _ in range(8):
        solution = np.linalg.lstsq(design * weight[:, None], target * weight, rcond=None)[0]
        residual = target - design @ solution
        weight = np.sqrt(np.clip(1 - (residual / (4.7 * spread_of(residual) + 1e-9)) ** 2, 0.0, None) ** 2)
    inverse = np.linalg.inv((design * weight[:, None]).T @ (design * weight[:, None]))
    error = spread_of(residual) * np.sqrt(np.diag(inverse))
    return np.where(np.abs(solution) > 3 * error, solution, 0.0)[1:].astype(np.float32)
