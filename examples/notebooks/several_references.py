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
# # DPO against several references
#
# DPO holds the policy near one reference model. With several, each pair is compared with what each of them thinks of it: how are they mixed, how
# much does each count, and does it help? This notebook
#
# 1. scores pairs under four references of different tokenizers and reads their health cards: one of the four is broken, and found;
# 2. trains against the other three and watches their weights;
# 3. asks for a verdict over seeds: do several references beat the best single one?

# %%
import contextlib
import io
import os
import random
import shutil
import sys
import tempfile
import warnings

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="IProgress not found")  # plain bars will do
sys.path.insert(0, "../quickstart")  # the toy's questions and tokenizer

from pathlib import Path

import datasets
import matplotlib.pyplot as plt
import torch
import transformers
from preferences import all_questions, answer
from start_model import train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

torch.set_num_threads(1)
datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
FOLDER = Path(tempfile.gettempdir()) / "prefopt-references"
shutil.rmtree(FOLDER, ignore_errors=True)

# %% [markdown]
# ## Pairs
#
# Firm answers are preferred to hedged ones, and the annotators err in a quarter of the cases.

# %%
rng = random.Random(0)
questions = all_questions()
rng.shuffle(questions)


def said(role, text):
    return [{"role": role, "content": text}]


def pair(question, errors=0.25):
    answers = [said("assistant", answer(question, firm=firm, rng=rng)) for firm in (True, False)]
    if rng.random() < errors:
        answers.reverse()
    return {"prompt": said("user", question.prompt), "chosen": answers[0], "rejected": answers[1]}


pairs = [pair(question) for question in questions[:600]]
print(pairs[0])

# %% [markdown]
# ## References
#
# Three tiny language models with tokenizers of their own. `own` is the policy's initial model and answers in both styles; `firm` prefers the
# first style and `hedged` the second. The fourth, `damaged`, is like `own`, but every token's output row was given to another token, as when
# token ids come from another vocabulary.


# %%
def language_model(name, firm, vocabulary, seed):
    rng = random.Random(seed)
    rows = [
        {"prompt": said("user", q.prompt), "chosen": said("assistant", answer(q, firm=rng.random() < firm, rng=rng))}
        for q in questions[600:]
    ]
    tokenizer = train_tokenizer([row | {"rejected": []} for row in rows[:vocabulary]])
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.06,
    }
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=128, tie_word_embeddings=False, **shape, **ends
    )
    model = AutoModelForCausalLM.from_config(config)
    texts = [tokenizer.apply_chat_template(row["prompt"] + row["chosen"], return_dict=False) for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(160):
        batch = tokenizer.pad({"input_ids": rng.sample(texts, 16)}, return_tensors="pt")
        loss = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if name == "damaged":
        with torch.no_grad():
            head = model.get_output_embeddings().weight
            head.copy_(head.roll(len(head) // 2, dims=0))
    model.save_pretrained(FOLDER / name)
    tokenizer.save_pretrained(FOLDER / name)
    print(f"{name}: {len(tokenizer)} tokens, {loss.item():.2f} nats per token at the end of its training")
    return str(FOLDER / name)


own = language_model("own", firm=0.5, vocabulary=600, seed=0)
firm = language_model("firm", firm=0.9, vocabulary=300, seed=1)
hedged = language_model("hedged", firm=0.1, vocabulary=100, seed=2)
damaged = language_model("damaged", firm=0.5, vocabulary=500, seed=3)

# %% [markdown]
# ## Health cards
#
# Each reference scores the *text* of all answers once, with its own tokenizer and template; training reads the numbers from the cache, and no
# reference is ever in memory. On the command line this is `prefopt score-references RECIPE`.

# %%
from prefopt.references.health import cards_table
from prefopt.references.text import ScoringSettings, cards_of, score_reference

rows = datasets.Dataset.from_list(pairs)
settings = ScoringSettings(root=FOLDER / "scores", dtype="float32", show_progress=False)
for reference in (own, firm, hedged, damaged):
    report = score_reference(rows, reference, settings)
    print(f"{Path(report.name).name}: {report.scored} answers scored, {report.found} found")
cards = cards_of(rows, [own, firm, hedged, damaged], settings.root, dtype="float32")
print(cards_table(cards))

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 2.4), layout="constrained", dpi=80)
names = [Path(card.name).name for card in cards]
colours = ["tab:red" if card.quarantine else "tab:blue" for card in cards]
low, high = ([getattr(card, f"accuracy_{end}") for card in cards] for end in ("low", "high"))
axes[0].hlines(names, low, high, colors=colours)
axes[0].scatter([card.accuracy for card in cards], names, c=colours)
axes[0].set(xlim=(0, 1), title="accuracy on the pairs, with 95 % intervals")
axes[1].barh(names, [card.nats_per_byte for card in cards], color=colours)
axes[1].set(title="nats per byte (red: quarantined)")
plt.show()

# %% [markdown]
# Training would stop with this reason (`accept_outliers: true` would go on). Note that accuracy alone would not have found it, and that `hedged`,
# which is mostly wrong, is reported and used: it is a bad judge, not a broken model.
#
# ## Weights over time
#
# `weighting` says how much each reference counts: `uniform`; `arwc`, by each pair's own confidences; `vaw`, by accuracy on held-out rows; `swcw`, by
# confidence in the steps before; and others.

# %%
from prefopt import MultiReferenceDPOConfig, MultiReferenceDPOTrainer

common = {
    "references": [own, firm, hedged],
    "ref_logps_dir": str(settings.root),
    "reference_dtype": "float32",
    "beta": 0.2,
    "learning_rate": 2e-4,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 100,
    "max_length": 128,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def train(seed=0, evaluate_on=None, train_rows=rows, **options):
    args = MultiReferenceDPOConfig(str(FOLDER / "run"), seed=seed, **common | options)
    with contextlib.redirect_stdout(io.StringIO()):  # the health cards again, and a line for each logged step
        trainer = MultiReferenceDPOTrainer(
            AutoModelForCausalLM.from_pretrained(own),
            args=args,
            train_dataset=train_rows,
            eval_dataset=evaluate_on,
            processing_class=AutoTokenizer.from_pretrained(own),
        )
        trainer.train()
        return trainer, trainer.evaluate() if evaluate_on is not None else {}


figure, axes = plt.subplots(1, 3, figsize=(11, 2.6), layout="constrained", dpi=80, sharey=True)
for ax, (weighting, options) in zip(
    axes, {"arwc": {}, "vaw": {"validation_rows": 100}, "swcw": {"window": 3}}.items()
):
    trainer, _ = train(
        weighting=weighting, anchor=own, train_rows=rows.select(range(300)), num_train_epochs=1, **options
    )
    log = [entry for entry in trainer.state.log_history if "references/spread" in entry]
    for name in trainer.reference_names:
        ax.plot([e["step"] for e in log], [e[f"references/weight/{name}"] for e in log], label=name)
    ax.set(xlabel="optimizer step", title=f"weights, {weighting}", ylim=(0, 1))
    print(
        f"{weighting}: {log[-1]['references/effective_number']:.2f} references in effect, spread {log[-1]['references/spread']:.2f} nats"
    )
axes[0].legend()
plt.show()

# %% [markdown]
# `references/spread` is how far apart the references pull the loss: near 0 nobody could tell which one was used.
#
# ## The verdict
#
# Three seeds draw their own training, validation and test rows. Every seed trains against each reference alone and against all three in two
# modes; the best single reference and the best mixture are chosen on *validation* rows and compared on *test* rows, within the seed. The
# command that does this with recipes is `prefopt sweep`.

# %%
from prefopt.evaluation.study import chosen_on_validation, paired_difference, sentence

ways = {
    Path(name).name: {
        "weighting": "fixed",
        "reference_weights": [float(name == each) for each in common["references"]],
    }
    for name in common["references"]
}
ways |= {mode: {"weighting": "uniform", "mode": mode} for mode in ("multi_dpo", "harmonic")}
validation, test = ({way: {} for way in ways} for _ in range(2))
for seed in range(3):
    drawn = rows.shuffle(seed=seed)
    sets = {"validation": drawn.select(range(160, 320)), "test": drawn.select(range(320, 600))}
    for way, options in ways.items():
        _, found = train(seed, sets, drawn.select(range(160)), anchor=own, logging_steps=50, **options)
        validation[way][seed], test[way][seed] = (found[f"eval_{name}_accuracies/reference_free"] for name in sets)
for way, found in test.items():
    print(f"{way:>10}: test accuracy {', '.join(f'{value:.3f}' for value in found.values())}")

# %%
single, several = ([way for way in ways if (way in ("multi_dpo", "harmonic")) == wanted] for wanted in (False, True))
chosen = {}
for name, group in (("single", single), ("several", several)):
    chosen[name], picked = chosen_on_validation(
        {way: validation[way] for way in group}, {way: test[way] for way in group}
    )
    print(f"chosen on validation rows, {name}: {picked}")
print(sentence("best single", paired_difference(chosen["several"], chosen["single"])))
print(sentence("own init", paired_difference(chosen["several"], test["own"])))

# %% [markdown]
# *helps* needs the whole interval above 0, *hurts* below, and one seed is never evidence. With three seeds of a toy the usual answer is
# "no evidence"; the [method's paper](https://arxiv.org/abs/2512.10040) found that most ways to combine references do not beat the best one.
#
# ## On a GPU
#
# - Real references score in bfloat16 (`reference_dtype`), one in memory at a time: `prefopt score-references qwen2.5-0.5b/multi_reference_ultrafeedback --num_processes 8`;
#   the scores are kept by content, so that another learning rate or output folder scores nothing anew.
# - Then `prefopt multi-reference-dpo` with the same recipe; a step costs as much as with one cached reference.
# - The whole study, with verdict, table and plots: `prefopt sweep qwen2.5-0.5b/multi_reference_study`.
