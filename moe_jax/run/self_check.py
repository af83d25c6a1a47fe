"""What a run asks of its own export before it ends."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.hf.account import check_export
from moe_jax.hf.reader import open_hf, stored_dtype
from moe_jax.lineage import Lineage
from moe_jax.model import forward
from moe_jax.params import Model
from moe_jax.processes import agree, gather, is_writer, on_mesh_of
from moe_jax.report.facts import Output
from moe_jax.run.job import Job

_TOKENS = 64
# Of the largest logit, in units of the last place: two programs may add up in another order.
_ROUNDING = 64
_logger = logging.getLogger(__name__)


def check_weights(
    job: Job, exported: Model, folder: Path, lineage: Lineage
) -> tuple[Output, np.ndarray | None]:
    """Whether an export holds what was to be exported.

    Every tensor is accounted for and read again, see ``hf.account``.

    Args:
        exported: the weights in memory.

    Returns:
        What the report says of it, and, for ``check_reload``, the logits of a few tokens of the
        run's text; None where the model stays on disk.

    Raises:
        ValueError: they differ; names the tensor.
    """
    told: Output = {"path": str(folder), "dtype": stored_dtype(folder)}
    error = ""
    if is_writer():
        params = exported.params if jax.process_count() == 1 else None
        try:
            account = check_export(folder, job.source, lineage, params, job.run.dtype or None)
        except ValueError as found:
            error = str(found)
        else:
            told |= {"tensors": account.counts(), "compared_bytes": account.compared_bytes}
            lost = [key for key, outcome in account.outcomes.items() if outcome == "left out"]
            if lost:
                _logger.warning("%d source tensors were left out: %s", len(lost), lost[:3])
    if error := agree(error):
        raise ValueError(error)
    tokens = _tokens(job)
    if job.layerwise or tokens is None:
        return told, None
    stored, dtypes = (open_hf(folder, dtype)[1] for dtype in (None, job.run.dtype or None))
    kinds = [tuple(leaf.dtype for leaf in jax.tree.leaves(tree)) for tree in (stored, dtypes)]
    with on_mesh_of(exported.params):
        return told, gather(_logits(exported.params, exported.config, tokens, tuple(kinds)))


def check_reload(
    job: Job, reloaded: Model, folder: Path, expected: np.ndarray | None, *, packed_again: bool
) -> Output:
    """Whether an export that was read back computes what the weights did.

    Args:
        reloaded: ``folder``'s model, in the dtype of computation.
        expected: logits from ``check_weights``.
        packed_again: whether weights were rounded to a packed form: logits then differ by as much.

    Raises:
        ValueError: they differ; names the difference.
    """
    tokens = _tokens(job)
    if expected is None or tokens is None:
        return {}
    dtypes = tuple(np.dtype(leaf.dtype) for leaf in jax.tree.leaves(reloaded.params))
    with on_mesh_of(reloaded.params):
        logits = gather(_logits(reloaded.params, reloaded.config, tokens, (dtypes, dtypes)))
    wanted, got = (np.asarray(array, np.float64) for array in (expected, logits))
    difference = float(np.abs(wanted - got).max())
    bound = _ROUNDING * np.abs(wanted).max() * max(float(jnp.finfo(kind).eps) for kind in dtypes)
    if not packed_again and not difference <= bound:
        raise ValueError(
            f"{folder}: logits of the export must be those of the weights to {bound:.1e}, got a "
            f"difference of {difference:.1e} on {tokens.size} tokens"
        )
    return {"logit_tokens": int(tokens.size), "logit_difference": difference}


def _tokens(job: Job) -> np.ndarray | None:
    """A few tokens [1, S] of the text that the run reads anyway, from the start of a row."""
    if job.windows is not None:
        batch = job.windows.batches[0]
    elif job.domains:
        batch = next(iter(next(iter(job.domains.values()))))
    else:
        return None
    return batch["tokens"][:1, :_TOKENS]


@partial(jax.jit, static_argnames=("config", "kinds"))
def _logits(params, config, tokens, kinds):
    leaves, tree = jax.tree.flatten(params)
    as_read = [_stored_as(*leaf) for leaf in zip(leaves, *kinds, strict=True)]
    return forward(jax.tree.unflatten(tree, as_read), config, tokens)[0]


def _stored_as(leaf, stored, dtype):
    """A leaf as its file gives it back; a pair of casts alone would be optimised away."""
    if leaf.dtype == stored == dtype:
        return leaf
    facts = jnp.finfo(stored)
    return jax.lax.reduce_precision(leaf, facts.nexp, facts.nmant).astype(dtype)
