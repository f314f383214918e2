"""Single sparse layers beside DeepSparse, Neural Magic's discontinued engine: milliseconds of one call.

    python3.11 -m venv deepsparse && deepsparse/bin/pip install deepsparse==1.8.0      # Python 3.8 to 3.11
    OMP_NUM_THREADS=1 python benchmarks/deepsparse_peer.py --python deepsparse/bin/python

DeepSparse runs in that environment, from an ONNX file with the layer's weights, in fp32, on as many threads as PyTorch
has. The sides take turns; every figure is the shortest of its calls.
"""

import argparse
import copy
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from nt_hf.cli.program import run
from nt_hf.inference import specialize
from nt_hf.text import markdown_table

import numpy as np
import torch
from common import conditions, seconds
from sparse_inference import DENSITY, PROMPT, random_layer
from torch import nn

LAYERS = [(2048, 2048), (5504, 2048), (2048, 5504)]
ROWS = (1, 8, PROMPT)
ROUNDS = 20
# In the environment of DeepSparse: the seconds of a call for every line that comes in.
PEER = """
import sys, time
import deepsparse, numpy, onnx
from onnx import TensorProto, helper
folder, threads = sys.argv[1], int(sys.argv[2])
weight, x, y = (numpy.load(f"{folder}/{name}.npy") for name in ("weight", "x", "y"))
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "weight"], ["y"])], "layer",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, y.shape)],
    [onnx.numpy_helper.from_array(weight, "weight")],
)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]), f"{folder}/layer.onnx")
engine = deepsparse.Engine(f"{folder}/layer.onnx", batch_size=len(x), num_cores=threads)
assert numpy.allclose(engine.run([x])[0], y, rtol=1e-3, atol=1e-3)
print("ready 0", flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    engine.run([x])
    print("seconds", time.perf_counter() - start, flush=True)
"""


class DeepSparse:
    """A layer in a process of its own; ``call`` runs it once and returns the seconds."""

    def __init__(self, python: Path, layer: nn.Linear, x: torch.Tensor, folder: str):
        for name, tensor in {"weight": layer.weight.T, "x": x, "y": layer(x)}.items():
            np.save(Path(folder) / name, np.ascontiguousarray(tensor.detach().numpy()))
        command = [python, "-c", PEER, folder, str(torch.get_num_threads())]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer("ready")

    def call(self) -> float:
        print(file=self.process.stdin, flush=True)
        return self._answer("seconds")

    def _answer(self, kind: str) -> float:
        while line := self.process.stdout.readline():  # it greets by a line of its own
            if line.startswith(f"{kind} "):
                return float(line.split()[1])
        raise ValueError("--python: its process ended; accepted is a Python with deepsparse 1.8.0")

    def close(self) -> None:
        self.process.communicate()


@torch.no_grad()
def measure(python: Path) -> list[list[str]]:
    """A row for each layer and number of tokens: milliseconds in DeepSparse and here, in fp32 and bf16."""
    lines = []
    for out, inputs in LAYERS:
        for rows in ROWS:
            x, layer = torch.randn(rows, inputs), random_layer(out, inputs, DENSITY)
            layers = {dtype: copy.deepcopy(layer).to(dtype) for dtype in (torch.float32, torch.bfloat16)}
            with tempfile.TemporaryDirectory() as folder:
                peer = DeepSparse(python, layers[torch.float32][0], x, folder)
                for layer in layers.values():
                    specialize(layer, (rows,))
                sides = {"DeepSparse": peer.call}
                for dtype, layer in layers.items():
                    sides[dtype] = partial(seconds, partial(layer, x.to(dtype)))
                times = {name: [] for name in sides}
                for _ in range(ROUNDS):
                    for name, side in sides.items():
                        times[name].append(side())
                peer.close()
            best = [min(values) for values in times.values()]
            lines.append([f"{out} x {inputs}", str(rows), *(f"{1e3 * value:.2f}" for value in best)])
            lines[-1] += [f"{best[0] / value:.1f}" for value in best[1:]]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="of an environment with deepsparse 1.8.0")
    args = parser.parse_args()
    print(conditions(), file=sys.stderr)
    first = ["layer", "tokens", "DeepSparse fp32", "sparse fp32", "sparse bf16", "times as fast, fp32", "bf16"]
    print(markdown_table([first, *measure(args.python)]))


if __name__ == "__main__":
    run(main)
