"""The page is valid, self-contained and opens in a browser; the contact sheet shows the frames it was given."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from numpy.typing import NDArray

from synthaug.datasets.pictures import orthogonal_views
from synthaug.errors import InputError
from synthaug.evaluation.realism import Pair, realism_report
from synthaug.evaluation.sheet import (
    HISTOGRAMS,
    VOLUME_HISTOGRAMS,
    display_range,
    grey,
    histogram_svg,
    label_colours,
    outlines,
    panel,
    write_contact_sheet,
    write_sheet,
)
from synthaug.randomness import SampleKey
from synthaug.types import UNLABELLED
from tests.test_copies import volumes

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
VOID = {"meta", "link", "img", "input", "br"}


@cache
def pairs(name: str, num: int = 5, size: int = 128) -> list[Pair]:
    """Discs on noise."""
    out = []
    for i in range(num):
        rng = SampleKey(0, ("sheet", name, i)).numpy()
        rows, columns = np.mgrid[:size, :size]
        labels = np.zeros((size, size), np.int32)
        for y, x, radius in rng.uniform((0, 0, 6), (size, size, 11), (14, 3)):
            inside = np.hypot(rows - y, columns - x) < radius
            if not labels[inside].any():
                labels[inside] = labels.max() + 1
        image = 100 + 300 * (labels > 0) * rng.uniform(0.8, 1.2) + rng.normal(0, 10, labels.shape)
        out.append((image.astype(np.float32), labels))
    return out


class Page(HTMLParser):
    """Collects the elements of a page and insists that they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@cache
def sheet_text(folder: Path) -> str:
    real, synthetic = pairs("real"), pairs("synthetic", 4)
    report = realism_report(real, pairs("val"), synthetic, num_repeats=2)
    write_sheet(
        folder / "new" / "sheet.html",
        real,
        synthetic,
        title="cells <a> & b",
        report=report,
        extra={"cascade": "<discs>", "steps": 12},
    )
    return (folder / "new" / "sheet.html").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sheet")


def decode(source: str | None) -> NDArray[np.uint8]:
    assert source is not None
    head, data = source.split(",", 1)
    assert head == "data:image/png;base64"
    return np.asarray(iio.imread(io.BytesIO(base64.b64decode(data)), extension=".png"))


def test_page_nests_and_has_what_it_must(folder: Path) -> None:
    text = sheet_text(folder)
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    page = Page(text)
    names = [name for name, _ in page.elements]
    assert names.count("title") == names.count("h1") == 1
    assert {"charset": "utf-8"} in page.all("meta")
    assert any(m.get("name") == "viewport" for m in page.all("meta"))
    identities = [a["id"] for _, a in page.elements if "id" in a]
    assert len(identities) == len(set(identities))
    assert {label["for"] for label in page.all("label")} == {radio["id"] for radio in page.all("input")}
    assert sum("checked" in radio for radio in page.all("input")) == 1
    assert names.count("svg") == len(HISTOGRAMS) == 5
    said = " ".join(page.text)
    assert "cells <a> & b" in said  # escaped in the source, so read as text
    assert "<discs>" in said
    assert "Fréchet texture distance" in said
    assert "near-copies of training cells" in said


def test_page_needs_nothing_from_outside(folder: Path) -> None:
    text = sheet_text(folder)
    page = Page(text)
    assert not page.all("script")
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "default-src 'none'" in text
    styles = "".join(re.findall(r"<style>(.*?)</style>", text, re.S))
    assert "url(" not in styles
    assert "@import" not in styles
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text).replace("http-equiv", "")


def test_page_shows_the_frames_it_was_given(folder: Path) -> None:
    page = Page(sheet_text(folder))
    pictures = page.all("img")
    assert len(pictures) == 3 * (5 + 4)
    assert all(picture["alt"] for picture in pictures)
    limits = display_range(pairs("real"))
    by_text = {picture["alt"]: decode(picture["src"]) for picture in pictures}
    for kind, shown in (("real", pairs("real")), ("synthetic", pairs("synthetic", 4))):
        for number, (image, labels) in enumerate(shown, start=1):
            assert np.array_equal(by_text[f"{kind} frame {number}"], grey(image, limits))
            opaque = by_text[f"{kind} frame {number}, labels"][..., 3] > 0
            assert np.array_equal(opaque, labels > 0)


def test_page_without_report_and_with_few_cells(tmp_path: Path) -> None:
    image = np.full((64, 64), 7, np.float32)
    empty = [(image, np.zeros((64, 64), np.int32))]
    write_sheet(tmp_path / "a.html", empty, pairs("real"), title="t", extra="one\n<two>")
    said = " ".join(Page((tmp_path / "a.html").read_text()).text)
    assert "Too few whole cells" in said
    assert "one\n<two>" in said
    assert "Numbers" not in said


def test_page_is_limited_to_num_frames(tmp_path: Path) -> None:
    write_sheet(tmp_path / "a.html", pairs("real"), pairs("synthetic", 4), title="t", num=2)
    assert len(Page((tmp_path / "a.html").read_text()).all("img")) == 3 * 4


def test_files_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "sheet.html", tmp_path / "sheet.png"):
        path.write_text("old")

    def fail(self: Path, data: bytes) -> int:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        write_sheet(tmp_path / "sheet.html", pairs("real"), pairs("real"), title="t")
    with pytest.raises(OSError, match="disk full"):
        write_contact_sheet(tmp_path / "sheet.png", pairs("real"), pairs("real"))
    assert [p.read_text() for p in sorted(tmp_path.iterdir())] == ["old", "old"]


def test_histogram_counts_and_axis() -> None:
    values = np.repeat([1.0, 2.0, 3.0], [10, 20, 30])
    svg = histogram_svg("area", "px", values, values + 10)
    assert "n 60 | 60" in svg
    assert "median 2.5 | 12.5" in svg
    heights = [float(y) for y in re.findall(r"V([\d.]+)H", svg)]
    assert min(heights) == 12.0  # the fullest bin reaches the top
    assert max(heights) == 128.0
    assert "Too few" in histogram_svg("area", "px", values, np.zeros(0))
    assert "NaN" not in histogram_svg("area", "px", np.ones(3), np.ones(3))


def test_same_contrast_for_both_kinds() -> None:
    black, white = display_range(pairs("real"))
    assert 50 < black < 100 < 300 < white < 600
    ramp = np.linspace(black - 50, white + 50, 200, dtype=np.float32).reshape(10, 20)
    shown = grey(ramp, (black, white))
    assert shown.dtype == np.uint8
    assert (shown.min(), shown.max()) == (0, 255)
    assert (np.diff(shown.ravel().astype(int)) >= 0).all()
    flat = np.zeros((64, 64), np.float32)
    assert display_range([(flat, flat.astype(np.int32))]) == (0.0, 1.0)


def test_colours_tell_neighbouring_ids_apart() -> None:
    colours = label_colours(np.arange(300, dtype=np.int32)[None])[0].astype(int)
    assert colours[0].tolist() == [0, 0, 0, 0]
    assert (colours[1:, 3] == 255).all()
    assert np.abs(np.diff(colours[1:, :3], axis=0)).sum(1).min() > 60
    assert (colours[1:, :3].max(1) > 150).all()


def test_outlines_are_the_inner_border() -> None:
    labels = np.zeros((9, 9), np.int32)
    labels[2:7, 2:7] = 1
    edge = outlines(labels)[..., 3] > 0
    expected = labels > 0
    expected[3:6, 3:6] = False
    assert np.array_equal(edge, expected)


def test_contact_sheet_holds_every_frame(tmp_path: Path) -> None:
    real, synthetic = pairs("real"), pairs("synthetic", 4)
    write_contact_sheet(tmp_path / "new" / "sheet.png", real, synthetic, num=4)
    sheet = np.asarray(iio.imread(tmp_path / "new" / "sheet.png"))
    assert sheet.ndim == 2
    limits = display_range(real)
    found = []
    for image, _ in [*real[:4], *synthetic]:
        shown = grey(image, limits)
        corners = np.argwhere(sheet[: -127 or None, : -127 or None] == shown[0, 0])
        found.append(next((y, x) for y, x in corners if np.array_equal(sheet[y : y + 128, x : x + 128], shown)))
    columns = [x for _, x in found]
    assert max(columns[:4]) + 128 < min(columns[4:])  # real on the left, synthetic on the right
    assert len(set(map(tuple, found))) == 8
    head = sheet[: found[0][0] - 1]
    assert (head < 80).sum() > 100  # the two headings
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["sheet.png"]


SIZE = (2.0, 1.0, 1.0)


def test_a_panel_holds_three_planes() -> None:
    views = {"xy": np.full((5, 7), 1, np.uint8), "xz": np.full((4, 7), 2, np.uint8), "yz": np.full((5, 4), 3, np.uint8)}
    whole = panel(views, 9)
    assert whole.shape == (12, 14)
    assert (whole[:5, :7] == 1).all()
    assert (whole[8:, :7] == 2).all()
    assert (whole[:5, 10:] == 3).all()
    assert (whole == 9).sum() == 12 * 14 - 35 - 28 - 20
    colours = panel({name: np.repeat(view[..., None], 4, -1) for name, view in views.items()}, 0)
    assert np.array_equal(colours[..., 2], np.where(whole == 9, 0, whole))


def test_page_of_volumes_shows_three_planes_of_each(tmp_path: Path) -> None:
    real, synthetic = volumes("train"), volumes("other")
    write_sheet(tmp_path / "a.html", real, synthetic, title="t", num=2, voxel_size_um=SIZE)
    text = (tmp_path / "a.html").read_text()
    page = Page(text)
    by_text = {picture["alt"]: decode(picture["src"]) for picture in page.all("img")}
    assert len(by_text) == 3 * 4
    limits = display_range(real)
    for kind, shown in (("real", real[:2]), ("synthetic", synthetic[:2])):
        for number, pair in enumerate(shown, start=1):
            views = orthogonal_views(pair, SIZE)
            picture = by_text[f"{kind} frame {number}"]
            assert picture.shape == (80 + 3 + 48, 80 + 3 + 48)  # 24 planes of 2 px
            assert np.array_equal(picture[:80, :80], grey(views["xy"][0], limits))
            assert np.array_equal(picture[83:, :80], grey(views["xz"][0], limits))
            assert np.array_equal(picture[:80, 83:], grey(views["yz"][0], limits))
            for suffix in ("labels", "outlines"):
                opaque = by_text[f"{kind} frame {number}, {suffix}"][..., 3] > 0
                assert opaque.any()
                assert not opaque[80:83].any()
                assert not opaque[83:, 83:].any()
            assert np.array_equal(by_text[f"{kind} frame {number}, labels"][:80, 83:, 3] > 0, views["yz"][1] > 0)
    assert len(page.all("svg")) == len(VOLUME_HISTOGRAMS)
    said = " ".join(page.text)
    for words in ("Tiles of 24 x 80 x 80 px", "below it xz, beside it yz", "µm³", "z extent", "nearest neighbour"):
        assert words in said


def test_page_of_volumes_with_few_annotated_planes(tmp_path: Path) -> None:
    sparse = []
    for image, labels in volumes("train"):
        own = np.full_like(labels, UNLABELLED)
        own[6:20:6] = labels[6:20:6]
        sparse.append((image, own))
    write_sheet(tmp_path / "a.html", sparse, volumes("other"), title="t", num=1)
    page = Page((tmp_path / "a.html").read_text())
    assert len(page.all("svg")) == len(HISTOGRAMS)
    opaque = {picture["alt"]: decode(picture["src"]) for picture in page.all("img")}["real frame 1, labels"][..., 3] > 0
    assert 0 < opaque[83:].any(1).sum() <= 3  # xz: a row an annotated plane


def test_contact_sheet_of_volumes(tmp_path: Path) -> None:
    real, synthetic = volumes("train"), volumes("other")[:3]
    write_contact_sheet(tmp_path / "sheet.png", real, synthetic, 4, SIZE)
    sheet = np.asarray(iio.imread(tmp_path / "sheet.png"))
    limits = display_range(real)
    columns = []
    for pair in [*real, *synthetic]:
        shown = panel({name: grey(image, limits) for name, (image, _) in orthogonal_views(pair, SIZE).items()}, 255)
        assert shown.shape == (131, 131)
        corners = np.argwhere(sheet[:-130, :-130] == shown[0, 0])
        found = [x for y, x in corners if np.array_equal(sheet[y : y + 131, x : x + 131], shown)]
        assert len(found) == 1
        columns += found
    assert max(columns[:4]) + 131 < min(columns[4:])


def test_bad_input(tmp_path: Path) -> None:
    real = pairs("real")
    with pytest.raises(InputError, match="all frames or all volumes, got 2D real_pairs, 3D synthetic_pairs"):
        write_sheet(tmp_path / "a.html", real, volumes("other"), title="t")
    with pytest.raises(InputError, match="voxel_size_um"):
        write_contact_sheet(tmp_path / "a.png", volumes("other"), volumes("other"), 2, (0.0, 1.0, 1.0))
    with pytest.raises(InputError, match="synthetic_pairs: expected at least one"):
        write_sheet(tmp_path / "a.html", real, [], title="t")
    with pytest.raises(InputError, match=r"real_pairs\[0\]: expected image and labels of one shape"):
        write_contact_sheet(tmp_path / "a.png", [(real[0][0], real[0][1][:9])], real)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser on PATH ({', '.join(BROWSERS)}); install one to open the page")
    return found


def browse(browser: str, profile: Path, page: Path, *options: str) -> str:
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --hide-scrollbars"
    )
    command = [browser, *flags.split(), f"--user-data-dir={profile}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_page_opens_in_a_browser(folder: Path, browser: str, tmp_path: Path) -> None:
    sheet_text(folder)
    dom = browse(browser, tmp_path / "profile", folder / "new" / "sheet.html", "--dump-dom")
    page = Page(dom)
    assert len(page.all("img")) == 27
    assert len(page.all("svg")) == 5
    # what a browser's parser moves or drops because it was not valid would change these counts
    source = Page(sheet_text(folder))
    assert sorted(n for n, _ in page.elements) == sorted(n for n, _ in source.elements)


@pytest.mark.parametrize("width", [400, 1400])
def test_page_looks_like_something(folder: Path, browser: str, tmp_path: Path, width: int) -> None:
    sheet_text(folder)
    page, shot = folder / "new" / "sheet.html", tmp_path / "shot.png"
    browse(browser, tmp_path / "profile", page, f"--screenshot={shot}", f"--window-size={width},900")
    pixels = np.asarray(iio.imread(shot))[..., :3]
    assert pixels.shape[:2] == (900, width)
    background = (pixels == pixels[-1, 0]).all(-1)
    assert 0.1 < background.mean() < 0.97
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100  # the frames' greys
    # Margins stay empty: nothing sticks out on the right, also at phone width.
    assert background[:, -8:].all()
