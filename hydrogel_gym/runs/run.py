"""One run of training: what a recipe's loop talks to.

A recipe takes a run from `start_run`, has it `restore` its learner, and in each of its `iterations`
passes what rollout and update showed to `record` and where it stands to `save_if_due`; `finish`
writes policy, pictures and summary.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hydrogel_gym.errors import UsageError
from hydrogel_gym.memory import keep_freed_memory
from hydrogel_gym.problem.cohort import load_cohort
from hydrogel_gym.runs.adaptive import figures_after_checks
from hydrogel_gym.runs.checkpoints import (
    CHECKPOINT_FORMAT,
    Learner,
    checkpoint_to_resume,
    load_run_state,
    run_state,
    unseal,
    write_checkpoint,
)
from hydrogel_gym.runs.devices import check_precision, fast_float32, resolve_device
from hydrogel_gym.runs.directory import (
    CONFIG_FILE,
    CURVE_FILE,
    METRICS_FILE,
    POLICY_FILE,
    SELECTION_FILE,
    SUMMARY_FILE,
    choose_output_dir,
    explaining_disk_failures,
    only_writer,
    output_dir_of,
    prepare_output_dir,
    write_csv,
    write_json,
)
from hydrogel_gym.runs.environments import first_reset, reward_model_seconds
from hydrogel_gym.runs.evaluation import (
    DesignPolicy,
    evaluate,
    evaluation_sets,
    final_figures,
    policy_designs,
    shown_regret,
)
from hydrogel_gym.runs.identity import (
    ORIGIN,
    differences,
    identity,
    refuse_differences,
    surroundings,
    versions,
)
from hydrogel_gym.runs.metrics import YARDSTICK, Infos, as_row, rollout_metrics
from hydrogel_gym.runs.options import ADAPTIVE, plain_config, with_absolute_paths
from hydrogel_gym.runs.pictures import draw_learning_curve, draw_policy_selection
from hydrogel_gym.runs.policies import save_policy
from hydrogel_gym.runs.ranks import World, joined
from hydrogel_gym.runs.signals import Signals
from hydrogel_gym.runs.tracking import Logs, Outcome, make_logs
from hydrogel_gym.runs.uncertainty import calibrate_policy

WATCHED = ("mean_reward", "policy_loss", "value_loss")  # end a run that they are not finite in


@contextlib.contextmanager
def start_run(
    args: Any, world: World, labels: dict[str, Any], num_iterations: int, num_steps: int
) -> Iterator[Run]:
    """Set the process up for a run, on one rank or several, and take it down again.

    Args:
        args: `ProblemOptions` and `RunOptions`.
        world: the ranks, not yet joined.
        labels: what the run is known by, such as its preset.
        num_iterations: of the whole run.
        num_steps: per environment and iteration.

    Raises:
        UsageError: the request cannot be carried out.
    """
    args = with_absolute_paths(args)
    device = resolve_device(args.device, world)
    check_precision(args.precision, device)
    keep_freed_memory()
    with joined(world, device) as world, fast_float32(device), contextlib.ExitStack() as stack:
        yield Run(args, world, device, stack, labels, num_iterations, num_steps)


class Run:
    """A run: its ranks and device, its patients, its directory, and what it has recorded.

    Args:
        args, labels, num_iterations, num_steps: as for `start_run`.
        world: the ranks, joined.
        device: this rank's.
        stack: closes logs, signals and the progress bar.
    """

    def __init__(
        self,
        args: Any,
        world: World,
        device: torch.device,
        stack: contextlib.ExitStack,
        labels: dict[str, Any],
        num_iterations: int,
        num_steps: int,
    ) -> None:
        self.args, self.world, self.device, self.stack = args, world, device, stack
        self.labels, self.num_iterations, self.num_steps = labels, num_iterations, num_steps
        self.is_main = world.rank == 0
        self.cohorts = {
            "train": load_cohort(args.cohort),
            "holdout": load_cohort(args.holdout_cohort or "holdout"),
        }
        self.output_dir, sealed = Path(), None
        if self.is_main:
            name = f"{labels['preset']}-s{args.seed}"
            stack.enter_context(only_writer(output_dir_of(args, name)))
            self.output_dir = choose_output_dir(args, name)
            sealed = checkpoint_to_resume(args, self.output_dir)
        # By message, since another machine may not see rank 0's disk.
        sealed = world.broadcast(sealed, device)
        self.saved = unseal(sealed) if sealed else None
        self.identity = identity(args, self.cohorts, device)
        refuse_differences(self.saved and self.saved["run"], self.identity)
        self.rows: list[dict[str, Any]] = []
        self.stop = False

    def restore(
        self, learner: Learner, policy: DesignPolicy, compile_seconds: float | None
    ) -> Tensor:
        """Begin the run, or go on where its checkpoint was; returns what is observed first.

        Args:
            learner: what learns; its state is the checkpoint's from here on.
            policy: how it designs, for evaluation.
            compile_seconds: what compiling it took; None if it is not compiled.

        Raises:
            UsageError: the checkpoint is of another architecture, or the directory cannot be used.
        """
        self.learner, self.policy, self.compile_seconds = learner, policy, compile_seconds
        args, world = self.args, self.world
        # Equal by the seed, but for what another processor rounds in another way.
        world.copy_first(learner.agent.state_dict().values())
        if self.saved:
            refuse_differences(self.saved["architecture"], learner.architecture)
        if args.checkpoint_interval and not hasattr(learner.envs.unwrapped, "state_dict"):
            raise UsageError(
                f"--env-id {args.env_id}: its environments have no state_dict, so that a run "
                "cannot be continued; pass --checkpoint-interval 0"
            )
        self.surroundings = surroundings(world, compile_seconds is not None)
        if self.is_main:
            self._begin_directory()
        self.began_at, seconds_before = time.time(), 0.0
        if self.saved is None:
            num_patients = len(self.cohorts["train"])
            obs = first_reset(learner.envs, args, args.seed, num_patients, world)
        else:
            # The last thing before training: what was done above may have drawn random numbers too.
            obs = load_run_state(self.saved, learner, world)
            self.rows, self.began_at = self.saved["metrics"], self.saved["training_began"]
            seconds_before = self.rows[-1]["wall_seconds"]
        self.resumed_at = len(self.rows)
        self.logs = self.stack.enter_context(self._logs())
        self.signals = self.stack.enter_context(Signals(world))
        self.bar = self.stack.enter_context(
            tqdm(
                total=self.num_iterations,
                initial=self.resumed_at,
                unit="it",
                desc="training",
                dynamic_ncols=True,
                disable=not self.is_main,
            )
        )
        self.began = time.perf_counter() - seconds_before
        return obs

    def _begin_directory(self) -> None:
        args, saved = self.args, self.saved
        prepare_output_dir(self.output_dir, args, saved["iteration"] if saved else None)
        if saved and (
            differing := differences(saved["surroundings"], self.surroundings, "in the checkpoint")
        ):
            print(f"warning: may go on with other rounding: {differing}", file=sys.stderr)
        write_json(self.output_dir / CONFIG_FILE, plain_config(args))
        self.sets = evaluation_sets(
            args,
            self.cohorts,
            self.device,
            cache_dir=self.output_dir.parent / "oracle" if args.oracle else None,
            compile=self.compile_seconds is not None,
            dtype=args.dtype,
        )

    def _logs(self) -> Logs:
        if not self.is_main:
            return Logs({})
        config = plain_config(self.args) | versions() | self.surroundings
        config |= {"device": str(self.device), **self.labels}
        return make_logs(self.args, self.output_dir, config, self.cohorts, self.rows)

    def iterations(self) -> Iterator[int]:
        """The iterations that are left, until a signal stops the run."""
        for iteration in range(self.resumed_at + 1, self.num_iterations + 1):
            self.iteration, self.iteration_began = iteration, time.perf_counter()
            yield iteration
            if self.stop:
                return

    def record(self, infos: Infos, losses: dict[str, Any], rolled_out_at: float) -> None:
        """Write down what an iteration showed; evaluates the policy.

        Args:
            infos: of every step of the rollout, (T, B) each.
            losses: other figures by the names of `metrics.METRICS`.
            rolled_out_at: `time.perf_counter()` between rollout and update.

        Raises:
            FloatingPointError: reward or loss are not finite; the row is on disk.
            OSError: the disk is full or gone; says from where the run can go on.
        """
        requests = self.signals.requests(self.device)
        row = rollout_metrics(infos) | losses
        # The first read on the host since the iteration began: all that was requested is now done.
        row = {name: float(value) for name, value in row.items()}
        stop, save = requests.tolist()
        updated_at = time.perf_counter()
        self.stop, self.save = bool(stop), bool(save)
        samples = self.iteration * infos["reward"].numel()
        row |= {"iteration": self.iteration, "global_step": samples}
        if self.is_main:
            for name, (envs, best_score) in self.sets.items():
                result = evaluate(
                    self.policy, envs, horizon=self.args.horizon, best_score=best_score
                )
                row[f"{name}_deterministic_reward"] = result["mean_reward"]
                row |= {f"{name}_{key}": result[key] for key in YARDSTICK}
            model_seconds = reward_model_seconds(self.learner.envs)
            row["reward_model_seconds"] = model_seconds and self.num_steps * model_seconds
        row["rollout_seconds"] = rolled_out_at - self.iteration_began
        row["update_seconds"] = updated_at - rolled_out_at
        row["wall_seconds"] = time.perf_counter() - self.began
        row["samples_per_second"] = samples / row["wall_seconds"]
        self.rows.append(as_row(row))
        with explaining_disk_failures(self.output_dir, self.iteration):
            if self.is_main:
                write_csv(self.output_dir / METRICS_FILE, self.rows)
        if not all(math.isfinite(row[name]) for name in WATCHED):
            raise FloatingPointError(
                f"iteration {self.iteration}: {', '.join(WATCHED)} are not all finite; "
                f"see {METRICS_FILE}"
            )

    def save_if_due(self, obs: Tensor) -> None:
        """Write a checkpoint if one is due, a signal wants one, or the run ends here; collective.

        Args:
            obs: what the next iteration begins with.

        Raises:
            OSError: as of `record`.
        """
        interval = self.args.checkpoint_interval
        is_last = self.stop or self.iteration == self.num_iterations
        if interval and (self.save or is_last or self.iteration % interval == 0):
            with explaining_disk_failures(self.output_dir, self.iteration):
                self._write_checkpoint(obs)
        row = self.rows[-1]
        self.logs.log(row)
        if self.is_main:
            self.bar.set_postfix(
                {
                    "samples/s": f"{row['samples_per_second']:,.0f}",
                    "reward": f"{row['mean_reward']:.2f}",
                    "held-out": f"{row['holdout_deterministic_reward']:.2f}",
                    **shown_regret(row),
                },
                refresh=False,
            )
            self.bar.update()

    def _write_checkpoint(self, obs: Tensor) -> None:
        state = run_state(self.learner, obs, self.world)
        if not self.is_main:
            return
        content = {
            "format": CHECKPOINT_FORMAT,
            "iteration": self.iteration,
            **state,
            "metrics": self.rows,
            "training_began": self.began_at,
            "args": plain_config(self.args),
            "run": self.identity,
            "surroundings": self.surroundings,
        }
        write_checkpoint(self.output_dir, content, self.args.keep_checkpoints)

    def finish(self) -> dict[str, Any]:
        """Write policy, pictures and summary.

        Returns:
            The content of `summary.json` and `output_dir`; on ranks other than 0 only whether the
            run was interrupted.

        Raises:
            OSError: as of `record`.
        """
        interrupted = len(self.rows) < self.num_iterations
        if not self.is_main:
            # A launcher ends all ranks once one of them was interrupted, so they end together.
            self.world.wait()
            return {"interrupted": interrupted}
        args, agent, output_dir = self.args, self.learner.agent, self.output_dir
        summary, calibration = self._summary(interrupted)
        with explaining_disk_failures(output_dir, len(self.rows)):
            config, architecture = plain_config(args), self.learner.architecture
            origin = {name: self.identity[name] for name in ORIGIN}
            path = output_dir / POLICY_FILE
            save_policy(path, agent, architecture, config, origin, calibration)
            draw_learning_curve(output_dir / CURVE_FILE, self.rows)
            draw_policy_selection(output_dir / SELECTION_FILE, summary["polymer_share"])
            # Last: a summary says that the directory is complete.
            write_json(output_dir / SUMMARY_FILE, summary)
        self.logs.conclude(
            lambda: Outcome(
                summary,
                output_dir / POLICY_FILE,
                self.cohorts["train"].first(self.sets["train"].envs.num_envs),
                policy_designs(self.policy, self.sets["train"].envs),
            )
        )
        self.world.wait()
        return summary | {"output_dir": str(output_dir)}

    def _summary(self, interrupted: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What `summary.json` says, and how the policy's regret is predicted."""
        wall_seconds = time.perf_counter() - self.began
        args = self.args
        figures = final_figures(
            self.policy, self.sets, horizon=args.horizon, generator=self.learner.generator
        )
        if args.oracle and args.env_id == ADAPTIVE:
            figures |= figures_after_checks(self.policy, self.sets["holdout"].envs, args.horizon)
        calibration, predicted = calibrate_policy(self.policy, self.sets)
        samples = self.rows[-1]["global_step"]
        return {
            "interrupted": interrupted,
            **self.labels,
            **figures,
            **predicted,
            "iterations": len(self.rows),
            "samples": samples,
            "training_began": self.began_at,
            "resumed_at_iteration": self.resumed_at or None,
            "wall_seconds": wall_seconds,
            "compiled": self.compile_seconds is not None,
            "compile_seconds": self.compile_seconds or 0.0,
            "samples_per_second": samples / wall_seconds,
            "seed": args.seed,
            "world_size": self.world.size,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }, calibration
