"""docs/method.md shows the code that there is; experiments/ runs: companion, words, one_photo,
bench."""
import html
import importlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call, error_line, files_in
from PIL import Image

sys.path.insert(0, str(ROOT / "experiments"))
import ablation  # noqa: E402
import bench  # noqa: E402
import companion  # noqa: E402
import one_photo  # noqa: E402
import train_cam  # noqa: E402
from clip_model import class_texts, load_clip  # noqa: E402
from mask_generator import scaled_input  # noqa: E402
from train_cam import clip_view, cosine, recipe_of  # noqa: E402

TEXT = (ROOT / "docs/method.md").read_text(encoding="utf-8")
FIGURES = ROOT / "figures/method"
SCRIPTS = ("clip_model", "mask_generator", "train_cam", "make_pseudo", "train_seg", "eval")


def test_excerpts_are_the_code():
    found = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    sources = [textwrap.dedent((ROOT / f"{name}.py").read_text("utf-8")) for name in SCRIPTS]
    assert len(found) > 8
    for excerpt in found:
        assert any(excerpt in source for source in sources), excerpt


def test_names_in_the_text_exist():
    for script, name in set(re.findall(rf"`({'|'.join(SCRIPTS)})\.(?!py)(\w+)", TEXT)):
        assert hasattr(importlib.import_module(script), name), name


def test_numbers_are_those_of_the_tables():
    tables, text = json.loads((FIGURES / "tables.json").read_text()), " ".join(TEXT.split())
    rows = [(name, [f"{x:.2f}" for x in row.values()])
            for name, row in tables["growing, cosines"].items()]
    for name, hard in tables["growing, hard"].items():
        pairs = zip(hard.values(), tables["growing, soft"][name].values())
        rows.append((name, [", ".join(f"{x:.2f}" for x in pair if x is not None)
                            for pair in pairs]))
    rows += [(name, [f"{x:.1f}" for x in row.values()]) for name, row in tables["IoU"].items()]
    classes = ("all", "boat", "train", "bird", "cow", "car", "bottle")
    pairs = tables["refined minus matching CAM, on the object, beside it"]
    assert " | ".join("{:+.3f}, {:+.3f}".format(*pairs[k]) for k in classes) in text
    for name, cells in rows:
        assert f"| {name} | {' | '.join(cells)} |" in text
    head = " | ".join(["mean", "background", *classes[1:]])
    assert head in text and list(tables["IoU"]["matching"]) == head.split(" | ")
    shares = tables["share on the object, of pixels and of the CAM's mass"]
    assert ("mass {classify:.0%} lies on the true object after classification, {match:.0%} after "
            "matching, {refine:.0%} after").format(**shares) in text
    assert "Chosen here: {chosen}, with an mIoU of {mIoU there}".format(
        **tables["background score"]) in text
    assert f"than its pseudo mask does on {tables['model better than its pseudo mask']} " in text


def test_the_batch_of_section_0_is_that_of_the_tables():
    section = TEXT[TEXT.index("## 0."):TEXT.index("## 1.")]
    found = re.findall(r"^\| `([\w.]+)` \| (.*?) \|", section, re.M)
    batch = json.loads((FIGURES / "tables.json").read_text())["one batch of matching"]
    assert found == list(batch.items()) and len(found) > 8  # in the order of returning


def test_what_sections_3_and_5_measure():
    tables, text = json.loads((FIGURES / "tables.json").read_text()), " ".join(TEXT.split())
    background, blank = tables["class text against its background, a blank"]["all"]
    floor, of_blank = tables["second term of L_match there"]
    assert (f"cosine of {background:.2f} with a picture of its background alone, and of "
            f"{blank:.2f} with a blank") in text
    assert f"-0.75 log(1 - {background:.2f}) = {floor:.2f} and {of_blank:.2f}" in text
    assert floor == pytest.approx(-0.75 * math.log(1 - background), abs=0.01)
    voc = recipe_of("voc", "refine", {})
    second, slope = -voc["lambda_b"] * math.log(0.75), voc["lambda_b"] / 0.75
    assert (f"At 0.25 the first term is {-math.log(0.25):.2f}, the second {second:.2f} with VOC's "
            f"lambda_b; their slopes are {1 / 0.25:.0f} and {slope:.1f}") in text
    assert "VOC's weights are lambda_b {lambda_b} and lambda_R {lambda_r}.".format(**voc) in text
    assert f"eps {voc['eps']}, so they are at most {1 / (1 + voc['eps']):.2f}" in text
    changed = tables["pixels that become right, become wrong, in percent"]
    assert ("{}% are background that becomes right and {}% background that becomes wrong; {}% are "
            "object that becomes right, {}% object that becomes wrong").format(
                *changed["background"], *changed["object"]) in text
    assert ("removes have an mIoU of {only removed}, with only what it adds {only added}".format(
        **tables["mIoU"])) in text
    before, after = tables["scores of matching, refinement"]
    lower = tables["mIoU"]["matching, score of refinement"]
    assert f"{after} instead of {before}" in text and f"cut at {after} has {lower}" in text
    share = tables["gradient on the object, share of red, of blue"]
    pixels = tables["share on the object, of pixels and of the CAM's mass"]["pixels"]
    assert ("covers {:.0%} of the pixels, but has only {:.0%} of the red of L_refine and {:.0%} of "
            "the blue; of the gradient of L_total {:.0%} and {:.0%}").format(
                pixels, *share["L_refine"], *share["sum"]) in text


def test_the_ablation_is_drawn_from_its_table(tmp_path):
    results = ROOT / "docs/results.md"
    found = ablation.read_results(results.read_text(encoding="utf-8"))
    assert found["co-occurrence 80 %, the method"] == (78.2, None)
    assert found["the method"] == (76.5, 1.6)  # of two tables the later one
    for p, row in ((50, "co-occurrence 50 %, classification"),
                   (80, "co-occurrence 80 %, classification"), (95, "classification")):
        assert f"at {p} % " + "{} ± {}".format(*found[row]) in " ".join(
            TEXT.replace("the classifier has ", "").lower().split())
    rows = [f"co-occurrence 100 %, {name}" for name in ("classification", "matching", "the method")]
    assert ("fails: {} (section 1). Matching still has {} and refinement {}, one seed".format(
        *(found[row][0] for row in rows)) in " ".join(TEXT.split()))
    scores = {"the method": [(76.5, 77.1, 6), (75, 76, 6)], "seg": [(72.04, None, None)]}
    assert ablation.read_results(ablation.table(scores)) == {
        "the method": (75.8, 1.1), "seg": (72, None)}
    pictures = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        call("ablation", "--table", results, "--out", folder)
        pictures.append((folder / "ablation.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_pictures_are_there_and_all_are_shown():
    shown = set(re.findall(r"\]\(\.\./figures/method/([\w.]+)\)", TEXT))
    assert shown == {path.name for path in FIGURES.iterdir()} == {
        "tables.json", *companion.CAPTIONS}


@pytest.fixture(scope="module")
def run(toy, chain, tmp_path_factory):
    """The tiny chain with the files of a demo"""
    run = tmp_path_factory.mktemp("run")
    shutil.copytree(toy / "data", run / "data")
    for source, folder in (("cam", "cam"), ("masks", "masks"), ("seg", "seg"), ("seg", "full")):
        shutil.copytree(chain / source, run / folder)
    shutil.copy(toy / "clip.pt", run)
    for phase in companion.PHASES:
        call("train_cam", "--data", run / "data", "--clip", run / "clip.pt", "--out", run / "cam",
             "--phase", "export", "--checkpoint", run / f"cam/{phase}.pt", "--cams",
             run / f"cams_{phase}", "--recipe", "toy", "--device", "cpu")
    (run / "demo.json").write_text(json.dumps({"seed": 0, "world": "", "generator": "vit"}))
    (run / "table.json").write_text(json.dumps(dict.fromkeys(companion.TABLE, 1.0)))
    return run


def test_page_and_pictures(run, tmp_path):
    call("companion", "--run", run, "--figures", tmp_path)
    page = (run / "index.html").read_text()
    pictures = re.findall(r'<img[^>]* src="([^"]+)" alt="([^"]+)">', page)
    assert len(pictures) == page.count("<img") > 12 and "http" not in page
    for source, alt in pictures:
        Image.open(run / html.unescape(source)).verify()
        assert len(alt) > 10
    assert {"strip.png", "companion/log_seg_seg.png"} <= {source for source, _ in pictures}
    assert files_in(tmp_path).keys() == {path.name for path in FIGURES.iterdir()}
    before = files_in(run)
    call("companion", "--run", run)
    assert files_in(run) == before


@pytest.fixture
def opened(run):
    return companion.open_run(companion.parse_args(["--run", str(run)]))


def test_parts_of_the_generator_make_the_fine_map(opened):
    """[eq. W3] at the marked patch, by hand; class attention is off"""
    name, k = opened.chosen[0]
    for phase in companion.PHASES:
        maps, patch = companion.parts_of(opened, phase, name, k)
        by_hand = (maps["A_p2p"] * maps["coarse"]).sum()
        assert maps["fine"].flatten()[patch] == maps["fine"].max()
        assert torch.allclose(by_hand, maps["fine"].max(), rtol=1e-4)


def test_growing_masks_end_at_the_object_and_at_the_photo():
    inside = torch.zeros(16, 16, dtype=bool)
    inside[4:10, 3:12] = True
    masks = companion.growing_masks(inside)[:, 0].bool()
    assert torch.equal(masks[companion.SHARES.index(1)], inside) and masks[-1].all()
    assert all((small <= large).all() for small, large in zip(masks, masks[1:]))
    assert masks[0].sum() == 6 and masks[0, 6:8, 6:9].sum() == 6  # a tenth, from the middle


def test_gradients_are_those_of_the_losses(opened):
    """Against a small step of the mask"""
    name, k = opened.chosen[0]
    M, *gradients = companion.mask_gradients(opened, name, k)
    X, u_f, u_b = companion.view(opened, name), *(opened.texts[t][k][None]
                                                  for t in ("class text", "prompt"))

    def losses(M):
        v_f, v_b = companion.embed_masked(opened.clip, X, M)
        match = companion.match_loss(v_f, v_b, u_f, opened.recipe["lambda_b"])
        refine = opened.recipe["lambda_r"] * companion.refine_loss(v_f, u_b)
        return torch.stack([match, refine, match + refine])
    step = torch.zeros_like(M)
    (h, w), R = gradients[0].shape, len(M)
    step[:R // h, :R // w] = 1e-2  # the first place
    with torch.no_grad():
        rise = (losses(M + step) - losses(M - step)) / (2 * step.sum())
    assert torch.allclose(rise, torch.stack([g[0, 0] for g in gradients]), rtol=0.05, atol=1e-7)


def test_page_of_own_photos(chain, toy, tmp_path, capsys):
    """The README's folder, without masks: first all of it, then a run that stopped after matching.
    The scripts that trained it saw no masks either."""
    run, data = tmp_path / "mine", chain / "data"
    shutil.copytree(chain / "cam", run)
    shutil.copytree(chain / "masks", run / "masks")
    shutil.copy(chain / "seg/seg.pt", run)
    flags = ["--run", run, "--data", data, "--clip", toy / "clip.pt"]
    call("companion", *flags)
    page = (run / "index.html").read_text()
    assert set(re.findall(r"companion/(\d\w+)", page)) == {
        "1_inside", "1_looks", "2_regions", "4_prompts", "5_removes", "5_gradients", "6_crf",
        "7_model"}
    assert "IoU" not in page
    assert json.loads((run / "companion/tables.json").read_text()).keys() == {
        "one batch of matching", "nouns nearest to the prompt"}
    for path in [*run.glob("refine.*"), *run.glob("prompts.*"), *run.glob("cams/*")]:
        path.unlink()
    call("companion", *flags)
    page = (run / "index.html").read_text()
    assert set(re.findall(r"companion/(\d\w+)", page)) == {
        "1_inside", "1_looks", "2_regions", "7_model"}
    (run / "classify.pt").unlink(), (run / "match.pt").unlink()
    assert "expected the --out of train_cam.py" in error_line(capsys, "companion", *flags)


def test_words_are_prompts(toy, chain, cam, tmp_path, capsys):
    lines, file = [f"{name}: water, sky" for name in companion.toy.OBJECTS], tmp_path / "words.txt"
    flags = ["--data", toy / "data", "--clip", toy / "clip.pt", "--out", tmp_path, "--words", file]
    file.write_text("\n".join(lines[1:]))
    assert "expected a line" in error_line(capsys, "words", *flags)
    file.write_text("\n".join(lines))
    call("words", *flags)
    clip = load_clip(toy / "clip.pt")
    texts = F.normalize(class_texts(clip, ["water", "sky"]), dim=1)
    shutil.copy(chain / "cam/classify.pt", tmp_path)
    state = cam(tmp_path, "--phase", "refine")  # reads them
    assert torch.allclose(state["prompts"]["u_b"], texts.mean(dim=0).expand(6, -1), atol=1e-6)


def test_one_photo(toy, chain, tmp_path, capsys):
    photo, gif = toy / "data/images/train_00003.jpg", tmp_path / "one.gif"  # a cow on grass
    flags = ["--clip", toy / "clip.pt", "--image", photo, "--steps", 20, "--out", gif, "--class"]
    call("one_photo", *flags, "cow", "--background", "grass")
    with Image.open(gif) as picture:
        assert picture.n_frames == 9 and picture.size == (700, 560)
    first = gif.read_bytes()
    call("one_photo", *flags, "cow", "--prompts", chain / "cam/prompts.pt")
    assert gif.read_bytes() != first
    assert "class of boat, train" in error_line(capsys, "one_photo", *flags, "zebra", "--prompts",
                                                chain / "cam/prompts.pt")
    with pytest.raises(SystemExit):
        call("one_photo", *flags, "cow")

    clip = load_clip(toy / "clip.pt")
    X = clip_view(clip, scaled_input(Image.open(photo), 1, 1, 10 ** 6))
    u_f, *words = class_texts(clip, ["cow", "grass", "sky"]).split(1)
    grass, sky = (one_photo.optimise(clip, X, u_f, u_b, 20) for u_b in words)    # (9, 1, R, R)
    assert torch.equal(grass[:5], sky[:5]) and (grass[0] == 0.5).all()  # matching needs no word
    kept = [clip.encode_image(M[None] * X) for M in (grass[4], grass[8], sky[8])]
    matched, own, other = (cosine(v, words[0]).item() for v in kept)
    assert own < other - 0.05 and own < matched - 0.05


def read_exercises():
    """docs/method.md -> [(file or "", text, text in its place, flags)]"""
    section, found = TEXT[TEXT.index("## 8."):].split("<details>")[0], []
    for part in re.split(r"\n\d\. ", section)[1:]:
        edit = re.findall(r"In `([\w.]+)` replace `(.+?)` by `(.+?)`", " ".join(part.split()))
        found += [(*(edit or [("", "", "")])[0], flags)
                  for flags in re.findall(r"^ +python experiments/exercise\.py (.+)$", part, re.M)]
    return found


@pytest.mark.parametrize("file, old, new, flags", read_exercises())
def test_exercises_run(file, old, new, flags, run, toy, tmp_path, monkeypatch, capsys):
    for path in ("data", "cam", "clip.pt", "demo.json", "table.json"):
        (tmp_path / path).symlink_to(run / path)
    (tmp_path / "vit.pth").symlink_to(toy / "vit.pth")
    if file:  # as a reader edits it
        module = importlib.import_module(file[:-3])
        source = (ROOT / file).read_text(encoding="utf-8")
        assert source.count(old) == 1
        scope = dict(vars(module))
        exec(compile(source.replace(old, new), file, "exec"), scope)
        name = {"mask_generator.py": "MaskGenerator", "train_cam.py": "clip_view"}[file]
        for user in (module, train_cam):
            monkeypatch.setattr(user, name, scope[name])
    flags = [word + " --train 12 --val 4" if word.startswith("--c") else word
             for word in shlex.split(flags)]
    call("exercise", "--run", tmp_path, "--steps", "2", *flags)
    table = re.findall(r"^(classify|match|refine), (demo|yours) +[\d.]+ +[\d.]+ +0\.\d+$",
                       capsys.readouterr().out, re.M)
    expected = [phase for phase in ("classify", "match", "refine") if phase in flags]
    assert table == [(phase, name) for phase in expected for name in ("demo", "yours")]


@pytest.mark.parametrize("what", ["clip", "crf", "eval", "step"])
def test_benches_run(what, monkeypatch, capsys):
    if what != "crf":  # the others would start many processes
        monkeypatch.setattr(bench, "peak_of", lambda args, measure: 1.0)
    call("bench", what, "--toy", "--rounds", 1, "--batch", 2, "--device", "cpu")
    assert "ratio" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run for minutes")
def test_gpu_script_wants_a_gpu(tmp_path):
    done = subprocess.run(["bash", "experiments/gpu.sh", tmp_path / "out"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("no CUDA device")
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()
