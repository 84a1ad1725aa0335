"""The trainer on several ranks: one curve whatever their number, and nothing said twice."""

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
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.distributed as dist

from hydrogel_gym import errors, load_cohort, runs
from hydrogel_gym.runs import compiled, devices, environments, ranks

ROOT = Path(__file__).parents[2]
TRAINER = ROOT / "train" / "ppo_hybrid.py"
TIMING = "rollout_seconds reward_model_seconds update_seconds wall_seconds".split()
TIMING += ["samples_per_second"]
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def on_ranks(size: int, function, folder: Path) -> list[str]:
    """Run a function in so many processes, as `torchrun` would; returns what each one printed.

    Forked, since a fresh process takes seconds to import torch; with one thread each, since those
    of OpenMP do not survive a fork.
    """
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
    }

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
    assert [process.exitcode for process in processes] == [0] * size, printed
    return printed


@pytest.fixture
def train(ppo, monkeypatch, tmp_path, without_pictures):
    """Train on so many ranks; returns what each one printed."""
    monkeypatch.setattr(compiled, "compile_function", lambda function, device: function)
    monkeypatch.setattr("hydrogel_gym.envs.vector.CompiledFunction", lambda function: function)

    def on(size: int, args) -> list[str]:
        monkeypatch.setattr(runs, "read_run_options", lambda *_, **__: args)
        return on_ranks(size, ppo.main, tmp_path)

    return on


def policy(output_dir: Path) -> dict[str, torch.Tensor]:
    saved = torch.load(output_dir / "stage2_policy.pt", weights_only=True)
    return saved["policy_state_dict"]


def assert_same_weights(output_dir: Path, expected_dir: Path, tolerance: float) -> None:
    """Relative to the norm of the weights, and of every buffer."""
    weights, expected = (
        {
            "weights": torch.cat([v.flatten() for k, v in state.items() if is_weight(k)]),
            **{name: value for name, value in state.items() if not is_weight(name)},
        }
        for state in (policy(output_dir), policy(expected_dir))
    )
    for name in expected:
        distance = (weights[name] - expected[name]).norm() / expected[name].norm()
        assert distance <= tolerance, (name, distance)


def is_weight(name: str) -> bool:
    return name.endswith(("weight", "bias", "log_std"))


def metrics(output_dir: Path) -> pd.DataFrame:
    return pd.read_csv(output_dir / "metrics.csv").drop(columns=TIMING)


# --- one curve


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        (dict(precision="fp64"), 1e-9),
        (dict(precision="fp64", compile="on", num_envs=60, minibatch_size=60), 1e-9),
        (
            dict(precision="fp64", horizon=3, patient_assignment="random", target_kl=0.02),
            1e-9,
        ),
        # At a rate that rounding is not amplified by.
        (dict(learning_rate=3e-4), 1e-4),
    ],
    ids=["float64", "float64, compiled", "float64, long random episodes", "float32"],
)
def test_two_ranks_learn_what_one_learns(train, small_run, tmp_path, changes, tolerance):
    args = small_run(tmp_path / "one", num_iterations=5, hidden_dim=32, **changes)
    train(1, args)
    train(2, dataclasses.replace(args, output_dir=tmp_path / "two"))
    assert_same_weights(tmp_path / "two", tmp_path / "one", tolerance)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    pd.testing.assert_frame_equal(one, two, rtol=max(1e-6, 10 * tolerance))
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert (summary["world_size"], summary["samples"]) == (2, one["global_step"].iloc[-1])


def test_four_ranks_learn_what_one_learns(train, small_run, tmp_path):
    args = small_run(tmp_path / "one", num_iterations=2, precision="fp64")
    train(1, args)
    train(4, dataclasses.replace(args, output_dir=tmp_path / "four"))
    assert_same_weights(tmp_path / "four", tmp_path / "one", 1e-9)


def test_ranks_treat_their_own_share_of_the_patients(small_run, tmp_path):
    args = small_run(tmp_path, num_envs=60)
    cohort, device = load_cohort(args.cohort), torch.device("cpu")

    def observed(args, world):
        envs = environments.make_envs(args, cohort, device, num_envs=60 // world.size)
        seen = [environments.first_reset(envs, args, args.seed, len(cohort), world)]
        seen += [envs.step(envs.action_space.sample())[0] for _ in range(3)]
        return torch.stack(seen)

    for assignment in ("fixed", "random"):
        args = dataclasses.replace(args, patient_assignment=assignment)
        shares = [observed(args, ranks.World(rank, 3)) for rank in range(3)]
        assert torch.equal(torch.cat(shares, dim=1), observed(args, ranks.ALONE))


def test_ranks_sample_from_streams_of_their_own(ppo, small_run, tmp_path):
    args = small_run(tmp_path, num_envs=60, minibatch_size=60, patient_assignment="fixed")
    cohort, device = load_cohort(args.cohort), torch.device("cpu")
    learner, _, _ = ppo.make_learner(args, cohort, device, ranks.ALONE, compile=False)

    def presquash(world):
        envs = environments.make_envs(args, cohort, device, num_envs=60 // world.size)
        obs = environments.first_reset(envs, args, args.seed, len(cohort), world)
        generator = torch.Generator().manual_seed(0)
        # Not joined: what would be gathered is this rank's own.
        _, batch, _ = ppo.rollout(envs, learner.agent, obs, args, generator, world=world)
        return batch.action.presquash.view(args.num_steps, -1, 4), generator.get_state()

    whole, state = presquash(ranks.ALONE)
    (first, first_state), (second, second_state) = (presquash(ranks.World(r, 2)) for r in range(2))
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    assert not torch.isclose(first, second).any()
    assert torch.equal(first_state, state)
    assert torch.equal(second_state, state)


def test_minibatches_of_all_ranks_make_up_those_of_one(ppo):
    samples = torch.arange(240.0)
    zeros = torch.zeros(240)
    action = ppo.HybridAction(zeros, zeros, zeros)
    batch = ppo.Batch(samples, action, zeros, samples.square(), zeros, zeros)
    args = ppo.Args(minibatch_size=60, num_epochs=2)

    def minibatches(world):
        seen = []

        def step(minibatch):
            seen.append(minibatch)
            return {"policy_loss": zeros.sum()}

        ppo.update(step, batch, args, torch.Generator().manual_seed(0), world)
        return seen

    whole = minibatches(ranks.ALONE)
    shares = [minibatches(ranks.World(rank, 3)) for rank in range(3)]
    assert len(whole) == 8
    for expected, *parts in zip(whole, *shares, strict=True):
        assert [len(part.logprob) for part in parts] == [20, 20, 20]
        for name in ("obs", "advantage"):
            together = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(together, getattr(expected, name))
        # Of the whole minibatch, not of a rank's share.
        assert abs(expected.advantage.mean()) < 1e-6
        assert abs(expected.advantage.std(correction=0) - 1.0) < 1e-6


# --- interruptions


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(train, small_run, tmp_path, before, after):
    args = small_run(tmp_path / "whole", num_iterations=5, precision="fp64", horizon=3)
    train(1, args)
    run = dataclasses.replace(args, output_dir=tmp_path / "run")
    train(before, run)
    for path in (run.output_dir / "checkpoints").iterdir():
        if path.name > "checkpoint-000002.pt":
            path.unlink()
    (run.output_dir / "summary.json").unlink()
    printed = train(after, dataclasses.replace(run, resume="auto"))
    assert_same_weights(run.output_dir, tmp_path / "whole", 1e-9)
    pd.testing.assert_frame_equal(metrics(run.output_dir), metrics(tmp_path / "whole"), rtol=1e-6)
    assert ("ranks: 2 in the checkpoint, now 1" in printed[0]) == ((before, after) == (2, 1))


def test_a_signal_to_one_rank_stops_all_after_the_same_iteration(
    ppo, train, small_run, tmp_path, monkeypatch
):
    plain, rollouts = ppo.rollout, []

    def rollout(*args):
        rollouts.append(1)
        if os.environ["RANK"] == "1" and len(rollouts) == 3:
            # As a launcher does, which passes on a signal that the rank got already.
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        return plain(*args)

    monkeypatch.setattr(ppo, "rollout", rollout)
    main, codes = ppo.main, tmp_path / "codes"
    codes.mkdir()

    def note_code():
        (codes / os.environ["RANK"]).write_text(str(main()))

    monkeypatch.setattr(ppo, "main", note_code)
    args = small_run(tmp_path / "run")
    train(2, args)
    assert [(codes / rank).read_text() for rank in "01"] == ["130", "130"]
    assert metrics(args.output_dir)["iteration"].tolist() == [1, 2, 3]
    assert (args.output_dir / "checkpoints" / "checkpoint-000003.pt").exists()


def test_only_the_first_rank_prints(train, small_run, tmp_path):
    printed = train(2, small_run(tmp_path / "run", num_iterations=1))
    assert "holdout_deterministic_reward" in printed[0]
    assert printed[1] == ""


def test_losing_a_rank_ends_the_others_with_one_line(ppo, train, small_run, tmp_path, monkeypatch):
    plain, main = ppo.update, ppo.main

    def update(*args):
        if os.environ["RANK"] == "1":
            os._exit(0)
        return plain(*args)

    def first_fails():
        assert main() == (0 if os.environ["RANK"] == "1" else 1)

    monkeypatch.setattr(ppo, "update", update)
    monkeypatch.setattr(ppo, "main", first_fails)
    printed = train(2, small_run(tmp_path / "run"))[0]
    assert "\nerror: another rank was lost: " in printed
    assert "Traceback" not in printed


# --- bad input


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        (
            dict(num_envs=2000),
            3,
            "--num-envs is 2000, which 3 ranks cannot share equally; near it they can share 1998 "
            "or 2001; 2000 can be shared by 2, 4, 5, 8, 10, 16, 20, 25 ...",
        ),
        (dict(num_envs=2), 4, "near it they can share 4; 2 can be shared by 2 ..."),
        (
            dict(num_envs=80, num_steps=5, minibatch_size=100),
            8,
            "--minibatch-size is 100, which does not divide the batch of num_envs x num_steps = "
            "400, or which 8 ranks cannot share equally; near it these do: 8, 16, 40, 80",
        ),
    ],
    ids=["envs", "more ranks than envs", "minibatch"],
)
def test_what_ranks_cannot_share_is_answered_with_what_they_can(
    ppo, small_run, tmp_path, changes, size, message
):
    args = small_run(tmp_path, **(dict(minibatch_size=8) | changes))
    with pytest.raises(errors.UsageError, match=re.escape(message)):
        ppo.check_args(args, ranks.World(size=size))


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(errors.UsageError, match="--device cuda for 2 ranks .* which has 1 GPUs"):
        devices.resolve_device("cuda", ranks.World(0, 4, 2))
    with pytest.raises(errors.UsageError, match="--device cuda:0 for 2 ranks"):
        devices.resolve_device("cuda:0", ranks.World(0, 4, 2))


def test_a_batch_that_every_rank_gathers_counts_against_the_memory(monkeypatch):
    monkeypatch.setattr(devices, "available_bytes", lambda _: 1_000_000_000)
    cpu = torch.device("cpu")
    devices.check_rollout_memory(1_000_000, 1, cpu, ranks.ALONE)
    too_large = "needs about 0.9 GB .* 0.5 GB left; 555,555 samples"
    with pytest.raises(errors.UsageError, match=too_large):
        devices.check_rollout_memory(1_000_000, 1, cpu, ranks.World(0, 2, 2))


# --- with the launcher


LONG, SHORT_WAIT = timedelta(seconds=30), timedelta(seconds=0.2)


def test_ranks_that_were_started_again_find_nothing_of_those_before_them():
    store = dist.HashStore()
    store.set("address", "of a dead rank")
    for _ in range(2):
        with ThreadPoolExecutor(3) as threads:
            parts = list(
                threads.map(
                    lambda rank: ranks.unused_store_prefix(store, ranks.World(rank, 3), LONG),
                    (1, 2, 0),
                )
            )
        assert not any(part.check(["address"]) for part in parts)
        parts[0].set("address", "of a living one")
        assert [part.get("address") for part in parts] == [b"of a living one"] * 3


def test_a_rank_waits_for_rank_0_and_takes_no_answer_to_an_earlier_one():
    store = dist.HashStore()
    store.set("rank 1 asks as", "one that was lost before it had an answer")
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(ranks.unused_store_prefix, store, ranks.World(0, 2), LONG)
        with pytest.raises(TimeoutError):
            first.result(0.1)
        second = threads.submit(ranks.unused_store_prefix, store, ranks.World(1, 2), LONG)
        first.result(10).set("key", "value")
        assert second.result(10).get("key") == b"value"


def test_a_rank_that_does_not_come_in_time_is_named():
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(ranks.unused_store_prefix, store, ranks.World(0, 3), SHORT_WAIT)
        threads.submit(ranks.unused_store_prefix, store, ranks.World(1, 3), LONG)
        with pytest.raises(ranks.RankLostError, match="rank 2 did not join within 0:00:00.2"):
            first.result(10)


def test_a_rank_that_waits_for_rank_0_in_vain_names_it():
    with pytest.raises(ranks.RankLostError, match="rank 0 did not join within 0:00:00.2"):
        ranks.unused_store_prefix(dist.HashStore(), ranks.World(1, 2), SHORT_WAIT)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer [10.0.0.2]:1234"),
        RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms"),
        dist.DistNetworkError("failed to recv, got 0 bytes"),
        dist.DistStoreError("wait timeout after 300ms"),
        dist.DistBackendError("NCCL error: remote process exited"),
    ],
    ids=["gloo, closed", "gloo, late", "network", "store", "nccl"],
)
def test_a_collective_that_fails_for_want_of_a_rank_says_so(monkeypatch, error):
    with pytest.raises(ranks.RankLostError) as raised:
        average_failing_with(error, monkeypatch)
    assert str(raised.value) == f"another rank was lost: {error}"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.OutOfMemoryError("CUDA out of memory, while a peer was written to"),
        RuntimeError("[alloc_cpu.cpp:113] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
        RuntimeError("gloo: DefaultCPUAllocator: can't allocate memory: 8 bytes"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        ValueError("Connection closed by peer"),
    ],
    ids=["cuda", "cuda, of a peer", "cpu", "cpu, in gloo", "shapes", "no error of a runtime"],
)
def test_a_collective_that_fails_by_itself_is_not_taken_for_a_lost_rank(monkeypatch, error):
    with pytest.raises(type(error)) as raised:
        average_failing_with(error, monkeypatch)
    assert raised.value is error


def average_failing_with(error, monkeypatch):
    """The mean over two ranks, whose message fails."""

    def fail(*_):
        raise error

    monkeypatch.setattr(dist, "all_reduce", fail)
    ranks.World(0, 2, joined=True).average(torch.ones(3))


# --- a launcher of one rank


@pytest.fixture
def launched_alone(monkeypatch):
    """The environment that a launcher gives its only rank."""
    launcher = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "1"}
    # A port that nobody listens at.
    for name, value in (launcher | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)


def test_a_launched_rank_that_is_alone_trains_as_if_it_were_not_launched(
    ppo, small_run, tmp_path, without_pictures, monkeypatch, request
):
    args = small_run(tmp_path / "plain", num_iterations=2)
    ppo.train(args)
    request.getfixturevalue("launched_alone")
    monkeypatch.setattr(dist, "init_process_group", None)  # would fail
    assert ranks.world_from_environment() == ranks.World(launched=True)
    summary = ppo.train(dataclasses.replace(args, output_dir=tmp_path / "launched"))
    assert_same_weights(tmp_path / "launched", tmp_path / "plain", 0.0)
    pd.testing.assert_frame_equal(metrics(tmp_path / "launched"), metrics(tmp_path / "plain"))
    assert summary["world_size"] == 1


@pytest.mark.parametrize(("name", "index"), [("cuda", 3), ("cuda:1", 1)])
def test_a_launched_rank_takes_the_device_that_its_launcher_gives_it(
    launched_alone, monkeypatch, name, index
):
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)  # there may be no such device
    device = devices.resolve_device(name, ranks.world_from_environment())
    assert device == torch.device("cuda", index)


def torchrun(size: int, *flags: str, launcher: tuple[str, ...] = ()) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*command, f"--nproc-per-node={size}", *launcher, str(TRAINER), *flags]


SHORT = ("--preset", "quick", "--num-envs", "64", "--num-steps", "4", "--minibatch-size", "64")
SHORT += ("--hidden-dim", "16", "--no-oracle", "--checkpoint-interval", "5")


def ranks_of(launcher: subprocess.Popen) -> dict[int, int]:
    """Process of each rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int(re.search(r"^PPid:\s+(\d+)", (path / "status").read_text(), re.M)[1])
            environment = (path / "environ").read_bytes().split(b"\0")
            if parent == launcher.pid:
                rank = next(v for v in environment if v.startswith(b"RANK="))
                found[int(rank[5:])] = int(path.name)
    return found


def wait_for(condition, seconds: float = 60.0):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


@pytest.mark.slow
def test_a_launched_run_learns_what_one_process_learns(tmp_path):
    # The launcher gives each rank one thread, and more would make other initial weights.
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    flags = [*SHORT, "--num-iterations", "5", "--precision", "fp64", "--output-dir"]
    for command, name in (([sys.executable, str(TRAINER)], "one"), (torchrun(2), "two")):
        subprocess.run(
            [*command, *flags, str(tmp_path / name)], env=one_thread, check=True, timeout=120
        )
    assert_same_weights(tmp_path / "two", tmp_path / "one", 1e-9)


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_goes_on_by_itself(tmp_path):
    flags = [*SHORT, "--num-iterations", "60", "--resume", "auto"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    process = subprocess.Popen(
        torchrun(2, *flags, "--output-dir", str(run), launcher=("--max-restarts=1",)),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    wait_for((run / "checkpoints" / "checkpoint-000010.pt").exists)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    assert process.wait(120) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["resumed_at_iteration"] >= 10
    subprocess.run(
        torchrun(2, *flags, "--output-dir", str(whole)),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )
    assert_same_weights(run, whole, 0.0)
    pd.testing.assert_frame_equal(metrics(run), metrics(whole))


@pytest.mark.slow
def test_a_bad_request_to_several_ranks_is_named(tmp_path):
    result = subprocess.run(
        torchrun(2, *SHORT, "--num-envs", "63", "--output-dir", str(tmp_path / "run")),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode != 0
    # By whichever rank is first, since the launcher then ends the other.
    assert "error: --num-envs is 63, which 2 ranks cannot share" in result.stderr
    assert not (tmp_path / "run").exists()


@no_cuda
@pytest.mark.slow
@pytest.mark.parametrize("compile", ["off", "on"])
def test_a_launched_run_on_cuda_learns_what_one_process_learns(tmp_path, compile):
    size = torch.cuda.device_count()  # one rank exercises NCCL and the split graphs too
    flags = [*SHORT, "--num-iterations", "5", "--precision", "fp64", "--compile", compile]
    for command, name in (([sys.executable, str(TRAINER)], "one"), (torchrun(size), "all")):
        subprocess.run(
            [*command, *flags, "--output-dir", str(tmp_path / name)], check=True, timeout=300
        )
    assert_same_weights(tmp_path / "all", tmp_path / "one", 1e-9)


SLURM_COMMANDS = {
    # exec: the step is this process
    "srun": 'echo $$ > "$STUBS/step"\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    "scancel": '[[ $1 == --signal=USR1 && $2 == 7 ]] && kill -USR1 "$(cat "$STUBS/step")"\n',
    # The real one ends the job, by SIGTERM to its steps.
    "scontrol": "if [[ $1 == show ]]; then echo 127.0.0.1; exit; fi\n"
    'echo "$*" > "$STUBS/requeued"\nkill -TERM "$(cat "$STUBS/step")"\n',
}


@pytest.mark.slow
def test_a_slurm_job_saves_when_warned_and_goes_on_when_it_is_queued_again(tmp_path):
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
    assert metrics(run)["iteration"].tolist() == list(range(1, 151))
