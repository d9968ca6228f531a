"""A reproducer: one faulty step with all that it reads, in a file that runs by itself.

A safetensors file. Its metadata holds a plan of one step and the finding; its tensors are what the
step was given (`given.<name>`), what was made of it (`got`) and what should have been (`want`). For
a step of an ONNX engine there are also the engine's own node and its initializers.

Of two checkpoints it holds their places and the row of tokens instead, and runs them again.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from lingc.checkpoint.tensorfile import read_note
from lingc.errors import InputError
from lingc.interpret import run_step
from lingc.parity.bisect.finding import Finding
from lingc.parity.bisect.judge import Judged, judge
from lingc.parity.bisect.walk import Fault
from lingc.plan import Plan, Program, TensorType, dumps, loads, refs
from lingc.staging import write_whole

FORMAT = 1
PLAN, ENGINE = "plan against eager", "engine against its plan"
_KEY = "lingc_reproducer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproducer:
    """What a file holds.

    Attributes:
        about: `kind` and what a reader must know, in JSON's types.
        tensors: By name.
    """

    about: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def write(self, path: Path) -> None:
        """Write it, whole or not at all.

        Raises:
            ResourceError: It cannot be written there.
        """
        metadata = {_KEY: json.dumps({"format": FORMAT, **self.about}, sort_keys=True)}
        tensors = {
            name: value.detach().contiguous().clone() for name, value in self.tensors.items()
        }
        write_whole(path, save_tensors(tensors, metadata))


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """How a reproducer went.

    Attributes:
        what: What was run, in words.
        judged: Its result against what it should be.
    """

    what: str
    finding: Mapping[str, Any]
    judged: Judged

    @property
    def ok(self) -> bool:
        """Whether the fault is gone."""
        return self.judged.ok

    def document(self) -> dict[str, Any]:
        """In JSON's types."""
        return {
            "kind": "reproducer", "ok": self.ok, "what": self.what,
            "finding": dict(self.finding), "now": asdict(self.judged),
        }  # fmt: skip


def of_fault(found: Finding, fault: Fault, plan: Plan) -> Reproducer:
    """Of a step of a plan or an engine."""
    program = plan.programs[fault.phase]
    names = [*dict.fromkeys((*refs(fault.step.args), *fault.step.outputs))]
    one = Program(
        inputs=(), states=(), outputs={}, updates={}, weights=(),
        types={name: program.types[name] for name in names}, steps=(fault.step,),
    )  # fmt: skip
    small = Plan(
        config={}, precision=plan.precision, target=plan.target, activation=plan.activation,
        page_size=plan.page_size, max_draft=plan.max_draft, states={}, weights={},
        programs={fault.phase: one},
    )  # fmt: skip
    about = {
        "kind": "step", "plan": dumps(small), "sizes": dict(fault.sizes),
        "finding": found.to_json(),
    }  # fmt: skip
    tensors = {f"given.{name}": value for name, value in fault.values.items()}
    tensors |= {"got": fault.got, "want": fault.want}
    if fault.node is not None:
        tensors["node"] = torch.frombuffer(bytearray(fault.node), dtype=torch.uint8)
    return Reproducer(about=about, tensors=tensors)


def of_checkpoints(found: Finding, a: str, b: str, row: Sequence[int]) -> Reproducer:
    """Of two checkpoints, which must still be there when it is run again."""
    about = {"kind": "checkpoints", "a": a, "b": b, "finding": found.to_json()}
    return Reproducer(about=about, tensors={"row": torch.tensor(list(row))})


def read(path: Path) -> Reproducer:
    """Read a file back.

    Raises:
        InputError: It is not a reproducer, or of a newer format.
    """
    try:
        about = read_note(path, _KEY)
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(
            f"{str(path)!r} is not a reproducer: {error}",
            hint="`lingc parity A B --bisect --repro FILE` writes one",
        ) from error
    except RecursionError as error:
        raise InputError(f"{str(path)!r} is not a reproducer: it nests too deep") from error
    if not isinstance(about, dict):
        raise InputError(f"{str(path)!r} is not a reproducer: it tells a {type(about).__name__}")
    if about.get("format") != FORMAT or about.get("kind") not in ("step", "checkpoints"):
        raise InputError(
            f"{str(path)!r} has format {about.get('format')!r}, this lingc reads {FORMAT}",
            hint="run it with the lingc that wrote it",
        )
    lacks = ", ".join(_lacks(about, tensors))
    if lacks:
        raise InputError(
            f"{str(path)!r} is no whole reproducer: it lacks {lacks}",
            hint="write it again with `lingc parity A B --bisect --repro FILE`",
        )
    return Reproducer(about=about, tensors=tensors)


def _lacks(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What running it again needs, and is not there or of another type."""
    told = about.get("finding")
    told = told if isinstance(told, dict) else {}
    types = {"tensor": str, "op": str, "layer": int, "source": str, "compared": str,
             "limit": int | float}  # fmt: skip
    yield from (f"finding.{n}" for n, kind in types.items() if not isinstance(told.get(n), kind))
    if about["kind"] == "checkpoints":
        yield from (name for name in ("a", "b") if not isinstance(about.get(name), str))
        row = tensors.get("row")
        if row is None or row.ndim != 1 or row.is_floating_point():
            yield "row"
        return
    elements = told.get("elements")
    if not isinstance(elements, list) or not all(
        isinstance(one, dict) and isinstance(at := one.get("at"), list) and at
        and all(isinstance(i, int) for i in at) for one in elements
    ):  # fmt: skip
        yield "finding.elements"
    yield from (n for n, t in (("plan", str), ("sizes", dict)) if not isinstance(about.get(n), t))
    yield from (name for name in ("got", "want") if name not in tensors)


def run_step_again(repro: Reproducer) -> Again:
    """Run a saved step, and hold what comes of it against what should.

    A plan's step is run by its reference and held against the value that was due. An engine's is
    run by its own node, where the file has it, and held against the reference.

    Raises:
        InputError: The file's plan is not of this one step, or its values are not what it reads.
    """
    told = repro.about["finding"]
    plan = loads(repro.about["plan"])
    try:
        ((_, program),) = plan.programs.items()
        (step,) = program.steps
        place = step.outputs.index(told["tensor"])
        kind = program.types[told["tensor"]]
    except (ValueError, KeyError) as error:
        raise InputError(
            f"the reproducer's plan is not of one step that makes {told['tensor']!r}"
        ) from error
    given = {
        name.removeprefix("given."): value
        for name, value in repro.tensors.items()
        if name.startswith("given.")
    }
    try:
        reference = run_step(step, given, repro.about["sizes"])[place]
    except (KeyError, TypeError) as error:
        raise InputError(f"the reproducer has not all that {step.op} reads: {error}") from error
    got, want, what = reference, repro.tensors["want"], f"the reference of {step.op}"
    if told["compared"] != PLAN:
        want, got = reference, repro.tensors["got"]
        what = f"what the engine gave for {step.op}, not run again: its kernels run in it alone"
        if "node" in repro.tensors:
            got = _run_node(repro.tensors["node"], told["tensor"], given)
            what = f"the engine's node for {step.op}"
    if not got.is_floating_point():
        got, want = got[..., :].sort().values, want.sort().values
        rows = sorted({element["at"][0] for element in told["elements"]})
        got, want = got[rows].double(), want[rows].double()  # of other rows some may be ties
        kind = TensorType("f32", kind.shape)
    return Again(what=what, finding=told, judged=judge(got, want[: len(got)], kind, told["limit"]))


def _run_node(node: Tensor, output: str, given: Mapping[str, Tensor]) -> Tensor:
    from lingc.runtime.onnx_session import guarded, make_session  # noqa: PLC0415 an extra

    session = make_session(node.numpy().tobytes(), {}, threads=1, prepack=True)
    feeds = {one.name: given[one.name].numpy() for one in session.get_inputs()}
    (made,) = guarded("the node failed", lambda: session.run([output], feeds))
    return torch.from_numpy(made)
