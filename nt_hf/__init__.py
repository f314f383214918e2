"""Sparse multi-head LLMs for Hugging Face Transformers."""

import os

# Waiting OpenMP threads of GNU's library give up spinning early: beside another busy process they would slow each other
# down several times over. It is read when torch is loaded, so programs import this package first.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from ._version import __version__
from .models.auto import FAMILIES, NeuroTrailsForCausalLM, class_of_family, register
from .models.ensemble import NeuroTrailsCausalLMOutput, Uncertainty
from .models.masks import apply_masks, check_masks, densify, freeze_topology
from .sparsity.config import SparsityConfig
from .sparsity.first_masks import draw_masks
from .sparsity.sparsifier import Sparsifier
from .sparsity.trainer_callback import SparsityCallback

for _family in FAMILIES:
    class_of_family(_family)


def __getattr__(name: str):
    # NeuroTrailsQwen3ForCausalLM, NeuroTrailsQwen3Config and the like, of any family.
    from .models import configuration_neurotrails, modeling_neurotrails

    module = configuration_neurotrails if name.endswith("Config") else modeling_neurotrails
    try:
        made = getattr(module, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    if name.startswith(configuration_neurotrails.PREFIX) and hasattr(made, "stock_class"):
        register(made if name.endswith("Config") else made.config_class)
        return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "NeuroTrailsCausalLMOutput",
    "NeuroTrailsForCausalLM",
    "NeuroTrailsLlamaConfig",
    "NeuroTrailsLlamaForCausalLM",
    "NeuroTrailsLlamaModel",
    "Sparsifier",
    "SparsityCallback",
    "SparsityConfig",
    "Uncertainty",
    "__version__",
    "apply_masks",
    "check_masks",
    "densify",
    "draw_masks",
    "freeze_topology",
]
