from __future__ import annotations

import re

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
    "stage1_bad_import": "import no_such_dependency",
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
def test_mechanistic_is_the_built_in_model_at_the_scale_asked_for(scale, device):
    model = load_reward_model("mechanistic", device, outcome_scale=scale)
    assert isinstance(model, MechanisticModel)
    designs = [value.to(device) for value in DESIGNS]
    expected = MechanisticModel(outcome_scale=scale).to(device)(*designs)
    assert all(map(torch.equal, model(*designs), expected))
    assert expected.delta_ef_pct.device.type == device


def test_callable_is_taken_as_it_is(toy_model):
    assert load_reward_model(toy_model) is toy_model
    assert isinstance(toy_model, RewardModel)
    assert isinstance(MechanisticModel(), RewardModel)


def test_factory_of_a_module_is_called(user_modules):
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
        (
            "mechanical",
            r"reward_model is 'mechanical'; allowed: 'mechanistic', a path to a .pt2 program, a "
            r"path to a .pt Stage-1 checkpoint, or 'module:factory'$",
        ),
        ("no_such_module:f", r"'no_such_module:f' cannot be loaded: ModuleNotFoundError: No mod"),
        ("math:no_such_name", r"'math:no_such_name' cannot be loaded: AttributeError: .*no_such"),
        (":f", r"':f' cannot be loaded: ValueError: Empty module name"),
        ("builtins:int", r"reward_model 'builtins:int' is 0; expected a callable"),
        (7, r"reward_model is 7; expected a callable, or a string that names one"),
        (None, r"reward_model is None; expected a callable"),
        (
            "stage1_bad_import:build",
            r"'stage1_bad_import:build' cannot be loaded: ModuleNotFoundError: .*no_such_dep",
        ),
        ("stage1_bad_factory:build", r"cannot be loaded: OSError: weights are gone"),
        ("stage1_bad_syntax:build", r"cannot be loaded: SyntaxError"),
    ],
)
def test_model_that_cannot_be_loaded_is_refused_with_the_reason(user_modules, spec, message):
    with pytest.raises(RewardModelError, match=message):
        load_reward_model(spec)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda o: tuple(o), r"returned tuple; expected Outcomes\('delta_ef_pct', 'stress_red"),
        (lambda o: o._asdict(), r"returned dict; expected Outcomes"),
        (
            lambda o: o._replace(toxicity_risk=0.1),
            r"toxicity_risk is float; expected a \(96,\) torch.float32 tensor on cpu",
        ),
        (
            lambda o: o._replace(delta_ef_pct=o.delta_ef_pct[:, None]),
            r"delta_ef_pct is a \(96, 1\) torch.float32 tensor on cpu; expected a \(96,\)",
        ),
        (
            lambda o: o._replace(fibrosis_risk=o.fibrosis_risk.flatten()),
            r"fibrosis_risk is a \(96,\) torch.float32 tensor on cpu; expected a \(2, 48\)",
        ),
        (
            lambda o: o._replace(fibrosis_risk=o.fibrosis_risk.double()),
            r"fibrosis_risk is a \(96,\) torch.float64 tensor on cpu; expected .* torch.float32",
        ),
        (
            lambda o: o._replace(optimal_logit=o.optimal_logit.to("meta")),
            r"optimal_logit is a \(96,\) torch.float32 tensor on meta; expected .* on cpu",
        ),
        (
            lambda o: o._replace(structural_integrity=o.structural_integrity + 1.0),
            r"structural_integrity is 1\.6 for polymer 0 \(GelMA_3pct\), coverage scar_only "
            r"\(and for 95 more of 96 designs\); expected finite values in \[0, 1\]$",
        ),
        (
            lambda o: o._replace(delta_ef_pct=o.delta_ef_pct * NAN),
            r"delta_ef_pct is nan for polymer 0 .*; expected finite values in \[-100, 100\]$",
        ),
        (
            lambda o: o._replace(optimal_logit=o.optimal_logit + float("inf")),
            r"optimal_logit is inf for polymer 0 .*; expected finite values in \[-inf, inf\]$",
        ),
        (
            lambda o: o.no_such_field,
            r"failed on \(96,\) designs \(patient \(96, 11\) float32, polymer_id \(96,\) int64, "
            r"formulation \(96, 4\) float32, coverage \(96,\) int64\): .*no_such_field",
        ),
    ],
    ids=("tuple dict float shape flattened dtype device range nan inf raises").split(),
)
def test_outcomes_that_break_the_contract_are_refused_with_what_was_expected(
    toy_model, spoil, message
):
    with pytest.raises(RewardModelError, match=message):
        load_reward_model(lambda *design: spoil(toy_model(*design)))


def test_polymer_and_coverage_with_a_bad_outcome_are_named(toy_model):
    def model(patient, polymer_id, formulation, coverage):
        outcomes = toy_model(patient, polymer_id, formulation, coverage)
        bad = (polymer_id == 13) & (coverage == 2)
        return outcomes._replace(delta_ef_pct=outcomes.delta_ef_pct.masked_fill(bad, NAN))

    message = (
        f"reward_model: delta_ef_pct is nan for polymer 13 ({load_polymers().names[13]}), coverage "
        "scar_bz50; expected finite values in [-100, 100]"
    )
    with pytest.raises(RewardModelError, match=f"^{re.escape(message)}$"):
        load_reward_model(model)


def test_model_that_takes_one_batch_dimension_only_is_refused(toy_model):
    def model(patient, *rest):
        num_designs, _ = patient.shape
        return toy_model(patient, *rest)

    with pytest.raises(RewardModelError, match=r"failed on \(2, 48\) designs .* ValueError: too m"):
        load_reward_model(model)


def test_model_that_writes_to_its_input_is_refused(toy_model):
    def model(patient, *rest):
        patient.view(-1, 11)[:, 0] -= 0.25
        return toy_model(patient, *rest)

    message = "^reward_model writes to patient; expected a model that only reads it$"
    with pytest.raises(RewardModelError, match=message):
        load_reward_model(model)
    with torch.inference_mode():  # where writes are not counted
        assert load_reward_model(toy_model) is toy_model
