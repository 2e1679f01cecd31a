"""Tiny tokenizers and models, built on the spot: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CORPUS = [
    "Name a colour. Blue is a colour. Name an animal. A fox is an animal that lives in the woods.",
    "What is two plus three? The answer is five. Please explain why the sky looks blue in the morning.",
    "Short answers help; long answers sometimes help more, but only when they stay with the question.",
    "user assistant system Human Assistant you are a helpful assistant None True False zero one two three",
    "Grüße aus Köln, naïve café, 你好 世界, emoji 🙂 and (brackets) [like] {these} \n\n new lines \t tabs.",
]

# Each template has the shape of a well-known family; the words are our own.
CHAT_TEMPLATES = {
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }}{{ eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
    "gemma2": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "chatml": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
}
SPECIAL_TOKENS = {
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": ["[INST]", "[/INST]"],
    "gemma2": ["<start_of_turn>", "<end_of_turn>"],
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "zephyr": ["<|user|>", "<|assistant|>", "<|system|>"],
}
EOS_TOKEN = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>"}


def tiny_tokenizer(
    style: str | None = "llama3",
    *,
    vocab_size: int = 400,
    adds_bos: bool | None = None,
    corpus: list[str] | None = None,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the chat template of one family (`None`: no template).

    `adds_bos` (default: all but chatml and zephyr) makes plain encoding put a BOS first, as Llama's and Gemma's do.
    """
    eos = EOS_TOKEN.get(style or "", "</s>")
    special = list(dict.fromkeys(["<pad>", "<s>", "</s>", *SPECIAL_TOKENS.get(style or "", [])]))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus or CORPUS, trainer)
    if adds_bos if adds_bos is not None else style not in ("chatml", "zephyr"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATES[style] if style else None
    return fast


_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# what each architecture needs beside the common shape
ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gemma2": {"sliding_window": 512, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 512, "query_pre_attn_scalar": 8},
    "phi3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}


def tiny_model(
    architecture: str = "llama",
    *,
    vocab_size: int = 400,
    seed: int = 0,
    attn_implementation: str | None = None,
    **overrides,
):
    """A causal LM of `architecture` with random weights (float32), the same for the same seed."""
    config = AutoConfig.for_model(
        architecture, **{**_SHAPE, **ARCHITECTURES[architecture], "vocab_size": vocab_size, **overrides}
    )
    torch.manual_seed(seed)
    kwargs = {"attn_implementation": attn_implementation} if attn_implementation else {}
    model = AutoModelForCausalLM.from_config(config, **kwargs)
    return model.float().eval()


def write_checkpoint(folder: Path) -> None:
    """The files of a checkpoint from which training could continue, with next to nothing in them."""
    folder.mkdir(parents=True)
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({}, folder / name)
    (folder / "trainer_state.json").write_text('{"global_step": 7}')
