"""RewardBench, Arena-Hard, MT-Bench and lm-eval: their formats, scores by hand, and a judge on this machine."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest

from prefopt import cli
from prefopt.evaluation.arena_hard import (
    Battle,
    arena_score,
    markdown_counts,
    style_controlled_score,
    style_differences,
    verdict,
)
from prefopt.evaluation.lm_eval import lm_eval_figures
from prefopt.evaluation.mt_bench import conversation, mt_bench_figures, rating
from prefopt.evaluation.reward_bench import first_figures, read_reward_bench, second_figures, ties_score
from prefopt.files import read_json, read_jsonl, write_jsonl
from tests.candidates.endpoint import Endpoint, serving
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tiny_policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tiny_model(seed=1).save_pretrained(folder)
    tiny_tokenizer("llama3").save_pretrained(folder)
    return folder


# ---- RewardBench


def bench_rows(subsets):
    return [{"id": str(n), "subset": name, "correct": 1, "answers": ["a", "b"]} for n, name in enumerate(subsets)]


def test_reward_bench_1_by_hand():
    """hep-go 1 of 2, math-prm 1 of 1 with the code's weight: Reasoning (1 + 2) / 4; Chat 0 of 1; their mean 3/8."""
    rows = bench_rows(["hep-go", "hep-go", "math-prm", "alpacaeval-easy"])
    scores = [np.array(pair) for pair in ([2.0, 1.0], [1.0, 1.0], [0.5, 0.1], [0.0, 3.0])]
    found = first_figures(rows, scores, confidence=0.95)
    assert found["Reasoning"].value == 0.75 and found["Chat"].value == 0 and found["score"].value == 0.375
    assert found["subset/hep-go"].value == 0.5 and found["all_pairs"].count == 4  # an equal score is wrong
    assert 0 <= found["score"].low <= 0.375 <= found["score"].high
    tables = [np.array([[0, d], [-d, 0]]) for d in (1.0, 0.0, 0.4, -3.0)]
    again = first_figures(rows, tables, confidence=0.95)
    assert {name: figure.value for name, figure in again.items()} == {n: f.value for n, f in found.items()}


def test_reward_bench_2_by_hand():
    """Best of four: above all others 1, a top shared by two 1/2, below one 0."""
    rows = [{"id": str(n), "subset": "Math", "correct": 1, "answers": list("abcd")} for n in range(3)]
    scores = [np.array(s) for s in ([3.0, 1, 2, 0], [3.0, 3, 2, 0], [1.0, 2, 0, 0])]
    found = second_figures(rows, scores, confidence=0.95)
    assert found["Math"].value == found["score"].value == 0.5


def test_the_score_of_ties_is_the_released_codes():
    """A transcription of the released formula on random scores of 12 prompts, equal correct answers among them."""
    rng = np.random.default_rng(0)
    prompts, tied, ref = [], [], []
    for number in range(12):
        several, one = rng.normal(size=6), rng.normal(size=3)
        several[:4] += 2
        one[0] += 1
        if number == 0:
            several[:4] = 5.0  # no spread: the ratio is infinite
        row = {"id": f"tied:{number}", "correct": 4}
        prompts.append([(row, several), ({"id": f"ref:{number}", "correct": 1}, one)])
        tied.append((several[:4].min() - several[4:].max(), np.ptp(several[:4])))
        ref.append(one[0] - one[1:].max())
    gaps, spreads = np.array(tied).T
    smaller = np.minimum(gaps, ref)
    with np.errstate(divide="ignore"):
        margin = np.nan_to_num(np.tanh(smaller / spreads - 1)).mean()
    wanted = 0.3 * (gaps > 0).mean() + 0.3 * (np.array(ref) > 0).mean()
    wanted += 0.2 * (gaps > spreads).mean() + 0.2 * (smaller > spreads).mean() + 0.01 * margin
    assert ties_score(prompts) == pytest.approx(wanted, rel=1e-12)


def write_reward_bench_2(path):
    rows = [
        {"id": "1", "prompt": "two plus three", "chosen": ["five"], "rejected": ["six", "seven", "eight"]},
        {"id": "2", "prompt": "a colour", "chosen": ["blue"], "rejected": ["dog", "woods", "the"]},
    ]
    rows = [{**row, "subset": "Math"} for row in rows]
    rows += [
        {"id": "ref:3", "prompt": "an animal", "chosen": ["fox"], "rejected": ["sky"], "subset": "Ties"},
        {"id": "tied:3", "prompt": "any animal", "chosen": ["fox", "a fox"], "rejected": ["sky"], "subset": "Ties"},
    ]
    write_jsonl(path, rows)


def test_reward_bench_2_with_a_rule_and_with_a_policy(tmp_path, tiny_policy, capsys):
    write_reward_bench_2(tmp_path / "bench.jsonl")
    (tmp_path / "rule.py").write_text(
        "def good(prompt, candidates):\n    return [float(c in ('five', 'fox', 'a fox')) for c in candidates]\n"
    )
    words = ["evaluate", "--kind=reward-bench", f"--questions={tmp_path / 'bench.jsonl'}"]
    rule = ["--ranker=function", f"--ranker_model={tmp_path / 'rule.py'}:good"]
    assert cli.main([*words, f"--output_dir={tmp_path / 'rule'}", *rule]) == 0
    figures = read_json(tmp_path / "rule" / "evaluation.json")["figures"]
    # Math: 1 and a tie of all four; Ties: all accurate and preferred, tanh of an infinite ratio
    assert figures["Math"]["value"] == 0.625 and figures["Ties"]["value"] == pytest.approx(1.01)
    assert figures["score"]["value"] == pytest.approx((0.625 + 1.01) / 2)

    # the policy against itself: every implicit reward is 0, so every top is shared
    same = [f"--model_name_or_path={tiny_policy}", f"--ref_model_name_or_path={tiny_policy}", "--dtype=float32"]
    assert cli.main([*words, f"--output_dir={tmp_path / 'policy'}", *same]) == 0
    found = read_json(tmp_path / "policy" / "evaluation.json")
    assert found["version"] == 2 and found["figures"]["Math"]["value"] == 0.25
    assert cli.main([*words, f"--output_dir={tmp_path / 'none'}"]) == 2
    assert "either a `ranker`" in capsys.readouterr().err


def test_what_is_no_reward_bench(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    with pytest.raises(ValueError, match="has no column `subset`"):
        read_reward_bench(str(tmp_path / "a.jsonl"))
    row = {"id": "3", "prompt": "p", "chosen": ["a"], "rejected": ["b"], "subset": "Ties"}
    write_jsonl(tmp_path / "b.jsonl", [row])
    with pytest.raises(ValueError, match=r"row 0: the id of a row of Ties is ref:<n> or tied:<n>, not '3'"):
        read_reward_bench(str(tmp_path / "b.jsonl"))


# ---- a judge


def judging(said):
    """An endpoint that answers every question with what `said` makes of it, and counts 10 and 5 tokens."""
    endpoint = Endpoint(models=("judge",))
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    endpoint.raw = lambda body: json.dumps(
        {"choices": [{"message": {"content": said(body["messages"][0]["content"])}}], "usage": usage}
    )
    return endpoint


ARENA = [("1", "hard_prompt"), ("2", "hard_prompt"), ("3", "creative_writing")]


def arena_files(folder, texts, name):
    rows = [
        {"uid": uid, "model": name, "messages": [{"role": "assistant", "content": {"answer": text}}]}
        for uid, text in texts.items()
    ]
    write_jsonl(folder / f"{name}.jsonl", rows)
    return folder / f"{name}.jsonl"


def test_arena_hard_is_judged_in_both_orders(tmp_path):
    """Question 1 is clearly won in both orders, 2 follows the order, 3 is lost: 3 + 3 of 3 + 3, 1 of 2, 0 of 2."""
    questions = [{"uid": uid, "category": category, "prompt": f"question {uid}"} for uid, category in ARENA]
    write_jsonl(tmp_path / "question.jsonl", questions)
    mine = arena_files(tmp_path, {"1": "sterling", "2": "same", "3": "rotten"}, "mine")
    base = arena_files(tmp_path, {"1": "rotten", "2": "same too", "3": "sterling"}, "base")

    def said(text):
        if "question 2" in text:
            return "I like the first. [[A>B]]"
        first = text.index("sterling") < text.index("rotten")
        clear = ">>" if "question 1" in text else ">"
        return f"Reasons. [[{'A' if first else 'B'}{clear}{'B' if first else 'A'}]]"

    endpoint = judging(said)
    with serving(endpoint) as address:
        judge = f"{{model: judge, base_url: {address}, input_price: 2, output_price: 8, retries: 0}}"
        words = ["evaluate", "--kind=arena-hard", f"--output_dir={tmp_path / 'out'}", f"--judge={judge}"]
        words += [
            f"--questions={tmp_path / 'question.jsonl'}",
            f"--baseline_answers={base}",
            f"--model_answers={mine}",
        ]
        assert cli.main([*words, "--style_control=false"]) == 0
        assert len(endpoint.bodies) == 6
        assert cli.main([*words, "--style_control=false"]) == 0
        assert len(endpoint.bodies) == 6  # nothing is asked, and paid for, twice
    found = read_json(tmp_path / "out" / "evaluation.json")
    assert found["figures"]["score"]["value"] == pytest.approx(7 / 10)
    assert found["figures"]["hard_prompt"]["value"] == pytest.approx(7 / 8)
    assert found["figures"]["creative_writing"]["value"] == 0
    record = found["judge"]
    assert (record["input_tokens"], record["output_tokens"], record["judgments"]) == (60, 30, 6)
    assert record["cost"] == pytest.approx((60 * 2 + 30 * 8) / 1e6) and len(record["prompt_hash"]) == 16
    rows = read_jsonl(tmp_path / "out" / "model_judgment.jsonl")
    assert [game["score"] for game in rows[0]["games"]] == ["B>>A", "A>>B"]
    assert rows[0]["model"] == "mine" and rows[0]["baseline"] == "base" and rows[0]["judge"] == "judge"
    again = ["evaluate", "--kind=arena-hard", f"--output_dir={tmp_path / 'again'}", "--style_control=false"]
    assert cli.main([*again, f"--judgments={tmp_path / 'out' / 'model_judgment.jsonl'}"]) == 0
    assert read_json(tmp_path / "again" / "evaluation.json")["figures"] == found["figures"]


def test_a_judge_that_gives_no_verdict_stops(tmp_path, capsys):
    write_jsonl(tmp_path / "question.jsonl", [{"uid": "1", "category": "c", "prompt": "q"}])
    mine, base = (arena_files(tmp_path, {"1": name}, name) for name in ("mine", "base"))
    with serving(judging(lambda text: "no idea")) as address:
        words = ["evaluate", "--kind=arena-hard", f"--output_dir={tmp_path / 'out'}"]
        words += [f"--judge={{model: judge, base_url: {address}, retries: 0}}", f"--model_answers={mine}"]
        words += [f"--questions={tmp_path / 'question.jsonl'}", f"--baseline_answers={base}"]
        assert cli.main(words) == 2
    assert "2 of 2 replies of the judge 'judge' hold no verdict" in capsys.readouterr().err
    assert not (tmp_path / "out" / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("[[A>>B]]", "A>>B"),
        ("first [[A>B]], then [[b=a]].", "B=A"),
        ("[A<B]", "A<B"),
        ("[[C]]", None),
        ("A is better", None),
    ],
)
def test_verdicts(reply, found):
    assert verdict(reply) == found


def test_markdown_is_counted_outside_of_code():
    text = "# One\n## Two\n- a\n* b\n1. c\n**bold** and __too__\n```\n# no\n- no\n```\n"
    counts = markdown_counts(text)
    assert counts["header_count"]["h1"] == 1 and counts["header_count"]["h2"] == 1
    assert counts["list_count"] == {"ordered": 1, "unordered": 2} and counts["bold_count"] == {"**": 1, "__": 1}


def test_style_differences_by_hand():
    """Lengths 30 and 10: 20 / 40. Headers 3 and 0: p = 3 / 31, q = 0: p / (p + 1)."""
    found = style_differences(np.array([[30.0, 3, 0, 0]]), np.array([[10.0, 0, 0, 0]]))
    p = 3 / 31
    assert found[0] == pytest.approx([0.5, p / (p + 1), 0, 0])


def battles(model, strength, lengths_weight, count, seed):
    """Battles that a logistic model with this strength and weight of the length has decided."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        mine, theirs = rng.integers(50, 1000, size=2).astype(float)
        logit = strength + lengths_weight * (mine - theirs) / (mine + theirs)
        won = float(rng.random() < 1 / (1 + math.exp(-logit)))
        rows.append(Battle(model, str(number), won, np.array([mine, 1, 0, 0]), np.array([theirs, 0, 0, 0])))
    return rows


def test_style_control_recovers_the_strength_behind_longer_answers():
    """Answers 2.5 times as long, from a model of strength 0: many wins, and about a half under style control."""
    rows = [
        Battle(b.model, b.uid, b.won, b.mine * [2.5, 1, 1, 1], b.theirs) for b in battles("m", 0.0, 4.0, 800, seed=0)
    ]
    rng = np.random.default_rng(1)
    decided = []
    for each in rows:
        x = (each.mine[0] - each.theirs[0]) / (each.mine[0] + each.theirs[0])
        decided.append(Battle("m", each.uid, float(rng.random() < 1 / (1 + math.exp(-4 * x))), each.mine, each.theirs))
    plain = arena_score(decided, confidence=0.95)
    controlled = style_controlled_score(decided, [], confidence=0.95)
    assert plain.value > 0.7
    assert abs(controlled.value - 0.5) < 0.08 and controlled.low < 0.5 < controlled.high


def test_pooled_style_control_is_centred_as_on_the_leaderboard():
    """A transcription with scipy's optimiser: model indicators, centred and scaled features, logistic loss."""
    from scipy.optimize import minimize

    mine, others = battles("m", 0.7, 2.0, 150, seed=3), battles("o", -0.5, 2.0, 150, seed=4)
    found = style_controlled_score(mine, others, confidence=0.95)
    rows = [*mine, *others]
    x = style_differences(np.array([b.mine for b in rows]), np.array([b.theirs for b in rows]))[:, :2]
    x = (x - x.mean(0)) / x.std(0, ddof=1)
    features = np.concatenate([np.array([[b.model == "m", b.model == "o"] for b in rows], dtype=float), x], axis=1)
    won = np.array([b.won for b in rows])
    loss = lambda w: np.sum(np.logaddexp(0, features @ w) - won * (features @ w))  # noqa: E731
    strength = minimize(loss, np.zeros(4), tol=1e-12).x[0]
    assert found.value == pytest.approx(1 / (1 + math.exp(-strength)), abs=1e-4)


def arena_run(folder, *, metadata):
    """Judgments and answers of the models m and o and of the baseline on 40 questions; `metadata` of each answer.

    Returns:
        The words of the command, and for each counted comparison of m and o: model, share won, both token counts.
    """
    rng = np.random.default_rng(7)
    tokens = {name: rng.integers(20, 400, size=40).tolist() for name in ("m", "o", "base")}
    for name, counts in tokens.items():
        rows = [
            {"uid": str(n), "model": name, "messages": [{"role": "assistant", "content": {"answer": "word " * count}}]}
            for n, count in enumerate(counts)
        ]
        write_jsonl(folder / f"{name}.jsonl", [row | metadata(name, count) for row, count in zip(rows, counts)])
    battles = []
    for name in ("m", "o"):
        judged = []
        for n in range(40):
            longer = tokens[name][n] > tokens["base"][n]
            first, second = (bool(rng.random() < (0.75 if longer else 0.35)) for _ in range(2))
            games = [{"score": "B>A" if first else "A>B"}, {"score": "A>>B" if second else "A<B"}]
            judged.append({"uid": str(n), "model": name, "category": "c", "baseline": "base", "games": games})
            battles += [(name, float(second), tokens[name][n], tokens["base"][n])] * (3 if second else 1)
            battles.append((name, float(first), tokens[name][n], tokens["base"][n]))
        write_jsonl(folder / f"{name}-judged.jsonl", judged)
    pool = f"{{o: {{judgments: {folder / 'o-judged.jsonl'}, answers: {folder / 'o.jsonl'}}}}}"
    words = ["evaluate", "--kind=arena-hard", f"--output_dir={folder / 'out'}", f"--style_pool={pool}"]
    words += [f"--judgments={folder / 'm-judged.jsonl'}", f"--model_answers={folder / 'm.jsonl'}"]
    return [*words, f"--baseline_answers={folder / 'base.jsonl'}"], battles


def published_score(battles):
    """The benchmark's own regression, on all battles: indicators of the model less the baseline's, scaled features."""
    from scipy.optimize import minimize

    mine, theirs = (np.array([each[place] for each in battles], dtype=float) for place in (2, 3))
    x = (mine - theirs) / (mine + theirs)
    x = (x - x.mean()) / x.std(ddof=1)  # no markdown: the other features are zero
    names = np.array([[name == "base", name == "m", name == "o"] for name, *_ in battles], dtype=float)
    features = np.column_stack([names - [1, 0, 0], x])
    won = np.array([each[1] for each in battles])
    loss = lambda w: np.sum(np.logaddexp(0, features @ w) - won * (features @ w)) + 1e-9 * w @ w  # noqa: E731
    base, m, *_ = minimize(loss, np.zeros(4), tol=1e-12).x
    return math.exp(m) / (math.exp(m) + math.exp(base))


class FakeTiktoken:
    """tiktoken with a vocabulary of words, or without the network that it fetches one from."""

    def __init__(self, *, offline=False):
        self.offline = offline

    def encoding_for_model(self, model):
        assert model == "gpt-4o"
        if self.offline:
            raise ConnectionError("no network")
        return self

    def encode(self, text, *, disallowed_special):
        return text.split()


@pytest.mark.parametrize("counted", ["by the files", "here"])
def test_style_control_by_tokens_is_the_published_regression(tmp_path, monkeypatch, counted):
    """Each file has the counts; or only the baseline's has, as when a new model's answers meet the published ones."""
    words, battles = arena_run(
        tmp_path,
        metadata=lambda name, n: {"metadata": {"token_len": n}} if counted == "by the files" or name == "base" else {},
    )
    fake = FakeTiktoken(offline=counted == "by the files")
    monkeypatch.setitem(sys.modules, "tiktoken", fake)
    assert cli.main(words) == 0
    figures = read_json(tmp_path / "out" / "evaluation.json")["figures"]
    assert figures.keys() == {"score", "style_controlled/score"}
    assert figures["style_controlled/score"]["value"] == pytest.approx(published_score(battles), abs=1e-4)


def test_style_control_by_characters_has_another_name(tmp_path, monkeypatch, capsys):
    """One model's answers without counts: all lengths are characters, one line says why."""
    words, battles = arena_run(
        tmp_path, metadata=lambda name, n: {} if name == "o" else {"metadata": {"token_len": n * n}}
    )
    monkeypatch.setitem(sys.modules, "tiktoken", FakeTiktoken(offline=True))
    assert cli.main(words) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "characters" in line and "TIKTOKEN" in line]
    assert "40 answers, the first of o, have no metadata.token_len" in line
    figures = read_json(tmp_path / "out" / "evaluation.json")["figures"]
    assert figures.keys() == {"score", "style_controlled_by_characters/score"}
    # five characters a word: relative differences are those of the words
    assert figures["style_controlled_by_characters/score"]["value"] == pytest.approx(
        published_score(battles), abs=1e-4
    )


@pytest.mark.parametrize("offline", [False, True])
def test_answers_are_written_with_their_token_count(tmp_path, monkeypatch, offline):
    monkeypatch.setitem(sys.modules, "tiktoken", FakeTiktoken(offline=offline))
    write_jsonl(tmp_path / "question.jsonl", [{"uid": "1", "category": "c", "prompt": "q"}])
    record = {"prompt_id": "1", "prompt": "q", "candidates": [{"text": "# one\ntwo three"}]}
    write_jsonl(tmp_path / "answers.jsonl", [record])
    base = arena_files(tmp_path, {"1": "base"}, "base")
    with serving(judging(lambda text: "[[A=B]]")) as address:
        words = ["evaluate", "--kind=arena-hard", f"--output_dir={tmp_path / 'out'}", "--model_name=mine"]
        words += [f"--judge={{model: judge, base_url: {address}, retries: 0}}", "--style_control=false"]
        words += [f"--questions={tmp_path / 'question.jsonl'}", f"--baseline_answers={base}"]
        assert cli.main([*words, f"--answers={tmp_path / 'answers.jsonl'}"]) == 0
    (row,) = read_jsonl(tmp_path / "out" / "model_answer.jsonl")
    assert row["metadata"]["header_count"]["h1"] == 1
    assert row["metadata"].get("token_len") == (None if offline else 4)


def test_mt_bench_answers_two_turns_and_grades_both(tmp_path, tiny_policy):
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["Name a colour.", "Name an animal."]},
        {"question_id": 111, "category": "math", "turns": ["two plus three", "explain"]},
    ]
    write_jsonl(tmp_path / "question.jsonl", questions)
    endpoint = judging(lambda text: f"Fine. [[{8 if 'explain' in text or 'Name an animal.' in text else 6}]]")
    with serving(endpoint) as address:
        words = ["evaluate", "--kind=mt-bench", f"--output_dir={tmp_path / 'out'}", "--dtype=float32"]
        words += [f"--questions={tmp_path / 'question.jsonl'}", f"--model_name_or_path={tiny_policy}"]
        words += ["--generation={max_new_tokens: 4}", "--model_name=tiny"]
        assert cli.main([*words, f"--judge={{model: judge, base_url: {address}, retries: 0}}"]) == 0
    figures = read_json(tmp_path / "out" / "evaluation.json")["figures"]
    values = {name: figure["value"] for name, figure in figures.items()}
    assert values == {"score": 7, "turn_1": 6, "turn_2": 8, "writing": 7, "math": 7}
    answers = read_jsonl(tmp_path / "out" / "model_answer.jsonl")
    assert [row["question_id"] for row in answers] == [81, 111] and len(answers[0]["choices"][0]["turns"]) == 2
    # the second turn was asked after the first answer, at the category's temperature
    second = read_jsonl(tmp_path / "out" / "generated" / "turn-2-temperature-0" / "prompts.jsonl")
    assert second[0]["prompt"] == conversation(questions[1]["turns"], answers[1]["choices"][0]["turns"][:1])
    judged = read_jsonl(tmp_path / "out" / "model_judgment.jsonl")
    assert {(row["turn"], row["score"]) for row in judged} == {(1, 6), (2, 8)} and judged[0]["judge"][0] == "judge"


def test_mt_bench_scores_by_hand():
    """Grades 8, 6; 4, unreadable: mean of three 6; by question 7 and 4."""
    rows = [{"question_id": q, "turn": t, "score": s} for q, t, s in ((1, 1, 8), (1, 2, 6), (2, 1, 4), (2, 2, -1))]
    found = mt_bench_figures(rows, {"1": "a", "2": "b"}, confidence=0.95)
    assert (found["score"].value, found["turn_1"].value, found["turn_2"].value) == (6, 6, 6)
    assert found["a"].value == 7 and found["b"].value == 4 and found["score"].low < 6 < found["score"].high
    assert rating("[[3]] no, [[7.5]]") == 7.5 and rating("[[11]]") is None and rating("7") is None


# ---- lm-eval


def test_lm_evals_results_become_figures():
    results = {
        "results": {
            "task": {
                "alias": "task",
                "acc,none": 0.5,
                "acc_stderr,none": 0.1,
                "em,strict": 0.25,
                "em_stderr,strict": "N/A",
            }
        },
        "n-samples": {"task": {"original": 40, "effective": 20}},
    }
    found = lm_eval_figures(results, confidence=0.95)
    assert found["task/acc"].low == pytest.approx(0.5 - 0.1959964) and found["task/acc"].count == 20
    assert found["task/em (strict)"].low is None and set(found) == {"task/acc", "task/em (strict)"}


@pytest.mark.slow
def test_a_local_task_through_lm_eval(tmp_path, tiny_policy):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")
    rows = [{"question": f"What is {word}?", "choices": ["a fox", "a colour"], "label": 1} for word in ("blue", "red")]
    write_jsonl(tmp_path / "rows.jsonl", rows * 5)
    (tmp_path / "task.yaml").write_text(
        "task: tiny_task\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path / 'rows.jsonl'}\ntest_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: question\ndoc_to_target: label\ndoc_to_choice: choices\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    words = ["evaluate", "--kind=lm-eval", f"--output_dir={tmp_path / 'out'}", f"--model_name_or_path={tiny_policy}"]
    words += ["--tasks", "tiny_task", f"--task_folder={tmp_path}", "--dtype=float32", "--eval_batch_size=4"]
    assert cli.main(words) == 0
    found = read_json(tmp_path / "out" / "evaluation.json")
    assert found["figures"]["tiny_task/acc"]["count"] == 10 and 0 <= found["figures"]["tiny_task/acc"]["value"] <= 1
    assert cli.main([*words[:-4], "--tasks", "no_such_task"]) == 2


def test_without_lm_eval_the_extra_is_named(tmp_path, tiny_policy, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    words = ["evaluate", "--kind=lm-eval", f"--output_dir={tmp_path}", f"--model_name_or_path={tiny_policy}"]
    assert cli.main(words) == 2
    assert "pip install 'prefopt[eval]'" in capsys.readouterr().err
