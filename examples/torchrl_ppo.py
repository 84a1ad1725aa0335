"""TorchRL's clipped PPO loss on the hybrid action itself, as a composite distribution.

    pip install -e . torchrl==0.14.1
    python examples/torchrl_ppo.py                          # about two minutes

The formulation is a Gaussian squashed into its box, polymer and coverage are categorical. TorchRL's
`GymWrapper` takes a Dict action from a single environment only, so the batch is stepped directly.
Episodes have one step, so no advantage estimator is needed: the advantage is the reward less the
value.
"""

import gymnasium as gym
import torch
from shared import ScaledEnvs, arguments, network, report
from tensordict import TensorDict
from tensordict.nn import CompositeDistribution, TensorDictModule, set_composite_lp_aggregate
from torch import nn
from torch.distributions import Categorical
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss

import hydrogel_gym  # noqa: F401  registers the environments

NUM_EPOCHS, LEARNING_RATE = 10, 2e-3
args = arguments(__doc__)
set_composite_lp_aggregate(False).set()  # a log-probability for each part of the action

envs = gym.make_vec("HydrogelDesign-v0", num_envs=args.num_envs, output="torch")
space, num_inputs = envs.single_action_space, envs.single_observation_space.shape[0]
envs = ScaledEnvs(envs, args.seed)


class Parameters(nn.Module):
    """What the three distributions need."""

    def __init__(self):
        super().__init__()
        num_continuous = space["formulation"].shape[0]
        self.widths = [space["polymer_id"].n, num_continuous, space["coverage"].n]
        self.layers = network(num_inputs, sum(self.widths))
        self.logstd = nn.Parameter(torch.full((num_continuous,), -0.5))

    def forward(self, obs):
        """Logits of the polymer, location and scale of the formulation, logits of the coverage."""
        polymer, loc, coverage = self.layers(obs).split(self.widths, -1)
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
critic = ValueOperator(network(num_inputs, 1), in_keys=["observation"])
loss = ClipPPOLoss(
    actor,
    critic,
    entropy_bonus=False,
    critic_coeff=0.5,
    loss_critic_type="l2",
    normalize_advantage=True,
)
optimizer = torch.optim.Adam(loss.parameters(), lr=LEARNING_RATE)

obs, _ = envs.reset(seed=args.seed)
for iteration in range(args.num_iterations):
    optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - iteration / args.num_iterations)
    with torch.no_grad():
        data = critic(actor(TensorDict(observation=obs, batch_size=len(obs))))
        obs, reward, _, _, _ = envs.step(data["action"].select(*space).to_dict())
        data["value_target"] = reward.unsqueeze(-1)
        data["advantage"] = data["value_target"] - data["state_value"]
    for _ in range(NUM_EPOCHS):
        for rows in torch.randperm(args.num_envs).chunk(2):
            losses = loss(data[rows])
            optimizer.zero_grad()
            (losses["loss_objective"] + losses["loss_critic"]).backward()
            nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
            optimizer.step()


def act(obs):
    """The likeliest polymer and coverage, and the median formulation."""
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        data = actor(TensorDict(observation=envs.scale(obs), batch_size=len(obs)))
        return data["action"].select(*space).to_dict()


report(args, act)
