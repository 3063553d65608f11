"""Every test starts from the same seeds and leaves the process as it found it."""

from __future__ import annotations

import collections
import contextlib
import gc
import os
import random
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # what distributes tests over processes runs none, and an import of torch takes seconds
    import raytrainer

# files tests/ray/test_ray_*.py that need a process without the session's Ray
OWN_RAYS = ("attach", "control_c", "gpu_places", "memory", "nodes", "notebook")

# helpers of multiprocessing that live as long as the process
_LASTING = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "torch_shm_manager", "compile_worker")


gc.disable()  # what is imported, and the tests themselves, stay: no garbage is looked for among them


def pytest_collection_finish() -> None:
    import torch

    # several runs share a machine, and threads that wait for each other make tiny models slow
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)])  # the first optimizer imports much
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def heap_set_aside() -> None:
    """What files before this one have imported stays: garbage is not looked for in it at each collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Generators start alike, and no test sees another one's `seed_everything`."""
    import torch

    from raytrainer import seeding

    random.seed(0)
    torch.manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    yield
    seeding._last_seed = None


def _own_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.is_alive() and not thread.daemon}


def _children() -> dict[int, str]:
    """Child processes and their command lines; none where there is no /proc."""
    found = {}
    for path in Path("/proc/self/task").glob("*/children"):
        try:
            pids = path.read_text().split()
        except OSError:  # a thread that has ended meanwhile
            continue
        for pid in pids:
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    line = Path(f"/proc/{pid}/cmdline").read_bytes()
                    found[int(pid)] = line.replace(b"\0", b" ").decode()
    return {pid: line for pid, line in found.items() if not any(word in line for word in _LASTING)}


def _environment() -> dict[str, str]:
    # torch sets TORCHINDUCTOR_CACHE_DIR when an optimizer is first made, and CUDA_MODULE_LOADING when it looks for
    # GPUs, Ray RAY_CLIENT_MODE when it is imported
    exempt = ("PYTEST_", "TORCHINDUCTOR_", "CUDA_MODULE_LOADING", "RAY_CLIENT_MODE")
    return {name: value for name, value in os.environ.items() if not name.startswith(exempt)}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="in a whole run, too, all members of each kind that is tested")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "sample(n): takes long; a whole run tries n of its members, and all with --all or if it is named"
    )
    # a shell without job control has the programs that it starts in the background ignore Ctrl-C, which tests press
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # nobody cuts the power, and disks take their time, 20,000 times; what would be safe then, calls of it tell
    os.fsync = os.fstat
    # Tune leaves its own handler of Ctrl-C behind
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs in two processes, unless told otherwise: by -n0, say, or --pdb."""
    if hasattr(config, "workerinput"):  # one of the two: they ask, too
        return
    option = config.option
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    option.all |= not whole or bool(option.keyword)
    if whole and hasattr(option, "tx") and option.numprocesses is None and not (option.tx or option.usepdb):
        option.numprocesses = 2
        # hundreds of processes import the same files, and would each compile them anew
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if getattr(option, "numprocesses", None):
        option.dist, option.loadscopereorder = "loadscope", False


def _scope(nodeid: str) -> str:
    """Tests of one scope run in one process, in this order: what takes longest comes first, and the rest fills up."""
    path = Path(nodeid.split("::")[0])
    if path.parts[:2] == ("tests", "cluster"):
        return "3 cluster"  # brought up once
    if path.parts[:2] == ("tests", "ray"):
        # one Ray for all, and others one after the other: some look for one that runs on this machine
        return "2 Rays of their own" if path.stem.removeprefix("test_ray_") in OWN_RAYS else "1 Ray of the session"
    # which share what they set up; the last ones are short, so that neither process is the only one for long
    return f"4 {path}" if path.parts[1] == "strategies" or path.stem == "test_ends" else f"5 {path}"


def _left_out(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    members = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("sample"):
            members[item.nodeid.partition("[")[0]].append(item)
    for of_one in members.values():
        # by chance, but the same each time: members in a row may have one parameter in common
        of_one.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        mark = of_one[0].get_closest_marker("sample")
        assert mark is not None
        yield from of_one[mark.args[0] :]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if addressed := [item.nodeid for item in items if " at 0x" in item.nodeid]:  # the two processes would not agree
        raise pytest.UsageError(f"names that differ from process to process; give ids: {addressed}")
    if not config.option.all and (left_out := set(_left_out(items))):
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: _scope(item.nodeid)[0])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def leaves_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a thread, a process or a changed environment. What lasts is exempt: Ray, hosts."""
    room = request.path.relative_to(Path(__file__).parent).parts[0]
    lasting = {"ray_session", "forked_groups"} & set(request.fixturenames)
    if room in ("ray", "cluster") or lasting:
        yield
        return
    import torch

    threads, children, environment = _own_threads(), _children(), _environment()
    directory, dtype = os.getcwd(), torch.get_default_dtype()
    yield
    deadline = time.monotonic() + 60.0
    while (left := (_own_threads() - threads, _children().keys() - children)) != (set(), set()):
        if time.monotonic() > deadline:
            pytest.fail(f"threads and processes left behind: {left}, {_children()}")
        gc.collect()
        time.sleep(0.02)
    after = _environment()
    changed = {name for name in environment.keys() | after.keys() if environment.get(name) != after.get(name)}
    assert not changed, f"environment variables changed: {sorted(changed)}"
    assert os.getcwd() == directory
    assert torch.get_default_dtype() == dtype
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_anomaly_enabled()


@pytest.fixture
def local_trainer(tmp_path: Path) -> Callable[..., raytrainer.Trainer]:
    """Makes quiet trainers of this process, which write below `tmp_path` only."""
    import raytrainer

    def make(**options: Any) -> raytrainer.Trainer:
        quiet: dict[str, Any] = {
            "strategy": "local",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "default_root_dir": tmp_path,
        }
        return raytrainer.Trainer(**{**quiet, **options})

    return make
