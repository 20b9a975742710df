"""Two ranks over gloo: the laws that need more than one process, and the runner itself."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from drivetrain import PlanError, Stage, Trainer, Transform, hookimpl
from drivetrain.state import EVALUATE, SAVE, STOP
from drivetrain.testing import BaseOptimizer, StopAt, digest, make_run, make_step, run_ranks
from drivetrain.testing.carriers import tiny_module
from drivetrain.testing.kinds import tensor_rows
from drivetrain.testing.probes import Exact, Ragged
from drivetrain_plugins import SGD, Accumulate, Evaluate, Loader

distributed = torch.distributed


class AllReduce:
    """The smallest data parallelism: add up everyone's gradients in one flat buffer."""

    provides = ("data-parallel",)

    @hookimpl
    def gradients_ready(self, step):
        parameters = step.run.parameters
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        flat = torch.cat([p.grad.flatten() for p in parameters])
        distributed.all_reduce(flat)
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)


def gradients_of_a_step(batch_size, accumulation):
    """Return this rank's view of the first step's gradients, in float64."""
    plugins = [Exact(), Loader(batch_size=batch_size), Accumulate(accumulation)]
    if distributed.is_initialized():
        plugins.append(AllReduce())
    run = make_run(*plugins)
    step = make_step(run, micros=accumulation, gradients=True)
    loss = step.loss.clone()
    if distributed.is_initialized():
        distributed.all_reduce(loss)
    grads = {n: p.grad.clone() for n, p in run.model.named_parameters()}
    return grads, float(loss), (step.num_rows, step.num_items)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(12, 1), (4, 3), (5, 4)])
def test_the_gradient_of_two_ranks_is_that_of_one(batch_size, accumulation):
    """Law of the loss: two ranks with micro-batches of n rows have the gradient of one with 2n, ragged ends included."""
    wanted, loss, counts = gradients_of_a_step(2 * batch_size, accumulation)
    for found, rank_loss, rank_counts in run_ranks(gradients_of_a_step, batch_size, accumulation):
        assert rank_counts == counts
        assert rank_loss == pytest.approx(loss, rel=1e-12)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-12, atol=1e-12)


def weights_and_log(world_size_times_batch):
    size = world_size_times_batch // (distributed.get_world_size() if distributed.is_initialized() else 1)
    plugins = [Exact(), Loader(batch_size=size), BaseOptimizer(), Evaluate(every="3 steps")]
    if distributed.is_initialized():
        plugins.append(AllReduce())
    run = make_run(*plugins, epochs=2, log_every=3)
    run.hooks.fit(run)
    return run.model.head.weight.detach().clone(), digest(run, "optimizer", "progress"), dict(run.metrics), run.progress


@pytest.mark.parametrize("global_batch", [24, 18])
def test_a_run_of_two_ranks_is_that_of_one(global_batch):
    """Two epochs end at the weights, counters and metrics of one process; with 18 the last batch leaves a rank empty."""
    weight, _, metrics, progress = weights_and_log(global_batch)
    one, two = run_ranks(weights_and_log, global_batch)
    assert one[1] == two[1]
    assert torch.equal(one[0], two[0])
    torch.testing.assert_close(one[0], weight, rtol=1e-10, atol=1e-12)
    assert one[3] == progress
    for name, value in metrics.items():
        assert one[2][name] == pytest.approx(value, rel=1e-9), name


def votes_of_ranks():
    run = make_run(AllReduce())
    mine = [STOP, SAVE][distributed.get_rank()]
    return [run.hooks.agree(run, votes) for votes in (0, mine, EVALUATE if mine == SAVE else 0)]


def test_votes_are_united():
    """What any rank asked for, all ranks do."""
    assert run_ranks(votes_of_ranks) == [[0, STOP | SAVE, EVALUATE]] * 2


class SkipOnRank1:
    """Skip step 1 on one rank, as a guard that sees its own loss would."""

    facts = {"may_skip": True}  # noqa: RUF012

    @hookimpl
    def gradients_ready(self, step):
        if step.run.rank == 1 and step.number == 1:
            step.skip("the test says so")


def skip_on_one_rank():
    run = make_run(SkipOnRank1(), AllReduce(), steps=3)
    run.hooks.fit(run)
    return run.progress.applied, run.skipped_steps, run.model.head.weight.detach().clone()


def test_a_step_is_skipped_by_all_ranks_or_none():
    """What one rank skips, no rank applies: counters and weights stay equal."""
    (applied, skipped, weight), (other_applied, other_skipped, other_weight) = run_ranks(skip_on_one_rank)
    assert (applied, skipped) == (other_applied, other_skipped) == (2, 1)
    assert torch.equal(weight, other_weight)


class StopOnRank1:
    @hookimpl
    def step_end(self, step):
        if step.run.rank == 1 and step.run.progress.step == 2:
            step.run.request_stop("the test asked for it")


def stop_on_one_rank():
    run = make_run(StopOnRank1(), AllReduce())
    run.hooks.fit(run)
    return run.progress.step, run.stopped


def test_one_rank_stops_all_at_the_same_step():
    """No rank acts alone: a stop that rank 1 asks for ends both after that step, and rank 0 says who asked."""
    assert run_ranks(stop_on_one_rank) == [(2, "another rank asked"), (2, "the test asked for it")]


def empty_first_rank():
    rows = tensor_rows(24)
    rows["labels"][:12] = -100
    run = make_run(Exact(), InTurn(), Ragged((12,)), AllReduce(), train=rows)
    step = make_step(run, gradients=True)
    return {n: p.grad.clone() for n, p in run.model.named_parameters()}, step.skipped, step.num_items


class InTurn:
    """Give each rank its half of the rows, in order."""

    @hookimpl
    def build_sampler(self, run, split):
        rank = run.rank
        return type("Half", (), {"order": staticmethod(lambda epoch: torch.arange(12) + 12 * rank)})


def test_a_rank_without_labels_takes_part():
    """Where one rank has no target at all, the step has the other's gradient, and both ranks apply it or neither does."""
    one, two = run_ranks(empty_first_rank)
    model = tiny_module(dropout=0.0).double()
    rows = tensor_rows(24)
    model(rows["x"][12:], rows["labels"][12:])["loss"].backward()
    assert one[2] == two[2] == 12
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(one[0][name], parameter.grad, rtol=1e-12, atol=1e-12)
        assert torch.equal(one[0][name], two[0][name])
    assert one[1] == two[1]


class Ddp:
    """PyTorch's own data parallelism, for what the runner has to survive; the loop's loss is each rank's share."""

    provides = ("data-parallel",)

    @hookimpl
    def transforms(self):
        return [Transform(Stage.SHARD, torch.nn.parallel.DistributedDataParallel)]


def with_ddp():
    run = make_run(Ddp(), steps=2)
    run.hooks.fit(run)
    return digest(run, "optimizer")


def test_ranks_with_ddp_end_cleanly():
    """The runner leaves no process to abort at exit, where DDP and gloo would do so now and then."""
    one, two = run_ranks(with_ddp)
    assert one == two


def by_itself():
    make_run()


def test_ranks_that_share_nothing_are_refused():
    """Two processes that would train by themselves are told so before step 0."""
    with pytest.raises(PlanError, match="2 ranks, but no plugin provides 'data-parallel'"):
        run_ranks(by_itself)


def other_options():
    make_run(AllReduce(), StopAt(1 + distributed.get_rank()))


def test_ranks_with_other_options_are_refused():
    """The ranks compare their plans before step 0."""
    with pytest.raises(PlanError, match="the ranks' plans differ"):
        run_ranks(other_options)


# --- the runner --------------------------------------------------------------------------------------------------


def greet(word, *, mark):
    return f"{word} {distributed.get_rank()} of {distributed.get_world_size()}{mark}", torch.ones(2)


def test_results_come_by_rank():
    """Arguments go in and results, tensors too, come out in the order of ranks."""
    results = run_ranks(greet, "rank", world_size=3, mark="!")
    assert [text for text, _ in results] == ["rank 0 of 3!", "rank 1 of 3!", "rank 2 of 3!"]
    assert all(torch.equal(tensor, torch.ones(2)) for _, tensor in results)


def fail_on_one():
    if distributed.get_rank() == 1:
        raise ValueError("rank 1 has had enough")
    distributed.barrier()


def test_the_first_error_is_raised():
    """The error is that of the rank that failed first, with its traceback, not the other's lost connection."""
    with pytest.raises(ValueError, match="rank 1 has had enough") as caught:
        run_ranks(fail_on_one)
    assert "rank 1 failed first" in caught.value.__notes__[0]
    assert "in fail_on_one" in caught.value.__notes__[0]


def die():
    if distributed.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


def test_a_killed_rank_is_told():
    """A rank that dies without an exception is named, with how it died."""
    with pytest.raises(RuntimeError, match=r"rank 0 died without an exception .exit code -9."):
        run_ranks(die)


def hang():
    if distributed.get_rank() == 0:
        time.sleep(600)


def test_a_rank_that_hangs_is_killed():
    """Time runs out for all together, and no process is left."""
    started = time.monotonic()
    with pytest.raises((TimeoutError, RuntimeError)):
        run_ranks(hang, timeout_s=3)
    assert time.monotonic() - started < 20


def assemble_on_ranks(reduce, rate_of_last):
    """Return what a run with or without data parallelism, and with one rank's own rate, is told."""
    rate = rate_of_last if distributed.get_rank() else 0.1
    plugins = [SGD(lr=rate), *([AllReduce()] if reduce else [])]
    try:
        Trainer(tiny_module(), plugins, steps=1, device="cpu").assemble(tensor_rows(16))
    except PlanError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("reduce", "rate_of_last", "told"),
    [(False, 0.1, "no plugin provides 'data-parallel'"), (True, 0.2, "the ranks' plans differ"), (True, 0.1, "")],
)
def test_ranks_that_would_train_apart_are_refused(reduce, rate_of_last, told):
    """Every rank refuses a run in which nobody reduces gradients, or whose plugins or options differ between ranks."""
    for said in run_ranks(assemble_on_ranks, reduce, rate_of_last):
        assert told in said
        assert bool(said) == bool(told)
