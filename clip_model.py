"""CLIP, frozen: scores how well a region of a photo matches a sentence (paper, section 3).

  v = E_I(X)    image tower: a ViT over patches, read at its class token    X (3, R, R)  -> v (E,)
  u = E_T(t)    text tower: a causal transformer, read at [EOT]             77 tokens    -> u (E,)
  u = E_T(p)    a learned prompt p = p_1 .. p_P in place of the class name                [eq. L1]
                in the sentence [SOT] a photo of [p_1 .. p_P] . [EOT]
  P(t_i | X) = softmax_i( exp(s) cos(v, u_i) )    zero-shot classification                [eq. L2]

Both towers share a space of width E. SemPLeS uses the cosine alone, without s and softmax. In
training only the prompt vectors change, never the towers. Features match OpenAI's CLIP to a
relative error of 2e-6. Where this file departs from OpenAI's code:
  [detail L1] The prompt's full stop is the word-final token 269, as in "a photo of a cat."; in the
              SemPLeS code it is 13, which continues a word. With this token, the embeddings of
              real words as p give exactly that sentence's feature.
  [detail L2] Left out: text behind the longest [EOT] of the batch.
  [detail L3] float32, where OpenAI's archives hold half precision.
  [detail L4] preprocess converts to RGB before it resizes: only palette images differ.

Reads a checkpoint as OpenAI ships it, or a state dict; bpe_simple_vocab_16e6.txt.gz, the merges of
the tokenizer; nouns.txt, the words that describe a learned prompt.

  python clip_model.py --clip ViT-B/32 --image photo.jpg "a photo of a cat" "a photo of a dog"
"""
import argparse
import gzip
import html
import math
from functools import cache
from itertools import pairwise
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.functional as TF

from common import (
    InputError, digest, fetch_weights, load_weights, read_image, read_tensors, run, start_processes)

# B images or texts, K classes, h w patch grid, A heads of attention, D width of a tower, E width of
# the features, T tokens, P prompt length, R side of the image in pixels

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1], over CLIP's training images
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HEAD_WIDTH = 64                                  # channels of one head of attention
ROOT = Path(__file__).resolve().parent
OPENAI = "https://openaipublic.azureedge.net/clip/models/"
MODELS = {  # name: SHA-256 / file, as the URL ends
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    "ViT-L/14@336px":
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
}


# ---- CLIP: modules and parameters have the names of OpenAI's checkpoints ------------------------

class CLIP(nn.Module):
    """Both towers, by default at the size of ViT-B/32. Features are not of unit length."""

    def __init__(self, resolution=224, patch=32, width=768, layers=12, text_width=512,
                 text_layers=12, embed_dim=512, context_length=77, vocabulary=49408):
        super().__init__()
        self.resolution, self.embed_dim = resolution, embed_dim                  # R, E
        self.text_width, self.context_length = text_width, context_length
        self.visual = VisionTransformer(resolution, patch, width, layers, embed_dim)
        self.token_embedding = nn.Embedding(vocabulary, text_width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, text_width))
        self.transformer = Transformer(text_width, text_layers)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(text_width ** -0.5 * torch.randn(text_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))        # s of [eq. L2]
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(self, x):
        """Images (B, 3, R, R), normalised with CLIP_MEAN and CLIP_STD -> v (B, E)"""
        return self.visual(x)

    def encode_text(self, tokens):
        """Ids (B, T) of tokenize -> u (B, E)"""
        eot = tokens.argmax(dim=1)  # [EOT] is the highest id, and argmax takes the first one
        return self.read_text(self.token_embedding(tokens[:, :int(eot.max()) + 1]), eot)

    def encode_prompts(self, vectors):
        """Prompts p (K, P, D) -> u = E_T([SOT] a photo of [p_1 .. p_P] . [EOT]) (K, E)  [eq. L1]"""
        K, P, _ = vectors.shape
        if not 1 <= P <= self.context_length - 6:
            raise InputError(f"prompts of length {P}; CLIP's text has room for 1 to "
                             f"{self.context_length - 6}; change length")
        words = self.token_embedding(sentence(vectors.device)).expand(K, -1, -1)    # (K, 6, D)
        x = torch.cat([words[:, :4], vectors, words[:, 4:]], dim=1)              # (K, P + 6, D)
        return self.read_text(x, torch.full((K,), P + 5, device=x.device))

    def read_text(self, x, eot):
        """u = LN(Blocks(x + positions))[EOT] W: x (B, T, D), indices of [EOT] (B,) -> (B, E)"""
        T = x.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()      # (T, T)
        x = self.transformer(x + self.positional_embedding[:T], causal)          # (B, T, D)
        x = x[torch.arange(len(x), device=x.device), eot]                        # (B, D)
        return self.ln_final(x) @ self.text_projection                           # (B, E)


@cache
def sentence(device):
    """The ids [SOT] a photo of . [EOT], (1, 6)   [detail L1]"""
    return tokenize("a photo of .", 6).to(device)


class VisionTransformer(nn.Module):
    def __init__(self, resolution, patch, width, layers, embed_dim):
        super().__init__()
        self.patch = patch
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(width ** -0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(
            width ** -0.5 * torch.randn((resolution // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width ** -0.5 * torch.randn(width, embed_dim))

    def forward(self, x):
        """v = LN(Blocks(LN([class; W patches] + positions)))[class] W': (B, 3, R, R) -> (B, E)"""
        x = self.conv1(x).flatten(2).transpose(1, 2)                             # (B, h*w, D)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)    # (B, 1 + h*w, D)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))         # (B, 1 + h*w, D)
        return self.ln_post(x[:, 0]) @ self.proj                                 # (B, E)


class Transformer(nn.Module):
    def __init__(self, width, layers):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x, mask=None):
        """x (B, T, D), mask (T, T), True where a token may look -> (B, T, D)"""
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x, mask):
        """x <- x + Attention(LN(x)); x <- x + MLP(LN(x)): (B, T, D) -> (B, T, D)"""
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.in_proj_weight = nn.Parameter(width ** -0.5 * torch.randn(3 * width, width))  # q, k, v
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, mask):
        """W [softmax(q k^T / 8) v of each head] + b; q, k, v = W' x + b': (B, T, D) -> (B, T, D)"""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (z.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for z in qkv)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask) if len(q) else q
        return self.out_proj(y.transpose(1, 2).flatten(2))                       # (B, T, D)


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x):
        """W2 g(W1 x + b1) + b2, QuickGELU g(z) = z σ(1.702 z)"""
        z = self.c_fc(x)
        return self.c_proj(z * (1.702 * z).sigmoid())


# ---- Tokenizer: byte-pair encoding (Sennrich et al. 2016) ----------------------------------------

class Tokenizer:
    """Any text -> ids from a vocabulary of 49,408 pieces.

    A word begins as letters, the 256 bytes of UTF-8, the last one marked </w>. Neighbours are
    joined in the order of the file's 48,894 merges: a corpus's most frequent pairs come first.
      s n o w c a t</w> -> s n o w c at</w> -> s no w c at</w> -> s now c at</w> -> ... snow cat</w>
    Ids: 0-255 a byte inside a word, 256-511 a byte that ends one, then the merges, [SOT], [EOT]."""

    START, END = "<|startoftext|>", "<|endoftext|>"  # written in a text, they are the tokens

    def __init__(self):
        # A byte needs a visible letter in the text file of merges: itself where it is one in
        # Latin-1, else the next one from 256 up. In this order the bytes have their ids.
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in visible]
        self.letter = {byte: chr(byte) for byte in visible}
        self.letter |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}
        letters = self.letter.values()

        text = gzip.decompress((ROOT / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode("utf-8")
        merges = [tuple(line.split(" ")) for line in text.split("\n")[1:48895]]  # 0 is a header
        pieces = [*letters, *(x + "</w>" for x in letters), *(a + b for a, b in merges)]
        self.ids = {piece: i for i, piece in enumerate([*pieces, self.START, self.END])}
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.sot, self.eot = self.ids[self.START], self.ids[self.END]    # 49406, 49407: the highest
        self.words = regex.compile(r"""
              <\|startoftext\|> | <\|endoftext\|>
            | 's | 't | 're | 've | 'm | 'll | 'd       # English endings are words of their own
            | \p{L}+                                    # letters of any script
            | \p{N}                                     # one digit at a time
            | [^\s\p{L}\p{N}]+                          # punctuation, symbols, emoji
            """, regex.VERBOSE | regex.IGNORECASE)

    def encode(self, text):
        """str -> list of ids, without [SOT] and [EOT]"""
        text = html.unescape(html.unescape(ftfy.fix_text(text)))  # twice: captions have &amp;quot;
        return [i for word in self.words.findall(text.lower()) for i in self.encode_word(word)]

    def encode_word(self, word):
        if word in (self.START, self.END):
            return [self.ids[word]]
        symbols = [self.letter[byte] for byte in word.encode("utf-8")]
        symbols[-1] += "</w>"
        while len(symbols) > 1:
            rank, i = min((self.rank.get(pair, math.inf), i)
                          for i, pair in enumerate(pairwise(symbols)))
            if rank == math.inf:
                break
            symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]
        return [self.ids[symbol] for symbol in symbols]


@cache
def tokenizer():
    """Loads the tokenizer when first needed."""
    return Tokenizer()


def tokenize(texts, context_length=77):
    """A string or B strings -> ids (B, T = context_length), int64: [SOT] text [EOT] 0 0 ..."""
    texts = [texts] if isinstance(texts, str) else texts
    tokens = torch.zeros(len(texts), context_length, dtype=torch.long)           # (B, T)
    for row, text in zip(tokens, texts, strict=True):
        # BPE is quadratic in a word's length, so the text is capped
        ids = tokenizer().encode(text[:100 * context_length])
        if len(ids) > context_length - 2:
            raise InputError(f"text of {len(ids) + 2} tokens or more, but CLIP reads "
                             f"{context_length}; shorten it: {text[:200]!r}")
        ids = [tokenizer().sot, *ids, tokenizer().eot]
        row[:len(ids)] = torch.tensor(ids)
    return tokens


# ---- Weights, images, and the words nearest to a learned prompt ----------------------------------

def load_clip(name_or_path, device="cpu"):
    """A name of MODELS (downloaded once) or a checkpoint file -> CLIP in eval mode, frozen, in
    float32 [detail L3]; .sha256 is the file's. TorchScript runs its own code while it is loaded,
    so only OpenAI's is."""
    path, known = Path(name_or_path), {url.split("/")[0] for url in MODELS.values()}
    if name_or_path in MODELS:
        path = fetch_weights(OPENAI + MODELS[name_or_path], MODELS[name_or_path].split("/")[0])
    expected = (f"one of {', '.join(MODELS)}, a file of OpenAI's, or what torch.save makes of the "
                "state_dict() of a CLIP with a ViT")
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected {expected}")
    sha256 = digest(path)
    state = (dict(torch.jit.load(path, map_location="cpu").state_dict()) if sha256 in known else
             read_tensors(path, expected))
    clip = load_weights(lambda: empty_clip(state), state, path, expected)
    clip.sha256 = sha256
    return clip.float().requires_grad_(False).eval().to(device)


def empty_clip(state):
    """A CLIP of the sizes that the tensors of a state dict {name: tensor} have"""
    for key in ("input_resolution", "context_length", "vocab_size"):  # in OpenAI's archives
        state.pop(key, None)
    if "visual.layer1.0.conv1.weight" in state:
        raise ValueError("a ResNet, not a ViT")
    width, _, _, patch = state["visual.conv1.weight"].shape
    resolution = math.isqrt(len(state["visual.positional_embedding"]) - 1) * patch
    text_width, embed_dim = state["text_projection"].shape
    layers, text_layers = (sum(key.startswith(tower) and key.endswith(".ln_1.weight")
                               for key in state) for tower in ("visual.transf", "transformer."))
    return CLIP(resolution, patch, width, layers, text_width, text_layers, embed_dim,
                len(state["positional_embedding"]))


def preprocess(image, resolution):
    """A PIL image -> (3, R, R): short side resized to R, centre crop, normalised   [detail L4]"""
    image = TF.resize(image.convert("RGB"), resolution, TF.InterpolationMode.BICUBIC)
    return TF.normalize(TF.to_tensor(TF.center_crop(image, resolution)), CLIP_MEAN, CLIP_STD)


def read_nouns():
    """About 1,500 common nouns, among them the classes of VOC and COCO and usual backgrounds. The
    nouns.txt of a data set takes their place."""
    return (ROOT / "nouns.txt").read_text(encoding="utf-8").splitlines()


@torch.no_grad()
def class_texts(clip, words):
    """u_k = E_T("a photo of {word}."): K words -> (K, E)"""
    tokens = tokenize([f"a photo of {word}." for word in words], clip.context_length)
    tokens = tokens.to(clip.text_projection.device)
    return torch.cat([clip.encode_text(part) for part in tokens.split(256)])


@torch.no_grad()
def nearest_words(features, words, clip, top=5):
    """Features (K, E) -> for each the words [(word, cosine), ...] whose text is nearest in CLIP's
    space"""
    texts = class_texts(clip, words)                                             # (words, E)
    cosine = F.normalize(features.float(), dim=1) @ F.normalize(texts.float(), dim=1).T
    values, found = cosine.topk(min(top, len(words)), dim=1)                     # (K, top)
    return [[(words[i], value) for i, value in zip(*row)]
            for row in zip(found.tolist(), values.tolist())]


# -------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Zero-shot classification of a photo.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="a sentence for each class; the "
                        "probabilities are among these")
    parser.add_argument("--image", required=True, metavar="FILE", help="a photo")
    parser.add_argument("--clip", default="ViT-B/32", metavar="NAME", help="a checkpoint file, or "
                        f"a name, downloaded once: {', '.join(MODELS)}")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"],
                        help="where to compute")
    return parser.parse_args(argv)


def main(args):
    device, image = start_processes(args.device), read_image(args.image)
    clip = load_clip(args.clip, device)
    v = clip.encode_image(preprocess(image, clip.resolution)[None].to(device))   # (1, E)
    u = clip.encode_text(tokenize(args.texts, clip.context_length).to(device))   # (K, E)
    cosine = F.normalize(v, dim=1) @ F.normalize(u, dim=1).T                     # (1, K)
    probability = (clip.logit_scale.exp() * cosine).softmax(dim=1)[0]            # (K,) [eq. L2]
    for text, p in zip(args.texts, probability.tolist()):
        print(f"{p:7.2%}  {text}")


if __name__ == "__main__":
    run(main, parse_args())
