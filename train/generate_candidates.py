"""Millions of designs for each patient, drawn from a policy, and the best of them.

    python train/generate_candidates.py --patient P0007 --show    # 13 million for one patient
    python train/generate_candidates.py --top-only                # every patient, best designs only

Of each patient `--num-candidates` designs are drawn: a share `--explore` of them evenly from all
that there is, the rest from the policy. The policy is called once: every candidate of a patient is
drawn in the same state. All are evaluated by the reward model; the best `--top-k` and the best of
each polymer and coverage are kept, and, without `--top-only`, all of them, as Parquet in a folder
per patient. `hydrogel_gym.designs` says what lies where, and reads it back.

The same command goes on where an interrupted one stopped: at the next part of a patient's
candidates, which are rows of one file. What is drawn depends on the seed, the patient and the place
among the patient's candidates, and on nothing else, so that neither threads nor ranks change it.
Under `torchrun` ranks share the patients.
"""

from __future__ import annotations

import functools
import math
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from hydrogel_gym.compiled import CompiledFunction, CompileError
from hydrogel_gym.designs import load_designs, sampling
from hydrogel_gym.designs.pictures import draw_designs, printed_designs
from hydrogel_gym.designs.sampling import CandidateStream, Sampler, make_sampler
from hydrogel_gym.designs.store import Designs, Store, file_name
from hydrogel_gym.errors import UsageError
from hydrogel_gym.memory import keep_freed_memory
from hydrogel_gym.problem.fields import FORMULATION_FIELDS
from hydrogel_gym.problem.polymers import NUM_POLYMERS
from hydrogel_gym.problem.reward import RewardConfig
from hydrogel_gym.runs.command_line import check_ranges, read_command_line, run_script
from hydrogel_gym.runs.compiled import Compile
from hydrogel_gym.runs.designing import PatientArgs, begin, explaining_interruptions, manifest
from hydrogel_gym.runs.devices import resolve_device
from hydrogel_gym.runs.directory import save_figure
from hydrogel_gym.runs.ranks import world_from_environment
from hydrogel_gym.train.ppo_hybrid import Agent, HybridAction, Noise, SquashedNormal, choose

BLOCKS_PER_PART = 4  # of a file of candidates
BYTES_PER_CANDIDATE = 28  # on disk, about
SHOWN = 10

# Of `--compile auto`: what compiling takes, and saves, on two cores.
WORTH_COMPILING = 60_000_000


@dataclass
class Args(PatientArgs):
    """Draw designs for patients from a policy, evaluate them and keep the best."""

    num_candidates: int = 13_000_000
    """designs per patient; the default is the source's"""
    temperature: float = 1.0
    """log-probabilities of the policy are divided by this: above 1 designs are more varied"""
    explore: float = 0.05
    """share of the designs that is drawn evenly from the whole design space"""
    top_only: bool = False
    """keep the best alone, not the candidates"""
    show: bool = False
    """print the ten best designs of each patient, and draw them"""
    compile: Compile = "auto"
    """evaluate in one compiled graph; `auto` where there is enough to evaluate"""


class Choices(NamedTuple):
    """Everything that a policy may choose for one patient, or for P, whose choices are stacked."""

    polymer_logp: Tensor  # (24,)
    coverage_logp: Tensor  # (24, 4), by polymer
    formulation: SquashedNormal  # by polymer

    def sample(self, noise: Noise) -> HybridAction:
        """(P, N) actions for P patients, from (P, N, ...) random numbers."""
        rows = torch.arange(len(self.polymer_logp), device=noise.normal.device)[:, None]
        pick_polymer, pick_coverage = noise.uniform.unbind(-1)
        shape = pick_polymer.shape
        logp = self.polymer_logp[:, None].expand(*shape, -1).flatten(0, 1)
        polymer = choose(logp, pick_polymer.flatten()).view(shape)
        logp = self.coverage_logp[rows, polymer].flatten(0, 1)
        coverage = choose(logp, pick_coverage.flatten()).view(shape)
        presquash = self.formulation.rows((rows, polymer)).sample(noise.normal)
        return HybridAction(polymer, presquash, coverage)

    def likeliest(self) -> HybridAction:
        """The deterministic action, one for each of P patients, as (P, 1)."""
        polymer = self.polymer_logp.argmax(-1)
        rows = torch.arange(len(polymer), device=polymer.device)
        coverage = self.coverage_logp[rows, polymer].argmax(-1)
        presquash = self.formulation.rows((rows, polymer)).median()
        return HybridAction(polymer[:, None], presquash[:, None], coverage[:, None])

    def logprob(self, action: HybridAction) -> Tensor:
        """(N,) log-probability of N actions for one patient."""
        return (
            self.polymer_logp[action.polymer_id]
            + self.coverage_logp[action.polymer_id, action.coverage]
            + self.formulation.rows(action.polymer_id).logprob(action.presquash)
        )

    def divergence(self, other: Choices) -> Tensor:
        """KL divergence from another policy for one patient, (), nats."""
        chosen = self.polymer_logp.exp()
        polymer = (chosen * (self.polymer_logp - other.polymer_logp)).sum()
        coverage = (self.coverage_logp.exp() * (self.coverage_logp - other.coverage_logp)).sum(-1)
        formulation = self.formulation.divergence(other.formulation)
        return polymer + (chosen * (coverage + formulation)).sum()


def choices_of(
    agent: Agent, polymer_in: Tensor, formulation_in: Tensor, coverage_in: Tensor
) -> Choices:
    """The heads' output for every polymer, given their (128,), (128,) and (64,) pre-activations."""
    polymers = torch.arange(NUM_POLYMERS, device=polymer_in.device)
    coverage = agent.coverage_head(coverage_in.expand(NUM_POLYMERS, -1), polymers)
    return Choices(
        agent.polymer_head(polymer_in[None])[0].log_softmax(-1),
        coverage.log_softmax(-1).expand(NUM_POLYMERS, -1),
        agent.formulation_distribution(
            formulation_in.expand(NUM_POLYMERS, -1),
            polymers,
            torch.zeros_like(polymers),  # no head of the formulation looks at the coverage
        ),
    )


@torch.no_grad()
def policy_sampler(agent: Agent, obs: Tensor, patient: Tensor, args: Args) -> Sampler:
    """What a patient's candidates are drawn from, by calling the policy once.

    Args:
        agent: the policy.
        obs: (obs_dim,) first observation of the patient.
        patient: (11,).
        args: for temperature and exploration.
    """
    choices = choices_of(agent, *(part[0] for part in agent.head_inputs(obs[None])[:3]))

    def cooled(logp: Tensor) -> Tensor:
        return (logp.double() / args.temperature).softmax(-1)

    probability = cooled(choices.polymer_logp)[:, None] * cooled(choices.coverage_logp)
    return make_sampler(patient, probability.flatten(), choices.formulation, args.explore)


def evaluator(problem: Any, sampler: Sampler, args: Args, total: int) -> Callable[..., Any]:
    """Draws and evaluates a block, compiled where it is worth it.

    Args:
        problem: reward model and limits.
        sampler: of any patient.
        args: for the temperature and `--compile`.
        total: designs of the whole run.

    Raises:
        UsageError: `--compile on` is not possible here.
    """
    evaluate = functools.partial(
        sampling.evaluate,
        squash=SquashedNormal.squash,
        temperature=args.temperature,
        reward_model=problem.reward_model,
        reward_config=problem.params.reward_config,
    )
    if args.compile == "off" or (args.compile == "auto" and total < WORTH_COMPILING):
        return evaluate
    size, device = sampling.BLOCK, sampler.patient.device
    compiled = CompiledFunction(evaluate, device)
    here = {"dtype": torch.float32, "device": device}
    uniform = torch.rand(size, **here)
    normal = torch.randn(size, len(FORMULATION_FIELDS), **here)
    try:
        with torch.no_grad():  # as it will be called
            compiled(sampler, uniform, normal)
    except CompileError as error:
        if args.compile == "on":
            raise UsageError(f"--compile on: {error}; use --compile off") from error
        print(f"not compiled, going on without: {error}", file=sys.stderr)
        return evaluate
    return compiled


def generate(
    stream: CandidateStream,
    store: Store,
    pool: ThreadPoolExecutor,
    bar: tqdm,
    *,
    ahead: int,
    top_only: bool,
) -> None:
    """All candidates of a patient, and what is kept of them.

    Args:
        stream: of the patient.
        store: where to.
        pool: of threads that draw.
        bar: progress.
        ahead: how many blocks are under way at a time.
        top_only: write no candidates.
    """

    def is_wanted(block: int) -> bool:
        return not top_only and not parts_there[block // BLOCKS_PER_PART]

    patient_id = stream.patient_id
    num_parts = math.ceil(stream.num_blocks / BLOCKS_PER_PART)
    parts_there = [store.part(patient_id, part).exists() for part in range(num_parts)]
    rows: list[Designs] = []
    for index, block in enumerate(stream.blocks(pool, ahead, is_wanted)):
        if block.every:
            rows.append(block.every)
        if rows and (len(rows) == BLOCKS_PER_PART or index + 1 == stream.num_blocks):
            store.write(patient_id, store.part(patient_id, index // BLOCKS_PER_PART), rows)
            rows = []
        bar.update(block.size)
        bar.set_postfix_str(f"{store.bytes_written / 1e6:,.0f} MB written", refresh=False)
    store.write_best(patient_id, stream.best, stream.diverse)
    if (found := len(stream.best.cell)) < stream.top_k:
        tqdm.write(
            f"warning: {patient_id}: {found:,} of {stream.top_k:,} designs: no more of the "
            f"{stream.num_candidates:,} candidates are unlike each other",
            file=sys.stderr,
        )


def run(args: Args) -> Path:
    """Generate what is requested and not yet there; returns where it is.

    Raises:
        UsageError: it cannot be done as requested.
        OSError: a file cannot be written; what was complete before is.
    """
    check_ranges(
        args,
        ("num_candidates", "1 or more", lambda x: x >= 1),
        ("temperature", "above 0", lambda x: 0.0 < x < math.inf),
        ("explore", "0 to 1", lambda x: 0.0 <= x <= 1.0),
    )
    world = world_from_environment()
    device = resolve_device(args.device, world)
    start = begin(args, Agent, device)
    ids, config = start.cohort.patient_ids, start.problem.params.reward_config
    patients = start.problem.params.patients.float()
    output_dir = args.output_dir or start.path.parent / "designs"
    flags = "num_candidates temperature explore top_k top_only seed"
    store = Store(output_dir, manifest(start, device, args, flags))
    rows = start.rows[world.rank :: world.size]
    left = [row for row in rows if not store.is_done(ids[row])]
    warn_of_space(output_dir, args, len(left))

    threads = torch.get_num_threads() if device.type == "cpu" else 2
    torch.set_num_threads(1)  # blocks are shared by threads of our own
    total = len(left) * args.num_candidates
    any_sampler = policy_sampler(start.agent, start.obs[0], patients[0], args)
    evaluate = evaluator(start.problem, any_sampler, args, total)
    sizes = dict(num_candidates=args.num_candidates, top_k=args.top_k, seed=args.seed)
    progress = dict(unit="design", unit_scale=True, smoothing=0.05, disable=world.rank > 0)
    keep_freed_memory()
    import pyarrow  # which the store has asked for

    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # what is freed serves all
    with (
        explaining_interruptions(store, [ids[row] for row in left]),
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        tqdm(total=total, **progress) as bar,
    ):
        for row in left:
            bar.set_description(ids[row][:30], refresh=False)
            sampler = policy_sampler(start.agent, start.obs[row], patients[row], args)
            stream = CandidateStream(ids[row], sampler, evaluate, **sizes)
            generate(stream, store, pool, bar, ahead=2 * threads, top_only=args.top_only)
    if args.show:
        for row in rows:
            show(output_dir, ids[row], config)
    return output_dir


def warn_of_space(output_dir: Path, args: Args, num_patients: int) -> None:
    """Say beforehand that the disk has no room for all candidates."""
    needed = 0 if args.top_only else num_patients * args.num_candidates * BYTES_PER_CANDIDATE
    free = shutil.disk_usage(output_dir).free
    if needed > free:
        print(
            f"warning: the candidates will take about {needed / 1e9:,.1f} GB and {output_dir} has "
            f"{free / 1e9:,.1f} GB left; --top-only keeps the best alone",
            file=sys.stderr,
        )


def show(output_dir: Path, patient_id: str, config: RewardConfig) -> None:
    """Print a patient's ten best designs, and draw all that were kept."""
    designs = load_designs(output_dir, patient_id)
    shown = designs.head(SHOWN)
    print(
        f"\n{patient_id} (a virtual patient): predicted outcomes of the {len(shown)} best designs"
    )
    print(printed_designs(shown, config))
    path = output_dir / f"{file_name(patient_id)}.png"
    diverse = load_designs(output_dir, patient_id, table="diverse")
    save_figure(path, draw_designs(patient_id, designs, diverse))
    print(f"drawn in {path}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""

    def body() -> None:
        output_dir = run(read_command_line(Args, argv, prog="generate_candidates.py"))
        if world_from_environment().rank == 0:
            print(f"written to {output_dir}")

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())
