"""Completions of several turns: the assistant's are scored, those of others are read."""

from __future__ import annotations

import re

import pytest
import torch
from datasets import Dataset

import prefopt
from prefopt.data import TextMode, describe_sample, tokenize_comparisons, tokenize_pairs
from prefopt.references.cache import ids_key
from prefopt.references.columns import join_reference_scores
from prefopt.references.filling import ReferenceModel
from prefopt.references.text import ScoringSettings, score_reference, text_scorer
from prefopt.scoring.layouts import Group, PackedLayout, PaddedLayout
from prefopt.scoring.logprobs import install_scoring, score_completions
from tests.tiny import CHAT_TEMPLATES, tiny_model, tiny_tokenizer
from tests.trainers.pairs import history, make_trainer, preference_rows


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


SINGLE = {"prompt": [user("Name a colour.")], "chosen": [answer("Blue.")], "rejected": [answer("A fox.")]}
SEVERAL = {
    "prompt": [user("Name an animal."), answer("A fox."), user("And a colour?")],
    "chosen": [answer("Blue is a colour."), user("Why is the sky blue?"), answer("Short answers help.")],
    "rejected": [answer("Five."), user("Please explain why."), answer("The woods."), user("So?"), answer("No.")],
}
ROWS = [SINGLE, SEVERAL, {**SINGLE, "chosen": [answer("Two."), answer("Three.")]}]

# what a template writes before an answer, and the end of the turn that is scored with it
TURNS = {
    # this tokenizer joins the line breaks where nothing follows, so that they belong to the answer, as in any row
    "llama3": r"<\|start_header_id\|>assistant<\|end_header_id\|>(\n\n.*?<\|eot_id\|>)",
    "chatml": r"<\|im_start\|>assistant\n(.*?<\|im_end\|>\n)",
    "gemma2": r"<start_of_turn>model\n(.*?<end_of_turn>\n)",
    "zephyr": r"<\|assistant\|>\n(.*?</s>\n)",
    "mistral": r"\[/INST\]( .*?</s>)",
    "marked": r"<\|assistant\|>\n(.*?</s>)",
}
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tokenizer_of(style):
    tokenizer = tiny_tokenizer("zephyr" if style == "marked" else style)
    if style == "marked":
        tokenizer.chat_template = MARKED
    return tokenizer


def expected(tokenizer, style, row, side, turns="all"):
    """Ids of the whole dialogue and which of them are scored, from the rendered text and its offsets alone."""
    text = tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
    found = [match.span(1) for match in re.finditer(TURNS[style], text, re.DOTALL)]
    spans = found[sum(turn["role"] == "assistant" for turn in row["prompt"]) :]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = spans if turns == "all" else spans[-1:]
    scored = [any(a <= begin and end <= b for a, b in spans) for begin, end in encoded["offset_mapping"]]
    return encoded["input_ids"], scored


def scored_of(row, side):
    group = Group.of_pair(row, [side])
    places = {len(row["prompt_ids"]) + place for place in group.scored[0]}
    ids = [*row["prompt_ids"], *row[f"{side}_ids"]]
    return ids, [place in places for place in range(len(ids))]


def plain_sum(model, ids, scored):
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logps[place - 1, ids[place]]) for place in range(1, len(ids)) if scored[place])


def tokenise(style="llama3", rows=(SEVERAL,), **settings):
    tokenizer = tokenizer_of(style)
    dataset, report = tokenize_pairs(Dataset.from_list(list(rows)), tokenizer, max_length=None, **settings)
    return tokenizer, dataset, report


@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize("style", TURNS)
def test_only_answers_are_scored(style, turns):
    tokenizer, dataset, report = tokenise(style, text_mode=TextMode(completion_turns=turns))
    for side in ("chosen", "rejected"):
        assert scored_of(dataset[0], side) == expected(tokenizer, style, SEVERAL, side, turns)
        ids, scored = scored_of(dataset[0], side)
        text = tokenizer.decode([each for each, is_scored in zip(ids, scored) if is_scored], skip_special_tokens=True)
        assert dataset[0][f"{side}_bytes"] == len(text.encode())
    assert (report.skipped_turns, report.other_turns) == (1, 0)
    assert "only the assistant's are scored" in report.table()
    shown = describe_sample(tokenizer, dataset[0])
    assert re.search(r"⟦\s*Blue is", shown) or turns == "last"
    assert "Why is the sky blue?" not in "".join(re.findall("⟦(.*?)⟧", shown, re.DOTALL))


def test_rows_of_one_answer_keep_their_columns_and_identity():
    _, alone, _ = tokenise(rows=[SINGLE])
    _, beside, report = tokenise(rows=[SINGLE, SEVERAL])
    assert alone.column_names == [name for name in beside.column_names if not name.endswith("_skipped")]
    assert "chosen_skipped" not in alone.column_names
    assert beside[0]["chosen_skipped"] == [] and {name: beside[0][name] for name in alone.column_names} == alone[0]
    assert report.skipped_turns == 1
    ids = alone[0]["prompt_ids"], alone[0]["chosen_ids"]
    assert ids_key(*ids, 5) == ids_key(*ids, 5, []) != ids_key(*ids, 5, [[0, 1]])


def test_a_template_that_hides_the_answers_is_said_once_and_all_is_scored():
    tokenizer = tiny_tokenizer("llama3")
    # the last answer is rendered otherwise than the same answer with turns after it
    last = "{% if loop.last and m['role'] == 'assistant' %}!{% endif %}"
    tokenizer.chat_template = CHAT_TEMPLATES["llama3"].replace("<|eot_id|>{% endfor", last + "<|eot_id|>{% endfor")
    rows = Dataset.from_list([{**SEVERAL, "prompt": [user(f"Number {n}?")]} for n in range(3)])
    dataset, report = tokenize_pairs(rows, tokenizer, max_length=None, num_proc=None)
    assert "chosen_skipped" not in dataset.column_names
    assert (report.other_turns, report.skipped_turns) == (3, 0)
    assert report.table().count("template does not show where the answers are") == 1


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_cutting_moves_the_mask(mode):
    tokenizer = tokenizer_of("llama3")
    ids, scored = expected(tokenizer, "llama3", SEVERAL, "rejected")
    _, whole, _ = tokenise()
    for limit in range(len(whole[0]["prompt_ids"]) + 3, len(ids)):
        (row,), _ = tokenize_pairs(
            Dataset.from_list([SEVERAL]), tokenizer, max_length=limit, truncation_mode=mode, on_bad_row="raise"
        )
        kept, mask = scored_of(row, "rejected")
        if mode == "keep_start":
            assert (kept, mask) == (ids[:limit], scored[:limit])
        else:  # behind the BOS
            assert (kept[1:], mask[1:]) == (ids[len(ids) - limit + 1 :], scored[len(ids) - limit + 1 :])


def test_tokenised_rows_keep_their_mask_when_they_are_cut_again():
    tokenizer, dataset, _ = tokenise()
    limit = len(dataset[0]["prompt_ids"]) + 9
    again, _ = tokenize_pairs(dataset, tokenizer, max_length=limit)
    once, _ = tokenize_pairs(Dataset.from_list([SEVERAL]), tokenizer, max_length=limit)
    assert again[0] == once[0] and again[0]["rejected_skipped"]


@pytest.mark.parametrize("layout", [PaddedLayout(0), PackedLayout(0), PackedLayout(0, share_prompt=False)])
def test_sums_are_the_models_own_on_the_answers(layout):
    tokenizer, dataset, _ = tokenise(rows=ROWS)
    plain, model = tiny_model(), tiny_model()
    install_scoring(model)
    batch = layout.collate([[Group.of_pair(row) for row in dataset]])
    with torch.no_grad():
        scores = score_completions(model, batch, alignment="sampled")
    sides = [(row, side) for row in ROWS for side in ("chosen", "rejected")]
    found = [expected(tokenizer, "llama3", row, side) for row, side in sides]
    assert scores.logps.tolist() == pytest.approx([plain_sum(plain, *each) for each in found], rel=1e-5)
    assert scores.counts.tolist() == [sum(scored) for _, scored in found]


@pytest.mark.parametrize("settings", [{}, {"loss_type": ["sigmoid", "sft"]}, {"ld_alpha": 0.5}])
def test_training_is_the_same_packed_and_padded(tmp_path, settings):
    rows = Dataset.from_list(ROWS * 3)
    settings = {"rows": rows, "trainer": "DPO", **settings}
    padded, packed = (
        make_trainer(tmp_path / layout, batch_layout=layout, **settings) for layout in ("padded", "packed")
    )
    assert padded.layout.name == "padded" and packed.layout.name == "packed"
    padded.train()
    packed.train()
    assert history(packed) == pytest.approx(history(padded), rel=1e-5)
    counts = [sum(expected(padded.processing_class, "llama3", row, "chosen")[1]) for row in ROWS]
    logged = history(padded, "lengths/chosen")
    assert sum(counts) / 3 == pytest.approx(sum(logged) / len(logged), rel=0.5)
    assert [g.first_scored for g in padded.collate.lengths(padded.train_dataset, share_prompt=True)] == counts * 3


def test_cached_reference_scores_are_those_of_the_answers(tmp_path):
    settings = {"rows": Dataset.from_list(ROWS), "max_steps": 1, "trainer": "DPO"}
    live = make_trainer(tmp_path / "live", **settings)
    cached = make_trainer(
        tmp_path / "cached", precompute_ref_log_probs=True, ref_logps_dir=str(tmp_path / "scores"), **settings
    )
    for row in cached.train_dataset:
        ids, scored = scored_of(row, "rejected")
        assert row["ref_rejected_logps"] == pytest.approx(plain_sum(tiny_model(), ids, scored), rel=1e-5)
    live.train()
    cached.train()
    assert history(cached) == pytest.approx(history(live), rel=1e-6)
    # scores of whole completions are not taken for those of the answers, nor the other way round
    last = make_trainer(
        tmp_path / "last",
        precompute_ref_log_probs=True,
        ref_logps_dir=str(tmp_path / "scores"),
        completion_turns="last",
        **settings,
    )
    for old, new in zip(cached.train_dataset, last.train_dataset):
        same = old["ref_chosen_logps"] == new["ref_chosen_logps"]
        assert same == (scored_of(old, "chosen") == scored_of(new, "chosen"))


def test_references_of_other_families_score_the_answers(tmp_path):
    """Each by its own template; the policy's rows and theirs agree on what is scored."""
    rows = Dataset.from_list(ROWS)
    _, policy_rows, _ = tokenise("gemma2", ROWS)
    scorers = []
    for style in ("llama3", "chatml"):
        tokenizer = tiny_tokenizer(style)
        reference = ReferenceModel(style, tiny_model(vocab_size=len(tokenizer)), tokenizer)
        score_reference(rows, reference, ScoringSettings(root=tmp_path, dtype="float32", show_progress=False))
        scorers.append(text_scorer(reference, tmp_path, dtype="float32")[0])
    joined, _ = join_reference_scores(policy_rows, scorers, tmp_path, max_length=None)
    for number, style in enumerate(("llama3", "chatml")):
        tokenizer = tiny_tokenizer(style)
        for row, made in zip(ROWS, joined, strict=True):
            for side in ("chosen", "rejected"):
                ids, scored = expected(tokenizer, style, row, side)
                model = tiny_model(vocab_size=len(tokenizer))
                assert made[f"ref_{side}_logps"][number] == pytest.approx(plain_sum(model, ids, scored), rel=1e-5)
                assert made[f"ref_{side}_counts"][number] == sum(scored)


def test_reward_models_read_whole_dialogues():
    tokenizer = tiny_tokenizer("llama3")
    dataset, report = tokenize_comparisons(Dataset.from_list([SEVERAL]), tokenizer, max_length=None)
    assert set(dataset.column_names) == {"row_id", "prompt_ids", "response_ids", "scores", "is_adversarial"}
    ids, _ = expected(tokenizer, "llama3", SEVERAL, "chosen")
    assert dataset[0]["prompt_ids"] + dataset[0]["response_ids"][0] == ids
    assert report.other_turns == 1


def test_a_users_collator_scores_the_answers_too(tmp_path):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rows = Dataset.from_list(ROWS * 2)
    options = {"data_collator": DataCollatorForPreference(pad_token_id=0)}
    theirs = make_trainer(tmp_path / "theirs", "DPO", rows=rows, trainer_options=options)
    ours = make_trainer(tmp_path / "ours", "DPO", rows=rows, batch_layout="padded")
    theirs.train()
    ours.train()
    assert history(theirs) == pytest.approx(history(ours), rel=1e-6)


def test_the_setting_is_one_of_pairs_alone(tmp_path):
    assert prefopt.DPOConfig(tmp_path, completion_turns="last", use_cpu=True).text_mode.completion_turns == "last"
    with pytest.raises(ValueError, match="completion_turns must be one of"):
        prefopt.DPOConfig(tmp_path, completion_turns="first", use_cpu=True)
    with pytest.raises(ValueError, match="must be left alone"):
        prefopt.MultiReferenceDPOConfig(tmp_path, completion_turns="last", use_cpu=True)
    assert "chosen_skipped" not in make_trainer(tmp_path, rows=preference_rows(4)).train_dataset.column_names
