"""Trains a small sparse multi-head Llama for a few steps on the sample text, saves it, loads it and lets it write.

python examples/quickstart.py --steps 200 --output runs/quickstart
"""

import argparse

from nt_hf import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM, Sparsifier, SparsityConfig, draw_masks
from nt_hf.data.streams import TokenBatches
from nt_hf.data.tokenizers import load_tokenizer

import torch


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", default="runs/quickstart")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)

    tokenizer = load_tokenizer("sample")
    batches = iter(TokenBatches("sample:train", tokenizer, batch_size=4, sequence_length=64))
    # Three heads of one block each, on a backbone of one block.
    config = NeuroTrailsLlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_attention_heads=4,
        num_hidden_layers=2, blocks_in_head=1, num_ensemble_heads=3, max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = NeuroTrailsLlamaForCausalLM(config)

    # Half of the weights of the blocks are zero; every 20 steps some of them move. Embedding and LM heads stay dense.
    sparsity = SparsityConfig(
        density=0.5, exclude=["model.embed_tokens.*", "lm_heads.*"], grow="random", update_interval=20
    )
    draw_masks(model, sparsity)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sparsifier = Sparsifier(model, optimizer, sparsity, total_steps=args.steps)

    for step in range(1, args.steps + 1):
        loss = model(**next(batches)).loss
        loss.backward()
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, args.steps // 10) == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    print(sparsifier.report())

    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    model = NeuroTrailsLlamaForCausalLM.from_pretrained(args.output).eval()
    ids = tokenizer("The best way to", return_tensors="pt")["input_ids"]
    print(tokenizer.decode(model.generate(ids, max_new_tokens=20, do_sample=True, top_k=40)[0]))


if __name__ == "__main__":
    main()
