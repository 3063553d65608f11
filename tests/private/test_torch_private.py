"""torch's private interfaces, taken away one by one: what happens then."""

from __future__ import annotations

import importlib
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.distributed_c10d as c10d
from torch import nn
from torch.utils.data import DataLoader

import raytrainer
from raytrainer.private import dtensor_private, fsdp_private, torch_private
from raytrainer.worker.process_group import lone_group


@pytest.fixture
def told(caplog):
    logging.getLogger("raytrainer").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("raytrainer").removeHandler(caplog.handler)


def test_timeouts_stay_as_they_are(monkeypatch, told):
    set_to: list[float] = []
    monkeypatch.setattr(c10d, "_set_pg_timeout", lambda timeout, group: set_to.append(timeout.total_seconds()))
    torch_private.set_group_timeout("group", 5.0)
    assert set_to == [5.0]
    monkeypatch.delattr(c10d, "_set_pg_timeout")
    torch_private.set_group_timeout("group", 6.0)
    assert set_to == [5.0] and "cannot change the timeout" in told.text


def test_groups_cannot_be_aborted(monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(c10d, "_abort_process_group", lambda: calls.append("abort"))
    assert torch_private.abort_groups() and calls == []  # there is none
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert torch_private.abort_groups() and calls == ["abort"]
    monkeypatch.setattr(type(c10d._world), "pg_map", {1: ("nccl", None), 2: ("gloo", None)})
    assert torch_private.abort_groups() and calls == ["abort"] * 2
    monkeypatch.setattr(type(c10d._world), "pg_map", {1: ("nccl", None), 2: ("cpu:gloo,cuda:nccl", None)})
    assert not torch_private.abort_groups() and calls == ["abort"] * 2
    monkeypatch.delattr(c10d, "_abort_process_group")
    assert not torch_private.abort_groups()


def test_results_are_on_the_mesh_of_the_group_that_there_is(monkeypatch):
    """Also in a process that was in another one with the same ranks, as who stays when others are lost."""
    from torch.distributed.tensor import DTensor, debug

    for name in ("GLOO_SOCKET_IFNAME", "GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
                 "NODE_RANK", "RANK", "WORLD_SIZE"):  # fmt: skip
        monkeypatch.setenv(name, "")  # what a group leaves in a worker's process
    for _ in range(2):
        group = lone_group(torch.device("cpu"))
        try:
            mesh = group.mesh((1, 1), ("a", "b"))
            one = DTensor.from_local(torch.ones(2), mesh)
            assert (one + one).device_mesh is mesh
        finally:
            group.close()
    monkeypatch.delattr(debug, "_clear_fast_path_sharding_prop_cache")
    torch_private.forget_meshes(torch.device("cpu"))


def test_buckets_are_fixed_late(told):
    calls: list[str] = []
    reducer = SimpleNamespace(
        _push_all_rebuilt_params=lambda: calls.append("push"), _rebuild_buckets=lambda: calls.append("rebuild")
    )
    torch_private.fix_buckets(SimpleNamespace(reducer=reducer))
    assert calls == ["push", "rebuild"]
    torch_private.fix_buckets(SimpleNamespace(reducer=SimpleNamespace()))
    assert "last bit of its first step" in told.text


def test_whether_a_profiler_runs(monkeypatch):
    assert not torch_private.profiler_runs()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert torch_private.profiler_runs()
    assert not torch_private.profiler_runs()
    monkeypatch.delattr(torch.autograd.profiler, "_is_profiler_enabled")
    assert torch_private.profiler_runs()


def test_gradients_that_never_came_are_told_by_the_next_batch():
    def check():
        raise RuntimeError("Expected to have finished reduction")

    reducer = SimpleNamespace(_check_reducer_finalized=check)
    assert torch_private.averaging_check(SimpleNamespace(reducer=reducer)) is check
    torch_private.averaging_check(SimpleNamespace(reducer=SimpleNamespace()))()


def test_a_part_that_cannot_be_compiled_says_so():
    part = nn.Linear(1, 1)
    assert not torch_private.is_compiled(part)
    torch_private.compile_call(part, {"backend": "eager"})
    assert torch_private.is_compiled(part) and part(torch.ones(1)).shape == (1,)
    assert torch_private.is_compiled(torch.compile(part))
    torch_private.drop_compiled(part)
    assert not torch_private.is_compiled(part)
    with pytest.raises(raytrainer.ConfigurationError, match=r"does not let .* be compiled in place"):
        torch_private.compile_call(SimpleNamespace(), {})


def test_batch_norms_are_the_documented_ones(monkeypatch):
    import torch.nn.modules.batchnorm as batchnorm

    assert isinstance(nn.BatchNorm1d(1), torch_private.BATCH_NORMS)
    monkeypatch.delattr(batchnorm, "_BatchNorm")
    try:
        again = importlib.reload(torch_private)
        assert isinstance(nn.BatchNorm2d(1), again.BATCH_NORMS) and not isinstance(nn.Linear(1, 1), again.BATCH_NORMS)
    finally:
        monkeypatch.undo()
        importlib.reload(torch_private)


def test_loaders_without_a_kept_iterator():
    loader = DataLoader([torch.ones(1)] * 3)
    assert torch_private.take_iterator(loader) is None
    torch_private.forget_iterator(loader)
    assert torch_private.take_iterator(loader) is None
    assert len(list(loader)) == 3


def test_loaders_that_do_not_tell_what_they_have_given(monkeypatch):
    loader = DataLoader([torch.ones(1)] * 3)
    given = torch_private.Given(loader)
    assert given.count() is None
    iterator = iter(loader)
    batches = [next(iterator)]
    assert given.count() == 1
    batches += iterator
    assert len(batches) == 3
    assert [id(batch) for batch in given.first] == [id(batch) for batch in batches[:2]]
    assert "_next_data" not in vars(iterator)
    del iterator._num_yielded
    assert given.count() is None
    del iterator
    assert given.count() == sys.maxsize
    monkeypatch.delattr(DataLoader, "_get_iterator")
    assert torch_private.Given(DataLoader([1])).count() is None


def test_writes_into_copies_of_shards_are_not_seen(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils._python_dispatch", None)
    try:
        importlib.reload(dtensor_private)
        with dtensor_private.DispatchMode():
            assert torch.ones(1).add_(1) == 2
            assert dtensor_private.innermost_mode() is None
    finally:
        monkeypatch.undo()
        importlib.reload(dtensor_private)
    assert dtensor_private.written_by(SimpleNamespace()) == []
    assert dtensor_private.memory_of(SimpleNamespace()) is None
    assert not dtensor_private.addresses_of(SimpleNamespace())
    assert fsdp_private.hooks_after_accumulation(SimpleNamespace()) == {}


@pytest.mark.parametrize("gone", [True, False])
def test_tensors_are_copied_one_by_one(monkeypatch, gone):
    if gone:
        monkeypatch.delattr(torch, "_foreach_copy_")
    else:
        together = torch._foreach_copy_

        def as_on_gpus(into, tensors):  # where torch 2.13 has kernels for common types only
            if tensors[0].dtype in (torch.uint16, torch.uint32, torch.uint64):
                raise NotImplementedError("foreach_tensor_copy not implemented for UInt32")
            together(into, tensors)

        monkeypatch.setattr(torch, "_foreach_copy_", as_on_gpus)
    tensors = [torch.tensor([1, 2], dtype=torch.uint32), torch.rand(2, 2), torch.tensor([3], dtype=torch.uint32)]
    copies = [torch.zeros_like(tensor) for tensor in tensors]
    torch_private.copy_together(copies, tensors)
    assert [copy.tolist() for copy in copies] == [tensor.tolist() for tensor in tensors]
