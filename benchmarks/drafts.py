"""Ways to decode with a trained ensemble faster, on text that it has not seen.

    nt-hf train --config 60m --output_dir runs/60m --data.train 'text/*.jsonl.gz' --data.validation held-out.jsonl.gz \\
        --train.max_steps 300 --train.batch_size 8 --train.micro_batch_size 8 --train.save_steps 300
    python benchmarks/drafts.py --checkpoint runs/60m/checkpoint-300 --text held-out.jsonl.gz

Plain greedy decoding against: drafts of a trail, of a trail in eight bits, and what Transformers has: assisted decoding
with the same draft, with a small model of its own (--assistant), and prompt lookup. Prompts are the first tokens of
documents.
"""

import argparse

from nt_hf import NeuroTrailsForCausalLM
from nt_hf.data.tokenizers import load_tokenizer
from nt_hf.inference import draft_model

import torch
from common import DEVICE, Figure, ratio, table, take_turns
from decoding import first_tokens
from transformers import AutoModelForCausalLM

GOAL = 1.5


def measure(
    checkpoint: str | None,
    text: str = "sample:validation",
    dtype: torch.dtype = torch.bfloat16,
    tokens: int = 64,
    rounds: int = 3,
    batch: int = 4,
    assistant: str | None = None,
) -> list[Figure]:
    """Row 6: every side's tokens per second against plain decoding, for prompts one by one and in a batch.

    ``assistant`` is the directory of a smaller causal LM with the same vocabulary.
    """
    if checkpoint is None or DEVICE.type != "cpu":
        why = "there is no --checkpoint" if checkpoint is None else "on a CPU only"
        return [Figure(6, "drafts, trained checkpoint", None, at_least=GOAL, note=why)]
    model = NeuroTrailsForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
    draft = draft_model(model)
    prompts = first_tokens(text, load_tokenizer(checkpoint), batch, 32)
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def each(**kwargs) -> list:
        return [model.generate(prompt[None], **options, **kwargs) for prompt in prompts]

    one_by_one = {
        "plain": each,
        "drafts of a trail": lambda: each(trail_draft=0),
        "drafts of a trail in eight bits": lambda: each(trail_draft=draft),
        "the same, assisted decoding of Transformers": lambda: each(assistant_model=draft),
        "prompt lookup of Transformers": lambda: each(prompt_lookup_num_tokens=4),
    }
    if assistant:
        small = AutoModelForCausalLM.from_pretrained(assistant, dtype=dtype).eval()
        one_by_one["a small model, assisted decoding of Transformers"] = lambda: each(assistant_model=small)
    batched = {
        "plain": lambda: model.generate(prompts, **options),
        "drafts of a trail": lambda: model.generate(prompts, **options, trail_draft=0),
        "drafts of a trail in eight bits": lambda: model.generate(prompts, **options, trail_draft=draft),
    }
    notes = {}
    for name, kind in (("drafts of a trail", 0), ("drafts of a trail in eight bits", draft)):
        found = [output.speculation for output in each(trail_draft=kind, return_dict_in_generate=True)]
        accepted, refused = (sum(sum(getattr(one, key)) for one in found) for key in ("accepted", "refused"))
        rounds_taken = sum(len(one.drafted) for one in found)
        positions, emitted = (sum(sum(getattr(one, key)) for one in found) for key in ("drafted", "emitted"))
        notes[name] = (
            f"acceptance {accepted / (accepted + refused):.3f}, {positions / rounds_taken:.1f} positions and "
            f"{emitted / rounds_taken:.1f} tokens a round"
        )
    figures = []
    for size, sides in ((1, one_by_one), (batch, batched)):
        times = take_turns(sides, rounds)
        for name in sides:
            if name != "plain":
                goal = GOAL if (size, name) == (1, "drafts of a trail in eight bits") else None
                note = notes.get(name, "") if size == 1 else ""
                figures.append(
                    Figure(6, f"{name}, batch {size}", ratio(times, "plain", name), at_least=goal, note=note)
                )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="of a multi-head causal LM, with its tokenizer")
    parser.add_argument("--text", default="sample:validation", help="what the model has not seen")
    parser.add_argument("--assistant", help="a smaller causal LM with the same vocabulary, for assisted decoding")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    print(table(measure(args.checkpoint, args.text, dtype, rounds=args.rounds, assistant=args.assistant)))


if __name__ == "__main__":
    main()
