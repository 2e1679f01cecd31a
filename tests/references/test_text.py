"""Text under any model: the same numbers whatever the layout, the padding side and the company; nothing scored
twice."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from prefopt.data import tokenize_pairs
from prefopt.references import text as text_module
from prefopt.references.cache import ScoreCache, text_key
from prefopt.references.columns import join_reference_scores
from prefopt.references.filling import ReferenceModel
from prefopt.references.text import ScoringSettings, read_checks, score_reference, text_scorer
from tests.references.helpers import ROWS, pairs, reference, score_plainly
from tests.tiny import tiny_tokenizer

STYLES = [
    ("llama3", "llama"),
    ("chatml", "qwen2"),
    ("gemma2", "gemma3_text"),
    ("mistral", "mistral"),
    ("zephyr", "phi3"),
]


def settings(root, **changes):
    return ScoringSettings(root, **{"max_length": 256, "dtype": "float32", "max_tokens": 200, **changes})


def scores_of(root, ref, data=None):
    scorer, _ = text_scorer(ref, root, dtype="float32")
    ids = text_module.normalise_rows(pairs() if data is None else data, "pairs")["row_id"]
    cache = ScoreCache(root, scorer)
    return [cache.lookup([text_key(row_id, side) for row_id in ids]) for side in ("chosen", "rejected")]


@pytest.mark.parametrize(("style", "architecture"), STYLES)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_scores_equal_a_plain_forward_of_each_text(tmp_path, style, architecture, layout):
    ref = reference(style, architecture)
    report = score_reference(pairs(), ref, settings(tmp_path, batch_layout=layout))
    assert (report.scored, report.found, report.too_long, report.refused) == (8, 0, 0, 0)
    chosen, rejected = scores_of(tmp_path, ref)
    for row, (prompt, *answers) in enumerate(ROWS):
        for answer, found in zip(answers, (chosen, rejected)):
            logps, count = score_plainly(ref, prompt, answer)
            assert found.logps[row] == pytest.approx(logps, rel=1e-5)
            assert found.tokens[row] == count
            assert abs(int(found.bytes[row]) - len(answer.encode())) <= 2  # a template may add white space
    assert report.batched_vs_single < 1e-5
    assert read_checks(tmp_path, text_scorer(ref, tmp_path, dtype="float32")[0])["batched_vs_single"] < 1e-5


def test_either_padding_side_gives_the_same_numbers(tmp_path):
    ref = reference("mistral", "mistral")
    tables = []
    for side in ("left", "right"):
        ref.tokenizer.padding_side = side
        ref.tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=3)  # leaves state behind
        score_reference(pairs(), ref, settings(tmp_path / side, batch_layout="padded"))
        tables.append(np.stack([s.logps for s in scores_of(tmp_path / side, ref)]))
    np.testing.assert_array_equal(*tables)


def test_an_adapter_is_a_reference(tmp_path):
    """It scores as its base with the adapter merged in, and another base makes it another reference."""
    ref = reference()
    ref.model.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    ref.tokenizer.save_pretrained(tmp_path / "adapter")
    folder = str(tmp_path / "adapter")
    assert score_reference(pairs(), folder, settings(tmp_path / "cache")).scored == 8
    merged = ReferenceModel("merged", adapted.merge_and_unload(), ref.tokenizer)
    chosen, _ = scores_of(tmp_path / "cache", folder)
    for row, (prompt, answer, _) in enumerate(ROWS):
        assert chosen.logps[row] == pytest.approx(score_plainly(merged, prompt, answer)[0], rel=1e-5)
    reference(seed=1).model.save_pretrained(tmp_path / "base")
    assert score_reference(pairs(), folder, settings(tmp_path / "cache")).found == 0


def test_nothing_is_scored_or_loaded_twice(tmp_path, monkeypatch):
    first, second = reference("llama3", seed=0), reference("chatml", "qwen2", seed=1)
    score_reference(pairs(ROWS[:3]), first, settings(tmp_path))
    report = score_reference(pairs(), first, settings(tmp_path))  # one more row
    assert (report.scored, report.found) == (2, 6)
    report = score_reference(pairs(), second, settings(tmp_path))  # one more reference
    assert (report.scored, report.found) == (8, 0)

    def refuse(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(text_module, "prepare_model", refuse)
    for ref in (first, second):
        report = score_reference(
            pairs(), ref, settings(tmp_path, max_tokens=77, batch_layout="padded", max_length=200)
        )
        assert (report.scored, report.found) == (0, 8)


def test_a_changed_weight_or_template_finds_nothing(tmp_path):
    ref = reference()
    score_reference(pairs(), ref, settings(tmp_path))
    with torch.no_grad():
        ref.model.lm_head.weight[3, 3] += 1e-3
    assert score_reference(pairs(), ref, settings(tmp_path)).found == 0
    ref.tokenizer.chat_template = ref.tokenizer.chat_template.replace("\n\n", "\n")
    assert score_reference(pairs(), ref, settings(tmp_path)).found == 0


def test_rows_that_a_model_would_cut_are_noted_and_scored_once_they_fit(tmp_path):
    ref = reference()
    lengths = [score_length(ref, row) for row in ROWS]
    limit = sorted(lengths)[1]
    report = score_reference(pairs(), ref, settings(tmp_path, max_length=limit))
    assert report.too_long == 2 and report.scored == 4
    chosen, _ = scores_of(tmp_path, ref)
    assert chosen.truncated.tolist() == [length > limit for length in lengths]
    assert np.isnan(chosen.logps[chosen.truncated]).all()
    report = score_reference(pairs(), ref, settings(tmp_path))
    assert (report.too_long, report.scored, report.found) == (0, 4, 4)
    assert not scores_of(tmp_path, ref)[0].truncated.any()


def score_length(ref, row):
    tokenised, _ = tokenize_pairs(pairs([row]), ref.tokenizer, max_length=None)
    return len(tokenised[0]["prompt_ids"]) + max(len(tokenised[0][f"{side}_ids"]) for side in ("chosen", "rejected"))


def test_the_models_own_context_is_a_limit(tmp_path):
    ref = reference(max_position_embeddings=40)
    report = score_reference(pairs(), ref, settings(tmp_path, max_length=None))
    assert report.too_long == sum(score_length(ref, row) > 40 for row in ROWS) > 0


def test_a_reference_without_a_template_is_refused(tmp_path):
    bare = reference()
    bare = ReferenceModel("bare", bare.model, tiny_tokenizer(None))
    with pytest.raises(ValueError, match="no chat template"):
        score_reference(pairs(), bare, settings(tmp_path))


def test_a_template_that_refuses_a_row_is_counted(tmp_path):
    data = pairs().to_list()
    data[1]["prompt"].insert(0, {"role": "system", "content": "Be brief."})
    from datasets import Dataset

    ref = reference("gemma2", "gemma3_text")
    report = score_reference(Dataset.from_list(data), ref, settings(tmp_path))
    assert (report.refused, report.scored) == (1, 6)
    assert scores_of(tmp_path, ref, Dataset.from_list(data))[0].truncated.tolist() == [False, True, False, False]


def test_prompts_that_are_no_prefix_are_scored_from_the_common_part_and_counted(tmp_path):
    """The template ends the generation prompt with a word that is not there once an answer follows."""
    ref = reference("chatml", "qwen2")
    ref.tokenizer.chat_template = ref.tokenizer.chat_template.replace("assistant\n{%", "assistant\n<think>\n{%")
    report = score_reference(pairs(), ref, settings(tmp_path))
    assert report.not_prefix == len(ROWS)
    chosen, _ = scores_of(tmp_path, ref)
    for row, (prompt, answer, _) in enumerate(ROWS):
        assert chosen.logps[row] == pytest.approx(score_plainly(ref, prompt, answer)[0], rel=1e-5)


def test_long_texts_with_very_low_log_probs_stay_exact(tmp_path):
    ref = reference()
    with torch.no_grad():
        ref.model.lm_head.weight.mul_(40)
    rows = [("Name a colour.", "zebra quick 你好 " * 12, "x")]
    score_reference(pairs(rows), ref, settings(tmp_path, max_length=None))
    logps, count = score_plainly(ref, rows[0][0], rows[0][1].strip())
    found = scores_of(tmp_path, ref, pairs(rows))[0]
    assert logps < -2000 and found.tokens[0] == count
    assert found.logps[0] == pytest.approx(logps, rel=2e-6)


def joined(root, refs, max_length=256, data=None, policy="llama3"):
    tokenised, _ = tokenize_pairs(pairs() if data is None else data, tiny_tokenizer(policy), max_length=None)
    scorers = [text_scorer(ref, root, dtype="float32")[0] for ref in refs]
    return join_reference_scores(tokenised, scorers, root, max_length=max_length)


def test_scores_of_k_references_are_joined_by_row_and_not_by_position(tmp_path):
    refs = [reference("llama3"), reference("chatml", "qwen2", seed=1, vocab_size=350)]
    for ref in refs:
        score_reference(pairs(), ref, settings(tmp_path))
    shuffled = pairs([ROWS[2], ROWS[0]])
    dataset, report = joined(tmp_path, refs, data=shuffled)
    assert report.rows_kept == 2 and report.too_long == {"the policy": 0, refs[0].name: 0, refs[1].name: 0}
    for row, (prompt, chosen, rejected) in zip(dataset, [ROWS[2], ROWS[0]]):
        for k, ref in enumerate(refs):
            for side, answer in (("chosen", chosen), ("rejected", rejected)):
                logps, count = score_plainly(ref, prompt, answer)
                assert row[f"ref_{side}_logps"][k] == pytest.approx(logps, rel=1e-5)
                assert row[f"ref_{side}_counts"][k] == count


def test_rows_that_any_model_would_cut_leave_the_joined_set(tmp_path):
    refs = [reference("llama3"), reference("chatml", "qwen2", seed=1)]
    for ref in refs:
        score_reference(pairs(), ref, settings(tmp_path))
    lengths = np.array([[score_length(ref, row) for row in ROWS] for ref in refs])
    limit = int(np.sort(lengths.max(axis=0))[1])
    dataset, report = joined(tmp_path, refs, max_length=limit)
    assert report.rows_kept == len(dataset) == 2
    assert report.too_long[refs[1].name] == int((lengths[1] > limit).sum())
    assert "too long for" in str(report)


def test_missing_and_stale_scores_are_refused_with_the_reason(tmp_path):
    ref = reference()
    with pytest.raises(ValueError, match="never scored there"):
        joined(tmp_path, [ref])
    score_reference(pairs(ROWS[:3]), ref, settings(tmp_path))
    with pytest.raises(ValueError, match="no scores for 1 of 4 rows of the train set"):
        joined(tmp_path, [ref])
    changed = replace(ref, tokenizer=tiny_tokenizer("llama3", vocab_size=390))
    with pytest.raises(ValueError, match="the vocabulary, the chat template or the transformers version changed"):
        joined(tmp_path, [changed])
    score_reference(pairs(), ref, settings(tmp_path, max_length=20))
    with pytest.raises(ValueError, match="fit now"):
        joined(tmp_path, [ref])
    with pytest.raises(ValueError, match="No row of the train set is left"):
        joined(tmp_path, [ref], max_length=20)


def test_a_reference_by_folder_is_found_again_after_a_move(tmp_path):
    ref = reference()
    ref.model.save_pretrained(tmp_path / "a")
    ref.tokenizer.save_pretrained(tmp_path / "a")
    root = tmp_path / "cache"
    assert score_reference(pairs(), str(tmp_path / "a"), settings(root)).scored == 8
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "b" / "consolidated.safetensors").write_bytes(b"Mistral's own copy, which is never loaded")
    assert score_reference(pairs(), str(tmp_path / "b"), settings(root)).found == 8
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    assert score_reference(pairs(), str(tmp_path / "b"), settings(root)).found == 0
    scorer, tokenizer = text_scorer(str(tmp_path / "a"), root, dtype="float32")  # its files are gone: taken by name
    assert tokenizer is None and len(ScoreCache(root, scorer)) == 8
    with pytest.raises(ValueError, match="scores of 0 models of that name in bfloat16"):
        text_scorer(str(tmp_path / "a"), root, dtype="bfloat16")
