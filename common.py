"""Helpers shared by the scripts; nothing here is part of the method: one line for a user's mistake,
processes, files that are whole or absent, the data layout, the training loop and its log.

The data layout (docs/data.md): ROOT/classes.txt, ROOT/SPLIT.csv with a line `PATH,CLASS;CLASS`
per photo, ROOT/masks/NAME.png.
"""
import ast
import csv
import datetime
import hashlib
import http.client
import io
import json
import math
import os
import sys
import time
import warnings
from contextlib import contextmanager
from functools import lru_cache, reduce
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
    """main(args). InputError, and files that cannot be written, become one line and exit code 2."""
    try:
        main(args)
    except (InputError, OSError) as error:
        line = (str(error) or repr(error)).strip().splitlines()[-1]  # after a worker's traceback
        print(f"error: {line.removeprefix('common.InputError: ')}", file=sys.stderr)
        sys.exit(2)


# ---- Devices and processes -----------------------------------------------------------------------

def start_processes(device):
    """Join torchrun's process group, if there is one. auto, cpu or cuda -> torch.device"""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device; use --device cpu")
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    cuda = torch.cuda.is_available() and device != "cpu"
    if cuda:
        torch.cuda.set_device(LOCAL_RANK)
    if "RANK" in os.environ and not dist.is_initialized():
        if missing := {"WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - set(os.environ):
            raise InputError(f"RANK is set and {min(missing)} is not; start by torchrun, which "
                             "sets both, or unset RANK")
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=12))
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


def mixed_precision(device, precision):
    """Matrix products in bfloat16 or float16; weights and losses are float32 -> torch.autocast and
    GradScaler. auto: float32 on a CPU; on a GPU bfloat16, or float16 where it has none."""
    if precision == "auto" and device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if fast else "float16"
    dtype = torch.float32 if precision == "auto" else getattr(torch, precision)
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
    note = Path(folder, "made_of.json")
    return digest([[[path.name, path.stat().st_size] for path in paths],
                   note.read_text() if note.is_file() else ""])


# What a file was made of is its record, a dict of plain values: hyper-parameters, and digests of
# the inputs. A checkpoint holds it as "record", a folder of PNG or .npy files in made_of.json.

def check_record(path, before, now):
    """--resume keeps what was made of the same inputs; else raises InputError."""
    for key in before | now:
        if (old := json.dumps(before.get(key))) != (new := json.dumps(now.get(key))):
            phase = f"--phase {now['phase']}" if "phase" in now else "this command"
            raise InputError(f"{path}: made with {key} {old:.20}, now it is {new:.20}; {phase} "
                             "without --resume makes it again, then run what follows; to keep it, "
                             "run the later phases alone, by name; or pass another --out")


def kept(path, record, resume):
    """The checkpoint at path if --resume keeps it, else None. One without a record is not ours to
    replace: InputError."""
    if path.is_file():
        state = read_checkpoint(path, "record", "pass another --out")
        if resume:
            check_record(path, state["record"], record)
            return state


def claim(folder, files, record, resume=False, reads=()):
    """Make a folder ready for these output files. It is ours if it holds made_of.json: old ones
    then go, or stay with --resume and the same record. InputError before anything changes."""
    note = Path(folder, "made_of.json")
    for place, ending in {(Path(folder, file).parent, Path(file).suffix) for file in files}:
        if place.exists() and any(os.path.exists(x) and place.samefile(x) for x in reads):
            raise InputError(f"{place}: this run reads from there; pass another folder to write to")
        others = [path for path in place.glob("[!.]*") if path.suffix.lower() == ending]
        if others and not note.is_file():
            raise InputError(f"{others[0]}: no run of ours made it (no made_of.json there); pass "
                             "another folder")
    if resume and note.is_file():
        return check_record(note, json.loads(note.read_text()), record)
    for file in files:
        Path(folder, file).unlink(missing_ok=True)
    with writing(note) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


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
TURNS = dict(zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2))))  # EXIF orientation


def open_image(path):
    """Image.open. More than 89 million pixels, of which Pillow warns, are an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(path)


def read_image(path, upright=True):
    """A file -> PIL image, RGB. upright: turned as its EXIF orientation says"""
    try:
        with open_image(path) as image:
            if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut at 255
                image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
            turn = TURNS.get(image.getexif().get(0x0112)) if upright else None
            return (image if turn is None else image.transpose(turn)).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Warning) as error:
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
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Warning) as error:
        raise InputError(f"{path}: no readable label picture ({error}); expected a palette or grey "
                         f"PNG of the photo's size with 0 to {num_labels - 1} or 255 (ignore)"
                         ) from None


class Split:
    """ROOT/classes.txt and ROOT/SPLIT.csv. Opens no photo and no mask.

    names: of the photos, without folder and ending; CAMs and masks have the same. paths {name:
    file}; labels {name: (K,) bool}; classes (K); words (K), the wording that CLIP sees;
    upright: whether EXIF orientation counts; digest: of names, labels, EXIF switch and sizes in
    bytes; folders: of the photos and their masks, in which nothing is written."""

    AS_STORED = ": ignore exif"  # first line of classes.txt; a class has a name before its colon

    def __init__(self, root, split):
        self.root, self.split = Path(root), split
        lines = self.read("classes.txt", "a class per line")
        self.upright = lines[:1] != [self.AS_STORED]
        lines = lines if self.upright else lines[1:]
        parts = [line.partition(":") for line in lines if line and line[0] != "#"]
        self.classes = [name.strip() for name, _, _ in parts]
        self.words = [words.strip() or name.strip() for name, _, words in parts]
        known = set(self.classes)
        if not 0 < len(known) == len(self.classes) < 255 or {"", "background"} & known:
            raise InputError(f"{self.root / 'classes.txt'}: {len(self.classes)} classes, "
                             f"{len(known)} different ones; expected 1 to 254, each once, none "
                             "empty or called background")
        self.paths, self.labels, table = {}, {}, self.root / f"{split}.csv"
        for row in self.read(table.name, "a line `PATH,CLASS;CLASS` per photo", csv.reader):
            found = [name.strip() for name in ";".join(row[1:]).split(";") if name.strip()]
            path = self.root / "".join(row[:1]).strip()
            if not row or path == self.root:
                continue
            if unknown := set(found) - known:
                raise InputError(f"{table}: class {min(unknown)!r} of {row[0]} is not in "
                                 "classes.txt; correct one of the two files")
            if not path.is_file() or path.stem in self.paths:
                problem = "a second photo of this name" if path.is_file() else "no such photo"
                raise InputError(f"{table}: {row[0]}: {problem} in {self.root}; expected one file "
                                 "for each line, with different names")
            self.paths[path.stem] = path
            self.labels[path.stem] = np.array([name in found for name in self.classes])
        self.names = list(self.paths)
        if not self.names:
            raise InputError(f"{table}: empty; expected a line `PATH,CLASS;CLASS` per photo")
        self.folders = {self.root / "masks", *(path.parent for path in self.paths.values())}
        self.digest = digest([self.classes, self.upright, [
            [name, self.present(name).tolist(), path.stat().st_size]
            for name, path in self.paths.items()]])

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
        return read_image(self.paths[name], self.upright)

    def photo(self, name):
        return name, self.image(name)

    def present(self, name):
        """The classes that a photo shows, (n,)"""
        return np.flatnonzero(self.labels[name])


def load_photos(split, names, title, device):
    """(name, PIL photo) of this process's part of the names, with a progress bar in a terminal. For
    a GPU other processes read them while it computes."""
    workers = min(8, os.cpu_count()) if device.type == "cuda" else 0
    return tqdm(DataLoader(names[RANK::WORLD], batch_size=None, collate_fn=split.photo,
                           num_workers=workers), title, disable=QUIET)


# ---- Training ------------------------------------------------------------------------------------

def train(path, model, step_loss, photos, recipe, rate, optimizer, args, device, result,
          replaced=(), snapshots=0, **frozen):
    """Minimise step_loss(model, image, labels, recipe, **frozen)["loss"] and write PATH.pt with
    what result() returns. photos: a Dataset; rate(step, recipe): the learning rate of a step from
    0 on; replaced: files of an earlier run that go when this one has begun; snapshots: how many
    PATH-STEP.pt to write on the way."""
    if recipe["batch"] < WORLD or args.workers < 0:
        raise InputError(f"batch {recipe['batch']}, --workers {args.workers}; expected an image "
                         f"for each of the {WORLD} processes, and 0 or more workers")
    groups = [{"params": [], "lr_scale": recipe.get("backbone_lr", 1)},
              {"params": [], "lr_scale": 1}]  # backbone, the rest
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[0 if name.startswith("backbone.") else 1]["params"].append(p)
    optimizer = optimizer(groups, lr=recipe["lr"], weight_decay=recipe["weight_decay"])
    autocast, scaler = mixed_precision(device, args.precision)
    journal = Journal(path, recipe, args.resume,
                      {"model": model, "optimizer": optimizer, "scaler": scaler})
    for file in replaced if RANK == 0 else ():  # not before: inputs were good, the disk had room
        file.unlink(missing_ok=True)
    every, steps = journal.every, recipe["steps"]
    at = {min(steps, every * round(steps * i / snapshots / every)) for i in range(1, snapshots + 1)}
    batches = load_batches(photos, recipe, journal.step, device, args.workers)
    ddp_model = DistributedDataParallel(model, broadcast_buffers=False) if WORLD > 1 else model
    ddp_model.train()
    for step, (image, labels) in enumerate(batches, journal.step + 1):
        torch.manual_seed(mixed_seed(recipe["seed"], step, RANK))  # for dropout and drop path
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * rate(step - 1, recipe)
        with autocast:
            losses, n = step_loss(ddp_model, image.to(device, non_blocking=True), labels, recipe,
                                  **frozen)
        optimizer.zero_grad()
        scaler.scale(losses["loss"] * share_of_all(n, device)).backward()
        scaler.step(optimizer)
        scaler.update()
        if step in at and RANK == 0:  # before the journal: a run resumed after it would skip this
            save(path.with_name(f"{path.name}-{step}.pt"), result() | {"record": recipe})
        journal.write(step, len(photos), losses, n)
    if RANK == 0:
        save(path.with_suffix(".pt"), result() | {"record": recipe})
        path.with_suffix(".part").unlink()
    wait_for_all()


def share_of_all(n, device):
    """n over its mean of all processes: scales the loss so that DDP's average equals the mean over
    all pairs. It stays on the device: nothing waits for it."""
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


def places(n, recipe, start):
    """The (epoch, i) of this process's images, step by step: shuffled passes over n photos, one
    after the other, are cut into batches, of which a process takes its part."""
    for step in range(start, recipe["steps"]):
        part = range(step * recipe["batch"] + RANK, (step + 1) * recipe["batch"], WORLD)
        yield [(place // n, shuffled(n, recipe["seed"], place // n)[place % n]) for place in part]


def load_batches(dataset, recipe, start, device, workers):
    """DataLoader of the steps after `start`. A batch depends on seed and step alone, an item on
    seed, epoch and i: resuming and more processes or workers change no image."""
    return DataLoader(dataset, batch_sampler=places(len(dataset), recipe, start),
                      num_workers=workers, pin_memory=device.type == "cuda")


class Journal:
    """What a run writes about 60 times, and at least every 500 steps: PATH.part, from which
    --resume continues exactly, and PATH.jsonl, its log. parts: what has a state_dict; step: the
    last one done."""

    def __init__(self, path, record, resume, parts):
        self.path, self.record, self.parts = path, record, parts
        self.every = max(1, min(record["steps"] // 60, 500))  # steps from one save to the next
        self.step, self.rows, self.sums = 0, [], 0
        if state := kept(path.with_suffix(".part"), record, resume):
            for name, part in parts.items():
                if state[name]:  # a GradScaler's is empty if the precision needed none
                    part.load_state_dict(state[name])
            self.step, self.rows = state["step"], state["rows"]
        self.save()
        self.start, self.began = self.step, time.time()
        self.bar = tqdm(total=record["steps"], initial=self.step, desc=path.name, disable=QUIET)

    def save(self):
        if RANK == 0:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            save(self.path.with_suffix(".part"),
                 state | {"step": self.step, "rows": self.rows, "record": self.record})
            with writing(self.path.with_suffix(".jsonl")) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, step, photos, values, n):
        """Add {name: mean over n} of a step to the sums; now and then, log and save. photos: how
        many an epoch has"""
        self.step, device, steps = step, values["loss"].device, self.record["steps"]
        n = torch.full((), n, dtype=torch.float64, device=device)
        self.sums = self.sums + torch.stack([n, *(x.detach() * n for x in values.values())])
        self.bar.update()
        if step % self.every and step < steps:
            return
        n, *sums = sum_over_processes(self.sums).tolist()
        weights = [p for p in self.parts["model"].parameters() if p.requires_grad]
        if not (math.isfinite(sums[0]) and all(p.isfinite().all() for p in weights)):
            first = self.rows[-1]["step"] + 1 if self.rows else 1
            raise InputError(f"{self.path}: a loss or weight is not finite in steps {first} to "
                             f"{step}; begin again with a lower lr")
        batch, took = self.record["batch"], (time.time() - self.began) / (step - self.start)
        self.rows.append({
            "phase": self.path.name, "step": step, "epoch": round(step * batch / photos, 2),
            **{key: round(x / max(1, n), 5) for key, x in zip(values, sums)},
            "lr": self.parts["optimizer"].param_groups[-1]["lr"],
            "images_per_s": round(batch / took, 1), "eta_s": round(took * (steps - step)),
            "gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)})  # 0 on a CPU
        self.sums = 0
        self.save()
        if RANK == 0:
            tqdm.write(" | ".join(f"{key} {value:.3g}" if isinstance(value, float) else
                                  f"{key} {value}" for key, value in self.rows[-1].items()))


def read_changes(args, recipe, choices):
    """--set KEY=VALUE ... of the recipe's keys -> {key: value}: literals of its types, whole ones
    above 0; --steps and --batch too, if the recipe has them"""
    changes, given = {}, {"steps": args.steps, "batch": args.batch}
    words = [f"{key}={n}" for key, n in given.items() if n is not None and key in recipe]
    for word in [*words, *args.set]:
        key, _, text = word.partition("=")
        try:
            old = recipe[key]
            value = text if isinstance(old, str) else ast.literal_eval(text)
            value = float(value) if isinstance(old, float) else value
            good = type(value) is type(old) and value in choices.get(key, [value])
        except (KeyError, SyntaxError, TypeError, ValueError):
            good = False
        if not good or type(value) is int and value < 1:
            raise InputError(f"--set {word}: expected KEY=VALUE, like one of " + ", ".join(
                f"{k}={'|'.join(choices.get(k, [str(recipe[k])]))}" for k in sorted(recipe)))
        changes[key] = value
    return changes
