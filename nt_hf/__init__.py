"""Sparse multi-head LLMs for Hugging Face Transformers."""

import os

# Waiting OpenMP threads of GNU's library give up spinning early: beside another busy process they would slow each other
# down several times over. It is read when torch is loaded, so programs import this package first.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ._version import __version__
from .models.configuration_neurotrails_llama import NeuroTrailsLlamaConfig
from .models.ensemble import NeuroTrailsCausalLMOutput, Uncertainty
from .models.masks import apply_masks, check_masks, densify, freeze_topology
from .models.modeling_neurotrails_llama import NeuroTrailsLlamaForCausalLM, NeuroTrailsLlamaModel
from .sparsity.config import SparsityConfig
from .sparsity.first_masks import draw_masks
from .sparsity.sparsifier import Sparsifier
from .sparsity.trainer_callback import SparsityCallback

AutoConfig.register(NeuroTrailsLlamaConfig.model_type, NeuroTrailsLlamaConfig)
AutoModel.register(NeuroTrailsLlamaConfig, NeuroTrailsLlamaModel)
AutoModelForCausalLM.register(NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM)

# Saved checkpoints carry the model's code, so that trust_remote_code=True loads them without this package.
NeuroTrailsLlamaConfig.register_for_auto_class()
NeuroTrailsLlamaModel.register_for_auto_class("AutoModel")
NeuroTrailsLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "NeuroTrailsCausalLMOutput",
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
