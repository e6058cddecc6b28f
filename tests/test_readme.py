"""The README promises what the code holds: equation tags, files, the vocabulary's licence line."""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["clip_model.py", "mask_generator.py", "train_cam.py", "make_pseudo.py", "train_seg.py", "eval.py"]


def tags(text):
    return set(re.findall(r"\[eq\. [^\]]+\]", text))


def test_equation_table_lists_exactly_the_tags_in_the_code():
    code = set().union(*(tags((ROOT / name).read_text(encoding="utf-8")) for name in SCRIPTS))
    assert code == tags((ROOT / "README.md").read_text(encoding="utf-8")) and len(code) > 5


def test_table_of_files_is_in_reading_order():
    rows = re.findall(r"^\| `(\w+\.py)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert rows == SCRIPTS


def test_imports_point_to_earlier_chapters_only():
    for i, name in enumerate(SCRIPTS):
        imported = re.findall(r"^from (\w+) import", (ROOT / name).read_text(encoding="utf-8"), re.M)
        assert not {f"{module}.py" for module in imported} & set(SCRIPTS[i:])
