"""What servers and exporters ask of a model: stop strings, plain configurations, ``torch.export``, ONNX."""

import json
import re
import time
import urllib.request

import pytest
import torch
import transformers
from byte_tokenizer import byte_tokenizer
from conftest import ROOT, slow, token_ids
from transformers import LlamaForCausalLM

from nt_hf import NeuroTrailsForCausalLM, NeuroTrailsLlamaForCausalLM
from nt_hf.models.lm_heads import LMHead

IDS = token_ids()[5000 : 5000 + 2 * 24].view(2, 24).clone()
OTHER_SHAPE = token_ids()[7000 : 7000 + 3 * 40].view(3, 40).clone()
SIZES = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")},)


class Exported(torch.nn.Module):
    """As in docs/serve.md: what an exported program takes and returns is tensors."""

    def __init__(self, model, form):
        super().__init__()
        self.model, self.form = model, form

    def forward(self, input_ids):
        if self.form != "heads":
            return (self.model(input_ids, use_cache=False).logits,)
        output = self.model(input_ids, use_cache=False, output_head_logits=True, output_uncertainty=True)
        return output.logits, output.head_logits, output.uncertainty.mutual_information


def exported(model, form):
    return Exported(model.extract_trail(1) if form == "trail" else model, form).eval()


@pytest.mark.parametrize("options", [{}, {"trail_draft": 0}, {"output_uncertainty": True}], ids=str)
def test_generation_stops_at_a_text(model, options):
    tokenizer = byte_tokenizer()
    inputs = tokenizer("The best way to", return_tensors="pt")
    options |= {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True}
    plain = tokenizer.decode(model.generate(**inputs, **options).sequences[0])
    stop = plain[-6:-3]
    output = model.generate(**inputs, **options, stop_strings=[stop], tokenizer=tokenizer)
    text = tokenizer.decode(output.sequences[0])
    assert text == plain[: plain.index(stop, len("The best way to")) + len(stop)]


def test_how_the_stock_model_was_stored_is_not_kept(model, tmp_path):
    stock = model.extract_trail(0)
    stock.config.quantization_config = {"quant_method": "gguf", "gguf_file": "a.gguf", "dequantize": False}
    many = NeuroTrailsForCausalLM.from_stock(stock, num_ensemble_heads=2)
    other = model.extract_trail(1)
    for made in (many, many.extract_trail(0), NeuroTrailsForCausalLM.from_stocks([stock, other])):
        made.save_pretrained(tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("form", [slow("trail"), slow("ensemble"), "heads"])
def test_torch_export_takes_other_shapes(model, form):
    program = exported(model, form)
    with torch.no_grad():
        made = torch.export.export(program, (IDS,), dynamic_shapes=SIZES, strict=False).module()
        for one, other in zip(made(OTHER_SHAPE), program(OTHER_SHAPE), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["trail", "ensemble", "heads"])
def test_onnx_runtime_gives_the_same(model, form, tmp_path):
    pytest.importorskip("onnxscript", reason="pip install onnxscript onnxruntime")
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnxscript onnxruntime")
    program = exported(model, form)
    options = {"dynamo": True, "dynamic_shapes": SIZES, "input_names": ["input_ids"], "verbose": False}
    with torch.no_grad():
        torch.onnx.export(program, (IDS,), **options).save(tmp_path / "model.onnx")
        expected = program(OTHER_SHAPE)
    outputs = runtime.InferenceSession(tmp_path / "model.onnx").run(None, {"input_ids": OTHER_SHAPE.numpy()})
    for one, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(one), other, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_the_page_runs(model, tmp_path, monkeypatch):
    for package in ("torchao", "bitsandbytes", "onnxscript"):
        pytest.importorskip(package, reason="installed by make test-peers")
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("runs/demo/checkpoint-1400")
    byte_tokenizer().save_pretrained("runs/demo/checkpoint-1400")
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/serve.md").read_text(), re.DOTALL | re.MULTILINE):
        exec(block, names)
    assert isinstance(NeuroTrailsForCausalLM.from_pretrained("runs/quantised").lm_heads[0], LMHead)
    assert LlamaForCausalLM.from_pretrained("runs/trail") and (tmp_path / "runs/scores.onnx").is_file()
    for one, other in zip(names["program"].module()(OTHER_SHAPE), names["scores"](OTHER_SHAPE), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_transformers_serve_takes_the_ensemble(model, tmp_path, monkeypatch):
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason="pip install 'transformers[serving]'")
    from transformers.cli.serve import Serve

    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    # Its ``getattr(transformers, architecture)`` knows the stock classes only: see docs/serve.md.
    monkeypatch.setattr(transformers, "NeuroTrailsLlamaForCausalLM", NeuroTrailsLlamaForCausalLM, raising=False)
    serving = Serve(str(tmp_path), device="cpu", dtype="float32", port=8753, non_blocking=True)
    try:
        while not serving.server.started:
            time.sleep(0.1)
        body = {"model": str(tmp_path), "prompt": "The best way to", "max_tokens": 8, "temperature": 0}
        address = "http://localhost:8753/v1/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = json.load(answer)["choices"][0]["text"]
    finally:
        serving.server.should_exit = True
        serving._thread.join()
    inputs = byte_tokenizer()("The best way to", return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert text == byte_tokenizer().decode(new)
