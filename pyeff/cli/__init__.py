"""The command line: ``pyeff info``, ``pyeff bench``, ``pyeff demo``, ``pyeff prune``.

A command is the function of a module's own name in this package. What is heavy (transformers, matplotlib) is
imported by the function when it runs, so that ``pyeff --help`` waits for torch alone.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

COMMANDS = ("info", "bench", "demo", "prune")


def build() -> typer.Typer:
    """The typer app with all commands.

    Raises:
        ImportError: typer or rich is not installed.
    """
    import rich  # noqa: F401 (the commands print with it; its absence should show here)
    import typer

    app = typer.Typer(
        name="pyeff",
        help="Fused kernels for reusing large networks: what runs here, how fast, and a run on a real model.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def root(version: bool = typer.Option(False, "--version", help="Print the version and leave.")) -> None:
        if version:
            from pyeff import __version__

            typer.echo(__version__)
            raise typer.Exit

    for name in COMMANDS:
        app.command(name)(getattr(importlib.import_module(f"pyeff.cli.{name}"), name))
    return app


def main() -> None:
    """The entry point of ``pyeff`` and ``python -m pyeff``."""
    try:
        app = build()
    except ImportError as error:
        print(f"pyeff: the command line needs {error.name}: pip install 'pyeff[cli]'", file=sys.stderr)
        sys.exit(1)
    app(prog_name="pyeff")
