"""Does the trainer wait? Warm-bank pairs a second against reading the same pairs from TIFF, both with 2 workers, in one run;
the first batch of a fresh process; peak memory.

Run: python benchmarks/stream.py [CASCADE], or in 3D python benchmarks/stream.py nuclei-3d --size 32 128 128 --pairs 40
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import write_result
from torch.utils.data import DataLoader

from synthaug import Cascade, SampleKey, SynthDataset, open_pairs
from synthaug.datasets.stream import DEFAULT_SIZES
from synthaug.datasets.writers import write_pairs

FIRST_BATCH = """
import time
import synthaug, torch, diffusers  # imports are not counted
from synthaug import Cascade, SynthDataset
from synthaug.datasets import synth
begun = time.perf_counter()
batch = next(iter(SynthDataset(Cascade.from_pretrained({name!r}), {size!r}, batch_size={batch_size})))
print(time.perf_counter() - begun)
"""


def warm_populate(cascade: Cascade, num_frames: int, size: tuple[int, ...]) -> float:
    """Seconds a pair where all cells are there already: the cheap half alone, one thread."""
    keys = [SampleKey(0, ("frame", i)) for i in range(num_frames)]
    cells = cascade.cells([SampleKey(0, ("cell", i)) for i in range(64)])
    cascade.populate(cells, keys[:1], size)
    begun = time.perf_counter()
    cascade.populate(cells, keys, size)
    return (time.perf_counter() - begun) / num_frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cascade", nargs="?", default="nuclei-2d")
    parser.add_argument("--pairs", type=int, default=160)
    parser.add_argument("--size", type=int, nargs="+", help="(Z) Y X; default 256 256, or 32 128 128 in 3D")
    parser.add_argument("--batch-size", type=int, help="default 8, or 2 in 3D")
    options = parser.parse_args()
    cascade = Cascade.from_pretrained(options.cascade)
    size = tuple(options.size or DEFAULT_SIZES[cascade.ndim])
    batch_size = options.batch_size or {2: 8, 3: 2}[cascade.ndim]
    first_batch = FIRST_BATCH.format(name=options.cascade, size=size, batch_size=batch_size)
    first = [
        float(
            subprocess.run(
                [sys.executable, "-c", first_batch],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for _ in range(3)
    ]
    populate_s = warm_populate(cascade, 40, size)
    stream = SynthDataset(cascade, size=size, batch_size=batch_size)
    loader = stream.loader(num_workers=2)
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    begun = time.perf_counter()
    num_batches = options.pairs // batch_size
    pairs = []
    for _ in range(num_batches):
        batch = next(batches)
        pairs += list(zip(batch["image"][:, 0].numpy(), batch["label"][:, 0].numpy()))
    streamed = num_batches * batch_size / (time.perf_counter() - begun)
    stats = loader.stats()
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(pairs, folder, dtype=cascade.config.intensity)
        disk = DataLoader(open_pairs(Path(folder)), batch_size=batch_size, num_workers=2)
        next(iter(disk))
        begun = time.perf_counter()
        read = sum(len(batch["image"]) for batch in disk)
        from_disk = read / (time.perf_counter() - begun)
    write_result(
        "stream" if cascade.ndim == 2 else "stream_3d",
        {
            "cascade": options.cascade,
            "size": list(size),
            "batch_size": batch_size,
            "first_batch_s": [round(s, 2) for s in first],
            "first_batch_median_s": round(statistics.median(first), 2),
            "warm_bank_pairs_per_s_one_core": round(1 / populate_s, 1),
            "tiff_pairs_per_s_two_workers": round(from_disk, 1),
            "stream_pairs_per_s_two_workers": round(streamed, 1),
            "ratio_warm_two_cores_to_tiff": round(2 / populate_s / from_disk, 2),
            "mean_reuse": round(stats.mean_reuse, 2),
            "max_reuse": stats.max_reuse,
            "bank_of_one_worker_mib": round(stats.bank_bytes / 2**20, 1),
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        },
    )


if __name__ == "__main__":
    main()
