"""The planner: accelerators, disk, network, time, and the program."""

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plan_models import BASE, run_config, step, training

from nt_hf import NeuroTrailsLlamaConfig
from nt_hf.cli import plan as program
from nt_hf.cli.program import run
from nt_hf.config import load_run_config
from nt_hf.models.masks import masked_modules
from nt_hf.plan.hardware import GIB, GPUS, find_gpu, peak_tflops
from nt_hf.plan.network import Communication, communication, overlap
from nt_hf.plan.parameters import count_parameters
from nt_hf.plan.planner import checkpoint_size, plan
from nt_hf.plan.report import report
from nt_hf.plan.step import StepSettings

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs"
PAGES = "\n".join((ROOT / "docs" / page).read_text() for page in ("several-gpus.md", "internals/memory.md"))


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

    def by(strategy: str, ranks: int, passes: int, **changes):
        setting = StepSettings(1, 64, strategy=strategy, ranks=ranks, passes=passes, **changes)
        return communication(weights, setting, h100, 8, backbone=0.5)

    one_node = by("DDP", 8, 4)
    assert one_node.sent == 2 * 7 / 8 * 4e9  # once a step, however many passes
    assert one_node.seconds == pytest.approx(2 * 7 / 8 * 4e9 / 450e9)
    nodes = by("DDP", 64, 1)
    assert nodes.seconds == pytest.approx(2 * 7 / 8 * 4e9 / 450e9 + 2 * 7 / 8 * 0.5e9 / 50e9)
    assert by("FSDP2", 8, 2).sent == 7 / 8 * 2 * (2e9 + 2e9 + 4e9)
    assert by("FSDP2", 8, 2, bf16=False).sent == 7 / 8 * 2 * 12e9


def test_overlap_by_hand():
    def of(**changes) -> float:
        return overlap(StepSettings(1, 64, ranks=8, **changes), backbone=0.25)

    assert of(strategy="DDP") == pytest.approx(2 / 3 * 0.25)  # the backbone's backward pass
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
    settings = load_run_config([CONFIGS / "20m.yaml"])
    found = plan(settings, 1, find_gpu("h100"), mfu=0.5)
    assert found.schedule.tokens == 11112 * 512 * 256
    wanted = found.flops.training * found.schedule.tokens / (989e12 * 0.5)
    assert found.schedule.hours * 3600 == pytest.approx(wanted)


def test_what_does_not_fit_is_told_with_what_would():
    train = {"batch_size": 64, "micro_batch_size": 8}
    settings = run_config(BASE | {"num_hidden_layers": 2, "blocks_in_head": 1, "num_ensemble_heads": 2}, train=train)

    def on(size: float):
        """The plan for 8 cards whose usable memory is ``size`` bytes."""
        return plan(settings, 8, replace(find_gpu("h100"), memory_gib=size / GIB / 0.9))

    roomy = on(1e12)
    assert not roomy.remedies and "WARNING" not in report(roomy)
    ddp, recomputing, *_ = (memory.peak for memory in roomy.memory)
    small = on(0.99 * sum(list(ddp.items.values())[:4]))  # the weights alone are too large
    assert not small.memory[0].fits and small.memory[0].settings.strategy == "DDP"
    assert small.remedies and all("FSDP2" in remedy for remedy in small.remedies)
    text = report(small)
    assert "WARNING: DDP, as configured, does not fit" in text and small.remedies[0] in text
    crowded = on((ddp.total + recomputing.total) / 2)
    assert [memory.fits for memory in crowded.memory[:2]] == [False, True]
    assert crowded.remedies[0] in [f"--train.micro_batch_size {rows}" for rows in (1, 2, 4)]
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


def test_a_plan_has_every_part():
    text = printed("nt-hf plan --config recipes/configs/20m.yaml --gpus 2 --gpu h100")
    parts = [line.split()[0].rstrip(":") for line in text.splitlines() if line and line[0] != " "]
    assert parts == ["Parameters", "FLOPs", "Memory", "Run", "Communication"]
    assert re.search(r"\n +DDP +DDP \+ ckpt +FSDP2 +FSDP2 \+ ckpt\n +weights, fp32", text)
    assert "fullest at: loss of lm_heads.2" in text


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_documents_table_is_todays():
    lines = PAGES.splitlines()
    assert [line for line in lines if re.match(r"\| (350m|1b) \|", line)] == table()


@pytest.mark.slow
def test_the_planner_is_a_program():
    command = [sys.executable, "-m", "nt_hf.plan", "--config", "recipes/configs/7b.yaml", "--gpu", "v100"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 1 and found.stderr.startswith("error: --gpu v100") and found.stderr.count("\n") == 1
