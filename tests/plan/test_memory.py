"""The planner's memory against what real training steps allocate.

Measured by the allocator's own events, which see what operations allocate within themselves as well.
"""

import functools
import gc

import pytest
import torch
from plan_models import BASE, WIDE, resident, step, training
from torch.autograd import profiler

from nt_hf import NeuroTrailsLlamaConfig, SparsityConfig
from nt_hf.models.losses import CACHED
from nt_hf.plan.memory import step_memory
from nt_hf.plan.parameters import count_parameters
from nt_hf.plan.step import LOSS, WAITING, StepSettings, record_step


def allocated(function) -> int:
    """Most bytes allocated at one time while ``function`` runs, beyond what there was before."""
    gc.collect()
    with profiler.profile(profile_memory=True) as profile:
        function()
    events = [(e.start_ns(), e.nbytes()) for e in profile.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        live += size
        peak = max(peak, live)
    return peak


def test_the_measurement_on_a_case_done_by_hand():
    def function():
        a = torch.empty(1000, 1000)
        b = a + 1  # two of 4 MB
        del a
        c = b * 2  # two again
        del b
        d = torch.empty(3, 1000, 1000)  # and 12 MB beside the last
        del c, d

    assert allocated(function) == 16_000_000
    before = resident()
    kept = torch.empty(1000, 1000)
    assert resident() - before == kept.nbytes


# Changes of the model, sequences, length. Activations, logits, weights, or a topology update weigh most in turn.
SHAPES = {
    "base": ({}, 8, 128),
    "few words": ({"vocab_size": 64, "num_hidden_layers": 4, "blocks_in_head": 2, "num_ensemble_heads": 2}, 4, 256),
    "dense, single": ({"num_ensemble_heads": 1}, 16, 64),
    "full ensemble": ({"blocks_in_head": 6, "share_embedding": False, "num_ensemble_heads": 2}, 4, 64),
    "only LM heads": ({"blocks_in_head": 0, "vocab_size": 3000}, 4, 128),
    "tied": ({"tie_word_embeddings": True, "num_hidden_layers": 3, "blocks_in_head": 2}, 4, 100),
    "gqa, few tokens": (
        {"num_key_value_heads": 2, "hidden_size": 256, "intermediate_size": 640, "vocab_size": 2000},
        2,
        64,
    ),
}
MODES = ("head by head", "all heads", "checkpointing", "order per head")
# Every mode once, each shape and type that behaves in a way of its own; the rest is slow.
QUICK = {
    ("few words", False, "order per head"), ("few words", True, "head by head"),
    ("tied", False, "all heads"), ("only LM heads", True, "checkpointing"),
}  # fmt: skip


def steps_measured():
    for shape in SHAPES:
        for bf16 in (False, True):
            for mode in MODES:
                marks = [] if (shape, bf16, mode) in QUICK else pytest.mark.slow
                yield pytest.param(shape, bf16, mode, marks=marks, id=f"{shape}-{'bf16' if bf16 else 'fp32'}-{mode}")


@pytest.mark.parametrize(("shape", "bf16", "mode"), steps_measured())
def test_memory_of_a_step_is_what_was_measured(shape, bf16, mode):
    changes, rows, length = SHAPES[shape]
    passes = 1 + (shape in ("base", "tied"))  # accumulated gradients on some
    own, by_head = mode == "order per head", mode in ("head by head", "order per head")
    model, sparsifier, held = training(changes, checkpointing=mode == "checkpointing", head_by_head=by_head)
    step(model, sparsifier, rows, length, bf16, passes, own)
    fixed = held()
    measured = fixed + allocated(lambda: step(model, sparsifier, rows, length, bf16, passes, own))
    with_update = fixed + allocated(lambda: step(model, sparsifier, rows, length, bf16, passes, own))

    config = NeuroTrailsLlamaConfig(**BASE | changes)
    setting = StepSettings(
        rows, length, bf16, checkpointing=mode == "checkpointing", passes=passes, device="cpu",
        head_by_head=by_head, order_per_head=own,
    )  # fmt: skip
    passed, update = memory(config, sparsifier.config, setting)
    held = sum(passed.items[name] for name in ("weights, fp32", "Adam's moments, fp32", "masks, topology state"))
    assert held == pytest.approx(fixed, rel=0.01)
    assert passed.total == pytest.approx(measured, rel=0.01)
    assert max(passed.total, update.total) == pytest.approx(with_update, rel=0.1)


def memory(config, sparsity, setting):
    return step_memory(functools.partial(record_step, config), count_parameters(config, sparsity), setting)


def at_sparsifiers_step(model, sparsifier, held) -> int:
    """Bytes held at most while the sparsifier steps behind a backward pass."""
    ids, before = torch.arange(32)[None], held()
    model(ids, labels=ids, use_cache=False).loss.backward()
    before += sum(p.grad.nbytes for p in model.parameters())
    return before + allocated(sparsifier.step)


@pytest.mark.parametrize("density", [0.5, pytest.param(0.9, marks=pytest.mark.slow)])
def test_memory_of_a_topology_update(density):
    changes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 3, "blocks_in_head": 2}
    model, sparsifier, held = training(changes, density)
    step(model, sparsifier, 1, 32, False, 1)
    step(model, sparsifier, 1, 32, False, 1)
    measured = at_sparsifiers_step(model, sparsifier, held)
    assert sparsifier.steps == 3
    config = NeuroTrailsLlamaConfig(**BASE | changes)
    moments = memory(config, sparsifier.config, StepSettings(1, 32, False, device="cpu"))
    assert moments[-1].name == "topology update"
    assert moments[-1].total == pytest.approx(measured, rel=0.1)


def test_memory_of_the_copies_for_dense_second_moments():
    model, sparsifier, held = training({}, second_moments="dense", update_interval=100)
    step(model, sparsifier, 1, 32, False, 1)
    measured = at_sparsifiers_step(model, sparsifier, held)
    config, setting = NeuroTrailsLlamaConfig(**BASE), StepSettings(1, 32, False, device="cpu")
    *_, copies = memory(config, sparsifier.config, setting)
    assert copies.name == "copies of gradients"
    assert copies.total == pytest.approx(measured, rel=0.02)
    assert memory(config, SparsityConfig(density=0.5), setting)[-1].name == "topology update"


def test_fsdp2_divides_what_it_can_and_ddp_adds_buckets():
    def by(strategy: str, **changes) -> dict[str, float]:
        config, settings = NeuroTrailsLlamaConfig(**WIDE | changes), StepSettings(8, 64, strategy=strategy, ranks=8)
        return memory(config, SparsityConfig(density=0.5), settings)[0].items

    one, ddp, fsdp = by("one process"), by("DDP"), by("FSDP2")
    weights = 4 * count_parameters(NeuroTrailsLlamaConfig(**WIDE), SparsityConfig()).all.total
    assert ddp["DDP's buckets"] == weights and one["DDP's buckets"] == fsdp["DDP's buckets"] == 0
    assert (fsdp["weights, fp32"], fsdp["Adam's moments, fp32"]) == (weights / 8, 2 * weights / 8)
    assert one == ddp | {"DDP's buckets": 0}
    # Two blocks of 2 * 64 * (64 + 32) + 3 * 64 * 96 + 2 * 64 weights, of which there are no other copies.
    assert (fsdp["gathered weights"], fsdp["bf16 copies of weights"]) == (2 * 2 * 30_848, 0)
    # The activations of all three heads are there, not of one alone.
    a_head = fsdp["activations"] - by("FSDP2", num_ensemble_heads=2)["activations"]
    assert fsdp["activations"] - ddp["activations"] == pytest.approx(2 * a_head, rel=0.01)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_gpu_does_not_copy_logits_to_fp32(device):
    config = NeuroTrailsLlamaConfig(**WIDE | {"num_ensemble_heads": 1, "vocab_size": 20_000})
    moments = record_step(config, StepSettings(1, 200, device=device))
    found = max(amounts[LOSS] + amounts[WAITING] for name, amounts in moments if name == "loss of lm_heads.0")
    # One chunk. bf16 copies of input and LM head; logits, and log-probabilities of all rows, on a CPU of some, where
    # their logits are in fp32 as well; or the gradient of logits in bf16, and that of the LM head in bf16 and fp32.
    matrix, logits = 64 * 20_000, 200 * 20_000
    rows = min(200, CACHED["cpu"] * torch.get_num_threads() // 20_000)
    at_once = {"cuda": 4 * logits, "cpu": (4 + 4) * 20_000 * rows}
    wanted = 2 * (64 * 200 + matrix) + 2 * logits + max(at_once[device], (2 + 4) * matrix)
    assert found == pytest.approx(wanted, rel=0.01)


def test_a_gpus_loss_has_larger_chunks():
    config, rows = NeuroTrailsLlamaConfig(**WIDE | {"num_ensemble_heads": 1, "vocab_size": 5000}), 10
    most = {
        device: max(amounts[LOSS] for _, amounts in record_step(config, StepSettings(rows, 300, False, device=device)))
        for device in ("cpu", "cuda")
    }
    # 256 positions at a time: logits, which their gradient overwrites, and those of the chunk before. Or all 3,000 at
    # one time: logits and log-probabilities.
    assert most["cpu"] == pytest.approx(2 * 4 * 256 * 5000, rel=0.1)
    assert most["cuda"] == pytest.approx(2 * 4 * 3000 * 5000, rel=0.1)
