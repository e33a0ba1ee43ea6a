#!/usr/bin/env bash
# The checks of one call, on the machine with the GPU:  bash tests/gpu/kit/run.sh 1|2
# SITE: where the packages lie, kept between the calls. OUT: where the figures go.
set -uo pipefail
cd "$(dirname "$0")/../../.." || exit 1
call=${1:?1 or 2}
export SITE=${SITE:-$HOME/grpo-ray-kit/site} OUT=${OUT:-$PWD/.kit/out} PYTHON=${PYTHON:-python3}
export KIT_MODELS=${KIT_MODELS:-$(dirname "$SITE")/models}
mkdir -p "$SITE" "$OUT" "$KIT_MODELS"
export PYTHONPATH=$SITE:$PWD PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0
export VLLM_ALLOW_INSECURE_SERIALIZATION=1 RAY_AUTH_MODE=disabled

tar -xJf ".kit/call-$call.tar.xz" -C "$SITE" || exit 1

# check SECONDS MODULE [ARGUMENTS]: a process of its own, ended when its time is over.
check() {
  local limit=$1 started=$SECONDS
  shift
  timeout -k 5 "$limit" "$PYTHON" -m "$@" >>"$OUT/call-$call.log" 2>&1
  local code=$?
  printf '{"check": "run", "of": "%s", "exit": %d, "seconds": %d}\n' "$*" "$code" "$((SECONDS - started))" | tee -a "$OUT/results.jsonl"
}

case $call in
  1)
    check 60 tests.gpu.kit.learner
    check 45 tests.gpu.kit.zero
    check 100 tests.gpu.kit.engine
    check 60 tests.gpu.kit.sampling vllm 256 2048
    check 40 tests.gpu.kit.sampling ours 512 16384
    check 40 tests.gpu.kit.sampling vllm 512 16384
    ;;
  2)
    check 100 pytest tests/gpu -m gpu -x -p no:cacheprovider
    check 130 tests.bench.gpu num_steps=5 rollout.enforce_eager=true rollout.gpu_memory_utilization=0.5 \
      learner.zero_stage=2 weights.bucket_mb=512 data.train.path=python:tests.gpu.kit.rows.rows data.train.args=null
    ;;
  *)
    echo "there are calls 1 and 2" >&2
    exit 2
    ;;
esac
