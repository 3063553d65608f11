"""How much a GPU can compute at most, by its name."""

from __future__ import annotations

__all__ = ["peak_flops"]

# Dense TFLOP/s of tensor cores with 16-bit floats and with TF32, and of float32 without them; NVIDIA's data sheets,
# where figures "with sparsity" are twice these. The first name that is part of the device's counts.
_PEAKS = {
    "B200": (2250.0, 1125.0, 75.0),
    "H200": (989.4, 494.7, 66.9),
    "H100 NVL": (835.5, 417.5, 60.0),
    "H100 PCIe": (756.0, 378.0, 51.2),
    "H100": (989.4, 494.7, 66.9),
    "A100": (312.0, 156.0, 19.5),
    "A10": (125.0, 62.5, 31.2),
    "A40": (149.7, 74.8, 37.4),
    "L40S": (362.0, 183.0, 91.6),
    "L40": (181.0, 90.5, 90.5),
    "L4": (121.0, 60.0, 30.3),
    "V100": (125.0, 15.7, 15.7),
    "T4": (65.0, 8.1, 8.1),
}


def peak_flops(device_name: str, precision: str, matmul_precision: str = "highest") -> float | None:
    """Floating-point operations a second; None for a device or type that is not in the table.

    Args:
        device_name: As `torch.cuda.get_device_name` says it.
        precision: Of the run, such as "bf16-mixed" or "32-true".
        matmul_precision: `torch.get_float32_matmul_precision()`; all but "highest" use TF32.
    """
    peaks = next((values for name, values in _PEAKS.items() if name in device_name), None)
    if peaks is None or precision.startswith("64"):
        return None
    half, tf32, single = peaks
    if precision.startswith(("16", "bf16")):
        return half * 1e12
    return (single if matmul_precision == "highest" else tf32) * 1e12
