"""Noise that makes equal heads differ, and the refusal of heads that would stay equal."""

import pytest
import torch
from conftest import SIZES
from transformers import LlamaConfig, LlamaForCausalLM

from nt_hf import NeuroTrailsForCausalLM
from nt_hf.training.initial_model import add_noise, require_different_heads


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def stock(request):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=request.param))


def test_the_first_head_and_what_it_shares_get_none(stock):
    model = NeuroTrailsForCausalLM.from_stock(stock, num_ensemble_heads=3)
    add_noise(model, 0.1, seed=0)
    trail = model.extract_trail(0)
    assert all(torch.equal(weight, stock.get_parameter(name)) for name, weight in trail.named_parameters())
    ups = torch.stack([head.layers[0].mlp.up_proj.weight.detach() for head in model.model.heads])
    assert (ups[1:] - ups[0]).std().item() == pytest.approx(0.1 * ups[0].std().item(), rel=0.05)
    assert (ups[1] != ups[2]).all()


def test_equal_heads_are_refused(stock):
    model = NeuroTrailsForCausalLM.from_stock(stock, num_ensemble_heads=2)
    with pytest.raises(ValueError, match="noise=0: the heads are equal and would stay so; accepted is more"):
        require_different_heads(model, "noise=0", "more")
    add_noise(model, 0.1, seed=0)
    require_different_heads(model, "noise=0.1", "more")
