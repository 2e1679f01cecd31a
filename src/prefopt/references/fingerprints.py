"""Hashes of a model's config and weights, from its files or from what a module holds now; and of rows."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from huggingface_hub import snapshot_download
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from prefopt._transformers import CONFIG_BOOKKEEPING
from prefopt.files import content_hash, file_hash, read_json, read_object, write_json

_CONFIG_FILES = ("config.json", "adapter_config.json")
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
# settings of a model that alter no score: where it came from, and what trainers change
_IRRELEVANT = frozenset(
    {
        *CONFIG_BOOKKEEPING, "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id",
        "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
    }
)  # fmt: skip
# modules that hold the weights of adapters, each under its adapter's name
_ADAPTER_PARTS = (r"lora_\w+", "modules_to_save", "prompt_encoder")
# read while loading or tokenising; nothing else of a repository is downloaded
_NEEDED = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja", "*.py"]
# the weights once more in Mistral's own format, which transformers neither loads nor downloads
_NEVER_LOADED = "consolidated*"


def model_folder(name: str, revision: str | None = None, *, download: bool) -> Path:
    """Return the local folder of a model given as a path or a hub name.

    Args:
        name: local folder or hub name.
        revision: of the hub repository.
        download: fetch missing files; otherwise only the local hub cache is searched.

    Raises:
        FileNotFoundError: not a local folder and not in the local hub cache (with `download`: not on the hub either).
    """
    path = Path(name)
    if path.is_dir():
        return path
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=_NEEDED,
                ignore_patterns=_NEVER_LOADED,
                local_files_only=not download,
            )
        )
    except Exception as error:  # the hub client raises a different type for each of: no such name, offline, gated
        raise FileNotFoundError(
            f"{name} is neither a local folder nor a model that can be fetched: {error}"
        ) from error


def adapted_model(folder: Path) -> str | None:
    """Return the base model of an adapter's folder; None where the folder is a whole model."""
    adapter = folder / "adapter_config.json"
    return str(read_json(adapter)["base_model_name_or_path"]) if adapter.exists() else None


def files_fingerprint(folder: Path, *, remembered: Path | None = None) -> str:
    """Hash a model's config and weight files by content: the same model in two places has one fingerprint.

    Args:
        folder: holds config.json (or adapter_config.json) and the weights.
        remembered: JSON file that keeps the hashes of large files, so that each is read once as long as its size and
            time do not change.

    Raises:
        ValueError: the folder holds no config or no weights.
    """
    configs = [folder / name for name in _CONFIG_FILES if (folder / name).exists()]
    weights = next((found for pattern in _WEIGHT_PATTERNS if (found := _loaded(folder, pattern))), [])
    if not configs or not weights:
        raise ValueError(f"{folder} is not a model: it needs a config.json and weights (*.safetensors or *.bin).")
    known: dict[str, Any] = {}
    if remembered is not None:
        with suppress(OSError, ValueError):  # absent or damaged: everything is hashed anew
            saved = read_object(remembered, remedy="")
            known = {name: seen for name, seen in saved.items() if isinstance(seen, list) and len(seen) == 3}
    hashes = [(path.name, _remembered_hash(path, known)) for path in weights]
    if remembered is not None:
        with suppress(OSError):  # scores may be read from a folder that cannot be written
            write_json(remembered, known)
    settings: list[Any] = [_relevant(read_object(path, remedy="fetch or save the model again")) for path in configs]
    if (base := adapted_model(folder)) is not None:
        settings.append(files_fingerprint(model_folder(base, download=False), remembered=remembered))
    return content_hash(settings, hashes)


def _loaded(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if not path.match(_NEVER_LOADED))


def _relevant(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _IRRELEVANT}


def _remembered_hash(path: Path, known: dict[str, Any]) -> str:
    blob = path.resolve()
    if len(blob.name) == 64 and set(blob.name) <= set("0123456789abcdef"):
        return blob.name  # the hub client names large files by their SHA-256
    stat = blob.stat()
    seen = [stat.st_size, stat.st_mtime_ns]
    entry = known.get(str(blob))
    if entry is None or entry[:2] != seen:
        entry = known[str(blob)] = [*seen, file_hash(blob)]
    return str(entry[2])


def module_fingerprint(model: nn.Module, config: PretrainedConfig, *, adapter: str | None = None) -> str:
    """Hash the config and the weights that a module has now, the same whether or not it is wrapped or sharded.

    All ranks must call it; each one that holds the weights hashes a share of them. Under FSDP2 that is the first rank
    of a node alone until the model is sharded.

    Args:
        model: plain, or wrapped by PEFT, DDP, DeepSpeed or FSDP2. Adapters do not count (the reference is the model
            with its adapters off), except for `adapter`.
        config: of the base model.
        adapter: the name of an adapter that is on when the reference is scored.

    Returns:
        64 hex digits.
    """
    state = PartialState()
    mine = []
    entries = sorted(_named_tensors(model, adapter), key=lambda entry: entry[0])
    holds = [] if any(tensor.is_meta for _, tensor in entries) else [state.process_index]
    holders = gather_object(holds) if state.num_processes > 1 else holds
    assert holders, "no rank holds the weights"
    for number, (name, tensor) in enumerate(entries):
        with _unsharded(tensor) as whole:
            if holders[number % len(holders)] == state.process_index:
                mine.append((name, _tensor_hash(whole)))
    everyone = gather_object(mine) if state.num_processes > 1 else mine
    settings = json.loads(json.dumps(_relevant(config.to_dict()), default=str))
    scales = [] if adapter is None else _adapter_scales(model, adapter)
    return content_hash(settings, sorted(everyone), *scales)


def _adapter_scales(model: nn.Module, adapter: str) -> list[float]:
    """Return the factor alpha / r of each layer's adapter: no weight, but part of the score."""
    from peft.tuners.lora import LoraLayer  # environments of engines fingerprint models and have no peft

    layers = [layer for _, layer in sorted(model.named_modules(), key=lambda entry: entry[0])]
    return [
        float(layer.scaling[adapter]) for layer in layers if isinstance(layer, LoraLayer) and adapter in layer.scaling
    ]


def _named_tensors(model: nn.Module, adapter: str | None) -> list[tuple[str, torch.Tensor]]:
    # by the place where adapters keep their weights: an adapter may be called like any module of the model
    own = None if adapter is None else re.compile(rf"\.({'|'.join(_ADAPTER_PARTS)})\.{re.escape(adapter)}(\.|$)")
    found = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            continue
        counts = own is not None and own.search(name) is not None
        if not counts and any(part in name for part in ("lora_", ".modules_to_save.", "prompt_encoder.")):
            continue
        for wrapper in ("module.", "base_model.model.", "_orig_mod."):
            name = name.removeprefix(wrapper)
        found.append((name.replace(".base_layer.", ".").replace(".original_module.", "."), tensor))
    return found


@contextmanager
def _unsharded(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Give the whole tensor while the context is open; collective where the tensor is sharded."""
    if isinstance(tensor, DTensor):
        yield tensor.full_tensor()
    elif is_deepspeed_zero3_enabled() and isinstance(tensor, nn.Parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor
    else:
        yield tensor


def _tensor_hash(tensor: torch.Tensor) -> str:
    plain = tensor.detach().reshape(-1).contiguous().cpu()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def rows_fingerprint(dataset: Dataset, columns: Iterable[str]) -> str:
    """Hash the values of columns, in the order of the rows."""
    digest = hashlib.sha256()
    for batch in dataset.select_columns(sorted(columns)).with_format("arrow").iter(batch_size=1000):
        for name in batch.column_names:
            digest.update(name.encode())
            _update(digest, batch[name].combine_chunks())
    return digest.hexdigest()


def _update(digest: Any, values: pa.Array) -> None:
    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        digest.update(values.value_lengths().to_numpy(zero_copy_only=False).tobytes())
        values = values.flatten()
    if pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        digest.update(values.to_numpy(zero_copy_only=False).tobytes())
    else:
        digest.update(json.dumps(values.to_pylist(), default=str).encode())
