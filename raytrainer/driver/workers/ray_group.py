"""`RayGroup`: workers as Ray actors in reserved places, kept warm between runs."""

from __future__ import annotations

import contextlib
import logging
import pickle
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytrainer.driver.cluster.placement import Request
from raytrainer.driver.cluster.reservation import place
from raytrainer.driver.cluster.session import place_name, started_here
from raytrainer.errors import (
    CheckpointError,
    ConfigurationError,
    SerializationError,
    StateLostError,
    WorkerError,
    WorkerLostError,
)
from raytrainer.packing import pack, unpack
from raytrainer.plan.failures import Failed, choose_culprit, is_consequence
from raytrainer.plan.ranks import Ranks, assign_ranks
from raytrainer.plan.versions import differences
from raytrainer.task import Task
from raytrainer.worker.actor.actor import ASIDE, Failure, Place, RemoteWorker, StagingWorker, own_versions

__all__ = ["RayGroup", "Request"]

log = logging.getLogger("raytrainer")

#: Seconds that other workers get to answer after one has failed: long enough to tell cause from consequence.
GRACE = 2.0

#: Seconds that workers get to hand over a state before they are killed, and to give memory back before the next run.
PATIENCE = 10.0

#: Verbs whose length the driver chooses, so that silence means a hang. Set-up may take as long as it takes.
_WATCHED = frozenset({"train", "report_steps", "evaluate", "prepare_capture"})


class RayGroup:
    """Actors that form one torch.distributed group.

    Args:
        request: What to ask Ray for.
        timeout: Seconds to wait for the resources.

    Raises:
        ResourceError: The cluster does not give them within `timeout`.
    """

    in_process = False

    def __init__(self, request: Request, timeout: float = 60.0) -> None:
        self.request = request
        self.size = request.nodes * request.per_node
        self._handing: list[Any] = []  # answered when the newest state is in Ray's shared memory
        self._resting: list[Any] = []  # answered when nothing is left of the latest run
        self.session = ray.get_runtime_context().gcs_address
        self.broken = False
        self.hang_timeout: float | None = None  # seconds; of the run in progress
        self.stale = False  # the process group may hold half a collective: join anew before the next run
        self._slots = place(request, timeout)
        try:
            self._start()
        except BaseException:
            self.abort()
            raise

    # ---------------------------------------------------------------- start

    def _start(self) -> None:
        request = self.request
        if self.stages:
            actor_class = ray.remote(concurrency_groups={ASIDE: 1})(StagingWorker)
        else:
            actor_class = ray.remote(RemoteWorker)
        self._actors = [
            actor_class.options(
                num_cpus=slot.cpus,
                num_gpus=1 if request.gpu else 0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    slot.group, placement_group_bundle_index=slot.bundle
                ),
            ).remote()
            for slot in self._slots
        ]
        self.ranks = [Ranks(rank=i, world_size=self.size) for i in range(self.size)]
        self.outputs: list[str | None] = [None] * self.size
        self.places: list[Place] = []
        places: list[Place] = self._ask([actor.where.remote(request.gpu) for actor in self._actors])
        # node by node in the order of addresses, and by GPU on each
        order = sorted(range(self.size), key=lambda i: (_numbers(places[i].address), places[i].node_id, places[i].gpus))
        self._actors = [self._actors[i] for i in order]
        self.places = [places[i] for i in order]
        self.ranks = assign_ranks([place.node_id for place in self.places])
        self._compare_versions()
        self._join()

    def _compare_versions(self) -> None:
        """Name what differs between driver and nodes.

        Raises:
            ConfigurationError: It cannot work.
        """
        fatal, doubtful = differences(own_versions(), {place.address: place.versions for place in self.places})
        if fatal:
            raise ConfigurationError(
                f"The driver and the nodes run different versions: {'; '.join(fatal)}. Install the same on both."
            )
        if doubtful:
            log.warning("The driver and the nodes run different versions: %s.", "; ".join(doubtful))

    def _join(self) -> None:
        """Form the process group."""
        one_node = self.ranks[0].num_nodes == 1
        # on one machine the loopback interface is fast and always there
        host = "127.0.0.1" if one_node else self.places[0].address
        port = self._ask([self._actors[0].serve.remote(host, self.size)])[0] if self.size > 1 else 0
        self._ask(
            [
                actor.join.remote(ranks, host, port, host if one_node else place.address, self.request.gpu)
                for actor, ranks, place in zip(self._actors, self.ranks, self.places, strict=True)
            ]
        )
        self.stale = False

    @property
    def by_node(self) -> Mapping[str, int]:
        """Workers on each node, by its id."""
        return Counter(place.node_id for place in self.places)

    @property
    def holds(self) -> set[str]:
        """What others could have if this group ended; nothing where its reservations are somebody else's."""
        if all(slot.borrowed for slot in self._slots):
            return set()
        return {"CPU", "GPU"} if self.request.gpu else {"CPU"}

    @property
    def stages(self) -> bool:
        """Whether workers are `StagingWorker`s."""
        return self.request.gpu

    def describe(self) -> str:
        """E.g. "4 workers on 2 nodes of 10.0.0.1:6379: h1 gpu 0,1; h2 gpu 0,1"."""
        nodes = []
        for node, count in self.by_node.items():
            here = [place for place in self.places if place.node_id == node]
            gpus = [str(index) for place in here for index in place.gpus]
            nodes.append(f"{here[0].host} gpu {','.join(gpus)}" if gpus else f"{here[0].host} cpu x{count}")
        workers = f"{self.size} worker{'s' if self.size > 1 else ''}"
        of = "" if started_here() else f" of {place_name()}"
        return f"{workers} on {len(nodes)} node{'s' if len(nodes) > 1 else ''}{of}: {'; '.join(nodes)}"

    # ---------------------------------------------------------------- verbs

    def setup(self, task: Task) -> list[Any]:
        """Send the task, pickled once; `prepare_data` once a node; `setup` on every worker."""
        if self.stale:
            self._join()
        self.hang_timeout = task.settings.hang_timeout
        for blocks in (blocks for stage in task.datasets.values() for blocks in stage):
            blocks.renew()
        pickled, datasets = ray.put(_pickle(task)), ray.put(task.datasets)
        show = task.settings.worker_output == "all"
        self.outputs = self._ask([actor.load.remote(pickled, datasets, show) for actor in self._actors])
        first = [ranks.rank for ranks in self.ranks if ranks.local_rank == 0]
        self._ask([self._actors[rank].obey.remote("prepare_data") for rank in first], ranks=first)
        return self.call("setup")

    def call(self, verb: str, *args: Any) -> list[Any]:
        """Every worker obeys `verb`."""
        if verb == "restore":
            args = (ray.put(pack(args[0])),)  # once, however many workers there are
        patience = self.hang_timeout if verb in _WATCHED else None
        return self._ask([actor.obey.remote(verb, *args) for actor in self._actors], patience)

    def capture(self, weights_only: bool = False) -> Callable[[], list[dict[str, Any]]]:
        """Have the state copied into Ray's shared memory; return what fetches it from there.

        The copies are return values of actor calls: the driver owns them, so they outlive the actor. On several nodes
        a second node holds one too.
        """
        if not self.stages:
            refs = [actor.capture.remote(weights_only) for actor in self._actors]
            self._ask([own for own, _ in refs], self.hang_timeout)
            return lambda: self._fetch(refs)
        # one state at a time, so that memory stays bounded
        self._ask(self._handing, self.hang_timeout)
        own = [actor.stage.remote(weights_only) for actor in self._actors]
        self._ask(own, self.hang_timeout)
        handed = [actor.hand_over.remote() for actor in self._actors]
        self._handing = [done for _, done in handed]
        refs = [(mine, common) for mine, (common, _) in zip(own, handed, strict=True)]
        return lambda: self._fetch(refs)

    def _fetch(self, refs: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
        """Every worker's part of a state: (its own, the common one).

        Raises:
            StateLostError: A worker died before it had handed over its own part, or all copies of the common one are
                gone.
        """
        parts = []
        for rank, (own, common) in enumerate(refs):
            try:
                part = ray.get(own)
            except RayError as error:
                raise self._lost(f"rank {rank} had not yet handed over its part of the state ({error})") from None
            if isinstance(part, Failure):
                raise self._lost(f"rank {rank}'s part of the state: {part.message}")
            found = {} if part is None else {"own": unpack(part)}
            try:
                rest = ray.get(common)
                if isinstance(rest, Failure):
                    raise self._lost(f"rank {rank}'s part of the state: {rest.message}")
                found |= unpack(rest)
            except RayTaskError as error:
                raise CheckpointError(f"rank {rank} cannot hand over its state: {error}") from None
            except RayError:
                log.info("The state that rank %d kept is gone with its node; another has one too.", rank)
            parts.append(found)
        if not any("state_dict" in part for part in parts):
            raise self._lost("all copies of the state are gone")
        return parts

    def _lost(self, reason: str) -> StateLostError:
        return StateLostError(reason, lambda: self.broken)

    def _ask(self, refs: Sequence[Any], patience: float | None = None, ranks: Sequence[int] | None = None) -> list[Any]:
        """All answers, in order; or the one failure to tell about, as soon as it can be told.

        Args:
            refs: One reference a worker.
            patience: Seconds to wait for the answers; without one after that, the workers count as lost.
            ranks: The workers' ranks; None: they are the first ones, in order.
        """
        of = dict(zip(refs, range(len(refs)) if ranks is None else ranks, strict=True))
        answers: dict[Any, Any] = {}
        pending = list(refs)
        deadline = None if patience is None else time.monotonic() + patience
        failed = False
        while pending:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, pending = ray.wait(pending, num_returns=1, timeout=left)
            if not ready:
                break
            answer = self._answer(ready[0], of[ready[0]])
            answers[ready[0]] = answer
            if isinstance(answer, WorkerLostError):
                break  # the others may hang for ever
            if isinstance(answer, Failure) and not failed:
                failed, deadline = True, time.monotonic() + GRACE
        failures: list[Failure | WorkerLostError]
        failures = [a for a in answers.values() if isinstance(a, (Failure, WorkerLostError))]
        if pending and not failures:
            silent = [of[ref] for ref in refs if ref in pending]
            failures = [
                WorkerLostError(silent[0], f"no answer from rank(s) {silent} for {patience:.0f} s (hang_timeout)")
            ]
        if failures:
            self._raise(failures, hanging=len(pending))
        return [answers[ref] for ref in refs]

    def _answer(self, ref: Any, rank: int) -> Any:
        try:
            return ray.get(ref)
        except OutOfMemoryError as error:
            remedy = "Use smaller batches, fewer workers or loader processes on a node, or nodes with more memory."
            return WorkerLostError(
                rank, f"killed for its memory: {_lines(error)[0]}{self._whereabouts(rank)}. {remedy}"
            )
        except RayActorError as error:
            lines = _lines(error)
            # an actor that could not start says why in its last line: a package that its node lacks, say
            if "creation task" in lines[0] and len(lines) > 1:
                missing = "No module named" in lines[-1]
                remedy = ". Install it there, in the Python that `ray start` ran in" if missing else ""
                return WorkerLostError(rank, f"it could not start: {lines[-1]}{remedy}")
            return WorkerLostError(rank, lines[0] + self._whereabouts(rank))
        except RayError as error:
            return WorkerLostError(rank, f"{type(error).__name__}: {error}{self._whereabouts(rank)}")

    def _whereabouts(self, rank: int) -> str:
        """Where a lost worker was, and where its last words are."""
        if not self.places:
            return ""
        place, output = self.places[rank], self.outputs[rank]
        return f" (on {place.host}, {place.address}{f'; its output: {output}' if output else ''})"

    def _raise(self, failures: Sequence[Failure | WorkerLostError], hanging: int) -> None:
        """Raise the failure that caused the others. Workers that all still answer are kept for the next run."""
        by_rank = {failure.rank: failure for failure in failures}
        culprit = by_rank[
            choose_culprit(
                [
                    Failed(f.rank, "lost")
                    if isinstance(f, WorkerLostError)
                    else Failed(f.rank, "raised", f.type_name, f.message)
                    for f in failures
                ]
            ).rank
        ]
        if hanging or any(isinstance(failure, WorkerLostError) for failure in failures):
            self.abort()
        else:
            self.stale = True
        if isinstance(culprit, WorkerLostError):
            raise culprit
        if is_consequence(Failed(culprit.rank, "raised", culprit.type_name, culprit.message)):
            self.abort()
            raise WorkerLostError(culprit.rank, f"communication with the others failed: {culprit.message}")
        where = WorkerError(culprit.rank, culprit.node, culprit.traceback)
        try:
            original = pickle.loads(culprit.pickled) if culprit.pickled is not None else None
        except Exception:
            original = None
        if isinstance(original, BaseException):
            raise original from where
        raise where

    # ---------------------------------------------------------------- end

    @property
    def usable(self) -> bool:
        """Whether a new run may use it: the same Ray is still there, and every actor answers."""
        if self.broken or not self._ray_is_there():
            return False
        try:
            if self._resting:
                ray.wait(self._resting, num_returns=len(self._resting), timeout=PATIENCE)
            ray.get([actor.obey.remote("abandon") for actor in self._actors], timeout=5.0)
        except RayError:
            self.abort()
            return False
        return True

    def _ray_is_there(self) -> bool:
        """Whether the Ray in use is the one that this group is of."""
        return bool(ray.is_initialized() and ray.get_runtime_context().gcs_address == self.session)

    def call_off(self) -> None:
        """After an error of the driver's side: workers are between verbs, and the next run starts afresh."""
        self.stale = True

    def abort(self) -> None:
        """Kill the actors and give the resources back."""
        if self.broken:
            return  # Ray never answers when a placement group is removed for a second time
        self.broken = True
        if not self._ray_is_there():
            return  # it went with its Ray
        try:
            if self._handing:  # workers that live still hand over the newest state, whatever else they wait for
                with contextlib.suppress(RayError):
                    ray.wait(self._handing, num_returns=len(self._handing), timeout=PATIENCE)
        finally:
            for actor in getattr(self, "_actors", []):
                with contextlib.suppress(RayError):
                    ray.kill(actor)
            for group in {slot.group.id: slot.group for slot in self._slots if not slot.borrowed}.values():
                with contextlib.suppress(RayError):
                    remove_placement_group(group)

    def release(self) -> None:
        """Hand the group back to the pool, for the next run that asks for the same."""
        from raytrainer.driver.workers import idle_pool as pool

        try:
            if not self.broken and self._ray_is_there():
                self._resting = [actor.obey.remote("rest") for actor in self._actors]
        except Exception as error:  # of a Ray Client that has lost its cluster; the run is over all the same
            log.debug("Workers could not be told that the run is over", exc_info=error)
        pool.put_back(self)


def _lines(error: RayError) -> list[str]:
    """What Ray says, without empty lines; at least one."""
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]


def _numbers(address: str) -> list[tuple[int, str]]:
    """A key that sorts 10.0.0.9 before 10.0.0.10."""
    return [(int(part) if part.isdigit() else -1, part) for part in address.split(".")]


def _pickle(task: Task) -> bytes:
    """The task, pickled by value where workers could not import it.

    Raises:
        SerializationError: Names the attribute that cannot be pickled.
    """
    try:
        pickled: bytes = cloudpickle.dumps(task)
        return pickled
    except Exception as error:
        culprit = _unpicklable(task)
        if ".hparams." in culprit:
            remedy = "Leave it out of the hyperparameters: save_hyperparameters(ignore=[...])."
        else:
            remedy = (
                "Create it in setup(stage), which runs in each worker, or leave it out of pickling with __getstate__."
            )
        raise SerializationError(
            f"{culprit} cannot be sent to the workers: {type(error).__name__}: {error}. {remedy}"
        ) from None


def _unpicklable(task: Task) -> str:
    """The innermost attribute that cannot be pickled, as a path such as "MyModule.reader.handle"."""
    roots = {"module": task.module, "datamodule": task.datamodule, "loader": task.loaders, "callback": task.callbacks}
    for name, root in roots.items():
        if _fails(root):
            path, value = type(root).__name__ if name in ("module", "datamodule") else name, root
            for _ in range(8):
                inner = next(((n, v) for n, v in _children(value) if _fails(v)), None)
                if inner is None:
                    break
                path, value = f"{path}.{inner[0]}", inner[1]
            return f"{path} (a {type(value).__name__})"
    return "the task"


def _children(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(str(k), v) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return [(str(i), v) for i, v in enumerate(value)]
    state = value.__getstate__()
    attributes = dict(state) if isinstance(state, dict) else {}
    modules = attributes.pop("_modules", None) or {}
    # last, so that what is an attribute too is named as that
    saved = [("hparams", attributes.pop(name)) for name in ("_hparams", "_hparams_initial") if name in attributes]
    return [*attributes.items(), *modules.items(), *saved]


def _fails(value: Any) -> bool:
    try:
        cloudpickle.dumps(value)
    except Exception:
        return True
    return False
