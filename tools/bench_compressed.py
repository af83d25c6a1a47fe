"""Tokens per second of a shipped model after one-shot cuts, against the original in the same run.

    python tools/bench_compressed.py [--model=olmoe] [--ratios=0.5,0.25] [--repeats=7]

Held-out text in batches of 4 x 512 tokens, float32, compiled once per model. ``expert work`` is
what a token's experts multiply, measured on that text: 3 D neurons of those it was routed to,
against the original's. Rounds go over all models in turn, and the best of each is given, so that
what else the machine does falls on all alike. Also the time of a gradient of the loss.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import apply_plan, calibrate, forward, load_hf
from moe_jax.data import load_tokenizer
from moe_jax.data.evaluation import evaluation_windows
from moe_jax.params import count_params
from moe_jax.plan import Cut, plan_cut
from moe_jax.settings import EvaluationConfig

ASSETS = Path(__file__).parents[1] / "moe_jax" / "assets"
OWN_WIDTHS = {"own_widths": True, "constants": True, "round_to": 8}
METHODS = {
    "REAP, deleted": {"method": "reap", "replacement": "delete", "keep_ratio": 1},
    "MoNE": {"method": "mone", "keep_ratio": 1},
    "OBS, one width": {"method": "obs", "width_ratio": 1},
    "OBS across layers": {
        "method": "obs", "width_ratio": 1, "neuron_scope": "layer", **OWN_WIDTHS,
    },
    "OBS across the model": {
        "method": "obs", "width_ratio": 1, "neuron_scope": "model", **OWN_WIDTHS,
    },
    "OBS across the model, by work": {
        "method": "obs", "width_ratio": 1, "neuron_scope": "model", **OWN_WIDTHS,
        "active_share": 1.0,
    },
}  # fmt: skip


class Candidate:
    """A model with its compiled functions."""

    def __init__(self, params, config) -> None:
        self.params, self.config = params, config
        self.forward = jax.jit(lambda p, t: forward(p, config, t)[0])
        self.gradient = jax.jit(jax.grad(self._loss))
        self.best = {"forward": float("inf"), "gradient": float("inf")}

    def _loss(self, params, tokens):
        logits, _ = forward(params, self.config, tokens)
        return -jnp.take_along_axis(
            jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1
        ).mean()

    def time(self, batches) -> None:
        for name in self.best:
            function = getattr(self, name)
            start = time.perf_counter()
            for tokens in batches:
                made = function(self.params, tokens)
            jax.block_until_ready(made)
            self.best[name] = min(self.best[name], time.perf_counter() - start)

    def work(self, batches) -> float:
        """Neurons that a token's experts have, on average and over all layers."""
        run = jax.jit(lambda p, t: forward(p, self.config, t, taps=("group_sizes",))[1]["layers"])
        neurons = tokens = 0
        for batch in batches:
            tokens += batch.size
            for i, layer in enumerate(run(self.params, batch)):
                moe = self.config.moe(i)
                widths = np.array([moe.width_of(e) for e in moe.expert_ids])
                neurons += float(np.asarray(layer["group_sizes"]) @ widths)
        return neurons / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="olmoe", choices=("olmoe", "phimoe"))
    parser.add_argument("--ratios", default="0.5,0.25")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    config, params = load_hf(ASSETS / options.model, dtype="float32")
    tokenizer = load_tokenizer(ASSETS / options.model)
    tokens = {name: text(tokenizer, config, name) for name in ("calibration", "evaluation")}
    mask = np.ones(tokens["calibration"][0].shape, bool)
    batches = [{"tokens": batch, "mask": mask} for batch in tokens["calibration"]]
    stats = calibrate(params, config, batches, second_moments=True)
    models = {"original": Candidate(params, config)}
    for ratio in map(float, options.ratios.split(",")):
        for name, raw in METHODS.items():
            size = {key: ratio for key in ("keep_ratio", "width_ratio") if key in raw}
            cut = Cut.from_dict({**raw, **size}, name)
            plan = plan_cut(cut, stats, config, params=params).plan
            smaller, cut = apply_plan(params, config, plan, stats)
            models[f"{name} {ratio:g}"] = Candidate(cut, smaller)
    held_out = tokens["evaluation"][:4]
    for _ in range(options.repeats + 1):  # the first round compiles
        for model in models.values():
            model.time(held_out)
    columns = ("model", "expert parameters", "expert work", "tokens/s", "ratio")
    print("|", " | ".join([*columns, "gradient, tokens/s", "ratio"]), "|")
    print("|---|---|---|---|---|---|---|")
    original, count = models["original"], sum(batch.size for batch in held_out)
    for name, model in models.items():
        cells = [f"{count_params(model.config).experts:,}"]
        cells.append(f"{model.work(held_out) / original.work(held_out):.2f}")
        for kind, best in model.best.items():
            cells += [f"{count / best:,.0f}", f"{original.best[kind] / best:.2f}"]
        print("|", " | ".join([name, *cells]), "|")


def text(tokenizer, config, folder: str) -> list[np.ndarray]:
    """Whole batches of 4 x 512 tokens of a shipped text, domain after domain."""
    files = (str(ASSETS / "text" / folder / "*.jsonl.xz"),)
    settings = EvaluationConfig(files, seq_len=512, batch_size=4, max_bytes=40_000)
    windows = evaluation_windows(settings, tokenizer, vocab_size=config.vocab_size)
    return [batch["tokens"] for batch in windows.batches]


if __name__ == "__main__":
    main()
