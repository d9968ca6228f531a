"""What a plan is lowered to: valid models, the same bytes each time, no loop, no BF16 maths."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import (
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    inliner,
    shape_inference,
)

from lingc.errors import UnsupportedError, UsageError
from lingc.plan import Plan, Program, Ref, Step, TensorType, WeightSpec, dumps
from lingc.runtime.onnx_weights import initializer_from_json, load
from lingc.targets.onnx import LIBRARIES, OnnxEngine, embedded, lower
from lingc.targets.onnx.weights import LARGEST_WIDENED_BYTES
from tests.onnx.engines import packed, weights
from tests.onnx.one_op import plan_of
from tests.programs import compiled

MODELS = [("tiny", "bf16"), ("odd", "fp8"), ("whole-blocks", "int4")]
STORED = {TensorProto.BFLOAT16, TensorProto.FLOAT16}
WIDENING = {"Cast", "Gather", "Reshape"}
"""What may be done to a BF16 or FP16 weight."""


def model(engine: OnnxEngine, phase: str) -> ModelProto:
    made: ModelProto = ModelProto.FromString(engine.models[phase])
    return made


def one_matrix(rows: int = 8, *, dtype: str = "bf16", op: str = "lingc.linear") -> Plan:
    weight = WeightSpec(name="w", type=TensorType(dtype, (rows, 8)), sources=())
    types = {
        "x": TensorType("f32", ("T", 8)), "y": TensorType("f32", ("T", rows)), "w": weight.type,
    }  # fmt: skip
    program = Program(
        inputs=("x",),
        states=(),
        outputs={"hidden": "y"},
        updates={},
        weights=("w",),
        types=types,
        steps=(Step(op=op, args=(Ref("x"), Ref("w")), outputs=("y",), layer=3),),
    )
    return plan_of({"prefill": program}, {"w": weight})


def narrow_uses(model: ModelProto) -> Iterator[str]:
    """Kinds of the nodes that read a BF16 or FP16 value, functions entered."""
    functions = {(f.name, f.overload): f for f in model.functions}
    narrow = {t.name for t in model.graph.initializer if t.data_type in STORED}
    yield from _uses(model.graph.node, narrow, functions)


def _uses(
    nodes: Sequence[NodeProto], narrow: set[str], functions: dict[tuple[str, str], FunctionProto]
) -> Iterator[str]:
    for node in nodes:
        if not narrow.intersection(node.input):
            continue
        if node.domain == "lingc":
            inner = functions[node.op_type, node.overload]
            given = {f for f, name in zip(inner.input, node.input, strict=False) if name in narrow}
            yield from _uses(inner.node, given, functions)
            continue
        yield node.op_type
        if node.op_type in {"Gather", "Reshape"} and node.input[0] in narrow:
            narrow |= set(node.output)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("name", "precision"), MODELS)
def test_models_pass_the_checker(name: str, precision: str, library: str) -> None:
    engine = lower(compiled(name, precision), library=library, widen="step")
    held = packed(engine, weights(name, precision))
    made = [initializer_from_json(item) for item in engine.info["initializers"]]
    values = {item.name: load(item, held) for item in made}

    for phase, data in engine.models.items():
        onnx.checker.check_model(ModelProto.FromString(embedded(data, values)))
        assert set(engine.info["phases"][phase]) == {
            t.name for t in ModelProto.FromString(data).graph.initializer
        }


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("name", "precision"), MODELS)
def test_scales_of_norms_have_the_axis_that_is_normed_alone(
    name: str, precision: str, library: str
) -> None:
    """The standard allows no more, and ONNX Runtime's kernels for GPUs read no more."""
    engine = lower(compiled(name, precision), library=library)

    for phase in engine.models:
        graph = shape_inference.infer_shapes(
            inliner.inline_local_functions(model(engine, phase)), data_prop=True
        ).graph
        known = [*graph.value_info, *graph.input, *graph.output]
        ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in known}
        ranks |= {tensor.name: len(tensor.dims) for tensor in graph.initializer}
        scales = [one.input[1] for one in graph.node if one.op_type == "RMSNormalization"]

        assert scales
        assert {scale: ranks[scale] for scale in scales} == dict.fromkeys(scales, 1)


@pytest.mark.parametrize("widen", ["load", "step"])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("name", "precision"), MODELS)
def test_no_node_loops_and_none_computes_in_bf16(
    name: str, precision: str, library: str, widen: str
) -> None:
    engine = lower(compiled(name, precision), library=library, widen=widen)

    for phase in engine.models:
        made = model(engine, phase)
        nodes = [*made.graph.node, *(n for f in made.functions for n in f.node)]
        assert not {n.op_type for n in nodes} & {"Loop", "Scan", "If"}
        assert set(narrow_uses(made)) <= WIDENING
        domains = {n.domain for n in nodes}
        assert domains <= {"", "lingc", *(["com.microsoft"] if library == "ort" else [])}


def test_both_libraries_define_the_same_nodes() -> None:
    plan = compiled("tiny")
    graphs: list[GraphProto] = [
        model(lower(plan, library=library), "decode").graph for library in ("ort", "standard")
    ]

    first, second = ([(n.op_type, [*n.input], [*n.output]) for n in g.node] for g in graphs)

    assert first == second
    assert "decode_mixer" in {kind for kind, _, _ in first}


def test_nodes_carry_the_literals_of_the_plan() -> None:
    made = model(lower(compiled("tiny")), "decode")
    mixer = next(n for n in made.graph.node if n.op_type == "decode_mixer")

    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in mixer.attribute}

    assert attributes == {"heads": 4, "groups": 2, "eps": pytest.approx(1e-6)}


def test_models_hold_no_weight_and_one_file_could(tmp_path: Path) -> None:
    plan = compiled("tiny")
    engine = lower(plan)
    stored = sum(spec.type.bytes() for spec in plan.weights.values())
    held = packed(engine, weights("tiny", "bf16"))

    places: dict[str, tuple[int, int]] = {}
    for phase in engine.models:
        for tensor in model(engine, phase).graph.initializer:
            given = {entry.key: entry.value for entry in tensor.external_data}
            assert given["location"] == "weights.bin"
            place = int(given["offset"]), int(given["length"])
            assert places.setdefault(tensor.name, place) == place

    assert all(len(data) < stored / 4 for data in engine.models.values())
    with (tmp_path / "weights.bin").open("wb") as file:
        for item in engine.info["initializers"]:
            made = initializer_from_json(item)
            file.seek(places[made.name][0])
            file.write(load(made, held).tobytes())
    (tmp_path / "decode.onnx").write_bytes(engine.models["decode"])
    onnx.checker.check_model(str(tmp_path / "decode.onnx"))


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(dumps(compiled("tiny")))
    code = """
import hashlib, json, sys
from lingc.plan import loads
from lingc.targets.onnx import lower
engine = lower(loads(open(sys.argv[1]).read()))
print(*(hashlib.sha256(data).hexdigest() for data in engine.models.values()))
print(hashlib.sha256(json.dumps(engine.info).encode()).hexdigest())
assert "torch" not in sys.modules
"""
    digests = set()
    for seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "plan.json")],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout)

    engine = lower(compiled("tiny"))
    assert len(digests) == 1
    assert hashlib.sha256(engine.models["prefill"]).hexdigest() in digests.pop()


def test_weights_are_widened_by_size_unless_told() -> None:
    rows = LARGEST_WIDENED_BYTES // 4 // 8

    assert lower(one_matrix(rows)).info["widen"] == "load"
    assert lower(one_matrix(rows + 1)).info["widen"] == "step"
    assert lower(one_matrix(rows + 1), widen="load").info["widen"] == "load"


def test_what_cannot_be_lowered_is_named() -> None:
    with pytest.raises(UsageError, match="library is 'fast', not one of ort, standard"):
        lower(one_matrix(), library="fast")
    with pytest.raises(UsageError, match="widen is 'never', not one of auto, load, step"):
        lower(one_matrix(), widen="never")
    with pytest.raises(UnsupportedError, match="the plan has bf16 activations"):
        lower(replace(one_matrix(), activation="bf16"))
    with pytest.raises(UnsupportedError, match=r"op 'lingc\.fly' of layer 3 has no ONNX form"):
        lower(one_matrix(op="lingc.fly"))


def test_a_weight_in_two_forms_has_two_names() -> None:
    plan = one_matrix()
    program = plan.programs["prefill"]
    fetch = Step(op="lingc.embedding", args=(Ref("ids"), Ref("w"), "f32"), outputs=("e",))
    types = {
        **program.types, "ids": TensorType("i32", ("T",)), "e": TensorType("f32", ("T", 8)),
    }  # fmt: skip
    both = replace(
        program,
        inputs=("x", "ids"),
        outputs={"hidden": "y", "rows": "e"},
        types=types,
        steps=(fetch, *program.steps),
    )

    engine = lower(replace(plan, programs={"prefill": both}))

    made = {item["name"]: item["dtype"] for item in engine.info["initializers"]}
    assert made == {"w": "bf16", "w.f32": "f32"}
    assert [weight.name for weight in engine.weights] == ["w"]


def test_views_and_copies_become_standard_nodes() -> None:
    types = {
        "x": TensorType("f32", ("T", 6)),
        "ids": TensorType("i32", ("N",)),
        **{name: TensorType("f32", ("T", 6)) for name in ("a", "b", "c", "d", "e")},
    }
    x = Ref("x")
    steps = (
        Step(op="aten.slice.Tensor", args=(x, 1, 2, 1 << 62), outputs=("a",)),
        Step(op="aten.cat.default", args=((Ref("a"), x), -1), outputs=("b",)),
        Step(op="aten.reshape.default", args=(Ref("b"), (-1, 2, 5)), outputs=("c",)),
        Step(op="aten.index_select.default", args=(Ref("c"), 0, Ref("ids")), outputs=("d",)),
        Step(op="aten.add.Tensor", args=(Ref("d"), Ref("d")), outputs=("e",)),
    )
    program = Program(
        inputs=("x", "ids"), states=(), outputs={"e": "e"}, updates={}, weights=(), types=types,
        steps=steps,
    )  # fmt: skip
    made = model(lower(plan_of({"prefill": program}, {})), "prefill")
    made.graph.output[0].ClearField("type")
    given = np.arange(12, dtype=np.float32).reshape(2, 6)
    feeds = {"x": given, "ids": np.array([1, 0, 1], np.int32)}

    (got,) = onnx.reference.ReferenceEvaluator(made).run(None, feeds)

    joined = np.concatenate((given[:, 2:], given), -1).reshape(2, 2, 5)
    np.testing.assert_array_equal(got, 2 * joined[[1, 0, 1]])
    assert not made.functions


def test_decode_without_accepted_tokens_reads_no_pending_ones() -> None:
    engine = lower(compiled("tiny"))

    def reads(name: str) -> set[str]:
        functions = [f for f in model(engine, name).functions if f.name == "decode_mixer"]
        assert functions
        return {read for f in functions for node in f.node for read in node.input}

    assert {"pending_k", "pending_v", "accepted"} <= reads("decode")
    for name in ("decode_settled", "decode_one"):
        assert not {"pending_k", "pending_v", "accepted"} & reads(name)


@pytest.mark.parametrize("library", LIBRARIES)
def test_nothing_but_a_matrix_product_reads_its_scaled_factor(library: str) -> None:
    """ONNX Runtime's MatMulScaleFusion may remove the scaling while somebody else reads it."""
    engine = lower(compiled("tiny"), library=library)

    for name in engine.models:
        for function in model(engine, name).functions:
            for scaled in scalings(function):
                readers = [node.op_type for node in function.node if scaled in node.input]
                shared = "MatMul" in readers and len(readers) > 1
                assert not shared, f"{name}, {function.name}: {scaled} is read by {readers}"


def scalings(function: FunctionProto) -> Iterator[str]:
    """Results of products and quotients with one constant number."""
    numbers = {
        node.output[0]
        for node in function.node
        if node.op_type == "Constant"
        and all(onnx.numpy_helper.to_array(a.t).size == 1 for a in node.attribute)
    }
    for node in function.node:
        if node.op_type in {"Mul", "Div"} and numbers.intersection(node.input):
            yield node.output[0]
