"""docs/method.md shows the code that there is, and tests/companion.py draws a run."""
import html
import importlib
import json
import re
import shutil
import textwrap

import companion
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, call, error_line, files_in
from PIL import Image
from test_readme import SOURCE

from clip_model import load_clip

TEXT = (ROOT / "docs/method.md").read_text(encoding="utf-8")
FIGURES = ROOT / "figures/method"


def test_excerpts_are_the_code():
    found = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    sources = [textwrap.dedent(source) for source in SOURCE.values()]
    assert len(found) > 8
    for excerpt in found:
        assert any(excerpt in source for source in sources), excerpt


def test_names_in_the_companion_exist():
    for chapter, name in set(re.findall(r"`(train_cam|make_pseudo|train_seg)\.(?!py)(\w+)`", TEXT)):
        assert hasattr(importlib.import_module(chapter), name)
    for name in ("matching", "prompt_learning", "refinement", "region_masks", "Prompts", "Crops"):
        assert f"`{name}" in TEXT and f" {name}(" in SOURCE["train_cam"]


def test_pictures_are_there_and_all_are_shown():
    shown = set(re.findall(r"\]\(\.\./figures/method/([\w.]+)\)", TEXT))
    assert shown == {path.name for path in FIGURES.iterdir()} == {"tables.json", *(file for file, _, _ in companion.CAPTIONS)}


def test_numbers_are_those_of_the_tables():
    tables, text = json.loads((FIGURES / "tables.json").read_text()), " ".join(TEXT.split())
    for epoch, words in tables["nearest word after epochs"].items():
        assert f"| {epoch} | {' | '.join(words)} |" in text
    shares = tables["share on the object, of pixels and of the CAM's mass"]
    assert "covers {pixels:.0%} of a photo".format(**shares) in text
    assert "{classify:.0%} lies on the true object after classification, {match:.0%} after matching, {refine:.0%} after".format(
        **shares) in text
    for section in ("growing, cosines", "growing, losses"):
        for name, values in tables[section].items():
            assert f"| {name} | {' | '.join(f'{value:.2f}' for value in values.values())} |" in text
    classes = ("all", "boat", "train", "bird", "cow", "car", "bottle")
    for title in ("class text", "prompt", "true word"):
        pairs = (tables["mean cosine of patches on the object, beside it"][f"{title}, {name}"] for name in classes)
        assert f"| {title} | {' | '.join(f'{on:.2f}, {beside:.2f}' for on, beside in pairs)} |" in text
    pairs = (tables["refined minus matching CAM, on the object, beside it"][name] for name in classes)
    assert f"| {' | '.join(f'{on:+.3f}, {beside:+.3f}' for on, beside in pairs)} |" in text
    shares = tables["share of the gradient on the object"]
    assert "of its red {red:.0%} lies on the object, of its blue {blue:.0%}".format(**shares) in text
    assert tables["photos on which the model is better than its pseudo mask"] in text
    assert "Chosen here: {chosen}, with an mIoU of {mIoU there} on 100 photos; the best of the 16 has {best mIoU of the 16}".format(
        **tables["background score"]) in text


@pytest.fixture(scope="module")
def demo(toy, chain, tmp_path_factory):
    """A tiny run with the files of a demo"""
    run = tmp_path_factory.mktemp("demo")
    shutil.copytree(toy / "data", run / "data")
    shutil.copytree(chain / "cam", run / "cam")
    for folder in ("masks", "seg"):
        shutil.copytree(chain / folder, run / folder)
    shutil.copytree(chain / "seg", run / "full")
    shutil.copy(toy / "clip.pt", run)
    common = ["--data", run / "data", "--clip", toy / "clip.pt", "--out", run / "cam", "--phase", "export", *TINY]
    for phase in ("classify", "match", "refine"):
        call("train_cam", *common, "--checkpoint", run / f"cam/{phase}.pt", "--cams", run / f"cams_{phase}")
    (run / "demo.json").write_text(json.dumps({"seed": 0, "world": "", "generator": "vit"}))
    stages = ("classify", "match", "refine", "masks_plain", "masks", "seg", "full")
    (run / "table.json").write_text(json.dumps(dict.fromkeys(stages, 1.0)))
    Image.new("RGB", (99, 99)).save(run / "strip.png")
    return run


def test_page_and_pictures(demo, tmp_path):
    call("companion", "--run", demo, "--figures", tmp_path)
    page = (demo / "index.html").read_text()
    pictures = re.findall(r'<img src="([^"]+)" alt="([^"]+)">', page)
    assert len(pictures) == page.count("<img") > 12 and "<script" not in page and "http" not in page
    for source, alt in pictures:
        with Image.open(demo / html.unescape(source)) as picture:
            picture.load()
        assert len(alt) > 10
    phases = {f"companion/log_cam_{phase}.png" for phase in ("classify", "match", "prompts", "refine")}
    assert phases | {"companion/log_seg_seg.png"} <= {source for source, _ in pictures}
    assert files_in(tmp_path).keys() == {path.name for path in FIGURES.iterdir()}

    before = files_in(demo / "companion")
    call("companion", "--run", demo)
    assert files_in(demo / "companion") == before and (demo / "index.html").read_text() == page


def test_run_that_is_not_finished(tmp_path, capsys):
    assert f"{tmp_path}: no table.json; expected a finished run" in error_line(capsys, "companion", "--run", tmp_path)


def test_dense_features_are_the_value_path(toy):
    """Slow twin: patch by patch"""
    clip, X = load_clip(toy / "clip.pt"), torch.rand(1, 3, 64, 64)
    found = companion.dense_features(clip, X)
    visual = clip.visual
    last = visual.transformer.resblocks[-1]
    tokens = torch.cat([visual.class_embedding[None], F.conv2d(X, visual.conv1.weight, stride=visual.patch)[0].flatten(1).t()])
    x = visual.ln_pre(tokens + visual.positional_embedding)[None]
    for block in visual.transformer.resblocks[:-1]:
        x = block(x, None)
    D = x.shape[2]
    for patch in (0, 9, visual.grid ** 2 - 1):
        value = last.attn.in_proj_weight[2 * D:] @ last.ln_1(x[0, 1 + patch]) + last.attn.in_proj_bias[2 * D:]
        one = visual.ln_post(last.attn.out_proj.weight @ value + last.attn.out_proj.bias) @ visual.proj
        assert torch.allclose(found[0, :, patch // visual.grid, patch % visual.grid], one, atol=1e-4)
