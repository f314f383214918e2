"""Second moments that average dense gradients: those of an optimizer that masks gradients behind them."""

import copy
import math

import pytest
import torch
from sparse_nets import Tower, loss_of, masks_of
from torch import nn
from trainer_runs import make, sparsity

from nt_hf.models.masks import check_masks, get_mask, masked_modules
from nt_hf.sparsity.config import SparsityConfig
from nt_hf.sparsity.first_masks import draw_masks
from nt_hf.sparsity.sparsifier import Sparsifier

RATE, BETAS, EPS, DECAY, LIMIT = 0.01, (0.9, 0.99), 1e-8, 0.1, 0.02
ADAM = {"lr": RATE, "betas": BETAS, "eps": EPS}
OPTIMIZERS = {
    "adam, one by one": lambda parameters: torch.optim.Adam(parameters, foreach=False, **ADAM),
    "adam, foreach": lambda parameters: torch.optim.Adam(parameters, foreach=True, **ADAM),
    "adam, fused": lambda parameters: torch.optim.Adam(parameters, fused=True, **ADAM),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, weight_decay=DECAY, **ADAM),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, weight_decay=DECAY, amsgrad=True, **ADAM),
}
OTHERS = {
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=RATE, betas=BETAS),
    "radam": lambda parameters: torch.optim.RAdam(parameters, lr=RATE, betas=BETAS),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=RATE, alpha=BETAS[1], momentum=0.5),
}


def sparse(optimizer, **fields):
    torch.manual_seed(0)
    net = Tower()
    config = SparsityConfig(
        **{"density": 0.3, "update_interval": 4, "distribution": "uniform", "second_moments": "dense"} | fields
    )
    draw_masks(net, config)
    optimizer = optimizer(net.parameters())
    return net, optimizer, Sparsifier(net, optimizer, config, 40)


def dense_gradients(net, step):
    """Those of two accumulated batches."""
    for batch in (2 * step, 2 * step + 1):
        (loss_of(net, batch) / 2).backward()
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


class MaskingBehind:
    """Adam or AdamW in plain words, which masks gradients for the first moment alone, as the paper's code does it."""

    def __init__(self, net, decay, amsgrad):
        self.weights = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        self.first = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.second, self.highest = copy.deepcopy(self.first), copy.deepcopy(self.first)
        self.decay, self.amsgrad, self.steps = decay, amsgrad, 0

    def step(self, gradients, masks, scale):
        self.steps += 1
        for name, gradient in gradients.items():
            mask = masks.get(name, torch.ones_like(gradient, dtype=torch.bool))
            gradient = gradient * scale
            self.first[name] = (BETAS[0] * self.first[name] + (1 - BETAS[0]) * gradient) * mask
            self.second[name] = BETAS[1] * self.second[name] + (1 - BETAS[1]) * gradient**2
            self.highest[name] = torch.maximum(self.highest[name], self.second[name])
            second = self.highest[name] if self.amsgrad else self.second[name]
            mean = self.first[name] / (1 - BETAS[0] ** self.steps)
            spread = (second / (1 - BETAS[1] ** self.steps)).sqrt()
            weight = self.weights[name] * mask * (1 - RATE * self.decay)
            self.weights[name] = weight - RATE * mean / (spread + EPS) * mask


@pytest.mark.parametrize("limit", [math.inf, LIMIT], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_adam_that_masks_behind_its_second_moment(name, limit):
    net, optimizer, sparsifier = sparse(OPTIMIZERS[name])
    expected = MaskingBehind(net, DECAY if "adamw" in name or name == "amsgrad" else 0, name == "amsgrad")
    moved, clipped = 0, 0
    for step in range(20):
        gradients = dense_gradients(net, step)
        update = sparsifier.step()
        moved += update.grown if update else 0
        norm = nn.utils.clip_grad_norm_(net.parameters(), limit)
        clipped += bool(norm > limit)
        optimizer.step()
        optimizer.zero_grad()
        expected.step(gradients, masks_of(net), min(1.0, limit / (float(norm) + 1e-6)))
        for parameter_name, parameter in net.named_parameters():
            state = optimizer.state[parameter]
            close = {"rtol": 1e-4, "atol": 1e-9}
            torch.testing.assert_close(state["exp_avg_sq"], expected.second[parameter_name], **close)
            if name == "amsgrad":
                torch.testing.assert_close(state["max_exp_avg_sq"], expected.highest[parameter_name], **close)
            torch.testing.assert_close(parameter.detach(), expected.weights[parameter_name], rtol=1e-4, atol=1e-6)
        for module in masked_modules(net).values():
            inactive = ~get_mask(module)
            assert not optimizer.state[module.weight]["exp_avg"][inactive].any()
        assert check_masks(net) == []
    assert moved > 50 and clipped == (0 if limit == math.inf else 20)


@pytest.mark.parametrize("name", OTHERS)
def test_other_moving_averages(name):
    net, optimizer, sparsifier = sparse(OTHERS[name])
    key = "square_avg" if name == "rmsprop" else "exp_avg_sq"
    expected = {name: torch.zeros_like(parameter) for name, parameter in net.named_parameters()}
    for step in range(13):
        gradients = dense_gradients(net, step)
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
        for parameter_name, parameter in net.named_parameters():
            square = gradients[parameter_name] ** 2
            expected[parameter_name] = BETAS[1] * expected[parameter_name] + (1 - BETAS[1]) * square
            torch.testing.assert_close(optimizer.state[parameter][key], expected[parameter_name], rtol=1e-4, atol=1e-9)
        assert check_masks(net) == []


def test_grown_and_dropped_weights_keep_their_second_moments():
    net, optimizer, sparsifier = sparse(OPTIMIZERS["adam, fused"])
    while True:
        dense_gradients(net, sparsifier.steps)
        before = masks_of(net)
        states = {name: copy.deepcopy(optimizer.state[m.weight]) for name, m in masked_modules(net).items()}
        update = sparsifier.step()
        if update and sparsifier.steps > 4:
            break
        optimizer.step()
        optimizer.zero_grad()
    assert update.grown and update.dropped
    for name, module in masked_modules(net).items():
        state, after = optimizer.state[module.weight], get_mask(module)
        assert torch.equal(state["exp_avg_sq"], states[name]["exp_avg_sq"])
        grown = after & ~before[name]
        assert (state["exp_avg_sq"][grown] > 0).any()  # not of rows of an embedding that no text has named yet
        assert not state["exp_avg"][before[name] != after].any()


def test_weights_of_static_masks_are_the_same_and_other_second_moments_are_as_before():
    runs = {}
    for second_moments in ("gradient", "dense"):
        net, optimizer, sparsifier = sparse(OPTIMIZERS["adamw"], update_interval=0, second_moments=second_moments)
        for step in range(6):
            dense_gradients(net, step)
            assert sparsifier.step() is None
            nn.utils.clip_grad_norm_(net.parameters(), LIMIT)
            optimizer.step()
            optimizer.zero_grad()
        runs[second_moments] = net.state_dict(), optimizer
        for module in masked_modules(net).values():
            inactive = ~get_mask(module)
            assert optimizer.state[module.weight]["exp_avg_sq"][inactive].any() == (second_moments == "dense")
    weights, others = runs["gradient"][0], runs["dense"][0]
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


def test_a_step_that_is_left_out_leaves_no_trace():
    net, optimizer, sparsifier = sparse(OPTIMIZERS["adam, foreach"])
    for skips in (False, True):
        dense_gradients(net, 0)
        sparsifier.step()
        if not skips:
            optimizer.step()
        optimizer.zero_grad()
    states = copy.deepcopy(optimizer.state_dict())
    optimizer.step()  # without gradients
    found = optimizer.state_dict()
    assert all(torch.equal(x, found["state"][i][key]) for i, s in states["state"].items() for key, x in s.items())


def test_a_later_sparsifier_of_the_same_optimizer_ends_it():
    net, optimizer, sparsifier = sparse(OPTIMIZERS["adam, fused"], update_interval=0)
    dense_gradients(net, 0)
    sparsifier.step()
    config = SparsityConfig(density=0.3, update_interval=0, distribution="uniform")
    Sparsifier(net, optimizer, config, 40).step()
    optimizer.step()
    for module in masked_modules(net).values():
        assert not optimizer.state[module.weight]["exp_avg_sq"][~get_mask(module)].any()


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1), "SGD"),
        (torch.optim.Adafactor, "Adafactor"),
        (lambda parameters: torch.optim.RMSprop(parameters, centered=True), "a centered RMSprop"),
    ],
)
def test_other_optimizers_are_refused(optimizer, name):
    message = rf"^second_moments='dense': accepted with {name} is gradient; dense asks for Adam, AdamW, NAdam"
    with pytest.raises(ValueError, match=message):
        sparse(optimizer)
    with pytest.raises(ValueError, match=r"^second_moments='mean': accepted is gradient, dense$"):
        SparsityConfig(second_moments="mean")


def test_trainer_accumulates_and_clips(tmp_path):
    trainer, callback = make(
        tmp_path, sparsity(second_moments="dense"), max_steps=3, max_grad_norm=0.01, gradient_accumulation_steps=2
    )
    trainer.train()
    optimizer = callback.sparsifier.optimizer
    sparse_modules = [module for module in masked_modules(trainer.model).values() if not get_mask(module).all()]
    assert len(sparse_modules) > 5
    for module in sparse_modules:
        second, active = optimizer.state[module.weight]["exp_avg_sq"], get_mask(module)
        assert second[~active].any()
        # Of unclipped gradients they would be thousands of times as large as those of active weights.
        assert second[~active].mean() < 10 * second[active].mean()
