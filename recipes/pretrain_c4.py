"""Pretrains a NeuroTrails Llama, on C4 or any text.

    accelerate launch recipes/pretrain_c4.py --config recipes/configs/60m.yaml --output_dir runs/60m
    accelerate launch recipes/pretrain_c4.py --config recipes/configs/60m.yaml recipes/configs/treenet.yaml \
        --output_dir runs/treenet-60m --train.max_steps 20000 --data.train 'my/text/*.jsonl.gz'

Any key of the configuration can be set on the command line as --section.key value. A killed run continues from its
last checkpoint when it is started again in the same way, also on another number of processes. recipes/accelerate has
launch files for several GPUs and nodes.
"""

# First: it says how threads wait, which is read when torch is loaded.
import nt_hf  # noqa: F401  # isort: skip

import argparse
import contextlib
import copy
import dataclasses
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, set_seed
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from nt_hf import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
from nt_hf.cli.program import run
from nt_hf.config import RunConfig, changed_keys, load_run_config, parse_overrides
from nt_hf.data.prepared import PreparedTokens, token_batches, tokenizer_fingerprint
from nt_hf.data.streams import HeadBatches, TokenBatches, check_vocabulary, load_tokenizer
from nt_hf.evaluation.perplexity import evaluate, perplexity
from nt_hf.files import write_whole
from nt_hf.plan.flops import training_flops_per_token
from nt_hf.plan.hardware import peak_tflops
from nt_hf.sparsity.first_masks import draw_masks
from nt_hf.sparsity.sharding import require_equal_replicas, shard_model
from nt_hf.sparsity.sparsifier import Sparsifier
from nt_hf.training.checkpoint import (
    Progress,
    cannot_continue,
    choose_checkpoint,
    clean_up,
    find_resume,
    load_model,
    load_training_state,
    save_checkpoint,
    set_aside,
)
from nt_hf.training.launch import only_run, start_processes, wants_bf16
from nt_hf.training.loop import (
    EXIT_PREEMPTED,
    HostCopy,
    Metrics,
    Preemption,
    accumulation_steps,
    compile_blocks,
    count_targets,
    end_training,
    grouped,
    in_step,
    learning_rate,
    limited,
    make_optimizer,
    peak_memory,
    read_metrics,
    to_device,
)
from nt_hf.training.report import model_card, write_report

logger = logging.getLogger("nt_hf.pretrain")


def main() -> None:
    args, overrides = parse_arguments()
    config = load_run_config(args.config, overrides)
    run_dir = Path(args.output_dir)
    with Preemption() as preemption:
        accelerator, sharding = start_processes(config.train, run_dir, args.log_with)
        with only_run(run_dir, accelerator):
            pretrain(args, config, accelerator, sharding, preemption)


def pretrain(
    args: argparse.Namespace,
    config: RunConfig,
    accelerator: Accelerator,
    sharding: FullyShardedDataParallelPlugin | None,
    preemption: Preemption,
) -> None:
    """Trains to the end, or until a signal: then it saves and exits."""
    train, run_dir = config.train, Path(args.output_dir)
    main_process, device = accelerator.is_main_process, accelerator.device
    if not main_process:
        logging.getLogger("nt_hf").setLevel(logging.WARNING)
    micro_batch_size, passes = accumulation_steps(train, accelerator.num_processes)
    set_seed(train.seed)
    torch.set_float32_matmul_precision(train.matmul_precision)

    resume_from = choose_checkpoint(find_resume(args.resume, run_dir), accelerator)
    begun = (resume_from or run_dir) / "run.yaml"
    continues = begun.is_file() and (resume_from or args.resume != "never")
    before = load_run_config([begun]) if continues else config
    changes = changed_keys(config, before, begun)

    # --------------------------------------------------------------------------------------------- data

    tokenizer = load_tokenizer(config.data.tokenizer)
    tokenizer.model_max_length = config.data.sequence_length
    model_config = NeuroTrailsLlamaConfig(
        **copy.deepcopy(config.model),  # it completes rope_parameters, which run.yaml keeps as they were given
        max_position_embeddings=config.data.sequence_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    reading = {
        "batch_size": micro_batch_size,
        "sequence_length": config.data.sequence_length,
        "packing": config.data.packing,
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "num_workers": config.data.num_workers,
        "on_bad_line": config.data.on_bad_line,
        "text_field": config.data.text_field,
    }
    train_batches = training_batches(config, model_config.num_ensemble_heads, tokenizer, **reading)
    validation_batches = token_batches(config.data.validation, tokenizer, **reading | {"num_workers": 0}, epochs=1)

    fingerprint = tokenizer_fingerprint(tokenizer)
    if changes and args.resume_override:
        logger.warning("continuing with another configuration: %s", changes)
    elif changes:
        problem = resume_from and cannot_continue(resume_from, fingerprint, train_batches)
        advice = f"cannot continue so ({problem}); set it as it was" if problem else (
            "was written otherwise; --resume_override continues all the same"
        )  # fmt: skip
        raise ValueError(f"{changes}: {begun} {advice}, or take another --output_dir")

    def first_batch() -> dict[str, torch.Tensor]:
        """Some text, the same on every process, for masks that saliency chooses."""
        rows = train.micro_batch_size or min(train.batch_size, 32)
        alone = reading | {"batch_size": rows, "rank": 0, "world_size": 1, "num_workers": 0}
        batch = next(iter(token_batches(config.data.train, tokenizer, **alone, seed=train.seed)))
        return {key: value.to(device) for key, value in batch.items()}

    # -------------------------------------------------------------------- model, masks, optimizer, state

    check_vocabulary(tokenizer, model_config.vocab_size)
    if resume_from:
        model = load_model(resume_from)
    else:
        model = NeuroTrailsLlamaForCausalLM(model_config).to(device)
        draw_masks(model, config.sparsity, loss=lambda: model(**first_batch(), use_cache=False).loss)
    if train.gradient_checkpointing:
        # Transformers 5.23 knows it by the first name, earlier ones by the second.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.to(device).train()
    if sharding:
        mesh = init_device_mesh(device.type, (accelerator.num_processes,))
        reshard = bool(sharding.reshard_after_forward)
        shard_model(
            model, mesh, param_dtype=torch.bfloat16 if wants_bf16(train) else None, reshard_after_forward=reshard
        )
    optimizer = make_optimizer(model, train)
    sparsifier = Sparsifier(model, optimizer, config.sparsity, total_steps=train.max_steps)
    start = Progress(0, 0, False, accelerator.num_processes, fingerprint)
    if resume_from:
        start = load_training_state(
            resume_from, accelerator=accelerator, model=model, optimizer=optimizer,
            sparsifier=sparsifier, data=train_batches,
        )  # fmt: skip
        if start.tokenizer != fingerprint:
            raise ValueError(f"data.tokenizer={config.data.tokenizer!r}: {resume_from} was trained with another one")
    first_step, tokens = start.step, start.tokens
    rates = [learning_rate(first_step, each.train) for each in (before, config)]
    if rates[0] != rates[1] and first_step < train.max_steps:
        logger.info("the learning rate of the next step is %.3g; without the changes it would be %.3g", *rates[::-1])
    if train.compile:
        compile_blocks(model)
    with warnings.catch_warnings():  # PyTorch 2.13 has a new name for broadcast_buffers, Accelerate has not
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        wrapped = model if sharding else accelerator.prepare(model)
    parameters = [p for p in model.parameters() if p.requires_grad]

    # The first batches are read before anything is written: unreadable data leaves no run behind.
    next(iter(validation_batches), None)
    groups = grouped(train_batches, passes)
    group = next(groups) if first_step < train.max_steps else []
    run_dir.mkdir(parents=True, exist_ok=True)
    if main_process:
        clean_up(run_dir)
        set_aside(run_dir, after=first_step)
        write_whole(run_dir / "run.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
        metrics = Metrics(run_dir / "metrics.jsonl", first_step if resume_from else None)
    if args.log_with != "none":
        accelerator.init_trackers("nt_hf", config={k: str(v) for k, v in config.to_dict().items()})

    def log(event: str, **values) -> None:
        if main_process:
            metrics.write(event, **values)
            accelerator.log(dict(numbers(event, values)), step=values["step"])

    def run_evaluation(step: int) -> bool:
        """Whether it was finished: a signal ends it early, and it begins anew in the continued run."""
        limit = config.data.validation_tokens
        share = limit and -(-limit // accelerator.num_processes)
        batches = limited(validation_batches, share, stop=lambda: preemption.received, multiple=passes)
        result = evaluate(
            model,
            in_step(batches, config.data.sequence_length, accelerator) if sharding else batches,
            autocast=accelerator.autocast,
            reduce=lambda sums: accelerator.reduce(sums.to(device)),
        ).to_dict()
        if accelerator.reduce(torch.tensor(int(preemption.received), device=device)):
            return False
        heads = ", ".join(f"{value:.2f}" for value in result["head_perplexities"])
        logger.info(
            "step %d: validation perplexity %.2f (heads %s), disagreement %.3f",
            step, result["perplexity"], heads, result["disagreement"],
        )  # fmt: skip
        log("eval", step=step, training_tokens=tokens, density=sparsifier.report().overall.density, **result)
        return True

    def log_measured() -> None:
        """Logs what the last logged step measured, once the device has done it."""
        nonlocal unread, clock, clock_tokens
        if unread is None:
            return
        (record, measured), unread = unread, None
        values = measured.read()
        stop_if_any(values["first_bad_steps"], last_saved)
        step, tokens, losses = record["step"], record["tokens"], values["head_losses"]
        loss = sum(losses) / len(losses)
        seconds = time.perf_counter() - clock
        speed = (tokens - clock_tokens) / seconds
        clock, clock_tokens = time.perf_counter(), tokens
        mfu = flops * speed / (peak * 1e12 * accelerator.num_processes) if peak else None
        record["data_wait"] /= seconds
        log(
            "train", **record, loss=loss, perplexity=perplexity(loss), head_losses=losses,
            grad_norm=values["grad_norm"], tokens_per_second=speed, mfu=mfu,
        )  # fmt: skip
        status = f"loss {loss:.3f}, perplexity {perplexity(loss):.1f}, {speed:,.0f} tokens/s"
        bar.set_postfix_str(status)
        if bar.disable:
            left = (train.max_steps - step) * train.batch_size * config.data.sequence_length / speed
            logger.info("step %d of %d: %s, %s left", step, train.max_steps, status, tqdm.format_interval(left))

    def save(step: int, evaluated: bool) -> None:
        nonlocal last_saved
        last_saved = save_checkpoint(
            run_dir, step, tokens, accelerator=accelerator, model=model, tokenizer=tokenizer, optimizer=optimizer,
            sparsifier=sparsifier, data=train_batches, config=config,
            model_card=model_card(model.config, config, step, read_metrics(metrics.path)) if main_process else "",
            evaluated=evaluated, fingerprint=fingerprint,
        )  # fmt: skip

    def stop_for_signal(step: int, evaluated: bool) -> NoReturn:
        if step and last_saved != run_dir / f"checkpoint-{step}":
            save(step, evaluated)
        end_training(accelerator)
        logger.info("stopped at step %d; the same command continues from %s", step, last_saved or "the beginning")
        sys.exit(EXIT_PREEMPTED)

    # --------------------------------------------------------------------------------------------- loop

    kind = "" if accelerator.num_processes == 1 else " (FSDP2)" if sharding else " (DDP)"
    describe(model, sparsifier, resume_from, first_step, f"{accelerator.num_processes} processes{kind}")
    flops = training_flops_per_token(model_config, config.data.sequence_length, config.data.order_per_head)
    peak = train.peak_tflops or (
        peak_tflops(torch.cuda.get_device_name(device)) if wants_bf16(train) and device.type == "cuda" else None
    )
    last_saved = resume_from
    first_bad_step = torch.tensor(-1, device=device)  # found without waiting for the device at every step
    unread = None  # what the last logged step measured, while the device may still be at it
    updates = 0
    clock, clock_tokens = time.perf_counter(), tokens
    stop_asked = None  # by any process, as known a step later: nobody waits for the answer
    waited = 0.0
    if not start.evaluated:
        if not run_evaluation(first_step):
            stop_for_signal(first_step, evaluated=False)
        clock = time.perf_counter()
    # A terminal gets a progress bar, a log file a line a logged step.
    show_bar = main_process and sys.stderr.isatty()
    bar = tqdm(total=train.max_steps, initial=first_step, disable=not show_bar, unit="step", dynamic_ncols=True)
    for step in range(first_step + 1, train.max_steps + 1):
        asked = time.perf_counter()
        group = group if step == first_step + 1 else next(groups)
        waited += time.perf_counter() - asked
        logging_step = step % train.log_steps == 0 or step == train.max_steps
        evaluating = step % train.eval_steps == 0 or step == train.max_steps
        saving = step % train.save_steps == 0 or step == train.max_steps

        # Dividing every pass's summed loss by the tokens of the whole step weighs each token the same.
        # Filled on the device: a tensor copied there would wait for it.
        counts = [torch.full((), n, device=device) for n in (*count_targets(group), int(preemption.received))]
        *targets, stopping = accelerator.reduce(torch.stack(counts)).unbind()
        targets = torch.stack(targets)  # one number for all heads, or one a head
        stop_asked, asked_before = HostCopy(stop=stopping), stop_asked
        head_losses = torch.zeros(model_config.num_ensemble_heads, device=device)
        for i, batch in enumerate(group):
            last = i == len(group) - 1
            if sharding:
                model.set_requires_gradient_sync(last)
            with contextlib.nullcontext() if last or sharding else accelerator.no_sync(wrapped):
                # Gradients are averaged over processes: counteract, the loss is a sum over all tokens.
                output = wrapped(
                    **to_device(batch, device), use_cache=False,
                    num_items_in_batch=targets / accelerator.num_processes,
                )  # fmt: skip
                accelerator.backward(output.loss)
            head_losses += output.head_losses.detach() / accelerator.num_processes
        loss = head_losses.mean()
        first_bad_step = torch.where((first_bad_step < 0) & ~loss.isfinite(), step, first_bad_step)
        if sparsifier.update_is_next:
            stop_if_not_finite(accelerator, first_bad_step, last_saved)

        rate = learning_rate(step - 1, train)
        for parameter_group in optimizer.param_groups:
            parameter_group["lr"] = rate * parameter_group["learning_rate_factor"]
        update = sparsifier.step()  # may move weights; from here on gradients are masked
        if train.max_grad_norm or logging_step:
            grad_norm = whole(torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm or float("inf")))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        tokens += train.batch_size * config.data.sequence_length
        bar.update()
        log_measured()  # of the step before: this one keeps the device busy meanwhile
        if update:
            log("update", **dataclasses.asdict(update), active=sparsifier.report().overall.active)
            updates += 1
            if not sharding and accelerator.num_processes > 1 and updates % train.check_interval == 0:
                require_equal_replicas(model, optimizer)
        if logging_step:
            record = {
                "step": step, "tokens": tokens, "lr": rate, "epoch": train_batches.epoch,
                "bad_lines": train_batches.bad_lines, "data_wait": waited, "peak_memory": peak_memory(device),
            }  # fmt: skip
            unread = record, HostCopy(
                head_losses=accelerator.reduce(head_losses), grad_norm=grad_norm,
                first_bad_steps=accelerator.gather(first_bad_step[None]),
            )  # fmt: skip
            waited = 0.0
            if device.type == "cpu":  # which has them by now
                log_measured()
        stopping = asked_before is not None and asked_before.read()["stop"] > 0
        if evaluating or saving or stopping:
            log_measured()
            paused = time.perf_counter()
            # The loss was finite before the step; to be worth saving, the weights must be so after it.
            finite = whole(torch.nn.utils.get_total_norm(parameters)).isfinite()
            stop_if_not_finite(accelerator, torch.where(finite, first_bad_step, step), last_saved)
            evaluated = not evaluating
            if evaluating and not stopping:
                evaluated = run_evaluation(step)
                stopping = not evaluated
            if saving or stopping:
                save(step, evaluated)
            if stopping:
                stop_for_signal(step, evaluated)
            clock += time.perf_counter() - paused
    bar.close()

    # ------------------------------------------------------------------------------------------- report

    if main_process:
        table, files = write_report(run_dir)
        logger.info("\n%s\n\n%s holds the checkpoint; report: %s", table, last_saved, ", ".join(map(str, files)))
    end_training(accelerator)


def parse_arguments() -> tuple[argparse.Namespace, dict[str, str]]:
    """The command line: the named options, and the dotted overrides as a dictionary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", nargs="+", required=True, help="YAML files; later ones override earlier ones")
    parser.add_argument("--output_dir", required=True, help="the run's directory")
    parser.add_argument("--resume", default="auto", help="auto (default), never, or a checkpoint's path")
    parser.add_argument("--resume_override", action="store_true", help="continue although the configuration changed")
    parser.add_argument("--log_with", default="none", choices=["none", "tensorboard", "wandb", "trackio"])
    args, rest = parser.parse_known_args()
    return args, parse_overrides(rest)


def training_batches(
    config: RunConfig, heads: int, tokenizer: PreTrainedTokenizerBase, **reading
) -> TokenBatches | PreparedTokens | HeadBatches:
    """The training data, for all heads alike or in an order of each head's own."""
    data, seed = config.data, config.train.seed
    # Head 0 has the order that all would share. The others' seeds are none that another run is likely to have.
    seeds = [seed + 1_000_003 * head for head in range(heads if data.order_per_head else 1)]
    streams = [
        token_batches(data.train, tokenizer, **reading, shuffle_block=data.shuffle_block, seed=each) for each in seeds
    ]
    return HeadBatches(streams) if data.order_per_head else streams[0]


def whole(norm: torch.Tensor) -> torch.Tensor:
    """A norm of sharded tensors as an ordinary tensor."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def numbers(name: str, value) -> Iterator[tuple[str, float]]:
    """The numbers in nested records as ``name/key/index``, for trackers."""
    if isinstance(value, int | float):
        yield name, value
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(f"{name}/{key}", item)


def describe(model, sparsifier: Sparsifier, resume_from, first_step: int, processes: str) -> None:
    """Says what is about to run."""
    cfg = model.config
    total = sum(p.numel() for p in model.parameters())
    logger.info(
        "%s: %.1fM parameters, %d heads of %d blocks on a backbone of %d, density %.3f of the masked weights, %s",
        f"resuming {resume_from} at step {first_step}" if resume_from else "new run",
        total / 1e6, cfg.num_ensemble_heads, cfg.blocks_in_head, cfg.num_backbone_layers,
        sparsifier.report().overall.density, processes,
    )  # fmt: skip


def stop_if_not_finite(accelerator: Accelerator, first_bad_step: torch.Tensor, last_saved: Path | None) -> None:
    """Ends the run on every process when any had a loss or weights that are not finite; nothing is saved any more."""
    stop_if_any(accelerator.gather(first_bad_step[None]).tolist(), last_saved)


def stop_if_any(first_bad_steps: list[int], last_saved: Path | None) -> None:
    """The same from every process's first bad step, -1 for none."""
    if bad := [step for step in first_bad_steps if step >= 0]:
        raise FloatingPointError(
            f"loss or weights are not finite at step {min(bad)}; the last good checkpoint is "
            f"{last_saved or 'none yet'}. A lower train.learning_rate or train.max_grad_norm=1.0 may help"
        )


if __name__ == "__main__":
    run(main)
