"""Policies fine-tuned for single patients: what they learn, how far they go, what is kept."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

from hydrogel_gym.designs import load_designs
from hydrogel_gym.problem.cohort import load_cohort
from hydrogel_gym.runs.designing import environments
from hydrogel_gym.runs.evaluation import policy_designs
from hydrogel_gym.runs.options import ProblemOptions
from hydrogel_gym.runs.policies import load_policy
from hydrogel_gym.train import ppo_hybrid, rank_designs, refine_patients
from hydrogel_gym.train.generate_candidates import Choices
from hydrogel_gym.train.ppo_hybrid import Agent, HybridAction, Noise

PATIENTS = ("P0003", "P0001", "P0002")


@pytest.fixture(scope="module", params=["autoregressive", "factored"])
def trained(finished_run, tmp_path_factory, request):
    """Directory of a copy of the shared run, or of one with factored heads."""
    args, folder = finished_run[0], tmp_path_factory.mktemp("trained") / "run"
    if request.param == "autoregressive":
        return shutil.copytree(args.output_dir, folder)
    changes = dict(policy="factored", state_std=False, oracle=False, num_iterations=2)
    ppo_hybrid.train(dataclasses.replace(args, output_dir=folder, **changes))
    return folder


@pytest.fixture(scope="module")
def refined(trained):
    """Folder of three refined patients."""
    refine_patients.run(settings(trained))
    return trained / "refined"


def settings(trained, **changes):
    defaults = dict(patient=PATIENTS, num_copies=64, num_iterations=8, top_k=12)
    return refine_patients.Args(policy=trained, learning_rate=1e-2, **(defaults | changes))


@pytest.fixture
def base(trained):
    """The policy for all, its patients, their environments and its reward for each."""
    agent, saved = load_policy(trained / "stage2_policy.pt", Agent, "cpu")
    cohort = load_cohort(saved["training_config"]["cohort"])
    options = ProblemOptions.of(saved["training_config"])
    envs = environments(saved, options, cohort, torch.device("cpu"))
    return agent, cohort, envs, policy_designs(agent.design, envs)["reward"]


@pytest.fixture
def tuner(trained, base):
    """Tuner of three patients, its agent and their observations."""
    agent, cohort, envs, _ = base
    problem = envs.unwrapped.problem
    rows = [cohort.index(patient_id) for patient_id in PATIENTS]
    obs = envs.reset()[0][rows]
    args = settings(trained)
    config = problem.params.reward_config
    patients = problem.params.patients[rows]
    return refine_patients.Tuner(agent, obs, patients, problem, config, args), agent, obs


def drawn(tuner, count=400):
    """Actions for three patients, (3, count)."""
    torch.manual_seed(0)
    noise = Noise(torch.rand(3, count, 2), torch.randn(3, count, 4))
    return tuner.choices(tuner.weights, tuner.inputs).sample(noise)


def test_choices_of_several_patients_are_the_agents_for_each(tuner):
    tuner, agent, obs = tuner
    torch.manual_seed(1)
    noise = Noise(torch.rand(3, 50, 2), torch.randn(3, 50, 4))
    choices = tuner.choices(tuner.weights, tuner.inputs)
    found, sure = choices.sample(noise), choices.likeliest()
    logprob = torch.func.vmap(Choices.logprob)(choices, found)
    for patient in range(3):
        one = Noise(noise.uniform[patient], noise.normal[patient])
        expected = agent(obs[patient].expand(50, -1), noise=one)
        for part, own in zip(found, expected.action, strict=True):
            torch.testing.assert_close(part[patient], own.detach())
        torch.testing.assert_close(
            logprob[patient], expected.logprob.detach(), rtol=1e-4, atol=1e-4
        )
        expected = agent(obs[patient][None]).action
        assert sure.polymer_id[patient] == expected.polymer_id
        assert sure.coverage[patient] == expected.coverage
        torch.testing.assert_close(sure.presquash[patient], expected.presquash.detach())


def test_gradients_of_patients_tuned_at_once_are_those_of_each_alone(tuner):
    tuner, _, _ = tuner
    action = drawn(tuner)
    torch.manual_seed(2)
    advantage = torch.randn(3, 400)
    found = tuner.gradients(tuner.weights, tuner.inputs, action, advantage)
    for patient in range(3):
        weights = {
            name: weight[patient].clone().requires_grad_() for name, weight in tuner.weights.items()
        }
        inputs = tuple(part[patient] for part in tuner.inputs)
        one = HybridAction(*(part[patient] for part in action))
        choices = torch.func.functional_call(tuner.heads, weights, inputs)
        logp = choices.logprob(one)
        (-(logp * advantage[patient]).mean()).backward()
        for name, weight in weights.items():
            torch.testing.assert_close(found[name][patient], weight.grad, rtol=1e-4, atol=1e-6)
            assert weight.grad.abs().max() > 0.0, name


def test_divergence_is_the_mean_log_ratio_of_samples(tuner):
    tuner, _, _ = tuner
    torch.manual_seed(3)
    for weight in tuner.weights.values():
        weight.add_(0.03 * torch.randn_like(weight))
    new = tuner.choices(tuner.weights, tuner.inputs)
    action = drawn(tuner, count=40_000)
    logp = torch.func.vmap(Choices.logprob)
    ratio = logp(new, action) - logp(tuner.base_choices, action)
    found = tuner.divergence(new, tuner.base_choices)
    error = 5.0 * ratio.std(1) / 40_000**0.5
    assert (found > 0.01).all()
    assert ((found - ratio.mean(1)).abs() < error + 1e-4).all()


@pytest.mark.parametrize(("max_kl", "rate", "steps"), [(0.02, 0.05, 5), (5.0, 1e-2, 40)])
def test_tuning_raises_the_mean_reward_and_leaves_the_base_by_no_more_than_is_allowed(
    tuner, max_kl, rate, steps
):
    tuner, _, _ = tuner
    tuner.args.max_kl = max_kl
    tuner.optimizer.param_groups[0]["lr"] = rate
    torch.manual_seed(5)
    rewards = []
    for _ in range(steps):
        noise = Noise(torch.rand(3, 128, 2), torch.randn(3, 128, 4))
        rewards.append(tuner.step(noise).reward.mean(1))
        kl = tuner.divergence(tuner.choices(tuner.weights, tuner.inputs), tuner.base_choices)
        assert (kl <= max_kl).all()
        assert (kl > 1e-5).all()
    if steps == 40:
        assert (torch.stack(rewards[-5:]).mean(0) > torch.stack(rewards[:5]).mean(0) + 1.0).all()


def test_every_policy_is_whole_and_never_worse_than_the_one_for_all(base, refined):
    agent, cohort, envs, before = base
    gains = []
    for patient_id in PATIENTS:
        path = refined / "patient_policies" / f"{patient_id}.pt"
        own, content = load_policy(path, Agent, "cpu")
        assert content["regret_calibration"] is None  # that of the policy for all is not its own
        assert content["patient_id"] == patient_id
        row = cohort.index(patient_id)
        gains.append(float(policy_designs(own.design, envs)["reward"][row] - before[row]))
        same = {
            name
            for name, weight in own.state_dict().items()
            if weight.equal(agent.state_dict()[name])
        }
        assert {"encoder.0.weight", "trunk.0.weight", "hidden.weight", "critic.out.bias"} <= same
        top = load_designs(refined, patient_id)
        assert len(top) == 12
        assert top["reward"][0] >= before[row] + gains[-1] - 0.02
    # What is compared in tuning is on the grid that designs are made on.
    assert min(gains) > -0.02
    assert max(gains) > 0.1


def test_a_patient_alone_is_refined_as_among_others_and_the_rest_goes_on(
    trained, refined, tmp_path
):
    alone = settings(trained, patient=("P0001",), output_dir=tmp_path / "alone")
    assert refine_patients.run(alone)["patients"] == 1
    one, among = (load_designs(each, "P0001") for each in (alone.output_dir, refined))
    # Batches of another size round in another way.
    assert one["reward"].to_numpy() == pytest.approx(among["reward"].to_numpy(), abs=1e-2)
    path = alone.output_dir / "patient_policies" / "P0001.pt"
    before = path.stat().st_mtime_ns
    every = settings(trained, output_dir=alone.output_dir)
    assert refine_patients.run(every)["patients"] == 2
    assert path.stat().st_mtime_ns == before
    rank_designs.rank(rank_designs.Args(refined))
    saved = torch.load(refined / "stage2_complete.pt", weights_only=True)
    assert set(saved["per_patient_designs"]) == set(PATIENTS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--patient", "P9999"], "has no patient 'P9999'; nearest: "),
        (["--num-copies", "1"], "--num-copies is 1; allowed: 2 or more"),
        (["--max-kl", "0"], "--max-kl is 0.0; allowed: above 0"),
        (["--learning-rate", "-1"], "--learning-rate is -1.0; allowed: above 0"),
        (["--seed", "2"], "contains designs of another run"),
    ],
)
def test_bad_input_is_one_line(trained, refined, capsys, flags, message):
    command = ["--policy", str(trained), "--num-copies", "64", "--num-iterations", "8"]
    command += ["--top-k", "12", "--learning-rate", "1e-2", *flags]
    assert refine_patients.main(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
