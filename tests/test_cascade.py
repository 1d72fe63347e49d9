"""The cascade as a whole, on the embedded one: keys, labels, contracts of a population, folders."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from synthaug.cascade import Cascade, CascadeConfig
from synthaug.datasets.synth import SynthDataset
from synthaug.errors import CheckpointError, InputError
from synthaug.hub import embedded_cascades, find_cascade
from synthaug.randomness import SampleKey
from synthaug.types import Cells, Population

NAMES = [n for n in embedded_cascades() if n != "nuclei-2d"]
assert {"nuclei-2d-u2os", "nuclei-2d-large", "nuclei-3d"} <= set(NAMES)


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    return Cascade.from_pretrained("nuclei-2d")


@pytest.fixture(scope="module")
def cells(cascade) -> Cells:
    return cascade.cells([SampleKey(0, ("cell", i)) for i in range(48)])


def keys(num: int, seed: int = 0) -> list[SampleKey]:
    return [SampleKey(seed, ("frame", i)) for i in range(num)]


def violations(population: Population, min_area: int) -> list[str]:
    """What is wrong with the labels and images of a population."""
    found = []
    if not bool(torch.isfinite(population.image).all()):
        found.append("not finite")
    for i, labels in enumerate(population.labels[:, 0].numpy()):
        counts = np.bincount(labels.ravel())[1:]
        if (counts == 0).any():
            found.append(f"frame {i}: labels not contiguous")
        if len(counts) and counts.min() < min_area:
            found.append(f"frame {i}: instance of {counts.min()} px")
        for index, box in enumerate(ndimage.find_objects(labels), start=1):
            if box is not None and ndimage.label(labels[box] == index)[1] != 1:
                found.append(f"frame {i}: instance {index} in several parts")
    return found


def test_the_check_for_violations_fires():
    labels = torch.zeros(1, 1, 16, 16, dtype=torch.int32)
    labels[0, 0, 2:8, 2:8] = 1
    labels[0, 0, 10, 10] = 3
    labels[0, 0, 14, 14] = 1
    count = torch.ones(1, dtype=torch.int64)
    bad = Population(torch.zeros(1, 1, 16, 16), labels, count, count)
    text = " ".join(violations(bad, 20))
    assert "not contiguous" in text
    assert "several parts" in text
    assert "instance of" in text


def test_two_thousand_populations_without_a_violation(cascade, cells):
    lowest, aligned, total = cascade.config.min_area, 0, 0
    for start in range(0, 2000, 100):
        population = cascade.populate(cells, keys(100, seed=start), (96, 96))
        assert violations(population, lowest) == []
        assert (population.num_placed <= population.num_requested).all()
        assert torch.equal(population.num_placed, population.labels.flatten(1).max(1).values.long())
        for image, labels in zip(population.image[:, 0], population.labels[:, 0]):
            inside = labels > 0
            if 0.05 < inside.float().mean() < 0.8:
                total += 1
                here = image[inside].mean() - image[~inside].mean()
                away = inside.roll((7, 7), (0, 1))
                aligned += bool(here > image[away].mean() - image[~away].mean())
    assert total > 1000
    assert aligned == total


@pytest.mark.usefixtures("untouched_random_state")
def test_loading_and_generating_leave_the_global_random_state_alone():
    Cascade.from_pretrained("nuclei-2d").generate(keys(1), (64, 64), num_cells=2)


def test_a_keys_cell_does_not_depend_on_its_company(cascade, cells):
    some = [5, 17, 2]
    again = cascade.cells([SampleKey(0, ("cell", i)) for i in some])
    assert torch.equal(again.image, cells.image[some])
    assert torch.equal(again.sdf, cells.sdf[some])
    assert torch.equal(again.brightness, cells.brightness[some])


def test_a_frame_does_not_depend_on_the_others(cascade, cells):
    picks = [torch.arange(6), torch.arange(6, 12), torch.arange(12, 18)]
    together = cascade.populate(cells, keys(3), (96, 96), picks=picks)
    alone = cascade.populate(cells, keys(3)[1:2], (96, 96), picks=picks[1:2])
    assert torch.equal(together.image[1], alone.image[0])
    assert torch.equal(together.labels[1], alone.labels[0])


def test_cells_keep_their_contract(cells, cascade):
    assert cells.image.shape == (48, 1, cascade.crop_size, cascade.crop_size)
    for image, mask, sdf in zip(cells.image, cells.mask, cells.sdf):
        assert float(image[mask].mean()) == pytest.approx(1.0, abs=1e-3)
        assert float(image[sdf > 10.5].abs().sum()) == 0.0
        assert ndimage.label(mask[0].numpy())[1] == 1


def test_texture_and_label_agree(cells):
    """Thresholded halfway between background and cell, a generated cell gives its mask back."""
    overlap = []
    for image, mask in zip(cells.image[:, 0], cells.mask[:, 0]):
        bright = image > 0.5
        overlap.append(float((bright & mask).sum() / (bright | mask).sum()))
    assert np.mean(overlap) > 0.8


def test_few_masks_are_rejected(cascade, cells):
    bad = sum(n for why, n in cascade.rejects.items() if why != "drawn")
    assert bad / cascade.rejects["drawn"] < 0.08


def test_density_and_numbers_are_obeyed(cascade, cells):
    assert cascade.num_cells(keys(3), (128, 128), num_cells=7) == [7, 7, 7]
    spread = cascade.num_cells(keys(40), (128, 128), num_cells=(2, 5))
    assert set(spread) == {2, 3, 4, 5}
    few = cascade.populate(cells, keys(8), (128, 128), density=1e-4)
    many = cascade.populate(cells, keys(8), (128, 128), density=1e-3)
    assert few.num_placed.float().mean() * 3 < many.num_placed.float().mean()
    none = cascade.populate(cells, keys(1), (64, 64), num_cells=0)
    assert int(none.labels.max()) == 0


def test_a_density_out_of_reach_is_said_with_the_one_reached(cascade, cells):
    with pytest.warns(UserWarning, match=r"of 400 cells found a free place: .* instead of 244\.1"):
        crowded = cascade.populate(cells, keys(1), (128, 128), num_cells=400)
    assert 5 < int(crowded.num_placed) < 100
    assert violations(crowded, cascade.config.min_area) == []


def test_a_density_of_the_data_that_does_not_fit_is_counted_and_not_warned_of(cascade, cells, recwarn):
    crowded = copy.deepcopy(cascade)
    crowded.background.table[:, crowded.background.names.index("density")] = 400 / 128**2
    made = crowded.populate(cells, keys(1), (128, 128))
    assert int(made.num_placed) < int(made.num_requested) / 2
    assert not any("found a free place" in str(w.message) for w in recwarn)
    with pytest.warns(UserWarning, match="found a free place"):
        crowded.generate(keys(1), (24, 24), num_cells=16)


def test_a_single_missing_cell_of_a_few_is_no_reason_to_warn(cascade, cells, recwarn):
    missing = []
    for seed in range(12):
        recwarn.clear()
        missing.append(3 - int(cascade.populate(cells, keys(1, seed), (20, 20), num_cells=3).num_placed))
        assert any("found a free place" in str(w.message) for w in recwarn) == (missing[-1] > 1)
    assert {1, 2} <= set(missing)


def test_a_real_background_can_be_asked_for(cascade, cells):
    model = cascade.populate(cells, keys(2), (96, 96))
    real = cascade.populate(cells, keys(2), (96, 96), background="real")
    assert torch.equal(model.labels, real.labels)
    assert not torch.equal(model.image, real.image)


def test_pasting_adds_cells_and_leaves_the_others(cascade, cells):
    base = cascade.populate(cells, keys(1), (128, 128), num_cells=4)
    image, labels = base.image[0], base.labels[0]
    pasted, both = cascade.paste(cells, image, labels, SampleKey(5), num_cells=3)
    old = labels > 0
    assert torch.equal(both[old], labels[old])
    added = (both > 0) & ~old
    assert int(both.max()) > int(labels.max())
    assert float(pasted[added].mean()) > float(image[added].mean())
    counts = torch.bincount(both.flatten().long())[1:]
    assert (counts >= cascade.config.min_area).all()


@pytest.mark.gpu
def test_frames_without_cells_beside_networks_on_a_gpu():
    """What an empty frame is made of had been left where the networks are."""
    cascade = Cascade.from_pretrained("nuclei-2d").networks_to("cuda")
    stream = SynthDataset(cascade, size=(64, 64), batch_size=2, num_cells=0, num_batches=1, num_lanes=1)
    (batch,) = stream.loader(num_workers=0)
    assert int(batch["label"].max()) == 0
    assert float(batch["image"].std()) > 0


@pytest.fixture(scope="module")
def lending(cascade) -> Cascade:
    """Half of its cells come from a second, equal pair of stages and are 1 to 0.5 times as large."""
    config = replace(cascade.config, lent_share=0.5, lent_zoom=0.5)
    return Cascade(config, **cascade.stages(), lent_masks=cascade.masks, lent_texture=cascade.texture)


def test_lent_cells_come_in_whole_blocks_and_sizes_beside_the_own_ones(lending, cells):
    names = [SampleKey(0, ("cell", i)) for i in range(32)]
    plain = cells.select(slice(0, 32))
    made = lending.cells(names)
    own = (made.scale == plain.scale) & (made.image == plain.image).flatten(1).all(1)
    by_block = own.view(-1, lending.block_size)
    assert torch.equal(by_block.all(1), by_block.any(1)), "no block is made twice, half filled"
    assert 0 < int(by_block[:, 0].sum()) < len(by_block)
    factor = (made.scale / plain.scale)[~own]
    assert ((factor > 0.5) & (factor < 1)).all()
    assert 0.25 < float(-factor.log2().mean()) < 0.75, "even odds for every factor"
    some = [30, 3, 17, 9]
    again = lending.cells([names[i] for i in some])
    assert torch.equal(again.image, made.image[some]), "a key's cell does not depend on its company"
    assert torch.equal(again.scale, made.scale[some])
    population = lending.populate(made, keys(8), (96, 96))
    assert violations(population, lending.config.min_area) == []


def test_blocks_are_lent_in_their_share(lending):
    many = [SampleKey(1, ("cell", lane, i)) for lane in range(100) for i in range(16)]
    lent = {i for origin in lending._origins(many) if origin.zoom for i in origin.which}
    assert 0.4 < len(lent) / len(many) < 0.6


def test_lent_stages_are_saved_and_count_in_the_fingerprint(lending, cascade, tmp_path):
    lending.save_pretrained(tmp_path / "mine")
    again = Cascade.from_pretrained(tmp_path / "mine")
    assert again.config == lending.config
    assert again.fingerprint() == lending.fingerprint() != cascade.fingerprint()
    half = replace(lending.config, lent_share=0.25)
    assert Cascade(half, **lending.stages()).fingerprint() != lending.fingerprint()


@pytest.mark.parametrize(
    ("share", "stages"),
    [(0.5, {}), (0.0, {"lent_masks", "lent_texture"}), (0.5, {"lent_masks"}), (0.0, {"lent_texture"})],
)
def test_lent_stages_without_share_and_the_reverse_are_refused(lending, cascade, share, stages):
    lent = {name: lending.stages()[name] for name in stages}
    with pytest.raises(InputError, match="lent_masks, lent_texture and a lent_share"):
        Cascade(replace(cascade.config, lent_share=share), **cascade.stages(), **lent)


def test_generate_uses_every_cell_once_and_resumes_by_key(cascade):
    one = cascade.generate(keys(2), (64, 64), num_cells=3)
    two = cascade.generate(keys(2)[1:], (64, 64), num_cells=3)
    assert torch.equal(one.image[1], two.image[0])


@pytest.mark.parametrize("name", NAMES)
def test_embedded_cascades_are_small_documented_and_stable(name, tmp_path):
    folder = find_cascade(name)
    assert sum(f.stat().st_size for f in folder.rglob("*.safetensors")) <= 12e6
    card = (folder / "README.md").read_text()
    for word in ("synthaug fit", "steps", "Ljosa", "## Measured"):
        assert word in card
    assert "CC0" in card or ("CC BY" in card and "attribution" in card)
    cascade = Cascade.from_pretrained(name)
    cascade.save_pretrained(tmp_path / "copy", half=True)
    assert Cascade.from_pretrained(tmp_path / "copy").fingerprint() == cascade.fingerprint()


def test_the_stream_of_the_embedded_cascade_is_the_same_for_two_workers(cascade):
    def batches(num_workers: int) -> list[torch.Tensor]:
        stream = SynthDataset(cascade, size=(64, 64), batch_size=4, num_cells=3, num_lanes=2, num_batches=6)
        return [batch["image"] for batch in stream.loader(num_workers=num_workers)]

    for a, b in zip(batches(0), batches(2), strict=True):
        assert torch.equal(a, b)


def test_a_cascade_is_replaced_by_a_whole_one_or_kept(cascade, tmp_path, monkeypatch):
    cascade.save_pretrained(tmp_path / "mine", card="first")
    cascade.save_pretrained(tmp_path / "mine", card="second")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    rename = Path.rename

    def fail(self, target):
        if self.name == ".mine.tmp":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        cascade.save_pretrained(tmp_path / "mine", card="third")
    assert (tmp_path / "mine" / "README.md").read_text() == "second"
    assert Cascade.from_pretrained(tmp_path / "mine").fingerprint() == cascade.fingerprint()


def test_wrong_folders_and_sizes_are_refused(cascade, cells, tmp_path):
    with pytest.raises(CheckpointError, match="nuclei-2d"):
        Cascade.from_pretrained("nuclei-7d")
    (tmp_path / "half").mkdir()
    with pytest.raises(CheckpointError, match="--resume"):
        Cascade.from_pretrained(tmp_path / "half")
    (tmp_path / "half" / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match="other files"):
        cascade.save_pretrained(tmp_path / "half")
    cascade.save_pretrained(tmp_path / "whole")
    index = tmp_path / "whole" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "Pipeline"}))
    with pytest.raises(CheckpointError, match="synthaug cascade"):
        Cascade.from_pretrained(tmp_path / "whole")
    with pytest.raises(InputError, match="size"):
        cascade.populate(cells, keys(1), (4, 4))
    with pytest.raises(InputError, match="multiple of 8"):
        CascadeConfig(block_size=3)
    with pytest.raises(InputError, match="SampleKey"):
        cascade.cells([])
