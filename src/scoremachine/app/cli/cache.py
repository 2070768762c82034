"""Commands for the cache on disk."""

from __future__ import annotations

import time
from typing import Annotated

import typer

app = typer.Typer(
    help="The cache on disk, which is kept between runs: list it, prune it, find it.",
    no_args_is_help=True,
)


@app.command()
def path() -> None:
    """Print the folder of the cache."""
    from scoremachine.data.store import cache_root

    print(cache_root())


@app.command("list")
def list_() -> None:
    """List the entries: their kind, images, size, and last use."""
    from rich.console import Console
    from rich.table import Table

    from scoremachine.data import store

    every = store.listed()
    table = Table("what", "of", "key", box=None)
    table.add_column("size", justify="right")
    table.add_column("last used", justify="right")
    for each in sorted(every, key=lambda each: -each.used):
        used = "in use" if each.in_use else f"{_ago(time.time() - each.used)} ago"
        what = store.KINDS[each.entry.kind]
        table.add_row(what, each.of, each.entry.folder.name[:8], size_of(each.size), used)
    if every:
        Console().print(table)
    total = sum(each.size for each in every)
    print(
        f"{_entries(len(every))}, {size_of(total)} of at most {size_of(store.limit())} "
        f"(SCOREMACHINE_CACHE_LIMIT), in {store.cache_root()}"
    )


@app.command()
def prune(
    to: Annotated[
        str | None,
        typer.Option(help="Leave at most this much, as 10GB; default: the limit of the cache."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Remove everything that is not in use.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove the least recently used entries; entries in use by a running command stay."""
    from scoremachine.data import store
    from scoremachine.runtime.parsing import bytes_of

    if to is not None and everything:
        raise ValueError("--to and --all are both given; expected one of them")
    left = 0 if everything else store.limit() if to is None else bytes_of(to, "--to")
    going = store.prunable(left)
    if not going:
        print("nothing to remove")
        return
    for each in going:
        print(f"{store.KINDS[each.entry.kind]} of {each.of}: {size_of(each.size)}")
    total = size_of(sum(each.size for each in going))
    if not yes and not typer.confirm(f"remove {_entries(len(going))}, {total}?"):
        print("nothing is removed")
        return
    gone = [each for each in going if each.entry.remove()]
    print(f"removed {_entries(len(gone))}, {size_of(sum(each.size for each in gone))}")
    if len(gone) < len(going):
        print(f"{len(going) - len(gone)} are in use by now, or cannot be removed")


def size_of(count: int) -> str:
    """A number of bytes in a readable unit."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"


def _ago(seconds: float) -> str:
    for unit, size in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= size:
            count = int(seconds / size)
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return "moments"


def _entries(n: int) -> str:
    return f"{n:,} {'entry' if n == 1 else 'entries'}"
