"""Training in several processes on this machine, as torchrun starts them, and what comes out of it."""

import multiprocessing
import os
import socket
import time

import pytest
import torch

from vidistill import distributed
from vidistill.checkpoint import read_tensors, save_tensors
from vidistill.training.trainer import Trainer


def as_rank(rank, count, port, job, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)  # a forked process has no thread pool
    with distributed.group():
        job(*args)


def together(count, job, *args):
    """Run `job(*args)` in `count` processes that form a group as those of torchrun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=as_rank, args=(r, count, port, job, args)) for r in range(count)]
    for child in children:
        child.start()
    try:
        deadline = time.time() + 600
        while any(child.is_alive() for child in children) and not any(child.exitcode for child in children):
            assert time.time() < deadline, "the processes wait for each other"
            time.sleep(0.02)
    finally:
        for child in children:
            child.kill()
            child.join()
    assert [child.exitcode for child in children] == [0] * count


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
