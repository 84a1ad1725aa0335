"""Logs beside `metrics.csv`: Weights & Biases and TensorBoard, which training neither waits for."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import re
import shlex
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm

from hydrogel_gym.errors import first_line
from hydrogel_gym.problem.cohort import Cohort
from hydrogel_gym.runs.directory import WANDB_FILE, write_json
from hydrogel_gym.runs.identity import digest
from hydrogel_gym.runs.metrics import METRICS, NAMESPACES, keyed
from hydrogel_gym.runs.pictures import polymers_by_scar_size, top_designs

# Settings of W&B where the environment has none ($WANDB_CONSOLE and so on). The console would be
# copies of a progress bar; a network that is gone keeps the end of a run waiting.
WANDB_SETTINGS: dict[str, Any] = {"console": "off", "init_timeout": 30.0, "finish_timeout": 300.0}
LAST_WAIT_SECONDS = 400.0  # for all logs, when training has ended
# For them to begin. Beside training that would take several times as long from it: what imports
# holds the interpreter for milliseconds at a time, which training needs for every operation.
FIRST_WAIT_SECONDS = 60.0


class Outcome(NamedTuple):
    """What there is to log when training ends."""

    summary: dict[str, Any]
    policy_file: Path
    cohort: Cohort  # the training patients
    designs: dict[str, Tensor]  # for them, as of `policy_designs`


class TensorBoardLog:
    """The rows of `metrics.csv` for TensorBoard, in `tensorboard/` of the run directory.

    Args:
        output_dir: the run directory.
        rows: of the run so far; what it logged after them before it was interrupted is struck out.
    """

    def __init__(self, output_dir: Path, rows: list[dict[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        first = rows[-1]["global_step"] + 1 if rows else 0
        self.writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=first)

    def log(self, row: dict[str, Any]) -> None:
        """Add a row."""
        values = keyed(row)
        step = values.pop("global_step")
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def conclude(self, outcome: Outcome) -> None:
        """Add nothing: the last row holds the last figures."""

    def close(self, failed: bool) -> None:
        """Write what is left."""
        self.writer.close()


class WandbLog:
    """A run of Weights & Biases, which goes on when the run of training does.

    Its steps are samples of all ranks, which never go backwards: W&B drops what does. Offline,
    every part of an interrupted run has the whole run from its start, since the part that is
    uploaded last replaces those before it (wandb/wandb, issue 5865).

    Args:
        output_dir: the run directory; W&B's own files go to `wandb/` in it.
        config: what the run is.
        cohorts: patients by name, with their file unless they are the shipped ones.
        rows: of the run so far.
    """

    def __init__(
        self,
        output_dir: Path,
        config: dict[str, Any],
        cohorts: dict[str, tuple[Cohort, Path | None]],
        rows: list[dict[str, Any]],
    ) -> None:
        import wandb

        self.wandb, env = wandb, os.environ
        self.run: Any
        # Silent, or a terminal is asked for an account, and all ranks wait for the answer.
        mode = wandb.setup(wandb.Settings(silent=True)).settings.mode
        mode = "offline" if mode == "dryrun" else mode
        path = output_dir / WANDB_FILE
        run_id = json.loads(path.read_text())["id"] if path.exists() else uuid.uuid4().hex[:8]
        in_sweep, job = "WANDB_SWEEP_ID" in env, env.get("TORCHELASTIC_RUN_ID", "")
        kept = {k: v for k, v in WANDB_SETTINGS.items() if f"WANDB_{k.upper()}" not in env}
        settings: dict[str, Any] = dict(
            id=env.get("WANDB_RUN_ID", run_id),
            # A sweep has a project already.
            project=None if in_sweep else env.get("WANDB_PROJECT", "hydrogel_gym"),
            name=env.get("WANDB_NAME", output_dir.name),
            group=env.get("WANDB_RUN_GROUP", f"torchrun-{job}" if job else None),
            job_type=env.get("WANDB_JOB_TYPE", "train"),
            tags=[config["preset"], config["policy"], config["env_id"], f"{config['ranks']} ranks"],
            dir=str(output_dir),
            settings=wandb.Settings(save_code=True, **kept),
        )
        why = "as requested"
        if mode not in ("offline", "disabled"):
            try:
                self.run = wandb.init(**settings, resume="allow")
            except Exception as error:  # no account, no network, no permission
                mode, why = "offline", first_line(error)
        if mode in ("offline", "disabled"):
            self.run = wandb.init(**settings, mode=mode)
        ids = {name: getattr(self.run, name) for name in ("id", "project", "entity", "url")}
        write_json(path, ids)
        self.exit_code = 0
        self.sync = f"to upload: wandb sync {shlex.quote(str(Path(self.run.dir).parent))}"
        state = f"offline ({why}); {self.sync}" if mode == "offline" else self.run.url or mode
        say(f"W&B: {state}")

        self.run.config.update(config, allow_val_change=True)
        self.run.define_metric("global_step")
        for namespace in NAMESPACES:
            self.run.define_metric(f"{namespace}/*", step_metric="global_step")
        for metric in METRICS:
            if metric.best:
                self.run.define_metric(metric.key, step_metric="global_step", summary=metric.best)
        self.use_cohorts(cohorts)
        self.first_step = self.run.step  # of a run that goes on, the one after the last there
        for row in rows:
            self.log(row)

    def use_cohorts(self, cohorts: dict[str, tuple[Cohort, Path | None]]) -> None:
        """Say whose the patients are; one that is refused does not end the log."""
        for name, (cohort, file) in cohorts.items():
            try:
                self._use(self._cohort_artifact(name, cohort, file))
            except Exception as error:
                say(f"warning: W&B: going on without the {name} cohort: {first_line(error)}")

    def _cohort_artifact(self, name: str, cohort: Cohort, file: Path | None) -> Any:
        """The shipped patients as they are; of one's own only name and hash leave the machine."""
        metadata = {"patients": len(cohort), "digest": digest(cohort), "shipped": file is None}
        title = "cohort" if name == "train" else f"cohort_{name}"
        if file is not None:
            title = re.sub(r"[^\w.-]", "_", file.stem, flags=re.ASCII)[:100] or title
        artifact = self.wandb.Artifact(title, type="cohort", metadata=metadata)
        if file is None:
            artifact.add_file(str(files("hydrogel_gym.patients") / f"{title}.csv"))
        else:
            artifact.add_reference(file.absolute().as_uri())
        return artifact

    def _use(self, artifact: Any) -> None:
        if self.run.offline:
            # `use_artifact` refuses, although the file of a run can hold that one is used.
            self.run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
        else:
            self.run.use_artifact(artifact)

    def log(self, row: dict[str, Any]) -> None:
        """Add a row, unless an earlier part of the run has."""
        if row["global_step"] >= self.first_step:
            self.run.log(keyed(row), step=row["global_step"])

    def conclude(self, outcome: Outcome) -> None:
        """Add final figures, pictures, the best designs and the policy."""
        wandb, figures = self.wandb, outcome.summary
        share = wandb.Table(["polymer", "share"], [*map(list, figures["polymer_share"].items())])
        by_scar = polymers_by_scar_size(outcome.cohort, outcome.designs["polymer_id"])
        best = top_designs(outcome.cohort, outcome.designs)
        pictures = {
            "eval/polymer_share": wandb.plot.bar(
                share, "polymer", "share", title="Share of each polymer in sampled designs"
            ),
            "eval/polymer_by_scar_size": wandb.Plotly(by_scar),
            "eval/top_designs": wandb.Table(dataframe=best),
        }
        self.run.log(pictures, step=figures["samples"])
        plain = (bool, int, float, str)
        self.run.summary.update(
            {f"final/{name}": value for name, value in figures.items() if isinstance(value, plain)}
        )
        try:
            artifact = wandb.Artifact("stage2_policy", type="policy", metadata=figures)
            artifact.add_file(str(outcome.policy_file))
            self.run.log_artifact(artifact, aliases=["latest", f"run-{self.run.id}"])
        except Exception as error:
            say(f"warning: W&B: going on without the policy: {first_line(error)}")
        self.exit_code = 130 if figures["interrupted"] else 0

    def close(self, failed: bool) -> None:
        """End W&B's run too."""
        self.run.finish(exit_code=1 if failed else self.exit_code)
        if self.run.offline:
            say(f"W&B: {self.sync}")


class Logs:
    """The logs of a run beside `metrics.csv`, kept by a thread of their own.

    Once they have begun, training neither waits for a log nor ends with it: one that fails is left
    out from then on, with a warning.

    Args:
        makers: by name, what begins each.
    """

    def __init__(self, makers: dict[str, Callable[[], WandbLog | TensorBoardLog]]) -> None:
        self.makers = makers
        self.logs: dict[str, WandbLog | TensorBoardLog] = {}
        self.calls: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
        self.begun = threading.Event()
        # Daemon, so that a log that hangs keeps no process alive.
        self.thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Logs:
        if self.makers:
            self.thread.start()
            self.begun.wait(FIRST_WAIT_SECONDS)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.makers:
            self.calls.put(("close", kind is not None))
            self.calls.put(None)
            self.thread.join(LAST_WAIT_SECONDS)

    def log(self, row: dict[str, Any]) -> None:
        """Add a row of `metrics.csv` to each."""
        self.calls.put(("log", row))

    def conclude(self, outcome: Callable[[], Outcome]) -> None:
        """Have each log how the run ended."""
        if self.makers:
            self.calls.put(("conclude", outcome()))

    def _work(self) -> None:
        for name, make in self.makers.items():
            with self._survive(name):
                self.logs[name] = make()
        self.begun.set()
        while call := self.calls.get():
            method, argument = call
            for name, log in list(self.logs.items()):
                with self._survive(name):
                    getattr(log, method)(argument)

    @contextlib.contextmanager
    def _survive(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.logs.pop(name, None)
            say(f"warning: going on without {name}: {first_line(error)}")


def make_logs(
    options: Any,
    output_dir: Path,
    config: dict[str, Any],
    cohorts: dict[str, Cohort],
    rows: list[dict[str, Any]],
) -> Logs:
    """The logs that are wanted.

    Args:
        options: `RunOptions` and `ProblemOptions`.
        output_dir: the run directory.
        config: what the run is.
        cohorts: patients by name.
        rows: of the run so far.
    """
    makers: dict[str, Callable[[], WandbLog | TensorBoardLog]] = {}
    if options.track:
        config |= {f"{name}_cohort_digest": digest(each) for name, each in cohorts.items()}
        paths = {"train": options.cohort, "holdout": options.holdout_cohort}
        patients = {name: (cohort, paths[name]) for name, cohort in cohorts.items()}
        makers["W&B"] = functools.partial(WandbLog, output_dir, config, patients, list(rows))
    if options.tensorboard:
        makers["TensorBoard"] = functools.partial(TensorBoardLog, output_dir, list(rows))
    return Logs(makers)


def say(line: str) -> None:
    """Print a line on standard error, above a progress bar if there is one."""
    tqdm.write(line, file=sys.stderr)
