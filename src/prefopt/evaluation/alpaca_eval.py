"""Answers and configs in AlpacaEval 2's formats: files only; `alpaca_eval` itself evaluates them (extra `eval`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from prefopt.candidates.records import Record
from prefopt.data.messages import as_messages
from prefopt.files import write_json, write_text

# sampling of the published SPPO and GPO entries: Mistral and Gemma-2 as in the SPPO repository, Llama-3 as in
# alpaca_eval's model configs
_SHORT = {"max_new_tokens": 2048, "temperature": 0.7, "top_p": 0.9, "batch_size": 900}
_LLAMA3 = {"max_new_tokens": 4096, "temperature": 0.9, "top_p": 1.0, "batch_size": 900}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": _SHORT,
    "gemma2": _SHORT,
    "llama3": {**_LLAMA3, "stop_token_ids": [128001, 128009]},
}
PROMPTS = {
    "mistral": "<s>[INST] {instruction} [/INST]",
    "gemma2": "<bos><start_of_turn>user\n{instruction}<end_of_turn>\n<start_of_turn>model\n",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{instruction}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
}


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
    # its decoder hands model_kwargs to vLLM's LLM, which knows no torch_dtype
    settings = {"model_name": model, "model_kwargs": {"dtype": "bfloat16"}, **FAMILIES[family]}
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
