"""What a loop by hand on all GPUs loses against one on each of them, by settings of NCCL and DDP, in turn.

Run: python -m torch.distributed.run --standalone --nproc-per-node=2 tests/gpu/scaling.py [--rounds 2]
Rank 0 prints a Markdown table, and of some settings what a trace says: how long GPUs compute and communicate, and how
much of the communication is beside nothing else.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from figures import Clock
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from workloads import CONTEXT, VOCABULARY, WORKLOADS, Workload

WARM, STEPS, TRACED = 5, 40, 5

#: (options of NCCL's group, options of DDP); None: no communication.
SIDES: dict[str, tuple[dict[str, Any], dict[str, Any]] | None] = {
    "each alone": None,
    "default": ({}, {}),
    **{f"max_ctas={n}": ({"max_ctas": n}, {}) for n in (1, 2, 4, 8)},
    "high priority": ({"high": True}, {}),
    "high priority, 100 MB": ({"high": True}, {"bucket_cap_mb": 100}),
    "high priority, static graph": ({"high": True}, {"static_graph": True}),
    "high priority, bf16": ({"high": True}, {"hook": bf16_compress_hook}),
    "optimizer beside the last bucket": ({}, {"overlap": True}),
    "high priority, optimizer beside the last bucket": ({"high": True}, {"overlap": True}),
}


class Overlapping:
    """Steps all parameters but those of the last bucket while that is still reduced.

    Args:
        whole: The optimizer until DDP has put its buckets into the order in which gradients come.
        workload: Makes the optimizers.
    """

    def __init__(self, whole: torch.optim.Optimizer, workload: Workload) -> None:
        self.whole, self.workload = whole, workload
        self.steps = 0
        self.early: torch.optim.Optimizer | None = None
        self.late: torch.optim.Optimizer | None = None
        self.reducing: list[torch.futures.Future[Any]] = []

    def reduce(self, group, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
        """DDP's hook for communication."""
        work = dist.all_reduce(bucket.buffer(), dist.ReduceOp.AVG, group, async_op=True)
        assert work is not None
        future = work.get_future()
        if not bucket.is_last():
            self.reducing.append(future)
        else:
            for earlier in self.reducing:
                earlier.wait()  # the GPU does, not this thread
            self.reducing.clear()
            if self.steps >= 2:
                if self.early is None:
                    self._split({id(parameter) for parameter in bucket.parameters()})
                assert self.early is not None
                self.early.step()
        return future.then(lambda done: done.value()[0])

    def _split(self, last: set[int]) -> None:
        parameters = self.whole.param_groups[0]["params"]
        self.early = self.workload.optimizer([p for p in parameters if id(p) not in last])
        self.late = self.workload.optimizer([p for p in parameters if id(p) in last])

    def zero_grad(self) -> None:
        self.whole.zero_grad()

    def step(self) -> None:
        self.steps += 1
        (self.late or self.whole).step()


class Side:
    """A model of its own, trained on one batch again and again."""

    def __init__(self, name: str, device: torch.device) -> None:
        workload = WORKLOADS["gpt"]
        self.rows = torch.randint(VOCABULARY, (16, CONTEXT), device=device)
        self.model: Any = workload.model().to(device)
        self.optimizer: Any = workload.optimizer(self.model.parameters())
        options = SIDES[name]
        if options is None:
            return
        nccl, ddp = dict(options[0]), dict(options[1])
        wanted = dist.ProcessGroupNCCL.Options()
        wanted.is_high_priority_stream = nccl.pop("high", False)
        for key, value in nccl.items():
            setattr(wanted.config, key, value)
        group, hook, overlap = dist.new_group(pg_options=wanted), ddp.pop("hook", None), ddp.pop("overlap", False)
        self.model = DistributedDataParallel(self.model, gradient_as_bucket_view=True, process_group=group, **ddp)
        if overlap:
            self.optimizer = Overlapping(self.optimizer, workload)
            hook = self.optimizer.reduce
        if hook is not None:
            self.model.register_comm_hook(group, hook)

    def step(self) -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = self.model(self.rows)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def milliseconds(self) -> float:
        """The median step."""
        clock = Clock(Workload("gpt", WARM + STEPS, WARM))
        for step in range(WARM + STEPS):
            clock.before(step)
            self.step()
        median = clock.milliseconds()[0]
        dist.barrier()
        return median

    def trace(self) -> str:
        """What a step's kernels do, in milliseconds."""
        self.step()
        torch.cuda.synchronize()
        dist.barrier()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(TRACED):
                self.step()
            torch.cuda.synchronize()
        kinds: tuple[list[tuple[int, int]], list[tuple[int, int]]] = [], []
        assert profiler.profiler is not None
        for event in profiler.profiler.kineto_results.events():
            if event.device_type() == torch.autograd.DeviceType.CUDA:
                span = event.start_ns(), event.start_ns() + event.duration_ns()
                kinds["nccl" in event.name()].append(span)
        computing, communicating, either = _covered(kinds[0]), _covered(kinds[1]), _covered([*kinds[0], *kinds[1]])
        return (
            f"computing {computing:.2f} ms a step, communicating {communicating:.2f}, "
            f"of which beside nothing else {either - computing:.2f}"
        )


def _covered(spans: Sequence[tuple[int, int]]) -> float:
    """Milliseconds a step that are in at least one of the spans."""
    total, end = 0, 0
    for begin, stop in sorted(spans):
        total += max(0, stop - max(begin, end))
        end = max(end, stop)
    return total / TRACED / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    sides = {name: Side(name, device) for name in SIDES}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            times[name].append(sides[name].milliseconds())
    lines = ["| | ms a step | share of linear |", "|---|---|---|"]
    for name, values in times.items():
        share = statistics.median(alone / value for alone, value in zip(times["each alone"], values, strict=True))
        lines.append(f"| {name} | {statistics.median(values):.2f} | {100 * share:.1f} % |")
    for name in ("each alone", "default", "max_ctas=4", "high priority", "optimizer beside the last bucket"):
        lines.append(f"{name}: {sides[name].trace()}")
    if dist.get_rank() == 0:
        print(*lines, sep="\n", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
