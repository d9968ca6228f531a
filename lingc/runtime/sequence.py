"""One request on its way to a completion."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from lingc.errors import PromptError, UsageError
from lingc.plan import Plan
from lingc.runtime.backend import Array, Limits
from lingc.runtime.sampling import Row, Sampling, log_softmax
from lingc.runtime.saved import Prefix, Saved
from lingc.runtime.slots import Lease
from lingc.runtime.stopping import StopFilter
from lingc.runtime.tokenizer import TextStream


class Finish(StrEnum):
    """Why a completion ended."""

    STOP_ID = "stop_id"
    STOP_STRING = "stop_string"
    LENGTH = "length"
    CACHE = "cache"
    """The cache, or the positions that the model was made for, came to their end."""
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt and how to continue it.

    Attributes:
        tokens: The prompt.
        max_tokens: Most tokens to produce; None stops only where the cache ends.
        stop_ids: Tokens that end the completion, and belong to `Completion.tokens` but not to
            the text. None takes the checkpoint's own; empty ignores the end of turn.
        stop: Strings that end the completion; the text goes up to the first.
        logprobs: How many of the likeliest tokens to report at each position beside the chosen
            one; None reports nothing.
        prefix: The state behind the first tokens of the prompt, where it is known; they are not
            computed again.
    """

    tokens: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop_ids: frozenset[int] | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prefix: Prefix | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"max_tokens is {self.max_tokens}, at least 1 is needed")
        if self.logprobs is not None and self.logprobs < 0:
            raise UsageError(f"logprobs is {self.logprobs}, it must be 0 or more")
        if "" in self.stop:
            raise UsageError("a stop string is empty, it would stop before the first token")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log-probabilities at temperature 1 of the chosen token and of the likeliest ones."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of the request with that index, and the text that it releases."""

    request: int
    token: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """What became of the drafts.

    Attributes:
        histogram: Rounds by the number of drafts accepted, from none to all.
    """

    histogram: tuple[int, ...]

    @property
    def rounds(self) -> int:
        return sum(self.histogram)

    @property
    def drafted(self) -> tuple[int, ...]:
        """Drafts whose turn came, by place in the round: all the earlier ones were accepted."""
        return tuple(sum(self.histogram[place:]) for place in range(len(self.histogram) - 1))

    @property
    def accepted(self) -> tuple[int, ...]:
        """Drafts accepted, by place in the round."""
        return tuple(sum(self.histogram[place:]) for place in range(1, len(self.histogram)))

    @property
    def rates(self) -> tuple[float | None, ...]:
        """Accepted share by place; None where the turn never came."""
        pairs = zip(self.accepted, self.drafted, strict=True)
        return tuple(a / d if d else None for a, d in pairs)

    @property
    def mean_accepted(self) -> float:
        """Drafts accepted a round."""
        return sum(self.accepted) / self.rounds if self.rounds else 0.0

    @classmethod
    def total(cls, parts: Tokens["Acceptance"]) -> "Acceptance":
        """All rounds of several completions made with the same number of drafts."""
        columns = zip(*(part.histogram for part in parts if part.rounds), strict=True)
        return cls(histogram=tuple(map(sum, columns)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What became of one request.

    Attributes:
        request: Its index among the requests.
        prompt_tokens: Length of the prompt.
        tokens: Every token produced, the stop id included.
        text: Without special tokens, up to the stop string; empty without a tokenizer.
        logprobs: One entry a token, if asked for.
        acceptance: Of the drafts, if any were made.
        first_token_s: From the start of the run to the first token.
        total_s: From the start of the run to the end of this completion.
    """

    request: int
    prompt_tokens: int
    tokens: tuple[int, ...]
    text: str
    finish: Finish
    logprobs: tuple[TokenLogprob, ...]
    acceptance: Acceptance
    first_token_s: float | None
    total_s: float


@dataclass(slots=True, kw_only=True)
class Lead:
    """The draft layer's output after the last token of a sequence.

    Attributes:
        logits: For the token after next; None where only the draft is known that is drawn of them.
        hidden: What the next draft in the chain starts from, [D].
        draft: That draft, where it is drawn already.
    """

    logits: Row | None
    hidden: Array
    draft: int | None = None


@dataclass(slots=True, kw_only=True)
class Sequence:
    """A request that holds a slot.

    Attributes:
        index: Of the request.
        draws: The index that its tokens are drawn by: the one of the run that it began in.
        tokens: The prompt, and what was produced so far.
        limit: Length at which it must end.
        fed: Leading tokens that the model has seen.
        accepted: Of the tokens that the last verify left pending, how many to commit.
        lead: Where the next draft starts; None while there is no draft layer at work.
        histogram: Rounds by accepted drafts.
    """

    index: int
    request: Request
    lease: Lease
    limit: int
    text: TextStream | None
    stop_ids: frozenset[int]
    draws: int = field(init=False)
    tokens: list[int] = field(init=False)
    stop: StopFilter = field(init=False)
    shown: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    fed: int = 0
    accepted: int = 0
    lead: Lead | None = None
    histogram: list[int] = field(default_factory=lambda: [0])
    finish: Finish | None = None
    first_token_s: float | None = None

    def __post_init__(self) -> None:
        self.draws = self.index
        self.tokens = list(self.request.tokens)
        self.stop = StopFilter(self.request.stop)

    @property
    def is_prefilling(self) -> bool:
        return self.fed < len(self.request.tokens)

    def emit(self, token: int, logits: Row | None = None) -> Token:
        """Append a token, release its text, and decide whether it was the last.

        Where log-probabilities were asked for, the logits must be given.
        """
        self.tokens.append(token)
        if self.request.logprobs is not None:
            assert logits is not None, "asked for by the request"
            self.logprobs.append(_logprob(logits, token, self.request.logprobs))
        text = ""
        if token in self.stop_ids:
            self.finish = Finish.STOP_ID
        elif self.text is not None:
            text = self.stop.push(self.text.push(token))
            if self.stop.has_stopped:
                self.finish = Finish.STOP_STRING
        if self.finish is None and len(self.tokens) >= self.limit:
            asked = self.request.max_tokens
            reached = asked is not None and len(self.produced) >= asked
            self.finish = Finish.LENGTH if reached else Finish.CACHE
        if self.finish is not None:
            text += self.flush()
        self.shown.append(text)
        return Token(request=self.index, token=token, text=text)

    @property
    def produced(self) -> list[int]:
        return self.tokens[len(self.request.tokens) :]

    def flush(self) -> str:
        """The text still held back, now that no token follows."""
        if self.text is None:
            return ""
        shown = self.stop.push(self.text.flush())
        if self.stop.has_stopped:
            self.finish = Finish.STOP_STRING
        return shown + self.stop.flush()

    def complete(self, *, total_s: float) -> Completion:
        """The result; of an unfinished sequence, what there is."""
        if self.finish is None:
            self.shown.append(self.flush())
            self.finish = Finish.INTERRUPTED
        return Completion(
            request=self.index,
            prompt_tokens=len(self.request.tokens),
            tokens=tuple(self.produced),
            text="".join(self.shown),
            finish=self.finish,
            logprobs=tuple(self.logprobs),
            acceptance=Acceptance(histogram=tuple(self.histogram)),
            first_token_s=self.first_token_s,
            total_s=total_s,
        )


@dataclass(slots=True, kw_only=True)
class Parked:
    """A request that was taken out of a run between steps; `Run.resume` goes on with it.

    Attributes:
        run: Stands for the run that it was taken out of.
        plan: SHA-256 of the engine's plan.
    """

    sequence: Sequence
    saved: Saved
    run: object
    plan: str
    is_resumed: bool = False


def never_started(request: Request, index: int, *, total_s: float) -> Completion:
    """The result of a request that was still waiting when the run ended."""
    return Completion(
        request=index,
        prompt_tokens=len(request.tokens),
        tokens=(),
        text="",
        finish=Finish.INTERRUPTED,
        logprobs=(),
        acceptance=Acceptance(histogram=(0,)),
        first_token_s=None,
        total_s=total_s,
    )


def check_prompt(request: Request, *, index: int, vocab: int, capacity: int, reason: str) -> None:
    """Refuse a prompt that cannot be run.

    `capacity` is the most tokens that the model can be fed, and `reason` says what sets it.

    Raises:
        PromptError: It is empty, too long, or has a token out of range.
    """
    tokens = request.tokens
    if not tokens:
        raise PromptError(f"prompt {index} is empty", hint="a prompt needs at least one token")
    for position, token in enumerate(tokens):
        if not 0 <= token < vocab:
            raise PromptError(
                f"token {token} at position {position} of prompt {index} is out of range",
                hint=f"the vocabulary has {vocab} tokens, 0 to {vocab - 1}",
            )
    if len(tokens) > capacity:
        raise PromptError(
            f"prompt {index} has {len(tokens)} tokens, {reason} {capacity}",
            hint="shorten the prompt, or load the engine with more tokens if the model allows it",
        )


def _logprob(logits: Row, token: int, count: int) -> TokenLogprob:
    values = log_softmax(logits)
    likeliest = np.argsort(-values, kind="stable")[:count]
    return TokenLogprob(
        logprob=float(values[token]), top=tuple((int(t), float(values[t])) for t in likeliest)
    )


def longest_sequence(plan: Plan, limits: Limits) -> tuple[int, str]:
    """Most tokens that a sequence can be fed, and what sets it, for a message."""
    capacity = limits.pages * plan.page_size
    context: int | None = plan.config.get("max_position_embeddings")
    if context is not None and context < capacity:
        return context, "the model was made for"
    return capacity, "the cache holds"


def check_requests(
    requests: Tokens[Request], plan: Plan, limits: Limits, *, has_tokenizer: bool, first: int = 0
) -> None:
    """Refuse what an engine with those limits could not run; needs no backend yet.

    Raises:
        PromptError: A prompt is empty, too long or out of range.
        UsageError: A request has stop strings and there is no tokenizer.
    """
    longest, reason = longest_sequence(plan, limits)
    vocab: int = plan.config["vocab_size"]
    for index, request in enumerate(requests, first):
        check_prompt(request, index=index, vocab=vocab, capacity=longest, reason=reason)
        if request.stop and not has_tokenizer:
            raise UsageError(
                f"request {index} has stop strings, but the engine has no tokenizer",
                hint="stop by token id, or add tokenizer.json to the checkpoint and rebuild",
            )
