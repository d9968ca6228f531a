"""An interpreted plan tells its experts and its residual stream, seen between its steps."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lingc.interpret import InterpreterBackend
from lingc.math import rms
from lingc.parity.engine import ROUTERS, layer_outputs
from lingc.parity.side import F32, Choice, Seen
from lingc.plan import Ref, Step
from lingc.runtime.backend import Array


class PlanWatch:
    """Collects experts and residual stream of a run, by layer. Call it after each run to take them.

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
        self._streams = layer_outputs(backend.plan) if backend.plan.config else {}
        self._layers: dict[int, F32] = {}
        backend.watch = self._see

    def __call__(self, _out: Mapping[str, Array]) -> Seen:
        found = Seen(experts=self._found, layers=self._layers)
        self._found, self._layers = {}, {}
        self._values.clear()
        return found

    def _see(self, step: Step, results: tuple[Tensor, ...]) -> None:
        for name, value in zip(step.outputs, results, strict=True):
            if name in self._inputs:
                self._values[name] = value
            if name in self._streams:
                self._layers[self._streams[name]] = value.float().cpu().numpy()
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
