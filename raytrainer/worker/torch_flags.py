"""Process-wide switches of torch that a run asks for, and their undoing."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from raytrainer.plan.settings import Settings

__all__ = ["apply_flags"]


def apply_flags(settings: Settings) -> Callable[[], None]:
    """Set determinism, cuDNN benchmarking, matmul precision and anomaly detection; return what puts them back."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    anomaly = torch.is_anomaly_enabled()
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")

    if settings.deterministic:
        # cuBLAS reads this when its handle is made, which is after this point
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=settings.deterministic == "warn")
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
    if settings.benchmark is not None:
        torch.backends.cudnn.benchmark = settings.benchmark
    matmul = settings.float32_matmul_precision
    matmul_before = None if matmul is None else torch.get_float32_matmul_precision()
    if matmul is not None:
        torch.set_float32_matmul_precision(matmul)
    if settings.detect_anomaly:
        torch.autograd.set_detect_anomaly(True)
        if settings.sharding is not None:
            from raytrainer.private.dtensor_private import find_anomalies_in_parts  # which imports much

            find_anomalies_in_parts()

    def undo() -> None:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = cudnn
        torch.autograd.set_detect_anomaly(anomaly)
        if matmul_before is not None:
            torch.set_float32_matmul_precision(matmul_before)
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)

    return undo
