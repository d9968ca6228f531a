"""When a completion ends by its text: stop strings, and what may be shown before one is decided.

A stop string can begin in one token and end in another. Text that may be the beginning of one is
held back until it is decided.
"""

from collections.abc import Mapping
from typing import Any

from lingc.errors import ConfigError


class StopFilter:
    """Lets text through up to the first of some strings."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.has_stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that may be shown and was not yet."""
        if self.has_stopped:
            return ""
        self._held += text
        found = [(at + len(s), at) for s in self._stops if (at := self._held.find(s)) >= 0]
        if found:
            # The one that ends first, as if text came by the character, however tokens cut it.
            _, start = min(found)
            self.has_stopped = True
            shown, self._held = self._held[:start], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        shown, self._held = self._held, ""
        return shown


def stop_ids(*configs: Mapping[str, Any]) -> frozenset[int]:
    """Every end-of-turn id that `generation_config.json` and `config.json` name."""
    found: set[int] = set()
    for config in configs:
        value = config.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for item in ids:
            if not isinstance(item, int) or isinstance(item, bool):
                raise ConfigError(
                    f"eos_token_id is {value!r}, it must be a token id or a list of them"
                )
            found.add(item)
    return frozenset(found)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
