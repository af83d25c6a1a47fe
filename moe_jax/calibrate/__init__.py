"""One pass over calibration text: the statistics that every criterion is computed from."""

from moe_jax.calibrate.domains import calibrate_domains, domain_batches
from moe_jax.calibrate.layer_stream import LayerStream, check_stream_memory
from moe_jax.calibrate.measurement import Batches, Measurement, check_tokens, warn_unreached
from moe_jax.calibrate.memory import MomentPlan, moment_copies, plan_second_moments
from moe_jax.calibrate.whole_model import calibrate

__all__ = [
    "Batches",
    "LayerStream",
    "Measurement",
    "MomentPlan",
    "calibrate",
    "calibrate_domains",
    "check_stream_memory",
    "check_tokens",
    "domain_batches",
    "moment_copies",
    "plan_second_moments",
    "warn_unreached",
]
