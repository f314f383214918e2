"""Zero-shot tasks scored by hand: prompts and answers spelled out, one row at a time, in double precision."""

import json
from pathlib import Path

import torch

DATA = Path(__file__).parents[1] / "data" / "eval"
FILES = {
    "boolq": "boolq_superglue_validation",
    "piqa": "piqa_validation",
    "hellaswag": "hellaswag_validation",
    "winogrande": "winogrande_xl_validation",
    "arc_easy": "arc_easy_test",
    "arc_challenge": "arc_challenge_test",
}
SCORERS = ("ensemble", "head 0", "head 1", "head 2")


def items(task: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{FILES[task]}.jsonl").read_text().splitlines()]


def choices(task: str, item: dict) -> tuple[list[tuple[str, str]], int, list[str]]:
    """Pairs of prompt and answer, the number of the right one, and the bare answers, which acc_norm measures."""
    if task == "boolq":
        prompt = f"{item['passage']}\nQuestion: {item['question']}?\nAnswer:"
        return [(prompt, " no"), (prompt, " yes")], item["label"], ["no", "yes"]
    if task == "winogrande":
        before, after = item["sentence"].split("_")
        pairs = [(before + item[option], " " + after.strip()) for option in ("option1", "option2")]
        return pairs, int(item["answer"]) - 1, []
    if task == "piqa":
        prompt, answers, right = f"Question: {item['goal']}\nAnswer:", [item["sol1"], item["sol2"]], item["label"]
    elif task == "hellaswag":
        prompt = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}".strip()
        answers, right = item["endings"], int(item["label"])
    else:
        prompt, answers = f"Question: {item['question']}\nAnswer:", item["choices"]["text"]
        right = item["choices"]["label"].index(item["answerKey"])
    return [(prompt, " " + answer) for answer in answers], right, answers


@torch.no_grad()
def likelihoods(model, tokenizer, prompt: str, answer: str) -> list[float]:
    """Of one answer by the ensemble and each head: logits of one row, in double precision, texts tokenized apart."""
    context = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    limit = model.config.max_position_embeddings
    row = torch.tensor([[*context, *ids][-limit - 1 :]])
    output = model(row[:, :-1], output_head_logits=True, logits_to_keep=len(ids))
    logits = torch.stack([output.logits[0], *output.head_logits[:, 0]])[:, -len(ids) :]
    return logits.double().log_softmax(-1).gather(-1, torch.tensor(ids)[:, None].expand(4, -1, -1)).sum((1, 2)).tolist()


def by_hand(model, tokenizer, task: str) -> dict[str, dict]:
    """For the ensemble and each head, log-likelihoods ``[items][choices]`` and each item's acc and acc_norm."""
    found = {name: {"likelihoods": [], "acc": [], "acc_norm": []} for name in SCORERS}
    for item in items(task):
        pairs, right, answers = choices(task, item)
        table = torch.tensor([likelihoods(model, tokenizer, *pair) for pair in pairs], dtype=torch.double).T
        lengths = torch.tensor([len(answer) for answer in answers] or [1] * len(pairs))
        for name, values in zip(SCORERS, table):
            found[name]["likelihoods"].append(values.tolist())
            found[name]["acc"].append(float(values.softmax(-1).argmax() == right))  # softmax over the choices
            found[name]["acc_norm"].append(float((values / lengths).argmax() == right))
    return found
