"""The table of `docs/adaptive.md`: one patient's episode, as a report of the run shows it.

    python docs/adaptive_episode.py runs/adapt-s1

Prints the patient, the hidden response and the checks of the deterministic policy in Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hydrogel_gym.problem.response import RESPONSE_NAMES
from hydrogel_gym.report.episode import belief_columns, check_columns, patient_episode
from hydrogel_gym.report.reading import read_run
from hydrogel_gym.train.ppo_hybrid import Agent

# A page is narrower than a report.
LEFT_OUT = (
    "covered border zone, %",
    "stress reduction, %",
    "logit of optimal",
    "integrity, 0–1",
    "fibrosis, 0–1",
    "best so far",
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    episode = patient_episode(read_run(parser.parse_args().run_dir, Agent))
    factors = zip(RESPONSE_NAMES, episode.response, strict=True)
    hidden = ", ".join(f"`{name}` {value:.2f}" for name, value in factors)
    print(f"Patient {episode.patient_id}. Hidden: {hidden}.\n")
    columns = {name: x for name, x in check_columns(episode).items() if name not in LEFT_OUT}
    expected = belief_columns(episode, "expected score")["expected score"]
    score, regret = (columns.pop(name) for name in ("score", "regret"))
    columns |= {"expected score": [*expected, "–"], "score": score, "regret": regret}
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for row in zip(*columns.values(), strict=True):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
