"""How toy.py, voc.py and coco.py write our layout: nothing is replaced, what is there is kept."""
import csv
import io

from common import InputError, Split, check_folder, claim, writing


def claim_all(parts, resume, reads=()):
    """common.claim of each {folder: (files, record)}, once all of them are allowed. A line names
    --out, and suggests to remove masks alone, never lists."""
    try:
        for begin in (check_folder, claim):
            for folder, (files, record) in parts.items():
                begin(folder, files, record, resume, reads)
    except InputError as error:
        line = str(error).replace("another folder", "another --out")
        raise InputError(line if folder.name == "masks" else line.partition(", or remove")[0]
                         ) from None


def write_missing(path, write):
    """write(temporary path) makes the file, where there is none"""
    if not path.exists():
        with writing(path) as temporary:
            write(temporary)


def write_lists(root, lines, tables):
    """ROOT/classes.txt of these lines, and ROOT/SPLIT.csv of {split: [(path, classes)]}. Boxes and
    masks of VOC and COCO refer to the stored pixels."""
    text = "\n".join([Split.AS_STORED, *lines, ""])
    write_missing(root / "classes.txt", lambda path: path.write_text(text, encoding="utf-8"))
    for split, table in tables.items():
        rows = io.StringIO()
        csv.writer(rows, lineterminator="\n").writerows(table)
        write_missing(root / f"{split}.csv",
                      lambda path: path.write_text(rows.getvalue(), encoding="utf-8"))
