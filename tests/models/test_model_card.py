"""The README of a checkpoint: written where there is none, also in place of the one that says nothing on the hub."""

import pytest
import torch
import transformers.utils.hub as hub
from conftest import SIZES
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from nt_hf import NeuroTrailsForCausalLM, SparsityConfig, draw_masks
from nt_hf.models.model_card import density_of


@pytest.fixture
def model():
    torch.manual_seed(0)
    stock = LlamaForCausalLM(LlamaConfig(**SIZES))
    stock.config._name_or_path = "owner/stock"
    return NeuroTrailsForCausalLM.from_stock(stock, num_ensemble_heads=2, blocks_in_head=1)


def test_a_saved_model_has_a_card(model, tmp_path):
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["neurotrails", "ensemble"] and card.data.base_model == "owner/stock"
    assert card.data.eval_results is None
    assert "A llama model of 2 heads of 1 block on a backbone of " in card.text
    assert "No weight carries a mask." in card.text
    assert "AutoModelForCausalLM.from_pretrained" in card.text and "@article{grooten2025neurotrails" in card.text


def test_the_card_names_the_density_and_a_card_that_is_there_stays(model, tmp_path):
    draw_masks(model, SparsityConfig(density=0.25, distribution="uniform"))
    for sparse in (False, True):
        model.save_pretrained(tmp_path / str(sparse), sparse=sparse)
        card = ModelCard.load(tmp_path / str(sparse) / "README.md")
        assert "Density of the masked weights: 0.250." in card.text and "sparse" in card.data.tags
    (tmp_path / "False" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "False")
    assert (tmp_path / "False" / "README.md").read_text() == "mine"


def test_offloaded_masks_have_no_density():
    shape = torch.empty(2, 8, device="meta")
    assert density_of({"a.weight": shape, "a.weight_mask": torch.empty(2, 1, dtype=torch.uint8, device="meta")}) is None
    assert density_of({"a.weight": torch.ones(2, 8), "a.weight_mask": torch.tensor([[255], [0]]).byte()}) == 0.5


def test_a_directory_is_no_base_model(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "stock").mkdir(parents=True)
    model.save_pretrained("saved")
    assert ModelCard.load(tmp_path / "saved" / "README.md").data.base_model is None


@pytest.mark.parametrize("exists", [False, True])
def test_a_push_brings_the_card_unless_the_repository_has_one(model, tmp_path, monkeypatch, exists):
    def load(repo_id, **_):
        if not exists:
            raise EntryNotFoundError("no card")
        return ModelCard("---\ntags: [old]\n---\nThe old card.")

    uploaded = []
    monkeypatch.setattr(hub.ModelCard, "load", load)
    monkeypatch.setattr(
        PreTrainedModel, "_upload_modified_files", lambda self, folder, *_, **__: uploaded.append(folder)
    )
    hub.create_and_tag_model_card("owner/model", ["a"]).save(tmp_path / "README.md")  # as push_to_hub does
    model._upload_modified_files(str(tmp_path), "owner/model", {}, commit_message=None)
    text = (tmp_path / "README.md").read_text()
    assert ("The old card." in text) is exists and ("@article{grooten2025neurotrails" in text) is not exists
    assert uploaded == [str(tmp_path)]
