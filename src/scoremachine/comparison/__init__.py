"""Machines against trained networks."""

from __future__ import annotations

from scoremachine.comparison.agreement import Summary, agreement
from scoremachine.comparison.bias import Bias, shared_bias
from scoremachine.comparison.cells import Cell, Row, study
from scoremachine.comparison.parts import Comparison, Entrant, Part, compare
from scoremachine.comparison.quality import Quality, qualities

__all__ = [
    "Bias",
    "Cell",
    "Comparison",
    "Entrant",
    "Part",
    "Quality",
    "Row",
    "Summary",
    "agreement",
    "compare",
    "qualities",
    "shared_bias",
    "study",
]
