"""A trail in eight bits drafts for the ensemble, which decodes the same tokens in fewer passes."""

import pytest
import torch
from families import left_padded, tiny_model
from torch import nn

from nt_hf import SparsityConfig, draw_masks
from nt_hf.inference import draft_model, load_sparse
from nt_hf.inference.drafts import Int8Linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(36, 260), (64, 48), (7, 3)])
def test_a_rounded_layer_is_near_the_layer(inputs, outputs, bias):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias)
    layer.weight.data[0] = 0  # an output without weights has no scale of its own
    rounded = Int8Linear(layer)
    weight = rounded.weight[:, :inputs] * rounded.scale.float()[:, None]
    step = layer.weight.abs().amax(1, keepdim=True) / 127
    assert ((weight - layer.weight).abs() <= step * (0.5 + 127 / 256) + 1e-9).all()  # half a step; a scale's bf16
    x = torch.randn(2, 3, inputs)
    expected = x @ weight.T + (0 if layer.bias is None else layer.bias)
    y = rounded(x.to(torch.bfloat16)).float()
    assert y.shape == (2, 3, outputs)
    torch.testing.assert_close(y, expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "gpt_neox"])
def test_drafts_in_eight_bits_change_no_token(family):
    model = tiny_model(family)
    draft = draft_model(model, 1)
    layers = [layer for layer in draft.modules() if isinstance(layer, Int8Linear)]
    assert layers and not any(type(layer) is nn.Linear for layer in draft.modules())
    assert type(draft) is model.stock_class and not any(p.requires_grad for p in draft.parameters())
    batch = left_padded()
    del batch["position_ids"]
    options = {"max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    drafted = model.generate(**batch, **options, trail_draft=draft, return_dict_in_generate=True)
    assert torch.equal(drafted.sequences, model.generate(**batch, **options))
    assert sum(drafted.speculation.emitted) == 2 * 19  # the prompt's pass gave the first token of each row


def test_a_draft_needs_a_head_a_cpu_and_dense_weights(tmp_path):
    model = tiny_model("llama")
    draw_masks(model, SparsityConfig(density=0.5))
    model.save_pretrained(tmp_path, sparse=True)
    with pytest.raises(ValueError, match=r"draft_model: the weights are sparse \(load_sparse\): accepted are dense"):
        draft_model(load_sparse(tmp_path))
    with pytest.raises(ValueError, match="head"):
        draft_model(model, 3)
    with pytest.raises(ValueError, match=r"draft_model: a model on meta: accepted is a CPU"):
        draft_model(model.to("meta"))
