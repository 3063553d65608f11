"""Public names, layers, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import raytrainer

ROOT = Path(raytrainer.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
RAY_IMPORTERS = {
    f"driver/{n}.py" for n in ("attach", "cluster", "output", "ray_group", "remote", "reserve", "shipping")
}


def may_import_ray(path: Path) -> bool:
    """The driver's side of Ray, `data/ray_*.py`, and `callbacks/ray_*.py`, whose users have Ray."""
    return name(path) in RAY_IMPORTERS or (path.parent.name in ("data", "callbacks") and path.name.startswith("ray_"))


def in_order(names: list[str]) -> list[str]:
    """Sorted as ruff does: constants, classes, everything else."""
    return sorted(names, key=lambda n: (0 if n.isupper() else 1 if n[0].isupper() else 2, n))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path, lazy: bool = True) -> Iterator[str]:
    """Modules that a file imports, in full; not under TYPE_CHECKING, which costs nothing at run time."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if not lazy and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            yield child
            yield from walk(child)

    for node in walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative import"
            assert node.module is not None
            if node.module != "raytrainer":  # "from raytrainer import checkpoint" imports that module
                yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_public_names():
    assert raytrainer.__all__ == in_order(raytrainer.__all__)
    assert set(raytrainer.__all__) == {
        "DDP", "DDP2", "DP", "AdvancedProfiler", "BackboneFinetuning", "BaseFinetuning", "BatchSizeFinder",
        "CSVLogger", "Callback", "CheckpointError", "ConfigurationError", "DataError", "DataModule",
        "DeviceStatsMonitor", "EMAWeightAveraging", "EarlyStopping", "GradientAccumulationScheduler", "LambdaCallback",
        "LambdaWorkerCallback", "LearningRateFinder", "LearningRateMonitor", "Logger", "MLFlowLogger", "MetricError",
        "ModelCheckpoint", "ModelSummary", "Module", "OnExceptionCheckpoint", "PredictionWriter", "Profiler",
        "ProgressBar", "PyTorchProfiler", "RayDataset", "RaytrainerError", "ResourceError", "RichModelSummary",
        "SerializationError", "SimpleProfiler", "StochasticWeightAveraging", "TensorBoardLogger", "ThroughputMonitor",
        "Timer", "Trainer", "TuneReportCallback", "WandbLogger", "WorkerCallback", "WorkerError", "WorkerLostError",
        "__version__", "seed_everything", "tune_resources",
    }  # fmt: skip
    public = {
        n
        for n, v in vars(raytrainer).items()
        if not n.startswith("_") and getattr(v, "__module__", "").startswith("raytrainer.")
    }
    assert public <= set(raytrainer.__all__)
    assert all(hasattr(raytrainer, n) for n in raytrainer.__all__)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_modules_declare_what_they_offer(path):
    tree = ast.parse(path.read_text())
    declared = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    public = [
        n.name for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and not n.name.startswith("_")
    ]
    if declared:
        assert declared[0] == in_order(declared[0])
    else:
        assert not public, f"{name(path)} has no __all__"


def test_importing_does_not_import_ray():
    code = "import sys, raytrainer; print({'ray', 'lightning', 'tensorboardX'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "set()"


def test_training_in_process_does_not_import_ray():
    code = """
import sys, torch, raytrainer
class M(raytrainer.Module):
    def __init__(self):
        super().__init__(); self.layer = torch.nn.Linear(1, 1)
    def training_step(self, batch): return self.layer(batch).sum()
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.1)
trainer = raytrainer.Trainer(strategy="local", max_epochs=1, logger=False, enable_checkpointing=False)
trainer.fit(M(), [torch.ones(1, 1)])
print("ray" in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip().splitlines()[-1] == "False"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_layers(path):
    mine = name(path)
    found = set(imports(path))
    if not may_import_ray(path):
        assert not {m for m in found if inside(m, "ray")}, "imports ray"
    if mine.startswith("plan/"):
        allowed = {*sys.stdlib_module_names, "raytrainer"}
        assert {m.split(".")[0] for m in found} <= allowed
        ours = {m for m in found if inside(m, "raytrainer")}
        assert all(inside(m, "raytrainer.plan") or inside(m, "raytrainer.errors") for m in ours), ours
    if mine.startswith("worker/"):
        assert not {m for m in found if inside(m, "raytrainer.driver")}
    if mine not in ("__init__.py", "cli.py"):
        assert not {m for m in found if inside(m, "raytrainer.trainer") or m == "raytrainer.Trainer"}
        assert "raytrainer" not in found, "imports the package rather than a module of it"
    if mine in ("errors.py", "version.py", "messages.py"):
        assert all(m.split(".")[0] in sys.stdlib_module_names or inside(m, "raytrainer.errors") for m in found), found
    if mine.startswith("data/"):
        assert not {m for m in found if inside(m, "raytrainer.driver")}
