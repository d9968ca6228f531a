"""Recipes: what each built-in one stores how, and how a wrong one is refused."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lingc.checkpoint import matrix_modules
from lingc.errors import RecipeError, UnknownPrecisionError
from lingc.model.config import ModelConfig
from lingc.quantize.recipes import Format, built_in, load_recipe, parse_recipe

LING_TINY = Path(__file__).parents[2] / "artifacts/checkpoints/ling-tiny"

GOOD: dict[str, Any] = {
    "name": "mine",
    "summary": "mine",
    "activations": "plain",
    "rules": [
        {"modules": ["lm_head"], "format": "fp8_block"},
        {"modules": ["*.experts.*"], "format": "int4_group", "group": 64, "optional": True},
    ],
}


@pytest.fixture(scope="module")
def modules() -> tuple[str, ...]:
    return matrix_modules(ModelConfig.from_file(LING_TINY))


def _rule(**changes: Any) -> dict[str, Any]:
    return {**GOOD, "rules": [{**GOOD["rules"][0], **changes}]}


# --------------------------------------------------------------------------------------- built in


def test_the_built_in_recipes_are_those_of_the_design() -> None:
    assert built_in() == ("bf16", "fp8", "fp8-max", "fp8-static", "int4", "int4-all", "int4-fp8")
    assert {load_recipe(name).activations for name in ("bf16", "int4", "int4-all")} == {"plain"}
    assert {load_recipe(name).activations for name in ("fp8", "fp8-max", "int4-fp8")} == {"fp8"}


@pytest.mark.parametrize("name", built_in())
def test_a_built_in_recipe_says_its_name_and_fits_the_model(
    name: str, modules: tuple[str, ...]
) -> None:
    recipe = load_recipe(name)
    recipe.check_matches(modules)

    assert recipe.name == name
    assert recipe.summary
    assert all(any(rule.matches(module) for module in modules) for rule in recipe.rules)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("bf16", {}),
        ("fp8", {"fp8_block": 433}),
        ("fp8-max", {"fp8_block": 433 + 1 + 3 * 3}),
        ("fp8-static", {"fp8_tensor": 433}),
        ("int4", {"int4_group(32)": 384}),
        ("int4-fp8", {"int4_group(128)": 408, "fp8_block": 25}),
        ("int4-all", {"int4_group(128)": 434}),
    ],
)
def test_a_built_in_recipe_quantizes_so_many_matrices_of_ling_tiny(
    name: str, counts: dict[str, int], modules: tuple[str, ...]
) -> None:
    """433 is what the FP8 release's layout has; the INT4 release leaves the MTP layer out."""
    recipe = load_recipe(name)

    found = Counter(str(recipe.format_of(module)) for module in modules)

    assert {kind: count for kind, count in found.items() if kind != "plain"} == counts


@pytest.mark.parametrize("name", built_in())
@pytest.mark.parametrize(
    "module",
    [
        "model.word_embeddings",
        "model.layers.1.mlp.gate",
        "model.layers.3.attention.kv_b_proj",
    ],
)
def test_embedding_router_and_absorbed_projection_are_never_quantized(
    name: str, module: str
) -> None:
    assert load_recipe(name).format_of(module).kind == "plain"


@pytest.mark.parametrize("name", built_in())
def test_a_built_in_recipe_fits_a_model_that_lacks_every_optional_part(name: str) -> None:
    raw = {
        **ModelConfig.from_file(LING_TINY).raw,
        "layer_group_size": 1,
        "q_lora_rank": None,
        "first_k_dense_replace": 8,
        "num_shared_experts": 0,
        "num_nextn_predict_layers": 0,
    }

    load_recipe(name).check_matches(matrix_modules(ModelConfig.from_dict(raw)))


def test_the_first_rule_that_matches_decides() -> None:
    recipe = parse_recipe(
        {
            **GOOD,
            "rules": [
                {"modules": ["a.b"], "format": "plain"},
                {"modules": ["a.*"], "format": "fp8_block"},
            ],
        },
        source="x",
    )

    assert recipe.format_of("a.b") == Format()
    assert recipe.format_of("a.c") == Format(kind="fp8_block")
    assert recipe.format_of("b") == Format()


def test_experts_may_be_named_by_pattern() -> None:
    recipe = load_recipe("int4")

    assert recipe.format_of("model.layers.1.mlp.experts.{e}.up_proj") == Format(
        kind="int4_group", group=32
    )


# -------------------------------------------------------------------------------------- a mistake


@pytest.mark.parametrize(
    ("given", "near"), [("fp8max", "fp8-max"), ("FP8", "fp8"), ("int4_fp8", "int4-fp8")]
)
def test_an_unknown_precision_is_answered_with_the_nearest(given: str, near: str) -> None:
    with pytest.raises(UnknownPrecisionError, match=f"called '{given}'") as caught:
        load_recipe(given)
    assert caught.value.exit_code == 2
    assert f"did you mean '{near}'?" in str(caught.value.hint)


def test_nothing_is_suggested_where_nothing_is_near() -> None:
    with pytest.raises(UnknownPrecisionError, match="'zzz'") as caught:
        load_recipe("zzz")
    assert "did you mean" not in str(caught.value.hint)


def test_a_name_too_long_for_a_file_is_an_unknown_precision() -> None:
    with pytest.raises(UnknownPrecisionError, match="'zzz"):
        load_recipe("z" * 300)


def test_a_recipe_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(GOOD))

    assert load_recipe(path) == load_recipe(str(path)) == parse_recipe(GOOD, source="x")


def test_a_recipe_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gone\.json' cannot be read: No such file"):
        load_recipe(tmp_path / "gone.json")


def test_a_recipe_that_is_not_json_is_refused_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"name": }')

    with pytest.raises(RecipeError, match=r"is not JSON: .*column 10") as caught:
        load_recipe(path)
    assert "lingc recipes fp8 --json" in str(caught.value.hint)


def test_what_is_there_under_a_bare_name_is_taken_for_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").write_text(json.dumps(GOOD))
    Path("fp8").mkdir()
    Path("folder").mkdir()

    assert load_recipe("mine").name == GOOD["name"]
    assert load_recipe("fp8").name == "fp8"
    with pytest.raises(RecipeError, match="'folder' cannot be read: Is a directory"):
        load_recipe("folder")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([], "it is a list, not an object"),
        ({**GOOD, "rule": []}, "the key 'rule' is unknown"),
        ({**GOOD, "name": ""}, "name is '', not a text"),
        ({**GOOD, "summary": 1}, "summary is 1"),
        (
            {**GOOD, "activations": "int8"},
            "activations is 'int8', not one of plain, fp8, fp8_static",
        ),
        ({**GOOD, "rules": {}}, "rules is {}, not a list"),
        ({**GOOD, "rules": [1]}, "rule 1 is 1, not an object"),
        (_rule(modules="lm_head"), "rule 1: modules is 'lm_head', not a list"),
        (_rule(modules=[]), "rule 1: modules is \\[\\]"),
        (_rule(modules=["lm_head.weight"]), "without '.weight'"),
        (_rule(format="fp4"), "rule 1: format is 'fp4', not one of"),
        (_rule(format=["fp8_block"]), "rule 1: format is \\['fp8_block'\\]"),
        (_rule(group=32), "group is 32, but fp8_block has no groups"),
        (_rule(format="int4_group"), "group is 0, not a positive multiple of 8"),
        (_rule(format="int4_group", group=12), "group is 12, not a positive multiple of 8"),
        (_rule(format="int4_group", group=True), "group is True"),
        (_rule(optional=1), "optional is 1, neither true nor false"),
        (_rule(when="always"), "rule 1: the key 'when' is unknown"),
    ],
)
def test_a_malformed_recipe_is_refused(value: object, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem) as caught:
        parse_recipe(value, source="mine.json")
    assert "'mine.json'" in caught.value.problem
    assert caught.value.exit_code == 3


def test_all_problems_of_a_recipe_are_told_at_once() -> None:
    bad = {"rules": [{"modules": [], "format": "x"}, 7], "colour": "red"}

    with pytest.raises(RecipeError, match=r"5 problems") as caught:
        parse_recipe(bad, source="x")
    assert caught.value.problem.count("\n") == 5


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest(
    modules: tuple[str, ...],
) -> None:
    recipe = parse_recipe(_rule(modules=["model.layers.*.atention.dense", "lm_heads"]), source="x")

    with pytest.raises(RecipeError, match="'lm_heads' matches no module; the nearest is 'lm_head'"):
        recipe.check_matches(modules)
    with pytest.raises(RecipeError, match=r"atention\.dense' matches no module"):
        recipe.check_matches(modules)


def test_a_rule_that_an_earlier_one_leaves_nothing_is_refused(modules: tuple[str, ...]) -> None:
    rules = [
        {"modules": ["lm_*"], "format": "plain"},
        {"modules": ["lm_head"], "format": "fp8_block"},
    ]
    recipe = parse_recipe({**GOOD, "rules": rules}, source="x")

    with pytest.raises(RecipeError, match="'lm_head' matches only modules that an earlier rule"):
        recipe.check_matches(modules)


def test_an_optional_rule_may_match_nothing(modules: tuple[str, ...]) -> None:
    parse_recipe(_rule(modules=["nowhere"], optional=True), source="x").check_matches(modules)


# ------------------------------------------------------------------------------------- documents


@pytest.mark.parametrize("name", built_in())
def test_a_recipe_survives_being_written_down(name: str) -> None:
    recipe = load_recipe(name)

    assert parse_recipe(recipe.document(), source="x") == recipe


def test_a_digest_is_of_what_a_recipe_does() -> None:
    recipe = parse_recipe(GOOD, source="x")
    renamed = parse_recipe({**GOOD, "name": "other", "summary": "other"}, source="x")
    other = parse_recipe(_rule(modules=["*.dense"]), source="x")
    static = parse_recipe({**GOOD, "activations": "fp8"}, source="x")

    assert recipe.digest() == renamed.digest()
    assert len({recipe.digest(), other.digest(), static.digest()}) == 3


def test_engines_have_blocks_where_a_recipe_has_one_scale() -> None:
    """The same matrices, and inputs that are rounded on the fly."""
    static, fp8 = load_recipe("fp8-static").in_engines(), load_recipe("fp8")

    assert (static.activations, static.rules) == (fp8.activations, fp8.rules)
    assert fp8.in_engines() is fp8


def test_engines_with_static_scales_have_the_recipe_as_it_is() -> None:
    static = load_recipe("fp8-static")
    dynamic = replace(static, activations="fp8")

    assert static.in_engines(static=True) is static
    assert dynamic.in_engines(static=True) == dynamic.in_engines()
    assert {rule.format.kind for rule in dynamic.in_engines().rules} == {"fp8_block"}
