"""CAMs and segments of other programs, converted once into what make_pseudo.py and eval.py read.

  python prepare/foreign.py --data ROOT --split train --cams THEIRS --out cams
  python prepare/foreign.py --data ROOT --split train --segments SAM --out segments

--cams: THEIRS/NAME.npy holds a pickled dict, {class: map} (PSA, MCTformer, WeakTr), or {"keys":
classes, "high_res", "attn_highres" or "cam": maps} (IRN, CLIMS, AMN, CLIP-ES). docs/data.md says
how they may number the classes. OUT/NAME.npy is float16 (n, h, w), of the n shown classes in order.
--segments: SAM/NAME.json is the output of SAM's automatic mask generator (run lengths), or
SAM/NAME.npz a boolean array (s, H, W). A smaller segment lies on a larger
one. OUT/NAME.png is a picture (H, W) of 16 bits: the number of the segment, 0 for none.

Nothing in a pickle is executed.
"""
import argparse
import io
import json
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from coco import MISSING_IDS, outline_mask
from common import (
    InputError, Split, check_folder, claim, digest, folder_digest, progress, run, writing)


# ---- CAMs ----------------------------------------------------------------------------------------

class PickledType:
    """What a pickle calls numpy.dtype: numbers and "O", a Python object, nothing made of parts."""

    def __init__(self, name, *_):
        if not re.fullmatch("b1|[iu][1248]|f[248]|O8?", name):
            raise pickle.UnpicklingError(f"values of type {name}")
        self.name, self.order = name, "|"

    def __setstate__(self, state):
        self.order = state[1]


class PickledArray:
    """What a pickle calls numpy's _reconstruct: .array holds its numbers. NumPy's own would follow
    pointers found in the bytes."""

    def __init__(self, *_):
        self.array = None

    def __setstate__(self, state):
        _, shape, kind, fortran, data = state
        if kind.name[0] == "O":
            (self.array,), () = data, shape
        else:
            self.array = np.frombuffer(data, kind.order + kind.name).reshape(
                shape, order="F" if fortran else "C")


class PlainUnpickler(pickle.Unpickler):
    """Numbers, arrays and tensors of them, plain types. A pickle that names anything else is
    refused before that is imported."""

    KNOWN = {
        "numpy.ndarray": None, "numpy.dtype": PickledType, "collections.OrderedDict": dict,
        "multiarray._reconstruct": PickledArray,
        "multiarray.scalar": lambda kind, data: np.frombuffer(data, kind.order + kind.name)[0],
        "torch._utils._rebuild_tensor_v2":
            lambda *parts: torch._utils._rebuild_tensor_v2(*parts).detach(),
        "torch.storage._load_from_bytes":  # a pickle within the pickle
            lambda data: torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)}

    def find_class(self, module, name):
        name = f"{module}.{name}".replace("numpy.core.", "").replace("numpy._core.", "")
        if name not in self.KNOWN:
            raise pickle.UnpicklingError(f"its pickle asks for {name}, which is not executed")
        return self.KNOWN[name]


def plain(value):
    return value.array if isinstance(value, PickledArray) else value


def read_maps(path):
    """NAME.npy of another program -> {its number of a class: map float32 (h, w)}"""
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            data = plain(PlainUnpickler(file).load())
        ids, maps = data.keys(), data.values()
        if "keys" in data:
            name = [key for key in ("high_res", "attn_highres", "cam") if key in data][0]
            ids, maps = plain(data["keys"]), plain(data[name])
        found = dict(zip(map(int, ids), map(plain, maps), strict=True))
        for number, cam in found.items():
            if len(cam.shape) != 2 or not 0 < cam.shape[0] * cam.shape[1] < 2**28:
                raise ValueError(f"a map of shape {tuple(cam.shape)}")
            found[number] = np.asarray(cam, np.float32)
        return found
    except Exception as error:  # a broken pickle raises anything, what is called a map may be that
        raise InputError(f"{path}: no readable CAMs ({str(error).partition(chr(10))[0]:.200}); "
                         "expected a dict of maps as PSA, MCTformer, WeakTr, IRN, CLIMS, AMN and "
                         "CLIP-ES write; pass their folder and the labels they had") from None


def numberings(num_classes):
    """{name: the numbers that a program may give our K classes, then the background's or None}"""
    found = {"from 0": (range(num_classes), None),
             "from 1, background 0": (range(1, num_classes + 1), 0)}
    if num_classes == 80:
        ids = [i for i in range(1, 91) if i not in MISSING_IDS]
        found |= {"COCO's category ids less 1": ([i - 1 for i in ids], None),
                  "COCO's category ids, background 0": (ids, 0)}
    return found


def choose_numbering(keys, shown, every):
    """keys [set of numbers in a file], shown [the classes of its photo, from 0], file by file;
    every: what `numberings` returns -> name of the one that fits the whole list, or None"""
    def fits(numbers, background, exactly):
        all_maps = {*range(max(numbers) + 1)} - ({0} if background == 0 else set())
        for found, classes in zip(keys, shown):
            wanted, found = {numbers[k] for k in classes}, found - {background}
            if not wanted <= found or exactly and found not in (wanted, all_maps):
                return False
        return True

    for exactly in (False, True):  # the shown classes are there; and no others, or all
        good = [name for name, (numbers, background) in every.items()
                if fits(numbers, background, exactly)]
        if len(good) == 1:
            return good[0]
    return None


def foreign_cams(path, numbers):
    """NAME.npy of another program, its numbers of the n shown classes -> maps float16 (n, h, w) in
    [0, 1]"""
    found = read_maps(path)
    maps = [found[number] for number in numbers]
    if len({cam.shape for cam in maps}) != 1 or not all(np.isfinite(cam).all() for cam in maps):
        raise InputError(f"{path}: maps of several sizes, or values that are not finite; expected "
                         "maps of one size; make them again")
    maps = np.stack(maps)
    low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
    if low.min() < 0 or high.max() > 1.001:
        maps = (maps - low) / (high - low + 1e-12)  # each by its own range
    return maps.clip(0, 1).astype(np.float16)


# ---- Segments ------------------------------------------------------------------------------------

def read_masks(path, size):
    """NAME.json or NAME.npz -> the segments, one after the other, bool (H, W)"""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            masks = file[file.files[0]]
        if masks.dtype != bool or masks.shape[1:] != size:
            raise ValueError(f"an array of {masks.dtype} {masks.shape}")
        yield from masks
        return
    data = json.loads(path.read_text(encoding="utf-8"))
    for part in data["annotations"] if isinstance(data, dict) else data:
        yield outline_mask(part["segmentation"], size)


def segment_file(folder, name):
    path = Path(folder, f"{name}.npz")
    return path if path.is_file() else path.with_name(f"{name}.json")


def read_segments(folder, name, size):
    """folder/NAME.json or NAME.npz, of a photo of size (H, W) -> uint16 (H, W), 0 for no segment"""
    path = segment_file(folder, name)
    try:
        labels, area = np.zeros(size, np.uint16), np.full(size, np.inf)  # of the pixel's segment
        for number, mask in enumerate(read_masks(path, size), 1):
            on_top = mask & (mask.sum() <= area)
            labels[on_top], area[on_top] = number, mask.sum()
        return labels
    except Exception as error:  # a json may hold anything
        raise InputError(f"{path}: no readable segments ({type(error).__name__}: {error}); "
                         f"expected NAME.json of SAM, or NAME.npz with a boolean array (segments, "
                         f"H, W), H and W {size}; make it again") from None


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="CAMs or segments of other programs -> ours.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, source = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    add("--data", required=True, metavar="ROOT", help="has classes.txt, SPLIT.csv and the photos")
    add("--split", default="train", help="ROOT/SPLIT.csv: the labels that the program was given")
    source.add_argument("--cams", metavar="THEIRS", help="folder of NAME.npy, pickled dicts")
    source.add_argument("--segments", metavar="SAM", help="folder of NAME.json or NAME.npz")
    add("--out", required=True, metavar="DIR", help="another folder, where the results go")
    add("--resume", action="store_true", help="go on with a run of the same inputs, whose finished "
        "files are kept")
    return parser.parse_args(argv)


def main(args):
    split, out = Split(args.data, args.split), Path(args.out)
    source, ending = Path(args.cams or args.segments), ".npy" if args.cams else ".png"
    names = [name for name in split.names if args.segments or split.labels[name].any()]
    files = [f"{name}.npy" if args.cams else segment_file(source, name).name for name in names]
    there = folder_digest(source, files, "pass the list that the program was given")
    record = {"script": "foreign.py", "photos": split.digest,
              "files": digest([there, *(digest(source / file) for file in files)])}
    if args.cams:  # as train_cam.py's export has it, for make_pseudo.py and eval.py
        shown = {name: split.present(name).tolist() for name in split.names}
        record |= {"classes": split.classes, "shown": shown}
    written = [name + ending for name in split.names]
    target = out, written, record, args.resume, [*split.folders, source]
    check_folder(*target)
    if args.cams:
        every = numberings(len(split.classes))
        keys = [set(read_maps(source / file)) for file in progress(files, "read")]
        numbering = choose_numbering(keys, [split.present(name) for name in names], every)
        if numbering is None:
            raise InputError(f"{source}: maps of the classes {sorted(set().union(*keys))}, which "
                             "fit no numbering of all files, or several; expected one of "
                             f"{', '.join(every)}; pass the labels that the program was given")
        numbers, _ = every[numbering]
        print(f"{source}: classes are numbered {numbering}")
    claim(*target)
    left = [name for name in names if not (out / (name + ending)).is_file()]
    for name in progress(left, "converted"):
        if args.cams:
            maps = foreign_cams(source / f"{name}.npy", [numbers[k] for k in split.present(name)])
        else:
            picture = Image.fromarray(read_segments(source, name, split.size(name)))
        with writing(out / (name + ending)) as path:
            np.save(path, maps) if args.cams else picture.save(path)
    flags = f"--cams {out}" if args.cams else f"--segments {out} --cams cams"
    return (f"{out}: {len(names)} files, {len(left)} of them new; next:\n    python make_pseudo.py "
            f"--data {args.data} --split {args.split} {flags} --out masks")


if __name__ == "__main__":
    run(main, parse_args())
