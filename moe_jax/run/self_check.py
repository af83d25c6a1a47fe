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
from moe_jax.processes import gather, is_writer, on_mesh_of
from moe_jax.report.facts import Output
from moe_jax.run.job import Job

_TOKENS = 64
# Of the largest logit, in units of the last place: two programs may add up in another order.
_ROUNDING = 64
_logger = logging.getLogger(__name__)


def check_result(
    job: Job,
    exported: Model,
    reloaded: Model,
    folder: Path,
    lineage: Lineage,
    *,
    packed_again: bool,
) -> Output:
    """Whether an export is what was to be exported; what the report says of it.

    Every tensor is accounted for and read again (see ``hf.account``), and, unless the model stays
    on disk, the logits of a few tokens of the run's text are compared.

    Args:
        exported: the weights in memory.
        reloaded: those of ``folder``, in the dtype of computation.
        packed_again: whether weights were rounded to a packed form: logits then differ by as much.

    Raises:
        ValueError: they differ; names the tensor, or the difference of logits.
    """
    told: Output = {"path": str(folder), "dtype": stored_dtype(folder)}
    if is_writer():
        whole = jax.process_count() == 1
        params = exported.params if whole else None
        account = check_export(folder, job.source, lineage, params, job.run.dtype or None)
        told |= {"tensors": account.counts(), "compared_bytes": account.compared_bytes}
        lost = [key for key, outcome in account.outcomes.items() if outcome == "left out"]
        if lost:
            _logger.warning("%d tensors of the source were left out: %s", len(lost), lost[:3])
    tokens = None if job.layerwise else _tokens(job)
    if tokens is not None:
        told |= {"logit_tokens": int(tokens.size)}
        found, bound = _difference(exported, reloaded, folder, tokens)
        told |= {"logit_difference": found}
        if not packed_again and not found <= bound:
            raise ValueError(
                f"{folder}: logits of the export must be those of the weights to {bound:.1e}, got "
                f"a difference of {found:.1e} on {tokens.size} tokens"
            )
    return told


def _tokens(job: Job) -> np.ndarray | None:
    """A few tokens [1, S] of the text that the run reads anyway, from the start of a row."""
    if job.windows is not None:
        batch = job.windows.batches[0]
    elif job.domains:
        batch = next(iter(next(iter(job.domains.values()))))
    else:
        return None
    return batch["tokens"][:1, :_TOKENS]


def _difference(
    exported: Model, reloaded: Model, folder: Path, tokens: np.ndarray
) -> tuple[float, float]:
    """The largest difference of a logit to the weights that were read back; what it may be."""
    stored = jax.tree.map(lambda leaf: leaf.dtype, open_hf(folder)[1])
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, reloaded.params)
    kinds = tuple(jax.tree.leaves(stored)), tuple(jax.tree.leaves(dtypes))
    found = []
    for params in (exported.params, reloaded.params):
        with on_mesh_of(params):
            found.append(gather(_logits(params, exported.config, tokens, kinds)))
    wanted, got = (np.asarray(logits, np.float64) for logits in found)
    difference, scale = np.abs(wanted - got).max(), np.abs(wanted).max()
    bound = _ROUNDING * scale * max(float(jnp.finfo(kind).eps) for kind in kinds[1])
    return float(difference), float(bound)


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
