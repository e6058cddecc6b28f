"""PASCAL VOC 2012, or a data set in its layout, in ours: classes.txt, SPLIT.csv, masks/NAME.png.

  python prepare/voc.py --download data               # 2.0 GB, to data/VOCdevkit/VOC2012
  python prepare/voc.py --voc data/VOCdevkit/VOC2012  # takes an archive unpacked before
  python prepare/voc.py --voc ... --out data/voc      # writes elsewhere; photos are never copied

A csv for each list in ImageSets/Segmentation (train, val, test, your own), and two more: train_aug,
SBD's 10,582 images, and train_xml, for who has VOC alone (docs/data.md). Labels are the classes of
an image's XML boxes, difficult ones too; a test image without XML gets none. Masks come from
SegmentationClass, and from SegmentationClassAug where only that has one.
"""
import argparse
import http.client
import os
import shutil
import socket
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from torchvision.datasets.utils import check_integrity, download_url, extract_archive
from torchvision.datasets.voc import DATASET_YEAR_DICT

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import InputError, Split, digest, progress, run, writing
from layout import claim_all, write_lists, write_missing

CLASSES = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
           "diningtable: dining table", "dog", "horse", "motorbike", "person: player",
           "pottedplant: potted plant", "sheep", "sofa", "train", "tvmonitor: tv monitor"]
OFFICIAL = {"train": 1464, "val": 1449, "trainval": 2913, "train_aug": 10582, "test": 1456}


MIRRORS = [  # the official server has not answered since 2025 (torchvision's issue 9269)
    "https://d2l-data.s3-accelerate.amazonaws.com/VOCtrainval_11-May-2012.tar",
    "https://dataset.bj.bcebos.com/voc/VOCtrainval_11-May-2012.tar"]


def read_lines(path):
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return [line.strip() for line in lines if line.strip()]


def read_names(path):
    """A list -> image names. DeepLab's lines, the paths of a photo and its mask, serve too."""
    return [Path(line.split()[0]).stem if line.startswith("/") else line
            for line in read_lines(path)]


def read_xml(path, classes):
    """VOC XML -> names of the classes that it has a box of, in the order of classes"""
    try:
        boxes = ElementTree.parse(path).iter("object")
        found = {box.findtext("name", "").strip() for box in boxes}
    except (OSError, ElementTree.ParseError) as error:
        raise InputError(f"{path}: no readable annotation ({error}); expected VOC's XML; unpack "
                         "the archive again, or take the image off the lists") from None
    if unknown := found - set(classes):
        raise InputError(f"{path}: class {min(unknown)!r}; expected one of {', '.join(classes)}; "
                         "for other classes write classes.txt beside JPEGImages, one a line")
    return [name for name in classes if name in found]


def download(folder, voc):
    """The archive, from the first address that serves it, checked by torchvision's MD5; unpacked"""
    official, failed = DATASET_YEAR_DICT["2012"], []
    archive = Path(folder, official["filename"])
    if archive.exists() and not check_integrity(archive, official["md5"]):
        raise InputError(f"{archive}: not VOC's archive, its MD5 is another; expected none there, "
                         "or the official one; move it away")
    socket.setdefaulttimeout(60)  # a firewall may not answer at all
    for url in [official["url"], *MIRRORS]:
        if archive.exists():
            break
        try:
            with writing(archive) as temporary:
                download_url(url, folder, temporary.name, official["md5"])
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            failed.append(f"{url}: {str(error).partition(chr(10))[0]}")
            print(failed[-1], flush=True)
    if not archive.exists():
        raise InputError(f"{folder}: VOC 2012 cannot be downloaded ({'; '.join(failed)}); expected "
                         "the official archive and 4 GB of room; run again, or unpack it by hand "
                         f"and pass --voc {voc}")
    extract_archive(str(archive), folder)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Prepares VOC 2012, or data in its layout.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, source = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--download", metavar="DIR", help="download, check and unpack it: "
                        "DIR/VOCdevkit/VOC2012")
    source.add_argument("--voc", metavar="PATH", help="an unpacked VOC2012, or the like with its "
                        "classes.txt")
    add("--out", metavar="ROOT", help="where results go; None: the VOC folder")
    add("--resume", action="store_true", help="go on with a run of the same inputs, whose finished "
        "files are kept")
    return parser.parse_args(argv)


def main(args):
    voc = Path(args.voc or Path(args.download, "VOCdevkit", "VOC2012"))
    if args.download:
        download(args.download, voc)
    out, folder = Path(args.out or voc), voc / "ImageSets" / "Segmentation"
    if not (voc / "JPEGImages").is_dir() or not folder.is_dir():
        raise InputError(f"{voc}: no VOC data set; expected JPEGImages and ImageSets/Segmentation "
                         "in it; pass another --voc")

    # ---- Read ------------------------------------------------------------------------------------
    lines = read_lines(voc / "classes.txt") if (voc / "classes.txt").is_file() else CLASSES
    lines = [line for line in lines if line != Split.AS_STORED]
    classes = [line.partition(":")[0].strip() for line in lines if line[0] != "#"]
    sources = {path.stem: path for path in sorted(folder.glob("*.txt"))}
    if "trainaug" in sources:  # mmsegmentation's and WeakTr's name of the list
        sources["train_aug"] = sources.pop("trainaug")
    lists = {split: read_names(path) for split, path in sources.items()}
    val, test = set(lists.get("val", [])), set(lists.get("test", []))
    if "train_aug" not in lists and (aug := voc / "SegmentationClassAug").is_dir():
        sources["train_aug"] = aug
        lists["train_aug"] = sorted({path.stem for path in aug.glob("*.png")} - val)
    for split, source in sources.items():
        count, official = len(lists[split]), OFFICIAL.get(split)
        if official and count > 1000 and count != official and lines == CLASSES:
            raise InputError(f"{source}: {count:,} images; expected {official:,}; unpack it again, "
                             "rename a list of your own, or, of the 12,031 of all SBD, delete the "
                             "list: train_aug is then made without val")
    annotated = complete = {path.stem for path in voc.glob("Annotations/*.xml")}
    main_task = voc / "ImageSets" / "Main" / "trainval.txt"
    if main_task.is_file():  # the XML of other tasks' images (Action, Layout) names people alone
        complete = annotated & {*read_names(main_task), *lists.get("trainval", [])}
    lists.setdefault("train_xml", sorted(complete - val - test))
    others = set().union(*(names for split, names in lists.items() if split != "test"))
    labelled = others | (test & complete if test - annotated else test)
    labels = {name: read_xml(voc / "Annotations" / f"{name}.xml", classes)
              for name in progress(sorted(labelled), "reading XML")}

    # ---- Write -----------------------------------------------------------------------------------
    masks = {path.name: path for name in ("SegmentationClassAug", "SegmentationClass")
             for path in sorted(voc.glob(f"{name}/*.png"))}
    photos = Path(os.path.relpath(voc.resolve(), out.resolve())) / "JPEGImages"
    tables = {split: [((photos / f"{name}.jpg").as_posix(), ";".join(labels.get(name, [])))
                      for name in names] for split, names in lists.items()}
    files = [f"{split}.csv" for split in tables]
    if out.resolve() != voc.resolve() or not (voc / "classes.txt").is_file():
        files.append("classes.txt")  # its own stays as it is
    parts = {out: (files, {"script": "voc.py", "lists": digest([lines, tables])})}
    if masks:
        made_of = digest([[name, digest(path)] for name, path in masks.items()])
        parts[out / "masks"] = masks, {"script": "voc.py", "masks": made_of}
    claim_all(parts, args.resume, [voc / "JPEGImages", *{path.parent for path in masks.values()}])
    write_lists(out, lines, tables)
    for split, names in lists.items():
        print(f"{out / split}.csv: {len(names):,} images"
              + (f", {n:,} without labels" if (n := len({*names} - labelled)) else ""))
    for name, mask in progress(masks.items(), "masks"):
        write_missing(out / "masks" / name, lambda path: shutil.copyfile(mask, path))
    split = "train_aug" if "train_aug" in lists else "train_xml"
    if split == "train_xml" and lines == CLASSES:
        print(f"no train_aug: it takes SBD's list, as {folder}/train_aug.txt (docs/data.md: where "
              "it is); it needs no masks. Until then pass --split train_xml")
    return (f"{out}: {len(tables)} lists, {len(masks):,} masks; next:\n    python "
            f"train_cam.py --data {out} --split {split} --out runs/voc")


if __name__ == "__main__":
    run(main, parse_args())
