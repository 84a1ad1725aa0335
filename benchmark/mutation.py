"""Would the tests notice? Faults put into the dynamics and the reward one at a time.

    python benchmark/mutation.py                    # half an hour on two cores
    python benchmark/mutation.py --every 10         # every tenth mutant

Cosmic Ray makes the mutants: one operator, comparison, number, truth value, condition or decorator
changed in each. Left out are changes to annotations and docstrings, which nothing evaluates, and
those that make the same code twice. Each mutant is loaded in place of its module in a process of
its own, a fork of one that has imported the libraries, where pytest runs until the first failure.
A mutant is killed if a test fails or the time is up, and survives otherwise; a few survivors change
nothing that could be observed. Writes `results/mutation.md`; needs
`pip install -e ".[test,mutation]"`.
"""

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.machinery
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import spec_from_loader
from itertools import count
from pathlib import Path
from typing import NamedTuple

# Before torch is imported, and in the children too: two of them share two cores.
os.environ["OMP_NUM_THREADS"] = "1"

import cosmic_ray.mutating
import cosmic_ray.plugins
import gymnasium  # noqa: F401  what follows is imported once, for all forks
import hypothesis  # noqa: F401
import pandas  # noqa: F401
import pytest
import torch  # noqa: F401
from tqdm import tqdm

CHECKOUT = Path(__file__).parents[1]
RESULTS = CHECKOUT / "benchmark" / "results"
BAR_PERCENT = 90.0
TIMEOUT_SECONDS = 300.0
# The quick ones first: most mutants die there.
TESTS = {
    "problem.reward": ("problem/", "envs/test_design_problem.py", "envs/test_env.py"),
    "problem.dynamics": ("problem/", "envs/test_design_problem.py", "envs/test_env.py"),
    "models.mechanistic": ("models/test_mechanistic.py", "models/test_reward_statistics.py"),
}
# One change for each operator in the code; to put all others in its place as well would add mutants
# that die of a type error.
BINARY = (
    "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_Mul Pow_Mul BitAnd_BitOr BitOr_BitAnd "
    "BitXor_BitAnd RShift_LShift LShift_RShift"
).split()
COMPARISON = (
    "Lt_LtE Lt_Gt LtE_Lt LtE_GtE Gt_GtE Gt_Lt GtE_Gt GtE_LtE Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is"
).split()
OPERATORS = (
    *(f"ReplaceBinaryOperator_{name}" for name in BINARY),
    *(f"ReplaceComparisonOperator_{name}" for name in COMPARISON),
    "ReplaceUnaryOperator_Delete_Not",
    "ReplaceUnaryOperator_Delete_Invert",
    "ReplaceUnaryOperator_Delete_USub",
    "NumberReplacer",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "AddNot",
    "RemoveDecorator",
    "ZeroIterationForLoop",
)


class Mutant(NamedTuple):
    """A module with one change."""

    module: str
    operator: str
    source: str
    line: int  # of the change
    change: str  # the line as it was and as it is


class _Evaluated(ast.NodeTransformer):
    """Leaves of a module what is evaluated: no annotations, no docstrings."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        node.annotation = ast.Constant(None)
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.returns = None
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return ast.Expr(ast.Constant(None)) if isinstance(node.value, ast.Constant) else node


def evaluated(source: str) -> str:
    """What is the same for two sources that compute the same in the same way."""
    return ast.dump(_Evaluated().visit(ast.parse(source)))


def file_of(module: str) -> Path:
    """Source of a module of the package."""
    return CHECKOUT / "hydrogel_gym" / f"{module.replace('.', '/')}.py"


def mutants(module: str) -> Iterator[Mutant]:
    """Every different one of a module of the package."""
    source = file_of(module).read_text()
    seen = {evaluated(source)}
    for operator in OPERATORS:
        make = cosmic_ray.plugins.get_operator(f"core/{operator}")
        for occurrence in count():
            mutated = cosmic_ray.mutating.mutate_code(source, make(), occurrence)
            if mutated is None:
                break
            if (content := evaluated(mutated)) in seen:
                continue
            seen.add(content)
            lines = zip(source.splitlines(), mutated.splitlines(), strict=False)
            line, before, after = next((i, a, b) for i, (a, b) in enumerate(lines, 1) if a != b)
            change = f"{before.strip()} → {after.strip()}"
            yield Mutant(module, operator, mutated, line, change)


class _InPlace(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Loads the mutant where its module is imported."""

    def __init__(self, mutant: Mutant) -> None:
        self.name = f"hydrogel_gym.{mutant.module}"
        self.path = str(file_of(mutant.module))
        self.source = mutant.source.encode()

    def find_spec(
        self, fullname: str, path: object, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        return spec_from_loader(fullname, self) if fullname == self.name else None

    def get_filename(self, fullname: str) -> str:
        return self.path

    def get_data(self, path: str) -> bytes:
        if path != self.path:  # no compiled file of the original
            raise OSError(path)
        return self.source


def run_tests(mutant: Mutant) -> None:
    """Run the module's tests on a mutant; the exit code is pytest's."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    sys.meta_path.insert(0, _InPlace(mutant))
    paths = [str(CHECKOUT / "tests" / name) for name in TESTS[mutant.module]]
    options = ["-x", "-q", "--rootdir", str(CHECKOUT), "-c", str(CHECKOUT / "pyproject.toml")]
    # Plain, since assertions cannot be rewritten in what was imported before the fork.
    options += ["--assert=plain", "-p", "no:cacheprovider"]
    os._exit(int(pytest.main([*options, *paths])))


def survivors(todo: list[Mutant], num_processes: int) -> list[Mutant]:
    """Those that no test notices."""
    context = multiprocessing.get_context("fork")
    running: dict[multiprocessing.Process, tuple[Mutant, float]] = {}
    alive = []
    waiting = iter(todo)
    with tqdm(total=len(todo), unit="mutant") as bar:
        while True:
            while len(running) < num_processes and (mutant := next(waiting, None)):
                process = context.Process(target=run_tests, args=(mutant,))
                process.start()
                running[process] = mutant, time.monotonic() + TIMEOUT_SECONDS
            if not running:
                return alive
            multiprocessing.connection.wait([p.sentinel for p in running], timeout=5.0)
            for process, (mutant, deadline) in list(running.items()):
                if process.is_alive() and time.monotonic() < deadline:
                    continue
                process.kill()
                process.join()
                if process.exitcode == 0:
                    alive.append(mutant)
                    tqdm.write(f"{mutant.module}:{mutant.line} {mutant.operator}")
                    tqdm.write(f"    {mutant.change}")
                del running[process]
                bar.update()


def main() -> None:
    """Make, test and count the mutants."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--every", type=int, default=1, help="take one mutant of so many")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    os.chdir(CHECKOUT)
    every = [mutant for module in args.modules for mutant in mutants(module)]
    todo, there = every[:: args.every], Counter(mutant.module for mutant in every)
    for module in args.modules:  # tests that fail on the original would kill every mutant
        source = file_of(module).read_text()
        if not survivors([Mutant(module, "none", source, 0, "the module as it is")], 1):
            raise SystemExit(f"the tests fail on {module} as it is")
    alive = survivors(todo, args.processes)
    made = Counter(mutant.module for mutant in todo)
    left = Counter(mutant.module for mutant in alive)
    lines = [
        "Mutants of the dynamics (with the reward) and of the built-in reward model that the tests "
        "kill; made by `benchmark/mutation.py`.",
        "",
        "| module | mutants | killed | | bar |",
        "|---|---|---|---|---|",
    ]
    for module in args.modules:
        killed = made[module] - left[module]
        percent = 100.0 * killed / made[module]
        verdict = f"{BAR_PERCENT:g} %, {'met' if percent >= BAR_PERCENT else 'missed'}"
        number = f"{made[module]} of {there[module]}"
        lines.append(f"| `{module}` | {number} | {killed} | {percent:.1f} % | {verdict} |")
    lines += ["", "Survivors:", ""]
    lines += [f"- `{m.module}`, line {m.line}, {m.operator}: `{m.change}`" for m in alive]
    text = "\n".join(lines) + "\n"
    # Here, since the package must not be imported before the forks have put mutants in it.
    from hydrogel_gym.files import write_atomically

    write_atomically(RESULTS / "mutation.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
