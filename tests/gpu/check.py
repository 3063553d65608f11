"""Checks on real NVIDIA GPUs: prints one table, exits non-zero if a check fails.

Run on a machine with one or more GPUs: python tests/gpu/check.py [--only NAME ...] [--list]
Checks that need more GPUs than there are are skipped.
"""

from __future__ import annotations

import argparse
import logging
import time
import traceback

import checks_data  # noqa: F401
import checks_devices  # noqa: F401
import checks_failures  # noqa: F401
import checks_large  # noqa: F401
import checks_precision  # noqa: F401
import checks_sharding  # noqa: F401
import checks_strategies  # noqa: F401
import pynvml
import torch
from harness import Skipped, checks, uuids


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], help="names, or beginnings of names")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    chosen = [c for c in checks() if not arguments.only or c[0].startswith(tuple(arguments.only))]
    if arguments.list:
        print("\n".join(f"{name} (GPUs: {gpus})" for name, gpus, _ in chosen))
        return 0
    logging.getLogger("raytrainer").setLevel(logging.ERROR)
    have, failed = len(uuids()), 0
    card = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
    print(f"{have} x {card}, torch {torch.__version__}\n\n| check | result | seen | s |\n|---|---|---|---|", flush=True)
    for name, gpus, function in chosen:
        begun, result, seen = time.time(), "skipped", f"needs {gpus} GPUs"
        if gpus <= have:
            try:
                result, seen = "ok", function()
            except Skipped as error:
                seen = str(error)
            except Exception as error:
                result, seen = "FAILED", f"{type(error).__name__}: {error}".replace("\n", " ")[:600]
                failed += 1
                traceback.print_exc()
        print(f"| {name} | {result} | {seen} | {time.time() - begun:.1f} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
