"""What the README shows is what happens."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from scoremachine.core.schedules import PatchSchedule
from scoremachine.machines import MACHINES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_ten_lines_of_python_print_what_it_says(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    said = re.search(r"It prints `(torch\.Size\(.*?\)) (-?[\d.]+)`", README)
    exec(code.group(1), {})
    shape, number = capsys.readouterr().out.strip().rsplit(" ", 1)
    assert shape == said.group(1)
    # other processors round differently, and generation follows small differences
    assert float(number) == pytest.approx(float(said.group(2)), rel=0.05)


def test_the_code_of_the_guidance_page_runs(capsys):
    page = (ROOT / "docs" / "guidance.md").read_text()
    names: dict = {}
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1)
    exec(code.replace("steps=60", "steps=4, silent=True"), names)
    assert names["restored"].shape == (1, 1, 8, 8)


def test_every_machine_is_in_the_tables():
    design = (ROOT / "docs" / "design.md").read_text()
    for name, kind in MACHINES.items():
        assert f"| `{name}` | `{kind.__name__}` |" in README
        assert f"| `{name}` |" in design


def test_schedules_and_files_it_names_exist():
    for name in re.findall(r'"((?:pspc|kamb)-[a-z0-9-]+)"', README):
        assert name in PatchSchedule.names()
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for path in re.findall(r"\]\(((?!http)[^)#]+)\)", page.read_text()):
            assert (page.parent / path).exists(), path
    for picture in (ROOT / "docs" / "pictures").iterdir():
        assert picture.stat().st_size < 300_000


@pytest.mark.parametrize(
    "script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name
)
def test_benchmarks_find_what_they_import(script, monkeypatch):
    monkeypatch.syspath_prepend(str(script.parent))
    runpy.run_path(str(script), run_name="imported")
