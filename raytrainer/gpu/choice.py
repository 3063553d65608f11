"""Which GPUs to use: pure decisions over what NVML and the environment say. Indices are in PCI bus order."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence

from raytrainer.errors import ConfigurationError, ResourceError
from raytrainer.gpu.nvml import Card, Nvml

__all__ = [
    "check_present",
    "count_all",
    "describe_loads",
    "free_first",
    "index_text",
    "is_free",
    "local_ordinal",
    "require_cuda",
    "require_gpu",
    "use_pci_order",
    "visible",
]

log = logging.getLogger("raytrainer")

#: MiB in use below which a GPU without a visible process counts as free: a CUDA context alone takes more. Processes of
#: other containers cannot be seen, their memory can.
FREE_BELOW = 300.0


def use_pci_order() -> None:
    """Have CUDA count as NVML and Ray do. Has no effect in a process in which CUDA has started."""
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"


def visible(uuids: Sequence[str], shown: str | None) -> list[int]:
    """PCI indices of the GPUs that a process sees, in the order in which it counts them.

    Args:
        uuids: Of all GPUs of the machine, in PCI bus order.
        shown: CUDA_VISIBLE_DEVICES: indices or (abbreviated) UUIDs; the first that is no GPU ends the list, as for
            CUDA. None: unset.
    """
    if shown is None:
        return list(range(len(uuids)))
    found: list[int] = []
    for part in (part.strip() for part in shown.split(",")):
        if part.isdigit() and int(part) < len(uuids):
            found.append(int(part))
            continue
        named = [i for i, uuid in enumerate(uuids) if part.startswith("GPU-") and uuid.startswith(part)]
        if len(named) != 1:
            break
        found.append(named[0])
    return found


def index_text(indices: Iterable[int]) -> str:
    """E.g. "GPUs 0-3", "GPUs 0, 2-3", "GPU 1", "no GPU"."""
    spans: list[list[int]] = []
    for index in sorted(set(indices)):
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    if not spans:
        return "no GPU"
    one = len(spans) == 1 and spans[0][0] == spans[0][1]
    return f"GPU{'' if one else 's'} " + ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def check_present(chosen: Sequence[int], present: Sequence[int], where: str = "this node") -> None:
    """Refuse indices that are not there.

    Raises:
        ConfigurationError: Lists what is there, e.g. "gpus=[0, 9]: this node has GPUs 0-3 (PCI order)".
    """
    if not set(chosen) <= set(present):
        raise ConfigurationError(f"gpus={list(chosen)}: {where} has {index_text(present)} (PCI order).")


def require_gpu(gpus: object, nvml: Nvml | None) -> list[int]:
    """PCI indices of the GPUs that this process sees.

    Raises:
        ConfigurationError: There are none.
    """
    shown = [] if nvml is None else visible(nvml.uuids(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not shown:
        raise ConfigurationError(
            f"gpus={gpus!r}: this machine has no NVIDIA GPU that can be used. num_processes=2, without gpus, trains in "
            f"processes on its CPUs; address=... names a Ray cluster that has GPUs."
        )
    return shown


def require_cuda() -> None:
    """Refuse a torch that cannot use GPUs, where this process's own torch is what workers have.

    Raises:
        ConfigurationError: Says what to install.
    """
    import torch

    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        raise ConfigurationError(
            f"gpus: there are GPUs, but torch {torch.__version__} is built without CUDA. Install the build for their "
            f"driver, as https://pytorch.org/get-started says."
        )


def count_all(nvml: Nvml | None) -> int:
    """How many GPUs `gpus=-1` means for a machine without a cluster.

    Raises:
        ConfigurationError: None at all.
    """
    count = 0 if nvml is None else len(visible(nvml.uuids(), os.environ.get("CUDA_VISIBLE_DEVICES")))
    if count == 0:
        raise ConfigurationError("gpus=-1: this machine has no NVIDIA GPU that can be used; gpus=0 trains on CPUs.")
    return count


def is_free(card: Card) -> bool:
    """Whether nobody seems to use it."""
    return card.processes == 0 and card.used < FREE_BELOW


def free_first(cards: Iterable[Card]) -> list[int]:
    """Indices of the free GPUs, least loaded first."""
    return [card.index for card in sorted(filter(is_free, cards), key=lambda card: (card.used, card.index))]


def describe_loads(cards: Iterable[Card]) -> str:
    """E.g. "GPU 0 free; GPU 1: 2 process(es), 20412 of 81559 MiB"."""
    return "; ".join(
        f"GPU {c.index} free" if is_free(c) else f"GPU {c.index}: {c.processes} process(es), {c.used:.0f} of "
        f"{c.total:.0f} MiB" for c in cards
    ) or "no GPU"  # fmt: skip


def local_ordinal(gpus: int | tuple[int, ...], auto_select: bool, nvml: Nvml | None, own: Sequence[int] = ()) -> int:
    """What CUDA in the driver's own process calls the GPU that "local" trains on.

    Args:
        gpus: 1, or a tuple of one PCI index.
        auto_select: Pick one that this process uses already, and no other that can be seen; else a free one.
        nvml: This machine's GPUs.
        own: What CUDA calls those that this process uses already, and that so look taken; best first.

    Raises:
        ConfigurationError: No such GPU.
        ResourceError: No GPU is free.
    """
    shown = require_gpu(gpus, nvml)
    cards = [] if nvml is None else nvml.cards()
    if isinstance(gpus, tuple):
        check_present(gpus, shown)
        return shown.index(gpus[0])
    if not auto_select:
        return 0
    mine = next((i for i in own if i < len(shown) and cards[shown[i]].processes <= 1), None)
    if mine is not None:
        return mine
    seen = [cards[i] for i in shown]
    free = free_first(seen)
    if not free:
        raise ResourceError(f"auto_select_gpus: no GPU is free here: {describe_loads(seen)}.")
    log.info("auto_select_gpus: GPU %d (%s)", free[0], describe_loads(seen))
    return shown.index(free[0])
