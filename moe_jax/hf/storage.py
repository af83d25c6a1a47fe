"""How an export of a packed checkpoint is stored: packed as it was, packed again, or unpacked.

``config.json`` says of all of a model's packed tensors at once that they are packed. So either each
of them is, or none: the source's bytes where its numbers are left as they are and no block is cut
in two, and else, on request, new ones in the source's scheme. What the source does not pack stays
unpacked. All of it follows from configurations, a lineage and headers, before any weight is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from moe_jax.hf.families import find_family
from moe_jax.hf.names import Piece, detect_layout, expand
from moe_jax.hf.packed import MODULE_LISTS, Index, Scheme, in_steps
from moe_jax.hf.safetensors_file import Packed, TensorInfo, TensorReader
from moe_jax.lineage import Lineage
from moe_jax.params import abstract_params, leaves_with_path

# What becomes of packed weights: the source's bytes or unpacked, or, where they cannot stay, packed
# again.
Packing = Literal["keep", "source"]

_SCHEME = "quantization_config"
_NUMBERED = re.compile(r"(?:^|(?<=\bmodel\.))layers\.(\d+)\b(?:(.*?\bexperts\.)(\d+)\b)?")


@dataclass(frozen=True, eq=False)
class _Link:
    """A piece of a tensor, and where it lies in a packed tensor of the source.

    Attributes:
        axes: letters of the piece's part of its leaf.
        kept: see ``lineage.Origin``.
    """

    target: Piece
    source: Piece
    axes: str
    kept: Mapping[str, np.ndarray]

    def index(self) -> Index:
        """What is left along the source's matrix's input and, of its own part, output."""
        first, shape = self.target.input_axes, self.source.shape
        return (
            _positions(self.axes[:first], shape[:first], self.kept),
            _positions(self.axes[first:], shape[first:], self.kept),
        )


def _positions(
    axes: str, shape: tuple[int, ...], kept: Mapping[str, np.ndarray]
) -> np.ndarray | None:
    """What is left along these axes taken together, -1 for zeros; None: all."""
    if not any(letter in kept for letter in axes):
        return None
    places = np.arange(math.prod(shape)).reshape(shape)
    for axis, letter in enumerate(axes):
        if letter in kept:
            places = places.take(kept[letter], axis)
            places[(slice(None),) * axis + (kept[letter] < 0,)] = -1
    return places.reshape(-1)


@dataclass(frozen=True, eq=False)
class Kept:
    """A tensor whose packed weights and scales are parts of one of the source's.

    Attributes:
        shape: of the tensor as it would be unpacked.
        info: of the source's.
        links: its pieces.
    """

    shape: tuple[int, ...]
    info: TensorInfo
    links: tuple[_Link, ...]

    @property
    def packed(self) -> Packed:
        assert self.info.packed is not None  # others are not kept, but written anew
        return self.info.packed

    def headers(self) -> list[tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of the weights and of the scales."""
        shapes = (shape for shape, _ in self.packed.scheme.stored(self.shape))
        return [(s, info.dtype) for s, info in zip(shapes, self.packed[:2], strict=True)]

    def fits(self) -> bool:
        """Whether nothing but whole blocks is left out."""
        scheme = self.packed.scheme
        return all(in_steps(scheme, index, self.info.shape) for *_, index in self._parts())

    def read(self, reader: TensorReader, scales: bool) -> np.ndarray:
        """The packed weights, or the scales; zeros where the tensor has no expert."""
        weights, of_weights, _ = self.packed
        (shape, dtype), info = self.headers()[scales], of_weights if scales else weights
        array = np.zeros(shape, dtype)
        for here, there, index in self._parts():
            part = self.packed.scheme.cut(reader.read(info, there), index, scales)
            array[... if here is None else here] = part
            reader.release_pages()
        return array

    def _parts(self) -> Iterator[tuple[int | None, int | None, Index]]:
        """Of each matrix: its index among stacked ones, here and in the source; what is left."""
        matrices: dict[int | None, list[_Link]] = {}
        for link in self.links:
            matrices.setdefault(link.target.entry, []).append(link)
        for here, links in matrices.items():
            yield here, links[0].source.entry, self._index(links)

    def _index(self, links: list[_Link]) -> Index:
        if not any(link.kept for link in links):
            return None, None
        transposed = links[0].target.matrix is not None
        axis = -2 if transposed else -1
        size, whole = self.shape[axis], np.arange(self.info.shape[axis])
        outputs, into = np.empty(size, int), None
        for link in links:
            into, out = link.index()
            own = whole[_outputs(link.source)]
            outputs[_outputs(link.target)] = own if out is None else np.where(out < 0, -1, own[out])
        out = None if np.array_equal(outputs, whole) else outputs
        return (out, into) if transposed else (into, out)


def _outputs(piece: Piece) -> slice:
    """Of a matrix's outputs, those that a piece holds."""
    return piece.region[-1] if piece.region else slice(None)


class Storage(NamedTuple):
    """How the tensors of an export are stored.

    Attributes:
        scheme: the ``quantization_config`` to write; None: nothing is packed.
        kept: by key, the tensors whose packed bytes are the source's.
        packed: by key, the schemes that tensors are packed by again.
        reason: why a packed source's export is not packed as it was; empty if it is.
    """

    scheme: dict[str, Any] | None = None
    kept: Mapping[str, Kept] = {}
    packed: Mapping[str, Scheme] = {}
    reason: str = ""


def plan_storage(
    tensors: Mapping[str, list[Piece]],
    hf: Mapping[str, Any],
    infos: Mapping[str, TensorInfo],
    lineage: Lineage | None,
    packing: Packing,
) -> Storage:
    """How an export is stored.

    Args:
        tensors: the pieces of each of its tensors.
        hf, infos: of the source, see ``folder.read_config_file`` and ``read_tensor_infos``.
        lineage: where the model comes from in the source; None: unknown.
        packing: what becomes of tensors that cannot stay packed.

    Raises:
        ValueError: packing again without a lineage.
    """
    if not any(info.packed for info in infos.values()):
        return Storage()
    if lineage is None:
        if packing == "source":
            raise ValueError("packing as the source does needs the lineage of the model, got none")
        return Storage(reason="it is not known which numbers are the source's (no lineage)")
    scheme = _renumbered(hf[_SCHEME], lineage)
    if isinstance(scheme, str):
        return Storage(reason=scheme)
    kept: dict[str, Kept] = {}
    packed: dict[str, Scheme] = {}
    for key, whole, new in _counterparts(tensors, infos, lineage):
        if {link.source.key for link in whole.links} != {whole.info.key}:
            return Storage(reason=f"{key} is several tensors in the source")
        if any((link.target.entry is None) != (link.source.entry is None) for link in whole.links):
            return Storage(reason=f"{key} is stacked with others in the source, or they in it")
        if not new and whole.fits():
            kept[key] = whole
            continue
        how = whole.packed.scheme
        reason = "has numbers of its own" if new else f"is not cut in whole blocks of {how.steps}"
        if packing == "keep":
            return Storage(reason=f"{key} {reason}")
        if (form := hf[_SCHEME].get("scale_fmt")) not in (None, "float32"):
            return Storage(reason=f"{key} {reason}, and scales of the form {form!r} are not made")
        try:
            list(how.stored(whole.shape))
        except ValueError as error:
            return Storage(reason=f"{key} {reason}, and {error}")
        packed[key] = how
    return Storage(scheme, kept, packed)


def _counterparts(
    tensors: Mapping[str, list[Piece]],
    infos: Mapping[str, TensorInfo],
    lineage: Lineage,
) -> Iterator[tuple[str, Kept, bool]]:
    """Tensors whose counterparts in the source are packed, and whether their numbers are new."""
    row = find_family(lineage.source.family)
    layout = detect_layout(row, lineage.source, infos)
    places = {(piece.path, piece.row): piece for piece in expand(row, lineage.source, layout)}
    leaves = dict(leaves_with_path(abstract_params(lineage.config)))
    origins = {path: lineage.origins(path) for path in leaves}
    for key, pieces in tensors.items():
        links, new = [], False
        for piece in pieces:
            origin = origins[piece.path][piece.row or 0]
            if origin is None:  # a constant, which is never packed
                break
            axes = leaves[piece.path].axes[piece.row is not None :]
            source = places[origin.path, origin.row]
            links.append(_Link(piece, source, axes, origin.kept))
            new |= origin.new
        if links and (info := infos[links[0].source.key]).packed is not None:
            yield key, Kept(pieces[0].key_shape, info, tuple(links)), new


def _renumbered(scheme: Mapping[str, Any], lineage: Lineage) -> dict[str, Any] | str:
    """``quantization_config`` whose lists name layers and experts as they are now, or why not."""
    layers = {layer.source: n for n, layer in enumerate(lineage.layers)}
    experts = [{row.source: e for e, row in enumerate(layer.rows)} for layer in lineage.layers]
    if lineage.config.num_layers == lineage.source.num_layers and all(
        len(now) == (lineage.source.moe(i).num_experts if now else 0)
        for i, now in enumerate(experts)
    ):
        return dict(scheme)
    edited = dict(scheme)
    for name in MODULE_LISTS:
        modules = scheme.get(name)
        if not isinstance(modules, list):
            continue
        edited[name] = []
        for module in map(str, modules):
            if re.search(r"[][()|?+^$\\{}]", module) and re.search(r"\d", module):
                return f"{_SCHEME} names modules by the pattern {module!r}, with numbers"
            match = _NUMBERED.search(module)
            if match is None:
                edited[name].append(module)
                continue
            layer, between, expert = match.groups()
            if (n := layers.get(int(layer))) is None:
                continue
            text = f"layers.{n}"
            if expert is not None:
                if int(expert) not in experts[n]:
                    continue
                text += f"{between}{experts[n][int(expert)]}"
            edited[name].append(module[: match.start()] + text + module[match.end() :])
    return edited
