"""What users get wrong: one line on stderr that begins with `error: `, exit code 2, nothing half-written."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, error_line, files_in
from PIL import Image

from clip_model import run
from train_cam import write_file


class World:
    """A copy of the toy data and the chain's outputs, for a user to damage. name is the first training image."""

    def __init__(self, toy, chain, folder):
        self.folder, self.data, self.name = folder, shutil.copytree(toy / "data", folder / "data"), "train_00000"
        self.out, self.masks, self.seg = (shutil.copytree(chain / part, folder / part) for part in ("cam", "masks", "seg"))
        self.cams, self.auto, self.bad = self.out / "cams", self.out / "cams/background.json", folder / "bad"
        self.clip, self.vit = toy / "clip.pt", toy / "vit.pth"  # too large to copy: not to be damaged
        self.csv, self.classes = self.data / "train.csv", self.data / "classes.txt"
        self.jpg, self.truth = self.data / f"images/{self.name}.jpg", self.data / f"masks/{self.name}.png"
        self.png, self.npy = self.masks / f"{self.name}.png", self.cams / f"{self.name}.npy"

    def flags(self, script):
        data, new = ["--data", self.data, "--split", "train"], ["--out", self.folder / "new"]
        weights, short = ["--clip", self.clip, "--vit", self.vit], [*TINY, "--steps", 1, "--batch", 12]
        return {"train_cam": [*data, *weights, "--out", self.out, *short],
                "make_pseudo": [*data, "--cams", self.cams, *new, "--device", "cpu"],
                "train_seg": [*data, "--labels", self.masks, "--vit", self.vit, *new, *short],
                "eval": [*data, "--json", self.folder / "new.json", "--device", "cpu"],
                "eval photos": ["--checkpoint", self.seg / "seg.pt", "--images", self.bad, "--save", self.folder / "new"],
                "clip_model": ["--image", self.jpg, "--clip", self.clip, "--device", "cpu", "a", "b"],
                "mask_generator": ["--vit", self.vit, "--image", self.jpg]}[script]


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new, 1))


def cut(path, size=200, to=None):
    Path(to or path).write_bytes(path.read_bytes()[:size])


def resize(path):
    with Image.open(path) as picture:
        picture.resize((30, 20)).save(path)


def relabel(path):
    labels = np.array(Image.open(path))
    labels[3:5] = 200
    Image.fromarray(labels).save(path)


def unfinished(phase, w):
    """A finished phase, as if it had been killed."""
    state = torch.load(w.out / f"{phase}.pt", weights_only=True)
    torch.save(state | {"optimizer": {}, "scaler": {}, "step": 1}, w.out / f"{phase}.part")
    (w.out / f"{phase}.pt").unlink()


def headless(path, to):
    state = torch.load(path, weights_only=True)["model"]
    torch.save({key: value for key, value in state.items() if not key.startswith("head.")}, to)


def folder_of(w, *files):
    w.bad.mkdir()
    for file in files:
        shutil.copy(w.jpg, w.bad / file)


NO_FOLDER, NOT_THERE = "expected a folder that can be written to", "no such file"
FIRST, NEXT = "--phase classify", "--phase match"
BAD = {  # script: (what was done, how, further flags, what the message says); {w.x} is an attribute of World
    "train_cam": [
        ("no root", lambda w: shutil.rmtree(w.data), FIRST, "{w.classes}: not readable"),
        ("no classes.txt", lambda w: w.classes.unlink(), FIRST, "{w.classes}: not readable"),
        ("no such split", None, f"{FIRST} --split train_aug", "train_aug.csv: not readable"),
        ("empty csv", lambda w: w.csv.write_text("\n"), FIRST, "{w.csv}: empty"),
        ("class twice", lambda w: edit(w.classes, "boat", "bird"), FIRST, "{w.classes}: 6 classes, 5 of them different"),
        ("unknown class", lambda w: edit(w.csv, "\n", ";unicorn\n"), FIRST, "{w.csv}, line 1: class 'unicorn'"),
        ("photo twice", lambda w: edit(w.csv, "00001", "00000"), FIRST, "{w.csv}, line 2: a second photo named {w.name}"),
        ("missing photo", lambda w: w.jpg.unlink(), FIRST, "{w.csv}, line 1: no photo 'images/{w.name}.jpg'"),
        ("cut photo", lambda w: cut(w.jpg), FIRST, "{w.jpg}: not a readable image"),
        ("cut photo, seen by a worker process", lambda w: cut(w.jpg), f"{FIRST} --workers 1", "{w.jpg}: not a readable image"),
        ("no CLIP", None, f"{NEXT} --clip {{w.bad}}", "{w.bad}: not a CLIP that can be read"),
        ("cut CLIP", lambda w: cut(w.clip, to=w.bad), f"{NEXT} --clip {{w.bad}}", "{w.bad}: not a CLIP that can be read"),
        ("ViT for CLIP", None, f"{NEXT} --clip {{w.vit}}", "{w.vit}: not a CLIP that can be read"),
        ("no ViT", None, f"{FIRST} --vit {{w.bad}}", "{w.bad}: no such file; expected a DeiT"),
        ("cut ViT", lambda w: cut(w.vit, to=w.bad), f"{FIRST} --vit {{w.bad}}", "{w.bad}: cannot be read as a PyTorch checkpoint"),
        ("CLIP for ViT", None, f"{FIRST} --vit {{w.clip}}", "{w.clip}: not a DeiT checkpoint"),
        ("match before classify", lambda w: (w.out / "classify.pt").unlink(), NEXT, "classify.pt: no such file; expected a check"),
        ("prompts before match", lambda w: (w.out / "match.pt").unlink(), "--phase prompts", "match.pt: no such file"),
        ("refine before prompts", lambda w: (w.out / "prompts.pt").unlink(), "--phase refine", "prompts.pt: no such file"),
        ("export before refine", lambda w: (w.out / "refine.pt").unlink(), "--phase export", "refine.pt: no such file"),
        ("cut checkpoint", lambda w: cut(w.out / "classify.pt"), NEXT, "classify.pt: not a readable checkpoint"),
        ("empty checkpoint", lambda w: cut(w.out / "prompts.pt", 0), "--phase refine", "prompts.pt: not a readable checkpoint"),
        ("prompts for a generator", None, "--phase export --checkpoint {w.out}/prompts.pt", "prompts.pt: holds no 'generator'"),
        ("a list for a checkpoint", lambda w: torch.save([1], w.bad), "--phase export --checkpoint {w.bad}", "holds no"),
        ("other classes", lambda w: edit(w.classes, "boat", "boat\nunicorn"), NEXT, "classify.pt: trained for 6 classes"),
        ("another recipe, finished", None, "--phase match --resume --batch 4 --steps 4",
         "match.pt: begun with steps 3, now it is 4; expected the same"),
        ("another seed, finished", None, "--phase match --resume --batch 4 --steps 3 --seed 1", "begun with seed 0, now it is 1"),
        ("another recipe, killed", lambda w: unfinished("match", w), "--phase match --resume --batch 4 --steps 3 --lambda-b 9",
         "match.part: begun with lambda_b 0.75, now it is 9.0; expected the same"),
        ("cut .part", lambda w: (unfinished("match", w), cut(w.out / "match.part")), "--phase match --resume", "match.part: not"),
        ("a file where a folder should be", None, f"{FIRST} --out {{w.out}}/refine.pt/new", NO_FOLDER),
        ("a file for --out", None, f"{FIRST} --out {{w.out}}/refine.pt", NO_FOLDER),
        ("a file for --cams", None, "--phase export --cams {w.out}/refine.pt/new", NO_FOLDER),
    ],
    "make_pseudo": [
        ("no root", lambda w: shutil.rmtree(w.data), "", "{w.classes}: not readable"),
        ("no CAMs", lambda w: shutil.rmtree(w.cams), "--background-score 0.4", "{w.npy}: no readable CAMs"),
        ("cut CAMs", lambda w: cut(w.npy), "", "{w.npy}: no readable CAMs"),
        ("empty CAMs", lambda w: cut(w.npy, 0), "", "{w.npy}: no readable CAMs"),
        ("objects as CAMs", lambda w: np.save(w.npy, np.array([{}]), allow_pickle=True), "", "{w.npy}: no readable CAMs"),
        ("CAMs of other classes", lambda w: np.save(w.npy, np.zeros((5, 10, 13), np.float16)), "", "{w.npy}: shape (5, 10, 13)"),
        ("CAMs of another size", lambda w: np.save(w.npy, np.zeros((1, 16, 16), np.float16)), "", "expected (1, 10, 13)"),
        ("CAMs of NaN", lambda w: np.save(w.npy, np.load(w.npy) * np.nan), "", "{w.npy}: no readable CAMs (values"),
        ("cut photo", lambda w: cut(w.jpg), "", "{w.jpg}: not a readable image"),
        ("a file where a folder should be", None, "--out {w.out}/refine.pt/new", NO_FOLDER),
        ("no background.json", lambda w: w.auto.unlink(), "", "{w.auto}: no background score found"),
        ("cut background.json", lambda w: cut(w.auto, 30), "", "{w.auto}: no background score found"),
        ("foreign background.json", lambda w: w.auto.write_text("{}"), "", "{w.auto}: no background score found"),
        *[(f"background score {score}", None, f"--background-score {score}", f"score {score}: expected auto or a number")
          for score in ("high", "7", "nan", "0", "-0.5", "inf")],
    ],
    "train_seg": [
        ("no labels", lambda w: w.png.unlink(), "", "{w.png}: no readable label image"),
        ("cut labels", lambda w: cut(w.png, 100), "", "{w.png}: no readable label image"),
        ("labels of another size", lambda w: resize(w.png), "", "{w.png}: 20x30 (height x width), its photo is 37x50"),
        ("labels of another class list", lambda w: relabel(w.png), "", "{w.png}: holds label 200; expected 0 to 6 or 255"),
        ("labels in colour", lambda w: Image.new("RGB", (50, 37)).save(w.png), "", "{w.png}: mode RGB; expected class numbers"),
        ("cut photo", lambda w: cut(w.jpg), "", "{w.jpg}: not a readable image"),
        ("no ViT", None, "--vit {w.bad}", "{w.bad}: no such file; expected a DeiT"),
        ("a file where a folder should be", None, "--out {w.out}/refine.pt/new", NO_FOLDER),
        ("another recipe, finished", None, "--resume --out {w.seg} --steps 4", "seg.pt: begun with steps 3, now it is 4"),
    ],
    "eval": [
        ("no predictions", None, "--pred {w.bad}", "{w.bad}/{w.name}.png: no readable label image"),
        ("prediction of another size", lambda w: resize(w.png), "--pred {w.masks}", "{w.png}: 20x30"),
        ("prediction of another class list", lambda w: relabel(w.png), "--pred {w.masks}", "{w.png}: holds label 200"),
        ("no truth", lambda w: w.truth.unlink(), "--pred {w.masks}", "{w.truth}: no readable label image"),
        ("truth of another size", lambda w: resize(w.truth), "--checkpoint {w.seg}/seg.pt --no-flip --scales 1 --crf none",
         "{w.truth}: 20x30 (height x width), its photo is 37x50"),
        ("other CAMs", lambda w: np.save(w.npy, np.zeros((5, 10, 13), np.float16)), "--cams {w.cams}", "{w.npy}: shape (5, "),
        ("no checkpoint", None, "--checkpoint {w.bad}", "{w.bad}: no such file; expected a checkpoint; train one with"),
        ("a generator for a segmenter", None, "--checkpoint {w.out}/refine.pt", "refine.pt: holds no 'segmenter'"),
        ("other classes", lambda w: edit(w.classes, "boat", "ship\nboat"), "--checkpoint {w.seg}/seg.pt", "trained for 6"),
        ("a file where a folder should be", None, "--pred {w.masks} --save {w.out}/refine.pt/new", NO_FOLDER),
        ("masks overwritten", None, "--pred {w.masks} --save {w.data}/masks", "holds photos or masks of the data"),
        ("photos overwritten", None, "--pred {w.masks} --save {w.data}/images", "holds photos or masks of the data"),
        ("empty column", None, "--pred {w.masks} --strip {w.bad} --columns x={w.seg}", "{w.seg}/train_"),
        *[(f"background score {score}", None, f"--cams {{w.cams}} --background-score {score}", f"score {score}: expected auto")
          for score in ("high", "7", "nan")],
    ],
    "eval photos": [
        ("no folder", None, "", "{w.bad}: 0 photos, 0 names"), ("empty folder", folder_of, "", "{w.bad}: 0 photos"),
        ("no photos", lambda w: folder_of(w, "notes.txt", ".hidden.jpg"), "", "{w.bad}: 0 photos, 0 names"),
        ("twins", lambda w: folder_of(w, "a.jpg", "a.png", "b.jpg"), "", "{w.bad}: 3 photos, 2 names before the dot; expected"),
        ("cut photo", lambda w: (folder_of(w, "a.jpg"), cut(w.bad / "a.jpg")), "", "{w.bad}/a.jpg: not a readable image"),
        ("photos overwritten", lambda w: folder_of(w, "a.png"), "--save {w.bad}", "{w.bad}: holds the photos"),
    ],
    "clip_model": [
        ("no photo", lambda w: w.jpg.unlink(), "", "{w.jpg}: not a readable image"),
        ("cut photo", lambda w: cut(w.jpg), "", "{w.jpg}: not a readable image"),
        ("no CLIP", None, "--clip {w.bad}", "{w.bad}: not a CLIP that can be read"),
        ("a text that is too long", None, 99 * "word.", "tokens, but CLIP reads 77"),
    ],
    "mask_generator": [
        ("no ViT", None, "--vit {w.bad}", "{w.bad}: no such file"),
        ("no classification head", lambda w: headless(w.vit, w.bad), "--vit {w.bad}", "{w.bad}: has no classification head"),
    ],
}


@pytest.mark.parametrize("script, damage, flags, says", [pytest.param(script, *row[1:], id=f"{script}: {row[0]}")
                                                         for script, rows in BAD.items() for row in rows])
def test_a_mistake_is_one_line_and_exit_code_2(script, damage, flags, says, toy, chain, tmp_path, capsys):
    world = World(toy, chain, tmp_path)
    if damage:
        damage(world)
    before = files_in(tmp_path)
    line = error_line(capsys, script.split()[0], *world.flags(script), *flags.format(w=world).split())
    assert says.format(w=world) in line
    assert files_in(tmp_path) == before


def test_exit_code_of_the_process(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "eval.py"), "--data", str(tmp_path), "--pred", str(tmp_path)],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(rf"error: {tmp_path}/classes.txt: not readable .*\n", done.stderr)


@pytest.mark.parametrize("flags, says", [
    ("--data D", "expected one of --pred, --cams, --checkpoint"), ("--data D --pred P --cams C", "expected one of --pred"),
    ("--pred P", "expected one of --data ROOT"), ("--data D --images I --checkpoint S --save O", "expected one of --data ROOT"),
    ("--images I --pred P --save O", "--images: photos alone can only be predicted"),
    ("--images I --cams C --save O", "--images: photos alone"), ("--images I --checkpoint S", "--save DIR"),
    ("--images I --checkpoint S --save O --json F", "no --json"), ("--images I --checkpoint S --save O --strip F", "no --strip"),
    ("--data D --pred P --oracle-sweep", "--oracle-sweep: tries background scores on CAMs"),
    ("--data D --checkpoint S --background-score 0.4", "--background-score: cuts CAMs"),
    ("--data D --pred P --crf voc", "--crf, --scales: of what a model predicts"),
    ("--data D --cams C --crf voc", "make_pseudo.py --crf"),
    ("--data D --pred P --scales 1 2", "--crf, --scales: of what a model predicts"),
    *[(f"--data D --checkpoint S --scales 1 {scale}", "expected numbers above 0") for scale in ("0", "-1", "nan", "inf")],
    ("--data D --pred P --columns a=b", "--columns: of the picture strip; expected --strip"),
    ("--data D --pred P --strip F --columns ab c=d", "--columns ab c=d: expected CAPTION=DIR")])
def test_flags_of_eval_that_do_not_go_together(flags, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert says in error_line(capsys, "eval", *flags.split()) and not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
@pytest.mark.parametrize("fill", [
    lambda file: torch.save({"weights": torch.zeros(9999)}, file.name), lambda file: file.write(bytes(9999)),
    lambda file: Image.new("L", (99, 99)).save(file, "png")], ids=["checkpoint", "bytes", "png"])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(fill, tmp_path, capsys):
    """A device that takes no byte stands for the disk that is full halfway through the file."""
    (tmp_path / "a.pt").write_text("old")

    def write(path):
        path.write_text("half")
        with open("/dev/full", "wb") as full:
            fill(full)
    with pytest.raises(SystemExit) as end:
        run(lambda _: write_file(tmp_path / "a.pt", write), None)
    line, = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith(f"error: {tmp_path}/a.pt: cannot be written (") and "make room" in line
    assert files_in(tmp_path) == {"a.pt": b"old"}
