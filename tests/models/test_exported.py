"""Programs of `torch.export` as reward models, and files that would run code if they could."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
import zipfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn.functional import dropout

from hydrogel_gym import Outcomes, RewardModel, RewardModelError, load_reward_model

BATCH = Dim("batch")
MODEL = "models/model.json"
pytestmark = pytest.mark.torch("2.10")


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


class Plain(nn.Module):
    """Quick to export; what it returns is changed first."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, patient, polymer_id, formulation, coverage):
        share = torch.sigmoid(patient[:, 0] / 400.0)
        return self.change({name: share / (i + 1) for i, name in enumerate(Outcomes._fields)})


def batch(*shape: int, dtype=torch.float32):
    """Designs drawn at random, with a generator of their own."""
    rng = torch.Generator().manual_seed(sum(shape))
    return (
        torch.rand(*shape, 11, generator=rng, dtype=dtype) * 40,
        torch.randint(24, shape, generator=rng),
        torch.rand(*shape, 4, generator=rng, dtype=dtype) * 5,
        torch.randint(4, shape, generator=rng),
    )


def export(model, folder, size=BATCH):
    shapes = None if size is None else ({0: size},) * 4
    program = torch.export.export(model, batch(2), dynamic_shapes=shapes)
    torch.export.save(program, folder / "stage1.pt2")
    return folder / "stage1.pt2"


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    return Predictor().eval()


@pytest.fixture(scope="module")
def program(predictor, tmp_path_factory):
    """Path of a program that takes two rows or more, as torch exports by default."""
    return str(export(predictor, tmp_path_factory.mktemp("programs"), size=Dim.DYNAMIC))


@pytest.fixture(scope="module")
def model(program):
    """The program, loaded; to be left where it is."""
    return load_reward_model(program)


@pytest.fixture(scope="module")
def reference(predictor):
    """The network of the program as a reward model in Python."""

    def model(*designs):
        shape = designs[1].shape
        rows = (value.reshape(-1, *value.shape[len(shape) :]) for value in designs)
        return Outcomes(*(value.view(shape) for value in predictor(*rows).values()))

    return model


@pytest.mark.parametrize("shape", [(5,), (1,), (), (3, 4), (0,)], ids=str)
def test_program_predicts_what_the_network_does_for_any_batch_shape(model, reference, shape):
    designs = batch(*shape)
    outcomes = model(*designs)
    assert isinstance(outcomes, Outcomes)
    assert {value.shape for value in outcomes} == {shape}
    torch.testing.assert_close(outcomes, reference(*designs))
    double = model(*(x.double() if x.is_floating_point() else x for x in designs))
    assert {value.dtype for value in double} == {torch.float64}
    torch.testing.assert_close(double, outcomes, check_dtype=False)
    if shape == (3, 4):  # inputs are broadcast
        patient, polymer_id, formulation, coverage = designs
        small = model(patient[:, :1], polymer_id, formulation[0], coverage[0, 0])
        whole = patient[:, :1].expand(3, 4, 11), polymer_id, formulation[:1].expand(3, 4, 4)
        assert all(map(torch.equal, small, model(*whole, coverage[0, 0].expand(3, 4))))


def test_program_may_return_its_outcomes_in_other_forms(tmp_path):
    for change in (
        lambda o: {name: o[name] for name in reversed(o)},
        lambda o: [x.double() for x in o.values()],
        lambda o: tuple(x[:, None].squeeze() for x in o.values()),
    ):
        model = load_reward_model(export(Plain(change), tmp_path))
        for rows in (1, 3):
            expected = Outcomes(*Plain(lambda o: o.values())(*batch(rows)))
            torch.testing.assert_close(model(*batch(rows)), expected)


def test_program_and_its_copies_are_frozen_and_let_gradients_through(model, reference):
    assert isinstance(model, RewardModel)
    patient, polymer_id, formulation, coverage = batch(3)
    gradients = []
    for function in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), reference):
        if function is not reference:
            assert not any(parameter.requires_grad for parameter in function.parameters())
            assert not any(module.training for module in function.train().modules())
            assert all(map(torch.equal, function(*batch(1)), model(*batch(1))))
        requested = formulation.clone().requires_grad_()
        outcomes = function(patient, polymer_id, requested, coverage)
        gradients += torch.autograd.grad(outcomes.delta_ef_pct.sum(), requested)
        torch.testing.assert_close(gradients[-1], gradients[0])
    assert gradients[0].abs().sum() > 0


def test_program_moves_with_the_devices_that_are_written_into_it(program, device):
    model = load_reward_model(program, device)
    designs = [value.to(device) for value in batch(3)]
    assert {value.device.type for value in model(*designs)} == {device}
    meta = model.to("meta")
    outcomes = meta(*(value.to("meta") for value in batch(2, 3)))
    assert {(value.device.type, value.shape) for value in outcomes} == {("meta", (2, 3))}
    assert not any(parameter.requires_grad for parameter in meta.parameters())
    assert next(copy.deepcopy(meta).parameters()).is_meta


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_program_is_part_of_one_compiled_graph(model):
    compiled = torch.compile(
        lambda *designs: model(*designs), backend="aot_eager", fullgraph=True, dynamic=False
    )
    designs = batch(1, dtype=torch.float64)  # fewer than the program takes
    with torch.no_grad():
        torch.testing.assert_close(compiled(*designs), model(*designs))


@pytest.mark.parametrize(
    ("make", "settings"), [(gym.make, {"horizon": 3}), (gym.make_vec, {"num_envs": 4})]
)
def test_environments_made_by_gymnasium_run_on_a_program(program, reference, make, settings):
    rewards = []
    for reward_model in (program, reference):
        env = make("HydrogelDesign-v0", reward_model=reward_model, **settings)
        env.reset(seed=0)
        env.action_space.seed(0)
        rewards.append([env.step(env.action_space.sample())[1] for _ in range(3)])
    np.testing.assert_allclose(*rewards, rtol=1e-5, atol=1e-5)


def even(outcomes):
    """Looks at the batch size."""
    rows = outcomes["toxicity_risk"].shape[0]
    return outcomes if rows % 2 == 0 else {**outcomes, "toxicity_risk": outcomes["x"]}


RETURNS = "returns toxicity_risk"


def with_toxicity(change):
    return lambda o: o | {"toxicity_risk": change(o["toxicity_risk"])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o["toxicity_risk"], r" returns one tensor; expected a dict of \('delta_ef_pc"),
        (lambda o: tuple(o.values())[:5], r" returns a tuple of 5; expected a dict of"),
        (lambda o: {"dose": o["toxicity_risk"]}, r" returns a dict of \('dose',\); expected a di"),
        (with_toxicity(lambda x: x[:, None]), rf" {RETURNS} \(s\d+, 1\) float32; expected \(B,\)"),
        (with_toxicity(lambda x: x.mean(0, keepdim=True)), rf" {RETURNS} \(1,\) float32; expect"),
        (with_toxicity(lambda x: 0.5), rf" {RETURNS} float; expected \(B,\) float32"),
        (with_toxicity(torch.Tensor.long), rf" {RETURNS} \(s\d+,\) int64; expected"),
        (with_toxicity(lambda x: x + 2.0), r": toxicity_risk is 2\.\d+ for polymer 0 .* \[0, 1\]"),
        (with_toxicity(dropout), r" was exported in training mode .*dropout.*; call model.eval"),
        (even, r" only works for some batches, where .* % 2"),
    ],
    ids="tensor five name shape static number dtype range training branch".split(),
)
def test_program_that_returns_something_else_is_refused(tmp_path, change, message):
    path = export(Plain(change), tmp_path, size=Dim.AUTO if change is even else BATCH)
    with pytest.raises(RewardModelError, match=f"^reward_model '{path}'{message}[^\n]*$"):
        load_reward_model(path)


class Summing(nn.Module):
    """Takes any inputs."""

    def forward(self, *inputs):
        y = sum(value.sum(-1) if value.dim() > 1 else value for value in inputs).float()
        return (y,) * 6


PATIENT, *REST, COVERAGE = batch(2)
WANTED = r"patient \(B, 11\) float32"
EXPECTED = f"expected {WANTED}"


@pytest.mark.parametrize(
    ("inputs", "size", "message"),
    [
        ((PATIENT, *REST), BATCH, f"takes 3 inputs; expected 4 by position: {WANTED}, polymer_id"),
        ((PATIENT[:, :6], *REST, COVERAGE), BATCH, rf"takes patient \(s\d+, 6\) .*; {EXPECTED}"),
        ((PATIENT, *REST, COVERAGE.float()), BATCH, rf"takes .* \(s\d+,\) float32; {EXPECTED}"),
        (
            (PATIENT, *REST, COVERAGE),
            None,
            r"has a static batch size: it takes patient \(2, 11\) .*; export it with dynamic_shapes"
            r"=\(\{0: batch\},\) \* 4, where batch = torch.export.Dim\('batch'\)",
        ),
        ((PATIENT, *REST, COVERAGE), Dim("few", max=9), "does not take any batch size: .*; export"),
    ],
    ids=["number", "columns", "dtype", "static", "limited"],
)
def test_program_that_takes_something_else_is_refused(tmp_path, inputs, size, message):
    path = tmp_path / "stage1.pt2"
    shapes = None if size is None else (tuple({0: size} for _ in inputs),)
    torch.export.save(torch.export.export(Summing(), inputs, dynamic_shapes=shapes), path)
    with pytest.raises(RewardModelError, match=f"^reward_model '{path}' {message}[^\n]*$"):
        load_reward_model(path)


# What follows takes a program apart, as the members of its archive by name.


def rewrite(program, path, change, *arguments) -> str:
    """Save a program whose members were changed."""
    with zipfile.ZipFile(program) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(members, *arguments)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"stage1/{name}", data)
    return str(path)


def in_text(*changes: tuple[str, str], count=0):
    """Replaces what matches in the JSON of a program; PATH stands for that of a file."""

    def change(members, path=""):
        text = members[MODEL].decode()
        for pattern, new in changes:
            new = new.replace("PATH", str(path))
            text, times = re.subn(pattern, lambda _, new=new: new, text, count=count)
            assert times
        members[MODEL] = text.encode()

    return change


def test_path_may_hold_a_colon_and_its_program_be_of_another_device(
    program, tmp_path, reference, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = Path("C:stage1.pt2")
    rewrite(program, path, in_text(('"type": "cpu"', '"type": "cuda"')))
    torch.testing.assert_close(load_reward_model(path)(*batch(4)), reference(*batch(4)))
    with pytest.raises(RewardModelError, match=r"'C:\\\\x.pt2': there is no such file"):
        load_reward_model(r"C:\x.pt2")


def test_file_that_is_no_program_is_refused_in_one_line(tmp_path, program):
    path = tmp_path / "x.pt2"

    def changed(change):
        return lambda: rewrite(program, path, change)

    def without(member):
        return changed(lambda members: members.pop(member))

    other_format = changed(lambda members: members.update(archive_format=b"else"))
    other_version = changed(in_text((r'"major": \d+', '"major": 99')))
    cut_off = " is not a program: it is cut off, or is no archive of weights; expected"
    lacks = " is not a program: a zip archive without "
    for make, message in (
        (lambda: None, ": there is no such file; expected a program saved by torch.export"),
        (lambda: path.write_text("no program"), cut_off),
        (lambda: path.write_bytes(Path(program).read_bytes()[:3000]), cut_off),
        (lambda: torch.save({"a": torch.zeros(3)}, path), f"{lacks}archive_version; expected"),
        (without(MODEL), f"{lacks}models/model.json; expected"),
        (other_format, f"{lacks}the format pt2; expected"),
        (other_version, " cannot be loaded: "),
        (without("data/weights/weight_0"), " cannot be loaded: KeyError: 'data/weights/weight_0'"),
        (lambda: path.unlink() or path.mkdir(), " cannot be loaded: IsADirectoryError"),
    ):
        make()
        start = re.escape(f"reward_model '{path}'{message}")
        with pytest.raises(RewardModelError, match=f"^{start}[^\n]*$"):
            load_reward_model(path)


class Payload:
    """Empties a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def pickled(path, by_torch: bool = True) -> bytes:
    if not by_torch:
        return pickle.dumps(Payload(path), protocol=2)
    buffer = io.BytesIO()
    torch.save(Payload(path), buffer)
    return buffer.getvalue()


@pytest.fixture
def untouched(tmp_path):
    """A file that a payload would change."""
    path = tmp_path / "untouched"
    path.write_text("untouched")
    return path


def test_sample_inputs_of_a_program_are_not_unpickled(tmp_path, program, reference, untouched):
    evil = pickled(untouched)
    change = {"data/sample_inputs/model.pt": evil}
    path = rewrite(program, tmp_path / "x.pt2", lambda members: members.update(change))
    torch.testing.assert_close(load_reward_model(path)(*batch(3)), reference(*batch(3)))
    assert untouched.read_text() == "untouched"
    torch.load(io.BytesIO(evil), weights_only=False).close()  # what these tests rely on
    assert untouched.read_text() == ""


def set_pickle(folder, file, by_torch=True):
    """Has a weight or a constant read from a pickle."""

    def change(members, path):
        name = f"data/{folder}/model_{folder}_config.json"
        value = json.loads(members[name])
        next(iter(value["config"].values())).update(path_name=file, use_pickle=True)
        members[name] = json.dumps(value).encode()
        members[f"data/{folder}/{file}"] = pickled(path, by_torch)

    return change, rf"contains a pickle \({file}, of [\w.]+\); expected plain tensors"


def add_member(name, what):
    """Adds what torch would run."""
    message = rf"contains {what} \({name}\); expected plain tensors"
    return lambda members, path: members.update({name: pickled(path)}), message


def older_archive(members, path):
    members.clear()
    members |= {"version": "8.20", "serialized_exported_program.json": "{}"}
    for name in ("state_dict", "constants", "example_inputs"):
        members[f"serialized_{name}.pt"] = pickled(path)


def set_enum(members, path):
    """Has a module imported for a type of what the program returns."""
    program = json.loads(members[MODEL])
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    spec = json.loads(signature["out_spec"])
    spec[1]["context"] = json.dumps([{"__enum__": True, "fqn": "stage1_evil:X", "name": "Y"}])
    signature["out_spec"] = json.dumps(spec)
    members[MODEL] = json.dumps(program).encode()


def set_operator(name):
    """An operator of torch that writes files."""
    target = f"torch.ops.aten.{name}.default"
    change = in_text(('"target": "[^"]*"', f'"target": "{target}"'), count=1)
    return change, f"contains target '{target}'"


OPEN = "open('PATH', 'w')"
REMOVE = (
    '{"target": "torch.os.remove", "inputs": [{"name": "file", "arg": {"as_string": "PATH"}, '
    '"kind": 1}], "outputs": [], "metadata": {}}, '
)
ARGUMENT = f"""{{"name": "approximate", "arg": {{"as_string": "tanh' + {OPEN} + '"}}, "kind": 2}}"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        set_pickle("weights", "weight_0"),
        set_pickle("constants", "tensor_0"),
        set_pickle("constants", "opaque_obj_0", by_torch=False),
        set_pickle("constants", "custom_obj_0"),
        add_member("data/weights/model.pt", "a pickle"),
        add_member("data/constants/model.pt", "a pickle"),
        add_member("data/aotinductor/model/run.so", "compiled code"),
        (older_archive, "is not a program: a zip archive without"),
        (set_enum, r"returns a builtins.dict; expected a dict of"),
        (in_text(('"expr_str": "[^"]*"', f'"expr_str": "{OPEN}"')), r"contains expr_str .open\("),
        (
            in_text((r'"nodes": \[', f'"nodes": [{REMOVE}'), (r'\["TRAINING"\]', "[]"), count=1),
            r"contains target 'torch.os.remove'; expected plain tensors and operators only",
        ),
        (
            in_text(('"as_tensor": {"name": "patient"}', f'"as_tensor": {{"name": "p={OPEN}"}}')),
            r"contains name .p=open\(",
        ),
        (
            in_text(('"polymer.weight"', rf'"polymer.x\", {OPEN}) or (\""')),
            r"contains parameter_name 'polymer.x\", open\(",
        ),
        (
            in_text((r'"guards_code": \[', f'"guards_code": ["{OPEN}", ')),
            r"only works for some batches, where .*open\(",
        ),
        (
            in_text((r'tanh.default", "inputs": \[', f'gelu.default", "inputs": [{ARGUMENT}, ')),
            r"failed on \(96,\) designs .*approximate",
        ),
        set_operator("save"),
        set_operator("from_file"),
    ],
)
def test_file_that_would_run_code_is_refused_and_runs_none(
    tmp_path, program, untouched, monkeypatch, change, message
):
    (tmp_path / "stage1_evil.py").write_text(f"import os; os.remove({str(untouched)!r})")
    monkeypatch.syspath_prepend(tmp_path)
    path = rewrite(program, tmp_path / "x.pt2", change, untouched)
    with pytest.raises(RewardModelError, match=message):
        load_reward_model(path)
    assert untouched.read_text() == "untouched"
