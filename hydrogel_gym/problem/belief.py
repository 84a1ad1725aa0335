"""What measured designs say of a patient's hidden response: a Gaussian belief, filtered.

The gain of LVEF is nearly linear in the factors, so that an extended Kalman filter, iterated
[Bell1993], is close to the posterior at a thousandth of its price: `benchmark/quality/adaptive.py`.
Pure batched functions, as in `dynamics`. Shapes: B environments, R factors of a response, M
responses of each environment, K outcomes.

References:
    [Bell1993] Bell, Cathey. The iterated Kalman filter update as a Gauss-Newton method. IEEE Trans
    Automat Contr 38:294.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hydrogel_gym.problem.fields import OUTCOME_FIELDS, Field, Outcomes
from hydrogel_gym.problem.response import RESPONSE_FIELDS

# Deviation of a measurement that the filter assumes at least, in the outcome's unit: what is left
# of the model's curvature. Of the other outcomes a response changes nothing, or the logit alone,
# which says what the gain does.
LEAST_DEVIATION = {"delta_ef_pct": 0.01, "toxicity_risk": 2e-4, "structural_integrity": 2e-4}
ITERATIONS = 3
_STEP = 0.02  # of a factor, for a derivative by differences
_OUTCOMES = [item.name for item in OUTCOME_FIELDS]


def belief_fields() -> tuple[Field, ...]:
    """The 2 R columns of a belief in an observation: estimates, then their deviations."""
    return (
        *(Field(f"estimated_{x.name}", x.low, x.high, "estimated factor") for x in RESPONSE_FIELDS),
        *(
            Field(f"deviation_{x.name}", 0.0, x.high - x.low, "its standard deviation")
            for x in RESPONSE_FIELDS
        ),
    )


def prior_belief(levels: Tensor) -> Tensor:
    """(R, 1 + R) belief before any check: the means, and the covariance.

    Args:
        levels: (L, R) equally likely factors, see `response.response_levels`.
    """
    variance, mean = torch.var_mean(levels, 0, correction=0)
    return torch.cat([mean.unsqueeze(-1), variance.diag()], -1)


def belief_columns(belief: Tensor) -> Tensor:
    """(B, 2 R) estimates and deviations of a (B, R, 1 + R) belief."""
    mean, covariance = belief[..., 0], belief[..., 1:]
    deviation = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0.0).sqrt()
    return torch.cat([mean, deviation], -1)


def updated_belief(
    belief: Tensor,
    predict: Callable[[Tensor], Outcomes],
    measured: Outcomes,
    noise: Sequence[float],
) -> Tensor:
    """(B, R, 1 + R) belief after a check.

    Args:
        belief: (B, R, 1 + R) before it.
        predict: outcomes of the design that was checked under (B, M, R) responses, (B, M) each.
        measured: (B,) each.
        noise: deviations of the K outcomes' measurements, each in its unit.
    """
    prior, covariance = belief[..., 0], belief[..., 1:]
    num = prior.shape[-1]
    steps = torch.cat([prior.new_zeros(1, num), _STEP * torch.eye(num).to(prior)])
    estimate = prior
    for _ in range(ITERATIONS):
        outcomes = predict(estimate.unsqueeze(-2) + steps)
        posterior, left = prior, covariance
        for name, least in LEAST_DEVIATION.items():
            predicted, seen = getattr(outcomes, name), getattr(measured, name)
            slope = (predicted[:, 1:] - predicted[:, :1]) / _STEP  # (B, R)
            expected = predicted[:, 0] + (slope * (posterior - estimate)).sum(-1)
            shared = (left * slope.unsqueeze(-2)).sum(-1)  # covariance with the measurement
            deviation = max(noise[_OUTCOMES.index(name)], least)
            gain = shared / ((slope * shared).sum(-1, keepdim=True) + deviation**2)
            posterior = posterior + gain * (seen - expected).unsqueeze(-1)
            left = left - gain.unsqueeze(-1) * shared.unsqueeze(-2)
        bounded = zip(posterior.unbind(-1), RESPONSE_FIELDS, strict=True)
        estimate = torch.stack([value.clamp(x.low, x.high) for value, x in bounded], -1)
    return torch.cat([estimate.unsqueeze(-1), left], -1)
