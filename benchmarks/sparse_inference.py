"""Sparse inference: the ensemble's tokens a second with sparse kernels, against the faster of dense fp32 and bf16.

    python benchmarks/sparse_inference.py                 # end to end, rows 7 and 8; some minutes
    python benchmarks/sparse_inference.py --layers        # each kernel on single layers
    python benchmarks/sparse_inference.py --profile       # the share of the compiled kernel in the widest model
    python benchmarks/sparse_inference.py --memory        # of a model without dense weights alone, of row 7

The model is a random Llama of three heads, wide as a real one and few blocks deep, all its linear layers and LM heads
at density 0.1. The sides share their weights and take turns. Row 8 needs a CUDA GPU: layers 4096 wide and more, 2:4, in
bf16. On a machine that does other work as well set GOMP_SPINCOUNT=1000, as the Makefile does.
"""

import argparse
import copy
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from nt_hf import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
from nt_hf.inference import Report, kernels, load_sparse, restore, specialize
from nt_hf.models.masks import attach_masks, masked_modules, set_mask
from nt_hf.models.transformers_versions import CACHE
from nt_hf.text import markdown_table

import torch
from common import DEVICE, Figure, conditions, peak_bytes, ratio, seconds, table, take_turns
from torch import nn
from transformers.initialization import no_init_weights

DENSITY = 0.1
NEW_TOKENS, PROMPT = 16, 128
ROUNDS = 3
WIDTHS = {1024: 2752, 2048: 5504}  # hidden: intermediate size
LAYERS = [(1024, 1024), (2752, 1024), (2048, 2048), (5504, 2048), (2048, 5504), (32000, 2048)]
GPU_LAYERS = [(4096, 4096), (14336, 4096), (4096, 14336)]  # (out, in), of Llama 3 8B
GPU_ROWS = 4096


@torch.no_grad()
def draw(model: nn.Module, density: float) -> None:
    """Gives every masked weight normal random values under a random mask."""
    drawn: dict[torch.Size, tuple[torch.Tensor, torch.Tensor]] = {}
    for index, module in enumerate(masked_modules(model).values()):
        shape = module.weight.shape
        if shape not in drawn:
            drawn[shape] = torch.randn(shape) / (density * shape[1]) ** 0.5, torch.rand(shape) < density
        # Turned by a few rows it is another layer to the model and the same to the kernels, and soon made.
        values, mask = (tensor.roll(index, 0) for tensor in drawn[shape])
        module.weight.copy_(values)
        set_mask(module, mask)


def random_model(hidden: int, vocabulary: int = 32000) -> NeuroTrailsLlamaForCausalLM:
    """A model of 14 blocks, 2 shared and 4 in each of 3 heads, in fp32."""
    torch.manual_seed(0)
    config = NeuroTrailsLlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=WIDTHS.get(hidden, hidden),
        num_hidden_layers=6,
        blocks_in_head=4,
        num_attention_heads=hidden // 128,
        max_position_embeddings=1024,
        masked_modules=["*.layers.*", "lm_heads.*"],
        eos_token_id=None,
    )
    with no_init_weights():  # minutes of random numbers, otherwise
        model = NeuroTrailsLlamaForCausalLM(config).eval()
    nn.init.normal_(model.model.embed_tokens.weight)
    draw(model, DENSITY)
    return model


def sharing(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def end_to_end(hidden: int) -> list[Figure]:
    """Row 7: decoding at batch 1 and 8 and the prefill of a prompt of 128."""
    fp32 = random_model(hidden)
    bf16 = copy.deepcopy(fp32).to(torch.bfloat16)
    models = {"dense fp32": fp32, "dense bf16": bf16, "sparse fp32": sharing(fp32), "sparse bf16": sharing(bf16)}
    reports = [specialize(models[name], rows=(1, 8, PROMPT)) for name in ("sparse fp32", "sparse bf16")]
    ids = torch.randint(32000, (8, PROMPT), generator=torch.Generator().manual_seed(1))
    goals = {"decoding, batch 1": 4.0, "decoding, batch 8": 3.2, f"prefill of {PROMPT} tokens": 2.2}
    workloads: dict[str, Callable[[nn.Module], object]] = {
        "decoding, batch 1": lambda model: decode(model, ids[:1, :1]),
        "decoding, batch 8": lambda model: decode(model, ids[:, :1]),
        f"prefill of {PROMPT} tokens": lambda model: model(ids[:1], logits_to_keep=1, use_cache=True),
    }
    tokens = dict(zip(workloads, (NEW_TOKENS, 8 * NEW_TOKENS, PROMPT)))
    figures = []
    for work, function in workloads.items():
        sides = {name: lambda model=model, function=function: function(model) for name, model in models.items()}
        times = take_turns(sides, ROUNDS)
        speeds = {name: tokens[work] / sorted(values)[len(values) // 2] for name, values in times.items()}
        dense = max(("dense fp32", "dense bf16"), key=speeds.__getitem__)
        sparse = max(("sparse fp32", "sparse bf16"), key=speeds.__getitem__)
        note = "tokens/s: " + ", ".join(f"{name} {speed:.4g}" for name, speed in speeds.items())
        name = f"{work}, width {hidden}: {sparse} against {dense}"
        # The goals are for the width of a real model; the small one shows how the ratio depends on it.
        goal = goals[work] if hidden == max(WIDTHS) else None
        figures.append(Figure(7, name, ratio(times, dense, sparse), at_least=goal, note=note))
    figures.append(memory(bf16, hidden))
    cost = ", ".join(f"{report.seconds:.1f} s and {report.extra_bytes / 2**20:.0f} MiB" for report in reports)
    figures.append(
        dataclasses.replace(same_tokens(models, ids[:, :1], hidden), note=f"specializing fp32, bf16: {cost}")
    )
    return figures


def decode(model: nn.Module, ids: torch.Tensor, **kwargs):
    return model.generate(ids, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, **kwargs)


def same_tokens(models: dict[str, nn.Module], ids: torch.Tensor, hidden: int) -> Figure:
    """Sequences that first differ where the dense model's two best logits are further apart than rounding.

    Rounding is what computing in bf16 changes of the dense fp32 model's logits at most; for fp32, 2**-16 of that, the
    ratio of the types' precision.
    """
    raw = {name: decode(model, ids, return_dict_in_generate=True, output_logits=True) for name, model in models.items()}
    first = {name: output.logits[0].float() for name, output in raw.items()}
    rounding = (first["dense bf16"] - first["dense fp32"]).abs().max().item()
    wrong = 0
    for dtype, bound in (("fp32", rounding * 2**-16), ("bf16", rounding)):
        dense, sparse = (raw[f"{kind} {dtype}"] for kind in ("dense", "sparse"))
        differ = (dense.sequences != sparse.sequences)[:, 1:]
        for row in differ.any(1).nonzero().flatten().tolist():
            step = int(differ[row].float().argmax())
            best, second = dense.logits[step][row].float().topk(2).values.tolist()
            wrong += best - second > bound
    return Figure(7, f"wrong greedy tokens in 2 x 8 sequences of {NEW_TOKENS}, width {hidden}", wrong, at_most=0)


def memory(model: nn.Module, hidden: int) -> Figure:
    """Row 7: the peak of loading a sparse file and generating from it, without dense weights, less the cache."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, sparse=True, max_shard_size="100GB")
        size = (Path(folder) / "model.safetensors").stat().st_size
        peaks = {name: _in_a_process(name, folder) for name in LOADERS}
    used = {name: None if peak is None else (peak - cache) / size for name, (peak, cache) in peaks.items()}
    note = f"file {size / 1e6:.0f} MB, cache {peaks['load_sparse'][1] / 1e6:.0f} MB, bf16; "
    note += f"from_pretrained {used['from_pretrained']:.3g}" if used["from_pretrained"] else "not told by the system"
    name = f"peak memory of sparse inference over the sparse file, width {hidden}"
    return Figure(7, name, used["load_sparse"], at_most=1.25, note=note)


LOADERS = {"load_sparse": load_sparse, "from_pretrained": NeuroTrailsLlamaForCausalLM.from_pretrained}


def _in_a_process(loader: str, folder: str) -> tuple[int | None, int]:
    """What [`load_and_generate`] returns in a process of its own."""
    command = [sys.executable, __file__, "--in_this_process", loader, folder]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


@torch.no_grad()
def load_and_generate(loader: str, folder: str) -> tuple[int | None, int]:
    """Bytes that loading, a prompt and some new tokens need at most, and those of the cache among them.

    What is imported on the way is so before: a model of the smallest size runs first. Dense weights are mapped from the
    file; all their pages are read, which no prompt would do.
    """
    sizes = []

    def work(path: str, vocabulary: int) -> None:
        model = LOADERS[loader](path)
        model.get_input_embeddings().weight.sum()
        ids = torch.randint(vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(1))
        cache = decode(model, ids, return_dict_in_generate=True)[CACHE]
        sizes.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))

    with tempfile.TemporaryDirectory() as small:
        random_model(128, vocabulary=64).to(torch.bfloat16).save_pretrained(small, sparse=True)
        work(small, 64)
    return peak_bytes(lambda: work(folder, 32000)), sizes[-1]


def semi_structured() -> list[Figure]:
    """Row 8: prefill of one layer by the 2:4 kernels."""
    if DEVICE.type != "cuda":
        return [
            Figure(
                8, "2:4 kernels against dense bf16, layers 4096 wide", None, at_least=1.25, note="there is no CUDA GPU"
            )
        ]
    return [one_semi_structured(*shape) for shape in GPU_LAYERS]


@torch.no_grad()
def one_semi_structured(out: int, inputs: int) -> Figure:
    layer = nn.Sequential(nn.Linear(inputs, out, bias=False, device=DEVICE, dtype=torch.bfloat16)).eval()
    attach_masks(layer, ["*"])
    order = torch.rand(out, inputs // 4, 4, device=DEVICE).argsort(-1)
    set_mask(layer[0], (order < 2).view(out, inputs))
    report = specialize(layer, rows=(GPU_ROWS,)).layers[0]
    kernels = {name: seconds for name, seconds in report.seconds[GPU_ROWS].items() if name != "dense"}
    note = ", ".join(f"{name} {1e6 * seconds:.0f} µs" for name, seconds in report.seconds[GPU_ROWS].items())
    name = f"{out} x {inputs}, {GPU_ROWS} tokens: {min(kernels, key=kernels.get)} against dense bf16"
    x = torch.randn(GPU_ROWS, inputs, device=DEVICE, dtype=torch.bfloat16)
    dense = sharing(layer)
    restore(dense)
    times = take_turns({"chosen": lambda: layer(x), "dense": lambda: dense(x)}, rounds=20, warm_up=5)
    return Figure(8, name, ratio(times, "dense", "chosen"), at_least=1.25, note=note)


@torch.no_grad()
def measure(widths: Iterable[int] = WIDTHS) -> list[Figure]:
    """The figures of rows 7 and 8."""
    return [*(figure for hidden in widths for figure in end_to_end(hidden)), *semi_structured()]


def random_layer(out: int, inputs: int, density: float) -> nn.Module:
    """A model of one linear layer, in fp32."""
    layer = nn.Sequential(nn.Linear(inputs, out, bias=False)).eval()
    attach_masks(layer, ["*"])
    draw(layer, density)
    return layer


def layer_times(density: float, rows=(1, 8, PROMPT)) -> list[list[str]]:
    """Microseconds of every kernel in fp32 and bf16, a row for each layer and number of tokens."""
    lines = []
    for out, inputs in LAYERS:
        layer = random_layer(out, inputs, density)
        reports = [_times(layer.to(dtype), rows) for dtype in (torch.float32, torch.bfloat16)]
        for count in rows:
            fp32, bf16 = (report.layers[0].seconds[count] for report in reports)
            values = [fp32["dense"], bf16["dense"], fp32.get("csr"), fp32.get("compiled")]
            values += [bf16.get(kernel) for kernel in ("compiled", "bitmap")]
            faster = min(values[:2]) / min(value for value in values[2:] if value)
            cells = ["" if value is None else f"{1e6 * value:.0f}" for value in values]
            lines.append([f"{out} x {inputs}", f"{density:g}", str(count), *cells, f"{faster:.1f}"])
    return lines


def _times(layer: nn.Module, rows) -> Report:
    report = specialize(layer, rows)
    restore(layer)
    return report


@torch.no_grad()
def profile(hidden: int, dtype: torch.dtype) -> list[list[str]]:
    """Milliseconds of a step, and of it within the compiled kernel; the shortest of several rounds."""
    model = random_model(hidden).to(dtype)
    specialize(model, rows=(1, 8, PROMPT))
    kernel_seconds, kernel = [], kernels._Compiled.__call__

    def timed(self, x: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        try:
            return kernel(self, x)
        finally:
            kernel_seconds.append(time.perf_counter() - start)

    ids = torch.randint(32000, (8, PROMPT), generator=torch.Generator().manual_seed(1))
    workloads = {
        "decoding, batch 8": (lambda: decode(model, ids[:, :1]), NEW_TOKENS),
        f"prefill of {PROMPT}": (lambda: model(ids[:1], logits_to_keep=1, use_cache=True), 1),
    }
    lines = []
    kernels._Compiled.__call__ = timed
    try:
        for name, (work, steps) in workloads.items():
            rounds = []
            for _ in range(ROUNDS + 1):
                kernel_seconds.clear()
                rounds.append((1000 * seconds(work) / steps, 1000 * sum(kernel_seconds) / steps))
            step, in_kernel = min(rounds)
            lines.append([str(dtype), name, f"{step:.1f}", f"{in_kernel:.1f}"])
    finally:
        kernels._Compiled.__call__ = kernel
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", action="store_true", help="single layers instead of whole models")
    parser.add_argument("--profile", action="store_true", help="where a step's time goes")
    parser.add_argument("--widths", type=int, nargs="*", default=list(WIDTHS), choices=WIDTHS, help="of whole models")
    parser.add_argument("--memory", action="store_true", help="peak memory without dense weights")
    parser.add_argument("--in_this_process", nargs=2, metavar=("LOADER", "CHECKPOINT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_this_process:
        print(json.dumps(load_and_generate(*args.in_this_process)))
        return
    print(conditions(), "\n")
    if args.layers:
        head = [
            "weight", "density", "tokens", "dense fp32", "dense bf16", "csr", "compiled fp32", "compiled bf16", "bitmap"
        ]  # fmt: skip
        lines = [line for density in (0.1, 0.2, 0.5) for line in layer_times(density)]
        print(markdown_table([[*head, "faster dense / best"], *lines]))
        return
    if args.profile:
        lines = [line for dtype in (torch.float32, torch.bfloat16) for line in profile(max(WIDTHS), dtype)]
        print(markdown_table([["type", "work", "ms a step", "in the kernel"], *lines]))
        return
    if args.memory:
        print(table([memory(random_model(width).to(torch.bfloat16), width) for width in args.widths]))
        return
    figures: list[Figure] = []
    duration = seconds(lambda: figures.extend(measure(args.widths)))
    print(table(figures), f"\n\n{duration:.0f} s")


if __name__ == "__main__":
    main()
