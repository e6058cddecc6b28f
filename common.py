"""What the stages share and what says nothing about the method: one line for a user's mistake,
processes, files that are whole or absent, what may be written where, the data layout, and the loop
of both trainings, without their losses.

The data layout (docs/data.md): ROOT/classes.txt, ROOT/SPLIT.csv with a line `PATH,CLASS;CLASS`
per photo, ROOT/masks/NAME.png.
"""
import ast
import csv
import datetime
import difflib
import hashlib
import http.client
import io
import json
import math
import os
import sys
import time
from contextlib import contextmanager
from functools import cached_property, lru_cache, reduce
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

RANK, LOCAL_RANK = (int(os.environ.get(key, 0)) for key in ("RANK", "LOCAL_RANK"))  # torchrun's
WORLD = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
QUIET = None if RANK == 0 else True  # tqdm's disable: one process shows bars, in a terminal alone
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]


# ---- A user's mistake ----------------------------------------------------------------------------

class InputError(Exception):
    """One line for the user: what was read, what was expected, what fixes it."""


def run(main, args):
    """main(args); it returns what it wrote and what comes next, which is printed.
    InputError, and files that cannot be written, become one line and exit code 2."""
    Image.MAX_IMAGE_PIXELS = None  # open_image limits the size: Pillow's warning is not for threads
    try:
        told = main(args)
        if told and RANK == 0:
            print(told)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (InputError, OSError) as error:
        line = (str(error) or repr(error)).strip().splitlines()[-1]  # after a worker's traceback
        print(f"error: {line.removeprefix('common.InputError: ')}", file=sys.stderr)
        sys.exit(2)


# ---- Devices and processes -----------------------------------------------------------------------

def start_processes(device):
    """Join torchrun's process group, if there is one. auto, cpu or cuda -> torch.device"""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device; use --device cpu")
    cuda = torch.cuda.is_available() and device != "cpu"
    if cuda:
        torch.cuda.set_device(LOCAL_RANK)
    if "RANK" in os.environ and not dist.is_initialized():
        if missing := {"WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - set(os.environ):
            raise InputError(f"RANK is set and {min(missing)} is not; start by torchrun, which "
                             "sets both, or unset RANK")
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=12))
    allow_tf32(False)
    return torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def end_processes():
    wait_for_all()  # torchrun stops the other processes when one of them ends with an error
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_processes(x):
    """A tensor -> its sum over all processes, on the same device"""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def in_first_process(function):
    """function() of the first process -> its value, in all. What looks at files, or writes those
    that others look for, runs there alone: a late process would see what the first one made."""
    value = [function() if RANK == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(value)
    return value[0]


def allow_tf32(allowed):
    """Whether a GPU may round the factors of float32 products to 10 bits"""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def mixed_precision(device, precision):
    """Matrix products in bfloat16 or float16; weights and losses are float32 -> torch.autocast and
    GradScaler. auto: float32 on a CPU; on a GPU bfloat16, or float16 where it has none."""
    if precision == "auto" and device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if fast else "float16"
    dtype = torch.float32 if precision == "auto" else getattr(torch, precision)
    allow_tf32(dtype != torch.float32)
    return (torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
            torch.amp.GradScaler(device.type, enabled=dtype == torch.float16))


# ---- Files ---------------------------------------------------------------------------------------

@contextmanager
def writing(path):
    """A temporary path to write to, which takes path's place at the end: never half a file."""
    path = Path(path)
    temporary = path.with_name(f".writing.{path.name}")  # keeps the suffix, which Pillow looks at
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path, state):
    """torch.save by way of memory: torch's own stream calls a full disk a RuntimeError"""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with writing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def digest(data):
    """SHA-256 of a file, given as Path, or of plain values -> hexadecimal"""
    data = data.read_bytes() if isinstance(data, Path) else json.dumps(data).encode()
    return hashlib.sha256(data).hexdigest()


def folder_digest(folder, files, remedy):
    """SHA-256 of the names and sizes of these files in a folder, and of its made_of.json"""
    paths = [Path(folder, file) for file in files]
    if missing := [path for path in paths if not path.is_file()]:
        raise InputError(f"{missing[0]}: no such file, 1 of {len(missing)}; expected one for each "
                         f"photo, {len(files)} in all; {remedy}")
    return digest([[[path.name, path.stat().st_size] for path in paths], read_record(folder)])


# ---- Records: what may be written where ----------------------------------------------------------
# What a file was made of is its record, a dict of plain values: the script, hyper-parameters,
# digests of the inputs. A checkpoint holds it as "record", a folder of results in made_of.json.
# Nothing is deleted, and nothing is replaced but a training's own checkpoint and log.

def difference(before, now):
    """Two records -> the first key in which they differ, in words, or ''"""
    for key in now | before:
        if (old := json.dumps(before.get(key))) != (new := json.dumps(now.get(key))):
            return f"made with {key} {old:.30}, now it is {new:.30}"
    return ""


def read_record(folder):
    """The record of a folder of results -> dict, or None where made_of.json is not there"""
    note = Path(folder, "made_of.json")
    try:
        record = json.loads(note.read_text()) if note.exists() else None
        if not isinstance(record, dict | None):
            raise ValueError("not a record")
        return record
    except (OSError, ValueError) as error:
        raise InputError(f"{note}: not readable ({error}); expected the record of the files beside "
                         "it; pass another folder") from None


def check_folder(folder, files, record, resume=None, reads=()):
    """Raises InputError if a run must not write these files: some are there already, and it is not
    --resume with the record of the same inputs; or the run reads from there. record None: nothing
    may be there; resume None: the script has no --resume."""
    folder = Path(folder)
    for to in {(folder / file).parent for file in files}:
        if to.exists() and any(os.path.exists(x) and to.samefile(x) for x in reads):
            raise InputError(f"{to}: this run reads from there; pass another folder to write to")
    before = read_record(folder)
    there = [path for file in files if (path := folder / file).exists()]
    if before is None and there:
        raise InputError(f"{there[0]}: is there already, and no made_of.json says that a run of "
                         "ours made it; pass another folder")
    same = record is not None and not difference(before or {}, record)
    if before is None or resume and same:
        return
    what = "of the same inputs" if same else "" if record is None else difference(before, record)
    ways = ["add --resume to go on"] if same and resume is not None else []
    ways.append("pass another folder")
    if {path.name for path in folder.glob("[!.]*")} <= {*files, "made_of.json"}:
        ways.append("remove this one, which holds nothing else")
    raise InputError(f"{folder}: holds an earlier run {what}; {', or '.join(ways)}")


def claim(folder, files, record, resume=None, reads=()):
    """Begin a folder of results, or go on with it, as check_folder allows."""
    def look_and_write():
        check_folder(folder, files, record, resume, reads)
        with writing(Path(folder, "made_of.json")) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")
    in_first_process(look_and_write)


def earlier_run(path, record, resume, ends=(".jsonl",)):
    """What --resume keeps of PATH.part and PATH.pt -> "begun", "finished", or None: the training
    begins. Raises InputError for files that it must not replace; ends: those of its texts."""
    others, command = [], f"--phase {record['phase']}" if "phase" in record else "this command"
    for end, found in ((".part", "begun"), (".pt", "finished")):
        if (file := path.with_suffix(end)).is_file():
            before = read_checkpoint(file, "record", "pass another --out")["record"]
            if resume and not difference(before, record):
                return found
            others.append(f"{file}: {difference(before, record)}")
    if resume and others:
        raise InputError(f"{others[-1]}; {command} without --resume makes it again, then run what "
                         "follows; or pass another --out")
    texts = [file for end in ends if (file := path.with_suffix(end)).exists() and not others]
    if texts := [*texts, *snapshots(path)]:
        raise InputError(f"{texts[0]}: of another run; pass another --out")
    return None


def snapshots(path):
    """PATH-STEP.pt of a training, as --snapshots writes them"""
    return sorted(path.parent.glob(f"{path.name}-[0-9]*.pt"))


# ---- Weights -------------------------------------------------------------------------------------

def fetch_weights(url, sha256):
    """The file at url, whose SHA-256 begins with these digits, downloaded once -> Path"""
    path = Path(torch.hub.get_dir(), "checkpoints", url.split("/")[-1])
    if LOCAL_RANK == 0 and not path.exists():  # one process of a machine
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), sha256, progress=sys.stderr.isatty())
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise InputError(f"cannot download {url} ({error}); run again, or fetch it by hand "
                             f"and save it as {path}") from None
    wait_for_all()
    if not (found := digest(path)).startswith(sha256):
        raise InputError(f"{path}: its SHA-256 begins with {found[:8]}; expected the published "
                         f"file's, {sha256[:8]}; remove it, and it is downloaded again")
    return path


def read_tensors(path, expected):
    """A file of torch.save -> its tensors and plain types; nothing in it is executed."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle raises anything
        raise InputError(f"{path}: {type(error).__name__}; expected {expected}") from None


def read_checkpoint(path, key, remedy):
    """A checkpoint of this project -> dict. key: the entry that makes it the right one"""
    state = read_tensors(path, f"a checkpoint of this project; {remedy}")
    if not isinstance(state, dict) or not {key, "record"} <= set(state):
        raise InputError(f"{path}: has no {key!r}; expected another checkpoint; {remedy}")
    return state


def load_weights(make, state, path, expected):
    """make() with the tensors of a state dict. Built on the meta device; all keys must match."""
    try:
        with torch.device("meta"):
            model = make()
        model.load_state_dict(state, assign=True)
        return model
    except Exception as error:  # sizes and tensors may be anything
        reason = " ".join(str(error).split())[:150]
        raise InputError(f"{path}: does not fit ({reason}); expected {expected}") from None


def check_classes(path, found, split):
    if found != split.classes:
        raise InputError(f"{path}: trained for {len(found)} classes, {', '.join(found[:4])}, ...; "
                         f"the data has {len(split.classes)}: {', '.join(split.classes[:4])}, ...; "
                         "use the data that it was trained for")


# ---- Photos, label pictures, and the data layout -------------------------------------------------

PALETTE = [sum(((i >> (3 * j + c)) & 1) << (7 - j) for j in range(8))
           for i in range(256) for c in range(3)]  # VOC's colours
MOST_PIXELS = 2**30 // 12  # 89 million; Pillow warns of more
UNREADABLE = (OSError, SyntaxError, ValueError)  # what Pillow raises
Turn = Image.Transpose
TURNS = {2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM, 5: Turn.TRANSPOSE,
         6: Turn.ROTATE_270, 7: Turn.TRANSVERSE, 8: Turn.ROTATE_90}  # by EXIF orientation


def open_image(path):
    """Image.open; more than 89 million pixels are a ValueError"""
    image = Image.open(path)
    if math.prod(image.size) > MOST_PIXELS:
        raise ValueError(f"{image.size} pixels, more than {MOST_PIXELS:,}")
    return image


def read_image(path, upright=True, header=False):
    """A file -> PIL image, RGB; header: its size (H, W) alone, of which no pixel is decoded.
    upright: turned as its EXIF orientation says"""
    try:
        with open_image(path) as image:
            if image.format == "TIFF":
                image.load()  # Pillow turns a TIFF while it loads it
            orientation = image.getexif().get(0x0112) if upright else None
            if header:
                return image.size[::1 if orientation in (5, 6, 7, 8) else -1]
            if image.mode == "F":
                raise ValueError("real numbers; expected 8 or 16 bits a pixel")
            if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut at 255
                image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
            if orientation in TURNS:
                image = image.transpose(TURNS[orientation])
            return image.convert("RGB")
    except UNREADABLE as error:
        raise InputError(f"{path}: not a readable image ({error}); expected a JPEG, a PNG or "
                         "another image file; replace it") from None


def label_picture(labels):
    """labels uint8 (H, W): 0 background, 1..K classes, 255 ignore -> palette picture"""
    picture = Image.fromarray(labels)
    picture.putpalette(PALETTE)
    return picture


def write_labels(path, labels):
    with writing(path) as temporary:
        label_picture(labels).save(temporary)


def read_labels(path, size, num_labels):
    """A label PNG -> uint8 (H, W). size: (H, W) of its photo, or None; num_labels: K + 1"""
    try:
        with open_image(path) as picture:
            if picture.mode not in ("P", "L"):
                raise ValueError(f"mode {picture.mode}: colours, not class numbers")
            labels = np.array(picture)
        if size not in (None, labels.shape):
            raise ValueError(f"{labels.shape} pixels (height, width), its photo {size}")
        if (largest := labels[labels < 255].max(initial=0)) >= num_labels:
            raise ValueError(f"label {largest}: of another class list, or COCO's 91 category ids?")
        return labels
    except UNREADABLE as error:
        raise InputError(f"{path}: no readable label picture ({error}); expected a palette or grey "
                         f"PNG of the photo's size with 0 to {num_labels - 1} or 255 (ignore)"
                         ) from None


class Split:
    """ROOT/classes.txt and ROOT/SPLIT.csv. Opens no photo and no mask.

    names: of the photos, without folder and ending; CAMs and masks have the same. paths {name:
    file}; labels {name: (K,) bool}; classes (K); words (K), the wording that CLIP sees; nouns, of
    ROOT/nouns.txt, or None; upright: whether EXIF orientation counts; digest: of names, labels,
    EXIF switch and sizes in bytes; folders: of the photos and their masks, in which nothing is
    written."""

    AS_STORED = ": ignore exif"  # first line of classes.txt; a class has a name before its colon

    def __init__(self, root, split):
        self.root, self.split = Path(root), split
        lines = self.read("classes.txt", "a class per line")
        self.upright = lines[:1] != [self.AS_STORED]
        lines = lines if self.upright else lines[1:]
        parts = [line.partition(":") for line in lines if line and line[0] != "#"]
        self.classes = [name.strip() for name, _, _ in parts]
        self.words = [words.strip() or name.strip() for name, _, words in parts]
        number = {name: k for k, name in enumerate(self.classes)}
        if not 0 < len(number) == len(self.classes) < 255 or {"", "background"} & set(number):
            raise InputError(f"{self.root / 'classes.txt'}: {len(self.classes)} classes, "
                             f"{len(number)} different ones; expected 1 to 254, each once, none "
                             "empty or called background")
        own = (self.root / "nouns.txt").is_file()
        self.nouns = self.read("nouns.txt", "a word per line") if own else None
        self.paths, self.labels, table = {}, {}, self.root / f"{split}.csv"
        for row in self.read(table.name, "a line `PATH,CLASS;CLASS` per photo", csv.reader):
            if not row:  # an empty line
                continue
            found = [name.strip() for name in ";".join(row[1:]).split(";") if name.strip()]
            path = self.root / row[0].strip()
            if unknown := [name for name in found if name not in number]:
                raise InputError(f"{table}: class {unknown[0]!r} of {row[0]} is not in "
                                 "classes.txt; correct one of the two files")
            name = path.stem
            if name in self.paths or not os.path.isfile(path):
                problem = "a second photo of this name" if name in self.paths else "no such photo"
                raise InputError(f"{table}: {','.join(row)}: {problem} in {self.root}; expected a "
                                 "file for each line, with different names")
            self.paths[name] = path
            self.labels[name] = shown = np.zeros(len(self.classes), bool)
            for each in found:
                shown[number[each]] = True
        self.names = list(self.paths)
        if not self.names:
            raise InputError(f"{table}: empty; expected a line `PATH,CLASS;CLASS` per photo")
        self.folders = {self.root / "masks", *(path.parent for path in self.paths.values())}

    @cached_property
    def digest(self):
        photos = [[name, self.present(name).tolist(), os.path.getsize(path)]
                  for name, path in self.paths.items()]
        return digest([self.classes, self.upright, photos])

    def read(self, file, expected, parse=list):
        try:
            text = (self.root / file).read_text(encoding="utf-8-sig")
            if "\0" in text:
                raise ValueError("not a text")
            return list(parse([line.strip() for line in text.splitlines()]))
        except (OSError, ValueError, csv.Error) as error:
            raise InputError(f"{self.root / file}: not readable ({error}); expected {expected}; "
                             "prepare/ writes it (docs/data.md)") from None

    def image(self, name):
        """PIL, RGB"""
        return read_image(self.paths[name], self.upright)

    def __getitem__(self, name):
        return name, self.image(name)

    def size(self, name):
        """(H, W) of a photo, from its header"""
        return read_image(self.paths[name], self.upright, header=True)

    def present(self, name):
        """The classes that a photo shows, (n,)"""
        return np.flatnonzero(self.labels[name])


def load_photos(split, names, title, workers):
    """(name, PIL photo) of these names, read by so many processes while this one computes"""
    return progress(DataLoader(split, batch_size=None, sampler=names, num_workers=workers), title)


def progress(items, title):
    """The items, with a bar in a terminal; in a log a line for each tenth"""
    for i, item in enumerate(tqdm(items, title, disable=QUIET), 1):
        yield item
        tenths = [10 * n // len(items) for n in (i - 1, i)]
        if RANK == 0 and not sys.stdout.isatty() and tenths[0] < tenths[1]:
            print(f"{title}: {i} of {len(items)}", flush=True)


# ---- Training ------------------------------------------------------------------------------------

class Training:
    """The loop of a training, without what it learns:

        for image, labels in loop.batches():
            with loop.autocast:
                loss = ...
            loop.step({"loss": loss}, n)
        loop.finish()

    It writes about 60 times, and at least every 500 steps, PATH.part, from which --resume continues
    exactly, and the log, PATH.jsonl; at the end PATH.pt.

    path: OUT/NAME, without ending; photos: a Dataset; recipe: hyper-parameters; record: what the
    checkpoint is made of; optimizer(parameter groups, lr, weight_decay); rate(step, recipe): the
    learning rate of a step from 0 on; state(): what PATH.pt holds; snapshots: how many PATH-STEP.pt
    to write on the way"""

    def __init__(self, path, model, photos, recipe, record, args, device, optimizer, rate, state,
                 snapshots=0):
        if recipe["batch"] < WORLD or args.workers < 0:
            raise InputError(f"batch {recipe['batch']}, --workers {args.workers}; expected an "
                             f"image for each of {WORLD} processes, and 0 or more workers")
        self.path, self.recipe, self.record, self.args = path, recipe, record, args
        self.photos, self.device, self.rate, self.state = photos, device, rate, state
        groups = [{"params": [], "lr_scale": recipe.get("backbone_lr", 1)},
                  {"params": [], "lr_scale": 1}]  # backbone, the rest
        for name, p in model.named_parameters():
            if p.requires_grad:
                groups[0 if name.startswith("backbone.") else 1]["params"].append(p)
        self.optimizer = optimizer(groups, lr=recipe["lr"], weight_decay=recipe["weight_decay"])
        self.autocast, self.scaler = mixed_precision(device, args.precision)
        self.parts = {"model": model, "optimizer": self.optimizer, "scaler": self.scaler}
        self.done, self.rows, self.sums = 0, [], 0  # steps, rows of the log, sums since the last
        if in_first_process(lambda: earlier_run(path, record, args.resume)) == "begun":
            begun = read_checkpoint(path.with_suffix(".part"), "model", "pass another --out")
            for name, part in self.parts.items():
                if begun[name]:  # a GradScaler's is empty if the precision needed none
                    part.load_state_dict(begun[name])
            self.done, self.rows = begun["step"], begun["rows"]
        steps = recipe["steps"]
        self.every = max(1, min(steps // 60, 500))  # steps from one save to the next
        self.snapshot_steps = {min(steps, self.every * round(steps * i / snapshots / self.every))
                          for i in range(1, snapshots + 1)}
        self.save_part()  # a full disk shows before the first step
        self.model = DistributedDataParallel(model) if WORLD > 1 else model
        if RANK == 0:
            epochs = steps * recipe["batch"] / len(photos)
            print(f"{path.name}: {len(photos):,} photos, {steps:,} steps of {recipe['batch']}, "
                  f"{epochs:.3g} epochs", flush=True)
        self.start, self.began = self.done, time.time()
        self.bar = tqdm(total=steps, initial=self.done, desc=path.name, disable=QUIET)

    def batches(self):
        """image (B, 3, H, W) on the device, labels on the CPU, of the steps that are left"""
        self.model.train()
        order = image_order(len(self.photos), self.recipe, self.args.seed, self.done)
        for image, labels in DataLoader(self.photos, batch_sampler=order,
                                        num_workers=self.args.workers,
                                        pin_memory=self.device.type == "cuda"):
            for group in self.optimizer.param_groups:
                group["lr"] = group["lr_scale"] * self.rate(self.done, self.recipe)
            self.done += 1
            torch.manual_seed(mixed_seed(self.args.seed, self.done, RANK))  # dropout, drop path
            yield image.to(self.device, non_blocking=True), labels

    def step(self, losses, n):
        """One step down losses["loss"]. losses {name: mean over n things}, all of them logged"""
        self.optimizer.zero_grad()
        self.scaler.scale(losses["loss"] * share_of_all(n, self.device)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        n = torch.full((), n, dtype=torch.float64, device=self.device)
        self.sums = self.sums + torch.stack([n, *(x.detach() * n for x in losses.values())])
        self.bar.update()
        if self.done in self.snapshot_steps:  # before the .part: if killed in between, once more
            self.save(f"{self.path.name}-{self.done}.pt", self.state())
        if self.done % self.every == 0 or self.done == self.recipe["steps"]:
            self.log(losses)

    def finish(self, state=None):
        """Write PATH.pt, which takes the place of an earlier one. It holds `state`, or state()."""
        self.save(f"{self.path.name}.pt", state or self.state())
        if RANK == 0:
            self.path.with_suffix(".part").unlink()
        wait_for_all()

    def save(self, name, state):
        if RANK == 0:
            save(self.path.with_name(name), state | {"record": self.record})

    def save_part(self):
        state = {name: part.state_dict() for name, part in self.parts.items()}
        self.save(f"{self.path.name}.part", state | {"step": self.done, "rows": self.rows})
        if RANK == 0:
            with writing(self.path.with_suffix(".jsonl")) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def log(self, losses):
        """A row of the log: the means since the last one. Then save."""
        n, *sums = sum_over_processes(self.sums).tolist()
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not (math.isfinite(sums[0]) and all(p.isfinite().all() for p in weights)):
            first = self.rows[-1]["step"] + 1 if self.rows else 1
            raise InputError(f"{self.path}: a loss or weight is not finite in steps {first} to "
                             f"{self.done}; begin again with a lower lr")
        batch, took = self.recipe["batch"], (time.time() - self.began) / (self.done - self.start)
        self.rows.append({
            "phase": self.path.name, "step": self.done,
            "epoch": round(self.done * batch / len(self.photos), 2),
            **{key: round(x / max(1, n), 5) for key, x in zip(losses, sums)},
            "lr": self.optimizer.param_groups[-1]["lr"], "images_per_s": round(batch / took, 1),
            "eta_s": round(took * (self.recipe["steps"] - self.done)),
            "gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)})  # 0 on a CPU
        self.sums = 0
        self.save_part()
        if RANK == 0:
            tqdm.write(" | ".join(f"{key} {value:.3g}" if isinstance(value, float) else
                                  f"{key} {value}" for key, value in self.rows[-1].items()))


def share_of_all(n, device):
    """n / (mean n of all processes): turns DDP's mean of the gradients into that of the mean over
    all pairs. Nothing waits for the device."""
    if WORLD == 1:
        return 1
    total = sum_over_processes(torch.full((), float(n), device=device))
    return n * WORLD / total.clamp(min=1)


def mixed_seed(*numbers):
    """Whole numbers -> one seed for all of them"""
    return reduce(lambda seed, number: (seed * 1_000_003 + number) % 2**63, numbers)


@lru_cache(maxsize=4)
def shuffled(n, seed, epoch):
    generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
    return torch.randperm(n, generator=generator).tolist()


def image_order(n, recipe, seed, start=0):
    """The (epoch, i) of this process's images, step by step: shuffled passes over n photos, one
    after the other, are cut into batches, of which a process takes its part. An item depends on
    seed, epoch and i alone: resuming and more processes or workers change no image."""
    batch = recipe["batch"]
    for step in range(start, recipe["steps"]):
        part = range(step * batch + RANK, (step + 1) * batch, WORLD)
        yield [(at // n, shuffled(n, seed, at // n)[at % n]) for at in part]


def read_changes(args, recipe, choices):
    """--set KEY=VALUE ... of the recipe's keys -> {key: value}: literals of its types, whole ones
    above 0; --batch too"""
    changes, batch = {}, args.batch is not None and "batch" in recipe
    for word in [*[f"batch={args.batch}"] * batch, *args.set]:
        key, _, text = word.partition("=")
        if key not in recipe:
            near = difflib.get_close_matches(key, recipe, 1)
            raise InputError(f"--set {word}: no key {key}; expected one of "
                             f"{', '.join(sorted(recipe))}; {near[0] if near else 'KEY=VALUE'}?")
        old = recipe[key]
        try:
            value = text if isinstance(old, str) else ast.literal_eval(text)
            value = float(value) if isinstance(old, float) else value
            good = type(value) is type(old) and value in choices.get(key, [value])
        except (SyntaxError, TypeError, ValueError):
            good = False
        if not good or type(value) is int and value < 1:
            raise InputError(f"--set {word}: expected a value like "
                             f"{key}={'|'.join(choices.get(key, [str(old)]))}, above 0 if whole")
        changes[key] = value
    return changes


def schedule(recipe, photos, steps):
    """The batch and the steps of a recipe for so many photos, at most one of each in a batch.
    steps: --steps, or None"""
    if steps is not None and steps < 1:
        raise InputError(f"--steps {steps}: expected a number above 0")
    batch = min(recipe["batch"], photos)
    if batch < recipe["batch"] and RANK == 0:
        print(f"batch {batch}, not {recipe['batch']}: the list has no more photos")
    an_epoch = photos // batch if recipe.get("drop_last") else -(-photos // batch)
    return {"batch": batch, "steps": steps or recipe["epochs"] * an_epoch}
