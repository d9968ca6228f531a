"""`lingc run`: from prompts to text."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from lingc.cli import failure, output
from lingc.cli.output import Output, seconds_text
from lingc.errors import UsageError
from lingc.plan import Plan
from lingc.runtime import (
    Acceptance,
    Backend,
    Completion,
    Event,
    Generator,
    Limits,
    Request,
    Run,
    Sampling,
    Stats,
    Tokenizer,
)
from lingc.runtime.load import OpenedEngine, open_engine
from lingc.runtime.messages import Message
from lingc.runtime.prompts import decode_text, parse_ids, read_conversations
from lingc.runtime.sequence import check_requests
from lingc.runtime.speculative import check_drafts

_MOST_SLOTS = 8
"""Slots that are taken without being asked for; more prompts than these wait for each other."""


@click.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="May be repeated.")
@click.option(
    "--prompt-file",
    "files",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False, allow_dash=True),
    help="A prompt a file, without its last line break; - is stdin. May be repeated.",
)
@click.option(
    "--messages",
    "conversations",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Chat messages: a .json file, or a conversation a line in a .jsonl file.",
)
@click.option("--ids", multiple=True, metavar="1,2,3", help="Token ids. May be repeated.")
@click.option("--chat", is_flag=True, help="Take each prompt as a user's message.")
@click.option("--system", metavar="TEXT", help="The system message, with --chat.")
@click.option("--think/--no-think", default=None, help="Ask the chat template for (no) thinking.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, help="0 keeps all tokens.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this. May be repeated.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the end of the turn.")
@click.option(
    "--mtp",
    "drafts",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Tokens that the MTP layer drafts a round; greedy text stays the same.",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Weights for an engine without any; packed on first use.",
)
@click.option("--target", help="The variant's, of a package with several (default: this GPU's).")
@click.option(
    "--cache-tokens",
    type=click.IntRange(min=1),
    help="Room for a prompt and its completion (default: what they need).",
)
@click.option(
    "--slots",
    type=click.IntRange(min=1),
    help=f"Prompts at once (default: all, up to {_MOST_SLOTS}); the others wait.",
)
@click.option("--threads", type=output.THREADS, help="For an engine on a CPU.")
@click.option("--stats", "show_stats", is_flag=True, help="Speed and acceptance, on stderr.")
@output.options
def command(
    out: Output,
    engine: Path,
    prompts: tuple[str, ...],
    files: tuple[Path, ...],
    conversations: tuple[Path, ...],
    ids: tuple[str, ...],
    system: str | None,
    think: bool | None,  # noqa: FBT001 click passes it by name
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop: tuple[str, ...],
    drafts: int,
    checkpoint: Path | None,
    target: str | None,
    cache_tokens: int | None,
    slots: int | None,
    threads: int | None,
    *,
    chat: bool,
    ignore_eos: bool,
    show_stats: bool,
) -> None:
    """Continue prompts, or answer chat messages, with an engine.

    One prompt streams; several are run together and printed in order, each under a header. Without
    a prompt, stdin is one. Greedy unless a temperature is given; the same prompts, options and seed
    give the same text. Ctrl-C keeps what was written and exits with 130.

    \b
    Examples:
      lingc run tiny.ling --prompt "Once upon a time" --max-tokens 64
      lingc run tiny.ling --chat --prompt "What is a tuple?" --temperature 0.7 --top-p 0.95
      lingc run tiny.ling --messages chat.jsonl --mtp 3 --stats
      git diff | lingc run tiny.ling --stop $'\\n\\n'
      lingc run external.ling --checkpoint DIR --ids 451,390,2148 --json
    """  # noqa: D301 click's mark for a block that is not rewrapped
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    asked = Asked(
        texts=(*prompts, *map(_read, files)),
        conversations=tuple(c for path in conversations for c in read_conversations(path)),
        ids=tuple(map(parse_ids, ids)),
        is_chat=chat,
        system=system,
        is_thinking=think,
    ).or_stdin()
    opened = _open(out, engine, checkpoint, target)
    check_drafts(opened.plan, drafts)
    requests = [
        Request(
            tokens=tuple(tokens),
            sampling=sampling,
            max_tokens=max_tokens,
            stop_ids=frozenset() if ignore_eos else None,
            stop=stop,
        )
        for tokens in asked.tokens(opened.tokenizer)
    ]
    limits = _limits(opened.plan, requests, cache_tokens=cache_tokens, slots=slots, drafts=drafts)
    has_tokenizer = opened.tokenizer is not None
    check_requests(requests, opened.plan, limits, has_tokenizer=has_tokenizer)
    loading = time.perf_counter()
    backend = _start(out, opened, limits, threads)
    load_s = time.perf_counter() - loading
    generator = Generator(backend, opened.tokenizer, stop_ids=opened.stop_ids, drafts=drafts)
    printer = Printer(out, count=len(requests), has_text=has_tokenizer)
    try:
        with generator.start(requests) as run:
            is_interrupted = _follow(run, printer)
            stats = run.stats
    finally:
        backend.close()
    completions = printer.completions()
    if out.as_json:
        out.emit(_document(opened, sampling, drafts, completions, stats, load_s))
    if show_stats:
        _tell(out, completions, stats, load_s, drafts)
    if is_interrupted:
        raise KeyboardInterrupt


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The prompts as they were given."""

    texts: tuple[str, ...]
    conversations: tuple[Sequence[Message], ...]
    ids: tuple[tuple[int, ...], ...]
    is_chat: bool
    system: str | None
    is_thinking: bool | None

    def __post_init__(self) -> None:
        if self.system is not None and not self.is_chat:
            raise UsageError(
                "--system is for prompts that are chat messages",
                hint="add --chat, or put the system message into the --messages file",
            )
        if self.is_thinking is not None and not (self.is_chat or self.conversations):
            raise UsageError(
                "--think and --no-think are for chat", hint="add --chat, or use --messages"
            )

    def or_stdin(self) -> "Asked":
        """These, or where there are none, the prompt that is piped in."""
        if self.texts or self.conversations or self.ids:
            return self
        if sys.stdin.isatty():
            raise UsageError(
                "there is no prompt", hint='give --prompt "…", --messages FILE, or pipe one in'
            )
        return Asked(
            texts=(_read(Path("-")),),
            conversations=(),
            ids=(),
            is_chat=self.is_chat,
            system=self.system,
            is_thinking=self.is_thinking,
        )

    def tokens(self, tokenizer: Tokenizer | None) -> list[Sequence[int]]:
        """All prompts as tokens: texts first, then conversations, then ids."""
        if tokenizer is None:
            if self.texts or self.conversations:
                raise UsageError(
                    "the engine has no tokenizer, so it takes no text",
                    hint="give token ids: --ids 1,2,3",
                )
            return list(self.ids)
        texts = [self._chat(text) for text in self.texts] if self.is_chat else []
        turns = [*texts, *self.conversations]
        chats = [tokenizer.chat(turn, enable_thinking=self.is_thinking) for turn in turns]
        plain = () if self.is_chat else self.texts
        return [*(tokenizer.encode(text) for text in (*plain, *chats)), *self.ids]

    def _chat(self, text: str) -> list[Message]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": text}]


class Printer:
    """Shows completions: one as it comes, several each when its turn has come."""

    def __init__(self, out: Output, *, count: int, has_text: bool) -> None:
        self._out = out
        self._count = count
        self._has_text = has_text
        self._streamed = ""
        self._done: dict[int, Completion] = {}
        self._next = 0

    def show(self, event: Event) -> None:
        if isinstance(event, Completion):
            self._done[event.request] = event
            self._print_finished()
        elif self._count == 1 and not self._out.as_json:
            self._stream(event.text if self._has_text else f"{event.token} ")

    def completions(self) -> list[Completion]:
        return [self._done[index] for index in sorted(self._done)]

    def _stream(self, text: str) -> None:
        # Noted first: an interrupt between the two may drop a piece and cannot double one.
        self._streamed += text
        self._out.write(text)

    def _print_finished(self) -> None:
        while self._next in self._done:
            completion = self._done[self._next]
            self._next += 1
            if self._out.as_json:
                continue
            if self._count > 1:
                gap = "\n" if completion.request else ""
                self._out.line(f"{gap}==> prompt {completion.request}: {completion.finish} <==")
            self._stream(self._text(completion)[len(self._streamed) :])
            self._out.line()
            self._streamed = ""

    def _text(self, completion: Completion) -> str:
        if self._has_text:
            return completion.text
        return "".join(f"{token} " for token in completion.tokens)


def _follow(run: Run, printer: Printer) -> bool:
    """Take a run to its end, or to Ctrl-C; whether it was that."""
    try:
        while not run.is_done:
            for event in run.step():
                printer.show(event)
    except KeyboardInterrupt:
        for completion in run.interrupt():
            printer.show(completion)
        return True
    return False


def _open(out: Output, engine: Path, checkpoint: Path | None, target: str | None) -> OpenedEngine:
    name = "open engine" if checkpoint is None else "open engine, pack weights"
    with out.stage(name):
        return open_engine(
            engine, checkpoint=checkpoint, cache_dir=failure.cache_dir(), target=target
        )


def _start(out: Output, opened: OpenedEngine, limits: Limits, threads: int | None) -> Backend:
    """Load an engine, and show how much of its weights is there."""
    total = sum(spec.type.bytes() for spec in opened.plan.weights.values())
    with out.stage("load engine", total=total, unit="B") as advance:
        shown = 0

        def progress(done: int, whole: int) -> None:
            nonlocal shown
            now = total * done // max(whole, 1)
            advance(now - shown)
            shown = now

        return opened.start(limits, threads=threads, progress=progress)


def _read(path: Path) -> str:
    if str(path) == "-":
        return decode_text(sys.stdin.buffer.read(), name="stdin")
    return decode_text(path.read_bytes(), name=repr(str(path)))


def _limits(
    plan: Plan,
    requests: Sequence[Request],
    *,
    cache_tokens: int | None,
    slots: int | None,
    drafts: int,
) -> Limits:
    """Room for the prompts, as asked for or as they need it."""
    longest = max(len(r.tokens) + (r.max_tokens or 1) for r in requests) + drafts
    context = int(plan.config.get("max_position_embeddings") or longest)
    return Limits.from_tokens(
        slots=slots or min(len(requests), _MOST_SLOTS),
        tokens_per_sequence=cache_tokens or min(longest, context),
        page_size=plan.page_size,
    )


def _acceptance(completions: Sequence[Completion]) -> dict[str, Any] | None:
    total = Acceptance.total([completion.acceptance for completion in completions])
    if not total.rounds:
        return None
    return {
        "rounds": total.rounds,
        "drafted": total.drafted,
        "accepted": total.accepted,
        "rates": total.rates,
        "mean_accepted": total.mean_accepted,
    }


def _document(
    opened: OpenedEngine,
    sampling: Sampling,
    drafts: int,
    completions: Sequence[Completion],
    stats: Stats,
    load_s: float,
) -> dict[str, Any]:
    manifest = opened.package.manifest
    return {
        "engine": {
            "path": str(opened.package.root),
            "bundle_id": manifest.bundle_id,
            "precision": opened.plan.precision,
            "target": opened.package.code().target,
        },
        "sampling": asdict(sampling),
        "drafts": drafts,
        "completions": [
            {
                "prompt": completion.request,
                "prompt_tokens": completion.prompt_tokens,
                "tokens": completion.tokens,
                "text": completion.text if opened.tokenizer is not None else None,
                "finish": completion.finish,
                "first_token_s": completion.first_token_s,
                "total_s": completion.total_s,
                "acceptance": _acceptance([completion]),
            }
            for completion in completions
        ],
        "acceptance": _acceptance(completions),
        "timings": {"load_s": load_s, **asdict(stats)},
    }


def _tell(
    out: Output, completions: Sequence[Completion], stats: Stats, load_s: float, drafts: int
) -> None:
    out.note(f"load     {seconds_text(load_s)}")
    out.note(f"prefill  {_rate(stats.prompt_tokens, stats.prefill_s)}")
    rounds = f", {stats.steps} {'rounds' if drafts else 'steps'}"
    out.note(f"decode   {_rate(stats.decoded_tokens, stats.decode_s)}{rounds}")
    firsts = [c.first_token_s for c in completions if c.first_token_s is not None]
    if firsts:
        out.note(f"first    {seconds_text(min(firsts))} to the first token")
    total = Acceptance.total([completion.acceptance for completion in completions])
    if total.rounds:
        rates = ", ".join("-" if rate is None else f"{rate:.1%}" for rate in total.rates)
        out.note(f"drafts   {drafts} a round, {total.mean_accepted:.3f} accepted; by place {rates}")


def _rate(tokens: int, seconds: float) -> str:
    speed = f" ({tokens / seconds:.4g} tokens/s)" if tokens and seconds else ""
    return f"{tokens} tokens in {seconds_text(seconds)}{speed}"
