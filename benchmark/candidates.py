"""How fast candidates are drawn, evaluated, ranked and written, and in how much memory.

    python benchmark/candidates.py                       # a quarter of an hour on two cores
    python benchmark/candidates.py --policy runs/full-s1

Each figure is of a process of its own, one at a time, with the compiled graph in the cache: seconds
from the first candidate of a patient to its last file, and the peak memory of the whole process.
Beside it: the compiled arithmetic alone, in as many threads, which no bookkeeping can beat; the
source's sketch (section 5.2), a Python dict per design, on 200,000 of them with the same policy and
model; and a tenth of the whole cohort's 26 billion candidates. Writes `results/candidates.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from trainers.launch import ROOT, machine, resources

from hydrogel_gym.designs.sampling import BLOCK
from hydrogel_gym.files import write_atomically
from hydrogel_gym.problem.fields import COVERAGES, FORMULATION_FIELDS
from hydrogel_gym.problem.polymers import load_polymers
from hydrogel_gym.problem.reward import compute_reward
from hydrogel_gym.runs.designing import begin
from hydrogel_gym.train import generate_candidates as generator
from hydrogel_gym.train.ppo_hybrid import Agent

RESULTS = Path(__file__).parent / "results"
WHOLE = 13_000_000
SKETCHED = 200_000
PATIENT = "P0007"
MIN_TOP_ONLY, MIN_WRITTEN, MAX_MB, MIN_SPEED_UP = 8e6, 3e6, 700, 100


class Measured(NamedTuple):
    """Of one process."""

    seconds: float  # drawing, evaluating, ranking and writing
    megabytes: float  # peak memory of the process
    bytes_written: int


def measure(flags: list[str], path: Path) -> None:
    """Generate in this process, and write down what it took."""
    timed, seconds, written = generator.generate, 0.0, 0

    def timed_generate(stream: Any, store: Any, *rest: Any, **settings: Any) -> None:
        nonlocal seconds, written
        start = time.perf_counter()
        timed(stream, store, *rest, **settings)
        seconds += time.perf_counter() - start
        written = store.bytes_written

    generator.generate = timed_generate
    if code := generator.main(flags):
        raise SystemExit(code)
    path.write_text(json.dumps([seconds, written]))


def process(flags: list[str], folder: Path) -> Measured:
    """Generate in a process of its own."""
    path = folder / "measured.json"
    with tempfile.TemporaryDirectory(dir=folder) as output:
        command = [sys.executable, __file__, "--measure", str(path), "--", *flags]
        _, megabytes = resources([*command, "--compile", "on", "--output-dir", f"{output}/designs"])
    seconds, written = json.loads(path.read_text())
    return Measured(seconds, megabytes, written)


def arithmetic(policy: Path, threads: int, rounds: int) -> list[float]:
    """Designs per second of the compiled graph alone, on numbers drawn once."""
    args = generator.Args(policy=policy, patient=(PATIENT,), compile="on")
    start = begin(args, Agent, torch.device("cpu"))
    (row,), problem = start.rows, start.problem
    torch.set_num_threads(1)
    patient = problem.params.patients[row]
    sampler = generator.policy_sampler(start.agent, start.obs[row], patient, args)
    call = generator.evaluator(problem, sampler, args, WHOLE)
    numbers = torch.rand(BLOCK), torch.randn(BLOCK, len(FORMULATION_FIELDS))
    blocks = 40

    def work(_: int) -> None:
        with torch.no_grad():
            for _ in range(blocks):
                call(sampler, *numbers)

    rates = []
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in range(rounds):
            began = time.perf_counter()
            list(pool.map(work, range(threads)))
            rates.append(threads * blocks * BLOCK / (time.perf_counter() - began))
    torch.set_num_threads(threads)
    return rates


def sketch(policy: Path, threads: int) -> tuple[float, float]:
    """Designs per second of the source's sketch, and bytes of a design in its list."""
    import tracemalloc

    args = generator.Args(policy=policy, patient=(PATIENT,))
    start = begin(args, Agent, torch.device("cpu"))
    (row,), agent, obs, problem = start.rows, start.agent, start.obs, start.problem
    torch.set_num_threads(threads)
    batch_size = 10_000
    names = load_polymers().names
    random = torch.Generator().manual_seed(0)

    def batches(count: int) -> list[dict[str, Any]]:
        every = []
        for _ in range(0, count, batch_size):
            state = obs[row].expand(batch_size, -1)
            with torch.no_grad():
                action, _ = agent.design(state, random)
                patient = problem.params.patients[row].expand(batch_size, -1)
                design = [action[name] for name in ("polymer_id", "formulation", "coverage")]
                outcomes = problem.reward_model(patient, *design)
                reward = compute_reward(outcomes)
            for i in range(batch_size):
                every.append(
                    {
                        "patient_id": PATIENT,
                        "polymer_id": action["polymer_id"][i].item(),
                        "polymer_name": names[action["polymer_id"][i].item()],
                        "stiffness_kPa": action["formulation"][i, 0].item(),
                        "degradation_days": action["formulation"][i, 1].item(),
                        "conductivity_S_m": action["formulation"][i, 2].item(),
                        "thickness_mm": action["formulation"][i, 3].item(),
                        "coverage": COVERAGES[action["coverage"][i].item()],
                        "predicted_delta_EF": outcomes.delta_ef_pct[i].item(),
                        "predicted_stress_reduction": outcomes.stress_reduction_pct[i].item(),
                        "optimal_probability": outcomes.optimal_logit[i].sigmoid().item(),
                        "reward": reward[i].item(),
                    }
                )
        return every

    began = time.perf_counter()
    pd.DataFrame(batches(SKETCHED))
    rate = SKETCHED / (time.perf_counter() - began)
    tracemalloc.start()
    kept = batches(batch_size)
    size = tracemalloc.get_traced_memory()[0] / len(kept)
    tracemalloc.stop()
    return rate, size


def median(values: list[float], show: Callable[[float], str]) -> str:
    """Median and range."""
    return f"{show(statistics.median(values))} [{show(min(values))}, {show(max(values))}]"


def verdict(is_met: bool) -> str:
    """For a cell of the table."""
    return "met" if is_met else "missed"


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", type=Path, default=ROOT / "runs" / "quick-s1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-cohort", action="store_true", help="leave the tenth of it out")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.flags, args.measure)

    threads = torch.get_num_threads()
    policy = ["--policy", str(args.policy)]
    one = [*policy, "--patient", PATIENT]
    rows = []
    with tempfile.TemporaryDirectory(dir=ROOT / "benchmark") as name:
        folder = Path(name)
        process([*one, "--num-candidates", "1", "--top-only"], folder)  # compile
        limit = arithmetic(args.policy, threads, args.rounds)
        ceiling = statistics.median(limit)
        rows.append(f"| compiled arithmetic alone | {median(limit, mega)} M/s | | | – |")
        for label, flags, least in (
            ("top 100 only", ["--top-only"], MIN_TOP_ONLY),
            ("and all to Parquet", [], MIN_WRITTEN),
        ):
            for count, rounds in ((WHOLE, args.rounds), (10 * WHOLE, 1)):
                runs = [
                    process([*one, "--num-candidates", str(count), *flags], folder)
                    for _ in range(rounds)
                ]
                rates = [count / run.seconds for run in runs]
                rate, peak = statistics.median(rates), max(run.megabytes for run in runs)
                written = f"{runs[0].bytes_written / count:.1f}" if not flags else ""
                rows.append(
                    f"| {count / 1e6:.0f} M, {label} | {median(rates, mega)} M/s, "
                    f"{100 * rate / ceiling:.0f} % of the arithmetic | {written} | {peak:,.0f} MB "
                    f"| {least / 1e6:g} M/s {verdict(rate >= least)}; {MAX_MB} MB "
                    f"{verdict(peak <= MAX_MB)} |"
                )
                if count == WHOLE and flags:
                    top_only = rate
                print(rows[-1], flush=True)
        slow, size = sketch(args.policy, threads)
        times = top_only / slow
        total_gb = size * WHOLE / 1e9
        rows.append(
            f"| the source's sketch, {SKETCHED:,} | {slow / 1e6:.3f} M/s | "
            f"| {total_gb:.0f} GB of dicts for 13 M, {size:,.0f} bytes each | {times:,.0f} times "
            f"slower than the top 100 only; {MIN_SPEED_UP}, {verdict(times >= MIN_SPEED_UP)} |"
        )
        if not args.skip_cohort:
            count = WHOLE // 10
            run = process([*policy, "--num-candidates", str(count), "--top-only"], folder)
            total = 2000 * count
            rows.append(
                f"| a tenth of the cohort, 2,000 patients x {count / 1e6:g} M, top 100 only | "
                f"{total / run.seconds / 1e6:.1f} M/s | | {run.megabytes:,.0f} MB | "
                f"{run.seconds / 60:.1f} min; the whole, projected: "
                f"{2000 * WHOLE / top_only / 60:.0f} min |"
            )
    lines = [
        f"Candidates of one patient; median and range of {args.rounds} processes, one at a time; "
        "made by `benchmark/candidates.py`.",
        "",
        machine(threads),
        "",
        "| | designs per second | bytes a design | peak memory | bar |",
        "|---|---|---|---|---|",
        *rows,
    ]
    write_atomically(RESULTS / "candidates.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


def mega(rate: float) -> str:
    """In millions."""
    return f"{rate / 1e6:.1f}"


if __name__ == "__main__":
    main()
