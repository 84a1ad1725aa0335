"""Options that every run shares: where it writes, what it is interrupted by, and its problem."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydrogel_gym.errors import UsageError
from hydrogel_gym.problem.cohort import SHIPPED
from hydrogel_gym.runs.command_line import check_ranges
from hydrogel_gym.runs.compiled import Compile
from hydrogel_gym.runs.devices import Precision

if TYPE_CHECKING:
    from typing_extensions import Self

BUILT_IN = "mechanistic"
ADAPTIVE = "HydrogelAdapt-v0"  # its patients respond otherwise than predicted
WANDB_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")
# Flags of training that earlier versions had, and what replaces each.
REMOVED_FLAGS = {
    "--evaluate": "use python train/evaluate.py POLICY",
    "--true-reward-model": "use python train/evaluate.py POLICY --reward-model MODEL",
    "--wandb-project": "set $WANDB_PROJECT",
    "--wandb-entity": "set $WANDB_ENTITY",
    "--reward-precision": "a reward model computes in float32",
}


@dataclass
class ProblemOptions:
    """The design problem."""

    env_id: str = "HydrogelDesign-v0"
    """environment to learn"""
    horizon: int = 1
    """designs tried per episode"""
    cohort: Path | None = None
    """patients to train on, CSV or Parquet, or the shipped `train` (default) or `holdout`"""
    holdout_cohort: Path | None = None
    """patients to measure generalisation on; default the shipped hold-out cohort"""
    patient_assignment: Literal["fixed", "random"] = "fixed"
    """whether an environment keeps its patient or draws one at each reset"""
    reward_model: str | None = None
    """frozen Stage-1 model that rewards: mechanistic, a checkpoint of `train/fit_stage1.py` (.pt),
    a program of torch.export (.pt2), or module:factory; default the environment's own"""
    pessimism: float | None = None
    """standard deviations of a checkpoint's ensemble below its mean that are rewarded; default the
    checkpoint's own"""
    reward_mode: Literal["score", "improvement"] | None = None
    """what a step is worth: its score, or what it gains on the best of the episode; default the
    environment's own"""

    # Of HydrogelAdapt-v0, whose own are the defaults
    response_sd: float | None = None
    """how far patients respond otherwise than predicted"""
    outcome_noise: tuple[float, ...] | None = None
    """deviation of each of the six measured outcomes, in its unit"""
    check_cost: float | None = None
    """what a check takes off the reward"""
    observe: Literal["history", "estimate", "sample", "response"] | None = None
    """what an observation ends with; trained with the response, a policy is evaluated with samples
    of what the checks say of it"""

    @property
    def reward_model_name(self) -> str:
        """The model as a person knows it."""
        return self.reward_model or BUILT_IN

    @property
    def observe_when_evaluated(self) -> str | None:
        """`observe` where the response is hidden."""
        return "sample" if self.observe == "response" else self.observe

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """The problem of a saved run or policy; settings of other versions are ignored."""
        problem: Self = from_config(cls, config)
        return problem


@dataclass
class RunOptions:
    """Where a run is kept, how it goes on, and where it is logged."""

    output_dir: Path | None = None
    """run directory; default runs/PRESET-sSEED"""
    overwrite: bool = False
    """replace the run that the output directory contains"""
    seed: int = 1
    """seed of weights, sampling and minibatches"""
    device: str = "auto"
    """auto (cuda if there is one, else cpu) or a torch device"""
    precision: Precision = "fp32"
    """of the two large matrix products (fp32 is TF32 on CUDA), everything else being float32;
    fp64 is float64 throughout, to compare runs by"""
    compile: Compile = "auto"
    """compile rollout and update; auto does so when the run is long enough to gain by it"""
    oracle: bool = True
    """search for every patient's best design first (kept beside the run), to measure regret"""

    # Interruptions
    checkpoint_interval: int = 20
    """iterations from one checkpoint to the next; 0 writes none"""
    keep_checkpoints: int = 3
    """how many of them stay"""
    resume: str | None = None
    """continue a run: from this checkpoint, from the newest of this run directory, or with `auto`
    from the newest of the output directory, and from the start where it has none"""

    # Logs, beside metrics.csv
    track: bool = False
    """log to Weights & Biases; offline where there is no account or no network"""
    tensorboard: bool = False
    """log to TensorBoard, in the run directory"""

    @property
    def dtype(self) -> Literal["float32", "float64"]:
        """Of the environments' numbers."""
        return "float64" if self.precision == "fp64" else "float32"


def from_config(kind: type, config: Mapping[str, Any]) -> Any:
    """Options as they were saved; what another version has besides is ignored."""
    known = {
        field.name: config[field.name] for field in dataclasses.fields(kind) if field.name in config
    }
    for name in ("cohort", "holdout_cohort", "output_dir"):
        if known.get(name) is not None:
            known[name] = Path(known[name])
    return kind(**known)


def with_absolute_paths(options: Any) -> Any:
    """Options whose input files are found from any folder: what reads a policy may be elsewhere."""
    found = {}
    for name in ("cohort", "holdout_cohort", "reward_model"):
        given = getattr(options, name)
        if given is not None and str(given) not in SHIPPED and Path(given).is_file():
            found[name] = type(given)(Path(given).absolute())
    return dataclasses.replace(options, **found)


def plain_config(args: Any) -> dict[str, Any]:
    """Options as plain types."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(args).items()
    }


def check_options(args: Any) -> None:
    """Refuse options of a run and of its problem that cannot be carried out.

    Raises:
        UsageError: names the flag, its value and what is allowed.
    """
    if args.pessimism is not None:
        check_ranges(args, ("pessimism", "0 or more", lambda x: 0.0 <= x < math.inf))
    for flag, wanted, package in (
        ("--track", args.track, "wandb"),
        ("--tensorboard", args.tensorboard, "tensorboard"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise UsageError(f'{flag} needs {package}: pip install -e ".[track]"')
    if args.track and (mode := os.environ.get("WANDB_MODE", "online")) not in WANDB_MODES:
        raise UsageError(f"$WANDB_MODE is {mode!r}; allowed: {', '.join(WANDB_MODES)}")
    check_ranges(
        args,
        ("horizon keep_checkpoints", "1 or more", lambda x: x >= 1),
        ("seed checkpoint_interval", "0 or more", lambda x: x >= 0),
    )


def check_shares(num_envs: int, num_steps: int, minibatch_size: int, ranks: int) -> None:
    """Refuse sizes that the ranks cannot share equally.

    Raises:
        UsageError: names the flag, its value and what is near it.
    """
    if num_envs % ranks:
        below = num_envs // ranks * ranks
        near = [count for count in (below, below + ranks) if count]
        sharing = [n for n in range(2, num_envs + 1) if num_envs % n == 0][:8]
        raise UsageError(
            f"--num-envs is {num_envs}, which {ranks} ranks cannot share equally; near "
            f"it they can share {' or '.join(map(str, near))}; {num_envs} can be shared by "
            f"{', '.join(map(str, sharing))} ..."
        )
    batch_size = num_envs * num_steps
    if batch_size % minibatch_size or minibatch_size % ranks:
        near = [n for n in range(ranks, batch_size + 1, ranks) if batch_size % n == 0]
        near = sorted(sorted(near, key=lambda n: abs(n - minibatch_size))[:4])
        shared = f", or which {ranks} ranks cannot share equally" if ranks > 1 else ""
        raise UsageError(
            f"--minibatch-size is {minibatch_size}, which does not divide the batch of "
            f"num_envs x num_steps = {batch_size}{shared}; near it these do: "
            f"{', '.join(map(str, near))}"
        )
