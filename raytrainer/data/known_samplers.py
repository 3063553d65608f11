"""Samplers whose ways are known: torch's and torchdata's own."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import RandomSampler, SequentialSampler

__all__ = ["is_plain_batching", "is_plain_shuffle", "is_torchs"]


def is_plain_shuffle(sampler: Any) -> bool:
    """Whether it is torch's or torchdata's `RandomSampler`, over all samples once."""
    known = type(sampler) is RandomSampler or _is_torchdatas(sampler, "RandomSampler")
    return known and not sampler.replacement and sampler.num_samples == len(sampler.data_source)


def is_torchs(sampler: Any) -> bool:
    """Whether it takes all samples in their order, or shuffled, and nothing else: it keeps nothing of epochs."""
    return type(sampler) is SequentialSampler or is_plain_shuffle(sampler)


def is_plain_batching(sampler: Any) -> bool:
    """Whether it is torch's or torchdata's `BatchSampler` itself, which fills batches one after the other."""
    return type(sampler) is torch.utils.data.BatchSampler or _is_torchdatas(sampler, "BatchSampler")


def _is_torchdatas(sampler: Any, name: str) -> bool:
    kind = type(sampler)
    return kind.__name__ == name and kind.__module__.startswith("torchdata.")
