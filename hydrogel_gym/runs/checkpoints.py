"""Checkpoints: files that know whether they are whole, and the state of a run that they contain."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hydrogel_gym.errors import UsageError, first_line
from hydrogel_gym.files import write_atomically
from hydrogel_gym.runs.options import RunOptions
from hydrogel_gym.runs.ranks import World

CHECKPOINTS = "checkpoints"  # a folder of the run directory

CHECKPOINT_FORMAT = "hydrogel_gym.checkpoint.v2"


class CheckpointError(UsageError):
    """A file that is not a whole checkpoint of this project; the message says why."""


MARK = b"sha256:"  # then the hash in hexadecimal: the comment that a ZIP archive may end with


def checkpoint_name(iteration: int) -> str:
    """File name of a checkpoint; names sort as iterations do."""
    return f"checkpoint-{iteration:06d}.pt"


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run directory, oldest first."""
    return sorted((output_dir / CHECKPOINTS).glob("checkpoint-*.pt"))


def seal(content: dict[str, Any]) -> bytes:
    """A checkpoint as a file that `torch.load` reads, with its own hash at the end."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    archive, length = buffer.getvalue(), len(MARK) + hashlib.sha256().digest_size * 2
    # A ZIP archive ends with the length of its comment, and the comment.
    archive = archive[:-2] + length.to_bytes(2, "little")
    return archive + MARK + hashlib.sha256(archive).hexdigest().encode()


def unseal(sealed: bytes) -> dict[str, Any]:
    """The content of a checkpoint, of plain types and tensors on the CPU; runs no code.

    Raises:
        CheckpointError: the file is damaged, or is something else.
    """
    archive, mark, digest = sealed.rpartition(MARK)
    if not mark:
        raise CheckpointError("it is cut off, or is no checkpoint")
    if hashlib.sha256(archive).hexdigest().encode() != digest:
        raise CheckpointError("it is damaged: its content does not have the hash at its end")
    try:
        content: dict[str, Any] = torch.load(io.BytesIO(archive + mark + digest), weights_only=True)
        found = content["format"]
    except Exception as error:
        raise CheckpointError(first_line(error)) from error
    if found != CHECKPOINT_FORMAT:
        raise CheckpointError(f"its format is {found!r}, not {CHECKPOINT_FORMAT!r}")
    return content


def read_checkpoint(path: Path) -> bytes:
    """A checkpoint as it lies on the disk, once it is known to be whole.

    Raises:
        CheckpointError: names it, and why it cannot be read or used.
    """
    try:
        sealed = path.read_bytes()
        unseal(sealed)
    except (OSError, CheckpointError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"checkpoint {path} cannot be used: {why}") from error
    return sealed


def newest_checkpoint(output_dir: Path) -> bytes | None:
    """The newest checkpoint of a run directory that is whole; None where there is none at all.

    Raises:
        UsageError: there are checkpoints, and none is whole.
    """
    refused: list[str] = []
    paths = checkpoints(output_dir)
    for path in reversed(paths):
        try:
            sealed = read_checkpoint(path)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        for why in refused:
            print(f"warning: {why}; going back to {path}", file=sys.stderr)
        return sealed
    if refused:
        raise UsageError(f"{'; '.join(refused)}; pass --overwrite, without --resume, to begin anew")
    return None


def checkpoint_at(path: Path) -> bytes:
    """The checkpoint that a file is, or the newest of a run directory.

    Raises:
        UsageError: it cannot be used.
    """
    if path.is_dir():
        if (sealed := newest_checkpoint(path)) is None:
            raise UsageError(f"--resume {path}: it has no {CHECKPOINTS}/checkpoint-*.pt")
        return sealed
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        raise UsageError(f"--resume: {error}") from error


def contains(output_dir: Path, checkpoint: Path) -> bool:
    """Whether a checkpoint, or a run directory, is that of a run directory."""
    path = Path(os.path.realpath(checkpoint))
    return Path(os.path.realpath(output_dir)) in (path, path.parent.parent)


def checkpoint_to_resume(options: RunOptions, output_dir: Path) -> bytes | None:
    """The checkpoint that `--resume` means; None begins at the start.

    Raises:
        UsageError: there is none that can be used.
    """
    if options.resume is None:
        return None
    if options.resume == "auto":
        return None if options.overwrite else newest_checkpoint(output_dir)
    path = Path(options.resume)
    newer = [] if path.is_dir() else [p for p in checkpoints(output_dir) if p.name > path.name]
    if newer and contains(output_dir, path) and not options.overwrite:
        raise UsageError(
            f"--resume {path}: {output_dir} contains newer ones, up to {newer[-1].name}; pass "
            "--overwrite to give them up, or another --output-dir"
        )
    return checkpoint_at(path)


class Learner(NamedTuple):
    """What learns, and so what a run saves and takes up again."""

    envs: Any  # this rank's; a vector environment with `state_dict`
    agent: nn.Module
    architecture: dict[str, Any]  # arguments of the agent, plain types
    optimizer: torch.optim.Adam
    generator: torch.Generator  # of samples and minibatches


def run_state(learner: Learner, obs: Tensor, world: World) -> dict[str, Any]:
    """What the next iteration depends on, of all ranks; `load_run_state` takes it back.

    There is no state of a scheduler: the learning rate is a function of the iteration.
    """
    device = obs.device
    environments = learner.envs.unwrapped.state_dict()
    random = {"sampling": learner.generator.get_state(), "cpu": torch.get_rng_state()}
    if device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device)
    return {
        "architecture": learner.architecture,
        "policy_state_dict": {k: v.detach().cpu() for k, v in learner.agent.state_dict().items()},
        "optimizer_state_dict": adam_state(learner.optimizer),
        "obs": world.gather(obs).cpu(),
        "environments": {name: world.gather(x).cpu() for name, x in environments.items()},
        "random": {n: world.gather(x.to(device).unsqueeze(0)).cpu() for n, x in random.items()},
    }


def load_run_state(saved: dict[str, Any], learner: Learner, world: World) -> Tensor:
    """Take up a run at `run_state`, on any number of ranks; returns what was observed last."""
    device, share = learner.generator.device, world.share(len(saved["obs"]))
    learner.agent.load_state_dict(saved["policy_state_dict"])
    load_adam_state(learner.optimizer, saved["optimizer_state_dict"])
    learner.envs.unwrapped.load_state_dict(
        {name: rows[share] for name, rows in saved["environments"].items()}
    )
    # Ranks sample from one stream. What else draws from a rank's own generators (a user's outcome
    # model may) goes on only where there are as many ranks.
    random = saved["random"]
    learner.generator.set_state(random["sampling"][0].clone())  # torch misreads a row of a tensor
    if len(random["cpu"]) == world.size:
        torch.set_rng_state(random["cpu"][world.rank].clone())
        if device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"][world.rank].clone(), device)
    obs: Tensor = saved["obs"][share].to(device)
    return obs


def write_checkpoint(output_dir: Path, content: dict[str, Any], keep: int) -> None:
    """Write a checkpoint of a run directory, and leave so many of those up to it."""
    path = output_dir / CHECKPOINTS / checkpoint_name(content["iteration"])
    write_atomically(path, seal(content))
    up_to_now = [old for old in checkpoints(output_dir) if old.name <= path.name]
    for old in up_to_now[:-keep]:
        old.unlink()


def adam_state(optimizer: torch.optim.Adam) -> dict[str, Any]:
    """Adam's number of updates and its two moments, each as one vector over all weights.

    The same whether the optimiser has a tensor per layer or one for all of them, so that a run goes
    on compiled or not.
    """
    weights = optimizer.param_groups[0]["params"]
    if not optimizer.state:
        zeros = torch.cat([torch.zeros_like(weight).flatten() for weight in weights]).cpu()
        return {"num_updates": 0, "mean": zeros, "square": zeros.clone()}
    mean, square = (
        torch.cat([optimizer.state[weight][name].flatten() for weight in weights]).cpu()
        for name in ("exp_avg", "exp_avg_sq")
    )
    num_updates = int(optimizer.state[weights[0]]["step"])
    return {"num_updates": num_updates, "mean": mean, "square": square}


def load_adam_state(optimizer: torch.optim.Adam, state: dict[str, Any]) -> None:
    """Continue from what `adam_state` returned."""
    weights = optimizer.param_groups[0]["params"]
    sizes = [weight.numel() for weight in weights]
    moments = (state[name].split(sizes) for name in ("mean", "square"))
    for weight, mean, square in zip(weights, *moments, strict=True):
        optimizer.state[weight] = {
            "step": torch.tensor(float(state["num_updates"]), device=weight.device),
            "exp_avg": mean.view_as(weight).to(weight).clone(),
            "exp_avg_sq": square.view_as(weight).to(weight).clone(),
        }
