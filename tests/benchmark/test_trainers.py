import importlib
import json

import numpy as np
import pandas as pd
import pytest
import torch
from quality import time_to_quality
from quality.baselines.search import DIM, design_of_unit
from speed import scaling, throughput
from speed.trainers import cleanrl_manner, protocol
from torch.distributions import Distribution, Normal, TanhTransform, TransformedDistribution

import hydrogel_gym


@pytest.mark.parametrize("name", ["cleanrl_manner", "stable_baselines3_manner"])
def test_a_trainer_does_the_requested_work_and_writes_a_line_per_iteration(
    name, tmp_path, monkeypatch
):
    pytest.importorskip("stable_baselines3" if "baselines3" in name else "torch")
    updates, output = [], tmp_path / "lines.jsonl"
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *_: updates.append(1))
    # Stable-Baselines3's trainer switches it off for good.
    monkeypatch.setattr(Distribution, "_validate_args", True)
    trainer = importlib.import_module(f"speed.trainers.{name}")
    flags = "--num-envs 40 --num-steps 2 --num-iterations 2 --num-epochs 1 --minibatch-size 40"
    trainer.main([*flags.split(), "--evaluate-every", "2", "--output", str(output)])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["iteration"], row["samples"]) for row in rows] == [(1, 80), (2, 160)]
    assert len(updates) == 2 * 80 // 40
    assert all(0 < row["seconds_iteration"] < row["seconds"] for row in rows)
    assert "holdout_deterministic_reward" not in rows[0]
    assert -10 < rows[1]["holdout_deterministic_reward"] < 45


@pytest.mark.nightly
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_program_of_xla_computes_what_torch_does_and_learns(precision, tmp_path, monkeypatch):
    pytest.importorskip("optax")
    xla, generator = importlib.import_module("speed.trainers.xla"), torch.Generator().manual_seed(0)
    patients = hydrogel_gym.load_cohort().features.float()
    design = design_of_unit(torch.rand(len(patients), DIM + 2, generator=generator))
    expected = xla.Evaluated()(patients, *design)
    outcomes = xla.in_jax()(*(part.numpy() for part in (patients, *design)))
    for one, other in zip(outcomes, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # it would pin this process to a core
    flags = "--num-envs 400 --num-steps 4 --minibatch-size 100 --num-epochs 4 --learning-rate 2e-3"
    output = tmp_path / "lines.jsonl"
    iterations = ["--num-iterations", "4", "--evaluate-every", "4", "--precision", precision]
    xla.main([*flags.split(), *iterations, "--output", str(output)])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["samples"] for row in rows] == [1600, 3200, 4800, 6400]
    rewards = [row["mean_reward"] for row in rows]
    assert 10.0 < rewards[0] < 14.0
    assert rewards[1] > rewards[0] + 1.0
    assert rows[-1]["holdout_deterministic_reward"] > 20.0


@torch.no_grad()
def test_cleanrl_manner_has_the_network_of_the_source_preset_and_the_squashed_distribution(agent):
    def multiplications(module):
        return sum(x.weight.numel() for x in module.modules() if isinstance(x, torch.nn.Linear))

    envs = hydrogel_gym.HydrogelVectorEnv(6, output="torch")
    theirs = cleanrl_manner.Agent(envs, obs := envs.reset(seed=0)[0])
    assert multiplications(theirs) == multiplications(agent)

    mean, std = theirs.formulation_mean(theirs.features(obs)), theirs.formulation_logstd.exp()
    normal, tanh = Normal(mean, std.expand(6, 4)), TanhTransform(cache_size=1)
    squashed = TransformedDistribution(normal, tanh)
    action, first, _, _ = theirs.get_action_and_value(obs)
    other = action._replace(presquash=torch.zeros(6, 4))
    _, second, _, _ = theirs.get_action_and_value(obs, other)
    expected = [squashed.log_prob(x.presquash.tanh()).sum(-1) for x in (action, other)]
    torch.testing.assert_close(first - second, expected[0] - expected[1], rtol=1e-4, atol=1e-4)


def test_tables_of_speed_say_how_many_times_as_fast_as_the_other_within_rounds():
    parts = ["iteration", "rollout", "update", "first"]
    parts += [f"seconds_{part}" for part in parts]
    # The second round met a machine half as fast; a ratio of medians would be off.
    seconds = {"CleanRL manner": (11.0, 22.0, 13.2), "fast bf16": (10.0, 20.0, 11.0)}
    measured = {name: [dict.fromkeys(parts, x) for x in each] for name, each in seconds.items()}
    row = throughput.speed_rows(measured)[1]
    assert row[1:4] == ["11.00 [10.00, 20.00]", "1.10× [1.10×]", "11.00"]
    assert [row[-1] for row in scaling.speed_rows(measured)] == ["1.00×", "1.10×"]


def test_time_to_quality_counts_a_seed_that_failed_as_the_slowest():
    goal = time_to_quality.Milestone("29.2", "train_deterministic_reward", 29.2)
    runs = [
        pd.DataFrame({"seconds": [5.0 * k, 9.0 * k], goal.column: [20.0, final]})
        for k, final in ((1, 29.5), (2, 29.3), (3, 28.0))
    ]
    assert time_to_quality.cell(runs, goal) == "18 [9, 18], not reached by 1 of 3"
    assert time_to_quality.cell(runs[1:], goal).startswith("not reached by most [18, 18]")
    assert time_to_quality.cell(runs[2:], goal) == "not reached (28.00)"


def test_a_run_counts_from_its_launch_and_per_unit_of_samples_without_its_first_iteration(tmp_path):
    columns = "iteration,global_step,wall_seconds,rollout_seconds,update_seconds"
    rows = "1,40000,100,9,90", "2,80000,103,0.5,1.5", "3,120000,107,0.5,3.5"
    (tmp_path / "metrics.csv").write_text("\n".join([columns, *rows]))
    (tmp_path / "summary.json").write_text('{"training_began": 52.5}')
    iterations = protocol.read_iterations(tmp_path, launched=50.0)
    assert iterations["seconds"].tolist() == [102.5, 105.5, 109.5]
    figures = throughput.per_unit(iterations)
    assert figures == {"iteration": 15.0, "rollout": 2.5, "update": 12.5, "first": 99.0}
