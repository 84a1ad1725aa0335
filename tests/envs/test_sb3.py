import functools

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import hydrogel_gym

sb3 = pytest.importorskip("stable_baselines3")

from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize  # noqa: E402

from hydrogel_gym.sb3 import BatchedVecEnv  # noqa: E402

FLAT, DISCRETE = "HydrogelDesignFlat-v0", "HydrogelDesignDiscrete-v0"


class Counter(gym.Env):
    """Counts its steps, from a start, and terminates at its limit."""

    observation_space = gym.spaces.Box(-100, 100, (1,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, start=0.0, limit=9):
        self.start, self.limit = start, limit

    def reset(self, *, seed=None, options=None):
        self.count = 0
        return np.array([self.start], np.float32), {}

    def step(self, action):
        self.count += 1
        obs = np.array([self.start + self.count], np.float32)
        return obs, 1.0, self.count == self.limit, False, {}

    def double(self, number):
        return 2 * number + self.start


def counters() -> SyncVectorEnv:
    """Two environments: the first truncated at step 2, the second terminated there."""
    makers = [lambda: gym.wrappers.TimeLimit(Counter(0.0), 2), lambda: Counter(10.0, limit=2)]
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)


@pytest.mark.parametrize(
    ("env_id", "output", "obs_format"), [(FLAT, "numpy", "box"), (DISCRETE, "torch", "dict")]
)
def test_batch_gives_what_single_environments_in_a_dummy_vector_give(env_id, output, obs_format):
    kwargs = {"horizon": 2, "patient_assignment": "random", "obs_format": obs_format}
    kwargs |= {"max_episode_steps": 2 if obs_format == "box" else 1}
    ours = gym.make_vec(env_id, num_envs=3, output=output, **kwargs)
    ours = BatchedVecEnv(ours, all_terminal_observations=True)
    theirs = DummyVecEnv([lambda: gym.make(env_id, **kwargs)] * 3)
    assert ours.seed(5) == theirs.seed(5)
    assert_close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    assert_close(ours.reset(), theirs.reset())
    ours.action_space.seed(1)
    for _ in range(5):
        action = np.stack([ours.action_space.sample() for _ in range(3)])
        obs, reward, done, infos = ours.step(action)
        expected_obs, expected_reward, expected_done, expected_infos = theirs.step(action)
        assert_close(obs, expected_obs)
        assert_close(reward, expected_reward)
        assert done.tolist() == expected_done.tolist()
        for info, expected in zip(infos, expected_infos, strict=True):
            for name in ("TimeLimit.truncated", "terminal_observation"):
                assert (name in info) == (name in expected)
                assert_close(info.get(name), expected.get(name))


@pytest.mark.parametrize("all_of_them", [False, True])
def test_last_observation_is_told_of_truncated_episodes_and_of_all_when_requested(all_of_them):
    envs = BatchedVecEnv(counters(), all_terminal_observations=all_of_them)
    envs.reset()
    assert not envs.step(np.array([0, 0]))[2].any()
    obs, _, done, infos = envs.step(np.array([0, 0]))
    assert done.all()
    assert obs.ravel().tolist() == [0, 10]
    assert [info.pop("TimeLimit.truncated") for info in infos] == [True, False]
    last = [{name: x.tolist() for name, x in info.items()} for info in infos]
    of_terminated = {"terminal_observation": [12]} if all_of_them else {}
    assert last == [{"terminal_observation": [2]}, of_terminated]


@pytest.mark.parametrize("algorithm", ["PPO", "SAC", "DQN"])
def test_algorithm_learns_where_episodes_are_truncated_and_terminated(algorithm):
    sizes = {"learning_starts": 8, "buffer_size": 64}
    if algorithm == "PPO":
        sizes = {"n_steps": 8, "batch_size": 8, "n_epochs": 1}
    envs = counters()
    if algorithm != "DQN":
        envs = gym.make_vec(FLAT, num_envs=2, horizon=2, output="torch")
    envs = VecNormalize(VecMonitor(BatchedVecEnv(envs)), norm_obs=algorithm != "DQN")
    model = getattr(sb3, algorithm)("MlpPolicy", envs, seed=0, device="cpu", **sizes)
    model.learn(32)
    assert model.num_timesteps >= 32
    assert {episode["l"] for episode in model.ep_info_buffer} == {2}
    if algorithm == "DQN":
        assert model.replay_buffer.timeouts[1].tolist() == [1, 0]
        assert model.replay_buffer.next_observations[1, 0].tolist() == [2]


def test_attributes_and_methods_are_those_of_single_environments_or_of_all():
    envs = BatchedVecEnv(counters())
    assert envs.get_attr("start") == [0, 10]
    assert envs.get_attr("start", indices=1) == [10]
    assert envs.env_method("double", 3, indices=[1]) == [16]
    assert envs.env_is_wrapped(gym.wrappers.TimeLimit) == [True, False]
    envs.set_attr("limit", 4, indices=[1])
    assert envs.get_attr("limit") == [9, 4]
    envs = BatchedVecEnv(gym.make_vec(FLAT, num_envs=3, render_mode="ansi"))
    assert envs.get_attr("render_mode", indices=[0, 2]) == ["ansi", "ansi"]
    assert envs.env_is_wrapped(gym.wrappers.TimeLimit) == [False] * 3
    envs.set_attr("output", "torch")
    assert envs.envs.output == "torch"
    with pytest.raises(AttributeError):
        envs.set_attr("no_such_name", 1)
    with pytest.raises(NotImplementedError, match="can be set for all of them only"):
        envs.set_attr("output", "numpy", indices=[0])
    with pytest.raises(NotImplementedError, match=r"call envs\.state_dict instead"):
        envs.env_method("state_dict")


def test_options_reach_the_environments_if_all_have_the_same_and_pictures_are_one_each():
    pytest.importorskip("PIL")
    envs = BatchedVecEnv(gym.make_vec(FLAT, num_envs=2, render_mode="rgb_array"))
    envs.set_options([{}, {"a": 1}])
    with pytest.raises(ValueError, match="the same options"):
        envs.reset()
    envs.set_options({"patient_id": [3, 4]})
    expected = hydrogel_gym.load_cohort().features[[3, 4]].numpy()
    np.testing.assert_allclose(envs.reset()[:, :11], expected, rtol=1e-6)
    assert len(envs.get_images()) == 2
    assert envs.render("rgb_array").ndim == 3


@pytest.mark.parametrize(
    ("make", "env_id", "kwargs", "message"),
    [
        (gym.make, FLAT, {}, "expected a gymnasium.vector.VectorEnv"),
        (gym.make_vec, "HydrogelDesign-v0", {}, "the single action space is a Dict"),
        (gym.make_vec, FLAT, {"autoreset_mode": "NextStep"}, "autoreset mode NextStep"),
        (gym.make_vec, FLAT, {"autoreset_mode": "Disabled"}, "autoreset mode Disabled"),
    ],
    ids=["single", "composite", "next step", "disabled"],
)
def test_environments_that_cannot_be_used_are_refused_in_one_line(make, env_id, kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        BatchedVecEnv(make(env_id, **kwargs))
    assert "\n" not in str(error.value)
