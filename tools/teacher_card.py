"""Writes the model card of a trained teacher, with its pictures, from what is measured.

    python tools/teacher_card.py --model=moe_jax/assets/olmoe --training=outputs/olmoe \\
        --config=configs/teacher_olmoe.py --hardware="2 CPU cores"

Reads the teacher's folder and the ``metrics.jsonl`` of its training; measures, on the text that
ships with the package, held-out losses and how differently the domains are routed; and writes
``README.md``, ``loss.png`` and ``routing.png`` into the teacher's folder. Run it again after
training again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict, config_flags

from moe_jax.calibrate import calibrate_domains, domain_batches
from moe_jax.config import ModelConfig
from moe_jax.data import evaluation_windows, load_tokenizer
from moe_jax.data.documents import expand_files
from moe_jax.evaluate import Evaluation, evaluate
from moe_jax.hf import load_hf
from moe_jax.hf.config_import import model_config
from moe_jax.metrics import read_metrics
from moe_jax.params import count_params
from moe_jax.report import plot_routing_by_domain
from moe_jax.report.figures.quality import running_mean
from moe_jax.report.figures.theme import Theme, new_figure, themed
from moe_jax.report.markdown import front_matter, markup_table
from moe_jax.run.describe import measured_layer
from moe_jax.settings import CalibrationConfig, EvaluationConfig

_MODEL = flags.DEFINE_string("model", None, "Folder of the teacher.", required=True)
_TRAINING = flags.DEFINE_string("training", None, "Folder of its training.", required=True)
_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration that it was trained with.")
_TEXT = flags.DEFINE_string("text", "moe_jax/assets/text", "Calibration and evaluation text.")
_HARDWARE = flags.DEFINE_string("hardware", None, "What it was trained on.", required=True)
_MINUTES = flags.DEFINE_float("minutes", 0, "Wall time of training; 0 adds up the logged speeds.")
_SEQUENCES = flags.DEFINE_integer("sequences", 256, "Sequences whose routing is counted.")

NAMES = {"olmoe": "OLMoE", "phimoe": "Phi-MoE", "qwen3_moe": "Qwen3-MoE"}
ROUTERS = {"softmax": "softmax, top-k", "sparsemixer": "SparseMixer"}
# Domain -> (repository, commit, licence) of each source.
SOURCES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "books": (("mlschmitt/classic-books-markdown", "944882722e9a", "public domain (US)"),),
    "web": (
        ("GSA/digitalgov.gov", "4979583206d9", "public domain, CC0-1.0"),
        ("18F/18f.gsa.gov", "0a55c75e6d9b", "public domain, CC0-1.0"),
    ),
    "encyclopedia": (
        ("jburnford/Encyclopedia_Britannica_1771-1860", "27b268cb9491", "public domain (1810)"),
        ("factbook/factbook.json", "8662a8b17a78", "public domain, CC0-1.0"),
    ),
    "code_python": (
        ("networkx/networkx", "cfc6b79fc53f", "BSD-3-Clause"),
        ("sympy/sympy", "e950d313a932", "BSD-3-Clause"),
    ),
    "code_go_js": (
        ("prometheus/prometheus", "d15adb9ad7e5", "Apache-2.0"),
        ("eslint/eslint", "c27bc926e496", "MIT"),
    ),
    "techdocs": (
        (
            "python/peps",
            "ba4deeb79695",
            "public domain, CC0-1.0; PEPs 437, 551 and 578: Open Publication License 1.0",
        ),
        ("rust-lang/book", "917544888a55", "MIT OR Apache-2.0"),
        ("rust-lang/blog.rust-lang.org", "0243724c2e50", "MIT OR Apache-2.0"),
    ),
    "math_word": (("openai/grade-school-math", "3101c7d50724", "MIT"),),
    "math_symbolic": (
        ("google-deepmind/mathematics_dataset", "427f45075f84", "Apache-2.0 (generator)"),
    ),
}
# Tokens per active parameter at which more of the same compute is better spent on a larger model
# (arXiv 2203.15556).
ENOUGH_TOKENS = 20
TOP_EXPERTS = 3
DPI = 110


@dataclass(frozen=True)
class Training:
    """What the log of a training tells.

    Attributes:
        tokens: Int[N], seen so far at each logged step.
        loss: [N], next-token cross-entropy of that step's batch, in nats.
        steps: the last logged step.
        minutes: wall time by the logged speeds.
    """

    tokens: np.ndarray
    loss: np.ndarray
    steps: int
    minutes: float


@dataclass(frozen=True)
class Specialisation:
    """How differently one layer routes the domains.

    Attributes:
        divergence: Jensen-Shannon divergence between the domains' distributions over experts, in
            bits: 0 if all are alike, log2(number of domains) if they share no expert.
        elsewhere: mean share of a domain's selections that lie elsewhere than the average domain's.
        busiest, idlest: load of these experts over all domains, 1 = fair share.
    """

    divergence: float
    elsewhere: float
    busiest: float
    idlest: float


def read_training(folder: Path, tokens_per_step: int) -> Training:
    """The log of a training; of steps that were repeated after a resume, the last counts.

    Raises:
        FileNotFoundError: there is no ``metrics.jsonl``.
        ValueError: it is empty.
    """
    records = {record["step"]: record for record in read_metrics(folder / "metrics.jsonl")}
    if not records:
        raise ValueError(f"{folder / 'metrics.jsonl'} must hold at least one step, got none")
    steps = sorted(records)
    seconds = sum(
        (step - before) * tokens_per_step / records[step]["tokens_per_second"]
        for before, step in zip([0, *steps], steps, strict=False)
        if "tokens_per_second" in records[step]
    )
    return Training(
        tokens=np.asarray(steps) * tokens_per_step,
        loss=np.asarray([records[step]["lm"] for step in steps]),
        steps=steps[-1],
        minutes=seconds / 60,
    )


@themed
def plot_loss(theme: Theme, training: Training) -> Figure:
    """Training loss against tokens: each logged batch, and their running mean."""
    figure = new_figure(2.9)
    axes = figure.add_subplot()
    millions = training.tokens / 1e6
    mean = running_mean(training.loss, max(1, len(training.loss) // 25))
    axes.plot(millions, training.loss, color=theme.before, alpha=0.55, lw=0.8, label="batch")
    axes.plot(millions, mean, color=theme.after, linewidth=2, label="running mean")
    axes.annotate(
        f"{mean[-1]:.2f}",
        (millions[-1], mean[-1]),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=theme.after,
        size=9.5,
    )
    axes.set_xlim(0, 1.06 * millions[-1])
    axes.set_xlabel("training tokens, millions")
    axes.set_ylabel("loss, nats per token")
    axes.legend(loc="upper right")
    return figure


def specialisation(frequency: Mapping[str, Sequence[float]]) -> Specialisation:
    """Compares the domains' routing in one layer; see ``Specialisation``."""
    table = np.asarray(list(frequency.values()), np.float64)
    average = table.mean(0)
    return Specialisation(
        divergence=float(_entropy(average) - np.mean([_entropy(row) for row in table])),
        elsewhere=float(0.5 * np.abs(table - average).sum(1).mean()),
        busiest=float(average.max() * len(average)),
        idlest=float(average.min() * len(average)),
    )


def _entropy(distribution: np.ndarray) -> float:
    positive = distribution[distribution > 0]
    return float(-(positive * np.log2(positive)).sum())


def over_represented(routing: Sequence[Mapping[str, Any]], domain: str) -> list[str]:
    """Experts that a domain uses most beyond the average domain's use.

    Only experts that take at least a fair share of the domain's selections count: a ratio of two
    small numbers says little.
    """
    found = []
    for layer in routing:
        table = np.asarray(list(layer["frequency"].values()), np.float64)
        own = np.asarray(layer["frequency"][domain], np.float64)
        ratio = own / np.maximum(table.mean(0), 1e-30)
        for expert in np.flatnonzero(own >= 1 / len(own)):
            found.append((float(ratio[expert]), f"{layer['layer']}.{expert}"))
    found.sort(reverse=True)
    return [f"{name} ({ratio:.1f}x)" for ratio, name in found[:TOP_EXPERTS]]


def introduction(config: ModelConfig, tokens: int) -> str:
    name = NAMES.get(config.family, config.family)
    millions = count_params(config).total / 1e6
    return (
        f"# A small {name}, trained from scratch\n\n"
        f"{millions:.1f} million parameters, trained with `moe_jax` on {tokens / 1e6:.1f} million "
        f"tokens of freely licensed text. It ships with the package so that compression can be "
        f"tried and tested, on any machine, on a real Mixture-of-Experts model whose experts have "
        f"learned different things. It is no use as a language model.\n\n"
        f"What follows was measured, or read from the training's configuration and log, by "
        f"`tools/teacher_card.py`."
    )


def architecture(config: ModelConfig) -> str:
    moe = config.moe(config.moe_layers[0])
    counts = count_params(config)
    heads = config.layers[0]
    rows = [
        ("`model_type`", f"`{config.family}`"),
        ("parameters", f"{counts.total:,}"),
        ("active per token", f"{counts.active:,}"),
        ("in experts", f"{counts.experts:,} ({counts.experts / counts.total:.0%})"),
        ("layers", config.num_layers),
        ("experts per layer", moe.num_experts),
        ("experts per token", moe.experts_per_token),
        ("expert width", moe.expert_width),
        ("router", ROUTERS[config.router.kind]),
        ("model width", config.width),
        ("query heads, key/value heads", f"{heads.num_heads}, {heads.num_kv_heads}"),
        ("head dimension", config.head_dim),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("embeddings tied", "yes" if config.tied_embeddings else "no"),
    ]
    return "## Architecture\n\n" + markup_table([("", ""), *rows], numbers=False)


def training_section(settings: ConfigDict, training: Training, hardware: str, minutes: float):
    train = settings.train
    unfinished = f" of {train.steps:,} planned" if training.steps < train.steps else ""
    rows = [
        ("steps", f"{training.steps:,}{unfinished}"),
        ("tokens per step", f"{settings.batch_size} sequences of {settings.seq_len}"),
        ("tokens in all", f"{training.tokens[-1]:,}"),
        ("optimizer", f"AdamW, weight decay {train.weight_decay}"),
        ("learning rate", f"{train.learning_rate}, {train.warmup_steps} steps of warm-up, cosine"),
        ("load-balancing loss", f"{train.balance_weight} per layer"),
        ("computed in", train.compute_dtype),
        ("hardware", hardware),
        ("wall time", f"about {minutes:,.0f} minutes"),
    ]
    return (
        "## Training\n\n"
        + markup_table([("", ""), *rows], numbers=False)
        + "\n\n![Training loss](loss.png)"
    )


def data_section(settings: ConfigDict) -> str:
    """Raises ValueError if a domain of the configuration has no entry in ``SOURCES``."""
    unknown = sorted(set(settings.sources) - set(SOURCES))
    if unknown:
        raise ValueError(f"sources must be among {sorted(SOURCES)}, got {unknown}")
    total = sum(settings.sources.values())
    rows = []
    for domain, share in settings.sources.items():
        origins = "<br>".join(
            f"[{repository}](https://github.com/{repository}) at {commit}: {licence}"
            for repository, commit, licence in SOURCES[domain]
        )
        rows.append((domain, f"{share / total:.0%}", origins))
    return (
        "## Data\n\n"
        + markup_table([("domain", "share of tokens", "sources"), *rows], numbers=False)
        + "\n\nDocuments of the calibration and evaluation text in `moe_jax/assets/text` were held "
        f"out. The tokenizer is a byte-level BPE of {settings.model.vocab_size:,} entries, trained "
        "on 44.5 MB of text and code; it takes digits one by one. `<|endoftext|>` stands before "
        "each document."
    )


def held_out_section(evaluation: Evaluation) -> str:
    named = [
        *evaluation.domains.items(),
        ("**all text**", evaluation.total),
        ("**mean of domains**", evaluation.mean),
    ]
    rows = [
        (name, f"{d.tokens:,}", f"{d.perplexity:,.1f}", f"{d.bits_per_byte:.3f}")
        for name, d in named
    ]
    return (
        "## Held-out text\n\n"
        f"`moe_jax/assets/text/evaluation`, all of it, in windows of {evaluation.seq_len} "
        "tokens.\n\n" + markup_table([("domain", "tokens", "perplexity", "bits per byte"), *rows])
    )


def experts_section(routing: Sequence[Mapping[str, Any]], tokens: int) -> str:
    domains = list(routing[0]["frequency"])
    found = {layer["layer"]: specialisation(layer["frequency"]) for layer in routing}
    divergence = np.mean([layer.divergence for layer in found.values()])
    elsewhere = np.mean([layer.elsewhere for layer in found.values()])
    layers = [
        (i, f"{s.divergence:.3f}", f"{s.elsewhere:.0%}", f"{s.busiest:.2f}", f"{s.idlest:.2f}")
        for i, s in found.items()
    ]
    header = ("layer", "divergence, bits", "elsewhere", "busiest expert", "idlest expert")
    favourites = [(domain, ", ".join(over_represented(routing, domain))) for domain in domains]
    return (
        "## What the experts have learned\n\n"
        f"Routing of {tokens:,} tokens of `moe_jax/assets/text/calibration`. Each map is a layer, "
        "each column an expert; dark cells are experts that a domain uses beyond its fair share."
        "\n\n![Routing by domain](routing.png)\n\n"
        f"The Jensen-Shannon divergence between the {len(domains)} domains' routing is "
        f"**{divergence:.3f} bits** as a mean over layers: 0 if every domain used the same experts "
        f"equally, {math.log2(len(domains)):.0f} if no two shared one. "
        f"Put otherwise, **{elsewhere:.0%}** of a domain's selections lie elsewhere than the "
        "average domain's. The last two columns show how evenly all domains together load the "
        "experts (1 is a fair share).\n\n"
        + markup_table([header, *layers])
        + "\n\nExperts that each domain uses most beyond the average domain, as layer.expert:\n\n"
        + markup_table([("domain", "experts"), *favourites], numbers=False)
    )


def limits_section(config: ModelConfig, tokens: int, hardware: str, minutes: float) -> str:
    ratio = tokens / count_params(config).active
    lines = [
        f"Trained on {hardware} for about {minutes:,.0f} minutes, {tokens / 1e6:.1f} million "
        f"tokens: {ratio:.1f} per active parameter"
        + (
            f". {ENOUGH_TOKENS} would be usual: it is undertrained and will be retrained."
            if ratio < ENOUGH_TOKENS
            else "."
        ),
        "What compression costs such a small model says little about what it costs a large one.",
        "English and four code bases only; the encyclopedia and the books are mostly more than a "
        "century old, with the views of their time.",
        "It has seen no conversation, follows no instructions, and was not made safe in any way.",
    ]
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def remaking_section(config_file: str, family: str) -> str:
    return (
        "## Making it again\n\n"
        "```\n"
        "python tools/prepare_text.py --data=CORPUS --output=outputs/text\n"
        f"python tools/train_teacher.py --config={config_file} --config.output=outputs/{family}\n"
        f"python tools/teacher_card.py --config={config_file} --training=outputs/{family} \\\n"
        f"    --model=outputs/{family}/model --hardware=NAME\n"
        "```"
    )


def measure(
    folder: Path, config: ModelConfig, params: Any, text: Path, seq_len: int, sequences: int
) -> tuple[list[dict[str, Any]], int, Evaluation]:
    """Routing by layer and domain, the tokens that it was counted over, and held-out losses."""
    tokenizer = load_tokenizer(folder)
    files = expand_files(str(text / "calibration/*.jsonl.xz"))
    calibration = CalibrationConfig(num_sequences=sequences, seq_len=seq_len, batch_size=8)
    stats = calibrate_domains(params, config, domain_batches(files, tokenizer, calibration))
    evaluation = evaluate(
        params,
        config,
        evaluation_windows(
            EvaluationConfig((str(text / "evaluation/*.jsonl.xz"),), seq_len=seq_len), tokenizer
        ),
        description="held-out text",
    )
    return [measured_layer(stats, i) for i in sorted(stats.layers)], stats.tokens, evaluation


def main(_: list[str]) -> None:
    settings: ConfigDict = _CONFIG.value
    folder, seq_len = Path(_MODEL.value), settings.seq_len
    config, params = load_hf(folder, "float32")
    if config != model_config(settings.model.to_dict()):
        raise ValueError(f"{folder} was not trained with this configuration: architectures differ")
    training = read_training(Path(_TRAINING.value), settings.batch_size * seq_len)
    tokens, minutes = int(training.tokens[-1]), _MINUTES.value or training.minutes
    data = data_section(settings)
    routing, counted, evaluation = measure(
        folder, config, params, Path(_TEXT.value), seq_len, _SEQUENCES.value
    )
    fields = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "language": ["en"],
        "tags": ["moe", "mixture-of-experts", config.family, "moe_jax", "from-scratch"],
    }
    sections = [
        front_matter(fields),
        introduction(config, tokens),
        architecture(config),
        training_section(settings, training, _HARDWARE.value, minutes),
        data,
        held_out_section(evaluation),
        experts_section(routing, counted),
        limits_section(config, tokens, _HARDWARE.value, minutes),
        remaking_section(config_flags.get_config_filename(flags.FLAGS["config"]), config.family),
    ]
    plot_loss(training).savefig(folder / "loss.png", dpi=DPI)
    plot_routing_by_domain(routing).savefig(folder / "routing.png", dpi=DPI)
    (folder / "README.md").write_text("\n\n".join(sections) + "\n")
    for name in ("README.md", "loss.png", "routing.png"):
        print(f"{folder / name}: {(folder / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
