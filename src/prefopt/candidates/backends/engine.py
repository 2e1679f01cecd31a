"""Generation with vLLM's offline engine; it is given token ids, so that a templated prompt gets no second BOS."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt.candidates.backends import AnswerRequest, Completion, OnDone, Sampling, completion_of


class EngineBackend:
    """Draws with `vllm.LLM`, each answer with its own seed.

    Args:
        model: folder or hub name.
        tokenizer: decodes the answers, as for the other backends.
        sampling: how tokens are drawn.
        options: further arguments of `vllm.LLM`, for loading and running the model.

    Raises:
        ValueError: vLLM is not installed.
    """

    def __init__(
        self, model: str, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, options: Mapping[str, Any]
    ) -> None:
        vllm = import_vllm()
        self.parameters: Any = vllm.SamplingParams
        # the model's own sampling defaults must not replace the recipe's
        self.engine: Any = vllm.LLM(model=model, generation_config="vllm", **options)
        self.tokenizer = tokenizer
        self.sampling = sampling

    def complete(self, requests: Sequence[AnswerRequest], seed: int, on_done: OnDone) -> list[Completion]:
        """See `Backend.complete`."""
        outputs = self.engine.generate(
            [{"prompt_token_ids": request.prompt_ids} for request in requests],
            [self._parameters(request) for request in requests],
            use_tqdm=False,
        )
        completions = []
        for output in outputs:
            (answer,) = output.outputs
            if answer.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"vLLM ended an answer with {answer.finish_reason!r}.")
            completions.append(completion_of(answer.token_ids, self.sampling.stop_token_ids, self.tokenizer))
        on_done(len(completions), sum(completion.num_tokens for completion in completions))
        return completions

    def _parameters(self, request: AnswerRequest) -> Any:
        return self.parameters(
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            top_k=self.sampling.top_k or -1,
            repetition_penalty=self.sampling.repetition_penalty,
            stop_token_ids=list(self.sampling.stop_token_ids),
            max_tokens=request.max_new_tokens,
            seed=request.seed,
            detokenize=False,
        )


def check_vllm() -> None:
    """Raise a ValueError where vLLM is not installed; importing it takes long, and sets up devices."""
    if importlib.util.find_spec("vllm") is None:
        import_vllm()


def import_vllm() -> Any:
    """Import and return the vllm module.

    Raises:
        ValueError: it is not installed here.
    """
    try:
        import vllm
    except ImportError as error:
        raise ValueError(
            f'backend "vllm" needs vLLM, which cannot be imported here ({error}): `pip install prefopt[vllm]`, best '
            'in a separate environment; or use backend "transformers" or "server".'
        ) from error
    return vllm
