"""The command line: one verb a module, imported when it is called.

Each verb is a module of this package with a `command: click.Command`; the table below holds its
one line of help, so that `lingc --help` imports none of them.
"""

import importlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import click

from lingc import __version__
from lingc.cli import failure

VERBS: Mapping[str, str] = MappingProxyType(
    {
        "build": "Compile a checkpoint into a package.",
        "bind": "Pack a checkpoint's weights for a package that has none.",
        "deploy": "Write what runs a TensorRT package without Python.",
        "run": "Generate text with a package.",
        "calibrate": "Round weights by what sample data shows.",
        "quantize": "Write a quantized checkpoint.",
        "mix": "Make a recipe for a budget of bytes a token.",
        "recipes": "List the precisions, and what each does to a model.",
        "parity": "Compare an engine, a checkpoint or a plan with another.",
        "eval": "Tell how well a text is predicted, with intervals.",
        "bench": "Time a package against eager, after checking that it is right.",
        "bench-ops": "Time ops' kernels on a GPU, after checking that they are right.",
        "tune": "Measure which tactics are fastest on this GPU.",
        "inspect": "Show what a package holds, and where it came from.",
        "verify": "Check every byte of a package, and whether it fits here.",
        "plan": "Tell the memory that a model needs, without building it.",
        "targets": "List the devices that can be compiled for.",
        "passes": "Show which fusions fire, which do not, and why.",
        "doctor": "Describe this machine and what it can build and run.",
    }
)

_PIPE_CLOSED = 128 + signal.SIGPIPE


def module_of(verb: str) -> str:
    """Full name of the module of a verb: `lingc.cli.bench_ops` of `bench-ops`."""
    return f"lingc.cli.{verb.replace('-', '_')}"


class Verbs(click.Group):
    """The table of verbs as a click group."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 click's signature
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(module_of(cmd_name))
        command = module.command
        assert isinstance(command, click.Command), f"lingc.cli has no command {cmd_name}"
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:
            # click knows only commands that are already imported; the table knows all.
            raise click.exceptions.NoSuchCommand(
                error.command_name, possibilities=VERBS, ctx=ctx
            ) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    name="lingc",
    cls=Verbs,
    subcommand_metavar="VERB [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="lingc", message="%(prog)s %(version)s")
def lingc() -> None:
    """Compile Ling checkpoints ahead of time, prove the result, and run it.

    \b
    Examples:
      lingc doctor
      lingc build artifacts/checkpoints/ling-tiny --precision fp8 --target cpu -o tiny.ling
      lingc verify tiny.ling
      lingc run tiny.ling --prompt "Once upon a time"

    \b
    Exit codes:
       0  yes                               7  memory, disk or permission lacking
       1  internal error, with a report     8  a compiler stage failed, a fusion missed
       2  usage, unknown precision/target   9  lock or determinism violated
       3  bad checkpoint, config or data   10  nothing to do
       4  environment not compatible       75  interrupted; the same command goes on
       5  accuracy or coverage gate       130  Ctrl-C in run
       6  integrity or signature          141  the reader of stdout left

    Results go to stdout and messages to stderr. LINGC_CACHE says where caches and reports of
    internal errors go (~/.cache/lingc); LINGC_DEBUG=1 shows tracebacks.
    """  # noqa: D301 click's mark for a block that is not rewrapped


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, and answer what went wrong in words and an exit code.

    Args:
        argv: Words after `lingc`; those of the process where None.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        # A service manager's stop is answered like Ctrl-C, so that nothing partial stays behind.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    context: click.Context | None = None
    try:
        context = lingc.make_context("lingc", words.copy())
        with context:
            lingc.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.exceptions.NoArgsIsHelpError as asked:
        asked.show()
        return asked.exit_code
    except BrokenPipeError:
        _abandon_stdout()
        return _PIPE_CLOSED
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 the last place that can answer
        if isinstance(error, OSError) and error.filename is None:
            _abandon_stdout()  # it may be what failed
        verb = None if context is None else context.invoked_subcommand
        answer = failure.explain(error, verb=verb, words=words)
        is_told = context is not None and bool(context.meta.get(failure.EMITTED))
        failure.tell(answer, verb=verb, as_json=_wants_json(words) and not is_told)
        return answer.exit_code
    return 0


def _wants_json(words: Sequence[str]) -> bool:
    """Whether `--json` was given, also where the rest could not be parsed."""
    return "--json" in words[: words.index("--") if "--" in words else None]


def _abandon_stdout() -> None:
    """Let nothing fail a second time when Python flushes stdout on its way out."""
    if sys.stdout is sys.__stdout__:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
