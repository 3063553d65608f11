"""Public names, layers, and what importing costs."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import raytrainer

ROOT = Path(raytrainer.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

#: Rooms and files of the top level, from the ground up: each imports from its own row and from those above it here.
FLOORS = [
    [
        "errors",
        "version",
        "metric_messages",
        "messages",
        "signals",
        "ending",
        "extras",
        "tracebacks",
        "cells",
        "short_repr",
        "class_only",
        "replaced_file",
        "quick_imports",
    ],
    [
        "plan",
        "gpu",
        "loggers",
        "profilers",
        "config",
        "tensor_packing",
        "memory_segments",
        "init_calls",
        "hparams",
        "stateful_callback",
    ],
    ["private", "seeding", "place_in_run", "attribute_tensors"],
    ["checkpointing", "data", "metrics"],
    ["strategies"],
    [
        "view/last_trainer",
        "view/trainer_view",
        "view/absent_names",
        "view/answered_names",
        "view/scheduler_config",
        "view/added_groups",
        "view/stop_request",
        "view/learning_rates",
        "view/run_state",
        "module_in_run",
    ],
    ["module_hooks"],
    ["module", "datamodule"],
    ["view/trainer_properties", "driver_arguments"],
    ["callbacks", "task"],
    ["worker"],
    ["driver"],
    ["trainer_tuning", "trainer_runs", "trainer_checkpoints"],
    ["trainer"],
    ["public", "cli", "doctor", "reference", "__init__", "__main__"],
]

#: Where ray is imported: the driver's side of it, what runs in its actors, data and callbacks of its own.
RAY = ("driver/cluster/", "driver/workers/ray_", "driver/workers/task_pickling", "worker/actor/", "private/ray_private",
       "driver/prepare/ray_", "data/ray/", "callbacks/ray_")  # fmt: skip

#: Longer than 300 lines, since their parts are read together.
LONG = {
    "callbacks/model_checkpoint.py",  # one callback; which checkpoints it keeps is in plan/retention.py
    "private/ray_private.py",  # one file for all of Ray's private interfaces
}


def in_order(names: list[str]) -> list[str]:
    """Sorted as ruff does: constants, classes, everything else."""
    return sorted(names, key=lambda n: (0 if n.isupper() else 1 if n[0].isupper() else 2, n))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path, typing: bool = False) -> Iterator[str]:
    """Modules that a file imports, in full: in functions too, and with `typing` those for type checkers alone."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if not typing and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            yield child
            yield from walk(child)

    for node in walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative import"
            assert node.module is not None
            if node.module != "raytrainer":  # "from raytrainer import checkpoint" imports that module
                yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(path: Path) -> str:
    """The module of a file."""
    parts = ("raytrainer", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in FILES}


def arrows(path: Path) -> set[str]:
    """The package's modules that a file imports, for whatever reason."""
    found = set(imports(path, typing=True))
    # a name out of a module is that module, unless it is a module itself
    return {module for module in found if module in MODULES} - {dotted(path)}


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """GroupSupply of modules that reach each other: the strongly connected components of more than one."""

    def reached(start: str, along: Mapping[str, set[str]]) -> set[str]:
        seen, waiting = set[str](), [start]
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting += along.get(module, ())
        return seen

    back: dict[str, set[str]] = {module: set() for module in graph}
    for module, targets in graph.items():
        for target in targets:
            back[target].add(module)
    found = {frozenset(reached(module, graph) & reached(module, back)) for module in graph}
    return sorted(sorted(group) for group in found if len(group) > 1)


def offenders(judge: Callable[[Path], str | None]) -> list[str]:
    """What `judge` says of each file where it says anything, so that one run names all."""
    return [f"{name(path)}: {verdict}" for path in FILES if (verdict := judge(path)) is not None]


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_public_names():
    assert raytrainer.__all__ == in_order(raytrainer.__all__)
    assert set(raytrainer.__all__) == {
        "DDP", "DDP2", "DP", "FSDP", "AdvancedProfiler", "BackboneFinetuning", "BaseFinetuning",
        "BasePredictionWriter", "BatchSizeFinder",
        "CSVLogger", "Callback", "CheckpointError", "CombinedLoader", "ConfigurationError", "DataError",
        "DataModule", "ModelParallel",
        "DeviceStatsMonitor", "DisagreementError", "EMAWeightAveraging", "EarlyStopping",
        "GradientAccumulationScheduler", "LambdaCallback",
        "LambdaWorkerCallback", "LearningRateFinder", "LearningRateMonitor", "Logger", "MLFlowLogger", "MetricError",
        "ModelCheckpoint", "ModelSummary", "Module", "OnExceptionCheckpoint", "PredictionWriter", "Profiler",
        "ProgressBar", "PyTorchProfiler", "RayDataset", "RaytrainerError", "ResourceError", "RichModelSummary",
        "SerializationError", "SimpleProfiler", "SpikeDetection", "StochasticWeightAveraging", "TensorBoardLogger",
        "ThroughputMonitor",
        "Timer", "Trainer", "TrainingSpikeError", "TuneReportCallback", "UnknownArgumentError", "WandbLogger",
        "WeightAveraging", "WorkerCallback",
        "WorkerError", "WorkerLostError", "__version__", "data_part", "export_weights", "on_meta", "rank",
        "seed_everything",
        "tune_resources", "world_size",
    }  # fmt: skip
    public = {
        n
        for n, v in vars(raytrainer).items()
        if not n.startswith("_") and getattr(v, "__module__", "").startswith("raytrainer.")
    }
    assert public <= set(raytrainer.__all__)
    assert all(hasattr(raytrainer, n) for n in raytrainer.__all__)


def test_modules_declare_what_they_offer():
    def judge(path: Path) -> str | None:
        tree = parsed(path)
        declared = [
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]
        public = [
            n.name for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and not n.name.startswith("_")
        ]
        if declared:
            return None if declared[0] == in_order(declared[0]) else f"__all__ is not {in_order(declared[0])}"
        return "has no __all__" if public else None

    assert offenders(judge) == []


def test_names_that_there_are_not():
    assert raytrainer.profilers.Profiler is raytrainer.Profiler and "Trainer" in dir(raytrainer)
    with pytest.raises(AttributeError, match="'raytrainer' has no attribute 'Tranier'"):
        _ = raytrainer.Tranier
    with pytest.raises(ImportError, match="Tranier"):
        from raytrainer import Tranier  # noqa: F401


def test_no_import_circle():
    graph = {module: arrows(path) for module, path in MODULES.items()}
    found = circles(graph)
    ties = [f"{a} -> {b}" for group in found for a in group for b in sorted(graph[a] & set(group))]
    assert found == [], f"imports, typing-only ones included, form circles: {ties}"


def test_a_circle_would_be_named():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles(graph) == [["b", "c"]]


def floor(module: str) -> int:
    """The row of `FLOORS` that a module is in."""
    inner = module.removeprefix("raytrainer").removeprefix(".").replace(".", "/") or "__init__"
    rows = [row for row, rooms in enumerate(FLOORS) for room in rooms if inner == room or inner.startswith(room + "/")]
    assert len(rows) == 1, f"{module}: say in FLOORS where it belongs"
    return rows[0]


def test_imports_point_down():
    def judge(path: Path) -> str | None:
        up = sorted(target for target in arrows(path) if floor(target) > floor(dotted(path)))
        return f"imports {up} from above" if up else None

    assert offenders(judge) == []


def test_layers():
    def judge(path: Path) -> str | None:
        mine, found = name(path), set(imports(path, typing=True))
        top = {module.split(".")[0] for module in found}
        if "ray" in top and not mine.startswith(RAY) and "ray" in {m.split(".")[0] for m in imports(path)}:
            return "imports ray"
        if mine.startswith(("plan/", "errors", "version", "messages")) and not top <= {
            *sys.stdlib_module_names,
            "raytrainer",
        }:
            return f"imports {sorted(top)} rather than the standard library alone"
        if mine not in ("__init__.py", "cli.py", "__main__.py") and "raytrainer" in found:
            return "imports the package rather than a module of it"
        return None

    assert offenders(judge) == []


def test_names_tell_files_apart():
    stems = Counter(path.stem for path in FILES if path.stem != "__init__")
    assert [stem for stem, count in stems.items() if count > 1] == [], "two modules have one name"


def test_files_are_short():
    lengths = {name(path): len(path.read_text().splitlines()) for path in FILES}
    assert {path for path, lines in lengths.items() if lines > 300} == LONG


def test_functions_take_few_positional_arguments():
    def judge(path: Path) -> str | None:
        found = []
        for node in ast.walk(parsed(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                own = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
                if len([argument for argument in own if argument not in ("self", "cls")]) > 8:
                    found.append(node.name)
        return f"{found} take more than eight positional arguments" if found else None

    assert offenders(judge) == []


PRIVATE = re.compile(
    r"(?<![\w.])(?:ray|torch)(?:\.\w+)*\._(?!_)\w+"
    r"|^\s*(?:from|import) (?:ray|torch)\b[\w.]*(?:\._| import _)|\b_raylet\b|\bray\.core\b",
    re.M,
)


def test_private_interfaces_are_in_one_file_each():
    def judge(path: Path) -> str | None:
        if path.parent.name == "private":
            return None
        found = sorted(set(PRIVATE.findall(path.read_text())))
        return f"uses {found}: put it into private/" if found else None

    assert offenders(judge) == []


def test_what_runs_in_workers_lives_there():
    def judge(path: Path) -> str | None:
        below = ("worker/", "data/", "strategies/", "metrics/", "view/")
        driver = sorted(module for module in arrows(path) if inside(module, "raytrainer.driver"))
        return f"imports {driver}" if name(path).startswith(below) and driver else None

    assert offenders(judge) == []
