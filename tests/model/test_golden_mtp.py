"""The MTP layer against golden outputs, and drafting with state rollback on the trained model."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from lingc.model import LingModel, State

if TYPE_CHECKING:
    from tests.model.conftest import Golden

MTP_LOGITS = {"tiny": 3 * 2.2e-5, "odd": 3 * 8.4e-6}
NEW_TOKENS = 64


@pytest.mark.parametrize("name", ["tiny", "odd"])
def test_mtp_logits_agree(request: pytest.FixtureRequest, name: str) -> None:
    golden: Golden = request.getfixturevalue(name)
    wanted = golden.tensors("mtp")
    for prompt in {key.partition(".")[0] for key in wanted}:
        following = wanted[f"{prompt}.next_ids"].long().unsqueeze(0)
        hidden = golden.model.forward_hidden(golden.prompts[prompt])

        logits, _ = golden.model.mtp(following, hidden)

        difference = (logits[0] - wanted[f"{prompt}.logits"]).abs().max().item()
        assert difference <= MTP_LOGITS[name], prompt


def test_chained_drafts_are_the_same_tokens_with_the_same_logits(tiny: "Golden") -> None:
    wanted = tiny.tensors("mtp_chain")
    for chain in acceptance(tiny)["chained_drafts"]:
        drafter = Drafter.start(tiny.model, tiny.prompts[chain["id"]])
        assert drafter.pending == chain["next_id"]

        drafts, logits = drafter.draft(len(chain["drafts"]))

        assert drafts == chain["drafts"]
        difference = (logits - wanted[f"{chain['id']}.logits"]).abs().max().item()
        assert difference <= MTP_LOGITS["tiny"], chain["id"]


@pytest.mark.parametrize("prompt", ["p00", "p03", "p12"])
def test_speculative_decoding_emits_the_greedy_tokens_and_accepts_as_often(
    tiny: "Golden", prompt: str
) -> None:
    found = generate(tiny, prompt, drafts=3)

    wanted = acceptance(tiny)["k3"]["per_prompt"][prompt]
    assert found.tokens == tiny.greedy()[prompt]
    assert (found.rounds, found.accepted) == (wanted["rounds"], wanted["accepted"])


@pytest.mark.long
@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_acceptance_over_all_prompts_agrees(tiny: "Golden", drafts: int) -> None:
    found = {prompt: generate(tiny, prompt, drafts=drafts) for prompt in tiny.prompts}

    wanted = acceptance(tiny)[f"k{drafts}"]
    assert {prompt: run.tokens for prompt, run in found.items()} == tiny.greedy()
    per_prompt = {p: {"rounds": r.rounds, "accepted": r.accepted} for p, r in found.items()}
    assert per_prompt == wanted["per_prompt"]
    rounds = sum(run.rounds for run in found.values())
    mean = sum(run.accepted for run in found.values()) / rounds
    assert rounds == wanted["rounds"]
    assert mean == pytest.approx(wanted["mean_accepted"], abs=1e-9)


def acceptance(tiny: "Golden") -> Any:
    return json.loads((tiny.folder / "mtp_acceptance.json").read_text(encoding="utf-8"))


@dataclass(slots=True)
class Drafter:
    """A sequence whose last token, `pending`, neither the model nor the MTP layer has seen."""

    model: LingModel
    state: State
    pending: int
    unread: Tensor  # [1, r, D]: hidden states whose MTP rows are not written yet
    following: list[int]  # the tokens after those rows

    @classmethod
    def start(cls, model: LingModel, prompt: Tensor) -> "Drafter":
        state = model.new_state(1)
        hidden = model.forward_hidden(prompt, state)
        pending = int(model.logits(hidden[0, -1]).argmax())
        return cls(model, state, pending, hidden, [*prompt[0, 1:].tolist(), pending])

    def draft(self, count: int) -> tuple[list[int], Tensor]:
        """Draft tokens, and their logits; the chained rows are dropped, the others kept."""
        logits, f = self.model.mtp(torch.tensor([self.following]), self.unread, self.state)
        chained = self.state.copy()
        rows = [logits[0, -1]]
        drafts = [int(rows[-1].argmax())]
        while len(drafts) < count:
            logits, f = self.model.mtp(torch.tensor([drafts[-1:]]), f[:, -1:], chained)
            rows.append(logits[0, -1])
            drafts.append(int(rows[-1].argmax()))
        return drafts, torch.stack(rows)

    def accept(self, drafts: list[int]) -> list[int]:
        """Verify drafts in one pass; take back what was not accepted; return the new tokens."""
        offered = [self.pending, *drafts]
        trial = self.state.copy()
        hidden = self.model.forward_hidden(torch.tensor([offered]), trial)
        wanted = self.model.logits(hidden[0]).argmax(-1).tolist()
        kept = 0
        while kept < len(drafts) and drafts[kept] == wanted[kept]:
            kept += 1
        new = wanted[: kept + 1]
        if kept == len(drafts):
            self.state = trial
            self.unread = hidden
        else:
            again = torch.tensor([offered[: kept + 1]])
            self.unread = self.model.forward_hidden(again, self.state)
        self.pending, self.following = new[-1], new
        return new


@dataclass(slots=True)
class Run:
    tokens: list[int]
    rounds: int = 0
    accepted: int = 0


def generate(tiny: "Golden", prompt: str, *, drafts: int) -> Run:
    drafter = Drafter.start(tiny.model, tiny.prompts[prompt])
    run = Run([drafter.pending])
    while len(run.tokens) < NEW_TOKENS:
        new = drafter.accept(drafter.draft(drafts)[0])
        run.tokens += new
        run.rounds += 1
        run.accepted += len(new) - 1  # the last round counts whole
    run.tokens = run.tokens[:NEW_TOKENS]
    return run
