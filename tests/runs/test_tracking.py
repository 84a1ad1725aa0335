"""What a run tells W&B and TensorBoard, and that it does not depend on them."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import hydrogel_gym
from hydrogel_gym.runs import (
    directory,
    environments,
    evaluation,
    metrics,
    options,
    pictures,
    policies,
    tracking,
)

pytest.importorskip("wandb", reason="W&B is not installed")
pytest.importorskip("tensorboard", reason="TensorBoard is not installed")


def run_files(output_dir: Path) -> list[Path]:
    return sorted(output_dir.glob("wandb/offline-run-*/run-*.wandb"))


class OnlineRun:
    """A run as W&B's server would have it: it knows the rows up to `step`."""

    offline, url, entity, project, dir = False, "https://example.org/run", "me", "p", "d/files"

    def __init__(self, step: int, failing: str, **settings) -> None:
        self.step, self.id, self.settings = step, settings["id"], settings
        self.rows, self.failing = [], failing
        self.config = SimpleNamespace(update=self._configure)
        self.summary, self.metrics, self.artifacts = {}, {}, {}

    def _configure(self, values, allow_val_change) -> None:
        self.configured = dict(values)

    def define_metric(self, name, **how) -> None:
        self.metrics[name] = how

    def use_artifact(self, artifact) -> None:
        if self.failing == "artifact":
            raise ValueError("Invalid artifact name")
        self.artifacts[artifact.name] = artifact

    def log_artifact(self, artifact, aliases) -> None:
        self.artifacts[artifact.name] = artifact

    def log(self, values, step) -> None:
        if self.failing == "log" and len(self.rows) == 2:
            raise ConnectionResetError("Connection lost")
        self.rows.append((step, values))

    def finish(self, exit_code) -> None:
        self.exit_code = exit_code


def serve(patch, step: int = 0, failing: str = "") -> list[OnlineRun]:
    """Put a W&B with a server in place of the real one; returns what `init` makes."""
    import wandb

    runs = []

    def init(**settings):
        if failing == "init" and settings.get("mode") != "offline":
            raise wandb.errors.CommError("no such host\nConsider ...")
        runs.append(OnlineRun(step, failing, **settings))
        return runs[-1]

    online = SimpleNamespace(settings=SimpleNamespace(mode="online"))
    patch.setattr(wandb, "init", init)
    patch.setattr(wandb, "setup", lambda settings: online)
    return runs


@pytest.fixture(scope="module", autouse=True)
def clean_environment():
    """No account and no settings of W&B, whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in list(os.environ):
            if variable.startswith(("WANDB_", "TORCHELASTIC")):
                patch.delenv(variable)
        patch.setenv("NETRC", os.devnull)
        yield


@pytest.fixture(scope="module")
def tracked(ppo, finished_run, clean_environment):
    """Arguments of the shared run, logged everywhere, its table, and what a server would have."""
    args = finished_run[0]
    # Beside the shared run, so that its oracle is found.
    output_dir = Path(tempfile.mkdtemp(prefix="tracked-", dir=args.output_dir.parent))
    logged = dataclasses.replace(args, output_dir=output_dir, track=True, tensorboard=True)
    with pytest.MonkeyPatch.context() as patch:
        runs = serve(patch)
        ppo.train(logged)
    return logged, pd.read_csv(output_dir / "metrics.csv"), runs[0]


def test_run_trains_the_same_and_logs_every_row_at_its_global_step(tracked, finished_run, of_runs):
    args, table, online = tracked
    of_runs.assert_same(args.output_dir, finished_run[0].output_dir)
    rows = online.rows[:-1]  # then pictures
    assert [step for step, _ in rows] == table["global_step"].tolist()
    for row, (_, logged) in zip(table.to_dict("records"), rows, strict=True):
        for column, value in row.items():
            assert logged[metrics.KEYS[column]] == pytest.approx(value, rel=1e-12), column
    for namespace in metrics.NAMESPACES:
        assert online.metrics[f"{namespace}/*"]["step_metric"] == "global_step"
    assert online.metrics["eval/holdout_regret"]["summary"] == "min"
    assert online.metrics["charts/mean_reward"]["summary"] == "max"
    summary = json.loads((args.output_dir / "summary.json").read_text())
    assert online.summary["final/holdout_regret"] == summary["holdout_regret"]
    assert online.exit_code == 0


def test_config_and_artifacts_say_what_the_run_depends_on_and_upload_no_cohort(tracked):
    args, _, online = tracked
    config = options.plain_config(args) | {"device": "cpu"}  # requested as "auto"
    config |= {"torch": version("torch"), "hydrogel_gym": hydrogel_gym.__version__}
    config |= {"ranks": 1}
    assert online.configured.items() >= config.items()
    assert len(online.configured["train_cohort_digest"]) == 16
    assert set(online.artifacts) == {"stage2_policy", "cohort", "cohort_holdout"}
    (entry,) = online.artifacts["stage2_policy"].manifest.entries.values()
    assert entry.size == (args.output_dir / "stage2_policy.pt").stat().st_size
    for name in ("cohort", "cohort_holdout"):
        (entry,) = online.artifacts[name].manifest.entries.values()
        assert entry.ref == args.cohort.with_name(f"{name}.csv").as_uri()
        assert entry.local_path is None


def test_pictures_are_the_best_designs_and_polymers_by_scar_size(ppo, tracked, three_patients):
    args, _, online = tracked
    top = online.rows[-1][1]["eval/top_designs"]
    top = pd.DataFrame(top.data, columns=top.columns)
    agent, _ = policies.load_policy(args.output_dir / "stage2_policy.pt", ppo.Agent, "cpu")
    cohort = hydrogel_gym.load_cohort(args.cohort)
    envs = environments.make_envs(args, cohort, torch.device("cpu"))
    designs = evaluation.policy_designs(agent.design, envs)
    best = designs["reward"].sort(descending=True).values[: len(top)]
    assert top["reward"].tolist() == pytest.approx(best.tolist())
    row = cohort.index(top["patient_id"][0])
    assert top["thickness_mm"][0] == pytest.approx(designs["formulation"][row, 3].item())
    heat_map = pictures.polymers_by_scar_size(three_patients, torch.tensor([5, 7, 5])).data[0]
    # scars of 20, 16 and 24 %: Bo, Ann, Cy
    chosen = [[row[tertile] for row in heat_map["z"]].index(1.0) for tertile in range(3)]
    assert chosen == [7, 5, 5]


def scalars(output_dir: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output_dir / "tensorboard")).Reload()
    return {name: events.Scalars(name) for name in events.Tags()["scalars"]}


def test_tensorboard_has_the_same_values_under_the_same_names(tracked):
    args, table, _ = tracked
    logged = scalars(args.output_dir)
    assert set(logged) == {metrics.KEYS[column] for column in table} - {"global_step"}
    for column in table.columns.drop("global_step"):
        values = logged[metrics.KEYS[column]]
        assert [value.step for value in values] == table["global_step"].tolist()
        assert [v.value for v in values] == pytest.approx(table[column].tolist(), rel=1e-6)


@pytest.mark.slow
def test_resumed_run_is_the_same_run_and_tells_all_of_it(ppo, small_run, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(tracking, "say", said.append)
    args = small_run(tmp_path / "run", num_iterations=3, track=True, tensorboard=True)
    with monkeypatch.context() as patch:  # killed in iteration 3, one after the last checkpoint

        def fail_at_three(path, rows):
            directory.write_csv(path, rows)
            if len(rows) == 3:
                raise KeyboardInterrupt

        patch.setattr("hydrogel_gym.runs.run.write_csv", fail_at_three)
        with pytest.raises(KeyboardInterrupt):
            ppo.train(args)
    ppo.train(dataclasses.replace(args, resume="auto"))
    one, two = run_files(args.output_dir)
    assert one.name == two.name  # the id of the run
    assert not any("warning" in line for line in said)
    reason = "W&B: offline (No API key configured. Use `wandb login` to log in.); to upload: wandb"
    assert said[0].startswith(reason)
    steps = pd.read_csv(args.output_dir / "metrics.csv")["global_step"].tolist()
    values = scalars(args.output_dir)["charts/mean_reward"]
    assert [value.step for value in values] == steps


# The newest part of an offline run replaces those before it, and so tells everything.
@pytest.mark.parametrize(("known", "told"), [(5, [6]), (0, [1, 2, 3, 4, 5, 6])])
def test_a_run_that_goes_on_tells_what_the_server_has_not(ppo, cut, monkeypatch, known, told):
    runs = serve(monkeypatch, step=known and known * 192 + 1)
    ppo.train(dataclasses.replace(cut, track=True))  # untracked until now
    (run,) = runs
    assert run.settings["resume"] == "allow"
    assert [step / 192 for step, _ in run.rows] == [*told, 6]  # with the pictures at the end
    assert run.exit_code == 0


@pytest.mark.parametrize(
    ("failing", "warning", "steps"),
    [
        ("log", "without W&B: Connection lost", [1, 2]),
        ("artifact", "without the holdout cohort: Invalid artifact name", [1, 2, 3, 3]),
    ],
)
def test_training_outlives_the_failure_of_a_log(
    ppo, small_run, tmp_path, monkeypatch, capsys, failing, warning, steps
):
    runs = serve(monkeypatch, failing=failing)
    summary = ppo.train(small_run(tmp_path / "run", num_iterations=3, track=True))
    assert summary["iterations"] == 3
    assert [step / 192 for step, _ in runs[0].rows] == steps
    assert warning in capsys.readouterr().err


def test_run_of_wandb_is_named_by_its_directory_launcher_or_sweep(monkeypatch, tmp_path):
    config = dict(preset="quick", policy="factored", env_id="HydrogelDesign-v0", ranks=4)
    runs = serve(monkeypatch)

    def begin(name: str = "run") -> dict:
        (tmp_path / name).mkdir(exist_ok=True)
        tracking.WandbLog(tmp_path / name, config, {}, [])
        return runs[-1].settings

    first, again, branch = (begin(name) for name in ("run", "run", "branch"))
    assert first["id"] == again["id"] != branch["id"]
    assert (first["group"], first["project"], first["name"]) == (None, "hydrogel_gym", "run")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    assert begin()["group"] == "torchrun-job7"
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    assert (begin()["id"], begin()["project"]) == ("r1", None)
    runs = serve(monkeypatch, failing="init")
    assert begin()["mode"] == "offline"  # the server is not reached
    assert "resume" not in runs[-1].settings


def test_training_waits_for_every_log_at_both_ends_but_not_for_ever(monkeypatch):
    begun, gate, never = [], threading.Event(), threading.Event()

    def slow(wait, close=lambda failed: None):
        wait()
        begun.append("log")
        return SimpleNamespace(close=close)

    with tracking.Logs({name: lambda: slow(lambda: time.sleep(0.02)) for name in "ab"}):
        assert len(begun) == 2
    monkeypatch.setattr(tracking, "FIRST_WAIT_SECONDS", 0.01)
    with tracking.Logs({name: lambda: slow(lambda: gate.wait(10)) for name in "ab"}):
        assert len(begun) == 2
        gate.set()
    assert len(begun) == 4
    monkeypatch.setattr(tracking, "LAST_WAIT_SECONDS", 0.01)
    start = time.monotonic()
    with tracking.Logs({"W&B": lambda: slow(time.monotonic, lambda failed: never.wait(20))}):
        pass
    assert time.monotonic() - start < 10.0
    never.set()
