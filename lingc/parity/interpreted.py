"""An interpreted plan tells its experts: what it routes by is seen between its steps."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lingc.interpret import InterpreterBackend
from lingc.math import rms
from lingc.parity.engine import ROUTERS
from lingc.parity.side import Choice
from lingc.plan import Ref, Step
from lingc.runtime.backend import Array


class RouterWatch:
    """Collects the experts of a run, layer by layer. Call it after each run to take them.

    Args:
        backend: Its `watch` is set to this.
    """

    def __init__(self, backend: InterpreterBackend) -> None:
        self._backend = backend
        self._inputs = {
            arg.name
            for program in backend.plan.programs.values()
            for step in program.steps
            if step.op in ROUTERS and isinstance(arg := step.args[0], Ref)
        }
        self._values: dict[str, Tensor] = {}
        self._found: dict[int, Choice] = {}
        backend.watch = self._see

    def __call__(self, _out: Mapping[str, Array]) -> Mapping[int, Choice]:
        found, self._found = self._found, {}
        self._values.clear()
        return found

    def _see(self, step: Step, results: tuple[Tensor, ...]) -> None:
        for name, value in zip(step.outputs, results, strict=True):
            if name in self._inputs:
                self._values[name] = value
        if step.op in ROUTERS:
            known = {**self._backend.weights, **self._values}
            self._found[step.layer] = Choice(
                ids=results[0].cpu().numpy(), biased=router_scores(step, known).cpu().numpy()
            )


def router_scores(step: Step, values: Mapping[str, Tensor]) -> Tensor:
    """What a router's step chooses by, [T, E]: the sigmoid of its logits, and the bias.

    Args:
        step: Of an op in `lingc.parity.engine.ROUTERS`.
        values: What it reads, by name.
    """
    read, *norm, weight, bias = (arg.name for arg in step.args if isinstance(arg, Ref))
    x = values[read].float()
    for name in norm:
        eps = step.args[-1]
        assert isinstance(eps, float), "the norm's eps stands last"
        x = rms(x, values[name], eps)
    logits = x @ values[weight].float().T
    return torch.sigmoid(logits) + values[bias].float()
