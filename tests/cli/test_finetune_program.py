"""nt-hf finetune where TRL is not installed: its help, and one line that says what to install."""

import sys

import pytest

from nt_hf_console import main


@pytest.fixture(autouse=True)
def without_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)


def test_it_says_what_to_install(tmp_path):
    with pytest.raises(SystemExit, match=r"error: trl is not installed: pip install 'nt_hf\[finetune\]'") as ended:
        main(["finetune", "--model", "m", "--data", "d.jsonl", "--output_dir", str(tmp_path / "out")])
    assert "\n" not in str(ended.value) and not (tmp_path / "out").exists()


def test_its_help_lists_its_options(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["finetune", "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "--head_noise" in text and "--packing" in text
