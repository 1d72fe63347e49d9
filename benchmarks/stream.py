"""Does the trainer wait? Warm-bank pairs a second against reading the same pairs from TIFF, both with 2 workers, in one run;
the first batch of a fresh process; peak memory.

Run: python benchmarks/stream.py [CASCADE]
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
from synthaug.datasets.writers import write_pairs

FIRST_BATCH = """
import time
import synthaug, torch, diffusers  # imports are not counted
from synthaug import Cascade, SynthDataset
from synthaug.datasets import synth
begun = time.perf_counter()
batch = next(iter(SynthDataset(Cascade.from_pretrained({name!r}), batch_size=8)))
print(time.perf_counter() - begun)
"""


def warm_populate(cascade: Cascade, num_frames: int, size: tuple[int, int]) -> float:
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
    parser.add_argument("--size", type=int, default=256)
    options = parser.parse_args()
    cascade = Cascade.from_pretrained(options.cascade)
    size = (options.size, options.size)
    first = [
        float(
            subprocess.run(
                [sys.executable, "-c", FIRST_BATCH.format(name=options.cascade)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for _ in range(3)
    ]
    populate_s = warm_populate(cascade, 40, size)
    stream = SynthDataset(cascade, size=size, batch_size=8)
    loader = stream.loader(num_workers=2)
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    begun = time.perf_counter()
    num_batches = options.pairs // 8
    pairs = []
    for _ in range(num_batches):
        batch = next(batches)
        pairs += list(zip(batch["image"][:, 0].numpy(), batch["label"][:, 0].numpy()))
    streamed = options.pairs / (time.perf_counter() - begun)
    stats = loader.stats()
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(pairs, folder, dtype=cascade.config.intensity)
        disk = DataLoader(open_pairs(Path(folder)), batch_size=8, num_workers=2)
        next(iter(disk))
        begun = time.perf_counter()
        read = sum(len(batch["image"]) for batch in disk)
        from_disk = read / (time.perf_counter() - begun)
    write_result(
        "stream",
        {
            "cascade": options.cascade,
            "size": list(size),
            "first_batch_s": [round(s, 2) for s in first],
            "first_batch_median_s": round(statistics.median(first), 2),
            "warm_bank_pairs_per_s_one_core": round(1 / populate_s, 1),
            "tiff_pairs_per_s_two_workers": round(from_disk, 1),
            "stream_pairs_per_s_two_workers": round(streamed, 1),
            "ratio_warm_two_cores_to_tiff": round(2 / populate_s / from_disk, 2),
            "mean_reuse": round(stats.mean_reuse, 2),
            "max_reuse": stats.max_reuse,
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        },
    )


if __name__ == "__main__":
    main()
