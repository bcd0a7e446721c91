"""Continuous batching (`generate_batch`) with a patched model: decode steps read transformers' pages where they lie, through their block tables.

transformers hands pages and block tables to implementations that have "flash" in their names only, and asks for a CUDA build of
flash-attn before it makes tables. So `paged` gives a patched model such a name for a while, and answers that question for it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from attnhub.api import attention
from attnhub.integrations.calls import count
from attnhub.kv_cache import KVCache
from attnhub.layouts import Varlen
from attnhub.mask import FULL, Causal, Window

NAME = "attnhub_flash"
_lock = threading.Lock()
_scopes = 0
_before: Any = None


@contextlib.contextmanager
def paged(model: Any) -> Iterator[Any]:
    """Within it, ``model.generate_batch(...)`` of a patched model runs through attnhub; gives the model.

    Prompts, and every step of sliding window layers, are one packed call on the keys that transformers collects. Decode steps of models
    with full attention alone append to its pages and read them in place. Nothing else should be run on the model meanwhile.

    Raises ValueError for a model that is not patched, or of which a part is not routed by transformers' attention interface, and
    RuntimeError where this transformers hands over no block tables.
    """
    from attnhub.integrations.huggingface.routing import renamed

    register()
    with renamed(model, NAME), _block_tables():
        yield model


def register() -> None:
    """Make the name known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, paged_forward)
    AttentionMaskInterface.register(NAME, lambda *_, attention_mask=None, **__: attention_mask)


def paged_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Optional[Tensor] = None,
    dropout: float = 0.0,
    scaling: Optional[float] = None,
    sliding_window: Optional[int] = None,
    softcap: Optional[float] = None,
    s_aux: Optional[Tensor] = None,
    cu_seq_lens_q: Optional[Tensor] = None,
    cu_seq_lens_k: Optional[Tensor] = None,
    max_length_q: Union[int, Tensor, None] = None,
    max_length_k: Union[int, Tensor, None] = None,
    block_table: Optional[Tensor] = None,
    k_cache: Optional[Tensor] = None,
    v_cache: Optional[Tensor] = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' contract for packed and paged attention: query [1, Hq, T, D] of all sequences one after another -> [1, T, Hq, Dv].

    With block_table [B, max_pages], and k_cache, v_cache [pages, page_size, Hk, D], every sequence has one query; its key and value
    are appended to its pages, which have room for them. Otherwise key and value [1, Hk, Tk, D] hold all keys of all sequences, new ones last.
    cu_seq_lens_q, cu_seq_lens_k: [B + 1].
    """
    if attention_mask is not None or cu_seq_lens_q is None or cu_seq_lens_k is None:
        raise ValueError(
            f"attnhub: {type(module).__name__} was called outside of generate_batch while its model was in attnhub's paged() scope: leave the scope first"
        )
    options: dict[str, Any] = {"softmax_scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux}
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if block_table is not None and k_cache is not None and v_cache is not None:
        # A row of padding has no keys, not even its own, and an empty table: what it writes goes to page 0, which transformers gives to nobody.
        before = (cu_seq_lens_k[1:] - cu_seq_lens_k[:-1] - 1).clamp_min(0).to(torch.int32)
        cache = KVCache(k_cache, v_cache, before, block_table.clamp_min(0), layout="bshd")
        out = attention(q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), FULL, kv_cache=cache, **options)
        assert isinstance(out, Tensor)
        out = out.squeeze(2)
    else:
        mask = Causal() & Window(sliding_window - 1, -1) if sliding_window is not None else Causal()
        assert max_length_q is not None and max_length_k is not None
        varlen = Varlen(cu_seq_lens_q.to(torch.int32), cu_seq_lens_k.to(torch.int32), int(max_length_q), int(max_length_k))
        packed = attention(q, k, v, mask, varlen=varlen, **options)
        assert isinstance(packed, Tensor)
        out = packed
    count(module)
    return out.contiguous().unsqueeze(0), None


@contextlib.contextmanager
def _block_tables() -> Iterator[None]:
    """transformers' question whether block tables can be read, answered yes for attnhub's name while any scope is open."""
    global _before, _scopes
    try:
        from transformers.generation.continuous_batching import initialization
    except ImportError:
        initialization = None  # type: ignore[assignment]
    if not hasattr(initialization, "ensure_decode_fast_path_is_available"):
        raise RuntimeError("attnhub: this transformers hands no block tables to attention functions; 5.24 does")
    with _lock:
        if not _scopes:
            _before = initialization.ensure_decode_fast_path_is_available
            initialization.ensure_decode_fast_path_is_available = _ensure
        _scopes += 1
    try:
        yield
    finally:
        with _lock:
            _scopes -= 1
            if not _scopes:
                initialization.ensure_decode_fast_path_is_available = _before


def _ensure(config: Any, cb_config: Any, user_requested: bool) -> None:
    from transformers.generation.continuous_batching import cache

    if config._attn_implementation != NAME:
        _before(config, cb_config, user_requested)
    elif not all(cache.ATTN_TYPE_TO_ALLOCATOR[kind].supports_block_table for kind in cache.group_layers_by_attn_type(config)):
        cb_config.max_blocks_per_request = 0
