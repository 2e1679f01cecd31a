"""docs/pipelines.md and docs/sppo.md: what they name exists, and their example runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from prefopt.cli import COMMANDS
from prefopt.losses import gpo_loss, sppo_hard_loss, sppo_loss, sppo_single_loss
from prefopt.pipelines.run import LOOPS, PipelineArguments
from prefopt.pipelines.self_play import Evaluation, SelfPlayLoop
from prefopt.recipes.source import packaged_names
from prefopt.trainers.sppo import SELF_PLAY_LOSSES

ROOT = Path(__file__).resolve().parents[2]
SPPO, PIPELINES = ((ROOT / "docs" / name).read_text() for name in ("sppo.md", "pipelines.md"))


def test_every_key_of_the_loop_is_described():
    named = set(re.findall(r"`(\w+)`", SPPO.split("The keys of this loop:")[1].split("**Between iterations**")[0]))
    assert set(SelfPlayLoop.__dataclass_fields__) | set(Evaluation.__dataclass_fields__) <= named
    own = set(PipelineArguments.__dataclass_fields__)
    assert {"pipeline", "run_dir", "launchers", "write_script"} <= own and all(
        key in PIPELINES for key in own - {"first", "last"}
    )
    assert all(f"`{name}`" in PIPELINES for name in LOOPS)


def test_every_loss_is_in_the_table():
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|", SPPO.split("| `loss_type` |")[1].split("\n\n")[0], re.M)
    assert {name: tuple(re.findall(r"`(\w+)`", columns)) for name, columns in rows} == {
        name: entry.columns for name, entry in SELF_PLAY_LOSSES.items()
    }
    assert all((sppo_loss, sppo_single_loss, sppo_hard_loss, gpo_loss))


def test_recipes_files_and_commands_exist():
    recipes = set(packaged_names("training_configs"))
    for text in (SPPO, PIPELINES):
        for name in re.findall(r"`?(pipelines/\w+)`? ", text):
            assert name in recipes or f"src/prefopt/{name}" in text, name
        for path in re.findall(r"(?:examples|benchmarks)/[\w./]+\.(?:py|sh|yaml|slurm)", text):
            assert (ROOT / path).exists(), path
        for line in re.findall(r"^    prefopt (.+?)(?:  +#.*)?$", text, re.M):
            assert shlex.split(line)[0] in COMMANDS
    for ranker in ("2b", "8b"):
        for model in ("llama3_8b", "gemma2_9b"):
            assert {f"pipelines/{loss}_gpm_{ranker}_{model}" for loss in ("sppo", "gpo")} <= recipes


def test_a_loop_of_ones_own(tmp_path, monkeypatch):
    """The example plans: its commands understand their words."""
    code = re.search(r"```python\n(.*?)```", PIPELINES, re.S)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi"}\n')
    (tmp_path / "rule.py").write_text("def score(prompt, candidates):\n    return [0.0] * len(candidates)\n")
    names: dict = {}
    exec(code[1].replace(".run()", ".plan()"), names)
    assert names["ranked"].needs == ("answers",) and names["ranked"].inputs == (Path("rule.py"),)
