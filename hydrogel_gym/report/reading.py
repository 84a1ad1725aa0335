"""What a run directory contains; nothing that is missing or damaged in it is an error.

What cannot be read is left out, and named in a sentence.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from hydrogel_gym.errors import UsageError, first_line
from hydrogel_gym.report.labels import FINAL_FIGURES
from hydrogel_gym.runs.checkpoints import (
    CHECKPOINTS,
    checkpoint_name,
    newest_checkpoint,
    unseal,
)
from hydrogel_gym.runs.directory import (
    CONFIG_FILE,
    METRICS_FILE,
    POLICY_FILE,
    RUN_FILES,
    SUMMARY_FILE,
)
from hydrogel_gym.runs.evaluation import DesignPolicy
from hydrogel_gym.runs.identity import patients_of
from hydrogel_gym.runs.policies import agent_of, load_policy
from hydrogel_gym.runs.summary import REGRETS
from hydrogel_gym.runs.uncertainty import Calibration

MakeAgent = Callable[
    ..., Any
]  # a policy's class: an `nn.Module` that has `design`, a `DesignPolicy`, `value` and heads

# What the page computes with, of both JSON files; all else is only printed.
KINDS = dict(num_iterations=int, horizon=int, env_id=str, iterations=int, versions=dict)
KINDS |= dict.fromkeys(REGRETS, dict)  # by statistic


class SavedPolicy(NamedTuple):
    """A policy, and where it was found."""

    agent: Any  # what `MakeAgent` makes
    config: dict[str, Any]
    origin: str
    calibration: Calibration | None = None  # of a finished run that had an oracle

    @property
    def design(self) -> DesignPolicy:
        """The policy as what designs."""
        design: DesignPolicy = self.agent.design
        return design


@dataclass
class SavedRun:
    """What could be read of a run directory; whatever is empty is named in `gaps`."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    metrics: pd.DataFrame = field(default_factory=pd.DataFrame)
    summary: dict[str, Any] = field(default_factory=dict)
    policy: SavedPolicy | None = None
    patients_digest: str | None = None
    gaps: list[str] = field(default_factory=list)
    policy_gaps: list[str] = field(default_factory=list)  # of no concern where no patient is shown

    def __post_init__(self) -> None:
        self.name = self.path.resolve().name

    @property
    def is_finished(self) -> bool:
        """Whether all iterations that were requested are done."""
        return bool(self.summary) and not self.summary.get("interrupted")


def read_run(path: Path, make_agent: MakeAgent) -> SavedRun:
    """Read whatever a run directory contains.

    Args:
        path: of the directory.
        make_agent: the class of its policy.

    Raises:
        UsageError: it is no directory, or contains nothing of a run.
    """
    if not path.is_dir():
        raise UsageError(f"{path} is not a directory")
    if not any((path / name).exists() for name in (*RUN_FILES, CHECKPOINTS)):
        raise UsageError(f"{path} contains nothing of a run ({METRICS_FILE} and others)")
    run = SavedRun(path)
    run.metrics = read_metrics(path / METRICS_FILE, run.gaps)
    run.config = read_json(path / CONFIG_FILE, run.gaps)
    checkpoint = read_newest_checkpoint(path, run.gaps)
    done = int(run.metrics["iteration"].max()) if len(run.metrics) else None
    read_status(run, done)
    read_policy(run, checkpoint, make_agent)
    if checkpoint:
        run.patients_digest = checkpoint["run"].get(patients_of("train"))
    if not run.config and run.policy:
        run.config = run.policy.config
        run.gaps.append(f"The configuration shown is the one kept in {run.policy.origin}.")
    return run


def read_json(path: Path, gaps: list[str]) -> dict[str, Any]:
    """A JSON object; empty, with a sentence in `gaps`, where there is none.

    A value that is of no use where it is needed is left out, and named there too.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not an object")
    except FileNotFoundError:
        gaps.append(f"{path.name} is missing.")
    except (OSError, ValueError) as error:  # ValueError: neither JSON nor UTF-8
        gaps.append(f"{path.name} cannot be read: {first_line(error)}.")
    else:
        useless = [name for name, value in content.items() if not is_of_use(name, value)]
        if useless:
            gaps.append(f"{path.name} has no usable value of {', '.join(useless)}.")
        return {name: value for name, value in content.items() if name not in useless}
    return {}


def is_of_use(name: str, value: Any) -> bool:
    """Whether a value is of the kind that its name promises; None is a value not had."""
    if name == "polymer_share":
        return isinstance(value, dict) and all(isinstance(x, int | float) for x in value.values())
    kind = int | float if name in FINAL_FIGURES else KINDS.get(name, object)
    return value is None or isinstance(value, kind)


def read_metrics(path: Path, gaps: list[str]) -> pd.DataFrame:
    """The rows of `metrics.csv` up to the first that is not whole; a blank cell is NaN."""
    try:
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            raise ValueError("it is empty")
        header, *lines = csv.reader(io.StringIO(text))
        if header.count("iteration") != 1 or header.count("global_step") != 1:
            raise ValueError("it lacks the columns iteration and global_step")
        if len(set(header)) < len(header):
            raise ValueError("two of its columns have one name")
    except FileNotFoundError:
        gaps.append(f"{path.name} is missing, so that there are no learning curves.")
        return pd.DataFrame()
    except (OSError, ValueError, csv.Error) as error:
        why = first_line(error)
        gaps.append(f"{path.name} cannot be read, so that there are no learning curves: {why}.")
        return pd.DataFrame()
    order = [header.index(name) for name in ("iteration", "global_step")]
    rows: list[list[float]] = []
    # A row that is cut off within its last number looks whole, but for the end of its line.
    for cells in lines if text.endswith("\n") else lines[:-1]:
        try:
            numbers = [float(cell) if cell else math.nan for cell in cells]
        except ValueError:
            break
        # Not `<=`: what is not a number is not in order either.
        if len(numbers) != len(header) or not all(
            (rows[-1][i] if rows else -1.0) < numbers[i] < math.inf for i in order
        ):
            break
        rows.append(numbers)
    if len(rows) < len(lines) or not rows:
        gaps.append(f"{path.name} is cut off or damaged after row {len(rows)}.")
    return pd.DataFrame(rows, columns=header, dtype=float)


def read_newest_checkpoint(path: Path, gaps: list[str]) -> dict[str, Any] | None:
    """The newest whole checkpoint of a run directory, if it has one."""
    try:
        sealed = newest_checkpoint(path)
    except UsageError:
        gaps.append(f"None of its {CHECKPOINTS} is whole.")
        return None
    return unseal(sealed) if sealed else None


def read_status(run: SavedRun, done: int | None) -> None:
    """Read `summary.json`, and say of a run that is not finished how far it got.

    Args:
        run: to complete.
        done: iterations in its metrics, if known.
    """
    requested = run.config.get("num_iterations")
    of_all = f" of {requested:,}" if requested else ""
    so_far = "" if done is None else f" after {done:,}{of_all} iterations"
    path = run.path / SUMMARY_FILE
    if not path.exists():
        run.gaps.append(f"{path.name} is missing: the run is still running, or was killed{so_far}.")
        return
    run.summary = read_json(path, run.gaps)
    summarised = run.summary.get("iterations")
    if run.summary and done and summarised and summarised < done:
        # A run that goes on leaves the summary and the policy of its interruption until it ends.
        run.summary = {}
        run.gaps.append(
            f"{path.name} is of iteration {summarised:,}, and the run went on: it is still "
            f"running, or was killed{so_far}."
        )
    elif run.summary.get("interrupted"):
        run.gaps.append(f"The run was interrupted{so_far}.")


def read_policy(run: SavedRun, checkpoint: dict[str, Any] | None, make_agent: MakeAgent) -> None:
    """The policy that a finished run saved, or else that of its newest checkpoint."""
    path = run.path / POLICY_FILE
    if run.summary or not checkpoint:
        try:
            agent, saved = load_policy(path, make_agent, "cpu")
            found = saved.get("regret_calibration")
            calibration = Calibration(**found) if found else None
            config = saved["training_config"]
            run.policy = SavedPolicy(agent, config, path.name, calibration)
            run.patients_digest = saved.get("origin", {}).get(patients_of("train"))
            return
        except UsageError as error:
            run.policy_gaps.append(as_sentence(error))
    if not checkpoint:
        run.policy_gaps.append(
            "There is no checkpoint either, so that nothing is shown of patients."
        )
        return
    iteration = checkpoint["iteration"]
    try:
        agent = agent_of(checkpoint, make_agent, "cpu")
    except UsageError as error:
        run.policy_gaps.append(as_sentence(error))
        return
    origin = f"{CHECKPOINTS}/{checkpoint_name(iteration)}"
    run.policy = SavedPolicy(agent, checkpoint["args"], origin)
    run.policy_gaps.append(
        f"The designs are those of the policy at iteration {iteration:,} ({origin})."
    )


def as_sentence(error: UsageError) -> str:
    """A message with a capital and a full stop."""
    return f"{str(error)[0].upper()}{str(error)[1:]}."
