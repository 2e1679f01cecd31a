import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from prefopt.candidates.backends.http import JsonClient, ServerError
from prefopt.candidates.pairs import win_probabilities
from prefopt.candidates.rankers import RankerOptions, build_ranker
from prefopt.candidates.rankers.base import Request, check_scores, length_batches, plain_text
from prefopt.candidates.rankers.judge import verdict
from prefopt.candidates.rankers.pair_rm import Limits
from prefopt.models.general_preference import GeneralPreferenceModel
from prefopt.models.reward import RewardModel
from tests.candidates.ranking import ANSWERS, PROMPTS, REQUESTS, SHAPE, judge_server, save_reward_model, spread, tally
from tests.models.test_pair_ranker import deberta_tokenizer, logit, save_published, tiny_ranker
from tests.tiny import tiny_model, tiny_tokenizer


def build(kind, path, **options):
    return build_ranker(RankerOptions(kind, str(path), torch.device("cpu"), **options))


def conversation(prompt, answer):
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [*turns, {"role": "assistant", "content": answer}]


# --- sequence classification
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [0, None])
@pytest.mark.parametrize("tokens_per_batch", [1, 150, 16384])
def test_reward_model_scores_whole_conversations(tmp_path, pad, tokens_per_batch):
    """As transformers scores each conversation alone; with `pad` None it refuses batches, so no pad token may be
    mistaken for one."""
    model, tokenizer = save_reward_model(tmp_path, pad=pad)
    counts = tally()
    scores = build("reward-model", tmp_path, tokens_per_batch=tokens_per_batch).rank(REQUESTS, counts)
    for prompt, answers, row in zip(PROMPTS, ANSWERS, scores):
        for answer, score in zip(answers, row, strict=True):
            ids = tokenizer.apply_chat_template(conversation(prompt, answer), return_tensors="pt")["input_ids"]
            with torch.no_grad():
                assert score == pytest.approx(model(ids).logits.item(), abs=2e-5)
    assert np.concatenate(scores).std() > 0.05
    assert counts.counts["prompts"] == 3 and counts.counts["answers"] == 9 and counts.counts["truncated answers"] == 0


def test_truncation_keeps_the_end_and_is_counted(tmp_path):
    save_reward_model(tmp_path)
    counts = tally()
    requests = [Request("a", "word " * 60, ["five", "six " * 60, "two"]), Request("b", "short", ["x"])]
    scores = build("reward-model", tmp_path, max_length=40).rank(requests, counts)
    assert counts.counts["truncated prompts"] == 1 and counts.counts["truncated answers"] == 1
    end = build("reward-model", tmp_path, max_length=40).rank(
        [Request("a", "other beginning " + "word " * 60, ["five"])], tally()
    )
    assert end[0][0] == pytest.approx(scores[0][0], abs=1e-6)  # only the prompt's beginning differs, and it is cut
    with pytest.raises(ValueError, match="reads at most 512"):
        build("reward-model", tmp_path, max_length=513)


def test_encoder_without_chat_template_reads_a_pair_of_texts(tmp_path):
    tokenizer = deberta_tokenizer()
    from tokenizers.processors import TemplateProcessing

    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    config = AutoConfig.for_model(
        "bert",
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=1,
    )
    model = spread(AutoModelForSequenceClassification.from_config(config))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "tokenizer_config.json").read_text())
    described["model_input_names"] = [
        "input_ids",
        "token_type_ids",
        "attention_mask",
    ]  # as BERT's own tokenizer has them
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    counts = tally()
    (scores,) = build("reward-model", tmp_path, max_length=60).rank(
        [Request("a", "Name a colour.", ["Blue.", "green " * 60])], counts
    )
    inputs = tokenizer("Name a colour.", "Blue.", return_tensors="pt", return_token_type_ids=True)
    assert set(inputs["token_type_ids"][0].tolist()) == {0, 1}
    with torch.no_grad():
        expected = model(**inputs).logits.item()
    assert scores[0] == pytest.approx(expected, abs=1e-5)
    assert counts.counts["truncated answers"] == 1


def test_our_own_reward_model_is_read_by_its_own_pooling(tmp_path):
    tokenizer = tiny_tokenizer("llama3")
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), pad_token_id=0, **SHAPE)
    torch.manual_seed(0)
    model = spread(RewardModel.from_backbone_config(config, pooling="mean"))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (scores,) = build("reward-model", tmp_path).rank(REQUESTS[:1], tally())
    ids = tokenizer.apply_chat_template(conversation(PROMPTS[0], ANSWERS[0][1]), return_tensors="pt")["input_ids"]
    assert scores[1] == pytest.approx(model.rewards(ids).item(), abs=1e-5)


REMOTE = """
from dataclasses import dataclass
import torch
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel
from transformers.utils import ModelOutput

@dataclass
class Out(ModelOutput):
    rewards: torch.Tensor = None
    score: torch.Tensor = None

class ManyHeads(LlamaPreTrainedModel):
    config_class = LlamaConfig
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.heads = torch.nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.gate = torch.nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
    def forward(self, input_ids=None, attention_mask=None):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        last = hidden[torch.arange(len(hidden)), attention_mask.sum(-1) - 1]
        rewards = self.heads(last)
        return Out(rewards=rewards, score=(rewards * self.gate(last).softmax(-1)).sum(-1))
"""


def test_many_heads_with_one_gated_score(tmp_path, monkeypatch):
    """A model in ArmoRM's shape: its repository brings the code, its output has `rewards` (19 objectives) and
    `score`."""
    _, tokenizer = save_reward_model(tmp_path)
    (tmp_path / "many_heads.py").write_text(REMOTE)
    namespace = {}
    exec(REMOTE, namespace)
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), num_labels=19, pad_token_id=0, **SHAPE)
    torch.manual_seed(0)
    model = spread(namespace["ManyHeads"](config))
    model.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    described["auto_map"] = {"AutoModelForSequenceClassification": "many_heads.ManyHeads"}
    (tmp_path / "config.json").write_text(json.dumps(described))
    scores = build("reward-model", tmp_path, trust_remote_code=True).rank(REQUESTS, tally())
    ids = tokenizer.apply_chat_template(conversation(PROMPTS[2], ANSWERS[2][3]), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert scores[2][3] == pytest.approx(model(ids, torch.ones_like(ids)).score.item(), abs=1e-5)


ARMO = {
    "num_objectives": 5,
    "num_labels": 5,
    "gating_temperature": 2.0,
    "gating_hidden_dim": 24,
    "gating_n_hidden": 2,
}


def armo_score(weights, hidden, gate_at):
    """ArmoRM's forward from one conversation's last hidden states, in float64: no class, no padding."""
    weights = {name: value.double() for name, value in weights.items()}
    rewards = weights["regression_layer.weight"] @ hidden[-1]
    state = hidden[gate_at]
    for layer in range(3):
        state = weights[f"gating.layers.{layer}.weight"] @ state + weights[f"gating.layers.{layer}.bias"]
        state = state.clamp(min=0) if layer < 2 else state
    gates = (state / ARMO["gating_temperature"]).softmax(0) * weights["gating.logit_scale"]
    return (gates * (rewards @ weights["reward_transform_matrix"])).sum().item()


def test_armo_rm_is_read_without_its_code(tmp_path):
    """The published layout: config.json names remote code (which is not there), weights have the published names."""
    _, tokenizer = save_reward_model(tmp_path)
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), pad_token_id=0, **SHAPE)
    torch.manual_seed(0)
    base = spread(AutoModelForCausalLM.from_config(config)).model
    weights = {f"model.{name}": value for name, value in base.state_dict().items()}
    weights |= {"regression_layer.weight": torch.randn(5, 32), "reward_transform_matrix": torch.randn(5, 5)}
    weights["gating.logit_scale"] = torch.tensor([1.5])
    for layer, (inside, outside) in enumerate(((32, 24), (24, 24), (24, 5))):
        weights[f"gating.layers.{layer}.weight"] = torch.randn(outside, inside)
        weights[f"gating.layers.{layer}.bias"] = torch.randn(outside)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    described = json.loads((tmp_path / "config.json").read_text()) | ARMO
    described["architectures"] = ["LlamaForRewardModelWithGating"]
    described["auto_map"] = {"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"}
    (tmp_path / "config.json").write_text(json.dumps(described))
    scores = build("reward-model", tmp_path, tokens_per_batch=150).rank(REQUESTS, tally())
    turn = tokenizer("<|eot_id|><|start_header_id|>assistant<|end_header_id|>", add_special_tokens=False)
    for prompt, answers, row in zip(PROMPTS, ANSWERS, scores):
        for answer, score in zip(answers, row, strict=True):
            ids = tokenizer.apply_chat_template(conversation(prompt, answer))["input_ids"]
            pattern = turn["input_ids"]
            gate_at = max(n for n in range(len(ids)) if ids[n : n + len(pattern)] == pattern)
            with torch.no_grad():
                hidden = base(torch.tensor([ids])).last_hidden_state[0].double()
            assert score == pytest.approx(armo_score(weights, hidden, gate_at), rel=1e-4, abs=1e-4)
    assert np.concatenate(scores).std() > 0.05
    with pytest.raises(ValueError, match="raise `max_length`"):
        build("reward-model", tmp_path, max_length=12).rank([Request("a", "hi", ["word " * 40])], tally())
    del weights["regression_layer.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights .* regression_layer\.weight"):
        build("reward-model", tmp_path)


WITHOUT_PACKAGES = """
import sys
for name in ("sentencepiece", "google.protobuf"):
    sys.modules[name] = None
from prefopt.candidates.rankers.pair_rm import PairRanker
try:
    PairRanker.from_pretrained(sys.argv[1])
except ValueError as error:
    print(error)
"""


def save_sentencepiece(folder):
    """A DeBERTa-v3-style tokenizer, nothing but spm.model, of the words of the answers."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder.mkdir()
    text = folder / "words.txt"
    text.write_text("\n".join(["name a colour please blue is green and two plus three is five or six"] * 50))
    pieces = {
        f"{name}_piece": token
        for name, token in zip(("pad", "bos", "eos", "unk"), ("[PAD]", "[CLS]", "[SEP]", "[UNK]"))
    }
    ids = {f"{name}_id": number for number, name in enumerate(("pad", "bos", "eos", "unk"))}
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "spm"), vocab_size=60, hard_vocab_limit=False, **pieces, **ids
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "vocab_type": "spm"}))


def test_pair_rm_with_a_sentencepiece_tokenizer(tmp_path):
    """As deberta-v3-large, PairRM's backbone; without the packages that read it, the error names the extra."""
    model = tiny_ranker(Limits(40, 12))
    folder = save_published(model, tmp_path / "ranker")
    described = json.loads((folder / "config.json").read_text())
    for name in [path.name for path in Path(described["model_name"]).glob("tokenizer*")]:
        Path(described["model_name"], name).unlink()
    save_sentencepiece(tmp_path / "spm")
    for path in (tmp_path / "spm").iterdir():
        shutil.copy(path, described["model_name"])
    (table,) = build("pair-rm", folder).rank([Request("a", "name a colour", ["blue", "green please"])], tally())
    assert np.isfinite(table).all() and table[0, 1] != 0
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGES, str(folder)], capture_output=True, text=True, check=True
    )
    assert "needs sentencepiece and protobuf: pip install 'prefopt[pairrm]'" in done.stdout


def test_wrong_heads_are_refused(tmp_path):
    save_reward_model(tmp_path / "three", labels=3)
    with pytest.raises(ValueError, match="3 outputs per answer"):
        build("reward-model", tmp_path / "three").rank(REQUESTS, tally())
    tiny_model("llama").save_pretrained(tmp_path / "causal")
    tiny_tokenizer("llama3").save_pretrained(tmp_path / "causal")
    with pytest.raises(ValueError, match=r"no trained classification head \(score\.weight"):
        build("reward-model", tmp_path / "causal")
    with pytest.raises(ValueError, match="no trained head"):
        build("general-preference", tmp_path / "causal")
    with pytest.raises(ValueError, match="holds no PairRM"):
        build("pair-rm", tmp_path / "causal")


def test_a_turn_that_the_template_refuses_names_the_row(tmp_path):
    save_reward_model(tmp_path)
    tiny_tokenizer("gemma2").save_pretrained(tmp_path)
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    with pytest.raises(ValueError, match=r"'sys1'.*System role not supported"):
        build("reward-model", tmp_path).rank([Request("sys1", prompt, ["a", "b"])], tally())


# --- pairwise rankers
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 16384])
def test_pair_rm_runs_all_ordered_pairs(tmp_path, tokens_per_batch):
    model = tiny_ranker(Limits(40, 12))
    counts = tally()
    tables = build("pair-rm", save_published(model, tmp_path), tokens_per_batch=tokens_per_batch).rank(
        REQUESTS, counts
    )
    for request, table in zip(REQUESTS, tables):
        for i in range(len(request.candidates)):
            for j in range(len(request.candidates)):
                expected = 0.0 if i == j else logit(model, plain_text(request.prompt), request.candidates, i, j)
                assert table[i, j] == pytest.approx(expected, abs=2e-5)
    assert counts.counts["truncated answers"] == 2 and counts.counts["truncated prompts"] == 0


@pytest.mark.parametrize("gate", [None, "softmax"])
def test_general_preference_tables(tmp_path, gate):
    """s(i beats j) / tau = sum_k lambda_k (v_i[2k] v_j[2k+1] - v_i[2k+1] v_j[2k]) / tau, embeddings taken one
    conversation at a time."""
    tokenizer = tiny_tokenizer("llama3")
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), pad_token_id=0, **SHAPE)
    torch.manual_seed(0)
    model = spread(GeneralPreferenceModel.from_backbone_config(config, dim=4, scale_gate=gate, temperature=0.5))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tables = build("general-preference", tmp_path, tokens_per_batch=100).rank(REQUESTS, tally())
    with pytest.raises(ValueError, match=r"max_length is 4096, but .* reads at most 2048 tokens"):
        build("general-preference", tmp_path, max_length=4096)
    for request, table in zip(REQUESTS, tables):
        vectors, scales = [], np.ones(2)
        bare = tokenizer.apply_chat_template(conversation(request.prompt, "")[:-1], add_generation_prompt=True)[
            "input_ids"
        ]
        for answer in request.candidates:
            ids = tokenizer.apply_chat_template(conversation(request.prompt, answer), return_tensors="pt")["input_ids"]
            # this tokenizer reads the last line break of the prompt otherwise where an answer follows: the prompt ends
            # before it
            length = next(n for n, (alone, followed) in enumerate(zip(bare, ids[0].tolist())) if alone != followed)
            embedding, gates = model.embeddings(ids, None, torch.tensor([length]))
            vectors.append(embedding[0].double().numpy())
            scales = scales if gates is None else gates[0].double().numpy()
        for i, a in enumerate(vectors):
            for j, b in enumerate(vectors):
                expected = sum(scales[k] * (a[2 * k] * b[2 * k + 1] - a[2 * k + 1] * b[2 * k]) for k in range(2)) / 0.5
                assert table[i, j] == pytest.approx(expected, abs=1e-4)
        assert np.abs(table).max() > 1e-3


def test_a_released_general_preference_model_reads_what_it_was_trained_on(tmp_path):
    """The last token of the conversation is the EOS, and the prompt head stands at the end of the first user turn."""
    tokenizer = tiny_tokenizer("gemma2")
    base = spread(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=len(tokenizer), **SHAPE)))
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    heads = {"value_head.weight": torch.randn(4, 32), "prompt_head.weight": torch.randn(2, 32)}
    weights = load_file(tmp_path / "model.safetensors") | heads
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    turns = [("user", "Name a colour."), ("assistant", "Blue."), ("user", "Another?")]
    dialogue = [{"role": role, "content": text} for role, text in turns]
    requests = [
        Request("one", "What is two plus three?", ["five", "six or so"]),
        Request("two", dialogue, ["Red.", "x"]),
    ]
    ranker = build("general-preference", tmp_path)
    for request, table in zip(requests, ranker.rank(requests, tally())):
        turn = tokenizer.apply_chat_template(conversation(request.prompt, "")[:1])["input_ids"]
        rows = [
            tokenizer.apply_chat_template(conversation(request.prompt, a))["input_ids"] for a in request.candidates
        ]
        assert all(ids[: len(turn)] == turn and ids[-1] != tokenizer.eos_token_id for ids in rows)
        with torch.no_grad():
            states = [base.model(torch.tensor([[*ids[:-1], tokenizer.eos_token_id]]))[0][0] for ids in rows]
        a, b = (torch.nn.functional.normalize(heads["value_head.weight"] @ state[-1], dim=0) for state in states)
        gates = (heads["prompt_head.weight"] @ states[0][len(turn) - 1]).softmax(0)
        score = sum(gates[k] * (a[2 * k] * b[2 * k + 1] - a[2 * k + 1] * b[2 * k]) for k in range(2)) / 0.1
        assert table[0, 1] == pytest.approx(score.item(), abs=1e-4) and abs(table[0, 1]) > 1e-2
    # cut at its beginning, the prompt still has its gate where the turn ends
    cut = build("general-preference", tmp_path, max_length=len(rows[1]) - 3)
    short, full = (each.encode(requests[1:], tally())[0] for each in (cut, ranker))
    for one, other in zip(short, full):
        assert one.ids[one.prompt_length - 1 :] == other.ids[other.prompt_length - 1 :]
    ranker.model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    assert ranker.as_released and not build("general-preference", tmp_path / "ours").as_released


@pytest.mark.parametrize("template", ["llama3", "gemma2"])
@pytest.mark.parametrize("form", ["example", "fork"])
def test_general_preference_ids_of_the_authors_other_code(tmp_path, template, form):
    """Transcribed (their code needs a GPU): the rendered text is encoded again, as gpm_example_usage.py and the fork's
    RMs/reward_model.py do, and the prompt is the first turn alone, encoded in the same way."""
    tokenizer = tiny_tokenizer(template)
    base = spread(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=len(tokenizer), **SHAPE)))
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors") | {"value_head.weight": torch.randn(4, 32)}
    save_file(weights | {"prompt_head.weight": torch.randn(2, 32)}, tmp_path / "model.safetensors", {"format": "pt"})
    request = Request("one", "What is two plus three?", ["five", "six or so"])
    ranker = build("general-preference", tmp_path, released_format=form)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for answer, text in zip(ranker.encode([request], tally())[0], request.candidates):
        whole = tokenizer.apply_chat_template(conversation(request.prompt, text), tokenize=False)
        first = tokenizer.apply_chat_template(conversation(request.prompt, text)[:1], tokenize=False)
        if form == "example":
            expected, prompt = tokenizer(whole)["input_ids"], tokenizer(first)["input_ids"]
            expected[-1] = eos
            assert expected[:2] == [bos, bos]
        else:
            expected, prompt = (
                tokenizer(text.replace(tokenizer.bos_token, ""), add_special_tokens=False)["input_ids"]
                for text in (whole, first)
            )
            assert bos not in expected
        assert answer.ids == expected and answer.prompt_length == len(prompt)
    (table,) = ranker.rank([request], tally())
    (trained,) = build("general-preference", tmp_path).rank([request], tally())
    assert table[0, 1] == -table[1, 0] and abs(table[0, 1] - trained[0, 1]) > 1e-6
    ranker.model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"no checkpoint in the authors' layout .* set released_format: trained"):
        build("general-preference", tmp_path / "ours", released_format=form)


# --- the judge
# ------------------------------------------------------------------------------------------------------------------


def judge(url):
    ranker = build("judge", "judge", concurrency=4)
    ranker.client = JsonClient(url, "NO_KEY", 60, 4, first_pause=0.001)
    return ranker


def test_judge_sees_both_orders():
    """This judge prefers "five" wherever it stands, and otherwise whatever is shown first: the second habit
    cancels."""
    seen = []

    def decide(question):
        a, b = (question.split(f"<answer_{x}>\n")[1].split(f"\n</answer_{x}>")[0] for x in "ab")
        seen.append((a, b))
        return "[[B]]" if b == "five" else "Surely [[A]]"

    request = Request("r", "Count to {answer_b}.", ["one {prompt}", "five", "three"])
    counts = tally()
    with judge_server(decide) as url:
        (table,) = judge(url).rank([request], counts)
    assert Counter(seen) == Counter((a, b) for a in request.candidates for b in request.candidates if a != b)
    probabilities = win_probabilities(table)
    np.testing.assert_allclose(probabilities, [[0.5, 0.1, 0.5], [0.9, 0.5, 0.9], [0.5, 0.1, 0.5]], atol=1e-12)
    assert counts.counts["verdicts"] == 6 and counts.counts["unreadable verdicts"] == 0


def test_verdicts_are_read_strictly():
    assert verdict("[[A]]") == -verdict("so: [[B]].") == math.log(9) and verdict("[[C]]") == 0.0
    for reply in ("A", "", "[[A]] or rather [[B]]", "[[D]]", "[A]", "[[a]]"):
        assert verdict(reply) is None


def test_unreadable_verdicts_are_counted_or_too_many():
    request = Request("r", "x", ["first uno", "second dos"])
    counts = tally()
    with judge_server(lambda question: "no idea" if question.index("uno") < question.index("dos") else "[[B]]") as url:
        (table,) = judge(url).rank([request], counts)
    assert table[0, 1] == 0.0 and table[1, 0] == -math.log(9) and counts.counts["unreadable verdicts"] == 1
    with (
        judge_server(lambda question: "I refuse") as url,
        pytest.raises(ValueError, match=r"2 of 2 replies.*'I refuse'"),
    ):
        judge(url).rank([request], tally())


def test_failing_and_unreachable_judges():
    statuses = iter([503, 429])
    request = Request("r", "x", ["one", "two"])
    with judge_server(lambda question: next(statuses, "[[A]]")) as url:
        judge(url).rank([request], tally())  # it fails twice, then answers
    with judge_server(lambda question: 400) as url, pytest.raises(ServerError, match="refused the request: HTTP 400"):
        judge(url).rank([request], tally())
    with pytest.raises(ServerError, match="cannot be reached"):
        judge("http://127.0.0.1:9/v1").rank([request], tally())


def test_templates_of_the_user(tmp_path):
    (tmp_path / "bad.txt").write_text("Which is better, {answer_a} or {answer_b}?")
    with pytest.raises(ValueError, match=r"has no \{prompt\}"):
        build("judge", "judge", base_url="http://localhost/v1", judge_template=str(tmp_path / "bad.txt"))
    (tmp_path / "good.txt").write_text("{prompt}|{answer_a}|{answer_b}|{other}")
    ranker = build("judge", "judge", base_url="http://localhost/v1", judge_template=str(tmp_path / "good.txt"))
    assert ranker.question(Request("r", "{answer_a}", ["a", "b"]), 1, 0) == "{answer_a}|b|a|{other}"


# --- functions, checks, batches
# --------------------------------------------------------------------------------------------------


def test_functions_by_file_and_by_module(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass Rule:\n    "
        "weight: int = 1\n\n"
        "def score(prompt, candidates):\n    return [len(prompt) + Rule().weight * len(text) for text in candidates]\n"
    )
    (row,) = build("function", f"{tmp_path}/mine.py:score").rank([Request("r", "ab", ["x", "xyz"])], tally())
    assert row.tolist() == [3.0, 5.0]
    (row,) = build("function", "tests.candidates.test_rankers:table_function").rank(
        [Request("r", "ab", ["x", "xyz"])], tally()
    )
    assert row.tolist() == [[0, -2], [2, 0]]
    with pytest.raises(ValueError, match="no file"):
        build("function", f"{tmp_path}/other.py:score")
    with pytest.raises(ValueError, match="no function 'missing'"):
        build("function", f"{tmp_path}/mine.py:missing")
    with pytest.raises(ValueError, match="cannot be imported"):
        build("function", "no_such_module:score")
    with pytest.raises(ValueError, match=r"file\.py:function"):
        build("function", "score")


def table_function(prompt, candidates):
    return [[len(a) - len(b) for b in candidates] for a in candidates]


@pytest.mark.parametrize(
    "values, message",
    [
        ([1.0, float("nan")], r"'r7'.*candidate 1 the score nan"),
        ([[0.0, float("-inf")], [0.0, 0.0]], r"'r7'.*candidate 0 the score -inf"),
        ([1.0], r"shape \(1,\) for 2 candidates"),
        (["good", "bad"], "not numbers"),
        (None, r"'r7'"),
    ],
)
def test_bad_scores_name_the_row(values, message):
    with pytest.raises(ValueError, match=message):
        check_scores(Request("r7", "p", ["a", "b"]), values, ranker="mine")


def test_batches_hold_similar_lengths_within_the_budget():
    lengths = [5, 90, 7, 88, 6, 300, 1]
    batches = list(length_batches(lengths, 180))
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert batches == [[5], [1, 3], [2, 4, 0, 6]]  # 300 alone is over the budget, and still runs
    assert list(length_batches([], 10)) == []


def test_plain_text_of_dialogues():
    assert plain_text("as it is") == plain_text([{"role": "user", "content": "as it is"}]) == "as it is"
    dialogue = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert plain_text(dialogue) == "System: S\n\nUser: U"
