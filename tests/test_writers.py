"""What is written is read back equal, in every format, also after a kill at any point."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from synthaug.datasets import writers
from synthaug.datasets.readers import open_pairs
from synthaug.datasets.writers import FORMATS, count_written, write_pairs
from synthaug.errors import DataError, InputError
from synthaug.randomness import SampleKey

SHAPE = (24, 31)


def frame(index: int) -> tuple[np.ndarray, np.ndarray]:
    """A float32 image in whole counts and int32 labels, the fourth frame without cells."""
    rng = SampleKey(0, ("frame", index)).numpy()
    labels = np.zeros(SHAPE, np.int32)
    for cell in range(0 if index == 3 else 2 + index % 3):
        labels[2 + 7 * (cell // 2) :, 3 + 9 * (cell % 2) :][:5, :6] = cell + 1
    return rng.integers(0, 60_000, SHAPE).astype(np.float32), labels


def frames(num: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [frame(i) for i in range(num)]


def check(out: Path, format: str, num: int) -> None:
    """The reader gives back frames 0 ... num - 1."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*empty frame")
        data = open_pairs(out, layout="folder" if format == "ome" else format)
        assert len(data) == num
        for i in range(num):
            image, labels = data.read(i)
            np.testing.assert_array_equal(image, frame(i)[0])
            np.testing.assert_array_equal(labels, frame(i)[1])
        assert set(data.warnings) <= {"empty frame"}
        assert len(open_pairs(out)) == num  # "auto" finds it, too


@pytest.mark.parametrize("format", FORMATS)
def test_round_trip(tmp_path: Path, format: str) -> None:
    assert count_written(tmp_path / "out", format) == 0
    assert write_pairs(frames(6), tmp_path / "out", format=format) == 6
    check(tmp_path / "out", format, 6)
    assert count_written(tmp_path / "out", format) == 6
    assert not [p for p in (tmp_path / "out").rglob("*") if p.name.startswith(".")]


@pytest.mark.parametrize("format", FORMATS)
def test_continues_where_it_stopped(tmp_path: Path, format: str) -> None:
    def stopped() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield from frames(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pairs(stopped(), tmp_path, format=format)
    for start, stop in ((2, 5), (5, 7)):
        assert count_written(tmp_path, format) == start
        write_pairs(frames(stop)[start:], tmp_path, format=format, start=start)
    check(tmp_path, format, 7)
    if format == "ctc":
        check_tracks(tmp_path, "01", 7)


@pytest.mark.parametrize("format", FORMATS)
def test_killed_at_any_write(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop dead at the k-th rename, as kill -9 would: nothing is cleaned up, the next run goes on."""

    class Killed(BaseException):
        pass

    num_renames, finished = 0, False
    while not finished:
        out, left = tmp_path / str(num_renames), num_renames

        def replace(part: Path, path: Path) -> None:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            os.rename(part, path)

        with monkeypatch.context() as patch:
            patch.setattr(writers.os, "replace", replace)
            patch.setattr(writers.Path, "unlink", lambda *_, **__: None)
            try:
                write_pairs(frames(3), out, format=format)
                finished = True
            except Killed:
                pass
        done = count_written(out, format)
        assert finished or done < 3
        write_pairs(frames(5)[done:], out, format=format, start=done)
        check(out, format, 5)
        if format == "ctc":
            check_tracks(out, "01", 5)
        num_renames += 1
    assert num_renames == 1 + 3 * (3 if format == "ctc" else 2)  # every file of three pairs was a place to stop at


def test_pairs_are_streamed(tmp_path: Path) -> None:
    def watched() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for i in range(4):
            assert count_written(tmp_path) == i  # everything before is on disk already
            yield frame(i)

    assert write_pairs(watched(), tmp_path) == 4


def test_nothing_complete_is_written_over(tmp_path: Path) -> None:
    for format in FORMATS:
        out = tmp_path / format
        write_pairs(frames(2), out, format=format)
        before = {p: p.read_bytes() for p in out.rglob("*.*")}
        with pytest.raises((DataError, InputError), match=r"count_written\(out, "):
            write_pairs(frames(1), out, format=format)
        assert before == {p: p.read_bytes() for p in out.rglob("*.*")}


def test_shards_of_one_folder(tmp_path: Path) -> None:
    write_pairs(frames(4)[2:], tmp_path, start=2)
    assert count_written(tmp_path) == 0
    write_pairs(frames(2), tmp_path)
    assert count_written(tmp_path) == 4
    check(tmp_path, "folder", 4)


def test_files_are_plain_deflate(tmp_path: Path) -> None:
    write_pairs([(torch.from_numpy(frame(0)[0]), torch.from_numpy(frame(0)[1]))], tmp_path, format="cellpose")
    for path in (tmp_path / "000000.tif", tmp_path / "000000_masks.tif"):
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[0]
            assert (page.dtype, page.shape, len(tiff.pages)) == (np.uint16, SHAPE, 1)
            assert (page.compression, page.predictor) == (8, 1)


# ------------------------------------------------------------------------------------------------------------- volumes


def volume(index: int) -> tuple[np.ndarray, np.ndarray]:
    """A float32 image [4, 24, 31] in whole counts and labels, whose cells reach through planes 1 and 2."""
    image = np.stack([frame(4 * index + z)[0] for z in range(4)])
    labels = np.zeros(image.shape, np.int32)
    labels[1:3] = frame(1 + index)[1]
    return image, labels


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
@pytest.mark.parametrize("format", FORMATS)
def test_round_trip_of_volumes(tmp_path: Path, format: str, dtype: str) -> None:
    write_pairs([volume(0)], tmp_path, format=format, dtype=dtype)
    write_pairs([volume(1)], tmp_path, format=format, dtype=dtype, start=count_written(tmp_path, format))
    data = open_pairs(tmp_path)
    assert (len(data), data.ndim, data.voxel_size_um) == (2, 3, None)
    for i in range(2):
        np.testing.assert_array_equal(data.read(i)[0], volume(i)[0])
        np.testing.assert_array_equal(data.read(i)[1], volume(i)[1])


@pytest.mark.parametrize("voxel_size_um", [(1.75, 0.8, 0.4), (2.0, 0.1083, 0.1083), (0.29, 0.065, 0.065)])
@pytest.mark.parametrize("format", FORMATS)
def test_voxel_sizes_come_back(tmp_path: Path, format: str, voxel_size_um: tuple[float, float, float]) -> None:
    for name, pair, expected in (
        ("volume", volume(0), voxel_size_um),
        ("frame", frame(0), (voxel_size_um[1], *voxel_size_um[1:])),  # Z has no meaning in 2D
    ):
        write_pairs([pair], tmp_path / name, format=format, voxel_size_um=voxel_size_um)
        data = open_pairs(tmp_path / name)
        assert data.voxel_size_um == pytest.approx(expected, rel=1e-4)
        np.testing.assert_array_equal(data.read(0)[0], pair[0])
        np.testing.assert_array_equal(data.read(0)[1], pair[1])


def test_ome_tells_axes_and_sizes(tmp_path: Path) -> None:
    write_pairs([volume(0)], tmp_path, format="ome", voxel_size_um=(1.75, 0.8, 0.4))
    for path in (tmp_path / "images" / "000000.ome.tif", tmp_path / "labels" / "000000.ome.tif"):
        with tifffile.TiffFile(path) as tiff:
            assert tiff.is_ome
            assert (tiff.series[0].axes, tiff.pages[0].compression) == ("ZYX", 8)
            pixels = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]
        assert [pixels[f"PhysicalSize{axis}"] for axis in "ZYX"] == [1.75, 0.8, 0.4]
        assert {pixels[f"PhysicalSize{axis}Unit"] for axis in "ZYX"} == {"\u00b5m"}
        assert [pixels[f"Size{axis}"] for axis in "TCZYX"] == [1, 1, 4, 24, 31]


def test_volumes_are_stacks_of_plain_pages(tmp_path: Path) -> None:
    write_pairs([volume(0)], tmp_path)
    with tifffile.TiffFile(tmp_path / "images" / "000000.tif") as tiff:
        assert [page.shape for page in tiff.pages] == [SHAPE] * 4
        assert (tiff.pages[0].description, tiff.pages[0].compression) == ("", 8)


def test_frames_and_volumes_do_not_mix(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pair 1: expected 3D as those before it, got shape \(24, 31\)"):
        write_pairs([volume(0), frame(0)], tmp_path)
    assert count_written(tmp_path) == 1


# ---------------------------------------------------------------------------------------------- Cell Tracking Challenge


def check_tracks(out: Path, sequence: str, num: int) -> np.ndarray:
    """`man_track.txt` says of every frame what the frame shows; the table int [tracks, 4]."""
    folder = out / f"{sequence}_GT"
    table = np.loadtxt(folder / "TRA" / "man_track.txt", dtype=int, ndmin=2)
    assert len(np.unique(table[:, 0])) == len(table)
    assert (table[:, 1] == table[:, 2]).all()
    assert (table[:, 3] == 0).all()
    for t in range(num):
        tracks = tifffile.imread(folder / "TRA" / f"man_track{t:03d}.tif")
        np.testing.assert_array_equal(tracks, tifffile.imread(folder / "SEG" / f"man_seg{t:03d}.tif"))
        np.testing.assert_array_equal(np.unique(tracks[tracks > 0]), np.sort(table[table[:, 1] == t, 0]))
    assert table[:, 1].max() < num
    return table


def test_ctc_tracks_are_valid_for_ctc_tools(tmp_path: Path) -> None:
    """py-ctcmetrics, the challenge's metrics in Python, finds it valid, and perfect against itself."""
    from ctc_metrics.scripts.evaluate import evaluate_sequence

    write_pairs(frames(5), tmp_path, format="ctc")
    check_tracks(tmp_path, "01", 5)
    result = tmp_path / "01_RES"
    result.mkdir()
    for t in range(5):
        (result / f"mask{t:03d}.tif").write_bytes((tmp_path / f"01_GT/TRA/man_track{t:03d}.tif").read_bytes())
    (result / "res_track.txt").write_text((tmp_path / "01_GT/TRA/man_track.txt").read_text())
    found = evaluate_sequence(str(result), str(tmp_path / "01_GT"), metrics=["Valid", "SEG", "TRA"], threads=1)
    assert found["Valid"] == 1
    assert found["SEG"] == pytest.approx(1)
    assert found["TRA"] == pytest.approx(1)


def test_ctc_tracks_of_volumes_are_valid_for_ctc_tools(tmp_path: Path) -> None:
    from ctc_metrics.scripts.evaluate import evaluate_sequence

    write_pairs([volume(0), volume(1)], tmp_path, format="ctc", voxel_size_um=(1.75, 0.8, 0.8))
    assert len(check_tracks(tmp_path, "01", 2)) == 7
    result = tmp_path / "01_RES"
    result.mkdir()
    for t in range(2):
        (result / f"mask{t:03d}.tif").write_bytes((tmp_path / f"01_GT/TRA/man_track{t:03d}.tif").read_bytes())
    (result / "res_track.txt").write_text((tmp_path / "01_GT/TRA/man_track.txt").read_text())
    found = evaluate_sequence(str(result), str(tmp_path / "01_GT"), metrics=["Valid", "SEG", "TRA"], threads=1)
    assert (found["Valid"], found["SEG"], found["TRA"]) == pytest.approx((1, 1, 1))


def test_ctc_ids_that_are_not_contiguous(tmp_path: Path) -> None:
    image, labels = frame(1)
    write_pairs([(image, labels * 1000), (image, labels)], tmp_path, format="ctc")
    assert check_tracks(tmp_path, "01", 2)[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(open_pairs(tmp_path).read(0)[1], labels)


@pytest.mark.parametrize(("limit", "value"), [("MAX_FRAMES", 2), ("MAX_ID", 5)])
@pytest.mark.parametrize("pause", range(7))
def test_ctc_goes_on_in_a_new_sequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, pause: int
) -> None:
    monkeypatch.setattr(writers, limit, value)
    write_pairs(frames(pause), tmp_path, format="ctc")
    assert count_written(tmp_path, "ctc") == pause
    write_pairs(frames(7)[pause:], tmp_path, format="ctc", start=pause)
    assert count_written(tmp_path, "ctc") == 7
    check(tmp_path, "ctc", 7)
    sequences = sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith("_GT"))
    # Cells a frame: 2 3 4 0 3 4 2. At most 5 ids a sequence: 2+3, 4+0, 3, 4, 2.
    assert sequences == [f"{i:02d}" for i in range(1, 5 if limit == "MAX_FRAMES" else 6)]
    for sequence in sequences:
        table = check_tracks(tmp_path, sequence, len(list((tmp_path / sequence).iterdir())))
        assert limit == "MAX_FRAMES" or table[:, 0].max() <= value


def test_ctc_leaves_a_real_data_set_alone(tmp_path: Path) -> None:
    write_pairs(frames(3), tmp_path, format="ctc")
    (tmp_path / "01_GT" / "SEG" / "man_seg001.tif").unlink()  # sparse gold truth, as real sets have
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.*")}
    for start in (0, count_written(tmp_path, "ctc")):
        with pytest.raises((DataError, InputError)):
            write_pairs(frames(1), tmp_path, format="ctc", start=start)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*.*")}


@pytest.mark.parametrize("torn", ["9", "9 1", "9 2 2 ", "9 2 2 0\n10 2 2 0\n1"])
def test_ctc_line_cut_short(tmp_path: Path, torn: str) -> None:
    write_pairs(frames(2), tmp_path, format="ctc")
    with (tmp_path / "01_GT" / "TRA" / "man_track.txt").open("a") as file:
        file.write(torn)
    write_pairs(frames(5)[2:], tmp_path, format="ctc", start=2)
    assert check_tracks(tmp_path, "01", 5)[:, 0].tolist() == list(range(1, 13))


def test_ctc_without_its_tracks_cannot_continue(tmp_path: Path) -> None:
    write_pairs(frames(2), tmp_path, format="ctc")
    (tmp_path / "01_GT" / "TRA" / "man_track.txt").unlink()
    with pytest.raises(DataError, match=r"man_track.txt: expected the tracks written so far"):
        write_pairs(frames(3)[2:], tmp_path, format="ctc", start=2)


# ---------------------------------------------------------------------------------------------------------- the values


def test_clipping_is_counted_and_rounding_exact(tmp_path: Path) -> None:
    image, labels = frame(0)
    image[:], image[5, 6] = 100.4, 100.6
    image[0, :5], image[1, :3], image[2, 0] = -3, 70_000, 65_535.4
    with pytest.warns(UserWarning, match="pixels lay") as seen:
        write_pairs([frame(1), (image, labels)], tmp_path)
    texts = [str(w.message) for w in seen]
    assert len(texts) == 2
    assert any(t.startswith("5 of 1488 pixels lay below the range") and "000001.tif" in t for t in texts)
    assert any(t.startswith("3 of 1488 pixels lay above the range") and "dtype='float32'" in t for t in texts)
    stored = tifffile.imread(tmp_path / "images" / "000001.tif")
    assert (stored[0, 0], stored[1, 0], stored[2, 0], stored[5, 5], stored[5, 6]) == (0, 65_535, 65_535, 100, 101)


def test_clipping_is_reported_after_an_interruption_too(tmp_path: Path) -> None:
    def stopped() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield frame(0)[0] - 1e6, frame(0)[1]
        raise RuntimeError("the producer failed")

    with pytest.warns(UserWarning, match="below the range"), pytest.raises(RuntimeError, match="the producer failed"):
        write_pairs(stopped(), tmp_path)


def test_dtypes(tmp_path: Path) -> None:
    image, labels = frame(0)
    write_pairs([(image + 0.25, labels)], tmp_path / "f", dtype="float32")
    np.testing.assert_array_equal(open_pairs(tmp_path / "f").read(0)[0], image + np.float32(0.25))
    write_pairs([(image // 256, labels)], tmp_path / "b", dtype="uint8")
    assert tifffile.imread(tmp_path / "b" / "images" / "000000.tif").dtype == np.uint8


def test_normalised_images_are_noticed(tmp_path: Path) -> None:
    image, labels = frame(0)
    with pytest.warns(UserWarning, match=r"1 of 1 images have values of at most 1 and lost their detail.*float32"):
        write_pairs([(image / image.max(), labels)], tmp_path)


@pytest.mark.parametrize(
    ("image", "labels", "message"),
    [
        (np.full(SHAPE, np.nan), frame(0)[1], "pair 0, image: expected finite values"),
        (frame(0)[0][None], frame(0)[1], "pair 0, image: expected .*one channel"),
        (np.zeros((0, 4)), np.zeros((0, 4), int), "pair 0, image"),
        (volume(0)[0][:1], volume(0)[1][:1], "pair 0, image: expected .*Z > 1"),
        (np.zeros((2, 2, 5, 5)), np.zeros((2, 2, 5, 5), int), "pair 0, image"),
        (volume(0)[0], frame(0)[1], "pair 0: expected image and labels of one shape"),
        (frame(0)[0], frame(0)[1].T, "pair 0: expected image and labels of one shape"),
        (frame(0)[0], frame(0)[1] + 65_535, "ids from 0 to 65535.*relabel_sequential"),
        (frame(0)[0], frame(0)[1] - 1, "ids from 0"),
        (frame(0)[0], frame(0)[0], "pair 0, labels: expected .*whole numbers"),
    ],
)
def test_bad_pairs(tmp_path: Path, image: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_pairs([(image, labels)], tmp_path)
    assert not list(tmp_path.iterdir())


def test_wrong_arguments(tmp_path: Path) -> None:
    for options in (
        {"format": "zarr"},
        {"dtype": "int8"},
        {"start": -1},
        {"start": 1, "format": "ctc"},
        {"voxel_size_um": (0.5, 0.5)},
        {"voxel_size_um": (2.0, 0.0, 0.5)},
        {"voxel_size_um": (np.nan, 0.5, 0.5)},
    ):
        with pytest.raises(InputError, match="expected"):
            write_pairs(frames(1), tmp_path, **options)
    with pytest.raises(InputError, match="format"):
        count_written(tmp_path, "zarr")
