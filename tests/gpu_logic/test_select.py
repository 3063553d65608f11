from __future__ import annotations

import os

import pytest
import torch
from fakes import FakePynvml, cards

from raytrainer import ConfigurationError, ResourceError, Trainer
from raytrainer import trainer_runs as trainer_module
from raytrainer.driver.workers import local_group as group_module
from raytrainer.gpu import choice as select
from raytrainer.gpu.memory import MemorySampler, own_index
from raytrainer.gpu.nvml import Nvml
from raytrainer.plan.settings import build_settings

UUIDS = ["GPU-aa1", "GPU-aa2", "GPU-bb", "GPU-cc"]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("2,0", [2, 0]),
        ("GPU-bb,1", [2, 1]),
        ("GPU-b", [2]),
        ("GPU-aa,1", []),  # ambiguous
        ("3,-1,0", [3]),
        ("1,9,0", [1]),
        ("", []),
        ("NoDevFiles", []),
    ],
)
def test_visible(shown, expected):
    assert select.visible(UUIDS, shown) == expected


@pytest.mark.parametrize(
    ("indices", "text"),
    [([0, 1, 2, 3], "GPUs 0-3"), ([3, 0, 2], "GPUs 0, 2-3"), ([1], "GPU 1"), ([], "no GPU"), ([0, 2], "GPUs 0, 2")],
)
def test_index_text(indices, text):
    assert select.index_text(indices) == text


def test_absent_indices_are_told_what_is_there():
    select.check_present([0, 3], range(4))
    with pytest.raises(ConfigurationError, match=r"gpus=\[0, 9\]: this node has GPUs 0-3 \(PCI order\)"):
        select.check_present((0, 9), [0, 1, 2, 3])


def test_free_first():
    loads = cards((280, 0), (3, 1), (500, 0), (0, 0))
    assert select.free_first(loads) == [3, 0]
    assert "GPU 3 free" in select.describe_loads(loads)
    assert "GPU 1: 1 process(es), 3 of 80000 MiB" in select.describe_loads(loads)


@pytest.mark.parametrize("old", [False, True])
def test_nvml_counts_in_pci_order(old):
    nvml = Nvml(FakePynvml(("0000:9A:00.0", 20.0, 1), ("0000:07:00.0", 10.0, 0), old=old))
    found = nvml.cards()
    assert [(c.index, c.uuid, c.used, c.processes) for c in found] == [
        (0, "GPU-0000:07:00.0", 10.0, 0),
        (1, "GPU-0000:9A:00.0", 20.0, 1),
    ]
    assert (found[0].name, found[0].total, nvml.used(1), nvml.utilisation(0)) == ("Fake 80GB", 80000, 20.0, 37.0)


def test_own_index_follows_what_the_process_sees(monkeypatch):
    nvml = Nvml(FakePynvml(("1", 0, 0), ("2", 0, 0), ("3", 0, 0)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    assert own_index(torch.device("cuda", 0), nvml) == 2
    assert own_index(torch.device("cuda", 5), nvml) is None


def test_sampler_names():
    nvml = Nvml(FakePynvml(("1", 10, 0), ("2", 20, 0)))
    assert MemorySampler("all", nvml, 1, 3)() == {"gpu_memory/node3-gpu1": 20.0}
    assert MemorySampler("min_max", nvml, 0, 0)() == {"gpu_memory/min": 10.0, "gpu_memory/max": 10.0}


# ---------------------------------------------------------------- the driver's own GPU


@pytest.mark.parametrize(
    ("gpus", "auto", "shown", "ordinal"),
    [(1, False, None, 0), ((2,), False, None, 2), ((2,), False, "3,2", 1), (1, True, None, 1), (1, True, "2,1", 1)],
)
def test_local_ordinal(monkeypatch, gpus, auto, shown, ordinal):
    nvml = Nvml(FakePynvml(("1", 9000, 1), ("2", 0, 0), ("3", 20, 0), ("4", 50, 1)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    if shown == "2,1":
        ordinal = 1  # GPU 1 is emptier than GPU 2
    assert select.local_ordinal(gpus, auto, nvml) == ordinal


@pytest.mark.parametrize(
    ("processes", "own", "ordinal"),
    [((1, 0), [0], 0), ((1, 0), [], 1), ((2, 0), [0], 1), ((1, 1), [1, 0], 1), ((2, 1), [0, 1], 1), ((1, 0), [5], 1)],
)
def test_own_gpus_only_look_taken(monkeypatch, processes, own, ordinal):
    """Also those that were given by their indices before."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = Nvml(FakePynvml(*((str(i), 900.0 * count, count) for i, count in enumerate(processes))))
    assert select.local_ordinal(1, True, nvml, own) == ordinal


def test_local_gpu_refusals(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    taken = Nvml(FakePynvml(("1", 9000, 1)))
    with pytest.raises(ConfigurationError, match=r"gpus=\[3\]: this node has GPU 0 \(PCI order\)"):
        select.local_ordinal((3,), False, taken)
    with pytest.raises(ResourceError, match=r"no GPU is free here: GPU 0: 1 process"):
        select.local_ordinal(1, True, taken)
    with pytest.raises(ResourceError, match=r"no GPU is free here: GPU 0: 2 process"):
        select.local_ordinal(1, True, Nvml(FakePynvml(("1", 9000, 2))), [0])
    with pytest.raises(ConfigurationError, match="no NVIDIA GPU"):
        select.local_ordinal(1, False, None)


def test_local_group_counts_in_pci_order(monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(group_module, "open_nvml", lambda: Nvml(FakePynvml(("1", 9000, 1), ("2", 0, 0))))
    monkeypatch.setattr(group_module, "_used", [])
    monkeypatch.setattr(group_module, "require_cuda", lambda: None)  # torch may be the build for CPUs here
    group = group_module.local_group(build_settings(gpus=[1], strategy="local"))
    assert group.worker.device == torch.device("cuda", 1) and group.describe() == "this process (cuda:1)"
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    free = group_module.local_group(build_settings(gpus=1, strategy="local", auto_select_gpus=True))
    assert free.worker.device.index == 1
    group_module._used.append(1)  # as its run does
    # later, this process's own memory does not make the card look taken
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(group_module, "open_nvml", lambda: Nvml(FakePynvml(("1", 0, 0), ("2", 9000, 1))))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    again = group_module.local_group(build_settings(gpus=1, strategy="local", auto_select_gpus=True))
    assert again.worker.device.index == 1
    assert group_module.local_group(build_settings(strategy="local")).worker.device.type == "cpu"


# ---------------------------------------------------------------- arguments


def test_all_gpus_of_this_machine(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(trainer_module, "attached", lambda address: False)
    monkeypatch.setattr(trainer_module, "open_nvml", lambda: Nvml(FakePynvml(("1", 0, 0), ("2", 0, 0))))
    two = Trainer(gpus=-1, logger=False).settings
    assert (two.gpus, two.strategy, two.world_size) == (2, "ddp", 2)
    monkeypatch.setattr(trainer_module, "open_nvml", lambda: Nvml(FakePynvml(("1", 0, 0))))
    assert Trainer(gpus="-1", logger=False).settings.strategy == "local"
    monkeypatch.setattr(trainer_module, "open_nvml", lambda: None)
    with pytest.raises(ConfigurationError, match="gpus=-1: this machine has no NVIDIA GPU"):
        Trainer(gpus=-1)


def test_all_gpus_of_a_cluster_are_counted_when_it_is_there():
    settings = build_settings(gpus=-1, cluster_attached=True, num_nodes=2)
    assert (settings.gpus, settings.strategy, settings.on_gpu) == (-1, "ddp", True)


@pytest.mark.parametrize("gpus", [[0, 1], -1, 0, None, "1,3"])
def test_auto_select_needs_a_number(gpus):
    with pytest.raises(ConfigurationError, match="auto_select_gpus=True with gpus="):
        build_settings(gpus=gpus, auto_select_gpus=True)
    assert build_settings(gpus="2-4", auto_select_gpus=True).auto_select_gpus


def test_log_gpu_memory_is_checked():
    assert build_settings(log_gpu_memory="min_max").log_gpu_memory == "min_max"
    with pytest.raises(ConfigurationError, match="log_gpu_memory='some'"):
        build_settings(log_gpu_memory="some")
