"""clip_model.py against the reference implementation on PyPI (clip-anytorch, a copy of OpenAI's code) and on its own.

Nothing is downloaded: weights are random, at the real size of ViT-B/32 and at the toy world's. Every one-dimensional
parameter is random too, since a bias left at zero or a gain left at one would hide a mistake.
"""
import errno
import hashlib
import http.server
import io
import random
import subprocess
import sys
import threading
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import clip_model
from clip_model import InputError, linear, load_clip, nearest_words, preprocess, read_image, read_nouns, tokenize, tokenizer

ROOT = Path(__file__).resolve().parent.parent

# In the reference's order: embed_dim, resolution, layers, width, patch, context, vocabulary, text width, heads, layers
SIZES = {"toy": (64, 64, 4, 128, 8, 77, 49408, 128, 2, 2), "ViT-B/32": (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)}
TEXTS = ["a photo of a cat.", "dog", "", "two people ride bicycles along the river, and a train passes behind them",
         "a photo of " + "very " * 70 + "old boat"]  # 8, 3, 2, 16 and 77 tokens

# max |ours - theirs| / max |theirs|, float32, sums in another order. Measured on two cores of an AMD EPYC, the worst of
# each kind: ViT-B/32 blocks of the image tower 2.3e-6, of the text tower 1.1e-6, pixel gradients 1.6e-6, prompt
# gradients 2.0e-6; toy size at most 8e-7 throughout. Ten times the worst would exceed 1e-5, the most that is allowed.
TOLERANCE = 1e-5


def error(ours, theirs):
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def reference_model(sizes):
    from clip.model import CLIP as Reference
    torch.manual_seed(0)
    model = Reference(*sizes).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p += 0.1 * torch.randn_like(p)
        if "embedding" in name:
            p *= 5  # at the reference's start, token and position embeddings are too small to matter beside the biases
        p.copy_(p.half())  # so that a file in half precision holds the same numbers
    return model


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """(ours, theirs, file): the toy size, from a float32 state dict."""
    theirs, path = reference_model(SIZES["toy"]), tmp_path_factory.mktemp("clip") / "toy.pt"
    torch.save(theirs.state_dict(), path)
    return load_clip(path), theirs, path


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """(ours, theirs, None): the size of ViT-B/32, from a state dict in half precision, 300 MB for a moment."""
    theirs, path = reference_model(SIZES["ViT-B/32"]), tmp_path_factory.mktemp("clip") / "b32.pt"
    torch.save({key: value.half() for key, value in theirs.state_dict().items()}, path)
    ours = load_clip(path)
    path.unlink()
    return ours, theirs, None


def images(clip, n):
    return torch.randn(n, 3, clip.resolution, clip.resolution, generator=torch.Generator().manual_seed(0))


# ----------------------------------------------------------------------------------------------------------------------
# Equivalence
# ----------------------------------------------------------------------------------------------------------------------

def after_every_block(model, tower, encode, x):
    """The output of every residual block of a tower while it encodes x, and the features."""
    outputs = []
    hooks = [block.register_forward_hook(lambda *args: outputs.append(args[2])) for block in model.get_submodule(tower).resblocks]
    outputs.append(getattr(model, encode)(x))
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize("size", ["toy", "real"])
@torch.no_grad()
def test_towers_after_every_block(request, size):
    """Texts of unequal length. The last block gives only the token that is read, the others nothing behind the last [EOT]."""
    clip, theirs, _ = request.getfixturevalue(size)
    for tower, encode, x, longest in [("visual.transformer", "encode_image", images(clip, 3), clip.visual.grid ** 2 + 1),
                                      ("transformer", "encode_text", tokenize(TEXTS), 77),
                                      ("transformer", "encode_text", tokenize(TEXTS[1:4]), 16)]:
        *ours, last, features = after_every_block(clip, tower, encode, x)
        *reference, reference_last, reference_features = after_every_block(theirs, tower, encode, x)
        for i, (a, b) in enumerate(zip(ours, reference, strict=True)):
            assert error(a, b.transpose(0, 1)[:, :longest]) < TOLERANCE, f"{tower} {i}"
        read = x.argmax(dim=1) if encode == "encode_text" else torch.zeros(3, dtype=torch.long)
        assert error(last[:, 0], reference_last[read, torch.arange(len(x))]) < TOLERANCE
        assert error(features, reference_features) < TOLERANCE


def reference_prompts(theirs, vectors):
    """The reference has no prompts: write the vectors over what its embedding gives for as many words."""
    K, P, _ = vectors.shape
    hook = theirs.token_embedding.register_forward_hook(
        lambda module, args, x: torch.cat([x[:, :4], vectors, x[:, 4 + P:]], dim=1))
    features = theirs.encode_text(tokenize(["a photo of" + " cat" * P + "."] * K))
    hook.remove()
    return features


@pytest.mark.parametrize("size, length", [("toy", None), ("real", None), ("toy", 1), ("toy", 30), ("toy", 71), ("real", 30)])
def test_gradient_of_the_pixels_and_of_prompts(request, size, length):
    clip, theirs, _ = request.getfixturevalue(size)
    generator = torch.Generator().manual_seed(1)
    start = 0.1 * torch.randn(3, length, clip.text_width, generator=generator) if length else images(clip, 3)
    both = (clip.encode_prompts, partial(reference_prompts, theirs)) if length else (clip.encode_image, theirs.encode_image)
    weights = torch.randn(3, clip.embed_dim, generator=generator)
    features, gradient = [], []
    for encode in both:
        x = start.clone().requires_grad_()
        features.append(encode(x))
        F.cosine_similarity(features[-1], weights).sum().backward()
        gradient.append(x.grad)
    assert error(*features) < TOLERANCE
    assert error(*gradient) < TOLERANCE
    assert all(p.grad is None and not p.requires_grad for p in clip.parameters())


@torch.no_grad()
def test_real_words_as_prompts_at_every_length(toy):
    clip, theirs, _ = toy
    words = [word for word in read_nouns() if len(tokenizer().encode(word)) == 1]
    random.Random(0).shuffle(words)
    for length in range(1, 72):
        tokens = tokenize(["a photo of " + " ".join(words[i:i + length]) + "." for i in (0, 71, 142)])
        assert tokens.argmax(dim=1).tolist() == [length + 5] * 3
        u = clip.encode_prompts(clip.token_embedding(tokens[:, 4:4 + length]))
        assert error(u, clip.encode_text(tokens)) < TOLERANCE, length
        assert error(u, theirs.encode_text(tokens)) < TOLERANCE, length
    for length in (0, 72, 77):
        with pytest.raises(InputError, match=f"{length} vectors does not fit.*expected 1 to 71"):
            clip.encode_prompts(torch.zeros(2, length, clip.text_width))


def test_linear_is_a_linear_layer():
    torch.manual_seed(0)
    strided = torch.randn(4, 6, 16)[:, ::2].transpose(0, 1)
    for x in [torch.randn(5), torch.randn(1, 7), torch.randn(8, 50, 96), strided]:
        weight, bias, direction = torch.randn(3, x.shape[-1]), torch.randn(3), torch.randn(*x.shape[:-1], 3)
        for tensors in ([x, weight], [x, weight, bias]):
            results = []
            for function in (linear, F.linear):
                leaves = [t.detach().requires_grad_() for t in tensors]
                y = function(*leaves)
                results.append([y, *torch.autograd.grad(y, leaves, direction)])
            assert all(error(a, b) < TOLERANCE for a, b in zip(*results, strict=True))


def test_a_batch_is_its_rows(toy):
    clip, _, _ = toy
    x, p = images(clip, 3), torch.randn(4, 6, clip.text_width, generator=torch.Generator().manual_seed(0))
    for encode, batch in [(clip.encode_image, x), (clip.encode_text, tokenize(TEXTS)), (clip.encode_prompts, p)]:
        assert error(encode(batch), torch.cat([encode(row[None]) for row in batch])) < TOLERANCE
    none = x[:0].clone().requires_grad_()  # of a batch in which no class is present
    v = clip.encode_image(none)
    assert v.shape == clip.encode_prompts(p[:0]).shape == (0, clip.embed_dim)
    assert torch.autograd.grad(v.sum(), none)[0].shape == none.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_gpu_equals_cpu(toy):
    clip = load_clip(toy[2], "cuda")
    for encode, batch in [("encode_image", images(clip, 2)), ("encode_text", tokenize(TEXTS))]:
        assert error(getattr(clip, encode)(batch.cuda()).cpu(), getattr(toy[0], encode)(batch)) < 1e-4


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

def test_the_ids_of_the_reference():
    import clip
    rng = random.Random(0)
    texts = ["", " ", *PIECES, *(f"a photo of a {noun}." for noun in read_nouns())]
    texts += [rng.choice(["", " ", "\t", ", ", "-", "'"]).join(rng.choices(PIECES, k=rng.randint(2, 8))) for _ in range(900)]
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
    assert len(tokenizer().ids) == 49408
    tokens = tokenize(["cat", "a cat"], context_length=5)
    assert tokens.dtype == torch.int64 and tokens.tolist() == [[49406, 2368, 49407, 0, 0], [49406, 320, 2368, 49407, 0]]
    assert tokenize("very " * 75)[0, -1] == 49407  # exactly 77 fit
    with pytest.raises(InputError, match="79 tokens.*very very.*old"):
        tokenize(["short", "very " * 76 + "old"])
    digest = hashlib.sha256((ROOT / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).hexdigest()
    assert digest == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


# ----------------------------------------------------------------------------------------------------------------------
# Weights
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [(512, 224, 2, 768, 16, 77, 600, 512, 8, 2), (768, 224, 1, 1024, 14, 77, 600, 768, 12, 2)])
@torch.no_grad()
def test_other_sizes_are_inferred(tmp_path, sizes):
    """The true widths and patches of ViT-B/16 and ViT-L/14; fewer blocks and words, to save time."""
    theirs = reference_model(sizes)
    torch.save(theirs.state_dict(), tmp_path / "other.pt")
    clip = load_clip(tmp_path / "other.pt")
    assert (clip.resolution, clip.embed_dim, clip.text_width, clip.context_length) == (224, sizes[0], sizes[7], 77)
    x, tokens = images(clip, 1), torch.tensor([[598, 3, 5, 599, 0, 0]])
    assert error(clip.encode_image(x), theirs.encode_image(x)) < TOLERANCE
    assert error(clip.encode_text(tokens), theirs.encode_text(tokens)) < TOLERANCE


def test_every_kind_of_file(tmp_path, toy):
    """A TorchScript archive as OpenAI ships it (traced, half precision, three numbers beside the weights), and a state dict."""
    import clip as reference
    clip, theirs, path = toy
    traced = reference_model(SIZES["toy"])
    for name, value in [("input_resolution", 64), ("context_length", 77), ("vocab_size", 49408)]:
        vars(traced).pop(name, None)
        traced.register_buffer(name, torch.tensor(value))
    with warnings.catch_warnings():  # torch calls TorchScript deprecated, and the reference is not made for tracing
        warnings.simplefilter("ignore")
        script = torch.jit.trace(traced, (torch.zeros(1, 3, 64, 64), tokenize("cat")), check_trace=False).half()
        script.save(str(tmp_path / "archive.pt"))
        again, _ = reference.load(str(tmp_path / "archive.pt"), device="cpu")  # the reference's loader takes it for one
    assert error(clip.encode_image(images(clip, 1)), again.encode_image(images(clip, 1))) < TOLERANCE
    for file in (tmp_path / "archive.pt", str(path)):
        found = load_clip(file)
        assert found.state_dict().keys() == theirs.state_dict().keys() and not found.training
        for key, value in found.state_dict().items():
            assert value.dtype == torch.float32 and torch.equal(value, theirs.state_dict()[key]), key
        assert not any(p.requires_grad for p in found.parameters())


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("evil"),)


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


WRONG = {  # the toy's entries -> what is in the file instead; what the error line must say
    "a ResNet": (lambda s: s | {"visual.layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}, "ResNet"),
    "an entry too few": (lambda s: {k: v for k, v in s.items() if k != "visual.ln_post.bias"}, "Missing key.*visual.ln_post.bias"),
    "an entry too many": (lambda s: s | {"visual.head.weight": torch.zeros(2)}, "Unexpected key.*visual.head.weight"),
    "a shape": (lambda s: s | {"ln_final.bias": torch.zeros(127)}, r"size mismatch for ln_final.bias.*127.*128"),
    "a gap": (lambda s: {k.replace("resblocks.1.", "resblocks.7."): v for k, v in s.items()}, "Missing key.*resblocks.1"),
    "a contradiction": (lambda s: s | {"context_length": torch.tensor(76)}, "context_length contradicts.*77"),
    "another model": (lambda s: {"cls_token": torch.zeros(1, 1, 192)}, "KeyError: 'visual.conv1.weight'"),
    "a wrapped one": (lambda s: {"model": s, "epoch": 3}, "KeyError: 'visual.conv1.weight'"),
    "code": (lambda s: {"model": Evil()}, "UnpicklingError"),
    "a cut one": (lambda s: saved(s)[:100_000], "not a zip file"),
    "a scrambled one": (lambda s: saved(s).replace(b"_rebuild_tensor", b"_rebuild_hammer"), "UnpicklingError"),
    "a web page": (lambda s: b"<html>404 Not Found</html>", "not a zip file"),
    "no file": (lambda s: None, "No such file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_are_no_clip(tmp_path, toy, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change, message = WRONG[name]
    content = change({k: v[:10].clone() if k == "token_embedding.weight" else v for k, v in toy[1].state_dict().items()})
    if content is not None:
        Path("wrong.pt").write_bytes(content if isinstance(content, bytes) else saved(content))
    with pytest.raises(InputError, match=rf"^wrong.pt: not a CLIP that can be read \(.*{message}.*\); expected.*ViT-L/14$"):
        load_clip("wrong.pt")
    assert not Path("evil").exists()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a server on this machine, of what lies in tmp_path."""
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_a_download_by_name(server, tmp_path, monkeypatch, toy):
    """Into torch.hub's folder, once: the second call finds it there, although the address no longer answers."""
    digest = hashlib.sha256(toy[2].read_bytes()).hexdigest()
    (tmp_path / digest).mkdir()
    (tmp_path / digest / "ViT-B-32.pt").write_bytes(toy[2].read_bytes())
    monkeypatch.setattr(clip_model, "OPENAI", server)
    monkeypatch.setitem(clip_model.MODELS, "ViT-B/32", f"{digest}/ViT-B-32.pt")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for _ in range(2):
        assert torch.equal(load_clip("ViT-B/32").visual.proj, toy[0].visual.proj)
        (tmp_path / digest / "ViT-B-32.pt").unlink(missing_ok=True)
    assert [path.name for path in (tmp_path / "hub" / "checkpoints").iterdir()] == ["ViT-B-32.pt"]


def test_downloads_that_fail(server, tmp_path):
    (tmp_path / "w.pt").write_bytes(b"weights")
    place, digest = tmp_path / "cache", hashlib.sha256(b"weights").hexdigest()
    for url, expected, reason in [(server + "w.pt", "0" * 64, f"invalid hash.*{digest}"), (server + "v.pt", digest, "404"),
                                  ("http://127.0.0.1:9/u.pt", digest, "refused")]:  # the third: nobody listens there
        with pytest.raises(InputError, match=f"^cannot download {url} .*{reason}.*save it as {place / url[-4:]}$"):
            clip_model.fetch_weights(url, expected, place)
        assert not list(place.iterdir())  # nothing is left behind
    path = clip_model.fetch_weights(server + "w.pt", digest[:8], place)  # 8 digits, as in the name of DeiT's file
    assert path == place / "w.pt" and path.read_bytes() == b"weights"


def test_the_urls_are_the_references():
    from clip.clip import _MODELS
    assert all(clip_model.OPENAI + tail == _MODELS[name] for name, tail in clip_model.MODELS.items())


# ----------------------------------------------------------------------------------------------------------------------
# Images, words, command line
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("resolution", [64, 224])
def test_preprocess(resolution):
    from clip.clip import _transform
    rng = np.random.default_rng(0)
    for h, w in [(64, 64), (224, 224), (300, 451), (451, 300), (30, 500), (223, 225), (7, 5)]:
        noise = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        for image in (Image.fromarray(noise), Image.fromarray(noise.repeat(5, 0).repeat(5, 1)), Image.fromarray(noise[:, :, 0])):
            difference = preprocess(image, resolution) - _transform(resolution)(image)
            assert difference.shape == (3, resolution, resolution)
            assert difference.abs().max() < 1 / 255 / max(clip_model.CLIP_STD)


def test_read_image(tmp_path):
    """[detail L4]: colours are mixed as colours, not as entries of a palette. 16 bits become 8, none are cut at 255."""
    palette = Image.fromarray(np.random.default_rng(0).integers(0, 3, (90, 120)).astype(np.uint8))
    palette.putpalette([250, 0, 0, 0, 200, 90, 30, 60, 150])
    image = palette.convert("RGB")
    for other in (palette, image.convert("RGBA")):
        assert torch.equal(preprocess(other, 64), preprocess(image, 64))
        other.save(tmp_path / "other.png")
        assert read_image(tmp_path / "other.png") == image
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "deep.png")), grey[:, :, None].repeat(3, axis=2))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "turned.png")), np.rot90(np.asarray(image), -1))
    assert np.array_equal(np.asarray(read_image(tmp_path / "turned.png", upright=False)), np.asarray(image))

    (tmp_path / "cut.png").write_bytes((tmp_path / "deep.png").read_bytes()[:-100])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    for name in ("none.jpg", "cut.png", "text.png", "broken.png", "."):
        with pytest.raises(InputError, match=f"^{tmp_path / name}: not a readable image .*other image file; replace it$"):
            read_image(tmp_path / name)


@torch.no_grad()
def test_nearest_words(toy):
    clip, theirs, _ = toy
    words = read_nouns()
    assert words == sorted(set(words)) and {"boat", "dining table", "potted plant", "traffic light", "water", "rails"} <= set(words)
    words = words[::4]  # more than one batch of 256
    features = theirs.encode_text(tokenize([f"a photo of {word}." for word in words]))
    queries = torch.randn(3, clip.embed_dim, generator=torch.Generator().manual_seed(0))
    queries[0] = 7 * features[300]
    found = nearest_words(queries, words, clip, top=4)
    assert found[0][0] == (words[300], pytest.approx(1, abs=1e-5))
    for query, row in zip(queries, found, strict=True):
        cosine = F.cosine_similarity(query, features).tolist()  # the slow twin
        best = sorted(range(len(words)), key=lambda i: -cosine[i])[:4]
        assert row == [(words[i], pytest.approx(cosine[i], abs=1e-5)) for i in best]
    assert [len(row) for row in nearest_words(queries[:1], words[:2], clip)] == [2]


@torch.no_grad()
def test_command_line(toy, tmp_path):
    """Run from another folder."""
    _, theirs, path = toy
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3)).astype(np.uint8))
    image.save(tmp_path / "image.png")
    texts = ["a photo of a cat", "a photo of a dog", "a photo of a very old boat"]
    done = subprocess.run([sys.executable, ROOT / "clip_model.py", "--clip", path, "--image", "image.png", *texts],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    found = [line.split("%  ") for line in done.stdout.splitlines()]
    assert [text for _, text in found] == texts
    probability = theirs(preprocess(image, 64)[None], tokenize(texts))[0].softmax(dim=1)[0]
    assert [float(percent) for percent, _ in found] == pytest.approx((100 * probability).tolist(), abs=0.011)
    assert probability.std() > 0.01  # not all alike


@pytest.mark.parametrize("mistake, line", [
    (InputError("FILE: what it is"), "error: FILE: what it is\n"),
    (InputError("Caught InputError in DataLoader worker process 0.\nTraceback\nclip_model.InputError: FILE: what it is\n"),
     "error: FILE: what it is\n"),
    (OSError(errno.ENOSPC, "No space left", "out"), f"error: [Errno 28] No space left: 'out'{clip_model.MAKE_ROOM}\n"),
    (FileNotFoundError(errno.ENOENT, "a bug, with its traceback"), None)])
def test_mistakes_of_the_user_end_in_one_line(capsys, mistake, line):
    def main(args):
        raise mistake

    with pytest.raises(SystemExit if line else FileNotFoundError) as caught:
        clip_model.run(main, None)
    assert not line or (caught.value.code, capsys.readouterr().err) == (2, line)
