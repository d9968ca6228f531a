"""Run tactics whose kernels are Triton's on the CPU, in Triton's interpreter.

Run as a program, since the interpreter is chosen when Triton is imported: reads (op, number of the
case, target) as JSON and writes what was wrong with each tactic, or null.
"""

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lingc.bench.kernels import problem_of
from lingc.kernel import Launch, Tactic, Tensor
from lingc.op import OPS, TORCH_DTYPE, Op, type_of
from lingc.plan import TensorType
from lingc.plugins import table  # noqa: F401 (registers the ops)
from lingc.targets.nvidia import H200_SXM, SPARK

# A target that has more than Triton, and one whose ops all run through it.
TARGETS = {target.name: target for target in (H200_SXM, SPARK)}
POISON = {torch.int32: -77_777_777, torch.uint8: 0xAB}
WORKSPACE = {"*bf16": torch.bfloat16, "*f32": torch.float32, "*i32": torch.int32}


def exact_rounding() -> None:
    """Give the interpreter torch's casts: its own cut bf16 off, and lose a carry in E4M3."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    its_own = interpreter._convert_float
    casts = {
        ("fp32", "bf16"): (torch.bfloat16, torch.uint16),
        ("fp32", "fp8e4nv"): (torch.float8_e4m3fn, torch.uint8),
    }

    def cast(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source.name, target.name) not in casts:
            return its_own(values, source, target, mode)
        dtype, bits = casts[source.name, target.name]
        wide = torch.from_numpy(values.view("float32").copy())
        return wide.to(dtype).view(bits).numpy().reshape(values.shape)

    interpreter._convert_float = cast


def interpreted(tactics: Sequence[Tactic]) -> list[Tactic]:
    """Those that are Triton's alone."""
    return [one for one in tactics if all(x.kernel.language == "triton" for x in one.launches)]


def problem(op: Op, arguments: Sequence[Any], tactic: Tactic) -> str | None:
    """What is wrong with a tactic's results, against the reference in FP64."""
    return problem_of(op, arguments, results(op, arguments, tactic), similar=0.0)


def results(op: Op, arguments: Sequence[Any], tactic: Tactic) -> list[torch.Tensor]:
    """Results of a tactic; memory that it does not write is NaN, or a number that stands out."""
    given = dict(zip(op.arguments, arguments, strict=True))
    tensors = {key: value for key, value in given.items() if isinstance(value, torch.Tensor)}
    made = op.types(*(type_of(value) for value in arguments))
    for name, kind in zip(
        op.results, [made] if isinstance(made, TensorType) else made, strict=True
    ):
        tensors[name] = tensors[name].clone() if name in given else poisoned(kind)
    for space in tactic.workspaces:
        tensors[space.name] = torch.full((space.bytes,), 0xFF, dtype=torch.uint8)
    for launch in tactic.launches:
        _launch(launch, tensors)
    return [tensors[name] for name in op.results]


def poisoned(kind: TensorType) -> torch.Tensor:
    dtype = TORCH_DTYPE[kind.dtype]
    if dtype == torch.float8_e4m3fn:
        return torch.full(kind.bind({}), 0x7F, dtype=torch.uint8).view(dtype)
    return torch.full(kind.bind({}), POISON.get(dtype, float("nan")), dtype=dtype)


def _launch(launch: Launch, tensors: Mapping[str, torch.Tensor]) -> None:
    module, _, name = launch.kernel.source.partition(":")
    function = getattr(importlib.import_module(module), name)
    # The interpreter has no product of bf16 numbers; kernels that multiply some widen them.
    constants = {key: 1 if key == "WIDE" else value for key, value in launch.kernel.constants}
    operands = [
        _operand(value, kind, tensors)
        for value, (_, kind) in zip(launch.operands, launch.kernel.arguments, strict=True)
    ]
    function[launch.grid](*operands, **constants)


def _operand(value: Any, kind: str, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    whole = tensors[value.name]
    if whole.dtype == torch.uint8:
        return whole[value.offset :].view(WORKSPACE[kind])
    return whole.flatten()[value.offset // whole.element_size() :] if value.offset else whole


def main() -> None:
    exact_rounding()
    for name, number, target in json.load(sys.stdin):
        op = OPS[name]
        arguments = op.inputs(*op.cases[number], dtype="bf16", device="cpu")
        types = [type_of(value) for value in arguments]
        for tactic in interpreted(op.tactics(TARGETS[target], *types)):
            found = problem(op, arguments, tactic)
            print(json.dumps([name, number, target, tactic.name, found]), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
