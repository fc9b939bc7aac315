"""The command line: `superpipeline` (what this machine is) and `superpipeline run MODEL`."""

from __future__ import annotations

import typer

from superpipeline.cli.info import info
from superpipeline.cli.run import run

__all__ = ["app", "main"]

app = typer.Typer(
    name="superpipeline",
    help="Run any PyTorch model in the device memory you have.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(run)
app.command()(info)


@app.callback(invoke_without_command=True)
def bare(context: typer.Context) -> None:
    """Run any PyTorch model in the device memory you have."""
    if context.invoked_subcommand is None:
        info()


def main() -> None:
    """The entry point of the `superpipeline` script."""
    app(prog_name="superpipeline")
