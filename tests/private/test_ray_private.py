"""Ray's private interfaces, taken away one by one: what happens then."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import ray._private.services
import ray._private.state
import ray._private.utils
import ray._private.worker
import ray.data._internal.logical.interfaces
import ray.data._internal.util

from raytrainer.driver.cluster import resources, session
from raytrainer.private import ray_private


class Bare:
    """What stands for an object that has lost its private parts."""


def without(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
    assert hasattr(owner, name), f"this Ray has no {name}: the test takes nothing away"
    monkeypatch.delattr(owner, name)


def test_no_running_cluster_is_known(monkeypatch):
    without(monkeypatch, ray._private.utils, "read_ray_address")
    assert ray_private.running_address() == ""
    assert session._running_here() is None


def test_members_are_not_known(monkeypatch):
    without(monkeypatch, ray._private.services, "find_gcs_addresses")
    assert ray_private.members_addresses() is None


def test_a_client_without_its_address():
    client = SimpleNamespace(get_context=lambda: SimpleNamespace(client_worker=SimpleNamespace(_conn_str="h:1")))
    assert ray_private.client_address(client) == "h:1"
    assert ray_private.client_address(SimpleNamespace(get_context=Bare)) == "?"


def test_who_started_it_is_not_known(monkeypatch):
    without(monkeypatch, ray._private.worker, "_global_node")
    assert ray_private.started_by_this_process() is False
    assert ray_private.log_folder() == Path(tempfile.gettempdir())


def test_a_token_is_left_to_the_environment(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setitem(sys.modules, "ray._raylet", SimpleNamespace())  # type: ignore[misc]
    monkeypatch.setattr(ray, "_raylet", SimpleNamespace())
    ray_private.send_token()
    import os

    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_that_a_ray_is_protected_is_no_alarm(monkeypatch, caplog):
    setup = pytest.importorskip("ray._private.authentication.authentication_token_setup", reason="an older Ray")
    monkeypatch.setattr(setup.logger, "propagate", True)
    for _ in range(2):
        with ray_private.quiet_token_notice():
            setup._warn_token_auth_enabled()
        assert caplog.text == ""
    setup._warn_token_auth_disabled()
    assert "Anyone" in caplog.text


def test_lines_that_are_alike(monkeypatch):
    from ray._private import ray_logging

    monkeypatch.setattr(ray_logging, "RAY_DEDUP_LOGS", True)
    monkeypatch.setenv("RAY_DEDUP_LOGS", "1")
    ray_private.show_every_line()
    assert ray_logging.RAY_DEDUP_LOGS
    monkeypatch.delenv("RAY_DEDUP_LOGS")
    ray_private.show_every_line()
    assert ray_logging.RAY_DEDUP_LOGS is False
    line = {"ip": "1.2.3.4", "pid": 7, "lines": ["loss 1", "loss 2"]}
    shown = ray_logging.LogDeduplicator(5, None, None)
    assert [shown.deduplicate(line | {"pid": pid}) for pid in (7, 8)] == [[line], [line | {"pid": 8}]]
    monkeypatch.delattr(ray_logging, "RAY_DEDUP_LOGS")
    ray_private.show_every_line()


def test_nothing_is_visited(monkeypatch, tmp_path):
    (tmp_path / "a.py").touch()
    seen: list[Path] = []
    ray_private.visit_shipped(tmp_path, [], seen.append)
    assert tmp_path / "a.py" in seen
    seen.clear()
    import ray._private.runtime_env.packaging as packaging

    without(monkeypatch, packaging, "_dir_travel")
    ray_private.visit_shipped(tmp_path, [], seen.append)
    assert seen == []


def test_free_resources_are_not_known(monkeypatch):
    without(monkeypatch, ray._private.state, "available_resources_per_node")
    assert ray_private.free_on_nodes() == {}


def test_nodes_that_go_are_not_known(monkeypatch):
    monkeypatch.setattr(ray._private.state, "state", SimpleNamespace(get_draining_nodes=lambda: {"a": 5, "b": 0}))
    assert ray_private.draining() == {"a": 5, "b": 0}
    monkeypatch.setattr(ray._private.state, "state", Bare())
    assert ray_private.draining() == {}


def test_demand_is_not_known(monkeypatch):
    monkeypatch.setattr(ray._private.worker, "global_worker", Bare())
    assert ray_private.demand() is None
    assert resources.somebody_waits({"CPU"}) is False


class Blocks:
    """A dataset of two blocks, one of them empty, with or without what is private."""

    def __init__(self, private: bool) -> None:
        if private:
            metadata = [SimpleNamespace(num_rows=rows) for rows in (3, 0)]
            bundle = SimpleNamespace(blocks=list(zip("ab", metadata, strict=True)))
            self.iter_internal_ref_bundles = lambda: iter([bundle])


def test_blocks_are_had_by_public_means(monkeypatch):
    assert list(ray_private.internal_blocks(Blocks(private=True))) == [("a", 3)]
    tables = {"a": SimpleNamespace(num_rows=3), "b": SimpleNamespace(num_rows=0)}
    plain = Blocks(private=False)
    plain.to_arrow_refs = lambda: list(tables)  # type: ignore[attr-defined]
    # Ray's part in it: a task for each block, whose answer is fetched
    remote = lambda **options: lambda function: SimpleNamespace(remote=lambda ref: function(tables[ref]))  # noqa: E731
    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    assert list(ray_private.internal_blocks(plain)) == [("a", 3)]


def test_plans_are_not_known():
    assert ray_private.plan_size(Bare()) == (None, None, None)
    dataset = Bare()
    assert ray_private.listed_once(dataset) == (dataset, None, None)
    assert ray_private.lasting_blocks(dataset) is dataset


@pytest.mark.parametrize("gone", ["LogicalPlan", "_autodetect_parallelism"])
def test_plans_that_cannot_be_changed_stay(gone, monkeypatch):
    module = ray.data._internal.logical.interfaces if gone == "LogicalPlan" else ray.data._internal.util
    without(monkeypatch, module, gone)
    dag = SimpleNamespace(input_dependencies=[])
    dataset = SimpleNamespace(_logical_plan=SimpleNamespace(dag=dag), context=None)
    assert ray_private.lasting_blocks(dataset) is dataset


def test_processes_of_a_workers_loader():
    """Which processes are Ray's workers is told by the name of their script; that name, and nothing else."""
    from ray._private import workers

    folder = Path(next(iter(workers.__path__)))
    assert (folder / "default_worker.py").exists() and ray_private.is_workers_script(str(folder / "default_worker.py"))
    assert not ray_private.is_workers_script("/home/me/train.py")
