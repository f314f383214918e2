"""Multi-head models of many families: everything that a Llama has."""

import copy
import gc
import math
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from families import (
    BLOCKS_IN_HEAD,
    DEPTH,
    HEADS,
    Parity,
    all_families,
    left_padded,
    outcome,
    parity,
    tiny_config,
    tiny_model,
    tokens,
)
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

import nt_hf
from nt_hf import NeuroTrailsForCausalLM
from nt_hf.models.auto import DECODERS, class_of_family
from nt_hf.models.modeling_neurotrails import causal_lm_class

# Of the others: tuples from blocks, no positions, biased LM heads, mixtures of experts.
MORE = ("gemma", "granite", "phi", "falcon", "bloom", "olmo", "mixtral")
MASKED = {"masked_modules": ["model.layers.*", "model.heads.*"]}
# A window, capped logits, an embedding of positions and transposed weights, a biased LM head.
SOME = ("qwen3", "gemma3_text", "gpt2", "phi")


@pytest.fixture(params=SOME)
def family(request) -> str:
    return request.param


@pytest.mark.parametrize("family", [*DECODERS, *MORE])
def test_each_trail_is_its_stock_model(family):
    result = parity(tiny_model(family, **MASKED))
    assert result.exact, result


@pytest.mark.slow
def test_every_decoder_of_transformers_is_exact_or_refused():
    results = {}
    for family in all_families():
        try:
            results[family] = outcome(family)
        except Exception as error:  # its configuration cannot be made tiny
            results[family] = error
    works = {family: result for family, result in results.items() if isinstance(result, Parity)}
    assert not {family: result for family, result in works.items() if not result.exact}
    assert len(works) >= 58, sorted(works)
    assert len([result for result in results.values() if isinstance(result, Exception)]) <= 20


@pytest.mark.parametrize("family", DECODERS)
def test_gradients_are_those_of_a_plain_loss(family):
    model, ids = tiny_model(family).train(), tokens()
    model(ids, labels=ids).loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    logits = model(ids, output_head_logits=True).head_logits
    losses = [nn.functional.cross_entropy(x[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) for x in logits]
    torch.stack(losses).mean().backward()
    for name, weight in model.named_parameters():
        scale = weight.grad.abs().max()
        assert weight.grad.isfinite().all() and (gradients[name] - weight.grad).abs().max() <= 1e-5 * scale + 1e-9, name


def test_a_full_ensemble_shares_nothing(family):
    model = tiny_model(family, share_embedding=False, blocks_in_head=DEPTH)
    result = parity(model)
    assert result.logits == 0 and result.uncached and result.trail
    owners: dict[int, set[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(weight), set()).add(name.removeprefix("model.").split(".")[1])
    assert all(len(heads) == 1 for heads in owners.values())


def test_names_are_the_same_in_all_families(family):
    names = {name.split(".weight")[0].split(".bias")[0] for name, _ in tiny_model(family).named_parameters()}
    own = {name for name in names if not name.startswith(("model.layers.", "model.heads.", "lm_heads."))}
    assert {f"model.heads.{head}.norm" for head in range(HEADS)} <= names
    assert all(name.startswith("model.") and name.count(".") == 1 for name in own)  # embeddings


def test_a_checkpoint_comes_back(family, tmp_path):
    model, ids = tiny_model(family, **MASKED), tokens()
    model.save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "sparse", sparse=True)
    expected = model(ids, output_head_logits=True)
    for kind in ("dense", "sparse"):
        for loader in (NeuroTrailsForCausalLM, AutoModelForCausalLM, type(model)):
            again = loader.from_pretrained(tmp_path / kind)
            assert type(again) is type(model)
            assert torch.equal(again(ids).logits, expected.logits)
    two = NeuroTrailsForCausalLM.from_pretrained(tmp_path / "sparse", heads=[2, 0])
    assert torch.equal(two(ids, output_head_logits=True).head_logits, expected.head_logits[[2, 0]])
    assert type(AutoModel.from_pretrained(tmp_path / "dense")) is type(model.model)
    assert AutoConfig.from_pretrained(tmp_path / "dense").model_type == f"neurotrails_{family}"


CODE = """
import sys
sys.modules["nt_hf"] = None  # not installed
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.load(sys.argv[2])
torch.save({"logits": model(ids).logits, "tokens": model.generate(ids, max_new_tokens=4, do_sample=False)}, sys.argv[3])
model.save_pretrained(sys.argv[1] + "-again")
"""


def test_a_checkpoint_carries_its_code(tmp_path):
    model, ids = tiny_model("gemma3_text", **MASKED), tokens()
    model.save_pretrained(tmp_path / "model")
    torch.save(ids, tmp_path / "ids")
    arguments = [str(tmp_path / name) for name in ("model", "ids", "out")]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", CODE, *arguments], check=True, env=environment, cwd=tmp_path)
    out = torch.load(tmp_path / "out")
    assert torch.equal(out["logits"], model(ids).logits)
    assert torch.equal(out["tokens"], model.generate(ids, max_new_tokens=4, do_sample=False))
    again = NeuroTrailsForCausalLM.from_pretrained(tmp_path / "model-again")
    assert torch.equal(again(ids).logits, out["logits"])


def test_every_way_in(family, tmp_path):
    stock = tiny_model(family).extract_trail(0).eval()
    stock.save_pretrained(tmp_path)
    ids = tokens()
    expected = stock(ids).logits
    for source in (stock, tmp_path, str(tmp_path)):
        model = NeuroTrailsForCausalLM.from_stock(source, num_ensemble_heads=2, blocks_in_head=3, **MASKED).eval()
        assert torch.equal(model(ids, output_head_logits=True).head_logits, expected.expand(2, *expected.shape))
        assert type(model.extract_trail(1)) is type(stock)
        assert not any(weight.is_meta for weight in [*model.parameters(), *model.buffers()])
    half = NeuroTrailsForCausalLM.from_stock(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == half.extract_trail(1).dtype == torch.bfloat16
    other = tiny_model(family, seed=2).extract_trail(0).eval()
    full = NeuroTrailsForCausalLM.from_stocks([stock, other]).eval()
    assert torch.equal(full(ids, output_head_logits=True).head_logits, torch.stack([expected, other(ids).logits]))


def test_a_new_model_has_the_familys_first_weights(family):
    stock = tiny_config(family)
    torch.manual_seed(0)
    model = NeuroTrailsForCausalLM.from_config(
        causal_lm_class(stock).config_class.from_stock_config(stock, num_ensemble_heads=HEADS, blocks_in_head=2)
    )
    heads = [dict(head.layers.named_parameters()) for head in model.model.heads]
    for name, weight in heads[0].items():
        if weight.dim() > 1:
            assert not any(torch.equal(weight, head[name]) for head in heads[1:])
            assert all(math.isclose(weight.std().item(), head[name].std().item(), rel_tol=0.3) for head in heads)
        else:
            assert all(torch.equal(weight, head[name]) for head in heads)


def test_the_embeddings_first_weights_can_have_a_scale_of_their_own(family):
    stock = tiny_config(family, tie_word_embeddings=False)
    kind = causal_lm_class(stock)
    for fields in ({}, {"share_embedding": False, "blocks_in_head": DEPTH}):
        models = []
        for scale in (None, 0.632):
            options = {"num_ensemble_heads": 2, "blocks_in_head": BLOCKS_IN_HEAD, "embedding_initializer_range": scale}
            torch.manual_seed(0)
            models.append(kind(kind.config_class.from_stock_config(stock, **options | fields)))
        plain, scaled = models
        embeddings = {id(embedding.weight) for embedding in scaled.get_embeddings()}
        assert len(embeddings) == (2 if fields else 1)
        for (name, weight), other in zip(plain.named_parameters(), scaled.parameters()):
            if id(other) not in embeddings:
                assert torch.equal(weight, other), name
                continue
            used = other[other.any(1)]  # not the row of a padding token
            assert float(used.std()) == pytest.approx(0.632, rel=1e-5)
            torch.testing.assert_close(other, weight * (used.std() / weight[weight.any(1)].std()))


def test_loaded_weights_are_not_scaled(tmp_path):
    model = NeuroTrailsForCausalLM.from_stock(AutoModelForCausalLM.from_config(tiny_config("llama")))
    model.config.embedding_initializer_range = 0.632
    model.save_pretrained(tmp_path)
    loaded = NeuroTrailsForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.embedding_initializer_range == 0.632
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert not hasattr(loaded.config.to_stock_config(), "embedding_initializer_range")


def test_states_and_attentions_of_every_block(family):
    model, ids = tiny_model(family), tokens()
    assert len(model(ids, output_hidden_states=True).hidden_states) == 1 + model.config.num_cache_layers
    model.set_attn_implementation("eager")
    attentions = model(ids, output_attentions=True, use_cache=False).attentions
    assert len(attentions) == model.config.num_cache_layers
    assert all(x.shape[-2:] == (17, 17) and x.isfinite().all() for x in attentions)


def test_generation_in_every_way(family):
    model = tiny_model(family)
    batch = left_padded()
    del batch["position_ids"]
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    greedy = model.generate(**batch, **options)
    if hasattr(DynamicCache, "is_recording_past") or not getattr(model.config, "sliding_window", None):
        for draft in (1, model.extract_trail(2)):
            assert torch.equal(model.generate(**batch, **options, trail_draft=draft), greedy)
    else:
        with pytest.raises(ValueError, match=r"over sliding windows from Transformers 5\.24 on"):
            model.generate(**batch, **options, trail_draft=1)
    beams = [model.generate(**batch, **options, num_beams=3, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*beams)
    measured = model.generate(**batch, **options, output_uncertainty=True, return_dict_in_generate=True)
    assert torch.equal(measured.sequences, greedy)
    assert measured.uncertainty.mutual_information.shape == (2, 6)
    assert (measured.uncertainty.mutual_information > 0).any()
    two = model.generate(**batch, **options, active_heads=[0, 2])
    assert torch.equal(two, model.generate(**batch, **options, active_heads=[0, 2], use_cache=False))


def test_heads_go_on_from_the_backbones_states(family):
    model, ids = tiny_model(family), tokens()
    base = model.model
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
        states = base(ids[:, :12], use_cache=True, cache=cache, active_heads=[0]).backbone_states
        later = base(backbone_states=states, use_cache=True, cache=cache, active_heads=[1, 2]).last_hidden_state
        expected = base(ids[:, :12], use_cache=False, active_heads=[1, 2]).last_hidden_state
        assert torch.allclose(later, expected, atol=1e-5)


def test_checkpointing_and_a_batch_for_each_head(family):
    model, ids = tiny_model(family).train(), tokens()
    model(ids, labels=ids).loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model(ids, labels=ids).loss.backward()
    for name, weight in model.named_parameters():
        assert torch.allclose(gradients[name], weight.grad, atol=1e-5, rtol=1e-3), name

    model = tiny_model(family).train()
    rows = torch.stack([ids, ids.flip(0), ids.flip(1)])
    losses = model(rows, labels=rows).head_losses
    for head in range(HEADS):
        assert losses[head].item() == pytest.approx(model(rows[head], labels=rows[head]).head_losses[head].item(), 1e-6)


def test_packed_sequences_are_apart(family):
    model, ids = tiny_model(family), tokens(batch=1, length=16)
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None]
    apart = torch.cat([model(ids[:, :9]).logits, model(ids[:, 9:]).logits], 1)
    mask = torch.ones_like(ids)
    for options in ({"use_cache": False}, {"attention_mask": mask}, {"cache": DynamicCache(config=model.config)}):
        if "cache" in options:
            options = {nt_hf.models.transformers_versions.CACHE: options["cache"]}
        packed = model(ids, position_ids=positions, **options).logits
        assert torch.allclose(packed, apart, atol=2e-5), options.keys()


@pytest.mark.slow
@pytest.mark.parametrize("family", SOME)
def test_compiled_whole(family):
    model, ids = tiny_model(family), tokens()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, atol=1e-5)
    model.train()
    torch._dynamo.reset()
    assert compiled(ids, labels=ids).loss.item() == pytest.approx(model(ids, labels=ids).loss.item(), 1e-5)


def test_half_precision_and_embedded_tokens(family):
    model, ids = tiny_model(family).to(torch.bfloat16), tokens()
    together = model(ids, output_head_logits=True).head_logits
    for head in range(HEADS):
        assert torch.equal(together[head], model.extract_trail(head)(ids).logits)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)


def test_adapters_of_every_head(family):
    peft = pytest.importorskip("peft")
    model, ids = tiny_model(family), tokens()
    kinds = sorted({name.split(".")[-1] for name, x in model.model.heads.named_modules() if hasattr(x, "weight_mask") or
                    type(x) in nt_hf.models.masks.MASKABLE})  # fmt: skip
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=kinds, init_lora_weights=False)).eval()
    changed = adapted(ids, output_head_logits=True).head_logits
    merged = adapted.merge_and_unload()
    assert torch.allclose(merged(ids, output_head_logits=True).head_logits, changed, atol=2e-4)
    with torch.no_grad():
        assert (changed - tiny_model(family)(ids, output_head_logits=True).head_logits).abs().amax((1, 2, 3)).min() > 0


def test_copies_and_pickles(family):
    model, ids = tiny_model(family, **MASKED), tokens()
    expected = model(ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert torch.equal(other(ids).logits, expected)


def test_nothing_of_a_pass_stays(family):
    model, ids = tiny_model(family).train(), tokens()
    gc.collect()
    gc.disable()
    try:
        output = model(ids, output_head_logits=True, labels=ids)
        logits = weakref.ref(output.head_logits)
        graph = weakref.ref(output.loss)
        del output
        assert logits() is None and graph() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("t5", r"^T5Config \(model_type='t5'\): accepted are the families that AutoModelForCausalLM knows"),
        ("gemma3", r"^Gemma3Config \(model_type='gemma3'\): accepted are text decoders; .* its text_config is one$"),
        (
            "none such",
            r"^model_type='none such': accepted are the decoders and image classifiers of ",
        ),
    ],
)
def test_what_is_no_decoder_is_named(family, message):
    with pytest.raises(ValueError, match=message):
        class_of_family(family)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("opt", {}, r"^OPTForCausalLM cannot have heads: .* asks for more"),
        ("openai-gpt", {}, r"^OpenAIGPTModel cannot have heads: accepted are models of one final norm, used once"),
        ("jamba", {}, r"^JambaModel: layer_types \['linear_attention'\]: accepted are full and sliding attention$"),
        ("mixtral", {"output_router_logits": True}, r"^MixtralModel: output_router_logits=True: accepted is False"),
        ("gpt2", {"add_cross_attention": True}, r"^GPT2Model: accepted are decoders without .*cross-attention$"),
        ("gemma3n_text", {}, r"^Gemma3nTextModel: num_kv_shared_layers=15: accepted is 0$"),
    ],
)
def test_what_cannot_have_heads_is_named_before_a_weight_exists(family, fields, message, monkeypatch):
    kind = class_of_family(family)
    config = kind.config_class.from_stock_config(AutoConfig.for_model(family, **fields))
    add = nn.Module.register_parameter

    def add_meta(module: nn.Module, name: str, weight: nn.Parameter | None) -> None:
        assert weight is None or weight.is_meta
        add(module, name, weight)

    monkeypatch.setattr(nn.Module, "register_parameter", add_meta)
    with pytest.raises(NotImplementedError, match=message):
        kind(config)


def test_masks_over_fused_experts_are_refused():
    with pytest.raises(ValueError, match=r"experts"):
        tiny_model("mixtral", masked_modules=["model.heads.*experts*"])


def test_a_model_of_another_kind_is_named(tmp_path):
    stock = tiny_model("qwen3").extract_trail(0)
    with pytest.raises(TypeError, match=r"^from_stock\(Qwen3ForCausalLM\): accepted is a LlamaForCausalLM$"):
        nt_hf.NeuroTrailsLlamaForCausalLM.from_stock(stock)
    with pytest.raises(TypeError, match="revision with a model: accepted are these with a path"):
        NeuroTrailsForCausalLM.from_stock(stock, revision="main")
    stock.save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match=r"model_type='qwen3': accepted is a multi-head model, neurotrails_\.\.\."):
        NeuroTrailsForCausalLM.from_pretrained(tmp_path / "stock")
    tiny_model("qwen3").save_pretrained(tmp_path / "heads")
    with pytest.raises(ValueError, match=r"Qwen3.*heads already"):
        NeuroTrailsForCausalLM.from_stock(tmp_path / "heads")
    with pytest.raises(ValueError, match=r"model_type='neurotrails_qwen3': accepted is 'neurotrails_llama'"):
        nt_hf.NeuroTrailsLlamaForCausalLM.from_pretrained(tmp_path / "heads")
    with pytest.raises(ValueError, match=r"^blocks_in_head=6: accepted is 0 to num_hidden_layers=5"):
        NeuroTrailsForCausalLM.from_stock(stock, blocks_in_head=6)
    with pytest.raises(TypeError, match=r"^from_stock\(3\): accepted is a model, or a directory or hub id of one$"):
        NeuroTrailsForCausalLM.from_stock(3)
    with pytest.raises(
        ValueError, match=r"^layer_types=\['full_attention'\]: accepted is a list of num_hidden_layers=5"
    ):
        nt_hf.NeuroTrailsQwen3Config(num_hidden_layers=5, layer_types=["full_attention"])
    with pytest.raises(TypeError, match="from_stock, from_stocks, from_pretrained and from_config"):
        NeuroTrailsForCausalLM()


def test_a_stock_checkpoint_that_lacks_weights_is_named(tmp_path):
    stock = tiny_model("qwen3").extract_trail(0)
    weights = stock.state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]
    stock.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"lacks 1 weights that fit .* example model\.layers\.1\.mlp"):
        NeuroTrailsForCausalLM.from_stock(tmp_path)


def test_logits_that_are_capped_are_no_linear_map():
    model, ids = tiny_model("gemma2"), tokens()
    states = model.model(ids).last_hidden_state
    with pytest.raises(NotImplementedError, match="scales or caps its logits"):
        model.get_output_embeddings()(states)
    plain = tiny_model("phi")
    mapped = plain.get_output_embeddings()(plain.model(ids).last_hidden_state)
    assert torch.allclose(mapped, plain(ids).logits, atol=1e-5)
    table = plain.get_output_embeddings()
    states = plain.model(ids).last_hidden_state
    assert torch.allclose(states @ table.weight.T + table.bias, mapped, atol=1e-4)


def test_a_vocabulary_grows(family):
    model, ids = tiny_model(family), tokens()
    before = model(ids, output_head_logits=True).head_logits
    model.resize_token_embeddings(101)
    after = model(ids, output_head_logits=True).head_logits
    assert after.shape[-1] == 101 and torch.allclose(after[..., :97], before, atol=1e-6)
    assert model.extract_trail(1)(ids).logits.shape[-1] == 101
    assert model.config.blocks_in_head == BLOCKS_IN_HEAD
