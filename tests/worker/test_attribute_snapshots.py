"""What a module has beside its state dict, over the loss of its workers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from drifting import Drifting
from exact import Exact, Mortal, run, same
from torch.nn import functional as F

from raytrainer.checkpointing.checkpoint_format import read_checkpoint
from raytrainer.driver.workers.group_supply import GroupSupply
from raytrainer.tensor_packing import pack, unpack
from raytrainer.worker import written_tables
from raytrainer.worker.attribute_snapshots import AttributeSnapshots
from raytrainer.worker.staging import Staging
from raytrainer.worker.step_copies import OnTheWay


@pytest.mark.parametrize(("batches", "verb"), [(3, "train"), (9, "train"), (21, "validate"), (33, "train")])
def test_a_loss_of_workers_leaves_no_trace(
    batches: int, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the first snapshot, within an epoch (of 14 batches), in a validation, and late."""
    monkeypatch.setattr(GroupSupply, "take", lambda self, settings: Mortal())
    calm, module = Drifting(), Drifting((0, batches), flag=f"{tmp_path}/flag", verb=verb)
    _, rows = run(calm, tmp_path, snapshot_every=3)
    trainer, struck_rows = run(module, tmp_path, snapshot_every=3)
    assert len(trainer.recoveries) == 1
    assert struck_rows == rows and same(module, calm)
    assert "begins anew" not in caplog.text


def test_what_is_in_two_places_of_an_attribute_is_one_thing() -> None:
    modules, large = [torch.nn.Linear(1, 1) for _ in range(2)], torch.ones(2**12)
    snapshots = [AttributeSnapshots(module) for module in modules]
    modules[0].own = [large, (large, torch.ones(1))]  # type: ignore[assignment]
    state = snapshots[0].take(modules[0])
    assert len(state["tensors"]) == 1
    snapshots[1].put_back(modules[1], state)
    one, (other, _) = modules[1].own  # type: ignore[misc]
    assert one is other and torch.equal(one, large) and one is not large


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6001.0), torch.arange(5001, dtype=torch.uint8)[1:], torch.ones(70, 50).T, torch.randn(64, 64) > 0,
        torch.randn(4096).bfloat16(), torch.randn(2048, dtype=torch.complex64),
    ],
    ids=lambda tensor: str(tensor.dtype).removeprefix("torch."),
)  # fmt: skip
def test_whatever_changes_in_it_changes_the_digest_of_what_is_on_a_gpu(
    tensor: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytrainer.worker.written_tables._AT_ONCE", 1000)
    rows = tensor.clone().flatten()

    def digest_there(tensor: torch.Tensor) -> int:
        return int(written_tables.digest_there(tensor))

    found = [digest_there(tensor), digest_there(rows.roll(1)), digest_there(rows.flip(0)), digest_there(rows[:-4])]
    for place in (0, 999, 1000, len(rows) - 1):
        other = rows.clone()
        other.view(torch.uint8)[place * other.element_size()] ^= 1
        found.append(digest_there(other))
    apart = rows.clone()
    apart.view(torch.uint8)[:12:4] += torch.tensor(
        [1, 254, 1], dtype=torch.uint8
    )  # whose sum, in order too, is as before
    same_numbers = bool((tensor.flatten() == tensor.flatten()[0]).all())  # of which no order can be told
    assert digest_there(tensor) == found[0]
    assert len({*found, digest_there(apart)}) == len(found) + 1 - 2 * same_numbers


@pytest.mark.parametrize(
    "write",
    [
        lambda table: F.batch_norm(torch.ones(2, len(table)), table, torch.ones(len(table)), training=True),
        lambda table: table.data.add_(1.0),
        lambda table: numpy.add(table.numpy(), 1.0, out=table.numpy()),
    ],
    ids=["batch normalisation", "data", "array"],
)
@pytest.mark.parametrize("size,where", [(2**12, "here"), (2**12, "there"), (2**24 + 1, "here")])
def test_a_table_that_is_written_to_without_a_version_goes_along(
    write: Callable[[torch.Tensor], Any], size: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its size; on a device, which is waited for once."""
    if where == "there":
        monkeypatch.setattr(written_tables, "_is_here", lambda tensor: False)
    modules = [torch.nn.Linear(1, 1) for _ in range(2)]
    for module in modules:
        module.table, module.constant = torch.zeros(size), torch.ones(2**12)
    snapshots = [AttributeSnapshots(module) for module in modules]
    write(modules[0].table)
    assert modules[0].table._version == 0 and modules[0].table.any()
    state = snapshots[0].take(modules[0])
    assert len(state["tensors"]) == 1
    snapshots[1].put_back(modules[1], state)
    assert torch.equal(modules[1].table, modules[0].table)


def test_what_a_device_says_of_tables_may_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written_tables, "_is_here", lambda tensor: False)
    tensors = [torch.zeros(2**12), torch.ones(2**12), torch.ones(2**12)]
    tables = written_tables.Tables(tensors)
    tensors[0].data.add_(1)
    tensors[1].add_(1)
    assert set(tables.unchanged()) == {id(tensors[2])}
    for steps in (OnTheWay(), OnTheWay()):
        with steps.proving(tables):
            assert set(tables.unchanged()) == {id(tensors[0]), id(tensors[2])}
        steps.begin()
        assert steps.proves(steps.arrived()) == (not tensors[0].any())
        tensors[0].data.zero_()


ODD: dict[str, Callable[[], torch.Tensor]] = {
    "bool": lambda: torch.zeros(5000, dtype=torch.bool),
    "float8": lambda: torch.zeros(5000).to(torch.float8_e4m3fn),
    "complex": lambda: torch.zeros(5000, dtype=torch.complex64),
    "conjugated": lambda: torch.zeros(5000, dtype=torch.complex64).conj(),
    "negated": lambda: torch.zeros(5000, dtype=torch.complex64).conj().imag,
    "strided": lambda: torch.zeros(100, 100)[::2, 1:],
    "coo": lambda: torch.eye(300).to_sparse(),
    "csr": lambda: torch.eye(300).to_sparse_csr(),
    "csc": lambda: torch.eye(300).to_sparse_csc(),
    "bsr": lambda: torch.eye(300).to_sparse_bsr((10, 10)),
    "inference": lambda: torch.inference_mode()(torch.zeros)(5000),
    "empty": lambda: torch.zeros(0, 5000),
    "expanded": lambda: torch.zeros(1).expand(5000),
    "one number": lambda: torch.zeros(()),
    "meta": lambda: torch.zeros(5000, device="meta"),
}


@pytest.mark.filterwarnings("ignore:.*Sparse")
@pytest.mark.parametrize("where", ["here", "there"])
@pytest.mark.parametrize("kind", ODD)
def test_tables_of_odd_kinds(kind: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay if they are unchanged, and come along if written to or exchanged."""
    if where == "there":
        monkeypatch.setattr(written_tables, "_is_here", lambda tensor: False)
    modules = [torch.nn.Linear(1, 1) for _ in range(2)]
    for module in modules:
        module.table = ODD[kind]()
    snapshots = [AttributeSnapshots(module) for module in modules]
    assert not snapshots[0].take(modules[0])["tensors"]
    table = modules[0].table
    if kind in ("coo", "csr", "csc", "bsr"):
        table.values().data.fill_(2) if kind != "coo" else table._values().data.fill_(2)
    elif list(ODD).index(kind) < list(ODD).index("coo"):
        table.data[1:2].fill_(1)
    else:
        modules[0].table = table = torch.cat([table.flatten(), table.flatten()])
    for _ in range(2):
        state = Staging(torch.device("cpu")).copy(snapshots[0].take(modules[0]))
        snapshots[1].put_back(modules[1], unpack(pack(dict(state))))
        put = modules[1].table
        assert put.layout == table.layout and put.shape == table.shape and put.dtype == table.dtype
        if kind == "meta":
            break
        one, other = (tensor.to_dense().to(torch.complex64) for tensor in (put, table))
        assert torch.equal(one, other)
        if table.layout != torch.strided:
            modules[0].table = table = (torch.eye(300) + torch.eye(300).roll(1, 0)).to_sparse()  # of another size


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize("kind", ["nested", "quantized", "a class of its own"])
def test_tables_of_which_nothing_is_known_are_named_if_exchanged(kind: str) -> None:
    def made() -> torch.Tensor:
        if kind == "nested":
            return torch.nested.nested_tensor([torch.zeros(3), torch.zeros(4)], layout=torch.jagged)
        if kind == "quantized":
            return torch.quantize_per_tensor(torch.zeros(5000), 0.1, 0, torch.quint8)
        return torch.zeros(5000).as_subclass(type("Own", (torch.Tensor,), {}))

    module = torch.nn.Linear(1, 1)
    module.table = made()
    snapshots = AttributeSnapshots(module)
    assert snapshots.take(module)["lost"] == []
    module.table = made()
    assert snapshots.take(module)["lost"] == ["table"]


class Counts:
    """No data."""

    def __init__(self) -> None:
        self.batches, self.lock = 0, object()


class Opaque(Exact):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counts, self.constant, self.memory = Counts(), Counts(), []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.counts.batches += 1
        self.memory.append(Counts())
        return super().training_step(batch, batch_idx)


def test_what_cannot_be_put_back_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(GroupSupply, "take", lambda self, settings: Mortal())
    with caplog.at_level(logging.WARNING, "raytrainer"):
        run(Opaque((0, 9), flag=f"{tmp_path}/flag"), tmp_path, snapshot_every=3)
    said = [record.getMessage() for record in caplog.records if "begins anew" in record.getMessage()]
    assert len(said) == 1
    assert "Opaque.counts, Opaque.memory." in said[0]


def test_no_file_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is resumed begins with the module as it is made."""
    monkeypatch.setattr(GroupSupply, "take", lambda self, settings: Mortal())
    run(Drifting(), tmp_path, save_every=2, max_epochs=1)
    assert all(
        set(own) >= {"rng"} and "attributes" not in own for own in read_checkpoint(tmp_path / "last.ckpt")["own"]
    )
