"""The table of metrics: what derives from it, and what is not in it."""

from __future__ import annotations

import torch

from hydrogel_gym.runs import metrics


def test_metrics_of_a_rollout_are_what_their_infos_say():
    infos = {name: torch.zeros(2, 2) for name in ("reward", *metrics.INFOS)}
    infos["reward"] = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    infos["is_optimal"] = torch.tensor([[True, False], [False, False]])
    infos["reward_integrity"] = torch.tensor([[-1.0, 0.0], [-1.0, -1.0]])
    infos["delta_ef_pct"] = torch.tensor([[4.0, 0.0], [0.0, 2.0]])
    found = metrics.rollout_metrics(infos)
    expected = {"mean_reward": 3.0, "max_reward": 6.0, "optimal_rate": 0.25}
    expected |= {"reward_integrity": -0.75, "integrity_breach_rate": 0.75}
    expected |= {"toxicity_breach_rate": 0.0, "mean_delta_ef_pct": 1.5, "reward_toxicity": 0.0}
    assert {name: found[name].item() for name in expected} == expected


def test_a_row_is_in_the_order_of_the_table_and_logs_leave_out_what_is_not_known():
    row = metrics.as_row({"train_regret": None, "global_step": 9, "iteration": 1})
    assert list(row) == ["iteration", "global_step", "train_regret"]
    assert metrics.keyed(row) == {"charts/iteration": 1, "global_step": 9}
