"""One rank of the tests in test_distributed.py, run as a program: ``distributed_worker.py RANK RANKS FOLDER SCENARIO...``.

Every scenario compares what the ranks compute together with what one process computes alone, and raises on a difference. The
outcomes go to ``FOLDER/rank<RANK>.json``: scenario -> "" or the traceback. After a failure the ranks may have lost step with
each other, so that the scenarios behind it are not run.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import attnhub

WIDTH, HEADS = 32, 4


class Layer(nn.Module):
    """Self-attention with a learned bias and sinks."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.bias = nn.Parameter(torch.randn(1, HEADS, 1, 7))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        out = attnhub.attention(q, k, v, attnhub.Causal() & attnhub.Bias(self.bias), sinks=self.sinks)
        assert isinstance(out, Tensor)
        return x + self.out(out.transpose(1, 2).reshape(batch, length, WIDTH))


def model() -> nn.Sequential:
    return nn.Sequential(Layer(0), Layer(1))


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=True), 2)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = LlamaModel(LlamaConfig(
                vocab_size=8, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=2,
                initializer_range=0.3,
            ))  # fmt: skip
            # From embeddings, so that the vocabulary's are not trained.
            self.model.embed_tokens = nn.Identity()
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.model(inputs_embeds=x, use_cache=False).last_hidden_state
            return hidden - x

    return Hidden()


def train(module: nn.Module, batches: list[Tensor], steps: int = 3) -> None:
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05)
    for step in range(steps):
        module(batches[step]).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def same_training(wrap: Callable[[nn.Module], nn.Module], rank: int, ranks: int, make: Callable[[], nn.Module] = model) -> None:
    alone, together = make(), make()
    data = torch.randn(3, 2 * ranks, 7, WIDTH, generator=torch.Generator().manual_seed(5))
    before = [p.detach().clone() for p in alone.parameters()]
    train(alone, list(data))
    wrapped = wrap(together)
    train(wrapped, list(data[:, 2 * rank : 2 * rank + 2]))
    for old, wanted, got in zip(before, alone.parameters(), together.parameters()):
        assert not torch.equal(old, wanted), "a parameter was not trained"
        torch.testing.assert_close(full(got.detach()), wanted.detach(), rtol=1e-4, atol=1e-5)
    same_decision(ranks)


def same_decision(ranks: int) -> None:
    """Every rank has taken the same choice, for the same problem."""
    decision = attnhub.last_decision()
    assert decision is not None
    said: list[Any] = [None] * ranks
    dist.all_gather_object(said, json.dumps(decision.to_json(), sort_keys=True))
    assert said.count(said[0]) == ranks, said


def ddp(rank: int, ranks: int) -> None:
    same_training(nn.parallel.DistributedDataParallel, rank, ranks)


def ddp_patched(rank: int, ranks: int) -> None:
    """Models whose attention is patched, before and after DDP takes them, train as they do alone and unpatched."""
    for make in (encoder, llama) if importlib.util.find_spec("transformers") else (encoder,):
        for before in (True, False):
            reports = []

            def wrap(module: nn.Module, before: bool = before, reports: list[Any] = reports) -> nn.Module:
                if before:
                    reports.append(attnhub.patch(module, strict=True))
                wrapped = nn.parallel.DistributedDataParallel(module)
                if not before:
                    reports.append(attnhub.patch(wrapped, strict=True))
                return wrapped

            same_training(wrap, rank, ranks, make)
            # Three steps of two layers; checkpointing computes each of the Llama's twice.
            assert reports[0].calls == (6 if make is encoder else 12), str(reports[0])


def fsdp(rank: int, ranks: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (ranks,))

    def wrap(module: nn.Module) -> nn.Module:
        for child in module.children():
            fully_shard(child, mesh=mesh)
        fully_shard(module, mesh=mesh)
        return module

    same_training(wrap, rank, ranks)


def fsdp_checkpointed(rank: int, ranks: int) -> None:
    """FSDP2, activation checkpointing and torch.compile of each layer, together."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (ranks,))

    def wrap(module: nn.Module) -> nn.Module:
        assert isinstance(module, nn.Sequential)
        for i, child in enumerate(module):
            child.forward = torch.compile(child.forward, backend="aot_eager", fullgraph=True)  # type: ignore[method-assign]
            module[i] = fully_shard(checkpoint_wrapper(child), mesh=mesh)
        fully_shard(module, mesh=mesh)
        return module

    same_training(wrap, rank, ranks)


def _inputs(kv_heads: int) -> dict[str, Tensor]:
    random_ = torch.Generator().manual_seed(kv_heads)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random_)

    return {"q": tensor(4, 4, 9, 8), "k": tensor(4, kv_heads, 9, 8), "v": tensor(4, kv_heads, 9, 8), "bias": tensor(1, 4, 9, 9), "sinks": tensor(4)}


def _loss(out: Any) -> Tensor:
    outs = out if isinstance(out, tuple) else (out,)
    return sum((o * o).sum() for o in outs)  # type: ignore[return-value]


def dtensor(rank: int, ranks: int) -> None:
    """q, k, v sharded over the batch, over heads, over tokens (which is gathered) or not at all; bias, sinks and lengths with them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks,))
    lengths, slopes = torch.tensor([3, 9, 5, 1]), torch.linspace(0.1, 1, 4)
    segments = torch.arange(9).expand(4, 9) // 4
    allowed = torch.rand(4, 4, 9, 9, generator=torch.Generator().manual_seed(0)) > 0.2

    def call(t: dict[str, Tensor], lse: bool) -> Any:
        mask = attnhub.Causal() & attnhub.SeqLens(lengths) & attnhub.Bias(t["bias"]) & attnhub.ALiBi(slopes)
        mask = mask & attnhub.Segments(segments) & attnhub.BoolMask(allowed)
        return attnhub.attention(t["q"], t["k"], t["v"], mask, sinks=t["sinks"], softcap=10.0, return_lse=lse)

    for kv_heads in (4, 2, 1):
        for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
            stays = [placement] if placement in (Shard(0), Shard(1)) else [Replicate()]
            for lse in (False, True):
                alone = {name: t.requires_grad_() for name, t in _inputs(kv_heads).items()}
                wanted = call(alone, lse)
                _loss(wanted).backward()
                sharded = {}
                for name, t in _inputs(kv_heads).items():
                    whole = name in ("bias", "sinks") or (placement == Shard(1) and t.shape[1] == 1)
                    here: list[Placement] = [Replicate() if whole else placement]
                    sharded[name] = distribute_tensor(t, mesh, here).detach().requires_grad_()
                got = call(sharded, lse)
                _loss(got).backward()
                for g, w in zip(got if lse else (got,), wanted if lse else (wanted,)):
                    assert list(g.placements) == stays, (g.placements, stays)
                    torch.testing.assert_close(full(g), w, rtol=1e-4, atol=1e-4)
                for name, leaf in sharded.items():
                    assert leaf.grad is not None and alone[name].grad is not None
                    torch.testing.assert_close(full(leaf.grad), alone[name].grad, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        # Without lse and then with it, on shapes not seen before: the cached rule of one must not serve the other.
        x = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
        whole = distribute_tensor(x, mesh, [Replicate()])
        torch.testing.assert_close(full(attnhub.attention(whole, whole, whole)), attnhub.attention(x, x, x))
        out, lse = attnhub.attention(whole, whole, whole, return_lse=True)
        assert lse.shape == (2, 2, 5)
        torch.testing.assert_close((full(out), full(lse)), attnhub.attention(x, x, x, return_lse=True))


def dtensor_fp8(rank: int, ranks: int) -> None:
    """Factors that every rank knows go with their part of the batch or of the heads. (Each rank cuts its own part: gloo does not send fp8.)"""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = init_device_mesh("cpu", (ranks,))
    for kv_heads in (4, 2, 1):
        t = _inputs(kv_heads)
        q, k, v = (t[name].to(torch.float8_e4m3fn) for name in "qkv")
        some = {f"{name}_descale": torch.rand(4, kv_heads, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("qkv")}
        wanted = attnhub.attention(q, k, v, attnhub.Causal(), backend="reference", **some)
        for dim in (0, 1):
            shared = dim == 1 and kv_heads == 1
            parts = [x if shared and x is not q else x.chunk(ranks, dim)[rank] for x in (q, k, v)]
            placements = [Replicate() if shared and x is not q else Shard(dim) for x in (q, k, v)]
            sharded = [DTensor.from_local(x, mesh, [p]) for x, p in zip(parts, placements)]
            got = attnhub.attention(*sharded, attnhub.Causal(), backend="reference", **some)
            assert got.placements == (Shard(dim),) and torch.equal(got.to_local(), wanted.chunk(ranks, dim)[rank])


def dtensor_dropout_and_packed(rank: int, ranks: int) -> None:
    """Dropout is one mask of the whole tensor, so its calls are gathered; packed sequences can be sharded over heads."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks,))
    q, k, v = (_inputs(4)[name] for name in "qkv")
    sharded = [distribute_tensor(t, mesh, [Shard(1)]) for t in (q, k, v)]
    torch.manual_seed(1)
    wanted = attnhub.attention(q, k, v, dropout_p=0.3)
    torch.manual_seed(1)
    got = attnhub.attention(*sharded, dropout_p=0.3)
    assert got.placements == (Replicate(),)
    torch.testing.assert_close(full(got), wanted)
    varlen = attnhub.Varlen.from_lengths(torch.tensor([10, 26]))
    packed = [t.transpose(1, 2).reshape(36, 4, 8) for t in (q, k, v)]
    wanted = attnhub.attention(*packed, attnhub.Causal(), varlen=varlen)
    got = attnhub.attention(*(distribute_tensor(t, mesh, [Shard(1)]) for t in packed), attnhub.Causal(), varlen=varlen)
    assert got.placements == (Shard(1),)
    torch.testing.assert_close(full(got), wanted)


def tensor_parallel(rank: int, ranks: int) -> None:
    """Megatron's way: the projections sharded by torch's parallel styles, attention on the heads of the rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks,))
    weights = [torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(i)) / 6 for i in range(4)]
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(9))

    def layer(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor) -> Tensor:
        q, k, v = ((x @ w.t()).unflatten(2, (HEADS, -1)) for w in (wq, wk, wv))
        out = attnhub.attention(q, k, v, attnhub.Causal(), layout="bshd")
        assert isinstance(out, Tensor)
        return out.flatten(2) @ wo.t()

    alone = [w.clone().requires_grad_() for w in weights]
    wanted = layer(x, *alone)
    wanted.square().sum().backward()
    placements = [Shard(0), Shard(0), Shard(0), Shard(1)]
    sharded = [distribute_tensor(w, mesh, [p]).detach().requires_grad_() for w, p in zip(weights, placements)]
    got = layer(distribute_tensor(x, mesh, [replicate()]), *sharded)
    torch.testing.assert_close(full(got), wanted, rtol=1e-4, atol=1e-5)
    full(got).square().sum().backward()
    for w, p, right in zip(sharded, placements, alone):
        assert w.grad is not None and right.grad is not None and w.grad.placements == (p,)
        torch.testing.assert_close(full(w.grad), right.grad, rtol=1e-4, atol=1e-4)


def context_parallel(rank: int, ranks: int) -> None:
    """Inside torch's block plain tensors are parts of sequences: refused on every way to a kernel, and served behind it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import experimental

    mesh = init_device_mesh("cpu", (ranks,))
    ways: list[Callable[[Tensor], Any]] = [
        lambda x: attnhub.attention(x, x, x),
        torch.compile(lambda x: attnhub.attention(x, x, x), backend="aot_eager", fullgraph=True),
        lambda x: attnhub.attention(x, x, x, attnhub.SeqLens(torch.tensor([1, 2]))),
        lambda x: attnhub.attention(x.detach(), x.detach(), x.detach(), kv_cache=attnhub.KVCache.empty(2, 4, 8, 16)),
        replaced,
    ]
    for grad in (False, True):
        part = torch.randn(2, 4, 8 // ranks, 16, requires_grad=grad)
        for way in ways:
            way(part)
            with experimental.context_parallel(mesh, buffers=[torch.zeros(2, 4, 8, 16)], buffer_seq_dims=[2]):
                try:
                    way(part)
                except RuntimeError as error:
                    assert "context_parallel" in str(error), error
                else:
                    raise AssertionError("a part of a sequence was taken for the whole")
            way(part)


def replaced(x: Tensor) -> Tensor:
    with attnhub.replace_sdpa():
        return nn.functional.scaled_dot_product_attention(x, x, x)


def replicate() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


def ranks_that_disagree(rank: int, ranks: int) -> None:
    """The comparison of decisions has teeth."""
    q = torch.randn(1, 2, 5, 8)
    with attnhub.use("reference" if rank else "sdpa"):
        attnhub.attention(q, q, q)
    try:
        same_decision(ranks)
    except AssertionError:
        return
    raise AssertionError("ranks with different choices were not noticed")


def main(rank: int, ranks: int, folder: pathlib.Path, scenarios: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    outcomes = {}
    try:
        for scenario in scenarios:
            globals()[scenario](rank, ranks)
            outcomes[scenario] = ""
            dist.barrier()
    except Exception:
        outcomes[scenario] = traceback.format_exc()
    (folder / f"rank{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4:])
