"""`prefopt generate` with the transformers backend, from prompts to records."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from prefopt.candidates.backends import AnswerRequest, Sampling, completion_of
from prefopt.candidates.backends.local import PenaltyWithoutPadding, TransformersBackend
from prefopt.candidates.generate import GenerateArguments, Generation, run
from prefopt.candidates.records import read_records
from prefopt.candidates.shards import Processes, ShardFailed
from prefopt.cli import main
from prefopt.files import read_json, read_jsonl
from tests.candidates.folders import HARD_PROMPTS, save_prompts, save_tiny
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)


def arguments(tmp_path, model, prompts, **changes):
    settings = {"output_dir": str(tmp_path / "out"), "max_new_tokens": 12, "num_samples": 3, "seed": 5, **changes}
    return GenerateArguments(
        model_name_or_path=model, prompts=save_prompts(tmp_path / "prompts.jsonl", prompts), **settings
    )


def generate(tmp_path, model, prompts, **changes):
    return read_records(run(arguments(tmp_path, model, prompts, **changes)))


def no_progress(answers, tokens):
    pass


def greedy(**changes):
    settings = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "stop_token_ids": (399,)}
    return Sampling(**{**settings, **changes})


def requests_for(tokenizer, texts, limit=10):
    return [AnswerRequest(tokenizer(text)["input_ids"], limit, seed=n) for n, text in enumerate(texts)]


def test_every_prompt_gets_k_answers(tmp_path, model_folder):
    records = generate(tmp_path, model_folder, ["hello", "a question", "another one"], output_format="jsonl")
    assert [record["prompt"] for record in records] == [
        [{"role": "user", "content": text}] for text in ("hello", "a question", "another one")
    ]
    for record in records:
        assert [(c["source"], c["k"]) for c in record["candidates"]] == [(model_folder, k) for k in range(3)]
        assert len({c["text"] for c in record["candidates"]}) == 3
        assert all(1 <= c["num_tokens"] <= 12 for c in record["candidates"])
        assert all((c["num_tokens"] == 12) or c["finish_reason"] == "stop" for c in record["candidates"])
    with pytest.raises(ValueError, match=r"candidates\.jsonl is there already"):
        generate(tmp_path, model_folder, ["hello"])
    report = read_json(tmp_path / "out" / "report.json")
    assert report["counts"]["answers"] == 9
    assert report["counts"]["tokens"] == sum(c["num_tokens"] for r in records for c in r["candidates"])


@pytest.mark.parametrize("style", ["llama3", "chatml"])
def test_hard_prompts_reach_the_model_whole_and_templated_once(tmp_path, style, monkeypatch):
    model = save_tiny(tmp_path / "model", style=style)
    system = [{"role": "system", "content": "Answer None."}, {"role": "user", "content": HARD_PROMPTS[0]}]
    seen = []
    complete = TransformersBackend.complete

    def spy(self, requests, seed, on_done):
        seen.extend(request.prompt_ids for request in requests)
        return complete(self, requests, seed, on_done)

    monkeypatch.setattr(TransformersBackend, "complete", spy)
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in HARD_PROMPTS] + [{"prompt": system}]
    records = generate(tmp_path, model, rows, num_samples=2)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for row, ids, record in zip(rows, seen[::2], records):
        text = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert row["prompt"][-1]["content"].strip() in tokenizer.decode(ids)
        assert record["prompt"] == row["prompt"]
        if style == "llama3" and "<s>" not in text[3:]:
            assert ids.count(tokenizer.bos_token_id) == 1
    assert "Answer None." in tokenizer.decode(seen[-1])


def test_a_prompt_that_is_templated_already_is_listed_or_taken_as_it_is(tmp_path, model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    turns = [{"role": "user", "content": "fox"}]
    templated = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    questions = ["hello", templated, "What is <|eot_id|>?"]
    records = generate(tmp_path, model_folder, questions)
    assert [record["prompt"][0]["content"] for record in records] == [questions[0], questions[2]]
    (skipped,) = read_jsonl(tmp_path / "out" / "skipped.jsonl")
    assert skipped["row"] == 1 and "prompt_format" in skipped["detail"]
    plan = Generation(arguments(tmp_path, model_folder, [templated], prompt_format="text"), Processes())
    assert plan.prompts.items[0]["prompt_ids"] == tokenizer(templated, add_special_tokens=False)["input_ids"]


def test_string_prompts_without_a_template_are_continued(tmp_path):
    model = save_tiny(tmp_path / "model", style=None)
    records = generate(tmp_path, model, ["\n\nHuman: hi\n\nAssistant:"])
    assert records[0]["prompt"] == "\n\nHuman: hi\n\nAssistant:"
    with pytest.raises(ValueError, match="no chat template"):
        generate(tmp_path, model, [[{"role": "user", "content": "hi"}]], output_dir=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="no chat template"):
        generate(tmp_path, model, ["hi"], output_dir=str(tmp_path / "other"), prompt_format="chat")
    assert not (tmp_path / "other").exists()


def test_padding_and_batching_change_no_greedy_answer(loaded):
    model, tokenizer = loaded
    requests = requests_for(tokenizer, ["fox", "What is two plus three? The answer", *HARD_PROMPTS])
    together, alone = (
        TransformersBackend(model, tokenizer, greedy(), batch_size=size).complete(requests, 0, no_progress)
        for size in (4, 1)
    )
    assert together == alone
    for request, completion in zip(requests, alone):
        ids = torch.tensor([request.prompt_ids])
        expected = []
        for _ in range(10):  # a transcription of greedy decoding
            expected.append(int(model(ids).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([expected[-1:]])], dim=1)
            if expected[-1] == 399:
                break
        assert completion.token_ids == tuple(expected)


def test_sampling_settings_are_ours_and_not_the_checkpoints(tmp_path):
    tokenizer, model = tiny_tokenizer("llama3"), tiny_model("llama")
    requests = requests_for(tokenizer, ["hello there"] * 8)
    likely = TransformersBackend(model, tokenizer, greedy(), batch_size=8).complete(requests, 0, no_progress)
    model.generation_config.top_k = 1
    model.generation_config.temperature = 0.01
    model.generation_config.max_length = 3
    drawn = TransformersBackend(model, tokenizer, greedy(temperature=1.0, stop_token_ids=()), batch_size=8).complete(
        requests, 0, no_progress
    )
    assert len({completion.token_ids for completion in drawn}) == 8
    assert {completion.num_tokens for completion in drawn} == {10}
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        sampling = greedy(**{"temperature": 1.0, **narrow})
        backend = TransformersBackend(model, tokenizer, sampling, batch_size=8)
        assert backend.complete(requests, 0, no_progress) == likely, narrow


def test_tokens_are_drawn_with_the_models_probabilities(loaded):
    """Chi-square over the first token of 4,000 draws at temperature 0.5 and top_k 4 against softmax(logits / 0.5)."""
    model, tokenizer = loaded
    prompt = tokenizer("hello")["input_ids"]
    logits = model(torch.tensor([prompt])).logits[0, -1].double()
    top = logits.topk(4)
    expected = torch.softmax(top.values / 0.5, dim=0) * 4000
    backend = TransformersBackend(
        model, tokenizer, greedy(temperature=0.5, top_k=4, stop_token_ids=()), batch_size=1000
    )
    drawn = backend.complete([AnswerRequest(prompt, 1, 0)] * 4000, 1, no_progress)
    counts = torch.tensor([sum(c.token_ids[0] == int(token) for c in drawn) for token in top.indices])
    assert counts.sum() == 4000
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # 99.9% quantile at 3 degrees of freedom


def test_repetition_penalty_does_not_see_the_padding():
    ids = torch.tensor([[2, 2, 7, 9, 4], [5, 6, 7, 8, 4]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    scores = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    ours = PenaltyWithoutPadding(1.7, mask)(ids, scores.clone())
    theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7)])
    assert torch.equal(ours[:1], theirs(ids[:1, 2:], scores[:1].clone()))
    assert torch.equal(ours[1:], theirs(ids[1:], scores[1:].clone()))
    assert ours[0, 2] == scores[0, 2]  # id 2 stands only in the padding


def test_padding_changes_no_answer_under_a_repetition_penalty(loaded):
    model, tokenizer = loaded
    requests = requests_for(tokenizer, ["fox", "What is two plus three? The answer is five."])
    sampling = greedy(repetition_penalty=1.5)
    together, alone = (
        TransformersBackend(model, tokenizer, sampling, batch_size=size).complete(requests, 0, no_progress)
        for size in (2, 1)
    )
    plain = TransformersBackend(model, tokenizer, greedy(), batch_size=2).complete(requests, 0, no_progress)
    assert together == alone != plain


def test_an_answer_ends_with_the_first_stop_token():
    tokenizer = tiny_tokenizer("llama3")
    ids = tokenizer("A fox lives", add_special_tokens=False)["input_ids"]
    stop = tokenizer.eos_token_id
    done = completion_of([*ids, stop, *ids], [stop, 3], tokenizer)
    assert (done.text, done.finish_reason, done.num_tokens) == ("A fox lives", "stop", len(ids) + 1)
    cut = completion_of(ids, [stop], tokenizer)
    assert (cut.text, cut.finish_reason, cut.num_tokens) == ("A fox lives", "length", len(ids))
    plain = completion_of([*ids[:2], 40, *ids], [40], tokenizer)  # a stop id that is an ordinary token
    assert plain.text == tokenizer.decode(ids[:2])


def test_stop_ids_of_the_recipe_end_answers(tmp_path, model_folder):
    long = generate(tmp_path, model_folder, ["hello"], num_samples=1, temperature=0)[0]["candidates"][0]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    backend = TransformersBackend(
        AutoModelForCausalLM.from_pretrained(model_folder), tokenizer, greedy(stop_token_ids=()), batch_size=1
    )
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True)
    ids = backend.complete([AnswerRequest(prompt["input_ids"], 12, 0)], 0, no_progress)[0].token_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == long["text"]
    short = generate(
        tmp_path,
        model_folder,
        ["hello"],
        num_samples=1,
        temperature=0,
        stop_token_ids=[ids[4]],
        output_dir=str(tmp_path / "b"),
    )[0]["candidates"][0]
    assert short["finish_reason"] == "stop"
    assert short["num_tokens"] == ids.index(ids[4]) + 1
    assert short["text"] == tokenizer.decode(ids[: ids.index(ids[4])], skip_special_tokens=True)


def test_the_end_tokens_that_a_model_declares_end_answers(tmp_path):
    """Of a model, of the base under an adapter (with Gemma's end of turn), and without a generation config."""
    tokenizer = tiny_tokenizer("gemma2")
    turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    model = tiny_model("llama", eos_token_id=[tokenizer.eos_token_id, turn])
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, turn]
    places = {name: str(tmp_path / name) for name in ("full", "bare", "adapter")}
    model.save_pretrained(places["full"])
    model.save_pretrained(places["bare"])
    (tmp_path / "bare" / "generation_config.json").unlink()
    base = AutoModelForCausalLM.from_pretrained(places["full"])
    get_peft_model(base, LoraConfig(target_modules=["v_proj"])).save_pretrained(places["adapter"])
    assert tokenizer.eos_token_id != turn
    for name, place in places.items():
        tokenizer.save_pretrained(place)
        job = Generation(arguments(tmp_path, place, ["hello"]), Processes())
        assert job.sampling.stop_token_ids == tuple(sorted([tokenizer.eos_token_id, turn])), name


def test_the_seed_decides_the_samples(tmp_path, model_folder):
    prompts = [f"question {i}" for i in range(5)]
    first, again, other, finer = (
        generate(tmp_path, model_folder, prompts, output_dir=str(tmp_path / name), shard_size=size, seed=seed)
        for name, size, seed in (("a", 2, 5), ("b", 2, 5), ("c", 2, 6), ("d", 1, 5))
    )
    assert first == again
    assert first != other and first != finer


def test_a_run_that_failed_continues_and_equals_an_undisturbed_one(tmp_path, model_folder, monkeypatch):
    prompts = [f"question {i}" for i in range(6)]
    whole = generate(tmp_path, model_folder, prompts, shard_size=2, output_dir=str(tmp_path / "whole"))
    complete = TransformersBackend.complete
    calls = []

    def fails_at_the_second(self, requests, seed, on_done):
        calls.append(seed)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return complete(self, requests, seed, on_done)

    monkeypatch.setattr(TransformersBackend, "complete", fails_at_the_second)
    with pytest.raises(ShardFailed, match="shard 1 of 3 failed"):
        generate(tmp_path, model_folder, prompts, shard_size=2)
    assert not (tmp_path / "out" / "candidates.parquet").exists()
    assert generate(tmp_path, model_folder, prompts, shard_size=2) == whole
    assert len(calls) == 4  # shard 0 once, shard 1 twice, shard 2 once


def test_running_out_of_memory_says_what_to_change(loaded, monkeypatch):
    model, tokenizer = loaded

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "generate", full)
    with pytest.raises(ValueError, match=r"batch_size 4 and prompts of up to \d+ tokens; set a smaller batch_size"):
        TransformersBackend(model, tokenizer, greedy(), batch_size=4).complete(
            requests_for(tokenizer, ["a"]), 0, no_progress
        )


def test_changed_settings_and_changed_weights_are_refused(tmp_path):
    model = save_tiny(tmp_path / "model")
    generate(tmp_path, model, ["hello"])
    for change in ({"temperature": 1.0}, {"num_samples": 4}, {"max_new_tokens": 13}, {"stop_token_ids": [3]}):
        with pytest.raises(ValueError, match="made with other settings"):
            generate(tmp_path, model, ["hello"], **change)
    with pytest.raises(ValueError, match="other input rows"):
        generate(tmp_path, model, ["other"])
    generate(tmp_path, model, ["hello"], batch_size=2)  # changes nothing that was drawn
    save_tiny(tmp_path / "model", seed=1)
    with pytest.raises(ValueError, match="model_fingerprint"):
        generate(tmp_path, model, ["hello"])


def test_prompts_without_room_and_empty_prompts_are_counted_and_listed(tmp_path, model_folder, capsys):
    rows = [
        {"prompt": "ok", "prompt_id": "good"},
        {"prompt": " \n", "prompt_id": "blank"},
        {"prompt": None, "prompt_id": "none"},
        {"prompt": "word " * 500, "prompt_id": "long"},
        {"prompt": "fox " * 60, "prompt_id": "tight"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tight = tokenizer.apply_chat_template([{"role": "user", "content": "fox " * 60}], add_generation_prompt=True)
    context = len(tight["input_ids"]) + 4
    records = generate(tmp_path, model_folder, rows, max_model_len=context)
    assert [record["prompt_id"] for record in records] == ["good", "tight"]
    assert all(c["num_tokens"] <= 4 for c in records[1]["candidates"])
    assert any(c["num_tokens"] == 4 and c["finish_reason"] == "length" for c in records[1]["candidates"])
    assert any(c["num_tokens"] == 12 for c in records[0]["candidates"])
    skipped = {row["prompt_id"]: row["reason"] for row in read_jsonl(tmp_path / "out" / "skipped.jsonl")}
    assert skipped == {"blank": "empty prompt", "none": "missing field", "long": "prompt too long"}
    report = read_json(tmp_path / "out" / "report.json")
    assert report["prompts skipped"] == {"empty prompt": 1, "missing field": 1, "prompt too long": 1}
    assert report["counts"]["prompts with less room than max_new_tokens"] == 1
    assert "1 rows without samples: prompt too long" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"No prompt can be used \(1 rows: prompt too long\)"):
        generate(tmp_path, model_folder, rows[3:4], output_dir=str(tmp_path / "b"))
    assert not (tmp_path / "b").exists()


def test_each_prompt_that_the_template_refuses_is_listed_with_its_own_reason(tmp_path):
    model = save_tiny(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(
        "{% if messages | length > 1 %}{{ raise_exception('not after ' + messages[0]['role']) }}{% endif %}{{ "
        "messages[0]['content'] }}"
    )
    rows = [
        {"prompt": [{"role": role, "content": "x"}, {"role": "user", "content": "y"}], "prompt_id": role}
        for role in ("system", "user")
    ]
    records = generate(tmp_path, model, [*rows, {"prompt": [{"role": "user", "content": "fox"}], "prompt_id": "good"}])
    assert [record["prompt_id"] for record in records] == ["good"]
    listed = {
        row["prompt_id"]: (row["reason"], row["detail"]) for row in read_jsonl(tmp_path / "out" / "skipped.jsonl")
    }
    assert listed == {
        role: ("refused by the chat template", f"TemplateError: not after {role}") for role in ("system", "user")
    }


def test_responses_of_the_dataset_join_the_samples(tmp_path, model_folder):
    rows = [
        {"prompt": "q", "chosen": "good", "rejected": [{"role": "assistant", "content": "bad"}]},
        {"prompt": "r", "chosen": "fine", "rejected": [{"role": "assistant", "content": "poor"}]},
        {"prompt": "q", "chosen": "better", "rejected": [{"role": "assistant", "content": "bad"}]},
    ]
    records = generate(tmp_path, model_folder, rows, off_policy_columns=["chosen", "rejected"])
    assert [len(record["candidates"]) for record in records] == [6, 5]
    given = [(c["source"], c["k"], c["text"]) for c in records[0]["candidates"][3:]]
    assert given == [
        ("dataset[chosen]", 0, "good"),
        ("dataset[rejected]", 0, "bad"),
        ("dataset[chosen]", 1, "better"),
    ]
    assert read_json(tmp_path / "out" / "report.json")["duplicate prompts"] == 1
    scored = {"prompt": "s", "chosen": {"response": "x", "score": float("nan")}, "rejected": "y"}
    with pytest.raises(ValueError, match=r"row 1: Column 'chosen': a score is nan"):  # and not when all is sampled
        generate(
            tmp_path,
            model_folder,
            [{"prompt": "t", "chosen": {"response": "x", "score": 1.0}}, scored],
            off_policy_columns=["chosen"],
            output_dir=str(tmp_path / "b"),
        )
    assert not (tmp_path / "b").exists()
    with pytest.raises(ValueError, match=r"row 0: .*no column 'baseline'"):
        generate(tmp_path, model_folder, rows, off_policy_columns=["baseline"], output_dir=str(tmp_path / "b"))


def test_prompts_come_from_conversations_pairs_and_other_columns(tmp_path, model_folder):
    turn = {"role": "user", "content": "hi"}
    answer = {"role": "assistant", "content": "yes"}
    pair = {"chosen": [turn, answer], "rejected": [turn, {"role": "assistant", "content": "no"}]}
    for name, row, more in (
        ("a", {"messages": [turn, answer]}, {}),
        ("b", pair, {}),
        ("c", {"instruction": "hi"}, {"prompt_column": "instruction"}),
    ):
        records = generate(tmp_path, model_folder, [row], output_dir=str(tmp_path / name), **more)
        assert records[0]["prompt"] == [turn]
    with pytest.raises(ValueError, match="no column 'question'"):
        generate(tmp_path, model_folder, ["x"], prompt_column="question", output_dir=str(tmp_path / "d"))


def test_two_prompts_with_one_id_are_refused(tmp_path, model_folder):
    rows = [{"prompt": "a", "prompt_id": "x"}, {"prompt": "b", "prompt_id": "x"}]
    with pytest.raises(ValueError, match="rows 0 and 1 have the prompt_id 'x', but other prompts"):
        generate(tmp_path, model_folder, rows)


def test_the_hub_is_used_only_when_asked_and_last(tmp_path, model_folder, monkeypatch):
    pushed = []

    def push(self, repository, private):
        assert (tmp_path / "out" / "candidates.parquet").exists()
        pushed.append((repository, private, len(self)))

    monkeypatch.setattr(Dataset, "push_to_hub", push)
    generate(tmp_path, model_folder, ["hello"])
    assert pushed == []
    generate(tmp_path, model_folder, ["hello"], push_to_hub=True, hub_dataset_id="me/candidates")
    assert pushed == [("me/candidates", True, 1)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_samples": 1}, "one sample makes no pair"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"temperature": 0}, "all 5 samples of a prompt are the same"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"backend": "hf"}, "backend must be one of transformers, vllm, server"),
        ({"prompts": ""}, "prompts is missing"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is only read with backend vllm"),
        ({"backend": "server", "batch_size": 2}, "batch_size is only read with backend transformers"),
        ({"hub_dataset_id": "me/x"}, "belong together"),
        ({"push_to_hub": True}, "belong together"),
        ({"request_timeout": 0, "backend": "server"}, "request_timeout is 0"),
        ({"dtype": "int8"}, "dtype must be one of"),
    ],
)
def test_mistakes_in_the_settings_are_told(changes, reason):
    with pytest.raises(ValueError, match=reason):
        GenerateArguments(**{"model_name_or_path": "m", "prompts": "p", "output_dir": "o", **changes})


def test_one_sample_is_for_evaluation_and_for_greedy_answers():
    common = {"model_name_or_path": "m", "prompts": "p", "output_dir": "o", "num_samples": 1}
    assert GenerateArguments(**common, for_evaluation=True).temperature == 0.7
    assert GenerateArguments(**common, temperature=0).top_p == 1.0


def test_a_missing_engine_and_a_missing_model_are_told(tmp_path, model_folder):
    try:
        import vllm  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"needs vLLM.*prefopt\[vllm\]"):
            run(arguments(tmp_path, model_folder, ["hello"], backend="vllm"))
    with pytest.raises(OSError, match="neither a local folder nor a model"):
        run(arguments(tmp_path, str(tmp_path / "nothing"), ["hello"], output_dir=str(tmp_path / "c")))


def test_continuous_batching_refuses_what_it_would_ignore(loaded):
    with pytest.raises(ValueError, match="leaves out repetition_penalty"):
        TransformersBackend(*loaded, greedy(repetition_penalty=1.1), batch_size=1, continuous=True)


@pytest.mark.slow
def test_continuous_batching_gives_the_same_greedy_answers(loaded):
    model, tokenizer = loaded
    requests = requests_for(tokenizer, ["fox", "What is two plus three? The answer", HARD_PROMPTS[3]], limit=6)
    padded = TransformersBackend(model, tokenizer, greedy(), batch_size=4).complete(requests, 0, no_progress)
    backend = TransformersBackend(model, tokenizer, greedy(), batch_size=4, continuous=True)
    assert backend.complete(requests, 0, no_progress) == padded
    warm = greedy(temperature=1.0, stop_token_ids=())
    backend = TransformersBackend(model, tokenizer, warm, batch_size=4, continuous=True)
    first, again = (backend.complete(requests[:1] * 3, 1, no_progress) for _ in range(2))
    assert first == again
    assert len({completion.token_ids for completion in first}) == 3


def test_an_adapter_answers_as_the_merged_model(tmp_path, model_folder):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder),
        LoraConfig(init_lora_weights=False, lora_alpha=256, target_modules=["v_proj", "o_proj"]),
    )
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for name, saved in (("adapter", model), ("merged", copy.deepcopy(model).merge_and_unload())):
        saved.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    texts = {
        name: generate(
            tmp_path,
            str(path),
            ["hello", "fox"],
            num_samples=1,
            temperature=0,
            output_dir=str(tmp_path / f"{name}_out"),
        )
        for name, path in (("adapter", tmp_path / "adapter"), ("merged", tmp_path / "merged"), ("plain", model_folder))
    }
    answers = {name: [record["candidates"][0]["text"] for record in records] for name, records in texts.items()}
    assert answers["adapter"] == answers["merged"] != answers["plain"]
    with pytest.raises(ValueError, match="holds an adapter: merge it"):
        generate(tmp_path, str(tmp_path / "adapter"), ["hello"], backend="vllm", output_dir=str(tmp_path / "c"))


@pytest.mark.parametrize(
    ("kind", "tied"),
    [  # peft merges an adapter on tied embeddings into the head as well, so that the two would differ
        ("saved embeddings", False),
        ("saved embeddings", True),
        ("modules to save", False),
        ("modules to save", True),
        ("adapter on embeddings", False),
    ],
)
def test_an_adapter_with_resized_embeddings_answers_as_the_merged_model(tmp_path, kind, tied):
    folder = save_tiny(tmp_path / "base", tie_word_embeddings=tied)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>", "<newer>"])
    base = AutoModelForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(len(tokenizer) + 5)
    assert base.get_input_embeddings().weight.shape[0] != base.config.get_text_config().vocab_size - 5
    options = {
        "saved embeddings": {"target_modules": ["v_proj"]},
        "modules to save": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        "adapter on embeddings": {"target_modules": ["v_proj", "embed_tokens"]},
    }[kind]
    if tied and kind == "modules to save":
        options["modules_to_save"] = ["embed_tokens"]
    model = get_peft_model(base, LoraConfig(init_lora_weights=False, lora_alpha=64, **options))
    with torch.no_grad():
        model.get_input_embeddings().weight[-7:].normal_(0, 1)
    answers = {}
    for name, saved in (("adapter", model), ("merged", copy.deepcopy(model).merge_and_unload())):
        saved.save_pretrained(tmp_path / name, save_embedding_layers=kind == "saved embeddings" or "auto")
        tokenizer.save_pretrained(tmp_path / name)
        records = generate(
            tmp_path,
            str(tmp_path / name),
            ["hello <new>", "fox"],
            num_samples=1,
            temperature=0,
            output_dir=str(tmp_path / f"{name}_out"),
        )
        answers[name] = [record["candidates"][0]["text"] for record in records]
    assert answers["adapter"] == answers["merged"]


def test_an_adapter_that_names_no_model_is_one_line(tmp_path, model_folder):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), LoraConfig(target_modules=["v_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**read_json(config), "base_model_name_or_path": None}))
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="adapter that does not name its model"):
        generate(tmp_path, str(tmp_path / "adapter"), ["hello"])


def test_a_missing_package_is_found_before_the_first_shard(tmp_path, model_folder):
    with pytest.raises(ValueError, match=r"cannot be loaded here") as caught:
        generate(tmp_path, model_folder, ["hello"], attn_implementation="flash_attention_3")
    assert not isinstance(caught.value, ShardFailed)
    assert not (tmp_path / "out" / "generate_shards").exists()


def test_the_command_takes_a_recipe_and_the_older_flags(tmp_path, model_folder, capsys):
    prompts = save_prompts(tmp_path / "prompts.jsonl", ["hello", "fox"])
    recipe = {"model_name_or_path": model_folder, "prompts": prompts, "num_samples": 2, "max_new_tokens": 6, "seed": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "output_dir": str(tmp_path / "a")}))
    assert main(["generate", str(tmp_path / "recipe.yaml")]) == 0
    flags = ["--model", model_folder, "--prompts", prompts, "--pairs", "2", "--maxlen=6", "--seed", "1"]
    assert main(["generate", *flags, "--output_dir", str(tmp_path / "b")]) == 0
    assert read_records(tmp_path / "a") == read_records(tmp_path / "b")
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "recipe.yaml"), "--num_samples", "1"]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and "one sample makes no pair" in told[0]


def test_the_recipe_in_the_documentation_is_sound():
    text = (Path(__file__).resolve().parents[2] / "docs" / "candidates.md").read_text()
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert GenerateArguments(**recipe).num_samples == 5


def test_the_report_is_json_and_names_what_decided_the_samples(tmp_path, model_folder):
    generate(tmp_path, model_folder, ["hello"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["sampling"]["temperature"] == 0.7
    assert len(report["settings"]["model_fingerprint"]) == 64
    manifest = read_json(tmp_path / "out" / "generate_shards" / "00000.json")
    assert manifest["settings"] == report["settings"]
    assert len(manifest["row_ids"]) == 1


def test_an_engines_environment_needs_neither_peft_nor_trl():
    """`.ci/vllm_env.sh` installs none of the trainers' packages beside vLLM."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(('peft', 'trl', 'deepspeed')); "
        "import prefopt.candidates.generate, prefopt.candidates.backends.engine, prefopt.cli"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
