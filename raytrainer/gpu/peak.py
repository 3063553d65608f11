"""How much a GPU can compute at most, by its name."""

from __future__ import annotations

import re

__all__ = ["peak_flops"]

# Dense TFLOP/s of tensor cores with float16, with bfloat16 (None: they have none) and with TF32, and of float32 without
# them; NVIDIA's data sheets, where figures "with sparsity" are twice these. The first row all of whose words are in the
# device's name counts: an "RTX A4000" is no A40.
_PEAKS: dict[str, tuple[float, float | None, float, float]] = {
    "GB200": (2500.0, 2500.0, 1250.0, 80.0),
    "B200": (2250.0, 2250.0, 1125.0, 75.0),
    "GH200": (989.4, 989.4, 494.7, 66.9),
    "H200": (989.4, 989.4, 494.7, 66.9),
    "H100 NVL": (835.5, 835.5, 417.5, 60.0),
    "H100 PCIe": (756.0, 756.0, 378.0, 51.2),
    "H100": (989.4, 989.4, 494.7, 66.9),
    "A100": (312.0, 312.0, 156.0, 19.5),
    "A10G": (70.0, 70.0, 35.0, 31.5),
    "A10": (125.0, 125.0, 62.5, 31.2),
    "A40": (149.7, 149.7, 74.8, 37.4),
    "L40S": (362.0, 362.0, 183.0, 91.6),
    "L40": (181.0, 181.0, 90.5, 90.5),
    "L4": (121.0, 121.0, 60.0, 30.3),
    "V100": (125.0, None, 15.7, 15.7),
    "T4": (65.0, None, 8.1, 8.1),
}

# Those whose tensor cores have no float8; others multiply twice as fast in it as in bfloat16.
_NO_FLOAT8 = {"A100", "A10G", "A10", "A40"}


def peak_flops(device_name: str, precision: str, matmul_precision: str = "highest") -> float | None:
    """Floating-point operations a second; None for a device or type that is not in the table.

    Args:
        device_name: As `torch.cuda.get_device_name` says it.
        precision: Of the run, such as "bf16-mixed" or "32-true".
        matmul_precision: `torch.get_float32_matmul_precision()`; all but "highest" use TF32.
    """
    words = set(re.split(r"[^A-Za-z0-9]+", device_name))
    peaks = next((values for name, values in _PEAKS.items() if words.issuperset(name.split())), None)
    if peaks is None or precision.startswith("64"):
        return None
    half, brain, tf32, single = peaks
    if precision == "float8":
        return None if brain is None or words & _NO_FLOAT8 else 2e12 * brain
    if precision.startswith("bf16"):
        return None if brain is None else brain * 1e12
    if precision.startswith("16"):
        return half * 1e12
    return (single if matmul_precision == "highest" else tf32) * 1e12
