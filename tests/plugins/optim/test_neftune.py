"""`neftune` makes the embeddings noisy, in training and nowhere else."""

from __future__ import annotations

import pytest
import torch

from drivetrain import ConfigError, Trainer, hookimpl
from drivetrain.rng import derive_seed
from drivetrain.testing.digests import digest
from drivetrain.testing.probes import StopAt
from drivetrain_plugins import SGD, Accumulate, Evaluate, Neftune

ROWS, LENGTH, WIDTH, ALPHA = 40, 5, 4, 3.0


class Tokens(torch.nn.Module):
    """Embed, average, classify; keeps what the embedding gave."""

    def __init__(self, says=True):
        super().__init__()
        self.embed = torch.nn.Embedding(17, WIDTH)
        self.head = torch.nn.Linear(WIDTH, 3)
        self.seen = []
        if says:
            self.get_input_embeddings = lambda: self.embed

    def forward(self, ids, labels):
        vectors = self.embed(ids)
        self.seen.append((self.training, (vectors - self.embed.weight[ids]).detach()))
        return {"loss": torch.nn.functional.cross_entropy(self.head(vectors.mean(1)), labels)}


def model(**options):
    torch.manual_seed(5)
    return Tokens(**options)


def data(rows=ROWS, seed=1):
    draws = torch.Generator().manual_seed(seed)
    return {
        "ids": torch.randint(0, 17, (rows, LENGTH), generator=draws),
        "labels": torch.randint(0, 3, (rows,), generator=draws),
    }


def fit(made, plugins, steps=4, **more):
    trainer = Trainer(made, [SGD(lr=0.1), *plugins], steps=steps, device="cpu")
    trainer.fit(data(), **more)
    return trainer


def expected(step, micros=1):
    """Return a step's noise, as the documentation says."""
    draws = torch.Generator().manual_seed(derive_seed(0, "neftune", step, 0))
    bound = ALPHA / (LENGTH * WIDTH) ** 0.5
    return [(torch.rand(8, LENGTH, WIDTH, generator=draws) * 2 - 1) * bound for _ in range(micros)]


def test_noise_is_the_papers():
    """Each step adds uniform noise of at most alpha / sqrt(L d), from its own stream; accumulated batches go on with it."""
    made = model()
    fit(made, [Neftune(alpha=ALPHA), Accumulate(2)], steps=2)
    wanted = [noise for step in range(2) for noise in expected(step, 2)]
    assert len(made.seen) == 4
    for (_, noise), want in zip(made.seen, wanted, strict=True):
        torch.testing.assert_close(noise, want, rtol=0, atol=1e-6)
    largest = max(noise.abs().max().item() for _, noise in made.seen)
    assert 0.9 < largest / (ALPHA / (LENGTH * WIDTH) ** 0.5) <= 1 + 1e-6


def test_evaluations_see_no_noise():
    """The embeddings of an evaluation are those of the table, between noisy steps."""
    made = model()
    fit(made, [Neftune(alpha=ALPHA), Evaluate(every="1 step")], steps=3, evaluate=data(8, seed=2))
    assert [bool(noise.any()) for _, noise in made.seen] == [training for training, _ in made.seen]
    assert len(made.seen) == 6


def test_nothing_is_left_on_the_model():
    """After a run, and after one that fails, the embedding is what it was."""
    made = model()
    fit(made, [Neftune()])
    assert not made.embed._forward_hooks

    class Fail:
        @hookimpl
        def step_end(self, step):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(made, [Neftune(), Fail()])
    assert not made.embed._forward_hooks


def test_the_module_can_be_named():
    """A model that does not say what embeds its input trains with a name, and without one is refused."""
    asked, named = model(), model(says=False)
    fit(asked, [Neftune()])
    fit(named, [Neftune(module="embed")])
    assert all(torch.equal(a, b) for a, b in zip(asked.parameters(), named.parameters(), strict=True))
    with pytest.raises(ConfigError, match=r"(?s)Tokens without get_input_embeddings.*name the module"):
        fit(model(says=False), [Neftune()])
    with pytest.raises(ConfigError, match=r"(?s)no such module.*embedding"):
        fit(model(), [Neftune(module="embedding")])


def test_the_global_stream_is_not_drawn_from():
    """What a run draws globally is the same with and without noise (law 3)."""
    draws = []

    class Look:
        @hookimpl
        def gradients_ready(self):
            draws.append(torch.rand(()).item())

    fit(model(), [Look()])
    fit(model(), [Look(), Neftune()])
    assert draws[:4] == draws[4:]


def test_resume_is_exact():
    """A run that is stopped and gone on with has the noise of one that is not."""

    def begin(*more):
        return Trainer(model(), [SGD(lr=0.1), Neftune(), *more], steps=7, device="cpu").assemble(data())

    def go_on(run):
        run.model.train()
        run.hooks.fit(run)
        return run

    straight, part, rest = go_on(begin()), go_on(begin(StopAt(3))), begin()
    rest.load_state_dict(part.state_dict())
    assert digest(go_on(rest)) == digest(straight)
