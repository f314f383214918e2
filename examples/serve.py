"""Serves a checkpoint to OpenAI's clients, with how unsure the model was of each token. nt_hf need not be installed.

python examples/serve.py --model runs/demo/checkpoint-1400 --port 8000
"""

import argparse
import json
from wsgiref.simple_server import WSGIServer, make_server

from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = {"/v1/completions": ("prompt", str), "/v1/chat/completions": ("messages", list)}
ACCEPTED = "prompt (a text) or messages (a list), max_tokens from 1, temperature 0 or 0.01 to 2, model, logprobs"


def complete(model, tokenizer, path: str, request: dict) -> dict:
    """A choice as clients read it, and beside its ``logprobs`` measures of uncertainty, one value for each token."""
    (field, kind), most, heat = PROMPTS[path], request.get("max_tokens", 64), request.get("temperature", 1)
    right = {field: type(request.get(field)) is kind and request[field], "max_tokens": type(most) is int and most > 0}
    right["temperature"] = type(heat) in (int, float) and (heat == 0 or 0.01 <= heat <= 2)
    if wrong := [name for name in (field, *request) if not right.get(name, name in ("logprobs", "model"))]:
        raise ValueError(f"{wrong[0]}={request.get(wrong[0])!r}: accepted are {ACCEPTED}")
    encode, more = (tokenizer, {}) if kind is str else (tokenizer.apply_chat_template, {"add_generation_prompt": True})
    inputs = encode(request[field], return_tensors="pt", **more)
    options = {"do_sample": heat > 0, "temperature": float(heat or 1), "max_new_tokens": most, "output_logits": True}
    output = model.generate(**inputs, **options, output_uncertainty=True, return_dict_in_generate=True)
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    words, text = [tokenizer.decode([token]) for token in tokens], tokenizer.decode(tokens, skip_special_tokens=True)
    values = [step[0].float().log_softmax(-1)[token].item() for step, token in zip(output.logits, tokens)]
    content = [{"token": word, "logprob": value, "top_logprobs": []} for word, value in zip(words, values)]
    return {
        "index": 0, "text": text, "message": {"role": "assistant", "content": text},  # a client reads one of them
        "logprobs": {"tokens": words, "token_logprobs": values, "content": content},
        "uncertainty": {name: measure[0].tolist() for name, measure in output.uncertainty.items()},
        "finish_reason": "length" if len(tokens) == most else "stop",
    }  # fmt: skip


def server(model: str, port: int) -> WSGIServer:
    loaded = [kind.from_pretrained(model, trust_remote_code=True) for kind in (AutoModelForCausalLM, AutoTokenizer)]

    def answer(environ: dict, start_response) -> list[bytes]:
        status, content = "200 OK", {"object": "list", "data": [{"id": model, "object": "model"}]}
        try:
            if (path := environ["PATH_INFO"]) != "/v1/models":
                request = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
                content = {"model": model, "choices": [complete(*loaded, path, request)]}
        except Exception as error:  # templates and tokenizers have errors of their own
            status, content = "400 Bad Request", {"error": {"message": " ".join(f"{error}".split())}}
        start_response(status, [("Content-Type", "application/json")])
        return [json.dumps(content).encode()]

    return make_server("127.0.0.1", port, answer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint directory")
    parser.add_argument("--port", type=int, default=8000)
    server(**vars(parser.parse_args())).serve_forever()
