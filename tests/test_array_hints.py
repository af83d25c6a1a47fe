"""The import hook of ``conftest.py`` is on: what annotations say of arrays holds when called."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_hints import THEIR_OWN_CHECKS
from jaxtyping import TypeCheckError

from moe_jax.lineage import RowOrigin
from moe_jax.losses.terms import masked_sum
from moe_jax.ops.norms import rms_norm


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
@pytest.mark.parametrize(
    ("x", "scale"),
    [
        (jnp.ones((3, 4)), jnp.ones(5)),  # one letter, two sizes
        (jnp.ones((3, 4)), jnp.ones((1, 4))),
        (jnp.ones((3, 4), jnp.int32), jnp.ones(4)),
    ],
)
def test_a_function_refuses_arrays_that_are_not_what_it_says(transform, x, scale):
    with pytest.raises(TypeCheckError, match="rms_norm"):
        transform(lambda x, scale: rms_norm(x, scale, 1e-6))(x, scale)


def test_an_array_of_numpy_is_refused_where_one_of_jax_is_said():
    with pytest.raises(TypeCheckError, match="rms_norm"):
        rms_norm(np.ones((3, 4), np.float32), jnp.ones(4), 1e-6)
    _, count = masked_sum(jnp.ones(3), np.ones(3, bool))  # says both
    assert isinstance(count, jax.Array)


def test_fields_of_a_dataclass_are_checked():
    with pytest.raises(TypeCheckError, match="RowOrigin"):
        RowOrigin(0, np.zeros((2, 3), int))


def test_functions_with_checks_of_their_own_exist():
    for name in THEIR_OWN_CHECKS:
        module, function = name.rsplit(".", 1)
        assert callable(getattr(__import__(module, fromlist=[function]), function))
