"""One bar at a time, and none when it should be quiet."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest

import scoremachine as sm
from scoremachine.runtime import progress


@pytest.fixture
def at_once(monkeypatch):
    """Bars appear without delay, and are counted instead of drawn."""
    shown = []

    def appear(self):
        self.rich, self.task = self, 0
        shown.append(self.description)

    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress.Bar, "_appear", appear)
    monkeypatch.setattr(progress.Bar, "update", lambda *_, **__: None, raising=False)
    monkeypatch.setattr(progress.Bar, "stop", lambda _: None, raising=False)
    return shown


def test_the_outermost_bar_alone_is_shown(at_once):
    with progress.bar("outer", 2) as outer:
        outer.advance()
        with progress.bar("inner", 2) as inner:
            inner.advance()
        assert inner.done == 1
    with progress.bar("next", 1) as after:
        after.advance()
    assert at_once == ["outer", "next"]


def test_quiet_hides_bars_and_sentences(at_once, capsys):
    with progress.quiet(), progress.bar("hidden", 1) as bar:
        bar.advance()
        progress.say("hidden")
    progress.say("said")
    assert at_once == []
    assert capsys.readouterr().err == "said\n"


def test_short_work_shows_nothing(capsys):
    with progress.bar("short", 1) as bar:
        bar.advance()
    assert capsys.readouterr().err == ""


def test_generation_says_what_auto_does_before_its_bar(at_once, capsys):
    u = np.random.default_rng(1).integers(0, 256, (40, 1, 6, 6), dtype=np.uint8)
    sm.generate(sm.build("ls", sm.Corpus(u)), count=1, steps=2)
    assert capsys.readouterr().err.startswith("'auto': choosing patch sizes")
    assert at_once == ["Calibrating ls", "Generating"]


class Log(io.StringIO):
    """Standard error that goes to a file."""

    def isatty(self):
        return False


def test_a_log_gets_a_line_now_and_then_and_no_bar(monkeypatch):
    log, now = Log(), [0.0]
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.bar("Working", 100) as bar:
        for _ in range(100):
            now[0] += 2.0
            bar.advance()
    assert log.getvalue().splitlines() == [
        "Working: 30 of 100", "Working: 60 of 100", "Working: 90 of 100"
    ]  # fmt: skip


def test_short_work_leaves_no_blank_line_in_a_log(monkeypatch):
    log, now = Log(), [0.0]
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for _ in range(30):
        with progress.bar("Working", 2) as bar:
            now[0] += 5.0
            bar.advance()
    assert log.getvalue() == ""


def test_what_has_been_said_is_not_said_again(capsys):
    for _ in range(30):
        progress.say("els takes 1,000 of 50,000")
        progress.say("no room in a/1", "a")
        progress.say("no room in a/2", "a")
    with progress.quiet():
        progress.say("later")
    progress.say("later")
    said = capsys.readouterr().err.splitlines()
    assert said == ["els takes 1,000 of 50,000", "no room in a/1", "later"]
