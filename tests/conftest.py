"""What several test files share: a tiny toy world, a run of all scripts on it, and a way to call a script in-process."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: with models this small, threads on busy cores wait five times longer

import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--epochs", "1", "--batch", "4", "--prompt-epochs", "1", "--prompt-views", "1", "--prompt-batch", "8", "--lr", "1e-3",
        "--workers", "0", "--device", "cpu"]


def run_script(script, *flags, **options):
    """A script through its command line, in a Python of its own -> stdout; fails with the script's stderr."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{script} {flags}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def script():
    return run_script


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """12 + 4 images, clip.pt, vit.pth; the first image of either split is cut to 37 x 50 pixels. Read-only for tests."""
    world = tmp_path_factory.mktemp("toy")
    run_script("tests/toy_world.py", "--out", world, "--train", 12, "--val", 4)
    voc = world / "VOC2012"
    for split in ("train", "val"):
        name = (voc / "ImageSets/Segmentation" / f"{split}.txt").read_text().split()[0]
        for path in (voc / "JPEGImages" / f"{name}.jpg", voc / "SegmentationClass" / f"{name}.png"):
            with Image.open(path) as picture:
                picture.load()
            picture.crop((5, 20, 55, 57)).save(path)
    return world


@pytest.fixture
def voc(toy, tmp_path):
    """A copy of the toy VOC root that a test may damage."""
    return shutil.copytree(toy / "VOC2012", tmp_path / "VOC2012")


@pytest.fixture(scope="session")
def chain(toy, tmp_path_factory):
    """All stages before eval.py through their command lines, SegmentationClass removed: cam/, masks/, seg/ in one folder."""
    out = tmp_path_factory.mktemp("chain")
    root = shutil.copytree(toy / "VOC2012", out / "VOC2012", ignore=shutil.ignore_patterns("SegmentationClass"))
    weights = ["--clip", toy / "clip.pt", "--vit", toy / "vit.pth"]
    run_script("train_cam.py", "--data", root, *weights, "--out", out / "cam", "--phase", "all", *TINY)
    run_script("make_pseudo.py", "--data", root, "--cams", out / "cam/cams", "--out", out / "masks", "--device", "cpu")
    run_script("train_seg.py", "--data", root, "--labels", out / "masks", "--vit", toy / "vit.pth", "--out", out / "seg",
               "--epochs", 1, "--batch", 4, "--crop", 48, "--workers", 0, "--device", "cpu")
    return out


@pytest.fixture
def cam(toy, tmp_path):
    """cam(out, *flags): train_cam.py's main in this process, on the tiny toy world; later flags win."""
    import train_cam

    def call(out, *flags, data=toy / "VOC2012"):
        files = ["--data", data, "--clip", toy / "clip.pt", "--vit", toy / "vit.pth", "--out", out]
        train_cam.main(train_cam.parse_args([str(flag) for flag in [*files, *TINY, *flags]]))
        return {path.stem: torch.load(path, weights_only=True) for path in Path(out).glob("*.pt")}
    return call
