"""Comparison of machines with trained networks."""

from __future__ import annotations

from scoremachine.lab.comparison.agreement import Summary, agreement
from scoremachine.lab.comparison.bias import Bias, shared_bias
from scoremachine.lab.comparison.cells import Cell, Row, StudyOptions, study
from scoremachine.lab.comparison.parts import (
    Comparison,
    ComparisonOptions,
    MachineSpec,
    Part,
    compare,
)
from scoremachine.lab.comparison.quality import Quality, qualities

__all__ = [
    "Bias",
    "Cell",
    "Comparison",
    "ComparisonOptions",
    "MachineSpec",
    "Part",
    "Quality",
    "Row",
    "StudyOptions",
    "Summary",
    "agreement",
    "compare",
    "qualities",
    "shared_bias",
    "study",
]
