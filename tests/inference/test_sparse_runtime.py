"""Sparse inference computes what the dense layers do, with whichever kernel, and taken back leaves no trace."""

import copy
import logging
import os
import platform
import subprocess

import pytest
import torch
from conftest import draw_masks, slow, trained
from families import tiny_model, tokens
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from nt_hf.inference import compiled, kernels, load_sparse, restore, sparse_weights, specialization, specialize
from nt_hf.inference.kernels import fits_semi_structured
from nt_hf.models.masks import attach_masks, masked_modules, set_mask

COMPILED = compiled.library() is not None
compiled_only = pytest.mark.skipif(not COMPILED, reason="no compiler here: g++ or $CXX builds the kernels")
KERNELS = [pytest.param("compiled", marks=compiled_only), "csr"]
bitmaps_only = pytest.mark.skipif(
    not compiled.bitmaps(), reason="this CPU has no AVX-512 VBMI2 and BF16, or no compiler"
)
KERNELS_OF_BF16 = [KERNELS[0], pytest.param("bitmap", marks=bitmaps_only)]
ROWS = (1, 2, 7, 8, 9, 16, 17, 33, 130)
SHAPES = [(1, 1), (7, 5), (36, 44), (17, 130), (100, 33), (64, 64), (10, 300)]


def layer(out, inputs, density=0.3, bias=False, dtype=torch.float32):
    """A masked linear layer in a container."""
    torch.manual_seed(out * inputs)
    model = nn.Sequential(nn.Linear(inputs, out, bias=bias)).eval()
    attach_masks(model, ["0.*"])
    draw_masks(model, density)
    return model.to(dtype)


@pytest.fixture
def choose(monkeypatch):
    """Makes one kernel win every measurement."""

    def force(name, wins=0.0):
        measured = specialization._time

        def fake(*args):
            return {kernel: wins if kernel == name else 1.0 for kernel in measured(*args)}

        monkeypatch.setattr(specialization, "_time", fake)
        monkeypatch.setattr(specialization, "ROUNDS", 1)
        monkeypatch.setattr(specialization, "EVICTED_BYTES", 1)

    return force


def same_state(model, other):
    theirs = other.state_dict()
    return model.state_dict().keys() == theirs.keys() and all(
        torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items()
    )


# -------------------------------------------------------------------------------------------------------- kernels


@torch.no_grad()
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_fp32_is_dense_to_rounding(kernel, shape, bias, density, choose):
    choose(kernel)
    model = layer(*shape, density, bias)
    dense = copy.deepcopy(model)
    assert specialize(model, (1,)).layers[0].kernels == {1: kernel}
    for rows in ROWS:
        x = torch.randn(rows, shape[1])
        torch.testing.assert_close(model(x), dense(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS_OF_BF16)
def test_bf16_is_as_accurate_as_dense(kernel, shape, bias, density, choose):
    choose(kernel)
    model = layer(*shape, density, bias, dtype=torch.bfloat16)
    specialize(model, (1,))
    exact = copy.deepcopy(model).double()
    restore(exact)
    for rows in ROWS:
        x = torch.randn(rows, shape[1], dtype=torch.bfloat16)
        # One rounding, of the result: half a unit of 2**-8, and what fp32 sums lose.
        torch.testing.assert_close(model(x).double(), exact(x.double()), rtol=2**-8, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kernel", KERNELS)
def test_empty_and_full_rows(kernel, choose):
    choose(kernel)
    model = layer(40, 50)
    mask = torch.zeros(40, 50, dtype=torch.bool)
    mask[::3] = True
    nn.init.ones_(model[0].weight)
    set_mask(model[0], mask)
    specialize(model, (1,))
    for rows in ROWS:
        x = torch.randn(rows, 50)
        torch.testing.assert_close(model(x), x @ mask.float().T)
        assert not model(x)[:, 1::3].any()


@torch.no_grad()
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        pytest.param("compiled", torch.float32, marks=compiled_only),
        pytest.param("compiled", torch.bfloat16, marks=compiled_only),
        pytest.param("bitmap", torch.bfloat16, marks=bitmaps_only),
    ],
)
def test_nan_and_infinity_of_an_active_input_come_through(kernel, dtype, choose):
    choose(kernel)
    model = layer(20, 20, density=1.0, dtype=dtype)
    specialize(model, (1,))
    for rows in ROWS:
        x = torch.zeros(rows, 20, dtype=dtype)
        x[-1, 3] = torch.nan
        assert model(x)[-1].isnan().all() and not model(x)[:-1].any()
        x[-1, 3] = torch.inf
        assert model(x)[-1].isinf().all()


@torch.no_grad()
@pytest.mark.parametrize("kernel", KERNELS)
def test_leading_dimensions_strides_and_no_rows(kernel, choose):
    choose(kernel)
    model = layer(12, 10)
    dense = copy.deepcopy(model)
    specialize(model, (1,))
    x = torch.randn(10, 3, 4).permute(1, 2, 0)
    torch.testing.assert_close(model(x), dense(x))
    assert model(x[0, 0]).shape == (12,) and model(x[:, :0]).shape == (3, 0, 12)


@torch.no_grad()
def test_a_call_takes_the_kernel_of_the_nearest_number_of_rows(choose):
    choose("csr")
    model = layer(8, 8)
    specialize(model, (1, 100))
    called = []
    forward = model[0].forward
    forward.kernels = {name: lambda x, name=name: called.append(name) or x for name in ("few", "many")}
    forward.chosen = ["few", "many"]
    for rows in (1, 9, 10, 11, 500):
        model(torch.zeros(rows, 8))
    assert called == ["few", "few", "few", "many", "many"]


# ------------------------------------------------------------------------------------------------------ whole models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", ["neurotrails", "full_ensemble", "only_lm_heads", "tied"], indirect=True)
def test_generate_gives_the_dense_tokens(model, prompts, dtype, choose):
    kernel = "compiled" if COMPILED else "csr"
    choose(kernel)
    model.to(dtype)
    dense = copy.deepcopy(model)
    report = specialize(model, (3, 48))
    if COMPILED or dtype == torch.float32:
        assert all(set(layer.kernels.values()) == {kernel} for layer in report.layers)
    for heads in (None, [0]):
        options = {"max_new_tokens": 12, "do_sample": False, "active_heads": heads}
        theirs, ours = (
            m.generate(**prompts, **options, output_logits=True, return_dict_in_generate=True) for m in (dense, model)
        )
        if dtype == torch.float32:
            assert torch.equal(ours.sequences, theirs.sequences)
            torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
        else:
            torch.testing.assert_close(ours.logits[0], theirs.logits[0], rtol=0.05, atol=0.1)


@torch.no_grad()
def test_losses_and_measures_are_the_dense_ones(model, batch, choose):
    choose("csr")
    dense = copy.deepcopy(model)
    specialize(model, (3,))
    for options in ({}, {"output_head_logits": True, "output_uncertainty": True}):
        ours, theirs = (m(**batch, **options) for m in (model, dense))
        torch.testing.assert_close(ours.loss, theirs.loss)
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_restore_is_exact(model, batch, choose):
    choose("csr")
    dense = copy.deepcopy(model)
    specialize(model, (3,))
    restore(model)
    assert same_state(model, dense)
    assert torch.equal(model(**batch).logits, dense(**batch).logits)
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_a_specialized_model_saves_the_original_checkpoint(model, batch, choose, tmp_path):
    choose("csr")
    dense = copy.deepcopy(model)
    specialize(model, (3,))
    assert same_state(model, dense)
    for name, m in (("ours", model), ("theirs", dense)):
        m.save_pretrained(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert all((tmp_path / "ours" / f).read_bytes() == (tmp_path / "theirs" / f).read_bytes() for f in files)
    loaded = type(model).from_pretrained(tmp_path / "ours")
    assert torch.equal(loaded(**batch).logits, dense(**batch).logits)


@torch.no_grad()
def test_what_carries_no_mask_is_left_alone(choose):
    choose("csr")
    model = copy.deepcopy(trained("neurotrails"))
    report = specialize(model, (1,))
    assert [f"{layer.name}.weight" for layer in report.layers] == list(masked_modules(model))
    changed = {name for name, module in model.named_modules() if "forward" in vars(module)}
    assert changed == {layer.name for layer in report.layers}  # no LM head, no embedding: this variant masks blocks
    assert not any(isinstance(module, nn.Embedding) and "forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_a_layer_that_is_fastest_dense_is_left_alone(choose):
    choose("dense")
    model = layer(8, 8)
    report = specialize(model, (1, 4))
    assert report.layers[0].kernels == {1: "dense", 4: "dense"} and report.extra_bytes == 0
    assert "forward" not in vars(model[0])


@torch.no_grad()
def test_any_module_with_masks(choose):
    choose("csr")
    config = LlamaConfig(
        vocab_size=90, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    llama = LlamaForCausalLM(config).eval()
    attach_masks(llama, ["model.layers.*"])
    draw_masks(llama, 0.2)
    ids = torch.arange(10)[None]
    dense = llama.generate(ids, max_new_tokens=8, do_sample=False)
    assert len(specialize(llama, (1,)).layers) == 14
    assert torch.equal(llama.generate(ids, max_new_tokens=8, do_sample=False), dense)


def test_the_report(choose):
    choose("csr", wins=2e-6)
    model = nn.Sequential(*layer(8, 6, 0.5), *layer(8, 6, 0.5), *layer(4, 8, 0.5)).eval()
    report = specialize(model, (4, 1, 4))
    assert [entry.name for entry in report.layers] == ["0", "1", "2"]
    assert [entry.shape for entry in report.layers] == [(8, 6), (8, 6), (4, 8)]
    for entry, module in zip(report.layers, model):
        assert entry.density == module.weight.count_nonzero() / module.weight.numel()
        assert list(entry.kernels) == list(entry.seconds) == [1, 4]
        assert entry.seconds[1].keys() >= {"dense", "csr"}
    assert report.extra_bytes > 0 and report.seconds > 0
    lines = str(report).splitlines()
    assert lines[0].split()[:5] == ["layer", "weight", "density", "rows", "kernel"]
    assert len(lines) == 1 + 3 * 2 + 1 and "csr 2" in lines[1]


def test_layers_of_a_kind_are_timed_once(choose, monkeypatch):
    choose("csr")
    calls, measured = [], specialization._time
    monkeypatch.setattr(specialization, "_time", lambda *args: calls.append(args) or measured(*args))
    specialize(nn.Sequential(*layer(8, 6, 1.0), *layer(8, 6, 1.0), *layer(4, 8, 1.0)).eval(), (1, 4))
    assert len(calls) == 2 * 2


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("rows", [(), (0,), (1.5,), (True,)])
def test_rows_that_are_no_counts(rows):
    with pytest.raises(ValueError, match="accepted are one or more whole numbers"):
        specialize(layer(8, 8), rows)


def test_refused_models(model, choose):
    choose("csr")
    with pytest.raises(ValueError, match="training mode"):
        specialize(model.train())
    with pytest.raises(ValueError, match=r"no linear layer carries a mask"):
        specialize(nn.Sequential(nn.Linear(3, 3)).eval())
    specialize(model.eval(), (1,))
    with pytest.raises(ValueError, match="already"):
        specialize(model, (1,))
    restore(model)
    name, module = next(iter(masked_modules(model).items()))
    nn.init.ones_(module.weight)
    with pytest.raises(ValueError, match=name.replace(".", "[.]") + ": not 0 outside the mask"):
        specialize(model, (1,))


def test_gradients_are_refused_and_restore_brings_them_back(choose):
    choose("csr")
    model = layer(8, 8)
    specialize(model, (1,))
    with pytest.raises(RuntimeError, match="no gradients"):
        model(torch.zeros(1, 8))
    restore(model)
    model(torch.ones(1, 8)).sum().backward()
    assert model[0].weight.grad is not None


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model[0].weight.mul_(2),
        lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
        lambda model: setattr(model[0], "weight", nn.Parameter(model[0].weight.clone())),
        lambda model: model.double(),
    ],
)
def test_weights_that_changed_are_noticed(change, choose):
    choose("csr")
    model = layer(8, 8)
    specialize(model, (1,))
    change(model)
    with pytest.raises(RuntimeError, match="a weight has changed"):
        model(torch.zeros(1, 8, dtype=model[0].weight.dtype))


@torch.no_grad()
def test_autocast_runs_dense(choose):
    choose("csr")
    model = layer(8, 8)
    dense = copy.deepcopy(model)
    specialize(model, (1,))
    x = torch.randn(2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), dense(x))


@torch.no_grad()
def test_torch_compile_runs_dense(choose):
    choose("csr")
    model = layer(8, 8)
    dense = copy.deepcopy(model)
    specialize(model, (1,))
    x = torch.randn(2, 8)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), dense(x))


@torch.no_grad()
def test_a_copy_needs_to_be_specialized_anew(choose):
    choose("csr")
    model = layer(8, 8)
    specialize(model, (1,))
    other = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="or copied"):
        other(torch.zeros(1, 8))
    restore(other)
    specialize(other, (1,))
    assert torch.equal(other(torch.ones(1, 8)), model(torch.ones(1, 8)))


@torch.no_grad()
@pytest.mark.parametrize("compiler", ["/nowhere/g++", "false", "'"])
def test_without_a_compiler_there_is_one_warning_and_torch_s_kernel(compiler, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger=compiled.__name__):
            report = specialize(nn.Sequential(*layer(8, 8), *layer(9, 8)).eval(), (1,))
    finally:
        compiled.library.cache_clear()
    assert [record.message.startswith("no compiled sparse kernels") for record in caplog.records] == [True]
    assert all(entry.seconds[1].keys() == {"dense", "csr"} for entry in report.layers)


def test_without_a_compiler_a_model_keeps_its_dense_weights(model, tmp_path, monkeypatch):
    draw_masks(model, 0.3)
    model.save_pretrained(tmp_path, sparse=True)
    monkeypatch.setattr(sparse_weights, "library", lambda: None)
    with pytest.raises(ValueError, match="no compiled kernels; accepted is"):
        load_sparse(tmp_path)


@torch.no_grad()
@compiled_only
@pytest.mark.parametrize("options", ["-mno-avx512f", slow("-mno-avx")])
def test_other_instruction_sets(options, monkeypatch, tmp_path, choose):
    """The kernels of a CPU with AVX2 or SSE2 alone, which this one runs as well."""
    if platform.machine() != "x86_64":
        pytest.skip("the options are those of x86-64")
    command = f"{os.environ.get('CXX') or 'g++'} {options}"
    macros = subprocess.run(
        [*command.split(), "-march=native", "-dM", "-E", "-x", "c++", os.devnull], capture_output=True
    )
    assert (b"__AVX512F__" not in macros.stdout) and (b"__AVX__" in macros.stdout) <= (options == "-mno-avx512f")
    monkeypatch.setenv("CXX", command)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choose("compiled")
    compiled.library.cache_clear()
    try:
        assert not compiled.bitmaps()
        for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7)):
            model = layer(100, 333, bias=True, dtype=dtype)
            exact = copy.deepcopy(model).double()
            assert specialize(model, (1,)).layers[0].kernels == {1: "compiled"}
            for rows in ROWS:
                x = torch.randn(rows, 333, dtype=dtype)
                torch.testing.assert_close(model(x).double(), exact(x.double()), rtol=error, atol=error)
    finally:
        compiled.library.cache_clear()


@compiled_only
def test_the_library_is_built_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = compiled._build()
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("built again"))
    assert compiled._build() == path and list(path.parent.iterdir()) == [path]


@torch.no_grad()
def test_a_wrong_kernel_is_left_out(monkeypatch, caplog):
    monkeypatch.setattr(kernels._Csr, "__call__", lambda self, x: x @ self.weight.to_dense().T + 1)
    with caplog.at_level(logging.WARNING, logger=specialization.__name__):
        report = specialize(layer(8, 8), (1,))
    assert "csr" not in report.layers[0].seconds[1] and "the kernel csr is wrong" in caplog.text


# -------------------------------------------------------------------------------------------------- semi-structured


def two_of_four(out, inputs, dtype=torch.bfloat16):
    order = torch.rand(out, inputs // 4, 4, generator=torch.Generator().manual_seed(0)).argsort(-1)
    return (torch.randn(out, inputs) * (order < 2).view(out, inputs)).to(dtype)


@pytest.mark.parametrize(
    ("weight", "cutlass", "cusparselt"),
    [
        (two_of_four(64, 128), True, True),
        (two_of_four(64, 128, torch.float16), True, True),
        (two_of_four(48, 80), False, True),
        (two_of_four(64, 128, torch.float32), False, False),
        (two_of_four(40, 128), False, False),
        (torch.ones(64, 128, dtype=torch.bfloat16), False, False),
        (torch.zeros(64, 128, dtype=torch.bfloat16), True, True),
        (two_of_four(128, 64).T, False, False),
        (two_of_four(0, 128), False, False),
    ],
)
def test_which_weights_the_semi_structured_kernels_take(weight, cutlass, cusparselt):
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    assert fits_semi_structured(weight, SparseSemiStructuredTensorCUTLASS) == cutlass
    assert fits_semi_structured(weight, SparseSemiStructuredTensorCUSPARSELT) == cusparselt


@torch.no_grad()
@compiled_only
def test_two_of_four_on_a_cpu_is_the_sparse_kernel(choose):
    choose("compiled")
    model = nn.Sequential(nn.Linear(128, 64)).eval()
    attach_masks(model, ["0.*"])
    set_mask(model[0], two_of_four(64, 128) != 0)
    dense = copy.deepcopy(model)
    assert specialize(model, (1,)).layers[0].kernels == {1: "compiled"}
    for rows in ROWS:
        x = torch.randn(rows, 128)
        torch.testing.assert_close(model(x), dense(x))


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the semi-structured kernels need a CUDA GPU")
@pytest.mark.parametrize("kernel", sorted(kernels._semi_structured_backends()))
def test_semi_structured_on_a_gpu(kernel, choose):
    choose(kernel)
    model = nn.Sequential(nn.Linear(256, 128, bias=True)).eval()
    attach_masks(model, ["0.*"])
    set_mask(model[0], two_of_four(128, 256) != 0)
    model.to("cuda", torch.bfloat16)
    dense = copy.deepcopy(model)
    assert specialize(model, (1,)).layers[0].kernels == {1: kernel}
    for rows in ROWS:
        x = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
        torch.testing.assert_close(model(x), dense(x), rtol=2**-7, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2"])
def test_every_family_runs_sparse(family, choose):
    model = tiny_model(family, masked_modules=["model.layers.*", "model.heads.*"])
    draw_masks(model, density=0.3)
    ids = tokens()
    expected = model(ids, use_cache=False).logits
    choose("csr")
    layers = specialize(model, rows=(34,)).layers
    assert len(layers) == sum(not isinstance(x, nn.Embedding) for x in masked_modules(model).values())
    assert torch.allclose(model(ids, use_cache=False).logits, expected, atol=1e-4 * expected.abs().max().item())
    restore(model)
    assert torch.equal(model(ids, use_cache=False).logits, expected)
