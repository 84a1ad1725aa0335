"""Who may import whom, read from the checkout's source, and what the installed package carries."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import gymnasium as gym
import pytest

import hydrogel_gym

CHECKOUT = Path(__file__).parents[1]
MODULES = {path.stem: path for path in sorted((CHECKOUT / "hydrogel_gym").glob("*.py"))}
LEAVES = {"spaces", "polymers", "cohort"}
MAY_IMPORT = {
    "spaces": set(),
    "polymers": {"spaces"},
    "cohort": {"spaces"},
    "mechanistic": LEAVES,
    "dynamics": LEAVES,
    "stage1": LEAVES | {"files"},
    "exported": LEAVES,
    "reward_model": LEAVES | {"mechanistic", "exported", "stage1"},
    "designs": LEAVES,
    "files": set(),
    "memory": set(),
    "compiled": {"memory"},
    "oracle": LEAVES | {"dynamics", "reward_model", "files"},
    "ranking": LEAVES | {"dynamics"},
    "actions": LEAVES,
    "problem": LEAVES | {"dynamics", "reward_model", "actions"},
    "rendering": LEAVES | {"dynamics"},
    "env": LEAVES
    | {"dynamics", "reward_model", "actions", "problem", "rendering", "compiled", "memory"},
    "wrappers": {"spaces", "actions"},
    "sb3": set(),
    "__main__": {"spaces", "wrappers"},
    # The adapter to a library that need not be there is imported by whoever uses it.
    "__init__": set(MODULES) - {"__init__", "sb3"},
}


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted name of everything imported: `a.b` of `import a.b` and of `from a import b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def third_party(names: Iterator[str]) -> set[str]:
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_the_modules_it_may(module):
    ours = [name.split(".") for name in imports(parse(MODULES[module]))]
    used = {parts[1] for parts in ours if parts[0] == "hydrogel_gym" and len(parts) > 1}
    assert used <= MAY_IMPORT[module]


@pytest.mark.parametrize("module", MODULES)
def test_only_what_adapts_to_gymnasium_imports_more_of_it_than_spaces(module):
    used = {name for name in imports(parse(MODULES[module])) if name.startswith("gymnasium")}
    if module not in ("env", "wrappers", "sb3", "__main__", "__init__"):
        assert {name for name in used if not name.startswith("gymnasium.spaces")} == set()
    else:
        assert used != set()


def test_drawing_library_is_imported_only_within_the_functions_that_draw():
    tree = parse(MODULES["rendering"])
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {name for node in functions for name in imports(node)}
    assert third_party(iter(inside)) == {"PIL"}
    assert third_party(iter(set(imports(tree)) - inside)) == {"hydrogel_gym", "numpy"}


def test_dynamics_needs_nothing_but_torch():
    assert third_party(imports(parse(MODULES["dynamics"]))) == {"hydrogel_gym", "torch"}


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_neither_trainer_nor_generator(module):
    parts = {part for name in imports(parse(MODULES[module])) for part in name.split(".")}
    assert not parts & {"train", "ppo_hybrid", "patients", "generate", "make_outcomes"}


def test_trainer_imports_few_public_names_and_figures_only_inside_functions():
    tree = parse(CHECKOUT / "train" / "ppo_hybrid.py")
    names = set(imports(tree))
    assert {name for name in names if name.startswith("hydrogel_gym")} == {
        "hydrogel_gym",
        "hydrogel_gym.compiled.CompileError",
        "hydrogel_gym.dynamics.RewardTerms",
        "hydrogel_gym.files.write_atomically",
        "hydrogel_gym.memory.available_bytes",
        "hydrogel_gym.memory.keep_freed_memory",
        "hydrogel_gym.oracle.best_designs",
        "hydrogel_gym.spaces.COVERAGES",
        "hydrogel_gym.spaces.FORMULATION_FIELDS",
        "hydrogel_gym.spaces.PATIENT_FIELDS",
    }
    libraries = {"numpy", "pandas", "torch", "gymnasium", "tyro", "tqdm", "matplotlib"}
    libraries |= {"wandb", "plotly"}
    assert third_party(names) <= libraries | {"hydrogel_gym"}
    top_level = {name for node in tree.body if not hasattr(node, "name") for name in imports(node)}
    assert not third_party(top_level) & {"matplotlib", "wandb", "plotly", "pandas"}


def test_report_imports_few_public_names_and_the_trainer():
    names = set(imports(parse(CHECKOUT / "train" / "report.py")))
    modules = {name.rpartition(".")[0] for name in names if name.startswith("hydrogel_gym.")}
    assert modules == {f"hydrogel_gym.{name}" for name in ("dynamics", "files", "oracle", "spaces")}
    libraries = {"itables", "jinja2", "numpy", "pandas", "plotly", "torch", "tyro"}
    assert third_party(names) == libraries | {"hydrogel_gym", "ppo_hybrid"}
    private = [name for name in names if any(part.startswith("_") for part in name.split("."))]
    assert private == ["__future__.annotations"]


def test_patient_folder_is_data_and_the_scripts_that_make_it():
    assert [type(node) for node in parse(CHECKOUT / "patients" / "__init__.py").body] == [ast.Expr]
    assert {path.name for path in (CHECKOUT / "patients").glob("*.py")} == {
        "__init__.py",
        "generate.py",
        "make_outcomes.py",
    }


@pytest.mark.parametrize(
    ("script", "modules"),
    {
        "generate.py": {"cohort", "spaces"},
        "make_outcomes.py": {"cohort", "files", "mechanistic", "polymers", "spaces"},
    }.items(),
)
def test_script_for_patients_imports_public_names_of_few_modules(script, modules):
    names = imports(parse(CHECKOUT / "patients" / script))
    ours = [name.split(".") for name in names if name.startswith("hydrogel_gym")]
    assert {module for _, module, _ in ours} == modules
    assert not any(name.startswith("_") for *_, name in ours)


@pytest.mark.parametrize(
    ("package", "name", "start"),
    [
        ("hydrogel_gym", "polymers.csv", "polymer_id,"),
        ("hydrogel_gym", "py.typed", ""),
        ("hydrogel_gym.patients", "cohort.csv", "patient_id,"),
        ("hydrogel_gym.patients", "cohort_holdout.csv", "patient_id,"),
    ],
)
def test_installed_package_carries_its_data(package, name, start):
    resource = files(package) / name
    assert resource.is_file()
    assert resource.read_text(encoding="utf-8").startswith(start)


def test_version_is_that_of_the_distribution():
    assert hydrogel_gym.__version__ == version("hydrogel_gym")


def test_public_names_are_sorted_and_there():
    assert hydrogel_gym.__all__ == sorted(hydrogel_gym.__all__)
    assert all(hasattr(hydrogel_gym, name) for name in hydrogel_gym.__all__)


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
