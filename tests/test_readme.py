"""The README promises what the code holds: equation tags, functions, files in reading order."""
import importlib
import re
from functools import reduce

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHAPTERS = ["clip_model", "mask_generator", "train_cam", "make_pseudo", "train_seg", "eval"]
SOURCE = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in CHAPTERS}


def tags(text):
    return set(re.findall(r"\[eq\. [^\]]+\]", text))


def test_equation_tags_are_those_of_the_code():
    code = set().union(*map(tags, SOURCE.values()))
    assert code == tags(README) and len(code) > 5


def test_functions_that_the_readme_names_exist():
    named = set(re.findall(rf"\b({'|'.join(CHAPTERS)})\.(?!py\b)([A-Za-z_][\w.]*\w)", README))
    assert len(named) > 5
    for chapter, name in named:
        reduce(getattr, name.split("."), importlib.import_module(chapter))


def test_table_of_files_is_in_reading_order():
    assert re.findall(r"^\| `(\w+)\.py` \|", README, re.M) == CHAPTERS


def test_imports_point_to_earlier_chapters_only():
    for i, name in enumerate(CHAPTERS):
        imported = set(re.findall(r"^\s*(?:from|import) (\w+)", SOURCE[name], re.M))
        assert not imported & set(CHAPTERS[i:]) and (i == 0 or "clip_model" in imported)


def test_departures_are_those_of_the_code():
    code = set().union(*(set(re.findall(r"\[(detail \w+)\]", source)) for source in SOURCE.values()))
    rows = re.findall(r"^\| (detail \w+) \|", (ROOT / "docs/differences.md").read_text(encoding="utf-8"), re.M)
    assert sorted(code) == sorted(rows)


def test_six_scripts_and_no_seventh():
    """A utils.py would have to be argued for here."""
    assert {path.stem for path in ROOT.glob("*.py")} == set(CHAPTERS)
    assert {path.stem for path in (ROOT / "prepare").glob("*.py")} == {"voc", "coco", "toy"}
