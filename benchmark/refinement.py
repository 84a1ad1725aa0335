"""How long refining every patient takes, in how much memory, and how near the oracle it ends.

    python benchmark/refinement.py                       # a quarter of an hour on two cores
    python benchmark/refinement.py --policy runs/full-s1 --num-patients 200

One process refines the cohort at the source's sizes (500 copies, 50 iterations). What it finds is
laid beside the best possible (`hydrogel_gym.oracle`, kept in `oracle/` beside the run directory),
and so is the best of as many designs drawn from the policy for all, without any tuning. Writes
`results/refinement.md`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from trainers.launch import ROOT, machine, resources

from hydrogel_gym.designs import load_designs
from hydrogel_gym.files import write_atomically
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.problem.cohort import load_cohort
from hydrogel_gym.problem.reward import compute_reward
from hydrogel_gym.runs.designing import environments
from hydrogel_gym.runs.evaluation import policy_designs
from hydrogel_gym.runs.policies import load_policy, policy_path
from hydrogel_gym.train.ppo_hybrid import Agent

RESULTS = Path(__file__).parent / "results"
MAX_MINUTES, MIN_FRACTION = 15.0, 0.998
COPIES, ITERATIONS = 500, 50


def process(script: str, flags: list[str]) -> tuple[float, float]:
    """Seconds and peak megabytes of a script of `train/`."""
    return resources([sys.executable, str(ROOT / "train" / script), *flags])


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", type=Path, default=ROOT / "runs" / "quick-s1")
    parser.add_argument("--num-patients", type=int, help="so many instead of all")
    args = parser.parse_args()
    agent, saved = load_policy(policy_path(args.policy), Agent, "cpu")
    cohort = load_cohort(saved["training_config"]["cohort"])
    ids = cohort.patient_ids[: args.num_patients]
    count = len(ids)
    best = best_designs(cohort, cache_dir=args.policy.parent / "oracle", progress=True)
    best = best.score[:count].double()

    envs = environments(saved["training_config"], cohort, torch.device("cpu"))
    rewards = {
        "policy for all, its deterministic design": policy_designs(agent.design, envs)["reward"]
    }
    flags = ["--policy", str(args.policy), *(["--patient", *ids] if args.num_patients else [])]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "refined"
        seconds, megabytes = process("refine_patients.py", [*flags, "--output-dir", str(output)])
        found = load_designs(output).groupby("patient_id")["reward"].max()
        own = []
        for row, patient_id in enumerate(ids):
            path = output / "patient_policies" / f"{patient_id}.pt"
            policy, _ = load_policy(path, Agent, "cpu")
            observation = torch.cat([cohort.features[row].float(), torch.zeros(2)])
            own.append((policy, observation))
        rewards["own policy, its deterministic design"] = deterministic(own, envs)
        drawn = Path(folder) / "drawn"
        plain = ["--num-candidates", str(COPIES * ITERATIONS), "--top-only", "--explore", "0"]
        process("generate_candidates.py", [*flags, *plain, "--output-dir", str(drawn)])
        sampled = load_designs(drawn).groupby("patient_id")["reward"].max()
    rewards[f"best of {COPIES * ITERATIONS:,} drawn from the policy for all"] = sampled
    rewards["best design of the refinement"] = found

    rows = []
    for name, reward in rewards.items():
        if not isinstance(reward, torch.Tensor):
            reward = torch.tensor(reward.loc[list(ids)].to_numpy())
        reward = reward[:count].double()
        regret = best - reward
        rows.append(
            f"| {name} | {reward.mean():.3f} | {100 * reward.mean() / best.mean():.3f} % "
            f"| {regret.mean():.4f} | {regret.quantile(0.95):.4f} |"
        )
    fraction = float(reward.mean() / best.mean())  # of the last row
    minutes = seconds / 60
    lines = [
        f"{count:,} patients refined at once in one process, {COPIES} copies and {ITERATIONS} "
        f"iterations each: {minutes:.1f} minutes ({MAX_MINUTES:g} required: "
        f"{'met' if minutes < MAX_MINUTES else 'missed'}), {megabytes:,.0f} MB at the peak; of the "
        f"oracle {100 * fraction:.3f} % ({100 * MIN_FRACTION:g} % required: "
        f"{'met' if fraction >= MIN_FRACTION else 'missed'}); made by `benchmark/refinement.py`.",
        "",
        machine(torch.get_num_threads()),
        "",
        "| | mean reward | of the oracle | mean regret | 95th percentile |",
        "|---|---|---|---|---|",
        *rows,
    ]
    write_atomically(RESULTS / "refinement.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


@torch.no_grad()
def deterministic(policies: list, envs: Any) -> torch.Tensor:
    """Reward of each patient's policy for its own patient, (P,)."""
    problem = envs.unwrapped.problem
    rewards = []
    for row, (policy, observation) in enumerate(policies):
        action, _ = policy.design(observation[None])
        design = [action[name] for name in ("polymer_id", "formulation", "coverage")]
        outcomes = problem.reward_model(problem.params.patients[row][None], *design)
        reward = compute_reward(outcomes, config=problem.params.reward_config)
        rewards.append(reward)
    return torch.cat(rewards)


if __name__ == "__main__":
    main()
