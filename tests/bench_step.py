"""One step of every phase, the export and the CRF: ours against the official formulation, written down below.

    python tests/bench.py step                         # VOC's size, batch 8 on a CPU, 64 on a GPU
    python tests/bench.py step --classes 80 --rounds 5
    python tests/bench.py step --toy                   # a small CLIP and ViT, to see that the bench itself runs

The official formulation is that of a plain reading of the paper: the maps of all K classes are up-sampled and normalised; every
pair's kept and dropped region is a call of CLIP's own; the class text and the prompt of every pair are encoded anew at each step,
over all 77 tokens; CLIP's weights are trainable, so that their gradients are computed and thrown away; linear layers are torch's.
Random weights: times do not depend on them. Ours and theirs take turns; ratios are medians over the rounds. A ratio below 1 means
that ours is faster or smaller. Peak memory is of a process of its own on a CPU, torch's count on a GPU.
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_cam  # noqa: E402
from clip_model import CLIP, Linear, tokenize  # noqa: E402
from make_pseudo import PRESETS, dense_crf, hard_unary  # noqa: E402
from mask_generator import MaskGenerator, ViT  # noqa: E402
from train_cam import Prompts, autocast, match_loss, prompt_loss, refine_loss  # noqa: E402

SIZES = {  # CLIP, ViT, side of a crop, (width, height) of an exported photo
    False: ({}, {}, 224, (500, 375)),
    True: ({"resolution": 64, "patch": 16, "width": 64, "layers": 2, "text_width": 64, "text_layers": 2, "embed_dim": 64},
           {"patch": 16, "width": 64, "layers": 2, "grid": (4, 4)}, 64, (96, 64)),
}


def plain_layers(module):
    """Put torch's own linear layers in the place of clip_model.Linear."""
    for part in module.modules():
        if isinstance(part, Linear):
            part.__class__ = nn.Linear
    return module


class Steps:
    """One of the two sides: a model of each kind, and its steps."""

    def __init__(self, args, official):
        torch.manual_seed(0)
        clip_sizes, vit_sizes, side, self.photo_size = SIZES[args.toy]
        self.K, self.official, self.args, self.device = args.classes, official, args, torch.device(args.device)
        self.clip = CLIP(**clip_sizes).to(self.device).eval().requires_grad_(official)
        self.generator = MaskGenerator(ViT(**vit_sizes), self.K).to(self.device)
        self.prompts = Prompts(self.clip, self.K, 30).to(self.device)
        if official:
            plain_layers(self.clip), plain_layers(self.generator)
        self.image = torch.randn(args.batch, 3, side, side, device=self.device)
        self.labels = torch.zeros(args.batch, self.K)
        for b in range(args.batch):  # 1.5 classes an image, as in VOC
            self.labels[b, torch.randperm(self.K)[:1 + b % 2]] = 1
        self.texts = tokenize([f"a photo of class {k}." for k in range(self.K)]).to(self.device)
        with torch.no_grad():
            self.u_f, self.u_b = self.clip.encode_text(self.texts), self.prompts(torch.arange(self.K))

    def optimizer(self, module):
        return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 1e-5, weight_decay=0.03)

    def classify(self):
        self.generator.requires_grad_(True)
        of = self.generator.predictions
        return self.generator, lambda: train_cam.classification(self.generator, self.image, self.labels, of)[0]["loss"]

    def match(self):
        self.generator.train_through_clip()
        theirs = lambda: match_loss(*self.official_regions(0.1), 2.4)  # noqa: E731
        data = (self.image, self.labels, self.clip, self.u_f)
        ours = lambda: train_cam.matching(self.generator, *data, 2.4)[0]["loss"]  # noqa: E731
        return self.generator, theirs if self.official else ours

    def refine(self):
        self.generator.train_through_clip()

        def theirs():
            v_f, v_b, u_f = self.official_regions(0.1)
            u_b = torch.cat([self.clip.encode_prompts(self.prompts.vectors[[k]]) for k in self.pairs[1]])
            return match_loss(v_f, v_b, u_f, 2.4) + 0.05 * refine_loss(v_f, u_b)
        data = (self.image, self.labels, self.clip, self.u_f, self.u_b)
        ours = lambda: train_cam.refinement(self.generator, *data, 2.4, 0.05)[0]["loss"]  # noqa: E731
        return self.generator, theirs if self.official else ours

    def learn_prompts(self):
        self.generator.requires_grad_(False)

        def theirs():
            with torch.no_grad():
                v_f, v_b, u_f = self.official_regions(1e-4)
            u_b = torch.cat([self.clip.encode_prompts(self.prompts.vectors[[k]]) for k in self.pairs[1]])
            return prompt_loss(v_b, u_b, u_f, 0.02)
        data = (self.image, self.labels, self.generator, self.clip, self.u_f)
        ours = lambda: train_cam.prompt_learning(self.prompts, *data, 0.02, "text")[0]["loss"]  # noqa: E731
        return self.prompts, theirs if self.official else ours

    def official_regions(self, eps):
        """v_f, v_b, u_f (N, E) with all K maps up-sampled, and one call of CLIP for every region and every text"""
        cam, _ = self.generator(self.image)
        R = self.clip.resolution
        m = F.interpolate(cam.float(), size=(R, R), mode="bilinear", align_corners=True)
        low, high = m.amin(dim=(2, 3), keepdim=True), m.amax(dim=(2, 3), keepdim=True)
        M = (m - low) / (high - low + eps)
        X = train_cam.clip_view(self.clip, self.image)
        self.pairs = [index.tolist() for index in self.labels.nonzero(as_tuple=True)]
        shown = [(M[b, k] * X[b], (1 - M[b, k]) * X[b], self.texts[[k]]) for b, k in zip(*self.pairs)]
        v_f = torch.cat([self.clip.encode_image(kept[None]) for kept, _, _ in shown])
        v_b = torch.cat([self.clip.encode_image(dropped[None]) for _, dropped, _ in shown])
        u_f = torch.cat([self.encode_77(text) for _, _, text in shown])
        return v_f, v_b, u_f

    def encode_77(self, text):
        clip = self.clip
        return clip.read_text(clip.token_embedding(text), text.argmax(dim=1))  # all 77 tokens, the padding too

    def export(self):
        """CAMs of one photo: scales 1 and 1.2, each mirrored. Theirs up-samples the maps of all classes to the photo's size."""
        self.generator.eval()
        photo, present = Image.new("RGB", self.photo_size), torch.tensor([0, 3])
        W, H = self.photo_size

        def run():
            total, size = 0, (H, W) if self.official else (-(-H // 4), -(-W // 4))
            for scale in (1, 1.2):
                x = train_cam.scaled_input(photo, scale, self.generator.trunk.patch).to(self.device)
                for flip in (False, True):
                    cam = self.generator(x.flip(3) if flip else x)[0]
                    cam = cam if self.official else cam[:, present]
                    total = total + F.interpolate(cam.float(), size=size, mode="bilinear", align_corners=False)
            return total
        return None, run

    def crf(self):
        """The dense CRF of one photo with 3 labels; there is no official side to it but pydensecrf (tests/bench.py crf)."""
        W, H = self.photo_size
        rng = np.random.default_rng(0)
        image = torch.from_numpy(rng.integers(0, 256, (H // 8 + 1, W // 8 + 1, 3), dtype=np.uint8)).repeat_interleave(8, 0)
        image = image.repeat_interleave(8, 1)[:H, :W].contiguous()
        prob = hard_unary(torch.arange(H * W).view(H, W) // (H * W // 3 + 1), 3).to(self.device)
        return None, lambda: dense_crf(image, prob, PRESETS["voc"]["gaussian"], PRESETS["voc"]["bilateral"])

    def timed(self, phase):
        """Seconds of one step: loss, gradients and update, or the export of a photo."""
        model, run = getattr(self, phase)()
        optimizer = self.optimizer(model) if model else None
        started = time.perf_counter()
        with torch.set_grad_enabled(model is not None), autocast(self.device, "auto"):
            value = run()
        if model:
            value.backward()
            optimizer.step()
            model.zero_grad(set_to_none=True)
            self.clip.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def peak_memory():
    """MiB of this process so far, on Linux. (ru_maxrss would begin with what the parent process had.)"""
    line, = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


PHASES = ["classify", "match", "learn_prompts", "refine", "export"]


def memory(args, phase, official):
    """Peak memory in MiB of two steps of a phase in a process of its own: on a CPU beyond what it has before them"""
    words = [sys.executable, __file__, "--classes", args.classes, "--batch", args.batch, "--device", args.device,
             "--measure", phase, *(["--official"] if official else []), *(["--toy"] if args.toy else [])]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def parse_args(argv=None):
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="One step of every phase against the official formulation.")
    parser.add_argument("--classes", type=int, default=20, help="K (default 20)")
    parser.add_argument("--batch", type=int, default=64 if cuda else 8, help="images a step (default 64 on a GPU, 8 on a CPU)")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES, help="(default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="(default 3)")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--toy", action="store_true", help="small models")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--official", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.measure:
        steps = Steps(args, args.official)
        before = peak_memory()
        for _ in range(2):
            steps.timed(args.measure)
        peak = peak_memory() - before
        print(torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else peak)
        return
    ours, theirs = Steps(args, False), Steps(args, True)
    print(f"{args.device}, {torch.cuda.get_device_name() if args.device == 'cuda' else f'{torch.get_num_threads()} threads'}, "
          f"K = {args.classes}, batch {args.batch}, torch {torch.__version__}")
    print(f"{'':<16}{'ours ms':>10}{'official ms':>13}{'ratio':>8}{'ours MiB':>11}{'official MiB':>14}{'ratio':>8}")
    for phase in args.phases:
        rounds = [(ours.timed(phase), theirs.timed(phase)) for _ in range(args.rounds + 1)][1:]  # the first warms up
        a, b = (1000 * median(column) for column in zip(*rounds))
        m, n = memory(args, phase, False), memory(args, phase, True)
        ratio = median(x / y for x, y in rounds)
        print(f"{phase:<16}{a:>10.0f}{b:>13.0f}{ratio:>8.2f}{m:>11.0f}{n:>14.0f}{m / max(n, 1):>8.2f}", flush=True)
    crf = [1000 * ours.timed("crf") for _ in range(args.rounds)]
    print(f"{'crf, a photo':<16}{median(crf):>10.0f}")


if __name__ == "__main__":
    main()
