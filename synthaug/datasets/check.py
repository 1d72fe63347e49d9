"""`check_stream`: a look at what the network will see, before hours are spent on training with it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from synthaug.datasets.loader import SynthLoader
from synthaug.datasets.pictures import Bytes, VoxelSize, grey, label_colours, orthogonal_views, outlines, panel
from synthaug.datasets.seen import SeenSample, by_kind, find_faults, range_of
from synthaug.datasets.synth import SynthDataset, dataset_of
from synthaug.errors import InputError
from synthaug.generators.stage import write_atomic

TITLE = 48
"""Pixels above every sample in the picture, for two lines."""

COLOURS = {"real": "#1f6fb8", "synthetic": "#c4570a"}


@dataclass(frozen=True)
class StreamCheck:
    """What `check_stream` found; `print` it.

    Attributes:
        num_synthetic: Synthetic samples looked at.
        num_real: Real ones.
        image: Shape and dtype of an image, e.g. "float32 (1, 256, 256)".
        label: The same of its label.
        cells: Mean cells a sample by kind ("real", "synthetic").
        ranges: Median 1st and 99.8th percentile of the grey values by kind.
        warnings: What would go wrong in training, one sentence each with its remedy; empty if nothing was found.
        out_png: The contact sheet, or None.
    """

    num_synthetic: int
    num_real: int
    image: str
    label: str
    cells: dict[str, float]
    ranges: dict[str, tuple[float, float]]
    warnings: tuple[str, ...]
    out_png: Path | None

    def __str__(self) -> str:
        lines = [
            f"{self.num_synthetic} synthetic and {self.num_real} real samples, image {self.image}, label {self.label}"
        ]
        for kind, (low, high) in self.ranges.items():
            lines.append(f"{kind}: {self.cells[kind]:.1f} cells a sample, grey values {low:.4g} to {high:.4g}")
        lines += [f"warning: {text}" for text in self.warnings] or ["nothing wrong was found"]
        if self.out_png is not None:
            lines.append(f"picture: {self.out_png}")
        return "\n".join(lines)


def check_stream(
    stream: SynthDataset | SynthLoader, n: int = 8, out_png: str | Path | None = "stream.png", viewer: bool = False
) -> StreamCheck:
    """Look at the next `n` samples of a stream, as the network will see them; the stream stays where it is.

    Args:
        stream: A `SynthDataset` or its loader. A copy of it is read in this process.
        n: Samples to look at; they begin with the stream's next batch.
        out_png: Contact sheet to write: every image with the outlines of its labels beside the labels in colours, real and
            synthetic marked, with the 1st and 99.8th percentile of the grey values, all at the same contrast; of volumes
            the planes xy, xz and yz. Its folder is created. None: no picture.
        viewer: Also open them in napari.

    Returns:
        What was seen, and warnings of what would go wrong in training: samples without cells, constant or non-finite
        images, labels that are no integers, not contiguous or do not fit the image, and real and synthetic samples whose
        grey values or sizes of cells are far apart.

    Raises:
        InputError: `stream` or `n` is not what it has to be, or napari is not installed.
        ProducerError: The stream cannot make its samples.
    """
    dataset = dataset_of(stream)
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise InputError("n", expected="a whole number >= 1", got=repr(n))
    napari = _napari() if viewer else None
    samples = next_samples(dataset, n)
    path = None if out_png is None else Path(out_png)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, contact_sheet(samples, dataset.voxel_size_um))
    if napari is not None:
        _open(napari, samples, dataset.voxel_size_um)
    groups = by_kind(samples)
    return StreamCheck(
        num_synthetic=len(groups.get("synthetic", [])),
        num_real=len(groups.get("real", [])),
        image=f"{samples[0].image.dtype} {samples[0].image.shape}",
        label=f"{samples[0].label.dtype} {samples[0].label.shape}",
        cells={kind: float(np.mean([len(s.ids) for s in group])) for kind, group in groups.items()},
        ranges={kind: range_of(group) for kind, group in groups.items()},
        warnings=tuple(find_faults(samples)),
        out_png=path,
    )


def next_samples(dataset: SynthDataset, n: int) -> list[SeenSample]:
    """The samples of the next batches, `n` in all, from a copy of the stream with threads and counts of its own."""
    twin = dataset.twin()
    samples: list[SeenSample] = []
    try:
        while len(samples) < n:  # again where an epoch ends
            for batch in twin:
                for image, label, synthetic in zip(batch["image"], batch["label"], batch["synthetic"]):
                    # A plain tensor first: numpy knows neither bfloat16 nor a MetaTensor's luggage.
                    picture = image.detach().as_subclass(torch.Tensor).float().cpu().numpy()
                    ids = label.detach().as_subclass(torch.Tensor).cpu()
                    ids = ids.float() if ids.is_floating_point() else ids
                    samples.append(SeenSample(picture, ids.numpy(), bool(synthetic)))
                if len(samples) >= n:
                    break
    finally:
        twin.close()
    return samples[:n]


def contact_sheet(samples: Sequence[SeenSample], voxel_size_um: VoxelSize | None = None) -> bytes:
    """A PNG of all samples: image with outlines beside labels in colours; see `check_stream`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ranges = np.array([s.range for s in samples])
    ranges = ranges[np.isfinite(ranges).all(1)]
    low, high = (float(ranges[:, 0].min()), float(ranges[:, 1].max())) if len(ranges) else (0.0, 1.0)
    limits = (low, high if high > low else low + 1.0)
    pictures = [_picture(sample, limits, voxel_size_um) for sample in samples]
    height, width = pictures[0].shape[:2]
    zoom = max(round(240 / height), 1)  # small samples are enlarged, to be seen
    columns = max(min(len(samples), 1600 // (zoom * width + 12)), 1)
    rows = -(-len(samples) // columns)
    size = (columns * (zoom * width + 12) + 12, rows * (zoom * height + TITLE) + 12)
    figure = Figure(figsize=(size[0] / 100, size[1] / 100), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    for i, (sample, picture) in enumerate(zip(samples, pictures)):
        left, top = 12 + i % columns * (zoom * width + 12), TITLE + i // columns * (zoom * height + TITLE)
        shape = picture.shape[1] * zoom, picture.shape[0] * zoom
        axes = figure.add_axes((left / size[0], 1 - (top + shape[1]) / size[1], shape[0] / size[0], shape[1] / size[1]))
        axes.imshow(picture, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        title = (
            f"{sample.kind}, {len(sample.ids)} cell{'s' * (len(sample.ids) != 1)}\ngrey values "
            + "{:.4g} to {:.4g}".format(*sample.range)
        )
        axes.set_title(title, color=COLOURS[sample.kind], fontsize=10, loc="left", pad=4)
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=100)
        return file.getvalue()


def _picture(sample: SeenSample, limits: tuple[float, float], voxel_size_um: VoxelSize | None) -> Bytes:
    """uint8 RGB [H, 2 W + gap, 3]: image with outlines, labels in colours."""
    image = np.nan_to_num(sample.image.mean(0), nan=limits[0], posinf=limits[1], neginf=limits[0])
    # In the order of their values: what is no integer, or not contiguous, is to be seen as well.
    label = np.maximum(sample.label[0] if sample.label.ndim == sample.image.ndim else sample.label, 0)
    ids = np.unique(label, return_inverse=True)[1].reshape(label.shape).astype(np.int32)
    if ids.min() == 0 and label.min() > 0:
        ids += 1  # no background
    if ids.shape != image.shape:
        ids = np.zeros(image.shape, np.int32)
    views = orthogonal_views((image, ids), voxel_size_um) if image.ndim == 3 else {"": (image, ids)}
    outlined, coloured = {}, {}
    for name, (plane, numbers) in views.items():
        rgb, edges, cells = np.repeat(grey(plane, limits)[..., None], 3, 2), outlines(numbers), label_colours(numbers)
        outlined[name] = np.where(edges[..., 3:] > 0, edges[..., :3], rgb)
        coloured[name] = cells[..., :3]  # black where transparent
    left, right = (panel(group, 255) if "xy" in group else group[""] for group in (outlined, coloured))
    return np.concatenate([left, np.full((len(left), 2, 3), 255, np.uint8), right], 1)


def _napari() -> Any:
    try:
        import napari  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        remedy = "pip install 'napari[all]', or look at the picture with viewer=False."
        raise InputError("viewer", expected="napari", got="no such package", remedy=remedy) from error
    return napari


def _open(napari: Any, samples: Sequence[SeenSample], voxel_size_um: VoxelSize | None) -> None:
    """One layer of images and one of labels; the first slider goes through the samples."""
    ndim = samples[0].image.ndim - 1
    scale = (1.0, *(voxel_size_um[-ndim:] if voxel_size_um else (1.0,) * ndim))
    viewer = napari.Viewer(title="synthaug: " + ", ".join(sample.kind for sample in samples))
    viewer.add_image(np.stack([sample.image.mean(0) for sample in samples]), name="image", scale=scale)
    labels = [
        np.maximum(sample.label.reshape(-1, *sample.label.shape[-ndim:])[0], 0).astype(np.int32) for sample in samples
    ]
    viewer.add_labels(np.stack(labels), name="label", scale=scale)
