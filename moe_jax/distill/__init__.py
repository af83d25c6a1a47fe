"""Training with or without a teacher: distillation, recovery, and training from scratch."""

from moe_jax.distill.interruption import Stopped
from moe_jax.distill.loop import train
from moe_jax.distill.settings import TrainSettings
from moe_jax.distill.step import BATCH_AXES

__all__ = ["BATCH_AXES", "Stopped", "TrainSettings", "train"]
