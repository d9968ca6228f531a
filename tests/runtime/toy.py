"""A backend in a page of NumPy with the state rules of the real ones.

The model is arithmetic modulo a prime, so every wrong bit of state shows in the tokens:

    s[t] = 31 s[t-1] + e(x[t])           linear state, order matters
    c[t] = hash(x[t], t)                 what the latent cache holds for position t
    a[t] = sum of w(i) c[i], 1 <= i <= t read back through the page table
    logits[t] = table of (s[t], a[t])

The draft layer predicts (s, a) of the next token exactly from hidden[t] = (s[t], a[t]) and x[t+1],
using only its own cache; where `is_off` says so its logits are spoilt. So with no spoiling every
draft must be accepted, unless a row of its cache, a position or a hidden state is wrong.

State starts poisoned, and every call is checked against the rules of the phases.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from lingc.plan import Plan, Program, TensorType
from lingc.runtime.backend import Array, Limits, SlotState

PRIME = 1_000_003  # below 2**24: exact in float32
VOCAB = 24
POISON = 777_777
Ints = NDArray[np.int64]

_PACKED = ("token_ids", "positions", "offsets", "slots", "cache_rows", "page_table")
INPUTS = {
    "prefill": (*_PACKED, "logit_rows"),
    "decode": (*_PACKED, "accepted"),
    "verify": (*_PACKED, "accepted"),
    "draft": (
        "token_ids", "hidden", "positions", "offsets", "cache_rows", "page_table", "logit_rows",
    ),
}  # fmt: skip


def plan(
    *, page_size: int = 4, max_draft: int = 3, has_draft: bool = True, context: int = 4096
) -> Plan:
    phases = [phase for phase in INPUTS if has_draft or phase != "draft"]
    return Plan(
        config={"vocab_size": VOCAB, "max_position_embeddings": context},
        precision="toy",
        target="cpu",
        activation="f32",
        page_size=page_size,
        max_draft=max_draft,
        states={
            "linear_state.0": TensorType("i64", ("S",)),
            "pending_k.0": TensorType("i64", ("S", max_draft + 1)),
            "latent_cache.1": TensorType("i64", ("R",)),
            "latent_cache.2": TensorType("i64", ("R",)),
        },
        weights={},
        programs={
            phase: Program(
                inputs=INPUTS[phase],
                states=(),
                outputs={"logits": "logits", "hidden": "hidden"},
                updates={},
                weights=(),
                types={},
                steps=(),
            )
            for phase in phases
        },
    )


def embed(token: Array | int) -> Ints:
    return np.asarray((np.asarray(token, np.int64) * 7919 + 13) % PRIME)


def latent(token: Array | int, position: Array | int) -> Ints:
    mixed = np.asarray(token, np.int64) * 104_729 + np.asarray(position, np.int64) * 1299
    return np.asarray((mixed + 5) % PRIME)


def logits_of(hidden: Array, *, scale: float = 4.0) -> NDArray[np.float32]:
    """[T, 2] to [T, VOCAB]."""
    mixed = hidden.astype(np.int64) @ np.array([[48_271], [69_621]]) % PRIME  # [T, 1]
    noise = (mixed * np.arange(3, 3 + VOCAB) ** 5 + mixed**2 % PRIME) % PRIME
    return np.asarray(noise / PRIME * scale, np.float32)


def expected_logits(tokens: list[int]) -> NDArray[np.float32]:
    """Logits after the tokens, from the definition: no slot, no page, no phase."""
    s = a = 0
    for position, token in enumerate(tokens):
        s = (31 * s + int(embed(token))) % PRIME
        if position:
            a = (a + (position % 97 + 1) * int(latent(token, position))) % PRIME
    return np.asarray(logits_of(np.array([[s, a]]))[0])


def expected_greedy(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(expected_logits(tokens).argmax()))
    return tokens[len(prompt) :]


class ToyBackend:
    """Implements `lingc.runtime.backend.Backend`.

    Args:
        is_off: Whether the draft layer's logits are spoilt for a hidden state (s, a).
        draft_scale: Of the draft layer's logits, to make its distribution another one.
    """

    def __init__(
        self,
        limits: Limits,
        toy_plan: Plan | None = None,
        *,
        is_off: Callable[[int, int], bool] = lambda _s, _a: False,
        draft_scale: float = 4.0,
    ) -> None:
        self.plan = plan() if toy_plan is None else toy_plan
        self.limits = limits
        self.is_off = is_off
        self.draft_scale = draft_scale
        self.calls: list[tuple[str, int]] = []
        """Phase and number of tokens of each call."""
        rows = limits.pages * self.plan.page_size + 1
        self._state = np.full(limits.slots + 1, POISON, np.int64)
        self._pending = np.full((limits.slots + 1, self.plan.max_draft + 1), POISON, np.int64)
        self._cache = np.full(rows, POISON, np.int64)
        self._draft_cache = np.full(rows, POISON, np.int64)

    def run(self, phase: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        assert tuple(inputs) == self.plan.programs[phase].inputs
        self._check(phase, inputs)
        self.calls.append((phase, len(inputs["token_ids"])))
        return {
            "prefill": self._prefill,
            "decode": self._decode,
            "verify": self._verify,
            "draft": self._draft,
        }[phase](inputs)

    def state(self, name: str) -> Array:
        return {
            "linear_state.0": self._state,
            "pending_k.0": self._pending,
            "latent_cache.1": self._cache,
            "latent_cache.2": self._draft_cache,
        }[name]

    def save_slot(self, slot: int) -> SlotState:
        names = ("linear_state.0", "pending_k.0")
        return {name: self.state(name)[slot].copy() for name in names}

    def load_slot(self, slot: int, saved: SlotState) -> None:
        for name, value in saved.items():
            self.state(name)[slot] = value

    def save_rows(self, rows: Array) -> SlotState:
        return {name: self.state(name)[rows] for name in ("latent_cache.1", "latent_cache.2")}

    def load_rows(self, rows: Array, saved: SlotState) -> None:
        for name, value in saved.items():
            self.state(name)[rows] = value

    def close(self) -> None:
        self._cache = self._draft_cache = np.empty(0, np.int64)

    def _prefill(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        states = []
        for _b, slot, tokens, start in self._sequences(inputs):
            s = 0 if start == 0 else int(self._state[slot])
            for token in tokens:
                s = (31 * s + int(embed(token))) % PRIME
                states.append(s)
            self._state[slot] = s
        hidden = self._hidden(inputs, np.array(states))
        return {"logits": logits_of(hidden[inputs["logit_rows"]]), "hidden": hidden}

    def _decode(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        for b, slot, tokens, start in self._sequences(inputs):
            before = self._commit(slot, int(inputs["accepted"][b]), start)
            self._state[slot] = (31 * before + int(embed(tokens[0]))) % PRIME
        hidden = self._hidden(inputs, self._state[inputs["slots"]])
        return {"logits": logits_of(hidden), "hidden": hidden}

    def _verify(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        states = []
        for b, slot, tokens, start in self._sequences(inputs):
            s = self._state[slot] = self._commit(slot, int(inputs["accepted"][b]), start)
            self._pending[slot] = POISON
            self._pending[slot, : len(tokens)] = embed(tokens)
            for token in tokens:
                s = (31 * s + int(embed(token))) % PRIME
                states.append(s)
        hidden = self._hidden(inputs, np.array(states))
        return {"logits": logits_of(hidden), "hidden": hidden}

    def _draft(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        tokens, positions = inputs["token_ids"], inputs["positions"]
        self._draft_cache[inputs["cache_rows"]] = latent(tokens, positions + 1)
        given = inputs["hidden"].astype(np.int64)
        sums = []
        for t, b in enumerate(_owners(inputs["offsets"])):
            past = np.arange(int(positions[t]) + 1)
            rows = self._rows(inputs["page_table"][b], past)
            sums.append(int(((past + 1) % 97 + 1) @ self._draft_cache[rows]) % PRIME)
        s = (31 * given[:, 0] + embed(tokens)) % PRIME
        hidden = np.stack([s, np.array(sums)], 1).astype(np.float32)
        rows = inputs["logit_rows"]
        logits = logits_of(hidden[rows], scale=self.draft_scale)
        for row, logit in zip(rows, logits, strict=True):
            if self.is_off(*hidden[row].astype(int)):
                logit[:] = np.roll(logit, 1)
        return {"logits": logits, "hidden": hidden}

    def _commit(self, slot: int, accepted: int, start: int) -> int:
        s = 0 if start == 0 else int(self._state[slot])
        for value in self._pending[slot, :accepted]:
            assert value != POISON, "a token is committed that was never pending"
            s = (31 * s + int(value)) % PRIME
        return s

    def _hidden(self, inputs: Mapping[str, Array], states: Ints) -> NDArray[np.float32]:
        positions = inputs["positions"]
        self._cache[inputs["cache_rows"]] = latent(inputs["token_ids"], positions)
        sums = []
        for t, b in enumerate(_owners(inputs["offsets"])):
            past = np.arange(1, int(positions[t]) + 1)
            rows = self._rows(inputs["page_table"][b], past)
            sums.append(int((past % 97 + 1) @ self._cache[rows]) % PRIME)
        return np.stack([states, np.array(sums)], 1).astype(np.float32)

    def _rows(self, pages: Array, positions: Ints) -> Ints:
        size = self.plan.page_size
        rows: Ints = pages[positions // size] * size + positions % size
        return rows

    def _sequences(self, inputs: Mapping[str, Array]) -> list[tuple[int, int, Array, int]]:
        offsets = inputs["offsets"]
        return [
            (b, int(slot), inputs["token_ids"][start:stop], int(inputs["positions"][start]))
            for b, (slot, start, stop) in enumerate(
                zip(inputs["slots"], offsets, offsets[1:], strict=False)
            )
        ]

    def _check(self, phase: str, inputs: Mapping[str, Array]) -> None:
        """The rules that every phase's inputs keep."""
        for name, value in inputs.items():
            assert value.dtype == (np.float32 if name == "hidden" else np.int32), name
        tokens, positions, offsets = (inputs[n] for n in ("token_ids", "positions", "offsets"))
        counts = np.diff(offsets)
        assert offsets[0] == 0
        assert offsets[-1] == len(tokens) == len(positions)
        assert (counts > 0).all()
        steps = np.diff(positions)
        same = np.diff(_owners(offsets)) == 0
        last = self.limits.pages * self.plan.page_size - 1
        at_end = (positions[1:] == last) & (inputs["cache_rows"][1:] < 0)
        assert ((steps == 1) | at_end)[same].all(), "positions of a sequence are consecutive"
        assert (positions <= last).all(), "positions that no page could hold"
        assert ((tokens >= 0) & (tokens < VOCAB)).all()
        rows = inputs["cache_rows"]
        kept = rows[rows >= 0]
        assert len(set(kept.tolist())) == len(kept), "two tokens write one row"
        table = inputs["page_table"]
        assert table.shape[0] == len(counts)
        named = [
            self._rows(table[b], positions[t : t + 1])[0] for t, b in enumerate(_owners(offsets))
        ]
        assert all(row in (-1, name) for row, name in zip(rows, named, strict=True))
        if "slots" in inputs:
            slots = inputs["slots"]
            assert len(set(slots.tolist())) == len(slots)
            assert ((slots >= 0) & (slots < self.limits.slots)).all()
        if phase == "decode":
            assert (counts == 1).all()
        if phase == "verify":
            assert (counts == counts[0]).all()
            assert counts[0] <= self.plan.max_draft + 1
        if phase == "draft":
            assert len(inputs["hidden"]) == len(tokens)


def _owners(offsets: Array) -> Ints:
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
