"""What optimizers of other libraries cannot be right with is refused before the first step, with what to do."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from library_helpers import BY_PLUGIN, CASES, COARSE, build, every_plugin, import_or_skip, plugins_of, tokens, wide
from plugin_helpers import fit

from drivetrain import Catalogue, ConfigError, MissingDependency


@every_plugin
def test_a_missing_library_is_named_with_its_install_line(made, monkeypatch):
    """Without the library, the run is refused before it starts, with the line that installs it."""
    monkeypatch.setitem(sys.modules, made.module, None)
    with pytest.raises(MissingDependency) as caught:
        build(made, wide())
    assert f"plugin {made.plugin!r} needs the package {made.module!r}" in str(caught.value)
    assert f"do: {made.install}" in str(caught.value)


@pytest.mark.slow
@every_plugin
def test_imports_are_silent_and_leave_logging_alone(made):
    """Nothing is printed or warned of, and the root logger has the level and the handlers that it had."""
    import_or_skip(made)
    package = made.install.rpartition(" ")[2] if "--no-deps" in made.install else None
    lines = [
        "import logging",
        "from drivetrain_plugins.optim._library import library",
        f"library({made.module!r}, {made.plugin!r}, {package!r})",
        "root = logging.getLogger()",
        "assert (root.handlers, root.level, root.manager.disable) == ([], logging.WARNING, 0)",
    ]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@every_plugin
def test_sparse_gradients_and_complex_parameters_are_refused(made):
    """Sparse gradients and complex parameters are found before step 0, and named."""
    import_or_skip(made)
    model = wide()
    model.embed = torch.nn.Embedding(128, 64, sparse=True)
    model.phase = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(ConfigError) as caught:
        build(made, model)
    assert f"{made.plugin} takes no sparse gradients" in str(caught.value)
    assert "sparse=True in embed" in str(caught.value)
    assert f"{made.plugin} takes no complex parameters" in str(caught.value)


WHOLE = {"adamw-4bit", "bnb-adamw", "bnb-lion", "bnb-ademamix", "bnb-rmsprop", "soap", "shampoo", "grokadamw"}


@pytest.mark.parametrize("dtype", COARSE)
@every_plugin
def test_weights_in_half_precision_train_or_are_refused(made, dtype):
    """With weights in half precision the loss falls and stays finite, or they are refused before step 0."""
    import_or_skip(made)
    model = wide(dtype)
    if made.plugin in COARSE[dtype]:
        with pytest.raises(ConfigError, match=f"embed.weight {dtype}, first.weight {dtype}"):
            build(made, model)
        return
    _, record = fit(model, plugins_of(made, lr=0.001), tokens(), steps=15)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert record.of("loss")[-1] < record.of("loss")[0]


@pytest.fixture
def mesh():
    """A mesh of this one process."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", sorted(BY_PLUGIN))
def test_sharded_parameters_train_or_are_refused(name, mesh):
    """Parameters that are `DTensor` take the same step as whole ones, or are refused before step 0."""
    from torch.distributed.tensor import Shard, distribute_tensor

    made, sharded, whole = BY_PLUGIN[name], wide(), wide()
    import_or_skip(made)
    for module in sharded.modules():
        for key, p in list(module.named_parameters(recurse=False)):
            setattr(module, key, torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
    if name in WHOLE:
        with pytest.raises(ConfigError, match=f"{name} takes no sharded parameters"):
            build(made, sharded)
        return
    for model in (sharded, whole):
        optimizer = build(made, model)
        for number, p in enumerate(model.parameters()):
            grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
            p.grad = distribute_tensor(grad, mesh, [Shard(0)]) if model is sharded else grad
        for _ in range(3):
            optimizer.step()
    for ours, theirs in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours.full_tensor(), theirs)


def test_shampoo_refuses_long_sides():
    """A matrix too large to be decomposed is refused before step 0, by name and shape."""
    made = CASES["shampoo"]
    import_or_skip(made)
    with pytest.raises(ConfigError, match=r"embed.weight \(128, 64\), first.weight \(128, 64\)"):
        build(made, wide(), max_dim=127)


@pytest.mark.parametrize("name", ["bnb-adamw", "bnb-lion", "bnb-ademamix"])
def test_paged_state_is_refused_without_a_gpu(name):
    """The library would warn in the first step and not page; here it is said before."""
    import_or_skip(CASES[name])
    with pytest.raises(ConfigError, match="paged=True on cpu"):
        build(CASES[name], wide(), paged=True)


def test_triton_is_refused_without_a_gpu():
    """The library would fail in the first step."""
    import_or_skip(CASES["stable-adamw"])
    with pytest.raises(ConfigError, match="triton=True on cpu"):
        build(CASES["stable-adamw"], wide(), triton=True)


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    """An update that is to be compiled needs a compiler, before step 0; by default a CPU needs none."""
    made = CASES["adamw-8bit"]
    import_or_skip(made)
    from torch._inductor import config, cpp_builder

    cpp_builder.get_cpp_compiler.cache_clear() if hasattr(cpp_builder.get_cpp_compiler, "cache_clear") else None
    monkeypatch.setattr(config.cpp, "cxx", ("/no/such/compiler",))
    large = torch.nn.Linear(1024, 1024)
    for model in (wide(), large):
        build(made, model)
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        build(made, wide(), compile=True)


@pytest.mark.parametrize(
    ("plugin", "options", "message"),
    [
        ("lion", {"betas": (0.9,)}, "betas must be 2 numbers"),
        ("ademamix", {"betas": (0.9, 0.99)}, "betas must be 3 numbers"),
        ("ademamix", {"betas": (0.0, 0.99, 0.999), "warmup_steps": 5}, "first and third beta above 0"),
        ("bnb-ademamix", {"betas": (0.0, 0.99, 0.999), "warmup_steps": 5}, "first and third beta above 0"),
        ("bnb-adamw", {"bits": 4}, "bits must be one of"),
        ("adamw-8bit", {"block_size": 255}, "block_size must be even"),
        ("adamw-anyprecision", {"variance_dtype": "float16"}, "variance_dtype must be one of"),
        ("soap", {"precondition_frequency": 0}, "precondition_frequency must be"),
    ],
)
def test_values_that_cannot_be_right_are_refused(plugin, options, message):
    """A value is refused when the plugin is made, with what it must be."""
    with pytest.raises(ValueError, match=message):
        Catalogue().entry(plugin).load()(**options)
