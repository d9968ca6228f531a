"""What the headers of weight shards say, held against a plan."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lingc.checkpoint.tensorfile import TAGS, read_header
from lingc.errors import CheckpointError
from lingc.plan import WeightSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """One weight, or shard, that is not as the plan says."""

    subject: str
    expected: str
    found: str

    def sentence(self) -> str:
        return f"{self.subject}: expected {self.expected}, found {self.found}"


def disagreements(
    specs: Mapping[str, WeightSpec], shards: Sequence[Path]
) -> Iterator[Disagreement]:
    """Every weight that is missing, extra, stored twice, or of another type or shape."""
    seen: dict[str, str] = {}
    for shard in shards:
        try:
            stored = read_header(shard)
        except CheckpointError as error:
            found = error.problem
            yield Disagreement(subject=shard.name, expected="a safetensors file", found=found)
            continue
        for name, tensor in stored.items():
            found = f"{tensor.dtype} {list(tensor.shape)}"
            spec = specs.get(name)
            if name in seen:
                expected = f"it in {seen[name]!r} alone"
                yield Disagreement(subject=repr(name), expected=expected, found=repr(shard.name))
            elif spec is None:
                found_in = f"it in {shard.name!r}"
                yield Disagreement(subject=repr(name), expected="no such weight", found=found_in)
            elif found != _expected(spec):
                yield Disagreement(subject=repr(name), expected=_expected(spec), found=found)
            seen[name] = shard.name
    for name in sorted(specs.keys() - seen.keys()):
        expected = _expected(specs[name])
        yield Disagreement(subject=repr(name), expected=expected, found="nothing")


def _expected(spec: WeightSpec) -> str:
    return f"{TAGS[spec.type.dtype]} {list(spec.type.shape)}"
