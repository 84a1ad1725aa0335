"""Stable-Baselines3's own PPO on the batched environment, through `hydrogel_gym.sb3`.

    python benchmark/speed/trainers/stable_baselines3_manner.py --output run.jsonl

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

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import LinearSchedule
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from speed.trainers.protocol import Recorder, arguments

from hydrogel_gym.runs.command_line import run_script
from hydrogel_gym.sb3 import BatchedVecEnv

ENV_ID = "HydrogelDesignFlat-v0"


class Trunk(BaseFeaturesExtractor):
    """The shared layers; (B, 13) observations give the statistics that normalise them."""

    def __init__(self, observation_space: gym.Space, obs: Tensor) -> None:
        super().__init__(observation_space, features_dim=256)
        self.layers = nn.Sequential(
            nn.Linear(obs.shape[-1], 256),
            nn.LayerNorm(256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.LayerNorm(256),
            nn.ReLU(),
        )
        std = obs.std(0)
        self.register_buffer("obs_mean", obs.mean(0))
        # Score and iteration never vary in episodes of one step.
        self.register_buffer("obs_std", torch.where(std > 0, std, torch.ones_like(std)))

    def forward(self, obs: Tensor) -> Tensor:
        """(B, 256)."""
        return self.layers((obs - self.obs_mean) / self.obs_std)


class Recording(BaseCallback):
    """Times each rollout and the updates after it, and records both."""

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
        self._samples = self.model.num_timesteps

    def _on_training_end(self) -> None:
        self._finish()

    def _finish(self) -> None:
        """Record the iteration whose updates are over, if there was one."""
        if self.iteration:
            times = self._rolled_out - self._start, time.perf_counter() - self._rolled_out
            self.recorder.record(self.iteration, self._samples, *times)


def train(args: argparse.Namespace) -> None:
    """Train, recording every iteration."""
    # As CleanRL's fast variants do; the checks cost a pass over each minibatch.
    torch.distributions.Distribution.set_default_validate_args(False)
    # Tensors: in numpy form Gymnasium wants an object per environment in `final_obs`.
    envs = BatchedVecEnv(gym.make_vec(ENV_ID, num_envs=args.num_envs, output="torch"))
    # Coefficients that are not named are the source preset's by default, but for no entropy bonus.
    model = PPO(
        "MlpPolicy",
        envs,
        learning_rate=LinearSchedule(args.learning_rate, 0.0, 1.0),
        n_steps=args.num_steps,
        batch_size=args.minibatch_size,
        n_epochs=args.num_epochs,
        seed=args.seed,
        device="cpu",
        policy_kwargs={
            "features_extractor_class": Trunk,
            "features_extractor_kwargs": {"obs": torch.from_numpy(envs.reset())},
            "net_arch": {"pi": [320], "vf": [128]},
            "activation_fn": nn.ReLU,
            "log_std_init": args.log_std_init,
        },
    )

    def act(obs: Tensor) -> np.ndarray:
        return model.predict(obs.numpy(), deterministic=True)[0]

    samples = args.num_iterations * args.num_steps * args.num_envs
    model.learn(samples, callback=Recording(Recorder(args, ENV_ID, act)))


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    spread = dict(type=float, default=0.0, help="initial log-deviation of all actions")
    train(arguments(__doc__, argv, log_std_init=spread))


if __name__ == "__main__":
    sys.exit(run_script(main))
