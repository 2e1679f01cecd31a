"""`prefopt rank`: score every candidate of every prompt with a ranker, in shards, on any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from prefopt.arguments import HubArguments, check_settings, check_together, setting
from prefopt.candidates.pairs import score_differences
from prefopt.candidates.rankers import (
    MODEL_RANKERS,
    RANKER_SETTINGS,
    RANKERS,
    RankerOptions,
    RankerSettings,
    build_ranker,
    deciding_options,
)
from prefopt.candidates.rankers.base import Request, check_scores
from prefopt.candidates.records import (
    Record,
    Records,
    output_file,
    push_to_hub,
    to_dataset,
    write_records,
)
from prefopt.candidates.shards import Processes, Row, Shard, ShardPlan, current_processes, run_shards
from prefopt.candidates.tables import Again
from prefopt.data.messages import as_messages
from prefopt.files import content_hash, file_hash, write_json
from prefopt.references.fingerprints import files_fingerprint, model_folder

# the flags of the SPPO scripts that mean the same
FLAG_ALIASES = {"model": "model_name_or_path"}
# with the weights, these files decide a ranker's scores
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spm.model", "tokenizer_config.json", "chat_template.jinja")
FEW = "prompts with fewer than two candidates"


@dataclass
class _Ranked:
    """What is ranked by which ranker; these fields stand first."""

    candidates: str = setting(
        "", "Candidates: the folder that `prefopt generate` wrote, a file, or a hub dataset.", required=True
    )
    output_dir: str = setting(
        "", "Folder for the scored candidates, their shards and a report; not that of the candidates.", required=True
    )
    ranker: str = setting("", f"Kind of ranker: {', '.join(RANKERS)}.", choices=tuple(RANKERS), required=True)
    model_name_or_path: str = setting(
        "",
        "The ranker: a folder or hub name; `module:function` or `file.py:function`; or the judge's name at its "
        "server.",
        required=True,
    )
    split: str = setting("train", "Split of the candidates, where they come from a dataset.")
    score_name: str | None = setting(None, "Name of the new scores; by default the last part of the ranker's name.")
    policy_template: str | None = setting(
        None,
        "Model whose chat template is put around the prompt before the ranker sees it, as the published SPPO pipeline "
        "did; by default rankers read the raw prompt.",
    )
    shard_size: int | None = setting(
        None, "Prompts in a shard; by default between 16 and 256, by the number of prompts.", at_least=1
    )


@dataclass
class RankArguments(HubArguments, RankerSettings, _Ranked):
    """What is ranked, which ranker scores it (with the options of `rankers`), and where the scored candidates go."""

    def __post_init__(self) -> None:
        check_settings(self)
        check_together(self, "push_to_hub", "hub_dataset_id")
        if Path(self.candidates).resolve() == Path(self.output_dir).resolve():
            raise ValueError(
                "output_dir is the folder of the candidates; give another one, so that they stay as they are."
            )

    @property
    def name(self) -> str:
        """Name under which the scores are stored."""
        return self.score_name or self.model_name_or_path.rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]


def run(args: RankArguments) -> Path:
    """Rank, and write the candidates with their new scores.

    Returns:
        The file of candidate records; `report.json` lies beside it.

    Raises:
        ValueError: a mistake in the settings or the data, a ranker that cannot be used, or a shard that failed.
    """
    output = output_file(args.output_dir, args.output_format)
    records = Records(args.candidates, split=args.split)
    if args.name in records.score_names:
        raise ValueError(
            f"{args.candidates} has scores named {args.name!r} already (row {records.score_names[args.name]!r}); give "
            "another --score_name."
        )
    processes = current_processes()
    folder, identity = _model(args, processes)
    work = _Work(args, folder, processes)
    settings = {
        name: getattr(args, name) for name in ("ranker", "model_name_or_path", "max_length", "policy_template")
    }
    settings |= deciding_options(args.ranker, args)
    settings |= {"fingerprint": identity, "score_name": args.name, "dtype": str(work.options.torch_dtype)}
    plan = run_shards(
        records,
        work,
        tool="rank",
        settings=settings,
        output_dir=args.output_dir,
        shard_size=args.shard_size,
        notes={
            "tokens_per_batch": args.tokens_per_batch,
            "device": str(processes.device),
            "revision": args.model_revision,
        },
        processes=processes,
    )
    if processes.is_main:
        _finish(args, records, plan, output)
    processes.gather(None)  # nobody leaves before the file is there
    return output


def _model(args: RankArguments, processes: Processes) -> tuple[str, str | None]:
    """Find the ranker and hash its content: once, in the main process."""
    found: tuple[str, str | None, str] = ("", None, "")
    if processes.is_main:
        try:
            found = (*_identify(args), "")
        except (OSError, ValueError) as error:
            found = ("", None, str(error))
    place, identity, fault = processes.gather(found)[0]
    if fault:
        raise ValueError(fault)
    if args.ranker in MODEL_RANKERS and not processes.is_main:
        place = str(model_folder(args.model_name_or_path, args.model_revision, download=True))  # on its own node
    return place, identity


def _identify(args: RankArguments) -> tuple[str, str | None]:
    name = args.model_name_or_path
    if args.ranker in MODEL_RANKERS:
        folder = model_folder(name, args.model_revision, download=True)
        weights = files_fingerprint(folder, remembered=Path(args.output_dir) / "model_hashes.json")
        return str(folder), content_hash(weights, [_hash_if_there(folder / file) for file in TOKENIZER_FILES])
    source = RANKERS[args.ranker].source_file(name, args)
    return name, content_hash(source.read_text(encoding="utf-8", errors="replace")) if source else None


def _hash_if_there(path: Path) -> str | None:
    with suppress(FileNotFoundError):
        return file_hash(path)
    return None


class _Work:
    """Ranks a shard; loads the ranker when the first shard comes."""

    def __init__(self, args: RankArguments, folder: str, processes: Processes) -> None:
        self.args = args
        chosen = {name: getattr(args, name) for name in RANKER_SETTINGS}
        self.options = RankerOptions(kind=args.ranker, path=folder, device=processes.device, **chosen)
        self.ranker: Any = None
        self.template: Any = None

    def __call__(self, shard: Shard) -> list[Row]:
        if self.ranker is None:
            self.ranker = build_ranker(self.options)
            self.template = (
                AutoTokenizer.from_pretrained(self.args.policy_template) if self.args.policy_template else None
            )
        requests = [self._request(record) for record in shard.items]
        filled = [request for request in requests if request.candidates]
        for request in requests:
            if len(request.candidates) < 2:
                shard.count(FEW)
        scores = iter(self.ranker.rank(filled, shard) if filled else [])
        rows = []
        for request in requests:
            values = check_scores(request, next(scores), ranker=self.args.name).tolist() if request.candidates else []
            rows.append({"prompt_id": request.row, "values": values})
        return rows

    def _request(self, record: Row) -> Request:
        prompt = record["prompt"]
        if self.template is not None:
            prompt = self.template.apply_chat_template(as_messages(prompt), add_generation_prompt=True, tokenize=False)
        return Request(record["prompt_id"], prompt, [candidate["text"] for candidate in record["candidates"]])


def with_scores(record: Record, name: str, values: Any) -> Record:
    """Add scores to a record; of a table also the row means of its differences, as the candidates' scores."""
    scores, tables = values, record["tables"]
    if values and isinstance(values[0], list):
        scores = score_differences(values).mean(axis=1) if len(values) > 1 else [0.0]
        tables = {**tables, name: values}
    candidates = [
        {**candidate, "scores": {**candidate["scores"], name: float(score)}}
        for candidate, score in zip(record["candidates"], scores, strict=True)
    ]
    return {**record, "candidates": candidates, "tables": tables}


def _finish(args: RankArguments, records: Sequence[Record], plan: ShardPlan, output: Path) -> None:
    scored = Again(
        lambda: (
            with_scores(record, args.name, row["values"]) for record, row in zip(records, plan.rows(), strict=True)
        )
    )
    write_records(output, scored)
    report = {"score name": args.name, **plan.report()}
    write_json(output.parent / "report.json", report)
    print(f"rank: {len(records)} prompts scored as {args.name!r} -> {output}")
    for name in ("truncated prompts", "truncated answers", "unreadable verdicts", FEW):
        if report["counts"].get(name):
            print(f"rank: {report['counts'][name]} {name}")
    push_to_hub(args, output, lambda: to_dataset(scored))
