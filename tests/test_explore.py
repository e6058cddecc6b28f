"""explore.html of a run: its numbers are those of the run, its labels those of [eq. P1]."""
import json
import re
import shutil
import subprocess
from base64 import b64decode

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, call, error_line
from PIL import Image

import explore
from a_run import find_run
from common import Split
from eval import confusion_matrix, iou
from make_pseudo import read_cams, score_labels

NODE = """
const found = [];
RUN.photos.forEach((photo, p) => RUN.phases.forEach(phase => phase.cams.forEach(row => {
  const cams = row[p].map(text => enlarge(bytes(text), photo.cells, photo.size));
  for (const score of [0.01, 0.43, 0.5, 0.8]) {
    const labels = scoreLabels(cams, photo.present, score);
    found.push([p, score, cams.map(M => [...M]), [...labels], meanIoU(labels, bytes(photo.truth))]);
  }
})));
console.log(JSON.stringify(found));
"""


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    """Classification and matching with snapshots, their CAMs, no refinement -> its folder"""
    run = tmp_path_factory.mktemp("run")
    flags = ["--data", toy / "data", "--clip", toy / "clip.pt", "--out", run, *TINY]
    for phase in ("classify", "match"):
        call("train_cam", *flags, "--vit", toy / "vit.pth", "--phase", phase, "--snapshots", 3)
        call("train_cam", *flags, "--phase", "export", "--checkpoint", run / f"{phase}.pt",
             "--cams", run / f"cams_{phase}")
    call("explore", "--run", run, "--data", toy / "data")
    return run


def numbers(page):
    return json.loads(re.search(r"const RUN = (.*);\n", page.read_text("utf-8"))[1])


def decoded(text, shape):
    return np.frombuffer(b64decode(text), np.uint8).reshape(shape)


def node(page, code, tmp_path):
    """What the first part of a page's script, followed by this code, prints as JSON"""
    if not shutil.which("node"):
        pytest.skip("no node")
    script = re.search(r"<script>(.*)// The page", page.read_text("utf-8"), re.S)[1]
    (tmp_path / "page.js").write_text(script + code, "utf-8")
    return json.loads(subprocess.run(["node", tmp_path / "page.js"], check=True,
                                     capture_output=True).stdout)


def test_labels_and_iou_are_those_of_the_scripts(run, tmp_path):
    found, data = node(run / "explore.html", NODE, tmp_path), numbers(run / "explore.html")
    photos = data["photos"]
    assert len(found) == len(photos) * 2 * 3 * 4  # phases, steps, scores
    assert max(len(photo["present"]) for photo in photos) == 2
    for p, score, cams, labels, percent in found:
        size, C = photos[p]["size"], len(data["classes"]) + 1
        cams = torch.tensor(cams, dtype=torch.float64).view(-1, *size)
        expected = score_labels(cams, np.array(photos[p]["present"]), score)
        assert np.array_equal(np.reshape(labels, size), expected)
        matrix = confusion_matrix(expected, decoded(photos[p]["truth"], size), C)
        assert percent == pytest.approx(100 * np.nanmean(iou(matrix)))


def test_iou_leaves_255_out(run, tmp_path):
    labels, truth = np.uint8([0, 1, 1, 2, 0, 1]), np.uint8([0, 1, 2, 255, 255, 1])
    code = f"console.log(meanIoU({labels.tolist()}, {truth.tolist()}));"
    expected = 100 * np.nanmean(iou(confusion_matrix(labels, truth, 4)))
    assert node(run / "explore.html", code, tmp_path) == pytest.approx(expected)


@pytest.mark.parametrize("cells, size", [
    ((16, 16), (64, 64)), ((9, 12), (37, 50)), ((1, 3), (1, 9))])
def test_maps_are_enlarged_as_read_cams_does(cells, size, run, tmp_path):
    M = np.random.default_rng(0).integers(256, size=cells, dtype=np.uint8)
    code = f"[...enlarge({M.ravel().tolist()}, {[*cells]}, {[*size]})]"
    found = node(run / "explore.html", f"console.log(JSON.stringify({code}));", tmp_path)
    np.save(tmp_path / "M.npy", M[None].astype(np.float32) / 255)
    expected = read_cams(tmp_path, "M", [0], size)[0]
    assert np.allclose(np.reshape(found, size), expected, atol=1e-6)


def test_numbers_are_those_of_the_run(run, toy, tmp_path):
    split, data = Split(toy / "data", "train"), numbers(run / "explore.html")
    opened = find_run(explore.parse_args(["--run", str(run), "--data", str(split.root)]))
    names = explore.six_photos(opened)
    assert len(names) == len(data["photos"]) == 6 and data["score"] == 0.43
    assert [phase["title"] for phase in data["phases"]] == ["classification", "matching"]
    for phase, row in zip(("classify", "match"), data["phases"]):
        assert row["steps"] == [1, 2, 3]
        moved = 0
        for i, (name, photo) in enumerate(zip(names, data["photos"])):
            assert photo["present"] == split.present(name).tolist()
            shape = len(photo["present"]), *photo["cells"]
            exported = 255 * np.load(run / f"cams_{phase}/{name}.npy").astype(np.float32)
            maps = [np.stack([decoded(M, photo["cells"]) for M in maps[i]]) for maps in row["cams"]]
            assert exported.shape == shape and np.abs(maps[-1] - exported).max() <= 0.5
            last = explore.cams_by(opened, explore.load_generator(run / f"{phase}-3.pt", split),
                                   name, photo["cells"], (1, 1.2))
            assert np.abs(255 * last.numpy() - exported).max() < 0.3  # float16
            moved += np.abs(maps[0] - maps[-1].astype(int)).sum()
            truth = np.array(Image.open(toy / f"data/masks/{name}.png"))
            assert np.array_equal(decoded(photo["truth"], photo["size"]), truth)
        assert moved > 0  # the steps have their own maps
        call("eval", "--data", toy / "data", "--split", "train", "--cams", run / f"cams_{phase}",
             "--json", tmp_path / "score.json")
        miou = json.loads((tmp_path / "score.json").read_text())["miou"]
        assert row["miou"][explore.SCORES.index(0.43)] == pytest.approx(miou, abs=0.0051)


def test_snapshots_have_the_scales_of_the_export(run, toy, tmp_path, monkeypatch):
    opened, seen = find_run(explore.parse_args(["--run", str(run), "--data", f"{toy}/data"])), []
    opened.cams["match"] = shutil.copytree(run / "cams_match", tmp_path / "cams")
    (tmp_path / "cams/made_of.json").write_text('{"scales": [2]}')
    monkeypatch.setattr(explore, "cams_by", lambda *flags: (seen.append(flags[-1]), torch.zeros(
        1, 16, 16))[1])
    name = opened.chosen[0][0]
    explore.phase_of(opened, "match", {name: explore.photo_of(opened, name)})
    assert seen == [[2]] * 3


def test_the_page_is_one_small_file(run, chain, tmp_path, capsys, monkeypatch):
    """Also of one's own photos: large ones, without masks, with a class that looks like a tag"""
    def renamed(args):
        r = find_run(args)
        r.split.classes[0] = "</script><b>"
        return r
    monkeypatch.setattr(explore, "find_run", renamed)
    shutil.copytree(chain / "data", tmp_path / "data")
    shutil.copytree(chain / "cam", tmp_path / "run")
    for path in Split(tmp_path / "data", "few").paths.values():
        Image.open(path).resize((150, 100)).save(path)
    flags = ["--run", tmp_path / "run", "--data", tmp_path / "data", "--split", "few"]
    mine = tmp_path / "run/explore.html"
    call("explore", *flags)
    for photo in numbers(mine)["photos"]:
        assert (photo["size"], photo["cells"], photo["truth"]) == ([85, 128], [16, 24], None)
    assert [phase["miou"] for phase in numbers(mine)["phases"]] == [None] * 3
    assert "</script><b>" not in mine.read_text() and "&lt;/script" in mine.read_text()
    template = (ROOT / "experiments/explore.html").read_text("utf-8")
    for path in (mine, run / "explore.html", *ROOT.glob("docs/explore.html")):
        page = path.read_text("utf-8")
        assert re.sub("const RUN = .*;", "const RUN = {{RUN}};", page) == template
        assert len(page) < 500_000 and not re.search("http|<link|@import|url\\(", page)
        assert re.findall(r"\bsrc ?= ?(.{17})", page) == ['"data:image/jpeg;']
    mine.write_text("mine")
    assert "explore.py did not write it" in error_line(capsys, "explore", *flags)
    assert mine.read_text() == "mine"
