"""The runtime starts at once and without a compiler."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys, time
started = time.process_time()
import {module}
took = time.process_time() - started
heavy = [m for m in ("torch", "triton", "onnx", "onnxruntime") if m in sys.modules]
print(json.dumps([took, heavy]))
"""


@pytest.mark.parametrize(
    "module",
    ["lingc.runtime", "lingc.runtime.load", "lingc.runtime.cuda_backend", "lingc.cli.run"],
)
def test_importing_it_brings_no_compiler(module: str) -> None:
    said = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(module=module)],
        check=True,
        capture_output=True,
        text=True,
    )

    assert json.loads(said.stdout)[1] == []


def test_importing_the_runtime_takes_less_than_a_third_of_a_second() -> None:
    """Time of the processor, and the best of three: the machine may be busy with other tests."""
    took = []
    for _ in range(3):
        said = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(module="lingc.runtime")],
            check=True,
            capture_output=True,
            text=True,
        )
        took.append(json.loads(said.stdout)[0])

    assert min(took) < 0.3
