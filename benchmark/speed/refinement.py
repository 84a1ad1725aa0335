"""How long refining every patient takes, in how much memory, and how near the oracle it ends.

    python benchmark/speed/refinement.py                       # a quarter of an hour on two cores
    python benchmark/speed/refinement.py --policy runs/full-s1 --num-patients 200

One process refines the cohort at the source's sizes (500 copies, 50 iterations). What it finds is
laid beside the best possible, and so is the best of as many designs drawn from the policy for all,
without any tuning.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
from common import POLICY, Parser, count, designs_of, made_by, run, table, verdict, write

from hydrogel_gym.designs import load_designs
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.problem.reward import compute_reward
from hydrogel_gym.runs.command_line import run_script
from hydrogel_gym.runs.designing import environments, problem_and_patients
from hydrogel_gym.runs.policies import load_policy, policy_path
from hydrogel_gym.train.ppo_hybrid import Agent

MAX_MINUTES, MIN_FRACTION = 15.0, 0.998
COPIES, ITERATIONS = 500, 50


def best_found(folder: Path, patient_ids: Sequence[str]) -> list[float]:
    """The best reward of each patient in a folder of designs."""
    return list(load_designs(folder).groupby("patient_id")["reward"].max().loc[[*patient_ids]])


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the table."""
    parser = Parser(__doc__)
    parser.add_argument("--policy", type=Path, default=POLICY, help="run directory")
    parser.add_argument("--num-patients", type=count, default=2000, help="the first of the cohort")
    args = parser.parse_args(argv)
    agent, saved = load_policy(policy_path(args.policy), Agent, "cpu")
    options, cohort = problem_and_patients(saved, None, None)
    cohort = common.first_patients(cohort, args.num_patients)
    ids = list(cohort.patient_ids)
    envs = environments(saved, options, cohort, torch.device("cpu"))
    problem = envs.unwrapped.problem
    best = best_designs(cohort, cache_dir=common.ORACLE_CACHE, progress=True).score.double()

    def deterministic(row: int, policy: Agent) -> float:
        design = designs_of(policy, cohort.features[row][None])
        outcomes = problem.reward_model(problem.params.patients[row][None], *design)
        return compute_reward(outcomes, config=problem.params.reward_config).item()

    flags = ["--policy", args.policy.resolve(), "--patient", *ids]
    with tempfile.TemporaryDirectory() as folder:
        refined, drawn = Path(folder, "refined"), Path(folder, "drawn")
        sizes = ["--num-copies", COPIES, "--num-iterations", ITERATIONS]
        script = ["{python}", "train/refine_patients.py", *flags, *sizes]
        ended = run([*script, "--output-dir", refined])
        number = COPIES * ITERATIONS
        plain = ["--num-candidates", number, "--top-only", "--explore", "0"]
        script = ["{python}", "train/generate_candidates.py", *flags, *plain]
        run([*script, "--output-dir", drawn])
        paths = [refined / "patient_policies" / f"{patient_id}.pt" for patient_id in ids]
        own = [load_policy(path, Agent, "cpu")[0] for path in paths]
        all_alike, each_its_own = (
            [deterministic(row, policy) for row, policy in enumerate(policies)]
            for policies in ([agent] * len(ids), own)
        )
        rewards = {
            "policy for all, its deterministic design": all_alike,
            "own policy, its deterministic design": each_its_own,
            f"best of {number:,} drawn from the policy for all": best_found(drawn, ids),
            "best design of the refinement": best_found(refined, ids),
        }
    rows = []
    for name, values in rewards.items():
        reward = torch.tensor(values, dtype=torch.float64)
        regret, fraction = best - reward, float(reward.mean() / best.mean())
        rows.append([name, f"{reward.mean():.3f}", f"{100 * fraction:.3f} %"])
        rows[-1] += [f"{regret.mean():.4f}", f"{regret.quantile(0.95):.4f}"]
    minutes = ended.seconds / 60
    lines = [
        f"{len(ids):,} patients refined at once in one process, {COPIES} copies and {ITERATIONS} "
        f"iterations each: {minutes:.1f} minutes ({MAX_MINUTES:g} required: "
        f"{verdict(minutes < MAX_MINUTES)}), {ended.megabytes:,.0f} MB at the peak; of the "
        f"oracle {100 * fraction:.3f} % ({100 * MIN_FRACTION:g} % required: "
        f"{verdict(fraction >= MIN_FRACTION)}).",
        "",
        *table(["", "mean reward", "of the oracle", "mean regret", "95th percentile"], rows),
    ]
    write(args.output_dir, "refinement", lines, made=made_by())


if __name__ == "__main__":
    sys.exit(run_script(main))
