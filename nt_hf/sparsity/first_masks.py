"""The masks that a run begins with: random ones, those that data ask for, or a checkpoint's."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from weakref import WeakSet

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..checks import one_line
from ..models.masks import (
    attach_masks,
    canonical_name,
    check_structure,
    dense_parameters,
    group_count,
    is_transposed,
    maskable_modules,
    masked_modules,
    matches,
    packed_shape,
    parse_structure,
    set_mask,
    unpack_mask,
)
from .config import INITIAL_MASKS, SparsityConfig
from .densities import active_counts, allocate, structured_counts
from .pruning import PRUNERS, Batches, owl_densities, prune
from .saliency import SALIENCY, Loss
from .update import best_scores, random_mask

logger = logging.getLogger(__name__)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# The models whose dense parameters were spoken of.
_WARNED: WeakSet[nn.Module] = WeakSet()


def target_counts(model: nn.Module, config: SparsityConfig, density: float | None = None) -> dict[str, int]:
    """Number of active weights that ``config`` gives each masked tensor of ``model``, by weight name.

    Args:
        model: with masks, whatever they hold.
        config: density, distribution, structure.
        density: instead of ``config.density``, one on the way from ``config.density_start``.

    Raises:
        ValueError: a glob of ``densities`` fits no masked weight, they leave an impossible remainder, or the structure
            cannot have the density.
    """
    return _counts(masked_modules(model), config, config.density if density is None else density)


def _counts(
    modules: Mapping[str, nn.Module], config: SparsityConfig, density: float, uses: Mapping[str, int] | None = None
) -> dict[str, int]:
    """The same of some modules; ``uses`` is for the "flops" distribution, see [`weight_uses`]."""
    shapes = {name: tuple(module.weight.shape) for name, module in modules.items()}
    groups = {
        name: group_count(module.weight.shape, config.structure, is_transposed(module))
        for name, module in modules.items()
    }
    if sizes := parse_structure(config.structure):
        active, length = sizes
        if config.densities or abs(config.density - active / length) > 0.005:
            raise ValueError(
                f"density={config.density:g}, densities={config.densities}: accepted with structure="
                f"{config.structure} is density={active / length:.4g} without densities; exclude what is to stay dense"
            )
        active = active if density == config.density else max(active, round(density * length))
        return {name: count * active for name, count in groups.items()}
    fixed = _own_densities(config, shapes, density)
    convolutions = [name for name, module in modules.items() if isinstance(module, _CONVOLUTIONS)]
    if config.distribution == "flops" and uses is None:
        if convolutions:
            raise ValueError(
                f"distribution='flops': how often {convolutions[0]} is used is unknown; accepted is "
                "draw_masks(model, config, loss=...) without density_start, so that a batch tells"
            )
        uses = {name: 0 if isinstance(module, nn.Embedding) else 1 for name, module in modules.items()}
    counts = active_counts(shapes, density, config.distribution, fixed, uses)
    if config.structure != "unstructured":
        counts = structured_counts(counts, shapes, groups)
    if density > config.density:  # a tensor only loses weights on the way, also where groups have other densities
        counts = {
            name: max(counts[name], count) for name, count in _counts(modules, config, config.density, uses).items()
        }
    return counts


def _fitting(field: str, pattern: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    if fitting := [name for name in names if fnmatchcase(name, pattern)]:
        return fitting
    raise ValueError(
        f"{field}={pattern!r}: fits none of the {len(names)} weights that can carry a mask; "
        f"accepted are globs of names such as {', '.join(names[:3]) or 'none'}"
    )


def draw_masks(
    model: nn.Module, config: SparsityConfig, loss: Loss | None = None, batches: Batches | None = None
) -> None:
    """Gives a model its first masks, at the densities of ``config``, and zeros what they exclude.

    A model that already carries masks, such as one whose config lists ``masked_modules``, keeps the choice of masked
    weights; any other gets masks on every linear, embedding and convolution weight. ``config.exclude`` is taken off
    in both cases, and the result is noted in ``model.config.masked_modules`` and ``mask_structure`` where there are
    such fields, so that a checkpoint declares its masks. Call it before the optimizer is built. A dense ``config``
    attaches nothing. A warning names the parameters of two or more dimensions that cannot carry a mask.

    Args:
        model: any module.
        config: what is sparse and how sparse.
        loss: returns the scalar loss of one batch, such as ``lambda: model(**batch).loss``, the same on all processes.
            Saliency (``config.initial_masks`` "snip", "grasp") and the "flops" distribution of convolutions need it.
        batches: keyword arguments of its base model, without labels, the same on all processes, such as
            ``[{"input_ids": ids, "use_cache": False}, ...]``. Masks by "wanda" and "sparsegpt" and the distribution
            "owl" are made from what flows through the model. "sparsegpt" gives the weights that stay new values. If
            the batches fail on the way (an input is not finite, for example), earlier blocks are pruned already.

    Raises:
        ValueError: the model is sharded, it is trained and ``config.first_weights`` asks for a new one, a glob fits no
            weight, the group densities leave an impossible remainder, the structure cannot have the density, a loss or
            batches are needed, or the checkpoint's masks do not fit.
        TypeError: ``config`` is something else.
        NotImplementedError: the model's blocks cannot be run one after another, see [`block_by_block`].
    """
    if not isinstance(config, SparsityConfig):
        raise TypeError(f"config={config!r}: accepted is a SparsityConfig, such as SparsityConfig(density=0.5)")
    if not config.is_sparse and not masked_modules(model):
        return
    if sharded := [name for name, module in maskable_modules(model).items() if hasattr(module.weight, "to_local")]:
        raise ValueError(f"{sharded[0]}: is sharded; accepted is a model that is sharded when its masks are drawn")
    trained = getattr(getattr(model, "config", None), "_name_or_path", "")
    if trained and config.first_weights != "dense":
        raise ValueError(
            f"first_weights={config.first_weights!r}: accepted is dense for trained weights (the model's "
            f"config._name_or_path is {trained!r}; of a new model it is empty)"
        )
    # Shared weights by all of their names: excluding one by another than its owner's is no mistake. Neither is
    # excluding what cannot carry a mask; but no checkpoint needs to declare that.
    names = {canonical_name(name) for name, x in model.named_parameters(remove_duplicate=False) if x.dim() > 1}
    for pattern in config.exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            _fitting("exclude", pattern, maskable_modules(model))
    names -= set(dense_parameters(model))
    exclude = [glob for glob in config.exclude if any(fnmatchcase(name, glob) for name in names)]
    declared = getattr(getattr(model, "config", None), "masked_modules", None)
    patterns = [*(declared or masked_modules(model) or ["*"]), *(f"!{pattern}" for pattern in exclude)]
    warn_of_dense(model, config.exclude, patterns)
    before = masked_modules(model)
    attach_masks(model, patterns)
    modules = {name: module for name, module in masked_modules(model).items() if matches(name, patterns)}
    # The batch is to leave no trace, in the statistics of batch norms for example.
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if loss is not None else []
    try:
        masks = _first_masks(model, modules, config, loss, batches)
    except BaseException:
        for name in modules.keys() - before.keys():
            del modules[name].weight_mask
        raise
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)
    for name in before.keys() - modules.keys():
        del before[name].weight_mask
    if declared is not None:
        model.config.masked_modules = list(dict.fromkeys(patterns))
    if hasattr(getattr(model, "config", None), "mask_structure"):
        model.config.mask_structure = config.structure
    for name, mask in masks.items():
        if config.first_weights == "fan_in":
            scale_by_fan_in(modules[name], mask)
        set_mask(modules[name], mask)


@torch.no_grad()
def scale_by_fan_in(module: nn.Module, mask: torch.Tensor) -> None:
    """Multiplies the weights of each output unit by ``(inputs / active inputs) ** 0.5``, in place.

    Its output then varies as much as with all inputs, if these vary alike (Evci et al. 2022, arXiv 2010.03533). The
    inputs of a convolution's channel are those of its kernel; an embedding is a linear layer whose inputs are the
    tokens. A unit without active inputs stays.

    Args:
        module: a linear, embedding or convolution module.
        mask: bool, of its weight's shape.
    """
    units_last = is_transposed(module) or isinstance(module, nn.Embedding)
    inputs = (mask.T if units_last else mask).flatten(1)
    scale = (inputs.shape[1] / inputs.sum(1).clamp(min=1)).sqrt().to(module.weight)
    module.weight.mul_(scale if units_last else scale.view(-1, *[1] * (mask.dim() - 1)))


def warn_of_dense(model: nn.Module, exclude: Sequence[str], chosen: Sequence[str] = ("*",)) -> None:
    """Warns, once for each model, of parameters that were to be sparse and cannot carry a mask.

    Args:
        model: any module.
        exclude: globs of those that are to be dense.
        chosen: globs of those that are to be sparse, see [`matches`].
    """
    if not any(module in _WARNED for module in model.modules()):  # nor the same one wrapped
        _WARNED.add(model)
        dense = [n for n in dense_parameters(model) if matches(n, [*chosen, *(f"!{glob}" for glob in exclude)])]
        if dense:
            logger.warning(
                "these parameters stay dense, for only linear, embedding and convolution modules carry masks: %s",
                ", ".join(dict.fromkeys(re.sub(r"\d+", "*", name) for name in dense)),
            )


def _first_masks(
    model: nn.Module, modules: Mapping[str, nn.Module], config: SparsityConfig, loss: Loss | None,
    batches: Batches | None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The bool masks of all masked modules."""
    if config.initial_masks not in INITIAL_MASKS:
        return _masks_of_checkpoint(Path(config.initial_masks), modules, config.structure)
    if loss is None and config.initial_masks in SALIENCY:
        raise ValueError(f"initial_masks={config.initial_masks!r}: accepted is draw_masks(model, config, loss=...)")
    if not batches and config.needs_calibration:
        asks = "distribution='owl'" if config.distribution == "owl" else f"initial_masks={config.initial_masks!r}"
        raise ValueError(f"{asks}: accepted is draw_masks(model, config, batches=...)")
    uses = weight_uses(modules, loss) if loss is not None and config.distribution == "flops" else None
    start = config.density if config.density_start is None else config.density_start
    counts = _counts(modules, config, start, uses)
    if config.distribution == "owl" and parse_structure(config.structure) is None:  # N:M leaves no choice
        counts = _outlier_counts(model, modules, config, batches)
    if config.initial_masks in PRUNERS:
        return prune(model, modules, counts, config.initial_masks, config.structure, batches)
    if config.initial_masks == "random":
        if start < 1 and (trained := getattr(getattr(model, "config", None), "_name_or_path", "")):
            logger.warning(
                "random masks over the trained weights of %s: expect to lose what it has learned; "
                "initial_masks=sparsegpt, wanda or magnitude, or density_start=1, keep more of it", trained,
            )  # fmt: skip
        return {
            name: random_mask(
                module.weight.shape,
                counts[name],
                seed=config.seed,
                name=name,
                device=module.weight.device,
                structure=config.structure,
                transposed=is_transposed(module),
            )
            for name, module in modules.items()
        }
    weights = {name: module.weight for name, module in modules.items()}
    scores = SALIENCY[config.initial_masks](weights, loss)
    # All tensors compete, but those of a density of their own, or of a structure, which compete among themselves.
    alone = [name for name in modules if any(fnmatchcase(name, pattern) for pattern in config.densities)]
    alone = alone if config.structure == "unstructured" else list(modules)
    together = [name for name in modules if name not in alone]
    masks = {}
    for names in [[name] for name in alone] + [together] * bool(together):
        masks |= best_scores(
            {name: scores[name] for name in names},
            sum(counts[name] for name in names),
            seed=config.seed,
            structure=config.structure,
            transposed=is_transposed(modules[names[0]]),
        )
    empty = [name for name, mask in masks.items() if not mask.any()]
    if empty:
        logger.warning("%s leaves no active weight in %s", config.initial_masks, ", ".join(empty))
    return masks


def _outlier_counts(
    model: nn.Module, modules: Mapping[str, nn.Module], config: SparsityConfig, batches: Batches
) -> dict[str, int]:
    """Active weights of each tensor by OWL, exact in total; tensors with a density of their own keep it."""
    shapes = {name: tuple(module.weight.shape) for name, module in modules.items()}
    own = _own_densities(config, shapes, config.density)
    counts = active_counts(shapes, config.density, "uniform", own)
    free = {name: module for name, module in modules.items() if name not in own}
    if not free:
        return counts
    size = sum(module.weight.numel() for module in free.values())
    budget = sum(counts[name] for name in free)
    densities = owl_densities(model, free, budget / size, batches)
    shares = {name: densities[name] * module.weight.numel() for name, module in free.items()}
    counts |= allocate(budget, shares, {name: module.weight.numel() for name, module in free.items()})
    if config.structure == "unstructured":
        return counts
    groups = {
        name: group_count(module.weight.shape, config.structure, is_transposed(module))
        for name, module in modules.items()
    }
    return structured_counts(counts, shapes, groups)


def _own_densities(config: SparsityConfig, names: Iterable[str], density: float) -> dict[str, float]:
    """The densities that ``config.densities`` fixes, at a density on the way to the last."""
    fixed: dict[str, float] = {}
    for pattern, value in config.densities.items():
        value = max(value, density) if density > config.density else value
        fixed |= dict.fromkeys(_fitting("densities", pattern, names), value)
    return fixed


def _masks_of_checkpoint(path: Path, modules: Mapping[str, nn.Module], structure: str) -> dict[str, torch.Tensor]:
    """The masks that a checkpoint's safetensors files hold for these modules."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    packed = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                keys = [key for key in tensors.keys() if key.endswith("weight_mask")]  # noqa: SIM118, no mapping
                packed |= {canonical_name(key).removesuffix("_mask"): tensors.get_tensor(key) for key in keys}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"initial_masks={str(path)!r}: {file} is not safetensors ({one_line(error)})") from None
    masks = {}
    for name, module in modules.items():
        shape, expected = tuple(module.weight.shape), packed_shape(module.weight.shape)
        if name not in packed or tuple(packed[name].shape) != expected:
            problem = f"has the packed shape {list(packed[name].shape)}" if name in packed else "is missing"
            raise ValueError(f"initial_masks={str(path)!r}: the mask of {name} {problem}; accepted is {list(expected)}")
        masks[name] = unpack_mask(packed[name].to(module.weight.device), shape)
        try:
            check_structure(masks[name], structure, is_transposed(module))
        except ValueError as error:
            raise ValueError(f"initial_masks={str(path)!r}: {name}: {error}") from None
    return masks


@torch.no_grad()
def weight_uses(modules: Mapping[str, nn.Module], loss: Loss) -> dict[str, int]:
    """How often a forward pass multiplies by each weight of a module; 0 of an embedding, which only looks up.

    Args:
        modules: linear, embedding and convolution modules by weight name.
        loss: runs the forward pass.
    """
    uses = dict.fromkeys(modules, 0)

    def count(name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: object) -> None:
        if isinstance(module, _CONVOLUTIONS):
            uses[name] += output.numel() // module.out_channels
        elif not isinstance(module, nn.Embedding):
            uses[name] += inputs[0].numel() // inputs[0].shape[-1]

    hooks = [
        module.register_forward_hook(lambda *args, name=name: count(name, *args)) for name, module in modules.items()
    ]
    try:
        loss()
    finally:
        for hook in hooks:
            hook.remove()
    return uses
