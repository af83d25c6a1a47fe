"""The Llama line: dense, so that it teaches and is compared with."""

from moe_jax.hf.family import ATTENTION_BIAS, Family, Key, decoder_keys
from moe_jax.hf.layer_patterns import ALL_DENSE
from moe_jax.hf.layouts import DECODER
from moe_jax.kinds import DefaultRope, Llama3Rope

_DECODER = decoder_keys(
    vocab_size=32000, width=4096, num_layers=32, heads=32, positions=2048, norm_eps=1e-6
)

FAMILY = Family(
    model_type="llama",
    stem="Llama",
    keys=_DECODER | {"dense_width": Key(("intermediate_size",), int, 11008)} | ATTENTION_BIAS,
    fixed={"norm": "rms", "lm_head_bias": False},
    switches={"mlp_bias": (False, None)},
    ropes=(DefaultRope.kind, Llama3Rope.kind),
    dense_layers=ALL_DENSE,
    layouts={"dense": DECODER},
)
