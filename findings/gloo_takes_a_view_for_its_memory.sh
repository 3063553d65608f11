#!/usr/bin/env bash
# torch 2.13.0, gloo: all_reduce and broadcast of a tensor that is not contiguous work on other elements than its own.
#
# Guess: what is not contiguous is copied there and back, as all_gather does, or refused, as NCCL does.
# Seen: as many elements as the view has are taken from where it begins, one after the other, and nothing is raised.
# After `all_reduce(x[::2])` of 0...5, x is 0, 2, 4, 3, 4, 5: the view has other numbers than the sum, and an element
# that is not in it has changed. A transposed matrix, or an image in channels_last, is right only if it lies in memory
# alike on all ranks: otherwise x[i][j] is added to another rank's other element, and ranks are left with different
# "sums" of equal tensors. `all_gather` is right in each of these.
#
# Run: findings/gloo_takes_a_view_for_its_memory.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def work(rank, ranks, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)

    def gathered(tensor):
        everywhere = [torch.zeros(tensor.shape) for _ in range(ranks)]
        dist.all_gather(everywhere, tensor)
        return everywhere

    summed = torch.arange(6.0)
    dist.all_reduce(summed[::2])
    sent = torch.arange(6.0) + 10 * rank
    dist.broadcast(sent[::2], 0)
    strided = gathered(torch.arange(6.0)[::2])
    plain = torch.arange(6.0).reshape(2, 3)
    mine = plain.clone() if rank == 0 else plain.t().contiguous().t()  # equal everywhere, in other places
    before = gathered(mine)
    dist.all_reduce(mine)
    matrix = gathered(mine)
    image = torch.arange(8.0).reshape(1, 2, 2, 2)
    image = image.to(memory_format=torch.channels_last) if rank else image.clone()
    dist.all_reduce(image)
    images = gathered(image)

    if rank == 1:
        print(f"all_reduce of every second of 0...5: {summed.tolist()}, right is [0, 1, 4, 3, 8, 5]")
        print(f"broadcast of every second of 0...5 into 10...15: {sent.tolist()}, right is [0, 11, 2, 13, 4, 15]")
        print(f"a matrix transposed in memory on one rank: {[part.tolist() for part in matrix]}")
        print(f"right is {(2 * plain).tolist()}")
        assert sent.tolist() == [0.0, 1.0, 2.0, 13.0, 14.0, 15.0]
    assert summed.tolist() == [0.0, 2.0, 4.0, 3.0, 4.0, 5.0], summed
    assert matrix[0].tolist() == [[0.0, 4.0, 3.0], [7.0, 6.0, 10.0]], matrix
    assert matrix[1].tolist() == [[0.0, 3.0, 6.0], [4.0, 7.0, 10.0]], matrix
    assert not torch.equal(images[0], images[1])
    assert all(part.tolist() == [0.0, 2.0, 4.0] for part in strided), "all_gather was right"
    assert all(torch.equal(part, plain) for part in before), "all_gather was right"
    dist.destroy_process_group()


with tempfile.TemporaryDirectory() as folder:
    mp.start_processes(work, (2, os.path.join(folder, "store")), nprocs=2, start_method="fork")
PYTHON
