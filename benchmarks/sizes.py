"""`scaling.py` at 1, 2, 4 and 8 trainers with as many actors as planned. Not in the suite, which has half an hour."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import measuring
from measuring import Outcome
from scaling import Point, measure_points

POINTS = [
    Point("1 x 3", 1, (1, 1, 1), scale=4, steps=45),
    Point("2 x 4", 2, (1, 1, 2), scale=6, steps=32),
    Point("4 x 5", 4, (1, 1, 3), scale=8, steps=30),
    Point("8 x 8", 8, (2, 2, 4), scale=16, steps=24),
]


def measure(quick: bool) -> Outcome:
    """Every size."""
    return measure_points("sizes", POINTS[:1] if quick else POINTS)


if __name__ == "__main__":
    measuring.main(__doc__, __file__, measure)
