"""Checkpoints: what they hold, how damage shows, and that a run goes on as if never stopped."""

from __future__ import annotations

import dataclasses
import errno
import shutil

import numpy as np
import pytest
import torch

import hydrogel_gym
from hydrogel_gym import errors
from hydrogel_gym.files import write_atomically
from hydrogel_gym.runs import RunOptions, checkpoints, directory, ranks

# --- going on


def test_a_resumed_run_is_the_uninterrupted_one(ppo, finished_run, cut, of_runs):
    summary = ppo.train(cut)
    of_runs.assert_same(cut.output_dir, finished_run[0].output_dir)
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
        dict(env_id="NoisyDesign-v0", horizon=3, patient_assignment="random"),
        dict(compile="on", target_kl=0.01, precision="fp64", policy="factored", state_std=False),
    ],
    ids=["amid an episode, a model that draws", "compiled, float64, factored"],
)
def test_every_kind_of_run_is_resumed_where_it_was(
    ppo, small_run, noisy_env, uncompiled, of_runs, tmp_path, changes
):
    args = small_run(tmp_path / "whole", num_iterations=4, **changes)
    ppo.train(args)
    resumed = of_runs.killed(args, tmp_path / "run", at=2)
    ppo.train(resumed)
    of_runs.assert_same(resumed.output_dir, args.output_dir)


@pytest.mark.parametrize("compile", [False, True])
def test_the_optimiser_of_either_step_goes_on_in_the_other(
    ppo, small_run, uncompiled, tmp_path, compile
):
    args = small_run(tmp_path, precision="fp64")
    cohort = hydrogel_gym.load_cohort(args.cohort)

    def make(compile):
        made = ppo.make_learner(args, cohort, torch.device("cpu"), ranks.ALONE, compile)
        made[0].optimizer.param_groups[0]["lr"] = 1e-2
        return made

    (whole, _, step), (other, _, going_on) = make(compile), make(not compile)
    assert checkpoints.adam_state(whole.optimizer)["num_updates"] == 0  # nothing done yet
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
    for weight, expected in zip(other.agent.parameters(), whole.agent.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-11)
    state, expected = (checkpoints.adam_state(each.optimizer) for each in (other, whole))
    assert state["num_updates"] == expected["num_updates"] == 6
    torch.testing.assert_close(state["square"], expected["square"], rtol=1e-9, atol=1e-15)


def test_a_finished_run_repeats_its_figures_without_training_unless_it_is_replaced(
    ppo, finished_run, of_runs, tmp_path, monkeypatch
):
    shutil.copytree(finished_run[0].output_dir.parent, tmp_path / "copy")
    monkeypatch.setattr(ppo, "rollout", lambda *_, **__: pytest.fail("it trains"))
    args = dataclasses.replace(finished_run[0], output_dir=tmp_path / "copy/run", resume="auto")
    ppo.train(args)
    of_runs.assert_same(args.output_dir, finished_run[0].output_dir)
    replaced = dataclasses.replace(args, overwrite=True)
    assert checkpoints.checkpoint_to_resume(replaced, args.output_dir) is None


# --- what is kept


def test_the_newest_checkpoints_are_kept_and_those_of_later_iterations(tmp_path, of_runs):
    (tmp_path / "checkpoints").mkdir()
    for iteration in (1, 9, 2, 3):  # 9: of a run that is gone back in
        content = {"format": checkpoints.CHECKPOINT_FORMAT, "iteration": iteration}
        checkpoints.write_checkpoint(tmp_path, content, keep=2)
    assert of_runs.iterations_saved(tmp_path) == [2, 3, 9]
    # What was left between writing one and removing another goes when the run goes on.
    options = RunOptions(output_dir=tmp_path, resume="auto", keep_checkpoints=2)
    directory.prepare_output_dir(tmp_path, options, 9)
    assert of_runs.iterations_saved(tmp_path) == [3, 9]


def test_environments_that_cannot_be_saved_are_refused_unless_nothing_is(
    ppo, small_run, tmp_path, monkeypatch
):
    monkeypatch.delattr(hydrogel_gym.HydrogelVectorEnv, "state_dict")
    args = small_run(tmp_path / "run", num_iterations=1)
    with pytest.raises(errors.UsageError, match="have no state_dict.*pass --checkpoint-interval 0"):
        ppo.train(args)
    assert ppo.train(dataclasses.replace(args, checkpoint_interval=0))["iterations"] == 1


# --- damage


class _Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def damage(path, what: str) -> None:
    content = bytearray(path.read_bytes())
    malicious = {"format": checkpoints.CHECKPOINT_FORMAT, "iteration": _Payload()}
    if what == "pickle":
        torch.save(malicious, path)
    elif what == "pickle with a right hash":
        path.write_bytes(checkpoints.seal(malicious))
    elif what == "format":
        path.write_bytes(checkpoints.seal({"format": "checkpoint.v9"}))
    else:
        if what == "bit-flipped":
            content[len(content) // 2] ^= 1
        path.write_bytes(content if what == "bit-flipped" else content[:-100])


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("cut off", "it is cut off, or is no checkpoint"),
        ("bit-flipped", "it is damaged: its content does not have the hash"),
        ("pickle", "it is cut off, or is no checkpoint"),
        ("pickle with a right hash", "Weights only load failed"),
        ("format", "its format is 'checkpoint.v9', not 'hydrogel_gym.checkpoint"),
    ],
)
def test_a_damaged_checkpoint_executes_nothing_and_is_passed_over_unless_it_is_requested(
    ppo, finished_run, cut, capsys, of_runs, what, why
):
    newest, before = (of_runs.checkpoint(cut.output_dir, iteration) for iteration in (4, 2))
    damage(newest, what)
    assert checkpoints.newest_checkpoint(cut.output_dir) == before.read_bytes()
    printed = capsys.readouterr().err
    assert f"warning: checkpoint {newest} cannot be used: {why}" in printed
    assert f"going back to {before}" in printed
    assert ppo.main(["--resume", str(newest)]) == 2
    assert f"error: --resume: checkpoint {newest} cannot be used: {why}" in capsys.readouterr().err
    if what == "bit-flipped":
        assert ppo.train(cut)["resumed_at_iteration"] == 2
        of_runs.assert_same(cut.output_dir, finished_run[0].output_dir)


def test_no_flipped_bit_and_no_cut_goes_unnoticed(finished_run, of_runs):
    sealed = of_runs.checkpoint(finished_run[0].output_dir, 4).read_bytes()
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


def test_where_no_checkpoint_is_whole_or_there_nothing_is_begun_anew(
    ppo, cut, of_runs, tmp_path, capsys
):
    for iteration in (2, 4):
        damage(of_runs.checkpoint(cut.output_dir, iteration), "cut off")
    expected = r"000004.pt cannot be used.*000002.pt.*--overwrite"
    with pytest.raises(errors.UsageError, match=expected):
        ppo.train(cut)
    assert len(of_runs.metrics(cut.output_dir)) == 5
    for path, message in (
        (tmp_path / "absent.pt", "absent.pt cannot be used: No such file"),
        (tmp_path, "it has no checkpoints/checkpoint-*.pt"),
    ):
        assert ppo.main(["--resume", str(path)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["metrics.csv", "checkpoint-000006.pt"])
def test_a_full_disk_ends_the_run_with_a_whole_checkpoint(
    ppo, finished_run, cut, main_with, of_runs, monkeypatch, capsys, name
):
    def full(path, content):
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_atomically(path, content)

    with monkeypatch.context() as patch:
        for module in (directory, checkpoints):
            patch.setattr(module, "write_atomically", full)
        assert main_with(cut) == 1
    (printed,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("error"))
    iteration = 5 if name == "metrics.csv" else 6
    assert f"iteration {iteration} could not be saved: [Errno 28] No space left" in printed
    kept = of_runs.checkpoint(cut.output_dir, 4)
    assert f"{kept} is whole, go on from it with --resume auto" in printed
    ppo.train(cut)
    of_runs.assert_same(cut.output_dir, finished_run[0].output_dir)
