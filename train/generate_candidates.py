"""Millions of designs for each patient, drawn from a policy, and the best of them.

    python train/generate_candidates.py --patient P0007 --show    # 13 million for one patient
    python train/generate_candidates.py --top-only                # every patient, best designs only

Of each patient `--num-candidates` designs are drawn: a share `--explore` of them evenly from all
that there is, the rest from the policy. The policy is asked once: every candidate of a patient is
drawn in the same state. All are evaluated by the reward model; the best `--top-k` and the best of
each polymer and coverage are kept, and, without `--top-only`, all of them, as Parquet in a folder
per patient. `hydrogel_gym.designs` says what lies where, and reads it back.

The same command goes on where an interrupted one stopped: at the next part of a patient's
candidates, which are rows of one file. What is drawn depends on the seed, the patient and the place
among the patient's candidates, and on nothing else, so that neither threads nor ranks change it.
Under `torchrun` ranks share the patients.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import pandas as pd
import ppo_hybrid
import pyarrow as pa
import torch
from ppo_hybrid import UsageError
from torch import Tensor
from tqdm import tqdm

import hydrogel_gym
from hydrogel_gym.compiled import CompiledFunction, CompileError
from hydrogel_gym.designs import load_designs
from hydrogel_gym.designs.grid import NUM_CELLS, RESOLUTION, on_grid
from hydrogel_gym.designs.ranking import safety_margins
from hydrogel_gym.designs.schema import NUMBERS, REWARD, SCHEMA, arrow_table, numbers_of, parquet
from hydrogel_gym.designs.store import file_name, partition
from hydrogel_gym.designs.top import TopDesigns
from hydrogel_gym.files import write_atomically
from hydrogel_gym.memory import keep_freed_memory
from hydrogel_gym.problem.fields import COVERAGES, Outcomes
from hydrogel_gym.problem.polymers import NUM_POLYMERS
from hydrogel_gym.problem.reward import RewardConfig, RewardFunction, compute_reward

# Random numbers are drawn, and designs evaluated, so many at a time, whatever else is asked for: in
# other batches the same numbers would round differently.
BLOCK = 1 << 16
BLOCKS_PER_PART = 4  # of a file of candidates
WRITERS = 2  # threads, and files under way
BYTES_PER_CANDIDATE = 28  # on disk, about
MANIFEST = "manifest.json"
SHOWN = 10

# Of `--compile auto`: what compiling takes, and saves, on two cores; `benchmark/candidates.py`.
WORTH_COMPILING = 60_000_000


@dataclass
class PatientArgs:
    """Which policy designs for whom; of every script that does."""

    policy: Path = Path("runs/quick-s1")
    """a run directory, or a `stage2_policy.pt`"""
    patient: tuple[str, ...] = ()
    """one patient or several; everybody by default"""
    cohort: Path | None = None
    """whose patients, CSV or Parquet; those that the policy was trained on by default"""
    top_k: int = 100
    """how many of a patient's best designs to keep, all unlike each other"""
    seed: int = 1
    """of everything drawn"""
    output_dir: Path | None = None
    """where to; a folder beside the policy by default"""
    device: str = "auto"
    """`cpu`, `cuda`, ...; `auto` takes a GPU if there is one"""


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
    compile: Literal["auto", "on", "off"] = "auto"
    """evaluate in one compiled graph; `auto` where there is enough to evaluate"""


class Sampler(NamedTuple):
    """What the candidates of one patient are drawn from, on the device.

    There are twice 96 slots: the policy's choices of polymer and coverage, and the even ones. One
    uniform number picks a slot and, by the alias method [Walker1977], whether it or its other is
    meant.

    References:
        [Walker1977] Walker. An efficient method for generating discrete random variables with
        general distributions. ACM Trans Math Softw 3:253.
    """

    patient: Tensor  # (11,)
    mean: Tensor  # (24, 4) of the formulation before squashing, by polymer
    std: Tensor  # (24, 4)
    keep: Tensor  # (192,) probability that a slot means itself
    other: Tensor  # (192,) int64, what it means else


def alias_table(probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(K,) chances of keeping a slot and (K,) aliases, for the alias method."""
    scaled = probability / probability.sum() * len(probability)
    keep, other = np.ones_like(scaled), np.arange(len(scaled))
    small = [i for i, p in enumerate(scaled) if p < 1.0]
    large = [i for i, p in enumerate(scaled) if p >= 1.0]
    while small and large:
        poor, rich = small.pop(), large.pop()
        keep[poor], other[poor] = scaled[poor], rich
        scaled[rich] -= 1.0 - scaled[poor]
        (small if scaled[rich] < 1.0 else large).append(rich)
    return keep, other  # what is left over by rounding keeps itself


class Choices(NamedTuple):
    """Everything that a policy may choose for one patient."""

    polymer_logp: Tensor  # (24,)
    coverage_logp: Tensor  # (24, 4), by polymer
    mean: Tensor  # (24, 4) of the formulation before squashing
    log_std: Tensor  # (24, 4)


def choices_of(
    agent: ppo_hybrid.Agent, polymer_in: Tensor, formulation_in: Tensor, coverage_in: Tensor
) -> Choices:
    """Ask the heads for every polymer, given their (128,), (128,) and (64,) pre-activations."""
    polymers = torch.arange(NUM_POLYMERS, device=polymer_in.device)
    coverage = agent.coverage_head(coverage_in.expand(NUM_POLYMERS, -1), polymers)
    formulation = agent.formulation_distribution(
        formulation_in.expand(NUM_POLYMERS, -1),
        polymers,
        torch.zeros_like(polymers),  # no head of the formulation looks at the coverage
    )
    return Choices(
        agent.polymer_head(polymer_in[None])[0].log_softmax(-1),
        coverage.log_softmax(-1).expand(NUM_POLYMERS, -1),
        formulation.mean,
        formulation.log_std,
    )


@torch.no_grad()
def make_sampler(agent: ppo_hybrid.Agent, obs: Tensor, patient: Tensor, args: Args) -> Sampler:
    """Ask the policy once for every polymer.

    Args:
        agent: the policy.
        obs: (obs_dim,) first observation of the patient.
        patient: (11,).
        args: for temperature and exploration.
    """
    choices = choices_of(agent, *(part[0] for part in agent.head_inputs(obs[None])[:3]))

    def cooled(logp: Tensor) -> Tensor:
        return (logp.double() / args.temperature).softmax(-1)

    polymer, coverage = cooled(choices.polymer_logp), cooled(choices.coverage_logp)
    chosen = (polymer[:, None] * coverage).flatten().cpu().numpy()
    even = np.full(NUM_CELLS, 1.0 / NUM_CELLS)
    slots = np.concatenate([(1.0 - args.explore) * chosen, args.explore * even])
    keep, other = (torch.from_numpy(x).to(obs.device) for x in alias_table(slots))
    # A normal density to the power 1 / T is one of T times the variance.
    std = choices.log_std.exp() * math.sqrt(args.temperature)
    return Sampler(patient, choices.mean.float(), std.float(), keep.float(), other)


def draw(sampler: Sampler, uniform: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
    """Designs: (B,) cells, polymer * 4 + coverage, and (B, 4) formulations on the grid.

    Args:
        sampler: of the patient.
        uniform: (B,) in [0, 1).
        normal: (B, 4) standard normal.
    """
    scaled = uniform * len(sampler.keep)
    slot = scaled.long().clamp(max=len(sampler.keep) - 1)
    slot = torch.where(scaled - slot < sampler.keep[slot], slot, sampler.other[slot])
    explores = slot >= NUM_CELLS
    cell = torch.where(explores, slot - NUM_CELLS, slot)
    polymer = cell // len(COVERAGES)
    chosen = torch.tanh(sampler.mean[polymer] + sampler.std[polymer] * normal)
    # The distribution function of a normal number is evenly distributed.
    even = torch.erf(normal * math.sqrt(0.5))
    return cell, on_grid((torch.where(explores.unsqueeze(-1), even, chosen) + 1.0) / 2.0)


def evaluate(
    sampler: Sampler,
    uniform: Tensor,
    normal: Tensor,
    *,
    reward_model: RewardFunction,
    reward_config: RewardConfig,
) -> tuple[Tensor, Tensor]:
    """Draw and judge a block; pure, without a read on the host.

    Returns:
        (B,) uint8 cells and (11, B) `designs.NUMBERS`.
    """
    cell, formulation = draw(sampler, uniform, normal)
    polymer, coverage = cell // len(COVERAGES), cell % len(COVERAGES)
    patient = sampler.patient.expand(len(cell), -1)
    outcomes = reward_model(patient, polymer, formulation, coverage)
    reward = checked_reward(outcomes, reward_config)
    return cell.to(torch.uint8), numbers_of(formulation, outcomes, reward)


def checked_reward(outcomes: Outcomes, config: RewardConfig) -> Tensor:
    """Reward of designs; not a number where an outcome is not finite, as `check_finite` wants it.

    The numbers that are kept would not tell: an infinite logit is a probability of 0 or 1.
    """
    return compute_reward(outcomes, config=config) + sum(outcome * 0.0 for outcome in outcomes)


def block_seed(seed: int, patient_id: str, block: int) -> int:
    """Seed of a block's random numbers."""
    key = json.dumps([seed, patient_id, block]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def check_finite(patient_id: str, cell: np.ndarray, numbers: np.ndarray) -> None:
    """Refuse outcomes that are not finite.

    Raises:
        FloatingPointError: names patient and design.
    """
    bad = np.flatnonzero(~np.isfinite(numbers).all(0))
    if len(bad):
        polymer, coverage = divmod(int(cell[bad[0]]), len(COVERAGES))
        told = dict(zip(NUMBERS, numbers[:, bad[0]].tolist(), strict=True))
        raise FloatingPointError(
            f"the reward model returned an outcome that is not finite for patient {patient_id!r} "
            f"and the design polymer_id={polymer}, coverage={COVERAGES[coverage]}: {told}"
        )


class Block(NamedTuple):
    """What is left of a block once it was looked through."""

    size: int
    best: tuple[np.ndarray, np.ndarray]  # cells and numbers that may be among the best
    diverse: tuple[np.ndarray, np.ndarray]
    every: tuple[np.ndarray, np.ndarray] | None  # all of it, if it is to be written


class Patient:
    """The candidates of one patient, drawn by several threads.

    Args:
        patient_id: who.
        sampler: what to draw from.
        evaluate: `evaluate`, compiled or not, with the reward model in it.
        args: how many, and which to keep.
    """

    def __init__(
        self, patient_id: str, sampler: Sampler, evaluate: Callable[..., Any], args: Args
    ) -> None:
        self.patient_id, self.sampler = patient_id, sampler
        self.evaluate, self.args = evaluate, args
        self.best, self.diverse = TopDesigns(args.top_k), TopDesigns(1, per_cell=True)
        self.num_blocks = math.ceil(args.num_candidates / BLOCK)

    @torch.no_grad()
    def block(self, index: int, wanted: bool) -> Block:
        """Draw and look through a block; all of it is handed out only if wanted.

        Raises:
            FloatingPointError: an outcome is not finite; names patient and design.
        """
        device = self.sampler.patient.device
        generator = torch.Generator(device)
        generator.manual_seed(block_seed(self.args.seed, self.patient_id, index))
        uniform = torch.rand(BLOCK, generator=generator, device=device)
        normal = torch.randn(BLOCK, 4, generator=generator, device=device)
        cell, numbers = (x.cpu().numpy() for x in self.evaluate(self.sampler, uniform, normal))
        size = min(BLOCK, self.args.num_candidates - index * BLOCK)
        cell, numbers = cell[:size], numbers[:, :size]
        if not np.isfinite(numbers[REWARD].sum()):
            check_finite(self.patient_id, cell, numbers)
        best = self.best.promising(cell, numbers[REWARD])
        diverse = self.diverse.promising(cell, numbers[REWARD])
        return Block(
            size,
            (cell[best], numbers[:, best]),
            (cell[diverse], numbers[:, diverse]),
            (cell, numbers) if wanted else None,
        )

    def blocks(
        self, pool: ThreadPoolExecutor, ahead: int, is_wanted: Callable[[int], bool]
    ) -> Iterator[Block]:
        """Every block in its order, `ahead` of them under way at a time."""
        under_way: list[Future[Block]] = []
        try:
            for index in range(self.num_blocks):
                under_way.append(pool.submit(self.block, index, is_wanted(index)))
                if len(under_way) > ahead:
                    yield under_way.pop(0).result()
            while under_way:
                yield under_way.pop(0).result()
        finally:
            for future in under_way:
                future.cancel()


class Store:
    """The files of a run, written by threads of its own: compressing takes as long as drawing.

    Args:
        output_dir: the run's.
        manifest: what makes the designs what they are.
        top_only: write no candidates.

    Raises:
        UsageError: the folder holds designs that something else made, or other files.
    """

    def __init__(self, output_dir: Path, manifest: dict[str, Any], top_only: bool) -> None:
        self.output_dir, self.top_only = output_dir, top_only
        self.bytes_written = 0
        self.writers = ThreadPoolExecutor(WRITERS)
        self.pending: list[Future[int]] = []
        output_dir.mkdir(parents=True, exist_ok=True)
        path = output_dir / MANIFEST
        if path.exists():
            try:
                found = json.loads(path.read_text())
            except ValueError as error:
                raise UsageError(f"{path} cannot be read: {error}") from error
            if differing := ppo_hybrid.differences(found, manifest):
                differing = differing.replace("in the checkpoint", "there")
                raise UsageError(
                    f"{output_dir} holds designs of another run ({differing}); pass another "
                    "--output-dir, or remove it"
                )
        # A hidden file may be the manifest that another rank is writing.
        elif any(p.name[0] != "." for p in output_dir.iterdir()):
            raise UsageError(
                f"{output_dir} is no folder of designs: it has files but no {MANIFEST}"
            )
        else:
            ppo_hybrid.write_json(path, manifest)

    def is_done(self, patient_id: str) -> bool:
        """Whether all there is to write of a patient is there."""
        return (partition(self.output_dir / "top", patient_id) / "designs.parquet").exists()

    def part(self, patient_id: str, index: int) -> Path:
        """File of some candidates."""
        folder = partition(self.output_dir / "candidates", patient_id)
        return folder / f"part-{index:05d}.parquet"

    def write(self, path: Path, blocks: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Write cells and numbers as one file while the caller goes on, unless too many wait.

        Raises:
            OSError: a file before could not be written.
        """
        self.wait(WRITERS - 1)
        self.pending.append(self.writers.submit(self._write, path, blocks))

    def _write(self, path: Path, blocks: list[tuple[np.ndarray, np.ndarray]]) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = parquet(pa.concat_tables(arrow_table(*block) for block in blocks))
        write_atomically(path, content)
        return len(content)

    def wait(self, leave: int = 0) -> None:
        """Wait until no more than some files are under way.

        Raises:
            OSError: one could not be written.
        """
        while len(self.pending) > leave:
            self.bytes_written += self.pending.pop(0).result()


def generate(
    patient: Patient, store: Store, pool: ThreadPoolExecutor, threads: int, bar: tqdm
) -> None:
    """All candidates of a patient, and what is kept of them."""
    patient_id = patient.patient_id

    def is_wanted(block: int) -> bool:
        return not store.top_only and not parts_there[block // BLOCKS_PER_PART]

    num_parts = math.ceil(patient.num_blocks / BLOCKS_PER_PART)
    parts_there = [store.part(patient_id, part).exists() for part in range(num_parts)]
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    for index, block in enumerate(patient.blocks(pool, 2 * threads, is_wanted)):
        patient.best.add(*block.best)
        patient.diverse.add(*block.diverse)
        if block.every:
            rows.append(block.every)
        if rows and (len(rows) == BLOCKS_PER_PART or index + 1 == patient.num_blocks):
            store.write(store.part(patient_id, index // BLOCKS_PER_PART), rows)
            rows = []
        bar.update(block.size)
        bar.set_postfix_str(f"{store.bytes_written / 1e6:,.0f} MB written", refresh=False)
    write_best(store, patient_id, patient.best, patient.diverse)
    if (found := len(patient.best.cell)) < patient.args.top_k:
        tqdm.write(
            f"warning: {patient_id}: {found:,} of {patient.args.top_k:,} designs: no more of the "
            f"{patient.args.num_candidates:,} candidates are unlike each other",
            file=sys.stderr,
        )


def write_best(store: Store, patient_id: str, best: TopDesigns, diverse: TopDesigns) -> None:
    """Write what is kept of a patient."""
    for table, designs in (("diverse", diverse), ("top", best)):
        path = partition(store.output_dir / table, patient_id) / "designs.parquet"
        store.wait()  # `top` is last: where it is, the rest is
        store.write(path, [(designs.cell, designs.numbers)])
    store.wait()


def policy_path(given: Path) -> Path:
    """File of the policy that a run directory holds, or that is given.

    Raises:
        UsageError: there is none.
    """
    path = given / "stage2_policy.pt" if given.is_dir() or not given.suffix else given
    if not path.exists():
        raise UsageError(
            f"--policy {given}: there is no {path}; `python train/ppo_hybrid.py --preset quick` "
            "trains one in a minute"
        )
    return path


class Start(NamedTuple):
    """What designing for patients begins with."""

    path: Path  # of the policy
    saved: dict[str, Any]  # its content
    agent: ppo_hybrid.Agent
    cohort: hydrogel_gym.Cohort
    rows: list[int]  # of the patients asked for
    problem: Any  # reward model, limits, patients
    obs: Tensor  # (P, obs_dim) what the policy sees of each patient before it designs


def begin(args: PatientArgs, device: torch.device) -> Start:
    """Load the policy, its problem and the patients asked for.

    Raises:
        UsageError: one of them is missing, or they do not belong together.
    """
    path = policy_path(args.policy)
    agent, saved = ppo_hybrid.load_policy(path, device)
    trained = saved["training_config"]
    cohort = hydrogel_gym.load_cohort(args.cohort or trained["cohort"])
    try:
        # Once each, however often asked for.
        rows = list(dict.fromkeys(map(cohort.index, args.patient or cohort.patient_ids)))
    except ValueError as error:
        raise UsageError(f"--patient: {error}") from error
    envs = environments(trained, cohort, device)
    obs, _ = envs.reset()
    if (width := obs.shape[-1]) != len(agent.obs_mean):
        raise UsageError(
            f"policy {path} observes {len(agent.obs_mean)} numbers, its environments tell {width}"
        )
    return Start(path, saved, agent, cohort, rows, envs.unwrapped.problem, obs)


def origin(path: Path, cohort: hydrogel_gym.Cohort) -> dict[str, str]:
    """Hashes of the policy and the patients that designs are of."""
    return {
        "policy": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        "patients": ppo_hybrid.digest(cohort),
    }


def manifest(start: Start, device: torch.device, args: PatientArgs, names: str) -> dict[str, Any]:
    """What makes designs what they are, with the flags of these names."""
    return {
        "format": SCHEMA,
        "hydrogel_gym": hydrogel_gym.__version__,
        **origin(start.path, start.cohort),
        "env_id": start.saved["training_config"]["env_id"],
        "device type": device.type,
        **{name: getattr(args, name) for name in names.split()},
        "resolution": list(RESOLUTION),
    }


def run(args: Args) -> Path:
    """Generate what is asked for and not yet there; returns where it is.

    Raises:
        UsageError: it cannot be done as asked.
        OSError: a file cannot be written; what was complete before is.
    """
    ppo_hybrid.check_ranges(
        args,
        ("num_candidates top_k", "1 or more", lambda x: x >= 1),
        ("temperature", "above 0", lambda x: 0.0 < x < math.inf),
        ("explore", "0 to 1", lambda x: 0.0 <= x <= 1.0),
    )
    world = ppo_hybrid.world_from_environment()
    device = ppo_hybrid.resolve_device(args.device, world)
    start = begin(args, device)
    agent, cohort, problem, obs = start.agent, start.cohort, start.problem, start.obs
    output_dir = args.output_dir or start.path.parent / "designs"
    flags = "num_candidates temperature explore top_k top_only seed"
    store = Store(output_dir, manifest(start, device, args, flags), args.top_only)
    rows = start.rows[world.rank :: world.size]
    mine = [row for row in rows if not store.is_done(cohort.patient_ids[row])]
    warn_of_space(output_dir, args, len(mine))
    patients = problem.params.patients.float()

    threads = torch.get_num_threads() if device.type == "cpu" else 2
    total = len(mine) * args.num_candidates
    torch.set_num_threads(1)  # blocks are shared by threads of our own
    call = evaluator(problem, make_sampler(agent, obs[0], patients[0], args), args, total)
    keep_freed_memory()
    done = 0
    with (
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        tqdm(
            total=total, unit="design", unit_scale=True, disable=world.rank > 0, smoothing=0.05
        ) as bar,
    ):
        try:
            for row in mine:
                patient_id = cohort.patient_ids[row]
                bar.set_description(patient_id, refresh=False)
                sampler = make_sampler(agent, obs[row], patients[row], args)
                generate(Patient(patient_id, sampler, call, args), store, pool, threads, bar)
                done += 1
        except (OSError, KeyboardInterrupt) as error:
            error.add_note(
                f"{done:,} of {len(mine):,} patients were completed and {output_dir} can be read; "
                f"the same command goes on with {cohort.patient_ids[mine[done]]}"
            )
            raise
        finally:
            store.writers.shutdown()
    if args.show:
        for row in rows:
            show(output_dir, cohort.patient_ids[row], problem.params.reward_config)
    return output_dir


def environments(
    trained: dict[str, Any], cohort: hydrogel_gym.Cohort, device: torch.device
) -> gym.vector.VectorEnv:
    """One environment per patient, of the problem that a policy was trained on.

    Args:
        trained: its `training_config`.
        cohort: the patients.
        device: where.

    Raises:
        UsageError: it was trained by another version of the trainer.
    """
    try:
        return ppo_hybrid.make_envs(ppo_hybrid.Args(**trained), cohort, device)
    except TypeError as error:
        raise UsageError(f"the policy is of another version: {ppo_hybrid.reason(error)}") from error


def evaluator(problem: Any, sampler: Sampler, args: Args, total: int) -> Callable[..., Any]:
    """`evaluate` with the model in it, compiled where it is worth it."""
    model, config = problem.reward_model, problem.params.reward_config

    def judge(sampler: Sampler, uniform: Tensor, normal: Tensor) -> Any:
        return evaluate(sampler, uniform, normal, reward_model=model, reward_config=config)

    if args.compile == "off" or (args.compile == "auto" and total < WORTH_COMPILING):
        return judge
    compiled = CompiledFunction(judge)
    device = sampler.patient.device
    try:
        with torch.no_grad():  # as it will be called
            compiled(
                sampler, torch.rand(BLOCK, device=device), torch.randn(BLOCK, 4, device=device)
            )
    except CompileError as error:
        if args.compile == "on":
            raise UsageError(f"--compile on: {error}") from error
        print(f"warning: going on uncompiled: {error}", file=sys.stderr)
        return judge
    return compiled


def warn_of_space(output_dir: Path, args: Args, num_patients: int) -> None:
    """Say it beforehand where the disk will not hold all candidates."""
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
    table = {
        "polymer": shown["polymer_name"].astype(str),
        "kPa": shown["stiffness_kPa"].map("{:.2f}".format),
        "days": shown["degradation_days"].map("{:.1f}".format),
        "S/m": shown["conductivity_S_m"].map("{:.3f}".format),
        "mm": shown["thickness_mm"].map("{:.2f}".format),
        "coverage": shown["coverage"].astype(str),
        "dEF, pp": shown["predicted_delta_EF"].map("{:+.2f}".format),
        "stress, %": shown["predicted_stress_reduction"].map("{:.1f}".format),
        "P(optimal)": shown["optimal_probability"].map("{:.3f}".format),
        "reward": shown["reward"].map("{:.3f}".format),
    }
    # The columns of risks have the names of the outcomes.
    for name, margin in safety_margins(shown, config).items():
        table[name.replace("_", " ")] = margin.map("{:+.4f}".format)
    frame = pd.DataFrame(table)
    frame.index += 1
    print(frame.to_string())
    path = output_dir / f"{file_name(patient_id)}.png"
    draw_designs(path, patient_id, designs, load_designs(output_dir, patient_id, table="diverse"))
    print(f"drawn in {path}")


def draw_designs(path: Path, patient_id: str, designs: Any, diverse: Any) -> None:
    """Parallel coordinates of a patient's best designs, before the best of every other kind."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    axes_of = {
        "polymer_name": "polymer",
        "stiffness_kPa": "stiffness\nkPa",
        "degradation_days": "half-life\ndays",
        "conductivity_S_m": "conductivity\nS/m",
        "thickness_mm": "thickness\nmm",
        "coverage": "coverage",
        "predicted_delta_EF": "predicted\nΔEF, pp",
        "predicted_stress_reduction": "predicted stress\nreduction, %",
        "toxicity_risk": "toxicity\nrisk",
        "structural_integrity": "integrity",
        "fibrosis_risk": "fibrosis\nrisk",
        "reward": "reward",
    }
    figure = Figure(figsize=(14, 5), layout="constrained")
    axes = figure.subplots()
    heights = {}
    both = pd.concat([designs, diverse], ignore_index=True)
    for place, (name, label) in enumerate(axes_of.items()):
        column = both[name]
        if column.dtype == "category":
            present = [c for c in column.cat.categories if (column == c).any()]
            code = column.map({c: i for i, c in enumerate(present)}).astype(float)
            height = (code + 0.5) / len(present)
            marks = {(i + 0.5) / len(present): c for i, c in enumerate(present)}
        else:
            low, high = float(column.min()), float(column.max())
            height = (column - low) / (high - low) if high > low else column * 0.0 + 0.5
            marks = {0.0: f"{low:.4g}", 1.0: f"{high:.4g}"} if high > low else {0.5: f"{low:.4g}"}
        heights[name] = height.to_numpy(float)
        axes.axvline(place, color="0.6", lw=0.8)
        for y, text in marks.items():
            axes.annotate(text, (place, y), (3, 2), textcoords="offset points", fontsize=7)
        axes.text(place, -0.08, label, ha="center", va="top", fontsize=8)
    lines = np.stack(list(heights.values()), axis=1)
    for line in lines[len(designs) :]:
        axes.plot(line, color="0.8", lw=0.7, zorder=1)
    reward = lines[: len(designs), list(axes_of).index("reward")]
    span = max(float(np.ptp(reward)), 1e-9)
    for i in np.argsort(reward):  # the best on top
        color = colormaps["viridis"](0.9 * (reward[i] - reward.min()) / span)
        axes.plot(lines[i], color=color, lw=0.9, alpha=0.8)
    axes.set(xlim=(-0.3, len(axes_of) - 0.3), ylim=(-0.05, 1.05), xticks=[], yticks=[])
    axes.set_title(
        f"{patient_id}, a virtual patient: its {len(designs)} best designs, as predicted; "
        "grey: the best of each polymer and coverage"
    )
    for side in axes.spines.values():
        side.set_visible(False)
    ppo_hybrid.save_figure(path, figure)


def report_failure(error: BaseException) -> int:
    """Say in a line what ended a run, and where to go on; returns the exit code."""
    interrupted = isinstance(error, KeyboardInterrupt)
    what = "interrupted" if interrupted else f"error: {error}"
    print("; ".join([what, *getattr(error, "__notes__", [])]), file=sys.stderr)
    return 130 if interrupted else 1


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        output_dir = run(
            ppo_hybrid.read_command_line(Args, args=argv, prog="generate_candidates.py")
        )
    except (UsageError, hydrogel_gym.CohortError, gym.error.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, FloatingPointError, KeyboardInterrupt) as error:
        return report_failure(error)
    if ppo_hybrid.world_from_environment().rank == 0:
        print(f"written to {output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
