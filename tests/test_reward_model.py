from __future__ import annotations

import textwrap

import pytest
import torch
from torch import nn

from hydrogel_gym import RewardModel, RewardModelError, load_reward_model
from hydrogel_gym.mechanistic import MechanisticModel

NAN = float("nan")
DESIGNS = (
    torch.full((2, 11), 20.0),
    torch.tensor([3, 6]),
    torch.tensor([[10.0, 40.0, 0.2, 3.0]] * 2),
    torch.tensor([1, 3]),
)


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


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Writes a module that a user could have on the path; returns its name."""

    def write(name: str, source: str) -> str:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(tmp_path)
        return name

    return write


@pytest.mark.parametrize("scale", ["source", "literature"])
def test_mechanistic_is_the_built_in_model_at_the_scale_asked_for(scale, device):
    model = load_reward_model("mechanistic", device, outcome_scale=scale)
    assert isinstance(model, MechanisticModel)
    designs = [value.to(device) for value in DESIGNS]
    expected = MechanisticModel(outcome_scale=scale).to(device)(*designs)
    assert all(map(torch.equal, model(*designs), expected))
    assert expected.delta_ef_pct.device.type == device


def test_built_in_model_and_plain_functions_fulfil_the_protocol(toy_model):
    assert isinstance(MechanisticModel(), RewardModel)
    assert isinstance(toy_model, RewardModel)


def test_callable_is_taken_as_it_is(toy_model):
    assert load_reward_model(toy_model) is toy_model


def test_factory_of_a_module_is_called(user_module):
    user_module(
        "stage1_good",
        """
        from hydrogel_gym.mechanistic import MechanisticModel

        def build():
            return MechanisticModel(outcome_scale="literature")
        """,
    )
    model = load_reward_model("stage1_good:build")
    expected = MechanisticModel(outcome_scale="literature")(*DESIGNS)
    assert all(map(torch.equal, model(*DESIGNS), expected))


def test_network_is_frozen_and_put_into_evaluation_mode(toy_model):
    network = Network(toy_model)
    assert load_reward_model(network) is network
    assert not any(module.training for module in network.modules())
    assert not network.scale.requires_grad
    assert network(*DESIGNS).delta_ef_pct.tolist() == [3.0, 6.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mechanical", r"reward_model is 'mechanical'; allowed: 'mechanistic' or 'module:factory'"),
        ("no_such_module:f", r"'no_such_module:f' cannot be loaded: ModuleNotFoundError: No mod"),
        ("math:no_such_name", r"'math:no_such_name' cannot be loaded: AttributeError: .*no_such"),
        (":f", r"':f' cannot be loaded: ValueError: Empty module name"),
        ("builtins:int", r"reward_model 'builtins:int' is 0; expected a callable"),
        (7, r"reward_model is 7; expected a callable, or a string that names one"),
        (None, r"reward_model is None; expected a callable"),
    ],
    ids=["unknown", "module", "factory", "empty", "no callable", "number", "none"],
)
def test_model_that_cannot_be_loaded_is_refused_with_the_reason(spec, message):
    with pytest.raises(RewardModelError, match=message):
        load_reward_model(spec)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_dependency", "ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("def build(): raise OSError('weights are gone')", "OSError: weights are gone"),
        ("def build(: pass", "SyntaxError"),
    ],
    ids=["import", "factory", "syntax"],
)
def test_failure_inside_the_users_module_is_passed_on(user_module, request, source, message):
    name = user_module(f"stage1_bad_{request.node.callspec.id}", source)
    with pytest.raises(RewardModelError, match=f"'{name}:build' cannot be loaded: {message}"):
        load_reward_model(f"{name}:build")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda o: tuple(o), r"returned tuple; expected Outcomes\('delta_ef_pct', 'stress_red"),
        (lambda o: o._asdict(), r"returned dict; expected Outcomes"),
        (
            lambda o: o._replace(toxicity_risk=0.1),
            r"toxicity_risk is float; expected a \(2,\) torch.float32 tensor on cpu",
        ),
        (
            lambda o: o._replace(delta_ef_pct=o.delta_ef_pct[:, None]),
            r"delta_ef_pct is a \(2, 1\) torch.float32 tensor on cpu; expected a \(2,\)",
        ),
        (
            lambda o: o._replace(fibrosis_risk=o.fibrosis_risk.double()),
            r"fibrosis_risk is a \(2,\) torch.float64 tensor on cpu; expected .* torch.float32",
        ),
        (
            lambda o: o._replace(optimal_logit=o.optimal_logit.to("meta")),
            r"optimal_logit is a \(2,\) torch.float32 tensor on meta; expected .* on cpu",
        ),
        (
            lambda o: o._replace(structural_integrity=o.structural_integrity + 1.0),
            r"structural_integrity is \[1\.6.*\]; expected finite values in \[0, 1\]",
        ),
        (
            lambda o: o._replace(delta_ef_pct=o.delta_ef_pct * NAN),
            r"delta_ef_pct is \[nan, nan\]; expected finite values in \[-100, 100\]",
        ),
        (
            lambda o: o._replace(optimal_logit=o.optimal_logit + float("inf")),
            r"optimal_logit is \[inf, inf\]; expected finite values in \[-inf, inf\]",
        ),
        (
            lambda o: o.no_such_field,
            r"failed on two designs \(patient \(2, 11\) float32, polymer_id \(2,\) int64, "
            r".*AttributeError: .*no_such_field",
        ),
    ],
    ids=["tuple", "dict", "float", "shape", "dtype", "device", "range", "nan", "inf", "raises"],
)
def test_outcomes_that_break_the_contract_are_refused_with_what_was_expected(
    toy_model, spoil, message
):
    with pytest.raises(RewardModelError, match=message):
        load_reward_model(lambda *design: spoil(toy_model(*design)))
