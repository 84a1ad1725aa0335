import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import hydrogel_gym
from hydrogel_gym import errors, runs
from hydrogel_gym.compiled import CompileError
from hydrogel_gym.oracle import best_designs
from hydrogel_gym.problem.reward import RewardTerms
from hydrogel_gym.runs import (
    compiled,
    devices,
    directory,
    environments,
    evaluation,
    metrics,
    policies,
    ranks,
)
from hydrogel_gym.runs.options import REMOVED_FLAGS
from hydrogel_gym.train import ppo_hybrid as ppo

no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ROOT = Path(__file__).parents[2]
TRAINER = ROOT / "train" / "ppo_hybrid.py"
pytestmark = pytest.mark.usefixtures("without_pictures")


def make_agent(policy="autoregressive", hidden_dim=32, seed=0, state_std=True):
    torch.manual_seed(seed)
    agent = ppo.Agent(
        obs_dim=13,
        num_polymers=24,
        num_coverages=4,
        formulation_low=[5.0, 7.0, 0.0, 1.0],
        formulation_high=[30.0, 180.0, 1.0, 5.0],
        policy=policy,
        state_std=state_std,
        hidden_dim=hidden_dim,
    )
    # Away from the near-uniform initial policy, so that every head matters.
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    return agent


def noise_for(obs, seed):
    generator = torch.Generator().manual_seed(seed)
    return ppo.draw_noise(len(obs), dim=4, generator=generator)


def read_options(*flags):
    return runs.read_run_options(ppo.Args, ppo.PRESETS, flags, prog="ppo_hybrid.py")


def small_args(tmp_path, **changes):
    settings = dict(
        preset="quick",
        num_envs=100,
        num_steps=4,
        num_iterations=2,
        num_epochs=1,
        minibatch_size=100,
        hidden_dim=16,
        oracle=False,
        output_dir=tmp_path / "run",
    )
    return ppo.Args(**(settings | changes))


@pytest.fixture
def toy_env(register_design):
    """A hybrid task with a known answer that depends on the patient."""

    def reward_model(patient, polymer_id, formulation, coverage):
        large_scar = patient[..., 4] > 20.0
        right_polymer = polymer_id == torch.where(large_scar, 3, 17)
        right_coverage = coverage == torch.where(large_scar, 2, 0)
        distance = (formulation[..., 3] - 1.0 - patient[..., 4] / 15.0).square()
        delta_ef = right_polymer * 3.0 + right_coverage * 1.0 - distance
        zero = torch.zeros_like(delta_ef)
        return hydrogel_gym.Outcomes(delta_ef, zero, zero, zero, zero + 1.0, zero)

    return register_design("ToyDesign-v0", reward_model)


# --- advantages


def gae(rewards, values, next_values, terminated, truncated, gamma=0.5, gae_lambda=0.5):
    column = [
        torch.tensor(x, dtype=torch.float64).unsqueeze(-1) for x in (rewards, values, next_values)
    ]
    flags = [torch.tensor(x).unsqueeze(-1) for x in (terminated, truncated)]
    advantages, returns = ppo.compute_gae(*column, flags[0], flags[0] | flags[1], gamma, gae_lambda)
    return advantages.squeeze(-1).tolist(), returns.squeeze(-1).tolist()


def test_gae_without_an_episode_end_discounts_the_trace():
    advantages, returns = gae([1, 2, 3], [10, 20, 30], [20, 30, 40], [False] * 3, [False] * 3)
    # deltas: 1+10-10, 2+15-20, 3+20-30
    assert advantages == [1 - 0.25 * (3 + 0.25 * 7), -3 - 0.25 * 7, -7]
    assert returns == [10 + advantages[0], 20 + advantages[1], 23]


def test_gae_at_a_termination_stops_bootstrap_and_trace():
    advantages, _ = gae([1, 2, 3], [10, 20, 30], [20, 99, 40], [False, True, False], [False] * 3)
    # deltas: 1, 2-20, -7; nothing crosses the end of step 1
    assert advantages == [1 + 0.25 * -18, -18, -7]


def test_gae_at_a_truncation_bootstraps_but_stops_the_trace():
    advantages, _ = gae([1, 2, 3], [10, 20, 30], [20, 60, 40], [False] * 3, [False, True, False])
    # deltas: 1, 2+30-20, -7
    assert advantages == [1 + 0.25 * 12, 12, -7]


def test_gae_where_a_step_both_terminates_and_truncates_does_not_bootstrap():
    advantages, _ = gae(
        [1, 2, 3], [10, 20, 30], [20, 60, 40], [False, True, False], [False, True, False]
    )
    assert advantages == [1 + 0.25 * -18, -18, -7]


def test_gae_of_single_step_episodes_is_reward_minus_value():
    advantages, returns = gae([5, 7], [1, 2], [9, 9], [True, True], [False, False])
    assert (advantages, returns) == ([4, 5], [5, 7])


class OneStepEnv:
    """Ends every episode by truncation after one step, with a telling final observation."""

    num_envs = 2
    unwrapped = None
    final_obs = torch.full((2, 13), 3.0)

    def step(self, action):
        flags = torch.tensor([False, False]), torch.tensor([True, False])
        zero = torch.zeros(2)
        infos = {name: zero for name in metrics.INFOS}
        info = infos | {"final_obs": self.final_obs, "final_info": infos}
        return torch.ones(2, 13), torch.tensor([1.0, 2.0]), *flags, info


def test_rollout_takes_the_value_of_the_final_observation_at_a_truncation():
    agent = make_agent()
    args = ppo.Args(num_steps=1, gamma=0.9, limit_margin=0.0, penalty_scale=1.0)
    _, batch, _ = ppo.rollout(
        OneStepEnv(), agent, torch.zeros(2, 13), args, torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        after = torch.stack([agent.value(torch.full((1, 13), 3.0)), agent.value(torch.ones(1, 13))])
    expected = torch.tensor([1.0, 2.0]) + 0.9 * after.squeeze(-1)
    torch.testing.assert_close(batch.returns, expected, rtol=1e-5, atol=1e-5)


# --- policy


def test_squashed_logprob_of_a_standard_normal_at_zero_is_known():
    zeros = torch.zeros(1, 4, dtype=torch.float64)
    # density 1/sqrt(2 pi) per dimension and d tanh(0)/du = 1
    expected = -2.0 * math.log(2.0 * math.pi)
    normal = ppo.SquashedNormal(zeros, zeros, torch.zeros(2, 1))
    assert normal.logprob(zeros).item() == pytest.approx(expected)


def test_squashed_logprob_matches_the_transformed_distribution_of_torch():
    torch.manual_seed(0)
    mean, log_std, noise = torch.randn(3, 64, 4, dtype=torch.float64)
    u = mean + log_std.exp() * noise
    normal = torch.distributions.Normal(mean, log_std.exp())
    transform = torch.distributions.TanhTransform(cache_size=1)
    reference = torch.distributions.TransformedDistribution(normal, transform)
    expected = reference.log_prob(transform(u)).sum(-1)
    normal = ppo.SquashedNormal(mean, log_std, torch.zeros(2, 1))
    torch.testing.assert_close(normal.logprob(u), expected)


def test_log_jacobian_stays_finite_where_tanh_saturates():
    u = torch.tensor([-60.0, 0.0, 60.0])
    value = ppo.log_tanh_jacobian(u)
    torch.testing.assert_close(
        value, torch.tensor([1.3863 - 120, 0.0, 1.3863 - 120]), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("state_std", [False, True])
@pytest.mark.parametrize("policy", ["factored", "autoregressive"])
def test_entropy_equals_the_mean_of_minus_logprob(policy, state_std):
    agent = make_agent(policy, state_std=state_std)
    obs = torch.randn(1, 13).expand(2**15, 13)
    with torch.no_grad():
        output = agent(obs, noise=noise_for(obs, seed=1))
    # Standard error of the mean is below 0.02 for a joint log-probability with SD of about 2.5.
    assert output.entropy.mean().item() == pytest.approx(-output.logprob.mean().item(), abs=0.06)


@pytest.mark.parametrize("policy", ["factored", "autoregressive"])
def test_a_sampled_action_has_the_same_logprob_when_evaluated_again(policy):
    agent = make_agent(policy)
    obs = torch.randn(64, 13)
    with torch.no_grad():
        sampled = agent(obs, noise=noise_for(obs, seed=1))
        evaluated = agent(obs, sampled.action)
    torch.testing.assert_close(evaluated.logprob, sampled.logprob)
    torch.testing.assert_close(evaluated.value, agent.value(obs).detach())


def test_only_the_autoregressive_heads_depend_on_the_polymer():
    obs, polymer_id = torch.randn(1, 13).expand(24, 13), torch.arange(24)
    for policy, differs in (("factored", False), ("autoregressive", True)):
        agent = make_agent(policy)
        with torch.no_grad():
            _, formulation_in, coverage_in, _ = agent.head_inputs(obs)
            mean = agent.formulation_distribution(formulation_in, polymer_id, None).mean
            logits = agent.coverage_head(coverage_in, polymer_id)
        assert bool((mean.std(0) > 1e-4).all()) is differs
        assert bool((logits.std(0) > 1e-4).all()) is differs


def test_spread_of_the_formulation_depends_on_the_state_only_if_asked_to():
    obs, polymer_id = torch.randn(16, 13), torch.full((16,), 3)
    for state_std in (False, True):
        agent = make_agent(state_std=state_std)
        with torch.no_grad():
            log_std = agent.formulation_distribution(
                agent.head_inputs(obs)[1], polymer_id, None
            ).log_std
        assert log_std.shape == (16, 4)
        assert bool((log_std.std(0) > 1e-4).all()) is state_std


def test_autoregressive_heads_read_the_block_of_their_own_polymer():
    agent = make_agent()
    hidden, polymer_id = torch.randn(24, 64), torch.arange(24)
    with torch.no_grad():
        every = agent.coverage_head.out(hidden.relu()).view(24, 24, 4)
        chosen = agent.coverage_head(hidden, polymer_id)
    torch.testing.assert_close(chosen, torch.stack([every[i, i] for i in range(24)]))


@pytest.mark.parametrize("state_std", [False, True])
def test_joint_logprob_is_the_sum_over_the_heads(state_std):
    agent = make_agent("factored", state_std=state_std)
    obs = torch.randn(5, 13)
    with torch.no_grad():
        polymer_in, formulation_in, coverage_in, _ = agent.head_inputs(obs)
        output = agent(obs, noise=noise_for(obs, seed=2))
        polymer = torch.distributions.Categorical(logits=agent.polymer_head(polymer_in))
        coverage = torch.distributions.Categorical(logits=agent.coverage_head(coverage_in))
        formulation = agent.formulation_distribution(formulation_in, None, None)
    expected = (
        polymer.log_prob(output.action.polymer_id)
        + formulation.logprob(output.action.presquash)
        + coverage.log_prob(output.action.coverage)
    )
    torch.testing.assert_close(output.logprob, expected)


def test_actions_never_leave_the_formulation_box():
    agent = make_agent()
    extreme = torch.tensor([[-1e4, 1e4, -30.0, 30.0]])
    index = torch.zeros(1, dtype=torch.int64)
    formulation = agent.to_env(ppo.HybridAction(index, extreme, index))["formulation"]
    assert formulation.tolist() == [[5.0, 180.0, 0.0, 5.0]]


def test_policy_and_loss_run_on_the_meta_device():
    agent = make_agent().to("meta")
    action = ppo.HybridAction(
        *(
            torch.zeros(shape, dtype=dtype, device="meta")
            for shape, dtype in (((8,), torch.int64), ((8, 4), torch.float32), ((8,), torch.int64))
        )
    )
    obs, row = torch.zeros(8, 13, device="meta"), torch.zeros(8, device="meta")
    loss, _ = ppo.ppo_loss(
        agent(obs, action),
        ppo.Batch(obs, action, row, row, row, row),
        ppo.Args(),
        agent.return_std,
    )
    loss.backward()
    assert agent.encoder[0].weight.grad.device.type == "meta"


def test_a_category_is_chosen_in_proportion_to_its_probability():
    logp = torch.tensor([0.1, 0.0, 0.6, 0.3]).log().expand(4001, 4)
    chosen = ppo.choose(logp, torch.linspace(0.0, 1.0 - 2.0**-24, 4001))
    share = torch.bincount(chosen, minlength=4) / len(chosen)
    torch.testing.assert_close(share, logp[0].exp(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2.0**-24])
def test_the_ends_of_the_random_numbers_choose_a_category_that_exists(uniform):
    logp = torch.randn(1000, 24, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    chosen = ppo.choose(logp, torch.full((1000,), uniform))
    assert ((chosen >= 0) & (chosen < 24)).all()


# --- loss


def loss_of(newlogprob, logprob, advantage, value, returns, old_value, return_std=1.0, **changes):
    def tensor(x):
        return torch.tensor(x, dtype=torch.float64)

    entropy = torch.full((2,), 1.5, dtype=torch.float64)
    output = ppo.PolicyOutput(None, tensor(newlogprob), entropy, tensor(value))
    advantage = ppo.normalize_advantage(tensor([advantage]))[0]
    batch = ppo.Batch(None, None, tensor(logprob), advantage, tensor(returns), tensor(old_value))
    args = ppo.Args(**(dict(clip_coef=0.2, vf_coef=0.5, ent_coef=0.1) | changes))
    return ppo.ppo_loss(output, batch, args, return_std)


def test_ppo_loss_of_two_samples_by_hand():
    ratio = [1.5, 0.5]
    loss, parts = loss_of(
        [math.log(r) for r in ratio], [0.0, 0.0], [3.0, 1.0], [2.0, 2.0], [4.0, 1.0], [0.0, 0.0]
    )
    # advantages normalise to +1, -1: min(1.5, 1.2) and min(-0.5, -0.8)
    assert parts["policy_loss"].item() == pytest.approx(-(1.2 - 0.8) / 2, abs=1e-7)
    assert parts["value_loss"].item() == pytest.approx((4 + 1) / 2)
    assert parts["approx_kl"].item() == pytest.approx(sum(r - 1 - math.log(r) for r in ratio) / 2)
    assert parts["clipfrac"].item() == 1.0
    assert loss.item() == pytest.approx(-0.2 + 0.5 * 2.5 - 0.1 * 1.5, abs=1e-7)


def test_value_loss_is_measured_in_units_of_the_returns_standard_deviation():
    _, parts = loss_of([0, 0], [0, 0], [1, 2], [2.0, 2.0], [4.0, 1.0], [0, 0], return_std=10.0)
    assert parts["value_loss"].item() == pytest.approx(2.5 / 100)


def test_clipped_value_loss_takes_the_larger_error():
    # value moved by 2 from 0 and is clipped to 0.2: errors 2 and 3.8 of the first, 1 and -0.8
    _, parts = loss_of([0, 0], [0, 0], [1, 2], [2.0, 2.0], [4.0, 1.0], [0.0, 0.0], clip_vloss=True)
    assert parts["value_loss"].item() == pytest.approx((3.8**2 + 1.0) / 2)


def test_gradient_of_the_first_update_is_that_of_the_plain_policy_gradient():
    logprob = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)
    zeros = torch.zeros(4, dtype=torch.float64)
    output = ppo.PolicyOutput(None, logprob, zeros, zeros)
    normalised = (advantage - advantage.mean()) / advantage.std(correction=0)
    batch = ppo.Batch(None, None, zeros, normalised, zeros, zeros)
    loss, _ = ppo.ppo_loss(output, batch, ppo.Args(ent_coef=0.0))
    loss.backward()
    torch.testing.assert_close(logprob.grad, -normalised / 4, rtol=1e-6, atol=1e-8)


# --- the fast path


def random_batch(agent, dtype, rows=64):
    generator = torch.Generator().manual_seed(3)
    obs = torch.randn(rows, 13, generator=generator)
    with torch.no_grad():
        sampled = agent(obs, noise=noise_for(obs, seed=4))
    advantage, returns = torch.randn(2, rows, generator=generator)
    # Ratios on both sides of the clipping range.
    logprob = sampled.logprob + 0.3 * torch.randn(rows, generator=generator)
    action = sampled.action._replace(presquash=sampled.action.presquash.to(dtype))
    rest = (part.to(dtype) for part in (logprob, advantage, 20.0 + 5.0 * returns, sampled.value))
    return ppo.Batch(obs.to(dtype), action, *rest)


def plain_step(agent, args):
    """The gradient step and its optimiser."""
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5, fused=True)
    return functools.partial(ppo.gradient_step, agent, optimizer, args), optimizer


def compiled_step(agent, args):
    """The same as one graph, for 64 samples; compiling it leaves no trace."""
    optimizer = torch.optim.Adam([compiled.flatten_weights(agent)], eps=1e-5, fused=True)
    args = dataclasses.replace(args, num_envs=64, minibatch_size=64)
    _, step = ppo.compile_learner(agent, optimizer, args, ranks.ALONE)
    return step, optimizer


def assert_same_updates(dtype, args, rtol, device="cpu"):
    plain_agent, fast_agent = (make_agent(args.policy, state_std=args.state_std) for _ in range(2))
    batch = random_batch(plain_agent, dtype)
    batch = tree_map(lambda part: part.to(device), batch)
    plain, plain_optimizer = plain_step(plain_agent.to(device, dtype), args)
    fast, fast_optimizer = compiled_step(fast_agent.to(device, dtype), args)
    for agent in (plain_agent, fast_agent):
        agent.set_return_scale(batch.returns)  # read by the graph, not frozen into it
    for k in range(6):
        for optimizer in (plain_optimizer, fast_optimizer):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + k)
        expected, parts = plain(batch), fast(batch)
        assert parts.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(parts[name], expected[name], rtol=rtol, atol=rtol)
    started = make_agent(args.policy, state_std=args.state_std).to(device, dtype)
    for weight, expected, start in zip(
        *(agent.parameters() for agent in (fast_agent, plain_agent, started)), strict=True
    ):
        torch.testing.assert_close(weight, expected, rtol=rtol, atol=rtol * 0.1)
        assert not torch.equal(expected, start)


# Rounding is amplified by Adam where a gradient is near zero: hence the factor above 1e-6.
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 2e-3)], ids=["float64", "float32"]
)
@pytest.mark.parametrize(
    "changes",
    [
        dict(policy="factored", state_std=False),
        dict(policy="autoregressive", clip_vloss=True, max_grad_norm=1e9),
    ],
    ids=["factored", "autoregressive"],
)
def test_the_pure_step_gives_the_same_updates_as_the_plain_one(dtype, rtol, changes, monkeypatch):
    monkeypatch.setattr(compiled, "compile_function", lambda function, device: function)
    assert_same_updates(dtype, ppo.Args(**changes), rtol)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 2e-3)], ids=["float64", "float32"]
)
def test_the_compiled_step_gives_the_same_updates_as_the_plain_one(dtype, rtol):
    assert_same_updates(dtype, ppo.Args(), rtol)


@no_cuda
def test_a_step_replayed_on_cuda_gives_the_same_updates_as_the_plain_one():
    assert_same_updates(torch.float64, ppo.Args(), 1e-9, device="cuda")


def test_a_graph_is_made_from_inputs_that_are_not_one_tensor(monkeypatch, tmp_path):
    seen = []

    def record(function, device):
        return lambda *inputs: (
            seen.append(tree_map(torch.Tensor.data_ptr, inputs)) or function(*inputs)
        )

    monkeypatch.setattr(compiled, "compile_function", record)
    agent = make_agent()
    optimizer = torch.optim.Adam([compiled.flatten_weights(agent)])
    ppo.compile_learner(agent, optimizer, small_args(tmp_path), ranks.ALONE)
    assert len(seen) == 2  # acting and learning
    for inputs in seen:
        addresses = tree_leaves(inputs)
        assert len(set(addresses)) == len(addresses) > 2


def test_the_weights_of_a_compiled_step_stay_those_of_the_agent(monkeypatch):
    monkeypatch.setattr(compiled, "compile_function", lambda function, device: function)
    agent = make_agent()
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    step, _ = compiled_step(agent, ppo.Args())
    assert all(torch.equal(before[name], value) for name, value in agent.state_dict().items())
    with torch.no_grad():
        step.flat.zero_()
    assert all(not parameter.any() for parameter in agent.parameters())


def test_auto_compiles_long_runs_only():
    long, short = (read_options("--preset", name) for name in ("source", "quick"))
    assert compiled.worth_compiling(long.num_updates)
    short = dataclasses.replace(short, num_iterations=2)
    assert not compiled.worth_compiling(short.num_updates)


def test_a_run_makes_so_many_gradient_steps(tmp_path, monkeypatch):
    args, steps = small_args(tmp_path, num_epochs=3, minibatch_size=200), []
    plain = ppo.gradient_step
    monkeypatch.setattr(ppo, "gradient_step", lambda *a, **k: steps.append(1) or plain(*a, **k))
    ppo.train(args)
    assert len(steps) == args.num_updates == 12


def test_the_faster_products_are_still_float32():
    before = torch.get_float32_matmul_precision()
    factor = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    with devices.fast_float32(torch.device("cpu")):
        product = factor @ factor
    torch.testing.assert_close(
        product.double(), factor.double() @ factor.double(), rtol=0, atol=1e-4
    )
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.slow
def test_a_machine_without_a_compiler_gets_one_line_that_names_the_fallback(tmp_path):
    command = [sys.executable, str(TRAINER), "--preset", "quick", "--compile", "on"]
    command += ["--num-envs", "50", "--minibatch-size", "50", "--no-oracle"]
    environment = os.environ | {
        "CXX": "/absent/g++",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "c"),
    }
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "--compile on" in errors[0]
    assert "use --compile off" in errors[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


def test_auto_goes_on_without_a_compiler(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compiled, "worth_compiling", lambda num_updates: True)

    make_envs = runs.make_envs

    def refuse_to_compile(*args, compile=False, **kwargs):
        if compile:
            raise CompileError("no C++ compiler")
        return make_envs(*args, **kwargs)

    monkeypatch.setattr(runs, "make_envs", refuse_to_compile)
    summary = ppo.train(small_args(tmp_path))
    assert summary["compiled"] is False
    assert "going on without: no C++ compiler" in capsys.readouterr().err


def test_bfloat16_on_hardware_without_it_is_refused_with_the_fallback(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    with pytest.raises(errors.UsageError, match="no bfloat16 arithmetic .* use --precision fp32"):
        ppo.train(small_args(tmp_path, precision="bf16"))


# --- training


def test_a_toy_hybrid_task_is_solved(toy_env, tmp_path):
    # No patient near the scar size at which the answer changes: the task has a clear optimum.
    table = pd.read_csv(ROOT / "patients" / "cohort.csv")
    clear = table[(table["scar_fraction_pct"] - 20.0).abs() > 5.0].head(400)
    clear.to_csv(tmp_path / "clear.csv", index=False)
    args = ppo.Args(
        env_id=toy_env,
        cohort=tmp_path / "clear.csv",
        holdout_cohort=tmp_path / "clear.csv",
        num_envs=400,
        num_iterations=15,
        num_steps=10,
        num_epochs=4,
        minibatch_size=400,
        hidden_dim=64,
        learning_rate=3e-3,
        oracle=False,
        output_dir=tmp_path / "run",
    )
    summary = ppo.train(args)
    # 3 x (3 + 1) points of gain, 0.5 of optimal probability and the novelty bonus of 0.1
    assert summary["holdout_deterministic_reward"] > 0.97 * 12.6


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    for name, num_patients in (("cohort", 20), ("cohort_holdout", 15)):
        table = pd.read_csv(ROOT / "patients" / f"{name}.csv").head(num_patients)
        table.to_csv(folder / f"{name}.csv", index=False)
    args = small_args(
        folder,
        cohort=folder / "cohort.csv",
        holdout_cohort=folder / "cohort_holdout.csv",
        oracle=True,
    )
    return args, ppo.train(args)


def test_a_run_leaves_every_promised_file(finished_run):
    args, _ = finished_run
    files = {str(path.relative_to(args.output_dir)) for path in args.output_dir.rglob("*.*")}
    every = {*directory.RUN_FILES, "checkpoints/checkpoint-000002.pt"}
    assert files == every - {directory.WANDB_FILE}  # it is not tracked


def test_summary_holds_the_promised_figures(finished_run):
    args, returned = finished_run
    summary = json.loads((args.output_dir / "summary.json").read_text())
    promised = (
        "mean_reward max_reward optimal_rate entropy train_deterministic_reward "
        "holdout_deterministic_reward train_regret train_regret_p95 train_fraction_of_oracle "
        "holdout_regret holdout_regret_p95 holdout_fraction_of_oracle "
        "samples wall_seconds samples_per_second seed world_size "
        "device versions"
    ).split()
    assert set(promised) <= set(summary)
    assert (summary["samples"], summary["interrupted"]) == (800, False)
    assert summary["mean_reward"] == returned["mean_reward"]


def test_metrics_have_a_row_per_iteration_and_the_columns_of_the_table(finished_run):
    args, _ = finished_run
    table = pd.read_csv(args.output_dir / "metrics.csv")
    assert table["iteration"].tolist() == [1, 2]
    assert table["global_step"].tolist() == [400, 800]
    assert np.isfinite(table.to_numpy()).all()  # no blank: this run has an oracle
    assert table.columns.tolist() == [metric.name for metric in metrics.METRICS]


def test_terms_of_the_reward_add_up_to_it_in_every_row(finished_run):
    args, _ = finished_run
    table = pd.read_csv(args.output_dir / "metrics.csv")
    terms = table[list(RewardTerms._fields)]
    assert terms.sum(axis=1).to_numpy() == pytest.approx(table["mean_reward"].to_numpy(), rel=1e-5)


def test_policy_designs_are_what_the_environment_says_of_the_deterministic_action(finished_run):
    args, _ = finished_run
    agent, _ = policies.load_policy(args.output_dir / "stage2_policy.pt", ppo.Agent, "cpu")
    cohort = hydrogel_gym.load_cohort(args.cohort)
    designs = evaluation.policy_designs(
        agent.design, environments.make_envs(args, cohort, torch.device("cpu"))
    )
    model = hydrogel_gym.load_reward_model("mechanistic")
    design = [designs[name] for name in ("polymer_id", "formulation", "coverage")]
    outcomes = model(cohort.features.float(), *design)
    for name, value in outcomes._asdict().items():
        torch.testing.assert_close(designs[name], value)
    torch.testing.assert_close(designs["reward"], hydrogel_gym.compute_reward(outcomes))
    obs = torch.cat([cohort.features.float(), torch.zeros(len(cohort), 2)], -1)
    torch.testing.assert_close(
        designs["formulation"], agent.to_env(agent(obs).action)["formulation"]
    )


@pytest.mark.parametrize("cohort", ["train", "holdout"])
def test_regret_is_the_distance_to_the_oracle_of_the_same_patients(finished_run, cohort):
    args, summary = finished_run
    path = args.cohort if cohort == "train" else args.holdout_cohort
    best = best_designs(path).score
    agent, _ = policies.load_policy(args.output_dir / "stage2_policy.pt", ppo.Agent, "cpu")
    patients = hydrogel_gym.load_cohort(path).features.float()
    action = agent(torch.cat([patients, torch.zeros(len(patients), 2)], -1))
    design = agent.to_env(action.action)
    model = hydrogel_gym.load_reward_model("mechanistic")
    reward = hydrogel_gym.compute_reward(model(patients, *design.values()))
    regret = best - reward
    assert summary[f"{cohort}_regret"] == pytest.approx(regret.mean().item(), rel=1e-4)
    p95 = np.percentile(regret.detach().numpy(), 95)
    assert summary[f"{cohort}_regret_p95"] == pytest.approx(p95, rel=1e-4)
    fraction = (reward.mean() / best.mean()).item()
    assert summary[f"{cohort}_fraction_of_oracle"] == pytest.approx(fraction, rel=1e-4)
    last = pd.read_csv(args.output_dir / "metrics.csv").iloc[-1]
    for name in metrics.YARDSTICK:
        assert last[f"{cohort}_{name}"] == pytest.approx(summary[f"{cohort}_{name}"], rel=1e-6)


def test_oracle_is_kept_beside_the_run_for_the_next_one(finished_run, monkeypatch):
    args, _ = finished_run
    assert len(list((args.output_dir.parent / "oracle").iterdir())) == 2
    monkeypatch.setattr("hydrogel_gym.oracle.best.search", None)  # a search would fail
    again = dataclasses.replace(args, num_iterations=1, output_dir=args.output_dir.parent / "next")
    assert ppo.train(again)["holdout_regret"] > 0


def test_learner_sees_stricter_limits_and_the_report_the_true_ones(tmp_path):
    args = small_args(tmp_path, limit_margin=0.01, penalty_scale=3.0, horizon=2)
    envs = environments.make_envs(
        args, hydrogel_gym.load_cohort(), torch.device("cpu"), num_envs=100
    )
    obs, _ = envs.reset(seed=0)
    generator = torch.Generator().manual_seed(0)
    _, batch, infos = ppo.rollout(envs, make_agent(), obs, args, generator)
    learnt = batch.returns.view(infos["reward"].shape)
    plain = dataclasses.replace(args, limit_margin=0.0, penalty_scale=1.0)
    obs, _ = envs.reset(seed=0)
    _, plain_batch, same = ppo.rollout(
        envs, make_agent(), obs, plain, torch.Generator().manual_seed(0)
    )
    assert torch.equal(infos["reward"], same["reward"])
    # The last step of an episode: its return is its reward.
    strict, true = learnt[1::2], plain_batch.returns.view(infos["reward"].shape)[1::2]
    torch.testing.assert_close(true, infos["reward"][1::2])
    breached = sum(infos[f"reward_{name}"] for name in metrics.SAFETY_LIMITS)[1::2]
    assert (strict <= true + 2.0 * breached + 1e-4).all()
    assert (strict < true + 2.0 * breached - 1e-4).any()  # the margin
    assert (strict - true).abs().min() == 0.0


@pytest.mark.parametrize("mode", ["score", "improvement"])
def test_learner_is_paid_by_the_limits_of_its_own_environment(
    mode, tmp_path, register_design, monkeypatch
):
    config = hydrogel_gym.RewardConfig(toxicity_limit=0.05, integrity_penalty=4.0)
    env_id = register_design("OtherLimits-v0", reward_config=config, reward_mode=mode)
    args = small_args(tmp_path, env_id=env_id, horizon=3, num_steps=6, num_envs=500)
    paid, plain = [], ppo.compute_gae
    monkeypatch.setattr(ppo, "compute_gae", lambda *a: paid.append(a[0]) or plain(*a))
    envs = environments.make_envs(
        args, hydrogel_gym.load_cohort(), torch.device("cpu"), num_envs=500
    )
    obs, _ = envs.reset(seed=0)
    generator = torch.Generator().manual_seed(0)
    _, _, infos = ppo.rollout(envs, make_agent(), obs, args, generator)

    outcomes = hydrogel_gym.Outcomes(*(infos[name] for name in hydrogel_gym.Outcomes._fields))
    is_novel = infos["reward_novelty"] > 0.0
    strict, of_another = (
        hydrogel_gym.compute_reward(
            outcomes, is_novel, limits.stricter(args.limit_margin, args.penalty_scale)
        )
        for limits in (config, hydrogel_gym.RewardConfig())
    )
    assert (strict != of_another).float().mean() > 0.05
    if mode == "improvement":
        score = sum(infos[name] for name in RewardTerms._fields).view(2, 3, -1)
        none_yet = torch.zeros_like(score[:, :1])
        best_before = torch.cat([none_yet, score[:, :-1]], 1).cummax(1).values.view_as(strict)
        strict = (strict - best_before).clamp_min(0.0)
        assert 0.1 < (strict == 0.0).float().mean() < 0.9
    torch.testing.assert_close(paid[0], strict, rtol=1e-5, atol=1e-5)


class ForeignEnvs(gym.vector.VectorEnv):
    """Design environments that say nothing of themselves but what Gymnasium asks for."""

    def __init__(self, num_envs, **settings):
        self.inner = hydrogel_gym.HydrogelVectorEnv(num_envs, **settings)
        names = "num_envs metadata action_space single_action_space"
        for name in (*names.split(), "observation_space", "single_observation_space"):
            setattr(self, name, getattr(self.inner, name))

    def reset(self, **options):
        return self.inner.reset(**options)

    def step(self, action):
        return self.inner.step(action)


def test_learner_of_an_environment_that_names_no_limits_takes_its_reward_as_it_is(
    tmp_path, register_design
):
    env_id = register_design("Foreign-v0", make_envs=ForeignEnvs)
    args = small_args(tmp_path, env_id=env_id, horizon=2, checkpoint_interval=0)
    with pytest.raises(errors.UsageError, match="pass --limit-margin 0 --penalty-scale 1$"):
        ppo.train(args)
    assert not args.output_dir.exists()
    plain = dict(limit_margin=0.0, penalty_scale=1.0)
    foreign = ppo.train(dataclasses.replace(args, **plain))
    ours = small_args(tmp_path, horizon=2, output_dir=tmp_path / "ours", **plain)
    assert foreign["mean_reward"] == ppo.train(ours)["mean_reward"]
    assert pd.read_csv(args.output_dir / "metrics.csv")["reward_model_seconds"].isna().all()


def test_without_the_oracle_nothing_is_searched_and_regret_is_left_blank(tmp_path, monkeypatch):
    monkeypatch.setattr("hydrogel_gym.oracle.best.search", None)
    args = small_args(tmp_path)
    summary = ppo.train(args)
    assert summary["train_regret"] is None
    assert pd.read_csv(args.output_dir / "metrics.csv")["holdout_regret"].isna().all()
    assert not (tmp_path / "oracle").exists()


def test_a_reward_model_that_the_oracle_cannot_use_is_a_bad_request(tmp_path, toy_env, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("outcome is nan")

    monkeypatch.setattr(evaluation, "best_designs", refuse)
    with pytest.raises(errors.UsageError, match="the oracle cannot search: outcome is nan"):
        ppo.train(small_args(tmp_path, oracle=True))


def test_the_learned_polymer_shares_sum_to_one(finished_run):
    _, summary = finished_run
    assert sum(summary["polymer_share"].values()) == pytest.approx(1.0, abs=1e-5)
    assert tuple(summary["polymer_share"]) == hydrogel_gym.load_polymers().names


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(finished_run, tmp_path):
    args, _ = finished_run
    weights = []
    for seed, name in ((args.seed, "again"), (args.seed + 1, "other")):
        output_dir = tmp_path / name
        ppo.train(dataclasses.replace(args, seed=seed, output_dir=output_dir, oracle=False))
        agent, _ = policies.load_policy(tmp_path / name / "stage2_policy.pt", ppo.Agent, "cpu")
        weights.append(agent.state_dict())
    first = policies.load_policy(args.output_dir / "stage2_policy.pt", ppo.Agent, "cpu")[
        0
    ].state_dict()
    assert all(torch.equal(first[name], weights[0][name]) for name in first)
    assert not torch.equal(first["encoder.0.weight"], weights[1]["encoder.0.weight"])


def test_training_leaves_the_observation_statistics_of_the_cohort_in_the_policy(finished_run):
    args, _ = finished_run
    agent, _ = policies.load_policy(args.output_dir / "stage2_policy.pt", ppo.Agent, "cpu")
    features = hydrogel_gym.load_cohort(args.cohort).features.float()
    features = features[torch.arange(args.num_envs) % len(features)]
    torch.testing.assert_close(agent.obs_mean[:11], features.mean(0))
    torch.testing.assert_close(agent.obs_std[:11], features.std(0))


@pytest.mark.parametrize("policy", ["factored", "autoregressive"])
def test_episodes_of_several_steps_train(tmp_path, policy):
    summary = ppo.train(small_args(tmp_path, horizon=3, num_steps=6, policy=policy))
    assert math.isfinite(summary["holdout_deterministic_reward"])


def test_a_policy_file_loads_without_running_code(finished_run):
    args, _ = finished_run
    saved = torch.load(args.output_dir / "stage2_policy.pt", weights_only=True)
    assert saved["training_config"]["num_envs"] == 100
    assert saved["architecture"]["policy"] == args.policy


class _Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_a_malicious_policy_file_executes_nothing(tmp_path):
    torch.save(_Payload(), tmp_path / "policy.pt")
    with pytest.raises(errors.UsageError, match="cannot be used: Weights only load failed"):
        policies.load_policy(tmp_path / "policy.pt", ppo.Agent, "cpu")


@pytest.mark.parametrize("size", [0, 3, 20_000])
def test_a_policy_file_that_is_cut_off_is_refused_in_words(finished_run, tmp_path, size):
    args, _ = finished_run
    whole = (args.output_dir / "stage2_policy.pt").read_bytes()
    (tmp_path / "policy.pt").write_bytes(whole[:size])
    with pytest.raises(errors.UsageError, match="it is cut off, or is no policy"):
        policies.load_policy(tmp_path / "policy.pt", ppo.Agent, "cpu")


def test_a_policy_of_another_polymer_table_is_refused(finished_run, tmp_path):
    args, _ = finished_run
    saved = torch.load(args.output_dir / "stage2_policy.pt", weights_only=True)
    saved["polymers"][3] = "Unobtainium"
    torch.save(saved, tmp_path / "policy.pt")
    with pytest.raises(errors.UsageError, match="another polymer table"):
        policies.load_policy(tmp_path / "policy.pt", ppo.Agent, "cpu")


def test_a_policy_of_an_earlier_version_is_read_whatever_settings_it_had(finished_run, tmp_path):
    args, _ = finished_run
    saved = torch.load(args.output_dir / "stage2_policy.pt", weights_only=True)
    saved["training_config"] |= {"reward_precision": "fp32", "evaluate": None, "colour": "blue"}
    torch.save(saved, tmp_path / "policy.pt")
    agent, content = policies.load_policy(tmp_path / "policy.pt", ppo.Agent, "cpu")
    for name, value in saved["policy_state_dict"].items():
        assert torch.equal(agent.state_dict()[name], value)
    problem = runs.ProblemOptions.of(content["training_config"])
    assert problem == runs.ProblemOptions(cohort=args.cohort, holdout_cohort=args.holdout_cohort)


# --- bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--policy", "greedy"], "'greedy'"),
        (["--compile", "maybe"], "'maybe'"),
        (["--preset", "slow"], "--preset is 'slow'; allowed: source, quick"),
        (["--num-iterations", "many"], "--num-iterations"),
        (["--minibatch-size", "999"], "--minibatch-size is 999, which does not divide"),
        (["--num-steps", "0"], "--num-steps is 0; allowed: 1 or more"),
        (["--gamma", "1.5"], "--gamma is 1.5; allowed: 0 to 1"),
        (["--learning-rate", "nan"], "--learning-rate is nan; allowed: above 0"),
        (["--seed=-1"], "--seed is -1; allowed: 0 or more"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--cohort", "absent.csv"], "absent.csv"),
        (["--env-id", "Absent-v0"], "Absent"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_bad_request_ends_in_one_line_before_anything_is_written(
    flags, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert ppo.main(["--preset", "quick", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", REMOVED_FLAGS)
@pytest.mark.parametrize(
    "spelled",
    [
        lambda flag: [flag, "x"],
        lambda flag: [f"{flag}=x"],
        lambda flag: [f"--{flag[2:].replace('-', '_')}", "x"],
        lambda flag: ["--preset", "quick", f"--{flag[2:].replace('-', '_')}=x", "--seed", "3"],
    ],
    ids=["two words", "one word", "underscores", "among others"],
)
def test_a_flag_of_earlier_versions_is_answered_with_what_replaces_it(
    flag, spelled, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert ppo.main(spelled(flag)) == 2
    assert capsys.readouterr().err == f"error: {flag} is gone; {REMOVED_FLAGS[flag]}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_policy_is_evaluated_by_a_script_of_its_own():
    expected = "error: --evaluate is gone; use python train/evaluate.py POLICY"
    with pytest.raises(errors.UsageError) as refused:
        read_options("--evaluate", "runs/quick-s1")
    assert f"error: {refused.value}" == expected


def test_the_refused_minibatch_is_answered_with_sizes_that_divide(tmp_path):
    with pytest.raises(errors.UsageError, match=r"near it these do: 50, 80, 100, 200"):
        ppo.train(small_args(tmp_path, minibatch_size=150))


def test_a_directory_that_holds_a_run_is_refused_and_left_alone(finished_run):
    args, _ = finished_run
    before = {path: path.read_bytes() for path in args.output_dir.rglob("*.*")}
    with pytest.raises(errors.UsageError, match=r"already contains a run .*--overwrite"):
        ppo.train(args)
    assert {path: path.read_bytes() for path in args.output_dir.rglob("*.*")} == before


def test_overwrite_replaces_a_run(tmp_path):
    args = small_args(tmp_path, num_iterations=1, overwrite=True)
    ppo.train(args)
    ppo.train(small_args(tmp_path, num_iterations=2, overwrite=True))
    assert len(pd.read_csv(args.output_dir / "metrics.csv")) == 2


def test_an_unwritable_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.UsageError, match="cannot be written to"):
        ppo.train(small_args(tmp_path, output_dir=tmp_path / "file" / "run"))


def test_every_preset_field_can_be_overridden_on_the_command_line():
    for preset, fields in ppo.PRESETS.items():
        for name, value in fields.items():
            other = "factored" if value == "autoregressive" else "autoregressive"
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                changed = not value
                flags = [flag if changed else f"--no-{flag[2:]}"]
            else:
                changed = other if isinstance(value, str) else value * 2
                flags = [flag, str(changed)]
            args = read_options("--preset", preset, *flags)
            assert getattr(args, name) == changed


def test_the_source_preset_keeps_the_sources_table():
    args = read_options("--preset", "source")
    assert (args.clip_coef, args.vf_coef, args.ent_coef) == (0.2, 0.5, 0.01)
    assert (args.gamma, args.gae_lambda, args.learning_rate) == (0.99, 0.95, 3e-4)
    assert (args.num_epochs, args.max_grad_norm, args.num_envs) == (10, 0.5, 2000)
    assert (args.num_steps, args.num_iterations, args.policy) == (100, 200, "factored")


# --- interruption


def test_an_interrupted_run_saves_what_it_has_and_says_so(
    tmp_path, monkeypatch, capsys, main_with, interruptible
):
    rollouts = 0
    plain_rollout = ppo.rollout

    def interrupted_rollout(*args):
        nonlocal rollouts
        rollouts += 1
        if rollouts == 3:
            signal.raise_signal(signal.SIGINT)
        return plain_rollout(*args)

    monkeypatch.setattr(ppo, "rollout", interrupted_rollout)
    args = small_args(tmp_path, num_iterations=50)
    assert main_with(args) == 130
    assert "interrupted" in capsys.readouterr().err
    summary = json.loads((args.output_dir / "summary.json").read_text())
    assert (summary["interrupted"], summary["iterations"], summary["samples"]) == (True, 3, 1200)
    assert len(pd.read_csv(args.output_dir / "metrics.csv")) == 3
    policies.load_policy(args.output_dir / "stage2_policy.pt", ppo.Agent, "cpu")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    directory.write_json(path, {"a": 1})

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        directory.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.slow
def test_the_script_runs_from_a_shell_and_prints_where_it_wrote(tmp_path):
    command = [sys.executable, str(TRAINER), "--preset", "quick", "--num-envs", "50"]
    command += ["--num-steps", "2", "--num-iterations", "1", "--minibatch-size", "50"]
    command += ["--no-oracle"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "runs/quick-s1" in result.stdout
    assert (tmp_path / "runs" / "quick-s1" / "summary.json").is_file()
