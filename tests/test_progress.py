"""One bar at a time, and none when it should be quiet."""

from __future__ import annotations

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
