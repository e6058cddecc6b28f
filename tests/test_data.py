"""The data layout as people write it; label pictures and files; batches."""
import struct

import numpy as np
import pytest
from conftest import check_label_png, error_line, files_in
from PIL import Image, ImageOps

import common
from common import (
    PALETTE, InputError, Split, read_labels, write_labels, writing)
from mask_generator import load_generator

TABLE = "images/a.jpg,cat\nimages/b.JPG,cat;dog\nimages/c.PNG,\n"


def photos(root, table=TABLE, classes="cat\ndog: a puppy\n", files=("a.jpg", "b.JPG", "c.PNG"),
           **save):
    """A data set of grey ramps, 12 pixels wide and 8 high"""
    (root / "images").mkdir(parents=True)
    for file in files:
        ramp = Image.linear_gradient("L").resize((12, 8)).convert("RGB")
        ramp.save(root / "images" / file, **save)
    for name, text in (("train.csv", table), ("classes.txt", classes)):
        (root / name).write_bytes(text.encode())
    return root


@pytest.mark.parametrize("table", [
    TABLE, TABLE.replace("\n", "\r\n"), "\ufeff" + TABLE,
    '\n"images/a.jpg","cat"\n\n"images/b.JPG","cat; dog"\n"images/c.PNG",""',
    "images/a.jpg,cat\nimages/b.JPG,dog,cat\nimages/c.PNG, ,\n"],
    ids=["plain", "Windows", "byte order mark", "quotes", "more columns"])
@pytest.mark.parametrize("classes", ["cat\ndog: a puppy\n",
                                     "\ufeff# pets\r\ncat:\r\n dog :a puppy"])
def test_tables_and_classes_as_people_write_them(table, classes, tmp_path):
    split = Split(photos(tmp_path, table, classes), "train")
    assert split.names == ["a", "b", "c"] and split.words == ["cat", "a puppy"]
    assert [split.labels[name].tolist() for name in "abc"] == [
        [True, False], [True, True], [False, False]]
    assert split.paths["b"] == tmp_path / "images/b.JPG" and split.image("c").size == (12, 8)


def test_photos_are_turned_but_where_masks_refer_to_stored_pixels(tmp_path):
    """A first line switches, a comment does not; further down it is a class without a name. EXIF:
    to be turned by 90 degrees, beside an XResolution that is text, as some programs write it"""
    tags = struct.pack("<HHHII", 2, 0x0112, 3, 1, 6) + struct.pack("<HHI4sI", 0x011A, 2, 2, b"x", 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + tags
    upright, stored, neither = (
        photos(tmp_path / str(i), classes=f"{lines}\ncat\ndog\n", exif=exif)
        for i, lines in enumerate(("# : ignore exif", ": ignore exif", "bird\n: ignore exif")))
    upright, stored = (Split(root, "train").image("a") for root in (upright, stored))
    assert upright.size == (8, 12) and stored.size == (12, 8)
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(stored), -1))
    with pytest.raises(InputError, match="classes.txt"):
        Split(neither, "train")


@pytest.mark.parametrize("kind", ["jpg", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_once(kind, orientation, tmp_path):
    """As Pillow's ImageOps does; Pillow turns a TIFF already while it loads it."""
    exif, grey = Image.Exif(), Image.linear_gradient("L").resize((12, 8)).rotate(30)
    exif[0x0112] = orientation
    root = photos(tmp_path, f"images/x.{kind},cat\n", files=())
    Image.merge("RGB", (grey, grey.rotate(90), grey)).save(root / f"images/x.{kind}", exif=exif)
    with Image.open(root / f"images/x.{kind}") as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored))
    split = Split(root, "train")
    assert np.array_equal(np.asarray(split.image("x")), expected)
    assert split.size("x") == expected.shape[:2] == ((8, 12) if orientation < 5 else (12, 8))


def test_labels_survive_a_file(tmp_path):
    assert PALETTE[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]  # VOC's first
    assert PALETTE[45:48] == [192, 128, 128] and PALETTE[-3:] == [224, 224, 192]  # person, ignore
    labels = np.array([[0, 1, 2], [6, 255, 0]], np.uint8)
    write_labels(tmp_path / "a.png", labels)
    check_label_png(tmp_path / "a.png", (3, 2), {0, 1, 2, 6, 255})
    assert np.array_equal(read_labels(tmp_path / "a.png", (2, 3), 7), labels)
    for size, num_labels in (((3, 2), 7), ((2, 3), 6)):
        with pytest.raises(InputError):
            read_labels(tmp_path / "a.png", size, num_labels)
    write_labels(tmp_path / "all.png", labels * 0 + 255)  # nothing is labelled
    assert (read_labels(tmp_path / "all.png", None, 1) == 255).all()


@pytest.mark.parametrize("error", [RuntimeError("a mistake of ours"), KeyboardInterrupt(),
                                   OSError(28, "No space left on device")])
def test_a_file_is_whole_or_as_before(error, tmp_path):
    """And what went wrong stays what it was: a RuntimeError is not taken for a full disk."""
    (tmp_path / "a.pt").write_text("before")
    with pytest.raises(type(error)) as caught, writing(tmp_path / "a.pt") as temporary:
        temporary.write_text("half")
        raise error
    assert caught.value is error and files_in(tmp_path) == {"a.pt": b"before"}


def test_the_mistake_of_a_loading_process_is_one_line(root, tmp_path, toy, capsys):
    (root / "images/train_00000.jpg").write_bytes(b"no photo")
    line = error_line(capsys, "train_cam", "--data", root, "--phase", "classify", "--vit",
                      toy / "vit.pth", "--out", tmp_path, "--recipe", "toy", "--workers", 1)
    assert line.startswith(f"error: {root}/images/train_00000.jpg: not a readable image")


def places(monkeypatch, n, steps, start=0, rank=0, world=1, seed=5):
    """The batches of (epoch, i) that a process loads, four a step over all processes"""
    monkeypatch.setattr(common, "RANK", rank)
    monkeypatch.setattr(common, "WORLD", world)
    return list(common.image_order(n, {"batch": 4, "steps": steps}, seed, start))


def test_batches(monkeypatch):
    """Every pass shows each photo once; processes share what one sees; a resumed run goes on."""
    for n in (1, 3, 10):
        seen = [place for batch in places(monkeypatch, n, 5 * n) for place in batch]
        assert sorted(seen) == [(epoch, i) for epoch in range(20) for i in range(n)]
    assert [i for _, i in seen[:10]] != [i for _, i in seen[10:20]]
    alone = places(monkeypatch, 10, 9)
    shares = [places(monkeypatch, 10, 9, rank=rank, world=3) for rank in range(3)]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert sorted(sum(parts, [])) == sorted(whole)
    assert places(monkeypatch, 10, 9, start=5, rank=1, world=3) == shares[1][5:]
    assert places(monkeypatch, 10, 9, seed=6) != alone


def test_classes_in_another_order_are_refused(root, chain):
    """The weights' rows are classes."""
    split = Split(root, "train")
    load_generator(chain / "cam/match.pt", split)
    split.classes = split.classes[::-1]
    with pytest.raises(InputError, match="match.pt: trained for 6 classes, boat, train, .*bottle"):
        load_generator(chain / "cam/match.pt", split)


def test_rank_without_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="RANK is set and MASTER_ADDR is not"):
        common.start_processes("cpu")


def test_a_huge_picture_is_one_line(tmp_path):
    """Of 100 million pixels Pillow only warns."""
    Image.new("L", (10_000, 10_000)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="a.png: not a readable image"):
        common.read_image(tmp_path / "a.png")


def test_16_bits_a_pixel_are_scaled_to_8(tmp_path):
    """Pillow alone would cut them at 255: nearly all of the photo white"""
    ramp = np.linspace(0, 255, 60).round().astype(np.uint8).reshape(5, 12)
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "a.png")
    read = np.asarray(common.read_image(tmp_path / "a.png")).astype(int)
    assert abs(read - ramp[..., None]).max() <= 1


def test_real_numbers_are_refused(tmp_path):
    """A TIFF of numbers in [0, 1] would be a black photo."""
    Image.fromarray(np.full((4, 6), 0.5, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="a.tif: not a readable image .real numbers; expected 8"):
        common.read_image(tmp_path / "a.tif")
