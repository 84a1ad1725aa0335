"""What several test modules share: a device, three patients, a model to work out by hand."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
import sys
import threading
from importlib.resources import files
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores already; threads that wait for each other would make all of them slow.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pandas as pd
import pytest
import torch
from gymnasium.envs.registration import register, registry
from torch import Tensor

from hydrogel_gym import Cohort, HydrogelVectorEnv, Outcomes, runs
from hydrogel_gym.models import ensemble as stage1
from hydrogel_gym.problem.fields import COVERAGES, FORMULATION_FIELDS, PATIENT_FIELDS
from hydrogel_gym.problem.polymers import NUM_POLYMERS
from hydrogel_gym.runs import compiled
from hydrogel_gym.train import ppo_hybrid

no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Ranks are forked, and once a gradient was computed on another device a fork can compute none.
    items.sort(key=lambda item: item.path.name != "test_ranks.py")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("torch"):
        if torch.__version__ < mark.args[0]:
            pytest.skip(f"needs torch {mark.args[0]}; this is {torch.__version__}")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=no_cuda)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def uncompiled(monkeypatch):
    """What would be compiled stays plain Python; all else is as in a compiled run."""
    # A module is called with other weights by changing it meanwhile, which a graph does not.
    lock = threading.Lock()

    def one_at_a_time(function, _):
        def call(*inputs):
            with lock:
                return function(*inputs)

        return call

    monkeypatch.setattr(compiled, "compile_function", one_at_a_time)
    monkeypatch.setattr("hydrogel_gym.envs.vector.CompiledFunction", lambda function, _: function)


@pytest.fixture(scope="session")
def three_patients() -> Cohort:
    """Ann, Bo and Cy, with numbers that float32 holds exactly."""
    features = [
        [30.0, -10.0, 200.0, 140.0, 20.0, 10.0, 36.0, 18.0, 2.0, 0.25, 8.0],
        [40.0, -12.0, 250.0, 150.0, 16.0, 12.0, 30.0, 20.0, 1.5, 0.5, 7.0],
        [25.0, -8.0, 320.0, 240.0, 24.0, 14.0, 48.0, 16.0, 3.0, 0.75, 6.0],
    ]
    features = torch.tensor(features, dtype=torch.float64)
    return Cohort(("ann", "bo", "cy"), features, pd.DataFrame(index=range(3)), "three patients")


def _toy_model(
    patient: Tensor, polymer_id: Tensor, formulation: Tensor, coverage: Tensor
) -> Outcomes:
    return Outcomes(
        delta_ef_pct=polymer_id.to(patient.dtype),
        stress_reduction_pct=20.0 * coverage.to(patient.dtype),
        optimal_logit=torch.zeros_like(patient[..., 0]),
        toxicity_risk=formulation[..., 2],
        structural_integrity=formulation[..., 3] / 5.0,
        fibrosis_risk=patient[..., 9] - 0.25,
    )


@pytest.fixture(scope="session")
def toy_model():
    """A model whose score is easy to work out.

    3 polymer_id + 0.3 coverage + 0.5, minus 2 above 0.15 S/m, minus 1 below 4 mm, minus 0.5 for
    every patient but Ann.
    """
    return _toy_model


@pytest.fixture
def register_design():
    """Registers an id of vector environments with settings, for as long as the test runs."""
    ids = []

    def make(
        env_id: str, reward_model="mechanistic", *, make_envs=HydrogelVectorEnv, **settings
    ) -> str:
        def vector_entry_point(num_envs: int, **kwargs):
            return make_envs(num_envs, reward_model=reward_model, **settings, **kwargs)

        register(id=env_id, vector_entry_point=vector_entry_point)
        ids.append(env_id)
        return env_id

    yield make
    for env_id in ids:
        del registry[env_id]


@pytest.fixture(scope="session")
def ppo():
    """The trainer."""
    return ppo_hybrid


@pytest.fixture
def main_with(monkeypatch):
    """Runs the trainer's command line with arguments that are not spelled out as flags."""

    def main(args) -> int:
        monkeypatch.setattr(runs, "read_run_options", lambda *_, **__: args)
        return ppo_hybrid.main([])

    return main


@pytest.fixture
def without_pictures(monkeypatch):
    """They take longer than a small run."""
    monkeypatch.setattr("hydrogel_gym.runs.run.draw_learning_curve", lambda *_: None)
    monkeypatch.setattr("hydrogel_gym.runs.run.draw_policy_selection", lambda *_: None)


@pytest.fixture
def interruptible():
    """The usual answers to SIGINT and SIGHUP, even where the tests were started to ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGHUP, hangup)


def load_script(path: str):
    """A script of the checkout as a module, under a name of its own."""
    path = Path(__file__).parents[1] / path
    spec = importlib.util.spec_from_file_location(f"{path.stem}_under_test", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # for dataclasses
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def load_checkout_script():
    """Loads any script of the checkout, by its path there."""
    return load_script


@pytest.fixture(scope="session")
def outcome_maker():
    """The script that makes up Stage-1 outcomes."""
    return load_script("patients/make_outcomes.py")


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """Makes arguments of a run of a second on eighty patients, without an oracle."""
    folder = tmp_path_factory.mktemp("patients")
    paths = {}
    for name, table in (("cohort", "cohort.csv"), ("holdout_cohort", "cohort_holdout.csv")):
        paths[name] = folder / table
        every = pd.read_csv(files("hydrogel_gym.patients") / table)
        every.head(40).to_csv(paths[name], index=False)

    def make(output_dir: Path, **changes):
        settings = dict(
            preset="quick",
            num_envs=48,
            num_steps=4,
            num_iterations=6,
            num_epochs=1,
            minibatch_size=48,
            hidden_dim=16,
            oracle=False,
            checkpoint_interval=2,
            keep_checkpoints=9,
            output_dir=output_dir,
        )
        return ppo_hybrid.Args(**(paths | settings | changes))

    return make


@pytest.fixture(scope="session")
def finished_run(small_run, tmp_path_factory):
    """Arguments and summary of a whole run with an oracle, on twelve patients and eight held out.

    To look at: a test that changes something copies it first.
    """
    folder = tmp_path_factory.mktemp("finished")
    paths = {"cohort": folder / "cohort.csv", "holdout_cohort": folder / "cohort_holdout.csv"}
    args = small_run(folder / "run", oracle=True)
    for (name, path), count in zip(paths.items(), (12, 8), strict=True):
        pd.read_csv(getattr(args, name)).head(count).to_csv(path, index=False)
    args = dataclasses.replace(args, **paths)
    return args, ppo_hybrid.train(args)


@pytest.fixture(scope="session")
def make_stage1():
    """Makes ensembles of random weights, fitted, so they say, to all that can be designed."""

    def bounds(fields):
        return torch.tensor([f.low for f in fields]), torch.tensor([f.high for f in fields])

    def make(seed: int = 0, *, network=None, **settings) -> stage1.Stage1Ensemble:
        torch.manual_seed(seed)
        if network is None:
            widths = dict(encoder_dim=16, trunk_dim=16, head_dim=4)
            architecture = stage1.Architecture(7, 4, num_members=3, **widths)
            polymers = torch.randn(NUM_POLYMERS, 7), torch.arange(NUM_POLYMERS) % 4
            network = stage1.Stage1Network(architecture, *polymers)
        scaling = stage1.Scaling(
            numeric_mean=torch.zeros(19),
            numeric_std=torch.full((19,), 20.0),
            outcome_mean=torch.tensor([5.0, 15.0, 0.0, 0.1, 0.8, 0.1]),
            outcome_std=torch.tensor([3.0, 7.0, 1.0, 0.05, 0.1, 0.04]),
        )
        low, high = bounds(FORMULATION_FIELDS)
        fitted = stage1.FittedRange(
            *bounds(PATIENT_FIELDS),
            low.repeat(NUM_POLYMERS, 1),
            high.repeat(NUM_POLYMERS, 1),
            torch.ones(NUM_POLYMERS, len(COVERAGES)),
        )
        return stage1.Stage1Ensemble(network, scaling, fitted, **settings)

    return make


@pytest.fixture
def environ_without_wandb() -> dict[str, str]:
    """The environment for a child that logs to W&B by itself.

    W&B leaves the address of this process's service in `WANDB_SERVICE`, where a child would log to.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
