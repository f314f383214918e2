"""Trainer with the sparsity callback: what holds while it trains stock models, and what is refused."""

import copy
import logging

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from sparse_nets import assert_groups, equal, masks_of
from torch import nn
from trainer_runs import At, losses, make, sparsity
from transformers import TrainerCallback

from nt_hf.models.masks import check_masks, masked_modules
from nt_hf.sparsity.config import SparsityConfig
from nt_hf.sparsity.first_masks import target_counts
from nt_hf.sparsity.trainer_callback import SparsityCallback

# ----------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("gpt2", {}),
        ("gpt2", {"structure": "2:4"}),
        ("gpt2", {"structure": "constant_fan_in", "regrow": "forbid"}),
        ("vit", {"distribution": "uniform", "density": 0.3}),
        ("vit", {"grow": "momentum", "redistribute": "gradient"}),
    ],
)
def test_what_holds_at_every_step(tmp_path, name, fields):
    config, seen, moved = sparsity(**fields), [], []

    def on_optimizer_step(args, state, control, model, **_):
        masks = masks_of(model)
        if config.redistribute == "none":
            assert {name: int(mask.sum()) for name, mask in masks.items()} == targets
        assert sum(int(mask.sum()) for mask in masks.values()) == sum(targets.values())
        for name, module in masked_modules(model).items():
            assert not module.weight[~masks[name]].any()
            assert not module.weight.grad[~masks[name]].any()
            assert module.weight.grad[masks[name]].any()
            assert_groups(module, config.structure)
        seen.append(state.global_step)
        if masks.keys() != previous.keys() or not equal(masks, previous):
            moved.append(state.global_step + 1)
        previous.update(masks)

    trainer, callback = make(
        tmp_path, config, name, after=[At(on_optimizer_step=on_optimizer_step)], max_steps=40, logging_steps=4
    )
    targets = target_counts(trainer.model, config)
    previous = masks_of(trainer.model)
    trainer.train()
    assert seen == list(range(40))
    assert moved == list(range(4, 40, 4))
    assert callback.last_update.step == 36
    assert callback.sparsifier.steps == callback.sparsifier.total_steps == 40
    assert check_masks(trainer.model) == []
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]


def test_updates_keep_to_their_share_of_the_run(tmp_path):
    steps = []

    def on_step_end(args, state, control, **_):
        if callback.last_update is not None and callback.last_update.step == state.global_step:
            steps.append(state.global_step)

    config = sparsity(update_interval=3, update_start=0.25, update_end=0.75)
    # Two epochs of 8 steps each: their number is Trainer's to find out.
    trainer, callback = make(tmp_path, config, after=[At(on_step_end=on_step_end)], max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.state.max_steps == 16
    assert steps == [6, 9]


@pytest.mark.parametrize("limit", [0.05, 1e9, 0])
def test_clipping_sees_active_weights_only(tmp_path, limit):
    dense, checked = {}, []

    def on_pre_optimizer_step_before(args, state, control, model, **_):
        assert args.max_grad_norm == 0
        dense.update({name: parameter.grad.clone() for name, parameter in model.named_parameters()})

    def on_pre_optimizer_step_after(args, state, control, model, **_):
        masks = masks_of(model)
        expected = {name: grad * masks.get(name, 1) for name, grad in dense.items()}
        norm = sum(float(grad.double().square().sum()) for grad in expected.values()) ** 0.5
        whole = sum(float(grad.double().square().sum()) for grad in dense.values()) ** 0.5
        scale = min(1.0, limit / norm) if limit else 1.0
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name] * scale, rtol=1e-4, atol=1e-9)
        checked.append((norm, whole))

    trainer, _ = make(
        tmp_path,
        before=[At(on_pre_optimizer_step=on_pre_optimizer_step_before)],
        after=[At(on_pre_optimizer_step=on_pre_optimizer_step_after)],
        max_steps=6,
        max_grad_norm=limit,
    )
    trainer.train()
    norms = [record["grad_norm"] for record in trainer.state.log_history if "grad_norm" in record]
    assert norms == pytest.approx([norm for norm, _ in checked])
    assert len(norms) == 6
    assert all(limit < 1 < limit or norm < 0.95 * whole for norm, whole in checked)


@pytest.mark.parametrize("limit", [1.0, 0.05, 0])
def test_a_dense_model_trains_as_without_the_callback(tmp_path, limit):
    with_callback, callback = make(tmp_path, SparsityConfig(), max_steps=6, max_grad_norm=limit)
    without, _ = make(tmp_path, SparsityConfig(), callback=TrainerCallback(), max_steps=6, max_grad_norm=limit)
    with_callback.train()
    without.train()
    assert equal(with_callback.model.state_dict(), without.model.state_dict())
    assert with_callback.state.log_history[:-1] == without.state.log_history[:-1]
    assert callback.last_update is None


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    def states(passes):
        kept = []

        def on_step_end(args, state, control, model, **_):
            kept.append(copy.deepcopy(model.state_dict()))

        trainer, callback = make(
            tmp_path,
            after=[At(on_step_end=on_step_end)],
            optim="sgd",
            learning_rate=0.1,
            max_steps=9,
            per_device_train_batch_size=8 // passes,
            gradient_accumulation_steps=passes,
        )
        trainer.train()
        assert callback.sparsifier.steps == 9
        assert callback.last_update.step == 8
        return kept

    whole, accumulated = states(1), states(4)
    for step in range(3):
        torch.testing.assert_close(accumulated[step], whole[step], rtol=1e-5, atol=1e-5)
    assert not equal(whole[2], whole[0])


class Drifting(torch.optim.SGD):
    """Moves every weight, gradient or not."""

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(0.01)


@pytest.mark.parametrize("drifting", [True, False])
def test_other_optimizers(tmp_path, drifting):
    def on_optimizer_step(args, state, control, model, **_):
        violations.append(check_masks(model))

    trainer, _ = make(tmp_path, after=[At(on_optimizer_step=on_optimizer_step)], optim="adafactor")
    if drifting:
        trainer.optimizer = Drifting(trainer.model.parameters())
    violations = []
    trainer.train()
    assert violations == [[]] * 20


# --------------------------------------------------------------------------------------------------------- logs


def test_logs_hold_what_updates_did(tmp_path):
    told, updates = [], []
    trainer, callback = make(
        tmp_path,
        after=[
            At(
                on_log=lambda *_, logs, **__: told.append(dict(logs)),
                on_step_end=lambda *_, **__: updates.append(callback.last_update),
            )
        ],
        max_steps=12,
        eval_strategy="steps",
        eval_steps=4,
        evaluate=True,
    )
    trainer.train()
    history = trainer.state.log_history
    # Callbacks that come later see what the history holds.
    assert told == [{key: value for key, value in record.items() if key != "step"} for record in history]
    of_updates = [record for record in history if any(key.startswith("sparsity/") for key in record)]
    assert [(record["step"], record["sparsity/step"]) for record in of_updates] == [(4, 4), (8, 8)]
    for record, update in zip(of_updates, (updates[3], updates[7])):
        assert "loss" in record
        for name in ("dropped", "grown", "density", "ever_active", "dead_rows", "grad_norm_inactive"):
            assert record[f"sparsity/{name}"] == getattr(update, name)
        assert record["sparsity/density/transformer.h"] == update.density_by_group["transformer.h"]
    assert "sparsity/grown_kept" not in of_updates[0]  # there was no earlier update
    assert 0 < of_updates[1]["sparsity/grown_kept"] < 1
    assert 0.5 < of_updates[0]["sparsity/ever_active"] < of_updates[1]["sparsity/ever_active"] < 1
    assert of_updates[1]["sparsity/density"] == pytest.approx(0.5, abs=1e-4)
    assert all(isinstance(value, int | float) for record in history for value in record.values())


def test_a_rare_log_holds_the_last_update(tmp_path):
    trainer, _ = make(tmp_path, max_steps=14, logging_steps=7, evaluate=True, eval_strategy="steps", eval_steps=5)
    trainer.train()
    kinds = [next(kind for kind in ("eval_loss", "train_loss", "loss") if kind in r) for r in trainer.state.log_history]
    assert kinds == ["eval_loss", "loss", "eval_loss", "loss", "eval_loss", "train_loss"]
    of_updates = [record.get("sparsity/step") for record in trainer.state.log_history]
    assert of_updates == [None, 4, None, 12, None, None]


# ----------------------------------------------------------------------------------------------------- clipping


def test_max_grad_norm_is_handed_back(tmp_path):
    inside, outside = [], []
    trainer, _ = make(
        tmp_path,
        after=[
            At(
                on_substep_end=lambda args, *_, **__: inside.append(args.max_grad_norm),
                on_optimizer_step=lambda args, *_, **__: outside.append(args.max_grad_norm),
            )
        ],
        max_steps=3,
        max_grad_norm=0.7,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    assert inside == [0.0] * 3
    assert outside == [0.7] * 3
    assert (trainer.args.max_grad_norm, type(trainer.args.max_grad_norm)) == (0.7, float)
    assert torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False).max_grad_norm == 0.7


def test_max_grad_norm_is_handed_back_when_a_step_is_broken_off(tmp_path):
    def on_substep_end(args, state, control, **_):
        control.should_training_stop = state.global_step == 2

    trainer, _ = make(
        tmp_path, after=[At(on_substep_end=on_substep_end)], max_grad_norm=0.7, gradient_accumulation_steps=2
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert (trainer.args.max_grad_norm, type(trainer.args.max_grad_norm)) == (0.7, float)


def fail_once(step, error):
    """A callback that raises within a step, while Trainer does not know the limit."""
    left = [error]

    def on_substep_end(args, state, control, **_):
        if state.global_step == step and left:
            raise left.pop()

    return At(on_substep_end=on_substep_end)


def test_max_grad_norm_survives_an_error(tmp_path):
    options = {"max_steps": 6, "max_grad_norm": 0.05, "gradient_accumulation_steps": 2}
    trainer, _ = make(tmp_path, after=[fail_once(3, KeyboardInterrupt())], **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    norms = []

    def on_optimizer_step(args, state, control, model, **_):
        norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])))

    trainer.add_callback(At(on_optimizer_step=on_optimizer_step))
    trainer.train()
    again, _ = make(tmp_path, after=[At(on_optimizer_step=on_optimizer_step)])
    again.args = trainer.args
    trainer.args.max_steps = 2
    again.train()
    assert norms == pytest.approx([0.05] * 8, rel=1e-3)
    assert trainer.args.max_grad_norm == 0.05


def test_a_run_that_begins_again_with_smaller_batches(tmp_path):
    trainer, callback = make(
        tmp_path,
        after=[fail_once(5, RuntimeError("CUDA out of memory."))],
        max_steps=6,
        max_grad_norm=0.05,
        auto_find_batch_size=True,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    assert trainer.state.train_batch_size < 8
    assert callback.sparsifier.steps == 6
    assert trainer.args.max_grad_norm == 0.05
    assert check_masks(trainer.model) == []


def test_one_callback_for_two_runs(tmp_path):
    trainer, callback = make(tmp_path, max_steps=10)
    trainer.train()
    first = callback.sparsifier
    trainer.args.max_steps = 6
    trainer.train()
    assert callback.sparsifier is not first
    assert (callback.sparsifier.total_steps, callback.sparsifier.steps, callback.last_update.step) == (6, 6, 4)
    assert check_masks(trainer.model) == []


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("config", [None, {"density": 0.5}, 0.5])
def test_a_config_is_needed(config):
    with pytest.raises(ValueError, match=r"config=.*: accepted is a SparsityConfig"):
        SparsityCallback(config)


def test_masks_are_needed(tmp_path):
    trainer, _ = make(tmp_path, SparsityConfig(), callback=SparsityCallback(sparsity()))
    with pytest.raises(ValueError, match=r"density=0\.5: the model carries no masks; accepted is .* draw_masks"):
        trainer.train()


@pytest.mark.parametrize("same", [True, False])
def test_two_callbacks_are_refused(tmp_path, same, caplog):
    caplog.set_level(logging.ERROR)
    trainer, callback = make(tmp_path)
    trainer.add_callback(callback if same else SparsityCallback(sparsity()))
    with pytest.raises(ValueError, match="callbacks: holds two SparsityCallbacks; accepted is one"):
        trainer.train()


def test_fp16_is_refused(tmp_path, monkeypatch):
    refused = pytest.raises(ValueError, match="fp16=True: accepted is bf16 or full precision")
    trainer, _ = make(tmp_path, fp16=True)
    with refused:
        trainer.train()
    trainer, _ = make(tmp_path)
    monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")  # as a launcher sets it
    with refused:
        trainer.train()


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP])
def test_sharded_weights_are_refused(tmp_path, monkeypatch, kind):
    trainer, callback = make(tmp_path)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", kind)
    optimizer = torch.optim.SGD(trainer.model.parameters())
    with pytest.raises(ValueError, match=rf"distributed_type={kind.value}: accepted is one process, or data parallel"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model, optimizer=optimizer)
