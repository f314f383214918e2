"""Small models trained on real text: random weights hide errors, because their predictions hardly depend on them."""

import copy
import functools
import gc
import gzip
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from nt_hf import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM, freeze_topology
from nt_hf.data.tokenizers import load_tokenizer
from nt_hf.models.masks import masked_modules, set_mask

torch.set_num_threads(1)  # The models are too small for more.

ROOT = Path(__file__).parents[1]
TEXT = ROOT / "nt_hf" / "data" / "sample" / "c4-heldout-330.jsonl.gz"
PAD, BOS, EOS, OFFSET = 0, 1, 2, 4

# An input width of 36 is no multiple of 8, so that the masks' padding bits matter.
SIZES = {
    "vocab_size": 260,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
BLOCKS = ["model.layers.*", "model.heads.*"]
VARIANTS = {
    "neurotrails": {"blocks_in_head": 2, "masked_modules": BLOCKS},
    "treenet": {"blocks_in_head": 1},
    "dense": {"num_ensemble_heads": 1},
    "full_ensemble": {
        "num_ensemble_heads": 2,
        "blocks_in_head": 3,
        "share_embedding": False,
        "masked_modules": ["*", "!lm_heads.0.*"],
    },
    "no_backbone": {"blocks_in_head": 3, "masked_modules": ["*.layers.*"]},
    "only_lm_heads": {"blocks_in_head": 0, "masked_modules": ["*"]},
    "tied": {"blocks_in_head": 2, "tie_word_embeddings": True, "masked_modules": ["*"]},
    "tied_full_ensemble": {
        "num_ensemble_heads": 2,
        "blocks_in_head": 3,
        "share_embedding": False,
        "tie_word_embeddings": True,
    },
}


def pytest_collection_finish() -> None:
    """Keeps what is imported out of garbage collections: Trainer asks for one a run, which took as long as the run."""
    gc.freeze()


def script(path: str) -> types.ModuleType:
    """A program of the repository as a module: its ``main`` runs it in this process."""
    spec = importlib.util.spec_from_file_location(f"script_{Path(path).stem}", ROOT / path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def token_ids() -> torch.Tensor:
    """The sample text's bytes as token ids, ``[n]``."""
    with gzip.open(TEXT, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(40))]
    return torch.tensor(list("\n".join(texts).encode())) + OFFSET


def draw_masks(model: torch.nn.Module, density: float = 0.5, seed: int = 0) -> None:
    """Gives every masked weight a random mask."""
    generator = torch.Generator().manual_seed(seed)
    for module in masked_modules(model).values():
        set_mask(module, torch.rand(module.weight.shape, generator=generator) < density)


def slow(*values) -> object:
    """Values of a parametrised test that only ``make test-slow`` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


@functools.cache
def trained(variant: str, steps: int = 50) -> NeuroTrailsLlamaForCausalLM:
    """A small model of one of ``VARIANTS``, trained with masks of density 0.5."""
    torch.manual_seed(0)
    model = NeuroTrailsLlamaForCausalLM(NeuroTrailsLlamaConfig(**SIZES, **VARIANTS[variant]))
    draw_masks(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    freeze_topology(model, optimizer)
    for step in range(steps):
        starts = torch.randint(len(token_ids()) - 48, (6,), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([token_ids()[s : s + 48] for s in starts.tolist()])
        optimizer.zero_grad()
        model(batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
    return model.zero_grad() or model.eval()


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> Path:
    """The configuration file of a tiny run of the recipe."""
    from recipe_runs import write_config

    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """The sample's tokenizer, which is T5's."""
    return load_tokenizer("sample")


@pytest.fixture
def model(request) -> NeuroTrailsLlamaForCausalLM:
    """A copy of a trained model; ``parametrize("model", [...], indirect=True)`` chooses the variant."""
    return copy.deepcopy(trained(getattr(request, "param", "neurotrails")))


@pytest.fixture
def prompts() -> dict[str, torch.Tensor]:
    """Three real prompts of unequal lengths, padded on the left."""
    lengths, width = (5, 16, 9), 16
    ids, mask = torch.full((3, width), PAD), torch.zeros(3, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, -length:] = token_ids()[1000 * row : 1000 * row + length]
        mask[row, -length:] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three rows of text with labels, some of them ignored."""
    ids = token_ids()[5000 : 5000 + 3 * 40].view(3, 40).clone()
    labels = ids.clone()
    labels[0, :7] = labels[1, 20:] = -100
    return {"input_ids": ids, "labels": labels}
