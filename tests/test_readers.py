"""Every layout is found, every bad file is named, with what to do about it."""

import multiprocessing
import pickle
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import tifffile
import torch
from torch.utils.data import DataLoader

from synthaug.datasets.decoding import voxel_size_um
from synthaug.datasets.layouts import LAYOUTS
from synthaug.datasets.readers import PairDataset, open_pairs
from synthaug.errors import DataError, InputError
from synthaug.types import UNLABELLED


def discs(num: int = 5, size: int = 40, ids: list[int] | None = None) -> np.ndarray:
    """uint16 labels [size, size]: discs of radius 3 on a grid, so that none touch."""
    y, x = np.mgrid[:size, :size]
    labels = np.zeros((size, size), np.uint16)
    for i in range(num):
        centre = 5 + 10 * (i // 4), 5 + 10 * (i % 4)
        labels[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= 9] = ids[i] if ids else i + 1
    return labels


def picture(size: int = 40, dtype: type = np.uint16) -> np.ndarray:
    """A ramp, so that transposing or rescaling shows."""
    return (np.arange(size * size).reshape(size, size) * (200 / size**2)).astype(dtype)


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        imageio.imwrite(path, array)
    else:
        tifffile.imwrite(path, array, **options)
    return path


def pair(root: Path, name: str, image: np.ndarray, labels: np.ndarray, suffix: str = ".tif") -> None:
    save(root / "images" / f"{name}{suffix}", image)
    save(root / "labels" / f"{name}{suffix}", labels)


def opened(root: Path, **options: object) -> PairDataset:
    """Opened, where any warning is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return open_pairs(root, **options)


# ------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("folder", ["labels", "masks", "Masks"])
def test_folder_pairs(tmp_path: Path, folder: str) -> None:
    for name in ("b", "a"):
        save(tmp_path / "images" / f"{name}.tif", picture())
        save(tmp_path / folder / f"{name}.png", discs())
    data = opened(tmp_path)
    assert [data.name(i) for i in range(len(data))] == ["a", "b"]
    image, labels = data.read(0)
    assert image.dtype == np.float32
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(image, picture())
    np.testing.assert_array_equal(labels, discs())
    sample = data[-1]
    assert sample["image"].shape == sample["label"].shape == (1, 40, 40)
    assert (sample["image"].dtype, sample["label"].dtype) == (torch.float32, torch.int32)
    with pytest.raises(IndexError):
        data[2]
    assert len(list(data)) == 2


def test_ome_suffix_is_no_part_of_the_name(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.ome.tif", picture(), metadata={"axes": "YX"})
    save(tmp_path / "labels" / "a.tif", discs())
    assert opened(tmp_path).name(0) == "a"


def test_stardist_takes_masks_where_there_are_labels_too(tmp_path: Path) -> None:
    pair(tmp_path, "a", picture(), discs(3))
    save(tmp_path / "masks" / "a.tif", discs(5))
    assert opened(tmp_path, layout="stardist").read(0)[1].max() == 5
    with pytest.warns(UserWarning, match=r"masks.*labels/ is read.*layout='stardist'"):
        data = open_pairs(tmp_path)
    assert data.read(0)[1].max() == 3
    assert data.warnings["two folders of labels"] == 1


def test_cellpose_names(tmp_path: Path) -> None:
    for image, masks in (("a.tif", "a_masks.png"), ("b.png", "b_cp_masks.tif"), ("c_img.tif", "c_masks.tif")):
        save(tmp_path / image, picture())
        save(tmp_path / masks, discs())
    save(tmp_path / "a_flows.tif", np.zeros((3, 40, 40), np.float32))
    (tmp_path / "a_seg.npy").write_bytes(b"never opened")
    data = opened(tmp_path)
    assert [data.name(i) for i in range(3)] == ["a", "b", "c_img"]
    for i in range(3):
        np.testing.assert_array_equal(data.read(i)[1], discs())


def test_cellpose_prefers_masks_to_predictions(tmp_path: Path) -> None:
    save(tmp_path / "a.tif", picture())
    save(tmp_path / "a_cp_masks.tif", discs(3))
    save(tmp_path / "a_masks.tif", discs(4))
    with pytest.warns(UserWarning, match=r"a_cp_masks.tif.*a_masks.tif is read"):
        data = open_pairs(tmp_path)
    assert data.read(0)[1].max() == 4


def ctc(root: Path, num: int = 4, digits: int = 3) -> Path:
    """Silver for frame 0, gold for 0 and 2, nothing for 1 and 3; silver has 5 cells, gold 3."""
    for t in range(num):
        save(root / "01" / f"t{t:0{digits}d}.tif", picture() + t)
    save(root / "01_ST" / "SEG" / f"man_seg{0:0{digits}d}.tif", discs(5))
    for t in (0, 2):
        save(root / "01_GT" / "SEG" / f"man_seg{t:0{digits}d}.tif", discs(3))
        save(root / "01_GT" / "TRA" / f"man_track{t:0{digits}d}.tif", discs(3, ids=[7, 9, 30]))
    return root


@pytest.mark.parametrize("digits", [3, 4])
def test_ctc_reads_silver_then_gold(tmp_path: Path, digits: int) -> None:
    ctc(tmp_path, digits=digits)
    save(tmp_path / "02" / "t000.tif", picture())
    save(tmp_path / "02_GT" / "SEG" / "man_seg000.tif", discs(2))
    with pytest.warns(UserWarning, match="image without labels"):
        data = open_pairs(tmp_path)
    assert [data.name(i) for i in range(len(data))] == [f"01_t{0:0{digits}d}", f"01_t{2:0{digits}d}", "02_t000"]
    assert [int(data.read(i)[1].max()) for i in range(3)] == [5, 3, 2]
    np.testing.assert_array_equal(data.read(1)[0], picture() + 2)
    assert data.warnings == {"image without labels": 2}
    with pytest.warns(UserWarning, match="image without labels"):
        assert len(open_pairs(tmp_path / "01")) == 2


def test_ctc_gold_with_unlabelled_cells_is_reported(tmp_path: Path) -> None:
    ctc(tmp_path, num=1)
    (tmp_path / "01_ST" / "SEG" / "man_seg000.tif").unlink()
    (tmp_path / "01_GT" / "SEG" / "man_seg002.tif").unlink()
    save(tmp_path / "01_GT" / "TRA" / "man_track000.tif", discs(5))
    with pytest.warns(UserWarning, match=r"man_seg000.tif.*3 of 5 cells are labelled.*silver"):
        data = open_pairs(tmp_path, min_area=10)
    assert data.warnings["gold frame only partly annotated"] == 1


def test_ctc_labels_without_image(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"man_seg002.tif: labels without image.*01/t002.tif"):
        assert len(open_pairs(ctc(tmp_path, num=1))) == 1


def test_nothing_found_lists_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError) as error:
        open_pairs(tmp_path)
    for layout in ("folder", "cellpose", "ctc"):
        assert LAYOUTS[layout] in str(error.value)
    assert "{'.txt': 1}" in str(error.value)
    with pytest.raises(DataError) as error:
        open_pairs(tmp_path, layout="ctc")
    assert "_masks" not in str(error.value)


def test_nothing_found_names_the_folder_that_was_meant(tmp_path: Path) -> None:
    pair(tmp_path / "train", "a", picture(), discs())
    for wrong in (tmp_path, tmp_path / "train" / "images"):
        with pytest.raises(DataError, match=f"pairs in {tmp_path / 'train'}: pass that"):
            open_pairs(wrong)


def test_wrong_arguments(tmp_path: Path) -> None:
    pair(tmp_path, "a", picture(), discs())
    with pytest.raises(InputError, match=r"layout: expected one of \['auto', 'folder'"):
        open_pairs(tmp_path, layout="tiff")
    with pytest.raises(InputError, match="min_area"):
        open_pairs(tmp_path, min_area=-1)
    with pytest.raises(DataError, match="nothing of that name"):
        open_pairs(tmp_path / "missing")
    with pytest.raises(DataError, match="a file"):
        open_pairs(tmp_path / "images" / "a.tif")


# --------------------------------------------------------------------------------------------------------- good values


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_sixteen_bits_stay(tmp_path: Path, suffix: str) -> None:
    image = (np.arange(1600).reshape(40, 40) * 40 + 7).astype(np.uint16)
    pair(tmp_path, "a", image, discs(), suffix)
    np.testing.assert_array_equal(opened(tmp_path).read(0)[0], image)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.uint32, np.float16, np.float32, np.float64, ">u2"])
def test_image_dtypes(tmp_path: Path, dtype: type) -> None:
    pair(tmp_path, "a", picture().astype(dtype), discs())
    image = opened(tmp_path).read(0)[0]
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, picture())


NARROW, WIDE = [np.uint8, np.int16, np.uint16], [np.int32, np.uint32, np.uint64, np.float32]


@pytest.mark.parametrize(("dtype", "highest"), [(t, 200) for t in NARROW + WIDE] + [(t, 5_000_000) for t in WIDE])
def test_labels_become_contiguous_in_their_order(tmp_path: Path, dtype: type, highest: int) -> None:
    ids = [9, 4, highest, 17, 100]
    labels = np.zeros((40, 40), dtype)
    for index, value in enumerate(ids, start=1):
        labels[discs() == index] = value
    pair(tmp_path, "a", picture(), labels)
    read = opened(tmp_path).read(0)[1]
    np.testing.assert_array_equal(read, discs(ids=[2, 1, 5, 3, 4]))


def test_labels_without_background_start_at_one(tmp_path: Path) -> None:
    for name, offset in (("a", 3), ("b", 1 << 21)):
        pair(tmp_path, name, picture(), np.repeat(np.arange(4, dtype=np.int32) + offset, 400).reshape(40, 40))
    data = opened(tmp_path)
    for i in range(2):
        np.testing.assert_array_equal(np.unique(data.read(i)[1]), [1, 2, 3, 4])


def test_min_area_drops_and_counts(tmp_path: Path) -> None:
    labels = discs(4)
    labels[30, 30:33], labels[35, 35] = 2000, 40
    pair(tmp_path, "a", picture(), labels)
    pair(tmp_path, "b", picture(), labels)
    with pytest.warns(UserWarning, match=r"a.tif: instance under min_area: 2 instances under 4 px dropped.* 1 px"):
        data = open_pairs(tmp_path, min_area=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the second file is counted and says nothing
        for i in (0, 1, 0, 1):
            np.testing.assert_array_equal(data.read(i)[1], discs(4))
    assert data.warnings == {"instance under min_area": 4}  # once a file, however often it is read
    assert opened(tmp_path, min_area=1).read(0)[1].max() == 6
    with pytest.warns(UserWarning, match="1 instances under 3 px"):
        assert open_pairs(tmp_path, min_area=3).read(0)[1].max() == 5  # an instance of 3 px stays


def test_singleton_axes_are_no_third_dimension(tmp_path: Path) -> None:
    pair(tmp_path, "a", picture()[None], discs()[None, :, :, None])
    assert opened(tmp_path).read(0)[0].shape == (40, 40)


# ----------------------------------------------------------------------------------------------------------- bad files


def bad_image(root: Path, image: np.ndarray, suffix: str = ".tif", **options: object) -> None:
    save(root / "images" / f"bad{suffix}", image, **options)
    save(root / "labels" / "bad.tif", discs())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_an_image(tmp_path: Path, value: float) -> None:
    image = picture(dtype=np.float32)
    image[3, 4:6] = value
    bad_image(tmp_path, image)
    with pytest.raises(DataError, match=r"images/bad.tif: expected finite values, got 2 pixels.*nan_to_num"):
        open_pairs(tmp_path)


@pytest.mark.parametrize(("suffix", "options"), [(".tif", {"photometric": "rgb"}), (".png", {})])
def test_colour(tmp_path: Path, suffix: str, options: dict[str, str]) -> None:
    colour = np.stack([picture(dtype=np.uint8), picture(dtype=np.uint8) // 2, picture(dtype=np.uint8)], -1)
    bad_image(tmp_path, colour, suffix, **options)
    with pytest.raises(DataError, match=rf"bad{suffix}: expected one grey channel, got colour.*rgb2gray"):
        open_pairs(tmp_path)


def test_planar_colour_and_channels(tmp_path: Path) -> None:
    planes = np.stack([picture(), picture() // 2, picture()])
    bad_image(tmp_path / "rgb", planes, photometric="rgb")
    with pytest.raises(DataError, match="one grey channel, got colour"):
        open_pairs(tmp_path / "rgb")
    bad_image(tmp_path / "channels", planes, imagej=True, metadata={"axes": "CYX"})
    with pytest.raises(DataError, match="one grey channel, got 3 channels"):
        open_pairs(tmp_path / "channels")


@pytest.mark.parametrize("num_samples", [2, 3, 4])
def test_grey_saved_as_colour_is_read_and_counted(tmp_path: Path, num_samples: int) -> None:
    samples = np.stack([picture(dtype=np.uint8)] * num_samples, -1)
    if num_samples in (2, 4):
        samples[..., -1] = 255
    bad_image(tmp_path, samples, ".png")
    with pytest.warns(UserWarning, match=r"bad.png: grey saved as colour"):
        data = open_pairs(tmp_path)
    np.testing.assert_array_equal(data.read(0)[0], picture(dtype=np.uint8))


def test_sixteen_bit_colour_png_is_not_cut_to_eight(tmp_path: Path) -> None:
    bad_image(tmp_path, picture(), ".png")
    path = tmp_path / "images" / "bad.png"
    data = bytearray(path.read_bytes())
    assert (data[24], data[25]) == (16, 0)
    # Pillow cannot write such a file: make it one by hand, colour type 2, with the rows and checksums of RGB.
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = np.repeat(picture().astype(">u2")[:, :, None], 3, axis=2)
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0)
    path.write_bytes(bytes(data[:8]) + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b""))
    with pytest.raises(DataError, match=r"bad.png.*16-bit colour.*16-bit grey"):
        open_pairs(tmp_path)


@pytest.mark.parametrize("imagej", [False, True])
def test_time_stacks_are_refused(tmp_path: Path, imagej: bool) -> None:
    bad_image(tmp_path, np.stack([picture()] * 5), imagej=imagej, metadata={"axes": "TYX"})
    with pytest.raises(DataError, match=r"bad.tif: expected one time point.*TYX of \(5, 40, 40\).*every time point"):
        open_pairs(tmp_path)


def test_bool_image_and_blank_image(tmp_path: Path) -> None:
    bad_image(tmp_path / "bool", discs() > 0)
    with pytest.raises(DataError, match="Is this a mask"):
        open_pairs(tmp_path / "bool")
    bad_image(tmp_path / "blank", np.full((40, 40), 7, np.uint8))
    with pytest.warns(UserWarning, match="blank image: every pixel is 7"):
        assert open_pairs(tmp_path / "blank").warnings["blank image"] == 1


def test_shape_mismatch(tmp_path: Path) -> None:
    pair(tmp_path, "a", picture(), discs())
    pair(tmp_path, "b", picture()[:30], discs())
    data = opened(tmp_path)
    with pytest.raises(
        DataError, match=r"labels/b.tif: expected the shape of its image b.tif, \(30, 40\), got \(40, 40\)"
    ):
        data.read(1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (discs() * np.float32(0.5), "pixels that are no whole number.*order 0"),
        (np.where(discs() > 0, np.nan, 0).astype(np.float32), "no whole number"),
        (discs().astype(np.int16) - 1, "ids >= 0, got a minimum of -1"),
        ((discs() > 0).astype(np.uint8) * 255, "1 value covering 5 separate regions.*skimage.measure.label"),
        (discs(12, ids=[1, 2] * 6), "2 values covering 12 separate regions"),
        (discs().astype(np.complex64), "dtype complex64"),
        (np.stack([discs()] * 6), r"the shape of its image bad.tif, \(40, 40\), got \(6, 40, 40\)"),
    ],
)
def test_labels_that_are_none(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    pair(tmp_path, "bad", picture(), labels)
    with pytest.raises(DataError, match=f"labels/bad.tif: expected .*{message}"):
        open_pairs(tmp_path)


def test_binary_png(tmp_path: Path) -> None:
    pair(tmp_path, "bad", picture(), (discs() > 0), ".png")
    with pytest.raises(DataError, match=r"labels/bad.png: expected instance labels"):
        open_pairs(tmp_path)


def test_one_cell_is_no_binary_mask(tmp_path: Path) -> None:
    pair(tmp_path, "a", picture(), discs(1))
    assert opened(tmp_path).read(0)[1].max() == 1
    specks = discs(1)
    specks[20, 20] = specks[25, 25] = specks[30, 30] = 1
    pair(tmp_path, "a", picture(), specks)
    with pytest.warns(UserWarning, match="a.tif: instance in several parts: 1 instances lie in 4 parts"):
        open_pairs(tmp_path)


def test_split_instance_is_counted_once(tmp_path: Path) -> None:
    pair(tmp_path, "a", picture(), discs(6, ids=[1, 2, 3, 4, 5, 5]))
    with pytest.warns(UserWarning, match=r"5 instances lie in 6 parts"):
        data = open_pairs(tmp_path)
    assert data.read(0)[1].max() == 5
    assert data.warnings == {"instance in several parts": 1}


def test_empty_frames_are_counted(tmp_path: Path) -> None:
    for name, num in (("a", 0), ("b", 3), ("c", 0)):
        pair(tmp_path, name, picture(), discs(num))
    with pytest.warns(UserWarning, match=r"a.tif: empty frame.*Remove the pair if"):
        data = open_pairs(tmp_path)
    maxima = [int(data.read(i)[1].max()) for i in range(3)]
    assert (maxima, data.warnings) == ([0, 3, 0], {"empty frame": 2})


def test_files_without_partner(tmp_path: Path) -> None:
    pair(tmp_path, "a", picture(), discs())
    save(tmp_path / "images" / "b.tif", picture())
    save(tmp_path / "images" / "c.tif", picture())
    save(tmp_path / "labels" / "d.tif", discs())
    save(tmp_path / "images" / ".hidden.tif", picture())
    with pytest.warns(UserWarning, match="left out") as seen:
        data = open_pairs(tmp_path)
    assert len(data) == 1
    assert data.warnings == {"image without labels": 2, "labels without image": 1}
    texts = [str(w.message) for w in seen]
    assert any("images/b.tif: image without labels: left out" in t for t in texts)
    assert any("labels/d.tif: labels without image: left out" in t for t in texts)


def test_no_name_in_common(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.tif", picture())
    save(tmp_path / "labels" / "a_label.tif", discs())
    with pytest.raises(DataError, match=r"images/a.tif.*without one name in common, such as .*a_label.tif.*Rename"):
        open_pairs(tmp_path)


def test_one_name_twice(tmp_path: Path) -> None:
    pair(tmp_path, "a", picture(), discs())
    save(tmp_path / "images" / "a.png", picture() + 1)
    with pytest.warns(UserWarning, match=r"a.png: same name twice: a.tif is read instead"):
        data = open_pairs(tmp_path)
    np.testing.assert_array_equal(data.read(0)[0], picture())


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_seg_npy_is_never_opened(tmp_path: Path) -> None:
    root, trace = tmp_path / "data", tmp_path / "trace"
    save(root / "a.tif", picture())
    np.save(root / "a_seg.npy", np.array({"masks": Bomb(trace)}, dtype=object))
    for path in (root, root / "a_seg.npy"):
        with pytest.raises(DataError, match=r"a_seg.npy: .*pickle.*can run any code.*Save masks as PNG/tif"):
            open_pairs(path)
    save(root / "b.tif", picture())
    save(root / "b_masks.tif", discs())
    with pytest.warns(UserWarning, match=r"a_seg.npy: _seg.npy not read"):
        data = open_pairs(root)
    assert (len(data), data.warnings["_seg.npy not read"]) == (1, 1)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists()  # the bomb does go off where somebody opens it


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_broken_file(tmp_path: Path, suffix: str) -> None:
    pair(tmp_path, "a", picture(), discs(), suffix)
    path = tmp_path / "images" / f"a{suffix}"
    whole = path.read_bytes()
    for content in (b"", b"not an image, whatever its name says", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"images/a{suffix}: expected a readable .*cut short"):
            open_pairs(tmp_path)


def test_without_imagecodecs(tmp_path: Path) -> None:
    """Deflate needs tifffile alone; LZW gets the remedy. In a process of its own, where imagecodecs cannot be found."""
    pytest.importorskip("imagecodecs")  # to write the LZW file
    for name, compression in (("deflate", "zlib"), ("lzw", "lzw")):
        save(tmp_path / name / "images" / "a.tif", picture(), compression=compression, predictor=True)
        save(tmp_path / name / "labels" / "a.tif", discs(), compression="zlib")
    code = """
        import sys
        sys.modules["imagecodecs"] = None
        from synthaug.datasets.readers import open_pairs
        from synthaug.errors import DataError
        print(int(open_pairs(sys.argv[1] + "/deflate").read(0)[0].max()))
        try:
            open_pairs(sys.argv[1] + "/lzw")
        except DataError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0] == "199"
    assert "lzw/images/a.tif" in lines[1]
    assert "pip install imagecodecs" in lines[1]


# ------------------------------------------------------------------------------------------------------------- volumes


def stack(depth: int = 6) -> np.ndarray:
    """uint16 [depth, 40, 30], another ramp in every plane."""
    return np.stack([picture()[:, :30] + 300 * z for z in range(depth)]).astype(np.uint16)


def blobs(depth: int = 6, num: int = 5) -> np.ndarray:
    """uint16 labels [depth, 40, 30]: discs through planes 1 to depth - 2, the third one in plane 2 alone."""
    labels = np.zeros((depth, 40, 30), np.uint16)
    labels[1:-1] = discs(num + 1, ids=[1, 2, 3, 99, 4, 5][: num + 1])[:, :30]  # the fourth disc is cut away
    labels[(labels == 3) & (np.arange(depth) != 2)[:, None, None]] = 0
    return labels


OPTIONS = {
    "plain": {"metadata": None, "photometric": "minisblack"},
    "shaped": {},
    "imagej": {"imagej": True, "metadata": {"axes": "ZYX"}},
    "ome": {"ome": True, "metadata": {"axes": "ZYX"}},
    "deflate": {"compression": "zlib", "metadata": None, "photometric": "minisblack"},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_stacks_are_read_plane_by_plane(tmp_path: Path, kind: str) -> None:
    save(tmp_path / "images" / "a.tif", stack(), **OPTIONS[kind])
    save(tmp_path / "labels" / "a.tif", blobs() * 7, **OPTIONS[kind])
    data = opened(tmp_path)
    assert data.ndim == 3
    image, labels = data.read(0)
    assert (image.dtype, labels.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(image, stack())
    np.testing.assert_array_equal(labels, blobs())
    assert data[0]["image"].shape == data[0]["label"].shape == (1, 6, 40, 30)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_stack_dtypes(tmp_path: Path, dtype: type) -> None:
    values = (stack() % 256).astype(dtype)
    pair(tmp_path, "a", values, blobs().astype(dtype))
    data = opened(tmp_path)
    np.testing.assert_array_equal(data.read(0)[0], values)
    np.testing.assert_array_equal(data.read(0)[1], blobs())


def test_frames_have_two_axes(tmp_path: Path) -> None:
    pair(tmp_path, "a", picture(), discs())
    data = opened(tmp_path)
    assert (data.ndim, data.voxel_size_um) == (2, None)


def test_layouts_of_volumes(tmp_path: Path) -> None:
    save(tmp_path / "cellpose" / "a.tif", stack())
    save(tmp_path / "cellpose" / "a_masks.tif", blobs())
    save(tmp_path / "stardist" / "images" / "a.tif", stack())
    save(tmp_path / "stardist" / "masks" / "a.tif", blobs())
    save(tmp_path / "ctc" / "01" / "t000.tif", stack())
    save(tmp_path / "ctc" / "01_ST" / "SEG" / "man_seg000.tif", blobs())
    for layout in ("cellpose", "stardist", "ctc"):
        np.testing.assert_array_equal(opened(tmp_path / layout, layout=layout).read(0)[1], blobs())


def test_channels_of_a_stack(tmp_path: Path) -> None:
    channels = np.stack([stack(), stack()], axis=1)
    bad_image(tmp_path, channels, imagej=True, metadata={"axes": "ZCYX"})
    with pytest.raises(DataError, match=r"one grey channel, got 2 channels.*channel of interest alone.*axes ZYX"):
        open_pairs(tmp_path)


def test_checks_of_volumes(tmp_path: Path) -> None:
    binary = (blobs() > 0).astype(np.uint8)
    pair(tmp_path / "binary", "a", stack(), binary)
    with pytest.raises(DataError, match=r"labels/a.tif: .*1 value covering 5 separate regions"):
        open_pairs(tmp_path / "binary")
    pair(tmp_path / "nan", "a", np.where(stack() == 7, np.nan, stack()).astype(np.float32), blobs())
    with pytest.raises(DataError, match=r"images/a.tif: expected finite values"):
        open_pairs(tmp_path / "nan")
    pair(tmp_path / "shape", "a", stack(), blobs(7))
    with pytest.raises(DataError, match=r"\(6, 40, 30\), got \(7, 40, 30\)"):
        open_pairs(tmp_path / "shape")
    pair(tmp_path / "empty", "a", stack(), blobs() * 0)
    with pytest.warns(UserWarning, match="a.tif: empty frame"):
        open_pairs(tmp_path / "empty")
    pair(tmp_path / "specks", "a", stack(), blobs())
    with pytest.warns(UserWarning, match="1 instances under 40 voxels dropped, the smallest of 29 voxels"):
        assert open_pairs(tmp_path / "specks", min_area=40).read(0)[1].max() == 4


def test_parts_of_a_volume_connect_along_z(tmp_path: Path) -> None:
    """A staircase of single pixels is one part in 3D and none of its planes tells so."""
    labels = np.zeros((6, 40, 30), np.uint16)
    for z in range(6):
        labels[z, 10 + z, 10 + z] = 1
    pair(tmp_path, "a", stack(), labels)
    assert opened(tmp_path).read(0)[1].max() == 1
    labels[3] = 0
    pair(tmp_path, "a", stack(), labels)
    with pytest.warns(UserWarning, match="1 instances lie in 2 parts"):
        open_pairs(tmp_path)


def test_frames_among_volumes(tmp_path: Path) -> None:
    pair(tmp_path, "a", stack(), blobs())
    pair(tmp_path, "b", picture(), discs())
    data = opened(tmp_path)
    with pytest.raises(DataError, match=r"images/b.tif: expected 3D as .*images/a.tif, got 2D.*folders of their own"):
        data.read(1)


def test_single_planes_of_a_stack(tmp_path: Path) -> None:
    """Every plane has ids of its own; planes without a file are unlabelled, and one without a cell is not."""
    save(tmp_path / "images" / "a.tif", stack())
    for z, ids in ((4, [3, 5]), (1, [5, 9])):
        save(tmp_path / "labels" / f"a_z{z:03d}.tif", discs(2, ids=ids)[:, :30])
    save(tmp_path / "labels" / "a_z5.png", np.zeros((40, 30), np.uint8))
    data = opened(tmp_path)
    image, labels = data.read(0)
    np.testing.assert_array_equal(image, stack())
    expected = np.full((6, 40, 30), UNLABELLED)
    expected[1], expected[5] = discs(2)[:, :30], 0
    expected[4] = np.where(expected[1] > 0, expected[1] + 2, 0)
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(data[0]["label"][0], expected)
    assert (len(data), data.name(0)) == (1, "a")


def test_single_planes_in_the_cellpose_layout(tmp_path: Path) -> None:
    save(tmp_path / "a.tif", stack())
    save(tmp_path / "a_z002_masks.tif", discs(2)[:, :30])
    save(tmp_path / "a_z004_cp_masks.tif", discs(2)[:, :30])
    labels = opened(tmp_path).read(0)[1]
    assert [int(plane.max()) for plane in labels] == [-1, -1, 2, -1, 4, -1]


def test_small_outlines_of_single_planes(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.tif", stack())
    plane = discs(3)[:, :30]
    plane[30, 20] = 9
    save(tmp_path / "labels" / "a_z002.tif", plane)
    with pytest.warns(UserWarning, match="1 instances under 5 voxels"):
        labels = open_pairs(tmp_path, min_area=5).read(0)[1]
    np.testing.assert_array_equal(labels[2], discs(3)[:, :30])
    assert (labels[[0, 1, 3, 4, 5]] == UNLABELLED).all()


def test_planes_that_are_none(tmp_path: Path) -> None:
    for case, name, plane, message in (
        ("beyond", "a_z006", discs()[:, :30], "a_z006.tif: .*plane 6, .*the first plane is 0"),
        ("size", "a_z001", discs(), r"a_z001.tif: .*shape \(40, 40\), for an image of \(6, 40, 30\)"),
        ("stack", "a_z001", blobs(), "a_z001.tif: expected a 2D plane of a stack"),
        ("mask", "a_z001", discs()[:, :30] > 0, "a_z001.tif: expected instance labels"),
        ("flat", "a", discs()[:, :30], "labels/a.tif: expected the shape .*a_z012 of plane 12"),
    ):
        save(tmp_path / case / "images" / "a.tif", stack())
        save(tmp_path / case / "labels" / f"{name}.tif", plane)
        with pytest.raises(DataError, match=message):
            open_pairs(tmp_path / case)
    save(tmp_path / "frame" / "images" / "a.tif", picture())
    save(tmp_path / "frame" / "labels" / "a_z000.tif", discs())
    with pytest.raises(DataError, match=r"a_z000.tif: expected a 2D plane of a stack"):
        open_pairs(tmp_path / "frame")


def test_names_that_end_like_planes_stay_names(tmp_path: Path) -> None:
    for name in ("a", "a_z001"):
        pair(tmp_path, name, picture(), discs())
    assert [opened(tmp_path).name(i) for i in range(2)] == ["a", "a_z001"]


@pytest.mark.parametrize("digits", [3, 4])
def test_ctc_gold_planes(tmp_path: Path, digits: int) -> None:
    """Time 0 has silver, time 1 only planes of gold, whose ids are tracks; time 2 gold of the whole stack."""
    for t in range(3):
        save(tmp_path / "01" / f"t{t:0{digits}d}.tif", stack() + t)
    save(tmp_path / "01_ST" / "SEG" / f"man_seg{0:0{digits}d}.tif", blobs())
    gold = tmp_path / "01_GT" / "SEG"
    for t, z, ids in ((0, 2, [1, 2]), (1, 3, [30, 12]), (1, 1, [30, 40]), (2, 0, [1, 2])):
        save(gold / f"man_seg_{t:0{digits}d}_{z:03d}.tif", discs(2, ids=ids)[:, :30])
    save(gold / f"man_seg{2:0{digits}d}.tif", blobs(num=4))
    data = opened(tmp_path)
    assert len(data) == 3
    np.testing.assert_array_equal(data.read(0)[1], blobs())
    np.testing.assert_array_equal(data.read(2)[1], blobs(num=4))
    image, labels = data.read(1)
    np.testing.assert_array_equal(image, stack() + 1)
    expected = np.full((6, 40, 30), UNLABELLED)
    expected[1], expected[3] = discs(2, ids=[2, 3])[:, :30], discs(2, ids=[2, 1])[:, :30]
    np.testing.assert_array_equal(labels, expected)


def test_ctc_gold_planes_with_unlabelled_cells_are_reported(tmp_path: Path) -> None:
    """Markers beside the annotated plane are no cells of it."""
    save(tmp_path / "01" / "t000.tif", stack())
    save(tmp_path / "01_GT" / "SEG" / "man_seg_000_002.tif", discs(2)[:, :30])
    markers = blobs()  # plane 2 shows 5 cells, plane 3 shows 4
    markers[2, markers[2] > 2] = 0
    save(tmp_path / "01_GT" / "TRA" / "man_track000.tif", markers)
    assert len(opened(tmp_path)) == 1
    save(tmp_path / "01_GT" / "TRA" / "man_track000.tif", blobs())
    with pytest.warns(UserWarning, match=r"man_seg_000_002.tif.*2 of 5 cells are labelled"):
        open_pairs(tmp_path)


def test_ctc_planes_without_image(tmp_path: Path) -> None:
    save(ctc(tmp_path, num=3) / "01_GT" / "SEG" / "man_seg_007_002.tif", discs())
    with pytest.warns(UserWarning, match=r"man_seg_007_002.tif: labels without image: left out. Add 01/t007.tif"):
        open_pairs(tmp_path)


# --------------------------------------------------------------------------------------------------------- voxel sizes


@pytest.mark.parametrize(("unit", "factor"), [("\u00b5m", 1), ("um", 1), ("nm", 1e-3), ("mm", 1e3), ("cm", 1e4)])
def test_voxel_size_from_ome(tmp_path: Path, unit: str, factor: float) -> None:
    sizes = {"Z": 1.75, "Y": 0.8, "X": 0.4}
    metadata = {"axes": "ZYX"} | {f"PhysicalSize{a}": s / factor for a, s in sizes.items()}
    metadata |= {f"PhysicalSize{a}Unit": unit.replace("um", "\u00b5m") for a in sizes}
    path = save(tmp_path / "a.ome.tif", stack(), metadata=metadata)
    assert voxel_size_um(path) == pytest.approx((1.75, 0.8, 0.4))


@pytest.mark.parametrize("unit", ["um", "micron", "\\u00B5m"])
def test_voxel_size_from_imagej(tmp_path: Path, unit: str) -> None:
    metadata = {"axes": "ZYX", "spacing": 1.75, "unit": unit}
    path = save(tmp_path / "a.tif", stack(), imagej=True, resolution=(1 / 0.4, 1 / 0.8), metadata=metadata)
    assert voxel_size_um(path) == pytest.approx((1.75, 0.8, 0.4))


def test_voxel_size_of_a_frame(tmp_path: Path) -> None:
    metadata = {"axes": "YX", "unit": "um"}
    path = save(tmp_path / "a.tif", picture(), imagej=True, resolution=(1 / 0.4, 1 / 0.8), metadata=metadata)
    assert voxel_size_um(path) == pytest.approx((0.8, 0.8, 0.4))


def test_voxel_sizes_that_do_not_tell(tmp_path: Path) -> None:
    imagej = {"imagej": True, "resolution": (2, 2)}
    ome = {"axes": "ZYX", "PhysicalSizeY": 0.5, "PhysicalSizeX": 0.5}
    for name, array, options in (
        ("png.png", picture(), {}),
        ("plain.tif", stack(), {"resolution": (72, 72), "resolutionunit": 2}),
        ("no_unit.tif", stack(), imagej | {"metadata": {"axes": "ZYX", "spacing": 2.0}}),
        ("pixel.tif", stack(), imagej | {"metadata": {"axes": "ZYX", "spacing": 2.0, "unit": "pixel"}}),
        ("no_spacing.tif", stack(), imagej | {"metadata": {"axes": "ZYX", "unit": "um"}}),
        ("no_z.ome.tif", stack(), {"metadata": ome}),
        ("pixels.ome.tif", stack(), {"metadata": ome | {"PhysicalSizeZ": 2.0, "PhysicalSizeZUnit": "pixel"}}),
        ("zero.ome.tif", stack(), {"metadata": ome | {"PhysicalSizeZ": 0.0}}),
    ):
        assert voxel_size_um(save(tmp_path / name, array, **options)) is None, name
    (tmp_path / "broken.tif").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"broken.tif: expected a readable TIFF"):
        voxel_size_um(tmp_path / "broken.tif")


def test_a_data_set_has_one_voxel_size(tmp_path: Path) -> None:
    for name, spacing in (("a", 1.75), ("b", 1.751), ("c", 2.0)):
        metadata = {"axes": "ZYX", "spacing": spacing, "unit": "um"}
        save(tmp_path / "images" / f"{name}.tif", stack(), imagej=True, resolution=(2, 2), metadata=metadata)
        save(tmp_path / "labels" / f"{name}.tif", blobs())
    data = opened(tmp_path)
    data.read(1)
    assert data.voxel_size_um == (1.75, 0.5, 0.5)
    assert not data.warnings
    with pytest.warns(UserWarning, match=r"c.tif: another voxel size: \(2.0, 0.5, 0.5\) um, where a.tif says \(1.75"):
        data.read(2)


# ------------------------------------------------------------------------------------------------------ living with it


def test_cache_is_bounded_and_not_shared_with_the_caller(tmp_path: Path) -> None:
    for name in "abc":
        pair(tmp_path, name, picture(), discs())
    data = opened(tmp_path, cache_pairs=2)
    for i in (0, 1, 0, 2):
        data.read(i)
    assert list(data._cache) == [0, 2]
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    image, labels = data.read(0)  # from memory
    image[:], labels[:] = -1, -1
    np.testing.assert_array_equal(data.read(0)[0], picture())
    with pytest.raises(DataError, match=r"images/b.tif"):
        data.read(1)
    assert len(pickle.loads(pickle.dumps(data))._cache) == 0


def test_pickles_with_what_it_knows(tmp_path: Path) -> None:
    pair(tmp_path, "a", picture(), discs(0))
    with pytest.warns(UserWarning, match="empty frame"):
        data = open_pairs(tmp_path, min_area=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy = pickle.loads(pickle.dumps(data))
        np.testing.assert_array_equal(copy.read(0)[0], data.read(0)[0])
    assert copy.warnings == {"empty frame": 1}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataloader_workers(tmp_path: Path, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    for i in range(4):
        pair(tmp_path, f"{i}", picture() + i, discs(i + 2))
    data = opened(tmp_path, cache_pairs=2)
    loader = DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context=method)
    batches = list(loader)
    assert [b["label"].amax(dim=(1, 2, 3)).tolist() for b in batches] == [[2, 3], [4, 5]]
    assert batches[1]["image"][1].equal(data[3]["image"])
