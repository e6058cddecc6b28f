"""What several test files share: a tiny toy world, all scripts run on it, ways to call one."""
import importlib
import os
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: so small, threads cost more
ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "data"  # a few real photos and weights, where there are some
sys.path[:0] = [str(ROOT / "prepare"), str(ROOT / "experiments"), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from common import PALETTE, Training, run  # noqa: E402

TINY = ["--recipe", "toy", "--steps", "3", "--batch", "4", "--workers", "0", "--device", "cpu"]
CPU = torch.device("cpu")
PHASES = ["classify", "match", "prompts", "refine"]  # those that train


def run_script(script, *flags):
    """A file as `python FILE FLAGS` runs it, but in this process: importing torch takes seconds"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        runpy.run_path(str(ROOT / script), run_name="__main__")


def two_processes(function, *arguments):
    """MODULE.FUNCTION(*arguments as text) of tests/ or of a script, in two processes as torchrun
    starts them -> what both print"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module, name = function.split(".")
    code = f"import sys, conftest, {module}; {module}.{name}(*sys.argv[1:])"
    both = [subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], text=True, stdout=subprocess.PIPE,
        env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                          "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                          "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})
        for rank in (0, 1)]
    try:
        told = [process.communicate(timeout=300)[0] for process in both]
    finally:
        [process.kill() for process in both]
    assert [process.returncode for process in both] == [0, 0], function
    return "".join(told)


def call(script, *flags):
    """A script's command line in this process, which is faster."""
    module = importlib.import_module(script)
    run(module.main, module.parse_args([str(flag) for flag in flags]))


def error_line(capsys, script, *flags):
    """The one line with which the script refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call(script, *flags)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def files_in(folder):
    """{path below the folder: bytes}"""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def check_label_png(path, size, allowed):
    with Image.open(path) as picture:
        assert picture.mode == "P" and picture.size == size and picture.getpalette() == PALETTE
        assert set(np.unique(picture)) <= set(allowed), path


def error(ours, theirs):
    """max |ours - theirs| / max |theirs|"""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def moved(before, after):
    """Keys of the tensors of two state dicts that differ"""
    assert before.keys() == after.keys()
    return {key for key in before if not torch.equal(before[key], after[key])}


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """data/ with 12 + 4 images, clip.pt, vit.pth, resnet.pth. The first image of either split is
    cut to 37 x 50 pixels; few.csv lists three. Read-only for tests."""
    world = tmp_path_factory.mktemp("toy")
    run_script("prepare/toy.py", "--out", world, "--train", 12, "--val", 4)
    for path in (world / "data").glob("*/*_00000.*"):
        with Image.open(path) as picture:
            picture.load()
        picture.crop((5, 20, 55, 57)).save(path)
    rows = (world / "data/train.csv").read_text().splitlines(keepends=True)
    (world / "data/few.csv").write_text("".join(rows[:3]))
    return world


@pytest.fixture
def root(toy, tmp_path):
    """A copy of the toy data set that a test may damage."""
    return shutil.copytree(toy / "data", tmp_path / "data")


@pytest.fixture(scope="session")
def chain(toy, tmp_path_factory):
    """All stages before eval.py by their command lines, on data without masks: cam, masks, seg."""
    out = tmp_path_factory.mktemp("chain")
    data = shutil.copytree(toy / "data", out / "data", ignore=shutil.ignore_patterns("masks"))
    data, vit = ["--data", data], ["--vit", toy / "vit.pth"]
    run_script("train_cam.py", *data, "--clip", toy / "clip.pt", *vit, "--out", out / "cam", *TINY)
    run_script("make_pseudo.py", *data, "--cams", out / "cam/cams", "--out", out / "masks")
    run_script("train_seg.py", *data, "--labels", out / "masks", *vit, "--out", out / "seg", *TINY)
    return out


@pytest.fixture
def cam(toy):
    """cam(out, *flags): train_cam.py in this process on the tiny toy world; later flags win.
    -> {phase: checkpoint}"""
    import train_cam

    def cam(out, *flags, data=toy / "data"):
        files = ["--data", data, "--clip", toy / "clip.pt", "--vit", toy / "vit.pth", "--out", out]
        train_cam.main(train_cam.parse_args([str(flag) for flag in [*files, *TINY, *flags]]))
        return {path.stem: torch.load(path, weights_only=True) for path in Path(out).glob("*.pt")}
    return cam


@pytest.fixture
def dies_at_2(monkeypatch):
    """A training run is killed when it has saved its second step, until this is called."""
    original = Training.log

    def dies(loop, losses):
        original(loop, losses)
        if loop.done == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(Training, "log", dies)
    return lambda: monkeypatch.setattr(Training, "log", original)
