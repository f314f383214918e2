"""The sparsifier on small stock modules: what holds at every step of a training run."""

import copy
import logging

import pytest
import torch
from sparse_nets import Tower, equal, loss_of, masks_of, snapshot, train
from sparse_nets import sparse as make_sparse
from torch import nn

from nt_hf.models.masks import check_masks, get_mask, masked_modules, set_mask
from nt_hf.sparsity.config import SparsityConfig
from nt_hf.sparsity.first_masks import draw_masks, target_counts
from nt_hf.sparsity.optimizer_state import move_state
from nt_hf.sparsity.sparsifier import Sparsifier


class Conv(nn.Module):
    words, batch = Tower.words, Tower.batch

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(self.words, 16)
        self.first, self.second = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 5, 3)
        self.third, self.norm, self.head = nn.Conv1d(5, 4, 2), nn.BatchNorm1d(4), nn.Linear(4, self.words)

    def forward(self, ids):
        x = self.second(self.first(self.embed(ids).unsqueeze(1)).relu()).relu()
        return self.head(self.norm(self.third(x.mean(-1))).mean(-1))


class Drifting(torch.optim.Optimizer):
    """Moves every weight, gradient or not; without state."""

    def __init__(self, parameters, lr=0.01):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(group["lr"])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "drifting": Drifting,
}


def sparse(config=None, optimizer="adamw", model=Tower, total_steps=100, **fields):
    fields = {"density": 0.4, "distribution": "erk"} | fields
    return make_sparse(config, model, lambda net: OPTIMIZERS[optimizer](net.parameters()), total_steps, **fields)


def moments(optimizer, parameter):
    state = optimizer.state[parameter]
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim()}


# ----------------------------------------------------------------------------------------------------- training


# Every optimizer moves the same tensors, whatever holds them: on convolutions one of each kind will do.
RARE = [pytest.param(Conv, name, marks=pytest.mark.slow) for name in OPTIMIZERS if name not in ("sgd", "drifting")]


@pytest.mark.parametrize(
    ("model", "optimizer"), [*((Tower, name) for name in OPTIMIZERS), (Conv, "sgd"), (Conv, "drifting"), *RARE]
)
def test_what_holds_at_every_step(optimizer, model):
    net, optimizer, sparsifier = sparse(optimizer=optimizer, model=model)
    targets = target_counts(net, sparsifier.config)
    updates = 0
    for update in train(net, optimizer, sparsifier, last=60):
        updates += update is not None
        for name, module in masked_modules(net).items():
            mask = get_mask(module)
            assert mask.sum() == targets[name]
            assert not module.weight[~mask].any()
            assert not module.weight.grad[~mask].any()
            if type(optimizer) in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
                assert not any(state[~mask].any() for state in moments(optimizer, module.weight).values())
    assert check_masks(net) == []
    assert updates == 12
    assert sparsifier.steps == 60


def test_training_learns():
    net, optimizer, sparsifier = sparse()
    losses = [loss_of(net, step).item() for step, _ in enumerate(train(net, optimizer, sparsifier, last=100))]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_update_reports_what_moved():
    net, optimizer, sparsifier = sparse(density=0.5)
    before, ever = masks_of(net), masks_of(net)
    for update in train(net, optimizer, sparsifier, last=99):
        after = masks_of(net)
        if update is None:
            assert all(torch.equal(before[name], after[name]) for name in before)
            continue
        ever = {name: ever[name] | after[name] for name in ever}
        size = sum(mask.numel() for mask in after.values())
        assert update.step == sparsifier.steps
        assert update.dropped == sum(int((before[name] & ~after[name]).sum()) for name in before) > 0
        assert update.grown == sum(int((after[name] & ~before[name]).sum()) for name in before) == update.dropped
        assert update.requested >= update.dropped
        assert update.density == pytest.approx(0.5, abs=1e-4)
        assert update.ever_active == sum(int(mask.sum()) for mask in ever.values()) / size
        assert list(update.density_by_group) == ["embed", "layers", "head"]
        before = after
    assert update is None
    assert 0.5 < sparsifier.ever_active() < 1


@pytest.mark.parametrize("density", [0.4, 0.9])
def test_forbidding_regrowth_caps_what_moves(density, caplog):
    caplog.set_level(logging.INFO)
    net, optimizer, sparsifier = sparse(density=density, regrow="forbid", drop_fraction=0.5, drop_schedule="constant")
    update = next(filter(None, train(net, optimizer, sparsifier)))
    moved = sum(min(round(0.5 * int(mask.sum())), int((~mask).sum())) for mask in masks_of(net).values())
    assert update.dropped == update.grown == moved
    assert ("for want of inactive ones" in caplog.text) == (update.dropped < update.requested)


def test_grown_weights_had_the_largest_gradients():
    net, optimizer, sparsifier = sparse(update_interval=3, regrow="forbid", drop_fraction=0.2)
    for step in range(3):
        loss_of(net, step).backward()
        dense = {name: module.weight.grad.abs().clone() for name, module in masked_modules(net).items()}
        before = masks_of(net)
        update = sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
    assert update.grown
    for name, after in masks_of(net).items():
        grown, passed_over = dense[name][after & ~before[name]], dense[name][~after & ~before[name]]
        assert grown.min() >= passed_over.max()


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_optimizer_state_of_moved_weights(optimizer):
    net, optimizer, sparsifier = sparse(optimizer=optimizer, update_interval=10)
    for _ in train(net, optimizer, sparsifier, last=9):
        pass
    loss_of(net, 9).backward()
    before, layers = masks_of(net), masked_modules(net)
    dense = {name: module.weight.grad.clone() for name, module in layers.items()}
    weights = {name: module.weight.detach().clone() for name, module in layers.items()}
    states = {name: copy.deepcopy(moments(optimizer, module.weight)) for name, module in layers.items()}
    assert sparsifier.step().dropped
    for name, module in layers.items():
        after = get_mask(module)
        dropped, grown, stayed = before[name] & ~after, after & ~before[name], before[name] & after
        assert not module.weight[dropped | grown].any()
        assert torch.equal(module.weight[stayed], weights[name][stayed])
        assert torch.equal(module.weight.grad[after], dense[name][after])
        assert moments(optimizer, module.weight)
        for key, state in moments(optimizer, module.weight).items():
            assert torch.equal(state[stayed], states[name][key][stayed])  # those dropped and regrown among them
            assert not state[dropped].any()
            second = key in ("exp_avg_sq", "max_exp_avg_sq", "square_avg")
            assert torch.equal(state[grown], dense[name][grown].square() if second else torch.zeros_like(state[grown]))


def test_state_of_another_shape_is_named_once(caplog):
    net, _, _ = sparse()
    optimizer = torch.optim.Adafactor(net.parameters())
    sparsifier = Sparsifier(net, optimizer, SparsityConfig(density=0.4, update_interval=2), 20)
    for _ in train(net, optimizer, sparsifier, last=10):
        assert check_masks(net) == []
    assert caplog.text.count("Adafactor keeps row_var, col_var of embed.weight in another shape") == 1


def test_move_state_leaves_counters_alone():
    state = {"step": torch.tensor(7.0), "exp_avg": torch.ones(1), "note": "text"}
    yes = torch.ones(1, dtype=torch.bool)
    assert move_state(state, torch.full((1,), 3.0), ~yes, yes) == []
    assert (state["step"], state["exp_avg"]) == (7, 0)
    state = {"step": torch.ones(1), "exp_avg_sq": torch.ones(2, 2), "row": torch.ones(2)}
    mask = torch.tensor([[True, False], [False, False]])
    assert move_state(state, torch.full((2, 2), 3.0), mask.flip(0), mask) == ["row"]
    assert state["exp_avg_sq"].tolist() == [[9, 1], [0, 1]]
    assert state["step"] == 1


def test_moments_of_dead_weights_are_cleared_when_a_used_optimizer_is_bound():
    torch.manual_seed(0)
    net = Tower()
    optimizer = torch.optim.AdamW(net.parameters())
    loss_of(net, 0).backward()
    optimizer.step()
    config = SparsityConfig(density=0.4, update_interval=0)
    draw_masks(net, config)
    sparsifier = Sparsifier(net, optimizer, config, 10)
    for _ in train(net, optimizer, sparsifier, last=3):
        assert check_masks(net) == []
    assert check_masks(net) == []


@pytest.mark.parametrize("fields", [{"update_interval": 0}, {"update_start": 0.99}, {"update_end": 0.04}])
def test_static_masks(fields):
    net, optimizer, sparsifier = sparse(**fields)
    before = masks_of(net)
    assert not any(train(net, optimizer, sparsifier, last=100))
    assert all(torch.equal(mask, before[name]) for name, mask in masks_of(net).items())
    assert sparsifier.ever_active() == pytest.approx(0.4, abs=1e-3)


def test_updates_keep_to_their_window():
    net, optimizer, sparsifier = sparse(update_start=0.2, update_end=0.5)
    updates = [update for update in train(net, optimizer, sparsifier, last=100) if update]
    assert [update.step for update in updates] == [20, 25, 30, 35, 40, 45]
    assert updates[0].drop_fraction == 0.5
    assert updates[-1].drop_fraction < 0.05


def test_clipping_sees_active_weights_only():
    net, _, sparsifier = sparse(update_interval=0)
    loss_of(net, 0).backward()
    expected = torch.stack([p.grad[p != 0].norm() if p.dim() == 2 else p.grad.norm() for p in net.parameters()]).norm()
    assert nn.utils.clip_grad_norm_(net.parameters(), 1e9) > expected
    sparsifier.step()
    assert nn.utils.clip_grad_norm_(net.parameters(), 1e9) == pytest.approx(expected.item())


def test_a_dense_model_needs_no_masks():
    net, optimizer, sparsifier = sparse(density=1.0)
    assert not any(train(net, optimizer, sparsifier, last=20))
    assert masked_modules(net) == {}
    assert sparsifier.ever_active() == 1.0
    assert sparsifier.report().overall.density == 1.0


def test_dense_tensors_stay_dense_beside_sparse_ones():
    net, optimizer, sparsifier = sparse(density=0.5, densities={"embed.*": 1.0})
    for _ in train(net, optimizer, sparsifier, last=20):
        assert get_mask(net.embed).all()


def test_wrapped_models_and_optimizers_get_the_same_masks():
    net, optimizer, sparsifier = sparse(optimizer="drifting")
    list(train(net, optimizer, sparsifier, last=21))

    class Wrapper(nn.Module):  # names as DistributedDataParallel and torch.compile give them
        words, batch = Tower.words, Tower.batch

        def __init__(self, inner):
            super().__init__()
            self.module = nn.Module()
            self.module._orig_mod = inner

        def forward(self, *inputs):
            return self.module._orig_mod(*inputs)

    class WrappedOptimizer(torch.optim.Optimizer):  # as Accelerate does
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def __getattr__(self, name):
            return getattr(self.__dict__["optimizer"], name)

    torch.manual_seed(0)
    other = Tower()
    config = SparsityConfig(density=0.4, update_interval=5)
    draw_masks(other, config)
    plain = Drifting(reversed(list(other.parameters())))
    wrapped = Wrapper(other)
    list(train(wrapped, plain, Sparsifier(wrapped, WrappedOptimizer(plain), config, 100), last=21))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())


# ------------------------------------------------------------------------------------------------------- resume


def test_state_is_loaded_after_the_model_even_when_the_sparsifier_came_first():
    net, optimizer, sparsifier = sparse()
    list(train(net, optimizer, sparsifier, last=12))
    other, fresh, late = sparse(seed=5)
    other.load_state_dict(net.state_dict())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    late.load_state_dict(sparsifier.state_dict())
    late.config = sparsifier.config
    assert list(train(other, fresh, late, 12, 30)) == list(train(net, optimizer, sparsifier, 12, 30))
    assert equal(snapshot(other, fresh), snapshot(net, optimizer))


def test_state_holds_tensors_only():
    state = sparse()[2].state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert state["ever_active.embed.weight"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("target.head.weight"), r"target\.head\.weight is missing"),
        (lambda state: state.update(other=torch.zeros(1)), r"other is unknown"),
        (lambda state: state["target.head.weight"].add_(1), r"does not fit the mask of head\.weight"),
        (
            lambda state: state.update({"ever_active.head.weight": torch.zeros(1)}),
            r"does not fit the mask of head\.weight",
        ),
    ],
)
def test_a_foreign_state_is_refused(spoil, message):
    _, _, sparsifier = sparse()
    state = sparsifier.state_dict()
    spoil(state)
    with pytest.raises(ValueError, match=message):
        sparsifier.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exclude": ["decoder.*"]}, r"exclude='decoder\.\*': fits none of the 4 weights"),
        ({"densities": {"heads.*": 0.5}}, r"densities='heads\.\*': fits none of the 4 weights"),
        ({"densities": {"layers.*": 1.0}, "density": 0.4}, r"densities: the fixed groups take 4224 of the 2330 active"),
        ({"densities": {"*": 0.5}, "density": 0.4}, r"density=0\.4: accepted is 0\.5, which densities give"),
    ],
)
def test_impossible_groups(fields, message):
    with pytest.raises(ValueError, match=message):
        sparse(**fields)


def test_a_sparse_config_needs_masks():
    net = Tower()
    with pytest.raises(ValueError, match=r"density=0\.4: the model carries no masks; accepted is .* draw_masks"):
        Sparsifier(net, torch.optim.SGD(net.parameters()), SparsityConfig(density=0.4), 10)


def test_weights_outside_their_mask_are_refused():
    net, optimizer, sparsifier = sparse()
    with torch.no_grad():
        net.head.weight.fill_(1.0)
    with pytest.raises(ValueError, match=r"head\.weight: not 0 outside the mask; accepted are zeros"):
        Sparsifier(net, optimizer, sparsifier.config, 10)


def test_the_optimizer_must_own_the_weights():
    net, _, sparsifier = sparse()
    with pytest.raises(ValueError, match=r"optimizer: does not own the masked weights embed\.weight; accepted"):
        Sparsifier(net, torch.optim.SGD([*net.layers.parameters(), *net.head.parameters()]), sparsifier.config, 10)


def test_sparse_gradients_are_refused():
    net = nn.Sequential(nn.Embedding(10, 4, sparse=True))
    draw_masks(net, SparsityConfig(density=0.5))
    with pytest.raises(ValueError, match=r"0\.weight: has sparse gradients; accepted is .* sparse=False"):
        Sparsifier(net, torch.optim.SGD(net.parameters()), SparsityConfig(density=0.5), 10)


@pytest.mark.parametrize("total_steps", [0, -1, 2.5, None])
def test_bad_total_steps(total_steps):
    with pytest.raises(ValueError, match=r"total_steps=.*: accepted is a whole number from 1"):
        sparse(total_steps=total_steps)


def test_masks_of_another_density_stand(caplog):
    net, optimizer, _ = sparse()
    before = masks_of(net)
    sparsifier = Sparsifier(net, optimizer, SparsityConfig(density=0.7, update_interval=5), 100)
    assert "density 0.4" in caplog.text
    list(train(net, optimizer, sparsifier, last=11))
    assert all(mask.sum() == before[name].sum() for name, mask in masks_of(net).items())


def test_changing_a_mask_by_hand_is_noticed_on_load():
    net, _, sparsifier = sparse()
    state = sparsifier.state_dict()
    set_mask(net.head, torch.ones_like(net.head.weight, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"does not fit the mask of head\.weight"):
        sparsifier.load_state_dict(state)
