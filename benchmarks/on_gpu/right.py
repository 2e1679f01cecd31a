"""Part a: is it right? Each function is a group that runs in a process of its own, most valuable checks first.

What is right is what a slower way computes: attention under a dense mask in float64, padded rows under SDPA, whole
logits, an uninterrupted run. In 16 bits an error may be as large as that of the slower way in the same 16 bits.
"""

from __future__ import annotations

import functools
import importlib.metadata
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import LlamaConfig

import prefopt
from benchmarks import trajectories
from benchmarks.on_gpu.common import Card, error_of, to_device
from benchmarks.on_gpu.findings import Findings
from benchmarks.steps import make_tokenizer
from prefopt.scoring.attention import PackedRows, packed_attention
from prefopt.scoring.layouts import Group, PackedLayout, PaddedLayout
from prefopt.scoring.logprobs import install_scoring, score_completions, token_logps
from prefopt.trainers.checkpointing import MODES

PACKAGES = ("torch", "triton", "transformers", "trl", "accelerate", "peft", "liger_kernel", "bitsandbytes")


# ---- the device, attention, the LM head


def kernels(findings: Findings, card: Card) -> None:
    """Check what everything else stands on: attention, the LM head, and both within models."""
    _device(findings, card)
    _attention(findings, card)
    _head(findings, card)
    _models(findings, card)


def _device(findings: Findings, card: Card) -> None:
    with findings.finding("device") as values:
        size = card.pick(8192, 256)
        a, b = (torch.randn(size, size, device=card.device, dtype=torch.bfloat16) for _ in range(2))
        source = torch.empty(card.pick(2**30, 2**16), device=card.device, dtype=torch.int32)
        target = torch.empty_like(source)
        values["name"] = "CPU" if card.is_dry else torch.cuda.get_device_name()
        values["gib"] = card.gib
        values["versions"] = {name: _version(name) for name in PACKAGES}
        values["matrix_flops"] = 2 * size**3 / card.median_seconds(lambda: a @ b, repeat=10)
        values["copied_bytes_per_second"] = 2 * source.nbytes / card.median_seconds(lambda: target.copy_(source))
        if not card.is_dry:
            values["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _attention(findings: Findings, card: Card) -> None:
    """Packed attention and its gradients against a dense mask in float64, no worse than SDPA in the same 16 bits."""
    long, short = card.pick((700, 1300, 60), (12, 17, 5)), card.pick((5, 1, 130), (3, 1, 4))
    two = [[Group([1] * p, [[1] * c, [1] * r]) for p, c, r in (long, short)]]
    three = [[Group([1] * 40, [[1] * 30, [1] * 1, [1] * 200])], [Group([1] * 9, [[1] * 150])]]
    ones = [[Group([1] * n, [[1]]) for n in (30, 1, 17)]]  # every completion one token: one query a sequence
    cases: dict[str, tuple[list, int, int, int, str, bool]] = {  # rows, heads, key heads, width, dtype, sinks
        "two completions": (two, 8, 2, 128, "bfloat16", False),
        "heads of 64": (two, 8, 8, 64, "bfloat16", False),
        "heads of 256, one of keys": (two, 4, 1, 256, "bfloat16", False),
        "float16": (two, 8, 2, 128, "float16", False),
        "float32": (two, 8, 2, 128, "float32", False),
        "sinks": (two, 8, 2, 64, "bfloat16", True),
        "three completions, two rows": (three, 8, 4, 128, "bfloat16", False),
        "one token each": (ones, 8, 2, 128, "bfloat16", False),
    }
    for name, (rows, heads, key_heads, width, dtype, sinks) in cases.items():
        with findings.finding(f"attention, {name}") as values:
            packed = PackedLayout(0).collate(rows)["attention_mask"]
            shapes = [(packed.rows, count, packed.length, width) for count in (heads, key_heads, key_heads)]
            generator = torch.Generator().manual_seed(0)
            inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
            inputs += [torch.linspace(-2, 2, heads, dtype=torch.float64)] if sinks else []
            upstream = torch.randn(packed.rows, packed.length, heads, width, generator=generator)
            exact = _dense(packed, [each.to(card.device) for each in inputs], upstream, torch.float64)
            kind = getattr(torch, dtype)
            theirs = _dense(packed, [each.to(card.device) for each in inputs], upstream, kind)
            leaves = [each.to(card.device, kind).requires_grad_() for each in inputs]
            out, _ = packed_attention(
                torch.nn.Module(), *leaves[:3], packed.to(card.device), s_aux=leaves[3] if sinks else None
            )
            grads = torch.autograd.grad(out, leaves, upstream.to(card.device, kind))
            for label, ours, other, truth in zip(("out", "dq", "dk", "dv", "dsinks"), (out, *grads), theirs, exact):
                values[f"{label}_error"], values[f"{label}_error_of_sdpa"] = (
                    error_of(ours, truth),
                    error_of(other, truth),
                )
                allowed = 1.5 * values[f"{label}_error_of_sdpa"] + (1e-5 if dtype == "float32" else 2e-3)
                values["ok"] = values.get("ok", True) and values[f"{label}_error"] <= allowed


def _dense(rows: PackedRows, inputs: list[Tensor], upstream: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return output (N, T, H, D) and gradients of SDPA, or of plain softmax with sinks, under the dense mask."""
    device = inputs[0].device
    leaves = [each.to(dtype).requires_grad_() for each in inputs]
    query, key, value = leaves[:3]
    repeats = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(repeats, dim=1) for each in (key, value))
    mask = dense_mask(rows).to(device)
    if len(leaves) == 3:
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    else:
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        column = leaves[3][None, :, None, None].expand(*scores.shape[:3], 1)
        whole = torch.cat([scores.masked_fill(~mask, float("-inf")), column], dim=-1)
        out = whole.softmax(-1)[..., :-1] @ value
    out = out.transpose(1, 2)
    return [out, *torch.autograd.grad(out, leaves, upstream.to(device, dtype))]


def dense_mask(rows: PackedRows) -> Tensor:
    """Return the (N, 1, T, T) mask that packed rows stand for: True where a query sees a key."""
    total = rows.rows * rows.length
    sees = torch.zeros(total, total, dtype=torch.bool)
    bounds = rows.segments.queries
    for begin, end in pairwise(bounds):
        sees[begin:end, begin:end] = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
    if rows.completions is not None:
        asks, keys = rows.completions.queries, rows.completions.keys
        for number in range(len(asks) - 1):
            queries = rows.completion_index[asks[number] : asks[number + 1]]
            sees[queries[:, None], rows.prompt_index[keys[number] : keys[number + 1]]] = True
    blocks = sees.view(rows.rows, rows.length, rows.rows, rows.length)
    return torch.stack([blocks[row, :, row] for row in range(rows.rows)])[:, None]


def _head(findings: Findings, card: Card) -> None:
    """Token log-probs and their gradients from the tiled kernel, against whole logits; and its rate."""
    tokens, width, vocab = card.pick((4096, 4096, 128256), (40, 32, 256))
    with findings.finding("LM head") as values:
        torch.manual_seed(0)
        head = torch.nn.Linear(width, vocab, bias=False, device=card.device, dtype=torch.bfloat16)
        # all that the scoring path reads of a model once its hidden states are known
        model: Any = SimpleNamespace(get_output_embeddings=lambda: head, config=LlamaConfig(vocab_size=vocab))
        hidden = torch.randn(tokens, width, device=card.device, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.randint(0, vocab, (tokens,), device=card.device)
        upstream = torch.randn(tokens, device=card.device)
        ours = token_logps(model, hidden, targets)
        (grad,) = torch.autograd.grad(ours, hidden, upstream)
        exact, exact_grads = [], []
        for part in torch.arange(tokens, device=card.device).split(512):
            leaf = hidden.detach()[part].float().requires_grad_()
            logps = linear(leaf, head.weight.detach().float()).log_softmax(-1).gather(-1, targets[part, None])[:, 0]
            exact.append(logps.detach())
            exact_grads.append(torch.autograd.grad(logps, leaf, upstream[part])[0])
        values["largest_error"] = (ours - torch.cat(exact)).abs().max().item()
        values["grad_error"] = error_of(grad, torch.cat(exact_grads))
        values["ok"] = values["largest_error"] < 0.05 and values["grad_error"] < 0.02
        seconds = card.median_seconds(lambda: token_logps(model, hidden, targets).sum().backward(), repeat=3)
        values["milliseconds"] = 1000 * seconds
        values["tflops"] = 4 * 2 * tokens * width * vocab / seconds / 1e12  # forward, again, and two gradients


# ---- models


def _models(findings: Findings, card: Card) -> None:
    """Packed rows against padded ones: log-probs and gradients of five architectures in three precisions."""
    kinds: dict[str, dict[str, Any]] = {
        "llama": {},
        "qwen3": {},
        "gemma3_text": {"sliding_window": 4096, "head_dim": card.pick(256, 8)},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        "gemma2": {"sliding_window": 4096, "query_pre_attn_scalar": 128},  # soft-capped scores
    }
    groups = card.groups(6)
    for kind, more in kinds.items():
        exact = functools.cache(
            functools.partial(_scores, card, groups, kind, PaddedLayout(0), "float32", False, more)
        )
        for name, dtype, autocast in (
            ("bfloat16", "bfloat16", False),
            ("float32", "float32", False),
            ("autocast", "float32", True),
        ):
            with findings.finding(f"{kind}, {name}") as values:
                packed = _scores(card, groups, kind, PackedLayout(0), dtype, autocast, more)
                padded = _scores(card, groups, kind, PaddedLayout(0), dtype, autocast, more)
                for what, ours, other, truth in zip(("logps", "gradient"), packed, padded, exact()):
                    error, theirs = error_of(ours, truth), error_of(other, truth)
                    values[f"{what}_error"], values[f"{what}_error_padded"] = error, theirs
                    allowed = 2 * theirs + (1e-4 if name == "float32" else 2e-3)
                    values["ok"] = values.get("ok", True) and error <= allowed


def _scores(
    card: Card, groups: list[Group], kind: str, layout: Any, dtype: str, autocast: bool, more: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return the log-probs of all completions, and the gradient of all weights of a weighted sum of them."""
    attention = "eager" if kind == "gemma2" else "sdpa"  # soft caps are not SDPA's
    model = card.small_model(kind, dtype=dtype, attention=attention, **more).train()
    install_scoring(model)
    batch = to_device(layout.collate([groups]), card.device)
    with torch.autocast(card.device, dtype=torch.bfloat16, enabled=autocast):
        logps = score_completions(model, batch).logps
    (logps * torch.linspace(-1, 1, len(logps), device=card.device)).sum().backward()
    grads = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return logps.detach(), torch.cat(grads)


# ---- trainers


def trainers(findings: Findings, card: Card) -> None:
    """Every trainer packed and padded; then cached scores, resuming and generation."""
    cases = trajectories.cases()
    chosen = ["wpo", "dpo-packed-sigmoid", "sppo", "multi-arithmetic", "reward"]
    chosen += ["adversarial-reward", "general-preference", "rrhf"]
    for name in chosen:
        with findings.finding(f"trainer {name}") as values:
            losses = {
                layout: _losses_of_case(card, cases[name], {"batch_layout": layout}) for layout in ("packed", "padded")
            }
            values |= losses
            values["ok"] = _close(losses["packed"], losses["padded"], 0.02)
    _runs(findings, card)


def _losses_of_case(card: Card, case: tuple, settings: dict[str, Any]) -> list[float]:
    """Train a case of benchmarks/trajectories.py for two steps on the device; return its losses."""
    trainer, make_rows, own, more = case
    values = {**trajectories.COMMON, **own, **settings, "max_steps": 2, "use_cpu": card.is_dry, "bf16": True}
    with tempfile.TemporaryDirectory() as folder:
        config = getattr(prefopt, f"{trainer}Config")(folder, **values)
        rows = make_rows()
        data = trajectories.scored(rows) if trainer == "MultiReferenceDPO" else trajectories.Dataset.from_list(rows)
        model = trajectories.make_model().to(card.device)
        built = getattr(prefopt, f"{trainer}Trainer")(
            model, args=config, train_dataset=data, processing_class=trajectories.make_tokenizer(), **more
        )
        built.train()
    assert built.layout.name == values["batch_layout"]
    return [entry["loss"] for entry in built.state.log_history if "loss" in entry]


def train(card: Card, model: Any, data: Any, folder: str, *, resume: str | None = None, **settings: Any) -> Any:
    """Train WPO for four steps of two micro-batches, with float32 weights under bf16 autocast; return the trainer."""
    defaults = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": True,
        "use_cpu": card.is_dry,
        "checkpointing": "none",
        "batch_layout": "packed",
        "max_length": None,
    }
    peft = settings.pop("peft_config", None)
    args = prefopt.WPOConfig(folder, **{**defaults, **settings})
    trainer = prefopt.WPOTrainer(
        model, args=args, train_dataset=data, processing_class=make_tokenizer(), peft_config=peft
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses_of(trainer: Any, after: int = 0) -> list[float]:
    """Return the logged losses of the steps after one."""
    return [log["loss"] for log in trainer.state.log_history if "loss" in log and log["step"] > after]


def _runs(findings: Findings, card: Card) -> None:
    data = card.pairs(32)
    with tempfile.TemporaryDirectory() as folder:
        with findings.finding("a run") as values:
            whole = train(card, card.small_model(), data, folder, save_strategy="steps", save_steps=2)
            values["losses"] = losses_of(whole)
            first = next(log for log in whole.state.log_history if "loss" in log)
            values["first_margin"] = first["rewards/margins"]
            values["ok"] = abs(values["first_margin"]) < 0.02
        with findings.finding("resumed = uninterrupted") as values:
            again = train(card, card.small_model(), data, folder, resume=str(Path(folder) / "checkpoint-2"))
            values["losses"], values["uninterrupted"] = losses_of(again, after=2), losses_of(whole, after=2)
            values["ok"] = _close(values["losses"], values["uninterrupted"], 5e-3)
    with findings.finding("cached scores = live reference") as values, tempfile.TemporaryDirectory() as folder:
        cache = {"precompute_ref_log_probs": True, "ref_logps_dir": str(Path(folder) / "cache")}
        cached = train(card, card.small_model(), data, folder, **cache)
        values["losses"], values["live"] = losses_of(cached), losses_of(whole)
        values["ok"] = _close(values["losses"], values["live"], 0.01)
    with findings.finding("generation after training") as values:
        model = whole.model.eval()
        ids = torch.tensor([[1, 5, 6, 7]], device=card.device)
        with torch.no_grad():
            greedy = model(ids).logits[0, -1].argmax().item()
        answer = model.generate(ids, max_new_tokens=4, do_sample=False)
        values["ok"] = answer.shape[1] > 4 and answer[0, 4].item() == greedy


def _close(ours: list[float], theirs: list[float], tolerance: float) -> bool:
    return len(ours) == len(theirs) and all(
        abs(a - b) <= tolerance * max(abs(a), abs(b), 1e-3) for a, b in zip(ours, theirs)
    )


# ---- options


def options(findings: Findings, card: Card) -> None:
    """Ways to save memory or time that must not change a result: checkpointing, fused layers, compilation, QLoRA."""
    data = card.pairs(32)
    base: list[float] = []

    def compare(name: str, settings: Callable[[], dict[str, Any]], *, skipped: str | None = None) -> None:
        if skipped is not None:
            findings.put(name, ok=True, skipped=skipped)
            return
        with findings.finding(name) as values, tempfile.TemporaryDirectory() as folder:
            trainer = train(card, card.small_model(), data, folder, **settings())
            values["losses"], values["base"] = losses_of(trainer), list(base)
            values["layout"] = trainer.layout.name
            values["ok"] = trainer.layout.name == "packed" and _close(values["losses"], base, 0.02)
            base.extend([] if base else values["losses"])
        card.free()

    with findings.finding("no recomputation") as values, tempfile.TemporaryDirectory() as folder:
        base.extend(losses_of(train(card, card.small_model(), data, folder)))
        values["losses"] = list(base)
    for name, settings in checkpointing_modes().items():
        compare(f"checkpointing {name}", lambda settings=settings: settings)
    compare("fused layers", lambda: {"use_liger_kernel": True}, skipped=card.why_not("liger_kernel"))
    backend = card.pick("inductor", "eager")
    compare("torch_compile", lambda: {"torch_compile": True, "torch_compile_backend": backend})
    _qlora(findings, card, data)


def checkpointing_modes() -> dict[str, dict[str, Any]]:
    """The ways to recompute that the trainers have, as settings."""
    modes: dict[str, dict[str, Any]] = {mode: {"checkpointing": mode} for mode in MODES if mode != "none"}
    return modes | {"reentrant": {"checkpointing": "all", "gradient_checkpointing_kwargs": {"use_reentrant": True}}}


def _qlora(findings: Findings, card: Card, data: Any) -> None:
    """Train an adapter on 4-bit weights; its losses must fall, and the first margin be 0."""
    if (reason := card.why_not("bitsandbytes")) is not None:
        findings.put("QLoRA", ok=True, skipped=reason)
        return
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    with findings.finding("QLoRA") as values, tempfile.TemporaryDirectory() as folder:
        card.small_model(dtype="bfloat16").save_pretrained(folder)
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=four_bit, dtype=torch.bfloat16, device_map={"": 0}
        )
        adapter = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
        trainer = train(card, model, data, folder, peft_config=adapter, learning_rate=1e-3)
        values["losses"] = losses_of(trainer)
        first = next(log for log in trainer.state.log_history if "loss" in log)
        values["first_margin"] = first["rewards/margins"]
        values["ok"] = abs(values["first_margin"]) < 0.02 and values["losses"][-1] < values["losses"][0]
