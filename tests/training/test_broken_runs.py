"""Runs of several processes in which something breaks: they end, all of them, and go on from their last state."""

import os
import resource
import signal
from dataclasses import replace

import pytest
import torch
from tiny_ranks import ends_of, together
from tiny_training import OPTIM, flow_stage

from vidistill import checkpoint, distributed
from vidistill.training.run_folder import newest_state
from vidistill.training.trainer import Trainer, train

BREAKS_AT = 3  # the step after the last saved one


def stage(root, **settings):
    base = flow_stage(root, steps=5, save_every=2, batch=2, optim=replace(OPTIM, muon=""))
    return replace(base, **settings)


def dies(cfg):
    trainer = Trainer(cfg)
    make = trainer.step

    def step():
        if distributed.rank() == 1 and trainer.step_count == BREAKS_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return make()

    trainer.step = step
    trainer.run()


def fills_its_disk(cfg):
    """Train until the second process can write no more, while the second state is saved."""
    trainer = Trainer(cfg)
    save = trainer.save

    def limited():
        if distributed.rank() == 1 and trainer.step_count > 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        save()

    trainer.save = limited
    with pytest.raises(OSError, match=r"step 4 was not written.*state-00000002.*process 1"):
        trainer.run()
    assert trainer.step_count == 4


@pytest.mark.timeout(900)
@pytest.mark.parametrize("parallel", distributed.PARALLEL)
def test_a_run_whose_process_dies_ends_and_goes_on_from_its_last_state(tmp_path, parallel):
    cfg = stage(tmp_path, name="broken", parallel=parallel)
    assert ends_of(2, dies, cfg) == [1, -signal.SIGKILL], "the process that lives does not wait for ever"
    assert newest_state(tmp_path / "runs" / "broken") is not None
    together(2, train, cfg)
    together(2, train, replace(cfg, name="once"))
    broken, once = (checkpoint.load(tmp_path / "runs" / n / n).net.state_dict() for n in ("broken", "once"))
    assert all(torch.equal(x, once[name]) for name, x in broken.items())


@pytest.mark.timeout(900)
def test_a_disk_that_is_full_for_one_process_ends_all_and_keeps_the_state_before(tmp_path):
    cfg = stage(tmp_path, name="full", parallel="shard")
    together(2, fills_its_disk, cfg)
    assert newest_state(tmp_path / "runs" / "full").name == "state-00000002"
    together(2, train, cfg)
    assert newest_state(tmp_path / "runs" / "full").name == "state-00000005"
