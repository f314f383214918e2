"""Turns a Llama into a model of three heads and trains on: the backbone stays one, the heads become different.

python examples/from_stock.py --steps 50                       # a small Llama with random weights
python examples/from_stock.py --model path/to/llama --steps 50
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nt_hf import NeuroTrailsLlamaForCausalLM, Sparsifier, SparsityConfig, draw_masks
from nt_hf.data.streams import TokenBatches
from nt_hf.data.tokenizers import load_tokenizer

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3}


def main(arguments: list[str] | None = None) -> NeuroTrailsLlamaForCausalLM:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Llama's directory with its tokenizer; without it a small random Llama")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--output", default="runs/from-llama")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)

    tokenizer = load_tokenizer(args.model or "sample")
    if args.model:
        llama = LlamaForCausalLM.from_pretrained(args.model)
    else:
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SMALL))

    # Every trail (backbone plus one head) is now a copy of the Llama: same logits, three times.
    model = NeuroTrailsLlamaForCausalLM.from_stock(llama, num_ensemble_heads=3, blocks_in_head=1)
    # Equal heads get equal gradients and would stay equal. Different masks make them differ; only the heads' blocks
    # get masks here, so the backbone and the LM heads lose nothing.
    sparsity = SparsityConfig(
        density=0.7, distribution="uniform", exclude=["model.embed_tokens.*", "model.layers.*", "lm_heads.*"],
        grow="random", update_interval=10,
    )  # fmt: skip
    draw_masks(model, sparsity)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sparsifier = Sparsifier(model, optimizer, sparsity, total_steps=args.steps)
    batches = iter(TokenBatches("sample:train", tokenizer, batch_size=4, sequence_length=64))
    for step in range(1, args.steps + 1):
        output = model(**next(batches))
        output.loss.backward()
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: losses of the heads", [f"{loss:.3f}" for loss in output.head_losses.tolist()])

    model.save_pretrained(args.output)
    model.extract_trail(0).save_pretrained(f"{args.output}/trail-0")  # a stock Llama again
    return model


if __name__ == "__main__":
    main()
