"""The op's flat form of a call: a static string, sizes that may be symbolic, and a list of data tensors.

A torch operator takes tensors and numbers, not masks. `encode` writes a normalised call as

- ``spec``: a string of ``name`` and ``name=value`` words joined by spaces, e.g. ``causal window seqused_k softcap=30.0``.
  All that is structure: it is a constant of a traced graph.
- ``sizes``: whole numbers in the order of the words (window left and right, chunk, block size, max_seqlen of q and k).
  They are SymInts, so one graph serves every length.
- ``data``: tensors in the order of the words (prefix, segment ids, lengths, masks, slopes, cu_seqlens, block table, rng,
  factors of fp8 inputs).

``bias`` and ``sinks`` are arguments of their own, because they have gradients. `decode` is the inverse.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Optional

from torch import Tensor

from attnhub.backend import Call, Descale
from attnhub.layouts import Varlen
from attnhub.mask import FULL, Mask

#: word -> (number of sizes, number of tensors) that it takes. The order of this table is the order of the words.
WORDS: dict[str, tuple[int, int]] = {
    "causal": (0, 0),
    "top_left": (0, 0),
    "window": (2, 0),
    "chunk": (1, 0),
    "prefix": (0, 1),
    "segments": (0, 2),
    "blocks": (0, 2),
    "seqused_k": (0, 1),
    "leftpad": (0, 1),
    "bool_mask": (0, 1),
    "alibi": (0, 1),
    "block_sparse": (2, 1),
    "varlen": (2, 2),
    "block_table": (0, 1),
    "softcap": (0, 0),
    "dropout": (0, 1),
    "q_descale": (0, 1),
    "k_descale": (0, 1),
    "v_descale": (0, 1),
    "deterministic": (0, 0),
}


def encode(
    mask: Mask, softcap: float, dropout_p: float, rng: Optional[Tensor], varlen: Optional[Varlen], block_table: Optional[Tensor],
    descale: Optional[Descale] = None, deterministic: bool = False,
) -> tuple[str, list[int], list[Tensor]]:  # fmt: skip
    """(spec, sizes, data) of a call. Traceable: makes no tensor and reads no value of one."""
    words: list[str] = []
    sizes: list[int] = []
    data: list[Tensor] = []
    if mask.causal:
        words.append("causal")
    if mask.align == "top_left":
        words.append("top_left")
    if mask.window[0] != -1 or mask.window[1] != -1:
        words.append("window")
        sizes.extend(mask.window)
    if mask.chunk:
        words.append("chunk")
        sizes.append(mask.chunk)
    if mask.prefix is not None:
        words.append("prefix")
        data.append(mask.prefix)
    if mask.segments is not None:
        words.append("segments")
        data.extend(mask.segments)
    if mask.blocks is not None:
        words.append("blocks")
        data.extend(mask.blocks)
    if mask.seqused_k is not None:
        words.append("seqused_k")
        data.append(mask.seqused_k)
    if mask.leftpad is not None:
        words.append("leftpad")
        data.append(mask.leftpad)
    if mask.bool_mask is not None:
        words.append("bool_mask")
        data.append(mask.bool_mask)
    if mask.alibi is not None:
        words.append("alibi")
        data.append(mask.alibi)
    if mask.block_sparse is not None:
        words.append("block_sparse")
        sizes.extend(mask.block_size)
        data.append(mask.block_sparse)
    if varlen is not None:
        words.append("varlen")
        sizes.extend((varlen.max_seqlen_q, varlen.max_seqlen_k))
        data.extend((varlen.cu_seqlens_q, varlen.cu_seqlens_k))
    if block_table is not None:
        words.append("block_table")
        data.append(block_table)
    if softcap:
        words.append(f"softcap={softcap}")
    if rng is not None:
        words.append(f"dropout={dropout_p}")
        data.append(rng)
    if descale is not None:
        for name, value in zip(("q_descale", "k_descale", "v_descale"), descale):
            if value is not None:
                words.append(name)
                data.append(value)
    if deterministic:
        words.append("deterministic")
    return " ".join(words), sizes, data


@functools.lru_cache(maxsize=1024)
def parse(spec: str) -> tuple[tuple[str, float], ...]:
    """The words of a spec with their values (0.0 where a word has none). Raises ValueError on a word it does not know."""
    words = []
    for item in spec.split():
        name, _, value = item.partition("=")
        if name not in WORDS:
            raise ValueError(f"spec={spec!r}: unknown word {name!r}; known are {', '.join(WORDS)}")
        words.append((name, float(value) if value else 0.0))
    return tuple(words)


def decode(
    q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor], sinks: Optional[Tensor], data: Sequence[Tensor], spec: str,
    sizes: Sequence[int], softmax_scale: float, need_lse: bool,
) -> Call:  # fmt: skip
    """The call that the op's arguments describe: the inverse of `encode`."""
    call = Call(q, k, v, FULL, softmax_scale, 0.0, sinks, need_lse=need_lse)
    if not spec and bias is None:
        return call
    parts: dict[str, Any] = {"bias": bias}
    size, tensor = iter(sizes), iter(data)
    for name, value in parse(spec):
        if name == "causal":
            parts["causal"] = True
        elif name == "top_left":
            parts["align"] = "top_left"
        elif name == "window":
            parts["window"] = (next(size), next(size))
        elif name == "chunk":
            parts["chunk"] = next(size)
        elif name in ("segments", "blocks"):
            parts[name] = (next(tensor), next(tensor))
        elif name == "block_sparse":
            parts["block_size"] = (next(size), next(size))
            parts["block_sparse"] = next(tensor)
        elif name == "varlen":
            lengths = next(size), next(size)
            call.varlen = Varlen(next(tensor), next(tensor), *lengths)
        elif name == "block_table":
            call.block_table = next(tensor)
        elif name == "softcap":
            call.softcap = value
        elif name == "dropout":
            call.dropout_p, call.rng = value, next(tensor)
        elif name == "deterministic":
            call.deterministic = True
        elif name.endswith("_descale"):
            call.descale = (call.descale or Descale())._replace(**{name[0]: next(tensor)})
        else:
            parts[name] = next(tensor)
    call.mask = Mask(**parts)
    return call
