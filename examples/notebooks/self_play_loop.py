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
# # A self-play loop: SPPO, then GPO on preferences that go in circles
#
# In self-play the policy learns from its own answers: sample several to each prompt, ask a ranker how often each beats the others, and move
# each answer's probability by as much as that calls for ([SPPO](https://arxiv.org/abs/2405.00675)). First by hand, then as the one command that
# real runs use. The second half takes a preference that no score can express, rock-paper-scissors, learns it with a general preference model,
# and plays [GPO](https://arxiv.org/abs/2410.02197) against it.

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
sys.path[:0] = ["../quickstart", "../self_play", ".."]  # the toys: questions, a rule that ranks, the circle

from pathlib import Path

import datasets
import matplotlib.pyplot as plt
import torch
import transformers
from game import make_game
from rule import level
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from prefopt.files import read_jsonl

torch.set_num_threads(1)
datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
FOLDER = Path(tempfile.gettempdir()) / "prefopt-self-play"
shutil.rmtree(FOLDER, ignore_errors=True)

# %% [markdown]
# ## The game
#
# A tiny chat model has learned to answer simple questions in five styles alike. The rule prefers firm answers to hedged ones, and among firm
# ones four closings in a fixed order; anyone can check it.

# %%
with contextlib.redirect_stdout(io.StringIO()):
    make_game(FOLDER, seed=0, prompts=240, held_out=60)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, padding_side="left")
prompts, test_prompts = (
    [row["prompt"] for row in read_jsonl(FOLDER / "prompts" / f"{split}.jsonl")] for split in ("train", "test")
)


@torch.no_grad()
def sample(model, prompts, count, seed):
    """`count` answers to each prompt."""
    torch.manual_seed(seed)
    batch = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    out = model.eval().generate(**batch, do_sample=True, top_k=0, max_new_tokens=28, num_return_sequences=count)
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [texts[i : i + count] for i in range(0, len(texts), count)]


start = AutoModelForCausalLM.from_pretrained(FOLDER)
for text in sample(start, test_prompts[:1], 5, seed=0)[0]:
    print(f"{level(text):>4.0f}  {text}")

# %% [markdown]
# ## One iteration
#
# `select_pairs` turns the scores of one prompt's answers into a pair with win probabilities: `chosen_win_prob` is how often the chosen answer
# beats an answer of the policy.

# %%
from prefopt.candidates.pairs import select_pairs, win_probabilities

texts = sample(start, test_prompts[:1], 5, seed=0)[0]
scores = [level(text) for text in texts]
print("scores          ", scores)
print("P(i beats j), mean over j", win_probabilities(scores).mean(-1).round(2).tolist())
print(select_pairs(texts, scores, policy="sppo"))


# %%
def pairs_of(model, prompts, seed):
    rows = []
    for prompt, texts in zip(prompts, sample(model, prompts, 5, seed)):
        for pair in select_pairs(texts, [level(text) for text in texts], policy="sppo"):
            rows.append(
                {
                    "prompt": prompt,
                    "chosen": [{"role": "assistant", "content": texts[pair.chosen]}],
                    "rejected": [{"role": "assistant", "content": texts[pair.rejected]}],
                    "chosen_win_prob": pair.chosen_win_prob,
                    "rejected_win_prob": pair.rejected_win_prob,
                }
            )
    return datasets.Dataset.from_list(rows)


def win_rate(model, seed=1):
    """Share of comparisons with the start model's answers that the rule gives to `model`; a tie counts one half."""
    mine, theirs = sample(model, test_prompts, 4, seed), sample(start, test_prompts, 4, seed + 1)
    points = [
        (level(a) > level(b)) + 0.5 * (level(a) == level(b))
        for ours, other in zip(mine, theirs)
        for a in ours
        for b in other
    ]
    return sum(points) / len(points)


# %% [markdown]
# `beta` is $1/\eta$ and divides the targets: a *smaller* one moves the policy further. The papers' 0.001 suits answers of hundreds of tokens; for
# a dozen tokens 0.2 is right.

# %%
from prefopt import SPPOConfig, SPPOTrainer

common = {
    "learning_rate": 1e-3,
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


def train(trainer_class, model, args, rows, tokenizer=tokenizer):
    """Train without a line for each logged step: the figures are plotted."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer = trainer_class(model, args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
    return trainer


policy, rates, logs = AutoModelForCausalLM.from_pretrained(FOLDER), [0.5], []
for iteration in range(3):
    rows = pairs_of(policy, prompts[80 * iteration : 80 * (iteration + 1)], seed=10 + iteration)
    args = SPPOConfig(str(FOLDER / "sppo"), loss_type="sppo", beta=0.2, num_train_epochs=3, **common)
    trainer = train(SPPOTrainer, policy, args, rows)  # the reference is a copy of the policy as it is now
    policy = trainer.model
    logs.append(trainer.state.log_history)
    rates.append(win_rate(policy))
    print(f"iteration {iteration + 1}: {len(rows)} pairs, win rate against the start model {rates[-1]:.3f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained", dpi=80)
axes[0].plot(range(4), rates, marker="o")
axes[0].set(xlabel="iteration", xticks=range(4), ylim=(0.45, 1), title="win rate against the start model")
for number, log in enumerate(logs, 1):
    entries = [entry for entry in log if "logratios/chosen" in entry]
    axes[1].plot([e["step"] for e in entries], [e["logratios/chosen"] for e in entries], label=f"iteration {number}")
    axes[1].axhline(entries[-1]["targets/chosen"], color="0.7", linewidth=0.8)
axes[1].set(xlabel="optimizer step", title="log-ratio of chosen answers, and its targets (grey), nats")
axes[1].legend(fontsize="small")
plt.show()

# %% [markdown]
# ## The same as one command
#
# Generation, ranking, pairs, training and evaluation are stages, each of them a command that can be typed; the runner continues after any
# interruption. Real runs are this with another recipe (`prefopt pipeline pipelines/sppo_llama3_8b`).

# %%
from prefopt.cli import main as prefopt

os.chdir("../..")  # the recipe names its files from the repository's folder
words = ["--run_dir", str(FOLDER / "run"), "--model_name_or_path", str(FOLDER), "--num_iterations", "1"]
words += [
    "--prompts",
    f"[{{path: {FOLDER / 'prompts'}}}]",
    "--evaluation.prompts",
    f"{{path: {FOLDER / 'prompts'}, split: test}}",
]
prefopt(["pipeline", "examples/self_play/recipe.yaml", *words, "--dry_run"])

# %% [markdown]
# ## Preferences that go in circles
#
# Paper beats rock, scissors beat paper, rock beats scissors. A scalar reward can be right about two of the three at most; a general preference
# model gives each answer a vector and compares by a skew-symmetric product, so that circles are no trouble.

# %%
from cyclic_preferences import ANSWERS
from cyclic_preferences import rows as cyclic_rows
from cyclic_preferences import tokenizer as words_tokenizer

from prefopt import GeneralPreferenceConfig, GeneralPreferenceTrainer
from prefopt.models.general_preference import preference_table

words = words_tokenizer()
words.padding_side = "left"


def tiny():
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(words), pad_token_id=0, **shape))


accuracy = {}
for loss_type in ("bradley_terry", "general_preference"):
    settings = common | {"per_device_train_batch_size": 60, "learning_rate": 3e-3, "max_steps": 60, "pooling": "last"}
    args = GeneralPreferenceConfig(str(FOLDER / loss_type), loss_type=loss_type, **settings)
    trainer = train(GeneralPreferenceTrainer, tiny(), args, cyclic_rows(), words)
    with contextlib.redirect_stdout(io.StringIO()):
        accuracy[loss_type] = trainer.evaluate(cyclic_rows())["eval_accuracy"]
print({name: f"{value:.1%}" for name, value in accuracy.items()})

judge = trainer.model  # the general preference model


def table(prompt):
    """Logits that each answer beats each other, (3, 3)."""
    batch = words([f"{prompt} {text}" for text in ANSWERS], return_tensors="pt", padding=True)
    embeddings, scales = judge.embeddings(batch["input_ids"], batch["attention_mask"])
    return preference_table(embeddings, scales, temperature=judge.temperature)


print("P(row beats column):")
for name, line in zip(ANSWERS, table("game 0 :").sigmoid()):
    print(f"  {name:<9}", "  ".join(f"{value:.2f}" for value in line))

# %% [markdown]
# ## GPO: playing against oneself in a circle
#
# A policy that likes rock meets the judge. Its answers are scored against *its own* mixture, so what is best changes as the policy changes:
# paper first, then scissors, then rock. No single answer is the best reply to the even mixture, which is the game's Nash equilibrium. The
# last policy keeps going round it; the mean over iterations comes close. We know the scores exactly here (three answers), so they are computed
# rather than sampled.


# %%
def shares(model, prompt="game 0 :"):
    """Probabilities of the three answers."""
    ids = words(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model.eval()(ids).logits[0, -1]
    return logits[words.convert_tokens_to_ids(list(ANSWERS))].softmax(-1)


def teach(model, favourite, share):
    """A few steps of maximum likelihood, so that `favourite` is answered with this probability."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = words([f"game {n} :" for n in range(40)], return_tensors="pt", padding=True)
    wanted = torch.full((3,), (1 - share) / 2)
    wanted[ANSWERS.index(favourite)] = share
    target = torch.zeros(len(words))
    target[words.convert_tokens_to_ids(list(ANSWERS))] = wanted
    for _ in range(60):
        loss = -(model(**ids).logits[:, -1].log_softmax(-1) * target).sum(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


player = teach(tiny(), "rock", 0.5)
games = [f"game {number} :" for number in range(40)]
path = [shares(player)]
for _ in range(24):
    rows = []
    for prompt in games:
        standing = table(prompt).clamp(-2, 2) @ shares(player, prompt)  # mean logit against the policy's own mixture
        order = standing.argsort(descending=True).tolist()
        for chosen, rejected in ((order[0], order[1]), (order[1], order[2]), (order[0], order[2])):
            rows.append(
                {
                    "prompt": prompt,
                    "chosen": f" {ANSWERS[chosen]}",
                    "rejected": f" {ANSWERS[rejected]}",
                    "chosen_score": standing[chosen].item(),
                    "rejected_score": standing[rejected].item(),
                }
            )
    args = SPPOConfig(
        str(FOLDER / "gpo"), loss_type="gpo", beta=4.0, **common | {"per_device_train_batch_size": 60, "max_steps": 6}
    )
    player = train(SPPOTrainer, player, args, datasets.Dataset.from_list(rows), words).model
    path.append(shares(player))

# %%
lines = torch.stack(path)
figure, ax = plt.subplots(figsize=(7, 2.8), layout="constrained", dpi=80)
for number, name in enumerate(ANSWERS):
    ax.plot(lines[:, number], marker="o", markersize=3, label=name)
ax.axhline(1 / 3, color="0.6", linestyle="--", linewidth=1)
ax.set(xlabel="iteration", ylabel="probability", ylim=(0, 1), title="GPO on rock, paper, scissors")
ax.legend(fontsize="small")
plt.show()
print("mean over iterations:", dict(zip(ANSWERS, [round(value, 2) for value in lines.mean(0).tolist()])))

# %% [markdown]
# ## On a GPU
#
# - Sampling is what takes the time: `sampling.backend: vllm` in the recipe, in an environment of its own
#   (`launchers: {generate: .venv-vllm/bin/python -m prefopt}`).
# - The ranker is a model: `ranking.ranker: pair-rm` or `general-preference`, with `ranking.num_processes: 8`.
# - `beta: 0.001`, and a loss that starts near 1e5 by design: watch `loss_normalized`.
# - The papers' loops are recipes: `pipelines/sppo_llama3_8b`, `pipelines/gpo_gpm_8b_llama3_8b`, ...; first with `--dry_run`.
