"""Tables of the pages, made from the code: where a page has `{{ metrics }}`, `METRICS` is shown.

`conf.py` gives `substitutions()` to MyST. What is new in the code is on the pages of the next
build, and a name that is not in it is an error of the build. All texts are Markdown.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from string import Template
from typing import Any
from unittest import mock

from tyro._docstrings import get_field_docstring  # what tyro itself prints with --help

import hydrogel_gym
from hydrogel_gym import designs
from hydrogel_gym.models.mechanistic import REFERENCES, MechanisticParams
from hydrogel_gym.oracle.__main__ import main as oracle
from hydrogel_gym.problem.fields import FORMULATION_FIELDS
from hydrogel_gym.problem.response import RESPONSE_FIELDS
from hydrogel_gym.problem.reward import RewardConfig
from hydrogel_gym.runs.metrics import METRICS

# Scripts whose flags are the fields of a dataclass `Args`.
SCRIPTS = (
    "ppo_hybrid",
    "evaluate",
    "fit_stage1",
    "generate_candidates",
    "refine_patients",
    "rank_designs",
    "report",
)
# What the ends of names say of units, longest first.
UNITS = {
    "_days_per_scar_pct": "days per % of scar",
    "_per_s_per_m": "per S/m",
    "_s_per_m": "S/m",
    "_kpa": "kPa",
    "_days": "days",
    "_pct": "%",
    "_pp": "points of LVEF",
    "_mm": "mm",
    "_ln": "natural log",
}


class Equations(Template):
    """Text in which `@{name}` stands for a constant of the built-in model."""

    delimiter = "@"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in x)} |\n" for x in lines)


def in_equations(text: str) -> str:
    """The text of a page with the constants of the built-in model in its equations.

    Raises:
        KeyError: there is no such constant.
    """
    values = {}
    for name, number in dataclasses.asdict(MechanisticParams()).items():
        mantissa, _, exponent = f"{number:.12g}".partition("e")
        values[name] = rf"{mantissa} \cdot 10^{{{int(exponent)}}}" if exponent else mantissa
    return Equations(text).substitute(values)


def constants() -> str:
    """Every constant of the built-in model with the evidence for it, in groups."""
    groups: list[tuple[str, list[tuple[str, ...]]]] = []
    for field in dataclasses.fields(MechanisticParams):
        known = field.metadata
        if known["heading"]:
            groups.append((known["heading"], []))
        unit = next((text for end, text in UNITS.items() if field.name.endswith(end)), "")
        row = (f"`{field.name}`", f"{field.default:.12g}", unit, known["grade"], known["remark"])
        groups[-1][1].append(row)
    header = ("constant", "value", "unit", "grade", "remark")
    return "\n".join(f"{heading}\n\n{table(header, rows)}" for heading, rows in groups)


def polymers() -> str:
    """Windows and indices of every polymer."""
    every = hydrogel_gym.load_polymers()
    windows = (every.youngs_modulus_kpa, every.half_life_days, every.conductivity_s_per_m)
    rows = []
    for i, name in enumerate(every.names):
        has_filler = every.filler_toxicity[i] > 0
        indices = [
            *(every.bioactivity[i], every.base_toxicity[i], every.filler_toxicity[i]),
            every.filler_mid_dose_s_per_m[i] if has_filler else None,
            *(every.foreign_body_tendency[i], every.cohesion[i]),
        ]
        row = [str(i), f"`{name}`", every.categories[i].replace("_", " ")]
        row += [f"{window[i, 0]:g} to {window[i, 1]:g}" for window in windows]
        rows.append(row + ["" if x is None else f"{x:g}" for x in indices])
    header = ["id", "polymer", "category", "stiffness, kPa", "half-life, days", "conductivity, S/m"]
    symbols = ("b", "a_0", "m", r"\kappa_{50}", r"\varphi", r"\chi")
    return table(header + [f"${symbol}$" for symbol in symbols], rows)


def polymer_evidence() -> str:
    """What is known of every polymer, and its grades."""
    every = hydrogel_gym.load_polymers()
    names = [f"`{name}`" for name in every.names]
    rows = zip(names, every.sources, every.confidences, strict=True)
    return table(("polymer", "evidence", "grades"), rows)


def value(thing: Any) -> str:
    """A default as it is typed."""
    if thing is dataclasses.MISSING:
        return "required"
    return "" if thing is None or thing == () else f"`{thing}`"


def flag(field: dataclasses.Field[Any], default: Any) -> str:
    """A flag as it is typed."""
    word = field.name.replace("_", "-")
    if field.default is dataclasses.MISSING:
        return f"`{word.upper()}`"
    return f"`--no-{word}`" if default is True else f"`--{word}`"


def flags(script: str, given: Mapping[str, Any] | None = None) -> str:
    """The flags of a script, those of each dataclass that its `Args` inherits in their own table.

    Args:
        script: name of a file of `train/`.
        given: defaults that differ from the class's.
    """
    kind = importlib.import_module(f"hydrogel_gym.train.{script}").Args
    parts = []
    for base in reversed(kind.__mro__[:-1]):
        rows = []
        for field in dataclasses.fields(base):
            if field.name in base.__annotations__:
                default = (given or {}).get(field.name, field.default)
                meaning = " ".join((get_field_docstring(kind, field.name, ()) or "").split())
                if default is True:
                    meaning = f"do not: {meaning}"
                shown = "" if isinstance(default, bool) else value(default)
                rows.append((flag(field, default), shown, meaning))
        parts.append(f"{inspect.getdoc(base)}\n\n{table(('flag', 'default', 'meaning'), rows)}")
    return "\n".join(parts)


def presets() -> str:
    """What the presets of the trainer set."""
    trainer = importlib.import_module("hydrogel_gym.train.ppo_hybrid")
    every = {name: trainer.Args(preset=name, **given) for name, given in trainer.PRESETS.items()}
    names = dict.fromkeys(name for given in trainer.PRESETS.values() for name in given)
    rows = [
        [f"`--{name.replace('_', '-')}`", *(value(getattr(args, name)) for args in every.values())]
        for name in names
    ]
    return table(("flag", *every), rows)


def exports() -> dict[str, str]:
    """What modules pass on from others, by their names, each a list in reStructuredText."""
    lists = {}
    every = pkgutil.walk_packages(hydrogel_gym.__path__, "hydrogel_gym.")
    for name in ("hydrogel_gym", *(item.name for item in every if "__main__" not in item.name)):
        module, lists[name] = importlib.import_module(name), ""
        for item in getattr(module, "__all__", ()):
            thing = getattr(module, item)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                first = (inspect.getdoc(thing) or "").splitlines()[0]
                lists[name] += f"* :py:obj:`{item} <{thing.__module__}.{item}>`: {first}\n"
            else:
                lists[name] += f"* ``{item}``\n"
    return lists


def help_text(main: Callable[[list[str]], int], program: str) -> str:
    """What a command prints with --help."""
    printed = io.StringIO()
    with (
        mock.patch.dict("os.environ", COLUMNS="88"),
        mock.patch("sys.argv", [program]),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main(["--help"])
    return f"```text\n{printed.getvalue()}```\n"


def substitutions() -> dict[str, str]:
    """Every text that pages name, by its name."""
    trainer = importlib.import_module("hydrogel_gym.train.ppo_hybrid")
    outcomes = importlib.import_module("hydrogel_gym.patients.make_outcomes")
    ranked = designs.schema.columns_of(designs.schema.RANKED_SCHEMA).values()
    steps = {field.stage2_name: f"{field.resolution:g}" for field in FORMULATION_FIELDS}
    texts = {f"flags_{name}": flags(name) for name in SCRIPTS}
    texts["flags_ppo_hybrid"] = flags("ppo_hybrid", trainer.PRESETS["source"])  # the default
    return texts | {
        "manual": inspect.cleandoc(hydrogel_gym.HydrogelEnv.__doc__ or ""),
        "manual_adaptive": inspect.cleandoc(hydrogel_gym.HydrogelAdaptEnv.__doc__ or ""),
        "response": table(
            ("factor", "lowest", "highest", "grade", "reason"),
            [
                (f"`{x.name}`", f"{x.low:g}", f"{x.high:g}", x.grade, x.remark)
                for x in RESPONSE_FIELDS
            ],
        ),
        "constants": constants(),
        "polymers": polymers(),
        "polymer_evidence": polymer_evidence(),
        "presets": presets(),
        "help_oracle": help_text(oracle, "hydrogel_gym.oracle"),
        "help_make_outcomes": help_text(outcomes.main, "make_outcomes.py"),
        "references": "".join(f"- [{key}] {text}\n" for key, text in REFERENCES.items()),
        "reward_config": table(
            ("field of `RewardConfig`", "default", "meaning"),
            [
                (f"`{field.name}`", f"{field.default:g}", field.metadata["meaning"])
                for field in dataclasses.fields(RewardConfig)
            ],
        ),
        "metrics": table(
            ("column of `metrics.csv`", "in W&B and TensorBoard", "meaning"),
            [(f"`{item.name}`", f"`{item.key}`", item.meaning) for item in METRICS],
        ),
        "numbers": table(
            ("column", "step of the grid"),
            [(f"`{name}`", steps.get(name, "")) for name in designs.NUMBERS],
        ),
        "ranked_columns": table(
            ("column", "meaning"), [(f"`{item.name}`", item.description) for item in ranked]
        ),
    }
