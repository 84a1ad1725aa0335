"""What a run tells W&B and TensorBoard, read back from their own files."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
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

TRAINER = Path(__file__).parents[2] / "train" / "ppo_hybrid.py"
BLOCK = 32768
WHOLE, LAST = 1, 4  # kinds of record in a log of LevelDB's format


def records(run_file: Path) -> Iterator:
    """The records of an offline run: protobuf messages in a log of LevelDB's format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = run_file.read_bytes()
    assert data.startswith(b":W&B")
    position, message = 7, b""
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if position + 7 + length > len(data):
            return
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (WHOLE, LAST):
            record = Record()
            record.ParseFromString(message)
            yield getattr(record, record.WhichOneof("record_type"))
            message = b""


class OfflineRun:
    """What an offline run file holds, in the words of W&B."""

    def __init__(self, run_file: Path) -> None:
        # The last records may be written a moment after W&B says that the run has ended.
        deadline = time.monotonic() + 20
        self._read(run_file)
        while self.exit_code is None and time.monotonic() < deadline:
            time.sleep(0.1)
            self._read(run_file)

    def _read(self, run_file: Path) -> None:
        self.files = run_file.parent / "files"
        self.config, self.summary, self.metrics, self.artifacts = {}, {}, {}, {}
        self.history: list[dict] = []
        self.exit_code = None
        for record in records(run_file):
            kind = type(record).__name__
            if kind == "RunRecord":
                self.run = record
            elif kind == "ConfigRecord":
                self.config |= {i.key: json.loads(i.value_json) for i in record.update if i.key}
            elif kind == "SummaryRecord":
                self.summary |= {name(i): json.loads(i.value_json) for i in record.update}
            elif kind == "MetricRecord":
                self.metrics[record.name or record.glob_name] = record
            elif kind == "HistoryRecord":
                self.history.append({name(i): json.loads(i.value_json) for i in record.item})
            elif kind == "ArtifactRecord":
                self.artifacts[record.name] = record
            elif kind == "RunExitRecord":
                self.exit_code = record.exit_code


def name(item) -> str:
    return item.key or ".".join(item.nested_key)


def run_files(output_dir: Path) -> list[Path]:
    return sorted(
        output_dir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime
    )


@pytest.fixture(scope="module", autouse=True)
def clean_environment() -> Iterator[None]:
    """No account and no settings of W&B, whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in list(os.environ):
            if variable.startswith(("WANDB_", "TORCHELASTIC")):
                patch.delenv(variable)
        patch.setenv("NETRC", os.devnull)
        yield


@pytest.fixture(scope="module")
def tracked(ppo, finished_run, clean_environment):
    """Directory and messages of the shared run, logged everywhere, without an account."""
    args, said = finished_run[0], []
    # Beside the shared run, so that its oracle is found.
    output_dir = Path(tempfile.mkdtemp(prefix="tracked-", dir=args.output_dir.parent))
    logged = dataclasses.replace(args, output_dir=output_dir, track=True, tensorboard=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "say", said.append)
        ppo.train(logged)
    return logged, said


@pytest.fixture(scope="module")
def offline(tracked) -> OfflineRun:
    (run_file,) = run_files(tracked[0].output_dir)
    return OfflineRun(run_file)


@pytest.fixture(scope="module")
def table(tracked) -> pd.DataFrame:
    return pd.read_csv(tracked[0].output_dir / "metrics.csv")


def test_logged_run_trains_the_same_weights(finished_run, tracked, of_runs):
    of_runs.assert_same(tracked[0].output_dir, finished_run[0].output_dir)


def test_every_row_of_the_metrics_is_logged_at_its_global_step(table, offline):
    assert [row["_step"] for row in offline.history] == table["global_step"].tolist()
    for row, logged in zip(table.to_dict("records"), offline.history, strict=True):
        for column, value in row.items():
            assert logged[metrics.KEYS[column]] == pytest.approx(value, rel=1e-12), column
    for namespace in metrics.NAMESPACES:
        assert offline.metrics[f"{namespace}/*"].step_metric == "global_step"
    assert offline.metrics["eval/holdout_regret"].summary.min
    assert offline.metrics["charts/mean_reward"].summary.max


def test_summary_shows_best_last_and_final_figures(tracked, table, offline):
    summary = json.loads((tracked[0].output_dir / "summary.json").read_text())
    expected = pytest.approx(table.holdout_regret.min())
    assert offline.summary["eval/holdout_regret"]["min"] == expected
    assert offline.summary["charts/mean_reward"]["max"] == pytest.approx(table.mean_reward.max())
    last = offline.summary["eval/holdout_fraction_of_oracle"]  # a sweep's objective is a number
    assert last == pytest.approx(table.holdout_fraction_of_oracle.iloc[-1])
    assert offline.summary["final/holdout_regret"] == pytest.approx(summary["holdout_regret"])
    assert offline.exit_code == 0


def test_config_and_labels_say_what_the_run_is_and_depends_on(tracked, offline):
    config = options.plain_config(tracked[0]) | {"device": "cpu"}  # requested as "auto"
    config |= {"torch": torch.__version__, "hydrogel_gym": hydrogel_gym.__version__, "ranks": 1}
    assert {name: offline.config[name] for name in config} == config
    assert len(offline.config["train_cohort_digest"]) == 16
    assert (offline.run.project, offline.run.display_name) == (
        "hydrogel_gym",
        tracked[0].output_dir.name,
    )
    assert offline.run.job_type == "train"
    assert set(offline.run.tags) == {"quick", "autoregressive", "HydrogelDesign-v0", "1 ranks"}


def test_policy_is_an_artifact_that_comes_of_the_cohorts_which_are_not_uploaded(tracked, offline):
    policy = offline.artifacts["stage2_policy"]
    (entry,) = policy.manifest.contents
    assert (policy.type, entry.path) == ("policy", "stage2_policy.pt")
    assert entry.size == (tracked[0].output_dir / "stage2_policy.pt").stat().st_size
    assert not policy.use_after_commit
    used = [artifact for artifact in offline.artifacts.values() if artifact.use_after_commit]
    assert {artifact.name for artifact in used} == {"cohort", "cohort_holdout"}
    for artifact in used:
        assert artifact.type == "cohort"
        (entry,) = artifact.manifest.contents
        assert entry.ref == tracked[0].cohort.with_name(f"{artifact.name}.csv").as_uri()
        assert not entry.local_path


def test_tables_and_pictures_show_the_final_policy(ppo, tracked, offline):
    args, _ = tracked
    tables = {p.name.split("_6")[0]: p for p in offline.files.glob("media/table/eval/*.json")}
    top = json.loads(next(p for n, p in tables.items() if n.startswith("top")).read_text())
    top = pd.DataFrame(top["data"], columns=top["columns"])
    agent, _ = policies.load_policy(args.output_dir / "stage2_policy.pt", ppo.Agent, "cpu")
    cohort = hydrogel_gym.load_cohort(args.cohort)
    envs = environments.make_envs(args, cohort, torch.device("cpu"))
    designs = evaluation.policy_designs(agent.design, envs)
    best = designs["reward"].sort(descending=True).values[: len(top)]
    assert top["reward"].tolist() == pytest.approx(best.tolist())
    row = cohort.index(top["patient_id"][0])
    assert top["thickness_mm"][0] == pytest.approx(designs["formulation"][row, 3].item())
    shares = json.loads(next(p for n, p in tables.items() if n.startswith("poly")).read_text())
    assert sum(share for _, share in shares["data"]) == pytest.approx(1.0)
    (picture,) = offline.files.glob("media/plotly/eval/*.json")
    heat_map = json.loads(picture.read_text())["data"][0]
    assert len(heat_map["y"]) == 24
    for tertile in zip(*heat_map["z"], strict=True):
        assert sum(tertile) == pytest.approx(1.0)


def test_heat_map_counts_by_tertile_of_the_scar(three_patients):
    heat_map = pictures.polymers_by_scar_size(three_patients, torch.tensor([5, 7, 5])).data[0]
    # scars of 20, 16 and 24 %: Bo, Ann, Cy
    chosen = [[row[tertile] for row in heat_map["z"]].index(1.0) for tertile in range(3)]
    assert chosen == [7, 5, 5]


def test_messages_name_the_reason_and_the_command_that_uploads(tracked):
    args, said = tracked
    upload = f"to upload: wandb sync {run_files(args.output_dir)[0].parent}"
    reason = "No API key configured. Use `wandb login` to log in."
    assert said == [f"W&B: offline ({reason}); {upload}", f"W&B: {upload}"]


def scalars(output_dir: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output_dir / "tensorboard")).Reload()
    return {name: events.Scalars(name) for name in events.Tags()["scalars"]}


def test_tensorboard_has_the_same_values_under_the_same_names(tracked, table):
    logged = scalars(tracked[0].output_dir)
    assert set(logged) == {metrics.KEYS[column] for column in table} - {"global_step"}
    for column in table.columns.drop("global_step"):
        values = logged[metrics.KEYS[column]]
        assert [value.step for value in values] == table["global_step"].tolist()
        assert [v.value for v in values] == pytest.approx(table[column].tolist(), rel=1e-6)


@pytest.mark.slow
def test_resumed_run_is_the_same_run_and_tells_all_of_it(ppo, small_run, tmp_path, monkeypatch):
    settings = dict(num_iterations=3, track=True, tensorboard=True)
    args = small_run(tmp_path / "run", **settings)
    with monkeypatch.context() as patch:  # killed in iteration 3, one after the last checkpoint

        def fail_at_three(path, rows):
            directory.write_csv(path, rows)
            if len(rows) == 3:
                raise KeyboardInterrupt

        patch.setattr("hydrogel_gym.runs.run.write_csv", fail_at_three)
        with pytest.raises(KeyboardInterrupt):
            ppo.train(args)
    ppo.train(dataclasses.replace(args, resume="auto"))
    first, second = map(OfflineRun, run_files(args.output_dir))
    assert first.run.run_id == second.run.run_id
    assert (first.exit_code, second.exit_code) == (1, 0)
    steps = pd.read_csv(args.output_dir / "metrics.csv")["global_step"].tolist()
    assert [row["_step"] for row in second.history] == steps
    values = scalars(args.output_dir)["charts/mean_reward"]
    assert [value.step for value in values] == steps


class OnlineRun:
    """A run as W&B's server would have it: it knows the rows up to `step`."""

    offline, url, entity, project, dir = False, "https://example.org/run", "me", "p", "d/files"

    def __init__(self, step: int, failing: str = "", **settings) -> None:
        self.step, self.id, self.settings = step, settings["id"], settings
        self.rows, self.failing = [], failing
        self.config = SimpleNamespace(update=lambda values, allow_val_change: None)
        self.summary: dict = {}

    def define_metric(self, *_, **__) -> None: ...

    def use_artifact(self, artifact) -> None: ...

    def log_artifact(self, artifact, aliases) -> None: ...

    def log(self, values, step) -> None:
        if self.failing == "log" and len(self.rows) == 2:
            raise ConnectionResetError("Connection lost")
        self.rows.append(step)

    def finish(self, exit_code) -> None:
        self.exit_code = exit_code


@pytest.fixture
def server(monkeypatch):
    """Puts a W&B with a server in place of the real one; returns what `init` made."""
    import wandb

    runs = []

    def start(step: int = 0, failing: str = "") -> list[OnlineRun]:
        def init(**settings):
            if failing == "init" and settings.get("mode") != "offline":
                raise wandb.errors.CommError("no such host\nConsider ...")
            runs.append(OnlineRun(step, failing, **settings))
            return runs[-1]

        monkeypatch.setattr(wandb, "init", init)
        return runs

    online = SimpleNamespace(settings=SimpleNamespace(mode="online"))
    monkeypatch.setattr(wandb, "setup", lambda settings: online)
    return start


def test_resumed_run_logs_online_only_what_the_server_has_not(ppo, cut, server):
    runs = server(step=5 * 192 + 1)
    ppo.train(dataclasses.replace(cut, track=True))  # untracked until now
    (run,) = runs
    assert run.settings["resume"] == "allow"
    assert run.rows == [6 * 192, 6 * 192]  # the sixth row, then the pictures
    assert run.exit_code == 0


def test_training_outlives_the_failure_of_a_log(ppo, small_run, tmp_path, server, monkeypatch):
    said = []
    monkeypatch.setattr(tracking, "say", said.append)
    runs = server(failing="log")
    summary = ppo.train(small_run(tmp_path / "run", num_iterations=3, track=True))
    assert summary["iterations"] == 3
    assert runs[0].rows == [192, 384]
    assert said[1:] == ["warning: going on without W&B: Connection lost"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["iterations"] == 3


@pytest.fixture
def begin(server, tmp_path):
    """Begins the log of a run of four ranks; returns the settings of W&B's run."""
    config = dict(preset="quick", policy="factored", env_id="HydrogelDesign-v0", ranks=4)

    def begin(name: str = "run", **how) -> dict:
        runs = server(**how)
        (tmp_path / name).mkdir(exist_ok=True)
        tracking.WandbLog(tmp_path / name, config, {}, [])
        return runs[-1].settings

    return begin


def test_run_goes_offline_when_the_server_is_not_reached(begin):
    settings = begin(failing="init")
    assert settings["mode"] == "offline"
    assert "resume" not in settings


def test_run_that_goes_on_is_the_same_and_one_that_branches_off_another(begin):
    first, again, branch = (begin(name)["id"] for name in ("run", "run", "branch"))
    assert first == again != branch


def test_ranks_of_a_launcher_are_one_group(begin, monkeypatch):
    assert begin()["group"] is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    assert begin()["group"] == "torchrun-job7"


def test_run_of_a_sweep_takes_id_and_project_of_its_agent(begin, monkeypatch):
    assert begin()["project"] == "hydrogel_gym"
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    settings = begin()
    assert (settings["id"], settings["project"]) == ("r1", None)


def test_nothing_of_wandb_or_tensorboard_is_imported_unasked(ppo, small_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert ppo.train(small_run(tmp_path / "run", num_iterations=1))["iterations"] == 1


def test_training_begins_when_every_log_has_or_none_is_waited_for_any_longer(monkeypatch):
    begun, gate = [], threading.Event()

    def slow(wait) -> SimpleNamespace:
        wait()
        begun.append("slow")
        return SimpleNamespace(close=lambda failed: None)

    makers = {name: lambda: slow(lambda: time.sleep(0.02)) for name in "ab"}
    with tracking.Logs(makers):
        assert len(begun) == 2
    monkeypatch.setattr(tracking, "FIRST_WAIT_SECONDS", 0.01)
    with tracking.Logs({name: lambda: slow(lambda: gate.wait(10)) for name in "ab"}):
        assert len(begun) == 2
        gate.set()
    assert len(begun) == 4


@pytest.mark.slow
def test_training_outlives_the_death_of_the_wandb_service(
    small_run, tmp_path, environ_without_wandb
):
    args = small_run(tmp_path / "run")
    flags = "--num-envs 48 --num-steps 4 --num-epochs 1 --minibatch-size 48 --no-oracle --track"
    run = subprocess.Popen(
        [sys.executable, TRAINER, "--preset", "quick", *flags.split(), "--num-iterations", "150"]
        + ["--output-dir", args.output_dir],
        stderr=subprocess.PIPE,
        # W&B waits so long for the service that is gone.
        env=environ_without_wandb
        | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "WANDB_FINISH_TIMEOUT": "5"},
        text=True,
    )
    metrics = args.output_dir / "metrics.csv"
    deadline = time.monotonic() + 120
    while not (run_files(args.output_dir) and metrics.exists() and len(pd.read_csv(metrics)) > 5):
        assert time.monotonic() < deadline
        assert run.poll() is None
        time.sleep(0.05)
    services = subprocess.run(["pgrep", "-P", str(run.pid), "wandb-core"], capture_output=True)
    for process in services.stdout.split():
        os.kill(int(process), signal.SIGKILL)
    _, stderr = run.communicate(timeout=300)
    assert services.stdout
    assert run.returncode == 0
    assert stderr.count("warning: going on without W&B") == 1
    assert json.loads((args.output_dir / "summary.json").read_text())["iterations"] == 150
