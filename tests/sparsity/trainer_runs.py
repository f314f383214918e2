"""Runs of Trainer with the sparsity callback on small stock models."""

import torch
from sparse_nets import tiny_vit
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from nt_hf.sparsity.config import SparsityConfig
from nt_hf.sparsity.first_masks import draw_masks
from nt_hf.sparsity.trainer_callback import SparsityCallback

VOCABULARY = 64


def gpt2():
    config = GPT2Config(
        n_layer=2,
        n_embd=32,
        n_head=2,
        n_positions=16,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    # The sequences count up in steps of 1 to 5.
    rows = [(torch.arange(12) * (i % 5 + 1) + i) % VOCABULARY for i in range(64)]
    return GPT2LMHeadModel(config), [{"input_ids": row, "labels": row} for row in rows]


def vit():
    noise = torch.Generator().manual_seed(0)
    kinds = torch.randn(4, 3, 32, 32, generator=noise)
    images = [kinds[i % 4] + 0.3 * torch.randn(3, 32, 32, generator=noise) for i in range(64)]
    return tiny_vit(), [{"pixel_values": image, "labels": i % 4} for i, image in enumerate(images)]


MODELS = {"gpt2": gpt2, "vit": vit}


def sparsity(**fields):
    return SparsityConfig(**{"density": 0.5, "update_interval": 4, "drop_fraction": 0.3} | fields)


def make(directory, config=None, name="gpt2", *, before=(), after=(), seed=0, callback=None, evaluate=False, **args):
    """A Trainer of a fresh sparse model and its callback; ``before`` and ``after`` are callbacks around it."""
    torch.manual_seed(seed)
    model, data = MODELS[name]()
    config = config or sparsity()
    draw_masks(model, config)
    callback = callback or SparsityCallback(config)
    defaults = {
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    trainer = Trainer(
        model,
        TrainingArguments(output_dir=str(directory), use_cpu=True, report_to=[], disable_tqdm=True, **defaults | args),
        train_dataset=data,
        eval_dataset=data[:16] if evaluate else None,
        callbacks=[*before, callback, *after],
    )
    return trainer, callback


class At(TrainerCallback):
    """Calls functions of ``(args, state, control, **kwargs)`` at events, by their names."""

    def __init__(self, **events):
        for event, function in events.items():
            setattr(self, event, function)


def stop_at(step):
    def on_step_end(args, state, control, **_):
        control.should_save = control.should_training_stop = state.global_step == step

    return At(on_step_end=on_step_end)


def losses(trainer):
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]
