"""CLIP (first working version; being refined)."""
import argparse
import gzip
import hashlib
import html
import math
import os
import sys
import urllib.error
import urllib.request
import zipfile
from functools import lru_cache
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
VOCABULARY = HERE / "bpe_simple_vocab_16e6.txt.gz"
NOUNS = HERE / "tests" / "nouns.txt"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SOT, EOT, FULL_STOP = 49406, 49407, 269
OPENAI = "https://openaipublic.azureedge.net/clip/models"
MODELS = {
    "ViT-B/32": f"{OPENAI}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B/16": f"{OPENAI}/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L/14": f"{OPENAI}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
}


class InputError(Exception):
    """A user's mistake: one line naming what was read, what was expected, what fixes it."""


def run(main, args):
    """Call main(args); an InputError becomes one line on stderr and exit code 2."""
    try:
        main(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def pick_device(name):
    """auto | cpu | cuda -> torch.device"""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here: use --device cpu")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)


class Tokenizer:
    def __init__(self, path=VOCABULARY):
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        self.letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
        letters = list(self.letter.values())
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            merges = [tuple(line.split()) for line in file.read().split("\n")[1 : 49152 - 256 - 2 + 1]]
        words = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
        words += ["<|startoftext|>", "<|endoftext|>"]
        self.ids = {word: i for i, word in enumerate(words)}
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.pattern = regex.compile(
            r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
        )

    @lru_cache(maxsize=65536)  # noqa: B019
    def merge(self, piece):
        if piece in ("<|startoftext|>", "<|endoftext|>"):
            return [self.ids[piece]]
        symbols = [self.letter[byte] for byte in piece.encode("utf-8")]
        symbols[-1] += "</w>"
        while len(symbols) > 1:
            pairs = list(zip(symbols, symbols[1:], strict=False))
            best = min(pairs, key=lambda pair: self.rank.get(pair, math.inf))
            if best not in self.rank:
                break
            merged, i = [], 0
            while i < len(symbols):
                width = 2 if tuple(symbols[i : i + 2]) == best else 1
                merged.append("".join(symbols[i : i + width]))
                i += width
            symbols = merged
        return [self.ids[symbol] for symbol in symbols]

    def encode(self, text):
        text = html.unescape(html.unescape(ftfy.fix_text(text))).lower()
        return [i for piece in self.pattern.findall(text) for i in self.merge(piece)]


@lru_cache(maxsize=1)
def tokenizer():
    return Tokenizer()


def tokenize(texts, context_length=77, truncate=False):
    """str or list of B strings -> LongTensor (B, T = context_length): [SOT] text [EOT] 0 0 ..."""
    texts = [texts] if isinstance(texts, str) else texts
    tokens = torch.zeros(len(texts), context_length, dtype=torch.long)  # (B, T)
    for row, text in zip(tokens, texts, strict=True):
        ids = [SOT, *tokenizer().encode(text), EOT]
        if len(ids) > context_length:
            if not truncate:
                raise InputError(f"text of {len(ids)} tokens, at most {context_length} fit (truncate=True cuts): {text!r}")
            ids = ids[: context_length - 1] + [EOT]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.heads = width // 64
        self.in_proj_weight = nn.Parameter(width**-0.5 * torch.randn(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal):
        B, T, D = x.shape
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(B, T, 3, self.heads, 64).unbind(2)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # (B, A, T, 64)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(x.transpose(1, 2).reshape(B, T, D))


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x, causal=False):
        x = x + self.attn(self.ln_1(x), causal)
        h = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](h * torch.sigmoid(1.702 * h))


class Transformer(nn.Module):
    def __init__(self, width, layers):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x, causal=False):
        for block in self.resblocks:
            x = block(x, causal)
        return x


class VisionTower(nn.Module):
    def __init__(self, resolution, patch, width, layers, embed_dim):
        super().__init__()
        self.resolution = resolution
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn((resolution // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))

    def forward(self, x):
        assert x.shape[1:] == (3, self.resolution, self.resolution), f"{tuple(x.shape)}, resolution {self.resolution}"
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (B, h*w, D)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj  # (B, E)


class CLIP(nn.Module):
    """Both towers; parameter names are OpenAI's, so state_dict() is the official layout.

    encode_image and encode_text return (B, E), not unit length.
    """

    def __init__(self, resolution=224, patch=32, width=768, layers=12, text_width=512, text_layers=12, embed_dim=512,
                 context_length=77, vocabulary=49408):
        super().__init__()
        self.resolution, self.embed_dim = resolution, embed_dim
        self.text_width, self.context_length = text_width, context_length
        self.max_prompt_length = context_length - 6
        self.visual = VisionTower(resolution, patch, width, layers, embed_dim)
        self.token_embedding = nn.Embedding(vocabulary, text_width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, text_width))
        self.transformer = Transformer(text_width, text_layers)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(text_width**-0.5 * torch.randn(text_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, x):
        """(B, 3, R, R), CLIP-normalised -> (B, E)"""
        return self.visual(x)

    def encode_text(self, tokens):
        """(B, T) ids of tokenize -> (B, E)"""
        eot = tokens.argmax(dim=1)
        return self.text_tower(self.token_embedding(tokens[:, : eot.max() + 1]), eot)

    def encode_prompts(self, vectors):
        """(K, P, text width) -> (K, E): features of [SOT] a photo of [p_1 .. p_P] . [EOT]"""
        K, P, _ = vectors.shape
        if not 1 <= P <= self.max_prompt_length:
            raise InputError(f"prompts of {P} vectors: between 1 and {self.max_prompt_length} fit into CLIP's "
                             f"{self.context_length} tokens beside [SOT] a photo of ... . [EOT]")
        ids = torch.tensor([SOT, *tokenizer().encode("a photo of"), FULL_STOP, EOT], device=vectors.device)
        fixed = self.token_embedding(ids).expand(K, -1, -1)
        x = torch.cat([fixed[:, :4], vectors, fixed[:, 4:]], dim=1)
        return self.text_tower(x, torch.full((K,), P + 5, device=x.device))

    def text_tower(self, x, eot):
        x = self.transformer(x + self.positional_embedding[: x.shape[1]], causal=True)
        x = self.ln_final(x[torch.arange(len(x), device=x.device), eot])
        return x @ self.text_projection


def digest_of(path, algorithm="sha256"):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def download(url, path, sha256=None, md5=None):
    """Fetch url to path unless it is there; resumes PATH.part, verifies the digest, then renames. Returns path."""
    path = Path(path)
    algorithm, expected = ("sha256", sha256) if sha256 else ("md5", md5)
    if path.exists():
        if expected and not digest_of(path, algorithm).startswith(expected):
            raise InputError(f"{path}: {algorithm} is not {expected[:12]}...: delete the file and run again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            have = have if response.status == 206 else 0
            total = have + int(response.headers["Content-Length"])
            with open(part, "ab" if have else "wb") as file, \
                    tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                while block := response.read(1 << 20):
                    bar.update(file.write(block))
    except OSError as error:
        raise InputError(f"cannot download {url} ({error}): fetch it by hand and put it at {path}") from error
    if part.stat().st_size != total:
        raise InputError(f"{url} broke off at {part.stat().st_size} of {total} bytes: run again to resume")
    if expected and not digest_of(part, algorithm).startswith(expected):
        part.unlink()
        raise InputError(f"{url}: {algorithm} is not {expected[:12]}...: deleted; run again")
    os.replace(part, path)
    return path


def read_state_dict(path):
    try:
        with zipfile.ZipFile(path) as archive:
            scripted = any(name.endswith("constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        scripted = False
    try:
        state = torch.jit.load(path, map_location="cpu").state_dict() if scripted else torch.load(
            path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path}: cannot be read as a CLIP checkpoint ({str(error).splitlines()[0]})") from error
    return state


def load_clip(name_or_path, device="cpu", cache="~/.cache/clip"):
    """A name in MODELS or a checkpoint file -> CLIP in eval mode, float32, frozen."""
    path = name_or_path
    if name_or_path in MODELS:
        url = MODELS[name_or_path]
        path = download(url, Path(cache).expanduser() / url.split("/")[-1], sha256=url.split("/")[-2])
    if not Path(path).is_file():
        raise InputError(f"{path}: no such CLIP checkpoint: give a file or one of {', '.join(MODELS)}")
    state = dict(read_state_dict(path))
    for extra in ("input_resolution", "context_length", "vocab_size"):
        state.pop(extra, None)
    if "visual.proj" not in state:
        raise InputError(f"{path}: not a ViT CLIP in OpenAI's layout")
    width, _, patch, _ = state["visual.conv1.weight"].shape
    context_length, text_width = state["positional_embedding"].shape
    layers = {tower: len({k for k in state if k.startswith(tower) and k.endswith("ln_1.weight")})
              for tower in ("visual.", "transformer.")}
    with torch.device("meta"):
        clip = CLIP(round((len(state["visual.positional_embedding"]) - 1) ** 0.5) * patch, patch, width,
                    layers["visual."], text_width, layers["transformer."], state["visual.proj"].shape[1],
                    context_length, len(state["token_embedding.weight"]))
    try:
        clip.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    except RuntimeError as error:
        raise InputError(f"{path}: {str(error).splitlines()[1].strip()}") from error
    return clip.eval().requires_grad_(False).to(device)


def read_image(path):
    """File -> PIL RGB"""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise InputError(f"{path}: not a readable image ({error})") from error


def preprocess(image, resolution):
    """PIL image -> (3, R, R) CLIP-normalised"""
    x = TF.resize(image.convert("RGB"), resolution, TF.InterpolationMode.BICUBIC)
    return TF.normalize(TF.to_tensor(TF.center_crop(x, resolution)), CLIP_MEAN, CLIP_STD)


def read_nouns(path=NOUNS):
    """The noun list, one a line."""
    return Path(path).read_text(encoding="utf-8").split("\n")[:-1]


@torch.no_grad()
def nearest_words(embeddings, words, clip, top=5, template="a photo of {}."):
    """(K, E) -> per row the top [(word, cosine)] in CLIP's text space"""
    tokens = tokenize([template.format(word) for word in words], clip.context_length).to(embeddings.device)
    features = torch.cat([clip.encode_text(chunk) for chunk in tokens.split(256)])  # (words, E)
    cosine = F.normalize(embeddings.float(), dim=1) @ F.normalize(features.float(), dim=1).T
    values, rows = cosine.topk(min(top, len(words)), dim=1)
    return [[(words[i], v) for i, v in zip(r, vs, strict=True)]
            for r, vs in zip(rows.tolist(), values.tolist(), strict=True)]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="zero-shot probabilities of texts for an image")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--clip", default="ViT-B/32")
    parser.add_argument("--image", required=True)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


@torch.no_grad()
def main(args):
    device = pick_device(args.device)
    clip = load_clip(args.clip, device)
    image = preprocess(read_image(args.image), clip.resolution)[None].to(device)
    v = F.normalize(clip.encode_image(image), dim=1)
    u = F.normalize(clip.encode_text(tokenize(args.texts, clip.context_length).to(device)), dim=1)
    for text, p in zip(args.texts, (clip.logit_scale.exp() * v @ u.T).softmax(1)[0].tolist(), strict=True):
        print(f"{100 * p:6.2f} %  {text}")


if __name__ == "__main__":
    run(main, parse_args())
