import ast
import collections
import gzip
import io
import itertools
import json
import lzma
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import hub_server
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nt_hf.cli import tokenizer as tokenizer_program
from nt_hf.data import sources
from nt_hf.data.config import DataConfig
from nt_hf.data.errors import DataError
from nt_hf.data.slices import FileSlice, deal_epoch
from nt_hf.data.sources import Reader, find_files, read_texts
from nt_hf.data.streams import TokenBatches
from nt_hf.data.tokenizers import check_vocabulary, load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

LENGTH = 16
EOS, PAD = 1, 0


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("sample")


def texts(count, first=0):
    """Documents that differ, of a few to about sixty tokens, shorter and longer than a row."""
    return [f"Number {i}" + " and one more" * (i * 7 % 20) for i in range(first, first + count)]


def json_lines(documents):
    return b"".join(json.dumps({"text": text, "url": ""}).encode() + b"\n" for text in documents)


def arrow(name="pyarrow"):
    """Parquet, Arrow and zstd come with ``datasets``, which a machine that trains from plain files need not have."""
    return pytest.importorskip(name)


def table(documents):
    return arrow().table({"url": [""] * len(documents), "text": documents})


def arrow_bytes(documents, kind="stream"):
    sink = arrow().BufferOutputStream()
    with getattr(arrow("pyarrow.ipc"), f"new_{kind}")(sink, table(documents).schema) as writer:
        writer.write_table(table(documents), max_chunksize=3)
    return sink.getvalue().to_pybytes()


def parquet_bytes(documents):
    sink = arrow().BufferOutputStream()
    arrow("pyarrow.parquet").write_table(table(documents), sink, row_group_size=4)
    return sink.getvalue().to_pybytes()


def zstd(content):
    return arrow().compress(content, codec="zstd", asbytes=True)


def save(folder, shards):
    """Writes each list of documents as a shard; returns the glob of them all."""
    for i, documents in enumerate(shards):
        (folder / f"part-{i:02}.jsonl").write_bytes(json_lines(documents))
    return str(folder / "part-*.jsonl")


def batches(source, tokenizer, **options):
    return TokenBatches(source, tokenizer, **{"batch_size": 4, "sequence_length": LENGTH, **options})


def ids_of(documents, tokenizer):
    return [(*tokenizer(text, add_special_tokens=False)["input_ids"], EOS) for text in documents]


def stream_of(loaded):
    """The tokens of some batches in one list, without padding."""
    return [token for batch in loaded for token in batch["input_ids"][batch["attention_mask"].bool()].tolist()]


def documents_of(loaded):
    stream, found = stream_of(loaded), []
    while stream:
        end = stream.index(EOS) + 1
        found.append(tuple(stream[:end]))
        stream = stream[end:]
    return found


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(ours, theirs)
    )


def run_python(code, **environment):
    # The child has to see the same packages, but none of the variables that a test could have inherited.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TOKENIZERS_"))}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, timeout=120
    )


# --- tokenizers ---------------------------------------------------------------------------------------------------


def test_sample_tokenizer_is_t5_without_extras(tokenizer):
    published = [6536, 43, 118, 2008, 24, 293, 53, 3, 9, 1782, 19, 207, 21, 25]  # Transformers' T5 documentation
    assert tokenizer("Studies have been shown that owning a dog is good for you")["input_ids"] == published
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.bos_token_id is None
    assert max(tokenizer.get_vocab().values()) == 31_999


def test_vocabulary_is_checked_by_the_largest_id(tokenizer):
    check_vocabulary(tokenizer, 32_000)
    with pytest.raises(ValueError, match=r"^vocab_size=31999: .* 31999; accepted is 32000 or more$"):
        check_vocabulary(tokenizer, 31_999)


def test_tokenizer_needs_an_end_of_sequence_token(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "eos_token"}))
    with pytest.raises(ValueError, match=r"^tokenizer='.*': has no eos_token"):
        load_tokenizer(str(tmp_path))


def test_unknown_tokenizer_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^tokenizer='.*none': there is no such directory$"):
        load_tokenizer(str(tmp_path / "none"))


def test_automatic_special_tokens_are_not_used(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    backend = json.loads(path.read_text())
    eos = {"id": "</s>", "ids": [EOS], "tokens": ["</s>"]}
    template = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    backend["post_processor"] = {
        "type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": {"</s>": eos}
    }  # fmt: skip
    path.write_text(json.dumps(backend))
    other = AutoTokenizer.from_pretrained(tmp_path)
    assert other("a")["input_ids"][-1] == EOS, "the test needs a tokenizer that adds </s>"
    source = save(tmp_path, [texts(20)])
    assert equal(*(list(batches(source, t, epochs=1)) for t in (tokenizer, other)))


def test_train_tokenizer_repeats_and_restores_text(tmp_path):
    main = tokenizer_program.main
    for name in ("a", "b"):
        main(["--data", "sample:validation", "--vocab_size", "600", "--output", str(tmp_path / name)])
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    tokenizer = load_tokenizer(str(tmp_path / "a"))
    assert [tokenizer.convert_tokens_to_ids(token) for token in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    check_vocabulary(tokenizer, 600)
    text = "  Spaces,\n\nbreaks and 漢字 \U0001f600 survive."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2} & set(ids)


# --- sources ------------------------------------------------------------------------------------------------------

FORMATS = {
    ".json": json_lines,
    ".jsonl": json_lines,
    ".json.gz": lambda d: gzip.compress(json_lines(d)),
    ".jsonl.gz": lambda d: gzip.compress(json_lines(d[:5])) + gzip.compress(json_lines(d[5:])),
    ".json.xz": lambda d: lzma.compress(json_lines(d)),
    ".jsonl.zst": lambda d: zstd(json_lines(d[:5])) + zstd(json_lines(d[5:])),
    ".parquet": parquet_bytes,
    ".arrow": arrow_bytes,
    ".file.arrow": lambda d: arrow_bytes(d, "file"),
}


@pytest.mark.parametrize("extension", FORMATS)
def test_every_format_gives_the_same_texts(extension, tmp_path):
    documents = ["Line\u2028separator\n", *texts(10), "é漢\U0001f600"]
    path = tmp_path / f"x{extension}"
    path.write_bytes(FORMATS[extension](documents))
    assert list(read_texts(str(path))) == documents


def test_files_come_in_the_order_of_names_and_entries(tmp_path):
    for name in ("b-2", "a-1", "b-1"):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines([name]))
    assert list(read_texts([str(tmp_path / "b-*.jsonl"), str(tmp_path / "a-1.jsonl")])) == ["b-1", "b-2", "a-1"]


def test_file_name_with_glob_characters(tmp_path):
    (tmp_path / "x[1].jsonl").write_bytes(json_lines(["found"]))
    assert list(read_texts(str(tmp_path / "x[1].jsonl"))) == ["found"]


def test_other_urls(tmp_path):
    save(tmp_path, [["a"], ["b"]])
    assert list(read_texts(f"file://{tmp_path}/part-*.jsonl")) == ["a", "b"]


def test_sample_is_whole():
    assert [sum(1 for _ in read_texts(f"sample:{split}")) for split in ("train", "validation")] == [1000, 330]


def test_blank_documents_and_lines_are_skipped(tokenizer, tmp_path):
    lines = [json_lines([text]) for text in ("a", "", " \n\t", "b")]
    (tmp_path / "x.jsonl").write_bytes(b"\n  \n".join(lines) + b"\n\n")
    found = batches(str(tmp_path / "x.jsonl"), tokenizer, epochs=1)
    assert documents_of(found) == ids_of(["a", "b"], tokenizer)
    assert (found.documents, found.bad_lines) == (2, 0)


def test_hub_data_set_is_streamed(tokenizer, tmp_path):
    pytest.importorskip("datasets")
    documents = texts(40)
    card = "configs:\n- config_name: en\n  data_files:\n"
    files = {"README.md": b""}
    for split, count in (("train", 4), ("validation", 1)):
        card += f"  - split: {split}\n    path: en/c4-{split}.*.json.gz\n"
        for i in range(count):
            part = documents[10 * i : 10 * i + 10]
            files[f"en/c4-{split}.{i:05}-of-{count:05}.json.gz"] = gzip.compress(json_lines(part))
    files["README.md"] = f"---\n{card}---\n".encode()
    code = """
import json
from nt_hf.data.sources import find_files, read_texts
from nt_hf.data.streams import TokenBatches
from nt_hf.data.tokenizers import load_tokenizer
tokenizer = load_tokenizer("sample")
found = {}
for source in ("hub:allenai/c4:en", "hub:allenai/c4@main:en:validation", "hf://datasets/allenai/c4/en/c4-train.*"):
    found[source] = list(read_texts(source))
found["commit"] = find_files("hub:allenai/c4:en:train")[0]
loaded = [
    list(TokenBatches("hub:allenai/c4:en:train", tokenizer, batch_size=4, sequence_length=80, rank=rank, world_size=2,
                      epochs=1, num_workers=2, shuffle_block=8, packing="pad"))
    for rank in (0, 1)
]
found["rows"] = [batch["input_ids"].tolist() for batch in loaded[0] + loaded[1]]
errors = []
for source in ("hub:allenai/c4:de:train", "hub:allenai/c4:en:test", "hub:allenai/c5", "hub:a/b:c:d:e"):
    try:
        find_files(source)
    except ValueError as error:
        errors.append(str(error))
print(json.dumps([found, errors]))
"""
    with hub_server.serve("allenai/c4", files) as (endpoint, log):
        done = run_python(code, HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    found, errors = json.loads(done.stdout)
    assert found["hub:allenai/c4:en"] == found["hf://datasets/allenai/c4/en/c4-train.*"] == documents
    assert found["hub:allenai/c4@main:en:validation"] == documents[:10]
    assert hub_server.COMMIT in found["commit"], "the files of one commit, whatever is pushed meanwhile"
    rows = [{"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(rows) != PAD} for rows in found["rows"]]
    assert sorted(documents_of(rows)) == sorted(ids_of(documents, tokenizer))
    shards = [line for line in log if line.startswith("GET") and "c4-train" in line]
    assert shards and all("bytes=" in line for line in shards), "shards are read in ranges, not downloaded"
    for error, part in zip(
        errors, ("'de' not found", "accepted is one of train, validation", "allenai/c5", "accepted is hub:")
    ):
        assert part in error and "\n" not in error


# --- remote files that fail ---------------------------------------------------------------------------------------


class Faulty(io.BytesIO):
    """A remote file's content, whose reads fail as the file system's ``faults`` say."""

    def __init__(self, fs, content):
        super().__init__(content)
        self.fs = fs

    def seek(self, *args):
        if not self.fs.ranges and args != (0,):
            raise ValueError("Cannot seek streaming HTTP file")
        return super().seek(*args)

    def read(self, size=-1):
        self.fs.raise_next("read")
        return super().read(min(size, 700))  # a short read, as sockets give


@pytest.fixture
def faulty(monkeypatch):
    """URLs ``faulty://…`` whose requests fail by ``faults``: a list of (request, error), consumed in order."""
    fsspec = pytest.importorskip("fsspec")

    class FaultyFileSystem(fsspec.AbstractFileSystem):
        protocol = "faulty"
        cachable = False
        files, faults, pauses, ranges, opened = {}, [], [], True, []

        def raise_next(self, request):
            error = self.faults.pop(0)[1] if self.faults and self.faults[0][0] == request else None
            if error:
                raise error

        def _open(self, path, mode="rb", **_):
            self.opened.append(path)
            self.raise_next("open")
            if path not in self.files:
                raise FileNotFoundError(path)
            return Faulty(self, self.files[path])

        def glob(self, path, **_):
            self.raise_next("glob")
            return sorted(self.files)

    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    monkeypatch.setattr(time, "sleep", FaultyFileSystem.pauses.append)
    return FaultyFileSystem


LOST = ConnectionError("reset by peer")
ONE_READ = [("read", None)] * 2


@pytest.mark.parametrize(
    ("extension", "ranges"),
    [
        *(
            (extension, ranges)
            for extension in (".jsonl", ".jsonl.gz", ".json.xz", ".jsonl.zst")
            for ranges in (True, False)
        ),
        *((extension, True) for extension in (".parquet", ".file.arrow")),  # tables cannot be read without ranges
    ],
)
def test_remote_reading_goes_on_after_errors(faulty, caplog, extension, ranges):
    documents = [f"{i} {random.Random(i).random()}" for i in range(300)]
    faulty.files[f"a{extension}"] = FORMATS[extension](documents)
    faulty.ranges = ranges
    faulty.faults += [
        ("glob", LOST),
        ("open", LOST),
        ("read", LOST),
        *ONE_READ,
        ("read", LOST),
        ("open", TimeoutError()),
    ]
    faulty.faults += [*ONE_READ, ("read", LOST)]
    assert list(read_texts("faulty://*")) == documents
    assert faulty.faults == []
    assert len(faulty.pauses) == 6 and max(faulty.pauses) < 8
    if ranges and extension != ".parquet":  # else finding the place again takes further requests
        assert faulty.pauses == [1, 1, 2, 1, 2, 1], "each success begins anew"
    assert len(caplog.records) == 6
    first, second = (record.getMessage() for record in caplog.records[:2])
    problem = "(ConnectionError: reset by peer): attempt 1 of 7, the next in 1 s"
    assert first == f"faulty://*: cannot be resolved {problem}"
    assert second == f"faulty://a{extension}: cannot be read {problem}"


@pytest.mark.parametrize("workers", [0, 1])
def test_remote_errors_that_stay_end_in_one_line(faulty, tokenizer, workers):
    faulty.files["a.jsonl"] = json_lines(texts(50))
    faulty.faults += [*ONE_READ, *[("read", LOST)] * 20]
    with pytest.raises(DataError) as raised:
        list(batches("faulty://a.jsonl", tokenizer, epochs=1, num_workers=workers))
    problem = "cannot be read after 7 attempts (ConnectionError: reset by peer)"
    assert str(raised.value) == f"faulty://a.jsonl: {problem}"
    if not workers:
        assert faulty.pauses == [1, 2, 4, 8, 16, 32]
    faulty.faults[:] = [("glob", LOST)] * 20
    with pytest.raises(DataError) as raised:
        find_files("faulty://*.jsonl")
    assert str(raised.value) == f"faulty://*.jsonl: {problem.replace('read', 'resolved')}"


def error_with_status(status):
    error = OSError(f"HTTP {status}")
    error.status = status
    return error


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (FileNotFoundError("gone"), 1),
        (PermissionError("no"), 1),
        (error_with_status(403), 1),
        (error_with_status(404), 1),
        (error_with_status(429), 2),
        (error_with_status(503), 2),
        (ImportError("install s3fs"), 1),
    ],
    ids=repr,
)
def test_only_what_may_pass_is_tried_again(faulty, error, attempts):
    faulty.files["a.jsonl"] = json_lines(["x"])
    faulty.faults += [("open", error)]
    if attempts == 1:
        with pytest.raises(DataError, match=rf"^faulty://a.jsonl: cannot be read \({type(error).__name__}: "):
            list(read_texts("faulty://a.jsonl"))
    else:
        assert list(read_texts("faulty://a.jsonl")) == ["x"]
    assert len(faulty.opened) == attempts and len(faulty.pauses) == attempts - 1


def test_an_http_server_that_is_down_is_not_taken_for_a_missing_file(tmp_path, monkeypatch, caplog):
    """fsspec says FileNotFoundError of both."""
    pytest.importorskip("aiohttp")
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with hub_server.serve("a/b", {"x.jsonl": json_lines(["found"])}) as (endpoint, _):
        url = f"{endpoint}/datasets/a/b/resolve/main/"
        assert list(read_texts(url + "x.jsonl")) == ["found"]
        with pytest.raises(DataError, match=r"none\.jsonl: cannot be read \(FileNotFoundError: [^\n]*\)$"):
            list(read_texts(url + "none.jsonl"))
        assert pauses == []
    with pytest.raises(DataError, match=r"x\.jsonl: cannot be read after 7 attempts \(ClientConnectorError: [^\n]*\)$"):
        list(read_texts(url + "x.jsonl"))
    assert pauses == [1, 2, 4, 8, 16, 32] and len(caplog.records) >= 6


def test_bad_remote_content_is_not_tried_again(faulty):
    faulty.files["a.jsonl.gz"] = gzip.compress(json_lines(texts(200)))[:-20]
    with pytest.raises(DataError, match="cannot be read"):
        list(read_texts("faulty://a.jsonl.gz"))
    assert faulty.pauses == [] and faulty.opened == ["a.jsonl.gz"]


@pytest.mark.slow
def test_hub_failures_are_ridden_out(tmp_path):
    """The hub answers 503 more often than its own client puts up with: while resolving and within a file."""
    pytest.importorskip("datasets")
    documents = [f"{i} {random.Random(i).random()}" for i in range(2000)]
    card = "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/a.json.gz\n---\n"
    files = {"README.md": card.encode(), "en/a.json.gz": gzip.compress(json_lines(documents))}
    left = {"README.md": 9, "a.json.gz bytes": 9}

    def fail(request):
        for part in left:
            if part in request and left[part] > 0:
                left[part] -= 1
                return 503
        return None

    code = """
import logging, time
logging.basicConfig(format="%(name)s %(message)s")
time.sleep = lambda seconds: None
from nt_hf.data.sources import read_texts
print(list(read_texts("hub:a/b:en:train")))
"""
    with hub_server.serve("a/b", files, fail) as (endpoint, _):
        done = run_python(code, HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == documents
    assert set(left.values()) == {0}
    warnings = [line for line in done.stderr.splitlines() if line.startswith("nt_hf.data.remote")]
    assert len(warnings) >= 2 and all("attempt 1 of 7" in line for line in warnings)


# --- packing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_pack_loses_nothing_and_pads_only_the_end(tokenizer, tmp_path, workers):
    documents = ids_of(texts(50), tokenizer)
    found = list(batches(save(tmp_path, [texts(50)]), tokenizer, epochs=1, num_workers=workers))
    rows = [row for batch in found for row in zip(*batch.values(), strict=True)]
    assert list(found[0]) == ["input_ids", "attention_mask", "labels"]
    assert all(value.dtype == torch.int64 for value in found[0].values())
    if not workers:
        assert stream_of(found) == list(itertools.chain(*documents))
    assert sorted(stream_of(found)) == sorted(itertools.chain(*documents))
    assert sum(not mask.all() for _, mask, _ in rows) <= max(1, workers)
    for ids, mask, labels in rows:
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        assert torch.equal(labels, torch.where(mask == 1, ids, -100))
        assert (ids[mask == 0] == PAD).all()


def test_pad_gives_one_document_a_row(tokenizer, tmp_path):
    (found,) = batches(save(tmp_path, [texts(9)]), tokenizer, epochs=1, packing="pad", batch_size=9)
    expected = [(*ids[: LENGTH - 1], EOS) if len(ids) > LENGTH else ids for ids in ids_of(texts(9), tokenizer)]
    assert {len(ids) < LENGTH for ids in expected} == {True, False}
    for row, mask, labels, ids in zip(*found.values(), expected):
        rest = LENGTH - len(ids)
        assert row.tolist() == [*ids, *[PAD] * rest]
        assert mask.tolist() == [1] * len(ids) + [0] * rest
        assert labels.tolist() == [*ids, *[-100] * rest]


def test_special_tokens_in_the_text_are_not_taken_for_padding(tokenizer, tmp_path):
    source = save(tmp_path, [["a <pad> b"]])
    (found,) = batches(source, tokenizer, epochs=1)
    assert (found["attention_mask"] == (found["labels"] != -100)).all()
    assert found["attention_mask"].sum() == len(ids_of(["a <pad> b"], tokenizer)[0])


def test_padding_without_a_padding_token(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    other = load_tokenizer(str(tmp_path))
    other.pad_token = None
    ours, theirs = (list(batches(save(tmp_path, [texts(9)]), t, epochs=1, packing="pad")) for t in (other, tokenizer))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(ours, theirs) for key in ("labels", "attention_mask"))
    assert ours[0]["input_ids"].max() < 32_000


def test_epochs_follow_without_a_seam(tokenizer, tmp_path):
    documents = list(itertools.chain(*ids_of(texts(7), tokenizer)))
    found = batches(save(tmp_path, [texts(7)]), tokenizer, batch_size=1)
    seen = []
    for batch in found:
        assert batch["attention_mask"].all()
        seen += batch["input_ids"].flatten().tolist()
        assert found.epoch in (len(seen) // len(documents), (len(seen) - 1) // len(documents))
        if len(seen) > 3 * len(documents):
            break
    assert seen == (documents * 4)[: len(seen)]
    assert found.documents >= 21


# --- dealing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 2, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_document_goes_to_one_rank_and_worker(tokenizer, tmp_path, world_size, workers):
    source = save(tmp_path, [texts(4, i) for i in range(0, 100, 4)])
    options = {"world_size": world_size, "num_workers": workers, "epochs": 2, "shuffle_block": 4}
    found = []
    for rank in range(world_size):
        found += documents_of(batches(source, tokenizer, rank=rank, packing="pad", sequence_length=80, **options))
    assert collections.Counter(found) == collections.Counter(ids_of(texts(100), tokenizer) * 2)


@pytest.mark.parametrize("shards", [[60], [7, 9, 5, 8, 6, 7], [1] * 7, [3] * 12], ids=str)
@pytest.mark.parametrize("seed", [None, 0])
def test_streams_share_each_epoch_evenly(tmp_path, shards, seed):
    starts = itertools.accumulate(shards, initial=0)
    files = find_files(save(tmp_path, [texts(count, start) for start, count in zip(starts, shards)]))
    reader = Reader(files, "text", "error", seed)
    for streams, epoch in itertools.product([1, 2, 3, 4, 6, 12, 24, 100], [0, 1]):
        slices = [
            [
                text
                for file_slice in deal_epoch(epoch, len(files), stream, streams)
                for _, text in reader.texts(file_slice)
            ]
            for stream in range(streams)
        ]
        assert sorted(itertools.chain(*slices)) == sorted(texts(sum(shards)))
        spread = max(map(len, slices)) - min(map(len, slices))
        if len(set(shards)) == 1:  # a stream can get one document more of each file that is dealt by documents
            assert spread <= (1 if shards[0] == 1 else len(shards) % streams)


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_without_documents(tokenizer, tmp_path, workers):
    """More streams than documents: nothing in a single pass, one clear line where the pass would never end."""
    options = {"rank": 2, "world_size": 4, "num_workers": workers}
    source = save(tmp_path, [["only"]])
    assert list(batches(source, tokenizer, epochs=1, **options)) == []
    with pytest.raises(DataError, match=rf"^{source.replace('*', '.')}: no document for stream [^\n]*$"):
        next(iter(batches(source, tokenizer, **options)))


# --- shuffling ----------------------------------------------------------------------------------------------------


def order(tokenizer, source, epochs=1, **options):
    """The numbers of the documents of some epochs, in the order in which they come."""
    number = {ids: i for i, ids in enumerate(ids_of(texts(40), tokenizer))}
    return [number[ids] for ids in documents_of(batches(source, tokenizer, epochs=epochs, **options))]


def test_shuffling_permutes_blocks_by_seed_and_epoch(tokenizer, tmp_path):
    source = save(tmp_path, [texts(40)])
    assert order(tokenizer, source) == list(range(40))
    twice = order(tokenizer, source, epochs=2, shuffle_block=8, seed=5)
    first, second = twice[:40], twice[40:]
    assert order(tokenizer, source, shuffle_block=8, seed=5) == first
    assert len({tuple(x) for x in (first, second, order(tokenizer, source, shuffle_block=8, seed=6), range(40))}) == 4
    for epoch in (first, second):
        blocks = [epoch[i : i + 8] for i in range(0, 40, 8)]
        assert [sorted(block) for block in blocks] == [list(range(i, i + 8)) for i in range(0, 40, 8)]
        assert len({tuple(x % 8 for x in block) for block in blocks}) == 5, "each block has its own permutation"


def test_shuffling_permutes_files_by_epoch(tokenizer, tmp_path):
    source = save(tmp_path, [texts(5, i) for i in range(0, 40, 5)])
    assert order(tokenizer, source) == list(range(40))
    twice = order(tokenizer, source, epochs=2, shuffle_block=1)
    files = [[i // 5 for i in twice[begin : begin + 40 : 5]] for begin in (0, 40)]
    assert [sorted(x) for x in files] == [list(range(8))] * 2
    assert files[0] != files[1] != list(range(8)) != files[0]


# --- resuming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [2, None])
@pytest.mark.parametrize("packing", ["pack", "pad"])
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_resuming_is_exact(tokenizer, tmp_path, workers, packing, epochs):
    shards = [12, 9, 15, 14]  # whole files for two workers, three and the documents of the last for three
    starts = itertools.accumulate(shards, initial=0)
    source = save(tmp_path, [texts(count, start) for start, count in zip(starts, shards)])
    # An unreadable line in each file, to see that none is counted twice.
    for path in find_files(source):
        Path(path).write_bytes(Path(path).read_bytes() + b"bad\n")
    options = {"num_workers": workers, "packing": packing, "epochs": epochs, "shuffle_block": 8, "batch_size": 3,
               "on_bad_line": "skip"}  # fmt: skip
    whole = batches(source, tokenizer, **options)
    expected, counts, states = [], [], []
    for batch in itertools.islice(whole, 90):
        expected.append(batch)
        counts.append((whole.epoch, whole.documents, whole.bad_lines))
        states.append(json.dumps(whole.state_dict()))
    if epochs:
        assert whole.documents == 100 and whole.bad_lines == 2 * len(shards)
    assert whole.epoch >= 2, "the stops below lie in several epochs"
    for stop in sorted(random.Random(0).sample(range(len(expected)), 3 if workers else 20)):
        resumed = batches(source, tokenizer, **options)
        resumed.load_state_dict([json.loads(states[stop])])
        assert json.dumps(resumed.state_dict()) == states[stop]
        rest = itertools.islice(resumed, len(expected) - stop - 1)
        for position, batch in enumerate(rest, stop + 1):
            assert equal([batch], [expected[position]])
            assert (resumed.epoch, resumed.documents, resumed.bad_lines) == counts[position]
        assert stop == len(expected) - 1 or position == len(expected) - 1
    if epochs:
        resumed.load_state_dict([whole.state_dict()])
        assert list(resumed) == []


def test_resuming_with_another_batch_size(tokenizer, tmp_path):
    source = save(tmp_path, [texts(40)])
    first = batches(source, tokenizer, epochs=1, shuffle_block=8, batch_size=3)
    begun = list(itertools.islice(first, 4))
    second = batches(source, tokenizer, epochs=1, shuffle_block=8, batch_size=5)
    second.load_state_dict([first.state_dict()])
    whole = stream_of(batches(source, tokenizer, epochs=1, shuffle_block=8))
    assert stream_of(begun) + stream_of(second) == whole


def test_each_iter_starts_anew_but_for_a_loaded_state(tokenizer, tmp_path):
    found = batches(save(tmp_path, [texts(20)]), tokenizer, epochs=1)
    whole = list(found)
    assert equal(list(found), whole)
    next(iter(found))
    found.load_state_dict([found.state_dict()])
    assert equal(list(found), whole[1:])
    assert equal(list(found), whole)


@pytest.mark.parametrize(
    ("name", "value"),
    [("packing", "pad"), ("shuffle_block", 2), ("seed", 1)],
)
def test_state_of_another_stream_is_refused(tokenizer, tmp_path, name, value):
    source = save(tmp_path, [texts(20)])
    states = [batches(source, tokenizer, world_size=2, rank=rank).state_dict() for rank in range(2)]
    with pytest.raises(
        ValueError, match=rf"^data state: was saved with {name}=[^\n]*; accepted is {value!r} to resume$"
    ):
        batches(source, tokenizer, **{name: value}).load_state_dict(states)


def test_states_of_all_ranks_are_needed(tokenizer, tmp_path):
    source = save(tmp_path, [texts(20)])
    states = [batches(source, tokenizer, world_size=3, rank=rank).state_dict() for rank in range(3)]
    for wrong in (states[:1], states[1:], states[::-1]):
        with pytest.raises(
            ValueError, match=r"^data state: of ranks [\d, ]+; accepted are those of all 3 in their order$"
        ):
            batches(source, tokenizer, world_size=2).load_state_dict(wrong)


def test_state_of_other_files_is_refused(tokenizer, tmp_path):
    source = save(tmp_path, [texts(4)] * 2)
    state = batches(source, tokenizer).state_dict()
    batches(str(shutil.copytree(tmp_path, tmp_path / "moved") / "part-*.jsonl"), tokenizer).load_state_dict([state])
    with pytest.raises(ValueError, match=r"^data state: was saved with files='2 .*; accepted is '1 "):
        batches(find_files(source)[:1], tokenizer).load_state_dict([state])
    with pytest.raises(ValueError, match=r"^data state: not one that TokenBatches wrote"):
        batches(source, tokenizer).load_state_dict({"step": 3})


def test_loading_leaves_the_random_state_alone(tokenizer, tmp_path):
    before = torch.get_rng_state(), random.getstate()
    next(iter(batches(save(tmp_path, [texts(20)]), tokenizer, num_workers=2, shuffle_block=4)))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


# --- resuming on another number of ranks or workers ---------------------------------------------------------------


class NumberTokenizer:
    """Knows documents "<first> <count>": so many ids from ``first`` on, so that no two documents share an id."""

    eos_token_id, pad_token_id, name_or_path = EOS, PAD, "numbers"

    def __call__(self, documents, **_):
        pairs = [map(int, text.split()) for text in documents]
        return {"input_ids": [list(range(first, first + count)) for first, count in pairs]}


def save_numbers(folder, shards, bad_every=0, longest=40):
    """Shards of so many documents of unique ids; returns the glob, the ids and the number of bad lines."""
    first, ids, bad = 2, [], 0
    for i, count in enumerate(shards):
        lines = []
        for j in range(count):
            length = 1 + (7 * first + j) % longest
            lines.append(json_lines([f"{first} {length}"]))
            ids += range(first, first + length)
            first += length
            if bad_every and (i + j) % bad_every == 0:
                lines.append(b"bad\n" + json_lines([" "]))
                bad += 1
        (folder / f"part-{i:02}.jsonl").write_bytes(b"".join(lines))
    return str(folder / "part-*.jsonl"), ids, bad


def run_stages(source, stages, **options):
    """Runs (ranks, workers, batches of each rank or None for all) after each other, each from the states before it.

    Returns the ids in the order of use, padding and </s> aside, and the last stage's loaders.
    """
    seen, states = [], None
    for world_size, workers, stop in stages:
        ranks = [
            batches(source, NumberTokenizer(), rank=rank, world_size=world_size, num_workers=workers, **options)
            for rank in range(world_size)
        ]
        for rank, loader in enumerate(ranks):
            if states:
                loader.load_state_dict(json.loads(json.dumps(states)))
                assert json.dumps(loader.state_dict()) != "" and loader.rank == rank
            count = stop[rank % len(stop)] if isinstance(stop, list) else stop
            if count != 0:
                seen += stream_of(itertools.islice(loader, count))
        states = [loader.state_dict() for loader in ranks]
    return [token for token in seen if token != EOS], ranks


@settings(max_examples=80, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_other_ranks_go_on_with_what_was_left(tmp_path_factory, packing, data):
    """Whatever the numbers of ranks and the stops: every token of every document once an epoch."""
    shards = data.draw(st.lists(st.integers(1, 25), min_size=1, max_size=6), label="shards")
    bad_every = data.draw(st.sampled_from([0, 2, 3]), label="bad_every")
    stops = st.lists(st.integers(0, 6), min_size=1, max_size=3)
    stages = data.draw(
        st.lists(st.tuples(st.integers(1, 5), st.just(0), stops), min_size=1, max_size=5), label="stages"
    )
    last = data.draw(st.integers(1, 4), label="last")
    block = data.draw(st.sampled_from([0, 1, 4, 8, 1000]), label="block")
    epochs = data.draw(st.integers(1, 3), label="epochs")
    source, ids, bad = save_numbers(tmp_path_factory.mktemp("numbers"), shards, bad_every)
    options = {"packing": packing, "shuffle_block": block, "epochs": epochs, "batch_size": 2, "on_bad_line": "skip",
               "sequence_length": LENGTH if packing == "pack" else 64}  # fmt: skip
    seen, ranks = run_stages(source, [*stages, (last, 0, None)], **options)
    assert collections.Counter(seen) == collections.Counter(ids * epochs)
    assert sum(loader.documents for loader in ranks) == epochs * sum(shards)
    assert sum(loader.bad_lines for loader in ranks) == epochs * bad
    assert {loader.epoch for loader in ranks} == {epochs}


@pytest.mark.parametrize("shards", [[30], [9, 30, 14, 20, 3, 11, 25]], ids=str)
def test_other_workers_go_on_with_what_was_left(tmp_path, shards):
    source, ids, bad = save_numbers(tmp_path, shards, bad_every=4)
    options = {"shuffle_block": 8, "epochs": 3, "batch_size": 1, "on_bad_line": "skip"}
    stages = [(2, 2, [9, 4]), (4, 0, 5), (1, 3, 21), (3, 0, [0, 3]), (1, 1, 7), (2, 2, None)]
    seen, ranks = run_stages(source, stages, **options)
    assert collections.Counter(seen) == collections.Counter(ids * 3)
    assert sum(loader.documents for loader in ranks) == 3 * sum(shards)
    assert sum(loader.bad_lines for loader in ranks) == 3 * bad


def test_what_was_left_comes_before_the_next_epoch(tmp_path):
    source, ids, _ = save_numbers(tmp_path, [30, 25, 30])
    stages = [(2, 0, 5), (4, 0, 2), (3, 0, 1), (1, 0, 60)]  # all but the last stop within the first epoch
    seen, (last,) = run_stages(source, stages, shuffle_block=4, batch_size=2)
    assert len(seen) > 1.2 * len(ids) and last.epoch == 1
    assert collections.Counter(seen[: len(ids)]) == collections.Counter(ids)
    assert max(collections.Counter(seen).values()) == 2


def test_begun_blocks_are_finished_as_they_were_shuffled(tmp_path):
    """One rank's shuffled block of 16, stopped within, goes on in the same order whoever finishes it."""
    source, _, _ = save_numbers(tmp_path, [16])
    options = {"shuffle_block": 16, "epochs": 1, "batch_size": 1}
    whole, _ = run_stages(source, [(1, 0, None)], **options)
    assert whole != sorted(whole)
    for stop in (1, 4, 9):
        assert run_stages(source, [(1, 0, stop), (3, 0, 0), (2, 0, None)], **options)[0] == whole


def test_blocks_end_with_their_share(tmp_path):
    """Two files of less than a block each: the documents of one do not mix with the other's."""
    source, _, _ = save_numbers(tmp_path, [5, 6])
    seen, _ = run_stages(source, [(1, 0, None)], shuffle_block=100, epochs=1)
    border = int(json.loads((tmp_path / "part-01.jsonl").read_text().splitlines()[0])["text"].split()[0])
    in_first = [token < border for token in seen]
    assert seen != sorted(seen)
    assert in_first in (sorted(in_first), sorted(in_first, reverse=True))


def test_state_stays_small(tmp_path):
    shards = [3] * 1024
    source, _, _ = save_numbers(tmp_path, shards)
    options = {"shuffle_block": 8, "batch_size": 2}

    def states(world_size, before):
        found = []
        for rank in range(world_size):
            loader = batches(source, NumberTokenizer(), rank=rank, world_size=world_size, **options)
            if before:
                loader.load_state_dict(before)
            next(iter(loader))
            found.append(loader.state_dict())
        return found

    regular = states(8, None)
    assert max(len(json.dumps(state)) for state in regular) < 500
    dealt = states(4, states(6, regular))
    assert max(len(json.dumps(state)) for state in dealt) < 20_000, "a line a share that is left"


def opened_files(monkeypatch):
    opened = []
    original = sources._open
    monkeypatch.setattr(sources, "_open", lambda path: opened.append(os.path.basename(path)) or original(path))
    return opened


@pytest.mark.parametrize("world_size", [1, 2])
def test_finished_files_are_not_opened_again(tmp_path, monkeypatch, world_size):
    source, _, _ = save_numbers(tmp_path, [10, 10, 10, 10])
    loader = batches(source, NumberTokenizer(), epochs=1, batch_size=1)
    steps = itertools.islice(loader, 30)
    for _ in steps:
        if loader.state_dict()["workers"][0]["share"] == 2:
            break
    opened = opened_files(monkeypatch)
    resumed = [batches(source, NumberTokenizer(), epochs=1, world_size=world_size, rank=i) for i in range(world_size)]
    for each in resumed:
        each.load_state_dict([loader.state_dict()])
        list(each)
    assert set(opened) == {"part-02.jsonl", "part-03.jsonl"}


@pytest.mark.parametrize("extension", [".parquet", ".arrow", ".file.arrow", ".jsonl", ".jsonl.gz"])
def test_reading_from_any_record_on(extension, tmp_path):
    documents = texts(10)
    path = tmp_path / f"x{extension}"
    path.write_bytes(FORMATS[extension](documents))
    reader = Reader([str(path)], "text", "error")
    for record, step in itertools.product(range(12), (1, 3)):
        found = list(reader.texts(FileSlice(0, 0, 0, step, record)))
        expected = [(i, text) for i, text in enumerate(documents, 1) if i > record and i % step == 0]
        assert found == expected


def test_consumed_row_groups_are_not_read(tmp_path):
    """A parquet file whose first row groups are gone still gives the rest."""
    path = tmp_path / "x.parquet"
    content = bytearray(parquet_bytes(texts(12)))  # row groups of four
    metadata = arrow("pyarrow.parquet").ParquetFile(io.BytesIO(bytes(content))).metadata
    for group in (0, 1):
        column = metadata.row_group(group).column(1)
        start = column.dictionary_page_offset or column.data_page_offset
        content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)
    found = Reader([str(path)], "text", "error").texts(FileSlice(0, 0, record=9))
    assert [text for _, text in found] == texts(12)[9:]


def test_consumed_lines_are_not_parsed(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"bad\nbad\n" + json_lines(["good"]))
    found = Reader([str(tmp_path / "x.jsonl")], "text", "error").texts(FileSlice(0, 0, record=2))
    assert list(found) == [(3, "good")]


# --- bad input ----------------------------------------------------------------------------------------------------

GOOD = json_lines(["fine"])
BAD_LINES = {
    "not json": (b"{broken", "is not JSON"),
    "not an object": (b'["text"]', "has no field 'text'"),
    "without text": (b'{"url": ""}', "has no field 'text'"),
    "null": (b'{"text": null}', "field 'text' is None; accepted is a string"),
    "number": (b'{"text": 3}', "field 'text' is 3; accepted is a string"),
    "not utf-8": (b'{"text": "\xff"}', "is not JSON"),
    "surrogate": (b'{"text": "\\ud800"}', "field 'text' holds half a surrogate pair"),
    "nested": (b"[" * 100_000, "is not JSON"),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_line_is_named_or_counted(tokenizer, tmp_path, kind, workers):
    line, problem = BAD_LINES[kind]
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD + b"\n" + line + b"\n" + GOOD))
    with pytest.raises(DataError) as raised:
        list(batches(str(path), tokenizer, epochs=1, num_workers=workers))
    assert str(raised.value).startswith(f"{path}, line 3: {problem}")
    assert "\n" not in str(raised.value)
    found = batches(str(path), tokenizer, epochs=1, num_workers=workers, on_bad_line="skip")
    assert documents_of(found) == ids_of(["fine"] * 2, tokenizer)
    assert (found.documents, found.bad_lines) == (2, 1)


def test_skipped_lines_are_logged(tmp_path, caplog):
    (tmp_path / "x.jsonl").write_bytes(GOOD + b"bad\n" * 20)
    assert list(read_texts(str(tmp_path / "x.jsonl"), on_bad_line="skip")) == ["fine"]
    assert [record.getMessage().rsplit(" ", 1)[1] for record in caplog.records] == ["1)", "2)", "4)", "8)", "16)"]
    assert "x.jsonl, line 2: is not JSON" in caplog.text


def test_row_without_text_is_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(parquet_bytes(["fine", None]))
    with pytest.raises(DataError, match=r"x\.parquet, row 2: field 'text' is None"):
        list(read_texts(str(tmp_path / "x.parquet")))


BROKEN = "cannot be read"
BAD_FILES = {
    "empty.jsonl": (lambda: b"", "is empty"),
    "blank.jsonl": (lambda: b"\n \n", "holds no documents"),
    "empty.jsonl.gz": (lambda: gzip.compress(b""), "holds no documents"),
    "truncated.jsonl.gz": (lambda: gzip.compress(json_lines(texts(200)))[:-20], BROKEN),
    "truncated.jsonl.xz": (lambda: lzma.compress(json_lines(texts(200)))[:-20], BROKEN),
    "truncated.jsonl.zst": (lambda: zstd(json_lines(texts(200)))[:-20], BROKEN),
    "truncated.parquet": (lambda: parquet_bytes(texts(200))[:-20], BROKEN),
    "truncated.arrow": (lambda: arrow_bytes(texts(200))[:-200], BROKEN),
    "plain.jsonl.gz": (lambda: GOOD, BROKEN),
    "plain.jsonl.xz": (lambda: GOOD, BROKEN),
    "plain.jsonl.zst": (lambda: GOOD, BROKEN),
    "plain.parquet": (lambda: GOOD, BROKEN),
    "column.parquet": (lambda: parquet_bytes([1, 2]), "column 'text' is of type int64; accepted are strings"),
    "x.csv": (lambda: GOOD, "unknown extension; accepted is .json"),
    "x.gz": (lambda: gzip.compress(GOOD), "unknown extension; accepted is .json"),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_named(tokenizer, tmp_path, name, workers):
    content, problem = BAD_FILES[name]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(DataError) as raised:
        list(batches([save(tmp_path, [["good"]]), str(tmp_path / name)], tokenizer, epochs=1, num_workers=workers))
    assert str(raised.value).startswith(f"{tmp_path / name}: ") and problem in str(raised.value)
    assert "\n" not in str(raised.value)


def test_column_must_exist(tmp_path):
    (tmp_path / "x.parquet").write_bytes(parquet_bytes(["a"]))
    with pytest.raises(DataError, match=r"has no column 'content', its columns are url, text$"):
        list(read_texts(str(tmp_path / "x.parquet"), text_field="content"))


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("none-*.jsonl", "no such file, and no file matches it as a glob"),
        (".", "is a directory; accepted are files, for example"),
        ("sample:test", "accepted is sample:train or sample:validation"),
        ("file:///none-*.jsonl", "no file matches it"),
        ("nosuch://x.jsonl", "cannot be resolved"),
        ("hub:", "accepted is hub:<repo>"),
    ],
)
def test_source_that_leads_nowhere_is_named(source, problem):
    with pytest.raises(DataError) as raised:
        find_files(source)
    assert str(raised.value).startswith(f"{source}: ") and problem in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("epochs", [1, None])
@pytest.mark.parametrize("workers", [0, 2])
def test_source_without_any_document_ends_with_an_error(tokenizer, tmp_path, workers, epochs):
    source = save(tmp_path, [["", " "], ["\n"]])
    with pytest.raises(DataError, match=r"part-\*\.jsonl: (holds no documents|no document for stream)"):
        list(batches(source, tokenizer, epochs=epochs, num_workers=workers))


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("packing", "concat", "pack, pad"),
        ("on_bad_line", "ignore", "error, skip"),
        ("sequence_length", 1, "a whole number from 2"),
        ("sequence_length", 2.0, "a whole number"),
        ("shuffle_block", -1, "a whole number from 0"),
        ("order_per_head", 1, "true or false"),
        ("num_workers", -1, "a whole number from 0"),
        ("num_workers", True, "a whole number"),
        ("validation_tokens", 0, "a whole number from 1"),
        ("train", [], "a text source or a list"),
        ("validation", ["x", 3], "a text source or a list"),
        ("tokenizer", "", "a text that is not empty"),
        ("text_field", None, "a text that is not empty"),
    ],
)
def test_config_refuses(field, value, accepted):
    with pytest.raises(ValueError) as raised:
        DataConfig(**{field: value})
    assert str(raised.value).startswith(f"{field}={value!r}: accepted is ") and accepted in str(raised.value)


@pytest.mark.parametrize(
    ("field", "value"), [("batch_size", 0), ("epochs", 0), ("world_size", 0), ("rank", 1), ("rank", -1)]
)
def test_batches_refuse(tokenizer, field, value):
    with pytest.raises(ValueError, match=rf"^{field}={value}: accepted is "):
        batches("sample:train", tokenizer, **{field: value})
