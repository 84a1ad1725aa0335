"""Would the tests notice? Faults put into the dynamics, the reward and the reward model, one each.

    python benchmark/robustness/mutation.py     # some minutes on two idle cores

Cosmic Ray makes the mutants: one operator, comparison, number, truth value, condition or decorator
changed in each. Left out are changes to annotations, which nothing evaluates, and those that make
the same code twice; strings are not changed. Each mutant is loaded in place of its module in a
process of its own, a fork of one that has imported the libraries, where pytest runs the module's
own quick tests, `tests/problem/test_reward.py` for `problem/reward.py`, until the first failure.
Writes `results/mutation.md`; needs `pip install -e ".[test,mutation]"`.
"""

from __future__ import annotations

import argparse
import ast
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from itertools import count
from pathlib import Path
from types import CodeType
from typing import NamedTuple

# Before torch is imported, and in the children too: two of them share two cores.
os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

import cosmic_ray.mutating
import cosmic_ray.plugins
import gymnasium  # noqa: F401  what follows is imported once, for all forks
import pandas  # noqa: F401
import pytest
import torch.distributed.tensor  # noqa: F401  by `torch.testing`
import tyro  # noqa: F401
from tqdm import tqdm

CHECKOUT = Path(__file__).parents[2]
MODULES = ("problem/reward", "problem/dynamics", "models/mechanistic")
BAR_PERCENT = 90.0
LIMIT_SECONDS = 60  # sixty times what the tests take, for cores that others use too
# One change for each operator in the code: all others in its place would die of a type error.
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
    *(f"ReplaceUnaryOperator_Delete_{name}" for name in ("Not", "Invert", "USub")),
    *(f"Replace{name}" for name in ("TrueWithFalse", "FalseWithTrue", "AndWithOr", "OrWithAnd")),
    *("NumberReplacer", "AddNot", "RemoveDecorator", "ZeroIterationForLoop"),
)
# Why nothing could notice a change, by part of the line after it.
UNOBSERVABLE = {
    "zip(chosen, other, strict=False)": "both are of one type",
    "unsqueeze(1)": "of one dimension, the next is the last",
    "seed.shape[ -1]": "of one dimension, the first is the last",
    "any(1)": "of two dimensions, this is the last",
    "dim=1": "of two dimensions, this is the last",
    "/, heading": "the star marks keyword arguments, and is no product",
    "r >= 0.0": "at 0 both branches are 0",
    "degraded = torch.expm1": "the square is taken of it",
    'conductivity_mismatch_width_s_per_m: float = graded("D", -0.5)': "the square is taken of it",
    "EF).clamp(min= -1.0)": "the floor of the headroom holds it",
}


class Mutant(NamedTuple):
    """A module with one change."""

    module: str
    operator: str
    source: str
    line: int  # of the change
    before: str  # the line
    after: str

    def __str__(self) -> str:
        """The item of a list."""
        whys = (why for part, why in UNOBSERVABLE.items() if part in self.after)
        why = next((f" (cannot be observed: {why})" for why in whys), "")
        where = f"`{self.module}.py`, line {self.line}, {self.operator}"
        return f"- {where}: `{self.before}` → `{self.after}`{why}"


def file_of(module: str) -> Path:
    """Source of a module of the package."""
    return CHECKOUT / "hydrogel_gym" / f"{module}.py"


def tests_of(module: str) -> Path:
    """Tests of a module of the package."""
    folder, name = module.split("/")
    return CHECKOUT / "tests" / folder / f"test_{name}.py"


def evaluated(source: str) -> str:
    """What is the same for two sources that compute the same in the same way."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for annotation in {"annotation", "returns"} & set(node._fields):
            setattr(node, annotation, None)
    return ast.dump(tree)


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
            yield Mutant(module, operator, mutated, line, before.strip(), after.strip())


def run_tests(mutant: Mutant) -> int:
    """Exit code of pytest on a mutant; of a signal, its negative number."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(LIMIT_SECONDS)  # ends the process, whatever it is at
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    read, name = SourceFileLoader.get_code, f"hydrogel_gym.{mutant.module.replace('/', '.')}"

    def get_code(loader: SourceFileLoader, imported: str) -> CodeType:
        if imported == name:
            return compile(mutant.source, loader.path, "exec")
        return read(loader, imported)

    SourceFileLoader.get_code = get_code
    options = ["-x", "-q", "--rootdir", str(CHECKOUT), "-c", str(CHECKOUT / "pyproject.toml")]
    # Plain, since assertions cannot be rewritten in what was imported before the fork.
    options += ["--assert=plain", "-p", "no:cacheprovider", str(tests_of(mutant.module))]
    os._exit(int(pytest.main(options)))


def main() -> None:
    """Make, test and count the mutants."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=MODULES)
    parser.add_argument("--every", type=int, default=1, help="take one mutant of so many")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    os.chdir(CHECKOUT)
    for module in args.modules:  # tests that fail on the original would kill every mutant
        if run_tests(Mutant(module, "none", file_of(module).read_text(), 0, "", "")):
            raise SystemExit(f"{tests_of(module)} fails on {module} as it is")
    todo = [mutant for module in args.modules for mutant in mutants(module)][:: args.every]
    gc.freeze()  # what pytest looks for at its end is not among these objects
    results = []
    with multiprocessing.get_context("fork").Pool(args.processes) as pool:
        codes = tqdm(pool.imap(run_tests, todo), total=len(todo), unit="mutant")
        for mutant, code in zip(todo, codes, strict=True):
            results.append((mutant, code))
            if code == 0:
                tqdm.write(str(mutant))

    # Here, since the package must not be imported before the forks have put mutants in it.
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from common import RESULTS, made_by, table, verdict, write

    rows = []
    for name in (*args.modules, "all"):
        of = [code for mutant, code in results if name in (mutant.module, "all")]
        percent = 100.0 * (1.0 - of.count(0) / len(of))
        bar = f"{BAR_PERCENT:g} %, {verdict(percent >= BAR_PERCENT)}"
        late = of.count(-signal.SIGALRM)
        rows.append((name, len(of), len(of) - of.count(0), late, f"{percent:.1f} %", bar))
    share = "" if args.every == 1 else f", one of {args.every}"
    lines = [
        f"Mutants of the reward, the dynamics and the built-in reward model{share}. One is killed "
        f"if a test of its module fails, or by a time-out of {LIMIT_SECONDS} s.",
        "",
        made_by(1, "cosmic-ray"),
        "",
        *table(("module", "mutants", "killed", "by time-out", "share", "bar"), rows),
        "",
        "Survivors:",
        "",
        *(str(mutant) for mutant, code in results if code == 0),
    ]
    write(RESULTS, "mutation", lines)


if __name__ == "__main__":
    main()
