"""The contract between the core and a backend: `Call` (what to compute), `Plan` (how), `Backend` (whether, and at what cost)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from attnhub.capability import Capability
from attnhub.problem import Problem
from attnhub.reasons import Reason

if TYPE_CHECKING:
    from torch import Tensor

    from attnhub.layouts import Varlen
    from attnhub.mask import Mask
    from attnhub.rotary import Rotary


class Descale(NamedTuple):
    """What fp8 tensors are multiplied by to be the values that they stand for; None is 1.

    Each [B, Hk] fp32 (packed sequences: B is their number) with any strides, 0 included: one factor for a sequence and a K/V
    head, which query head h shares with K/V head h // (Hq // Hk).
    """

    q: Optional[Tensor] = None
    k: Optional[Tensor] = None
    v: Optional[Tensor] = None


class Append(NamedTuple):
    """New tokens of a call, behind those that its K/V cache holds.

    k [B, Hk, S, D], v [B, Hk, S, Dv]: any strides, any floating dtype. rotary: how keys are rotated before they are written, and the call's
    queries before they attend; None is not at all.
    """

    k: Tensor
    v: Tensor
    rotary: Optional[Rotary] = None


class Call:
    """One normalised attention call: what a plan gets. Read it; never change it.

    q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv]: views with any strides whose last is 1 (expanded, stride-0
    dimensions included; the stride of a dimension of size 1 is arbitrary).

    - Packed sequences (``varlen`` is not None): B is 1 and S is the number of tokens T; ``varlen.cu_seqlens_q/k`` [N + 1]
      int32 on the device delimit the N sequences. Mask data indexed by b is indexed by the sequence.
    - Paged K/V (``block_table`` is not None): k and v are [pages, Hk, page_size, D] and ``block_table`` [B, max_pages]
      int32 on the device gives the pages of each sequence; ``mask.seqused_k`` gives its length and is always present.
    - Both: q is packed and k, v are pages; ``varlen.cu_seqlens_k`` and ``max_seqlen_k`` mean nothing.
    - ``mask``: the normal form (`attnhub.mask.Mask`). ``softmax_scale`` is always a number. ``softcap`` 0.0 is off.
    - ``sinks``: [Hq] fp32 (fp64 for fp64 inputs) or None. ``dropout_p`` 0.0 is off; ``rng`` is int64 [2] = (seed, offset) on q's device when on.
    - ``descale``: a `Descale` with at least one factor, or None. Only with fp8 inputs (float8_e4m3fn; out is then bf16), and a backend
      that declares that dtype serves it.
    - ``deterministic``: this call alone must be bitwise repeatable, whatever torch's switch says; a feature of the problem, too.
    - ``append``: an `Append`, or None. Only plans that said yes to it (`Plan.appends`) get one. k and v are then a cache that lacks the new tokens,
      and ``mask.seqused_k`` counts without them: sequence b has S more. forward writes them behind it, in place, and does what it
      does for a cache that held them already.
    - ``need_lse``: whether forward must return lse (fp32, fp64 for fp64 inputs; natural logarithm; [B, Hq, Sq]).

    Problems of zero size (B, Sq or Sk equal to 0) never reach a plan; zero-length sequences inside a packed batch do.
    """

    __slots__ = ("append", "block_table", "descale", "deterministic", "dropout_p", "k", "mask", "need_lse", "q", "rng", "sinks", "softcap", "softmax_scale", "v", "varlen")

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        softmax_scale: float,
        softcap: float = 0.0,
        sinks: Optional[Tensor] = None,
        dropout_p: float = 0.0,
        rng: Optional[Tensor] = None,
        varlen: Optional[Varlen] = None,
        block_table: Optional[Tensor] = None,
        need_lse: bool = False,
        descale: Optional[Descale] = None,
        deterministic: bool = False,
        append: Optional[Append] = None,
    ) -> None:
        self.q = q
        self.k = k
        self.v = v
        self.mask = mask
        self.softmax_scale = softmax_scale
        self.softcap = softcap
        self.sinks = sinks
        self.dropout_p = dropout_p
        self.rng = rng
        self.varlen = varlen
        self.block_table = block_table
        self.need_lse = need_lse
        self.descale = descale
        self.deterministic = deterministic
        self.append = append


class Needs(NamedTuple):
    """Which gradients a backward has to compute."""

    q: bool = True
    k: bool = True
    v: bool = True
    bias: bool = False
    sinks: bool = False


class Gradients(NamedTuple):
    """What a backward returns: None where `Needs` is False. Shapes are those of the inputs (broadcast bias included)."""

    q: Optional[Tensor] = None
    k: Optional[Tensor] = None
    v: Optional[Tensor] = None
    bias: Optional[Tensor] = None
    sinks: Optional[Tensor] = None


#: (q, k, v), or (q, k, v, seqused_k) and (q, k, v, seqused_k, block_table) for a K/V cache, with ``append=`` an `Append` if the call had one
#: -> what `Plan.forward` returns, or None if it has to be asked this time.
Repeat = Callable[..., Optional[tuple["Tensor", Optional["Tensor"]]]]


class Plan:
    """A prepared way to serve every call of one problem class. Shape-polymorphic: grids and splits are chosen per call."""

    #: True if ``forward`` is made of differentiable torch operations, so that eager training needs no backward of ours.
    differentiable: bool = False

    def forward(self, call: Call) -> tuple[Tensor, Optional[Tensor]]:
        """(out, lse): out as made by `attnhub.layouts.empty_out`; lse only if ``call.need_lse``, else None.

        A row without keys gives out 0 and lse -inf (with a sink: lse = sink). Padding is never read into the result.
        """
        raise NotImplementedError

    def appends(self, call: Call) -> bool:
        """Whether forward takes the call with its ``append``: new tokens are then written, and rotated, in its launch.

        Where not, they are appended by torch operations first, and forward gets the call without; what the cache holds afterwards is the same
        bit for bit. Decides by metadata, reads no tensor, and may compile; the answer may differ for calls of one class.
        """
        return False

    def repeat(self, call: Call) -> Optional[Repeat]:
        """After a forward of a call without tensors but q, k, v, those that say what a K/V cache holds (`mask.seqused_k`, or it and
        ``block_table``) and those of ``append``: a shorter way to the same for others, or None.

        It is taken where they agree in shapes, strides, dtypes and device with the call's, all addresses are multiples of 16, and all
        else is as it was; of a plan that is `differentiable` in training too.
        """
        return None

    def backward(self, call: Call, grad_out: Tensor, grad_lse: Optional[Tensor], out: Tensor, lse: Tensor, needs: Needs) -> Gradients:
        """Gradients from any backend's (out, lse). ``grad_out`` may have any strides; ``grad_lse`` may be None."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What `explain` shows of the plan, asked each time: kernel, tile sizes, what compiling took."""
        return {}


class Backend:
    """One way to compute attention. Subclass it, declare, and name an instance in the entry points ``attnhub.backends``.

    Importing the module that holds the instance must not import the backend's dependencies: only ``probe`` and
    ``prepare`` may.
    """

    name: str
    capability: Capability
    #: False: chosen only by name, never automatically.
    automatic: bool = True
    #: Distribution extra that brings the dependencies, for hints: ``pip install 'attnhub[triton]'``.
    extra: str = ""

    def probe(self) -> tuple[Reason, ...]:
        """Reasons why the backend cannot run on this machine at all (imports, driver, compiler). Called once, cached."""
        return ()

    def check(self, problem: Problem) -> tuple[Reason, ...]:
        """Reasons beyond the declared capability. Pure: looks at nothing but the problem."""
        return ()

    def cost(self, problem: Problem) -> float:
        """Declared time relative to torch's scaled_dot_product_attention for this class of problem, from committed measurements."""
        return 2.0

    def prepare(self, problem: Problem) -> Plan:
        """Compile and configure. Failures raise `PrepareError` with a reason: the next backend is then tried."""
        raise NotImplementedError

    def versions(self) -> dict[str, str]:
        """Versions of what the backend uses, for `doctor`. May import; must not raise."""
        return {}


class PrepareError(RuntimeError):
    """A plan could not be made, before anything was launched."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason
