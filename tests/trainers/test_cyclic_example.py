"""The example on cyclic preferences: its figures, and the plot that it draws."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "cyclic_preferences.py"


@pytest.mark.slow
def test_the_example_shows_what_the_page_says(tmp_path):
    spec = importlib.util.spec_from_file_location("cyclic_preferences", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    results = example.main(str(tmp_path / "plot.png"))
    assert results["general_preference"]["eval_accuracy"] >= 0.99
    assert results["bradley_terry"]["eval_accuracy"] <= 2 / 3 + 1e-9
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
