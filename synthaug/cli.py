"""The command line: fit, generate, preview, bench, info, evaluate realism, evaluate experiment, demo.

A user's mistake ends with exit code 2 and one line; `--debug` shows the traceback.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from synthaug.errors import InputError, SynthAugError

app = typer.Typer(
    help="Learns your cells from a few annotated images and makes fresh, labelled populations of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

evaluation = typer.Typer(
    help="How real the synthetic images are, and whether training on them helps.", no_args_is_help=True
)
app.add_typer(evaluation, name="evaluate")


class Format(StrEnum):
    """Layouts `generate` writes."""

    folder = "folder"
    ctc = "ctc"
    cellpose = "cellpose"
    stardist = "stardist"
    ome = "ome"


Size = Annotated[
    str | None, typer.Option(help="Height x width in pixels, as 256x256; 3D: depth x height x width, as 32x128x128.")
]
VoxelSize = Annotated[
    str | None, typer.Option(help="Micrometres: the pixel size, as 0.65, or depth x height x width, as 2x0.8x0.8.")
]
Seed = Annotated[int, typer.Option(help="Every number comes from it.")]


def say(line: str) -> None:
    """A line of progress: styled on a terminal, plain otherwise."""
    from rich.console import Console

    if sys.stderr.isatty():
        Console(stderr=True).log(line, markup=False)
    else:
        print(line, file=sys.stderr, flush=True)


def parse_size(text: str) -> tuple[int, ...]:
    """(Y, X) of "256x256" or "256", (Z, Y, X) of "32x128x128".

    >>> parse_size("256x128"), parse_size("64"), parse_size("32x128x96")
    ((256, 128), (64, 64), (32, 128, 96))
    """
    parts = text.lower().split("x")
    if len(parts) > 3 or not all(p.strip().isdigit() for p in parts):
        expected = "height x width, for example 256x256, or depth x height x width"
        raise InputError("--size", expected=expected, got=repr(text))
    numbers = [int(p) for p in parts]
    return tuple(numbers * 2 if len(numbers) == 1 else numbers)


def parse_voxel_size(text: str | None) -> tuple[float, float, float] | None:
    """(Z, Y, X) in micrometres of "2x0.8x0.8", or of "0.65", the pixel size of 2D images.

    >>> parse_voxel_size("2x0.8x0.8"), parse_voxel_size("0.65"), parse_voxel_size(None)
    ((2.0, 0.8, 0.8), (1.0, 0.65, 0.65), None)
    """
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.lower().split("x")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        numbers = [1.0, numbers[0], numbers[0]]
    if len(numbers) != 3 or not all(0 < n < math.inf for n in numbers):
        expected = "micrometres: the pixel size, as 0.65, or depth x height x width, as 2x0.8x0.8"
        raise InputError("--voxel-size", expected=expected, got=repr(text))
    return numbers[0], numbers[1], numbers[2]


@app.command()
def fit(
    data: Annotated[Path, typer.Argument(help="Folder of images with instance labels.")],
    out: Annotated[Path, typer.Option(help="Folder of the new cascade.")],
    start: Annotated[
        str,
        typer.Option("--from", help='Cascade to adapt: "auto", an embedded name, a folder, a hub id, or "scratch".'),
    ] = "auto",
    budget: Annotated[float, typer.Option(help="Minutes for everything.")] = 20.0,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted fit.")] = False,
    val: Annotated[Path | None, typer.Option(help="Held-out images with labels, for the report only.")] = None,
    voxel_size: VoxelSize = None,
    slice_step: Annotated[int, typer.Option(min=1, help="Planes of dense 3D labels used: every so many.")] = 3,
    data_card: Annotated[Path | None, typer.Option(help="Text about the data for the model card.")] = None,
    device: Annotated[str, typer.Option(help="Where networks are trained: cpu or cuda.")] = "cpu",
    num_images: Annotated[int | None, typer.Option(help="Use only the first so many images.")] = None,
) -> None:
    """Train every stage on annotated images, in one command."""
    from synthaug.datasets.readers import open_pairs
    from synthaug.evaluation.preview import write_preview
    from synthaug.training import fit as training

    opened = open_pairs(data)
    pairs = opened.read_all()[:num_images]
    size_um = parse_voxel_size(voxel_size) or opened.voxel_size_um
    held_out = read_pairs(val) if val else None
    text = data_card.read_text() if data_card else ""
    if start == "auto":
        note = out.with_name(f"{out.name}.fit") / "fit.json"
        if resume and note.is_file():
            start = json.loads(note.read_text())["start"]
        else:
            start = training.choose_start(pairs)
        say(f"adapting {start}" if start != training.SCRATCH else "training from scratch")
    cascade = training.fit(
        pairs,
        out,
        start=start,
        budget_minutes=budget,
        seed=seed,
        resume=resume,
        voxel_size_um=size_um,
        slice_step=slice_step,
        data_card=text,
        device=device,
        log=say,
    )
    write_preview(cascade, pairs, held_out, out / "preview", seed, say)
    typer.echo(f"{out}: done. Look at {out / 'preview' / 'sheet.html'}")


@app.command()
def generate(
    cascade: Annotated[str, typer.Argument(help="Embedded name, folder or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    num: Annotated[int, typer.Option(min=1, help="Image-label pairs.")] = 100,
    size: Size = None,
    format: Annotated[Format, typer.Option(help="Layout of the folder.")] = Format.folder,
    seed: Seed = 0,
    clustering: Annotated[float | None, typer.Option(min=0, max=1, help="Chance to sit next to a cell.")] = None,
    num_cells: Annotated[int | None, typer.Option(min=0, help="Cells an image; default: as in the real data.")] = None,
    background: Annotated[str, typer.Option(help='"model", or "real" for regions of real frames.')] = "model",
) -> None:
    """Write synthetic image-label pairs; run again after an interruption, it goes on where it stopped."""
    from synthaug.cascade import Cascade
    from synthaug.datasets.frames import frames
    from synthaug.datasets.stream import DEFAULT_SIZES
    from synthaug.datasets.writers import count_written, write_pairs
    from synthaug.generators.stage import write_atomic

    model = Cascade.from_pretrained(cascade)
    shape = parse_size(size) if size else DEFAULT_SIZES[model.ndim]
    settings: dict[str, Any] = {"num_cells": num_cells, "clustering": clustering, "background": background}
    request = {
        "cascade": model.fingerprint(),
        "size": list(shape),
        "format": format.value,
        "seed": seed,
        **settings,
    }
    out.mkdir(parents=True, exist_ok=True)
    note = out / "synthaug.json"
    if note.is_file() and json.loads(note.read_text()) != request:
        raise InputError(
            "--out", expected="a new folder, or one begun with the same settings", got=str(out), remedy=f"See {note}."
        )
    write_atomic(note, (json.dumps(request, indent=2) + "\n").encode())
    done = count_written(out, format.value)
    if done:
        say(f"{done} pairs are there already")
    stream = frames(model, shape, seed, done, num, **settings)
    write_pairs(
        counted(stream, done, num),
        out,
        format=format.value,
        dtype=model.config.intensity,
        start=done,
        voxel_size_um=model.voxel_size_um,
    )
    typer.echo(f"{out}: {num} pairs in {format.value} layout")


@app.command()
def preview(
    cascade: Annotated[str, typer.Argument(help="Embedded name, folder or hub id.")],
    real: Annotated[Path, typer.Option(help="Real images with labels, to stand beside.")],
    out: Annotated[Path, typer.Option(help="Folder for sheet.html and sheet.png.")],
    val: Annotated[Path | None, typer.Option(help="Held-out real images with labels, for the numbers.")] = None,
    seed: Seed = 0,
) -> None:
    """Real beside synthetic: a self-contained HTML page, a PNG, and the numbers."""
    from synthaug.cascade import Cascade
    from synthaug.evaluation.preview import write_preview

    held_out = read_pairs(val) if val else None
    write_preview(Cascade.from_pretrained(cascade), read_pairs(real), held_out, out, seed, say)
    typer.echo(str(out / "sheet.html"))


@app.command()
def bench(
    cascade: Annotated[str, typer.Argument(help="Embedded name, folder or hub id.")],
    real: Annotated[Path | None, typer.Option(help="Real images with labels, mixed in; also timed alone.")] = None,
    size: Size = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a batch.")] = 8,
    ratio: Annotated[
        float | None, typer.Option(min=0, max=1, help="Synthetic share; default half with --real, else all.")
    ] = None,
    real_cells: Annotated[float, typer.Option(min=0, max=1, help="Real share of the synthetic frames' cells.")] = 0.0,
    max_reuse: Annotated[int, typer.Option(min=1, help="Uses of a synthetic cell.")] = 16,
    workers: Annotated[str, typer.Option(help="Worker processes, by commas.")] = "0,2",
    step_ms: Annotated[float, typer.Option(min=0, help="Milliseconds of a training step; 0: as fast as it goes.")] = 0,
    seconds: Annotated[float, typer.Option(min=0.01, help="How long each is timed.")] = 20.0,
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
) -> None:
    """Would your training wait: time the stream on this machine, beside the real images alone."""
    from synthaug.cascade import Cascade
    from synthaug.datasets.readers import open_pairs
    from synthaug.datasets.synth import SynthDataset
    from synthaug.datasets.throughput import measure_throughput
    from synthaug.generators.stage import write_atomic

    counts = [whole_number("--workers", part) for part in workers.split(",")]
    opened = open_pairs(real) if real else None
    ratio = ratio if ratio is not None else (0.5 if opened else 1.0)
    model = Cascade.from_pretrained(cascade)
    shape = parse_size(size) if size else None
    found = []
    for share in dict.fromkeys([ratio, 0.0] if opened else [ratio]):
        cells = real_cells if share else 0.0
        stream = SynthDataset(model, shape, batch_size, opened, share, max_reuse=max_reuse, real_cells=cells)
        for num in counts:
            measured = measure_throughput(stream, num, step_ms, seconds)
            typer.echo(f"{share:.0%} synthetic, {measured}")
            found.append({"synthetic_ratio": share, **measured.as_dict()})
    if out:
        write_atomic(out, (json.dumps({"size": stream.config.size, "measured": found}, indent=2) + "\n").encode())


@evaluation.command()
def realism(
    cascade: Annotated[str, typer.Argument(help="Embedded name, folder or hub id.")],
    train: Annotated[Path, typer.Option(help="The real images the cascade was fitted to.")],
    val: Annotated[Path, typer.Option(help="Held-out real images.")],
    num: Annotated[int, typer.Option(help="Synthetic images.")] = 60,
    size: Size = None,
    seed: Seed = 0,
    inception_weights: Annotated[
        Path | None,
        typer.Option(help="torchvision's inception_v3, .pth or .safetensors: its Fréchet distance as well (not FID)."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
) -> None:
    """How real is it: distances synthetic - real beside real - real, near-copies, agreement of texture and label."""
    import torch

    from synthaug.cascade import Cascade
    from synthaug.datasets.crops import extract_crops
    from synthaug.datasets.frames import frames
    from synthaug.datasets.volumes import extract_slice_crops
    from synthaug.evaluation.agreement import mask_agreement
    from synthaug.evaluation.frechet import frechet_report, load_inception
    from synthaug.evaluation.preview import common_size
    from synthaug.evaluation.realism import realism_report
    from synthaug.generators.stage import write_atomic
    from synthaug.randomness import SampleKey

    # Before the minutes of work that a wrong file would waste.
    inception = load_inception(inception_weights) if inception_weights else None
    model = Cascade.from_pretrained(cascade)
    real, held_out = read_pairs(train), read_pairs(val)
    shape = parse_size(size) if size else common_size([*real, *held_out])
    synthetic = list(frames(model, shape, seed, 0, num))
    report = realism_report(real, held_out, synthetic, voxel_size_um=model.voxel_size_um)
    cells = model.cells([SampleKey(seed, ("agreement", i)) for i in range(128 if model.ndim == 2 else 64)])
    if model.ndim == 2:
        crops = extract_crops(
            held_out, crop_size=model.crop_size, min_area=model.config.min_area, least_scale=model.least_scale
        )
        made = mask_agreement(cells.image[:, 0], cells.sdf[:, 0])
    else:
        # Of real volumes single planes are known; beside them, the middle planes of generated cells.
        planes = extract_slice_crops(held_out, crop_size=model.crop_size, least_scale=model.least_scale)
        crops = planes.select(planes.central.nonzero()[:, 0])
        middle = cells.mask.flatten(2).sum(2).argmax(1)
        rows = torch.arange(len(cells))
        made = mask_agreement(cells.image[rows, middle], cells.sdf[rows, middle])
    agreement = {"generated": float(made.mean()), "real": float(mask_agreement(crops.image, crops.sdf).mean())}
    drawn = max(model.rejects["drawn"], 1)
    rejected = {why: n / drawn for why, n in model.rejects.items() if why != "drawn"}
    typer.echo(report.table())
    learned = None if inception is None else frechet_report(real, held_out, synthetic, inception, seed=seed)
    if learned is not None:
        typer.echo(learned)
    typer.echo(f"thresholded cell against its mask, mean IoU: {agreement}")
    typer.echo(f"masks drawn again: {sum(rejected.values()):.1%} {rejected}")
    if out:
        record = {**report.as_dict(), "mask_agreement": agreement, "rejected": rejected}
        record |= learned.as_dict() if learned is not None else {}
        write_atomic(out, (json.dumps(record, indent=2) + "\n").encode())


@evaluation.command()
def experiment(
    real: Annotated[Path, typer.Option(help="Real images with labels; the annotations granted are taken from them.")],
    test: Annotated[Path, typer.Option(help="Held-out real images with labels.")],
    out: Annotated[Path, typer.Option(help="Folder of cascades, results and report; asked again, it goes on there.")],
    arms: Annotated[str, typer.Option(help="What to train on, by commas.")] = "real,real+copy-paste,synthetic,both",
    num_patches: Annotated[
        str, typer.Option(help="Annotated patches (3D: planes), by commas; all for everything.")
    ] = "4",
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions; three at least for a claim.")] = 3,
    segmenter: Annotated[str, typer.Option(help="monai or cellpose.")] = "monai",
    also: Annotated[
        Path | None, typer.Option(help="Another data set that all arms with real images train on: do they carry over?")
    ] = None,
    start: Annotated[
        str, typer.Option("--from", help='Cascade to adapt, trained on ANOTHER data set, or "scratch".')
    ] = "nuclei-2d-u2os",
    fit_minutes: Annotated[float, typer.Option(help="Of each cascade.")] = 3.0,
    prior: Annotated[str | None, typer.Option(help="Shapes: ellipsoid, bezier or spherical-harmonics.")] = None,
    without: Annotated[str, typer.Option(help="Ablations, by commas: multiview, pretraining.")] = "",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of every training.")] = 1500,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default 8, or 2 in 3D.")] = None,
    size: Annotated[str | None, typer.Option(help="Of patches, default 192x192; 3D: of samples, 32x96x96.")] = None,
    crop: Annotated[str | None, typer.Option(help="Trained on, default 128x128, or 80x80 in 3D.")] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Synthetic share of a mix; by default half, more beside under 32 patches, 1/8 beside all.",
        ),
    ] = None,
    max_reuse: Annotated[int, typer.Option(min=1, help="Uses of a synthetic cell.")] = 64,
    real_cells: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Share of annotated cells among those of synthetic samples in `both`; default 0.3."
        ),
    ] = None,
    min_area: Annotated[int | None, typer.Option(min=1, help="Smallest instance; default 20 px, or 50 voxels.")] = None,
    photons: Annotated[float | None, typer.Option(help="See all images through a camera as dim as this.")] = None,
    voxel_size: VoxelSize = None,
    pretrained: Annotated[Path | None, typer.Option(help="Segmenter weights that every arm starts from.")] = None,
    nbase: Annotated[str, typer.Option(help="Widths of Cellpose's network.")] = "2,32,64,128,256",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    jobs: Annotated[int, typer.Option(min=1, help="Trainings side by side.")] = 1,
) -> None:
    """Does it help: the same segmenter trained on real, synthetic and mixed images, scored on held-out real ones."""
    import warnings

    from synthaug.datasets.readers import open_pairs
    from synthaug.evaluation.experiment import ExperimentConfig, run_experiment
    from synthaug.evaluation.experiment_report import markdown, write_report

    voxel = parse_voxel_size(voxel_size)
    ndim = open_pairs(test)[0]["image"].ndim - 1  # without the channel
    flat = ndim == 2
    config = ExperimentConfig(
        arms=tuple(part.strip() for part in arms.split(",")),
        num_patches=tuple(
            None if part.strip() == "all" else whole_number("--num-patches", part) for part in num_patches.split(",")
        ),
        seeds=seeds,
        segmenter=segmenter,
        also=str(also) if also else None,
        start=start,
        fit_minutes=fit_minutes,
        prior=prior,
        without=tuple(part.strip() for part in without.split(",") if part),
        steps=steps,
        batch_size=batch_size or (8 if flat else 2),
        size=parse_size(size or ("192x192" if flat else "32x96x96")),
        crop=parse_size(crop or ("128x128" if flat else "80x80")),  # type: ignore[arg-type]  # checked there
        ratio=ratio,
        max_reuse=max_reuse,
        real_cells=real_cells,
        min_area=min_area or (20 if flat else 50),
        photons=photons,
        voxel_size_um=voxel,
        pretrained=str(pretrained) if pretrained else None,
        nbase=tuple(whole_number("--nbase", part) for part in nbase.split(",")),
    )
    with warnings.catch_warnings():
        # Of few cells and odd labels the readers have warned already, and every process would do so again.
        warnings.simplefilter("ignore")
        results = run_experiment(real, test, out, config, device=device, jobs=jobs, log=say)
        write_report(out, results, open_pairs(test, min_area=config.min_area).read_all())
    typer.echo(markdown(results))
    typer.echo(f"{out / 'report.html'}")


def whole_number(option: str, text: str) -> int:
    """The number in `text`."""
    if not text.strip().isdigit():
        raise InputError(option, expected="whole numbers, separated by commas", got=repr(text))
    return int(text)


@app.command()
def info(cascade: Annotated[str | None, typer.Argument(help="Embedded name, folder or hub id.")] = None) -> None:
    """What a cascade is made of; without a name, the embedded ones."""
    from rich.console import Console
    from rich.table import Table

    from synthaug.cascade import Cascade
    from synthaug.hub import embedded_cascades, find_cascade

    if cascade is None:
        for name in embedded_cascades():
            typer.echo(name)
        return
    folder = find_cascade(cascade)
    model = Cascade.from_pretrained(cascade)
    table = Table(title=f"{model.config.name} ({folder})", show_header=False)
    table.add_row("crop", f"{model.crop_size} px")
    table.add_row("dimensions", f"{model.ndim}D")
    table.add_row("smallest instance", f"{model.config.min_area} {'px' if model.ndim == 2 else 'voxels'}")
    voxel = model.voxel_size_um and " x ".join(f"{n:g}" for n in model.voxel_size_um[3 - model.ndim :])
    table.add_row("voxel size" if model.ndim == 3 else "pixel size", f"{voxel} um" if voxel else "unknown")
    table.add_row("camera counts", model.config.intensity)
    table.add_row("clustering probability", f"{model.population.config.clustering:.2f}")
    if model.config.lent_share:
        table.add_row(
            "lent cells", f"{model.config.lent_share:.0%}, 1 to {model.config.lent_zoom:.2f} times their size"
        )
    for name, stage in model.stages().items():
        parameters = sum(p.numel() for p in stage.parameters())
        table.add_row(name, f"{parameters / 1e6:.2f} M parameters" if parameters else "fitted tables")
    size = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
    table.add_row("size on disk", f"{size / 1e6:.1f} MB")
    table.add_row("fingerprint", model.fingerprint()[:16])
    Console().print(table)
    card = folder / "README.md"
    if card.is_file():
        typer.echo(card.read_text())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the sheet, the pictures and the numbers.")] = Path("demo"),
    minutes: Annotated[float, typer.Option(help="Training minutes for each of the two networks.")] = 2.5,
    seed: Seed = 0,
) -> None:
    """Train a small network on a 50:50 stream and on the real images alone, side by side, on bundled real images."""
    from synthaug.evaluation.demo import run_demo

    run_demo(out, minutes=minutes, seed=seed, log=say)


def read_pairs(path: Path) -> list[Any]:
    """All pairs of a folder in memory."""
    from synthaug.datasets.readers import open_pairs

    return open_pairs(path).read_all()


def counted(pairs: Iterator[Any], done: int, num: int) -> Iterator[Any]:
    """The same pairs, with a line of progress every `PROGRESS_S` seconds."""
    from synthaug.datasets.frames import FRAMES_AT_ONCE

    begun = last = time.monotonic()
    for made, pair in enumerate(pairs, start=1):
        yield pair
        now = time.monotonic()
        if now - last > PROGRESS_S:
            finished = -(-made // FRAMES_AT_ONCE) * FRAMES_AT_ONCE  # those made together with this one are ready, too
            left = max(num - done - finished, 0) * (now - begun) / finished
            say(f"{done + made} of {num} pairs, about {left / 60:.1f} min left")
            last = now


PROGRESS_S = 5.0
"""Seconds between lines of progress."""


def main() -> None:
    """Entry point of the `synthaug` command."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    # Progress bars of the model library would interleave with our own lines.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        app()
    except (SynthAugError, FileNotFoundError) as error:
        if debug:
            raise
        print(f"synthaug: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("synthaug: interrupted; what was done so far is kept", file=sys.stderr)
        sys.exit(130)
