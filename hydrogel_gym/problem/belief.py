"""What measured designs say of a patient's hidden response: a Gaussian belief, filtered.

The gain of LVEF is nearly linear in the factors, so that an iterated extended Kalman filter
[Bell1993] is close to the posterior at a thousandth of its price: `benchmark/quality/adaptive.py`.
It keeps a square root of the covariance, which rounding cannot make negative [Bierman1977].
Pure batched functions, as in `dynamics`. Shapes: B environments, R factors of a response, M
responses of each environment, K outcomes.

References:
    [Bell1993] Bell, Cathey. The iterated Kalman filter update as a Gauss-Newton method. IEEE Trans
    Automat Contr 38:294.
    [Bierman1977] Bierman. Factorization methods for discrete sequential estimation. Academic Press.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hydrogel_gym.problem.fields import Outcomes
from hydrogel_gym.problem.response import RESPONSE_FIELDS

# Deviation of a measurement that the filter assumes at least, in the outcome's unit: what is left
# of the model's curvature. Of the other outcomes a response changes nothing, or the logit alone,
# which says what the gain does.
LEAST_DEVIATION = {"delta_ef_pct": 0.01, "toxicity_risk": 2e-4, "structural_integrity": 2e-4}
ITERATIONS = 3
_STEP = 0.02  # of a factor, for a derivative by differences


def prior_belief(levels: Tensor) -> Tensor:
    """(R, 1 + R) belief before any check: the means, and a root of the covariance.

    Args:
        levels: (L, R) equally likely factors, see `response.response_levels`.
    """
    deviation, mean = torch.std_mean(levels, 0, correction=0)
    return torch.cat([mean.unsqueeze(-1), deviation.diag()], -1)


def bounded(response: Tensor) -> Tensor:
    """(..., R) factors moved into their ranges."""
    columns = zip(response.unbind(-1), RESPONSE_FIELDS, strict=True)
    return torch.stack([column.clamp(x.low, x.high) for column, x in columns], -1)


def sample_belief(belief: Tensor, normal: Tensor) -> Tensor:
    """(B, R) factors drawn from a (B, R, 1 + R) belief, of (B, R) standard normal numbers."""
    mean, root = belief[..., 0], belief[..., 1:]
    return bounded(mean + (root * normal.unsqueeze(-2)).sum(-1))


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
    prior, root = belief[..., 0], belief[..., 1:]
    num = prior.shape[-1]
    # On its device at once: a copy from the host is a synchronisation, and no part of a graph.
    eye = torch.eye(num, dtype=prior.dtype, device=prior.device)
    steps = torch.cat([prior.new_zeros(1, num), _STEP * eye])
    deviations = dict(zip(Outcomes._fields, noise, strict=True))
    estimate = prior
    for _ in range(ITERATIONS):
        outcomes = predict(estimate.unsqueeze(-2) + steps)
        posterior, left = prior, root
        for name, least in LEAST_DEVIATION.items():
            predicted, seen = getattr(outcomes, name), getattr(measured, name)
            slope = (predicted[:, 1:] - predicted[:, :1]) / _STEP  # (B, R)
            expected = predicted[:, 0] + (slope * (posterior - estimate)).sum(-1)
            variance = max(deviations[name], least) ** 2
            # Potter's update, one measurement at a time, so that nothing is inverted.
            part = (left * slope.unsqueeze(-1)).sum(-2)  # (B, R), of the root
            total = part.square().sum(-1, keepdim=True) + variance
            gain = (left * part.unsqueeze(-2)).sum(-1) / total
            posterior = posterior + gain * (seen - expected).unsqueeze(-1)
            shrink = (1.0 + (variance / total).sqrt()).reciprocal() * gain
            left = left - shrink.unsqueeze(-1) * part.unsqueeze(-2)
        estimate = bounded(posterior)
    return torch.cat([estimate.unsqueeze(-1), left], -1)
