"""Noise on heads that share a weight with one another, and the refusal of heads that would stay equal."""

import pytest
import torch
from conftest import SIZES
from transformers import LlamaConfig, LlamaForCausalLM

from nt_hf import NeuroTrailsForCausalLM
from nt_hf.training.initial_model import add_noise, require_different_heads


def test_noise_spares_the_first_head_and_what_it_shares():
    torch.manual_seed(0)
    stock = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    model = NeuroTrailsForCausalLM.from_stock(stock, num_ensemble_heads=3)
    with pytest.raises(ValueError, match="noise=0: the heads are equal and would stay so; accepted is more"):
        require_different_heads(model, "noise=0", "more")
    add_noise(model, 0.1, seed=0)
    require_different_heads(model, "noise=0.1", "more")
    trail = model.extract_trail(0)
    assert all(torch.equal(weight, stock.get_parameter(name)) for name, weight in trail.named_parameters())
    first, second, third = (head.layers[0].mlp.up_proj.weight for head in model.model.heads)
    assert (first != second).all() and (second != third).all()
