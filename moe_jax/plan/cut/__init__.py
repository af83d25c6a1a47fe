"""What a cut is: what is ranked, by what, how much stays, and what stands for the rest.

Stages of a run, the command ``plan``, ``make_plan`` and the sequential cut all take a ``Cut``. Each
field says what it applies to (``needs``), so that a value which nothing would read is refused
everywhere, with the reason.
"""

from moe_jax.plan.cut.cut import Cut
from moe_jax.plan.cut.needs import SIZES, SLIM

__all__ = ["SIZES", "SLIM", "Cut"]
