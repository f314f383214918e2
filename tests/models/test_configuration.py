"""The configuration: its checks, its copies, and the views it gives to caches and to one trail."""

import copy
import json

import pytest
from transformers import AutoConfig, LlamaConfig

from nt_hf import NeuroTrailsLlamaConfig, NeuroTrailsLlamaModel
from nt_hf.models.auto import class_of_family

HEADS = {
    "num_ensemble_heads": 2,
    "blocks_in_head": 3,
    "ensemble_mode": "probs",
    "share_embedding": False,
    "masked_modules": ["model.*", "!*.norm"],
}


def config(**changes):
    return NeuroTrailsLlamaConfig(**{"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, **changes})


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"blocks_in_head": 4}, r"blocks_in_head=4: accepted is 0 to num_hidden_layers=3"),
        ({"blocks_in_head": -1}, r"blocks_in_head=-1: accepted is 0 to"),
        ({"blocks_in_head": True}, r"blocks_in_head=True: accepted is a whole number"),
        ({"num_ensemble_heads": 0}, r"num_ensemble_heads=0: .* at least 1"),
        ({"num_ensemble_heads": 2.0}, r"num_ensemble_heads=2.0: accepted is a whole number"),
        ({"ensemble_mode": "vote"}, r"ensemble_mode='vote': accepted are logits, probs"),
        ({"share_embedding": False, "blocks_in_head": 2}, r"share_embedding=False with blocks_in_head=2.*=3"),
        ({"share_embedding": "no"}, r"share_embedding='no': accepted"),
        ({"embedding_initializer_range": 0.0}, r"embedding_initializer_range=0.0: accepted is a number above 0"),
        (
            {"embedding_initializer_range": 0.5, "tie_word_embeddings": True},
            r"embedding_initializer_range=0.5: accepted is None with tie_word_embeddings=True",
        ),
        ({"masked_modules": "model.*"}, r"masked_modules='model.\*': accepted is a list"),
        ({"masked_modules": [1]}, r"masked_modules=\[1\]: accepted is a list"),
    ],
)  # fmt: skip
def test_impossible_values_are_one_clear_line(changes, match):
    with pytest.raises(ValueError, match=match) as error:
        config(**changes)
    assert "\n" not in str(error.value)


def test_images_have_no_token_embedding():
    kind = class_of_family("vit").config_class
    assert kind(num_hidden_layers=3).embedding_initializer_range is None
    with pytest.raises(ValueError, match=r"embedding_initializer_range=0.5: accepted is None, for there is no tok"):
        kind(num_hidden_layers=3, embedding_initializer_range=0.5)


@pytest.mark.parametrize("depth, blocks", [(1, 1), (2, 1), (3, 2), (12, 8), (24, 16)])
def test_by_default_two_thirds_of_the_blocks_are_in_the_heads(depth, blocks):
    assert config(num_hidden_layers=depth).blocks_in_head == blocks
    assert config(num_hidden_layers=depth, share_embedding=False).blocks_in_head == depth


def test_saving_and_loading_keeps_every_field(tmp_path):
    config(**HEADS, rope_parameters={"rope_type": "default", "rope_theta": 5e5}).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "neurotrails_llama"
    for loaded in (NeuroTrailsLlamaConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is NeuroTrailsLlamaConfig
        assert {key: getattr(loaded, key) for key in HEADS} == HEADS
        assert loaded.rope_parameters["rope_theta"] == 5e5


def test_values_changed_later_are_checked_when_a_model_is_made(tmp_path):
    tiny = {"vocab_size": 16, "intermediate_size": 8}
    NeuroTrailsLlamaModel(config(**tiny)).save_pretrained(tmp_path)
    assert NeuroTrailsLlamaModel.from_pretrained(tmp_path, ensemble_mode="probs").config.ensemble_mode == "probs"
    with pytest.raises(ValueError, match="blocks_in_head=4"):
        NeuroTrailsLlamaModel.from_pretrained(tmp_path, blocks_in_head=4)
    changed = config(**tiny)
    changed.num_ensemble_heads = 0
    with pytest.raises(ValueError, match="num_ensemble_heads=0"):
        NeuroTrailsLlamaModel(changed)


def test_copies_are_equal_and_independent():
    original = config(**HEADS)
    duplicate = copy.deepcopy(original)
    assert duplicate.to_dict() == original.to_dict()
    duplicate.masked_modules.append("lm_heads.*")
    assert original.masked_modules == HEADS["masked_modules"]


def test_two_configs_share_no_default():
    assert config().masked_modules is not config().masked_modules


@pytest.mark.parametrize("heads, blocks, slots", [(3, 2, 7), (3, 0, 3), (2, 3, 6), (1, 2, 3)])
def test_caches_see_a_layer_a_slot(heads, blocks, slots):
    original = config(num_ensemble_heads=heads, blocks_in_head=blocks)
    view = original.get_text_config(decoder=True)
    assert view.num_hidden_layers == view.get_text_config(decoder=True).num_hidden_layers == slots
    assert original.get_text_config() is original and original.num_hidden_layers == 3
    assert original.num_backbone_layers + blocks == 3


def test_a_trails_configuration_is_llamas():
    changes = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "pad_token_id": 5}
    trail = config(**HEADS, **changes).to_stock_config()
    assert type(trail) is LlamaConfig
    expected = LlamaConfig(num_hidden_layers=3, hidden_size=32, num_attention_heads=4, **changes)
    assert trail.to_dict() == expected.to_dict()
