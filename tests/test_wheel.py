"""The built wheel: recipes, accelerate configs and every module are in it, and are found by name after an install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow

SCRIPT = """
import prefopt
from prefopt.recipes import locate, packaged_names, read_recipe
from prefopt.cli import arguments_of
print(prefopt.__file__)
print(locate("training_configs/llama3/wpo.yaml", "training_configs"))
print(locate("deepspeed_zero3", "accelerate_configs"))
print(sorted(packaged_names("accelerate_configs")) == sorted({accelerate!r}))
print(read_recipe(["mistral", "--beta", "0.02"], arguments_of("wpo")).values["beta"])
print(read_recipe(["gemma2/wpo_hb_qlora"], arguments_of("wpo")).values["lora_r"])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the working tree (a build leaves folders behind)."""
    copy = tmp_path_factory.mktemp("tree") / "prefopt"
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", "outputs", "runs", ".*_cache"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    target = tmp_path_factory.mktemp("dist")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--quiet",
        "-w",
        str(target),
        str(copy),
    ]
    subprocess.run(command, check=True, timeout=300)
    (built,) = target.glob("prefopt-*.whl")
    return built


def test_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("training_configs", "accelerate_configs"):
        ours = {
            f"prefopt/{folder}/{path.relative_to(ROOT / folder).as_posix()}"
            for path in (ROOT / folder).rglob("*.*")
            if path.suffix in (".yaml", ".json")
        }
        assert ours
        assert ours <= names
    modules = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "prefopt").rglob("*.py")}
    assert modules <= names
    assert "prefopt/py.typed" in names
    assert not any(name.startswith(("tests/", "scripts/")) for name in names)


def test_named_configs_after_install(wheel, tmp_path):
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, timeout=300)
    accelerate = [path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")]
    env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    code = SCRIPT.format(accelerate=accelerate)
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert all(line.startswith(str(site)) for line in lines[:3])
    assert lines[3:] == ["True", "0.02", "128"]
