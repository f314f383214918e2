"""A sparse checkpoint is the same model in fewer bytes; single heads load as the model that they are."""

import copy
import logging

import pytest
import torch
from conftest import SIZES, VARIANTS, draw_masks
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from nt_hf import (
    NeuroTrailsLlamaConfig,
    NeuroTrailsLlamaForCausalLM,
    NeuroTrailsLlamaModel,
    check_masks,
)
from nt_hf.models import sparse_checkpoint
from nt_hf.models.masks import full_mask, get_mask, masked_modules, pack_mask
from nt_hf.models.modeling_neurotrails import maskable_names
from nt_hf.models.multi_head import keep_heads
from nt_hf.models.sparse_checkpoint import compress, expand

MASKED = [name for name, options in VARIANTS.items() if options.get("masked_modules")]
EVERY_VARIANT = pytest.mark.parametrize("model", VARIANTS, indirect=True)
EVERY_MASKED_VARIANT = pytest.mark.parametrize("model", MASKED, indirect=True)
WEIGHT = "model.heads.1.layers.0.mlp.up_proj.weight"


def load(path, **options):
    return NeuroTrailsLlamaForCausalLM.from_pretrained(path, **options)


def assert_same_tensors(one: nn.Module, other: nn.Module) -> None:
    """Names, types and bits."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name


def size(path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


# ------------------------------------------------------------------------------------------- pure functions


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # bits are copied: of 4 and of 2 bytes
@pytest.mark.parametrize("shape", [(5, 8), (7, 13), (1, 1), (40, 36), (6, 3, 5), (4, 3, 3, 3)])
def test_expanding_undoes_compressing_bit_for_bit(shape, dtype, density, monkeypatch):
    monkeypatch.setattr(sparse_checkpoint, "_PIECE", 16)
    mask = torch.rand(shape) < density
    weight = torch.randn(shape).to(dtype)
    weight.view(-1)[::7] = float("nan")
    weight.view(-1)[::11] = float("-inf")
    weight.view(-1)[::5] = -0.0
    weight.masked_fill_(~mask, 0)
    values = compress(weight, pack_mask(mask))
    assert values.shape == (int(mask.sum()),) and values.dtype == dtype
    again = expand(values, pack_mask(mask), shape)
    assert again.shape == shape and again.is_contiguous()
    assert torch.equal(again.view(torch.uint8), weight.view(torch.uint8))


def test_values_come_in_the_row_major_order_of_the_weight():
    weight = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 4.0]])
    assert compress(weight, pack_mask(weight != 0)).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("outside", [1.0, float("nan"), float("inf")])
def test_a_weight_outside_its_mask_cannot_be_compressed(outside):
    mask = torch.tensor([[True, False, True]])
    with pytest.raises(ValueError, match="non-zero weights outside the mask"):
        compress(torch.tensor([[1.0, outside, 0.0]]), pack_mask(mask))


@pytest.mark.parametrize(
    "values, packed, match",
    [
        (torch.ones(2), torch.tensor([[7]], dtype=torch.uint8), r"values \[2\], but 3 bits"),
        (torch.ones(4), torch.tensor([[7]], dtype=torch.uint8), r"values \[4\], but 3 bits"),
        (torch.ones(3, 1), torch.tensor([[7]], dtype=torch.uint8), r"values \[3, 1\], but 3 bits"),
        (torch.ones(3), torch.tensor([[0x83]], dtype=torch.uint8), "padding bits"),
        (torch.ones(3), torch.tensor([[7, 0]], dtype=torch.uint8), r"takes torch.uint8 \[1, 1\]"),
        (torch.ones(3), torch.tensor([[7]], dtype=torch.int32), r"takes torch.uint8 \[1, 1\]"),
    ],
)
def test_values_that_do_not_fit_their_mask_are_an_error(values, packed, match):
    with pytest.raises(ValueError, match=match):
        expand(values, packed, (1, 5))


# ------------------------------------------------------------------------------------------- saving and loading


@EVERY_MASKED_VARIANT
@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_saving_sparse_and_loading_is_bit_exact(model, shard, tmp_path):
    before = copy.deepcopy(model)
    model.save_pretrained(tmp_path, sparse=True, max_shard_size=shard)
    assert_same_tensors(model, before)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "40KB")
    loaded, info = load(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_tensors(loaded, model)
    assert not check_masks(loaded) and not loaded.training
    if model.config.tie_word_embeddings:
        assert loaded.lm_heads[0].weight is loaded.get_input_embeddings().weight


@EVERY_MASKED_VARIANT
def test_the_file_holds_values_masks_and_shapes_of_masked_weights_alone(model, tmp_path):
    model.save_pretrained(tmp_path, sparse=True)
    tensors = load_file(tmp_path / "model.safetensors")
    masked = masked_modules(model)
    for name, module in masked.items():
        assert name not in tensors
        assert torch.equal(tensors.pop(f"{name}_values"), module.weight[get_mask(module)])
        assert torch.equal(tensors.pop(f"{name}_mask"), module.weight_mask)
        assert tensors.pop(f"{name}_shape").tolist() == list(module.weight.shape)
    model.save_pretrained(tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert tensors.keys() == {key for key in dense if key.removesuffix("_mask") not in masked}


def test_a_weight_whose_mask_is_all_ones_stays_as_it_is(model, tmp_path):
    whole = masked_modules(model)[WEIGHT]
    whole.weight_mask.copy_(full_mask(whole.weight.shape))
    model.save_pretrained(tmp_path, sparse=True)
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert WEIGHT in keys and f"{WEIGHT}_values" not in keys
    assert_same_tensors(load(tmp_path), model)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.9])
def test_bytes_a_masked_weight(density, tmp_path):
    config = NeuroTrailsLlamaConfig(**SIZES | {"hidden_size": 384, "intermediate_size": 512}, masked_modules=["*"])
    model = NeuroTrailsLlamaForCausalLM(config).bfloat16()
    draw_masks(model, density)
    model.save_pretrained(tmp_path, sparse=True)
    masked = sum(module.weight.numel() for module in masked_modules(model).values())
    others = sum(p.numel() for p in model.parameters()) - masked
    assert size(tmp_path) - 2 * others <= (2 * density + 1 / 8) * 1.01 * masked + 0.005 * masked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_when_loading_and_when_saving(model, dtype, tmp_path):
    for sparse in (False, True):
        model.save_pretrained(tmp_path / f"{sparse}", sparse=sparse)
    assert_same_tensors(load(tmp_path / "True", dtype=dtype), load(tmp_path / "False", dtype=dtype))
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path / "half", sparse=True, state_dict=half)
    assert len(half) == len(model.state_dict())  # the caller's
    assert size(tmp_path / "half") < size(tmp_path / "True")
    assert_same_tensors(load(tmp_path / "half", dtype=dtype), load(tmp_path / "False", dtype=dtype))


@pytest.mark.parametrize("model", ["neurotrails", "tied"], indirect=True)
@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}])
def test_loading_with_a_device_map(model, options, tmp_path):
    model.save_pretrained(tmp_path, sparse=True)
    assert_same_tensors(load(tmp_path, **options), model)


@pytest.mark.parametrize("sparse, heads", [(True, None), (True, [2, 0]), (False, [2, 0])])
def test_loading_with_weights_offloaded_to_the_disk(model, prompts, sparse, heads, tmp_path):
    model.save_pretrained(tmp_path / "saved", sparse=sparse)
    places = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.rotary_emb": "cpu", "model.heads": "disk"}
    loaded = load(
        tmp_path / "saved", heads=heads, device_map={**places, "lm_heads": "cpu"}, offload_folder=tmp_path / "offload"
    )
    with torch.no_grad():
        assert torch.equal(loaded(**prompts).logits, model(**prompts, active_heads=heads).logits)
    with pytest.raises(ValueError, match="is offloaded"):
        loaded.save_pretrained(tmp_path / "again", sparse=True)


def test_the_auto_classes_load_it(model, prompts, tmp_path):
    model.save_pretrained(tmp_path, sparse=True)
    assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    for loader in (AutoModel, NeuroTrailsLlamaModel):
        base = loader.from_pretrained(tmp_path)
        assert_same_tensors(base, model.model)
    base.save_pretrained(tmp_path / "base", sparse=True)
    assert_same_tensors(NeuroTrailsLlamaModel.from_pretrained(tmp_path / "base"), model.model)


@EVERY_MASKED_VARIANT
def test_masks_given_up_when_loading_leave_the_right_weights(model, prompts, tmp_path):
    model.save_pretrained(tmp_path, sparse=True)
    loaded = load(tmp_path, masked_modules=[])
    assert not masked_modules(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(**prompts).logits, model(**prompts).logits)


def test_weights_of_another_size_are_mismatched_as_in_a_dense_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path, sparse=True)
    with pytest.raises(ValueError, match=r"of another shape.*\[36, 44\] instead of \[36, 40\]"):
        load(tmp_path, intermediate_size=40)
    loaded = load(tmp_path, intermediate_size=40, ignore_mismatched_sizes=True)
    assert torch.equal(loaded.lm_heads[0].weight, model.lm_heads[0].weight)
    # The masks have as many bytes a row for 42 as for 44 inputs, and do not fit the new weights.
    with pytest.raises(ValueError, match=r"padding bits|outside their masks"):
        load(tmp_path, intermediate_size=42, ignore_mismatched_sizes=True)


def test_saved_dense_again_it_is_the_dense_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "sparse", sparse=True)
    load(tmp_path / "sparse").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "dense" / "model.safetensors"
    ).read_bytes()


# ------------------------------------------------------------------------------------------- what can be wrong


def test_a_model_that_violates_its_masks_is_refused_before_anything_is_written(model, tmp_path):
    masked_modules(model)[WEIGHT].weight.data.fill_(1)
    with pytest.raises(ValueError, match=rf"{WEIGHT}: non-zero weights outside the mask.*apply_masks"):
        model.save_pretrained(tmp_path / "new", sparse=True)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("model", ["treenet", "dense"], indirect=True)
def test_a_model_without_masks_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="no masks; accepted is a model with masked_modules"):
        model.save_pretrained(tmp_path / "new", sparse=True)
    assert not (tmp_path / "new").exists()


def flip(packed: torch.Tensor) -> None:
    packed[0, 0] ^= 1


DAMAGE = {
    "one value too few": (lambda t: t.update({f"{WEIGHT}_values": t[f"{WEIGHT}_values"][1:].clone()}), "bits are set"),
    "a bit flipped": (lambda t: flip(t[f"{WEIGHT}_mask"]), "bits are set"),
    "no values": (lambda t: t.pop(f"{WEIGHT}_values"), f"lacks {WEIGHT}_values; a sparse weight has"),
    "no mask": (lambda t: t.pop(f"{WEIGHT}_mask"), f"lacks {WEIGHT}_mask; a sparse weight has"),
    "no shape": (lambda t: t.pop(f"{WEIGHT}_shape"), f"lacks {WEIGHT}_shape; a sparse weight has"),
    "only the mask": (lambda t: [t.pop(WEIGHT + end) for end in ("_values", "_shape")], "lacks 1 weights"),
    "padding bits": (lambda t: t[f"{WEIGHT}_mask"].fill_(0xFF), "padding bits"),
    "mask shape": (lambda t: t.update({f"{WEIGHT}_mask": t[f"{WEIGHT}_mask"][:, 1:].clone()}), r"takes torch.uint8"),
    "mask type": (lambda t: t.update({f"{WEIGHT}_mask": t[f"{WEIGHT}_mask"].int()}), r"takes torch.uint8"),
    "a shape of floats": (lambda t: t.update({f"{WEIGHT}_shape": torch.ones(2)}), "accepted is an int64 list"),
    "no sizes": (lambda t: t.update({f"{WEIGHT}_shape": torch.ones(0).long()}), "accepted is an int64 list"),
    "another size": (lambda t: t[f"{WEIGHT}_shape"].add_(8), r"takes torch.uint8"),
}


@pytest.mark.parametrize("change, match", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_one_clear_error(model, change, match, tmp_path):
    model.save_pretrained(tmp_path, sparse=True)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=match) as error:
        load(tmp_path)
    message = str(error.value)
    assert WEIGHT in message and str(tmp_path) in message and "\n" not in message


def test_a_truncated_file_is_an_error_that_names_it(model, tmp_path):
    model.save_pretrained(tmp_path, sparse=True)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="truncated") as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)


# ------------------------------------------------------------------------------------------- single heads


def choices(model) -> list[list[int]]:
    count = model.config.num_ensemble_heads
    return [[0], [count - 1], list(reversed(range(count)))]


@EVERY_VARIANT
@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_heads_load_as_the_model_that_they_are(model, prompts, shard, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    sparse = bool(model.config.masked_modules)
    model.save_pretrained(tmp_path, sparse=sparse, max_shard_size=shard)
    for heads in choices(model):
        part, info = load(tmp_path, heads=heads, output_loading_info=True)
        assert not any(info.values()) and not caplog.records
        assert part.config.num_ensemble_heads == len(part.lm_heads) == len(part.model.heads) == len(heads)
        with torch.no_grad():
            expected = model(**prompts, active_heads=heads, output_head_logits=True, use_cache=False)
            logits = part(**prompts, output_head_logits=True, use_cache=False)
        assert torch.equal(logits.logits, expected.logits)
        assert torch.equal(logits.head_logits, expected.head_logits)
        names = {f"{kind}.{new}.": f"{kind}.{old}." for new, old in enumerate(heads) for kind in ("heads", "lm_heads")}
        for name, module in masked_modules(part).items():
            for new in names:
                if new in name:
                    name = name.replace(new, names[new])
                    break
            assert torch.equal(module.weight_mask, masked_modules(model)[name].weight_mask)
        # A checkpoint like any other.
        part.save_pretrained(tmp_path / "part", sparse=bool(masked_modules(part)))
        assert_same_tensors(load(tmp_path / "part"), part)


@pytest.mark.parametrize("model", ["neurotrails", "tied", "full_ensemble"], indirect=True)
@pytest.mark.parametrize("sparse", [False, True])
def test_nothing_of_another_head_is_read(model, sparse, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path, sparse=sparse)
    read = []

    class Slice:
        def __init__(self, key, tensor):
            self.key, self.tensor = key, tensor

        def __getitem__(self, index):
            read.append(self.key)
            return self.tensor[index]

    class File:
        def __init__(self, *args):
            self.file = safe_open(*args)

        def keys(self):
            return self.file.keys()

        def get_slice(self, key):
            return Slice(key, self.file.get_slice(key))

    safe_open = sparse_checkpoint.safe_open
    monkeypatch.setattr(sparse_checkpoint, "safe_open", File)
    load(tmp_path, heads=[1])
    stored = load_file(tmp_path / "model.safetensors").keys()
    others = ("model.heads.0.", "model.heads.2.", "lm_heads.0.", "lm_heads.2.")
    needed = {key for key in stored if not key.startswith(others)}
    # Shapes, of 16 bytes, tell what a file holds.
    assert {key for key in read if not key.endswith("_shape")} == {key for key in needed if not key.endswith("_shape")}
    assert needed < stored


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, AutoModel, NeuroTrailsLlamaModel])
def test_every_loader_takes_heads(model, prompts, loader, tmp_path):
    model.save_pretrained(tmp_path)
    part = loader.from_pretrained(tmp_path, heads=[2])
    trunk = getattr(part, "model", part)
    expected = model.model(**prompts, active_heads=[2]).last_hidden_state
    assert torch.equal(trunk(**prompts).last_hidden_state, expected)
    assert "heads" not in part.config.to_dict()


@pytest.mark.parametrize(
    "globs, heads, kept",
    [
        ([], [1], []),
        (["model.layers.*", "model.heads.*"], [2, 0], ["model.layers.*", "model.heads.*"]),
        (["lm_heads.1.*"], [1], ["lm_heads.0.weight"]),
        (["lm_heads.1.*"], [0], []),
        (["lm_heads.0.*"], [1, 0], ["lm_heads.0.*", "!lm_heads.0.weight", "lm_heads.1.weight"]),
        (["lm_heads.*", "!lm_heads.2.*"], [0, 1], ["lm_heads.*"]),
        (["lm_heads.*", "!lm_heads.2.*"], [2], ["lm_heads.*", "!lm_heads.0.weight"]),
    ],
)
def test_globs_that_name_heads_choose_the_same_weights_of_fewer_heads(globs, heads, kept):
    config = NeuroTrailsLlamaConfig(**SIZES, masked_modules=globs)
    assert keep_heads(config, heads, maskable_names).masked_modules == kept
    assert config.masked_modules == globs and config.num_ensemble_heads == 3
    part = NeuroTrailsLlamaForCausalLM(config, heads=heads)
    whole = masked_modules(NeuroTrailsLlamaForCausalLM(config))
    for head, old in enumerate(heads):
        assert (f"lm_heads.{head}.weight" in masked_modules(part)) == (f"lm_heads.{old}.weight" in whole)


@pytest.mark.parametrize("heads", [[], [3], [-1], [0, 0], 0, ["a"], [0.5]])
def test_an_impossible_choice_of_heads_is_an_error(model, heads, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"heads=.*: accepted are one or more different heads of 0 to 2"):
        load(tmp_path, heads=heads)


def test_heads_are_read_from_safetensors_only(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same_tensors(load(tmp_path), model)
    with pytest.raises(ValueError, match=r"heads=\[1\].*no safetensors files") as error:
        load(tmp_path, heads=[1])
    assert str(tmp_path) in str(error.value)


def test_a_state_dict_in_memory_is_a_source_as_before(model, tmp_path):
    state = model.state_dict()
    assert_same_tensors(load(None, config=model.config, state_dict=dict(state)), model)
    part = load(None, config=model.config, state_dict=dict(state), heads=[1])
    assert torch.equal(part.lm_heads[0].weight, model.lm_heads[1].weight)
