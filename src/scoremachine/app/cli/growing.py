"""The command that grows pictures from a photograph. Heavy imports wait until it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scoremachine.app.cli.words import Quiet, Seed, interruptible, parts_of
from scoremachine.runtime.parsing import number

MORE = "What to do with it"


def grow(
    photos: Annotated[
        list[str],
        typer.Argument(
            help="A photograph, or several whose patches are mixed: files, or built-in names "
            "(china, flower, coffee, chelsea, astronaut, rocket, hubble, coins, tissue, brick, "
            "grass, gravel)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder for what is written.")] = Path("runs/grow"),
    size: Annotated[
        str | None,
        typer.Option(help="HEIGHTxWIDTH of the picture, as 512x1024; default: the photograph's."),
    ] = None,
    count: Annotated[int, typer.Option(help="How many pictures.")] = 1,
    seed: Seed = 0,
    keep: Annotated[
        float | None,
        typer.Option(
            help="How much of the photograph's layout stays, from 0 (nothing) to 1; default: 0.2; "
            "0.5 with --structure, 0 with --tile."
        ),
    ] = None,
    patch_size: Annotated[int, typer.Option(help="Side of the patches, in pixels.")] = 7,
    tile: Annotated[
        bool, typer.Option("--tile", help="A seamless tile.", rich_help_panel=MORE)
    ] = False,
    symmetry: Annotated[
        str | None,
        typer.Option(help="mirror, rotate (by half a turn) or four.", rich_help_panel=MORE),
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option(help="Fill the photograph where this picture is white.", rich_help_panel=MORE),
    ] = None,
    extend: Annotated[
        str | None,
        typer.Option(
            help="Extend the photograph by so many pixels on each side: one number, or "
            "TOP,RIGHT,BOTTOM,LEFT.",
            rich_help_panel=MORE,
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from", help="Start from this picture: a collage, a sketch.", rich_help_panel=MORE
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="How much of --from may change, from 0 to 1; default: 0.7.", rich_help_panel=MORE
        ),
    ] = None,
    structure: Annotated[
        str | None,
        typer.Option(
            help="The layout of this picture, out of the photograph's patches.",
            rich_help_panel=MORE,
        ),
    ] = None,
    upscale: Annotated[
        float | None,
        typer.Option(
            help="Enlarge the photograph by this factor, as 2, with detail from its own patches.",
            rich_help_panel=MORE,
        ),
    ] = None,
    frames: Annotated[
        int,
        typer.Option(
            help="A looping animation of so many frames, as grown.gif.", rich_help_panel=MORE
        ),
    ] = 0,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Also write where every pixel comes from: sources.png, a map of places in the "
            "photograph, and sources.npz.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Make even very large pictures.")] = False,
    quiet: Quiet = False,
) -> None:
    """Grow new pictures from one photograph, of any size: grown.png.

    Examples:

      scoremachine grow china --size 300x900

      scoremachine grow brick --tile

      scoremachine grow me.jpg --extend 0,200,0,200
    """
    from scoremachine.app.runs.growing import GrowOptions, grow_into
    from scoremachine.runtime import progress

    with progress.quiet(quiet):
        if strength is not None and start is None:
            raise ValueError("--strength belongs to --from: give a picture to start from")
        if strength is not None and not 0 <= strength <= 1:
            raise ValueError(f"--strength is {strength}; expected a number from 0 to 1")
        if start is not None and structure is not None:
            raise ValueError("--from and --structure are asked for together; expected one of them")
        if start is not None:
            keep = 1 - (0.7 if strength is None else strength)
        options = GrowOptions(
            tuple(photos), _size(size), count, seed, keep, patch_size, tile, symmetry,
            start or structure, structure is not None, mask, _borders(extend), upscale, frames,
            explain, yes,
        )  # fmt: skip
        with interruptible(lambda: "the same command goes on after the scales that are finished"):
            written = grow_into(out, options)
    for path in written:
        print(path)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, x, width = text.lower().partition("x")
    if not x:
        raise ValueError(f"--size is {text!r}; expected HEIGHTxWIDTH, as 512x1024")
    return number(height, int, 0), number(width, int, 0)


def _borders(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    each = tuple(number(word, int, -1) for word in parts_of(text))
    if len(each) not in (1, 4):
        raise ValueError(f"--extend is {text!r}; expected one number, or TOP,RIGHT,BOTTOM,LEFT")
    return each * 4 if len(each) == 1 else each
