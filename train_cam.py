"""Trains the mask generator through a frozen CLIP, from image-level labels alone (paper, sections 3.2 to 3.4).

    X image, M_k = S(X)_k in [0, 1] the mask of a present class k, X_k^f = M_k X, X_k^b = (1 - M_k) X
    v = E_I(region), u_k^f = E_T("a photo of {class}."), u_k^b = E_T(p_k), sim = cosine, c(x) = clamp(x, 1e-4, 1 - 1e-4)

    classify  multi-label classification on the three predictions of S; everything but CLIP is trained
    match     L_match  = mean -log c(sim(v^f, u^f)) + lambda_b mean -log(1 - c(sim(v^b, u^f)))           [eq. 1]
    prompts   L_prompt = mean -log c(sim(v^b, u^b)) + lambda_T mean -log(1 - c(sim(u^f, u^b)))           [eq. 2]
    refine    L_total  = L_match + lambda_R mean -log(1 - c(sim(v^f, u^b)))                              [eq. 3]
    export    CAMs over scales and flips, present classes only, quarter resolution, float16; and a background score for them

match and refine both start from classify.pt and train the head and the attention fusion only; prompts trains the
prompt vectors p_k only, on the regions of match.pt. All means run over the N (image, present class) pairs of the batch.
Reads photos and image-level labels of a VOC, a COCO or a folder of your own (Data); never a mask.
Writes OUT/{classify,match,prompts,refine}.pt, OUT/prompts.txt, OUT/log.jsonl, OUT/cams/NAME.npy, OUT/cams/background.json.

    make demo                                                                              # all phases on the toy world
    python train_cam.py --fetch voc clip deit --root data                                  # VOC 2012 and the weights
    python train_cam.py --data data/VOCdevkit/VOC2012 --clip data/ViT-B-32.pt \
                        --vit data/deit_small_patch16_224-cd65a155.pth --out runs/voc
    torchrun --nproc-per-node 4 train_cam.py ... the same ...                              # one process per GPU
    python train_cam.py --data ROOT --clip CKPT --out DIR --phase export --checkpoint DIR/match.pt --cams DIR2
"""
import argparse
import csv
import datetime
import hashlib
import json
import math
import os
import sys
import tarfile
import tempfile
import time
import unicodedata
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset
from torchvision.datasets.voc import DATASET_YEAR_DICT
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from clip_model import (
    CLIP_MEAN,
    CLIP_STD,
    MAKE_ROOM,
    MODELS,
    OPENAI,
    InputError,
    download,
    load_clip,
    nearest_words,
    pick_device,
    read_image,
    read_nouns,
    run,
    tokenize,
)
from mask_generator import IMAGENET_MEAN, IMAGENET_STD, MaskGenerator, ViT, load_vit

# Dimension key: B images, K classes, N (image, class) pairs, H W pixels, h w patch grid, E CLIP width, P prompt length.

PHASES = ["classify", "match", "prompts", "refine"]
BACKGROUND = "background.json"  # beside exported CAMs: the background score that goes with them
SCORES = [round(0.05 * i, 2) for i in range(3, 19)]  # those it is chosen from
DEIT = "https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth"  # named by the head of its SHA-256
VOC_ARCHIVE = DATASET_YEAR_DICT["2012"]  # url, filename, md5, base_dir
VOC_CLASSES = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
               "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"]
CLIP_WORDS = {"diningtable": "dining table", "person": "player", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}


# ---------------------------------------------------------------------------------------------------------------------
# Data: photos and image-level labels. Three layouts, one interface; none of them opens a mask
# ---------------------------------------------------------------------------------------------------------------------

def Data(root, split):
    """The split of a data set, by what lies in root: a VOC, a COCO or a Photos. Opens no image, no mask, no polygon."""
    root = Path(root)
    for layout in (VOC, COCO, Photos):
        if any(root.glob(layout.sign)):
            return layout(root, split)
    raise InputError(f"{root}: no folder JPEGImages in it, no annotations/instances_*.json and no labels.csv; expected a VOC "
                     "2012 root (VOCdevkit/VOC2012), a COCO root, or your own photos as the README lays them out; pass --data")


class DataSet:
    """What the three share. names: the images of the split, which also name all files written for them; classes (K);
    words (K), the classes as CLIP is told them; skipped: what --skip-bad left out, a line each; masks: folders, for eval.py."""

    upright = False  # boxes and masks of VOC and COCO refer to the pixels as stored: their EXIF rotation is not applied

    def __init__(self, root, split, names, classes, words, source):
        self.root, self.split, self.names, self.classes, self.words = root, split, names, classes, words
        self.skipped = []
        if not names:
            raise InputError(f"{source}: the list is empty; expected one image or more for split {split}")
        if len(set(names)) < len(names):
            twice = Counter(names).most_common(1)[0][0]
            raise InputError(f"{source}: {twice} is there twice; expected unlike names, as masks are named by them; rename one")
        if len(classes) > 254:
            raise InputError(f"{root}: {len(classes)} classes; expected at most 254: a mask holds 0, background, to 254, and 255, "
                             "ignore; leave some out")

    def image(self, name):
        """The photo as a PIL image, RGB."""
        return read_image(self.photo_path(name), self.upright)

    def describe(self):
        """One line: how many images show each class."""
        counts = np.sum([self.labels(name) for name in self.names], axis=0, dtype=int)
        return (f"{self.split}: {len(self.names)} images, {self.note}; images that show each of the {len(self.classes)} classes: "
                + ", ".join(f"{name} {count}" for name, count in zip(self.classes, counts)))

    def leave_out_bad(self, check):
        """--skip-bad: names for which check(name) raises InputError move from names to skipped, with its message."""
        def complaint(name):
            try:
                check(name)
            except InputError as error:
                return str(error)
        with ThreadPoolExecutor() as pool:  # decoding a photo leaves Python's lock
            found = list(tqdm(pool.map(complaint, self.names), "reading all once", len(self.names), disable=None))
        self.skipped += [message for message in found if message]
        self.names = [name for name, message in zip(self.names, found) if not message]
        if not self.names:
            raise InputError(f"{self.root}: --skip-bad left no image of split {self.split}; the first: {self.skipped[0]}")

    def check_count(self, official, source, remedy):
        """Stop if this is the real data set (more than 1,000 images) with another number of images than its own."""
        if official and len(self.names) != official:
            self.note += f" (the official {self.split} has {official:,})"
            if len(self.names) > 1000:
                raise InputError(f"{source}: {len(self.names):,} images for split {self.split}; expected {official:,}; {remedy}")


class VOC(DataSet):
    """PASCAL VOC 2012 as its archive unpacks, or any other data set in this layout, with its classes in classes.txt."""

    sign, note, masks = "JPEGImages", "VOC layout", ("SegmentationClass", "SegmentationClassAug")
    official = {"train": 1464, "val": 1449, "trainval": 2913, "train_aug": 10582, "test": 1456}

    def __init__(self, root, split):
        source, aug = root / "ImageSets" / "Segmentation" / f"{split}.txt", root / "SegmentationClassAug"
        remedy = "a list of your own needs another name than an official one: copy it to one, and pass that with --split"
        if split == "train_aug" and not source.is_file() and aug.is_dir():  # file names only: no mask is opened
            val = set(read_names(source.with_name("val.txt")))
            names, source = sorted(path.stem for path in aug.glob("*.png") if path.stem not in val), aug
            remedy = "the whole folder has 12,031 PNGs, of which 1,449 belong to val: unpack SegmentationClassAug again"
        else:
            names = read_names(source)
            if len(names) == 12031:
                remedy = "12,031 is the full SBD folder, val included: delete this list, and train_aug is made without val"
        super().__init__(root, split, names, *read_classes(root / "classes.txt", VOC_CLASSES), source)
        self.known = {}
        if not (root / "classes.txt").is_file():
            self.check_count(self.official.get(split), source, remedy)

    def photo_path(self, name):
        return self.root / "JPEGImages" / f"{name}.jpg"

    def labels(self, name):
        """Image-level labels (K,), bool. Objects marked `difficult` count too, as in the field's cls_labels.npy."""
        if name not in self.known:
            self.known[name] = self.read_xml(self.root / "Annotations" / f"{name}.xml")
        return self.known[name]

    def read_xml(self, path):
        try:
            found = [box.findtext("name", "").strip() for box in ElementTree.parse(path).iter("object")]
        except (OSError, ElementTree.ParseError) as error:
            if self.split == "test":
                raise InputError(f"{path}: VOC's test images come without labels and masks; expected another --split; only "
                                 "eval.py --checkpoint can use them, to predict") from None
            raise InputError(f"{path}: no readable annotation ({error}); expected VOC XML with the image's objects") from None
        return label_vector(found, self.classes, path, self.root / "classes.txt")


class COCO(DataSet):
    """COCO 2014: split train is annotations/instances_train2014.json and train2014/; so is a split called train2014.

    K classes in the order of their category ids, which run to 90 with gaps. Images without any object are left out."""

    sign, note = "annotations/instances_*.json", "COCO layout"
    official = {"instances_train2014": 82081, "instances_val2014": 40137}

    def __init__(self, root, split):
        found = [path for year in ("", "2014", "2017") if (path := root / f"annotations/instances_{split}{year}.json").is_file()]
        if not found:
            raise InputError(f"{root / 'annotations'}: no instances_{split}2014.json; expected the official annotations; pass "
                             "another --split, or unpack annotations_trainval2014.zip there")
        self.json, self.objects_read = found[0], None
        arrays = read_coco(self.json, "files", "labels", "classes")
        self.targets, classes = arrays["labels"], arrays["classes"].tolist()
        files = [self.json.stem.removeprefix("instances_") + "/" + file for file in arrays["files"].tolist()]
        super().__init__(root, split, [Path(file).stem for file in files], classes, classes, self.json)
        self.files, self.place = files, {name: i for i, name in enumerate(self.names)}
        self.check_count(self.official.get(self.json.stem), self.json, "download the annotations again, or give a json of your "
                         "own, and its folder of photos, another name")

    def photo_path(self, name):
        return self.root / self.files[self.place[name]]

    def labels(self, name):
        """Image-level labels (K,), bool. Crowds count too."""
        return self.targets[self.place[name]]

    def objects(self, name):
        """For eval.py: (H, W) and a list of (class, is a crowd, what the json says of its outline) of an image."""
        if self.objects_read is None:
            self.objects_read = read_coco(self.json, "sizes", "first_object", "object_class", "crowd", "first_byte", "outlines")
        a, i = self.objects_read, self.place[name]
        return tuple(a["sizes"][i].tolist()), [
            (int(a["object_class"][m]), bool(a["crowd"][m]),
             json.loads(a["outlines"][a["first_byte"][m]:a["first_byte"][m + 1]].tobytes()))
            for m in range(a["first_object"][i], a["first_object"][i + 1])]


def read_coco(path, *wanted):
    """Arrays of parse_coco, from the cache beside the json, or in the user's folder where that one cannot be written."""
    key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    places = [path.with_suffix(".npz"), Path("~/.cache/semples").expanduser() / f"{path.stem}-{key}.npz"]
    stamp = [1, path.stat().st_size, path.stat().st_mtime_ns]  # 1: the layout of the cache
    for cache in places:
        try:
            with np.load(cache, allow_pickle=False) as arrays:
                if arrays["stamp"].tolist() == stamp:
                    return {name: arrays[name] for name in wanted}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            continue  # there is none, or a broken one
    tqdm.write(f"{path}: read once, {stamp[1] / 1e6:.0f} MB; what is needed of it is kept as an .npz file")
    arrays = parse_coco(path)
    for cache in places:
        try:
            write_file(cache, lambda temporary: np.savez_compressed(temporary, stamp=stamp, **arrays))
            break
        except InputError:
            continue  # without a cache the next script reads the json again
    return {name: arrays[name] for name in wanted}


def parse_coco(path):
    """instances json -> flat arrays. n images that show an object, K classes, m objects in the order of their images:
    files (n,), sizes (n, 2) as H W, labels (n, K), classes (K,), first_object (n + 1,), object_class (m,), crowd (m,),
    first_byte (m + 1,), outlines: the objects' `segmentation` as the json has it, one after the other, uint8."""
    def compact(entry):  # polygons become text again as soon as they are read: as Python numbers they take ten times as much
        if "category_id" not in entry:
            return entry
        outline = json.dumps(entry.get("segmentation"), separators=(",", ":")).encode()
        return entry["image_id"], entry["category_id"], bool(entry.get("iscrowd", 0)), outline
    try:
        with open(path, encoding="utf-8") as file:
            whole = json.load(file, object_hook=compact)
        categories = sorted(whole["categories"], key=lambda category: category["id"])
        number = {category["id"]: k for k, category in enumerate(categories)}
        shown = {entry[0] for entry in whole["annotations"]}
        images = [image for image in whole["images"] if image["id"] in shown]
        place = {image["id"]: i for i, image in enumerate(images)}
        objects = sorted(((place[i], number[c], crowd, outline) for i, c, crowd, outline in whole["annotations"]),
                         key=lambda entry: entry[0])
        image_of, object_class, crowd, outlines = zip(*objects) if objects else ((), (), (), ())
        arrays = {"files": np.array([image["file_name"] for image in images], str),
                  "sizes": np.array([(image["height"], image["width"]) for image in images], int),
                  "classes": np.array([category["name"] for category in categories], str)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not COCO's instances ({type(error).__name__}: {error}); expected images, annotations and "
                         "categories that refer to each other; download the annotations again") from None
    labels = np.zeros((len(images), len(categories)), bool)
    labels[list(image_of), list(object_class)] = True
    starts = lambda lengths: np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])  # noqa: E731
    return {**arrays, "labels": labels, "object_class": np.array(object_class, int), "crowd": np.array(crowd, bool),
            "first_object": starts(np.bincount(np.array(image_of, int), minlength=len(images))),
            "first_byte": starts([len(outline) for outline in outlines]),
            "outlines": np.frombuffer(b"".join(outlines), np.uint8)}


class Photos(DataSet):
    """Your own: images/, labels.csv (file, then its classes), classes.txt; optional val.txt, the files held out."""

    sign, note, masks = "labels.csv", "own photos", ("masks",)
    upright = True  # as every viewer shows them, and as masks were drawn on them
    suffixes = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}

    def __init__(self, root, split):
        files = sorted(path for path in root.glob("images/*") if path.suffix.lower() in self.suffixes and path.name[0] != ".")
        self.root = root
        self.files = {}  # a file's name, and also its stem, as people and their spreadsheets write it -> its path
        for path in files:
            if composed(path.stem) in self.files:
                raise InputError(f"{path}: {self.files[composed(path.stem)].name} has the same name before the dot; their masks "
                                 "would overwrite each other; rename one")
            self.files |= {composed(path.stem): path, composed(path.name): path}
        chosen, source = [path.stem for path in files], root / "images"
        if (root / f"{split}.txt").is_file():
            source = root / f"{split}.txt"
            chosen = [self.find(name, source).stem for name in read_names(source)]
        elif split != "train":
            raise InputError(f"{root / f'{split}.txt'}: no such list; expected one file name of images/ a line: the photos of "
                             f"split {split}; write it, or pass --split train")
        elif (root / "val.txt").is_file():
            held_out = {self.find(name, root / "val.txt").stem for name in read_names(root / "val.txt")}
            chosen = [name for name in chosen if name not in held_out]
        classes_file = root / "classes.txt"
        super().__init__(root, split, chosen, *read_classes(classes_file), source)
        self.targets, table = {}, root / "labels.csv"
        try:
            rows = list(csv.reader(table.read_text(encoding="utf-8-sig").splitlines(), skipinitialspace=True))
        except (OSError, ValueError, csv.Error) as error:
            raise InputError(f"{table}: not readable ({error}); expected UTF-8 text, a row FILE,CLASS;CLASS a photo") from None
        for number, row in enumerate(rows):
            cells = [cell.strip().strip('"').strip() for part in row for cell in part.replace("\t", ";").split(";")]
            if not any(cells) or number == 0 and composed(cells[0]) not in self.files and "." not in cells[0]:
                continue  # an empty line, or a header
            path = self.find(cells[0], f"{table}, line {number + 1}")
            labels = label_vector(filter(None, cells[1:]), self.classes, f"{table}, line {number + 1}", classes_file)
            self.targets[path.stem] = labels | self.targets.get(path.stem, False)  # a photo may have several rows

    def find(self, name, source):
        if composed(name) not in self.files:
            raise InputError(f"{source}: no photo {name!r} in {self.root / 'images'}; expected a file name with one of the "
                             f"endings {' '.join(sorted(self.suffixes))}; correct the name, or add the photo")
        return self.files[composed(name)]

    def photo_path(self, name):
        return self.files[composed(name)]

    def labels(self, name):
        """Image-level labels (K,), bool."""
        if name not in self.targets:
            raise InputError(f"{self.root / 'labels.csv'}: no row for {self.photo_path(name).name}; expected FILE,CLASS;CLASS "
                             "for every photo of the split (FILE, alone if it shows no class); add it")
        return self.targets[name]


def composed(name):
    """One spelling of accented letters: macOS stores file names with the accent as a letter of its own."""
    return unicodedata.normalize("NFC", name)


def label_vector(found, classes, source, classes_file):
    """Names of classes -> labels (K,), bool."""
    labels = np.zeros(len(classes), bool)
    for name in found:
        if name not in classes:
            raise InputError(f"{source}: class {name!r} is not among the {len(classes)} classes "
                             f"({', '.join(classes[:4])}, ...); correct it, or add it to {classes_file}")
        labels[classes.index(name)] = True
    return labels


def read_names(path):
    """A list of images, one a line -> names. Lines that hold paths of a photo and its mask, as DeepLab's do, serve too."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no such list ({getattr(error, 'strerror', None) or error}); expected one image name a line; "
                         "pass another --split") from None
    return [Path(line.split()[0]).stem if line.startswith("/") else line for line in lines if line]


def read_classes(path, default=None):
    """classes.txt, `name` or `name: words for CLIP` a line -> (classes, words); default where there is no file."""
    lines = default
    if path.is_file():
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except ValueError as error:
            raise InputError(f"{path}: not readable ({error}); expected UTF-8 text, a class a line; save it as UTF-8") from None
    elif default is None:
        raise InputError(f"{path}: no such file; expected the names of the classes, one a line; write it")
    parts = [[part.strip() for part in line.partition(":")] for line in lines]
    classes = [name for name, _, _ in parts]
    words = [told or CLIP_WORDS.get(name, name) for name, _, told in parts]
    for wrong, what in [(not classes, "no class"), (len(set(classes)) < len(classes), "a class twice"),
                        ("" in classes, "a line without a name"), ("background" in classes, "background, which is label 0 anyway")]:
        if wrong:
            raise InputError(f"{path}: {what}; expected each class once, one a line, and no background; correct it")
    return classes, words


def fetch(what, root):
    """--fetch: downloads with digest, progress and resume into root; what lies there already is checked, not fetched."""
    if "voc" in what:
        voc = root / "VOCdevkit" / "VOC2012"
        if not voc.is_dir():
            unpack(download(VOC_ARCHIVE["url"], root / VOC_ARCHIVE["filename"], md5=VOC_ARCHIVE["md5"]), voc)
        print(f"--data {voc}")
    if "clip" in what:
        url = OPENAI + MODELS["ViT-B/32"]
        print(f"--clip {download(url, root / url.split('/')[-1], sha256=url.split('/')[-2])}")
    if "deit" in what:
        print(f"--vit {download(DEIT, root / DEIT.split('/')[-1], sha256=DEIT[-12:-4])}")


def unpack(archive, voc):
    """The official tar file -> the folder voc, which appears whole or not at all."""
    if not hasattr(tarfile, "data_filter"):  # refuses members that would land elsewhere
        raise InputError(f"{archive}: this Python cannot unpack it safely; expected 3.10.12, 3.11.4 or newer; unpack it by hand")
    try:
        with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
            whole = Path(folder, VOC_ARCHIVE["base_dir"]).resolve(strict=True)
            voc.parent.mkdir(exist_ok=True)
            os.replace(whole, voc)
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"{archive}: cannot be unpacked ({error}); expected VOC 2012's archive and room for as much again; "
                         "make room, or unpack it by hand") from None


class Crops(Dataset):
    """Training views: item i is (image (3, side, side) ImageNet-normalised, labels (K,), i).

    A view depends on (seed, epoch, i) alone, so neither workers nor processes nor a resumed run change it."""

    def __init__(self, data, side, seed, min_area=0.08, strong=False):
        self.data, self.side, self.seed, self.epoch = data, side, seed, 0
        self.targets = np.stack([data.labels(name) for name in data.names])                     # (images, K)
        self.view = v2.Compose([
            v2.RandomResizedCrop(side, scale=(min_area, 1), interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            *([v2.RandAugment(magnitude=9)] if strong else []),
            v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            *([v2.RandomErasing(0.25)] if strong else [])])

    def __len__(self):
        return len(self.data.names)

    def __getitem__(self, i):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.seed * 1_000_003 + self.epoch) * 1_000_003 + i)
            image = self.view(self.data.image(self.data.names[i]))
        return image, torch.from_numpy(self.targets[i]).float(), i


class SeenCrops(Dataset):
    """The first `views` crops of every image, and what the frozen trunk sees in them (float16), in memory. [detail 5]

    Item i is (image (3, side, side), labels (K,), i, tokens (T, D), maps (L*A, T, T), features (L*A, 64)), T = K + h*w; epoch e
    takes view e modulo `views`. Every process holds all of it."""

    def __init__(self, crops, generator, views, device, quiet):
        self.epoch, self.views = 0, []
        for view in range(views):
            crops.epoch = view
            rows = []
            for image, labels, i in tqdm(DataLoader(crops, 64), f"trunk, view {view + 1}/{views}", disable=True if quiet else None):
                with torch.no_grad():
                    *seen, self.grid = generator.look(image.to(device))
                rows.append([image, labels, i, *(part.half().cpu() for part in seen)])
            self.views.append([torch.cat(column) for column in zip(*rows)])

    def __len__(self):
        return len(self.views[0][0])

    def __getitem__(self, i):
        return tuple(column[i] for column in self.views[self.epoch % len(self.views)])


# ---------------------------------------------------------------------------------------------------------------------
# Processes, files, log
# ---------------------------------------------------------------------------------------------------------------------

def start_processes(device):
    """Join torchrun's process group if there is one. Returns (rank, number of processes, this process's device)."""
    device = pick_device(device)
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=12))
    return dist.get_rank(), dist.get_world_size(), device


def end_processes(data, rank, world):
    """Wait for all; returns what `run` is to list as skipped: all of it on rank 0."""
    if world > 1:
        dist.barrier()  # torchrun kills the others when one process ends with an exit code
        dist.destroy_process_group()
    return data.skipped if rank == 0 else []


def sum_over_processes(value, device):
    """A number or a tensor -> its sum over all processes, as a number or on the CPU."""
    total = torch.as_tensor(value, dtype=torch.float64).to(device, copy=True)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.cpu() if torch.is_tensor(value) else total.item()


def write_file(path, write):
    """Call write(temporary path), then put the file in place: a killed run leaves the old file or none, never half.

    Raises InputError where the place is full or cannot be written to."""
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # keeps the suffix, which PIL and numpy look at
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save, where the disk is full
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise InputError(f"{path}: cannot be written ({reason}){MAKE_ROOM}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def read_checkpoint(path, needs, remedy):
    """A checkpoint of ours -> dict. `needs` is the key that makes it the right one."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {remedy}") from None
    except Exception as error:
        raise InputError(f"{path}: not a readable checkpoint ({type(error).__name__}); {remedy}") from None
    if not isinstance(state, dict) or needs not in state:
        raise InputError(f"{path}: holds no {needs!r}; expected a checkpoint written by this project; {remedy}")
    return state


def vit_sizes(vit):
    """What ViT(**sizes) needs to build the same trunk, as plain types."""
    return {"patch": vit.patch, "width": vit.width, "layers": len(vit.blocks), "grid": list(vit.grid)}


def build_vit(sizes):
    return ViT(sizes["patch"], sizes["width"], sizes["layers"], tuple(sizes["grid"]))


def load_generator(path, classes, remedy):
    """A phase's checkpoint -> MaskGenerator in eval mode, on the CPU."""
    state = read_checkpoint(path, "generator", remedy)
    if state["classes"] != list(classes):
        raise InputError(f"{path}: trained for the {len(state['classes'])} classes {', '.join(state['classes'][:4])}, ...; "
                         f"the data has {len(classes)}: {', '.join(classes[:4])}, ...; train again or pass the other data")
    generator = MaskGenerator(build_vit(state["vit"]), len(classes), state["class_attention"])
    generator.load_state_dict(state["generator"])
    return generator.eval()


@torch.no_grad()
def load_prompts(path, clip, classes, remedy):
    """OUT/prompts.pt -> u^b (K, E)."""
    state = read_checkpoint(path, "vectors", remedy)
    vectors = state["vectors"].to(clip.token_embedding.weight.device)
    if state["classes"] != list(classes) or vectors.shape[2] != clip.text_width:
        raise InputError(f"{path}: prompts for {len(state['classes'])} classes of width {vectors.shape[2]}; expected those of "
                         f"this data and CLIP ({len(classes)}, {clip.text_width}); run --phase prompts again")
    return clip.encode_prompts(vectors)


# ---------------------------------------------------------------------------------------------------------------------
# The method: regions, losses, prompts
# ---------------------------------------------------------------------------------------------------------------------

def cosine(a, b):
    return (F.normalize(a.float(), dim=-1) * F.normalize(b.float(), dim=-1)).sum(dim=-1)


def c(x):
    """The paper's clamp: it keeps the logarithms finite. Outside its gradient is zero: a cosine below 1e-4 is at rest where a
    term pushes it down, -log(1 - c), but stuck where a term should raise it, -log c."""
    return x.clamp(1e-4, 1 - 1e-4)


def match_loss(v_f, v_b, u_f, lambda_b=2.4):
    """L_match [eq. 1]: what the mask keeps reads as the class, what it drops does not. All (N, E); scalar."""
    return -c(cosine(v_f, u_f)).log().mean() - lambda_b * (1 - c(cosine(v_b, u_f))).log().mean()


def prompt_loss(v_b, u_b, u_f, lambda_t=0.02, repel="text", v_f=None):
    """L_prompt [eq. 2]: the prompt reads as what the mask drops, and not as the class. All (N, E); scalar.

    repel: what L_T pushes the prompt from. "text": the class text, the paper's figure; "text-log": the same unbounded,
    + log c, as the official code; "image": the foreground region v_f, as a published summary of the paper has it."""
    l_i = -c(cosine(v_b, u_b)).log().mean()
    l_t = {"text": lambda: -(1 - c(cosine(u_f, u_b))).log().mean(),
           "text-log": lambda: c(cosine(u_f, u_b)).log().mean(),
           "image": lambda: -(1 - c(cosine(v_f, u_b))).log().mean()}[repel]()
    return l_i + lambda_t * l_t


def refine_loss(v_f, u_b):
    """L_refine [eq. 3]: what the mask keeps does not read as the class's background prompt. Both (N, E); scalar."""
    return -(1 - c(cosine(v_f, u_b))).log().mean()


def region_masks(cam, size, eps):
    """CAMs of the present classes (N, h, w) -> M (N, 1, H, W) in [0, 1): up-sampled, then (m - min) / (max - min + eps).

    eps is the official code's: 0.1 where S is trained, which damps flat maps, 1e-4 for the prompts, 1e-12 for the export."""
    m = F.interpolate(cam[:, None], size=size, mode="bilinear", align_corners=False)            # (N, 1, H, W)
    low, high = m.amin(dim=(2, 3), keepdim=True), m.amax(dim=(2, 3), keepdim=True)
    return (m - low) / (high - low + eps)


def for_clip(image):
    """ImageNet-normalised -> CLIP-normalised pixels, in which 0 is CLIP's mean colour: what M hides in M X fades into it."""
    mean, std, clip_mean, clip_std = (torch.tensor(v, device=image.device).view(3, 1, 1) for v in
                                      (IMAGENET_MEAN, IMAGENET_STD, CLIP_MEAN, CLIP_STD))
    return (image * std + mean - clip_mean) / clip_std


def clip_view(clip, image):
    """ImageNet-normalised images (B, 3, H, W) -> X (B, 3, R, R), of CLIP's size and in its normalisation."""
    side = (clip.resolution, clip.resolution)
    return for_clip(F.interpolate(image, size=side, mode="bicubic", antialias=True) if image.shape[2:] != side else image)


def embed_masked(clip, X, M):
    """X (N, 3, R, R), M (N, 1, R, R) -> v_f, v_b (N, E): CLIP's view of what M keeps and of what it drops."""
    if not len(M):
        return X.new_zeros(2, 0, clip.embed_dim).unbind()
    return clip.encode_image(torch.cat([M * X, (1 - M) * X])).split(len(M))                     # of X_k^f, X_k^b


def embed_regions(clip, image, cam, labels, eps):
    """CLIP's view of every present class's foreground and background.

    image (B, 3, H, W) ImageNet-normalised, cam (B, K, h, w), labels (B, K).
    Returns v_f, v_b (N, E) and the classes (N,) of the pairs, in order of image, class."""
    b, k = labels.nonzero(as_tuple=True)                                                        # (N,), (N,)
    M = region_masks(cam[b, k], (clip.resolution, clip.resolution), eps)                        # (N, 1, R, R)
    return *embed_masked(clip, clip_view(clip, image)[b], M), k


class Prompts(nn.Module):
    """p (K, P, width): for each class the vectors that learn to name what comes along with it (paper, section 3.3)."""

    def __init__(self, clip, num_classes, length):
        super().__init__()
        self.clip = [clip]  # in a list: CLIP is no part of this module's state
        self.vectors = nn.Parameter(torch.rand(num_classes, length, clip.text_width))  # U[0, 1) as the official code

    def forward(self):
        """u^b (K, E)"""
        return self.clip[0].encode_prompts(self.vectors)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

MAY_CHANGE = {"out", "resume", "phase", "checkpoint", "cams", "scales", "skip_bad", "device", "workers", "fetch", "root"}


def check_same_flags(part, before, now):
    """--resume: a run goes on with the flags it was begun with. Of paths only the name counts: folders may have moved."""
    for flag in sorted(now.keys() - MAY_CHANGE):
        old, new = before.get(flag), now[flag]
        if flag in ("data", "clip", "vit", "labels"):
            old, new = Path(str(old)).name, Path(str(new)).name
        if old != new:
            raise InputError(f"{part}: begun with --{flag.replace('_', '-')} {old}, now it is {new}; expected the same flags to go "
                             "on with; give that one again, or delete that file to start this phase anew")


def cosine_decay(t):
    return 0.5 * (1 + math.cos(math.pi * t))


def train(phase, model, dataset, losses, optimizer, args, *, batch, epochs, rank, world, device, describe, decay=cosine_decay):
    """Optimise model; the rate falls by decay(share of steps done). Exact resume from OUT/{phase}.part.

    losses(model, *items) -> ({name: scalar, "loss": scalar}, n): means over this process's n images (classify), pairs (match,
    prompts, refine) or labelled pixels (seg). describe(items) names what is in a batch, for the message that stops a run whose
    loss is not finite. The log has the means over all n of all processes; lr, the rate of the next step; images_per_s (pairs
    in prompts); gib, the most GPU memory so far."""
    part = Path(args.out) / f"{phase}.part"
    sampler = DistributedSampler(dataset, world, rank, shuffle=True, seed=args.seed)
    loader = DataLoader(dataset, max(1, batch // world), sampler=sampler, num_workers=args.workers,
                        pin_memory=device.type == "cuda")
    steps, start = epochs * len(loader), 0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: decay(min(1, step / max(1, steps))))
    if args.resume and part.is_file():
        state = read_checkpoint(part, "args", f"delete it to start {phase} again")
        check_same_flags(part, state["args"], vars(args))
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["epoch"]
    wrapped = DistributedDataParallel(model) if world > 1 else model
    bar = tqdm(total=steps, initial=start * len(loader), desc=phase, disable=None if rank == 0 else True)
    began, seen = time.time(), 0
    for epoch in range(start, epochs):
        sampler.set_epoch(epoch)
        dataset.epoch = epoch
        totals = {}
        for batch_items in loader:
            values, n = losses(wrapped, *(item.to(device, non_blocking=True) for item in batch_items))
            if not torch.isfinite(values["loss"]):
                raise InputError(f"{phase}: the loss is {values['loss'].item()} in epoch {epoch + 1} on {describe(batch_items)}; "
                                 f"expected a number; lower --lr, delete {part} if it is there, and run again with --resume")
            share = n * world / max(1, sum_over_processes(n, device))  # so that N counts over all processes
            optimizer.zero_grad(set_to_none=True)
            (values["loss"] * share).backward()
            optimizer.step()
            schedule.step()
            for name, value in values.items():
                totals[name] = totals.get(name, 0) + value.item() * n
            totals["n"], seen = totals.get("n", 0) + n, seen + len(batch_items[0]) * world
            bar.update()
        totals = {name: sum_over_processes(value, device) for name, value in totals.items()}
        count, took = max(1, totals.pop("n")), time.time() - began
        row = {"phase": phase, "epoch": epoch + 1, "step": (epoch + 1) * len(loader),
               **{name: round(value / count, 5) for name, value in totals.items()},
               "lr": schedule.get_last_lr()[-1], "images_per_s": round(seen / took, 1),
               "eta_s": round(took / (epoch + 1 - start) * (epochs - epoch - 1)),
               "gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else 0}
        if rank == 0:
            log(args.out, row)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                     "schedule": schedule.state_dict(), "epoch": epoch + 1, "args": vars(args)}
            write_file(part, lambda path, state=state: torch.save(state, path))
    bar.close()


def log(out, row):
    """One line on the terminal, the same numbers appended to OUT/log.jsonl."""
    tqdm.write(" | ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))
    with open(Path(out) / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def classification_losses(generator, image, labels, i):
    """Multi-label soft margin, mean over the three predictions of S (WeakTr's pre-training). image (B, 3, H, W), labels (B, K).

    Returns ({"loss": their mean, "tokens", "coarse", "fine": each one's}, B); i, the images' numbers, is not used."""
    _, logits = generator(image)                                                                # (3, B, K)
    each = [F.multilabel_soft_margin_loss(prediction, labels) for prediction in logits]
    return {"loss": sum(each) / 3, "tokens": each[0], "coarse": each[1], "fine": each[2]}, len(image)


@torch.no_grad()
def class_texts(clip, words, device):
    """u^f (K, E): "a photo of {class}." for every class."""
    return clip.encode_text(tokenize([f"a photo of {word}." for word in words], clip.context_length).to(device))


@torch.no_grad()
def background_regions(clip, generator, dataset, views, device, rank, world):
    """For `views` crops of every image: v_f, v_b (N, E) and class (N,) of each present class.

    The generator is frozen in this phase, so a region's embedding is computed once, not once an epoch. [detail 4]"""
    rows = []
    for epoch in range(views):
        dataset.epoch = epoch
        indices = list(range(len(dataset)))[rank::world]
        for start in tqdm(range(0, len(indices), 64), desc=f"regions {epoch + 1}/{views}", disable=None if rank == 0 else True):
            image, labels, _ = (torch.stack(list(map(torch.as_tensor, z))).to(device) for z in
                                zip(*(dataset[i] for i in indices[start:start + 64])))
            v_f, v_b, k = embed_regions(clip, image, generator(image)[0], labels, eps=1e-4)
            order = epoch * len(dataset) + torch.tensor(indices[start:start + 64])  # the pair's place in a run of one process
            rows.append((v_f.cpu(), v_b.cpu(), k.cpu(), order.repeat_interleave(labels.sum(dim=1).long().cpu())))
    parts = [torch.cat(column) for column in zip(*rows)]
    if dist.is_initialized():
        everyone = [None] * world
        dist.all_gather_object(everyone, parts)
        parts = [torch.cat(column) for column in zip(*everyone)]
    order = parts.pop().argsort(stable=True)
    return [part[order] for part in parts]


def scaled_input(photo, scale, patch, most=8192):
    """PIL photo -> (1, 3, h*patch, w*patch) ImageNet-normalised: resized by scale to whole patches, so nothing is padded.

    A photo that would have more than `most` patches is shown smaller: attention takes memory by their square."""
    W, H = photo.size
    scale = min(scale, patch * (most / (H * W)) ** 0.5)
    size = [max(1, round(side * scale / patch)) * patch for side in (H, W)]
    pixels = v2.functional.pil_to_tensor(v2.functional.resize(photo, size, InterpolationMode.BICUBIC))
    return v2.functional.normalize(pixels.float() / 255, IMAGENET_MEAN, IMAGENET_STD)[None]


@torch.no_grad()
def export_cams(generator, data, folder, scales, device, rank, world):
    """Write folder/NAME.npy: float16 (n, ceil(H/4), ceil(W/4)) in [0, 1], the n present classes in class order.

    Each scale and its mirror image is one pass; the maps are summed, then brought to [0, 1] per class. All L*A attention
    maps are held at once: 2,500 patches (640 x 640 at scale 1.25) take 2 GB with DeiT-S, a phone's photo would take 600."""
    for name in tqdm(data.names[rank::world], desc="export", disable=None if rank == 0 else True):
        photo, present = data.image(name), torch.from_numpy(data.labels(name)).nonzero()[:, 0].to(device)
        W, H = photo.size
        quarter, total = (-(-H // 4), -(-W // 4)), 0
        for scale in scales:
            x = scaled_input(photo, scale, generator.trunk.patch, most=2500).to(device)
            for flip in (False, True):
                cam, _ = generator(x.flip(3) if flip else x)
                cam = cam.flip(3) if flip else cam                                              # (1, K, h, w)
                total = total + F.interpolate(cam, size=quarter, mode="bilinear", align_corners=False)[0, present]
        maps = region_masks(total, quarter, eps=1e-12)[:, 0] if len(present) else total          # (n, H/4, W/4)
        maps = maps.cpu().numpy().astype(np.float16)
        write_file(folder / f"{name}.npy", lambda path, maps=maps: np.save(path, maps))


@torch.no_grad()
def score_backgrounds(clip, u_f, u_b, data, folder, device, rank, world, most=200):
    """{background score: loss} over SCORES: how well CLIP reads the hard regions that the score cuts from the exported CAMs.

    The loss is the three terms of L_total, of equal weight: kept regions read as the class and dropped ones do not [eq. 1],
    kept ones do not read as the prompt [eq. 3]. Means over the pairs of up to `most` images, spread over the split. Looks at
    photos, labels and CAMs; at no mask."""
    total, pairs, R = torch.zeros(len(SCORES), dtype=torch.float64), 0, clip.resolution
    names = data.names[::-(-len(data.names) // most)]
    for name in tqdm(names[rank::world], desc="background score", disable=None if rank == 0 else True):
        k = torch.from_numpy(data.labels(name)).nonzero()[:, 0].to(device)                      # (n,)
        if len(k) == 0:
            continue
        photo = v2.functional.pil_to_tensor(data.image(name)).to(device).float() / 255
        X = clip_view(clip, v2.functional.normalize(photo, IMAGENET_MEAN, IMAGENET_STD)[None])  # (1, 3, R, R)
        cams = torch.from_numpy(np.load(folder / f"{name}.npy")).to(device).float()             # (n, H/4, W/4)
        cams = F.interpolate(cams[None], size=(R, R), mode="bilinear", align_corners=False)[0]  # (n, R, R)
        M = ((cams == cams.amax(0)) & (cams > cams.new_tensor(SCORES)[:, None, None, None])).float()  # (scores, n, R, R)
        v_f, v_b = (v.unflatten(0, M.shape[:2]) for v in embed_masked(clip, X, M.flatten(0, 1)[:, None]))
        total += len(k) * torch.stack([match_loss(f, b, u_f[k], lambda_b=1) + refine_loss(f, u_b[k])
                                       for f, b in zip(v_f, v_b)]).cpu()
        pairs += len(k)
    total, pairs = (sum_over_processes(value, device) for value in (total, pairs))
    return dict(zip(SCORES, (total / max(1, pairs)).tolist()))


# ---------------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Trains the mask generator from image-level labels; exports CAMs.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    needed = not any(word.startswith("--fetch") for word in (sys.argv[1:] if argv is None else argv))
    files = parser.add_argument_group("files")
    files.add_argument("--data", required=needed, metavar="ROOT", help="VOC 2012 root (has JPEGImages), COCO 2014 root (has "
                       "annotations/instances_*.json) or your own photos (images, labels.csv, classes.txt)")
    files.add_argument("--split", default="train", help="images to train on and to export: train, train_aug, val, trainval or "
                       "a list of your own in ImageSets/Segmentation; COCO: train, val; own photos: train, val")
    files.add_argument("--clip", metavar="CKPT", help="CLIP checkpoint, or ViT-B/32 to download it. The export wants it too, and "
                       "OUT/prompts.pt, to choose a background score")
    files.add_argument("--vit", metavar="CKPT", help="ImageNet-pretrained DeiT that the generator starts from")
    files.add_argument("--out", required=needed, metavar="DIR", help="folder for checkpoints, log and CAMs")
    files.add_argument("--checkpoint", metavar="FILE", help="export: the phase to export (default OUT/refine.pt)")
    files.add_argument("--cams", metavar="DIR", help="export: where the CAMs go (default OUT/cams)")
    files.add_argument("--fetch", nargs="+", choices=["voc", "clip", "deit"], help="only download VOC 2012 (2.0 GB), CLIP ViT-B/32 "
                       "(0.4 GB), DeiT-S (0.1 GB): check, unpack, and say which flags take them; a broken download goes on")
    files.add_argument("--root", default="data", metavar="DIR", help="--fetch: where to")
    work = parser.add_argument_group("what to run")
    work.add_argument("--phase", choices=[*PHASES, "export", "all"], default="all",
                      help="one phase, starting from the files of the earlier ones, or all and the export")
    work.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False,
                      help="go on where a killed run with the same flags stopped; finished phases are kept")
    work.add_argument("--skip-bad", action=argparse.BooleanOptionalAction, default=False,
                      help="read all photos once before; go on without those that cannot be read, list them at the end, exit 3")
    work.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    work.add_argument("--seed", type=int, default=0, help="everything random follows from it")
    work.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that load images; 0: none")
    recipe = parser.add_argument_group("recipe (defaults: VOC)")
    recipe.add_argument("--epochs", type=int, default=60, help="epochs of classify, match and refine")
    recipe.add_argument("--batch", type=int, default=64, help="images per step, over all processes")
    recipe.add_argument("--lr", type=float, default=6.4e-5, help="AdamW's rate in classify, match and refine; COCO 3.2e-7")
    recipe.add_argument("--trunk-lr", type=float, default=1.0, help="classify: rate of the trunk as a share of --lr; less keeps "
                        "what its pretraining knows")
    recipe.add_argument("--weight-decay", type=float, default=0.03, help="AdamW's, in every phase")
    recipe.add_argument("--lambda-b", type=float, default=2.4,
                        help="weight of the background term of L_match; larger: bigger masks; COCO 0.75")
    recipe.add_argument("--lambda-r", type=float, default=0.05, help="weight of L_refine; larger: tighter masks; COCO 0.2")
    recipe.add_argument("--prompt-length", type=int, default=30, help="vectors per prompt, at most 71 with OpenAI's CLIP")
    recipe.add_argument("--prompt-epochs", type=int, default=60, help="epochs of prompts")
    recipe.add_argument("--prompt-batch", type=int, default=128, help="(image, class) pairs per step of prompts")
    recipe.add_argument("--prompt-lr", type=float, default=2.5e-2, help="AdamW's rate in prompts; COCO 2.5e-3")
    recipe.add_argument("--prompt-views", type=int, default=4, help="random crops of each image that prompts learns from")
    recipe.add_argument("--lambda-t", type=float, default=0.02, help="weight of L_T; larger: further from the class; COCO 0.01")
    recipe.add_argument("--repel", choices=["text", "text-log", "image"], default="text",
                        help="what L_T pushes the prompt away from: the class text, the same unbounded, the foreground")
    recipe.add_argument("--mask-views", type=int, default=0, help="match, refine: random crops of each image, the frozen trunk's "
                        "output kept in memory (float16); 0: new crops every epoch. A crop of 224 takes 7 MB with DeiT-S")
    recipe.add_argument("--min-area", type=float, default=0.08, help="smallest crop, as a share of the image")
    recipe.add_argument("--augment", action=argparse.BooleanOptionalAction, default=True,
                        help="RandAugment and random erasing in classify, match and refine")
    recipe.add_argument("--class-attention", action=argparse.BooleanOptionalAction, default=True,
                        help="classify: multiply the CAM by class-to-patch attention; leave it out where the trunk's [CLS] "
                             "was not pretrained, as in the toy world")
    recipe.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.2],
                        help="export: each scale and its flip; COCO 1.0 0.8 1.2")
    return parser.parse_args(argv)


def main(args):
    if args.fetch:
        return fetch(args.fetch, Path(args.root))
    if not all(0 < scale < 10 for scale in args.scales):
        raise InputError(f"--scales {' '.join(map(str, args.scales))}: expected numbers above 0 and below 10")
    rank, world, device = start_processes(args.device)
    out, data = Path(args.out), Data(args.data, args.split)
    if args.skip_bad:
        data.leave_out_bad(lambda name: (data.labels(name), data.image(name)))
    if rank == 0:
        print(data.describe(), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    K = len(data.classes)
    phases = [args.phase] if args.phase != "all" else [*PHASES, "export"]
    remedy = "run the earlier phases first (--phase all runs them in order)"

    if set(phases) & set(PHASES):
        for flag in ("clip", "vit"):
            if getattr(args, flag) is None:
                raise InputError(f"--{flag} is missing; phase {phases[0]} needs that checkpoint; see --help")
    clip = load_clip(args.clip, device) if args.clip else None
    if clip:
        if "prompts" in phases and not 1 <= args.prompt_length <= clip.max_prompt_length:
            raise InputError(f"--prompt-length {args.prompt_length}: expected 1 to {clip.max_prompt_length}, what this CLIP has "
                             "room for; pass another")
        u_f = class_texts(clip, data.words, device)                                             # (K, E)
        plain = Crops(data, clip.resolution, args.seed, args.min_area)
        strong = Crops(data, clip.resolution, args.seed, args.min_area, strong=args.augment)
    shared = {"rank": rank, "world": world, "device": device}

    for phase in phases:
        finished = out / f"{phase}.pt"
        if phase == "export" or (args.resume and finished.is_file()):
            continue
        torch.manual_seed(args.seed)
        adamw = lambda model, lr: torch.optim.AdamW([  # noqa: E731
            {"params": [p for name, p in model.named_parameters() if p.requires_grad and name.startswith("trunk.") == trunk],
             "lr": lr * (args.trunk_lr if trunk else 1)} for trunk in (True, False)], weight_decay=args.weight_decay)
        begin = {"epochs": args.epochs, "batch": args.batch, **shared,
                 "describe": lambda items: ", ".join(data.names[i] for i in items[2].tolist())}

        if phase == "classify":
            model = MaskGenerator(load_vit(args.vit), K, args.class_attention).to(device)
            train(phase, model, strong, classification_losses, adamw(model, args.lr), args, **begin)

        elif phase in ("match", "refine"):
            model = load_generator(out / "classify.pt", data.classes, remedy).to(device)  # both start here
            model.requires_grad_(False)
            for parameter in model.mask_parameters():
                parameter.requires_grad_(True)
            if phase == "refine":
                u_b = load_prompts(out / "prompts.pt", clip, data.classes, remedy)             # (K, E)
            views = SeenCrops(strong, model, args.mask_views, device, rank > 0) if args.mask_views else strong

            def mask_losses(generator, image, labels, i, *seen, phase=phase, model=model, views=views):
                if seen:
                    seen = *(part.float() for part in seen), views.grid
                else:
                    with torch.no_grad():
                        seen = model.look(image)
                cam, _ = generator(seen=seen)
                v_f, v_b, k = embed_regions(clip, image, cam, labels, eps=0.1)                  # (N, E), (N, E), (N,)
                if len(k) == 0:
                    names = ["match", "loss", *(["refine"] if phase == "refine" else [])]  # as below: processes add them
                    return dict.fromkeys(names, 0 * cam.sum()), 0
                values = {"match": match_loss(v_f, v_b, u_f[k], args.lambda_b)}
                values["loss"] = values["match"]
                if phase == "refine":
                    values["refine"] = refine_loss(v_f, u_b[k])
                    values["loss"] = values["match"] + args.lambda_r * values["refine"]  # L_total  [eq. 3]
                return values, len(k)

            train(phase, model, views, mask_losses, adamw(model, args.lr), args, **begin)

        elif phase == "prompts":
            generator = load_generator(out / "match.pt", data.classes, remedy).to(device)
            regions = TensorDataset(*background_regions(clip, generator, plain, args.prompt_views, device, rank, world))
            model = Prompts(clip, K, args.prompt_length).to(device)

            def prompt_losses(prompts, v_f, v_b, k):
                u_b = prompts()[k]                                                              # (N, E)
                return {"loss": prompt_loss(v_b, u_b, u_f[k], args.lambda_t, args.repel, v_f),
                        "sim": cosine(v_b, u_b).mean().detach()}, len(k)

            train(phase, model, regions, prompt_losses, adamw(model, args.prompt_lr), args, epochs=args.prompt_epochs,
                  batch=args.prompt_batch, **shared, describe=lambda items: f"classes {sorted(set(items[2].tolist()))}")
            with torch.no_grad():
                found = nearest_words(model(), sorted({*read_nouns(), *data.words}), clip)
            lines = [f"{name}: " + ", ".join(f"{word} {value:.3f}" for word, value in row)
                     for name, row in zip(data.classes, found)]
            if rank == 0:
                write_file(out / "prompts.txt", lambda path: path.write_text("\n".join(lines) + "\n", encoding="utf-8"))

        state = {"phase": phase, "classes": data.classes, "words": data.words, "args": vars(args)}
        if phase == "prompts":
            state["vectors"] = model.vectors.detach().cpu()
        else:
            state.update(generator=model.state_dict(), vit=vit_sizes(model.trunk), class_attention=model.class_attention)
        if rank == 0:
            write_file(finished, lambda path, state=state: torch.save(state, path))
            (out / f"{phase}.part").unlink(missing_ok=True)
        if world > 1:
            dist.barrier()

    if "export" in phases:
        generator = load_generator(args.checkpoint or out / "refine.pt", data.classes, remedy).to(device)
        folder, prompts = Path(args.cams or out / "cams"), out / "prompts.pt"
        if rank == 0:
            (folder / BACKGROUND).unlink(missing_ok=True)  # that of earlier CAMs
        export_cams(generator, data, folder, args.scales, device, rank, world)
        if world > 1:
            dist.barrier()
        if clip and prompts.is_file():
            u_b = load_prompts(prompts, clip, data.classes, remedy)
            losses = score_backgrounds(clip, u_f, u_b, data, folder, device, rank, world)
            chosen = {"background_score": min(losses, key=losses.get), "losses": losses}
            if rank == 0:
                write_file(folder / BACKGROUND, lambda path: path.write_text(json.dumps(chosen, indent=1) + "\n"))
                print(f"background score {chosen['background_score']}, chosen by CLIP and the prompts: {folder / BACKGROUND}")
        elif rank == 0:
            print(f"no background score is chosen without --clip and {prompts}; make_pseudo.py will take Otsu's threshold")
    return end_processes(data, rank, world)


if __name__ == "__main__":
    run(main, parse_args())
