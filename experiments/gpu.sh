#!/usr/bin/env bash
# All that wants a GPU, in at most 8 minutes on one card: OUT/gpu.txt is what docs/results.md needs.
#
#   make .venv/ready-tests && bash experiments/gpu.sh OUT
set -eu -o pipefail
cd "$(dirname "$0")/.."
[ $# = 1 ] || { echo "usage: bash experiments/gpu.sh OUT" >&2; exit 2; }
python=.venv/bin/python
[ -x $python ] || python=python
$python -c "import torch; torch.ones(1).cuda()" 2>/dev/null || { echo "no CUDA device" >&2; exit 2; }
mkdir -p "$1"
{
    $python -c "import torch; print(torch.cuda.get_device_name(), torch.__version__)"
    $python -m pytest -q -m gpu tests
    $python experiments/bench.py step --rounds 2
    $python experiments/bench.py crf --rounds 2
    $python experiments/bench.py clip --rounds 2
} 2>&1 | tee "$1/gpu.txt"
