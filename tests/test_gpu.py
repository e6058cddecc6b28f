"""The phases on a GPU against the CPU, from the same files. bash experiments/gpu.sh runs these."""
import json
import shutil

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def losses(out, phase):
    return [json.loads(line)["loss"] for line in (out / f"{phase}.jsonl").open()]


def test_phases_give_the_losses_of_the_cpu(cam, chain, tmp_path):
    """In float32, each phase from what the earlier ones made on that device"""
    for device in ("cpu", "cuda"):
        shutil.copytree(chain / "cam", tmp_path / device)
        for phase in ("match", "prompts", "refine"):
            cam(tmp_path / device, "--phase", phase, "--device", device, "--precision", "float32")
            ours, expected = losses(tmp_path / device, phase), losses(tmp_path / "cpu", phase)
            assert np.allclose(ours, expected, rtol=0.02), phase


@pytest.mark.parametrize("precision", ["auto", "bfloat16", "float16"])
def test_precisions_train(cam, tmp_path, precision):
    cam(tmp_path, "--device", "cuda", "--precision", precision)
    for phase in ("classify", "match", "prompts", "refine"):
        assert np.isfinite(losses(tmp_path, phase)).all(), phase


def test_a_run_of_the_cpu_goes_on(cam, tmp_path, chain, dies_at_2):
    shutil.copy(chain / "cam/classify.pt", tmp_path)
    flags = ["--phase", "match", "--precision", "float32"]
    with pytest.raises(KeyboardInterrupt):
        cam(tmp_path, *flags, "--device", "cpu")
    dies_at_2()
    cam(tmp_path, *flags, "--device", "cuda", "--resume")
    assert np.allclose(losses(tmp_path, "match"), losses(chain / "cam", "match"), rtol=0.02)
