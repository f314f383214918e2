"""The run configuration, the pieces of the loop, metrics and reports."""

import copy
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import token_ids, trained
from transformers import LlamaConfig

from nt_hf import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM, Sparsifier, SparsityConfig
from nt_hf.config import TrainConfig, load_run_config
from nt_hf.data.streams import pad_rows
from nt_hf.data.tokenizers import load_tokenizer
from nt_hf.models.masks import masked_modules
from nt_hf.plan.flops import training_flops_per_token
from nt_hf.plan.hardware import peak_tflops
from nt_hf.sparsity.first_masks import target_counts
from nt_hf.training.batches import count_targets, grouped, limited, to_device
from nt_hf.training.device import HostCopy, compile_blocks
from nt_hf.training.manifest import find_checkpoints
from nt_hf.training.metrics import Metrics, read_metrics
from nt_hf.training.optimizer import learning_rate, make_optimizer
from nt_hf.training.resume import find_resume

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


# ------------------------------------------------------------------------------------------- configuration


def test_later_files_and_overrides_win(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {max_steps: 7, log_steps: 1}\nmodel: {hidden_size: 32}")
    (tmp_path / "b.yaml").write_text("train: {max_steps: 8}")
    config = load_run_config([tmp_path / "a.yaml", tmp_path / "b.yaml"], {"train.learning_rate": "1e-4"})
    assert (config.train.max_steps, config.train.log_steps) == (8, 1)
    assert config.train.learning_rate == 1e-4  # YAML itself reads 1e-4 as text
    assert config.model == {"hidden_size": 32}


def test_text_that_is_no_yaml_is_text():
    assert load_run_config([], {"data.train": "*.jsonl"}).data.train == "*.jsonl"  # YAML's alias


def test_a_structure_is_no_number_to_the_base_60(tmp_path):
    (tmp_path / "a.yaml").write_text("sparsity: {structure: 2:4, density: 0.5}\ntrain: {max_steps: 1_000}\n")
    config = load_run_config([tmp_path / "a.yaml"], {"sparsity.seed": "-7"})
    assert (config.sparsity.structure, config.train.max_steps, config.sparsity.seed) == ("2:4", 1000, -7)
    assert load_run_config([], {"sparsity.structure": "1:2", "sparsity.density": "0.5"}).sparsity.structure == "1:2"


def test_one_seed_for_the_whole_run_unless_the_masks_have_their_own():
    assert load_run_config([], {"train.seed": "3"}).sparsity.seed == 3
    assert load_run_config([], {"train.seed": "3", "sparsity.seed": "4"}).sparsity.seed == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"train.max_step": "4"}, "unknown key --train.max_step: did you mean max_steps?"),
        ({"trian.max_steps": "4"}, "unknown key --trian: did you mean train?"),
        ({"sparsity.densty": "0.5"}, "unknown key --sparsity.densty: did you mean density?"),
        ({"model.num_heads": "2"}, "did you mean num_"),
        ({"data.tokeniser": "x"}, "did you mean tokenizer?"),
        ({"train.zzzz": "1"}, "accepted is max_steps, batch_size"),
        ({"train": "1"}, "accepted is --section.key"),
        ({"train.max_steps": "many"}, "train.max_steps='many': accepted is a whole number"),
        ({"train.max_steps": "0"}, "train.max_steps=0: accepted is a whole number from 1"),
        ({"train.max_steps": "true"}, "train.max_steps=True: accepted is a whole number"),
        ({"train.warmup_ratio": "1"}, "train.warmup_ratio=1.0: accepted is a share of the run in [0, 1)"),
        ({"train.betas": "[a, b]"}, "train.betas[0]='a': accepted is a finite number"),
        ({"train.betas": "[a"}, "train.betas='[a': accepted is a list"),
        ({"train.eps": "0"}, "train.eps=0.0: accepted is a number above 0"),
        ({"train.learning_rate": "-1"}, "train.learning_rate=-1.0: accepted is a number above 0"),
        ({"train.optimizer": "lamb"}, "train.optimizer='lamb': accepted is adam, adamw, sgd"),
        ({"train.nesterov": "true", "train.momentum": "0"}, "train.nesterov=True: accepted is false where momentum"),
        ({"train.lr_milestones": "[0.5, 1]"}, "train.lr_milestones=[0.5, 1.0]: accepted is a list of shares"),
        ({"train.precision": "fp16"}, "train.precision='fp16': accepted is auto, fp32, bf16 (did you mean bf16?)"),
        ({"train.matmul_precision": "low"}, "train.matmul_precision='low': accepted is highest, high, medium"),
        ({"train.weight_decay": "0.1"}, "train.weight_decay=0.1: accepted is 0, or a number above 0 with optimizer"),
        ({"sparsity.density": "0"}, r"sparsity.density=0.*\(0, 1\]"),
        ({"sparsity.density": "1.5"}, r"sparsity.density=1.5.*\(0, 1\]"),
        ({"sparsity.drop": "magnitud"}, "magnitude"),
        ({"sparsity.grow": "grad"}, "gradient"),
        ({"sparsity.distribution": "er_k"}, "erk"),
        ({"sparsity.drop_schedule": "cosin"}, "cosine"),
        ({"data.packing": "packed"}, "data.packing.*packed.*pack.*pad"),
        ({"data.on_bad_line": "ignore"}, "data.on_bad_line.*ignore.*error"),
    ],
)
def test_a_wrong_key_or_value_is_one_line_that_names_it(override, message):
    with pytest.raises(ValueError, match=message if ".*" in message else re.escape(message)) as caught:
        load_run_config([], override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0: accepted is a whole number from 1"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_attention_heads": 3}, "num_attention_heads=3: accepted is a divisor of hidden_size=16"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3: accepted is a divisor of num_attention_heads=2"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"vocab_size": -5}, "vocab_size=-5"),
        ({"hidden_act": "foo"}, "hidden_act='foo': accepted are"),
    ],
)
def test_impossible_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        NeuroTrailsLlamaConfig(**SHAPE | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [1, 2]", "section train=[1, 2]: accepted is a mapping"),
        ("trainn: {}", "section trainn: did you mean train?"),
        ("- 1", "accepted is a mapping"),
        ("a: b: c", "not YAML"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_run_config([path])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# Name, hidden, intermediate, attention heads, blocks, blocks in a head, share of the zeros that ERK puts into blocks.
SIZES = [
    ("9m", 128, 352, 4, 4, 2, 0.0),
    ("20m", 256, 688, 4, 4, 2, 0.0),
    ("60m", 512, 1376, 8, 8, 5, 0.0),
    ("130m", 768, 2048, 12, 12, 8, 0.10),
    ("350m", 1024, 2736, 16, 24, 16, 0.50),
    ("1b", 2048, 5472, 32, 24, 16, 0.73),
    ("7b", 4096, 10928, 32, 32, 21, 0.90),
]


@pytest.mark.parametrize(("name", "hidden", "inner", "attention", "depth", "in_head", "in_blocks"), SIZES)
def test_the_papers_sizes_and_larger_ones(name, hidden, inner, attention, depth, in_head, in_blocks):
    config = load_run_config([CONFIGS / f"{name}.yaml"])
    with torch.device("meta"):
        model = NeuroTrailsLlamaForCausalLM(NeuroTrailsLlamaConfig(**config.model, masked_modules=["*"]))
    c = model.config
    assert (c.hidden_size, c.intermediate_size, c.num_attention_heads) == (hidden, inner, attention)
    assert (c.num_hidden_layers, c.blocks_in_head, c.num_ensemble_heads, c.vocab_size) == (depth, in_head, 3, 32000)
    tokens = {"1b": 512 * 1024, "7b": 1024 * 2048}.get(name, 512 * 256)
    assert config.train.batch_size * config.data.sequence_length == tokens
    targets = target_counts(model, config.sparsity)
    zeros = {key: module.weight.numel() - targets[key] for key, module in masked_modules(model).items()}
    assert sum(v for k, v in zeros.items() if ".layers." in k) / sum(zeros.values()) == pytest.approx(
        in_blocks, abs=0.005
    )


SMALL = {"sequence_length": 256, "batch_size": 512, "gradient_checkpointing": False, "max_grad_norm": None}
LARGE = {"gradient_checkpointing": True, "max_grad_norm": 1.0}
SETTINGS = {
    "9m": SMALL | {"max_steps": 11112, "micro_batch_size": 64, "learning_rate": 0.003},
    "20m": SMALL | {"max_steps": 11112, "micro_batch_size": 64, "learning_rate": 0.003},
    "60m": SMALL | {"max_steps": 11112, "micro_batch_size": 64, "learning_rate": 0.002},
    "130m": SMALL | {"max_steps": 11112, "micro_batch_size": 64, "learning_rate": 0.0015},
    "350m": SMALL | {"max_steps": 22223, "micro_batch_size": 64, "learning_rate": 0.001},
    "1b": LARGE | {"sequence_length": 1024, "batch_size": 512, "max_steps": 56000, "micro_batch_size": 4,
                   "learning_rate": 0.0005},
    "7b": LARGE | {"sequence_length": 2048, "batch_size": 1024, "max_steps": 71112, "micro_batch_size": 2,
                   "learning_rate": 0.0003},
}  # fmt: skip


PAPER = {"paper", "130m", "350m"}


def test_the_sizes_differ_in_these_settings_and_in_no_others():
    for name, settings in SETTINGS.items():
        config = load_run_config([name])
        expected = copy.deepcopy(load_run_config(["paper" if name in PAPER else "c4"]))
        for key, value in settings.items():
            setattr(expected.data if hasattr(expected.data, key) else expected.train, key, value)
        assert (config.data, config.sparsity, config.train) == (expected.data, expected.sparsity, expected.train), name


def test_masks_move_as_in_the_paper_in_the_papers_files_and_at_random_elsewhere():
    paper, c4 = load_run_config(["paper"]), load_run_config(["c4"])
    # The library's defaults, but for the second moments, which not every optimizer can keep so.
    assert paper.sparsity == SparsityConfig(density=0.9, second_moments="dense")
    moves = {"drop": "set", "grow": "random", "drop_fraction": 0.3, "update_end": 0.75}
    assert c4.sparsity == SparsityConfig(density=0.9, **moves)
    assert (paper.data, paper.train) == (c4.data, c4.train)
    assert load_run_config(["60m", "paper"]).sparsity == paper.sparsity
    assert load_run_config(["60m", "paper"]).model == load_run_config(["60m"]).model | paper.model


def test_the_papers_first_weights_are_those_of_the_papers_files():
    scales = {name: load_run_config([name]).model.get("embedding_initializer_range") for name in (*SETTINGS, "paper")}
    assert {name for name, scale in scales.items() if scale is not None} == PAPER
    assert {scales[name] for name in PAPER} == {0.632}


def test_first_weights_of_a_checkpoint_stay(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    start = {"model.init_from": str(tmp_path)}
    with pytest.raises(ValueError, match=r"^model.embedding_initializer_range=0.5: accepted is null with model.i"):
        load_run_config([], start | {"model.embedding_initializer_range": "0.5"})
    with pytest.raises(ValueError, match=r"^sparsity.first_weights='fan_in': accepted is dense with model.init_from"):
        load_run_config([], start | {"sparsity.first_weights": "fan_in", "sparsity.density": "0.5"})


def test_a_configuration_is_found_by_its_name_or_path(tmp_path, monkeypatch):
    assert load_run_config(["demo"]) == load_run_config([CONFIGS / "demo.yaml"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a directory of this name is not meant
    assert load_run_config(["demo", "treenet"]).sparsity.density == 1.0
    (tmp_path / "own.yaml").write_text("train: {max_steps: 7}")
    assert load_run_config(["own.yaml"]).train.max_steps == 7
    with pytest.raises(
        ValueError, match=r"^configuration demmo: accepted is a YAML file, or one of the names 130m, 1b"
    ):
        load_run_config(["demmo"])


def test_a_file_lies_over_its_base(tmp_path):
    (tmp_path / "below.yaml").write_text("train: {max_steps: 7, seed: 1}\nmodel: {hidden_size: 32}")
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "above.yaml"
    path.write_text("base: ../below.yaml\ntrain: {max_steps: 8}")
    config = load_run_config([path], {"train.log_steps": "3"})
    assert (config.train.max_steps, config.train.seed, config.train.log_steps) == (8, 1, 3)
    assert config.model == {"hidden_size": 32} and "base" not in config.to_dict()
    path.write_text("base: 60m\ntrain: {max_steps: 8}")  # by its name
    assert load_run_config([path]).model == load_run_config(["60m"]).model
    for text, message in (
        ("base: nothing", "configuration nothing: accepted is a YAML file, or one of the names"),
        ("base: [a]", r"above.yaml: base=\['a'\]: accepted is a text"),
        ("base: above.yaml", r"above.yaml: base='above.yaml': accepted is a file that does not lie over this one"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_run_config([path])


@pytest.mark.parametrize("name", ["dense", "treenet", "full_ensemble"])
def test_the_baselines_are_laid_over_any_size(name):
    config = load_run_config([CONFIGS / "60m.yaml", CONFIGS / f"{name}.yaml"])
    model = NeuroTrailsLlamaConfig(**config.model)
    assert config.sparsity.density == 1.0
    assert model.num_ensemble_heads == (1 if name == "dense" else 3)
    assert model.blocks_in_head == (8 if name == "full_ensemble" else 5)
    assert model.share_embedding == (name != "full_ensemble")


def test_a_configuration_survives_its_file(tmp_path):
    config = load_run_config([CONFIGS / "demo.yaml"])
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert load_run_config([tmp_path / "again.yaml"]) == config


# -------------------------------------------------------------------------------------- pieces of the loop


def test_the_learning_rate_warms_up_and_falls_to_its_floor():
    train = TrainConfig(max_steps=100, warmup_ratio=0.1, learning_rate=1.0, min_lr_ratio=0.1)
    assert learning_rate(0, train) == pytest.approx(0.1)
    assert learning_rate(9, train) == pytest.approx(1.0)
    assert learning_rate(55, train) == pytest.approx(0.55)
    assert learning_rate(100, train) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "expected"),
    [(8, None, 1, (8, 1)), (8, None, 4, (2, 1)), (8, 2, 1, (2, 4)), (8, 2, 2, (2, 2)), (512, 64, 8, (64, 1))],
)
def test_a_batch_is_split_into_passes(batch, micro, processes, expected):
    assert TrainConfig(batch_size=batch, micro_batch_size=micro).accumulation_steps(processes) == expected


@pytest.mark.parametrize(("batch", "micro", "processes"), [(8, 3, 1), (8, 8, 2), (8, None, 3)])
def test_a_batch_that_does_not_divide_is_refused(batch, micro, processes):
    with pytest.raises(ValueError, match=f"batch_size={batch}: accepted is a multiple"):
        TrainConfig(batch_size=batch, micro_batch_size=micro).accumulation_steps(processes)


def test_groups_and_targets():
    labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
    batches = [{"labels": labels}] * 5
    assert [len(group) for group in grouped(batches, 2)] == [2, 2, 1]
    assert count_targets(batches[:2]) == [2]  # only the second label has a token before it and counts
    assert count_targets([{"labels": torch.stack([labels, torch.ones_like(labels)])}] * 2) == [2, 8]


def test_metrics_are_cut_back_to_the_step_that_a_run_resumes_from(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write("eval", step=0)
    metrics = Metrics(metrics.path)  # killed before its first checkpoint, it starts anew
    for step in (1, 2, 3):
        metrics.write("train", step=step, loss=1.0)
    with open(metrics.path, "a") as file:
        file.write('{"event": "train", "st')  # killed while writing
    assert [r["step"] for r in read_metrics(Metrics(metrics.path, resume_step=2).path)] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_checkpoints_are_found_and_chosen(tmp_path):
    for name in ("checkpoint-5", "checkpoint-40", "checkpoint-x", ".partial-checkpoint-50"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
        (tmp_path / name / "run.yaml").write_text("{}")
    (tmp_path / "model").mkdir()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-40"]
    assert [path.name for path in find_resume("auto", tmp_path)] == ["checkpoint-40", "checkpoint-5"]
    assert find_resume("auto", tmp_path / "new") == find_resume("never", tmp_path / "new") == []
    assert find_resume(str(tmp_path / "checkpoint-5"), tmp_path / "new") == [tmp_path / "checkpoint-5"]
    assert find_resume(str(tmp_path / "checkpoint-40"), tmp_path) == [tmp_path / "checkpoint-40"]
    with pytest.raises(ValueError, match="holds a later checkpoint, checkpoint-40"):
        find_resume(str(tmp_path / "checkpoint-5"), tmp_path)
    with pytest.raises(ValueError, match="holds a run"):
        find_resume("never", tmp_path)
    with pytest.raises(ValueError, match="accepted is auto, never, or a checkpoint"):
        find_resume(str(tmp_path / "model"), tmp_path)


def test_a_part_of_the_validation_text_is_scored():
    batches = [{"labels": torch.zeros(1, 5, dtype=torch.long)}] * 4  # 4 predicted tokens each
    assert len(list(limited(batches, 8, stop=lambda: False))) == 2
    assert len(list(limited(batches, 9, stop=lambda: False))) == 3
    assert len(list(limited(batches, None, stop=lambda: False))) == 4
    assert len(list(limited(batches, None, stop=lambda: True))) == 1


# --------------------------------------------------------------------------------------------------- costs


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = NeuroTrailsLlamaConfig(**SHAPE, num_ensemble_heads=3, blocks_in_head=1)
    config.initializer_range = 0.3  # predictions far from uniform
    return NeuroTrailsLlamaForCausalLM(config)


def test_flops_are_those_of_the_matrix_products(model):
    from torch.utils.flop_counter import FlopCounterMode

    tokens = torch.zeros(1, 12, dtype=torch.long)
    model.eval()
    model.config._attn_implementation = "eager"  # counted as plain products
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=tokens)
    model.config._attn_implementation = "sdpa"
    assert 3 * counter.get_total_flops() == 12 * training_flops_per_token(model.config, 12)


def test_known_peaks():
    assert peak_tflops("NVIDIA H200") == 989.0
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312.0
    assert peak_tflops("AMD EPYC") is None


def test_train_config_is_plain_data():
    json.dumps(dataclasses.asdict(TrainConfig()))


# Speed: what must not change the result


def test_right_padded_rows_need_no_attention_mask():
    model = copy.deepcopy(trained("neurotrails"))
    rows = [token_ids()[:40].tolist(), token_ids()[100:113].tolist()]
    batch = pad_rows(rows, 40, load_tokenizer("sample"))
    plain = model(**batch, use_cache=False)
    fast = model(**to_device(batch, torch.device("cpu")), use_cache=False)
    assert (batch["attention_mask"] == 0).any()
    torch.testing.assert_close(fast.head_losses, plain.head_losses)


def test_compiled_blocks_share_one_graph_that_outlives_topology_updates():
    model = copy.deepcopy(trained("neurotrails"))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    eager, compiled = copy.deepcopy(model).train(), model.train()
    names = list(compiled.state_dict())
    compile_blocks(compiled)
    batch = token_ids()[:160].view(4, 40)
    losses = {}
    for name, variant in {"eager": eager, "compiled": compiled}.items():
        optimizer = torch.optim.Adam(variant.parameters(), lr=1e-3)
        sparsifier = Sparsifier(variant, optimizer, SparsityConfig(density=0.5, update_interval=2), total_steps=100)
        losses[name] = []
        for _ in range(5):
            output = variant(batch, labels=batch, use_cache=False)
            output.loss.backward()
            assert (sparsifier.step() is not None) == (sparsifier.steps % 2 == 0)
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(output.loss.detach())
    # Rounding that differs moves single weights at updates.
    torch.testing.assert_close(torch.stack(losses["compiled"]), torch.stack(losses["eager"]), rtol=1e-3, atol=0)
    torch.testing.assert_close(losses["compiled"][0], losses["eager"][0], rtol=1e-6, atol=0)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert list(compiled.state_dict()) == names


def test_numbers_come_to_the_host_as_they_were():
    values = torch.tensor([1.5, 2.5], requires_grad=True)
    copied = HostCopy(one=torch.tensor(3), many=values)
    assert copied.read() == {"one": 3, "many": [1.5, 2.5]}


def test_learning_rate_factors_make_groups_and_the_last_fitting_glob_decides():
    model = NeuroTrailsLlamaForCausalLM(NeuroTrailsLlamaConfig(**SHAPE, blocks_in_head=1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    factors = {"*.layers.*": 0.25, "model.layers.*": 0.5}
    optimizer = make_optimizer(model, TrainConfig(learning_rate_factors=factors))
    factor_of = {
        names[id(p)]: group["learning_rate_factor"] for group in optimizer.param_groups for p in group["params"]
    }
    assert factor_of.keys() == set(names.values())
    for name, factor in factor_of.items():
        assert factor == (0.5 if name.startswith("model.layers.") else 0.25 if ".layers." in name else 1.0), name
    with pytest.raises(ValueError, match=r"'model\.blocks\.\*' fits no parameter; accepted are globs of names such as"):
        make_optimizer(model, TrainConfig(learning_rate_factors={"model.blocks.*": 0.5}))
    with pytest.raises(ValueError, match=r"learning_rate_factors=.*: accepted is a mapping from globs to numbers"):
        TrainConfig(learning_rate_factors={"*": -1})
