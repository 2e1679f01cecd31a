"""Part b: how fast is it? Each function is a group that runs in a process of its own.

Steps are those of an 8B Llama with random weights and 8 pairs: whole on a card of 120 GiB or more, else 8 and 16 of
its layers at full width. Precision "plain" trains bf16 weights as they are, in both libraries; "recipes" keeps the
updates that rounding would lose, as prefopt does by default (float32 master copies where they fit, else stochastic
rounding), and gives TRL's optimizer the same.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.on_gpu.common import WHOLE_8B_GIB, Card
from benchmarks.on_gpu.findings import Findings
from benchmarks.steps import Setting, draw_lengths, figures, measure
from prefopt import memory
from prefopt.scoring.attention import packed_attention
from prefopt.scoring.layouts import Group, PackedLayout
from prefopt.trainers.checkpointing import recomputation_of
from prefopt.trainers.fitting import run_of

TRL_TRIES = ((4, "all"), (2, "none"), (8, "all"))  # micro-batch, recomputation


def _base(card: Card) -> Setting:
    return Setting(
        size=card.pick("8b", "tiny"),
        device=card.device,
        dtype="bfloat16",
        max_length=card.pick(2048, 64),
        steps=card.pick(6, 1),
        warmup=card.pick(2, 1),
        fused_layers=card.why_not("liger_kernel") is None,
        checkpointing="auto",
    )


def _layers(card: Card) -> tuple[int | None, ...]:
    """Return the layer counts that fit: all, or two to extrapolate from."""
    if card.is_dry:
        return (None,)
    return (None,) if card.gib > WHOLE_8B_GIB else (8, 16)


def _step(findings: Findings, card: Card, setting: Setting, **more: Any) -> dict | None:
    """Measure one setting; return its figures, or None where it failed."""
    layers = f", {setting.layers} layers" if setting.layers else ""
    name = f"{setting.library} {setting.micro_batch} a batch, {setting.lengths}, {setting.checkpointing}"
    got: dict | None = None
    inspect = _memory if setting.library == "prefopt" else None
    with findings.finding(f"{name}, {setting.precision}{layers}") as values:
        values["setting"] = dataclasses.asdict(setting)
        started = float(os.environ["PREFOPT_STARTED"]) if not _step_done else None
        _step_done.append(True)
        got = measure(setting, started=started, inspect=inspect, **more)
        values |= got | figures([got])
    card.free()
    return got


_step_done: list[bool] = []  # only the first run of a process starts with it


# ---- steps


def step_prefopt(findings: Findings, card: Card) -> None:
    """Prefopt's step: UltraFeedback's lengths, where its time goes, then HH's, then with everything recomputed."""
    kinds = _Profile(findings, card)
    for layers in _layers(card):
        first = dataclasses.replace(_base(card), layers=layers)
        _step(findings, card, first, profiled=kinds.start)
    kinds.report()
    for layers in _layers(card):
        _step(findings, card, dataclasses.replace(first, layers=layers, lengths="hh"))
    for layers in _layers(card):
        _step(findings, card, dataclasses.replace(first, layers=layers, checkpointing="all"))


def step_trl(findings: Findings, card: Card) -> None:
    """TRL's step at three micro-batches, and its best one again at HH's lengths."""
    tries = card.pick(TRL_TRIES, ((4, "none"), (2, "all")))
    best: tuple[float, int, str] | None = None
    for size, mode in tries:
        times = []
        for layers in _layers(card):
            got = _step(findings, card, _trl(card, size, mode, layers))
            times.append(figures([got])["step_ms"] if got else float("inf"))
        best = min(best or (float("inf"), size, mode), (times[-1], size, mode))
    assert best is not None
    for layers in _layers(card):
        _step(findings, card, dataclasses.replace(_trl(card, *best[1:], layers), lengths="hh"))


def _trl(card: Card, size: int, mode: str, layers: int | None) -> Setting:
    return dataclasses.replace(
        _base(card), library="trl", layout="padded", micro_batch=size, checkpointing=mode, layers=layers
    )


def step_recipes(findings: Findings, card: Card) -> None:
    """Both libraries in the precision of recipes."""
    layers = _layers(card)[-1]
    ours = dataclasses.replace(_base(card), precision="recipes", layers=layers)
    _step(findings, card, ours)
    size, mode = card.pick(TRL_TRIES[0], (4, "none"))
    _step(findings, card, dataclasses.replace(_trl(card, size, mode, layers), precision="recipes"))


def _memory(trainer: Any) -> dict[str, Any]:
    """Estimate what the run needs, as `checkpointing: auto` and `prefopt check` do, to compare with the peak."""
    way, tokens = recomputation_of(trainer.args), trainer.training_plan().heaviest()
    estimate = memory.estimate(run_of(trainer), way, tokens=tokens, scored_tokens=tokens)
    return {
        "recomputed": str(way),
        "estimated_gib": {name: size / 2**30 for name, size in estimate.parts.items()},
        "estimated_sum_gib": estimate.total / 2**30,
    }


# ---- where a step's time goes

KINDS = {  # a kernel belongs to the first kind of which a word is in its name
    "attention": ("flash", "fmha", "flex"),
    "log-probs": ("_forward_kernel", "_backward_kernel", "logprob"),
    "optimizer": ("adam", "multi_tensor", "foreach"),
    "fused layers": ("rms_norm", "swiglu", "rope"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "mm", "cublas"),
    "copies": ("copy", "memcpy", "memset", "fill", "cat"),
    "indexing": ("index", "gather", "scatter"),
    "reductions": ("reduce", "sum", "norm"),
}


def kind_of(kernel: str) -> str:
    """Return the kind of a kernel from its name."""
    name = kernel.lower()
    return next(
        (kind for kind, words in KINDS.items() if any(word in name for word in words)), "elementwise and other"
    )


class _Profile:
    """Profiles one step, and adds up its kernels by kind."""

    def __init__(self, findings: Findings, card: Card) -> None:
        self.findings, self.card = findings, card
        self.profile: Any = None

    def start(self) -> Any:
        """Make the profiler of one step."""
        from torch.profiler import ProfilerActivity, profile

        kinds = self.card.pick([ProfilerActivity.CPU, ProfilerActivity.CUDA], [ProfilerActivity.CPU])
        self.profile = profile(activities=kinds)
        return self.profile

    def report(self) -> None:
        """Write the milliseconds of each kind, and the profiler's own table beside the findings."""
        with self.findings.finding("profile") as values:
            if self.profile is None:
                raise RuntimeError("no step was profiled")
            field = self.card.pick("self_device_time_total", "self_cpu_time_total")
            events = self.profile.key_averages()
            spent: dict[str, float] = {}
            for event in events:
                if (microseconds := getattr(event, field)) > 0:
                    kind = kind_of(event.key)
                    spent[kind] = spent.get(kind, 0.0) + microseconds / 1000
            values["milliseconds_by_kind"] = spent
            text = events.table(sort_by=field, row_limit=60)
            Path(self.findings.file.parent, "profile.txt").write_text(text)


# ---- attention alone


def attention_speed(findings: Findings, card: Card) -> None:
    """One layer's attention over packed pairs at several row lengths: two calls and a merge, and FlexAttention."""
    lengths = card.pick((2048, 8192, 16384), (96,))
    cases = [(tokens, _row(card, tokens)) for tokens in lengths]
    for tokens, groups in cases:
        _attention(findings, card, f"two calls and a merge, {tokens}", groups, _varlen)
    for tokens, groups in cases:
        _attention(findings, card, f"FlexAttention, {tokens}", groups, _flex)


def _row(card: Card, tokens: int) -> list[Group]:
    """Return groups of UltraFeedback's lengths that fill a row of this many tokens, the last one cut."""
    groups: list[Group] = []
    left = tokens
    for prompt, chosen, rejected in draw_lengths("ultrafeedback", tokens, max_length=card.pick(2048, 64), seed=0):
        if left < prompt + 2:
            break
        first = min(chosen, left - prompt - 1)
        second = min(rejected, left - prompt - first)
        groups.append(Group([1] * prompt, ([1] * first, [1] * second)))
        left -= groups[-1].shared_length
    if left:
        groups.append(Group([1] * (left - 1), ([1],)) if left > 1 else Group([1], ([1],)))
    return groups


def _attention(findings: Findings, card: Card, name: str, groups: list[Group], make: Any) -> None:
    heads, key_heads, width = card.pick((32, 8, 128), (4, 2, 16))
    with findings.finding(name) as values:
        batch = PackedLayout(0).collate([groups])
        rows = batch["attention_mask"].to(card.device)
        shapes = [(1, count, rows.length, width) for count in (heads, key_heads, key_heads)]
        inputs = [
            torch.randn(s, device=card.device, dtype=torch.bfloat16, requires_grad=not card.is_dry or make is _varlen)
            for s in shapes
        ]
        function = make(card, groups, rows)
        seconds = card.median_seconds(lambda: function(*inputs), repeat=1, warm=0)
        forward = card.median_seconds(lambda: function(*inputs))
        values |= {"tokens": rows.length, "forward_ms": 1000 * forward, "compile_seconds": max(0.0, seconds - forward)}
        if inputs[0].requires_grad:
            both = card.median_seconds(lambda: function(*inputs).sum().backward())
            scores = sum(_scores(group) for group in groups)
            values["both_ms"] = 1000 * both
            values["exact_tflops"] = 3.5 * 4 * scores * heads * width / both / 1e12
    card.free()


def _scores(group: Group) -> float:
    """Count the pairs of a query and a key that it sees."""
    prompt = len(group.prompt)
    own = prompt * (prompt + 1) / 2
    return own + sum(len(c) * (len(c) + 1) / 2 + len(c) * prompt for c in group.completions)


def _varlen(card: Card, groups: list[Group], rows: Any) -> Any:
    module = torch.nn.Module()
    return lambda query, key, value: packed_attention(module, query, key, value, rows)[0]


def _flex(card: Card, groups: list[Group], rows: Any) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    group_ids, branches = [], []
    for number, group in enumerate(groups):
        group_ids += [number] * group.shared_length
        branches += [0] * len(group.prompt)
        for branch, completion in enumerate(group.completions, 1):
            branches += [branch] * len(completion)
    place, branch = (torch.tensor(each, device=card.device) for each in (group_ids, branches))

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        prompt_or_own = (branch[key] == 0) | (branch[key] == branch[query])
        return (query >= key) & (place[query] == place[key]) & prompt_or_own

    mask = create_block_mask(sees, None, None, rows.length, rows.length, device=card.device)
    function = flex_attention if card.is_dry else torch.compile(flex_attention, dynamic=False)
    return lambda query, key, value: function(query, key, value, block_mask=mask, enable_gqa=True)
