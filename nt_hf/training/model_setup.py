"""The model of a run: its place on the devices, what is wrapped around it."""

import warnings

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from ..config import TrainConfig
from ..sparsity.sharding import shard_model
from .device import compile_blocks


def place_model(
    model: PreTrainedModel,
    train: TrainConfig,
    accelerator: Accelerator,
    sharding: FullyShardedDataParallelPlugin | None,
) -> None:
    """Brings a model to the device, in training mode, and splits it over the processes under FSDP2."""
    device = accelerator.device
    if train.gradient_checkpointing:
        # Transformers 5.23 knows it by the first name, earlier ones by the second.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.to(device).train()
    if sharding:
        shard_model(
            model,
            init_device_mesh(device.type, (accelerator.num_processes,)),
            param_dtype=torch.bfloat16 if train.precision == "bf16" else None,
            reshard_after_forward=bool(sharding.reshard_after_forward),
        )


def running_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a model learns beside its parameters, by name: the means and variances of batch norms, for example."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: value
        for name, value in model.state_dict().items()
        if name not in parameters and value.is_floating_point()
    }


def wrap_model(
    model: PreTrainedModel,
    train: TrainConfig,
    accelerator: Accelerator,
    sharding: FullyShardedDataParallelPlugin | None,
) -> nn.Module:
    """What forward passes go through: the model, its blocks compiled if asked, within DDP unless FSDP2 has split it."""
    if train.compile:
        compile_blocks(model)
    if sharding:
        return model
    with warnings.catch_warnings():  # PyTorch 2.13 has a new name for broadcast_buffers, Accelerate has not
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return accelerator.prepare(model)
