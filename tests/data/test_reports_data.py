"""Faults that users of neighbouring projects reported, tried here: tokenizers and sources of text.

Each test names the entry of the list of reports that it is for.
"""

import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from recipe_runs import call, train
from tokenizers import processors
from transformers import AutoTokenizer, ByT5Tokenizer, T5Tokenizer

from nt_hf.cli import tokenizer as tokenizer_program
from nt_hf.data.errors import DataError
from nt_hf.data.prepare import prepare
from nt_hf.data.prepared import tokenizer_fingerprint
from nt_hf.data.sources import read_texts
from nt_hf.data.streams import TokenBatches
from nt_hf.data.tokenizers import load_tokenizer

ROOT = Path(__file__).parents[2]
DOCUMENTS = [{"text": f"document {number}"} for number in range(40)]
TEXTS = [document["text"] for document in DOCUMENTS]
LINES = "\n".join(map(json.dumps, DOCUMENTS))


# -------------------------------------------------------------------------------------------------- tokenizers


def adding(kind: str, config: Path, folder: Path) -> Path:
    """A tokenizer that adds tokens by itself: its class does (T5), its file does (Llama), or its code (ByT5)."""
    if kind == "appends":
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in "abcdehlmnotuw .")]
        T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder)
    elif kind == "prepends":
        tokenizer = AutoTokenizer.from_pretrained(config.parent / "tokenizer")
        tokenizer.add_special_tokens({"bos_token": "<pad>"})
        tokenizer.padding_side = "left"
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<pad> $A", pair="<pad> $A <pad> $B", special_tokens=[("<pad>", 0)]
        )
        tokenizer.save_pretrained(folder)
    else:
        ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["appends", "prepends"])
def test_a_checkpoints_tokenizer_adds_nothing(config, tmp_path, kind):
    """C1"""
    path = adding(kind, config, tmp_path / "tokenizer")
    before = AutoTokenizer.from_pretrained(path)
    plain = before("the name", add_special_tokens=False)["input_ids"]
    assert before("the name")["input_ids"] != plain, "the test needs a tokenizer that adds tokens"
    loaded = load_tokenizer(str(path))
    assert loaded.name_or_path == str(path)
    loaded.save_pretrained(tmp_path / "saved")
    # Beside a configuration, as in a checkpoint, and by itself; an older checkpoint's copy is loaded as `path` is.
    for model_type in (None, "neurotrails_llama", "llama"):
        if model_type:
            (tmp_path / "saved" / "config.json").write_text(json.dumps({"model_type": model_type}))
        for after in (loaded, AutoTokenizer.from_pretrained(tmp_path / "saved")):
            assert after("the name")["input_ids"] == plain
            assert after("the", "name")["input_ids"] == [
                *before("the", add_special_tokens=False)["input_ids"],
                *before("name", add_special_tokens=False)["input_ids"],
            ]
            assert tokenizer_fingerprint(after) == tokenizer_fingerprint(before)
            assert after.special_tokens_map == before.special_tokens_map
            for key in ("padding_side", "truncation_side", "model_input_names", "model_max_length"):
                assert getattr(after, key) == getattr(before, key), key
            assert after.decode(plain) == before.decode(plain)


def test_training_data_are_the_same_and_the_checkpoint_encodes_as_they_were(config, tmp_path):
    """C1, E2"""
    path = adding("prepends", config, tmp_path / "tokenizer")
    batches = [
        next(iter(TokenBatches("sample:train", tokenizer, batch_size=4, sequence_length=32)))["input_ids"].tolist()
        for tokenizer in (AutoTokenizer.from_pretrained(path), load_tokenizer(str(path)))
    ]
    assert batches[0] == batches[1]
    train(config, tmp_path / "run", "--data.tokenizer", path, "--train.max_steps", 1)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    for found in (AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False), load_tokenizer(str(checkpoint))):
        assert found("Answer:")["input_ids"] == load_tokenizer(str(path)).encode("Answer:", add_special_tokens=False)
    saved = json.loads((checkpoint / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only"} & saved.keys()


def test_the_tokenizer_of_a_checkpoint_loads_without_a_question(config, tmp_path):
    """E2: where a terminal would be asked, input() fails."""
    train(config, tmp_path / "run", "--train.max_steps", 1)
    code = f"""
import builtins, os
def asked(*_):
    print("asked")
    os._exit(1)
builtins.input = asked
from transformers import AutoTokenizer
path = {str(tmp_path / "run" / "checkpoint-1")!r}
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)  # it has no code
print(tokenizer("a")["input_ids"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and "asked" not in result.stdout, result.stderr


def test_a_tokenizer_that_adds_in_code_of_its_own_is_told_of(config, tmp_path, caplog):
    """C1: what nt_hf loads of it adds nothing; what others load would."""
    tokenizer = load_tokenizer(str(adding("by itself", config, tmp_path)))
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]
    assert "must pass add_special_tokens=False" in caplog.text


@pytest.mark.parametrize("name", ["runs/none/tokenizer", "./none", "/none"])
def test_a_directory_that_is_not_there_is_named(name):
    """D6: no hub is asked."""
    with pytest.raises(ValueError, match=f"^tokenizer='{name}': there is no such directory$"):
        load_tokenizer(name)


def test_a_tokenizers_output_must_be_a_directory(tmp_path):
    """D6"""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"file: cannot be written \(File exists\)$"):
        call(tokenizer_program.main, "--data", "sample:validation", "--output", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ValueError, match="vocab_size=3"):
        call(tokenizer_program.main, "--data", "sample:validation", "--vocab_size", 3, "--output",
             tmp_path / "none")  # fmt: skip
    assert not (tmp_path / "none").exists()


# ----------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", json.dumps(DOCUMENTS).encode()),
        ("indented.json", ("\ufeff\n" + json.dumps(DOCUMENTS, indent=2)).encode()),
        ("list.jsonl.gz", gzip.compress(json.dumps(DOCUMENTS).encode())),
        ("gzip.jsonl", gzip.compress(LINES.encode())),
        ("xz.json", lzma.compress(LINES.encode())),
        ("zst.json", pyarrow.compress(LINES.encode(), "zstd", asbytes=True)),
        ("other.jsonl.xz", gzip.compress(LINES.encode())),
    ],
)
def test_files_are_what_they_hold(tmp_path, name, content):
    """C12: lists of documents, and archives by their first bytes."""
    (tmp_path / name).write_bytes(content)
    assert list(read_texts(str(tmp_path / name))) == TEXTS


def test_a_text_file_is_one_document(tmp_path):
    """C12"""
    own = "First line.\n\nSecond, naïve line.\n"
    (tmp_path / "a.txt").write_text(own)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(own.encode("utf-8-sig")))
    (tmp_path / "c.txt").write_bytes(own.encode("utf-16"))
    assert list(read_texts([str(tmp_path / "*.txt"), str(tmp_path / "b.txt.gz")])) == [own] * 3
    batches = TokenBatches(
        str(tmp_path / "?.txt"), load_tokenizer("sample"), batch_size=1, sequence_length=64, epochs=1
    )
    (batch,) = batches
    assert (batch["labels"] == 1).sum() == batches.documents == 2
    (tmp_path / "d.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError, match=r"d.txt, line 1: is not UTF-8 text \(UnicodeDecodeError: [^\n]*$") as caught:
        list(read_texts(str(tmp_path / "d.txt")))
    assert "on_bad_line" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "helps"),
    [
        (f"a header\n{LINES}", True),
        (f"{LINES}\na footer", True),
        (f"[1, 2\n{LINES}", True),
        (json.dumps({"data": DOCUMENTS}, indent=1), False),
        ("id,text\n1,one\n2,two\n", False),
        (LINES.replace("text", "content"), False),
        ("a single line", False),
    ],
)
def test_skipping_is_advised_only_where_something_is_left(tmp_path, content, helps):
    """C12"""
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"^[^\n]*x.jsonl, line \d+: [^\n]*$") as caught:
        list(read_texts(str(path)))
    assert ("on_bad_line='skip' would leave it out" in str(caught.value)) == helps
    assert bool(list(read_texts(str(path), on_bad_line="skip"))) == helps


def test_brackets_in_a_folders_name_are_no_glob(tmp_path):
    """D6"""
    for folder in ("web [2015]", "web 2"):
        (tmp_path / folder / "deep").mkdir(parents=True)
        (tmp_path / folder / "deep" / "x.jsonl").write_text(json.dumps({"text": folder}))
    for entry in ("web [2015]/deep/*.jsonl", "web [2015]/**/*.jsonl", "web [2015]/*/x.jsonl"):
        assert list(read_texts(str(tmp_path / entry))) == ["web [2015]"]
    assert list(read_texts(str(tmp_path / "web [0-9]/*/x.jsonl"))) == ["web 2"]
    here = os.getcwd()
    os.chdir(tmp_path / "web 2" / "deep")
    try:
        assert list(read_texts("*.jsonl")) == ["web 2"]
    finally:
        os.chdir(here)


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_dictionary_columns_are_strings(tmp_path, name):
    """D6"""
    path = tmp_path / name
    table = pyarrow.table({"text": pyarrow.array([*TEXTS, *TEXTS]).dictionary_encode(), "n": list(range(80))})
    if name == "x.parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    assert list(read_texts(str(path))) == TEXTS * 2
    with pytest.raises(DataError, match=r"column 'n' is of type int64; accepted are strings$"):
        list(read_texts(str(path), "n"))


def test_prepared_tokens_without_their_prefix_are_recognised(config, tmp_path):
    """D6"""
    prepare("sample:validation", load_tokenizer(str(config.parent / "tokenizer")), tmp_path / "tokens")
    with pytest.raises(DataError) as caught:
        read_texts(str(tmp_path / "tokens"))
    where = tmp_path / "tokens"
    assert str(caught.value) == f"{where}: holds prepared tokens; accepted is prepared:{where} for them"
