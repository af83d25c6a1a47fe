"""Times a training step of a shipped model against the same step in torch, and its parts.

    python tools/bench_train_step.py [--model=moe_jax/assets/phimoe] [--width=56] [--repeats=5]

Both sides train the same student (the model, or the model with experts cut to ``--width`` neurons)
on the same batch with the same float32 arithmetic: forward KL from the original over the whole
vocabulary, gradient clipping, AdamW. Routing is that of eval mode on both sides, since sampling
differs between libraries. Torch's side is ``transformers`` (its faster implementation of experts)
and ``torch.optim.AdamW``. The losses of the first steps are printed: they must agree. Measurements
are taken in turn, and the best of each counts.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from moe_jax.config import ModelConfig
from moe_jax.data import load_tokenizer, training_dataset
from moe_jax.distill import TrainSettings
from moe_jax.distill.objective import objective
from moe_jax.distill.step import arranged, initial_state, make_optimizer, make_step
from moe_jax.hf import load_hf, save_hf
from moe_jax.model import hidden_states
from moe_jax.params import leaves_like
from moe_jax.plan import LayerPlan, Plan
from moe_jax.prune import apply_plan
from moe_jax.settings import TrainingConfig

TEXT = "moe_jax/assets/text/training/*.jsonl.xz"
SETTINGS = TrainSettings(
    steps=1000,
    warmup_steps=0,
    learning_rate=1e-4,
    final_fraction=1.0,
    loss="kd_full",
    sample_routing=False,
    compute_dtype="float32",
)


def best_seconds(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Best wall time of each, measured in turn after one call that compiles."""
    best = dict.fromkeys(calls, float("inf"))
    for round_number in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_number:
                best[name] = min(best[name], time.perf_counter() - start)
        gc.collect()
    return best


class JaxSide:
    """The training step of this package."""

    def __init__(self, student, config: ModelConfig, teacher, teacher_config: ModelConfig, batch):
        self.config, self.teacher_config = config, teacher_config
        self.batch = {name: jnp.asarray(rows) for name, rows in batch.items()}
        self.state, self.frozen = initial_state(student, config, SETTINGS)
        self.params = jax.tree.map(jnp.copy, self.state["params"])
        self.teacher = arranged(teacher, teacher_config, SETTINGS)
        self.step_function = make_step(config, SETTINGS, teacher_config)
        self.losses: list[float] = []

    def step(self) -> None:
        self.state, metrics = self.step_function(self.state, self.frozen, self.teacher, self.batch)
        self.losses.append(float(metrics["loss"]))
        jax.block_until_ready(self.state)

    def parts(self) -> dict[str, Callable[[], object]]:
        """Parts of the step, each compiled alone; they share work that the step does once."""
        batch = self.batch
        optimizer = make_optimizer(SETTINGS, leaves_like(self.params, self.config))
        tokens = (batch["tokens"], batch["segment_ids"])

        def loss(params, teacher):
            return objective(
                params, self.config, batch, None, SETTINGS, 1.0, (teacher, self.teacher_config)
            )[0]

        def states(params, config):
            return hidden_states(params, config, *tokens)[0]

        def body_loss(params):
            return states(params, self.config).sum()

        @jax.jit
        def update(gradient, state, params):
            return optimizer.update(gradient, state, params)

        gradient = jax.jit(jax.grad(loss))
        zeros = jax.tree.map(jnp.zeros_like, self.params)
        optimizer_state = optimizer.init(self.params)
        teacher_forward = jax.jit(lambda p: states(p, self.teacher_config))
        body_forward = jax.jit(lambda p: states(p, self.config))
        body = jax.jit(jax.grad(body_loss))
        calls: dict[str, Callable[[], object]] = {
            "teacher's blocks, forward": lambda: teacher_forward(self.teacher),
            "student's blocks, forward": lambda: body_forward(self.params),
            "student's blocks, forward and backward": lambda: body(self.params),
            "loss and gradient, all of it": lambda: gradient(self.params, self.teacher),
            "optimizer": lambda: update(zeros, optimizer_state, self.params),
        }
        return {
            name: lambda call=call: jax.block_until_ready(call()) for name, call in calls.items()
        }


class TorchSide:
    """The same step in torch."""

    def __init__(self, student_folder: str, teacher_folder: str, batch, experts: str) -> None:
        def load(folder):
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                experts_implementation=experts,
                attn_implementation="sdpa",
            )
            return model.eval()

        self.student, self.teacher = (
            load(student_folder),
            load(teacher_folder).requires_grad_(False),
        )
        self.tokens = torch.from_numpy(np.asarray(batch["tokens"], np.int64))
        decayed = [p for n, p in self.student.named_parameters() if p.ndim >= 2]
        others = [p for n, p in self.student.named_parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": SETTINGS.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=SETTINGS.learning_rate,
            betas=(SETTINGS.beta1, SETTINGS.beta2),
        )
        self.losses: list[float] = []

    def step(self) -> None:
        with torch.no_grad():
            target = self.teacher(self.tokens, use_cache=False).logits[:, :-1]
        logits = self.student(self.tokens, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.kl_div(
            logits.log_softmax(-1).flatten(0, 1),
            target.log_softmax(-1).flatten(0, 1),
            log_target=True,
            reduction="batchmean",
        )
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), SETTINGS.clip_norm)
        self.optimizer.step()
        self.losses.append(loss.item())


def first_neurons(config: ModelConfig, width: int) -> Plan:
    """Every expert keeps its first ``width`` neurons."""
    kept = tuple(range(width))
    return Plan(
        {
            i: LayerPlan(neurons=dict.fromkeys(config.moe(i).expert_ids, kept))
            for i in config.moe_layers
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="moe_jax/assets/phimoe", help="checkpoint folder")
    parser.add_argument("--width", type=int, default=0, help="of the student's experts; 0: all")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each")
    arguments = parser.parse_args()

    teacher_config, teacher = load_hf(arguments.model, dtype="float32")
    config, student = teacher_config, teacher
    if arguments.width:
        config, student = apply_plan(
            teacher, teacher_config, first_neurons(teacher_config, arguments.width)
        )
    batch = next(
        iter(
            training_dataset(
                TrainingConfig((TEXT,), arguments.seq_len, arguments.batch_size),
                load_tokenizer(arguments.model),
                seed=0,
            )
        )
    )
    # One document a row: torch's side knows no segments.
    batch = {"tokens": batch["tokens"], "segment_ids": np.ones_like(batch["tokens"])}
    print(
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}, torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads; batch {arguments.batch_size} x {arguments.seq_len}"
    )
    ours = JaxSide(student, config, teacher, teacher_config, batch)
    with tempfile.TemporaryDirectory() as folder:
        save_hf(folder + "/student", student, config, source=arguments.model, dtype="float32")
        torch_sides = {}
        for experts in ("eager", "grouped_mm"):
            try:
                side = TorchSide(folder + "/student", arguments.model, batch, experts)
                side.step()
            except (RuntimeError, ValueError, NotImplementedError) as error:
                print(f"torch with experts_implementation={experts!r} cannot: {error}")
                continue
            side.losses.clear()
            torch_sides[f"torch, experts {experts}"] = TorchSide(
                folder + "/student", arguments.model, batch, experts
            )
    calls = {"moe_jax": ours.step} | {name: side.step for name, side in torch_sides.items()}
    seconds = best_seconds(calls, arguments.repeats)
    tokens = arguments.batch_size * arguments.seq_len
    for name, value in seconds.items():
        losses = (ours if name == "moe_jax" else torch_sides[name]).losses[:3]
        print(
            f"{name:26} {value * 1e3:8.1f} ms  {tokens / value:8,.0f} tokens/s  "
            f"first losses {', '.join(f'{loss:.5f}' for loss in losses)}"
        )
    fastest = min(value for name, value in seconds.items() if name != "moe_jax")
    print(f"torch / moe_jax: {fastest / seconds['moe_jax']:.2f}")

    parts = best_seconds(ours.parts(), arguments.repeats)
    backward = "student's blocks, forward and backward"
    rest = (
        parts["loss and gradient, all of it"] - parts["teacher's blocks, forward"] - parts[backward]
    )
    parts["both heads and the loss, forward and backward (the rest)"] = rest
    print("\nof moe_jax's step, each part compiled alone:")
    for name, value in parts.items():
        print(f"{name:58} {value * 1e3:8.1f} ms  {value / seconds['moe_jax']:5.0%}")


if __name__ == "__main__":
    main()
