"""What a run tells W&B and TensorBoard, read back from their own files."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import hydrogel_gym
from hydrogel_gym import errors
from hydrogel_gym.runs import (
    checkpoints,
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


@pytest.fixture(scope="module")
def clean_environment() -> Iterator[None]:
    """No account and no settings of W&B, whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in [
            name for name in os.environ if name.startswith(("WANDB_", "TORCHELASTIC"))
        ]:
            patch.delenv(variable)
        patch.setenv("NETRC", os.devnull)
        yield


@pytest.fixture(scope="module")
def tracked(ppo, small_run, tmp_path_factory, clean_environment):
    """Arguments and messages of a run that was logged everywhere, without an account."""
    args = small_run(
        tmp_path_factory.mktemp("tracked") / "run", oracle=True, track=True, tensorboard=True
    )
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(tracking, "say", said.append)
        ppo.train(args)
    return args, said


@pytest.fixture(scope="module")
def offline(tracked) -> OfflineRun:
    (run_file,) = run_files(tracked[0].output_dir)
    return OfflineRun(run_file)


def test_every_row_of_the_metrics_is_logged_at_its_global_step(tracked, offline):
    table = pd.read_csv(tracked[0].output_dir / "metrics.csv")
    assert [row["_step"] for row in offline.history] == table["global_step"].tolist()
    for row, logged in zip(table.to_dict("records"), offline.history, strict=True):
        for column, value in row.items():
            assert logged[metrics.KEYS[column]] == pytest.approx(value, rel=1e-12), column


def test_every_metric_has_a_namespace_and_the_global_step_as_axis(tracked, offline):
    columns = pd.read_csv(tracked[0].output_dir / "metrics.csv").columns
    keys = {metrics.KEYS[column] for column in columns} - {"global_step"}
    assert all(re.fullmatch(r"(charts|losses|reward|eval|perf)/\w+", key) for key in keys)
    for pattern in {key.split("/")[0] + "/*" for key in keys}:
        assert offline.metrics[pattern].step_metric == "global_step"
    assert offline.metrics["eval/holdout_regret"].summary.min
    assert offline.metrics["charts/mean_reward"].summary.max


def test_summary_shows_best_last_and_final_figures(tracked, offline):
    table = pd.read_csv(tracked[0].output_dir / "metrics.csv")
    summary = json.loads((tracked[0].output_dir / "summary.json").read_text())
    assert offline.summary["eval/holdout_regret"]["min"] == pytest.approx(
        table.holdout_regret.min()
    )
    assert offline.summary["charts/mean_reward"]["max"] == pytest.approx(table.mean_reward.max())
    last = offline.summary["eval/holdout_fraction_of_oracle"]  # a sweep's objective is a number
    assert last == pytest.approx(table.holdout_fraction_of_oracle.iloc[-1])
    assert offline.summary["final/holdout_regret"] == pytest.approx(summary["holdout_regret"])
    assert offline.exit_code == 0


def test_config_holds_every_argument_and_what_the_run_depends_on(tracked, offline):
    arguments = options.plain_config(tracked[0]) | {"device": "cpu"}  # requested as "auto"
    assert {name: offline.config[name] for name in arguments} == arguments
    assert offline.config["torch"] == torch.__version__
    assert (offline.config["ranks"], offline.config["hydrogel_gym"]) == (
        1,
        hydrogel_gym.__version__,
    )
    assert len(offline.config["train_cohort_digest"]) == 16


def test_run_has_project_name_job_type_and_tags(offline):
    assert (offline.run.project, offline.run.display_name) == ("hydrogel_gym", "run")
    assert offline.run.job_type == "train"
    assert set(offline.run.tags) == {"quick", "autoregressive", "HydrogelDesign-v0", "1 ranks"}


def test_policy_is_an_artifact_that_comes_of_the_cohorts(tracked, offline):
    policy = offline.artifacts["stage2_policy"]
    assert policy.type == "policy"
    assert not policy.use_after_commit
    (entry,) = policy.manifest.contents
    assert entry.path == "stage2_policy.pt"
    assert entry.size == (tracked[0].output_dir / "stage2_policy.pt").stat().st_size
    used = [artifact for artifact in offline.artifacts.values() if artifact.use_after_commit]
    assert {(artifact.name, artifact.type) for artifact in used} == {
        ("cohort", "cohort"),
        ("cohort_holdout", "cohort"),
    }


def test_patients_of_ones_own_are_named_but_not_uploaded(tracked, offline):
    (entry,) = offline.artifacts["cohort"].manifest.contents
    assert entry.ref == tracked[0].cohort.as_uri()
    assert not entry.local_path


def test_tables_and_pictures_show_the_final_policy(ppo, tracked, offline):
    args, _ = tracked
    tables = {p.name.split("_6")[0]: p for p in offline.files.glob("media/table/eval/*.json")}
    top = json.loads(next(p for n, p in tables.items() if n.startswith("top")).read_text())
    top = pd.DataFrame(top["data"], columns=top["columns"])
    agent, _ = policies.load_policy(args.output_dir / "stage2_policy.pt", ppo.Agent, "cpu")
    cohort = hydrogel_gym.load_cohort(args.cohort)
    designs = evaluation.policy_designs(
        agent.design, environments.make_envs(args, cohort, torch.device("cpu"))
    )
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
    folder = run_files(args.output_dir)[0].parent
    assert said == [
        "W&B: offline (No API key configured. Use `wandb login` to log in.); "
        f"to upload: wandb sync {folder}",
        f"W&B: to upload: wandb sync {folder}",
    ]


def test_tensorboard_has_the_same_values_under_the_same_names(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked[0].output_dir / "tensorboard")).Reload()
    table = pd.read_csv(tracked[0].output_dir / "metrics.csv").set_index("global_step")
    assert set(events.Tags()["scalars"]) == {metrics.KEYS[column] for column in table}
    for column in table:
        scalars = events.Scalars(metrics.KEYS[column])
        assert [scalar.step for scalar in scalars] == table.index.tolist()
        assert [s.value for s in scalars] == pytest.approx(table[column].tolist(), rel=1e-6)


@pytest.mark.slow
def test_logged_run_trains_the_same_weights(ppo, small_run, tracked, tmp_path):
    ppo.train(small_run(tmp_path / "plain", oracle=True))
    plain, logged = (
        torch.load(folder / "stage2_policy.pt", weights_only=True)["policy_state_dict"]
        for folder in (tmp_path / "plain", tracked[0].output_dir)
    )
    assert all(torch.equal(plain[name], logged[name]) for name in plain)


def test_resumed_run_is_the_same_run_and_tells_all_of_it(ppo, small_run, tmp_path, monkeypatch):
    args = small_run(tmp_path / "run", track=True, tensorboard=True)
    with monkeypatch.context() as patch:  # killed in iteration 5, one after the last checkpoint

        def fail_at_five(path, rows):
            directory.write_csv(path, rows)
            if len(rows) == 5:
                raise KeyboardInterrupt

        patch.setattr("hydrogel_gym.runs.run.write_csv", fail_at_five)
        with pytest.raises(KeyboardInterrupt):
            ppo.train(args)
    ppo.train(small_run(tmp_path / "run", track=True, tensorboard=True, resume="auto"))
    first, second = map(OfflineRun, run_files(args.output_dir))
    assert first.run.run_id == second.run.run_id
    assert (first.exit_code, second.exit_code) == (1, 0)
    steps = pd.read_csv(args.output_dir / "metrics.csv")["global_step"].tolist()
    assert [row["_step"] for row in second.history] == steps

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(args.output_dir / "tensorboard")).Reload()
    assert [scalar.step for scalar in events.Scalars("charts/mean_reward")] == steps


@pytest.mark.slow
def test_run_that_branches_off_is_another_run(ppo, small_run, tmp_path):
    ppo.train(small_run(tmp_path / "run", num_iterations=2, track=True))
    checkpoint = checkpoints.checkpoints(tmp_path / "run")[0]
    branch = small_run(tmp_path / "branch", num_iterations=2, track=True, resume=str(checkpoint))
    ppo.train(branch)
    ids = {json.loads((tmp_path / n / "wandb.json").read_text())["id"] for n in ("run", "branch")}
    assert len(ids) == 2


class OnlineRun:
    """A run as W&B's server would have it: it knows the rows up to `step`."""

    offline, url, entity, project, dir = False, "https://example.org/run", "me", "p", "d/files"

    def __init__(self, step: int, failing: str = "", **settings) -> None:
        self.step, self.id, self.settings = step, settings["id"], settings
        self.rows, self.used, self.config, self.failing = [], [], {}, failing
        self.config = SimpleNamespace(update=lambda values, allow_val_change: None)
        self.summary: dict = {}

    def define_metric(self, *_, **__) -> None: ...

    def use_artifact(self, artifact) -> None:
        self.used.append(artifact)

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

    monkeypatch.setattr(
        wandb, "setup", lambda settings: SimpleNamespace(settings=SimpleNamespace(mode="online"))
    )
    for variable in ("WANDB_RUN_ID", "WANDB_SWEEP_ID"):
        monkeypatch.delenv(variable, raising=False)
    return start


def test_resumed_run_logs_online_only_what_the_server_has_not(ppo, small_run, tmp_path, server):
    ppo.train(small_run(tmp_path / "run", num_iterations=4))  # untracked, until it is resumed
    checkpoint = checkpoints.checkpoints(tmp_path / "run")[0]  # of iteration 2
    runs = server(step=3 * 192 + 1)
    ppo.train(
        small_run(
            tmp_path / "run", num_iterations=4, resume=str(checkpoint), overwrite=True, track=True
        )
    )
    (run,) = runs
    assert run.settings["resume"] == "allow"
    assert run.rows == [4 * 192, 4 * 192]  # the fourth row, then the pictures
    assert run.exit_code == 0


@pytest.mark.slow
def test_run_goes_offline_when_the_server_is_not_reached(ppo, small_run, tmp_path, server):
    runs = server(failing="init")
    ppo.train(small_run(tmp_path / "run", num_iterations=2, track=True))
    assert [run.settings["mode"] for run in runs] == ["offline"]
    assert "resume" not in runs[0].settings


def test_training_outlives_the_failure_of_a_log(ppo, small_run, tmp_path, server, monkeypatch):
    said = []
    monkeypatch.setattr(tracking, "say", said.append)
    runs = server(failing="log")
    summary = ppo.train(small_run(tmp_path / "run", track=True))
    assert summary["iterations"] == 6
    assert runs[0].rows == [192, 384]
    assert said[1:] == ["warning: going on without W&B: Connection lost"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["iterations"] == 6


def test_ranks_of_a_launcher_are_one_group(ppo, small_run, tmp_path, server, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    runs = server()
    ppo.train(small_run(tmp_path / "run", num_iterations=2, track=True))
    assert [run.settings["group"] for run in runs] == ["torchrun-job7"]


def test_run_of_a_sweep_takes_id_and_project_of_its_agent(
    ppo, small_run, tmp_path, server, monkeypatch
):
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    monkeypatch.chdir(tmp_path)
    runs = server()
    args = small_run(None, num_iterations=2, track=True)
    assert ppo.train(args)["output_dir"] == "runs/sweep-s1/r1"
    assert (runs[0].settings["id"], runs[0].settings["project"]) == ("r1", None)


def test_nothing_of_wandb_or_tensorboard_is_imported_unasked(ppo, small_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert ppo.train(small_run(tmp_path / "run", num_iterations=2))["iterations"] == 2


@pytest.mark.parametrize(("flag", "package"), [("track", "wandb"), ("tensorboard",) * 2])
def test_missing_library_is_an_error_before_anything_is_done(
    ppo, small_run, tmp_path, monkeypatch, flag, package
):
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.UsageError, match=rf"--{flag} needs {package}: pip install"):
        ppo.train(small_run(tmp_path / "run", **{flag: True}))
    assert not (tmp_path / "run").exists()


def test_training_begins_when_every_log_has_or_none_is_waited_for_any_longer(monkeypatch):
    begun = []

    def slow() -> SimpleNamespace:
        time.sleep(0.2)
        begun.append("slow")
        return SimpleNamespace(close=lambda failed: None)

    with tracking.Logs({"a": slow, "b": slow}):
        assert begun == ["slow", "slow"]
    monkeypatch.setattr(tracking, "FIRST_WAIT_SECONDS", 0.1)
    with tracking.Logs({"a": slow, "b": slow}):
        assert begun == ["slow", "slow"]
    assert len(begun) == 4


@pytest.mark.slow
def test_training_outlives_the_death_of_the_wandb_service(
    small_run, tmp_path, environ_without_wandb
):
    args = small_run(tmp_path / "run")
    flags = "--num-envs 48 --num-steps 4 --num-epochs 1 --minibatch-size 48 --no-oracle --track"
    run = subprocess.Popen(
        [sys.executable, TRAINER, "--preset", "quick", *flags.split(), "--num-iterations", "400"]
        + ["--output-dir", args.output_dir],
        stderr=subprocess.PIPE,
        env=environ_without_wandb | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"},
        text=True,
    )
    metrics = args.output_dir / "metrics.csv"
    deadline = time.monotonic() + 120
    while not (run_files(args.output_dir) and metrics.exists() and len(pd.read_csv(metrics)) > 20):
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
    assert json.loads((args.output_dir / "summary.json").read_text())["iterations"] == 400
