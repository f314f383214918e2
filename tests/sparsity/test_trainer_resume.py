"""Trainer with the sparsity callback: runs that stop and go on, what their checkpoints hold, and what is refused."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file
from sparse_nets import equal
from trainer_runs import MODELS, gpt2, make, sparsity, stop_at, vit
from transformers import ViTForImageClassification

from nt_hf.models.masks import attach_masks, check_masks, get_mask, masked_modules
from nt_hf.sparsity.first_masks import draw_masks
from nt_hf.sparsity.trainer_callback import STATE_FILE, SparsityCallback


@pytest.mark.parametrize(
    ("name", "stop", "fields"),
    [
        ("gpt2", 5, {}),  # within an epoch, between updates
        ("gpt2", 8, {"structure": "2:4"}),  # at the end of an epoch, after an update
        ("vit", 4, {"grow": "momentum", "redistribute": "momentum"}),
        ("gpt2", 6, {"second_moments": "dense"}),
        ("vit", 7, {"density_start": 1.0, "density": 0.3}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, name, stop, fields):
    config = sparsity(**fields)
    options = {"max_steps": 18, "save_strategy": "steps", "save_steps": 100}
    whole, straight = make(tmp_path / "whole", config, name, **options)
    whole.train()

    first, _ = make(tmp_path / "parts", config, name, after=[stop_at(stop)], **options)
    first.train()
    assert first.state.global_step == stop
    begin = copy.deepcopy(first.model.state_dict())

    other = sparsity(**fields | {"seed": 7})
    second, resumed = make(tmp_path / "parts", other, name, seed=7, callback=SparsityCallback(config), **options)
    assert not equal(second.model.state_dict(), begin)
    second.train(resume_from_checkpoint=True)

    assert not equal(begin, second.model.state_dict())
    assert equal(second.model.state_dict(), whole.model.state_dict())
    assert equal(second.optimizer.state_dict(), whole.optimizer.state_dict())
    assert equal(resumed.sparsifier.state_dict(), straight.sparsifier.state_dict())
    assert resumed.last_update == straight.last_update
    assert second.state.log_history[:-1] == whole.state.log_history[:-1]
    saved = [load_file(tmp_path / part / "checkpoint-18" / STATE_FILE) for part in ("whole", "parts")]
    assert equal(*saved)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The directory of a run that stopped at step 6."""
    directory = tmp_path_factory.mktemp("stopped")
    trainer, _ = make(directory, after=[stop_at(6)])
    trainer.train()
    return directory


def test_resuming_from_another_directory(tmp_path, stopped):
    checkpoint = stopped / "checkpoint-6"
    trainer, callback = make(tmp_path, callback=SparsityCallback(sparsity(), resume_from=checkpoint), max_steps=10)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert (callback.last_update.step, callback.sparsifier.steps) == (8, 10)
    assert callback.last_update.grown_kept is not None  # what grew at step 4 is known


def remove(checkpoint):
    (checkpoint / STATE_FILE).unlink()


def cut(checkpoint):
    (checkpoint / STATE_FILE).write_bytes((checkpoint / STATE_FILE).read_bytes()[:-9])


def take_that_of(seed, stop=6, **fields):
    def replace(checkpoint):
        directory = checkpoint.parent / "other"
        trainer, _ = make(directory, sparsity(seed=seed, **fields), after=[stop_at(stop)])
        trainer.train()
        shutil.copy(directory / f"checkpoint-{stop}" / STATE_FILE, checkpoint)

    return replace


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (remove, "No such file"),
        (cut, "rror while deserializing"),
        (take_that_of(seed=1), "is of another run: its mask of"),
        (take_that_of(seed=0, stop=5), "of another run"),
        (take_that_of(seed=0, density=0.4), "does not fit the mask of"),
    ],
)
def test_a_checkpoint_without_its_state_is_refused(tmp_path, stopped, spoil, reason):
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(stopped / "checkpoint-6", checkpoint)
    spoil(checkpoint)
    trainer, _ = make(tmp_path)
    with pytest.raises(
        ValueError,
        match=rf"resume_from='\S*checkpoint-6': its {STATE_FILE} cannot continue step 6 \(.*{reason}.*\); accepted is "
        "the checkpoint that training resumes from",
    ) as refusal:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert "\n" not in str(refusal.value)


def test_resume_from_needs_a_run_that_resumes(tmp_path, stopped):
    callback = SparsityCallback(sparsity(), resume_from=stopped / "checkpoint-6")
    trainer, _ = make(tmp_path, callback=callback)
    with pytest.raises(ValueError, match=r"resume_from='.*': the run begins at step 0; accepted is None, or"):
        trainer.train()


@pytest.mark.parametrize("name", MODELS)
def test_the_best_model_has_its_own_masks(tmp_path, name):
    trainer, callback = make(
        tmp_path,
        name=name,
        max_steps=12,
        evaluate=True,
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the first one, so that masks have moved since
    )
    trainer.train()
    assert trainer.state.best_global_step == 5
    best = load_file(tmp_path / "checkpoint-5" / "model.safetensors")
    last = load_file(tmp_path / "checkpoint-12" / "model.safetensors")
    model = trainer.model.state_dict()
    assert all(torch.equal(model[name], value) for name, value in best.items())
    assert not all(torch.equal(last[name], value) for name, value in best.items() if name.endswith("weight_mask"))
    assert check_masks(trainer.model) == []
    assert all(row.active == row.target for row in callback.sparsifier.report().tensors)


def test_checkpoints_have_the_names_of_the_model(tmp_path):
    # Else Trainer would resume a ViT without its weights, and look for masks by other names.
    trainer, _ = make(tmp_path, name="vit", max_steps=6, save_strategy="steps", save_steps=4)
    trainer.train()
    assert load_file(tmp_path / "checkpoint-4" / "model.safetensors").keys() == trainer.model.state_dict().keys()
    assert "save_pretrained" not in vars(trainer.model)
    loaded = ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-6").state_dict()
    assert all(torch.equal(value, trainer.model.state_dict()[name]) for name, value in loaded.items())
    fresh, _ = vit()
    draw_masks(fresh, sparsity(initial_masks=str(tmp_path / "checkpoint-6")))
    masks = masked_modules(trainer.model)
    assert all(
        torch.equal(module.weight_mask, masks[name].weight_mask) for name, module in masked_modules(fresh).items()
    )


def test_weights_with_channels_last_are_saved(tmp_path):
    trainer, callback = make(tmp_path, sparsity(grow="momentum"), "vit", after=[stop_at(6)])
    trainer.model.to(memory_format=torch.channels_last)
    trainer.train()
    assert equal(load_file(tmp_path / "checkpoint-6" / STATE_FILE), callback.sparsifier.state_dict())


def test_a_checkpoint_loads_without_trainer(stopped):
    model, _ = gpt2()
    attach_masks(model, ["*"])
    saved = load_file(stopped / "checkpoint-6" / "model.safetensors")
    missing, unexpected = model.load_state_dict(saved, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    assert check_masks(model) == []
    masks = masked_modules(model).values()
    assert sum(int(get_mask(module).sum()) for module in masks) == round(
        0.5 * sum(module.weight.numel() for module in masks)
    )
