"""The recipes against the published figures, and the tricks of the segmentation model."""
import json
from argparse import Namespace

import coco
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import voc
from conftest import CPU, PHASES, call, two_processes
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import normalize, pil_to_tensor

import common
import eval
import make_pseudo
import train_cam
import train_seg
from common import (
    IMAGENET_MEAN, IMAGENET_STD, Split, Training, image_order, read_labels, schedule, write_labels)
from mask_generator import MaskGenerator, ViT, load_vit, photo_cams
from train_cam import cosine_rate, recipe_of
from train_seg import Segmenter

def seg_recipe(name):
    return {key: row[train_seg.RECIPES.index(name)] for key, row in train_seg.TABLE.items()}


PUBLISHED = {  # phase: {key: (voc, coco)}
    "classify": {  # AdamW 6e-4 and 5e-4 x 64/512, 5 warm-up epochs from 1e-6, cosine to 1e-5
        "batch": (64, 64), "lr": (7.5e-5, 6.25e-5), "weight_decay": (0.03, 0.05),
        "backbone_lr": (1, 1), "warmup": (5 / 60, 5 / 60), "first_lr": (1e-6, 1e-6),
        "last_lr": (1e-5, 1e-5), "pool": ("max", "mean"), "reduction": (8, 4),
        "class_attention": (True, True)},
    "match": {  # AdamW, cosine to 0, no warm-up; CLIMS's low rate of a CNN's backbone
        "batch": (64, 32), "lr": (6.4e-5, 3.2e-7), "weight_decay": (0.03, 0.03),
        "lambda_b": (2.4, 0.75), "eps": (0.1, 0.1), "backbone_lr": (0.1, 0.1)},
    "prompts": {
        "batch": (128, 128), "lr": (2.5e-2, 2.5e-3), "weight_decay": (0.03, 0.03),
        "lambda_t": (0.02, 0.01), "repel": ("text", "text"), "length": (30, 30),
        "eps": (1e-4, 1e-4)},
    "refine": {
        "batch": (64, 24), "lr": (6.4e-5, 2.4e-7), "weight_decay": (0.03, 0.03),
        "lambda_b": (2.4, 0.75), "lambda_r": (0.05, 0.2), "eps": (0.1, 0.1),
        "backbone_lr": (0.1, 0.1)},
    "export": {"scales": ((1, 1.2), (1, 0.8, 1.2))},  # each with its mirror image
    "seg": {  # WeakTr: SGD, -lr 1e-4 the decoder's, poly to 1e-5, 520 and 480, loss clipping
        "batch": (4, 4), "optimizer": ("sgd", "sgd"), "lr": (1e-4, 1e-4), "last_lr": (1e-5, 1e-5),
        "backbone_lr": (0.1, 0.1), "weight_decay": (0, 0), "drop_path": (0.1, 0.1),
        "dropout": (0.1, 0.1), "side": (520, 520), "crop": (480, 480),
        "scale": ((0.5, 2), (0.5, 2)), "clip_start": (1.2, 1.2), "clip_patch": (120, 120)},
    "test": {  # short side 520 x scale, a dense CRF among the winners
        "scales": ((0.5, 0.75, 1, 1.25, 1.5, 1.75),) * 2, "window": (480, 480),
        "stride": (320, 320), "crf": ("weaktr-test", "clip-es")}}


STEPS = {  # voc, coco, toy
    "classify": (9_900, 76_920, 76), "match": (9_900, 153_900, 304),
    "prompts": (4_920, 38_460, 190), "refine": (9_900, 205_200, 304),
    "seg": (264_600, 2_052_100, 1_050)}


@pytest.mark.parametrize("phase", PUBLISHED)
@pytest.mark.parametrize("column, name, images", [(0, "voc", 10_582), (1, "coco", 82_081)])
def test_published_values(phase, column, name, images):
    """A careless edit of a table: the toy world does not notice it."""
    recipe = (seg_recipe(name) if phase == "seg" else eval.TEST[name] if phase == "test" else
              recipe_of(name, phase, {}))
    published = {key: row[column] for key, row in PUBLISHED[phase].items()}
    assert {key: recipe[key] for key in published} == published
    if phase in STEPS:
        assert schedule(recipe, images, None)["steps"] == STEPS[phase][column]
    if phase in PHASES:  # augmented and with drop path, but for the prompts
        assert (recipe["crop"], recipe["min_area"], recipe["epochs"]) == (224, 0.08, 60)
        strong = (None, None) if phase == "prompts" else (True, 0.1)
        assert (recipe.get("augment"), recipe.get("drop_path")) == strong


TOY = {
    "classify": {"epochs": 4, "batch": 32, "lr": 1e-3, "backbone_lr": 0.02, "weight_decay": 0.03,
                 "warmup": 0, "last_lr": 0, "class_attention": False, "pool": "max",
                 "reduction": 2},
    "match": {"epochs": 8, "batch": 16, "lr": 1e-3, "lambda_b": 0.75, "eps": 0.1,
              "backbone_lr": 0.02, "weight_decay": 0.03},
    "prompts": {"epochs": 10, "batch": 32, "lr": 2.5e-2, "lambda_t": 0.1, "repel": "text",
                "length": 30, "eps": 1e-4, "weight_decay": 0.03},
    "refine": {"epochs": 8, "batch": 16, "lr": 1e-3, "lambda_b": 0.75, "lambda_r": 0.5, "eps": 0.1,
               "backbone_lr": 0.02, "weight_decay": 0.03},
    "export": {"scales": (1, 1.2)},
    "seg": {"epochs": 14, "batch": 8, "optimizer": "adamw", "lr": 3e-4, "backbone_lr": 1,
            "last_lr": 0, "weight_decay": 1e-4, "clip_start": 0, "drop_path": 0, "dropout": 0,
            "side": 64, "scale": (0.75, 1.5), "crop": 64},
    "test": {"scales": (1, 1.25, 1.5), "window": None, "stride": None, "crf": "clip-es"}}


@pytest.mark.parametrize("phase", TOY)
def test_the_toy_column(phase):
    recipe = (seg_recipe("toy") if phase == "seg" else eval.TEST["toy"] if phase == "test" else
              recipe_of("toy", phase, {}))
    assert {key: recipe[key] for key in TOY[phase]} == TOY[phase]
    if phase in PHASES:
        assert (recipe["crop"], recipe["min_area"], recipe["rate_changes"]) == (64, 0.4, "step")
        assert (recipe.get("augment"), recipe.get("drop_path")) == (
            (None, None) if phase == "prompts" else (False, 0))


def test_defaults():
    """Of the command lines, and constants beside the tables; literals, as the README states them"""
    args = train_cam.parse_args(["--data", "d", "--out", "o"])
    assert (args.clip, args.recipe, args.split, args.phase, args.generator, args.vit, args.resnet,
            args.seed) == ("ViT-B/32", "voc", "train", "all", "vit", "deit_small", "resnet50", 0)
    args = train_seg.parse_args(["--data", "d", "--labels", "l", "--out", "o"])
    assert (args.recipe, args.split, args.vit, args.seed) == ("voc", "train", "deit_small", 0)
    args = make_pseudo.parse_args(["--data", "d", "--cams", "c", "--out", "o"])
    assert (args.recipe, args.split) == ("voc", "train")
    assert make_pseudo.RECIPES == {"voc": (0.43, "voc"), "coco": (0.42, "irn"),
                                   "toy": (0.43, "voc")}
    args = eval.parse_args(["--data", "d", "--pred", "p"])
    assert (args.split, args.recipe, args.background_score) == ("val", None, None)
    assert [round(50 * score) for score in eval.SWEEP] == [*range(1, 50)] and eval.LARGEST == 1024
    assert voc.CLASSES[10:20] == [
        "diningtable: dining table", "dog", "horse", "motorbike", "person: player",
        "pottedplant: potted plant", "sheep", "sofa", "train", "tvmonitor: tv monitor"]
    assert sorted({*range(1, 91)} - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}) == sorted(
        {*range(1, 91)} - {*coco.MISSING_IDS})


def test_the_largest_grid_of_an_export():
    """2,500 patches: a photo of 500 x 375 at scale 1.2, and a larger one"""
    shapes = []

    def S(x):
        shapes.append(tuple(x.shape[2:]))
        return torch.zeros(2, 1, 3, 4), {}
    S.backbone = Namespace(patch=16)
    for size in ((500, 375), (1600, 1200)):
        photo_cams(S, Image.new("RGB", size), torch.tensor([0]), (1, 1.2))
    assert shapes == [(368, 496), (448, 608), (688, 928), (688, 928)]


@pytest.mark.parametrize("phase", STEPS)
def test_steps_follow_from_the_list(phase):
    """At least one an epoch; a batch has a photo once at most; --steps shrinks the schedule."""
    toy, voc = ((seg_recipe(name) if phase == "seg" else recipe_of(name, phase, {}))
                for name in ("toy", "voc"))
    assert schedule(toy, 600, None)["steps"] == STEPS[phase][2]
    assert schedule(voc | {"batch": 64}, 300, None)["steps"] == (500 if phase == "seg" else 240)
    assert schedule(voc | {"batch": 8}, 3, None) == {"batch": 3, "steps": voc["epochs"]}
    assert schedule(voc, 10_582, 7)["steps"] == 7


def test_rates_by_hand():
    """Five epochs from 1e-6 to 7.5e-5, a cosine to 1e-5; one value an epoch, an epoch late, as
    timm's schedule in DeiT's loop gives them."""
    recipe = recipe_of("voc", "classify", {}) | {"steps": 9_900}
    for epoch in range(60):
        t = max(0, epoch - 1)
        timm = (1e-6 + t * 7.4e-5 / 5 if t < 5 else
                1e-5 + 6.5e-5 * (1 + np.cos(np.pi * t / 60)) / 2)
        for step in (165 * epoch, 165 * epoch + 164):
            assert cosine_rate(step, recipe) == pytest.approx(timm)
    for step in range(120):  # a trial has the same 60 stairs, of two steps each
        assert cosine_rate(step, recipe | {"steps": 120}) == pytest.approx(
            cosine_rate(165 * (step // 2), recipe))
    plain = recipe_of("toy", "match", {"lr": 1}) | {"steps": 100}
    assert [cosine_rate(step, plain) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0])


def test_a_run_takes_rates_and_weight_decay(toy, cam, tmp_path):
    """AdamW's first step is w (1 - rate x decay) -+ rate: at 1e-3, the backbone at 0.02 of it. The
    rate goes up to lr and down to 0."""
    torch.manual_seed(0)  # as main begins
    start = MaskGenerator(load_vit(toy / "vit.pth"), 6, reduction=2).state_dict()
    flags = ["--phase", "classify", "--set", "weight_decay=100", "backbone_lr=0.02"]
    end = cam(tmp_path / "one", *flags, "--steps", 1)["classify"]["generator"]
    for name, rate in (("head.weight", 1e-3), ("class_tokens", 1e-3), ("fusion.pool.1.bias", 1e-3),
                       ("backbone.pos_embed", 2e-5), ("backbone.blocks.0.attn.qkv.weight", 2e-5)):
        moved = (end[name] - start[name] * (1 - 100 * rate)).abs().median()
        assert moved.item() == pytest.approx(rate, rel=0.02), name
    cam(tmp_path / "four", *flags, "--steps", 4, "--set", "warmup=0.5", "first_lr=1e-6")
    rows = (tmp_path / "four/classify.jsonl").read_text().splitlines()
    assert [json.loads(row)["lr"] for row in rows] == pytest.approx(
        [1e-6, (1e-6 + 1e-3) / 2, 0.5e-3, 0.5e-3 * (1 - 0.5 ** 0.5)])


# ---- Views of the photos -------------------------------------------------------------------------

@pytest.mark.parametrize("phase", PHASES)
def test_prompts_alone_see_plain_crops(phase, tmp_path):
    """A photo of one colour: crops and mirror images have that colour, RandAugment's and random
    erasing's have not. No two epochs have the same view of a photo, an epoch always has its own."""
    split, recipe = two_photos(tmp_path), recipe_of("voc", phase, {"crop": 32})
    crops = train_cam.Crops(split, recipe, 0)
    assert not train_cam.Crops(split, recipe, 1)[0, 1][0].equal(crops[0, 1][0])  # of --seed
    plain = [x.flatten(1).std(1).max() < 1e-6 for x in (crops[epoch, 0][0] for epoch in range(20))]
    assert all(plain) == (phase == "prompts")
    views = [crops[epoch, 1][0] for epoch in (0, 0, 1, 2)]
    assert views[0].equal(views[1]) and len({x.sum().item() for x in views}) == 3
    assert crops[0, 1][1].tolist() == [0, 1]


def test_crops_have_any_side_and_at_least_the_recipes_area(tmp_path):
    """Red tells the column, green the row: how much of the photo a view shows, and which way"""
    split, recipe = two_photos(tmp_path), recipe_of("voc", "prompts", {"crop": 32})
    y, x = np.mgrid[:240, :240].astype(np.uint8)
    Image.fromarray(np.stack([x, y, x], axis=2)).save(tmp_path / "b.png")
    for min_area in (0.08, 0.6):
        crops = train_cam.Crops(split, recipe | {"min_area": min_area}, 0)
        views = torch.stack([crops[epoch, 1][0] for epoch in range(40)])
        rgb = views * torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255 / 240      # without the mean
        width, height = rgb[:, 0, 16, -1] - rgb[:, 0, 16, 0], rgb[:, 1, -1, 16] - rgb[:, 1, 0, 16]
        area = (width.abs() * height.abs()) * (32 / 31) ** 2
        assert (width > 0).any() and (width < 0).any() and (height > 0).all()
        assert min_area - 0.03 < area.min() < min_area + 0.1 and area.max() > 0.85


def test_colours_change_at_level_9_of_10(tmp_path):
    """timm's rand-m9-inc1 multiplies brightness by 1 - 0.81 or 1 + 0.81: a grey of 102 becomes 19
    or 184."""
    split, recipe = two_photos(tmp_path), recipe_of("voc", "match", {"crop": 32})
    Image.new("RGB", (64, 48), (102, 102, 102)).save(tmp_path / "a.png")
    crops = train_cam.Crops(split, recipe, 0)
    middle = torch.stack([crops[epoch, 0][0][:, 16, 16] for epoch in range(200)])
    rgb = 255 * (middle * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN))
    greys = {min(pixel) for pixel in rgb.round().int().tolist() if len(set(pixel)) == 1}
    assert {19, 184} <= greys and not greys & {*range(20, 35)}, greys


def test_what_moves_into_a_crop_and_what_is_erased(tmp_path):
    """On a photo of the mean colour, RandAugment's two operations leave every view of nearly one
    colour: 0.07, with black moved in 1 and more. Random erasing writes noise. Crops are bicubic: an
    edge overshoots."""
    split, recipe = two_photos(tmp_path), recipe_of("voc", "match", {"crop": 32})
    Image.new("RGB", (64, 48), (124, 116, 104)).save(tmp_path / "a.png")
    crops = train_cam.Crops(split, recipe, 0)
    random_erasing = crops.view.transforms.pop()
    assert max(crops[epoch, 0][0].flatten(1).std(1).max() for epoch in range(60)) < 0.2
    assert sum(isinstance(each, v2.RandomApply) for each in crops.view.transforms) == 2
    torch.manual_seed(0)
    erased = torch.stack([random_erasing(torch.zeros(3, 32, 32)) for _ in range(60)])
    touched = erased.flatten(1).any(1)
    assert 5 < touched.sum() < 30 and erased[erased != 0].std().item() == pytest.approx(1, abs=0.1)
    edge = np.repeat(np.array([[50, 200]], np.uint8), 8, axis=1).repeat(16, 0)
    Image.fromarray(np.stack(3 * [edge], 2)).save(tmp_path / "b.png")
    plain = train_cam.Crops(split, recipe | {"augment": False, "min_area": 1.0}, 0)
    red = 255 * (plain[0, 1][0][0] * IMAGENET_STD[0] + IMAGENET_MEAN[0])
    assert red.max() > 202 and red.min() < 48


def test_views_of_the_segmentation(tmp_path):
    """Normalised, with colours that change, and of the whole photo up to its right and lower
    border."""
    labels = np.zeros((49, 49), np.uint8)
    labels[-1], labels[:, -1] = 1, 2
    write_labels(tmp_path / "labels/a.png", labels)
    Image.new("RGB", (49, 49), (124, 116, 104)).save(tmp_path / "a.png")
    for file, text in (("classes.txt", "x\ny\n"), ("train.csv", "a.png,x;y\n")):
        (tmp_path / file).write_text(text)
    recipe = {"crop": 48, "side": 49, "scale": (1, 1)}
    photos = train_seg.Labelled(Split(tmp_path, "train"), tmp_path / "labels", recipe, 0)
    images, found = map(torch.stack, zip(*(photos[epoch, 0] for epoch in range(40))))
    assert {*found.unique().tolist()} == {0, 1, 2}
    colours = images.mean(dim=(2, 3))                                            # (40, 3)
    assert colours.abs().max() < 1.5 and colours.std(0).min() > 0.1
    assert not train_seg.Labelled(photos.split, tmp_path / "labels", recipe, 1)[0, 0][0].equal(
        images[0])


def two_photos(root):
    """a.png of one colour, which shows class x, b.png of many, which shows y"""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    (root / "classes.txt").write_text("x\ny\n")
    (root / "train.csv").write_text("a.png,x\nb.png,y\n")
    Image.new("RGB", (64, 48), (200, 120, 40)).save(root / "a.png")
    Image.fromarray(noise).save(root / "b.png")
    return Split(root, "train")


def test_labels_go_with_their_pixels(tmp_path):
    """Grey levels tell the labels, before the photo is scaled, cropped, mirrored and coloured, and
    after it. No label between two others appears. Another view in every epoch, the same one for
    the same epoch"""
    labels = np.random.default_rng(0).choice([0, 2, 6], (6, 8)).repeat(12, 0).repeat(12, 1)
    for folder, picture in (("photo", 50 + 15 * labels), ("labels", labels)):
        (tmp_path / folder).mkdir()
        Image.fromarray(picture.astype(np.uint8)).save(tmp_path / f"{folder}/a.png")
    (tmp_path / "classes.txt").write_text("\n".join("abcdef"))
    (tmp_path / "train.csv").write_text("photo/a.png,a\n")
    recipe = {"crop": 48, "side": 72, "scale": (0.8, 2), "seed": 0}  # side: the photo's own
    photos = train_seg.Labelled(Split(tmp_path, "train"), tmp_path / "labels", recipe, 0)
    items = [photos[epoch, 0] for epoch in range(20)]
    for image, found in items:
        assert image.shape == (3, 48, 48) and {*found.unique().tolist()} <= {0, 2, 6}
        assert np.corrcoef(image[1].flatten(), found.flatten())[0, 1] > 0.95  # measured 0.98
    assert len({image.sum().item() for image, _ in items}) == 20
    assert len({tuple(found.flatten().tolist()) for _, found in items}) == 20
    assert all(a.equal(b) for a, b in zip(photos[7, 0], items[7]))


# ---- The segmentation model ----------------------------------------------------------------------

@torch.no_grad()
def test_scores_of_the_segmenter_by_hand():
    """[eq. S1] from the backbone's tokens, patch by patch, label by label; patches of one pixel, so
    that nothing is up-sampled"""
    torch.manual_seed(0)
    model = Segmenter(ViT(1, 64, 1, (2, 3), eps=1e-5), 4).eval()
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    p, image = model.state_dict(), torch.randn(1, 3, 2, 3)
    tokens = model.backbone(image)[0][0, 1:]                             # (6, D), without [CLS]
    x = F.layer_norm(tokens, (64,), p["backbone.norm.weight"], p["backbone.norm.bias"], 1e-5)
    x = torch.cat([x @ p["enter.weight"].T + p["enter.bias"], p["label_vectors"][0]])
    for block in model.blocks:
        x = block(x[None])[0][0]
    x = F.layer_norm(x, (64,), p["norm.weight"], p["norm.bias"], 1e-5)
    for i in range(6):
        score = torch.stack([F.cosine_similarity(x[i] @ p["P"], x[6 + label] @ p["Q"], dim=0)
                             for label in range(4)])
        score = (score - score.mean()) / (score.var(correction=0) + 1e-5).sqrt()
        expected = score * p["label_norm.weight"] + p["label_norm.bias"]
        torch.testing.assert_close(model(image)[0, :, i // 3, i % 3], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_scores_are_enlarged_between_the_middles_of_patches():
    """2 x 2 patches of 4 pixels, by hand"""
    torch.manual_seed(0)
    model, caught = Segmenter(ViT(4, 64, 1, (2, 2), eps=1e-5), 3).eval(), []
    model.label_norm.register_forward_hook(lambda *args: caught.append(args[2]))
    scores = model(torch.randn(1, 3, 8, 7))[0]  # 7 are padded to whole patches
    second = torch.tensor([0, 0, 1, 3, 5, 7, 8, 8]) / 8  # share of the second of two patches
    A = torch.stack([1 - second, second], dim=1)                                 # (8, 2)
    small = caught[0][0].T.view(3, 2, 2)
    torch.testing.assert_close(scores, (A @ small @ A.T)[:, :, :7], atol=1e-5, rtol=0)


VOC_LIKE = ["--recipe", "voc", "--workers", 0, "--device", "cpu", "--steps", 3, "--set", "lr=0.5",
            "last_lr=0.1", "weight_decay=0.01", "side=64", "crop=48", "clip_start=9.",
            "clip_patch=12",  # small and fast, with clipping from the first step
            "drop_path=0.", "dropout=0."]


@pytest.fixture(scope="module")
def voc_like(toy, tmp_path_factory):
    """Flags of a training by the VOC recipe, on labels of which unequal parts are 255"""
    root = tmp_path_factory.mktemp("labels")
    for i, path in enumerate(sorted((toy / "data/masks").glob("train_*.png"))):
        labels = read_labels(path, None, 7)
        labels[: len(labels) * (i % 4) // 4] = 255
        write_labels(root / path.name, labels)
    return ["--data", toy / "data", "--labels", root, "--vit", toy / "vit.pth", *VOC_LIKE]


@pytest.fixture(scope="module")
def one_process(voc_like, tmp_path_factory):
    """What it gives: seg.pt"""
    out = tmp_path_factory.mktemp("one")
    call("train_seg", *voc_like, "--out", out)
    return torch.load(out / "seg.pt", weights_only=True)


def test_sgd_by_hand(toy, voc_like, one_process):
    """Nesterov, momentum 0.9, the backbone at a tenth of the rate, which falls with exponent 0.9;
    ignored pixels count as 0, in the clipping's means too"""
    recipe = one_process["record"]
    torch.manual_seed(0)  # as main begins
    model = Segmenter(train_seg.load_backbone(toy / "vit.pth", recipe), 7)
    photos = train_seg.Labelled(Split(toy / "data", "train"), voc_like[3], recipe, 0)  # of --labels
    speed = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    order = list(image_order(len(photos), recipe, 0))
    for step in range(3):
        rate = 0.1 + 0.4 * (1 - step / 3) ** 0.9
        image, labels = map(torch.stack, zip(*(photos[item] for item in order[step])))
        log_p, known = model(image).log_softmax(1), labels != 255
        picked = log_p.gather(1, labels.long().where(known, 0)[:, None])[:, 0]
        losses = -picked * known                                                     # (4, 48, 48)
        tiles = losses.detach().view(4, 4, 12, 4, 12).mean(dim=(0, 2, 4))
        bound = tiles.clamp(min=losses.mean().item())
        bound = bound.repeat_interleave(12, 0).repeat_interleave(12, 1)
        assert (losses > bound).any() and losses.mean() < 9
        model.zero_grad()
        losses.minimum(bound).mean().backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                gradient = (p.grad if p.grad is not None else 0) + 0.01 * p
                speed[name] = 0.9 * speed[name] + gradient
                p -= rate * (0.1 if name.startswith("backbone.") else 1) * (
                    gradient + 0.9 * speed[name])
    for name, found in one_process["segmenter"].items():
        torch.testing.assert_close(found, model.state_dict()[name], atol=1e-5, rtol=1e-4, msg=name)


def test_every_step_and_process_drops_others(voc_like, tmp_path, monkeypatch):
    """Of drop path and dropout, by the random numbers that a step begins with"""
    rates, numbers, step = set(), [], Training.step

    def watched(loop, losses, n):
        model = loop.parts["model"]
        rates.add((model.backbone.blocks[-1].drop_path, model.blocks[1].dropout))
        numbers.append(torch.rand(()).item())
        step(loop, losses, n)
    monkeypatch.setattr(Training, "step", watched)
    for module in (common, train_seg):
        monkeypatch.setattr(module, "in_first_process", lambda function: function())
    for rank in (0, 1):
        monkeypatch.setattr(common, "RANK", rank)
        call("train_seg", *voc_like[:-2], "drop_path=0.25", "dropout=0.5", "--out", tmp_path)
    assert rates == {(0.25, 0.5)} and len(set(numbers)) == len(numbers) == 6


def test_two_processes_equal_one_of_the_segmentation(voc_like, one_process, tmp_path):
    """With SGD, which a factor of the gradient moves elsewhere (AdamW hides it). Measured 5e-7"""
    two_processes("conftest.call", "train_seg", *voc_like, "--out", tmp_path)
    found = torch.load(tmp_path / "seg.pt", weights_only=True)["segmenter"]
    for name, expected in one_process["segmenter"].items():
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4, msg=name)


def test_clipping_of_high_losses_by_hand(monkeypatch):
    """[eq. S2] Tiles of 2 x 2 in two images of 2 x 4: the mean is 1, the tiles' means over both are
    1.5 and 0.5. Where a column is missing, a tile is 2 x 1. Two processes clip as one."""
    losses = torch.tensor([[[4, 2, 1, 0], [2, 2, 0, 2]], [[1, 0, 1, 0], [0, 1, 0, 0]]]).float()
    losses.requires_grad_()
    clipped = train_seg.clip_high_losses(losses, 1.2, 2)
    assert clipped.tolist() == [[[1.5, 1.5, 1, 0], [1.5, 1.5, 0, 1]], [[1, 0, 1, 0], [0, 1, 0, 0]]]
    clipped.sum().backward()
    assert losses.grad[0, 0, [0, 1, 3]].tolist() == [0, 0, 1]  # no gradient through the bounds
    assert train_seg.clip_high_losses(losses, 0.99, 2).equal(losses)
    assert train_seg.clip_high_losses(losses, 1.2, 120).max() == 1  # one tile: the mean
    odd = losses.detach().flip(2)[:, :, 1:]  # the mean is 14 / 12, that of the narrow tile 1.75
    expected = torch.tensor([[1, 14 / 12, 1.75], [0, 14 / 12, 1.75]])
    torch.testing.assert_close(train_seg.clip_high_losses(odd, 1.2, 2)[0], expected)
    monkeypatch.setattr(train_seg, "WORLD", 2)
    monkeypatch.setattr(train_seg, "sum_over_processes", lambda x: x + losses[1].detach())
    assert train_seg.clip_high_losses(losses[:1], 1.2, 2).equal(clipped[:1])


def test_positions_are_resized_once_to_the_crop(toy):
    """Bilinear, by hand: from 16 x 16 to 8 x 8, each is the mean of four. All norms: eps 1e-5."""
    vit = load_vit(toy / "vit.pth")
    backbone = train_seg.load_backbone(toy / "vit.pth", seg_recipe("toy") | {"crop": 32})
    expected = vit.pos_embed[0, 1:].view(8, 2, 8, 2, 128).mean(dim=(1, 3)).flatten(0, 1)
    torch.testing.assert_close(backbone.pos_embed[0, 1:], expected)
    assert backbone.pos_embed.requires_grad
    assert backbone.pos_embed[:, :1].equal(vit.pos_embed[:, :1])
    model = Segmenter(ViT(**backbone.sizes), 3)
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


@torch.no_grad()
def test_windows_in_one_batch_are_windows_one_by_one():
    """Views of short sides 20, 30 and 40, of which the first two are enlarged from there
    to a window, 32. A view and its mirror image are one batch."""
    torch.manual_seed(0)
    model, seen = Segmenter(ViT(8, 64, 1, (4, 4)), 5).eval(), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    recipe = {"side": 40, "scales": (0.5, 0.75, 1), "window": 32, "stride": 16}
    photo = np.random.default_rng(0).integers(0, 256, (50, 91, 3), dtype=np.uint8)
    photo, total = Image.fromarray(photo), 0
    batched = eval.predict(model, photo, recipe, True, CPU)
    assert seen == [6, 6, 8, 8]  # 32 x 57, 32 x 58: 3 windows; 40 x 73: 8; all mirrored as well
    pixels = normalize(pil_to_tensor(photo).float()[None] / 255, IMAGENET_MEAN, IMAGENET_STD)
    for sizes in ([(20, 36), (32, 57)], [(30, 55), (32, 58)], [(40, 73)]):
        x = pixels
        for H, W in sizes:
            x = F.interpolate(x, size=(H, W), mode="bilinear")
        for flip in (False, True):
            view, scores, seen_by = x.flip(3) if flip else x, torch.zeros(1, 5, H, W), 0
            for top in {0, H - 32}:
                for left in {*range(0, W - 32, 16), W - 32}:
                    around = (left, W - left - 32, top, H - top - 32)
                    window = model(view[:, :, top:top + 32, left:left + 32])
                    scores += F.pad(window, around)
                    seen_by = seen_by + F.pad(torch.ones(32, 32), around)
            scores = (scores / seen_by).flip(3) if flip else scores / seen_by
            scores = F.interpolate(scores, size=(50, 91), mode="bilinear")[0]
            total = total + scores.softmax(dim=0) / 6
    torch.testing.assert_close(batched, total)
    assert eval.window_view(Image.new("RGB", (1000, 50)), 40, 32).shape == (1, 3, 32, 640)
    assert eval.window_view(Image.new("RGB", (900, 3)), 40, 32).shape == (1, 3, 32, 1024)


def test_views_of_the_segmentation_are_padded_last(toy):
    """Below and at the right, by mean colour and label 255; some views are mirrored."""
    split = Split(toy / "data", "train")
    recipe = seg_recipe("toy") | {"crop": 80, "scale": (1, 1)}
    i = next(i for i, name in enumerate(split.names) if split.image(name).size == (64, 64))
    truth = torch.from_numpy(read_labels(toy / f"data/masks/{split.names[i]}.png", None, 7))
    photos, mirrored = train_seg.Labelled(split, toy / "data/masks", recipe, 0), set()
    for epoch in range(12):
        image, labels = photos[epoch, i]
        assert (image[:, 64:] == 0).all() and (image[:, :, 64:] == 0).all() and image.any()
        assert (labels[64:] == 255).all() and (labels[:, 64:] == 255).all()
        found = [labels[:64, :64].equal(each) for each in (truth, truth.flip(1))]
        assert sum(found) == 1
        mirrored.add(found[1])
    assert mirrored == {True, False}


def test_the_decoder_starts_as_segmenters():
    block = Segmenter(ViT(8, 64, 1, (4, 4)), 5).blocks[0]
    assert block.norm1.eps == block.norm2.eps == 1e-5 and (block.attn.qkv.bias == 0).all()
    assert block.mlp["fc1"].weight.std().item() == pytest.approx(0.02, rel=0.05)
