"""`RayGroup`: workers as Ray actors in reserved places, kept warm between runs."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray
from ray.exceptions import RayError

from raytrainer.driver.cluster.placement_rules import Request, Slot
from raytrainer.driver.cluster.reservation import remove
from raytrainer.driver.cluster.session import place_name, started_here
from raytrainer.driver.workers.group_text import described
from raytrainer.driver.workers.ray_answers import Answers
from raytrainer.driver.workers.ray_captures import RayCaptures
from raytrainer.driver.workers.ray_crew import Crew, compare_versions
from raytrainer.driver.workers.ray_records import common_record
from raytrainer.driver.workers.ray_starting import START, join
from raytrainer.driver.workers.ray_whereabouts import Asking
from raytrainer.driver.workers.standstill_watch import StandstillWatch
from raytrainer.driver.workers.task_pickling import Told, asked, pickle_task, shared
from raytrainer.driver.workers.worker_group import Copies, Recorded, Room
from raytrainer.errors import RaytrainerError
from raytrainer.messages import SetupReport
from raytrainer.plan.ranks import assign_ranks
from raytrainer.plan.recoveries import Continuity
from raytrainer.plan.where_it_is import Silence, Whereabouts
from raytrainer.signals import shield
from raytrainer.task import Task
from raytrainer.worker.actor.place import Place
from raytrainer.worker.actor.surroundings import Surroundings
from raytrainer.worker.answers import understood
from raytrainer.worker.verbs import Verb, Wait, verb_of
from raytrainer.worker.worker import Worker

__all__ = ["RayGroup"]

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger("raytrainer")

#: Seconds that workers get to hand over a state before they are killed, and to give memory back before the next run.
PATIENCE = 10.0


class RayGroup:
    """Actors that form one torch.distributed group.

    Args:
        request: What to ask Ray for.
        timeout: Seconds to wait for the resources.
        slots: Places for all workers, where they have been reserved already.
        crew: The workers, where there are some already.

    Raises:
        ResourceError: The cluster does not give them within `timeout`.
    """

    in_process = False

    def __init__(
        self, request: Request, timeout: float = 60.0, slots: Sequence[Slot] = (), crew: Crew | None = None
    ) -> None:
        self.request, self.size = request, request.nodes * request.per_node
        self._resting: list[Any] = []  # answered when nothing is left of the latest run
        self.session = ray.get_runtime_context().gcs_address
        self.broken = self._ended = False
        self._lost: set[int] = set()  # ranks that are gone, or keep the others waiting
        self.hang_timeout: float | None = None  # seconds; of the run in progress
        self.stale = False  # the process group may hold half a collective: join anew before the next run
        self.outputs: list[str | None] = [None] * self.size
        self.places: list[Place] = []
        self._answers, self._silence = Answers(self), Silence()
        self._captures = RayCaptures(self, [], self._answers, self.stages, [])
        self._surroundings: Surroundings | None = None  # of the run's workers
        self._later: list[Told] = []  # goes with the next verb
        with shield():
            self._crew = crew or Crew(request, slots, self.stages)
            try:
                self._start(timeout)
            except BaseException:
                self.abort()
                raise

    # ---------------------------------------------------------------- start

    def _start(self, timeout: float) -> None:
        self.places = self._crew.start(self._answers, timeout)
        self.ranks = assign_ranks([place.node_id for place in self.places])
        self._captures = RayCaptures(self, self._actors, self._answers, self.stages, self.places)
        compare_versions(self.places)
        self._join(self._crew.patience)

    @property
    def _actors(self) -> list[Any]:
        """By rank."""
        return self._crew.actors

    @property
    def continuity(self) -> Continuity:  # see `WorkerGroup`
        return self._crew.continuity

    def _join(self, patience: float = START) -> None:
        """Form the process group."""
        join(self._answers, self._actors, self.ranks, self.places, self.request.gpu, patience)
        self.stale = False

    def whereabouts(self, patience: float) -> list[Whereabouts]:  # see `WorkerGroup`
        return Asking(self.places, self._silence).found(patience)

    @property
    def by_node(self) -> Mapping[str, int]:
        """Workers on each node, by its id."""
        return Counter(place.node_id for place in self.places)

    @property
    def holds(self) -> set[str]:
        """What others could have if this group ended; nothing where its reservations are somebody else's."""
        if all(slot.borrowed for slot in self._crew.slots):
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
        self._later = []  # of a run that has failed
        self._captures.begin(task.settings.sharding is not None, recovers=task.settings.max_failures > 0)
        for blocks in (blocks for stage in task.datasets.values() for blocks in stage):
            blocks.renew()
        self._crew.modules.note()
        sent = pickle_task(task)
        self._surroundings = sent.surroundings
        loaded = ray.put(sent), ray.put(task.datasets), task.settings.worker_output == "all"
        loading = [actor.load.remote(*loaded) for actor in self._actors]
        self.outputs = self._answers.all(loading, Wait.USER_CODE.seconds(None), "importing the module")
        self._tell(verb_of(Worker.prepare_data), (), ranks=[own.rank for own in self.ranks if own.local_rank == 0])
        reports: list[SetupReport] = self._tell(verb_of(Worker.setup), ())
        understood(Worker.setup, reports)
        return reports

    def call(self, method: Callable[Concatenate[Worker, P], R], /, *args: P.args, **kwargs: P.kwargs) -> list[R]:
        """Every worker obeys a verb."""
        if method is Worker.prepare_capture:
            self._captures.prepare()
        answers = self._tell(verb_of(method), args, kwargs)
        understood(method, answers)
        if method is Worker.restore:
            self._captures.take_up(args[0])
        return answers

    def later(self, method: Callable[Concatenate[Worker, P], None], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """See `WorkerGroup`: a message costs milliseconds."""
        self._later.append((verb_of(method), args, kwargs))

    def _tell(
        self, verb: Verb, args: Sequence[Any], kwargs: Mapping[str, Any] = {}, ranks: Sequence[int] | None = None
    ) -> list[Any]:
        """Have these workers (None: all) obey; their answers."""
        if verb.shares:
            self._tell_rest()
            args = shared(args, [place.host for place in self.places])
        told = self._actors if ranks is None else [self._actors[rank] for rank in ranks]
        before, self._later = self._later, []
        refs = asked(told, before, verb, args, kwargs)
        what = "hang_timeout" if verb.wait is Wait.TRAINING else f"the limit for {verb.name}"
        watch = StandstillWatch(lambda: Asking(self.places, self._silence, True)) if self.size > 1 else None
        with self._silence:
            return self._answers.all(refs, verb.wait.seconds(self.hang_timeout), what, ranks, watch)

    def _tell_rest(self) -> None:
        if self._later:
            self._tell(*self._later.pop())  # which the others precede

    def capture(self, weights_only: bool = False, final: bool = False) -> Copies:  # see `RayCaptures.capture`
        self._tell_rest()
        return self._captures.capture(weights_only, final)

    def room(self, weights_only: bool) -> Room:  # see `WorkerGroup`
        return self._captures.room(weights_only)

    # ---------------------------------------------------------------- end

    @property
    def usable(self) -> bool:
        """Whether a new run may use it: the same Ray is still there, and every actor answers."""
        if self.broken or not self._ray_is_there():
            return False
        try:
            self._crew.learn(self.places, self._resting, PATIENCE)
            if self._outdated():
                return False
            self._crew.abandon_runs(5.0)
        except RayError:
            self.abort()
            return False
        return True

    def _outdated(self) -> bool:
        """Whether workers may have imported modules that have been edited since; then they end."""
        if outdated := self._crew.outdated():
            self.abort()
        return outdated

    def _ray_is_there(self) -> bool:
        """Whether the Ray in use is the one that this group is of."""
        return bool(ray.is_initialized() and ray.get_runtime_context().gcs_address == self.session)

    def call_off(self) -> None:
        """After an error of the driver's side: workers are between verbs, and the next run starts afresh."""
        self.stale = True
        if self.broken:
            self.abort()

    def lose(self, ranks: Collection[int] = ()) -> None:
        """The group is of no use any more: these are gone, or keep the others waiting. It is to be mended or ended."""
        self.broken = True
        self._lost.update(ranks)
        self._captures.leave()

    def abort(self) -> None:
        """Kill the actors and give the resources back."""
        with shield():
            if self._ended:
                return  # Ray never answers when a placement group is removed for a second time
            self.broken = self._ended = True
            if not self._ray_is_there():
                return  # it went with its Ray
            try:
                self._captures.wait_handed_over(PATIENCE)
            finally:
                self._crew.end()
                remove(self._crew.slots)

    def mended(self) -> RayGroup | None:  # see `WorkerGroup`
        if not self.broken or self._ended or not self._ray_is_there() or self._outdated():
            return None  # nothing is lost, or who is left cannot serve
        with shield():
            try:
                self._crew.mend(self.places, self._lost)
                self._ended = True  # as the crew is another group's now, which ends it where it cannot be formed
                return RayGroup(self.request, crew=self._crew)
            except (RayError, RaytrainerError) as error:
                log.info("The workers that are left cannot go on, and all start anew: %s", error)
                self.abort()
                return None
            except BaseException:
                self.abort()
                raise

    def recorded(self, chunks: Collection[int]) -> Recorded | None:  # see `WorkerGroup`
        return common_record(self._actors, chunks)

    def keep_spares(self, count: int) -> None:  # see `WorkerGroup`
        if self._surroundings is not None:
            slots = {place.node_id: slot for place, slot in zip(self.places, self._crew.slots, strict=True)}
            self._crew.spares.keep(count, slots, self._actors[0], self._surroundings)

    def grown(self, request: Request, more: Sequence[Slot], stay: Mapping[str, int]) -> RayGroup:
        """A larger group, of this one's places and further ones; this one ends.

        Args:
            request: The larger one's.
            more: Places that it has already.
            stay: How many of this one's places it takes up on each node.
        """
        with shield():
            if self._crew.grow(request, more, self.places, stay):
                self.broken = self._ended = True  # as the crew is another group's now
                return RayGroup(request, crew=self._crew)
            kept = self._crew.give_slots(self.places, stay)  # the others go with this one
            self.abort()
            return RayGroup(request, slots=[*kept, *more])

    def release(self) -> None:
        """Have the workers drop the run, without waiting for that."""
        if self.broken:
            self.abort()
        try:
            if not self.broken and self._ray_is_there():
                self._captures.end()
                self._resting = [actor.rest.remote() for actor in self._actors]
        except Exception as error:  # of a Ray Client that has lost its cluster; the run is over all the same
            log.debug("Workers could not be told that the run is over", exc_info=error)
