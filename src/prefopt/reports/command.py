"""`prefopt report DIR [DIR ...]`: training runs side by side, or a loop by iteration, as HTML and Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prefopt.arguments import check_settings, setting
from prefopt.files import user_path
from prefopt.pages import counted, printable
from prefopt.reports.loop import write_loop_report
from prefopt.reports.runs import write_report


@dataclass
class ReportArguments:
    """Which runs are reported, and where."""

    run_dir: list[str] = setting(
        factory=list,
        help="Folder of a training run, or several of them, or one of a run of `prefopt pipeline`.",
        required=True,
    )
    iterations: int | None = setting(None, "Of a loop: report iterations up to this one; default: all.")
    output_dir: str | None = setting(
        None,
        "Folder for the report; default: the run's, and the first one's of several. A loop's report.md is written to "
        "its folder in any case.",
    )
    plots: bool = setting(True, "Draw charts.", decides_result=False)

    def __post_init__(self) -> None:
        check_settings(self)


def run(args: ReportArguments) -> Path:
    """Write the report.

    Returns:
        `report.md`; `report.html` lies beside it.

    Raises:
        ValueError: a folder holds no run, or several are given and one of them is a loop.
    """
    folders = [user_path(name) for name in args.run_dir]
    loops = [folder for folder in folders if any(folder.glob("iteration-*"))]
    if loops and len(folders) > 1:
        raise ValueError(f"{loops[0]} is a run of `prefopt pipeline`: report it alone, or name its training folders.")
    output = None if args.output_dir is None else user_path(args.output_dir)
    if loops:
        return write_loop_report(loops[0], iterations=args.iterations, output_dir=output, plots=args.plots)
    page = write_report(folders, output, plots=args.plots)
    print(f"report: {counted(len(folders), 'run')} -> {printable(str(page))}, {page.with_suffix('.html').name}")
    return page
