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
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from nt_hf import NeuroTrailsForCausalLM

pytestmark = pytest.mark.slow

PROMPTS = ("The capital of France is", "Once upon a time, there was")
TEXT = (
    "The water of the sea is salt because rivers carry minerals into it, and because the sun takes the water away but "
    "leaves the salt. Lakes that no river leaves are often salt for the same reason."
)
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


@pytest.mark.parametrize("kind", ["torchao 8", "bitsandbytes 8", "bitsandbytes 4"])
def test_a_quantised_model_has_the_trails_quantised(many, trail, kind, tmp_path):
    """What a quantiser costs a head is what it costs the stock model of that trail."""
    pytest.importorskip("torchao")
    pytest.importorskip("bitsandbytes")
    from torchao.quantization import Int8WeightOnlyConfig

    make = {
        "torchao 8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
        "bitsandbytes 8": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "bitsandbytes 4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    }[kind]
    many.save_pretrained(tmp_path)
    quantised = NeuroTrailsForCausalLM.from_pretrained(tmp_path, quantization_config=make())
    stock = AutoModelForCausalLM.from_pretrained(trail, quantization_config=make())
    inputs = smollm.tokenizer()(TEXT, return_tensors="pt")
    with torch.no_grad():
        plain, one, other = (m(**inputs, **options).logits.log_softmax(-1) for m, options in (
            (many, {"active_heads": [1]}), (quantised, {"active_heads": [1]}), (stock, {}),
        ))  # fmt: skip
    lost = (plain.exp() * (plain - one)).sum(-1).mean().item()
    print(f"{kind}: {lost:.4f} nats a token lost by quantisation")
    assert lost > 1e-6  # or nothing was quantised
    torch.testing.assert_close(one, other, atol=1e-3, rtol=0)
    assert greedy(quantised, PROMPTS[1], active_heads=[1]) == greedy(stock, PROMPTS[1])
    assert greedy(quantised, PROMPTS[1])


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
