"""One pass over calibration text: the statistics that every criterion is computed from."""

from moe_jax.calibrate.domains import calibrate_by_domain, calibrate_domains, domain_batches
from moe_jax.calibrate.measure import calibrate, check_tokens, warn_unreached

__all__ = [
    "calibrate",
    "calibrate_by_domain",
    "calibrate_domains",
    "check_tokens",
    "domain_batches",
    "warn_unreached",
]
