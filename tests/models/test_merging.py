"""One stock model of several heads: averages of weights, and a student of the ensemble."""

import copy

import pytest
import torch
from conftest import token_ids, trained
from transformers import LlamaConfig, LlamaForCausalLM

from nt_hf import NeuroTrailsForCausalLM, check_masks, distillation_loss, merge_heads, with_student
from nt_hf.models.masks import masked_modules
from nt_hf.models.trails import tensors_of

VARIANTS = ["neurotrails", "full_ensemble", "tied", "tied_full_ensemble", "only_lm_heads"]
IDS = token_ids()[5000 : 5000 + 3 * 40].view(3, 40).clone()
LABELS = torch.nn.functional.pad(IDS[:, 1:], (0, 1), value=-100)


# merging


@pytest.mark.parametrize("model", VARIANTS, indirect=True)
def test_equal_heads_merge_to_their_trail(model):
    stock = model.extract_trail(1)
    merged = merge_heads(NeuroTrailsForCausalLM.from_stock(stock, num_ensemble_heads=3, blocks_in_head=2))
    assert type(merged) is model.stock_class and merged.generation_config is not stock.generation_config
    expected = tensors_of(stock)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors_of(merged).items())
    assert torch.equal(merged(IDS).logits, stock(IDS).logits)


@pytest.mark.parametrize("model", VARIANTS, indirect=True)
def test_merged_weights_are_the_mean(model):
    before = copy.deepcopy(model.state_dict())
    trails = [tensors_of(model.extract_trail(head)) for head in range(model.config.num_ensemble_heads)]
    for name, merged in tensors_of(merge_heads(model)).items():
        torch.testing.assert_close(merged, torch.stack([trail[name] for trail in trails]).mean(0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_some_heads_merge(model):
    trails = [tensors_of(model.extract_trail(head)) for head in (2, 0)]
    name = "model.layers.2.mlp.up_proj.weight"
    merged = tensors_of(merge_heads(model, [2, 0]))[name]
    torch.testing.assert_close(merged, (trails[0][name] + trails[1][name]) / 2)
    assert torch.equal(merged == 0, (trails[0][name] == 0) & (trails[1][name] == 0))  # active where a head is
    with pytest.raises(ValueError, match=r"heads=\[3\]: accepted are .* heads of 0 to 2"):
        merge_heads(model, [3])


def test_weights_of_half_precision_are_averaged_in_full():
    name = "lm_head.weight"
    model = copy.deepcopy(NeuroTrailsForCausalLM.from_stock(small(), num_ensemble_heads=3)).bfloat16()
    for head, value in enumerate((1.0, 1.0, 1.0 + 2**-7)):
        torch.nn.init.constant_(model.lm_heads[head].weight, value)
    assert (tensors_of(merge_heads(model))[name] == torch.tensor(1 + 2**-7 / 3).bfloat16()).all()


def test_heads_that_began_as_copies_have_a_good_mean():
    stock = trained("dense").extract_trail(0)
    model = NeuroTrailsForCausalLM.from_stock(stock, num_ensemble_heads=3, blocks_in_head=2).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        starts = torch.randint(20_000, (3, 6, 1), generator=generator)  # a batch for each head
        ids = token_ids()[starts + torch.arange(48)]
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    held_out = token_ids()[20_100 : 20_100 + 40 * 64].view(64, 40)
    with torch.no_grad():
        heads = model.eval()(held_out, labels=held_out).head_losses
        merged = merge_heads(model)(held_out, labels=held_out).loss
        before = stock(held_out, labels=held_out).loss
    assert merged < heads.mean() < before


def small():
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    )


# distillation


def test_the_loss_is_hintons():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 7, generator=generator)
    labels = torch.randint(7, (3, 5), generator=generator)
    labels[0, :2] = -100
    student.requires_grad_(), teacher.requires_grad_()
    loss = distillation_loss(student, teacher, labels, alpha=0.3, temperature=4.0)
    expected = 0
    for row, position in (labels != -100).nonzero().tolist():
        soft, hard = (x[row, position].detach() for x in (teacher, student))
        p, q = torch.softmax(soft / 4, 0), torch.softmax(hard / 4, 0)
        divergence = (p * (p / q).log()).sum()
        expected += 0.3 * 16 * divergence - 0.7 * torch.softmax(hard, 0)[labels[row, position]].log()
    assert loss.item() == pytest.approx(expected.item() / 13, rel=1e-5)
    halved = distillation_loss(student, teacher, labels, alpha=0.3, temperature=4.0, count=26)
    assert halved.item() == pytest.approx(loss.item() / 2, rel=1e-6)
    loss.backward()
    assert teacher.grad is None and student.grad[0, :2].eq(0).all() and student.grad[0, 2:].ne(0).any()


def test_a_student_that_says_the_same_has_only_the_cross_entropy():
    logits, labels = torch.randn(4, 7, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 2, -100, 3])
    plain = torch.nn.functional.cross_entropy(logits, labels)
    assert distillation_loss(logits, logits, labels, alpha=0.25).item() == pytest.approx(0.75 * plain.item(), rel=1e-6)
    assert distillation_loss(logits, logits, torch.full((4,), -100)).item() == 0


@pytest.mark.parametrize("model", ["neurotrails", "full_ensemble", "tied", "treenet"], indirect=True)
def test_the_student_is_one_more_head(model):
    grown, count = with_student(model, 1), model.config.num_ensemble_heads
    assert grown.config.num_ensemble_heads == count + 1
    logits = grown(IDS, output_head_logits=True).head_logits
    assert torch.equal(logits[:count], model(IDS, output_head_logits=True).head_logits)
    assert torch.equal(logits[count], logits[1]) and not check_masks(grown)
    masks = {name.replace(f"heads.{count}.", "heads.1.") for name in masked_modules(grown)}
    assert masks == set(masked_modules(model))
    assert not {x.data_ptr() for x in grown.parameters()} & {x.data_ptr() for x in model.parameters()}
    with pytest.raises(ValueError, match=r"active_heads=\[7\]"):
        with_student(model, 7)


def test_a_student_comes_nearer_to_the_ensemble(model):
    grown = with_student(model, 0).train()
    frozen = copy.deepcopy(grown.state_dict())
    own = [p for module in grown.head_modules(3).values() for p in module.parameters(recurse=False)]
    grown.requires_grad_(False)
    for parameter in own:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(own, lr=1e-3)

    def divergence():
        with torch.no_grad():
            logits = grown(IDS, output_head_logits=True).head_logits
            return distillation_loss(logits[3], logits[:3].mean(0), LABELS, alpha=1.0, temperature=1.0).item()

    first = divergence()
    for _ in range(20):
        logits = grown(IDS, output_head_logits=True).head_logits
        optimizer.zero_grad()
        distillation_loss(logits[3], logits[:3].mean(0), LABELS, alpha=1.0).backward()
        optimizer.step()
    assert 0 < divergence() < 0.5 * first
    moved = {name for name, value in grown.state_dict().items() if not torch.equal(value, frozen[name])}
    assert moved and all("heads.3." in name for name in moved)
    stock = grown.extract_trail(3)
    assert torch.equal(stock.eval()(IDS).logits, grown.eval()(IDS, active_heads=[3]).logits)
