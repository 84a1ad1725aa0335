"""How well a policy says which of its designs are far from the best, and what tells.

    python benchmark/quality/uncertainty.py --seeds 1 2 3               # six minutes on one core

Trains the quick preset once per seed and the full one once, on one thread each. What is predicted
for the held-out cohort and for one that `patients/generate.py` draws anew is compared with the
oracle; the calibration is that of the policy's file, from its training patients.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import ORACLE_CACHE, Parser, made_by, run, spread, table, write

from hydrogel_gym import compute_reward, load_cohort
from hydrogel_gym.patients.generate import Split, cohort_csv, draw_cohort
from hydrogel_gym.runs.command_line import run_script
from hydrogel_gym.runs.evaluation import EvaluationSet, evaluation_sets
from hydrogel_gym.runs.options import ProblemOptions
from hydrogel_gym.runs.policies import load_policy
from hydrogel_gym.runs.uncertainty import (
    Calibration,
    predict,
    rank_correlation,
    share_of_regret,
    try_designs,
)
from hydrogel_gym.train.ppo_hybrid import Agent

FRESH = Split("fresh-11.csv", "F", 500, 11)
SEARCHES: dict[str, dict[str, int]] = {
    "as shipped": {},
    "without samples": dict(num_samples=0),
    "without steps": dict(num_frames=0),
    "steps from one polymer alone": dict(num_starts=1),
    "steps in one frame": dict(num_frames=1),
    "32 samples, steps in six frames": dict(num_samples=32, num_frames=6),
}
HEADER = (
    *("policy", "patients", "regret", "predicted", "rank correlation", "below the bound"),
    *("regret in the tenth flagged", "largest possible", "in the fifth", "largest possible"),
)


def trained(preset: str, seed: int) -> tuple[Agent, Calibration]:
    """A policy, and its calibration."""
    with tempfile.TemporaryDirectory() as folder:
        # The oracle's results lie beside a run; every run shares one folder of them.
        Path(folder, "oracle").symlink_to(ORACLE_CACHE)
        flags = f"--compile off --preset {preset} --seed {seed} --output-dir {folder}/run"
        run(["{python}", "train/ppo_hybrid.py", *flags.split()], threads=1)
        agent, saved = load_policy(Path(folder, "run", "stage2_policy.pt"), Agent, "cpu")
    return agent, Calibration(**saved["regret_calibration"])


@torch.no_grad()
def signals(agent: Agent, evaluated: EvaluationSet) -> dict[str, tuple[np.ndarray, int]]:
    """What might tell of the regret: (P,) values, and reward calls per patient."""
    problem: Any = evaluated.envs.unwrapped.problem
    obs, _ = evaluated.envs.reset()

    def reward(design: dict[str, Tensor]) -> Tensor:
        return compute_reward(problem.reward_model(problem.params.patients, *design.values()))

    own, entropy = agent.design(obs)
    generator = torch.Generator().manual_seed(0)
    samples = torch.stack([reward(agent.design(obs, generator)[0]) for _ in range(32)])
    found = {
        "entropy of the policy": (entropy.numpy(), 0),
        "value less reward": ((agent.value(obs) - reward(own)).numpy(), 1),
        "gain of the best of 32 samples": ((samples.amax(0) - reward(own)).numpy(), 33),
    }
    for name, sizes in SEARCHES.items():
        starts, frames = sizes.get("num_starts", 3), sizes.get("num_frames", 3)
        calls = 25 + sizes.get("num_samples", 8) + 8 * starts * frames
        found[name] = (try_designs(agent.design, evaluated, **sizes).gain, calls)
    return found


def main(argv: list[str] | None = None) -> None:
    """Train, predict, compare."""
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of quick runs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, FRESH.file)
        path.write_bytes(cohort_csv(draw_cohort(FRESH).patients))
        cohorts = {"held out": load_cohort("holdout"), "fresh": load_cohort(path)}
    sets = evaluation_sets(ProblemOptions(), cohorts, torch.device("cpu"), cache_dir=ORACLE_CACHE)
    rows, tenths, told = [], [], {}
    for preset, seed in [*(("quick", seed) for seed in args.seeds), ("full", args.seeds[0])]:
        agent, calibration = trained(preset, seed)
        for name, each in sets.items():
            tried = try_designs(agent.design, each)
            (expected, bound), regret = predict(calibration, tried.gain), tried.regret
            cells = [f"{preset}, seed {seed}", name]
            cells += [f"{regret.mean():.3f}", f"{expected.mean():.3f}"]
            cells += [f"{rank_correlation(expected, regret):.2f}"]
            cells += [f"{100 * (regret <= bound).mean():.1f} %"]
            for flagged in (0.1, 0.2):
                shares = (share_of_regret(x, regret, flagged) for x in (expected, regret))
                cells += [f"{100 * share:.0f} %" for share in shares]
            rows.append(cells)
            if preset == "quick":
                groups = np.array_split(np.argsort(expected), 10)
                tenths.append([[x[g].mean() for g in groups] for x in (expected, regret)])
                for signal, (values, calls) in signals(agent, each).items():
                    found = rank_correlation(values, regret), share_of_regret(values, regret, 0.1)
                    told.setdefault((signal, calls), []).append(found)
    lines = ["## How good it is", "", *table(HEADER, rows), "", "## By tenth", ""]
    header = ["quick policies, unseen patients", *(f"{i}" for i in range(1, 11))]
    named = zip(("predicted regret", "true regret"), np.mean(tenths, 0), strict=True)
    lines += table(header, [[name, *(f"{x:.3f}" for x in values)] for name, values in named])
    lines += ["", "## What tells", ""]
    header = ["signal", "reward calls", "rank correlation", "regret in the tenth flagged, %"]
    shown = []
    for signal, found in told.items():
        correlation, share = zip(*found, strict=True)
        shown.append([*signal, spread(correlation), spread((100 * x for x in share), ".0f")])
    lines += [*table(header, shown), ""]
    lines += ["Quick policies on both cohorts: median [range]. Calls are per patient."]
    write(args.output_dir, "uncertainty", lines, made=made_by(1))


if __name__ == "__main__":
    sys.exit(run_script(main))
