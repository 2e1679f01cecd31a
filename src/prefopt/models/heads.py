"""Models with a head on a causal LM's backbone: pooling, loading, saving, and a record in the config.

The class of a model in memory is made once per architecture, as (the headed class, the architecture's own
`PreTrainedModel` base), so that weight names, weight conversion, attention implementations, gradient checkpointing,
quantization and sharded loading are the architecture's own. `config.json` keeps one record, `prefopt_head`.

Letters: N rows, T tokens of a row, C completions, H hidden width.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from prefopt._transformers import (
    attention_of,
    class_members,
    drop_weight_conversions,
    initialise,
    model_from_config,
    set_attention,
)
from prefopt.data.encoding import text_record
from prefopt.files import read_json, write_json

POOLINGS = ("last", "eos", "mean", "max")

RECORD = "prefopt_head"
"""Name of the record in config.json: the kind of head that the model has, and its settings."""

ADAPTER_RECORD = "prefopt_head.json"
"""The same record beside a LoRA adapter, whose folder has no config.json."""

HUB_SETTINGS = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
"""Keywords of `from_pretrained` that say where files come from."""


class Float32Linear(nn.Linear):
    """A linear layer without bias whose product is in float32, whatever the autocast or the weights' dtype."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., H) to (..., out), float32."""
        with torch.autocast(input.device.type, enabled=False):
            return nn.functional.linear(input.float(), self.weight.float())


def pooled_columns(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, *, pooling: str, eos_token_ids: tuple[int, ...]
) -> torch.Tensor:
    """Find the column at which each row is read: its last real token ("eos"), or the one before an EOS ("last").

    Real tokens are those of the attention mask, on either padding side; a pad token that is also the EOS does not
    matter.

    Args:
        input_ids: (N, T).
        attention_mask: (N, T), 0 at padding.
        pooling: "eos" or "last".
        eos_token_ids: what counts as EOS; a row that ends otherwise (cut, say) is read at its last real token.

    Returns:
        (N,) long.
    """
    mask = attention_mask.long()
    columns = torch.arange(mask.shape[1], device=mask.device)
    end = (columns * mask).argmax(-1)
    if pooling == "eos":
        return end
    return end - is_eos(input_ids.gather(1, end[:, None])[:, 0], eos_token_ids) * (mask.sum(-1) > 1)


def is_eos(tokens: torch.Tensor, eos_token_ids: tuple[int, ...]) -> torch.Tensor:
    """Return 1 where a token is an EOS, else 0, long."""
    return torch.isin(tokens, torch.tensor(eos_token_ids, device=tokens.device)).long()


def pool_rows(hidden: torch.Tensor, attention_mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """Compute the mean (float32) or maximum over the real tokens of each row.

    Args:
        hidden: (N, T, H).
        attention_mask: (N, T), 0 at padding; None for no padding.
        pooling: "mean" or "max".

    Returns:
        (N, H).

    Raises:
        ValueError: the mask is that of packed rows.
    """
    if attention_mask is None:
        attention_mask = torch.ones(hidden.shape[:2], device=hidden.device)
    if attention_mask.ndim != 2:
        raise ValueError(f"Pooling {pooling!r} needs one sequence a row; set `batch_layout: padded`.")
    real = attention_mask.bool()[..., None]
    if pooling == "mean":
        return hidden.float().masked_fill(~real, 0.0).sum(1) / real.sum(1)
    return hidden.masked_fill(~real, float("-inf")).amax(1)


def load_whole(load: Callable[..., Any], path: str | os.PathLike[str], **options: Any) -> Any:
    """Load a model with all of its weights; transformers draws those that a checkpoint lacks at random and goes on.

    Args:
        load: a `from_pretrained`.
        path: folder or hub name.
        options: its keywords.

    Raises:
        ValueError: weights are missing or have another shape, or an option is unknown.
    """
    try:
        model, report = load(path, output_loading_info=True, **options)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error
    lacking = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if lacking:
        raise ValueError(
            f"{path} lacks {len(lacking)} weights of a {type(model).__name__} or has them in another shape "
            f"({lacking[0]}, ...), so they would be random: save the model again, or take the folder that is whole."
        )
    return model


@contextmanager
def adapter_read_whole(path: str | os.PathLike[str]) -> Iterator[None]:
    """Have peft load an adapter with all of its weights in the block; it only warns of those that are missing.

    Raises:
        ValueError: the folder lacks weights, or has those of an adapter on another model.
    """
    if Path(path).is_dir() and not any(Path(path).glob("adapter_model.*")):
        raise ValueError(f"{path} holds an adapter_config.json, but no weights (adapter_model.safetensors).")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*Found missing adapter keys")
            yield
    except (UserWarning, RuntimeError) as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) < 300 else f"{reason[:300]}..."
        raise ValueError(f"The adapter in {path} does not fit the model it is put on: {reason}") from error


class HeadedModel(PreTrainedModel):
    """Backbone, pooling, saving and loading; a subclass gives `kind`, `build_heads` and `forward`."""

    kind: ClassVar[str]
    head_names: ClassVar[tuple[str, ...]]
    defaults: ClassVar[dict[str, Any]]
    # regular expression of a weight's name in others' checkpoints -> its name here
    published_names: ClassVar[dict[str, str]] = {}

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        backbone: Any = MODEL_MAPPING[type(config)]
        setattr(self, self.base_model_prefix, backbone(config))
        parameters = inspect.signature(self.base_model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self.build_heads(config.get_text_config().hidden_size, getattr(config, RECORD))
        self.post_init()

    def build_heads(self, hidden_size: int, record: dict[str, Any]) -> None:
        """Create the modules named in `head_names`, as `record` says."""
        raise NotImplementedError

    @property
    def head_record(self) -> dict[str, Any]:
        """The head's settings as config.json stores them."""
        return getattr(self.config, RECORD)

    @property
    def text_form(self) -> str | None:
        """The form of the training rows, "strings" or "messages"; None where it is not recorded."""
        record = self.head_record.get("text")
        return record and record["form"]

    def record_text(self, tokenizer: PreTrainedTokenizerBase, form: str, *, where: str) -> None:
        """Record how the texts that the model is trained on become ids, or check it against the record.

        Args:
            tokenizer: that of the texts.
            form: "strings" or "messages".
            where: names the texts in errors.

        Raises:
            ValueError: the model was trained on texts that became ids in another way.
        """
        found = text_record(tokenizer, form)
        stored = self.head_record.setdefault("text", found)
        if stored["form"] != form:
            raise ValueError(
                f"{where} holds {form}, but the model was trained on {stored['form']}: the same text has other ids "
                f"there, and its scores mean nothing. Give {stored['form']}, or train a model on {form}."
            )
        if stored != found:
            raise ValueError(
                f"{where} is read by a tokenizer or chat template that gives other ids than the one in training. Use "
                "the tokenizer that was saved with the model."
            )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The token ids that close a sequence, from the config."""
        ids = self.config.get_text_config().eos_token_id
        return () if ids is None else tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)

    # --- making and loading

    @classmethod
    def check_record(cls, record: dict[str, Any]) -> None:
        """Raise ValueError where a setting of `record` is unknown or impossible."""
        unknown = sorted(set(record) - {"kind", "backbone", "text", *cls.defaults})
        if unknown:
            raise ValueError(
                f"Unknown settings of a {cls.kind} head: {', '.join(unknown)}; known: {', '.join(cls.defaults)}."
            )
        if record["pooling"] not in POOLINGS:
            raise ValueError(f"Unknown pooling {record['pooling']!r}; use one of {', '.join(POOLINGS)}.")

    @classmethod
    def from_backbone_config(cls, config: PretrainedConfig, **settings: Any) -> HeadedModel:
        """Make a model with random weights for a causal LM's config and settings of the head (see `defaults`)."""
        config = type(config).from_dict(config.to_dict())
        cls._set_record(config, {**cls.defaults, **settings})
        return model_from_config(cls._class_for(config), config)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, path: str | os.PathLike[str], *, new_head: bool = False, **settings: Any
    ) -> Any:
        """Load a model with a trained head, or (`new_head=True`) a causal LM that gets a fresh one.

        Args:
            path: local folder or hub name, of prefopt's models or of others in the same weight layout. A folder with
                a LoRA adapter that a trainer saved is loaded onto its base and merged.
            new_head: allow a checkpoint without the head's weights; otherwise such a checkpoint is an error.
            settings: settings of the head (see `defaults`), which must agree with the checkpoint's record where it has
                one; all other keywords are those of transformers' `from_pretrained` (`dtype`, `device_map`,
                `attn_implementation`, `revision`, ...).

        Raises:
            ValueError: no trained head, settings that contradict the checkpoint, weights of the backbone missing.
        """
        head_settings = {name: settings.pop(name) for name in list(settings) if name in cls.defaults}
        if Path(path, "adapter_config.json").is_file():
            return cls._from_adapter(Path(path), head_settings, settings)
        hub = {name: settings[name] for name in HUB_SETTINGS if name in settings}
        config = cls._load_config(path, hub)
        cls._set_record(config, cls._merge_settings(path, config, head_settings, hub))
        mapping = {"key_mapping": cls.published_names} if cls.published_names else {}
        load: Any = super(HeadedModel, cls._class_for(config)).from_pretrained
        model, report = load(path, config=config, output_loading_info=True, **mapping, **settings)
        cls._check_loaded(path, report, new_head=new_head)
        drop_weight_conversions(model, cls.published_names)
        return model

    @classmethod
    def from_module(cls, module: PreTrainedModel, **settings: Any) -> Any:
        """Make a model on the backbone of `module`, a causal LM or sequence classifier in memory; they share it.

        A sequence classifier with one label gives its head as well; otherwise the head is fresh.
        """
        config = type(module.config).from_dict(module.config.to_dict())
        given = {name: value for name, value in settings.items() if value is not None}
        cls._set_record(config, {**cls.defaults, **given})
        set_attention(config, attention_of(module.config))
        with torch.device("meta"):
            model = model_from_config(cls._class_for(config), config)
        setattr(model, model.base_model_prefix, module.base_model)
        for name in cls.head_names:
            if (head := getattr(model, name, None)) is None:
                continue
            head.to_empty(device=module.device)
            initialise(model, head)
            theirs = getattr(module, name, None)
            if theirs is not None and theirs.weight.shape == head.weight.shape:
                head.load_state_dict({"weight": theirs.weight.detach()})
            head.to(module.dtype)
        if getattr(model, "lm_head", None) is not None:
            model.lm_head = module.get_output_embeddings()
        return model.train(module.training)

    @classmethod
    def _load_config(cls, path: str | os.PathLike[str], hub: dict[str, Any]) -> PretrainedConfig:
        values, _ = PretrainedConfig.get_config_dict(path, **hub)
        backbone = values.get(RECORD, {}).get("backbone")
        if backbone is None:
            return AutoConfig.from_pretrained(path, **hub)
        return AutoConfig.for_model(**{**values, "model_type": backbone})

    @classmethod
    def _merge_settings(
        cls, path: str | os.PathLike[str], config: PretrainedConfig, asked: dict[str, Any], hub: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the head's settings: the checkpoint's record, else `asked`, else the defaults."""
        stored = {**getattr(config, RECORD, {})}
        if stored and stored["kind"] != cls.kind:
            raise ValueError(f"{path} holds a {stored['kind']} head, not a {cls.kind} head.")
        stored.pop("backbone", None)
        _check_asked(path, stored, asked)
        return {**cls.defaults, **stored, **{name: value for name, value in asked.items() if value is not None}}

    @classmethod
    def _class_for(cls, config: PretrainedConfig) -> Any:
        key: Any = (cls, type(config))
        return _concrete_class(*key)

    @classmethod
    def _set_record(cls, config: PretrainedConfig, record: dict[str, Any]) -> None:
        record = {**record, "kind": cls.kind}
        cls.check_record(record)
        setattr(config, RECORD, record)

    @classmethod
    def _check_loaded(cls, path: str | os.PathLike[str], report: Any, *, new_head: bool) -> None:
        missing = sorted(report["missing_keys"])
        heads = [name for name in missing if name.split(".")[0] in cls.head_names]
        if len(heads) < len(missing):
            others = [name for name in missing if name not in heads]
            raise ValueError(f"{path} lacks {len(others)} weights of the backbone ({others[0]}, ...).")
        if heads and not new_head:
            raise ValueError(
                f"{path} has no trained head ({', '.join(heads)} not found); train one, or pass `new_head=True`."
            )

    @classmethod
    def _from_adapter(cls, path: Path, head_settings: dict[str, Any], settings: dict[str, Any]) -> Any:
        from peft import PeftModel  # not needed where no adapter is read

        if not (path / ADAPTER_RECORD).is_file():
            raise ValueError(
                f"{path} holds an adapter without {ADAPTER_RECORD}: it is no reward or preference model's. To start "
                "from it, merge it into its base (peft's `merge_and_unload`), save that and give its folder."
            )
        record = read_json(path / ADAPTER_RECORD)
        text = record.pop("text", None)
        if record.pop("kind") != cls.kind:
            raise ValueError(f"{path} holds the adapter of another kind of head than {cls.kind}.")
        _check_asked(path, record, head_settings)
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        if not base:
            raise ValueError(
                f"{path} does not say which model its adapter belongs to (it was trained on one in memory): load that "
                "model, put the adapter on it with peft's `PeftModel.from_pretrained(model, path)`, and "
                "`merge_and_unload()`."
            )
        model = cls.from_pretrained(base, new_head=True, **record, **settings)
        with adapter_read_whole(path):
            merged = PeftModel.from_pretrained(model, path).merge_and_unload()
        if not getattr(merged, "is_quantized", False):
            merged.requires_grad_(True)  # peft froze what it put the adapter on
        # an adapter that is trained on top of it belongs to this folder, and not to the base alone
        merged.name_or_path = merged.config.name_or_path = str(path)
        if text is not None:
            merged.head_record["text"] = text
        return merged

    # --- saving

    def saved_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return config.json as it is written; a subclass changes which other loaders may read it."""
        return config

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **settings: Any
    ) -> None:
        """Save weights and config as transformers does; `settings` are those of its `save_pretrained`."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **settings)
        path = Path(save_directory, "config.json")
        if is_main_process and path.is_file():
            write_json(path, self.saved_config(json.loads(path.read_text(encoding="utf-8"))))

    # --- forward

    def hidden_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the last hidden states (N, T, H); positions count real tokens only unless given."""
        positions = {}
        if self._takes_positions:
            if position_ids is None and attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            positions = {"position_ids": position_ids}
        run: Any = self.base_model
        return run(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions).last_hidden_state

    def pool(
        self,
        hidden: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        last_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pick one hidden state per row, or per completion of `last_index`.

        Args:
            hidden: (N, T, H).
            input_ids: (N, T).
            attention_mask: (N, T), or None for no padding; not read with `last_index` unless pooling is "mean" or
                "max".
            last_index: (C,) flattened positions of each completion's last token, as a batch layout gives them.

        Returns:
            (N, H) or (C, H).
        """
        pooling = self.head_record["pooling"]
        if pooling in ("mean", "max"):
            pooled = pool_rows(hidden, attention_mask, pooling)
            return pooled if last_index is None else pooled[last_index // hidden.shape[1]]
        if last_index is None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            columns = pooled_columns(input_ids, mask, pooling=pooling, eos_token_ids=self.eos_token_ids)
            return hidden[torch.arange(len(hidden), device=hidden.device), columns]
        if pooling == "last":
            last_index = last_index - is_eos(input_ids.reshape(-1)[last_index], self.eos_token_ids)
        return hidden.reshape(-1, hidden.shape[-1])[last_index]


def head_kind(path: str | os.PathLike[str]) -> str | None:
    """Return the kind of head that a local folder's model or adapter has; None for any other model."""
    for name in (ADAPTER_RECORD, "config.json"):
        if (file := Path(path, name)).is_file():
            found = read_json(file)
            record = found if name == ADAPTER_RECORD else found.get(RECORD)
            return record and record["kind"].replace("_", " ")
    return None


def _check_asked(path: str | os.PathLike[str], stored: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise on settings that contradict those that a head was trained with; None asks for nothing."""
    for name, value in asked.items():
        if value is not None and name in stored and stored[name] != value:
            raise ValueError(
                f"{path} was trained with {name}={stored[name]!r}, but {name}={value!r} was asked for; leave it out."
            )


@functools.cache
def _concrete_class(headed: Any, config_class: Any) -> Any:
    """Make the model class of `headed` for one architecture."""
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None)
    backbone: Any = MODEL_MAPPING.get(config_class, None)
    if causal is None or backbone is None:
        raise ValueError(f"{config_class.__name__} is not the config of a causal LM that transformers knows.")
    parent: Any = next(base for base in backbone.__mro__[1:] if issubclass(base, PreTrainedModel))
    members = {
        "base_model_prefix": causal.base_model_prefix,
        **class_members(parent, not_expected=[r"^lm_head\.", r"^embed_out\."], in_float32=headed.head_names),
        "__module__": headed.__module__,
    }
    return type(causal.__name__.removesuffix("ForCausalLM") + headed.__name__, (headed, parent), members)
