"""The adversarial loop: its stages, its checks, and (slow) an iteration of a game with a known reward."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import yaml

from benchmarks.study import world
from prefopt.candidates.records import read_records
from prefopt.cli import main
from prefopt.files import read_json, read_jsonl, write_jsonl
from prefopt.memory import Launch
from prefopt.pipelines.adversarial import AdversarialLoop, check_data, stages_of
from prefopt.pipelines.commands import Commands
from prefopt.pipelines.run import read_pipeline
from prefopt.pipelines.stages import Runner
from prefopt.recipes import locate, packaged_names
from prefopt.recipes.recipe import load_settings
from tests.tiny import tiny_tokenizer

RUN = Path("/runs/a")
CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none"}


def write_data(folder: Path, **changed: list[dict]) -> dict[str, str]:
    """Small sets of every kind; returns the keys of the loop that name them."""

    def prompts(name: str, count: int) -> list[dict]:
        return [{"prompt_id": f"{name}{n}", "prompt": f"{name} number {n}"} for n in range(count)]

    def pairs(name: str, count: int) -> list[dict]:
        return [{"prompt": f"{name} number {n}", "chosen": "yes", "rejected": "no"} for n in range(count)]

    rows = {
        "reward_prompts": [{**row, "golden": "gold"} for row in prompts("reward", 3)],
        "comparisons": pairs("reward", 4),
        "policy_prompts": prompts("policy", 3),
        "test_prompts": prompts("test", 3),
        "testing_comparisons": [*pairs("reward", 2), *pairs("policy", 2)],
    } | changed
    for name, content in rows.items():
        write_jsonl(folder / f"{name}.jsonl", content)
    return {name: str(folder / f"{name}.jsonl") for name in rows}


def make_loop(folder: Path, **changed) -> AdversarialLoop:
    return AdversarialLoop(
        **{
            "model_name_or_path": "policy",
            "reward_model_name_or_path": "backbone",
            **({} if "comparisons" in changed else write_data(folder)),
            **changed,
        }
    )


def plan(folder: Path, **changed) -> dict:
    stages = stages_of(make_loop(folder, **changed), Commands(RUN, {}))
    Runner(stages, folder / "run").plan()  # in order, folders apart
    return {stage.name: stage for stage in stages}


ITERATION = ["generate", "rank", "build-pairs", "train", "answers", "evaluate", "report"]
REWARD = ["reward-generate", "reward-rows", "reward-train"]


def test_the_stages_of_a_loop(tmp_path):
    stages = plan(tmp_path, num_iterations=2)
    assert list(stages) == [
        "testing/reward-train",
        "base/answers",
        *(f"iteration-{n}/{part}" for n in (1, 2) for part in (*REWARD, *ITERATION)),
    ]
    # the reward model starts anew, against the policy of now, and the policy goes on
    assert "--model_name_or_path=backbone" in stages["iteration-2/reward-train"].command
    assert f"--model_name_or_path={RUN}/iteration-1/train" in stages["iteration-2/reward-generate"].command
    assert f"--model_name_or_path={RUN}/iteration-1/train" in stages["iteration-2/train"].command
    assert f"--model_name_or_path={RUN}/iteration-2/reward-train" in stages["iteration-2/rank"].command
    assert stages["iteration-2/rank"].needs == ("iteration-2/generate", "iteration-2/reward-train")
    assert stages["iteration-2/reward-rows"].needs == ("iteration-2/reward-generate",)
    # another model evaluates than the one that trains
    assert f"--ranker_model={RUN}/testing/reward-train" in stages["iteration-2/evaluate"].command


def test_adversarial_rows_go_to_the_trainer_that_weighs_them(tmp_path):
    stage = plan(tmp_path, reward_training={"adversarial_coeff": 0.5})["iteration-1/reward-train"]
    assert stage.command[:2] == ("prefopt", "adversarial-reward-model")
    assert stage.settings["adversarial_coeff"] == 0.5
    human, adversarial = (source["path"] for source in stage.settings["datasets"])
    assert human == str(tmp_path / "comparisons.jsonl")
    # within the run, which may be moved
    assert adversarial.endswith("/iteration-1/reward-rows/train.jsonl") and not adversarial.startswith(str(RUN))


def test_a_continued_and_a_fixed_reward_model(tmp_path):
    continued = plan(tmp_path, num_iterations=2, reward_update="continued")
    assert f"--model_name_or_path={RUN}/base/reward-train" in continued["iteration-1/reward-train"].command
    assert f"--model_name_or_path={RUN}/iteration-1/reward-train" in continued["iteration-2/reward-train"].command
    fixed = plan(tmp_path, num_iterations=2, reward_update="fixed", reward_prompts="")
    assert not [name for name in fixed if name.startswith("iteration") and "reward" in name]
    assert f"--model_name_or_path={RUN}/base/reward-train" in fixed["iteration-2/rank"].command


@pytest.mark.parametrize(
    ("aligner", "rows", "form", "trainer"),
    [
        ("rjs", "build-rows", "--form=sft", "sft"),
        ("rrhf", "build-rows", "--form=comparisons", "rrhf"),
        ("dpo", "build-pairs", "--output_format=jsonl", "dpo"),
        ("wpo", "build-pairs", "--output_format=jsonl", "wpo"),
    ],
)
def test_aligners(tmp_path, aligner, rows, form, trainer):
    stages = plan(tmp_path, aligner=aligner)
    assert stages[f"iteration-1/{rows}"].command[1] == rows
    assert form in stages[f"iteration-1/{rows}"].command
    train = stages["iteration-1/train"]
    assert train.command[1] == trainer
    assert f"--dataset_name={RUN}/iteration-1/{rows}" in train.command
    assert train.needs == (f"iteration-1/{rows}",)


def test_a_changed_setting_changes_the_stages_that_read_it_and_no_others(tmp_path):
    before = plan(tmp_path, num_iterations=2)
    after = plan(tmp_path, num_iterations=2, reward_training={"human_coeff": 2.0})
    changed = [name for name in before if before[name].settings != after[name].settings]
    assert changed == ["iteration-1/reward-train", "iteration-2/reward-train"]


def test_stages_that_load_a_model_may_run_on_several_processes(tmp_path):
    stages = plan(tmp_path, ranking={"max_length": 64, "num_processes": 4}, policy_training={"num_processes": 4})
    for name in ("rank", "evaluate", "train"):
        assert "--num_processes=4" in stages[f"iteration-1/{name}"].command
    assert stages["iteration-1/evaluate"].settings["ranker_settings"] == {"max_length": 64}


def test_a_stage_that_trained_an_adapter_is_done(tmp_path):
    """An adapter's folder has `adapter_config.json` and no `config.json`."""
    adapter = {"use_peft": True, "lora_r": 4}
    stages = plan(tmp_path, reward_training=adapter, policy_training=adapter)
    for name in ("reward-train", "train"):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("adapter_model.safetensors", "adapter_config.json", "prefopt_head.json"):
            (folder / file).touch()
        for pattern in stages[f"iteration-1/{name}"].outputs:
            assert list(folder.glob(pattern.rpartition("/")[2])), pattern


def test_a_learning_rate_for_each_iteration(tmp_path):
    stages = plan(tmp_path, num_iterations=2, policy_learning_rates=[5e-6, 2e-6])
    assert [stages[f"iteration-{n}/train"].settings["learning_rate"] for n in (1, 2)] == [5e-6, 2e-6]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_name_or_path": ""}, "model_name_or_path is missing"),
        ({"reward_prompts": ""}, "reward_prompts is missing"),
        ({"num_iterations": 0}, "num_iterations is 0; it must be at least 1"),
        ({"reward_update": "never"}, "reward_update must be one of base, continued, fixed"),
        ({"aligner": "ppo"}, "aligner must be one of rjs, rrhf, dpo, wpo"),
        ({"testing_reward_model": "judge"}, "one of testing_reward_model and testing_comparisons"),
        ({"testing_comparisons": None}, "one of testing_reward_model and testing_comparisons"),
        ({"policy_learning_rates": [1e-6, 1e-6]}, "2 values for 1 iterations"),
        ({"policy_learning_rates": [1e-6], "policy_training": {"learning_rate": 1.0}}, "give one of them"),
        ({"sampling": {"prompts": "x"}}, "sampling: prompts is set by the loop"),
        (
            {"base_reward_training": {"seed": 1}},
            "base_reward_training is only read with reward_update continued or fixed, and that is 'base'",
        ),
        ({"reward_update": "fixed", "reward_training": {"seed": 1}}, "reward_training is only read with"),
        (
            {"testing_reward_model": "judge", "testing_comparisons": None, "testing_reward_training": {"seed": 1}},
            "testing_reward_training has no effect without testing_comparisons",
        ),
        (
            {"aligner": "rrhf", "selection": {"min_gap": 1.0}},
            "selection is only read with aligner dpo or wpo, and that is 'rrhf'",
        ),
    ],
)
def test_bad_keys(tmp_path, changed, said):
    with pytest.raises(ValueError, match=said):
        make_loop(tmp_path, **changed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"reward_training": {"adversarial_coef": 1}}, r"iteration-1/reward-train: .*adversarial_coeff"),
        ({"sampling": {"temperature": "hot"}}, r"iteration-1/reward-generate: .*temperature"),
        ({"policy_training": {"sft_coeff": 1.0}}, "iteration-1/train: .*sft_coeff"),
    ],
)
def test_bad_settings_of_a_stage_are_found_before_anything_runs(tmp_path, changed, said):
    with pytest.raises(ValueError, match=said):
        plan(tmp_path, **changed)


# ---- data


def test_disjoint_prompts_pass_and_are_counted(tmp_path):
    counts = check_data(make_loop(tmp_path))
    assert counts["prompts of reward_prompts"] == 3  # which are those of the comparisons, too
    assert counts["golden answers without a reward prompt"] == counts["reward prompts without a golden answer"] == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [("policy", "reward"), ("test", "reward"), ("test", "policy"), ("policy", "comparisons")],
)
def test_prompts_in_common_are_refused(tmp_path, one, other):
    prompt = (
        "comparisons number 1" if other == "comparisons" else f"{other}  Number 1 "
    )  # white space and case are the same prompt
    rows = [{"prompt_id": "a", "prompt": "quite another"}, {"prompt_id": "b", "prompt": prompt}]
    changed = {f"{one}_prompts": rows}
    if other == "comparisons":
        changed["comparisons"] = [{"prompt": prompt, "chosen": "yes", "rejected": "no"}]
    with pytest.raises(ValueError, match="have 1 prompts in common"):
        check_data(make_loop(tmp_path, **write_data(tmp_path, **changed)))


def test_the_evaluating_reward_model_is_not_trained_on_the_test_prompts(tmp_path):
    rows = [{"prompt": f"{name} number 1", "chosen": "yes", "rejected": "no"} for name in ("policy", "TEST")]
    with pytest.raises(ValueError, match="1 prompts in common: the evaluating reward model must not be trained on"):
        check_data(make_loop(tmp_path, **write_data(tmp_path, testing_comparisons=rows)))


def test_comparisons_in_the_authors_form_are_read_too(tmp_path):
    rows = [{"text": ["policy number 1<sep>yes", "policy number 1<sep>no"], "scores": [1.0, 0.0]}]
    with pytest.raises(ValueError, match=r"policy_prompts .* and comparisons .* have 1 prompts in common"):
        check_data(make_loop(tmp_path, **write_data(tmp_path, comparisons=rows)))


def test_golden_answers_without_prompt_and_prompts_without_golden_answer(tmp_path):
    golden = [{"query_id": "reward0", "golden": "gold"}, {"query_id": "elsewhere", "golden": "gold"}]
    write_jsonl(tmp_path / "golden.jsonl", golden)
    counts = check_data(make_loop(tmp_path, golden=str(tmp_path / "golden.jsonl")))
    assert counts["golden answers without a reward prompt"] == 1
    assert counts["reward prompts without a golden answer"] == 2
    with pytest.raises(ValueError, match="'elsewhere' among them"):
        check_data(make_loop(tmp_path, golden=str(tmp_path / "golden.jsonl"), on_unmatched="raise"))
    write_jsonl(tmp_path / "golden.jsonl", golden[1:])
    with pytest.raises(ValueError, match="no golden answer has the prompt_id"):
        check_data(make_loop(tmp_path, golden=str(tmp_path / "golden.jsonl")))
    write_jsonl(tmp_path / "golden.jsonl", [{"prompt_id": "reward0", "answer": "gold"}])
    with pytest.raises(ValueError, match="golden answers need `golden`"):
        check_data(make_loop(tmp_path, golden=str(tmp_path / "golden.jsonl")))


def test_a_mistake_in_the_data_is_one_line_and_leaves_nothing(tmp_path, capsys):
    paths = write_data(tmp_path)
    recipe = {
        "pipeline": "adversarial",
        "run_dir": str(tmp_path / "run"),
        **paths,
        "policy_prompts": paths["reward_prompts"],
    }
    recipe |= {"model_name_or_path": "policy", "reward_model_name_or_path": "backbone"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["pipeline", str(tmp_path / "recipe.yaml")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("prefopt: error: policy_prompts") and "prefopt split" in error
    assert not (tmp_path / "run").exists()


def packaged() -> list[str]:
    return [name for name in packaged_names("training_configs") if name.startswith("pipelines/adversarial")]


def test_there_is_a_packaged_recipe_for_each_of_the_papers_aligners():
    found = [yaml.safe_load(locate(name, "training_configs").read_text())["aligner"] for name in packaged()]
    assert sorted(found) == ["dpo", "rjs", "rrhf"]


@pytest.mark.parametrize("name", packaged())
def test_packaged_recipes_make_stages(name, tmp_path):
    _, loop, _ = read_pipeline(*load_settings([str(locate(name, "training_configs"))]))
    stages = {stage.name: stage for stage in stages_of(loop, Commands(tmp_path, {}))}
    assert loop.num_iterations == 3
    assert [stages[f"iteration-{n}/train"].settings["learning_rate"] for n in (1, 2, 3)] == [5e-6, 2e-6, 9e-7]
    assert stages["iteration-1/reward-train"].settings["adversarial_coeff"] == 0.1
    assert stages["iteration-1/generate"].settings["num_samples"] == 4
    # a process that sees several GPUs is refused: each stage with a model names its processes
    for stage in stages.values():
        if stage.name.endswith(("train", "rank", "evaluate")):
            assert "--num_processes=8" in stage.command, stage.name
        if stage.name.endswith("reward-train"):  # published in float32
            launch = Launch.read(locate("deepspeed_zero3_fp32", "accelerate_configs"))
            assert launch.mixed_precision == "no" and "--accelerate_config=deepspeed_zero3_fp32" in stage.command
            assert stage.settings["bf16"] is False


# ---- for real


GAME_TRAINING = {
    **CPU,
    "logging_steps": 20,
    "disable_tqdm": True,
    "lr_scheduler_type": "constant",
    "seed": 0,
    "per_device_train_batch_size": 32,
}
GAME_REWARD = {**GAME_TRAINING, "num_train_epochs": 3, "learning_rate": 1e-3, "per_device_eval_batch_size": 128}
GAME_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 20, "seed": 0}


@pytest.fixture
def game(tmp_path) -> dict:
    """The world of the study, small, as files, and the keys of a recipe for one iteration."""
    data, start = tmp_path / "data", tmp_path / "start"
    world.write_game(data, seed=0, reward_prompts=150, policy_prompts=300, test_prompts=200, comparisons=1000)
    world.make_start_policy(start, seed=0)
    prompts = ("reward_prompts", "policy_prompts", "test_prompts")
    files = (*prompts, "comparisons", "test_comparisons", "testing_comparisons")
    return {
        "pipeline": "adversarial",
        "run_dir": str(tmp_path / "run"),
        "model_name_or_path": str(start),
        "reward_model_name_or_path": str(start),
        **{name: str(data / f"{name}.jsonl") for name in files},
        "num_iterations": 1,
        "aligner": "dpo",
        "sampling": {**GAME_SAMPLING, "num_samples": 4, "batch_size": 512},
        "test_sampling": {**GAME_SAMPLING, "batch_size": 256},
        "selection": {"plots": False, "keep": ["length"]},
        "policy_training": {**GAME_TRAINING, "beta": 0.3, "learning_rate": 3e-4, "num_train_epochs": 2},
        "testing_reward_training": GAME_REWARD,
        "reward_update": "base",
        "reward_training": {**GAME_REWARD, "adversarial_coeff": 1.0, "num_samples": 4, "human_coeff": 1.0},
    }


def mean_true_reward(folder: Path) -> float:
    records = read_records(folder)
    return fmean(world.true_reward(record["prompt"], record["candidates"][0]["text"]) for record in records)


def pipeline(recipe: dict, folder: Path) -> str:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "prefopt", "pipeline", str(folder / "recipe.yaml")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_an_iteration_of_the_game_then_another_aligner_in_the_same_run(game, tmp_path):
    recipe = game
    run = tmp_path / "run"
    pipeline(recipe, tmp_path)
    before = mean_true_reward(run / "base" / "answers")
    accuracy = read_json(run / "iteration-1" / "reward-train" / "eval_results.json")["eval_human_accuracy"]
    rows = read_json(run / "iteration-1" / "reward-rows" / "rows_report.json")
    after = mean_true_reward(run / "iteration-1" / "answers")
    scores = read_json(run / "iteration-1" / "evaluate" / "evaluation.json")["scores"]
    print(f"reward model {accuracy:.3f} on human comparisons; true reward {before:.3f} -> {after:.3f} (DPO)")
    assert accuracy > 0.75  # 0.5 is chance
    assert 500 < rows["rows"] <= 600  # four samples of each of 150 prompts
    assert {"policy", "base"} == set(scores)
    report = (run / "report.md").read_text()
    assert "## Iteration 1" in report and "human_accuracy" in report and f"{scores['policy']:.3f}" in report

    # rejection sampling takes up the same scores: only what follows them is done again
    aligner = {**recipe, "aligner": "rjs", "policy_training": {"learning_rate": 1e-3, "num_train_epochs": 2, **CPU}}
    del aligner["selection"]
    output = pipeline(aligner, tmp_path)
    done = [line.split()[-1] for line in output.splitlines() if line.startswith("  iteration-1/")]
    print(output[: output.index("===")])
    tuned = mean_true_reward(run / "iteration-1" / "answers")
    print(f"true reward {before:.3f} -> {tuned:.3f} (RJS)")
    assert next(line for line in output.splitlines() if line.startswith("$")).startswith("$ prefopt build-rows")
    assert done.count("done") == 5
    best = [row["completion"][0]["content"] for row in read_jsonl(run / "iteration-1" / "build-rows" / "train.jsonl")]
    assert len(best) > 250
    assert tuned > before  # the best of four, by a reward model that is right in four of five cases


def as_messages(rows: list[dict]) -> list[dict]:
    """Comparisons as conversations."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{name: [{"role": roles[name], "content": text}] for name, text in row.items()} for row in rows]


HUMAN = [{"prompt": f"reward number {n}", "chosen": "yes", "rejected": "no"} for n in range(4)]
FORMS = {"comparisons": HUMAN, "testing_comparisons": HUMAN, "test_comparisons": HUMAN}


@pytest.mark.parametrize("odd", ["comparisons", "testing_comparisons", "test_comparisons"])
@pytest.mark.parametrize("chat", [True, False])
def test_strings_beside_messages_are_found_before_anything_starts(tmp_path, odd, chat):
    """A policy with a chat template answers in messages, one without in strings; every comparison must be alike."""
    for name, template in (("policy", "llama3" if chat else None), ("reward", "llama3")):
        tiny_tokenizer(template).save_pretrained(tmp_path / name)
    fitting, other = (as_messages, list) if chat else (list, as_messages)
    rows = {name: (other if name == odd else fitting)(rows) for name, rows in FORMS.items()}
    models = {"model_name_or_path": str(tmp_path / "policy"), "reward_model_name_or_path": str(tmp_path / "reward")}
    with pytest.raises(ValueError, match=rf"(^|; ){odd}: {'strings' if chat else 'messages'}"):
        check_data(make_loop(tmp_path, **models, **write_data(tmp_path, **rows)))
    rows = {name: fitting(rows) for name, rows in FORMS.items()}
    assert check_data(make_loop(tmp_path, **models, **write_data(tmp_path, **rows)))
    if chat:  # its strings may be continued as they are
        text = {"sampling": {"prompt_format": "text"}, "test_sampling": {"prompt_format": "text"}}
        assert check_data(make_loop(tmp_path, **models, **text, **write_data(tmp_path, **FORMS)))
        tiny_tokenizer(None).save_pretrained(tmp_path / "bare")
        models["reward_model_name_or_path"] = str(tmp_path / "bare")
        with pytest.raises(ValueError, match="has no chat template"):
            check_data(make_loop(tmp_path, **models, **write_data(tmp_path, **rows)))


def test_a_dry_run_finds_strings_beside_messages(tmp_path, capsys):
    tiny_tokenizer("llama3").save_pretrained(tmp_path / "policy")
    keys = {**write_data(tmp_path), "model_name_or_path": str(tmp_path / "policy"), "pipeline": "adversarial"}
    keys |= {"run_dir": str(tmp_path / "run"), "reward_model_name_or_path": "backbone"}
    assert main(["pipeline", *(f"--{name}={value}" for name, value in keys.items()), "--dry_run"]) == 2
    assert (
        "comparisons: strings; the policy's answers to policy_prompts, the policy's answers to reward_prompts: me"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
