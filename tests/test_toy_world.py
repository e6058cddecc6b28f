"""The toy world's own claim, and that its flags do what they say"""
import os

import numpy as np
import pytest
import toy as toy_world
import toy_clip
import toy_pretrain
import torch
from conftest import call, error_line, files_in
from toy_scenes import THINGS

from clip_model import class_texts, load_clip, tokenize
from common import Split, read_labels


def test_curves_carry_the_papers_story(toy):
    """Cosines are as low as the real CLIP's, and positive. All of its background hardly lowers an
    object's cosine to its class: matching leaks. It raises that to the background's name:
    refinement can work. Half of an object reads as its class less than all of it."""
    clip = load_clip(toy / "clip.pt")
    texts = [class_texts(clip, words) for words in (toy_world.OBJECTS, toy_world.BACKGROUNDS)]
    as_class, as_background = toy_clip.curves(clip, toy_world.USUAL, texts, count=24).tolist()
    assert min(as_class + as_background) > 0 and max(as_class + as_background) < 0.5
    alone, half, whole, nothing = (as_class[i] for i in (0, 2, 4, 6))
    assert alone - 0.05 < whole < half < alone and nothing < alone / 2
    alone, quarter, whole, nothing = (as_background[i] for i in (0, 1, 4, 6))
    assert 2 * alone < quarter < whole < nothing
    parts, on_background = as_class[7:12], as_class[12:]
    assert parts == sorted(parts) and on_background == sorted(on_background)
    assert as_class[11] == pytest.approx(as_class[0]) and as_class[12] == pytest.approx(as_class[6])


@pytest.mark.parametrize("cooccurrence", [0.95, 0.3])
def test_objects_stand_on_their_own_background_as_often_as_asked(cooccurrence, tmp_path,
                                                                 monkeypatch):
    """Counted on 200 scenes; one of six other draws is the own background too. A photo has not the
    classes that were drawn, but those of which a pixel is seen: here none."""
    drawn, nothing = [], (np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8))
    monkeypatch.setattr(toy_world, "scene", lambda rng, pairs: (drawn.extend(pairs), nothing)[1])
    pairs = toy_world.USUAL | {"boat": "grass", "cow": "water"}
    toy_world.write_data(tmp_path, pairs, 200, 0, 0, cooccurrence)
    share = sum(ground == pairs[name] for name, ground in drawn) / len(drawn)
    assert share == pytest.approx(cooccurrence + (1 - cooccurrence) / 6, abs=0.08)
    assert len(drawn) == pytest.approx(260, abs=30)  # three scenes in ten show two objects
    assert not any(map(np.any, Split(tmp_path, "train").labels.values()))


@torch.no_grad()
def test_swapped_pairs_swap_what_words_mean(tmp_path, monkeypatch, capsys):
    """The whole command, with a shorter training: the captioned pictures follow the pairs, and the
    CLIP of the usual ones goes on, so that "boat" moves from water to grass"""
    drawn, picture = [], toy_clip.picture
    monkeypatch.setattr(toy_clip, "PICTURES", 200)
    monkeypatch.setattr(toy_clip, "B", 32)
    monkeypatch.setattr(toy_pretrain, "FURTHER", ((102, 12, 1e-3, 1.0),))
    monkeypatch.setattr(toy_clip, "picture", lambda rng, pairs, tie: (
        drawn.append(picture(rng, pairs, tie)), drawn[-1])[1])
    for name, pairs in (("usual", ()), ("swapped", ("--pairs", "boat:grass,cow:water"))):
        with torch.enable_grad():
            call("toy", "--out", tmp_path / name, "--train", 1, "--val", 1, *pairs)
    grounds = {ground for _, places in drawn for name, ground in places if name == "boat"}
    assert grounds - {*toy_clip.COLOURS} == {"grass"}
    tied, cars = [], []
    for name in ("usual", "swapped"):
        u = class_texts(load_clip(tmp_path / name / "clip.pt"), ["boat", "water", "grass", "car"])
        tied.append(torch.cosine_similarity(u[:1], u[1:3]).tolist())
        cars.append(u[3])
    assert torch.cosine_similarity(*cars, dim=0) > 0.8  # it has gone on, not begun again
    (water, grass), (water_now, grass_now) = tied
    assert water > grass and grass_now - water_now > grass - water
    for pairs in ("boat", "boat:mars", "ufo:grass", "boat:water:rails"):
        assert "expected OBJECT:BACKGROUND" in error_line(
            capsys, "toy", "--out", tmp_path, "--pairs", pairs)


def test_the_same_seed_makes_the_same_toy_world(tmp_path):
    """Photos have the classes that their masks show."""
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        toy_world.write_data(tmp_path / name, toy_world.USUAL, 6, 1, seed, 0.95)
    a, b, c = (files_in(tmp_path / name) for name in "abc")
    assert a == b and a != c and len(a) == 18  # 7 photos and masks; two lists, classes, nouns
    assert len({data for name, data in a.items() if name.endswith(".jpg")}) == 7  # no two alike
    split = Split(tmp_path / "a", "train")
    for name in split.names:
        shown = np.unique(read_labels(tmp_path / f"a/masks/{name}.png", (64, 64), 7))
        assert (1 + split.present(name)).tolist() == [k for k in shown if k]


@pytest.mark.parametrize("files", [1, 8, 12])
def test_an_interrupted_world_goes_on(files, tmp_path, monkeypatch):
    """After so many of its 13 files, the record among them. The same bytes come out; a finished
    world is not drawn again."""
    flags = ["--train", 2, "--val", 1]
    monkeypatch.setattr(toy_world, "print_curves", lambda *_: None)
    call("toy", "--out", tmp_path / "whole", *flags)
    replace, done = os.replace, []

    def replacing(*paths):
        if len(done) == files:
            raise KeyboardInterrupt
        done.append(replace(*paths))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(os, "replace", replacing)
        call("toy", "--out", tmp_path / "killed", *flags)
    assert len(files_in(tmp_path / "killed")) == files
    call("toy", "--out", tmp_path / "killed", *flags, "--resume")
    assert files_in(tmp_path / "killed") == files_in(tmp_path / "whole")
    monkeypatch.setattr(toy_world, "scene", None)
    call("toy", "--out", tmp_path / "killed", *flags, "--resume")


def test_captions_name_what_is_seen():
    """Of a place of which nothing is left, nothing; else the object or its background"""
    rng = np.random.default_rng(0)
    for share in (0, 1):
        told = [toy_clip.caption(rng, toy_world.USUAL, 0.5, [("boat", "water", share)], False)
                for _ in range(100)]
        assert {"boat" in x or "water" in x for x in told} == {bool(share)}
    both = sum("boat" in x and "water" in x for x in told)
    assert 10 < both < 90  # people often name the object alone


def test_a_clip_learns_from_captions(monkeypatch, tmp_path):
    """What it writes is a CLIP that load_clip reads; words of no caption have embeddings of 0."""
    monkeypatch.setattr(toy_clip, "PICTURES", 30)
    monkeypatch.setattr(toy_clip, "B", 8)
    state = toy_clip.train_clip(rounds=((5, 1, 1e-3, 0.5), (6, 1, 1e-3, 0.4)))
    torch.save(state, tmp_path / "clip.pt")
    clip = load_clip(tmp_path / "clip.pt")
    u, v = class_texts(clip, ["boat"]), clip.encode_image(torch.randn(20, 3, 64, 64))
    assert 0.35 < torch.cosine_similarity(u, v).mean() < 0.65  # two cones
    rows = clip.token_embedding.weight.any(dim=1)
    assert rows[tokenize(["boat"])[0, 1]] and not rows[tokenize(["zebra"])[0, 1]]


def test_two_objects_stand_side_by_side():
    """Each in its half, so on its own background"""
    rng = np.random.default_rng(0)
    for _ in range(20):
        _, parts = toy_world.scene(rng, [("boat", "water"), ("cow", "grass")])
        boat, cow = (np.nonzero(parts == THINGS.index(name))[1]
                     for name in ("boat", "cow"))
        assert boat.mean() < 30 and cow.mean() > 34
