"""What the ONNX node is held to beside ONNX Runtime's own. Torch-free."""

from __future__ import annotations

from attnhub.bench.cases import Case
from attnhub.bench.target import Target, one, over

#: The shape of the targets.
CASE = Case(2048, heads=32, head_dim=128, causal=True)
#: Speed-up that is asked for over the graph that exporters write.
OVER_GRAPH = 3.0
NODE = tuple(
    Target(f"causal prefill over {name}", gate, gate, over(peer), one(CASE))
    for name, peer, gate in (
        ("GroupQueryAttention", "ONNX Runtime", 1.3), ("MultiHeadAttention", "ONNX Runtime MultiHeadAttention", 1.5),
        ("the exported graph", "ONNX Runtime graph", OVER_GRAPH),
    )
)  # fmt: skip
