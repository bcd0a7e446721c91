"""The triton backend's kernels, compiled as the plan would launch them, for GPUs that are not here."""

from __future__ import annotations

import contextlib
import pathlib
import re
import subprocess
from typing import Any, NamedTuple, Optional

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the extra attnhub[triton] is not installed")

import triton

from attnhub import config
from attnhub.backend import Call, Descale, Needs
from attnhub.backends.triton import TritonBackend, arguments, hopper, launch, launcher, tiles
from attnhub.layouts import Varlen
from attnhub.mask import FULL, ALiBi, Bias, BlockSparse, BoolMask, Causal, LeftPad, Mask, Prefix, Segments, SeqLens, Window
from attnhub.problem import DeviceInfo, Problem

pytestmark = pytest.mark.skipif(config.triton_interpret(), reason="runs in a process without TRITON_INTERPRET")

_TYPES = {
    torch.float8_e4m3fn: "fp8e4nv", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8",
}  # fmt: skip


class Compiled(NamedTuple):
    """What the plan would have launched."""

    name: str
    made: Any

    @property
    def shared(self) -> int:
        return int(self.made.metadata.shared)

    def sass(self, folder: pathlib.Path) -> str:
        """The machine code as text."""
        (folder / "kernel.cubin").write_bytes(self.made.asm["cubin"])
        tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        return subprocess.run([tool, "-sass", folder / "kernel.cubin"], capture_output=True, text=True, check=True).stdout


def _compile(kernel: Any, values: list[Any], choice: tiles.Tiles, arch: tuple[int, int]) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source: Any = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        source = GluonASTSource
    signature: dict[str, str] = {}
    constants, attributes = {}, {}
    for index, (parameter, value) in enumerate(zip(kernel.params, values)):
        # Triton compiles an integer of 1 as a constant, too.
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif hasattr(value, "block_shape"):
            signature[parameter.name] = f"tensordesc<{_TYPES[value.base.dtype]}{value.block_shape},{value.layout!r}>"
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and not parameter.do_not_specialize and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    options = {"num_warps": choice.num_warps, "num_stages": choice.num_stages, "enable_fp_fusion": True}
    return triton.compile(source(kernel, signature, constants, attributes), target=GPUTarget("cuda", arch[0] * 10 + arch[1], 32), options=options)


def launches(
    call: Call, arch: tuple[int, int], monkeypatch: pytest.MonkeyPatch, needs: Optional[Needs] = None, processors: int = 132
) -> list[Compiled]:
    """What a plan for an NVIDIA device of so many multiprocessors launches for a call on tensors of the CPU: compiled, not run. needs: of a
    backward instead."""
    found = []

    def compiling(kernel: Any, programs: int, choice: tiles.Tiles, **arguments: Any) -> launch.Launched:
        values = [arguments[name] for name in kernel.arg_names]
        found.append(Compiled(kernel.fn.__name__, _compile(kernel, values, choice, arch)))
        return launch.Launched(None, programs, values, 0.0, None)

    monkeypatch.setattr(launch, "launch", compiling)
    monkeypatch.setattr(launch, "processors", lambda device: processors)
    monkeypatch.setattr(launcher, "_on_device", lambda x: contextlib.nullcontext())
    # The problems are small; the kernels for Hopper are compiled all the same.
    first, *rest = launcher._FORWARD
    monkeypatch.setattr(launcher, "_FORWARD", (first._replace(serves=hopper.serves), *rest))
    dtype = str(call.q.dtype).removeprefix("torch.")
    device = DeviceInfo("cuda", "nvidia", arch, "a GPU that is not here")
    q, k = call.q, call.k
    problem = Problem(device, dtype, dtype, q.shape[3], call.v.shape[3], q.shape[1], k.shape[1], q.shape[0], q.shape[2], k.shape[2])
    plan = TritonBackend().prepare(problem)
    if needs is None:
        plan.forward(call)
    else:
        out = torch.empty(*q.shape[:3], call.v.shape[3], dtype=q.dtype)
        plan.backward(call, torch.empty_like(out), torch.empty(q.shape[:3]), out, torch.empty(q.shape[:3]), needs)
    return found


def qkv(length: int, dim: int, dtype: torch.dtype, v_dim: int = 0, batch: int = 2, heads: tuple[int, int] = (4, 2)) -> tuple[Tensor, Tensor, Tensor]:
    q, k = (torch.empty(batch, h, length, dim, dtype=dtype) for h in heads)
    return q, k, torch.empty(batch, heads[1], length, v_dim or dim, dtype=dtype)


BLOCKS = BlockSparse(torch.ones(1, 1, 3, 3, dtype=torch.bool), (100, 100))
DROPOUT = {"dropout_p": 0.1, "rng": torch.zeros(2, dtype=torch.int64)}
#: (compute capability, dtype, head_dim, mask, further arguments)
GENERAL = [
    ((9, 0), torch.bfloat16, 64, BLOCKS, DROPOUT),
    ((9, 0), torch.bfloat16, 576, Causal(), {}),
    ((8, 9), torch.bfloat16, 64, Causal() & SeqLens(torch.tensor([64, 64], dtype=torch.int32)), {}),
    ((8, 0), torch.float16, 64, BoolMask(torch.ones(1, 1, 256, 256, dtype=torch.bool)) & Bias(torch.zeros(1, 4, 256, 256, dtype=torch.float16)), {}),
]


@pytest.mark.parametrize(("arch", "dtype", "dim", "mask", "extra"), GENERAL)
def test_general_kernels(
    arch: tuple[int, int], dtype: torch.dtype, dim: int, mask: Mask, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them compile for the architecture, and the first tiles offered fit its shared memory."""
    call = Call(*qkv(256, dim, dtype, min(dim, 512)), mask, 0.1, **extra)
    short = Call(call.q[:, :, :1], call.k, call.v, SeqLens(torch.tensor([64, 64], dtype=torch.int32)), 0.1)
    needs = Needs(True, True, True, mask.bias is not None, False)
    made = [*launches(call, arch, monkeypatch), *launches(short, arch, monkeypatch), *launches(call, arch, monkeypatch, needs)]
    names = {c.name for c in made}
    assert names >= {"forward_kernel", "grad_kv_kernel", "grad_q_kernel", "delta_kernel"}
    assert ("grad_bias_kernel" in names) == (mask.bias is not None)
    assert ("tile_map_kernel" in names) == (mask.block_sparse is not None)
    assert not any(name.startswith("hopper") for name in names)
    for c in made:
        assert c.shared <= tiles.shared_memory("nvidia", arch), c.name


@pytest.mark.parametrize(
    ("arch", "dim", "products"),
    [
        ((9, 0), 128, ("wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3", "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16")),
        ((8, 9), 16, ("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")),
    ],
)
def test_fp8_compiles_to_products_of_its_own(arch: tuple[int, int], dim: int, products: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores come from products of fp8, outputs from products of fp16, each of the architecture's own kind."""
    q, k, v = qkv(256, dim, torch.float8_e4m3fn)
    factor = torch.empty(2, 2)
    long, *_ = launches(Call(q, k, v, Causal(), 0.1, descale=Descale(factor, factor, factor)), arch, monkeypatch)
    assert all(product in long.made.asm["ptx"] for product in products)
    for c in (long, *launches(Call(q[:, :, :1], k, v, FULL, 0.1), arch, monkeypatch)):
        assert c.shared <= tiles.shared_memory("nvidia", arch)


@pytest.mark.parametrize(
    ("arch", "mask", "fused"), [((9, 0), FULL, True), ((9, 0), Causal(), True), ((8, 0), FULL, True), ((8, 0), ALiBi(torch.ones(4)), False)], ids=str
)  # fmt: skip
def test_a_plain_score_becomes_an_exponent_by_one_multiply_add(arch: tuple[int, int], mask: Mask, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing comes between its scale and the maximum: what limits large scores, see test_triton_hard_scores.py."""
    made, *_ = launches(Call(*qkv(256, 64, torch.bfloat16), mask, 0.1), arch, monkeypatch)
    makers = {name: operation for operation, name in re.findall(r"^\s*([\w.]+)\s+(%\w+),", made.made.asm["ptx"], re.MULTILINE)}
    exponents = [makers.get(name) for name in re.findall(r"ex2\.approx[\w.]*\s+%\w+, (%\w+);", made.made.asm["ptx"])]
    assert exponents.count("fma.rn.f32") >= (0.4 * len(exponents) if fused else 0) and (fused or "fma.rn.f32" not in exponents) and len(exponents) >= 32


@pytest.mark.parametrize("page_size", [16, 48, 256])
def test_keys_in_pages_are_copied_as_far_ahead(page_size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """As many tiles on their way at a time as where keys are contiguous, in copies as wide: reading the block table is no stage of its own."""
    used = torch.ones(2, dtype=torch.int32)
    q, k, v = qkv(768, 128, torch.bfloat16)
    pages_k, pages_v = (torch.empty(2 * 768 // page_size, 2, page_size, 128, dtype=torch.bfloat16) for _ in range(2))
    table = torch.zeros(2, 768 // page_size, dtype=torch.int32)
    contiguous, *_ = launches(Call(q[:, :, :1], k, v, SeqLens(used), 0.1), (9, 0), monkeypatch)
    paged, *_ = launches(Call(q[:, :, :1], pages_k, pages_v, SeqLens(used), 0.1, block_table=table), (9, 0), monkeypatch)
    assert contiguous.name == paged.name == "forward_kernel" and paged.shared == contiguous.shared
    copies = [set(re.findall(r"LDGSTS\S*", c.sass(tmp_path))) for c in (contiguous, paged)]
    assert copies[0] == copies[1] and len(copies[0]) == 1, copies


def _ids(length: int) -> Tensor:
    return torch.zeros(2, length, dtype=torch.int32)


_PACKED = Varlen(torch.tensor([0, 100, 256], dtype=torch.int32), torch.tensor([0, 100, 256], dtype=torch.int32), 156, 156)
HOPPER: dict[str, tuple[int, int, Mask, dict[str, Any]]] = {
    "full 128": (128, 128, FULL, {}),
    "causal 64": (64, 64, Causal(), {}),
    "causal 256": (256, 256, Causal(), {}),
    "causal 192:128": (192, 128, Causal(), {}),
    "full 192": (192, 192, FULL, {}),
    "full 64:256": (64, 256, FULL, {}),
    "window 128": (128, 128, Causal() & Window(100), {"softcap": 30.0}),
    "everything 64": (
        64, 64,
        Causal() & Prefix(torch.ones(2, dtype=torch.int32)) & Segments(_ids(256)) & LeftPad(torch.ones(2, dtype=torch.int32))
        & SeqLens(torch.ones(2, dtype=torch.int32)) & ALiBi(torch.ones(4)) & BoolMask(torch.ones(1, 1, 256, 256, dtype=torch.bool))
        & Bias(torch.zeros(1, 1, 256, 256)),
        {"sinks": torch.zeros(4)},
    ),
    "packed 128": (128, 128, Causal(), {"varlen": _PACKED}),
}  # fmt: skip


@pytest.mark.parametrize("name", [name if name == "causal 64" else pytest.param(name, marks=pytest.mark.long) for name in HOPPER])
def test_hopper_kernels(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """On Hopper the plain kernels' place is taken by those with warps of their own for copies; they fit, and their products are warpgroups'."""
    dim, v_dim, mask, extra = HOPPER[name]
    packed = "varlen" in extra
    call = Call(*qkv(256, dim, torch.bfloat16, v_dim, batch=1 if packed else 2), mask, 0.1, need_lse=True, **extra)
    # A program has several tiles: the next one's are copied ahead where there is room.
    made = [*launches(call, (9, 0), monkeypatch, None, 3), *launches(call, (9, 0), monkeypatch, Needs(True, True, True, False, False), 3)]
    names = [c.name for c in made]
    assert {"hopper_forward_kernel", "hopper_grad_kv_kernel", "hopper_grad_q_kernel"} <= set(names)
    assert "delta_kernel" not in names
    for c in made:
        assert c.shared <= tiles.shared_memory("nvidia", (9, 0)), c.name
        if c.name.startswith("hopper"):
            assert "HGMMA" in c.sass(tmp_path) and "UTMALDG" in c.sass(tmp_path), c.name


@pytest.mark.parametrize(("dim", "causal"), [(128, True), *(pytest.param(*c, marks=pytest.mark.long) for c in ((64, False), (64, True), (128, False)))])
def test_hopper_loops_keep_their_state_in_registers(dim: int, causal: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """In the loop over full tiles, whose code has the fewest instructions, no sum or score is spilled and products do not wait for one another.

    A few numbers that the rest of the kernel needs (addresses, strides) may be read again from local memory.
    """
    call = Call(*qkv(4096, dim, torch.bfloat16, batch=1), Causal() if causal else FULL, 0.1, need_lse=True)
    made = [*launches(call, (9, 0), monkeypatch), *launches(call, (9, 0), monkeypatch, Needs(True, True, True, False, False))]
    checked = 0
    for c in made:
        if c.name.startswith("hopper"):
            loops = product_loops(c.sass(tmp_path))
            assert loops, c.name
            fastest = min(loops, key=len)
            assert sum(line.startswith(("LDL", "STL")) for line in fastest) <= 8, c.name
            products = sum("HGMMA" in line for line in fastest)
            waits = sum("WARPGROUP.DEPBAR" in line for line in fastest)
            assert waits <= 4 < products, f"{c.name}: {waits} waits among {products} products"
            checked += 1
    assert checked == 3


@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (128, 128), *(pytest.param(*d, marks=pytest.mark.long) for d in ((256, 256), (192, 128), (32, 32)))])
def test_fp32_runs_on_tensor_cores(dim: int, v_dim: int, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """Every product of fp32 on Hopper is one of tf32, the first tiles fit, and their fast loops spill few registers."""
    monkeypatch.setattr(arguments, "precision", lambda q, v_head_dim, lengths: "tf32x3")
    bias = Bias(torch.zeros(1, 4, 256, 256))
    q, k, v = qkv(256, dim, torch.float32, v_dim)
    made = [*launches(Call(q, k, v, Causal(), 0.1), (9, 0), monkeypatch), *launches(Call(q[:, :, :1], k, v, FULL, 0.1), (9, 0), monkeypatch)]
    made += launches(Call(q, k, v, Causal(), 0.1), (9, 0), monkeypatch, Needs(True, True, True, False, False))
    made += launches(Call(q, k, v, bias, 0.1), (9, 0), monkeypatch, Needs(False, False, False, True, False))
    names = set()
    for c in made:
        assert c.shared <= tiles.shared_memory("nvidia", (9, 0)), c.name
        sass = c.sass(tmp_path)
        if c.name not in ("combine_kernel", "delta_kernel"):
            names.add(c.name)
            products = set(re.findall(r"\bHG?MMA\.\S+", sass))
            assert products and all(p.endswith(".F32.TF32") for p in products), c.name
            loops = product_loops(sass, "MMA")
            most = max(sum("MMA" in line for line in loop) for loop in loops)
            # The loop over full tiles. That of the careful repetition, with products of 16 keys, is smaller.
            fastest = min((loop for loop in loops if 2 * sum("MMA" in line for line in loop) >= most), key=len)
            spilled = sum(line.startswith(("LDL", "STL")) for line in fastest)
            assert spilled <= 0.04 * len(fastest), f"{c.name}: {spilled} of {len(fastest)}"
    assert names == {"forward_kernel", "grad_kv_kernel", "grad_q_kernel", "grad_bias_kernel"}


def product_loops(sass: str, product: str = "HGMMA") -> list[list[str]]:
    """The innermost loops with warpgroup products (or others), as instructions without predicates."""
    code = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?(.*?);", sass)]
    place = {address: index for index, (address, _) in enumerate(code)}
    spans = []
    for index, (address, text) in enumerate(code):
        target = re.search(r"^BRA\b.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            spans.append((place[int(target[1], 16)], index))
    loops = [(lo, hi) for lo, hi in spans if any(product in text for _, text in code[lo : hi + 1])]
    inner = [(lo, hi) for lo, hi in loops if not any((lo, hi) != (a, b) and lo <= a and b <= hi for a, b in loops)]
    return [[text for _, text in code[lo : hi + 1]] for lo, hi in inner]
