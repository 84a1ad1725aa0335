"""The documentation: its links lead somewhere, its code runs, its commands are understood."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import shlex
import sys
from configparser import ConfigParser
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser as launcher_parser

from hydrogel_gym import HydrogelEnv
from hydrogel_gym.errors import UsageError
from hydrogel_gym.runs.command_line import read_command_line
from hydrogel_gym.train import generate_candidates, ppo_hybrid

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "patients" / "README.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}

# Commands of other programs, which are not run, and why.
OTHERS = {
    "wandb": "needs an account; the files that it is given are looked for",
    "pytest": "these tests",
    "sphinx-build": "the build of the documentation, a step of CI",
}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(language: str) -> dict[str, list[str]]:
    """Blocks of a language by the page they are on."""
    found = {
        name(page): [body for kind, body in BLOCK.findall(text) if kind == language]
        for page, text in TEXT.items()
    }
    return {page: bodies for page, bodies in found.items() if bodies}


@pytest.fixture(scope="module")
def fragments(load_checkout_script):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)  # it imports modules beside it
        return load_checkout_script("docs/fragments.py")


@pytest.fixture(scope="module")
def markdown(load_checkout_script):
    return load_checkout_script("docs/markdown_text.py")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_of_a_page_lead_to_files_and_headings(markdown, page):
    for target in markdown.links(TEXT[page]):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        assert to.exists(), target
        if not anchor:
            continue
        text = to.read_text(encoding="utf-8")
        if to == DOCS / "environment.md":  # which includes a docstring
            text += inspect.cleandoc(HydrogelEnv.__doc__)
        assert anchor in markdown.anchors(text), target


def test_every_result_of_a_benchmark_is_on_the_page_of_benchmarks():
    results = {path.name for path in (ROOT / "benchmark" / "results").glob("*.md")}
    shown = re.findall(r"_generated/results/(\S+)", TEXT[DOCS / "benchmarks.md"])
    assert set(shown) == results


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_a_page_includes_from_the_repository_exist(page):
    for target in re.findall(r"^```\{(?:literalinclude|image|include)\} (\S+)$", TEXT[page], re.M):
        assert target.startswith("_generated/") or (page.parent / target).is_file(), target


def test_every_section_of_the_readme_is_on_one_page(fragments):
    included = set(fragments.places())
    keys = fragments.sections(TEXT[ROOT / "README.md"])
    assert [key for key in keys if f"readme/{key}.md" not in included] == []


def test_every_constant_of_the_model_is_in_an_equation_and_in_a_table(fragments):
    from dataclasses import fields

    every = {field.name for field in fields(fragments.MechanisticParams)}
    used = set(re.findall(r"@(\w+)@", TEXT[DOCS / "reward-model.md"]))
    tabled = [item.name for group in fragments.constants() for item in group.constants]
    assert used == every
    assert len(tabled) == len(every)
    assert set(tabled) == every


def test_reference_has_a_page_for_every_module_under_the_package_it_is_in(fragments):
    folder = ROOT / "hydrogel_gym"
    names = {
        ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        for path in folder.rglob("*.py")
    } - {"__init__"}
    if not find_spec("stable_baselines3"):
        names -= {"sb3", "envs.sb3"}
    assert sorted(fragments.module_names()) == sorted(names)
    listed = [name for package in ("", *names) for name in fragments.modules_in(package)]
    assert sorted(listed) == sorted(names)


def test_page_of_a_module_without_code_says_where_its_names_are_described(fragments):
    page = fragments.module_page("env")
    assert "`HydrogelEnv <hydrogel_gym.envs.single.HydrogelEnv>`" in page
    assert ":no-members:" in page
    assert ":no-members:" not in fragments.module_page("envs.single")


def test_pictures_are_what_their_script_draws(load_checkout_script):
    diagrams = load_checkout_script("docs/diagrams.py")
    for theme in diagrams.THEMES:
        assert (DOCS / "_static" / f"dataflow-{theme}.svg").read_text() == diagrams.svg(theme)


def test_blocks_are_of_languages_that_are_tested_or_hold_no_code():
    kinds = {kind for text in TEXT.values() for kind, _ in BLOCK.findall(text)}
    code = {"python", "py", "sh", "{code-cell}"}
    assert {kind for kind in kinds if not kind.startswith("{")} <= code | {"bibtex"}


@pytest.mark.parametrize("page", [page for page in blocks("python") if page != "README.md"])
def test_examples_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for body in blocks("python")[page]:
            exec(compile(body, page, "exec"), namespace)
    assert printed.getvalue().strip()


@pytest.mark.slow
def test_tutorial_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDROGEL_TUTORIAL_SHORT", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(DOCS)
    monkeypatch.setattr(sys, "path", [*sys.path])
    text = TEXT[DOCS / "tutorial.md"]
    namespace = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for body in re.findall(r"```\{code-cell\} ipython3\n(.*?)```", text, re.DOTALL):
            exec(compile(body, "tutorial.md", "exec"), namespace)
    assert len(namespace["regret"]) == 4
    assert (namespace["regret"] > -1e-3).all()


def commands() -> list[tuple[str, str]]:
    """Every command of every shell block, with its page; brackets hold what may be left out."""
    found = []
    for page, bodies in blocks("sh").items():
        for line in "".join(bodies).splitlines():
            words = shlex.split(line.replace("[--", "--").replace("v]", "v"), comments=True)
            while "&&" in words:
                at = words.index("&&")
                found.append((page, shlex.join(words[:at])))
                words = words[at + 1 :]
            if words:
                found.append((page, shlex.join(words)))
    return found


def understood(words: list[str]) -> None:
    """Fail where a command of this project, or an argument of it, is unknown."""
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "torchrun":
        given = launcher_parser().parse_args(rest)
        return understood(["python", given.training_script, *given.training_script_args])
    if program == "sbatch":
        at = next(i for i, word in enumerate(rest) if word.endswith(".sbatch"))
        assert (ROOT / rest[at]).is_file()
        return understood(["python", "train/ppo_hybrid.py", *rest[at + 1 :]])
    if program == "pip":
        assert rest[0] == "install"
        config = ConfigParser()
        config.read(ROOT / "setup.cfg")
        for word in rest[1:]:
            if match := re.fullmatch(r"\.\[(.+)\]", word):
                assert set(match[1].split(",")) <= set(config["options.extras_require"])
        return None
    if program != "python":
        assert program in OTHERS, program
        for word in rest:
            if word.endswith((".yaml", ".py")):
                assert (ROOT / word).is_file(), word
        return None
    if rest[0] == "-m":
        script, flags = ROOT / (rest[1].replace(".", "/") + ".py"), rest[2:]
        if script.with_suffix("").is_dir():
            script = script.with_suffix("") / "__main__.py"
    else:
        script, flags = ROOT / rest[0], rest[1:]
    assert script.is_file(), script
    source = script.read_text(encoding="utf-8")
    if script.parent == ROOT / "train":
        args = import_module(f"hydrogel_gym.train.{script.stem}").Args
        read_command_line(args, flags, prog=script.name)
        return None
    known = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', source))
    assert {flag for flag in flags if flag.startswith("--")} <= known, known
    return None


@pytest.mark.parametrize(("page", "command"), commands())
def test_command_is_understood(page, command):
    understood(shlex.split(command))


@pytest.mark.parametrize(
    "command",
    [
        "python train/ppo_hybrid.py --no-such-flag",
        "torchrun --nproc-per-node=2 train/ppo_hybrid.py --presett quick",
        'pip install -e ".[nothing]"',
        "python -m hydrogel_gym.oracle --cohorts mine.csv",
        "rm file",
    ],
)
def test_command_that_is_wrong_is_found(command):
    with pytest.raises((AssertionError, UsageError)):
        understood(shlex.split(command))


def test_readme_reads_designs_that_the_scripts_wrote(small_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ppo_hybrid.train(small_run(Path("runs/quick-s1"), num_iterations=1))
    args = generate_candidates.Args(
        policy=Path("runs/quick-s1"), patient=("P0007",), num_candidates=2000, top_k=10
    )
    generate_candidates.run(args)
    bodies = blocks("py")["README.md"]
    assert len(bodies) == 1
    namespace = {}
    exec(compile(bodies[0], "README.md", "exec"), namespace)
    assert namespace["candidates"].collect().height == 2000
