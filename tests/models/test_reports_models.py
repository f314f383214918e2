"""Reports of public trackers replayed on the models: sections A, B and E of the list that the tests are numbered by."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from conftest import slow, token_ids, trained
from safetensors.torch import load_file
from test_modeling import EVERY_VARIANT, reference_losses, usual_order
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments, pipeline

from nt_hf import NeuroTrailsLlamaForCausalLM, apply_masks, check_masks
from nt_hf.models.lm_heads import by_head
from nt_hf.models.transformers_versions import CACHE, NEWEST, OLDEST, check_version

peft = pytest.importorskip("peft")  # of the extra "dev"
IDS = token_ids()[5000 : 5000 + 3 * 40].view(3, 40).clone()
SHORT, LONG = IDS[0, :15], IDS[1, :25]
PACKED = {
    "input_ids": torch.cat([SHORT, LONG])[None],
    "position_ids": torch.cat([torch.arange(15), torch.arange(25)])[None],
}


@pytest.fixture(autouse=True)
def compile_anew():
    torch.compiler.reset()


def adapted(model, **options):
    return peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": ["q_proj"]} | options))


def save_and_load(model, path, **options):
    model.save_pretrained(path)
    return NeuroTrailsLlamaForCausalLM.from_pretrained(path, **options)


# A1: the newest release


@EVERY_VARIANT
def test_the_cache_goes_by_either_name(model):
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits[:, -1]
        for name in ("cache", "past_key_values"):
            for body in (model, model.model):  # the base model's cache serves as well
                first = body(IDS[:, :-1], use_cache=True)[CACHE]
                found = model(IDS[:, -1:], use_cache=True, **{name: first}).logits[:, -1]
                torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(IDS, cache=first, past_key_values=first)


@pytest.mark.parametrize("argument", ["ignore_index", "shift_labels", "kv_cache", "position_id"])
def test_an_unknown_argument_is_refused(model, argument):
    for body in (model, model.model):
        with pytest.raises(TypeError, match=rf"unknown argument {argument}; accepted are input_ids, attention_mask"):
            body(IDS, **{argument: 3})
    with pytest.raises(ValueError, match=argument):
        model.generate(IDS, max_new_tokens=1, **{argument: 3})


def test_what_transformers_hands_through_is_taken(model):
    extra = {"token_type_ids": torch.zeros_like(IDS), "output_attentions": False, "cu_seq_lens_q": None}
    assert torch.equal(model(IDS, **extra).logits, model(IDS).logits)


@pytest.mark.parametrize("version", ["5.16.9", "5.25.0.dev0", "5.25.1", "6.0.0", "4.57.6"])
def test_another_release_is_refused_in_one_line(version):
    with pytest.raises(ImportError, match=rf"Transformers {version} is installed.*tested with 5.17 to 5.24") as error:
        check_version(version, {})
    assert "\n" not in str(error.value)
    check_version(version, {"NT_HF_ANY_TRANSFORMERS": "1"})


def test_tested_releases_are_those_that_are_installed():
    for version in ("5.17.0", "5.20.2", "5.24.3"):
        check_version(version, {})
    setup = (Path(__file__).parents[2] / "setup.cfg").read_text()
    (major, minor), after = OLDEST, (NEWEST[0], NEWEST[1] + 1)
    assert f"transformers>={major}.{minor},<{after[0]}.{after[1]}\n" in setup


def test_a_checkpoint_refuses_a_release_that_it_was_not_made_for(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    script = (
        "import sys, transformers; sys.modules['nt_hf'] = None; transformers.__version__ = '5.25.0'\n"
        "transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "checkpoint")]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode and "ImportError: Transformers 5.25.0 is installed, and" in result.stderr.splitlines()[-1]


# B1: fine-tuned or merged without the masks


def test_fine_tuning_without_the_masks_is_said_when_it_is_saved(model, tmp_path, caplog):
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, save_steps=1, report_to="none", use_cpu=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(model, arguments, train_dataset=rows).train()
    check_saved_without_masks(model, tmp_path / "checkpoint-1", caplog)


def test_a_merged_adapter_is_said_when_it_is_saved(model, tmp_path, caplog):
    wrapped = adapted(model)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path)
    check_saved_without_masks(merged, tmp_path, caplog)


def check_saved_without_masks(model, path, caplog):
    warned = [record.getMessage() for record in caplog.records if "outside their masks" in record.getMessage()]
    assert len(warned) == 1 and "masked_modules=[]" in warned[0] and "\n" not in warned[0]
    with pytest.raises(ValueError, match="outside their masks") as error:
        NeuroTrailsLlamaForCausalLM.from_pretrained(path)
    message = str(error.value)
    assert len(message) < 600 and message.index("masked_modules=[]") < message.index("apply_masks")
    dense = NeuroTrailsLlamaForCausalLM.from_pretrained(path, masked_modules=[])
    assert torch.equal(dense(IDS).logits, model.eval()(IDS).logits)


def test_a_state_dict_that_breaks_the_masks_is_said(model, tmp_path, caplog):
    model.save_pretrained(tmp_path / "true", state_dict=model.state_dict())
    assert not caplog.records
    model.save_pretrained(tmp_path / "false", state_dict={k: v + (v == 0) for k, v in model.state_dict().items()})
    assert "outside their masks" in caplog.text


# B2 and B6 are in test_reports_peers.py


# B3: any part may train

PARTS = {
    "one LM head": ["lm_heads.0."],
    "one head": ["model.heads.1.", "lm_heads.1."],
    "heads": ["model.heads.", "lm_heads."],
    "backbone": ["model.layers.", "model.embed_tokens."],
    "norms": ["norm"],
    "one block": ["model.heads.1.layers.0."],
    "embeddings": ["embed_tokens"],
}
WAYS = ["head by head", "usual", "checkpointing", "reentrant", "compiled"]
ABSENT = {("full_ensemble", "backbone"), ("tied", "one LM head")}  # there is none; the embedding has its name


def train_part(model, part, way):
    """The gradients of a part of the model, by name, on one of the ways that a training step can go."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(piece in name for piece in PARTS[part]))
    model.train()
    if way == "usual":
        model._can_run_head_by_head = lambda *_: False
    if way in ("checkpointing", "reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": way == "reentrant"})
        model.enable_input_require_grads()
    forward = torch.compile(model, backend="eager", fullgraph=True) if way == "compiled" else model
    return forward(IDS, labels=IDS, **{"use_cache": False} if way == "compiled" else {})


@pytest.mark.parametrize(
    ("model", "part", "way"),
    [
        (variant, part, way)
        for variant in ("neurotrails", "full_ensemble", "tied")
        for part in PARTS
        for way in WAYS
        if (variant, part) not in ABSENT
        # One graph serves all parts but for what needs gradients: compiling takes seconds.
        and (way != "compiled" or (variant == "neurotrails" and part in ("one LM head", "one head", "backbone")))
    ],
    indirect=["model"],
)
def test_any_part_of_a_model_trains(model, part, way):
    other = copy.deepcopy(model).train()
    losses = reference_losses(other, {"input_ids": IDS, "labels": IDS})
    losses.mean().backward()
    output = train_part(model, part, way)
    torch.testing.assert_close(output.head_losses, losses)
    output.loss.backward()
    assert any(parameter.requires_grad for parameter in model.parameters())
    for (name, parameter), (_, expected) in zip(model.named_parameters(), other.named_parameters()):
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected.grad, msg=name)


@pytest.mark.parametrize("order", ["head by head", "usual"])
def test_adapters_of_one_head_train(model, order):
    wrapped = adapted(model, target_modules=r"model\.heads\.1\..*(q|up)_proj|lm_heads\.1")
    if order == "usual":
        model._can_run_head_by_head = lambda *_: False
    wrapped.train()(input_ids=IDS, labels=IDS).loss.backward()
    grads = {name for name, parameter in wrapped.named_parameters() if parameter.grad is not None}
    assert grads == {name for name, _ in wrapped.named_parameters() if "lora_" in name} and len(grads) == 10
    with wrapped.disable_adapter():  # adapters that exist and take no part
        wrapped(input_ids=IDS, labels=IDS)


def test_gradients_that_are_one_tensor_are_scaled_once(model):
    """Autograd gives two parameters that are added one gradient; the loss's factor must reach each of them once."""

    class Sum(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.a, self.b = nn.Parameter(weight.detach() / 2), nn.Parameter(weight.detach() / 2)

        def forward(self, x):
            return x @ (self.a + self.b).T

    model.lm_heads[0] = Sum(model.lm_heads[0].weight)
    (7 * model.train()(IDS, labels=IDS).loss).backward()
    found = [model.lm_heads[0].a.grad, model.lm_heads[0].b.grad]
    model.zero_grad()
    (7 * usual_order(model)(IDS, labels=IDS).loss).backward()
    for grad, expected in zip(found, [model.lm_heads[0].a.grad, model.lm_heads[0].b.grad]):
        torch.testing.assert_close(grad, expected)


# B4: the base model


@EVERY_VARIANT
def test_the_base_model_is_found_and_returns_its_last_state_first(model, tmp_path):
    base = save_and_load(model, tmp_path).model
    assert set(model.config.auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    found = AutoModel.from_pretrained(tmp_path)
    for body in (base, found):
        for options in ({}, {"use_cache": False}, {"return_dict": False}):
            states = body(IDS, **options)[0]
            heads, size = model.config.num_ensemble_heads, model.config.hidden_size
            assert states.shape == (3, 40, heads * size)
            together = torch.stack([head(x) for head, x in zip(model.lm_heads, by_head(states, size))]).mean(0)
            torch.testing.assert_close(together, model(IDS).logits)


def test_the_pipeline_of_features_runs(model, tmp_path):
    tokenizer = byte_tokenizer()
    model.save_pretrained(tmp_path)
    extract = pipeline("feature-extraction", model=AutoModel.from_pretrained(tmp_path), tokenizer=tokenizer)
    features = torch.tensor(extract("You can find"))
    assert features.shape == (1, 12, 3 * model.config.hidden_size)
    ids = torch.tensor([tokenizer("You can find")["input_ids"]])
    torch.testing.assert_close(features, model.model(ids).last_hidden_state)


# B5: packed sequences


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": True},
        {"use_cache": False},
        {"output_hidden_states": True},
        {"attention_mask": torch.ones(1, 40)},
        {"attention_mask": torch.ones(1, 40), "use_cache": True},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("model", "way"),
    [
        ("neurotrails", "sdpa"),
        ("neurotrails", "eager"),
        slow("neurotrails", "compiled"),
        ("full_ensemble", "sdpa"),
        ("only_lm_heads", "sdpa"),
    ],
    indirect=["model"],
)
def test_packed_sequences_are_as_if_alone(model, options, way):
    model.set_attn_implementation("eager" if way == "eager" else "sdpa")
    expected = torch.cat([model(SHORT[None]).logits, model(LONG[None]).logits], 1)
    run = torch.compile(model, backend="eager") if way == "compiled" else model
    torch.testing.assert_close(run(**PACKED, **options).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", ["zeros", "on"])
def test_packed_sequences_in_a_padded_row_are_as_if_alone(model, start):
    pad = torch.zeros(1, 3, dtype=torch.long)
    ids = torch.cat([pad, PACKED["input_ids"], pad], 1)
    before = pad if start == "zeros" else torch.arange(-3, 0)[None]
    positions = torch.cat([before, PACKED["position_ids"], torch.arange(25, 28)[None]], 1)
    mask = torch.cat([pad, torch.ones_like(PACKED["input_ids"]), pad], 1)
    expected = torch.cat([model(SHORT[None]).logits, model(LONG[None]).logits], 1)
    logits = model(ids, position_ids=positions.clamp(min=0) if start == "zeros" else positions, attention_mask=mask)
    torch.testing.assert_close(logits.logits[:, 3:-3], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"output_hidden_states": True}, {"output_attentions": True}, {}], ids=str)
def test_a_training_pass_makes_no_cache(model, options):
    model.set_attn_implementation("eager")
    output = model.train()(**PACKED, labels=PACKED["input_ids"], **options)
    assert output.get(CACHE) is None
    alone = [model(text[None], labels=text[None]).head_losses * (len(text) - 1) for text in (SHORT, LONG)]
    labels = PACKED["input_ids"].clone()
    labels[0, 15] = -100  # the first token of the second document, which the first would have to predict
    apart = model(**PACKED, labels=labels, **options).head_losses * 38
    torch.testing.assert_close(apart, sum(alone))


# B7: tools that ask for the LM head


@EVERY_VARIANT
def test_the_lm_heads_together_are_one_linear_map(model):
    states = model.model(IDS).last_hidden_state
    head = model.get_output_embeddings()
    torch.testing.assert_close(states @ head.weight.T, model(IDS).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head(states), model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert head in set(model.modules()) and head.bias is None
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is head
    if model.config.num_ensemble_heads > 1:
        with pytest.raises(NotImplementedError, match="accepted are LMHeads of"):
            model.set_output_embeddings(nn.ModuleList())


def test_a_combination_that_is_no_linear_map_is_refused(model):
    model.lm_heads.ensemble_mode = "probs"
    with pytest.raises(NotImplementedError, match="ensemble_mode='probs': accepted are plain LM heads"):
        _ = model.lm_heads.weight
    model.lm_heads.ensemble_mode = "logits"
    adapted(model, target_modules=["lm_heads.1"])
    with pytest.raises(NotImplementedError, match="adapted or quantised LM heads"):
        _ = model.lm_heads.weight


def test_all_linear_adapts_all_lm_heads_alike(model):
    wrapped = adapted(model, target_modules="all-linear")
    names = [name for name, module in wrapped.named_modules() if hasattr(module, "base_layer")]
    assert sum("lm_heads" in name for name in names) == 3 and len(names) == 3 + 7 * 7


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"modules_to_save": ["lm_head"]},
            r"modules_to_save: 'lm_head' fits no module; the LM heads are lm_heads.0 to",
        ),
        ({"target_modules": ["q_proj", "lm_head"]}, r"target_modules: 'lm_head' fits no module"),
        ({"modules_to_save": ["lm_heads"]}, r"cannot be applied to modules of type .*LMHeads"),
    ],
)
def test_a_single_lm_head_is_refused(model, options, error):
    with pytest.raises((ValueError, TypeError), match=error):
        adapted(model, **options)(input_ids=IDS)


def test_each_lm_head_is_saved_by_its_name(model, tmp_path):
    wrapped = adapted(model, modules_to_save=["lm_heads.0", "lm_heads.1", "lm_heads.2"])
    wrapped.train()(input_ids=IDS, labels=IDS).loss.backward()
    wrapped.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {f"base_model.model.lm_heads.{h}.weight" for h in range(3)} <= saved.keys()


def test_new_rows_of_every_head_are_saved_with_an_adapter(model, tmp_path):
    model = save_and_load(model, tmp_path / "model")
    model.resize_token_embeddings(268, mean_resizing=False)
    for head in model.lm_heads:
        nn.init.normal_(head.weight[260:].detach())
    wrapped = adapted(model)
    wrapped.save_pretrained(tmp_path / "adapter")
    fresh = NeuroTrailsLlamaForCausalLM.from_pretrained(tmp_path / "model")
    fresh.resize_token_embeddings(268, mean_resizing=False)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(again(input_ids=IDS).logits, wrapped(input_ids=IDS).logits)


@pytest.mark.parametrize("model", ["full_ensemble"], indirect=True)
def test_adapters_over_a_resized_full_ensemble_are_refused(model):
    model.resize_token_embeddings(268, mean_resizing=False)
    with pytest.raises(ValueError, match="resized: PEFT would save the new rows of one embedding only"):
        adapted(model)(input_ids=IDS)


# B8: tied models


@pytest.mark.parametrize("model", ["tied"], indirect=True)
def test_adapters_on_tied_lm_heads_are_warned_of(model):
    with pytest.warns(UserWarning, match="share one weight with the embedding: merged, each changes"):
        adapted(model, target_modules=["lm_heads.0"])(input_ids=IDS)


@pytest.mark.parametrize("model", ["tied", "tied_full_ensemble"], indirect=True)
@pytest.mark.parametrize("option", [{"modules_to_save": ["embed_tokens"]}, {}], ids=["embedding trained", "untouched"])
def test_a_merged_tied_model_is_read_as_it_was_written(model, option, tmp_path):
    wrapped = adapted(model, **option).train()
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    merged = wrapped.eval().merge_and_unload()
    apply_masks(merged)
    again = save_and_load(merged, tmp_path)
    assert torch.equal(again(IDS).logits, merged(IDS).logits)
    assert again.config.tie_word_embeddings == (not option)


# B9: what several heads cannot do


def test_an_early_exit_is_refused_and_changes_nothing(model):
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=r"assistant_early_exit=2: .*accepted is trail_draft"):
        model.generate(IDS, assistant_early_exit=2)
    assert model.config.to_dict() == before and model.generate(IDS, max_new_tokens=2).shape == (3, 42)
    model.generation_config.assistant_early_exit = 2
    with pytest.raises(ValueError, match="assistant_early_exit=2"):
        model.generate(IDS)


def test_continuous_batching_is_refused(model):
    with pytest.raises(NotImplementedError, match="accepted are generate with padded prompts"):
        model.generate_batch([[5, 6, 7]])


def test_a_cache_of_another_depth_is_refused(model):
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    slots = model.config.num_cache_layers
    wrapped = peft.get_peft_model(model, peft.PrefixTuningConfig(**options, num_layers=slots))
    assert wrapped(input_ids=IDS).logits.shape == (3, 40, 260)
    with pytest.raises(ValueError, match=rf"4 before it: .*{slots} layers .*num_layers=model.config.num_cache_layers"):
        peft.get_peft_model(wrapped.base_model, peft.PrefixTuningConfig(**options, num_layers=3))(input_ids=IDS)


def test_a_head_that_sat_out_cannot_come_back(model):
    first = model(IDS, use_cache=True, active_heads=[0])[CACHE]
    with pytest.raises(ValueError, match="the cache holds 0 tokens in head 1 and 40 before it"):
        model(IDS[:, :1], use_cache=True, cache=first)


@pytest.mark.parametrize("order", ["head by head", "usual"])
def test_one_head_s_loss_after_another_goes_backward(model, order):
    expected = []
    for h in range(3):
        other = copy.deepcopy(model).train()
        reference_losses(other, {"input_ids": IDS, "labels": IDS})[: h + 1].sum().backward()
        expected.append({name: parameter.grad for name, parameter in other.named_parameters()})
    if order == "usual":
        usual_order(model)
    losses = model.train()(IDS, labels=IDS).head_losses
    for h, loss in enumerate(losses):
        loss.backward(retain_graph=h < 2)
        for name, parameter in model.named_parameters():
            if expected[h][name] is not None:
                torch.testing.assert_close(parameter.grad, expected[h][name], msg=name)


# E5: chosen hidden states


@pytest.mark.parametrize("chosen", [[-1], [0, 3], [-8, 7], [99], -2, 5], ids=str)
@pytest.mark.parametrize("heads", [None, [2], [0, 1]], ids=str)
def test_chosen_hidden_states_are_those_of_that_place(model, chosen, heads):
    everything = model(IDS, output_hidden_states=True, active_heads=heads).hidden_states
    places = [chosen] if isinstance(chosen, int) else chosen
    wanted = {range(len(everything))[i] for i in places if -len(everything) <= i < len(everything)}
    for body in (model, model.model):
        found = body(IDS, output_hidden_states=chosen, active_heads=heads).hidden_states
        assert len(found) == len(everything) and {i for i, x in enumerate(found) if x is not None} == wanted
        assert all(torch.equal(found[i], everything[i]) for i in wanted)


# What passes


def test_a_masked_checkpoint_is_right_for_the_auto_classes(model, tmp_path):
    again = save_and_load(model, tmp_path)
    assert not check_masks(again)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, trained("neurotrails")(IDS).logits)
