"""The console program: its verbs, what it says of unknown ones and missing packages, and that a wheel is enough."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

from nt_hf import __version__
from nt_hf.cli.program import provenance
from nt_hf.data.sources import find_files
from nt_hf_console import VERBS, main


def test_help_lists_every_verb_in_one_line(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        main(arguments)
        lines = capsys.readouterr().out.splitlines()
        for verb, (module, description) in VERBS.items():
            assert [line.split(maxsplit=len(verb.split()))[-1] for line in lines if line.startswith(f"  {verb} ")] == [
                description
            ]
            assert importlib.util.find_spec(f"nt_hf.cli.{module}"), module
        assert max(map(len, lines)) <= 120
    main(["evaluate"])
    assert "evaluate zero-shot" in (text := capsys.readouterr().out) and "tokenizer" not in text
    main(["--version"])
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("arguments", [["evaluat"], ["evaluate", "speed"], ["perplexity"]])
def test_an_unknown_verb_is_one_line_with_the_known_ones(arguments):
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--model", "x"])
    line = f"error: nt-hf {' '.join(arguments)}: unknown; accepted are train, train-images, finetune, prepare, "
    assert str(ended.value.code).startswith(line) and "\n" not in str(ended.value.code)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if not verb.startswith(("train", "plan", "evaluate zero"))])
def test_a_verb_has_help_and_errors_of_one_line(verb, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*verb.split(), "--help"])
    assert ended.value.code == 0 and f"usage: nt-hf {verb} " in (text := capsys.readouterr().out)
    assert f"    nt-hf {verb} " in text, "an example"
    data = {
        "report": [],
        "evaluate compare": ["x.json"],
        "prepare": ["--data", "x.json"],
        "tokenizer": ["--data", "x.json"],
    }
    arguments = data.get(verb, ["--model", "x", "--data", "x.json"])
    arguments += [str(tmp_path / "none")] if verb == "report" else ["--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main([*verb.split(), *arguments])
    assert str(ended.value.code).startswith("error: ") and "\n" not in str(ended.value.code)


def test_a_missing_package_is_one_line_that_says_how_to_install_it(monkeypatch, tmp_path):
    for name in ("nt_hf.cli.zero_shot", "nt_hf.evaluation.zero_shot", "nt_hf.evaluation.zero_shot_tasks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "zero-shot", "--help"])
    assert ended.value.code == "error: lm_eval is not installed: pip install 'nt_hf[eval]'"
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"^hub:a/b: .*datasets is not installed: pip install 'nt_hf\[data\]'\)$"):
        find_files("hub:a/b")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(SystemExit) as ended:
        main(["tokenizer", "--data", str(tmp_path / "x.parquet"), "--output", str(tmp_path / "out")])
    assert ended.value.code.endswith("x.parquet: cannot be read (pyarrow is not installed: pip install 'nt_hf[data]')")


@pytest.mark.parametrize("program", ["bin/nt-hf", "nt_hf/cli/__main__.py"])
def test_a_result_names_the_command_that_made_it(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"/somewhere/{program}", "evaluate", "perplexity", "--model", "a b"])
    assert provenance()["command"] == "nt-hf evaluate perplexity --model 'a b'"


def run(*arguments: str, folder, **options) -> subprocess.CompletedProcess:
    """Runs Python with the package that lies in ``folder``."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, **options)


@pytest.mark.parametrize("arguments", [["--help"], ["evaluate"], ["evaluat"]])
def test_help_loads_no_library(arguments, tmp_path):
    code = f"""
import sys, nt_hf_console
try:
    nt_hf_console.main({arguments})
finally:
    print(sorted({{name.partition(".")[0] for name in sys.modules}} - sys.stdlib_module_names))
"""
    loaded = run("-S", "-c", code, folder=ROOT, cwd=tmp_path).stdout.splitlines()[-1]  # -S: nor what is installed
    assert loaded == "['__main__', 'nt_hf_console']"


@pytest.mark.slow
def test_a_wheel_alone_trains_the_demo(tmp_path):
    source, folder, work = tmp_path / "source", tmp_path / "installed", tmp_path / "work"
    source.mkdir()
    work.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "nt_hf_console.py"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("nt_hf", "recipes"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    build = ["-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    built = run(*build, folder=source)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    for name in ("py.typed", "configs/demo.yaml", "inference/csrc/sparse_linear.cpp", "data/sample/tokenizer.json"):
        assert (folder / "nt_hf" / name).is_file(), name
    commands = (
        ["tokenizer", "--data", "sample:train", "--vocab_size", "2048", "--output", "runs/demo/tokenizer"],
        ["train", "--config", "demo", "--output_dir", "runs/demo", "--train.max_steps", "2", "--train.eval_steps", "2",
         "--train.save_steps", "2", "--data.validation_tokens", "500"],
        ["report", "runs/demo"],
    )  # fmt: skip
    for command in commands:
        done = run("-m", "nt_hf.cli", *command, folder=folder, cwd=work)
        assert done.returncode == 0, done.stderr
    assert (work / "runs" / "demo" / "checkpoint-2" / "model.safetensors").is_file()
    where = run("-c", "import nt_hf; print(nt_hf.__file__)", folder=folder, cwd=work).stdout
    assert where.startswith(str(folder))
