"""Stage-1 models that others have exported: programs of `torch.export`, run without trust.

A `.pt2` file comes from others, and `torch.export.load` would run what its author chose: it
unpickles sample inputs, tensors of a subclass and constants that are objects, loads compiled
libraries, evaluates the sizes of tensors and the guards as Python, imports a module for an `enum`,
and takes any attribute of `torch` for an operator. So it never gets to see the file, but an archive
written anew from what was read as JSON, compared with lists of what is allowed, and raw numbers.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import warnings
import zipfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from hydrogel_gym.archives import check_zip
from hydrogel_gym.errors import first_line
from hydrogel_gym.problem.fields import FORMULATION_FIELDS, PATIENT_FIELDS, Outcomes, flat_designs

INPUTS = ("patient", "polymer_id", "formulation", "coverage")
_SIGNATURE = (
    f"patient (B, {len(PATIENT_FIELDS)}) float32, polymer_id (B,) int64, "
    f"formulation (B, {len(FORMULATION_FIELDS)}) float32, coverage (B,) int64"
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
# Which inputs have the same length: stated of every program with one dynamic dimension.
_LENGTH = r"L\['\w+'\](\[\d+\])?\.size\(\)\[0\]"
_SAME_LENGTH = re.compile(f"{_LENGTH} == {_LENGTH}", re.ASCII)

_NUMBERS = {"weights": re.compile(r"weight_\d+"), "constants": re.compile(r"tensor_\d+")}


class ProgramError(ValueError):
    """A program that cannot be a reward model, or whose file is not to be trusted."""


class ExportedModel(nn.Module):
    """A program of `torch.export` as a reward model.

    The program takes one batch dimension and float32 numbers; this takes any batch shapes that
    broadcast, and answers in the dtype of `patient`. Parameters keep their dtype and stay frozen.

    Args:
        archive: the `.pt2` archive that `load_program` has checked.
    """

    _place: Tensor

    def __init__(self, archive: bytes) -> None:
        super().__init__()
        self._archive = archive
        disabled = logging.root.manager.disable
        logging.disable()  # torch logs the traceback of what it then raises
        try:
            with warnings.catch_warnings():
                # torch 2.10 warns of its own reading.
                warnings.filterwarnings("ignore", "The given buffer is not writable")
                self._exported = torch.export.load(io.BytesIO(archive))
        finally:
            logging.disable(disabled)
        self._min_rows = _smallest_batch(self._exported)
        self.register_buffer("_place", torch.empty(0), persistent=False)
        self._build()

    def _build(self) -> None:
        # Guards would be evaluated as Python; `load_program` looks at them instead.
        self.program = self._exported.module(check_guards=False).requires_grad_(False)
        # `forward` gives it nothing else.
        setattr(self.program, "validate_inputs", False)  # noqa: B010  no field of its type
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
            from torch.export.passes import move_to_device_pass  # torch 2.5 and later

            self._exported = move_to_device_pass(self._exported, self._place.device)
            self._build()
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._archive, self._place.device)

    def forward(
        self, patient: Tensor, polymer_id: Tensor, formulation: Tensor, coverage: Tensor
    ) -> Outcomes:
        """Predict the outcomes of a batch of designs; see `RewardModel`."""
        shape, design = flat_designs(patient, polymer_id, formulation, coverage)
        rows = math.prod(shape)
        if rows < self._min_rows:
            missing = self._min_rows - rows
            design = [torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) for x in design]
        outcomes = self.program(*design)
        if isinstance(outcomes, dict):
            outcomes = [outcomes[name] for name in Outcomes._fields]
        return Outcomes(*(value[:rows].reshape(shape).to(patient.dtype) for value in outcomes))


def _rebuild(archive: bytes, device: torch.device) -> ExportedModel:
    return ExportedModel(archive).to(device)


def load_program(path: str | os.PathLike[str]) -> ExportedModel:
    """Load a `.pt2` file without running any code that it may contain.

    Args:
        path: file of `torch.export.save`. The program takes patient (B, C) float32, polymer_id
            (B,) int64, formulation (B, D) float32 and coverage (B,) int64, B dynamic, and returns
            a dict of (B,) tensors keyed by the names of `OUTCOME_FIELDS`, or a tuple of them in
            that order. (A NamedTuple is saved by torch only if registered by a private function.)

    Raises:
        ProgramError: the file is missing, not a program, not such a program, or contains something
            that could run code; or torch is too old.
    """
    name = f"reward_model {os.fspath(path)!r}"
    if torch.__version__ < "2.10":
        raise ProgramError(
            f"{name}: programs need torch 2.10 or later; this is {torch.__version__}"
        )
    try:
        return ExportedModel(_checked_archive(path))
    except FileNotFoundError as error:
        raise ProgramError(
            f"{name}: there is no such file; expected a program saved by torch.export.save"
        ) from error
    except ProgramError as error:
        raise ProgramError(f"{name} {error}") from error
    except Exception as error:  # whatever torch raises at a file that is damaged
        raise ProgramError(
            f"{name} cannot be loaded: {type(error).__name__}: {first_line(error)}; "
            "expected a program saved by torch.export.save"
        ) from error


def _checked_archive(path: str | os.PathLike[str]) -> bytes:
    """Archive of one program of which nothing is evaluated, imported or unpickled.

    Raises:
        ProgramError: names what stands in the way, without the path.
    """
    with open(path, "rb") as file:
        content = file.read()
    try:
        check_zip(io.BytesIO(content), len(content))
    except ValueError as error:
        raise ProgramError(
            f"is not a program: {error}; expected a file saved by torch.export.save"
        ) from error
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    needed = ["archive_version", "byteorder", ".data/version", "models/model.json"]
    needed += [f"data/{folder}/model_{folder}_config.json" for folder in _NUMBERS]
    missing = [name for name in needed if name not in members]
    if members.get("archive_format") != b"pt2" or missing:
        raise ProgramError(
            "is not a program: a zip archive without "
            f"{missing[0] if missing else 'the format pt2'}; "
            "expected a file saved by torch.export.save"
        )
    for name in members:
        if name.startswith("data/aotinductor/"):
            raise ProgramError(f"contains compiled code ({name}); {_EXPORT_PLAIN}")
        if name in ("data/weights/model.pt", "data/constants/model.pt"):
            raise ProgramError(f"contains a pickle ({name}); {_EXPORT_PLAIN}")

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
                raise ProgramError(f"contains a pickle ({file}, of {key}); {_EXPORT_PLAIN}")
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
            raise ProgramError(
                f"only works for some batches, where {guard!r}; expected a program that takes "
                "any batch size"
            )
    program["guards_code"] = []
    program["verifiers"] = ["TRAINING"]  # the file may not choose who verifies it
    _check_strings(program)
    return json.dumps(program).encode()


def _check_strings(value: Any, key: str = "") -> None:
    """Compare every string with its pattern; put tensors on the CPU and drop metadata, in place."""
    if isinstance(value, str):
        if not _PATTERNS.get(key, _PLAIN).fullmatch(value):
            raise ProgramError(f"contains {key or 'the name'} {value[:80]!r}; {_EXPORT_PLAIN}")
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
            raise ProgramError(
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
        raise ProgramError(
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
    raise ProgramError(f"returns {got}; expected {_RETURNS}")


def _smallest_batch(exported: ExportedProgram) -> int:
    """Smallest batch that a program takes.

    Raises:
        ProgramError: an input, an outcome or the range of batch sizes is not what it must be.
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
            raise ProgramError(f"takes {got}; expected {_SIGNATURE}")
    sizes = [value.shape[0] for value in given]
    if any(isinstance(size, int) for size in sizes):
        raise ProgramError(f"has a static batch size: it takes {got}; {_DYNAMIC}")
    bounds = [exported.range_constraints.get(size.node.expr) for size in sizes]
    if None in bounds or any(bound.upper.is_Integer for bound in bounds):
        raise ProgramError(
            f"does not take any batch size: it takes {got}, {exported.range_constraints}; "
            f"{_DYNAMIC}"
        )
    spec = exported.call_spec.out_spec
    names = spec.context if spec.type is dict else Outcomes._fields
    outcomes = [nodes.get(name, name) for name in exported.graph_signature.user_outputs]
    batches = [f"({size},)" for size in sizes]
    for name, value in zip(names, outcomes, strict=True):
        if _describe(value).partition(" float")[0] not in batches:
            raise ProgramError(f"returns {name} {_describe(value)}; expected (B,) float32")
    # A network may drop a dimension of one, whatever it was exported for.
    return max(2, *(int(bound.lower) for bound in bounds))


def _describe(value: Any) -> str:
    """Shape and dtype of a tensor, `(s0, 3) float32`; the type of anything else."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    shape = f"({', '.join(map(str, value.shape))}{',' if value.ndim == 1 else ''})"
    return f"{shape} {str(value.dtype).removeprefix('torch.')}"
