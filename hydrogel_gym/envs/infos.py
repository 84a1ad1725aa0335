"""From the stacked tensors of a step to arrays under their names, and to the infos of Gymnasium.

`dynamics.STEP_ROWS` names the rows; nothing here counts them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hydrogel_gym.problem.dynamics import (
    INFO_FLAGS,
    INFO_SCALARS,
    STEP_ROWS,
    Autoreset,
    Step,
    final,
    named_rows,
)

# What an info reports of a step. The patient is apart: a reset reports it as well.
_REPORTED = (*INFO_SCALARS, *INFO_FLAGS, "formulation")
_PATIENT = ("patient_index", "_patient_index")
_INFO = (*_REPORTED, *(f"_{name}" for name in _REPORTED), *_PATIENT)
_FINAL_INFO = {name: final(name) for name in _INFO}


class StepReader:
    """Takes the steps of one autoreset mode apart.

    Args:
        autoreset: of the steps.
        device: where their tensors are.
    """

    def __init__(self, autoreset: Autoreset, device: torch.device) -> None:
        self._names = STEP_ROWS[autoreset]
        copied = _copied_flags(has_final=autoreset == "SameStep")
        self._flag_names = tuple(copied)
        self._done_row = self._flag_names.index("done")
        rows = [self._names.flags.index(source) for source in copied.values()]
        self._flag_rows = torch.tensor(rows, device=device)

    def read(self, step: Step, to_output: Callable[[Tensor], Any]) -> tuple[Tensor, dict[str, Any]]:
        """(B,) bool whose episode ended, on the device; and all rows of a step by their names.

        Args:
            step: what `dynamics.step` returned.
            to_output: turns a stacked tensor into what is handed out; called once for each.
        """
        if len(step.flags) != len(self._names.flags):
            raise ValueError(f"{len(step.flags)} rows of flags; expected {self._names.flags}")
        flags = step.flags.index_select(0, self._flag_rows).view(torch.bool)
        names = self._names
        return flags[self._done_row], {
            **named_rows(self._flag_names, to_output(flags)),
            **named_rows(names.scalars, to_output(step.scalars)),
            **named_rows(names.formulation, to_output(step.formulation)),
            **named_rows(names.patient_index, to_output(step.patient_index)),
        }

    def info(self, rows: dict[str, Any], *, of_reset: bool = False) -> dict[str, Any]:
        """The info of a step, or what of it a reset has as well."""
        return {name: rows[name] for name in (_PATIENT if of_reset else _INFO)}

    def final_info(self, rows: dict[str, Any]) -> dict[str, Any]:
        """The info of a step in which an episode ended; in mode `SameStep` alone."""
        return {name: rows[source] for name, source in _FINAL_INFO.items()}


def _copied_flags(has_final: bool) -> dict[str, str]:
    """Row of `Step.flags` by the name under which a copy of it is handed out.

    Each is copied as often as it is handed out: no two arrays of a step share memory. The first is
    the state's own.
    """
    source = {"done": "terminated", "terminated": "terminated", "truncated": "never"}
    source |= {name: name for name in ("stepped", *INFO_FLAGS)}
    source |= {f"_{name}": "stepped" for name in _REPORTED}
    source |= {"_patient_index": "always"}
    if has_final:
        source |= {final(name): final(name) for name in INFO_FLAGS}
        source |= {final(f"_{name}"): "terminated" for name in (*_REPORTED, "patient_index")}
        source |= {"_final_info": "terminated", "_final_obs": "terminated"}
    return source
