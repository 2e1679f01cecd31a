"""Show what became of the rows of a data set, once: counts, lengths, and a warning where much was cut or dropped."""

from __future__ import annotations

import sys
from html import escape

from prefopt.data import TokenizationReport
from prefopt.launch import print_on_main, rank
from prefopt.pages import printable

LARGELY_CUT, LARGELY_DROPPED = 0.2, 0.01  # shares of rows from which on a warning says so


def show_report(report: TokenizationReport, max_length: int | None) -> None:
    """Print a set's counts on the first process, as a block of their own in a notebook; the second time do nothing."""
    if rank() != 0 or report.shown:
        return
    report.shown = True
    if "ipykernel" in sys.modules:
        from IPython.display import HTML, display

        display(HTML(as_html(report, max_length)))
        return
    print(printable(report.table()), flush=True)
    for warning in data_warnings(report, max_length):
        print_on_main(f"Warning: {warning}")


def as_html(report: TokenizationReport, max_length: int | None) -> str:
    """Write a set's counts and warnings as HTML."""
    warnings = "".join(
        f"<p><strong>Warning:</strong> {escape(printable(warning))}</p>"
        for warning in data_warnings(report, max_length)
    )
    return f"<pre>{escape(printable(report.table()))}</pre>{warnings}"


def data_warnings(report: TokenizationReport, max_length: int | None) -> list[str]:
    """Return a sentence where much of a data set is cut or dropped, which a table of counts says too quietly."""
    warnings = []
    if report.rows_cut > LARGELY_CUT * report.rows_kept:
        share = report.rows_cut / report.rows_kept
        warnings.append(
            f"{report.name}: {report.rows_cut} of {report.rows_kept} rows ({share:.0%}) do not fit in max_length "
            f"{max_length} and are cut: what is scored is not the whole answer, or not after the whole prompt. Raise "
            "max_length if memory allows."
        )
    if report.rows_dropped > LARGELY_DROPPED * report.rows_in:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items() if count)
        warnings.append(f"{report.name}: {report.rows_dropped} of {report.rows_in} rows are dropped: {reasons}.")
    return warnings
