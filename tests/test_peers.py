"""Kernels of other projects: called with what an op has, reported where they are absent."""

from unittest.mock import MagicMock

import pytest
import torch

from lingc.bench.peers import PEERS, Peer, time_peers
from lingc.op import OPS, Benchmark
from lingc.plugins import table  # noqa: F401 (registers the ops)

EVERY = [(name, peer.name) for name, peers in PEERS.items() for peer in peers]


@pytest.mark.parametrize(("name", "peer"), EVERY)
def test_a_peer_takes_the_arguments_of_its_op_by_their_names(name: str, peer: str) -> None:
    op = OPS[name]
    prepare = next(one.prepare for one in PEERS[name] if one.name == peer)
    module = MagicMock()
    calls = []

    for case in op.cases:
        arguments = op.inputs(*case, dtype="bf16", device="cpu")
        calls.append(prepare(module, dict(zip(op.arguments, arguments, strict=True))))

    for call in filter(None, calls):
        call()
    assert module.mock_calls or not any(calls)


def test_a_package_that_is_not_installed_is_reported_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    absent = Peer(
        name="nobody's", package="nobody", module="nobody_installs_this", prepare=lambda *_: None
    )
    monkeypatch.setattr("lingc.bench.peers.PEERS", {"quantize_fp8": (absent,)})
    benchmark = Benchmark(name="small", case=lambda tokens: (tokens, 128))

    (found,) = time_peers(OPS["quantize_fp8"], benchmark, 4, [torch.ones(4, 128)], l2_bytes=1024)

    assert found.microseconds is None
    assert found.absent == "not installed: No module named 'nobody_installs_this'"
