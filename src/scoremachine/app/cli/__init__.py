"""The command line. Heavy imports are deferred until a command needs them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from scoremachine import __version__
from scoremachine.app.cli import cache, growing, machines, networks, provenance
from scoremachine.app.cli.words import EARLIER
from scoremachine.runtime.files import sentence_of

PACKAGE = str(Path(__file__).parents[2])
# PyTorch's warning for memory-mapped arrays, which are never written to here
READ_ONLY = "The given NumPy array is not writable"


class Commands(TyperGroup):
    """The commands, which accept earlier names of options too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [current(word) for word in args])


def current(word: str) -> str:
    """An option with its current name."""
    name, equals, value = word.partition("=")
    return EARLIER.get(name, name) + equals + value


app = typer.Typer(
    cls=Commands,
    help="Training-free diffusion: the closed-form denoisers of a set of images, exact and fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Training-free diffusion: the closed-form denoisers of a set of images, exact and fast."""
    if version:
        print(f"scoremachine {__version__}")
        raise typer.Exit


COMMANDS: dict[str, list[Callable[..., None]]] = {
    "One photograph": [growing.grow],
    "Machines": [
        machines.generate,
        machines.denoise,
        machines.calibrate,
        machines.index,
        machines.zoo,
        machines.denoising_error,
        machines.compress,
        machines.ablation,
    ],
    "Where pictures come from": [
        provenance.explain,
        provenance.attribute,
        provenance.audit,
        provenance.risk,
    ],
    "Trained networks": [
        networks.train,
        networks.compare,
        networks.sensitivity,
        networks.bias,
        networks.quality,
        networks.study,
    ],
}
for panel, commands in COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.add_typer(cache.app, name="cache", rich_help_panel="What is kept")


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None,
    line: str | None = None,
) -> None:  # fmt: skip
    """Shows the warnings of scoremachine, and those of other libraries only with -W."""
    own = filename.startswith(PACKAGE) and not str(message).startswith(READ_ONLY)
    if own or sys.warnoptions:
        print(f"scoremachine: {message}", file=sys.stderr)


def main() -> None:
    """Runs the command line: exit code 2 and a sentence for errors that a user can correct."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # characters that the locale cannot encode become "?"
            stream.reconfigure(errors="replace")
    warnings.showwarning = _show_warning
    try:
        app()
    except (ValueError, OSError) as error:
        sentence = sentence_of(error) if isinstance(error, OSError) else error
        print(f"scoremachine: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
