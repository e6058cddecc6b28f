"""prepare/official.py: WeakTr's checkpoints, small golden ones and some written here by hand."""
import hashlib
import os

import numpy as np
import pytest
import torch
from conftest import REAL, call, error, error_line
from PIL import Image

from coco import MISSING_IDS
from mask_generator import MaskGenerator, ViT
from train_seg import Segmenter, load_segmenter

GOLDEN = REAL / "weaktr_golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared/data/weaktr_golden")
AAF = "adaptive_attention_fusion."
DECODER = {"enter": "proj_dec", "norm": "decoder_norm", "label_norm": "mask_norm",
           "P": "proj_patch", "Q": "proj_classes", "label_vectors": "cls_emb", "blocks": "blocks"}


@pytest.fixture
def command(tmp_path):
    """command(flag, state dict or file, number of classes, *flags) -> the command line"""
    def command(flag, file, K, *flags):
        Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
        (tmp_path / "classes.txt").write_text("".join(f"class{k}: word{k}\n" for k in range(K)))
        (tmp_path / "train.csv").write_text("a.png,class0\n")
        if isinstance(file, dict):
            torch.save({"model": file, "miou": np.float64(0.7)}, tmp_path / "theirs.pth")
            file = tmp_path / "theirs.pth"
        return ["official", flag, file, "--data", tmp_path, "--out", tmp_path, *flags]
    return command


@pytest.fixture
def convert(command, tmp_path):
    """The same -> our checkpoint"""
    def convert(flag, *rest):
        call(*command(flag, *rest))
        file = "classify.pt" if flag == "--cam" else "seg.pt"
        return torch.load(tmp_path / file, weights_only=True)
    return convert


def generator(K=3, pool="max"):
    """3 layers of 2 heads; the backbone's [CLS], which ours does not read, is 0"""
    torch.manual_seed(0)
    S = MaskGenerator(ViT(4, 128, 3, (2, 2)), K, pool=pool, reduction=2).requires_grad_(False)
    torch.nn.init.normal_(S.class_tokens)
    torch.nn.init.normal_(S.class_positions)
    S.backbone.cls_token.zero_()
    S.backbone.pos_embed[:, 0].zero_()
    return S


def published_cam(S):
    """What WeakTr would write of our generator, map by map"""
    L, A, ours, theirs = 3, 2, S.state_dict(), {}
    for key, value in ours.items():
        if key.startswith(("backbone.patch", "backbone.blocks", "backbone.norm", "head.")):
            theirs[key.removeprefix("backbone.")] = value
        if key.startswith("fusion.pool."):
            theirs[key.replace("fusion.pool", f"{AAF}attn_feat_ffn")] = value
    theirs["cls_token"] = ours["class_tokens"]
    theirs["pos_embed"] = torch.cat([ours["class_positions"], ours["backbone.pos_embed"][:, 1:]], 1)
    into, out = ours["fusion.excite.0.weight"], ours["fusion.excite.2.weight"]
    first, second = torch.zeros_like(into), torch.zeros_like(out)
    for head in range(A):
        for layer in range(L):
            first[:, head * L + layer] = into[:, layer * A + head]
            second[head * L + layer] = out[layer * A + head]
    return theirs | {f"{AAF}attn_head_ffn.0.weight": first, f"{AAF}attn_head_ffn.2.weight": second}


def segmenter(labels=4):
    torch.manual_seed(0)
    return Segmenter(ViT(4, 128, 3, (2, 2), eps=1e-5), labels).requires_grad_(False)


def published_seg(model):
    theirs = {"encoder.head.weight": torch.zeros(10, 128), "encoder.head.bias": torch.zeros(10)}
    for key, value in model.state_dict().items():
        part, dot, rest = key.partition(".")
        name = "encoder" if part == "backbone" else f"decoder.{DECODER[part]}"
        theirs[name + dot + rest] = value
    return theirs


@needs_golden
@torch.no_grad()
def test_golden_files(convert):
    """What WeakTr's own code gives for its files. CAMs, square: measured 1.3e-6; it interpolates
    positions with a shift, so others are near: 1.5e-2. Scores of the segmentation, also with a side
    that is no multiple of the patch: 3.1e-6"""
    state = convert("--cam", GOLDEN / "checkpoint_best_mIoU.pth", 4)
    S = MaskGenerator(ViT(**state["vit"]), 4, **state["options"])
    S.load_state_dict(state["generator"])
    for name, golden in torch.load(GOLDEN / "cam_expected.pt", weights_only=True).items():
        cam, logits = S(golden["image"])
        for key, ours in {"cam": cam, **logits}.items():
            assert error(ours, golden[key]) < (1e-5 if name == "square" else 0.02), (name, key)
    state = convert("--seg", GOLDEN / "checkpoint_best.pth", 4)
    model = Segmenter(ViT(**state["vit"]), 5)
    model.load_state_dict(state["segmenter"])
    for name, golden in torch.load(GOLDEN / "seg_expected.pt", weights_only=True).items():
        assert error(model(golden["image"]), golden["scores"]) < 1e-5, name


@pytest.mark.parametrize("flag, pool", [("--cam", "max"), ("--cam", "mean"), ("--seg", None)])
def test_checkpoints(flag, pool, convert, tmp_path):
    """Ours have the model's weights, and no other entries than these."""
    if flag == "--cam":
        model = generator(pool=pool)
        state = convert(flag, published_cam(model), 3, "--pool", pool, "--recipe", "coco")
        own, record = {"options": model.options}, {"pool": pool, "recipe": "coco"}
    else:
        model = segmenter()
        state = convert(flag, published_seg(model), 3)
        own, record = {"recipe": "voc", "side": 520}, {"pool": "max", "recipe": "voc"}
        assert load_segmenter(tmp_path / "seg.pt")[1:3] == ("voc", 520)
    found = state.pop("generator" if flag == "--cam" else "segmenter")
    expected = model.state_dict()
    assert found.keys() == expected.keys() and all(found[k].equal(expected[k]) for k in found)
    record["script"] = "official.py"
    record["official"] = hashlib.sha256((tmp_path / "theirs.pth").read_bytes()).hexdigest()
    assert state == {"vit": model.backbone.sizes, "classes": [f"class{k}" for k in range(3)],
                     "record": record, **own}


@pytest.mark.parametrize("flag, file", [("--cam", "classify.pt"), ("--seg", "seg.pt")])
def test_its_own_checkpoint_is_replaced_and_no_other(flag, file, command, tmp_path, capsys):
    theirs = published_cam(generator()) if flag == "--cam" else published_seg(segmenter())
    call(*command(flag, theirs, 3))
    before = (tmp_path / file).read_bytes()
    call(*command(flag, theirs, 3))
    assert (tmp_path / file).read_bytes() == before
    torch.save({"generator": theirs}, tmp_path / file)
    before = (tmp_path / file).read_bytes()
    assert f"{file}: has no 'record'" in error_line(capsys, *command(flag, theirs, 3))
    assert (tmp_path / file).read_bytes() == before


def test_of_90_categories_the_80_with_a_name(convert, capsys):
    """Token i of the file is category i + 1, label i is category i."""
    cam, seg = generator(90), segmenter(91)
    torch.nn.init.normal_(seg.label_norm.weight)
    torch.nn.init.normal_(seg.label_norm.bias)
    ours = convert("--cam", published_cam(cam), 80)["generator"]
    labels = convert("--seg", published_seg(seg), 80)["segmenter"]
    assert capsys.readouterr().out.count("near, not equal") == 2
    ids = torch.tensor([i for i in range(1, 91) if i not in MISSING_IDS])
    assert (len(ids), ids[11], ids[-1]) == (80, 13, 90)
    for name in ("class_tokens", "class_positions"):
        assert ours[name].equal(getattr(cam, name)[:, ids - 1])
    assert ours["head.weight"].equal(cam.head.weight[ids - 1])
    assert ours["head.bias"].equal(cam.head.bias[ids - 1])
    rows = torch.cat([torch.tensor([0]), ids])
    assert labels["label_vectors"].equal(seg.label_vectors[:, rows])
    assert labels["label_norm.weight"].equal(seg.label_norm.weight[rows])
    assert labels["label_norm.bias"].equal(seg.label_norm.bias[rows])


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickled_function_is_refused_unrun(command, tmp_path, capsys):
    theirs = {"model": published_cam(generator()), "miou": Attack(tmp_path / "run")}
    torch.save(theirs, tmp_path / "attack.pth")
    line = error_line(capsys, *command("--cam", tmp_path / "attack.pth", 3))
    assert "UnpicklingError; expected" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag, missing", [
    ("--cam", ("cls_token", "pos_embed", "norm.bias", f"{AAF}attn_head_ffn.2.weight")),
    ("--seg", ("encoder.pos_embed", "decoder.cls_emb", "decoder.blocks.1.norm2.bias"))])
def test_what_does_not_fit_is_refused(flag, missing, command, tmp_path, capsys):
    """Other classes; a weight missing; one too many"""
    theirs = published_cam(generator()) if flag == "--cam" else published_seg(segmenter())
    assert "4 classes, in the checkpoint 3" in error_line(capsys, *command(flag, theirs, 4))
    for gone in missing:
        less = {key: value for key, value in theirs.items() if key != gone}
        assert len(less) < len(theirs)
        assert "fit (" in error_line(capsys, *command(flag, less, 3)), gone
    more = theirs | {"blocks.0.attn.table": torch.zeros(1)}
    assert "attn.table" in error_line(capsys, *command(flag, more, 3))
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("flag, kind, other", [
    ("--seg", "CAM", "--cam"), ("--cam", "segmentation", "--seg")])
def test_the_other_kind_of_checkpoint_is_named(flag, kind, other, command, tmp_path, capsys):
    theirs = published_cam(generator()) if other == "--cam" else published_seg(segmenter())
    line = error_line(capsys, *command(flag, theirs, 3))
    assert f"WeakTr's {kind} checkpoint; pass it as {other}" in line
    call(*command(other, theirs, 3))
    file = "classify.pt" if other == "--cam" else "seg.pt"
    assert f"{tmp_path / file}; next:\n    python " in capsys.readouterr().out
