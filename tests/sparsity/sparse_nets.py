"""Small nets, made sparse and trained by the tests, and what is asked of their masks."""

import copy
from types import SimpleNamespace

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.pytorch_utils import Conv1D

from nt_hf.models.masks import (
    check_structure,
    get_mask,
    is_transposed,
    masked_modules,
)
from nt_hf.models.multi_head import MultiHeadMixin
from nt_hf.sparsity.config import SparsityConfig
from nt_hf.sparsity.first_masks import draw_masks
from nt_hf.sparsity.sparsifier import Sparsifier

LENGTH = 8
STRUCTURES = ["unstructured", "constant_fan_in", "2:4"]


class Net(MultiHeadMixin, nn.Module):
    """Every kind of module that can carry a mask, with inputs in fours, and two heads."""

    config = SimpleNamespace(num_ensemble_heads=2)
    words, batch = 24, (8, LENGTH)

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(self.words, 8)
        self.first = nn.Conv1d(8, 12, 3, padding=1)
        self.second = nn.Conv2d(4, 8, 3, padding=1)
        self.third = Conv1D(16, 24)
        self.heads = nn.ModuleList([nn.Linear(16, self.words), nn.Linear(16, self.words, bias=False)])
        with torch.no_grad():
            self.third.weight.mul_(10)

    def forward(self, ids):
        x = self.first(self.embed(ids).transpose(1, 2)).relu()
        x = self.second(x.view(-1, 4, 3, LENGTH)).relu().mean(-1).flatten(1)
        x = self.third(x).relu()
        return sum(head(x) for head in self.heads)

    def head_modules(self, head):
        return {"lm_head": self.heads[head]}


NAMES = ["embed.weight", "first.weight", "second.weight", "third.weight", "heads.0.weight", "heads.1.weight"]


class Tower(nn.Module):
    """An embedding, a tower of numbered layers, and a head."""

    words, batch = 40, (16, 4)

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(self.words, 16)
        self.layers = nn.ModuleList([nn.Linear(64, 48), nn.Linear(48, 24)])
        self.head = nn.Linear(24, self.words)

    def forward(self, ids):
        x = self.embed(ids).flatten(1)
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


def tiny_vit():
    """A vision transformer for images of 32 pixels and 4 kinds, without dropout."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=4, **sizes))


def loss_of(net, step=0):
    ids = torch.randint(0, net.words, net.batch, generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(net(ids), ids[:, 0])


def adamw(net):
    return torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def rprop(net):
    return torch.optim.Rprop(net.parameters(), lr=0.01)


def sparse(config=None, model=Net, optimizer=adamw, total_steps=26, loss=None, **fields):
    """A net with masks, its optimizer and its sparsifier; ``loss(net)`` is for masks by saliency or FLOPs."""
    torch.manual_seed(0)
    net = model()
    config = config or SparsityConfig(**{"density": 0.5, "update_interval": 5, "distribution": "uniform"} | fields)
    draw_masks(net, config, loss and (lambda: loss(net)))
    optimizer = optimizer(net)
    return net, optimizer, Sparsifier(net, optimizer, config, total_steps)


def train(net, optimizer, sparsifier, first=0, last=21):
    """Yields what each step did, gradients alive, then steps."""
    for step in range(first, last):
        loss_of(net, step).backward()
        yield sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()


def masks_of(net):
    return {name: get_mask(module) for name, module in masked_modules(net).items()}


def counts_of(net):
    return {name: int(mask.sum()) for name, mask in masks_of(net).items()}


def snapshot(net, optimizer=None):
    return copy.deepcopy((net.state_dict(), optimizer.state_dict() if optimizer else None))


def equal(one, other):
    """Whether nested dictionaries, lists and tensors are the same, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def assert_groups(module, structure):
    """The same number of weights in each group, counted in another way than the package does."""
    mask = get_mask(module)
    mask = mask.T if isinstance(module, Conv1D) else mask
    if structure == "constant_fan_in":
        assert len({int(unit.sum()) for unit in mask}) == 1
    elif structure == "2:4":
        inputs_last = mask.movedim(1, -1)
        assert (inputs_last.reshape(-1, 4).sum(1) == 2).all()


def assert_sound(net, structure):
    for module in masked_modules(net).values():
        inactive = ~get_mask(module)
        check_structure(~inactive, structure, is_transposed(module))
        assert not (module.weight * inactive).any()
        assert module.weight.grad is None or not (module.weight.grad * inactive).any()
