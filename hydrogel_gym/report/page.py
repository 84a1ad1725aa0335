"""The page of one run, and the template that all pages fill."""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from hydrogel_gym.errors import UsageError
from hydrogel_gym.report.analysis import design_patients
from hydrogel_gym.report.episode import adaptive_sections
from hydrogel_gym.report.labels import final_figure
from hydrogel_gym.report.patient_view import patient_data, shown_rows, table_html
from hydrogel_gym.report.reading import SavedRun
from hydrogel_gym.report.sections import (
    formulation_section,
    learning_section,
    polymer_section,
    prediction_section,
    regret_section,
    safety_section,
    terms_section,
    what_was_run,
)
from hydrogel_gym.runs.options import ADAPTIVE, BUILT_IN

TEMPLATE = files("hydrogel_gym.report") / "page.html"


def about(runs: list[SavedRun]) -> list[str]:
    """What a reader has to know before any figure."""
    own = sorted({str(run.config["cohort"]) for run in runs if run.config.get("cohort")})
    known = all(run.config for run in runs)
    texts = []
    if own:
        texts.append(f"Trained on the patients of {', '.join(own)}, a table given by the user.")
    if known and any(not run.config.get("cohort") for run in runs):
        texts.append(
            "The shipped patients are synthetic: drawn from published summary statistics; "
            "no row is a person."
        )
    model = " or ".join(sorted({outcome_model(run.config) for run in runs}))
    texts.append(f"Every outcome is predicted by {model}. Nothing here is clinical advice.")
    return texts


def outcome_model(config: dict[str, Any]) -> str:
    """What predicted the outcomes of a run, in words."""
    env_id, reward_model = config.get("env_id"), config.get("reward_model")
    if env_id is None:
        return "an outcome model that is not named"
    if reward_model not in (None, BUILT_IN):
        return (
            f"the outcome model {reward_model}, whose mistakes the policy may have learned to use"
        )
    if env_id == "HydrogelDesign-v0":
        return "the built-in outcome model, an educational prior that was fitted to no patient"
    return f"the outcome model of {env_id}"


def run_page(run: SavedRun) -> bytes:
    """The page of one run."""
    patients = None
    is_adaptive = run.config.get("env_id") == ADAPTIVE
    run.gaps += run.policy_gaps
    if run.policy and run.config:
        try:
            patients = design_patients(run)
        except UsageError as error:
            whom = "training patients" if is_adaptive else "patients"
            run.gaps.append(f"Nothing is shown of {whom}: {error}.")
    if run.policy and not run.config:
        run.gaps.append("Nothing is shown of patients, since the settings of the run are unknown.")
    sections = [what_was_run(run), learning_section(run), terms_section(run)]
    sections.append(polymer_section(run, patients))
    if is_adaptive:
        sections += adaptive_sections(run)
    if patients:
        sections += [formulation_section(patients), safety_section(patients)]
        sections += [regret_section(patients), prediction_section(patients, run.summary)]
        if patients.best is None:
            run.gaps.append(
                "The best possible reward of each patient is not in the folder oracle beside the "
                "run, or is of another version; regret by patient is left out."
            )
    horizon = run.config.get("horizon", 1)
    notes = []
    if run.policy and patients:
        notes.append(
            f"Designs of the deterministic policy ({run.policy.origin}): likeliest polymer and "
            "coverage, median formulation"
            + (f"; the first of the {horizon} of an episode." if horizon > 1 else ".")
        )
        num_shown = len(shown_rows(len(patients.cohort)))
        if num_shown < len(patients.cohort):
            notes.append(
                f"Listed are {num_shown:,} of the {len(patients.cohort):,} patients, evenly "
                "spaced; all distributions above are of all of them."
            )
    return render(
        title=f"Run {run.name}",
        gaps=run.gaps,
        about=about([run]),
        cards=cards(run),
        sections=[section for section in sections if section],
        patients=patients,
        notes=notes,
    )


def cards(run: SavedRun) -> list[tuple[str, str]]:
    """The figures at the top of a page, with what each is."""
    wanted = {
        "holdout_deterministic_reward": "mean reward, held-out patients",
        "holdout_fraction_of_oracle": "of the best possible, held out",
        "holdout_deterministic_limit_breach_rate": "designs that break a limit, held out",
        "samples": "samples",
        "wall_seconds": "seconds of training",
    }
    last = run.metrics.iloc[-1].to_dict() if len(run.metrics) else {}
    figures = run.summary or last | {"samples": last.get("global_step")}
    return [
        (final_figure(name, figures[name]), label)
        for name, label in wanted.items()
        if figures.get(name) is not None and math.isfinite(figures[name])
    ]


def render(**content: Any) -> bytes:
    """Fill the template; everything that is not a library is escaped."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plots = {plot.name: plot.figure for section in content["sections"] for plot in section.plots}
    patients = content.pop("patients")
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        **content,
        # Plotly's own JSON: NaN becomes null, arrays are packed.
        plots={name: json.loads(figure.to_json()) for name, figure in plots.items()},
        patients=patient_data(patients) if patients else None,
        table=table_html(patients) if patients else "",
        plotly=get_plotlyjs(),
        version=version("hydrogel_gym"),
    )
    return text.encode()
