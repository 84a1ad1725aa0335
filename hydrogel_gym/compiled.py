"""A pure function as one compiled graph, and the cause where it cannot be one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hydrogel_gym.memory import is_out_of_memory


class CompileError(RuntimeError):
    """A function that cannot be compiled, or a machine that cannot compile."""


# Of the compiler, for a step of the environment: its C++ backend shuns vector instructions where
# many loads are look-ups in tables, and there the arithmetic between them is worth it by far.
STEP_OPTIONS: dict[str, Any] = {
    "cpp.enable_tiling_heuristics": False,
    "size_asserts": False,  # the sizes of tensors are checked before the call
    # Checking at every call that no constant has changed takes 20 us.
    "guard_filter_fn": "keep_tensor_guards_unsafe",
}


class CompiledFunction:
    """A pure function of tensors as one graph, compiled at its first call.

    Everything but tensors that the function reads is taken to be constant from then on. A copy, or
    one from a pickle, compiles anew.

    Args:
        function: what to compile; without a read on the host, a branch on data or side effects.
        device: of the tensors.
        options: of the compiler; `guard_filter_fn` by its name in `torch.compiler`.

    Raises:
        CompileError: the compiler cannot be had, for want of a folder to write to for example, or
            since torch is too old.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        device: torch.device,
        options: dict[str, Any] = STEP_OPTIONS,
    ) -> None:
        self.function, self.device, self.options = function, device, options
        self.is_compiled = False
        if torch.__version__ < "2.10":
            raise CompileError(f"compiling needs torch 2.10 or later; this is {torch.__version__}")

        def call(*args: Any) -> Any:
            return function(*args)

        # Graphs are kept by the code of a function, eight at most: environments share that of one,
        # and this has its own.
        call.__code__ = call.__code__.replace()
        keep_guards = getattr(torch.compiler, options["guard_filter_fn"])
        try:
            self._call = torch.compile(
                call,
                fullgraph=True,
                dynamic=False,
                options={
                    **options,
                    "guard_filter_fn": keep_guards,
                    # Kernels called from C++ let other threads of Python run, those called from
                    # Python do not.
                    "cpp_wrapper": device.type == "cpu",
                },
            )
        except Exception as error:
            raise CompileError(_cause(error)) from error

    def __call__(self, *args: Any) -> Any:
        """Return what the function returns.

        Raises:
            CompileError: the first call did not compile; the message is the cause, in one line.
        """
        if self.is_compiled:
            return self._call(*args)
        try:
            result = self._call(*args)
        except Exception as error:  # of the tracer, the code generator, the C++ compiler, ...
            if is_out_of_memory(error):
                raise
            raise CompileError(_cause(error)) from error
        self.is_compiled = True
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledFunction, (self.function, self.device, self.options)


def _cause(error: BaseException) -> str:
    """Type and first line of the innermost cause, and the explanation that the tracer adds."""
    while (cause := error.__cause__ or getattr(error, "inner_exception", None)) is not None:
        error = cause
    first, *others = str(error).strip().splitlines() or [""]
    explanation = [line.partition("Explanation:")[2] for line in others if "Explanation:" in line]
    return f"{type(error).__name__}: {first}" + "".join(explanation[:1])
