"""FSDP2 on gloo processes: the topology of sharded weights is that of whole ones, bit for bit."""

import copy

import pytest
import torch
from conftest import SIZES, VARIANTS, slow, token_ids, trained
from processes import run_on
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from nt_hf import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM, Sparsifier, SparsityConfig
from nt_hf.evaluation.perplexity import evaluate
from nt_hf.models.masks import get_mask, local, masked_modules, set_mask
from nt_hf.sparsity.first_masks import draw_masks
from nt_hf.sparsity.sharding import full_state_dict, require_equal_replicas, shard_model

STEPS = 8
# Of 4 processes with 6 rows one has none; every update takes dozens of collectives a tensor.
SMALL = SIZES | {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 1, "vocab_size": 132,
                 "num_ensemble_heads": 2}  # fmt: skip
CONFIGS = {
    "neurotrails": {},
    "static": {"update_interval": 0},
    "global": {"drop": "global_magnitude", "grow": "gradient_random"},
    "momentum": {"drop": "mest", "grow": "momentum", "redistribute": "momentum"},
    "set": {"drop": "set", "grow": "random", "regrow": "forbid"},
    "taylor": {"drop": "taylor", "redistribute": "gradient", "regrow": "forbid"},
    "gradual": {"density_start": 1.0, "drop": "magnitude"},
    "2:4": {"structure": "2:4"},
    "fan_in": {"structure": "constant_fan_in", "distribution": "uniform"},
    "dense moments": {"second_moments": "dense"},
}


def build(config: SparsityConfig, **changes) -> NeuroTrailsLlamaForCausalLM:
    torch.manual_seed(0)
    model = NeuroTrailsLlamaForCausalLM(NeuroTrailsLlamaConfig(**SMALL | {"blocks_in_head": 1} | changes))
    draw_masks(model, config)
    return model.train()


def made_up_gradients(model: nn.Module, step: int) -> None:
    """The same gradients whether a weight is sharded or not, some of them zero and equal ones among them."""
    for number, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(1000 * step + number)
        grad = torch.randn(parameter.shape, generator=generator).mul_(4).round_().div_(4)
        if isinstance(parameter, DTensor):
            # Every process has all of it, so that nothing has to be sent.
            grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.grad = grad


def update_under(processes: int, name: str) -> dict:
    """Weights, masks, moments, the sparsifier's state and what the updates said, after a few steps."""
    config = SparsityConfig(**{"density": 0.5, "update_interval": 2} | CONFIGS[name])
    model = build(config)
    if processes > 1:
        shard_model(model, init_device_mesh("cpu", (processes,)))
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.75))  # a decay by which nothing is rounded
    for parameter in model.parameters():
        zero = torch.zeros_like(parameter)
        optimizer.state[parameter] = {"step": torch.tensor(0.0), "exp_avg": zero, "exp_avg_sq": zero.clone()}
    sparsifier = Sparsifier(model, optimizer, config, STEPS)
    updates = []
    for step in range(STEPS):
        made_up_gradients(model, step)
        updates.append(sparsifier.step())
        # Not the optimizer's own step: at the ends of a tensor it rounds otherwise than in the middle.
        with torch.no_grad():
            for parameter in model.parameters():
                weight, grad, state = local(parameter), local(parameter.grad), optimizer.state[parameter]
                grad.mul_(0.5)  # as clipping does
                weight.add_(grad, alpha=-(2**-6))
                local(state["exp_avg"]).add_(grad)
                local(state["exp_avg_sq"]).add_(grad.square())
        for hook in optimizer._optimizer_step_post_hooks.values():
            hook(optimizer, (), {})
    whole = lambda x: x.full_tensor() if isinstance(x, DTensor) else x  # noqa: E731
    moments = {
        f"{key} {number}": whole(optimizer.state[parameter][key])
        for number, parameter in enumerate(model.parameters())
        for key in ("exp_avg", "exp_avg_sq")
    }
    state = {key: whole(value) for key, value in sparsifier.state_dict().items()}
    tensors = full_state_dict(model, keep=True) | moments | state
    return {"tensors": {key: value.clone() for key, value in tensors.items()}, "updates": updates,
            "report": sparsifier.report(), "ever": sparsifier.ever_active()}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "processes"),
    [
        *(slow(name, 4) for name in CONFIGS),
        ("neurotrails", 2),
        ("taylor", 2),
        ("dense moments", 2),
    ],
)
def test_updates_of_shards_are_those_of_whole_tensors(name, processes):
    expected = update_under(1, name)
    for found in run_on(processes, update_under, processes, name):
        assert found["tensors"].keys() == expected["tensors"].keys()
        for key, tensor in expected["tensors"].items():
            assert torch.equal(found["tensors"][key], tensor), key
        assert found["report"] == expected["report"] and found["ever"] == expected["ever"]
        for ours, theirs in zip(found["updates"], expected["updates"]):
            if theirs is None:
                assert ours is None
                continue
            for field, value in vars(theirs).items():
                if field.startswith("grad_norm"):
                    value = pytest.approx(value, rel=1e-6)
                assert getattr(ours, field) == value, field
    assert name == "static" or any(update and update.dropped for update in expected["updates"])


# ------------------------------------------------------------------------------------------------ forward, backward


def rows(start: int, count: int) -> torch.Tensor:
    return token_ids()[start * 40 : (start + count) * 40].view(count, 40)


def passes(processes: int, rank: int, model: NeuroTrailsLlamaForCausalLM, part: str) -> dict:
    """Losses and gradients of a pass over this process's share of four rows; only the ``part`` by name trains."""
    model = copy.deepcopy(model).train()
    model.gradient_checkpointing_enable()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
    if processes > 1:
        shard_model(model, init_device_mesh("cpu", (processes,)))
    batch = rows(100, 4).chunk(processes)[rank]
    output = model(batch, labels=batch, use_cache=False, num_items_in_batch=torch.tensor(4 * 39 // processes))
    output.loss.backward()
    gradients = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    result = evaluate(model, [{"input_ids": batch, "labels": batch}]).to_dict()
    again = model(batch, labels=batch, use_cache=False).loss  # evaluation leaves it fit for training
    again.backward()
    return {"gradients": gradients, "losses": output.head_losses.detach(), "evaluation": result}


def sharded_passes(processes: int, model: NeuroTrailsLlamaForCausalLM, part: str) -> dict:
    return passes(processes, torch.distributed.get_rank(), model, part)


PARTS = ["lm_heads.0.", "model.heads.1.", "model.layers."]  # of report B3


@pytest.mark.parametrize(("variant", "part"), [*((v, "") for v in VARIANTS), *(("neurotrails", p) for p in PARTS)])
def test_passes_through_a_sharded_model(variant, part):
    model = trained(variant, steps=10)
    expected = passes(1, 0, model, part)
    assert expected["gradients"] and all(part in name for name in expected["gradients"])
    found = run_on(2, sharded_passes, 2, model, part)
    both = sum(each["losses"] for each in found) / 2
    torch.testing.assert_close(both, expected["losses"], rtol=1e-5, atol=1e-6)
    for each in found:
        assert each["gradients"].keys() == expected["gradients"].keys()
        for name, grad in expected["gradients"].items():
            torch.testing.assert_close(each["gradients"][name], grad, rtol=1e-4, atol=1e-6, msg=name)
    loss = sum(each["evaluation"]["loss"] for each in found) / 2
    assert loss == pytest.approx(expected["evaluation"]["loss"], rel=1e-5)


# ------------------------------------------------------------------------------------------------- replicas


def diverge(what: str) -> str | None:
    """What the check says when one of two replicas has changed."""
    config = SparsityConfig(density=0.5)
    model = build(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    sparsifier = Sparsifier(model, optimizer, config, STEPS)
    made_up_gradients(model, 0)
    sparsifier.step()
    optimizer.step()
    module = model.model.layers[0].mlp.up_proj
    if torch.distributed.get_rank() == 1:
        if what == "mask":  # as many bits in each row as before
            mask = get_mask(module)
            set_mask(module, mask.roll(1, 1))
        elif what == "weight":
            module.weight.data.view(torch.int32)[3, 5] ^= 1  # its last bit
        elif what == "moment":
            optimizer.state[module.weight]["exp_avg"][0, 0] += 1
    try:
        require_equal_replicas(model, optimizer)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("nothing", None),
        ("mask", "the mask of model.layers.0.mlp.up_proj.weight"),
        ("weight", "model.layers.0.mlp.up_proj.weight"),
        ("moment", "exp_avg of model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_replicas_that_diverge_are_named(what, named):
    for message in run_on(2, diverge, what):
        if named is None:
            assert message is None
        else:
            assert message.startswith(f"{named} is not the same on process 0 as on 1: ") and "\n" not in message


def refusals() -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    messages = []

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    for shard in ((lambda m: [m.a]), (lambda m: [m.a, m.b])):
        model, config = Two(), SparsityConfig(density=0.5)
        draw_masks(model, config)
        for module in shard(model):
            module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh))
        try:
            Sparsifier(model, torch.optim.Adam(model.parameters()), config, STEPS)
        except ValueError as error:
            messages.append(str(error))
    assert local(model.a.weight).shape == (8, 8)
    return messages


def test_other_ways_to_shard_are_refused():
    for messages in run_on(2, refusals):
        assert "masked weights: some are sharded and others are not" in messages[0]
        assert "accepted is a split by rows (Shard(0))" in messages[1]


def test_every_mask_is_sharded_like_its_weight():
    assert all(run_on(2, masks_lie_like_weights))


def masks_lie_like_weights() -> bool:
    model = build(SparsityConfig(density=0.5))
    shard_model(model, init_device_mesh("cpu", (2,)))
    modules = masked_modules(model).values()
    return bool(modules) and all(local(m.weight_mask).shape[0] == local(m.weight).shape[0] for m in modules)
