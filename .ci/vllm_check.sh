#!/usr/bin/env bash
# The real vLLM on the CPU, offline engine and server, against the transformers backend.
set -euo pipefail
cd "$(dirname "$0")/.."
.ci/vllm_env.sh
VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -q -s -m slow tests/candidates/test_vllm.py
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -s -m slow tests/pipelines/test_sppo_loop.py -k vllm
