"""CLIP: the frozen judge of SemPLeS. It says how well a region of an image agrees with a sentence (paper, section 3).

    v = E_I(X)         image tower: a ViT over patches, read at its class token      X (3, R, R)        -> v (E,)
    u = E_T(t)         text tower: a causal transformer, read at [EOT]               t up to 77 tokens  -> u (E,)
    u = E_T(p)         a learned prompt p = p_1 .. p_P in place of the class name,                         [eq. L1]
                       in the sentence [SOT] a photo of [p_1 .. p_P] . [EOT]
    P(t_i | X) = softmax_i( exp(s) cos(v, u_i) )                                     zero-shot classes     [eq. L2]

Both towers share one space of width E; SemPLeS uses the cosine alone, without the scale s and without the softmax.
The numbers are OpenAI's to about 2e-6, relative; in training, only the prompt vectors ever change, never the towers.

Reads: a CLIP checkpoint: a name (downloaded once) or a file, as OpenAI ships it or as a state dict;
bpe_simple_vocab_16e6.txt.gz, the tokenizer's merges; tests/nouns.txt, words to name a prompt with. Writes only what it downloads.

Where this file departs from OpenAI's code:
    [detail L1] The prompt's full stop is the word-final token 269, which the tokenizer gives for "a photo of a cat.";
                the SemPLeS code has 13, the full stop inside a word. So real words as p give exactly encode_text's u.
    [detail L2] Left out: text behind the batch's longest [EOT]; the last block's attention and MLP for unread tokens.
    [detail L3] float32 throughout, where OpenAI's archives hold half precision. Autocast is the caller's choice.
    [detail L4] preprocess converts to RGB before it resizes, not after: only palette and transparent images differ.

    python clip_model.py --clip ViT-B/32 --image photo.jpg "a photo of a cat" "a photo of a dog"    # zero-shot
    python clip_model.py --clip runs/toy/clip.pt --image scene.jpg "a photo of boat." "a photo of water."
"""
import argparse
import errno
import gzip
import html
import http.client
import math
import pickle
import sys
import warnings
import zipfile
from functools import cache
from itertools import pairwise
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps

# Dimension key: B images, K classes, N (image, class) pairs, H W pixels, h w patch grid, L layers, A heads, D ViT width
# (or text width, in the text tower), E CLIP width, T tokens, P prompt length. Here H = W = R, the resolution.

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1], over CLIP's training images
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HEAD_WIDTH = 64                                  # channels of one attention head, the same in every CLIP
ROOT = Path(__file__).resolve().parent           # where the tokenizer's vocabulary lies

OPENAI = "https://openaipublic.azureedge.net/clip/models/"
MODELS = {  # name -> SHA-256 and file name, which is also how the URL ends
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
}


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer: byte-pair encoding
# ----------------------------------------------------------------------------------------------------------------------

class Tokenizer:
    r"""Any text -> ids from a vocabulary of 49,408 pieces, by byte-pair encoding (Sennrich et al. 2016).

    A word starts as letters, the 256 bytes of UTF-8, so that nothing is unknown; the last is marked </w>. Neighbours are
    joined in the order in which the file's 48,894 merges were learned: a corpus's most frequent pair, again and again.
        s n o w c a t</w> -> s n o w c at</w> -> s no w c at</w> -> s now c at</w> -> s now cat</w> -> snow cat</w>
    The ids: 0-255 a byte inside a word, 256-511 a byte that ends one, 512-49405 the merges, then [SOT] and [EOT].
    """

    START, END = "<|startoftext|>", "<|endoftext|>"  # written out in a text, they count as the tokens themselves

    def __init__(self):
        # The merges are a text file, so a byte needs a visible character to stand for it: itself where it is one in
        # Latin-1, otherwise the next one from 256 up. This order of the bytes is also the order of their ids.
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in visible]
        self.letter = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
        letters = self.letter.values()

        lines = gzip.decompress((ROOT / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode("utf-8").split("\n")
        merges = [tuple(line.split(" ")) for line in lines[1:48895]]  # line 0 is a header; the tail was never used
        pieces = [*letters, *(x + "</w>" for x in letters), *(a + b for a, b in merges), self.START, self.END]
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.sot, self.eot = self.ids[self.START], self.ids[self.END]  # 49406, 49407: the highest ids
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
        if word in (self.START, self.END):
            return [self.ids[word]]
        symbols = [self.letter[byte] for byte in word.encode("utf-8")]
        symbols[-1] += "</w>"
        while len(symbols) > 1:
            rank, i = min((self.rank.get(pair, math.inf), i) for i, pair in enumerate(pairwise(symbols)))
            if rank == math.inf:
                break
            symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]
        return [self.ids[symbol] for symbol in symbols]


@cache
def tokenizer():
    """The one Tokenizer, read when first needed: importing this file opens nothing."""
    return Tokenizer()


def tokenize(texts, context_length=77, truncate=False):
    """A string or a list of B strings -> ids (B, T = context_length), int64: [SOT] text [EOT] 0 0 ...; truncate cuts it."""
    texts = [texts] if isinstance(texts, str) else texts
    tokens = torch.zeros(len(texts), context_length, dtype=torch.long)                            # (B, T)
    for row, text in zip(tokens, texts, strict=True):
        if len(text) > 100 * context_length:  # merging pairs takes time by its square
            raise InputError(f"text of {len(text):,} letters, but CLIP reads {context_length} tokens; shorten it: {text[:50]!r}...")
        ids = [tokenizer().sot, *tokenizer().encode(text)]
        if len(ids) >= context_length and not truncate:
            raise InputError(f"text of {len(ids) + 1} tokens, but CLIP reads {context_length}; shorten it: {text!r}")
        ids = [*ids[:context_length - 1], tokenizer().eot]
        row[:len(ids)] = torch.tensor(ids)
    return tokens


# ----------------------------------------------------------------------------------------------------------------------
# The model. The names of modules and parameters are those of OpenAI's checkpoints.
# ----------------------------------------------------------------------------------------------------------------------

def linear(x, weight, bias=None):
    """F.linear: x (..., in), weight (out, in), bias (out,) -> (..., out); on the CPU as a 1x1 convolution.

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
        self.in_proj_weight = nn.Parameter(width ** -0.5 * torch.randn(3 * width, width))  # rows: queries, keys, values
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)

    def forward(self, x, mask, read):
        """W [softmax(q kᵀ / √64) v of every head] + b, with q, k, v = W' x + b'; x (B, T, D) -> its tokens read (B, Q, D)."""
        q, k, v = linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)              # (B, T, D) each
        q, k, v = (z.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for z in (q[read], k, v))    # (B, A, Q or T, 64)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask) if len(q) else q              # (B, A, Q, 64)
        return self.out_proj(y.transpose(1, 2).flatten(2))                                        # (B, Q, D)


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.c_fc = Linear(width, 4 * width)
        self.c_proj = Linear(4 * width, width)

    def forward(self, x):
        """W₂ g(W₁ x + b₁) + b₂ with the QuickGELU g(z) = z σ(1.702 z). Through silu(z) = z σ(z) the backward stores less."""
        return self.c_proj(F.silu(1.702 * self.c_fc(x)) / 1.702)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x, mask, read=...):
        """x ← x + Attention(LN(x));  x ← x + MLP(LN(x)).  (B, T, D) -> all of it, or the tokens that read picks (B, Q, D)."""
        x = x[read] + self.attn(self.ln_1(x), mask, read)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x, read, mask=None):
        """x (B, T, D), positions read (B,), mask (T, T), True where a token may look -> the tokens read (B, D). [detail L2]"""
        *blocks, last = self.resblocks
        for block in blocks:
            x = block(x, mask)
        rows = torch.arange(len(x), device=x.device)
        mask = None if mask is None else mask[read][:, None, None]                                # (B, 1, 1, T)
        return last(x, mask, (rows[:, None], read[:, None]))[:, 0]


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
        """v = LN(Blocks(LN([class; W patches] + positions)))[class] Proj, for images x (B, 3, R, R) -> (B, E)."""
        B, g, p = len(x), self.grid, self.patch
        x = x.reshape(B, 3, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(B, g * g, 3 * p * p)    # (B, h*w, 3*p*p)
        x = linear(x, self.conv1.weight.flatten(1))                                               # (B, h*w, D)
        x = torch.cat([self.class_embedding.expand(B, 1, -1), x], dim=1)                          # (B, 1 + h*w, D)
        x = self.ln_pre(x + self.positional_embedding)
        x = self.transformer(x, read=torch.zeros(B, dtype=torch.long, device=x.device))           # (B, D)
        return self.ln_post(x) @ self.proj                                                        # (B, E)


class CLIP(nn.Module):
    """Both towers, by default at the size of ViT-B/32. Features come out as OpenAI's do, not of unit length."""

    def __init__(self, resolution=224, patch=32, width=768, layers=12, text_width=512, text_layers=12, embed_dim=512,
                 context_length=77, vocabulary=49408):
        super().__init__()
        self.resolution, self.embed_dim = resolution, embed_dim  # side of the input in pixels; E
        self.text_width, self.context_length = text_width, context_length  # of a token or a prompt vector; most tokens
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
        eot = tokens.argmax(dim=1)  # [EOT] is the highest id, and argmax takes the first one
        return self.read_text(self.token_embedding(tokens[:, :int(eot.max()) + 1]), eot)

    def encode_prompts(self, vectors):
        """Learned prompts p (K, P, text width) -> features u = E_T([SOT] a photo of [p_1 .. p_P] . [EOT]) (K, E). [eq. L1]"""
        K, P, _ = vectors.shape
        if not 1 <= P <= self.context_length - 6:
            raise InputError(f"a prompt of {P} vectors does not fit into CLIP's text; expected 1 to {self.context_length - 6}")
        tokens = tokenize("a photo of .", 6).to(vectors.device)                                   # [detail L1]  (1, 6)
        words = self.token_embedding(tokens).expand(K, -1, -1)                                    # (K, 6, D)
        x = torch.cat([words[:, :4], vectors, words[:, 4:]], dim=1)                               # (K, P + 6, D)
        return self.read_text(x, torch.full((K,), P + 5, device=x.device))

    def read_text(self, x, eot):
        """u = LN(Blocks(x + positions))[EOT] Proj, for embedded tokens x (B, T, D) and [EOT]'s positions (B,) -> (B, E)."""
        T = x.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()                       # (T, T)
        x = self.transformer(x + self.positional_embedding[:T], read=eot, mask=causal)            # (B, D)
        return self.ln_final(x) @ self.text_projection                                            # (B, E)


# ----------------------------------------------------------------------------------------------------------------------
# From files: weights, images for CLIP, words nearest to a learned prompt
# ----------------------------------------------------------------------------------------------------------------------

def load_tensors(path):
    """A file of torch.save -> what it holds: tensors, numbers, text, lists and dicts of them. Nothing else of its pickle is loaded,
    so none is executed. Raises whatever torch does for a broken file, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def load_clip(name_or_path, device="cpu", cache=None):
    """A name of MODELS (downloaded once, see fetch_weights) or a checkpoint file -> CLIP, in eval mode, frozen."""
    path = Path(name_or_path)
    if name_or_path in MODELS:
        path = fetch_weights(OPENAI + MODELS[name_or_path], MODELS[name_or_path].split("/")[0], cache)
    try:
        with zipfile.ZipFile(path) as archive:  # TorchScript, as OpenAI ships it, and torch.save alike
            scripted = any(name.endswith("/constants.pkl") for name in archive.namelist())
        clip = build_clip(dict(torch.jit.load(path, map_location="cpu").state_dict() if scripted else
                               load_tensors(path)))
    except (OSError, EOFError, KeyError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        expected = f"expected OpenAI's CLIP with a ViT: a whole file, or one of {', '.join(MODELS)}"
        raise InputError(f"{path}: not a CLIP that can be read ({reason}); {expected}") from None
    return clip.requires_grad_(False).eval().to(device)


def build_clip(state):
    """{name: tensor} -> CLIP in float32. Sizes are read off the shapes; every entry must be used, and have its shape."""
    if "visual.layer1.0.conv1.weight" in state:
        raise ValueError("its image tower is a ResNet")
    width, _, _, patch = state["visual.conv1.weight"].shape
    resolution = math.isqrt(len(state["visual.positional_embedding"]) - 1) * patch
    context_length, vocabulary = len(state["positional_embedding"]), len(state["token_embedding.weight"])
    text_width, embed_dim = state["text_projection"].shape
    layers = sum(key.startswith("visual.transformer.") and key.endswith(".ln_1.weight") for key in state)
    text_layers = sum(key.startswith("transformer.") and key.endswith(".ln_1.weight") for key in state)
    for key, size in [("input_resolution", resolution), ("context_length", context_length), ("vocab_size", vocabulary)]:
        if int(state.pop(key, size)) != size:  # OpenAI's archives carry these three beside the weights
            raise ValueError(f"{key} contradicts the shapes, which say {size}")
    with torch.device("meta"):  # shapes only: no memory, no random numbers, until the weights are assigned
        clip = CLIP(resolution, patch, width, layers, text_width, text_layers, embed_dim, context_length, vocabulary)
    clip.load_state_dict(state, assign=True)
    return clip.float()                                                                           # [detail L3]


def preprocess(image, resolution):
    """A PIL image -> (3, R, R): short side resized to R, bicubic with antialiasing, centre crop, normalised."""
    image = TF.resize(image.convert("RGB"), resolution, TF.InterpolationMode.BICUBIC)             # [detail L4]
    return TF.normalize(TF.to_tensor(TF.center_crop(image, resolution)), CLIP_MEAN, CLIP_STD)


def read_nouns():
    """About 1,500 common nouns, among them the classes of VOC and COCO and their usual backgrounds."""
    return (ROOT / "tests" / "nouns.txt").read_text(encoding="utf-8").splitlines()


@torch.no_grad()
def nearest_words(embeddings, words, clip, top=5, template="a photo of {}."):
    """Features (K, E) -> for each the top words [(word, cosine), ...] whose sentence lies nearest in CLIP's space."""
    tokens = tokenize([template.format(word) for word in words], clip.context_length).to(embeddings.device)
    features = torch.cat([clip.encode_text(part) for part in tokens.split(256)])                  # (words, E)
    cosine = F.normalize(embeddings.float(), dim=1) @ F.normalize(features.float(), dim=1).T      # (K, words)
    values, places = cosine.topk(min(top, len(words)), dim=1)                                     # (K, top)
    return [[(words[i], c) for i, c in zip(*row, strict=True)] for row in zip(places.tolist(), values.tolist(), strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# What all six scripts share: the user's mistakes, the device, photos, downloads. Last, the command line of this one
# ----------------------------------------------------------------------------------------------------------------------

UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOSPC, errno.EDQUOT,
              errno.EFBIG}
MAKE_ROOM = "; expected a folder that can be written to, with room; pass another, or make room"


warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # read_image says more


class InputError(Exception):
    """A user's mistake: one line naming what was read, what was expected, what fixes it."""


def at_least(low):
    """For argparse, a type: whole numbers from low on"""
    def whole_number(text):
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number from {low} on")
        return int(text)
    return whole_number


def run(main, args):
    """main(args), where an InputError, or a place that is full or cannot be written to, ends as one line and exit code 2."""
    try:
        main(args)
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in UNWRITABLE:
            raise  # not the user's mistake: what cannot be read ends as an InputError
        message = str(error).strip().splitlines()[-1].removeprefix("clip_model.InputError: ")  # the end of a worker's traceback
        print(f"error: {message}{MAKE_ROOM if isinstance(error, OSError) else ''}", file=sys.stderr)
        sys.exit(2)


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
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width} x {image.height}, more than {Image.MAX_IMAGE_PIXELS:,} pixels")
            if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut at 255
                image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
            return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: Pillow, broken PNG
        raise InputError(f"{path}: not a readable image ({error}); expected a JPEG, PNG or other image file; replace it") from None


def fetch_weights(url, sha256, cache=None):
    """The file at url, whose SHA-256 begins with these digits, downloaded once into cache (torch.hub's folder) -> Path."""
    path = Path(cache or Path(torch.hub.get_dir(), "checkpoints"), url.split("/")[-1])
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=sys.stderr.isatty())
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise InputError(f"cannot download {url} ({error}); run again, or fetch it by hand and save it as {path}") from None
    return path


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Zero-shot probabilities: which of these texts fits an image best?")
    parser.add_argument("texts", nargs="+", metavar="TEXT",
                        help="a sentence per class, two or more: the probabilities are among these texts only")
    parser.add_argument("--image", required=True, metavar="FILE", help="a JPEG or PNG file")
    parser.add_argument("--clip", default="ViT-B/32", metavar="CKPT", help="a checkpoint file, or a name to download "
                        f"once: {', '.join(MODELS)}; the later, the slower and the better (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="(default: %(default)s)")
    return parser.parse_args(argv)


def main(args):
    device = pick_device(args.device)
    image = read_image(args.image)
    clip = load_clip(args.clip, device)
    v = F.normalize(clip.encode_image(preprocess(image, clip.resolution)[None].to(device)), dim=1)  # (1, E)
    u = F.normalize(clip.encode_text(tokenize(args.texts, clip.context_length).to(device)), dim=1)  # (K, E)
    probability = (clip.logit_scale.exp() * v @ u.T).softmax(dim=1)[0]                            # (K,)  [eq. L2]
    for text, p in zip(args.texts, probability.tolist(), strict=True):
        print(f"{p:7.2%}  {text}")


if __name__ == "__main__":
    run(main, parse_args())
