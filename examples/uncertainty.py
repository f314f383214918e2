"""Prints how unsure the model was of each token that it wrote. nt_hf need not be installed.

python examples/uncertainty.py --model runs/demo/checkpoint-1400 --prompt "The best way to"
"""

import argparse
import inspect
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint directory")
    parser.add_argument("--prompt", required=True, help="a text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True).eval()
    if "output_uncertainty" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{args.model}: holds a {type(model).__name__}; accepted is a NeuroTrails checkpoint")
    if bad := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise ValueError(f"{args.model}: has weights that are not finite, for example {bad[0]}")
    ids = tokenizer(args.prompt, return_tensors="pt")["input_ids"]
    torch.manual_seed(args.seed)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=args.max_new_tokens,
        do_sample=True,
        top_k=40,
        output_uncertainty=True,
        return_dict_in_generate=True,
    )

    # Each measure is [1, new tokens] and belongs to the prediction that the token was drawn from:
    # the entropy of the mean prediction, the part of it that the heads disagree about (both in nats), and the
    # share of pairs of heads whose best guesses differ.
    print(f"{'token':<16}{'entropy':>9}{'mutual information':>20}{'disagreement':>14}")
    tokens = output.sequences[0, ids.shape[1] :].tolist()
    for token, *values in zip(tokens, *(measure[0].tolist() for measure in output.uncertainty.values())):
        entropy, information, disagreement = values
        # repr: a token may hold line breaks, or control characters that command a terminal.
        print(f"{tokenizer.decode([token])!r:<16}{entropy:>9.3f}{information:>20.4f}{disagreement:>14.2f}")


if __name__ == "__main__":
    logging.disable_progress_bar()
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
