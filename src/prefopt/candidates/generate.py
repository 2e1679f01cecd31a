"""`prefopt generate`: K answers of a model to each prompt, as candidate records."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from prefopt.candidates.backends import Backend, Request, Sampling, stop_ids_of
from prefopt.candidates.prompts import PromptSet, load_prompts, tokenize
from prefopt.candidates.records import (
    Record,
    file_of,
    join_candidates,
    make_candidate,
    make_record,
    output_file,
    to_dataset,
    write_records,
)
from prefopt.candidates.shards import Processes, Row, Shard, ShardPlan, current_processes, run_shards, shard_seed
from prefopt.candidates.workers import work_in_children
from prefopt.data.rows import CONTEXT_COLUMNS
from prefopt.data.sources import DataSource
from prefopt.files import read_json, write_json, write_jsonl
from prefopt.references.fingerprints import files_fingerprint, model_folder

BACKENDS = ("transformers", "vllm", "server")
# the flags of the SPPO scripts that mean the same
FLAG_ALIASES = {"model": "model_name_or_path", "pairs": "num_samples", "maxlen": "max_new_tokens"}
# settings that only one backend reads: setting -> backend
ONLY_FOR = {
    "batch_size": "transformers",
    "continuous_batching": "transformers",
    "attn_implementation": "transformers",
    "tensor_parallel_size": "vllm",
    "data_parallel_size": "vllm",
    "gpu_memory_utilization": "vllm",
    "enforce_eager": "vllm",
    "base_url": "server",
    "server_model": "server",
    "key_variable": "server",
    "concurrency": "server",
    "request_timeout": "server",
    "retries": "server",
}


def _setting(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class GenerateArguments:
    """Which model answers which prompts, how, and where the candidates go."""

    model_name_or_path: str = _setting(
        "", "Folder or hub name of the model. The server backend reads its tokenizer only."
    )
    prompts: str = _setting("", "Prompts: hub name, local file, or folder with <split>.jsonl.")
    output_dir: str = _setting("", "Folder for the candidates, their shards and a report.")
    backend: str = _setting("transformers", "transformers, vllm or server.", choices=list(BACKENDS))

    prompts_config: str | None = _setting(None, "Configuration (subset) of a hub dataset.")
    prompts_split: str = _setting("train", 'Split, or a slice of one such as "train[:1000]".')
    prompt_column: str = _setting("prompt", "Column with the prompt, a string or messages.")
    off_policy_columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Columns of responses that the dataset has already; they join the samples (the hybrid setting)."
        },
    )
    prompt_format: str = _setting(
        "auto",
        "chat: a string prompt is a user's turn under the chat template. text: it is continued as it is. auto: chat "
        "where the "
        "tokenizer has a template.",
        choices=["auto", "chat", "text"],
    )

    num_samples: int = _setting(5, "Samples a prompt (K).")
    for_evaluation: bool = _setting(False, "Allow one sample a prompt, which makes no pair.")
    temperature: float = _setting(0.7, "0 takes the most likely token.")
    top_p: float = _setting(0.9, "Draw from the smallest set of tokens with this total probability.")
    top_k: int = _setting(0, "Draw from the k most likely tokens; 0 from all.")
    repetition_penalty: float = _setting(1.0, "Above 1 makes tokens of prompt and answer less likely; 1 is off.")
    max_new_tokens: int = _setting(2048, "Most tokens of an answer.")
    stop_token_ids: list[int] = field(
        default_factory=list, metadata={"help": "Ids that end an answer, besides the model's own end tokens."}
    )
    seed: int = _setting(42, "Each shard draws with a seed made of this one and its number.")
    shard_size: int | None = _setting(
        None, "Prompts in a shard; by default between 16 and 256, by the number of prompts."
    )

    model_revision: str | None = _setting(None, "Revision of a hub model.")
    dtype: str = _setting("auto", "auto (the checkpoint's), bfloat16, float16 or float32.")
    trust_remote_code: bool = _setting(False, "Run code that comes with the model.")
    max_model_len: int | None = _setting(
        None, "Tokens of prompt and answer together; by default the model's own limit."
    )

    batch_size: int = _setting(32, "transformers: answers in one batch.")
    continuous_batching: bool = _setting(
        False, "transformers: replace a finished answer by the next instead of waiting for the batch; meant for GPUs."
    )
    attn_implementation: str | None = _setting(None, "transformers: sdpa, flash_attention_2, eager, ...")
    tensor_parallel_size: int = _setting(1, "vllm: accelerators that one copy of the model is spread over.")
    data_parallel_size: int = _setting(1, "vllm: copies of the model, each with shards of its own.")
    gpu_memory_utilization: float = _setting(0.9, "vllm: share of an accelerator's memory that an engine takes.")
    enforce_eager: bool = _setting(False, "vllm: leave out compilation: slower, but starts sooner.")
    base_url: str = _setting("http://localhost:8000/v1", "server: address of an OpenAI-compatible server.")
    server_model: str | None = _setting(None, "server: the model's name there, where it serves several.")
    key_variable: str = _setting(
        "OPENAI_API_KEY", "server: environment variable that holds the key, if one is needed."
    )
    concurrency: int = _setting(64, "server: requests under way at a time, in each process.")
    request_timeout: float = _setting(600.0, "server: seconds for one request.")
    retries: int = _setting(5, "server: further attempts after a failed one, with growing pauses.")

    output_format: str = _setting("parquet", "parquet or jsonl.", choices=["parquet", "jsonl"])
    push_to_hub: bool = _setting(False, "Also push the candidates to the hub, after everything is written here.")
    hub_dataset_id: str | None = _setting(None, "Dataset repository to push to.")
    hub_private_repo: bool = _setting(True, "Whether that repository is private when it is made.")

    def __post_init__(self) -> None:
        for name in ("model_name_or_path", "prompts", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: set it in the recipe or with --{name}.")
        for name, value, allowed in (
            ("backend", self.backend, BACKENDS),
            ("prompt_format", self.prompt_format, ("auto", "chat", "text")),
            ("output_format", self.output_format, ("parquet", "jsonl")),
            ("dtype", self.dtype, ("auto", "bfloat16", "float16", "float32")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}.")
        self._check_sampling()
        self._check_sizes()
        for name, backend in ONLY_FOR.items():
            if backend != self.backend and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name} is for backend {backend!r} only, and the backend is {self.backend!r}.")
        if self.push_to_hub != (self.hub_dataset_id is not None):
            raise ValueError("push_to_hub and hub_dataset_id belong together: give both or neither.")

    def _check_sampling(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (most likely token) or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0 (1 is off).")
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}; a pair needs at least 2.")
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
        if greedy:  # they play no part; one form of the settings for one result
            self.top_p, self.top_k = 1.0, 0

    def _check_sizes(self) -> None:
        at_least_one = ("max_new_tokens", "batch_size", "tensor_parallel_size", "data_parallel_size", "concurrency")
        for name in (*at_least_one, "shard_size", "max_model_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        for name in ("top_k", "retries"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative.")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}; it is a share above 0 up to 1."
            )
        if self.request_timeout <= 0:
            raise ValueError(f"request_timeout is {self.request_timeout}; it must be above 0 seconds.")

    @property
    def source(self) -> DataSource:
        """Where the prompts are."""
        return DataSource(file_of(self.prompts), name=self.prompts_config, split=self.prompts_split)


__all__ = ["FLAG_ALIASES", "GenerateArguments", "run"]

TOOL = "generate"


def run(args: GenerateArguments) -> Path:
    """Sample `args.num_samples` answers to each prompt and write them with what the dataset already had.

    Returns:
        The file of candidate records. `report.json` and, where prompts got no samples, `skipped.jsonl` lie beside it.

    Raises:
        ValueError: a mistake in the settings or the data, or a shard that failed; see the modules of each step.
    """
    output = output_file(args.output_dir, args.output_format)
    team = current_processes()
    job = Job(args, team)
    if args.backend == "vllm" and args.data_parallel_size > 1:
        plan = job.plan()
        work_in_children(
            plan, work_in_child, args, workers=args.data_parallel_size, devices_each=args.tensor_parallel_size
        )
    else:
        plan = run_shards(job.prompts.items, job.work, processes=team, **job.shard_settings())
    if team.is_main:
        records = merge(plan, job.prompts)
        _write(args, job, plan, records, output)
    team.gather(None)  # nobody leaves before the file is there
    return output


def work_in_child(args: GenerateArguments, indices: list[int]) -> None:
    """Make the shards `indices` in a child process of its own."""
    job = Job(args, Processes())
    job.plan().work(indices, job.work)


class Job:
    """All that one process knows about the run: prompts with ids, sampling settings, and a backend once it is needed."""

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
            self.server_model, server_length = _ask_server(args)
        # one process hashes the weights
        self.fingerprint = team.gather(_fingerprint(args) if team.is_main else None)[0]
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            args.model_name_or_path, revision=args.model_revision, trust_remote_code=args.trust_remote_code
        )
        base = _adapter_base(args)
        place, revision = base or args.model_name_or_path, None if base else args.model_revision
        config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=args.trust_remote_code)
        self.context = _context(args, config, server_length)
        self.template = (
            bool(self.tokenizer.chat_template) if args.prompt_format == "auto" else args.prompt_format == "chat"
        )
        read = load_prompts(args.source, column=args.prompt_column, off_policy_columns=args.off_policy_columns)
        self.prompts: PromptSet = tokenize(read, self.tokenizer, template=self.template, context=self.context)
        stops = stop_ids_of(self.tokenizer, config, place, revision, args.stop_token_ids)
        self.sampling = Sampling(args.temperature, args.top_p, args.top_k, args.repetition_penalty, stops)
        self.backend: Backend | None = None

    def settings(self) -> dict[str, Any]:
        """What decides the candidates; finished shards that were made otherwise are refused."""
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
        """How the prompts are cut into shards."""
        args = self.args
        return {
            "tool": TOOL,
            "settings": self.settings(),
            "output_dir": args.output_dir,
            "shard_size": args.shard_size or min(max(len(self.prompts.items) // 64, 16), 256),
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
        """The shards of this run."""
        return ShardPlan(self.prompts.items, **self.shard_settings())

    def work(self, shard: Shard) -> list[Row]:
        """K answers to each prompt of a shard."""
        if self.backend is None:
            self.backend = BACKEND_MAKERS[self.args.backend](self)
        k = self.args.num_samples
        requests = [
            Request(item["prompt_ids"], self._room(item), shard_seed(shard.seed, place * k + sample))
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
            ]
            context = {name: item[name] for name in CONTEXT_COLUMNS if name in item}
            rows.append(make_record(item["prompt_id"], item["prompt"], candidates, **context))
            shard.count("prompts with less room than max_new_tokens", self._room(item) < self.args.max_new_tokens)
            for answer in answers:
                shard.count("answers")
                shard.count("tokens", answer.num_tokens)
                shard.count(f"answers ended by {answer.finish_reason}")
                shard.count("empty answers", not answer.text.strip())
        return rows

    def _room(self, item: Row) -> int:
        """Tokens that the answer to a prompt may have: the setting, or what the context leaves."""
        if self.context is None:
            return self.args.max_new_tokens
        return min(self.args.max_new_tokens, self.context - len(item["prompt_ids"]))


def _ask_server(args: GenerateArguments) -> tuple[str, int | None]:
    from prefopt.candidates.backends.server import find_model

    return find_model(_client(args), args.server_model)


def _client(args: GenerateArguments) -> Any:
    from prefopt.candidates.backends.http import JsonClient

    return JsonClient(args.base_url, args.key_variable, args.request_timeout, args.retries)


def _fingerprint(args: GenerateArguments) -> str | None:
    """Hash of the weights; a server's are not here to be read."""
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
    """The model under an adapter; None where the folder holds a model.

    Raises:
        ValueError: an adapter for vLLM.
    """
    declared = Path(args.model_name_or_path) / "adapter_config.json"
    if not declared.is_file():
        return None
    if args.backend == "vllm":
        raise ValueError(f"{args.model_name_or_path} holds an adapter: merge it into its model for backend vllm.")
    return str(read_json(declared)["base_model_name_or_path"])


def _local(job: Job) -> Backend:
    from prefopt.candidates.backends.local import TransformersBackend

    args = job.args
    model: Any = AutoModelForCausalLM.from_pretrained(
        args.model_name_or_path,
        revision=args.model_revision,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        attn_implementation=args.attn_implementation,
    )
    return TransformersBackend(
        model.to(job.team.device),
        job.tokenizer,
        job.sampling,
        batch_size=args.batch_size,
        continuous=args.continuous_batching,
    )


def _engine(job: Job) -> Backend:
    from prefopt.candidates.backends.engine import EngineBackend

    args = job.args
    return EngineBackend(
        args.model_name_or_path,
        job.tokenizer,
        job.sampling,
        revision=args.model_revision,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        tensor_parallel_size=args.tensor_parallel_size,
        max_model_len=job.context,
        gpu_memory_utilization=args.gpu_memory_utilization,
        enforce_eager=args.enforce_eager,
    )


def _server(job: Job) -> Backend:
    from prefopt.candidates.backends.server import ServerBackend

    assert job.server_model is not None
    return ServerBackend(
        _client(job.args), job.server_model, job.tokenizer, job.sampling, concurrency=job.args.concurrency
    )


BACKEND_MAKERS: dict[str, Callable[[Job], Backend]] = {"transformers": _local, "vllm": _engine, "server": _server}


def merge(plan: ShardPlan, prompts: PromptSet) -> list[Record]:
    """The sampled records in prompt order, each with the responses that the dataset already had."""
    return [join_candidates(row, prompts.off_policy.get(row["prompt_id"], [])) for row in plan.rows()]


def _write(args: GenerateArguments, job: Job, plan: ShardPlan, records: list[Record], output: Path) -> None:
    counts: Counter[str] = plan.counts()
    skipped = output.parent / "skipped.jsonl"
    skipped.unlink(missing_ok=True)
    if job.prompts.skipped:
        write_jsonl(skipped, job.prompts.skipped)
    write_records(output, records)
    report = {
        "prompts sampled": len(records),
        "prompts skipped": dict(job.prompts.reasons()),
        "duplicate prompts": job.prompts.duplicates,
        "responses of the dataset": sum(map(len, job.prompts.off_policy.values())),
        "counts": {name: number for name, number in counts.items() if name != "seconds"},
        "seconds of work": round(counts["seconds"], 1),
        "settings": plan.settings,
        "notes": plan.notes,
    }
    write_json(output.parent / "report.json", report)
    print(f"generate: {len(records)} prompts with {counts['answers']} answers, {counts['tokens']} tokens -> {output}")
    for name, number in [*job.prompts.reasons().items(), ("duplicate prompt", job.prompts.duplicates)]:
        if number:
            where = f" (listed in {skipped})" if name != "duplicate prompt" else ""
            print(f"generate: {number} rows without samples: {name}{where}")
    for name in ("answers ended by length", "empty answers", "prompts with less room than max_new_tokens"):
        if counts[name]:
            print(f"generate: {counts[name]} {name}")
    if args.push_to_hub:
        assert args.hub_dataset_id is not None
        to_dataset(records).push_to_hub(args.hub_dataset_id, private=args.hub_private_repo)
