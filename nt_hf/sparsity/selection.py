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

# Elements handled at a time: on a CPU the temporaries of a stretch stay in the cache, a GPU only needs them bounded.
_STRETCH = {"cpu": 2**17}
_STRETCH_DEVICE = 2**25

_SAMPLE = 2**17
_SAMPLE_NOISE = (0x2545F491, 0x1B873593)
_HALF = 16  # int32 keys are ranked by their upper half, then by their lower one
_BINS = 2**_HALF
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
_NO_BOUND = (INT32_MIN, INT32_MAX)


def whole(counts: torch.Tensor) -> torch.Tensor:
    """The `Reduce` of tensors that one process holds whole."""
    return counts


# ---------------------------------------------------------------------------------------------------- selection


@dataclass(frozen=True)
class Part:
    """Scores of one tensor, or of one shard of it, among which to select.

    Attributes:
        keys: int32 ``[n]``, see [`sort_keys`].
        noise: from [`noise_key`], settles equal keys; ``None``: their place does, the lower flat index comes first.
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
    return keys if candidates is None else only(keys, candidates)


def only(keys: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Puts all but the candidates last, below the key of -inf, in place."""
    # keys.masked_fill_(~candidates, INT32_MIN) in a third of its time on a CPU
    flags = candidates.to(torch.int32).neg_()
    return keys.bitwise_xor_(INT32_MIN).bitwise_and_(flags).bitwise_xor_(INT32_MIN)


def select_top(parts: Sequence[Part], k: int, reduce: Reduce = whole) -> list[torch.Tensor]:
    """The ``k`` elements with the largest keys among all parts: bool ``[n]`` of each part, exact.

    Equal keys are settled by hashed noise, which differs for all elements of a tensor of up to 2**32.

    Args:
        parts: of one device, at least one.
        k: from 0 to the number of candidates over all parts and processes.
        reduce: sums counts over the processes that hold the other shards of the parts.
    """
    chosen = [torch.zeros_like(part.keys, dtype=torch.bool) for part in parts]
    if k == 0:
        return chosen
    threshold, wanted = _kth_largest([part.keys for part in parts], k, reduce)
    tied = [torch.empty_like(part.keys, dtype=torch.bool) for part in parts]

    def compare(i: int, start: int, stop: int) -> torch.Tensor:
        keys = parts[i].keys[start:stop]
        if threshold < INT32_MAX:
            chosen[i][start:stop] = _at_least(keys, threshold + 1)
        tied[i][start:stop] = ties = _at_least(keys, threshold) ^ chosen[i][start:stop]
        return count_set(ties)

    places = _places([part.keys for part in parts], [part.offset for part in parts])
    counts = torch.stack([_zero(parts[0].keys), *sweep(compare, places)])
    if wanted == int(reduce(counts.sum())):
        return [ours.logical_or_(ties) for ours, ties in zip(chosen, tied)]

    # Only stretches with ties are looked at again: few after continuous scores, all where gradients are zero.
    places = [place for place, count in zip(places, counts[1:].tolist()) if count]
    if parts[0].noise is None:
        numbers = [tied[i][start:stop].nonzero().squeeze(1) + (parts[i].offset + start) for i, start, stop in places]
        bound = _kth_smallest(torch.cat([parts[0].keys[:0].long(), *numbers]), wanted, reduce)
        for (i, start, stop), ours in zip(places, numbers):
            chosen[i][start:stop][ours[ours <= bound] - (parts[i].offset + start)] = True
        return chosen

    def lots(i: int, start: int, stop: int) -> Part:
        start, stop, offset = start + parts[i].offset, stop + parts[i].offset, parts[i].offset
        bits = hash_range(start, stop, parts[i].noise, tied[i].device).clamp_(min=INT32_MIN + 1)
        # Should hashes of two tensors be equal, the first tensor comes first.
        return Part(only(bits, tied[i][start - offset : stop - offset]), None, (i << 44) + start)

    drawn = select_top(sweep(lots, places) or [Part(parts[0].keys[:0], None)], wanted, reduce)
    for (i, start, stop), ours in zip(places, drawn):
        chosen[i][start:stop] |= ours
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

    sweep(choose, stretches(keys))
    return chosen


def _kth_largest(parts: Sequence[torch.Tensor], k: int, reduce: Reduce) -> tuple[int, int]:
    """The ``k``-th largest of the int32 values ``[n]`` of all parts, and how many equal to it are among the ``k``."""
    for low, high in (_bracket(parts, k, reduce), (INT32_MIN, INT32_MAX)):
        found = sweep(partial(_within, parts, low, high), _places(parts))
        counts = torch.stack([_zero(parts[0]).expand(2), *(count for count, _ in found)])
        above, inside = reduce(counts.sum(0)).tolist()
        if above < k <= above + inside:
            break  # else the sample was unlucky; among everything it is found for certain
    if low == high:
        return low, k - above
    return _radix_select(torch.cat([parts[0][:0], *(values for _, values in found)]), k - above, reduce)


def _bracket(parts: Sequence[torch.Tensor], k: int, reduce: Reduce) -> tuple[int, int]:
    """Bounds that very likely hold the ``k``-th largest value, from a sample."""
    size = int(reduce(_zero(parts[0]) + sum(map(len, parts))))
    every = size // _SAMPLE
    if every < 2:
        return INT32_MIN, INT32_MAX

    # One place in each run of ``every``, and not the same one: a stride could keep to a few columns.
    def pick(part: torch.Tensor) -> torch.Tensor:
        run = torch.arange(len(part) // every, device=part.device)
        return part[run * every + (hash_bits(run, _SAMPLE_NOISE) & INT32_MAX) % every]

    sample = torch.cat([pick(part) for part in parts])
    sampled = int(reduce(_zero(sample) + len(sample)))
    share = k / size
    rank, margin = share * sampled, 4 * (share * (1 - share) * sampled) ** 0.5 + 8  # 4 standard deviations
    first, last = int(rank - margin), int(rank + margin)
    high = _radix_select(sample, first, reduce)[0] if first >= 1 else INT32_MAX
    low = _radix_select(sample, last, reduce)[0] if last <= sampled else INT32_MIN
    return low, high


def _within(
    parts: Sequence[torch.Tensor], low: int, high: int, i: int, start: int, stop: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many values of a stretch lie above ``high`` and how many from ``low`` to ``high``; these, if they differ."""
    values = parts[i][start:stop]
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
    place = int(torch.searchsorted(from_top, k))
    return len(histogram) - 1 - place, k - (int(from_top[place - 1]) if place else 0)


# ---------------------------------------------------------------------------------------------------- stretches


def stretches(like: torch.Tensor, offset: int = 0) -> list[tuple[int, int]]:
    """The ranges (start, stop) of the first dimension of ``like`` that are worked on at a time.

    With an ``offset`` they end where those of the whole tensor do, of which ``like`` is a part.
    """
    length = max(1, _STRETCH.get(like.device.type, _STRETCH_DEVICE) // max(1, like[:1].numel()))
    ends = range(length - offset % length, len(like) + length, length)
    return [(max(0, end - length), min(end, len(like))) for end in ends if end - length < len(like)]


def _places(parts: Sequence[torch.Tensor], offsets: Sequence[int] | None = None) -> list[tuple[int, int, int]]:
    offsets = offsets or [0] * len(parts)
    return [(i, *at) for i, (part, offset) in enumerate(zip(parts, offsets)) for at in stretches(part, offset)]


def sweep(function: Callable[..., T], places: Sequence[tuple[int, ...]]) -> list[T]:
    """``function(*place)`` of every place, in order; on a CPU by all threads.

    CPU operations on a stretch take microseconds. Sharing out each of them would make threads wait for one another, so
    every thread takes whole stretches.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(places) < 2:
        return [function(*place) for place in places]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_grad_enabled, initargs=(False,)) as pool:
            return list(pool.map(lambda place: function(*place), places))
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
