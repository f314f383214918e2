"""Criteria: what a drop method scores active weights by, and where a growth method puts new ones.

A new criterion is one function from a [`Chunk`] to scores, and one line in `DROP` or `GROW`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..checks import number, setting
from ..models.masks import groups_of
from .selection import NoiseKey, Reduce, count_set, hash_range, no_reduction, to_uniform


@dataclass(frozen=True)
class MaskedWeight:
    """One weight tensor at an update: all that criteria may look at, and what its noise depends on.

    Attributes:
        mask: bool, any shape; True where a weight is active.
        weight: of the mask's shape, any floating dtype; scores are computed in fp32.
        grad: its dense gradient; ``None`` where no criterion needs it.
        momentum: an average of its dense gradients; ``None`` where no criterion needs it.
        name: canonical name of the parameter.
        seed, step: of the run.
        exponent: of soft magnitude.
        mest_lambda: of MEST.
        random_share: of "gradient_random".
        structure: "unstructured", "constant_fan_in" or "N:M".
        transposed: whether the input dimension comes first.
        offset: flat index of the first element, when this is one shard of a tensor, split along its first dimension.
        reduce: sums counts over the shards.
        size, active: elements and active weights of the tensor, over all shards; counted here.
    """

    mask: torch.Tensor
    weight: torch.Tensor
    grad: torch.Tensor | None = None
    momentum: torch.Tensor | None = None
    name: str = ""
    seed: int = 0
    step: int = 0
    exponent: float = setting(3.0, number("(0, inf)"))
    mest_lambda: float = setting(1.0, number("[0, inf)"))
    random_share: float = setting(0.5, number("[0, 1]"))
    structure: str = "unstructured"
    transposed: bool = False
    offset: int = 0
    reduce: Reduce = no_reduction
    size: int = field(init=False)
    active: int = field(init=False)

    def __post_init__(self) -> None:
        elements = torch.tensor(self.mask.numel(), device=self.mask.device)
        size, active = self.reduce(torch.stack([elements, count_set(self.mask)])).tolist()
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "active", active)

    def count(self, *masks: torch.Tensor) -> list[int]:
        """How many are set in each of some masks, over all shards."""
        return self.reduce(torch.stack([count_set(mask) for mask in masks])).tolist()

    @property
    def group_length(self) -> int:
        """Weights of one group of the structure; unstructured, the tensor is one group."""
        return self.size if self.structure == "unstructured" else self.groups(self.mask).shape[-1]

    @property
    def group_count(self) -> int:
        """Groups of the structure, over all shards."""
        return self.size // max(1, self.group_length)

    def groups(self, tensor: torch.Tensor) -> torch.Tensor:
        """View of a tensor of the weight's size by the structure's groups, ``[..., length]``."""
        return groups_of(tensor.view(self.mask.shape), self.structure, self.transposed)

    def missing(self, mask: torch.Tensor, target: int) -> int | torch.Tensor:
        """How many weights a mask is short of ``target``: int64 ``[groups]``, or one number if unstructured."""
        if self.structure == "unstructured":
            return target - self.count(mask)[0]
        return target // self.group_count - self.groups(mask).sum(-1).flatten()


class Chunk:
    """What a criterion sees: consecutive elements of a flattened tensor, every field fp32 ``[n]``, free to overwrite.

    Attributes:
        weight: the weights.
        grad: their gradients.
        momentum: the average of their gradients. Where there is none, a `ValueError` says so, as for ``grad``.
        noise: uniform numbers in (0, 1), a hash of the element's flat index.
        exponent, mest_lambda: see [`MaskedWeight`].
    """

    def __init__(self, tensor: MaskedWeight, flat: Mapping[str, torch.Tensor], key: NoiseKey, start: int, stop: int):
        self._tensor, self._flat, self._key, self._start, self._stop = tensor, flat, key, start, stop
        self.exponent, self.mest_lambda = tensor.exponent, tensor.mest_lambda

    def _read(self, name: str) -> torch.Tensor:
        if name not in self._flat:
            what = {"grad": "gradient"}.get(name, name)
            raise ValueError(
                f"the {what} of {self._tensor.name or 'the weight'}: accepted is one, which this criterion needs"
            )
        return self._flat[name][self._start : self._stop].to(torch.float32, copy=True)

    @property
    def weight(self) -> torch.Tensor:
        return self._read("weight")

    @property
    def grad(self) -> torch.Tensor:
        return self._read("grad")

    @property
    def momentum(self) -> torch.Tensor:
        return self._read("momentum")

    @property
    def noise(self) -> torch.Tensor:
        start, stop = self._tensor.offset + self._start, self._tensor.offset + self._stop
        return to_uniform(hash_range(start, stop, self._key, self._tensor.weight.device))


Criterion = Callable[[Chunk], torch.Tensor]


def magnitude(chunk: Chunk) -> torch.Tensor:
    """Keeps the largest ``|w|`` (Zhu & Gupta 2017; the drop of RigL, Evci et al. 2020)."""
    return chunk.weight.abs_()


def soft_magnitude(chunk: Chunk) -> torch.Tensor:
    """Keeps weights drawn without replacement with probability in proportion to ``|w| ** exponent``.

    The drop of NeuroTrails (Grooten et al. 2025, arXiv 2505.17909). Drawn as an exponential race: with
    ``E ~ Exp(1)`` the ``m`` largest ``exponent * log|w| - log E`` are such a sample (Efraimidis & Spirakis 2006,
    algorithm A; ``-log E`` is Gumbel noise). Zeros score lowest.
    """
    # E = -log(1 - u), not -log(u): u is finest near 0, where E decides whether a small weight survives.
    race = chunk.noise.neg_().log1p_().neg_().log_()
    return chunk.weight.abs_().log_().mul_(chunk.exponent).sub_(race)


def taylor(chunk: Chunk) -> torch.Tensor:
    """Keeps the largest first-order effect on the loss, ``|w * g|`` (Molchanov et al. 2017)."""
    return chunk.weight.mul_(chunk.grad).abs_()


def mest(chunk: Chunk) -> torch.Tensor:
    """Keeps the largest ``|w| + lambda * |g|`` (MEST, Yuan et al. 2021)."""
    return chunk.weight.abs_().add_(chunk.grad.abs_(), alpha=chunk.mest_lambda)


def gradient(chunk: Chunk) -> torch.Tensor:
    """Grows where the dense gradient ``|g|`` is largest (RigL, Evci et al. 2020, section 3)."""
    return chunk.grad.abs_()


def momentum(chunk: Chunk) -> torch.Tensor:
    """Grows where the averaged dense gradient is largest (SNFS, Dettmers & Zettlemoyer 2019)."""
    return chunk.momentum.abs_()


def random(chunk: Chunk) -> torch.Tensor:
    """Grows anywhere, uniformly (SET, Mocanu et al. 2018)."""
    return chunk.noise


class Drop(NamedTuple):
    """A drop method: what scores the weights, and among which they compete.

    Attributes:
        score: the best are kept.
        by_sign: positive and negative weights each lose their share of the drops.
        over_all: the weights of all tensors compete; each tensor then grows as many as it lost.
    """

    score: Criterion
    by_sign: bool = False
    over_all: bool = False


DROP: dict[str, Drop] = {
    "magnitude": Drop(magnitude),
    "soft_magnitude": Drop(soft_magnitude),
    # Drops the smallest positive and the largest negative weights (SET, Mocanu et al. 2018).
    "set": Drop(magnitude, by_sign=True),
    "taylor": Drop(taylor),
    "mest": Drop(mest),
    # One threshold for the whole network (Han et al. 2015 prune so; as a drop: DSR, Mostafa & Wang 2019).
    "global_magnitude": Drop(magnitude, over_all=True),
}

# One criterion, or two that grow one after the other, the second one the ``random_share``.
GROW: dict[str, tuple[Criterion, ...]] = {
    "gradient": (gradient,),
    "random": (random,),
    "momentum": (momentum,),
    # The reference code of NeuroTrails has this mixture as "mix_growth".
    "gradient_random": (gradient, random),
}

REGROW = ("allow", "forbid")
REDISTRIBUTE = ("none", "gradient", "momentum")
