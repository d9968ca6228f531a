"""Every exception raised on purpose, with its exit code and stable id.

An error says what is wrong (`problem`) and what to do about it (`hint`). The command line prints
both and exits with `exit_code`; nothing here is ever shown as a traceback.

    code  meaning
       1  internal error, with a report file
       2  usage; unknown precision or target
       3  bad checkpoint, config, recipe, data file, prompt or token
       4  environment or hardware not compatible, newer format, other target
       5  accuracy or coverage gate failed
       6  integrity: flipped byte, foreign weights, bad signature
       7  resources: memory, disk, read-only
       8  compiler stage failed, fusion missed
       9  lock or determinism violated
      10  nothing to do
      75  interrupted and resumable
     130  Ctrl-C in `run`
"""

from typing import ClassVar


class LingcError(Exception):
    """The root of every error raised on purpose.

    Args:
        problem: One lower-case sentence with the thing, in quotes, and the value.
        hint: What the reader can do about it, or None where nothing can be said.
    """

    exit_code: ClassVar[int] = 1
    id: ClassVar[str] = "LINGC-E0100"

    def __init__(self, problem: str, *, hint: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint

    def __str__(self) -> str:
        return self.problem if self.hint is None else f"{self.problem}\nhint: {self.hint}"


class UsageError(LingcError):
    """A flag or argument that cannot be meant."""

    exit_code = 2
    id = "LINGC-E0200"


class UnknownTargetError(UsageError):
    """No target has that name."""

    id = "LINGC-E0201"


class UnknownPrecisionError(UsageError):
    """No recipe has that name."""

    id = "LINGC-E0202"


class InputError(LingcError):
    """A file or value from outside that is not what it must be."""

    exit_code = 3
    id = "LINGC-E0300"


class ConfigError(InputError):
    """A `config.json` that is missing, contradictory or of another architecture."""

    id = "LINGC-E0301"


class CheckpointError(InputError):
    """A checkpoint with missing, extra, truncated or wrong tensors.

    Args:
        problems: Every fault found, one sentence each; all are listed at once.
    """

    id = "LINGC-E0302"

    def __init__(
        self, problem: str, *, problems: tuple[str, ...] = (), hint: str | None = None
    ) -> None:
        listed = "".join(f"\n  - {line}" for line in problems)
        super().__init__(problem + listed, hint=hint)
        self.problems = problems


class RecipeError(InputError):
    """A quantization recipe that does not parse, or names nothing."""

    id = "LINGC-E0303"


class DataError(InputError):
    """A data file with a bad line."""

    id = "LINGC-E0304"


class PromptError(InputError):
    """A prompt too long for the cache, or a token out of range."""

    id = "LINGC-E0305"


class IncompatibleError(LingcError):
    """This environment, hardware or reader cannot use the thing at hand."""

    exit_code = 4
    id = "LINGC-E0400"


class MissingExtraError(IncompatibleError):
    """An optional dependency is not installed; the hint names the extra."""

    id = "LINGC-E0401"


class GateError(LingcError):
    """An accuracy or coverage gate that failed."""

    exit_code = 5
    id = "LINGC-E0500"


class IntegrityError(LingcError):
    """Bytes that are not the ones that were written."""

    exit_code = 6
    id = "LINGC-E0600"


class ResourceError(LingcError):
    """Memory, disk or permission is lacking."""

    exit_code = 7
    id = "LINGC-E0700"


class StageError(LingcError):
    """A compiler stage failed."""

    exit_code = 8
    id = "LINGC-E0800"


class FusionError(StageError):
    """A fusion fired less often than the config says it must."""

    id = "LINGC-E0801"


class UnsupportedError(StageError):
    """An op or layout that the chosen engine kind cannot lower."""

    id = "LINGC-E0802"


class LockError(LingcError):
    """A lock or the promise of determinism was violated."""

    exit_code = 9
    id = "LINGC-E0900"


class NothingToDoError(LingcError):
    """The request is already fulfilled, or names nothing."""

    exit_code = 10
    id = "LINGC-E1000"


class ResumableError(LingcError):
    """Interrupted, and resumable by the command in the hint."""

    exit_code = 75
    id = "LINGC-E7500"
