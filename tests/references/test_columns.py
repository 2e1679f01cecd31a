"""The policy's own initial model as reference: scored once, found again, whatever else changes."""

import os
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from prefopt.data import tokenize_pairs
from prefopt.references.cache import ScoreCache
from prefopt.references.columns import cached_reference_scores, token_scorer
from prefopt.references.filling import group_scorer, plan_batches
from prefopt.references.fingerprints import module_fingerprint
from prefopt.scoring.logprobs import install_scoring
from prefopt.scoring.packing import choose_layout
from tests.references.helpers import ROWS, pairs, reference, score_plainly
from tests.tiny import tiny_model


def scored(root, ref, data, *, layout="packed", max_tokens=200, **options):
    install_scoring(ref.model)
    config = ref.model.config
    chosen, _ = choose_layout(layout, config, pad_token_id=0, longest_sequence=256)
    score = group_scorer(ref.model, chosen, device=torch.device("cpu"))
    scorer = token_scorer(ref.model, config, name=ref.name, dtype="float32")
    padded = layout == "padded"
    return cached_reference_scores(data, score, scorer, root, max_tokens=max_tokens, padded=padded, **options)


@pytest.fixture(scope="module")
def policy():
    return reference("llama3")


@pytest.fixture
def data(policy):
    return tokenize_pairs(pairs(), policy.tokenizer, max_length=None)[0]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_columns_are_the_plain_log_probs(tmp_path, policy, data, layout):
    table, count = scored(tmp_path, policy, data, layout=layout)
    assert count == 8
    for row, (prompt, chosen, rejected) in zip(table, ROWS):
        assert row["ref_chosen_logps"] == pytest.approx(score_plainly(policy, prompt, chosen)[0], rel=1e-5)
        assert row["ref_rejected_logps"] == pytest.approx(score_plainly(policy, prompt, rejected)[0], rel=1e-5)


def test_only_what_is_new_is_scored(tmp_path, policy, data):
    first, count = scored(tmp_path, policy, data.select([0, 1]))
    assert count == 4
    assert scored(tmp_path, policy, data.shuffle(seed=1))[1] == 4
    again, count = scored(tmp_path, policy, data.select(range(4)), layout="padded", max_tokens=1)
    assert count == 0 and again["ref_chosen_logps"][:2] == first["ref_chosen_logps"]


def test_a_stale_column_is_replaced(tmp_path, policy, data):
    fresh, _ = scored(tmp_path, policy, data)
    stale = data.add_column("ref_chosen_logps", [0.0] * len(data))
    assert scored(tmp_path, policy, stale)[0]["ref_chosen_logps"] == fresh["ref_chosen_logps"]


def test_truncation_is_part_of_the_key(tmp_path, policy, data):
    scored(tmp_path, policy, data)
    cut, _ = tokenize_pairs(pairs(), policy.tokenizer, max_length=40)
    shorter = sum(
        len(a) < len(b) for side in ("chosen", "rejected") for a, b in zip(cut[f"{side}_ids"], data[f"{side}_ids"])
    )
    assert scored(tmp_path, policy, cut)[1] == shorter > 0


def test_a_killed_run_goes_on_where_its_last_chunk_ended(tmp_path, policy, data, monkeypatch):
    from prefopt.references import cache as cache_module

    monkeypatch.setattr(cache_module, "FLUSH_RECORDS", 2)
    install_scoring(policy.model)
    config = policy.model.config
    layout, _ = choose_layout("padded", config, pad_token_id=0, longest_sequence=256)
    score = group_scorer(policy.model, layout, device=torch.device("cpu"))
    calls = []

    def dies(groups):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return score(groups)

    scorer = token_scorer(policy.model, config, name="p", dtype="float32")
    with pytest.raises(KeyboardInterrupt):
        cached_reference_scores(data, dies, scorer, tmp_path, max_tokens=1, padded=True)
    assert len(ScoreCache(tmp_path, scorer)) == 6
    assert scored(tmp_path, policy, data)[1] == 2


def test_a_score_that_is_not_finite_stops_and_the_others_are_kept(tmp_path, policy, data):
    def broken(groups):
        return torch.tensor([-1.0] * (sum(len(g.completions) for g in groups) - 1) + [float("nan")])

    scorer = token_scorer(policy.model, policy.model.config, name="broken one", dtype="float32")
    with pytest.raises(ValueError, match=r"broken one gives 1 completions .* nan for \d+ tokens"):
        cached_reference_scores(data, broken, scorer, tmp_path, max_tokens=10_000, padded=True)
    assert len(ScoreCache(tmp_path, scorer)) == 7


def test_fingerprint_of_a_module_sees_weights_and_config_and_no_adapter():
    model, twin, other = tiny_model(seed=0), tiny_model(seed=0), tiny_model(seed=1)
    base = module_fingerprint(model, model.config)
    assert module_fingerprint(twin, twin.config) == base != module_fingerprint(other, other.config)
    wide = tiny_model(seed=0, rms_norm_eps=1e-3)
    assert module_fingerprint(wide, wide.config) != base
    with torch.no_grad():
        twin.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-6
    assert module_fingerprint(twin, twin.config) != base
    adapted = get_peft_model(
        tiny_model(seed=0), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    assert module_fingerprint(adapted, adapted.get_base_model().config) == base
    with_adapter = module_fingerprint(adapted, adapted.get_base_model().config, adapter="default")
    assert with_adapter != base
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= 2
    rescaled = module_fingerprint(adapted, adapted.get_base_model().config, adapter="default")
    assert rescaled != with_adapter
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(1.0)
    assert module_fingerprint(adapted, adapted.get_base_model().config, adapter="default") not in (
        base,
        with_adapter,
        rescaled,
    )


def test_batches_hold_each_group_once_within_the_budget():
    sizes = np.random.default_rng(0).integers(1, 50, 40).tolist()
    batches = plan_batches(sizes, 64)
    assert sorted(i for batch in batches for i in batch) == list(range(40))
    assert all(sum(sizes[i] for i in batch) <= 64 for batch in batches)
    assert plan_batches([100, 1], 10) == [[0], [1]] and plan_batches([], 10) == []


TWO_RANKS = textwrap.dedent("""
    import sys
    import torch
    from accelerate import PartialState
    from prefopt.data import tokenize_pairs
    from tests.references.helpers import pairs, reference
    from tests.references.test_columns import scored
    state = PartialState(cpu=True)
    ref = reference("llama3")
    data, _ = tokenize_pairs(pairs(), ref.tokenizer, max_length=None)
    table, count = scored(sys.argv[1], ref, data, max_tokens=60)  # an in-memory set, one batch fewer on one rank
    values = torch.tensor([table["ref_chosen_logps"], table["ref_rejected_logps"]])
    everyone = [torch.zeros_like(values) for _ in range(2)]
    torch.distributed.all_gather(everyone, values)
    assert torch.equal(everyone[0], everyone[1])
    assert scored(sys.argv[1], ref, data)[1] == 0
    if state.is_main_process:
        print("scored", count, values.tolist())
""")


def run_ranks(script, *words, ranks=2):
    """Run a script on several CPU ranks and return what it printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    common |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.getcwd()}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, words)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    return "".join(out for out, _ in outputs)


@pytest.mark.slow
def test_two_ranks_share_one_cache_for_data_in_memory(tmp_path, policy, data):
    out = run_ranks(TWO_RANKS, tmp_path)
    assert "scored 8" in out
    table, count = scored(tmp_path, policy, data)  # and one rank reads what two have written
    assert count == 0
    owners = list(tmp_path.rglob("*.npz"))
    assert len(owners) == 2, "both ranks write"
    for row, (prompt, chosen, _) in zip(table, ROWS):
        assert row["ref_chosen_logps"] == pytest.approx(score_plainly(policy, prompt, chosen)[0], rel=1e-5)


@pytest.mark.parametrize("shown", [True, False])
def test_scoring_shows_its_progress_unless_it_is_turned_off(tmp_path, policy, data, capsys, shown):
    scored(tmp_path, policy, data, show_progress=shown)
    printed = capsys.readouterr().err
    assert ("Scoring under llama3" in printed and "8/8" in printed and "completions/s" in printed) == shown
