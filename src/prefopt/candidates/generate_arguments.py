"""The settings of `prefopt generate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prefopt.candidates.records import file_of
from prefopt.data.sources import DataSource

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
        "chat: a string prompt is a user's turn under the chat template. text: it is continued as it is. auto: chat where the "
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
                f"With temperature 0 all {self.num_samples} samples of a prompt are the same: raise the temperature, or set num_samples to 1."
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
