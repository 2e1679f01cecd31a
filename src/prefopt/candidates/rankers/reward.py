"""Reward models with one score per answer: any of transformers' sequence classifiers, ArmoRM's kind, and prefopt's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PretrainedConfig

from prefopt.arguments import setting
from prefopt.candidates.pairs import Array
from prefopt.candidates.rankers.base import (
    Answer,
    LengthOptions,
    Ranker,
    Request,
    Tally,
    encode_answers,
    form_of_model,
    load_tokenizer,
    longest_input,
    pad,
    plain_text,
    positions_of,
    score_answers,
)
from prefopt.models.gated_reward import ARCHITECTURE, GatedRewardModel
from prefopt.models.heads import RECORD
from prefopt.models.reward import RewardModel


@dataclass
class RewardOptions(LengthOptions):
    """Options of reward models."""

    trust_remote_code: bool = setting(False, "reward-model: run the Python code that comes with the model.")


class RewardRanker(Ranker):
    """Scores (R,) from a reward model that reads prompt and answer under its own chat template.

    The score is the model's `score` output where it has one (ArmoRM: many objectives, one gated score), else its
    single logit.
    """

    options: ClassVar[type] = RewardOptions

    def __init__(self, options: Any) -> None:
        self.path, self.device, self.tokens_per_batch = options.path, options.device, options.tokens_per_batch
        self.tokenizer = load_tokenizer(self.path, trust_remote_code=options.trust_remote_code)
        model = _load(self.path, self.tokenizer, options.torch_dtype, options.trust_remote_code)
        self.form = form_of_model(model, self.tokenizer, self.path)
        self.model = model.to(self.device).eval()
        self.max_length = longest_input(
            self.path, options.max_length, positions_of(self.model.config), self.tokenizer.model_max_length
        )
        self.reads_pairs = not self.tokenizer.chat_template and None not in (
            self.tokenizer.cls_token_id,
            self.tokenizer.sep_token_id,
        )

    def rank(self, requests: Sequence[Request], tally: Tally) -> list[Array]:
        """See `Ranker.rank`."""
        scores = score_answers(
            self.encode(requests, tally), self._forward, tokens_per_batch=self.tokens_per_batch, tally=tally
        )
        return [row.double().numpy() for row in scores]

    def encode(self, requests: Sequence[Request], tally: Tally) -> list[list[Answer]]:
        """Return the token ids that the model reads."""
        if self.reads_pairs:
            return [self._encode_pairs(request, tally) for request in requests]
        return encode_answers(requests, self.tokenizer, self.max_length, tally, form=self.form)

    def _encode_pairs(self, request: Request, tally: Tally) -> list[Answer]:
        """Encode prompt and answer as a pair of texts, for encoders without a template; the longer is cut first."""
        texts = [plain_text(request.prompt)] * len(request.candidates), request.candidates
        whole = self.tokenizer(*texts, verbose=False)["input_ids"]
        cut = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        tally.count("prompts")
        tally.count("answers", len(whole))
        tally.count("truncated answers", sum(len(short) < len(full) for short, full in zip(cut["input_ids"], whole)))
        types = cut.get("token_type_ids") or [None] * len(whole)
        return [Answer(ids, 0, kinds) for ids, kinds in zip(cut["input_ids"], types)]

    def _forward(self, answers: list[Answer]) -> Tensor:
        pad_id = _pad_id(self.model.config, self.tokenizer, answers)
        input_ids, mask = pad([answer.ids for answer in answers], pad_id, self.device)
        types = {}
        if answers[0].types is not None:
            types["token_type_ids"] = pad([answer.types or [] for answer in answers], 0, self.device)[0]
        output = self.model(input_ids=input_ids, attention_mask=mask, **types)
        if "score" in output:
            return output["score"].reshape(len(answers))
        if output.logits.shape != (len(answers), 1):
            raise ValueError(
                f"{self.path} gives {output.logits.shape[-1]} outputs per answer and no `score`: it is not a reward "
                "model with one score."
            )
        return output.logits[:, 0]


def _load(path: str, tokenizer: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    is_adapter = Path(path, "adapter_config.json").is_file()
    config = {} if is_adapter else PretrainedConfig.get_config_dict(path)[0]
    if is_adapter or config.get(RECORD):
        return RewardModel.from_pretrained(path, dtype=dtype)
    if ARCHITECTURE in (config.get("architectures") or ()):
        return GatedRewardModel.load(path, tokenizer, dtype=dtype)
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a sequence classification model: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{path} has no trained classification head ({', '.join(missing[:3])} not found): it is not a reward "
            "model. For PairRM use `ranker: pair-rm`, for a general preference model `ranker: general-preference`."
        )
    return model


def _pad_id(config: Any, tokenizer: Any, answers: list[Answer]) -> int:
    """Return the pad id. Classifiers find the last token by it, so without one an id is taken that the batch lacks."""
    known = config.get_text_config().pad_token_id
    if known is not None:
        return int(known)
    used = {token for answer in answers for token in answer.ids}
    config.pad_token_id = next(token for token in range(len(used) + 1) if token not in used)
    return int(config.pad_token_id)
