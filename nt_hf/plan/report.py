"""A plan as plain text."""

from ..text import plain_table
from .hardware import GIB, RESERVE
from .parameters import Parameters
from .planner import Plan


def report(plan: Plan) -> str:
    """The plan as plain text."""
    return "\n\n".join(
        "\n".join(lines)
        for lines in (
            _describe_parameters(plan.parameters),
            _describe_flops(plan),
            _describe_memory(plan),
            _describe_schedule(plan),
            _describe_communication(plan),
        )
    )


def _millions(number: float) -> str:
    return f"{number / 1e6:,.2f} M"


def _plural(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _describe_parameters(parameters: Parameters) -> list[str]:
    rows = [["", "total", "active", "density"]]
    trails = {f"trail {head}": trail for head, trail in enumerate(parameters.trails)}
    for name, count in {**parameters.parts, "all": parameters.all, **trails}.items():
        density = count.active / count.total if count.total else 1.0
        rows.append([name, _millions(count.total), _millions(count.active), f"{density:.4f}"])
    return ["Parameters (a trail is the path through the backbone and one head)", plain_table(rows)]


def _describe_flops(plan: Plan) -> list[str]:
    flops, weights = plan.flops, 2 * plan.parameters.all.total
    rows = [["", "executed", "active weights only"]]
    rows.append(["training", f"{flops.training / 1e9:.3f} G", f"{flops.sparse_training / 1e9:.3f} G"])
    if flops.recomputed:
        rows.append(["  recomputed by checkpointing", f"{flops.recomputed / 1e9:.3f} G", ""])
    executed, active = f"{flops.decoding / 1e9:.3f} G", f"{flops.sparse_decoding / 1e9:.3f} G"
    rows.append([f"decoding, {flops.context} tokens of context", executed, active])
    read = (weights + flops.cache_bytes) / (plan.gpu.memory_gb_s * 1e9)
    return [
        "FLOPs per token, all heads (zeros are multiplied like any weight: only the first column is time)",
        plain_table(rows),
        f"  one token decoded reads {_gib(weights)} GiB of bf16 weights and {_gib(flops.cache_bytes)} GiB of cache: "
        f"at least {read * 1e3:.2f} ms",
    ]


def _describe_memory(plan: Plan) -> list[str]:
    columns = plan.memory
    rows = [["", *(f"{m.settings.strategy}{' + ckpt' if m.settings.checkpointing else ''}" for m in columns)]]
    names = dict.fromkeys(name for memory in columns for name in memory.peak.items)
    for name in names:
        values = [memory.peak.items.get(name, 0) for memory in columns]
        if any(values):
            rows.append([name, *map(_gib, values)])
    rows.append(["total", *(_gib(memory.peak.total) for memory in columns)])
    rows.append(["fits", *("yes" if memory.fits else "NO" for memory in columns)])
    usable = plan.gpu.memory_gib * (1 - RESERVE)
    moments: dict[str, list[str]] = {}
    for label, memory in zip(rows[0][1:], columns):
        moments.setdefault(memory.peak.name, []).append(label)
    lines = [
        f"Memory of a rank in GiB, {plan.schedule.rows} x {columns[0].settings.length} tokens a pass, "
        f"{'bf16 autocast' if plan.bf16 else 'fp32'}, at the fullest moment of a step",
        plain_table(rows),
        *(f"  fullest at: {name} ({', '.join(labels)})" for name, labels in moments.items()),
        f"  usable: {usable:.1f} of {plan.gpu.memory_gib:g} GiB, {RESERVE:.0%} kept for CUDA, NCCL and fragmentation",
        "  ckpt: gradient checkpointing"
        + ". FSDP2's columns rest on assumptions, see nt_hf.plan.memory.step_memory" * (plan.gpus > 1),
    ]
    configured = next(memory for memory in columns if memory.settings.checkpointing == plan.checkpointing)
    if not configured.fits:
        lines.append(f"  WARNING: {rows[0][1 + columns.index(configured)]}, as configured, does not fit. What would:")
        lines += [f"    {remedy}" for remedy in plan.remedies] or ["    nothing that this planner tries"]
    return lines


def _describe_schedule(plan: Plan) -> list[str]:
    schedule, saved = plan.schedule, plan.checkpoint
    hours = f"{schedule.hours:,.2f} hours" if schedule.hours < 48 else f"{schedule.hours / 24:,.1f} days"
    time = (
        f"  {hours}, {plan.gpus * schedule.hours:,.0f} GPU hours, {schedule.step_seconds * 1e3:,.1f} ms a step, "
        f"at an MFU of {schedule.mfu:g}: an assumption"
        if plan.bf16
        else "  no time: train.precision is fp32, and the peaks of the table are bf16's"
    )
    return [
        f"Run on {plan.gpus} x {plan.gpu.name} ({plan.gpu.tflops:g} TFLOP/s dense bf16 each)",
        f"  {schedule.steps:,} steps of {schedule.tokens_per_step:,} tokens: {schedule.tokens / 1e9:.2f} G tokens; "
        f"{_plural(schedule.passes, 'pass', 'passes')} of {_plural(schedule.rows, 'sequence')} a step on each GPU",
        time,
        "  computing alone: evaluation, topology updates, checkpoints and communication come on top",
        f"  a checkpoint: {_gib(saved.model)} GiB model.safetensors and {_gib(saved.training_state)} GiB training "
        f"state; {saved.kept} kept, {_gib((saved.kept + 1) * (saved.model + saved.training_state))} GiB at most",
    ]


def _describe_communication(plan: Plan) -> list[str]:
    if not plan.communication:
        return ["Communication: none, one process"]
    compute = plan.schedule.step_seconds
    rows = [["", "sent by a rank", "time", "share of computing", "overlap", "step, hidden", "step, not hidden"]]
    for strategy in plan.communication:
        times = (strategy.seconds, strategy.step_seconds(compute), compute + strategy.seconds)
        share = f"{strategy.seconds / compute:.1%}"
        sent, *steps = (f"{seconds * 1e3:,.1f} ms" for seconds in times)
        rows.append([strategy.name, f"{_gib(strategy.sent)} GiB", sent, share, f"{strategy.overlap:.1%}", *steps])
    nodes = _plural(-(-plan.gpus // plan.per_node), "node")
    return [
        f"Communication of a step, {nodes} of {min(plan.gpus, plan.per_node)} GPUs "
        f"({plan.gpu.node_gb_s:g} GB/s within, {plan.gpu.network_gb_s:g} GB/s a GPU between them, each direction), "
        "at full bandwidth",
        plain_table(rows),
        "  overlap: share of the computing that communication can at best run beside; hidden: it does",
    ]
