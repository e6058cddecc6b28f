"""PASCAL VOC 2012, or any data set in its layout, as the scripts read it: ROOT/classes.txt, ROOT/SPLIT.csv, ROOT/masks/NAME.png.

    python prepare/voc.py --download data                             # downloads VOC 2012 (2.0 GB) to data/VOCdevkit/VOC2012
    python prepare/voc.py --voc data/VOCdevkit/VOC2012                # takes an archive unpacked before
    python prepare/voc.py --voc data/VOCdevkit/VOC2012 --out data/voc # writes elsewhere; photos are never copied

A csv for each list in ImageSets/Segmentation (train, val, trainval, test, your own), and two more:
    train_aug  SBD's 10,582 images: the list train_aug.txt or trainaug.txt, or the file names in SegmentationClassAug without those of val
    train_xml  for who has VOC alone: all images whose XML names every object, without val. Image-level training needs no masks
Labels are the classes of an image's XML boxes, difficult ones too. A test list whose images have no XML gets none.
Masks come from SegmentationClass, and from SegmentationClassAug where only that one has them.
"""
import argparse
import csv
import os
import shutil
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from torchvision.datasets import VOCSegmentation
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clip_model import InputError, run  # noqa: E402
from train_cam import hold, write_file  # noqa: E402

CLASSES = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable: dining table",
           "dog", "horse", "motorbike", "person: player", "pottedplant: potted plant", "sheep", "sofa", "train",
           "tvmonitor: tv monitor"]
ALIASES = {"trainaug": "train_aug"}  # mmsegmentation's and WeakTr's name of the list
OFFICIAL = {"train": 1464, "val": 1449, "trainval": 2913, "train_aug": 10582, "test": 1456}


def class_names(lines):
    """Lines of classes.txt -> names, without comments and CLIP's words."""
    return [line.partition(":")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def read_lines(path, what):
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable ({error}); expected {what}, one a line, UTF-8; save it so") from None


def read_names(path):
    """A list -> image names. Lines that hold paths of a photo and its mask, as DeepLab's do, serve too."""
    return [Path(line.split()[0]).stem if line.startswith("/") else line for line in read_lines(path, "image names")]


def check_count(split, count, source):
    """Stop if this is the real VOC (more than 1,000 images) with another number of images than its own."""
    official = OFFICIAL.get(split, count)
    if count > 1000 and count != official:
        remedy = ("the whole folder has 12,031 PNGs, of which 1,449 belong to val: unpack SegmentationClassAug again"
                  if source.is_dir() else
                  "12,031 is the full SBD folder, val included: delete this list, and train_aug is made without val"
                  if count == 12031 else "a list of your own needs another name than an official one: rename it")
        raise InputError(f"{source}: {count:,} images for split {split}; expected {official:,}; {remedy}")


def read_xml(path, classes, classes_file):
    """VOC XML -> names of the classes it has a box of, in the order of classes."""
    try:
        found = {box.findtext("name", "").strip() for box in ElementTree.parse(path).iter("object")}
    except (OSError, ElementTree.ParseError) as error:
        raise InputError(f"{path}: no readable annotation ({error}); expected VOC XML with the image's objects; "
                         "unpack the archive again, or take the image off the lists") from None
    if unknown := found - set(classes):
        raise InputError(f"{path}: class {min(unknown)!r} is not among the {len(classes)} classes ({', '.join(classes[:4])}, "
                         f"...); expected one of them; correct it, or write the data set's own to {classes_file}, one a line")
    return [name for name in classes if name in found]


# ---------------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Prepares PASCAL VOC 2012, or a data set in its layout.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--download", metavar="DIR", help="download VOC 2012 (2.0 GB), check and unpack it: DIR/VOCdevkit/VOC2012")
    source.add_argument("--voc", metavar="PATH", help="an unpacked VOC2012, or another data set like it, with its classes.txt")
    parser.add_argument("--out", metavar="ROOT", help="where classes.txt, the csv files and masks go; None: the VOC folder itself")
    return parser.parse_args(argv)


def main(args):
    voc = Path(args.voc or Path(args.download, "VOCdevkit", "VOC2012"))
    if args.download:
        tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)  # nothing leaves the folder, as in Python 3.14
        try:
            VOCSegmentation(args.download, "2012", "train", download=True)
        except (OSError, RuntimeError, tarfile.TarError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"{args.download}: VOC 2012 cannot be downloaded ({reason}); expected the official archive and room "
                             f"for it twice, 4 GB; run again, or unpack it by hand and pass --voc {voc}") from None
    out, folder = Path(args.out or voc), voc / "ImageSets" / "Segmentation"
    if not (voc / "JPEGImages").is_dir() or not folder.is_dir():
        raise InputError(f"{voc}: no VOC data set; expected JPEGImages and ImageSets/Segmentation in it; pass another --voc")

    # -------------------------------------------------------------------------------------------- read
    classes_file = voc / "classes.txt"
    lines = read_lines(classes_file, "class names") if classes_file.is_file() else CLASSES
    lines = ["# exif: ignore", *(line for line in lines if line != "# exif: ignore")]  # boxes and masks refer to stored pixels
    classes = class_names(lines)
    sources = {ALIASES.get(path.stem, path.stem): path for path in sorted(folder.glob("*.txt"))}
    aug = voc / "SegmentationClassAug"
    lists = {split: read_names(path) for split, path in sources.items()}
    val, test = set(lists.get("val", [])), set(lists.get("test", []))
    if "train_aug" not in lists and aug.is_dir():
        sources["train_aug"], lists["train_aug"] = aug, sorted({path.stem for path in aug.glob("*.png")} - val)
    if classes == class_names(CLASSES):
        for split, path in sources.items():
            check_count(split, len(lists[split]), path)
    annotated = complete = {path.stem for path in voc.glob("Annotations/*.xml")}
    main_task = voc / "ImageSets" / "Main" / "trainval.txt"
    if main_task.is_file():  # the XML of other tasks' images (Action, Layout) names people alone
        complete = annotated & {*read_names(main_task), *lists.get("trainval", [])}
    lists.setdefault("train_xml", sorted(complete - val - test))
    photos, unlabelled = {path.stem for path in voc.glob("JPEGImages/*.jpg")}, test if test - annotated else set()
    for split, names in lists.items():
        if missing := set(names) - photos:
            raise InputError(f"{voc / 'JPEGImages' / min(missing)}.jpg: no such photo, but {split} lists it; expected the photo of "
                             "every listed image; unpack the archive again, or take it off the list")
    labels = {name: read_xml(voc / "Annotations" / f"{name}.xml", classes, classes_file)
              for name in tqdm(sorted(set().union(*lists.values()) - unlabelled), "reading XML", disable=None)}

    # -------------------------------------------------------------------------------------------- write
    hold(out)
    write_file(out / "classes.txt", lambda path: path.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    relative = Path(os.path.relpath(voc.resolve(), out.resolve())) / "JPEGImages"
    for split, names in lists.items():
        def write(path, names=names):
            with open(path, "w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows(
                    [(relative / f"{name}.jpg").as_posix(), ";".join(labels.get(name, []))] for name in names)
        write_file(out / f"{split}.csv", write)
        print(f"{out / split}.csv: {len(names):,} images" + (", without labels" if unlabelled.intersection(names) else ""))
    masks = {path.name: path for name in ("SegmentationClassAug", "SegmentationClass") for path in voc.glob(f"{name}/*.png")}
    for name, mask in tqdm(masks.items(), "masks", disable=None):
        write_file(out / "masks" / name, lambda path, mask=mask: shutil.copyfile(mask, path))

    split = "train_aug" if "train_aug" in lists else "train_xml"
    print(f"""next:
    python train_cam.py   --data {out} --split {split} --recipe voc --out runs/voc
    python make_pseudo.py --data {out} --split {split} --cams runs/voc/cams --out runs/voc/masks
    python train_seg.py   --data {out} --split {split} --labels runs/voc/masks --recipe voc --out runs/voc
    python eval.py        --data {out} --split val --checkpoint runs/voc/seg.pt""")


if __name__ == "__main__":
    run(main, parse_args())
