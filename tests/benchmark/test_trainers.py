import argparse
import importlib
import json
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

import hydrogel_gym
from hydrogel_gym.errors import UsageError

ROOT = Path(__file__).parents[2]
TRAINERS = ROOT / "benchmark" / "trainers"


@pytest.fixture
def load(monkeypatch):
    """Modules of the benchmark, which find each other as scripts do."""
    # Stable-Baselines3's trainer switches it off for good.
    distribution = torch.distributions.Distribution
    monkeypatch.setattr(distribution, "_validate_args", distribution._validate_args)
    for folder in (TRAINERS, TRAINERS.parent):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module


def run(trainer, tmp_path, *flags):
    """Exit code of a small run, and its lines."""
    output = tmp_path / "lines.jsonl"
    sizes = "--num-envs 40 --num-steps 2 --num-iterations 2 --num-epochs 1 --minibatch-size 40"
    code = trainer.main([*sizes.split(), "--evaluate-every", "2", "--output", str(output), *flags])
    lines = output.read_text().splitlines() if output.exists() else []
    return code, [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", ["cleanrl_manner", "stable_baselines3_manner"])
def test_a_trainer_writes_a_line_of_the_protocol_for_every_iteration(name, load, tmp_path):
    if "baselines3" in name:
        pytest.importorskip("stable_baselines3")
    code, rows = run(load(name), tmp_path)
    assert code == 0
    assert [(row["iteration"], row["samples"]) for row in rows] == [(1, 80), (2, 160)]
    for row in rows:
        assert 0 < row["seconds_iteration"] < row["seconds"]
        parts = row["seconds_rollout"] + row["seconds_update"]
        assert row["seconds_iteration"] == pytest.approx(parts)
    assert "holdout_deterministic_reward" not in rows[0]
    assert -10 < rows[1]["holdout_deterministic_reward"] < 45


def test_a_minibatch_that_does_not_divide_is_refused_in_one_line(load, tmp_path, capsys):
    code, rows = run(load("cleanrl_manner"), tmp_path, "--minibatch-size", "33")
    assert (code, rows) == (2, [])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--minibatch-size is 33, which does not divide" in error


def test_cleanrl_manner_evaluates_actions_as_the_squashed_distribution_of_torch(load):
    module = load("cleanrl_manner")
    envs = hydrogel_gym.HydrogelVectorEnv(6, output="torch")
    obs, _ = envs.reset(seed=0)
    torch.manual_seed(0)
    agent = module.Agent(envs, obs)
    with torch.no_grad():
        action, logprob, _, _ = agent.get_action_and_value(obs)
        features = agent.features(obs)
        squashed = torch.distributions.TransformedDistribution(
            torch.distributions.Normal(
                agent.formulation_mean(features), agent.formulation_logstd.exp().expand(6, 4)
            ),
            torch.distributions.TanhTransform(cache_size=1),
        )
        categorical = torch.distributions.Categorical
        expected = (
            categorical(logits=agent.polymer(features)).log_prob(action.polymer_id)
            + squashed.log_prob(action.presquash.tanh()).sum(-1)
            + categorical(logits=agent.coverage(features)).log_prob(action.coverage)
        )
    torch.testing.assert_close(logprob, expected, rtol=1e-4, atol=1e-4)


def test_stable_baselines3_gets_the_rewards_of_the_batched_environment(load):
    pytest.importorskip("stable_baselines3")
    module = load("stable_baselines3_manner")
    adapter = module.ScaledVecEnv(5)
    envs = hydrogel_gym.HydrogelVectorEnv(5, action_format="box")
    adapter.seed(3)
    obs, _ = envs.reset(seed=3)
    assert (adapter.reset() == obs).all()
    action = envs.action_space.sample()
    next_obs, reward, terminated, _, _ = envs.step(action)
    same_obs, same_reward, done, _ = adapter.step(action)
    assert (same_obs == next_obs).all()
    assert (same_reward == reward).all()
    assert done.tolist() == terminated.tolist() == [True] * 5


def throughput_rows():
    rows = [{"kind": "matmul", "name": "float32, medium", "shape": "network", "gflops": 200.0}]
    rows.append({"kind": "matmul", "name": "bfloat16", "shape": "network", "gflops": 400.0})
    # The second round met a machine half as fast; a ratio of medians would be off.
    for name, bf16, seconds in (
        ("CleanRL manner", False, (30.0, 60.0, 33.0)),
        ("fast bf16", True, (10.0, 20.0, 11.0)),
    ):
        rows += [
            {
                "round": k,
                "kind": "trainer",
                "name": name,
                "bf16": bf16,
                "seconds": s,
                "samples_measured": 80_000,
                "rollout_seconds": 1.0,
                "update_seconds": s - 1.0,
                "first_iteration_seconds": s,
                "gflops": 100.0,
            }
            for k, s in enumerate(seconds, 1)
        ]
    return pd.DataFrame(rows)


def test_throughput_takes_ratios_within_rounds_and_ceilings_of_the_same_arithmetic(load):
    table = load("throughput").summarise(throughput_rows())
    assert table.loc["fast bf16", "against CleanRL manner"] == pytest.approx(3.0)
    assert table.loc["CleanRL manner", "against CleanRL manner"] == 1.0
    assert table.loc["fast bf16", ["seconds", "fastest", "slowest"]].tolist() == [11, 10, 20]
    assert table["of_ceiling"].tolist() == [0.5, 0.25]


def test_throughput_scales_a_process_to_the_unit_without_its_first_iteration(load):
    module = load("throughput")
    iterations = pd.DataFrame(
        {
            "samples": [40_000, 80_000, 120_000],
            "seconds_iteration": [99.0, 2.0, 4.0],
            "seconds_rollout": [9.0, 0.5, 0.5],
            "seconds_update": [90.0, 1.5, 3.5],
        }
    )
    figures = module.figures(iterations, ((10, 10),))
    assert figures["seconds"] == pytest.approx(6.0 * 200_000 / 80_000)
    assert figures["update_seconds"] == pytest.approx(12.5)
    assert figures["gflops"] == pytest.approx(200_000 * 10 * 600 / 12.5 / 1e9)


def test_operations_of_the_source_network_are_counted_from_its_layers(load):
    module = load("throughput")
    agent = load("cleanrl_manner").Agent(
        hydrogel_gym.HydrogelVectorEnv(2, output="torch"), torch.randn(2, 13)
    )
    layers = [layer for layer in agent.modules() if isinstance(layer, torch.nn.Linear)]
    multiplications = sum(layer.weight.numel() for layer in layers)
    assert module.flops_per_sample(module.SOURCE_LAYERS) == 6 * multiplications


def test_time_to_quality_counts_a_seed_that_failed_as_the_slowest(load):
    module = load("time_to_quality")
    goal = module.Milestone("29.2", "train_deterministic_reward", 29.2)
    runs = [
        pd.DataFrame({"seed": k, "seconds": [5.0 * k, 9.0 * k], goal.column: [20.0, final]})
        for k, final in ((1, 29.5), (2, 29.3), (3, 28.0))
    ]
    assert module.reached(runs[0], goal) == 9.0
    assert module.cell(pd.concat(runs), goal) == "18 [9, 18], not reached by 1 of 3"
    assert module.cell(runs[2], goal) == "not reached (28.00)"


def test_a_run_directory_counts_from_the_launch_of_its_process(load, tmp_path):
    module = load("trainers.launch")
    columns = {"iteration": [1], "global_step": [10], "wall_seconds": [4.0]}
    columns |= {"rollout_seconds": [1.0], "update_seconds": [2.0]}
    pd.DataFrame(columns).to_csv(tmp_path / "metrics.csv", index=False)
    launched = time.time()
    (tmp_path / "summary.json").write_text(json.dumps({"training_began": launched + 2.5}))
    row = module.read_iterations(tmp_path, ["seconds"], launched).iloc[0]
    assert (row["seconds"], row["seconds_iteration"], row["samples"]) == (6.5, 3.0, 10)
    with pytest.raises(module.TrainerError, match="lacks holdout"):
        module.read_iterations(tmp_path, ["holdout_deterministic_reward"], launched)


def test_throughput_refuses_a_bad_request(load, capsys):
    with pytest.raises(SystemExit) as stop:
        load("throughput").parse_args(["--rounds", "0"])
    assert stop.value.code == 2
    assert "--rounds is 0; allowed: 1 or more" in capsys.readouterr().err


def test_a_command_that_fails_is_named_with_its_last_line(load):
    module = load("trainers.launch")
    words = module.fill("{python} -c 'import sys; print(sys.argv[1])' {seed}", seed=3)
    assert module.complete("mine", words, module.environment(1)) == "3\n"
    with pytest.raises(module.TrainerError, match="mine: exit code 1: .*IndexError"):
        module.complete("mine", words[:-1], module.environment(1))


def test_sizes_are_checked_by_name(load):
    module = load("protocol")
    args = argparse.Namespace(num_envs=0, evaluate_every=0)
    with pytest.raises(UsageError, match="--num-envs is 0; allowed: 1 or more"):
        module.check_sizes(args, ["num_envs"])
