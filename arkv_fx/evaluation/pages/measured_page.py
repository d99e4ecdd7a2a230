"""`arkv eval report`: the page of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arkv_fx.calibration import Calibration
from arkv_fx.evaluation.pages import sections
from arkv_fx.evaluation.pages.looks import DIFFERENT, looks
from arkv_fx.evaluation.pages.measured import read_all
from arkv_fx.evaluation.pages.render import plotly_script, render


def report_page(
    paths: Sequence[str | Path], calibration: Calibration | None = None, file: str = ""
) -> str:
    """One HTML page of files of rows, with scripts and styles in it.

    Args:
        paths: files that ``arkv eval fidelity``, ``passkey`` or ``tasks`` wrote with ``--json``.
        calibration: its shares and OQ ratios are shown.
        file: what the page calls it.

    Raises:
        EvaluationError: naming file and line of what is no row of these, or if a package is
            missing.
    """
    found = read_all(paths)
    styles = looks(row["method"] for kind in found.rows.values() for row in kind)
    parts = []
    if found.rows["tasks"]:
        parts.append(sections.tasks(found.rows["tasks"], styles))
    if found.rows["fidelity"]:
        parts.append(sections.fidelity(found.rows["fidelity"], styles))
    if found.rows["passkey"]:
        parts.append(sections.passkey(found.rows["passkey"]))
    parts.append(sections.memory_of(found.rows, styles))
    if calibration is not None:
        parts.append(sections.calibrated(calibration, file))
    counts = [f"{len(rows)} of {kind}" for kind, rows in found.rows.items() if rows]
    twice = f"; {found.repeated} stood there more than once" if found.repeated else ""
    if len(styles) > DIFFERENT:
        twice += f"; of {len(styles)} methods, {DIFFERENT} look different"
    pictures = [picture for part in parts for picture in part.pictures]
    for number, picture in enumerate(pictures):
        picture.number = number
    return render(
        "measured.html",
        title="arkv_fx: what was measured",
        sources=f"{', '.join(Path(path).name for path in paths)}: rows {', '.join(counts)}{twice}.",
        sections=parts,
        pictures=[picture.variants for picture in pictures],
        plotly=plotly_script(),
    )
