#!/usr/bin/env bash
# There: bash .gpu/run.sh [options of run.py]; results are in $OUT/results.jsonl.
#   LOOPUS_SECONDS=150   seconds of this call (560)
#   LOOPUS_WORK=FOLDER   where everything is unpacked (/tmp/loopus-device)
#   LOOPUS_OWN_VLLM=1    uses the vLLM that is installed there, and installs nothing
# A results.jsonl beside this file is what earlier calls found: what passed there is not repeated.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${LOOPUS_WORK:-/tmp/loopus-device}
mkdir -p "$work"
if ! cmp -s "$here/archive.sha256" "$work/archive.sha256"; then
  (cd "$here" && sha256sum --quiet -c archive.sha256)
  tar -xzf "$here/archive.tgz" -C "$work"
  if [ -z "${LOOPUS_OWN_VLLM:-}" ] && ls "$work"/wheels/*.whl > /dev/null 2>&1; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
      --target "$work/wheels/installed" "$work"/wheels/*.whl
  fi
  cp "$here/archive.sha256" "$work/"
fi
path="$work/repository"
[ -n "${LOOPUS_OWN_VLLM:-}" ] || path="$work/vllm:$path:$work/wheels/installed"
export PYTHONPATH="$path${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec python3 "$work/repository/benchmarks/device/run.py" --out "${OUT:-$work/out}" \
  --earlier "$here/results.jsonl" \
  --seconds $((${LOOPUS_SECONDS:-560} - SECONDS)) "$@"
