"""What first masks leave of a trained model: SmolLM2-135M on C4. ``pytest -s -m slow`` prints the figures."""

import itertools
import math
import resource
import time

import pytest
import smollm
import torch

from nt_hf import SparsityConfig, draw_masks
from nt_hf.data.sources import read_texts

ROWS, LENGTH = 40, 256
EXCLUDE = ["model.embed_tokens.*", "lm_head.*"]


def rows(source: str, count: int) -> torch.Tensor:
    """The first tokens of a source, documents one after another, ``[count, LENGTH]``."""
    tokenizer = smollm.tokenizer()
    ids = (tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in read_texts(source))
    return torch.tensor(list(itertools.islice(itertools.chain.from_iterable(ids), count * LENGTH))).view(count, LENGTH)


@torch.no_grad()
def perplexity(model: torch.nn.Module) -> float:
    losses = [
        float(model(part, labels=part, use_cache=False).loss) for part in rows("sample:validation", ROWS).split(8)
    ]
    return math.exp(sum(losses) / len(losses))


def peak_memory() -> float:
    """Of this process so far, in GB; that of one test alone if no other runs in it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


@pytest.fixture(scope="module")
def dense() -> float:
    return perplexity(smollm.stock_model().eval())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "density", "calibration_rows", "most"),
    [
        ("magnitude", 0.5, 0, 20),
        ("wanda", 0.5, 64, 2.3),
        ("sparsegpt", 0.5, 64, 1.75),
        ("sparsegpt", 0.5, 192, 1.65),
        ("sparsegpt", 0.7, 64, 1.15),
    ],
)
def test_perplexity_after_pruning_at_once(dense, method, density, calibration_rows, most):
    model = smollm.stock_model().eval()
    parts = rows("sample:train", calibration_rows).split(8) if calibration_rows else ()
    batches = [{"input_ids": part, "use_cache": False} for part in parts]
    config = SparsityConfig(density=density, distribution="uniform", initial_masks=method, exclude=EXCLUDE)
    memory, seconds = peak_memory(), time.process_time()
    draw_masks(model, config, batches=batches)
    memory, seconds = (memory, peak_memory()), time.process_time() - seconds
    ratio = perplexity(model) / dense
    print(f"{method} at {density}, {calibration_rows} rows: {ratio:.3f} of the dense perplexity {dense:.2f}")
    print(f"{seconds:.0f} s of CPU time")
    print("peak memory of this process before and after: {:.2f} and {:.2f} GB".format(*memory))
    assert ratio < most
