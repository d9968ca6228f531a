"""`lingc targets`: the devices that can be compiled for, and what is known of them."""

from dataclasses import asdict
from importlib.util import find_spec

import click

from lingc import targets
from lingc.cli import output
from lingc.cli.output import Output, bytes_text
from lingc.targets.spec import EngineKind, Target


@click.command(no_args_is_help=False)
@click.argument("name", required=False)
@output.options
def command(out: Output, name: str | None) -> None:
    """List the devices that can be compiled for, or describe one.

    A target is a table of facts with sources; nothing is probed, so the same target means the same
    engine on every build machine. `builds` says which engine kinds this version can build: without
    one, a target can be planned for (`lingc plan`, `lingc passes`) and not yet built for.

    \b
    Examples:
      lingc targets
      lingc targets h20
      lingc targets --json
    """  # noqa: D301 click's mark for a block that is not rewrapped
    if name is not None:
        _describe(out, targets.get(name))
        return
    if out.as_json:
        out.emit([_facts(target) for target in targets.ALL.values()])
        return
    columns = ("target", "arch", "SMs", "memory", "bandwidth", "engine kinds", "builds")
    out.table(columns, [_row(target) for target in targets.ALL.values()])
    out.note("A dash is a fact that a class of devices does not share, or that has no source.")


def is_buildable(kind: EngineKind) -> bool:
    """Whether this version of lingc has the lowering for an engine kind."""
    spec = find_spec(f"lingc.targets.{kind}")
    return spec is not None and spec.origin is not None


def _row(target: Target) -> tuple[object, ...]:
    return (
        target.name,
        target.arch,
        target.sms,
        None if target.memory_bytes is None else bytes_text(target.memory_bytes),
        _bandwidth(target),
        " ".join(target.engines),
        " ".join(kind for kind in target.engines if is_buildable(kind)) or None,
    )


def _bandwidth(target: Target) -> str | None:
    rate = target.hbm_bytes_per_s
    return None if rate is None else f"{rate / 1e12:.2f} TB/s"


def _facts(target: Target) -> dict[str, object]:
    return {
        **asdict(target),
        "default_engine": target.default_engine,
        "compute_capability": target.compute_capability,
        "buildable_engines": [kind for kind in target.engines if is_buildable(kind)],
    }


def _describe(out: Output, target: Target) -> None:
    if out.as_json:
        out.emit(_facts(target))
        return
    shared = target.smem_per_block_bytes
    rates = target.dense_flops_per_s.items()
    buildable = [kind for kind in target.engines if is_buildable(kind)]
    out.table(
        ("fact", "value"),
        [
            ("target", target.name),
            ("device", target.title),
            ("engine kinds", f"{', '.join(target.engines)} (auto: {target.default_engine})"),
            ("built by this version", ", ".join(buildable) or "none yet"),
            ("architecture", target.arch),
            ("activations", target.activations),
            ("FP8 activations", target.fp8_activations),
            ("multiprocessors", target.sms),
            ("memory", None if target.memory_bytes is None else bytes_text(target.memory_bytes)),
            ("bandwidth", _bandwidth(target)),
            ("L2 cache", None if target.l2_bytes is None else f"{target.l2_bytes >> 20} MiB"),
            ("shared memory a block", None if shared is None else f"{shared >> 10} KiB"),
            *((f"dense {dtype}", f"{rate / 1e12:.0f} TFLOP/s") for dtype, rate in rates),
        ],
    )
