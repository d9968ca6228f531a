"""Engines lie in a package without the constants that stand among its weights."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from lingc import tensorrt_code
from lingc.compile import Compiled, silent
from lingc.errors import IntegrityError
from lingc.pipeline import Report
from lingc.plan import refs
from lingc.quantize.recipes import load_recipe
from lingc.runtime import tensorrt_package
from lingc.runtime.tensorrt_backend import TensorrtBackend
from lingc.runtime.tensorrt_constants import (
    PLAIN,
    SIGNED,
    Cut,
    Hole,
    cut,
    flipped,
    holes_of,
    joined,
    to_value,
)
from lingc.runtime.tensorrt_package import read_code
from lingc.targets import get
from lingc.targets.tensorrt.timing import Timing
from tests.runtime.host_device import HostDevice
from tests.tensorrt.engines import has_rtx, networks, plan, plugins, weights
from tests.tensorrt.test_backend import LIMITS, PRECISION, TARGET, Held, code, library

RANDOM = np.random.default_rng(5)
CODES = RANDOM.integers(-(1 << 31), 1 << 31, (64, 32), dtype=np.int32)
SCALES = RANDOM.integers(0, 1 << 16, (64, 64), dtype=np.uint16)
ENGINE = b"head" + flipped(CODES, SIGNED) + b"between" + flipped(SCALES, PLAIN) + b"end"
WEIGHTS: Mapping[str, Any] = {"codes": CODES, "scales": SCALES}
CONSTANTS: Mapping[str, Any] = {"codes": (CODES, SIGNED), "scales": (SCALES, PLAIN)}


@pytest.mark.parametrize("order", [("codes", "scales"), ("scales", "codes")])
def test_what_is_cut_out_is_put_back(order: tuple[str, ...]) -> None:
    made = cut(ENGINE, {name: CONSTANTS[name] for name in order})

    assert made.rest == b"headbetweenend"
    assert [hole.weight for hole in made.holes] == ["codes", "scales"]
    assert joined("decode", made, WEIGHTS) == ENGINE
    value = to_value(made)
    assert Cut(rest=made.rest, holes=holes_of(value), sha256=value["sha256"]) == made


def test_equal_constants_are_each_cut_once() -> None:
    twice = flipped(SCALES, PLAIN)
    made = cut(b"a" + twice + b"b" + twice, {"one": (SCALES, 0), "two": (SCALES.copy(), 0)})

    assert made.rest == b"ab"
    assert [hole.weight for hole in made.holes] == ["one", "two"]


def test_what_is_small_or_otherwise_there_stays() -> None:
    small = np.ones(8, np.uint16)
    engine = ENGINE + flipped(small, PLAIN)
    made = cut(engine, {"small": (small, PLAIN), "turned": (SCALES.T, PLAIN)})

    assert (made.rest, made.holes) == (engine, ())
    assert joined("decode", made, {}) == engine


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rest": b"headbetweenEND"}, "it is not the engine that was built"),
        ({"rest": b"head"}, "weight 'scales' has no place at byte"),
        ({"holes": (Hole(at=2, weight="codes", flip=SIGNED),)}, "it is not the engine"),
        (
            {
                "holes": (
                    Hole(at=4, weight="codes", flip=SIGNED),
                    Hole(at=9, weight="scales", flip=PLAIN),
                )
            },
            "weight 'scales' has no place at byte 9",
        ),
        ({"holes": (Hole(at=4, weight="other", flip=PLAIN),)}, "weight 'other' has no place"),
        ({"holes": (Hole(at=4, weight="codes", flip=PLAIN),)}, "it is not the engine"),
    ],
)
def test_pieces_that_are_not_those_of_the_engine_are_refused(
    change: dict[str, Any], told: str
) -> None:
    made = cut(ENGINE, CONSTANTS)
    pieces = {"rest": made.rest, "holes": made.holes, "sha256": made.sha256, **change}
    with pytest.raises(IntegrityError, match="the decode engine cannot be put together") as caught:
        joined("decode", Cut(**pieces), WEIGHTS)
    assert told in caught.value.problem


def test_a_package_gives_whole_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    held: Any = Held()
    made = cut(ENGINE, CONSTANTS)
    held.files[f"variants/{TARGET}/decode.engine"] = made.rest
    held.info["constants"] = {"decode": to_value(made)}
    held.info["embedded_weights"] = ["codes", "scales"]
    held.shards = lambda: ()
    monkeypatch.setattr(tensorrt_package, "open_weights", lambda _paths: WEIGHTS)

    code = read_code(held)
    assert code.engines["decode"]() == ENGINE
    assert code.embedded == {"codes", "scales"}

    monkeypatch.setattr(tensorrt_package, "open_weights", lambda _paths: {"codes": CODES})
    with pytest.raises(IntegrityError, match="'scales' has no place"):
        read_code(held).engines["decode"]()


@pytest.mark.parametrize("holes", [[[-1, "codes", 0]], [[0, "codes", 1]], [[0.5, "codes", 0]], [7]])
def test_holes_that_are_none_are_refused_when_the_package_is_read(holes: list[Any]) -> None:
    held: Any = Held()
    held.info["constants"] = {"decode": {"sha256": "0" * 64, "holes": holes}}
    with pytest.raises(IntegrityError, match="facts of the 'spark' variant cannot be read"):
        read_code(held)


# ------------------------------------------------------------------------------ what TensorRT makes


@cache
def _made() -> tensorrt_code.Made:
    compiled = Compiled(
        plan=plan(TARGET, PRECISION), report=Report(), recipe=load_recipe(PRECISION),
        target=get(TARGET),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt_code, "_plugins", lambda *_a, **_more: plugins(TARGET, PRECISION))
        return tensorrt_code.make(
            compiled, weights(TARGET, PRECISION), timing=Timing(), cache_dir=None, stage=silent
        )


@has_rtx
def test_int4_constants_stand_in_a_package_once() -> None:
    made, programs = _made(), plan(TARGET, PRECISION).programs
    embedded, held = made.info["embedded_weights"], weights(TARGET, PRECISION)
    for phase, program in programs.items():
        value = made.info["constants"][phase]
        one = Cut(rest=made.files[f"{phase}.engine"], holes=holes_of(value), sha256=value["sha256"])
        large = {n for n in embedded if n in program.weights and held[n].nbytes >= 4096}
        assert {hole.weight for hole in one.holes} == large
        whole = joined(phase, one, held)
        assert len(whole) - len(one.rest) == sum(held[name].nbytes for name in large)
        assert int.from_bytes(whole[16:24], "little") == len(whole)


@has_rtx
def test_weights_that_engines_hold_are_not_given_to_any() -> None:
    made, wanted = _made(), plan(TARGET, PRECISION)
    embedded = set(made.info["embedded_weights"])
    for program in wanted.programs.values():
        for step in program.steps:
            if step.op != "lingc.int4_weight_linear":
                assert not embedded.intersection(refs(step.args))
    size = sum(spec.type.bytes() for name, spec in wanted.weights.items() if name not in embedded)
    assert made.info["runs_on"]["gpu"]["memory_bytes"] > size


@has_rtx
def test_a_backend_keeps_no_second_copy_of_what_engines_hold() -> None:
    _, networks_ = networks(TARGET, PRECISION)
    inside = frozenset(name for one in networks_.values() for name in one.embedded)
    device = HostDevice(capability=(12, 1))
    made = TensorrtBackend(
        replace(code(), embedded=inside), weights(TARGET, PRECISION), LIMITS, threads=1,
        device=device, trt=library(device),
    )  # fmt: skip

    assert inside
    assert {*made._weights} == {*plan(TARGET, PRECISION).weights} - inside
    made.close()
