"""docs/method.md shows the code that there is; experiments/ runs: companion, words, one_photo,
bench."""
import html
import importlib
import json
import re
import shutil
import subprocess
import sys
import textwrap
from functools import reduce

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call, error_line, files_in
from PIL import Image

sys.path.insert(0, str(ROOT / "experiments"))
import bench  # noqa: E402
import companion  # noqa: E402
import one_photo  # noqa: E402

TEXT = (ROOT / "docs/method.md").read_text(encoding="utf-8")
FIGURES = ROOT / "figures/method"
SCRIPTS = ("clip_model", "mask_generator", "train_cam", "make_pseudo", "train_seg", "eval")


def test_excerpts_are_the_code():
    found = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    sources = [textwrap.dedent((ROOT / f"{name}.py").read_text("utf-8")) for name in SCRIPTS]
    assert len(found) > 8
    for excerpt in found:
        assert any(excerpt in source for source in sources), excerpt


def test_names_in_the_text_exist():
    for script, name in set(re.findall(rf"`({'|'.join(SCRIPTS)})\.(?!py)(\w+)", TEXT)):
        assert hasattr(importlib.import_module(script), name), name


def test_numbers_are_those_of_the_tables():
    tables, text = json.loads((FIGURES / "tables.json").read_text()), " ".join(TEXT.split())
    rows = [(name, [f"{x:.2f}" for x in row.values()]) for title in ("cosines", "losses")
            for name, row in tables[f"growing, {title}"].items()]
    classes = ("all", "boat", "train", "bird", "cow", "car", "bottle")
    beside = tables["mean cosine of patches on the object, beside it"]
    for name in ("class text", "prompt", "true word"):
        rows.append((name, ["{:.2f}, {:.2f}".format(*beside[f"{name}, {k}"]) for k in classes]))
    for name, cells in rows:
        assert f"| {name} | {' | '.join(cells)} |" in text
    pairs = tables["refined minus matching CAM, on the object, beside it"]
    assert " | ".join("{:+.3f}, {:+.3f}".format(*pairs[k]) for k in classes) in text
    shares = tables["share on the object, of pixels and of the CAM's mass"]
    assert ("mass {classify:.0%} lies on the true object after classification, {match:.0%} after "
            "matching, {refine:.0%} after").format(**shares) in text
    assert "Chosen here: {chosen}, with an mIoU of {mIoU there}".format(
        **tables["background score"]) in text


def test_pictures_are_there_and_all_are_shown():
    shown = set(re.findall(r"\]\(\.\./figures/method/([\w.]+)\)", TEXT))
    assert shown == {path.name for path in FIGURES.iterdir()} == {
        "tables.json", *(file for file, _, _ in companion.CAPTIONS)}


@pytest.fixture(scope="module")
def run(toy, chain, tmp_path_factory):
    """The tiny chain with the files of a demo"""
    run = tmp_path_factory.mktemp("run")
    shutil.copytree(toy / "data", run / "data")
    for source, folder in (("cam", "cam"), ("masks", "masks"), ("seg", "seg"), ("seg", "full")):
        shutil.copytree(chain / source, run / folder)
    shutil.copy(toy / "clip.pt", run)
    for phase in companion.PHASES:
        call("train_cam", "--data", run / "data", "--clip", run / "clip.pt", "--out", run / "cam",
             "--phase", "export", "--checkpoint", run / f"cam/{phase}.pt", "--cams",
             run / f"cams_{phase}", "--recipe", "toy", "--device", "cpu")
    (run / "demo.json").write_text(json.dumps({"seed": 0, "world": "", "generator": "vit"}))
    (run / "table.json").write_text(json.dumps(dict.fromkeys(companion.TABLE, 1.0)))
    return run


def test_page_and_pictures(run, tmp_path):
    call("companion", "--run", run, "--figures", tmp_path)
    page = (run / "index.html").read_text()
    pictures = re.findall(r'<img src="([^"]+)" alt="([^"]+)">', page)
    assert len(pictures) == page.count("<img") > 12 and "http" not in page
    for source, alt in pictures:
        Image.open(run / html.unescape(source)).verify()
        assert len(alt) > 10
    assert {"strip.png", "companion/log_seg_seg.png"} <= {source for source, _ in pictures}
    assert files_in(tmp_path).keys() == {path.name for path in FIGURES.iterdir()}
    before = files_in(run)
    call("companion", "--run", run)
    assert files_in(run) == before


def test_dense_features_are_the_value_path(toy):
    """Slow twin: patch by patch"""
    clip, X = companion.load_clip(toy / "clip.pt"), torch.rand(1, 3, 64, 64)
    found, visual = companion.dense_features(clip, X), clip.visual
    *blocks, last = visual.transformer.resblocks
    patches = F.conv2d(X, visual.conv1.weight, stride=visual.patch)[0].flatten(1).t()
    tokens = torch.cat([visual.class_embedding[None], patches]) + visual.positional_embedding
    x = visual.ln_pre(tokens)[None]
    x = reduce(lambda x, block: block(x, None), blocks, x)
    weight, bias = (p.chunk(3)[2] for p in (last.attn.in_proj_weight, last.attn.in_proj_bias))
    for patch in (0, 9, visual.grid ** 2 - 1):
        value = last.attn.out_proj.weight @ (weight @ last.ln_1(x[0, 1 + patch]) + bias)
        one = visual.ln_post(value + last.attn.out_proj.bias) @ visual.proj
        same = found[0, :, patch // visual.grid, patch % visual.grid]
        assert torch.allclose(same, one, atol=1e-4)


def test_words_are_prompts(toy, chain, cam, tmp_path, capsys):
    lines, file = [f"{name}: water, sky" for name in companion.toy.OBJECTS], tmp_path / "words.txt"
    flags = ["--data", toy / "data", "--clip", toy / "clip.pt", "--out", tmp_path, "--words", file]
    file.write_text("\n".join(lines[1:]))
    assert "expected a line" in error_line(capsys, "words", *flags)
    file.write_text("\n".join(lines))
    call("words", *flags)
    clip = companion.load_clip(toy / "clip.pt")
    texts = F.normalize(companion.class_texts(clip, ["water", "sky"], "cpu"), dim=1)
    shutil.copy(chain / "cam/classify.pt", tmp_path)
    state = cam(tmp_path, "--phase", "refine")  # reads them
    assert torch.allclose(state["prompts"]["u_b"], texts.mean(dim=0).expand(6, -1), atol=1e-6)


def test_one_photo(toy, chain, tmp_path, capsys):
    photo, gif = toy / "data/images/train_00003.jpg", tmp_path / "one.gif"  # a cow on grass
    flags = ["--clip", toy / "clip.pt", "--image", photo, "--steps", 20, "--out", gif, "--class"]
    call("one_photo", *flags, "cow", "--background", "grass")
    with Image.open(gif) as picture:
        assert picture.n_frames == 9 and picture.size == (700, 560)
    first = gif.read_bytes()
    call("one_photo", *flags, "cow", "--prompts", chain / "cam/prompts.pt")
    assert gif.read_bytes() != first
    assert "class of boat, train" in error_line(capsys, "one_photo", *flags, "zebra", "--prompts",
                                                chain / "cam/prompts.pt")
    with pytest.raises(SystemExit):
        call("one_photo", *flags, "cow")

    clip = companion.load_clip(toy / "clip.pt")
    X = companion.clip_view(clip, companion.scaled_input(Image.open(photo), 1, 1, 10 ** 6))
    u_f, *words = companion.class_texts(clip, ["cow", "grass", "sky"], "cpu").split(1)
    grass, sky = (one_photo.optimise(clip, X, u_f, u_b, 20) for u_b in words)    # (9, 1, R, R)
    assert torch.equal(grass[:5], sky[:5]) and (grass[0] == 0.5).all()  # matching needs no word
    kept = [clip.encode_image(M[None] * X) for M in (grass[4], grass[8], sky[8])]
    matched, own, other = (companion.cosine(v, words[0]).item() for v in kept)
    assert own < other - 0.05 and own < matched - 0.05


@pytest.mark.parametrize("what", ["clip", "crf", "eval", "step"])
def test_benches_run(what, monkeypatch, capsys):
    if what != "crf":  # the others would start many processes
        monkeypatch.setattr(bench, "peak_of", lambda args, measure: 1.0)
    call("bench", what, "--toy", "--rounds", 1, "--batch", 2, "--device", "cpu")
    assert "ratio" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run for minutes")
def test_gpu_script_wants_a_gpu(tmp_path):
    done = subprocess.run(["bash", "experiments/gpu.sh", tmp_path / "out"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("no CUDA device")
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()
