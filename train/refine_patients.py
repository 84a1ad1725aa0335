"""A policy of each patient's own, fine-tuned from the one for all, and the best designs on the way.

    python train/refine_patients.py                                     # every patient
    python train/refine_patients.py --patient P0007 P0008 --policy runs/full-s1

Per patient, `--num-copies` designs are drawn and evaluated in each of `--num-iterations`, and the
heads that choose polymer, formulation and coverage take a policy-gradient step [Williams1992] with
the patient's own mean reward as the baseline. What the heads see of a patient never changes, so the
trunk below them, which all patients share, stays as it is; no head may leave the policy for all by
more than `--max-kl`. Many patients are tuned at once, their heads stacked.

Left in `--output-dir`: the best designs, as `generate_candidates.py` leaves them, so that
`rank_designs.py` takes them too, and `patient_policies/PATIENT.pt`. That is a whole policy (0.9 MB
with the default width) rather than what has changed, so that whatever takes a `stage2_policy.pt`
takes it alone. It is the best of all iterations by its deterministic design, the policy for all
among them, and so never worse than that. Who else is refined in the same command changes the
rounding of a patient's policy, in the fifth digit; the same command gives the same policy, also
when it was interrupted.

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

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm import tqdm

from hydrogel_gym.designs.grid import on_grid
from hydrogel_gym.designs.sampling import block_seed, check_finite, checked_reward
from hydrogel_gym.designs.schema import REWARD, numbers_of
from hydrogel_gym.designs.store import Store, file_name
from hydrogel_gym.designs.top import TopDesigns
from hydrogel_gym.files import write_atomically
from hydrogel_gym.problem.fields import COVERAGES
from hydrogel_gym.problem.reward import RewardConfig, compute_reward
from hydrogel_gym.runs.command_line import check_ranges, read_command_line, run_script
from hydrogel_gym.runs.designing import PatientArgs, begin, explaining_interruptions, manifest
from hydrogel_gym.runs.devices import resolve_device
from hydrogel_gym.runs.ranks import world_from_environment
from hydrogel_gym.train.generate_candidates import Choices, choices_of
from hydrogel_gym.train.ppo_hybrid import Agent, HybridAction, Noise, SquashedNormal, draw_noise

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

    def __init__(self, agent: Agent) -> None:
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


class EvaluatedDesigns(NamedTuple):
    """Designs of P patients, N each, and what is predicted of them."""

    cell: Tensor  # (P, N) uint8
    numbers: Tensor  # (R, P, N) `designs.NUMBERS`
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
        patients: (P, C).
        problem: reward model and limits.
        learner_config: the limits that the policy was trained under.
        args: sizes and rates.
    """

    def __init__(
        self,
        agent: Agent,
        obs: Tensor,
        patients: Tensor,
        problem: Any,
        learner_config: RewardConfig,
        args: Args,
    ) -> None:
        self.args, self.patients, self.problem = args, patients, problem
        self.learner_config = learner_config
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
        self.divergence = torch.func.vmap(Choices.divergence)
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
        return -(self._choices(weights, inputs).logprob(action) * advantage).mean()

    @torch.no_grad()
    def evaluate(self, action: HybridAction) -> EvaluatedDesigns:
        """What becomes of (P, N) actions, on the grid that designs are made on."""
        polymer, presquash, coverage = action
        formulation = on_grid((SquashedNormal.squash(presquash) + 1.0) / 2.0).flatten(0, 1)
        shape = polymer.shape
        patients = self.patients[:, None].expand(*shape, -1).flatten(0, 1)
        outcomes = self.problem.reward_model(
            patients, polymer.flatten(), formulation, coverage.flatten()
        )
        reward = checked_reward(outcomes, self.problem.params.reward_config)
        return EvaluatedDesigns(
            (polymer * len(COVERAGES) + coverage).to(torch.uint8),
            numbers_of(formulation, outcomes, reward).unflatten(1, shape),
            compute_reward(outcomes, config=self.learner_config).view(shape),
        )

    def step(self, noise: Noise) -> EvaluatedDesigns:
        """Draw, evaluate and learn once; returns what was drawn."""
        with torch.no_grad():
            action = self.choices(self.weights, self.inputs).sample(noise)
        designs = self.evaluate(action)
        std, mean = torch.std_mean(designs.learnt_from, -1, keepdim=True)
        advantage = (designs.learnt_from - mean) / (std + 1e-8)
        gradients = self.gradients(self.weights, self.inputs, action, advantage)
        for name, gradient in gradients.items():
            self.weights[name].grad = gradient
        self.optimizer.step()
        self.bound()
        return designs

    @torch.no_grad()
    def bound(self) -> Tensor:
        """Draw policies that are too far from the one for all back towards it; returns (P,) KL."""
        kl = self.divergence(self.choices(self.weights, self.inputs), self.base_choices)
        while (kl > self.args.max_kl).any():
            # Near the base the divergence is quadratic in the distance; a little less, so that one
            # step is enough.
            share = (self.args.max_kl / kl).sqrt().mul(0.95).clamp(max=1.0)
            share = torch.where(kl > self.args.max_kl, share, 1.0)
            for name, weight in self.weights.items():
                weight.copy_(torch.lerp(self.base[name], weight, by_patient(share, weight)))
            kl = self.divergence(self.choices(self.weights, self.inputs), self.base_choices)
        return kl

    @torch.no_grad()
    def deterministic(self) -> EvaluatedDesigns:
        """What each policy designs without chance, (P, 1)."""
        return self.evaluate(self.choices(self.weights, self.inputs).likeliest())


def by_patient(values: Tensor, weight: Tensor) -> Tensor:
    """(P,) values in a shape that broadcasts against (P, ...) weights."""
    return values.view(-1, *[1] * (weight.dim() - 1))


def noise_of(patient_ids: list[str], iteration: int, dim: int, args: Args) -> Noise:
    """(P, N, ...) random numbers that depend on seed, patient and iteration alone."""
    drawn = []
    for patient_id in patient_ids:
        generator = torch.Generator().manual_seed(block_seed(args.seed, patient_id, iteration))
        drawn.append(draw_noise(args.num_copies, dim=dim, generator=generator))
    return tree_map(lambda *parts: torch.stack(parts), *drawn)


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
    dim = tuner.heads.agent.formulation_dim
    kept = {name: weight.clone() for name, weight in tuner.weights.items()}
    first = tuner.deterministic()
    base_reward = best_reward = first.reward[:, 0]
    seen = [first]
    for iteration in range(args.num_iterations):
        noise = noise_of(patient_ids, iteration, dim, args)
        seen.append(tuner.step(Noise(*(part.to(device) for part in noise))))
        now = tuner.deterministic()
        seen.append(now)
        better = now.reward[:, 0] > best_reward
        best_reward = torch.where(better, now.reward[:, 0], best_reward)
        for name, weight in tuner.weights.items():
            kept[name] = torch.where(by_patient(better, weight), weight, kept[name])
    cell = torch.cat([designs.cell for designs in seen], 1).cpu().numpy()
    numbers = torch.cat([designs.numbers for designs in seen], 2).cpu().numpy()
    best, diverse = [], []
    for row, patient_id in enumerate(patient_ids):
        check_finite(patient_id, cell[row], numbers[:, row])
        best.append(TopDesigns(args.top_k))
        diverse.append(TopDesigns(1, per_cell=True))
        for designs in (best[-1], diverse[-1]):
            designs.add(cell[row], numbers[:, row])
    return Refined(kept, best, diverse, base_reward, best_reward)


def policy_file(saved: dict[str, Any], weights: dict[str, Tensor], patient_id: str) -> bytes:
    """A patient's policy, as a file that `load_policy` reads."""
    own = {name.removeprefix("agent."): weight.cpu().clone() for name, weight in weights.items()}
    content = saved | {
        "policy_state_dict": saved["policy_state_dict"] | own,
        "patient_id": patient_id,
        "regret_calibration": None,  # is of the policy for all
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def write(store: Store, saved: dict[str, Any], patient_ids: list[str], refined: Refined) -> None:
    """Write policy and best designs of the patients who have none yet."""
    for i, patient_id in enumerate(patient_ids):
        if store.is_done(patient_id):
            continue
        weights = {name: weight[i] for name, weight in refined.weights.items()}
        path = store.output_dir / POLICIES / f"{file_name(patient_id)}.pt"
        write_atomically(path, policy_file(saved, weights, patient_id))
        store.write_best(patient_id, refined.best[i], refined.diverse[i])


def run(args: Args) -> dict[str, float]:
    """Refine whoever is requested and not yet there; returns mean rewards.

    Raises:
        UsageError: it cannot be done as requested.
        OSError: a file cannot be written; what was complete before is.
    """
    check_ranges(
        args,
        ("num_copies", "2 or more", lambda x: x >= 2),
        ("num_iterations", "1 or more", lambda x: x >= 1),
        ("learning_rate", "above 0", lambda x: 0.0 < x < math.inf),
        ("max_kl", "above 0", lambda x: x > 0.0),
    )
    world = world_from_environment()
    device = resolve_device(args.device, world)
    start = begin(args, Agent, device)
    agent, problem, ids = start.agent.float(), start.problem, start.cohort.patient_ids
    obs, patients = start.obs.float(), problem.params.patients.float()
    trained = start.saved["training_config"]
    learner_config = problem.params.reward_config.stricter(
        trained["limit_margin"], trained["penalty_scale"]
    )
    output_dir = args.output_dir or start.path.parent / "refined"
    flags = "num_copies num_iterations learning_rate max_kl top_k seed"
    store = Store(output_dir, manifest(start, device, args, flags))
    (output_dir / POLICIES).mkdir(exist_ok=True)
    rows = start.rows[world.rank :: world.size]
    left = [row for row in rows if not store.is_done(ids[row])]
    unfinished, num_refined, totals = set(left), 0, {"base": 0.0, "policy": 0.0, "design": 0.0}
    progress = dict(unit="patient", desc="refining", disable=world.rank > 0)
    with (
        explaining_interruptions(store, [ids[row] for row in left]),
        tqdm(total=len(left), **progress) as bar,
    ):
        # Of all that are requested, since rounding depends on who is refined together: the command
        # given again refines the whole of a batch that it had not finished, to the same result.
        for chunk in (rows[first : first + AT_ONCE] for first in range(0, len(rows), AT_ONCE)):
            if not (new := len(unfinished.intersection(chunk))):
                continue
            tuner = Tuner(agent, obs[chunk], patients[chunk], problem, learner_config, args)
            refined = refine(tuner, [ids[row] for row in chunk])
            write(store, start.saved, [ids[row] for row in chunk], refined)
            bar.update(new)
            num_refined += len(chunk)
            totals["base"] += float(refined.base_reward.sum())
            totals["policy"] += float(refined.reward.sum())
            totals["design"] += sum(float(best.numbers[REWARD].max()) for best in refined.best)
    means = {name: total / max(num_refined, 1) for name, total in totals.items()}
    return means | {"patients": len(left)}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""

    def body() -> None:
        result = run(read_command_line(Args, argv, prog="refine_patients.py"))
        if not result["patients"]:
            print("nothing left to do: everybody requested is there")
            return
        print(f"{result['patients']:,.0f} patients, mean predicted reward")
        print(f"  deterministic design, policy for all  {result['base']:.3f}")
        print(f"  deterministic design, own policy      {result['policy']:.3f}")
        print(f"  best design found                     {result['design']:.3f}")

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())
