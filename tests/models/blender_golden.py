"""Writes a random PairRM ranker and what llm-blender 0.0.2 makes of it. Runs beside transformers 4, so not in our
environment.

    python tests/models/blender_golden.py FOLDER

FOLDER gets `backbone/` (config, SentencePiece tokenizer), `ranker/` (layout of llm-blender/PairRM), `ranker-hf/`
(layout of
PairRM-hf) and `golden.json`: prompts, candidates, and per ordered pair the token ids and the logit.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import llm_blender
import safetensors.torch
import sentencepiece
import torch
from llm_blender.blender.config import BlenderConfig
from llm_blender.pair_ranker.pairrm import DebertaV2PairRM
from transformers import AutoTokenizer, DebertaV2Config, DebertaV2Model

SENTENCES = [
    "Name a colour. Blue is a colour, and so is green.",
    "What is two plus three? The answer is five.",
    "Please explain why the sky looks blue in the morning, and why it looks red in the evening.",
    "Grüße aus Köln, naïve café, 你好 世界, emoji 🙂 and (brackets) [like] {these}.",
    "None of the long answers helps more than the short ones; None is None.",
]
PROMPTS = [
    ("Name a colour.", ["Blue.", "Green is a colour, and so is blue.", "None"]),
    (
        "Say None in Köln 🙂\n\n twice ",
        ["  Grüße,\tnaïve café  ", "", "text [SEP] with a separator [CLS] [MASK]", "你好 世界"],
    ),
    ("", ["five", "The answer is five."]),
    ("why " * 700, ["blue " * 600, "the sky looks red " * 3]),
    ("short", ["evening " * 700, "morning " * 30, "x"]),
]


def make_tokenizer(folder: Path, size: int) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_prefix=str(folder / "spm"),
        vocab_size=size,
        hard_vocab_limit=False,
        byte_fallback=False,
        minloglevel=2,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        unk_piece="[UNK]",
    )
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')


def make_backbone(folder: Path) -> None:
    """The shape of deberta-v3, small; the tokenizer as that model ships it, a SentencePiece file alone."""
    folder.mkdir()
    make_tokenizer(folder, 140)
    config = DebertaV2Config(
        vocab_size=200,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=512,
        relative_attention=True,
        position_buckets=16,
        max_relative_positions=-1,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
        layer_norm_eps=1e-7,
        pad_token_id=0,
    )
    DebertaV2Model(config).save_pretrained(folder)


def write_config(folder: Path, backbone: Path, source: int, candidate: int, tasks: int) -> None:
    folder.mkdir(exist_ok=True)
    described = {
        "ranker_type": "pairranker",
        "model_type": "deberta",
        "model_name": str(backbone),
        "load_checkpoint": None,
    }
    described |= {
        "source_maxlength": source,
        "candidate_maxlength": candidate,
        "n_tasks": tasks,
        "drop_out": 0.05,
        "fp16": True,
    }
    (folder / "config.json").write_text(json.dumps(described | {"inference_mode": "bubble"}))


def random_weights(module: torch.nn.Module) -> None:
    """Wide enough that logits are of order one, or agreement would prove nothing."""
    torch.manual_seed(0)
    for name, value in module.named_parameters():
        if "LayerNorm" not in name:
            value.data.normal_(0, 0.35)
        else:
            value.data.add_(torch.randn_like(value) * 0.1)


def predict(blender: llm_blender.Blender) -> list[dict]:
    seen: list[dict] = []

    def look(module, args, kwargs):
        seen.append({"input_ids": kwargs["input_ids"][0].tolist(), "mask": kwargs["attention_mask"][0].tolist()})

    blender.ranker.pretrained_model.register_forward_pre_hook(look, with_kwargs=True)
    results = []
    for prompt, candidates in PROMPTS:
        seen.clear()
        batch = blender.ranker_collator([{"source": prompt, "candidates": candidates}])
        with torch.no_grad():
            table = blender.ranker._full_predict(**{k: v for k, v in batch.items() if v is not None})["logits"][0]
        ids = [call["input_ids"] for call in seen if all(call["mask"])]
        assert len(ids) == len(candidates) * (len(candidates) - 1)
        scores = blender.rank([prompt], [candidates], return_scores=True, batch_size=1, disable_tqdm=True)[0]
        results.append(
            {
                "prompt": prompt,
                "candidates": candidates,
                "table": table.tolist(),
                "ids": ids,
                "scores": scores.tolist(),
            }
        )
    return results


def save_huggingface_layout(folder: Path, ranker, backbone: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    tokenizer.add_tokens(["<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"])
    ids = tokenizer.convert_tokens_to_ids(["<|source|>", "<|candidate|>", "<|candidate1|>", "<|candidate2|>"])
    config = DebertaV2Config.from_pretrained(backbone)
    names = ("source_prefix_id", "cand_prefix_id", "cand1_prefix_id", "cand2_prefix_id")
    config.update(
        dict(zip(names, ids)) | {"sep_token_id": tokenizer.sep_token_id, "n_tasks": ranker.n_tasks, "drop_out": 0.05}
    )
    config.vocab_size = len(tokenizer)
    model = DebertaV2PairRM(config)
    model.load_state_dict(ranker.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(folder: Path) -> None:
    make_backbone(folder / "backbone")
    golden = {}
    # the published limits; and narrow ones, with two tasks
    for name, source, candidate, tasks in (("ranker", 1224, 412, 1), ("narrow", 24, 10, 2)):
        write_config(folder / name, folder / "backbone", source, candidate, tasks)
        first = llm_blender.blender.blender_utils.load_ranker(
            llm_blender.pair_ranker.config.RankerConfig.from_dict(
                json.loads((folder / name / "config.json").read_text())
            )
        )[0]
        random_weights(first)
        safetensors.torch.save_model(first, folder / name / "model.safetensors")
        blender = llm_blender.Blender(BlenderConfig(device="cpu", use_tqdm=False))
        blender.loadranker(str(folder / name), device="cpu")
        golden[name] = predict(blender)
        if name == "ranker":
            save_huggingface_layout(folder / "ranker-hf", blender.ranker, folder / "backbone")
    (folder / "golden.json").write_text(json.dumps(golden))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
