"""Options of a run: presets, flags old and new, and what is refused before anything is done."""

from __future__ import annotations

import dataclasses
import re

import pytest

from hydrogel_gym import errors, runs
from hydrogel_gym.runs import options
from hydrogel_gym.runs.options import REMOVED_FLAGS
from hydrogel_gym.train.ppo_hybrid import PRESETS, Args


def read(*flags: str) -> Args:
    return runs.read_run_options(Args, PRESETS, flags, prog="ppo_hybrid.py")


def test_a_flag_overrides_the_preset_and_the_preset_the_default():
    for preset, fields in PRESETS.items():
        assert dataclasses.asdict(read("--preset", preset)).items() >= fields.items()
        changed = read("--preset", preset, "--num-envs", "7")
        expected = Args(**(fields | dict(preset=preset, num_envs=7)))
        assert changed == expected


def test_a_checkpoint_alone_says_what_run_it_is_of(finished_run, cut, of_runs):
    args = dataclasses.replace(finished_run[0], output_dir=cut.output_dir, gamma=0.5)
    for given in (cut.output_dir, of_runs.checkpoint(cut.output_dir, 2)):
        expected = dataclasses.replace(args, resume=str(given))
        assert read("--resume", str(given), "--gamma", "0.5") == expected


@pytest.mark.parametrize("flag", REMOVED_FLAGS)
def test_a_flag_of_earlier_versions_is_answered_with_what_replaces_it(
    ppo, flag, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    underscores = f"--{flag[2:].replace('-', '_')}"
    for flags in ([flag, "x"], ["--preset", "quick", f"{underscores}=x", "--seed", "3"]):
        assert ppo.main(flags) == 2
        assert capsys.readouterr().err == f"error: {flag} is gone; {REMOVED_FLAGS[flag]}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--policy greedy", "'greedy'"),
        ("--preset slow", "--preset is 'slow'; allowed: source, quick"),
        ("--num-iterations many", "--num-iterations"),
        ("--minibatch-size 999", "--minibatch-size is 999, which does not divide"),
        ("--num-steps 0", "--num-steps is 0; allowed: 1 or more"),
        ("--gamma 1.5", "--gamma is 1.5; allowed: 0 to 1"),
        ("--learning-rate nan", "--learning-rate is nan; allowed: above 0"),
        ("--checkpoint-interval=-1", "--checkpoint-interval is -1; allowed: 0 or more"),
        ("--keep-checkpoints 0", "--keep-checkpoints is 0; allowed: 1 or more"),
        ("--device abacus", "--device abacus cannot be used"),
        ("--cohort absent.csv", "absent.csv"),
        ("--env-id Absent-v0", "Absent"),
        ("--pessimism 1", "pessimism is 1.0; only a Stage-1 checkpoint (.pt) has an ensemble"),
        ("--reward-model no.pt", "reward_model 'no.pt': Stage-1 checkpoint no.pt: no such file"),
        ("--no-such-flag", "--no-such-flag"),
        ("--target-kl nan", "--target-kl is nan; allowed: above 0"),
        ("--track", "$WANDB_MODE is 'off'; allowed: online, offline, "),
        ("--env-id MountainCar-v0 --compile off", "--env-id MountainCar-v0 is no environment of "),
        ("--cohort nobody", "nobody: suffix ''; allowed: .csv, .parquet, or a shipped cohort: "),
    ],
)
def test_a_bad_request_ends_in_one_line_before_anything_is_written(
    ppo, flags, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "off")
    assert ppo.main(["--preset", "quick", "--no-oracle", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("flag", "package"), [("track", "wandb"), ("tensorboard",) * 2])
def test_a_missing_library_is_an_error_before_anything_is_done(monkeypatch, flag, package):
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.UsageError, match=rf"--{flag} needs {package}: pip install"):
        options.check_options(Args(**{flag: True}))


def test_sizes_that_cannot_be_shared_are_answered_with_some_that_can():
    options.check_shares(80, 5, 40, 8)
    for sizes, message in (
        ((100, 4, 150, 1), "near it these do: 50, 80, 100, 200"),
        ((80, 5, 100, 8), "8 ranks cannot share equally; near it these do: 8, 16, 40, 80"),
        (
            (2000, 4, 8, 3),
            "near it they can share 1998 or 2001; 2000 can be shared by 2, 4, 5, 8, 10, 16, 20, 25",
        ),
    ):
        with pytest.raises(errors.UsageError, match=re.escape(message)):
            options.check_shares(*sizes)
