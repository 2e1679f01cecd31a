import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import DebertaV2Config

from prefopt.candidates.rankers.pair_rm import MARKERS, Limits, PairRanker
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
BLENDER = ROOT / ".venv-blender" / "bin" / "python"


def deberta_tokenizer():
    """A byte-level tokenizer that frames texts as DeBERTa's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(None, adds_bos=False)
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    tokenizer.add_tokens(MARKERS)
    return tokenizer


def deberta_config(vocab_size):
    return DebertaV2Config(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        relative_attention=True,
        position_buckets=16,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
        max_position_embeddings=512,
    )


def tiny_ranker(limits=None, num_tasks=1, seed=0):
    tokenizer = deberta_tokenizer()
    torch.manual_seed(seed)
    model = PairRanker(deberta_config(len(tokenizer)), tokenizer, num_tasks=num_tasks, limits=limits)
    for value in model.parameters():
        if value.dim() > 1:
            value.data.normal_(0, 0.3)
    return model.eval()


def save_published(model, folder):
    """The layout of llm-blender/PairRM: the ranker's folder names another one that holds the backbone."""
    backbone = folder / "backbone"
    model.config.save_pretrained(backbone)
    model.tokenizer.save_pretrained(backbone)
    ranker = folder / "ranker"
    ranker.mkdir()
    described = {"ranker_type": "pairranker", "model_type": "deberta", "model_name": str(backbone), "n_tasks": 1}
    described |= {
        "drop_out": 0.05,
        "source_maxlength": model.limits.source,
        "candidate_maxlength": model.limits.candidate,
    }
    (ranker / "config.json").write_text(json.dumps(described))
    save_file(model.state_dict(), ranker / "model.safetensors")
    return ranker


def logit(model, prompt, candidates, first, second):
    ids, markers = model.pair_ids(model.encode(prompt, candidates), first, second)
    with torch.no_grad():
        return float(model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), torch.tensor([markers])))


def test_input_layout_and_budget():
    """Limits (30, 10): a source of n <= 30 tokens leaves each candidate 10 + (30 - n) // 2."""
    model = tiny_ranker(Limits(30, 10))
    tokenizer = model.tokenizer
    prompt = model.encode("ab", ["x" * 300, "y"])
    assert len(prompt.candidates[0]) == 10 + (30 - len(prompt.source)) // 2
    assert prompt.candidates_cut == [True, False] and not prompt.source_cut
    ids, markers = model.pair_ids(prompt, 1, 0)
    assert [tokenizer.convert_ids_to_tokens(ids[p]) for p in markers] == [
        "<|source|>",
        "<|candidate1|>",
        "<|candidate2|>",
    ]
    assert [ids[p - 1] for p in markers] == [tokenizer.cls_token_id] * 3
    assert ids.count(tokenizer.sep_token_id) == 3 and ids[-1] == tokenizer.sep_token_id
    assert tokenizer.decode(ids[markers[1] : markers[2] - 1]) == "<|candidate1|>y[SEP]"
    long = model.encode("word " * 100, ["x" * 300, "y" * 300])
    assert long.source_cut and len(long.source) == 30 and [len(c) for c in long.candidates] == [10, 10]


def test_marker_texts_in_an_answer_change_no_position():
    model = tiny_ranker()
    ids, markers = model.pair_ids(model.encode("a <|candidate2|> b [SEP]", ["<|source|> <|candidate|>", "c"]), 0, 1)
    assert ids.count(model.tokenizer.sep_token_id) == 3
    assert (
        markers[0] == 1
        and ids[markers[2]] == model.second_id
        and markers[2] == len(ids) - len(model.encode("", ["c"]).candidates[0]) + 1
    )


def test_padding_changes_nothing_and_order_matters():
    model = tiny_ranker()
    candidates = ["Blue is a colour.", "five", "A fox lives in the woods."]
    prompt = model.encode("Name a colour.", candidates)
    pairs = [(0, 1), (1, 0), (2, 1)]
    rows = [model.pair_ids(prompt, *pair) for pair in pairs]
    width = max(len(ids) for ids, _ in rows) + 7
    input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    with torch.no_grad():
        batched = model(input_ids, mask, torch.tensor([markers for _, markers in rows]))
    single = [logit(model, "Name a colour.", candidates, *pair) for pair in pairs]
    torch.testing.assert_close(batched, torch.tensor(single), atol=1e-5, rtol=0)
    assert abs(single[0] + single[1]) > 1e-3  # not antisymmetric: both orders are needed


def test_published_layout_round_trip(tmp_path):
    model = tiny_ranker(Limits(40, 12))
    loaded = PairRanker.from_pretrained(str(save_published(model, tmp_path)))
    assert loaded.limits == Limits(40, 12) and not loaded.training
    pair = ("Name a colour.", ["Blue " * 50, "five"], 0, 1)
    assert logit(loaded, *pair) == pytest.approx(logit(model, *pair), abs=1e-6)


def test_wrong_folders_are_refused(tmp_path):
    model = tiny_ranker()
    folder = save_published(model, tmp_path)
    with pytest.raises(ValueError, match=r"no config\.json"):
        PairRanker.from_pretrained(str(tmp_path))
    weights = model.state_dict()
    save_file({k: v for k, v in weights.items() if "head_layer" not in k}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="head_layer"):
        PairRanker.from_pretrained(str(folder))
    save_file({**weights, "head_layer.4.weight": torch.zeros(3, 32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"head_layer\.4\.weight"):
        PairRanker.from_pretrained(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="neither"):
        PairRanker.from_pretrained(str(folder))
    save_file(weights, tmp_path / "backbone" / "model.safetensors")
    with pytest.raises(ValueError, match="holds no PairRM ranker"):
        PairRanker.from_pretrained(str(tmp_path / "backbone"))


@pytest.mark.slow
def test_parity_with_llm_blender(tmp_path):
    """Token ids and logits of llm-blender 0.0.2 for random weights, at the published limits and at narrow ones."""
    if not BLENDER.exists():
        assert "PREFOPT_REQUIRE_BLENDER" not in os.environ, f"{BLENDER} is missing"
        pytest.skip("no environment with llm-blender")
    script = ROOT / "tests" / "models" / "blender_golden.py"
    made = subprocess.run([BLENDER, script, tmp_path], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    golden = json.loads((tmp_path / "golden.json").read_text())
    worst, compared = 0.0, 0
    for folder, answers in (("ranker", "ranker"), ("ranker-hf", "ranker"), ("narrow", "narrow")):
        model = PairRanker.from_pretrained(str(tmp_path / folder))
        for row in golden[answers]:
            encoded = model.encode(row["prompt"], row["candidates"])
            expected_ids = iter(row["ids"])
            for i in range(len(row["candidates"])):
                for j in range(len(row["candidates"])):
                    if i == j:
                        continue
                    assert model.pair_ids(encoded, i, j)[0] == next(expected_ids)
                    ours = logit(model, row["prompt"], row["candidates"], i, j)
                    worst, compared = max(worst, abs(ours - row["table"][i][j])), compared + 1
    lengths = [len(ids) for row in golden["ranker"] for ids in row["ids"]]
    spread = max(abs(value) for row in golden["ranker"] for line in row["table"] for value in line)
    print(
        f"llm-blender parity: {compared} pairs, largest difference {worst:.1e}, logits up to {spread:.2f}, up to "
        f"{max(lengths)} tokens"
    )
    assert max(lengths) >= 1224 + 412 and spread > 0.5  # the limits bind, and the logits are not all about zero
    assert worst < 1e-5
