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
# # Reward models and the adversarial game
#
# A reward model learns from comparisons; a policy that follows it finds what it has not seen. Adversarial preference optimization
# ([APO](https://arxiv.org/abs/2311.08045)) lets the two play: the reward model also learns to tell golden answers from the policy's own, round by
# round. Here the true reward is known, so that we can see who is right.

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
sys.path.insert(0, "../..")  # the game

from pathlib import Path

import datasets
import matplotlib.pyplot as plt
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.study.world import make_start_policy, true_reward, write_game
from prefopt.files import read_jsonl

torch.set_num_threads(1)
datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
FOLDER = Path(tempfile.gettempdir()) / "prefopt-adversarial"
shutil.rmtree(FOLDER, ignore_errors=True)

# %% [markdown]
# ## The game
#
# A prompt names a kind of thing, and a good answer names the five things of that kind, each once. The true reward is (things of that kind −
# other things − repetitions) / 5. Annotators have compared only answers of up to three words, and err in a tenth of the cases; golden answers
# are right.

# %%
write_game(FOLDER, seed=0, reward_prompts=200, policy_prompts=300, test_prompts=150, comparisons=800)
with contextlib.redirect_stdout(io.StringIO()):
    make_start_policy(FOLDER / "start", seed=0, rows=2400)
tokenizer = AutoTokenizer.from_pretrained(FOLDER / "start", padding_side="left")


def read(name):
    return list(read_jsonl(FOLDER / f"{name}.jsonl"))


comparisons, test_comparisons, golden = read("comparisons"), read("test_comparisons"), read("reward_prompts")
print(
    "comparison:",
    comparisons[0]["prompt"][0]["content"],
    "|",
    *(comparisons[0][side][0]["content"] for side in ("chosen", "rejected")),
    sep="  ",
)
print("golden:    ", golden[0]["prompt"][0]["content"], "|", golden[0]["golden"], sep="  ")


@torch.no_grad()
def sample(model, prompts, count=1, seed=0):
    torch.manual_seed(seed)
    batch = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    out = model.eval().generate(**inputs, do_sample=True, top_k=0, max_new_tokens=20, num_return_sequences=count)
    texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    texts = [" ".join(text.split()) for text in texts]
    return [texts[i : i + count] for i in range(0, len(texts), count)]


start = AutoModelForCausalLM.from_pretrained(FOLDER / "start")
test_prompts = [row["prompt"] for row in read("test_prompts")]
print("the start policy:", test_prompts[0][0]["content"], "|", sample(start, test_prompts[:1])[0][0], sep="  ")

# %% [markdown]
# ## A reward model
#
# `RewardTrainer` takes the rows that DPO takes (or R scored responses of a prompt), and reports accuracy and calibration.

# %%
from prefopt import RewardConfig, RewardTrainer

common = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 128,
    "logging_steps": 20,
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}
head = common | {"num_train_epochs": 3, "learning_rate": 1e-3}


def train(trainer_class, model, args, rows, evaluate_on=None):
    """Train without a line for each logged step."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = trainer_class(
            model,
            args=args,
            train_dataset=datasets.Dataset.from_list(rows),
            eval_dataset=evaluate_on,
            processing_class=tokenizer,
        )
        trainer.train()
        return trainer.model, trainer.evaluate() if evaluate_on is not None else {}


held_out = datasets.Dataset.from_list(test_comparisons)
reward_model, figures = train(
    RewardTrainer, str(FOLDER / "start"), RewardConfig(str(FOLDER / "reward"), **head), comparisons, held_out
)
for key in ("accuracy", "margin", "ece_bin10", "score_length_correlation"):
    print(f"{key:>26}: {figures[f'eval_{key}']:.3f}")

# %% [markdown]
# Right in most comparisons, as annotators see them. What does it think of longer answers, of which it has seen none?


# %%
@torch.no_grad()
def rewards(model, prompt, texts):
    chats = [prompt + [{"role": "assistant", "content": text}] for text in texts]
    batch = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt", return_dict=True)
    return model.eval().rewards(batch["input_ids"], batch["attention_mask"]).tolist()


prompt = [{"role": "user", "content": "animals 1 2 3"}]
ladder = {
    "good": [" ".join(["cow", "fox", "hen", "owl", "rat"][:n]) for n in range(1, 6)],
    "rambling": [" ".join((["cow", "fox", "hen"] * 4)[:n]) for n in range(1, 11)],
}
figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained", dpi=80)
for ax, title in zip(axes, ("true reward", "the reward model")):
    for name, texts in ladder.items():
        values = (
            [true_reward(prompt, text) for text in texts] if ax is axes[0] else rewards(reward_model, prompt, texts)
        )
        ax.plot(range(1, len(texts) + 1), values, marker="o", label=name)
    ax.axvspan(0.5, 3.5, color="0.92")
    ax.set(xlabel="words", title=title)
axes[0].legend(title="grey: what annotators saw", loc="lower left")
plt.show()

# %% [markdown]
# Up to three words it agrees with the truth. Beyond, it cannot tell a repetition from a new thing, and likes rambling better than the good answer.
#
# ## The game, two ways
#
# Each round the policy answers, the reward model scores four answers to each prompt, and DPO trains on best against worst. In the *fixed* way the
# reward model stays as it is. In the *adversarial* way it is trained anew before each round, on the human comparisons and on golden answers
# against the policy's.

# %%
from prefopt import AdversarialRewardConfig, AdversarialRewardTrainer, DPOConfig, DPOTrainer
from prefopt.candidates.build_rows import adversarial_pairs

policy_prompts = [row["prompt"] for row in read("policy_prompts")]


def against(policy, round_number):
    """The reward model of a round: human comparisons, and golden answers against the policy's samples."""
    answers = sample(policy, [row["prompt"] for row in golden], 4, seed=round_number)
    samples = [
        {"prompt_id": row["prompt_id"], "prompt": row["prompt"], "candidates": [{"text": text} for text in texts]}
        for row, texts in zip(golden, answers)
    ]
    rows, _ = adversarial_pairs([{name: row[name] for name in ("prompt_id", "golden")} for row in golden], samples)
    human = [
        {"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]], "scores": [1.0, 0.0], "type": "human"}
        for row in comparisons
    ]
    args = AdversarialRewardConfig(str(FOLDER / "apo"), adversarial_coeff=1.0, num_samples=4, **head)
    return train(AdversarialRewardTrainer, str(FOLDER / "start"), args, human + rows, held_out)


def align(policy, judge, round_number):
    """One round of DPO on the judge's best against its worst."""
    pairs = []
    for prompt, texts in zip(policy_prompts, sample(policy, policy_prompts, 4, seed=100 + round_number)):
        texts = [text for text in dict.fromkeys(texts) if text]
        ranked = sorted(zip(rewards(judge, prompt, texts), texts)) if len(texts) > 1 else []
        if ranked:
            best, worst = ([{"role": "assistant", "content": ranked[end][1]}] for end in (-1, 0))
            pairs.append({"prompt": prompt, "chosen": best, "rejected": worst})
    args = DPOConfig(str(FOLDER / "dpo"), beta=0.3, learning_rate=3e-4, num_train_epochs=2, **common)
    return train(DPOTrainer, policy, args, pairs)[0]


def measure(policy):
    texts = [texts[0] for texts in sample(policy, test_prompts, seed=7)]
    reward = sum(true_reward(prompt, text) for prompt, text in zip(test_prompts, texts)) / len(texts)
    return reward, sum(len(text.split()) for text in texts) / len(texts), texts[0]


history = {}
for way in ("fixed", "adversarial"):
    policy = AutoModelForCausalLM.from_pretrained(FOLDER / "start")
    history[way] = [measure(policy)]
    for round_number in range(1, 4):
        judge, figures = (reward_model, {}) if way == "fixed" else against(policy, round_number)
        policy = align(policy, judge, round_number)
        history[way].append(measure(policy))
        reward, words, example = history[way][-1]
        print(f"{way:>11}, round {round_number}: true reward {reward:6.3f}, {words:4.1f} words, e.g. {example!r}")
    if figures:
        print(f"the last reward model on human comparisons: {figures['eval_accuracy']:.3f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained", dpi=80)
for ax, number, title in ((axes[0], 0, "true reward of the policy"), (axes[1], 1, "words of an answer")):
    for way, points in history.items():
        ax.plot([point[number] for point in points], marker="o", label=way)
    ax.set(xlabel="round", xticks=range(4), title=title)
axes[0].legend()
plt.show()

# %% [markdown]
# One seed shows how it works, and no more; three seeds with the ablation without human comparisons are in `benchmarks/adversarial_game.py`.
#
# ## On a GPU
#
# - `prefopt pipeline pipelines/adversarial_llama_7b --dry_run` shows the loop of the paper as commands; without the flag it runs, and continues
#   after an interruption.
# - Reward models of 7B in float32 need `deepspeed_zero3_fp32` on eight GPUs; LoRA (`use_peft: true`) fits one.
# - Before training the trainer prints how much all adversarial pairs weigh against all human ones; keep an eye on it when the data change.
