"""One pass over calibration text: the statistics that every criterion is computed from."""

from moe_jax.calibrate.domains import calibrate_by_domain, calibrate_domains, domain_batches
from moe_jax.calibrate.measure import calibrate, check_tokens, warn_unreached
from moe_jax.calibrate.memory import MomentPlan, plan_second_moments, second_moment_bytes
from moe_jax.calibrate.stream import LayerStream

__all__ = [
    "LayerStream",
    "MomentPlan",
    "calibrate",
    "calibrate_by_domain",
    "calibrate_domains",
    "check_tokens",
    "domain_batches",
    "plan_second_moments",
    "second_moment_bytes",
    "warn_unreached",
]
