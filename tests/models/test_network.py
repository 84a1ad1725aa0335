from __future__ import annotations

import torch
from torch import nn

from hydrogel_gym.models.network import NUMERIC_FIELDS, MemberLinear, raw_numeric
from hydrogel_gym.problem.fields import COVERAGES, FORMULATION_FIELDS, PATIENT_FIELDS


def test_members_are_as_many_separate_networks(make_stage1):
    layer = MemberLinear(3, 5, 2)
    x = torch.randn(3, 8, 5)
    alone = [nn.functional.linear(x[k], layer.weight[k].T, layer.bias[k, 0]) for k in range(3)]
    torch.testing.assert_close(layer(x), torch.stack(alone))
    torch.testing.assert_close(layer(x[0]), layer(x[0].repeat(3, 1, 1)))
    network = make_stage1().network
    numeric, polymer = torch.randn(3, 8, 19), torch.randint(24, (3, 8))
    before = network(numeric, polymer)
    for parameter in network.parameters():
        parameter[1] += 1.0
    after = network(numeric, polymer)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.allclose(before[1], after[1])


def test_numeric_features_are_patient_formulation_and_coverage_in_the_order_of_their_names():
    patient = 1.0 + torch.rand(8, len(PATIENT_FIELDS))
    formulation = 1.0 + torch.rand(8, len(FORMULATION_FIELDS))
    coverage = torch.arange(8) % len(COVERAGES)
    numeric = raw_numeric(patient, formulation, coverage)
    assert numeric.shape == (8, 19) == (8, len(NUMERIC_FIELDS))
    column = {name: numeric[:, i] for i, name in enumerate(NUMERIC_FIELDS)}
    assert torch.equal(column["lvef_pct"], patient[:, 0])
    assert torch.equal(column["half_life_days"], formulation[:, 1].log())
    assert torch.equal(column["coverage_scar_bz50"], (coverage == 2).float())
