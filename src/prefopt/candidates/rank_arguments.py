"""The settings of `prefopt rank`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.candidates.rankers import RANKERS

# the flags of the SPPO scripts that mean the same
FLAG_ALIASES = {"model": "model_name_or_path"}
# settings that only some rankers read: setting -> rankers
ONLY_FOR = {
    "max_length": ("reward-model", "general-preference"),
    "trust_remote_code": ("reward-model",),
    "dtype": ("reward-model", "pair-rm", "general-preference"),
    "tokens_per_batch": ("reward-model", "pair-rm", "general-preference"),
    "model_revision": ("reward-model", "pair-rm", "general-preference"),
    "base_url": ("judge",),
    "judge_template": ("judge",),
    "key_variable": ("judge",),
    "concurrency": ("judge",),
    "request_timeout": ("judge",),
    "retries": ("judge",),
}


def _setting(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class RankArguments:
    """What is ranked, which ranker scores it, and where the scored candidates go."""

    candidates: str = _setting("", "Candidates: the folder that `prefopt generate` wrote, a file, or a hub dataset.")
    output_dir: str = _setting(
        "", "Folder for the scored candidates, their shards and a report; not that of the candidates."
    )
    ranker: str = _setting("", f"Kind of ranker: {', '.join(RANKERS)}.", choices=list(RANKERS))
    model_name_or_path: str = _setting(
        "",
        "The ranker: a folder or hub name; `module:function` or `file.py:function`; or the judge's name at its server.",
    )

    split: str = _setting("train", "Split of the candidates, where they come from a dataset.")
    score_name: str | None = _setting(None, "Name of the new scores; by default the last part of the ranker's name.")
    policy_template: str | None = _setting(
        None,
        "Model whose chat template is put around the prompt before the ranker sees it, as the published SPPO pipeline did; by "
        "default rankers read the raw prompt.",
    )
    shard_size: int | None = _setting(
        None, "Prompts in a shard; by default between 16 and 256, by the number of prompts."
    )

    model_revision: str | None = _setting(None, "Revision of a ranker on the hub.")
    dtype: str = _setting(
        "auto",
        "Of the ranker's weights: auto, float32, bfloat16, float16. auto: float32 on a CPU; on a GPU float16 for PairRM, as "
        "published, and bfloat16 for others.",
        choices=["auto", "float32", "bfloat16", "float16"],
    )
    trust_remote_code: bool = _setting(False, "reward-model: run the code that comes with the model (ArmoRM).")
    max_length: int | None = _setting(
        None,
        "reward-model, general-preference: tokens of prompt and answer; by default the model's own limit. The end is kept.",
    )
    tokens_per_batch: int = _setting(16384, "Padded tokens in a batch; answers are batched by length.")

    base_url: str = _setting("http://localhost:8000/v1", "judge: address of an OpenAI-compatible server.")
    judge_template: str | None = _setting(
        None,
        "judge: file with its prompt, with {prompt}, {answer_a} and {answer_b}; it must ask for [[A]], [[B]] or [[C]].",
    )
    key_variable: str = _setting("OPENAI_API_KEY", "judge: environment variable that holds the key, if one is needed.")
    concurrency: int = _setting(64, "judge: requests under way at a time, in each process.")
    request_timeout: float = _setting(600.0, "judge: seconds for one request.")
    retries: int = _setting(5, "judge: further attempts after a failed one, with growing pauses.")

    output_format: str = _setting("parquet", "parquet or jsonl.", choices=["parquet", "jsonl"])
    push_to_hub: bool = _setting(
        False, "Also push the scored candidates to the hub, after everything is written here."
    )
    hub_dataset_id: str | None = _setting(None, "Dataset repository to push to.")
    hub_private_repo: bool = _setting(True, "Whether that repository is private when it is made.")

    def __post_init__(self) -> None:
        for name in ("candidates", "output_dir", "ranker", "model_name_or_path"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: set it in the recipe or with --{name}.")
        for name in ("ranker", "dtype", "output_format"):
            choices = type(self).__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}.")
        for name in ("tokens_per_batch", "shard_size", "concurrency", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if self.retries < 0 or self.request_timeout <= 0:
            raise ValueError("retries cannot be negative, and request_timeout must be above 0 seconds.")
        for name, rankers in ONLY_FOR.items():
            if self.ranker not in rankers and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"{name} is for the ranker {' or '.join(rankers)}, and the ranker is {self.ranker!r}."
                )
        if Path(self.candidates).resolve() == Path(self.output_dir).resolve():
            raise ValueError(
                "output_dir is the folder of the candidates; give another one, so that they stay as they are."
            )
        if self.push_to_hub != (self.hub_dataset_id is not None):
            raise ValueError("push_to_hub and hub_dataset_id belong together: give both or neither.")

    @property
    def name(self) -> str:
        """Under which name the scores are stored."""
        return self.score_name or self.model_name_or_path.rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
