"""What any run needs: options, devices, ranks, a directory, checkpoints, metrics, logs, evaluation.

Nothing here knows an algorithm. A recipe passes plain values, tensors and callables; the names
below are those that its loop uses.
"""

from hydrogel_gym.runs.checkpoints import Learner
from hydrogel_gym.runs.command_line import check_ranges, run_process, run_script
from hydrogel_gym.runs.compiled import compile_training, compiled_or_plain, flatten_weights
from hydrogel_gym.runs.devices import Precision, check_rollout_memory
from hydrogel_gym.runs.environments import (
    at_step,
    make_envs,
    observation_statistics,
    recorded_rollout,
    stricter_reward,
)
from hydrogel_gym.runs.graphs import recorded
from hydrogel_gym.runs.metrics import INFOS
from hydrogel_gym.runs.options import (
    ADAPTIVE,
    ProblemOptions,
    RunOptions,
    check_options,
    check_shares,
)
from hydrogel_gym.runs.presets import read_run_options
from hydrogel_gym.runs.ranks import (
    ALONE,
    World,
    average_gradients,
    averaging,
    world_from_environment,
)
from hydrogel_gym.runs.run import start_run
from hydrogel_gym.runs.summary import print_summary

__all__ = [
    "ADAPTIVE",
    "ALONE",
    "INFOS",
    "Learner",
    "Precision",
    "ProblemOptions",
    "RunOptions",
    "World",
    "at_step",
    "average_gradients",
    "averaging",
    "check_options",
    "check_ranges",
    "check_rollout_memory",
    "check_shares",
    "compile_training",
    "compiled_or_plain",
    "flatten_weights",
    "make_envs",
    "observation_statistics",
    "print_summary",
    "read_run_options",
    "recorded",
    "recorded_rollout",
    "run_process",
    "run_script",
    "start_run",
    "stricter_reward",
    "world_from_environment",
]
