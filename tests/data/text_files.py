"""Files of text in every format that can be read, and what batches of their tokens hold."""

import gzip
import json
import lzma

import pytest
import torch

from nt_hf.data.streams import TokenBatches

LENGTH = 16
EOS, PAD = 1, 0


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
