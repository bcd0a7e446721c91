"""nn.MultiheadAttention's forward on attnhub, by the same parameters and with the same arguments and results."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from attnhub.api import attention
from attnhub.integrations.calls import count, count_weights
from attnhub.integrations.mha.nested import from_packed, to_packed, to_padded
from attnhub.integrations.swap import Swapped
from attnhub.integrations.weights import attention_with_weights
from attnhub.mask import FULL, Bias, BoolMask, Causal, Mask


class MultiheadAttentionMixin(Swapped):
    """Replaces forward. Unlike torch's, whose paths give NaN or 0 by mode, a row without any key gives 0 (then out_proj's bias)."""

    embed_dim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    training: bool
    in_proj_weight: Optional[Tensor]
    in_proj_bias: Optional[Tensor]
    q_proj_weight: Optional[Tensor]
    k_proj_weight: Optional[Tensor]
    v_proj_weight: Optional[Tensor]
    bias_k: Optional[Tensor]
    bias_v: Optional[Tensor]
    out_proj: Any
    kdim: int
    vdim: int

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Optional[Tensor] = None,
        need_weights: bool = True,
        attn_mask: Optional[Tensor] = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Optional[Tensor]]:
        """As torch.nn.MultiheadAttention.forward: in its masks True (or -inf) means *not* to attend.

        Nested tensors are served as self- or cross-attention without masks (ValueError otherwise); their weights are padded with zeros,
        as torch's are. Weights are computed by plain maths, which is said once.
        """
        sizes = zip(("query", "key", "value"), (query, key, value), (self.embed_dim, self.kdim, self.vdim))
        for name, given, size in sizes:
            if not isinstance(given, Tensor):
                raise TypeError(f"MultiheadAttention: {name} is a {type(given).__name__}: a Tensor is needed")
            if not given.is_nested and given.shape[-1:] != (size,):
                raise ValueError(f"MultiheadAttention: {name} has shape {tuple(given.shape)}; the module was made for a last dimension of {size}")
        if query.is_nested or key.is_nested or value.is_nested:
            return self._forward_nested(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        batched = _is_batched(query, key, value, key_padding_mask, attn_mask)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method `generate_square_subsequent_mask` to create this mask."
            )
        same = query is key and key is value
        key_is_value = key is value
        batch_dim = 0 if self.batch_first or not batched else 1
        if batched and query.shape[batch_dim] != key.shape[batch_dim]:
            raise ValueError(
                f"MultiheadAttention(batch_first={self.batch_first}): query {tuple(query.shape)} has batch {query.shape[batch_dim]} and key "
                f"{tuple(key.shape)} {key.shape[batch_dim]}: they must be equal"
            )
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        q, k, v = self._project(query, key, value, same, key_is_value)
        q, k, v = (self._heads(t, batch_dim) for t in (q, k, v))
        k, v, extra = self._append(k, v)
        mask = self._mask(q, k, key_padding_mask, attn_mask, is_causal, need_weights, extra)
        dropout_p = self.dropout if self.training else 0.0
        weights: Optional[Tensor] = None
        if need_weights:
            out, weights = attention_with_weights(q, k, v, mask, dropout_p=dropout_p)
            weights = weights.mean(1) if average_attn_weights else weights
            count_weights(self, "need_weights=True")  # type: ignore[arg-type]
        else:
            result = attention(q, k, v, mask, dropout_p=dropout_p)
            assert isinstance(result, Tensor)
            out = result
            count(self)  # type: ignore[arg-type]
        tokens = out.transpose(1, 2) if batch_dim == 0 else out.permute(2, 0, 1, 3)
        joined = F.linear(tokens.flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return joined.squeeze(0), None if weights is None else weights.squeeze(0)
        return joined, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor, same: bool, key_is_value: bool) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = self.in_proj_weight, self.in_proj_bias
        size = self.embed_dim
        if weight is None:
            assert self.q_proj_weight is not None and self.k_proj_weight is not None and self.v_proj_weight is not None
            biases = (None, None, None) if bias is None else bias.chunk(3)
            pairs = zip((query, key, value), (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight), biases)
            q, k, v = (F.linear(x, w, b) for x, w, b in pairs)
            return q, k, v
        if same:
            q, k, v = F.linear(query, weight, bias).chunk(3, -1)
            return q, k, v
        q = F.linear(query, weight[:size], None if bias is None else bias[:size])
        if key_is_value:
            k, v = F.linear(key, weight[size:], None if bias is None else bias[size:]).chunk(2, -1)
        else:
            k = F.linear(key, weight[size : 2 * size], None if bias is None else bias[size : 2 * size])
            v = F.linear(value, weight[2 * size :], None if bias is None else bias[2 * size :])
        return q, k, v

    def _heads(self, tokens: Tensor, batch_dim: int) -> Tensor:
        """[B, H, S, D] as a view of projected tokens [B, S, E] or [S, B, E]."""
        split = tokens.view(*tokens.shape[:2], self.num_heads, self.head_dim)
        return split.transpose(1, 2) if batch_dim == 0 else split.permute(1, 2, 0, 3)

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys and values of add_bias_kv and add_zero_attn behind the others, and how many they are."""
        parts_k, parts_v = [k], [v]
        row = (k.shape[0], self.num_heads, 1, self.head_dim)
        if self.bias_k is not None and self.bias_v is not None:
            for parts, bias in ((parts_k, self.bias_k), (parts_v, self.bias_v)):
                parts.append(bias.view(1, self.num_heads, 1, self.head_dim).to(k.dtype).expand(row))
        if self.add_zero_attn:
            parts_k.append(k.new_zeros(row))
            parts_v.append(v.new_zeros(row))
        extra = len(parts_k) - 1
        return (torch.cat(parts_k, 2), torch.cat(parts_v, 2), extra) if extra else (k, v, 0)

    def _mask(
        self,
        q: Tensor,
        k: Tensor,
        key_padding_mask: Optional[Tensor],
        attn_mask: Optional[Tensor],
        is_causal: bool,
        need_weights: bool,
        extra: int,
    ) -> Mask:
        batch, heads, seqlen_q, _ = q.shape
        seqlen_k = k.shape[2]
        for name, value in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if value is not None and value.dtype != torch.bool and not value.is_floating_point():
                raise ValueError(f"MultiheadAttention: {name} is {value.dtype}; bool and floating masks are supported")
        mask = FULL
        # The hint says that attn_mask is the causal mask. torch follows it where no other mask is there and no weights are asked
        # for, appended keys included; where keys were appended and the mask is used, they are visible.
        if is_causal and not need_weights and (key_padding_mask is None or not extra):
            mask = Causal("bottom_right" if seqlen_q == seqlen_k else "top_left")
        elif attn_mask is not None:
            if attn_mask.shape not in ((seqlen_q, seqlen_k - extra), (batch * heads, seqlen_q, seqlen_k - extra)):
                raise ValueError(
                    f"MultiheadAttention: attn_mask has shape {tuple(attn_mask.shape)}; [{seqlen_q}, {seqlen_k - extra}] is needed, or one for each "
                    f"sequence and head: [{batch * heads}, {seqlen_q}, {seqlen_k - extra}]"
                )
            full = attn_mask if attn_mask.ndim == 2 else attn_mask.view(batch, heads, *attn_mask.shape[1:])
            mask = _as_part(F.pad(full, (0, extra)) if extra else full)
        if key_padding_mask is not None:
            if key_padding_mask.shape != (batch, seqlen_k - extra):
                raise ValueError(
                    f"MultiheadAttention: key_padding_mask has shape {tuple(key_padding_mask.shape)}; [{batch}, {seqlen_k - extra}] is needed"
                )
            padding = F.pad(key_padding_mask, (0, extra)) if extra else key_padding_mask
            mask = mask & _as_part(padding[:, None, None, :])
        return mask

    def _forward_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Optional[Tensor],
        need_weights: bool,
        attn_mask: Optional[Tensor],
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Optional[Tensor]]:
        refused = {
            "key_padding_mask": key_padding_mask is not None, "attn_mask": attn_mask is not None, "is_causal": is_causal,
            "a query, key or value that is not nested": not (query.is_nested and key.is_nested and value.is_nested),
            "add_bias_kv or add_zero_attn": self.bias_k is not None or self.add_zero_attn, "batch_first=False": not self.batch_first,
        }  # fmt: skip
        if any(refused.values()):
            raise ValueError(
                f"MultiheadAttention with nested tensors does not support {', '.join(k for k, v in refused.items() if v)}; pad the sequences instead"
            )
        tokens_q, lengths_q = to_packed(query)
        tokens_k, lengths_k = (tokens_q, lengths_q) if key is query else to_packed(key)
        tokens_v = tokens_q if value is query else tokens_k if value is key else to_packed(value)[0]
        q, k, v = self._project(tokens_q, tokens_k, tokens_v, query is key and key is value, key is value)
        q, k, v = (t.view(-1, self.num_heads, self.head_dim) for t in (q, k, v))
        dropout_p = self.dropout if self.training else 0.0
        weights: Optional[Tensor] = None
        if need_weights:
            rows, keys = lengths_q.rows(), lengths_k.rows()
            mask = BoolMask(rows[:, None, :, None] & keys[:, None, None, :])
            padded, weights = attention_with_weights(to_padded(q, rows), to_padded(k, keys), to_padded(v, keys), mask, dropout_p=dropout_p)
            out = padded.transpose(1, 2)[rows]
            weights = weights.mean(1) if average_attn_weights else weights
            count_weights(self, "need_weights=True")  # type: ignore[arg-type]
        else:
            packed = attention(q, k, v, varlen=lengths_q.with_keys(lengths_k), dropout_p=dropout_p)
            assert isinstance(packed, Tensor)
            out = packed
            count(self)  # type: ignore[arg-type]
        return from_packed(F.linear(out.flatten(1), self.out_proj.weight, self.out_proj.bias), lengths_q), weights


def _is_batched(query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Optional[Tensor], attn_mask: Optional[Tensor]) -> bool:
    """Whether there is a batch dimension; ValueError where the arguments disagree about it."""
    dims = query.ndim
    if dims not in (2, 3) or key.ndim != dims or value.ndim != dims:
        raise ValueError(
            f"MultiheadAttention: query, key and value have {dims}, {key.ndim} and {value.ndim} dimensions; 3 are needed, or 2 in all without a batch"
        )
    if key.shape[: dims - 1] != value.shape[: dims - 1]:
        raise ValueError(
            f"MultiheadAttention: key {tuple(key.shape)} and value {tuple(value.shape)} must agree in all but the last dimension"
        )
    if key_padding_mask is not None and key_padding_mask.ndim != dims - 1:
        raise ValueError(
            f"MultiheadAttention: key_padding_mask has {key_padding_mask.ndim} dimension(s); {dims - 1} needed beside a query with {dims}"
        )
    if attn_mask is not None and attn_mask.ndim not in (2, 3):
        raise ValueError(f"MultiheadAttention: attn_mask has {attn_mask.ndim} dimension(s); 2 or 3 are needed")
    return dims == 3


def _as_part(mask: Tensor) -> Mask:
    """torch's mask (True or -inf: do not attend) as a part of ours."""
    return BoolMask(~mask) if mask.dtype == torch.bool else Bias(mask)
