"""Noise, and exact selection: of one tensor, of several, of shards, within groups."""

import threading

import pytest
import torch

from nt_hf.sparsity import selection
from nt_hf.sparsity.selection import (
    INT32_MIN,
    Scores,
    chunks,
    hash_bits,
    hash_range,
    map_chunks,
    noise_key,
    select_top,
    select_top_rows,
    sort_keys,
    to_uniform,
)


def hash_uniform(index, key):
    return to_uniform(hash_bits(index, key))


def top(scores, k, candidates=None, key=(1, 2)):
    """Bool mask of the ``k`` largest, in the shape of ``scores``."""
    keys = sort_keys(scores.flatten().clone(), None if candidates is None else candidates.flatten())
    return select_top([Scores(keys, key)], k)[0].view(scores.shape)


@pytest.fixture
def small(monkeypatch):
    """Chunks and samples so small that small tensors have many."""
    monkeypatch.setitem(selection._CHUNK, "cpu", 64)
    monkeypatch.setattr(selection, "_SAMPLE", 128)


# -------------------------------------------------------------------------------------------------------- noise


def uniform_noise(n=2**18, **changed):
    key = {"seed": 0, "step": 50, "name": "a.weight", "purpose": "drop"} | changed
    return hash_uniform(torch.arange(n), noise_key(**key))


def test_noise_is_the_same_everywhere():
    def slow(index, key):
        x = index * (key[0] | 1) + key[1] + (index >> 32) * 0x1E3779B1 & 0xFFFFFFFF
        x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
        x ^= x >> 16
        return x - (x >> 31 << 32)

    assert noise_key(1, 2, "a.weight", "drop") == (1085652479, 888452424)
    index = [0, 1, 2, 1000, 2**31 - 1, 2**31, 2**32, 2**40 + 7]
    for key in ((1085652479, 888452424), (-(2**31), 2**31 - 1), (-1, -2)):
        assert hash_bits(torch.tensor(index), key).tolist() == [slow(i, key) for i in index]


def test_noise_of_a_part_is_part_of_the_noise():
    whole = uniform_noise(1000)
    index = torch.tensor([999, 3, 500])
    key = noise_key(0, 50, "a.weight", "drop")
    assert torch.equal(hash_uniform(index, key), whole[index])
    assert torch.equal(torch.cat([hash_uniform(torch.arange(a, a + 100), key) for a in range(0, 1000, 100)]), whole)


def test_noise_does_not_repeat_beyond_32_bit_indices():
    key = noise_key(0, 0, "a", "drop")
    index = torch.arange(1000)
    assert (hash_bits(index, key) == hash_bits(index + 2**32, key)).float().mean() < 0.01


def test_noise_is_uniform():
    counts = torch.histc(uniform_noise(), 256, 0, 1)
    chi_squared = ((counts - 1024) ** 2 / 1024).sum()
    assert 180 < chi_squared < 340  # 255 degrees of freedom: 255 ± 3.7 * 22.6
    assert torch.histc(uniform_noise() * 2**10 % 1, 256, 0, 1).std() < 45  # lower bits too


def test_noise_has_no_correlations():
    first = uniform_noise() - 0.5
    others = [uniform_noise(**changed) for changed in ({"step": 51}, {"seed": 1}, {"purpose": "grow"}, {"name": "b"})]
    others += [first.roll(shift) + 0.5 for shift in (1, 2, 16, 768, 1024)]
    for other in others:
        correlation = 12 * (first * (other - 0.5)).mean()
        assert abs(correlation) < 4 / len(first) ** 0.5


@pytest.mark.parametrize(("bits", "value"), [(0, 2**-32), (2**31 - 1, 1 - 2**-24)])
def test_noise_is_never_0_or_1(bits, value):
    assert to_uniform(torch.tensor([bits, bits - 2**31], dtype=torch.int32)).tolist() == [value, value]


# ---------------------------------------------------------------------------------------------------- selection


@pytest.mark.parametrize("n", [1, 7, 1000, 2**17 + 1, 400_000, 1_000_003])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999, 1.0])
def test_selection_equals_topk_without_ties(n, share):
    # Distinct values over all exponents, both signs and both infinities.
    scores = torch.linspace(-80, 80, n)[torch.randperm(n, generator=torch.Generator().manual_seed(n))]
    scores = scores.sinh()
    scores[scores.argmax()] = float("inf")
    k = round(share * n)
    expected = torch.zeros(n, dtype=torch.bool).index_fill_(0, scores.topk(k).indices, True)
    assert torch.equal(top(scores, k), expected)


def test_selection_chooses_among_candidates_only():
    scores = torch.tensor([[5.0, -float("inf"), 3.0], [2.0, float("inf"), 1.0]])
    candidates = torch.tensor([[False, True, True], [True, False, False]])
    for k, expected in enumerate([[0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0]]):
        assert top(scores, k, candidates).int().flatten().tolist() == expected


def test_selection_breaks_ties_by_noise_not_by_index():
    scores = torch.zeros(4000)
    scores[:10] = 1.0
    chosen = top(scores, 1010, key=noise_key(0, 0, "", ""))
    assert chosen[:10].all()
    assert chosen.sum() == 1010
    quarters = chosen[10:].float()[: 4 * 997].view(4, 997).mean(1)
    assert ((quarters - 1000 / 3990).abs() < 0.06).all()
    assert not torch.equal(chosen, top(scores, 1010, key=noise_key(0, 1, "", "")))


def test_selection_stays_exact_when_the_noise_ties_too(monkeypatch):
    monkeypatch.setattr(selection, "hash_bits", lambda index, key: torch.zeros_like(index, dtype=torch.int32))
    assert top(torch.ones(100), 37).sum() == 37


def test_minus_zero_ties_with_zero():
    scores = torch.tensor([0.0, -0.0]).repeat(500)
    share = top(scores, 500, key=noise_key(0, 0, "", ""))[::2].float().mean()
    assert 0.4 < share < 0.6


def test_noise_of_a_range_is_the_noise_of_its_places():
    for start in (0, 17, 2**31 - 3, 2**32 - 3):
        index = torch.arange(start, start + 7)
        assert torch.equal(hash_range(start, start + 7, (3, 4), None), hash_bits(index, (3, 4)))


def test_noise_of_all_places_differs():
    assert len(hash_range(0, 2**20, noise_key(0, 0, "a", "b"), None).unique()) == 2**20


@pytest.mark.parametrize("seed", range(20))
def test_an_unlucky_sample_costs_time_only(seed, small, monkeypatch):
    # The sample sees one place in 78, always the first: all of them below everything else.
    monkeypatch.setattr(selection, "hash_range", selection.hash_range)
    scores = torch.randn(10_000, generator=torch.Generator().manual_seed(seed))
    scores[::78] = -10
    monkeypatch.setattr(selection, "hash_bits", lambda index, key: torch.zeros_like(index, dtype=torch.int32))
    expected = torch.zeros(10_000, dtype=torch.bool).index_fill_(0, scores.topk(3000).indices, True)
    assert torch.equal(top(scores, 3000), expected)


@pytest.mark.parametrize("k", [0, 1, 50, 777, 999, 1000])
def test_tensors_are_ranked_together(k, small):
    scores = torch.randn(1000, generator=torch.Generator().manual_seed(k)).mul(3).round()  # many ties
    parts = [Scores(sort_keys(piece.clone()), (i, i)) for i, piece in enumerate(scores.split([600, 1, 399]))]
    chosen = torch.cat(select_top(parts, k))
    assert chosen.sum() == k
    if 0 < k < 1000:
        assert scores[chosen].min() >= scores[~chosen].max()


def test_ties_between_tensors_are_fair():
    parts = [Scores(sort_keys(torch.zeros(n)), (7 * n, n)) for n in (4000, 1000)]
    first, second = select_top(parts, 2500)
    assert first.sum() + second.sum() == 2500
    assert abs(int(second.sum()) - 500) < 100


def shards(scores, cuts, k, key, candidates=None):
    """Each shard's part of the selection, found by a thread of its own that shares sums only."""
    barrier, values, chosen = threading.Barrier(len(cuts)), {}, {}

    def work(rank, start, stop):
        def reduce(counts):
            values[rank] = counts
            barrier.wait()
            total = sum(values[r] for r in range(len(cuts)))
            barrier.wait()
            return total

        keys = sort_keys(scores[start:stop].clone(), None if candidates is None else candidates[start:stop])
        chosen[rank] = select_top([Scores(keys, key, start)], k, reduce)[0]

    threads = [threading.Thread(target=work, args=(i, *cut)) for i, cut in enumerate(cuts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return torch.cat([chosen[rank] for rank in range(len(cuts))])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("cuts", [[(0, 500), (500, 3000)], [(0, 1), (1, 1), (1, 2999), (2999, 3000)]])
def test_a_sharded_tensor_needs_its_counts_summed_only(cuts, ties, small):
    scores = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    scores = scores.round() if ties else scores
    for k in (1, 300, 1500, 2999):
        key = noise_key(0, k, "a", "b")
        assert torch.equal(shards(scores, cuts, k, key), top(scores, k, key=key))


@pytest.mark.parametrize("cuts", [[(0, 500), (500, 3000)], [(0, 1), (1, 1), (1, 2999), (2999, 3000)]])
def test_a_sharded_tensor_stays_exact_when_the_noise_ties_too(cuts, small, monkeypatch):
    monkeypatch.setattr(selection, "hash_bits", lambda index, key: torch.zeros_like(index, dtype=torch.int32))
    scores = torch.arange(3000).fmod(3).float()
    for k in (0, 1, 600, 1500, 2999):
        assert torch.equal(shards(scores, cuts, k, (1, 2)), top(scores, k))


def test_rows_choose_for_themselves():
    scores = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)).mul(2).round()
    k = torch.arange(50) % 17
    index = torch.arange(800).view(50, 16)
    chosen = select_top_rows(sort_keys(scores.clone()), k, (5, 6), index)
    assert torch.equal(chosen.sum(1), k)
    for row, mask in zip(scores, chosen):
        if 0 < mask.sum() < 16:
            assert row[mask].min() >= row[~mask].max()
    ties = select_top_rows(torch.zeros(4000, 4, dtype=torch.int32), torch.full((4000,), 2), (5, 6),
                           torch.arange(16_000).view(-1, 4))  # fmt: skip
    assert ((ties.float().mean(0) - 0.5).abs() < 0.04).all()


def test_what_is_no_candidate_comes_after_minus_infinity():
    keys = sort_keys(torch.tensor([-torch.inf, 3.0, -0.0, 0.0]), torch.tensor([True, False, True, True]))
    assert keys[1] == INT32_MIN < keys[0] < keys[2] == keys[3]


def test_chunks_end_where_those_of_the_whole_tensor_do(small):
    assert chunks(torch.zeros(150)) == [(0, 64), (64, 128), (128, 150)]
    assert chunks(torch.zeros(150), 100) == [(0, 28), (28, 92), (92, 150)]
    assert chunks(torch.zeros(3, 40)) == [(0, 1), (1, 2), (2, 3)]
    assert chunks(torch.zeros(0)) == []


def test_map_chunks_keeps_the_order_and_leaves_the_threads_alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = map_chunks(lambda i: (i, torch.get_num_threads(), torch.is_grad_enabled()), [(i,) for i in range(20)])
        assert seen == [(i, 1, False) for i in range(20)]
        with pytest.raises(ValueError, match="no"):
            map_chunks(lambda i: int("no"), [(1,), (2,)])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
