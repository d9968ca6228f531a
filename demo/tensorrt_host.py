"""On a machine with a GPU: build, run, compare and time engines, and write a record to send back.

    python demo/tensorrt_host.py --target h20 --precision bf16,fp8,int4-all -o record.json

Every step is a command of lingc; what it printed, its exit code and how long it took go into the
record, failures too: a step that fails does not stop the others. Nothing is sent anywhere.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LING_TINY = ROOT / "artifacts" / "checkpoints" / "ling-tiny"
LIBRARIES = (
    "tensorrt", "tensorrt-rtx-cu13", "tensorrt-cu13", "torch-tensorrt", "torch", "triton",
    "cuda-bindings", "nvidia-cuda-nvrtc", "onnx",
)  # fmt: skip
SHOWN = 20_000
"""Characters of a command's output that are kept: the last."""


def main() -> int:
    """Exit status: 0 if every step did what it should, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", required=True, help="one that this GPU is: see lingc targets")
    parser.add_argument("--precision", default="bf16,fp8,int4-all", help="recipes, by commas")
    parser.add_argument("--engine", default="tensorrt", help="kind of engine")
    parser.add_argument("--checkpoint", type=Path, default=LING_TINY)
    parser.add_argument("--folder", type=Path, default=Path("tensorrt-host"), help="for engines")
    parser.add_argument("-o", "--output", type=Path, default=Path("tensorrt-host.json"))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "target": given.target,
        "engine": given.engine,
        "machine": {"os": platform.platform(), "python": platform.python_version()},
        "libraries": {name: found for name in LIBRARIES if (found := _version(name))},
        "steps": [],
    }
    steps = record["steps"]
    steps.append(_run("doctor"))
    for precision in given.precision.split(","):
        package = given.folder / f"{given.target}-{precision}.ling"
        built = _run(
            "build", str(given.checkpoint), "--target", given.target, "--engine", given.engine,
            "--precision", precision, "--overwrite", "-o", str(package),
        )  # fmt: skip
        steps.append(built)
        if built["exit"] == 0:
            steps += [_run(*arguments) for arguments in _proofs(package, given)]
        given.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    failed = [step for step in steps[1:] if step["exit"]]
    for step in failed:
        print(f"exit {step['exit']}: lingc {' '.join(step['command'])}")  # noqa: T201
    print(f"{len(steps) - len(failed)} of {len(steps)} steps did; see {given.output}")  # noqa: T201
    return int(bool(failed))


def _proofs(package: Path, given: argparse.Namespace) -> list[list[str]]:
    """What a built engine must do.

    The distance from eager is recorded, not judged: precisions differ, and what suits each is
    judged by tests/tensorrt. Only a logit that is not finite fails.
    """
    parity = ["parity", str(given.checkpoint), str(package), "--mode", "all", "--budget"]
    found = [
        ["verify", str(package)],
        ["run", str(package), "--prompt", "Once upon a time", "--max-tokens", "64", "--json"],
        [*parity, "quantized", "--json"],
    ]
    if given.engine == "tensorrt":
        found.append(["inspect", str(package), "--layers", "--json"])
    return found


def _run(*arguments: str) -> dict[str, Any]:
    print(f"lingc {' '.join(arguments)}", flush=True)  # noqa: T201
    began = time.monotonic()
    done = subprocess.run(  # noqa: S603 (our own command)
        (sys.executable, "-m", "lingc", *arguments),
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "command": list(arguments),
        "exit": done.returncode,
        "seconds": round(time.monotonic() - began, 2),
        "stdout": done.stdout[-SHOWN:],
        "stderr": done.stderr[-SHOWN:],
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
