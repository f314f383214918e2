"""A trained model with three heads, for other programs: llama.cpp, Transformers' quantisers.

The converter to GGUF is no part of a package: ``LLAMA_CPP`` is a folder that has llama.cpp's ``convert_hf_to_gguf.py``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import smollm
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nt_hf import NeuroTrailsForCausalLM

pytestmark = pytest.mark.slow

PROMPTS = ("The capital of France is", "Once upon a time, there was")
CHAT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def many() -> PreTrainedModel:
    """SmolLM2 with three heads that differ by noise, or one trail would pass for another."""
    shape = {"num_ensemble_heads": 3, "blocks_in_head": 4}
    model = NeuroTrailsForCausalLM.from_stock(smollm.folder(), gguf_file=smollm.FILE, **shape)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.model.heads[1:].parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.3 * parameter.data.std(correction=0) * noise
    return model.eval()


@pytest.fixture(scope="module")
def trail(many, tmp_path_factory) -> Path:
    """A directory of the second trail and its tokenizer."""
    path = tmp_path_factory.mktemp("trail")
    many.extract_trail(1).save_pretrained(path)
    smollm.tokenizer().save_pretrained(path)
    return path


def greedy(model: PreTrainedModel, prompt: str, new: int = 24, **options) -> str:
    tokenizer = smollm.tokenizer()
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=new, do_sample=False, **options)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_trail_is_a_stock_model_for_everybody(many, trail):
    stock = AutoModelForCausalLM.from_pretrained(trail)
    assert type(stock).__name__ == "LlamaForCausalLM" and "quantization_config" not in stock.config.to_dict()
    assert AutoTokenizer.from_pretrained(trail).apply_chat_template(CHAT, tokenize=False)
    texts = [greedy(many, PROMPTS[1], active_heads=[head]) for head in range(3)]
    assert greedy(stock, PROMPTS[1]) == texts[1] and len(set(texts)) == 3


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_llama_cpp_writes_what_the_trail_writes(trail, kind, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    converter = Path(os.environ.get("LLAMA_CPP", "."), "convert_hf_to_gguf.py")
    if not converter.is_file():
        pytest.skip("LLAMA_CPP=<a folder of llama.cpp> is not set")
    file = tmp_path / "trail.gguf"
    subprocess.run([sys.executable, converter, trail, "--outtype", kind, "--outfile", file], check=True)
    model = llama_cpp.Llama(str(file), n_ctx=256, n_threads=1, verbose=False)
    stock = AutoModelForCausalLM.from_pretrained(trail, dtype=torch.float32 if kind == "f32" else torch.bfloat16)
    chat = smollm.tokenizer().apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    for prompt in (*PROMPTS, chat):
        assert model(prompt, max_tokens=24, temperature=0)["choices"][0]["text"] == greedy(stock, prompt), prompt
    answer = model.create_chat_completion(CHAT, max_tokens=24, temperature=0)["choices"][0]["message"]["content"]
    assert answer == greedy(stock, chat)
    model.close()
