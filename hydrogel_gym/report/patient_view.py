"""Patients as the page shows them: a table to search, and what a chosen one is drawn from."""

from __future__ import annotations

import base64
import itertools
from typing import Any

import itables
import numpy as np
import pandas as pd
from itables.javascript import generate_init_offline_itables_html

from hydrogel_gym.problem.fields import (
    COVERAGE_FRACTIONS,
    FORMULATION_FIELDS,
    PATIENT_FIELDS,
    Outcomes,
)
from hydrogel_gym.problem.polymers import load_polymers
from hydrogel_gym.problem.reward import SAFETY, SAFETY_LIMITS, RewardTerms
from hydrogel_gym.report.analysis import SLICE_POINTS, Patients
from hydrogel_gym.report.labels import OUTCOME_LABELS, SIGNS, TERM_LABELS, coverage_labels
from hydrogel_gym.report.plots import BLACK, BLUE, GREEN, VERMILLION, new_figure

# A page with all of a large cohort would not open on a phone; distributions are of all patients.
PATIENTS_SHOWN = 5000


def packed(values: np.ndarray, dtype: str) -> str:
    """An array as base64 of little-endian numbers, which a typed array reads."""
    return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes()).decode()


def shown_rows(num_patients: int) -> np.ndarray:
    """Rows of the patients that the page lists: all, or evenly spaced ones of a large cohort."""
    count = min(num_patients, PATIENTS_SHOWN)
    return np.arange(count) * num_patients // count


def patient_columns(patients: Patients) -> list[tuple[str, Any, int | None]]:
    """Columns of the patients' table: heading with its unit, values, decimals of numbers."""
    names = load_polymers().names
    predicted, features = patients.predicted, patients.features
    requested = patients.formulation.T
    broken = np.stack([margin < 0 for margin in patients.margins.values()], -1)
    limits = [", ".join(itertools.compress(SAFETY_LIMITS, row)) for row in broken]
    regret: list[tuple[str, Any, int | None]] = []
    if patients.prediction is not None:
        regret.append(("predicted regret", patients.prediction.expected, 3))
    if patients.best is not None:
        regret.append(("regret", patients.regret, 3))
    return [
        ("patient", np.array(patients.cohort.patient_ids, object), None),
        ("polymer", [names[i] for i in patients.polymer_id], None),
        ("covered border zone, %", 100 * np.array(COVERAGE_FRACTIONS)[patients.coverage], 0),
        ("stiffness, kPa", requested[0], 1),
        ("half-life, days", requested[1], 0),
        ("conductivity, S/m", requested[2], 3),
        ("thickness, mm", requested[3], 2),
        ("reward", patients.reward, 2),
        *regret,
        ("change in LVEF, points", predicted["delta_ef_pct"], 2),
        ("stress reduction, %", predicted["stress_reduction_pct"], 1),
        ("toxicity, 0–1", predicted["toxicity_risk"], 3),
        ("integrity, 0–1", predicted["structural_integrity"], 3),
        ("fibrosis, 0–1", predicted["fibrosis_risk"], 3),
        ("limits broken", [limit or "none" for limit in limits], None),
        ("LVEF, %", features["lvef_pct"], 1),
        ("scar, % of LV", features["scar_fraction_pct"], 1),
        ("border zone, % of LV", features["bz_fraction_pct"], 1),
        ("transmurality, 0–1", features["transmurality"], 2),
    ]


def table_html(patients: Patients) -> str:
    """The searchable table, with its library."""
    columns = patient_columns(patients)
    table = pd.DataFrame({heading: values for heading, values, _ in columns})
    table = table.iloc[shown_rows(len(table))].reset_index(drop=True)
    column_defs = []
    for i, (heading, _, decimals) in enumerate(columns):
        if decimals is not None:
            table[heading] = table[heading].astype(float).round(decimals)
            shown = f"type === 'display' ? value.toFixed({decimals}) : value"
            render = itables.JavascriptFunction(f"function(value, type) {{ return {shown}; }}")
            column_defs.append({"targets": i, "render": render})
    body = itables.to_html_datatable(
        table,
        connected=False,
        display_logo_when_loading=False,
        table_id="patient-table",
        classes="display compact nowrap",
        showIndex=False,
        allow_html=False,
        maxBytes=0,
        pageLength=10,
        columnDefs=column_defs,
    )
    return generate_init_offline_itables_html(itables.options.dt_bundle) + body


def patient_data(patients: Patients) -> dict[str, Any]:
    """What the page draws a chosen patient from."""
    rows = shown_rows(len(patients.cohort))
    reward = patients.slices.reward[rows]
    finite = np.isfinite(reward)
    largest = np.abs(reward[finite]).max(initial=0.0)
    step = max(0.01, largest / 32000.0)  # 16 bits, the lowest of which says "not a number"
    whole = np.where(finite, np.round(np.where(finite, reward, 0.0) / step), -32768)
    columns = dict(patients.features)
    columns |= {item.name: patients.formulation[:, i] for i, item in enumerate(FORMULATION_FIELDS)}
    predicted = (*Outcomes._fields, *RewardTerms._fields)
    columns |= {name: patients.predicted[name] for name in predicted}
    columns |= {"polymer_id": patients.polymer_id, "coverage": patients.coverage}
    columns["reward"] = patients.reward
    if patients.best is not None:
        columns["best"] = patients.best
    return {
        "ids": [patients.cohort.patient_ids[i] for i in rows],
        "polymers": load_polymers().names,
        "coverages": coverage_labels(),
        "coverageFractions": COVERAGE_FRACTIONS,
        "patientFields": [[item.name, item.meaning] for item in PATIENT_FIELDS],
        "parameters": [
            {"name": item.name, "meaning": item.meaning, "low": item.low, "high": item.high}
            for item in FORMULATION_FIELDS
        ],
        "outcomes": list(OUTCOME_LABELS.items()),
        "terms": list(TERM_LABELS.items()),
        "limits": {
            item.outcome: [SIGNS[item.is_ceiling], patients.config.limit(item.name)]
            for item in SAFETY
        },
        "columns": {name: packed(value[rows], "<f4") for name, value in columns.items()},
        "points": SLICE_POINTS,
        "step": step,
        "slices": packed(whole, "<i2"),
        "unsafe": packed(np.packbits(patients.slices.is_unsafe[rows], axis=1), "u1"),
        # Titles and fonts of the figures that the page makes itself.
        "layout": new_figure("", "reward (dimensionless)", height=250).to_plotly_json()["layout"],
        "colors": {"line": BLUE, "unsafe": VERMILLION, "chosen": BLACK, "best": GREEN},
    }
