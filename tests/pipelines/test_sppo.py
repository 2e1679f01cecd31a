"""The self-play loop's plan: recipes, shares of prompts, what depends on what, launchers, scripts, mistakes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from prefopt import cli
from prefopt.files import write_json
from prefopt.pipelines.commands import Commands
from prefopt.pipelines.run import read_pipeline
from prefopt.pipelines.self_play import stages_of, stop_after
from prefopt.pipelines.state import RunLock
from prefopt.recipes.recipe import load_settings
from prefopt.recipes.source import locate, packaged_names

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "examples" / "self_play" / "recipe.yaml"
PIPELINES = [name for name in packaged_names("training_configs") if name.startswith("pipelines/")]
SELF_PLAY = [name for name in PIPELINES if not name.startswith("pipelines/adversarial")]


def plan(*words, recipe=TOY):
    """The stages by name, and the loop."""
    arguments, loop, _ = read_pipeline(*load_settings([str(recipe), *words]))
    return {
        stage.name: stage for stage in stages_of(loop, Commands(Path(arguments.run_dir), arguments.launchers))
    }, loop


def keys(stage):
    """What is typed, by key."""
    return dict(word[2:].split("=", 1) for word in stage.command if word.startswith("--"))


# ---- recipes


@pytest.mark.parametrize("name", SELF_PLAY)
def test_every_recipe_makes_a_plan(name):
    """Every command understands its words; the papers' three iterations, five samples, one epoch, batch of 64."""
    stages, loop = plan(recipe=name)
    assert loop.num_iterations == 3 and loop.reference == "previous"
    train = stages["iteration-3/train"]
    assert train.settings["global_batch_size"] == 64 and train.settings["num_train_epochs"] == 1
    assert (
        train.settings["beta"] == 0.001
        and train.settings["learning_rate"] == 5e-7
        and train.settings["optim"] == "rmsprop"
    )
    assert train.settings["model_name_or_path"] == "RUN/iteration-2/train"
    generate = keys(stages["iteration-3/generate"])
    assert (generate["num_samples"], generate["temperature"], generate["top_p"], generate["max_new_tokens"]) == (
        "5",
        "0.7",
        "0.9",
        "2048",
    )
    assert generate["prompts"] == "UCLA-AGI/data-mistral-7b-instruct-sppo-iter3"
    selection = stages["iteration-1/build-pairs"].settings
    expected = {"gpo": "gpo", "sppo": "sppo_paper"}
    if "gpm" in name:
        assert keys(stages["iteration-1/rank"])["ranker"] == "general-preference"
        assert selection["temperature"] == 0.5  # T_ij - T_ji, twice the logit
        expected["sppo"] = "sppo_mean_logit"
        assert keys(stages["iteration-1/rank"])["released_format"] == "fork"
        assert keys(stages["iteration-1/rank"])["policy_template"] == loop.model_name_or_path
        assert selection["keep"] == ["empty", "duplicate", "length"]
    else:
        assert keys(stages["iteration-1/rank"])["policy_template"] == loop.model_name_or_path
    loss = train.settings["loss_type"][0]
    assert selection["policy"] == expected[loss] and name.startswith(f"pipelines/{loss}")
    assert train.settings.get("max_target") == (1000.0 if loss == "gpo" else None)


def test_every_value_of_a_recipe_has_its_source():
    for name in SELF_PLAY:
        path = locate(name, "training_configs")
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if (
                ":" in line
                and not line.startswith("#")
                and not line.rstrip().endswith(":")
                and not line.startswith(("base_recipe", "pipeline:", "run_dir"))
            ):
                known = "published" in line or "ours" in line or line.strip().startswith(("- path", "method"))
                assert known, f"{path}:{number}: {line}"


# ---- the plan


def test_an_iteration_is_these_stages_in_this_order():
    stages, _ = plan("--num_iterations=2")
    parts = ["generate", "rank", "build-pairs", "train", "answers", "evaluate", "report"]
    assert list(stages) == [f"base/{part}" for part in ("answers", "rank", "build-pairs")] + [
        f"iteration-{t}/{part}" for t in (1, 2) for part in parts
    ]
    tools = [stage.command[1] for stage in list(stages.values())[3:10]]
    assert tools == ["generate", "rank", "build-pairs", "sppo", "generate", "evaluate", "report"]
    assert stages["iteration-2/generate"].needs == ("iteration-1/train",)
    assert set(stages["iteration-2/train"].needs) == {"iteration-2/build-pairs", "iteration-1/train"}
    assert set(stages["iteration-2/evaluate"].needs) == {
        "iteration-2/answers",
        "base/answers",
        "iteration-1/answers",
        "iteration-2/train",
        "base/build-pairs",
    }


def test_one_source_is_shared_out_in_parts_that_meet():
    stages, _ = plan()
    splits = [keys(stages[f"iteration-{t}/generate"])["prompts_split"] for t in (1, 2, 3)]
    assert splits == ["train[0%:33%]", "train[33%:67%]", "train[67%:100%]"]
    assert [keys(stages[f"iteration-{t}/generate"])["seed"] for t in (1, 2, 3)] == ["1", "2", "3"]
    again, _ = plan("--reuse_prompts=true")
    assert keys(again["iteration-2/generate"])["prompts_split"] == "train"


def test_the_reference_may_be_the_base_or_scored_before():
    assert "ref_model_name_or_path" not in keys(plan()[0]["iteration-2/train"])
    stages, loop = plan("--reference=base")
    assert "ref_model_name_or_path" not in keys(stages["iteration-1/train"])
    assert keys(stages["iteration-2/train"])["ref_model_name_or_path"] == loop.model_name_or_path
    stages, _ = plan("--precompute_references=true")
    scores, train = stages["iteration-2/score-references"], stages["iteration-2/train"]
    assert scores.command[1] == "score-references" and keys(scores)["method"] == "sppo"
    assert (
        keys(train)["ref_logps_dir"] == keys(scores)["output_dir"]
        and keys(train)["precompute_ref_log_probs"] == "true"
    )
    assert scores.name in train.needs


@pytest.mark.parametrize(
    ("words", "method", "policy"),
    [
        ([], "sppo", "sppo"),
        (["--training.loss_type=gpo"], "sppo", "gpo"),
        (["--training.loss_type=sppo_hard"], "sppo", "best_worst"),
        (["--training.method=dpo", "--training.loss_type=sigmoid"], "dpo", "best_worst"),
        (["--training.method=wpo", "--training.loss_type=hinge", "--selection.policy=wpo_v2"], "wpo", "wpo_v2"),
    ],
)
def test_pairs_follow_from_the_loss(words, method, policy):
    stages, _ = plan(*words)
    assert stages["iteration-1/train"].command[1] == method
    assert keys(stages["iteration-1/build-pairs"])["policy"] == policy


def test_the_loss_may_be_in_the_trainings_recipe(tmp_path):
    """A recipe for GPO, and nothing said in the pipeline: the pairs have scores."""
    (tmp_path / "gpo.yaml").write_text("method: sppo\nloss_type: gpo\nbeta: 1.0\n")
    values = yaml.safe_load(TOY.read_text())
    del values["training"]["loss_type"], values["training"]["beta"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    stages, _ = plan(f"--training.recipe={tmp_path / 'gpo.yaml'}", recipe=tmp_path / "recipe.yaml")
    assert keys(stages["iteration-1/build-pairs"])["policy"] == "gpo"
    assert stages["iteration-1/train"].settings["loss_type"] == ["gpo"]


def test_held_out_prompts_may_be_another_slice():
    sources = "[{path: a, split: 'train[:90]'}, {path: a, split: 'train[90:180]'}]"
    held_out = ["--evaluation.prompts.path=a", "--evaluation.prompts.split=train[180:]"]
    stages, _ = plan("--num_iterations=2", f"--prompts={sources}", *held_out)
    assert keys(stages["base/answers"])["prompts_split"] == "train[180:]"


def test_held_out_answers_are_the_policys_alone():
    """Responses that a dataset has join the pairs (the hybrid setting), but are no answers of the measured policy."""
    stages, _ = plan("--sampling.off_policy_columns=[chosen]")
    assert keys(stages["iteration-1/generate"])["off_policy_columns"] == '["chosen"]'
    assert "off_policy_columns" not in {**keys(stages["base/answers"]), **keys(stages["iteration-1/answers"])}


def test_settings_with_a_dot_reach_their_stage_and_only_it():
    before, _ = plan()
    after, loop = plan(
        "--training.beta", "0.5", "--evaluation.sampling.temperature", "0.3", "--sampling.num_samples=7"
    )
    assert loop.training["beta"] == 0.5 and loop.evaluation.sampling == {"temperature": 0.3}
    changed = {name for name in before if before[name].settings != after[name].settings}
    assert changed == {f"iteration-{t}/{part}" for t in (1, 2, 3) for part in ("train", "generate", "answers")} | {
        "base/answers"
    }


def test_processes_ports_and_logging_decide_no_result():
    before, _ = plan()
    after, _ = plan(
        "--training.num_processes=2",
        "--training.logging_steps=1",
        "--ranking.num_processes=2",
        "--sampling.batch_size=4",
    )
    changed = {name.split("/")[1] for name in before if before[name].settings != after[name].settings}
    assert changed == {"generate", "answers"}  # a batch shares one random stream
    assert (
        "--num_processes=2" in after["iteration-1/train"].command
        and "--num_processes=2" in after["iteration-1/evaluate"].command
    )


def test_how_fast_the_ranker_works_decides_no_result():
    model = ("--ranking.ranker=general-preference", "--ranking.model_name_or_path=some/model")
    slow, fast = (plan(*model, f"--ranking.tokens_per_batch={tokens}")[0] for tokens in (1024, 4096))
    assert {name: stage.settings for name, stage in slow.items()} == {
        name: stage.settings for name, stage in fast.items()
    }
    assert '"tokens_per_batch": 4096' in keys(fast["iteration-1/evaluate"])["ranker_settings"]


def test_a_run_may_be_moved():
    here, _ = plan("--run_dir=/somewhere/run")
    there, _ = plan("--run_dir=/elsewhere/run")
    assert {name: stage.settings for name, stage in here.items()} == {
        name: stage.settings for name, stage in there.items()
    }


def test_kinds_of_stages_may_have_launchers_of_their_own():
    stages, _ = plan('--launchers={"generate": ".venv-vllm/bin/python -m prefopt", "train": "srun -N 4 node.sh"}')
    assert stages["iteration-2/generate"].command[:4] == (".venv-vllm/bin/python", "-m", "prefopt", "generate")
    assert stages["iteration-2/train"].command[:5] == ("srun", "-N", "4", "node.sh", "sppo")
    assert stages["iteration-2/rank"].command[:2] == ("prefopt", "rank")
    assert stages["iteration-2/generate"].settings == plan()[0]["iteration-2/generate"].settings


def test_models_are_pushed_last_and_only_when_asked():
    assert not any(name.startswith("push") for name in plan()[0])
    stages, _ = plan("--push_to_hub=true", "--hub_model_id=me/toy")
    assert list(stages)[-3:] == [f"push/iteration-{t}" for t in (1, 2, 3)]
    assert stages["push/iteration-2"].command[:3] == ("hf", "upload", "me/toy-iter2")
    assert all(stage.at_end == stage.name.startswith("push/") for stage in stages.values())  # after an early end, too
    assert all(keys(stages[f"iteration-{t}/train"])["push_to_hub"] == "false" for t in (1, 2, 3))


def test_the_rule_of_an_evaluation_ends_the_loop_after_its_report(tmp_path):
    stages, _ = plan(f"--run_dir={tmp_path}", "--evaluation.min_win_rate=0.55")
    assert keys(stages["iteration-2/evaluate"])["min_win_rate"] == "0.55"
    for number, reason in ((1, None), (2, "the win rate against previous is 0.510, below 0.55")):
        write_json(tmp_path / f"iteration-{number}" / "evaluate" / "evaluation.json", {"stop": reason})
    assert [stop_after(stages[name], tmp_path) for name in ("iteration-1/report", "iteration-2/evaluate")] == [
        None,
        None,
    ]
    assert stop_after(stages["iteration-2/report"], tmp_path) == "the win rate against previous is 0.510, below 0.55"


# ---- the command


def test_a_dry_run_shows_the_commands_and_writes_nothing(tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert cli.main(["pipeline", str(TOY), f"--run_dir={run_dir}", "--until", "iteration-1", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "iteration-1/report" in shown and "iteration-2" not in shown and "not done yet" in shown
    assert f"prefopt build-pairs --candidates={run_dir}/iteration-1/rank" in shown
    assert not run_dir.exists()


def test_the_script_holds_every_command(tmp_path):
    script = tmp_path / "plan.sh"
    assert cli.main(["pipeline", str(TOY), f"--run_dir={tmp_path / 'run'}", f"--write_script={script}"]) == 0
    lines = script.read_text().splitlines()
    stages, _ = plan(f"--run_dir={tmp_path / 'run'}")
    commands = [tuple(shlex.split(line)) for line in lines if line and not line.startswith(("#", "set"))]
    assert commands == [stage.command for stage in stages.values()] and "set -euo pipefail" in lines
    assert script.stat().st_mode & 0o100 and not (tmp_path / "run").exists()
    part = ["--from=iteration-2/train", "--until=iteration-3/rank"]
    assert cli.main(["pipeline", str(TOY), f"--run_dir={tmp_path / 'run'}", f"--write_script={script}", *part]) == 0
    names = [line[2:].split()[0] for line in script.read_text().splitlines() if line.startswith("# iteration")]
    assert names == list(stages)[list(stages).index("iteration-2/train") : list(stages).index("iteration-3/rank") + 1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--training.bta=1"], "iteration-1/train: the command line: unknown key 'bta'; did you mean 'beta'?"),
        (["--training.method=spo"], "unknown method 'spo'; did you mean 'sppo'?"),
        (["--sampling.temperature=-1"], "base/answers: "),
        (["--selection.policy=worst"], "build-pairs: .*expected one of"),
        (["--ranking.ranker=pairrm"], "rank: .*did you mean 'pair-rm'|expected one of"),
        (["--sampling.output_dir=x"], "sampling: output_dir is set by the loop; leave it out"),
        (["--num_processes=8"], "num_processes belongs to one kind of stage: write training.num_processes"),
        (["--launchers={trian: x}"], "unknown kind of stage 'trian'; did you mean 'train'"),
        (["--num_iterations=0"], "num_iterations is 0; it must be at least 1"),
        (["--reference=old"], "reference must be|expected one of"),
        (["--reference=base", "--precompute_references=true"], "precompute_references scores the policy's own start"),
        (["--prompts=[{path: a}, {path: b}]"], "prompts has 2 sources for 3 iterations"),
        (["--prompts=[{path: a, split: 'train[:10]'}]"], "is a slice, which cannot be shared out"),
        (["--push_to_hub=true"], "push_to_hub and hub_model_id belong together"),
        (["--training.push_to_hub=true"], "training: the loop pushes its models at its end"),
        (["--sampling.push_to_hub=true", "--sampling.hub_dataset_id=me/x"], "sampling: the loop pushes its models"),
        (["--evaluation.sampling.num_samples=1"], "evaluation: sampling: num_samples is set by the loop"),
        (["--evaluation.sampling={model_name_or_path: other}"], "evaluation: sampling: model_name_or_path is set by"),
        (["--evaluation.prompts.split=train"], "the split 'train' of outputs/self-play-start/prompts is trained on"),
        (
            ["--evaluation.prompts.split=train[:9]"],
            "the split 'train.:9.' of outputs/self-play-start/prompts is trained",
        ),
        (["--evaluation.min_win_rate=55"], "min_win_rate is 55.0; it must be at most 1"),
        (["--training.loss_type=sigmoid"], "iteration-1/train: Unknown loss_type 'sigmoid' for SPPOTrainer"),
        (["--training.max_target=5"], "iteration-1/train: `max_target`"),
        (["--training.max_length=64", "--training.max_prompt_length=64"], "iteration-1/train: `max_prompt_length`"),
        (["--training.padding_side=left"], "iteration-1/train"),
        (["--training.method=reward-model"], "training: reward-model trains no policy on pairs"),
        (["--training.global_batch_size=64", "--training.num_processes=6"], "train: global_batch_size 64 cannot be"),
        (
            ["--selection.policy=best_worst"],
            "reads chosen_win_prob and rejected_win_prob, which the policy 'best_worst'",
        ),
        (["--training.loss_type=gpo", "--selection.policy=sppo"], "reads chosen_score and rejected_score, which"),
        (["--from=iteration-9", "--dry_run"], "--from iteration-9: there is no such stage"),
        (["--pipeline=selfplay"], "unknown pipeline 'selfplay'; did you mean 'self-play'"),
        (["--seed.x=1"], "what is before 'x' is no mapping"),
        (["--seed=-1"], "seed is -1; it must be at least 0"),
        (["--pipeline", "self-play", "x"], r"pipeline: expected one name, found \['self-play', 'x'\]"),
        (["--pipeline"], "--pipeline needs a value"),
        (["--from"], "--from needs a value"),
        (["--training.beta", "@x"], "the command line: training.beta: .*not valid YAML"),
        (["--training.beta=[1"], "the command line: training.beta: .*not valid YAML"),
        (["--training.method=[a]"], r"method: expected the name of a training method, found \['a'\]"),
        (["--training.recipe=5"], "iteration-1/train: recipe: expected the name or path of a recipe, found 5"),
        (["--training.num_processes=two"], "iteration-1/train: --num_processes must be a whole number, found 'two'"),
        (["--ranking.num_processes=0"], "base/rank: --num_processes must be at least 1"),
        (["--training.accelerate_config=nope"], "iteration-1/train: nope is neither a file nor one of the packaged"),
        (["--ranking.model_name_or_path=[a]"], r"base/rank: expected a name or a path, found \['a'\]"),
        (["--launchers={train: 'a \"b'}"], "launchers: train: .* is no command line"),
        (["--launchers={train: ''}"], "launchers: train: '' is no command line"),
        (["--write_script=/"], "write_script / is a folder; name a file"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_before_anything_starts(tmp_path, capsys, words, said):
    run_dir = tmp_path / "run"
    assert cli.main(["pipeline", str(TOY), f"--run_dir={run_dir}", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(said, error), error
    assert not run_dir.exists()


def test_a_refused_run_changes_nothing_in_the_folder(tmp_path, capsys):
    """Neither where another runner is at work, nor where the folder holds what no run has made."""
    (tmp_path / "pipeline.yaml").write_text("the other's")
    with RunLock(tmp_path).held():
        assert cli.main(["pipeline", str(TOY), f"--run_dir={tmp_path}"]) == 2
    assert "another runner is at work" in capsys.readouterr().err
    (tmp_path / "base" / "answers").mkdir(parents=True)
    (tmp_path / "base" / "answers" / "precious").touch()
    assert cli.main(["pipeline", str(TOY), f"--run_dir={tmp_path}"]) == 2
    assert "this run has not made it" in capsys.readouterr().err
    assert (tmp_path / "pipeline.yaml").read_text() == "the other's"


def test_a_pipeline_needs_its_kind_and_a_folder(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    for drop, said in (
        ("pipeline", "pipeline is missing"),
        ("run_dir", "run_dir is missing"),
        ("prompts", "prompts is missing"),
        ("model_name_or_path", "model_name_or_path is missing"),
    ):
        values = yaml.safe_load(TOY.read_text())
        del values[drop]
        recipe.write_text(yaml.safe_dump(values))
        assert cli.main(["pipeline", str(recipe), "--dry_run"]) == 2
        assert said in capsys.readouterr().err


def test_secrets_are_in_no_file_of_a_run_and_decide_no_result(tmp_path, capsys):
    secrets = ["--training.hub_token=quiteSecret", '--training.model_init_kwargs={"token": "otherSecret"}']
    run_dir, script = tmp_path / "run", tmp_path / "plan.sh"
    words = ["pipeline", str(TOY), f"--run_dir={run_dir}", f"--write_script={script}", "--dry_run", *secrets]
    assert cli.main(words) == 0
    arguments, loop, resolved = read_pipeline(*load_settings(words[1:]))
    stages = {stage.name: stage for stage in stages_of(loop, Commands(run_dir, arguments.launchers))}
    assert "--hub_token=quiteSecret" in stages["iteration-1/train"].command
    written = capsys.readouterr().out + script.read_text() + resolved + str([s.settings for s in stages.values()])
    assert "quiteSecret" not in written and "otherSecret" not in written
    assert "*** stands for a secret" in script.read_text()
    before, _ = plan(f"--run_dir={run_dir}", "--training.model_init_kwargs={}")
    assert before["iteration-1/train"].settings == stages["iteration-1/train"].settings
