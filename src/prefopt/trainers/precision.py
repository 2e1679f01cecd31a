"""Updates that 16-bit weights would lose in rounding: master copies, stochastic rounding, and how many are lost.

A bfloat16 number has 8 significant bits, so that an update below 1/512 of a weight leaves it as it is; at the learning
rates of preference optimization that is nearly all of them. DeepSpeed and FSDP keep float32 copies themselves.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

MASTER_WEIGHTS = ("auto", "float32", "stochastic", "none")
WATCHED_STEPS = 10
"""Optimizer steps whose lost updates are counted."""

_HALF = (torch.bfloat16, torch.float16)
_SAMPLED = 4096  # weights of a tensor that are looked at
_KEY = "master_weights"  # of the optimizer's state dict


def lost_share(weights: Sequence[Tensor], update: float) -> float:
    """Estimate the share of weights that an update of this size leaves as they are once it is rounded."""
    lost = total = 0
    for weight in weights:
        sample = _sample(weight.detach())
        lost += int((sample + update == sample).sum())
        total += sample.numel()
    return lost / max(total, 1)


def _sample(values: Tensor) -> Tensor:
    return values.reshape(-1)[:: max(1, values.numel() // _SAMPLED)]


def choose_remedy(wanted: str, weights: Sequence[Tensor], learning_rate: float) -> str:
    """Choose how updates of 16-bit weights are kept, and print it with figures; all ranks call it.

    Args:
        wanted: one of `MASTER_WEIGHTS`.
        weights: the optimizer's 16-bit weights.
        learning_rate: the highest of the run.

    Returns:
        "float32", "stochastic" or "none".
    """
    chosen, numbers = wanted, sum(weight.numel() for weight in weights)
    if wanted == "auto":
        chosen = "float32" if all(gather_object([_copies_fit(weights[0].device, numbers)])) else "stochastic"
    if chosen == "stochastic" and any(weight.dtype != torch.bfloat16 for weight in weights):
        chosen = "none" if wanted == "auto" else wanted
    dtype = str(weights[0].dtype).removeprefix("torch.")
    share = lost_share(weights, learning_rate)
    remedy = {
        "float32": f"The optimizer keeps float32 master copies ({4 * numbers / 2**30:.2g} GiB).",
        "stochastic": "There is no room for float32 master copies, so updates are rounded stochastically."
        if wanted == "auto"
        else "Updates are rounded stochastically.",
        "none": "They are trained like that (`master_weights: none`)."
        if wanted == "none"
        else "There is no room for float32 master copies: train under DeepSpeed, on more GPUs, or with LoRA.",
    }[chosen]
    message = (
        f"{numbers:,} trainable weights are {dtype}, without a float32 copy: rounding would lose an update of the "
        f"size of the learning rate ({learning_rate:.3g}) in {share:.1%} of them. {remedy}"
    )
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return chosen
    if chosen == "none":
        warnings.warn(message, stacklevel=2)
    else:
        print(message, flush=True)
    return chosen


def _copies_fit(device: torch.device, numbers: int) -> bool:
    """Check that float32 copies, their gradients and moments fit beside what is on the device already."""
    if device.type != "cuda":
        return True
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # bytes a weight: its 16-bit gradient, the copy, the copy's gradient and two moments; a tenth of the card for
    # activations, without which nothing trains whatever the optimizer
    return free - total / 10 > numbers * (2 + 4 + 4 + 8)


class MasterWeights:
    """Has an optimizer update float32 copies of its 16-bit weights, which are rounded to the weights after each step.

    The optimizer holds the copies in the place of the weights, so that any kind of optimizer will do: a hook before
    its step gives them the gradients, and one after it rounds. The model keeps its dtype, in memory and on disk.

    Args:
        optimizer: whose 16-bit weights are replaced, before its first step.
        keep: keep the copies between steps, and in checkpoints; otherwise each exists only while it is updated, one
            after the other, and is rounded up or down at random, so that an update that is lost now and then counts in
            the mean.
        seed: of the roundings, equal on all ranks, whose weights must stay equal.
    """

    def __init__(self, optimizer: Optimizer, *, keep: bool, seed: int) -> None:
        self.keep = keep
        self.seed = seed
        self.steps = 0
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        for group in optimizer.param_groups:
            group["params"] = [self._copy_of(weight, optimizer) for weight in group["params"]]
        if keep:
            optimizer.register_step_pre_hook(self._give_gradients)
            optimizer.register_step_post_hook(self._round)
        else:
            self._update_one_by_one(optimizer)
        optimizer.register_state_dict_post_hook(self._save)
        optimizer.register_load_state_dict_pre_hook(self._load)

    def _copy_of(self, weight: nn.Parameter, optimizer: Optimizer) -> nn.Parameter:
        if weight.dtype not in _HALF:
            return weight
        copied = nn.Parameter(weight.detach().float())
        self.pairs.append((weight, copied))
        if weight in optimizer.state:  # of an optimizer that a user has stepped already
            optimizer.state[copied] = optimizer.state.pop(weight)
        if not self.keep:
            copied.data = copied.new_empty(0)  # filled when its weight is updated
        return copied

    def follow_weights(self) -> None:
        """Take over weights that were changed by something else than the optimizer since the last step."""
        with torch.no_grad():
            for weight, copied in self.pairs if self.keep else ():
                copied.copy_(torch.where(copied.to(weight.dtype) == weight, copied, weight.float()))

    def _give_gradients(self, *_: Any) -> None:
        for weight, copied in self.pairs:
            copied.grad = None if weight.grad is None else weight.grad.float()

    @torch.no_grad()
    def _round(self, *_: Any) -> None:
        self.steps += 1
        for weight, copied in self.pairs:
            copied.grad = None
            weight.copy_(copied)

    def _update_one_by_one(self, optimizer: Optimizer) -> None:
        """Have a step update one weight after the other, so that one copy and its gradient exist at a time.

        All copies at once would need the memory that master copies need, and there is none where this is chosen.
        """
        weights = {id(copied): weight for weight, copied in self.pairs}
        hooked: Any = type(optimizer).step
        update = hooked.__wrapped__  # without the hooks, which belong around the whole step

        def step(optimizer: Optimizer, closure: None = None) -> None:
            assert closure is None, "a trainer has its gradients before the step"
            self.steps += 1
            generators: dict[torch.device, torch.Generator] = {}
            groups = optimizer.param_groups
            held = [group["params"] for group in groups]
            try:
                for group, parameters in zip(groups, held):
                    optimizer.param_groups = [group]
                    for parameter in parameters:
                        group["params"] = [parameter]
                        with self._copied(parameter, weights.get(id(parameter)), generators):
                            update(optimizer)
            finally:
                optimizer.param_groups = groups
                for group, parameters in zip(groups, held):
                    group["params"] = parameters

        patched: Any = optimizer
        patched.step = types.MethodType(Optimizer.profile_hook_step(step), optimizer)

    @contextmanager
    def _copied(
        self, copied: nn.Parameter, weight: nn.Parameter | None, generators: dict[torch.device, torch.Generator]
    ) -> Iterator[None]:
        """Fill a copy and its gradient from its weight; afterwards round it to the weight, and empty it."""
        if weight is None:  # a float32 weight, which the optimizer updates as it is
            yield
            return
        copied.data = weight.detach().float()
        copied.grad = None if weight.grad is None else weight.grad.float()
        yield
        if weight.device not in generators:
            generator = torch.Generator(weight.device)
            generators[weight.device] = generator.manual_seed(self.seed + self.steps)
        with torch.no_grad():
            weight.copy_(round_stochastically(copied, generators[weight.device]))
        copied.grad = None
        copied.data = copied.new_empty(0)

    def _save(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        copies = [copied.detach() for _, copied in self.pairs] if self.keep else []
        return state | {_KEY: {"steps": self.steps, "copies": copies}}

    def _load(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        if _KEY in state:  # a checkpoint of a run without them begins from the weights
            self.steps = state[_KEY]["steps"]
            for (_, copied), saved in zip(self.pairs, state[_KEY]["copies"]):
                copied.data.copy_(saved)
        return {name: value for name, value in state.items() if name != _KEY}


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 values to bfloat16 numbers up or down, each with the probability that makes the mean exact.

    bfloat16 is the upper half of a float32's bits: what is added to the lower half carries into the upper one with the
    probability that the lower half is of the way to the next number.
    """
    bits = values.detach().contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(torch.isfinite(values), rounded, values)


def keep_updates(optimizer: Optimizer, args: Any) -> MasterWeights | None:
    """Have the updates of an optimizer's 16-bit weights kept as `args.master_weights` says; all ranks call it.

    Under fp16's gradient scaler the weights themselves become float32, since it scales the gradients of float32
    weights only; autocast computes in fp16 all the same.

    Args:
        optimizer: of one process or of DDP, before its first step.
        args: the trainer's config.

    Returns:
        The master copies; None where all weights are float32 or nothing is kept.
    """
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.dtype in _HALF]
    if not weights:
        return None
    remedy = choose_remedy(args.master_weights, weights, args.learning_rate)
    if args.fp16 and remedy != "none":
        for weight in weights:
            weight.data = weight.data.float()
        return None
    return None if remedy == "none" else MasterWeights(optimizer, keep=remedy == "float32", seed=args.seed)


class UpdatesLost:
    """Counts which weights the first steps of an optimizer leave as they are, although they had a gradient.

    Args:
        optimizer: with its master copies, if it has any.
        masters: these.
    """

    def __init__(self, optimizer: Optimizer, masters: MasterWeights | None) -> None:
        rounded = {id(copied): weight for weight, copied in (masters.pairs if masters else [])}
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # (the weight that has the gradient, the one that the optimizer's update must change)
        self._watched = [
            (rounded.get(id(p), p), p if masters is None or masters.keep else rounded.get(id(p), p)) for p in held
        ]
        self._starts: list[Tensor] = []
        self._touched: list[Tensor] = []
        self._hooks = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]
        self._steps = 0
        self.share: Tensor | None = None

    @torch.no_grad()
    def _before(self, *_: Any) -> None:
        if not self._starts:
            self._starts = [_sample(held).clone() for _, held in self._watched]
            self._touched = [torch.zeros_like(start, dtype=torch.bool) for start in self._starts]
        for touched, (weight, _) in zip(self._touched, self._watched):
            if weight.grad is not None:
                touched |= _sample(weight.grad) != 0

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        lost = [
            touched & (_sample(held) == start)
            for touched, start, (_, held) in zip(self._touched, self._starts, self._watched)
        ]
        self.share = torch.stack([x.sum() for x in lost]).sum() / torch.stack([x.sum() for x in self._touched]).sum()
        self._steps += 1
        if self._steps == WATCHED_STEPS:
            for hook in self._hooks:
                hook.remove()
            self._starts, self._touched = [], []

    def take(self) -> Tensor | None:
        """Return the share lost since the first step, () in [0, 1], once after each step that is counted."""
        share, self.share = self.share, None
        return share
