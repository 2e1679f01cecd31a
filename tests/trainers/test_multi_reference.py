"""DPO against several references: the loss by hand, every weighting, resumption, and what is refused."""

import json
import math

import pytest
import torch
from datasets import Dataset

from prefopt import losses
from prefopt.data import tokenize_pairs
from prefopt.references.weights import adaptive_weights, discriminative_confidence
from prefopt.trainers.dpo import DPOConfig, DPOTrainer
from prefopt.trainers.multi_reference import MultiReferenceDPOConfig, MultiReferenceDPOTrainer
from tests.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer("llama3")
REPLIES = [
    "Blue is a colour.",
    "A fox lives in the woods.",
    "The answer is five.",
    "Short answers help.",
    "zero one two",
]
K = 3


def scored_pairs(count=12, references=K, seed=0, tokenizer=TOKENIZER):
    """Tokenised pairs with made-up scores of K references, some of them identical on both sides."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for n in range(count):
        chosen, rejected = REPLIES[n % 5] + f" {n}", REPLIES[(n + 2) % 5]
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"Question number {n}?"}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        )
    dataset, _ = tokenize_pairs(Dataset.from_list(rows), tokenizer, max_length=None)
    for side in ("chosen", "rejected"):
        logps = -60 * torch.rand(count, references, generator=generator) - 20
        counts = torch.randint(5, 20, (count, references), generator=generator)
        if side == "rejected":  # no confidence at all in row 0
            logps[0], counts[0] = (
                torch.tensor(dataset[0]["ref_chosen_logps"]),
                torch.tensor(dataset[0]["ref_chosen_counts"]),
            )
        dataset = dataset.add_column(f"ref_{side}_logps", logps.tolist())
        dataset = dataset.add_column(f"ref_{side}_counts", counts.float().tolist())
    return dataset


def config(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_length": 128,
        "beta": 0.1,
        "warmup_steps": 0,
        "seed": 3,
    }
    return MultiReferenceDPOConfig(**{**settings, **changes})


def trainer(folder, dataset=None, evaluation=None, seed=0, **changes):
    return MultiReferenceDPOTrainer(
        tiny_model("llama", vocab_size=len(TOKENIZER), seed=seed),
        args=config(folder, **changes),
        train_dataset=scored_pairs() if dataset is None else dataset,
        eval_dataset=evaluation,
        processing_class=TOKENIZER,
    )


def logged(run, name="loss"):
    return [entry[name] for entry in run.state.log_history if name in entry]


def first_batch(run):
    return next(iter(run.get_train_dataloader()))


def first_loss(run):
    """The loss of the first batch and what it is made of, from the trainer's own scores."""
    batch = first_batch(run)
    with torch.no_grad():
        scores = run.score_completions(run.model, batch)
    return batch, scores.logps[0::2], scores.logps[1::2], scores.counts[0::2], scores.counts[1::2]


def rate(weighting, batch):
    means = [batch[f"ref_{side}_logps"] / batch[f"ref_{side}_counts"] for side in ("chosen", "rejected")]
    if weighting == "arwc":
        means = [batch[f"ref_{side}_logps"] for side in ("chosen", "rejected")]
    return adaptive_weights(discriminative_confidence(*means))


@pytest.mark.parametrize("mode", ["multi_dpo", "geometric", "harmonic", "arithmetic"])
@pytest.mark.parametrize("unit", ["none", "token", "byte"])
def test_the_logged_loss_is_the_pure_function_on_the_batch(tmp_path, mode, unit):
    run = trainer(tmp_path, mode=mode, normalize=unit, weighting="arwc_normalized", max_steps=1)
    batch, *policy = first_loss(run)
    chosen, rejected, chosen_counts, rejected_counts = policy
    if unit == "byte":
        weights = adaptive_weights(
            discriminative_confidence(
                batch["ref_chosen_logps"] / batch["chosen_bytes"],
                batch["ref_rejected_logps"] / batch["rejected_bytes"],
            )
        )
    else:
        weights = rate("arwc_normalized", batch)
    ref = [batch["ref_chosen_logps"], batch["ref_rejected_logps"]]
    if unit == "token":
        chosen, rejected = chosen / chosen_counts, rejected / rejected_counts
        ref = [ref[0] / batch["ref_chosen_counts"], ref[1] / batch["ref_rejected_counts"]]
    elif unit == "byte":
        chosen, rejected = chosen / batch["chosen_bytes"], rejected / batch["rejected_bytes"]
        ref = [ref[0] / batch["chosen_bytes"], ref[1] / batch["rejected_bytes"]]
    if mode == "multi_dpo":
        expected = losses.multi_dpo_loss(chosen - rejected, ref[0] - ref[1], weights, beta=0.1)
    else:
        mixed = [losses.mixture_logps(logps, weights, mode=mode) for logps in ref]
        expected = losses.dpo_loss(chosen - mixed[0], rejected - mixed[1], beta=0.1)
    run.train()
    assert logged(run)[0] == pytest.approx(expected.mean().item(), rel=1e-5)


def test_forward_kl_and_clipping_reach_the_pure_functions(tmp_path):
    data = scored_pairs()
    run = trainer(tmp_path, data, mode="forward_kl", normalize="byte", max_steps=1)
    batch, chosen, rejected, *_ = first_loss(run)
    sizes = [batch["chosen_bytes"], batch["rejected_bytes"]]
    expected = losses.forward_kl_loss(
        chosen / sizes[0],
        rejected / sizes[1],
        batch["ref_chosen_logps"] / sizes[0],
        batch["ref_rejected_logps"] / sizes[1],
        torch.full((K,), 1 / K),
        beta=0.1,
        max_exponent=20.0,
    )
    run.train()
    assert logged(run)[0] == pytest.approx(expected.mean().item(), rel=1e-5)
    run = trainer(tmp_path, data, mode="geometric", weighting="arwc", clip_to_anchor=0.1, anchor="1", max_steps=1)
    batch, chosen, rejected, *_ = first_loss(run)
    clipped = losses.clip_to_anchor(batch["ref_chosen_logps"], batch["ref_rejected_logps"], anchor=1, max_eps=0.1)
    mixed = [
        losses.mixture_logps(side, rate("arwc", batch), mode="geometric") for side in clipped
    ]  # weights unclipped
    run.train()
    expected = losses.dpo_loss(chosen - mixed[0], rejected - mixed[1], beta=0.1).mean().item()
    assert logged(run)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", ["multi_dpo", "geometric", "harmonic", "arithmetic"])
def test_one_reference_and_equal_references_are_dpo(tmp_path, mode):
    one = scored_pairs(references=1)
    three = one
    for column in ("ref_chosen_logps", "ref_rejected_logps", "ref_chosen_counts", "ref_rejected_counts"):
        values = [row * 3 for row in one[column]]
        three = three.remove_columns(column).add_column(column, values)
    single = one
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        single = single.remove_columns(column).add_column(column, [row[0] for row in one[column]])
    single = single.remove_columns(["ref_chosen_counts", "ref_rejected_counts"])
    shared = {
        k: v
        for k, v in config(tmp_path).to_dict().items()
        if k in ("per_device_train_batch_size", "learning_rate", "max_steps", "seed")
    }
    plain = DPOTrainer(
        tiny_model("llama", vocab_size=len(TOKENIZER)),
        args=DPOConfig(
            output_dir=str(tmp_path),
            beta=0.1,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            gradient_checkpointing=False,
            save_strategy="no",
            max_length=128,
            precompute_ref_log_probs=True,
            **shared,
        ),
        train_dataset=single,
        processing_class=TOKENIZER,
    )
    plain.train()
    for data in (one, three):
        run = trainer(tmp_path, data, mode=mode)
        run.train()
        assert logged(run) == pytest.approx(logged(plain), rel=1e-5)


@pytest.mark.parametrize(
    "weighting", ["uniform", "arwc", "arwc_normalized", "offline_1", "offline_2", "online_1", "swcw_one_hot", "tsw"]
)
@pytest.mark.parametrize("mode", ["multi_dpo", "harmonic"])
def test_every_weighting_trains_to_finite_losses_with_a_distribution(tmp_path, weighting, mode):
    run = trainer(tmp_path, scored_pairs(16), weighting=weighting, mode=mode, validation_rows=5, sampling_subset=3)
    run.train()
    assert all(math.isfinite(value) for value in logged(run))
    for entry in run.state.log_history:
        weights = [value for name, value in entry.items() if name.startswith("references/weight/")]
        if weights:
            assert len(weights) == K and sum(weights) == pytest.approx(1, abs=1e-5)
            assert 1 - 1e-5 <= entry["references/effective_number"] <= K + 1e-5
            assert 0 <= entry["references/harmonic_dominance"] <= 1


def test_fixed_weights_and_one_hot_is_that_reference_exactly(tmp_path):
    data = scored_pairs()
    run = trainer(tmp_path, data, weighting="fixed", reference_weights=[0.0, 1.0, 0.0], mode="harmonic")
    run.train()
    only = data
    for column in ("ref_chosen_logps", "ref_rejected_logps", "ref_chosen_counts", "ref_rejected_counts"):
        only = only.remove_columns(column).add_column(column, [[row[1]] for row in data[column]])
    alone = trainer(tmp_path, only)
    alone.train()
    assert logged(run) == pytest.approx(logged(alone), rel=1e-6)


def test_window_weights_follow_the_previous_optimizer_step(tmp_path):
    """With accumulation, a batch is the whole step: the weights of step t are those of all pairs of step t - 1."""
    data = scored_pairs(12)
    changes = {"weighting": "swcw", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    run = trainer(tmp_path, data, **changes)
    run.train()
    plan = run._plan
    for step in range(4):
        found = [run.state.log_history[step][f"references/weight/{k}"] for k in range(K)]
        if step == 0:
            assert found == pytest.approx([1 / K] * K)
            continue
        epoch, number = divmod(step - 1, plan.num_steps)
        rows = data[[i for batch in plan.step(epoch, number)[0] if not batch.is_filler for i in batch.indices]]
        means = [
            torch.tensor(rows[f"ref_{side}_logps"]).T / torch.tensor(rows[f"ref_{side}_counts"]).T
            for side in ("chosen", "rejected")
        ]
        confidence = (means[0] - means[1]).abs().sum(dim=1)
        assert found == pytest.approx((confidence / confidence.sum()).tolist(), rel=1e-4)


def test_thompson_sampling_measures_the_policy_and_updates(tmp_path):
    run = trainer(
        tmp_path,
        scored_pairs(16),
        weighting="tsw",
        validation_rows=6,
        sampling_subset=4,
        sampling_metric="loss",
        max_steps=4,
    )
    measured = []
    inner = run.weighting.measure
    run.weighting.measure = lambda indices: measured.append((tuple(indices), inner(indices))) or measured[-1][1]
    run.train()
    assert len(measured) == 8
    for before, after in zip(measured[0::2], measured[1::2]):
        assert before[0] == after[0] and len(set(before[0])) == 4  # the same pairs, drawn without replacement
        assert before[1] != after[1]
    assert len({before[0] for before in measured[0::2]}) > 1
    rises = sum(after[1] > before[1] for before, after in zip(measured[0::2], measured[1::2]))
    assert sum(run.weighting.sampler.successes) == rises
    assert sum(run.weighting.sampler.failures) == 4 - rises
    for step in range(4):
        weights = [run.state.log_history[step][f"references/weight/{k}"] for k in range(K)]
        assert sorted(weights) == [0.0, 0.0, 1.0]


def test_the_measured_accuracy_is_the_policys_own(tmp_path):
    run = trainer(tmp_path, scored_pairs(16), weighting="tsw", validation_rows=6, per_device_eval_batch_size=2)
    run.step_model = run.model
    right = 0
    for row in run._validation:
        means = []
        for side in ("chosen", "rejected"):
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            with torch.no_grad():
                logps = run.model(ids).logits[0].log_softmax(-1)
            start = len(row["prompt_ids"])
            means.append(logps[range(start - 1, ids.shape[1] - 1), ids[0, start:]].mean().item())
        right += means[0] > means[1]
    assert run.measure(range(len(run._validation))) == pytest.approx(right / len(run._validation))


@pytest.mark.parametrize("weighting", ["tsw", "swcw"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, weighting):
    changes = {
        "weighting": weighting,
        "validation_rows": 4,
        "sampling_subset": 3,
        "max_steps": 6,
        "window": 2,
        "save_steps": 3,
    }
    data = scored_pairs(12)
    whole = trainer(tmp_path / "whole", data, save_strategy="steps", **changes)
    whole.train()
    # from other weights, which the checkpoint's replace
    resumed = trainer(tmp_path / "whole", data, seed=5, save_strategy="steps", resume_changed=True, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name in ("loss", *(f"references/weight/{k}" for k in range(K))):
        assert logged(resumed, name)[3:] == pytest.approx(logged(whole, name)[3:], rel=1e-6)
    assert json.dumps(resumed.weighting.state_dict()) == json.dumps(whole.weighting.state_dict())


def test_a_run_is_not_resumed_with_another_weighting(tmp_path):
    state = trainer(tmp_path, weighting="swcw").method_state()
    with pytest.raises(ValueError, match="another `weighting` than tsw"):
        trainer(tmp_path, weighting="tsw", validation_rows=4).load_method_state(state)


def test_validation_rows_are_held_out_by_prompt(tmp_path):
    run = trainer(tmp_path, scored_pairs(12), weighting="vaw", validation_rows=4)
    prompts = [{tuple(p) for p in dataset["prompt_ids"]} for dataset in (run.train_dataset, run._validation)]
    assert (len(run.train_dataset), len(run._validation)) == (8, 4) and not prompts[0] & prompts[1]
    with pytest.raises(ValueError, match="none would be left"):
        trainer(tmp_path, scored_pairs(12), weighting="vaw", validation_rows=12)


def test_an_evaluation_set_may_serve_the_weights_and_then_no_training_row_is_held_out(tmp_path):
    sets = {"validation": scored_pairs(10, seed=1), "test": scored_pairs(6, seed=2)}
    run = trainer(tmp_path, scored_pairs(12), sets, weighting="vaw", validation_set="validation")
    assert len(run.train_dataset) == 12
    means = [
        torch.tensor(sets["validation"][f"ref_{side}_logps"]) / torch.tensor(sets["validation"][f"ref_{side}_counts"])
        for side in ("chosen", "rejected")
    ]
    accuracy = (means[0] > means[1]).float().mean(dim=0)
    assert run.weighting.weights(first_batch(run), training=True).tolist() == pytest.approx(
        (accuracy / accuracy.sum()).tolist()
    )
    for evaluation in (sets, None):
        with pytest.raises(ValueError, match="`validation_set` 'valid' is not among the evaluation sets"):
            trainer(tmp_path, scored_pairs(12), evaluation, weighting="vaw", validation_set="valid")


def test_wpo_weights_and_other_losses_compose(tmp_path):
    run = trainer(tmp_path, use_weighting=True, max_weight=1.0, max_steps=1)
    batch, chosen, rejected, *_ = first_loss(run)
    with torch.no_grad():
        aligned = run.score_completions(run.model, batch).mean_aligned_logps
    weights = losses.wpo_pair_weights(aligned[0::2], aligned[1::2], max_weight=1.0)
    margins = batch["ref_chosen_logps"] - batch["ref_rejected_logps"]
    expected = weights * losses.multi_dpo_loss(chosen - rejected, margins, torch.full((K,), 1 / K), beta=0.1)
    run.train()
    assert logged(run)[0] == pytest.approx(expected.mean().item(), rel=1e-5)
    run = trainer(tmp_path, loss_type="hinge", max_steps=1)
    batch, chosen, rejected, *_ = first_loss(run)
    each = [
        losses.hinge_loss(chosen - batch["ref_chosen_logps"][k], rejected - batch["ref_rejected_logps"][k], beta=0.1)
        for k in range(K)
    ]
    run.train()
    assert logged(run)[0] == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)


def test_evaluation_reports_accuracies_that_compare(tmp_path):
    run = trainer(tmp_path, evaluation=scored_pairs(6, seed=9), anchor="2")
    metrics = run.evaluate()
    assert {"eval_accuracies/reference_free", "eval_accuracies/own_init", "eval_references/spread"} <= set(metrics)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "mixed"}, "mode.*harmonic"),
        ({"weighting": "offline_9"}, "offline_9"),
        ({"normalize": "word"}, "normalize"),
        ({"weighting": "fixed"}, "give both or neither"),
        ({"reference_weights": [1.0]}, "give both or neither"),
        ({"weighting": "fixed", "reference_weights": [0.5, 0.4]}, r"sum to 0\.9"),
        (
            {"weighting": "fixed", "reference_weights": [1.0], "references": ["a", "b"], "ref_logps_dir": "x"},
            "1 values for 2",
        ),
        ({"references": ["a", "a"], "ref_logps_dir": "x"}, "each once"),
        ({"references": ["a", "b"], "ref_logps_dir": "x", "anchor": "c"}, "not among the references"),
        ({"sync_ref_model": True}, "sync_ref_model"),
        ({"loss_type": "simpo"}, "has no reference"),
        ({"loss_type": "ipo", "normalize": "token"}, "divides by length itself"),
        ({"mode": "forward_kl", "loss_type": "hinge"}, "is itself the loss"),
        ({"loss_type": "aot", "weighting": "arwc"}, "sorts the batch"),
        ({"clip_to_anchor": 1.5}, "clip_to_anchor"),
        ({"reference_dtype": "bf16"}, "reference_dtype must be one of bfloat16"),
        ({"weighting": "swcw", "window": 0}, "window is 0; it must be at least 1"),
        ({"weighting": "tsw", "sampling_prior": 0.0}, "sampling_prior is 0.0; it must be above 0"),
        ({"weighting": "tsw", "sampling_subset": 0}, "sampling_subset"),
        ({"weighting": "vaw", "accuracy_temperature": 0.0}, "accuracy_temperature"),
        ({"truncation_mode": "keep_start"}, "no model may cut"),
        ({"ld_alpha": 0.5}, "ld_alpha"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        config(tmp_path, **settings)


def test_data_that_cannot_work_is_refused(tmp_path):
    data = scored_pairs()
    with pytest.raises(ValueError, match="no column 'ref_chosen_logps'"):
        trainer(tmp_path, data.remove_columns(["ref_chosen_logps", "ref_rejected_logps"]))
    holes = list(data["ref_rejected_logps"])
    holes[5] = [holes[5][0], None, holes[5][2]]
    with pytest.raises(ValueError, match=rf"row_id {data[5]['row_id']}.*3 finite numbers"):
        trainer(tmp_path, data.remove_columns("ref_rejected_logps").add_column("ref_rejected_logps", holes))
    empty = [[*row[:2], 0.0] for row in data["ref_chosen_counts"]]
    with pytest.raises(ValueError, match=r"3 finite numbers, above 0"):
        trainer(tmp_path, data.remove_columns("ref_chosen_counts").add_column("ref_chosen_counts", empty))
    with pytest.raises(ValueError, match=r"different numbers of references: \[2, 3\]"):
        trainer(tmp_path, data, scored_pairs(6, references=2))
    with pytest.raises(ValueError, match="2 values for 3 references"):
        trainer(tmp_path, weighting="fixed", reference_weights=[0.5, 0.5])
    with pytest.raises(ValueError, match="'7' is not among"):
        trainer(tmp_path, anchor="7")
    with pytest.raises(ValueError, match="needs `anchor`"):
        trainer(tmp_path, clip_to_anchor=0.1)
    with pytest.raises(ValueError, match="`ref_model` would not be used"):
        MultiReferenceDPOTrainer(
            tiny_model("llama", vocab_size=len(TOKENIZER)),
            tiny_model("llama", vocab_size=len(TOKENIZER), seed=1),
            config(tmp_path),
            train_dataset=data,
            processing_class=TOKENIZER,
        )


def test_a_reference_whose_scores_cannot_be_right_is_refused_unless_accepted(tmp_path):
    data = scored_pairs()
    for side in ("chosen", "rejected"):
        column = f"ref_{side}_logps"
        data = data.add_column("bad", [[*row[:2], 30 * row[2]] for row in data[column]])
        data = data.remove_columns(column).rename_column("bad", column)
    with pytest.raises(ValueError, match=r"Quarantined: 2 \(.*times its peers' median\).*accept_outliers"):
        trainer(tmp_path, data)
    trainer(tmp_path, data, accept_outliers=True)


def test_references_that_hardly_matter_are_pointed_out(tmp_path, caplog):
    trainer(tmp_path, beta=1e-4, mode="harmonic")
    assert (
        "hardly" in caplog.text and "follows one reference nearly alone" in caplog.text and "baseline" in caplog.text
    )
    trainer(tmp_path, mode="forward_kl")
    assert "experimental" in caplog.text and "get no gradient" in caplog.text
    caplog.clear()
    trainer(tmp_path, beta=0.1, anchor="0")
    assert "hardly" not in caplog.text and "baseline" not in caplog.text
