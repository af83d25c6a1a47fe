"""One pass over calibration text: the statistics that every criterion is computed from."""

from moe_jax.calibrate.domains import calibrate_domains, domain_batches
from moe_jax.calibrate.layer_stream import (
    LayerMeasurement,
    LayerStream,
    check_stream_memory,
)
from moe_jax.calibrate.layerwise import calibrate_layerwise, check_losses
from moe_jax.calibrate.measurement import Batches, Measurement, check_tokens, warn_unreached
from moe_jax.calibrate.memory import (
    MomentPlan,
    layer_by_layer,
    moment_copies,
    plan_second_moments,
)
from moe_jax.calibrate.sums import LayerWanted
from moe_jax.calibrate.whole_model import calibrate

__all__ = [
    "Batches",
    "LayerMeasurement",
    "LayerStream",
    "LayerWanted",
    "Measurement",
    "MomentPlan",
    "calibrate",
    "calibrate_domains",
    "calibrate_layerwise",
    "check_losses",
    "check_stream_memory",
    "check_tokens",
    "domain_batches",
    "layer_by_layer",
    "moment_copies",
    "plan_second_moments",
    "warn_unreached",
]
