"""How alike are planes one and two apart, inside real nuclei and in synthetic ones, with eq. 2 alone and with blurred noise?

Real planes are those of annotated stacks, every third plane taken as annotated; synthetic ones are cylinders over the
largest real outlines. Compared: eq. 2 alone at the rho that fits best without blur, rho and blur of the cascade, those that
`fit_rho` finds, independent noise. Writes results/plane_correlation.json. Run:

    python benchmarks/plane_correlation.py DATA/train
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from results import write_result

from synthaug import Cascade, open_pairs
from synthaug.training.correlation import (
    PlaneStatistics,
    extract_patches,
    fit_rho,
    plane_statistics,
    synthetic_planes,
)
from synthaug.types import UNLABELLED

STEP, NUM_CELLS = 3, 16
RHO_ALONE = 2.13437474581095  # what nuclei-3d was given when its fit knew eq. 2 alone


def row(found: PlaneStatistics) -> dict[str, float]:
    return {"one_apart": found.correlation[0], "two_apart": found.correlation[1], "contrast": found.contrast}


def main() -> None:
    """Measure real and synthetic planes and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("cascade", nargs="?", default="nuclei-3d")
    options = parser.parse_args()
    torch.set_num_threads(1)
    texture = Cascade.from_pretrained(options.cascade).texture
    pairs = []
    for sample in open_pairs(options.data):
        labels = sample["label"][0].numpy().astype(np.int32)
        labels[np.arange(len(labels)) % STEP != 1] = UNLABELLED
        pairs.append((sample["image"][0].numpy().astype(np.float32), labels))
    patches = extract_patches(pairs, texture.config.crop_size)
    masks = sorted((mask for _, mask in patches), key=lambda m: -int(m.sum()))[:NUM_CELLS]
    fit = fit_rho(texture, patches, num_cells=NUM_CELLS)
    plain = plane_statistics(synthetic_planes(texture, masks, rho=RHO_ALONE, seed=0))
    own = {"rho": texture.config.rho, "slice_sigma": texture.config.slice_sigma}
    embedded = plane_statistics(synthetic_planes(texture, masks, **own, seed=0))
    write_result(
        "plane_correlation",
        {
            "cascade": options.cascade,
            "real": {**row(fit.real), "num_cells": fit.real.num_cells},
            "eq_2_alone": {"rho": RHO_ALONE, **row(plain)},
            "embedded": {**own, **row(embedded)},
            "fitted": {"rho": fit.rho, "slice_sigma": fit.slice_sigma, **row(fit.synthetic)},
            "independent": row(fit.independent),
        },
    )


if __name__ == "__main__":
    main()
