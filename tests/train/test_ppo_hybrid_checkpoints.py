"""Interrupted runs of the trainer: what is saved, what goes on, what is refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import hydrogel_gym
from hydrogel_gym import errors
from hydrogel_gym.files import write_atomically
from hydrogel_gym.problem.dynamics import State
from hydrogel_gym.runs import checkpoints, compiled, directory, ranks, signals

pytestmark = pytest.mark.usefixtures("without_pictures")

TIMING = "rollout_seconds reward_model_seconds update_seconds wall_seconds".split()
TIMING += ["samples_per_second"]


@pytest.fixture(scope="module")
def finished(ppo, small_run, tmp_path_factory):
    """A run of six iterations that nothing interrupted."""
    args = small_run(tmp_path_factory.mktemp("finished") / "run")
    ppo.train(args)
    return args


def checkpoint(output_dir: Path, iteration: int) -> Path:
    return output_dir / "checkpoints" / f"checkpoint-{iteration:06d}.pt"


def killed(args, output_dir: Path, *, at: int = 4):
    """What a run leaves that was killed after iteration 5: its newest checkpoint is of `at`."""
    shutil.copytree(args.output_dir, output_dir)
    for path in (output_dir / "checkpoints").iterdir():
        if path.name > checkpoint(output_dir, at).name:
            path.unlink()
    for name in ("summary.json", "stage2_policy.pt"):
        (output_dir / name).unlink()
    metrics = output_dir / "metrics.csv"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:6]))
    return dataclasses.replace(args, output_dir=output_dir, resume="auto")


def assert_same_run(output_dir: Path, expected_dir: Path) -> None:
    """Weights, figures and every column but the timing ones are bit-equal."""
    run, expected = (
        torch.load(folder / "stage2_policy.pt", weights_only=True)["policy_state_dict"]
        for folder in (output_dir, expected_dir)
    )
    assert all(torch.equal(run[name], expected[name]) for name in expected)
    table, expected_table = (
        pd.read_csv(folder / "metrics.csv", dtype=str)  # to the last digit
        for folder in (output_dir, expected_dir)
    )
    pd.testing.assert_frame_equal(table.drop(columns=TIMING), expected_table.drop(columns=TIMING))
    assert table["wall_seconds"].astype(float).is_monotonic_increasing
    summary, expected_summary = (
        json.loads((folder / "summary.json").read_text()) for folder in (output_dir, expected_dir)
    )
    for name in ("mean_reward", "entropy", "polymer_share", "holdout_deterministic_reward"):
        assert summary[name] == expected_summary[name]


# --- going on


def test_a_resumed_run_is_the_uninterrupted_one(ppo, finished, tmp_path):
    args = killed(finished, tmp_path / "run")
    summary = ppo.train(args)
    assert_same_run(args.output_dir, finished.output_dir)
    assert (summary["resumed_at_iteration"], summary["iterations"]) == (4, 6)


@pytest.fixture
def noisy_env(register_design):
    """Design problem whose outcomes draw from torch's own generator."""
    model = hydrogel_gym.load_reward_model("mechanistic")

    def noisy(*design):
        outcomes = model(*design)
        noise = 0.1 * torch.randn_like(outcomes.delta_ef_pct)
        return outcomes._replace(delta_ef_pct=outcomes.delta_ef_pct + noise)

    return register_design("NoisyDesign-v0", noisy)


@pytest.mark.parametrize(
    "changes",
    [
        dict(horizon=3, patient_assignment="random"),
        dict(precision="fp64", policy="factored", state_std=False),
        dict(compile="on", target_kl=0.01),
        dict(env_id="NoisyDesign-v0"),
    ],
    ids=["in the middle of an episode", "float64", "compiled", "a model that draws"],
)
def test_every_kind_of_run_is_resumed_where_it_was(
    ppo, small_run, noisy_env, tmp_path, monkeypatch, changes
):
    monkeypatch.setattr(compiled, "compile_function", lambda function, device: function)
    monkeypatch.setattr("hydrogel_gym.envs.vector.CompiledFunction", lambda function: function)
    args = small_run(tmp_path / "whole", **changes)
    ppo.train(args)
    resumed = killed(args, tmp_path / "run")
    ppo.train(resumed)
    assert_same_run(resumed.output_dir, args.output_dir)


@pytest.fixture
def learner_of(ppo, small_run, tmp_path, monkeypatch):
    """Makes a learner in float64, and how it takes a gradient step, compiled or not."""
    monkeypatch.setattr(compiled, "compile_function", lambda function, device: function)
    monkeypatch.setattr("hydrogel_gym.envs.vector.CompiledFunction", lambda function: function)
    args = small_run(tmp_path, precision="fp64")
    cohort = hydrogel_gym.load_cohort(args.cohort)

    def make(compile: bool):
        made = ppo.make_learner(args, cohort, torch.device("cpu"), ranks.ALONE, compile)
        learner, _, step = made
        learner.optimizer.param_groups[0]["lr"] = 1e-2
        return learner, step

    return make


@pytest.mark.parametrize("compile", [False, True], ids=["plain first", "compiled first"])
def test_the_optimiser_of_either_step_goes_on_in_the_other(ppo, learner_of, compile):
    (whole, step), (other, going_on) = learner_of(compile), learner_of(not compile)
    obs = torch.randn(32, 13, dtype=torch.float64)
    with torch.no_grad():
        output = whole.agent(obs)
    numbers = torch.randn(3, 32, dtype=torch.float64)
    batch = ppo.Batch(obs, output.action, output.logprob, *numbers)
    for _ in range(3):
        step(batch)
    other.agent.load_state_dict(whole.agent.state_dict())
    checkpoints.load_adam_state(other.optimizer, checkpoints.adam_state(whole.optimizer))
    for _ in range(3):
        step(batch)
        going_on(batch)
    pairs = zip(other.agent.parameters(), whole.agent.parameters(), strict=True)
    for weight, expected in pairs:
        torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-11)
    state, expected = (checkpoints.adam_state(each.optimizer) for each in (other, whole))
    assert state["num_updates"] == expected["num_updates"] == 6
    torch.testing.assert_close(state["square"], expected["square"], rtol=1e-9, atol=1e-15)


def test_the_state_of_an_optimiser_that_did_nothing_yet_is_saved_too():
    state = checkpoints.adam_state(torch.optim.Adam(torch.nn.Linear(2, 3).parameters()))
    assert state["num_updates"] == 0
    assert torch.equal(state["mean"], torch.zeros(9))
    assert torch.equal(state["square"], torch.zeros(9))


def test_resuming_a_finished_run_repeats_its_figures_without_training(
    ppo, finished, tmp_path, monkeypatch
):
    shutil.copytree(finished.output_dir, tmp_path / "run")
    monkeypatch.setattr(ppo, "rollout", None)  # would fail
    ppo.train(dataclasses.replace(finished, output_dir=tmp_path / "run", resume="auto"))
    assert_same_run(tmp_path / "run", finished.output_dir)


def test_auto_begins_at_the_start_where_there_is_nothing_to_resume(
    ppo, finished, small_run, tmp_path
):
    args = small_run(tmp_path / "run", resume="auto")
    args.output_dir.mkdir()
    (args.output_dir / "metrics.csv").write_text("what a run left that was killed in iteration 1")
    assert ppo.train(args)["resumed_at_iteration"] is None
    assert_same_run(args.output_dir, finished.output_dir)


def test_a_checkpoint_alone_says_what_run_it_is_of(ppo, finished, tmp_path, capsys):
    folder = killed(finished, tmp_path / "run").output_dir
    flags = ["--resume", str(checkpoint(folder, 2)), "--output-dir", str(tmp_path / "b")]
    assert ppo.main(flags) == 0
    assert_same_run(tmp_path / "b", finished.output_dir)
    assert ppo.main(["--resume", str(folder)]) == 0  # into the run directory itself
    assert_same_run(folder, finished.output_dir)


def test_going_back_in_a_run_that_got_further_asks_for_overwrite(ppo, finished, tmp_path, capsys):
    folder = killed(finished, tmp_path / "run").output_dir
    flags = ["--resume", str(checkpoint(folder, 2))]
    assert ppo.main(flags) == 2
    printed = capsys.readouterr().err
    assert "contains newer ones, up to checkpoint-000004.pt; pass --overwrite" in printed
    assert ppo.main([*flags, "--overwrite"]) == 0
    assert_same_run(folder, finished.output_dir)


def test_other_surroundings_are_told_and_do_not_stop_a_run(ppo, finished, tmp_path, capsys):
    args = killed(finished, tmp_path / "run")
    newest = checkpoint(args.output_dir, 4)
    change(newest, lambda saved: saved["surroundings"].update(torch="1.0"))
    ppo.train(args)
    printed = capsys.readouterr().err
    assert "warning: may go on with other rounding: torch: 1.0 in the checkpoint, now " in printed


def test_what_was_never_finished_is_cleared_away(ppo, finished, tmp_path):
    args = killed(finished, tmp_path / "run")
    left = args.output_dir / ".metrics.csv.abcd1234", args.output_dir / "checkpoints"
    left = [left[0], left[1] / ".checkpoint-000006.pt.abcd1234"]
    for path in left:
        path.write_text("half of it")
    mine = args.output_dir / ".gitignore"
    mine.write_text("*")
    ppo.train(args)
    assert not any(path.exists() for path in left)
    assert mine.exists()


# --- signals


def send_at(ppo, monkeypatch, number, iteration):
    """Raise a signal in this process within an iteration."""
    rollouts, plain = [], ppo.rollout

    def rollout(*args):
        rollouts.append(1)
        if len(rollouts) == iteration:
            signal.raise_signal(number)
        return plain(*args)

    monkeypatch.setattr(ppo, "rollout", rollout)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_to_stop_saves_the_iteration_it_came_in(
    ppo, finished, small_run, tmp_path, monkeypatch, interruptible, number
):
    args = small_run(tmp_path / "run")
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        send_at(ppo, patch, number, 3)
        assert ppo.train(args)["interrupted"]
    assert signal.getsignal(number) is before
    assert [path.name[11:17] for path in checkpoints.checkpoints(args.output_dir)] == [
        "000002",
        "000003",
    ]
    ppo.train(dataclasses.replace(args, resume="auto"))
    assert_same_run(args.output_dir, finished.output_dir)


def test_the_warning_of_a_batch_queue_saves_and_goes_on(
    ppo, finished, small_run, tmp_path, monkeypatch
):
    args = small_run(tmp_path / "run", checkpoint_interval=100)
    send_at(ppo, monkeypatch, signal.SIGUSR1, 3)
    assert not ppo.train(args)["interrupted"]
    assert [path.name[11:17] for path in checkpoints.checkpoints(args.output_dir)] == [
        "000003",
        "000006",
    ]
    assert_same_run(args.output_dir, finished.output_dir)


def test_a_warning_while_the_requests_are_read_is_met_by_the_next_iteration(monkeypatch):
    plain = torch.tensor

    def interrupted(*args, **kwargs):
        flags = plain(*args, **kwargs)
        signal.raise_signal(signal.SIGUSR1)
        return flags

    with signals.Signals(ranks.ALONE) as sent:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "tensor", interrupted)
            assert sent.requests(torch.device("cpu")).tolist() == [0, 0]
        assert sent.requests(torch.device("cpu")).tolist() == [0, 1]
        assert sent.requests(torch.device("cpu")).tolist() == [0, 0]


def test_a_second_signal_to_stop_stops_at_once(
    ppo, small_run, tmp_path, monkeypatch, interruptible
):
    def rollout(*args):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ppo, "rollout", rollout)
    with pytest.raises(KeyboardInterrupt):
        ppo.train(small_run(tmp_path / "run"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def ignored():
    """SIGINT as `nohup` or a shell's background leaves it to a process."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored(ignored):
    with signals.Signals(ranks.ALONE) as sent:
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)
        assert sent.requests(torch.device("cpu")).tolist() == [0, 0]
        signal.raise_signal(signal.SIGTERM)  # which was not ignored
        assert sent.requests(torch.device("cpu")).tolist() == [1, 0]
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_run_in_the_background_is_not_stopped_by_the_keyboard(
    ppo, finished, small_run, tmp_path, monkeypatch, ignored
):
    args = small_run(tmp_path / "run")
    send_at(ppo, monkeypatch, signal.SIGINT, 3)
    assert not ppo.train(args)["interrupted"]
    assert_same_run(args.output_dir, finished.output_dir)


# --- what is kept


def test_the_newest_checkpoints_are_kept(ppo, small_run, tmp_path):
    args = small_run(tmp_path / "run", checkpoint_interval=1, keep_checkpoints=2)
    ppo.train(args)
    assert [path.name[11:17] for path in checkpoints.checkpoints(args.output_dir)] == [
        "000005",
        "000006",
    ]


def test_an_interval_of_zero_writes_no_checkpoint(ppo, small_run, tmp_path):
    args = small_run(tmp_path / "run", checkpoint_interval=0)
    ppo.train(args)
    assert checkpoints.checkpoints(args.output_dir) == []


def test_a_checkpoint_is_read_by_torch_alone_and_holds_what_it_promises(finished):
    saved = torch.load(checkpoint(finished.output_dir, 4), weights_only=True)
    assert saved["iteration"] == 4
    assert set(saved["environments"]) == {*State._fields, "done"}
    assert {len(rows) for rows in saved["environments"].values()} == {48}
    assert saved["optimizer_state_dict"]["num_updates"] == 4 * 4
    assert set(saved["random"]) == {"sampling", "cpu"}
    assert saved["args"]["num_envs"] == 48
    assert saved["surroundings"]["torch"] == torch.__version__
    assert [row["iteration"] for row in saved["metrics"]] == [1, 2, 3, 4]


# --- damage


@pytest.mark.parametrize("damage", ["truncated", "empty", "bit-flipped", "replaced"])
def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(
    ppo, finished, tmp_path, capsys, damage
):
    args = killed(finished, tmp_path / "run")
    newest = checkpoint(args.output_dir, 4)
    content = bytearray(newest.read_bytes())
    if damage == "bit-flipped":
        content[len(content) // 2] ^= 1
    cut = {"truncated": len(content) - 100, "empty": 0, "replaced": 1000}
    newest.write_bytes(bytes(content[: cut.get(damage)]))
    before = checkpoint(args.output_dir, 2)
    assert checkpoints.newest_checkpoint(args.output_dir) == before.read_bytes()
    printed = capsys.readouterr().err
    assert f"warning: checkpoint {newest} cannot be used: it is " in printed
    assert f"going back to {before}" in printed
    if damage == "bit-flipped":
        ppo.train(args)
        assert_same_run(args.output_dir, finished.output_dir)


def test_no_flipped_bit_and_no_cut_goes_unnoticed(finished):
    sealed = checkpoint(finished.output_dir, 4).read_bytes()
    checkpoints.unseal(sealed)
    rng = np.random.default_rng(0)
    for position in (*rng.integers(len(sealed), size=100), *range(len(sealed) - 80, len(sealed))):
        flipped = bytearray(sealed)
        flipped[position] ^= 1 << rng.integers(8)
        with pytest.raises(checkpoints.CheckpointError, match="damaged|cut off"):
            checkpoints.unseal(bytes(flipped))
    for length in rng.integers(len(sealed), size=50):
        with pytest.raises(checkpoints.CheckpointError, match="damaged|cut off"):
            checkpoints.unseal(sealed[:length])


def test_where_no_checkpoint_is_whole_nothing_is_begun_anew(ppo, finished, tmp_path):
    args = killed(finished, tmp_path / "run")
    for iteration in (2, 4):
        checkpoint(args.output_dir, iteration).write_bytes(b"PK")
    with pytest.raises(
        errors.UsageError, match=r"000004.pt cannot be used.*000002.pt.*--overwrite"
    ):
        ppo.train(args)
    assert len(pd.read_csv(args.output_dir / "metrics.csv")) == 5


class _Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.parametrize("sealed", [False, True], ids=["bare", "with a right hash"])
def test_a_malicious_pickle_in_place_of_a_checkpoint_executes_nothing(
    ppo, finished, tmp_path, capsys, sealed
):
    args = killed(finished, tmp_path / "run")
    path = checkpoint(args.output_dir, 4)
    content = {"format": checkpoints.CHECKPOINT_FORMAT, "iteration": _Payload()}
    if sealed:
        path.write_bytes(checkpoints.seal(content))
    else:
        torch.save(content, path)
    assert ppo.main(["--resume", str(path)]) == 2
    assert "cannot be used" in capsys.readouterr().err
    ppo.train(args)
    assert_same_run(args.output_dir, finished.output_dir)


def test_a_checkpoint_that_does_not_exist_is_a_bad_request(ppo, tmp_path, capsys):
    assert ppo.main(["--resume", str(tmp_path / "absent.pt")]) == 2
    assert "absent.pt cannot be used: No such file" in capsys.readouterr().err
    assert ppo.main(["--resume", str(tmp_path)]) == 2
    assert "it has no checkpoints/checkpoint-*.pt" in capsys.readouterr().err


def change(path: Path, edit) -> None:
    """Edit the content of a checkpoint, and seal it again."""
    saved = checkpoints.unseal(path.read_bytes())
    edit(saved)
    path.write_bytes(checkpoints.seal(saved))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s["run"].update(hydrogel_gym="0.0.9"), "hydrogel_gym: 0.0.9 in the checkpoint"),
        (lambda s: s["run"].update({"device type": "cuda"}), "device type: cuda in the checkpoint"),
        (
            lambda s: s["architecture"].update(obs_dim=37),
            "obs_dim: 37 in the checkpoint, now 13",
        ),
    ],
    ids=["version", "device", "architecture"],
)
def test_a_checkpoint_from_elsewhere_is_refused(ppo, finished, tmp_path, edit, message):
    args = killed(finished, tmp_path / "run")
    change(checkpoint(args.output_dir, 4), edit)
    with pytest.raises(errors.UsageError, match=f"of another run; {message}"):
        ppo.train(args)


def make_earlier(saved, **settings):
    """Give a checkpoint the settings that earlier versions had besides."""
    settings = {"reward_precision": "fp32", "true_reward_model": None} | settings
    saved["run"] |= settings
    of_training = {"evaluate": None, "wandb_project": "hydrogel_gym", "wandb_entity": None}
    saved["args"] |= settings | of_training


def test_a_run_of_an_earlier_version_goes_on(ppo, finished, tmp_path):
    args = killed(finished, tmp_path / "run")
    change(checkpoint(args.output_dir, 4), make_earlier)
    ppo.train(args)
    assert_same_run(args.output_dir, finished.output_dir)
    again = killed(finished, tmp_path / "again").output_dir
    change(checkpoint(again, 4), make_earlier)
    assert ppo.main(["--resume", str(again)]) == 0
    assert_same_run(again, finished.output_dir)


@pytest.mark.parametrize(
    "setting", [{"reward_precision": "bf16"}, {"true_reward_model": "mechanistic"}], ids=str
)
def test_a_run_of_an_earlier_version_that_did_what_this_one_cannot_is_refused(
    ppo, finished, tmp_path, capsys, setting
):
    args = killed(finished, tmp_path / "run")
    change(checkpoint(args.output_dir, 4), lambda saved: make_earlier(saved, **setting))
    before = {path: path.read_bytes() for path in args.output_dir.rglob("*.*")}
    assert ppo.main(["--resume", str(args.output_dir)]) == 2
    ((name, value),) = setting.items()
    assert capsys.readouterr().err == (
        "error: --resume: the checkpoint is of another run; "
        f"{name}: {value} in the checkpoint, now None\n"
    )
    assert {path: path.read_bytes() for path in args.output_dir.rglob("*.*")} == before


def test_a_checkpoint_of_another_format_is_refused(ppo, finished, tmp_path):
    args = killed(finished, tmp_path / "run", at=2)
    change(checkpoint(args.output_dir, 2), lambda saved: saved.update(format="checkpoint.v9"))
    with pytest.raises(
        errors.UsageError, match=r"its format is 'checkpoint.v9', not 'hydrogel_gym"
    ):
        ppo.train(args)


def test_a_checkpoint_of_other_arguments_or_patients_is_refused_with_all_that_differ(
    ppo, finished, tmp_path
):
    args = killed(finished, tmp_path / "run")
    other = dataclasses.replace(args, hidden_dim=32, seed=7, cohort=finished.holdout_cohort)
    with pytest.raises(errors.UsageError) as refused:
        ppo.train(other)
    message = str(refused.value)
    assert "hidden_dim: 16 in the checkpoint, now 32" in message
    assert "seed: 1 in the checkpoint, now 7" in message
    assert "patients of the train cohort: " in message
    assert "holdout" not in message
    # Nothing is lost by asking.
    ppo.train(args)
    assert_same_run(args.output_dir, finished.output_dir)


def test_the_same_patients_in_another_file_are_the_same_run(ppo, finished, tmp_path):
    args = killed(finished, tmp_path / "run")
    shutil.copy(args.cohort, tmp_path / "moved.csv")
    ppo.train(dataclasses.replace(args, cohort=tmp_path / "moved.csv", checkpoint_interval=5))
    assert_same_run(args.output_dir, finished.output_dir)


def test_a_run_that_may_be_continued_is_not_replaced_by_accident(ppo, finished, tmp_path):
    args = dataclasses.replace(killed(finished, tmp_path / "run"), resume=None)
    with pytest.raises(
        errors.UsageError, match="already contains a run .*; continue it with --resume"
    ):
        ppo.train(args)
    other = dataclasses.replace(args, resume=str(checkpoint(finished.output_dir, 4)))
    with pytest.raises(errors.UsageError, match="already contains a run"):
        ppo.train(other)


# --- disk full


@pytest.mark.parametrize("full_at", [3, 4], ids=["metrics", "checkpoint"])
def test_a_full_disk_ends_the_run_with_a_whole_checkpoint(
    ppo, finished, small_run, main_with, tmp_path, monkeypatch, capsys, full_at
):
    args = small_run(tmp_path / "run")
    # metrics.csv is written by one module and checkpoints by another.
    module, name = {3: (directory, "metrics.csv"), 4: (checkpoints, "checkpoint-000004.pt")}[
        full_at
    ]

    def full(path, content):
        if path.name == name and (full_at == 4 or content.count(b"\n") == full_at + 1):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_atomically(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_atomically", full)
        assert main_with(args) == 1
    (printed,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("error"))
    kept = checkpoint(args.output_dir, 2)
    assert f"iteration {full_at} could not be saved: [Errno 28] No space left on device" in printed
    assert f"{kept} is whole, go on from it with --resume auto" in printed
    ppo.train(dataclasses.replace(args, resume="auto"))
    assert_same_run(args.output_dir, finished.output_dir)


# --- bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint-interval=-1"], "--checkpoint-interval is -1; allowed: 0 or more"),
        (["--keep-checkpoints", "0"], "--keep-checkpoints is 0; allowed: 1 or more"),
    ],
    ids=["interval", "keep"],
)
def test_bad_flags_are_refused(ppo, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert ppo.main(["--preset", "quick", *flags]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_environments_that_cannot_be_saved_are_refused(ppo, small_run, tmp_path, monkeypatch):
    monkeypatch.delattr(hydrogel_gym.HydrogelVectorEnv, "state_dict")
    with pytest.raises(errors.UsageError, match="have no state_dict.*pass --checkpoint-interval 0"):
        ppo.train(small_run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    ppo.train(small_run(tmp_path / "run", checkpoint_interval=0))
