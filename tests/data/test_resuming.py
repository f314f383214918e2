"""Streams of text that stop and go on, on the same number of ranks and workers or another."""

import collections
import itertools
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import slow
from hypothesis import given, settings
from hypothesis import strategies as st
from text_files import EOS, LENGTH, PAD, batches, equal, json_lines, save, stream_of, texts

from nt_hf.data import sources
from nt_hf.data.sources import find_files

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.mark.parametrize(
    ("workers", "packing", "epochs"),
    [
        *itertools.product([0], ["pack", "pad"], [2, None]),
        (2, "pack", 2),
        (2, "pad", None),
        (3, "pack", None),
        (3, "pad", 2),
        slow(2, "pack", None),
        slow(2, "pad", 2),
        slow(3, "pack", 2),
        slow(3, "pad", None),
    ],
)
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


# --- another number of ranks or workers ------------------------------------------------------------------------------


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
