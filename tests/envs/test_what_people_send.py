"""What users of comparable environments send: each is right, or refused in one line."""

from __future__ import annotations

import multiprocessing

import gymnasium as gym
import numpy as np
import pytest
import torch

import hydrogel_gym
from hydrogel_gym import Cohort, HydrogelVectorEnv, load_cohort

SHIPPED = load_cohort("holdout")
NUMBERED = Cohort(("1", "2", "007"), SHIPPED.features[:3], SHIPPED.extra[:3], "numbered")
NAMED = Cohort(("ann", "bo", "cy"), SHIPPED.features[:3], SHIPPED.extra[:3], "named")


def patients_after(cohort, **options) -> list[int]:
    envs = HydrogelVectorEnv(2, cohort=cohort)
    _, info = envs.reset(seed=0, options=options)
    return info["patient_index"].tolist()


@pytest.mark.parametrize("form", [list, np.array, torch.tensor], ids=["list", "array", "tensor"])
def test_a_number_that_can_be_an_id_is_one(form):
    assert patients_after(NUMBERED, patient_id=form([1, 2])) == [0, 1]
    assert patients_after(NUMBERED, patient_index=form([1, 2])) == [1, 2]
    assert patients_after(NAMED, patient_id=form([1, 2])) == [1, 2]
    with pytest.raises(ValueError, match="numbered has no patient '7'; nearest: 007"):
        patients_after(NUMBERED, patient_id=form([7, 1]))


def test_one_environment_tells_ids_from_rows_too():
    env = hydrogel_gym.HydrogelEnv(cohort=NUMBERED)
    for options, row in (
        ({"patient_id": 1}, 0),
        ({"patient_id": "2"}, 1),
        ({"patient_index": 2}, 2),
    ):
        assert env.reset(options=options)[1]["patient_index"] == row
    with pytest.raises(ValueError, match="patient_id and patient_index; expected one"):
        env.reset(options={"patient_id": "1", "patient_index": 0})
    with pytest.raises(ValueError, match="patient_index is 3; allowed: whole numbers 0 to 2"):
        env.reset(options={"patient_index": 3})


@pytest.mark.parametrize(
    "seeds",
    [np.arange(4), [np.int64(i) for i in range(4)], torch.arange(4), (0, 1, 2, np.uint8(3))],
    ids=["array", "list of numpy", "tensor", "mixed"],
)
def test_seeds_may_be_any_whole_numbers(seeds):
    envs = HydrogelVectorEnv(4, patient_assignment="random", horizon=2)
    expected = envs.reset(seed=[0, 1, 2, 3])[0]
    np.testing.assert_array_equal(envs.reset(seed=seeds)[0], expected)


@pytest.mark.parametrize("seed", [0.5, "1", -1, [0, 1.5, 2, 3]])
def test_a_seed_that_is_no_whole_number_is_refused(seed):
    with pytest.raises(ValueError, match="allowed: whole numbers, 0 or more, or None"):
        HydrogelVectorEnv(4).reset(seed=seed)


def test_any_array_that_numpy_can_make_native_is_an_action():
    envs = HydrogelVectorEnv(3)
    envs.action_space.seed(0)
    action = envs.action_space.sample()

    def reward(change) -> np.ndarray:
        envs.reset(seed=0)
        return envs.step({name: change(value) for name, value in action.items()})[1]

    expected = reward(lambda value: value)
    for change in (
        lambda v: v[::-1].copy()[::-1],  # negative strides
        lambda v: v.astype(v.dtype.newbyteorder(">")),
        lambda v: v.astype(object),
        lambda v: v.astype(np.longdouble) if v.dtype.kind == "f" else v.astype(np.uint16),
        lambda v: np.asfortranarray(v),
    ):
        np.testing.assert_array_equal(reward(change), expected)


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
def test_max_episode_steps_truncates_as_gymnasium_does(mode):
    settings = {"max_episode_steps": 2, "horizon": 5, "cohort": NAMED}
    settings |= {"patient_assignment": "fixed"}
    batched = gym.make_vec("HydrogelDesign-v0", num_envs=1, autoreset_mode=mode, **settings)
    single = gym.make_vec(
        "HydrogelDesign-v0",
        num_envs=1,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": gym.vector.AutoresetMode(mode)},
        **settings,
    )
    action = batched.action_space.sample()
    for envs in (batched, single):
        envs.reset(seed=0)
    for _ in range(5):
        ours, theirs = batched.step(action), single.step(action)
        for mine, other in zip(ours[:4], theirs[:4], strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-6)
        assert ours[4].keys() == theirs[4].keys()
        if mode == "Disabled" and ours[3].any():
            for envs in (batched, single):
                envs.reset(options={"reset_mask": np.array([True])})


def test_a_step_limit_that_is_none_is_refused():
    with pytest.raises(ValueError, match="max_episode_steps is 0; allowed: a whole number"):
        HydrogelVectorEnv(1, max_episode_steps=0)


def test_an_environment_whose_first_reset_was_refused_can_be_used():
    env = gym.make("HydrogelDesign-v0")
    with pytest.raises(ValueError, match="no patient 'nobody'"):
        env.reset(options={"patient_id": "nobody"})
    env.reset(seed=0)
    for _ in range(2):
        assert np.isfinite(env.step(env.action_space.sample())[1])
        env.reset()


@pytest.fixture
def double_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_everything_computes_in_float32_whatever_the_default_is(double_default, make_stage1):
    envs = HydrogelVectorEnv(4, output="torch")
    obs, _ = envs.reset(seed=0)
    _, reward, *_ = envs.step(envs.action_space.sample())
    assert (obs.dtype, reward.dtype) == (torch.float32, torch.float32)
    found = hydrogel_gym.oracle.best_designs(NAMED)
    assert found.design.formulation.dtype == torch.float32
    assert {x.dtype for x in make_stage1().state_dict().values() if x.is_floating_point()} == {
        torch.float32
    }


def _construct_and_step(results) -> None:
    envs = HydrogelVectorEnv(4096, cohort=NAMED)
    envs.reset(seed=0)
    results.put(float(envs.step(envs.action_space.sample())[1].sum()))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_environments_are_made_in_a_process_forked_from_one_with_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(1_000_000).exp().sum()  # starts the threads
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        child = context.Process(target=_construct_and_step, args=(results,), daemon=True)
        child.start()
        assert np.isfinite(results.get(timeout=30))
        child.join()
    finally:
        torch.set_num_threads(before)
