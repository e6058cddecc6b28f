"""What the README promises is in the code: equation tags, files, imports, functions."""
import importlib
import re
from functools import reduce

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHAPTERS = ["clip_model", "mask_generator", "train_cam", "make_pseudo", "train_seg", "eval"]
SOURCE = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8")
          for name in ("common", *CHAPTERS)}
IMPORTS = {  # between scripts: models and equations
    "common": set(), "clip_model": {"common"}, "mask_generator": {"common"},
    "train_cam": {"common", "clip_model", "mask_generator"}, "make_pseudo": {"common"},
    "train_seg": {"common", "mask_generator"},
    "eval": {"common", "make_pseudo", "mask_generator", "train_seg"}}


def tags(text):
    """Equations in brackets; [eq. S1, S2] counts as both"""
    found = re.findall(r"\[eq\. ([^\]]+)\]", text)
    return {tag.strip() for group in found for tag in group.split(",")}


def test_equation_tags_are_those_of_the_table():
    assert tags(README) == set().union(*map(tags, SOURCE.values()))


def test_functions_that_the_readme_names_exist():
    pattern = rf"\b({'|'.join(SOURCE)})\.(?!py\b)([A-Za-z_][\w.]*\w)"
    named = set(re.findall(pattern, README))
    assert len(named) > 5
    for chapter, name in named:
        reduce(getattr, name.split("."), importlib.import_module(chapter))


@pytest.mark.parametrize("name", SOURCE)
def test_imports_between_scripts(name):
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", SOURCE[name], re.M))
    assert imported & set(SOURCE) == IMPORTS[name]
    assert not imported & {"tests", "prepare", "experiments"} and "tests" not in SOURCE[name]


def test_departures_are_those_of_the_code():
    code = set().union(*(set(re.findall(r"\[(detail \w+)\]", text)) for text in SOURCE.values()))
    differences = (ROOT / "docs/differences.md").read_text(encoding="utf-8")
    assert code == set(re.findall(r"^\| (detail \w+) \|", differences, re.M))
