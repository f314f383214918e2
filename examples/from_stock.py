"""Turns a stock decoder of any family into a model of three heads and trains on: the backbone stays one.

python examples/from_stock.py --steps 50                                 # a small Qwen3 with random weights
python examples/from_stock.py --model path/or/hub-id --steps 50          # a Llama, Mistral, Gemma, GPT-2, ...
"""

import argparse

from nt_hf import NeuroTrailsForCausalLM, Sparsifier, SparsityConfig, draw_masks
from nt_hf.data.streams import TokenBatches
from nt_hf.data.tokenizers import load_tokenizer

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "head_dim": 16}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def main(arguments: list[str] | None = None) -> torch.nn.Module:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a decoder with its tokenizer; without it a small Qwen3 of random weights")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--output", default="runs/from-stock")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)

    tokenizer = load_tokenizer(args.model or "sample")
    stock = args.model or AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=len(tokenizer), **SIZES))
    # Every trail (backbone plus one head) is now a copy of the stock model: same logits, three times. Only the heads'
    # blocks are to be sparse, so embedding, backbone and LM heads lose nothing.
    model = NeuroTrailsForCausalLM.from_stock(
        stock, num_ensemble_heads=3, blocks_in_head=1, masked_modules=["model.heads.*"]
    )
    # Equal heads get equal gradients and would stay equal. Different masks make them differ.
    sparsity = SparsityConfig(density=0.7, distribution="uniform", grow="random", update_interval=10)
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
    model.extract_trail(0).save_pretrained(f"{args.output}/trail-0")  # a stock model again
    return model


if __name__ == "__main__":
    main()
