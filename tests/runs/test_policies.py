"""Files of policies: read without running code, or refused in words."""

from __future__ import annotations

import pytest
import torch

from hydrogel_gym import errors, runs
from hydrogel_gym.runs import policies
from hydrogel_gym.train.ppo_hybrid import Agent


class _Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


@pytest.fixture
def policy(finished_run):
    return finished_run[0].output_dir / "stage2_policy.pt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved, "it is cut off, or is no archive"),
        (lambda saved: _Payload(), "cannot be used: Weights only load failed"),
        (lambda saved: saved | {"polymers": saved["polymers"][::-1]}, "another polymer table"),
        (lambda saved: saved | {"format": "policy.v1"}, "format 'policy.v1'"),
        (lambda saved: saved["architecture"].update(obs_dim=12) or saved, "obs_mean has shape"),
    ],
    ids=["cut off", "malicious", "polymers", "format", "shape"],
)
def test_a_file_of_something_else_is_refused_and_executes_nothing(
    policy, tmp_path, change, message
):
    path = tmp_path / "policy.pt"
    torch.save(change(torch.load(policy, weights_only=True)), path)
    if "cut off" in message:
        path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(errors.UsageError, match=message):
        policies.load_policy(path, Agent, "cpu")


def test_a_policy_of_an_earlier_version_is_read_whatever_settings_it_had(
    finished_run, policy, tmp_path
):
    args, _ = finished_run
    saved = torch.load(policy, weights_only=True)
    saved["training_config"] |= {"reward_precision": "fp32", "evaluate": None, "colour": "blue"}
    torch.save(saved, tmp_path / "policy.pt")
    agent, content = policies.load_policy(tmp_path / "policy.pt", Agent, "cpu")
    for name, value in saved["policy_state_dict"].items():
        assert torch.equal(agent.state_dict()[name], value)
    problem = runs.ProblemOptions.of(content["training_config"])
    assert problem == runs.ProblemOptions(cohort=args.cohort, holdout_cohort=args.holdout_cohort)
