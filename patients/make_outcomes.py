"""Make up a table of Stage-1 outcomes, as a group with finite-element simulations would have one.

    python patients/make_outcomes.py                      write outcomes.parquet, 447,480 rows
    python patients/make_outcomes.py --output small.csv --patients 6 --rows 14400

**Every row is synthetic.** Behind the numbers is the built-in closed-form model,
`hydrogel_gym.models.mechanistic`; noise, gross outliers and gaps are laid over it. No simulation
was run and nobody was treated. The table serves to try out how a Stage-1 network is trained where
the truth is known, and shows nothing about hydrogels.

60 patients of the training cohort times every polymer times about 310 formulations: the cost of a
simulation is per run, so the runs are planned. `choose_patients` and `draw_designs` say how.
`README.md` describes the columns. Numbers that decide how wrong a value is are all of grade D,
assumption: no study of how far such simulations miss was used.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.stats import qmc
from sklearn import metrics
from sklearn.cluster import KMeans
from sklearn.exceptions import UndefinedMetricWarning

from hydrogel_gym.files import write_atomically
from hydrogel_gym.models.mechanistic import MechanisticModel, OutcomeScale
from hydrogel_gym.problem.cohort import FEATURE_COLUMNS, ID_COLUMN, Cohort, load_cohort
from hydrogel_gym.problem.fields import COVERAGES, FORMULATION_FIELDS, OUTCOME_FIELDS
from hydrogel_gym.problem.polymers import NUM_POLYMERS, load_polymers
from hydrogel_gym.problem.reward import RewardConfig
from hydrogel_gym.problem.reward import is_optimal as reaches_thresholds
from hydrogel_gym.problem.tables import SUFFIXES

FORMULATION_COLUMNS = [field.name for field in FORMULATION_FIELDS]
LABEL = "is_optimal"


class OutcomeNoise(NamedTuple):
    """Standard deviation of an outcome's noise, as a sum of three terms."""

    floor: float  # in the outcome's unit
    per_size: float  # times the size of the noiseless outcome
    per_infeasibility: float  # times 1 - F: what cannot be made as requested converges badly

    def sd(self, outcome: np.ndarray, feasibility: np.ndarray) -> np.ndarray:
        """Standard deviation for noiseless outcomes and their feasibilities F, 0 to 1."""
        return (
            self.floor + self.per_size * abs(outcome) + self.per_infeasibility * (1.0 - feasibility)
        )


# Grade D throughout, and chosen so that a good network stands out from a poor one: noise explains
# about a twentieth of the variance of the two mechanical outcomes.
NOISE = {
    "delta_ef_pct": OutcomeNoise(0.30, 0.06, 0.20),
    "stress_reduction_pct": OutcomeNoise(0.60, 0.05, 0.30),
    "toxicity_risk": OutcomeNoise(0.010, 0.05, 0.005),
    "structural_integrity": OutcomeNoise(0.010, 0.05, 0.005),
    "fibrosis_risk": OutcomeNoise(0.010, 0.05, 0.005),
}
LIMITS = {field.name: (field.low, field.high) for field in OUTCOME_FIELDS}
# A mesh that failed unnoticed; grade D. Half of the outliers are this many times too large, half
# have the wrong sign.
OUTLIER_FACTOR = 3.0

OUTCOME_COLUMNS = ["delta_ef_pct", "stress_reduction_pct", LABEL, *list(NOISE)[2:]]
COLUMNS = [
    ID_COLUMN,
    *FEATURE_COLUMNS,
    "polymer_name",
    *FORMULATION_COLUMNS,
    "coverage",
    *OUTCOME_COLUMNS,
]


def make_outcomes(
    *,
    patients: int = 60,
    rows: int = 447_480,
    seed: int = 1,
    outlier_share: float = 0.002,
    missing_share: float = 0.01,
    noise_scale: float = 1.0,
    outcome_scale: OutcomeScale = "source",
) -> pd.DataFrame:
    """Synthetic Stage-1 outcomes of planned designs; the same frame for the same arguments.

    Designs depend on `patients`, `rows` and `seed` alone, so that tables with more or less noise
    can be compared row by row.

    Args:
        patients: how many of the shipped training cohort.
        rows: in all; pairs of patient and polymer get equally many, or one more.
        seed: of everything random.
        outlier_share: probability, 0 to 1, that one outcome of a row is grossly wrong.
        missing_share: probability, 0 to 1, that an outcome is missing: a run that ended early.
        noise_scale: factor of every standard deviation of `NOISE`; 0 for none.
        outcome_scale: of the model behind the numbers, `MechanisticModel`.

    Returns:
        `COLUMNS`, ordered by patient and polymer: numbers in float32, NaN where one is missing,
        texts as categories. `is_optimal` is 1 where the noisy change in LVEF and the noisy stress
        reduction both reach their thresholds, 0 where not, NaN where either is missing.

    Raises:
        ValueError: an argument is out of its range; the message has the flag's name, the value and
            what is allowed.
    """
    cohort = load_cohort()
    pairs = NUM_POLYMERS * patients
    scales = get_args(OutcomeScale)
    for flag, value, good, allowed in (
        ("--patients", patients, 1 <= patients <= len(cohort), f"1 to {len(cohort)}, the cohort"),
        ("--rows", rows, rows >= pairs, f"{pairs} or more, one per patient and polymer"),
        ("--seed", seed, seed >= 0, "0 or more"),
        ("--outlier-share", outlier_share, 0.0 <= outlier_share <= 1.0, "0 to 1"),
        ("--missing-share", missing_share, 0.0 <= missing_share <= 1.0, "0 to 1"),
        ("--noise-scale", noise_scale, 0.0 <= noise_scale < math.inf, "a finite number, 0 or more"),
        ("--outcome-scale", outcome_scale, outcome_scale in scales, ", ".join(scales)),
    ):
        if not good:
            raise ValueError(f"{flag} is {value}; allowed: {allowed}")

    # A stream for each purpose, so that what one of them draws changes none of the others.
    rng_patients, rng_designs, *rng_faults = np.random.default_rng(seed).spawn(5)
    table = plan(cohort, patients, rows, rng_patients, rng_designs)
    truth = noiseless(table, outcome_scale)
    faults = Faults(noise_scale, outlier_share, missing_share)
    for name, values in faults.laid_over(truth, *rng_faults).items():
        table[name] = values
    table[LABEL] = is_optimal(table)
    return table[COLUMNS]


class Faults(NamedTuple):
    """How far a simulation may miss; see `make_outcomes`."""

    noise_scale: float
    outlier_share: float
    missing_share: float

    def laid_over(
        self,
        truth: pd.DataFrame,
        rng_noise: np.random.Generator,
        rng_outliers: np.random.Generator,
        rng_gaps: np.random.Generator,
    ) -> dict[str, np.ndarray]:
        """The outcomes of `NOISE`, float32, from what `noiseless` returns."""
        count, feasibility = len(truth), truth["feasibility"].to_numpy()
        is_outlier = rng_outliers.random(count) < self.outlier_share
        which = rng_outliers.integers(len(NOISE), size=count)
        is_too_large = rng_outliers.random(count) < 0.5
        outcomes = {}
        for i, (name, noise) in enumerate(NOISE.items()):
            low, high = LIMITS[name]
            exact = truth[name].to_numpy()
            sd = self.noise_scale * noise.sd(exact, feasibility)
            value = exact + sd * rng_noise.standard_normal(count)
            # Mirrored in its range: the other sign of a change, the complement of a risk.
            wrong = np.where(is_too_large, OUTLIER_FACTOR * value, low + high - value)
            value = np.where(is_outlier & (which == i), wrong, value).clip(low, high)
            value[rng_gaps.random(count) < self.missing_share] = np.nan
            outcomes[name] = value.astype(np.float32)
        return outcomes


def plan(
    cohort: Cohort,
    patients: int,
    rows: int,
    rng_patients: np.random.Generator,
    rng_designs: np.random.Generator,
) -> pd.DataFrame:
    """The runs to simulate: patients and designs, ordered by patient and polymer."""
    chosen = choose_patients(cohort.features.numpy(), patients, rng_patients)
    columns, sizes = draw_designs(patients, rows, rng_designs)
    row = np.repeat(np.repeat(chosen, NUM_POLYMERS), sizes)
    ids = [cohort.patient_ids[i] for i in chosen]
    features = cohort.features.numpy().astype(np.float32)[row]
    return pd.DataFrame(
        {
            ID_COLUMN: pd.Categorical.from_codes(np.searchsorted(chosen, row), ids),
            **dict(zip(FEATURE_COLUMNS, features.T, strict=True)),
            **columns,
        }
    )


def choose_patients(features: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of the patients to simulate, in ascending order.

    The medoids of k-means clusters in the standardised features. A network is used on patients
    whom nobody simulated, and what k-means makes small is the mean squared distance to the nearest
    simulated one, over the whole cohort: every kind of patient is near one, common kinds are taken
    more densely, and rare ones not left out. A farthest-point design would take the rim of the
    cohort only, and a random draw leaves gaps.

    Args:
        features: (P, C), columns of `PATIENT_FIELDS`.
        count: 1 to P.
        rng: where the clusters start.
    """
    z = (features - features.mean(0)) / features.std(0)
    start = int(rng.integers(2**31))
    clusters = KMeans(count, n_init=4, random_state=start).fit(z)
    away = np.linalg.norm(z - clusters.cluster_centers_[clusters.labels_], axis=1)
    # Two patients are equally far from their mean but for the last digits, which vary with the
    # number of threads; rounded, the first of them is taken.
    nearest_first = np.lexsort((away.round(9), clusters.labels_))
    _, medoid = np.unique(clusters.labels_[nearest_first], return_index=True)
    return np.sort(nearest_first[medoid])


def draw_designs(
    patients: int, rows: int, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray | pd.Categorical], np.ndarray]:
    """A fresh Latin hypercube for each pair of patient and polymer.

    All but the last of its dimensions are the formulation, over the full ranges of the action space
    since a policy acts over them, and the last is cut into the coverages. The n designs of a pair
    have one in every nth part of each range.

    Returns:
        The columns `polymer_name`, `FORMULATION_COLUMNS` and `coverage`, ordered by patient and
        polymer; and the number of designs per pair, (patients * polymers,).
    """
    pairs = NUM_POLYMERS * patients
    sizes = np.full(pairs, rows // pairs)
    sizes[rng.permutation(pairs)[: rows % pairs]] += 1
    sampler = qmc.LatinHypercube(len(FORMULATION_FIELDS) + 1, rng=rng)
    *shares, level = np.concatenate([sampler.random(size) for size in sizes]).T
    polymer = np.repeat(np.tile(np.arange(NUM_POLYMERS), patients), sizes)
    formulation = {
        field.name: (field.low + share * (field.high - field.low)).astype(np.float32)
        for field, share in zip(FORMULATION_FIELDS, shares, strict=True)
    }
    coverage = (level * len(COVERAGES)).astype(np.int8)
    return {
        "polymer_name": pd.Categorical.from_codes(polymer, load_polymers().names),
        **formulation,
        "coverage": pd.Categorical.from_codes(coverage, COVERAGES),
    }, sizes


def noiseless(table: pd.DataFrame, outcome_scale: OutcomeScale = "source") -> pd.DataFrame:
    """What the model predicts for a table's patients and designs, in float64.

    Returns:
        The columns of `OUTCOME_FIELDS` and `feasibility`, for the same rows.
    """
    model = MechanisticModel(outcome_scale=outcome_scale)

    def codes(column: str, names: tuple[str, ...]) -> torch.Tensor:
        return torch.tensor(pd.Categorical(table[column], names).codes, dtype=torch.int64)

    polymer = codes("polymer_name", load_polymers().names)
    patient = torch.tensor(table[FEATURE_COLUMNS].to_numpy(np.float64))
    formulation = torch.tensor(table[FORMULATION_COLUMNS].to_numpy(np.float64))
    outcomes = model(patient, polymer, formulation, codes("coverage", COVERAGES))
    feasibility = model.feasibility(polymer, formulation)
    return pd.DataFrame(
        {name: value.numpy() for name, value in outcomes._asdict().items()}
        | {"feasibility": feasibility.numpy()},
        index=table.index,
    )


def is_optimal(table: pd.DataFrame) -> pd.Series:
    """Hard label of a table's own outcomes: 1 or 0 in float32, NaN where one is missing."""
    known = table[["delta_ef_pct", "stress_reduction_pct"]].notna().all(axis=1)
    return reaches_thresholds(table, RewardConfig()).astype(np.float32).where(known)


def noise_ceiling(
    table: pd.DataFrame, outcome_scale: OutcomeScale = "source"
) -> dict[str, dict[str, float]]:
    """How well the noiseless model itself does on a table: no network can be expected to do better.

    Returns:
        By outcome: `mae` and `rmse` in its unit, and `r2`; of `is_optimal`, `auroc` of the
        noiseless probability and `f1` at a probability of 0.5. NaN where the rows do not suffice.
    """
    truth = noiseless(table, outcome_scale)
    of_number = {
        "mae": metrics.mean_absolute_error,
        "rmse": metrics.root_mean_squared_error,
        "r2": metrics.r2_score,
    }
    of_label = {
        "auroc": metrics.roc_auc_score,
        "f1": lambda label, logit: metrics.f1_score(label, logit > 0.0, zero_division=math.nan),
    }

    def measured(name: str, predicted: str, measures: dict[str, Callable]) -> dict[str, float]:
        known = table[name].notna()
        if not known.any():
            return dict.fromkeys(measures, math.nan)
        columns = table.loc[known, name].astype(np.float64), truth.loc[known, predicted]
        return {key: float(measure(*columns)) for key, measure in measures.items()}

    with warnings.catch_warnings():
        # One row, or rows of one class: scikit-learn warns and returns NaN.
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        return {name: measured(name, name, of_number) for name in NOISE} | {
            LABEL: measured(LABEL, "optimal_logit", of_label)
        }


def csv(table: pd.DataFrame) -> bytes:
    """CSV with the digits that give the same float32 back, and a blank for a missing outcome."""
    return table.to_csv(index=False, lineterminator="\n").encode("ascii")


def parquet(table: pd.DataFrame, settings: dict[str, object]) -> bytes:
    """Parquet with nulls for missing outcomes, and under `hydrogel_gym` how it was made."""
    made = {"made_by": "patients/make_outcomes.py", "synthetic": True, "truth": "mechanistic"}
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    arrow = arrow.replace_schema_metadata(
        arrow.schema.metadata | {b"hydrogel_gym": json.dumps(made | settings).encode()}
    )
    stream = io.BytesIO()
    pq.write_table(arrow, stream, compression="zstd")
    return stream.getvalue()


def summary(table: pd.DataFrame, outcome_scale: OutcomeScale) -> str:
    """What a table contains, and how well a perfect network would do on it."""
    missing = table[list(NOISE)].isna().to_numpy().mean()
    lines = [
        f"{len(table):,} synthetic rows of {table[ID_COLUMN].nunique()} patients and "
        f"{table['polymer_name'].nunique()} polymers: {100.0 * table[LABEL].mean():.1f} % of the "
        f"labelled are optimal, {100.0 * missing:.1f} % of outcomes are missing",
        "noise ceiling, the noiseless model against this table:",
    ]
    for name, figures in noise_ceiling(table, outcome_scale).items():
        values = "  ".join(f"{key.upper()} {value:.4f}" for key, value in figures.items())
        lines.append(f"  {name:<21} {values}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description="Make up a table of Stage-1 outcomes; every row is synthetic.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("outcomes.parquet"), help="or .csv")
    parser.add_argument("--patients", type=int, help="of the training cohort")
    parser.add_argument("--rows", type=int, help="in all")
    parser.add_argument("--seed", type=int, help="of everything random")
    parser.add_argument("--outlier-share", type=float, help="rows with a grossly wrong outcome")
    parser.add_argument("--missing-share", type=float, help="outcomes that are missing")
    parser.add_argument("--noise-scale", type=float, help="factor of every standard deviation")
    parser.add_argument("--outcome-scale", help="scale of the model: source or literature")
    parser.set_defaults(**make_outcomes.__kwdefaults__)
    settings = vars(parser.parse_args(argv))
    output = settings.pop("output")
    try:
        if output.suffix not in SUFFIXES:
            raise ValueError(f"--output is {output}; allowed: a name in {' or '.join(SUFFIXES)}")
        if not output.parent.is_dir():
            raise ValueError(f"--output is {output}; allowed: a file in a folder that exists")
        table = make_outcomes(**settings)
        content = csv(table) if output.suffix == ".csv" else parquet(table, settings)
        write_atomically(output, content)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print(summary(table, settings["outcome_scale"]))
    print(f"written: {output} ({len(content) / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
