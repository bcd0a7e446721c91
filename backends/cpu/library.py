"""The shared library libattnhub_cpu.so and its C interface (kernels/attnhub_cpu.h), in ctypes. Torch-free."""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

ABI_VERSION = 2
FILE = "libattnhub_cpu.so"
BUILD_HINT = (
    "install a C++17 compiler and reinstall attnhub; in a checkout: "
    "cmake -S . -B build/dev -DATTNHUB_INPLACE=ON && cmake --build build/dev"
)

OK, INVALID, UNSUPPORTED, NO_MEMORY = range(4)
#: torch's dtype names -> attnhub_cpu_dtype
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
#: names of ATTNHUB_CPU_ISA -> attnhub_cpu_isa
ISAS = {"auto": 0, "portable": 1, "avx2": 2, "avx512": 3, "avx512_bf16": 4, "amx_bf16": 5, "neon": 6}
CAUSAL, TOP_LEFT = 1, 2

_Int = ctypes.c_int64
_Pointer = ctypes.c_void_p


class Mask(ctypes.Structure):
    """attnhub_cpu_mask. Zero is "absent" everywhere except for the window, whose -1 is."""

    _fields_ = (
        ("window_left", _Int), ("window_right", _Int), ("chunk", _Int),
        ("seqused_k", _Pointer), ("leftpad", _Pointer), ("prefix", _Pointer),
        ("segment_q", _Pointer), ("segment_k", _Pointer), ("segment_q_strides", _Int * 2), ("segment_k_strides", _Int * 2),
        ("block_q", _Pointer), ("block_k", _Pointer), ("block_q_strides", _Int * 2), ("block_k_strides", _Int * 2),
        ("bool_mask", _Pointer), ("bool_mask_strides", _Int * 4),
        ("bias", _Pointer), ("bias_strides", _Int * 4), ("bias_dtype", _Int),
        ("alibi", _Pointer), ("alibi_strides", _Int * 2),
        ("block_sparse", _Pointer), ("block_sparse_strides", _Int * 4), ("block_sparse_rows", _Int), ("block_sparse_keys", _Int),
        ("sinks", _Pointer),
        ("cu_seqlens_q", _Pointer), ("cu_seqlens_k", _Pointer), ("num_sequences", _Int),
        ("block_table", _Pointer), ("block_table_strides", _Int * 2), ("max_pages", _Int), ("num_pages", _Int),
    )  # fmt: skip


#: attnhub_cpu_call, packed by one call: 10 us less than 34 ctypes members. In order: abi_version, dtype, isa, flags, threads;
#: q, k, v, out, lse; batch, q_heads, kv_heads, seqlen_q, seqlen_k, head_dim, v_head_dim; strides of q, k, v, out (3 each);
#: softmax_scale, softcap; dropout_p, dropout_seed, dropout_offset; mask; parallel_for, parallel_ctx.
CALL = struct.Struct("=5q5Q7q12q2dd2QQ2Q")
#: Its parts that differ where a call is repeated: the number of threads, and behind it the addresses of q, k, v, out and lse.
THREADS, ADDRESSES, ADDRESSES_AT = struct.Struct("=q"), struct.Struct("=5Q"), 40

#: attnhub_cpu_gradients. In order: grad_out and its 3 strides, grad_lse; grad_q, grad_k, grad_v and 3 strides each; grad_bias and its 4
#: strides, grad_sinks.
GRADIENTS = struct.Struct("=Q3qQ3Q9qQ4qQ")

#: attnhub_cpu_blocks
BLOCKS = struct.Struct("=6q")


def library_path() -> Traversable:
    """Where the library lies. In an editable install that is not beside this file."""
    return importlib.resources.files("attnhub.backends.cpu") / FILE


@functools.lru_cache(maxsize=1)
def load() -> ctypes.CDLL:
    """The library. Raises OSError when it is not there or does not load, ImportError when it is of another version."""
    path = library_path()
    if not path.is_file():
        raise OSError(f"{FILE} is not there: {path}")
    lib = ctypes.CDLL(str(path))
    lib.attnhub_cpu_abi_version.restype = ctypes.c_int32
    found = lib.attnhub_cpu_abi_version()
    if found != ABI_VERSION:
        raise ImportError(f"{path} has ABI version {found}; this attnhub needs {ABI_VERSION}")
    lib.attnhub_cpu_forward.argtypes = [ctypes.c_char_p]
    lib.attnhub_cpu_forward.restype = ctypes.c_int32
    lib.attnhub_cpu_backward.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    lib.attnhub_cpu_backward.restype = ctypes.c_int32
    lib.attnhub_cpu_cut.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p]
    lib.attnhub_cpu_cut.restype = ctypes.c_int32
    lib.attnhub_cpu_last_error.restype = ctypes.c_char_p
    lib.attnhub_cpu_isa_available.argtypes = [ctypes.c_int32]
    lib.attnhub_cpu_isa_available.restype = ctypes.c_int32
    lib.attnhub_cpu_best_isa.restype = ctypes.c_int32
    return lib


class Blocks(NamedTuple):
    """How a pass is cut into tasks: attnhub_cpu_blocks."""

    block_rows: int
    block_keys: int
    splits: int
    split_keys: int
    tasks: int
    level2_bytes: int


def cut(dtype: str, isa: int, threads: int, batch: int, q_heads: int, kv_heads: int, seqlen_q: int, seqlen_k: int, head_dim: int, v_head_dim: int) -> tuple[Blocks, Blocks]:
    """The cut of the forward and of the backward of calls of these sizes. Raises ValueError for sizes that no call may have."""
    lib = load()
    call = CALL.pack(
        ABI_VERSION, DTYPES[dtype], isa, 0, threads, 0, 0, 0, 0, 0, batch, q_heads, kv_heads, seqlen_q, seqlen_k, head_dim, v_head_dim,
        *[0] * 12, 1.0, 0.0, 0.0, 0, 0, 0, 0, 0,
    )  # fmt: skip
    found = [ctypes.create_string_buffer(BLOCKS.size) for _ in range(2)]
    if lib.attnhub_cpu_cut(call, *found):
        raise ValueError(lib.attnhub_cpu_last_error().decode())
    forward, backward = (Blocks(*BLOCKS.unpack(b.raw)) for b in found)
    return forward, backward


def peak_flops(dtype: str, threads: int, isa: int = 0) -> float:
    """Operations a second that `threads` threads reach on registers alone, in the instructions that serve this dtype. Takes 20 ms."""
    function = load().attnhub_cpu_peak_flops
    function.argtypes, function.restype = [ctypes.c_int32, ctypes.c_int32, _Int], ctypes.c_double
    return float(function(isa, DTYPES[dtype], threads))


def read_rate(threads: int, size: int, huge_pages: bool = False, isa: int = 0) -> float:
    """Bytes a second that `threads` threads read from `size` bytes of memory: give several times the last cache. 0 when memory is short.

    On the pages that tensors get, or on huge ones, where Linux gives them to those who ask.
    """
    function = load().attnhub_cpu_read_rate
    function.argtypes, function.restype = [ctypes.c_int32, _Int, _Int, ctypes.c_int32], ctypes.c_double
    return float(function(isa, threads, size, huge_pages))


def isa_name(isa: int) -> str:
    """The name of an attnhub_cpu_isa."""
    return next(name for name, number in ISAS.items() if number == isa)


def available_isas() -> tuple[str, ...]:
    """The paths that this build and this processor have."""
    lib = load()
    return tuple(name for name, number in ISAS.items() if number and lib.attnhub_cpu_isa_available(number))


def resolve_isa(name: str) -> int:
    """The attnhub_cpu_isa that a name (empty: automatic) stands for here. ValueError for a name that cannot run."""
    lib = load()
    if name in ("", "auto"):
        return int(lib.attnhub_cpu_best_isa())
    if name not in ISAS:
        raise ValueError(f"ATTNHUB_CPU_ISA={name!r}: allowed are {', '.join(list(ISAS)[1:])}")
    if not lib.attnhub_cpu_isa_available(ISAS[name]):
        raise ValueError(f"ATTNHUB_CPU_ISA={name!r}: this processor or this build lacks it; it has {', '.join(available_isas())}")
    return ISAS[name]
