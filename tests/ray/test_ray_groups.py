"""Worker groups last: reused while resources are the same, released when closed, idle, or no longer well."""

from __future__ import annotations

import gc
import logging
import os
import signal
import weakref

import pytest
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from ray_models import Net, Where, alive, assert_same, eventually, loader, moved, numbers

from raytrainer import ConfigurationError, ResourceError
from raytrainer.driver.cluster.session import Cluster, ensure_ray
from raytrainer.driver.workers import idle_pool as pool

ends_workers = pytest.mark.late(2.2)


@pytest.fixture
def where(tmp_path):
    return Where(tmp_path / "where")


def fit(trainer, module):
    trainer.fit(module, loader(16, 4))


def test_runs_share_their_workers(ray_trainer, where):
    trainer = ray_trainer(max_epochs=1)
    fit(trainer, where)
    first = where.taken()
    assert len(set(first)) == 2
    fit(trainer, where)
    assert where.taken() == first
    trainer.validate(where, loader(16, 4), verbose=False)
    assert where.taken() == first
    another = ray_trainer(max_epochs=2, seed=4, gradient_clip_val=1.0)
    another.predict(where, numbers(4, 1, collate_fn=lambda samples: torch.ones(1, 4)))
    assert where.taken() == first
    # asked for as "ddp_cpu", or as "ddp_spawn", the resources are the same
    fit(ray_trainer(strategy="ddp_cpu", max_epochs=1), where)
    assert where.taken() == first


def test_ddp_spawn_is_explained(ray_trainer, caplog):
    with caplog.at_level(logging.INFO, "raytrainer"):
        trainer = ray_trainer(strategy="ddp_spawn", max_epochs=1)
    assert "actors" in caplog.text and '"ddp"' in caplog.text
    fit(trainer, Net())
    assert trainer.world_size == 2


@pytest.mark.late(2.05)  # starts two, and leaves them to the next one
def test_a_reused_group_and_a_fresh_one_give_the_same_bits(ray_trainer):
    class Untidy(Net):
        """Leaves much behind in its process."""

        def on_fit_end(self):
            torch.manual_seed(99)
            self.body[0].weight.data.zero_()

    def run() -> Net:
        module = Net(dropout=0.3)
        ray_trainer(max_epochs=2, seed=3).fit(module, loader(32, 4, shuffle=True), loader(8, 4))
        return module

    pool.close_idle()
    fresh, reused = run(), run()
    ray_trainer(max_epochs=1, deterministic=True, precision=64, detect_anomaly=True).fit(Untidy(), loader(16, 4))
    after_another = run()
    assert_same(fresh, reused)
    assert_same(fresh, after_another)
    assert moved(Net(), fresh)


class Remembered(Net):
    """Knows what of the run before in the same process is still there, where nobody has looked for cycles since."""

    def setup(self, stage: str) -> None:
        held = torch.__dict__.pop("_test_held", None)
        self.second = held is not None
        self.left = [name for name, thing in held or () if thing() is not None]
        gc.disable()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 1:
            things = {"module": self, "optimizer": self.trainer.optimizers[0], "gradient": self.body[0].weight.grad}
            torch.__dict__["_test_held"] = [(name, weakref.ref(thing)) for name, thing in things.items()]

    def teardown(self, stage: str) -> None:
        if self.second:
            del torch.__dict__["_test_held"]
            gc.enable()


@pytest.mark.late(2.06)  # while there are two
def test_idle_workers_hold_nothing_of_their_runs(ray_trainer):
    """Tensors would else stay until Python looks for cycles, which they do not make it do, however large they are."""
    for second in (False, True):
        module = Remembered()
        fit(ray_trainer(max_epochs=1), module)
        assert module.second == second and module.left == []


@pytest.mark.sample(0)
@pytest.mark.late(3)
def test_other_resources_get_another_group(ray_trainer, where):
    """The session's Ray has four CPUs: room for one worker beside the two, but not for three."""
    fit(ray_trainer(max_epochs=1), where)
    pair = where.taken()
    single = ray_trainer(max_epochs=1, num_processes=1)
    fit(single, where)
    (alone,) = where.taken()
    assert alone not in pair and single.world_size == 1
    fit(ray_trainer(max_epochs=1), where)
    assert where.taken() == pair, "they stayed"
    fit(ray_trainer(max_epochs=1, num_processes=3), where)
    assert len(where.taken()) == 3
    # the others were released, lest they hold what is asked for
    eventually(lambda: not any(map(alive, [alone, *pair])), "the others end")


def test_another_address_than_the_one_in_use(ray_session):
    ensure_ray(Cluster(ray_session), 1)
    ensure_ray(Cluster(ray_session.replace(ray_session.rpartition(":")[0], "localhost")), 1)
    ensure_ray(Cluster(None), 1)
    with pytest.raises(ConfigurationError, match=r"uses the Ray at .* already"):
        ensure_ray(Cluster("10.9.9.9:6379"), 1)


@pytest.mark.sample(0)
@ends_workers
def test_idle_workers_give_way_to_others(ray_trainer, where, monkeypatch, caplog):
    """The session's Ray has four CPUs; Ray reports what waits for them about once a second."""
    monkeypatch.setattr(pool, "LOOK_EVERY", 0.1)
    monkeypatch.setattr(pool, "GIVE_WAY", 0.5)
    reserved = []

    def let_wait(ask):
        fit(ray_trainer(max_epochs=1), where)
        pids = where.taken()
        caplog.clear()
        with caplog.at_level(logging.INFO, "raytrainer"):
            ray.get(ask(), timeout=30)
        assert "others wait for their CPU" in caplog.text
        eventually(lambda: not any(map(alive, pids)), "idle workers end")

    let_wait(lambda: ray.remote(num_cpus=3)(lambda: 1).remote())
    try:
        let_wait(lambda: reserved.append(placement_group([{"CPU": 2}] * 2)) or reserved[0].ready())
    finally:
        remove_placement_group(reserved[0])


# the rest with one worker, which starts sooner; each leaves it to the next one where it can


@ends_workers
def test_too_many_workers(ray_trainer, caplog):
    """An error that says what was asked and what there is."""
    options = {"max_epochs": 1, "placement_timeout": 0.2}
    with pytest.raises(ResourceError, match=r"9 worker\(s\) on each of 1 node.*CPU \d of 4 free on 1 node"):
        fit(ray_trainer(num_processes=9, **options), Net())
    with pytest.raises(ResourceError, match=r"2 node\(s\)"):
        fit(ray_trainer(num_nodes=2, num_processes=1, **options), Net())
    trainer = ray_trainer(num_processes=1, max_epochs=1)
    fit(trainer, Net())
    assert trainer.state.finished


@ends_workers
def test_auto_uses_the_ray_that_is_there(ray_session, one_process, where):
    trainer = one_process(strategy="auto", max_epochs=1)
    fit(trainer, where)
    assert where.taken() != [os.getpid()]
    assert trainer.settings.strategy == "ddp"


@ends_workers
def test_workers_that_died_while_idle_are_replaced(ray_trainer, where):
    trainer = ray_trainer(max_epochs=1, num_processes=1)
    fit(trainer, where)
    (pid,) = where.taken()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not alive(pid), "it is dead")
    fit(trainer, where)
    assert where.taken() != [pid]


@ends_workers
def test_close_and_with_release(ray_trainer, where):
    trainer = ray_trainer(max_epochs=1, num_processes=1)
    fit(trainer, where)
    closed = where.taken()
    trainer.close()
    eventually(lambda: not any(map(alive, closed)), "closed workers end")
    with trainer:
        fit(trainer, where)  # a closed trainer may run again
        pids = where.taken()
        assert pids != closed and all(map(alive, pids))
    eventually(lambda: not any(map(alive, pids)), "workers end with the block")


@ends_workers
def test_idle_workers_are_released(ray_trainer, where):
    pool.close_idle()
    fit(ray_trainer(max_epochs=1, num_processes=1, idle_timeout=0.3), where)
    pids = where.taken()
    eventually(lambda: not any(map(alive, pids)), "idle workers end")
    eventually(lambda: ray.available_resources().get("CPU") == 4.0, "their CPUs are free")
