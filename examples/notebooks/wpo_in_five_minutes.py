# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # WPO in five minutes
#
# DPO learns equally hard from every pair. WPO weighs each pair by how likely *the present policy* is to write both of its answers, so that
# pairs from other models pull less where the policy would never go ([paper](https://arxiv.org/abs/2406.11827)). This notebook
#
# 1. makes a small preference set and a tiny chat model, offline, on a CPU;
# 2. trains it with TRL's `DPOTrainer`, then with `WPOTrainer` by changing two names;
# 3. computes the weights by hand, and shows what they do to pairs that come from somewhere else.

# %%
import contextlib
import io
import os
import shutil
import sys
import tempfile
import warnings

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="IProgress not found")  # plain bars will do
sys.path.insert(0, "../quickstart")  # the toy's questions, and its tiny model

import random
from pathlib import Path

import datasets
import matplotlib.pyplot as plt
import torch
import transformers
from preferences import all_questions, answer
from start_model import make_start_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.files import write_jsonl

torch.set_num_threads(1)  # the model is too small to gain from more
datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
FOLDER = Path(tempfile.gettempdir()) / "prefopt-wpo"
shutil.rmtree(FOLDER, ignore_errors=True)


def train(trainer):
    """Train without a line for each logged step: the figures are plotted."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return trainer


# %% [markdown]
# ## A preference set, and a model
#
# Questions about everyday things, each answered in two styles: the preferred answer names the thing first, the other one hedges. Rows are
# what TRL takes: `prompt`, `chosen`, `rejected`, here as messages.

# %%
rng = random.Random(0)
questions = all_questions()
rng.shuffle(questions)


def said(role, text):
    return [{"role": role, "content": text}]


def pair(question):
    return {
        "prompt": said("user", question.prompt),
        "chosen": said("assistant", answer(question, firm=True, rng=rng)),
        "rejected": said("assistant", answer(question, firm=False, rng=rng)),
    }


held_out, taught = questions[:60], questions[60:460]
pairs = [pair(question) for question in taught]
write_jsonl(FOLDER / "pairs" / "train.jsonl", pairs)
for side in ("prompt", "chosen", "rejected"):
    print(f"{side:>9}: {pairs[0][side][0]['content']}")

# %% [markdown]
# The start model is a Llama of two layers with a tokenizer trained on these texts. It is taught both styles alike, so that it has no reason
# to prefer one.

# %%
with contextlib.redirect_stdout(io.StringIO()):
    make_start_model(FOLDER, seed=0)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
start = AutoModelForCausalLM.from_pretrained(FOLDER)
print(f"{start.num_parameters():,} parameters, {len(tokenizer)} tokens")

# %% [markdown]
# ## The swap
#
# Working TRL code:

# %%
from trl import DPOConfig, DPOTrainer

common = {
    "beta": 0.1,
    "learning_rate": 5e-4,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "max_length": 128,
    "logging_steps": 2,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}
rows = datasets.Dataset.from_list(pairs)
trainer = DPOTrainer(
    AutoModelForCausalLM.from_pretrained(FOLDER),
    args=DPOConfig(str(FOLDER / "trl"), **common),
    train_dataset=rows,
    processing_class=tokenizer,
)
trl_log = train(trainer).state.log_history

# %% [markdown]
# The same with prefopt: the trainer *and* its config change their names, nothing else does. One default differs: `WPOConfig.beta` is 0.01, as
# in the paper, TRL's is 0.1; here it is set, so nothing changes with the swap.

# %%
from prefopt import WPOConfig, WPOTrainer

trainer = WPOTrainer(
    AutoModelForCausalLM.from_pretrained(FOLDER),
    args=WPOConfig(str(FOLDER / "wpo"), **common),
    train_dataset=rows,
    processing_class=tokenizer,
)
wpo_log = train(trainer).state.log_history
policy = trainer.model

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 2.8), layout="constrained", dpi=80)


def curve(ax, log, key, label):
    points = [(entry["step"], entry[key]) for entry in log if key in entry]
    ax.plot(*zip(*points), label=label)


for ax, key in zip(axes, ("rewards/margins", "rewards/accuracies")):
    curve(ax, trl_log, key, "TRL, DPO")
    curve(ax, wpo_log, key, "prefopt, WPO")
    ax.set(xlabel="optimizer step", title=key)
    ax.legend(fontsize="small")
for key in ("wpo/weight_mean", "wpo/weight_min", "wpo/weight_max"):
    curve(axes[2], wpo_log, key, key)
axes[2].set(xlabel="optimizer step", title="weights of pairs", ylim=(0, 1.05))
axes[2].legend(fontsize="small")
plt.show()

# %% [markdown]
# Metrics have TRL's names, and `wpo/*` beside them. These pairs are in the policy's own words, so they begin with weights near 1; the weights
# fall as training makes the rejected answers unlikely, and pairs that are learned pull less.
#
# Before and after, on a question that nobody has been trained on:


# %%
def ask(model, question, seed=0):
    ids = tokenizer.apply_chat_template(
        said("user", question.prompt), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(seed)
    out = model.eval().generate(**ids, do_sample=True, top_k=0, max_new_tokens=32)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


for number, question in enumerate(held_out[:5]):
    print(f"{question.prompt}\n  before: {ask(start, question, number)}\n  after:  {ask(policy, question, number)}")

# %% [markdown]
# ## The weight, by hand
#
# $w = \min(e^{\omega(y_w) + \omega(y_l)}, 1)$ with $\omega(y) = \frac{1}{|y|}\sum_t \left[\log p(y_t) - \log \sum_v p(v)^2\right]$: how likely each
# token is, compared with a token that the policy would sample. The trainer takes it from the forward pass of the loss; the pure function is
# `prefopt.losses.wpo_pair_weights`.
#
# Now some pairs that the policy would never write: the same questions, answered in other words.

# %%
from prefopt.losses import wpo_pair_weights


def foreign(question):
    thing = question.thing.upper()
    return {
        "prompt": said("user", question.prompt),
        "chosen": said(
            "assistant", f"{question.value}! {thing}: {question.value}, {question.topic} {question.value}."
        ),
        "rejected": said("assistant", f"{thing}?? no {question.topic} of {thing} known, ask {thing} itself"),
    }


@torch.no_grad()
def omega(model, prompt, completion):
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template(prompt + completion, return_dict=False)
    logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    token = logps.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return (token - (2 * logps).logsumexp(-1))[len(before) - 1 :].mean()


def weights(model, rows):
    chosen, rejected = (
        torch.stack([omega(model, row["prompt"], row[side]) for row in rows]) for side in ("chosen", "rejected")
    )
    return wpo_pair_weights(chosen, rejected)


own_pairs = [pair(question) for question in held_out]
foreign_pairs = [foreign(question) for question in held_out]
own, other = weights(start, own_pairs), weights(start, foreign_pairs)
print(f"mean weight: {own.mean():.3f} in the policy's words, {other.mean():.6f} in other words")

# %% [markdown]
# The trainer says the same of a named evaluation set:

# %%
sets = {"own": datasets.Dataset.from_list(own_pairs), "foreign": datasets.Dataset.from_list(foreign_pairs)}
args = WPOConfig(str(FOLDER / "evaluate"), **common)
fresh = WPOTrainer(
    AutoModelForCausalLM.from_pretrained(FOLDER),
    args=args,
    train_dataset=rows,
    eval_dataset=sets,
    processing_class=tokenizer,
)
with contextlib.redirect_stdout(io.StringIO()):
    found = fresh.evaluate()
by_trainer = [found[f"eval_{name}_wpo/weight_mean"] for name in sets]
print("by the trainer:", [round(value, 6) for value in by_trainer])
assert torch.allclose(torch.tensor(by_trainer), torch.stack([own.mean(), other.mean()]), rtol=1e-3)

# %%
figure, ax = plt.subplots(figsize=(6, 2.8), layout="constrained", dpi=80)
bins = torch.linspace(-9, 0, 37).tolist()
for values, label in ((own, "pairs in the policy's words"), (other, "pairs in other words")):
    ax.hist(values.clamp_min(1e-9).log10().tolist(), bins=bins, alpha=0.7, label=label)
ax.set(xlabel="log10 of the pair's weight", ylabel="pairs", title="What WPO learns from, and what it leaves")
ax.legend()
plt.show()

# %% [markdown]
# ## What the weights do
#
# Half of the training pairs are now foreign ones. How far does each method pull held-out pairs of both kinds apart? The reward margin is
# $\\beta$ times the log-ratio of chosen minus that of rejected.

# %%
from prefopt import DPOConfig as PlainConfig
from prefopt import DPOTrainer as PlainTrainer

mixed = datasets.Dataset.from_list(pairs[:200] + [foreign(question) for question in taught[200:400]])
often = common | {"eval_strategy": "steps", "eval_steps": 5, "eval_on_start": True}
figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained", dpi=80)
for name, trainer_class, config_class in (("DPO", PlainTrainer, PlainConfig), ("WPO", WPOTrainer, WPOConfig)):
    trainer = train(
        trainer_class(
            AutoModelForCausalLM.from_pretrained(FOLDER),
            args=config_class(str(FOLDER / name), **often),
            train_dataset=mixed,
            eval_dataset=sets,
            processing_class=tokenizer,
        )
    )
    with contextlib.redirect_stdout(io.StringIO()):
        found = trainer.evaluate()
    for ax, kind in zip(axes, sets):
        curve(ax, trainer.state.log_history, f"eval_{kind}_rewards/margins", name)
        margin, effective = found[f"eval_{kind}_rewards/margins"], found.get(f"eval_{kind}_wpo/weight_mean", 1)
        print(f"{name}, {kind:>7} pairs: margin {margin:6.3f}, mean weight {effective:.4f}")
for ax, kind in zip(axes, sets):
    ax.set(xlabel="optimizer step", title=f"reward margin of held-out pairs: {kind}")
    ax.legend()
plt.show()

# %% [markdown]
# ## On a GPU
#
# - Take a real model and real pairs: `WPOTrainer("Qwen/Qwen2.5-0.5B-Instruct", args=WPOConfig("out"), train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"))`.
# - Leave out `use_cpu`, `bf16` and `gradient_checkpointing`: bf16 and recomputation are then on.
# - `batch_layout="packed"` (found by itself where it is exact) runs each prompt once for both of its answers, without padding.
# - The papers' runs are recipes: `prefopt wpo llama3/wpo --num_processes 8 --accelerate_config deepspeed_zero3`, after `prefopt check` with the
#   same words has shown what would stop it.
