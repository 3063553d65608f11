"""`python -m raytrainer doctor`: what this machine has for training, and what is wrong with it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from raytrainer.extras import lower_bound
from raytrainer.gpu.nvml import open_nvml
from raytrainer.version import __version__

__all__ = ["Finding", "examine", "main"]

#: Beside what pip has checked: packages whose release is worth knowing when something fails.
PACKAGES = ("torch", "ray", "pyarrow", "numpy", "rich", "nvidia-ml-py", "safetensors", "torchmetrics")

#: Bytes of shared memory below which Ray keeps its objects on the disk.
ENOUGH_SHARED_MEMORY = 1e9

#: Open files that Ray asks for.
ENOUGH_FILES = 4096


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what it is, and what to do where that is wrong."""

    what: str
    found: str
    remedy: str = ""


def main() -> int:
    """Print what was found; the number of things that are wrong, for an exit status."""
    findings = list(examine())
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        print(f"{'!' if finding.remedy else ' '} {finding.what:<{width}}  {finding.found}")
        if finding.remedy:
            print(f"  {'':<{width}}  -> {finding.remedy}")
    wrong = sum(bool(finding.remedy) for finding in findings)
    print(f"{wrong} thing(s) to look at." if wrong else "Nothing wrong was found.")
    return wrong


def examine() -> Iterator[Finding]:
    """Look at versions, GPUs, Ray, the network, shared memory and limits. Starts nothing and trains nothing."""
    yield Finding("raytrainer", __version__)
    yield Finding("Python", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        yield _package(package)
    yield _cpus()
    yield from _gpus()
    yield _ray()
    yield _own_address()
    yield from _limits()


def _package(package: str) -> Finding:
    try:
        version, least = metadata.version(package), lower_bound(package)
    except metadata.PackageNotFoundError:
        needed = package in ("torch", "ray", "pyarrow", "rich", "nvidia-ml-py")
        return Finding(package, "not installed", f"pip install {package}" if needed else "")
    old = _numbers(version) < _numbers(least)
    remedy = f"older than what was tried: pip install -U '{package}>={least}'"
    return Finding(package, version, remedy if old else "")


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


def _cpus() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    there = os.cpu_count() or 1
    return Finding("CPUs", f"{usable}" if usable == there else f"{usable} of the machine's {there} may be used")


def _gpus() -> Iterator[Finding]:
    nvml = open_nvml()
    cards = [] if nvml is None else nvml.cards()
    for card in cards:
        yield Finding(
            f"GPU {card.index}", f"{card.used:.0f} of {card.total:.0f} MiB used, {card.processes} process(es)"
        )
    try:
        import torch
    except ImportError as error:
        yield Finding("torch's GPUs", f"torch cannot be imported: {error}", "install torch anew")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    if not cards:
        yield Finding("GPUs", f"none that NVML shows; torch is built with {build}")
    elif not torch.version.cuda and not torch.version.hip:
        yield Finding(
            "torch's GPUs", "this torch is built without CUDA",
            "install the build for your driver: https://pytorch.org/get-started",
        )  # fmt: skip
    elif not torch.cuda.is_available():
        yield Finding(
            "torch's GPUs", f"torch ({build}) cannot use them",
            "the driver may be too old for this CUDA: compare with what nvidia-smi says, or look at "
            "CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
    else:
        yield Finding("torch's GPUs", f"{torch.cuda.device_count()} ({build})")


def _ray() -> Finding:
    from raytrainer.driver.cluster.attaching import answers, host_and_port
    from raytrainer.private.ray_private import running_address

    named = os.environ.get("RAY_ADDRESS", "")
    address = named or running_address()
    place = host_and_port(address) if address else None
    if place is None:
        return Finding("Ray", f"RAY_ADDRESS={named!r}" if named else "none runs here; a fit that needs one starts it")
    source = "RAY_ADDRESS" if named else "ray start"
    if answers(*place, 2.0):
        return Finding("Ray", f"{address} answers ({source})")
    if not named:
        return Finding("Ray", f"none runs here (one at {address} has ended); a fit that needs one starts it")
    return Finding("Ray", f"{address} does not answer ({source})", "is the cluster up? `ray status` on its head tells")


def _own_address() -> Finding:
    try:
        address = socket.gethostbyname(socket.gethostname())
        with socket.create_server((address, 0)) as server:
            socket.create_connection(server.getsockname()[:2], timeout=2).close()
    except OSError as error:
        return Finding(
            "own address", f"{socket.gethostname()}: {error}",
            "workers meet at this machine's name: it must lead to an address of its own (/etc/hosts)",
        )  # fmt: skip
    return Finding("own address", f"{socket.gethostname()} is {address}, and a port there can be reached")


def _limits() -> Iterator[Finding]:
    if os.path.isdir("/dev/shm"):
        free = shutil.disk_usage("/dev/shm").free
        small = free < ENOUGH_SHARED_MEMORY
        yield Finding(
            "shared memory", f"{free / 1e9:.1f} GB free in /dev/shm",
            "loader processes and Ray pass tensors there: docker run --shm-size=8g" if small else "",
        )  # fmt: skip
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        few = hard != resource.RLIM_INFINITY and hard < ENOUGH_FILES
        yield Finding("open files", f"{soft}, at most {hard}", f"ulimit -n {ENOUGH_FILES}" if few else "")
