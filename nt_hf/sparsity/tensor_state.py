"""The masked tensors of a model while it trains, and the processes over which they are spread."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ..models.masks import check_masks, check_structure, count_active, get_mask, is_transposed, local, masked_modules
from .config import SparsityConfig
from .optimizer_state import move_state
from .selection import Reduce, no_reduction
from .sharding import first_row, sum_over_shards


@dataclass
class TensorState:
    """A masked tensor while it trains; of a sharded one its tensors are this process's rows, its numbers of all."""

    module: nn.Module
    inactive: torch.Tensor | None  # bool, the weight's shape: unpacked once an update, not once a step; None if dense
    active: int
    target: int
    ever_active: torch.Tensor  # packed as the mask, as is last_grown
    last_grown: torch.Tensor
    momentum: torch.Tensor | None

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight

    @property
    def grad(self) -> torch.Tensor | None:
        return None if self.weight.grad is None else local(self.weight.grad)

    @property
    def packed(self) -> torch.Tensor:
        return local(self.module.weight_mask)

    def saved(self) -> dict[str, torch.Tensor]:
        """The tensors that a resumed run needs."""
        momentum = {} if self.momentum is None else {"momentum": self.momentum}
        return {"ever_active": self.ever_active, "last_grown": self.last_grown, **momentum}


@torch.no_grad()
def read_masks(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: SparsityConfig, reduce: Reduce
) -> dict[str, TensorState]:
    """The masked tensors of a model by weight name, as they are when training begins or goes on.

    Raises:
        ValueError: a weight is not 0 outside its mask, a mask has not the structure, or an embedding has sparse
            gradients.
    """
    if violations := check_masks(model):
        raise ValueError(
            f"{', '.join(violations)}: not 0 outside the mask; accepted are zeros, as nt_hf.apply_masks(model) writes "
            "them"
        )
    tensors = {}
    for name, module in masked_modules(model).items():
        try:
            check_structure(get_mask(module), config.structure, is_transposed(module))
        except ValueError as error:
            raise ValueError(f"the mask of {name}: {error}") from None
        if getattr(module, "sparse", False):
            raise ValueError(f"{name}: has sparse gradients; accepted is an embedding with sparse=False")
        packed = local(module.weight_mask)
        active = int(reduce(torch.tensor(count_active(packed), device=packed.device)))
        inactive = None if active == module.weight.numel() else ~get_mask(module)
        if inactive is not None:  # an optimizer that ran before may hold moments of weights that are now dead
            nothing = torch.zeros_like(inactive)
            move_state(optimizer.state.get(module.weight, {}), None, inactive, nothing, config.second_moments)
        momentum = torch.zeros_like(local(module.weight)) if config.needs_momentum else None
        tensors[name] = TensorState(
            module, inactive, active, active, packed.clone(), torch.zeros_like(packed), momentum
        )
    return tensors


def sum_of_shards(model: nn.Module, structure: str) -> Reduce:
    """How to sum over the processes that share the masked weights of a model."""
    weights = {name: module.weight for name, module in masked_modules(model).items()}
    sharded = [name for name, weight in weights.items() if hasattr(weight, "device_mesh")]
    if not sharded:
        return no_reduction
    if len(sharded) < len(weights):
        raise ValueError("masked weights: some are sharded and others are not; accepted are all of them, or none")
    first = weights[sharded[0]]
    for name, module in masked_modules(model).items():
        first_row(weights[name])  # refuses what is not split by rows
        if weights[name].device_mesh != first.device_mesh or not hasattr(module.weight_mask, "device_mesh"):
            raise ValueError(f"the mask of {name}: not sharded as its weight; accepted are models from shard_model")
        if structure != "unstructured" and is_transposed(module):
            raise ValueError(f"structure={structure}: {name} has its inputs first; accepted when sharded is linear")
    return partial(sum_over_shards, weight=first)
