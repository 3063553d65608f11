"""Profilers: what the hooks of a run cost, in every worker."""

from raytrainer.profilers.advanced import AdvancedProfiler
from raytrainer.profilers.by_name import make_profiler
from raytrainer.profilers.profiler import Profiler
from raytrainer.profilers.pytorch import PyTorchProfiler
from raytrainer.profilers.simple import SimpleProfiler

__all__ = ["AdvancedProfiler", "Profiler", "PyTorchProfiler", "SimpleProfiler", "make_profiler"]
