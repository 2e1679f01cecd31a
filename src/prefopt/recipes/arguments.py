"""Keys that every training method shares: where its data comes from (three generations of keys), how it is kept."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

from prefopt.arguments import setting
from prefopt.data import DataArguments, DataSource
from prefopt.data.sources import COLUMNS_HELP
from prefopt.files import user_path


@dataclass
class MixtureSource:
    """One entry of the alignment handbook's `dataset_mixture`."""

    id: str
    config: str | None = None
    split: str = "train"
    columns: list[str] | dict[str, str | list[str] | None] | None = None
    weight: float | None = None


@dataclass
class Mixture:
    """The alignment handbook's `dataset_mixture`: seeded samples of data sets, joined."""

    datasets: list[MixtureSource]
    test_split_size: float | int | None = None
    seed: int | None = None


@dataclass
class DatasetArguments:
    """Which rows to train and to evaluate on, under the keys of TRL, the alignment handbook, or Zephyr-era recipes."""

    dataset_name: str | None = setting(None, "Hub name, local file, or local folder.")
    dataset_config: str | None = setting(None, "Configuration (subset) of a hub data set.")
    dataset_train_split: str = setting("train", "Split of `dataset_name` to train on.")
    dataset_test_split: str | None = setting(
        None, "Split of `dataset_name` to evaluate on; `test` where evaluation is on."
    )
    datasets: list[DataSource] | None = setting(
        None, "Several sources, each a mapping with path, split, fraction (its share of the mixture), ..."
    )
    eval_datasets: dict[str, DataSource | str] | None = setting(
        None,
        "Several evaluation sets by name: each a path (its `test` split, or a whole file), or a mapping as in "
        "`datasets`.",
    )
    test_split_size: float | int | None = setting(
        None, "Hold out this part (below 1) or number of the training rows for evaluation, by prompt."
    )
    dataset_mixer: dict[str, float] | None = setting(
        None, "Hub names, files or folders, each with the part of its training split to use."
    )
    dataset_splits: list[str] | None = setting(
        None, "Splits of every source of `dataset_mixer`; those with `test` in their name are for evaluation."
    )
    dataset_configs: list[str] | None = setting(
        None, "Configurations of the sources of `dataset_mixer`, in their order."
    )
    dataset_mixture: Mixture | None = setting(
        None, "A mapping with `datasets` (id, config, split, columns, weight), test_split_size, seed."
    )

    columns: list[str] | dict[str, str | list[str] | None] | None = setting(
        None, f"{COLUMNS_HELP} For every source that does not say so itself."
    )

    # not a key: False where the recipe says do_eval: false, and then named test data stays unread
    evaluates: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        ways = [self.dataset_name, self.datasets, self.dataset_mixer, self.dataset_mixture]
        if sum(way is not None for way in ways) != 1:
            raise ValueError(
                "name the training data with one of dataset_name, datasets, dataset_mixer and dataset_mixture."
            )
        owners = {
            "dataset_splits": "dataset_mixer", "dataset_configs": "dataset_mixer", "dataset_config": "dataset_name"
        }  # fmt: skip
        for key, owner in owners.items():
            if getattr(self, key) is not None and getattr(self, owner) is None:
                raise ValueError(f"{key} belongs to {owner}, which is not given.")

    def resolve(self, *, evaluates: bool, seed: int) -> DataArguments:
        """Return the sources in the one form that `prefopt.data` reads.

        Args:
            evaluates: whether the run evaluates; without, only splits that the recipe names outright are evaluation
                data.
            seed: of sampling and of the hold-out, where the keys give none.

        Raises:
            ValueError: sources that cannot go together.
        """
        if self.dataset_mixture is not None:
            sources = self._from_mixture(self.dataset_mixture, seed)
        elif self.dataset_mixer is not None:
            sources = self._from_mixer(self.dataset_mixer, seed)
        elif self.datasets is not None:
            sources = DataArguments(
                train=self.datasets, mixing="share", test_split_size=self.test_split_size, seed=seed
            )
        else:
            assert self.dataset_name is not None
            sources = self._from_name(self.dataset_name, evaluates, seed)
        if not self.evaluates:
            sources.test = []
        sources.train, sources.test = map(self._with_columns, (sources.train, sources.test))
        return sources

    def _with_columns(self, sources: list[DataSource]) -> list[DataSource]:
        return [source if source.columns is not None else replace(source, columns=self.columns) for source in sources]

    def named_evaluations(self) -> list[tuple[str, DataArguments]]:
        """Return each set of `eval_datasets` with its name.

        Raises:
            ValueError: a name that is taken.
        """
        named = []
        for name, source in (self.eval_datasets or {} if self.evaluates else {}).items():
            if name in ("train", "eval"):
                raise ValueError(f"eval_datasets: choose another name than {name!r}.")
            whole = DataSource(source, split=_split(source, "test")) if isinstance(source, str) else source
            named.append((name, DataArguments(train=self._with_columns([whole]))))
        return named

    def _from_name(self, path: str, evaluates: bool, seed: int) -> DataArguments:
        train = DataSource(path, self.dataset_config, _split(path, self.dataset_train_split))
        test = self.dataset_test_split or ("test" if evaluates and self.test_split_size is None else None)
        tests = [] if test is None or is_file(path) else [DataSource(path, self.dataset_config, test)]
        return DataArguments(train=[train], test=tests, test_split_size=self.test_split_size, seed=seed)

    def _from_mixer(self, mixer: dict[str, float], seed: int) -> DataArguments:
        splits = self.dataset_splits or ["train", "test"]
        configs = self.dataset_configs or [None] * len(mixer)  # type: ignore[list-item]
        if len(configs) != len(mixer):
            raise ValueError(f"dataset_configs has {len(configs)} entries for {len(mixer)} data sets.")
        unknown = [split for split in splits if "train" not in split and "test" not in split]
        if unknown:
            raise ValueError(f"dataset_splits: {unknown[0]!r} must have `train` or `test` in its name.")
        train, test = [], []
        for (path, fraction), config in zip(mixer.items(), configs):
            if is_file(path):  # one file has one split, whatever the others have
                train.append(DataSource(path, fraction=fraction))
                continue
            train += [DataSource(path, config, split, fraction=fraction) for split in splits if "train" in split]
            test += [DataSource(path, config, split) for split in splits if "train" not in split]
        tests = test if self.test_split_size is None else []
        return DataArguments(train=train, test=tests, mixing="head", test_split_size=self.test_split_size, seed=seed)

    def _from_mixture(self, mixture: Mixture, seed: int) -> DataArguments:
        sources = [
            DataSource(part.id, part.config, _split(part.id, part.split), columns=part.columns, fraction=part.weight)
            for part in mixture.datasets
        ]
        size = self.test_split_size if self.test_split_size is not None else mixture.test_split_size
        seed = seed if mixture.seed is None else mixture.seed
        return DataArguments(train=sources, mixing="sample", test_split_size=size, seed=seed)


@dataclass
class RunArguments:
    """How a run is kept apart from others, and what its batches add up to."""

    method: str | None = setting(
        None, "The method that the recipe is written for; `prefopt check` reads it.", decides_result=False
    )
    global_batch_size: int | None = setting(
        None,
        "Rows of one optimizer step over all processes; sets gradient_accumulation_steps from their number.",
    )
    overwrite_output_dir: bool = setting(False, "Replace the run that output_dir holds.", decides_result=False)
    sample_completions: int = setting(
        0,
        "Complete so many held-out prompts under policy and reference before training, at every evaluation and at the "
        "end: printed, kept in samples.jsonl and in the report, and sent to trackers.",
        at_least=0,
        decides_result=False,
    )
    chat_template: str | None = setting(None, "A chat template instead of the tokenizer's own.")
    lora_init: str = setting(
        "default",
        "Initial weights of a LoRA adapter: PEFT's default, or 'gaussian' (the second matrix is zero in both).",
        choices=("default", "gaussian"),
    )
    evaluation: list[dict[str, Any]] = setting(
        factory=list,
        help="Evaluations of the trained model, each a mapping of keys of `prefopt evaluate`, run after training.",
        decides_result=False,
    )
    ref_model_name_or_path: str | None = setting(None, "The reference model; by default the policy before training.")
    ref_model_revision: str | None = setting(None, "Revision of ref_model_name_or_path.")


def is_file(path: str) -> bool:
    """Return whether a data source is one local file, which has no splits but `train`."""
    return os.path.isfile(user_path(path))  # False for a name too long to be one, too


def _split(path: str, split: str) -> str:
    """Return the split to read: of a file its rows, `train`, or the same slice of them (`test_prefs[:100]`)."""
    if not is_file(path):
        return split
    _, bracket, part = split.partition("[")
    return f"train{bracket}{part}"
