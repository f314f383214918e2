"""Text of other machines: data sets of the hub, and files whose requests fail."""

import ast
import gzip
import io
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import hub_server
import pytest
import torch
from text_files import FORMATS, PAD, batches, documents_of, ids_of, json_lines, texts

from nt_hf.data.errors import DataError
from nt_hf.data.sources import find_files, read_texts

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def run_python(code, **environment):
    # The child has to see the same packages, but none of the variables that a test could have inherited.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TOKENIZERS_"))}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
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


# --- remote files that fail ------------------------------------------------------------------------------------------


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
