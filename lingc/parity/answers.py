"""What a reader of a comparison wants to know, answered in sentences."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lingc.parity.compare import Summary
from lingc.parity.layers import LayerError
from lingc.parity.report import verdict
from lingc.parity.run import Result, SideFacts
from lingc.parity.side import MODES
from lingc.parity.stored import StoredAs
from lingc.parity.usage import listed, silent

_MOST_MODULES = 12
_MOST_LAYERS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One question and its answer.

    Attributes:
        is_good: Whether a reader can leave it at that; None where the answer is a fact.
        lines: Sentences.
        commands: To copy.
    """

    question: str
    is_good: bool | None
    lines: tuple[str, ...]
    commands: tuple[str, ...] = ()


def answers(result: Result) -> tuple[Answer, ...]:
    """The five."""
    return (
        Answer(question="Does it pass?", is_good=passes(result), lines=tuple(_passes(result))),
        Answer(question="Where is the error largest?", is_good=None, lines=tuple(_where(result))),
        _silent(result),
        Answer(question="What was not quantized?", is_good=None, lines=tuple(_plain(result))),
        _next(result),
    )


# ------------------------------------------------------------------------------------------ pass


def passes(result: Result) -> bool | None:
    """Whether the budget is kept; None where it judges nothing and nothing is broken."""
    judged = any(len(mode.checks) > 1 for mode in result.modes)
    return result.ok if judged or not result.ok else None


def _passes(result: Result) -> Iterator[str]:
    word = {True: "Yes", False: "No", None: "Nobody said what is due"}[passes(result)]
    yield f"{word}: {verdict(result)}."
    for mode in result.modes:
        found = mode.summary
        same = f"the likeliest next token is the same for {found.top1_agreement:.2%} of them"
        line = f"{mode.summary.mode}: {found.tokens} tokens, mean KL {found.mean_kl:.3g}; {same}"
        if found.perplexity is not None and found.other_perplexity is not None:
            ratio = found.other_perplexity / found.perplexity - 1
            line += f"; perplexity {found.other_perplexity:.5g} against {found.perplexity:.5g}"
            line += f" ({ratio:+.3%})"
        yield f"{line}."


# ----------------------------------------------------------------------------------------- where


def _where(result: Result) -> Iterator[str]:
    mode = max(result.modes, key=lambda one: _size(one.summary))
    found = mode.summary
    if not found.mean_kl and not found.max_abs:
        yield "Nowhere: every logit of every mode is the same on both sides."
        return
    if len(result.modes) > 1:
        yield f"In mode {found.mode}, of which the rest speaks."
    if found.layers:
        yield _layer(found.layers)
    else:
        yield "By layer: not told, for one of the sides shows no values between its layers."
    if found.states:
        worst = max(found.states, key=lambda one: one.max)
        yield (
            f"Of the linear states, that of layer {worst.layer} after {worst.position} tokens: "
            f"{worst.max:.3g} of its size."
        )
    bucket = max(found.buckets, key=lambda one: _or_inf(one.mean_kl))
    yield (
        f"By position, at {bucket.first} to {bucket.last}: mean KL {bucket.mean_kl:.3g} over "
        f"{bucket.tokens} tokens."
    )
    if mode.worst:
        token = mode.worst[0]
        yield (
            f"The worst token stands on line {token.line} at position {token.position} "
            f"(KL {token.kl:.3g}), after {token.context[-40:]!r}."
        )


def _size(found: Summary) -> float:
    return float("inf") if found.not_finite else found.mean_kl


def _or_inf(value: float) -> float:
    return value if value == value else float("inf")  # noqa: PLR0124 (a NaN)


def _layer(layers: Sequence[LayerError]) -> str:
    """Where the error grows most, which is where something is lost."""
    before = [0.0, *(one.mean for one in layers[:-1])]
    grown = [one.mean - earlier for one, earlier in zip(layers, before, strict=True)]
    at = max(range(len(layers)), key=lambda i: _or_inf(grown[i]))
    most = max(layers, key=lambda one: _or_inf(one.mean))
    return (
        f"It grows most in layer {layers[at].layer}, from {before[at]:.3g} to "
        f"{layers[at].mean:.3g} of the residual stream, and is largest behind layer {most.layer}: "
        f"{most.mean:.3g} on average, {most.max:.3g} at most."
    )


# --------------------------------------------------------------------------------------- experts


def _silent(result: Result) -> Answer:
    question = "Which experts are silent?"
    counts = result.modes[0].summary.usage
    if not counts:
        text = "Not told: no side shows which experts its tokens went to, or the model has none."
        return Answer(question=question, is_good=None, lines=(text,))
    found = silent(counts)
    experts = sum(len(each) for each in counts.values())
    tokens = result.modes[0].summary.tokens
    if not found:
        least, layer, expert = min(
            (count, layer, e) for layer, each in counts.items() for e, count in enumerate(each)
        )
        text = (
            f"None: each of the {experts} experts of {len(counts)} layers got a token of the "
            f"{tokens}; the fewest, {least}, went to expert {expert} of layer {layer}."
        )
        return Answer(question=question, is_good=True, lines=(text,))
    count = sum(map(len, found.values()))
    lines = [
        f"{count} of {experts} experts got none of the {tokens} tokens: nothing here judges them."
    ]
    shown = list(found.items())[:_MOST_LAYERS]
    lines += [f"Layer {layer}: {listed(each)}." for layer, each in shown]
    if len(shown) < len(found):
        lines.append(f"And more in {len(found) - len(shown)} further layers; the table has all.")
    return Answer(question=question, is_good=False, lines=tuple(lines))


# ------------------------------------------------------------------------------------- quantized


def _plain(result: Result) -> Iterator[str]:
    for side in _different(result):
        quantized = [one for one in side.stored if one.is_quantized]
        plain = [one for one in side.stored if not one.is_quantized]
        total = sum(one.elements for one in side.stored)
        if not side.stored:
            yield f"{side.name}: not told."
        elif not quantized:
            yield f"{side.name}: nothing is quantized; all matrices are {_formats(plain)}."
        else:
            share = sum(one.elements for one in plain) / total
            yield (
                f"{side.name}: {share:.1%} of the elements are not, the rest is "
                f"{_formats(quantized)}. Norms, biases and decay rates never are."
            )
            for one in plain:
                names = one.modules
                more = len(names) - _MOST_MODULES
                tail = f" and {more} more" if more > 0 else ""
                yield f"In {one.format}: {', '.join(names[:_MOST_MODULES])}{tail}."


def _different(result: Result) -> Iterator[SideFacts]:
    """The other side, and the reference where it is quantized too, of weights of its own."""
    yield result.other
    if any(one.is_quantized for one in result.reference.stored):
        yield result.reference


def _formats(stored: Sequence[StoredAs]) -> str:
    return " and ".join(one.format for one in stored)


# ------------------------------------------------------------------------------------------ next


def _next(result: Result) -> Answer:
    lines, commands = [], []
    pair = f"{result.reference.word} {result.other.word}"
    pair += " --weights checkpoint" if result.weights == "checkpoint" else ""
    is_same = result.weights == "engine" and result.budget.name != "quantized"
    broken = any(mode.summary.not_finite for mode in result.modes)
    if not result.ok and (is_same or broken):
        lines.append("Some step of the other side computes something else: find it.")
        commands.append(f"lingc parity {pair} --bisect")
    elif not result.ok:
        lines.append(
            "The weights differ, so this is what the precision costs. Calibrate, or leave the "
            "modules of the layer where the error grows most in a higher precision."
        )
        commands.append(
            f"lingc calibrate {result.reference.word} --data DATA.jsonl --recipe RECIPE"
        )
    elif passes(result) is None:
        lines.append(
            "Nothing was judged. Decide what may be lost, write it into a budget file, and give "
            "that: then this comparison can stop a release."
        )
        commands.append(f"lingc parity {pair} --budget BUDGET.json")
    else:
        lines.append("Nothing is wrong here: it can be used as it is.")
    if not result.modes[0].summary.usage or silent(result.modes[0].summary.usage):
        lines.append("Give more data, of the kind that the model will meet, to reach every expert.")
        commands.append(f"lingc parity {pair} --data MORE.jsonl")
    ran = {mode.summary.mode for mode in result.modes}
    if len(ran) < len(MODES) and _has_modes(result):
        missing = ", ".join(mode for mode in MODES if mode not in ran)
        lines.append(f"Not run here: {missing}.")
        commands.append(f"lingc parity {pair} --mode all")
    return Answer(
        question="What to do next?", is_good=None, lines=tuple(lines),
        commands=tuple(dict.fromkeys(commands)),
    )  # fmt: skip


def _has_modes(result: Result) -> bool:
    """Whether a side is an engine or a plan, which has programs of its own for them."""
    return any("engine" in side.facts for side in (result.reference, result.other))
