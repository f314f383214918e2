"""Sparse multi-head LLMs for Hugging Face Transformers."""

import os
from typing import TYPE_CHECKING

# Waiting OpenMP threads of GNU's library give up spinning early: beside another busy process they would slow each other
# down several times over. It is read when torch is loaded, so programs import this package first.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from ._version import __version__
from .models.auto import (
    FAMILIES,
    NeuroTrailsForCausalLM,
    NeuroTrailsForImageClassification,
    class_named,
    class_of_family,
)
from .models.ensemble import NeuroTrailsCausalLMOutput, Uncertainty
from .models.masks import apply_masks, check_masks, densify, freeze_topology
from .models.merging import distillation_loss, merge_heads, with_student
from .sparsity.config import SparsityConfig
from .sparsity.first_masks import draw_masks
from .sparsity.sparsifier import Sparsifier

if TYPE_CHECKING:
    from .sparsity.trainer_callback import SparsityCallback

for _family in FAMILIES:
    class_of_family(_family)


def __getattr__(name: str):
    if name == "SparsityCallback":  # takes Trainer's own imports, PEFT among them: only for those who train by Trainer
        from .sparsity.trainer_callback import SparsityCallback

        return SparsityCallback
    # NeuroTrailsQwen3ForCausalLM, NeuroTrailsQwen3Config and the like, of any family.
    if (made := class_named(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return made


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "NeuroTrailsCausalLMOutput",
    "NeuroTrailsForCausalLM",
    "NeuroTrailsForImageClassification",
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
    "distillation_loss",
    "draw_masks",
    "freeze_topology",
    "merge_heads",
    "with_student",
]
