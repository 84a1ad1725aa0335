"""What the tests of training against a fitted Stage 1, and of evaluating, share."""

from __future__ import annotations

import dataclasses

import pytest

from hydrogel_gym.models.ensemble import save_stage1


@pytest.fixture(scope="session")
def fitted_run(ppo, finished_run, make_stage1, tmp_path_factory):
    """Arguments and summary of a run that a checkpoint of random weights rewards.

    The checkpoint is named as it is from the folder that the run was started in.
    """
    folder = tmp_path_factory.mktemp("fitted")
    save_stage1(folder / "stage1.pt", make_stage1(pessimism=1.0), {})
    changes = dict(num_iterations=2, oracle=False, reward_model="stage1.pt", pessimism=1.0)
    args = dataclasses.replace(finished_run[0], output_dir=folder / "run", **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return args, ppo.train(args)
