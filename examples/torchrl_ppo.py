"""TorchRL's clipped PPO loss on the hybrid action itself, as a composite distribution.

    pip install -e . torchrl==0.14.1
    python examples/torchrl_ppo.py                          # about two minutes

The formulation is a Gaussian squashed into its box, polymer and coverage are categorical. TorchRL's
`GymWrapper` takes a Dict action from a single environment only, so the batch is stepped directly.
Episodes have one step, so no advantage estimator is needed: the advantage is the reward less the
value.
"""

import argparse
import time

import gymnasium as gym
import torch
from judge import fraction_of_oracle, report
from tensordict import TensorDict
from tensordict.nn import CompositeDistribution, TensorDictModule, set_composite_lp_aggregate
from torch import nn
from torch.distributions import Categorical
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss

import hydrogel_gym  # noqa: F401  registers the environments

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--samples", type=int, default=400_000, help="designs to learn from")
parser.add_argument("--num-envs", type=int, default=2000, help="designs at once")
parser.add_argument("--num-epochs", type=int, default=10, help="passes over each batch")
parser.add_argument("--learning-rate", type=float, default=2e-3, help="at the start, of Adam")
parser.add_argument("--seed", type=int, default=1, help="of weights and samples")
args = parser.parse_args()
torch.set_num_threads(1)
torch.manual_seed(args.seed)
set_composite_lp_aggregate(False).set()  # a log-probability for each part of the action

envs = gym.make_vec("HydrogelDesign-v0", num_envs=args.num_envs, output="torch")
space = envs.single_action_space
obs, _ = envs.reset(seed=args.seed)
mean, std = obs.mean(0), obs.std(0)
std[std == 0] = 1.0  # score and iteration, where an episode has one step


class Network(nn.Module):
    """Two hidden layers over a normalised observation, and a layer for each output."""

    def __init__(self, *widths):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(len(mean), 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh()
        )
        self.heads = nn.ModuleList(nn.Linear(128, width) for width in widths)

    def forward(self, obs):
        """One tensor for each width."""
        hidden = self.trunk((obs - mean) / std)
        outputs = tuple(head(hidden) for head in self.heads)
        return outputs if len(outputs) > 1 else outputs[0]


class Parameters(Network):
    """What the three distributions need."""

    def __init__(self):
        box = space["formulation"].shape[0]
        super().__init__(space["polymer_id"].n, box, space["coverage"].n)
        self.logstd = nn.Parameter(torch.full((box,), -0.5))

    def forward(self, obs):
        """Logits of the polymer, location and scale of the formulation, logits of the coverage."""
        polymer, loc, coverage = super().forward(obs)
        return polymer, loc, self.logstd.exp().expand_as(loc), coverage


heads = {("action", name): Categorical for name in ("polymer_id", "coverage")}
heads["action", "formulation"] = TanhNormal
box = space["formulation"]
limits = {"low": torch.tensor(box.low), "high": torch.tensor(box.high)}
outputs = [("polymer_id", "logits"), ("formulation", "loc"), ("formulation", "scale")]
outputs += [("coverage", "logits")]
actor = ProbabilisticActor(
    TensorDictModule(
        Parameters(),
        in_keys=["observation"],
        out_keys=[("params", "action", *output) for output in outputs],
    ),
    in_keys=["params"],
    distribution_class=CompositeDistribution,
    distribution_kwargs={
        "distribution_map": heads,
        "extra_kwargs": {("action", "formulation"): limits},
    },
    return_log_prob=True,
    default_interaction_type=ExplorationType.RANDOM,
)
critic = ValueOperator(Network(1), in_keys=["observation"])
loss = ClipPPOLoss(
    actor,
    critic,
    entropy_bonus=False,
    critic_coeff=0.5,
    loss_critic_type="l2",
    normalize_advantage=True,
)
optimizer = torch.optim.Adam(loss.parameters(), lr=args.learning_rate)

num_iterations = -(-args.samples // args.num_envs)
start = time.perf_counter()
for iteration in range(num_iterations):
    optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / num_iterations)
    with torch.no_grad():
        data = critic(actor(TensorDict(observation=obs, batch_size=len(obs))))
        obs, reward, _, _, _ = envs.step(data["action"].select(*space).to_dict())
        reward = reward.unsqueeze(-1)
        if iteration == 0:
            reward_std = reward.std()
        data["value_target"] = reward / reward_std
        data["advantage"] = data["value_target"] - data["state_value"]
    for _ in range(args.num_epochs):
        for rows in torch.randperm(args.num_envs).chunk(2):
            losses = loss(data[rows])
            optimizer.zero_grad()
            (losses["loss_objective"] + losses["loss_critic"]).backward()
            nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
            optimizer.step()
seconds = time.perf_counter() - start


def act(obs):
    """The likeliest polymer and coverage, and the median formulation."""
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        return (
            actor(TensorDict(observation=obs, batch_size=len(obs)))["action"]
            .select(*space)
            .to_dict()
        )


report(fraction_of_oracle(act, output="torch"), num_iterations * args.num_envs, seconds)
