"""The `quantization_config` of compressed-tensors for any recipe.

Modules are named by patterns that match them and nothing else: layers and modules are listed,
experts are folded. So a reader needs neither the recipe nor its order of rules.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from lingc.quantize.formats import FP8_BLOCK
from lingc.quantize.recipes import Format

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(.+)")

_FORMATS = {
    "fp8_block": "float-quantized",
    "fp8_tensor": "float-quantized",
    "int4_group": "pack-quantized",
}


def compressed_config(formats: Mapping[str, Format], activations: str) -> dict[str, Any] | None:
    """What `config.json` says; None where nothing is quantized.

    Args:
        formats: Logical name of each tensor -> how it is stored.
        activations: Of the recipe.
    """
    modules: dict[Format, list[str]] = defaultdict(list)
    for name, chosen in formats.items():
        if name.endswith(".weight") and not name.endswith("norm.weight"):
            modules[chosen].append(name.removesuffix(".weight"))
    plain = modules.pop(Format(), [])
    if not modules:
        return None
    experts = 1 + max((int(found[1]) for found in map(_EXPERT.search, formats) if found), default=0)
    names = {_FORMATS[chosen.kind] for chosen in modules}
    groups = {
        f"group_{number}": _group(chosen, patterns(targets, experts), activations)
        for number, (chosen, targets) in enumerate(modules.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": names.pop() if len(names) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": groups,
        "ignore": patterns(plain, experts),
    }


def patterns(modules: Iterable[str], count: int) -> list[str]:
    """Names, and `re:` patterns of names, that match these modules and no other of the model.

    Args:
        modules: Names without `.weight`.
        count: How many experts a layer has; a pattern of all of them says so in short.
    """
    found: list[str] = []
    layers: dict[str, list[int]] = defaultdict(list)
    experts: dict[tuple[int, str], list[int]] = defaultdict(list)
    for module in modules:
        match = _LAYER.fullmatch(module)
        if match is None:
            found.append(module)
        elif inner := _EXPERT.fullmatch(match[2]):
            experts[int(match[1]), inner[2]].append(int(inner[1]))
        else:
            layers[re.escape(match[2])].append(int(match[1]))
    for (layer, leaf), numbers in experts.items():
        which = r"\d+" if len(numbers) == count else _any(numbers)
        layers[rf"mlp\.experts\.{which}\.{re.escape(leaf)}"].append(layer)
    found += [rf"re:model\.layers\.{_any(numbers)}\.{rest}$" for rest, numbers in layers.items()]
    return found


def _any(numbers: Iterable[int]) -> str:
    """A pattern of some numbers: `(?:1|2|3)`."""
    ordered = sorted(set(numbers))
    if len(ordered) == 1:
        return str(ordered[0])
    return f"(?:{'|'.join(map(str, ordered))})"


def _group(chosen: Format, targets: list[str], activations: str) -> dict[str, Any]:
    is_fp8 = chosen.kind != "int4_group"
    inputs = None
    if is_fp8 and activations == "fp8_static":
        inputs = _arguments(8, "float", "tensor")
    elif is_fp8 and activations == "fp8":
        inputs = _arguments(8, "float", "group", group_size=FP8_BLOCK, dynamic=True)
    if chosen.kind == "fp8_block":
        weights = _arguments(8, "float", "block", block_structure=[FP8_BLOCK, FP8_BLOCK])
    elif chosen.kind == "fp8_tensor":
        weights = _arguments(8, "float", "tensor")
    else:
        weights = _arguments(4, "int", "group", group_size=chosen.group)
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": _FORMATS[chosen.kind],
    }


def _arguments(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": strategy,
        "group_size": None,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": None if more.get("dynamic") else "minmax",
        "observer_kwargs": {},
        **more,
    }
