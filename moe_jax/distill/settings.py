"""How to train: optimizer, objective, precision, bookkeeping."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax

from moe_jax.config import ModelConfig
from moe_jax.losses import check_distill_options
from moe_jax.params import PARTS, abstract_params, leaves_with_path

# Where each number must lie.
_INTERVALS = {
    "[1, inf)": ("steps", "accumulation", "checkpoint_every", "log_every", "top_k"),
    "[0, inf)": (
        "weight_decay", "hidden_weight", "router_weight", "balance_weight", "chunk_tokens",
    ),
    "(0, inf)": ("learning_rate", "clip_norm"),
    "[0, 1)": ("beta1", "beta2", "ema_decay"),
    "[0, 1]": ("final_fraction",),
}  # fmt: skip
COMPUTE_DTYPES = ("auto", "float32", "bfloat16")
# Fields that may differ between a run and its resumption: they change no parameter.
BOOKKEEPING = ("checkpoint_every", "log_every")


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        steps: optimizer steps in all.
        learning_rate: peak of a linear warm-up and cosine decay to ``final_fraction`` of it.
        warmup_steps: of the linear warm-up.
        final_fraction: the learning rate at the end over its peak.
        weight_decay: of matrices; norms, biases and novices are not decayed.
        beta1, beta2: of Adam.
        clip_norm: largest global gradient norm.
        accumulation: micro-batches that a batch is split into, one after the other; the gradient
            is that of the whole batch.
        ema_decay: if positive, an exponential moving average of the weights is the result.
        trainable: ``all`` or names in ``params.PARTS``; the rest stays as it is.

        loss: a kind of ``losses.distill_loss``; ``lm`` needs no teacher. ``kd_topk`` and
            ``kd_topk_renormalized`` teach a student to put all its probability on k tokens: for
            teachers that do so, too (those that ship do not: 44% on 8), or for a cache, which
            holds no more.
        top_k, temperature, beta, lm_weight: see ``losses.distill_loss``.
        hidden_weight: weight of the relative squared distance between the blocks' outputs of
            student and teacher, mean over ``hidden_layers`` (empty: all).
        router_weight: weight of the divergence between the routers' distributions, mean over
            layers.
        balance_weight: weight of the routers' load-balancing loss, per MoE layer.
        sample_routing: run the student's routers in train mode (SparseMixer sampling, input
            jitter). The teacher's are always in eval mode.

        compute_dtype: of activations and matrix products: ``auto`` is bfloat16 on accelerators
            and float32 on CPU. Trained weights stay float32; routers, norms and softmaxes compute
            in float32.
        chunk_tokens: positions whose logits are alive at a time; 0 takes all of a micro-batch.
            Small is fast on CPU, where a chunk stays in the cache; accelerators like thousands.
        remat: keep only each block's input for the backward pass.
        scan_layers: compile one block and scan over layers, where all are alike.
        seed: of sampled routing.
        checkpoint_every, log_every: in steps.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    accumulation: int = 1
    ema_decay: float = 0.0
    trainable: str | tuple[str, ...] = "all"
    loss: str = "kd_full"
    top_k: int = 8
    temperature: float = 1.0
    beta: float = 0.5
    lm_weight: float = 0.0
    hidden_weight: float = 0.0
    hidden_layers: tuple[int, ...] = ()
    router_weight: float = 0.0
    balance_weight: float = 0.0
    sample_routing: bool = True
    compute_dtype: str = "auto"
    chunk_tokens: int = 512
    remat: bool = False
    scan_layers: bool = True
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 10

    def __post_init__(self) -> None:
        for interval, names in _INTERVALS.items():
            for name in names:
                if not _is_in(getattr(self, name), interval):
                    raise ValueError(f"{name} must be in {interval}, got {getattr(self, name)}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(
                f"warmup_steps must be in [0, steps = {self.steps}], got {self.warmup_steps}"
            )
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"compute_dtype must be one of {COMPUTE_DTYPES}, got {self.compute_dtype!r}"
            )
        unknown = sorted(set(self.trained_parts) - set(PARTS))
        if unknown or not self.trained_parts:
            raise ValueError(f"trainable must be 'all' or among {PARTS}, got {unknown}")
        check_distill_options(self.loss, self.top_k, self.temperature, self.beta, self.lm_weight)
        if self.hidden_layers and not self.hidden_weight:
            raise ValueError(f"hidden_layers = {self.hidden_layers} needs a hidden_weight, got 0")

    @property
    def trained_parts(self) -> tuple[str, ...]:
        """Names in ``params.PARTS``."""
        names = (self.trainable,) if isinstance(self.trainable, str) else tuple(self.trainable)
        return PARTS if names == ("all",) else names

    @property
    def needs_teacher(self) -> bool:
        """Whether the objective compares with a teacher at all."""
        return self.loss != "lm" or self.needs_teacher_states

    @property
    def needs_teacher_states(self) -> bool:
        """Whether it compares more than predictions, which no cache of them can stand in for."""
        return self.hidden_weight > 0 or self.router_weight > 0

    @property
    def dtype(self) -> str:
        """What ``compute_dtype`` stands for on this machine."""
        if self.compute_dtype != "auto":
            return self.compute_dtype
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"

    def facts(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON values."""
        fields = dataclasses.asdict(self) | {"compute_dtype": self.dtype}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
            if name not in BOOKKEEPING
        }

    def check_models(
        self, student: ModelConfig, teacher: ModelConfig | None, cached: int | None = None
    ) -> None:
        """Raises ValueError if the objective cannot compare these models.

        Args:
            student: what is trained.
            teacher: the live teacher; None if there is none.
            cached: predictions per position that batches bring in its place; None if they do not.
        """
        leaves = leaves_with_path(abstract_params(student))
        if not any(leaf.part in self.trained_parts for _, leaf in leaves):
            raise ValueError(f"trainable is {self.trainable!r}, but the model has none")
        if not self.needs_teacher:
            return
        if cached is not None and not self.needs_teacher_states:
            check_distill_options(
                self.loss, self.top_k, self.temperature, self.beta, self.lm_weight, cached
            )
            return
        if teacher is None:
            raise ValueError(
                "hidden_weight and router_weight need a live teacher, got none"
                if self.needs_teacher_states
                else f"loss {self.loss!r} needs a teacher, got none; 'lm' learns from text alone"
            )
        if student.vocab_size != teacher.vocab_size:
            raise ValueError(
                "teacher and student must share a vocabulary, got "
                f"{teacher.vocab_size} and {student.vocab_size} entries"
            )
        if self.needs_teacher_states:
            self._check_states(student, teacher)

    def _check_states(self, student: ModelConfig, teacher: ModelConfig) -> None:
        if student.num_layers != teacher.num_layers or student.width != teacher.width:
            raise ValueError(
                "hidden_weight and router_weight need models of equal depth and width, got "
                f"{teacher.num_layers} x {teacher.width} and {student.num_layers} x {student.width}"
            )
        outside = [i for i in self.hidden_layers if not 0 <= i < student.num_layers]
        if outside:
            raise ValueError(f"hidden_layers must be in [0, {student.num_layers}), got {outside}")
        for i in student.moe_layers if self.router_weight > 0 else ():
            rows = student.moe(i).num_experts, teacher.moe(i).num_experts
            if rows[0] != rows[1]:
                raise ValueError(
                    f"layer {i}: router_weight needs equal numbers of router rows, got "
                    f"{rows[1]} (teacher) and {rows[0]} (student)"
                )


def _is_in(value: float, interval: str) -> bool:
    """Whether a number, NaN never, lies in an interval such as ``[0, 1)``."""
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval.startswith("[") else value > low
    return above and (value <= high if interval.endswith("]") else value < high)
