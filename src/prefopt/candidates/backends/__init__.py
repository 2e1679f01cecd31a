"""Interface of the generation backends: token ids in, finished answers out, the same settings for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

OnDone = Callable[[int, int], None]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: draw from the smallest set of tokens with this total probability; 1 draws from all.
        top_k: draw from the k most likely tokens; 0 draws from all.
        repetition_penalty: divides positive and multiplies negative logits of tokens that prompt or answer hold; 1 is
            off.
        stop_token_ids: each ends an answer.
    """

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class AnswerRequest:
    """One answer to sample: the prompt's ids, the token limit, and a seed for backends that draw per answer."""

    prompt_ids: list[int]
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class Completion:
    """One answer: text without the stop token, "stop" or "length", count and ids of its tokens with the stop token."""

    text: str
    finish_reason: str
    num_tokens: int
    token_ids: tuple[int, ...] | None = None


class Backend(Protocol):
    """Samples answers."""

    def complete(self, requests: Sequence[AnswerRequest], seed: int, on_done: OnDone) -> Sequence[Completion | None]:
        """Return one completion per request, in order; None for an answer that could not be used.

        Args:
            requests: the answers to make.
            seed: the shard's seed, for backends that draw all answers from one stream.
            on_done: called with the number of answers and of tokens that have just been finished.
        """
        ...


def completion_of(
    token_ids: Sequence[int], stop_token_ids: Iterable[int], tokenizer: PreTrainedTokenizerBase
) -> Completion:
    """Decode generated ids up to the first stop token, which is counted but not part of the text."""
    stops = set(stop_token_ids)
    end = next((place for place, token in enumerate(token_ids) if token in stops), None)
    ids = tuple(token_ids if end is None else token_ids[: end + 1])
    text = str(tokenizer.decode(list(ids if end is None else ids[:-1]), skip_special_tokens=True))
    return Completion(text, "length" if end is None else "stop", len(ids), ids)


def stop_ids_of(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, model: str, revision: str | None, more: Iterable[int]
) -> tuple[int, ...]:
    """Collect the ids that end an answer: the tokenizer's end token, those that the model declares, and `more`.

    Args:
        tokenizer: of the policy.
        config: of the model; it declares the end tokens where there is no generation config.
        model: folder or hub name; under an adapter, which declares none, its base.
        revision: of the hub model.
        more: further ids, from the recipe.
    """
    found = {*more}
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    try:
        declared = GenerationConfig.from_pretrained(model, revision=revision or "main").eos_token_id
    except OSError:  # many checkpoints have no generation_config.json
        declared = getattr(config.get_text_config(), "eos_token_id", None)
    found |= set(declared) if isinstance(declared, list) else {declared} - {None}
    return tuple(sorted(found))
