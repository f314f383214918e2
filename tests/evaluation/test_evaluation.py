"""Perplexities of documents: what is scored, after which context, and that the sums are those of the formulas."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import BOS, EOS, OFFSET, PAD, token_ids, trained
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from nt_hf.cli import perplexity as perplexity_program
from nt_hf.data.tokenizers import load_tokenizer
from nt_hf.evaluation import perplexity as evaluation
from nt_hf.evaluation.perplexity import (
    DocumentWindows,
    Perplexities,
    evaluate,
    load_for_evaluation,
    perplexity,
    strided_windows,
)

LENGTH, STRIDE = 24, 7  # no divisor of the length
TEXT = bytes((token_ids()[3000:3600] - OFFSET).tolist()).decode("ascii", "replace").replace("\ufffd", "?")
# With the token before it, a document of LENGTH - 1 tokens fills a window.
SIZES = (1, 9, LENGTH - 2, LENGTH - 1, LENGTH, LENGTH + STRIDE - 1, LENGTH + STRIDE, 75)
TEXTS = [TEXT[40 * i : 40 * i + size] for i, size in enumerate(SIZES)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer that the models of conftest.py were trained with: a byte is a token."""
    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": EOS} | {f"<0x{byte:02X}>": byte + OFFSET for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], byte_fallback=True))
    # As many tokenizers do, it would add special tokens of its own.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def windows_of(texts, **options) -> DocumentWindows:
    return DocumentWindows(texts, byte_tokenizer(), **{"length": LENGTH, "stride": STRIDE, **options})


def losses(result: Perplexities) -> list[float]:
    return [*result.head_losses, *result.ensemble_losses.values(), result.disagreement]


def formulas(logits: torch.Tensor, truth: torch.Tensor) -> list[float]:
    """What ``losses`` should be, from the logits ``[3, tokens, vocab]`` of three heads."""
    logits = logits.double()
    logps = [*logits.log_softmax(-1), logits.mean(0).log_softmax(-1), logits.softmax(-1).mean(0).log()]
    guesses = logits.argmax(-1)
    pairs = [(guesses[a] != guesses[b]).double().mean().item() for a, b in ((0, 1), (0, 2), (1, 2))]
    return [*(-logp.gather(-1, truth[:, None]).mean().item() for logp in logps), sum(pairs) / 3]


# ------------------------------------------------------------------------------------------------------- windows


@given(st.integers(2, 40), st.integers(2, 20), st.data())
def test_every_token_is_scored_once_after_enough_context(tokens, length, data):
    stride = data.draw(st.integers(1, length - 1))
    scored = []
    for window, context in strided_windows(range(tokens), length, stride):
        assert list(window) == list(range(window[0], window[-1] + 1)) and len(window) <= length
        assert context < len(window)  # no window for nothing
        for place, token in enumerate(window):
            assert place < context or place >= min(token, length - stride)
        scored += window[context:]
    assert scored == list(range(1, tokens))


@torch.no_grad()
def test_losses_are_those_of_scoring_token_by_token(model):
    logits, truth = [], []
    for text in TEXTS:
        ids = torch.tensor([EOS, *(byte + OFFSET for byte in text.encode())])
        for i in range(1, len(ids)):
            # Everything before it where that fits a window, else what the first window that reaches it holds.
            start = 0 if i < LENGTH else STRIDE * math.ceil((i + 1 - LENGTH) / STRIDE)
            assert i - start >= min(i, LENGTH - STRIDE)
            logits.append(model(ids[None, start:i], output_head_logits=True, logits_to_keep=1).head_logits[:, 0, -1])
            truth.append(ids[i])
    result = evaluate(model, windows_of(TEXTS))
    assert result.tokens == sum(SIZES)
    assert losses(result) == pytest.approx(formulas(torch.stack(logits, 1), torch.stack(truth)), rel=1e-5)


def test_neither_batch_size_nor_buffer_changes_a_result(model, monkeypatch):
    windows = windows_of(TEXTS, batch_size=1)
    expected, count = losses(evaluate(model, windows)), sum(1 for _ in windows)
    for size in (2, 5, 100):
        assert losses(evaluate(model, windows_of(TEXTS, batch_size=size))) == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(evaluation, "BUFFER", 1)
    windows = windows_of(TEXTS, batch_size=2)
    assert losses(evaluate(model, windows)) == pytest.approx(expected, rel=1e-6)
    assert sum(len(batch["labels"]) for batch in windows) == count


def test_a_batch_holds_windows_of_like_length():
    texts = [TEXT[:size] for size in (20, 1, 20, 1, 20, 1)]
    batches = list(windows_of(texts, batch_size=3))
    assert [batch["input_ids"].shape for batch in batches] == [(3, 21), (3, 2)]
    assert all(batch["attention_mask"].all() for batch in batches)


def test_the_default_stride_is_half_the_length():
    assert windows_of(TEXTS, stride=None).stride == LENGTH // 2
    assert windows_of(TEXTS, length=2, stride=None).stride == 1


# -------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(("limit", "documents"), [(None, 3), (1, 1), (30, 1), (31, 2), (60, 2), (61, 3), (900, 3)])
def test_a_limit_stops_after_the_document_that_reaches_it(model, limit, documents):
    texts = ["é" * 15, TEXT[:30], TEXT[30:60]]
    windows = windows_of(texts, max_tokens=limit)
    for _ in range(2):  # each pass counts anew
        assert evaluate(model, windows).tokens == windows.tokens == windows.bytes == 30 * documents
        assert windows.documents == documents


def test_documents_without_a_token_count_and_add_nothing(model):
    windows = windows_of(["", "a", ""])
    one = evaluate(model, windows)
    assert (one.tokens, windows.documents, windows.bytes) == (1, 3, 1)
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate(model, windows_of(["", ""]))
    lossy = DocumentWindows(["\n", "a"], load_tokenizer("sample"), length=LENGTH)
    assert sum(1 for _ in lossy) == 1 and (lossy.documents, lossy.bytes) == (2, 1)


def test_tokenizers_agree_on_bytes_and_unknown_tokens_are_counted():
    texts = ["A naïve café,\n\n  twice.", "日本 is Japan."]
    counts = []
    for tokenizer in (byte_tokenizer(), load_tokenizer("sample")):
        windows = DocumentWindows(texts, tokenizer, length=LENGTH)
        labels = torch.cat([batch["labels"].flatten() for batch in windows])
        assert windows.tokens == (labels != -100).sum()
        unknown = 0 if tokenizer.unk_token_id is None else int((labels == tokenizer.unk_token_id).sum())
        assert windows.unknown == unknown
        counts.append((windows.tokens, windows.unknown, windows.bytes))
    size = sum(len(text.encode()) for text in texts)
    assert counts[0] == (size, 0, size) and counts[1][0] < size and counts[1][1] > 0 and counts[1][2] == size


def test_bits_per_byte_by_hand():
    # 3 bits a token, 4 bytes a token.
    loss = 3 * math.log(2)
    result = Perplexities(10, [loss, 2 * loss], {"logits": loss, "probs": loss / 2}, 0.0, "logits")
    assert not [key for key in result.to_dict() if "byte" in key]
    result.bytes = 40
    values = result.to_dict()
    assert values["bits_per_byte"] == pytest.approx(0.75) and values["bytes"] == 40
    assert values["head_bits_per_byte"] == pytest.approx([0.75, 1.5])
    assert values["ensemble_bits_per_byte"] == pytest.approx({"logits": 0.75, "probs": 0.375})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1, "stride": None}, "length=1: accepted is a whole number from 2"),
        ({"stride": LENGTH}, f"stride={LENGTH}: accepted is a whole number from 1 to {LENGTH - 1}"),
        ({"stride": 0}, "stride=0: accepted is a whole number from 1 to"),
        ({"batch_size": 0}, "batch_size=0: accepted is a whole number from 1"),
        ({"max_tokens": 0}, "max_tokens=0: accepted is a whole number from 1"),
    ],
)
def test_windows_refuse_what_they_cannot_do(options, message):
    with pytest.raises(ValueError, match=message):
        windows_of(TEXTS, **options)


def test_a_tokenizer_needs_an_end_of_sequence_token():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no eos_token"):
        DocumentWindows(TEXTS, tokenizer, length=LENGTH)


# -------------------------------------------------------------------------------------------- batches of any kind


def batches_of(rows: torch.Tensor, size: int) -> list[dict[str, torch.Tensor]]:
    """Batches of ``size`` rows; every second row is padded from its eighth token on."""
    labels, attention = rows.clone(), torch.ones_like(rows)
    labels[1::2, 7:] = -100
    attention[1::2, 7:] = 0
    parts = zip(rows.split(size), labels.split(size), attention.split(size))
    return [{"input_ids": i, "labels": x, "attention_mask": a} for i, x, a in parts]


ROWS = token_ids()[:72].view(6, 12)


def test_evaluation_weighs_every_token_the_same(model):
    results = [evaluate(model, batches_of(ROWS, size)) for size in (1, 4, 6)]
    assert results[0].tokens == 3 * 11 + 3 * 6
    for result in results[1:]:
        assert losses(result) == pytest.approx(losses(results[0]), rel=1e-6)


@torch.no_grad()
def test_evaluation_against_the_formulas(model):
    (batch,) = batches_of(ROWS, 6)
    result = evaluate(model, [batch])
    labels = batch.pop("labels")[:, 1:]
    keep = labels != -100
    logits = model(**batch, output_head_logits=True).head_logits[:, :, :-1][:, keep]
    assert losses(result) == pytest.approx(formulas(logits, labels[keep]), rel=1e-6)
    assert result.to_dict()["perplexity"] == pytest.approx(math.exp(result.ensemble_losses["logits"]))


def test_evaluation_refuses_nothing(model):
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate(model, [])


def test_an_overflowing_perplexity_is_infinite():
    assert perplexity(1.0) == math.e and perplexity(1e4) == math.inf


def test_evaluation_leaves_the_mode_as_it_was(model):
    for training in (True, False):
        model.train(training)
        evaluate(model, batches_of(ROWS, 6))
        assert model.training == training


# ------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("variant", ["dense", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stock_llama_scores_as_by_its_own_loss(tmp_path, variant, dtype):
    llama = trained(variant).extract_trail(0).to(dtype)
    llama.save_pretrained(tmp_path)
    model = load_for_evaluation(tmp_path)
    assert model.dtype == dtype and not model.training and model.config.num_ensemble_heads == 1
    rows = token_ids()[:96].view(3, 32)
    llama = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    result = evaluate(model, [{"input_ids": rows, "labels": rows}])
    assert result.head_losses[0] == pytest.approx(llama(rows, labels=rows).loss.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_loaded_in_its_own_dtype(tmp_path, model, dtype):
    model.to(dtype).train().save_pretrained(tmp_path)
    loaded = load_for_evaluation(str(tmp_path))
    assert loaded.dtype == dtype and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))


ACCEPTED = "; accepted is a checkpoint directory of a multi-head model or a stock decoder"


def change_config(directory: Path, **values) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), f"has no config.json{ACCEPTED}"),
        (lambda d: d.rename(d.with_name("away")), f"is no directory{ACCEPTED}"),
        (lambda d: change_config(d, model_type="vit"), f"has model_type='vit'{ACCEPTED}"),
        (lambda d: change_config(d, num_hidden_layers=4), r"lacks 9 weights that fit .* model\.layers\.3\."),
        (lambda d: change_config(d, intermediate_size=40), "lacks 9 weights that fit"),
        (lambda d: (d / "model.safetensors").write_bytes(b"x" * 99), "cannot be loaded: "),
        (lambda d: (d / "config.json").write_text("{"), "cannot be loaded: .*not a valid JSON"),
    ],
)
def test_what_cannot_be_loaded_is_named_in_one_line(tmp_path, damage, message):
    directory = tmp_path / "llama"
    trained("dense").extract_trail(0).save_pretrained(directory)
    damage(directory)
    with pytest.raises(ValueError, match=message) as error:
        load_for_evaluation(directory)
    assert str(error.value).startswith(str(directory)) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------- the script


@pytest.fixture
def script(tmp_path, monkeypatch, model):
    """Calls nt-hf evaluate perplexity on a small checkpoint and a text with a bad line; returns the JSON it wrote."""
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    lines = [json.dumps({"body": text}) for text in TEXTS]
    (tmp_path / "text.jsonl").write_text("\n".join([*lines[:3], "no JSON", *lines[3:]]))

    def call(*options: object) -> dict:
        paths = ["--model", tmp_path / "model", "--data", tmp_path / "text.jsonl", "--output", tmp_path / "new" / "x"]
        monkeypatch.setattr(sys, "argv", ["eval/perplexity.py", *map(str, [*paths, *options])])
        perplexity_program.main()
        return json.loads((tmp_path / "new" / "x").read_text())

    return call


def test_the_script_writes_and_prints_what_was_measured(script, model, capsys):
    options = ("--sequence_length", LENGTH, "--stride", STRIDE, "--text_field", "body", "--on_bad_line", "skip")
    values = script(*options)
    result = evaluate(model, windows_of(TEXTS))
    result.bytes = sum(SIZES)  # a byte a token
    expected = result.to_dict()
    assert values["head_bits_per_byte"] == pytest.approx(expected["head_bits_per_byte"], rel=1e-6)
    assert values["ensemble_perplexities"] == pytest.approx(expected["ensemble_perplexities"], rel=1e-6)
    assert values["bits_per_byte"] == pytest.approx(values["loss"] / math.log(2))
    counts = {"tokens": sum(SIZES), "bytes": sum(SIZES), "documents": len(TEXTS), "bad_lines": 1, "unknown_share": 0.0}
    assert counts.items() <= values.items()
    assert (values["sequence_length"], values["stride"], values["density"]) == (
        LENGTH,
        STRIDE,
        pytest.approx(0.5, abs=0.01),
    )
    assert values["versions"]["torch"] == torch.__version__ and "eval/perplexity.py --model" in values["command"]
    printed = capsys.readouterr().out
    for figure in (*values["head_perplexities"], *values["ensemble_perplexities"].values()):
        assert f" {figure:.3f} " in printed
    for figure in (*values["head_bits_per_byte"], *values["ensemble_bits_per_byte"].values()):
        assert f" {figure:.4f}\n" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sequence_length", 129), "--sequence_length 129: accepted are 2 to 128, the model's trained length"),
        (("--sequence_length", 1), "--sequence_length 1: accepted are 2 to 128"),
        (("--stride", 128), "stride=128: accepted is a whole number from 1 to 127"),
        (("--text_field", "body"), "line 4: is not JSON"),
    ],
)
def test_the_script_refuses_in_one_line(script, options, message):
    with pytest.raises(ValueError, match=message) as error:
        script(*options)
    assert "\n" not in str(error.value)
