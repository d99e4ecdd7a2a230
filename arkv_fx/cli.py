"""The command ``arkv``."""

from __future__ import annotations

import typer

from arkv_fx.commands import evaluate
from arkv_fx.commands.bench import bench
from arkv_fx.commands.calibrate_report import calibrate, report
from arkv_fx.commands.common import Group
from arkv_fx.commands.doctor import doctor
from arkv_fx.commands.export_graphs import export
from arkv_fx.commands.generate import generate
from arkv_fx.commands.zoo import zoo

app = typer.Typer(
    name="arkv",
    cls=Group,
    help="A small KV cache for any PyTorch language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (generate, calibrate, report, export, bench, doctor, zoo):
    app.command()(command)
app.add_typer(evaluate.app, name="eval")

if __name__ == "__main__":
    app()
