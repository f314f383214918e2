"""Batches from text: packing, dealing to ranks and workers, shuffling."""

import collections
import itertools

import pytest
import torch
from conftest import slow
from text_files import EOS, LENGTH, PAD, batches, documents_of, ids_of, save, stream_of, texts

from nt_hf.data.config import DataConfig
from nt_hf.data.errors import DataError
from nt_hf.data.slices import deal_epoch
from nt_hf.data.sources import Reader, find_files
from nt_hf.data.tokenizers import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

# --- packing ---------------------------------------------------------------------------------------------------------


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


# --- dealing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "workers"),
    [
        (1, 0),
        (2, 0),
        (3, 0),
        (1, 1),
        (1, 2),
        (3, 2),
        (2, 8),
        slow(2, 1),
        slow(3, 1),
        slow(2, 2),
        slow(1, 8),
        slow(3, 8),
    ],
)
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


# --- shuffling -------------------------------------------------------------------------------------------------------


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


# --- bad input -------------------------------------------------------------------------------------------------------


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
        ("train", [], "a source of data or a list"),
        ("validation", ["x", 3], "a source of data or a list"),
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
