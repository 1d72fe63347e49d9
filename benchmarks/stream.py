"""Does the trainer wait? Warm-bank pairs a second against reading the same pairs from TIFF, the sides taking turns in one run;
the first batch of a fresh process; the rate of a stream that makes its cells meanwhile; peak memory.

Core-milliseconds a pair are those of one thread that does nothing else, whatever else the machine does; wall clock and
rates of two workers are those of the machine as it was. Run:

    python benchmarks/stream.py [CASCADE]
    python benchmarks/stream.py nuclei-3d --size 32 128 128 --pairs 40 --num-lanes 2 --max-reuse 64
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
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


ROUNDS = 5


def per_pair(work: Callable[[], int]) -> tuple[float, float]:
    """Seconds a pair, of the clock and of the core; `work` returns how many pairs it made."""
    clock, core = time.perf_counter(), time.process_time()
    num = work()
    return (time.perf_counter() - clock) / num, (time.process_time() - core) / num


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cascade", nargs="?", default="nuclei-2d")
    parser.add_argument("--pairs", type=int, default=160)
    parser.add_argument("--size", type=int, nargs="+", help="(Z) Y X; default 256 256, or 32 128 128 in 3D")
    parser.add_argument("--batch-size", type=int, help="default 8, or 2 in 3D")
    parser.add_argument(
        "--num-lanes", type=int, default=8, help="fewer lanes need fewer cells before the first batches"
    )
    parser.add_argument("--max-reuse", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cascade = Cascade.from_pretrained(options.cascade)
    size = tuple(options.size or DEFAULT_SIZES[cascade.ndim])
    batch_size = options.batch_size or {2: 8, 3: 2}[cascade.ndim]
    first_batch = FIRST_BATCH.format(name=options.cascade, size=size, batch_size=batch_size)
    first = [
        float(
            subprocess.run(
                [sys.executable, "-c", first_batch],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout
        )
        for _ in range(3)
    ]
    stream = SynthDataset(
        cascade, size=size, batch_size=batch_size, num_lanes=options.num_lanes, max_reuse=options.max_reuse
    )
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
        files = open_pairs(Path(folder))
        disk = DataLoader(files, batch_size=batch_size, num_workers=2, persistent_workers=True)
        sum(1 for _ in disk)  # its workers have started
        # The cheap half alone: all cells are there already
        cells = cascade.cells([SampleKey(0, ("cell", i)) for i in range(64)])
        keys = [SampleKey(0, ("frame", i)) for i in range(8 * ROUNDS + 1)]
        cascade.populate(cells, keys[-1:], size)
        made, read, rates = [], [], []
        for i in range(ROUNDS):
            made.append(per_pair(lambda i=i: len(cascade.populate(cells, keys[8 * i : 8 * i + 8], size).image)))
            read.append(per_pair(lambda: len([files[k] for k in range(len(files))])))
            rates.append(1 / per_pair(lambda: sum(len(batch["image"]) for batch in disk))[0])
        made_core, read_core = (statistics.median(core for _, core in side) for side in (made, read))
        populate_s, from_disk = statistics.median(clock for clock, _ in made), statistics.median(rates)
    write_result(
        "stream" if cascade.ndim == 2 else "stream_3d",
        {
            "cascade": options.cascade,
            "size": list(size),
            "batch_size": batch_size,
            "first_batch_s": [round(s, 2) for s in first],
            "first_batch_median_s": round(statistics.median(first), 2),
            "num_lanes": options.num_lanes,
            "warm_bank_core_ms_a_pair": {"median": made_core * 1e3, "all": [core * 1e3 for _, core in made]},
            "tiff_core_ms_a_pair": {"median": read_core * 1e3, "all": [core * 1e3 for _, core in read]},
            "ratio_of_core_time": round(read_core / made_core, 3),
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
