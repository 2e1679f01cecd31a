"""`prefopt generate`: sample K answers of a model to each prompt, as candidate records."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.versions import require_version

from prefopt.arguments import HubArguments, ServerArguments, check_settings, check_together, setting
from prefopt.candidates.backends import AnswerRequest, Backend, Sampling, stop_ids_of
from prefopt.candidates.prompts import PromptSet, load_prompts, tokenize
from prefopt.candidates.records import (
    Record,
    file_of,
    join_candidates,
    make_candidate,
    make_record,
    output_file,
    push_to_hub,
    to_dataset,
    write_records,
)
from prefopt.candidates.shards import Processes, Row, Shard, ShardPlan, current_processes, run_shards, shard_seed
from prefopt.candidates.workers import work_in_children
from prefopt.data.rows import CONTEXT_COLUMNS
from prefopt.data.sources import DataSource
from prefopt.files import write_json, write_jsonl
from prefopt.models.heads import adapter_read_whole, load_whole
from prefopt.references.fingerprints import adapted_model, files_fingerprint, model_folder

# the flags of the SPPO scripts that mean the same
FLAG_ALIASES = {"model": "model_name_or_path", "pairs": "num_samples", "maxlen": "max_new_tokens"}
ENGINE_SETTINGS = ("dtype", "trust_remote_code", "tensor_parallel_size", "gpu_memory_utilization", "enforce_eager")
_LOCAL = {"backend": ("transformers",)}
_VLLM = {"backend": ("vllm",)}
_SERVER = {"backend": ("server",)}


@dataclass
class GenerateArguments(ServerArguments, HubArguments):
    """Which model answers which prompts, how, and where the candidates go."""

    model_name_or_path: str = setting(
        "", "Folder or hub name of the model. The server backend reads its tokenizer only.", required=True
    )
    prompts: str = setting("", "Prompts: hub name, local file, or folder with <split>.jsonl.", required=True)
    output_dir: str = setting("", "Folder for the candidates, their shards and a report.", required=True)
    backend: str = setting("transformers", "transformers, vllm or server.", choices=("transformers", "vllm", "server"))

    prompts_config: str | None = setting(None, "Configuration (subset) of a hub dataset.")
    prompts_split: str = setting("train", 'Split, or a slice of one such as "train[:1000]".')
    prompt_column: str = setting("prompt", "Column with the prompt, a string or messages.")
    off_policy_columns: list[str] = setting(
        help="Columns of responses that the dataset has already; they join the samples (the hybrid setting).",
        factory=list,
    )
    prompt_format: str = setting(
        "auto",
        "chat: a string prompt is a user's turn under the chat template. text: it is continued as it is. auto: chat "
        "where the tokenizer has a template.",
        choices=("auto", "chat", "text"),
    )

    num_samples: int = setting(5, "Samples a prompt (K).", at_least=1)
    for_evaluation: bool = setting(False, "Allow one sample a prompt, which makes no pair.")
    temperature: float = setting(0.7, "0 takes the most likely token.", at_least=0)
    top_p: float = setting(
        0.9, "Draw from the smallest set of tokens with this total probability.", above=0, at_most=1
    )
    top_k: int = setting(0, "Draw from the k most likely tokens; 0 from all.", at_least=0)
    repetition_penalty: float = setting(
        1.0, "Above 1 makes tokens of prompt and answer less likely; 1 is off.", above=0
    )
    max_new_tokens: int = setting(2048, "Most tokens of an answer.", at_least=1)
    stop_token_ids: list[int] = setting(
        help="Ids that end an answer, besides the model's own end tokens.", factory=list
    )
    seed: int = setting(42, "Each shard draws with a seed made of this one and its number.")
    shard_size: int | None = setting(
        None, "Prompts in a shard; by default between 16 and 256, by the number of prompts.", at_least=1
    )

    model_revision: str | None = setting(None, "Revision of a hub model.")
    dtype: str = setting(
        "auto",
        "auto (the checkpoint's), bfloat16, float16 or float32.",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    trust_remote_code: bool = setting(False, "Run code that comes with the model.")
    max_model_len: int | None = setting(
        None, "Tokens of prompt and answer together; by default the model's own limit.", at_least=1
    )

    batch_size: int = setting(32, "transformers: answers in one batch.", at_least=1, only_for=_LOCAL)
    continuous_batching: bool = setting(
        False,
        "transformers: replace a finished answer by the next instead of waiting for the batch; meant for GPUs.",
        only_for=_LOCAL,
    )
    attn_implementation: str | None = setting(
        None, "transformers: sdpa, flash_attention_2, eager, ...", only_for=_LOCAL
    )
    tensor_parallel_size: int = setting(
        1,
        "vllm: accelerators that one copy of the model is spread over.",
        at_least=1,
        only_for=_VLLM,
        decides_result=False,
    )
    data_parallel_size: int = setting(
        1, "vllm: copies of the model, each with separate shards.", at_least=1, only_for=_VLLM, decides_result=False
    )
    gpu_memory_utilization: float = setting(
        0.9,
        "vllm: share of an accelerator's memory that an engine takes.",
        above=0,
        at_most=1,
        only_for=_VLLM,
        decides_result=False,
    )
    enforce_eager: bool = setting(
        False, "vllm: leave out compilation: slower, but starts sooner.", only_for=_VLLM, decides_result=False
    )
    server_model: str | None = setting(
        None, "server: the model's name there, where it serves several.", only_for=_SERVER
    )

    def __post_init__(self) -> None:
        check_settings(self)
        check_together(self, "push_to_hub", "hub_dataset_id")
        greedy = self.temperature == 0
        if greedy and self.num_samples > 1:
            raise ValueError(
                f"With temperature 0 all {self.num_samples} samples of a prompt are the same: raise the temperature, "
                "or set num_samples to 1."
            )
        if self.num_samples == 1 and not greedy and not self.for_evaluation:
            raise ValueError(
                "num_samples is 1, and one sample makes no pair: set at least 2, or for_evaluation to true."
            )
        if greedy:  # they are ignored; one form of the settings for one result
            self.top_p, self.top_k = 1.0, 0

    @property
    def source(self) -> DataSource:
        """Describe where the prompts are."""
        return DataSource(file_of(self.prompts), name=self.prompts_config, split=self.prompts_split)


def run(args: GenerateArguments) -> Path:
    """Sample `args.num_samples` answers to each prompt and write them with what the dataset already had.

    Returns:
        The file of candidate records. `report.json` and, where prompts got no samples, `skipped.jsonl` lie beside it.

    Raises:
        ValueError: a mistake in the settings or the data, or a shard that failed; see the modules of each step.
    """
    output = output_file(args.output_dir, args.output_format)
    team = current_processes()
    job = Generation(args, team)
    if args.backend == "vllm" and args.data_parallel_size > 1:
        plan = job.plan()
        work_in_children(
            plan, work_in_child, args, workers=args.data_parallel_size, devices_each=args.tensor_parallel_size
        )
    else:
        plan = run_shards(job.prompts.items, job.work, processes=team, **job.shard_settings())
    if team.is_main:
        _write(args, job.prompts, plan, output)
    team.gather(None)  # nobody leaves before the file is there
    return output


def work_in_child(args: GenerateArguments, indices: list[int]) -> None:
    """Make the shards `indices` in a child process."""
    job = Generation(args, Processes())
    job.plan().work(indices, job.work)


class Generation:
    """One process's share of a run: prompts with ids, sampling settings, and a backend once it is needed."""

    def __init__(self, args: GenerateArguments, team: Processes) -> None:
        if args.backend == "vllm" and team.world > 1:
            raise ValueError(
                "backend vllm starts its own processes: run it without accelerate, with data_parallel_size and "
                "tensor_parallel_size."
            )
        self.args = args
        self.team = team
        self.server_model: str | None = None
        server_length: int | None = None
        if args.backend == "server":
            from prefopt.candidates.backends.server import find_model

            self.server_model, server_length = find_model(_client(args), args.server_model)
        self.base = _adapter_base(args)
        # one process hashes the weights
        self.fingerprint = team.gather(_fingerprint(args) if team.is_main else None)[0]
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            args.model_name_or_path, revision=args.model_revision, trust_remote_code=args.trust_remote_code
        )
        place, revision = self.base or args.model_name_or_path, None if self.base else args.model_revision
        config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=args.trust_remote_code)
        self.context = _context(args, config, server_length)
        self.template = (
            bool(self.tokenizer.chat_template) if args.prompt_format == "auto" else args.prompt_format == "chat"
        )
        read = load_prompts(args.source, column=args.prompt_column, off_policy_columns=args.off_policy_columns)
        self.prompts: PromptSet = tokenize(read, self.tokenizer, template=self.template, context=self.context)
        _check_packages(args, config, self.base)
        stops = stop_ids_of(self.tokenizer, config, place, revision, args.stop_token_ids)
        self.sampling = Sampling(args.temperature, args.top_p, args.top_k, args.repetition_penalty, stops)
        self.backend: Backend | None = None

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the candidates; finished shards that were made otherwise are rejected."""
        args = self.args
        settings = {
            "model": args.model_name_or_path,
            "model_fingerprint": self.fingerprint,
            "dtype": args.dtype,
            "backend": args.backend,
            "num_samples": args.num_samples,
            "max_new_tokens": args.max_new_tokens,
            "context": self.context,
            "chat_template": self.template,
            "sampling": asdict(self.sampling),
        }
        return settings | ({"server_model": self.server_model} if args.backend == "server" else {})

    def shard_settings(self) -> dict[str, Any]:
        """Return the arguments of `ShardPlan`."""
        args = self.args
        return {
            "tool": "generate",
            "settings": self.settings(),
            "output_dir": args.output_dir,
            "shard_size": args.shard_size,
            "seed": args.seed,
            "notes": {
                "batch_size": args.batch_size if args.backend == "transformers" else None,
                "continuous_batching": args.continuous_batching,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "device": str(self.team.device),
                "machine": platform.node(),
            },
        }

    def plan(self) -> ShardPlan:
        """Cut this run into shards."""
        return ShardPlan(self.prompts.items, **self.shard_settings())

    def work(self, shard: Shard) -> list[Row]:
        """Sample K answers to each prompt of a shard."""
        if self.backend is None:
            self.backend = BACKEND_MAKERS[self.args.backend](self)
        k = self.args.num_samples
        requests = [
            AnswerRequest(item["prompt_ids"], self._room(item), shard_seed(shard.seed, place * k + sample))
            for place, item in enumerate(shard.items)
            for sample in range(k)
        ]
        completions = self.backend.complete(
            requests, shard.seed, lambda answers, tokens: shard.advance(rows=answers / k, tokens=tokens)
        )
        rows: list[Row] = []
        for place, item in enumerate(shard.items):
            answers = completions[place * k : (place + 1) * k]
            candidates = [
                make_candidate(
                    answer.text,
                    source=self.args.model_name_or_path,
                    k=number,
                    finish_reason=answer.finish_reason,
                    num_tokens=answer.num_tokens,
                )
                for number, answer in enumerate(answers)
                if answer is not None
            ]
            context = {name: item[name] for name in CONTEXT_COLUMNS if name in item}
            rows.append(make_record(item["prompt_id"], item["prompt"], candidates, **context))
            shard.count("prompts with less room than max_new_tokens", self._room(item) < self.args.max_new_tokens)
            for answer in answers:
                if answer is None:
                    shard.count("unusable answers")
                    continue
                shard.count("answers")
                shard.count("tokens", answer.num_tokens)
                shard.count(f"answers ended by {answer.finish_reason}")
                shard.count("empty answers", not answer.text.strip())
        return rows

    def _room(self, item: Row) -> int:
        """Return how many tokens the answer to a prompt may have: the setting, or what the context leaves."""
        if self.context is None:
            return self.args.max_new_tokens
        return min(self.args.max_new_tokens, self.context - len(item["prompt_ids"]))


def _client(args: GenerateArguments) -> Any:
    from prefopt.candidates.backends.http import JsonClient

    return JsonClient(args.base_url, args.key_variable, args.request_timeout, args.retries)


def _fingerprint(args: GenerateArguments) -> str | None:
    """Hash the weights; those of a server cannot be read from here."""
    if args.backend == "server":
        return None
    return files_fingerprint(model_folder(args.model_name_or_path, args.model_revision, download=True))


def _context(args: GenerateArguments, config: PretrainedConfig, server_length: int | None) -> int | None:
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (own, server_length) if limit is not None]
    if args.max_model_len is not None and limits and args.max_model_len > min(limits):
        raise ValueError(f"max_model_len is {args.max_model_len}, but the model takes {min(limits)} tokens.")
    return args.max_model_len or (min(limits) if limits else None)


def _adapter_base(args: GenerateArguments) -> str | None:
    """Return the model under an adapter; None where the folder holds a model.

    Raises:
        ValueError: an adapter for vLLM, or one that does not name its model.
    """
    base = adapted_model(Path(args.model_name_or_path))
    if base is not None and args.backend == "vllm":
        raise ValueError(f"{args.model_name_or_path} holds an adapter: merge it into its model for backend vllm.")
    if base in ("", "None"):
        raise ValueError(
            f"{args.model_name_or_path} holds an adapter that does not name its model (it was trained on one in "
            "memory): write the model's folder into adapter_config.json as base_model_name_or_path, or merge it."
        )
    return base


def _check_packages(args: GenerateArguments, config: PretrainedConfig, adapter_base: str | None) -> None:
    """Check that what the model needs is installed, before the first shard.

    Raises:
        ValueError: a package is missing, or the attention implementation cannot be used; says which.
    """
    if args.backend == "vllm":
        from prefopt.candidates.backends.engine import check_vllm

        check_vllm()
    if args.backend != "transformers":
        return
    try:
        if adapter_base is not None:
            require_version("peft")
        if (quantization := getattr(config, "quantization_config", None)) is not None:
            AutoHfQuantizer.from_config(quantization).validate_environment()
        with torch.device("meta"):  # imports the model's code and checks its attention, without any weight
            AutoModelForCausalLM.from_config(
                config, attn_implementation=args.attn_implementation, trust_remote_code=args.trust_remote_code
            )
    except Exception as error:
        # code of a model may be unable to run without weights; loading them decides
        if isinstance(error, ImportError) or (isinstance(error, ValueError) and args.attn_implementation is not None):
            raise ValueError(f"{args.model_name_or_path} cannot be loaded here: {error}") from error


def _local(job: Generation) -> Backend:
    from prefopt.candidates.backends.local import TransformersBackend

    args, base = job.args, job.base
    model: Any = load_whole(
        AutoModelForCausalLM.from_pretrained,
        base or args.model_name_or_path,
        revision=None if base else args.model_revision,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        attn_implementation=args.attn_implementation,
    )
    if base is not None:
        model = _with_adapter(model, args.model_name_or_path)
    return TransformersBackend(
        model.to(job.team.device),
        job.tokenizer,
        job.sampling,
        batch_size=args.batch_size,
        continuous=args.continuous_batching,
    )


def _with_adapter(model: Any, folder: str) -> Any:
    """Put an adapter on its model, whose embeddings get as many rows as the adapter was trained with."""
    from peft import PeftModel
    from peft.utils import load_peft_weights

    embeddings = model.get_input_embeddings()
    ends = [name.rpartition(".")[2] for name, module in model.named_modules() if module is embeddings]
    for name, weight in load_peft_weights(folder, device="cpu").items():
        if ends and f".{ends[0]}." in name and name.endswith((".weight", "lora_embedding_A")):
            rows = weight.shape[1] if name.endswith("lora_embedding_A") else weight.shape[0]
            if rows != embeddings.weight.shape[0]:
                model.resize_token_embeddings(rows)
            break
    with adapter_read_whole(folder):
        return PeftModel.from_pretrained(model, folder).get_base_model()


def _engine(job: Generation) -> Backend:
    from prefopt.candidates.backends.engine import EngineBackend

    args = job.args
    options = {
        "revision": args.model_revision,
        "tokenizer_revision": args.model_revision,
        "max_model_len": job.context,
        **{name: getattr(args, name) for name in ENGINE_SETTINGS},
    }
    return EngineBackend(args.model_name_or_path, job.tokenizer, job.sampling, options)


def _server(job: Generation) -> Backend:
    from prefopt.candidates.backends.server import ServerBackend

    assert job.server_model is not None
    return ServerBackend(
        _client(job.args), job.server_model, job.tokenizer, job.sampling, concurrency=job.args.concurrency
    )


BACKEND_MAKERS: dict[str, Callable[[Generation], Backend]] = {
    "transformers": _local,
    "vllm": _engine,
    "server": _server,
}


def _write(args: GenerateArguments, prompts: PromptSet, plan: ShardPlan, output: Path) -> None:
    """Write the sampled records in prompt order, each with the responses that the dataset had, and the report."""
    records: list[Record] = [join_candidates(row, prompts.off_policy.get(row["prompt_id"], [])) for row in plan.rows()]
    skipped = output.parent / "skipped.jsonl"
    skipped.unlink(missing_ok=True)
    if prompts.skipped:
        write_jsonl(skipped, prompts.skipped)
    write_records(output, records)
    counts, reasons = plan.counts(), prompts.reasons()
    report = {
        "prompts sampled": len(records),
        "prompts skipped": dict(reasons),
        "duplicate prompts": prompts.duplicates,
        "responses of the dataset": sum(map(len, prompts.off_policy.values())),
        **plan.report(),
    }
    write_json(output.parent / "report.json", report)
    print(f"generate: {len(records)} prompts with {counts['answers']} answers, {counts['tokens']} tokens -> {output}")
    for name, number in reasons.items():
        print(f"generate: {number} rows without samples: {name} (listed in {skipped})")
    if prompts.duplicates:
        print(f"generate: {prompts.duplicates} rows without samples: duplicate prompt")
    for name in (
        "unusable answers",
        "answers ended by length",
        "empty answers",
        "prompts with less room than max_new_tokens",
    ):
        if counts[name]:
            print(f"generate: {counts[name]} {name}")
    push_to_hub(args, output, lambda: to_dataset(records))
