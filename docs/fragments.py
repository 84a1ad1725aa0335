"""What the pages include: made from the code and from files that are written elsewhere.

    python docs/fragments.py           # done by conf.py at every build

Writes Markdown to `docs/_generated/` and a page per module to `docs/api/`; git ignores both. What a
page takes from the README, the data card, the changelog or a table of results is taken from there,
with the links turned to where the same is found in this documentation; tables of flags, constants,
polymers and columns are read from the code.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib
import inspect
import io
import os
import re
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from flag_pages import flag_tables, flags, preset_table, recipe
from markdown_text import (
    LINK,
    demoted,
    headings,
    sections,
    slug,
    table,
    without_code,
    without_title,
)
from module_pages import contents, exported_names, module_names, module_page, modules_in

import hydrogel_gym
from hydrogel_gym import designs
from hydrogel_gym.models import mechanistic
from hydrogel_gym.models.mechanistic import MechanisticParams
from hydrogel_gym.oracle.__main__ import main as oracle_main
from hydrogel_gym.problem.reward import RewardConfig
from hydrogel_gym.runs.metrics import METRICS

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
GENERATED = "_generated"

# Scripts whose flags are fields of a dataclass `Args`.
SCRIPTS = (
    "ppo_hybrid evaluate fit_stage1 generate_candidates refine_patients rank_designs report"
).split()

_INCLUDE = re.compile(r"^```\{include\} (\S+)$", re.MULTILINE)


class Place(NamedTuple):
    """Where a fragment is found: a page, and the anchor of the heading it is under."""

    page: str
    anchor: str


def pages() -> dict[str, str]:
    """Text of every page that is written by hand, by its name."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}


def places() -> dict[str, Place]:
    """Where each included fragment is found, by its path under `_generated`.

    Raises:
        ValueError: two pages include the same.
    """
    found: dict[str, Place] = {}
    for name, text in pages().items():
        titles = list(headings(text))
        for match in _INCLUDE.finditer(text):
            path = match[1].removeprefix(f"{GENERATED}/")
            if path in found:
                raise ValueError(f"{found[path].page} and {name} both include {match[1]}")
            above = [title for title in titles if title.start() < match.start()]
            found[path] = Place(name, slug(above[-1][2]) if len(above) > 1 else "")
    return found


def redirected(text: str, source: Path, where: dict[str, Place]) -> str:
    """Links of a file of the repository, turned to pages, or else to files beside `docs`.

    Args:
        text: all of the file, or part of it.
        source: path of the file within the repository.
        where: as `places` has it.

    Raises:
        ValueError: a link leads to no file, or to a section that no page includes.
    """
    readme = {f"readme/{key}.md" for key in sections((ROOT / "README.md").read_text())}
    pages_of_files = {
        "patients/README.md": "patients.md",
        "examples/README.md": "examples.md",
        "CHANGELOG.md": "changelog.md",
    } | {
        f"benchmark/results/{path.name}": f"results/{path.name}"
        for path in (ROOT / "benchmark/results").glob("*.md")
    }

    def page(fragment: str, target: str) -> str:
        if fragment not in where:
            raise ValueError(f"{source} links to {target}, which no page includes ({fragment})")
        name, anchor = where[fragment]
        return f"{name}#{anchor}" if anchor else name

    def turned(match: re.Match[str]) -> str:
        bang, label, target = match.groups()
        if re.match(r"\w+:", target):
            return match[0]
        path, _, anchor = target.partition("#")
        to = Path(os.path.normpath(source.parent / path)) if path else source
        if to == Path("README.md") and f"readme/{anchor}.md" in readme:
            return f"{bang}[{label}]({page(f'readme/{anchor}.md', target)})"
        if to.as_posix() in pages_of_files and not bang:
            return f"{bang}[{label}]({page(pages_of_files[to.as_posix()], target)})"
        if to.parent == Path("docs"):
            return f"{bang}[{label}]({to.name})"
        if not (ROOT / to).exists():
            raise ValueError(f"{source} links to {target}, which does not exist")
        if (ROOT / to).is_dir():  # nothing that a page could offer
            return label
        return f"{bang}[{label}](../{to.as_posix()})"

    hidden = without_code(text)
    return LINK.sub(lambda m: m[0] if hidden[m.start(3) - 1] == " " else turned(m), text)


class Constant(NamedTuple):
    """A field of `MechanisticParams` and the remark at the end of its line."""

    name: str
    remark: str


class Group(NamedTuple):
    """Constants between two blank lines, and the comment above them."""

    comment: str
    constants: list[Constant]


def constants(kind: type = MechanisticParams) -> list[Group]:
    """The fields of a dataclass with the comments in its source, which hold for groups of them."""
    groups, comment, found, listed = [], [], [], False
    for line in [*inspect.getsource(kind).splitlines(), ""]:
        code, _, remark = line.partition("#")
        if match := re.match(r"    (\w+): (?:float|int) = ", code):
            listed = True
            found.append(Constant(match[1], remark.strip()))
        elif listed and not line.strip() or code.strip():
            if found:
                groups.append(Group(" ".join(comment), found))
            comment, found = [], []
            if code.strip() and listed:
                break
        elif remark and found:  # a comment within a group begins another
            groups.append(Group(" ".join(comment), found))
            comment, found = [remark.strip()], []
        elif remark:
            comment.append(remark.strip())
    return groups


def number(value: float) -> str:
    """A constant as it is read: no more digits than it has."""
    return f"{value:.12g}"


def in_equation(value: float) -> str:
    """A constant as an equation has it."""
    mantissa, _, exponent = number(value).partition("e")
    if not exponent:
        return mantissa
    power = f"10^{{{int(exponent)}}}"
    return power if mantissa == "1" else rf"{mantissa} \cdot {power}"


# Longest first: the ends of names that are units.
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


def unit(name: str) -> str:
    """The unit that a name ends in."""
    return next((text for end, text in UNITS.items() if name.endswith(end)), "")


def constant_tables() -> str:
    """Every constant of the built-in model, with grade and evidence, group by group."""
    given = {field.name: field for field in dataclasses.fields(MechanisticParams)}
    parts = []
    for group in constants():
        rows = [
            (
                f"`{name}`",
                number(given[name].default),
                unit(name),
                given[name].metadata["grade"],
                remark,
            )
            for name, remark in group.constants
        ]
        parts.append(
            f"{group.comment}\n\n" + table(("constant", "value", "unit", "grade", "remark"), rows)
        )
    return "\n".join(parts)


def references(module: ModuleType) -> str:
    """The keyed list under `References:` of a module's docstring."""
    text = inspect.cleandoc(module.__doc__).partition("References:\n")[2]
    entries = re.split(r"\n(?=    \[)", text.rstrip())
    return "".join(f"- {' '.join(entry.split())}\n" for entry in entries)


def polymer_tables() -> str:
    """Windows and indices of every polymer, then the evidence, from the packaged table."""
    with (files("hydrogel_gym") / "polymers.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    windows = [
        (
            row["polymer_id"],
            f"`{row['name']}`",
            row["category"].replace("_", " "),
            *(
                f"{row[f'{low}_min_{u}']} to {row[f'{low}_max_{u}']}"
                for low, u in (
                    ("youngs_modulus", "kpa"),
                    ("half_life", "days"),
                    ("conductivity", "s_per_m"),
                )
            ),
            row["bioactivity"],
            row["base_toxicity"],
            row["filler_toxicity"],
            row["filler_mid_dose_s_per_m"],
            row["foreign_body_tendency"],
            row["cohesion"],
        )
        for row in rows
    ]
    header = (
        "id,polymer,category,stiffness kPa,half-life days,conductivity S/m,$b$,$a_0$,$m$,"
        r"$\kappa_{50}$,$\varphi$,$\chi$"
    )
    evidence = [(f"`{row['name']}`", row["source"], row["confidence"]) for row in rows]
    return (
        table(tuple(header.split(",")), windows)
        + "\n"
        + table(("polymer", "evidence", "grades"), evidence)
    )


def reward_config() -> str:
    """Weights, limits and thresholds of the reward."""
    config, comment = RewardConfig(), ""
    rows = []
    for group in constants(RewardConfig):
        for name, remark in group.constants:
            comment = remark or (group.comment if name.startswith("optimal_delta") else "")
            rows.append((f"`{name}`", number(getattr(config, name)), comment))
    return table(("field of `RewardConfig`", "default", ""), rows)


def number_columns() -> str:
    """Columns of the files of designs, with the steps of the grid that designs lie on."""
    steps = dict(zip(designs.FORMULATION_COLUMNS, designs.RESOLUTION, strict=True))
    rows = [(f"`{name}`", number(steps[name]) if name in steps else "") for name in designs.NUMBERS]
    return table(("column", "step of the grid"), rows)


def help_text(main: Callable[[list[str]], int], program: str) -> str:
    """What a command says of itself, whatever the terminal."""
    printed, before = io.StringIO(), (sys.argv[0], os.environ.get("COLUMNS"))
    sys.argv[0], os.environ["COLUMNS"] = program, "88"
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main(["--help"])
    finally:
        sys.argv[0] = before[0]
        if before[1] is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before[1]
    return printed.getvalue()


def fragments() -> dict[str, str]:
    """Everything that pages include, by its path under `_generated`."""
    where, result = places(), {}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for key, text in sections(readme).items():
        result[f"readme/{key}.md"] = redirected(text, Path("README.md"), where)
    whole = {
        "patients.md": Path("patients/README.md"),
        "examples.md": Path("examples/README.md"),
        "changelog.md": Path("CHANGELOG.md"),
    }
    for name, source in whole.items():
        if (ROOT / source).exists():
            text = without_title((ROOT / source).read_text(encoding="utf-8"))
            result[name] = redirected(text, source, where)
    for path in (ROOT / "benchmark" / "results").glob("*.md"):
        text = redirected(path.read_text(encoding="utf-8"), path.relative_to(ROOT), where)
        result[f"results/{path.name}"] = demoted(text, 1)

    result["environment.md"] = inspect.cleandoc(hydrogel_gym.HydrogelEnv.__doc__) + "\n"
    result["reward_config.md"] = reward_config()
    result["constants.md"] = constant_tables()
    result["references.md"] = references(mechanistic)
    result["polymers.md"] = polymer_tables()
    result["numbers.md"] = number_columns()
    result["public_names.md"] = exported_names(hydrogel_gym)
    result["modules.md"] = contents(modules_in(""), "api/")
    for script in SCRIPTS:
        result[f"flags/{script}.md"] = flag_tables(flags(recipe(script).Args))
    trainer = recipe("ppo_hybrid")
    given = trainer.PRESETS["source"]  # the preset that is the default
    result["flags/ppo_hybrid.md"] = flag_tables(
        [flag._replace(default=given.get(flag.name, flag.default)) for flag in flags(trainer.Args)]
    )
    result["presets.md"] = preset_table(trainer)
    result["metrics.md"] = table(
        ("column of `metrics.csv`", "in W&B and TensorBoard", "meaning"),
        [(f"`{m.name}`", f"`{m.key}`", m.meaning) for m in METRICS],
    )
    ranked = designs.schema.columns_of(designs.schema.RANKED_SCHEMA).values()
    result["columns.md"] = table(
        ("column", "meaning"), [(f"`{column.name}`", column.description) for column in ranked]
    )
    result["help/oracle.txt"] = help_text(oracle_main, "hydrogel_gym.oracle")
    outcomes = importlib.import_module("hydrogel_gym.patients.make_outcomes")
    result["help/make_outcomes.txt"] = help_text(outcomes.main, "make_outcomes.py")
    return result


def write(folder: Path = DOCS) -> None:
    """Write what has changed; pages of modules that are gone are removed."""
    content = {f"{GENERATED}/{path}": text for path, text in fragments().items()}
    content |= {f"api/{name}.md": module_page(name) for name in module_names()}
    for path, text in content.items():
        path = folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    for path in [*(folder / "api").glob("*.md"), *(folder / GENERATED).rglob("*.*")]:
        if path.relative_to(folder).as_posix() not in content:
            path.unlink()


if __name__ == "__main__":
    write()
