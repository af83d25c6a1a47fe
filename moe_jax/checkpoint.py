"""Checkpoints, through orbax: the only module that imports it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from moe_jax.config import ModelConfig
from moe_jax.files import check_space, free_bytes
from moe_jax.params import abstract_params, leaves_with_path, nest, path_name
from moe_jax.processes import leaf_shardings
from moe_jax.stored import StoredLeaf, is_stored

# Tensorstore reports a failed write as a ValueError.
_STORAGE_ERROR = re.compile("No space|too large|Error writing|Disk quota|RESOURCE_EXHAUSTED", re.I)
# Threads of orbax log what went wrong in them, with a traceback each; it is raised here, too.
logging.getLogger("absl").addFilter(
    lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname
)


class TrainingCheckpoints:
    """The newest state of a training run: weights, optimizer, step, position in the data.

    Saving is asynchronous and atomic: the one before stays until the new one is whole. Leaving
    the context waits for it.
    """

    def __init__(self, folder: str | Path, keep: int = 1) -> None:
        self._folder = Path(folder).resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(
            self._folder, options=options, item_names=("state", "data", "about")
        )

    def __enter__(self) -> TrainingCheckpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            with _named_errors(self._folder):
                self._manager.wait_until_finished()
                self._manager.close()
        except OSError:
            if kind is None:  # else the error that is under way says more
                raise

    def save(
        self,
        step: int,
        state: dict[str, Any],
        data_position: dict[str, Any],
        about: dict[str, Any] | None = None,
    ) -> None:
        """Starts writing ``state`` as checkpoint ``step``.

        Args:
            data_position: what the data iterator's ``get_state`` gave.
            about: JSON values that a resumption must agree with.

        Raises:
            OSError: it, or the one before it, cannot be written.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data_position),
            about=ocp.args.JsonSave(about or {}),
        )
        nbytes = _nbytes(state)
        with _named_errors(self._folder, nbytes):
            check_space(self._folder, nbytes)
            self._manager.save(step, args=items)

    def about(self) -> dict[str, Any] | None:
        """The facts kept with the newest checkpoint, or None if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        items = ocp.args.Composite(about=ocp.args.JsonRestore())
        return self._manager.restore(step, args=items)["about"]

    def restore(
        self, like: dict[str, Any], about: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """State (shaped and sharded as ``like``) and data position, or None if there is none.

        Raises:
            ValueError: the checkpoint was kept with other facts than ``about`` (each is named).
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        if about is not None:
            check_same(self.about() or {}, about, self._folder)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=items)
        return restored["state"], restored["data"]


def _nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@contextmanager
def _named_errors(folder: Path, nbytes: int = 0) -> Iterator[None]:
    """Storage errors of any library as an OSError that names the folder."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and not _STORAGE_ERROR.search(str(error)):
            raise
        reason = str(error).splitlines()[0][:300]
        needed = f" of {nbytes:,} bytes" if nbytes else ""
        raise OSError(
            f"cannot write a checkpoint{needed} in {folder}, where {free_bytes(folder):,} bytes "
            f"are free: {reason}; what was there before is kept"
        ) from error


def check_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Raises ValueError naming each fact in which a checkpoint differs from what is wanted."""
    wanted = json.loads(json.dumps(wanted))
    different = [
        f"{name}: {saved.get(name)!r} there, {wanted.get(name)!r} here"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if different:
        raise ValueError(
            f"the checkpoint in {folder} was made with other settings ({'; '.join(different)}); "
            "set them back, choose another output, or delete that folder to start again"
        )


class _StoredLeafHandler(type_handlers.NumpyHandler):
    """Writes parameters that are on disk one after the other, so that one is in memory."""

    async def serialize(self, values, infos, args=None):
        for i, value in enumerate(values):
            own = None if args is None else args[i : i + 1]
            for written in await super().serialize([np.asarray(value)], infos[i : i + 1], own):
                written.result()
        return []


def save_params(path: str | Path, params: dict[str, Any], replace: bool = False) -> None:
    """Writes weights, sharded or not, to a new folder, which appears whole or not at all.

    Of weights on disk (see ``stored``) one array is in memory at a time.

    Raises:
        ValueError: the folder exists and is not to be replaced.
        OSError: it cannot be written.
    """
    nbytes = _nbytes(params)
    if is_stored(params):
        handlers = type_handlers.create_type_handler_registry((StoredLeaf, _StoredLeafHandler()))
        writer = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers)
        with _named_errors(Path(path), nbytes), ocp.Checkpointer(writer) as checkpointer:
            check_space(path, nbytes)
            arguments = ocp.args.PyTreeSave(params)
            checkpointer.save(Path(path).absolute(), args=arguments, force=replace)
        return
    with _named_errors(Path(path), nbytes), ocp.StandardCheckpointer() as checkpointer:
        check_space(path, nbytes)
        checkpointer.save(Path(path).absolute(), params, force=replace)


def load_params(
    path: str | Path, config: ModelConfig, mesh: jax.sharding.Mesh | None = None
) -> dict[str, Any]:
    """Weights as ``save_params`` wrote them, on ``mesh`` or on the default device.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the stored names or shapes are not those of ``config``, or a dimension is not a
            multiple of its mesh axis.
    """
    return load_leaves(path, abstract_params(config), mesh)


def load_leaves(
    path: str | Path, leaves: dict[str, Any], mesh: jax.sharding.Mesh | None = None
) -> dict[str, Any]:
    """``load_params`` of weights with this abstract tree."""
    path = Path(path).absolute()
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = {} if mesh is None else dict(leaves_with_path(leaf_shardings(leaves, mesh)))
    tree = _checked_tree(path, leaves)
    like = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places.get(name, one_device))
        for name, leaf in leaves_with_path(tree)
    ]
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, jax.tree.unflatten(jax.tree.structure(tree), like))


def open_params(path: str | Path, config: ModelConfig) -> dict[str, Any]:
    """``load_params`` without the reading: leaves are ``stored.StoredLeaf``, errors the same."""
    path = Path(path).absolute()
    found = dict(leaves_with_path(_checked_tree(path, abstract_params(config))))
    reader = ocp.PyTreeCheckpointer()
    arrays = nest({name: ocp.RestoreArgs(restore_type=np.ndarray) for name in found})

    def read(wanted: tuple, window: tuple[slice, ...]) -> np.ndarray:
        tree = nest({name: 0 if name == wanted else ocp.PLACEHOLDER for name in found})
        arguments = ocp.args.PyTreeRestore(item=tree, restore_args=arrays)
        return dict(leaves_with_path(reader.restore(path, args=arguments)))[wanted][window]

    return nest(
        {
            name: StoredLeaf(tuple(leaf.shape), leaf.dtype, partial(read, name))
            for name, leaf in found.items()
        }
    )


def _checked_tree(path: Path, leaves: dict[str, Any]) -> Any:
    """Shapes and dtypes of what a folder holds, if they are those of this abstract tree."""
    if not path.is_dir():
        raise FileNotFoundError(f"no such checkpoint folder: {path}")
    expected = dict(leaves_with_path(leaves))
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
    stored = dict(leaves_with_path(tree))
    for name in sorted(stored.keys() | expected.keys(), key=path_name):
        got = tuple(stored[name].shape) if name in stored else "none"
        wanted = expected[name].shape if name in expected else "none"
        if got != wanted:
            raise ValueError(f"{path}: {path_name(name)} must have shape {wanted}, got {got}")
    return tree
