"""All stages, on tensors that claim another device and refuse to be mixed with the CPU's, as CUDA's
do: device placement, tried without a device."""
from contextlib import nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import common
import eval
import make_pseudo
import train_cam
import train_seg

ELSEWHERE, CPU, aten = torch.device("meta"), torch.device("cpu"), torch.ops.aten


def here(x):
    return x.here if isinstance(x, There) else x


def place(_, f, types, args=(), kwargs=None):
    """Run an operation on the CPU's numbers; its result is where CUDA's would be"""
    op, kwargs = f.overloadpacket, kwargs or {}
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = any(isinstance(x, There) for x in tensors)
    first = bool(args) and isinstance(args[0], There)  # which may be indexed by the CPU's too
    indexed = first and op in (aten.index, aten.index_put_, aten._index_put_impl_)
    if there and not indexed and op not in (aten._to_copy, aten.copy_) and not all(
            isinstance(x, There) or x.dim() == 0 for x in tensors):
        raise RuntimeError(f"{f}: expected all tensors to be on the same device")
    if kwargs.get("device") is not None:
        there, kwargs = torch.device(kwargs["device"]) == ELSEWHERE, kwargs | {"device": CPU}
    out = f(*tree_map(here, args), **tree_map(here, kwargs))
    if f._schema.is_mutable and args:
        return args[0]
    return tree_map(lambda x: There(x) if isinstance(x, torch.Tensor) else x, out) if there else out


class There(torch.Tensor):
    """Numbers of the CPU that claim another device"""
    __torch_dispatch__ = classmethod(place)

    @staticmethod
    def __new__(cls, x):
        there = torch.Tensor._make_wrapper_subclass(cls, x.shape, x.stride(), x.storage_offset(),
                                                    dtype=x.dtype, device=ELSEWHERE)
        there.here = x
        return there


class Placement(TorchDispatchMode):
    """Makes `.to(ELSEWHERE)` and `device=ELSEWHERE` give such tensors"""
    __torch_dispatch__ = place


class Constants(TorchFunctionMode):
    """torch.tensor and new_tensor would make meta tensors without numbers; tolist just waits"""

    def __torch_function__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if f is torch.Tensor.tolist and isinstance(args[0], There):
            return args[0].here.tolist()
        if f is torch.Tensor.new_tensor:
            return torch.tensor(args[1], dtype=args[0].dtype).to(args[0].device)
        if f in (torch.tensor, torch.as_tensor) and "device" in kwargs:
            return f(*args, **{**kwargs, "device": CPU}).to(kwargs["device"])
        return f(*args, **kwargs)


class NoScaler:
    """GradScaler(enabled=False), which a device of this type has not"""
    scale, step, state_dict = staticmethod(lambda x: x), staticmethod(lambda o: o.step()), dict
    update = staticmethod(lambda: None)


def test_all_stages_keep_tensors_on_their_device(toy, tmp_path, monkeypatch):
    """The CRF, and what processes add up, are there too: here of two, one of which is missing."""
    seen = set()

    def watched(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (  # of (image, prob, ..) or (tensor)
            seen.add((module.__name__, name, args[:2][-1].device)), original(*args))[1])
    watched(make_pseudo, "dense_crf")
    watched(eval, "dense_crf")
    watched(common, "sum_over_processes")
    watched(eval, "sum_over_processes")
    monkeypatch.setattr(common, "WORLD", 2)
    monkeypatch.setattr(common, "DistributedDataParallel", lambda model: model)
    for module in (train_cam, make_pseudo, train_seg, eval):
        monkeypatch.setattr(module, "start_processes", lambda _: ELSEWHERE)
    monkeypatch.setattr(common, "mixed_precision", lambda *_: (nullcontext(), NoScaler))
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda state, path: save(tree_map(here, state), path))
    out, data = tmp_path, f"--data {toy}/data --split few"
    train = f"{data} --recipe toy --vit {toy}/vit.pth --steps 1 --batch 2 --workers 0"
    with Constants(), Placement():
        with pytest.raises(RuntimeError, match="same device"):
            torch.ones(2, device=ELSEWHERE) + torch.ones(2)
        for module, flags in ((train_cam, f"{train} --clip {toy}/clip.pt --out {out}"),
                              (make_pseudo, f"{data} --cams {out}/cams --out {out}/masks"),
                              (train_seg, f"{train} --labels {out}/masks --out {out}"),
                              (eval, f"{data} --checkpoint {out}/seg.pt")):
            module.main(module.parse_args(flags.split()))
    assert {place for *_, place in seen} == {ELSEWHERE} and len(seen) == 4
