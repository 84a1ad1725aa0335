"""The compiled step of the vector environment, and what is said when it cannot be had."""

from __future__ import annotations

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode

from hydrogel_gym import HydrogelVectorEnv, memory
from hydrogel_gym.compiled import STEP_OPTIONS, CompiledFunction, CompileError

# The compiler loads parts of torch that torch itself deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
    pytest.mark.torch("2.10"),
]
SLOW = pytest.mark.slow
CPU = torch.device("cpu")


@pytest.fixture
def traced_only(monkeypatch):
    """The same graph without generated code: it takes a second to make instead of ten."""
    inductor = torch.compile

    def trace(function, *, options, **kwargs):
        return inductor(function, backend="aot_eager", **kwargs)

    monkeypatch.setattr(torch, "compile", trace)


def pair(num_envs=3, **kwargs) -> tuple[HydrogelVectorEnv, HydrogelVectorEnv]:
    """A compiled environment and its twin that is not."""
    kwargs = {"horizon": 2, "output": "torch"} | kwargs
    return tuple(HydrogelVectorEnv(num_envs, compile=c, **kwargs) for c in (True, False))


def trace(env) -> list:
    """What resets and steps return, every second row being a step behind the others."""
    env.action_space.seed(0)
    trace = [env.reset(seed=0)]
    for step in range(5):
        trace.append(env.step(env.action_space.sample()))
        if step == 0 or env.autoreset_mode is AutoresetMode.DISABLED:
            mask = np.arange(env.num_envs) % 2 == step % 2
            trace.append(env.reset(options={"reset_mask": mask}))
    return trace


def assert_close(one, other) -> None:
    """Equal nests: same keys, types and dtypes; numbers to what order and fusion may change.

    These are float32 numbers up to 100, after some 50 operations.
    """
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.fixture
def broken_model(toy_model):
    """A model whose outcomes of one polymer are not finite."""

    def model(patient, polymer_id, formulation, coverage):
        outcomes = toy_model(patient, polymer_id, formulation, coverage)
        # Not where a model is looked at when it is loaded, in the middle of the formulations.
        broken = torch.where((polymer_id == 7) & (formulation[..., 0] < 6.0), torch.inf, 0.0)
        return outcomes._replace(fibrosis_risk=outcomes.fibrosis_risk - broken)

    return model


@pytest.mark.parametrize(
    "mode", ["SameStep", pytest.param("NextStep", marks=SLOW), pytest.param("Disabled", marks=SLOW)]
)
def test_traced_steps_equal_those_that_are_not_and_refuse_the_same(
    mode, traced_only, three_patients, broken_model
):
    env, twin = pair(
        reward_model=broken_model,
        cohort=three_patients,
        action_format="multidiscrete",
        autoreset_mode=mode,
    )
    assert_close(trace(env), trace(twin))
    env.reset(seed=0), twin.reset(seed=0)
    good, row = np.zeros((3, 6), np.int64), np.array([[0], [1], [0]])
    for polymer, message in [
        (7, r"env 1: the reward model returned .* polymer_id=7, "),
        (24, r"env 1: action\[0\] is 24; allowed: whole numbers 0 to 23"),
        (-(2**62), r"env 1: action\[0\] is -46\d+; allowed: whole numbers 0 to 23"),
    ]:
        with pytest.raises(ValueError, match=message):
            env.step(good + row * [polymer, 0, 0, 0, 0, 0])
    assert_close(env.step(good), twin.step(good))


@SLOW
def test_compiled_environment_made_by_name_equals_one_that_is_not_and_its_spec_survives_json():
    kwargs = {"num_envs": 40, "horizon": 2, "output": "torch", "patient_assignment": "random"}
    env = gym.make_vec("HydrogelDesign-v0", compile=True, **kwargs)
    twin = gym.make_vec("HydrogelDesign-v0", **kwargs)
    assert EnvSpec.from_json(env.spec.to_json()).kwargs["compile"] is True
    assert_close(trace(env), trace(twin))
    # One graph for every step, whatever came before it.
    assert isinstance(env.unwrapped._step, CompiledFunction)
    with torch.compiler.set_stance("fail_on_recompile"):
        trace(env)
        with torch.inference_mode(False), torch.enable_grad():
            action = {k: torch.from_numpy(v) for k, v in env.action_space.sample().items()}
            action["formulation"].requires_grad_()
            assert not env.step(action)[1].requires_grad


@SLOW
@pytest.mark.parametrize(
    "settings",
    [
        dict(autoreset_mode="SameStep", horizon=1, action_format="box"),
        dict(autoreset_mode="NextStep", action_format="multidiscrete", reward_mode="improvement"),
        dict(autoreset_mode="Disabled", obs_format="dict", observe_explored=True),
    ],
    ids=lambda settings: settings["autoreset_mode"],
)
def test_compiled_steps_equal_those_that_are_not(settings):
    env, twin = pair(num_envs=50, **settings)
    assert_close(trace(env), trace(twin))


@SLOW
def test_copies_and_pickles_of_a_compiled_environment_continue_identically(
    traced_only, three_patients, toy_model
):
    env, _ = pair(cohort=three_patients, reward_model=toy_model)
    env.reset(seed=0)
    action = env.action_space.sample()
    env.step(action)
    twins = [copy.deepcopy(env), pickle.loads(pickle.dumps(env))]
    expected = env.step(action)
    for twin in twins:
        assert_close(twin.step(action), expected)


def test_one_function_may_be_compiled_more_often_than_it_may_have_graphs(traced_only):
    def double(x):
        return 2 * x

    doubles = [CompiledFunction(double, CPU)(torch.ones(size)) for size in range(1, 10)]
    assert [x.tolist() for x in doubles] == [[2.0] * size for size in range(1, 10)]


def test_second_function_is_compiled_with_the_options_of_the_first():
    """`torch.compile` takes some out of the dict that it is given."""
    given = dict(STEP_OPTIONS)
    first, second = (CompiledFunction(torch.neg, CPU) for _ in range(2))
    assert first.options == second.options == STEP_OPTIONS == given
    assert "guard_filter_fn" in given


def test_reward_model_with_a_graph_break_is_refused_with_its_reason(three_patients, toy_model):
    def reading_model(patient, polymer_id, formulation, coverage):
        outcomes = toy_model(patient, polymer_id, formulation, coverage)
        return outcomes if outcomes.delta_ef_pct.sum() >= 0 else None

    with pytest.raises(CompileError, match="compile=True failed: Unsupported: Data-dep") as caught:
        HydrogelVectorEnv(3, compile=True, cohort=three_patients, reward_model=reading_model)
    assert str(caught.value).endswith("compile=False runs the same step uncompiled")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compile", [False, True])
def test_more_environments_than_memory_holds_are_refused_at_once(compile):
    message = r"num_envs is 10{12}; it needs .* cpu has [\d.,]+ GB left; take [\d,]+ or fewer$"
    with pytest.raises(MemoryError, match=message):
        HydrogelVectorEnv(10**12, compile=compile)


def test_memory_that_runs_out_within_a_step_is_named_in_one_line_and_no_other_error_is(
    monkeypatch, toy_model
):
    def hungry_model(patient, polymer_id, formulation, coverage):
        if len(polymer_id) == 8:
            torch.empty(2**50)
        if len(polymer_id) == 3:
            raise RuntimeError("no weights")
        return toy_model(patient, polymer_id, formulation, coverage)

    env, other = (HydrogelVectorEnv(num, reward_model=hungry_model) for num in (8, 3))
    env.reset(seed=0), other.reset(seed=0)
    with pytest.raises(MemoryError, match=r"^num_envs is 8; it needs about .* take 4 or fewer$"):
        env.step(env.action_space.sample())
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    with pytest.raises(MemoryError, match=r"bytes each\), more than there is; take fewer$"):
        env.step(env.action_space.sample())
    with pytest.raises(RuntimeError, match="^no weights$"):
        other.step(other.action_space.sample())
