"""Several ranks: one curve whatever their number, nothing said twice, and a lost one is named."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hydrogel_gym import errors, runs
from hydrogel_gym.runs import ranks

ROOT = Path(__file__).parents[2]
TRAINER = ROOT / "train" / "ppo_hybrid.py"
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def free_port() -> int:
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            socket.create_connection(listener.getsockname(), timeout=2).close()
        except OSError as error:
            pytest.skip(f"ranks of one machine talk by its loopback interface: {error}")
        return listener.getsockname()[1]


def on_ranks(size: int, function, folder: Path, codes=None) -> list[str]:
    """Run a function in so many processes, as `torchrun` would; returns what each one printed.

    Forked, since a fresh process takes seconds to import torch; with one thread each, since those
    of OpenMP do not survive a fork.
    """
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(size))

    def work(rank: int) -> None:
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
        torch.set_num_threads(1)
        with (folder / f"printed-{rank}").open("w", buffering=1) as printed:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                code = function()
            printed.flush()
        os._exit(code or 0)

    # What an optimiser imports at its first step, or every rank would for itself: seconds.
    importlib.import_module("torch._dynamo")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        if process.exitcode is None:
            process.kill()
    printed = [(folder / f"printed-{rank}").read_text() for rank in range(size)]
    assert [process.exitcode for process in processes] == (codes or [0] * size), printed
    return printed


@pytest.fixture
def train(ppo, monkeypatch, tmp_path, uncompiled):
    """Train on so many ranks; returns what each one printed."""

    def on(size: int, args, codes=None) -> list[str]:
        monkeypatch.setattr(runs, "read_run_options", lambda *_, **__: args)
        return on_ranks(size, ppo.main, tmp_path, codes)

    return on


# --- one curve


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, dict(horizon=3, patient_assignment="random", target_kl=0.02)),
        pytest.param(2, dict(compile="on", num_envs=60, minibatch_size=60), marks=pytest.mark.slow),
        pytest.param(4, {}, marks=pytest.mark.slow),
    ],
    ids=["long random episodes", "compiled", "four ranks"],
)
def test_several_ranks_learn_what_one_learns_and_the_first_alone_says_so(
    train, small_run, of_runs, tmp_path, size, changes
):
    args = small_run(tmp_path / "one", num_iterations=4, precision="fp64", **changes)
    train(1, args)
    printed = train(size, dataclasses.replace(args, output_dir=tmp_path / "several"))
    of_runs.assert_same(tmp_path / "several", tmp_path / "one", 1e-9)
    summary = json.loads((tmp_path / "several" / "summary.json").read_text())
    assert (summary["world_size"], summary["samples"]) == (size, 16 * args.num_envs)
    assert "holdout_deterministic_reward" in printed[0]
    assert f"written to  {tmp_path / 'several'}" in printed[0]
    assert printed[1:] == [""] * (size - 1)


# --- interruptions


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_with_two_or_one(train, small_run, of_runs, tmp_path):
    args = small_run(tmp_path / "whole", num_iterations=4, precision="fp64", horizon=3)
    train(1, args)
    run = dataclasses.replace(args, output_dir=tmp_path / "run")
    train(2, run)
    for after in (1, 2):
        resumed = of_runs.killed(run, tmp_path / f"resumed-{after}", at=2)
        printed = train(after, resumed)
        of_runs.assert_same(resumed.output_dir, args.output_dir, 1e-9)
        assert ("ranks: 2 in the checkpoint, now 1" in printed[0]) == (after == 1)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_same_iteration(
    ppo, train, small_run, of_runs, tmp_path, monkeypatch
):
    plain, rollouts = ppo.rollout, []

    def rollout(*args, **kwargs):
        rollouts.append(1)
        if os.environ["RANK"] == "1" and len(rollouts) == 3:
            # As a launcher does, which passes on a signal that the rank got already.
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        return plain(*args, **kwargs)

    monkeypatch.setattr(ppo, "rollout", rollout)
    args = small_run(tmp_path / "run")
    train(2, args, codes=[130, 130])
    assert of_runs.metrics(args.output_dir)["iteration"].tolist() == [1, 2, 3]
    assert of_runs.iterations_saved(args.output_dir) == [2, 3]


def test_losing_a_rank_ends_the_others_with_one_line(ppo, train, small_run, tmp_path, monkeypatch):
    plain = ppo.update

    def update(*args):
        if os.environ["RANK"] == "1":
            os._exit(0)
        return plain(*args)

    monkeypatch.setattr(ppo, "update", update)
    printed = train(2, small_run(tmp_path / "run"), codes=[1, 0])[0]
    assert "\nerror: another rank was lost: " in printed
    assert "Traceback" not in printed


# --- joining


LONG, SHORT_WAIT = timedelta(seconds=30), timedelta(seconds=0.2)


def test_ranks_that_were_started_again_find_nothing_of_those_before_them():
    store = dist.HashStore()
    store.set("address", "of a dead rank")
    store.set("rank 1 asks as", "one that was lost before it had an answer")
    for _ in range(2):
        with ThreadPoolExecutor(3) as threads:
            joining = [
                threads.submit(ranks.unused_store_prefix, store, ranks.World(rank, 3), LONG)
                for rank in (0, 2)
            ]
            with pytest.raises(TimeoutError):
                joining[0].result(0.1)  # waits for all
            parts = [ranks.unused_store_prefix(store, ranks.World(1, 3), LONG)]
            parts += [each.result(10) for each in joining]
        assert not any(part.check(["address"]) for part in parts)
        parts[0].set("address", "of a living one")
        assert [part.get("address") for part in parts] == [b"of a living one"] * 3


def test_a_rank_that_does_not_come_in_time_is_named():
    store = dist.HashStore()
    with pytest.raises(ranks.RankLostError, match="rank 0 did not join within 0:00:00.2"):
        ranks.unused_store_prefix(store, ranks.World(1, 3), SHORT_WAIT)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(ranks.unused_store_prefix, store, ranks.World(0, 3), SHORT_WAIT)
        threads.submit(ranks.unused_store_prefix, store, ranks.World(1, 3), LONG)
        with pytest.raises(ranks.RankLostError, match="rank 2 did not join within 0:00:00.2"):
            first.result(10)


def test_ranks_that_no_launcher_set_or_that_cannot_meet_are_refused(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        there = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
        for changed, message in (
            (dict(RANK="first"), r"\$RANK is 'first'; allowed: a whole number"),
            (dict(RANK="2"), r"\$RANK is 2; allowed: below \$WORLD_SIZE, 2"),
            (dict(MASTER_PORT=""), r"\$MASTER_PORT is not set; allowed: a port"),
            ({}, f"the ranks cannot meet at localhost:{port}: "),
        ):
            for name, value in (there | changed).items():
                monkeypatch.setenv(name, value)
            with pytest.raises(errors.UsageError, match=message):
                ranks.connect(ranks.world_from_environment(), torch.device("cpu"))


def test_a_collective_that_fails_for_want_of_a_rank_says_so(monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(dist, "all_reduce", fail)
    for error, is_lost in (
        (RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer [10.0.0.2]"), 1),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), 1),
        (dist.DistBackendError("NCCL error: remote process exited"), 1),
        (torch.OutOfMemoryError("CUDA out of memory, while a peer was written to"), 0),
        (RuntimeError("gloo: DefaultCPUAllocator: can't allocate memory: 8 bytes"), 0),
        (ValueError("Connection closed by peer"), 0),
    ):
        with pytest.raises(Exception, match=re.escape(str(error))) as raised:
            ranks.World(0, 2, joined=True).average(torch.ones(3))
        assert isinstance(raised.value, ranks.RankLostError) is bool(is_lost)
        assert str(raised.value) == is_lost * "another rank was lost: " + str(error)


# --- with a launcher


def test_a_launched_rank_that_is_alone_trains_as_if_it_were_not_launched(
    ppo, finished_run, of_runs, monkeypatch
):
    launcher = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "1"}
    # A port that nobody listens at.
    for name, value in (launcher | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", None)  # would fail
    assert ranks.world_from_environment() == ranks.World(launched=True)
    args, _ = finished_run
    launched = dataclasses.replace(args, output_dir=args.output_dir.parent / "launched")
    assert ppo.train(launched)["world_size"] == 1
    of_runs.assert_same(launched.output_dir, args.output_dir)


def torchrun(size: int, *flags: str) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*command, f"--nproc-per-node={size}", str(TRAINER), *flags]


SHORT = ("--preset", "quick", "--num-envs", "64", "--num-steps", "4", "--minibatch-size", "64")
SHORT += ("--hidden-dim", "16", "--no-oracle", "--checkpoint-interval", "5")


def wait_for(condition, seconds: float = 60.0):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "compile"),
    [("cpu", "off"), *(pytest.param("cuda", each, marks=no_cuda) for each in ("off", "on"))],
)
def test_a_launched_run_learns_what_one_process_learns(of_runs, tmp_path, device, compile):
    # The launcher gives each rank one thread, and more would make other initial weights.
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    # One rank on CUDA exercises NCCL and the split graphs too.
    size = 2 if device == "cpu" else torch.cuda.device_count()
    flags = [*SHORT, "--num-iterations", "5", "--precision", "fp64", "--device", device]
    for command, name in (([sys.executable, str(TRAINER)], "one"), (torchrun(size), "all")):
        command = [*command, *flags, "--compile", compile, "--output-dir", str(tmp_path / name)]
        subprocess.run(command, env=one_thread, check=True, timeout=300)
    of_runs.assert_same(tmp_path / "all", tmp_path / "one", 1e-9)


SLURM_COMMANDS = {
    # exec: the step is this process
    "srun": 'echo $$ > "$STUBS/step"\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    "scancel": '[[ $1 == --signal=USR1 && $2 == 7 ]] && kill -USR1 "$(cat "$STUBS/step")"\n',
    # The real one ends the job, by SIGTERM to its steps.
    "scontrol": "if [[ $1 == show ]]; then echo 127.0.0.1; exit; fi\n"
    'echo "$*" > "$STUBS/requeued"\nkill -TERM "$(cat "$STUBS/step")"\n',
}


@pytest.mark.slow
def test_a_slurm_job_saves_when_warned_and_goes_on_when_it_is_queued_again(of_runs, tmp_path):
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, body in SLURM_COMMANDS.items():
        (stubs / name).write_text(f"#!/usr/bin/env bash\nset -eu\n{body}")
        (stubs / name).chmod(0o755)
    job = {
        "PATH": f"{stubs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "STUBS": str(stubs),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "OMP_NUM_THREADS": "1",
        "REQUEUE_AFTER": "2",
    }
    run = tmp_path / "run"
    flags = [*SHORT, "--num-iterations", "150", "--checkpoint-interval", "1000"]
    flags += ["--output-dir", str(run)]
    command = ["bash", str(ROOT / "train" / "slurm.sbatch"), *flags]

    first = subprocess.Popen(command, cwd=ROOT, env=os.environ | job)
    wait_for((run / "metrics.csv").exists)
    first.send_signal(signal.SIGUSR1)
    wait_for(lambda: list((run / "checkpoints").glob("*.pt")))  # on the warning
    assert first.wait(60) != 0
    assert (stubs / "requeued").read_text() == "requeue 7\n"
    saved = sorted(path.name for path in (run / "checkpoints").glob("*.pt"))
    assert len(saved) == 2  # and on the signal to stop
    again = subprocess.run(
        command, cwd=ROOT, env=os.environ | job | {"SLURM_RESTART_COUNT": "1"}, timeout=120
    )
    assert again.returncode == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["resumed_at_iteration"] == int(saved[-1][11:17])
    assert of_runs.metrics(run)["iteration"].tolist() == list(range(1, 151))
