"""`prefopt rank`: score every candidate of every prompt with a ranker, in shards, on any number of processes."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer

from prefopt.candidates.pairs import Array, score_differences
from prefopt.candidates.processes import Processes, current_processes
from prefopt.candidates.rankers import MODEL_RANKERS, RANKERS, RankerOptions, build_ranker
from prefopt.candidates.rankers.base import Request, check_scores
from prefopt.candidates.records import Record, read_records, to_dataset, write_records
from prefopt.candidates.shards import Row, Shard, run_shards
from prefopt.data.messages import as_messages
from prefopt.files import content_hash, write_json
from prefopt.references.fingerprints import files_fingerprint, model_folder


@dataclass
class RankArguments:
    """What `prefopt rank` reads, which ranker scores it, and where the scored candidates go."""

    candidates: str = field(
        metadata={"help": "Candidates: the folder that `prefopt generate` wrote, a file, or a hub dataset."}
    )
    output_dir: str = field(metadata={"help": "Folder for the scored candidates and the shards on the way to them."})
    ranker: str = field(metadata={"help": f"Kind of ranker: {', '.join(RANKERS)}.", "choices": list(RANKERS)})
    model: str = field(
        metadata={
            "help": "The ranker: a folder or hub name; `module:function` or `file.py:function`; or the judge's model name."
        }
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of the ranker's hub repository."})
    score_name: str | None = field(
        default=None, metadata={"help": "Name of the new scores; the last part of the ranker's name when unset."}
    )
    split: str = field(default="train", metadata={"help": "Split of the candidates, where they come from a dataset."})
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of prompt and answer that a reward or preference model reads; all its positions when unset."
        },
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={
            "help": "Of the ranker's weights. auto: float32 on a CPU; on a GPU float16 for PairRM, as published, else bfloat16."
        },
    )
    tokens_per_batch: int = field(
        default=16384, metadata={"help": "Padded tokens in a batch; answers are batched by length."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the model code that the ranker's repository brings (ArmoRM)."}
    )
    policy_template: str | None = field(
        default=None,
        metadata={
            "help": "Model whose chat template is put around the prompt before the ranker sees it, as the published SPPO pipeline did; "
            "rankers read the raw prompt when unset."
        },
    )
    judge_url: str = field(
        default="http://localhost:8000/v1", metadata={"help": "Base URL of the judge's OpenAI-compatible server."}
    )
    judge_template: str | None = field(
        default=None,
        metadata={"help": "File with the judge's prompt, with {prompt}, {answer_a} and {answer_b}; ours when unset."},
    )
    judge_key_variable: str = field(
        default="OPENAI_API_KEY", metadata={"help": "Environment variable that holds the judge's key."}
    )
    judge_concurrency: int = field(
        default=16, metadata={"help": "Requests to the judge under way at once, of each process."}
    )
    judge_timeout: float = field(default=120.0, metadata={"help": "Seconds that one request to the judge may take."})
    shard_size: int = field(
        default=512, metadata={"help": "Prompts in a shard: the unit that is resumed and shared among processes."}
    )
    output_format: Literal["parquet", "jsonl"] = field(
        default="parquet", metadata={"help": "File format of the scored candidates."}
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Hub dataset to push the scored candidates to (private); none when unset."}
    )

    def __post_init__(self) -> None:
        if self.ranker not in RANKERS:
            raise ValueError(f"There is no ranker {self.ranker!r}; known: {', '.join(RANKERS)}.")
        for name in ("tokens_per_batch", "shard_size", "judge_concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.max_length is not None and self.ranker not in ("reward-model", "general-preference"):
            raise ValueError(f"max_length has no effect on the ranker {self.ranker!r}; leave it out.")
        if Path(self.candidates).resolve() == Path(self.output_dir).resolve():
            raise ValueError(
                "output_dir is the folder of the candidates; give another one, so that they stay as they are."
            )

    @property
    def name(self) -> str:
        """Under which name the scores are stored."""
        return self.score_name or self.model.rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]


def run(args: RankArguments) -> None:
    """Rank, and write `<output_dir>/candidates.<format>` with the new scores and `<output_dir>/rank_report.json`."""
    records = read_records(args.candidates, split=args.split)
    scored = [record["prompt_id"] for record in records if args.name in _score_names(record)]
    if scored:
        raise ValueError(
            f"{args.candidates} has scores named {args.name!r} already (row {scored[0]!r}); give another --score_name."
        )
    processes = current_processes()
    folder, identity = _model(args, processes)
    work = _Work(args, folder, processes)
    settings = {name: getattr(args, name) for name in ("ranker", "model", "max_length", "dtype", "policy_template")}
    settings |= {"identity": identity, "score_name": args.name}
    plan = run_shards(
        records,
        work,
        tool="rank",
        settings=settings,
        output_dir=args.output_dir,
        shard_size=args.shard_size,
        notes={"tokens_per_batch": args.tokens_per_batch, "device": str(processes.device), "revision": args.revision},
        processes=processes,
    )
    if processes.is_main:
        _finish(args, records, list(plan.rows()), plan.counts())
    processes.gather(None)  # nobody leaves before the file is there


def _score_names(record: Record) -> set[str]:
    return {*record["tables"], *(name for candidate in record["candidates"] for name in candidate["scores"])}


def _model(args: RankArguments, processes: Processes) -> tuple[str, str | None]:
    """Where the ranker is, and a hash of what it is: found once, by the main process."""
    found: tuple[str, str | None, str] = (args.model, None, "")
    if processes.is_main:
        try:
            if args.ranker in MODEL_RANKERS:
                folder = model_folder(args.model, args.revision, download=True)
                remembered = Path(args.output_dir) / "model_hashes.json"
                found = (str(folder), files_fingerprint(folder, remembered=remembered), "")
            elif args.ranker == "function" and args.model.rpartition(":")[0].endswith(".py"):
                found = (args.model, content_hash(Path(args.model.rpartition(":")[0]).read_text(encoding="utf-8")), "")
            elif args.judge_template:
                found = (args.model, content_hash(Path(args.judge_template).read_text(encoding="utf-8")), "")
        except (OSError, ValueError) as error:
            found = (args.model, None, str(error))
    folder_name, identity, error_text = processes.gather(found)[0]
    if error_text:
        raise ValueError(error_text)
    if args.ranker in MODEL_RANKERS and not processes.is_main:
        folder_name = str(model_folder(args.model, args.revision, download=True))  # on its own node
    return folder_name, identity


class _Work:
    """Ranks a shard; loads the ranker when the first shard comes."""

    def __init__(self, args: RankArguments, folder: str, processes: Processes) -> None:
        self.args = args
        self.options = RankerOptions(
            kind=args.ranker,
            path=folder,
            device=processes.device,
            dtype=args.dtype,
            max_length=args.max_length,
            tokens_per_batch=args.tokens_per_batch,
            trust_remote_code=args.trust_remote_code,
            judge_url=args.judge_url,
            judge_template=args.judge_template,
            judge_key_variable=args.judge_key_variable,
            judge_concurrency=args.judge_concurrency,
            judge_timeout=args.judge_timeout,
        )
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
                shard.count("prompts with fewer than two candidates")
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
    """`record` with scores: of a table also the row means of its differences, as the candidates' scores."""
    is_table = bool(values) and isinstance(values[0], list)
    scores = _table_scores(values) if is_table else values
    candidates = [
        {**candidate, "scores": {**candidate["scores"], name: float(score)}}
        for candidate, score in zip(record["candidates"], scores, strict=True)
    ]
    tables = {**record["tables"], name: values} if is_table else record["tables"]
    return {**record, "candidates": candidates, "tables": tables}


def _table_scores(table: Sequence[Sequence[float]]) -> Array | list[float]:
    return score_differences(table).mean(axis=1) if len(table) > 1 else [0.0]


def _finish(args: RankArguments, records: Sequence[Record], rows: Sequence[Row], counts: Counter[str]) -> None:
    scored = [with_scores(record, args.name, row["values"]) for record, row in zip(records, rows, strict=True)]
    path = Path(args.output_dir) / f"candidates.{args.output_format}"
    write_records(path, scored)
    write_json(
        Path(args.output_dir) / "rank_report.json", {"score_name": args.name, "prompts": len(records), **counts}
    )
    cut = ", ".join(
        f"{counts[name]} {name}"
        for name in ("truncated prompts", "truncated answers", "unreadable verdicts")
        if counts[name]
    )
    print(f"rank: {len(records)} prompts scored as {args.name!r}{'; ' + cut if cut else ''}. {path}", file=sys.stderr)
    if args.push_to_hub:
        to_dataset(scored).push_to_hub(args.push_to_hub, private=True)
