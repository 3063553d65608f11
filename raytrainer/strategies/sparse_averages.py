"""Sparse gradients, averaged over workers: their rows are gathered, by collectives of dense tensors.

gloo's own sum of sparse tensors damages memory (torch 2.13). Each of a group's two threads notes the name of what it
has done last, and no lock keeps them apart. A name of up to 15 letters fits into the note itself; that of a sparse sum
is longer, so it lies elsewhere, and one thread frees it while the other one writes its own name there.
"""
# without `annotations` from `__future__`: DDP compares those of `hook` with types

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]

__all__ = ["averaged", "sparse_too"]

Hook = Callable[[Any, GradBucket], torch.futures.Future[Tensor]]


def averaged(gradient: Tensor | None, like: Tensor, group: Any) -> Tensor:
    """The mean of all workers' gradients, coalesced. All must call it together.

    Args:
        gradient: This worker's; None: it has none, which counts as zeros.
        like: The parameter.
        group: Their gloo group. What is on a GPU is sent by the default one.
    """
    own = torch.zeros(2, dtype=torch.int64)  # entries, and dimensions that they are indexed by
    if gradient is not None:
        gradient = gradient.coalesce()
        own[0], own[1] = gradient.indices().shape[1], gradient.sparse_dim()
    workers = dist.get_world_size(group)
    sizes = torch.zeros(workers, 2, dtype=torch.int64)
    dist.all_gather(list(sizes.unbind()), own, group=group)
    counts, dims = sizes[:, 0].tolist(), int(sizes[:, 1].max())
    if gradient is None:
        indices = torch.empty((0, dims), dtype=torch.int64, device=like.device)
        values = like.new_empty((0, *like.shape[dims:]))
    else:
        indices, values = gradient.indices().T, gradient.values()
    if any(counts):
        indices, values = _gathered(indices, counts), _gathered(values, counts)
    return torch.sparse_coo_tensor(indices.T, values / workers, like.shape, check_invariants=False).coalesce()


def _gathered(part: Tensor, counts: list[int]) -> Tensor:
    """Every worker's entries, one after another; sent padded to the longest."""
    missing = part.new_zeros((max(counts) - part.shape[0], *part.shape[1:]))
    padded = torch.cat([part, missing])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def sparse_too(dense: Hook, control: Any) -> Hook:
    """What DDP averages a bucket by: `dense`, or, where it is a sparse gradient, the above, by the group `control`."""

    def hook(state: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        gradient = bucket.buffer()
        if not gradient.is_sparse:
            return dense(state, bucket)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(averaged(gradient, gradient, control))
        return done

    return hook
