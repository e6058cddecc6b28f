"""clip_model.py against the reference implementation on PyPI (clip-anytorch, a copy of OpenAI's code) and on its own.

Nothing is downloaded: weights are random, at the real size of ViT-B/32 and at the toy world's. Every one-dimensional
parameter is random too, since a bias left at zero or a gain left at one would hide a mistake.
"""
import argparse
import hashlib
import http.server
import random
import subprocess
import sys
import threading
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import clip_model
from clip_model import (
    CLIP,
    InputError,
    download,
    linear,
    load_clip,
    nearest_words,
    preprocess,
    read_image,
    read_nouns,
    run,
    tokenize,
    tokenizer,
)

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = sorted((ROOT.parent / "shared" / "data" / "voc_mini" / "JPEGImages").glob("*.jpg"))

# In the reference's order: embed_dim, resolution, layers, width, patch, context, vocabulary, text width, heads, layers
SIZES = {"toy": (64, 64, 4, 128, 8, 77, 49408, 128, 2, 2), "ViT-B/32": (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)}
TEXTS = ["a photo of a cat.", "dog", "", "two people ride bicycles along the river, and a train passes behind them",
         "a photo of " + "very " * 70 + "old boat"]  # 8, 3, 2, 16 and 77 tokens

# max |ours - theirs| / max |theirs|, float32, sums in another order. Measured on two cores of an AMD EPYC, the worst of
# each kind: ViT-B/32 blocks of the image tower 2.3e-6, of the text tower 1.1e-6, pixel gradients 1.6e-6, prompt
# gradients 2.0e-6; toy size at most 8e-7 throughout. Ten times the worst would exceed 1e-5, the most that is allowed.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def threads(request):
    """Toy sizes run on one thread: on a busy machine two of them wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 2) if "real" in request.node.name else 1)
    yield
    torch.set_num_threads(before)


def error(ours, theirs):
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def reference_model(sizes, seed=0):
    from clip.model import CLIP as Reference
    torch.manual_seed(seed)
    model = Reference(*sizes).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p += 0.1 * torch.randn_like(p)
        if "embedding" in name:
            p *= 5  # at the reference's start, token and position embeddings are too small to matter beside the biases
        p.copy_(p.half())  # so that a file in half precision holds the same numbers
    return model


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clip")


@pytest.fixture(scope="session")
def toy(folder):
    """(ours, theirs, file): the toy size, from a float32 state dict."""
    theirs = reference_model(SIZES["toy"])
    torch.save(theirs.state_dict(), folder / "toy.pt")
    return load_clip(folder / "toy.pt"), theirs, folder / "toy.pt"


@pytest.fixture(scope="session")
def real(folder):
    """(ours, theirs, None): the size of ViT-B/32, from a state dict in half precision, 300 MB for a moment."""
    theirs = reference_model(SIZES["ViT-B/32"])
    torch.save({key: value.half() for key, value in theirs.state_dict().items()}, folder / "b32.pt")
    ours = load_clip(folder / "b32.pt")
    (folder / "b32.pt").unlink()
    return ours, theirs, None


@pytest.fixture(params=["toy", "real"])
def pair(request):
    return request.getfixturevalue(request.param)


def images(clip, n, seed=0):
    return torch.randn(n, 3, clip.resolution, clip.resolution, generator=torch.Generator().manual_seed(seed))


def after_every_block(tower, call):
    """The output of every residual block of a tower while call() runs."""
    outputs = []
    hooks = [block.register_forward_hook(lambda *args: outputs.append(args[2])) for block in tower.resblocks]
    call()
    for hook in hooks:
        hook.remove()
    return outputs


# ----------------------------------------------------------------------------------------------------------------------
# Equivalence
# ----------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_image_tower_after_every_block(pair):
    clip, theirs, _ = pair
    x = images(clip, 3)
    ours = after_every_block(clip.visual.transformer, lambda: clip.encode_image(x))
    reference = after_every_block(theirs.visual.transformer, lambda: theirs.encode_image(x))
    assert len(ours) == len(reference) >= 4
    for i, (a, b) in enumerate(zip(ours, reference, strict=True)):
        b = b.transpose(0, 1)                                                                      # (B, T, D)
        b = b[:, :1] if i == len(ours) - 1 else b  # the last block is only asked for the token that is read
        assert error(a, b) < TOLERANCE, f"block {i}"
    assert error(clip.encode_image(x), theirs.encode_image(x)) < TOLERANCE


@pytest.mark.parametrize("size, longest", [("toy", 77), ("toy", 16), ("real", 77)])
@torch.no_grad()
def test_text_tower_after_every_block(request, size, longest):
    clip, theirs, _ = request.getfixturevalue(size)
    tokens = tokenize(TEXTS if longest == 77 else TEXTS[1:4])
    eot = tokens.argmax(dim=1)
    ours = after_every_block(clip.transformer, lambda: clip.encode_text(tokens))
    reference = after_every_block(theirs.transformer, lambda: theirs.encode_text(tokens))
    assert len(ours) == len(reference) >= 2
    assert ours[0].shape[1] == eot.max() + 1 == longest
    for i, (a, b) in enumerate(zip(ours, reference, strict=True)):
        b = b.transpose(0, 1)                                                                      # (B, 77, D)
        last = i == len(ours) - 1
        b = b[torch.arange(len(b)), eot][:, None] if last else b[:, :eot.max() + 1]
        assert error(a, b) < TOLERANCE, f"block {i}"
    assert error(clip.encode_text(tokens), theirs.encode_text(tokens)) < TOLERANCE


def test_gradient_of_the_pixels(pair):
    clip, theirs, _ = pair
    weights = torch.randn(2, clip.embed_dim, generator=torch.Generator().manual_seed(1))
    gradient = []
    for model in (clip, theirs):
        x = images(clip, 2).requires_grad_()
        F.cosine_similarity(model.encode_image(x), weights).sum().backward()
        gradient.append(x.grad)
    assert error(*gradient) < TOLERANCE
    assert all(p.grad is None and not p.requires_grad for p in clip.parameters())


def reference_prompts(theirs, vectors):
    """The reference has no prompts: write the vectors over what its embedding gives for as many words."""
    K, P, _ = vectors.shape
    tokens = tokenize(["a photo of" + " cat" * P + "."] * K)
    hook = theirs.token_embedding.register_forward_hook(
        lambda module, args, x: torch.cat([x[:, :4], vectors, x[:, 4 + P:]], dim=1))
    try:
        return theirs.encode_text(tokens)
    finally:
        hook.remove()


@pytest.mark.parametrize("size, length", [("toy", 1), ("toy", 30), ("toy", 71), ("real", 30)])
def test_gradient_of_the_prompts(request, size, length):
    clip, theirs, _ = request.getfixturevalue(size)
    generator = torch.Generator().manual_seed(length)
    start = 0.1 * torch.randn(3, length, clip.text_width, generator=generator)
    weights = torch.randn(3, clip.embed_dim, generator=generator)
    features, gradient = [], []
    for encode in (clip.encode_prompts, lambda p: reference_prompts(theirs, p)):
        p = start.clone().requires_grad_()
        features.append(encode(p))
        F.cosine_similarity(features[-1], weights).sum().backward()
        gradient.append(p.grad)
    assert error(*features) < TOLERANCE
    assert error(*gradient) < TOLERANCE


@torch.no_grad()
def test_the_probabilities_of_the_reference(toy):
    clip, theirs, _ = toy
    x, tokens = images(clip, 4), tokenize(TEXTS)                                                   # 4 images, 5 texts
    v, u = F.normalize(clip.encode_image(x), dim=1), F.normalize(clip.encode_text(tokens), dim=1)
    ours = (clip.logit_scale.exp() * v @ u.T).softmax(dim=1)
    assert error(ours, theirs(x, tokens)[0].softmax(dim=1)) < TOLERANCE  # measured 6e-7


def test_linear_is_a_linear_layer():
    torch.manual_seed(0)
    for shape, out in [((5,), 3), ((1, 7), 1), ((2, 3, 16), 48), ((8, 50, 96), 32), ((2, 9, 5, 8), 4)]:
        tensors = [torch.randn(shape), torch.randn(out, shape[-1]), torch.randn(out)]
        direction = torch.randn(*shape[:-1], out)
        for bias in (True, False):
            results = []
            for function in (linear, F.linear):
                leaves = [t.clone().requires_grad_() for t in tensors[:2 + bias]]
                y = function(*leaves)
                results.append([y, *torch.autograd.grad(y, leaves, direction)])
            for a, b in zip(*results, strict=True):
                assert error(a, b) < TOLERANCE
    x = torch.randn(4, 6, 16)[:, ::2].transpose(0, 1)  # strided
    assert error(linear(x, tensors[1].new_ones(3, 16)), x.sum(-1, keepdim=True).expand(-1, -1, 3)) < TOLERANCE
    assert linear(torch.zeros(0, 5, 8), torch.zeros(3, 8)).shape == (0, 5, 3)


def test_a_batch_is_its_rows(toy):
    clip, _, _ = toy
    x, tokens = images(clip, 3), tokenize(TEXTS)
    p = torch.randn(4, 6, clip.text_width, generator=torch.Generator().manual_seed(0))
    for encode, batch in [(clip.encode_image, x), (clip.encode_text, tokens), (clip.encode_prompts, p)]:
        assert error(encode(batch), torch.cat([encode(row[None]) for row in batch])) < TOLERANCE
    assert clip.encode_image(x[:0]).shape == (0, clip.embed_dim)
    with pytest.raises(AssertionError, match="32"):
        clip.encode_image(x[:, :, :32])


def test_autocast_stays_close(toy):
    clip, _, _ = toy
    x = images(clip, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v = clip.encode_image(x).float()
    assert 1e-5 < error(v, clip.encode_image(x)) < 0.03  # measured 0.003: bfloat16 has 8 bits


# ----------------------------------------------------------------------------------------------------------------------
# Prompts
# ----------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_real_words_as_prompts_at_every_length(toy):
    clip, theirs, _ = toy
    words = [word for word in read_nouns() if len(tokenizer().encode(word)) == 1]
    random.Random(0).shuffle(words)
    for length in range(1, clip.max_prompt_length + 1):
        tokens = tokenize(["a photo of " + " ".join(words[i:i + length]) + "." for i in (0, 71, 142)])
        assert tokens.argmax(dim=1).tolist() == [length + 5] * 3
        u = clip.encode_prompts(clip.token_embedding(tokens[:, 4:4 + length]))
        assert error(u, clip.encode_text(tokens)) < TOLERANCE, length
        assert error(u, theirs.encode_text(tokens)) < TOLERANCE, length
    assert length == 71


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 8, 70])
def test_real_words_as_prompts_at_real_size(real, length):
    clip, theirs, _ = real
    tokens = tokenize(["a photo of" + " boat" * length + ".", "a photo of" + " water" * length + "."])
    u = clip.encode_prompts(clip.token_embedding(tokens[:, 4:4 + length]))
    assert error(u, clip.encode_text(tokens)) < TOLERANCE
    assert error(u, theirs.encode_text(tokens)) < TOLERANCE


@pytest.mark.parametrize("length", [0, 72, 77])
def test_a_prompt_that_does_not_fit(toy, length):
    with pytest.raises(InputError, match=f"{length} vectors does not fit.*expected 1 to 71"):
        toy[0].encode_prompts(torch.zeros(2, length, toy[0].text_width))


def test_where_a_text_is_read(toy):
    """The feature depends on the positions up to [EOT], on all of them, and on none behind it."""
    clip, _, _ = toy
    positions = clip.positional_embedding
    for length, encode in [(13, lambda: clip.encode_prompts(torch.ones(1, 7, clip.text_width))),
                           (77, lambda: clip.encode_prompts(torch.ones(1, 71, clip.text_width))),
                           (8, lambda: clip.encode_text(tokenize("a photo of a cat."))),
                           (77, lambda: clip.encode_text(tokenize(TEXTS[-1])))]:
        positions.requires_grad_()
        gradient = torch.autograd.grad(encode()[0, 0], positions)[0]
        positions.requires_grad_(False)
        assert gradient.abs().sum(dim=1).ne(0).tolist() == [True] * length + [False] * (77 - length)


def test_many_prompts_cost_one_pass(toy):
    clip, _, _ = toy
    outputs = after_every_block(clip.transformer, lambda: clip.encode_prompts(torch.ones(20, 7, clip.text_width)))
    assert [tuple(x.shape) for x in outputs] == [(20, 13, 128), (20, 1, 128)]


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ----------------------------------------------------------------------------------------------------------------------

PIECES = [
    "cat", "Dog", "naïve café", "Ærøskøbing", "e\u0301toile", "Straße", "ﬁne", "Ⅷ", "½", "x²", "3.14", "1,000",
    "don't", "WE'RE", "i'll", "she'd", "they've", "I'm", "rock'n'roll", "it’s", "'s", "'ſ", "\u212aelvin", "İstanbul",
    "ΟΔΥΣΣΕΥΣ", "привет", "שלום", "مرحبا", "नमस्ते", "สวัสดี", "你好世界", "こんにちは", "カタカナ", "한국어", "𝔘𝔫𝔦",
    "2024", "🙂", "👩\u200d👩\u200d👧", "🇫🇷", "👍🏽", "❤\ufe0f", "\u200b", "\ufeff", "\x00", "\x1c", "\x85",
    "&amp;", "&amp;amp;", "&lt;b&gt;", "&eacute;", "&#39;", "&#x1F600;", "&nbsp;", "&nothing;", "&#x1c;", "&#133;",
    "schÃ¶n", "â€œquotedâ€\x9d", "“curly”", "…", "—", "!!!", "?!?!", "#hashtag", "@user", "a_b", "http://x.org/?q=1&r=2",
    "C:\\dir", "\U0010ffff", "\u2028", "\u00a0", "\u3000", "\t", "\n", "\r\n", "   ", "<|startoftext|>", "<|ENDOFTEXT|>", "<|end|>",
    "</w>", "a</w>", "Ġ", "Ā", "ab" * 40, "a" * 200, "9" * 60, ".-" * 30]


def varied_texts():
    rng = random.Random(0)
    texts = ["", " ", *PIECES, *(f"a photo of a {noun}." for noun in read_nouns())]
    for _ in range(900):
        separator = rng.choice(["", " ", "  ", "\t", ", ", "\n", "-", "'"])
        texts.append(separator.join(rng.choice(PIECES) for _ in range(rng.randint(2, 8))))
    texts += ["".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(160, 0x2000)])) for _ in range(20))
              for _ in range(100)]
    return texts


def test_the_ids_of_the_reference():
    import clip
    texts = sorted(set(varied_texts()))
    assert len(texts) >= 2000
    ours, theirs = (module.tokenize(texts, context_length=2000) for module in (clip_model, clip))
    wrong = (ours != theirs).any(dim=1).nonzero().flatten().tolist()
    assert not wrong, [texts[i] for i in wrong[:5]]
    assert (ours.ne(0).sum(dim=1) > 77).sum() > 40  # long ones are among them


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=12).map("".join)))
def test_the_ids_of_the_reference_on_any_text(text):
    import clip
    assert torch.equal(tokenize(text, context_length=1500), clip.tokenize(text, context_length=1500))
    assert torch.equal(tokenize(text, truncate=True), clip.tokenize(text, truncate=True))


def test_known_ids():
    assert tokenize("a photo of a cat.")[0, :9].tolist() == [49406, 320, 1125, 539, 320, 2368, 269, 49407, 0]
    assert tokenizer().encode("photos snowcat") == [2479, 3880, 2368]
    assert tokenizer().encode("a photo of .")[-1] == 269  # [detail L1]: the word-final full stop, not 13
    assert tokenizer().ids["."] == 13 and tokenizer().ids[".</w>"] == 269
    assert len(tokenizer().ids) == 49408
    tokens = tokenize(["cat", "a cat"], context_length=5)
    assert tokens.dtype == torch.int64 and tokens.tolist() == [[49406, 2368, 49407, 0, 0], [49406, 320, 2368, 49407, 0]]


def test_text_that_does_not_fit():
    text = "very " * 76 + "old"
    with pytest.raises(InputError, match="79 tokens.*very very.*old"):
        tokenize(["short", text])
    tokens = tokenize(text, truncate=True)[0]
    assert tokens[-1] == 49407 and tokens[-2] == tokens[1] != 49407
    assert tokenize("very " * 75)[0, -1] == 49407  # exactly 77 fit


def test_the_vocabulary_file():
    digest = hashlib.sha256(clip_model.VOCABULARY.read_bytes()).hexdigest()
    assert digest == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


# ----------------------------------------------------------------------------------------------------------------------
# Weights
# ----------------------------------------------------------------------------------------------------------------------

def test_the_layout_is_openais(toy):
    ours, theirs = CLIP(64, 8, 128, 4, 128, 2, 64).state_dict(), toy[1].state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("name, sizes", [("ViT-B/16", (512, 224, 2, 768, 16, 77, 600, 512, 8, 2)),
                                         ("ViT-L/14", (768, 224, 1, 1024, 14, 77, 600, 768, 12, 2))])
@torch.no_grad()
def test_other_sizes_are_inferred(folder, name, sizes):
    """The true widths and patches; fewer blocks and words, to save time."""
    theirs = reference_model(sizes)
    torch.save(theirs.state_dict(), folder / "other.pt")
    clip = load_clip(folder / "other.pt")
    assert (clip.resolution, clip.embed_dim, clip.text_width, clip.context_length) == (224, sizes[0], sizes[7], 77)
    assert clip.transformer.resblocks[0].attn.heads == sizes[8]
    x, tokens = images(clip, 1), torch.tensor([[598, 3, 5, 599, 0, 0]])
    assert error(clip.encode_image(x), theirs.encode_image(x)) < TOLERANCE
    assert error(clip.encode_text(tokens), theirs.encode_text(tokens)) < TOLERANCE


@pytest.fixture(scope="session")
def archive(folder, toy):
    """A TorchScript archive as OpenAI ships it: traced, half precision, with three numbers beside the weights."""
    theirs = reference_model(SIZES["toy"])
    for name, value in [("input_resolution", 64), ("context_length", 77), ("vocab_size", 49408)]:
        if hasattr(theirs, name):
            delattr(theirs, name)
        theirs.register_buffer(name, torch.tensor(value))
    with warnings.catch_warnings():  # torch calls TorchScript deprecated, and the reference is not made for tracing
        warnings.simplefilter("ignore")
        script = torch.jit.trace(theirs, (torch.zeros(1, 3, 64, 64), tokenize("cat")), check_trace=False).half()
        script.save(str(folder / "archive.pt"))
    return folder / "archive.pt"


def test_every_kind_of_file(folder, toy, archive):
    clip, theirs, _ = toy
    torch.save({k: v.half() for k, v in theirs.state_dict().items()}, folder / "half.pt")
    torch.save(theirs.state_dict() | {"input_resolution": torch.tensor(64), "vocab_size": 49408 * torch.ones(())},
               folder / "extra.pt")
    expected = clip.state_dict()
    for path in (archive, folder / "half.pt", folder / "extra.pt", str(folder / "toy.pt")):
        found = load_clip(path)
        assert not found.training
        assert found.state_dict().keys() == expected.keys()
        for key, value in found.state_dict().items():
            assert value.dtype == torch.float32 and torch.equal(value, expected[key]), key
        assert not any(p.requires_grad for p in found.parameters())


def test_the_reference_reads_the_archive_alike(toy, archive):
    """That the archive above is what the reference calls one: its loader takes it, and gives the same model."""
    import clip
    theirs, transform = clip.load(str(archive), device="cpu")
    assert error(toy[0].encode_image(images(toy[0], 1)), theirs.encode_image(images(toy[0], 1))) < TOLERANCE
    assert transform.transforms[0].size == 64


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("evil"),)


def broken_files(folder, state, whole):
    """name -> (what is in the file, what the error line must say)"""
    def without(*keys):
        return {k: v for k, v in state.items() if k not in keys}
    scrambled = bytearray(whole)
    scrambled[whole.index(b"data.pkl") + 60:whole.index(b"data.pkl") + 160] = bytes(100)
    return {
        "resnet": ({"visual.layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}, "ResNet"),
        "missing": (without("visual.ln_post.bias"), "visual.ln_post.bias is missing"),
        "no patches": (without("visual.conv1.weight"), "not a CLIP.*visual.conv1.weight"),
        "surplus": (state | {"visual.head.weight": torch.zeros(2)}, "visual.head.weight"),
        "shape": (state | {"ln_final.bias": torch.zeros(127)}, r"ln_final.bias has shape \(127,\), not \(128,\)"),
        "oblong": (state | {"visual.positional_embedding": torch.zeros(61, 128)}, "positional_embedding has shape"),
        "gap": ({k.replace("resblocks.1.", "resblocks.7."): v for k, v in state.items()}, "resblocks.1.*is missing"),
        "width": ({"visual.conv1.weight": torch.zeros(96, 3, 8, 8), **without("visual.conv1.weight")}, "96 wide"),
        "number": (state | {"context_length": torch.tensor(76)}, "context_length contradicts"),
        "wrapped": ({"model": state, "epoch": 3}, "no plain state dict"),
        "list": ([torch.zeros(2)], "no plain state dict"),
        "other model": ({"cls_token": torch.zeros(1, 1, 192), "head.weight": torch.zeros(1000, 192)}, "not a CLIP"),
        "pickled": ({"model": Evil()}, "cannot be read"),
        "truncated": (whole[:len(whole) // 2], "cut off"),
        "empty": (b"", "cut off .0 bytes"),
        "text": (b"<html>404 Not Found</html>", "not a PyTorch checkpoint"),
        "scrambled": (bytes(scrambled), "cannot be read"),
    }


BROKEN = ["resnet", "missing", "no patches", "surplus", "shape", "oblong", "gap", "width", "number", "wrapped", "list",
          "other model", "pickled", "truncated", "empty", "text", "scrambled"]


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_are_no_clip(folder, toy, name, monkeypatch):
    monkeypatch.chdir(folder)
    small = {k: v[:10].clone() if k == "token_embedding.weight" else v for k, v in toy[1].state_dict().items()}
    torch.save(small, "small.pt")
    cases = broken_files(folder, small, Path("small.pt").read_bytes())
    assert sorted(cases) == sorted(BROKEN)
    content, message = cases[name]
    path = folder / f"{name.replace(' ', '_')}.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=message) as caught:
        load_clip(path)
    line = str(caught.value)
    assert line.startswith(str(path)) and "\n" not in line and len(line) < 600
    assert any(word in line for word in ("expected", "save it"))
    assert not Path("evil").exists()


def test_a_torchscript_archive_of_something_else(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(folder / "linear.pt"))
        with pytest.raises(InputError, match="not a CLIP"):
            load_clip(folder / "linear.pt")
    with zipfile.ZipFile(folder / "hollow.pt", "w") as hollow:
        hollow.writestr("hollow/constants.pkl", b"")
    with pytest.raises(InputError, match="cannot be read"):
        load_clip(folder / "hollow.pt")
    with pytest.raises(InputError, match="no such file.*ViT-B/32, ViT-B/16, ViT-L/14"):
        load_clip("RN50")


# ----------------------------------------------------------------------------------------------------------------------
# Download, from a server on this machine
# ----------------------------------------------------------------------------------------------------------------------

class Server(http.server.ThreadingHTTPServer):
    """Serves `payload` at any path; `cut` ends a transfer after that many bytes; `ranges` False ignores Range."""
    payload, cut, ranges, length = b"", None, True, True

    def handle_error(self, request, client_address):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.log.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        if start and start >= len(server.payload):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if server.length:
            self.send_header("Content-Length", str(len(server.payload) - start))
        self.end_headers()
        self.wfile.write(server.payload[start:][:server.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = Server(("127.0.0.1", 0), Handler)
    server.log, server.payload = [], random.Random(0).randbytes(1_000_000)
    server.url = f"http://127.0.0.1:{server.server_port}/weights.pt"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def test_download_once(server, tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "weights.pt"
    bars = []

    class Bar(clip_model.tqdm):
        def __init__(self, *args, **kwargs):
            bars.append(kwargs)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(clip_model, "tqdm", Bar)
    for _ in range(2):
        assert download(server.url, path, sha256=sha256(server.payload)) == path
        assert path.read_bytes() == server.payload
    assert server.log == [None]  # the second call found it
    assert bars[0]["total"] == 1_000_000 and bars[0]["initial"] == 0
    assert [p.name for p in path.parent.iterdir()] == ["weights.pt"]


def test_download_without_a_length_and_with_other_digests(server, tmp_path):
    server.length = False
    download(server.url, tmp_path / "a", sha256=sha256(server.payload)[:8])  # as in deit_small_patch16_224-cd65a155.pth
    download(server.url, tmp_path / "b", md5=hashlib.md5(server.payload).hexdigest())
    download(server.url, tmp_path / "c")
    assert all((tmp_path / name).read_bytes() == server.payload for name in "abc")
    with pytest.raises(InputError, match="md5"):
        download(server.url, tmp_path / "d", md5="0" * 32)


@pytest.mark.parametrize("ranges", [True, False])
def test_download_goes_on_after_a_cut(server, tmp_path, ranges):
    path, digest = tmp_path / "weights.pt", sha256(server.payload)
    server.cut, server.ranges = 300_000, ranges
    with pytest.raises(InputError, match=f"broke off after 300000 of 1000000 bytes.*run again.*{path}"):
        download(server.url, path, sha256=digest)
    assert not path.exists() and (tmp_path / "weights.pt.part").stat().st_size == 300_000
    server.cut = None
    download(server.url, path, sha256=digest)
    assert path.read_bytes() == server.payload and not (tmp_path / "weights.pt.part").exists()
    assert server.log == [None, "bytes=300000-"]


def test_download_killed_before_the_renaming(server, tmp_path):
    (tmp_path / "weights.pt.part").write_bytes(server.payload)
    path = download(server.url, tmp_path / "weights.pt", sha256=sha256(server.payload))
    assert path.read_bytes() == server.payload and server.log == ["bytes=1000000-"]


def test_download_of_something_else(server, tmp_path):
    path = tmp_path / "weights.pt"
    with pytest.raises(InputError, match=f"sha256.*{sha256(server.payload)}, expected 0000.*nothing was kept"):
        download(server.url, path, sha256="0" * 64)
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"what was there before")
    with pytest.raises(InputError, match="delete that file and run again"):
        download(server.url, path, sha256=sha256(server.payload))
    assert path.read_bytes() == b"what was there before"
    (tmp_path / "other.part").write_bytes(b"the beginning of another file")  # going on from it cannot succeed ...
    with pytest.raises(InputError, match="run again"):
        download(server.url, tmp_path / "other", sha256=sha256(server.payload))
    download(server.url, tmp_path / "other", sha256=sha256(server.payload))  # ... so the next call starts afresh


def test_download_offline(server, tmp_path, monkeypatch):
    url = server.url
    server.shutdown()
    server.server_close()
    monkeypatch.setattr(clip_model, "OPENAI", url.removesuffix("weights.pt"))
    with pytest.raises(InputError) as caught:
        load_clip("ViT-B/32", cache=tmp_path / "cache")
    line = str(caught.value)  # says what to fetch by hand, and where to put it
    assert clip_model.MODELS["ViT-B/32"] in line and f"save it as {tmp_path / 'cache' / 'ViT-B-32.pt'}" in line
    assert "\n" not in line


def test_load_by_name(server, tmp_path, monkeypatch, toy):
    clip, _, path = toy
    server.payload = path.read_bytes()
    monkeypatch.setattr(clip_model, "OPENAI", server.url.removesuffix("weights.pt"))
    monkeypatch.setitem(clip_model.MODELS, "ViT-B/32", f"{sha256(server.payload)}/ViT-B-32.pt")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = load_clip("ViT-B/32")
    assert torch.equal(found.visual.proj, clip.visual.proj)
    assert (tmp_path / ".cache" / "clip" / "ViT-B-32.pt").exists()
    load_clip("ViT-B/32")
    assert len(server.log) == 1

    (tmp_path / ".cache" / "clip" / "ViT-B-32.pt").write_bytes(server.payload + b" ")
    monkeypatch.setattr(clip_model, "read_state_dict", lambda path: pytest.fail("read before its digest was checked"))
    with pytest.raises(InputError, match="sha256"):
        load_clip("ViT-B/32")


def test_the_urls_are_the_references():
    from clip.clip import _MODELS
    assert all(clip_model.OPENAI + tail == _MODELS[name] for name, tail in clip_model.MODELS.items())


# ----------------------------------------------------------------------------------------------------------------------
# Images, words, command line
# ----------------------------------------------------------------------------------------------------------------------

def made_images():
    rng = np.random.default_rng(0)
    for h, w in [(64, 64), (224, 224), (300, 451), (451, 300), (30, 500), (223, 225), (7, 5)]:
        smooth = rng.integers(0, 256, (h // 5 + 1, w // 5 + 1, 3)).repeat(5, 0).repeat(5, 1)[:h, :w]
        noise = rng.integers(0, 256, (h, w, 3))
        yield from (Image.fromarray(x.astype(np.uint8)) for x in (smooth, noise))
    yield Image.fromarray(noise[:, :, 0].astype(np.uint8))  # grey


def check_preprocess(image, resolution):
    from clip.clip import _transform
    std = torch.tensor(clip_model.CLIP_STD)[:, None, None]
    difference = (preprocess(image, resolution) - _transform(resolution)(image)) * std
    assert difference.shape == (3, resolution, resolution) and difference.abs().max() < 1 / 255


@pytest.mark.parametrize("resolution", [64, 224])
def test_preprocess(resolution):
    for image in made_images():
        check_preprocess(image, resolution)


@pytest.mark.weights
@pytest.mark.skipif(not PHOTOS, reason="no photos beside the repository")
def test_preprocess_of_real_photos():
    for path in PHOTOS[::4]:
        check_preprocess(Image.open(path), 224)
        assert torch.equal(preprocess(Image.open(path), 64), preprocess(read_image(path), 64))


def test_transparent_and_palette_images(tmp_path):
    """[detail L4]: colours are mixed as colours, not as entries of a palette."""
    palette = Image.fromarray(np.random.default_rng(0).integers(0, 3, (90, 120)).astype(np.uint8))
    palette.putpalette([250, 0, 0, 0, 200, 90, 30, 60, 150])
    image = palette.convert("RGB")
    assert image.getcolors() is not None and palette.mode == "P"
    for other in (palette, image.convert("RGBA")):
        assert torch.equal(preprocess(other, 64), preprocess(image, 64))
        other.save(tmp_path / "other.png")
        assert read_image(tmp_path / "other.png") == image


def test_images_that_cannot_be_read(tmp_path):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-200])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    for name in ("none.jpg", "cut.jpg", "text.png", "broken.png", "."):
        with pytest.raises(InputError, match="not a readable image.*expected a JPEG or PNG") as caught:
            read_image(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


def test_the_nouns():
    nouns = read_nouns()
    assert 1400 <= len(nouns) <= 1600
    assert nouns == sorted(set(nouns)) and all(word == word.lower().strip() and word for word in nouns)
    voc = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
           "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
           "player", "dining table", "potted plant", "tv monitor"]
    coco = ["person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
            "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
            "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
            "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
            "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
            "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
            "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard",
            "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
            "teddy bear", "hair drier", "toothbrush"]
    backgrounds = ["water", "rails", "sky", "grass", "road", "table", "railroad", "dock", "sea", "lake", "tree", "forest",
                   "field", "snow", "sand", "wall", "floor"]
    assert len(voc) == 24 and len(coco) == 80
    assert not {*voc, *coco, *backgrounds} - set(nouns)
    with pytest.raises(InputError, match="restore the file"):
        read_nouns("nowhere.txt")


@torch.no_grad()
def test_nearest_words(toy):
    clip, theirs, _ = toy
    words = read_nouns()[::4]  # more than one batch of 256
    tokens = tokenize([f"a photo of {word}." for word in words])
    features = F.normalize(theirs.encode_text(tokens), dim=1)
    queries = torch.randn(3, clip.embed_dim, generator=torch.Generator().manual_seed(0))
    queries[0] = 7 * theirs.encode_text(tokens[300:301])[0]
    found = nearest_words(queries, words, clip, top=4)
    assert found[0][0] == (words[300], pytest.approx(1, abs=1e-5))
    for query, row in zip(queries, found, strict=True):
        cosine = [torch.dot(query, u).item() / query.norm().item() for u in features]  # the slow twin
        best = sorted(range(len(words)), key=lambda i: -cosine[i])[:4]
        assert [word for word, _ in row] == [words[i] for i in best]
        assert [value for _, value in row] == pytest.approx([cosine[i] for i in best], abs=1e-5)
    assert [len(row) for row in nearest_words(queries[:1], words[:2], clip)] == [2]
    assert nearest_words(queries[:0], words[:2], clip) == []


def command(*args, **kwargs):
    return subprocess.run([sys.executable, str(ROOT / "clip_model.py"), *map(str, args)], capture_output=True, text=True,
                          timeout=120, **kwargs)


@torch.no_grad()
def test_command_line(toy, tmp_path):
    """Run from another folder. A bad file costs one line and exit code 2."""
    _, theirs, path = toy
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (90, 130, 3)).astype(np.uint8))
    image.save(tmp_path / "image.png")
    texts = ["a photo of a cat", "a photo of a dog", "a photo of a very old boat"]
    done = command("--clip", path, "--image", "image.png", "--device", "cpu", *texts, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    probability = theirs(preprocess(image, 64)[None], tokenize(texts))[0].softmax(dim=1)[0]
    found = [line.split("%  ") for line in done.stdout.splitlines()]
    assert [text for _, text in found] == texts and done.stderr == ""
    assert [float(percent) for percent, _ in found] == pytest.approx((100 * probability).tolist(), abs=0.011)
    assert probability.std() > 0.01  # not all alike

    done = command("--clip", tmp_path / "none.pt", "--image", "image.png", "cat", "dog", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (f"error: {tmp_path / 'none.pt'}: no such file; expected a CLIP checkpoint, or one of ViT-B/32, "
                           "ViT-B/16, ViT-L/14\n")


def test_import_and_help_touch_nothing():
    """No file, no network, no torch.cuda at import or in --help."""
    code = """
import argparse, builtins, gzip, html, http.client, socket, sys, zipfile
import ftfy, regex, torch, torchvision.transforms.functional, tqdm
from pathlib import Path
def forbidden(*args, **kwargs): raise SystemExit(f"touched {args}")
source = compile(Path(sys.argv[1]).read_text(), sys.argv[1], "exec")
builtins.open = gzip.open = Path.read_bytes = Path.read_text = socket.socket.connect = torch.cuda.is_available = forbidden
space = {"__name__": "clip_model", "__file__": sys.argv[1]}
exec(source, space)
assert space["parse_args"](["--image", "none.jpg", "cat"]).clip == "ViT-B/32"
space["parse_args"](["--help"])
"""
    done = subprocess.run([sys.executable, "-c", code, str(ROOT / "clip_model.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for flag in ("--clip", "--image", "--cache", "--device", "--seed", "default: ViT-B/32"):
        assert flag in done.stdout


def test_run(capsys):
    def main(args):
        if args.bad:
            raise InputError("FILE: what it is; what was expected")
        if args.bug:
            raise ValueError("a programmer's mistake keeps its traceback")
        print("fine")

    run(main, argparse.Namespace(bad=False, bug=False))
    with pytest.raises(SystemExit) as caught:
        run(main, argparse.Namespace(bad=True, bug=False))
    assert caught.value.code == 2
    assert tuple(capsys.readouterr()) == ("fine\n", "error: FILE: what it is; what was expected\n")
    with pytest.raises(ValueError):
        run(main, argparse.Namespace(bad=False, bug=True))


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert clip_model.pick_device("auto") == clip_model.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="--device cuda"):
        clip_model.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert clip_model.pick_device("auto") == clip_model.pick_device("cuda") == torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_gpu_equals_cpu(real):
    clip, _, _ = real
    x, tokens = images(clip, 2), tokenize(TEXTS)
    expected = clip.encode_image(x), clip.encode_text(tokens)
    clip.cuda()
    found = clip.encode_image(x.cuda()).cpu(), clip.encode_text(tokens.cuda()).cpu()
    clip.cpu()
    assert all(error(a, b) < 1e-4 for a, b in zip(found, expected, strict=True))
