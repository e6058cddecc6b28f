"""CLIP: the frozen judge of SemPLeS. It says how well a region of an image agrees with a sentence (paper, section 3).

    v = E_I(X)         image tower: a ViT over patches, read at its class token      X (3, R, R)        -> v (E,)
    u = E_T(t)         text tower: a causal transformer, read at [EOT]               t up to 77 tokens  -> u (E,)
    u = E_T(p)         a learned prompt p = p_1 .. p_P in place of the class name,                         [eq. L1]
                       in the sentence [SOT] a photo of [p_1 .. p_P] . [EOT]
    P(t_i | X) = softmax_i( exp(s) cos(v, u_i) )                                     zero-shot classes     [eq. L2]

Both towers share one space of width E; SemPLeS uses the cosine alone, without the scale s and without the softmax.
The numbers are OpenAI's to about 2e-6, relative; in training, only the prompt vectors ever change, never the towers.

Reads: a CLIP checkpoint: a name (downloaded once to ~/.cache/clip) or a file, as OpenAI ships it or as a state dict;
bpe_simple_vocab_16e6.txt.gz, the tokenizer's merges; tests/nouns.txt, words to name a prompt with. Writes nothing else.

Where this file departs from OpenAI's code:
    [detail L1] The prompt's full stop is the word-final token 269, which the tokenizer gives for "a photo of a cat.";
                the SemPLeS code has 13, the full stop inside a word. So real words as p give exactly encode_text's u.
    [detail L2] Nothing is computed that cannot reach the result: text after the longest [EOT] of the batch (the mask is
                causal), and in the last block every token but the one that is read.
    [detail L3] float32 throughout, where OpenAI's archives hold half precision. Autocast is the caller's choice.
    [detail L4] preprocess converts to RGB before it resizes, not after: only palette and transparent images differ.

    python clip_model.py --clip ViT-B/32 --image photo.jpg "a photo of a cat" "a photo of a dog"    # zero-shot
    python clip_model.py --clip runs/toy/clip.pt --image scene.jpg "a photo of boat." "a photo of water."
"""
import argparse
import errno
import gzip
import hashlib
import html
import http.client
import math
import os
import pickle
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
from PIL import Image, ImageOps
from tqdm import tqdm

# Dimension key: B images, K classes, N (image, class) pairs, H W pixels, h w patch grid, L layers, A heads, D ViT width
# (or text width, in the text tower), E CLIP width, T tokens, P prompt length. Here H = W = R, the resolution.

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1], over CLIP's training images
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HEAD_WIDTH = 64                                  # channels of one attention head, the same in every CLIP

HERE = Path(__file__).resolve().parent
VOCABULARY = HERE / "bpe_simple_vocab_16e6.txt.gz"
NOUNS = HERE / "tests" / "nouns.txt"

OPENAI = "https://openaipublic.azureedge.net/clip/models/"
MODELS = {  # name -> SHA-256 and file name, which is also how the URL ends
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
}


# ----------------------------------------------------------------------------------------------------------------------
# What all six scripts share: the user's mistakes, the device, images
# ----------------------------------------------------------------------------------------------------------------------

UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOSPC, errno.EDQUOT}
MAKE_ROOM = "; expected a folder that can be written to, with room; pass another, or make room"


class InputError(Exception):
    """A user's mistake: one line naming what was read, what was expected, what fixes it."""


def run(main, args):
    """main(args), where an InputError, or a place that is full or cannot be written to, ends as one line and exit code 2.

    What main returns is the list of what --skip-bad left out: printed at the end, with exit code 3."""
    try:
        skipped = main(args)
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in UNWRITABLE:
            raise  # not the user's mistake: what cannot be read ends as an InputError
        # a data loader's worker wraps the message in its traceback: the last line is ours
        message = str(error).strip().splitlines()[-1].removeprefix("clip_model.InputError: ")
        print(f"error: {message}{MAKE_ROOM if isinstance(error, OSError) else ''}", file=sys.stderr)
        sys.exit(2)
    if skipped:
        print(f"done, but {len(skipped)} left out:", *skipped, sep="\n    ", file=sys.stderr)
        sys.exit(3)


def pick_device(name):
    """auto, cpu or cuda -> torch.device; auto takes the GPU where there is one."""
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise InputError("--device cuda: torch sees no CUDA device; pass --device cpu, or install torch built for CUDA")
    return torch.device(("cuda" if cuda else "cpu") if name == "auto" else name)


def read_image(path, upright=True):
    """A file -> PIL image in RGB, all pixels read. upright: turned as its EXIF orientation says; transparency is dropped."""
    try:
        with Image.open(path) as image:
            if image.mode == "F":
                raise ValueError("it holds floating-point numbers")
            if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut at 255
                image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
            return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: Pillow, broken PNG
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: not a readable image ({reason}); expected a JPEG or PNG file; replace it") from None


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer: byte-pair encoding
# ----------------------------------------------------------------------------------------------------------------------

class Tokenizer:
    r"""Any text -> ids from a vocabulary of 49,408 pieces, by byte-pair encoding (Sennrich et al. 2016).

    How the vocabulary was learned (not here: the file holds the result). Write every word of a large corpus letter by
    letter, the last letter marked </w>, the end of the word. Join the most frequent pair of neighbours into one symbol,
    everywhere; look for the most frequent pair again; 48,894 times. The file lists these merges in that order.

    How a word is encoded. Start from its letters and redo the merges in the order they were learned, until no pair of
    neighbours is in the list. Frequent words end as one piece, new ones as several:
        s n o w c a t</w> -> s n o w c at</w> -> s no w c at</w> -> s now c at</w> -> s now cat</w> -> snow cat</w>

    The letters are the 256 bytes of UTF-8, so every script and every emoji can be written and nothing is unknown.
    The ids: 0-255 a byte inside a word, 256-511 a byte that ends one, 512-49405 the merges, then [SOT] and [EOT].
    """

    START, END = "<|startoftext|>", "<|endoftext|>"  # written out in a text, they count as the tokens themselves

    def __init__(self, path=VOCABULARY):
        # The merges are a text file, so a byte needs a visible character to stand for it: itself where it is one in
        # Latin-1, otherwise the next one from 256 up. This order of the bytes is also the order of their ids.
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in visible]
        self.letter = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
        letters = list(self.letter.values())

        lines = gzip.decompress(Path(path).read_bytes()).decode("utf-8").split("\n")
        merges = [tuple(line.split(" ")) for line in lines[1:48895]]  # line 0 is a header; the tail was never used
        pieces = [*letters, *(x + "</w>" for x in letters), *(a + b for a, b in merges), self.START, self.END]
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.sot, self.eot = self.ids[self.START], self.ids[self.END]  # 49406, 49407: the highest ids

        self.known = {self.START: [self.sot], self.END: [self.eot]}  # word -> ids, grows as words are met
        self.words = regex.compile(r"""
              <\|startoftext\|> | <\|endoftext\|>
            | 's | 't | 're | 've | 'm | 'll | 'd       # English endings are words of their own
            | \p{L}+                                    # letters of any script
            | \p{N}                                     # one digit at a time
            | [^\s\p{L}\p{N}]+                          # punctuation, symbols, emoji
            """, regex.VERBOSE | regex.IGNORECASE)

    def encode(self, text):
        """str -> list of ids, without [SOT] and [EOT]."""
        text = html.unescape(html.unescape(ftfy.fix_text(text)))  # twice: web captions are full of &amp;quot;
        return [i for word in self.words.findall(text.lower()) for i in self.encode_word(word)]

    def encode_word(self, word):
        if word in self.known:
            return self.known[word]
        symbols = [self.letter[byte] for byte in word.encode("utf-8")]
        symbols[-1] += "</w>"
        while len(symbols) > 1:
            pair = min(zip(symbols[:-1], symbols[1:], strict=True), key=lambda pair: self.rank.get(pair, math.inf))
            if pair not in self.rank:
                break
            merged, i = [], 0
            while i < len(symbols):  # join every occurrence of the pair, from the left
                size = 2 if tuple(symbols[i:i + 2]) == pair else 1
                merged.append("".join(symbols[i:i + size]))
                i += size
            symbols = merged
        self.known[word] = [self.ids[symbol] for symbol in symbols]
        return self.known[word]


@lru_cache(maxsize=1)
def tokenizer():
    """The one Tokenizer, read when first needed: importing this file opens nothing."""
    return Tokenizer()


def tokenize(texts, context_length=77, truncate=False):
    """A string or a list of B strings -> ids (B, T = context_length), int64: [SOT] text [EOT] 0 0 0 ...

    A text that does not fit raises, or with truncate=True is cut, its last token then being [EOT].
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    tokens = torch.zeros(len(texts), context_length, dtype=torch.long)                            # (B, T)
    for row, text in zip(tokens, texts, strict=True):
        ids = [tokenizer().sot, *tokenizer().encode(text), tokenizer().eot]
        if len(ids) > context_length and not truncate:
            raise InputError(f"text of {len(ids)} tokens, but CLIP reads {context_length}; shorten it: {text!r}")
        if len(ids) > context_length:
            ids = [*ids[:context_length - 1], tokenizer().eot]
        row[:len(ids)] = torch.tensor(ids)
    return tokens


# ----------------------------------------------------------------------------------------------------------------------
# The model. The names of modules and parameters are those of OpenAI's checkpoints.
# ----------------------------------------------------------------------------------------------------------------------

def linear(x, weight, bias=None):
    """x (..., in), weight (out, in), bias (out,) -> (..., out): F.linear, on the CPU as a 1x1 convolution.

    torch gives float32 matrix products to MKL, convolutions to oneDNN. On AMD processors MKL does without the widest
    vector instructions, and the convolution takes half the time, forward and backward (see tests/bench.py clip).
    """
    if not x.is_cpu or x.numel() == 0:
        return F.linear(x, weight, bias)
    column = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)            # (1, in, rows, 1), channels last: no copy
    y = F.conv2d(column, weight[:, :, None, None], bias)                     # (1, out, rows, 1)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.in_proj_weight = nn.Parameter(width ** -0.5 * torch.randn(3 * width, width))  # rows: queries, keys, values
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)

    def forward(self, asking, x, mask):
        """Tokens asking (B, Q, D) look at the tokens x (B, T, D), where mask (B or 1, 1, Q, T) is True -> (B, Q, D)."""
        B, Q, D = asking.shape
        weight, bias = self.in_proj_weight, self.in_proj_bias
        q = linear(asking, weight[:D], bias[:D])                                                  # (B, Q, D)
        k, v = linear(x, weight[D:], bias[D:]).chunk(2, dim=-1)                                   # (B, T, D) each
        q, k, v = (z.unflatten(-1, (self.heads, HEAD_WIDTH)).transpose(1, 2) for z in (q, k, v))  # (B, A, Q or T, 64)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)                               # (B, A, Q, 64)
        return self.out_proj(y.transpose(1, 2).reshape(B, Q, D))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.c_fc = Linear(width, 4 * width)
        self.c_proj = Linear(4 * width, width)

    def forward(self, x):
        # QuickGELU is z sigmoid(1.702 z). Through silu(z) = z sigmoid(z) the backward needs one stored tensor, not two.
        return self.c_proj(F.silu(1.702 * self.c_fc(x)) / 1.702)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x, mask=None, read=None):
        """x (B, T, D) -> (B, T, D); with read (B,), only the token at that position of each sequence -> (B, 1, D)."""
        y = self.ln_1(x)
        if read is None:
            x = x + self.attn(y, y, mask)
        else:
            rows = torch.arange(len(x), device=x.device)
            mask = None if mask is None else mask[0, 0, read][:, None, None]                      # (B, 1, 1, T)
            x = x[rows, read][:, None] + self.attn(y[rows, read][:, None], y, mask)               # (B, 1, D)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers):
        super().__init__()
        assert layers > 0 and width % HEAD_WIDTH == 0, (width, layers)
        self.resblocks = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x, read, mask=None):
        """x (B, T, D), positions read (B,), mask (1, 1, T, T) -> the tokens read, (B, D). [detail L2]"""
        *blocks, last = self.resblocks
        for block in blocks:
            x = block(x, mask)
        return last(x, mask, read)[:, 0]


class VisionTransformer(nn.Module):
    def __init__(self, resolution, patch, width, layers, embed_dim):
        super().__init__()
        self.patch, self.grid = patch, resolution // patch
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)  # used as a matrix over flattened patches
        self.class_embedding = nn.Parameter(width ** -0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(self.grid ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width ** -0.5 * torch.randn(width, embed_dim))

    def forward(self, x):
        B, g, p = len(x), self.grid, self.patch
        x = x.reshape(B, 3, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(B, g * g, 3 * p * p)    # (B, h*w, 3*p*p)
        x = linear(x, self.conv1.weight.flatten(1))                                               # (B, h*w, D)
        x = torch.cat([self.class_embedding.expand(B, 1, -1), x], dim=1)                          # (B, 1 + h*w, D)
        x = self.ln_pre(x + self.positional_embedding)
        x = self.transformer(x, read=torch.zeros(B, dtype=torch.long, device=x.device))           # (B, D)
        return self.ln_post(x) @ self.proj                                                        # (B, E)


class CLIP(nn.Module):
    """Both towers. The defaults are ViT-B/32. Features come out as OpenAI's do, not of unit length.

    resolution: side of the input in pixels; embed_dim: E; text_width: width of token_embedding and of prompt vectors;
    context_length: 77, the most tokens a text may have; max_prompt_length: the most vectors a learned prompt may have.
    """

    def __init__(self, resolution=224, patch=32, width=768, layers=12, text_width=512, text_layers=12, embed_dim=512,
                 context_length=77, vocabulary=49408):
        super().__init__()
        self.resolution, self.embed_dim = resolution, embed_dim
        self.text_width, self.context_length = text_width, context_length
        self.max_prompt_length = context_length - 6  # [SOT] a photo of ... . [EOT]
        self.visual = VisionTransformer(resolution, patch, width, layers, embed_dim)
        self.token_embedding = nn.Embedding(vocabulary, text_width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, text_width))
        self.transformer = Transformer(text_width, text_layers)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(text_width ** -0.5 * torch.randn(text_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # s of [eq. L2]
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(self, x):
        """Images (B, 3, R, R), normalised with CLIP_MEAN and CLIP_STD -> features v (B, E)."""
        assert x.shape[1:] == (3, self.resolution, self.resolution), (tuple(x.shape), self.resolution)
        return self.visual(x)

    def encode_text(self, tokens):
        """Ids (B, T) as tokenize gives them -> features u (B, E)."""
        assert tokens.shape[1] <= self.context_length, (tuple(tokens.shape), self.context_length)
        eot = tokens.argmax(dim=1)  # [EOT] is the highest id, and argmax takes the first one
        return self.read_text(self.token_embedding(tokens[:, :int(eot.max()) + 1]), eot)

    def encode_prompts(self, vectors):
        """Learned prompts p (K, P, text width), 1 <= P <= max_prompt_length -> features u (K, E), in one pass. [eq. L1]

        The sentence is [SOT] a photo of [p_1 .. p_P] . [EOT]; what follows [EOT] cannot be seen from it. [detail L1]
        """
        K, P, D = vectors.shape
        assert self.text_width == D, (D, self.text_width)
        if not 1 <= P <= self.max_prompt_length:
            raise InputError(f"a prompt of {P} vectors does not fit: CLIP reads {self.context_length} tokens, of which "
                             f"[SOT] a photo of ... . [EOT] take 6; expected 1 to {self.max_prompt_length} vectors")
        ids = [tokenizer().sot, *tokenizer().encode("a photo of ."), tokenizer().eot]
        words = self.token_embedding(torch.tensor(ids, device=vectors.device)).expand(K, -1, -1)  # (K, 6, D)
        x = torch.cat([words[:, :4], vectors, words[:, 4:]], dim=1)                               # (K, P + 6, D)
        return self.read_text(x, torch.full((K,), P + 5, device=x.device))

    def read_text(self, x, eot):
        """Embedded tokens (B, T, D) and the positions of [EOT] (B,) -> features (B, E)."""
        T = x.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()[None, None]           # (1, 1, T, T)
        x = self.transformer(x + self.positional_embedding[:T], read=eot, mask=causal)            # (B, D)
        return self.ln_final(x) @ self.text_projection                                            # (B, E)


# ----------------------------------------------------------------------------------------------------------------------
# Weights
# ----------------------------------------------------------------------------------------------------------------------

def download(url, path, sha256=None, md5=None):
    """Fetch url into the file path, unless it is there already, and check its digest (or how it begins). Returns path.

    The bytes go to PATH.part, where a later call goes on after a broken transfer; only a file with the right digest is
    renamed to path, so whoever finds path finds it whole.
    """
    path, algorithm, digest = Path(path), "sha256" if sha256 else "md5", sha256 or md5
    part = path.with_name(path.name + ".part")
    file = path if path.exists() else part
    if file == part:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            have = part.stat().st_size if part.exists() else 0
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=60) as response:
                have = have if response.status == 206 else 0  # 206: only the rest; otherwise from the beginning
                length = response.headers.get("Content-Length")
                total = have + int(length) if length else None
                with open(part, "ab" if have else "wb") as out, tqdm(
                        desc=path.name, total=total, initial=have, unit="B", unit_scale=True, disable=None) as bar:
                    while block := response.read(1 << 18):
                        bar.update(out.write(block))
            if total and part.stat().st_size < total:
                raise ConnectionError(f"broke off after {part.stat().st_size} of {total} bytes")
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "code", None) != 416:  # 416: there is nothing beyond what PATH.part holds already
                raise InputError(f"cannot download {url} ({error}); run again to go on from where it stopped, or fetch "
                                 f"it elsewhere by hand and save it as {path}") from None
    found = hashlib.new(algorithm)
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    if digest and not found.hexdigest().startswith(digest):
        part.unlink(missing_ok=True)  # nothing could be gained by going on from it
        raise InputError(f"{path}: {algorithm} of what came from {url} is {found.hexdigest()}, expected {digest}; "
                         f"{'delete that file and' if file == path else 'nothing was kept:'} run again")
    os.replace(file, path)
    return path


def read_state_dict(path):
    """A checkpoint file -> {name: tensor}, from OpenAI's TorchScript archives or from torch.save(state_dict)."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; expected a CLIP checkpoint, or one of {', '.join(MODELS)}")
    if not zipfile.is_zipfile(path):  # both kinds are zip files, whose table of contents is at their very end
        raise InputError(f"{path}: not a PyTorch checkpoint, or cut off ({Path(path).stat().st_size} bytes); "
                         "expected a CLIP checkpoint; fetch it again")
    try:
        with zipfile.ZipFile(path) as archive:
            scripted = any(name.endswith("/constants.pkl") for name in archive.namelist())
        if scripted:
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise InputError(f"{path}: cannot be read ({reason}); expected a CLIP checkpoint; fetch it again") from None
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise InputError(f"{path}: holds no plain state dict; save it with torch.save(clip.state_dict(), ...)")
    return dict(state)


def load_clip(name_or_path, device="cpu", cache="~/.cache/clip"):
    """A name of MODELS (fetched into the folder cache) or a checkpoint file -> CLIP, float32, in eval mode, frozen.

    Every size is read off the shapes; every entry of the file must be used, once, and have the shape it should have.
    """
    path = Path(name_or_path)
    if name_or_path in MODELS:
        sha256, file = MODELS[name_or_path].split("/")
        path = download(OPENAI + MODELS[name_or_path], Path(cache).expanduser() / file, sha256=sha256)
    state = read_state_dict(path)
    expected = f"expected OpenAI's CLIP with a ViT, for example {', '.join(MODELS)}"
    if any(key.startswith("visual.layer1.") for key in state):
        raise InputError(f"{path}: a CLIP with a ResNet; {expected}")
    shape = {key: tuple(value.shape) for key, value in state.items()}
    try:
        (width, _, patch, _), (positions, _) = shape["visual.conv1.weight"], shape["visual.positional_embedding"]
        (vocabulary, _), (context_length, text_width) = shape["token_embedding.weight"], shape["positional_embedding"]
        _, embed_dim = shape["text_projection"]
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: not a CLIP ({type(error).__name__}: {error}); {expected}") from None
    layers, text_layers = (sum(key.startswith(tower) and key.endswith(".ln_1.weight") for key in state)
                           for tower in ("visual.transformer.", "transformer."))
    if not layers or not text_layers or width % HEAD_WIDTH or text_width % HEAD_WIDTH:
        raise InputError(f"{path}: towers of {layers} blocks {width} wide and {text_layers} blocks {text_width} wide; "
                         f"expected at least one block each, of a multiple of {HEAD_WIDTH}; {expected}")
    resolution = math.isqrt(positions - 1) * patch

    with torch.device("meta"):  # shapes only: no memory, no random numbers, until the weights are assigned
        clip = CLIP(resolution, patch, width, layers, text_width, text_layers, embed_dim, context_length, vocabulary)
    for key, size in [("input_resolution", resolution), ("context_length", context_length), ("vocab_size", vocabulary)]:
        if key in state and int(state.pop(key)) != size:  # OpenAI's archives carry these three beside the weights
            raise InputError(f"{path}: {key} contradicts the shapes, which say {size}; {expected}")
    weights = {}
    for key, parameter in clip.state_dict().items():
        if key not in state:
            raise InputError(f"{path}: {key} is missing; {expected}")
        if shape[key] != tuple(parameter.shape):
            raise InputError(f"{path}: {key} has shape {shape[key]}, not {tuple(parameter.shape)}; {expected}")
        weights[key] = state.pop(key).float()
    if state:
        raise InputError(f"{path}: no CLIP has {', '.join(list(state)[:3])} ({len(state)} such entries); {expected}")
    clip.load_state_dict(weights, assign=True)
    return clip.requires_grad_(False).eval().to(device)


# ----------------------------------------------------------------------------------------------------------------------
# Zero-shot classification, and reading a learned prompt
# ----------------------------------------------------------------------------------------------------------------------

def preprocess(image, resolution):
    """A PIL image -> (3, R, R): short side resized to R, bicubic with antialiasing, centre crop, normalised."""
    image = TF.resize(image.convert("RGB"), resolution, TF.InterpolationMode.BICUBIC)             # [detail L4]
    return TF.normalize(TF.to_tensor(TF.center_crop(image, resolution)), CLIP_MEAN, CLIP_STD)


def read_nouns(path=NOUNS):
    """About 1,500 common nouns, among them the classes of VOC and COCO and their usual backgrounds."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a list of nouns, one a line; restore the file") from None


@torch.no_grad()
def nearest_words(embeddings, words, clip, top=5, template="a photo of {}."):
    """Features (K, E) -> for each the top words [(word, cosine), ...] whose sentence lies nearest in CLIP's space."""
    tokens = tokenize([template.format(word) for word in words], clip.context_length).to(embeddings.device)
    features = torch.cat([clip.encode_text(part) for part in tokens.split(256)])                  # (words, E)
    cosine = F.normalize(embeddings.float(), dim=1) @ F.normalize(features.float(), dim=1).T      # (K, words)
    values, places = cosine.topk(min(top, len(words)), dim=1)                                     # (K, top)
    return [[(words[i], value) for i, value in zip(*row, strict=True)]
            for row in zip(places.tolist(), values.tolist(), strict=True)]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Zero-shot probabilities: which of these texts fits an image best?")
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="a sentence per class, such as 'a photo of a cat'; "
                        "the probabilities are among these texts only, so give two or more")
    parser.add_argument("--image", required=True, metavar="FILE", help="a JPEG or PNG file")
    parser.add_argument("--clip", default="ViT-B/32", metavar="CKPT", help="a checkpoint file, or a name to download "
                        f"once: {', '.join(MODELS)}; the later, the slower and the better (default: %(default)s)")
    parser.add_argument("--cache", default="~/.cache/clip", metavar="DIR", help="downloads (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="as in the other scripts; nothing is random in this one")
    return parser.parse_args(argv)


@torch.no_grad()
def main(args):
    device = pick_device(args.device)
    image = read_image(args.image)
    clip = load_clip(args.clip, device, args.cache)
    tokens = tokenize(args.texts, clip.context_length).to(device)                                 # (K, T)
    v = F.normalize(clip.encode_image(preprocess(image, clip.resolution)[None].to(device)), dim=1)  # (1, E)
    u = F.normalize(clip.encode_text(tokens), dim=1)                                              # (K, E)
    probability = (clip.logit_scale.exp() * v @ u.T).softmax(dim=1)[0]                            # (K,)  [eq. L2]
    for text, p in zip(args.texts, probability.tolist(), strict=True):
        print(f"{p:7.2%}  {text}")


if __name__ == "__main__":
    run(main, parse_args())
