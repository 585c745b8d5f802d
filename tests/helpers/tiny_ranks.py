"""Training in several processes on this machine, as torchrun starts them, and what comes out of it."""

import multiprocessing
import os
import socket
import time
from contextlib import contextmanager
from multiprocessing.connection import wait

import pytest
import torch

from vidistill import distributed
from vidistill.checkpoint import read_tensors, save_tensors
from vidistill.training.trainer import Trainer


class Ranks:
    """Forked processes that form a group for every job, as those of torchrun do."""

    def __init__(self, count):
        context, self.pipes, self.children = multiprocessing.get_context("fork"), [], []
        for rank in range(count):
            here, there = context.Pipe()
            self.pipes.append(here)
            self.children.append(
                context.Process(target=as_rank, args=(rank, count, there, list(self.pipes)), daemon=True)
            )
            self.children[-1].start()
            there.close()

    def run(self, job, args):
        """Run `job(*args)` in all of them; AssertionError where one of them ends."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for pipe in self.pipes:
            pipe.send((port, job, args))
        deadline, waiting = time.time() + 600, list(self.pipes)
        while waiting:
            assert time.time() < deadline, "the processes wait for each other"
            for pipe in wait(waiting, timeout=1):
                try:
                    pipe.recv()
                except EOFError:  # it has ended, and says why in its output
                    raise AssertionError(f"process {self.pipes.index(pipe)} has ended") from None
                waiting.remove(pipe)

    def end(self):
        for child, pipe in zip(self.children, self.pipes, strict=True):
            child.kill()
            child.join()
            pipe.close()


def as_rank(rank, count, jobs, others):
    for pipe in others:  # of the parent, whose end is then seen by all
        pipe.close()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)  # a forked process has no thread pool
    while True:
        try:
            port, job, args = jobs.recv()
        except EOFError:
            return
        os.environ["MASTER_PORT"] = str(port)
        with distributed.group():
            job(*args)
        jobs.send(None)


def in_group(rank, count, port, job, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)  # a forked process has no thread pool
    with distributed.group():
        job(*args)


def ends_of(count, job, *args):
    """Run `job(*args)` in `count` processes of one group that may die of it: their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=in_group, args=(r, count, port, job, args)) for r in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join(400)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
        child.join()
    return codes


KEPT: list[dict[int, Ranks]] = []


@contextmanager
def same_ranks():
    """Inside, jobs for as many processes run in the same ones: what torch works out once a process takes seconds."""
    KEPT.append({})
    try:
        yield
    finally:
        for ranks in KEPT.pop().values():
            ranks.end()


def together(count, job, *args):
    """Run `job(*args)` in `count` processes that form a group as those of torchrun do."""
    kept = KEPT[-1] if KEPT else {}
    ranks = kept.pop(count, None) or Ranks(count)
    try:
        ranks.run(job, args)
    except BaseException:
        ranks.end()
        raise
    if KEPT:
        kept[count] = ranks
    else:
        ranks.end()


def steps(cfg, num, out):
    """Resume `cfg`, run `num` steps and save; whole weights, averages and rows go to `out`."""
    trainer = Trainer(cfg)
    trainer.resume()
    rows = [trainer.step() for _ in range(num)]
    trainer.save()
    nets = {name: student_state.net for name, student_state in trainer.train_states.items()}
    tensors = {f"{n}.{k}": v.clone() for n, net in nets.items() for k, v in distributed.whole_state(net).items()}
    trainer.student_state.swap_ema()
    tensors.update({f"average.{k}": v for k, v in distributed.whole_state(trainer.student_state.net).items()})
    if distributed.rank() == 0:
        save_tensors(out, tensors, {"rows": rows, "step": trainer.step_count})


def result(cfg, num, out, count=1):
    if count == 1:
        steps(cfg, num, out)
    else:
        together(count, steps, cfg, num, out)
    tensors, info = read_tensors(out)
    return tensors, info["rows"]


def assert_same(a, b):
    """Two results agree: what was logged, and all weights."""
    for one, other in zip(a[1], b[1], strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-6)
    assert a[0].keys() == b[0].keys()
    for name, x in a[0].items():
        torch.testing.assert_close(x, b[0][name], rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def first_gradients(cfg, out):
    """Write the gradients of the first turn of `cfg` to `out`, whole."""
    trainer = Trainer(cfg)
    trainer.update = lambda *_: {}
    trainer.step()
    distributed.mean_gradients(trainer.student_state.params, len(trainer.parts))
    named = {n: p.grad for n, p in trainer.student_state.net.named_parameters() if p.grad is not None}
    grads = {n: g.full_tensor() if distributed.is_sharded(g) else g for n, g in named.items()}
    if distributed.rank() == 0:
        save_tensors(out, grads, {})
