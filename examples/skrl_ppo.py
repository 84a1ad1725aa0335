"""skrl's PPO on the hybrid action itself.

    pip install -e . skrl==2.1.1
    python examples/skrl_ppo.py                             # about a minute

skrl hands a Dict action on to the environment but has no model for one, so the policy here makes
its own distribution: two categoricals and a Gaussian. Everything else is the library's.
"""

import gymnasium as gym
import torch
from shared import ScaledEnvs, arguments, network, report
from skrl.agents.torch.ppo import PPO, PPO_CFG
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.models.torch import DeterministicMixin, Model
from skrl.trainers.torch import SequentialTrainer
from skrl.utils import set_seed
from torch import nn
from torch.distributions import Categorical, Normal

import hydrogel_gym  # noqa: F401  registers the environments

args = arguments(__doc__)
set_seed(args.seed)
envs = ScaledEnvs(gym.make_vec("HydrogelDesign-v0", num_envs=args.num_envs), args.seed)
space = envs.single_action_space
low, high = torch.tensor(space["formulation"].low), torch.tensor(space["formulation"].high)
env = wrap_env(envs)
spaces = {"observation_space": env.observation_space, "action_space": env.action_space}


class HybridPolicy(Model):
    """Coverage, formulation and polymer, in the alphabetical order in which skrl flattens a Dict.

    The Gaussian is that of the formulation's place in its box, from -1 to 1.
    """

    def __init__(self):
        super().__init__(**spaces, device=env.device)
        self.sizes = [space["coverage"].n, len(low), space["polymer_id"].n]
        self.layers = network(self.num_observations, sum(self.sizes), 0.01)
        self.log_std = nn.Parameter(torch.full((len(low),), -1.0))

    def compute(self, inputs, *, role=""):
        """Logits of the coverage, mean of the formulation, logits of the polymer."""
        return self.layers(inputs["observations"]).split(self.sizes, -1), {}

    def act(self, inputs, *, role=""):
        """Actions, their log-probability, and the likeliest ones."""
        (coverage, mean, polymer), outputs = self.compute(inputs)
        self.gaussian = Normal(mean, self.log_std.exp())
        heads = [Categorical(logits=coverage), self.gaussian, Categorical(logits=polymer)]
        if "taken_actions" in inputs:
            actions = inputs["taken_actions"]
        else:
            actions = self.join(*(head.sample() for head in heads))
        parts = actions[:, 0], self.share(actions[:, 1:-1]), actions[:, -1]
        logprobs = [head.log_prob(part) for head, part in zip(heads, parts, strict=True)]
        outputs["log_prob"] = (logprobs[0] + logprobs[1].sum(-1) + logprobs[2]).unsqueeze(-1)
        outputs["mean_actions"] = self.join(coverage.argmax(-1), mean, polymer.argmax(-1))
        return actions, outputs

    def distribution(self, *, role=""):
        """Whose spread skrl logs."""
        return self.gaussian

    @staticmethod
    def join(coverage, share, polymer):
        """(B, 6) actions with the formulation in its units."""
        formulation = low + (share + 1) / 2 * (high - low)
        return torch.cat([coverage.unsqueeze(-1), formulation, polymer.unsqueeze(-1)], -1)

    @staticmethod
    def share(formulation):
        """Place of a formulation in its box, from -1 to 1."""
        return (formulation - low) / (high - low) * 2 - 1


class Value(DeterministicMixin, Model):
    """The critic."""

    def __init__(self):
        Model.__init__(self, **spaces, device=env.device)
        DeterministicMixin.__init__(self)
        self.layers = network(self.num_observations, 1)

    def compute(self, inputs, role=""):
        """(B, 1) values."""
        return self.layers(inputs["observations"]), {}


cfg = PPO_CFG(
    rollouts=1,
    learning_epochs=10,
    mini_batches=2,
    discount_factor=0.0,
    learning_rate=2e-3,
    learning_rate_scheduler=torch.optim.lr_scheduler.LinearLR,
    learning_rate_scheduler_kwargs={
        "start_factor": 1.0,
        "end_factor": 1e-3,
        "total_iters": args.num_iterations,
    },
    value_clip=0.0,
    value_loss_scale=0.5,
    experiment={"write_interval": 0, "checkpoint_interval": 0},
)
memory = RandomMemory(memory_size=cfg.rollouts, num_envs=args.num_envs, device=env.device)
models = {"policy": HybridPolicy(), "value": Value()}
agent = PPO(models=models, memory=memory, cfg=cfg, device=env.device, **spaces)
trainer = SequentialTrainer(
    cfg={
        "timesteps": args.num_iterations,
        "headless": True,
        "disable_progressbar": True,
        "close_environment_at_exit": False,
    },
    env=env,
    agents=agent,
)
trainer.train()


def act(obs):
    """The likeliest polymer and coverage, and the mean formulation."""
    agent.enable_training_mode(False)
    actions = agent.act(envs.scale(obs), None, timestep=0, timesteps=0)[1]["mean_actions"]
    return {
        "polymer_id": actions[:, -1].long(),
        "formulation": actions[:, 1:-1],
        "coverage": actions[:, 0].long(),
    }


report(args, act)
