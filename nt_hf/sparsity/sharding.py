"""Models whose weights are spread over processes: FSDP2 (`fully_shard`), and replicas (DDP) that must stay equal.

Under FSDP2 a weight is a `DTensor`, split by rows, and so are its mask and all else of its size. Forward passes never
look at masks, so these need not be gathered; topology updates work on shards and sum counts.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..models.masks import local, masked_modules


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
) -> None:
    """Splits weights and masks over the processes of a mesh, in place, as FSDP2 does.

    Every process must hold the same model. Each block, embedding and LM head is gathered by itself when it runs; tied
    weights stay with what is left, such as norms, which is gathered for the whole pass.

    Args:
        model: a multi-head causal LM or image classifier on its device, its masks drawn.
        mesh: of one dimension, or of two (replicas, shards).
        param_dtype: of the gathered weights and of activations; gradients are summed in fp32 all the same.
        reshard_after_forward: free a block's gathered weights between forward and backward pass.
    """
    options = {"mesh": mesh, "reshard_after_forward": reshard_after_forward}
    if param_dtype is not None:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    separate = []
    if hasattr(model, "get_lm_heads") and not model.config.tie_word_embeddings:  # image classifiers have small ones
        separate = [*model.get_embeddings(), *model.get_lm_heads()]
    for module in (*model.blocks(), *separate):
        fully_shard(module, **options)
    fully_shard(model, **options)
    for module in masked_modules(model).values():
        weight = module.weight
        module.weight_mask = distribute_tensor(module.weight_mask, weight.device_mesh, weight.placements)


def is_sharded(model: nn.Module) -> bool:
    """Whether [`shard_model`] has split it."""
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Frees the weights that a forward pass without a backward pass has left gathered, on every process."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def first_row(tensor: torch.Tensor) -> int:
    """Which row of the whole tensor this process's shard begins with; 0 of a tensor that is not sharded.

    Raises:
        ValueError: it is split in another way than by rows.
    """
    if not isinstance(tensor, DTensor):
        return 0
    dimension, length = _shard_dimension(tensor), tensor.shape[0]
    chunk = -(-length // tensor.device_mesh.size(dimension))  # as torch.chunk does it
    return min(length, chunk * tensor.device_mesh.get_local_rank(dimension))


def _shard_dimension(tensor: DTensor) -> int:
    """The dimension of the mesh along which a tensor's rows are split."""
    split = [number for number, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if len(split) != 1 or not tensor.placements[split[0]].is_shard(0):
        raise ValueError(f"placements={tensor.placements}: accepted is a split by rows (Shard(0)) over one dimension")
    return split[0]


def sum_over_shards(counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Sums a tensor, in place, over the processes that hold the shards of ``weight``; they all must call it."""
    dist.all_reduce(counts, group=weight.device_mesh.get_group(_shard_dimension(weight)))
    return counts


def as_shard(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """This process's rows of a tensor as the shard of a `DTensor` that lies as ``weight`` does; else as it is."""
    if not isinstance(weight, DTensor):
        return value
    shape = (weight.shape[0], *value.shape[1:])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        value, weight.device_mesh, weight.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def owns_shard(tensor: torch.Tensor, main: bool) -> bool:
    """Whether this process is the one to save what it holds of a tensor: of a whole one the main process is."""
    if not isinstance(tensor, DTensor):
        return main
    replicas = [number for number, placement in enumerate(tensor.placements) if placement.is_replicate()]
    return bool(local(tensor).numel()) and not any(map(tensor.device_mesh.get_local_rank, replicas))


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or that of which each process holds a shard; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state_dict(model: nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """The whole weights and masks on the CPU, tied ones once, where ``keep`` is true; one is gathered after another.

    Every process must call it.
    """
    tied, gathered = getattr(model, "all_tied_weights_keys", {}), {}
    for name, value in model.state_dict().items():
        if name not in tied:
            value = full_tensor(value)
            if keep:
                gathered[name] = value.cpu().contiguous()
    return gathered


# ------------------------------------------------------------------------------------------------ replicas


@torch.no_grad()
def fingerprints(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """A number int64 [] of every weight, mask and optimizer tensor; when their bits differ, it nearly always does."""
    tensors = {f"the mask of {name}": module.weight_mask for name, module in masked_modules(model).items()}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter
        state: Mapping = optimizer.state.get(parameter, {})
        tensors |= {f"{key} of {name}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return {name: _fingerprint(value) for name, value in tensors.items()}


def _fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.uint8:  # masks: two that differ by moved bits can have equal sums
        rows = torch.arange(1, len(tensor) + 1, device=tensor.device).unsqueeze(1)
        columns = torch.arange(1, tensor.shape[1] + 1, device=tensor.device)
        return ((tensor * columns).sum(1, keepdim=True) * rows).sum()
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(words).sum(dtype=torch.int64)


def require_equal_replicas(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Checks that every process holds the same weights, masks and optimizer state; all must call it.

    Raises:
        ValueError: they differ; the message names the first tensor, and the processes.
    """
    numbers = fingerprints(model, optimizer)
    fingerprint = torch.stack([number.to(next(model.parameters()).device) for number in numbers.values()])
    by_rank = [torch.empty_like(fingerprint) for _ in range(dist.get_world_size())]
    dist.all_gather(by_rank, fingerprint)
    for name, *values in zip(numbers, *(gathered.tolist() for gathered in by_rank)):
        if len(set(values)) > 1:
            others = [str(rank) for rank, value in enumerate(values) if value != values[0]]
            raise ValueError(
                f"{name} is not the same on process 0 as on {', '.join(others)}: the replicas have diverged, so the "
                "run stops; the last checkpoint is from before"
            )
