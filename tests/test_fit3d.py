"""`fit` from annotated volumes to a 3D cascade, in miniature; what it learns from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import synthaug.training.fit as module
from synthaug.cascade import Cascade
from synthaug.datasets.volumes import annotated_planes, thin_annotations
from synthaug.errors import InputError
from synthaug.generators.multiview import MultiviewConfig, MultiviewDiffusion
from synthaug.randomness import SampleKey
from synthaug.training.fit import choose_start, fit
from synthaug.training.loop import LoopResult
from synthaug.training.material import Volumes
from synthaug.types import UNLABELLED
from tests.shapes import ellipsoid_volume
from tests.test_fit import small_networks  # noqa: F401  # a fixture

VOXEL = (1.0, 0.5, 0.5)
PAIRS = [ellipsoid_volume(seed) for seed in range(4)]


@pytest.fixture(autouse=True)
def few_calibration_cells(monkeypatch):
    """A fresh cell of a volume takes most of a second."""
    monkeypatch.setattr("synthaug.training.material.CALIBRATION_CELLS", 12)


def test_dense_labels_are_used_plane_by_plane():
    material = Volumes(PAIRS, None, VOXEL, 4)
    for (_, thin), (_, dense) in zip(material.pairs, PAIRS):
        planes = annotated_planes(thin)
        assert planes == list(range(2, len(dense), 4))
        assert all((thin[z] == UNLABELLED).all() for z in range(len(dense)) if z not in planes)
        assert all(((thin[z] > 0) == (dense[z] > 0)).all() for z in planes)
    assert material.axial.z_spacing == 2
    # Ellipsoids of 11 planes by 15 pixels, two pixels a plane
    assert 1.0 < material.axial.stretch < 2.0
    low, high = material.slicing().config.volume_range
    true = np.concatenate([np.bincount(labels.ravel())[1:] for _, labels in PAIRS])
    assert low < np.median(true) < high


def test_single_annotated_planes_suffice_and_stay_as_they_are():
    sparse = [(image, thin_annotations(labels, 8)) for image, labels in PAIRS]
    material = Volumes(sparse, None, VOXEL, 3)
    for (_, kept), (_, given) in zip(material.pairs, sparse):
        assert (kept == given).all()


def test_a_fit_from_scratch_trains_its_own_views(small_networks, tmp_path, monkeypatch):  # noqa: F811
    asked = []

    def views(budget_s, seed, checkpoint, log):
        asked.append(budget_s)
        return MultiviewDiffusion(MultiviewConfig()).eval(), LoopResult()

    monkeypatch.setattr(module, "fit_multiview", views)
    cascade = fit(
        PAIRS, tmp_path / "mine", start="scratch", budget_minutes=0.3, voxel_size_um=VOXEL, log=lambda line: None
    )
    assert len(asked) == 1
    assert asked[0] > 0
    assert cascade.ndim == 3
    assert cascade.voxel_size_um == VOXEL
    assert cascade.slicing.config.z_spacing == 2
    assert cascade.slicing.config.bulge > 1
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "--voxel-size 1x0.5x0.5" in card
    assert "annotated planes" in card
    assert "rho" in card


def test_adapting_keeps_the_views_and_streams(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fit_multiview", lambda *a: pytest.fail("views were trained again"))
    assert choose_start(PAIRS) == "nuclei-3d"
    cascade = fit(
        PAIRS, tmp_path / "mine", start="nuclei-3d", budget_minutes=0.3, voxel_size_um=VOXEL, log=lambda line: None
    )
    source = Cascade.from_pretrained("nuclei-3d")
    for one, two in zip(cascade.multiview.parameters(), source.multiview.parameters(), strict=True):
        assert torch.equal(one, two)
    population = cascade.generate([SampleKey(0, ("frame", 0))], (16, 48, 48), num_cells=4)
    assert population.image.shape == (1, 1, 16, 48, 48)
    assert torch.isfinite(population.image).all()


def test_a_cascade_of_frames_is_adapted_to_volumes_with_the_views_of_another(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fit_multiview", lambda *a: pytest.fail("views were trained again"))
    cascade = fit(
        PAIRS, tmp_path / "mine", start="nuclei-2d", budget_minutes=0.1, voxel_size_um=VOXEL, log=lambda line: None
    )
    assert cascade.ndim == 3
    assert cascade.crop_size == Cascade.from_pretrained("nuclei-2d").crop_size
    lender = Cascade.from_pretrained("nuclei-3d")
    for one, two in zip(cascade.multiview.parameters(), lender.multiview.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_cascade_of_volumes_is_refused_for_frames(tmp_path):
    frames = [(image[5], np.where(labels[5] > 0, 1, 0).astype(np.int32)) for image, labels in PAIRS]
    with pytest.raises(InputError, match="2D cascade"):
        fit(frames, tmp_path / "mine", start="nuclei-3d", budget_minutes=0.1, log=lambda line: None)


def test_brightness_is_set_by_what_labelled_voxels_show():
    cascade = Cascade.from_pretrained("nuclei-3d")
    material = Volumes(PAIRS, None, VOXEL, 4)
    cascade.background = material.fit_background()
    column = cascade.background.names.index("brightness")
    cascade.background.table[:, column] *= torch.tensor([1.0, 3.0, 1.0, 1.0])  # one volume measured wrongly
    notes = material.calibrate(cascade, 0, budget_minutes=0.1)
    assert ["half of the light" in notes[0], "brightness" in notes[1], len(notes)] == [True, True, 2]
    brightness = cascade.background.table[:, column]
    assert float(brightness.max() / brightness.min()) < 1.5, "volumes made alike are as bright again"
