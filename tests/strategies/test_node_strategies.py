"""One node x k workers is one process on the full batch; two nodes are the mean of two such nodes."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from forked_group import FORK
from node_cases import CASES, SEED, WORKERS, Case, Found, Looks, Plain, contrastive, main, play

from raytrainer.data.feed import Feed
from raytrainer.data.sharding import Share
from raytrainer.driver.reporting.merged_counts import in_order
from raytrainer.metrics.metric_board import MetricBoard
from raytrainer.plan.ranks import Ranks
from raytrainer.plan.settings import build_settings

ONE_NODE = [name for name, case in CASES.items() if case.nodes == 1 and case.module is not Looks]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each worker found, by case."""
    folder = tmp_path_factory.mktemp("nodes")
    workers = [FORK.Process(target=main, args=(rank, folder)) for rank in range(WORKERS)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join(300)
    finally:
        for worker in workers:
            worker.kill()
    assert all(worker.exitcode == 0 for worker in workers)
    by_rank = [pickle.loads((folder / f"found{rank}").read_bytes()) for rank in range(WORKERS)]
    return {name: [own[name] for own in by_rank if name in own] for name in by_rank[0]}


def reference(case: Case) -> Found:
    return play(case, Ranks(), None)


def assert_same_weights(found: list[Found], expected: dict[str, torch.Tensor]) -> None:
    for worker in found:
        for name, value in expected.items():
            torch.testing.assert_close(
                worker.weights[name], value, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("name", ONE_NODE)
def test_one_node_is_one_process_on_the_full_batch(found, name):
    expected = reference(CASES[name])
    start = CASES[name].module().state_dict()
    assert any(not torch.equal(start[key], value) for key, value in expected.weights.items())
    assert_same_weights(found[name], expected.weights)


@pytest.mark.parametrize("name", [name for name in ONE_NODE if name != "manual"])
def test_metrics_are_those_of_one_process(found, name):
    """Means, sums and maxima over slices, and over whole batches, which count once however many workers see them."""
    expected = reference(CASES[name])
    for epoch in range(2):
        ours = MetricBoard().epoch_values([worker.train[epoch] for worker in found[name]], "epoch").logged
        theirs = MetricBoard().epoch_values([expected.train[epoch]], "epoch").logged
        assert ours == pytest.approx(theirs, rel=1e-9)
    batches = [worker.validation.by_loader for worker in found[name]]
    reports = [worker.validation.metrics for worker in found[name]]
    ours = MetricBoard().epoch_values(reports, "validation", batches).logged
    theirs = MetricBoard().epoch_values([expected.validation.metrics], "validation").logged
    assert ours == pytest.approx(theirs, rel=1e-9)
    assert ours


def test_step_values_of_the_whole_batch(found):
    expected = reference(CASES["three"])
    ours, theirs = MetricBoard(), MetricBoard()
    rows = ours.step_values([worker.steps[0].metrics for worker in found["three"]])
    assert rows
    for (step, _, values), (_, _, wanted) in zip(rows, theirs.step_values([expected.steps[0].metrics]), strict=True):
        assert values["loss_step"] == pytest.approx(wanted["loss_step"]), step


@pytest.mark.parametrize("name", ["two", "three", "one sample left", "fewer than workers", "two nodes"])
def test_predictionsin_order(found, name):
    expected = in_order(reference(CASES[name]).predictions)
    ours = in_order([item for worker in found[name] for item in worker.predictions])
    if CASES[name].nodes > 1:  # other weights
        assert [item[:2] for item in ours] == [item[:2] for item in expected]
        assert [item[2]["names"] for item in ours] == [item[2]["names"] for item in expected]
        return
    assert len(ours) == len(expected)
    for (*place, output), (*wanted_place, wanted) in zip(ours, expected, strict=True):
        assert place == wanted_place
        assert output["names"] == wanted["names"]
        torch.testing.assert_close(output["z"], wanted["z"])


@pytest.mark.parametrize("name", ["two nodes", "two nodes plain"])
def test_two_nodes_are_the_mean_of_two_nodes(found, name):
    """A hand loop: in each step the gradient of the mean of the two nodes' losses."""
    case = CASES[name]
    module, loader = case.module(), case.make_loader()
    optimizer = module.configure_optimizers()
    feeds = [Feed(loader, "train", Share(node, 2), SEED, build_settings()) for node in range(2)]
    for epoch in range(2):
        for batches in zip(*(feed.start(epoch) for feed in feeds), strict=True):
            losses = []
            for x, y in batches:
                if case.module is Plain:
                    losses.append(module.distance(x, y).mean())
                else:
                    losses.append(contrastive(module.one(x), module.other(y), module.temperature))
            optimizer.zero_grad()
            (sum(losses) / 2).backward()
            optimizer.step()
    assert_same_weights(found[name], module.state_dict())


@pytest.mark.parametrize("name", ["noisy", "noisy processes", "own sampler"])
def test_all_workers_of_a_node_read_the_same_batches(found, name):
    """Random augmentation is that of the node's batch; the workers' own streams (dropout) differ."""
    weights = [worker.weights for worker in found[name]]
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key])
    first, second = (worker.seen for worker in found[name])
    assert len(first) == len(second) == 12
    assert all(a[1] != b[1] for a, b in zip(first, second, strict=True))
    # slices of one batch: in each epoch every sample once, with noise of its own
    whole = torch.cat([x for pair in zip(first, second, strict=True) for x, _ in pair])
    assert len(whole) == 2 * 27
    assert len(torch.unique(whole, dim=0)) == (2 * 27 if CASES[name].noisy else 27)
    assert len(torch.unique(whole[:27], dim=0)) == 27
    drawn = len({own for worker in found[name] for _, own in worker.seen})
    assert drawn == 24


def test_gather(found):
    joined, message = found["gather"][0]
    parts = [torch.arange(2.0 * (rank + 1)).reshape(-1, 2) + 10 * rank for rank in (0, 2)]
    for tensor in joined["kinds"]:
        assert torch.equal(tensor, torch.cat(parts).to(tensor.dtype))
    assert len({tensor.dtype for tensor in joined["kinds"]}) == 6
    assert joined["scalar"].tolist() == [0.0, 2.0]
    assert joined["number"].tolist() == [0, 2]
    assert joined["names"] == ["0.0", "2.0", "2.1", "2.2"]
    assert joined["other"][0] is None
    assert torch.equal(joined["other"][1]["inner"], torch.cat(parts))
    for other, _ in found["gather"][1:]:
        assert torch.equal(other["other"][1]["inner"], joined["other"][1]["inner"])
    for _, said in found["gather"]:
        assert said == message
    assert "cannot be joined: local rank 0: [((1, 2), 'float32')]; local rank 1: [((4,), 'float32')]" in message
