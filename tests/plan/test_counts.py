"""The planner's parameters and FLOPs, against real models and counted by hand."""

import pytest
import torch
from conftest import SIZES, VARIANTS
from plan_models import WIDE, run_config, sparsifier_of
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import LlamaMLP

from nt_hf import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM, SparsityConfig, draw_masks
from nt_hf.models.masks import count_active, masked_modules
from nt_hf.plan.flops import count_flops, decoding_flops, forward_flops
from nt_hf.plan.parameters import count_parameters
from nt_hf.plan.step import StepSettings, record_step

# ------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("density", [0.5, 1.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_of_the_real_model(variant, density):
    arguments, sparsity = SIZES | VARIANTS[variant], SparsityConfig(density=density)
    model = NeuroTrailsLlamaForCausalLM(NeuroTrailsLlamaConfig(**arguments))
    draw_masks(model, sparsity)
    found = count_parameters(NeuroTrailsLlamaConfig(**arguments), sparsity)

    masks = {id(module.weight): count_active(module.weight_mask) for module in masked_modules(model).values()}

    def counts(parameters) -> tuple[int, int]:
        parameters = {id(p): p for p in parameters}.values()
        return sum(p.numel() for p in parameters), sum(masks.get(id(p), p.numel()) for p in parameters)

    def as_tuple(count) -> tuple[int, int]:
        return count.total, count.active

    body = model.model
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    ids = {id(p) for p in norms}
    embeddings = [embedding.weight for embedding in model.get_embeddings()]
    wanted = {
        "embedding": embeddings,
        "backbone": [p for p in body.layers.parameters() if id(p) not in ids],
        "heads": [p for head in body.heads for p in head.layers.parameters() if id(p) not in ids],
        "LM heads": [] if model.config.tie_word_embeddings else model.lm_heads.parameters(),
        "norms": norms,
    }
    assert {name: as_tuple(count) for name, count in found.parts.items()} == {
        name: counts(parameters) for name, parameters in wanted.items()
    }
    assert as_tuple(found.all) == counts(model.parameters())
    for h, trail in enumerate(found.trails):
        head, lm_head = body.heads[h], model.lm_heads[h]
        shared = embeddings if model.config.share_embedding else []
        assert as_tuple(trail) == counts(
            [*shared, *body.layers.parameters(), *head.parameters(), *lm_head.parameters()]
        )
        assert trail.total == model.extract_trail(h).num_parameters()
    real = masked_modules(model)
    assert found.masked == sum(module.weight.numel() for module in real.values())
    assert found.packed == sum(module.weight_mask.nbytes for module in real.values())
    inactive = [t.inactive.numel() for t in sparsifier_of(model, sparsity)._tensors.values() if t.inactive is not None]
    assert (found.mobile, found.largest) == (sum(inactive), max(inactive, default=0))


def test_parameters_by_hand():
    found = count_parameters(NeuroTrailsLlamaConfig(**WIDE, masked_modules=["model.layers.*"]), SparsityConfig())
    attention, mlp, norms = 2 * 64 * 64 + 2 * 64 * 32, 3 * 64 * 96, 2 * 64  # two of four heads have keys and values
    assert {name: count.total for name, count in found.parts.items()} == {
        "embedding": 300 * 64,
        "backbone": 1 * (attention + mlp),
        "heads": 3 * 2 * (attention + mlp),
        "LM heads": 3 * 300 * 64,
        "norms": 7 * norms + 3 * 64,
    }
    assert found.masked == attention + mlp and found.mobile == 0 and set(found.densities.values()) == {1.0}
    assert found.packed == (attention + mlp) / 8
    assert found.unit == attention + mlp + norms  # a block is larger than the embedding


# ------------------------------------------------------------------------------------------------------ FLOPs


@pytest.mark.parametrize("own", [False, True], ids=["one order", "order per head"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("changes", [{}, {"num_ensemble_heads": 1}, {"blocks_in_head": 0}], ids=["3", "1", "lm_heads"])
def test_training_flops_are_those_that_pytorch_counts(changes, checkpointing, own):
    config = NeuroTrailsLlamaConfig(**WIDE | changes, attn_implementation="eager")  # counted as plain products
    model = NeuroTrailsLlamaForCausalLM(config).train()
    model._can_run_head_by_head = lambda *_: False  # which computes the same and the counter does not support
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.randint(300, (config.num_ensemble_heads, 2, 16) if own else (2, 16))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    settings = run_config(
        WIDE | changes,
        data={"sequence_length": 16, "order_per_head": str(own).lower()},
        train={"gradient_checkpointing": str(checkpointing).lower()},
    )
    flops = count_flops(settings, config, count_parameters(config, SparsityConfig()))
    # Checkpointing stops recomputing a block once it has what it needs: before the product that ends it.
    blocks = config.num_cache_layers + own * (config.num_ensemble_heads - 1) * config.num_backbone_layers
    tail = 2 * blocks * config.hidden_size * config.intermediate_size * checkpointing
    assert counter.get_total_flops() == 2 * 16 * (flops.training + flops.recomputed - tail)
    assert flops.sparse_training == flops.training


@pytest.mark.parametrize("own", [False, True], ids=["one order", "order per head"])
def test_flops_are_sums_of_products(own):
    """2 * m * n * k of every product, from the shapes of the weights alone."""
    config = NeuroTrailsLlamaConfig(**WIDE | {"head_dim": 24})
    length, widths = 10, {"q_proj": (64, 96), "k_proj": (64, 48), "v_proj": (64, 48), "o_proj": (96, 64)}
    widths |= {"gate_proj": (64, 96), "up_proj": (64, 96), "down_proj": (96, 64)}
    weights = sum(2 * length * rows * columns for rows, columns in widths.values())
    scores = 2 * (2 * 4 * length * length * 24)  # four heads: queries by keys, and shares by values
    lm_head = 2 * length * 64 * 300
    passes = 3 if own else 1
    forward = forward_flops(config, length, own)
    assert forward.total * length == (6 + passes) * (weights + scores) + 3 * lm_head
    assert forward.blocks * length == (6 + passes) * (weights + scores)
    assert forward.backbone * length == passes * (weights + scores)
    assert forward.modules["model.layers.0.mlp.up_proj"] == passes * 2 * 64 * 96
    assert forward.modules["lm_heads.1"] * length == lm_head
    decoding, cached = decoding_flops(config, length)
    assert decoding.total * length == 7 * (weights + scores) + 3 * lm_head
    assert cached == 7 * 2 * length * 2 * 24
    skipped = {"model.layers.0.mlp.up_proj": 0.25, "lm_heads.1": 0.5}
    assert forward.sparse(skipped) == forward.total - 0.75 * passes * 2 * 64 * 96 - 0.5 * lm_head / length


def test_a_model_that_asks_for_values_is_refused_in_one_line(monkeypatch):
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x if x.sum() > 0 else -x))
    config = NeuroTrailsLlamaConfig(**WIDE)
    for count in (lambda: forward_flops(config, 8), lambda: record_step(config, StepSettings(1, 8))):
        with pytest.raises(ValueError, match="NeuroTrailsLlamaForCausalLM cannot be planned: accepted are") as caught:
            count()
        assert "\n" not in str(caught.value)


def test_decoding_flops_are_those_that_pytorch_counts():
    config = NeuroTrailsLlamaConfig(**WIDE, attn_implementation="eager")
    model = NeuroTrailsLlamaForCausalLM(config).eval()
    ids = torch.randint(300, (1, 16))
    with torch.no_grad():
        cache = model(ids[:, :15], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            cache = model(ids[:, 15:], past_key_values=cache, use_cache=True).past_key_values
    flops = count_flops(
        run_config(WIDE, data={"sequence_length": 16}), config, count_parameters(config, SparsityConfig())
    )
    assert counter.get_total_flops() == flops.decoding
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert flops.cache_bytes == held / 2  # bf16 of fp32


@pytest.mark.parametrize("own", [False, True], ids=["one order", "order per head"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("grow", "dense_weight_gradients"), [("gradient", 1 / 50), ("random", 0), ("momentum", 1)])
def test_sparse_flops_count_active_weights(grow, dense_weight_gradients, tied, own):
    arguments = WIDE | {"tie_word_embeddings": tied}
    data = {"sequence_length": 32, "order_per_head": str(own).lower()}
    settings = run_config(arguments, sparsity={"density": 0.4, "grow": grow}, data=data)
    config = NeuroTrailsLlamaConfig(**arguments)
    model = NeuroTrailsLlamaForCausalLM(config)
    draw_masks(model, settings.sparsity)
    flops = count_flops(settings, config, count_parameters(NeuroTrailsLlamaConfig(**arguments), settings.sparsity))
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    active = sum(int(torch.count_nonzero(module.weight)) for module in linear)
    every = sum(module.weight.numel() for module in linear)
    attention = config.num_cache_layers * 4 * 64 * 32
    assert flops.sparse_decoding == pytest.approx(2 * active + attention, rel=1e-3)  # a weight may be 0 by chance
    if own:  # the backbone once for each head
        backbone = [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
        active += 2 * sum(int(torch.count_nonzero(module.weight)) for module in backbone)
        every += 2 * sum(module.weight.numel() for module in backbone)
        attention += 2 * config.num_backbone_layers * 4 * 64 * 32
    dense = dense_weight_gradients * 2 * (every - active)
    assert flops.sparse_training == pytest.approx(3 * (2 * active + attention) + dense, rel=1e-3)
