"""One trail, and the ensemble, beside llama.cpp and dense PyTorch on the same weights: tokens a second at batch 1.

    pip install gguf llama-cpp-python             # docs/serve.md says how, where there is no wheel
    python benchmarks/llama_cpp_peer.py           # row 7; with --width 1024 the smaller model

The model is that of benchmarks/sparse_inference.py. llama.cpp gets a trail in bf16, Q8_0 and Q4_0; its ensemble is
as many trails, one after another. The sides take turns on as many threads as PyTorch has.
"""

import argparse
import copy
import tempfile
from pathlib import Path

from nt_hf.inference import specialize

import numpy as np
import torch
from common import Figure, conditions, ratio, table, take_turns
from sparse_inference import DENSITY, NEW_TOKENS, PROMPT, ROUNDS, WIDTHS, decode, random_model
from transformers import LlamaForCausalLM

TYPES = {"bf16": None, "Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "Q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0"}


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """Writes a stock Llama in bf16, without a vocabulary, with the names and the order of rows that llama.cpp has."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = interleaved(tensor, config.head_dim)
        values = tensor.float().numpy()
        kind = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else gguf.GGMLQuantizationType.BF16
        writer.add_tensor(names.get_name(name, (".weight",)), gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The rows of each head in the order in which llama.cpp rotates neighbours, not halves."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


class LlamaCpp:
    """A GGUF file in llama.cpp, which continues a prompt greedily."""

    def __init__(self, path: Path):
        import llama_cpp

        self._llama = llama_cpp.Llama(
            str(path),
            n_ctx=512,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            verbose=False,
        )

    def prefill(self, ids: list[int]) -> int:
        self._llama.reset()
        return self._next(ids)

    def _next(self, ids: list[int]) -> int:
        """Reads tokens; the most probable next one."""
        self._llama.eval(ids)
        logits = self._llama._ctx.get_logits()  # of the last token: the public array holds them only for all tokens
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(self._llama.n_vocab(),))))

    def decode(self, ids: list[int]) -> list[int]:
        tokens = [self.prefill(ids)]
        while len(tokens) < NEW_TOKENS:
            tokens.append(self._next(tokens[-1:]))
        return tokens


def quantised(path: Path, kind: str, name: str) -> Path:
    import llama_cpp

    target = path.with_name(f"{kind}.gguf")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(llama_cpp, name), torch.get_num_threads()
    if llama_cpp.llama_model_quantize(str(path).encode(), str(target).encode(), params):
        raise RuntimeError(f"{target}: llama.cpp could not quantise")
    return target


def measure(hidden: int = max(WIDTHS)) -> list[Figure]:
    try:
        import gguf  # noqa: F401
        import llama_cpp  # noqa: F401
    except ImportError as error:
        return [Figure(7, f"sparse against llama.cpp, width {hidden}", None, note=f"{error.name} is not installed")]
    model = random_model(hidden).to(torch.bfloat16)
    trail = model.extract_trail(0)
    compiled = copy.deepcopy(trail)
    compiled.compile(dynamic=True)
    prompt = torch.randint(32000, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    ids, first = prompt[0].tolist(), prompt[:, :1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bf16.gguf"
        write_gguf(trail, path)
        peers = {
            f"llama.cpp {kind}": LlamaCpp(quantised(path, kind, name) if name else path) for kind, name in TYPES.items()
        }
        agree = same_tokens(peers["llama.cpp bf16"].decode(ids[:1]), decode(trail, first)[0, 1:].tolist())
        specialize(model, rows=(1, PROMPT))
        works = {
            "decoding": (
                lambda model, **options: decode(model, first, **options),
                lambda peer: peer.decode(ids[:1]),
                NEW_TOKENS,
            ),
            f"prefill of {PROMPT} tokens": (
                lambda model, **options: model(prompt, logits_to_keep=1, use_cache=True, **options),
                lambda peer: peer.prefill(ids),
                PROMPT,
            ),
        }
        figures = []
        for work, (ours, theirs, tokens) in works.items():
            sides = {
                "sparse bf16": lambda ours=ours: ours(model, active_heads=[0]),
                "dense bf16": lambda ours=ours: ours(trail),
                "dense bf16, compiled": lambda ours=ours: ours(compiled),
                **{name: lambda theirs=theirs, peer=peer: theirs(peer) for name, peer in peers.items()},
                "ensemble, sparse bf16": lambda ours=ours: ours(model),
            }
            with torch.no_grad():
                times = take_turns(sides, ROUNDS)
            note = "tokens/s: " + ", ".join(
                f"{name} {tokens / sorted(values)[len(values) // 2]:.4g}" for name, values in times.items()
            )
            times["three trails, llama.cpp Q4_0"] = [3 * value for value in times["llama.cpp Q4_0"]]
            goal = 1.0 if work == "decoding" and hidden == max(WIDTHS) else None
            name = f"{work}, batch 1, one trail, width {hidden}, density {DENSITY}: sparse bf16 against llama.cpp"
            figures += [
                Figure(7, f"{name} Q4_0", ratio(times, "llama.cpp Q4_0", "sparse bf16"), at_least=goal, note=note),
                Figure(7, f"{name} bf16", ratio(times, "llama.cpp bf16", "sparse bf16"), note=agree),
                Figure(
                    7,
                    f"{work}, batch 1, three heads, width {hidden}: sparse bf16 against three trails in llama.cpp Q4_0",
                    ratio(times, "three trails, llama.cpp Q4_0", "ensemble, sparse bf16"),
                ),
            ]
    return figures


def same_tokens(theirs: list[int], ours: list[int]) -> str:
    equal = next((i for i, (a, b) in enumerate(zip(theirs, ours)) if a != b), len(ours))
    return f"{equal} of {len(ours)} greedy tokens are those of Transformers in bf16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, choices=WIDTHS, default=max(WIDTHS))
    args = parser.parse_args()
    print(table(measure(args.width)))
    print(conditions())


if __name__ == "__main__":
    main()
