"""What `tensorrt_host.py` runs in processes of their own, for TensorRT has one registry a process.

python demo/tensorrt_steps.py logits PACKAGE -o logits.npz [--plugins FOLDER]
python demo/tensorrt_steps.py converters --target h20
"""

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROWS, LENGTH = 3, 40
"""How many rows are scored, and of how many tokens the first is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 if nothing failed, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    steps = parser.add_subparsers(dest="step", required=True)
    one = steps.add_parser("logits", help="score rows in every mode")
    one.add_argument("package", type=Path)
    one.add_argument("-o", "--output", type=Path, required=True)
    one.add_argument("--plugins", type=Path, help="folder of lingc deploy: its compiled plugins")
    two = steps.add_parser("converters", help="compile ops by Torch-TensorRT")
    two.add_argument("--target", required=True)
    two.add_argument("--device", default="cuda", help="where torch has the tensors")
    given = parser.parse_args(argv)
    if given.step == "logits":
        return logits(given.package, given.output, given.plugins)
    return converters(given.target, given.device)


def logits(package: Path, output: Path, plugins: Path | None) -> int:
    """Write what an engine says of some rows in every mode."""
    from lingc.engine import open_package  # noqa: PLC0415 (the other step needs other libraries)
    from lingc.parity.engine import EngineSide  # noqa: PLC0415
    from lingc.parity.side import MODES  # noqa: PLC0415
    from lingc.runtime.backend import Limits  # noqa: PLC0415
    from lingc.runtime.tensorrt_backend import TensorrtBackend  # noqa: PLC0415
    from lingc.weights import open_weights  # noqa: PLC0415

    opened = open_package(package)
    rows = [[(37 * t + 11 * i) % 4096 for t in range(LENGTH + 7 * i)] for i in range(ROWS)]
    limits = Limits.from_tokens(
        slots=ROWS, tokens_per_sequence=2 * LENGTH, page_size=opened.plan.page_size
    )
    held = open_weights(opened.shards())
    backend = TensorrtBackend(opened, held, limits, plugins=plugins)
    try:
        found = {
            f"{mode}.{row}": scores.logits
            for mode in MODES
            for row, scores in enumerate(EngineSide(backend, "tensorrt").score(rows, mode))
        }
    finally:
        backend.close()
    np.savez(output, **found)  # type: ignore[arg-type]
    print(json.dumps({"arrays": len(found), "plugins": "python" if plugins is None else "native"}))  # noqa: T201
    return 0


def converters(target: str, device: str) -> int:
    """Compile each op by itself, run it, and hold it to its reference: a line of JSON each."""
    from lingc.op import OPS  # noqa: PLC0415
    from lingc.targets.tensorrt.converters import register_converters  # noqa: PLC0415

    made, failed = register_converters(target), 0
    for op in OPS.values():
        told: dict[str, Any] = {"op": op.name, "result": "skipped", "why": ""}
        for arguments in _examples(op, device):
            why = made.refusal_of(op, arguments)
            if why is not None:
                told["why"] = why
                continue
            try:
                problem = _compiled(op, arguments)
            except Exception as error:  # noqa: BLE001 (what Torch-TensorRT raises is recorded)
                problem = f"{type(error).__name__}: {error}"[:600]
            told |= {"result": "failed" if problem else "ran", "why": problem or ""}
            break
        failed += told["result"] == "failed"
        print(json.dumps(told), flush=True)  # noqa: T201
    return int(bool(failed))


def _examples(op: Any, device: str) -> Iterator[Sequence[Any]]:
    """Arguments of an op: small ones, then those of the full model where a GPU holds them."""
    large = [one.case(8) for one in op.benchmarks] if device == "cuda" else []
    for case in (*op.cases, *large):
        yield op.inputs(*case, dtype="bf16", device=device)


def _compiled(op: Any, arguments: Sequence[Any]) -> str | None:
    """What is wrong with an op's results by Torch-TensorRT, or None."""
    import torch  # noqa: PLC0415

    from lingc.bench.kernels import problem_of  # noqa: PLC0415

    torch_tensorrt: Any = importlib.import_module("torch_tensorrt")
    tensors = [one for one in arguments if isinstance(one, torch.Tensor)]

    class Module(torch.nn.Module):
        def forward(self, *given: torch.Tensor) -> Any:
            held = iter(given)
            words = [next(held) if isinstance(a, torch.Tensor) else a for a in arguments]
            found = op.overload(*words)
            return (found,) if isinstance(found, torch.Tensor) else tuple(found)

    exported = torch.export.export(Module(), tuple(tensors))
    compiled = torch_tensorrt.dynamo.compile(
        exported, arg_inputs=tensors, min_block_size=1, require_full_compilation=True,
        pass_through_build_failures=True,
    )  # fmt: skip
    with torch.inference_mode():
        got = [one.cpu() for one in compiled(*tensors)]
    own = [one.cpu() if isinstance(one, torch.Tensor) else one for one in arguments]
    return problem_of(op, own, got, similar=0.0)


if __name__ == "__main__":
    sys.exit(main())
