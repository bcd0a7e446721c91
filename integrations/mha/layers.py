"""nn.TransformerEncoderLayer without its inference fast path, which would call torch's fused kernel and never its self_attn."""

from __future__ import annotations

from attnhub.integrations.swap import Swapped


class EncoderLayerMixin(Swapped):
    """torch keeps in ``activation_relu_or_gelu`` which activation its fused kernel has to apply; 0 says that it has none for
    this layer, and nothing else reads it. So the layer takes its ordinary path, forwards of subclasses included, and the
    process-wide switch for fast paths stays as it is.
    """

    @property
    def activation_relu_or_gelu(self) -> int:
        return 0
