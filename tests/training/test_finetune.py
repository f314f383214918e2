"""Fine-tuning by TRL's trainer of a tiny stock Llama that gets heads, and of a small multi-head model."""

import json

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from conftest import trained
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

for package in ("datasets", "peft", "trl"):
    pytest.importorskip(package, reason="installed by make test-peers")

from safetensors.torch import load_file
from trl import SFTConfig

from nt_hf import NeuroTrailsForCausalLM, check_masks
from nt_hf.cli.finetune import main
from nt_hf.models.masks import masked_modules
from nt_hf.training import finetune
from nt_hf.training.finetune import HeadsTrainer

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}a: {% generation %}{{ m['content'] }}\n"
    "{% endgeneration %}{% else %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)
TALK = [("user", "What is it?"), ("assistant", "A cat."), ("user", "And that?"), ("assistant", "A black dog.")]
TURNS = {"messages": [{"role": role, "content": content} for role, content in TALK]}
ANSWER = {"prompt": "The best way to ", "completion": "learn is to try."}
TEXT = {"text": "You can find it in the house."}


def tokenizer(template=TEMPLATE):
    made = byte_tokenizer()
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A directory with a stock Llama and a tokenizer of bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("stock")
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A directory with a multi-head model whose blocks are masked."""
    path = tmp_path_factory.mktemp("sparse")
    trained("neurotrails").save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def rows(path, example, count=8):
    path.write_text("".join(json.dumps(example) + "\n" for _ in range(count)))
    return path


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the program on 8 examples; returns the trainer."""
    made = []
    kept = finetune.finetune
    monkeypatch.setattr(finetune, "finetune", lambda *args: made.append(kept(*args)))

    def run(model, example=TEXT, output="out", **options):
        options = {"max_steps": 3, "learning_rate": 1e-3, "max_length": 64, "logging_steps": 1, **options}
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        data = example if isinstance(example, str) else str(rows(tmp_path / "data.jsonl", example))
        main(["--model", str(model), "--data", data, "--output_dir", str(tmp_path / output), "--use_cpu", "true",
              "--disable_tqdm", "true", "--report_to", "none", *words])  # fmt: skip
        return made[-1]

    return run


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def learned(trainer):
    """The texts of the first batch's labels."""
    batch = next(iter(trainer.get_train_dataloader()))
    decode = trainer.processing_class.decode
    return {decode([i for i in row.tolist() if i != -100]) for row in batch["labels"]}


# data, and where the loss is


@pytest.mark.parametrize(
    "example, expected",
    [
        (TEXT, "You can find it in the house.</s>"),
        (ANSWER, "learn is to try.</s>"),
        (TURNS, "A black dog.\n"),  # the template marks nothing: the last answer
    ],
    ids=["text", "completion", "messages"],
)
def test_the_loss_is_on_answers_only(stock, run, example, expected):
    trainer = run(stock, example)
    assert learned(trainer) == {expected}
    assert len(losses(trainer)) == 3 and losses(trainer)[-1] < losses(trainer)[0]


def test_a_template_that_marks_answers_has_all_of_them_learned(stock, run, tmp_path):
    path = tmp_path / "marked.jinja"
    path.write_text(MARKED)
    assert learned(run(stock, TURNS, chat_template_path=path, max_steps=1)) == {"A cat.\nA black dog.\n"}


def test_the_first_loss_is_the_mean_over_the_heads(stock, run):
    first = losses(run(stock, ANSWER, gradient_accumulation_steps=2, per_device_train_batch_size=4, max_steps=1))[0]
    model = NeuroTrailsForCausalLM.from_stock(stock)
    finetune.add_noise(model, 0.01, 42)
    prompt, ids = (tokenizer()(text, return_tensors="pt")["input_ids"] for text in
                   (ANSWER["prompt"], ANSWER["prompt"] + ANSWER["completion"] + "</s>"))  # fmt: skip
    labels = ids.clone()
    labels[:, : prompt.shape[1]] = -100
    expected = model(ids, labels=labels).head_losses
    assert first == pytest.approx(expected.mean().item(), rel=1e-5) and expected.std() > 0


# packing


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_are_apart(sparse, tmp_path, attention):
    from datasets import Dataset

    texts = ["The best way to learn.", "It was a dark night in the house.", "Try."]
    model = NeuroTrailsForCausalLM.from_pretrained(sparse, attn_implementation=attention)
    args = SFTConfig(str(tmp_path), packing=True, max_length=96, use_cpu=True, bf16=False, report_to="none",
                     gradient_checkpointing=False)  # fmt: skip
    data = Dataset.from_dict({"text": texts})
    trainer = HeadsTrainer(model, args, train_dataset=data, processing_class=tokenizer())
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch
    assert (batch["position_ids"] == 0).sum() >= 3  # a row of all three
    alone = []
    for text in texts:
        ids = tokenizer()(text + "</s>", return_tensors="pt")["input_ids"]
        alone.append(model(ids, labels=ids).head_losses * (ids.shape[1] - 1))
    expected = sum(alone) / sum(len(text) for text in texts)
    for mode in (True, False):
        packed = model.train(mode)(**batch, use_cache=False).head_losses
        torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)
    assert trainer.compute_loss(model.train(), batch).item() == pytest.approx(expected.mean().item(), rel=1e-5)
    del batch["position_ids"]
    together = model.train()(**batch, use_cache=False).head_losses
    assert (together - expected).abs().max() > 1e-3  # the comparison can fail


# which weights learn


def changed(trainer, before):
    after = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize("train", ["all", "heads"])
def test_the_chosen_weights_learn_and_zeros_stay(sparse, run, tmp_path, train):
    before = NeuroTrailsForCausalLM.from_pretrained(sparse).state_dict()
    trainer = run(sparse, train=train, weight_decay=0.1)
    moved, names = changed(trainer, before), {name for name in before if not name.endswith("weight_mask")}
    assert moved == {name for name in names if train == "all" or "heads." in name}
    saved = NeuroTrailsForCausalLM.from_pretrained(tmp_path / "out")
    assert masked_modules(saved) and not check_masks(saved)
    masks = {name: value for name, value in saved.state_dict().items() if name.endswith("weight_mask")}
    assert all(torch.equal(value, before[name]) for name, value in masks.items())


def test_what_is_saved_loads_and_generates(stock, run, tmp_path):
    run(stock, TURNS, num_ensemble_heads=2, blocks_in_head=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.num_ensemble_heads, model.config.blocks_in_head) == (2, 1)
    made = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = made.apply_chat_template(TURNS["messages"][:1], add_generation_prompt=True, return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] <= ids["input_ids"].shape[1] + 3
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 3


def test_adapters_are_of_the_heads_and_are_merged(stock, run, tmp_path):
    before = NeuroTrailsForCausalLM.from_stock(stock).state_dict()
    trainer = run(stock, train="lora", lora_r=4, learning_rate=1e-2, head_noise=0)
    saved = load_file(tmp_path / "out" / "checkpoint-3" / "adapter_model.safetensors")
    assert {name.split(".")[3] for name in saved} == {"heads"} and len(saved) == 3 * 2 * 7 * 2
    merged = NeuroTrailsForCausalLM.from_pretrained(tmp_path / "out")
    moved = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    linear = {name for name in before if name.startswith("model.heads.") and name.endswith("proj.weight")}
    assert moved == linear and len(linear) == 3 * 2 * 7
    ids = torch.arange(10, 30)[None]
    assert torch.equal(merged(ids).logits, trainer.model.get_base_model().eval()(ids).logits)
    losses_of_heads = merged(ids, labels=ids).head_losses
    assert len(set(losses_of_heads.tolist())) == 3  # adapters begin at random


def test_a_student_learns_from_the_ensemble(sparse, run, tmp_path):
    before = NeuroTrailsForCausalLM.from_pretrained(sparse)
    data = rows(tmp_path / "validation.jsonl", TEXT, 2)
    trainer = run(sparse, train="trail", trail=1, distil=1.0, temperature=1.0, max_steps=20, learning_rate=3e-3,
                  validation=data, eval_strategy="steps", eval_steps=10)  # fmt: skip
    assert losses(trainer)[-1] < 0.5 * losses(trainer)[0]
    grown = trainer.model.state_dict()
    assert all(torch.equal(value, grown[name]) for name, value in before.state_dict().items())
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(student) is LlamaForCausalLM
    old = before.extract_trail(1).state_dict()
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, old[name])}
    assert moved and not any(name.startswith(("model.embed", "model.layers.0.")) for name in moved)
    up = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(student.state_dict()[up] == 0, old[up] == 0)
    records = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    ids = tokenizer()(TEXT["text"] + "</s>", return_tensors="pt")["input_ids"]
    assert records[-1]["eval_loss"] == pytest.approx(student(ids, labels=ids).loss.item(), rel=1e-4)
    expected = torch.nn.functional.cross_entropy(before(ids).logits[0, :-1], ids[0, 1:])
    assert records[-1]["eval_ensemble_loss"] == pytest.approx(expected.item(), rel=1e-4)


# evaluation, resuming


def test_evaluation_is_of_the_ensemble(stock, run, tmp_path):
    data = rows(tmp_path / "validation.jsonl", ANSWER, 2)
    trainer = run(stock, ANSWER, validation=data, max_steps=1)
    record = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    model = NeuroTrailsForCausalLM.from_pretrained(tmp_path / "out")
    ids = tokenizer()(ANSWER["prompt"] + ANSWER["completion"] + "</s>", return_tensors="pt")["input_ids"]
    start = len(ANSWER["prompt"])
    output = model(ids)
    expected = torch.nn.functional.cross_entropy(output.logits[0, start - 1 : -1], ids[0, start:])
    assert record["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert record["eval_head_loss"] >= record["eval_loss"]


@pytest.mark.parametrize("kind, train", [("stock", "all"), ("sparse", "heads"), ("stock", "lora"), ("sparse", "trail")])
def test_a_resumed_run_equals_an_uninterrupted_one(request, run, tmp_path, kind, train):
    model = request.getfixturevalue(kind)
    options = {"train": train, "max_steps": 4, "save_steps": 2, "lr_scheduler_type": "constant"}
    run(model, TURNS, **options)
    run(model, TURNS, output="again", **options | {"max_steps": 2})
    run(model, TURNS, output="again", **options, resume_from_checkpoint="true")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


# bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train": "head"}, r"train='head': accepted is all, heads, lora, trail \(did you mean heads\?\)"),
        ({"distil": "2"}, r"distil=2.0: accepted is a number in \[0, 1\]"),
        ({"distil": "much"}, "argument --distil: invalid float value: 'much'"),
        ({"lernrate": "1"}, "--lernrate"),
        ({"head_noise": "0"}, "head_noise=0: the heads are equal and would stay so; accepted is a number above 0"),
        ({"train": "trail"}, "train=trail: .* has one trail; accepted is a checkpoint of several heads"),
        ({"label_smoothing_factor": "0.1"}, r"label_smoothing_factor=0.1: accepted is 0.0"),
        ({"loss_type": "dft"}, "loss_type='dft': accepted is 'nll'"),
        ({"resume_from_checkpoint": "true"}, "resume_from_checkpoint='true': accepted is the directory"),
        ({"chat_template_path": "no.jinja"}, "chat_template_path='no.jinja': cannot be read"),
        ({"eval_strategy": "steps"}, "eval_strategy"),
        ({"model": "nowhere"}, "nowhere: accepted is a checkpoint directory or a hub id"),
        ({"example": {"question": "a"}}, "data=.*: the columns are question; accepted are messages, or prompt and"),
        ({"example": {"text": 3}}, "data=.*: text: holds int64; accepted are"),
        ({"example": {"text": None}}, "data=.*: text: 8 values are missing; accepted are"),
        ({"example": {"messages": TURNS["messages"][:1]}}, "data: conversation 1 has no answer"),
        ({"example": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(stock, run, tmp_path, options, message):
    with pytest.raises((ValueError, OSError), match=message) as error:
        run(**{"model": stock, **options})
    assert "\n" not in str(error.value).strip() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_sharded_launches_are_refused(monkeypatch, tmp_path, name):
    args = SFTConfig(str(tmp_path / "out"), use_cpu=True, bf16=False)
    finetune._check_trainer(args)
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(ValueError, match=f"{name}=.*: accepted is one process, or data parallel ones"):
        finetune._check_trainer(args)


def test_an_output_directory_must_be_given(stock):
    with pytest.raises(ValueError, match="output_dir='': accepted is a text that is not empty"):
        main(["--model", str(stock), "--data", "sample:train"])


def test_bad_input_for_a_model_of_several_heads(sparse, run, tmp_path):
    for options, message in (
        ({"num_ensemble_heads": 2}, "num_ensemble_heads=2: accepted is 3, as in"),
        ({"train": "lora"}, "train=lora: model.heads.0.layers.0.* is masked, and adapters would fill its zeros"),
        ({"train": "trail", "trail": 3}, "trail=3: accepted is a head from 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            run(sparse, **options)
    assert not (tmp_path / "out").exists()


def test_conversations_need_a_template(run, tmp_path):
    trained("neurotrails").save_pretrained(tmp_path / "model")
    tokenizer(None).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="data: holds conversations, and the tokenizer has no chat template"):
        run(tmp_path / "model", TURNS)
