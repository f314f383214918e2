import collections
import gzip
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import slow
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import SERVER, finish
from safetensors.numpy import load_file

from nt_hf import files
from nt_hf.cli import prepare as program
from nt_hf.data.errors import DataError
from nt_hf.data.prepare import prepare
from nt_hf.data.prepared import PreparedTokens, token_batches, tokenizer_fingerprint
from nt_hf.data.sources import find_files
from nt_hf.data.streams import HeadBatches, TokenBatches
from nt_hf.data.tokenizers import load_tokenizer

ROOT = Path(__file__).parents[2]
LENGTH = 8
EOS = 1


class Characters:
    """A tokenizer whose ids are code points."""

    eos_token_id, pad_token_id, name_or_path, added_tokens_decoder = EOS, 0, "characters", {}

    def __init__(self, highest=1000):
        self.highest = highest

    def get_vocab(self):
        return {chr(i): i for i in (*range(97, 123), self.highest)}

    def __call__(self, documents, **_):
        return {"input_ids": [[min(ord(c), self.highest) for c in text] for text in documents]}


def save(folder, shards):
    folder.mkdir(exist_ok=True)
    for i, documents in enumerate(shards):
        lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in documents)
        (folder / f"part-{i:02}.jsonl").write_bytes(lines)
    return str(folder / "part-*.jsonl")


def texts(count, first=0):
    return [f"document {i}" + "".join(f" {i} {j}" for j in range(i * 5 % 9)) for i in range(first, first + count)]


@pytest.fixture
def source(tmp_path):
    return save(tmp_path / "text", [texts(5), texts(1, 5), texts(9, 6)])


@pytest.fixture
def directory(tmp_path, source):
    prepare(source, Characters(), tmp_path / "tokens")
    return tmp_path / "tokens"


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def open_tokens(directory, **options):
    return PreparedTokens(directory, Characters(), **{"batch_size": 3, "sequence_length": LENGTH, **options})


def rows_of(batches):
    return [tuple(row) for batch in batches for row in batch["input_ids"].tolist()]


def in_order(ranks, turns):
    """The rows of all ranks in the order of the run: turn by turn, rank by rank."""
    steps = [list(itertools.islice(loader, turns)) for loader in ranks]
    return rows_of(batch for turn in itertools.zip_longest(*steps) for batch in turn if batch)


# --- rows ---------------------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_text_in_its_order(source, directory):
    text = TokenBatches(source, Characters(), batch_size=3, sequence_length=LENGTH, epochs=1)
    ours, theirs = list(open_tokens(directory, epochs=1)), list(text)
    *whole, _padded = rows_of(theirs)
    assert rows_of(ours) == whole
    assert list(ours[0]) == list(theirs[0])
    for batch in ours:
        assert all(value.dtype == torch.int64 and value.shape[1] == LENGTH for value in batch.values())
        assert batch["attention_mask"].all() and torch.equal(batch["labels"], batch["input_ids"])


def test_sample_rows_are_those_of_the_text(tmp_path):
    tokenizer = load_tokenizer("sample")
    index = prepare("sample:validation", tokenizer, tmp_path)
    options = {"batch_size": 16, "sequence_length": 256, "epochs": 1}
    text = token_batches("sample:validation", tokenizer, **options)
    tokens = token_batches(f"prepared:{tmp_path}", tokenizer, **options, on_bad_line="skip", num_workers=3)
    assert isinstance(text, TokenBatches) and isinstance(tokens, PreparedTokens)
    assert rows_of(tokens) == rows_of(text)[:-1]
    assert (index["documents"], index["bad_lines"], tokens.bad_lines) == (330, 0, 0)
    assert tokens.rows == index["tokens"] // 256


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 1), (1, 7), (2, 3), (3, 2), (5, 4), (60, 1)])
def test_each_row_once_an_epoch(directory, shuffle, world_size, batch_size):
    rows = rows_of(open_tokens(directory, epochs=1))
    assert len(rows) > 30 and len(set(rows)) > 0.9 * len(rows)
    options = {"world_size": world_size, "batch_size": batch_size, "shuffle": shuffle, "epochs": 2}
    ranks = [open_tokens(directory, rank=rank, **options) for rank in range(world_size)]
    found = [list(loader) for loader in ranks]
    assert collections.Counter(rows_of(itertools.chain(*found))) == collections.Counter(rows * 2)
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert {loader.epoch for loader in ranks} == {2}
    again = [list(loader) for loader in ranks]
    assert all(map(equal_batches, found, again)), "each iter() starts anew"


def equal_batches(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(ours, theirs))


def test_epochs_differ_and_seeds_differ(directory):
    whole = rows_of(open_tokens(directory, epochs=1))
    orders = [rows_of(open_tokens(directory, epochs=3, shuffle=True, seed=seed)) for seed in (0, 1)]
    epochs = [tuple(order[i : i + len(whole)]) for order in orders for i in range(0, len(order), len(whole))]
    assert len(epochs) == len(set(epochs)) == 6
    assert all(sorted(epoch) == sorted(whole) for epoch in epochs)


def test_each_head_sees_the_same_rows_in_an_order_of_its_own(directory):
    def heads():
        return HeadBatches([open_tokens(directory, epochs=1, shuffle=True, seed=seed) for seed in (0, 7)])

    batches = list(heads())
    orders = [rows_of({"input_ids": batch["input_ids"][head]} for batch in batches) for head in (0, 1)]
    assert orders[0] == rows_of(open_tokens(directory, epochs=1, shuffle=True, seed=0))
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    assert batches[0]["labels"].shape == (2, 3, LENGTH)

    first, second = heads(), heads()
    next(iter(first))
    second.load_state_dict([json.loads(json.dumps(first.state_dict()))])
    assert equal_batches(list(second), batches[1:]) and (second.epoch, second.bad_lines) == (1, 0)
    for wrong in ({}, {"heads": first.state_dict()["heads"][:1]}, open_tokens(directory).state_dict()):
        with pytest.raises(ValueError, match=r"^data state: not that of 2 heads with an order of their own each$"):
            heads().load_state_dict([wrong])


@settings(max_examples=40, deadline=None)
@given(
    stages=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 6)), min_size=1, max_size=5),
    shuffle=st.booleans(),
)
def test_the_order_of_rows_does_not_depend_on_ranks(tmp_path_factory, stages, shuffle):
    """Ranks, batch sizes and stops of any kind: the rows of the run stay the same, over ends of epochs too."""
    folder = tmp_path_factory.getbasetemp() / "order-of-rows"
    prepare(save(folder, [texts(5), texts(1, 5), texts(4, 6)]), Characters(), folder / "tokens")
    seen, states = [], None
    for world_size, batch_size, turns in stages:
        options = {"world_size": world_size, "batch_size": batch_size, "shuffle": shuffle, "seed": 3}
        ranks = [open_tokens(folder / "tokens", rank=rank, **options) for rank in range(world_size)]
        for loader in ranks:
            if states:
                loader.load_state_dict(json.loads(json.dumps(states)))
        seen += in_order(ranks, turns)
        states = [loader.state_dict() for loader in ranks]
        assert states[0]["rows"] == len(seen) and ranks[0].epoch == len(seen) // ranks[0].rows
    alone = open_tokens(folder / "tokens", batch_size=1, shuffle=shuffle, seed=3)
    assert seen == rows_of(itertools.islice(alone, len(seen)))


def test_state_is_small_and_its_owner_checked(directory, source, tmp_path):
    loader = open_tokens(directory, shuffle=True)
    next(iter(loader))
    state = loader.state_dict()
    assert len(json.dumps(state)) < 300
    for name, value in {"shuffle": False, "seed": 1, "sequence_length": 9}.items():
        options = {"shuffle": True, name: value}
        with pytest.raises(
            ValueError, match=rf"^data state: was saved with {name}=[^\n]*; accepted is {value!r} to resume$"
        ):
            open_tokens(directory, **options).load_state_dict([state])
    prepare(source.replace("*", "02"), Characters(), tmp_path / "other")
    with pytest.raises(ValueError, match=r"^data state: was saved with tokens=[^\n]*$"):
        open_tokens(tmp_path / "other", shuffle=True).load_state_dict([state])
    with pytest.raises(ValueError, match=r"^data state: of ranks after \[3, 4\] rows; accepted are all after as many$"):
        open_tokens(directory, shuffle=True).load_state_dict([state, {**state, "rows": 4}])
    text = TokenBatches(source, Characters(), batch_size=3, sequence_length=LENGTH)
    for wrong in ([], state, [{}], [text.state_dict()], [{**state, "rows": "3"}]):
        with pytest.raises(ValueError, match=r"^data state: not one that PreparedTokens wrote [^\n]*$"):
            loader.load_state_dict(wrong)
    with pytest.raises(ValueError, match=r"^data state: not one that TokenBatches wrote"):
        text.load_state_dict([state])


# --- preparing ----------------------------------------------------------------------------------------------------


def test_shards_and_index(source, directory):
    index = json.loads((directory / "index.json").read_text())
    assert [Path(shard["source"]).name for shard in index["shards"]] == [f"part-0{i}.jsonl" for i in range(3)]
    for shard, documents in zip(index["shards"], ([*texts(5)], texts(1, 5), texts(9, 6)), strict=True):
        (tokens,) = load_file(directory / shard["file"]).values()
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == [i for text in documents for i in (*map(ord, text), EOS)]
        assert shard["tokens"] == len(tokens) and shard["documents"] == len(documents)
        assert shard["text_bytes"] == sum(map(len, documents)) and shard["bad_lines"] == 0
    assert index["dtype"] == "uint16" and index["tokens"] == sum(shard["tokens"] for shard in index["shards"])


def test_large_vocabularies_take_32_bits(tmp_path):
    source = save(tmp_path / "text", [["a\U0001f600b" * 9]])
    tokenizer = Characters(highest=0x1F600)
    assert prepare(source, tokenizer, tmp_path / "tokens")["dtype"] == "uint32"
    (batch,) = PreparedTokens(tmp_path / "tokens", tokenizer, batch_size=1, sequence_length=27, epochs=1)
    assert batch["input_ids"].tolist() == [[97, 0x1F600, 98] * 9]
    for highest, dtype in ((65_535, "uint16"), (65_536, "uint32")):
        assert prepare(source, Characters(highest), tmp_path / dtype)["dtype"] == dtype


def test_blank_and_bad_lines(tmp_path):
    source = save(tmp_path / "text", [["", "a", " "], [" "], ["b" * 20]])
    with open(tmp_path / "text" / "part-02.jsonl", "ab") as file:
        file.write(b"{broken\n")
    with pytest.raises(DataError, match=r"part-02\.jsonl, line 2: is not JSON [^\n]*$"):
        prepare(source, Characters(), tmp_path / "tokens")
    index = prepare(source, Characters(), tmp_path / "tokens", on_bad_line="skip")
    assert [shard["tokens"] for shard in index["shards"]] == [2, 0, 21]
    assert index["bad_lines"] == 1 and index["documents"] == 2
    rows = rows_of(open_tokens(tmp_path / "tokens", epochs=1))
    assert rows[0] == (97, EOS, *[98] * 6) and len(rows) == 2
    with pytest.raises(DataError, match=r"holds no documents$"):
        prepare(save(tmp_path / "blank", [[" "]]), Characters(), tmp_path / "none")


def die_after(writes: int, source: str, output: Path) -> None:
    """Prepares in this process, which ends like a killed one when so many files have been named."""
    left, replace = iter(range(writes)), os.replace

    def killed(*names):
        if next(left, None) is None:
            os._exit(9)
        replace(*names)

    os.replace = killed
    prepare(source, Characters(), output)


@pytest.mark.parametrize("writes", [1, slow(0), slow(3)])
def test_a_killed_preparation_goes_on(source, directory, tmp_path, writes):
    """Killed with so many files complete and the next one written, but not named; the last is the index."""
    output = tmp_path / "killed"
    process = SERVER.Process(target=die_after, args=(writes, source, output))
    process.start()
    assert finish([process]) == [9]
    assert len(list(output.glob("tokens-*"))) == min(writes, 3) and len(list(output.glob(".*.partial"))) == 1
    with pytest.raises(
        DataError, match=r"^prepared:.*: has no index.json; accepted is a directory that [^\n]*completed$"
    ):
        open_tokens(output)
    new = []
    prepare(source, Characters(), output, progress=lambda shard, total, is_new: new.append(is_new))
    assert sorted(new) == [False] * writes + [True] * (3 - writes)
    assert contents(output) == contents(directory)


ORPHANED = """
import os
from nt_hf.data.prepare import prepare
from nt_hf.data.tokenizers import load_tokenizer
if __name__ == "__main__":
    prepare({source!r}, load_tokenizer("sample"), {output!r}, processes=2, progress=lambda *_: os._exit(9))
"""


@pytest.mark.slow
def test_several_processes_write_the_same(tmp_path):
    tokenizer = load_tokenizer("sample")
    source = save(tmp_path / "text", [texts(300, 300 * i) for i in range(4)])
    new = []
    prepare(source, tokenizer, tmp_path / "two", processes=2, progress=lambda shard, total, is_new: new.append(is_new))
    assert new == [True] * 4
    prepare(source, tokenizer, tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow
def test_processes_whose_parent_was_killed_do_no_harm(tmp_path):
    tokenizer = load_tokenizer("sample")
    source = save(tmp_path / "text", [texts(3000, 3000 * i) for i in range(4)])
    output, alone = tmp_path / "two", tmp_path / "one"
    script = tmp_path / "orphaned.py"
    script.write_text(ORPHANED.format(source=source, output=str(output)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, str(script)], env=environment, timeout=120).returncode == 9
    new = []
    prepare(source, tokenizer, output, progress=lambda shard, total, is_new: new.append(is_new))
    assert len(new) == 4 and False in new and True in new
    prepare(source, tokenizer, alone)
    assert contents(output) == contents(alone)


@pytest.mark.slow
def test_errors_of_processes_are_one_line(tmp_path):
    source = save(tmp_path / "text", [texts(3), texts(3), ["x"]])
    (tmp_path / "text" / "part-02.jsonl").write_text("{broken\n")
    with pytest.raises(DataError, match=r"^[^\n]*part-02\.jsonl, line 1: is not JSON [^\n]*$"):
        prepare(source, load_tokenizer("sample"), tmp_path / "tokens", processes=2)


def test_a_complete_preparation_is_left_alone(source, directory, tmp_path):
    before = contents(directory)
    (tmp_path / "text" / "part-00.jsonl").write_text("changed, but nobody reads it\n")
    new = []
    prepare(source, Characters(), directory, progress=lambda shard, total, is_new: new.append(is_new))
    assert contents(directory) == before and new == [False] * 3


@pytest.mark.parametrize("complete", [True, False])
def test_a_directory_of_other_tokens_is_refused(source, directory, tmp_path, complete):
    if not complete:
        (directory / "index.json").unlink()
    other = save(tmp_path / "other", [texts(3)])
    for change, key in (
        ({"source": other}, "source"),
        ({"tokenizer": Characters(999)}, "tokenizer"),
        ({"text_field": "body"}, "text_field"),
    ):
        arguments = {"source": source, "tokenizer": Characters(), "output": directory} | change
        with pytest.raises(DataError) as raised:
            prepare(**arguments)
        message = str(raised.value)
        assert message.startswith(f"{directory}: holds ") and message.endswith("take another output directory")
        assert "\n" not in message and (key in message or "of another source" in message)


def test_a_full_disk_is_one_line(source, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"tokens-00000-of-00003\.safetensors: cannot be written \([^\n]*No space left"):
        prepare(source, Characters(), tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists(), "it leaves the space that it took"
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file: cannot be written \("):
        prepare(source, Characters(), tmp_path / "file")


def test_the_program(tmp_path, caplog):
    source, output = save(tmp_path / "text", [texts(9), texts(9, 9)]), str(tmp_path / "tokens")
    with caplog.at_level("INFO"):
        for _ in range(2):
            program.main(["--data", source, "--output", output, "--processes", "1"])
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("1 of 2 files: tokens-00000-of-00002.safetensors, ")
    for line, end in ((lines[2], " tokens/s"), (lines[3], "nothing was left to do")):
        assert line.startswith(f"{output}: 18 documents, ") and line.endswith(end)


@pytest.mark.slow
def test_the_recipe_ends_with_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "recipes" / "prepare_c4.py"), "--data", str(tmp_path / "none")]
    failed = subprocess.run(
        [*command, "--output", str(tmp_path / "tokens")],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert failed.returncode == 1
    assert failed.stderr == f"error: {tmp_path / 'none'}: no such file, and no file matches it as a glob\n"


# --- bad input ----------------------------------------------------------------------------------------------------


def test_tokenizers_are_told_apart(tmp_path):
    tokenizer = load_tokenizer("sample")
    fingerprint = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2)  # leaves settings behind
    assert fingerprint == tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(load_tokenizer(str(tmp_path)))
    backend = json.loads((tmp_path / "tokenizer.json").read_text())
    backend["normalizer"] = {"type": "Sequence", "normalizers": [backend["normalizer"], {"type": "Lowercase"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path))) != fingerprint


def test_bad_directories_are_named(directory):
    shard = directory / "tokens-00002-of-00003.safetensors"
    with pytest.raises(
        DataError, match=r"^prepared:[^\n]*: was prepared by another tokenizer \(\w+\); accepted is 'char"
    ):
        PreparedTokens(directory, Characters(999), batch_size=1, sequence_length=8)
    with pytest.raises(
        DataError, match=r"^prepared:[^\n]*: holds \d+ tokens, too few for a row \(sequence_length=9999\)$"
    ):
        open_tokens(directory, sequence_length=9999)
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    with pytest.raises(DataError, match=rf"^{shard}: cannot be read \([^\n]*\)$"):
        open_tokens(directory)
    shard.write_bytes((directory / "tokens-00001-of-00003.safetensors").read_bytes())
    with pytest.raises(DataError, match=rf"^{shard}: holds tokens of shape \[\d+\], index.json says \[\d+\]$"):
        open_tokens(directory)
    shard.unlink()
    with pytest.raises(DataError, match=rf"^{shard}: is missing, index.json lists it$"):
        open_tokens(directory)
    index = directory / "index.json"
    whole = index.read_text()
    for wrong in (whole[:50], "[]", "{}", whole.replace('"tokens"', '"token"')):
        index.write_text(wrong)
        with pytest.raises(DataError, match=rf"^{index}: is no index of prepared tokens, or damaged \([^\n]*\)$"):
            open_tokens(directory)
    index.write_text(whole.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(DataError, match=rf"^{index}: format_version=2; accepted is 1$"):
        open_tokens(directory)


def test_a_damaged_shard_of_a_begun_preparation_is_named(source, directory):
    (directory / "index.json").unlink()
    shard = directory / "tokens-00000-of-00003.safetensors"
    shard.write_bytes(gzip.compress(b"x"))
    with pytest.raises(DataError, match=rf"^{shard}: is no shard of prepared tokens, or damaged \([^\n]*\)$"):
        prepare(source, Characters(), directory)


def test_factory_refuses(source, directory):
    options = {"batch_size": 2, "sequence_length": LENGTH}
    with pytest.raises(ValueError, match=r"^packing='pad': accepted is 'pack' for prepared:"):
        token_batches(f"prepared:{directory}", Characters(), packing="pad", **options)
    with pytest.raises(DataError, match=r"accepted are prepared tokens by themselves, or text only$"):
        token_batches([source, f"prepared:{directory}"], Characters(), **options)
    with pytest.raises(DataError, match=r"^prepared:x: prepared tokens; accepted is a source of text$"):
        find_files("prepared:x")
    with pytest.raises(ValueError, match=r"^source=\[\]: accepted is a source of data"):
        token_batches([], Characters(), **options)
    shuffled_ = token_batches([f"prepared:{directory}"], Characters(), shuffle_block=5, packing="pack", **options)
    assert shuffled_.shuffle and not token_batches(f"prepared:{directory}", Characters(), **options).shuffle


@pytest.mark.parametrize(
    ("field", "value"), [("batch_size", 0), ("epochs", 0), ("world_size", 0), ("rank", 1), ("sequence_length", 1)]
)
def test_prepared_tokens_refuse(directory, field, value):
    with pytest.raises(ValueError, match=rf"^{field}={value}: accepted is "):
        open_tokens(directory, **{field: value})
