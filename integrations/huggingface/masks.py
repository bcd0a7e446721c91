"""transformers' mask function for attnhub: the pattern of a mask is recognised and handed on as structure.

transformers describes a mask as a function of indices made by a handful of factories in ``transformers.masking_utils``. The
factories of a pattern are recognised by their code objects and their parameters are read from the closure. Whatever is not
recognised becomes the dense mask that transformers' own sdpa attention would get: never a guess.

A query at row i stands at ``i + q_offset`` and a key at column j at ``j + kv_offset``; only the difference of the offsets,
``shift``, matters. attnhub aligns a mask at the bottom right, which is this one once the keys that no query can see are cut
off (`CompactMask.keys`), or, with a static cache whose fill level lives on a device, once SeqLens says the level.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any, Optional, Union

import torch
from torch import Tensor

from attnhub.integrations.huggingface.compact import CompactMask
from attnhub.mask import FULL, BoolMask, Mask, SeqLens

Size = Union[int, Tensor]


@dataclass(frozen=True, eq=False)
class Pattern:
    """A recognised mask, in transformers' positions. ``left_padding`` shifts the chunks of each sequence."""

    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    chunk: int = 0
    left_padding: Optional[Tensor] = None
    segments: Optional[Tensor] = None
    blocks: Optional[Tensor] = None

    def uses_position(self) -> bool:
        return self.causal or self.window != (-1, -1) or self.chunk > 0 or self.blocks is not None

    def is_only_causal(self) -> bool:
        return self.causal and self.window == (-1, -1) and not self.chunk and self.segments is None and self.blocks is None


_CAUSAL = Pattern(causal=True)
_ALL = Pattern()


def attnhub_mask(
    batch_size: int,
    kv_length: int,
    q_length: Optional[int] = None,
    q_offset: Size = 0,
    kv_offset: int = 0,
    mask_function: Optional[Callable[..., Any]] = None,
    attention_mask: Union[CompactMask, Tensor, None] = None,
    local_size: Optional[int] = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: Any = None,
    cache_position: Optional[Tensor] = None,
    config: Any = None,
    **kwargs: Any,
) -> Union[CompactMask, Tensor, None]:
    """The function registered in transformers' AttentionMaskInterface; its arguments are that interface's.

    attention_mask: [B, L], True (or 1) for tokens, False for padding, on the absolute key axis; or a finished mask. cache_position: how
    older transformers (5.0) passes q_length and q_offset. Returns a `CompactMask`, or a dense bool mask for patterns that
    are not recognised.
    """
    from transformers import masking_utils

    if isinstance(attention_mask, CompactMask):
        # Made before the model was called, as generate() does for static caches: a finished mask, as a 4-D tensor is.
        return attention_mask
    if mask_function is None:
        mask_function = masking_utils.causal_mask_function
    if cache_position is not None:
        q_length, q_offset, device = cache_position.shape[0], cache_position[0], cache_position.device
    assert q_length is not None
    tracing = is_tracing()
    pattern = None
    if not use_vmap and (attention_mask is None or attention_mask.ndim == 2):
        if tracing:
            pattern = _traced_pattern(mask_function, local_size, allow_is_causal_skip or isinstance(q_offset, Tensor), config)
        else:
            pattern = recognise(mask_function)
    if attention_mask is not None and device is None:
        device = attention_mask.device
    where = torch.device(device if device is not None else "cpu")
    made = None
    if pattern is not None:
        # transformers forbids the shortcut in the decode step of a cache that it may compile. The mask then enters a graph from
        # outside: what changes from step to step must be in tensors, or each step would be compiled anew.
        steady = q_length == 1 and not allow_is_causal_skip
        made = _compact(pattern, batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, where, tracing or steady, steady)
    if made is not None:
        return made
    sizes: dict[str, Any] = (
        {"cache_position": cache_position} if cache_position is not None else {"q_length": q_length, "q_offset": q_offset, "device": device}
    )
    if use_vmap:
        sizes["use_vmap"] = True
    # Some models pass it down themselves. A shortcut would give None, and attention without a mask may be causal.
    kwargs.pop("allow_is_bidirectional_skip", None)
    dense: Optional[Tensor] = masking_utils.sdpa_mask(
        batch_size=batch_size, kv_length=kv_length, kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
        local_size=local_size, allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **sizes, **kwargs,
    )  # fmt: skip
    return dense


# -- recognising -------------------------------------------------------------------------------------------------------


@functools.cache
def _factories() -> dict[CodeType, str]:
    """Code object of the function that each factory of this transformers version returns -> the factory's name."""
    from transformers import masking_utils as mu

    def sample(name: str, *args: Any) -> Any:
        factory = getattr(mu, name, None)
        return None if factory is None else factory(*args)

    causal, ids = mu.causal_mask_function, torch.zeros(1, 1, dtype=torch.long)
    samples = {
        "and": sample("and_masks", causal),
        "or": sample("or_masks", causal),
        "sliding": sample("sliding_window_overlay", 1),
        "sliding_bidirectional": sample("sliding_window_bidirectional_overlay", 1),
        "chunked": sample("chunked_overlay", 1, ids[0]),
        "packed": sample("packed_sequence_mask_function", ids),
        "remap": sample("remap_positions_for_packed_sequence", causal, ids),
        "blockwise": sample("blockwise_overlay", ids),
    }
    found = {function.__code__: name for name, function in samples.items() if function is not None}
    found[causal.__code__] = "causal"
    if hasattr(mu, "bidirectional_mask_function"):
        found[mu.bidirectional_mask_function.__code__] = "bidirectional"
    return found


def recognise(mask_function: Any) -> Optional[Pattern]:
    """The pattern of a mask function, or None if any part of it is unknown."""
    code = getattr(mask_function, "__code__", None)
    name = _factories().get(code) if code is not None else None
    if name is None:
        return None
    assert code is not None
    if name == "causal":
        return _CAUSAL
    if name == "bidirectional":
        return _ALL
    try:
        cell = dict(zip(code.co_freevars, (c.cell_contents for c in mask_function.__closure__ or ())))
        if name == "sliding":
            return Pattern(window=(int(cell["sliding_window"]) - 1, -1))
        if name == "sliding_bidirectional":
            return Pattern(window=(int(cell["sliding_window"]),) * 2)
        if name == "chunked":
            return Pattern(chunk=int(cell["chunk_size"]), left_padding=cell["left_padding"])
        if name == "packed":
            return Pattern(segments=cell["packed_sequence_mask"])
        if name == "blockwise":
            return Pattern(blocks=cell["block_sequence_ids"])
        if name == "remap":
            # Inside a packed sequence positions count up by one, as indices do; chunks, which start with the sequence, do not survive.
            inner = recognise(cell["mask_function"])
            return inner if inner is not None and not inner.chunk and inner.blocks is None else None
        parts = [recognise(f) for f in cell["mask_functions"]]
    except (KeyError, TypeError, ValueError):
        # The factory has other parameters in this version of transformers.
        return None
    known = [p for p in parts if p is not None]
    if len(known) != len(parts):
        return None
    return _intersection(known) if name == "and" else _union(known)


def _intersection(parts: list[Pattern]) -> Optional[Pattern]:
    merged = _ALL
    for part in parts:
        for name in ("window", "chunk", "segments", "blocks"):
            mine, theirs, default = getattr(merged, name), getattr(part, name), getattr(_ALL, name)
            if mine is not default and mine != default and theirs is not default and theirs != default:
                return None
        if part.blocks is not None or merged.blocks is not None:
            # In attnhub blocks widen causal, so an intersection with them is another mask.
            return None
        merged = Pattern(
            causal=merged.causal or part.causal,
            window=part.window if part.window != (-1, -1) else merged.window,
            chunk=part.chunk or merged.chunk,
            left_padding=part.left_padding if part.left_padding is not None else merged.left_padding,
            segments=part.segments if part.segments is not None else merged.segments,
        )
    return merged


def _union(parts: list[Pattern]) -> Optional[Pattern]:
    """Only causal | blocks is structure: image tokens that see each other in both directions."""
    causal = [p for p in parts if p.is_only_causal()]
    blocks = [p for p in parts if p.blocks is not None and not p.causal]
    if len(parts) == 2 and len(causal) == 1 and len(blocks) == 1:
        return replace(blocks[0], causal=True)
    return None


def _traced_pattern(mask_function: Any, local_size: Optional[int], plain: bool, config: Any) -> Optional[Pattern]:
    """The pattern while a graph is traced, where a closure cannot be read.

    plain: transformers vouches that nothing (packing, image blocks, a user's function) was combined with the pattern: it
    would have forbidden the causal shortcut. Then local_size is the window or the chunk, and the config says which.
    """
    from transformers import masking_utils as mu

    if mask_function is mu.causal_mask_function:
        return _CAUSAL
    if mask_function is getattr(mu, "bidirectional_mask_function", None):
        return _ALL
    if not plain or local_size is None or config is None or mask_function.__code__ is not _and_code():
        return None
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    causal = getattr(config, "is_causal", True)
    if causal and window == local_size and chunk != local_size:
        return Pattern(causal=True, window=(local_size - 1, -1))
    return None


def _and_code() -> CodeType:
    from transformers import masking_utils as mu

    code: CodeType = mu.and_masks(mu.causal_mask_function).__code__
    return code


# -- building ------------------------------------------------------------------------------------------------------------


def _compact(
    pattern: Pattern, batch: int, seqlen_q: int, seqlen_k: int, q_offset: Size, kv_offset: int, attention_mask: Optional[Tensor],
    device: torch.device, unread: bool, steady: bool,
) -> Optional[CompactMask]:  # fmt: skip
    """The pattern as structure, or None where attnhub has none for it.

    unread: look at no value of a tensor. steady: steps of one decode loop must differ in tensors only.
    """
    shift = q_offset - kv_offset
    if isinstance(shift, Tensor) and not unread and _is_free_to_read(shift):
        shift = int(shift)
    elif steady and isinstance(shift, int) and pattern.blocks is None and pattern.segments is None and pattern.causal:
        shift = torch.full((), shift, device=device)
    keys, align = seqlen_k, "bottom_right"
    level: Optional[Tensor] = None
    if pattern.uses_position():
        if isinstance(shift, Tensor):
            if not pattern.causal or pattern.segments is not None or pattern.blocks is not None:
                return None
            # A new tensor: the static cache goes on counting in its own.
            level = (shift + seqlen_q).to(torch.int32).expand(batch)
        else:
            # A bidirectional block may reach beyond the last query.
            reach = seqlen_k if pattern.blocks is not None or not pattern.causal else shift + seqlen_q
            if reach < seqlen_k:
                keys = reach
            if keys - seqlen_q != shift:
                if shift != 0:
                    return None
                align = "top_left"
    chunk = _chunk(pattern, kv_offset, seqlen_q, attention_mask, unread)
    if chunk is None:
        return None
    window = pattern.window
    if not unread and level is None and align == "bottom_right":
        # A window that reaches over all keys is none.
        window = (-1 if window[0] >= keys - 1 else window[0], -1 if window[1] >= keys - 1 else window[1])
    # One query at the last key sees all of them.
    causal = pattern.causal and not (seqlen_q == 1 and align == "bottom_right")
    mask = Mask(causal=causal, align=align, window=window, chunk=chunk)  # type: ignore[arg-type]
    if level is not None:
        mask = mask & SeqLens(level)
    if pattern.segments is not None:
        if seqlen_q != keys or pattern.segments.shape[-1] != keys:
            return None
        ids = pattern.segments.to(torch.int32).expand(batch, -1)
        mask = replace(mask, segments=(ids, ids))
    if pattern.blocks is not None:
        blocks = pattern.blocks.to(torch.int32).expand(batch, -1)
        first = shift + kv_offset
        mask = replace(mask, causal=True, blocks=(blocks[:, first : first + seqlen_q], blocks[:, kv_offset : kv_offset + keys]))
    if attention_mask is not None:
        mask = _pad(mask, attention_mask, kv_offset, keys, batch, seqlen_q, unread)
    plain = not mask.features()
    return CompactMask(FULL if plain else mask, batch, seqlen_q, seqlen_k, keys, device)


def _chunk(pattern: Pattern, kv_offset: int, seqlen_q: int, attention_mask: Optional[Tensor], unread: bool) -> Optional[int]:
    """The chunk size if chunks begin at multiples of it on the key axis (0: no chunks), else None."""
    if not pattern.chunk:
        return 0
    if kv_offset % pattern.chunk:
        return None
    if attention_mask is None or pattern.left_padding is None:
        return pattern.chunk
    readable = not unread and _is_readable(pattern.left_padding, seqlen_q)
    return pattern.chunk if readable and not bool(pattern.left_padding.any()) else None


def _pad(mask: Mask, attention_mask: Tensor, kv_offset: int, keys: int, batch: int, seqlen_q: int, unread: bool) -> Mask:
    """The mask without the padding of a 2-D attention_mask: as lengths where it is contiguous, else as one row of booleans per sequence."""
    tokens = attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0
    if kv_offset or tokens.shape[1] > keys:
        tokens = tokens[:, kv_offset : kv_offset + keys]
    if tokens.shape[1] < keys:
        tokens = torch.nn.functional.pad(tokens, (0, keys - tokens.shape[1]))
    if not unread and _is_readable(tokens, seqlen_q):
        if tokens.is_cpu and bool(tokens.all()):
            # Mostly so. Where looking costs no wait, it is looked at first.
            return mask
        lengths = tokens.sum(1, dtype=torch.int32)
        j = torch.arange(keys, device=tokens.device)
        left = tokens == (j >= keys - lengths[:, None])
        right = tokens == (j < lengths[:, None])
        none_padded, is_left, is_right = torch.stack([tokens.all(), left.all(), right.all()]).tolist()
        if none_padded:
            return mask
        if is_left:
            return replace(mask, leftpad=(keys - lengths).expand(batch))
        if is_right and mask.seqused_k is None and _can_take_lengths(mask, seqlen_q, keys):
            # Lengths move the bottom right corner of a mask; from the top left nothing moves.
            align = "top_left" if mask._uses_position() else mask.align
            return replace(mask, align=align, seqused_k=lengths.expand(batch))
    return mask & BoolMask(tokens[:, None, None, :])


def _can_take_lengths(mask: Mask, seqlen_q: int, keys: int) -> bool:
    return not mask._uses_position() or mask.align == "top_left" or seqlen_q == keys


# -- reading -------------------------------------------------------------------------------------------------------------


def is_tracing() -> bool:
    """Whether a graph is being made (dynamo, export, jit) or values are not there (fake tensors, functorch)."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _is_free_to_read(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _is_readable(tensor: Tensor, seqlen_q: int) -> bool:
    """Whether a value may be looked at: always on the CPU; on a device once per prefill (transformers' sdpa attention looks as
    often), never in a decode step and never while a CUDA graph is captured. Meta tensors have no values."""
    kind = tensor.device.type
    if kind == "cpu":
        return True
    if kind == "meta" or seqlen_q == 1:
        return False
    return not (kind == "cuda" and torch.cuda.is_current_stream_capturing())
