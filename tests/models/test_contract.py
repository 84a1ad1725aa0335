from __future__ import annotations

import copy
import io
import json
import pickle
import re
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

from hydrogel_gym import (
    HydrogelVectorEnv,
    Outcomes,
    RewardModel,
    RewardModelError,
    load_reward_model,
)
from hydrogel_gym.models.mechanistic import MechanisticModel
from hydrogel_gym.problem.polymers import load_polymers

BATCH = Dim("batch")
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
        from hydrogel_gym.models.mechanistic import MechanisticModel

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
            r"toxicity_risk is float; expected a \(96,\) torch.float32 tensor on cpu",
        ),
        (
            lambda o: o._replace(delta_ef_pct=o.delta_ef_pct[:, None]),
            r"delta_ef_pct is a \(96, 1\) torch.float32 tensor on cpu; expected a \(96,\)",
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
    ids=["tuple", "dict", "float", "shape", "dtype", "device", "range", "nan", "inf", "raises"],
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


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda o: o._replace(fibrosis_risk=o.fibrosis_risk.flatten()),
            r"fibrosis_risk is a \(96,\) torch.float32 tensor on cpu; expected a \(2, 48\)",
        ),
        (
            lambda o: o._replace(fibrosis_risk=o.fibrosis_risk.view(96)[:, None]),
            r"fibrosis_risk is a \(96, 1\) .*; expected a \(96,\)",
        ),
    ],
    ids=["flattened", "one dimension more"],
)
def test_model_that_loses_a_batch_dimension_is_refused(toy_model, spoil, message):
    with pytest.raises(RewardModelError, match=message):
        load_reward_model(lambda *design: spoil(toy_model(*design)))


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


class Predictor(nn.Module):
    """A user's Stage-1 network, unlike any of ours."""

    def __init__(self):
        super().__init__()
        self.polymer = nn.Embedding(24, 8)
        self.register_buffer("shift", torch.full((4,), 5.0))
        self.hidden = nn.Sequential(nn.Linear(24, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 6))

    def forward(self, patient, polymer_id, formulation, coverage):
        row = torch.arange(patient.shape[0], device=patient.device) * 0  # a device in the program
        level = (coverage + row)[:, None] / 3
        inputs = (patient / 100, self.polymer(polymer_id), (formulation - self.shift) / 50, level)
        y = self.hidden(torch.cat(inputs, -1)) + torch.tensor(0.125)
        columns = [5.0 * y[:, 0], y[:, 1], y[:, 2], *torch.sigmoid(y[:, 3:]).unbind(-1)]
        return dict(zip(Outcomes._fields, columns, strict=True))


class Returning(nn.Module):
    """Returns something else than a `Predictor` does."""

    def __init__(self, predictor, change):
        super().__init__()
        self.predictor = predictor
        self.change = change

    def forward(self, patient, polymer_id, formulation, coverage):
        return self.change(self.predictor(patient, polymer_id, formulation, coverage))


def batch(*shape: int, dtype=torch.float32):
    """Designs drawn at random, with a generator of their own."""
    rng = torch.Generator().manual_seed(sum(shape))
    return (
        torch.rand(*shape, 11, generator=rng, dtype=dtype) * 40,
        torch.randint(24, shape, generator=rng),
        torch.rand(*shape, 4, generator=rng, dtype=dtype) * 5,
        torch.randint(4, shape, generator=rng),
    )


def export(model, path, size: Any = BATCH):
    shapes = None if size is None else ({0: size},) * 4
    torch.export.save(torch.export.export(model, batch(2), dynamic_shapes=shapes), path)
    return path


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    return Predictor().eval()


@pytest.fixture(scope="module")
def program(predictor, tmp_path_factory):
    """Path of a program that takes two rows or more, as torch exports by default."""
    path = tmp_path_factory.mktemp("programs") / "stage1.pt2"
    return str(export(predictor, path, size=Dim.DYNAMIC))


@pytest.fixture(scope="module")
def reference(predictor):
    """The network of the program as a reward model in Python."""

    def model(*designs):
        shape = designs[1].shape
        rows = (value.reshape(-1, *value.shape[len(shape) :]) for value in designs)
        return Outcomes(*(value.view(shape) for value in predictor(*rows).values()))

    return model


def rewrite(program, path, change) -> str:
    """Save a program with members of its archive changed, or left out where that gives None."""
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            if (data := change(name.partition("/")[2], old.read(name))) is not None:
                new.writestr(name, data)
    return str(path)


def with_json(change, member: str = "models/model.json"):
    """A change for `rewrite` of one member, as JSON, in place."""

    def edit(name, data):
        if name != member:
            return data
        value = json.loads(data)
        change(value)
        return json.dumps(value).encode()

    return edit


@pytest.mark.parametrize("shape", [(5,), (1,), (), (3, 4), (0,)], ids=str)
def test_program_predicts_what_the_network_does_for_any_batch_shape(program, reference, shape):
    outcomes = load_reward_model(program)(*batch(*shape))
    assert isinstance(outcomes, Outcomes)
    assert {value.shape for value in outcomes} == {shape}
    torch.testing.assert_close(outcomes, reference(*batch(*shape)))


def test_path_of_a_program_may_be_a_path_object(program):
    assert torch.equal(
        load_reward_model(Path(program))(*batch(3))[0], load_reward_model(program)(*batch(3))[0]
    )


def test_path_with_a_colon_is_no_module(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("C:stage1.pt2").write_bytes(Path(program).read_bytes())
    assert isinstance(load_reward_model("C:stage1.pt2"), RewardModel)
    with pytest.raises(RewardModelError, match=r"'C:\\\\x.pt2': there is no such file"):
        load_reward_model(r"C:\x.pt2")


def test_program_that_drops_a_dimension_of_one_takes_a_batch_of_one(tmp_path, predictor, reference):
    def squeeze(outcomes):
        return {name: value[:, None].squeeze() for name, value in outcomes.items()}

    path = export(Returning(predictor, squeeze), tmp_path / "stage1.pt2")
    torch.testing.assert_close(load_reward_model(path)(*batch(1)), reference(*batch(1)))


def test_inputs_of_a_program_are_broadcast(program):
    model = load_reward_model(program)
    patient, polymer_id, formulation, coverage = batch(3, 4)
    outcomes = model(patient[:, :1], polymer_id, formulation[0], coverage[0, 0])
    whole = patient[:, :1].expand(3, 4, 11), polymer_id, formulation[:1].expand(3, 4, 4)
    expected = model(*whole, coverage[0, 0].expand(3, 4))
    assert all(map(torch.equal, outcomes, expected))
    assert outcomes.toxicity_risk.shape == (3, 4)


def test_program_answers_in_the_dtype_of_the_patient(program, reference):
    patient, polymer_id, formulation, coverage = batch(3)
    outcomes = load_reward_model(program)(
        patient.double(), polymer_id, formulation.double(), coverage
    )
    assert {value.dtype for value in outcomes} == {torch.float64}
    expected = reference(patient, polymer_id, formulation, coverage)
    torch.testing.assert_close(outcomes, expected, check_dtype=False)


@pytest.mark.parametrize("kind", ["tuple", "list", "double"])
def test_program_may_return_a_tuple_or_another_float(tmp_path, predictor, reference, kind):
    change = {
        "tuple": lambda o: tuple(o.values()),
        "list": lambda o: [*o.values()],
        "double": lambda o: {name: o[name].double() for name in reversed(o)},
    }
    path = export(Returning(predictor, change[kind]), tmp_path / "stage1.pt2")
    torch.testing.assert_close(load_reward_model(path)(*batch(3)), reference(*batch(3)))


def test_program_is_frozen_and_lets_gradients_through_to_the_formulation(program, reference):
    model = load_reward_model(program)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.train().modules())
    patient, polymer_id, formulation, coverage = batch(3)
    gradients = []
    for function in (model, reference):
        requested = formulation.clone().requires_grad_()
        outcomes = function(patient, polymer_id, requested, coverage)
        gradients += torch.autograd.grad(outcomes.delta_ef_pct.sum(), requested)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


def test_program_moves_with_the_devices_that_are_written_into_it(program, device):
    model = load_reward_model(program, device)
    designs = [value.to(device) for value in batch(3)]
    assert {value.device.type for value in model(*designs)} == {device}
    meta = model.to("meta")
    outcomes = meta(*(value.to("meta") for value in batch(2, 3)))
    assert {(value.device.type, value.shape) for value in outcomes} == {("meta", (2, 3))}
    assert not any(parameter.requires_grad for parameter in meta.parameters())


def test_program_for_another_device_is_loaded_where_it_is_asked_for(program, tmp_path, reference):
    path = rewrite(
        program,
        tmp_path / "cuda.pt2",
        lambda name, data: data.replace(b'"type": "cpu"', b'"type": "cuda"'),
    )
    assert b'"type": "cuda"' in Path(path).read_bytes()
    torch.testing.assert_close(load_reward_model(path)(*batch(4)), reference(*batch(4)))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copy_of_a_program_predicts_the_same(program, duplicate):
    model = load_reward_model(program)
    twin = duplicate(model)
    assert all(map(torch.equal, model(*batch(1)), twin(*batch(1))))
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert next(duplicate(model.to("meta")).parameters()).is_meta


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("num_designs", [1, 5])
def test_program_is_part_of_one_compiled_graph(program, num_designs):
    model = load_reward_model(program)
    compiled = torch.compile(
        lambda *designs: model(*designs), backend="aot_eager", fullgraph=True, dynamic=False
    )
    designs = batch(num_designs, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*designs), model(*designs))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_compiled_environment_steps_as_the_plain_one_with_a_program(program):
    rewards = []
    for compiled in (True, False):
        env = HydrogelVectorEnv(4, reward_model=program, compile=compiled, horizon=2)
        env.reset(seed=0)
        env.action_space.seed(0)
        rewards.append([env.step(env.action_space.sample())[1] for _ in range(3)])
    np.testing.assert_allclose(*rewards, rtol=1e-4, atol=1e-4)


def test_environments_made_by_gymnasium_run_on_a_program(program, reference):
    def rewards(make, **kwargs):
        env = make("HydrogelDesign-v0", **kwargs)
        env.reset(seed=0)
        env.action_space.seed(0)
        return [env.step(env.action_space.sample())[1] for _ in range(3)]

    for make, kwargs in ((gym.make, {"horizon": 3}), (gym.make_vec, {"num_envs": 4})):
        expected = rewards(make, reward_model=reference, **kwargs)
        got = rewards(make, reward_model=program, **kwargs)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda o: o["toxicity_risk"],
            r"returns one tensor; expected a dict of \('delta_ef_pct', ",
        ),
        (lambda o: tuple(o.values())[:5], r"returns a tuple of 5; expected a dict of"),
        (
            lambda o: {"toxicity": o["toxicity_risk"]},
            r"returns a dict of \('toxicity',\); expected a dict of \('delta_ef_pct', ",
        ),
        (
            lambda o: o | {"toxicity_risk": o["toxicity_risk"][:, None]},
            r"returns toxicity_risk \(s\d+, 1\) float32; expected \(B,\) float32",
        ),
        (
            lambda o: o | {"toxicity_risk": o["toxicity_risk"].mean(0, keepdim=True)},
            r"returns toxicity_risk \(1,\) float32; expected",
        ),
        (
            lambda o: o | {"toxicity_risk": 0.5},
            r"returns toxicity_risk float; expected \(B,\) float32",
        ),
        (
            lambda o: o | {"toxicity_risk": o["toxicity_risk"].long()},
            r"returns toxicity_risk \(s\d+,\) int64; expected",
        ),
        (
            lambda o: o | {"toxicity_risk": o["toxicity_risk"] + 2.0},
            r": toxicity_risk is 2\.\d+ for polymer 0 .*; expected finite values in \[0, 1\]",
        ),
    ],
    ids=["tensor", "five", "name", "shape", "static", "number", "dtype", "range"],
)
def test_program_that_returns_something_else_is_refused(tmp_path, predictor, change, message):
    path = export(Returning(predictor, change), tmp_path / "stage1.pt2")
    with pytest.raises(RewardModelError, match=f"^reward_model '{path}'.{{0,1}} ?{message}[^\n]*$"):
        load_reward_model(path)


class Summing(nn.Module):
    """Takes any inputs."""

    def forward(self, *inputs):
        y = sum(value.sum(-1) if value.dim() > 1 else value for value in inputs).float()
        return (y,) * 6


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            batch(2)[:3],
            r"takes 3 inputs; expected 4 by position: patient \(B, 11\) float32, polymer_id \(B,\) "
            r"int64, formulation \(B, 4\) float32, coverage \(B,\) int64",
        ),
        (
            (batch(2)[0][:, :6], *batch(2)[1:]),
            r"takes patient \(s\d+, 6\) float32, .*; expected patient \(B, 11\) float32",
        ),
        ((*batch(2)[:3], batch(2)[3].float()), r"takes .* coverage \(s\d+,\) float32; expected"),
    ],
    ids=["number", "columns", "dtype"],
)
def test_program_that_takes_something_else_is_refused(tmp_path, inputs, message):
    path = tmp_path / "stage1.pt2"
    shapes = (tuple({0: Dim("batch")} for _ in inputs),)
    torch.export.save(torch.export.export(Summing(), inputs, dynamic_shapes=shapes), path)
    with pytest.raises(RewardModelError, match=f"^reward_model '{path}' {message}[^\n]*$"):
        load_reward_model(path)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            None,
            r"has a static batch size: it takes patient \(2, 11\) .*; export it with dynamic_shap",
        ),
        (
            Dim("few", max=1024),
            r"does not take any batch size: .*1024.*; export it with dynamic_sh",
        ),
    ],
    ids=["static", "limited"],
)
def test_program_for_some_batch_sizes_is_refused_with_what_to_do(
    tmp_path, predictor, size, message
):
    path = export(predictor, tmp_path / "stage1.pt2", size=size)
    with pytest.raises(RewardModelError, match=message) as caught:
        load_reward_model(path)
    advice = r"dynamic_shapes=\(\{0: batch\},\) \* 4, where batch = torch.export.Dim\('batch'\)$"
    assert re.search(advice, str(caught.value))


def test_program_with_a_branch_on_the_batch_size_is_refused(tmp_path, predictor):
    def even(outcomes):
        rows = outcomes["toxicity_risk"].shape[0]
        return outcomes if rows % 2 == 0 else {**outcomes, "toxicity_risk": outcomes["x"]}

    path = export(Returning(predictor, even), tmp_path / "stage1.pt2", size=Dim.AUTO)
    with pytest.raises(RewardModelError, match=r"only works for some batches, where .* % 2"):
        load_reward_model(path)


def test_program_exported_in_training_mode_is_refused(tmp_path):
    path = export(Predictor(), tmp_path / "stage1.pt2")
    message = (
        r"was exported in training mode \(torch.ops.aten.dropout.default\); call model.eval\(\)"
    )
    with pytest.raises(RewardModelError, match=message):
        load_reward_model(path)


def test_file_that_is_no_program_is_refused(tmp_path, program):
    def message(path) -> str:
        with pytest.raises(RewardModelError) as caught:
            load_reward_model(path)
        error = str(caught.value)
        assert error.startswith(f"reward_model '{path}'")
        assert "\n" not in error
        return error

    path = tmp_path / "x.pt2"
    assert "there is no such file; expected a program saved by torch.export" in message(path)
    path.write_text("no program")
    assert "is not a program: no zip archive; expected" in message(path)
    torch.save({"weight": torch.zeros(3)}, path)
    assert "is not a program: a zip archive without archive_version; expected" in message(path)
    rewrite(program, path, lambda name, data: data if name != "models/model.json" else None)
    assert "is not a program: a zip archive without models/model.json; expected" in message(path)
    rewrite(program, path, lambda name, data: data if name != "archive_format" else b"else")
    assert "is not a program: a zip archive without the format pt2; expected" in message(path)
    rewrite(program, path, with_json(lambda program: program["schema_version"].update(major=99)))
    assert "cannot be loaded: " in message(path)
    rewrite(program, path, lambda name, data: data if name != "data/weights/weight_0" else None)
    assert "cannot be loaded: KeyError: 'data/weights/weight_0'" in message(path)
    path.write_bytes(Path(program).read_bytes()[:3000])
    assert "is not a program: no zip archive" in message(path)
    path.unlink()
    path.mkdir()
    assert "cannot be loaded: IsADirectoryError" in message(path)


class Payload:
    """Creates a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def pickled(path, *, by_torch: bool = True) -> bytes:
    if not by_torch:
        return pickle.dumps(Payload(path), protocol=2)
    buffer = io.BytesIO()
    torch.save(Payload(path), buffer)
    return buffer.getvalue()


def test_payload_of_these_tests_runs_where_it_is_unpickled(tmp_path):
    torch.load(io.BytesIO(pickled(tmp_path / "one")), weights_only=False).close()
    pickle.loads(pickled(tmp_path / "two", by_torch=False)).close()
    assert (tmp_path / "one").exists()
    assert (tmp_path / "two").exists()


def test_sample_inputs_of_a_program_are_not_unpickled(tmp_path, program, reference):
    ran = tmp_path / "ran"
    path = rewrite(
        program,
        tmp_path / "x.pt2",
        lambda name, data: pickled(ran) if name == "data/sample_inputs/model.pt" else data,
    )
    torch.testing.assert_close(load_reward_model(path)(*batch(3)), reference(*batch(3)))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("folder", "file", "by_torch"),
    [
        ("weights", "weight_0", True),
        ("constants", "tensor_0", True),
        ("constants", "opaque_obj_0", False),
        ("constants", "custom_obj_0", True),
    ],
)
def test_pickled_weight_or_constant_is_refused(tmp_path, program, folder, file, by_torch):
    ran = tmp_path / "ran"
    config = f"data/{folder}/model_{folder}_config.json"

    def point_at_the_pickle(value):
        next(iter(value["config"].values())).update(path_name=file, use_pickle=True)

    path = rewrite(program, tmp_path / "x.pt2", with_json(point_at_the_pickle, config))
    member = f"data/{folder}/{file}"
    path = rewrite(path, tmp_path / "y.pt2", lambda n, data: None if n == member else data)
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/{member}", pickled(ran, by_torch=by_torch))
    with pytest.raises(
        RewardModelError, match=rf"contains a pickle \({file}, of [\w.]+\); expected plai"
    ):
        load_reward_model(path)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("data/weights/model.pt", "contains a pickle"),
        ("data/constants/model.pt", "contains a pickle"),
        ("data/aotinductor/model/run.so", "contains compiled code"),
    ],
)
def test_member_that_torch_would_run_is_refused(tmp_path, program, member, message):
    ran = tmp_path / "ran"
    path = rewrite(program, tmp_path / "x.pt2", lambda name, data: data)
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/{member}", pickled(ran))
    with pytest.raises(RewardModelError, match=rf"{message} \({member}\); expected plain tensors"):
        load_reward_model(path)
    assert not ran.exists()


def test_archive_of_older_torch_is_refused(tmp_path):
    ran, path = tmp_path / "ran", tmp_path / "x.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.20")
        archive.writestr("serialized_exported_program.json", "{}")
        for name in ("state_dict", "constants", "example_inputs"):
            archive.writestr(f"serialized_{name}.pt", pickled(ran))
    with pytest.raises(RewardModelError, match="is not a program: a zip archive without"):
        load_reward_model(path)
    assert not ran.exists()


def set_size(program, code):
    graph = program["graph_module"]["graph"]
    for value in graph["tensor_values"].values():
        for size in value["sizes"]:
            if "as_expr" in size:
                size["as_expr"]["expr_str"] = code


def set_target(program, code):
    program["verifiers"] = []
    call = {"name": "file", "arg": {"as_string": code}, "kind": 1}
    node = {"target": "torch.os.remove", "inputs": [call], "outputs": [], "metadata": {}}
    program["graph_module"]["graph"]["nodes"].insert(0, node)


def set_name(program, code):
    given = '"as_tensor": {"name": "patient"}'
    text = json.dumps(program).replace(given, given.replace("patient", f"p={code}"))
    program |= json.loads(text)


def set_parameter(program, code):
    spec = program["graph_module"]["signature"]["input_specs"][0]["parameter"]
    spec["parameter_name"] = f'polymer.x", {code}) or ("'


def set_guard(program, code):
    program["guards_code"].append(code)


def set_enum(program, code):
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    evil = json.dumps([{"__enum__": True, "fqn": "stage1_evil:X", "name": "Y"}])
    spec = json.loads(signature["out_spec"])
    spec[1]["context"] = evil
    signature["out_spec"] = json.dumps(spec)


def set_argument(program, code):
    nodes = program["graph_module"]["graph"]["nodes"]
    node = next(node for node in nodes if "tanh" in node["target"])
    node["target"] = "torch.ops.aten.gelu.default"
    node["inputs"].append(
        {"name": "approximate", "arg": {"as_string": f"tanh' + {code} + '"}, "kind": 2}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_size, r"contains expr_str .open\("),
        (
            set_target,
            r"contains target 'torch.os.remove'; expected plain tensors and operators only",
        ),
        (set_name, r"contains name .p=open\("),
        (set_parameter, r"contains parameter_name 'polymer.x\", open\("),
        (set_guard, r"only works for some batches, where .*open\("),
        (set_enum, r"returns a builtins.dict; expected a dict of"),
        (set_argument, r"failed on \(96,\) designs .*approximate"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_code_in_the_text_of_a_program_does_not_run(
    tmp_path, program, user_module, change, message
):
    ran = tmp_path / "ran"
    ran.write_text("removed, by the payload that is an operator")
    user_module("stage1_evil", f"import os; os.remove({str(ran)!r})")
    code = str(ran) if change is set_target else f"open({str(ran)!r}, 'w')"
    path = rewrite(program, tmp_path / "x.pt2", with_json(lambda value: change(value, code)))
    with pytest.raises(RewardModelError, match=message):
        load_reward_model(path)
    assert ran.read_text().startswith("removed")


@pytest.mark.parametrize("name", ["save", "from_file"])
def test_operator_that_writes_files_is_refused(tmp_path, program, name):
    def change(value):
        value["graph_module"]["graph"]["nodes"][0]["target"] = f"torch.ops.aten.{name}.default"

    path = rewrite(program, tmp_path / "x.pt2", with_json(change))
    with pytest.raises(RewardModelError, match=f"contains target 'torch.ops.aten.{name}.default'"):
        load_reward_model(path)
