"""The README of a checkpoint: what the model is, how it is loaded, what was measured, whom to cite."""

import os
import re
from collections.abc import Mapping, Sequence

from huggingface_hub import EvalResult, ModelCardData
from torch import Tensor
from transformers import PreTrainedModel

from .masks import count_active

PIPELINES = {"AutoModelForCausalLM": "text-generation", "AutoModelForImageClassification": "image-classification"}
# What loads the inputs' reader, in code for the card.
READERS = {
    "text-generation": 'tokenizer = AutoTokenizer.from_pretrained("…", trust_remote_code=True)',
    "image-classification": 'processor = AutoImageProcessor.from_pretrained("…")',
}
# How the card that Transformers writes, where there is none, begins its description.
GENERIC = "This is the model card of a 🤗 transformers model that has been pushed on the Hub."

CITATION = """\
@article{grooten2025neurotrails,
  title   = {NeuroTrails: Training with Dynamic Sparse Heads as the Key to Effective Ensembling},
  author  = {Grooten, Bram and Hasanov, Farid and Zhang, Chenxiang and Xiao, Qiao and Wu, Boqian and Atashgahi, Zahra
             and Sokar, Ghada and Liu, Shiwei and Yin, Lu and Mocanu, Elena and Pechenizkiy, Mykola and
             Mocanu, Decebal Constantin},
  journal = {arXiv preprint arXiv:2505.17909},
  year    = {2025}
}"""


def model_card(
    model: PreTrainedModel, density: float | None = None, about: str = "", results: Sequence[EvalResult] = ()
) -> str:
    """The text of a card, with the front matter that the hub reads.

    Args:
        model: of several heads.
        density: of the masked weights.
        about: Markdown on where the model comes from and what was measured.
        results: for the hub's index of models.
    """
    config = model.config
    auto = type(model)._auto_class or "AutoModel"
    pipeline = PIPELINES.get(auto)
    family = config.stock_class.model_type
    sparsity = "No weight carries a mask."
    if config.masked_modules:
        share = "" if density is None else f"Density of the masked weights: {density:.3f}. "
        sparsity = (
            f"{share}The masks lie in the file beside the weights (`weight_mask`, one bit per\n"
            "weight). Weights outside them are exact zeros and are computed like any other."
        )
    front = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["neurotrails", "ensemble", *(["sparse"] if config.masked_modules else [])],
        base_model=_on_the_hub(config._name_or_path),
        model_name=f"NeuroTrails {family}" if results else None,
        eval_results=list(results) or None,
    )
    lines = [f'model = {auto}.from_pretrained("…", trust_remote_code=True)', *filter(None, [READERS.get(pipeline)])]
    names = ", ".join(line.partition(" = ")[2].partition(".")[0] for line in lines)
    example = "\n".join([f"from transformers import {names}", "", *lines])
    middle = f"{about.strip()}\n\n" if about else ""
    return f"""---
{front.to_yaml()}
---
# NeuroTrails {family}

A {family} model of {config.topology}
(NeuroTrails, [arXiv 2505.17909](https://arxiv.org/abs/2505.17909)). Its prediction is that
of the ensemble of its heads. {sparsity}

{middle}## Load it

With the package nt_hf installed, `import nt_hf` and leave `trust_remote_code` out. Without it, the code that comes with
the checkpoint is used:

```python
{example}
```

`heads=[0]` loads one head, `output_uncertainty=True` in a call returns how far the heads disagree.

## Cite

```bibtex
{CITATION}
```
"""


def density_of(tensors: Mapping[str, Tensor]) -> float | None:
    """Active weights over all weights of the tensors with a mask in a state dict.

    ``None`` if no tensor has one, or if masks are offloaded.
    """
    masks = {name.removesuffix("_mask"): tensor for name, tensor in tensors.items() if name.endswith("weight_mask")}
    if any(mask.is_meta for mask in masks.values()):
        return None
    total = sum(tensors[name].numel() for name in masks if name in tensors)
    return sum(count_active(mask) for name, mask in masks.items() if name in tensors) / total if total else None


def _on_the_hub(name: str) -> str | None:
    """The id of a model on the hub, unless the name is a directory's or is none."""
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name or "") and not os.path.isdir(name) else None
