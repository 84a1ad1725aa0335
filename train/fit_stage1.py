"""Fit a Stage-1 reward model from a table of simulated or measured outcomes.

    python patients/make_outcomes.py --output outcomes.parquet          # a made-up table, synthetic
    python train/fit_stage1.py outcomes.parquet --truth mechanistic
    python train/ppo_hybrid.py --preset quick --reward-model runs/stage1/stage1.pt

The table is CSV or Parquet, a row per simulation: `patient_id`, the eleven columns of a cohort
(`hydrogel_gym.spaces.PATIENT_FIELDS`), `polymer_name`, the four of a formulation
(`FORMULATION_FIELDS`), `coverage` (a name of `COVERAGES`), and the outcomes `delta_ef_pct`,
`stress_reduction_pct`, `is_optimal` (0 or 1), `toxicity_risk`, `structural_integrity` and
`fibrosis_risk`, whose cells may be empty. Other columns are ignored.

Some patients are held out whole, to report on; the rest are dealt to the members of an ensemble,
each of which is fitted without its own share of them and stopped by it. Written are `stage1.pt`
(weights and plain types), `metrics.json`, `history.csv` and two pictures. Running the model needs
neither the table nor what the polymers' chemistry was computed with.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import ppo_hybrid
import torch
import tyro
from ppo_hybrid import UsageError, check_ranges
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, smooth_l1_loss
from tqdm import tqdm

import hydrogel_gym
from hydrogel_gym.files import write_atomically
from hydrogel_gym.models.ensemble import (
    DEFAULT_PESSIMISM,
    OPTIMAL,
    Architecture,
    FittedRange,
    Scaling,
    Stage1Ensemble,
    Stage1Network,
    raw_numeric,
    save_stage1,
)
from hydrogel_gym.problem.fields import (
    COVERAGES,
    FORMULATION_FIELDS,
    FORMULATION_LOW,
    OUTCOME_FIELDS,
    PATIENT_FIELDS,
    Field,
    Outcomes,
)

LABEL = "is_optimal"
# Columns of the table, in the order of `Outcomes`; what is predicted of the label is its logit.
OUTCOME_COLUMNS = tuple(LABEL if name == "optimal_logit" else name for name in Outcomes._fields)
REGRESSED = tuple(name for name in OUTCOME_COLUMNS if name != LABEL)
MIN_PATIENTS = 10
# Where the loss turns from quadratic to linear, in standard deviations of an outcome: beyond the
# noise of a simulation, so that one gone wrong pulls no harder than one that is merely noisy.
OUTLIER_FROM = 0.3
VALIDATION_ROWS = 20_000  # per member, so that looking costs little beside an epoch
# Factors between units that are confused: kPa and Pa, days and hours, mm and um, share and percent,
# S/m and mS/cm, days and weeks.
UNIT_FACTORS = (1000.0, 24.0, 100.0, 10.0, 7.0)
CALIBRATION_BINS = 15
BATCH_ROWS = 16_384  # predicted at a time


@dataclass
class Args:
    """Fit an ensemble of Stage-1 networks to a table of outcomes."""

    table: tyro.conf.Positional[Path]
    """CSV or Parquet, a row per simulation or experiment"""
    output_dir: Path = Path("runs/stage1")
    """where the model and its report go"""
    overwrite: bool = False
    """replace the model that the output directory holds"""
    polymer_embeddings: Path | None = None
    """a vector per polymer, CSV or Parquet with a column `name`, or .npy in the order of the
    polymer table; default RDKit descriptors and Morgan fingerprints of the table's SMILES"""
    num_members: int = 5
    """networks of the ensemble"""
    holdout_share: float = 0.2
    """of the patients, to report on"""
    num_epochs: int = 30
    """passes over each member's rows, at most"""
    patience: int = 8
    """epochs without a better member before fitting ends"""
    batch_size: int = 2048
    """rows per member and update"""
    learning_rate: float = 3e-3
    """initial learning rate of AdamW, with cosine decay to zero"""
    weight_decay: float = 1e-2
    """of AdamW"""
    patient_noise: float = 0.05
    """noise on the patient's features while fitting, in their standard deviations: a table of few
    patients does not say what happens between them"""
    trunk_dim: int = 128
    """width of the encoder and the trunk"""
    pessimism: float = DEFAULT_PESSIMISM
    """standard deviations of the ensemble below its mean that a policy is rewarded for, unless it
    asks for others"""
    truth: str | None = None
    """reward model that the table was made from, if that is known: what it reaches on the held-out
    rows is the ceiling that their noise leaves"""
    seed: int = 1
    """of splits, weights and batches"""
    device: str = "auto"
    """auto (cuda if there is one, else cpu) or a torch device"""


class Table(NamedTuple):
    """Outcomes of N designs, checked."""

    patient: Tensor  # (N, 11)
    polymer_id: Tensor  # (N,) int64
    formulation: Tensor  # (N, 4)
    coverage: Tensor  # (N,) int64
    outcome: Tensor  # (N, 6) in the order of `OUTCOME_COLUMNS`, NaN where missing
    group: np.ndarray  # (N,) of patients

    def rows(self, index: Any) -> Table:
        """Some of them."""
        return Table(*(column[index] for column in self))


def read_table(path: Path) -> Table:
    """Read and check a table of outcomes.

    Raises:
        UsageError: names the column, the first row that is wrong, its value and what is allowed.
    """
    frame = _read_frame(path)

    def fail(cause: str) -> UsageError:
        return UsageError(f"table {path}: {cause}")

    fields = (*PATIENT_FIELDS, *FORMULATION_FIELDS)
    numeric = [*(f.name for f in fields), *OUTCOME_COLUMNS]
    wanted = ["patient_id", "polymer_name", "coverage", *numeric]
    if missing := [name for name in wanted if name not in frame.columns]:
        found = ", ".join(map(str, frame.columns))
        raise fail(f"missing columns: {', '.join(missing)}; columns found: {found}")
    if frame.empty:
        raise fail("no rows, only a header")
    numbers = {name: _numbers(frame, name, fail) for name in numeric}
    for field in fields:
        _check_range(field, numbers[field.name], fail, required=True)
    for field, name in zip(OUTCOME_FIELDS, OUTCOME_COLUMNS, strict=True):
        limits = Field(name, 0.0, 1.0, "") if name == LABEL else field
        _check_range(limits, numbers[name], fail, required=False)
        known = numbers[name][~np.isnan(numbers[name])]
        if len(np.unique(known)) < 2:
            told = f"is {known[0]:g} in every row" if len(known) else "is empty in every row"
            raise fail(f"{name} {told}; there is nothing to learn from a constant outcome")
    label = numbers[LABEL]
    if (bad := ~np.isin(label, (0.0, 1.0)) & ~np.isnan(label)).any():
        row = int(bad.argmax())
        raise fail(f"row {row + 1}, {LABEL}: {label[row]:g}; allowed: 0, 1 or empty")
    patient = np.column_stack([numbers[field.name] for field in PATIENT_FIELDS])
    polymers = hydrogel_gym.load_polymers().names
    return Table(
        torch.from_numpy(patient.astype(np.float32)),
        torch.from_numpy(_codes(frame, "polymer_name", polymers, fail)),
        torch.from_numpy(
            np.column_stack([numbers[f.name] for f in FORMULATION_FIELDS]).astype(np.float32)
        ),
        torch.from_numpy(_codes(frame, "coverage", COVERAGES, fail)),
        torch.from_numpy(
            np.column_stack([numbers[name] for name in OUTCOME_COLUMNS]).astype(np.float32)
        ),
        _groups(frame["patient_id"], patient, fail),
    )


def _read_frame(path: Path) -> pd.DataFrame:
    suffixes = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
    if path.suffix not in suffixes:
        raise UsageError(f"table {path}: suffix {path.suffix!r}; allowed: {', '.join(suffixes)}")
    if not path.is_file():
        raise UsageError(f"table {path}: no such file")
    try:
        return suffixes[path.suffix](path)
    except Exception as error:  # whatever the readers raise of a damaged file
        raise UsageError(f"table {path} cannot be read: {ppo_hybrid.reason(error)}") from error


def _numbers(frame: pd.DataFrame, name: str, fail: Any) -> np.ndarray:
    """(N,) float64, NaN where a cell is empty."""
    values = pd.to_numeric(frame[name], errors="coerce")
    if (bad := values.isna() & frame[name].notna()).any():
        row = int(bad.to_numpy().argmax())
        raise fail(f"row {row + 1}, {name}: {str(frame[name].iloc[row])!r}; expected a number")
    return values.to_numpy(np.float64, na_value=np.nan)


def _check_range(field: Field, values: np.ndarray, fail: Any, *, required: bool) -> None:
    missing = np.isnan(values)
    if required and missing.any():
        raise fail(f"row {int(missing.argmax()) + 1}, {field.name}: empty; only outcomes may be")
    # Bounds that were written as float32 come back a little beyond themselves.
    slack = 1e-5 * max(abs(field.low), abs(field.high)) if math.isfinite(field.high) else 0.0
    bad = ~missing & ~((values >= field.low - slack) & (values <= field.high + slack))
    if not bad.any():
        return
    row, middle = int(bad.argmax()), float(np.median(values[bad]))
    factors = [f for each in UNIT_FACTORS for f in (each, 1.0 / each)]
    fits = [f for f in factors if field.low <= middle / f <= field.high and middle != 0.0]
    hint = f"; is it in another unit? {1.0 / fits[0]:g} times the values would fit" if fits else ""
    unit = f" ({field.meaning})" if field.meaning else ""
    raise fail(
        f"row {row + 1}, {field.name}: {values[row]:g}; allowed: {field.low:g} to {field.high:g}"
        f"{unit}; rows out of range: {int(bad.sum())} of {len(values)}{hint}"
    )


def _codes(frame: pd.DataFrame, column: str, names: tuple[str, ...], fail: Any) -> np.ndarray:
    """(N,) int64 index into `names`."""
    index = {name: code for code, name in enumerate(names)}
    codes = np.array([index.get(value, -1) for value in frame[column].astype(str)], np.int64)
    if (codes < 0).any():
        row = int((codes < 0).argmax())
        value = str(frame[column].iloc[row])
        near = difflib.get_close_matches(value, names, n=3, cutoff=0.4)
        told = f"nearest: {', '.join(near)}" if near else f"allowed: {', '.join(names)}"
        unknown = sorted(set(frame[column].astype(str)) - set(names))
        others = f"; unknown in all: {', '.join(unknown[:5])}" if len(unknown) > 1 else ""
        raise fail(f"row {row + 1}, {column}: {value!r} is unknown; {told}{others}")
    return codes


def _groups(ids: pd.Series, patient: np.ndarray, fail: Any) -> np.ndarray:
    """(N,) int64, equal for rows of the same patient, by name or by features.

    Two names for one patient would put her on both sides of a split.
    """
    if ids.isna().any():
        raise fail(f"row {int(ids.isna().to_numpy().argmax()) + 1}, patient_id: empty")
    _, by_features = np.unique(patient, axis=0, return_inverse=True)
    by_features = by_features.reshape(-1)
    several = pd.Series(by_features).groupby(ids.astype(str).to_numpy()).nunique()
    if (several > 1).any():
        name = several.index[(several > 1).to_numpy().argmax()]
        raise fail(
            f"patient {name!r} has {several[name]} different sets of features; expected one: a "
            "patient is held out whole, or her other rows would give her away"
        )
    return by_features.astype(np.int64)


class Split(NamedTuple):
    """Rows of a table by what they are for; no patient is in two of the first three of a member."""

    test: np.ndarray  # to report on
    train: list[np.ndarray]  # per member
    validation: list[np.ndarray]  # per member, to stop by


def split_patients(
    group: np.ndarray, *, holdout_share: float, num_members: int, seed: int
) -> Split:
    """Split by whole patients.

    Args:
        group: (N,) of patients.
        holdout_share: of the patients, to report on.
        num_members: each is validated on an equal share of the other patients, fitted on the rest.
        seed: of the shuffles.

    Raises:
        UsageError: there are too few patients.
    """
    from sklearn.model_selection import GroupKFold, GroupShuffleSplit

    num_patients = len(np.unique(group))
    needed = max(MIN_PATIENTS, math.ceil((num_members + 1) / (1.0 - holdout_share)))
    if num_patients < needed:
        raise UsageError(
            f"the table has {num_patients} patients; needed: {needed}, so that some can be held "
            f"out and each of {num_members} members can be stopped by others than it is fitted to"
        )
    rows = np.zeros(len(group))
    outer = GroupShuffleSplit(n_splits=1, test_size=holdout_share, random_state=seed)
    fitted, test = next(outer.split(rows, groups=group))
    inner = GroupKFold(n_splits=max(num_members, 2), shuffle=True, random_state=seed)
    folds = list(inner.split(rows[fitted], groups=group[fitted]))[:num_members]
    return Split(test, [fitted[a] for a, _ in folds], [fitted[b] for _, b in folds])


def check_split(table: Table, split: Split) -> None:
    """Refuse a split of which one part knows nothing of an outcome.

    Raises:
        UsageError: names the outcome and the part.
    """
    parts = {"held out": [split.test], "fitted": split.train, "stopped by": split.validation}
    for i, name in enumerate(OUTCOME_COLUMNS):
        known = ~table.outcome[:, i].isnan().numpy()
        for part, shares in parts.items():
            if not all(known[rows].any() for rows in shares):
                raise UsageError(
                    f"{name} is empty for all patients that would be {part}; too few patients have "
                    "it, or take another --seed"
                )


def polymer_embedding(path: Path | None) -> tuple[np.ndarray, str]:
    """A vector per polymer, standardised, and where it is from.

    The windows of the polymer table are part of it, since polymers of one SMILES differ in them.

    Args:
        path: see `Args.polymer_embeddings`.

    Returns:
        (24, d) float32 without constant columns, and a description.

    Raises:
        UsageError: the file does not hold a finite vector for each polymer, or two are the same.
    """
    table = hydrogel_gym.load_polymers()
    if path is None:
        vectors, origin = chemistry(table.smiles), "RDKit descriptors and Morgan fingerprints"
    else:
        vectors, origin = _embeddings_of(path, table.names), path.name
    windows = torch.cat(
        [
            table.youngs_modulus_kpa.log(),
            table.half_life_days.log(),
            table.conductivity_s_per_m,
        ],
        -1,
    ).numpy()

    def standard(x: np.ndarray) -> np.ndarray:
        std = x.std(0)
        x = (x[:, std > 1e-9] - x[:, std > 1e-9].mean(0)) / std[std > 1e-9]
        return x / math.sqrt(max(x.shape[1], 1))  # so that many columns weigh no more than few

    joined = np.concatenate([standard(vectors), standard(windows)], 1).astype(np.float32)
    for i in range(len(joined)):
        for j in range(i):
            if np.allclose(joined[i], joined[j]):
                raise UsageError(
                    f"polymers {table.names[j]} and {table.names[i]} have the same embedding and "
                    "the same windows, so that no model could tell them apart"
                )
    return joined * math.sqrt(joined.shape[1] / (joined**2).sum(1).mean()), origin


def chemistry(smiles: tuple[str, ...]) -> np.ndarray:
    """(n, d) RDKit descriptors and Morgan fingerprints (counts, radius 2, 1,024 bits).

    Raises:
        UsageError: RDKit is missing.
    """
    if importlib.util.find_spec("rdkit") is None:
        raise UsageError(
            'the polymers\' chemistry needs rdkit: pip install -e ".[stage1]", or pass '
            "--polymer-embeddings"
        )
    from rdkit import Chem, RDLogger
    from rdkit.Chem import Descriptors, rdFingerprintGenerator

    RDLogger.DisableLog("rdApp.*")
    molecules = [Chem.MolFromSmiles(text) for text in smiles]
    described = pd.DataFrame([Descriptors.CalcMolDescriptors(each) for each in molecules])
    # Some are undefined for an ion or a metal, and a few grow with the size beyond any use.
    described = described.replace([np.inf, -np.inf], np.nan).dropna(axis=1)
    described = np.sign(described) * np.log1p(described.abs())
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024)
    bits = np.stack([generator.GetCountFingerprintAsNumPy(each) for each in molecules])
    return np.concatenate([described.to_numpy(np.float64), np.log1p(bits.astype(np.float64))], 1)


def _embeddings_of(path: Path, names: tuple[str, ...]) -> np.ndarray:
    """(24, d) of a file, in the order of the polymer table."""
    if not path.is_file():
        raise UsageError(f"--polymer-embeddings {path}: no such file")
    if path.suffix == ".npy":
        try:
            vectors = np.load(path, allow_pickle=False).astype(np.float64)
        except Exception as error:
            raise UsageError(
                f"--polymer-embeddings {path} cannot be read: {ppo_hybrid.reason(error)}"
            ) from error
    else:
        frame = _read_frame(path)
        if "name" not in frame.columns:
            raise UsageError(f"--polymer-embeddings {path}: no column `name`")
        frame = frame.set_index("name")
        if missing := [name for name in names if name not in frame.index]:
            raise UsageError(f"--polymer-embeddings {path}: no row for {', '.join(missing)}")
        if frame.index.duplicated().any():
            name = frame.index[frame.index.duplicated()][0]
            raise UsageError(f"--polymer-embeddings {path}: two rows for {name}")
        try:
            vectors = frame.loc[list(names)].to_numpy(np.float64)
        except ValueError as error:
            raise UsageError(f"--polymer-embeddings {path}: not all numbers: {error}") from error
    if vectors.ndim != 2 or len(vectors) != len(names) or not vectors.shape[1]:
        raise UsageError(
            f"--polymer-embeddings {path}: shape {vectors.shape}; expected ({len(names)}, any)"
        )
    finite = np.isfinite(vectors).all(1)
    if not finite.all():
        name = names[int(finite.argmin())]
        raise UsageError(f"--polymer-embeddings {path}: {name} is not finite")
    return vectors


def task_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """(K, 6) mean loss of each member and outcome over the cells that are there.

    Args:
        prediction: (K, B, 6), standardised.
        target: (K, B, 6), standardised, the label as it is, NaN where missing.
    """
    there = ~target.isnan()
    target = target.nan_to_num()
    losses = smooth_l1_loss(prediction, target, reduction="none", beta=OUTLIER_FROM)
    label = binary_cross_entropy_with_logits(
        prediction[..., OPTIMAL], target[..., OPTIMAL], reduction="none"
    )
    losses = torch.cat([losses[..., :OPTIMAL], label.unsqueeze(-1), losses[..., OPTIMAL + 1 :]], -1)
    return (losses * there).sum(1) / there.sum(1).clamp(min=1)


def weighted(losses: Tensor, log_variance: Tensor) -> Tensor:
    """Total of all members, each outcome weighted by its learned uncertainty.

    Args:
        losses: (K, 6).
        log_variance: (K, 6).

    References:
        Kendall, Gal, Cipolla. Multi-task learning using uncertainty to weigh losses. CVPR 2018.
    """
    return (losses * torch.exp(-log_variance) + 0.5 * log_variance).sum()


def scaling_of(table: Table) -> Scaling:
    """Means and standard deviations; of the outcomes robust ones, for rows that went wrong."""
    numeric = raw_numeric(table.patient, table.formulation, table.coverage)
    std = numeric.std(0)
    outcome = table.outcome.numpy()
    low, middle, high = np.nanpercentile(outcome, (5, 50, 95), axis=0)
    mean = torch.from_numpy(middle.astype(np.float32))
    spread = torch.from_numpy(((high - low) / (2 * 1.645)).astype(np.float32))
    # An outcome that is the same for most: its own deviation.
    deviation = torch.from_numpy(np.nanstd(outcome, axis=0).astype(np.float32))
    spread = torch.where(spread > 1e-3 * deviation, spread, deviation)
    mean[OPTIMAL], spread[OPTIMAL] = 0.0, 1.0
    return Scaling(numeric.mean(0), torch.where(std > 0, std, torch.ones_like(std)), mean, spread)


def fitted_range(table: Table) -> FittedRange:
    """Where a table has rows."""
    num_polymers = len(hydrogel_gym.load_polymers())
    low = torch.from_numpy(FORMULATION_LOW).repeat(num_polymers, 1)
    high = low.clone()
    seen = torch.zeros(num_polymers, len(COVERAGES))
    for polymer in table.polymer_id.unique().tolist():
        mine = table.polymer_id == polymer
        formulation = table.formulation[mine]
        low[polymer], high[polymer] = formulation.amin(0), formulation.amax(0)
        seen[polymer, table.coverage[mine].unique()] = 1.0
    return FittedRange(table.patient.amin(0), table.patient.amax(0), low, high, seen)


def fit(
    table: Table, split: Split, embedding: np.ndarray, args: Args
) -> tuple[Stage1Ensemble, list[dict[str, float]]]:
    """Fit all members at once.

    Args:
        table: the outcomes.
        split: who is fitted to what.
        embedding: (24, d) of the polymers.
        args: sizes and optimiser.

    Returns:
        The ensemble, and the losses of every epoch.

    Raises:
        FloatingPointError: the loss is not a number.
    """
    device = ppo_hybrid.resolve_device(args.device)
    used = np.unique(np.concatenate([*split.train, *split.validation]))
    scaling = scaling_of(table.rows(used))
    categories = hydrogel_gym.load_polymers().categories
    names = sorted(set(categories))
    torch.manual_seed(args.seed)
    network = Stage1Network(
        Architecture(
            polymer_dim=embedding.shape[1],
            num_categories=len(names),
            num_members=args.num_members,
            encoder_dim=args.trunk_dim,
            trunk_dim=args.trunk_dim,
        ),
        torch.from_numpy(embedding),
        torch.tensor([names.index(each) for each in categories]),
    ).to(device)
    log_variance = nn.Parameter(torch.zeros(args.num_members, len(OUTCOME_COLUMNS), device=device))

    numeric = raw_numeric(table.patient, table.formulation, table.coverage)
    numeric = ((numeric - scaling.numeric_mean) / scaling.numeric_std).to(device)
    target = ((table.outcome - scaling.outcome_mean) / scaling.outcome_std).to(device)
    polymer = table.polymer_id.to(device)
    generator = torch.Generator(device).manual_seed(args.seed)
    train = [torch.from_numpy(rows).to(device) for rows in split.train]
    batch_size = min(args.batch_size, *(len(rows) for rows in train))
    steps = min(len(rows) for rows in train) // batch_size
    pick = np.random.default_rng(args.seed)
    count = min(VALIDATION_ROWS, *(len(rows) for rows in split.validation))
    validation = torch.from_numpy(
        np.stack([pick.choice(rows, count, replace=False) for rows in split.validation])
    ).to(device)

    weights = [p for p in network.parameters() if p.dim() > 2]
    others = [p for p in network.parameters() if p.dim() <= 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": weights, "weight_decay": args.weight_decay},
            {"params": [*others, log_variance], "weight_decay": 0.0},
        ],
        lr=args.learning_rate,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.num_epochs * steps)
    num_patient = len(PATIENT_FIELDS)
    best = torch.full((args.num_members,), math.inf, device=device)
    kept = {name: p.detach().clone() for name, p in network.named_parameters()}
    history: list[dict[str, float]] = []
    last_better = 0
    bar = tqdm(range(1, args.num_epochs + 1), desc="fitting", unit="epoch", dynamic_ncols=True)
    for epoch in bar:
        began, total = time.perf_counter(), torch.zeros((), device=device)
        order = torch.stack(
            [
                rows[torch.randperm(len(rows), generator=generator, device=device)][
                    : steps * batch_size
                ]
                for rows in train
            ]
        )
        for rows in order.split(batch_size, dim=1):
            x = numeric[rows]
            noise = torch.randn(*x.shape[:2], num_patient, generator=generator, device=device)
            x = torch.cat(
                [x[..., :num_patient] + args.patient_noise * noise, x[..., num_patient:]], -1
            )
            losses = task_losses(network(x, polymer[rows]), target[rows])
            loss = weighted(losses, log_variance)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += losses.detach().mean()
        with torch.no_grad():
            held_out = task_losses(
                network(numeric[validation], polymer[validation]), target[validation]
            )
        score = held_out.mean(-1)
        if not score.isfinite().all():
            raise FloatingPointError(
                f"epoch {epoch}: the loss of a member is not finite; lower --learning-rate"
            )
        better = score < best
        best = torch.where(better, score, best)
        for name, parameter in network.named_parameters():
            kept[name][better] = parameter.detach()[better]
        last_better = epoch if better.any() else last_better
        row = {
            "epoch": epoch,
            "train_loss": float(total) / steps,
            "validation_loss": float(score.mean()),
            "best_validation_loss": float(best.mean()),
            "members_better": int(better.sum()),
            **{
                f"validation_{name}": float(x)
                for name, x in zip(OUTCOME_COLUMNS, held_out.mean(0), strict=True)
            },
            "seconds": time.perf_counter() - began,
        }
        history.append(row)
        bar.set_postfix(train=f"{row['train_loss']:.4f}", unseen=f"{row['validation_loss']:.4f}")
        if epoch - last_better >= args.patience:
            break
    network.load_state_dict(kept, strict=False)
    ensemble = Stage1Ensemble(
        network, scaling, fitted_range(table.rows(used)), pessimism=args.pessimism
    )
    return ensemble.to(device), history


def in_batches(predict: Any, table: Table, device: torch.device) -> np.ndarray:
    """(N, 6): the outcomes that a function of designs returns for the rows of a table."""
    parts = []
    for begin in range(0, len(table.group), BATCH_ROWS):
        rows = table.rows(slice(begin, begin + BATCH_ROWS))
        design = (rows.patient, rows.polymer_id, rows.formulation, rows.coverage)
        with torch.no_grad():
            parts.append(torch.stack(list(predict(*(x.to(device) for x in design))), -1).cpu())
    return torch.cat(parts).numpy()


def as_in_table(outcomes: Outcomes) -> Outcomes:
    """Outcomes as a table has them, the label as a probability."""
    return outcomes._replace(optimal_logit=outcomes.optimal_logit.sigmoid())


def quality(predicted: np.ndarray, observed: np.ndarray) -> dict[str, dict[str, float]]:
    """Errors of predictions, by outcome.

    Args:
        predicted: (N, 6) in the order of `OUTCOME_COLUMNS`.
        observed: (N, 6), NaN where missing.

    Returns:
        `mae`, `rmse` and `r2` of each outcome; of the label `auroc`, `f1` (at even odds),
        `calibration_error` (expected, `CALIBRATION_BINS` bins of equal width) and `share`.
    """
    from sklearn import metrics

    result: dict[str, dict[str, float]] = {}
    for i, name in enumerate(OUTCOME_COLUMNS):
        there = ~np.isnan(observed[:, i])
        p, y = predicted[there, i].astype(np.float64), observed[there, i].astype(np.float64)
        if name != LABEL:
            result[name] = {
                "mae": metrics.mean_absolute_error(y, p),
                "rmse": metrics.root_mean_squared_error(y, p),
                "r2": metrics.r2_score(y, p),
            }
            continue
        both = len(np.unique(y)) == 2  # else no order of the two can be told
        bins = calibration(p, y)
        result[name] = {
            "auroc": metrics.roc_auc_score(y, p) if both else math.nan,
            "f1": metrics.f1_score(y, p > 0.5, zero_division=0.0),
            "calibration_error": float(
                (bins["share"] * (bins["predicted"] - bins["observed"]).abs()).sum()
            ),
            "share": float(y.mean()),
        }
    return {name: {k: float(v) for k, v in each.items()} for name, each in result.items()}


def calibration(probability: np.ndarray, label: np.ndarray) -> pd.DataFrame:
    """Mean prediction, observed share and share of all rows, of each bin that has rows."""
    bins = np.minimum((probability * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    frame = pd.DataFrame({"predicted": probability, "observed": label})
    grouped = frame.groupby(bins)
    return grouped.mean().assign(share=grouped.size() / len(frame))


def draw_reliability(path: Path, probability: np.ndarray, label: np.ndarray) -> None:
    """Picture of how often a design was optimal, by how probable that was said to be."""
    from matplotlib.figure import Figure

    bins = calibration(probability, label)
    figure = Figure(figsize=(5, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="perfectly calibrated")
    top.plot(bins["predicted"], bins["observed"], marker="o", label="unseen patients")
    top.set(ylabel="observed share of optimal designs", title="Reliability of `optimal`")
    top.legend()
    bottom.bar(bins["predicted"], bins["share"], width=0.8 / CALIBRATION_BINS)
    bottom.set(xlabel="predicted probability", ylabel="share of designs")
    ppo_hybrid.save_figure(path, figure)


def draw_predictions(path: Path, predicted: np.ndarray, observed: np.ndarray) -> None:
    """Picture of predictions beside what was observed, for every outcome but the label."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(REGRESSED), 4), layout="constrained")
    axes = figure.subplots(1, len(REGRESSED))
    for ax, name in zip(axes, REGRESSED, strict=True):
        i = OUTCOME_COLUMNS.index(name)
        there = ~np.isnan(observed[:, i])
        p, y = predicted[there, i], observed[there, i]
        low, high = np.percentile(np.concatenate([p, y]), (0.1, 99.9))
        ax.hexbin(p, y, gridsize=50, bins="log", extent=(low, high, low, high), cmap="Blues")
        ax.plot([low, high], [low, high], color="0.3", linestyle="--")
        ax.set(xlabel=f"predicted {name}", ylabel="in the table, unseen patients")
    ppo_hybrid.save_figure(path, figure)


def fit_table(args: Args) -> dict[str, Any]:
    """Fit, judge and write a model; returns the content of `metrics.json`.

    Raises:
        UsageError: the request cannot be carried out; raised before fitting.
        FloatingPointError: the loss is not a number.
    """
    check_ranges(
        args,
        ("num_members num_epochs patience batch_size trunk_dim", "1 or more", lambda x: x >= 1),
        ("holdout_share", "above 0, below 1", lambda x: 0.0 < x < 1.0),
        ("learning_rate", "a finite number above 0", lambda x: 0.0 < x < math.inf),
        (
            "weight_decay patient_noise pessimism",
            "a finite number, at least 0",
            lambda x: 0.0 <= x < math.inf,
        ),
    )
    path = args.output_dir / "stage1.pt"
    if path.exists() and not args.overwrite:
        raise UsageError(f"{path} exists; pass --overwrite or another --output-dir")
    device = ppo_hybrid.resolve_device(args.device)
    truth = None
    if args.truth is not None:
        try:
            truth = hydrogel_gym.load_reward_model(args.truth, device)
        except hydrogel_gym.RewardModelError as error:
            raise UsageError(f"--truth: {error}") from error
    embedding, origin = polymer_embedding(args.polymer_embeddings)
    table = read_table(args.table)
    split = split_patients(
        table.group,
        holdout_share=args.holdout_share,
        num_members=args.num_members,
        seed=args.seed,
    )
    check_split(table, split)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    began = time.perf_counter()
    ensemble, history = fit(table, split, embedding, args)
    seconds = time.perf_counter() - began
    test = table.rows(split.test)
    observed = test.outcome.numpy()
    # It is the mean of the members that is judged, without pessimism.
    predicted = in_batches(lambda *d: as_in_table(ensemble.predict(*d).mean), test, device)
    spread = in_batches(lambda *d: ensemble.predict(*d).std, test, device).mean(0)
    report = {
        "table": str(args.table),
        "rows": len(table.group),
        "patients": len(np.unique(table.group)),
        "held_out_rows": len(split.test),
        "held_out_patients": len(np.unique(test.group)),
        "held_out": quality(predicted, observed),
        "members_std": dict(zip(OUTCOME_COLUMNS, spread.tolist(), strict=True)),
        "epochs": len(history),
        "seconds": seconds,
        "polymer_embedding": origin,
        "args": ppo_hybrid.plain_config(args),
        "versions": ppo_hybrid.versions(),
    }
    if truth is not None:
        exact = in_batches(lambda *d: as_in_table(truth(*d)), test, device)
        report["ceiling"] = quality(exact, observed)
        report["against_truth"] = {
            name: {"mae": error, "members_std": report["members_std"][name]}
            for name, error in zip(
                OUTCOME_COLUMNS, np.abs(predicted - exact).mean(0).tolist(), strict=True
            )
            if name != LABEL
        }
    save_stage1(path, ensemble.cpu(), report)
    write_atomically(
        args.output_dir / "history.csv", pd.DataFrame(history).to_csv(index=False).encode()
    )
    there = ~np.isnan(observed[:, OPTIMAL])
    draw_reliability(
        args.output_dir / "reliability.png", predicted[there, OPTIMAL], observed[there, OPTIMAL]
    )
    draw_predictions(args.output_dir / "predictions.png", predicted, observed)
    # Last: it says that the directory is complete.
    write_atomically(
        args.output_dir / "metrics.json", (json.dumps(report, indent=2) + "\n").encode()
    )
    return report


def show(report: dict[str, Any]) -> None:
    """Print how good a model is on patients it has not seen."""
    print(
        f"unseen: {report['held_out_patients']} of {report['patients']} patients, "
        f"{report['held_out_rows']:,} rows; the ceiling is what the noise of the table leaves"
    )
    for name, figures in report["held_out"].items():
        told = "  ".join(f"{key} {value:.3f}" for key, value in figures.items())
        print(f"{name:>22}  {told}")
        if "ceiling" in report:
            told = "  ".join(f"{key} {x:.3f}" for key, x in report["ceiling"][name].items())
            print(f"{'ceiling':>22}  {told}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        args = ppo_hybrid.read_command_line(Args, args=argv, prog="fit_stage1.py")
        report = fit_table(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(report)
    print(f"written: {args.output_dir / 'stage1.pt'}, fitted in {report['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
