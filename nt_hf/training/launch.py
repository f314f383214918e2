"""The processes of a run: what the launcher asked for, checked against what there is."""

import contextlib
import dataclasses
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
)

from ..config import TrainConfig
from ..files import lock_directory

T = TypeVar("T")


def start_processes(
    train: TrainConfig, run_dir: Path, log_with: str
) -> tuple[Accelerator, FullyShardedDataParallelPlugin | None]:
    """The accelerator of this process, and the settings of FSDP2 where several processes are to share the weights.

    Forward passes run in bf16 if ``train.precision`` says so; ``"auto"`` is settled before ([`settle_precision`]).

    Raises:
        ValueError: the launcher asked for something that the recipe has not, or started other processes than it was
            asked for; the tracker ``log_with`` is not installed.
    """
    sharding = requested_sharding()
    if log_with != "none" and importlib.util.find_spec(log_with) is None:
        raise ValueError(f"--log_with {log_with}: it is not installed; pip install 'nt_hf[track]' brings it")
    world_size = os.environ.get("WORLD_SIZE")
    if world_size is None and "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
        raise ValueError(
            "accelerate launch was asked for several processes and started one, as it does on a CPU; accepted is "
            "torchrun --nproc_per_node N recipes/pretrain_c4.py …, or --num_processes 1"
        )
    device = torch.accelerator.current_accelerator(check_available=True)
    accelerator = Accelerator(
        # Told so, or each of several processes without a GPU would believe to be alone. Apple GPUs lack the float64
        # that evaluation sums in.
        cpu=device is None or device.type in ("cpu", "mps"),
        mixed_precision="bf16" if train.precision == "bf16" else "no",
        log_with=None if log_with == "none" else log_with,
        project_dir=run_dir,
        # Masks are equal on all ranks by construction; broadcasting buffers would hide it if they were not.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    accelerator.gradient_accumulation_steps = 1  # the loop normalises by itself, whatever the launcher was told
    plain = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
    if accelerator.distributed_type not in plain:
        raise ValueError(f"distributed_type={accelerator.distributed_type}: accepted are one process, DDP and FSDP2")
    if accelerator.num_processes < int(world_size or 1):
        raise ValueError(f"WORLD_SIZE={world_size}: the launcher started {accelerator.num_processes} process(es)")
    return accelerator, sharding if accelerator.num_processes > 1 else None


def settle_precision(train: TrainConfig, recorded: str | None) -> TrainConfig:
    """The settings with a precision in place of ``"auto"``.

    Args:
        train: settings.
        recorded: the precision that the run began with; ``None`` for a new run.
    """
    if train.precision != "auto":
        return train
    if recorded == "auto":  # until run.yaml named the precision that "auto" became, it was bf16 on a GPU only
        recorded = fastest_precision() if torch.cuda.is_available() else "fp32"
    return dataclasses.replace(train, precision=recorded or fastest_precision())


def fastest_precision() -> str:
    """``"bf16"`` where the device multiplies it by instructions of its own, else ``"fp32"``."""
    if torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        has_bf16 = torch.backends.mkldnn.is_available() and instructions
    return "bf16" if has_bf16 else "fp32"


def main_process_only(action: Callable[[], T], accelerator: Accelerator) -> T:
    """The result of ``action`` on the main process, on all processes.

    Raises:
        ValueError, OSError: the action raised it; all processes do.
    """
    result, error = None, None
    if accelerator.is_main_process:
        try:
            result = action()
        except (ValueError, OSError) as caught:
            error = caught
    result, error = broadcast_object_list([result, error])
    if error is not None:
        raise error
    return result


@contextlib.contextmanager
def lock_run(run_dir: Path, accelerator: Accelerator) -> Iterator[None]:
    """Keeps a run's directory for this run, see [`lock_directory`]: the main process holds it for all.

    Raises:
        LockedError: another run has it.
        WriteError: it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        main_process_only(lambda: stack.enter_context(lock_directory(run_dir)), accelerator)
        yield


def requested_sharding() -> FullyShardedDataParallelPlugin | None:
    """The settings of FSDP2 where the launcher asked for it.

    Raises:
        ValueError: the launcher asked for DeepSpeed, FSDP1, weights on the host, or fp16.
    """

    def enabled(name: str) -> bool:
        return os.environ.get(name, "false").lower() in ("true", "1", "yes")

    if enabled("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError("DeepSpeed: accepted are DDP and FSDP2 (see recipes/accelerate)")
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        raise ValueError("--mixed_precision fp16: accepted are bf16 and no, where gradients need no scaling")
    if not enabled("ACCELERATE_USE_FSDP"):
        return None
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP1: accepted are DDP and FSDP2 (fsdp_version: 2, see recipes/accelerate/fsdp2.yaml)")
    if enabled("FSDP_OFFLOAD_PARAMS"):
        raise ValueError("fsdp_offload_params: accepted is false")
    return plugin


def end_training(accelerator: Accelerator) -> None:
    """Ends trackers and process groups.

    Gloo's threads need the interpreter's lock to finish the last collective. Destroying the group holds that lock and
    waits for them, forever if they have not finished: hence the pause (https://github.com/pytorch/pytorch/issues/56297).
    """
    if accelerator.num_processes > 1:
        time.sleep(0.5)
    accelerator.end_training()
