"""Uncertainty of each token: the measures, what forward and generate return, and the example that shows them."""

import itertools
import math
import os
import runpy
import subprocess
import sys
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from conftest import BOS, EOS, OFFSET, PAD, SIZES, VARIANTS, script, trained
from transformers import (
    CompileConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StoppingCriteria,
)
from transformers.utils import logging

from nt_hf import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM, Uncertainty
from nt_hf.models import ensemble

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "uncertainty.py"
NAMES = ["predictive_entropy", "mutual_information", "disagreement"]
SPACE = ord(" ") + OFFSET


def brute_force(head_logits):
    """The measures from logits ``[M, ..., vocab]`` in fp64, mutual information as a mean divergence from the mean."""
    p = head_logits.double().softmax(-1)
    mean = p.mean(0)
    pairs = list(itertools.combinations(p.argmax(-1), 2))
    return {
        "predictive_entropy": -torch.xlogy(mean, mean).sum(-1),
        "mutual_information": (torch.xlogy(p, p) - torch.xlogy(p, mean)).sum(-1).mean(0),
        "disagreement": sum((a != b).double() for a, b in pairs) / max(len(pairs), 1) + torch.zeros_like(mean[..., 0]),
    }


def assert_equal(ours, theirs, atol=1e-5):
    assert list(ours) == list(theirs) == NAMES
    for name in NAMES:
        assert ours[name].dtype == torch.float32
        torch.testing.assert_close(ours[name].double(), theirs[name].double(), atol=atol, rtol=0, equal_nan=True)


# The measures


@pytest.mark.parametrize("mode", ["logits", "probs"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_measures_what_the_formulas_say(variant, mode, prompts):
    torch.manual_seed(0)
    model = NeuroTrailsLlamaForCausalLM(NeuroTrailsLlamaConfig(**SIZES, **VARIANTS[variant], ensemble_mode=mode))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.6)  # heads that differ, which takes longer to train
    output = model(**prompts, output_uncertainty=True, output_head_logits=True)
    assert isinstance(output.uncertainty, Uncertainty) and model(**prompts).uncertainty is None
    assert_equal(output.uncertainty, brute_force(output.head_logits))
    if len(model.lm_heads) > 1:
        assert output.uncertainty.mutual_information.max() > 0.1 and output.uncertainty.disagreement.any()
    if mode == "probs":  # then the ensemble's own entropy is the predictive one
        p = output.logits.softmax(-1)
        torch.testing.assert_close(-torch.xlogy(p, p).sum(-1), output.uncertainty.predictive_entropy)


def test_the_measures_of_known_distributions():
    certain, even = torch.tensor([1e4, 0.0, -math.inf, 0.0]), torch.tensor([0.0, 0.0, -math.inf, -math.inf])
    table = [
        ([certain, certain.flip(0)], [math.log(2), math.log(2), 1.0]),  # each sure of another token
        ([even, even, even], [math.log(2), 0.0, 0.0]),  # equally unsure
        ([even], [math.log(2), 0.0, 0.0]),
        ([certain, certain, certain.roll(1)], [math.log(3) - math.log(4) / 3] * 2 + [2 / 3]),
    ]
    for heads, expected in table:
        for name, value in zip(NAMES, expected):
            torch.testing.assert_close(ensemble.uncertainty(heads)[name], torch.tensor(value), msg=f"{name} {heads}")


@pytest.mark.parametrize("positions", [1, 7, 1000])
def test_chunks_do_not_matter_and_need_little_memory(positions, monkeypatch):
    heads = [torch.randn(4, 50, 260) for _ in range(3)]
    monkeypatch.setattr(ensemble, "UNCERTAINTY_CHUNK", positions * 260)
    assert_equal(ensemble.uncertainty(heads), brute_force(torch.stack(heads)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ensemble.uncertainty(heads)
    largest = max(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    assert largest <= max(positions, 8) * 260 * 4 and (largest >= 200 * 260 * 4) == (positions == 1000)


def test_one_or_equal_heads_have_entropy_but_no_mutual_information(model, prompts):
    one = model(**prompts, output_uncertainty=True, active_heads=[1]).uncertainty
    assert not one.mutual_information.any() and not one.disagreement.any() and (one.predictive_entropy > 0.1).all()
    equal = NeuroTrailsLlamaForCausalLM.from_stock(model.extract_trail(1), num_ensemble_heads=3, blocks_in_head=1)
    ours = equal(**prompts, output_uncertainty=True).uncertainty
    assert ours.mutual_information.min() >= 0 and ours.mutual_information.max() < 2e-6 and not ours.disagreement.any()
    torch.testing.assert_close(ours.predictive_entropy, one.predictive_entropy, atol=1e-5, rtol=0)


def test_positions_and_heads_are_those_asked_for(model, prompts):
    whole = model(**prompts, output_uncertainty=True).uncertainty
    for keep, index in ((2, slice(-2, None)), (torch.tensor([3, 5]), [3, 5])):
        ours = model(**prompts, output_uncertainty=True, logits_to_keep=keep).uncertainty
        assert_equal(ours, {name: values[:, index] for name, values in whole.items()})
    head_logits = model(**prompts, output_head_logits=True).head_logits
    ours = model(**prompts, output_uncertainty=True, active_heads=[2, 0]).uncertainty
    assert_equal(ours, brute_force(head_logits[[2, 0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_fp32(model, prompts, dtype):
    output = model.to(dtype)(**prompts, output_uncertainty=True, output_head_logits=True)
    assert output.head_logits.dtype == dtype
    assert_equal(output.uncertainty, brute_force(output.head_logits))


def test_training_with_labels_measures_without_gradients(model, batch):
    expected = model(**batch, output_uncertainty=True)
    ours = model.train()(**batch, output_uncertainty=True)
    assert_equal(ours.uncertainty, expected.uncertainty)
    assert not any(values.requires_grad for values in ours.uncertainty.values())
    assert model(**batch).uncertainty is None and model(**batch).logits is None
    torch.testing.assert_close(ours.loss, expected.loss)


# The mean of the heads' logits


@pytest.mark.parametrize("mode", ["logits", "probs"])
def test_combining_changes_no_logits_and_passes_gradients(mode):
    heads = torch.randn(3, 4, 9, dtype=torch.float64, requires_grad=True)
    reference = heads.mean(0) if mode == "logits" else heads.float().softmax(-1).mean(0).log()
    before, weights = heads.detach().clone(), torch.randn(4, 9)
    (expected,) = torch.autograd.grad((reference * weights).sum(), heads)
    for logits in (heads, list(heads), iter(heads)):
        combined = ensemble.combine_logits(logits, mode)
        (ours,) = torch.autograd.grad((combined * weights).sum(), heads)
        torch.testing.assert_close(combined, reference)
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(heads, before)


@pytest.mark.parametrize("asked", [{}, {"output_head_logits": True}, {"output_uncertainty": True}], ids=str)
def test_the_logits_of_several_heads_exist_together_only_where_they_are_needed(model, prompts, asked):
    alive, most = [], []

    def watch(module, inputs, output):
        most.append(sum(reference() is not None for reference in alive))
        alive.append(weakref.ref(output))

    for lm_head in model.lm_heads:
        lm_head.register_forward_hook(watch)
    with torch.no_grad():
        model(**prompts, **asked)
    assert max(most) == (2 if asked else 0)


# Generation

WAYS = {
    "greedy": {},
    "greedy_eos": {"eos_token_id": SPACE},
    "two_eos": {"eos_token_id": [SPACE, ord("e") + OFFSET], "pad_token_id": SPACE},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.5, "eos_token_id": SPACE},
    "several": {"do_sample": True, "num_return_sequences": 2, "repetition_penalty": 1.3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams_eos": {"num_beams": 3, "num_return_sequences": 3, "eos_token_id": SPACE},
    "sampled_beams": {"num_beams": 3, "do_sample": True, "temperature": 1.5},
    "uncached": {"use_cache": False, "eos_token_id": SPACE},
    "uncached_beams": {"use_cache": False, "num_beams": 3},
    "static": {"cache_implementation": "static", "eos_token_id": SPACE},
    "static_beams": {"cache_implementation": "static", "num_beams": 2},
    "chunked_prefill": {"prefill_chunk_size": 6},
    "all_logits": {"logits_to_keep": 0},
    "two_heads": {"active_heads": [2, 0]},
}
ALONE = {
    "prompt_lookup": {"prompt_lookup_num_tokens": 3},
    "prompt_lookup_eos": {"prompt_lookup_num_tokens": 3, "eos_token_id": SPACE},
    "sampled_prompt_lookup": {"prompt_lookup_num_tokens": 3, "do_sample": True, "top_k": 5},
    "draft": {"assistant_model": 1},
    "sampled_draft": {"assistant_model": 1, "do_sample": True},
    "own_draft": {"assistant_model": None},
}


def generate(model, inputs, **options):
    torch.manual_seed(0)
    options = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_uncertainty": True, **options}
    return model.generate(**inputs, **options)


def finished(tokens, eos):
    """Which tokens ``[rows, n]`` come after the first one of ``eos``."""
    eos = {eos} if isinstance(eos, int) else set(eos)
    rows = [[any(token in eos for token in row[:i]) for i in range(len(row))] for row in tokens.tolist()]
    return torch.tensor(rows)


def assert_equal_to_one_pass(model, inputs, outputs, eos_token_id=EOS, active_heads=None):
    """Compares with one forward pass over the finished sequences, ``NaN`` after their ends."""
    width = inputs["input_ids"].shape[1]
    tokens = outputs.sequences[:, width:]
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    mask = mask.repeat_interleave(len(tokens) // len(mask), 0)
    mask = torch.cat([mask, torch.ones_like(tokens)], 1)[:, :-1]
    ids = outputs.sequences[:, :-1]
    logits = model(ids, attention_mask=mask, active_heads=active_heads, output_head_logits=True).head_logits
    ended = finished(tokens, eos_token_id)
    expected = {name: x.masked_fill(ended, math.nan) for name, x in brute_force(logits[:, :, width - 1 :]).items()}
    assert_equal(outputs.uncertainty, expected, atol=2e-5)
    return ended


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", ["neurotrails"], indirect=True)
def test_generation_measures_what_one_pass_over_the_sequences_does(model, prompts, way):
    options = WAYS[way]
    outputs = generate(model, prompts, **options)
    same = {key: value for key, value in options.items() if key in ("eos_token_id", "active_heads")}
    ended = assert_equal_to_one_pass(model, prompts, outputs, **same)
    assert ended.any() == ("eos_token_id" in options)  # Else it would prove little.
    plain = generate(model, prompts, **options, output_uncertainty=False)
    assert torch.equal(outputs.sequences, plain.sequences) and "uncertainty" not in plain


@pytest.mark.parametrize("way", ALONE)
def test_assisted_decoding_measures_every_accepted_token(model, prompts, way):
    options = dict(ALONE[way])
    if "assistant_model" in options:
        head = options["assistant_model"]
        options["assistant_model"] = model.extract_trail(head) if head is not None else model
    steps = []
    model.lm_heads[0].register_forward_hook(lambda *_: steps.append(1))
    for row, length in enumerate((5, 16, 9)):
        inputs = {"input_ids": prompts["input_ids"][row : row + 1, -length:]}
        outputs = generate(model, inputs, **options)
        assert_equal_to_one_pass(model, inputs, outputs, options.get("eos_token_id", EOS))
    if way == "prompt_lookup":
        assert len(steps) - 3 < 3 * 12  # Some steps gave several tokens.


def test_beams_change_places(model, prompts):
    # Else the tests of beams would prove little.
    rows = generate(model, prompts, **WAYS["beams"]).beam_indices
    assert (rows != rows[:, :1]).any()


def test_no_second_forward_pass(model, prompts):
    def calls(**options):
        counts = []
        hook = model.register_forward_hook(lambda *_: counts.append(1))
        generate(model, prompts, **options)
        hook.remove()
        return len(counts)

    assert calls() == calls(output_uncertainty=False) == 12


class EndsRowOne(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.arange(len(input_ids)) == (1 if input_ids.shape[1] >= 16 + 4 else -1)


def test_padding_after_another_stopping_criterion_has_no_uncertainty(model, prompts):
    outputs = generate(model, prompts, stopping_criteria=[EndsRowOne()])
    expected = torch.zeros(3, 12, dtype=torch.bool)
    expected[1, 4:] = True
    assert torch.equal(outputs.sequences[:, 16:] == PAD, expected)
    assert torch.equal(outputs.uncertainty.mutual_information.isnan(), expected)


def test_prompts_may_be_embeddings_or_absent(model, prompts):
    expected = generate(model, prompts).uncertainty
    embeds = model.get_input_embeddings()(prompts["input_ids"])
    outputs = generate(model, {"inputs_embeds": embeds, "attention_mask": prompts["attention_mask"]})
    assert outputs.sequences.shape == (3, 12)
    assert_equal(outputs.uncertainty, expected)
    outputs = generate(model, {})
    assert_equal_to_one_pass(model, {"input_ids": torch.tensor([[BOS]])}, outputs)
    renamed = {"inputs": prompts["input_ids"], "attention_mask": prompts["attention_mask"]}
    assert_equal(generate(model, renamed).uncertainty, expected)


def test_threads_that_share_a_model_do_not_mix(model, prompts):
    rows = [{"input_ids": prompts["input_ids"][row : row + 1, -5:]} for row in range(3)] * 2
    serial = [generate(model, row) for row in rows]
    with ThreadPoolExecutor(3) as threads:
        parallel = list(threads.map(lambda row: generate(model, row), rows))
    for ours, theirs in zip(parallel, serial):
        assert_equal(ours.uncertainty, theirs.uncertainty)


@pytest.mark.slow
def test_a_compiled_step_is_recorded(model, prompts):
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    outputs = generate(model, prompts, cache_implementation="static", compile_config=config)
    assert_equal_to_one_pass(model, prompts, outputs)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"return_dict_in_generate": False}, "return_dict_in_generate=False.*accepted is True"),
        ({"return_dict_in_generate": None}, "return_dict_in_generate=(None|False).*accepted is True"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "'contrastive_search': accepted are greedy_search, .*assisted_generation"),
        ({"dola_layers": "low"}, "'dola_generation': accepted are"),
        ({"custom_generate": lambda *_, **__: None}, "without custom_generate"),
        ({"cache_implementation": "paged"}, "without .*paged"),
    ],
)
def test_what_cannot_be_recorded_is_refused_in_one_line(model, prompts, options, match):
    with pytest.raises(ValueError, match=match) as error:
        generate(model, prompts, **options)
    assert "\n" not in str(error.value) and "output_uncertainty=True" in str(error.value)


# The example


@pytest.fixture(scope="module")
def example():
    return script("examples/uncertainty.py")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    trained("neurotrails").save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.slow
def test_the_example_runs_without_the_package(checkpoint, model, tmp_path):
    program = "import sys, runpy; sys.modules['nt_hf'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "NO_COLOR"))}
    arguments = ["--model", checkpoint, "--prompt", "The best way to", "--max_new_tokens", "6"]
    result = subprocess.run(
        [sys.executable, "-I", "-c", program, EXAMPLE, *arguments],
        cwd=tmp_path,
        env={**kept, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
    )
    assert result.returncode == 0 and not result.stderr, result.stderr[-2000:]
    ids = torch.tensor([list(b"The best way to")]) + OFFSET
    torch.manual_seed(0)
    options = {"max_new_tokens": 6, "do_sample": True, "top_k": 40, "output_uncertainty": True}
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **options)
    rows = [line.split()[-3:] for line in result.stdout.splitlines()[1:]]
    for column, name in enumerate(NAMES):
        printed = [float(row[column]) for row in rows]
        assert printed == pytest.approx(output.uncertainty[name][0].tolist(), abs=6e-3)


def test_generated_text_does_not_command_the_terminal(example, checkpoint, model, monkeypatch, capsys):
    ids = torch.tensor([[*b"a", *b"\x1b\n\r"]]) + OFFSET
    measures = {name: torch.ones(1, 3) for name in NAMES}
    written = types.SimpleNamespace(sequences=ids, uncertainty=measures)
    monkeypatch.setattr(NeuroTrailsLlamaForCausalLM, "generate", lambda *_, **__: written)
    example.main(["--model", str(checkpoint), "--prompt", "a"])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\r" not in printed and len(printed.splitlines()) == 4


def test_a_directory_without_a_fitting_model_is_one_clear_line(example, tmp_path, monkeypatch):
    verbosity = logging.get_verbosity()
    monkeypatch.setattr(sys, "argv", ["uncertainty.py", "--model", str(tmp_path / "none"), "--prompt", "a"])
    with pytest.raises(SystemExit, match=r"^error: .*none"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    logging.set_verbosity(verbosity)
    byte_tokenizer().save_pretrained(tmp_path)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a LlamaForCausalLM; accepted is a NeuroTrails checkpoint"):
        example.main(["--model", str(tmp_path), "--prompt", "a"])
