"""The page about losses names every one, and each docstring says what it computes and where it is from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prefopt import losses

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "losses.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", losses.__all__)
def test_every_public_name_is_explained(name):
    assert f"`{name}" in PAGE
    docstring = getattr(losses, name).__doc__
    for part in ("Args:", "Returns:", "Raises:", "Reference:"):
        assert part in docstring, f"{name} has no {part}"


def test_the_example_prints_what_it_says():
    chosen, rejected = torch.tensor([1.5, -0.2]), torch.tensor([0.3, 0.4])
    printed = str(losses.dpo_loss(chosen, rejected, beta=0.1))
    assert printed in PAGE
