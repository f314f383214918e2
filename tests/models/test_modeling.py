"""The model: generation, trails, ensembles, losses. In fp32, on models trained for 50 steps, with left padding."""

import copy
import pickle
import weakref

import pytest
import torch
import transformers
from conftest import BLOCKS, OFFSET, PAD, SIZES, VARIANTS, draw_masks, token_ids
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from nt_hf import (
    NeuroTrailsLlamaConfig,
    NeuroTrailsLlamaForCausalLM,
    NeuroTrailsLlamaModel,
    check_masks,
)
from nt_hf.models import ensemble, losses
from nt_hf.models.masks import get_mask, masked_modules

EVERY_VARIANT = pytest.mark.parametrize("model", VARIANTS, indirect=True)
GENERATE = {
    "greedy": {},
    "eos": {"eos_token_id": ord(" ") + OFFSET},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "beams": {"num_beams": 3},
    "sampled_beams": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "static_beams": {"cache_implementation": "static", "num_beams": 2},
}


def generate(model, inputs, seed=0, **options):
    torch.manual_seed(seed)
    return model.generate(**inputs, max_new_tokens=12, **options)


def alone(prompts):
    """Each prompt by itself, without padding."""
    for ids, mask in zip(prompts["input_ids"], prompts["attention_mask"]):
        yield {"input_ids": ids[mask.bool()][None]}


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours, theirs, atol=1e-5):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


# Generation


@EVERY_VARIANT
def test_cached_greedy_decoding_equals_the_argmax_of_each_prompt_alone(model, prompts):
    cached = generate(model, prompts)[:, -12:]
    for row, inputs in enumerate(alone(prompts)):
        ids = inputs["input_ids"]
        for _ in range(12):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert cached[row].tolist() == ids[0, -12:].tolist()


@pytest.mark.parametrize("options", GENERATE.values(), ids=GENERATE)
@pytest.mark.parametrize("model", ["neurotrails", "full_ensemble", "only_lm_heads"], indirect=True)
def test_cached_decoding_equals_uncached(model, prompts, options):
    uncached = {key: value for key, value in options.items() if key != "cache_implementation"}
    assert torch.equal(generate(model, prompts, **options), generate(model, prompts, use_cache=False, **uncached))


def test_the_prompts_are_continued_in_different_ways(model, prompts):
    # Else the tests of equal tokens would prove little.
    assert len({tuple(row[-12:].tolist()) for row in generate(model, prompts, do_sample=True, temperature=1.5)}) == 3


@EVERY_VARIANT
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_a_cache_has_one_slot_a_block(model, prompts, options):
    outputs = generate(model, prompts, return_dict_in_generate=True, **options)
    assert len(outputs.past_key_values.layers) == model.config.num_cache_layers
    assert len(model(**prompts, use_cache=True).past_key_values.layers) == model.config.num_cache_layers


# Transformers 5.17 cannot shorten a cache some of whose slots were never filled.
OLD_CACHE = pytest.mark.skipif(transformers.__version__.startswith("5.17."), reason="stock limit of Transformers 5.17")


@pytest.mark.parametrize("heads", [None, pytest.param([2], marks=OLD_CACHE)])
def test_prompt_lookup_gives_the_same_tokens(model, prompts, heads):
    for inputs in alone(prompts):
        quick = generate(model, inputs, active_heads=heads, prompt_lookup_num_tokens=3)
        assert torch.equal(quick, generate(model, inputs, active_heads=heads))


def test_a_trail_as_draft_model_gives_the_same_tokens(model, prompts):
    for inputs in alone(prompts):
        quick = generate(model, inputs, assistant_model=model.extract_trail(1))
        assert torch.equal(quick, generate(model, inputs))


@pytest.mark.parametrize("mode", ["logits", "probs"])
@pytest.mark.parametrize("heads", [None, [1], [2, 0]])
def test_cached_logits_equal_uncached_ones(model, prompts, heads, mode):
    model.config.ensemble_mode = mode
    whole = model(**prompts, active_heads=heads, output_head_logits=True)
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    cache, steps = None, []
    for stop in range(1, ids.shape[1] + 1):
        step = model(
            ids[:, stop - 1 : stop], attention_mask=mask[:, :stop], past_key_values=cache, active_heads=heads,
            use_cache=True, output_head_logits=True,
        )  # fmt: skip
        cache = step.past_key_values
        steps.append(step)
    real = mask.bool()
    for name, dim in (("logits", 1), ("head_logits", 2)):
        torch.testing.assert_close(
            torch.cat([step[name] for step in steps], dim)[..., real, :],
            whole[name][..., real, :],
            atol=1e-5,
            rtol=1e-5,
        )


@EVERY_VARIANT
def test_a_left_padded_batch_equals_each_prompt_alone(model, prompts):
    together = model(**prompts, output_head_logits=True).head_logits
    for row, inputs in enumerate(alone(prompts)):
        single = model(**inputs, output_head_logits=True).head_logits[:, 0]
        torch.testing.assert_close(together[:, row, -single.shape[1] :], single, atol=1e-5, rtol=1e-5)


def test_logits_to_keep_and_inputs_embeds(model, prompts):
    whole = model(**prompts).logits
    torch.testing.assert_close(model(**prompts, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(**prompts, logits_to_keep=torch.tensor([3, 5])).logits, whole[:, [3, 5]])
    embeds = model.get_input_embeddings()(prompts["input_ids"])
    torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=prompts["attention_mask"]).logits, whole)
    with pytest.raises(ValueError, match="exactly one of input_ids, inputs_embeds and backbone_states"):
        model(**prompts, inputs_embeds=embeds)


@pytest.mark.parametrize("heads", [[], [3], [-1], [0, 0], 1, ["0"], [0.0], "01"])
def test_impossible_active_heads_are_one_clear_line(model, prompts, heads):
    with pytest.raises(ValueError, match=r"active_heads=.*accepted.*0 to 2") as error:
        model(**prompts, active_heads=heads)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model", ["no_backbone"], indirect=True)
def test_without_a_backbone_a_cache_needs_head_0(model, prompts):
    with pytest.raises(ValueError, match=r"active_heads=\[1\].*use_cache=False"):
        generate(model, prompts, active_heads=[1])
    assert torch.equal(
        generate(model, prompts, active_heads=[1], use_cache=False),
        generate(model.extract_trail(1), prompts),
    )


# Trails


@EVERY_VARIANT
def test_each_trail_is_a_stock_llama_with_the_same_logits(model, prompts):
    head_logits = model(**prompts, output_head_logits=True).head_logits
    for head, logits in enumerate(head_logits):
        trail = model.extract_trail(head)
        assert type(trail) is LlamaForCausalLM
        assert torch.equal(trail(**prompts).logits, logits)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
def test_generation_with_one_head_is_the_trails(model, prompts, options):
    for head in range(3):
        ours = generate(model, prompts, active_heads=[head], **options)
        assert torch.equal(ours, generate(model.extract_trail(head), prompts, **options))


def test_the_heads_of_a_trained_model_differ(model, prompts):
    first, second, third = model(**prompts, output_head_logits=True).head_logits
    assert min((a - b).abs().max() for a, b in ((first, second), (second, third), (first, third))) > 0.1


def test_a_trail_is_a_copy_that_saves_and_loads_as_llama(model, prompts, tmp_path):
    model.generation_config.update(do_sample=True, temperature=0.7)
    trail = model.extract_trail(2)
    assert trail.training == model.training and trail.generation_config.temperature == 0.7
    trail.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**prompts).logits, model(**prompts, active_heads=[2]).logits)
    trail.generation_config.temperature = 0.1
    nn.init.zeros_(trail.lm_head.weight)
    assert model.generation_config.temperature == 0.7 and model.lm_heads[2].weight.any()


def stock_llama(**changes):
    torch.manual_seed(1)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, **changes)).eval()
    for parameter in llama.parameters():  # Zero biases and equal norms would hide errors.
        nn.init.normal_(parameter, std=0.3)
    return llama


LLAMAS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}},
    "head_dim": {"head_dim": 8},
}


@pytest.mark.parametrize("llama", LLAMAS.values(), ids=LLAMAS)
@pytest.mark.parametrize(
    "options",
    [
        {"blocks_in_head": 2},
        {"blocks_in_head": 0},
        {"blocks_in_head": 3},
        {"blocks_in_head": 3, "share_embedding": False},
    ],
    ids=["backbone", "only_lm_heads", "no_backbone", "full_ensemble"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_stock_is_exact_and_so_is_the_way_back(llama, options, dtype, prompts, tmp_path):
    stock_llama(**llama).to(dtype).save_pretrained(tmp_path)
    llama = LlamaForCausalLM.from_pretrained(tmp_path)
    model = NeuroTrailsLlamaForCausalLM.from_stock(llama, num_ensemble_heads=2, masked_modules=["*"], **options)
    expected = llama(**prompts).logits
    for logits in model(**prompts, output_head_logits=True).head_logits:
        assert torch.equal(logits, expected)
    assert torch.equal(model.extract_trail(1)(**prompts).logits, expected)
    assert model.extract_trail(1).state_dict().keys() == llama.state_dict().keys()
    assert model.dtype == dtype and model.training == llama.training and not check_masks(model)
    assert model.config.to_stock_config().to_diff_dict() == {
        key: value for key, value in llama.config.to_diff_dict().items() if key != "architectures"
    }


def test_from_stock_keeps_its_own_generation_config():
    llama = stock_llama()
    llama.generation_config = GenerationConfig(temperature=0.6, do_sample=True)
    model = NeuroTrailsLlamaForCausalLM.from_stock(llama, blocks_in_head=1)
    assert model.generation_config.temperature == 0.6
    model.generation_config.temperature = 0.1
    assert llama.generation_config.temperature == 0.6


@pytest.mark.parametrize("tied", [False, True])
def test_llamas_trained_apart_become_a_full_ensemble(tied, prompts, tmp_path):
    llamas = [stock_llama(tie_word_embeddings=tied) for _ in range(3)]
    for index, llama in enumerate(llamas):
        llama.load_state_dict({name: value * (1 + index / 10) for name, value in llama.state_dict().items()})
    NeuroTrailsLlamaForCausalLM.from_stocks(llamas, ensemble_mode="probs").save_pretrained(tmp_path)
    model = NeuroTrailsLlamaForCausalLM.from_pretrained(tmp_path)
    output = model(**prompts, output_head_logits=True)
    assert torch.equal(output.head_logits, torch.stack([llama(**prompts).logits for llama in llamas]))
    mean = torch.stack([logits.softmax(-1) for logits in output.head_logits]).mean(0)
    torch.testing.assert_close(output.logits.softmax(-1), mean)


def test_llamas_of_different_shapes_are_no_ensemble():
    with pytest.raises(ValueError, match=r"^stocks=\[\]: accepted are one or more$"):
        NeuroTrailsLlamaForCausalLM.from_stocks([])
    llamas = [stock_llama(), stock_llama(), stock_llama(rms_norm_eps=1e-3)]
    with pytest.raises(ValueError, match=r"^stocks\[2\]: rms_norm_eps must be as in the first$"):
        NeuroTrailsLlamaForCausalLM.from_stocks(llamas)


# Ensembles


@pytest.mark.parametrize("heads", [[0, 1, 2], [1], [2, 0]])
def test_ensembles_follow_their_formulas(model, prompts, heads):
    each = model(**prompts, output_head_logits=True).head_logits[heads].double()
    expected = {"logits": each.mean(0), "probs": each.softmax(-1).mean(0).log()}
    for mode, logits in expected.items():
        model.config.ensemble_mode = mode
        ours = model(**prompts, active_heads=heads).logits
        torch.testing.assert_close(ours.double(), logits, atol=1e-5, rtol=1e-5)


def test_an_unknown_ensemble_mode_is_an_error(model, prompts):
    model.config.ensemble_mode = "vote"
    with pytest.raises(ValueError, match="ensemble_mode='vote': accepted are logits, probs"):
        model(**prompts)


def test_mean_probabilities_do_not_overflow():
    heads = [torch.tensor([1e4, 0.0, -1e4]), torch.tensor([0.0, 1e4, -1e4])]
    expected = torch.tensor([0.5, 0.5, 0.0]).log()
    torch.testing.assert_close(ensemble.combine_logits(heads, "probs")[:2], expected[:2])


# Losses


@pytest.fixture(params=["at once", "again"])
def kernel(request, monkeypatch):
    """Gradients computed along with the loss, or from logits that are computed again; in chunks of 7 positions."""
    if request.param == "again":
        monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    monkeypatch.setattr(losses, "LOSS_CHUNK", {"cpu": 7})


def reference_losses(model, batch, **options):
    """Each head's loss as the stock ``LlamaForCausalLM`` computes it, from all logits at once."""
    head_logits = model(batch["input_ids"], output_head_logits=True, use_cache=False).head_logits
    size = model.config.vocab_size
    return torch.stack([model.loss_function(logits, batch["labels"], size, **options) for logits in head_logits])


@pytest.mark.parametrize("items", [None, 31, torch.tensor(31)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@EVERY_VARIANT
def test_losses_and_gradients_are_the_stock_ones(model, batch, items, mode, kernel):
    model.train(mode == "train")
    expected = reference_losses(model, batch, num_items_in_batch=items)
    expected.mean().backward()
    expected_grads = grads(model)
    model.zero_grad()
    outputs = model(**batch, num_items_in_batch=items)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.head_losses, expected)
    torch.testing.assert_close(outputs.loss, expected.mean())
    assert_close(grads(model), expected_grads)
    assert (outputs.logits is None) == (mode == "train")


def test_ignored_labels_do_not_matter(model, batch, kernel):
    batch["labels"][:] = -100
    batch["labels"][1, 1:4] = batch["input_ids"][1, 1:4]  # All other chunks are empty.
    torch.testing.assert_close(model(**batch).head_losses, reference_losses(model, batch))
    batch["labels"][:] = -100
    assert model(**batch).loss.isnan()  # A mean over nothing, as in LlamaForCausalLM.
    outputs = model(**batch, num_items_in_batch=5)
    outputs.loss.backward()
    assert outputs.loss == 0 and not any(grad.any() for grad in grads(model).values())


def test_active_heads_choose_the_losses(model, batch):
    losses = model(**batch).head_losses
    outputs = model(**batch, active_heads=[2, 0])
    torch.testing.assert_close(outputs.head_losses, losses[[2, 0]])
    torch.testing.assert_close(outputs.loss, losses[[2, 0]].mean())


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_bf16_losses_are_summed_in_fp32(model, batch, autocast, kernel):
    model = model if autocast else model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = reference_losses(model, batch)
        expected.mean().backward()
        expected_grads = grads(model)
        model.zero_grad()
        outputs = model(**batch)
    outputs.loss.backward()
    assert outputs.head_losses.dtype == torch.float32
    torch.testing.assert_close(outputs.head_losses, expected, atol=1e-5, rtol=1e-5)
    for name, grad in grads(model).items():
        assert (grad - expected_grads[name]).norm() <= 0.02 * expected_grads[name].norm(), name


class Adapter(nn.Module):
    """What an adapter library puts in an LM head's place."""

    def __init__(self, base, hidden_size, vocab_size):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(hidden_size, 2, bias=False), nn.Linear(2, vocab_size, bias=False)

    def forward(self, hidden):
        return self.base(hidden) + self.up(self.down(hidden))


def test_an_adapter_on_an_lm_head_counts_in_the_loss(model, batch, kernel):
    plain = model(**batch).head_losses
    model.lm_heads[1] = Adapter(model.lm_heads[1], SIZES["hidden_size"], SIZES["vocab_size"])
    adapted = model.train()(**batch)
    adapted.loss.backward()
    assert adapted.head_losses[0] == plain[0] and (adapted.head_losses[1] - plain[1]).abs() > 1e-3
    torch.testing.assert_close(adapted.head_losses, reference_losses(model, batch))
    assert model.lm_heads[1].up.weight.grad.any()


def largest_allocation(function):
    """Bytes of the largest block of memory that ``function`` asks for, inside of fused kernels too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    return max(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")


@pytest.mark.parametrize("head", ["plain", "adapter"])
def test_training_never_holds_the_logits(model, batch, head, kernel, monkeypatch):
    if head == "adapter":
        model.lm_heads[0] = Adapter(model.lm_heads[0], SIZES["hidden_size"], SIZES["vocab_size"])
    model.train()
    logits = batch["labels"].numel() * SIZES["vocab_size"] * 4

    def step():
        model(**batch, use_cache=False).loss.backward()

    assert largest_allocation(step) < logits / 2
    monkeypatch.setattr(losses, "LOSS_CHUNK", {"cpu": 1000})
    assert largest_allocation(step) >= logits  # The measure does see the logits where they exist.


@pytest.mark.parametrize("head", ["plain", "adapter"])
def test_no_logits_are_kept_for_the_backward_pass(model, batch, head, kernel):
    if head == "adapter":
        model.lm_heads[0] = Adapter(model.lm_heads[0], SIZES["hidden_size"], SIZES["vocab_size"])

    def kept(function):
        widths = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: widths.append(t.shape[-1:]) or t, lambda t: t):
            function()
        return (SIZES["vocab_size"],) in widths

    assert not kept(lambda: model.train()(**batch))
    assert kept(lambda: reference_losses(model, batch))  # The hooks do see logits.


# One head after another


def usual_order(model):
    """Forces the passes into their usual order, all forward and then all backward, as a hook does."""
    next(model.model.heads[0].parameters()).register_hook(lambda grad: grad)
    return model


@EVERY_VARIANT
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_gradients_head_by_head_are_those_of_the_usual_order(model, batch, autocast):
    other = usual_order(copy.deepcopy(model))
    results = []
    for each in (model.train(), other.train()):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = each(**batch, num_items_in_batch=50)
        (3 * outputs.loss).backward()
        results.append((outputs.head_losses.detach(), grads(each)))
    assert torch.equal(results[0][0], results[1][0])
    if not autocast:
        assert_close(results[0][1], results[1][1])
    # The loss's factor comes before or after bf16's rounding.
    for name, grad in results[0][1].items():
        assert (grad - results[1][1][name]).norm() <= 0.02 * results[1][1][name].norm(), name


@EVERY_VARIANT
@pytest.mark.parametrize("order", ["head by head", "usual"])
def test_each_head_can_have_a_batch_of_its_own(model, order):
    """As if each head were trained alone on its own, all with the same weight."""
    ids = torch.randint(model.config.vocab_size, (model.config.num_ensemble_heads, 2, 9))
    labels = ids.clone()
    labels[0, 0, 4:] = -100
    model.train()
    alone = [model(i, labels=y, active_heads=[h]).loss for h, (i, y) in enumerate(zip(ids, labels))]
    torch.stack(alone).mean().backward()
    expected = grads(model)
    model.zero_grad()
    outputs = (model if order == "head by head" else usual_order(model))(ids, labels=labels)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.head_losses, torch.stack(alone))
    assert_close(grads(model), expected)


def test_batches_of_their_own_have_no_ensemble(model):
    ids = torch.zeros(3, 2, 5, dtype=torch.long)
    for bad in ({"labels": ids, "output_head_logits": True}, {"labels": ids[0]}, {}):
        with pytest.raises(ValueError, match="labels of the same shape, in training mode"):
            model.train()(ids, **bad)
    with pytest.raises(ValueError, match="in training mode"):
        model.eval()(ids, labels=ids)
    model.train()
    for bad in ({"use_cache": True}, {"attention_mask": torch.ones_like(ids)}, {"active_heads": [0, 1]}):
        with pytest.raises(ValueError, match=r"shape \(3, 2, 5\), a batch for each head: accepted are \[[23] active"):
            model(ids, labels=ids, **bad)


def test_frozen_parts_have_no_gradients_head_by_head(model, batch):
    for frozen in (model.model.layers, model.model.embed_tokens, model.model.heads[1]):
        frozen.requires_grad_(False)
    other = usual_order(copy.deepcopy(model))
    for each in (model.train(), other.train()):
        each(**batch).loss.backward()
    assert_close(grads(model), grads(other))
    assert not any(name.startswith(("model.layers", "model.heads.1")) for name in grads(model))


@pytest.mark.parametrize("order", ["head by head", "usual"])
def test_a_heads_activations_are_gone_when_the_next_head_runs(model, batch, order):
    if order == "usual":
        usual_order(model)
    alive = []

    def count(module, args):
        counts.append(sum(reference() is not None for reference in alive))

    counts = []
    for head in model.model.heads:
        head.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, args: alive.append(weakref.ref(args[0])))
        head.layers[0].register_forward_pre_hook(count)
    model.train()(**batch).loss.backward()
    assert counts == ([0, 0, 0] if order == "head by head" else [0, 1, 2])


def test_what_needs_the_whole_graph_gets_it(model, batch):
    outputs = model.train()(**batch, output_hidden_states=True)
    states = outputs.hidden_states
    (outputs.loss + sum(state.square().mean() for state in states)).backward()
    expected = grads(model)
    assert all(state.requires_grad for state in states[1:])
    model.zero_grad()
    outputs = model(**batch, use_cache=True)
    assert outputs.past_key_values is not None
    outputs.loss.backward()
    assert any((grads(model)[name] - grad).abs().max() > 1e-6 for name, grad in expected.items())


@pytest.mark.parametrize("order", ["head by head", "usual"])
def test_a_loss_goes_backward_once(model, batch, order):
    if order == "usual":
        usual_order(model)
    loss = model.train()(**batch).loss
    loss.backward()
    with pytest.raises(RuntimeError, match=r"gone backward already|backward through the graph a second time"):
        loss.backward()


# What any Transformers model does


def test_sdpa_equals_eager_attention(model, prompts):
    outputs = {}
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        outputs[name] = model(**prompts).logits[prompts["attention_mask"].bool()]
    torch.testing.assert_close(outputs["sdpa"], outputs["eager"], atol=1e-5, rtol=1e-5)
    assert not torch.equal(outputs["sdpa"], outputs["eager"])  # Else the switch did nothing.


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(model, batch, reentrant):
    calls = []
    for layers in (model.model.layers, model.model.heads[1].layers):
        layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model.train()(**batch).loss.backward()
    expected, plain_calls = grads(model), len(calls)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model(**batch).loss.backward()
    assert len(calls) - plain_calls == 2 * plain_calls
    assert_close(grads(model), expected)


@EVERY_VARIANT
def test_return_dict_false_gives_the_values_in_order(model, batch):
    outputs = model(**batch, use_cache=False, output_head_logits=True)
    as_tuple = model(**batch, use_cache=False, output_head_logits=True, return_dict=False)
    assert type(as_tuple) is tuple and list(outputs) == ["loss", "logits", "head_losses", "head_logits"]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(as_tuple, outputs.values(), strict=True))


@EVERY_VARIANT
def test_hidden_states_and_attentions_are_the_trails(model, prompts):
    model.set_attn_implementation("eager")
    config = model.config
    asked = {"output_hidden_states": True, "output_attentions": True}
    ours = model(**prompts, **asked)
    shared, own = config.num_backbone_layers, config.blocks_in_head
    assert len(ours.attentions) == config.num_cache_layers
    assert len(ours.hidden_states) == len(ours.attentions) + 1
    for head in range(config.num_ensemble_heads):
        trail = model.extract_trail(head)(**prompts, **asked)
        blocks = [*range(shared), *range(shared + head * own, shared + (head + 1) * own)]
        for block, attention in zip(blocks, trail.attentions, strict=True):
            assert torch.equal(ours.attentions[block], attention)
        *hidden_states, normalised = trail.hidden_states[1:]
        for block, hidden in zip(blocks[:-1], hidden_states, strict=True):
            assert torch.equal(ours.hidden_states[block + 1], hidden)
        # The stock model puts the normalised hidden state in the last one's place.
        assert torch.equal(model.model.heads[head].norm(ours.hidden_states[blocks[-1] + 1]), normalised)
    assert torch.equal(ours.hidden_states[0], model.get_input_embeddings()(prompts["input_ids"]))


@pytest.mark.parametrize("rows", [250, 270])
@pytest.mark.parametrize("model", ["neurotrails", "full_ensemble", "only_lm_heads", "tied"], indirect=True)
def test_resizing_reaches_every_head_and_mask(model, rows, prompts, batch, tmp_path):
    keep = min(rows, SIZES["vocab_size"])
    before = model(**prompts, output_head_logits=True).head_logits.detach()
    old_masks = {name: get_mask(module) for name, module in masked_modules(model).items()}
    tables = [*model.get_embeddings(), *model.lm_heads]
    model.resize_token_embeddings(rows)
    assert {len(table.weight) for table in [*model.get_embeddings(), *model.lm_heads]} == {rows}
    assert all(new is old for new, old in zip([*model.get_embeddings(), *model.lm_heads], tables))
    assert all(module.out_features == rows for module in model.lm_heads)
    assert all(module.num_embeddings == rows for module in model.get_embeddings())
    assert model.config.vocab_size == model.vocab_size == rows and not check_masks(model)
    for name, module in masked_modules(model).items():
        mask, old = get_mask(module), old_masks[name]
        kept = min(len(mask), len(old))
        assert torch.equal(mask[:kept], old[:kept]) and mask[kept:].all()
    after = model(**prompts, output_head_logits=True).head_logits.detach()
    assert after.shape[-1] == rows
    torch.testing.assert_close(after[..., :keep], before[..., :keep])
    model.train()(input_ids=batch["input_ids"] % 200, labels=batch["labels"].clamp(max=200)).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval().save_pretrained(tmp_path)
    loaded = NeuroTrailsLlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**prompts, output_head_logits=True).head_logits, after)


def test_resizing_to_a_multiple(model):
    model.resize_token_embeddings(261, pad_to_multiple_of=64)
    assert {len(m.weight) for m in (*model.get_embeddings(), *model.lm_heads)} == {320} == {model.config.vocab_size}


@pytest.mark.parametrize("model", ["tied", "tied_full_ensemble"], indirect=True)
def test_tied_heads_share_their_embedding(model, prompts, batch, tmp_path):
    def tied(model):
        embeddings = model.get_embeddings() * (1 if len(model.get_embeddings()) > 1 else len(model.lm_heads))
        return all(head.weight is table.weight for head, table in zip(model.lm_heads, embeddings, strict=True))

    model.save_pretrained(tmp_path)
    loaded = NeuroTrailsLlamaForCausalLM.from_pretrained(tmp_path)
    assert tied(model) and tied(copy.deepcopy(model)) and tied(loaded)
    assert list(masked_modules(loaded)) == list(masked_modules(model))
    assert not any("lm_head" in name for name in masked_modules(loaded))  # One mask, on the owner.
    assert torch.equal(loaded(**prompts).logits, model(**prompts).logits)
    loaded.resize_token_embeddings(280)
    assert tied(loaded)


@EVERY_VARIANT
@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_saving_and_loading_is_bit_exact(model, prompts, shard, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "40KB")
    loaded, info = NeuroTrailsLlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)
    assert all(state[key].dtype == torch.uint8 for key in state if key.endswith("weight_mask"))
    assert torch.equal(loaded(**prompts).logits, model(**prompts).logits)
    assert not loaded.training and torch.equal(generate(loaded, prompts), generate(model, prompts))


def test_the_auto_classes_know_the_model(model, prompts, tmp_path):
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is NeuroTrailsLlamaConfig
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is NeuroTrailsLlamaForCausalLM
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is NeuroTrailsLlamaModel
    assert torch.equal(base(**prompts).last_hidden_state, model.model(**prompts).last_hidden_state)
    assert len(masked_modules(base)) == len(masked_modules(model))


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}])
def test_loading_with_a_device_map(model, prompts, options, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = NeuroTrailsLlamaForCausalLM.from_pretrained(tmp_path, **options)
    assert torch.equal(loaded(**prompts).logits, model(**prompts).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_half_precision_keeps_masks_and_trails(model, prompts, dtype, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = NeuroTrailsLlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    for name, module in masked_modules(loaded).items():
        expected = masked_modules(model)[name].weight_mask
        assert module.weight_mask.dtype == torch.uint8 and torch.equal(module.weight_mask, expected)
    logits = loaded(**prompts, output_head_logits=True).head_logits
    assert torch.equal(loaded.extract_trail(1)(**prompts).logits, logits[1])


def test_a_model_cast_after_loading_still_equals_its_trails(model, prompts):
    model = model.bfloat16()
    logits = model(**prompts, output_head_logits=True).head_logits
    assert torch.equal(model.extract_trail(1)(**prompts).logits, logits[1])


def test_copies_and_pickles_are_equal_and_independent(model, prompts):
    expected = model(**prompts).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied = other.state_dict()
        assert all(torch.equal(copied[name], tensor) for name, tensor in model.state_dict().items())
        assert torch.equal(other(**prompts).logits, expected)
        nn.init.zeros_(other.lm_heads[0].weight)
        assert not torch.equal(other(**prompts).logits, expected)
        assert torch.equal(model(**prompts).logits, expected)


def test_the_meta_device_holds_the_model_without_memory():
    with torch.device("meta"):
        model = NeuroTrailsLlamaForCausalLM(NeuroTrailsLlamaConfig(**SIZES, **VARIANTS["neurotrails"]))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert check_masks(model) == []


def test_trainer_lowers_the_loss_and_evaluates(model, tmp_path):
    torch.manual_seed(0)
    config = NeuroTrailsLlamaConfig(**SIZES, **VARIANTS["neurotrails"])
    model = NeuroTrailsLlamaForCausalLM(config)
    draw_masks(model)
    rows = [{"input_ids": row, "labels": row} for row in token_ids()[: 40 * 32].view(40, 32)]
    arguments = TrainingArguments(
        tmp_path, max_steps=20, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-2,
        logging_steps=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, max_grad_norm=0.0,
    )  # fmt: skip
    seen = {}

    def metrics(prediction):
        seen["shape"] = prediction.predictions.shape  # The logits alone.
        return {}

    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:6], compute_metrics=metrics)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # Summed over the two micro-batches, not averaged, the first loss would be twice as high.
    assert losses[0] == pytest.approx(before, rel=0.05)
    assert trainer.evaluate()["eval_loss"] < before - 1
    assert seen["shape"] == (6, 32, SIZES["vocab_size"])


# What can be wrong with a checkpoint


def edit(directory, change):
    """Rewrites a checkpoint's tensors as ``change`` changes them."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


MASK_KEY = "model.heads.1.layers.0.mlp.up_proj.weight_mask"
WEIGHT_KEY = MASK_KEY.removesuffix("_mask")


@pytest.mark.parametrize("lost", ["all", "one"])
@pytest.mark.parametrize("loader", [NeuroTrailsLlamaForCausalLM, AutoModel, AutoModelForCausalLM])
def test_masks_that_a_checkpoint_lacks_are_dense(model, prompts, lost, loader, tmp_path):
    model.save_pretrained(tmp_path)
    edit(tmp_path, lambda t: [t.pop(k) for k in list(t) if k == MASK_KEY or (lost == "all" and "weight_mask" in k)])
    # Memory that was not initialised is often zero, or what was there before: fill some of it.
    garbage = [torch.full((4000,), 0xAA, dtype=torch.uint8) for _ in range(50)]
    del garbage
    loaded = loader.from_pretrained(tmp_path)
    trunk = getattr(loaded, "model", loaded)
    for name, module in masked_modules(trunk).items():
        if lost == "all" or f"model.{name}" == WEIGHT_KEY:
            assert get_mask(module).all(), name
        else:
            assert not get_mask(module).all(), name
    assert len(masked_modules(trunk)) == len(masked_modules(model)) and not check_masks(trunk)


def test_a_checkpoint_that_violates_its_masks_is_an_error(model, prompts, tmp_path):
    model.save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors[WEIGHT_KEY].fill_(1.0))
    with pytest.raises(ValueError, match="outside their masks") as error:
        NeuroTrailsLlamaForCausalLM.from_pretrained(tmp_path)
    message = str(error.value)
    assert WEIGHT_KEY in message and str(tmp_path) in message and "\n" not in message
    # The way out that the message names.
    loaded = NeuroTrailsLlamaForCausalLM.from_pretrained(tmp_path, masked_modules=[])
    assert "masked_modules=[]" in message and loaded(**prompts).logits.isfinite().all()


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda t: t.pop(WEIGHT_KEY), WEIGHT_KEY),
        (lambda t: [t.pop(key) for key in list(t) if key.startswith("lm_heads")], "lacks 3 weights.*lm_heads.0.weight"),
        (lambda t: t[MASK_KEY].fill_(0xFF), "padding bits"),
        (lambda t: t.update({MASK_KEY: t[MASK_KEY][:, :-1].clone()}), MASK_KEY),
        (lambda t: t.update({WEIGHT_KEY: t[WEIGHT_KEY][:-1].clone()}), WEIGHT_KEY),
    ],
    ids=["a missing weight", "missing heads", "padding bits", "mask shape", "weight shape"],
)
def test_a_broken_checkpoint_is_an_error_that_names_it(model, change, match, tmp_path):
    model.save_pretrained(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=match) as error:
        NeuroTrailsLlamaForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("loader", [NeuroTrailsLlamaForCausalLM, AutoModelForCausalLM])
def test_a_truncated_checkpoint_is_an_error_that_names_it(model, loader, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="truncated") as error:
        loader.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_foreign_checkpoint_is_an_error_that_names_it(model, tmp_path):
    stock_llama().save_pretrained(tmp_path)
    for loader in (NeuroTrailsLlamaForCausalLM, NeuroTrailsLlamaConfig):
        with pytest.raises(ValueError, match=r"model_type='llama'.*from_stock") as error:
            loader.from_pretrained(tmp_path)
        assert str(tmp_path) in str(error.value)
    model.config.save_pretrained(tmp_path)  # Our config beside a stock Llama's weights.
    with pytest.raises(ValueError, match=r"lacks .* weights") as error:
        NeuroTrailsLlamaForCausalLM.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_pattern_that_fits_no_weight_is_an_error():
    with pytest.raises(ValueError, match=r"model\.layer\.\* fits none|'model\.layer\.\*'"):
        NeuroTrailsLlamaForCausalLM(NeuroTrailsLlamaConfig(**SIZES, masked_modules=["model.layer.*"]))


def test_the_padding_row_stays_trainable_like_llamas(model, prompts):
    assert model.get_input_embeddings().padding_idx == PAD == model.extract_trail(0).model.embed_tokens.padding_idx


def test_masked_modules_follow_the_configured_patterns(model):
    assert model.config.masked_modules == BLOCKS
    assert set(masked_modules(model)) == {
        name
        for name, p in model.named_parameters()
        if p.dim() == 2 and name.startswith(("model.layers", "model.heads"))
    }
