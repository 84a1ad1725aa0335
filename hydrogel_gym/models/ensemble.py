"""The project's own Stage-1 network: an ensemble that predicts outcomes, and knows where it cannot.

To the Stage-1 network of HYDRA-BERT, in `network`, it adds a second opinion: the members of an
ensemble, each fitted without some of the patients. A policy finds whatever a reward model
overrates, so the outcomes that are rewarded can be pessimistic: the mean of the members, moved to
the worse side by a number of their standard deviations, and further outside what was fitted.

`train/fit_stage1.py` fits one; nothing that is needed there alone is needed here.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hydrogel_gym.archives import check_state, load_archive
from hydrogel_gym.errors import first_line
from hydrogel_gym.files import write_atomically
from hydrogel_gym.models.network import NUMERIC_FIELDS, Architecture, Stage1Network, raw_numeric
from hydrogel_gym.problem.fields import (
    FORMULATION_FIELDS,
    OUTCOME_FIELDS,
    PATIENT_FIELDS,
    Outcomes,
    flat_designs,
)
from hydrogel_gym.problem.polymers import NUM_POLYMERS, load_polymers
from hydrogel_gym.problem.reward import SAFETY

FORMAT = "hydrogel_gym.stage1.v1"
OPTIMAL = Outcomes._fields.index("optimal_logit")

# Which way is worse, in the order of `Outcomes`: up for what has a ceiling, down for all else.
_CEILINGS = [item.outcome for item in SAFETY if item.is_ceiling]
WORSE = tuple(1.0 if name in _CEILINGS else -1.0 for name in Outcomes._fields)
# A standard deviation per outcome means nothing for a logit; this takes 95 % to even odds.
OPTIMAL_LOGIT_SPREAD = 3.0
# Of what a feature may be: a fitted range is not taken for narrower. Else whatever was always the
# same in a table (no conductivity, of a gel that cannot conduct) could not be missed by anything.
LEAST_WIDTH = 0.05
DEFAULT_PESSIMISM = 0.25  # `benchmark/quality/overoptimisation.py`


class Stage1Error(ValueError):
    """A Stage-1 checkpoint that cannot be used."""


class Scaling(NamedTuple):
    """What the numbers of a table are divided by; from the rows that were fitted."""

    numeric_mean: Tensor  # (features,), of the logarithm for `LOG_FIELDS`
    numeric_std: Tensor  # (features,)
    outcome_mean: Tensor  # (outcomes,), 0 for the logit
    outcome_std: Tensor  # (outcomes,), 1 for the logit


class FittedRange(NamedTuple):
    """Where there was something to fit, in physical units."""

    patient_low: Tensor  # (C,)
    patient_high: Tensor  # (C,)
    formulation_low: Tensor  # (polymers, D)
    formulation_high: Tensor  # (polymers, D)
    seen: Tensor  # (polymers, coverages) float, 1 where a polymer was tried with a coverage


class Prediction(NamedTuple):
    """What an ensemble predicts for a batch of designs."""

    mean: Outcomes
    std: Outcomes  # among the members
    distance: Tensor  # (B,), outside what was fitted, in widths of the fitted range


def _outside(x: Tensor, low: Tensor, high: Tensor, least: Tensor) -> Tensor:
    """Sum over the last dimension of the distance to a range, in its widths, at least `least`."""
    width = torch.maximum(high - low, least)
    return (((low - x).clamp(min=0.0) + (x - high).clamp(min=0.0)) / width).sum(-1)


class Stage1Ensemble(nn.Module):
    """A frozen `Stage1Network` in physical units: a `RewardModel`.

    Args:
        network: the members.
        scaling: of features and outcomes.
        fitted: the range of the table.
        pessimism: standard deviations by which each outcome is worse than the members' mean. The
            reward falls with every outcome that gets worse, so it is no more than that of the mean.
        compute_dtype: of the products; None is float32.
    """

    # Buffers: the fields of `Scaling` and `FittedRange`, and what follows from them.
    numeric_mean: Tensor
    numeric_std: Tensor
    outcome_mean: Tensor
    outcome_std: Tensor
    patient_low: Tensor
    patient_high: Tensor
    formulation_low: Tensor
    formulation_high: Tensor
    seen: Tensor
    worse: Tensor
    spread: Tensor
    low: Tensor
    high: Tensor
    patient_least_width: Tensor
    formulation_least_width: Tensor
    polymer_table: Tensor

    def __init__(
        self,
        network: Stage1Network,
        scaling: Scaling,
        fitted: FittedRange,
        *,
        pessimism: float = DEFAULT_PESSIMISM,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not (math.isfinite(pessimism) and pessimism >= 0.0):
            raise ValueError(f"pessimism is {pessimism!r}; allowed: a finite number, at least 0")
        self.network = network
        self.pessimism = float(pessimism)
        self.compute_dtype = compute_dtype or torch.float32
        for name, value in {**scaling._asdict(), **fitted._asdict()}.items():
            self.register_buffer(name, value.to(torch.float32))
        worse, spread = torch.tensor(WORSE), self.outcome_std.clone()
        spread[OPTIMAL] = OPTIMAL_LOGIT_SPREAD
        low = torch.tensor([item.low for item in OUTCOME_FIELDS])
        high = torch.tensor([item.high for item in OUTCOME_FIELDS])
        for name, value in (("worse", worse), ("spread", spread), ("low", low), ("high", high)):
            self.register_buffer(name, value.to(torch.float32), persistent=False)
        for name, fields in (("patient", PATIENT_FIELDS), ("formulation", FORMULATION_FIELDS)):
            least = LEAST_WIDTH * torch.tensor([field.high - field.low for field in fields])
            self.register_buffer(f"{name}_least_width", least.to(torch.float32), persistent=False)
        self.register_buffer("polymer_table", torch.empty(0), persistent=False)
        self.freeze()

    @torch.no_grad()
    def freeze(self) -> None:
        """Compute what depends on the polymer alone, once."""
        self.eval().requires_grad_(False)
        self.network.to(torch.float32)
        self.polymer_table = self.network.polymer_table().to(self.compute_dtype)
        self.network.to(self.compute_dtype)

    def members(
        self, patient: Tensor, polymer_id: Tensor, formulation: Tensor, coverage: Tensor
    ) -> Tensor:
        """(K, B, outcomes): what each of K members predicts, in the outcomes' units, not clipped.

        Args:
            patient: (B, C) float32 in the order and units of `PATIENT_FIELDS`.
            polymer_id: (B,) int64.
            formulation: (B, D) float32 in the order and units of `FORMULATION_FIELDS`.
            coverage: (B,) int64.
        """
        numeric = raw_numeric(patient, formulation, coverage)
        numeric = ((numeric - self.numeric_mean) / self.numeric_std).to(self.compute_dtype)
        z: Tensor = self.network(numeric, polymer_id, self.polymer_table).to(torch.float32)
        return self.outcome_mean + self.outcome_std * z

    def patient_distance(self, patient: Tensor) -> Tensor:
        """(B,): how far a (B, C) patient is outside those that were fitted, in widths of a range.

        The sum over the features.
        """
        return _outside(patient, self.patient_low, self.patient_high, self.patient_least_width)

    def design_distance(self, polymer_id: Tensor, formulation: Tensor, coverage: Tensor) -> Tensor:
        """(B,): how far a design is outside those that were fitted.

        The sum over the formulation of the distance in widths of the polymer's fitted range, and 1
        for a polymer that was never tried with the coverage.
        """
        low, high = self.formulation_low[polymer_id], self.formulation_high[polymer_id]
        outside = _outside(formulation, low, high, self.formulation_least_width)
        return outside + (1.0 - self.seen[polymer_id, coverage])

    def predict(
        self, patient: Tensor, polymer_id: Tensor, formulation: Tensor, coverage: Tensor
    ) -> Prediction:
        """Mean and spread of the members, without pessimism.

        Takes what `forward` takes, and answers in the broadcast batch shape and the dtype of
        `patient`.
        """
        shape, flat = flat_designs(patient, polymer_id, formulation, coverage)
        members = self.members(*flat)
        mean = members.mean(0).clamp(self.low, self.high)
        std = members.std(0, correction=0)
        distance = self.patient_distance(flat[0]) + self.design_distance(*flat[1:])
        return Prediction(
            _outcomes(mean, shape, patient.dtype),
            _outcomes(std, shape, patient.dtype),
            distance.reshape(shape).to(patient.dtype),
        )

    def forward(
        self, patient: Tensor, polymer_id: Tensor, formulation: Tensor, coverage: Tensor
    ) -> Outcomes:
        """Outcomes, each worse than the mean of the members by `pessimism` standard deviations.

        Outside what was fitted the members agree on what none of them knows, so the standard
        deviation grows there by that of the outcome in the table for each width of the range. That
        is of the design alone: who the patient is, is not the policy's choice.

        Arguments and result are those of a `RewardModel`, whose batch shapes may broadcast.
        """
        shape, flat = flat_designs(patient, polymer_id, formulation, coverage)
        members = self.members(*flat)
        outcomes = members.mean(0)
        if self.pessimism > 0.0:
            distance = self.design_distance(*flat[1:]).unsqueeze(-1)
            std = members.std(0, correction=0) + distance * self.spread
            outcomes = outcomes + self.pessimism * self.worse * std
        return _outcomes(outcomes.clamp(self.low, self.high), shape, patient.dtype)


def _outcomes(columns: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Outcomes:
    """Outcomes of (B, outcomes) columns, in the given batch shape."""
    return Outcomes(*(column.reshape(shape).to(dtype) for column in columns.unbind(-1)))


def save_stage1(
    path: str | os.PathLike[str], ensemble: Stage1Ensemble, fit: dict[str, Any]
) -> None:
    """Write a checkpoint: weights and plain types only.

    Args:
        path: where; its folder must exist.
        ensemble: float32.
        fit: how it was fitted and how good it is, of plain types.
    """
    state = {name: value.detach().cpu() for name, value in ensemble.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(
        {
            "format": FORMAT,
            "architecture": dataclasses.asdict(ensemble.network.architecture),
            "state_dict": state,
            "numeric_fields": list(NUMERIC_FIELDS),
            "outcomes": list(Outcomes._fields),
            "polymers": list(load_polymers().names),
            "pessimism": ensemble.pessimism,
            "fit": fit,
        },
        buffer,
    )
    write_atomically(path, buffer.getvalue())


def read_stage1(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a checkpoint, checked.

    Raises:
        Stage1Error: it is missing, damaged, of another format or of other features or polymers.
    """

    def fail(cause: str) -> Stage1Error:
        return Stage1Error(f"Stage-1 checkpoint {os.fspath(path)}: {cause}")

    if not os.path.isfile(path):
        raise fail("no such file")
    try:
        saved = load_archive(path)
    except Exception as error:  # whatever the reader raises of a damaged or malicious file
        raise fail(f"it cannot be read: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        found = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
        raise fail(f"its format is {found!r}; expected {FORMAT!r}, as train/fit_stage1.py writes")
    if not isinstance(saved.get("pessimism"), float):
        raise fail(f"its pessimism is {saved.get('pessimism')!r}; expected a number")
    for key, here in (
        ("numeric_fields", NUMERIC_FIELDS),
        ("outcomes", Outcomes._fields),
        ("polymers", load_polymers().names),
    ):
        value = saved.get(key)
        there = value if isinstance(value, list) else []
        if there != list(here):
            differing = [
                f"{i} is {a!r}, here {b!r}"
                for i, (a, b) in enumerate(zip(there, here, strict=False))
                if a != b
            ]
            first = differing[0] if differing else f"there are {len(there)}, here {len(here)}"
            raise fail(f"{key} differ from this version's: {first}; fit it again")
    return saved


def load_stage1(
    path: str | os.PathLike[str],
    *,
    pessimism: float | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Stage1Ensemble:
    """The frozen ensemble of a checkpoint.

    Args:
        path: what `train/fit_stage1.py` wrote.
        pessimism: see `Stage1Ensemble`; None is the checkpoint's own.
        compute_dtype: of the products; None is float32.

    Raises:
        Stage1Error: see `read_stage1`; also if the weights do not fit or are not finite.
        ValueError: `pessimism` is out of range.
    """
    saved = read_stage1(path)
    try:
        state, architecture = saved["state_dict"], Architecture(**saved["architecture"])

        def make() -> Stage1Network:
            embedding = torch.zeros(state["network.polymer_embedding"].shape)
            return Stage1Network(
                architecture, embedding, torch.zeros(NUM_POLYMERS, dtype=torch.int64)
            )

        with torch.device("meta"):  # of the size that the file claims
            expected = {f"network.{name}": x for name, x in make().state_dict().items()}
        others = {name: x.to("meta") for name, x in state.items() if name not in expected}
        check_state(state, expected | others, os.path.getsize(path))
        network = make()
        scaling = Scaling(*(state[name] for name in Scaling._fields))
        fitted = FittedRange(*(state[name] for name in FittedRange._fields))
        network.load_state_dict(
            {
                name.removeprefix("network."): value
                for name, value in state.items()
                if name.startswith("network.")
            }
        )
    except Exception as error:  # whatever a file of the right format can lack
        raise Stage1Error(
            f"Stage-1 checkpoint {os.fspath(path)}: it does not fit: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    return Stage1Ensemble(
        network,
        scaling,
        fitted,
        pessimism=saved["pessimism"] if pessimism is None else pessimism,
        compute_dtype=compute_dtype,
    )
