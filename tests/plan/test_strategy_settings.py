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
