"""A checkpoint's weights as an engine stores them: rounded, quantized and dequantized again.

An engine's error is what it computes otherwise than eager does with the same weights; what its
weights lost is another matter. So eager is given weights that went the way of the engine's. They
are made again from the checkpoint by the plan's records, and not read back from the engine: a fault
in packing them would otherwise be on both sides and be seen by nobody.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from lingc.checkpoint import Source
from lingc.checkpoint.convert import to_rounded
from lingc.errors import StageError
from lingc.model.config import ModelConfig
from lingc.plan import Plan, WeightSpec
from lingc.quantize.formats import F32
from lingc.quantize.recipes import Format


class RoundedWeights:
    """A source whose values are those that some programs of a plan compute with.

    Args:
        source: Where the weights come from.
        plan: How an engine stores them.
        phases: The programs that count; they may hold a weight in different formats.

    Raises:
        StageError: Two programs disagree on how a tensor is stored.
    """

    def __init__(self, source: Source, plan: Plan, phases: Iterable[str]) -> None:
        self._source = source
        self._formats = formats(plan, phases)

    @property
    def config(self) -> ModelConfig:
        return self._source.config

    @property
    def names(self) -> tuple[str, ...]:
        return self._source.names

    @property
    def has_mtp(self) -> bool:
        return self._source.has_mtp

    def kind(self, name: str) -> str:
        """How the source stores it; its values are rounded all the same."""
        return self._source.kind(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dense(self, name: str) -> F32:
        """The values after the way to the engine and back.

        What the source holds in the engine's very format is packed as it is, so it stays.
        """
        stored = self._formats.get(name)
        if stored is None:
            return self._source.dense(name)
        return to_rounded(self._source, name, stored.kind, stored.group)

    def plain(self, name: str) -> tuple[NDArray[Any], str]:
        return self._source.plain(name)

    def quantized(self, name: str) -> tuple[NDArray[Any], NDArray[Any], int]:
        return self._source.quantized(name)

    def input_scale(self, name: str) -> float | None:
        return self._source.input_scale(name)

    def identity(self) -> str:
        return self._source.identity()

    def tokenizer_files(self) -> tuple[Path, ...]:
        return self._source.tokenizer_files()

    def generation_config(self) -> Mapping[str, Any]:
        return self._source.generation_config()


def formats(plan: Plan, phases: Iterable[str]) -> dict[str, Format]:
    """Tensor of the checkpoint -> how the programs hold it; f32 tensors, being exact, are left out.

    Raises:
        StageError: The programs hold a tensor in two formats.
    """
    names = {name for phase in phases for name in plan.programs[phase].weights}
    found: dict[str, tuple[Format, str]] = {}
    for name in sorted(names):
        spec = plan.weights[name]
        stored = _format(spec)
        if stored is None:
            continue
        for source in _sources(spec):
            earlier, place = found.setdefault(source, (stored, name))
            if earlier != stored:
                raise StageError(
                    f"{source!r} is held as {earlier} in {place!r} and as {stored} in {name!r}",
                    hint="compare one mode at a time, so that eager has the weights of that one",
                )
    return {source: stored for source, (stored, _) in found.items()}


def _format(spec: WeightSpec) -> Format | None:
    if spec.format == "plain":
        return Format() if spec.type.dtype == "bf16" else None
    if spec.format in ("fp8_block", "fp8_tensor", "int4_group"):
        return Format(kind=spec.format, group=spec.group)
    return None


def _sources(spec: WeightSpec) -> list[str]:
    return [name for names in spec.members() for name in names]
