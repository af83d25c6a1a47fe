"""One pass over calibration text: the statistics that every criterion is computed from."""

from moe_jax.calibrate.domains import calibrate_by_domain, calibrate_domains, domain_batches
from moe_jax.calibrate.measure import calibrate, check_tokens, warn_unreached
from moe_jax.calibrate.memory import (
    MomentPlan,
    moment_copies,
    plan_second_moments,
    second_moment_bytes,
)
from moe_jax.calibrate.stream import LayerStream, check_stream_memory

__all__ = [
    "LayerStream",
    "MomentPlan",
    "calibrate",
    "calibrate_by_domain",
    "calibrate_domains",
    "check_stream_memory",
    "check_tokens",
    "domain_batches",
    "moment_copies",
    "plan_second_moments",
    "second_moment_bytes",
    "warn_unreached",
]
