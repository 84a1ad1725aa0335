"""A policy of each patient's own, fine-tuned from the one for all, and the best designs on the way.

    python train/refine_patients.py                                     # every patient
    python train/refine_patients.py --patient P0007 P0008 --policy runs/full-s1

Per patient, `--num-copies` designs are drawn and judged in each of `--num-iterations`, and the
heads that choose polymer, formulation and coverage take a policy-gradient step [Williams1992] with
the patient's own mean reward as the baseline. What the heads see of a patient never changes, so the
trunk below them, which all patients share, stays as it is; no head may leave the policy for all by
more than `--max-kl`. Many patients are tuned at once, their heads stacked.

Left in `--output-dir`: the best designs, as `generate_candidates.py` leaves them, so that
`rank_designs.py` takes them too, and `patient_policies/PATIENT.pt`. That is a whole policy (0.9 MB
with the default width) rather than what has changed, so that whatever takes a `stage2_policy.pt`
takes it alone. It is the best of all iterations by its deterministic design, the policy for all
among them, and so never worse than that.

References:
    [Williams1992] Williams. Simple statistical gradient-following algorithms for connectionist
    reinforcement learning. Machine Learning 8:229.
"""

from __future__ import annotations

import io
import math
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import generate_candidates
import gymnasium as gym
import ppo_hybrid
import torch
from generate_candidates import Choices, PatientArgs, Store, block_seed, choices_of
from ppo_hybrid import HybridAction, Noise, SquashedNormal, UsageError
from torch import Tensor, nn
from tqdm import tqdm

import hydrogel_gym
from hydrogel_gym.designs.grid import on_grid
from hydrogel_gym.designs.schema import REWARD, numbers_of
from hydrogel_gym.designs.store import file_name
from hydrogel_gym.designs.top import TopDesigns
from hydrogel_gym.files import write_atomically
from hydrogel_gym.problem.fields import COVERAGES
from hydrogel_gym.problem.reward import RewardConfig, compute_reward

POLICIES = "patient_policies"
# Patients tuned at once: their heads, gradients and moments take 0.6 MB each.
AT_ONCE = 100


@dataclass
class Args(PatientArgs):
    """Fine-tune a policy for each patient and keep the best designs found on the way."""

    num_copies: int = 500
    """designs per patient and iteration; the source's"""
    num_iterations: int = 50
    """steps of each policy; the source's"""
    learning_rate: float = 1e-4
    """of Adam; the source's"""
    max_kl: float = 1.0
    """how far, in nats, a patient's policy may be from the one for all"""


class Heads(nn.Module):
    """`choices_of` an agent, as a function of the weights of its heads too."""

    def __init__(self, agent: ppo_hybrid.Agent) -> None:
        super().__init__()
        self.agent = agent

    def tuned(self) -> dict[str, Tensor]:
        """The parameters that choose: those of the three heads."""
        heads = ("polymer_head", "formulation_head", "coverage_head", "formulation_log_std")
        return {
            name: weight.detach()
            for name, weight in self.named_parameters()
            if name.split(".")[1] in heads
        }

    def forward(self, *inputs: Tensor) -> Choices:
        """The choices for what the heads see of one patient."""
        return choices_of(self.agent, *inputs)


def log_prob(choices: Choices, action: HybridAction, nodes: Tensor) -> Tensor:
    """(N,) log-probability of N actions for one patient."""
    polymer, presquash, coverage = action
    normal = SquashedNormal(choices.mean[polymer], choices.log_std[polymer], nodes)
    return (
        choices.polymer_logp[polymer]
        + choices.coverage_logp[polymer, coverage]
        + normal.logprob(presquash)
    )


def divergence(new: Choices, old: Choices) -> Tensor:
    """KL divergence of one patient's new policy from the old, (), nats.

    That of the squashed formulations is that of the normal ones: squashing is invertible.
    """
    chosen = new.polymer_logp.exp()
    polymer = (chosen * (new.polymer_logp - old.polymer_logp)).sum()
    coverage = (new.coverage_logp.exp() * (new.coverage_logp - old.coverage_logp)).sum(-1)
    ratio = (2.0 * (new.log_std - old.log_std)).exp()
    shift = (new.mean - old.mean).square() * (-2.0 * old.log_std).exp()
    formulation = 0.5 * (ratio + shift - 1.0 - ratio.log()).sum(-1)
    return polymer + (chosen * (coverage + formulation)).sum()


def sample(choices: Choices, noise: Noise) -> HybridAction:
    """Actions for P patients, whose choices are stacked, from (P, N, ...) random numbers."""
    rows = torch.arange(len(choices.polymer_logp), device=noise.normal.device)[:, None]
    pick_polymer, pick_coverage = noise.uniform.unbind(-1)
    shape = pick_polymer.shape
    logp = choices.polymer_logp[:, None].expand(*shape, -1).flatten(0, 1)
    polymer = ppo_hybrid.choose(logp, pick_polymer.flatten()).view(shape)
    logp = choices.coverage_logp[rows, polymer].flatten(0, 1)
    coverage = ppo_hybrid.choose(logp, pick_coverage.flatten()).view(shape)
    std = choices.log_std[rows, polymer].exp()
    return HybridAction(polymer, choices.mean[rows, polymer] + std * noise.normal, coverage)


def likeliest(choices: Choices) -> HybridAction:
    """The deterministic action, one for each of P patients, as (P, 1)."""
    rows = torch.arange(len(choices.polymer_logp), device=choices.mean.device)
    polymer = choices.polymer_logp.argmax(-1)
    coverage = choices.coverage_logp[rows, polymer].argmax(-1)
    return HybridAction(polymer[:, None], choices.mean[rows, polymer][:, None], coverage[:, None])


class Judged(NamedTuple):
    """Designs of P patients, N each, and what is predicted of them."""

    cell: Tensor  # (P, N) uint8
    numbers: Tensor  # (11, P, N) `designs.NUMBERS`
    learnt_from: Tensor  # (P, N) reward under the learner's stricter limits

    @property
    def reward(self) -> Tensor:
        """(P, N)."""
        return self.numbers[REWARD]


class Tuner:
    """Fine-tunes the heads of several patients at once.

    Args:
        agent: the policy for all.
        obs: (P, obs_dim) first observations.
        patients: (P, 11).
        problem: reward model and limits.
        learner_config: the limits that the policy was trained under.
        args: sizes and rates.
    """

    def __init__(
        self,
        agent: ppo_hybrid.Agent,
        obs: Tensor,
        patients: Tensor,
        problem: Any,
        learner_config: RewardConfig,
        args: Args,
    ) -> None:
        self.args, self.patients, self.problem = args, patients, problem
        self.learner_config, self.nodes = learner_config, agent.nodes
        self.heads = Heads(agent).to(obs.device).requires_grad_(False)
        with torch.no_grad():
            self.inputs = agent.head_inputs(obs)[:3]
        base = self.heads.tuned()
        self.base = {name: w.expand(len(obs), *w.shape) for name, w in base.items()}
        self.weights = {name: w.clone() for name, w in self.base.items()}
        # By element, and so by patient.
        self.optimizer = torch.optim.Adam(self.weights.values(), lr=args.learning_rate)
        self.choices = torch.func.vmap(self._choices)
        self.gradients = torch.func.vmap(torch.func.grad(self._loss))
        with torch.no_grad():
            self.base_choices = self.choices(self.weights, self.inputs)

    def _choices(self, weights: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Choices:
        return torch.func.functional_call(self.heads, weights, inputs)

    def _loss(
        self,
        weights: dict[str, Tensor],
        inputs: tuple[Tensor, ...],
        action: HybridAction,
        advantage: Tensor,
    ) -> Tensor:
        logp = log_prob(self._choices(weights, inputs), action, self.nodes)
        return -(logp * advantage).mean()

    @torch.no_grad()
    def judge(self, action: HybridAction) -> Judged:
        """What becomes of (P, N) actions, on the grid that designs are made on."""
        polymer, presquash, coverage = action
        formulation = on_grid((presquash.tanh() + 1.0) / 2.0).flatten(0, 1)
        shape = polymer.shape
        patients = self.patients[:, None].expand(*shape, -1).flatten(0, 1)
        outcomes = self.problem.reward_model(
            patients, polymer.flatten(), formulation, coverage.flatten()
        )
        reward = generate_candidates.checked_reward(outcomes, self.problem.params.reward_config)
        return Judged(
            (polymer * len(COVERAGES) + coverage).to(torch.uint8),
            numbers_of(formulation, outcomes, reward).unflatten(1, shape),
            compute_reward(outcomes, config=self.learner_config).view(shape),
        )

    def step(self, noise: Noise) -> Judged:
        """Draw, judge and learn once; returns what was drawn."""
        with torch.no_grad():
            action = sample(self.choices(self.weights, self.inputs), noise)
        judged = self.judge(action)
        std, mean = torch.std_mean(judged.learnt_from, -1, keepdim=True)
        advantage = (judged.learnt_from - mean) / (std + 1e-8)
        gradients = self.gradients(self.weights, self.inputs, action, advantage)
        for name, gradient in gradients.items():
            self.weights[name].grad = gradient
        self.optimizer.step()
        self.bound()
        return judged

    @torch.no_grad()
    def bound(self) -> Tensor:
        """Draw policies that are too far from the one for all back towards it; returns (P,) KL."""
        measure = torch.func.vmap(divergence)
        kl = measure(self.choices(self.weights, self.inputs), self.base_choices)
        while (kl > self.args.max_kl).any():
            # Near the base the divergence is quadratic in the distance; a little less, so that one
            # step is enough.
            share = (self.args.max_kl / kl).sqrt().mul(0.95).clamp(max=1.0)
            share = torch.where(kl > self.args.max_kl, share, 1.0)
            for name, weight in self.weights.items():
                weight.copy_(
                    torch.lerp(self.base[name], weight, share.view(-1, *[1] * (weight.dim() - 1)))
                )
            kl = measure(self.choices(self.weights, self.inputs), self.base_choices)
        return kl

    @torch.no_grad()
    def deterministic(self) -> Judged:
        """What each policy designs without chance, (P, 1)."""
        return self.judge(likeliest(self.choices(self.weights, self.inputs)))


def draw_noise(args: Args, patient_ids: list[str], iteration: int) -> Noise:
    """(P, N, ...) random numbers that depend on seed, patient and iteration alone."""
    drawn = []
    for patient_id in patient_ids:
        generator = torch.Generator()
        generator.manual_seed(block_seed(args.seed, patient_id, iteration))
        drawn.append(ppo_hybrid.draw_noise(args.num_copies, formulation_dim=4, generator=generator))
    return Noise(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))


class Refined(NamedTuple):
    """What is kept of several patients."""

    weights: dict[str, Tensor]  # of the heads, (P, ...)
    best: list[TopDesigns]
    diverse: list[TopDesigns]
    base_reward: Tensor  # (P,) of the deterministic design of the policy for all
    reward: Tensor  # (P,) of that of the patient's own


def refine(tuner: Tuner, patient_ids: list[str]) -> Refined:
    """Tune, and keep the best policy and the best designs of each patient."""
    args, device = tuner.args, tuner.patients.device
    kept = {name: weight.clone() for name, weight in tuner.weights.items()}
    first = tuner.deterministic()
    base_reward = best_reward = first.reward[:, 0]
    seen = [first]
    for iteration in range(args.num_iterations):
        noise = Noise(*(x.to(device) for x in draw_noise(args, patient_ids, iteration)))
        seen.append(tuner.step(noise))
        now = tuner.deterministic()
        seen.append(now)
        better = now.reward[:, 0] > best_reward
        best_reward = torch.where(better, now.reward[:, 0], best_reward)
        for name, weight in tuner.weights.items():
            mask = better.view(-1, *[1] * (weight.dim() - 1))
            kept[name] = torch.where(mask, weight, kept[name])
    cell = torch.cat([judged.cell for judged in seen], 1).cpu().numpy()
    numbers = torch.cat([judged.numbers for judged in seen], 2).cpu().numpy()
    tops, diverse = [], []
    for row, patient_id in enumerate(patient_ids):
        generate_candidates.check_finite(patient_id, cell[row], numbers[:, row])
        for lists, designs in (
            (tops, TopDesigns(args.top_k)),
            (diverse, TopDesigns(1, per_cell=True)),
        ):
            designs.add(cell[row], numbers[:, row])
            lists.append(designs)
    return Refined(kept, tops, diverse, base_reward, best_reward)


def policy_file(saved: dict[str, Any], weights: dict[str, Tensor], patient_id: str) -> bytes:
    """A patient's policy, as a file that `ppo_hybrid.load_policy` reads."""
    own = {name.removeprefix("agent."): weight.cpu().clone() for name, weight in weights.items()}
    content = saved | {
        "policy_state_dict": saved["policy_state_dict"] | own,
        "patient_id": patient_id,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def run(args: Args) -> dict[str, float]:
    """Refine whoever is asked for and not yet there; returns mean rewards.

    Raises:
        UsageError: it cannot be done as asked.
        OSError: a file cannot be written; what was complete before is.
    """
    ppo_hybrid.check_ranges(
        args,
        ("num_copies", "2 or more", lambda x: x >= 2),
        ("num_iterations top_k", "1 or more", lambda x: x >= 1),
        ("learning_rate", "above 0", lambda x: 0.0 < x < math.inf),
        ("max_kl", "above 0", lambda x: x > 0.0),
    )
    world = ppo_hybrid.world_from_environment()
    device = ppo_hybrid.resolve_device(args.device, world)
    start = generate_candidates.begin(args, device)
    agent, cohort, problem = start.agent.float(), start.cohort, start.problem
    obs, patients = start.obs.float(), problem.params.patients.float()
    trained = start.saved["training_config"]
    learner_config = problem.params.reward_config.stricter(
        trained["limit_margin"], trained["penalty_scale"]
    )
    output_dir = args.output_dir or start.path.parent / "refined"
    flags = "num_copies num_iterations learning_rate max_kl top_k seed"
    manifest = generate_candidates.manifest(start, device, args, flags)
    store = Store(output_dir, manifest, top_only=True)
    (output_dir / POLICIES).mkdir(exist_ok=True)
    rows = start.rows[world.rank :: world.size]
    mine = [row for row in rows if not store.is_done(cohort.patient_ids[row])]
    totals = {"base": 0.0, "policy": 0.0, "design": 0.0}
    done = 0
    with tqdm(total=len(mine), unit="patient", desc="refining", disable=world.rank > 0) as bar:
        try:
            for first in range(0, len(mine), AT_ONCE):
                chunk = mine[first : first + AT_ONCE]
                ids = [cohort.patient_ids[row] for row in chunk]
                tuner = Tuner(agent, obs[chunk], patients[chunk], problem, learner_config, args)
                refined = refine(tuner, ids)
                for i, patient_id in enumerate(ids):
                    weights = {name: weight[i] for name, weight in refined.weights.items()}
                    name = file_name(patient_id)
                    write_atomically(
                        output_dir / POLICIES / f"{name}.pt",
                        policy_file(start.saved, weights, patient_id),
                    )
                    generate_candidates.write_best(
                        store, patient_id, refined.best[i], refined.diverse[i]
                    )
                    done += 1
                    bar.update()
                totals["base"] += float(refined.base_reward.sum())
                totals["policy"] += float(refined.reward.sum())
                totals["design"] += sum(float(b.numbers[REWARD].max()) for b in refined.best)
        except (OSError, KeyboardInterrupt) as error:
            error.add_note(
                f"{done:,} of {len(mine):,} patients were completed and {output_dir} can be read; "
                "the same command goes on with the others"
            )
            raise
        finally:
            store.writers.shutdown()
    return {name: total / max(len(mine), 1) for name, total in totals.items()} | {"patients": done}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        args = ppo_hybrid.read_command_line(Args, args=argv, prog="refine_patients.py")
        result = run(args)
    except (UsageError, hydrogel_gym.CohortError, gym.error.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, FloatingPointError, KeyboardInterrupt) as error:
        return generate_candidates.report_failure(error)
    if result["patients"]:
        print(f"{result['patients']:,.0f} patients, mean predicted reward")
        print(f"  deterministic design, policy for all  {result['base']:.3f}")
        print(f"  deterministic design, own policy      {result['policy']:.3f}")
        print(f"  best design found                     {result['design']:.3f}")
    else:
        print("nothing left to do: everybody asked for is there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
