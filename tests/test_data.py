"""The one data layout as people write it; views and batches, which depend on numbers alone."""
import numpy as np
import pytest
import torch
from PIL import Image

from clip_model import InputError
from train_cam import Crops, Split, batches, read_classes

TABLE = "images/a.jpg,cat\nimages/b.JPG,cat;dog\nimages/c.PNG,\n"


def photos(root, table=TABLE, classes="cat\ndog: a small puppy\n", files=("a.jpg", "b.JPG", "c.PNG"), **save):
    """A data set of grey ramps, 12 pixels wide and 8 high."""
    (root / "images").mkdir(parents=True)
    for file in files:
        Image.linear_gradient("L").resize((12, 8)).convert("RGB").save(root / "images" / file, **save)
    for name, text in (("train.csv", table), ("classes.txt", classes)):
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


# ------------------------------------------------------------------------------------------ ROOT/SPLIT.csv

@pytest.mark.parametrize("table", [
    TABLE, TABLE.replace("\n", "\r\n"), "\ufeff" + TABLE, "images/a.jpg,cat\n\nimages/b.JPG,dog;cat\nimages/c.PNG",
    '"images/a.jpg","cat"\n"images/b.JPG","cat; dog"\n"images/c.PNG",""\n',
    "images/a.jpg,cat\nimages/b.JPG,cat,dog\nimages/c.PNG, ,\n"],
    ids=["plain", "Windows", "byte order mark", "empty line", "quotes", "more columns"])
def test_tables_as_people_write_them(table, tmp_path):
    split = Split(photos(tmp_path, table), "train")
    assert split.names == ["a", "b", "c"] and split.classes == ["cat", "dog"] and split.words == ["cat", "a small puppy"]
    assert [split.labels[name].tolist() for name in split.names] == [[True, False], [True, True], [False, False]]
    assert split.labels["a"].dtype == bool and split.paths["b"] == tmp_path / "images/b.JPG"
    assert split.image("c").mode == "RGB" and split.image("c").size == (12, 8)


def test_paths_of_every_kind(tmp_path):
    """Absolute, in folders of their own, with accents, blanks, commas and dots; NAME is what stands before the last dot."""
    away = photos(tmp_path / "away", files=["far.jpg"]) / "images/far.jpg"
    table = f'{away},été\n"images/été, à la plage 海.JPEG",été\nimages/a.b.jpg,\n'
    split = Split(photos(tmp_path / "root", table, "été\n", ["été, à la plage 海.JPEG", "a.b.jpg"]), "train")
    assert split.names == ["far", "été, à la plage 海", "a.b"] and all(split.image(name).size == (12, 8) for name in split.names)
    assert [split.labels[name].item() for name in split.names] == [True, True, False]


@pytest.mark.parametrize("table, says", [
    ("images/a.jpg,cat\nimages/z.jpg,cat\n", "train.csv, line 2: no photo 'images/z.jpg'"),
    ("images/a.jpg,cat\n\nimages/b.JPG,dog;unicorn\n", "train.csv, line 3: class 'unicorn' is not among the 2 of classes.txt"),
    ("images/a.jpg,cat\nimages/../images/a.jpg,dog\n", "train.csv, line 2: a second photo named a"),
    ("images,cat\n", "line 1: no photo 'images'"), ("\n,\n", "train.csv: empty"), ("", "train.csv: empty"),
    ("images/é.jpg,cat".encode("latin-1"), "train.csv: not readable .*utf-8"), ("a".encode("utf-16"), "train.csv: not readable")],
    ids=["photo", "class", "twice", "folder", "blank", "empty", "Latin-1", "UTF-16"])
def test_mistakes_in_a_table(table, says, tmp_path):
    root = photos(tmp_path, table)
    with pytest.raises(InputError, match=says) as caught:
        Split(root, "train")
    assert "\n" not in str(caught.value)


def test_no_photo_and_no_mask_is_opened(tmp_path):
    root = photos(tmp_path)
    (root / "images/a.jpg").write_text("no photo")
    split = Split(root, "train")
    with pytest.raises(InputError, match="a.jpg: not a readable image"):
        split.image("a")


# ------------------------------------------------------------------------------------------ ROOT/classes.txt

@pytest.mark.parametrize("text", ["cat\ndog: puppy\n", "\ufeffcat:\r\n\r\n dog :puppy", "# my pets\ncat\n# or a wolf\ndog:puppy"])
def test_classes_as_people_write_them(text, tmp_path):
    (tmp_path / "classes.txt").write_bytes(text.encode())
    assert read_classes(tmp_path / "classes.txt") == (["cat", "dog"], ["cat", "puppy"], True)


@pytest.mark.parametrize("text, says", [
    ("\n# cat\n", "0 classes"), ("cat\ncat: lion", "2 classes, 1 of them different"), ("cat\n: puppy", "none empty"),
    ("background\ncat", "label 0 anyway"), ("\n".join(map(str, range(255))), "255 classes"), (b"caf\xe9", "not readable")],
    ids=["none", "twice", "nameless", "background", "many", "Latin-1"])
def test_mistakes_in_classes(text, says, tmp_path):
    (tmp_path / "classes.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=says):
        read_classes(tmp_path / "classes.txt")


def test_254_classes_fit_into_a_mask(tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(map(str, range(254))))
    assert len(read_classes(tmp_path / "classes.txt")[0]) == 254


def test_photos_are_turned_but_where_masks_refer_to_stored_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright, stored = (Split(photos(tmp_path / name, classes=f"{comment}cat\ndog\n", exif=exif), "train").image("a")
                       for name, comment in (("own", "# photos of mine\n"), ("voc", "# exif: ignore\n")))
    assert upright.size == (8, 12) and stored.size == (12, 8)
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(stored), -1))


# ------------------------------------------------------------------------------------------ views and batches

def test_views_depend_on_seed_epoch_and_index_alone(toy):
    split = Split(toy / "data", "train")

    def view(seed, epoch, i):
        return Crops(split, 32, seed, min_area=0.4, augment=True)[epoch, i]
    image, labels, i = view(1, 2, 3)
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and i == 3
    assert labels.tolist() == split.labels[split.names[3]].tolist()
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert torch.equal(view(1, 2, 3)[0], image)
    assert torch.equal(torch.random.get_rng_state(), before)  # and leave the process's random numbers alone
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(view(*other)[0], image)


@pytest.mark.parametrize("n, batch", [(10, 4), (7, 16), (3, 3), (1, 2)])
def test_every_pass_shows_each_image_once(n, batch):
    steps = 6 * n  # so that passes and batches end together
    places = [place for part in batches(n, batch, 0, steps, 5, 0, 1) for place in part]
    assert len(places) == steps * batch and sorted(places) == [(epoch, i) for epoch in range(6 * batch) for i in range(n)]
    assert n < 5 or places[:n] != sorted(places[:n]) and [i for _, i in places[:n]] != [i for _, i in places[n:2 * n]]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_what_one_sees_and_a_resumed_run_goes_on(world):
    alone = list(batches(10, 4, 0, 9, 5, 0, 1))
    shares = [list(batches(10, 4, 0, 9, 5, rank, world)) for rank in range(world)]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert sorted(place for part in parts for place in part) == sorted(whole)
        assert max(map(len, parts)) - min(map(len, parts)) < 2
    assert list(batches(10, 4, 5, 9, 5, 1, world)) == shares[1][5:]
    assert list(batches(10, 4, 0, 9, 6, 0, 1)) != alone  # another seed
