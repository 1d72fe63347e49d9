"""Is the stream of a trained cascade the same bits for every worker count, on a second run and after a resume?

SHA-256 over the batches for num_workers 0, 1, 2, 4, once more for 0, and of the rest of the stream after a resume at three
offsets with another number of workers. Exits with an error if any differs. Run: python benchmarks/stream_hash.py [CASCADE]
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterable
from typing import Any

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cascade", nargs="?", default="nuclei-2d")
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=4)
    options = parser.parse_args()
    cascade = Cascade.from_pretrained(options.cascade)

    def stream() -> SynthDataset:
        return SynthDataset(
            cascade,
            size=(options.size, options.size),
            batch_size=options.batch_size,
            num_batches=options.batches,
            seed=0,
        )

    runs = {f"workers {n}": digests(stream().loader(num_workers=n)) for n in (0, 1, 2, 4)}
    runs["workers 0 again"] = digests(stream().loader(num_workers=0))
    reference = runs["workers 0"]
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
    write_result("stream_hash", {"cascade": options.cascade, "batches": options.batches, "sha256": total, "same": same})
    if not all(same.values()):
        sys.exit("the stream is not the same everywhere")


if __name__ == "__main__":
    main()
