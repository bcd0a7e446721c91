"""flash-attn's padding helpers, and its name taken by attnhub."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pathlib
import sys
import types
from collections.abc import Iterator

import pytest
import torch

import attnhub
from attnhub.integrations import flash_attn as fa
from attnhub.integrations.flash_attn import bert_padding


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    assert not attnhub.uninstall_as_flash_attn(), "a test left it installed"
    assert "flash_attn" not in sys.modules


# -- padding -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_unpad_and_pad(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 2, 4, requires_grad=True)
    mask = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]]).to(dtype)
    packed, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask)
    assert torch.equal(packed, x[mask.bool()]) and torch.equal(packed, bert_padding.index_first_axis(x.flatten(0, 1), indices))
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [0, 3, 3, 7] and longest == 4 and used.tolist() == [3, 0, 4]
    back = bert_padding.pad_input(packed, indices, 3, 5)
    kept = mask.bool()[:, :, None, None]
    assert torch.equal(back, x * kept)
    (grad,) = torch.autograd.grad((back * torch.arange(back.numel()).view(back.shape)).sum(), x)
    assert torch.equal(grad, torch.arange(back.numel()).view(back.shape) * kept)


def test_unused_tokens_get_room_and_do_not_count() -> None:
    x = torch.arange(8.0).view(2, 4, 1)
    mask, unused = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]), torch.tensor([[0, 0, 1, 0], [0, 1, 1, 0]])
    packed, _, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask, unused)
    assert packed.flatten().tolist() == [0, 1, 2, 4, 5, 6] and cu_seqlens.tolist() == [0, 3, 6] and longest == 3 and used.tolist() == [2, 1]


def test_rows_that_hold_several_sequences() -> None:
    x = torch.arange(12.0).view(2, 6, 1)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0]])
    packed, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert packed.flatten().tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9] == indices.tolist()
    assert cu_seqlens.tolist() == [0, 2, 5, 9] and cu_seqlens.dtype == torch.int32 and longest == 4


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 3\).*\[2, 4\]"):
        bert_padding.unpad_input(torch.zeros(2, 4, 1), torch.ones(2, 3))


def test_packed_attention_is_padded_attention() -> None:
    x, mask = torch.randn(3, 6, 2, 8), torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    packed, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask)
    out = fa.flash_attn_varlen_func(packed, packed, packed, cu_seqlens, cu_seqlens, longest, longest)
    assert isinstance(out, torch.Tensor)
    want = attnhub.attention(x, x, x, attnhub.SeqLens(used), layout="bshd")
    torch.testing.assert_close(bert_padding.pad_input(out, indices, 3, 6)[mask.bool()], want[mask.bool()])  # type: ignore[index]


# -- the name ----------------------------------------------------------------------------------------------------------------------------


def test_what_callers_import_and_ask() -> None:
    with attnhub.install_as_flash_attn():
        import flash_attn  # type: ignore[import-not-found]
        from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input  # type: ignore[import-not-found]  # noqa: F401
        from flash_attn.flash_attn_interface import flash_attn_with_kvcache  # type: ignore[import-not-found]

        for name in fa.__all__:
            assert hasattr(flash_attn, name) == ("install" not in name)
        assert flash_attn.flash_attn_func is fa.flash_attn_func and flash_attn_with_kvcache is fa.flash_attn_with_kvcache
        assert flash_attn.__version__.startswith("2.") and "attnhub" in flash_attn.__version__ and flash_attn.__file__
        for name in ("flash-attn", "flash_attn", "Flash_Attn"):
            assert importlib.metadata.version(name) == flash_attn.__version__
        assert importlib.metadata.metadata("flash-attn")["Name"] == "flash-attn"
        assert "flash-attn" in importlib.metadata.packages_distributions()["flash_attn"]
        assert importlib.util.find_spec("flash_attn.bert_padding") is not None
        assert importlib.reload(flash_attn).flash_attn_func is fa.flash_attn_func
        with pytest.raises(ModuleNotFoundError, match=r"flash_attn\.layers"):
            importlib.import_module("flash_attn.layers")
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("no-such-distribution")
    assert importlib.util.find_spec("flash_attn") is None
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn")


def test_installing_twice_and_another_version() -> None:
    with attnhub.install_as_flash_attn(version="2.6.3"):
        with attnhub.install_as_flash_attn() as inner:
            assert inner.version == "2.6.3"
        assert importlib.metadata.version("flash-attn") == "2.6.3", "the inner block did not install it, so it does not uninstall it"
    attnhub.install_as_flash_attn()
    assert attnhub.uninstall_as_flash_attn() and not attnhub.uninstall_as_flash_attn()


def test_the_real_one_is_not_replaced_unasked(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    real = types.ModuleType("flash_attn")
    real.__version__ = "2.7.4"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", real)
    with pytest.raises(RuntimeError, match=r"flash_attn 2\.7\.4 is imported already.*force=True"):
        attnhub.install_as_flash_attn()
    with attnhub.install_as_flash_attn(force=True):
        assert importlib.import_module("flash_attn").flash_attn_func is fa.flash_attn_func
    assert sys.modules["flash_attn"] is real
    monkeypatch.delitem(sys.modules, "flash_attn")
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("__version__ = '2.7.4'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match=r"flash_attn is installed.*force=True"):
        attnhub.install_as_flash_attn()
    with attnhub.install_as_flash_attn(force=True):
        assert importlib.import_module("flash_attn").flash_attn_func is fa.flash_attn_func
    monkeypatch.undo()


def test_transformers_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model asked for flash_attention_2 computes by attnhub: padded prefill and greedy decoding agree with eager."""
    transformers = pytest.importorskip("transformers")
    from transformers import modeling_flash_attention_utils as utils
    from transformers.utils import import_utils

    monkeypatch.setattr(utils, "_loaded_implementation", None)
    monkeypatch.setattr(import_utils, "is_torch_cuda_available", lambda: True)
    import_utils.is_flash_attn_2_available.cache_clear()
    assert not import_utils.is_flash_attn_2_available()
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0
    )
    ids, mask = torch.randint(1, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    with attnhub.install_as_flash_attn():
        assert import_utils.is_flash_attn_2_available()
        models = [transformers.LlamaForCausalLM._from_config(config, attn_implementation=name).eval() for name in ("flash_attention_2", "eager")]
        models[0].load_state_dict(models[1].state_dict())
        found = []
        for model in models:
            with torch.no_grad():
                logits = model(ids, attention_mask=mask).logits
            found.append((logits[mask.bool()], model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)))
    assert utils._flash_varlen_fn is fa.flash_attn_varlen_func
    assert float((found[0][0] - found[1][0]).abs().max()) < 5e-6
    assert torch.equal(found[0][1], found[1][1])
    assert not import_utils.is_flash_attn_2_available()
