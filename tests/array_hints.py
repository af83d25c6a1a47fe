"""The type checker that ``conftest.py`` hooks into the package: beartype, of annotated arrays.

Every annotation that names an array is checked whenever its function is called: kind, dtype and
shape, one letter of a function standing for one size. Other annotations are mypy's, and what the
package says of a user's wrong setting or file is its own error, which tests look for.
"""

import inspect
import typing

import jax
import numpy as np
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

# What these are given is refused by themselves, with a ValueError; what they return is checked.
THEIR_OWN_CHECKS = frozenset(
    {
        "moe_jax.losses.distill.distill_loss",
        "moe_jax.losses.distill.distill_sums",
        "moe_jax.losses.terms.hidden_distance",
        "moe_jax.losses.terms.router_kl",
        "moe_jax.model.block.forward",
        "moe_jax.model.block.hidden_states",
        "moe_jax.ops.grouped_matmul.grouped_matmul",
    }
)
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # where a float may be, an int may


def check(function):
    """``function``, which jaxtyping made of a signature, with its annotations of arrays checked."""
    hints = {name: hint for name, hint in function.__annotations__.items() if _names_an_array(hint)}
    if f"{function.__module__}.{function.__qualname__}" in THEIR_OWN_CHECKS:
        hints = {name: hint for name, hint in hints.items() if name == "return"}
    function.__annotations__ = hints
    return _checked(function) if hints else function


def _names_an_array(hint) -> bool:
    if inspect.isclass(hint) and issubclass(hint, (AbstractArray, jax.Array, np.ndarray)):
        return True
    return any(map(_names_an_array, typing.get_args(hint)))
