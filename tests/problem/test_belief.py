"""The belief about a hidden response: right where it can be exact, honest where it cannot."""

from __future__ import annotations

import pytest
import torch

from hydrogel_gym import HydrogelAdaptVectorEnv
from hydrogel_gym.models.mechanistic import MechanisticModel
from hydrogel_gym.problem.belief import prior_belief, sample_belief, updated_belief
from hydrogel_gym.problem.fields import OUTCOME_FIELDS, Design, Outcomes
from hydrogel_gym.problem.response import RESPONSE_FIELDS, RESPONSE_NAMES, response_levels

NUM = 300
R = len(RESPONSE_FIELDS)
EXACT = (0.0,) * len(OUTCOME_FIELDS)


def checked(checks: int, noise: float = 0.0, design=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Belief, (B, 2 R) means and deviations, and the response after random or given designs."""
    envs = HydrogelAdaptVectorEnv(
        NUM,
        observe="estimate",
        reveal_response=True,
        outcome_noise=noise,
        output="torch",
        autoreset_mode="Disabled",
    )
    envs.action_space.seed(1)
    obs, info = envs.reset(seed=1)
    for _ in range(checks):
        obs, *_ = envs.step(design or envs.action_space.sample())
    belief = envs.state_dict()["belief"]
    torch.testing.assert_close(obs[:, -R:], belief[..., 0].log())
    return torch.cat([belief[..., 0], belief[..., 1:].norm(dim=-1)], -1), info["response"]


def test_before_a_check_it_is_the_prior_of_the_response():
    belief, response = checked(0)
    assert belief.unique(dim=0).shape == (1, 2 * R)
    torch.testing.assert_close(belief[0, :R], response.mean(0), rtol=0.12, atol=0)
    torch.testing.assert_close(belief[0, R:], response.std(0), rtol=0.12, atol=0)


def test_one_exact_check_tells_toxicity_and_integrity_and_narrows_the_gains():
    middle = {
        "polymer_id": torch.full((NUM,), 9),
        "formulation": torch.tensor([15.0, 60.0, 0.3, 2.0]).expand(NUM, -1),
        "coverage": torch.full((NUM,), 3),
    }
    prior, _ = checked(0)
    belief, response = checked(1, design=middle)
    estimate, deviation = belief.split(R, -1)
    for name in ("toxicity", "integrity"):
        i = RESPONSE_NAMES.index(name)
        torch.testing.assert_close(estimate[:, i], response[:, i], rtol=0.01, atol=0.01)
        assert deviation[:, i].max() < 0.03
    assert (deviation <= prior[:, R:] + 1e-6).all()
    before, after = ((x - response)[:, :3].square().mean() for x in (prior[:, :R], estimate))
    assert after < 0.8 * before


def test_checks_of_many_designs_find_the_response_within_what_the_deviations_say():
    belief, response = checked(8)
    error = (belief[:, :R] - response).abs()
    assert (error.median(0).values < 0.1).all()
    # Curvature makes a Gaussian belief too sure for some.
    assert (error <= 3.0 * belief[:, R:] + 0.1).float().mean() > 0.85


def test_noise_leaves_more_uncertain():
    exact, noisy = (checked(3, noise)[0][:, R:].mean() for noise in (0.0, 0.5))
    assert noisy > 1.3 * exact


def test_of_a_linear_model_it_is_the_posterior_in_closed_form():
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randn(3, R, generator=generator, dtype=torch.float64) * 0.1
    noise = dict.fromkeys(Outcomes._fields, 0.3)

    def predict(response: torch.Tensor) -> Outcomes:
        gain, toxicity, integrity = (response @ slopes.T).unbind(-1)
        return Outcomes(gain, gain, gain, toxicity, integrity, gain)

    prior = prior_belief(response_levels(0.6)).expand(5, -1, -1)
    # Near the prior, so that no bound of a factor is reached.
    measured = prior[:, :, 0] @ slopes.T + 0.02 * torch.randn(5, 3, generator=generator)
    seen = Outcomes(*measured[:, [0, 0, 0, 1, 2, 0]].unbind(-1))
    found = updated_belief(prior, predict, seen, tuple(noise.values()))
    precision = (prior[0, :, 1:] @ prior[0, :, 1:].T).inverse() + slopes.T @ slopes / 0.3**2
    covariance = precision.inverse()
    pull = (measured - prior[:, :, 0] @ slopes.T) @ slopes / 0.3**2
    torch.testing.assert_close(found[..., 0], prior[..., 0] + pull @ covariance)
    root = found[..., 1:]
    torch.testing.assert_close(root @ root.mT, covariance.expand(5, -1, -1))


def test_outcomes_at_the_end_of_their_range_leave_it_finite_and_within_the_ranges():
    patients = torch.tensor([[20.0] * 11, [60.0] * 11])
    design = Design(torch.tensor([0, 23]), torch.tensor([[1.0, 1.0, 0.0, 1.0]] * 2), torch.zeros(2))
    inputs = (patients, design.polymer_id, design.formulation, design.coverage.long())

    def predict(response: torch.Tensor) -> Outcomes:
        outcomes = MechanisticModel()(*(x.unsqueeze(1) for x in inputs), response)
        return Outcomes(*torch.broadcast_tensors(*outcomes))

    belief = prior_belief(response_levels(0.6)).float().expand(2, -1, -1)
    for extreme in (-1e3, 1e3):
        worst = Outcomes(*(torch.full((2,), extreme) for _ in Outcomes._fields))
        belief = updated_belief(belief, predict, worst, EXACT)
    low, high = torch.tensor([(x.low, x.high) for x in RESPONSE_FIELDS]).T
    for factors in (belief[..., 0], sample_belief(belief, torch.full((2, R), 3.0))):
        assert ((factors >= low) & (factors <= high)).all()  # and is a number


@pytest.mark.parametrize("sd", [0.0, 0.6])
def test_prior_has_the_mean_and_deviation_of_the_levels_and_no_covariance(sd):
    levels = response_levels(sd)
    prior = prior_belief(levels)
    torch.testing.assert_close(prior[:, 0], levels.mean(0))
    torch.testing.assert_close(prior[:, 1:], levels.std(0, correction=0).diag())


def test_samples_have_the_mean_and_covariance_of_the_belief():
    generator = torch.Generator().manual_seed(0)
    root = 0.05 * torch.randn(R, R, generator=generator)
    belief = torch.cat([torch.full((R, 1), 1.5), root], -1).expand(20_000, -1, -1)
    drawn = sample_belief(belief, torch.randn(20_000, R, generator=generator))
    torch.testing.assert_close(drawn.mean(0), belief[0, :, 0], rtol=0, atol=4e-3)
    torch.testing.assert_close(drawn.T.cov(), root @ root.T, rtol=0, atol=1e-3)
