"""config.json and ModelConfig: what stock classes assume, and edits that touch nothing else."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_hf import FAMILIES, LONGROPE, MIXTURES, save_tiny
from transformers import AutoConfig, PhimoeConfig
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

from moe_jax.config import DenseConfig, LayerConfig, ModelConfig, MoeConfig
from moe_jax.hf.config_export import export_config, needs_modeling_file
from moe_jax.hf.config_import import model_config
from moe_jax.hf.families import FAMILIES as ROWS
from moe_jax.kinds import DefaultRope, GroupedQueryAttention


@pytest.mark.parametrize("family", ROWS)
def test_missing_keys_mean_what_the_stock_class_makes_of_them(family):
    # Half of GLM's own default, 42, cannot be turned, and DeepSeek-V2 has no default of K.
    given = {"glm4_moe": {"head_dim": 128}, "deepseek_v2": {"num_experts_per_tok": 6}}
    stock = FAMILIES[family].kind(**given.get(family, {}))
    config = model_config({"model_type": family, **given.get(family, {})})
    explicit = model_config({**stock.to_dict(), "model_type": family})
    assert config == explicit
    assert config.rope.theta == stock.rope_parameters["rope_theta"]
    for fact, key in ROWS[family].keys.items():
        if fact in ("head_dim", "sliding_window") or key.names[0] in given.get(family, {}):
            continue
        default = (
            key.default({"num_heads": stock.num_attention_heads, "width": 0})
            if callable(key.default)
            else key.default
        )
        stated = getattr(stock, key.names[0])
        assert default == (key.null({}) if stated is None and key.null else stated), fact


@pytest.mark.parametrize("family", FAMILIES)
def test_both_rope_spellings_mean_the_same(tmp_path, family):
    folder = save_tiny(tmp_path, family)
    new = json.loads((folder / "config.json").read_text())
    old = dict(new)
    parameters = dict(old.pop("rope_parameters"))
    old["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type")
    if "partial_rotary_factor" in parameters:
        old["partial_rotary_factor"] = parameters.pop("partial_rotary_factor")
    old["rope_scaling"] = None if kind == "default" else {"type": kind, **parameters}
    assert model_config(old) == model_config(new)


def test_unsupported_model_types_are_refused_with_the_supported_ones():
    with pytest.raises(ValueError, match=r"'olmoe', 'phimoe', .* got 'gpt2'"):
        model_config({"model_type": "gpt2"})
    with pytest.raises(ValueError, match="got None"):
        model_config({})


@pytest.mark.parametrize(
    ("model_type", "missing"),
    [
        ("qwen3_next", "linear attention"),
        ("qwen3_5_moe", "linear attention"),
        ("qwen3_5_moe_text", "linear attention"),
        ("gemma4", "a dense branch beside the experts"),
        ("nemotron_h", "state-space layers and ungated experts"),
        ("deepseek_v4", "sparse attention"),
    ],
)
def test_what_is_asked_for_and_not_read_says_what_is_missing(model_type, missing):
    with pytest.raises(ValueError, match=f"'{model_type}' is not read yet: it needs {missing}"):
        model_config({"model_type": model_type})


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (
            {"model_type": "deepseek_v3", "scoring_func": "softmax"},
            "scoring_func must be 'sigmoid'",
        ),
        (
            {"model_type": "deepseek_v2", "topk_method": "greedy", "n_group": 8},
            "group_limited_greedy",
        ),
        ({"model_type": "deepseek_v2", "topk_method": "noaux_tc"}, "topk_method must be 'greedy'"),
        ({"model_type": "deepseek_v2", "norm_topk_prob": True}, "norm_topk_prob must be False"),
        ({"model_type": "deepseek_v3", "topk_group": 9}, r"all of its 8 groups, got 9"),
        (
            {"model_type": "deepseek_v3", "n_routed_experts": 100},
            "multiple of the router's 8 groups",
        ),
        ({"model_type": "deepseek_v3", "n_group": 256}, "groups of at least 2 experts"),
        (
            {"model_type": "deepseek_v3", "num_key_value_heads": 8},
            "keys and values for each of its 128",
        ),
        (
            {"model_type": "deepseek_v3", "qk_rope_head_dim": 7},
            "must be even and at least 2, got 7",
        ),
        ({"model_type": "deepseek_v3", "first_k_dense_replace": -1}, "must be at least 0, got -1"),
        (
            {"model_type": "deepseek_v3", "rope_scaling": {"type": "linear"}},
            "rope type must be one of",
        ),
        ({"model_type": "glm4_moe_lite", "mlp_layer_types": ["dense"]}, "must be 47 of 'dense'"),
        ({"model_type": "ernie4_5_moe", "moe_layer_interval": 0}, "must be at least 1, got 0"),
        ({"model_type": "ernie4_5_moe", "use_bias": True}, "use_bias must be False"),
        ({"model_type": "minimax_m2", "qk_norm_type": "per_head"}, "qk_norm_type must be 'per_l"),
        ({"model_type": "minimax_m2", "use_routing_bias": False}, "use_routing_bias must be True"),
        ({"model_type": "glm4_moe", "scoring_func": "softmax"}, "scoring_func must be 'sigmoid'"),
        ({"model_type": "granitemoe", "position_embedding_type": "nope"}, "must be 'rope', got"),
        ({"model_type": "gpt_oss", "rope_scaling": {"type": "dynamic"}}, "rope type must be one"),
        ({"model_type": "minimax_m2", "partial_rotary_factor": 1.5}, r"in \(0, 1\], got 1.5"),
        ({"model_type": "mixtral", "partial_rotary_factor": 0.5}, "cover whole heads, got 0.5"),
        (
            {
                "model_type": "deepseek_v3",
                "rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 2},
            },
            r"beta_slow must be in \(0, 1",
        ),
    ],
)
def test_switches_that_are_not_handled_are_refused_by_name(hf, message):
    with pytest.raises(ValueError, match=message):
        model_config(hf)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 64, "num_local_experts": 32}, "must agree"),
        ({"num_experts": "64"}, "num_experts must be of type int"),
        ({"num_experts": True}, "num_experts must be of type int"),
        ({"hidden_size": None}, "hidden_size must be of type int"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_experts_per_tok": 65}, r"experts_per_token must be in \[1, num_experts = 64\]"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type"),
        ({"rope_scaling": "yarn"}, "JSON object"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"approximate_experts": {"0": [64]}}, "novice_ids"),
        ({"approximate_experts": {"99": [1]}}, "layer 99"),
        ({"approximate_experts": [1]}, "approximate_experts"),
        ({"moe_jax_layers": [{}]}, "moe_jax_layers"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        model_config({"model_type": "olmoe", **changes})


def test_phimoe_routes_to_two_experts_only():
    with pytest.raises(ValueError, match="num_experts_per_tok must be 2"):
        model_config({"model_type": "phimoe", "num_experts_per_tok": 1})


def test_the_stock_phimoe_class_keeps_short_factors_beyond_the_switch():
    """The reason for DefaultRope.switch_factor: only the scale changes in transformers."""
    stock = PhimoeConfig(hidden_size=16, num_attention_heads=4, rope_parameters=dict(LONGROPE))
    rotary = PhimoeRotaryEmbedding(stock)
    short = rotary(torch.zeros(1, 1), torch.arange(8)[None])
    long = rotary(torch.zeros(1, 1), torch.arange(9)[None])
    angles = [torch.atan2(sin, cos)[0, 1] for cos, sin in (short, long)]
    np.testing.assert_allclose(angles[0], angles[1], atol=1e-6)
    assert float(long[0][0, 0, 0]) == pytest.approx(LONGROPE["long_mscale"])


def test_code_named_by_auto_map_decides_on_long_factors():
    base = {"model_type": "phimoe", "hidden_size": 16, "num_attention_heads": 4}
    base["num_key_value_heads"] = 2
    base["rope_scaling"] = {**LONGROPE, "type": "longrope"}
    assert not model_config(base).rope.switch_factor
    hub = {**base, "auto_map": {"AutoModelForCausalLM": "modeling_phimoe.PhiMoEForCausalLM"}}
    config = model_config(hub)
    assert config.rope.switch_factor
    assert export_config(config, hub) == hub
    with pytest.warns(UserWarning, match="long factors"):
        written = export_config(config)
    assert model_config(written) == config


def test_pruned_heads_get_an_explicit_head_dim(tmp_path):
    source = json.loads((save_tiny(tmp_path, "phimoe") / "config.json").read_text())
    assert "head_dim" not in source
    config = model_config(source)
    layers = tuple(dataclasses.replace(la, num_heads=2, num_kv_heads=1) for la in config.layers)
    written = export_config(dataclasses.replace(config, layers=layers), source)
    changed = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    assert written == {**source, **changed}
    assert AutoConfig.for_model(**written).head_dim == 4


@pytest.mark.parametrize("family", MIXTURES)
def test_every_alias_of_a_changed_fact_changes(tmp_path, family):
    source = json.loads((save_tiny(tmp_path, family) / "config.json").read_text())
    source |= {"num_experts": 4, "num_local_experts": 4, "my_key": [1, {"a": None}]}
    config = model_config(source)
    small = config
    count = 3 * config.router.groups
    for i in config.moe_layers:
        small = small.replace_moe(i, num_experts=count, expert_width=4)
    written = export_config(small, source)
    keys = ROWS[family].keys
    # A name that is none of the family's is none of its business.
    counts = dict.fromkeys(keys["num_experts"].names, count)
    if "shared_width" in keys and keys["shared_width"].per:  # in experts of half the width
        name = keys["shared_width"].names[0]
        counts[name] = 2 * source[name]
    expected = {**source, **counts, keys["expert_width"].names[0]: 4}
    assert written == expected
    assert list(written)[: len(source)] == list(source)


def test_a_source_of_another_family_is_refused():
    config = model_config({"model_type": "olmoe"})
    with pytest.raises(ValueError, match="source must be a olmoe checkpoint"):
        export_config(config, {"model_type": "phimoe"})


def test_a_family_that_cannot_express_the_architecture_says_so():
    config = model_config({"model_type": "olmoe"})
    with pytest.raises(ValueError, match="norm must be rms, got layer"):
        export_config(dataclasses.replace(config, norm="layer"))
    dense = (dataclasses.replace(config.layers[0], feed_forward=DenseConfig(8)),)
    with pytest.raises(ValueError, match="every layer must have experts"):
        export_config(dataclasses.replace(config, layers=dense))
    window = (dataclasses.replace(config.layers[0], sliding_window=4),)
    with pytest.raises(ValueError, match="cannot express"):
        export_config(dataclasses.replace(config, layers=window))


@st.composite
def architectures(draw) -> ModelConfig:
    """Qwen3-MoE architectures: uniform or not, novices, dense layers, experts that differ."""

    def layer() -> LayerConfig:
        groups = draw(st.integers(1, 3))
        if draw(st.booleans()):
            feed_forward: MoeConfig | DenseConfig = DenseConfig(draw(st.integers(1, 9)))
        else:
            count = draw(st.integers(2, 5))
            novices = draw(st.sets(st.integers(0, count - 1), max_size=count - 1))
            drawn = draw(st.lists(st.integers(1, 9), min_size=1, max_size=count))
            widths = [0 if e in novices else drawn[e % len(drawn)] for e in range(count)]
            feed_forward = MoeConfig(
                num_experts=count,
                experts_per_token=draw(st.integers(1, count)),
                expert_width=max(widths),
                novice_ids=tuple(sorted(novices)),
                expert_widths=tuple(widths) if len({*widths} - {0}) > 1 else (),
                expert_bias=draw(st.booleans()),
            )
        heads = groups * draw(st.integers(1, 3))
        return LayerConfig(heads, groups, feed_forward, window)

    window = draw(st.sampled_from([None, 5]))
    layers = [layer() for _ in range(draw(st.integers(1, 4)))]
    if draw(st.booleans()):
        layers = layers[:1] * len(layers)
    return ModelConfig(
        family="qwen3_moe",
        vocab_size=11,
        width=12,
        attention=GroupedQueryAttention(draw(st.sampled_from([2, 4])), qk_norm="head"),
        layers=tuple(layers),
        rope=DefaultRope(theta=draw(st.sampled_from([10000.0, 5e5]))),
        tied_embeddings=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(config=architectures(), other=architectures())
def test_any_architecture_survives_export(config, other):
    assert ModelConfig.from_json(config.to_json()) == config
    new = json.loads(json.dumps(export_config(config)))
    assert model_config(new) == config
    assert needs_modeling_file(config) == (new["model_type"] == "qwen3_moe_compressed")
    edited = json.loads(json.dumps(export_config(config, export_config(other))))
    assert model_config(edited) == config
    stale = set(edited) & {"auto_map", "approximate_experts", "moe_jax_layers"}
    assert stale == set(new) & {"auto_map", "approximate_experts", "moe_jax_layers"}


def test_text_that_is_no_configuration_is_refused():
    for text in ("", "[]", "{}", '{"layers": [], "router": {}, "rope": {}, "x": 1}'):
        with pytest.raises(ValueError, match=r"configuration|layer"):
            ModelConfig.from_json(text)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 70) | st.floats() | st.sampled_from(["", "1", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["0", "1", "a", "rope_type", "layer"]), inner, max_size=3)
    ),
    max_leaves=5,
)
_KEYS = sorted(
    {name for row in ROWS.values() for key in row.keys.values() for name in key.names}
    | {"rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"}
    | {"auto_map", "approximate_experts", "compression_config", "moe_jax_layers", "hidden_act"}
    | {"mlp_only_layers", "decoder_sparse_step", "use_sliding_window", "partial_rotary_factor"}
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.sampled_from(_KEYS), _JSON)
@example("olmoe", "num_attention_heads", 0)
def test_any_value_of_any_key_is_read_or_refused(family, key, value):
    small = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "rope_scaling": {**LONGROPE, "type": "longrope"}}
    if family != "phimoe":
        del small["rope_scaling"]
    try:
        config = model_config({"model_type": family, **small, key: value})
    except ValueError:
        return
    assert config.family == family
