"""What other methods bring along: a CNN for the CAMs, CAMs of other programs, class-agnostic segments, hand-written words."""
import io
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
import torchvision
from conftest import TINY, call, error_line, files_in
from PIL import Image
from skimage.segmentation import felzenszwalb

import make_pseudo
import train_cam
from clip_model import InputError, load_clip, tokenize
from mask_generator import CNNGenerator, load_resnet

# ---------------------------------------------------------------------------------------------------------------------
# The CNN


def test_resnet_is_torchvisions_with_dilation(tmp_path):
    """Batch norm is drawn at random: where it were left at one and zero, mixing it up would not show."""
    torch.manual_seed(0)
    oracle = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True]).eval()
    for module in oracle.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.weight.data, module.running_var):
                values.uniform_(0.5, 1.5)
            module.bias.data.normal_()
    torch.save(oracle.state_dict(), tmp_path / "resnet50.pth")
    ours, x = load_resnet(tmp_path / "resnet50.pth").train(), torch.randn(1, 3, 100, 90)
    expected = oracle.maxpool(oracle.relu(oracle.bn1(oracle.conv1(x))))
    with torch.no_grad():
        expected = oracle.layer4(oracle.layer3(oracle.layer2(oracle.layer1(expected))))
        assert torch.allclose(ours(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
    assert expected.shape[2:] == (7, 6) and ours.patch == 16 and expected.std() > 0
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    assert load_resnet(tmp_path / "resnet18.pth")(x).shape == (1, 512, 7, 6)


def test_cam_of_the_cnn(toy):
    """[eq. Z1]: the prediction is the linear classifier of the pooled features, which is what Zhou et al. start from."""
    torch.manual_seed(0)
    generator, x = CNNGenerator(load_resnet(toy / "resnet.pth"), 6), torch.randn(2, 3, 64, 48)
    cam, logits = generator(x)
    features, w = generator.trunk(x), generator.head.weight[:, :, 0, 0]
    assert torch.allclose(logits[0], features.mean(dim=(2, 3)) @ w.t(), atol=1e-5)
    assert torch.allclose(cam, torch.einsum("kc,bchw->bkhw", w, features).relu(), atol=1e-5) and cam.shape == (2, 6, 16, 12)


def test_resnet_files_that_are_none(tmp_path, toy, capsys):
    line = error_line(capsys, "train_cam", "--data", toy / "data", "--generator", "resnet", "--resnet", toy / "vit.pth",
                      "--out", tmp_path, "--phase", "classify", *TINY)
    assert "not a ResNet checkpoint (no conv1.weight)" in line


def test_all_phases_with_the_cnn(toy, cam, tmp_path):
    """--generator is read in classify; each phase trains trunk and head, and the export needs no flag."""
    saved = cam(tmp_path, "--generator", "resnet", "--resnet", toy / "resnet.pth", "--phase", "classify")
    for phase in ("match", "prompts", "refine", "export"):
        saved = cam(tmp_path, "--phase", phase)
    for phase in ("match", "refine"):
        for name in ("trunk.layer4.0.conv1.weight", "trunk.conv1.weight", "head.weight"):
            assert not torch.equal(saved[phase]["generator"][name], saved["classify"]["generator"][name]), (phase, name)
    maps = np.load(tmp_path / "cams/train_00000.npy")
    assert maps.ndim == 3 and maps.max() > 0.99 and (tmp_path / "cams/background.json").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# CAMs of other programs


def as_other_programs(maps, present):
    """(n, h, w) of the present classes -> {program: what it gives to np.save}"""
    keys, tensor = torch.from_numpy(present), torch.from_numpy(maps)
    background = np.concatenate([np.full_like(maps[:1], 0.3), maps])
    return {"IRN and CLIMS": {"keys": keys, "cam": tensor[:, ::2, ::2].clone(), "high_res": maps},
            "AMN": {"keys": np.array([0, *(1 + present)]), "cam": background[:, ::2, ::2], "high_res": background},
            "CLIP-ES": {"keys": present, "cam": maps[:, ::2, ::2], "attn_highres": maps.astype(np.float16)},
            "PSA and MCTformer": dict(zip(present.tolist(), maps)),
            "WeakTr": {np.int64(k): each for k, each in zip(present, tensor)}}


@pytest.mark.parametrize("program", ["IRN and CLIMS", "AMN", "CLIP-ES", "PSA and MCTformer", "WeakTr"])
def test_cams_of_other_programs_give_the_same_masks(program, toy, chain, tmp_path, capsys):
    split = train_cam.Split(toy / "data", "train")
    for name in split.names:
        maps, present = np.load(chain / f"cam/cams/{name}.npy").astype(np.float32), np.flatnonzero(split.labels[name])
        np.save(tmp_path / name, as_other_programs(maps, present)[program], allow_pickle=True)
    flags = ["--data", toy / "data", "--background-score", 0.4, "--crf", "none"]
    call("make_pseudo", *flags, "--cams", chain / "cam/cams", "--out", tmp_path / "ours")
    capsys.readouterr()
    call("make_pseudo", *flags, "--cams", tmp_path, "--out", tmp_path / "theirs")
    assert capsys.readouterr().out.count("CAMs a dict of") == 1
    assert files_in(tmp_path / "ours") == files_in(tmp_path / "theirs") and len(files_in(tmp_path / "ours")) == 12
    call("eval", "--data", toy / "data", "--split", "train", "--cams", tmp_path, "--background-score", 0.4)
    assert "CAMs a dict of" in capsys.readouterr().out


def test_maps_beyond_0_and_1_are_scaled(tmp_path):
    np.save(tmp_path / "a.npy", {3: np.array([[-2.0, 0, 6]])}, allow_pickle=True)
    assert make_pseudo.load_cams(tmp_path / "a.npy", np.array([3]))[0].tolist() == [[[0, 0.25, 1]]]


class Malicious:
    def __init__(self, call, *flags):
        self.call, self.flags = call, flags

    def __reduce__(self):
        return self.call, self.flags


@pytest.mark.parametrize("function", [os.system, eval, torch.load, np.load, shutil.rmtree])
def test_malicious_pickle_executes_nothing(function, toy, tmp_path, capsys):
    with open(tmp_path / "train_00000.npy", "wb") as file:
        np.save(file, {0: Malicious(function, f"touch {tmp_path}/executed")}, allow_pickle=True)
    for script, more in (("make_pseudo", ["--out", tmp_path / "out"]), ("eval", [])):
        flags = ["--data", toy / "data", "--split", "train", "--cams", tmp_path, "--background-score", 0.4]
        line = error_line(capsys, script, *flags, *more)
        assert "train_00000.npy: no readable CAMs (its pickle asks for" in line and function.__name__.split(".")[-1] in line
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


def test_malicious_tensor_executes_nothing(tmp_path):
    """A tensor's storage is a pickle within the pickle."""
    inner = io.BytesIO()
    torch.save(Malicious(os.system, f"touch {tmp_path}/executed"), inner)
    np.save(tmp_path / "a.npy", {0: Malicious(torch.storage._load_from_bytes, inner.getvalue())}, allow_pickle=True)
    with pytest.raises(InputError, match="no readable CAMs"):
        make_pseudo.load_cams(tmp_path / "a.npy", np.array([0]))
    assert not (tmp_path / "executed").exists()


def pointer_as_object():
    """An array of objects out of eight bytes: NumPy would follow them."""
    return Malicious(np.ndarray, (1,), np.dtype("O"), b"12345678")


def test_pickled_pointers_and_numbers_are_refused(tmp_path):
    deep = pickle.dumps({0: 1})
    for _ in range(6000):
        deep = deep[:-1] + b"\x85."
    for data, why in ((pickle.dumps({0: pointer_as_object()}), "not callable"),
                      (pickle.dumps({0: np.zeros(2, "i4,O")}), "values of type V"),
                      (deep, "more parts than CAMs have"), (b"\x80\x04}r\x00\xc2\xeb\x0b.", "more parts than CAMs have")):
        with open(tmp_path / "a.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
            file.write(data)
        with pytest.raises(InputError, match=f"a.npy: no readable CAMs .*{why}"):
            make_pseudo.load_cams(tmp_path / "a.npy", np.array([0]))


@pytest.mark.parametrize("data", [{0: np.zeros((1, 3, 3))}, {0: 0.5}, {0: np.full((3, 3), np.nan)}, {"keys": [0], "highres": 1},
                                  {"keys": [0]}, {7: np.zeros((3, 3))}, [1, 2], {"keys": [0, 1], "cam": np.zeros((1, 3, 3))},
                                  {0: "map"}, {0: np.zeros((3, 3)), 1: np.zeros((3, 3)), 2: np.zeros((3, 3))}])
def test_dicts_of_something_else_are_refused(data, tmp_path):
    np.save(tmp_path / "a.npy", np.array(data, dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="a.npy: no readable CAMs"):
        make_pseudo.load_cams(tmp_path / "a.npy", np.array([0]))


# ---------------------------------------------------------------------------------------------------------------------
# Segments


def test_average_in_segments_by_hand():
    """A small segment lies on a large one; pixels in none keep their own."""
    cams = torch.tensor([[[0.0, 0.2, 0.4, 0.9], [0.6, 0.8, 1.0, 0.1]]])
    large, small = np.array([0, 1, 2, 4, 5, 6]), np.array([1, 5])
    for segments in ([large, small], [small, large]):
        expected = torch.tensor([[[0.5, 0.5, 0.5, 0.9], [0.5, 0.5, 0.5, 0.1]]])
        assert torch.allclose(make_pseudo.average_in_segments(cams, segments), expected)
    assert torch.allclose(make_pseudo.average_in_segments(cams, [small, np.array([0])])[0, 0], torch.tensor([0.0, 0.5, 0.4, 0.9]))


def test_segments_of_every_format_give_the_same_masks(toy, chain, tmp_path):
    """pycocotools writes the run lengths as SAM does, compressed; the same as a plain list, as booleans and as a label picture."""
    coco = pytest.importorskip("pycocotools.mask")
    split = train_cam.Split(toy / "data", "train")
    for kind in ("rle", "list", "npz", "png"):
        (tmp_path / kind).mkdir()
    for name in split.names:
        labels = 1 + felzenszwalb(np.array(split.image(name)), scale=100, sigma=0.5, min_size=20).astype(np.uint16)
        masks = np.stack([labels == label for label in np.unique(labels)])
        rles = [coco.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
        for rle in rles:
            rle["counts"] = rle["counts"].decode()
        plain = [{"size": rle["size"], "counts": make_pseudo.run_lengths(rle)} for rle in rles]
        assert all(np.array_equal(coco.decode(coco.frPyObjects(each, *each["size"])), mask) for each, mask in zip(plain, masks))
        (tmp_path / f"rle/{name}.json").write_text(json.dumps([{"segmentation": rle, "area": 1} for rle in rles]))
        (tmp_path / f"list/{name}.json").write_text(json.dumps({"annotations": [{"segmentation": each} for each in plain]}))
        np.savez(tmp_path / f"npz/{name}.npz", masks)
        Image.fromarray(labels).save(tmp_path / f"png/{name}.png")
    flags = ["--data", toy / "data", "--cams", chain / "cam/cams", "--background-score", 0.4, "--device", "cpu"]
    call("make_pseudo", *flags, "--out", tmp_path / "without", "--crf", "none")
    for kind in ("rle", "list", "npz", "png"):
        call("make_pseudo", *flags, "--out", tmp_path / f"out {kind}", "--crf", "none", "--segments", tmp_path / kind)
    made = [files_in(tmp_path / f"out {kind}") for kind in ("rle", "list", "npz", "png")]
    assert made[0] == made[1] == made[2] == made[3] != files_in(tmp_path / "without")
    call("make_pseudo", *flags, "--out", tmp_path / "crf", "--segments", tmp_path / "rle")
    assert len(files_in(tmp_path / "crf")) == 12


@pytest.mark.parametrize("damage", ["missing", "json", "size", "runs", "npz"])
def test_segments_that_do_not_fit_are_refused(damage, toy, chain, tmp_path, capsys):
    if damage == "json":
        (tmp_path / "train_00000.json").write_text("[{")
    elif damage == "size":
        (tmp_path / "train_00000.json").write_text(json.dumps([{"segmentation": {"size": [60000, 60000], "counts": [3600000000]}}]))
    elif damage == "runs":  # their sum is the photo's, modulo 2^64
        runs = [2**62] * 4 + [37 * 50]
        (tmp_path / "train_00000.json").write_text(json.dumps([{"segmentation": {"size": [37, 50], "counts": runs}}]))
    elif damage == "npz":
        np.savez(tmp_path / "train_00000.npz", np.zeros((2, 5, 5), bool))
    line = error_line(capsys, "make_pseudo", "--data", toy / "data", "--cams", chain / "cam/cams", "--background-score", 0.4,
                      "--out", tmp_path / "out", "--segments", tmp_path)
    assert "train_00000" in line and "no readable segments" in line and not files_in(tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# Words written by hand


def test_background_words_take_the_place_of_prompts(toy, chain, cam, tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text("train: rails\nboat: water, sky\nbird: sky\ncow: grass\n\ncar: road\nbottle: table\n")
    split, clip = train_cam.Split(toy / "data", "train"), load_clip(toy / "clip.pt")
    u_b = train_cam.load_background(train_cam.read_background_words(words, split.classes), None, clip, split)
    water, sky, rails = torch.nn.functional.normalize(
        clip.encode_text(tokenize([f"a photo of {word}." for word in ("water", "sky", "rails")])).detach(), dim=1)
    assert torch.allclose(u_b[0], (water + sky) / 2, atol=1e-6) and torch.allclose(u_b[1], rails, atol=1e-6)
    shutil.copy(chain / "cam/classify.pt", tmp_path)  # and no prompts.pt
    cam(tmp_path, "--phase", "refine", "--background-words", words)
    saved = cam(tmp_path, "--phase", "export")  # with the words of refine.pt
    assert saved["refine"]["recipe"]["background_words"][0] == ["water", "sky"] and (tmp_path / "cams/background.json").is_file()
    flags = ["--data", toy / "data", "--clip", toy / "clip.pt", "--out", tmp_path, "--phase", "refine", *TINY]
    assert "begun with background_words [['water', 'sky']" in error_line(capsys, "train_cam", *flags, "--resume")
    words.write_text(words.read_text().replace("cow: grass", "cow:"))
    assert "words.txt: cow; expected a line" in error_line(capsys, "train_cam", *flags, "--background-words", words)
