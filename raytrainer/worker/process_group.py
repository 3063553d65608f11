"""The torch.distributed group of a worker: made once, kept for as long as the worker lives."""

from __future__ import annotations

import mmap
import os
import socket
import struct
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Imported before there is a group: its functions have the group of that moment for a default, and would keep it, with
# its threads and open sockets, for as long as the process lives. (DDP imports it, by way of dynamo, when there is one.)
import torch.distributed.nn.functional
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from raytrainer.plan.ranks import Ranks
from raytrainer.private.torch_private import forget_meshes, set_group_timeout
from raytrainer.strategies.shared_memory import shared_memory
from raytrainer.strategies.stop_board import StopBoard

__all__ = ["ProcessGroup", "interface_of", "lone_group", "make_store"]


def make_store(host: str, world_size: int) -> tuple[TCPStore, int]:
    """The rendezvous store, served by rank 0 on a free port of `host`."""
    store = TCPStore(host, 0, world_size, is_master=True, wait_for_workers=False)
    return store, store.port


def interface_of(address: str) -> str | None:
    """Name of the network interface that holds an IPv4 address; None where it cannot be told.

    A worker pins gloo and NCCL to it, since a host name may resolve to an address that others cannot reach.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                request = struct.pack("256s", name[:15].encode())
                answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR, on Linux
            except OSError:
                continue
        if socket.inet_ntoa(answer[20:24]) == address:
            return name
    return None


def lone_group(device: torch.device) -> ProcessGroup:
    """The group of a worker without others."""
    host = "127.0.0.1"
    store, port = make_store(host, 1)
    return ProcessGroup(Ranks(), host, port, host, "nccl" if device.type == "cuda" else "gloo", device, store)


class ProcessGroup:
    """Joins the group; `control` is a gloo group beside it, for agreements on the CPU.

    `votes` is another one, for what workers ask each other while they train: it pairs with nothing else. Workers of one
    host have a `board` for that.

    Args:
        ranks: This worker's ranks.
        host: Address of rank 0.
        port: Port of its store.
        own_address: This worker's address, by which its interface is found.
        backend: "gloo" or "nccl".
        store: Rank 0's store, which it serves.
        timeout: Seconds that a collective may wait for the others.
    """

    def __init__(
        self,
        ranks: Ranks,
        host: str,
        port: int,
        own_address: str,
        backend: str,
        device: torch.device,
        store: TCPStore | None = None,
        timeout: float = 1800.0,
    ) -> None:
        interface = interface_of(own_address)
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
            if interface != "lo":
                os.environ["NCCL_SOCKET_IFNAME"] = interface
        os.environ.update(
            MASTER_ADDR=host,
            MASTER_PORT=str(port),
            RANK=str(ranks.rank),
            WORLD_SIZE=str(ranks.world_size),
            LOCAL_RANK=str(ranks.local_rank),
            LOCAL_WORLD_SIZE=str(ranks.local_world_size),
            NODE_RANK=str(ranks.node_rank),
            GROUP_RANK=str(ranks.node_rank),
        )
        if store is None:
            store = TCPStore(host, port, ranks.world_size, is_master=False)
        options: dict[str, Any] = {"device_id": device} if backend == "nccl" else {}
        dist.init_process_group(
            backend,
            store=store,
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timedelta(seconds=timeout),
            **options,
        )
        self.store = store
        self.control = dist.new_group(backend="gloo") if backend != "gloo" else dist.group.WORLD
        # whether one is asked to stop: workers of one host look on a board, others vote
        self.board = (
            StopBoard.of_host(store, ranks.rank, ranks.world_size, self.control) if ranks.num_nodes == 1 else None
        )
        self.votes = dist.new_group(backend="gloo") if self.board is None else None
        self._of_node: tuple[Any, Any] | None = None
        self._alone: list[Any] | None = None
        self._meshes: dict[tuple[tuple[int, ...], tuple[str, ...]], Any] = {}
        self._device = device
        self.timeout = timeout
        self._shared = 0

    def shared_memory(self, size: int) -> mmap.mmap | None:
        """So many bytes that all map, where all are on one host. All must call it together."""
        self._shared += 1
        rank, world = dist.get_rank(), f"raytrainer/shared/{self._shared}"
        return None if self.board is None else shared_memory(self.store, world, rank, size, self.control)

    def of_node(self, ranks: Ranks) -> tuple[Any, Any]:
        """The group of this worker's node, and a gloo one beside it. All workers must call it together."""
        if self._of_node is None:
            nodes: list[Any] = [None] * ranks.world_size
            dist.all_gather_object(nodes, ranks.node_rank, group=self.control)
            members = [[r for r, node in enumerate(nodes) if node == n] for n in range(ranks.num_nodes)]
            self._of_node = self._subgroups(members, ranks.node_rank)
        return self._of_node

    def _subgroups(self, members: list[list[int]], own: int) -> tuple[Any, Any]:
        if len(members) == 1:
            return dist.group.WORLD, self.control
        # every worker takes part in making every group
        timeout = timedelta(seconds=self.timeout)
        groups = [dist.new_group(ranks, timeout=timeout) for ranks in members]
        if self.control is dist.group.WORLD:
            return groups[own], groups[own]
        return groups[own], [dist.new_group(ranks, backend="gloo", timeout=timeout) for ranks in members][own]

    def mesh(self, shape: tuple[int, ...], names: tuple[str, ...]) -> Any:
        """The workers as a DeviceMesh, in rank order. All must call it together."""
        key = shape, names
        if key not in self._meshes:
            from torch.distributed.device_mesh import DeviceMesh

            if not self._meshes:
                forget_meshes(self._device)  # of a group that this process was in before
            ranks = torch.arange(dist.get_world_size()).view(shape)
            groups = [self._along(ranks, dimension) for dimension in range(len(shape))]
            # not init_device_mesh, which has NCCL split a communicator even for groups of one
            mesh = DeviceMesh.from_group(groups, self._device.type, ranks, mesh_dim_names=names)
            self._meshes[key] = mesh
        return self._meshes[key]

    def _along(self, ranks: Tensor, dimension: int) -> Any:
        """The group of this worker and those that differ from it in one dimension of `ranks` only.

        NCCL's communicators are as few as can be: where a lost worker keeps one waiting, ending two of them hangs.
        """
        size = ranks.shape[dimension]
        if size == dist.get_world_size():
            return dist.group.WORLD
        if size == 1:  # what is alone has nothing to tell
            if self._alone is None:
                self._alone = [dist.new_group([rank], backend="gloo") for rank in range(dist.get_world_size())]
            return self._alone[dist.get_rank()]
        timeout = timedelta(seconds=self.timeout)
        members = ranks.movedim(dimension, -1).reshape(-1, size).tolist()
        groups = [dist.new_group(line, timeout=timeout) for line in members]
        return next(group for group, line in zip(groups, members, strict=True) if dist.get_rank() in line)

    def set_timeout(self, seconds: float) -> None:
        """Let collectives wait so long for the other workers from now on."""
        if seconds == self.timeout:
            return
        own = (dist.group.WORLD, self.control, self.votes, *(self._of_node or ()))
        groups = {group for group in own if group is not None}
        for group in groups:
            set_group_timeout(group, seconds)
        self.timeout = seconds

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
