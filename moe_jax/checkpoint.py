"""Checkpoints, through orbax: the only module that imports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from moe_jax.config import ModelConfig
from moe_jax.shapes import Leaf, abstract_params, leaves_with_path, path_name


class TrainingCheckpoints:
    """The newest state of a training run: weights, optimizer, step, position in the data.

    Saving is asynchronous and atomic; leaving the context waits for it.

    Args:
        folder: made if missing.
        keep: how many checkpoints to keep.
    """

    def __init__(self, folder: str | Path, keep: int = 1) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(
            Path(folder).resolve(), options=options, item_names=("state", "data")
        )

    def __enter__(self) -> TrainingCheckpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def save(self, step: int, state: dict[str, Any], data_position: dict[str, Any]) -> None:
        """Starts writing ``state`` as checkpoint ``step``."""
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_position)
        )
        self._manager.save(step, args=items)

    def restore(self, like: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """State (shaped and sharded as ``like``) and data position, or None if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=items)
        return restored["state"], restored["data"]


def save_params(path: str | Path, params: dict[str, Any]) -> None:
    """Writes weights, sharded or not, to a new folder."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(path).absolute(), params)


def load_params(
    path: str | Path, config: ModelConfig, mesh: jax.sharding.Mesh | None = None
) -> dict[str, Any]:
    """Weights as ``save_params`` wrote them, on ``mesh`` or on the default device.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the stored names or shapes are not those of ``config``.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"no such checkpoint folder: {path}")
    expected = dict(leaves_with_path(abstract_params(config)))
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        stored = dict(leaves_with_path(tree))
        for name in sorted(stored.keys() | expected.keys(), key=path_name):
            got = tuple(stored[name].shape) if name in stored else "none"
            wanted = expected[name].shape if name in expected else "none"
            if got != wanted:
                raise ValueError(f"{path}: {path_name(name)} must have shape {wanted}, got {got}")
        like = {
            name: jax.ShapeDtypeStruct(
                leaf.shape, stored[name].dtype, sharding=_sharding(leaf, mesh)
            )
            for name, leaf in expected.items()
        }
        structure = jax.tree.structure(tree)
        in_order = [like[name] for name, _ in leaves_with_path(tree)]
        return checkpointer.restore(path, jax.tree.unflatten(structure, in_order))


def _sharding(leaf: Leaf, mesh: jax.sharding.Mesh | None) -> jax.sharding.Sharding:
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    from moe_jax.sharding import param_sharding

    return param_sharding(mesh, leaf.axes, leaf.shape)
