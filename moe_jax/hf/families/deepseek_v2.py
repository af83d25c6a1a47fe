"""DeepSeek-V2 and V2-Lite: latent attention, a softmax over experts in groups, shared experts."""

from collections.abc import Mapping
from typing import Any

from moe_jax.hf.family import (
    LATENT_ATTENTION,
    Family,
    Key,
    counted_shared_experts,
    decoder_keys,
    expert_keys,
)
from moe_jax.hf.layer_patterns import first_dense
from moe_jax.hf.layouts import fused, per_expert, shared_expert
from moe_jax.kinds import DefaultRope, LatentAttention, YarnRope

_DECODER = decoder_keys(
    vocab_size=102400, width=4096, num_layers=32, heads=32, positions=2048, norm_eps=1e-6
)
_SHARED = shared_expert("mlp.shared_experts")
_GREEDY, _LIMITED = "greedy", "group_limited_greedy"


def _one_group(facts: dict[str, Any]) -> int:
    return 1


def _check_choice(facts: Mapping[str, Any]) -> None:
    """The greedy choice ignores groups, so that a file with both is most likely a mistake."""
    if facts["choice"] not in (_GREEDY, _LIMITED):
        raise ValueError(
            f"topk_method must be {_GREEDY!r} or {_LIMITED!r}, got {facts['choice']!r}"
        )
    if facts["choice"] == _GREEDY and facts["groups"] > 1:
        raise ValueError(
            f"topk_method must be {_LIMITED!r} where n_group is {facts['groups']}, got {_GREEDY!r}"
        )


FAMILY = Family(
    model_type="deepseek_v2",
    stem="DeepseekV2",
    keys={
        **_DECODER,
        **expert_keys(64, 8, 1407, "moe_intermediate_size", "n_routed_experts"),
        **counted_shared_experts(2),
        "scale": Key(("routed_scaling_factor",), float, 1.0),
        "groups": Key(("n_group",), int, 1, null=_one_group),
        "chosen_groups": Key(("topk_group",), int, 1, null=_one_group),
        "choice": Key(
            ("topk_method",),
            str,
            _GREEDY,
            implied=lambda facts: _LIMITED if facts["groups"] > 1 else _GREEDY,
        ),
        **LATENT_ATTENTION,
        "dense_width": Key(("intermediate_size",), int, 11008),
    },
    fixed={"norm": "rms", "lm_head_bias": False, "shared_gated": False, "interleaved": True},
    # The class does not divide weights by their sum, whatever the file says.
    switches={
        "norm_topk_prob": (False, None),
        "scoring_func": ("softmax", None),
        "mlp_bias": (False, None),
        "moe_layer_freq": (1, None),
    },
    attention=LatentAttention,
    ropes=(DefaultRope.kind, YarnRope.kind),
    dense_layers=first_dense(0),
    layouts={"per_expert": per_expert() | _SHARED, "fused": fused() | _SHARED},
    check=_check_choice,
)
