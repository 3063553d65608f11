"""Strategy names and objects, and what they say about batches."""

from __future__ import annotations

import pickle
from datetime import timedelta

import pytest

import raytrainer as rt
from raytrainer.errors import ConfigurationError
from raytrainer.plan.settings import build_settings
from raytrainer.plan.strategy_settings import effective_batch


@pytest.mark.parametrize(
    "given, name",
    [
        ("ddp", "ddp"),
        ("ddp_cpu", "ddp"),
        ("ddp_spawn", "ddp"),
        ("ddp2", "ddp2"),
        ("dp", "dp"),
        (rt.DDP(), "ddp"),
        (rt.DDP2(), "ddp2"),
        (rt.DP(), "dp"),
    ],
)
def test_names_and_objects(given, name):
    settings = build_settings(strategy=given, num_processes=2)
    assert settings.strategy == name
    assert type(settings.ddp).name == name


def test_sharding():
    fsdp = rt.FSDP(blocks="layers.*", replicate="nodes", process_group_timeout=timedelta(minutes=2))
    settings = build_settings(strategy=fsdp, num_nodes=2, num_processes=4)
    assert settings.strategy == "fsdp" and settings.sharding is fsdp and settings.world_size == 8
    assert fsdp.layout(2, 8) == (2, 4, 1) and fsdp.timeout_seconds == 120.0 and fsdp.blocks == ("layers.*",)
    assert pickle.loads(pickle.dumps(fsdp)) == fsdp
    assert build_settings(strategy="fsdp").sharding == rt.FSDP()
    assert build_settings(strategy="ddp").sharding is None
    assert build_settings(strategy="fsdp").world_size == 1  # in a worker of its own, which may have a GPU


def test_settings_of_an_object():
    ddp = rt.DDP(
        find_unused_parameters=True,
        bucket_cap_mb=5,
        gradient_compression="bf16",
        process_group_timeout=timedelta(minutes=2),
    )
    assert ddp.options == {
        "find_unused_parameters": True,
        "static_graph": False,
        "gradient_as_bucket_view": True,
        "bucket_cap_mb": 5,
    }
    assert ddp.timeout_seconds == 120.0
    assert build_settings(strategy=ddp).ddp is ddp
    assert pickle.loads(pickle.dumps(ddp)) == ddp
    assert "bucket_cap_mb" not in rt.DDP().options
    assert rt.DDP(broadcast_buffers=False).options["broadcast_buffers"] is False


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: rt.FSDP(blocks=3), "blocks=3: give classes of modules, their names"),
        (lambda: rt.FSDP(blocks=[]), r"blocks=\[\]"),
        (lambda: rt.FSDP(replicate="node"), "replicate='node': give \"nodes\", a number of copies"),
        (lambda: rt.FSDP(replicate=True), "replicate=True"),
        (lambda: rt.FSDP(reshard_after_forward=1), "reshard_after_forward=1: give True, False, None, or a number"),
        (lambda: rt.FSDP(cpu_offload=1), "FSDP: cpu_offload=1"),
        (lambda: rt.FSDP(prefetch=0), "prefetch=0"),
        (lambda: rt.FSDP(process_group_timeout=0), "process_group_timeout=0"),
        (lambda: build_settings(strategy=rt.FSDP), r"strategy=FSDP: give an object, FSDP\(\)"),
        (lambda: build_settings(strategy=rt.FSDP(cpu_offload=True), num_processes=2), "cpu_offload=True.* on CPUs"),
        (lambda: build_settings(strategy=rt.FSDP(replicate=2), num_processes=2), 'that is strategy="ddp"'),
        (lambda: build_settings(strategy=rt.FSDP(replicate=2), num_processes=3), "3 workers: .* a multiple"),
        (lambda: build_settings(strategy=rt.FSDP(reshard_after_forward=3), num_processes=4), "divides 4"),
        (lambda: rt.ModelParallel(tensor=0), "ModelParallel: tensor=0"),
        (
            lambda: build_settings(strategy=rt.ModelParallel(tensor=3), num_processes=4),
            "4 workers: .* or a multiple of it",
        ),
        (
            lambda: build_settings(strategy=rt.ModelParallel(tensor=2, data=2), num_processes=8),
            "8 workers: .* the product;",
        ),
        (
            lambda: build_settings(strategy=rt.ModelParallel(tensor=2, replicate=2), num_processes=4),
            "nothing .* in shards",
        ),
        (lambda: rt.DDP(gradient_compression="int8"), "gradient_compression='int8'.*'bf16'"),
        (lambda: rt.DDP2(bucket_cap_mb=0), "bucket_cap_mb=0"),
        (lambda: rt.DDP(find_unused_parameters=1), "DDP: find_unused_parameters=1"),
        (lambda: rt.DP(process_group_timeout=0), "process_group_timeout=0"),
        (lambda: build_settings(strategy=rt.DDP), r"give an object, DDP\(\)"),
        (lambda: build_settings(strategy="ddp3"), "'ddp2'"),
        (lambda: build_settings(strategy="dp", num_nodes=2), '"ddp2"'),
        (
            lambda: build_settings(strategy="ddp", num_processes=2, sync_batchnorm=True),
            "SyncBatchNorm works on GPUs only",
        ),
        (lambda: build_settings(compile={"mod": 1}), r"\['mod'\] are no options of torch.compile"),
        (lambda: build_settings(compile="yes"), "compile='yes'"),
        (lambda: build_settings(strategy=rt.DDP(gradient_compression="bf16"), num_processes=2), "for NCCL only"),
        (lambda: build_settings(float32_matmul_precision="low"), "'medium'"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_accepted_flags():
    settings = build_settings(compile=True, float32_matmul_precision="high", sync_batchnorm=True)
    assert settings.compile == {} and settings.sync_batchnorm
    assert build_settings().compile is None


def test_samples_in_a_step():
    assert effective_batch(16, 4, 1, "ddp") == "16 samples a batch x 4 workers = 64 samples a step"
    assert effective_batch(16, 2, 4, "ddp2") == "16 samples a batch x 2 nodes x 4 accumulated = 128 samples a step"
    assert effective_batch(16, 1, 1, "dp") == "16 samples a batch x 1 for the whole job = 16 samples a step"
    assert effective_batch(None, 2, 1, "ddp") is None


@pytest.mark.parametrize(
    "strategy, nodes, workers, layout",
    [
        (rt.FSDP(), 2, 8, (1, 8, 1)),
        (rt.FSDP(replicate="nodes"), 2, 8, (2, 4, 1)),
        (rt.ModelParallel(), 1, 4, (1, 1, 4)),
        (rt.ModelParallel(), 2, 8, (1, 2, 4)),
        (rt.ModelParallel(tensor=2), 1, 8, (1, 4, 2)),
        (rt.ModelParallel(data=2), 1, 8, (1, 2, 4)),
        (rt.ModelParallel(tensor=2, replicate="nodes"), 2, 8, (2, 2, 2)),
        (rt.ModelParallel(tensor=1, data=2, replicate=2), 1, 4, (2, 2, 1)),
    ],
)
def test_layouts(strategy, nodes, workers, layout):
    """Copies, workers that shards are on, workers that split layers."""
    assert strategy.layout(nodes, workers) == layout
