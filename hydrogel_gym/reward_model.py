"""Stage-1 models: what the environment asks of one, how one is loaded, and how it is checked.

A reward model is any callable `(patient, polymer_id, formulation, coverage) -> Outcomes` on batched
tensors. It is frozen: evaluation mode, no gradients to its parameters.

A `.pt2` file comes from others, and `torch.export.load` would run what its author chose: it
unpickles sample inputs, tensors of a subclass and constants that are objects, loads compiled
libraries, evaluates the sizes of tensors and the guards as Python, imports a module for an `enum`,
and takes any attribute of `torch` for an operator. So it never gets to see the file, but an archive
written anew from what was read as JSON, compared with lists of what is allowed, and raw numbers.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import re
import zipfile
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from hydrogel_gym.mechanistic import MechanisticModel
from hydrogel_gym.polymers import load_polymers
from hydrogel_gym.spaces import (
    COVERAGES,
    FORMULATION_FIELDS,
    NUM_POLYMERS,
    OUTCOME_FIELDS,
    PATIENT_FIELDS,
    Outcomes,
)


@runtime_checkable
class RewardModel(Protocol):
    """A frozen Stage-1 model."""

    def __call__(
        self, patient: Tensor, polymer_id: Tensor, formulation: Tensor, coverage: Tensor
    ) -> Outcomes:
        """Predict the outcomes of a batch of designs.

        Args:
            patient: (..., 11) in the order and units of `PATIENT_FIELDS`.
            polymer_id: (...) int64 row of the polymer table.
            formulation: (..., 4) in the order and units of `FORMULATION_FIELDS`.
            coverage: (...) int64 index into `COVERAGES`.

        Returns:
            `Outcomes` of (...) tensors in the dtype and on the device of `patient`.
        """
        ...


class RewardModelError(ValueError):
    """A reward model that cannot be loaded, or that does not return what is asked of it."""


INPUTS = ("patient", "polymer_id", "formulation", "coverage")
_SIGNATURE = (
    "patient (B, 11) float32, polymer_id (B,) int64, formulation (B, 4) float32, "
    "coverage (B,) int64"
)
_RETURNS = f"a dict of {Outcomes._fields}, or a tuple in that order"
_DYNAMIC = (
    "export it with dynamic_shapes=({0: batch},) * 4, where batch = torch.export.Dim('batch')"
)

_EXPORT_PLAIN = (
    "expected plain tensors and operators only, of which nothing is unpickled or evaluated "
    "(for anything else use 'module:factory')"
)

# What may stand in a program. Names become Python; so do the names of parameters, in quotes.
_PLAIN = re.compile(r"[\w .+/:-]*", re.ASCII)
_NAME = re.compile(r"\w*", re.ASCII)
_ANYTHING = re.compile(r".*", re.DOTALL)  # arguments, which are quoted properly
# Operators that only compute. Two of `aten` write files.
_OPERATOR = re.compile(
    r"torch\.ops\.(aten\.(?!save\b|from_file\b)|prims\.)\w+\.\w+"
    r"|torch\.ops\.higher_order\.(cond|while_loop|scan|associative_scan|map_impl"
    r"|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|torch\._functorch\.predispatch\.(_add_batch_dim|_remove_batch_dim"
    r"|_vmap_increment_nesting|_vmap_decrement_nesting|lazy_load_decompositions)"
    r"|torch\.(_C\._set_grad_enabled|sym_(int|float|ite|max|min|not|sqrt|sum))"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|abs|lshift|rshift"
    r"|and_|or_|not_|eq|ne|ge|le|gt|lt)"
    r"|math\.(ceil|floor|trunc)",
    re.ASCII,
)
# Sizes of tensors, evaluated by sympy. Each token begins otherwise, so that matching is linear.
_EXPRESSION = re.compile(
    r"(Symbol\('\w+'(, \w+=(True|False))*\)"
    r"|(Integer|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|ModularIndexing"
    r"|IntTrueDiv|FloatTrueDiv|FloatPow|PowByNatural|ToFloat|TruncToInt|CeilToInt|FloorToInt"
    r"|Where|Identity|Equality|Unequality|StrictLessThan|LessThan|StrictGreaterThan|GreaterThan"
    r"|And|Or|Not|Eq|Ne|Lt|Le|Gt|Ge)\("
    r"|[su](?=\d)|\d|[-+*/%(), <>=&|~])*",
    re.ASCII,
)
_PATTERNS = {
    "name": _NAME,
    "as_name": _NAME,
    "as_string": _ANYTHING,
    "as_strings": _ANYTHING,
    "expr_str": _EXPRESSION,
    "target": _OPERATOR,
    "as_operator": _OPERATOR,
}
# Which inputs have the same length: said of every program with one dynamic dimension.
_LENGTH = r"L\['\w+'\](\[\d+\])?\.size\(\)\[0\]"
_SAME_LENGTH = re.compile(f"{_LENGTH} == {_LENGTH}", re.ASCII)

_NUMBERS = {"weights": re.compile(r"weight_\d+"), "constants": re.compile(r"tensor_\d+")}


def load_reward_model(
    spec: str | os.PathLike[str] | RewardModel,
    device: str | torch.device = "cpu",
    *,
    outcome_scale: str = "source",
) -> RewardModel:
    """Load, freeze and check a Stage-1 model.

    Args:
        spec: `"mechanistic"`, the built-in model; a path to a `.pt2` file, a program saved by
            `torch.export.save` (see `ExportedModel`); `"module:factory"`, a function without
            arguments that returns a model; or a model.
        device: where it will run.
        outcome_scale: `"source"` or `"literature"`, for the built-in model only.

    Returns:
        The model; an `nn.Module` is put into evaluation mode, on `device` and without trainable
        parameters, in place.

    Raises:
        RewardModelError: it cannot be loaded, or its outcomes for one design of every polymer and
            coverage are not the six fields of `Outcomes` with the batch's shape, dtype and device,
            finite and in range.
    """
    if isinstance(spec, os.PathLike):
        spec = os.fspath(spec)
    model = _load(spec, outcome_scale) if isinstance(spec, str) else spec
    if isinstance(model, nn.Module):
        model.eval().requires_grad_(False).to(device)
    name = f"reward_model {spec!r}" if isinstance(spec, str) else "reward_model"
    check_reward_model(model, device, name=name)
    return model


def _load(spec: str, outcome_scale: str) -> RewardModel:
    if spec == "mechanistic":
        return MechanisticModel(outcome_scale=outcome_scale)
    # Before the colon is looked for: C:\stage1.pt2 has one too.
    path = Path(spec)
    if path.suffix == ".pt2":
        return load_program(path)
    module_name, _, factory_name = spec.partition(":")
    if not factory_name:
        raise RewardModelError(
            f"reward_model is {spec!r}; allowed: 'mechanistic', a path to a .pt2 program, "
            "a path to a .pt Stage-1 checkpoint, or 'module:factory'"
        )
    try:
        return getattr(importlib.import_module(module_name), factory_name)()
    except Exception as error:  # whatever the user's module or factory raises
        raise RewardModelError(
            f"reward_model {spec!r} cannot be loaded: {type(error).__name__}: {error}"
        ) from error


@torch.no_grad()
def check_reward_model(
    model: RewardModel, device: str | torch.device = "cpu", *, name: str = "reward_model"
) -> None:
    """Run a model on every polymer with every coverage and compare the outcomes with the contract.

    The patient and the formulation are in the middle of their ranges. The designs are given twice,
    in one batch dimension and in two.

    Raises:
        RewardModelError: names the field, what was expected and what was got.
    """
    if not callable(model):
        raise RewardModelError(
            f"{name} is {model!r}; expected a callable, or a string that names one"
        )
    device = torch.device(device)
    num_designs = NUM_POLYMERS * len(COVERAGES)
    patient, formulation = (
        torch.tensor([(f.low + f.high) / 2 for f in fields], device=device).repeat(num_designs, 1)
        for fields in (PATIENT_FIELDS, FORMULATION_FIELDS)
    )
    designs = torch.arange(num_designs, device=device)
    coverage = designs % len(COVERAGES)
    polymer_id = designs // len(COVERAGES)
    inputs = (patient, polymer_id, formulation, coverage)
    outcomes = _checked_outcomes(model, inputs, name)
    _checked_outcomes(model, tuple(t.view(2, -1, *t.shape[1:]) for t in inputs), name)
    if device.type == "meta":
        return  # no values to look at
    for value, item in zip(outcomes, OUTCOME_FIELDS, strict=True):
        good = value.isfinite() & (value >= item.low) & (value <= item.high)
        if good.all():
            continue
        bad = (~good).nonzero().flatten().tolist()
        polymer, level = divmod(bad[0], len(COVERAGES))
        others = f" (and for {len(bad) - 1} more of {num_designs} designs)" if bad[1:] else ""
        raise RewardModelError(
            f"{name}: {item.name} is {value[bad[0]].item():g} for polymer {polymer} "
            f"({load_polymers().names[polymer]}), coverage {COVERAGES[level]}{others}; "
            f"expected finite values in [{item.low:g}, {item.high:g}]"
        )


def _checked_outcomes(model: RewardModel, inputs: tuple[Tensor, ...], name: str) -> Outcomes:
    """Outcomes of a batch of any shape, after a look at their types, shapes, dtypes and devices."""
    patient, shape = inputs[0], tuple(inputs[1].shape)
    versions = [_num_writes(value) for value in inputs]
    try:
        outcomes = model(*inputs)
    except Exception as error:
        given = ", ".join(
            f"{field} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
            for field, value in zip(INPUTS, inputs, strict=True)
        )
        raise RewardModelError(
            f"{name} failed on {shape} designs ({given}): {type(error).__name__}: {error}"
        ) from error
    for field, value, version in zip(INPUTS, inputs, versions, strict=True):
        if _num_writes(value) != version:
            raise RewardModelError(f"{name} writes to {field}; expected a model that only reads it")
    if getattr(outcomes, "_fields", None) != Outcomes._fields:
        raise RewardModelError(
            f"{name} returned {type(outcomes).__name__}; expected Outcomes{Outcomes._fields}"
        )
    expected = f"a {shape} {patient.dtype} tensor on {patient.device}"
    for field, value in outcomes._asdict().items():
        if not isinstance(value, Tensor):
            raise RewardModelError(
                f"{name}: {field} is {type(value).__name__}; expected {expected}"
            )
        if (value.shape, value.dtype, value.device) != (shape, patient.dtype, patient.device):
            raise RewardModelError(
                f"{name}: {field} is a {tuple(value.shape)} {value.dtype} tensor on "
                f"{value.device}; expected {expected}"
            )
    return outcomes


def _num_writes(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version


class ExportedModel(nn.Module):
    """A program of `torch.export` as a reward model.

    The program takes one batch dimension and float32 numbers; this takes any batch shapes that
    broadcast, and answers in the dtype of `patient`. Parameters keep their dtype and stay frozen.

    Args:
        archive: the `.pt2` archive that `load_program` has checked.
    """

    def __init__(self, archive: bytes) -> None:
        super().__init__()
        self._archive = archive
        self._exported = torch.export.load(io.BytesIO(archive))
        self._min_rows = _smallest_batch(self._exported)
        self.register_buffer("_place", torch.empty(0), persistent=False)
        self._build()

    def _build(self) -> None:
        # Guards would be evaluated as Python; `load_program` looks at them instead.
        self.program = self._exported.module(check_guards=False).requires_grad_(False)
        self.program.validate_inputs = False  # `forward` gives it nothing else
        for module in self.program.modules():
            module.training = False  # programs refuse eval(), which does no more

    def train(self, mode: bool = True) -> ExportedModel:
        """Do nothing: a program keeps the mode in which it was exported."""
        self.training = False
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> ExportedModel:
        # Devices are written into a program, which so has to be moved as a whole.
        before = self._place.device
        self._place = fn(self._place)
        if self._place.device != before:
            self._exported = move_to_device_pass(self._exported, self._place.device)
            self._build()
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._archive, self._place.device)

    def forward(
        self, patient: Tensor, polymer_id: Tensor, formulation: Tensor, coverage: Tensor
    ) -> Outcomes:
        """Predict the outcomes of a batch of designs; see `RewardModel`."""
        shape = torch.broadcast_shapes(
            patient.shape[:-1], polymer_id.shape, formulation.shape[:-1], coverage.shape
        )
        rows = math.prod(shape)

        def flat(value: Tensor, dtype: torch.dtype, *columns: int) -> Tensor:
            value = value.to(dtype).expand((*shape, *columns)).reshape(rows, *columns)
            if rows < self._min_rows:
                padding = value.new_zeros(self._min_rows - rows, *columns)
                value = torch.cat([value, padding])
            return value

        outcomes = self.program(
            flat(patient, torch.float32, len(PATIENT_FIELDS)),
            flat(polymer_id, torch.int64),
            flat(formulation, torch.float32, len(FORMULATION_FIELDS)),
            flat(coverage, torch.int64),
        )
        if isinstance(outcomes, dict):
            outcomes = [outcomes[name] for name in Outcomes._fields]
        return Outcomes(*(value[:rows].reshape(shape).to(patient.dtype) for value in outcomes))


def _rebuild(archive: bytes, device: torch.device) -> ExportedModel:
    return ExportedModel(archive).to(device)


def load_program(path: str | os.PathLike[str]) -> ExportedModel:
    """Load a `.pt2` file without running any code that it may hold.

    Args:
        path: file of `torch.export.save`. The program takes patient (B, 11) float32, polymer_id
            (B,) int64, formulation (B, 4) float32 and coverage (B,) int64, B dynamic, and returns
            a dict of six (B,) tensors keyed by the names of `OUTCOME_FIELDS`, or a tuple of them in
            that order. (A NamedTuple is saved by torch only if registered by a private function.)

    Raises:
        RewardModelError: the file is missing, not a program, not such a program, or holds something
            that could run code.
    """
    name = f"reward_model {os.fspath(path)!r}"
    try:
        return ExportedModel(_checked_archive(path))
    except FileNotFoundError as error:
        raise RewardModelError(
            f"{name}: there is no such file; expected a program saved by torch.export.save"
        ) from error
    except RewardModelError as error:
        raise RewardModelError(f"{name} {error}") from error
    except Exception as error:  # whatever torch raises at a file that is damaged
        reason = str(error).strip().partition("\n")[0]
        raise RewardModelError(
            f"{name} cannot be loaded: {type(error).__name__}: {reason}; "
            "expected a program saved by torch.export.save"
        ) from error


def _checked_archive(path: str | os.PathLike[str]) -> bytes:
    """Archive of one program of which nothing is evaluated, imported or unpickled.

    Raises:
        RewardModelError: says what stands in the way, without the path.
    """
    with open(path, "rb") as file:
        content = file.read()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise RewardModelError(
            "is not a program: no zip archive; expected a file saved by torch.export.save"
        ) from error
    needed = ["archive_version", "byteorder", ".data/version", "models/model.json"]
    needed += [f"data/{folder}/model_{folder}_config.json" for folder in _NUMBERS]
    missing = [name for name in needed if name not in members]
    if members.get("archive_format") != b"pt2" or missing:
        raise RewardModelError(
            "is not a program: a zip archive without "
            f"{missing[0] if missing else 'the format pt2'}; "
            "expected a file saved by torch.export.save"
        )
    for name in members:
        if name.startswith("data/aotinductor/"):
            raise RewardModelError(f"holds compiled code ({name}); {_EXPORT_PLAIN}")
        if name in ("data/weights/model.pt", "data/constants/model.pt"):
            raise RewardModelError(f"holds a pickle ({name}); {_EXPORT_PLAIN}")

    checked = {name: members[name] for name in needed[:3]}
    checked["archive_format"] = b"pt2"
    checked["models/model.json"] = _checked_program(members["models/model.json"])
    checked["data/sample_inputs/model.pt"] = b""  # a pickle, and not needed
    for folder, numbers in _NUMBERS.items():
        config = json.loads(members[name := f"data/{folder}/model_{folder}_config.json"])
        _check_strings(config)
        for key, entry in config["config"].items():
            file = entry["path_name"]
            if entry["use_pickle"] is not False or not numbers.fullmatch(file):
                raise RewardModelError(f"holds a pickle ({file}, of {key}); {_EXPORT_PLAIN}")
            checked[f"data/{folder}/{file}"] = members[f"data/{folder}/{file}"]
        checked[name] = json.dumps(config).encode()

    result = io.BytesIO()
    with zipfile.ZipFile(result, "w") as archive:
        for name, value in checked.items():
            archive.writestr(f"program/{name}", value)
    return result.getvalue()


def _checked_program(text: bytes) -> bytes:
    """The JSON of a program, checked and without what could be evaluated and is not needed."""
    program = json.loads(text)
    module = program["graph_module"]
    module["metadata"] = {}
    # The signatures of inner modules are there to take a program apart again.
    outer = [entry for entry in module["module_call_graph"] if entry["fqn"] == ""]
    module["module_call_graph"] = outer
    signature = outer[0]["signature"]
    _check_inputs(_tree(signature["in_spec"]))
    _check_outputs(_tree(signature["out_spec"]))
    for guard in program.pop("guards_code", ()):
        if not _SAME_LENGTH.fullmatch(guard):
            raise RewardModelError(
                f"only holds for some batches, where {guard!r}; expected a program that takes "
                "any batch size"
            )
    program["guards_code"] = []
    program["verifiers"] = ["TRAINING"]  # the file may not choose who verifies it
    _check_strings(program)
    return json.dumps(program).encode()


def _check_strings(value: Any, key: str = "") -> None:
    """Hold every string to its pattern; put tensors on the CPU and drop metadata, in place."""
    if isinstance(value, str):
        if not _PATTERNS.get(key, _PLAIN).fullmatch(value):
            raise RewardModelError(f"holds {key or 'the name'} {value[:80]!r}; {_EXPORT_PLAIN}")
    elif isinstance(value, list):
        for entry in value:
            _check_strings(entry, key)
    elif isinstance(value, dict):
        if value.keys() == {"type", "index"}:
            value.update(type="cpu", index=None)  # a device
        if "target" in value:
            value["metadata"] = {}  # where in the source an operator came from
            _check_evaluation_mode(value)
        for name, entry in value.items():
            _check_strings(name)
            if name not in ("in_spec", "out_spec"):  # JSON within JSON, see `_tree`
                _check_strings(entry, name)


def _check_evaluation_mode(node: dict[str, Any]) -> None:
    for entry in node["inputs"]:
        if entry["name"] in ("train", "training") and entry["arg"].get("as_bool"):
            raise RewardModelError(
                f"was exported in training mode ({node['target']}); "
                "call model.eval() before torch.export.export"
            )


def _tree(spec: str) -> Any:
    """Nested tuples, lists and dicts of None, one for each tensor; or the name of another type."""

    def build(node: dict[str, Any]) -> Any:
        children = [build(child) for child in node["children_spec"]]
        if node["type"] is None:
            return None
        if node["type"] in ("builtins.tuple", "builtins.list") and node["context"] == "null":
            return children
        if node["type"] == "builtins.dict":
            keys = json.loads(node["context"])
            if isinstance(keys, list) and all(isinstance(key, str) for key in keys):
                return dict(zip(keys, children, strict=True))
        return str(node["type"])

    return build(json.loads(spec)[1])


def _check_inputs(tree: Any) -> None:
    if tree != [[None] * len(INPUTS), {}]:
        positional = tree[0] if isinstance(tree, list) else []
        keywords = f" and the keywords {tuple(tree[1])}" if tree[1:] and tree[1] else ""
        raise RewardModelError(
            f"takes {len(positional)} inputs{keywords}; expected {len(INPUTS)} by position: "
            f"{_SIGNATURE}"
        )


def _check_outputs(tree: Any) -> None:
    names = Outcomes._fields
    if isinstance(tree, dict) and tree == dict.fromkeys(names):
        return
    if tree == [None] * len(names):
        return
    got = "one tensor" if tree is None else f"a {tree}"
    if isinstance(tree, dict):
        got = f"a dict of {tuple(tree)}"
    elif isinstance(tree, list):
        got = f"a tuple of {len(tree)}"
    raise RewardModelError(f"returns {got}; expected {_RETURNS}")


def _smallest_batch(exported: ExportedProgram) -> int:
    """Smallest batch that a program takes.

    Raises:
        RewardModelError: an input, an outcome or the range of batch sizes is not what it must be.
    """
    nodes = {node.name: node.meta.get("val") for node in exported.graph.nodes}
    # What is no tensor has no node, but stands there itself.
    given = [nodes.get(name, name) for name in exported.graph_signature.user_inputs]
    got = ", ".join(f"{n} {_describe(v)}" for n, v in zip(INPUTS, given, strict=True))
    kinds = (
        ((len(PATIENT_FIELDS),), torch.float32),
        ((), torch.int64),
        ((len(FORMULATION_FIELDS),), torch.float32),
        ((), torch.int64),
    )
    for value, kind in zip(given, kinds, strict=True):
        is_batch = isinstance(value, Tensor) and value.ndim > 0
        if not is_batch or (tuple(value.shape[1:]), value.dtype) != kind:
            raise RewardModelError(f"takes {got}; expected {_SIGNATURE}")
    sizes = [value.shape[0] for value in given]
    if any(isinstance(size, int) for size in sizes):
        raise RewardModelError(f"has a static batch size: it takes {got}; {_DYNAMIC}")
    bounds = [exported.range_constraints.get(size.node.expr) for size in sizes]
    if None in bounds or any(bound.upper.is_Integer for bound in bounds):
        raise RewardModelError(
            f"does not take any batch size: it takes {got}, {exported.range_constraints}; "
            f"{_DYNAMIC}"
        )
    spec = exported.call_spec.out_spec
    names = spec.context if spec.type is dict else Outcomes._fields
    outcomes = [nodes.get(name, name) for name in exported.graph_signature.user_outputs]
    batches = [f"({size},)" for size in sizes]
    for name, value in zip(names, outcomes, strict=True):
        if _describe(value).partition(" float")[0] not in batches:
            raise RewardModelError(f"returns {name} {_describe(value)}; expected (B,) float32")
    # A network may drop a dimension of one, whatever it was exported for.
    return max(2, *(int(bound.lower) for bound in bounds))


def _describe(value: Any) -> str:
    """Shape and dtype of a tensor, `(s0, 11) float32`; the type of anything else."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    shape = f"({', '.join(map(str, value.shape))}{',' if value.ndim == 1 else ''})"
    return f"{shape} {str(value.dtype).removeprefix('torch.')}"
