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
from importlib.resources import files
from pathlib import Path

import gymnasium as gym
import pytest
from gymnasium.envs.registration import load_env_creator

import hydrogel_gym
from hydrogel_gym.oracle.cache import sources

CHECKOUT = Path(__file__).parents[1]
# Top-level folders that are installed as packages.
FOLDERS = {
    "hydrogel_gym": CHECKOUT / "hydrogel_gym",
    "hydrogel_gym.patients": CHECKOUT / "patients",
    "hydrogel_gym.train": CHECKOUT / "train",
}
LEAVES = ("archives", "compiled", "errors", "files", "memory", "output")
# Names that users and saved specs import; what they stand for lives in the rooms.
SHIMS = ("__init__", "__main__", "env", "spaces", "wrappers", "sb3")
# Each room with those it may import, itself included; imports go one way.
MAY_IMPORT = {
    name: {name, *others.split()}
    for name, others in {
        "leaves": "",
        "problem": "leaves",
        "models": "leaves problem",
        "envs": "leaves problem models",
        "oracle": "leaves problem models envs",
        "designs": "leaves problem models envs",
        "runs": "leaves problem models envs oracle designs",
        "report": "leaves problem models envs oracle designs runs",
        "shims": "leaves problem models envs",
        # Scripts, which use the package as anybody does.
        "patients": "leaves problem models envs shims",
        "train": "leaves problem models envs oracle designs runs report shims",
    }.items()
}
# What is slow to import, and what only some of its users have installed.
HEAVY = {"PIL", "matplotlib", "pandas", "plotly", "wandb"}


def module_files() -> dict[str, Path]:
    """Every module of the packages by its dotted name; a package stands for its `__init__`."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = module_files()


def room(module: str) -> str | None:
    """The room that a module is in, or none where there is no such room."""
    first, *below = module.removeprefix("hydrogel_gym").removeprefix(".").split(".")
    if not below and first in LEAVES:
        return "leaves"
    if not below and first in ("", *SHIMS):
        return "shims"
    return first if first in MAY_IMPORT and first not in ("leaves", "shims") else None


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted name of everything imported: `a.b` of `import a.b` and of `from a import b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def third_party(names: Iterator[str]) -> set[str]:
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


def module_of(name: str, importer: str) -> str | None:
    """The module of the packages that an imported name is in, if it is in one."""
    beside = f"{importer.rpartition('.')[0]}.{name.partition('.')[0]}"
    if beside in MODULES and room(importer) in ("train", "patients"):
        return beside  # as a script imports the one that lies beside it
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def used_by(module: str, tree: ast.AST | None = None) -> set[str]:
    """Modules of the packages that one imports, or that a part of it does."""
    names = imports(tree or parse(MODULES[module]))
    return {used for name in names if (used := module_of(name, module))}


def reached_from(module: str, part: Callable[[Path], ast.Module]) -> set[str]:
    """A module and all of the packages that it imports, directly or not, in that part of a file."""
    reached, waiting = set(), [module]
    while waiting:
        if (name := waiting.pop()) not in reached:
            reached.add(name)
            waiting += used_by(name, part(MODULES[name]))
    return reached


@cache
def at_import(path: Path) -> ast.Module:
    """What runs at an import: no bodies of functions, nothing for type checkers alone."""

    class Trimmed(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Trimmed().visit(parse.__wrapped__(path))  # in place


# Rooms


def test_every_module_imports_only_from_known_rooms_before_its_own():
    assert [module for module in MODULES if room(module) is None] == []
    assert room("hydrogel_gym.utils") is None
    against = {m: [u for u in used_by(m) if room(u) not in MAY_IMPORT[room(m)]] for m in MODULES}
    assert {module: used for module, used in against.items() if used} == {}
    (used,) = used_by("hydrogel_gym.oracle.search", ast.parse("import hydrogel_gym.runs"))
    assert room(used) not in MAY_IMPORT["oracle"]


def test_modules_import_each_other_in_no_circle():
    graphlib.TopologicalSorter({module: used_by(module) for module in MODULES}).prepare()


def test_library_imports_no_script():
    scripts = {"train", "patients"}
    scripts |= {path.stem for name in scripts for path in (CHECKOUT / name).glob("*.py")}
    for module, path in MODULES.items():
        if room(module) not in ("train", "patients"):
            used = {name.partition(".")[0] for name in imports(parse(path))} & scripts
            assert (module, used) == (module, set())


# Other libraries


def test_gymnasium_is_imported_only_by_what_adapts_to_it_and_nothing_but_torch_by_the_dynamics():
    for module, path in MODULES.items():
        used = {name for name in imports(parse(path)) if name.startswith("gymnasium")}
        if room(module) in ("leaves", "problem", "models", "oracle", "designs", "report"):
            assert (module, used) == (module, set())
        elif module == "hydrogel_gym.envs.spaces":
            assert used == {"gymnasium.spaces"}
    for name in ("dynamics", "reward"):
        used = third_party(imports(parse(MODULES[f"hydrogel_gym.problem.{name}"])))
        assert used == {"hydrogel_gym", "torch"}


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
    heavy = {name: third_party(imports(at_import(MODULES[name]))) & libraries for name in reached}
    assert {name: used for name, used in heavy.items() if used} == {}


# The oracle's cache


def test_cache_of_the_oracle_depends_on_all_the_code_that_it_searches_with():
    package = Path(str(files("hydrogel_gym")))
    keyed = {Path(str(source)).relative_to(package).as_posix() for source in sources()}
    needed = {MODULES[module] for module in reached_from("hydrogel_gym.oracle.search", parse)}
    needed |= set((CHECKOUT / "hydrogel_gym" / "problem").glob("*.py"))
    assert {p.relative_to(CHECKOUT / "hydrogel_gym").as_posix() for p in needed} - keyed == set()


# What is installed


@pytest.fixture(scope="module")
def config() -> ConfigParser:
    parser = ConfigParser()
    parser.read(CHECKOUT / "setup.cfg", encoding="utf-8")
    return parser


def packages() -> dict[str, Path]:
    """Every package in the checkout with its folder."""
    return {name: path.parent for name, path in MODULES.items() if path.name == "__init__.py"}


def test_every_package_is_installed_from_its_folder(config):
    folders = {path.parent for path in FOLDERS["hydrogel_gym"].rglob("*.py")}
    assert folders - set(packages().values()) == set()
    options = config["options"]
    assert set(options["packages"].split()) == set(packages())
    places = dict(line.split(" = ") for line in options["package_dir"].strip().splitlines())
    for name, folder in packages().items():
        around = max((known for known in places if f"{name}.".startswith(f"{known}.")), key=len)
        below = name.removeprefix(around).strip(".").replace(".", "/")
        assert CHECKOUT / places[around] / below == folder


def test_every_data_file_of_a_package_is_installed(config):
    folders = {folder: name for name, folder in packages().items()}
    left_out = []
    for folder in {FOLDERS[name] for name in FOLDERS if name in packages()}:
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


def test_installed_package_has_its_version_and_carries_its_data():
    assert hydrogel_gym.__version__ == version("hydrogel_gym")
    for name, start in {"polymers.csv": "polymer_id,", "py.typed": ""}.items():
        assert (files("hydrogel_gym") / name).read_text(encoding="utf-8").startswith(start)
    for name in ("cohort.csv", "cohort_holdout.csv"):
        text = (files("hydrogel_gym.patients") / name).read_text(encoding="utf-8")
        assert text.startswith("patient_id,")


# Public names


@pytest.mark.parametrize(
    ("module", "names"),
    {
        "hydrogel_gym": (
            "Cohort CohortError HydrogelEnv HydrogelVectorEnv Outcomes PolymerTable RewardConfig "
            "RewardModel RewardModelError compute_reward load_cohort load_polymers "
            "load_reward_model"
        ),
        "hydrogel_gym.env": "HydrogelEnv HydrogelVectorEnv",
        "hydrogel_gym.spaces": (
            "COVERAGES COVERAGE_FRACTIONS Design FLAT_ACTION_DIM FORMULATION_FIELDS "
            "FORMULATION_HIGH FORMULATION_LEVELS FORMULATION_LOW Field NUM_POLYMERS OUTCOME_FIELDS "
            "Outcomes PATIENT_FIELDS action_space decode_box decode_multidiscrete encode_box "
            "encode_multidiscrete from_unit_range observation_space split_observation to_unit_range"
        ),
        "hydrogel_gym.oracle": "BestDesigns best_designs cached_best_designs",
        "hydrogel_gym.wrappers": (
            "DiscretizeHybridAction FlattenHybridAction RescaleFormulation "
            "VectorDiscretizeHybridAction VectorFlattenHybridAction VectorRescaleFormulation"
        ),
        "hydrogel_gym.sb3": "BatchedVecEnv",
        "hydrogel_gym.memory": "keep_freed_memory",
        "hydrogel_gym.designs": (
            "FORMULATION_COLUMNS NUMBERS NUM_CELLS NUM_LEVELS RESOLUTION SCHEMA TopDesigns "
            "design_keys load_designs numbers_of on_grid partition"
        ),
    }.items(),
)
def test_module_for_users_exports_its_names(module, names):
    if module == "hydrogel_gym.sb3":
        pytest.importorskip("stable_baselines3")
    exporting = importlib.import_module(module)
    exported = [names] if module == "hydrogel_gym.memory" else exporting.__all__
    assert sorted(exported) == sorted(names.split())
    assert [name for name in names.split() if not hasattr(exporting, name)] == []


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
