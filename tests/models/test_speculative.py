"""Self-speculative decoding gives what plain decoding of the ensemble gives, with fewer passes of the other heads."""

import copy
import itertools

import pytest
import torch
from conftest import VARIANTS
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList, TextStreamer

from nt_hf.models.drafters import verification_cost
from nt_hf.models.lm_heads import by_head
from nt_hf.models.speculative import MAX_DRAFT, DraftLength, Speculation, accept

SEVERAL_HEADS = [name for name in VARIANTS if name != "dense"]
ALONE = {"input_ids": torch.tensor([[104, 111, 119, 36]])}


def generate(model, prompts, **options):
    options = {"do_sample": False, "max_new_tokens": 23, "eos_token_id": None} | options
    return model.generate(**prompts, **options)


def all_drafts(model):
    """Every head, a trail as a model of its own, and a model that guesses badly, so that rows part."""
    other = model.extract_trail(0)
    with torch.no_grad():
        other.lm_head.weight.add_(0.3 * other.lm_head.weight.std() * torch.randn_like(other.lm_head.weight))
    return [*range(model.config.num_ensemble_heads), model.extract_trail(0), other]


def rows(prompts):
    """Each prompt alone, without its padding."""
    for ids, mask in zip(prompts["input_ids"], prompts["attention_mask"]):
        yield {"input_ids": ids[mask.bool()][None]}


# Greedy decoding


@pytest.mark.parametrize(
    ("model", "mode"),
    [*((variant, "logits") for variant in SEVERAL_HEADS), ("neurotrails", "probs")],
    indirect=["model"],
)
def test_greedy_tokens_are_those_of_plain_decoding(model, prompts, mode):
    model.config.ensemble_mode = mode
    for inputs in (prompts, *rows(prompts)):
        expected = generate(model, inputs)
        for draft in all_drafts(model):
            assert torch.equal(generate(model, inputs, trail_draft=draft), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 4},
        {"bad_words_ids": [[36]], "num_return_sequences": 1},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"eos_token_id": [36, 105], "pad_token_id": 0},
        {"active_heads": [2, 0]},
        {"active_heads": [0]},
        {"logits_to_keep": 1},
    ],
    ids=str,
)
def test_greedy_tokens_with_other_options(model, prompts, options):
    for inputs in (prompts, *rows(prompts)):
        expected = generate(model, inputs, **options)
        for draft in (0, model.extract_trail(1)):
            assert torch.equal(generate(model, inputs, trail_draft=draft, **options), expected)


def test_rows_that_end_early_are_padded_and_hold_nobody_up(model, prompts):
    plain = generate(model, prompts)
    new = plain[:, prompts["input_ids"].shape[1] :]
    ends = [new[0, 2].item(), new[1, 9].item()]  # tokens that end rows at different places
    options = {"eos_token_id": ends, "pad_token_id": 0}
    expected = generate(model, prompts, **options)
    assert (expected[0] == 0).any()
    for draft in all_drafts(model):
        assert torch.equal(generate(model, prompts, trail_draft=draft, **options), expected)


def test_a_row_that_a_criterion_ends_goes_on_until_the_last_one_ends(model, prompts):
    """Without an end-of-sequence token plain decoding gives every row the length of the longest."""

    class FirstRowAt(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            short = (input_ids == 0).sum(1) == 0  # the row without padding
            length = input_ids.shape[1] - prompts["input_ids"].shape[1]
            return (short & (length >= 3)) | torch.full_like(short, length >= 12)

    options = {"stopping_criteria": StoppingCriteriaList([FirstRowAt()])}
    expected = generate(model, prompts, **options)
    assert expected.shape[1] == prompts["input_ids"].shape[1] + 12
    for draft in all_drafts(model):
        assert torch.equal(generate(model, prompts, trail_draft=draft, **options), expected)


def test_rows_advance_apart(model, prompts):
    """A batch takes as many rounds as its slowest row alone, not as many as all refusals together ask for."""
    draft = all_drafts(model)[-1]

    def rounds(inputs):
        out = generate(model, inputs, trail_draft=draft, return_dict_in_generate=True, max_new_tokens=60)
        return out.speculation

    together, alone = rounds(prompts), [rounds(inputs) for inputs in rows(prompts)]
    assert sum(together.emitted) == sum(sum(one.emitted) for one in alone)
    # The length of a round follows from all rows, so the counts differ a little.
    assert len(together.drafted) <= 1.2 * max(len(one.drafted) for one in alone)
    assert all(one.refused for one in alone)


def test_a_prompt_of_embeddings(model, prompts):
    inputs = {"inputs_embeds": model.get_input_embeddings()(prompts["input_ids"])}
    inputs["attention_mask"] = prompts["attention_mask"]
    assert torch.equal(generate(model, inputs, trail_draft=0), generate(model, inputs))
    with pytest.raises(ValueError, match="a model with inputs_embeds: accepted are input_ids"):
        generate(model, inputs, trail_draft=model.extract_trail(0))


def test_continuing_from_a_cache(model):
    first = generate(model, ALONE, trail_draft=0, return_dict_in_generate=True, max_new_tokens=7)
    lengths = {layer.get_seq_length() for layer in first.past_key_values.layers}
    assert lengths == {first.sequences.shape[1] - 1}, "a cache entry was left over, or one is missing"
    expected = generate(model, ALONE, max_new_tokens=7 + 23)
    for draft in (0, model.extract_trail(0)):
        cache = copy.deepcopy(first.past_key_values)
        longer = generate(model, {"input_ids": first.sequences}, trail_draft=draft, past_key_values=cache)
        assert torch.equal(longer, expected)


def test_scores_and_logits_are_those_of_plain_decoding(model, prompts):
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    options |= {"repetition_penalty": 1.3}
    plain = generate(model, prompts, **options)
    for draft in all_drafts(model):
        drafted = generate(model, prompts, trail_draft=draft, **options)
        torch.testing.assert_close(torch.stack(drafted.scores), torch.stack(plain.scores), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.stack(drafted.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)


def test_uncertainty_is_that_of_plain_decoding(model, prompts):
    options = {"return_dict_in_generate": True, "output_uncertainty": True}
    plain = generate(model, prompts, **options).uncertainty
    for draft in all_drafts(model):
        drafted = generate(model, prompts, trail_draft=draft, **options).uncertainty
        for one, other in zip(drafted.to_tuple(), plain.to_tuple()):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_streamer_sees_every_token(model):
    class Recorder(TextStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Recorder()
    out = generate(model, ALONE, trail_draft=0, streamer=streamer)
    assert streamer.tokens == out[0].tolist() and streamer.ended


def test_bf16_models_decode(model, prompts):
    model.to(torch.bfloat16)
    assert generate(model, prompts, trail_draft=0).shape == generate(model, prompts).shape


# What is computed


@pytest.mark.parametrize("model", ["neurotrails", "no_backbone", "only_lm_heads"], indirect=True)
def test_nothing_of_a_draft_is_computed_again(model):
    calls = {"backbone": 0, "heads": [0] * 3}

    def count(head):
        def hook(module, args, output):
            calls["heads"][head] += 1

        return hook

    for h, lm_head in enumerate(model.lm_heads):
        lm_head.register_forward_hook(count(h))
    if len(model.model.layers):
        model.model.layers[0].register_forward_hook(lambda *_: calls.update(backbone=calls["backbone"] + 1))
    out = generate(model, ALONE, trail_draft=1, return_dict_in_generate=True)
    rounds, positions = len(out.speculation.drafted), sum(out.speculation.drafted)
    assert sum(out.speculation.emitted) == 23 - 1 and rounds < 22
    # and each once for the prompt
    assert calls["heads"] == [rounds + 1, positions + 1, rounds + 1]
    assert calls["backbone"] == (positions + 1 if len(model.model.layers) else 0)


def test_heads_from_backbone_states_equal_heads_from_tokens(model, prompts):
    with torch.no_grad():
        whole = model.model(**prompts)
        again = model.model(
            backbone_states=whole.backbone_states, attention_mask=prompts["attention_mask"], active_heads=[2, 0]
        )
    size = model.config.hidden_size
    assert torch.equal(by_head(again.last_hidden_state, size), by_head(whole.last_hidden_state, size)[[2, 0]])


# Sampling


def test_accepted_and_refused_drafts_together_follow_the_target():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    target, draft = torch.rand(2, 1, 6, generator=generator).softmax(-1) ** torch.tensor([[[3.0]], [[1.0]]])
    target, draft = target / target.sum(), draft / draft.sum()
    target[0, 2] = draft[0, 4] = 0
    target, draft = target / target.sum(), draft / draft.sum()
    n = 200_000
    token = torch.multinomial(draft[0], n, replacement=True)
    tokens, accepted = accept(target.expand(n, -1), draft.expand(n, -1), token)
    assert torch.equal(tokens[accepted], token[accepted]) and not accepted.all()
    shares = torch.bincount(tokens, minlength=6) / n
    torch.testing.assert_close(shares, target[0], atol=0.005, rtol=0)
    # The share of accepted drafts is what the two distributions have in common (Leviathan et al., theorem 3.5).
    assert abs(accepted.float().mean() - torch.minimum(target, draft).sum()) < 0.005
    alone, stands = accept(target.expand(n, -1), None, None)
    torch.testing.assert_close(torch.bincount(alone, minlength=6) / n, target[0], atol=0.005, rtol=0)
    assert stands.all()


def test_equal_distributions_accept_everything():
    probs = torch.rand(1000, 5).softmax(-1)
    token = torch.multinomial(probs, 1).squeeze(1)
    tokens, accepted = accept(probs, probs, token)
    assert accepted.all() and torch.equal(tokens, token)


@pytest.mark.slow
@pytest.mark.parametrize("drafts_by", ["a head", "a model"])
def test_sampled_sequences_follow_the_ensembles_distribution(model, drafts_by):
    """Frequencies of the first three tokens, in batches whose rows part."""
    draft = 0 if drafts_by == "a head" else all_drafts(model)[-1]
    options = {"do_sample": True, "top_k": 3, "temperature": 1.3}
    exact = {}
    with torch.no_grad():
        for first, second, third in itertools.product(range(3), repeat=3):
            ids, chance = ALONE["input_ids"], 1.0
            for rank in (first, second, third):
                top = (model(ids).logits[0, -1] / 1.3).topk(3)
                chance *= top.values.softmax(-1)[rank].item()
                ids = torch.cat([ids, top.indices[rank].view(1, 1)], 1)
            exact[tuple(ids[0, -3:].tolist())] = chance
    assert abs(sum(exact.values()) - 1) < 1e-5
    torch.manual_seed(0)
    counts, total = dict.fromkeys(exact, 0), 0
    prompts = {"input_ids": ALONE["input_ids"].expand(6, -1)}
    for _ in range(400):
        out = generate(model, prompts, trail_draft=draft, max_new_tokens=3, **options)
        for row in out[:, -3:].tolist():
            counts[tuple(row)] += 1  # a KeyError: a token outside the three best
            total += 1
    # Rows of a call are independent; 5 standard deviations of 27 shares are exceeded once in 60,000 seeds.
    for tokens, chance in exact.items():
        deviation = (chance * (1 - chance) / total) ** 0.5
        assert abs(counts[tokens] / total - chance) < 5 * deviation + 1e-9, tokens


def test_a_seed_repeats_the_samples(model, prompts):
    def sample():
        torch.manual_seed(3)
        return generate(model, prompts, trail_draft=0, do_sample=True)

    assert torch.equal(sample(), sample())


# The length of drafts


def positions(length, confidences, limit=MAX_DRAFT, apart=True):
    """Of a round whose drafts all have the same confidences, one of each row."""
    length.begin(limit, apart)
    count = 1
    while length.goes_on(confidences):
        count += 1
    return count


def learnt(accepted, cost=1.5, confidence=0.5, rounds=200):
    """After rounds in which ``accepted`` of ten drafts stood."""
    length = DraftLength(cost)
    for i in range(rounds):
        length.begin(2, True)
        length.goes_on([confidence])
        length.add([int(i % 10 < accepted)], [i % 10 >= accepted])
    return length


def test_drafts_grow_with_acceptance_and_with_the_cost_of_verifying():
    by_acceptance = [positions(learnt(accepted), [0.5]) for accepted in range(11)]
    assert by_acceptance == sorted(by_acceptance) and by_acceptance[0] == 1 and by_acceptance[-1] == MAX_DRAFT
    by_cost = [positions(learnt(8, cost), [0.5]) for cost in (0.1, 0.5, 1.5, 5.0)]
    assert by_cost == sorted(by_cost) and by_cost[0] < by_cost[-1]
    assert positions(learnt(10), [0.5], limit=3) == 3


def test_a_round_ends_where_drafts_of_its_confidence_did_not_stand():
    length = learnt(0, confidence=0.15)
    assert positions(length, [0.15]) == 1 and positions(length, [0.95]) > 1 and positions(length, [1.0]) > 1
    # Two rows go on as long as they gain together; rows that do not advance apart only if all drafts stand.
    assert positions(length, [0.15, 0.95]) >= positions(length, [0.15, 0.95], apart=False) == 1


def test_a_length_that_shrank_tries_again():
    length = learnt(0)

    def longer_after_a_round() -> bool:
        length.add([0], [False])  # nothing was drafted, so nothing is seen
        return positions(length, [0.5]) > 1

    assert next(count for count in range(300) if longer_after_a_round()) > 10


def test_the_cost_of_verifying_counts_weights(model):
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    lm_head = model.lm_heads[0].weight.numel()
    cost = verification_cost(model, 0, [1, 2])
    assert cost == 2 * (2 * block + lm_head) / (3 * block + lm_head)
    assert verification_cost(model, 1, []) == 0


def test_the_acceptance_rate_counts_drafts_looked_at():
    # Rounds of 4, 4 and 2 positions have 3, 3 and 1 drafts; the second refuses its second draft, hides its third.
    speculation = Speculation(drafted=[4, 4, 2], emitted=[4, 2, 2], accepted=[3, 1, 1], refused=[0, 1, 0])
    assert speculation.acceptance_rate == (3 + 1 + 1) / (3 + 2 + 1)
    assert Speculation().acceptance_rate == 0


def test_a_call_reports_its_rounds(model):
    out = generate(model, ALONE, trail_draft=0, return_dict_in_generate=True)
    rounds = out.speculation
    assert all(1 <= emitted <= drafted for emitted, drafted in zip(rounds.emitted, rounds.drafted))
    assert all(emitted < drafted for emitted, drafted, no in zip(rounds.emitted, rounds.drafted, rounds.refused) if no)
    assert 0 < rounds.acceptance_rate <= 1


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trail_draft": 3}, r"trail_draft=3: accepted is one of the active heads \[0, 1, 2\] or a model"),
        ({"trail_draft": True}, "trail_draft=True: accepted"),
        ({"trail_draft": 0, "active_heads": [1, 2]}, r"one of the active heads \[1, 2\]"),
        ({"trail_draft": 0, "num_beams": 2}, "generation mode 'beam_search': accepted are greedy_search, sample"),
        ({"trail_draft": 0, "use_cache": False}, "use_cache=False: accepted is the default cache"),
        ({"trail_draft": 0, "cache_implementation": "static"}, "StaticCache: accepted is the default cache"),
        ({"trail_draft": 0, "return_dict_in_generate": True, "output_attentions": True}, "output_attentions"),
        ({"trail_draft": 0, "synced_gpus": True}, "synced_gpus=True: accepted is False"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_clear_line(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **options)


def test_a_draft_of_another_vocabulary_is_refused(model):
    config = copy.deepcopy(model.extract_trail(0).config)
    config.vocab_size += 1
    with pytest.raises(ValueError, match=r"trail_draft: a model with vocab_size=(\d+): accepted is \d+"):
        generate(model, ALONE, trail_draft=model.stock_class(config))


def test_an_own_cache_works(model):
    cache = DynamicCache(config=model.config)
    assert torch.equal(generate(model, ALONE, trail_draft=0, past_key_values=cache), generate(model, ALONE))
