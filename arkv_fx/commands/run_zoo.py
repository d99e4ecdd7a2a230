"""``arkv zoo``: what becomes of every architecture that transformers has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arkv_fx.commands.common import JsonFile, spinner, writable
from arkv_fx.commands.console import err, out
from arkv_fx.errors import ConfigError, EvaluationError
from arkv_fx.evaluation import results as results_
from arkv_fx.evaluation.results import Row
from arkv_fx.zoo import expect as expect_
from arkv_fx.zoo import page as page_
from arkv_fx.zoo import run as run_
from arkv_fx.zoo.configs import KINDS, architectures
from arkv_fx.zoo.outcome import worst_first

# What a terminal is wide enough for; `wrong` names the checks that the other columns are of.
SHOWN = (
    "architecture", "status", "sites", "fused", "identity", "padded", "graphs", "breaks", "wrong",
)  # fmt: skip


def zoo(
    name: Annotated[
        list[str] | None,
        typer.Argument(help=f"Architectures, or any of {', '.join(KINDS)} (causal)."),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(callback=writable, help="Also write all columns here, as CSV.")
    ] = None,
    json: JsonFile = None,
    page: Annotated[
        Path | None, typer.Option(callback=writable, help="Also write a Markdown page here.")
    ] = None,
    expect: Annotated[
        Path | None, typer.Option(help="Fail where an architecture differs from this file.")
    ] = None,
    update_expectations: Annotated[
        bool, typer.Option(help="Write what was found to the file of --expect instead.")
    ] = False,
    quick: Annotated[bool, typer.Option(help="Leave out chunks and eviction.")] = False,
    limit: Annotated[float, typer.Option(min=1, help="Seconds for one architecture.")] = (
        run_.LIMIT_S
    ),
    names: Annotated[bool, typer.Option("--list", help="Only name the architectures.")] = False,
) -> None:
    """Transform a tiny model of each architecture and compare it with the model as it was."""
    if names:
        out.print("\n".join(architectures()), highlight=False)
        return
    if quick and expect:
        raise ConfigError("--quick leaves out what --expect compares: give one of them")
    if update_expectations and not expect:
        raise ConfigError("--update-expectations writes to the file of --expect: give that too")
    expected = None
    if expect and update_expectations and expect.exists():
        expect_.read(expect)  # a damaged file must not waste the hours that follow
    elif expect and not update_expectations:
        expected = expect_.load(expect)
    found: list[Row] = []
    with spinner() as progress:
        for row in run_.run(name or (), quick=quick, limit_s=limit, progress=progress):
            found.append(row)  # all take an hour or two: what there is, is kept
            if csv:
                page_.write_csv(csv, found)
            if json:
                results_.write(json, found)
            if page:
                page_.write_page(page, found)
            if expect and expected is None:
                expect_.update(expect, [row])
    _show(found)
    if expect and expected is not None:
        _compare(expect, expect_.mismatches(found, expected))


def _show(found: list[Row]) -> None:
    found = sorted(found, key=worst_first)
    shown = [{c: row[c] for c in SHOWN} for row in found]
    out.print(results_.table("The zoo", shown))
    for row in found:
        if said := row["error"] or row["reasons"]:
            out.print(f"{row['architecture']}: {said}", markup=False, highlight=False)
    out.print(page_.sentence(found), markup=False, highlight=False, soft_wrap=True)


def _compare(path: Path, mismatches: list[str]) -> None:
    for line in mismatches:
        err.print(line, markup=False, highlight=False, soft_wrap=True)
    if mismatches:
        raise EvaluationError(
            f"{len(mismatches)} values differ from {path}; if that is right, run the same with "
            "--update-expectations"
        )
