"""clip_model.py against clip-anytorch, a copy of OpenAI's code on PyPI.

Nothing is downloaded: weights are random, of a small model, biases and gains too: a bias of zero or
a gain of one would hide a mistake.
"""
import hashlib
import http.server
import random
import threading
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, error, moved
from PIL import Image

import clip_model
from clip_model import load_clip, nearest_words, preprocess, read_nouns, tokenize
from common import InputError, fetch_weights

# As the reference orders them: embed_dim, resolution, layers, width, patch, context, vocabulary,
# text width, heads, text layers
SIZES = 96, 64, 4, 128, 8, 77, 49408, 192, 3, 2
TEXTS = ["a photo of a cat.", "dog", "", "two people ride bicycles along the river, and a train",
         "a photo of " + "very " * 70 + "old boat"]  # of 8, 3, 2, 13 and 77 tokens

# max |ours - theirs| / max |theirs|, float32, sums in another order. The worst measured: 8e-7; at
# the size of ViT-B/32 2.3e-6 (blocks of the image tower), gradients 2.0e-6
TOLERANCE = 1e-5


def reference_model():
    from clip.model import CLIP as Reference
    torch.manual_seed(0)
    model = Reference(*SIZES).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p += 0.1 * torch.randn_like(p)
        if "embedding" in name:
            p *= 5  # at the start they are too small to matter beside the biases
        p.copy_(p.half())  # so that a file in half precision holds the same numbers
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(ours, theirs, file), the file a state dict in half precision [detail L3]"""
    theirs, path = reference_model(), tmp_path_factory.mktemp("clip") / "c.pt"
    torch.save({key: value.half() for key, value in theirs.state_dict().items()}, path)
    return load_clip(path), theirs, path


def images(clip, n):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, clip.resolution, clip.resolution, generator=generator)


def after_every_block(model, tower, encode, x):
    """The output of every residual block of a tower while it encodes x, and the features"""
    outputs = []
    hooks = [block.register_forward_hook(lambda *args: outputs.append(args[2]))
             for block in model.get_submodule(tower).resblocks]
    outputs.append(getattr(model, encode)(x))
    for hook in hooks:
        hook.remove()
    return outputs


@torch.no_grad()
def test_towers_after_every_block(pair):
    """Texts of unequal length, cut behind the longest [EOT] [detail L2]"""
    clip, theirs, _ = pair
    for tower, encode, x, longest in [
            ("visual.transformer", "encode_image", images(clip, 3), None),
            ("transformer", "encode_text", tokenize(TEXTS), 77),
            ("transformer", "encode_text", tokenize(TEXTS[1:4]), 13)]:
        *blocks, features = after_every_block(clip, tower, encode, x)
        *their_blocks, their_features = after_every_block(theirs, tower, encode, x)
        assert error(features, their_features) < TOLERANCE
        for i, (a, b) in enumerate(zip(blocks, their_blocks, strict=True)):
            assert error(a, b.transpose(0, 1)[:, :longest]) < TOLERANCE, f"{tower} {i}"


def reference_prompts(theirs, vectors):
    """The reference has no prompts: put the vectors in place of as many embedded words."""
    K, P, _ = vectors.shape
    hook = theirs.token_embedding.register_forward_hook(
        lambda module, args, x: torch.cat([x[:, :4], vectors, x[:, 4 + P:]], dim=1))
    features = theirs.encode_text(tokenize(["a photo of" + " cat" * P + "."] * K))
    hook.remove()
    return features


@pytest.mark.parametrize("length", [None, 1, 30, 71])
def test_gradient_of_pixels_and_of_prompts(pair, length):
    clip, theirs, _ = pair
    generator = torch.Generator().manual_seed(1)
    start, both = images(clip, 3), (clip.encode_image, theirs.encode_image)
    if length:  # [eq. L1]
        start = 0.1 * torch.randn(3, length, clip.text_width, generator=generator)
        both = (clip.encode_prompts, partial(reference_prompts, theirs))
    weights = torch.randn(3, clip.embed_dim, generator=generator)
    features, gradients = [], []
    for encode in both:
        x = start.clone().requires_grad_()
        features.append(encode(x))
        F.cosine_similarity(features[-1], weights).sum().backward()
        gradients.append(x.grad)
    assert error(*features) < TOLERANCE and error(*gradients) < TOLERANCE
    assert all(p.grad is None and not p.requires_grad for p in clip.parameters())


PIECES = [
    "cat", "Dog", "naïve café", "e\u0301toile", "ﬁne", "Ⅷ", "x²", "3.14", "don't", "WE'RE", "it’s",
    "'ſ", "\u212aelvin", "İstanbul", "ΟΔΥΣΣΕΥΣ", "привет", "مرحبا", "नमस्ते",
    "你好世界", "한국어", "🙂",
    "👩\u200d👩\u200d👧", "❤\ufe0f", "\ufeff", "\x00", "\x85", "&amp;amp;", "&lt;b&gt;", "&#133;",
    "schÃ¶n", "“curly”", "…", "!!!", "a_b", "http://x.org/?q=1", "\U0010ffff", "\u00a0", "\r\n",
    "<|startoftext|>", "<|ENDOFTEXT|>", "<|end|>", "</w>", "Ġ", "ab" * 40, "9" * 60]


def test_the_ids_of_the_reference():
    import clip
    rng = random.Random(0)
    texts = ["", " ", *PIECES, *(f"a photo of a {noun}." for noun in read_nouns())]
    texts += [rng.choice(["", " ", "\t", ", ", "-", "'"]).join(rng.choices(PIECES, k=5))
              for _ in range(300)]
    ours, theirs = (module.tokenize(texts, context_length=2000) for module in (clip_model, clip))
    wrong = (ours != theirs).any(dim=1).nonzero().flatten().tolist()
    assert not wrong, [texts[i] for i in wrong[:5]]


@pytest.mark.parametrize("h, w", [(64, 64), (300, 451), (451, 300), (30, 500), (223, 225), (7, 5)])
def test_preprocess(h, w):
    from clip.clip import _transform
    noise = np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)
    palette = Image.fromarray(noise[:, :, 0] % 3)  # [detail L4]: its colours are mixed
    palette.putpalette([250, 0, 0, 0, 200, 90, 30, 60, 150])
    for image, theirs in ((Image.fromarray(noise),) * 2, (Image.fromarray(noise[:, :, 0]),) * 2,
                          (palette, palette.convert("RGB"))):
        for R in (64, 224):
            difference = preprocess(image, R) - _transform(R)(theirs)
            assert difference.abs().max() < 1 / 255 / max(clip_model.CLIP_STD)


@torch.no_grad()
def test_words_nearest_to_a_feature(pair):
    (clip, theirs, _), words = pair, read_nouns()[::25]
    features = theirs.encode_text(tokenize([f"a photo of {word}." for word in words]))
    for query in (features[7], features[3] - features[20]):
        cosine, best = F.cosine_similarity(query, features).sort(descending=True)
        assert nearest_words(query[None], words, clip, top=4) == [
            [(words[i], pytest.approx(x.item(), abs=1e-5)) for i, x in zip(best[:4], cosine)]]


@torch.no_grad()
def test_zero_shot_probabilities(pair, tmp_path, capsys):
    """[eq. L2] from the command line"""
    clip, theirs, path = pair
    noise = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "image.png")
    texts = ["a photo of a cat", "a photo of a very old boat"]
    call("clip_model", "--clip", path, "--image", tmp_path / "image.png", *texts)
    found = [line.split("%  ") for line in capsys.readouterr().out.splitlines()]
    X = preprocess(Image.fromarray(noise), clip.resolution)[None]
    expected = 100 * theirs(X, tokenize(texts))[0].softmax(dim=1)[0]
    assert [text for _, text in found] == texts
    assert [float(p) for p, _ in found] == pytest.approx(expected.tolist(), abs=0.011)


@pytest.mark.filterwarnings("ignore")  # the reference is not made for tracing
def test_an_archive_of_openai(tmp_path, monkeypatch):
    """TorchScript, traced, in half precision, with three numbers beside the weights. It runs code
    while it is loaded, so only files whose SHA-256 is known are."""
    model, path = reference_model(), tmp_path / "archive.pt"
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    for name, value in [("input_resolution", 64), ("context_length", 77), ("vocab_size", 49408)]:
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    example = (torch.zeros(1, 3, 64, 64), tokenize("cat"))
    torch.jit.trace(model, example, check_trace=False).half().save(path)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="torch.save makes of the"):
        patch.setattr(torch.jit, "load", None)  # is not called
        load_clip(path)
    torch.save(torch.jit.load(path).state_dict(), tmp_path / "converted.pt")
    assert not moved(expected, load_clip(tmp_path / "converted.pt").state_dict())
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(clip_model.MODELS, "mine", f"{sha256}/archive.pt")
    clip = load_clip(path)
    assert not moved(expected, clip.state_dict()) and clip.sha256 == sha256


@pytest.mark.parametrize("length", [0, 72])
def test_prompts_of_another_length(pair, length):
    with pytest.raises(InputError, match="1 to 71"):
        pair[0].encode_prompts(torch.zeros(2, length, pair[0].text_width))


def test_downloads(tmp_path, monkeypatch):
    """Once, by a SHA-256; nothing is left of one that fails."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file, place = tmp_path / "w.pt", tmp_path / "hub/checkpoints"
    file.write_bytes(b"weights")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    handler.func.log_message = lambda *args: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/w.pt"
    digest = hashlib.sha256(b"weights").hexdigest()
    for bad, expected in [(url, "0" * 64), (url.replace("w.pt", "v.pt"), digest),
                          ("http://127.0.0.1:9/u.pt", digest)]:  # nobody listens there
        with pytest.raises(InputError, match=f"^cannot download {bad} .*save it as {place}"):
            fetch_weights(bad, expected)
        assert not list(place.iterdir())
    assert fetch_weights(url, digest[:8]) == place / "w.pt"
    server.shutdown()
    server.server_close()
    assert fetch_weights(url, digest[:8]).read_bytes() == b"weights"
    (place / "w.pt").write_bytes(b"others")
    with pytest.raises(InputError, match=f"w.pt: its SHA-256 begins with .*, {digest[:8]}; remove"):
        fetch_weights(url, digest[:8])
    assert (place / "w.pt").read_bytes() == b"others"
