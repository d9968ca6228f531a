"""Builds one engine by the C++ plugins and one by Python's, in a process that has only the former.

Run as a program, as TensorRT's registry is one of the process: reads a plan, a phase, a library and
a folder for the plugin table as JSON, and writes what was built.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt

from lingc import targets
from lingc.engine import canonical
from lingc.plan import loads
from lingc.plugin_table import to_value
from lingc.runtime import tensorrt_library, tensorrt_plugin
from lingc.targets.tensorrt import lower, report
from lingc.targets.tensorrt.backend import backend
from tests.tensorrt.engines import stand_ins


def built(made: lower.Lowering, phase: str) -> dict[str, Any]:
    """The layers of an engine, its plugins and its size."""
    network, begin = made.network(phase), len(made.backend.log.messages)
    engine = made.engine(network)
    found = report.parse([text for _, text in made.backend.log.messages[begin:]], network)
    layers = sorted([one.kind, one.op, *sorted(one.origins)] for one in found.layers)
    return {"layers": layers, "bytes": len(engine), "faults": report.faults(found, network)}


def main() -> None:
    given = json.load(sys.stdin)
    plan, phase = loads(given["plan"]), given["phase"]
    plan, target = replace(plan, programs={phase: plan.programs[phase]}), targets.get(plan.target)
    tabled = lower.tabled(plan, target, stand_ins)
    folder = Path(given["folder"])
    (folder / f"{tabled.digest}.json").write_bytes(canonical.encode(to_value(tabled.table)))
    os.environ["LINGC_PLUGINS"] = str(folder)

    tensorrt_library.mend(trt)
    library = trt.get_plugin_registry().load_library(given["library"])
    assert library is not None
    module: Any = lower
    register = module.register
    module.register = lambda *_: None  # what the parser makes plugins with is the library
    native = built(lower.Lowering(backend(target), plan, target, tabled), phase)
    assert not tensorrt_plugin._CREATORS

    trt.get_plugin_registry().deregister_library(library)
    module.register = register
    python = built(lower.Lowering(backend(target), plan, target, tabled), phase)
    assert tensorrt_plugin._CREATORS
    json.dump({"native": native, "python": python}, sys.stdout)


if __name__ == "__main__":
    main()
