#!/usr/bin/env bash
# Everything that the project needs, into .venv, from the lock files. `make` calls it when something is missing or newer.
#   install.sh packages   stops before the project itself: a layer of docker/Dockerfile
#   install.sh python     stops when .venv is there
#   PYTHON=/path/to/it    instead of looking for Python 3.11, 3.12 or 3.13, and for uv's own where there is none
#   GRPO_RAY_GPU=yes|no   instead of looking for a GPU
set -euo pipefail
cd "$(dirname "$0")/.."
stop() { echo "grpo-ray set-up: $*" >&2; exit 1; }

# What is missing is said at once, before anything is downloaded.
suits='import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v <= (3, 13))'
python="" without_venv=""
candidates=(python3.11 python3.12 python3.13 python3 python); [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
for candidate in "${candidates[@]}"; do
    "$candidate" -c "$suits" 2>/dev/null || continue
    if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then python=$candidate; break; fi
    without_venv=${without_venv:-$candidate}
done
[ -n "$python" ] || [ -z "${PYTHON:-}" ] || stop "PYTHON=$PYTHON is no Python 3.11, 3.12 or 3.13 with venv and ensurepip (Debian, Ubuntu: apt-get install python3-venv); name another, or none: then uv brings its own"
[ ! -x .venv/bin/python ] || .venv/bin/python -c "$suits" 2>/dev/null || stop "the .venv here is of $(.venv/bin/python --version 2>&1 || echo "a Python that does not run"), not of Python 3.11, 3.12 or 3.13; remove it (rm -rf .venv) and call make again"
case ${GRPO_RAY_GPU:-no} in yes|no) ;; *) stop "GRPO_RAY_GPU=$GRPO_RAY_GPU: yes or no is meant, or nothing: then a GPU is looked for";; esac
uv_version=0.13.9
command -v g++ >/dev/null || command -v c++ >/dev/null || stop "no C++ compiler; install g++ (Debian: apt-get install g++ python3-dev), DeepSpeed builds with it"
# The rewards `code` and `reasoning_gym` run in a sandbox of bubblewrap and libseccomp; nothing else needs them.
if ! command -v bwrap >/dev/null; then
    apt=(apt-get install -qq -y --no-install-recommends bubblewrap libseccomp2)
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && { "${apt[@]}" || { apt-get update -qq && "${apt[@]}"; }; } >/dev/null 2>&1 ||
        echo "grpo-ray set-up: bubblewrap is not here and can't be installed: the rewards \`code\` and \`reasoning_gym\`, and their tests, need it (Debian: apt-get install bubblewrap libseccomp2)" >&2
fi
gpu=${GRPO_RAY_GPU:-no}; if [ -z "${GRPO_RAY_GPU:-}" ] && command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then gpu=yes; fi
# CUDA 13, which torch is built for, asks for this driver; a machine that only builds an image has none.
need_driver=580
if [ $gpu = yes ] && command -v nvidia-smi >/dev/null; then
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | sed -n 1p || true)
    case ${driver%%.*} in
        ""|*[!0-9]*) ;;
        *) [ "${driver%%.*}" -ge $need_driver ] || stop "the NVIDIA driver here is $driver, and torch for CUDA 13 needs $need_driver or newer; update it, or set GRPO_RAY_GPU=no for the CPU stack";;
    esac
fi
need_gb=6; size="1.5 GB"
[ $gpu = no ] || { need_gb=16; size="9 GB, of which 4 are downloaded"; }
free_gb=$(df -Pk . | awk 'NR==2 {print int($4 / 1048576)}')
[ "$free_gb" -ge $need_gb ] || stop "$free_gb GB free on this disk, $need_gb GB are needed for the packages"

lock="lock-cpu.txt"; [ "$gpu" = yes ] && lock="lock-gpu.txt"
echo "grpo-ray set-up: $( [ $gpu = yes ] && echo 'vLLM for GPUs' || echo 'no GPU found: the CPU stack' ), packages of $lock into .venv (a few minutes the first time)"
if [ ! -x .venv/bin/python ] && [ -n "$python" ]; then
    "$python" -m venv .venv
elif [ ! -x .venv/bin/python ]; then
    here="no Python 3.11, 3.12 or 3.13 was found"; [ -z "$without_venv" ] || here="$without_venv has no venv (Debian, Ubuntu: apt-get install python3-venv)"
    echo "  $here: uv brings a Python 3.11 of its own (30 MB, from GitHub, into $( uv python dir 2>/dev/null || echo "${HOME:-~}/.local/share/uv/python" )); to avoid that, install one and call make again, or name it: make PYTHON=/path/to/python3.12"
    uv=$(command -v uv || true)
    if [ -z "$uv" ]; then
        uv=.uv/uv
        script=https://astral.sh/uv/$uv_version/install.sh
        { curl -LsSf "$script" || wget -qO- "$script"; } 2>/dev/null | env UV_UNMANAGED_INSTALL="$PWD/.uv" sh >/dev/null 2>&1 || true
        [ -x $uv ] || stop "uv is not here and could not be had from $script; install a Python 3.11, 3.12 or 3.13 with venv, or uv, and call make again"
    fi
    "$uv" venv -q --seed --managed-python --python 3.11 .venv || stop "uv could not bring its Python (see above); install a Python 3.11, 3.12 or 3.13 with venv and call make again"
fi
[ "${1:-}" != python ] || exit 0
.venv/bin/python -m pip --version >/dev/null 2>&1 || stop "the .venv here is broken; remove it (rm -rf .venv) and call make again"
echo "  1/4 uv, the installer"
.venv/bin/python -m pip install -q --disable-pip-version-check "uv==$uv_version"

# uv does not read pip's find-links; a wheel of torch for CPUs may lie there.
links=${PIP_FIND_LINKS:-$(.venv/bin/python -m pip config get global.find-links 2>/dev/null || true)}
[ -z "$links" ] || export UV_FIND_LINKS=${UV_FIND_LINKS:-$(echo $links | tr ' ' ',')}
install() { .venv/bin/uv pip install --python .venv/bin/python --no-deps --link-mode "${UV_LINK_MODE:-hardlink}" "$@"; }

if [ $gpu = no ]; then
    # A local version is not on the general index: what is configured here first, PyTorch's own index of CPU builds second.
    echo "  2/4 torch for CPUs (200 MB)"
    torch=$(grep '^torch==' $lock)
    install -q "$torch" 2>/dev/null || install -q --index-url https://download.pytorch.org/whl/cpu "$torch" ||
        stop "$torch was found neither in the configured indexes nor at download.pytorch.org"
fi
echo "  3/4 $(grep -c == $lock) packages, vLLM, Ray, DeepSpeed and Transformers among them ($size)"
install -q -r $lock || stop "some packages of $lock could not be installed (see above); call make again to go on"
[ "${1:-}" != packages ] || exit 0
echo "  4/4 this project, and a first import of everything"
install -q --no-build-isolation -e .
# Imported once with bytecode written, whatever the environment says of it: else every process of every run compiles vLLM
# and torch anew, which takes longer than all the rest of its start.
warm() {
    env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -W ignore -c "import $1" >.venv/import-"$2".log 2>&1 ||
        stop "$2 does not import; .venv/import-$2.log says why"
}
engine="vllm.v1.engine.async_llm, vllm.v1.engine.core, actors.weights.backend"
if [ $gpu = yes ]; then
    engine="$engine, vllm.v1.worker.gpu_worker, vllm.v1.worker.gpu.sample.sampler, vllm.v1.attention.backends.flashinfer, flashinfer"
else
    engine="$engine, vllm.v1.worker.cpu_worker"
fi
warm "$engine" vllm &
warm "deepspeed, datasets, reasoning_gym, math_verify, transformers.models.qwen2, actors.control.controller, actors.learner.actor, launch.run.follow" deepspeed
wait $!
touch .venv/.ready
