"""The command line. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from scoremachine import __version__
from scoremachine.app.cli import cache, machines, networks

app = typer.Typer(
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


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"scoremachine: {message}", file=sys.stderr)


def _told(error: Exception) -> Exception:
    """An error as a sentence: a full disk may be met wherever something is written."""
    from scoremachine.runtime.files import FULL, full_disk

    if not isinstance(error, OSError) or error.errno not in FULL:
        return error
    return full_disk(Path(error.filename).absolute().parent if error.filename else Path.cwd())


def main() -> None:
    """Runs the command line: exit code 2 and a sentence for what a user can mend."""
    warnings.showwarning = _show_warning
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"scoremachine: {_told(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
