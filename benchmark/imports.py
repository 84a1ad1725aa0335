"""How long `import hydrogel_gym` takes beyond what it cannot do without.

    python benchmark/imports.py

Whole processes, in turn: one that imports torch and gymnasium and then the package, and prints the
seconds of each part. Writes `results/imports.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from trainers.launch import machine

from hydrogel_gym.files import write_atomically

RESULTS = Path(__file__).parent / "results"
MAX_SECONDS = 0.4
PARTS = ("torch", "gymnasium", "hydrogel_gym")
PROGRAM = f"""
import importlib, json, time
seconds = {{}}
for name in {PARTS!r}:
    start = time.perf_counter()
    importlib.import_module(name)
    seconds[name] = time.perf_counter() - start
print(json.dumps(seconds))
"""


def measure() -> dict[str, float]:
    """Seconds of each import in a fresh process, each after those before it."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True)
    return json.loads(done.stdout)


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    measure()  # files come off the disk once
    rounds = [measure() for _ in range(args.rounds)]
    lines = [
        f"Seconds of each import in a fresh process, after those above it: median of {args.rounds} "
        "processes, and range; made by `benchmark/imports.py`.",
        "",
        machine(2),
        "",
        "| import | seconds | bar |",
        "|---|---|---|",
    ]
    for name in PARTS:
        values = [each[name] for each in rounds]
        median = statistics.median(values)
        is_ours = name == "hydrogel_gym"
        verdict = f"{MAX_SECONDS:g} s, {'met' if median <= MAX_SECONDS else 'missed'}"
        cells = f"{median:.2f} [{min(values):.2f}, {max(values):.2f}]"
        lines.append(f"| {name} | {cells} | {verdict if is_ours else '–'} |")
    write_atomically(RESULTS / "imports.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
