from __future__ import annotations

import pytest
import torch
from torch import nn

from hydrogel_gym import RewardModel, RewardModelError, load_reward_model
from hydrogel_gym.models.mechanistic import MechanisticModel
from hydrogel_gym.problem.polymers import load_polymers

NAN = float("nan")
DESIGNS = (
    torch.full((2, 11), 20.0),
    torch.tensor([3, 6]),
    torch.tensor([[10.0, 40.0, 0.2, 3.0]] * 2),
    torch.tensor([1, 3]),
)
USER_MODULES = {
    "stage1_good": "from hydrogel_gym.models.mechanistic import MechanisticModel\n"
    "def build(): return MechanisticModel(outcome_scale='literature')",
    "stage1_bad_factory": "def build(): raise OSError('weights are gone')",
    "stage1_bad_syntax": "def build(: pass",
}


@pytest.fixture
def user_modules(tmp_path, monkeypatch) -> None:
    """Puts modules that a user could have on the path."""
    for name, source in USER_MODULES.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)


class Network(nn.Module):
    """A Stage-1 network in training mode, with a layer that behaves otherwise in it."""

    def __init__(self, toy_model):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.5)
        self.toy_model = toy_model

    def forward(self, patient, polymer_id, formulation, coverage):
        outcomes = self.toy_model(patient, polymer_id, formulation, coverage)
        delta_ef_pct = self.dropout(self.scale * outcomes.delta_ef_pct)
        return outcomes._replace(delta_ef_pct=delta_ef_pct)


@pytest.mark.parametrize("scale", ["source", "literature"])
def test_built_in_model_and_factory_are_loaded_at_the_scale_asked_for(user_modules, scale, device):
    designs = [value.to(device) for value in DESIGNS]
    expected = MechanisticModel(outcome_scale=scale).to(device)(*designs)
    model = load_reward_model("mechanistic", device, outcome_scale=scale)
    assert isinstance(model, MechanisticModel)
    assert isinstance(model, RewardModel)
    assert all(map(torch.equal, model(*designs), expected))
    assert expected.delta_ef_pct.device.type == device
    if scale == "literature":
        model = load_reward_model("stage1_good:build", device)
        assert all(map(torch.equal, model(*designs), expected))


def test_callable_is_taken_as_it_is_and_a_network_frozen_in_evaluation_mode(toy_model):
    with torch.inference_mode():  # where writes are not counted
        assert load_reward_model(toy_model) is toy_model
    network = Network(toy_model)
    assert load_reward_model(network) is network
    assert not any(module.training for module in network.modules())
    assert not network.scale.requires_grad
    assert network(*DESIGNS).delta_ef_pct.tolist() == [3.0, 6.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "mechanical",
            r"reward_model is 'mechanical'; allowed: 'mechanistic', a path to a .pt2 program, a "
            r"path to a .pt Stage-1 checkpoint, or 'module:factory'$",
        ),
        ("no_such_module:f", r"'no_such_module:f' cannot be loaded: ModuleNotFoundError: No mod"),
        ("math:no_such_name", r"'math:no_such_name' cannot be loaded: AttributeError: .*no_such"),
        (":f", r"':f' cannot be loaded: ValueError: Empty module name"),
        ("builtins:int", r"reward_model 'builtins:int' is 0; expected a callable"),
        (None, r"reward_model is None; expected a callable, or a string that names one"),
        ("stage1_bad_factory:build", r"cannot be loaded: OSError: weights are gone"),
        ("stage1_bad_syntax:build", r"cannot be loaded: SyntaxError"),
    ],
)
def test_model_that_cannot_be_loaded_is_refused_with_the_reason(user_modules, spec, message):
    with pytest.raises(RewardModelError, match=message):
        load_reward_model(spec)


def bad_polymer(outcomes, patient, polymer_id, formulation, coverage):
    bad = (polymer_id == 13) & (coverage == 2)
    return outcomes._replace(delta_ef_pct=outcomes.delta_ef_pct.masked_fill(bad, NAN))


def one_dimension(outcomes, patient, *_):
    num_designs, _ = patient.shape
    return outcomes


def writing(outcomes, patient, *_):
    patient.view(-1, 11)[:, 0] -= 0.25
    return outcomes


def with_field(name, change):
    return lambda o, *_: o._replace(**{name: change(getattr(o, name))})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda o, *_: tuple(o), r"returned tuple; expected Outcomes\('delta_ef_pct', 'stress_red"),
        (
            with_field("toxicity_risk", lambda x: 0.1),
            r"toxicity_risk is float; expected a \(96,\) torch.float32 tensor on cpu",
        ),
        (
            with_field("delta_ef_pct", lambda x: x[:, None]),
            r"is a \(96, 1\) .*; expected a \(96,",
        ),
        (with_field("fibrosis_risk", torch.flatten), r"is a \(96,\) .*; expected a \(2, 48\)"),
        (
            with_field("fibrosis_risk", torch.Tensor.double),
            r"float64 .*; expected .* torch.float3",
        ),
        (with_field("optimal_logit", lambda x: x.to("meta")), r"on meta; expected .* on cpu"),
        (
            with_field("structural_integrity", lambda x: x + 1.0),
            r"structural_integrity is 1\.6 for polymer 0 \(GelMA_3pct\), coverage scar_only "
            r"\(and for 95 more of 96 designs\); expected finite values in \[0, 1\]$",
        ),
        (with_field("optimal_logit", lambda x: x + float("inf")), r"is inf .* in \[-inf, inf\]$"),
        (
            bad_polymer,
            rf"delta_ef_pct is nan for polymer 13 \({load_polymers().names[13]}\), coverage "
            r"scar_bz50; expected finite values in \[-100, 100\]$",
        ),
        (
            lambda o, *_: o.no_such_field,
            r"failed on \(96,\) designs \(patient \(96, 11\) float32, .*\): .*no_such_field",
        ),
        (one_dimension, r"failed on \(2, 48\) designs .* ValueError: too m"),
        (writing, r"^reward_model writes to patient; expected a model that only reads it$"),
    ],
    ids="tuple float shape flat dtype device range inf nan raises dimension writes".split(),
)
def test_outcomes_that_break_the_contract_are_refused_with_what_was_expected(
    toy_model, spoil, message
):
    with pytest.raises(RewardModelError, match=message):
        load_reward_model(lambda *design: spoil(toy_model(*design), *design))
