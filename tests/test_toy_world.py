"""The toy world's own claim"""
import toy as toy_world
import torch

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
