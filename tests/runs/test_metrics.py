"""The table of metrics: what derives from it, and what is not in it."""

from __future__ import annotations

import re
import time

import pandas as pd
import pytest
import torch

from hydrogel_gym import Outcomes
from hydrogel_gym.problem.reward import RewardTerms
from hydrogel_gym.runs import ALONE, metrics, start_run
from hydrogel_gym.runs.metrics import METRICS

pytestmark = pytest.mark.usefixtures("without_pictures")


def names(namespace: str) -> list[str]:
    return [metric.name for metric in METRICS if metric.namespace == namespace]


def test_every_metric_is_named_once():
    for column in ("name", "key"):
        each = [getattr(metric, column) for metric in METRICS]
        assert len(set(each)) == len(each)


def test_names_of_logs_are_a_namespace_and_a_column_but_for_their_axis():
    assert names("") == ["global_step"]
    for name, key in metrics.KEYS.items():
        assert key in ("global_step", f"{key.partition('/')[0]}/{name}")
    assert metrics.NAMESPACES == ("charts", "reward", "losses", "eval", "perf")


def test_reward_namespace_is_terms_and_outcomes():
    assert set(names("reward")) == {
        *RewardTerms._fields,
        *(f"mean_{name}" for name in Outcomes._fields if name != "optimal_logit"),
    }


def test_nothing_is_measured_by_a_second_model():
    assert not [metric.name for metric in METRICS if metric.name.startswith("true_")]


def test_a_new_metric_is_a_new_row_of_the_table(monkeypatch):
    new = metrics.Metric("smallest", "charts", "", None, lambda infos: infos["reward"].min())
    monkeypatch.setattr(metrics, "METRICS", (new,))
    assert metrics.rollout_metrics({"reward": torch.tensor([[2.0, -1.0]])}) == {"smallest": -1.0}
    assert new.key == "charts/smallest"


def test_metrics_of_a_rollout_are_what_their_infos_say():
    infos = {name: torch.zeros(2, 2) for name in ("reward", *metrics.INFOS)}
    infos["reward"] = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    infos["is_optimal"] = torch.tensor([[True, False], [False, False]])
    infos["reward_integrity"] = torch.tensor([[-1.0, 0.0], [-1.0, -1.0]])
    infos["delta_ef_pct"] = torch.tensor([[4.0, 0.0], [0.0, 2.0]])
    found = metrics.rollout_metrics(infos)
    assert list(found) == [metric.name for metric in METRICS if metric.of_rollout]
    expected = {"mean_reward": 3.0, "max_reward": 6.0, "optimal_rate": 0.25}
    expected |= {"reward_integrity": -0.75, "integrity_breach_rate": 0.75}
    expected |= {"toxicity_breach_rate": 0.0, "mean_delta_ef_pct": 1.5, "reward_toxicity": 0.0}
    assert {name: found[name].item() for name in expected} == expected


def test_a_row_is_in_the_order_of_the_table_whatever_that_of_its_values():
    row = metrics.as_row({metric.name: 1.0 for metric in reversed(METRICS)})
    assert list(row) == [metric.name for metric in METRICS]


def test_logs_leave_out_what_is_not_known():
    row = {"iteration": 1, "global_step": 9, "train_regret": None}
    assert metrics.keyed(row) == {"charts/iteration": 1, "global_step": 9}


def test_a_metric_that_is_no_row_of_the_table_is_named():
    with pytest.raises(KeyError, match="temperature, colour: no row of .*METRICS"):
        metrics.as_row({"entropy": 1.0, "temperature": 3.0, "colour": 1.0})


def test_recording_a_metric_that_is_no_row_of_the_table_ends_the_run(ppo, small_run, tmp_path):
    args = small_run(tmp_path / "run")

    def record_something_else():
        labels = {"preset": args.preset, "policy": args.policy}
        with start_run(args, ALONE, labels, args.num_iterations, args.num_steps) as run:
            cohort, device = run.cohorts["train"], torch.device("cpu")
            learner, _, _ = ppo.make_learner(args, cohort, device, ALONE, compile=False)
            envs, agent, _, _, generator = learner
            obs = run.restore(learner, agent.design, None)
            for _ in run.iterations():
                _, _, infos = ppo.rollout(envs, agent, obs, args, generator)
                run.record(infos, {"temperature": 3.0}, time.perf_counter())

    with pytest.raises(KeyError, match="temperature: no row of"):
        record_something_else()
    assert not (args.output_dir / "metrics.csv").exists()


def test_every_column_is_a_row_of_the_table_in_its_order(ppo, small_run, tmp_path):
    args = small_run(tmp_path / "run", num_iterations=1)
    ppo.train(args)
    columns = pd.read_csv(args.output_dir / "metrics.csv").columns
    assert columns.tolist() == [metric.name for metric in METRICS]
    assert all(re.fullmatch(r"\w+", column) for column in columns)
