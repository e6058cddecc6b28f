#!/usr/bin/env bash
# All that wants a GPU, in at most 8 minutes on one card. OUT/gpu.txt is what docs/results.md needs.
# Each part runs on its own; where one fails the others still run, and the exit code is 1.
#
#   make .venv/ready-tests && bash experiments/gpu.sh OUT
#   bash experiments/gpu.sh OUT --cpu --toy    # the same parts on a CPU, small: tries this script
set -u
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { echo "usage: bash experiments/gpu.sh OUT [--cpu --toy]" >&2; exit 2; }
out=$1 device=cuda photos="" steps="" bench="--rounds 2" failed=0
for flag in "${@:2}"; do
    case $flag in
        --cpu) device=cpu ;;
        --toy) photos="--train 40 --val 4" steps="--steps 8 --batch 4"
               bench="--rounds 1 --toy --batch 4" ;;
        *) echo "$flag: expected --cpu or --toy" >&2; exit 2 ;;
    esac
done
python=python
[ -x .venv/bin/python ] && python=.venv/bin/python
if [ $device = cuda ] && ! $python -c "import torch; torch.ones(1).cuda()" 2>/dev/null; then
    echo "no CUDA device; bash experiments/gpu.sh OUT --cpu --toy runs the same parts on a CPU" >&2
    exit 2
fi
bench="$bench --device $device" world=$out/world
common="--data $world/data --recipe toy --clip $world/clip.pt"
mkdir -p "$out"

part() {  # part TITLE FUNCTION ARGUMENTS: what it prints goes to the table, its stderr to a log
    local began=$SECONDS outcome=passed log="$out/${2}_${3:-}_${5:-}.log"
    "${@:2}" >"$out/part.txt" 2>"$log" || { outcome="FAILED, see $log"; failed=1; }
    { echo; echo "# $1: $outcome, $((SECONDS - began)) s"; cat "$out/part.txt"; } |
        tee -a "$out/gpu.txt"
}

quietly() { "$@" >&2; }

cams() {  # cams FOLDER DEVICE: matching, prompts, refinement from FOLDER/classify.pt; their CAMs
    local cam=$out/$1
    for phase in match prompts refine; do
        quietly $python train_cam.py $common --out "$cam" --device "$2" --phase $phase $steps ||
            return
    done
    for phase in match refine; do
        quietly $python train_cam.py $common --out "$cam" --device "$2" --phase export \
            --checkpoint "$cam/$phase.pt" --cams "$cam/cams_$phase" || return
        quietly $python eval.py --data "$world/data" --split train --cams "$cam/cams_$phase" \
            --json "$cam/$phase.json" || return
    done
}

compare() {  # compare TITLE KEY LIMIT FILE FILE: two figures of JSON files, and that they are close
    $python - "$@" <<'END'
import json, sys
title, key, limit, *paths = sys.argv[1:]
a, b = (json.loads(open(path).read().strip().splitlines()[-1] if path.endswith("l") else
                   open(path).read())[key] for path in paths)
print(f"{title}: {a:.5g} and {b:.5g}")
sys.exit(abs(a - b) > float(limit))
END
}

tests() { $python -m pytest -q -m gpu tests | tail -1; }
benchmark() { $python experiments/bench.py "$1" $bench "${@:2}"; }

train_like_cpu() {
    mkdir -p "$out/gpu" && cp "$out/cpu/classify.pt" "$out/gpu" && cams gpu $device &&
    compare "mIoU of matching, CPU and $device" miou 1 "$out"/{cpu,gpu}/match.json &&
    compare "mIoU of refinement, CPU and $device" miou 1 "$out"/{cpu,gpu}/refine.json &&
    tail -1 "$out/gpu/refine.jsonl"
}

match_30() {  # match_30 FOLDER DEVICE COMMAND: 30 steps of matching in float32
    mkdir -p "$out/$1" && cp "$out/cpu/classify.pt" "$out/$1" &&
        quietly "${@:3}" train_cam.py $common --out "$out/$1" --device "$2" --phase match \
            --steps 30 --batch 8 --precision float32 --workers 0 --resume
}

one_process_group() {
    match_30 alone $device $python &&
    match_30 group $device $python -m torch.distributed.run --standalone --nproc-per-node 1 &&
    compare "loss after 30 steps, alone and in a group" loss 0.02 "$out"/{alone,group}/match.jsonl
}

resume() {
    match_30 resumed cpu $python & local child=$!
    for _ in $(seq 600); do [ -f "$out/resumed/match.part" ] && break; sleep 0.1; done
    pkill -KILL -P $child; kill -KILL $child; wait $child
    [ -f "$out/resumed/match.part" ] && [ ! -f "$out/resumed/match.pt" ] || return
    match_30 resumed $device $python &&
    compare "loss after 30 steps, alone and resumed" loss 0.02 "$out"/{alone,resumed}/match.jsonl
}

prepare() {
    quietly $python prepare/toy.py --out "$world" $photos &&
    quietly $python train_cam.py $common --out "$out/cpu" --device cpu --phase classify \
        --vit "$world/vit.pth" $steps && cams cpu cpu
}

$python - <<'END' | tee "$out/gpu.txt"
import torch
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}")
END
git log -1 --format="commit %h" 2>/dev/null | tee -a "$out/gpu.txt"
part "tests that are marked gpu" tests
for precision in bfloat16 float16 float32; do
    part "a step at VOC's size" benchmark step --precision $precision
done
part "dense CRF" benchmark crf
part "CLIP" benchmark clip
part "the toy world's chain on the CPU" prepare
part "matching and refinement as on the CPU" train_like_cpu
part "one process in a process group" one_process_group
part "a run of the CPU goes on" resume
echo; echo "written to $out/gpu.txt"
exit $failed
