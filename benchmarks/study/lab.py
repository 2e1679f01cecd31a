"""What all experiments share: start policies, sampling, training with prefopt's trainers, scores, recorded units.

Everything that costs start-up time is made once per process: imports, tokenizer, and the start policies of a seed.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks.study.results import Results, Row
from benchmarks.study.world import (
    ERRORS,
    KINDS,
    LONGEST,
    Shape,
    Writer,
    assistant,
    draw_answer,
    make_tokenizer,
    teach,
    true_reward,
    user,
)
from prefopt.files import content_hash

VERSION = 1  # of the world, the sampling and the scores: raise it when they change, and everything runs again
MAX_NEW_TOKENS = 16
START_WRITER = Writer(on_topic=0.8, goes_on=0.75, remembers=0.7, lean=(3, 2, 2, 1, 1))


@dataclass(frozen=True)
class Scale:
    """Sizes that are part of every unit's settings.

    Attributes:
        shape: of the policies.
        prompts: training prompts of one round of pairs.
        test_prompts: prompts on which policies are scored, `answers` each.
        comparisons: annotated comparisons of a reward or preference model.
        learning_rate: of the policies where an experiment does not choose it.
    """

    shape: Shape = field(default_factory=Shape)
    prompts: int = 192
    test_prompts: int = 192
    answers: int = 4
    comparisons: int = 1200
    learning_rate: float = 1e-3


class OutOfTime(Exception):
    """The study's time is over; what is finished is recorded."""


class Missing(Exception):
    """A unit is not recorded, and this lab only reads."""


@dataclass
class Lab:
    """One process of the study.

    Attributes:
        results: the record.
        scale: sizes.
        device: "cpu" or "cuda".
        only_read: units that are not recorded raise `Missing` instead of running.
        deadline: on `time.monotonic`'s clock; no unit starts after it.
        seeds: at most this many of an experiment's seeds; None: all.
        quick: one candidate for every hyperparameter, as the point is that everything runs.
        policies: folder of the taught policies, which all experiments share; None: not kept.
        visited: units that this process has asked for and got, in order.
    """

    results: Results
    scale: Scale = field(default_factory=Scale)
    device: str = "cpu"
    only_read: bool = False
    deadline: float | None = None
    seeds: int | None = None
    quick: bool = False
    policies: Path | None = None
    visited: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokenizer = make_tokenizer()
        self.words = [self.tokenizer.decode([number]) for number in range(len(self.tokenizer))]
        self._memory: dict[Any, Any] = {}
        self._folder = tempfile.mkdtemp(prefix="study-")

    # ---- units

    def unit(self, settings: Row, work: Callable[[], Row]) -> Row:
        """Return the recorded unit with these settings, or run and record it.

        Raises:
            Missing: it is not recorded, and the lab only reads.
            OutOfTime: the deadline has passed.
        """
        settings = {**settings, "scale": asdict(self.scale), "device": self.device, "version": VERSION}
        settings["scale"]["shape"] = list(settings["scale"]["shape"].values())
        row = self.results.find(settings)
        if row is None:
            if self.only_read:
                raise Missing
            if self.deadline is not None and time.monotonic() > self.deadline:
                raise OutOfTime
            begin, used = time.monotonic(), time.process_time()
            with quiet():
                outcome = work()
            row = self.results.add(settings, outcome, time.monotonic() - begin, time.process_time() - used)
            shown = {k: v for k, v in settings.items() if k not in ("scale", "device", "version")}
            print(f"{time.strftime('%H:%M:%S')} {row['seconds']:6.1f} s  {shown}", flush=True)
        self.visited.append(row)
        return row

    def once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Make something once per seed (the second entry of `key`); what other seeds needed is dropped."""
        if key not in self._memory:
            self._memory = {known: value for known, value in self._memory.items() if known[1] == key[1]}
            self._memory[key] = make()
        return self._memory[key]

    # ---- prompts and policies

    def prompts(self, seed: int, count: int, *, skip: int = 0) -> list[str]:
        """Return training prompts of this seed; different `skip` give disjoint ones, none of them a test prompt."""
        everything = self._prompts(seed)[self.scale.test_prompts :]
        if skip + count > len(everything):
            raise ValueError(f"There are {len(everything)} training prompts, not {skip + count}.")
        return everything[skip : skip + count]

    def test_prompts(self, seed: int) -> list[str]:
        """Return the prompts on which policies of this seed are scored."""
        return self._prompts(seed)[: self.scale.test_prompts]

    def _prompts(self, seed: int) -> list[str]:
        def draw() -> list[str]:
            numbers = [f"{number:03d}" for number in range(1000)]
            everything = [" ".join([kind, *digits]) for kind in KINDS for digits in numbers]
            random.Random(f"prompts {seed}").shuffle(everything)
            return everything

        return self.once(("prompts", seed), draw)

    def policy(self, seed: int, writer: Writer = START_WRITER, *, pupil: int = 0) -> Any:
        """Return a policy that has been taught `writer`'s answers; never train it, only copies of it."""
        return self.once(("policy", seed, writer, pupil), lambda: self._taught(seed, writer, pupil))

    def _taught(self, seed: int, writer: Writer, pupil: int) -> Any:
        made = None
        if self.policies is not None:
            made = self.policies / content_hash(VERSION, seed, asdict(writer), pupil, asdict(self.scale.shape))
            if made.is_dir():
                return LlamaForCausalLM.from_pretrained(made).to(self.device).eval()
        policy = teach(
            Path(self._folder),
            self.tokenizer,
            seed=1000 * seed + pupil,
            writer=writer,
            shape=self.scale.shape,
            cpu=self.device == "cpu",
        )
        if made is not None:
            partial = made.with_name(f"{made.name}.{os.getpid()}")
            policy.save_pretrained(partial)
            try:
                partial.rename(made)
            except OSError:  # another process was faster
                shutil.rmtree(partial)
        return policy

    @staticmethod
    def copy(policy: Any) -> Any:
        """Return a new model of the same class with the same weights, without anything that a trainer put on it."""
        fresh = type(policy)(policy.config).to(policy.device, policy.dtype)
        fresh.load_state_dict(policy.state_dict())
        return fresh.eval()

    def sample(self, policy: Any, prompts: Sequence[str], answers: int, seed: int) -> list[list[str]]:
        """Sample answers to each prompt at temperature 1."""
        ids = self._prompt_ids(prompts).repeat_interleave(answers, 0).to(policy.device)
        torch.manual_seed(seed)
        with torch.no_grad():
            out = policy.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                max_new_tokens=MAX_NEW_TOKENS,
            )
        texts = self.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        return [texts[start : start + answers] for start in range(0, len(texts), answers)]

    def _prompt_ids(self, prompts: Sequence[str]) -> Tensor:
        chats = [user(prompt) for prompt in prompts]
        return self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )["input_ids"]

    # ---- training

    def train(self, trainer: type, config: type, model: nn.Module, rows: Sequence[Row], **settings: Any) -> Any:
        """Train a copy of `model` with one of prefopt's trainers; return the trainer."""
        usual = {
            "per_device_train_batch_size": 32,
            "learning_rate": self.scale.learning_rate,
            "num_train_epochs": 2,
            "use_cpu": self.device == "cpu",
            "bf16": False,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": "none",
            "logging_strategy": "no",
            "disable_tqdm": True,
        }
        args = config(self._folder, **{**usual, **settings})
        made = trainer(
            copy.deepcopy(model),
            args=args,
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=self.tokenizer,
        )
        made.train()
        made.model.eval()
        return made

    # ---- scores

    def score(
        self,
        policy: Any,
        start: Any,
        seed: int,
        keep: Callable[[Sequence[str]], Sequence[str]] = list,
    ) -> dict[str, float]:
        """Score a policy under the true rule, beside its KL to the start (nats an answer) and its length.

        The KL is the mean over the policy's own samples of the sum over tokens of KL(policy || start) at each, which
        has the mean of the sampled log-ratio and less noise. `keep` filters the test prompts.
        """
        prompts = keep(self.test_prompts(seed))
        answers = self.sample(policy, prompts, self.scale.answers, seed=7000 + seed)
        pairs = [(prompt, text) for prompt, texts in zip(prompts, answers) for text in texts]
        return {
            "reward": statistics.fmean(true_reward(prompt, text) for prompt, text in pairs),
            "kl": self.kl(policy, start, pairs),
            "words": statistics.fmean(len(text.split()) for _, text in pairs),
        }

    @torch.no_grad()
    def kl(self, policy: Any, start: Any, pairs: Sequence[tuple[str, str]]) -> float:
        """Compute the mean over answers of the policy of the summed KL(policy || start) of its tokens."""
        ids, mask, scored = (tensor.to(policy.device) for tensor in self.encode(pairs))
        mine, theirs = (model(ids, attention_mask=mask).logits.float().log_softmax(-1) for model in (policy, start))
        tokens = (mine.exp() * (mine - theirs)).sum(-1)[:, :-1] * scored[:, 1:]
        return float(tokens.sum(1).mean())

    @torch.no_grad()
    def logps(self, policy: Any, pairs: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        """Compute the log-probs (N,) of answers, and how many tokens each has, its end included."""
        ids, mask, scored = (tensor.to(policy.device) for tensor in self.encode(pairs))
        logps = policy(ids, attention_mask=mask).logits.float().log_softmax(-1)[:, :-1]
        tokens = logps.gather(-1, ids[:, 1:, None])[..., 0] * scored[:, 1:]
        return tokens.sum(1).cpu(), scored[:, 1:].sum(1).cpu()

    @torch.no_grad()
    def read(self, model: Any, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """Compute the rewards (N, 1) or embeddings (N, d) that a model with a head gives the answers."""
        ids, mask, _ = (tensor.to(model.device) for tensor in self.encode(pairs))
        if hasattr(model, "embeddings"):
            return model.embeddings(ids, mask)[0].float().cpu()
        return model.rewards(ids, mask).float().cpu()[:, None]

    def encode(self, pairs: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, attention mask and the mask of answer tokens, (N, T) each, padded on the right."""
        prompts = self._prompt_ids([prompt for prompt, _ in pairs]).tolist()
        known, end = self.tokenizer.get_vocab(), self.tokenizer.eos_token_id
        answers = [[known[word] for word in text.split()] + [end] for _, text in pairs]
        width = max(map(len, answers)) + len(prompts[0])
        ids = torch.full((len(pairs), width), self.tokenizer.pad_token_id)
        mask, scored = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, (prompt, answer) in enumerate(zip(prompts, answers)):
            ids[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
            mask[row, : len(prompt) + len(answer)] = 1
            scored[row, len(prompt) : len(prompt) + len(answer)] = 1
        return ids, mask, scored

    # ---- data

    def sampled_pairs(self, policy: Any, seed: int, count: int, name: str) -> list[Row]:
        """Draw up to `count` annotated pairs: the best and the worst of four samples of a policy to each prompt.

        Args:
            policy: whose samples.
            seed: of prompts and samples.
            count: how many; a quarter more prompts are asked, since some answers tie.
            name: of the annotator's draws, so that two sets do not share them.
        """
        prompts, rng = self.prompts(seed, count + count // 4), random.Random(f"{name} {seed}")
        rows: list[Row] = []
        for prompt, texts in zip(prompts, self.sample(policy, prompts, 4, seed=seed)):
            row = annotate(prompt, best_and_worst(prompt, texts), rng)
            rows += [row] if row is not None else []
        return rows[:count]

    def comparisons(
        self,
        seed: int,
        count: int,
        *,
        longest: int = LONGEST,
        writer: Writer = START_WRITER,
        errors: float = ERRORS,
        skip: int = 2000,
        prompts: int = 1000,
    ) -> list[Row]:
        """Draw annotated comparisons of a writer's answers: the better one by the true rule, wrong in some cases."""
        rng = random.Random(f"comparisons {seed} {skip}")
        asked = self.prompts(seed, prompts, skip=skip)
        rows: list[Row] = []
        while len(rows) < count:
            prompt = rng.choice(asked)
            row = annotate(prompt, [draw_answer(prompt, rng, longest, writer) for _ in range(2)], rng, errors=errors)
            rows += [row] if row is not None else []
        return rows


def annotate(prompt: str, texts: Sequence[str], rng: random.Random, *, errors: float = ERRORS) -> Row | None:
    """Make a pair of two answers, the better by the true rule chosen, wrong in `errors`; None where they tie."""
    first, second = sorted(texts, key=lambda text: -true_reward(prompt, text))
    if true_reward(prompt, first) == true_reward(prompt, second):
        return None
    if rng.random() < errors:
        first, second = second, first
    return pair_row(prompt, first, second)


def best_and_worst(prompt: str, texts: Sequence[str]) -> tuple[str, str]:
    """Return the best and the worst of some answers under the true rule, the first of equals."""
    return max(texts, key=lambda text: true_reward(prompt, text)), min(
        texts, key=lambda text: true_reward(prompt, text)
    )


def pair_row(prompt: str, chosen: str, rejected: str, **columns: Any) -> Row:
    """Make a row of preference data."""
    return {"prompt": user(prompt), "chosen": assistant(chosen), "rejected": assistant(rejected), **columns}


@contextlib.contextmanager
def quiet() -> Any:
    """Drop what trainers print."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield
