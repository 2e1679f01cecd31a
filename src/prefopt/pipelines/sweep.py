"""`prefopt sweep RECIPE`: multi-reference DPO over a grid of settings and seeds, beside DPO against each reference.

Data, scores and health come first, from one score cache; then every run is a stage, the normal training command in its
own process (so that its GPU memory is free for the next one), done once and skipped while its settings stay the same.
`prefopt evaluate --study RUN_DIR` compares the runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from prefopt.arguments import check_settings, setting, without_secrets
from prefopt.data import DataArguments, DataSource, load_datasets
from prefopt.evaluation.study import HEALTH_FILE, RESULT_FILE, STUDY_FILE, report_study
from prefopt.files import content_hash, user_path, write_json
from prefopt.pipelines.commands import Commands, Place, parse_command
from prefopt.pipelines.stages import Runner, Stage, table
from prefopt.pipelines.state import FAILED, RunState
from prefopt.pipelines.study_data import POOL_FILE, Pool, make_pool, split_pool
from prefopt.recipes.recipe import Recipe, build, plain
from prefopt.recipes.source import Setting, read_settings
from prefopt.references.health import HealthCard, cards_table
from prefopt.references.text import cards_of, found_scores
from prefopt.trainers.multi_reference_config import MultiReferenceDPOConfig
from prefopt.trainers.reference_data import short_names

METHOD = "multi-reference-dpo"
SCORING = "score-references"
# settings of the scoring stage that decide its result
SCORED = ("references", "reference_dtype", "max_length", "dataset_name", "ref_logps_dir")
WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
# what the sweep itself decides; two of them may be given for all runs under `training`
FOR_ALL_RUNS = frozenset({"anchor", "accept_outliers"})
OWN = FOR_ALL_RUNS | {"seed", "output_dir", "dataset_name", "eval_datasets", "validation_set", "do_eval"}
# settings of how references are combined; a single reference has none of it, so it is swept over the other keys only
COMBINING = frozenset(
    {
        "references", "mode", "weighting", "reference_weights", "clip_to_anchor", "max_exponent",
        "accuracy_temperature", "window", "window_reduce", "sampling_prior", "sampling_subset", "sampling_metric",
        "sampling_ties", "sampling_discount",
    }
)  # fmt: skip


@dataclass
class SweepArguments:
    """What is run: a recipe, a grid and a list of settings over it, seeds; and on which rows."""

    run_dir: str = setting("", "Folder of the study: data, scores, runs, state, table.", required=True)
    recipe: str | None = setting(None, "Recipe of multi-reference-dpo that every run starts from.")
    training: dict[str, Any] = setting(
        factory=dict, help="Settings over the recipe, for all runs; num_processes and accelerate_config too."
    )
    grid: dict[str, list[Any]] = setting(
        factory=dict, help="Key -> values; every combination is run: {mode: [multi_dpo, harmonic], beta: [0.1, 1]}."
    )
    runs: dict[str, dict[str, Any]] = setting(factory=dict, help="Further runs by name, each a mapping of settings.")
    seeds: list[int] = setting(factory=lambda: [0, 1, 2, 3, 4], help="Each run is done with each seed.")
    baselines: bool = setting(
        True, "DPO against each reference alone too, with what grid and runs say that is not about combining them."
    )

    dataset_name: str = setting("", "Where the rows come from: hub name, file or folder.", required=True)
    dataset_config: str | None = setting(None, "Configuration of a hub data set.")
    dataset_split: str = setting("train", "Split of it.")
    pool_rows: int = setting(7000, "Rows drawn from those that pass the length filter.")
    pool_seed: int = setting(858, "Seed of the draw.")
    length_percentile: float = setting(2.5, "Prompts and replies at or below this percentile of length are left out.")
    train_rows: int = setting(5000, "Rows of the pool that a seed trains on.")
    validation_rows: int = setting(1000, "Rows for validation weights and for the choice of the best run.")
    test_rows: int = setting(1000, "Rows that the verdict is about.")

    keep_models: bool = setting(False, "Keep the weights of every run; without, its figures and logs only.")
    dry_run: bool = setting(False, "Show the runs and which of them would be done; nothing is written.")

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.grid and not self.runs:
            raise ValueError("nothing to compare with single references: give a `grid` or `runs`.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` must name at least one, and each once: {self.seeds}.")
        sizes = (self.train_rows, self.validation_rows, self.test_rows)
        if min(sizes) < 1 or sum(sizes) > self.pool_rows:
            raise ValueError(
                f"train, validation and test rows are {sizes}: each at least 1, together at most pool_rows "
                f"{self.pool_rows}."
            )
        own = {"training": OWN - FOR_ALL_RUNS, "grid": OWN, "runs": OWN}
        given = [("training", self.training), ("grid", self.grid), *(("runs", run) for run in self.runs.values())]
        for place, settings in given:
            if clash := sorted(own[place] & set(settings)):
                raise ValueError(f"`{place}`: {clash[0]} is set by the sweep; remove it.")
        for name in self.runs:
            if name != slug(name):
                raise ValueError(f"`runs`: {name!r} names a folder: use letters, digits and . _ + - only.")
        for key, values in self.grid.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"`grid`: {key} needs a list of values, found {values!r}.")


def slug(value: Any) -> str:
    """Return a value as a part of a file's name."""
    if isinstance(value, (list, dict)):
        return f"{len(value)}-{content_hash(value)[:6]}"
    return "".join(c if c.isalnum() or c in "._+-" else "-" for c in str(value))


@dataclass(frozen=True)
class Run:
    """One setting, to be trained with every seed.

    Attributes:
        name: of its folder, unique.
        kind: "multi" or "single".
        settings: over the recipe.
        reference: of a single one.
    """

    name: str
    kind: str
    settings: Mapping[str, Any]
    reference: str | None = None


def every_run(args: SweepArguments, usable: list[str]) -> list[Run]:
    """List all runs: singles (the baselines), then the grid, then the named ones; with the usable references only.

    Raises:
        ValueError: two runs of one name, or one with fewer than two references.
    """
    runs = list(_singles(args, usable)) if args.baselines else []
    combined = _combinations(args.grid) if args.grid else []
    for name, settings in [*((_name(s), s) for s in combined), *args.runs.items()]:
        named = settings.get("references", usable)
        if len(named) < 2:
            raise ValueError(f"{name} has one reference: the baselines are DPO against each one, a run needs several.")
        chosen = [reference for reference in named if reference in usable]
        runs.append(Run(name, "multi", {**settings, "references": chosen}))
    names = [item.name for item in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two runs are called {twice[0]!r}: name them differently.")
    return runs


def _singles(args: SweepArguments, usable: list[str]) -> Iterator[Run]:
    """Yield DPO against each reference: all weight on it, so that rows and metrics are those of the other runs.

    With every setting of the grid and of the list that a single reference has too: a run whose beta only it has would
    be compared with another beta, not with another number of references.
    """
    others = _combinations({key: values for key, values in args.grid.items() if key not in COMBINING})
    for run in args.runs.values():
        own = {key: value for key, value in run.items() if key not in COMBINING}
        if own and own not in others:
            others.append(own)
    for settings in others:
        for k, (reference, short) in enumerate(zip(usable, short_names(usable))):
            fixed = {
                "mode": "multi_dpo",
                "weighting": "fixed",
                "reference_weights": [float(place == k) for place in range(len(usable))],
                "references": usable,
                "clip_to_anchor": None,  # clipping would change the reference's scores
            }
            name = ",".join([f"single={slug(short)}", *([_name(settings)] if settings else [])])
            yield Run(name, "single", {**settings, **fixed}, reference)


def named_references(grid: Mapping[str, list[Any]], runs: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield every reference that the grid or a named run lists."""
    for names in [*grid.get("references", []), *(run.get("references", []) for run in runs.values())]:
        if not isinstance(names, list):
            raise ValueError(f"references must be lists of names, found {names!r}.")
        yield from map(str, names)


def _combinations(grid: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def _name(settings: Mapping[str, Any]) -> str:
    return ",".join(f"{key}={slug(value)}" for key, value in settings.items())


def run(args: SweepArguments) -> int:
    """Do the runs that are not done yet, and write the table.

    Raises:
        ValueError: a mistake in the recipe, no reference that can be used, or runs that failed (after all others are
            done).
    """
    Sweep(args).run()
    return 0


class Sweep:
    """One sweep.

    Args:
        args: what is run.
        runner: how stages are run.
    """

    def __init__(self, args: SweepArguments, runner: type[Runner] = Runner) -> None:
        self.args = args
        self.runner = runner
        self.run_dir = user_path(args.run_dir)
        self.commands = Commands(self.run_dir, {})
        base = {"method": METHOD, **args.training}
        values = parse_command(SCORING, args.recipe, _settings(args.recipe, base)).values
        self.policy = str(values.get("model_name_or_path") or "")
        self.references = [str(name) for name in values.get("references") or []]
        self.references = list(dict.fromkeys([*self.references, *named_references(args.grid, args.runs)]))
        if not self.policy or len(self.references) < 2:
            raise ValueError("the recipe must name model_name_or_path and at least two `references`.")
        self.anchor = values.get("anchor") or (self.policy if self.policy in self.references else None)
        if self.anchor not in self.references:
            raise ValueError(
                f"the policy's own initial model {self.anchor or self.policy} must be among the references "
                f"{self.references}: DPO against it is a baseline."
            )
        self.accepts_outliers = bool(values.get("accept_outliers"))
        self.dtype = str(values.get("reference_dtype") or "bfloat16")
        self.max_length: int | None = values.get("max_length", 1024)
        self.scores = values.get("ref_logps_dir")

    def run(self) -> None:
        """Prepare data, scores and health, do every run, and report."""
        planned = every_run(self.args, self.references)
        for item in planned:
            self.check_run(item)
        if self.args.dry_run:
            stages = [self.scoring(), *self.stages(planned)]
            print(table(Runner(stages, self.run_dir).plan()))
            return
        self.prepare_data()
        scoring = self.scoring()
        self.runner([scoring], self.run_dir).run()
        if not self.all_scored():  # a part of the cache has been deleted since
            self.runner([scoring], self.run_dir).run(first=scoring.name)
        usable = self.check_health()
        runs = [item for item in every_run(self.args, usable) if self.still_fits(item)]
        stages = self.stages(runs)
        self.write_study(runs, usable)
        failed = [message for stage in stages if (message := self.do(scoring, stage)) is not None]
        report_study(self.run_dir)
        if failed:
            raise ValueError(
                f"{len(failed)} of {len(stages)} runs failed, the others are done; the first: {failed[0]}"
            )

    # ---- what comes first ----

    @property
    def data(self) -> Path:
        """Folder of the pool and its splits."""
        return self.run_dir / "data"

    def prepare_data(self) -> None:
        """Write the pool and every seed's parts."""
        args = self.args
        source = DataSource(args.dataset_name, name=args.dataset_config, split=args.dataset_split)
        names = tuple(dict.fromkeys([self.policy, *self.references]))
        pool = Pool(source, names, args.pool_rows, args.pool_seed, self.max_length, args.length_percentile)
        report = make_pool(pool, self.data)
        passed = f"{report['rows_kept']} of {report['rows_in']} that pass the length filter"
        print(f"sweep: a pool of {report['rows']} rows from {passed}.")
        for seed in args.seeds:
            split_pool(self.data, seed, (args.train_rows, args.validation_rows, args.test_rows))

    def scoring(self) -> Stage:
        """Make the stage that scores the pool under every reference; what the cache holds is not scored again."""
        own = {
            "method": METHOD,
            **self.args.training,
            **self.common(self.references),
            "dataset_name": Place(f"data/{POOL_FILE}"),
            "do_eval": False,
            "output_dir": Place("scoring"),
        }
        stage = self.commands.stage(
            "scoring",
            SCORING,
            own,
            recipe=self.args.recipe,
            inputs=self.inputs(self.data / POOL_FILE, self.references),
        )
        return replace(stage, folder=None, settings={key: stage.settings.get(key) for key in SCORED})

    @property
    def root(self) -> Path:
        """Folder of the score cache."""
        return Path(self.scores) if self.scores else self.run_dir / "scores"

    def pool(self) -> Dataset:
        """Load the pool's rows."""
        rows, _ = load_datasets(DataArguments(train=[DataSource(str(self.data / POOL_FILE))]))
        return rows

    def all_scored(self) -> bool:
        """Check whether the cache holds every row of the pool under every reference."""
        found = found_scores(self.pool(), self.references, self.root, dtype=self.dtype)
        return all(side.found.all() for _, sides in found for side in sides)

    def check_health(self) -> list[str]:
        """Print and keep the references' health cards; return the references that are not quarantined.

        Raises:
            ValueError: too few are left, or the policy's own initial model is quarantined.
        """
        cards = cards_of(self.pool(), self.references, self.root, dtype=self.dtype)
        cards = [replace(card, name=name) for card, name in zip(cards, self.references)]
        print(cards_table(cards), flush=True)
        write_json(self.run_dir / HEALTH_FILE, [asdict(card) for card in cards])
        return self.usable(cards)

    def usable(self, cards: list[HealthCard]) -> list[str]:
        """See `check_health`."""
        bad = {card.name: card.quarantine for card in cards if card.quarantine and not self.accepts_outliers}
        usable = [name for name in self.references if name not in bad]
        if self.anchor in bad or len(usable) < 2:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in bad.items())
            raise ValueError(f"quarantined: {reasons}. The policy's initial model and another reference are needed.")
        for name, reason in bad.items():
            print(
                f"sweep: {name} is left out of all runs ({reason}); `training: {{accept_outliers: true}}` keeps it.",
                flush=True,
            )
        return usable

    # ---- the runs ----

    def check_run(self, item: Run) -> None:
        """Raise on settings that training would not accept, before anything is scored."""
        settings = {"method": METHOD, **self.args.training, **item.settings}
        try:
            values = parse_command(METHOD, self.args.recipe, _settings(self.args.recipe, settings)).values
            known = {declared.name for declared in fields(MultiReferenceDPOConfig) if declared.init}
            given = {key: value for key, value in values.items() if key in known}
            build(Recipe(None, {**given, "use_cpu": True, "output_dir": "unused"}), (MultiReferenceDPOConfig,))
        except ValueError as error:
            raise ValueError(f"{item.name}: {error}") from error

    def still_fits(self, item: Run) -> bool:
        """Check whether a run makes sense with the references that are left; print why where it does not."""
        count = len(item.settings["references"])
        weights = {**self.args.training, **item.settings}.get("reference_weights")
        reason = ""
        if count < 2:
            reason = "fewer than two of its references are left"
        elif weights is not None and len(weights) != count:
            reason = f"it has {len(weights)} reference_weights for the {count} references that are left"
        if reason:
            print(f"sweep: {item.name} is left out: {reason}.", flush=True)
        return not reason

    def common(self, references: list[str]) -> dict[str, Any]:
        """Return the settings that every stage gets."""
        return {
            "references": references,
            "ref_logps_dir": self.scores or Place("scores"),
            "reference_dtype": self.dtype,
            "max_length": self.max_length,
            "test_split_size": None,
        }

    def inputs(self, data: Path, references: Sequence[str]) -> list[str]:
        """Return what a stage reads from outside; hub names among it are ignored later."""
        return [str(data), *dict.fromkeys([self.policy, *references])]

    def stages(self, runs: list[Run]) -> list[Stage]:
        """Make the stages of all runs with all seeds, the first seed first."""
        return [self.stage(item, seed) for seed in self.args.seeds for item in runs]

    def stage(self, item: Run, seed: int) -> Stage:
        """Make the stage that trains one run with one seed."""
        parts = f"data/seed-{seed}"
        place = f"runs/{item.name}/seed-{seed}"
        own = {
            **self.args.training,
            **self.common(list(item.settings["references"])),
            **{key: value for key, value in item.settings.items() if key != "references"},
            "anchor": self.anchor if self.anchor in item.settings["references"] else None,
            "dataset_name": Place(f"{parts}/train.jsonl"),
            "eval_datasets": {name: Place(f"{parts}/{name}.jsonl") for name in ("validation", "test")},
            "validation_set": "validation",
            "accept_outliers": True,  # decided on the whole pool
            "do_eval": True,
            "seed": seed,
            "output_dir": Place(place),
            "resume_from_checkpoint": True,
        }
        return self.commands.stage(
            place,
            METHOD,
            own,
            recipe=self.args.recipe,
            outputs=(RESULT_FILE,),
            needs=("scoring",),
            inputs=self.inputs(self.data / f"seed-{seed}", item.settings["references"]),
        )

    def do(self, scoring: Stage, stage: Stage) -> str | None:
        """Do one run unless it is done; return why it failed, or None."""
        runner = self.runner([scoring, stage], self.run_dir)
        try:
            runner.run()
        except ValueError as error:
            record = RunState(self.run_dir).stages.get(stage.name)
            if record is None or record.status != FAILED:
                raise
            return str(error)
        if not self.args.keep_models:
            for file in [file for pattern in WEIGHTS for file in (self.run_dir / stage.name).glob(pattern)]:
                file.unlink()
        return None

    def write_study(self, runs: list[Run], usable: list[str]) -> None:
        """Write the file from which `prefopt evaluate` reads the runs."""
        study = {
            "policy": self.policy,
            "anchor": self.anchor,
            "references": self.references,
            "usable": usable,
            "seeds": self.args.seeds,
            "rows": {name: getattr(self.args, f"{name}_rows") for name in ("pool", "train", "validation", "test")},
            "runs": [asdict(item) for item in runs],
        }
        write_json(self.run_dir / STUDY_FILE, without_secrets(plain(study)))


def _settings(recipe: str | None, values: Mapping[str, Any]) -> list[Any]:
    """Return the recipe's settings with these above them."""
    read = [each for each in read_settings(recipe, []) if each.key != "env"]
    top = max((each.level for each in read), default=-1) + 1
    return [*read, *(Setting(key, value, "the sweep", top) for key, value in values.items())]
