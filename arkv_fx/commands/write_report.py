"""``arkv eval report``: what was measured, as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arkv_fx.commands.common import Page, load_calibration
from arkv_fx.commands.console import err
from arkv_fx.errors import EvaluationError
from arkv_fx.evaluation.pages.measured_page import report_page
from arkv_fx.files import write_text


def report(
    rows: Annotated[
        list[Path], typer.Argument(help="Files that --json of `arkv eval` wrote, of any kind.")
    ],
    page: Page,
    calibration: Annotated[
        Path | None,
        typer.Option(help="A file of `arkv calibrate`, whose shares and OQ ratios are shown."),
    ] = None,
) -> None:
    """One HTML page of rows: quality against bytes, memory, tables; it needs no network."""
    if any(path.exists() and page.exists() and path.samefile(page) for path in rows):
        raise EvaluationError(f"{page}: holds rows; write the page to another file")
    found = load_calibration(calibration)
    text = report_page(rows, found, calibration.name if calibration else "")
    write_text(page, text)
    size = len(text.encode()) / 2**20
    err.print(f"{page}: {size:.1f} MiB", markup=False, highlight=False, soft_wrap=True)
