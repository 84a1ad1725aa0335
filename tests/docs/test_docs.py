"""README and documentation: links lead somewhere, code runs, commands are understood."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import re
import shlex
import shutil
from configparser import ConfigParser
from pathlib import Path
from unittest import mock

import pytest
import torch
from gymnasium.envs.registration import registry
from torch.distributed.run import get_args_parser as launcher_parser

from hydrogel_gym import HydrogelEnv
from hydrogel_gym.designs import load_designs
from hydrogel_gym.errors import UsageError
from hydrogel_gym.models.mechanistic import REFERENCES, MechanisticParams
from hydrogel_gym.runs.command_line import read_command_line
from hydrogel_gym.train import generate_candidates

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FILES = ["README.md", "CONTRIBUTING.md", "examples/README.md", "patients/README.md"]
PAGES = [*(ROOT / file for file in FILES), *sorted(DOCS.glob("*.md"))]
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
BLOCK = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INCLUDED = re.compile(r"^```\{(?:literalinclude|image|include)\} (\S+)$", re.MULTILINE)

# Programs that are not run here: they need an account, run these tests, or are steps of CI.
OTHERS = ("wandb", "pytest", "ruff", "mypy", "sphinx-build", ".ci/run", ".ci/nightly")
TUTORIAL = "docs/tutorial.md"
SLOW = [TUTORIAL, "docs/own-patients-and-models.md"]  # they train, or export a network


def blocks(language: str) -> dict[str, list[str]]:
    """Blocks of a language by the page they are on."""
    found = {}
    for page, text in TEXT.items():
        for kind, body in BLOCK.findall(text):
            if kind == language:
                found.setdefault(page, []).append(body)
    return found


@pytest.fixture(scope="module")
def tables(load_checkout_script):
    return load_checkout_script("docs/tables.py")


def anchors(text: str) -> set[str]:
    """Anchors of the headings of a Markdown text, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ +(.+?) *$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXT)
def test_links_of_a_page_lead_to_files_and_headings_and_its_code_is_tested(page):
    assert len(TEXT[page].splitlines()) <= (200 if page == "README.md" else 250)
    kinds = {kind for kind, _ in BLOCK.findall(TEXT[page]) if not kind.startswith("{")}
    assert kinds <= {"python", "sh", "bibtex", "py" if page == "docs/designs.md" else ""}
    for target in re.findall(r"\]\(([^()\s]+)\)", BLOCK.sub("", TEXT[page])):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        to = (ROOT / page).parent / path if path else ROOT / page
        assert to.exists(), target
        if anchor:
            text = to.read_text(encoding="utf-8")
            text = text.replace("{{ manual }}", HydrogelEnv.__doc__.replace("\n    ", "\n"))
            assert anchor in anchors(text), target


def test_files_that_pages_include_exist_and_every_result_is_on_one_page():
    included = []
    for page, text in TEXT.items():
        included += [(ROOT / page).parent / file for file in INCLUDED.findall(text)]
    assert [file for file in included if not file.is_file()] == []
    results = (ROOT / "benchmark" / "results").glob("*.md")
    shown = [file.resolve() for file in included if file.parent.name == "results"]
    assert sorted(shown) == sorted(results)


def test_every_constant_of_the_model_is_in_an_equation(tables):
    names = {field.name for field in dataclasses.fields(MechanisticParams)}
    text = TEXT["docs/reward-model.md"]
    assert set(re.findall(r"@\{(\w+)\}", text)) == names
    filled = tables.in_equations(text)
    assert "@" not in filled
    assert r"\max(h,\;1 \cdot 10^{-6})^{0.6}" in filled
    assert set(re.findall(r"\[(\w+)\]", tables.constants())) == set(REFERENCES)


def test_every_table_is_on_a_page_and_has_no_row_without_meaning(tables):
    made = tables.substitutions()
    shown = re.findall(r"^\{\{ (\w+) \}\}$", "\n".join(TEXT.values()), re.MULTILINE)
    assert sorted(shown) == sorted(made)
    for name, text in made.items():
        if name.startswith("flags_") or name in ("metrics", "reward_config", "ranked_columns"):
            assert "|  |\n" not in text, name
    for name, row in {
        "flags_ppo_hybrid": "| `--gamma` | `0.99` | discount |",
        "presets": "| `--num-steps` | `100` | `2` | `5` |",
        "reward_config": "| `toxicity_penalty` | 2 |",
    }.items():
        assert row in made[name]


QUICK = [page for page in blocks("python") if page not in SLOW]


@pytest.mark.parametrize("page", [*QUICK, *(pytest.param(p, marks=pytest.mark.slow) for p in SLOW)])
def test_examples_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.setenv("HYDROGEL_TUTORIAL_SHORT", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace, printed = {}, io.StringIO()
    # What an example registers is not left to the tests after it.
    with contextlib.redirect_stdout(printed), mock.patch.dict(registry):
        for body in blocks("{code-cell}" if page == TUTORIAL else "python")[page]:
            exec(compile(body, page, "exec"), namespace)
    assert printed.getvalue().strip()
    assert page != TUTORIAL or (namespace["regret"] > -1e-3).all()


def test_designs_are_read_back_as_the_page_says(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(finished_run[0].output_dir, Path("runs/quick-s1"))
    patients = ("P0007", "P0001")
    args = generate_candidates.Args(policy=run, patient=patients, num_candidates=3000, top_k=10)
    generate_candidates.run(args)
    (block,) = blocks("py")["docs/designs.md"]
    names = {}
    exec(block, names)
    every = load_designs(run / "designs", table="candidates")
    own = every[every["patient_id"] == "P0007"]
    assert [len(table) for table in (every, own, names["top"])] == [6000, 3000, 10]
    assert len(names["good"]) == (own["reward"] > 20).sum()
    best = every.groupby("polymer_name", observed=True)["reward"].max()
    assert names["by_polymer"].set_index("polymer_name").iloc[:, 0].to_dict() == best.to_dict()
    best = every.groupby("patient_id")["reward"].max()
    assert dict(names["by_patient"].iter_rows()) == best.to_dict()


def understood(words: list[str]) -> None:
    """Fail where a command of this project, or an argument of it, is unknown."""
    program, *rest = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    if program == "torchrun":
        given = launcher_parser().parse_args(rest)
        understood(["python", given.training_script, *given.training_script_args])
    elif program == "sbatch":
        at = rest.index("train/slurm.sbatch")
        understood(["python", "train/ppo_hybrid.py", *rest[at + 1 :]])
    elif program == "pip":
        config = ConfigParser()
        config.read(ROOT / "setup.cfg")
        for extras in re.findall(r"\.\[(.+?)\]", " ".join(rest)):
            assert set(extras.split(",")) <= set(config["options.extras_require"])
    elif program == "python":
        script, *flags = rest[1:] if rest[0] == "-m" else rest
        if rest[0] == "-m":
            script = script.replace(".", "/")
            script += "/__main__.py" if (ROOT / script).is_dir() else ".py"
        source = (ROOT / script).read_text(encoding="utf-8")
        if script.startswith("train/"):
            args = importlib.import_module(f"hydrogel_gym.train.{Path(script).stem}").Args
            read_command_line(args, flags, prog=script)
        else:
            known = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', source))
            assert {flag for flag in flags if flag.startswith("--")} <= known
    else:
        assert program in OTHERS, program
        files = [word for word in rest if word.endswith((".yaml", ".py"))]
        assert [file for file in files if not (ROOT / file).is_file()] == []


@pytest.mark.parametrize("page", blocks("sh"))
def test_commands_of_a_page_are_understood(page):
    for part in re.split(r"\n| && ", "".join(blocks("sh")[page])):
        if words := shlex.split(part, comments=True):
            understood(words)


def test_command_that_is_wrong_is_found():
    for command in (
        "torchrun --nproc-per-node=2 train/ppo_hybrid.py --presett quick",
        'pip install -e ".[nothing]"',
        "python -m hydrogel_gym.oracle --cohorts mine.csv",
    ):
        with pytest.raises((AssertionError, UsageError)):
            understood(shlex.split(command))
