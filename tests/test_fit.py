"""`fit` from images to a cascade that streams, in miniature; interruption, resumption, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import synthaug.training.fit as module
from synthaug.cascade import Cascade
from synthaug.datasets.crops import extract_crops
from synthaug.errors import CheckpointError, InputError
from synthaug.randomness import SampleKey
from synthaug.training import recipes
from synthaug.training.fit import fit
from synthaug.training.material import matching_scale
from tests.shapes import ellipse_frame

PAIRS = [ellipse_frame(seed) for seed in range(4)]
BUDGET = 0.06


@pytest.fixture(scope="module")
def small_networks():
    """Networks of a few thousand parameters, so that seconds suffice."""
    with pytest.MonkeyPatch.context() as patch:
        masks, tiny = recipes.MaskConfig, recipes.tiny_config
        patch.setattr(
            recipes,
            "MaskConfig",
            lambda crop_size: masks(crop_size, block_out_channels=(32, 32), num_inference_steps=8),
        )
        patch.setattr(
            recipes,
            "tiny_config",
            lambda size, **k: tiny(size, vae_channels=(8, 16), block_out_channels=(8, 16), num_inference_steps=2, **k),
        )
        yield


@pytest.fixture(scope="module")
def fitted(small_networks, tmp_path_factory):
    out = tmp_path_factory.mktemp("fit") / "mine"
    lines: list[str] = []
    cascade = fit(PAIRS, out, start="scratch", budget_minutes=BUDGET, log=lines.append, data_card="Ellipses, CC0.")
    return cascade, out, lines


def test_a_cascade_comes_out(fitted):
    cascade, out, lines = fitted
    assert {"masks", "texture", "background", "population", "model_index.json", "README.md"} <= {
        p.name for p in out.iterdir()
    }
    assert not out.with_name("mine.fit").exists()
    assert any(line.startswith("texture: step") for line in lines)
    card = (out / "README.md").read_text()
    assert "Ellipses, CC0." in card
    assert "| texture |" in card
    assert cascade.config.intensity == "uint16"
    assert sum(f.stat().st_size for f in out.rglob("*.safetensors")) < 12e6


def test_an_embedded_cascade_adapted_in_seconds_generates_populations(tmp_path):
    cascade = fit(PAIRS, tmp_path / "mine", budget_minutes=0.2, log=lambda line: None)
    source = Cascade.from_pretrained("nuclei-2d")
    assert 0 < cascade.config.lent_share < 1
    assert 0 < cascade.background.config.cytoplasm_rate < 1
    assert cascade.texture.config.mottle_rate == 0 < cascade.lent_texture.config.mottle_rate
    assert 0 < cascade.population.config.fragment_rate < 1
    for name in ("masks", "texture"):
        lent, known = cascade.stages()[f"lent_{name}"], source.stages()[name]
        for key, value in known.state_dict().items():
            assert torch.equal(lent.state_dict()[key], value), "as the cascade adapted has it, not as adapted"
    population = cascade.generate([SampleKey(0, ("frame", i)) for i in range(2)], (96, 96))
    assert torch.isfinite(population.image).all()
    for labels in population.labels:
        ids = torch.unique(labels)
        assert ids.tolist() == list(range(len(ids)))
        assert len(ids) > 1
        assert all((labels == i).sum() >= cascade.config.min_area for i in ids[1:])


def test_adapting_ends_and_keeps_the_crop_size(fitted, tmp_path):
    cascade, out, _ = fitted
    other = fit(PAIRS[:2], tmp_path / "adapted", start=str(out), budget_minutes=0.05, log=lambda line: None)
    assert other.crop_size == cascade.crop_size
    assert other.fingerprint() != cascade.fingerprint()


def test_a_kill_between_stages_loses_nothing(fitted, tmp_path, monkeypatch):
    _, start, _ = fitted
    out = tmp_path / "killed"

    def killed(*arguments, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipes, "fit_texture", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(PAIRS[:2], out, start=str(start), budget_minutes=0.05, log=lambda line: None)
    work = out.with_name("killed.fit")
    assert (work / "vae" / "config.json").is_file()
    assert not out.exists()
    with pytest.raises(CheckpointError, match="--resume"):
        fit(PAIRS[:2], out, start=str(start), budget_minutes=0.05, log=lambda line: None)
    with pytest.raises(CheckpointError, match="budget_minutes"):
        fit(PAIRS[:2], out, start=str(start), budget_minutes=0.2, resume=True, log=lambda line: None)
    with monkeypatch.context() as patch:
        patch.setattr(recipes, "fit_masks", killed)  # a finished stage must not be trained again
        patch.setattr(recipes, "fit_vae", killed)
        fit(PAIRS[:2], out, start=str(start), budget_minutes=0.05, resume=True, log=lambda line: None)
    assert Cascade.from_pretrained(out).config.name == "killed"


def test_refusals(fitted, tmp_path):
    _, out, _ = fitted
    with pytest.raises(CheckpointError, match="finished cascade"):
        fit(PAIRS, out, start="scratch")
    with pytest.raises(InputError, match="minutes > 0"):
        fit(PAIRS, tmp_path / "x", budget_minutes=0)
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="other files"):
        fit(PAIRS, tmp_path / "busy", start="scratch")
    with pytest.raises(CheckpointError, match="no such folder"):
        fit(PAIRS, tmp_path / "y", start="nuclei-9d")


def test_a_finished_fit_resumed_changes_nothing(fitted):
    cascade, out, _ = fitted
    before = json.loads((out / "model_index.json").read_text())
    again = fit(PAIRS, out, start="scratch", budget_minutes=BUDGET, resume=True, log=lambda line: None)
    assert again.fingerprint() == cascade.fingerprint()
    assert json.loads((out / "model_index.json").read_text()) == before


def test_intensity_type_is_recognised():
    image, _ = PAIRS[0]
    assert module._intensity([image]) == "uint16"
    assert module._intensity([image / 4]) == "float32"
    assert module._intensity([(image // 8)]) == "uint8"


def test_small_cells_are_learned_at_the_size_of_those_known(tmp_path):
    small = [(image[::3, ::3].copy(), np.ascontiguousarray(labels[::3, ::3])) for image, labels in PAIRS]
    crops = extract_crops(small, crop_size=64)
    source = Cascade.from_pretrained("nuclei-2d")
    scale = matching_scale(crops, source)
    assert matching_scale(crops, None) == 1
    assert 0.25 <= scale < 0.5
    larger = extract_crops(small, crop_size=64, least_scale=scale)
    inside = [float((c.sdf < 0).flatten(1).sum(1).float().mul(c.scale**2).mean()) for c in (crops, larger)]
    assert inside[1] == pytest.approx(inside[0], rel=0.1), "the same area in image pixels"
    assert float((larger.sdf < 0).float().mean()) > 4 * float((crops.sdf < 0).float().mean())
    assert larger.image[larger.sdf < 0].mean() == pytest.approx(1, abs=0.1)
    cascade = fit(small, tmp_path / "mine", start="nuclei-2d", budget_minutes=0.1, log=lambda line: None)
    assert cascade.least_scale == pytest.approx(scale)
    made = cascade.generate([SampleKey(0, ("frame", i)) for i in range(6)], (96, 96), num_cells=6)
    areas = torch.cat([torch.bincount(labels.flatten())[1:] for labels in made.labels]).float()
    real = torch.cat([torch.bincount(torch.from_numpy(labels).flatten())[1:] for _, labels in small]).float()
    assert 0.6 < float(areas.median() / real[real > 0].median()) < 1.6
