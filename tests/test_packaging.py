"""Who may import whom, read from the checkout's source, and what the installed package carries."""

from __future__ import annotations

import ast
import graphlib
import importlib
import sys
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import gymnasium as gym
import pytest
from gymnasium.envs.registration import load_env_creator

import hydrogel_gym
from hydrogel_gym.memory import keep_freed_memory
from hydrogel_gym.oracle.cache import SOURCES

CHECKOUT = Path(__file__).parents[1]
# Top-level folders that are installed as packages.
FOLDERS = {"hydrogel_gym": CHECKOUT / "hydrogel_gym"}
FOLDERS |= {f"hydrogel_gym.{name}": CHECKOUT / name for name in ("patients", "train")}
LEAVES = ("archives", "compiled", "errors", "files", "memory", "output")
# Names that users and saved specs import; what they stand for lives in the rooms.
SHIMS = ("__init__", "__main__", "env", "spaces", "wrappers", "sb3")
SCRIPTS = ("patients", "train")  # which use the package as anybody does
# Each room with those it may import beside itself; imports go one way.
MAY_IMPORT = {
    "leaves": "",
    "problem": "leaves",
    "models": "leaves problem",
    "envs": "leaves problem models",
    "oracle": "leaves problem models envs",
    "designs": "leaves problem models envs",
    "runs": "leaves problem models envs oracle designs",
    "report": "leaves problem models envs oracle designs runs",
    "shims": "leaves problem models envs",
    "patients": "leaves problem models envs oracle shims",
    "train": "leaves problem models envs oracle designs runs report shims",
}
# What is slow to import, and what only some of its users have installed.
HEAVY = {"PIL", "matplotlib", "pandas", "plotly", "wandb"}
# Every module of the packages by its dotted name; a package stands for its `__init__`.
MODULES = {
    ".".join([name, *path.relative_to(top).with_suffix("").parts]).removesuffix(".__init__"): path
    for name, top in FOLDERS.items()
    for path in sorted(top.rglob("*.py"))
}


def room(module: str) -> str | None:
    """The room that a module is in, or none where there is no such room."""
    first, *below = module.removeprefix("hydrogel_gym").removeprefix(".").split(".")
    if not below and first in LEAVES:
        return "leaves"
    if not below and first in ("", *SHIMS):
        return "shims"
    return first if first in MAY_IMPORT and first not in ("leaves", "shims") else None


def may_import(module: str, used: str) -> bool:
    own = room(module)
    return room(used) == own or room(used) in MAY_IMPORT[own].split()


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def at_import(path: Path) -> ast.Module:
    """What runs at an import: no bodies of functions, nothing for type checkers alone."""

    class Trimmed(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Trimmed().visit(parse.__wrapped__(path))  # in place


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted name of everything imported: `a.b` of `import a.b` and of `from a import b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def third_party(tree: ast.AST) -> set[str]:
    return {name.partition(".")[0] for name in imports(tree)} - sys.stdlib_module_names


def used_by(module: str, tree: ast.AST) -> set[str]:
    """Modules of the packages that one imports in a part of it."""
    used = set()
    for name in imports(tree):
        beside = f"{module.rpartition('.')[0]}.{name.partition('.')[0]}"
        if beside in MODULES and room(module) in SCRIPTS:
            name = beside  # as a script imports the one that lies beside it
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        used.add(name)
    return used - {""}


def reached_from(module: str, part: Callable[[Path], ast.Module]) -> set[str]:
    """A module and all of the packages that it imports, directly or not, in that part of a file."""
    reached, waiting = set(), [module]
    while waiting:
        if (name := waiting.pop()) not in reached:
            reached.add(name)
            waiting += used_by(name, part(MODULES[name]))
    return reached


def test_every_module_imports_only_from_known_rooms_before_its_own_and_in_no_circle():
    assert [module for module in MODULES if room(module) is None] == []
    assert room("hydrogel_gym.utils") is None
    used = {module: used_by(module, parse(path)) for module, path in MODULES.items()}
    assert [(m, u) for m in used for u in used[m] if not may_import(m, u)] == []
    graphlib.TopologicalSorter(used).prepare()
    (used,) = used_by("hydrogel_gym.oracle.search", ast.parse("import hydrogel_gym.runs"))
    assert not may_import("hydrogel_gym.oracle.search", used)


def test_library_imports_no_script_gymnasium_only_to_adapt_to_it_and_torch_alone_for_dynamics():
    scripts = {*SCRIPTS, *(path.stem for name in SCRIPTS for path in (CHECKOUT / name).glob("*"))}
    for module, path in MODULES.items():
        others = third_party(parse(path))
        if room(module) not in SCRIPTS:
            assert (module, others & scripts) == (module, set())
        if room(module) in ("leaves", "problem", "models", "oracle", "designs", "report"):
            assert (module, others & {"gymnasium"}) == (module, set())
        if module in ("hydrogel_gym.problem.dynamics", "hydrogel_gym.problem.reward"):
            assert others == {"hydrogel_gym", "torch"}


@pytest.mark.parametrize(
    ("module", "rooms", "libraries"),
    [
        ("hydrogel_gym.train.ppo_hybrid", set(), HEAVY),
        ("hydrogel_gym", {"runs", "report", "train", "patients"}, HEAVY - {"pandas"} | {"tyro"}),
    ],
)
def test_import_loads_neither_heavy_libraries_nor_rooms_that_it_does_without(
    module, rooms, libraries
):
    reached = reached_from(module, at_import)
    assert "hydrogel_gym.envs.vector" in reached
    assert {name for name in reached if room(name) in rooms} == set()
    heavy = {name: third_party(at_import(MODULES[name])) & libraries for name in reached}
    assert {name: used for name, used in heavy.items() if used} == {}


def test_cache_of_the_oracle_depends_on_all_the_code_that_it_searches_with():
    needed = {MODULES["hydrogel_gym.oracle.best"]}
    for module in ("oracle.search", "models.mechanistic"):
        needed |= {MODULES[name] for name in reached_from(f"hydrogel_gym.{module}", parse)}
    names = {path.relative_to(CHECKOUT / "hydrogel_gym").as_posix() for path in needed}
    assert names | {"polymers.csv"} == set(SOURCES)


def test_every_package_and_data_file_is_installed_from_its_folder():
    config = ConfigParser()
    config.read(CHECKOUT / "setup.cfg", encoding="utf-8")
    folders = {p.parent: name for name, p in MODULES.items() if p.name == "__init__.py"}
    assert {path.parent for path in FOLDERS["hydrogel_gym"].rglob("*.py")} <= set(folders)
    assert set(config["options"]["packages"].split()) == set(folders.values())
    places = config["options"]["package_dir"].strip().splitlines()
    places = dict(line.split(" = ") for line in places)
    assert {name: CHECKOUT / place for name, place in places.items()} == FOLDERS
    left_out = []
    for folder in FOLDERS.values():
        for path in folder.rglob("*"):
            # Of the recipes' folder a launcher's files are used from the checkout alone.
            wanted = path.suffix == ".html" if folder.name == "train" else path.suffix != ".py"
            if path.is_dir() or "__pycache__" in path.parts or not wanted:
                continue
            owner = next(parent for parent in path.parents if parent in folders)
            patterns = config["options.package_data"].get(folders[owner], "").split()
            name = path.relative_to(owner).as_posix()
            if not any(fnmatch(name, pattern) for pattern in patterns):
                left_out.append(path.relative_to(CHECKOUT).as_posix())
    assert left_out == []
    assert hydrogel_gym.__version__ == version("hydrogel_gym")


def test_modules_for_users_export_their_names():
    for module, names in {
        "": "Cohort CohortError HydrogelAdaptEnv HydrogelAdaptVectorEnv HydrogelEnv "
        "HydrogelVectorEnv Outcomes PolymerTable RewardConfig RewardModel RewardModelError "
        "compute_reward load_cohort load_polymers load_reward_model",
        ".env": "HydrogelAdaptEnv HydrogelAdaptVectorEnv HydrogelEnv HydrogelVectorEnv",
        ".spaces": "COVERAGES COVERAGE_FRACTIONS Design FLAT_ACTION_DIM FORMULATION_FIELDS "
        "FORMULATION_HIGH FORMULATION_LEVELS FORMULATION_LOW Field NUM_POLYMERS OUTCOME_FIELDS "
        "Outcomes PATIENT_FIELDS action_space decode_box decode_multidiscrete encode_box "
        "encode_multidiscrete from_unit_range observation_space split_observation to_unit_range",
        ".oracle": "BestDesigns best_designs cached_best_designs",
        ".wrappers": "DiscretizeHybridAction FlattenHybridAction RescaleFormulation "
        "VectorDiscretizeHybridAction VectorFlattenHybridAction VectorRescaleFormulation",
        ".designs": "FORMULATION_COLUMNS NUMBERS NUM_CELLS NUM_LEVELS RESOLUTION SCHEMA TopDesigns "
        "design_keys load_designs numbers_of on_grid partition",
        ".sb3": "BatchedVecEnv",
    }.items():
        if module != ".sb3" or find_spec("stable_baselines3"):
            exporting = importlib.import_module(f"hydrogel_gym{module}")
            assert sorted(exporting.__all__) == sorted(names.split())
            assert [name for name in names.split() if not hasattr(exporting, name)] == []
    assert callable(keep_freed_memory)


def test_ids_are_registered_by_strings_so_that_their_specs_can_be_written():
    for name, kwargs in {
        "HydrogelDesign-v0": {},
        "HydrogelDesignFlat-v0": {"action_format": "box"},
        "HydrogelDesignDiscrete-v0": {"action_format": "multidiscrete"},
    }.items():
        spec = gym.spec(name)
        assert spec.entry_point == "hydrogel_gym.env:HydrogelEnv"
        assert spec.vector_entry_point == "hydrogel_gym.env:HydrogelVectorEnv"
        assert spec.kwargs == kwargs
    assert load_env_creator(spec.entry_point) is hydrogel_gym.HydrogelEnv
    assert load_env_creator(spec.vector_entry_point) is hydrogel_gym.HydrogelVectorEnv
