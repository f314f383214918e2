"""CPU time of a decode step and a training step, beside those of an earlier commit of this repository.

python benchmarks/against_commit.py                   # against the Llama whose forward pass was written by hand
python benchmarks/against_commit.py --commit abc1234 --rounds 11

The two sides take turns in processes of one thread; the ratio is the median over the rounds, each of which compares
two neighbours. The quantity is CPU time, which other work on the machine disturbs less than the clock.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
# The last commit with models/modeling_neurotrails_llama.py.
HAND_WRITTEN = "421956a"
# A model of the 60M shape with a small vocabulary, so that the blocks are what is measured.
MEASURE = """
import json, time, torch
from nt_hf import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
torch.set_num_threads(1)
torch.manual_seed(0)
config = NeuroTrailsLlamaConfig(
    vocab_size=4096, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
    blocks_in_head=5, pad_token_id=0,
)
model = NeuroTrailsLlamaForCausalLM(config)
prompt, rows = torch.randint(3, 4096, (1, 32)), torch.randint(3, 4096, (2, 128))
options = {"max_new_tokens": 48, "min_new_tokens": 48, "do_sample": False}

def decode():
    model.eval().generate(prompt, attention_mask=torch.ones_like(prompt), **options)

def train():
    model.train()(rows, labels=rows).loss.backward()
    model.zero_grad()

def least(function, times):
    function()
    seconds = []
    for _ in range(times):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return min(seconds)

print(json.dumps({"decode": least(decode, 5) / 48, "train": least(train, 8)}))
"""


def measure(checkout: Path) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", MEASURE]
    done = subprocess.run(command, env=environment, cwd=checkout, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default=HAND_WRITTEN)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", args.commit], cwd=ROOT, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        pairs = [(measure(ROOT), measure(Path(folder))) for _ in range(args.rounds)]
    for what, name in (("decode", "a decode step"), ("train", "a training step")):
        ratios = sorted(here[what] / there[what] for here, there in pairs)
        print(f"{name}: {median(ratios):.3f} of the CPU time at {args.commit} ({ratios[0]:.3f} to {ratios[-1]:.3f})")


if __name__ == "__main__":
    main()
