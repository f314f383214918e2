"""The floors of the package: imports run down only, and files and functions stay short."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted(path.relative_to(ROOT / "nt_hf") for path in (ROOT / "nt_hf").rglob("*.py"))
PROGRAMS = sorted(
    path.relative_to(ROOT)
    for folder in ("recipes", "eval", "examples", "benchmarks", "experiments")
    for path in (ROOT / folder).rglob("*.py")
)
MODEL = {path.stem for path in PACKAGE if path.parts[0] == "models" and path.stem != "__init__"}

# Who may know whom: a room knows itself and the rooms that are named here.
UTILITIES = {"_version", "files", "text", "checks"}
FLOORS = {
    "models": set(),
    "sparsity": UTILITIES | {"models"},
    "data": UTILITIES | {"models"},
    "inference": UTILITIES | {"models"},
    "yaml_values": {"checks"},
    "config": UTILITIES | {"yaml_values", "models", "sparsity", "data"},
    "evaluation": UTILITIES | {"models", "sparsity", "data"},
    "plan": UTILITIES | {"models", "sparsity", "data", "config"},
    "training": UTILITIES | {"models", "sparsity", "data", "config", "evaluation", "plan"},
    "cli": UTILITIES | {"models", "sparsity", "data", "inference", "config", "evaluation", "plan", "training"},
    "__init__": {"_version", "models", "sparsity"},
    **{name: set() for name in UTILITIES},
}
# What the rooms at the bottom may import beside the standard library.
# Transformers needs huggingface_hub, so that checkpoints may carry code that imports it.
LIBRARIES = {"models": {"torch", "transformers", "safetensors", "huggingface_hub"}, "inference": {"torch", "numpy"}}
# Absent on some machines that train from local files: imported within functions only, or by a module of their own.
OPTIONAL = {"datasets", "lm_eval", "matplotlib", "wandb", "trackio", "zstandard", "PIL", "trl", "peft"}
NEEDS_EXTRA = {
    Path("evaluation/zero_shot.py"),
    Path("evaluation/zero_shot_tasks.py"),
    Path("training/finetune.py"),
    Path("training/finetune_data.py"),
}

FILE_LINES, FUNCTION_LINES = 500, 100


def parse(path):
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def imports(path, nodes=ast.walk):
    """The (level, module) of every import of a file: level 0 is absolute, 1 is ``from .module``."""
    for node in nodes(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


def room(path):
    """The room of a file; what ``python -m`` runs is a program."""
    return "cli" if path.name == "__main__.py" else path.parts[0].removesuffix(".py")


def rooms_known(path):
    """The other rooms that a file of the package imports from."""
    depth = len(path.parts)
    for level, module in imports(Path("nt_hf") / path):
        if level:
            assert level <= depth and module, f"{path}: from {'.' * level}{module}"
            yield room(path) if level < depth else module.split(".")[0]


def test_every_file_has_a_room_on_a_floor():
    assert PROGRAMS and {room(path) for path in PACKAGE} <= FLOORS.keys()


def test_imports_run_down():
    for path in PACKAGE:
        assert set(rooms_known(path)) <= FLOORS[room(path)] | {room(path)}, path


def test_the_rooms_at_the_bottom_import_little():
    for path in PACKAGE:
        names = {module.split(".")[0] for level, module in imports(Path("nt_hf") / path) if level == 0}
        if (allowed := LIBRARIES.get(room(path))) is not None:
            assert names - set(sys.stdlib_module_names) <= allowed, path


def test_a_checkpoint_can_carry_the_model_files():
    """Transformers copies what ``from .name import`` names, by its file's name, into one folder."""
    paths = [path for path in PACKAGE if path.parts[0] == "models"]
    assert all(len(path.parts) == 2 for path in paths)
    for path in paths:
        assert all(level < 2 and "." not in module for level, module in imports(Path("nt_hf") / path) if level), path


def test_optional_packages_are_imported_where_they_are_used():
    for path in PACKAGE:
        at_once = {module.split(".")[0] for _, module in imports(Path("nt_hf") / path, lambda tree: tree.body)}
        assert not at_once & OPTIONAL or path in NEEDS_EXTRA, path


def test_the_package_knows_no_program_and_programs_use_the_package():
    programs = {"recipes", "eval", "examples", "benchmarks", "experiments", "nt_hf", "nt_hf_console"}
    for path in (path for path in PACKAGE if path != Path("cli/__main__.py")):
        assert not {module.split(".")[0] for level, module in imports(Path("nt_hf") / path) if not level} & programs, (
            path
        )
    for path in PROGRAMS:
        assert all(level == 0 for level, _ in imports(path)), path


def test_the_library_logs_and_never_prints():
    for path in (path for path in PACKAGE if room(path) != "cli"):
        calls = [node.func for node in ast.walk(parse(Path("nt_hf") / path)) if isinstance(node, ast.Call)]
        assert "print" not in {call.id for call in calls if isinstance(call, ast.Name)}, path


@pytest.mark.parametrize("folder", ["nt_hf", "recipes", "eval", "examples", "benchmarks", "experiments"])
def test_files_and_functions_are_short(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= FILE_LINES, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < FUNCTION_LINES, f"{path}: {node.name}"
