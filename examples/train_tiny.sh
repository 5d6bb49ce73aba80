#!/usr/bin/env bash
# loopus-tiny from nothing: base, recast, post-training, control and evaluation, with the commands a
# user has. About half an hour on two cores. `--publish` then replaces the embedded checkpoints.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1
runs=runs/tiny

python -m vllm_loopus.tiny.prepare --out $runs
vllm-loopus train configs/loopus-tiny-base.yaml
vllm-loopus recast $runs/base/model --out $runs/recast --encoder 0..0 --decoder 3..3 \
  --exit-threshold 0.95 --no-analysis
vllm-loopus train configs/loopus-tiny.yaml
vllm-loopus train configs/loopus-tiny-control.yaml
python -m vllm_loopus.tiny.evaluate --looped $runs/looped/model --plain base=$runs/base/model \
  --plain control=$runs/control/model --training $runs/looped --out $runs/report
if [ "${1:-}" = --publish ]; then
  python -m vllm_loopus.tiny.publish --runs $runs
  mkdir -p docs/loopus-tiny && cp $runs/report/* docs/loopus-tiny/
fi
