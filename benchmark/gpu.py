"""What only a GPU can show: that it computes the same, how fast everything is, how soon it is good.

    python benchmark/gpu.py                # at most eight minutes on one GPU
    python benchmark/gpu.py --dry-run      # the same paths on the CPU at tiny sizes; writes nothing

Every row of the table is measured on its own and printed at once; one that fails says so, and the
others go on. Needs `pip install -e ".[test]"` and a C++ compiler.
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import Parser, made_by, run, table
from quality.time_to_quality import HOLDOUT, OURS, milestones, reached
from speed import candidates, environment, refinement, reward_model, scaling, throughput
from speed.trainers.protocol import read_iterations, train
from torch.autograd import DeviceType
from torch.profiler import profile

from hydrogel_gym import HydrogelVectorEnv, load_cohort, runs
from hydrogel_gym.errors import UsageError, first_line
from hydrogel_gym.files import write_atomically
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.runs import compiled
from hydrogel_gym.runs.command_line import run_script
from hydrogel_gym.train.ppo_hybrid import PRESETS, Args, make_learner, rollout, update

WHOLE_RUN_SECONDS = 180  # a longer run is only extrapolated
# Of an iteration: compiled, as CUDA graphs, `--precision`, and float32 products (high is TF32).
VARIANTS = {
    "plain, float32": (False, False, "fp32", "highest"),
    "plain, TF32": (False, False, "fp32", "high"),
    "compiled, TF32": (True, False, "fp32", "high"),
    "compiled, CUDA graphs, float32": (True, True, "fp32", "highest"),
    "compiled, CUDA graphs, TF32": (True, True, "fp32", "high"),
    "compiled, CUDA graphs, bf16": (True, True, "bf16", "high"),
}


@dataclasses.dataclass
class Plan:
    """Where to measure, in what folder, and at which sizes; as set here on a GPU."""

    folder: Path
    device: str = "cuda"
    flags: str = " --device cuda"  # of the trainer
    tests: str = "-n 4 tests"
    num_envs: tuple[int, ...] = (2_000, 2**14, 2**17, 2**20)
    patients: tuple[str, ...] = ()  # to refine for; all by default
    copies: tuple[int, int] = (refinement.COPIES, refinement.ITERATIONS)
    num_candidates: int = 13_000_000
    rounds: int = 3
    compile: str = "on"
    seconds: tuple[int, int] = (480, 120)  # at most, in all and for a row that might hang

    @functools.cached_property
    def policy(self) -> tuple[Path, float]:
        """The run directory of the quick preset, and when it was launched."""
        command = f"{OURS}quick{self.flags}"
        output, launched = self.folder / "quick", time.time()
        run(shlex.split(command.format(python="{python}", output=output, seed=1)))
        return output, launched


def cuda_tests(plan: Plan) -> str:
    """The tests that need CUDA, in a process of their own."""
    command = ["{python}", "-m", "pytest", "-q", "-m", "", "-k", "cuda"]
    return run([*command, *plan.tests.split()]).output.strip().splitlines()[-1].strip("= ")


def iteration(plan: Plan, compile: bool, graphs: bool, precision: str, products: str) -> str:
    """An iteration of the source preset, and one of a tenth of its steps profiled."""
    torch.set_float32_matmul_precision(products)
    on_cuda, device = plan.device == "cuda", torch.device(plan.device)
    flags = f"--preset source --precision {precision}{plan.flags}"
    args = runs.read_run_options(Args, PRESETS, flags.split(), prog="gpu.py")
    tenth = dataclasses.replace(args, num_steps=max(1, args.num_steps // 10))

    def iterate(args: Args) -> float:
        began = time.perf_counter()
        _, batch, _ = roll_out[args.num_steps](obs)
        losses = update(step, batch, args, learner.generator)
        float(losses["value_loss"])  # waits for the device
        return time.perf_counter() - began

    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    before = on_cuda and torch.cuda.memory_allocated()
    began = time.perf_counter()
    has_graphs = compiled.has_graphs if graphs else lambda _: False
    with mock.patch.object(compiled, "has_graphs", has_graphs):
        learner, act, step = make_learner(args, load_cohort(), device, runs.ALONE, compile)
    obs, _ = learner.envs.reset(seed=args.seed)
    roll_out = {
        each.num_steps: runs.recorded_rollout(rollout, step, learner, args=each, act=act)
        for each in (tenth, args)
    }
    for each in (tenth, tenth, args, args):  # records the graphs
        iterate(each)
    first = time.perf_counter() - began
    whole = statistics.median(iterate(args) for _ in range(plan.rounds))
    short = statistics.median(iterate(tenth) for _ in range(plan.rounds))
    peak = on_cuda and torch.cuda.max_memory_allocated()
    with profile() as seen:
        iterate(tenth)
    events, where = seen.events(), getattr(DeviceType, plan.device.upper())
    # Ranges that an optimiser names lie over their kernels.
    kernels = [x for x in events if x.device_type == where and not x.is_user_annotation]
    launches = sum("Launch" in x.name for x in events if x.device_type == DeviceType.CPU)
    idle = 1.0 - sum(x.time_range.elapsed_us() for x in kernels) / 1e6 / short
    return (
        f"{1e3 * whole:.0f} ms, peak {(peak - before) / 1e6:,.0f} MB, {first:.0f} s to compile; "
        f"of {tenth.num_steps} steps {1e3 * short:.1f} ms, {100 * idle:.0f} % of it "
        f"between kernels, {len(kernels):,} kernels by {launches:,} launches"
    )


def environments(plan: Plan, size: int) -> str:
    """Steps per second of so many environments."""
    calls = {}
    for each in ("torch", "torch, compiled"):
        envs = HydrogelVectorEnv(size, device=plan.device, **environment.VARIANTS[each])
        calls[each] = environment.stepper(envs)
    times = environment.milliseconds(calls, plan.rounds).values()
    plain, fast = (size / statistics.median(each) / 1e3 for each in times)
    return f"{plain:,.2f} M steps/s; compiled {fast:,.2f} M"


def time_to_quality(plan: Plan) -> str:
    """The quick preset, from the start of its process."""
    rows, (goals, best) = read_iterations(*plan.policy), milestones()
    last = f"{rows['seconds'].iloc[-1]:.1f} s to {100 * rows[HOLDOUT].iloc[-1] / best:.2f} %"
    return "; ".join([*(f"{reached(rows, x):.1f} s to {x.label}" for x in goals), last])


def designs(plan: Plan) -> str:
    """Candidates of one patient."""
    flags = ["--policy", plan.policy[0], "--patient", candidates.PATIENT, "--top-only"]
    flags += ["--device", plan.device, "--num-candidates"]
    numbers = (1, plan.num_candidates)  # the first compiles
    ended = [candidates.process([*flags, x], plan.folder, plan.compile) for x in numbers][-1]
    return f"{plan.num_candidates / ended.seconds / 1e6:,.1f} M designs/s"


def refined(plan: Plan) -> str:
    """A policy of each patient's own."""
    output, cohort, (copies, steps) = plan.folder / "refined", load_cohort(), plan.copies
    ids = plan.patients or cohort.patient_ids
    command = ["{python}", "train/refine_patients.py", "--policy", plan.policy[0], "--device"]
    command += [plan.device, "--output-dir", output, "--num-copies", copies, "--num-iterations"]
    took = run([*command, steps, "--patient", *ids]).seconds
    share = sum(refinement.best_found(output, ids)) / best_designs(cohort).score[: len(ids)].sum()
    what = f"{len(ids):,} patients, {copies} copies, {steps} iterations"
    return f"{what}: {took:.0f} s, {100 * share:.3f} % of the oracle"


def ensemble(plan: Plan) -> str:
    """A fitted reward model beside the built-in one."""
    outcomes, fitted, size = plan.folder / "outcomes.parquet", plan.folder / "fit", plan.num_envs[0]
    run(["{python}", "patients/make_outcomes.py", "--rows", 20_000, "--output", outcomes])
    command = ["{python}", "train/fit_stage1.py", outcomes, "--output-dir", fitted]
    run([*command, "--num-epochs", 1, "--device", plan.device])
    rows = reward_model.measure(fitted / "stage1.pt", size, plan.rounds, plan.device)
    return f"{size:,} designs: " + "; ".join(f"{name} {ms} ms" for name, ms, *_ in rows)


def two_ranks(plan: Plan) -> str:
    """Two ranks beside one process."""
    if plan.device == "cuda" and torch.cuda.device_count() < 2:
        return "not measured: there is one GPU"
    flags = ["--precision", "fp64", *plan.flags.split()]
    weights = (scaling.trained_weights(ranks, 1, *flags) for ranks in (1, 2))
    difference = scaling.relative_difference(*weights)
    return f"{difference:.1e} (1e-9 allowed) between the weights after five iterations"


def source_preset(plan: Plan) -> str:
    """The whole source preset."""
    command = f"{throughput.OURS} --precision bf16 --compile {plan.compile}{plan.flags}"
    start = functools.partial(train, command, torch.get_num_threads(), steps=100, seed=1)
    seconds = start(iterations=10)["seconds"]
    expected = seconds.iloc[0] + 199 * seconds.diff().median()
    said = f"200 iterations, from 10: {expected:.0f} s"
    if expected > min(WHOLE_RUN_SECONDS, 0.8 * signal.getitimer(signal.ITIMER_REAL)[0]):
        return said
    rows = start(iterations=200)
    share = 100 * rows[HOLDOUT].iloc[-1] / milestones()[1]
    return f"{said}; run: {rows['seconds'].iloc[-1]:.0f} s, {share:.2f} % of the oracle, held out"


def measure(plan: Plan, variants: dict[str, Any], output_dir: Path | None) -> int:
    """Every row in turn, written down as it ends; returns 1 if one failed."""
    rows: dict[str, Callable[..., str]] = {"tests on CUDA": functools.partial(cuda_tests, plan)}
    for name, how in variants.items():
        rows[f"iteration of the source preset, {name}"] = functools.partial(iteration, plan, *how)
    for size in plan.num_envs:
        rows[f"{size:,} environments"] = functools.partial(environments, plan, size)
    for function in (time_to_quality, designs, refined, ensemble, two_ranks, source_preset):
        rows[function.__doc__.rstrip(".")] = functools.partial(function, plan)

    def end(*_: Any) -> None:
        raise TimeoutError("took too long")

    results, (in_all, for_one), began = [], plan.seconds, time.perf_counter()
    signal.signal(signal.SIGALRM, end)
    for name, row in rows.items():
        left = in_all - (start := time.perf_counter()) + began
        signal.alarm(max(1, int(left if row.func is source_preset else min(left, for_one))))
        try:
            said = row()
        except Exception as error:
            said = f"**failed**: {type(error).__name__}: {first_line(error)}"
        signal.alarm(0)
        results.append([name, f"{time.perf_counter() - start:.0f} s", said])
        print(*results[-1], sep="; ", flush=True)
        if output_dir:
            page = [made_by(), "", *table(["", "took", "what was measured"], results), ""]
            write_atomically(output_dir / "gpu.md", "\n".join(page).encode())
    return int(any("**failed**" in said for *_, said in results))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at tiny sizes")
    args = parser.parse_args(argv)
    if not (args.dry_run or torch.cuda.is_available()):
        raise UsageError("there is no CUDA device here; --dry-run needs none")
    with tempfile.TemporaryDirectory() as name:
        if not args.dry_run:
            return measure(Plan(Path(name)), VARIANTS, args.output_dir)
        flags = " --device cpu --num-envs 40 --num-steps 2 --num-iterations 2 --minibatch-size 40"
        small = dict(flags=f"{flags} --num-epochs 1 --hidden-dim 16", compile="off", num_envs=(8,))
        small |= dict(tests="tests/test_host_reads.py", patients=("P0001",), copies=(8, 2))
        small |= dict(num_candidates=9, rounds=1, seconds=(7200, 1800))
        ways = {name: how for name, how in VARIANTS.items() if how[2:] == ("fp32", "high")}
        with mock.patch("torch.compile", lambda function, **_: function):
            return measure(Plan(Path(name), "cpu", **small), ways, None)


if __name__ == "__main__":
    sys.exit(run_script(main))
