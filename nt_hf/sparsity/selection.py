"""Exact selection of the largest scores, and the noise that goes with it.

No sort and no gather: a histogram of a sample brackets the ``k``-th largest score, histograms of what lies in the
bracket give it exactly, and equal scores are settled by noise, never by index. A tensor that is spread over processes
needs only its histograms and counts summed, and tensors can be ranked together without being joined.

Noise is a hash of (seed, step, name, purpose, flat index): the same on every rank and device, repeated by a resumed
run, and computable for any part of a tensor.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")

#: Sums an int64 tensor over the processes that share the tensors; of a whole tensor there is nothing to sum.
Reduce = Callable[[torch.Tensor], torch.Tensor]

#: From [`noise_key`]: two 32-bit numbers, or int32 tensors ``[]`` that hold them.
NoiseKey = tuple[int, int] | tuple[torch.Tensor, torch.Tensor]

# Elements handled at a time: on a CPU the temporaries of a chunk stay in the cache, a GPU only needs them bounded.
_CHUNK = {"cpu": 2**17}
_CHUNK_DEVICE = 2**25

_SAMPLE = 2**17
_SAMPLE_NOISE = (0x2545F491, 0x1B873593)
_HALF = 16  # int32 keys are ranked by their upper half, then by their lower one
_BINS = 2**_HALF
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def no_reduction(counts: torch.Tensor) -> torch.Tensor:
    """The `Reduce` of tensors that one process holds completely."""
    return counts


# ---------------------------------------------------------------------------------------------------- selection


@dataclass(frozen=True)
class Scores:
    """Scores of one tensor, or of one shard of it, among which to select.

    Attributes:
        keys: int32 ``[n]``, see [`sort_keys`].
        noise: from [`noise_key`], settles equal keys; ``None``: the lower flat index comes first.
        offset: flat index of the first element within its tensor.
    """

    keys: torch.Tensor
    noise: NoiseKey | None
    offset: int = 0


def sort_keys(scores: torch.Tensor, candidates: torch.Tensor | None = None) -> torch.Tensor:
    """int32 keys ``[n]`` in the order of the fp32 scores ``[n]``; what is no candidate comes last.

    Overwrites ``scores``. Infinities are ordered; of NaN nothing is promised.
    """
    bits = scores.add_(0.0).view(torch.int32)  # adding 0 turns -0.0 into 0.0: they are equal, their bits are not
    keys = bits ^ (bits >> 31).bitwise_and_(INT32_MAX)  # negative floats sort backwards by their bits
    return keys if candidates is None else restrict(keys, candidates)


def restrict(keys: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Ranks everything but the candidates last, below the key of -inf, in place."""
    # keys.masked_fill_(~candidates, INT32_MIN) in a third of its time on a CPU
    flags = candidates.to(torch.int32).neg_()
    return keys.bitwise_xor_(INT32_MIN).bitwise_and_(flags).bitwise_xor_(INT32_MIN)


def select_top(tensors: Sequence[Scores], k: int, reduce: Reduce = no_reduction) -> list[torch.Tensor]:
    """The ``k`` elements with the largest keys among all tensors: bool ``[n]`` of each tensor, exact.

    Equal keys are settled by hashed noise, which differs for all elements of a tensor of up to 2**32.

    Args:
        tensors: of one device, at least one.
        k: from 0 to the number of candidates over all tensors and processes.
        reduce: sums counts over the processes that hold the other shards of the tensors.
    """
    chosen = [torch.zeros_like(scores.keys, dtype=torch.bool) for scores in tensors]
    if k == 0:
        return chosen
    # Everything above the threshold is chosen; of the elements equal to it, the ties, only ``remaining`` are.
    threshold, remaining = _kth_largest([scores.keys for scores in tensors], k, reduce)
    tied = [torch.empty_like(scores.keys, dtype=torch.bool) for scores in tensors]

    def compare(i: int, start: int, stop: int) -> torch.Tensor:
        keys = tensors[i].keys[start:stop]
        if threshold < INT32_MAX:
            chosen[i][start:stop] = _at_least(keys, threshold + 1)
        tied[i][start:stop] = ties = _at_least(keys, threshold) ^ chosen[i][start:stop]
        return count_set(ties)

    ranges = _chunks_of_all([scores.keys for scores in tensors], [scores.offset for scores in tensors])
    counts = torch.stack([_zero(tensors[0].keys), *map_chunks(compare, ranges)])
    if remaining == int(reduce(counts.sum())):  # all ties are needed, as when there is but one: the usual case
        return [mask.logical_or_(ties) for mask, ties in zip(chosen, tied)]

    # Only chunks with ties are looked at again: few after continuous scores, all where gradients are zero.
    ranges = [chunk for chunk, count in zip(ranges, counts[1:].tolist()) if count]
    if tensors[0].noise is None:
        # No noise to settle ties: this is the second round (see below), and the lowest flat indices win. The bound is
        # the ``remaining``-th smallest index over all processes.
        indices = [tied[i][start:stop].nonzero().squeeze(1) + (tensors[i].offset + start) for i, start, stop in ranges]
        bound = _kth_smallest(torch.cat([tensors[0].keys[:0].long(), *indices]), remaining, reduce)
        for (i, start, stop), index in zip(ranges, indices):
            chosen[i][start:stop][index[index <= bound] - (tensors[i].offset + start)] = True
        return chosen

    # Ties are drawn by lot: each gets hashed bits as its key, all else ranks last, and the same selection runs once
    # more on these keys. Every chunk is a tensor of its own there, so only the chunks with ties take memory.
    def lots(i: int, start: int, stop: int) -> Scores:
        start, stop, offset = start + tensors[i].offset, stop + tensors[i].offset, tensors[i].offset
        bits = hash_range(start, stop, tensors[i].noise, tied[i].device).clamp_(min=INT32_MIN + 1)
        # Should hashes of two tensors be equal, the first tensor comes first: its indices are below 2**44.
        return Scores(restrict(bits, tied[i][start - offset : stop - offset]), None, (i << 44) + start)

    # A process without ties takes part in the sums all the same, with an empty tensor.
    drawn = select_top(map_chunks(lots, ranges) or [Scores(tensors[0].keys[:0], None)], remaining, reduce)
    for (i, start, stop), mask in zip(ranges, drawn):
        chosen[i][start:stop] |= mask
    return chosen


def select_top_rows(keys: torch.Tensor, k: torch.Tensor, noise: NoiseKey, index: torch.Tensor) -> torch.Tensor:
    """In each row the elements with the largest keys, equal ones settled by noise: bool ``[rows, n]``.

    Args:
        keys: int32 ``[rows, n]``, see [`sort_keys`].
        k: int64 ``[rows]``, how many of each row.
        noise: from [`noise_key`].
        index: integers ``[rows, n]``, each element's flat index in its tensor.
    """
    chosen = torch.empty_like(keys, dtype=torch.bool)

    def choose(start: int, stop: int) -> None:
        # One int64 holds key and noise, so that no two are equal and one comparison with the k-th settles all.
        values = (keys[start:stop].long() << 32) + (hash_bits(index[start:stop], noise).long() - INT32_MIN)
        last = (k[start:stop] - 1).clamp(min=0).unsqueeze(1)
        kth = values.sort(dim=1, descending=True).values.gather(1, last)
        chosen[start:stop] = (values >= kth) & (k[start:stop] > 0).unsqueeze(1)

    map_chunks(choose, chunks(keys))
    return chosen


def _kth_largest(tensors: Sequence[torch.Tensor], k: int, reduce: Reduce) -> tuple[int, int]:
    """The ``k``-th largest of the int32 values ``[n]`` of all tensors, and how many equal to it are among the ``k``."""
    for low, high in (_bracket(tensors, k, reduce), (INT32_MIN, INT32_MAX)):
        results = map_chunks(partial(_within, tensors, low, high), _chunks_of_all(tensors))
        counts = torch.stack([_zero(tensors[0]).expand(2), *(count for count, _ in results)])
        above, inside = reduce(counts.sum(0)).tolist()
        if above < k <= above + inside:
            break  # else the sample was unlucky, and the second bracket, of all numbers, holds the value for certain
    if low == high:
        return low, k - above
    return _radix_select(torch.cat([tensors[0][:0], *(values for _, values in results)]), k - above, reduce)


def _bracket(tensors: Sequence[torch.Tensor], k: int, reduce: Reduce) -> tuple[int, int]:
    """Bounds that very likely hold the ``k``-th largest value, from a sample."""
    size = int(reduce(_zero(tensors[0]) + sum(map(len, tensors))))
    stride = size // _SAMPLE
    if stride < 2:
        return INT32_MIN, INT32_MAX

    # One value at random of each run of ``stride``: always the first one could mean a few columns only.
    def pick(values: torch.Tensor) -> torch.Tensor:
        run = torch.arange(len(values) // stride, device=values.device)
        return values[run * stride + (hash_bits(run, _SAMPLE_NOISE) & INT32_MAX) % stride]

    sample = torch.cat([pick(values) for values in tensors])
    sampled = int(reduce(_zero(sample) + len(sample)))
    share = k / size
    rank, margin = share * sampled, 4 * (share * (1 - share) * sampled) ** 0.5 + 8  # 4 standard deviations
    first, last = int(rank - margin), int(rank + margin)
    high = _radix_select(sample, first, reduce)[0] if first >= 1 else INT32_MAX
    low = _radix_select(sample, last, reduce)[0] if last <= sampled else INT32_MIN
    return low, high


def _within(
    tensors: Sequence[torch.Tensor], low: int, high: int, i: int, start: int, stop: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many values of a chunk lie above ``high`` and how many from ``low`` to ``high``; these, if they differ."""
    values = tensors[i][start:stop]
    if low == INT32_MIN and high == INT32_MAX:
        return torch.stack([_zero(values), _zero(values) + len(values)]), values
    inside = _at_least(values, low)
    above = _at_least(values, high + 1) if high < INT32_MAX else torch.zeros_like(inside)
    inside ^= above
    return torch.stack([count_set(above), count_set(inside)]), _pick(values, inside) if low < high else values[:0]


def _radix_select(values: torch.Tensor, k: int, reduce: Reduce) -> tuple[int, int]:
    """As [`_kth_largest`], of few values: by histograms of their upper and of their lower bits."""
    half = _BINS // 2
    upper, k = _bin_of(reduce(torch.bincount((values >> _HALF) + half, minlength=_BINS)), k)
    values = values[(values >> _HALF) == upper - half] & (_BINS - 1)
    lower, k = _bin_of(reduce(torch.bincount(values, minlength=_BINS)), k)
    return (upper - half) * _BINS + lower, k


def _kth_smallest(numbers: torch.Tensor, k: int, reduce: Reduce) -> int:
    """The ``k``-th smallest of different int64 numbers ``[n]`` from 0, over all processes: by bisection."""
    low, high = -1, 2**62
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if int(reduce((numbers <= middle).sum())) >= k else (middle, high)
    return high


# On a CPU NumPy takes a fraction of PyTorch's time for the three operations that have to do with truth values.


def _at_least(values: torch.Tensor, bound: int) -> torch.Tensor:
    """``values >= bound`` of int32 values."""
    return torch.from_numpy(values.numpy() >= bound) if values.device.type == "cpu" else values >= bound


def count_set(mask: torch.Tensor) -> torch.Tensor:
    """How many elements of a bool mask are set, int64 ``[]``."""
    return torch.tensor(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else torch.count_nonzero(mask)


def _pick(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The values where the mask is set."""
    return torch.from_numpy(values.numpy()[mask.numpy()]) if values.device.type == "cpu" else values[mask]


def _bin_of(histogram: torch.Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the ``k``-th largest element, and that element's rank (from 1) within the bin."""
    from_top = histogram.flip(0).cumsum(0)
    index = int(torch.searchsorted(from_top, k))
    return len(histogram) - 1 - index, k - (int(from_top[index - 1]) if index else 0)


# ------------------------------------------------------------------------------------------------------- chunks


def chunks(like: torch.Tensor, offset: int = 0) -> list[tuple[int, int]]:
    """The ranges (start, stop) of the first dimension of ``like`` that are worked on at a time.

    With an ``offset`` they end where those of the tensor do of which ``like`` is a shard.
    """
    length = max(1, _CHUNK.get(like.device.type, _CHUNK_DEVICE) // max(1, like[:1].numel()))
    ends = range(length - offset % length, len(like) + length, length)
    return [(max(0, end - length), min(end, len(like))) for end in ends if end - length < len(like)]


def _chunks_of_all(tensors: Sequence[torch.Tensor], offsets: Sequence[int] | None = None) -> list[tuple[int, int, int]]:
    """The chunks (number of the tensor, start, stop) of all tensors."""
    offsets = offsets or [0] * len(tensors)
    return [(i, *ends) for i, (x, offset) in enumerate(zip(tensors, offsets)) for ends in chunks(x, offset)]


def map_chunks(function: Callable[..., T], ranges: Sequence[tuple[int, ...]]) -> list[T]:
    """``function(*chunk)`` of every chunk, in order; on a CPU by all threads.

    CPU operations on a chunk take microseconds. Sharing out each of them would make threads wait for one another, so
    every thread takes entire chunks.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(ranges) < 2:
        return [function(*chunk) for chunk in ranges]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_grad_enabled, initargs=(False,)) as pool:
            return list(pool.map(lambda chunk: function(*chunk), ranges))
    finally:
        torch.set_num_threads(threads)


def _zero(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=torch.int64, device=like.device)


# -------------------------------------------------------------------------------------------------------- noise


def noise_key(seed: int, step: int, name: str, purpose: str) -> tuple[int, int]:
    """Two 32-bit numbers that stand for (seed, step, name, purpose); the same in every process."""
    digest = hashlib.blake2b(f"{seed}\0{step}\0{name}\0{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:], "little", signed=True)


def hash_bits(index: torch.Tensor, key: NoiseKey) -> torch.Tensor:
    """32 random bits for each flat index, as int32; they differ for all indices below 2**32.

    A counter-based generator: the index times an odd number plus an offset, both from the key, through the
    mixer "lowbias32" (C. Wellons, *Prospecting for hash functions*, 2018). Integer arithmetic modulo 2**32, hence the
    same on every device.

    Args:
        index: int32 or int64, flat positions in the tensor.
        key: from [`noise_key`].
    """
    # The right shifts of int32 are arithmetic, so each is followed by a mask.
    x = (index * (key[0] | 1)) if index.dtype == torch.int32 else index.to(torch.int32).mul_(key[0] | 1)
    x += key[1]
    if index.dtype == torch.int64:
        x += (index >> 32).to(torch.int32).mul_(0x1E3779B1)  # a tensor of more than 2**32 weights does not repeat
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def hash_range(start: int, stop: int, key: NoiseKey, device: torch.device | str | None) -> torch.Tensor:
    """[`hash_bits`] of the flat indices from ``start`` to ``stop``."""
    dtype = torch.int32 if stop <= INT32_MAX else torch.int64
    return hash_bits(torch.arange(start, stop, dtype=dtype, device=device), key)


def to_uniform(bits: torch.Tensor) -> torch.Tensor:
    """Uniform fp32 numbers in (0, 1), neither end included, from random bits; overwrites them."""
    # fp32 has more steps near 0 than near 1: the smallest value is 2**-32, the largest would round to 1.
    return bits.bitwise_and_(INT32_MAX).to(torch.float32).add_(0.5).mul_(2**-31).clamp_(max=1 - 2**-24)
