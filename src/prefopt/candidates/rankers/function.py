"""A ranker written by the user: any Python function of a prompt and its candidates."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefopt.candidates.pairs import Array
from prefopt.candidates.rankers.base import Ranker, Request, Tally, check_scores


class FunctionRanker(Ranker):
    """Scores from `function(prompt, candidates)`: R numbers, or R lists of R logits.

    The `path` is "module:function" or "path/to/file.py:function". The prompt arrives as the record has it, text or
    messages.
    """

    def __init__(self, options: Any) -> None:
        self.name = options.path
        self.function = load_function(options.path)

    @classmethod
    def source_file(cls, path: str, options: Any) -> Path | None:
        """See `Ranker.source_file`."""
        return function_file(path)

    def rank(self, requests: Sequence[Request], tally: Tally) -> list[Array]:
        """See `Ranker.rank`."""
        results = []
        for request in requests:
            results.append(
                check_scores(request, self.function(request.prompt, list(request.candidates)), ranker=self.name)
            )
            tally.count("prompts")
            tally.count("answers", len(request.candidates))
            tally.advance(rows=1)
        return results


def load_function(name: str) -> Callable[..., Any]:
    """Import the function called "module:function" or "file.py:function".

    Raises:
        ValueError: the name has no colon, or nothing callable is there.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise ValueError(f"A ranking function is named `module:function` or `file.py:function`, not {name!r}.")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(f"ranking_function_{Path(place).stem}", function_file(name))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up there
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise ValueError(f"The module of the ranking function {name!r} cannot be imported: {error}.") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"{place} has no function {attribute!r}.")
    return function


def function_file(name: str) -> Path | None:
    """Find the file of the function called "module:function" or "file.py:function"; None for a module without one.

    Raises:
        ValueError: there is no such file.
    """
    place, _, attribute = name.rpartition(":")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise ValueError(f"There is no file {place} to take the ranking function {attribute!r} from.")
        return Path(place)
    try:
        spec = importlib.util.find_spec(place)
    except (ImportError, ValueError):  # loading the function says more about it
        return None
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None
