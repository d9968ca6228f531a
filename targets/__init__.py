"""Devices described as data, and one lowering a kind of engine."""

if __name__ != "lingc.targets":
    raise ImportError(f"import lingc.targets, not {__name__}")

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from lingc.errors import UnknownTargetError
from lingc.targets import cpu, nvidia
from lingc.targets.spec import Target

ALL: Mapping[str, Target] = MappingProxyType(
    {target.name: target for target in (*cpu.ALL, *nvidia.ALL)}
)


def get(name: str) -> Target:
    """Return the target called `name`.

    >>> get("h100-sxm").sms
    132
    >>> get("h100")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    lingc.errors.UnknownTargetError: no target is called 'h100'
    hint: did you mean 'h100-sxm'? known: cpu, h100-sxm, h20, ...
    """
    if name in ALL:
        return ALL[name]
    low = name.lower()
    # `h200` means `h200-sxm`, though `h20` is nearer by letters.
    near = [known for known in ALL if low and known.startswith(low)]
    near = near or difflib.get_close_matches(low, ALL, n=1, cutoff=0.4)
    guess = f"did you mean {near[0]!r}? " if near else ""
    raise UnknownTargetError(
        f"no target is called {name!r}", hint=f"{guess}known: {', '.join(sorted(ALL))}"
    )
