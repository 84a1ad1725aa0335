"""Stable-Baselines3's own PPO on the batched environment, through `hydrogel_gym.sb3`.

    python benchmark/trainers/stable_baselines3_manner.py --num-iterations 30 --output run.jsonl

It takes no composite action, so it learns `HydrogelDesignFlat-v0`: a Gaussian over the formulation
and a score per polymer and coverage. The network has the source preset's trunk and, to 4 %, its
floating-point operations. What a user may do against overhead is done: the environments step as one
batch, all environments share one info, and distributions do not validate their arguments.
`protocol.py` says what `--output` receives.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from protocol import Recorder, check_sizes, run
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import LinearSchedule
from torch import Tensor, nn

from hydrogel_gym.errors import UsageError
from hydrogel_gym.sb3 import BatchedVecEnv

ENV_ID = "HydrogelDesignFlat-v0"


class ScaledVecEnv(BatchedVecEnv):
    """A batch whose rewards are scaled.

    Args:
        num_envs: B.
        reward_scale: rewards are multiplied by this.
    """

    def __init__(self, num_envs: int, reward_scale: float = 1.0) -> None:
        # Tensors: in numpy form Gymnasium wants an object per environment in `final_obs`.
        super().__init__(gym.make_vec(ENV_ID, num_envs=num_envs, output="torch"))
        self.reward_scale = reward_scale

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Step; ended episodes begin anew in the same step."""
        obs, reward, done, infos = super().step_wait()
        return obs, self.reward_scale * reward, done, infos


class Trunk(BaseFeaturesExtractor):
    """The shared layers; observations are normalised by fixed statistics.

    Args:
        observation_space: of one environment.
        obs: (B, 13) observations that give the statistics.
        hidden_dim: width.
    """

    def __init__(self, observation_space: gym.Space, obs: Tensor, hidden_dim: int) -> None:
        super().__init__(observation_space, hidden_dim)
        self.layers = nn.Sequential(
            nn.Linear(obs.shape[-1], hidden_dim),
            nn.LayerNorm(hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.LayerNorm(hidden_dim),
            nn.ReLU(),
        )
        std = obs.std(0)
        self.register_buffer("obs_mean", obs.mean(0))
        # Score and iteration never vary in episodes of one step.
        self.register_buffer("obs_std", torch.where(std > 0, std, torch.ones_like(std)))

    def forward(self, obs: Tensor) -> Tensor:
        """(B, hidden_dim)."""
        return self.layers((obs - self.obs_mean) / self.obs_std)


class Recording(BaseCallback):
    """Times each rollout and the updates after it, and records both.

    Args:
        recorder: where to.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.iteration = 0
        self._start = self._rolled_out = 0.0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self._finish()
        self._start = time.perf_counter()

    def _on_rollout_end(self) -> None:
        self.iteration += 1
        self._rolled_out = time.perf_counter()
        # Before the updates flatten the buffer.
        self._mean_reward = float(self.model.rollout_buffer.rewards.mean())
        self._samples = self.model.num_timesteps

    def _on_training_end(self) -> None:
        self._finish()

    def _finish(self) -> None:
        """Record the iteration whose updates are over, if there was one."""
        if not self.iteration:
            return
        self.recorder.record(
            self.iteration,
            self._samples,
            self._rolled_out - self._start,
            time.perf_counter() - self._rolled_out,
            mean_reward=self._mean_reward / self.training_env.reward_scale,
        )


def make_model(args: argparse.Namespace) -> PPO:
    """The algorithm over its environments."""
    # As CleanRL's fast variants do; the checks cost a pass over each minibatch.
    torch.distributions.Distribution.set_default_validate_args(False)
    envs = ScaledVecEnv(args.num_envs, args.reward_scale)
    obs = torch.from_numpy(envs.reset())
    learning_rate = args.learning_rate
    return PPO(
        "MlpPolicy",
        envs,
        learning_rate=LinearSchedule(learning_rate, 0.0, 1.0) if args.anneal_lr else learning_rate,
        n_steps=args.num_steps,
        batch_size=args.minibatch_size,
        n_epochs=args.num_epochs,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        clip_range=args.clip_coef,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm,
        target_kl=args.target_kl,
        seed=args.seed,
        device="cpu",
        policy_kwargs={
            "features_extractor_class": Trunk,
            "features_extractor_kwargs": {"obs": obs, "hidden_dim": args.hidden_dim},
            "net_arch": {"pi": args.policy_widths, "vf": args.value_widths},
            "activation_fn": nn.ReLU,
            "log_std_init": args.log_std_init,
        },
    )


def train(args: argparse.Namespace) -> None:
    """Train, recording every iteration."""
    model = make_model(args)

    def act(obs: Tensor) -> np.ndarray:
        return model.predict(obs.numpy(), deterministic=True)[0]

    recorder = Recorder(args.output, args.evaluate_every, ENV_ID, act)
    samples = args.num_iterations * args.num_steps * args.num_envs
    model.learn(samples, callback=Recording(recorder))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line, named as our trainer's where it has them."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flag = parser.add_argument
    flag("--num-envs", type=int, default=2000, help="parallel environments")
    flag("--num-steps", type=int, default=100, help="steps per environment and iteration")
    flag("--num-iterations", type=int, default=200, help="rollouts, each followed by its updates")
    flag("--num-epochs", type=int, default=10, help="passes over each batch")
    flag("--minibatch-size", type=int, default=2000, help="samples per update")
    flag("--learning-rate", type=float, default=3e-4, help="initial, of Adam")
    flag("--anneal-lr", action=argparse.BooleanOptionalAction, default=True, help="linear decay")
    flag("--gamma", type=float, default=0.99, help="discount")
    flag("--gae-lambda", type=float, default=0.95, help="lambda of advantage estimation")
    flag("--clip-coef", type=float, default=0.2, help="clipping range of the ratio")
    flag("--vf-coef", type=float, default=0.5, help="weight of the value loss")
    flag("--ent-coef", type=float, default=0.0, help="weight of the entropy bonus")
    flag("--max-grad-norm", type=float, default=0.5, help="largest norm of the gradient")
    flag("--target-kl", type=float, help="KL divergence that ends an iteration's updates")
    flag("--log-std-init", type=float, default=0.0, help="initial log-deviation of all actions")
    flag("--reward-scale", type=float, default=1.0, help="multiplies what the learner is paid")
    flag("--hidden-dim", type=int, default=256, help="width of the trunk")
    flag("--policy-widths", type=int, nargs="*", default=[320], help="layers before the action")
    flag("--value-widths", type=int, nargs="*", default=[128], help="layers before the value")
    flag("--seed", type=int, default=1, help="of weights, samples and minibatches")
    flag("--evaluate-every", type=int, default=0, help="iterations between evaluations; 0 never")
    flag("--output", type=Path, help="file of JSON lines; default standard output")
    args = parser.parse_args(argv)
    sizes = "num_envs num_steps num_iterations num_epochs minibatch_size hidden_dim"
    check_sizes(args, sizes.split())
    if args.minibatch_size == 1:  # its normalised advantage would not be a number
        raise UsageError("--minibatch-size is 1; allowed: 2 or more")
    if args.reward_scale <= 0:
        raise UsageError(f"--reward-scale is {args.reward_scale}; allowed: above 0")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run(train, parse_args, argv)


if __name__ == "__main__":
    sys.exit(main())
