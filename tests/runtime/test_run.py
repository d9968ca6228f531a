"""`lingc run`: what it reads, what it prints, how it ends. The engine is a toy."""

import io
import json
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lingc.cli import main
from lingc.plan import Plan
from lingc.runtime import Limits, Tokenizer
from lingc.runtime.backend import Array
from lingc.weights import Progress
from tests.runtime.letters import letters
from tests.runtime.toy import ToyBackend, expected_greedy, plan


class Interrupting(ToyBackend):
    """Raises what Ctrl-C raises, in the middle of a step."""

    def __init__(self, limits: Limits, toy_plan: Plan, *, after: int | None) -> None:
        super().__init__(limits, toy_plan, is_off=lambda s, _a: s % 4 == 0)
        self.after = after

    def run(self, phase: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if len(self.calls) == self.after:
            signal.raise_signal(signal.SIGINT)
        return super().run(phase, inputs)


@dataclass
class Toy:
    """Stands for an opened engine."""

    plan: Plan
    tokenizer: Tokenizer | None
    stop_ids: frozenset[int] = frozenset()
    after: int | None = None
    limits: Limits | None = None
    threads: int | None = None
    is_started: bool = False

    @property
    def package(self) -> Any:
        """For another target than the plan names, as one of several is."""
        return SimpleNamespace(
            root=Path("toy.ling"),
            manifest=SimpleNamespace(bundle_id="b" * 64),
            code=lambda: SimpleNamespace(target="chosen"),
        )

    def start(
        self, limits: Limits, *, threads: int | None = None, progress: Progress
    ) -> ToyBackend:
        self.limits, self.threads, self.is_started = limits, threads, True
        progress(1, 1)
        return Interrupting(limits, self.plan, after=self.after)


Arrange = Callable[..., Toy]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def arrange(monkeypatch: pytest.MonkeyPatch) -> Arrange:
    def make(*, has_tokenizer: bool = True, has_draft: bool = True, **more: Any) -> Toy:
        toy = Toy(
            plan=plan(has_draft=has_draft), tokenizer=letters() if has_tokenizer else None, **more
        )
        monkeypatch.setattr("lingc.cli.run.open_engine", lambda *_args, **_named: toy)
        return toy

    return make


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(*words: str, stdin: bytes | None = None) -> tuple[int, str, str]:
        stream = io.TextIOWrapper(io.BytesIO(stdin or b""))
        monkeypatch.setattr(stream, "isatty", lambda: stdin is None)
        monkeypatch.setattr("sys.stdin", stream)
        code = main(["run", "toy.ling", "-q", *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def text_after(prompt: str, count: int) -> str:
    tokenizer = letters()
    return tokenizer.decode(expected_greedy(tokenizer.encode(prompt), count)).rstrip("\ufffd")


def test_one_prompt_gives_its_continuation_and_a_line_break(arrange: Arrange, run: Run) -> None:
    arrange()

    assert run("--prompt", "abc", "--max-tokens", "9") == (0, text_after("abc", 9) + "\n", "")


def test_a_prompt_may_be_piped_in(arrange: Arrange, run: Run) -> None:
    arrange()

    assert run("--max-tokens", "5", stdin=b"abc\n")[1] == text_after("abc", 5) + "\n"


def test_prompts_of_all_kinds_run_together_and_are_printed_in_order(
    arrange: Arrange, run: Run, tmp_path: Path
) -> None:
    toy = arrange()
    file = tmp_path / "p.txt"
    file.write_text("bd\n")
    chat = tmp_path / "c.json"
    chat.write_text('[{"role": "user", "content": "ca"}]')

    code, said, _ = run(
        "--prompt", "abc", "--prompt-file", str(file), "--messages", str(chat), "--ids", "3,4",
        "--max-tokens", "6",
    )  # fmt: skip

    texts = [text_after(prompt, 6) for prompt in ("abc", "bd", "ca")]
    texts.append(letters().decode(expected_greedy([3, 4], 6)).rstrip("\ufffd"))
    expected = [f"==> prompt {n}: length <==\n{text}\n" for n, text in enumerate(texts)]
    assert (code, said) == (0, "\n".join(expected))
    assert toy.limits is not None
    assert toy.limits.slots == 4


def test_more_prompts_than_slots_wait(arrange: Arrange, run: Run) -> None:
    toy = arrange()

    code, said, _ = run("--ids", "1", "--ids", "2", "--ids", "3", "--slots", "1", "--threads", "2")

    assert code == 0
    assert said.count("==> prompt") == 3
    assert toy.limits is not None
    assert (toy.limits.slots, toy.threads) == (1, 2)


@pytest.mark.parametrize(("flag", "mark"), [((), ""), (("--think",), "e"), (("--no-think",), "d")])
def test_chat_takes_prompts_as_messages(
    arrange: Arrange, run: Run, flag: tuple[str, ...], mark: str
) -> None:
    arrange()

    said = run("--prompt", "abc", "--chat", "--system", "be", *flag, "--max-tokens", "4")[1]

    assert said == text_after("beabc" + mark, 4) + "\n"


def test_json_is_one_document_with_tokens_text_and_acceptance(arrange: Arrange, run: Run) -> None:
    arrange()

    _, said, _ = run("--ids", "1,2", "--ids", "3", "--max-tokens", "8", "--mtp", "2", "--json")

    document = json.loads(said)
    assert document["engine"]["target"] == "chosen"
    first, second = document["completions"]
    assert first["tokens"] == expected_greedy([1, 2], 8)
    assert (second["prompt"], second["prompt_tokens"], second["finish"]) == (1, 1, "length")
    assert first["text"] == letters().decode(first["tokens"]).rstrip("\ufffd")
    rounds = first["acceptance"]["rounds"] + second["acceptance"]["rounds"]
    assert document["acceptance"]["rounds"] == rounds
    assert document["timings"]["decoded_tokens"] == 14
    assert document["drafts"] == 2
    assert document["sampling"] == {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}


def test_drafts_do_not_change_the_text(arrange: Arrange, run: Run) -> None:
    arrange()

    plainly = run("--prompt", "abc", "--max-tokens", "20")[1]

    assert all(
        run("--prompt", "abc", "--max-tokens", "20", "--mtp", n)[1] == plainly for n in "123"
    )


def test_a_seed_gives_the_same_text_again(arrange: Arrange, run: Run) -> None:
    arrange()
    words = ("--prompt", "abc", "--max-tokens", "30", "--temperature", "3")

    first, again, other = (run(*words, "--seed", seed)[1] for seed in ("1", "1", "2"))

    assert first == again != other


def test_stop_strings_and_stop_ids_end_the_text(arrange: Arrange, run: Run) -> None:
    whole = text_after("abc", 20)
    stop = whole[5:7]
    arrange(stop_ids=frozenset(range(24)))

    ended = run("--prompt", "abc", "--max-tokens", "20")[1]
    going = run("--prompt", "abc", "--max-tokens", "20", "--ignore-eos", "--stop", stop)[1]

    assert ended == "\n"
    assert going == whole.partition(stop)[0] + "\n"


def test_without_a_tokenizer_token_ids_go_in_and_out(arrange: Arrange, run: Run) -> None:
    arrange(has_tokenizer=False)

    assert run("--ids", "1 2", "--max-tokens", "3")[1].split() == [
        str(token) for token in expected_greedy([1, 2], 3)
    ]


def test_stats_name_speed_and_acceptance_on_stderr(
    arrange: Arrange, capsys: pytest.CaptureFixture[str]
) -> None:
    arrange()

    main(["run", "toy.ling", "--ids", "1", "--max-tokens", "9", "--mtp", "3", "--stats"])

    told = capsys.readouterr().err
    assert "prefill  1 tokens in" in told
    assert "decode   8 tokens in" in told
    assert "drafts   3 a round," in told


@pytest.mark.parametrize("after", [0, 1, 4])
def test_ctrl_c_keeps_what_was_written_and_exits_with_130(
    arrange: Arrange, run: Run, after: int
) -> None:
    arrange(after=after)

    code, said, told = run("--prompt", "abc", "--max-tokens", "200")

    # Prefill gives a token, and each of the later calls one more.
    assert (code, said) == (130, text_after("abc", after) + "\n")
    assert told == "lingc run: interrupted (LINGC-E7500)\n"


def test_ctrl_c_still_gives_one_whole_document(arrange: Arrange, run: Run) -> None:
    arrange(after=5)

    code, said, _ = run("--ids", "1", "--ids", "2", "--slots", "1", "--json")

    found = json.loads(said)["completions"]
    assert code == 130
    assert [(c["finish"], len(c["tokens"])) for c in found] == [
        ("interrupted", 5),
        ("interrupted", 0),
    ]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "there is no prompt"),
        (("--prompt", ""), 3, "prompt 0 is empty"),
        (("--ids", "1,24"), 3, "token 24 at position 1 of prompt 0 is out of range"),
        (("--ids", "1,x"), 2, "'x' is not a token id"),
        (("--ids", "1", "--mtp", "4"), 2, "the engine verifies at most 3"),
        (("--ids", "1", "--temperature", "-1"), 2, "temperature is -1.0"),
        (("--ids", "1", "--top-p", "0"), 2, "top_p is 0.0"),
        (("--ids", "1", "--seed", "-1"), 2, "seed is -1"),
        (("--ids", "1", "--system", "x"), 2, "--system is for prompts that are chat messages"),
        (("--ids", "1", "--think"), 2, "--think and --no-think are for chat"),
        (("--ids", "1,2,3,4,5", "--cache-tokens", "4"), 3, "has 5 tokens, the cache holds 4"),
        (("--prompt-file", "no-such-file"), 2, "'no-such-file' does not exist"),
        (("--prompt", "z"), 3, "prompt 0 is empty"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is_loaded(
    arrange: Arrange, run: Run, words: tuple[str, ...], code: int, message: str
) -> None:
    toy = arrange()

    found, said, told = run(*words)

    assert (found, said) == (code, "")
    assert message in told
    assert not toy.is_started


def test_text_without_a_tokenizer_is_refused(arrange: Arrange, run: Run) -> None:
    arrange(has_tokenizer=False)

    code, _, told = run("--prompt", "abc")

    assert code == 2
    assert "the engine has no tokenizer, so it takes no text" in told


def test_drafts_without_a_draft_layer_are_refused_with_the_reason(
    arrange: Arrange, run: Run
) -> None:
    arrange(has_draft=False)

    code, _, told = run("--ids", "1", "--mtp", "1")

    assert code == 2
    assert "its checkpoint has no MTP weights" in told


def test_stdin_that_is_not_text_is_refused(arrange: Arrange, run: Run) -> None:
    arrange()

    code, _, told = run(stdin=b"ab\xff")

    assert code == 3
    assert "stdin is not UTF-8" in told
