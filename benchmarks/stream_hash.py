"""Is the stream of a trained cascade the same bits for every worker count, on a second run and after a resume?

SHA-256 over the batches for num_workers 0, 1, 2, 4, once more for 0, and of the rest of the stream after a resume at three
offsets with another number of workers; and every label of it is looked at. Exits with an error if any run differs, or any
sample breaks the contract on labels. Run:

    python benchmarks/stream_hash.py [CASCADE]
    python benchmarks/stream_hash.py nuclei-3d --size 16 64 64 --batches 125 --num-lanes 4 --max-reuse 64 --num-cells 2 8

The last line is 500 volumes; at the density of the data and with a reuse of 16 it would need several times the fresh cells.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from results import write_result

from synthaug import Cascade, SynthDataset


def digests(batches: Iterable[dict[str, Any]]) -> list[str]:
    """SHA-256 of every batch."""
    found = []
    for batch in batches:
        digest = hashlib.sha256()
        for name in ("image", "label", "synthetic"):
            digest.update(batch[name].numpy().tobytes())
        found.append(digest.hexdigest())
    return found


def violations(batch: dict[str, Any], min_area: int) -> int:
    """Samples whose labels are not contiguous from 1, or hold an instance under the minimum size inside the frame."""
    broken = 0
    for label in batch["label"]:
        sizes = torch.bincount(label.flatten())[1:]
        whole = sizes.clone()
        for axis in range(1, label.ndim):
            for side in (0, label.shape[axis] - 1):
                cut = label.select(axis, side).unique().long()
                whole[cut[cut > 0] - 1] = min_area
        broken += bool((sizes == 0).any() or (whole < min_area).any() or label.min() < 0)
    return broken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cascade", nargs="?", default="nuclei-2d")
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--size", type=int, nargs="+", help="(Z) Y X; default 96 96, or 16 64 64 in 3D")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--num-lanes", type=int, default=8, help="fewer lanes need fewer cells")
    parser.add_argument("--max-reuse", type=int, default=16)
    parser.add_argument("--num-cells", type=int, nargs=2, help="LOW HIGH of a sample; default as dense as the data")
    options = parser.parse_args()
    cascade = Cascade.from_pretrained(options.cascade)
    size = options.size or ((96, 96) if cascade.ndim == 2 else (16, 64, 64))
    broken: list[int] = []

    def stream() -> SynthDataset:
        return SynthDataset(
            cascade,
            size=size,
            batch_size=options.batch_size,
            num_batches=options.batches,
            num_lanes=options.num_lanes,
            max_reuse=options.max_reuse,
            num_cells=options.num_cells,
            seed=0,
        )

    def checked(batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for batch in batches:
            broken.append(violations(batch, cascade.config.min_area))
            yield batch

    reference = digests(checked(stream().loader(num_workers=0)))
    runs = {f"workers {n}": digests(stream().loader(num_workers=n)) for n in (1, 2, 4)}
    runs["workers 0 again"] = digests(stream().loader(num_workers=0))
    assert len(reference) == options.batches
    same = {name: found == reference for name, found in runs.items()}
    for offset, before, after in (
        (options.batches // 7, 0, 2),
        (options.batches // 2, 2, 1),
        (options.batches - 9, 1, 4),
    ):
        first = stream().loader(num_workers=before)
        head = []
        for batch in first:
            head += digests([batch])
            if len(head) == offset:
                break
        second = stream().loader(num_workers=after)
        second.load_state_dict(first.state_dict())
        same[f"resume at {offset}, {before} to {after} workers"] = head + digests(second) == reference
    total = hashlib.sha256("".join(reference).encode()).hexdigest()
    write_result(
        "stream_hash" if cascade.ndim == 2 else "stream_hash_3d",
        {
            "cascade": options.cascade,
            "size": list(size),
            "batches": options.batches,
            "samples": options.batches * options.batch_size,
            "num_lanes": options.num_lanes,
            "max_reuse": options.max_reuse,
            "num_cells": options.num_cells or "as dense as the data",
            "violations": sum(broken),
            "sha256": total,
            "same": same,
        },
    )
    if not all(same.values()):
        sys.exit("the stream is not the same everywhere")
    if any(broken):
        sys.exit("labels break their contract")


if __name__ == "__main__":
    main()
