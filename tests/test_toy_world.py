"""The toy world's own claims"""
import pytest
import toy as toy_world
import torch
from conftest import files_in

from clip_model import load_clip, read_nouns

PAIRS = dict(zip(toy_world.OBJECTS, toy_world.BACKGROUNDS, strict=True))


@torch.no_grad()
def test_curves_carry_the_papers_story(toy):
    """An object reads best as its class with a quarter of its background, with half about as well
    as alone: matching leaks. Its background reads as such the more, the more of it is seen, even
    without the object: refinement can work."""
    curves = toy_world.curves(load_clip(toy / "clip.pt"), PAIRS, count=24)
    as_class, as_background = curves.T.tolist()
    alone, quarter, half, whole = as_class[0], as_class[1], as_class[2], as_class[4]
    assert quarter > alone + 0.01 and abs(half - alone) < 0.03 and alone - 0.1 < whole < alone
    seen = [as_background[i] for i in (0, 1, 2, 4, 5, 6)]
    assert seen == sorted(seen) and as_background[6] > as_background[0] + 0.4
    assert as_class[6] < alone - 0.2
    assert not set(toy_world.FILLERS) & {*read_nouns(), *toy_world.THINGS}  # they mean nothing


def test_the_same_seed_makes_the_same_files(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        toy_world.write_data(tmp_path / name, PAIRS, 3, 1, seed, 0.95)
    a, b, c = (files_in(tmp_path / name) for name in "abc")
    assert a == b and a != c and len(a) == 11  # 4 photos and masks, two lists, the classes
