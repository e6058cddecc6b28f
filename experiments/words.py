"""Background prompts from words written by hand, as CLIMS and CLIP-ES have them, not learned.

  u_k^b = mean of E_T("a photo of {word}.") / |E_T("a photo of {word}.")| over the words of class k

Reads a line `class: word, word` for each class. Writes OUT/prompts.pt and OUT/prompts.txt, as
--phase prompts of train_cam.py does; its phases refine and export read them.

  printf '%s: water, sky\n' boat train bird cow car bottle > words.txt
  python experiments/words.py --data runs/toy/data --clip runs/toy/clip.pt --words words.txt \
      --out runs/hand
  cp runs/toy/cam/classify.pt runs/hand    # train_cam.py --phase refine --out runs/hand reads both
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clip_model import class_texts, load_clip
from common import InputError, Split, earlier_run, run, save, start_processes
from train_cam import write_words


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Background prompts from words written by hand.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, metavar="ROOT", help="as for train_cam.py")
    add("--split", default="train", help="ROOT/SPLIT.csv")
    add("--words", required=True, metavar="FILE", help="a line `class: word, word` for each class")
    add("--out", required=True, type=Path, metavar="DIR", help="where prompts.pt and .txt go")
    add("--clip", default="ViT-B/32", metavar="NAME", help="as for train_cam.py")
    return parser.parse_args(argv)


def main(args):
    if Path(args.words).resolve() == (args.out / "prompts.txt").resolve():
        raise InputError(f"{args.words}: --out writes a prompts.txt there; pass another --out")
    earlier_run(args.out / "prompts", {}, False, (".txt",))  # refuses files that are not ours
    device = start_processes("auto")
    split, clip = Split(args.data, args.split), load_clip(args.clip, device)
    words, text = {}, Path(args.words).read_bytes()
    try:
        text = text.decode("utf-8-sig")
    except UnicodeDecodeError:  # of an older Windows
        text = text.decode("latin-1")
    for line in filter(None, map(str.strip, text.splitlines())):
        name, *found = (word.strip() for word in line.replace(":", ",", 1).split(","))
        if name in words or "" in found:
            raise InputError(f"{args.words}: {line!r}: an empty word, or a class for the second "
                             "time; expected a line `class: word, word` for each class")
        words[name] = found
    if set(words) != set(split.classes):
        raise InputError(f"{args.words}: words for {', '.join(words) or 'no class'}; expected a "
                         f"line `class: word, word` for each of {', '.join(split.classes)}")
    u_b = torch.stack([F.normalize(class_texts(clip, words[name]), dim=1).mean(dim=0)
                       for name in split.classes])                               # (K, E)
    record = {"script": "words.py", "words by hand": words, "clip": clip.sha256}
    save(args.out / "prompts.pt", {"u_b": u_b.cpu(), "classes": split.classes, "record": record})
    write_words(args.out, u_b, split, clip)
    return (f"{args.out}/prompts.pt, prompts.txt; next: train_cam.py --phase refine, with "
            f"classify.pt in {args.out}")


if __name__ == "__main__":
    run(main, parse_args())
