"""Evaluate a saved policy, or every checkpoint of a run, on any patients and by any reward model.

    python train/evaluate.py runs/quick-s1                                  # on the shipped cohorts
    python train/evaluate.py runs/quick-s1 --cohort mine.csv
    python train/evaluate.py runs/quick-s1 --reward-model mechanistic       # another than trained
    python train/evaluate.py runs/quick-s1 --every-checkpoint

Writes `evaluation-shipped.json` beside the policy; of other patients or another model
`evaluation-COHORT-MODEL.json`, with a short hash of what each file contains; with
`--every-checkpoint` a CSV with a row for each. `evaluation-...-patients.csv` has the regret that is
predicted for each patient, largest first: those on top deserve a search.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro

from hydrogel_gym.errors import UsageError
from hydrogel_gym.files import make_folder
from hydrogel_gym.problem.cohort import Cohort, load_cohort
from hydrogel_gym.runs.adaptive import figures_after_checks
from hydrogel_gym.runs.checkpoints import checkpoints, read_checkpoint, unseal
from hydrogel_gym.runs.command_line import read_command_line, run_script
from hydrogel_gym.runs.designing import model_content
from hydrogel_gym.runs.devices import fast_float32, resolve_device
from hydrogel_gym.runs.directory import write_csv, write_json
from hydrogel_gym.runs.evaluation import (
    DesignPolicy,
    EvaluationSet,
    evaluation_sets,
    final_figures,
)
from hydrogel_gym.runs.identity import (
    MODEL,
    check_origin,
    digest,
    patients_of,
    versions,
)
from hydrogel_gym.runs.metrics import COHORTS
from hydrogel_gym.runs.options import ADAPTIVE, ProblemOptions
from hydrogel_gym.runs.policies import agent_of, load_policy, policy_path
from hydrogel_gym.runs.ranks import world_from_environment
from hydrogel_gym.runs.summary import print_figures
from hydrogel_gym.runs.uncertainty import (
    BOUND,
    FLAGGED,
    PREDICTED,
    Calibration,
    predict,
    regret_figures,
    try_designs,
)
from hydrogel_gym.train.ppo_hybrid import Agent


@dataclass
class Args:
    """Evaluate a saved policy, or every checkpoint of a run."""

    policy: tyro.conf.Positional[Path]
    """a run directory, or a `stage2_policy.pt`"""
    every_checkpoint: bool = False
    """evaluate the checkpoints of the run instead of its policy"""
    cohort: Path | None = None
    """evaluate on these patients alone, CSV or Parquet; default the shipped cohorts"""
    holdout_cohort: Path | None = None
    """patients to evaluate on besides; default, without --cohort, the shipped hold-out cohort"""
    reward_model: str | None = None
    """Stage-1 model to evaluate by, whose oracle is then the yardstick; default the one that the
    policy was trained on"""
    pessimism: float | None = None
    """of a checkpoint's ensemble; default the one of training, or the model's own"""
    oracle: bool = True
    """search for every patient's best design (kept beside the run), to measure regret"""
    output_dir: Path | None = None
    """where to; default the folder of the policy"""
    seed: int = 1
    """of the sampled designs"""
    device: str = "auto"
    """auto (cuda if there is one, else cpu) or a torch device"""


TRAINED = patients_of("train")


def problem_of(config: dict[str, Any], args: Args) -> ProblemOptions:
    """The problem that a policy was trained on, with the patients and the model wanted here."""
    problem = ProblemOptions.of(config)
    if args.reward_model is not None:
        problem = dataclasses.replace(problem, reward_model=args.reward_model, pessimism=None)
    if args.pessimism is not None:
        problem = dataclasses.replace(problem, pessimism=args.pessimism)
    return dataclasses.replace(problem, cohort=args.cohort, holdout_cohort=args.holdout_cohort)


class Saved(NamedTuple):
    """What is to be evaluated."""

    path: Path
    policies: list[tuple[Agent, int | None]]  # with the iterations of checkpoints
    config: dict[str, Any]  # options of the training
    origin: dict[str, Any] | None
    content: dict[str, Any]  # of the file, or of the last checkpoint


def read_saved(args: Args, device: torch.device) -> Saved:
    """A policy, or all checkpoints of a run.

    Raises:
        UsageError: it cannot be read.
    """
    if not args.every_checkpoint:
        path = policy_path(args.policy, "POLICY")
        agent, content = load_policy(path, Agent, device)
        config, origin = content["training_config"], content.get("origin")
        return Saved(path, [(agent, None)], config, origin, content)
    saved = [unseal(read_checkpoint(each)) for each in checkpoints(args.policy)]
    if not saved:
        raise UsageError(f"{args.policy} has no checkpoints")
    policies = [(agent_of(each, Agent, device), each["iteration"]) for each in saved]
    return Saved(args.policy, policies, saved[-1]["args"], saved[-1]["run"], saved[-1])


def evaluate_saved(args: Args) -> dict[str, Any]:
    """Evaluate, and write the figures; returns those of the policy, or of the last checkpoint.

    Raises:
        UsageError: the policy cannot be read, or the figures cannot be written.
    """
    device = resolve_device(args.device)
    path, policies, config, origin, content = read_saved(args, device)
    problem = problem_of(config, args)
    model = model_content(problem, args.reward_model)
    check_origin(origin, {MODEL: model}, {MODEL: args.reward_model})
    cohorts = {"train": load_cohort(args.cohort)}
    if args.cohort is None or args.holdout_cohort is not None:
        cohorts["holdout"] = load_cohort(args.holdout_cohort or "holdout")
    patients = digest(cohorts["train"])
    folder = args.output_dir or (path if args.every_checkpoint else path.parent)
    make_folder(folder, "--output-dir")
    sets = evaluation_sets(
        problem,
        cohorts,
        device,
        cache_dir=folder.parent / "oracle" if args.oracle else None,
        dtype="float64" if config.get("precision") == "fp64" else "float32",
    )
    results = []
    for agent, iteration in policies:
        generator = torch.Generator(device).manual_seed(args.seed)
        with fast_float32(device):  # as in training, whose figures this repeats
            figures = final_figures(
                agent.design, sets, horizon=problem.horizon, generator=generator
            )
            if args.oracle and iteration is None and problem.env_id == ADAPTIVE:
                envs = list(sets.values())[-1].envs
                figures |= figures_after_checks(agent.design, envs, problem.horizon)
        results.append(({} if iteration is None else {"iteration": iteration}) | figures)
    about = {
        "policy_file": str(path),
        "cohort": str(args.cohort or "shipped"),
        "num_patients": len(cohorts["train"]),
        "trained_on_these_patients": None if origin is None else origin[TRAINED] == patients,
        "reward_model": problem.reward_model_name,
    }
    about |= {"seed": args.seed, "device": str(device), "versions": versions()}
    output = (
        folder / f"{file_stem(args, patients, model)}.{'csv' if args.every_checkpoint else 'json'}"
    )
    if args.every_checkpoint:
        write_csv(output, [flat(result) for result in results])
        return about | results[-1] | {"written_to": str(output)}
    if why := no_prediction(content, problem, model):
        print(f"note: no regret is predicted: {why}", file=sys.stderr)
    else:
        with fast_float32(device):
            calibration = Calibration(**content["regret_calibration"])
            predicted, rows = predict_regret(agent.design, calibration, sets, cohorts)
        results[0] |= predicted
        write_csv(output.with_name(f"{output.stem}-patients.csv"), rows)
    write_json(output, about | results[0])
    return about | results[-1] | {"written_to": str(output)}


def no_prediction(content: dict[str, Any], problem: ProblemOptions, model: str) -> str | None:
    """Why the regret of patients cannot be predicted; None where it can.

    Args:
        content: of the policy's file.
        problem: what is evaluated.
        model: digest of the reward model.
    """
    if problem.env_id == ADAPTIVE:
        return "patients respond otherwise than predicted"
    if content.get("regret_calibration") is None:
        return "the policy was trained without an oracle, or by an earlier version"
    trained = ProblemOptions.of(content["training_config"])
    if content["origin"][MODEL] != model or problem.pessimism != trained.pessimism:
        return "the policy's calibration is of another reward model"
    return None


def predict_regret(
    policy: DesignPolicy,
    calibration: Calibration,
    sets: dict[str, EvaluationSet],
    cohorts: dict[str, Cohort],
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures by the names of `summary.json`, and a row for each patient, the worst first."""
    figures, rows = {}, []
    for name, each in sets.items():
        tried = try_designs(policy, each)
        figures |= {f"{name}_{k}": x for k, x in regret_figures(calibration, tried).items()}
        expected, bound = predict(calibration, tried.gain)
        columns = {"cohort": [name] * len(expected), "patient_id": cohorts[name].patient_ids}
        columns |= {"reward": tried.reward, "gain_found": tried.gain}
        columns |= {"predicted_regret": expected, "regret_bound": bound}
        if tried.regret is not None:
            columns["regret"] = tried.regret
        for i in np.argsort(-expected, kind="stable"):
            row = {key: values[i] for key, values in columns.items()}
            rows.append({k: round(x, 4) if isinstance(x, float) else x for k, x in row.items()})
    return figures, rows


def prediction_lines(figures: dict[str, Any]) -> list[str]:
    """How well regret is predicted, in a line for each cohort."""
    lines = []
    for name in COHORTS:
        get = {key: figures.get(f"{name}_{key}") for key in (*PREDICTED, "regret")}
        if get["predicted_regret"] is None:
            continue
        line = f"predicted regret, {name}: mean {get['predicted_regret']:.3f}"
        if get["regret_bound_coverage"] is not None:
            line += (
                f" (true {get['regret']:.3f}), rank correlation "
                f"{get['regret_rank_correlation']:.2f}, {100 * get['regret_bound_coverage']:.0f} % "
                f"below their bound (meant: {100 * BOUND:.0f} %); the {100 * FLAGGED:.0f} % for "
                f"whom most is predicted have {100 * get['regret_of_flagged']:.0f} % of it"
            )
        lines.append(line)
    return lines


def file_stem(args: Args, patients: str, model: str) -> str:
    """Name of the file of figures, without its suffix; other patients or models have another.

    Args:
        args: what was evaluated.
        patients: digest of their table.
        model: digest of its content.
    """
    parts = ["evaluation", "shipped"]
    if args.cohort is not None:
        parts[1] = f"{args.cohort.stem}-{patients[:8]}"
    if args.reward_model is not None:
        path = Path(args.reward_model)
        parts.append(f"{path.stem}-{model[:8]}" if path.is_file() else path.name.replace(":", "-"))
    return "-".join(parts) + ("-checkpoints" if args.every_checkpoint else "")


def flat(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures as a row: the share of each polymer has a column of its own."""
    shares = figures.pop("polymer_share")
    return figures | {f"share of {name}": share for name, share in shares.items()}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""

    def body() -> None:
        args = read_command_line(Args, argv, prog="evaluate.py")
        if world_from_environment().rank == 0:
            figures = evaluate_saved(args)
            print_figures(figures, figures["written_to"])
            for line in prediction_lines(figures):
                print(line)

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())
