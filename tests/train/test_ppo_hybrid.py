"""The algorithm of the trainer: advantages, heads, loss, updates, and that it learns."""

from __future__ import annotations

import dataclasses
import functools
import math
from importlib.resources import files

import gymnasium as gym
import pandas as pd
import pytest
import torch
from torch.utils._pytree import tree_map

import hydrogel_gym
from hydrogel_gym import errors
from hydrogel_gym.problem.reward import SAFETY_LIMITS, RewardTerms
from hydrogel_gym.runs import compiled, environments, metrics, ranks
from hydrogel_gym.train import ppo_hybrid as ppo

no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("without_pictures")


def make_agent(policy="autoregressive", state_std=True, obs_dim=13):
    torch.manual_seed(0)
    sizes = dict(obs_dim=obs_dim, num_polymers=24, num_coverages=4, hidden_dim=32)
    box = dict(formulation_low=[5.0, 7.0, 0.0, 1.0], formulation_high=[30.0, 180.0, 1.0, 5.0])
    agent = ppo.Agent(policy=policy, state_std=state_std, **sizes, **box)
    # Away from the near-uniform initial policy, so that every head matters.
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    return agent


def noise_for(obs, seed):
    generator = torch.Generator().manual_seed(seed)
    return ppo.draw_noise(len(obs), dim=4, generator=generator)


# --- advantages


@pytest.mark.parametrize(
    ("terminated", "truncated", "next_values", "expected"),
    [
        # deltas: 1 + 10 - 10, 2 + 15 - 20, 3 + 20 - 30
        ([0, 0, 0], [0, 0, 0], [20, 30, 40], [1 - 0.25 * (3 + 0.25 * 7), -3 - 0.25 * 7, -7]),
        # Of the second: 2 - 20, for nothing crosses its end ...
        ([0, 1, 0], [0, 0, 0], [20, 99, 40], [1 + 0.25 * -18, -18, -7]),
        # ... 2 + 30 - 20, but the trace stops ...
        ([0, 0, 0], [0, 1, 0], [20, 60, 40], [1 + 0.25 * 12, 12, -7]),
        # ... and no bootstrap where the step does both.
        ([0, 1, 0], [0, 1, 0], [20, 60, 40], [1 + 0.25 * -18, -18, -7]),
        ([1, 1, 1], [0, 0, 0], [9, 9, 9], [-9, -18, -27]),
    ],
    ids=["no end", "terminated", "truncated", "both", "episodes of one step"],
)
def test_gae_bootstraps_unless_terminated_and_ends_the_trace_with_every_episode(
    terminated, truncated, next_values, expected
):
    rewards, values, after = torch.tensor(
        [[1, 2, 3], [10, 20, 30], next_values], dtype=torch.float64
    ).unsqueeze(-1)
    terminated, truncated = torch.tensor([terminated, truncated], dtype=torch.bool).unsqueeze(-1)
    advantages, returns = ppo.compute_gae(
        rewards, values, after, terminated, terminated | truncated, gamma=0.5, gae_lambda=0.5
    )
    assert advantages.flatten().tolist() == expected
    assert torch.equal(returns, advantages + values)


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


def test_baseline_of_a_patient_takes_off_what_all_episodes_of_one_have_in_common(
    small_run, tmp_path
):
    args = small_run(tmp_path, horizon=2, num_steps=6, num_envs=100)
    envs = environments.make_envs(args, hydrogel_gym.load_cohort(), CPU, num_envs=100)
    plain, centred, drawn = (
        ppo.rollout(
            envs,
            make_agent(),
            envs.reset(seed=0)[0],
            dataclasses.replace(args, **changes),
            torch.Generator().manual_seed(0),
        )[1]
        for changes in (
            dict(patient_baseline=False),
            dict(patient_baseline=True),
            dict(patient_baseline=True, patient_assignment="random"),
        )
    )
    same = plain.advantage.view(3, 2, 100)
    expected = same - (same.sum(0) - same) / 2  # the mean of the two other episodes
    torch.testing.assert_close(centred.advantage.view(3, 2, 100), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(centred.returns, plain.returns)
    assert torch.equal(drawn.advantage, plain.advantage)


def test_baseline_of_a_patient_whose_response_is_seen_is_over_the_checks_of_an_episode(
    small_run, tmp_path
):
    problem = dict(env_id="HydrogelAdapt-v0", horizon=3, observe="response", reward_mode="score")
    problem |= dict(patient_assignment="random", gamma=0.0, num_steps=6, num_envs=48)
    args = small_run(tmp_path, **problem)
    envs = environments.make_envs(args, hydrogel_gym.load_cohort(), CPU, num_envs=48)
    agent = make_agent(obs_dim=19)
    plain, centred = (
        ppo.rollout(
            envs,
            agent,
            envs.reset(seed=0)[0],
            dataclasses.replace(args, patient_baseline=baseline),
            torch.Generator().manual_seed(0),
        )[1].advantage
        for baseline in (False, True)
    )
    same = plain.view(2, 3, 48)
    expected = same - (same.sum(1, keepdim=True) - same) / 2  # the mean of the two other checks
    # Episodes whose designs differ much count for less: all near the typical spread.
    spread = expected.std(1, keepdim=True)
    typical = spread.log().mean().exp()
    expected = expected / (1.0 + spread / typical)
    torch.testing.assert_close(centred.view(2, 3, 48), expected, rtol=1e-4, atol=1e-4)
    assert centred.view(2, 3, 48).std(1).max() < typical < spread.max()


# --- policy


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
    ends = ppo.log_tanh_jacobian(torch.tensor([-60.0, 0.0, 60.0]))  # where tanh saturates
    torch.testing.assert_close(ends, torch.tensor([-118.6137, 0.0, -118.6137]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("policy", ["factored", "autoregressive"])
@pytest.mark.parametrize("state_std", [False, True])
@torch.no_grad()
def test_logprob_and_entropy_are_those_of_the_heads_whose_conditions_are_asked_for(
    policy, state_std
):
    agent = make_agent(policy, state_std=state_std)
    obs = torch.randn(64, 13)
    sampled = agent(obs, noise=noise_for(obs, seed=1))
    evaluated = agent(obs, sampled.action)
    torch.testing.assert_close(evaluated.logprob, sampled.logprob)
    torch.testing.assert_close(evaluated.value, agent.value(obs))

    action = sampled.action
    polymer_in, formulation_in, coverage_in, _ = agent.head_inputs(obs)
    formulation = agent.formulation_distribution(formulation_in, action.polymer_id, None)
    expected = formulation.logprob(action.presquash)
    for logits, chosen in (
        (agent.polymer_head(polymer_in), action.polymer_id),
        (agent.coverage_head(coverage_in, action.polymer_id), action.coverage),
    ):
        expected += torch.distributions.Categorical(logits=logits).log_prob(chosen)
    torch.testing.assert_close(sampled.logprob, expected)

    one = obs[:1].expand(2**14, 13)
    output = agent(one, noise=noise_for(one, seed=1))
    # Standard error of the mean is 0.02 for a joint log-probability with SD of about 2.5.
    assert output.entropy.mean().item() == pytest.approx(-output.logprob.mean().item(), abs=0.06)

    polymer_id, same = torch.arange(24), torch.zeros(64, dtype=torch.int64)
    _, formulation_in, coverage_in, _ = agent.head_inputs(one[:24])
    mean = agent.formulation_distribution(formulation_in, polymer_id, None).mean
    logits = agent.coverage_head(coverage_in, polymer_id)
    for of_polymers in (mean, logits):
        assert bool((of_polymers.std(0) > 1e-4).all()) is (policy == "autoregressive")
    if policy == "autoregressive":  # each reads the block of its own
        every = agent.coverage_head.out(coverage_in.relu()).view(24, -1, 4)
        torch.testing.assert_close(logits, torch.stack([every[i, i] for i in range(24)]))
    inputs = agent.head_inputs(obs)[1]
    log_std = agent.formulation_distribution(inputs, same, None).log_std.expand(64, 4)
    assert bool((log_std.std(0) > 1e-4).all()) is state_std


def test_actions_stay_in_the_box_and_categories_are_chosen_in_proportion():
    extreme = torch.tensor([[-1e4, 1e4, -30.0, 30.0]])
    index = torch.zeros(1, dtype=torch.int64)
    formulation = make_agent().to_env(ppo.HybridAction(index, extreme, index))["formulation"]
    assert formulation.tolist() == [[5.0, 180.0, 0.0, 5.0]]
    uniform = torch.linspace(0.0, 1.0 - 2.0**-24, 4001)
    logp = torch.tensor([0.1, 0.0, 0.6, 0.3]).log().expand(4001, 4)
    share = torch.bincount(ppo.choose(logp, uniform), minlength=4) / 4001
    torch.testing.assert_close(share, logp[0].exp(), atol=1e-3, rtol=0)
    logp = torch.randn(1000, 24, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    for end in (0.0, 1.0 - 2.0**-24):
        chosen = ppo.choose(logp, torch.full((1000,), end))
        assert ((chosen >= 0) & (chosen < 24)).all()


# --- loss


def loss_of(newlogprob, return_std=1.0, **changes):
    """Of two samples: advantages that normalise to +1 and -1, values 2 and 2, returns 4 and 1."""
    newlogprob, zeros, entropy, value, returns = (
        torch.as_tensor(each, dtype=torch.float64)
        for each in (newlogprob, [0, 0], [1.5, 1.5], [2, 2], [4, 1])
    )
    output = ppo.PolicyOutput(None, newlogprob, entropy, value)
    advantage = ppo.normalize_advantage(torch.tensor([[3.0, 1.0]], dtype=torch.float64))[0]
    batch = ppo.Batch(None, None, zeros, advantage, returns, zeros)
    args = ppo.Args(**(dict(clip_coef=0.2, vf_coef=0.5, ent_coef=0.1) | changes))
    return ppo.ppo_loss(output, batch, args, return_std)


def test_ppo_loss_of_two_samples_by_hand():
    ratio = [1.5, 0.5]
    loss, parts = loss_of([math.log(r) for r in ratio])
    # min(1.5, 1.2) and min(-0.5, -0.8)
    assert parts["policy_loss"].item() == pytest.approx(-(1.2 - 0.8) / 2, abs=1e-7)
    assert parts["value_loss"].item() == pytest.approx((4 + 1) / 2)
    assert parts["approx_kl"].item() == pytest.approx(sum(r - 1 - math.log(r) for r in ratio) / 2)
    assert parts["clipfrac"].item() == 1.0
    assert loss.item() == pytest.approx(-0.2 + 0.5 * 2.5 - 0.1 * 1.5, abs=1e-7)
    # In standard deviations of the return.
    assert loss_of([0, 0], return_std=10.0)[1]["value_loss"].item() == pytest.approx(2.5 / 100)
    # The value moved by 2 from 0 and is clipped to 0.2: errors 2 and 3.8 of the first, 1 and -0.8.
    _, parts = loss_of([0, 0], clip_vloss=True)
    assert parts["value_loss"].item() == pytest.approx((3.8**2 + 1.0) / 2)
    # The gradient of the first update is that of the plain policy gradient.
    logprob = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loss_of(logprob)[0].backward()
    torch.testing.assert_close(logprob.grad, torch.tensor([-0.5, 0.5], dtype=torch.float64))


# --- updates


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


def step_of(agent, args, pure):
    """The gradient step on 64 samples, as one function or not, and its optimiser."""
    weights = [compiled.flatten_weights(agent)] if pure else list(agent.parameters())
    optimizer = torch.optim.Adam(weights, eps=1e-5, fused=True)
    if not pure:
        return functools.partial(ppo.gradient_step, agent, optimizer, args), optimizer
    args = dataclasses.replace(args, num_envs=64, minibatch_size=64)
    return ppo.compile_learner(agent, optimizer, args, ranks.ALONE)[1], optimizer


FACTORED = dict(policy="factored", state_std=False)
UNCLIPPED = dict(clip_vloss=True, max_grad_norm=1e9)


# Rounding is amplified by Adam where a gradient is near zero: hence the factor above 1e-6.
@pytest.mark.parametrize(
    ("dtype", "rtol", "device", "compile", "changes"),
    [
        (torch.float64, 1e-9, "cpu", False, FACTORED),
        (torch.float64, 1e-9, "cpu", False, UNCLIPPED),
        pytest.param(torch.float64, 1e-9, "cpu", True, {}, marks=pytest.mark.slow),
        pytest.param(torch.float32, 2e-3, "cpu", True, {}, marks=pytest.mark.slow),
        pytest.param(torch.float64, 1e-9, "cuda", True, {}, marks=no_cuda),
    ],
)
def test_the_pure_step_compiled_or_not_gives_the_same_updates_as_the_plain_one(
    request, dtype, rtol, device, compile, changes
):
    if not compile:
        request.getfixturevalue("uncompiled")
    args = ppo.Args(**changes)
    agents = [make_agent(args.policy, state_std=args.state_std) for _ in range(3)]
    batch = tree_map(lambda part: part.to(device), random_batch(agents[0], dtype))
    for agent in agents:
        agent.to(device, dtype)
    steps, optimizers = zip(*(step_of(agents[i], args, pure=i == 1) for i in (0, 1)), strict=True)
    for agent in agents:
        agent.set_return_scale(batch.returns)  # read by the graph, not frozen into it
    for k in range(6):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + k)
        expected, parts = (step(batch) for step in steps)
        assert parts.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(parts[name], expected[name], rtol=rtol, atol=rtol)
    for expected, weight, start in zip(*(agent.parameters() for agent in agents), strict=True):
        torch.testing.assert_close(weight, expected, rtol=rtol, atol=rtol * 0.1)
        assert not torch.equal(expected, start)


def test_target_kl_ends_the_epochs_of_all_ranks_by_the_mean_over_them():
    zeros = torch.zeros(8)
    batch = ppo.Batch(zeros, ppo.HybridAction(zeros, zeros, zeros), *[zeros] * 4)
    args = ppo.Args(minibatch_size=4, num_epochs=5, target_kl=0.1)
    kl = iter([1.0, 0.0, 0.0, 0.15, 0.0, 9.0])  # the last of an epoch decides

    class World(ranks.World):
        def average(self, values):
            return values / 2 if values.dim() == 0 else values  # of another rank it is 0

    steps = []

    def step(minibatch):
        steps.append(next(kl))
        return {"approx_kl": torch.tensor(steps[-1])}

    ppo.update(step, batch, args, torch.Generator().manual_seed(0), World())
    assert steps == [1.0, 0.0, 0.0, 0.15, 0.0, 9.0]


def test_temperature_is_the_reward_that_a_nat_of_entropy_is_worth_to_the_loss():
    advantage = torch.tensor([[1.0, 3.0, 8.0]])
    args = ppo.Args(temperature=0.3, ent_coef=0.1, num_iterations=101)
    for iteration, temperature in ((1, 0.3), (51, 0.3 * 0.1 ** (100 / 101)), (101, 0.00314)):
        unit = ppo.advantage_unit_at(iteration, args)
        assert args.ent_coef * unit == pytest.approx(temperature, rel=1e-2)
        expected = (advantage - 4.0) * args.ent_coef / temperature
        torch.testing.assert_close(
            ppo.normalize_advantage(advantage, unit), expected, rtol=1e-2, atol=0
        )
    assert ppo.advantage_unit_at(1, ppo.Args()) is None


# --- rollouts


@pytest.mark.parametrize("mode", ["score", "improvement"])
def test_learner_is_paid_by_stricter_limits_of_its_own_environment_and_the_report_by_the_true_ones(
    mode, small_run, tmp_path, register_design, monkeypatch
):
    config = hydrogel_gym.RewardConfig(toxicity_limit=0.05, integrity_penalty=4.0)
    env_id = register_design("OtherLimits-v0", reward_config=config, reward_mode=mode)
    args = small_run(tmp_path, env_id=env_id, horizon=3, num_steps=6, num_envs=500)
    envs = environments.make_envs(args, hydrogel_gym.load_cohort(), CPU, num_envs=500)
    paid, plain = [], ppo.compute_gae
    monkeypatch.setattr(ppo, "compute_gae", lambda *a: paid.append(a[0]) or plain(*a))
    for margin, scale in ((args.limit_margin, args.penalty_scale), (0.0, 1.0)):
        args = dataclasses.replace(args, limit_margin=margin, penalty_scale=scale)
        obs, _ = envs.reset(seed=0)
        generator = torch.Generator().manual_seed(0)
        _, _, infos = ppo.rollout(envs, make_agent(), obs, args, generator)

        outcomes = hydrogel_gym.Outcomes(*(infos[name] for name in hydrogel_gym.Outcomes._fields))
        is_novel = infos["reward_novelty"] > 0.0
        expected, of_another = (
            hydrogel_gym.compute_reward(outcomes, is_novel, limits.stricter(margin, scale))
            for limits in (config, hydrogel_gym.RewardConfig())
        )
        assert (expected != of_another).float().mean() > 0.05
        if mode == "improvement":
            score = sum(infos[name] for name in RewardTerms._fields).view(2, 3, -1)
            none_yet = torch.zeros_like(score[:, :1])
            best = torch.cat([none_yet, score[:, :-1]], 1).cummax(1).values.view_as(expected)
            expected = (expected - best).clamp_min(0.0)
            assert 0.1 < (expected == 0.0).float().mean() < 0.9
        torch.testing.assert_close(paid[-1], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(paid[1], infos["reward"])
    assert not torch.equal(*paid)


def test_learner_that_sees_the_response_is_paid_for_each_design_as_if_no_other_had_been_tried(
    small_run, tmp_path, monkeypatch
):
    problem = dict(env_id="HydrogelAdapt-v0", horizon=8, observe="response", reward_mode="score")
    args = small_run(tmp_path, **problem, num_steps=8, num_envs=50, limit_margin=0.0)
    envs = environments.make_envs(args, hydrogel_gym.load_cohort(), CPU, num_envs=50)
    paid, plain = [], ppo.compute_gae
    monkeypatch.setattr(ppo, "compute_gae", lambda *a: paid.append(a[0]) or plain(*a))
    obs, generator = envs.reset(seed=0)[0], torch.Generator().manual_seed(0)
    _, _, infos = ppo.rollout(envs, make_agent(obs_dim=19), obs, args, generator)
    is_spent = infos["reward_novelty"] == 0.0
    assert 0.05 < is_spent.float().mean() < 0.5
    is_safe = sum(infos[f"reward_{name}"] for name in SAFETY_LIMITS) == 0.0
    expected = infos["reward"] + 0.1 * is_spent
    torch.testing.assert_close(paid[0][is_safe], expected[is_safe], rtol=1e-5, atol=1e-5)


def test_learner_of_an_environment_that_names_no_limits_takes_its_reward_as_it_is(
    small_run, tmp_path, register_design
):
    def foreign_envs(num_envs, **settings):
        """Says nothing of itself but what Gymnasium asks for."""
        inner, envs = hydrogel_gym.HydrogelVectorEnv(num_envs, **settings), gym.vector.VectorEnv()
        names = "num_envs metadata action_space single_action_space observation_space"
        for name in (*names.split(), "single_observation_space", "reset", "step"):
            setattr(envs, name, getattr(inner, name))
        return envs

    env_id = register_design("Foreign-v0", make_envs=foreign_envs)
    ours = small_run(tmp_path / "ours", horizon=2, checkpoint_interval=0, num_iterations=1)
    foreign = dataclasses.replace(ours, env_id=env_id, output_dir=tmp_path / "foreign")
    with pytest.raises(errors.UsageError, match="pass --limit-margin 0 --penalty-scale 1$"):
        ppo.train(foreign)
    assert not foreign.output_dir.exists()
    ours, foreign = (
        ppo.train(dataclasses.replace(args, limit_margin=0.0, penalty_scale=1.0))
        for args in (ours, foreign)
    )
    assert foreign["mean_reward"] == ours["mean_reward"]


# --- training


def test_a_run_makes_so_many_gradient_steps(small_run, tmp_path, monkeypatch):
    args, rates = small_run(tmp_path / "run", num_iterations=2, num_epochs=3), []
    plain = ppo.gradient_step

    def step(agent, optimizer, *rest, **settings):
        rates.append(optimizer.param_groups[0]["lr"])
        return plain(agent, optimizer, *rest, **settings)

    monkeypatch.setattr(ppo, "gradient_step", step)
    ppo.train(args)
    assert len(rates) == args.num_updates == 24
    rate = args.learning_rate  # half a cosine from it to zero
    assert rates == pytest.approx([rate] * 12 + [rate / 2] * 12)
    assert ppo.learning_rate_at(2, dataclasses.replace(args, anneal_lr=False)) == rate


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


def test_a_toy_hybrid_task_is_solved(toy_env, small_run, tmp_path):
    # No patient near the scar size at which the answer changes: the task has a clear optimum.
    table = pd.read_csv(files("hydrogel_gym.patients") / "cohort.csv")
    clear = table[(table["scar_fraction_pct"] - 20.0).abs() > 5.0].head(200)
    path = tmp_path / "clear.csv"
    clear.to_csv(path, index=False)
    sizes = dict(num_envs=200, num_iterations=12, num_epochs=4, minibatch_size=200, hidden_dim=32)
    changes = dict(env_id=toy_env, cohort=path, holdout_cohort=path, learning_rate=1e-2)
    summary = ppo.train(small_run(tmp_path / "run", **sizes, **changes))
    # 3 x (3 + 1) points of gain, 0.5 of optimal probability and the novelty bonus of 0.1
    assert summary["holdout_deterministic_reward"] > 0.97 * 12.6
