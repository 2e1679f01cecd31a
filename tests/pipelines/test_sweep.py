"""`prefopt sweep`: which runs there are, that each is done once, and what happens when it is killed, a run fails, or a
reference is broken.

Scoring is real; trainings are made up but for one test, so that a sweep takes no time.
"""

import shutil

import pytest
import torch
import yaml

from prefopt.cli import main
from prefopt.files import read_json, write_json, write_jsonl
from prefopt.pipelines.stages import Runner
from prefopt.pipelines.sweep import Sweep, SweepArguments
from prefopt.recipes import locate
from tests.references.helpers import reference
from tests.tiny_runs import pair_rows

FAMILIES = [("chatml", "qwen2", 350), ("llama3", "llama", 400), ("zephyr", "mistral", 380), ("mistral", "phi3", 390)]
QUICK = {
    "dtype": "float32",
    "reference_dtype": "float32",
    "max_length": 200,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "num_train_epochs": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Four references on disk; the first is the policy, the last is broken."""
    folder = tmp_path_factory.mktemp("models")
    for style, architecture, size in FAMILIES:
        ref = reference(style, architecture, vocab_size=size)
        if style == "mistral":
            with torch.no_grad():
                ref.model.get_output_embeddings().weight.mul_(500)
        ref.model.save_pretrained(folder / style)
        ref.tokenizer.save_pretrained(folder / style)
    return [str(folder / style) for style, *_ in FAMILIES]


def arguments(folder, models, **changes):
    write_jsonl(folder / "rows.jsonl", pair_rows(40))
    training = {"model_name_or_path": models[0], "references": models[:3], **QUICK, **changes.pop("training", {})}
    values = {
        "run_dir": str(folder / "study"),
        "training": training,
        "dataset_name": str(folder / "rows.jsonl"),
        "seeds": [0, 1],
        "pool_rows": 30,
        "train_rows": 12,
        "validation_rows": 8,
        "test_rows": 8,
        "grid": {"mode": ["multi_dpo", "harmonic"]},
    }
    return {**values, **changes}


class Made(Runner):
    """Scores for real, in this process; a training only writes what a training leaves behind, unless the test says
    otherwise."""

    done: list[str]
    fault: dict[str, object]

    def _execute(self, stage, log, lock):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("what it printed\n")
        if stage.name == "scoring":
            return main(list(stage.command[1:])), 0.0
        type(self).done.append(stage.name)
        fault = type(self).fault.get(stage.name)
        if isinstance(fault, BaseException):
            raise fault
        if fault is None:
            parts = ("validation", "test")
            write_json(
                self.run_dir / stage.name / "eval_results.json",
                {f"eval_{p}_accuracies/reference_free": 0.5 for p in parts},
            )
            (self.run_dir / stage.name / "model.safetensors").write_bytes(b"weights")
        return int(fault or 0), 0.0


@pytest.fixture
def sweep(tmp_path, models):
    """Runs a sweep and gives the names of the trainings that it ran."""

    def run(fault=None, **changes):
        Made.done, Made.fault = [], fault or {}
        Sweep(SweepArguments(**arguments(tmp_path, models, **changes)), runner=Made).run()
        return Made.done

    return run


def test_every_combination_every_single_every_seed_from_one_cache(sweep, tmp_path, models):
    done = sweep(grid={"mode": ["multi_dpo", "harmonic"], "beta": [0.1, 1.0]}, runs={"vaw-hot": {"weighting": "vaw"}})
    names = {name.split("/")[1] for name in done}
    singles = {f"single={style},beta={beta}" for style in ("chatml", "llama3", "zephyr") for beta in (0.1, 1.0)}
    grid = {f"mode={mode},beta={beta}" for mode in ("multi_dpo", "harmonic") for beta in (0.1, 1.0)}
    assert names == singles | grid | {"vaw-hot"} and len(done) == 2 * 11
    caches = [path for path in (tmp_path / "study" / "scores").iterdir() if path.is_dir()]
    assert len(caches) == 3
    assert not list((tmp_path / "study").rglob("*.safetensors"))  # not asked for
    study = read_json(tmp_path / "study" / "study.json")
    one_hot = [run["settings"]["reference_weights"] for run in study["runs"] if run["kind"] == "single"]
    assert one_hot[:3] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert study["anchor"] == models[0]
    assert "no evidence" in (tmp_path / "study" / "table.md").read_text()


def test_a_setting_of_one_run_alone_has_its_baselines_too(sweep):
    done = sweep(seeds=[0], runs={"hot": {"beta": 1.0, "weighting": "vaw"}, "cold": {"mode": "geometric"}})
    singles = {name.split("/")[1] for name in done if "single" in name}
    assert singles == {
        f"single={style}{beta}" for style in ("chatml", "llama3", "zephyr") for beta in ("", ",beta=1.0")
    }


def test_what_is_done_is_not_done_again(sweep):
    assert len(sweep()) == 10
    assert sweep() == []
    assert sweep(training={"logging_steps": 7}) == []  # decides nothing
    assert [name for name in sweep(seeds=[0, 1, 2]) if "seed-2" not in name] == []
    assert sweep(grid={"mode": ["multi_dpo", "harmonic", "geometric"]}) == [
        "runs/mode=geometric/seed-0",
        "runs/mode=geometric/seed-1",
    ]


def test_what_decides_a_result_does_it_again(sweep, tmp_path):
    sweep(seeds=[0])
    assert len(sweep(seeds=[0], training={"learning_rate": 2e-3})) == 5
    assert len(sweep(seeds=[0], pool_seed=1, training={"learning_rate": 2e-3})) == 5


def test_scores_that_were_deleted_are_made_again(sweep, tmp_path):
    sweep(seeds=[0])
    scorer = next(path for path in (tmp_path / "study" / "scores").iterdir() if path.is_dir())
    shutil.rmtree(scorer)
    assert sweep(seeds=[0]) == []  # the same scores, so nothing else is done again
    assert list(scorer.glob("*.npz"))


def test_rows_that_changed_make_another_pool(sweep, monkeypatch):
    sweep(seeds=[0])
    others = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pair_rows(40)]
    monkeypatch.setattr(f"{__name__}.pair_rows", lambda count: others)
    assert len(sweep(seeds=[0])) == 5


@pytest.mark.parametrize("end", [KeyboardInterrupt("SIGTERM"), SystemExit(130)])
def test_killed_anywhere_and_continued(sweep, end):
    place = "runs/single=zephyr/seed-0"
    with pytest.raises(SystemExit):
        sweep(fault={place: end})
    before = list(Made.done)
    assert before[-1] == place
    after = sweep()
    assert after[0] == place and not set(after) & set(before[:-1])
    assert len(set(before) | set(after)) == 10


def test_a_run_that_fails_stops_no_other_and_is_tried_again(sweep, tmp_path):
    place = "runs/mode=harmonic/seed-0"
    with pytest.raises(ValueError, match=r"1 of 10 runs failed.*mode=harmonic/seed-0"):
        sweep(fault={place: 1})
    assert len(Made.done) == 10
    assert "| mode=harmonic | 1/2 |" in (tmp_path / "study" / "table.md").read_text()
    assert sweep() == [place]


def test_a_broken_reference_is_left_out_of_every_run(sweep, tmp_path, models, capsys):
    done = sweep(training={"references": models}, seeds=[0])
    assert "is left out of all runs" in capsys.readouterr().out
    study = read_json(tmp_path / "study" / "study.json")
    assert study["usable"] == models[:3]
    assert all(run["settings"]["references"] == models[:3] for run in study["runs"])
    assert not [name for name in done if "single=mistral" in name]
    assert "QUARANTINED" in (tmp_path / "study" / "table.md").read_text()
    done = sweep(training={"references": models, "accept_outliers": True}, seeds=[0])
    assert "runs/single=mistral/seed-0" in done


def test_runs_that_a_broken_reference_leaves_without_sense_are_left_out(sweep, tmp_path, models, capsys):
    runs = {
        "two": {"references": [models[0], models[3]]},
        "three": {"references": [models[0], models[1], models[3]]},
        "fixed": {"weighting": "fixed", "reference_weights": [0.4, 0.2, 0.2, 0.2]},
    }
    done = sweep(training={"references": models}, seeds=[0], runs=runs)
    assert "runs/three/seed-0" in done and not {"runs/two/seed-0", "runs/fixed/seed-0"} & set(done)
    told = capsys.readouterr().out
    assert "two is left out: fewer than two" in told and "fixed is left out: it has 4 reference_weights" in told
    assert {run["name"] for run in read_json(tmp_path / "study" / "study.json")["runs"]}.isdisjoint({"two", "fixed"})


def test_without_the_policys_own_model_there_is_no_study(sweep, models):
    with pytest.raises(ValueError, match="must be among the references"):
        sweep(training={"references": models[1:3]})
    with pytest.raises(ValueError, match="quarantined"):
        sweep(training={"model_name_or_path": models[3], "references": models})


def test_dry_run_writes_nothing(tmp_path, models, capsys):
    values = arguments(tmp_path, models, dry_run=True)
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(values))
    assert main(["sweep", str(tmp_path / "sweep.yaml")]) == 0
    assert capsys.readouterr().out.count("run (not done yet)") == 11
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_dir": ""}, "run_dir is missing"),
        ({"dataset_name": ""}, "dataset_name is missing"),
        ({"grid": {}}, "give a `grid` or `runs`"),
        ({"grid": {"mode": []}}, "mode needs a list"),
        ({"grid": {"mode": ["harmnic"], "seed": [1]}}, "seed is set by the sweep"),
        ({"grid": {"mood": ["harmonic"]}}, "mood"),
        ({"training": {"learning_rat": 1.0}}, "learning_rat"),
        ({"seeds": [0, 0]}, "each once"),
        ({"train_rows": 30}, "at most pool_rows"),
        ({"runs": {"a/b": {}}}, "names a folder"),
        ({"grid": {"beta": [0.1, 0.1]}}, "two runs are called"),
        ({"grid": {"mode": ["multi_dpo", "harmnic"]}}, "mode=harmnic: the sweep: mode: expected one of multi_dpo"),
        (
            {"runs": {"half": {"weighting": "fixed", "reference_weights": [0.5, 0.4, 0]}}},
            "half: reference_weights must sum to one",
        ),
        ({"runs": {"alone": {"references": ["x"]}}}, "alone has one reference"),
        ({"dataset_name": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"recipe": "no/such"}, "no/such"),
        ({"grid": {"references": ["a"]}}, "lists of names"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, models, capsys, changes, message):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(arguments(tmp_path, models, **changes)))
    assert main(["sweep", str(tmp_path / "sweep.yaml")]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert message in told[-1] and told[-1].startswith("prefopt: error:")
    assert not any((tmp_path / "study" / name).exists() for name in ("scores", "runs"))


@pytest.mark.parametrize("name", ["multi_reference_study", "multi_reference_saferlhf_study"])
def test_the_published_studies(capsys, name):
    """Seven singles, two modes with five weightings, four more; five seeds; and the scoring."""
    assert main(["sweep", f"qwen2.5-0.5b/{name}", "--dry_run", "true"]) == 0
    assert capsys.readouterr().out.count("run (not done yet)") == 5 * (7 + 2 * 5 + 4) + 1
    for line in locate(f"qwen2.5-0.5b/{name}", "training_configs").read_text().splitlines()[2:]:
        structure = not line or line.startswith(("#", "run_dir", "base_recipe")) or line.endswith(":")
        assert structure or " # published" in line or " # ours" in line, line
