"""Whether a CUDA engine is right: its test vectors, or steps of every kind against references."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lingc.launch_table import TableStep, TableTactic
from lingc.plan import Plan, Ref, Size, TensorType
from lingc.runtime.backend import Array
from lingc.runtime.cuda_backend import CudaBackend
from lingc.runtime.cuda_bucket import SAMPLE, BoundBucket
from lingc.runtime.cuda_memory import Held
from lingc.runtime.load import OpenedEngine, run_vectors
from lingc.runtime.slots import Piece, SlotTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that the gate looked at."""

    name: str
    detail: str
    problem: str | None = None


def own_steps(backend: CudaBackend, bound: BoundBucket) -> list[tuple[TableStep, TableTactic]]:
    """The program's own steps; the one that draws tokens is not among them."""
    table = backend.code.table
    steps = table.phases[bound.bucket.phase].steps
    return [
        (step, table.tactics[index])
        for step, index in zip(steps, bound.bucket.tactics, strict=True)
        if step.op != SAMPLE
    ]


def decode_inputs(backend: CudaBackend, batch: int, context: int) -> dict[str, Array]:
    """A step of sequences with so many tokens each."""
    plan = backend.plan
    table = SlotTable(backend.limits, plan.page_size)
    pieces = [
        Piece(lease=table.admit(context + 1), position=context, tokens=(token(plan, i, 0),))
        for i in range(batch)
    ]
    given = table.pack(pieces) | {"accepted": np.zeros(batch, np.int32)}
    return {name: given[name] for name in plan.programs["decode"].inputs}


def prefill_inputs(backend: CudaBackend, length: int) -> list[dict[str, Array]]:
    """A prompt in chunks; logits of each chunk's last token."""
    plan, most = backend.plan, backend.prefill_tokens
    table = SlotTable(backend.limits, plan.page_size)
    lease = table.admit(length + 1)
    found = []
    for start in range(0, length, most):
        tokens = tuple(token(plan, 0, i) for i in range(start, min(start + most, length)))
        given = table.pack([Piece(lease=lease, position=start, tokens=tokens)])
        given["logit_rows"] = np.array([len(tokens) - 1], np.int32)
        found.append({name: given[name] for name in plan.programs["prefill"].inputs})
    return found


def token(plan: Plan, sequence: int, place: int) -> int:
    return (7919 * (sequence + 1) + 104_729 * place + 11) % int(plan.config["vocab_size"])


def vector_checks(opened: OpenedEngine) -> list[Check]:
    """The package's own test vectors."""
    return [
        Check(name="vectors", detail=one.case, problem="; ".join(one.problems) or None)
        for one in run_vectors(opened.package)
    ]


def step_checks(
    backend: CudaBackend, phase: str, inputs: Mapping[str, Array]
) -> tuple[list[Check], tuple[int, ...]]:
    """Run a phase step by step, one step of each kind held to its op's reference.

    Returns:
        What was found, and the distinct experts that each layer's tokens were sent to.
    """
    from lingc.bench.kernels import problem_of  # noqa: PLC0415 (imports torch)
    from lingc.plugins.table import OPS  # noqa: PLC0415

    bound = backend.prepare(phase, inputs)
    steps = own_steps(backend, bound)
    checks: list[Check] = []
    hit: list[int] = []
    seen: set[str] = set()
    for step, tactic in steps:
        op = OPS[step.op]
        fresh = f"{tactic.op} {tactic.key}" not in seen
        seen.add(f"{tactic.op} {tactic.key}")
        given = _arguments(backend, bound, step) if fresh else []
        graph = bound.record({step.name})
        graph.replay()
        backend.device.synchronize()
        graph.close()
        if fresh:
            got = [_tensor(backend, bound, step, name).clone() for name in op.results]
            problem = problem_of(op, given, got)
            checks.append(Check(name=f"{phase}, {step.op}", detail=tactic.tactic, problem=problem))
        if step.op == "norm_router":
            ids = _tensor(backend, bound, step, "ids")
            rows = len(inputs["token_ids"])
            hit.append(int(ids[:rows].unique().numel()))
        del given
    _empty_cache()
    logits = backend.run(phase, inputs)["logits"]
    finite = bool(np.isfinite(logits).all())
    checks.append(
        Check(name=phase, detail="finite logits", problem=None if finite else "some are not")
    )
    return checks, tuple(hit)


def _empty_cache() -> None:
    """Give memory that torch keeps for itself back to the device."""
    import torch  # noqa: PLC0415

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _arguments(backend: CudaBackend, bound: BoundBucket, step: TableStep) -> list[Any]:
    """What a step's op is given now, as its reference takes it: copies, weights in plain order."""
    from lingc.bench.kernels import plain_tensor  # noqa: PLC0415
    from lingc.plugins.table import OPS  # noqa: PLC0415

    plan = backend.plan
    program = plan.programs[bound.bucket.phase]
    (planned,) = [one for one in program.steps if one.outputs[0] == step.name]
    found: list[Any] = []
    for name, arg in zip(OPS[step.op].arguments, planned.args, strict=True):
        if isinstance(arg, Ref):
            tensor = _tensor(backend, bound, step, name, arg.name)
            weight = plan.weights.get(arg.name)
            found.append(tensor.clone() if weight is None else plain_tensor(weight.layout, tensor))
        elif isinstance(arg, Size):
            found.append(bound.sizes[arg.name])
        else:
            found.append(list(arg) if isinstance(arg, tuple) else arg)
    return found


def _tensor(
    backend: CudaBackend, bound: BoundBucket, step: TableStep, name: str, value: str | None = None
) -> Any:
    """An argument or a result of a step where it lies."""
    from lingc.plugins.table import OPS  # noqa: PLC0415

    program = backend.plan.programs[bound.bucket.phase]
    if value is None:
        (planned,) = [one for one in program.steps if one.outputs[0] == step.name]
        value = planned.outputs[OPS[step.op].results.index(name)]
    buffer = step.buffers[name]
    assert buffer is not None, "an argument that is there"
    limits = backend.limits
    sizes = {**bound.sizes, "S": limits.slots + 1, "R": limits.pages * backend.plan.page_size + 1}
    kind = program.types[value]
    whole = TensorType(kind.dtype, kind.bind(sizes))
    return view(Held(kind=whole, address=bound.addresses[buffer], bytes=whole.bytes()))


def view(held: Held) -> Any:
    """Device memory as a tensor of torch; not a copy."""
    import torch  # noqa: PLC0415

    from lingc.op import TORCH_DTYPE  # noqa: PLC0415

    class Memory:
        __cuda_array_interface__: Mapping[str, Any] = {
            "shape": (held.bytes,), "typestr": "|u1", "data": (held.address, False), "version": 3,
        }  # fmt: skip

    raw = torch.as_tensor(Memory(), device="cuda")
    return raw.view(TORCH_DTYPE[held.kind.dtype]).view(held.kind.bind({}))
