"""The planner against real models: parameters, FLOPs, and the memory of a real training step."""

import contextlib
import gc
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SIZES, VARIANTS
from torch.autograd import profiler
from torch.utils.flop_counter import FlopCounterMode

from nt_hf import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM, Sparsifier, SparsityConfig, draw_masks
from nt_hf.cli import plan as program
from nt_hf.cli.program import run
from nt_hf.config import TrainConfig, load_run_config
from nt_hf.models.masks import count_active, masked_modules
from nt_hf.plan.flops import count_flops
from nt_hf.plan.hardware import GIB, GPUS, find_gpu, peak_tflops
from nt_hf.plan.memory import StepSettings, block_activations, step_memory
from nt_hf.plan.network import Communication, communication, overlap
from nt_hf.plan.parameters import count_parameters
from nt_hf.plan.planner import checkpoint_size, plan
from nt_hf.plan.report import report
from nt_hf.training.optimizer import make_optimizer

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs"
PAGES = "\n".join((ROOT / "docs" / page).read_text() for page in ("several-gpus.md", "internals/memory.md"))


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


def sparsifier_of(model, sparsity) -> Sparsifier:
    return Sparsifier(model, make_optimizer(model, TrainConfig()), sparsity, total_steps=100)


# ------------------------------------------------------------------------------------------------------ FLOPs

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


def run_config(model: dict, **sections: dict):
    overrides = {
        f"{section}.{key}": str(value) for section, values in sections.items() for key, value in values.items()
    }
    config = load_run_config([], overrides)
    config.model = {key: value for key, value in model.items() if key != "max_position_embeddings"}
    return config


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


# ----------------------------------------------------------------------------------------------------- memory
# Measured by the allocator's own events, which see what operations allocate within themselves as well.


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


def resident() -> int:
    """Bytes of all tensors there are."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and not each.is_meta]
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())


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


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("changes", "rows", "length"),
    [({}, 2, 32), ({"num_key_value_heads": 4}, 3, 16), ({"head_dim": 32, "intermediate_size": 200}, 1, 64)],
    ids=["gqa", "mha", "wide heads"],
)
def test_a_block_keeps_what_the_formula_says(changes, rows, length, bf16):
    config = NeuroTrailsLlamaConfig(**WIDE | changes)
    model = NeuroTrailsLlamaForCausalLM(config).train()
    block = model.model.layers[0]
    states = torch.randn(rows, length, 64, requires_grad=True)
    tables = model.model.rotary_emb(states, torch.arange(length)[None])
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        block(states, position_embeddings=tables, attention_mask=None)
    for tensor in [*block.parameters(), *tables]:
        kept.pop(tensor.untyped_storage()._cdata, None)
    # Copies of weights under autocast are counted apart.
    copies = sum(2 * p.numel() for p in block.parameters() if p.dim() == 2) if bf16 else 0
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert found - copies == rows * length * block_activations(config, bf16)


BASE = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "blocks_in_head": 4,
    "max_position_embeddings": 256,
}
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


def training(changes: dict, density: float = 0.5, checkpointing: bool = False, head_by_head: bool = True):
    """A model, its optimizer and sparsifier, and the bytes they hold once the optimizer has its state."""
    before = resident()
    torch.manual_seed(0)
    model = NeuroTrailsLlamaForCausalLM(NeuroTrailsLlamaConfig(**BASE | changes)).train()
    sparsity = SparsityConfig(density=density, update_interval=3)
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


MODES = ("head by head", "all heads", "checkpointing", "order per head")


def steps_measured():
    """A Latin square: every shape in both types, every mode in both and with three or four shapes; the rest is slow."""
    for s, shape in enumerate(SHAPES):
        for bf16 in (False, True):
            for m, mode in enumerate(MODES):
                marks = [] if m == (s + 2 * bf16) % len(MODES) else pytest.mark.slow
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
    moments = step_memory(config, count_parameters(config, sparsifier.config), setting)
    state = sum(moments[0].items[name] for name in ("weights, fp32", "Adam's moments, fp32", "masks, topology state"))
    assert state == pytest.approx(fixed, rel=0.01)
    plain = max(moment.total for moment in moments if moment.name != "topology update")
    assert plain == pytest.approx(measured, rel=0.1)
    assert max(moment.total for moment in moments) == pytest.approx(with_update, rel=0.1)


@pytest.mark.parametrize("density", [0.5, 0.9])
def test_memory_of_a_topology_update(density):
    changes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 3, "blocks_in_head": 2}
    model, sparsifier, held = training(changes, density)
    step(model, sparsifier, 1, 32, False, 1)
    step(model, sparsifier, 1, 32, False, 1)
    before = held()
    ids = torch.arange(32)[None]
    model(ids, labels=ids, use_cache=False).loss.backward()
    before += sum(p.grad.nbytes for p in model.parameters())
    measured = before + allocated(sparsifier.step)
    assert sparsifier.steps == 3
    config = NeuroTrailsLlamaConfig(**BASE | changes)
    moments = step_memory(config, count_parameters(config, sparsifier.config), StepSettings(1, 32, False, device="cpu"))
    assert moments[-1].name == "topology update"
    assert moments[-1].total == pytest.approx(measured, rel=0.1)


def test_fsdp2_divides_what_it_can_and_ddp_adds_buckets():
    config = NeuroTrailsLlamaConfig(**BASE)
    parameters = count_parameters(config, SparsityConfig(density=0.5))
    one, ddp, fsdp = (
        step_memory(config, parameters, StepSettings(8, 128, strategy=name, ranks=8))[0].items
        for name in ("one process", "DDP", "FSDP2")
    )
    weights = 4 * parameters.all.total
    assert ddp["DDP's buckets"] == weights and one["DDP's buckets"] == fsdp["DDP's buckets"] == 0
    assert (fsdp["weights, fp32"], fsdp["Adam's moments, fp32"]) == (weights / 8, 2 * weights / 8)
    # The activations of two more heads.
    more = 2 * 1024 * (4 * block_activations(config, True) + 4 * 128 + 4)
    assert fsdp["activations"] - ddp["activations"] == more


# --------------------------------------------------------------------------------- GPUs, disk, network, time


def test_gpus():
    assert find_gpu("H100") == find_gpu("h-100") and find_gpu("RTX 4090").memory_gib == 24
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989 and peak_tflops("NVIDIA H100 PCIe") == 756
    assert peak_tflops("NVIDIA B200") == 2250 and peak_tflops("NVIDIA GeForce RTX 4090") == 165
    with pytest.raises(ValueError, match=r"--gpu v100: accepted are b200, h200, .*rtx-4090$"):
        find_gpu("v100")
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)


def test_communication_by_hand():
    h100 = find_gpu("h100")
    weights = 1_000_000_000
    config = NeuroTrailsLlamaConfig(**BASE)

    def by(strategy: str, ranks: int, passes: int, **changes):
        setting = StepSettings(1, 64, strategy=strategy, ranks=ranks, passes=passes, **changes)
        return communication(config, weights, setting, h100, 8)

    one_node = by("DDP", 8, 4)
    assert one_node.sent == 2 * 7 / 8 * 4e9  # once a step, however many passes
    assert one_node.seconds == pytest.approx(2 * 7 / 8 * 4e9 / 450e9)
    nodes = by("DDP", 64, 1)
    assert nodes.seconds == pytest.approx(2 * 7 / 8 * 4e9 / 450e9 + 2 * 7 / 8 * 0.5e9 / 50e9)
    assert by("FSDP2", 8, 2).sent == 7 / 8 * 2 * (2e9 + 2e9 + 4e9)
    assert by("FSDP2", 8, 2, bf16=False).sent == 7 / 8 * 2 * 12e9


def test_overlap_by_hand():
    config = NeuroTrailsLlamaConfig(**BASE)
    block = 2 * (4 * 128 * 128 + 3 * 128 * 352) + 4 * 128 * 64
    every = 14 * block + 3 * 2 * 128 * 1000

    def of(**changes) -> float:
        return overlap(config, StepSettings(1, 64, ranks=8, **changes))

    assert of(strategy="DDP") == pytest.approx(2 / 3 * 2 * block / every)  # the backbone's backward pass
    assert of(strategy="DDP", checkpointing=True, passes=4) == pytest.approx(2 / 3 / 4)
    assert of(strategy="FSDP2", passes=4) == 1
    found = Communication("DDP", 0, seconds=2.0, overlap=0.5)
    assert (found.step_seconds(1.0), found.step_seconds(10.0)) == (2.5, 10.0)


@pytest.mark.parametrize("save_dtype", ["float32", "bfloat16"])
def test_size_of_a_checkpoint(tmp_path, save_dtype):
    settings = run_config(BASE, sparsity={"density": 0.5}, train={"save_dtype": save_dtype})
    model, sparsifier, _ = training({})
    step(model, sparsifier, 1, 16, False, 1)
    size = checkpoint_size(settings, count_parameters(NeuroTrailsLlamaConfig(**BASE), settings.sparsity))
    state = [value for each in sparsifier.optimizer.state.values() for value in each.values()]
    state += sparsifier.state_dict().values()
    state += model.state_dict().values() if save_dtype == "bfloat16" else []
    model.to(getattr(torch, save_dtype)).save_pretrained(tmp_path)
    assert size.model == pytest.approx((tmp_path / "model.safetensors").stat().st_size, rel=0.02)
    masters = 2 * sum(p.nbytes for p in model.parameters()) if save_dtype == "bfloat16" else 0
    masks = sum(module.weight_mask.nbytes for module in masked_modules(model).values())
    moments = sum(value.nbytes for value in state[: 3 * len(sparsifier.optimizer.state)])
    topology = sum(value.nbytes for value in sparsifier.state_dict().values())
    assert size.training_state == pytest.approx(moments + topology + masters + masks * bool(masters), rel=0.02)


def test_time_is_flops_over_the_assumed_share_of_the_peak():
    settings = load_run_config([CONFIGS / "350m.yaml"])
    found = plan(settings, 8, find_gpu("h100"), mfu=0.5)
    assert found.schedule.tokens == 22223 * 512 * 256
    wanted = found.flops.training * found.schedule.tokens / (8 * 989e12 * 0.5)
    assert found.schedule.hours * 3600 == pytest.approx(wanted)


def test_what_does_not_fit_is_told_with_what_would():
    settings = load_run_config([CONFIGS / "1b.yaml"], {"train.gradient_checkpointing": "false"})
    small = plan(settings, 8, find_gpu("a100-40gb"))
    assert not small.memory[0].fits and small.memory[0].settings.strategy == "DDP"
    assert small.remedies and all("FSDP2" in remedy for remedy in small.remedies)  # the weights alone are too large
    text = report(small)
    assert "WARNING: DDP, as configured, does not fit" in text and small.remedies[0] in text
    assert "WARNING" not in report(plan(load_run_config([CONFIGS / "60m.yaml"]), 1, find_gpu("h100")))
    crowded = plan(load_run_config([CONFIGS / "350m.yaml"]), 8, find_gpu("a100-40gb"))
    usable = 40 * GIB * 0.9
    assert crowded.memory[0].peak.total > usable > crowded.memory[1].peak.total
    assert "--train.micro_batch_size 32" in crowded.remedies
    assert "--train.gradient_checkpointing true" in crowded.remedies


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gpus 0", "--gpus 0, --gpus_per_node 8: accepted are whole numbers from 1"),
        ("--gpus 12", "--gpus 12: accepted are up to 8, a node's, and multiples of it"),
        ("--gpus 64", "train.batch_size=512: accepted is a multiple of micro_batch_size * processes = 64 * 64"),
        ("--gpu v100", "--gpu v100: accepted are b200, h200"),
        ("--mfu 2", "--mfu 2: accepted is a number in (0, 1]"),
        ("--model.hidden_sise 8", "unknown key --model.hidden_sise: did you mean hidden_size?"),
        ("--gpuss 8", "--gpuss: unknown argument; accepted are configuration keys, --section.key value"),
        ("--model.hidden_size", "--model.hidden_size: has no value"),
        ("--model.hidden_size 100", "num_attention_heads=16: accepted is a divisor of hidden_size=100"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["plan", "--config", str(CONFIGS / "350m.yaml"), *arguments.split()])
    with pytest.raises(SystemExit) as caught:
        run(program.main)
    assert str(caught.value).startswith(f"error: {message}") and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ the document


def printed(command: str) -> str:
    """What ``nt-hf plan …`` prints, by its parts."""
    arguments = shlex.split(command.removeprefix("nt-hf plan "))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["plan", *arguments])
        texts = []
        patch.setattr(sys, "stdout", type("Lines", (), {"write": staticmethod(texts.append)}))
        program.main()
    return "".join(texts)


def test_the_document_shows_what_the_planner_prints():
    blocks = re.findall(r"```\n\$ (nt-hf plan [^\n]+)\n(.*?)```", PAGES, flags=re.DOTALL)
    assert len(blocks) >= 2
    for command, text in blocks:
        assert printed(re.sub(r"--config (\w+)", r"--config recipes/configs/\1.yaml", command)) == text


def table() -> list[str]:
    """The table of 8 to 512 GPUs, whose rows are computed by the functions of the planner."""
    rows = []
    for size in ("350m", "1b"):
        for gpus, micro in ((8, {"350m": 64, "1b": 4}[size]), (64, 8), (512, 1)):
            settings = load_run_config([CONFIGS / f"{size}.yaml"], {"train.micro_batch_size": str(micro)})
            found = plan(settings, gpus, find_gpu("h100"))
            for each in found.communication:
                lean = [m.peak.total / GIB for m in found.memory if m.settings.strategy == each.name]
                compute = found.schedule.step_seconds
                rows.append(
                    f"| {size} | {gpus} | {found.schedule.passes} x {micro} | {each.name} "
                    f"| {lean[0]:.1f} / {lean[1]:.1f} | {compute * 1e3:.1f} | {each.sent / GIB:.2f} "
                    f"| {each.seconds * 1e3:.1f} | {each.seconds / compute:.0%} "
                    f"| {each.step_seconds(compute) * 1e3:.1f} |"
                )
    return rows


def test_the_documents_table_is_todays():
    lines = PAGES.splitlines()
    assert [line for line in lines if re.match(r"\| (350m|1b) \|", line)] == table()


def test_the_planner_is_a_program():
    command = [sys.executable, "-m", "nt_hf.plan", "--config", "recipes/configs/7b.yaml", "--gpu", "v100"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 1 and found.stderr.startswith("error: --gpu v100") and found.stderr.count("\n") == 1
