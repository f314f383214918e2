"""A sparse checkpoint runs without its dense weights: the same results, the same names, and nothing silently wrong."""

import copy

import pytest
import torch
from conftest import draw_masks, slow, trained
from families import tiny_model, tokens
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from nt_hf import NeuroTrailsForCausalLM, NeuroTrailsForImageClassification, apply_masks
from nt_hf.inference import compiled, load_sparse, restore, sparse_weights, specialize
from nt_hf.inference.compiled import BitmapRows, CompressedRows, bitmaps
from nt_hf.inference.sparse_weights import SparseParameter, is_sparse
from nt_hf.models.masks import attach_masks, count_active, masked_modules, pack_mask, set_mask

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="no compiler here: g++ or $CXX builds the kernels")
VARIANTS = pytest.mark.parametrize("model", ["neurotrails", "full_ensemble", "only_lm_heads", "tied"], indirect=True)
bitmaps_only = pytest.mark.skipif(not bitmaps(), reason="this CPU has no AVX-512 VBMI2 and BF16")
ROWS = (1, 2, 8, 9, 17, 130)


@pytest.fixture
def path(model, tmp_path):
    """A sparse checkpoint of the model, at density 0.3."""
    draw_masks(model, 0.3)
    model.save_pretrained(tmp_path / "sparse", sparse=True)
    return tmp_path / "sparse"


def sparse_ones(model):
    return {name: weight for name, weight in model.named_parameters() if isinstance(weight, SparseParameter)}


def same_bits(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)) for name, tensor in ours.items()
    )


# -------------------------------------------------------------------------------------------------- compressed rows


@pytest.mark.parametrize("density", [0.0, 0.003, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 13), (4, 256), (3, 257), (7, 3000)])
def test_compressed_rows_keep_every_bit(shape, dtype, density):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < density
    weight = torch.randn(shape).to(dtype)
    weight.view(-1)[::7], weight.view(-1)[::5] = torch.nan, -0.0
    weight.masked_fill_(~mask, 0)
    forms = [CompressedRows, *([BitmapRows] if dtype == torch.bfloat16 and bitmaps() else [])]
    parts = weight[mask], pack_mask(mask), shape
    for rows in [made for form in forms for made in (form.of_mask(*parts), form.of_dense(weight))]:
        assert torch.equal(rows.dense().view(torch.uint8), weight.view(torch.uint8))
        chosen = torch.tensor([[0, shape[0] - 1, 0]])
        assert torch.equal(rows.dense_rows(chosen).view(torch.uint8), weight[chosen].view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distance", [254, 255, 256, 510, 511, 766])
def test_columns_far_apart(dtype, distance):
    weight = torch.zeros(2, 2 * distance + 1, dtype=dtype)
    weight[0, ::distance], weight[1, -1] = 1, 2
    rows = CompressedRows.of_dense(weight)
    assert torch.equal(rows.dense(), weight)
    for count in ROWS:
        x = torch.randn(count, weight.shape[1]).to(dtype)
        torch.testing.assert_close(rows.linear(x, None), x @ weight.T)


def test_more_columns_than_16_bits():
    weight = torch.zeros(3, 70_000)
    weight[:, ::9_999], weight[1, -1] = 1, 2
    x = torch.randn(2, 70_000)
    torch.testing.assert_close(CompressedRows.of_dense(weight).linear(x, None), x @ weight.T)


@pytest.mark.parametrize("form", [CompressedRows, pytest.param(BitmapRows, marks=bitmaps_only)])
def test_rows_that_are_not_there(form):
    with pytest.raises(IndexError, match="accepted are 0 to 1"):
        form.of_dense(torch.ones(2, 3, dtype=torch.bfloat16)).dense_rows(torch.tensor([2]))


@bitmaps_only
@pytest.mark.parametrize("bias", [None, torch.arange(40.0)])
def test_many_tokens_by_a_bitmap_multiply_its_dense_rows_in_parts(monkeypatch, bias):
    monkeypatch.setattr(BitmapRows, "SLAB", 7 * 50)
    weight = torch.where(torch.rand(40, 50) < 0.3, torch.randn(40, 50), 0.0).to(torch.bfloat16)
    x = torch.randn(BitmapRows.FEW + 1, 50, dtype=torch.bfloat16)
    expected = nn.functional.linear(x.float(), weight.float(), bias)
    torch.testing.assert_close(BitmapRows.of_dense(weight).linear(x, bias).float(), expected, rtol=2**-7, atol=0.02)


@bitmaps_only
def test_a_mask_may_lie_anywhere():
    mask = torch.rand(16, 64) < 0.3
    weight = torch.where(mask, torch.randn(16, 64), 0.0).to(torch.bfloat16)
    for shift in range(4):
        memory = torch.zeros(shift + 16 * 8, dtype=torch.uint8)
        memory[shift:] = pack_mask(mask).view(-1)
        rows = BitmapRows.of_mask(weight[mask], memory[shift:], (16, 64))
        assert rows.bits.data_ptr() % 4 == 0 and torch.equal(rows.dense(), weight)


@bitmaps_only
def test_a_change_of_type_changes_to_the_form_that_fits():
    for density, form in ((0.05, CompressedRows), (0.3, BitmapRows)):
        weight = torch.where(torch.rand(40, 50) < density, torch.randn(40, 50), 0.0)
        rows = CompressedRows.of_dense(weight).to(torch.bfloat16)
        assert type(rows) is form and torch.equal(rows.dense(), weight.to(torch.bfloat16))
        back = rows.to(torch.float32)
        assert type(back) is CompressedRows and torch.equal(back.dense(), weight.to(torch.bfloat16).float())


# ------------------------------------------------------------------------------------------------------ whole models


@VARIANTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_gives_the_dense_tokens(model, path, prompts, dtype):
    dense, sparse = NeuroTrailsForCausalLM.from_pretrained(path, dtype=dtype), load_sparse(path, dtype=dtype)
    assert type(sparse) is type(dense) and sparse.dtype == dtype and not sparse.training
    # A tied weight is the embedding's.
    assert sparse_ones(sparse).keys() == masked_modules(dense).keys() == masked_modules(sparse).keys()
    for heads in (None, [0]):
        options = {"max_new_tokens": 12, "do_sample": False, "active_heads": heads, "output_uncertainty": True}
        ours, theirs = (
            m.generate(**prompts, **options, output_logits=True, return_dict_in_generate=True) for m in (sparse, dense)
        )
        if dtype == torch.float32:
            assert torch.equal(ours.sequences, theirs.sequences)
            torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
            for name in ("predictive_entropy", "mutual_information"):
                one, other = (getattr(output.uncertainty, name) for output in (ours, theirs))
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, equal_nan=True)
        else:
            torch.testing.assert_close(ours.logits[0], theirs.logits[0], rtol=0.05, atol=0.1)


@VARIANTS
def test_restore_gives_what_from_pretrained_does(model, path):
    sparse, dense = load_sparse(path), NeuroTrailsForCausalLM.from_pretrained(path)
    restore(sparse)
    assert not is_sparse(sparse) and same_bits(sparse, dense)
    assert [*dict(sparse.named_parameters())] == [*dict(dense.named_parameters())]  # tied ones count once
    ids = torch.arange(4, 20)[None]
    sparse(ids, labels=ids).loss.backward()
    specialize(sparse, (1,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_dense_weight_is_made(model, dtype, tmp_path, monkeypatch):
    draw_masks(model, 0.3)
    model.to(dtype).save_pretrained(tmp_path, sparse=True)
    monkeypatch.setattr(sparse_weights, "expand", lambda *_: pytest.fail("expanded"))
    for form in (CompressedRows, BitmapRows):
        monkeypatch.setattr(form, "dense", lambda *_: pytest.fail("expanded"))
    sparse = load_sparse(tmp_path, dtype=dtype)
    sparse.generate(torch.arange(4, 20)[None], max_new_tokens=2)
    for name, weight in sparse_ones(sparse).items():
        active, (out, inputs) = count_active(masked_modules(sparse)[name].weight_mask), weight.shape
        compressed = (active * (dtype.itemsize + 1)) + 8 * (out + 1)
        bitmap = 2 * (active + 32) + 4 * out * -(-inputs // 32) + 8 * out
        is_bitmap = dtype == torch.bfloat16 and bitmaps()
        assert weight.compressed.nbytes == (bitmap if is_bitmap else compressed)


def test_layers_that_are_denser_stay_dense(model, tmp_path):
    masked = masked_modules(model)
    dense = list(masked)[::2]
    for name, module in masked.items():
        mask = torch.rand(module.weight.shape) < (0.6 if name in dense else 0.4)
        set_mask(module, mask)
    model.save_pretrained(tmp_path, sparse=True)
    sparse = load_sparse(tmp_path)
    assert sparse_ones(sparse).keys() == masked.keys() - set(dense)
    restore(sparse)
    assert same_bits(sparse, model)


def test_single_heads_and_shards(model, tmp_path):
    draw_masks(model, 0.3)
    model.save_pretrained(tmp_path, sparse=True, max_shard_size="20KB")
    sparse = load_sparse(tmp_path, heads=[2, 0])
    assert sparse.config.num_ensemble_heads == 2
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(sparse(ids).logits, model(ids, active_heads=[2, 0]).logits, rtol=1e-4, atol=1e-4)
    restore(sparse)
    assert same_bits(sparse, NeuroTrailsForCausalLM.from_pretrained(tmp_path, heads=[2, 0]))


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "gemma2", slow("qwen3"), slow("cohere")])
def test_every_family(family, tmp_path):
    model = tiny_model(family, masked_modules=["*"])
    draw_masks(model, 0.3)
    model.save_pretrained(tmp_path, sparse=True)
    sparse, ids = load_sparse(tmp_path), tokens()
    assert sparse_ones(sparse).keys() >= masked_modules(model).keys()
    expected = model(ids, use_cache=False).logits
    assert torch.allclose(sparse(ids, use_cache=False).logits, expected, atol=1e-4 * expected.abs().max().item())
    restore(sparse)
    assert same_bits(sparse, model)


@torch.no_grad()
def test_image_classifiers(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    stock = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))
    model = NeuroTrailsForImageClassification.from_stock(stock, blocks_in_head=1, num_ensemble_heads=2).eval()
    attach_masks(model, ["*"])
    model.config.masked_modules = ["*"]
    draw_masks(model, 0.3)
    model.save_pretrained(tmp_path, sparse=True)
    sparse = load_sparse(tmp_path)
    assert isinstance(sparse, type(NeuroTrailsForImageClassification.from_pretrained(tmp_path)))
    kinds = {type(m) for m in sparse.modules() if isinstance(m._parameters.get("weight"), SparseParameter)}
    assert kinds == {nn.Linear}  # the convolution stays dense
    pixels = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(sparse(pixels).logits, model(pixels).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_two_of_four(model, tmp_path):
    for module in masked_modules(model).values():
        order = torch.rand(*module.weight.shape).unflatten(1, (-1, 4)).argsort(-1)
        set_mask(module, (order < 2).flatten(1))
    model.config.mask_structure = "2:4"
    model.save_pretrained(tmp_path, sparse=True)
    sparse, ids = load_sparse(tmp_path), torch.arange(4, 20)[None]
    assert sparse_ones(sparse).keys() == masked_modules(model).keys()
    torch.testing.assert_close(sparse(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@VARIANTS
def test_another_type_copies_and_drafts(model, path):
    ids, sparse = torch.arange(4, 20)[None], load_sparse(path)
    copied = copy.deepcopy(sparse)
    assert torch.equal(copied(ids).logits, sparse(ids).logits)
    copied.to(torch.bfloat16)
    for one, other in zip(copied.parameters(), load_sparse(path, dtype=torch.bfloat16).parameters(), strict=True):
        assert one.dtype == other.dtype == torch.bfloat16
        if isinstance(one, SparseParameter):
            assert type(one.compressed) is type(other.compressed)
            assert torch.equal(one.compressed.values, other.compressed.values)
    dense = NeuroTrailsForCausalLM.from_pretrained(path).to(torch.bfloat16)
    torch.testing.assert_close(copied(ids).logits, dense(ids).logits, rtol=0.05, atol=0.1)
    assert all(weight.compressed.dtype == torch.float32 for weight in sparse_ones(sparse).values())
    plain, drafted = (sparse.generate(ids, max_new_tokens=8, do_sample=False, trail_draft=draft) for draft in (None, 0))
    assert torch.equal(plain, drafted)
    losses = [m(ids, labels=ids).loss for m in (sparse, NeuroTrailsForCausalLM.from_pretrained(path))]
    torch.testing.assert_close(*losses)


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("action", "match"),
    [
        (lambda model, _: model(torch.tensor([[5]])), "computes no gradients"),
        (lambda model, _: model.train()(torch.tensor([[5]])), "computes no gradients"),
        (lambda model, path: model.save_pretrained(path / "new"), "save_pretrained: .*restore.model. first"),
        (
            lambda model, path: model.save_pretrained(path / "new", sparse=True),
            "save_pretrained: .*restore.model. first",
        ),
        (lambda model, path: torch.save(model.state_dict(), path / "new"), r"restore.model. first"),
        (lambda model, path: save_file(model.state_dict(), path / "new"), r"restore.model. first"),
        (lambda model, _: model.load_state_dict(trained("only_lm_heads").state_dict()), r"restore.model. first"),
        (lambda model, _: model.to("meta"), r"restore.model. first"),
        (lambda model, _: model.half(), r"dtype=torch.float16: accepted of sparse weights are"),
        (lambda model, _: model.extract_trail(0), r"restore.model. first"),
        (lambda model, _: model.resize_token_embeddings(300), r"restore.model. first"),
        (lambda model, _: apply_masks(model), r"restore.model. first"),
        (lambda model, _: specialize(model), "sparse already"),
    ],
)
@pytest.mark.parametrize("model", ["only_lm_heads"], indirect=True)
def test_what_needs_dense_weights_is_refused(model, path, action, match):
    sparse = load_sparse(path)
    with pytest.raises((RuntimeError, ValueError), match=match):
        action(sparse, path)
    assert not (path / "new").is_dir()  # nothing is written


@torch.no_grad()
def test_autocast_and_other_types_are_refused(model, path):
    sparse = load_sparse(path, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="autocast: accepted"):
        sparse(torch.tensor([[5]]))
    with pytest.raises(RuntimeError, match=r"accepted is torch\.bfloat16 on a CPU"):
        sparse.model.layers[0].mlp.up_proj(torch.zeros(1, 36))
    with pytest.raises(RuntimeError, match=r"accepted is \[..., 36\]"):
        sparse.model.layers[0].mlp.up_proj(torch.zeros(1, 35, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"device_map": "cuda"}, ValueError, "device_map='cuda': accepted is 'cpu'"),
        ({"quantization_config": object()}, ValueError, "quantization_config: accepted is none"),
        ({"dtype": torch.float16}, ValueError, "dtype=torch.float16: accepted"),
        ({"heads": [7]}, ValueError, r"heads=\[7\]: accepted"),
        ({"speed": 1}, TypeError, "speed"),
    ],
)
def test_options_that_are_refused(model, path, options, error, match):
    with pytest.raises(error, match=match):
        load_sparse(path, **options)


def test_files_that_are_refused(model, path, tmp_path):
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"dense.*: no weight is sparse; accepted is"):
        load_sparse(tmp_path / "dense")
    file = path / "model.safetensors"
    content, tensors = file.read_bytes(), {key: tensor.clone() for key, tensor in load_file(file).items()}
    mask = next(key for key in tensors if key.endswith("weight_mask"))
    for changed, match in (
        ({key: tensor for key, tensor in tensors.items() if key != mask}, f"lacks {mask}"),
        (tensors | {mask: tensors[mask] * 0}, f"{mask.removesuffix('_mask')}: values .* but 0 bits"),
    ):
        file.unlink()  # a thread of the last attempt may be reading it still
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=match):
            load_sparse(path)
    file.unlink()
    file.write_bytes(content[:1000])
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_sparse(path)


@pytest.mark.slow
@torch.no_grad()
def test_compiling_goes_around_the_sparse_products(model, path, prompts):
    sparse = load_sparse(path)
    expected = sparse(**prompts).logits
    assert is_sparse(sparse)
    torch.testing.assert_close(torch.compile(sparse)(**prompts).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_dense_model_is_loaded_as_ever_afterwards(model, path):
    load_sparse(path)
    assert not is_sparse(NeuroTrailsForCausalLM.from_pretrained(path))
