"""docs/method.md shows the code that there is; experiments/ runs."""
import hashlib
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call, error_line, files_in
from PIL import Image
from test_prepare import voc_root

import ablation
import bench
import companion
import demo
import drawing
import one_photo
import toy as toy_world
from clip_model import class_texts, load_clip
from common import InputError, Split
from mask_generator import scaled_input
from train_cam import clip_view, cosine

TEXT = (ROOT / "docs/method.md").read_text(encoding="utf-8")
SCRIPTS = ("clip_model", "mask_generator", "train_cam", "make_pseudo", "train_seg", "eval")


def test_excerpts_are_the_code():
    found = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    sources = [(ROOT / f"{name}.py").read_text("utf-8")
               for name in (*SCRIPTS, "experiments/one_photo")]
    assert len(found) > 9
    for excerpt in found:
        assert any(excerpt in source for source in sources), excerpt


def test_names_in_the_text_exist():
    for script, name in set(re.findall(rf"`({'|'.join(SCRIPTS)})\.(?!py)(\w+)", TEXT)):
        assert hasattr(importlib.import_module(script), name), name


def test_pictures_are_there_and_all_are_shown():
    shown = set(re.findall(r"\]\(\.\./figures/method/([\w.]+)\)", TEXT))
    assert shown == {"tables.json", *companion.CAPTIONS}
    for path in re.findall(r"\]\(\.\./(figures/[\w/.]+)\)", TEXT):
        assert (ROOT / path).is_file()


@pytest.fixture(scope="module")
def run(toy, chain, tmp_path_factory):
    """The tiny chain with the files of a demo; a shorter list, for time"""
    run = tmp_path_factory.mktemp("run")
    shutil.copytree(toy / "data", run / "data")
    rows = (run / "data/train.csv").read_text().splitlines()[:6]
    (run / "data/train.csv").write_text("\n".join(rows))
    for folder in ("cam", "masks", "seg"):
        shutil.copytree(chain / folder, run / folder)
    for file in ("clip.pt", "vit.pth"):
        shutil.copy(toy / file, run)
    for phase in companion.PHASES:
        call("train_cam", "--data", run / "data", "--clip", run / "clip.pt", "--out", run / "cam",
             "--phase", "export", "--checkpoint", run / f"cam/{phase}.pt", "--cams",
             run / f"cams_{phase}", "--recipe", "toy", "--device", "cpu")
        scores = {"miou": 1.0, "oracle": {"miou": 2.0, "background_score": 0.5}, "images": 6,
                  "list": "train"}
        (run / f"{phase}.json").write_text(json.dumps(scores))
    (run / "demo.json").write_text(json.dumps({"seed": 0, "world": "", "generator": "vit",
                                               "steps": 3, "batch": 4}))
    (run / "full.json").write_text("{}")
    return run


def miou_of(labels, truth):
    """Of one photo, in percent, over the classes that either has"""
    found = [((labels == k) & (truth == k)).sum() / ((labels == k) | (truth == k)).sum()
             for k in np.union1d(labels, truth)]
    return 100 * np.mean(found)


def drawn(folder):
    page = (folder / "index.html").read_text()
    pictures = re.findall(r'<img src="([^"]+)" alt="([^"]+)">', page)
    assert len(pictures) == page.count("<img") and "http" not in page
    for source, _ in pictures:
        Image.open(folder / source).verify()
    return {source.removeprefix("companion/") for source, _ in pictures}


def check_tables(run, tables, tmp_path):
    """A value of each table, by hand or by eval.py"""
    split, clip = Split(run / "data", "train"), load_clip(run / "clip.pt")
    truth = {name: np.array(Image.open(run / f"data/masks/{name}.png")) for name in split.names}
    flags, saved = ["eval", "--data", run / "data", "--split", "train"], tmp_path / "saved"
    call(*flags, "--cams", run / "cams_match", "--json", tmp_path / "match.json")
    call(*flags, "--checkpoint", run / "seg/seg.pt", "--save", saved)
    miou = json.loads((tmp_path / "match.json").read_text())["miou"]
    assert tables["mIoU of labels"]["matching"] == pytest.approx(miou, abs=0.051)
    gains = []
    for name in split.names:
        pseudo, predicted = (miou_of(np.array(Image.open(folder / f"{name}.png")), truth[name])
                             for folder in (run / "masks", saved))
        gains.append(predicted > pseudo)
    assert tables["model better than its pseudo mask"] == f"{sum(gains)} of 6"
    on, changes, cosines = [], [], []
    for name in (name for name in split.names if split.labels[name].sum() == 1):
        there, (k,), photo = truth[name] > 0, split.present(name), split.image(name)
        maps = [np.load(run / f"cams_{phase}/{name}.npy")[0] for phase in ("match", "refine")]
        match, refine = (np.array(Image.fromarray(each.astype(np.float32)).resize(
            photo.size, Image.BILINEAR)) for each in maps)
        on.append([there.mean(), refine[there].sum() / max(refine.sum(), 1e-9)])
        changes.append([(refine - match)[each].mean() for each in (there, ~there)])
        X = clip_view(clip, scaled_input(photo, 1, 1, 10 ** 6))
        cosines.append(cosine(clip.encode_image(X), class_texts(clip, [split.words[k]])).item())
    found = tables["share on the object, of pixels and of the CAM's mass"]
    assert [found["pixels"], found["refine"]] == pytest.approx(np.mean(on, axis=0), abs=6e-4)
    found = tables["refined minus matching CAM, on the object, beside it"]["all"]
    assert found == pytest.approx(np.mean(changes, axis=0), abs=6e-4)
    found = tables["growing, hard masks"]["kept, class text"]["2"]  # the whole photo
    assert found == pytest.approx(np.mean(cosines), abs=6e-3)


def blank(figure, path):
    """In place of drawing.save: to draw takes seconds"""
    Image.new("L", (1, 1)).save(path)


def test_page_and_pictures(run, toy, chain, tmp_path, capsys, monkeypatch):
    """All of a demo; then one's own photos, without masks, of a run that stopped after matching"""
    call("companion", "--run", run, "--figures", tmp_path / "figures")
    assert drawn(run) == {"strip.png", *companion.CAPTIONS}
    assert files_in(tmp_path / "figures").keys() == {"tables.json", *companion.CAPTIONS}
    check_tables(run, json.loads((tmp_path / "figures/tables.json").read_text()), tmp_path)
    page = (run / "index.html").read_text()
    assert "<td>matching CAM</td><td>1.0 % mIoU, 6 photos of train</td>" in page
    assert '<b style="background: rgb(0,128,0)"></b>train' in page
    assert re.search("<td>refine</td><td>[^<]*steps 3[^<]*</td>", page)
    guide = re.search('href="([^"]+)"', page)[1]
    assert (run / guide).resolve() == ROOT / "docs/method.md"
    monkeypatch.setattr(drawing, "save", blank)
    mine = tmp_path / "mine"
    mine.mkdir()
    for file in ("classify.pt", "match.pt"):
        shutil.copy(chain / "cam" / file, mine)
    flags = ["--run", mine, "--data", chain / "data", "--clip", toy / "clip.pt"]
    call("companion", *flags, "--figures", tmp_path / "fewer")
    assert {*files_in(tmp_path / "fewer")} == {"tables.json", "1_inside.png", "2_regions.png"}
    assert drawn(mine) == {"strip.png", "1_inside.png", "2_regions.png"}
    page = (mine / "index.html").read_text()
    assert "masks</figcaption>" in page and "truth" not in page and "analysis" not in page
    before = files_in(mine)
    call("companion", *flags)
    assert files_in(mine) == before
    for text in ('{"script": "coco.py"}', None):
        note = mine / "companion/made_of.json"
        note.write_text(text) if text else note.unlink()
        before = files_in(mine)
        assert "strip.png: is there already, and no" in error_line(capsys, "companion", *flags)
        assert files_in(mine) == before


@pytest.mark.parametrize("case", ["no CAM changed", "every class", "no label"])
def test_pictures_that_there_cannot_be_are_left_out(case, run, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "save", blank)
    drawn_before = shutil.ignore_patterns("companion", "strip.png", "index.html", "cams")
    run, left_out = shutil.copytree(run, tmp_path / "run", ignore=drawn_before), {"5_removes.png"}
    if case == "no CAM changed":
        shutil.rmtree(run / "cams_refine")
        shutil.copytree(run / "cams_match", run / "cams_refine")
    else:
        rows = [line.split(",")[0] for line in (run / "data/train.csv").read_text().splitlines()]
        classes = ";".join(toy_world.OBJECTS) if case == "every class" else ""
        (run / "data/train.csv").write_text("\n".join(f"{row},{classes}" for row in rows[:4]))
        for path in (path for phase in companion.PHASES for path in run.glob(f"cams_{phase}/*y")):
            np.save(path, np.random.rand(6, 8, 8).astype(np.float16))
        left_out |= {"3_masks.png", "3_growing.png", "3_losses.png"}
        if not classes:
            left_out |= {"strip.png", "1_inside.png", "2_regions.png", "6_crf.png"}
    call("companion", "--run", run)
    assert drawn(run) == {"strip.png", *companion.CAPTIONS} - left_out
    names = [name for name, _ in opened(run).chosen]
    assert len({*names}) == len(names) == {"every class": 4, "no label": 0}.get(case, len(names))


def opened(run):
    return companion.open_run(companion.parse_args(["--run", str(run)]))


def test_photos_that_refinement_changes_by_the_median(run, monkeypatch):
    """Of the classes that it changes most, most first; an even number has the upper one"""
    r = opened(run)
    found = {0: [(1, "a"), (2, "b"), (9, "c")], 1: [(3, "d"), (5, "e")], 2: [(1, "f")],
             3: [(4, "g")], 4: [(3, "h")]}
    monkeypatch.setattr(sys.modules["a_run"], "changes", lambda r: found)
    assert opened(run).chosen == [("e", 1), ("g", 3), ("h", 4), ("b", 0)] and r.chosen


def test_ties_of_class_texts(toy):
    """Along over across is the cotangent of the angle between the centred texts"""
    words = ["boat", "water", "cow"]  # few, so that the ties are far from 0
    clip = load_clip(toy / "clip.pt")
    found = companion.ties(clip, {"boat": "water", "cow": "boat"}, words)
    u = F.normalize(class_texts(clip, words), dim=1)
    u = F.normalize(u - u.mean(dim=0), dim=1)
    for pair, (o, b) in {("boat", "water"): (0, 1), ("cow", "boat"): (2, 0)}.items():
        angle = torch.acos(u[o] @ u[b])
        assert found[pair] == pytest.approx(1 / torch.tan(angle).item(), abs=1e-4)


def test_ties_stand_beside_the_real_ones_on_the_toy_world(run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(companion, "grid", lambda *_, **__: None)
    monkeypatch.setattr(companion, "plot", lambda *args: asked.append(args))
    r = opened(run)
    tables = companion.growing(r, tmp_path)
    pairs = tables["ties of class texts"]
    assert pairs == asked[0][-1] and pairs["train, rails"]["real CLIP"] == 1.08 and len(pairs) == 6
    for curves in asked[1][1].values():  # losses: less what they are at the border
        assert all(ys[companion.SHARES.index(1)] == 0 for ys in curves.values())
        assert np.allclose(curves["L_match"], curves["first term"] + curves["second term"])
    r.words = None
    assert companion.growing(r, tmp_path)["ties of class texts"] == {}


def test_pictures_of_different_sizes_are_in_line(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(drawing, "save", lambda figure, path: figures.append(figure))
    wide, high = np.zeros((40, 60)), np.zeros((60, 40))
    bar = (slice(1, 2), (drawing.HEAT, 0, 1, "CAM"))
    drawing.grid(None, [3 * [wide], 3 * [high]], "abc", ["x", "y"], 2 * [3 * ["below"]], [bar])
    figures[0].draw_without_rendering()
    boxes = [ax.get_position() for ax in figures[0].axes[:6]]
    for row in (boxes[:3], boxes[3:]):
        assert np.ptp([box.y0 for box in row]) < 1e-6 and np.ptp([box.y1 for box in row]) < 1e-6
    assert boxes[0].height / boxes[0].width < 1 < boxes[3].height / boxes[3].width


def test_the_crf_is_shown_at_the_size_of_the_photo_of_median_gain(run, tmp_path, monkeypatch):
    run = shutil.copytree(run, tmp_path / "run")
    for path in (path for folder in ("data/images", "data/masks", "masks") for path in
                 (run / folder).glob("*_0000[1-5]*")):
        Image.open(path).resize((300, 280), Image.NEAREST).save(path)
    shown, sizes = [], []
    monkeypatch.setattr(companion, "grid", lambda path, rows, head, texts: shown.append(
        (rows[0][0], head, texts[0])))
    monkeypatch.setattr(companion, "dense_crf", lambda image, prob, *_, iterations: (
        sizes.append(image.shape), prob)[1])
    r = opened(run)
    told = companion.crf(r, tmp_path)["mask better than the CAM's labels"]
    gains = []
    for name in r.true:
        truth, mask = (np.array(Image.open(run / f"{folder}/{name}.png"))
                       for folder in ("data/masks", "masks"))
        before = companion.score_labels(companion.cams_of(r, name, "refine")[0],
                                        r.split.present(name), 0.43)
        gains.append((miou_of(mask, truth) - miou_of(before, truth), name,
                      miou_of(before, truth)))
    _, name, before = sorted(gains)[3]
    photo, head, texts = shown[0]
    assert np.array_equal(photo, r.split.image(name)) and {*sizes} == {(*photo.size[::-1], 3)}
    assert photo.size == (300, 280) and head == ("photo", "0 steps", "1 step", "3 steps",
                                                 "10 steps", "truth")
    assert texts == ["", *4 * [f"mIoU {before:.1f}"], ""]
    assert told.startswith(f"{sum(gain > 0 for gain, *_ in gains)} of 6 photos")


def test_parts_of_the_generator_make_the_fine_map(run):
    """[eq. W3] at the marked patch, by hand; class attention is off"""
    r = opened(run)
    maps, patch = companion.parts_of(r, "match", *r.chosen[0])
    assert [*maps] == ["coarse", "A_p2p", "fine"]
    by_hand = (maps["A_p2p"] * maps["coarse"]).sum()
    assert maps["fine"].flatten()[patch] == maps["fine"].max()
    assert torch.allclose(by_hand, maps["fine"].max(), rtol=1e-4)


def test_growing_masks_end_at_the_object_and_at_the_photo():
    inside = torch.zeros(16, 16, dtype=bool)
    inside[4:10, 3:12] = True
    masks = companion.growing_masks(inside)[:, 0].bool()
    assert torch.equal(masks[companion.SHARES.index(1)], inside) and masks[-1].all()
    assert all((small <= large).all() for small, large in zip(masks, masks[1:]))
    assert masks[0].sum() == 6 and masks[0, 6:8, 6:9].sum() == 6  # a tenth, from the middle


@pytest.fixture
def voc(toy, tmp_path):
    """Flags of demo.py for two toy photos in VOC's layout"""
    root = voc_root(tmp_path / "VOC2012", {"a": ["cow"], "b": ["car"]}, train=["a"], val=["b"])
    (root / "SegmentationClass").mkdir(exist_ok=True)
    return {"--voc": root, "--clip": toy / "clip.pt", "--vit": toy / "vit.pth"}


@pytest.mark.parametrize("wrong, expected", [
    ({"--voc": "none/VOC2012"}, "train.txt: not there; expected VOC 2012"),
    ({"--official": "none.pth"}, "none.pth: not there; expected"),
    ({"--clip": "ViT-B/23"}, "ViT-B/23: no such file"), ({"--vit": "deit"}, "deit: no such file"),
    ({"--photos": 0}, "--photos 0: expected a number above 0"),
    ({"--world": "--train 9"}, "--world: only without --voc"),
    ({"--voc": "", "--world": "--pairs boat:tree", "--clip": "ViT-B/32", "--vit": "deit_small"},
     "--pairs boat:tree: expected")])
def test_a_demo_finds_its_inputs_before_it_writes(wrong, expected, voc, tmp_path, capsys):
    flags = [x for pair in (voc | wrong).items() for x in pair if pair[1] != ""]
    flags = [f"{a}={b}" for a, b in zip(flags[::2], flags[1::2])]
    assert expected in error_line(capsys, "demo", "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_demo_goes_on_with_the_same_flags(voc, tmp_path, capsys, monkeypatch):
    """The line names what differs. V/ is V, and minutes add up."""
    monkeypatch.setattr(demo, "stages", lambda args: "")
    flags = [x for pair in voc.items() for x in pair] + ["--out", tmp_path / "out"]
    call("demo", *flags)
    (tmp_path / "out/minutes.json").write_text("60")
    call("demo", *flags, "--voc", f"{voc['--voc']}/")
    assert "out: 60.0 minutes, all starts" in capsys.readouterr().out
    line = error_line(capsys, "demo", *flags, "--seed", 1)
    assert "demo.json: made with seed 0, now it is 1; pass the same" in line and len(line) < 200


DEMO = """\
{P}
{F}
train_cam {T} --split {L} --clip {C} --out O/cam --phase match --vit {V} {G} {N}
train_cam {T} --split {L} --clip {C} --out O/cam --phase prompts --vit {V} {G}
train_cam {T} --split {L} --clip {C} --out O/cam --phase refine --vit {V} {G} {N}
train_cam {T} {E} --phase export --checkpoint O/cam/classify.pt --cams O/cams_classify --split {R}
eval --data O/data --split {R} --cams O/cams_classify --oracle-sweep --json O/classify.json
train_cam {T} {E} --phase export --checkpoint O/cam/match.pt --cams O/cams_match --split {R}
eval --data O/data --split {R} --cams O/cams_match --oracle-sweep --json O/match.json
train_cam {T} {E} --phase export --checkpoint O/cam/refine.pt --cams O/cams_refine --split {L}
eval --data O/data --split {R} --cams O/cams_refine --oracle-sweep --json O/refine.json
make_pseudo --data O/data --split {L} --cams O/cams_refine --out O/masks_plain --crf none --resume
make_pseudo --data O/data --split {L} --cams O/cams_refine --out O/masks --crf voc --resume
train_seg {T} --split {L} --vit {V} --labels O/masks --out O/seg
eval --data O/data --split {R} --pred O/masks_plain --json O/masks_plain.json
eval --data O/data --split {R} --pred O/masks --json O/masks.json
{S}
companion --run O --split {R} --clip {C}
explore --run O --split {R}"""
TRUE = ("train_seg --data O/data --recipe toy --seed 7 --workers 0 --resume --vit O/vit.pth "
        "--steps 9 --labels O/data/masks --out O/full")
PARTS = {"E": "--clip {C} --out O/cam", "R": "train", "F": "train_cam {T} --split {L} --clip {C} "
         "--out O/cam --phase classify --vit {V} {G} {N}", "N": ""}
DEMOS = {  # flags: the rest of the command lines
    '--seed 7 --steps 9 --generator resnet --world "--val 9" --snapshots 3': dict(
        N="--snapshots 3",
        P="toy --out O --seed 7 --resume --val 9",
        T="--data O/data --recipe toy --seed 7 --workers 0 --resume", L="train", C="O/clip.pt",
        V="O/vit.pth --steps 9", G="--generator resnet --resnet O/resnet.pth",
        S="eval --data O/data --split val --checkpoint O/seg/seg.pt --json O/seg.json\n"
          "eval --data O/data --split val --checkpoint O/full/seg.pt --json O/full.json"),
    "--voc V --seed 7 --batch 2 --clip C --vit D": dict(
        P="voc --voc V --out O/data --resume", T="--data O/data --recipe voc --seed 7 --resume",
        L="train_aug", C="C", V="D --batch 2", G="",
        S="eval --data O/data --split train --checkpoint O/seg/seg.pt --present-only --crf none "
          "--json O/seg_train.json\n"
          "eval --data O/data --split val --checkpoint O/seg/seg.pt --json O/seg.json"),
    "--voc V --seed 7 --official W --photos 2 --only cams": dict(
        P="voc --voc V --out O/data --resume", T="--data O/data --recipe voc --seed 7 --resume",
        F="official --data O/data --split train-2 --cam W --out O/cam", L="train-2", R="train-2",
        C="ViT-B/32", V="deit_small", G="", S="")}


@pytest.mark.parametrize("flags, parts", DEMOS.items(), ids=["toy", "voc", "a trial"])
def test_command_lines_of_a_demo(flags, parts, tmp_path, monkeypatch):
    """All of them, in order; of the toy world also that of the upper bound, in its own process"""
    told, others, process = [], [], Namespace(wait=lambda: 0)
    monkeypatch.setattr(demo, "step", lambda title, path, *flags, unless=False: told.append(
        " ".join([Path(path).stem, *" ".join(map(str, flags)).split()])))
    monkeypatch.setattr(demo, "digest", lambda path: "a file that is not there")
    monkeypatch.setattr(demo, "table", lambda *_: None)
    monkeypatch.setattr(demo, "Split", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["demo.py", "the", "same"])
    monkeypatch.setattr(demo.subprocess, "Popen", lambda words, **_: (
        others.append(words), process)[1])
    (tmp_path / "O/data").mkdir(parents=True)
    for name in ("train_aug", "train", "val"):
        (tmp_path / f"O/data/{name}.csv").write_text("a\nb\nc\n")
    monkeypatch.chdir(tmp_path)
    words = ["--out", "O", *shlex.split(flags)]
    demo.stages(demo.parse_args(words))
    parts, last = PARTS | parts, 11 if "--only" in words else None
    expected = DEMO.format(**parts).format(**parts).splitlines()[:last]
    assert told == [" ".join(line.split()) for line in expected]
    assert not last or (tmp_path / "O/data/val-2.csv").read_text() == "a\nb\n"
    told.clear()
    if "--voc" in words:
        assert not others
        return
    assert others == [[sys.executable, "demo.py", "the", "same", "--only", "full"]]
    demo.stages(demo.parse_args([*words, "--only", "full"]))
    assert told == [TRUE]
    process.wait = lambda: 3
    with pytest.raises(InputError, match="full.log: the run ended with exit code 3"):
        demo.stages(demo.parse_args(words))


@pytest.mark.parametrize("name, made", [
    ("match", "cams_match/made_of.json"), ("masks", "masks/made_of.json"), ("seg", "seg/seg.pt"),
    ("seg_train", "seg/seg.pt"), ("full", "full/seg.pt")])
def test_a_stale_score_is_not_kept(name, made, tmp_path, monkeypatch):
    """OUT/NAME.json is of what is there now, or is made again."""
    kept, args = [], demo.parse_args(["--out", str(tmp_path)])
    monkeypatch.setattr(demo, "step", lambda *_, unless=False: kept.append(unless))
    for text in ("before", "after"):
        (tmp_path / made).parent.mkdir(exist_ok=True)
        (tmp_path / made).write_text(text)
        demo.score(args, name, "val", "")
        record = hashlib.sha256(b"before").hexdigest()
        (tmp_path / f"{name}.json").write_text(json.dumps({"record": record}))
        demo.score(args, name, "val", "")
    assert kept == [False, True, False, False]


@pytest.mark.parametrize("photos, flags, published", [
    (10582, [], True), (5000, [], False), (10582, ["--steps", 9], False),
    (10582, ["--batch", 2], False), (10582, ["--vit", "deit_tiny"], False)])
def test_published_scores_stand_beside_the_same_lists_and_recipe(photos, flags, published, chain,
                                                                 tmp_path, capsys):
    for folder in ("cam", "seg"):
        shutil.copytree(chain / folder, tmp_path / folder)
    for name, row in demo.VOC.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(
            {"miou": 50, "list": row[0], "images": demo.PUBLISHED[row[0]]}))
    split = Split(chain / "data", "train")
    split.split, split.names = "train_aug", [""] * photos
    args = ["--out", tmp_path, "--voc", "V", *flags]
    demo.table(demo.parse_args([*map(str, args)]), demo.VOC, split)
    told = capsys.readouterr().out
    assert len(re.findall(r"50\.0 +(?:WeakTr|SemPLeS) \d\d", told)) == 5 * published
    assert ("and not shown" in told) != published and ("Trial (--steps 9)" in told) == (9 in flags)
    assert f"trained on {photos:,} photos of train_aug, scored on 1,464 of train and 1,449" in told


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
@pytest.mark.parametrize("words, expected", [
    ("demo STEPS=3 BATCH=2", "--out runs/toy --seed 0 --steps 3 --batch 2"),
    ("voc V=v PHOTOS=9", "--out runs/voc --seed 0 --voc v --photos 9"), ("setup", "-m venv .venv"),
    ("voc V=v STEP=2", "STEP= is no variable of this target"),
    ("demo V=v", "V= is no variable of this target"), ("test STEPS=1", "STEPS= is no variable")])
def test_make_drops_no_word(words, expected):
    told = subprocess.run(["make", "-n", "-B", *words.split()], cwd=ROOT, text=True,
                          capture_output=True)
    assert expected in " ".join((told.stdout + told.stderr).replace("\\\n", " ").split())
    assert (told.returncode == 2) == ("is no" in expected)


def test_folders_of_the_docs_are_ignored():
    lines = (ROOT / ".gitignore").read_text().splitlines()
    assert {f"/{folder}/" for folder in ("mine", "coco", "cams", "results", "data")} <= {*lines}


def test_words_are_prompts(toy, chain, cam, tmp_path, capsys):
    lines, file = [f"{name}: water, sky" for name in toy_world.OBJECTS], tmp_path / "words.txt"
    flags = ["--data", toy / "data", "--clip", toy / "clip.pt", "--out", tmp_path, "--words", file]
    file.write_text("\n".join(lines[1:]))
    assert "expected a line" in error_line(capsys, "words", *flags)
    for wrong in ([*lines, lines[0]], ["boat: water, , sky", *lines[1:]], ["boat:", *lines[1:]]):
        file.write_text("\n".join(wrong))
        assert "'boat:" in (line := error_line(capsys, "words", *flags)) and "an empty" in line
    file.write_bytes("\n".join(["boat: caf\u00e9", *lines[1:]]).encode("latin-1"))
    call("words", *flags[:4], "--out", tmp_path / "latin", *flags[6:])
    state = torch.load(tmp_path / "latin/prompts.pt")
    assert state["record"]["words by hand"]["boat"] == ["caf\u00e9"]
    file.write_text("\ufeff" + "\n".join(lines) + "\n\n", encoding="utf-8")
    capsys.readouterr()
    call("words", *flags)
    assert f"{tmp_path}/prompts.pt, prompts.txt; next" in capsys.readouterr().out
    before = files_in(tmp_path)
    call("words", *flags)  # replaces its own
    assert files_in(tmp_path) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/prompts.txt").write_text("\n".join(lines))
    flags[5] = tmp_path / "mine"
    assert "prompts.txt: of another run" in error_line(capsys, "words", *flags)
    flags[7] = tmp_path / "mine/prompts.txt"
    assert "--out writes a prompts.txt there" in error_line(capsys, "words", *flags)
    assert (tmp_path / "mine/prompts.txt").read_text() == "\n".join(lines)
    texts = F.normalize(class_texts(load_clip(toy / "clip.pt"), ["water", "sky"]), dim=1)
    shutil.copy(chain / "cam/classify.pt", tmp_path)
    state = cam(tmp_path, "--phase", "refine")  # reads them
    assert torch.allclose(state["prompts"]["u_b"], texts.mean(dim=0).expand(6, -1), atol=1e-6)


def test_one_photo(toy, chain, tmp_path, capsys, monkeypatch):
    split, gif = Split(toy / "data", "train"), tmp_path / "one"
    cow = split.classes.index("cow")
    photo = next(split.paths[name] for name in split.names if split.present(name).tolist() == [cow])
    flags = ["--clip", toy / "clip.pt", "--image", photo, "--steps", 5, "--out", gif, "--class"]
    curves, figures, draw = [], [], one_photo.draw
    make = one_photo.Figure
    monkeypatch.setattr(one_photo, "Figure", lambda *args, **flags: (
        figures.append(make(*args, **flags)), figures[-1])[1])
    monkeypatch.setattr(one_photo, "draw", lambda *args: (curves.append(args[3]), draw(*args))[1])
    call("one_photo", *flags, "cow", "--prompts", chain / "cam/prompts.pt")
    assert f"{gif}.gif: " in capsys.readouterr().out
    with Image.open(f"{gif}.gif") as picture:
        assert picture.n_frames == 3 and picture.size == (700, 600)
        rests = [(picture.seek(i), picture.info["duration"])[1] for i in range(3)]
    assert rests == [100, 2000, 2000]  # steps 0, 5 (refinement begins), 10
    Image.open(f"{gif}.png").verify()
    assert [len(line.get_xdata()) for line in figures[1].axes[-1].lines[:3]] == [6, 6, 6]  # grow

    clip = load_clip(toy / "clip.pt")
    X = clip_view(clip, scaled_input(Image.open(photo), 1, 1, 10 ** 6))
    u_f, *words = class_texts(clip, ["cow", "grass", "sky"]).split(1)
    learned = torch.load(chain / "cam/prompts.pt")["u_b"][cow]
    half = clip.encode_image(X / 2)  # what the first mask keeps, and what it drops
    assert {name: values[0].item() for name, values in curves[0].items()} == pytest.approx({
        f"{region}, {text}": cosine(half, u)[0].item() for region, text, u in (
            ("kept", "cow", u_f), ("dropped", "cow", u_f), ("kept", "prompt", learned))}, abs=1e-5)
    grass, sky = (one_photo.optimise(clip, X, u_f, u_b, 20) for u_b in words)    # (41, 1, R, R)
    assert torch.equal(grass[:21], sky[:21]) and (grass[0] == 0.5).all()  # matching needs no word
    kept = [clip.encode_image(M[None] * X) for M in (grass[20], grass[-1], sky[-1])]
    matched, own, other = (cosine(v, words[0]).item() for v in kept)
    assert own < other - 0.05 and own < matched - 0.05


def test_an_exercise_takes_a_new_folder(run, capsys):
    flags = ["--run", run, "--steps", 2, "--phases", "match", "--set", "lambda_b=0"]
    (run / "exercise-1").mkdir()
    shutil.copy(run / "cam/classify.pt", run / "cam/match-1.pt")  # a snapshot of the demo's
    before = files_in(run)
    call("exercise", *flags)
    told = capsys.readouterr().out
    assert "A trial: 2 steps, the demo 3; the scores do not compare" in told
    rows = re.findall(r"^match, (demo|yours) +[\d.]+ +[\d.]+ at 0", told, re.M)
    assert rows == ["demo", "yours"] and not files_in(run / "exercise-1")
    call("exercise", "--run", run, "--phases", "prompts")
    record = torch.load(run / "exercise-3/cam/prompts.pt")["record"]
    assert (record["steps"], record["batch"]) == (3, 4)  # the demo's
    assert "A trial" not in capsys.readouterr().out
    assert (run / "exercise-2/match.json").is_file() and (run / "exercise-3/cam").is_dir()
    assert before.items() <= files_in(run).items()


def test_rows_of_the_ablation_replace_what_they_say(tmp_path, monkeypatch):
    """The control: each class has the prompt of another. Class attention: of that phase alone"""
    told, u_b = [], torch.arange(6.0)[:, None]
    monkeypatch.setattr(ablation, "call", lambda *words: told.append([str(word) for word in words]))
    args = ablation.parse_args(["--out", str(tmp_path)])
    for title in ("prompts permuted", "class attention, the method"):
        row = next(row for row in ablation.ROWS if row.title == title)
        _, chain, out = ablation.folders(args, row, 0)
        chain.mkdir(parents=True)
        for phase in ablation.PHASES:
            torch.save({"u_b": u_b, "record": {}}, chain / f"{phase}.pt")
        ablation.run_row(args, row, 0)
        if row.words:
            found = torch.load(out / "prompts.pt")["u_b"]
            assert (found != u_b).all() and torch.equal(found.sort(dim=0)[0], u_b)
            assert ["refine" in words for words in told if str(out) in words].count(True) == 1
    with_attention = [words for words in told if "class_attention=True" in words]
    assert len(with_attention) == 1 and "classify" in with_attention[0]


@pytest.mark.parametrize("what", ["clip", "step"])
def test_a_bench_shows_ours_theirs_and_their_ratio(what, monkeypatch, capsys):
    small = {"width": 64, "layers": 2}
    monkeypatch.setattr(bench, "ViT", partial(bench.ViT, grid=(4, 4), **small))
    monkeypatch.setattr(bench, "CLIP", partial(bench.CLIP, resolution=64, patch=16, text_width=64,
                                               text_layers=2, embed_dim=64, **small))
    monkeypatch.setattr(bench, "SIDE", 64)
    monkeypatch.setattr(bench, "CROP", 64)
    monkeypatch.setattr(bench, "peak_of", lambda args, measure: 1 + 3 * (measure[:4] != "ours"))
    monkeypatch.setattr(bench, "seconds", lambda call: (call(), 0.003)[1])
    monkeypatch.setattr(bench, "race", partial(bench.race, clock=lambda call: (call(), 0.006)[1]))
    call("bench", what, "--rounds", 1, "--batch", 2, "--device", "cpu")
    rows = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    if what == "step":
        cells = ["3", "6", "0.5", "1", "4", "0.25"]  # of ours, of theirs, ratio; twice
        assert rows[1:] == [[phase, *cells] for phase in bench.STEPS]
        return
    assert all("relative error" in title and float(x) < 1e-5 for title, x in rows[:2])
    assert [row[1:] for row in rows[3:]] == [["3", "6", "0.5"]] * 3 + [["1", "4"]]


@pytest.mark.parametrize("what, flags, expected", [
    ("clip", [], "no clip-anytorch; pip install -r tests/requirements.txt"),
    ("crf", ["--peer", sys.executable], "no pydensecrf2; tests/make_crf_golden.py says how")])
def test_benches_without_their_peers_say_so(what, flags, expected, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "clip.model", None)
    monkeypatch.setattr(bench, "CLIP", partial(bench.CLIP, 64, 16, 64, 1, 64, 1, 64))
    assert expected in error_line(capsys, "bench", what, *flags, "--device", "cpu")


def test_the_ablation_shows_what_is_finished(tmp_path, capsys):
    """Of two seeds; a row of one seed says (1)"""
    flags = ["--out", tmp_path, "--seeds", 0, 1, "--only"]
    args = ablation.parse_args([str(flag) for flag in flags])
    line = error_line(capsys, "ablation", *flags)
    assert "no score of seeds [0, 1]; run it without --only" in line and not files_in(tmp_path)
    for i, row in enumerate(ablation.ROWS[:-1]):
        for seed in (0, 1) if row.title != "lambda_T 0" else (0,):
            _, chain, out = ablation.folders(args, row, seed)
            for folder in (chain, out):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "prompts.txt").write_text("boat: water 0.9, sky 0.5\ntrain: sky 0.9\n")
            scores = {"miou": 60.0 + i + 2 * seed, "oracle": {"miou": 70.0}}
            (out / "score.json").write_text(json.dumps(scores))
    call("ablation", *flags)
    rows = [" ".join(row.split()) for row in capsys.readouterr().out.splitlines()[3:-1]]
    assert rows[0] == "classification 61.0 ± 1.4 70.0 ± 0.0 2"
    assert rows[2] == "the method 63.0 ± 1.4 70.0 ± 0.0 1 1 2"
    assert rows[13] == "lambda_T 0 73.0 (1) 70.0 (1) 1 1"
    assert len(rows) == len(ablation.ROWS) - 1
    Image.open(tmp_path / "ablation.png").verify()
