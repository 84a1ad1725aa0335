"""Scripts of `benchmark/` are imported as they import each other: from that folder."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmark"))
