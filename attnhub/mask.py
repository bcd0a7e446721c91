"""Masks: which query may attend to which key, and what is added to a score.

A `Mask` is an immutable normal form: one field per kind of part, each holding structure (numbers) or data (tensors), so
that a kernel reads what it needs without ever seeing an N x N tensor. Parts are made by the functions below and combined
with ``&``; ``True`` means attend, everywhere.

Positions. Query row ``i`` of a sequence stands at position ``p = i + offset`` on the key axis. The offset is 0 when the
mask is aligned ``top_left`` and ``len_k - len_q`` when aligned ``bottom_right`` (the default: the last query stands at the
last key, as with a K/V cache). ``len_k`` is the length of the sequence that the row belongs to: ``seqused_k[b]`` if given,
else the packed length, else Sk. Causal, Window, Chunk, Prefix and ALiBi all use ``p``, and one mask has one alignment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Optional

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnhub.problem import Feature

Align = Literal["bottom_right", "top_left"]
_ALIGNMENTS = ("bottom_right", "top_left")


@dataclass(frozen=True, eq=False)
class Mask:
    """The normal form. Build it with `Causal`, `Window`, ... and ``&``; read it in a backend field by field.

    ==============  ==========================================================================================
    field           pair (b, h, i, j) is allowed only if (p as in the module's text)
    ==============  ==========================================================================================
    causal          j <= p, unless ``prefix`` or ``blocks`` widens it
    window          p - left <= j <= p + right; -1 is unlimited; (-1, -1) is no window
    chunk           floor(p / chunk) == floor(j / chunk); 0 is no chunking
    prefix          [B] int32: widens causal to ``j <= p or j < prefix[b]``
    segments        ids_q [B, Sq], ids_k [B, Sk] int32: ids_q[b, i] == ids_k[b, j]
    blocks          ids_q, ids_k as above: widens causal to ``j <= p or ids_q == ids_k >= 0`` (image blocks)
    seqused_k       [B] int32: j < seqused_k[b]
    leftpad         [B] int32: j >= leftpad[b]
    bool_mask       bool, broadcastable to [B, Hq, Sq, Sk]: bool_mask[b, h, i, j]
    block_sparse    bool [B or 1, Hq or 1, ceil(Sq/bq), ceil(Sk/bk)] with ``block_size = (bq, bk)``
    ==============  ==========================================================================================

    ``bias`` (floating, broadcastable to [B, Hq, Sq, Sk]; differentiable; -inf masks a pair out) and ``alibi`` (fp32
    slopes, [Hq] or [B, Hq]: adds ``-slope * |p - j|``) are added to the scaled, soft-capped score.
    Equality is identity: a mask may hold tensors.
    """

    causal: bool = False
    align: Align = "bottom_right"
    window: tuple[int, int] = (-1, -1)
    chunk: int = 0
    prefix: Optional[Tensor] = None
    segments: Optional[tuple[Tensor, Tensor]] = None
    blocks: Optional[tuple[Tensor, Tensor]] = None
    seqused_k: Optional[Tensor] = None
    leftpad: Optional[Tensor] = None
    bool_mask: Optional[Tensor] = None
    bias: Optional[Tensor] = None
    alibi: Optional[Tensor] = None
    block_sparse: Optional[Tensor] = None
    block_size: tuple[int, int] = (0, 0)

    def __and__(self, other: Mask) -> Mask:
        """Both masks hold: pairs allowed by both, biases added."""
        if not isinstance(other, Mask):
            raise TypeError(f"mask & other: other must be an attnhub.Mask, got {type(other).__name__}")
        if self._uses_position() and other._uses_position() and self.align != other.align:
            raise ValueError(
                f"mask & other: one is aligned {self.align}, the other {other.align}; one mask has one alignment. "
                "Pass the same align= to both, or turn one into BoolMask(other.to_dense(...))."
            )
        changes: dict[str, Any] = {"causal": self.causal or other.causal}
        changes["align"] = self.align if self._uses_position() else other.align
        changes["window"] = tuple(_tighter(a, b) for a, b in zip(self.window, other.window))
        for name, combine in _COMBINE.items():
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is None or theirs is None:
                changes[name] = theirs if mine is None else mine
            else:
                changes[name] = combine(mine, theirs)
        for name in ("chunk", "prefix", "segments", "blocks", "alibi", "block_sparse", "block_size"):
            mine, theirs = getattr(self, name), getattr(other, name)
            default = _DEFAULTS[name]
            both = mine is not default and mine != default and theirs is not default and theirs != default
            if both and mine is not theirs and not (isinstance(mine, (int, tuple)) and _same(mine, theirs)):
                raise ValueError(
                    f"mask & other: both hold {name}; attnhub combines {name} parts only when they are the same object. "
                    "Turn one into BoolMask(other.to_dense(...)), or give one combined part."
                )
            changes[name] = theirs if (mine is default or mine == default) else mine
        return replace(self, **changes)

    def _uses_position(self) -> bool:
        return bool(self.causal or self.window != (-1, -1) or self.chunk or self.alibi is not None)

    @property
    def structural(self) -> bool:
        """Whether the mask holds no tensor."""
        return not self.held

    @property
    def held(self) -> tuple[Tensor, ...]:
        """All tensors that the mask holds."""
        found: tuple[Tensor, ...] | None = self.__dict__.get("_held")
        if found is None:
            found = self.__dict__["_held"] = tuple(self.tensors())
        return found

    @property
    def structure(self) -> tuple[Any, ...]:
        """All that the mask is but its tensors: the numbers, and which tensors there are."""
        found: tuple[Any, ...] | None = self.__dict__.get("_structure")
        if found is None:
            names = tuple(name for name in _TENSOR_FIELDS if getattr(self, name) is not None)
            found = self.__dict__["_structure"] = (self.causal, self.align, self.window, self.chunk, self.block_size, names)
        return found

    def features(self) -> frozenset[Feature]:
        """The features that a backend must list to serve this mask. Computed once per mask."""
        found: frozenset[Feature] | None = self.__dict__.get("_found")
        if found is None:
            found = _features(self)
            self.__dict__["_found"] = found
        return found

    def to_dense(self, *, batch: int, q_heads: int, seqlen_q: int, seqlen_k: int, device: torch.device | str = "cpu") -> tuple[Tensor, Optional[Tensor]]:
        """(allowed, bias): bool [B or 1, Hq or 1, Sq, Sk] and the sum of Bias and ALiBi in fp32 (or None). Sq x Sk memory."""
        from attnhub.dense import added_bias, allowed_pairs

        rows = (0, seqlen_q)
        where = torch.device(device)
        return (
            allowed_pairs(self, batch, seqlen_q, seqlen_k, rows, where),
            added_bias(self, q_heads, seqlen_q, seqlen_k, rows, where, torch.float32),
        )

    def __getstate__(self) -> dict[str, Any]:
        """The fields, without what was computed from them."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that the mask holds."""
        for name in _TENSOR_FIELDS:
            value = getattr(self, name)
            if isinstance(value, tuple):
                yield from value
            elif value is not None:
                yield value


_DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(Mask)}
_TENSOR_FIELDS = ("prefix", "segments", "blocks", "seqused_k", "leftpad", "bool_mask", "bias", "alibi", "block_sparse")
_COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "seqused_k": torch.minimum,
    "leftpad": torch.maximum,
    "bool_mask": torch.logical_and,
    "bias": torch.add,
}


def _same(mine: Any, theirs: Any) -> bool:
    """Equal numbers, or the same tensors."""
    if isinstance(mine, tuple):
        return all(_same(a, b) for a, b in zip(mine, theirs))
    return mine is theirs or (isinstance(mine, int) and mine == theirs)


def _tighter(a: int, b: int) -> int:
    return b if a < 0 else a if b < 0 else min(a, b)


def _features(mask: Mask) -> frozenset[Feature]:
    found = set()
    if mask.causal:
        found.add(Feature.CAUSAL_BOTTOM_RIGHT if mask.align == "bottom_right" else Feature.CAUSAL_TOP_LEFT)
    elif mask._uses_position() and mask.align == "top_left":
        found.add(Feature.CAUSAL_TOP_LEFT)
    if mask.window != (-1, -1):
        found.add(Feature.WINDOW)
    if mask.chunk:
        found.add(Feature.CHUNK)
    for name, feature in _TENSOR_FEATURES.items():
        if getattr(mask, name) is not None:
            found.add(feature)
    return frozenset(found)


_TENSOR_FEATURES = {
    "prefix": Feature.PREFIX,
    "segments": Feature.SEGMENTS,
    "blocks": Feature.SEGMENTS,
    "seqused_k": Feature.SEQLENS,
    "leftpad": Feature.LEFTPAD,
    "bool_mask": Feature.BOOL_MASK,
    "bias": Feature.BIAS,
    "alibi": Feature.ALIBI,
    "block_sparse": Feature.BLOCK_SPARSE,
}

#: The mask that masks nothing.
FULL = Mask()


def _check_align(align: str) -> None:
    if align not in _ALIGNMENTS:
        raise ValueError(f"align={align!r}: allowed are {_ALIGNMENTS}")


def _whole(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


_INTEGERS = {torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
#: No sequence is so long: lengths and ids are int32.
_BOUND = 1 << 31


def _check_ints(name: str, value: Tensor, ndim: int) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype not in _INTEGERS or value.ndim != ndim:
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must be an integer tensor with {ndim} dimension(s), got {got}")
    if value.dtype == torch.int32:
        return value
    narrow = value.to(torch.int32)
    if value.itemsize >= 4 and readable(value) and not torch.equal(narrow.long(), value.long()):
        raise ValueError(f"{name}: {value.dtype} values from {int(value.long().min())} to {int(value.long().max())} do not fit into int32, which kernels read; renumber them")
    return narrow


def readable(value: Tensor) -> bool:
    """Whether the numbers can be looked at here and now without waiting for a device: not while tracing or under a transform."""
    return (
        not torch.compiler.is_compiling() and type(value) is Tensor and value.is_cpu and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None and torch._C._get_tracing_state() is None
    )  # fmt: skip


def Causal(align: Align = "bottom_right") -> Mask:  # noqa: N802 - parts read as types
    """Query i attends to keys up to its own position. ``bottom_right`` is flash-attn's, ``top_left`` torch's is_causal."""
    _check_align(align)
    # Made at each call it would cost as much as a third of a small attention. A traced graph would have to guard the fields of a shared one.
    return Mask(causal=True, align=align) if torch.compiler.is_compiling() else _CAUSAL[align]


_CAUSAL = {align: Mask(causal=True, align=align) for align in _ALIGNMENTS}  # type: ignore[arg-type]


def Window(left: int = -1, right: int = -1, align: Align = "bottom_right") -> Mask:  # noqa: N802
    """Sliding window, both ends inclusive, -1 unlimited. HuggingFace's ``sliding_window=W`` is ``Causal() & Window(W - 1)``."""
    _check_align(align)
    if not _whole(left) or not _whole(right):
        raise TypeError(f"Window(left={left!r}, right={right!r}): whole numbers are needed")
    if left < -1 or right < -1:
        raise ValueError(f"Window(left={left}, right={right}): each must be -1 (unlimited) or at least 0")
    left, right = (-1 if isinstance(n, int) and n >= _BOUND - 1 else n for n in (left, right))
    return Mask(window=(left, right), align=align)


def Chunk(size: int, align: Align = "bottom_right") -> Mask:  # noqa: N802
    """Attention inside chunks of ``size`` consecutive positions (Llama 4)."""
    _check_align(align)
    if not _whole(size):
        raise TypeError(f"Chunk(size={size!r}): a whole number is needed")
    if size < 1:
        raise ValueError(f"Chunk(size={size}): size must be at least 1")
    return Mask(chunk=min(size, _BOUND - 1) if isinstance(size, int) else size, align=align)


def Prefix(lengths: Tensor) -> Mask:  # noqa: N802
    """The first lengths[b] keys are visible to every query of sequence b: widens Causal. lengths: [B] integers."""
    return Mask(prefix=_check_ints("Prefix(lengths)", lengths, 1))


def Segments(ids_q: Tensor, ids_k: Optional[Tensor] = None, *, widen_causal: bool = False) -> Mask:  # noqa: N802
    """Segment ids [B, Sq] and [B, Sk] (default: the same).

    By default a pair must be of one segment (packed documents). With ``widen_causal=True`` they restrict nothing: pairs of
    one segment with id >= 0 are allowed even where Causal forbids them (bidirectional image blocks; id -1: no block).
    """
    q = _check_ints("Segments(ids_q)", ids_q, 2)
    k = q if ids_k is None else _check_ints("Segments(ids_k)", ids_k, 2)
    return Mask(blocks=(q, k)) if widen_causal else Mask(segments=(q, k))


def SeqLens(seqused_k: Tensor) -> Mask:  # noqa: N802
    """Only the first seqused_k[b] keys of sequence b exist. What lies behind is never read into a result.

    0 <= seqused_k[b] <= the keys that sequence b has; it is not checked, since reading it would wait for the device.
    """
    return Mask(seqused_k=_check_ints("SeqLens(seqused_k)", seqused_k, 1))


def LeftPad(leftpad: Tensor) -> Mask:  # noqa: N802
    """The first leftpad[b] keys of sequence b are padding. They are never read into a result. Below 0 is none, beyond the keys all of them."""
    return Mask(leftpad=_check_ints("LeftPad(leftpad)", leftpad, 1))


def BoolMask(mask: Tensor) -> Mask:  # noqa: N802
    """A dense boolean mask, broadcastable to [B, Hq, Sq, Sk]; True means attend."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise ValueError(f"BoolMask(mask): a bool tensor is needed, got {getattr(mask, 'dtype', type(mask).__name__)}; use Bias for additive masks")
    return Mask(bool_mask=_four_dims("BoolMask(mask)", mask))


def Bias(bias: Tensor) -> Mask:  # noqa: N802
    """A floating bias added to the scaled (and soft-capped) scores; broadcastable to [B, Hq, Sq, Sk]; differentiable."""
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        raise ValueError(f"Bias(bias): a floating tensor is needed, got {getattr(bias, 'dtype', type(bias).__name__)}; use BoolMask for booleans")
    return Mask(bias=_four_dims("Bias(bias)", bias))


def ALiBi(slopes: Tensor, align: Align = "bottom_right") -> Mask:  # noqa: N802
    """Adds -slope * |p - j|. slopes: [Hq] or [B, Hq] (arXiv 2108.12409, symmetric as in flash-attn 2)."""
    _check_align(align)
    if not isinstance(slopes, Tensor) or slopes.ndim not in (1, 2) or not (slopes.is_floating_point() or slopes.dtype in _INTEGERS):
        got = f"{slopes.dtype} {tuple(slopes.shape)}" if isinstance(slopes, Tensor) else type(slopes).__name__
        raise ValueError(f"ALiBi(slopes): a [Hq] or [B, Hq] tensor of real numbers is needed, got {got}")
    return Mask(alibi=slopes if slopes.dtype == torch.float32 else slopes.to(torch.float32), align=align)


def BlockSparse(blocks: Tensor, block_size: tuple[int, int]) -> Mask:  # noqa: N802
    """Whole blocks of (bq, bk) pairs are kept or dropped. blocks: bool [B or 1, Hq or 1, ceil(Sq/bq), ceil(Sk/bk)]."""
    if not isinstance(blocks, Tensor) or blocks.dtype != torch.bool or blocks.ndim > 4:
        raise ValueError("BlockSparse(blocks): a bool tensor of at most 4 dimensions is needed")
    if not isinstance(block_size, (tuple, list)) or len(block_size) != 2 or not all(map(_whole, block_size)):
        raise TypeError(f"BlockSparse(block_size={block_size!r}): a pair of whole numbers (bq, bk) is needed")
    bq, bk = block_size
    if bq < 1 or bk < 1:
        raise ValueError(f"BlockSparse(block_size={block_size}): both must be at least 1")
    return Mask(block_sparse=_four_dims("BlockSparse(blocks)", blocks), block_size=(bq, bk))


def _four_dims(name: str, value: Tensor) -> Tensor:
    if value.ndim > 4:
        raise ValueError(f"{name}: at most 4 dimensions ([B, Hq, Sq, Sk]), got shape {tuple(value.shape)}")
    while value.ndim < 4:
        value = value.unsqueeze(0)
    return value


def check_fields(mask: Mask) -> None:
    """Raises ValueError for what only `Mask(...)` itself lets through: kernels read the fields as their functions make them."""

    def bad(name: str, needed: str, part: str) -> ValueError:
        value = getattr(mask, name)
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value) if not isinstance(value, tuple) or len(value) < 3 else "a tuple"
        return ValueError(f"Mask({name}={got}): {needed} is needed; attnhub.{part} makes it")

    def pair(value: Any, kind: Callable[[Any], bool]) -> bool:
        return isinstance(value, tuple) and len(value) == 2 and all(map(kind, value))

    _check_align(mask.align)
    if not pair(mask.window, lambda n: _whole(n) and n >= -1):
        raise bad("window", "a pair of whole numbers of at least -1", "Window(...)")
    if not _whole(mask.chunk) or mask.chunk < 0:
        raise bad("chunk", "a whole number of at least 0", "Chunk(...)")
    for name, part in (("prefix", "Prefix(...)"), ("seqused_k", "SeqLens(...)"), ("leftpad", "LeftPad(...)")):
        value = getattr(mask, name)
        if value is not None and not _holds(value, torch.int32, 1):
            raise bad(name, "int32 [B]", part)
    for name in ("segments", "blocks"):
        value = getattr(mask, name)
        if value is not None and not pair(value, lambda t: _holds(t, torch.int32, 2)):
            raise bad(name, "a pair of int32 [B, S]", "Segments(...)")
    if mask.bool_mask is not None and not _holds(mask.bool_mask, torch.bool, 4):
        raise bad("bool_mask", "bool with 4 dimensions", "BoolMask(...)")
    if mask.bias is not None and not (isinstance(mask.bias, Tensor) and mask.bias.is_floating_point() and mask.bias.ndim == 4):
        raise bad("bias", "a floating tensor with 4 dimensions", "Bias(...)")
    if mask.alibi is not None and not (isinstance(mask.alibi, Tensor) and mask.alibi.is_floating_point() and mask.alibi.ndim in (1, 2)):
        raise bad("alibi", "a floating [Hq] or [B, Hq]", "ALiBi(...)")
    if mask.block_sparse is not None:
        if not _holds(mask.block_sparse, torch.bool, 4):
            raise bad("block_sparse", "bool with 4 dimensions", "BlockSparse(...)")
        if not pair(mask.block_size, lambda n: _whole(n) and n >= 1):
            raise bad("block_size", "a pair of whole numbers of at least 1", "BlockSparse(...)")


def _holds(value: Any, dtype: torch.dtype, ndim: int) -> bool:
    return isinstance(value, Tensor) and value.dtype == dtype and value.ndim == ndim


def _flatten(mask: Mask) -> tuple[list[Any], tuple[Any, ...]]:
    names = tuple(name for name in _TENSOR_FIELDS if getattr(mask, name) is not None)
    return [getattr(mask, name) for name in names], (names, mask.causal, mask.align, mask.window, mask.chunk, mask.block_size)


def _unflatten(children: Any, context: tuple[Any, ...]) -> Mask:
    names, causal, align, window, chunk, block_size = context
    tensors = dict(zip(names, children))
    return Mask(causal=causal, align=align, window=tuple(window), chunk=chunk, block_size=tuple(block_size), **tensors)  # type: ignore[arg-type]


def register_pytree(cls: type, flatten: Any, unflatten: Any) -> None:
    """Make a class with tensors an input that torch.compile, torch.export and vmap accept. ``flatten`` gives (children, context), and
    the context starts with the children's names."""

    def with_keys(value: Any) -> tuple[list[tuple[Any, Any]], Any]:
        children, context = flatten(value)
        return [(pytree.GetAttrKey(name), child) for name, child in zip(context[0], children)], context

    pytree.register_pytree_node(
        cls, flatten, unflatten, serialized_type_name=f"attnhub.{cls.__name__}", flatten_with_keys_fn=with_keys,
        to_dumpable_context=list, from_dumpable_context=_tuples,
    )  # fmt: skip
    torch.serialization.add_safe_globals([cls])  # torch.load of what holds one, by its safe default


def _tuples(dumped: Any) -> Any:
    """JSON knows lists only; a context is made of tuples, so that it can be compared and hashed."""
    return tuple(map(_tuples, dumped)) if isinstance(dumped, list) else dumped


register_pytree(Mask, _flatten, _unflatten)
