"""How to train: optimizer, objective, precision, bookkeeping."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from moe_jax.config import ModelConfig
from moe_jax.losses import DistillOptions
from moe_jax.params import PARTS, abstract_params, leaves_with_path
from moe_jax.settings import check_values, setting

COMPUTE_DTYPES = ("auto", "float32", "bfloat16")
# Fields that may differ between a run and its resumption: they change no parameter.
BOOKKEEPING = ("checkpoint_every", "log_every")


@dataclass(frozen=True)
class TrainSettings:
    """How to train."""

    steps: int = dataclasses.field(metadata={"doc": "Optimizer steps in all.", "bounds": ">= 1"})
    learning_rate: float = setting(
        1e-3,
        "Peak of a linear warm-up and a cosine decay to final_fraction of it.",
        bounds="(0, inf)",
    )
    warmup_steps: int = setting(100, "Steps of the linear warm-up.")
    final_fraction: float = setting(
        0.1, "The learning rate at the end over its peak.", bounds="[0, 1]"
    )
    weight_decay: float = setting(
        0.1, "Of matrices; norms, biases and constants are not decayed.", bounds="[0, inf)"
    )
    beta1: float = setting(0.9, "Of Adam: decay of the mean gradient.", bounds="[0, 1)")
    beta2: float = setting(0.95, "Of Adam: decay of the mean squared gradient.", bounds="[0, 1)")
    clip_norm: float = setting(1.0, "Largest global gradient norm.", bounds="(0, inf)")
    accumulation: int = setting(
        1,
        "Micro-batches that a batch is split into, one after the other; the gradient is that of "
        "the whole batch.",
        bounds=">= 1",
    )
    ema_decay: float = setting(
        0.0,
        "If positive, an exponential moving average of the weights is the result.",
        bounds="[0, 1)",
    )
    trainable: str | tuple[str, ...] = setting(
        "all", f"all, or some of {', '.join(PARTS)}; the rest stays as it is."
    )
    rates: Mapping[str, float] = setting(
        {},
        "By part that trains, its learning rate over learning_rate; 1 where none is given. "
        'Routers made by something else than training want more: {"router": 3.0}.',
        hash=False,
    )
    loss: str = setting(
        "kd_full",
        "A kind of losses.distill_loss; lm needs no teacher. kd_topk and kd_topk_renormalized "
        "teach a student to put all its probability on k tokens: for teachers that do so, too "
        "(those that ship do not: 44% on 8), or for a cache, which holds no more.",
    )
    top_k: int = setting(
        8, "The teacher's most likely tokens that kd_topk losses compare.", bounds=">= 1"
    )
    temperature: float = setting(1.0, "Of both distributions; see losses.distill_loss.")
    beta: float = setting(0.5, "The teacher's share of jensen_shannon's mixture.")
    lm_weight: float = setting(0.0, "Share of the loss on the text itself.")
    hidden_weight: float = setting(
        0.0,
        "Weight of the relative squared distance between the blocks' outputs of student and "
        "teacher, mean over hidden_layers.",
        bounds="[0, inf)",
    )
    hidden_layers: tuple[int, ...] = setting((), "Layers of hidden_weight; empty: all.")
    router_weight: float = setting(
        0.0,
        "Weight of the divergence between the routers' distributions, mean over layers.",
        bounds="[0, inf)",
    )
    balance_weight: float = setting(
        0.0, "Weight of the routers' load-balancing loss, per MoE layer.", bounds="[0, inf)"
    )
    sample_routing: bool = setting(
        True,
        "Run the student's routers in train mode (SparseMixer sampling, input jitter). The "
        "teacher's are always in eval mode.",
    )
    compute_dtype: str = setting(
        "auto",
        "Of activations and matrix products: auto is bfloat16 on accelerators and float32 on CPU. "
        "Trained weights stay float32; routers, norms and softmaxes compute in float32.",
        choices=COMPUTE_DTYPES,
    )
    # Small is fast on CPU, where a chunk stays in the cache.
    chunk_tokens: int = setting(
        512,
        "Positions whose logits are alive at a time; 0 takes all of a micro-batch. Accelerators "
        "like thousands.",
        bounds="[0, inf)",
    )
    remat: bool = setting(False, "Keep only each block's input for the backward pass.")
    scan_layers: bool = setting(
        True, "Compile one block and scan over layers, where all are alike."
    )
    seed: int = setting(0, "Of sampled routing.")
    checkpoint_every: int = setting(500, "Steps between checkpoints.", bounds=">= 1")
    log_every: int = setting(10, "Steps between records of metrics.jsonl.", bounds=">= 1")

    def __post_init__(self) -> None:
        check_values(self)
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(
                f"warmup_steps must be in [0, steps = {self.steps}], got {self.warmup_steps}"
            )
        unknown = sorted(set(self.trained_parts) - set(PARTS))
        if unknown or not self.trained_parts:
            raise ValueError(f"trainable must be 'all' or among {PARTS}, got {unknown}")
        if untrained := sorted(set(self.rates) - set(self.trained_parts)):
            raise ValueError(f"rates must be of parts that train, got {untrained}")
        for part, rate in self.rates.items():
            if not 0 < rate < float("inf"):
                raise ValueError(f"rates.{part} must be positive and finite, got {rate}")
        _ = self.options  # which checks them
        if self.hidden_layers and not self.hidden_weight:
            raise ValueError(f"hidden_layers = {self.hidden_layers} needs a hidden_weight, got 0")

    @property
    def options(self) -> DistillOptions:
        """Those of the distillation loss."""
        return DistillOptions(
            self.loss,  # type: ignore[arg-type]  # checked where it is made
            self.top_k,
            self.temperature,
            self.beta,
            self.lm_weight,
        )

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
            teacher: the live teacher; None if there is none.
            cached: predictions per position that batches bring in its place; None if they do not.
        """
        leaves = leaves_with_path(abstract_params(student))
        if not any(leaf.part in self.trained_parts for _, leaf in leaves):
            raise ValueError(f"trainable is {self.trainable!r}, but the model has none")
        if not self.needs_teacher:
            return
        if cached is not None and not self.needs_teacher_states:
            self.options.check_cached(cached)
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
