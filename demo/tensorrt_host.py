"""On a machine with a GPU: build, run, compare and time engines, and write a record to send back.

    python demo/tensorrt_host.py --target h20 --precision bf16,fp8,int4-all -o record.json

Every step is a command; whether it ran, failed or was skipped, why, what it printed and how long it
took go into the record. A step that fails does not stop the others, and nothing is sent anywhere.

    build, verify, run, layers      the engine as a user has it
    references, parity              how far it is from eager, judged by a budget of its own recipe
    deploy                          what runs without Python, its plugins compiled
    python logits, native logits    the same rows by Python's plugins and by the compiled ones
    same bits                       whether both gave the same
    enqueue                         each plugin by itself, Python's and compiled, against references
    converters                      ops that Torch-TensorRT compiles, against their references
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
LING_TINY = ROOT / "artifacts" / "checkpoints" / "ling-tiny"
STEPS = Path(__file__).parent / "tensorrt_steps.py"
LIBRARIES = (
    "tensorrt", "tensorrt-rtx-cu13", "tensorrt-cu13", "torch-tensorrt", "torch", "triton",
    "cuda-bindings", "nvidia-cuda-nvrtc", "onnx",
)  # fmt: skip
INCLUDES = (
    "/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu",
    "/usr/local/tensorrt/include", "/usr/local/cuda/include",
)  # fmt: skip
"""Where headers of TensorRT and CUDA usually are."""

SHOWN = 20_000
"""Characters of a command's output that are kept: the last."""

ROWS = ("--mode", "all", "--samples", "8", "--max-tokens", "96")
"""What a parity run scores."""

ROOM = 1.5
"""How much farther from eager an engine may be than its plan's references, which round every value
as the plan says; as a mean of logits. Divergence grows with the square."""

Answer = tuple[int, str, str]
"""Exit code, stdout and stderr of a command."""

RAN, FAILED, SKIPPED = "ran", "failed", "skipped"


def command(words: Sequence[str]) -> Answer:
    """Run Python with these words."""
    done = subprocess.run(  # noqa: S603 (our own commands)
        (sys.executable, *words), capture_output=True, text=True, check=False, cwd=ROOT
    )
    return done.returncode, done.stdout, done.stderr


@dataclass(slots=True)
class Host:
    """Runs steps and records them.

    Attributes:
        run: Runs a command.
        steps: What was done, in order.
        said: All that the last command wrote to stdout.
    """

    run: Callable[[Sequence[str]], Answer] = command
    steps: list[dict[str, Any]] = field(default_factory=list)
    said: str = ""

    def lingc(self, step: str, *words: str) -> dict[str, Any]:
        return self.python(step, "-m", "lingc", *words)

    def python(self, step: str, *words: str) -> dict[str, Any]:
        """Run a step; what it recorded."""
        print(f"{step}: {' '.join(words)}", flush=True)  # noqa: T201
        began = time.monotonic()
        code, out, told = self.run(words)
        self.said = out
        return self._record(
            step, FAILED if code else RAN, _reason(code, out, told), command=list(words), exit=code,
            seconds=round(time.monotonic() - began, 2), stdout=out[-SHOWN:], stderr=told[-SHOWN:],
        )  # fmt: skip

    def skip(self, step: str, why: str) -> dict[str, Any]:
        return self._record(step, SKIPPED, why)

    def judge(self, step: str, problem: str) -> dict[str, Any]:
        """Record what a comparison found; no text where nothing is wrong."""
        return self._record(step, FAILED if problem else RAN, problem)

    def _record(self, step: str, result: str, why: str, **more: Any) -> dict[str, Any]:
        self.steps.append({"step": step, "result": result, "why": why, **more})
        print(f"  {result}{': ' if why else ''}{why}", flush=True)  # noqa: T201
        return self.steps[-1]


def main(argv: Sequence[str] | None = None, *, host: Host | None = None) -> int:
    """Exit status: 0 if no step failed, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", required=True, help="one that this GPU is: see lingc targets")
    parser.add_argument("--precision", default="bf16,fp8,int4-all", help="recipes, by commas")
    parser.add_argument("--engine", default="tensorrt", help="kind of engine")
    parser.add_argument("--checkpoint", type=Path, default=LING_TINY)
    parser.add_argument(
        "--include", type=Path, action="append", help="headers of TensorRT or CUDA; several"
    )
    parser.add_argument("--folder", type=Path, default=Path("tensorrt-host"), help="for engines")
    parser.add_argument("-o", "--output", type=Path, default=Path("tensorrt-host.json"))
    given = parser.parse_args(argv)
    given.folder.mkdir(parents=True, exist_ok=True)
    # Commands run in the checkout.
    given.folder, given.checkpoint = given.folder.resolve(), given.checkpoint.resolve()
    given.include = [one.resolve() for one in given.include or map(Path, INCLUDES)]
    host = host or Host()
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "target": given.target,
        "engine": given.engine,
        "machine": {"os": platform.platform(), "python": platform.python_version()},
        "libraries": {name: found for name in LIBRARIES if (found := _version(name))},
        "steps": host.steps,
    }
    parts: list[Callable[[], None]] = [lambda: _doctor(host)]
    parts += [partial(_engine, host, given, one) for one in given.precision.split(",")]
    parts += [lambda: _enqueue(host), lambda: _converters(host, given)]
    for part in parts:
        part()
        given.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    counts = {
        result: sum(step["result"] == result for step in host.steps)
        for result in (RAN, FAILED, SKIPPED)
    }
    told = ", ".join(f"{count} {result}" for result, count in counts.items())
    print(f"{told}; see {given.output}")  # noqa: T201
    return int(bool(counts[FAILED]))


def _doctor(host: Host) -> None:
    host.lingc("doctor", "doctor")


# -------------------------------------------------------------------------------------- one engine


def _engine(host: Host, given: argparse.Namespace, precision: str) -> None:
    """Everything that is done with a recipe's engine."""
    package = given.folder / f"{given.target}-{precision}.ling"
    built = host.lingc(
        f"{precision}: build", "build", str(given.checkpoint), "--target", given.target,
        "--engine", given.engine, "--precision", precision, "--overwrite", "-o", str(package),
    )  # fmt: skip
    if built["result"] == FAILED:
        host.skip(f"{precision}: all else", "the engine was not built")
        return
    host.lingc(f"{precision}: verify", "verify", str(package))
    host.lingc(
        f"{precision}: run", "run", str(package), "--prompt", "Once upon a time", "--max-tokens",
        "64", "--json",
    )  # fmt: skip
    _parity(host, given, precision, package)
    if given.engine == "tensorrt":
        host.lingc(f"{precision}: layers", "inspect", str(package), "--layers", "--json")
        _native(host, given, precision, package)


def _parity(host: Host, given: argparse.Namespace, precision: str, package: Path) -> None:
    """Hold the engine to eager as near as its plan's references are, with some room."""
    eager = str(given.checkpoint)
    measured = host.lingc(
        f"{precision}: references", "parity", eager, f"interpret:{package}", "--budget",
        "quantized", *ROWS, "--json",
    )  # fmt: skip
    step = f"{precision}: parity"
    if measured["result"] == FAILED:
        host.skip(step, "what the plan's references do is not known, so there is no budget")
        return
    limits = budget(precision, json.loads(host.said))
    path = given.folder / f"{given.target}-{precision}-budget.json"
    path.write_text(json.dumps(limits, indent=1) + "\n", encoding="utf-8")
    found = host.lingc(step, "parity", eager, str(package), "--budget", str(path), *ROWS, "--json")
    found["budget"] = limits


def budget(precision: str, measured: dict[str, Any]) -> dict[str, Any]:
    """Limits of a recipe, from how far its plan's references are from eager in any mode."""
    modes = measured["modes"]
    return {
        "name": f"references-{precision}",
        "summary": f"no more than {ROOM} times as far from eager as the plan's references",
        "mean_abs": ROOM * max(mode["mean_abs"] for mode in modes),
        "mean_kl": ROOM**2 * max(mode["mean_kl"] for mode in modes),
        "top5_agreement": max(0.0, min(mode["top5_agreement"] for mode in modes) - 0.02),
    }


def _native(host: Host, given: argparse.Namespace, precision: str, package: Path) -> None:
    """The same rows by Python's plugins and by the compiled ones."""
    folder = given.folder / f"{given.target}-{precision}-deployed"
    includes = [one for one in given.include if one.is_dir()]
    has_headers = any((one / "NvInfer.h").is_file() for one in includes)
    words = [word for one in includes if has_headers for word in ("--include", str(one))]
    deployed = host.lingc(
        f"{precision}: deploy", "deploy", str(package), "-o", str(folder), "--overwrite", *words
    )
    made = {}
    for kind, more in (("python", ()), ("native", ("--plugins", str(folder)))):
        step = f"{precision}: {kind} logits"
        path = given.folder / f"{given.target}-{precision}-{kind}.npz"
        if kind == "native" and deployed["result"] == FAILED:
            host.skip(step, "the plugins were not deployed")
        elif kind == "native" and not has_headers:
            host.skip(step, "NvInfer.h is in no folder of --include, so plugins are not compiled")
        else:
            done = host.python(step, str(STEPS), "logits", str(package), "-o", str(path), *more)
            if done["result"] == RAN:
                made[kind] = path
    step = f"{precision}: same bits"
    if len(made) == 2:
        host.judge(step, apart(made["python"], made["native"]))
    else:
        host.skip(step, "there are not both logits")


def apart(one: Path, other: Path) -> str:
    """Where two records of logits differ; no text where they do not."""
    with np.load(one) as a, np.load(other) as b:
        if a.files != b.files:
            return f"{one.name} has {a.files}, {other.name} has {b.files}"
        for name in a.files:
            x, y = a[name], b[name]
            if x.shape != y.shape:
                return f"{name}: shapes {list(x.shape)} and {list(y.shape)}"
            if x.tobytes() != y.tobytes():
                return f"{name}: {int((x != y).sum())} of {x.size} logits differ"
    return ""


# -------------------------------------------------------------------------------- not of an engine


def _enqueue(host: Host) -> None:
    """Each plugin's launches on this GPU outside TensorRT, as the tests have it."""
    folder = ROOT / "tests" / "tensorrt"
    if not folder.is_dir() or find_spec("pytest") is None:
        host.skip("enqueue", "this needs a checkout and pip install 'lingc[dev]'")
        return
    files = [str(folder / name) for name in ("test_enqueue.py", "test_native_enqueue.py")]
    host.python("enqueue", "-m", "pytest", "-q", "--require", "gpu", *files)


def _converters(host: Host, given: argparse.Namespace) -> None:
    for name in ("tensorrt", "torch_tensorrt"):
        if find_spec(name) is None:
            host.skip("converters", f"{name!r} is not installed: pip install torch-tensorrt")
            return
    host.python("converters", str(STEPS), "converters", "--target", given.target)


def _reason(code: int, out: str, told: str) -> str:
    """What a command that failed says last; of ours, the sentence that names the thing."""
    if not code:
        return ""
    lines = [one.strip() for one in (told or out).splitlines() if one.strip()]
    own = [one for one in lines if one.startswith("lingc ") and ": " in one]
    said = (own or lines or [""])[-1]
    return f"exit {code}{': ' if said else ''}{said}"[:600]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
