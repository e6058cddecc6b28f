"""The toy world's own claims, and the ablation's bookkeeping."""
import json
import sys
from pathlib import Path

import ablation
import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "prepare"))
import toy as toy_world  # noqa: E402

from clip_model import load_clip, read_nouns  # noqa: E402

PAIRS = dict(zip(toy_world.OBJECTS, toy_world.BACKGROUNDS, strict=True))


@pytest.fixture(scope="module")
def clip(toy):
    return load_clip(toy / "clip.pt")


def test_curves_carry_the_papers_story(clip):
    """An object reads best as its class with a quarter of its background, with half about as well as alone, with all nearly:
    matching leaks. Its background reads the more as such the more of it is seen, without the object too: refinement can work."""
    with torch.no_grad():
        as_class, as_background = toy_world.curves(clip, PAIRS, count=24).T.tolist()
    alone, quarter, half, whole = as_class[0], as_class[1], as_class[2], as_class[4]
    assert quarter > alone + 0.01 and abs(half - alone) < 0.03 and alone - 0.1 < whole < alone
    assert as_background[0] < as_background[1] < as_background[2] < as_background[4] < as_background[5] < as_background[6]
    assert as_background[6] > as_background[0] + 0.4 and as_class[6] < alone - 0.2


def test_fillers_mean_nothing():
    assert not set(toy_world.FILLERS) & {*read_nouns(), *toy_world.THINGS}


def test_windows_are_slices():
    x = torch.arange(2 * 8 * 8 * 3).view(2, 8, 8, 3)
    top, left = torch.tensor([0, 5, 2, 4]), torch.tensor([1, 0, 5, 3])
    for n, window in enumerate(toy_world.windows(x, top, left, 3)):
        assert torch.equal(window, x[n % 2, top[n]:top[n] + 3, left[n]:left[n] + 3])
    assert torch.equal(toy_world.windows(x[..., 0], top, left, 3), toy_world.windows(x, top, left, 3)[..., 0])


def test_pairs():
    assert toy_world.read_pairs("") == PAIRS
    other = toy_world.read_pairs("boat:grass,cow:road,car:table,bottle:water")
    assert other == {"boat": "grass", "train": "rails", "bird": "sky", "cow": "road", "car": "table", "bottle": "water"}


def test_the_same_seed_makes_the_same_files(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        toy_world.write_data(tmp_path / name, PAIRS, 3, 1, seed, 0.95)
    a, b, c = ({path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")} for name in "abc")
    assert a == b and a != c and len(a) == 11  # 4 photos and masks; two lists and the classes


# ------------------------------------------------------------------------------------------ the ablation

def test_rows_vary_the_weights_around_the_recipe():
    titles = [row.title for row in ablation.ROWS]
    assert len(set(titles)) == len(titles)
    weights = {row.title: row.value for row in ablation.ROWS if "lambda_" in row.title}
    for name, default, factors in (("lambda_R", 1, (0, 0.25, 0.5, 2, 4)), ("lambda_T", 0.02, (0.25, 4))):
        assert [weights[f"{name} x {x}"] for x in factors] == pytest.approx([x * default for x in factors])
    assert {name for _, points in ablation.PANELS for _, name in points} <= set(titles)


def test_table_and_picture(tmp_path, capsys):
    args = ablation.parse_args(["--out", str(tmp_path), "--report", "--seeds", "0", "1"])
    for seed, miou in ((0, 40), (1, 44)):
        for title in ("matching only", "the method", "lambda_R x 2"):
            out = tmp_path / f"seed{seed}" / title.replace(" ", "_")
            out.mkdir(parents=True)
            (out / "score.json").write_text(json.dumps({"miou": miou, "oracle": {"miou": miou + 1}}))
        (tmp_path / f"seed{seed}/chain").mkdir()
        lines = [f"{name}: {word} 0.9, photo 0.5" for name, word in PAIRS.items()]
        (tmp_path / f"seed{seed}/chain/prompts.txt").write_text("\n".join([*lines[:-1], "bottle: water bottle 0.9, table 0.8"]))
    ablation.main(args)
    table = {line[:36].strip(): line[36:].split() for line in capsys.readouterr().out.splitlines() if "±" in line}
    assert table["the method"] == ["42.0", "±", "2.8", "43.0", "±", "2.8", "5", "5", "2"]
    assert set(table) == {"matching only", "the method", "lambda_R x 2"}
    with Image.open(tmp_path / "ablation.png") as picture:
        assert picture.size == (1200, 240) and np.asarray(picture).std() > 0
