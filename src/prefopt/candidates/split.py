"""`prefopt split`: sets of prompts without a common prompt, for the reward model, the policy and the test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise
from pathlib import Path
from typing import Any

from prefopt.arguments import check_settings, setting
from prefopt.candidates.records import file_of
from prefopt.candidates.tables import open_rows
from prefopt.data.holdout import fill_with_prompts, prompt_identity
from prefopt.data.messages import BadRow, without_none
from prefopt.data.rows import Row, normalise_prompt
from prefopt.data.sources import DataSource
from prefopt.files import content_hash, iterate_jsonl, write_json, write_jsonl

SETS = ("reward_model", "policy", "test")


@dataclass
class SplitArguments:
    """Which rows to split, and how large each set is: shares of the prompts (below 1) or numbers of prompts."""

    prompts: str = setting(
        "",
        "Rows with prompts (prompts, pairs, candidates, ...): hub name, file, or folder (of a command, too).",
        required=True,
    )
    output_dir: str = setting("", "Folder for reward_model.jsonl, policy.jsonl and test.jsonl.", required=True)
    prompts_config: str | None = setting(None, "Configuration (subset) of a hub dataset.")
    prompts_split: str = setting("train", "Split to read.")
    reward_model: float = setting(0.45, "Share or number of prompts for the reward model; 0 for none.", at_least=0)
    policy: float = setting(0.45, "Share or number of prompts for the policy; 0 for none.", at_least=0)
    test: float = setting(0.1, "Share or number of prompts for the test; 0 for none.", at_least=0)
    seed: int = setting(42, "Which prompt goes where; it does not depend on the order of the rows.")

    def __post_init__(self) -> None:
        check_settings(self)
        sizes = self.sizes
        for name, size in sizes.items():
            if size > 1 and size != int(size):
                raise ValueError(f"{name} is {size}; it must be a share up to 1 or a whole number of prompts.")
        used = [size for size in sizes.values() if size]
        if len(used) < 2:
            raise ValueError("A split makes at least two sets; give two of reward_model, policy and test a size.")
        if any(size < 1 for size in used) and any(size >= 1 for size in used):
            raise ValueError(f"The sizes {sizes} mix shares and numbers of prompts; give one kind.")
        if all(size < 1 for size in used) and sum(used) > 1 + 1e-9:
            raise ValueError(f"The shares {sizes} add up to {sum(used):g}, more than 1.")

    @property
    def sizes(self) -> dict[str, float]:
        """Set -> share or number."""
        return {name: getattr(self, name) for name in SETS}


def assign(keys: Sequence[str], sizes: Mapping[str, float], *, seed: int) -> dict[str, str]:
    """Assign prompts to sets in the order of their seeded hashes, one set after another.

    Args:
        keys: one for each row; equal keys are one prompt.
        sizes: set -> share of the prompts (below 1) or their number.
        seed: of the hashes.

    Returns:
        key -> set, without the prompts that are left over.

    Raises:
        ValueError: more prompts asked for than there are, or a set that would be empty.
    """
    order = sorted(set(keys), key=lambda key: content_hash(seed, key))
    used = {name: size for name, size in sizes.items() if size}
    scale = len(order) if all(size < 1 for size in used.values()) else 1
    # cumulated, so that the rounding of the shares neither loses nor repeats a prompt
    ends = [round(total * scale) for total in accumulate(used.values())]
    if ends[-1] > len(order):
        raise ValueError(f"{ends[-1]} prompts are asked for, but there are {len(order)} different ones.")
    counts = [end - start for start, end in pairwise([0, *ends])]
    if min(counts) <= 0:
        empty = list(used)[counts.index(min(counts))]
        raise ValueError(f"{empty} would get none of {len(order)} prompts; give it a larger size.")
    parts = fill_with_prompts(order, counts, order)
    return {order[place]: name for name, part in zip(used, parts) for place in part}


def run(args: SplitArguments) -> Path:
    """Write the sets, read them back, and check that no two have a prompt in common.

    Returns:
        The folder.

    Raises:
        ValueError: too few prompts, or no row with one.
    """
    source = DataSource(file_of(args.prompts), name=args.prompts_config, split=args.prompts_split)
    rows = open_rows(source)
    dropped: Counter[str] = Counter()
    keys = list(_keys(rows, dropped))
    if not any(keys):
        raise ValueError(f"Dataset {source}: no row has a prompt ({dict(dropped)}).")
    places = assign([key for key in keys if key is not None], args.sizes, seed=args.seed)
    folder = Path(args.output_dir)
    names = [name for name in SETS if args.sizes[name]]
    for name in SETS:
        (folder / f"{name}.jsonl").unlink(missing_ok=True)  # of an earlier split, with other prompts
    sets = [None if key is None else places.get(key) for key in keys]
    left = len({key for key in keys if key is not None}) - len(places)
    del keys, places  # the keys are computed again from what was written; a million of them take much memory
    for name in names:
        write_jsonl(folder / f"{name}.jsonl", (without_none(row) for row, place in zip(rows, sets) if place == name))
    found = check_disjoint(folder, names)
    counts = Counter(sets)
    report: dict[str, Any] = {
        "seed": args.seed,
        "sizes": args.sizes,
        "prompts": {name: len(found[name]) for name in names},
        "rows": {name: counts[name] for name in names},
        "prompts in no set": left,
        "rows without a prompt": dict(dropped),
    }
    write_json(folder / "split_report.json", report)
    for name in names:
        print(f"split: {name}: {len(found[name])} prompts, {counts[name]} rows -> {folder / name}.jsonl")
    for reason, number in dropped.items():
        print(f"split: {number} rows dropped: {reason}")
    return folder


def _keys(rows: Iterable[Row], dropped: Counter[str]) -> Iterator[str | None]:
    """Hash the prompt of each row; None where it has none, which is counted."""
    for row in rows:
        try:
            yield prompt_identity(normalise_prompt(without_none(row))["prompt"])
        except BadRow as fault:
            dropped[fault.reason] += 1
            yield None


def check_disjoint(folder: Path, names: Sequence[str]) -> dict[str, set[str]]:
    """Read the written sets back and return the prompts of each.

    Raises:
        ValueError: two sets have a prompt in common.
    """
    found = {
        name: {prompt_identity(normalise_prompt(row)["prompt"]) for row in iterate_jsonl(folder / f"{name}.jsonl")}
        for name in names
    }
    for one, other in combinations(names, 2):
        common = found[one] & found[other]
        if common:
            raise ValueError(f"{folder}: {one} and {other} have {len(common)} prompts in common.")
    return found
