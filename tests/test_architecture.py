"""Imports run one way. What a checkpoint carries imports only torch, transformers, safetensors and its own files."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted(path.relative_to(ROOT) for path in (ROOT / "nt_hf").rglob("*.py"))
FOLDERS = ("recipes", "eval", "examples", "benchmarks")
SCRIPTS = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MODEL = {
    "configuration_neurotrails_llama",
    "ensemble",
    "lm_heads",
    "losses",
    "modeling_neurotrails_llama",
    "masks",
    "sparse_checkpoint",
    "speculative",
    "transformers_versions",
}
# Which of the package's modules each one may know, the rest of the standard library aside.
ARROWS = {
    "selection": (set(), {"torch", "numpy"}),
    "topology": ({"masks", "selection"}, {"torch"}),
    "schedules": (set(), {"torch"}),
    "masks": (set(), {"torch", "transformers"}),
    "transformers_versions": (set(), {"transformers"}),
    "configuration_neurotrails_llama": ({"masks", "transformers_versions"}, {"torch", "transformers"}),
    "ensemble": ({"configuration_neurotrails_llama"}, {"torch", "transformers"}),
    "losses": (set(), {"torch"}),
    "lm_heads": ({"ensemble", "losses"}, {"torch"}),
    "speculative": ({"lm_heads", "transformers_versions"}, {"torch", "transformers"}),
    "sparse_checkpoint": ({"masks"}, {"torch", "safetensors"}),
    "modeling_neurotrails_llama": (
        {
            "configuration_neurotrails_llama",
            "ensemble",
            "lm_heads",
            "losses",
            "masks",
            "sparse_checkpoint",
            "speculative",
            "transformers_versions",
        },
        {"torch", "transformers"},
    ),
    "sparse_runtime": ({"masks"}, {"torch"}),
    "shares": (set(), set()),
    "sources": ({"shares"}, {"datasets", "fsspec", "pyarrow"}),
    "data": ({"shares", "sources"}, {"torch", "transformers"}),
    "prepared": ({"data", "sources"}, {"numpy", "safetensors", "torch", "transformers"}),
    "sparsity_config": ({"topology", "schedules", "masks"}, set()),
    "first_masks": ({"sparsity_config", "topology", "masks"}, {"torch", "safetensors"}),
    "sharding": ({"masks"}, {"torch"}),
    "tables": (set(), set()),
    "density_report": ({"tables"}, set()),
    "sparsifier": (
        {"sparsity_config", "first_masks", "topology", "selection", "schedules", "masks", "sharding", "density_report"},
        {"torch"},
    ),
}
# Absent on some machines that train from local files: they may be imported within functions only.
OPTIONAL = {"datasets", "lm_eval", "matplotlib", "wandb", "trackio", "zstandard"}
# Nothing but a subclass of theirs and their tasks, imported by nobody else.
HARNESS = {"zero_shot": {"lm_eval"}, "zero_shot_tasks": {"datasets", "lm_eval"}}


def parse(path):
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def imports(path, nodes=ast.walk):
    """The (level, module) of every import of a file: level 0 is absolute, 1 is ``from .module``."""
    for node in nodes(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


def third_party(path):
    """Top-level names of the packages that a file imports, beside the standard library."""
    names = {module.split(".")[0] for level, module in imports(path) if level == 0}
    return names - set(sys.stdlib_module_names)


def test_there_is_something_to_check():
    assert {path.stem for path in PACKAGE} >= ARROWS.keys() and SCRIPTS


@pytest.mark.parametrize("name", ARROWS)
def test_a_module_knows_only_what_lies_below_it(name):
    path = Path("nt_hf") / f"{name}.py"
    inner, outer = ARROWS[name]
    assert {module for level, module in imports(path) if level} <= inner
    assert third_party(path) <= outer


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_the_package_uses_flat_relative_imports_and_no_recipe(path):
    assert path.parent == Path("nt_hf")
    for level, module in imports(path):
        assert level < 2 and module.split(".")[0] not in {"nt_hf", "recipes", "eval"}
        assert not (level == 1 and "." in module), module
    if path.stem in MODEL:
        assert all(module for level, module in imports(path) if level)  # no ``from . import x``


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_optional_packages_are_imported_only_where_they_are_used(path):
    at_once = {module.split(".")[0] for _, module in imports(path, nodes=lambda tree: tree.body)}
    assert not at_once & (OPTIONAL - HARNESS.get(path.stem, set()))
    if path.stem not in HARNESS:
        assert not {module for level, module in imports(path) if level} & HARNESS.keys()


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_the_library_logs_and_never_prints(path):
    calls = [node.func for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
    assert "print" not in {call.id for call in calls if isinstance(call, ast.Name)}


@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_scripts_import_the_installed_package(path):
    assert all(level == 0 for level, _ in imports(path))
