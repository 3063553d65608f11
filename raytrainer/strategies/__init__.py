"""How a batch is split over workers, what they gather, and what they synchronise."""

from raytrainer.strategies.ddp import DDPStrategy
from raytrainer.strategies.ddp2 import DDP2Strategy
from raytrainer.strategies.dp import DPStrategy
from raytrainer.strategies.single import SingleStrategy
from raytrainer.strategies.strategy import Strategy

__all__ = ["DDP2Strategy", "DDPStrategy", "DPStrategy", "SingleStrategy", "Strategy"]
