"""Every private interface of Ray that this package uses, and what happens where it is gone.

All were seen in Ray 2.60.0. Each function says what it does without; a test takes the interface away and looks.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any

__all__ = [
    "Demand",
    "asked_to_end",
    "client_address",
    "clients_server_died",
    "demand",
    "draining",
    "end_half_started",
    "free_on_nodes",
    "internal_blocks",
    "is_workers_script",
    "lasting_blocks",
    "listed_once",
    "log_folder",
    "members_addresses",
    "pickler_by_value",
    "plan_size",
    "quiet_data_logs",
    "quiet_token_notice",
    "running_address",
    "send_token",
    "show_every_line",
    "started_by_this_process",
    "visit_shipped",
]

log = logging.getLogger("raytrainer")

#: Seconds that a cluster has to say what is waiting in it.
PATIENCE = 5.0

#: What a changed interface raises.
GONE = (ImportError, AttributeError, TypeError, KeyError, ValueError)


def _without(what: str, error: Exception) -> None:
    log.debug("Ray's interface for %s has changed; going on without.", what, exc_info=error)


# ---------------------------------------------------------------- the process and its cluster


def running_address() -> str:
    """The address of the cluster that `ray start` has made on this machine; "" where there is none.

    Without `ray._private.utils.read_ray_address`: "", so that one has to be named.
    """
    try:
        from ray._private.utils import read_ray_address

        return str(read_ray_address() or "")
    except GONE as error:
        _without("the address of a running cluster", error)
        return ""


def members_addresses() -> set[str] | None:
    """Addresses of the clusters that nodes on this machine belong to; None where Ray does not tell.

    Without `ray._private.services.find_gcs_addresses`: None.
    """
    try:
        from ray._private.services import find_gcs_addresses

        return set(find_gcs_addresses())
    except GONE as error:
        _without("nodes on this machine", error)
        return None


def client_address(client: Any) -> str:
    """HOST:PORT of a connected Ray Client.

    Without `client_worker._conn_str`: "?".
    """
    return str(getattr(getattr(client.get_context(), "client_worker", None), "_conn_str", "?"))


def clients_server_died(error: BaseException) -> bool:
    """Whether a Ray Client was refused since the server that Ray's proxy forks for it died as it started.

    That happens now and then, and the next one lives. The proxy sends its traceback as text: psutil's exception where
    it still looked for the server's command line, its own sentence otherwise. Where the text has changed: False.
    """
    words = ("Starting Ray client server failed", "ZombieProcess", "NoSuchProcess")
    return isinstance(error, ConnectionAbortedError) and any(word in str(error) for word in words)


def started_by_this_process() -> bool:
    """Whether the Ray in use was started by this very process.

    Without `ray._private.worker._global_node`: False, as if it had been attached to.
    """
    try:
        from ray._private import worker

        return bool(getattr(getattr(worker, "_global_node", None), "head", False))
    except GONE as error:
        _without("who started it", error)
        return False


def end_half_started(error: BaseException) -> None:
    """End the processes of a Ray whose start `error` has ended; Ray itself forgets them until this process ends.

    Without `ray._private.node.Node.kill_all_processes`: just that.
    """
    try:
        from ray._private.node import Node
    except GONE as changed:
        _without("its processes", changed)
        return
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    for node in {id(own): own for frame in frames if isinstance(own := frame.f_locals.get("self"), Node)}.values():
        try:
            node.kill_all_processes(check_alive=False, allow_graceful=False)
        except Exception as changed:
            _without("its processes", changed)


def asked_to_end(error: BaseException) -> bool:
    """Whether a worker's SystemExit is Ray's: for SIGTERM, or the actor's end, rather than user code's `sys.exit`.

    Without the note that Ray makes on the exception: False, and the driver ends as if user code had exited.
    """
    return isinstance(error, SystemExit) and hasattr(error, "ray_terminate_msg")


def log_folder() -> Path:
    """Where Ray keeps its workers' logs on this node; in a worker's process.

    Without `_global_node.get_logs_dir_path`: the folder for temporary files.
    """
    try:
        from ray._private import worker

        return Path(worker._global_node.get_logs_dir_path())
    except GONE as error:
        _without("its folder of logs", error)
        return Path(tempfile.gettempdir())


def is_workers_script(file: str) -> bool:
    """Whether a process with this `__main__` is one of Ray's workers, so that classes there came from elsewhere.

    Under another name: no, and a loader's processes that are spawned there do not find them, as in any process.
    """
    return Path(file).name == "default_worker.py" and "ray" in Path(file).parts


def pickler_by_value() -> Any:
    """The class that pickles what cannot be imported by name: Ray's copy of cloudpickle."""
    from ray import cloudpickle

    return cloudpickle.CloudPickler


def send_token() -> None:
    """Have this process send the token for authentication that lies ready; Ray has read the environment already.

    Without `ray._raylet.Config`: only the environment is set, and Ray may say that the cluster asks for a token.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    try:
        from ray import _raylet

        config: Any = vars(_raylet)["Config"]
        config.initialize("")
    except GONE as error:
        _without("its configuration", error)


def visit_shipped(folder: Path, excludes: list[str], handler: Callable[[Path], None]) -> None:
    """Call the handler with each path of a folder that Ray would ship. It is Ray that knows, so it is Ray's own walk.

    Without `ray._private.runtime_env.packaging._dir_travel`: no call, and Ray's own limit on sizes is the only one.
    """
    try:
        from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

        options = {"include_gitignore": True} if "include_gitignore" in signature(_dir_travel).parameters else {}
    except GONE as error:
        _without("what it ships", error)
        return
    silent = logging.Logger("silent", logging.CRITICAL + 1)  # it would tell of the handler's exception
    _dir_travel(folder, [_get_excludes(folder, excludes)], handler, logger=silent, **options)


# ---------------------------------------------------------------- resources


def free_on_nodes() -> dict[str, dict[str, float]]:
    """What nobody holds on each living node, by its id.

    Without `ray._private.state.available_resources_per_node`: nothing, so that an elastic run does not grow.
    """
    try:
        from ray._private.state import available_resources_per_node

        return dict(available_resources_per_node())
    except GONE as error:
        _without("free resources by node", error)
        return {}


def draining() -> dict[str, int]:
    """Nodes that are being drained, by id, with the time at which they go: milliseconds since 1970, 0: not said.

    Without `ray._private.state.state.get_draining_nodes`: none, so that a node that goes is lost without a word.
    """
    try:
        from ray._private.state import state

        return {str(node): int(deadline) for node, deadline in (state.get_draining_nodes() or {}).items()}
    except Exception as error:  # the connection too may fail, in ways of its own
        _without("nodes that are being drained", error)
        return {}


@dataclasses.dataclass(frozen=True)
class Demand:
    """What waits for resources in a cluster.

    Attributes:
        nodes: (total, free) of each node; empty for dead ones.
        waiting: The bundles of each task, actor or placement group that waits.
    """

    nodes: list[tuple[dict[str, float], dict[str, float]]]
    waiting: list[list[dict[str, float]]]


def demand() -> Demand | None:
    """What waits for resources now; None where Ray does not tell: to a Ray Client, say.

    Without `gcs_client.get_cluster_resource_state`: None, so that idle workers do not give way.
    """
    try:
        from ray._private import worker
        from ray.core.generated.autoscaler_pb2 import GetClusterResourceStateReply

        answer = worker.global_worker.gcs_client.get_cluster_resource_state(timeout_s=PATIENCE)
        state = GetClusterResourceStateReply.FromString(answer).cluster_resource_state
        nodes = [(dict(node.total_resources), dict(node.available_resources)) for node in state.node_states]
        asked = [[one.request] for one in state.pending_resource_requests]
        for gang in state.pending_gang_resource_requests:
            asked.append(gang.requests or [one for some in gang.bundle_selectors for one in some.resource_requests])
        return Demand(nodes, [[dict(one.resources_bundle) for one in requests] for requests in asked])
    except Exception as error:  # the connection too may fail, in ways of its own
        _without("what waits for resources", error)
        return None


@contextlib.contextmanager
def quiet_token_notice() -> Iterator[None]:
    """While entered, Ray does not tell, as a warning, that a Ray that it starts is protected by a token.

    Under another name: it tells.
    """
    notices = logging.getLogger("ray._private.authentication.authentication_token_setup")
    level = notices.level
    notices.setLevel(logging.ERROR)
    try:
        yield
    finally:
        notices.setLevel(level)


def show_every_line() -> None:
    """Have this process show lines of workers that are like earlier ones, unless RAY_DEDUP_LOGS says otherwise.

    Seen in 2.48 to 2.60. Gone: Ray leaves such lines out.
    """
    if "RAY_DEDUP_LOGS" in os.environ:
        return
    try:
        from ray._private import ray_logging

        if ray_logging.RAY_DEDUP_LOGS:
            ray_logging.RAY_DEDUP_LOGS = False
    except GONE as error:
        _without("lines that are alike", error)


# ---------------------------------------------------------------- Ray Data


def quiet_data_logs() -> None:
    """Leave out the notes that Ray Data's execution logs for every epoch. Loggers of other names are left alone."""
    for name in ("ray.data._internal.execution.streaming_executor", "ray.data._internal.progress"):
        logging.getLogger(name).setLevel(logging.ERROR)


def internal_blocks(dataset: Any) -> Iterator[tuple[Any, int]]:
    """References to the blocks of a dataset, with their rows, as they are computed.

    Without `Dataset.iter_internal_ref_bundles`: by `Dataset.to_arrow_refs`, when all are computed.
    """
    bundles = getattr(dataset, "iter_internal_ref_bundles", None)
    if bundles is not None:
        yield from _blocks_of(bundles())
        return
    import ray

    count = ray.remote(num_cpus=0)(lambda table: table.num_rows)
    for ref in dataset.to_arrow_refs():
        rows = ray.get(count.remote(ref))
        if rows:
            yield ref, rows


def _blocks_of(bundles: Iterator[Any]) -> Iterator[tuple[Any, int]]:
    for bundle in bundles:
        for entry in bundle.blocks:
            ref, metadata = (entry.ref, entry.metadata) if hasattr(entry, "ref") else entry
            if metadata.num_rows:
                yield ref, metadata.num_rows


def plan_size(dataset: Any) -> tuple[set[str] | None, int | None, int | None]:
    """The kinds of the operators in a dataset's plan, its rows and its bytes; each None where it is not known.

    Without `Dataset._logical_plan`: nothing is known, and the dataset is read anew in each epoch unless told otherwise.
    """
    try:
        plan = dataset._logical_plan.dag
        return _kinds(plan), dataset._meta_count(), plan.infer_metadata().size_bytes
    except GONE as error:
        _without("Ray Data's plans", error)
        return None, None, None


def _kinds(plan: Any) -> set[str]:
    return {type(plan).__name__}.union(*(_kinds(other) for other in plan.input_dependencies))


def paths_read(dataset: Any) -> list[str] | None:
    """The paths that a dataset of one source of local files reads from, files or folders; None: it is another one.

    Without Ray Data's plans: not known.
    """
    try:
        plan = dataset._logical_plan.dag
        while plan.input_dependencies:
            if len(plan.input_dependencies) > 1:
                return None
            plan = plan.input_dependencies[0]
        if type(plan).__name__ == "ListFiles" and _is_local(plan.filesystem):
            return [str(path) for path in plan.paths]
        if type(plan).__name__ == "Read" and _is_local(plan.datasource._filesystem):
            return [str(path) for path in plan.datasource._pq_paths]
        return None
    except GONE as error:
        log.debug("the paths of a dataset are not known", exc_info=error)
        return None


def _is_local(filesystem: Any) -> bool:
    """Whether its paths are those of this machine; not where they are another's, or begin in some folder."""
    unwrap = getattr(filesystem, "unwrap", None)
    inner = unwrap() if callable(unwrap) else filesystem
    return inner is None or getattr(inner, "type_name", "") == "local"


def listed_once(dataset: Any) -> tuple[Any, int | None, int | None]:
    """The dataset with its Parquet files listed once, instead of in every epoch; its rows and bytes, where known.

    The default reader (`DataContext.use_datasource_v2`) lists files and reads footers at the start of each execution,
    which takes seconds. Without Ray Data's plans: the dataset as it is, and those seconds in every epoch.
    """
    try:
        return _listed_once(dataset)
    except GONE as error:
        _without("listing files", error)
        return dataset, None, None


def _listed_once(dataset: Any) -> tuple[Any, int | None, int | None]:
    import ray
    import ray.data
    from ray.data._internal.logical.interfaces import LogicalPlan
    from ray.data._internal.logical.operators import InputData

    plan, rows, size = dataset._logical_plan.dag, 0, 0
    kinds = _kinds(plan)
    if "ListFiles" not in kinds or "Limit" in kinds or "Filter" in kinds:  # Ray Data pushes these into the listing
        return dataset, None, None

    def once(operator: Any) -> Any:
        nonlocal rows, size
        if type(operator).__name__ != "ListFiles" or operator.shuffle_config_factory() is not None:
            return operator
        listing = ray.data.Dataset._from_parent(dataset, LogicalPlan(_with_few_actors(operator), dataset.context))
        bundles = list(listing.iter_internal_ref_bundles())
        for ref, _ in _blocks_of(iter(bundles)):
            for chunk in ray.get(ref)["__file_chunk_metadata"].to_pylist():
                rows, size = rows + chunk["num_rows"], size + chunk["uncompressed_size"]
        return InputData(input_data=bundles)

    plan = plan._apply_transform(once)
    dataset = ray.data.Dataset._from_parent(dataset, LogicalPlan(plan, dataset.context))
    exact = kinds <= {"ListFiles", "ReadFiles", "Project"} and getattr(plan, "block_udf", None) is None
    return dataset, rows if exact and rows else None, size or None


def _with_few_actors(operator: Any) -> Any:
    """The operator that lists files, reading footers by an actor for every eight CPUs.

    Ray Data starts 32 (and ends them), which takes a machine of two cores 2 s. Each reads the files of one batch at
    once, so larger batches make up for fewer actors.
    """
    import ray

    most = max(1, int(ray.cluster_resources().get("CPU", 1)) // 8)
    indexer = copy.copy(operator.file_indexer)
    usual = getattr(indexer, "_num_actors", 0)
    if usual <= most:
        return operator
    indexer._num_actors = most
    indexer._footer_batch_size = min(indexer._io_concurrency, indexer._footer_batch_size * usual // most)
    return dataclasses.replace(operator, file_indexer=indexer)


def lasting_blocks(dataset: Any) -> Any:
    """The dataset with as many blocks as its size asks for, not as the cluster's CPUs do.

    A run that goes on in the middle of an epoch must meet the same blocks, also where there are fewer CPUs than before.
    Without Ray Data's plans: the dataset as it is, which holds for the same number of CPUs only.
    """
    try:
        return _lasting_blocks(dataset)
    except GONE as error:
        _without("the number of blocks", error)
        return dataset


def _lasting_blocks(dataset: Any) -> Any:
    import ray.data
    from ray.data._internal.logical.interfaces import LogicalPlan
    from ray.data._internal.util import _autodetect_parallelism

    context = dataset.context

    def fixed(operator: Any) -> Any:
        if type(operator).__name__ != "Read" or operator.parallelism != -1:
            return operator
        blocks, _, _ = _autodetect_parallelism(
            -1, context.target_max_block_size, context, operator.datasource_or_legacy_reader, avail_cpus=1
        )
        return dataclasses.replace(operator, parallelism=blocks)

    plan = dataset._logical_plan.dag
    if "Read" not in _kinds(plan):
        return dataset
    return ray.data.Dataset._from_parent(dataset, LogicalPlan(plan._apply_transform(fixed), context))
