"""The step behind a program that takes a token from each row of its logits.

A plan ends with logits. An engine that shall not wait for its host between steps needs the token on
the device, so that every phase gets one more step, `sample`, and inputs for it. It is always the
last: who wants the logits leaves it out. In decode the tokens are written where the next step reads
its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lingc.op import OPS
from lingc.plan import Program, Ref, Step, TensorType
from lingc.plugins import table as _table
from lingc.targets.cuda.schedule import Call
from lingc.targets.spec import Target

assert _table.OPS is OPS  # the table is filled by its import

NAME = "sample"
TOKENS = "tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The step.

    Attributes:
        program: The one that it follows, with the inputs and the output that it adds.
        of: Value -> buffer, for what it adds.
    """

    program: Program
    call: Call
    of: Mapping[str, str]


def sample_of(
    phase: str, program: Program, of: Mapping[str, str], target: Target
) -> Sampling | None:
    """The step for a phase, `of` whose values are in which buffers.

    None where the op has no kernel for such logits.
    """
    op, logits = OPS[NAME], program.outputs["logits"]
    kind = program.types[logits]
    rows = kind.shape[0]
    types = {
        "temperature": TensorType("f32", (rows,)),
        "top_k": TensorType("i32", (rows,)),
        "top_p": TensorType("f32", (rows,)),
        "draws": TensorType("i32", (rows, 6)),
    }
    one = [TensorType(of.dtype, (1, *of.shape[1:])) for of in (kind, *types.values())]
    if op.refusal(target, *one) is not None:
        return None
    tokens = TensorType("i32", (rows,))
    assert not {*types, TOKENS} & {*program.types}, "plans use none of these names"
    into = "token_ids" if phase == "decode" else TOKENS
    buffers = {"logits": of[logits], **{name: name for name in types}, TOKENS: into}
    step = Step(op=f"lingc.{NAME}", args=(Ref(logits), *map(Ref, types)), outputs=(NAME,))
    return Sampling(
        program=replace(
            program,
            inputs=(*program.inputs, *types),
            outputs={**program.outputs, TOKENS: TOKENS},
            types={**program.types, **types, TOKENS: tokens},
            steps=(*program.steps, step),
        ),
        call=Call(step=step, op=op, buffers=buffers),
        of={**{name: name for name in types}, TOKENS: into},
    )
