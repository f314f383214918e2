"""First masks of a trained model: which weights it can do without, seen from what flows through it.

Blocks are pruned one after another, each on the output of the pruned ones before it; by SparseGPT, the layers within a
block, too, which make up for a part of what was changed before them. Memory holds the model, the hidden states of the
calibration batches, and what is known of the inputs of one block: for SparseGPT the inputs themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.masks import groups_of, is_transposed, parse_structure
from ..models.multi_head import MultiHeadMixin
from .block_replay import block_by_block
from .layer_inputs import Inputs, in_turn, look_at, original_inputs, weight_rows

Batches = Sequence[Mapping[str, Any]]

COLUMNS = 128  # that SparseGPT prunes between two updates of the columns behind them
DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to it, as in the paper
DRIFT = 0.5  # share of what was changed before it that a layer makes up for; 0.8 ruined SmolLM2-135M
OUTLIER = 5.0  # times the mean of a block's scores make an outlier: OWL's M
SPREAD = 0.08  # half of what OWL's densest and sparsest block differ by: its lambda


def check_prunable(
    modules: Mapping[str, nn.Module], blocks: Sequence[nn.Module], setting: str, structure: str = "unstructured"
) -> None:
    """Raises unless the inputs of all modules can be looked at block by block.

    Raises:
        ValueError: a module lies outside the blocks, or is neither linear nor a plain convolution; or a convolution is
            to be N:M by SparseGPT, which goes through its patches, where the inputs of a group are no neighbours.
    """
    needs_linear = setting == "initial_masks=sparsegpt" and parse_structure(structure) is not None
    within = {module for block in blocks for module in block.modules()}
    for name, module in modules.items():
        kind = type(module).__name__
        if module not in within:
            raise ValueError(f"{setting}: {name} lies outside the blocks; accepted is to exclude it")
        plain = isinstance(module, nn.Linear) or is_transposed(module)
        if not plain and not (isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"):
            raise ValueError(f"{setting}: {name} is of {kind}; accepted are linear layers and convolutions")
        if needs_linear and isinstance(module, nn.Conv2d):
            raise ValueError(f"{setting}: {name} is of {kind}; accepted with structure={structure} are linear layers")


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a multi-head model, or the longest list of modules of any other."""
    if isinstance(model, MultiHeadMixin):
        return model.blocks()
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(model).__name__}: accepted are models with a list of blocks, or with heads")
    return max(lists, key=len)


# -------------------------------------------------------------------------------------------------------- methods


def magnitude(module: nn.Module, kept: int, structure: str, inputs: Inputs | None) -> torch.Tensor:
    """The mask of the largest weights of a tensor, or of each group of a structure."""
    return largest(module.weight.detach().abs().float(), kept, structure, is_transposed(module))


def wanda(module: nn.Module, kept: int, structure: str, inputs: Inputs) -> torch.Tensor:
    """The mask of the largest ``|w| * norm of its input`` of each output unit (Wanda, Sun et al. 2024).

    Args:
        module: the layer.
        kept: weights to keep; what is left over of an equal share for all units goes to those with the largest scores.
        structure: within its groups scores compete, see [`groups_of`].
        inputs: second moments.

    Returns:
        A bool mask of the weight's shape.
    """
    scores = torch.empty_like(module.weight, dtype=torch.float32)
    weight_rows(module, scores).copy_(weight_rows(module).abs() * inputs.sums.sqrt())
    if structure != "unstructured":
        return largest(scores, kept, structure, is_transposed(module))
    rows = weight_rows(module, scores)
    order = rows.argsort(dim=1, descending=True, stable=True)
    each, left_over = divmod(kept, len(rows))
    mask = torch.zeros_like(scores, dtype=torch.bool)
    of_rows = weight_rows(module, mask)
    of_rows.scatter_(1, order[:, :each], True)
    if left_over:
        following = order[:, each]
        winners = rows.gather(1, following[:, None])[:, 0].argsort(descending=True, stable=True)[:left_over]
        of_rows[winners, following[winners]] = True
    return mask


def sparsegpt(module: nn.Module, kept: int, structure: str, inputs: Inputs) -> torch.Tensor:
    """A mask and new weights for which the layer's outputs change least (SparseGPT, Frantar & Alistarh 2023).

    Columns are pruned from left to right; the error of each is made up for by the columns to its right, as the inverse
    Hessian of the squared error of the outputs says. The weights within the mask get their new values in place.

    Args:
        module: the layer.
        kept: weights to keep.
        structure: "unstructured" weights compete within 128 columns, those of a structure within its groups.
        inputs: products.

    Returns:
        A bool mask of the weight's shape.
    """
    weights = weight_rows(module).float().clone()
    hessian = inputs.sums / inputs.count
    if inputs.crossed is not None:
        weights += DRIFT * drift(weights, inputs)
    unused = hessian.diagonal() == 0
    hessian.diagonal()[unused] = 1
    weights[:, unused] = 0
    hessian = hessian + torch.eye(len(hessian), device=hessian.device) * DAMPING * hessian.diagonal().mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    mask = torch.zeros_like(weights, dtype=torch.bool)
    for start in range(0, weights.shape[1], COLUMNS):
        stop = min(start + COLUMNS, weights.shape[1])
        errors = torch.zeros_like(weights[:, start:stop])
        choose = _chooser(module, weights, factor, mask, kept, structure, start, stop)
        for column in range(start, stop):
            choose(column)
            values, pivot = weights[:, column], factor[column, column]
            error = values.where(~mask[:, column], 0) / pivot
            weights[:, column:stop] -= error[:, None] * factor[column, column:stop]
            errors[:, column - start] = error
        weights[:, stop:] -= errors @ factor[start:stop, stop:]
    weights *= mask
    weight_rows(module).copy_(weights.view(weight_rows(module).shape))
    full = torch.zeros_like(module.weight, dtype=torch.bool)
    weight_rows(module, full).copy_(mask)
    return full


def drift(weights: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """The change of weights ``[out, in]`` that brings the outputs on the changed inputs nearest to the original ones.

    The inputs have changed because earlier blocks have. The change solves the least squares problem of the outputs, as
    in asymmetric calibration (GPTAQ, Li et al. 2025), with the damping of `sparsegpt`.
    """
    damped = inputs.sums + torch.eye(len(inputs.sums), device=weights.device) * (
        DAMPING * inputs.sums.diagonal().mean()
    )
    return torch.linalg.solve(damped.double(), (weights @ (inputs.crossed - inputs.sums)).T.double()).T.float()


def _chooser(
    module: nn.Module, weights: torch.Tensor, factor: torch.Tensor, mask: torch.Tensor, kept: int, structure: str,
    start: int, stop: int,
) -> Callable[[int], None]:  # fmt: skip
    """A function that sets the mask of a column, and of those that are chosen with it, before the column is pruned."""
    rows, columns = weights.shape
    sizes = parse_structure(structure)

    def scores(first: int, last: int) -> torch.Tensor:
        return (weights[:, first:last] / factor.diagonal()[first:last]).square()

    def share(total: int, column: int) -> int:
        """Of the weights kept, those before a column."""
        return round(total * column / columns)

    def choose(column: int) -> None:
        if sizes:
            length = sizes[1]
            if column % length == 0:
                count = kept * length // (rows * columns)
                best = scores(column, column + length).topk(count, dim=1).indices
                mask[:, column : column + length].scatter_(1, best, True)
        elif column == start:
            part = scores(start, stop)
            if structure == "constant_fan_in":
                each = share(kept // rows, stop) - share(kept // rows, start)
                mask[:, start:stop].scatter_(1, part.topk(each, dim=1).indices, True)
            else:
                best = part.flatten().topk(share(kept, stop) - share(kept, start)).indices
                mask[:, start:stop] = (
                    torch.zeros_like(part, dtype=torch.bool).flatten().index_fill_(0, best, True).view_as(part)
                )

    return choose


def largest(scores: torch.Tensor, kept: int, structure: str, transposed: bool) -> torch.Tensor:
    """The mask of the ``kept`` largest scores of a tensor, or of as many in each group of a structure."""
    scores = scores.contiguous()
    groups = groups_of(scores, structure, transposed)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    count = kept * groups.shape[-1] // scores.numel()
    groups_of(mask, structure, transposed).scatter_(-1, groups.topk(count, dim=-1).indices, True)
    return mask


@dataclass(frozen=True)
class Pruner:
    """A way to choose the first masks of a trained model.

    Attributes:
        mask: gives a layer's mask, from the layer, the number of weights to keep, the structure and its inputs.
        products: ``None`` where it needs no inputs, else whether all products or the second moments alone.
    """

    mask: Callable[[nn.Module, int, str, Inputs | None], torch.Tensor]
    products: bool | None = None


PRUNERS = {"magnitude": Pruner(magnitude), "wanda": Pruner(wanda, False), "sparsegpt": Pruner(sparsegpt, True)}


@torch.no_grad()
def prune(
    model: nn.Module, modules: Mapping[str, nn.Module], counts: Mapping[str, int], method: str, structure: str,
    batches: Batches,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The masks of a trained model; of "sparsegpt" the weights get new values, too.

    Args:
        model: with the modules.
        modules: layers by weight name.
        counts: weights that each keeps.
        method: a name of ``PRUNERS``.
        structure: of the masks.
        batches: keyword arguments of the model, to calibrate on.

    Raises:
        ValueError: see [`check_prunable`] and [`look_at`].
        NotImplementedError: see [`block_by_block`].
    """
    pruner = PRUNERS[method]
    if pruner.products is None:
        return {name: pruner.mask(module, counts[name], structure, None) for name, module in modules.items()}
    blocks = blocks_of(model)
    check_prunable(modules, blocks, f"initial_masks={method}", structure)
    masks: dict[str, torch.Tensor] = {}
    for run in block_by_block(model, blocks, batches):
        within = set(run.block.modules())
        here = {name: module for name, module in modules.items() if module in within}
        originals = original_inputs(run, here) if pruner.products else None
        groups = in_turn(run, here)
        for together in [[group] for group in groups] if pruner.products else [groups]:
            for name, known in look_at(run, together, products=pruner.products, originals=originals).items():
                masks[name] = pruner.mask(here[name], counts[name], structure, known)
                here[name].weight.mul_(masks[name])
    return masks


@torch.no_grad()
def owl_densities(
    model: nn.Module, modules: Mapping[str, nn.Module], density: float, batches: Batches
) -> dict[str, float]:
    """Densities by weight name, higher in blocks where more scores of [`wanda`] are outliers (OWL, Yin et al. 2024).

    All layers of a block have one density. Those of the blocks span 0.16, and their mean is ``density``.
    """
    blocks = blocks_of(model)
    check_prunable(modules, blocks, "distribution=owl")
    shares: dict[nn.Module, float] = {}
    for run in block_by_block(model, blocks, batches):
        within = set(run.block.modules())
        here = {name: module for name, module in modules.items() if module in within}
        inputs = look_at(run, in_turn(run, here), products=False)
        scores = [weight_rows(module).abs() * inputs[name].sums.sqrt() for name, module in here.items()]
        if scores:
            mean = sum(float(score.sum()) for score in scores) / sum(score.numel() for score in scores)
            outliers = sum(int((score > OUTLIER * mean).sum()) for score in scores)
            shares[run.block] = outliers / sum(score.numel() for score in scores)
    least, most = min(shares.values()), max(shares.values())
    moved = {block: 2 * SPREAD * (share - least) / ((most - least) or 1) for block, share in shares.items()}
    mean = sum(moved.values()) / len(moved)
    of_block = {module: density + moved[block] - mean for block in shares for module in block.modules()}
    return {name: min(1.0, max(density / 2, of_block[module])) for name, module in modules.items()}
