"""The reading list of docs/architecture.md: every function that a row passes on its way to the loss, found by running
it.

python docs/reading_list.py            writes the list
python docs/reading_list.py --check    exits with 1 where the list is out of date or longer than its limits

A WPO trainer with the quickstart's layout is built on a tiny model, and Python's profiler records which functions of
prefopt run while rows are
tokenised (inside the one `map`, behind `tokenize_pairs`), become a batch and are scored, up to the value that
`step_loss` returns. Left out is
what a row does not pass: work once for a data set (report, fingerprint), and OBSERVERS, which look at the value and do
not change it. Lines of
code are those without docstrings, comments and blank lines.
"""

from __future__ import annotations

import ast
import io
import sys
import tempfile
import tokenize
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from datasets import Dataset

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "prefopt"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- reading list: written by docs/reading_list.py -->", "<!-- end of the reading list -->"
OBSERVERS = {"record", "watch_finite", "check_initial_margin", "_check_initial_margin"}
# a ratchet: these go down, but for a check of rows that is worth its lines
MAX_FILES, MAX_LINES, MAX_FROM_BATCH = 19, 1111, 402


class Calls:
    """Functions of prefopt in the order of their first call, as (file, first line)."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, int], None] = {}
        self._observer: Any = None  # the frame of the observer that is running

    def record(self, run: Callable[[], Any]) -> Any:
        """Run something and record which functions it calls."""
        sys.setprofile(self._seen)
        try:
            return run()
        finally:
            sys.setprofile(None)

    def record_map(self, run: Callable[[], Any]) -> Any:
        """Run something and record which functions are called by the functions that it maps over a data set."""
        original = Dataset.map

        def recording(dataset: Dataset, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Dataset:
            def mapped(*rows: Any, **more: Any) -> Any:
                return self.record(lambda: function(*rows, **more))

            return original(dataset, mapped, *args, **kwargs)

        Dataset.map = recording
        try:
            return run()
        finally:
            Dataset.map = original

    def add(self, function: Callable[..., Any]) -> None:
        """Add a function that the caller knows to be passed."""
        code = function.__code__
        self.found.setdefault((code.co_filename, code.co_firstlineno))

    def _seen(self, frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "return" and frame is self._observer:
            self._observer = None
        if event != "call" or self._observer is not None or not code.co_filename.startswith(str(SOURCE)):
            return
        if code.co_name in OBSERVERS:
            self._observer = frame
        elif code.co_name != "<module>":
            self.found.setdefault((code.co_filename, code.co_firstlineno))


def code_lines(source: str) -> tuple[set[int], ast.Module]:
    """Return the numbers of the lines that hold code, and the parsed module."""
    tree, doc = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            doc.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    written: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            written.update(range(token.start[0], token.end[0] + 1))
    return written - doc, tree


def functions_of(calls: Calls) -> dict[str, dict[str, int]]:
    """Return file -> outermost function (with its class) -> lines of code, in the order of the calls."""
    listed: dict[str, dict[str, int]] = {}
    parsed: dict[str, tuple[set[int], ast.Module]] = {}
    for file, line in calls.found:
        if file not in parsed:
            parsed[file] = code_lines(Path(file).read_text())
        lines, tree = parsed[file]
        owner = _outermost(tree, line, "")
        if owner is not None:
            name, node = owner
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            inside = sum(first <= number <= (node.end_lineno or 0) for number in lines)
            listed.setdefault(Path(file).relative_to(SOURCE).as_posix(), {})[name] = inside
    return listed


def _outermost(tree: ast.AST, line: int, prefix: str) -> tuple[str, ast.FunctionDef] | None:
    for node in ast.iter_child_nodes(tree):
        first = min([getattr(node, "lineno", 0), *(d.lineno for d in getattr(node, "decorator_list", []))])
        if not first <= line <= (getattr(node, "end_lineno", 0) or 0):
            continue
        if isinstance(node, ast.ClassDef):
            return _outermost(node, line, f"{node.name}.")
        if isinstance(node, ast.FunctionDef):
            return prefix + node.name, node
    return None  # the body of a class, or a lambda of a module's table


def trace() -> tuple[dict[str, dict[str, int]], dict[str, dict[str, int]]]:
    """Return the functions from row to batch, and from batch to loss."""
    sys.path.insert(0, str(ROOT))
    from prefopt import WPOConfig, WPOTrainer
    from prefopt.data import tokenize_pairs
    from prefopt.trainers.metrics import MetricSums
    from tests.tiny import tiny_model, tiny_tokenizer

    def answer(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    question = [{"role": "user", "content": "Name a colour."}]
    rows = [{"prompt": question, "chosen": answer("Blue."), "rejected": answer("A fox.")}] * 4
    row_to_batch, batch_to_loss = Calls(), Calls()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tiny_tokenizer()
        args = WPOConfig(
            folder, use_cpu=True, bf16=False, report_to="none", max_length=64, per_device_train_batch_size=2
        )
        row_to_batch.add(tokenize_pairs)
        dataset, _ = row_to_batch.record_map(
            lambda: tokenize_pairs(Dataset.from_list(rows), tokenizer, max_length=args.max_length)
        )
        trainer = WPOTrainer(tiny_model(), args=args, train_dataset=dataset, processing_class=tokenizer)
        loader = trainer.get_train_dataloader()
        batch = row_to_batch.record(lambda: next(iter(loader)))
        trainer.model.train()
        batch = batch_to_loss.record(lambda: trainer._prepare_inputs(batch))
        batch_to_loss.record(lambda: trainer.step_loss(trainer.model, batch, MetricSums()))
    return functions_of(row_to_batch), functions_of(batch_to_loss)


def total(part: dict[str, dict[str, int]]) -> int:
    """Return the lines of code of all functions."""
    return sum(sum(functions.values()) for functions in part.values())


def table() -> tuple[str, int, int, int]:
    """Return the list as Markdown, with the numbers of files, of lines, and of lines from batch to loss."""
    to_batch, to_loss = trace()
    files = list(dict.fromkeys([*to_batch, *to_loss]))
    count = sum(len({**to_batch.get(file, {}), **to_loss.get(file, {})}) for file in files)
    lines = sum(sum({**to_batch.get(file, {}), **to_loss.get(file, {})}.values()) for file in files)
    text = [
        f"{count} functions in {len(files)} files, {lines} lines of code; {total(to_loss)} of them from batch to "
        "loss.",
    ]
    for title, part in (("From row to batch", to_batch), ("From batch to loss", to_loss)):
        text += ["", f"**{title}**, {total(part)} lines", "", "| file | lines | functions |", "|---|---:|---|"]
        for file, functions in part.items():
            names = ", ".join(f"`{name}` {size}" for name, size in functions.items())
            text.append(f"| `{file}` | {sum(functions.values())} | {names} |")
    return "\n".join(text), len(files), lines, total(to_loss)


def main() -> int:
    """Write or check the list."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        text, files, lines, from_batch = table()
    page = PAGE.read_text()
    begin, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    written = f"{page[:begin]}\n{text}\n{page[end:]}"
    if "--check" not in sys.argv:
        PAGE.write_text(written)
        print(text)
        return 0
    problems = [
        f"{what}: {size}, at most {most}"
        for what, size, most in (
            ("files", files, MAX_FILES),
            ("lines", lines, MAX_LINES),
            ("lines from batch to loss", from_batch, MAX_FROM_BATCH),
        )
        if size > most
    ]
    if written != page:
        problems.append("docs/architecture.md: the reading list is out of date; run `python docs/reading_list.py`")
    print("\n".join(problems) or "the reading list is true")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
