"""What kernels with nothing to compute reach here: the measure of all others."""

import statistics
import time
from collections.abc import Mapping, Sequence

import torch

from lingc.device import Binary, Device, launch_all
from lingc.kernel import Kernel, Launch, Tensor

_CEILINGS = ((16, 32), (32, 64), (16, 16), (8, 16), (32, 32))
"""Warps a block and KiB that each block moves."""

LABELS = ("read", "read_16m", "copy")
"""What is measured."""


def ceiling_kernels() -> list[Kernel]:
    """Reading and copying, with nothing to compute."""
    made = []
    for entry, to in (("read_all", "*f32"), ("copy_all", "*u8")):
        for warps, kib in _CEILINGS:
            made.append(
                Kernel(
                    language="cuda",
                    source="kernels/ceiling.cu",
                    entry=entry,
                    arguments=(("from", "*u8"), ("to", to)),
                    constants=(("PIECE", kib * 1024), ("THREADS", 32 * warps)),
                    warps=warps,
                    features=("bulk",),
                )
            )
    return made


def ceilings_of(
    device: Device, binaries: Mapping[Kernel, Binary], labels: Sequence[str] = LABELS
) -> dict[str, float]:
    """Bytes a second that kernels with nothing to compute reach here, by what they do.

    `read` and `copy` move a gigabyte a launch; `read_16m` reads 16.8 MB, a projection's worth.
    A copy counts bytes read and bytes written. Only those of `labels` are measured.
    """
    whole = 1 << 30
    pool = torch.randint(256, (4 * whole,), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    found: dict[str, float] = {}
    for label, entry, size in (
        ("read", "read_all", whole),
        ("read_16m", "read_all", 16 << 20),
        ("copy", "copy_all", whole),
    ):
        if label not in labels:
            continue
        some = [kernel for kernel in ceiling_kernels() if kernel.entry == entry]
        found[label] = max(_ceiling(device, binaries, one, size, pool) for one in some)
    return found


def _ceiling(
    device: Device, binaries: Mapping[Kernel, Binary], kernel: Kernel, size: int, pool: torch.Tensor
) -> float:
    whole, copies = 1 << 30, kernel.entry == "copy_all"
    piece = dict(kernel.constants)["PIECE"]
    assert isinstance(piece, int), "a number of bytes"
    launch = Launch(
        kernel=kernel,
        grid=(size // piece, 1, 1),
        operands=(Tensor("from"), Tensor("to")),
        dependent=True,
    )
    places = min(64, 2 * whole // size)
    count = max(6, places)
    with device.recording() as graph:
        for i in range(count):
            start = pool.data_ptr() + (i % places) * size
            to = start + 2 * whole if copies else pool.data_ptr()
            launch_all(device, (launch,), binaries, {"from": start, "to": to}, first=i == 0)
    until = time.perf_counter() + 0.05  # clocks rise
    while time.perf_counter() < until:
        graph.seconds(2)
    seconds = statistics.median(graph.seconds(7)) / count
    graph.close()
    return (2 if copies else 1) * size / seconds
