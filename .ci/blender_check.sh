#!/bin/sh
# PairRM against llm-blender 0.0.2, which imports only beside transformers 4: an environment of its own, .venv-blender, which
# borrows torch and the like from .venv.
set -eu
cd "$(dirname "$0")/.."
python=.venv/bin/python
if [ ! -e .venv-blender/ready ]; then
    rm -rf .venv-blender
    "$python" -m venv .venv-blender
    site=$(.venv-blender/bin/python -c "import site; print(site.getsitepackages()[0])")
    "$python" -c "import site; print(site.getsitepackages()[0])" > "$site/zz_shared.pth"
    .venv-blender/bin/pip install -q --no-deps \
        "llm-blender==0.0.2" "transformers==4.57.6" "huggingface_hub==0.36.2" "tokenizers==0.22.2" \
        requests urllib3 charset_normalizer idna certifi dataclasses-json marshmallow typing_inspect mypy_extensions typing_extensions
    touch .venv-blender/ready
fi
PREFOPT_REQUIRE_BLENDER=1 "$python" -m pytest -q -s -m slow tests/models/test_pair_ranker.py
