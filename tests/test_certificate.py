"""The certificate covers every public part, names tests that exist, and its page holds each claim."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

import prefopt
from prefopt import losses
from prefopt.candidates.pairs import POLICIES
from prefopt.candidates.rankers import RANKERS
from prefopt.references import weights

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("certificate", ROOT / "docs" / "certificate.py")
assert _spec is not None and _spec.loader is not None
certificate = importlib.util.module_from_spec(_spec)
sys.modules["certificate"] = certificate
_spec.loader.exec_module(certificate)


def subjects(section: str) -> str:
    return " ".join(claim.subject for claim in certificate.SECTIONS[section])


def test_every_public_part_is_certified():
    certified = f"{subjects('Losses')} {subjects('Weights')}".replace(",", "").split()
    assert set(losses.__all__) <= set(certified)
    public = ("uniform_weights", "discriminative_confidence", "adaptive_weights", "SlidingWindowWeights")
    public += ("validation_discrimination_weights", "validation_accuracy_weights", "ThompsonSampling")
    assert all(hasattr(weights, name) for name in public) and set(public) <= set(certified)
    trainers = [name for name in prefopt.__all__ if name.endswith("Trainer")]
    assert trainers and all(name in subjects("Trainers") for name in trainers)
    assert all(kind in subjects("Rankers") for kind in RANKERS)
    assert all(name in subjects("Pair rules").split() for name in POLICIES)


def test_every_claim_names_tests_that_exist():
    for claim in certificate.claims():
        for pattern in claim.tests:
            path, _, function = pattern.partition("::")
            names = [
                line.split("(")[0].removeprefix("def ")
                for line in (ROOT / "tests" / path).read_text().splitlines()
                if line.startswith("def test_")
            ]
            bare = function.split("[")[0]
            assert any(fnmatchcase(name, bare) for name in names), f"{claim.subject}: {pattern}"


def test_the_page_holds_every_claim_and_none_has_failed():
    done = subprocess.run([sys.executable, "docs/certificate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_deviation_is_measured_and_a_failure_is_shown():
    measured = certificate.Measured()
    measured.now = "tests/x.py::test_a"
    measured.outcomes[measured.now] = certificate.Outcome()
    measured.add(torch.tensor([1.0, 200.0]), torch.tensor([1.0, 100.0]))
    measured.add({"a": 0.5, "b": [1.0, 2.0]}, {"a": 0.25, "b": [1.0, 2.0]})
    measured.add("words", "words")
    measured.add(torch.tensor([float("inf")]), torch.tensor([float("inf")]))
    claim = certificate.Claim("some_loss", "itself", "numbers", ("x.py::test_*",))
    assert certificate.row(claim, measured) == "| `some_loss` | itself | numbers | 1 | 6 | 1e+00 |"
    assert measured.outcomes[measured.now].deviation == pytest.approx(1.0)
    measured.outcomes["tests/x.py::test_b"] = certificate.Outcome(ended="failed")
    assert "**failed**" in certificate.row(claim, measured)
    assert "**failed**" in certificate.row(certificate.Claim("other", "", "", ("y.py::*",)), measured)
