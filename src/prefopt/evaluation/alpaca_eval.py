"""AlpacaEval 2: answers, annotations and configs in its formats, and its numbers from annotations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from prefopt.arguments import check_together, setting
from prefopt.candidates.records import Record, make_candidate, make_record, read_records
from prefopt.candidates.shards import current_processes
from prefopt.data.messages import as_messages
from prefopt.data.rows import Row
from prefopt.evaluation.figures import mean
from prefopt.evaluation.length_control import (
    HUB_FILE,
    HUB_REPOSITORY,
    alpaca_eval_score,
    read_gamed_baselines,
)
from prefopt.evaluation.settings import SharedSettings, answer_questions, ranked, read_rows
from prefopt.evaluation.win_rate import win_rate
from prefopt.files import write_json, write_text
from prefopt.launch import print_on_main

KIND = "alpaca-eval"
_ONLY = {"kind": (KIND,)}
OUTPUTS_FILE, ANNOTATIONS_FILE = "model_outputs.json", "annotations.json"
OUTPUT_COLUMNS = ("instruction", "output", "generator")
ANNOTATION_COLUMNS = ("output_1", "output_2", "generator_1", "generator_2")

# sampling of the published SPPO and GPO entries: Mistral and Gemma-2 as in the SPPO repository, Llama-3 as in
# alpaca_eval's model configs
_SHORT = {"max_new_tokens": 2048, "temperature": 0.7, "top_p": 0.9, "batch_size": 900}
_LLAMA3 = {"max_new_tokens": 4096, "temperature": 0.9, "top_p": 1.0, "batch_size": 900}
_STOPS = {"stop_token_ids": [128001, 128009]}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": _SHORT,
    "gemma2": _SHORT,
    "llama3": {**_LLAMA3, **_STOPS},
}
# WPO's published entries, of Gemma-2 and of Llama-3 HB-v2; the others have none, and take theirs
_WPO = {
    "max_new_tokens": 4096,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 50,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "batch_size": 1000,
}
PROMPTS = {
    "mistral": "<s>[INST] {instruction} [/INST]",
    "gemma2": "<bos><start_of_turn>user\n{instruction}<end_of_turn>\n<start_of_turn>model\n",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{instruction}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "zephyr": "<|user|>\n{instruction}</s>\n<|assistant|>\n",
}


@dataclass(frozen=True)
class Released:
    """A released policy: its hub name, the template of its prompts, and its published sampling."""

    model: str
    prompt: str
    sampling: dict[str, Any]


RELEASED: dict[str, Released] = {
    **{
        f"Mistral7B-PairRM-SPPO-Iter{n}": Released(f"UCLA-AGI/Mistral7B-PairRM-SPPO-Iter{n}", "mistral", _SHORT)
        for n in (1, 2, 3)
    },
    **{
        f"Llama-3-Instruct-8B-SPPO-Iter{n}": Released(
            f"UCLA-AGI/Llama-3-Instruct-8B-SPPO-Iter{n}", "llama3", FAMILIES["llama3"]
        )
        for n in (1, 2, 3)
    },
    **{
        f"Gemma-2-9B-It-SPPO-Iter{n}": Released(f"UCLA-AGI/Gemma-2-9B-It-SPPO-Iter{n}", "gemma2", _SHORT)
        for n in (1, 2, 3)
    },
    **{
        f"{loss}-Llama-3-8B-Instruct-GPM-2B": Released(
            f"general-preference/{loss}-Llama-3-8B-Instruct-GPM-2B", "llama3", FAMILIES["llama3"]
        )
        for loss in ("SPPO", "GPO")
    },
    **{f"zephyr-7B-WPO-{kind}": Released(f"wzhouad/zephyr-7B-WPO-{kind}", "zephyr", _WPO) for kind in ("FP", "HB")},
    **{
        f"Llama3-Instruct-8B-WPO-{kind}": Released(
            f"wzhouad/Llama3-Instruct-8B-WPO-{kind}", "llama3", {**_WPO, "seed": 42, **_STOPS}
        )
        for kind in ("FP", "HB", "HB-v2")
    },
    **{
        f"gemma-2-9b-it-WPO-{kind}": Released(
            f"wzhouad/gemma-2-9b-it-WPO-{kind}", "gemma2", {**_WPO, "stop_token_ids": [1, 107]}
        )
        for kind in ("FP", "HB")
    },
}


@dataclass(kw_only=True)
class AlpacaEvalSettings(SharedSettings):
    """alpaca-eval: from questions, answers or annotations to AlpacaEval 2's numbers."""

    model_outputs: str | None = setting(
        None, "The model's answers as model_outputs.json, instead of `answers` or `questions`.", only_for=_ONLY
    )
    reference_outputs: str | None = setting(
        None,
        "The baseline's answers, a model_outputs.json (AlpacaEval 2: alpaca_eval_gpt4_baseline.json); with a "
        "`ranker`, annotations are made.",
        only_for=_ONLY,
    )
    annotations: str | None = setting(None, "annotations.json of one model, instead of making them.", only_for=_ONLY)
    length_control: bool = setting(
        True, "Compute the length-controlled win rate, which needs scikit-learn (extra `eval`).", only_for=_ONLY
    )
    gamed_baselines: str | None = setting(
        None,
        f"{HUB_FILE} for the length-controlled win rate; by default it is fetched from the hub's data set "
        f"{HUB_REPOSITORY}.",
        only_for=_ONLY,
    )
    write_configs: list[str] = setting(
        factory=list,
        help="Only write AlpacaEval's models_configs of these released policies: names, or all.",
        only_for=_ONLY,
    )
    alpaca_eval: str | None = setting(
        None, "Write the answers as AlpacaEval's model_outputs.json too, under this name of the model."
    )
    alpaca_eval_family: str | None = setting(
        None, f"Write AlpacaEval's config with the published sampling: {', '.join(FAMILIES)}."
    )

    def check_alpaca_eval(self) -> None:
        """Check the settings of this kind.

        Raises:
            ValueError: nothing to evaluate, two ways at once, or a policy that is not known.
        """
        if self.write_configs:
            self.released_names()
            return
        given = [name for name in ("annotations", "model_outputs", "answers", "questions") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                "alpaca-eval needs one of annotations, model_outputs, answers and questions (or write_configs); "
                f"given: {', '.join(given) or 'none'}."
            )
        if self.annotations is None:
            check_together(self, "reference_outputs", "ranker")
        if given in (["answers"], ["questions"]):
            assert self.name  # raises without one

    def released_names(self) -> list[str]:
        """Return the names in `write_configs`.

        Raises:
            ValueError: one is not known.
        """
        if self.write_configs == ["all"]:
            return list(RELEASED)
        if unknown := [name for name in self.write_configs if name not in RELEASED]:
            raise ValueError(f"write_configs: {unknown[0]!r} is not one of {', '.join(RELEASED)}.")
        return self.write_configs


def model_outputs(records: Sequence[Record], generator: str) -> list[dict[str, str]]:
    """Return the first answer to each prompt as a row of `model_outputs.json`.

    Args:
        records: candidates; the prompt must be one user turn, as in AlpacaEval's set.
        generator: the model's name on the leaderboard.

    Raises:
        ValueError: a prompt of several turns, or without an answer.
    """
    rows = []
    for record in records:
        messages = as_messages(record["prompt"])
        if len(messages) != 1 or messages[0]["role"] != "user":
            raise ValueError(f"Row {record['prompt_id']!r}: AlpacaEval's instructions are single turns.")
        if not record["candidates"]:
            raise ValueError(f"Row {record['prompt_id']!r} has no answer.")
        rows.append(
            {
                "dataset": str(record.get("dataset") or "alpaca_eval"),
                "instruction": str(messages[0]["content"]),
                "output": record["candidates"][0]["text"],
                "generator": generator,
            }
        )
    return rows


def model_config(family: str, model: str, generator: str) -> dict[str, Any]:
    """Return alpaca_eval's `models_configs/<generator>/configs.yaml` with the published sampling of a family.

    Args:
        family: mistral, gemma2 or llama3.
        model: hub name or folder.
        generator: the model's name on the leaderboard.

    Raises:
        ValueError: another family.
    """
    if family not in FAMILIES:
        raise ValueError(f"AlpacaEval settings are known for {', '.join(FAMILIES)}, not {family!r}.")
    return _config(generator, model, FAMILIES[family])


def _config(generator: str, model: str, sampling: dict[str, Any]) -> dict[str, Any]:
    # its decoder hands model_kwargs to vLLM's LLM, which knows no torch_dtype
    settings = {"model_name": model, "model_kwargs": {"dtype": "bfloat16"}, **sampling}
    return {
        generator: {
            "prompt_template": f"{generator}/prompt.txt",
            "fn_completions": "vllm_local_completions",
            "completions_kwargs": settings,
            "pretty_name": generator,
        }
    }


def export(
    folder: Path, records: Sequence[Record], *, generator: str, model: str | None = None, family: str | None = None
) -> None:
    """Write `model_outputs.json`; with a family also `configs.yaml` (of `model` or the answers' source), prompt."""
    write_json(folder / "model_outputs.json", model_outputs(records, generator))
    if family is not None:
        config = model_config(family, model or records[0]["candidates"][0]["source"], generator)
        write_text(folder / "configs.yaml", yaml.safe_dump(config, sort_keys=False))
        write_text(folder / "prompt.txt", PROMPTS[family])


def write_released_configs(folder: Path, names: Sequence[str]) -> None:
    """Write `models_configs/<name>/configs.yaml` and `prompt.txt` of released policies."""
    for name in names:
        released, place = RELEASED[name], folder / "models_configs" / name
        config = _config(name, released.model, released.sampling)
        config[name]["link"] = f"https://huggingface.co/{released.model}"
        write_text(place / "configs.yaml", yaml.safe_dump(config, sort_keys=False))
        write_text(place / "prompt.txt", PROMPTS[released.prompt])


def evaluate(args: AlpacaEvalSettings) -> dict[str, Any]:
    """Make or read annotations and compute AlpacaEval 2's numbers.

    Returns:
        `kind`, `model`, `figures`, and `leaderboard`, the numbers in percent; without annotations only the lengths of
        the answers.

    Raises:
        ValueError: a file that cannot be read, answers and baseline of different instructions, a mistake in the
            settings.
    """
    folder = Path(args.output_dir)
    if args.write_configs:
        names = args.released_names()
        if current_processes().is_main:
            write_released_configs(folder, names)
            print_on_main(f"evaluate: {len(names)} configs -> {folder / 'models_configs'}")
        return {"kind": KIND, "model": None, "figures": {}, "configs": names}
    gamed = None
    if args.length_control and (args.annotations is not None or args.ranker is not None):
        gamed = read_gamed_baselines(args.gamed_baselines)  # before anything is generated
    if args.annotations is not None:
        rows = read_rows(args.annotations, ANNOTATION_COLUMNS)
    else:
        outputs = _outputs(args, folder)
        if current_processes().is_main:
            write_json(folder / OUTPUTS_FILE, outputs)
        if args.ranker is None:
            print_on_main(
                f"evaluate: {folder / OUTPUTS_FILE} holds the answers; annotate them with `alpaca_eval evaluate "
                f"--model_outputs {folder / OUTPUTS_FILE}` and give the annotations.json back as --annotations, or "
                "name a ranker and reference_outputs."
            )
            lengths = mean([len(row["output"]) for row in outputs], confidence=args.confidence)
            return {"kind": KIND, "model": outputs[0]["generator"], "figures": {"characters": lengths}}
        rows = annotate(args, outputs)
        if current_processes().is_main:
            write_json(folder / ANNOTATIONS_FILE, rows)
    score = alpaca_eval_score(rows, gamed, confidence=args.confidence)
    figures = {**score.figures, "characters": mean([len(row["output_2"]) for row in rows], confidence=args.confidence)}
    leaderboard = {name: value for name, value in asdict(score).items() if name != "figures"}
    return {
        "kind": KIND,
        "model": rows[0]["generator_2"],
        "baseline": rows[0]["generator_1"],
        "annotator": rows[0].get("annotator"),
        "figures": figures,
        "leaderboard": leaderboard,
    }


def _outputs(args: AlpacaEvalSettings, folder: Path) -> list[dict[str, str]]:
    """Return the model's answers as rows of `model_outputs.json`."""
    if args.model_outputs is not None:
        return read_rows(args.model_outputs, OUTPUT_COLUMNS)
    if args.answers is not None:
        return model_outputs(read_records(args.answers), args.name)
    assert args.questions is not None
    questions = read_rows(args.questions, ("instruction",))
    # an instruction may come twice: the number keeps them apart
    prompts = {str(number): row["instruction"] for number, row in enumerate(questions)}
    found = answer_questions(args, prompts, folder / "generated")
    return [
        {
            "dataset": str(row.get("dataset") or "alpaca_eval"),
            "instruction": row["instruction"],
            "output": found[str(number)]["text"],
            "generator": args.name,
        }
        for number, row in enumerate(questions)
    ]


def annotate(args: AlpacaEvalSettings, outputs: Sequence[Row]) -> list[dict[str, Any]]:
    """Compare the answers with the baseline's under the ranker of the settings.

    A preference is 1 plus the probability that the ranker gives to the model's answer, averaged over both orders where
    it knows any; of a judge, whose verdicts are no probabilities, 1 plus the share won, a tie being a half.

    Returns:
        Rows of `annotations.json`, in the baseline's order.

    Raises:
        ValueError: an instruction of one side that the other has not answered.
    """
    assert args.reference_outputs is not None
    references = read_rows(args.reference_outputs, OUTPUT_COLUMNS)
    mine = {row["instruction"]: row for row in outputs}
    theirs = {row["instruction"] for row in references}
    if lacking := [row["instruction"] for row in references if row["instruction"] not in mine]:
        raise ValueError(f"{len(lacking)} instructions of the baseline have no answer, such as {lacking[0][:80]!r}.")
    if further := [name for name in mine if name not in theirs]:
        raise ValueError(f"{len(further)} instructions are not the baseline's, such as {further[0][:80]!r}.")
    records = [
        make_record(
            str(number),
            row["instruction"],
            [
                make_candidate(mine[row["instruction"]]["output"], source="model"),
                make_candidate(row["output"], source="baseline"),
            ],
        )
        for number, row in enumerate(references)
    ]
    scored = ranked(args, records)
    verdicts = args.ranker == "judge"
    rows = []
    for row, record in zip(references, scored, strict=True):
        found = win_rate([record], args.rank_arguments().name, "model", "baseline")
        answer = mine[row["instruction"]]
        rows.append(
            {
                "dataset": row.get("dataset", "alpaca_eval"),
                "instruction": row["instruction"],
                "output_1": row["output"],
                "generator_1": row["generator"],
                "output_2": answer["output"],
                "generator_2": answer["generator"],
                "annotator": args.ranker_model,
                "preference": 1 + (found.win_rate if verdicts else found.win_prob),
            }
        )
    return rows
