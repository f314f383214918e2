"""What the heads' diversity is made of, each figure against plain loops over the tokens in double precision."""

import copy
import itertools
import json
import math
import statistics
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from conftest import PAD, token_ids, trained
from recipe_runs import call

from nt_hf import NeuroTrailsLlamaForCausalLM
from nt_hf.cli import diversity as program
from nt_hf.cli.program import run
from nt_hf.evaluation import diversity
from nt_hf.evaluation.diversity import BINS, LinearCKA, bin_sums, calibration, mask_overlap, measure_diversity
from nt_hf.evaluation.plots import write_plots
from nt_hf.models.masks import get_mask

ROOT = Path(__file__).parents[2]
LENGTHS = (40, 23, 31, 2, 17)
PLOTS = {f"{name}.{ending}" for name in ("calibration", "gain", "heads_used", "similarity", "pairs")
         for ending in ("png", "svg")}  # fmt: skip


def four_heads() -> NeuroTrailsLlamaForCausalLM:
    """Four unlike heads: of three, every choice of two is a window."""
    model = NeuroTrailsLlamaForCausalLM.from_stock(
        trained("dense").extract_trail(0), num_ensemble_heads=4, blocks_in_head=1
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in [*model.model.heads.parameters(), *model.lm_heads.parameters()]:
        parameter.data += 0.7 * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def model_of(variant: str, mode: str = "logits") -> NeuroTrailsLlamaForCausalLM:
    model = four_heads() if variant == "four" else copy.deepcopy(trained(variant))
    model.config.ensemble_mode = mode
    return model


def batch_of(rows: list[int], filler: int = PAD, left: bool = False) -> dict[str, torch.Tensor]:
    """Rows of text of these numbers of ``LENGTHS``, padded on one side; some labels of row 1 are ignored."""
    width = max(LENGTHS[row] for row in rows)
    batch = {"input_ids": torch.full((len(rows), width), filler)}
    batch["attention_mask"], batch["labels"] = torch.zeros_like(batch["input_ids"]), batch["input_ids"] * 0 - 100
    for place, row in enumerate(rows):
        text = token_ids()[700 * row : 700 * row + LENGTHS[row]]
        start = width - len(text) if left else 0
        batch["input_ids"][place, start : start + len(text)] = text
        batch["attention_mask"][place, start : start + len(text)] = 1
        skipped = 7 if row == 1 else 1  # the first token of a text has nothing that it could be predicted from
        batch["labels"][place, start + skipped : start + len(text)] = text[skipped:]
    return batch


BATCHES = [batch_of([0, 1]), batch_of([2]), batch_of([3, 4], left=True)]
TOKENS = 39 + 16 + 30 + 1 + 16


@torch.no_grad()
def scored(model, batches=BATCHES) -> list[tuple[torch.Tensor, int]]:
    """Of each token: the heads' logits ``[M, vocab]`` in double precision, and the token."""
    tokens = []
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**inputs, output_head_logits=True, use_cache=False).head_logits.double()
        for row, labels in enumerate(batch["labels"].tolist()):
            for place in range(1, len(labels)):
                if labels[place] != -100:
                    tokens.append((logits[:, row, place - 1], labels[place]))
    return tokens


def ensemble(logits: torch.Tensor, mode: str) -> torch.Tensor:
    """Probabilities of the ensemble of heads' ``logits`` ``[M, vocab]``."""
    return logits.mean(0).softmax(-1) if mode == "logits" else logits.softmax(-1).mean(0)


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p.tolist(), q.tolist()))


def vote(logits: torch.Tensor) -> tuple[int, int]:
    """The guess with the most votes, of those the one with the highest mean probability, and how many those are."""
    votes, support = Counter(logits.argmax(-1).tolist()), logits.softmax(-1).mean(0)
    most = [token for token in votes if votes[token] == max(votes.values())]
    return max(most, key=lambda token: support[token]), len(most)


def expected_calibration_error(predictions: list[tuple[float, bool]]) -> float:
    bins = [[(p, right) for p, right in predictions if b / BINS < p <= (b + 1) / BINS] for b in range(BINS)]
    gaps = [abs(sum(right for _, right in each) - sum(p for p, _ in each)) for each in bins]
    return sum(gaps) / len(predictions)


def flat(value) -> list[float]:
    """All numbers of a result."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for each in value for number in flat(each)]
    return [] if value is None or isinstance(value, str) else [value]


def close(expected, tolerance: float = 2e-6):
    return pytest.approx(expected, abs=tolerance, rel=2e-6)


VARIANTS = ("neurotrails", "treenet", "full_ensemble", "tied", "four")


# ------------------------------------------------------------------------------------------------------ predictions


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_accuracies_and_calibration_against_loops(variant):
    model = model_of(variant)
    tokens, result = scored(model), measure_diversity(model, BATCHES)
    assert result.tokens == len(tokens) == TOKENS
    predictors = [lambda logits, h=h: logits[h].softmax(-1) for h in range(len(model.lm_heads))]
    predictors += [lambda logits, m=m: ensemble(logits, m) for m in ("logits", "probs")]
    assert list(result.ensemble_scores) == ["logits", "probs"]
    for score, predict in zip([*result.head_scores, *result.ensemble_scores.values()], predictors, strict=True):
        guesses = [(*(x.item() for x in predict(logits).max(-1)), y) for logits, y in tokens]
        assert score.loss == close(statistics.mean(-math.log(predict(logits)[y]) for logits, y in tokens))
        assert score.perplexity == close(math.exp(score.loss))
        assert score.accuracy == close(statistics.mean(guess == y for _, guess, y in guesses))
        ours = score.calibration
        assert ours.error == close(expected_calibration_error([(p, guess == y) for p, guess, y in guesses]))
        for b, count in enumerate(ours.counts):
            inside = [(p, guess == y) for p, guess, y in guesses if b / BINS < p <= (b + 1) / BINS]
            assert count == len(inside)
            means = [statistics.mean(column) for column in zip(*inside)] or [None, None]
            assert [ours.confidences[b], ours.accuracies[b]] == (close(means) if inside else means)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["logits", "probs"])
def test_pairs_votes_and_windows_against_loops(variant, mode):
    model = model_of(variant, mode)
    tokens, result = scored(model), measure_diversity(model, BATCHES)
    count = len(model.lm_heads)
    guesses = [logits.argmax(-1).tolist() for logits, _ in tokens]
    errors = [[float(guess[h] != y) for guess, (_, y) in zip(guesses, tokens)] for h in range(count)]
    pairs = list(itertools.product(range(count), repeat=2))
    matrices = {
        "disagreement": [statistics.mean(guess[g] != guess[h] for guess in guesses) for g, h in pairs],
        "kl": [statistics.mean(kl(*logits[[g, h]].softmax(-1)) for logits, _ in tokens) for g, h in pairs],
        "error_correlation": [statistics.correlation(errors[g], errors[h]) for g, h in pairs],
    }
    for name, values in matrices.items():
        ours = getattr(result, name)
        assert flat(ours.matrix) == close(values), name
        assert ours.mean == close(statistics.mean(x for (g, h), x in zip(pairs, values) if g != h)), name

    assert result.vote_accuracy == close(statistics.mean(vote(logits)[0] == y for logits, y in tokens))
    assert result.oracle_accuracy == close(statistics.mean(y in guess for (_, y), guess in zip(tokens, guesses)))

    assert [row.heads for row in result.heads_used] == list(range(1, count + 1))
    for row in result.heads_used:
        starts = range(count) if row.heads < count else [0]
        windows = [[(start + i) % count for i in range(row.heads)] for start in starts]
        values = [
            math.exp(statistics.mean(-math.log(ensemble(logits[window], mode)[y]) for logits, y in tokens))
            for window in windows
        ]
        assert [row.mean, row.lowest, row.highest] == close([statistics.mean(values), min(values), max(values)])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gain_is_split_exactly_and_each_part_by_itself(variant):
    model = model_of(variant)
    tokens, gains = scored(model), measure_diversity(model, BATCHES).gains
    geometric = statistics.mean(
        kl(ensemble(logits, "logits"), p) for logits, _ in tokens for p in logits.softmax(-1)
    )  # another form of it: the mean divergence from the ensemble to the heads
    jensen = statistics.mean(
        math.log(statistics.mean(p)) - statistics.mean(map(math.log, p))
        for p in (logits.softmax(-1)[:, y].tolist() for logits, y in tokens)
    )
    assert {mode: gain.diversity for mode, gain in gains.items()} == close({"logits": geometric, "probs": jensen})
    assert min(geometric, jensen) > 5e-4  # there is something to measure
    for gain in gains.values():
        assert gain.residual == gain.mean_head_loss - gain.diversity - gain.ensemble_loss
        assert abs(gain.residual) < 1e-5


@pytest.mark.parametrize("variant", ["neurotrails", "treenet", "full_ensemble"])
def test_the_gain_adds_up_in_a_model_with_very_confident_heads(variant):
    confident = model_of(variant)
    for lm_head in confident.lm_heads:
        lm_head.weight.data *= 30
    result = measure_diversity(confident, BATCHES)
    assert result.head_scores[0].loss > 10 and max(gain.diversity for gain in result.gains.values()) > 0.5
    assert max(abs(gain.residual) for gain in result.gains.values()) < 1e-5


def test_votes_and_ties_of_heads_that_are_less_alike_than_those_of_small_models():
    logits = 3 * torch.randn(5, 2000, 3, generator=torch.Generator().manual_seed(0))
    votes = [vote(logits[:, place]) for place in range(2000)]
    assert {ties for _, ties in votes} == {1, 2}
    for token in range(3):
        sums = diversity._prediction_sums(logits, torch.full((2000,), token), "logits")
        guessed = (logits.argmax(-1) == token).any(0).sum()
        assert sums["hits"].tolist() == [sum(winner == token for winner, _ in votes), guessed]


def test_calibration_of_a_hand_made_example():
    confidences = torch.tensor([0.9] * 4 + [0.5] * 4 + [1.0] * 2, dtype=torch.float64)
    correct = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0, 1, 1]).bool()
    found = calibration(bin_sums(confidences, correct))
    assert found.error == pytest.approx((4 * 0.15 + 4 * 0.25 + 2 * 0) / 10)
    assert {b: count for b, count in enumerate(found.counts) if count} == {7: 4, 13: 4, 14: 2}
    assert (found.accuracies[7], found.confidences[13], found.accuracies[0]) == (0.25, pytest.approx(0.9), None)


# ------------------------------------------------------------------------------------------------- what is summed


@pytest.mark.parametrize("variant", ["neurotrails", "full_ensemble"])
def test_neither_batches_nor_chunks_nor_padding_count(variant, monkeypatch):
    model = model_of(variant)
    expected = flat(measure_diversity(model, BATCHES).to_dict())
    nothing = {**batch_of([0]), "labels": torch.full((1, 40), -100)}
    assert flat(measure_diversity(model, [nothing, *BATCHES, nothing]).to_dict()) == expected
    monkeypatch.setattr(diversity, "CHUNK", 16)
    one = measure_diversity(model, [batch_of([0, 1, 2, 3, 4], filler=77)])
    assert flat(one.to_dict()) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_model_runs_once_a_batch_and_lm_heads_on_chunks_of_what_is_scored(model, monkeypatch):
    monkeypatch.setattr(diversity, "CHUNK", 16)
    runs, rows = [], []
    model.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    model.lm_heads[1].register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    for block in (*model.model.layers, *model.model.heads[0].layers):
        block.self_attn.attention_dropout = 0.5
    expected = flat(measure_diversity(model, BATCHES).to_dict())
    del runs[:], rows[:]
    assert flat(measure_diversity(model.train(), iter(BATCHES)).to_dict()) == expected
    assert (len(runs), sum(rows), max(rows)) == (len(BATCHES), TOKENS, 16) and model.training


def test_chosen_heads_are_measured_as_they_are_within_all():
    model = model_of("four")
    every, some = measure_diversity(model, BATCHES), measure_diversity(model, BATCHES, heads=[3, 1])
    assert some.heads == [3, 1]
    assert flat([score.loss for score in some.head_scores]) == close([every.head_scores[h].loss for h in (3, 1)])
    assert some.kl.matrix[0] == close([0.0, every.kl.matrix[3][1]])
    for depth, pairs in some.similarity.items():
        assert pairs.matrix[1][0] == close(every.similarity[depth].matrix[1][3])
    overlaps = [mask_overlap(trained("neurotrails"), pair).overall for pair in ((0, 1), (0, 2), (1, 2))]
    assert len(set(overlaps)) == 3
    assert mask_overlap(trained("neurotrails"), (0, 1, 2)).overall == pytest.approx(statistics.mean(overlaps))


def test_equal_heads_have_no_diversity():
    llama = trained("dense").extract_trail(0)
    model = NeuroTrailsLlamaForCausalLM.from_stock(llama, masked_modules=["model.heads.*"])
    result = measure_diversity(model, BATCHES)
    ones = [[1.0] * 3] * 3
    assert (result.disagreement.mean, result.kl.matrix) == (0, [[0.0] * 3] * 3)
    for pairs in (result.error_correlation, *result.similarity.values()):
        assert flat(pairs.matrix) == close(flat(ones))
    assert [gain.diversity for gain in result.gains.values()] == close([0, 0])
    assert result.oracle_accuracy == result.vote_accuracy == result.head_scores[0].accuracy
    assert len({round(x, 3) for row in result.heads_used for x in (row.lowest, row.highest)}) == 1
    assert set(flat(vars(result.mask_overlap))) == {1.0}


def test_one_head_has_no_pairs():
    result = measure_diversity(trained("dense"), BATCHES)
    head = trained("dense").extract_trail(0)
    stock = measure_diversity(NeuroTrailsLlamaForCausalLM.from_stock(head, num_ensemble_heads=1), BATCHES)
    for one in (result, stock):
        pairs = [one.disagreement, one.kl, one.error_correlation, *one.similarity.values()]
        assert {each.mean for each in pairs} == {None} and one.mask_overlap is None
        assert [gain.diversity for gain in one.gains.values()] == close([0, 0])
        assert [row.heads for row in one.heads_used] == [1]
        assert one.ensemble_scores["probs"].accuracy == one.vote_accuracy == one.oracle_accuracy
    assert stock.head_scores[0].loss == close(result.head_scores[0].loss)


def test_what_cannot_be_computed_is_none_or_refused():
    model = model_of("neurotrails")
    (always_right,) = scored(model, [batch_of([3])])
    batch = batch_of([3])
    batch["labels"][0, 1] = always_right[0][0].argmax()
    result = measure_diversity(model, [batch])
    assert result.head_scores[0].accuracy == 1 and result.error_correlation.matrix[0] == [None] * 3
    assert result.similarity["block 0"].mean is None  # one token: nothing varies
    with pytest.raises(ValueError, match="no token to predict"):
        measure_diversity(model, [])
    with pytest.raises(ValueError, match="accepted are one or more different heads of 0 to 2"):
        measure_diversity(model, BATCHES, heads=[3])


# ---------------------------------------------------------------------------------------- representations and masks


def direct_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """By the Gram matrices of the tokens, ``[n, n]``, centred in both directions."""
    k, q = (a - a.mean(0) - a.mean(1, keepdim=True) + a.mean() for a in (x @ x.T, y @ y.T))
    return ((k * q).sum() / (k.square().sum() * q.square().sum()).sqrt()).item()


@torch.no_grad()
def trail_states(model, head: int) -> list[torch.Tensor]:
    """States ``[n, hidden]`` after each of a head's blocks and its norm, from the stock Llama of its trail."""
    llama = model.extract_trail(head)
    parts = [*llama.model.layers[model.config.num_backbone_layers :], llama.model.norm]
    found = [[] for _ in parts]
    for part, states in zip(parts, found):
        part.register_forward_hook(lambda _, __, output, states=states: states.append(output))
    for batch in BATCHES:
        llama(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        keep = batch["labels"][:, 1:] != -100
        for states in found:
            states[-1] = states[-1][:, :-1][keep]
    return [torch.cat(states).double() for states in found]


@pytest.mark.parametrize("variant", ["neurotrails", "treenet", "full_ensemble", "tied", "no_backbone", "only_lm_heads"])
def test_similarity_is_that_of_the_trails_states_at_each_depth(variant):
    model = trained(variant)
    result = measure_diversity(model, BATCHES).similarity
    trails = [trail_states(model, head) for head in range(len(model.lm_heads))]
    blocks = model.config.blocks_in_head
    assert list(result) == [*(f"block {depth}" for depth in range(blocks)), "final norm"]
    for depth, pairs in enumerate(result.values()):
        expected = [direct_cka(x[depth], y[depth]) for x, y in itertools.product(trails, repeat=2)]
        assert flat(pairs.matrix) == close(expected, 1e-5)


def test_cka_ignores_rotation_scale_and_mean_and_tells_the_rest_apart():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 200, 12, generator=generator, dtype=torch.float64).unbind()
    y = y + 0.7 * x
    rotation, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))
    cka = LinearCKA()
    for part in torch.stack([x, y, 3 * x @ rotation, 0.2 * y + 1000]).split(77, dim=1):
        cka.add(part)
    found, between = cka.matrix(), direct_cka(x, y)
    assert 0.1 < between < 0.9
    expected = torch.eye(4).double() + (1 - torch.eye(4).double()) * between
    expected[0, 2] = expected[2, 0] = expected[1, 3] = expected[3, 1] = 1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", ["neurotrails", "full_ensemble", "tied", "only_lm_heads"])
def test_mask_overlap_against_counting(variant):
    model = trained(variant)
    masks = [{}, {}, {}][: len(model.lm_heads)]
    for head, found in enumerate(masks):
        modules = {**dict(model.model.heads[head].named_modules()), "lm_head": model.lm_heads[head]}
        found |= {name: get_mask(m) for name, m in modules.items() if getattr(m, "weight_mask", None) is not None}

    def overlap(chosen) -> float:
        values = []
        for one, other in itertools.combinations(masks, 2):
            pairs = [(one[name].flatten(), other[name].flatten()) for name in one if name in other and chosen(name)]
            a, b = (torch.cat(each) for each in zip(*pairs))
            values.append(((a & b).sum() / (a | b).sum()).item())
        return statistics.mean(values)

    result = mask_overlap(model, range(len(masks)))
    common = masks[0].keys() & masks[1].keys()
    assert result.overall == close(overlap(lambda name: True))
    assert result.by_module == close({name: overlap(lambda x, name=name: x == name) for name in common})
    kinds = {name.split(".")[-1] for name in common}
    assert result.by_kind == close({kind: overlap(lambda x, k=kind: x.split(".")[-1] == k) for kind in kinds})
    blocks = {name.split(".")[1] for name in common if name.startswith("layers.")}
    expected = {f"block {b}": overlap(lambda x, b=b: x.startswith(f"layers.{b}.")) for b in blocks}
    assert result.by_block == close(expected)
    assert ("q_proj" in result.by_kind) == (variant != "only_lm_heads") == bool(result.by_block)


# --------------------------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small checkpoint with the tokenizer that it was trained with: a byte is a token."""
    path = tmp_path_factory.mktemp("diversity") / "model"
    trained("neurotrails").save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_the_script_writes_figures_and_plots_and_prints_them(checkpoint, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    arguments = ["--model", str(checkpoint), "--data", "sample:validation", "--output", str(out), "--heads", "0,2"]
    call(program.main, *arguments, "--max_tokens", 300)
    printed = capsys.readouterr().out
    result = json.loads((out / "diversity.json").read_text())
    assert result["tokens"] >= 300 and (result["model"], result["data"]) == (str(checkpoint), ["sample:validation"])
    assert result["heads"] == [0, 2] and result["versions"]["torch"] == torch.__version__
    assert " ".join(arguments) in result["command"]
    for score in (*result["head_scores"], *result["ensemble_scores"].values()):
        assert f"{score['perplexity']:.3f}" in printed and f"{score['accuracy']:.4f}" in printed
    for gain in result["gains"].values():
        assert f"- {gain['diversity']:.4f}  " in printed
    assert {file.name for file in out.iterdir()} == {"diversity.json", *PLOTS}
    for file in PLOTS:
        content = (out / file).read_bytes()
        assert len(content) > 5000 and (b"\x89PNG" if file.endswith("png") else b"<svg") in content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--model": "nowhere"}, "nowhere: is no directory"),
        ({"--heads": "0,3"}, "--heads 0,3: accepted are different numbers of 0 to 2"),
        ({"--heads": "1,1"}, "--heads 1,1: accepted"),
        ({"--heads": ""}, "--heads : accepted"),
        ({"--data": "empty.jsonl"}, "no token to predict"),
        ({"--sequence_length": "129"}, "--sequence_length 129: accepted are 2 to 128"),
        ({"--output": "empty.jsonl"}, "empty.jsonl: is no directory"),
    ],
)
def test_the_script_refuses_in_one_line(checkpoint, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text(json.dumps({"text": ""}) + "\n")
    options = {"--model": checkpoint, "--data": "sample:validation", "--output": "out", **options}
    monkeypatch.setattr(sys, "argv", ["eval/diversity.py", *(str(x) for item in options.items() for x in item)])
    with pytest.raises(SystemExit) as ended:
        run(program.main)
    line = str(ended.value.code)
    assert line.startswith("error: ") and message in line and "\n" not in line


def test_one_head_is_tabled_and_plotted_and_plots_need_matplotlib(tmp_path, monkeypatch, caplog):
    result = measure_diversity(trained("dense"), BATCHES).to_dict()
    assert {file.name for file in write_plots(result, tmp_path)} == {"calibration.png", "calibration.svg"}
    assert "pairs" not in program.table({**result, "documents": 1})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write_plots(result, tmp_path) == []
    assert [record.message for record in caplog.records if "matplotlib is not installed" in record.message]
