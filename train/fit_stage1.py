"""Fit a Stage-1 reward model to a table of simulated or measured outcomes.

    python patients/make_outcomes.py --output outcomes.parquet          # a made-up table, synthetic
    python train/fit_stage1.py outcomes.parquet --truth mechanistic
    python train/ppo_hybrid.py --preset quick --reward-model runs/stage1/stage1.pt

The table's columns are those of `hydrogel_gym/models/outcome_table.py`. Some patients are held out
whole, to report on; the others are dealt to the members of an ensemble, each of which is fitted
without its own share of them and stopped by it. Written are `stage1.pt`, `metrics.json`,
`history.csv` and two pictures; running the model needs neither the table nor RDKit.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, smooth_l1_loss
from tqdm import tqdm

from hydrogel_gym.errors import UsageError
from hydrogel_gym.files import make_folder, remove_unfinished
from hydrogel_gym.models.contract import RewardModelError, load_reward_model
from hydrogel_gym.models.ensemble import DEFAULT_PESSIMISM, OPTIMAL, Stage1Ensemble, save_stage1
from hydrogel_gym.models.network import Architecture, Stage1Network
from hydrogel_gym.models.outcome_table import OUTCOME_COLUMNS, OutcomeTable, read_table
from hydrogel_gym.models.polymer_embedding import polymer_categories, polymer_embedding
from hydrogel_gym.models.quality import evaluate_ensemble, quality_text
from hydrogel_gym.problem.fields import PATIENT_FIELDS
from hydrogel_gym.runs.command_line import check_ranges, read_command_line, run_process, run_script
from hydrogel_gym.runs.devices import resolve_device
from hydrogel_gym.runs.directory import write_csv, write_json
from hydrogel_gym.runs.identity import versions
from hydrogel_gym.runs.options import plain_config
from hydrogel_gym.runs.stage1_pictures import draw_quality

MIN_PATIENTS = 10
# Where the loss turns from quadratic to linear, in standard deviations of an outcome: beyond the
# noise of a simulation, so that one gone wrong pulls no harder than one that is merely noisy.
OUTLIER_FROM = 0.3
VALIDATION_ROWS = 20_000  # per member, so that looking costs little beside an epoch


@dataclass
class Args:
    """Fit an ensemble of Stage-1 networks to a table of outcomes."""

    table: tyro.conf.Positional[Path]
    """CSV or Parquet, a row per simulation or experiment"""
    output_dir: Path = Path("runs/stage1")
    """where the model and its report go"""
    overwrite: bool = False
    """replace the model that is in the output directory"""
    polymer_embeddings: Path | None = None
    """a vector per polymer, CSV or Parquet with a column `name`, or .npy in the order of the
    polymer table; default RDKit descriptors and Morgan fingerprints of the table's SMILES"""
    num_members: int = 5
    """networks of the ensemble"""
    holdout_share: float = 0.2
    """of the patients, to report on"""
    num_epochs: int = 30
    """passes over each member's rows, at most"""
    patience: int = 8
    """epochs without a better member before fitting ends"""
    batch_size: int = 2048
    """rows per member and update"""
    learning_rate: float = 3e-3
    """initial learning rate of AdamW, with cosine decay to zero"""
    weight_decay: float = 1e-2
    """of AdamW"""
    patient_noise: float = 0.05
    """noise on the patient's features while fitting, in their standard deviations: a table of few
    patients does not say what happens between them"""
    trunk_dim: int = 128
    """width of the encoder and the trunk"""
    pessimism: float = DEFAULT_PESSIMISM
    """standard deviations of the ensemble below its mean that a policy is rewarded for, unless it
    asks for others"""
    truth: str | None = None
    """reward model that the table was made from, if that is known: what it reaches on the held-out
    rows is the ceiling that their noise leaves"""
    seed: int = 1
    """of splits, weights and batches"""
    device: str = "auto"
    """auto (cuda if there is one, else cpu) or a torch device"""


class Split(NamedTuple):
    """Rows of a table by what they are for; no patient is in two of the three of a member."""

    test: np.ndarray  # to report on
    train: list[np.ndarray]  # per member
    validation: list[np.ndarray]  # per member, to stop by


def split_patients(group: np.ndarray, holdout_share: float, num_members: int, seed: int) -> Split:
    """Split rows by whole patients, of whom a share is to report on and the others are to fit to.

    Each member is stopped by an equal share of the others and fitted to the rest. `group` is (N,),
    the patient of each row.

    Raises:
        UsageError: there are too few patients.
    """
    from sklearn.model_selection import GroupKFold, GroupShuffleSplit

    num_patients = len(np.unique(group))
    needed = max(MIN_PATIENTS, math.ceil((num_members + 1) / (1.0 - holdout_share)))
    if num_patients < needed:
        raise UsageError(
            f"the table has {num_patients} patients; needed: {needed}, so that some can be held "
            f"out and each of {num_members} members can be stopped by others than it is fitted to"
        )
    rows = np.zeros(len(group))
    outer = GroupShuffleSplit(n_splits=1, test_size=holdout_share, random_state=seed)
    fitted, test = next(outer.split(rows, groups=group))
    inner = GroupKFold(n_splits=max(num_members, 2), shuffle=True, random_state=seed)
    folds = list(inner.split(rows[fitted], groups=group[fitted]))[:num_members]
    return Split(test, [fitted[a] for a, _ in folds], [fitted[b] for _, b in folds])


def task_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """(K, 6) mean loss of each member and outcome over the cells that are there.

    Both arguments are (K, B, 6), standardised but for the label, the target NaN where missing.
    """
    there = ~target.isnan()
    target = target.nan_to_num()
    losses = smooth_l1_loss(prediction, target, reduction="none", beta=OUTLIER_FROM)
    label = binary_cross_entropy_with_logits(
        prediction[..., OPTIMAL], target[..., OPTIMAL], reduction="none"
    )
    losses = torch.cat([losses[..., :OPTIMAL], label.unsqueeze(-1), losses[..., OPTIMAL + 1 :]], -1)
    return (losses * there).sum(1) / there.sum(1).clamp(min=1)


def weighted(losses: Tensor, log_variance: Tensor) -> Tensor:
    """Total of (K, 6) losses, each weighted by its learned uncertainty, also (K, 6).

    References:
        Kendall, Gal, Cipolla. Multi-task learning using uncertainty to weigh losses. CVPR 2018.
    """
    return (losses * torch.exp(-log_variance) + 0.5 * log_variance).sum()


class Fitter:
    """All members of an ensemble at once: data and weights on the device, and each one's best."""

    def __init__(self, table: OutcomeTable, split: Split, embedding: Any, args: Args) -> None:
        self.args, self.device = args, resolve_device(args.device)
        self.fitted = table.rows(np.unique(np.concatenate([*split.train, *split.validation])))
        self.scaling = self.fitted.scaling()
        category, num_categories = polymer_categories()
        architecture = Architecture(
            polymer_dim=embedding.shape[1],
            num_categories=num_categories,
            num_members=args.num_members,
            encoder_dim=args.trunk_dim,
            trunk_dim=args.trunk_dim,
        )
        torch.manual_seed(args.seed)
        network = Stage1Network(architecture, torch.from_numpy(embedding), category)
        self.network = network.to(self.device)
        self.numbers = {"dtype": torch.float32, "device": self.device}
        self.best_score = torch.full((args.num_members,), math.inf, **self.numbers)
        self.best = {name: p.detach().clone() for name, p in network.named_parameters()}
        self.place_data(table, split)
        self.make_optimizer()

    def place_data(self, table: OutcomeTable, split: Split) -> None:
        """Standardise the table, and draw the rows by which members are stopped."""
        self.numeric, self.target = (x.to(self.device) for x in table.standardised(self.scaling))
        self.polymer_id = table.polymer_id.to(self.device)
        self.train = [torch.from_numpy(rows).to(self.device) for rows in split.train]
        pick = np.random.default_rng(self.args.seed)
        count = min(VALIDATION_ROWS, *(len(rows) for rows in split.validation))
        validation = [pick.choice(rows, count, replace=False) for rows in split.validation]
        self.validation = torch.from_numpy(np.stack(validation)).to(self.device)

    def make_optimizer(self) -> None:
        """AdamW, of the members and of the weights of their losses, which do not decay."""
        self.generator = torch.Generator(self.device).manual_seed(self.args.seed)
        fewest = min(len(rows) for rows in self.train)
        self.batch_size = min(self.args.batch_size, fewest)
        self.num_steps = fewest // self.batch_size
        shape = (self.args.num_members, len(OUTCOME_COLUMNS))
        self.log_variance = nn.Parameter(torch.zeros(shape, **self.numbers))
        members = list(self.network.parameters())
        groups = [
            {"params": members, "weight_decay": self.args.weight_decay},
            {"params": [self.log_variance], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate)
        num_updates = self.args.num_epochs * self.num_steps
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, num_updates)

    def one_epoch(self) -> float:
        """Pass over each member's rows in random order; returns the mean loss."""
        random = {"generator": self.generator, "device": self.device}
        shuffled = [rows[torch.randperm(len(rows), **random)] for rows in self.train]
        order = torch.stack([rows[: self.num_steps * self.batch_size] for rows in shuffled])
        total = torch.zeros((), **self.numbers)
        for rows in order.split(self.batch_size, dim=1):
            x = self.numeric[rows]
            patient = x[..., : len(PATIENT_FIELDS)]
            noise = torch.randn(patient.shape, generator=self.generator, **self.numbers)
            patient += self.args.patient_noise * noise
            losses = task_losses(self.network(x, self.polymer_id[rows]), self.target[rows])
            self.optimizer.zero_grad()
            weighted(losses, self.log_variance).backward()
            self.optimizer.step()
            self.schedule.step()
            total += losses.detach().mean()
        return float(total) / self.num_steps

    @torch.no_grad()
    def validate(self) -> Tensor:
        """(K, 6) losses of the members on patients that they were not fitted to."""
        x, polymer_id = self.numeric[self.validation], self.polymer_id[self.validation]
        return task_losses(self.network(x, polymer_id), self.target[self.validation])

    def keep(self, score: Tensor) -> Tensor:
        """Keep the members whose (K,) score is better than before; returns which these are."""
        better = score < self.best_score
        self.best_score = torch.where(better, score, self.best_score)
        for name, parameter in self.network.named_parameters():
            self.best[name][better] = parameter.detach()[better]
        return better

    def ensemble(self) -> Stage1Ensemble:
        """The best of each member."""
        self.network.load_state_dict(self.best, strict=False)
        fitted, pessimism = self.fitted.fitted_range(), self.args.pessimism
        ensemble = Stage1Ensemble(self.network, self.scaling, fitted, pessimism=pessimism)
        return ensemble.to(self.device)


def fit(fitter: Fitter, args: Args) -> tuple[Stage1Ensemble, list[dict[str, float]]]:
    """Fit until no member has become better for a while; returns also the losses of every epoch.

    Raises:
        FloatingPointError: the loss is not a number.
    """
    history, last_better = [], 0
    bar = tqdm(range(1, args.num_epochs + 1), desc="fitting", unit="epoch", dynamic_ncols=True)
    for epoch in bar:
        began = time.perf_counter()
        train_loss, losses = fitter.one_epoch(), fitter.validate()
        score = losses.mean(-1)
        if not score.isfinite().all():
            raise FloatingPointError(
                f"epoch {epoch}: the loss of a member is not finite; lower --learning-rate"
            )
        better = fitter.keep(score)
        last_better = epoch if better.any() else last_better
        by_outcome = zip(OUTCOME_COLUMNS, losses.mean(0).tolist(), strict=True)
        row = {
            "epoch": epoch,
            "train_loss": train_loss,
            "validation_loss": float(score.mean()),
            "best_validation_loss": float(fitter.best_score.mean()),
            "members_better": int(better.sum()),
            **{f"validation_{name}": loss for name, loss in by_outcome},
            "seconds": time.perf_counter() - began,
        }
        history.append(row)
        bar.set_postfix(train=f"{train_loss:.4f}", unseen=f"{row['validation_loss']:.4f}")
        if epoch - last_better >= args.patience:
            break
    return fitter.ensemble(), history


def check_args(args: Args) -> None:
    """Refuse, before anything is done, what cannot be carried out."""
    not_negative = ("a finite number, at least 0", lambda x: 0.0 <= x < math.inf)
    check_ranges(
        args,
        ("num_members num_epochs patience batch_size trunk_dim", "1 or more", lambda x: x >= 1),
        ("holdout_share", "above 0, below 1", lambda x: 0.0 < x < 1.0),
        ("learning_rate", "a finite number above 0", lambda x: 0.0 < x < math.inf),
        ("weight_decay patient_noise pessimism", *not_negative),
        ("seed", "0 or more", lambda x: x >= 0),
    )
    # The last file: what a fit that was killed leaves may be replaced.
    if (path := args.output_dir / "metrics.json").exists() and not args.overwrite:
        raise UsageError(f"{path} exists; pass --overwrite or another --output-dir")


def fit_table(args: Args) -> dict[str, Any]:
    """Fit, evaluate and write a model; returns the content of `metrics.json`.

    Raises:
        UsageError: the request cannot be carried out; raised before fitting.
    """
    check_args(args)
    device, truth = resolve_device(args.device), None
    if args.truth is not None:
        try:
            truth = load_reward_model(args.truth, device)
        except RewardModelError as error:
            raise UsageError(f"--truth: {error}") from error
    embedding, origin = polymer_embedding(args.polymer_embeddings)
    table = read_table(args.table)
    split = split_patients(table.group, args.holdout_share, args.num_members, args.seed)
    parts = {"held out": [split.test], "fitted": split.train, "stopped by": split.validation}
    table.check_known(parts)
    make_folder(folder := args.output_dir, "--output-dir")
    remove_unfinished(folder)
    began = time.perf_counter()
    ensemble, history = fit(Fitter(table, split, embedding, args), args)
    seconds = time.perf_counter() - began
    test = table.rows(split.test)
    figures, predicted = evaluate_ensemble(ensemble, test, truth, device)
    report = {
        "table": str(args.table),
        "rows": len(table.group),
        "patients": len(np.unique(table.group)),
        "held_out_rows": len(split.test),
        "held_out_patients": len(np.unique(test.group)),
        **figures,
        "epochs": len(history),
        "seconds": seconds,
        "polymer_embedding": origin,
        "args": plain_config(args),
        "versions": versions(),
    }
    save_stage1(folder / "stage1.pt", ensemble.cpu(), report)
    write_csv(folder / "history.csv", history)
    draw_quality(folder, predicted, test.outcome.numpy())
    write_json(folder / "metrics.json", report)  # last: it says that the directory is complete
    return report


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""

    def body() -> None:
        args = read_command_line(Args, argv, prog="fit_stage1.py")
        report = fit_table(args)
        print(quality_text(report))
        print(f"written: {args.output_dir / 'stage1.pt'}, fitted in {report['seconds']:.0f} s")

    return run_script(body, out_of_memory="take a smaller --batch-size or --trunk-dim")


if __name__ == "__main__":
    run_process(main)
