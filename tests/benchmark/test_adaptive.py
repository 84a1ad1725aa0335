import pytest
import torch
from quality import adaptive
from quality.baselines import adaptive as players
from quality.baselines.posterior import Posterior
from quality.baselines.search import design_of_unit

from hydrogel_gym import RewardConfig, load_cohort
from hydrogel_gym.models.mechanistic import MechanisticModel
from hydrogel_gym.problem.response import draw_response, response_levels
from hydrogel_gym.runs.policies import save_policy

MODEL = MechanisticModel()
PATIENTS = load_cohort("holdout").features[:2].float()
KEYS = torch.arange(2)
RESPONSE = draw_response(KEYS, 0 * KEYS, response_levels(0.6).float())
EXACT = [0.0] * 6
NOISY = [0.5, 2.0, 0.5, 0.01, 0.02, 0.01]


def believed(noise, checks):
    posterior = Posterior(PATIENTS, MODEL, 0.6, noise, 0, num_particles=128)
    generator = torch.Generator().manual_seed(0)
    for _ in range(checks):
        design = design_of_unit(torch.rand(2, 6, generator=generator))
        posterior.add(design, torch.stack(MODEL(PATIENTS, *design, RESPONSE), -1))
    return posterior.responses.log()


def test_particles_begin_as_the_prior():
    logs = Posterior(PATIENTS, MODEL, 0.6, EXACT, 0).responses.log()
    expected = response_levels(0.6).log().float()
    torch.testing.assert_close(logs.mean((0, 1)), expected.mean(0), atol=0.06, rtol=0)
    torch.testing.assert_close(logs.std((0, 1)), expected.std(0), atol=0.05, rtol=0)


def test_particles_gather_about_the_true_response_the_closer_the_less_noise():
    # What a first check measures by itself: toxicity and integrity.
    first = believed(EXACT, 1) - RESPONSE.log()[:, None]
    assert first[..., 4:].abs().mean() < 0.01
    # The six factors, by a few checks.
    exact, noisy = (believed(noise, 5) - RESPONSE.log()[:, None] for noise in (EXACT, NOISY))
    assert exact.abs().mean() < 0.05 < noisy.abs().mean() < 0.5
    assert noisy.mean(1).abs().max() < 3 * noisy.std(1).max()


def test_regret_is_what_the_best_score_so_far_lacks_of_the_best_there_is():
    gained = torch.tensor([[5.0, 0.0, 2.5], [0.0, 8.0, 0.0]])
    found = adaptive.regrets(torch.tensor([8.0, 8.0]), gained)
    torch.testing.assert_close(found, torch.tensor([[3.0, 3.0, 0.5], [8.0, 0.0, 0.0]]))


def test_the_clairvoyant_has_no_regret_and_nobody_has_less():
    gained, _, _ = adaptive.play(adaptive.METHODS["clairvoyant"], 2, {}, 0)
    best = gained[:, 0]
    assert torch.equal(gained[:, 1:], torch.zeros(2, 7))
    for name in ("predicted", "random"):
        regret = adaptive.regrets(best, adaptive.play(adaptive.METHODS[name], 2, {}, 0)[0])
        assert regret.min() > -1e-4
        assert (regret.diff(dim=-1) <= 0).all()


def test_posterior_sampling_comes_close_to_the_best(monkeypatch):
    monkeypatch.setattr(adaptive, "HORIZON", 4)
    best = adaptive.play(adaptive.METHODS["clairvoyant"], 1, {}, 0)[0][:, 0]
    gained, episode, _ = adaptive.play(adaptive.METHODS["thompson"], 1, {}, 0)
    regret = adaptive.regrets(best, gained)
    assert -1e-4 < regret[0, -1] < 0.2 < regret[0, 0]
    assert episode.model.calls > 4 * 41_088


def test_the_best_design_under_a_response_can_be_kept_from_polymers():
    used = torch.zeros(2, dtype=torch.int64)
    first = players.best_under(MODEL, PATIENTS, RESPONSE, used)
    used = 1 << first.polymer_id
    second = players.best_under(MODEL, PATIENTS, RESPONSE, used, players.NEVER)
    assert (first.polymer_id != second.polymer_id).all()
    score = [players.scored(MODEL, PATIENTS, d, RESPONSE, 0 * used) for d in (first, second)]
    again = players.scored(MODEL, PATIENTS, first, RESPONSE, used)
    assert (score[0] >= score[1] - 0.01).all()
    torch.testing.assert_close(score[0] - again, torch.full((2,), RewardConfig().novelty_bonus))


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["bo", "bo_prior"])
def test_bayesian_optimisation_tries_no_design_twice(method):
    pytest.importorskip("botorch")
    _, episode, _ = adaptive.play(adaptive.METHODS[method], 1, {}, 0)
    tried = torch.stack([players._point(design)[0] for design in episode.tried])
    assert len(tried.unique(dim=0)) == adaptive.HORIZON


def test_a_policy_plays_and_one_of_another_id_is_refused(agent, ppo, tmp_path, monkeypatch, capsys):
    sizes = dict(num_polymers=24, num_coverages=4, hidden_dim=8, state_std=False)
    sizes |= dict(formulation_low=[5.0, 7.0, 0.0, 1.0], formulation_high=[30.0, 180.0, 1.0, 5.0])
    monkeypatch.setattr(adaptive, "made_by", lambda *_: "")
    monkeypatch.setattr(adaptive, "NOISE", {"Measured exactly": {}})
    make_envs = adaptive.make_envs
    monkeypatch.setattr(adaptive, "make_envs", lambda *args, compile=False: make_envs(*args))
    for obs_dim, observe in ((117, None), (19, "response"), (13, None)):
        architecture = sizes | {"obs_dim": obs_dim, "policy": "factored"}
        run, config = tmp_path / str(obs_dim), {"observe": observe}
        run.mkdir()
        save_policy(run / "stage2_policy.pt", ppo.Agent(**architecture), architecture, config, {})
    argv = "--methods predicted --patients 2 --seeds 0 1 --output-dir".split() + [str(tmp_path)]
    for obs_dim in (117, 19):
        adaptive.main([*argv, "--policy", str(tmp_path / str(obs_dim))])
        assert f"| trained policy, {obs_dim} | 2 |" in capsys.readouterr().out
    with pytest.raises(Exception, match=r"--policy .*13: it sees 13 numbers; expected: 117"):
        adaptive.main([*argv, "--policy", str(tmp_path / "13")])
