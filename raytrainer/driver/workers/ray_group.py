"""`RayGroup`: workers as Ray actors in reserved places, kept warm between runs."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytrainer.checkpointing.piece_files import brought_along
from raytrainer.driver.cluster.placement_rules import Request, Slot
from raytrainer.driver.cluster.reservation import place, remove
from raytrainer.driver.cluster.session import place_name, started_here
from raytrainer.driver.workers.edited_modules import EditedModules
from raytrainer.driver.workers.group_text import described
from raytrainer.driver.workers.ray_answers import Answers
from raytrainer.driver.workers.ray_captures import RayCaptures
from raytrainer.driver.workers.ray_whereabouts import ask_where
from raytrainer.driver.workers.task_pickling import packed_verb, pickle_task
from raytrainer.errors import ConfigurationError
from raytrainer.messages import SetupReport
from raytrainer.plan.ranks import Ranks, assign_ranks
from raytrainer.plan.versions import differences
from raytrainer.plan.where_it_is import Whereabouts
from raytrainer.signals import shield, wait_until
from raytrainer.task import Task
from raytrainer.tensor_packing import pack
from raytrainer.worker.actor.actor import ASIDE, Place, RemoteWorker, StagingWorker, own_versions
from raytrainer.worker.verbs import Verb, Wait, verb_of
from raytrainer.worker.worker import Worker

__all__ = ["RayGroup"]

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger("raytrainer")

#: Seconds that workers get to hand over a state before they are killed, and to give memory back before the next run.
PATIENCE = 10.0

#: Seconds for a worker's process to start, its runtime environment included, and for all to join the group.
START = 1800.0


class RayGroup:
    """Actors that form one torch.distributed group.

    Args:
        request: What to ask Ray for.
        timeout: Seconds to wait for the resources.
        slots: Places for all workers, where they have been reserved already.

    Raises:
        ResourceError: The cluster does not give them within `timeout`.
    """

    in_process = False

    def __init__(self, request: Request, timeout: float = 60.0, slots: list[Slot] | None = None) -> None:
        self.request = request
        self.size = request.nodes * request.per_node
        self._resting: list[Any] = []  # answered when nothing is left of the latest run
        self.session = ray.get_runtime_context().gcs_address
        self.broken = False
        self.hang_timeout: float | None = None  # seconds; of the run in progress
        self.stale = False  # the process group may hold half a collective: join anew before the next run
        self.outputs: list[str | None] = [None] * self.size
        self.places: list[Place] = []
        self._answers = Answers(self)
        self._captures: RayCaptures | None = None  # once there are workers
        self._actors: list[Any] = []
        self._modules = EditedModules()
        with shield():
            self._slots = place(request, timeout) if slots is None else slots
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
        for slot in self._slots:
            strategy = PlacementGroupSchedulingStrategy(slot.group, placement_group_bundle_index=slot.bundle)
            options = {"num_cpus": slot.cpus, "num_gpus": 1 if request.gpu else 0, "scheduling_strategy": strategy}
            self._actors.append(actor_class.options(**options).remote())
        self.ranks = [Ranks(rank=i, world_size=self.size) for i in range(self.size)]
        places: list[Place] = self._answers.all(
            [actor.where.remote(request.gpu) for actor in self._actors], START, "starting"
        )
        # node by node in the order of addresses, and by GPU on each
        order = sorted(range(self.size), key=lambda i: (_numbers(places[i].address), places[i].node_id, places[i].gpus))
        self._actors = [self._actors[i] for i in order]
        self._slots = [self._slots[i] for i in order]
        self.places = [places[i] for i in order]
        self.ranks = assign_ranks([place.node_id for place in self.places])
        self._captures = RayCaptures(self, self._actors, self._answers, self.stages)
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
        port = 0
        if self.size > 1:
            port = self._answers.all([self._actors[0].serve.remote(host, self.size)], START, "serving a rendezvous")[0]
        joining = [
            actor.join.remote(ranks, host, port, host if one_node else place.address, self.request.gpu)
            for actor, ranks, place in zip(self._actors, self.ranks, self.places, strict=True)
        ]
        self._answers.all(joining, START, "joining the process group")
        self.stale = False

    def whereabouts(self, patience: float) -> list[Whereabouts]:
        """See `WorkerGroup`."""
        return ask_where(self.places, patience)

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
        return described(self.places, "" if started_here() else f" of {place_name()}")

    # ---------------------------------------------------------------- verbs

    def setup(self, task: Task) -> list[SetupReport]:
        """Send the task, pickled once; `prepare_data` once a node; `setup` on every worker."""
        if self.stale:
            self._join()
        self.hang_timeout = task.settings.hang_timeout
        for blocks in (blocks for stage in task.datasets.values() for blocks in stage):
            blocks.renew()
        self._modules.note()
        pickled, datasets = ray.put(pickle_task(task)), ray.put(task.datasets)
        show = task.settings.worker_output == "all"
        loading = [actor.load.remote(pickled, datasets, show) for actor in self._actors]
        self.outputs = self._answers.all(loading, Wait.USER_CODE.seconds(None), "importing the module")
        first = [ranks.rank for ranks in self.ranks if ranks.local_rank == 0]
        self._tell(verb_of(Worker.prepare_data), (), ranks=first)
        reports: list[SetupReport] = self._tell(verb_of(Worker.setup), ())
        return reports

    def call(self, method: Callable[Concatenate[Worker, P], R], /, *args: P.args, **kwargs: P.kwargs) -> list[R]:
        """Every worker obeys a verb."""
        return self._tell(verb_of(method), args, kwargs)

    def _tell(
        self,
        verb: Verb,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        ranks: Sequence[int] | None = None,
    ) -> list[Any]:
        """Have these workers (None: all) obey; their answers."""
        if verb.shares:
            hosts = [place.host for place in self.places]
            args = [ray.put(pack(brought_along(value, hosts))) for value in args]  # once for all workers
        told = self._actors if ranks is None else [self._actors[rank] for rank in ranks]
        if verb.shares or len(told) == 1:
            refs = [actor.obey.remote(verb.name, *args, **(kwargs or {})) for actor in told]
        else:
            packed = packed_verb(verb, args, kwargs or {})
            refs = [actor.obey_packed.remote(packed) for actor in told]
        what = "hang_timeout" if verb.wait is Wait.TRAINING else f"the limit for {verb.name}"
        return self._answers.all(refs, verb.wait.seconds(self.hang_timeout), what, ranks)

    def capture(self, weights_only: bool = False, final: bool = False) -> Callable[[], list[dict[str, Any]]]:
        """See `RayCaptures.capture`."""
        assert self._captures is not None
        return self._captures.capture(weights_only, final)

    # ---------------------------------------------------------------- end

    @property
    def usable(self) -> bool:
        """Whether a new run may use it: the same Ray is still there, and every actor answers."""
        if self.broken or not self._ray_is_there() or self._outdated():
            return False
        try:
            if self._resting:
                self._wait(self._resting, PATIENCE)
            asked = [actor.obey.remote(Worker.abandon.__name__) for actor in self._actors]
            self._wait(asked, 5.0)
            ray.get(asked, timeout=0.1)
        except RayError:
            self.abort()
            return False
        return True

    def _outdated(self) -> bool:
        """Whether workers may have imported modules that have been edited since; then they end."""
        if self._modules.outdated(shipped=bool(ray.get_runtime_context().runtime_env.get("working_dir"))):
            self.abort()
        return self.broken

    @staticmethod
    def _wait(refs: list[Any], seconds: float) -> None:
        wait_until(lambda piece: not ray.wait(refs, num_returns=len(refs), timeout=piece)[1], seconds)

    def _ray_is_there(self) -> bool:
        """Whether the Ray in use is the one that this group is of."""
        return bool(ray.is_initialized() and ray.get_runtime_context().gcs_address == self.session)

    def call_off(self) -> None:
        """After an error of the driver's side: workers are between verbs, and the next run starts afresh."""
        self.stale = True

    def abort(self) -> None:
        """Kill the actors and give the resources back."""
        with shield():
            if self.broken:
                return  # Ray never answers when a placement group is removed for a second time
            self.broken = True
            if not self._ray_is_there():
                return  # it went with its Ray
            try:
                if self._captures is not None:
                    self._captures.wait_handed_over(PATIENCE)
            finally:
                for actor in self._actors:
                    with contextlib.suppress(RayError):
                        ray.kill(actor)
                remove(self._slots)

    def grown(self, request: Request, more: Sequence[Slot], stay: Mapping[str, int]) -> RayGroup:
        """A larger group, of this one's places and further ones; this one ends.

        Args:
            request: The larger one's.
            more: Places that it has already.
            stay: How many of this one's places it takes up on each node.
        """
        left, kept = Counter(stay), list[Slot]()
        for slot, where in zip(self._slots, self.places, strict=True):
            if left[where.node_id] > 0:
                left[where.node_id] -= 1
                kept.append(slot)
        reserved = {slot.group.id for slot in kept}
        self._slots = [slot for slot in self._slots if slot.group.id not in reserved]  # what goes with this one
        with shield():
            self.abort()
            return RayGroup(request, slots=[*kept, *more])

    def release(self) -> None:
        """Have the workers drop the run, without waiting for that."""
        try:
            if not self.broken and self._ray_is_there():
                self._resting = [actor.rest.remote() for actor in self._actors]
        except Exception as error:  # of a Ray Client that has lost its cluster; the run is over all the same
            log.debug("Workers could not be told that the run is over", exc_info=error)


def _numbers(address: str) -> list[tuple[int, str]]:
    """A key that sorts 10.0.0.9 before 10.0.0.10."""
    return [(int(part) if part.isdigit() else -1, part) for part in address.split(".")]
