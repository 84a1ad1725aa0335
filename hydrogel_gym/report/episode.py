"""Of a run in `HydrogelAdapt-v0`: what one patient's episode was like, and regret by check.

Shapes: H checks, R fields of a response, N polymers.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor

from hydrogel_gym.errors import UsageError, first_line
from hydrogel_gym.problem.fields import COVERAGE_FRACTIONS, Outcomes
from hydrogel_gym.problem.polymers import load_polymers
from hydrogel_gym.problem.response import RESPONSE_NAMES
from hydrogel_gym.problem.reward import RewardConfig, breaches
from hydrogel_gym.report.analysis import SAME_REWARD, saved_problem
from hydrogel_gym.report.plots import BLACK, BLUE, CYCLE, GREEN, VERMILLION, Plot, new_figure
from hydrogel_gym.report.reading import SavedRun
from hydrogel_gym.report.sections import ReportTable, Section
from hydrogel_gym.runs.adaptive import MEASURED, Episodes, play
from hydrogel_gym.runs.devices import fast_float32
from hydrogel_gym.runs.environments import make_envs
from hydrogel_gym.runs.evaluation import NUM_ADAPTIVE
from hydrogel_gym.runs.summary import REGRETS

QUANTILE = 0.75  # of the regret of the best predicted design, for the patient who is shown
LIKELIEST = 3  # polymers named for each check
PLOTTED = 5  # and drawn
CHECK, AXIS = "check", "reward (dimensionless)"


class Beliefs(NamedTuple):
    """What a policy holds before each check; arrays have H rows."""

    value: np.ndarray  # in units of the reward
    polymer: np.ndarray  # (H, N) probabilities
    entropy: np.ndarray  # of the whole policy, nats


class Episode(NamedTuple):
    """One held-out patient's episode under the deterministic policy.

    The H checks have one more row after them, the clairvoyant's best design.
    """

    patient_id: str
    num_patients: int  # among whom this one was chosen
    no_learning_regret: float
    response: np.ndarray  # (R,)
    polymer_id: np.ndarray  # (H + 1,), like all in this part
    formulation: np.ndarray  # (H + 1, D)
    coverage: np.ndarray
    measured: dict[str, np.ndarray]  # outcomes and score; the clairvoyant's are true
    regret: np.ndarray  # of the best so far, by the true scores
    beliefs: Beliefs
    observed_response: np.ndarray | None = None  # (H, R) factors as the policy saw them

    @property
    def best_measured(self) -> np.ndarray:
        """(H,) largest score so far, as measured."""
        return np.maximum.accumulate(self.measured["score"][:-1])


def adaptive_sections(run: SavedRun) -> list[Section]:
    """What the page shows of such a run alone; what it cannot show is named in the gaps."""
    found = [regret_after_checks_section(run)]
    if run.policy:
        try:
            found.append(episode_section(patient_episode(run), run.config))
        except UsageError as error:
            run.gaps.append(f"No patient's episode is shown: {error}.")
    return [section for section in found if section]


def regret_after_checks_section(run: SavedRun) -> Section | None:
    """Regret of the best design of the first checks, over the held-out patients."""
    after, none = (run.summary.get(name) or {} for name in REGRETS)
    figure = new_figure(CHECK, "regret (reward)", height=400)
    for name, label, color, dash in (
        ("mean", "mean", BLUE, "solid"),
        ("median", "median", GREEN, "dot"),
        ("p95", "95th percentile", VERMILLION, "dashdot"),
    ):
        if isinstance(after.get(name), list):
            checks = list(range(1, len(after[name]) + 1))
            figure.add_trace(curve(checks, after[name], label, color, dash))
    if not figure.data:
        run.gaps.append("Regret after each check: not recorded, as of a run without an oracle.")
        return None
    if isinstance(none.get("mean"), float):
        ends = [1, max(len(trace.x) for trace in figure.data)]
        label = "mean without learning"
        figure.add_trace(curve(ends, 2 * [none["mean"]], label, BLACK, "dash", mode="lines"))
    figure.update_yaxes(rangemode="tozero")
    caption = (
        "How far the best design so far falls short of the clairvoyant's, who knows the response: "
        f"{run.summary.get('regret_patients', 'the first')} held-out patients. Dashed: the best "
        "predicted design, tried once."
    )
    plot = Plot("regret-after-checks", "Regret after each check", caption, figure)
    return Section("regret-after-checks", "What the checks are worth", [], [plot], [])


def curve(x: Any, y: Any, label: str, color: str, dash: str, **options: Any) -> go.Scatter:
    """A value by check."""
    style = dict(color=color, dash=dash, width=2)
    return go.Scatter(x=x, y=y, name=label, line=style, **{"mode": "lines+markers"} | options)


@torch.no_grad()
def patient_episode(run: SavedRun) -> Episode:
    """The episode of the held-out patient whose predicted design has the regret of `QUANTILE`.

    Raises:
        UsageError: the patients cannot be had again, or are not those of the run.
    """
    assert run.policy
    options, dtype, cohort = saved_problem(run, "holdout")
    cohort = cohort.first(NUM_ADAPTIVE)
    device = torch.device("cpu")
    try:
        with fast_float32(device):
            envs = make_envs(options, cohort, device, dtype=dtype)
            episodes = play(run.policy.design, envs, options.horizon)
            regret = episodes.no_learning_regret.numpy()
            chosen = int(np.abs(regret - np.quantile(regret, QUANTILE)).argmin())
            held = beliefs(run.policy.agent, episodes.obs[:, chosen])
        mean = episodes.regret.mean(-1).numpy()
        recorded = (run.summary.get(REGRETS[0]) or {}).get("mean", mean)
        is_other = not np.allclose(mean, recorded, rtol=0, atol=SAME_REWARD)
    except Exception as error:  # the settings may be of another version
        raise UsageError(f"{options.env_id} cannot evaluate it: {first_line(error)}") from error
    if is_other:
        raise UsageError(
            "regret after each check is another than in the run: patients, outcome model or "
            "package are others now"
        )
    episode = episode_of(episodes, chosen, cohort.patient_ids[chosen], held)
    if options.observe_when_evaluated in (None, "history"):
        return episode
    seen = episodes.obs[:, chosen, -len(RESPONSE_NAMES) :].exp().numpy()
    return episode._replace(observed_response=seen)


def episode_of(episodes: Episodes, chosen: int, patient_id: str, held: Beliefs) -> Episode:
    """The episode of one of P patients, and the clairvoyant's best design after it."""

    def rows(checked: Tensor, best: Tensor) -> np.ndarray:
        return torch.cat([checked[:, chosen], best[chosen, None]]).numpy()

    true = {**episodes.best_outcomes._asdict(), "score": episodes.best_score}
    designs = zip(episodes.designs, episodes.best, strict=True)
    polymer_id, formulation, coverage = (rows(*pair) for pair in designs)
    return Episode(
        patient_id,
        len(episodes.best_score),
        episodes.no_learning_regret[chosen].item(),
        episodes.response[chosen].numpy(),
        polymer_id,
        formulation,
        coverage,
        {name: rows(episodes.measured[name], true[name]) for name in MEASURED},
        rows(episodes.regret, torch.zeros_like(episodes.best_score)),
        held,
    )


def beliefs(agent: Any, obs: Tensor) -> Beliefs:
    """What a policy holds at (H, F) observations."""
    polymer = agent.polymer_head(agent.head_inputs(obs)[0]).softmax(-1)
    _, entropy = agent.design(obs)
    return Beliefs(agent.value(obs).numpy(), polymer.numpy(), entropy.numpy())


def check_columns(episode: Episode) -> dict[str, list[str]]:
    """Columns of the table of checks, with units in the headings; the clairvoyant is last."""
    names, measured = load_polymers().names, episode.measured
    num = len(episode.best_measured)

    def shown(values: np.ndarray, decimals: int) -> list[str]:
        return [f"{value:.{decimals}f}" for value in values]

    outcomes = Outcomes(*(torch.from_numpy(measured[name]) for name in Outcomes._fields))
    limits, broken = zip(*breaches(outcomes, RewardConfig()).items(), strict=True)
    rows = torch.stack(broken, -1).tolist()
    stiffness, half_life, conductivity, thickness = episode.formulation.T
    return {
        CHECK: [*map(str, range(1, num + 1)), "clairvoyant"],
        "polymer": [names[i] for i in episode.polymer_id],
        "stiffness, kPa": shown(stiffness, 1),
        "half-life, days": shown(half_life, 0),
        "conductivity, S/m": shown(conductivity, 3),
        "thickness, mm": shown(thickness, 2),
        "covered border zone, %": shown(100 * np.array(COVERAGE_FRACTIONS)[episode.coverage], 0),
        "change in LVEF, points": shown(measured["delta_ef_pct"], 2),
        "stress reduction, %": shown(measured["stress_reduction_pct"], 1),
        "logit of optimal": shown(measured["optimal_logit"], 2),
        "toxicity, 0–1": shown(measured["toxicity_risk"], 3),
        "integrity, 0–1": shown(measured["structural_integrity"], 3),
        "fibrosis, 0–1": shown(measured["fibrosis_risk"], 3),
        "limits broken": [", ".join(itertools.compress(limits, row)) or "none" for row in rows],
        "score": shown(measured["score"], 2),
        "best so far": [*shown(episode.best_measured, 2), "–"],
        "regret": shown(episode.regret, 2),
    }


def belief_columns(episode: Episode, value_label: str) -> dict[str, list[str]]:
    """Columns of the table of beliefs before each check, beside what was then measured."""
    names = load_polymers().names
    rows = range(len(episode.best_measured))
    value, polymer, entropy = episode.beliefs
    likeliest = np.argsort(-polymer, axis=1, kind="stable")[:, :LIKELIEST]
    return {
        CHECK: [f"{row + 1}" for row in rows],
        value_label: [f"{x:.2f}" for x in value],
        "score then measured": [f"{x:.2f}" for x in episode.measured["score"][:-1]],
        "polymer chosen": [
            f"{names[i]} {100 * polymer[row, i]:.0f} %"
            for row, i in enumerate(episode.polymer_id[:-1])
        ],
        f"{LIKELIEST} likeliest polymers": [
            ", ".join(f"{names[i]} {100 * polymer[row, i]:.0f} %" for i in likeliest[row])
            for row in rows
        ],
        "entropy, nats": [f"{x:.2f}" for x in entropy],
    }


def response_table(rows: dict[str, list[str]], title: str) -> ReportTable:
    """Factors of a response, one row for each of several: the hidden one, or estimates."""
    header = ["", *(name.replace("_", " ") for name in RESPONSE_NAMES)]
    return ReportTable(title, header, [[label, *cells] for label, cells in rows.items()])


def observed_response_table(episode: Episode) -> ReportTable:
    """The hidden response, and how the policy saw it before each check if it saw anything of it."""
    hidden = [f"{x:.2f}" for x in episode.response]
    if episode.observed_response is None:
        title = "Hidden from the policy, and synthetic: how this patient responds (1: as predicted)"
        return response_table({"factor": hidden}, title)
    rows = {
        f"before check {check}": [f"{x:.2f}" for x in row]
        for check, row in enumerate(episode.observed_response, 1)
    }
    title = (
        "The response as the policy saw it, from what the checks say, and as it is: hidden, and "
        "synthetic (1: as predicted)"
    )
    return response_table(rows | {"hidden": hidden}, title)


def as_table(title: str, columns: dict[str, list[str]]) -> ReportTable:
    """A table of columns by heading."""
    return ReportTable(
        title, list(columns), [list(row) for row in zip(*columns.values(), strict=True)]
    )


def episode_section(episode: Episode, config: dict[str, Any]) -> Section:
    """What was tried, what was measured, and what the policy believed before each check."""
    is_score = config.get("gamma") == 0 and config.get("reward_mode") == "score"
    value_label = "expected score" if is_score else "value"
    num = len(episode.best_measured)
    texts = [
        f"Patient {episode.patient_id}, for whom the best predicted design has a regret of "
        f"{episode.no_learning_regret:.2f}: the {100 * QUANTILE:.0f}th percentile of the first "
        f"{episode.num_patients} held-out patients, whatever the policy. The deterministic policy "
        f"chooses {num} designs one after the other, and sees what was measured of those before.",
        "Regret is by the true scores: how far the best design so far falls short of the "
        "clairvoyant's, who knows the response. The last row is that design, with its true "
        "outcomes.",
    ]
    texts.append(
        "The score that the critic expects of the next design is that of designs sampled from the "
        "policy; the one checked is its likeliest."
        if is_score
        else "The value is what the critic expects of the rest of the episode, in units of the "
        "reward that was learned from."
    )
    return Section(
        "episode",
        "One patient's episode",
        texts,
        episode_plots(episode, value_label),
        [
            as_table("What was tried, and what was measured", check_columns(episode)),
            as_table(
                "What the policy believed before each check", belief_columns(episode, value_label)
            ),
            observed_response_table(episode),
        ],
    )


def episode_plots(episode: Episode, value_label: str) -> list[Plot]:
    """Scores, what was expected of them, and probabilities of polymers, by check."""
    checks = list(range(1, len(episode.best_measured) + 1))
    *score, best = episode.measured["score"].tolist()
    figure = new_figure(CHECK, AXIS, height=400)
    figure.add_trace(curve(checks, score, "measured", BLUE, "solid", mode="markers"))
    figure.add_trace(
        curve(checks, episode.best_measured, "best so far", BLUE, "solid", mode="lines")
    )
    ends = [checks[0], checks[-1]]
    figure.add_trace(curve(ends, [best, best], "clairvoyant", BLACK, "dash", mode="lines"))
    caption = "Scores as measured. Dashed: the true score of the clairvoyant's design."
    plots = [Plot("episode-score", "Measured score", caption, figure)]
    figure = new_figure(CHECK, AXIS, height=400)
    figure.add_trace(curve(checks, episode.beliefs.value, value_label, VERMILLION, "dash"))
    figure.add_trace(curve(checks, score, "then measured", BLUE, "solid"))
    title = f"{value_label.capitalize()}, and the score then measured"
    plots.append(Plot("episode-value", title, "", figure))
    figure = new_figure(CHECK, "probability", height=400)
    names, polymer = load_polymers().names, episode.beliefs.polymer
    likeliest = np.argsort(-polymer.max(0), kind="stable")[:PLOTTED]
    for i, color in zip(likeliest, CYCLE, strict=False):
        figure.add_trace(curve(checks, polymer[:, i], names[i], color, "solid"))
    figure.update_yaxes(range=[0, 1])
    caption = f"Before each check, of the {PLOTTED} polymers that are likeliest before any."
    plots.append(Plot("episode-polymers", "Polymer of the next design", caption, figure))
    return plots
