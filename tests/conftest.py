"""What several test files share: a tiny toy world, a run of all scripts on it, and ways to call a script."""
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: with models this small, threads on busy cores wait five times longer
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "prepare"), str(ROOT / "tests")]

import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from clip_model import run  # noqa: E402

TINY = ["--recipe", "toy", "--steps", "3", "--batch", "4", "--workers", "0", "--device", "cpu"]


def run_script(*command):
    """A command line in a Python of its own -> stdout; fails with its stderr."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


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
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), "\n".join(lines)
    return lines[0]


def files_in(folder):
    """{path below the folder: bytes}"""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """data/ with 12 + 4 images, clip.pt, vit.pth; the first image of either split is cut to 37 x 50 pixels. Read-only for tests."""
    world = tmp_path_factory.mktemp("toy")
    run_script("prepare/toy.py", "--out", world, "--train", 12, "--val", 4)
    for path in ("images/train_00000.jpg", "masks/train_00000.png", "images/val_00000.jpg", "masks/val_00000.png"):
        with Image.open(world / "data" / path) as picture:
            picture.load()
        picture.crop((5, 20, 55, 57)).save(world / "data" / path)
    return world


@pytest.fixture
def root(toy, tmp_path):
    """A copy of the toy data set that a test may damage."""
    return shutil.copytree(toy / "data", tmp_path / "data")


@pytest.fixture(scope="session")
def chain(toy, tmp_path_factory):
    """All stages before eval.py through their command lines, on a data set without masks/: cam/, masks/, seg/ in one folder."""
    out = tmp_path_factory.mktemp("chain")
    data = shutil.copytree(toy / "data", out / "data", ignore=shutil.ignore_patterns("masks"))
    vit = ["--vit", toy / "vit.pth"]
    run_script("train_cam.py", "--data", data, "--clip", toy / "clip.pt", *vit, "--out", out / "cam", *TINY)
    run_script("make_pseudo.py", "--data", data, "--cams", out / "cam/cams", "--out", out / "masks", "--device", "cpu")
    run_script("train_seg.py", "--data", data, "--labels", out / "masks", *vit, "--out", out / "seg", *TINY)
    return out


@pytest.fixture
def cam(toy):
    """cam(out, *flags): train_cam.py in this process, on the tiny toy world; later flags win -> {phase: checkpoint}"""
    import train_cam

    def cam(out, *flags, data=toy / "data"):
        files = ["--data", data, "--clip", toy / "clip.pt", "--vit", toy / "vit.pth", "--out", out]
        train_cam.main(train_cam.parse_args([str(flag) for flag in [*files, *TINY, *flags]]))
        return {path.stem: torch.load(path, weights_only=True) for path in Path(out).glob("*.pt")}
    return cam
