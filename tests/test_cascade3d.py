"""The 3D cascade as a whole, on the embedded one: cells, populations, priors, other voxel sizes."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch

from synthaug.cascade import Cascade, CascadeConfig
from synthaug.datasets.synth import SynthDataset
from synthaug.errors import InputError
from synthaug.randomness import SampleKey
from synthaug.types import Cells
from tests.test_cascade import violations

SIZE = (24, 80, 80)


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    return Cascade.from_pretrained("nuclei-3d")


@pytest.fixture(scope="module")
def cells(cascade) -> Cells:
    return cascade.cells([SampleKey(0, ("cell", i)) for i in range(8)])


def frames(num: int) -> list[SampleKey]:
    return [SampleKey(0, ("frame", i)) for i in range(num)]


def test_a_cell_is_a_stack_of_one_part(cascade, cells):
    assert cells.image.shape == (8, cascade.num_slices, cascade.crop_size, cascade.crop_size)
    depth = cells.mask.flatten(2).any(2)
    assert not depth[:, 0].any()
    assert not depth[:, -1].any()
    for row in depth.int():
        assert int(row.diff().abs().sum()) == 2, "the planes of a cell follow each other without a gap"
    volume = cells.mask.flatten(1).sum(1) * cells.scale**2
    low, high = cascade.slicing.config.volume_range
    assert (volume >= low).all()
    assert (volume <= high).all()


def test_a_keys_cell_does_not_depend_on_its_company(cascade, cells):
    again = cascade.cells([SampleKey(0, ("cell", 5)), SampleKey(9, ("other", 1))])
    assert torch.equal(again.image[0], cells.image[5])
    assert torch.equal(again.sdf[0], cells.sdf[5])


def test_populations_keep_the_contracts(cascade, cells):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 8 cells are few for what the density asks
        population = cascade.populate(cells, frames(4), SIZE, num_cells=6)
    assert population.image.shape == population.labels.shape == (4, 1, *SIZE)
    assert population.voxel_size_um == cascade.voxel_size_um
    assert violations(population, cascade.config.min_area) == []
    assert population.labels.amax() >= 2


def test_a_real_background_brings_no_voxel_of_its_own_labels(cascade, cells):
    model = cascade.populate(cells, frames(1), SIZE, num_cells=3)
    real = cascade.populate(cells, frames(1), SIZE, num_cells=3, background="real")
    assert torch.equal(model.labels, real.labels)
    assert not torch.equal(model.image, real.image)


def test_sizes_have_as_many_axes_as_the_cascade(cascade):
    with pytest.raises(InputError, match="3D cascade"):
        cascade.num_cells(frames(1), (64, 64))
    with pytest.raises(InputError, match="2D cascade"):
        Cascade.from_pretrained("nuclei-2d").num_cells(frames(1), SIZE)


def test_another_prior_gives_other_shapes_of_the_same_size(cascade, cells):
    rival = cascade.with_prior("ellipsoid")
    assert set(rival.stages()) == {"masks", "prior", "slicing", "texture", "population", "background"}
    assert rival.fingerprint() != cascade.fingerprint()
    other = rival.cells([SampleKey(0, ("cell", i)) for i in range(8)])
    assert not torch.equal(other.sdf, cells.sdf)
    equator, mine = (c.mask.flatten(2).sum(2).amax(1).float().mean() for c in (other, cells))
    assert 0.7 < equator / mine < 1.4


def test_surfaces_of_a_prior_keep_their_own_ends(cascade):
    blunt = copy.deepcopy(cascade)
    blunt.slicing.config = replace(blunt.slicing.config, bulge=1.2)
    assert blunt.fingerprint() != cascade.fingerprint()
    rival = blunt.with_prior("ellipsoid", num_masks=32)
    assert rival.slicing.config == cascade.slicing.config


def test_other_voxels_show_the_same_cells_at_another_scale(cascade, cells):
    own = cascade.voxel_size_um
    coarse = cascade.at_voxel_size((own[0] * 1.5, own[1] * 1.25, own[2] * 1.25))
    other = coarse.cells([SampleKey(0, ("cell", i)) for i in range(8)])
    volume, wanted = (c.mask.flatten(1).sum(1) * c.scale**2 for c in (other, cells))
    ratio = (volume * 1.5 * 1.25**2 / wanted).median()
    assert 0.85 < ratio < 1.15
    assert coarse.fingerprint() != cascade.fingerprint()
    assert torch.equal(cascade.cells([SampleKey(0, ("cell", 0))]).sdf[0], cells.sdf[0]), "the original stays as it was"
    a, b = (c.num_cells(frames(24), SIZE, density=None) for c in (cascade, coarse))
    assert sum(b) >= sum(a), "a canvas of larger voxels shows more of the embryo"


def test_voxel_sizes_out_of_reach_are_refused(cascade):
    z, y, x = cascade.voxel_size_um
    for wrong in ((z, y, x * 1.3), (z * 3, y, x), (y, x)):
        with pytest.raises(InputError, match="voxel_size_um"):
            cascade.at_voxel_size(wrong)
    with pytest.raises(InputError, match="voxel size is known"):
        Cascade.from_pretrained("nuclei-2d").at_voxel_size((1, 1, 1))
    with pytest.raises(InputError, match="voxel_size_um"):
        CascadeConfig(voxel_size_um=(1.0, 0.0, 1.0))


def test_a_3d_cascade_goes_to_disk_and_back(cascade, cells, tmp_path):
    cascade.save_pretrained(tmp_path / "copy")
    again = Cascade.from_pretrained(tmp_path / "copy")
    assert again.fingerprint() == cascade.fingerprint()
    assert torch.equal(again.cells([SampleKey(0, ("cell", 3))]).image[0], cells.image[3])


def test_slicing_without_shapes_is_refused(cascade):
    stages = {k: v for k, v in cascade.stages().items() if k not in ("multiview", "surface")}
    with pytest.raises(InputError, match="beside slicing"):
        Cascade(cascade.config, **stages)


def test_the_stream_does_not_depend_on_workers(cascade):
    def batches(num_workers: int) -> list[torch.Tensor]:
        stream = SynthDataset(cascade, size=(16, 48, 48), batch_size=2, num_cells=2, num_lanes=2, num_batches=2)
        return [batch["image"] for batch in stream.loader(num_workers=num_workers)]

    for one, two in zip(batches(0), batches(2), strict=True):
        assert torch.equal(one, two)
