"""Test vectors that travel in a package: what its engine must answer, on any machine.

`tests/cases.json` lists cases; `tests/vectors.safetensors` holds the logits after each prompt. A
case is run teacher-forced: after each step the recorded token is fed, so that one near tie does
not make nonsense of the rest.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from lingc.errors import InputError, LingcError
from lingc.runtime.backend import Backend
from lingc.runtime.generate import Generator
from lingc.runtime.sampling import Row
from lingc.runtime.sequence import Request
from lingc.runtime.slots import Piece, SlotTable
from lingc.runtime.steps import Steps

CASES = "cases.json"
VECTORS = "vectors.safetensors"

FORMAT = 1

DECIDED = 1e-3
"""Margin between the two largest logits above which the greedy token must be the recorded one; the
tolerance of the case where that is more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One prompt and what follows it.

    Attributes:
        prompt: Token ids.
        tokens: The greedy tokens after it.
        margins: Of each token: largest logit minus the next.
        tolerance: Largest difference that is allowed in `logits`.
        logits: After the prompt, [vocab].
    """

    name: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    margins: tuple[float, ...]
    tolerance: float
    logits: Row

    def __post_init__(self) -> None:
        if not self.prompt or not self.tokens or len(self.tokens) != len(self.margins):
            raise InputError(
                f"test case {self.name!r} has {len(self.prompt)} prompt tokens, "
                f"{len(self.tokens)} tokens and {len(self.margins)} margins"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorResult:
    """How an engine did on one case.

    Attributes:
        logit_error: Largest difference to the recorded logits.
        compared: Tokens that were compared; near ties are not.
        problems: What is wrong, one sentence each; empty where all is well.
    """

    case: str
    logit_error: float
    tolerance: float
    compared: int
    problems: tuple[str, ...]

    @property
    def is_right(self) -> bool:
        return not self.problems


def encode(cases: Sequence[Case]) -> dict[str, bytes]:
    """The files of `tests/`, by name; the same cases give the same bytes."""
    listed = []
    for case in cases:
        value = asdict(case)
        del value["logits"]
        listed.append(value)
    document = {"format": FORMAT, "cases": listed}
    text = json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n"
    tensors = {case.name: np.ascontiguousarray(case.logits, np.float32) for case in cases}
    return {CASES: text.encode(), VECTORS: save_tensors(tensors)}


def decode(files: Mapping[str, bytes]) -> list[Case]:
    """Read the cases back.

    Raises:
        InputError: They are not in this form, or of a newer format.
    """
    try:
        document = json.loads(files[CASES])
        if document["format"] > FORMAT:
            raise InputError(
                f"the test cases have format {document['format']}, this lingc reads up to {FORMAT}",
                hint="update lingc",
            )
        logits = load_tensors(files[VECTORS])
        return [
            Case(
                name=value["name"],
                prompt=tuple(map(int, value["prompt"])),
                tokens=tuple(map(int, value["tokens"])),
                margins=tuple(map(float, value["margins"])),
                tolerance=float(value["tolerance"]),
                logits=logits[value["name"]],
            )
            for value in document["cases"]
        ]
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"the package's test cases cannot be read: {error!r}") from error


def record(
    backend: Backend, prompts: Mapping[str, Sequence[int]], *, count: int, tolerance: float
) -> list[Case]:
    """Make a case of each prompt from what a trusted backend answers.

    Args:
        backend: It needs one slot, and room for the longest prompt and `count` tokens.
        prompts: Name -> token ids.
        count: Tokens to record after each.
        tolerance: For every case.
    """
    cases = []
    for name, prompt in prompts.items():
        # Rounded before margins are taken: what a backend adds up wider need not be that exact.
        rows = [row.astype(np.float32) for row in _answers(backend, prompt, count, None)]
        cases.append(
            Case(
                name=name,
                prompt=tuple(prompt),
                tokens=tuple(int(row.argmax()) for row in rows),
                margins=tuple(margin(row) for row in rows),
                tolerance=tolerance,
                logits=rows[0],
            )
        )
    return cases


def check(backend: Backend, case: Case) -> VectorResult:
    """Hold a backend against a case: logits, decoding, and rounds where it has a draft layer."""
    problems = []
    rows = _answers(backend, case.prompt, len(case.tokens), case.tokens)
    error = _difference(rows[0], case.logits)
    if not error <= case.tolerance:
        problems.append(f"logits differ by {error:.3g}, {case.tolerance:.3g} is allowed")
    decided = [margin > max(DECIDED, case.tolerance) for margin in case.margins]
    for step, row in enumerate(rows):
        token = int(row.argmax())
        if decided[step] and token != case.tokens[step]:
            problems.append(f"token {step} is {token}, it must be {case.tokens[step]}")
    if "draft" in backend.plan.programs and backend.plan.max_draft:
        problems += _check_rounds(backend, case, decided)
    return VectorResult(
        case=case.name,
        logit_error=error,
        tolerance=case.tolerance,
        compared=sum(decided),
        problems=tuple(problems),
    )


def tokens_needed(cases: Sequence[Case]) -> int:
    """Room that a slot must have for the longest case."""
    return max((len(case.prompt) + len(case.tokens) for case in cases), default=1)


def margin(row: Row) -> float:
    """Largest logit minus the next."""
    second, first = np.partition(row, -2)[-2:]
    return float(first) - float(second)


def _answers(
    backend: Backend, prompt: Sequence[int], count: int, forced: Sequence[int] | None
) -> list[Row]:
    """Logits after the prompt and after each token but the last, which are `forced` or greedy."""
    table = SlotTable(backend.limits, backend.plan.page_size)
    steps = Steps(backend, table)
    lease = table.admit(len(prompt) + count)
    logits, _ = steps.prefill([Piece(lease=lease, position=0, tokens=prompt)])
    rows = [logits[0]]
    for index in range(count - 1):
        token = int(rows[-1].argmax()) if forced is None else forced[index]
        piece = Piece(lease=lease, position=len(prompt) + index, tokens=[token])
        rows.append(steps.decode([piece], [0])[0])
    return rows


def _check_rounds(backend: Backend, case: Case, decided: Sequence[bool]) -> list[str]:
    """Speculative rounds must give the same tokens, up to the first near tie."""
    drafts = backend.plan.max_draft
    request = Request(tokens=case.prompt, max_tokens=len(case.tokens), stop_ids=frozenset())
    try:
        (found,) = Generator(backend, drafts=drafts).generate([request])
    except LingcError as error:
        return [f"with {drafts} drafts a round {error.problem}"]
    for step, (token, wanted) in enumerate(zip(found.tokens, case.tokens, strict=False)):
        if not decided[step]:
            break
        if token != wanted:
            return [f"with {drafts} drafts a round token {step} is {token}, it must be {wanted}"]
    return []


def _difference(got: NDArray[np.float32], wanted: Row) -> float:
    if got.shape != wanted.shape:
        return float("inf")
    return float(np.abs(got.astype(np.float64) - wanted).max())
