"""Machines against trained networks."""

from __future__ import annotations

from scoremachine.comparison.agreement import MEASURES, Summary, agreement
from scoremachine.comparison.bias import Bias, shared_bias
from scoremachine.comparison.parts import Comparison, Entrant, Part, compare

__all__ = [
    "MEASURES",
    "Bias",
    "Comparison",
    "Entrant",
    "Part",
    "Summary",
    "agreement",
    "compare",
    "shared_bias",
]
