"""Every example runs, in this process and for a few steps."""

import json
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from conftest import script, trained
from transformers import AutoModelForCausalLM

from nt_hf import NeuroTrailsLlamaForCausalLM, check_masks
from nt_hf.sparsity.criteria import DROP

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small trained model with a tokenizer of bytes."""
    directory = tmp_path_factory.mktemp("checkpoint")
    trained("neurotrails").save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def test_every_example_is_short_and_tested():
    tests = Path(__file__).read_text()
    for name in EXAMPLES:
        assert f'"examples/{name}"' in tests, name
        assert len((ROOT / "examples" / name).read_text().splitlines()) <= 60, name


def test_quickstart(tmp_path, capsys):
    script("examples/quickstart.py").main(["--steps", "10", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "step 10: loss" in printed and "The best way to" in printed
    assert not check_masks(NeuroTrailsLlamaForCausalLM.from_pretrained(tmp_path))


def test_sparsify_resnet(capsys):
    assert script("examples/sparsify_resnet.py").main(["--steps", "60"]) > 0.9
    assert "weights outside a mask that are not zero: 0" in capsys.readouterr().out


def test_rigl_with_trainer(tmp_path, capsys):
    trainer = script("examples/rigl_with_trainer.py").main(["--steps", "12", "--output", str(tmp_path)])
    assert not check_masks(trainer.model)
    assert any(record.get("sparsity/grown", 0) > 0 for record in trainer.state.log_history)
    assert "0.5000" in capsys.readouterr().out


def test_from_stock(tmp_path, capsys):
    model = script("examples/from_stock.py").main(["--steps", "10", "--output", str(tmp_path)])
    assert "step 10: losses of the heads" in capsys.readouterr().out
    first, second = (model.extract_trail(head).state_dict() for head in (0, 1))
    differing = {name for name in first if not torch.equal(first[name], second[name])}
    backbone = "model.layers.0.mlp.up_proj.weight"
    assert backbone not in differing and "model.layers.2.mlp.up_proj.weight" in differing
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "trail-0")
    assert stock.config.model_type == "qwen3"
    assert torch.equal(stock.state_dict()[backbone], first[backbone])


def test_from_stock_starts_from_a_directory(checkpoint, tmp_path, capsys):
    trained("neurotrails").extract_trail(0).save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    arguments = ["--model", str(tmp_path / "llama"), "--steps", "10", "--output", str(tmp_path / "out")]
    script("examples/from_stock.py").main(arguments)
    assert "step 10" in capsys.readouterr().out


def test_image_classifier(tmp_path, capsys):
    model = script("examples/image_classifier.py").main(["--steps", "50", "--output", str(tmp_path)])
    assert "step 50: losses of the heads" in capsys.readouterr().out
    assert not check_masks(model) and (tmp_path / "preprocessor_config.json").is_file()


def test_custom_criterion(monkeypatch, capsys):
    monkeypatch.delitem(DROP, "noisy_magnitude", raising=False)
    assert script("examples/custom_criterion.py").main() < 0.5
    assert DROP.pop("noisy_magnitude") and "times as many weights" in capsys.readouterr().out


def test_generate(checkpoint, monkeypatch, capsys):
    arguments = ["generate.py", "--model", str(checkpoint), "--prompt", "The best way", "--max_new_tokens", "4"]
    monkeypatch.setattr("sys.argv", arguments)
    script("examples/generate.py").main()
    assert capsys.readouterr().out.startswith("> The best way")


def test_uncertainty(checkpoint, capsys):
    arguments = ["--model", str(checkpoint), "--prompt", "The best way to", "--max_new_tokens", "6"]
    script("examples/uncertainty.py").main(arguments)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["token", "entropy", "mutual", "information", "disagreement"] and len(rows) == 6
    for row in rows:
        entropy, information, disagreement = map(float, row.split()[-3:])
        assert 0 <= information < entropy and disagreement in (0, 0.67, 1)


@pytest.fixture(scope="module")
def served(checkpoint) -> str:
    """The address of a server of the checkpoint, whose tokenizer has a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('roles: accepted\\nis user') }}"
        "{% endif %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} {% endif %}"
    )
    tokenizer.save_pretrained(checkpoint)
    server = script("examples/serve.py").server(str(checkpoint), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def ask(url: str, request=None) -> tuple[int, dict]:
    data = None if request is None else request if isinstance(request, bytes) else json.dumps(request).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_serve(served, checkpoint):
    assert ask(f"{served}/models")[1]["data"][0]["id"] == str(checkpoint)
    request = {"prompt": "The best way to", "max_tokens": 6, "temperature": 0, "logprobs": 1}
    status, answer = ask(f"{served}/completions", request)
    (choice,) = answer["choices"]
    model, tokenizer = trained("neurotrails"), byte_tokenizer()
    inputs = tokenizer("The best way to", return_tensors="pt")
    expected = model.generate(
        **inputs, max_new_tokens=6, do_sample=False, output_uncertainty=True, return_dict_in_generate=True
    )
    new = expected.sequences[0, inputs["input_ids"].shape[1] :]
    assert status == 200 and choice["text"] == tokenizer.decode(new) and choice["finish_reason"] == "length"
    for name in ("mutual_information", "predictive_entropy"):
        assert choice["uncertainty"][name] == pytest.approx(expected.uncertainty[name][0].tolist(), rel=1e-4), name
    logprobs = model(expected.sequences).logits.log_softmax(-1)[0, -7:-1].gather(1, new[:, None])[:, 0]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(logprobs.tolist(), abs=1e-4)
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    # The template makes the same prompt, but for a space at its end.
    chat = {"messages": [{"role": "user", "content": "The best way"}], "max_tokens": 2}
    status, answer = ask(f"{served}/chat/completions", chat)
    assert status == 200 and len(answer["choices"][0]["logprobs"]["content"]) == 2
    assert answer["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.parametrize(
    "path, request_, named",
    [
        ("completions", {"prompt": 3}, "prompt=3"),
        ("completions", {"prompt": ""}, "prompt=''"),
        ("completions", {"prompt": ["a", "b"]}, "prompt=['a', 'b']"),
        ("completions", [], "list"),
        ("completions", {"messages": []}, "prompt=None"),
        ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens=0"),
        ("completions", {"prompt": "a", "max_tokens": True}, "max_tokens=True"),
        ("completions", {"prompt": "a", "temperature": -1}, "temperature=-1"),
        ("completions", {"prompt": "a", "temperature": float("nan")}, "temperature=nan"),
        ("completions", {"prompt": "a", "stream": True}, "stream=True"),
        ("completions", b"{", "Expecting"),
        ("chat/completions", {"prompt": "a"}, "messages=None"),
        ("chat/completions", {"messages": [{"role": "robot", "content": "a"}]}, "roles: accepted is user"),
        ("other", {"prompt": "a"}, "/v1/other"),
    ],
)
def test_serve_answers_bad_requests_with_one_line(served, path, request_, named):
    status, answer = ask(f"{served}/{path}", request_)
    assert status == 400 and named in answer["error"]["message"] and "\n" not in answer["error"]["message"]


def test_serve_speaks_with_the_client_of_openai(served, checkpoint):
    openai = pytest.importorskip("openai", reason="pip install openai")
    client = openai.OpenAI(base_url=served, api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == [str(checkpoint)]
    options = {"model": str(checkpoint), "max_tokens": 5, "temperature": 0}
    (choice,) = client.completions.create(prompt="The best way to", **options).choices
    assert len(choice.logprobs.token_logprobs) == len(choice.uncertainty["mutual_information"]) == 5
    messages = [{"role": "user", "content": "The best way to"}]
    (choice,) = client.chat.completions.create(messages=messages, logprobs=True, **options).choices
    assert len(choice.message.content) == 5 and choice.logprobs.content[0].logprob <= 0
    assert all(value >= 0 for value in choice.uncertainty["predictive_entropy"])
    with pytest.raises(openai.BadRequestError, match="stream=True: accepted are"):
        client.completions.create(prompt="a", stream=True, **options)
