"""Which neurons an expert can spare: energy, and Optimal Brain Surgeon, one after the other."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Added to each diagonal entry of the second moments, as a share of it.
RIDGE = 1e-3
_BLOCK = 64
_EXACT = jax.lax.Precision.HIGHEST


def neuron_energy(gram: Float[Array, "N N"], down: Float[Array, "F D"]) -> Float[Array, " F"]:
    """Summed squared norm of what each neuron adds to the output: ``G_jj ||down_j||^2``.

    Args:
        gram: second moments of the hidden activations; a last row and column for the constant 1
            may follow them.
        down: the down-projection.
    """
    return jnp.diagonal(gram)[: down.shape[0]] * jnp.square(down).sum(-1)


@functools.partial(jax.jit, static_argnames="block")
def removal_costs(
    gram: Float[Array, "N N"],
    down: Float[Array, "F D"],
    ridge: float | Float[Array, ""] = RIDGE,
    block: int = _BLOCK,
) -> Float[Array, " F"]:
    """What it costs to remove each neuron of an expert, the cheapest first (OBS).

    At each step the neuron with the smallest ``||w_j||^2 / [G^-1]_jj`` goes, the rows of the others
    take over what they can (``w -= [G^-1]_:q / [G^-1]_qq w_q``), and both matrices follow (Hassibi
    and Stork 1993). The cost is the rise of the gate-weighted squared error, in the units of
    ``gram``: it can be compared between experts. Its running maximum orders the neurons, since one
    that became cheap because another went cannot go before it.

    An expert with fewer tokens than neurons has singular second moments; with the ridge they can
    be inverted, and neurons that differ on none of its tokens stand in for each other at the cost
    of the ridge alone. Without tokens every cost is 0.

    Args:
        gram: second moments of the activations, and in a last row and column those with 1 if the
            expert may have a constant (N = F + 1), which is never removed.
        down: the down-projection.
        ridge: added to the diagonal, as a share of it.
        block: steps between two updates of the whole matrices. Any gives the same result up to
            rounding; all but the updates, which are matrix products, then touches ``block``
            columns instead of N.

    Returns:
        The running maximum of the cost at the step that removed each neuron.
    """
    removable = jnp.arange(gram.shape[0]) < down.shape[0]
    rows = jnp.pad(down.astype(gram.dtype), ((0, gram.shape[0] - down.shape[0]), (0, 0)))
    scaled, scale = unit_diagonal(gram, ridge)
    rows = rows * scale[:, None]
    inverse = jnp.linalg.inv(scaled)
    state = _Whole(
        inverse=(inverse + inverse.T) / 2,
        products=jnp.dot(rows, rows.T, precision=_EXACT),
        left=removable,
        costs=jnp.zeros(gram.shape[0], gram.dtype),
        highest=jnp.zeros((), gram.dtype),
    )
    steps = -(-down.shape[0] // block)
    state = jax.lax.fori_loop(0, steps, lambda _, state: _remove_block(state, block), state)
    return state.costs[: down.shape[0]]


@jax.jit
def group_removal_costs(
    gram: Float[Array, "N N"],
    weights: Float[Array, "G R D"],
    ridge: float | Float[Array, ""] = RIDGE,
) -> Float[Array, " G"]:
    """What it costs to remove each group of R rows of a projection, the cheapest first.

    ``removal_costs`` for rows that can only go together, such as heads of attention. A group q
    costs ``tr(W_q^T [G^-1]_qq^-1 W_q)``, the rise of the squared error once all other rows have
    made up for it (Optimal Brain Surgeon with more than one weight at a time); then it goes, and
    both matrices follow.

    Args:
        gram: second moments of what the rows multiply, group after group, and in a last row and
            column those with 1 if there is a bias (N = G R + 1), which is never removed.
        weights: the projection.
        ridge: added to the diagonal, as a share of it.

    Returns:
        The running maximum of the cost at the step that removed each group.
    """
    groups, size, width = weights.shape
    scaled, scale = unit_diagonal(gram, ridge)
    rows = weights.reshape(-1, width).astype(gram.dtype)
    rows = jnp.pad(rows, ((0, gram.shape[0] - len(rows)), (0, 0))) * scale[:, None]
    inverse = jnp.linalg.inv(scaled)
    first = jnp.arange(groups) * size

    def own_block(inverse, start):
        return jax.lax.dynamic_slice(inverse, (start, start), (size, size))

    def remove_one(_, state):
        inverse, rows, left, costs, highest = state
        blocks = jax.vmap(own_block, (None, 0))(inverse, first)
        # A group that is gone has left zeros, which have no inverse.
        blocks = jnp.where(left[:, None, None], blocks, jnp.eye(size, dtype=blocks.dtype))
        own = rows[: groups * size].reshape(groups, size, -1)
        # What removing group g takes away: [G^-1]_gg^-1 W_g.
        pulls = jnp.linalg.solve(blocks, own)
        each = jnp.where(left, (own * pulls).sum((1, 2)), jnp.inf)
        group = each.argmin()
        highest = jnp.maximum(highest, each[group])
        columns = jax.lax.dynamic_slice_in_dim(inverse, first[group], size, 1)
        shares = jnp.linalg.solve(blocks[group], columns.T)
        gone = jnp.arange(len(rows)) // size == group
        inverse = inverse - jnp.dot(columns, shares, precision=_EXACT)
        inverse = jnp.where(gone[:, None] | gone, 0, inverse)
        rows = rows - jnp.dot(columns, pulls[group], precision=_EXACT)
        rows = jnp.where(gone[:, None], 0, rows)
        return inverse, rows, left.at[group].set(False), costs.at[group].set(highest), highest

    state = (
        (inverse + inverse.T) / 2,
        rows,
        jnp.ones(groups, bool),
        jnp.zeros(groups, gram.dtype),
        jnp.zeros((), gram.dtype),
    )
    return jax.lax.fori_loop(0, groups, remove_one, state)[3]


def unit_diagonal(gram: Array, ridge) -> tuple[Array, Array]:
    """``gram`` scaled to a diagonal of ones, with the ridge on it, and the scale of each row.

    A neuron that is never active has scale 0 and a row of the identity.
    """
    scale = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0))
    safe = jnp.where(scale > 0, scale, 1)
    scaled = gram / (safe[:, None] * safe)
    diagonal = jnp.where(scale > 0, 1 + ridge, 1).astype(gram.dtype)
    return scaled.at[jnp.diag_indices(len(scale))].set(diagonal), scale


class _Whole(NamedTuple):
    """Between blocks: ``G^-1``, ``w w^T``, who is left, the costs so far and their maximum."""

    inverse: Array
    products: Array
    left: Array
    costs: Array
    highest: Array


class _Block(NamedTuple):
    """Within a block: diagonals that are up to date, and the factors of what is not yet applied.

    With ``shares`` c, the taken-over parts of each step's neuron, the inverse loses
    ``pivots c c^T``, and the products lose ``c u^T + u c^T - s c c^T`` where ``u`` are the step's
    ``columns`` of the products and ``s`` its ``squares``.
    """

    inverse_diagonal: Array
    product_diagonal: Array
    left: Array
    costs: Array
    highest: Array
    shares: Array
    columns: Array
    pivots: Array
    squares: Array


def _remove_block(state: _Whole, block: int) -> _Whole:
    size, dtype = state.left.size, state.costs.dtype
    start = _Block(
        jnp.diagonal(state.inverse),
        jnp.diagonal(state.products),
        state.left,
        state.costs,
        state.highest,
        jnp.zeros((block, size), dtype),
        jnp.zeros((block, size), dtype),
        jnp.zeros(block, dtype),
        jnp.zeros(block, dtype),
    )
    end = jax.lax.fori_loop(0, block, lambda i, inner: _remove_one(state, inner, i), start)
    shares, columns = end.shares, end.columns
    cross = jnp.dot(shares.T, columns, precision=_EXACT)
    weighted = jnp.dot(shares.T, shares * end.squares[:, None], precision=_EXACT)
    taken = jnp.dot(shares.T, shares * end.pivots[:, None], precision=_EXACT)
    return _Whole(
        state.inverse - taken,
        state.products - cross - cross.T + weighted,
        end.left,
        end.costs,
        end.highest,
    )


def _remove_one(state: _Whole, inner: _Block, i) -> _Block:
    tiny = jnp.finfo(inner.costs.dtype).tiny
    cost = jnp.maximum(inner.product_diagonal, 0) / jnp.maximum(inner.inverse_diagonal, tiny)
    neuron = jnp.argmin(jnp.where(inner.left, cost, jnp.inf))
    some = inner.left.any()
    at = inner.shares[:, neuron]
    column = state.inverse[neuron] - jnp.dot(at * inner.pivots, inner.shares, precision=_EXACT)
    pivot = jnp.maximum(column[neuron], tiny)
    share = jnp.where(some, column / pivot, 0)
    product = (
        state.products[neuron]
        - jnp.dot(inner.columns[:, neuron] - at * inner.squares, inner.shares, precision=_EXACT)
        - jnp.dot(at, inner.columns, precision=_EXACT)
    )
    square = product[neuron]
    highest = jnp.where(some, jnp.maximum(inner.highest, cost[neuron]), inner.highest)
    return _Block(
        inner.inverse_diagonal - pivot * jnp.square(share),
        inner.product_diagonal - share * (2 * product - square * share),
        inner.left.at[neuron].set(inner.left[neuron] & ~some),
        jnp.where(some, inner.costs.at[neuron].set(highest), inner.costs),
        highest,
        inner.shares.at[i].set(share),
        inner.columns.at[i].set(product),
        inner.pivots.at[i].set(pivot),
        inner.squares.at[i].set(square),
    )
