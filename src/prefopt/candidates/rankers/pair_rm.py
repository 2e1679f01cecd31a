"""PairRM as a ranker: all ordered pairs of all prompts, batched by length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, DebertaV2Config, DebertaV2Model

from prefopt.candidates.pairs import Array
from prefopt.candidates.rankers.base import (
    ModelOptions,
    Ranker,
    Request,
    Tally,
    length_batches,
    load_tokenizer,
    ordered_pairs,
    pad,
    plain_text,
)
from prefopt.files import read_json

SOURCE = "<|source|>"
FIRST = "<|candidate1|>"
SECOND = "<|candidate2|>"
CANDIDATE = "<|candidate|>"
MARKERS = [SOURCE, FIRST, SECOND, CANDIDATE]  # in the order in which the published vocabulary got them
MARKER_POSITION = 1  # every part starts with [CLS] and its marker


@dataclass(frozen=True)
class Limits:
    """Tokens, [CLS], marker and [SEP] included, that are read of a prompt and of each candidate.

    A candidate may use `candidate` tokens and half of what its prompt leaves unused of `source`, so that prompt and
    two candidates never exceed source + 2 candidate (2048 for the published model).
    """

    source: int = 1224
    candidate: int = 412


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of a prompt and of its candidates (their marker is still the neutral one), and which were cut."""

    source: list[int]
    candidates: list[list[int]]
    source_cut: bool
    candidates_cut: list[bool]


class PairRanker(nn.Module):
    """Scores ordered pairs of candidates with a DeBERTa-v2/v3 encoder and a two-layer head.

    Formula: with h(.) the encoder's last hidden state at a marker, f a two-layer head, x the prompt, a and b
    candidates, logit(a beats b) = mean over tasks of f([h(x); h(a)]) - f([h(x); h(b)]), all read in one sequence
    [CLS]<|source|>x[SEP][CLS]<|candidate1|>a[SEP][CLS]<|candidate2|>b[SEP].

    Parameter names are those of the published weights (`pretrained_model.*`, `head_layer.*`).

    Reference: arXiv 2306.02561; weights llm-blender/PairRM and llm-blender/PairRM-hf.
    """

    def __init__(
        self,
        config: DebertaV2Config,
        tokenizer: Any,
        *,
        num_tasks: int = 1,
        dropout: float = 0.05,
        limits: Limits | None = None,
    ):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.limits = limits or Limits()
        self.pretrained_model = DebertaV2Model(config)
        width = config.hidden_size
        self.head_layer = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(width, num_tasks),
        )
        ids = tokenizer.convert_tokens_to_ids(MARKERS)
        if len(set(ids)) < len(MARKERS) or max(ids) >= config.vocab_size:
            raise ValueError(
                f"The tokenizer and the weights ({config.vocab_size} embeddings) do not know the markers {MARKERS}."
            )
        self.source_id, self.first_id, self.second_id, self.candidate_id = ids

    @classmethod
    def from_pretrained(
        cls, path: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32
    ) -> PairRanker:
        """Load a ranker in either published layout, for inference.

        Args:
            path: a folder or hub name. Layout of llm-blender/PairRM: `config.json` with `ranker_type: pairranker`, and
                the backbone's config and tokenizer under `model_name`; layout of PairRM-hf: the backbone's own config
                with `n_tasks`.
            revision: of the hub repository.
            dtype: of the weights.

        Raises:
            ValueError: the folder holds no pair ranker, or its weights do not fit.
        """
        folder = Path(path)
        if not folder.is_dir():
            patterns = ["*.json", "*.model", "model.safetensors", "pytorch_model.bin"]
            folder = Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
        if not (folder / "config.json").exists():
            raise ValueError(f"{folder} holds no config.json.")
        described = read_json(folder / "config.json")
        weights = _read_weights(folder)
        if described.get("ranker_type") == "pairranker":
            backbone = AutoConfig.from_pretrained(described["model_name"])
            tokenizer = load_tokenizer(described["model_name"])
            limits = Limits(described["source_maxlength"], described["candidate_maxlength"])
        elif described.get("model_type") == "deberta-v2" and "source_prefix_id" in described:
            backbone = DebertaV2Config.from_pretrained(folder)
            tokenizer = load_tokenizer(str(folder))
            limits = Limits()
        else:
            raise ValueError(
                f"{path} holds no PairRM ranker: its config.json describes {described.get('model_type')!r}."
            )
        if backbone.model_type != "deberta-v2":
            raise ValueError(f"{path}: only DeBERTa-v2/v3 backbones are supported, found {backbone.model_type!r}.")
        tokenizer.add_tokens(MARKERS)  # no-op where the tokenizer has them
        embeddings = weights.get("pretrained_model.embeddings.word_embeddings.weight")
        backbone.vocab_size = len(embeddings) if embeddings is not None else backbone.vocab_size
        model = cls(backbone, tokenizer, num_tasks=described["n_tasks"], dropout=described["drop_out"], limits=limits)
        _load(model, weights, path)
        return model.to(dtype).eval()

    def encode(self, prompt: str, candidates: Sequence[str]) -> EncodedPrompt:
        """Tokenise a prompt and its candidates, each cut on the right to what `limits` leaves it."""
        source, source_cut = self._encode_part(SOURCE + prompt, self.limits.source)
        limit = self.limits.candidate + (self.limits.source - len(source)) // 2
        parts = [self._encode_part(CANDIDATE + text, limit) for text in candidates]
        return EncodedPrompt(source, [ids for ids, _ in parts], source_cut, [cut for _, cut in parts])

    def _encode_part(self, text: str, limit: int) -> tuple[list[int], bool]:
        sep = self.tokenizer.sep_token
        ids = self.tokenizer.encode(text.replace(sep, " "), verbose=False)
        cut = len(ids) > limit
        return ([*ids[: limit - 1], self.tokenizer.sep_token_id] if cut else ids), cut

    @staticmethod
    def pair_length(prompt: EncodedPrompt, first: int, second: int) -> int:
        """Count the tokens of one ordered pair's input."""
        return len(prompt.source) + len(prompt.candidates[first]) + len(prompt.candidates[second])

    def pair_ids(self, prompt: EncodedPrompt, first: int, second: int) -> tuple[list[int], list[int]]:
        """Return the input of one ordered pair: its token ids and the positions of its three markers."""
        parts = [list(prompt.source), list(prompt.candidates[first]), list(prompt.candidates[second])]
        positions, length = [], 0
        for part, marker in zip(parts, (self.source_id, self.first_id, self.second_id)):
            assert part[MARKER_POSITION] in (marker, self.candidate_id)
            part[MARKER_POSITION] = marker
            positions.append(length + MARKER_POSITION)
            length += len(part)
        return [token for part in parts for token in part], positions

    def forward(self, input_ids: Tensor, attention_mask: Tensor, marker_positions: Tensor) -> Tensor:
        """Compute the logits that the first candidate of each pair beats the second.

        Args:
            input_ids: (N, T), padded on the right.
            attention_mask: (N, T).
            marker_positions: (N, 3), positions of the markers of source, first and second candidate.

        Returns:
            (N,)
        """
        hidden = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        index = marker_positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        source, first, second = hidden.gather(1, index).unbind(dim=1)
        better = self.head_layer(torch.cat([source, first], dim=-1)) - self.head_layer(
            torch.cat([source, second], dim=-1)
        )
        return better.mean(dim=-1)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    if (folder / "pytorch_model.bin").exists():
        return torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    raise ValueError(f"{folder} holds neither model.safetensors nor pytorch_model.bin.")


def _load(model: PairRanker, weights: dict[str, Tensor], path: str) -> None:
    # older checkpoints carry the positions buffer, which is no weight
    weights = {name: value for name, value in weights.items() if not name.endswith("position_ids")}
    expected = model.state_dict()
    wrong = [name for name, value in expected.items() if name not in weights or weights[name].shape != value.shape]
    wrong += [name for name in weights if name not in expected]
    if wrong:
        raise ValueError(
            f"The weights in {path} are not those of a PairRM ranker: {len(wrong)} names differ, such as {wrong[0]!r}."
        )
    model.load_state_dict(weights)


class PairRMRanker(Ranker):
    """Tables (R, R) of logits that the first candidate of an ordered pair beats the second; both orders are run."""

    options: ClassVar[type] = ModelOptions
    accelerated_dtype: ClassVar[torch.dtype] = torch.float16  # as published

    def __init__(self, options: Any) -> None:
        self.device, self.tokens_per_batch = options.device, options.tokens_per_batch
        self.model = PairRanker.from_pretrained(options.path, dtype=options.torch_dtype).to(self.device)

    def rank(self, requests: Sequence[Request], tally: Tally) -> list[Array]:
        """See `Ranker.rank`."""
        prompts = [self._encode(request, tally) for request in requests]
        tables = [np.zeros((len(request.candidates),) * 2) for request in requests]
        pairs = ordered_pairs(requests)
        lengths = [self.model.pair_length(prompts[row], first, second) for row, first, second in pairs]
        for batch in length_batches(lengths, self.tokens_per_batch):
            inputs = [self.model.pair_ids(prompts[pairs[n][0]], *pairs[n][1:]) for n in batch]
            input_ids, mask = pad([ids for ids, _ in inputs], self.model.tokenizer.pad_token_id, self.device)
            markers = torch.tensor([positions for _, positions in inputs], device=self.device)
            with torch.inference_mode():
                logits = self.model(input_ids, mask, markers).double().cpu().tolist()
            for index, logit in zip(batch, logits, strict=True):
                row, first, second = pairs[index]
                tables[row][first, second] = logit
            tokens = sum(lengths[index] for index in batch)
            tally.count("tokens", tokens)
            tally.advance(rows=len(batch) * len(requests) / len(pairs), tokens=tokens)
        return tables

    def _encode(self, request: Request, tally: Tally) -> EncodedPrompt:
        prompt = self.model.encode(plain_text(request.prompt), request.candidates)
        tally.count("prompts")
        tally.count("answers", len(request.candidates))
        tally.count("truncated prompts", int(prompt.source_cut))
        tally.count("truncated answers", sum(prompt.candidates_cut))
        return prompt
