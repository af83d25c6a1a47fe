"""Training with or without a teacher: distillation, recovery, and training from scratch."""

from moe_jax.distill.loop import TrainingRun, train
from moe_jax.distill.settings import TrainSettings
from moe_jax.interruption import Stopped

__all__ = ["Stopped", "TrainSettings", "TrainingRun", "train"]
