"""The attention function registered in transformers' AttentionInterface under the name ``attnhub``."""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from attnhub.api import attention
from attnhub.integrations.calls import count, count_weights
from attnhub.integrations.huggingface.compact import CompactMask
from attnhub.integrations.huggingface.routing import EAGER_ONLY, FOREIGN_MASKS
from attnhub.integrations.weights import attention_with_weights
from attnhub.layouts import Varlen
from attnhub.mask import FULL, Bias, BoolMask, Causal, Mask


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Union[CompactMask, Tensor, None] = None,
    dropout: float = 0.0,
    scaling: Union[float, Tensor, None] = None,
    is_causal: Optional[bool] = None,
    softcap: Optional[float] = None,
    s_aux: Optional[Tensor] = None,
    position_bias: Optional[Tensor] = None,
    sinks: Optional[Tensor] = None,
    output_attentions: Optional[bool] = None,
    cu_seq_lens_q: Optional[Tensor] = None,
    cu_seq_lens_k: Optional[Tensor] = None,
    max_length_q: Optional[int] = None,
    max_length_k: Optional[int] = None,
    indices: Optional[Tensor] = None,
    block_indices: Optional[Tensor] = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Optional[Tensor]]:
    """transformers' contract: query [B, Hq, Sq, D], key [B, Hk, Sk, D], value [B, Hk, Sk, Dv] -> ([B, Sq, Hq, Dv], weights or None).

    attention_mask: a `CompactMask`, a bool tensor (True attends), an additive floating tensor, or None: then, as in
    transformers' sdpa attention, is_causal (default: the module's; without one, False) decides, aligned at the top left. position_bias is added to
    the scores (T5). s_aux, sinks: [Hq], or [B, Hq, Sq, 1] for one sink per query. ``sliding_window`` in kwargs repeats what the
    mask says and is not read. The weights are computed, by plain maths and after saying so once, only where output_attentions asks.

    Raises ValueError for sparse key indices and paged caches, which belong to other kernels.
    """
    if indices is not None or block_indices is not None:
        raise ValueError(
            f"attnhub: {type(module).__name__} hands over the indices of the keys that it selected, which only its own kernels read. "
            'Load the model with attn_implementation="sdpa" or "eager".'
        )
    if cache is not None:
        raise ValueError(
            "attnhub: continuous batching hands over its paged cache, which this function does not read: run generate_batch in the scope "
            "attnhub.integrations.huggingface.paged.paged(model), or unpatch the model first."
        )
    if s_aux is None:
        s_aux = sinks
    if isinstance(scaling, Tensor):
        query, scaling = query * scaling, 1.0
    query, key, value = _one_dtype(query, key, value)
    dropout = dropout if module.training else 0.0
    mask, keys = _mask_of(module, query, key, attention_mask, is_causal)
    if keys < key.shape[2]:
        key, value = key[:, :, :keys], value[:, :, :keys]
    if position_bias is not None:
        mask = mask & Bias(position_bias[..., :keys] if position_bias.shape[-1] > keys else position_bias)
    if wants_weights(module, output_attentions):
        out, weights = attention_with_weights(
            query, key, value, mask, softmax_scale=scaling, softcap=softcap or 0.0, sinks=s_aux, dropout_p=dropout
        )
        count_weights(module, "output_attentions=True")
        return out.transpose(1, 2).contiguous(), weights
    options: dict[str, Any] = {"softmax_scale": scaling, "softcap": softcap or 0.0, "dropout_p": dropout}
    if s_aux is not None and s_aux.ndim > 1:
        out, lse = attention(query, key, value, mask, return_lse=True, **options)
        # A sink adds exp(sink) to the denominator exp(lse): out * exp(lse) / (exp(lse) + exp(sink)).
        out = (out * torch.sigmoid(lse.unsqueeze(-1) - s_aux.to(lse.dtype))).to(query.dtype)
    elif mask.segments is not None and cu_seq_lens_q is not None and cu_seq_lens_k is not None and _packs(query, mask, position_bias):
        # A collator that packs documents says where they begin: then nothing between two documents is ever computed.
        assert max_length_q is not None and max_length_k is not None
        varlen = Varlen(cu_seq_lens_q, cu_seq_lens_k, int(max_length_q), int(max_length_k))
        inside = Mask(causal=mask.causal, window=mask.window)
        tokens = [t[0].transpose(0, 1) for t in (query, key, value)]
        packed = attention(tokens[0], tokens[1], tokens[2], inside, varlen=varlen, sinks=s_aux, **options)
        assert isinstance(packed, Tensor)
        out = packed.transpose(0, 1).unsqueeze(0)
    else:
        result = attention(query, key, value, mask, sinks=s_aux, **options)
        assert isinstance(result, Tensor)
        out = result
    count(module)
    # No copy where attnhub laid heads inside tokens, as it does for a q of that order. Models may call view() on the result.
    return out.transpose(1, 2).contiguous(), None


def _mask_of(
    module: nn.Module, query: Tensor, key: Tensor, attention_mask: Union[CompactMask, Tensor, None], is_causal: Optional[bool]
) -> tuple[Mask, int]:
    """The mask, and how many keys it is for."""
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    if attention_mask is None:
        if is_causal is None:
            # attnhub's masks say it where a model is causal; those for sdpa attention leave it to the module, and that to a default.
            is_causal = EAGER_ONLY not in module.__dict__ and getattr(module, "is_causal", getattr(module, FOREIGN_MASKS, False))
        if not is_causal or seqlen_q == 1:
            return FULL, seqlen_k
        # More keys than queries are the unused rest of a static cache.
        return (Causal(), seqlen_q) if seqlen_k >= seqlen_q else (Causal("top_left"), seqlen_k)
    if isinstance(attention_mask, CompactMask):
        fits = attention_mask.seqlen_q == seqlen_q and attention_mask.seqlen_k == seqlen_k
        if fits and (
            attention_mask.batch == query.shape[0] or attention_mask.mask is FULL or not any(True for _ in attention_mask.mask.tensors())
        ):
            return attention_mask.mask, attention_mask.keys
        if attention_mask.mask is FULL and attention_mask.keys == attention_mask.seqlen_k:
            # Some models put keys before those that the mask was made for. In transformers' own attention this mask is none.
            return FULL, seqlen_k
        attention_mask = attention_mask.dense()
    if attention_mask.shape[-1] > seqlen_k:
        attention_mask = attention_mask[..., :seqlen_k]
    if attention_mask.dtype == torch.bool:
        return BoolMask(attention_mask), seqlen_k
    if not attention_mask.is_floating_point():
        raise ValueError(
            f"attnhub: attention_mask of {type(module).__name__} is {attention_mask.dtype}: a bool or floating tensor is needed"
        )
    return Bias(attention_mask), seqlen_k


def _one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast normalised q and k may be fp32 beside a half-precision v; one dtype is what autocast makes of them."""
    if query.dtype == key.dtype == value.dtype:
        return query, key, value
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return query.to(dtype), key.to(dtype), value.to(dtype)
    return query, key, value


def _packs(query: Tensor, mask: Mask, position_bias: Optional[Tensor]) -> bool:
    """Whether nothing but the documents, causal and a window is in the mask."""
    rest = (mask.prefix, mask.blocks, mask.seqused_k, mask.leftpad, mask.bool_mask, mask.bias, position_bias)
    return query.shape[0] == 1 and not mask.chunk and all(part is None for part in rest)


# -- weights -------------------------------------------------------------------------------------------------------------


def wants_weights(module: nn.Module, output_attentions: Optional[bool]) -> bool:
    if output_attentions is not None:
        return bool(output_attentions)
    config = getattr(module, "config", None)
    if torch.compiler.is_compiling():
        return bool(getattr(config, "output_attentions", False))
    try:
        # Where transformers' property reads it; that way it costs a small model as much as the call's bookkeeping.
        wanted = object.__getattribute__(config, "__dict__")["_output_attentions"]
    except (AttributeError, KeyError):
        wanted = getattr(config, "output_attentions", False)
    return bool(wanted) or _is_collecting()


def _is_collecting() -> bool:
    """Whether transformers is recording attentions of this forward pass (it does so by hooks that the call does not mention)."""
    global _collector
    if _collector is False:
        try:
            from transformers.utils.output_capturing import _active_collector as found

            _collector = found
        except ImportError:
            # Before 5.2 output_attentions is passed down as an argument.
            _collector = None
    if _collector is None:
        return False
    collected = _collector.get()
    return collected is not None and any("attentions" in name for name in collected)


_collector: Any = False  # False: not looked for yet; None: this version has none.
