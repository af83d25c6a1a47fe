"""Parity with transformers over drawn models of every family, and cuts of each, in one table.

    python tools/check_families.py                        # 40 models and all cuts of each family
    python tools/check_families.py --families olmoe,mixtral --models 5 --cuts "MoNE;own widths"

Models are tiny and random, their switches drawn with a fixed seed. Of each: the largest error of a
logit and the mean KL divergence against eager float32 attention and experts in torch, and a round
trip that must not change a byte. Of each cut: the largest error of a logit between the cut and its
export, loaded by transformers. Exits with 1 where a bound is passed. Takes about a second a model
and five a cut.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import transformers

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from family_cuts import CUTS, export_error  # noqa: E402
from tiny_hf import (  # noqa: E402
    FAMILIES,
    MIXTURES,
    SHARING,
    VOCAB,
    YARN,
    read_tensors,
    save_tiny,
    torch_logits,
)

from moe_jax import forward, load_hf, save_hf  # noqa: E402
from moe_jax.text import aligned  # noqa: E402

MAX_ERROR, MAX_KL = 2e-4, 1e-8
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1000.0}
_ROPES = [_DEFAULT_ROPE, YARN]
_LATENT_ROPES = [*_ROPES, {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}]
_BIASES = {"attention_bias": [False, True]}
_GROUPS = {"groups": [{"n_group": n, "topk_group": k} for n, k in ((1, 1), (2, 1), (2, 2), (4, 3))]}
_LATENT = {
    "q_lora_rank": [None, 12],
    "kv_lora_rank": [6, 8],
    "qk_nope_head_dim": [4, 6],
    "v_head_dim": [4, 8, 10],
    "rope_parameters": _LATENT_ROPES,
}
_COUNTED = {"n_shared_experts": [1, 2, 3], "routed_scaling_factor": [1.0, 2.5]}
_SPARSE = {"mlp_only_layers": [[], [0], [1]], "decoder_sparse_step": [1, 2]}
_MULTIPLIERS = {
    "embedding_multiplier": [1.0, 12.0],
    "residual_multiplier": [1.0, 0.22],
    "attention_multiplier": [0.5, 0.1],
    "logits_scaling": [1, 6.0],
}
# Family -> key of its configuration -> values that are drawn from. A value that is a dict under a
# name that is no key stands for several keys.
SWITCHES: dict[str, dict[str, list[Any]]] = {
    "phimoe": {**_BIASES, "lm_head_bias": [False, True], "sliding_window": [None, 5]},
    "olmoe": {**_BIASES, "clip_qkv": [None, 0.5], "norm_topk_prob": [False, True]},
    "mixtral": {"sliding_window": [None, 5], "head_dim": [4, 8]},
    "qwen2_moe": {"qkv_bias": [False, True], "norm_topk_prob": [False, True], **_SPARSE},
    "qwen3_moe": {**_BIASES, "norm_topk_prob": [False, True], "head_dim": [4, 8], **_SPARSE},
    "llama": {**_BIASES, "head_dim": [4, 8]},
    "deepseek_v2": {
        **_BIASES,
        **_LATENT,
        **_COUNTED,
        "groups": [
            {"topk_method": "greedy"},
            *({**one, "topk_method": "group_limited_greedy"} for one in _GROUPS["groups"]),
        ],
        "first_k_dense_replace": [0, 1, 2],
    },
    "deepseek_v3": {
        **_BIASES,
        **_LATENT,
        **_COUNTED,
        **_GROUPS,
        "rope_interleave": [False, True],
        "norm_topk_prob": [False, True],
        "first_k_dense_replace": [0, 1, 2],
    },
    "glm4_moe": {
        **_BIASES,
        **_COUNTED,
        **_GROUPS,
        "use_qk_norm": [False, True],
        "rope_parameters": [
            {**rope, "partial_rotary_factor": share} for rope in _ROPES for share in (0.5, 0.25, 1)
        ],
        "norm_topk_prob": [False, True],
        "first_k_dense_replace": [0, 1, 2],
    },
    "glm4_moe_lite": {
        **_BIASES,
        **_LATENT,
        **_COUNTED,
        **_GROUPS,
        "rope_interleave": [False, True],
        "mlp_layer_types": [None, ["sparse", "dense", "sparse"]],
    },
    "minimax_m2": {
        "rope_parameters": [
            {**_DEFAULT_ROPE, "partial_rotary_factor": share} for share in (0.25, 0.5, 1.0)
        ],
        "num_local_experts": [4, 8],
    },
    "granitemoe": {**_BIASES, **_MULTIPLIERS},
    "granitemoeshared": {**_BIASES, **_MULTIPLIERS, "shared_intermediate_size": [0, 6, 10]},
    "gpt_oss": {
        **_BIASES,
        "head_dim": [4, 8],
        "sliding_window": [3, 7],
        "swiglu_limit": [0.5, 7.0],
        "layer_types": [None, ["full_attention"] * 2, ["full_attention", "sliding_attention"]],
        "rope_parameters": [None, *_ROPES, {**YARN, "truncate": False}],
    },
    "ernie4_5_moe": {
        "moe_num_shared_experts": [1, 2],
        "moe_layer_interval": [1, 2],
        "moe_layer_start_index": [0, 1],
        "moe_layer_end_index": [-1, 1],
        "moe_k": [1, 2, 3],
    },
}
_COMMON = {"tie_word_embeddings": [False, True], "num_experts_per_tok": [1, 2, 3]}


def drawn(family: str, rng: np.random.Generator) -> dict[str, Any]:
    """One value of each switch."""
    changes: dict[str, Any] = {}
    grid = {**_COMMON, **SWITCHES[family]}
    if family == "phimoe":  # its router always picks two
        del grid["num_experts_per_tok"]
    if family == "ernie4_5_moe":
        del grid["num_experts_per_tok"]
    for name, values in grid.items():
        value = values[rng.integers(len(values))]
        several = isinstance(value, dict) and name != "rope_parameters"
        changes.update(value if several else {name: value})
    if changes.get("n_group", 1) == 4:  # two experts each, of which one group must give K
        changes["num_experts_per_tok"] = min(changes["num_experts_per_tok"], 2)
    return changes


def parity(folder: Path, family: str, rng: np.random.Generator) -> tuple[float, float]:
    """Largest error of a logit and mean KL of one drawn model; raises if a round trip differs."""
    changes = drawn(family, rng)
    source = save_tiny(folder / "source", family, seed=int(rng.integers(1 << 30)), **changes)
    tokens = rng.integers(1, VOCAB, (2, 20))
    config, params = load_hf(source)
    ours = np.asarray(jax.jit(lambda w: forward(w, config, tokens)[0])(params), np.float64)
    theirs = torch_logits(source, tokens).astype(np.float64)
    log_p, log_q = (a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in (theirs, ours))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    error = np.abs(ours - theirs).max()
    if error > MAX_ERROR or kl > MAX_KL:
        print(f"{family}: error {error:.1e}, KL {kl:.1e} with {changes}")
    save_hf(folder / "out", params, config, source=source)
    if read_tensors(folder / "out") != read_tensors(source):
        raise ValueError(f"{family}: a round trip changed bytes with {changes}")
    return float(error), float(kl)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--models", type=int, default=40, help="drawn of each family")
    parser.add_argument("--cuts", default=";".join(CUTS), help="of each family with experts")
    asked = parser.parse_args()
    names = [name for name in CUTS if name in asked.cuts.split(";")]
    rows, failed = [], False
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    for family in asked.families.split(","):
        rng = np.random.default_rng(sum(map(ord, family)))
        found = []
        for _ in range(asked.models):
            with tempfile.TemporaryDirectory() as folder:
                found.append(parity(Path(folder), family, rng))
        worst = [max(column) for column in zip(*found, strict=True)] if found else [0.0, 0.0]
        failed |= worst[0] > MAX_ERROR or worst[1] > MAX_KL
        cells = []
        for name in names:
            if family not in (SHARING if name.startswith("shared") else MIXTURES):
                cells.append("-")
                continue
            with tempfile.TemporaryDirectory() as folder:
                source = save_tiny(Path(folder) / "source", family)
                error, stock = export_error(source, Path(folder) / "out", name)
            failed |= error > MAX_ERROR
            cells.append(f"{error:.1e}{' stock' if stock else ''}")
        rows.append([family, f"{worst[0]:.1e}", f"{worst[1]:.1e}", *cells])
        print(*rows[-1], flush=True)
        jax.clear_caches()
    print(aligned([["family", "logits", "KL", *names], *rows]))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
