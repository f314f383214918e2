"""What bug reports of neighbouring projects found in evaluation and in the sparsifier; each test names its entry."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from conftest import ROOT, SIZES, VARIANTS, script
from torch import nn

from nt_hf import (
    NeuroTrailsLlamaConfig,
    NeuroTrailsLlamaForCausalLM,
    Sparsifier,
    SparsityConfig,
    check_masks,
    draw_masks,
)
from nt_hf.cli.program import check_output
from nt_hf.evaluation.diversity import measure_diversity
from nt_hf.evaluation.perplexity import DocumentWindows, evaluate, load_for_evaluation
from nt_hf.evaluation.zero_shot import choose_scorers, log_likelihoods
from nt_hf.files import write_json
from nt_hf.models.masks import get_mask, masked_modules
from nt_hf.sparsity.first_masks import weight_uses

DATA = ROOT / "tests" / "data" / "eval"


def save(model, directory: Path, **options) -> Path:
    model.save_pretrained(directory, **options)
    byte_tokenizer().save_pretrained(directory)
    return directory


def program(name: str, monkeypatch, *arguments: object):
    """The module of a program, or an example by its path, whose ``main`` will see these arguments."""
    module = script(name) if name.endswith(".py") else importlib.import_module(f"nt_hf.cli.{name}")
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return module


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in ("The best way", "You can find it here.")))
    return path


def windows() -> DocumentWindows:
    return DocumentWindows(["The best way to learn"], byte_tokenizer(), length=64)


# ------------------------------------------------------------------------------------- D2: what is not finite is said


def poisoned(model) -> str:
    """Puts a NaN at an active place of a masked weight; returns its name."""
    name, module = next((n, m) for n, m in masked_modules(model).items() if "heads.1" in n)
    module.weight.data[tuple(get_mask(module).nonzero()[0])] = float("nan")
    return name


@pytest.mark.parametrize("kind", ["dense file", "sparse file", "llama", "infinite"])
def test_a_weight_that_is_not_finite_is_named_when_a_checkpoint_is_loaded(model, tmp_path, kind):
    """D2"""
    if kind == "llama":
        llama, name = model.extract_trail(0), "lm_heads.0.weight"
        llama.lm_head.weight.data[3, 5] = float("nan")
        llama.save_pretrained(tmp_path)
    elif kind == "infinite":
        name = "model.heads.2.norm.weight"
        model.get_parameter(name).data[0] = float("inf")
        model.save_pretrained(tmp_path)
    else:
        name = poisoned(model)
        model.save_pretrained(tmp_path, sparse=kind == "sparse file")
    with pytest.raises(ValueError) as error:
        load_for_evaluation(tmp_path)
    assert str(error.value) == f"{tmp_path}: has 1 weights that are not finite everywhere, for example {name}"


PROGRAMS = {
    "perplexity": lambda text: ("--data", text),
    "diversity": lambda text: ("--data", text),
    "zero_shot": lambda text: ("--data_root", DATA, "--tasks", "arc_easy", "--limit", 2),
}


@pytest.mark.parametrize("path", PROGRAMS)
def test_programs_score_no_model_with_nan(path, model, text, tmp_path, monkeypatch):
    """D2"""
    name = poisoned(model)
    arguments = ("--model", save(model, tmp_path / "model"), *PROGRAMS[path](text), "--output", tmp_path / "out")
    with pytest.raises(ValueError, match=f"not finite everywhere, for example {name}"):
        program(path, monkeypatch, *arguments).main()
    assert not (tmp_path / "out").exists()


def overflowing(model):
    """Makes the logits of head 1 infinite though its weights are finite."""
    model.lm_heads[1].weight.data.fill_(torch.finfo(torch.bfloat16).max)
    return model.to(torch.bfloat16)


def test_losses_of_finite_weights_that_are_not_finite_are_said(model):
    """D2"""
    overflowing(model)
    assert all(weight.isfinite().all() for weight in model.parameters())
    for measure in (evaluate, measure_diversity):
        with pytest.raises(FloatingPointError, match=r"^the loss of head 1, the ensemble is not finite on this text"):
            measure(model, windows())
    assert measure_diversity(model, windows(), heads=[0, 2]).head_scores[1].loss > 0
    requests = [([5, 6, 7], [8]), ([5, 6], [9, 10])]
    with pytest.raises(FloatingPointError, match=r"log-likelihoods of ensemble, head 1 are not finite.* request [01]:"):
        log_likelihoods(model, requests, choose_scorers(model.config, "each"))


def test_a_task_whose_likelihoods_are_not_finite_has_no_score(model, tmp_path, monkeypatch, text, capsys):
    """D2"""
    path, output = "zero_shot", tmp_path / "scores.json"
    arguments = ("--model", save(overflowing(model), tmp_path / "model"), *PROGRAMS[path](text), "--output", output)
    with pytest.raises(ValueError, match="arc_easy failed"):
        program(path, monkeypatch, *arguments).main()
    report = json.loads(output.read_text())
    assert "are not finite" in report["failed"]["arc_easy"] and not report["complete"]
    assert not report["results"] and not report["average"] and "acc" not in capsys.readouterr().out


def test_no_json_file_holds_what_is_no_number(tmp_path):
    """D2"""
    write_json(path := tmp_path / "a.json", {"value": 1.0})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"a.json is not written: .*nan; accepted are finite numbers"):
        write_json(path, {"value": float("nan")})
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["a.json"]


def test_both_examples_name_a_weight_that_is_not_finite(model, tmp_path, monkeypatch):
    """D2"""
    name = poisoned(model)
    save(model, tmp_path)
    for path in ("examples/generate.py", "examples/uncertainty.py"):
        with pytest.raises(ValueError, match=f"has weights that are not finite, for example {name}"):
            program(path, monkeypatch, "--model", tmp_path, "--prompt", "The").main()


# ------------------------------------------------------------------------ D1: outputs are looked at before, and last


def test_an_output_is_checked_and_nothing_is_made(tmp_path, monkeypatch):
    """D1"""
    file = tmp_path / "file"
    file.write_text("x")
    for good in (file, tmp_path / "new", tmp_path / "a" / "b" / "new", Path("relative.json")):
        check_output(good)
    for good in (tmp_path, tmp_path / "new", tmp_path / "a" / "b"):
        check_output(good, directory=True)
    for bad, directory, problem in (
        (tmp_path, False, f"--output {tmp_path}: is no file"),
        (file, True, f"--output {file}: is no directory"),
        (file / "x.json", False, f"{file} is no directory"),
        (file / "x", True, f"{file} is no directory"),
        (Path(os.devnull), False, "is no file"),
    ):
        with pytest.raises(ValueError) as error:
            check_output(bad, directory=directory)
        assert problem in str(error.value) and "accepted is the path of a" in str(error.value)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match=f"--html .*: {tmp_path} cannot be written to"):
        check_output(tmp_path / "a" / "b.html", option="--html")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("path", PROGRAMS)
def test_a_bad_output_is_told_before_a_model_is_loaded(path, model, text, tmp_path, monkeypatch):
    """D1"""
    output = text if path == "diversity" else tmp_path
    module = program(
        path, monkeypatch, "--model", save(model, tmp_path / "model"), *PROGRAMS[path](text), "--output", output
    )
    monkeypatch.setattr(module, "load_for_evaluation", lambda _: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=f"--output {output}: is no"):
        module.main()


@pytest.mark.parametrize("path", PROGRAMS)
def test_what_cannot_be_written_is_printed_nevertheless(path, model, text, tmp_path, monkeypatch, capsys):
    """D1"""
    arguments = ("--model", save(model, tmp_path / "model"), *PROGRAMS[path](text), "--output", tmp_path / "out")
    module = program(path, monkeypatch, *arguments)
    written = []

    def full(path, content):
        written.append(content)
        if path.name != "out" or content.get("complete", True):  # zero_shot.py also writes while it works
            raise OSError("no space left")

    monkeypatch.setattr(module, "write_json", full)
    with pytest.raises(OSError, match="no space left"):
        module.main()
    assert {"zero_shot": "| arc_easy"}.get(path, "ensemble, logits") in capsys.readouterr().out


@pytest.mark.parametrize("option", [("--heads", "7"), ("--batch_size", "0"), ("--max_tokens", "0"), ("--stride", "-1")])
def test_bad_arguments_are_told_before_a_model_is_loaded(option, model, text, tmp_path, monkeypatch):
    """D1, its kind: programs that fail late."""
    arguments = ("--model", save(model, tmp_path / "model"), "--data", text, "--output", tmp_path / "out", *option)
    module = program("diversity", monkeypatch, *arguments)
    monkeypatch.setattr(module, "load_for_evaluation", lambda _: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=option[0].removeprefix("--")):
        module.main()


# ------------------------------------------------------------------------------------------------------ D3: padding


@pytest.mark.parametrize("has_eos", [True, False])
def test_prompts_are_continued_without_a_pad_token(has_eos, model, tmp_path, monkeypatch, capsys):
    """D3"""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.eos_token = tokenizer.eos_token if has_eos else None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    arguments = ("--model", tmp_path, "--prompt", "The best way", "--prompt", "You", "--max_new_tokens", 4)
    program("examples/generate.py", monkeypatch, *arguments).main()
    printed = capsys.readouterr().out
    assert "> The best way" in printed and "> You" in printed


# ---------------------------------------------------------------------------- D5: what stays dense, and what is dense


class Mixed(nn.Module):
    """Modules that carry masks beside some that cannot."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.MultiheadAttention(8, 2) for _ in range(2))
        self.rnn = nn.LSTM(8, 8)
        self.up = nn.ConvTranspose2d(4, 4, 3)
        self.pairs = nn.Bilinear(4, 4, 4)
        self.volume = nn.Conv3d(2, 6, (1, 2, 3))
        self.norm = nn.LayerNorm(8)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))


DENSE = ["blocks.*.in_proj_weight", "rnn.weight_ih_l*", "rnn.weight_hh_l*", "up.weight", "pairs.weight"]


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "stay dense" in record.getMessage()]


def test_parameters_that_cannot_carry_a_mask_are_named_once(caplog):
    """D5"""
    net, config = Mixed(), SparsityConfig(density=0.5)
    draw_masks(net, config)
    (told,) = warnings(caplog)
    assert set(told.split(": ")[1].split(", ")) == set(DENSE) and "\n" not in told
    Sparsifier(nn.Sequential(net), torch.optim.Adam(net.parameters()), config, 10)
    assert len(warnings(caplog)) == 1
    loaded = Mixed()  # as from a checkpoint: it has its masks
    loaded.volume.register_buffer("weight_mask", net.volume.weight_mask)
    loaded.volume.weight.data.copy_(net.volume.weight)
    Sparsifier(loaded, torch.optim.Adam(loaded.parameters()), config, 10)
    assert warnings(caplog)[1] == told


def test_what_was_excluded_or_cannot_be_meant_is_not_named(caplog, model):
    """D5"""
    draw_masks(net := Mixed(), SparsityConfig(density=0.5, exclude=["rnn.*", "*in_proj*", "up.weight", "pairs.*"]))
    assert list(masked_modules(net)) == ["blocks.0.out_proj.weight", "blocks.1.out_proj.weight", "volume.weight"]
    draw_masks(model, SparsityConfig(density=0.5, distribution="uniform"))
    draw_masks(nn.Sequential(nn.LSTM(4, 4)), SparsityConfig())  # dense: nothing was to be sparse
    assert warnings(caplog) == []
    with pytest.raises(ValueError, match=r"'nn\.\*': fits none"):
        draw_masks(Mixed(), SparsityConfig(density=0.5, exclude=["nn.*"]))


@pytest.mark.parametrize("distribution", ["uniform", "erk", "flops"])
@pytest.mark.parametrize("structure", ["unstructured", "constant_fan_in"])
def test_three_dimensional_convolutions_are_sparse(distribution, structure):
    """D5"""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(4, 8, 2), nn.ReLU(), nn.Conv3d(8, 4, 2))
    config = SparsityConfig(density=0.25, distribution=distribution, structure=structure, update_interval=2)
    x = torch.randn(2, 4, 5, 5, 5)
    draw_masks(net, config, loss=lambda: net(x).square().mean())
    optimizer = torch.optim.Adam(net.parameters())
    sparsifier = Sparsifier(net, optimizer, config, 8)
    # Once a position of the output, of which there are 2 x 4^3 and 2 x 3^3.
    assert weight_uses(masked_modules(net), lambda: net(x)) == {"0.weight": 128, "2.weight": 54}
    before = get_mask(net[0])
    for _ in range(4):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        sparsifier.step()
        optimizer.step()
    assert sparsifier.report().overall.density == pytest.approx(0.25, abs=0.01) and check_masks(net) == []
    assert (net[0].weight != 0).sum() == get_mask(net[0]).sum() and not torch.equal(before, get_mask(net[0]))


def test_a_density_report_is_a_table(model):
    """D5"""
    config = SparsityConfig(density=0.5)
    report = Sparsifier(model, torch.optim.Adam(model.parameters()), config, 10).report()
    head, rule, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in str(report).splitlines()]
    assert head == ["weights", "tensors", "size", "target", "active", "density"] and rule[0].strip("-") == ""
    assert [row[0] for row in rows] == [*(row.name for row in report.groups), "overall"]
    overall = report.overall
    assert rows[-1][1:] == [
        str(len(report.tensors)), f"{overall.size:,}", f"{overall.target:,}", f"{overall.active:,}",
        f"{overall.density:.4f}",
    ]  # fmt: skip
    assert sum(int(row[1]) for row in rows[:-1]) == len(report.tensors)


# ------------------------------------------------------------------------------------------- B9: excluding an alias


def test_excluding_the_other_name_of_a_tied_weight_is_no_mistake():
    """B9"""
    config = NeuroTrailsLlamaConfig(**SIZES, **VARIANTS["tied"] | {"masked_modules": []})
    model = NeuroTrailsLlamaForCausalLM(config)
    draw_masks(model, SparsityConfig(density=0.5, exclude=["lm_heads.*", "model.heads.*"]))
    assert model.config.masked_modules == ["*", "!lm_heads.*", "!model.heads.*"]
    assert not any("heads" in name for name in masked_modules(model))
    again = NeuroTrailsLlamaForCausalLM(model.config)  # the same choice, by masked_modules
    assert list(masked_modules(again)) == list(masked_modules(model))


def test_pads_of_evaluations_are_no_text(model):
    """D3: rows of unlike lengths score as alone, also where the tokenizer has no pad token."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    texts = ["The best way to learn", "You"]
    both = evaluate(model, DocumentWindows(texts, tokenizer, length=64, batch_size=2))
    alone = evaluate(model, DocumentWindows(texts, tokenizer, length=64, batch_size=1))
    assert both.head_losses == pytest.approx(alone.head_losses, rel=1e-5)
