"""Reports B2 and B6: quantisers and TRL's trainers on models of several heads; `make test-peers` installs them."""

import copy

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from conftest import token_ids
from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig, Trainer

from nt_hf import NeuroTrailsLlamaForCausalLM
from nt_hf.models.lm_heads import LMHead

for package in ("datasets", "torchao", "optimum.quanto", "bitsandbytes", "trl"):
    pytest.importorskip(package, reason="installed by make test-peers")

from datasets import Dataset
from peft import LoraConfig
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

IDS = token_ids()[5000 : 5000 + 3 * 40].view(3, 40).clone()
TEXTS = ["The best way to learn is to try.", "You can find it in the house.", "It was a dark night."] * 4
QUANTISERS = {
    "torchao": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "quanto": lambda: QuantoConfig(weights="int8"),
    "bitsandbytes 8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes 4": lambda: BitsAndBytesConfig(load_in_4bit=True),
}


def same(model, reference, four_bits=False):
    """The loss is nearly that of the model before it was quantised, in both modes, and generation runs."""
    tolerance = 0.1 if four_bits else 0.01
    expected = reference(IDS, labels=IDS).head_losses
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(IDS, labels=IDS).head_losses, expected, atol=tolerance, rtol=0)
    if not four_bits:  # bitsandbytes' product of a single row wants widths that these small models have not
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
    same(quantised, model, four_bits=name.endswith("4"))


def test_all_lm_heads_quantised_in_place(model):
    reference = copy.deepcopy(model)
    quantize_(model, Int8WeightOnlyConfig())
    assert len({type(head.weight.data) for head in model.lm_heads}) == 1
    assert type(model.lm_heads[0].weight.data) is not torch.Tensor
    same(model, reference)
    with pytest.raises(NotImplementedError, match="adapted or quantised LM heads"):
        _ = model.lm_heads.weight


def test_a_torchao_checkpoint_is_loaded_again(model, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    first = NeuroTrailsLlamaForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
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
