"""Parity with transformers over drawn models of every family, and cuts of each, in one table.

    python tools/check_families.py                        # 40 models and all cuts of each family
    python tools/check_families.py --families olmoe,mixtral --models 5 --cuts "MoNE;own widths"

Models are tiny and random, their switches drawn with a fixed seed. Of each, against eager float32
attention and experts in torch: the largest error of a logit and the mean KL divergence of whole
sequences; the largest error in one that is padded and in two that share a row; the largest
difference between logits with a cache, one token at a time, and without; whether every token goes
to the same experts wherever the scores that decide differ by more than 1e-5 (relative; the others
are counted); and a round trip that must not change a byte. Of each cut: the largest error of a
logit between the cut and its export, loaded by transformers.

What is found is added to a file, a line each, and is not computed again: a run that was ended goes
on where it was, and several may run beside each other on other families. Another version of the
package wants another file. Exits with 1 where a bound is passed. Compiling takes nearly all of the
time, so XLA is told not to optimise: three seconds of a core a model, ten a cut.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from family_cuts import CUTS, export_error  # noqa: E402
from tiny_hf import (  # noqa: E402
    FAMILIES,
    LONGROPE,
    MIXTURES,
    SHARING,
    VOCAB,
    YARN,
    read_tensors,
    save_tiny,
    torch_model,
)

from moe_jax import forward, load_hf, save_hf  # noqa: E402
from moe_jax.config import ModelConfig  # noqa: E402
from moe_jax.kinds import RouterConfig, SigmoidRouter, SparseMixerRouter  # noqa: E402
from moe_jax.model.generate import decode_step, prefill  # noqa: E402
from moe_jax.text import aligned  # noqa: E402

Grid = dict[str, list[Any]]
MAX_ERROR, MAX_KL, DECIDED = 2e-4, 1e-8, 1e-5
_LENGTH = 20
# Rows, and where their sequences begin and end: two whole ones, a padded one, two in one row.
_SEQUENCES = ((0, 0, 20), (1, 0, 20), (2, 0, 13), (3, 0, 8), (3, 8, 17))
# Tokens of the first two rows that are read at once, before the others come one by one. LongRoPE's
# switch, at 8, is behind both: a cache from before it would have to be made anew.
_PROMPTS = (10, 9)
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1000.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_ROPES = [_DEFAULT_ROPE, YARN]
_LATENT_ROPES = [
    *_ROPES,
    {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    {**YARN, "beta_fast": 1, "beta_slow": 1},  # Kimi-K2
]
_BIASES: Grid = {"attention_bias": [False, True]}
_GROUPS: Grid = {
    "groups": [{"n_group": n, "topk_group": k} for n, k in ((1, 1), (2, 1), (2, 2), (4, 3))]
}
_LATENT: Grid = {
    "q_lora_rank": [None, 12],
    "kv_lora_rank": [6, 8],
    "qk_nope_head_dim": [4, 6],
    "v_head_dim": [4, 8, 10],
    "rope_parameters": _LATENT_ROPES,
}
_COUNTED: Grid = {"n_shared_experts": [1, 2, 3], "routed_scaling_factor": [1.0, 2.5]}
_SPARSE: Grid = {"mlp_only_layers": [[], [0], [1]], "decoder_sparse_step": [1, 2]}
_MULTIPLIERS: Grid = {
    "embedding_multiplier": [1.0, 12.0],
    "residual_multiplier": [1.0, 0.22],
    "attention_multiplier": [0.5, 0.1],
    "logits_scaling": [1, 6.0],
}
# Family -> key of its configuration -> values that are drawn from. A value that is a dict under a
# name that is no key stands for several keys.
SWITCHES: dict[str, Grid] = {
    "phimoe": {
        **_BIASES,
        "lm_head_bias": [False, True],
        "sliding_window": [None, 5],
        "router_jitter_noise": [0.01, 0.4],
        "rope_parameters": [_DEFAULT_ROPE, LONGROPE],
    },
    "olmoe": {**_BIASES, "clip_qkv": [None, 0.5], "norm_topk_prob": [False, True]},
    "mixtral": {"sliding_window": [None, 5], "head_dim": [4, 8]},
    "qwen2_moe": {
        **_SPARSE,
        "qkv_bias": [False, True],
        "norm_topk_prob": [False, True],
        "use_sliding_window": [False, True],
        "shared_expert_intermediate_size": [6, 10],
    },
    "qwen3_moe": {
        **_BIASES,
        **_SPARSE,
        "norm_topk_prob": [False, True],
        "use_sliding_window": [False, True],
        "head_dim": [4, 8],
    },
    "llama": {**_BIASES, "head_dim": [4, 8], "rope_parameters": [_DEFAULT_ROPE, _LLAMA3]},
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
            {**rope, "partial_rotary_factor": share}
            for rope in _ROPES
            for share in (0.25, 0.5, 1.0)
        ],
        "num_local_experts": [4, 8],
    },
    "granitemoe": {**_BIASES, **_MULTIPLIERS, "rope_parameters": _ROPES},
    "granitemoeshared": {
        **_BIASES,
        **_MULTIPLIERS,
        "rope_parameters": _ROPES,
        "shared_intermediate_size": [0, 6, 10],
    },
    "gpt_oss": {
        **_BIASES,
        "head_dim": [4, 8],
        "sliding_window": [3, 7],
        "swiglu_limit": [0.5, 7.0],
        "swiglu_alpha": [0.7, 1.702],
        "layer_types": [None, ["full_attention"] * 2, ["full_attention", "sliding_attention"]],
        "rope_parameters": [None, *_ROPES, {**YARN, "truncate": False}],
    },
    "ernie4_5_moe": {
        "moe_num_shared_experts": [1, 2],
        "moe_layer_interval": [1, 2],
        "moe_layer_start_index": [0, 1],
        "moe_layer_end_index": [-1, 1],
        "moe_k": [1, 2, 3],
        "rope_parameters": _ROPES,
    },
}
_COMMON: Grid = {"tie_word_embeddings": [False, True], "num_experts_per_tok": [1, 2, 3]}


def drawn(family: str, rng: np.random.Generator) -> dict[str, Any]:
    """One value of each switch."""
    changes: dict[str, Any] = {}
    grid = {**_COMMON, **SWITCHES[family]}
    if "kv_lora_rank" not in grid:  # latent attention has keys and values for every head
        grid["num_key_value_heads"] = [1, 2, 4]
    if family in ("phimoe", "ernie4_5_moe"):  # always two, and under another name
        del grid["num_experts_per_tok"]
    for name, values in grid.items():
        value = values[rng.integers(len(values))]
        several = isinstance(value, dict) and name != "rope_parameters"
        changes.update(value if several else {name: value})
    if changes.get("n_group", 1) == 4:  # two experts each, of which one group must give K
        changes["num_experts_per_tok"] = min(changes["num_experts_per_tok"], 2)
    return changes


def parity(folder: Path, family: str, rng: np.random.Generator) -> dict[str, Any]:
    """What is found of one drawn model.

    Raises:
        ValueError: a round trip changes bytes.
    """
    changes = drawn(family, rng)
    source = save_tiny(folder / "source", family, seed=int(rng.integers(1 << 30)), **changes)
    tokens = rng.integers(1, VOCAB, (4, _LENGTH))
    config, params = load_hf(source)
    ours = jax.jit(_ours, static_argnums=1)(params, config, tokens, _segment_ids())
    logits, ids, cached = jax.tree.map(np.asarray, ours)
    theirs, routed = _theirs(torch_model(source), tokens)
    found = {"logits": 0.0, "kl": 0.0, "packed": 0.0, "cache": 0.0, "undecided": 0, "misrouted": 0}
    for (row, start, end), expected, layers in zip(_SEQUENCES, theirs, routed, strict=True):
        own = [chosen.reshape(*tokens.shape, -1)[row, start:end] for chosen in ids]
        if not _compare_routing(own, layers, config, found):
            continue
        mine, whole = logits[row, start:end], end - start == _LENGTH
        name = "logits" if whole else "packed"
        found[name] = max(found[name], float(np.abs(mine - expected).max()))
        if whole:
            found["kl"] = max(found["kl"], _divergence(expected, mine))
    for row, start in enumerate(_PROMPTS):
        whole = logits[row, start - 1 :][: len(cached)]
        found["cache"] = max(found["cache"], float(np.abs(whole - cached[:, row]).max()))
    save_hf(folder / "out", params, config, source=source)
    if read_tensors(folder / "out") != read_tensors(source):
        raise ValueError(f"{family}: a round trip changed bytes with {changes}")
    return {**found, "switches": changes}


def _compare_routing(own, layers, config: ModelConfig, found: dict[str, Any]) -> bool:
    """Adds to the counts of ``found``; whether a sequence goes to the same experts in both."""
    for mine, (logits, correction, theirs) in zip(own, layers, strict=True):
        differ = (np.sort(mine, -1) != np.sort(theirs, -1)).any(-1)
        undecided = _margin(logits, correction, config.router, theirs.shape[-1]) <= DECIDED
        found["undecided"] += int(undecided.sum())
        found["misrouted"] += int((differ & ~undecided).sum())
        if (differ & undecided).any():  # nothing is wrong, and nothing behind it can be compared
            return False
    return True


def _segment_ids() -> np.ndarray:
    segment_ids = np.zeros((4, _LENGTH), np.int32)
    for n, (row, start, end) in enumerate(_SEQUENCES):
        segment_ids[row, start:end] = n + 1
    return segment_ids


def _ours(params, config: ModelConfig, tokens, segment_ids):
    """Logits [B, S, V], experts chosen in each layer, and logits [steps, 2, V] with a cache."""
    logits, aux = forward(params, config, tokens, segment_ids, ("expert_ids",))
    longest = max(_PROMPTS)
    first, cache = prefill(params, config, tokens[:2, :longest], jnp.array(_PROMPTS), _LENGTH)
    steps = _LENGTH - longest
    fed = jnp.stack([tokens[row, at : at + steps] for row, at in enumerate(_PROMPTS)], 1)

    def step(cache, new):
        logits, cache = decode_step(params, config, cache, new)
        return cache, logits

    _, later = jax.lax.scan(step, cache, fed)
    ids = [layer["expert_ids"] for layer in aux["layers"] if "expert_ids" in layer]
    return logits, ids, jnp.concatenate([first[None], later])


def _theirs(model, tokens: np.ndarray) -> tuple[list[np.ndarray], list[list[Any]]]:
    """Of each sequence alone its logits, and by layer router logits, corrections and experts."""
    taken: list[Any] = []
    for layer in model.model.layers:
        tensors = layer.state_dict().items()
        added = sum(t.double().numpy().ravel() for name, t in tensors if name.endswith(_ADDED))

        def keep(router, args, output, correction=added):
            taken.append((output[0].double().numpy(), correction, output[2].numpy()))

        for part in layer.modules():
            if type(part).__name__.lower().endswith("topkrouter"):
                part.register_forward_hook(keep)
    logits, routed = [], []
    for row, start, end in _SEQUENCES:
        with torch.no_grad():
            logits.append(model(torch.tensor(tokens[row : row + 1, start:end])).logits[0].numpy())
        routed.append(list(taken))
        taken.clear()
    return logits, routed


_ADDED = "e_score_correction_bias"


def _margin(logits: np.ndarray, correction, router: RouterConfig, k: int) -> np.ndarray:
    """How far the last choice is from the first that is none, of each token, relative, float64."""
    if isinstance(router, SigmoidRouter):
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = np.exp(logits - logits.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
    scores = scores + correction
    if isinstance(router, SparseMixerRouter) or router.groups == 1:
        return _gap(scores, k)
    grouped = scores.reshape(len(scores), router.groups, -1)
    of_group = -np.sort(-grouped, -1)[..., : router.deciding].sum(-1)
    places = np.argsort(-of_group, -1)[:, : router.chosen_groups]
    chosen = np.take_along_axis(grouped, places[..., None], 1).reshape(len(scores), -1)
    return np.minimum(_gap(of_group, router.chosen_groups), _gap(chosen, k))


def _gap(values: np.ndarray, k: int) -> np.ndarray:
    """Between the k-th largest of each row and the next, as a share of the former."""
    ordered = -np.sort(-values, -1)
    if k == ordered.shape[1]:
        return np.full(len(ordered), np.inf)
    return (ordered[:, k - 1] - ordered[:, k]) / np.abs(ordered[:, k - 1])


def _divergence(theirs: np.ndarray, ours: np.ndarray) -> float:
    log_p, log_q = (
        a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in (np.float64(theirs), np.float64(ours))
    )
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


def exported(folder: Path, family: str, name: str) -> dict[str, Any]:
    """What is found of one cut."""
    error, stock = export_error(save_tiny(folder / "source", family), folder / "out", name)
    return {"error": error, "stock": stock}


def passed(found: dict[str, Any]) -> bool:
    """Whether one line of the file is within the bounds."""
    errors = [found.get(name, 0.0) for name in ("logits", "packed", "cache", "error")]
    return max(errors) <= MAX_ERROR and found.get("kl", 0) <= MAX_KL and not found.get("misrouted")


def table(
    found: dict[tuple[str, str], dict[str, Any]], families: list[str], cuts: list[str]
) -> str:
    """The worst figures of each family, and whose cuts stock classes load."""
    worst = ("logits", "kl", "packed", "cache")
    rows = [["family", "models", *worst, "undecided", "misrouted", *cuts]]
    for family in families:
        models = [one for (of, what), one in found.items() if of == family and what.isdigit()]
        columns = [f"{max((one[name] for one in models), default=0):.1e}" for name in worst]
        counts = [str(sum(one[name] for one in models)) for name in ("undecided", "misrouted")]
        cells = []
        for name in cuts:
            cut = found.get((family, name))
            cells.append("-" if cut is None else f"{cut['error']:.1e}{' stock' * cut['stock']}")
        rows.append([family, str(len(models)), *columns, *counts, *cells])
    return aligned(rows)


def _families_of(cut: str) -> Collection[str]:
    """Those that have what a cut takes away."""
    return SHARING if cut.startswith("shared") else MIXTURES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--models", type=int, default=40, help="drawn of each family")
    parser.add_argument("--cuts", default=";".join(CUTS), help="of each family with experts")
    parser.add_argument("--results", type=Path, default=Path("outputs/check_families.jsonl"))
    asked = parser.parse_args()
    families = asked.families.split(",")
    cuts = [name for name in CUTS if name in asked.cuts.split(";")]
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    jax.config.update("jax_disable_most_optimizations", True)
    asked.results.parent.mkdir(parents=True, exist_ok=True)
    asked.results.touch()
    lines = map(json.loads, asked.results.read_text().splitlines())
    found = {(line.pop("family"), line.pop("what")): line for line in lines}
    for family in families:
        own = [name for name in cuts if family in _families_of(name)]
        for what in itertools.chain(map(str, range(asked.models)), own):
            if (family, what) in found:
                continue
            with tempfile.TemporaryDirectory() as folder:
                if what in CUTS:
                    one = exported(Path(folder), family, what)
                else:
                    seed = [sum(map(ord, family)), int(what)]
                    one = parity(Path(folder), family, np.random.default_rng(seed))
            found[family, what] = one
            with asked.results.open("a") as file:
                print(json.dumps({"family": family, "what": what, **one}), file=file)
            if not passed(one):
                print(f"out of bounds: {family} {what}: {one}", flush=True)
        print(table(found, [family], cuts).splitlines()[-1], flush=True)
        jax.clear_caches()
    kept = {key: one for key, one in found.items() if key[0] in families}
    print(table(kept, families, cuts))
    sys.exit(int(not all(map(passed, kept.values()))))


if __name__ == "__main__":
    main()
