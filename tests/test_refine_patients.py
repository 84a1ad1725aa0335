"""Policies fine-tuned for single patients: what they learn, how far they go, what is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hydrogel_gym
from hydrogel_gym.designs import load_designs

PATIENTS = ("P0003", "P0001", "P0002")


@pytest.fixture(
    scope="module",
    params=[
        dict(policy="autoregressive"),
        dict(policy="factored", state_std=False),
    ],
    ids=lambda changes: changes["policy"],
)
def trained(ppo, small_run, tmp_path_factory, request):
    """Directory of a run of forty patients."""
    args = small_run(tmp_path_factory.mktemp("trained") / "run", **request.param)
    ppo.train(args)
    return args.output_dir


@pytest.fixture(scope="module")
def refined(refiner, trained):
    """Folder of three refined patients."""
    refiner.run(settings(refiner, trained))
    return trained / "refined"


def settings(refiner, trained, **changes):
    defaults = dict(
        policy=trained,
        patient=PATIENTS,
        num_copies=64,
        num_iterations=8,
        top_k=12,
        learning_rate=1e-2,
    )
    return refiner.Args(**(defaults | changes))


@pytest.fixture
def base(ppo, generator, trained):
    """The policy for all, its patients, their environments and its reward for each."""
    agent, saved = ppo.load_policy(trained / "stage2_policy.pt", "cpu")
    cohort = hydrogel_gym.load_cohort(saved["training_config"]["cohort"])
    envs = generator.environments(saved["training_config"], cohort, torch.device("cpu"))
    return agent, cohort, envs, ppo.policy_designs(agent, envs)["reward"]


@pytest.fixture
def tuner(refiner, trained, base):
    """Tuner of three patients, its agent and their observations."""
    agent, cohort, envs, _ = base
    problem = envs.unwrapped.problem
    rows = [cohort.index(patient_id) for patient_id in PATIENTS]
    obs = envs.reset()[0][rows]
    args = settings(refiner, trained)
    config = problem.params.reward_config
    patients = problem.params.patients[rows]
    return refiner.Tuner(agent, obs, patients, problem, config, args), agent, obs


def drawn(refiner, tuner, count=400):
    """Actions for three patients, (3, count)."""
    torch.manual_seed(0)
    noise = refiner.Noise(torch.rand(3, count, 2), torch.randn(3, count, 4))
    return refiner.sample(tuner.choices(tuner.weights, tuner.inputs), noise)


def test_log_probabilities_are_the_agents(ppo, refiner, tuner):
    tuner, agent, obs = tuner
    action = drawn(refiner, tuner)
    choices = tuner.choices(tuner.weights, tuner.inputs)
    found = torch.func.vmap(refiner.log_prob, in_dims=(0, 0, None))(choices, action, agent.nodes)
    for patient in range(3):
        one = ppo.HybridAction(*(part[patient] for part in action))
        expected = agent(obs[patient].expand(400, -1), one).logprob
        torch.testing.assert_close(found[patient], expected.detach(), rtol=1e-4, atol=1e-4)


def test_samples_and_deterministic_actions_are_the_agents(ppo, refiner, tuner):
    tuner, agent, obs = tuner
    torch.manual_seed(1)
    noise = refiner.Noise(torch.rand(3, 50, 2), torch.randn(3, 50, 4))
    choices = tuner.choices(tuner.weights, tuner.inputs)
    found, sure = refiner.sample(choices, noise), refiner.likeliest(choices)
    for patient in range(3):
        one = ppo.Noise(noise.uniform[patient], noise.normal[patient])
        expected = agent(obs[patient].expand(50, -1), noise=one).action
        assert (found.polymer_id[patient] == expected.polymer_id).all()
        assert (found.coverage[patient] == expected.coverage).all()
        torch.testing.assert_close(found.presquash[patient], expected.presquash.detach())
        expected = agent(obs[patient][None]).action
        assert sure.polymer_id[patient] == expected.polymer_id
        assert sure.coverage[patient] == expected.coverage


def test_gradients_of_patients_tuned_at_once_are_those_of_each_alone(refiner, tuner):
    tuner, _, _ = tuner
    action = drawn(refiner, tuner)
    torch.manual_seed(2)
    advantage = torch.randn(3, 400)
    found = tuner.gradients(tuner.weights, tuner.inputs, action, advantage)
    for patient in range(3):
        weights = {
            name: weight[patient].clone().requires_grad_() for name, weight in tuner.weights.items()
        }
        inputs = tuple(part[patient] for part in tuner.inputs)
        one = refiner.HybridAction(*(part[patient] for part in action))
        choices = torch.func.functional_call(tuner.heads, weights, inputs)
        logp = refiner.log_prob(choices, one, tuner.nodes)
        (-(logp * advantage[patient]).mean()).backward()
        for name, weight in weights.items():
            torch.testing.assert_close(found[name][patient], weight.grad, rtol=1e-4, atol=1e-6)
            assert weight.grad.abs().max() > 0.0, name


def test_divergence_is_the_mean_log_ratio_of_samples(refiner, tuner):
    tuner, agent, _ = tuner
    torch.manual_seed(3)
    for weight in tuner.weights.values():
        weight.add_(0.03 * torch.randn_like(weight))
    new = tuner.choices(tuner.weights, tuner.inputs)
    action = drawn(refiner, tuner, count=100_000)
    logp = torch.func.vmap(refiner.log_prob, in_dims=(0, 0, None))
    ratio = logp(new, action, agent.nodes) - logp(tuner.base_choices, action, agent.nodes)
    found = torch.func.vmap(refiner.divergence)(new, tuner.base_choices)
    error = 5.0 * ratio.std(1) / 100_000**0.5
    assert (found > 0.01).all()
    assert ((found - ratio.mean(1)).abs() < error + 1e-4).all()


def test_no_policy_leaves_the_base_by_more_than_is_allowed(refiner, tuner):
    tuner, _, _ = tuner
    tuner.args.max_kl = 0.02
    tuner.optimizer.param_groups[0]["lr"] = 0.05
    torch.manual_seed(4)
    for _ in range(5):
        noise = refiner.Noise(torch.rand(3, 64, 2), torch.randn(3, 64, 4))
        tuner.step(noise)
        kl = torch.func.vmap(refiner.divergence)(
            tuner.choices(tuner.weights, tuner.inputs), tuner.base_choices
        )
        assert (kl <= 0.02).all()
        assert (kl > 0.001).all()


def test_tuning_raises_the_mean_reward(refiner, tuner):
    tuner, _, _ = tuner
    tuner.args.max_kl = 5.0
    torch.manual_seed(5)
    rewards = []
    for _ in range(60):
        noise = refiner.Noise(torch.rand(3, 256, 2), torch.randn(3, 256, 4))
        rewards.append(tuner.step(noise).reward.mean(1))
    assert (torch.stack(rewards[-5:]).mean(0) > torch.stack(rewards[:5]).mean(0) + 1.0).all()


def test_every_policy_is_whole_and_never_worse_than_the_one_for_all(ppo, base, refined):
    agent, cohort, envs, before = base
    gains = []
    for patient_id in PATIENTS:
        own, content = ppo.load_policy(refined / "patient_policies" / f"{patient_id}.pt", "cpu")
        assert content["patient_id"] == patient_id
        row = cohort.index(patient_id)
        gains.append(float(ppo.policy_designs(own, envs)["reward"][row] - before[row]))
        same = {
            name
            for name, weight in own.state_dict().items()
            if weight.equal(agent.state_dict()[name])
        }
        assert {"encoder.0.weight", "trunk.0.weight", "hidden.weight", "critic.out.bias"} <= same
    # What is compared in tuning is on the grid that designs are made on.
    assert min(gains) > -0.02
    assert max(gains) > 0.1


def test_designs_are_unlike_each_other_and_no_worse_than_what_the_policies_do(base, refined):
    _, cohort, _, before = base
    for patient_id in PATIENTS:
        top = load_designs(refined, patient_id)
        assert len(top) == 12
        columns = ["polymer_id", "coverage", *top.columns[3:7]]
        assert not top.duplicated(columns).any()
        assert top["reward"].is_monotonic_decreasing
        assert top["reward"][0] >= before[cohort.index(patient_id)] - 0.02


def test_a_patient_alone_is_refined_as_among_others(refiner, trained, refined, tmp_path):
    alone = settings(refiner, trained, patient=("P0001",), output_dir=tmp_path / "alone")
    refiner.run(alone)
    one, among = load_designs(alone.output_dir, "P0001"), load_designs(refined, "P0001")
    # Batches of another size round in another way.
    assert one["reward"].to_numpy() == pytest.approx(among["reward"].to_numpy(), abs=1e-2)


def test_who_is_there_is_left_alone_and_the_rest_goes_on(refiner, trained, tmp_path, capsys):
    folder = tmp_path / "refined"
    args = settings(refiner, trained, patient=("P0001",), output_dir=folder)
    assert refiner.run(args)["patients"] == 1
    path = folder / "patient_policies" / "P0001.pt"
    before = path.stat().st_mtime_ns
    args = settings(refiner, trained, output_dir=folder)
    assert refiner.run(args)["patients"] == 2
    assert path.stat().st_mtime_ns == before
    assert refiner.run(args)["patients"] == 0


def test_ranking_takes_refined_designs(ranker, trained, refined):
    ranker.rank(ranker.Args(refined))
    saved = torch.load(refined / "stage2_complete.pt", weights_only=True)
    assert set(saved["per_patient_designs"]) == set(PATIENTS)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--patient", "P9999"], "has no patient 'P9999'; nearest: "),
        (["--num-copies", "1"], "--num-copies is 1; allowed: 2 or more"),
        (["--max-kl", "0"], "--max-kl is 0.0; allowed: above 0"),
        (["--learning-rate", "-1"], "--learning-rate is -1.0; allowed: above 0"),
        (["--seed", "2"], "holds designs of another run"),
    ],
)
def test_bad_input_is_one_line(refiner, trained, refined, capsys, flags, told):
    command = ["--policy", str(trained), "--num-copies", "64", "--num-iterations", "8"]
    command += ["--top-k", "12", "--learning-rate", "1e-2", *flags]
    assert refiner.main(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert told in line


def test_an_outcome_that_is_not_finite_names_the_patient(generator):
    numbers = np.zeros((11, 3), np.float32)
    numbers[4, 2] = np.nan
    with pytest.raises(FloatingPointError, match="patient 'P0001' and the design polymer_id=5"):
        generator.check_finite("P0001", np.array([0, 1, 21], np.uint8), numbers)
