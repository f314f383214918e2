"""Sparse multi-head LLMs for Hugging Face Transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ._version import __version__
from .configuration_neurotrails_llama import NeuroTrailsLlamaConfig
from .masks import apply_masks, check_masks, densify, freeze_topology
from .modeling_neurotrails_llama import (
    NeuroTrailsCausalLMOutput,
    NeuroTrailsLlamaForCausalLM,
    NeuroTrailsLlamaModel,
    Uncertainty,
)
from .sparsifier import Sparsifier, SparsityConfig, draw_masks
from .trainer_callback import SparsityCallback

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
