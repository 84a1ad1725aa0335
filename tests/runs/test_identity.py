"""What has to be the same for a run to go on, and what it may differ in."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

from hydrogel_gym import load_cohort
from hydrogel_gym.runs import identity


def test_identity_is_of_contents_and_not_of_places(finished_run, tmp_path):
    args, device = finished_run[0], torch.device("cpu")
    for name, content in (("model", b"a model"), ("moved", b"a model"), ("other", b"another")):
        (tmp_path / f"{name}.pt").write_bytes(content)
    shutil.copy(args.cohort, tmp_path / "moved.csv")
    args = dataclasses.replace(args, reward_model=str(tmp_path / "model.pt"))

    def differing(**changes) -> set[str]:
        other = dataclasses.replace(args, **changes)
        one, two = (
            identity.identity(
                each, {"train": load_cohort(each.cohort), "holdout": load_cohort()}, device
            )
            for each in (args, other)
        )
        return {name for name in one if one[name] != two[name]}

    moved = dict(cohort=tmp_path / "moved.csv", reward_model=str(tmp_path / "moved.pt"))
    assert differing(**moved, output_dir=tmp_path, checkpoint_interval=5, track=True) == set()
    assert differing(reward_model=str(tmp_path / "other.pt")) == {"reward model"}
    assert differing(cohort=args.holdout_cohort) == {"patients of the train cohort"}
    assert differing(seed=7, horizon=2, gamma=0.5) == {"seed", "horizon", "gamma"}


def earlier(saved, **settings) -> None:
    """Give a checkpoint the settings that earlier versions had besides."""
    settings = {"reward_precision": "fp32", "true_reward_model": None} | settings
    saved["run"] |= settings
    of_training = {"evaluate": None, "wandb_project": "hydrogel_gym", "wandb_entity": None}
    saved["args"] |= settings | of_training


def test_patients_are_the_same_by_name_and_by_every_feature(three_patients):
    features = three_patients.features.clone()
    features[2, 7] += 1e-6
    others = dict(patient_ids=("ann", "bo", "di")), dict(features=features)
    digests = {identity.digest(dataclasses.replace(three_patients, **other)) for other in others}
    assert len(digests | {identity.digest(three_patients)}) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s["run"].update(hidden_dim=32, seed=7),
            "seed: 7 in the checkpoint, now 1; hidden_dim: 32 in the checkpoint, now 16\n",
        ),
        (lambda s: s["run"].update(hydrogel_gym="0.0.9"), "hydrogel_gym: 0.0.9 in the checkpoint"),
        (lambda s: s["run"].update({"device type": "cuda"}), "device type: cuda in the checkpoint"),
        (lambda s: s["architecture"].update(obs_dim=37), "obs_dim: 37 in the checkpoint, now 13"),
        (
            lambda s: earlier(s, reward_precision="bf16"),
            "reward_precision: bf16 in the checkpoint, now None\n",
        ),
    ],
    ids=["arguments", "version", "device", "architecture", "earlier precision"],
)
def test_a_checkpoint_of_another_run_is_refused_and_nothing_is_lost(
    ppo, cut, of_runs, capsys, change, message
):
    of_runs.edit(of_runs.checkpoint(cut.output_dir, 4), change)
    before = {path: path.read_bytes() for path in cut.output_dir.rglob("*.*")}
    assert ppo.main(["--resume", str(cut.output_dir)]) == 2
    expected = f"error: --resume: the checkpoint is of another run; {message}"
    assert expected in capsys.readouterr().err
    assert {path: path.read_bytes() for path in cut.output_dir.rglob("*.*")} == before


def test_a_run_of_an_earlier_version_goes_on_and_other_libraries_are_told(
    ppo, finished_run, cut, of_runs, capsys
):
    newest = of_runs.checkpoint(cut.output_dir, 4)
    of_runs.edit(newest, earlier)
    of_runs.edit(newest, lambda saved: saved["surroundings"].update(torch="1.0"))
    assert ppo.main(["--resume", str(cut.output_dir)]) == 0
    printed = capsys.readouterr().err
    assert "warning: may go on with other rounding: torch: 1.0 in the checkpoint, now " in printed
    of_runs.assert_same(cut.output_dir, finished_run[0].output_dir)
