"""From the stacked tensors of a step to arrays under their names, and to the infos of Gymnasium.

`dynamics.STEP_ROWS` names the rows; nothing here counts them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hydrogel_gym.problem.dynamics import (
    INFO_FLAGS,
    INFO_SCALARS,
    STEP_ROWS,
    Autoreset,
    Step,
    final,
)

# What an info reports of a step. The patient is apart: a reset reports it as well.
_REPORTED = (*INFO_SCALARS, *INFO_FLAGS, "formulation")
_PATIENT = ("patient_index", "_patient_index")
_INFO = (*_REPORTED, *(f"_{name}" for name in _REPORTED), *_PATIENT)

Rows: TypeAlias = tuple[Any, ...]


class StepReader:
    """Takes the steps of one autoreset mode apart.

    Places are worked out from the names once, here, since a dict of all rows at every step would
    take a percent of its time.

    Args:
        autoreset: of the steps.
        device: where their tensors are.
    """

    def __init__(self, autoreset: Autoreset, device: torch.device) -> None:
        names, has_final = STEP_ROWS[autoreset], autoreset == "SameStep"
        copied = _copied_flags(has_final)
        self._num_flags = len(names.flags)
        places = [names.flags.index(source) for source in copied.values()]
        self._flag_places = torch.tensor(places, device=device)
        self._done_place = list(copied).index("done")
        self._row_names = (tuple(copied), names.scalars, names.formulation, names.patient_index)
        self._of_step = self._picker("reward", "terminated", "truncated", "stepped", "done")
        self._of_info, self._of_reset = self._picker(*_INFO), self._picker(*_PATIENT)
        if has_final:
            self._of_final_info = self._picker(*map(final, _INFO))
            self._of_final_masks = self._picker("_final_info", "_final_obs")

    def _picker(self, *names: str) -> Callable[[Rows], Rows]:
        rows = [name for group in self._row_names for name in group]
        return operator.itemgetter(*map(rows.index, names))

    def read(self, step: Step, to_output: Callable[[Tensor], Any]) -> tuple[Tensor, Rows]:
        """(B,) bool whose episode ended, on the device; and all rows of a step, for the rest below.

        Args:
            step: what `dynamics.step` returned.
            to_output: turns a stacked tensor into what is handed out; called once for each.
        """
        if step.flags.shape[0] != self._num_flags:
            raise ValueError(f"{step.flags.shape[0]} rows of flags; expected {self._num_flags}")
        flags = step.flags.index_select(0, self._flag_places).view(torch.bool)
        groups = (
            to_output(flags),
            to_output(step.scalars),
            to_output(step.formulation),
            to_output(step.patient_index),
        )
        for names, group in zip(self._row_names, groups, strict=True):
            if group.shape[0] != len(names):
                raise ValueError(f"{group.shape[0]} rows; expected {names}")
        a, b, c, d = groups
        return flags[self._done_place], (*a, *b, *c, *d)

    def step(self, rows: Rows) -> Rows:
        """Reward, terminated, truncated, where no episode begins, and where one ended."""
        return self._of_step(rows)

    def info(self, rows: Rows) -> dict[str, Any]:
        """The info of a step."""
        return dict(zip(_INFO, self._of_info(rows), strict=True))

    def reset_info(self, rows: Rows) -> dict[str, Any]:
        """What of the info of a step a reset has as well."""
        return dict(zip(_PATIENT, self._of_reset(rows), strict=True))

    def final_info(self, rows: Rows) -> dict[str, Any]:
        """The info of a step in which an episode ended; in mode `SameStep` alone."""
        return dict(zip(_INFO, self._of_final_info(rows), strict=True))

    def final_masks(self, rows: Rows) -> Rows:
        """Masks of `final_info` and of `final_obs`; in mode `SameStep` alone."""
        return self._of_final_masks(rows)


def _copied_flags(has_final: bool) -> dict[str, str]:
    """Row of `Step.flags` by the name under which a copy of it is handed out.

    Each is copied as often as it is handed out: no two arrays of a step share memory. The first is
    the state's own.
    """
    source = {name: name for name in ("done", "terminated", "truncated")}
    source |= {name: name for name in ("stepped", *INFO_FLAGS)}
    source |= {f"_{name}": "stepped" for name in _REPORTED}
    source |= {"_patient_index": "always"}
    if has_final:
        source |= {final(name): final(name) for name in INFO_FLAGS}
        source |= {final(f"_{name}"): "done" for name in (*_REPORTED, "patient_index")}
        source |= {"_final_info": "done", "_final_obs": "done"}
    return source
