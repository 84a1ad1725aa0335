"""How a patient may respond otherwise than the built-in model predicts.

A response is one factor per `RESPONSE_FIELDS`, each of which scales constants of
`MechanisticParams` that are assumptions (grade D): 1 is what the model predicts. Its prior is
exp(sd z) with z standard normal, cut off where a factor would leave its range. The ranges, like the
constants, are synthetic: nobody has measured how far patients differ in them.

Shapes: B environments, R fields of a response.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hydrogel_gym.problem.streams import draw_levels, level_middles


class ResponseField(NamedTuple):
    """One factor of a response: what it scales, its range and the reason for that.

    The `constants` of `MechanisticParams` are all multiplied by it, or all divided: then what is
    compared with them, as a load is with its threshold, counts for so much more.
    """

    name: str
    constants: tuple[str, ...]
    low: float
    high: float
    remark: str
    divides: bool = False
    grade: str = "D"  # as of `mechanistic.Grade`


RESPONSE_FIELDS = (
    ResponseField(
        "mechanical_gain",
        ("mechanical_gain_max_pp",),
        0.33,
        3.0,
        "relief of 8 to 26 % in [Miller2013], [Kichula2014], [Wall2006] is a factor of 3 between "
        "studies; that relief alone restores less: [Rane2011]",
    ),
    ResponseField(
        "biological_gain",
        ("biological_gain_max_pp",),
        0.33,
        3.0,
        "healing differs between patients, by how much nobody has measured: as the mechanical gain",
    ),
    ResponseField(
        "electrical_gain",
        ("electrical_gain_max_pp",),
        0.33,
        3.0,
        "the least certain pathway: animal work alone, [He2020], [Cui2018]",
    ),
    ResponseField(
        "restriction",
        ("restriction_threshold", "restriction_width"),
        0.33,
        3.0,
        "a patch too stiff and thick for the wall restricts filling: [Restraint2013], [Sayut2025]; "
        "the stiffness mismatch of a patient, since feasibility is one of the polymer",
        divides=True,
    ),
    ResponseField(
        "toxicity",
        (
            "toxicity_base_floor",
            "toxicity_base_slope",
            "toxicity_filler_floor",
            "toxicity_filler_slope",
        ),
        0.33,
        3.0,
        "dose response; about the factor of 3.2 by which risk assessment lets people differ in "
        "sensitivity (from memory)",
    ),
    ResponseField(
        "integrity",
        (
            "integrity_loss_degraded",
            "integrity_loss_soft",
            "integrity_loss_brittle",
            "integrity_loss_thick",
            "integrity_loss_stress",
            "integrity_loss_infeasible",
        ),
        0.33,
        3.0,
        "retention in a beating heart against the bench: assumed, at most threefold either way",
    ),
)
RESPONSE_NAMES = tuple(item.name for item in RESPONSE_FIELDS)
# Beyond it the narrowest range is within one deviation, and would shape the prior more than `sd`.
MAX_RESPONSE_SD = min(min(math.log(item.high), -math.log(item.low)) for item in RESPONSE_FIELDS)


def response_at(uniform: Tensor, sd: float) -> Tensor:
    """The prior's inverse distribution function: (..., R) factors of independent uniform numbers.

    With uniform numbers of a generator these are draws from the prior, for any number of particles.

    Args:
        uniform: (..., R) in (0, 1), float64 for exact tails.
        sd: deviation of ln(factor) before the cut, 0 to `MAX_RESPONSE_SD`.

    Returns:
        In the dtype of `uniform`, each within the range of its field; all exactly 1 for `sd` 0.
    """
    if sd == 0.0:
        return torch.ones_like(uniform)
    columns = []
    for item, share in zip(RESPONSE_FIELDS, uniform.unbind(-1), strict=True):
        below, up_to = (_normal_cdf(math.log(end) / sd) for end in (item.low, item.high))
        z = torch.special.ndtri(below + share * (up_to - below))
        columns.append((sd * z).exp().clamp(item.low, item.high))
    return torch.stack(columns, -1)


def response_levels(sd: float) -> Tensor:
    """(L, R) float64, the factors that `draw_response` chooses from: L equally likely of each."""
    return response_at(level_middles().unsqueeze(-1).expand(-1, len(RESPONSE_FIELDS)), sd)


def draw_response(seed: Tensor, episode: Tensor, levels: Tensor) -> Tensor:
    """Response of the given episode of the stream `seed`: counter-based and stateless.

    As `dynamics.draw_patient_index`. By a table, since the inverse of the normal distribution would
    take as long as the rest of a step, and since a table rounds the same everywhere.

    Args:
        seed: (B,) int64 stream keys.
        episode: (B,) int64 counters.
        levels: (L, R) of `response_levels`, in the dtype and on the device that are wanted.

    Returns:
        (B, R) factors.
    """
    num = len(RESPONSE_FIELDS)
    # By one index of the flat table, which takes half as long as by two.
    index = draw_levels(num, seed, episode, 0) * num + torch.arange(num, device=seed.device)
    return levels.flatten().index_select(0, index.flatten()).view(-1, num)


def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2.0))
