"""Small models for the tests of the planner, and a training step of them."""

import contextlib
import gc

import torch

from nt_hf import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM, Sparsifier, SparsityConfig, draw_masks
from nt_hf.config import RunConfig, TrainConfig, load_run_config
from nt_hf.training.optimizer import make_optimizer

WIDE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "blocks_in_head": 2,
    "max_position_embeddings": 64,
}
BASE = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "blocks_in_head": 4,
    "max_position_embeddings": 256,
}


def run_config(model: dict, **sections: dict) -> RunConfig:
    overrides = {
        f"{section}.{key}": str(value) for section, values in sections.items() for key, value in values.items()
    }
    config = load_run_config([], overrides)
    config.model = {key: value for key, value in model.items() if key != "max_position_embeddings"}
    return config


def sparsifier_of(model, sparsity) -> Sparsifier:
    return Sparsifier(model, make_optimizer(model, TrainConfig()), sparsity, total_steps=100)


def resident() -> int:
    """Bytes of all tensors there are."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and not each.is_meta]
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())


def training(changes: dict, density: float = 0.5, checkpointing: bool = False, head_by_head: bool = True, **sparsity):
    """A model, its optimizer and sparsifier, and the bytes they hold once the optimizer has its state."""
    before = resident()
    torch.manual_seed(0)
    model = NeuroTrailsLlamaForCausalLM(NeuroTrailsLlamaConfig(**BASE | changes)).train()
    sparsity = SparsityConfig(density=density, **{"update_interval": 3} | sparsity)
    draw_masks(model, sparsity)
    if checkpointing:
        model.gradient_checkpointing_enable()
    if not head_by_head:
        model._can_run_head_by_head = lambda *_: False  # as FSDP's parameters make it
    sparsifier = sparsifier_of(model, sparsity)
    return model, sparsifier, lambda: resident() - before


def step(model, sparsifier, rows: int, length: int, bf16: bool, passes: int, own: bool = False) -> None:
    optimizer = sparsifier.optimizer
    for _ in range(passes):
        ids = torch.arange(rows * length).view(rows, length) % model.config.vocab_size
        ids = ids.expand(model.config.num_ensemble_heads, -1, -1) if own else ids
        with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = model(ids, labels=ids, use_cache=False, num_items_in_batch=torch.tensor(ids.numel())).loss
        loss.backward()
        del loss
    sparsifier.step()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
