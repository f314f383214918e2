"""README and pages: links lead somewhere, named files and commands exist, code runs, the reference is up to date."""

import importlib.util
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import yaml
from byte_tokenizer import byte_tokenizer
from conftest import script, trained

from nt_hf import SparsityConfig
from nt_hf_console import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def code(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=named)
def test_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    folders = "nt_hf|recipes|eval|examples|docs|benchmarks|tests|experiments"
    for path in re.findall(rf"(?<![\w/.-])(?:{folders})/[\w/.-]*\w", text):
        if not path.startswith("eval/head_losses"):  # a name in trackers
            assert (ROOT / path).exists(), path
    for module in re.findall(r"\bpython -m ([\w.]+)|-m (nt_hf[\w.]*)", text):
        assert importlib.util.find_spec(next(filter(None, module))), module
    for module in re.findall(r"\bfrom (nt_hf[\w.]*) import", text):
        assert importlib.util.find_spec(module), module


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs").rglob("*.md")):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert name == "README.md" or name.startswith("results/") or f"({name})" in index, name


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_configuration_page_is_what_its_script_writes():
    script_ = script("docs/make_configuration.py")
    assert script_.page() == (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8"), (
        "run python docs/make_configuration.py"
    )


def test_methods_of_the_page_are_accepted():
    text = (ROOT / "docs" / "sparsify-your-model.md").read_text(encoding="utf-8")
    calls = re.findall(r"`(SparsityConfig\(.*?\))`", text)
    assert len(calls) == 8
    for call in calls:
        assert eval(call.replace("density=…", "density=0.5"), {"SparsityConfig": SparsityConfig}).is_sparse, call


def test_the_citation_is_complete():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["preferred-citation"]["authors"][0]["family-names"] == "Grooten"


# ---------------------------------------------------------------------------------------------------- code that runs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    trained("neurotrails").save_pretrained(directory)
    tokenizer = byte_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(directory)
    return directory


def test_the_code_of_the_readme_runs(checkpoint, tmp_path, capsys):
    sparsify, heads, load = code(ROOT / "README.md", "python")
    model = torch.nn.Linear(16, 16)
    batches = [(torch.randn(4, 16), torch.randn(4, 16)) for _ in range(3)]
    exec(sparsify, {"model": model, "batches": batches, "loss_function": torch.nn.functional.mse_loss})
    assert 0 < model.weight.count_nonzero() <= round(0.2 * 256)
    trained("neurotrails").extract_trail(0).save_pretrained(tmp_path)
    names: dict = {}
    exec(heads.replace("path or hub id", str(tmp_path)).replace("blocks_in_head=4", "blocks_in_head=2"), names)
    assert names["model"].config.num_ensemble_heads == 3 and type(names["stock"]).__name__ == "LlamaForCausalLM"
    assert "runs/demo/checkpoint-1400" in load
    exec(load.replace("runs/demo/checkpoint-1400", str(checkpoint)), {})
    assert "The best way to" in capsys.readouterr().out


def test_the_code_of_using_a_checkpoint_runs(checkpoint):
    names: dict = {}
    blocks = code(ROOT / "docs" / "use-a-checkpoint.md", "python")
    assert len(blocks) == 9
    replacements = {"runs/demo/checkpoint-1400": str(checkpoint), "rows=(8, 1024)": "rows=(1, 8)"}
    for block in blocks:
        for old, new in replacements.items():
            block = block.replace(old, new)
        exec(block, names)
    assert not names["check_masks"](names["model"])
    assert names["one"].config.num_ensemble_heads == 1 and names["many"].config.num_ensemble_heads == 3


def test_the_code_of_finetuning_runs(checkpoint):
    names: dict = {"torch": torch, "input_ids": torch.arange(10, 30)[None]}
    for block in code(ROOT / "docs" / "finetune.md", "python"):
        exec(block.replace("runs/tuned", str(checkpoint)), names)
    assert type(names["stock"]).__name__ == "LlamaForCausalLM" and names["loss"].isfinite()


def test_the_code_of_sparsifying_runs():
    first = code(ROOT / "docs" / "sparsify-your-model.md", "python")[0]
    model = torch.nn.Sequential(OrderedDict(block=torch.nn.Linear(16, 32), lm_head=torch.nn.Linear(32, 4)))
    names = {"model": model, "loss": model(torch.randn(2, 16)).square().sum()}
    exec(first, names)
    assert names["sparsifier"].report().overall.density == pytest.approx(0.5, abs=0.01)


def commands(page: Path) -> list[list[str]]:
    """The verbs of every ``nt-hf`` command of a page, such as ``["evaluate", "perplexity"]``."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"\bnt-hf ((?:evaluate )?[a-z][a-z-]+)\b", text)
    return sorted({tuple(verbs.split()) for verbs in found})


def test_every_command_exists(capsys):
    """The verbs that pages name, and the options that they give them, are in the help."""
    named_options: dict[tuple[str, ...], set[str]] = {}
    for page in PAGES:
        for verbs in commands(page):
            named_options.setdefault(verbs, set())
        for block in code(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if match := re.match(r"nt-hf ((?:evaluate )?[a-z-]+)(.*)", line.partition("  #")[0]):
                    options = re.findall(r"(?<!\S)--([a-z_]+)(?![\w.])", match[2])
                    named_options.setdefault(tuple(match[1].split()), set()).update(options)
    assert len(named_options) >= 9
    named_options.pop(("evaluate",), None)  # the group, which lists its verbs
    for verbs, options in named_options.items():
        with pytest.raises(SystemExit) as ended:
            main([*verbs, "--help"])
        assert ended.value.code == 0, verbs
        text = capsys.readouterr().out
        for option in options:
            assert f"--{option}" in text, (verbs, option)
