"""The command ``arkv``."""

from __future__ import annotations

import typer

from arkv_fx.commands.group import Group

app = typer.Typer(
    name="arkv",
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def arkv() -> None:
    """A small KV cache for any PyTorch language model."""


if __name__ == "__main__":
    app()
