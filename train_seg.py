"""Trains the segmentation model on pseudo masks: the last step of the method (paper, section 4.1).

A plain ViT reads the photo; a decoder gives every patch a score for each of the K + 1 labels; the scores are up-sampled.
    linear  one linear layer on the patch tokens
    mask    Segmenter's mask transformer (Strudel et al. 2021): two more blocks over patches and K + 1 label vectors,
            score(patch, label) = s <patch, label> of unit vectors, s learned                        [eq. S1]
Loss: cross-entropy over the pixels that are not 255. SGD or AdamW, the trunk at a tenth of the rate, poly decay.

Reads photos and label PNGs (palette images, 0 background, 1..K classes, 255 ignore) of any origin; --labels
ROOT/SegmentationClass gives the fully supervised upper bound. Writes OUT/seg.pt and OUT/log.jsonl.

    python train_seg.py --data data/VOCdevkit/VOC2012 --labels runs/voc/masks \
                        --vit data/deit_small_patch16_224-cd65a155.pth --out runs/voc
    torchrun --nproc-per-node 4 train_seg.py ... the same ...
"""
import argparse
import os
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from clip_model import InputError, run
from make_pseudo import read_labels
from mask_generator import IMAGENET_MEAN, IMAGENET_STD, Block, load_vit
from train_cam import Data, build_vit, end_processes, read_checkpoint, start_processes, train, vit_sizes, write_file

# Dimension key: B images, K classes, H W pixels, h w patch grid, D ViT width.


class Segmenter(nn.Module):
    """ViT and decoder: image (B, 3, H, W) ImageNet-normalised -> scores (B, K + 1, H, W). num_labels is K + 1, background first."""

    def __init__(self, vit, num_labels, decoder="mask"):
        super().__init__()
        self.trunk, self.decoder, self.num_labels = vit, decoder, num_labels
        vit.head = None
        if decoder == "linear":
            self.head = nn.Linear(vit.width, num_labels)
        else:
            self.label_vectors = nn.Parameter(torch.randn(1, num_labels, vit.width) * 0.02)
            self.blocks = nn.ModuleList(Block(vit.width) for _ in range(2))
            self.norm = nn.LayerNorm(vit.width)
            self.scale = nn.Parameter(torch.tensor(10.0))  # of the cosines, so that a softmax can be sharp

    def forward(self, image):
        tokens, (h, w) = self.trunk(image)
        patches = tokens[:, 1:]                                                                 # (B, h*w, D)
        if self.decoder == "linear":
            scores = self.head(patches)                                                         # (B, h*w, K + 1)
        else:
            x = torch.cat([patches, self.label_vectors.expand(len(image), -1, -1)], dim=1)
            for block in self.blocks:
                x, _, _ = block(x)
            patches, labels = F.normalize(self.norm(x), dim=2).split([h * w, self.num_labels], dim=1)
            scores = self.scale * patches @ labels.transpose(1, 2)                 # [eq. S1]   # (B, h*w, K + 1)
        scores = scores.transpose(1, 2).unflatten(2, (h, w))
        padded = (h * self.trunk.patch, w * self.trunk.patch)  # the trunk pads to whole patches: cut that off again
        scores = F.interpolate(scores, size=padded, mode="bilinear", align_corners=False)
        return scores[:, :, :image.shape[2], :image.shape[3]]


def load_segmenter(path, classes=None):
    """OUT/seg.pt -> Segmenter in eval mode, on the CPU; .classes are the K it was trained for, and those given if any are."""
    remedy = "train one with train_seg.py"
    state = read_checkpoint(path, "segmenter", remedy)
    if classes is not None and state["classes"] != list(classes):
        raise InputError(f"{path}: trained for {len(state['classes'])} classes ({', '.join(state['classes'][:4])}, ...), the data "
                         f"has {len(classes)} ({', '.join(classes[:4])}, ...); pass the data it was trained for")
    model = Segmenter(build_vit(state["vit"]), len(state["classes"]) + 1, state["decoder"])
    model.load_state_dict(state["segmenter"])
    model.classes = state["classes"]
    return model.eval()


class Labelled(Dataset):
    """Jointly augmented (image (3, side, side), labels (side, side) int64, i); depends on (seed, epoch, i) alone."""

    def __init__(self, data, folder, side, seed, scales):
        self.data, self.folder, self.side, self.seed, self.epoch, self.scales = data, Path(folder), side, seed, 0, scales
        fill = {tv_tensors.Image: 0, tv_tensors.Mask: 255}
        self.augment = v2.Compose([v2.ColorJitter(0.3, 0.3, 0.3, 0.05),
                                   v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                                   v2.Normalize(IMAGENET_MEAN, IMAGENET_STD), v2.RandomHorizontalFlip(),
                                   v2.RandomCrop(side, pad_if_needed=True, fill=fill)])  # beside the photo: mean colour, 255

    def __len__(self):
        return len(self.data.names)

    def read(self, name):
        photo = self.data.image(name)
        labels = read_labels(self.folder / f"{name}.png", photo.size[::-1], len(self.data.classes) + 1)
        return photo, torch.from_numpy(labels.copy())                                           # PIL, (H, W)

    def __getitem__(self, i):
        photo, labels = self.read(self.data.names[i])
        W, H = photo.size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.seed * 1_000_003 + self.epoch) * 1_000_003 + i)
            low, high = self.scales
            scale = low + (high - low) * torch.rand(()).item()
            size = [max(1, round(H * scale)), max(1, round(W * scale))]
            photo = tv_tensors.Image(v2.functional.resize(v2.functional.pil_to_tensor(photo), size, InterpolationMode.BICUBIC))
            labels = tv_tensors.Mask(v2.functional.resize(labels[None], size, InterpolationMode.NEAREST_EXACT))
            photo, labels = self.augment(photo, labels)
        return photo.as_subclass(torch.Tensor), labels[0].as_subclass(torch.Tensor).long(), i


def segmentation_loss(model, image, labels, i):
    """Mean cross-entropy over the pixels that are not 255 (a batch of only 255 gives 0), and their number."""
    n = (labels != 255).sum()
    return {"loss": F.cross_entropy(model(image), labels, ignore_index=255, reduction="sum") / n.clamp(min=1)}, n.item()


# ---------------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Trains the segmentation model on label PNGs.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--data", required=True, metavar="ROOT", help="as for train_cam.py; photos are read")
    files.add_argument("--split", default="train", help="as for train_cam.py")
    files.add_argument("--labels", required=True, metavar="DIR",
                       help="NAME.png: pseudo masks; for full supervision ROOT/SegmentationClass, or what eval.py --save-truth has")
    files.add_argument("--vit", required=True, metavar="CKPT", help="ImageNet-pretrained DeiT")
    files.add_argument("--out", required=True, metavar="DIR", help="where seg.pt and log.jsonl go")
    work = parser.add_argument_group("what to run")
    work.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False,
                      help="go on where a killed run with the same flags stopped")
    work.add_argument("--skip-bad", action=argparse.BooleanOptionalAction, default=False, help="read all photos and labels once "
                      "before; go on without those that cannot be read, list them at the end, exit 3")
    work.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    work.add_argument("--seed", type=int, default=0, help="everything random follows from it")
    work.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that load images; 0: none")
    recipe = parser.add_argument_group("recipe (defaults: VOC)")
    recipe.add_argument("--decoder", choices=["mask", "linear"], default="mask",
                        help="Segmenter's mask transformer, or one linear layer")
    recipe.add_argument("--crop", type=int, default=480, help="side of the training crop in pixels")
    recipe.add_argument("--scale", type=float, nargs=2, default=[0.5, 2.0], metavar=("MIN", "MAX"),
                        help="random resize before the crop")
    recipe.add_argument("--epochs", type=int, default=60, help="passes over the split")
    recipe.add_argument("--batch", type=int, default=16, help="images per step, over all processes")
    recipe.add_argument("--optimizer", choices=["sgd", "adamw"], default="sgd", help="adamw suits short runs of small models")
    recipe.add_argument("--lr", type=float, default=1e-2, help="of the decoder; adamw wants about 1e-3")
    recipe.add_argument("--trunk-lr", type=float, default=0.1, help="rate of the trunk as a share of --lr")
    recipe.add_argument("--weight-decay", type=float, default=1e-4, help="of every parameter")
    return parser.parse_args(argv)


def main(args):
    rank, world, device = start_processes(args.device)
    data, out = Data(args.data, args.split), Path(args.out)
    dataset = Labelled(data, args.labels, args.crop, args.seed, args.scale)
    if args.skip_bad:
        data.leave_out_bad(dataset.read)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model = Segmenter(load_vit(args.vit), len(data.classes) + 1, args.decoder).to(device)
    trunk = list(model.trunk.parameters())
    decoder = [p for name, p in model.named_parameters() if not name.startswith("trunk.")]
    groups = [{"params": trunk, "lr": args.lr * args.trunk_lr}, {"params": decoder, "lr": args.lr}]
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay)
    if not (args.resume and (out / "seg.pt").is_file()):
        train("seg", model, dataset, segmentation_loss, optimizer, args, batch=args.batch, epochs=args.epochs, rank=rank,
              world=world, device=device, describe=lambda items: ", ".join(data.names[i] for i in items[2].tolist()),
              decay=lambda t: (1 - t) ** 0.9)
        if rank == 0:
            state = {"segmenter": model.state_dict(), "vit": vit_sizes(model.trunk), "decoder": args.decoder,
                     "classes": data.classes, "words": data.words, "args": vars(args)}
            write_file(out / "seg.pt", lambda path: torch.save(state, path))
            (out / "seg.part").unlink(missing_ok=True)
    return end_processes(data, rank, world)


if __name__ == "__main__":
    run(main, parse_args())
