#!/usr/bin/env bash
# Checks on your GPUs what machines without one cannot: goldens, kernels, attention backends, planned memory, a step of
# training at true size, speed. Writes verify_gpu.json; send it with a report. Without a GPU the same keys are written.
#
#   bash scripts/verify_gpu.sh [--out FILE] [--only SECTION ...]
#
# VIDISTILL_VENV    where the environment lives (default .venv-gpu), with the extras dev and cuda
# VIDISTILL_TORCH   the torch to install (default torch, the newest CUDA build)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

venv="${VIDISTILL_VENV:-.venv-gpu}"
if command -v nvidia-smi >/dev/null; then
    make_environment "$venv" "${VIDISTILL_TORCH:-torch}" dev,cuda
else
    make_environment "$venv" "${VIDISTILL_TORCH:-torch}" dev
    export TRITON_INTERPRET=1
fi
exec "$venv/bin/python" scripts/verify_gpu.py "$@"
