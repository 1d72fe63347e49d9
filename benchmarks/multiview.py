"""Are the views of the multiview stage views of one body? With volume attention against the same network without it.

Both networks were trained for the same number of steps (seconds and steps as given). On bodies neither has seen, each gets
the silhouette along the optical axis and the same noise. Reported, as mean and 10 % quantile over bodies and views but the
first: IoU with the true silhouettes (how much the outline tells), and consistency: IoU between a view and the silhouette of
the hull carved from all other views. The row "truth" gives the consistency of the true silhouettes themselves, the row
"unrelated" both numbers for views that are each of another body. Run:

    python benchmarks/multiview.py WITH WITHOUT [--bodies N]

where WITH and WITHOUT are folders of saved stages; training/multiview.py's `fit_multiview` trains them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from results import write_result
from torch import Tensor
from torch.nn import functional

from synthaug import SampleKey
from synthaug.generators.multiview import MultiviewDiffusion
from synthaug.generators.shapes import LUMPY, SMOOTH, ShapeConfig, draw_shapes, silhouettes, view_distance
from synthaug.kernels.silhouettes import lowest_on_rays
from synthaug.types import CellMasks, Views

BLOCK = 8
"""Bodies at a time."""

VOXELS = 48
"""On a side of bodies and hulls."""


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """IoU over the last two axes; 0 where both are empty."""
    return (a & b).sum((-2, -1)) / (a | b).sum((-2, -1)).clamp_min(1)


def consistency(sdf: Tensor, rotation: Tensor) -> Tensor:
    """IoU of each view but the first with the silhouette of the hull of all others, float32 [B, N - 1]."""
    size, axis = sdf.shape[-1], (torch.arange(VOXELS) + 0.5) / VOXELS * 2 - 1
    world = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    where = (world @ rotation[:, 1:].transpose(1, 2)).flip(-1)[:, None]
    rows = []
    for views in sdf:
        distance = functional.grid_sample(views[:, None], where, padding_mode="border", align_corners=False)
        # The hull is where the largest distance to any outline is negative; without view n, the largest of the others.
        (first, second), (leader, _) = distance.flatten(1).topk(2, dim=0)
        hulls = torch.where(leader == torch.arange(len(views))[:, None], second, first) * (VOXELS / size)
        hulls = hulls.reshape(-1, VOXELS, VOXELS, VOXELS)
        seen = [lowest_on_rays(hulls[n : n + 1], rotation[n : n + 1], size)[0, 0] for n in range(1, len(views))]
        rows.append(overlap(views[1:] < 0, torch.stack(seen) < 0))
    return torch.stack(rows)


def reframe(sdf: Tensor, factor: Tensor) -> Tensor:
    """Views [B, N, H, H] in frames of `factor` [B] times their half side."""
    theta = torch.eye(2, 3) * factor[:, None, None]
    where = functional.affine_grid(theta, [len(sdf), 1, *sdf.shape[2:]], align_corners=False)
    return functional.grid_sample(sdf, where, padding_mode="border", align_corners=False)


def summary(values: list[Tensor]) -> dict[str, float]:
    """Mean and lowest tenth."""
    flat = torch.cat(values).flatten()
    return {"mean": round(float(flat.mean()), 4), "lowest_tenth": round(float(flat.quantile(0.1)), 4)}


def compare(stages: dict[str, MultiviewDiffusion], shape: ShapeConfig, num_bodies: int) -> dict[str, Any]:
    """All rows for one kind of body."""
    cameras = stages["with"].cameras
    size = stages["with"].config.view_size
    rows: dict[str, dict[str, list[Tensor]]] = {
        name: {"iou": [], "consistency": []} for name in (*stages, "truth", "unrelated")
    }
    seconds = dict.fromkeys(stages, 0.0)
    for start in range(0, num_bodies, BLOCK):
        keys = [SampleKey(0, ("benchmark", i)) for i in range(start, min(start + BLOCK, num_bodies))]
        bodies = draw_shapes(keys, shape, VOXELS, frame="outline")
        true = view_distance(silhouettes(bodies, cameras, size))
        one = torch.ones(len(keys))
        masks = CellMasks(sdf=true[:, 0].contiguous(), brightness=one, scale=one)
        for name, stage in stages.items():
            begun = time.process_time()
            views: Views = stage(masks, stage.draw(keys))
            seconds[name] += time.process_time() - begun
            expected = reframe(true, views.half_side / (size / 2))
            rows[name]["iou"].append(overlap(views.silhouette, expected < 0)[:, 1:])
            rows[name]["consistency"].append(consistency(views.sdf, cameras.rotation))
        rows["truth"]["consistency"].append(consistency(true, cameras.rotation))
        others = torch.stack([true[:, n].roll(1 + n % (BLOCK - 1), 0) for n in range(len(cameras))], 1)
        rows["unrelated"]["iou"].append(overlap(true < 0, others < 0)[:, 1:])
        rows["unrelated"]["consistency"].append(consistency(others, cameras.rotation))
    out: dict[str, Any] = {
        name: {what: summary(values) for what, values in row.items() if values} for name, row in rows.items()
    }
    for name in stages:
        out[name]["iou_of_each_view"] = [round(v, 3) for v in torch.cat(rows[name]["iou"]).mean(0).tolist()]
        out[name]["core_seconds_a_cell"] = round(seconds[name] / num_bodies, 3)
    return out


def main() -> None:
    """Read both stages, compare them, write results/multiview.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attending", type=Path, metavar="WITH")
    parser.add_argument("plain", type=Path, metavar="WITHOUT")
    parser.add_argument("--bodies", type=int, default=200)
    parser.add_argument("--steps", type=int, default=None, help="training steps of both, for the record")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stages = {
        "with": MultiviewDiffusion.from_pretrained(options.attending),
        "without": MultiviewDiffusion.from_pretrained(options.plain),
    }
    if [s.config.volume_attention for s in stages.values()] != [True, False]:
        parser.error("WITH has to be a stage with volume attention, WITHOUT one without")
    write_result(
        "multiview",
        {
            "bodies": options.bodies,
            "training_steps": options.steps,
            "num_views": stages["with"].config.num_views,
            "num_inference_steps": stages["with"].config.num_inference_steps,
            "parameters": {name: sum(p.numel() for p in s.network.parameters()) for name, s in stages.items()},
            "smooth": compare(stages, SMOOTH, options.bodies),
            "lumpy": compare(stages, LUMPY, options.bodies),
        },
    )


if __name__ == "__main__":
    main()
