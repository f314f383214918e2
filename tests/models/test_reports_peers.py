"""Reports B2 and B6: quantisers and TRL's trainers on models of several heads; `make test-peers` installs them."""

import copy

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from conftest import token_ids, trained
from test_remote_code import WITHOUT_PACKAGE, run_without_package  # noqa: F401, a fixture
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig, Trainer

from nt_hf import NeuroTrailsForCausalLM, NeuroTrailsLlamaForCausalLM
from nt_hf.models.lm_heads import LMHead

for package in ("datasets", "torchao", "optimum.quanto", "bitsandbytes", "trl"):
    pytest.importorskip(package, reason="installed by make test-peers")

from bitsandbytes.functional import dequantize_4bit
from datasets import Dataset
from peft import LoraConfig
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis, quantize_
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

IDS = token_ids()[5000 : 5000 + 3 * 40].view(3, 40).clone()
TEXTS = ["The best way to learn is to try.", "You can find it in the house.", "It was a dark night."] * 4
QUANTISERS = {
    "torchao 8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao 4": lambda: TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerAxis(0))),
    "quanto": lambda: QuantoConfig(weights="int8"),
    "bitsandbytes 8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes 4": lambda: BitsAndBytesConfig(load_in_4bit=True),
}


LOADS_QUANTISED = """
from torchao.quantization import Int8WeightOnlyConfig
from transformers import BitsAndBytesConfig, TorchAoConfig
answers_ = {}
configs = {"torchao": TorchAoConfig(Int8WeightOnlyConfig()), "bnb": BitsAndBytesConfig(load_in_8bit=True)}
for name, config in configs.items():
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, quantization_config=config)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    answers_[name] = model(**prompts, output_head_logits=True).head_logits.detach()
save_file(answers_, answers)
"""


def same(model, reference, name="torchao 8"):
    """The loss is nearly that of the model before it was quantised, in both modes, and generation runs."""
    tolerance = 0.1 if name.endswith("4") else 0.01
    expected = reference(IDS, labels=IDS).head_losses
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(IDS, labels=IDS).head_losses, expected, atol=tolerance, rtol=0)
    if name != "bitsandbytes 4":  # whose product of a single row wants widths that these small models have not
        assert model.generate(IDS, max_new_tokens=2).shape == (3, 42)


# B6: quantisers


@pytest.mark.parametrize("name", QUANTISERS)
@pytest.mark.parametrize("model", ["neurotrails", "treenet", "tied"], indirect=True)
def test_a_quantised_checkpoint_spares_all_lm_heads_and_takes_labels(model, name, tmp_path):
    model.save_pretrained(tmp_path)
    quantised = NeuroTrailsLlamaForCausalLM.from_pretrained(tmp_path, quantization_config=QUANTISERS[name]())
    assert all(type(head) is LMHead and type(head.weight.data) is torch.Tensor for head in quantised.lm_heads)
    inner = quantised.model.layers[0].mlp.up_proj
    assert (type(inner), type(inner.weight.data)) != (torch.nn.Linear, torch.Tensor)
    same(quantised, model, name)


def dense(layer):
    """The weight ``[out, in]`` that a quantised layer multiplies with."""
    if type(layer).__name__ == "Linear4bit":
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer(torch.eye(layer.in_features)).T


def close(quantised, reference):
    """Every trail predicts nearly as before: nats of the KL divergence, the mean over the tokens."""
    before, after = (logits.log_softmax(-1) for logits in (reference, quantised))
    assert ((before.exp() * (before - after)).sum(-1).mean((1, 2)) < 0.01).all()


@pytest.mark.parametrize("name", QUANTISERS)
@pytest.mark.parametrize("model", ["neurotrails", "tied", "full_ensemble"], indirect=True)
def test_every_heads_blocks_are_quantised_alike_and_keep_their_zeros(model, name, tmp_path):
    model.save_pretrained(tmp_path)
    quantised = NeuroTrailsLlamaForCausalLM.from_pretrained(tmp_path, quantization_config=QUANTISERS[name]())
    linear = [key for key, part in model.named_modules() if type(part) is torch.nn.Linear]
    layers = [quantised.get_submodule(key) for key in linear]
    assert len({(type(layer), type(layer.weight)) for layer in layers}) == 1 and len(linear) >= 42
    assert type(layers[0].weight) is not torch.nn.Parameter
    assert all((dense(layer)[model.get_submodule(key).weight == 0] == 0).all() for key, layer in zip(linear, layers))
    close(quantised(IDS, output_head_logits=True).head_logits, model(IDS, output_head_logits=True).head_logits)


def test_a_checkpoint_without_the_package_is_quantised(run_without_package, prompts, tmp_path):  # noqa: F811
    trained("neurotrails").save_pretrained(tmp_path / "model")
    answers = run_without_package(WITHOUT_PACKAGE + LOADS_QUANTISED, tmp_path / "model")
    expected = trained("neurotrails")(**prompts, output_head_logits=True).head_logits
    for name in ("torchao", "bnb"):
        close(answers[name], expected)


@pytest.mark.parametrize("name", QUANTISERS)
def test_what_needs_plain_weights_is_one_line(model, name, tmp_path):
    model.save_pretrained(tmp_path / "model")
    model.extract_trail(0).save_pretrained(tmp_path / "trail")
    config = {"quantization_config": QUANTISERS[name]()}
    quantised = NeuroTrailsForCausalLM.from_pretrained(tmp_path / "model", **config)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "trail", **config)
    attempts = {
        "extract_trail": lambda: quantised.extract_trail(0),
        "from_stock": lambda: NeuroTrailsForCausalLM.from_stock(stock),
        "sparse=True": lambda: quantised.save_pretrained(tmp_path / "sparse", sparse=True),
    }
    for purpose, attempt in attempts.items():
        with pytest.raises(ValueError, match="is quantised; accepted is a model that was loaded without") as error:
            attempt()
        assert purpose in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "sparse").exists()


@pytest.mark.parametrize("bits", [8, 4])
def test_all_heads_and_lm_heads_quantised_in_place(model, bits):
    reference = copy.deepcopy(model)
    quantize_(model, Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(torch.int4, PerAxis(0)))
    layers = [part for part in model.modules() if isinstance(part, torch.nn.Linear)]
    assert len({type(layer.weight.data) for layer in layers}) == 1 and len(layers) == 52
    assert type(model.lm_heads[0].weight.data) is not torch.Tensor
    same(model, reference, f"torchao {bits}")
    with pytest.raises(NotImplementedError, match="adapted or quantised LM heads"):
        _ = model.lm_heads.weight


@pytest.mark.parametrize("name", [name for name in QUANTISERS if name != "quanto"])  # which cannot be saved
def test_a_quantised_checkpoint_is_loaded_again(model, name, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    first = NeuroTrailsLlamaForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=QUANTISERS[name]())
    first.save_pretrained(tmp_path / "quantised")
    again = NeuroTrailsLlamaForCausalLM.from_pretrained(tmp_path / "quantised")
    assert torch.equal(again(IDS).logits, first(IDS).logits)


# B2: trainers of TRL


COMMON = {"max_steps": 3, "report_to": "none", "use_cpu": True, "bf16": False, "learning_rate": 1e-3,
          "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}  # fmt: skip


class EachHeadSFTTrainer(SFTTrainer):
    """As in docs/peers.md: every head learns from its own loss, the model's, and not from the ensemble's."""

    def compute_loss(self, *args, **kwargs):
        return Trainer.compute_loss(self, *args, **kwargs)


def sft(model, path, trainer=SFTTrainer, peft_config=None, **options):
    arguments = SFTConfig(str(path), **COMMON, max_length=64, **options)
    data = Dataset.from_dict({"text": TEXTS})
    run = trainer(model, arguments, train_dataset=data, processing_class=byte_tokenizer(), peft_config=peft_config)
    batch = run._prepare_inputs(next(iter(run.get_train_dataloader())))
    with torch.no_grad():
        first = run.compute_loss(run.model.train(), dict(batch)).item()
    run.train()
    return first, batch, [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("model", ["neurotrails", "dense", "tied", "full_ensemble"], indirect=True)
@pytest.mark.parametrize("peft_config", [None, LoraConfig(target_modules=["q_proj", "v_proj"])], ids=["full", "lora"])
def test_sft_trains_the_ensemble(model, peft_config, tmp_path):
    reference = copy.deepcopy(model)
    first, batch, losses = sft(model, tmp_path, peft_config=peft_config, gradient_checkpointing=False)
    logits = reference(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = reference.loss_function(logits, batch["labels"], reference.config.vocab_size)
    assert first == pytest.approx(expected.item(), rel=1e-5)
    assert losses[-1] < losses[0] or peft_config  # adapters hardly learn in three steps
    trained = {name: p for name, p in model.named_parameters() if "lora_B" in name or not peft_config}
    before = dict(reference.named_parameters())
    assert all((p != before.get(name, 0)).any() for name, p in trained.items()) and trained


def test_sft_packs_and_checkpoints(model, tmp_path):
    _, _, losses = sft(model, tmp_path, packing=True, padding_free=False, gradient_checkpointing=True)
    assert losses[-1] < losses[0]


def test_sft_can_train_each_head_by_its_own_loss(model, tmp_path):
    reference = copy.deepcopy(model)
    first, batch, losses = sft(model, tmp_path, trainer=EachHeadSFTTrainer)
    expected = reference(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    assert first == pytest.approx(expected.item(), rel=1e-5) and losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["all-linear", "probs"])
def test_what_one_linear_map_cannot_say_is_one_line(model, kind, tmp_path):
    adapters = LoraConfig(target_modules="all-linear") if kind == "all-linear" else None
    if kind == "probs":
        model.lm_heads.ensemble_mode = model.config.ensemble_mode = "probs"
    with pytest.raises(NotImplementedError, match="accepted are plain LM heads with ensemble_mode='logits'") as error:
        sft(model, tmp_path, peft_config=adapters)
    assert "\n" not in str(error.value)


def test_sft_takes_all_linear_without_the_lm_heads(model, tmp_path):
    spared = [f"lm_heads.{h}" for h in range(3)]
    _, _, losses = sft(model, tmp_path, peft_config=LoraConfig(target_modules="all-linear", exclude_modules=spared))
    assert losses


def test_dpo_runs(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    model = NeuroTrailsLlamaForCausalLM.from_pretrained(tmp_path / "model")
    data = Dataset.from_dict({"prompt": ["The best "] * 8, "chosen": ["way"] * 8, "rejected": ["xyz"] * 8})
    arguments = DPOConfig(str(tmp_path), **COMMON, max_length=64)
    run = DPOTrainer(model, args=arguments, train_dataset=data, processing_class=byte_tokenizer(),
                     ref_model=copy.deepcopy(model))  # fmt: skip
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-3) and losses[-1] < losses[0]


def test_grpo_runs(model, tmp_path):
    data = Dataset.from_dict({"prompt": ["The best "] * 8})
    arguments = GRPOConfig(
        str(tmp_path), **COMMON, max_completion_length=8, num_generations=4, per_device_train_batch_size=4
    )
    run = GRPOTrainer(
        model, args=arguments, train_dataset=data, processing_class=byte_tokenizer(),
        reward_funcs=lambda completions, **_: [float(text.count("e")) for text in completions],
    )  # fmt: skip
    before = copy.deepcopy(model)
    run.train()
    assert any((p != q).any() for p, q in zip(model.parameters(), before.parameters()))
