"""Every figure of docs/performance.md, measured now, beside its goal.

    make bench          # on a CPU, or make bench-gpu; REFERENCE=DIR adds the paper's code, CHECKPOINT=DIR a model
    python benchmarks/run.py --only decoding checkpoints

The table goes to the terminal. A JSON file gets the figures of every part, its machine and its command as soon as it is
done, so that they stay when a run ends early. --only measures parts anew and keeps what the file has of the others.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from nt_hf.cli.program import check_output, run
from nt_hf.files import write_json

import busy
import checkpoints
import decoding
import drafts
import llama_cpp_peer
import sparse_inference
import startup
import torch
import training
from common import DEVICE, as_json, bandwidth, conditions, figures, matmul_peak, table

SIZES = ["20m", "60m"] if DEVICE.type == "cpu" else ["20m", "60m", "350m"]
BENCHMARKS = {
    "training": lambda args: training.measure(SIZES, args.reference),
    "decoding": lambda args: decoding.measure(),
    "drafts": lambda args: drafts.measure(args.checkpoint, args.text, assistant=args.assistant),
    "sparse_inference": lambda args: sparse_inference.measure(),
    "llama_cpp": lambda args: llama_cpp_peer.measure(),
    "checkpoints": lambda args: checkpoints.measure(),
    "busy": lambda args: busy.measure(),
    "startup": lambda args: startup.measure(),
}
PEAKS = {"fp32 product": torch.float32, "bf16 product": torch.bfloat16}
# The block of docs/performance.md that --docs writes anew.
BEGIN, END = f"<!-- {DEVICE.type} figures -->\n", f"<!-- end of {DEVICE.type} figures -->\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--reference", type=Path, help="a checkout of https://github.com/bramgrooten/neurotrails")
    parser.add_argument("--checkpoint", help="a trained one for the drafts, see benchmarks/drafts.py")
    parser.add_argument("--assistant", help="a smaller causal LM with that checkpoint's vocabulary, for the drafts")
    parser.add_argument("--text", default="sample:validation", help="what that checkpoint has not seen")
    parser.add_argument("--output", type=Path, default=Path("runs/bench.json"))
    parser.add_argument("--docs", action="store_true", help="write docs/performance.md and its JSON file instead")
    args = parser.parse_args()
    if args.reference and not (args.reference / "language_modeling").is_dir():
        raise ValueError(f"--reference {args.reference}: accepted is a checkout of bramgrooten/neurotrails")
    page = Path("docs/performance.md")
    if args.docs and not page.is_file():
        raise ValueError("--docs: docs/performance.md is not here; accepted is the root of the repository")
    output = page.with_name(f"performance-{DEVICE.type}.json") if args.docs else args.output
    check_output(output)
    parts = json.loads(output.read_text()) if args.only != list(BENCHMARKS) and output.is_file() else {}

    measured_on = conditions()
    limits = {name: f"{matmul_peak(kind) / 1e9:,.0f} GFLOP/s" for name, kind in PEAKS.items()}
    limits["copy"] = f"{bandwidth() / 1e9:.0f} GB/s"
    measured_on["limits"] = limits
    print(json.dumps(measured_on, indent=1), file=sys.stderr)
    start = time.perf_counter()
    for name in args.only:
        print(f"{name} …", file=sys.stderr)
        parts[name] = as_json(BENCHMARKS[name](args), measured_on)
        parts = {each: parts[each] for each in BENCHMARKS if each in parts}
        write_json(output, parts)
        if args.docs:
            before, rest = page.read_text().split(BEGIN)
            page.write_text(before + BEGIN + table(figures(parts)) + "\n" + END + rest.split(END)[1])
        print(f"{name}: done after {time.perf_counter() - start:.0f} s in all", file=sys.stderr)
    print(table(figures(parts)))
    print(f"\n{output} holds the figures and the machine", file=sys.stderr)


if __name__ == "__main__":
    run(main)
