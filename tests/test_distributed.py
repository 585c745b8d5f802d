"""Two processes on this machine do what one does."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_nets import DIT, chunk_levels, clip, condition, tiny_dit, tiny_student

from vidistill import distributed
from vidistill.lora import LoraConfig, add_lora, merge_lora

WORKER = """
import sys
import torch
from tiny_nets import clip, condition, tiny_dit
from vidistill import distributed

out, resume = sys.argv[1:3]
torch.set_num_threads(1)
distributed.init()
net = tiny_dit()
net = distributed.shard(net, net.blocks)
optim = torch.optim.AdamW(net.parameters(), lr=1e-2)
x, cond, sigma = clip(3, batch=4), condition(3, batch=4), torch.linspace(0.1, 0.9, 4)[:, None].expand(4, 3)
rows = distributed.share(4)
if resume != "-":
    distributed.load(resume, net, optim)
for _ in range(2):
    optim.zero_grad()
    loss = net(x[rows], sigma[rows], cond.map(lambda t: t[rows])).square().mean()
    loss.backward()
    optim.step()
distributed.save(out + ".dcp", net, optim)
whole = {name: distributed.whole(p).detach().clone() for name, p in net.named_parameters()}
loss = distributed.mean(loss)
if distributed.rank() == 0:
    torch.save({"loss": loss.detach(), **whole}, out)
distributed.finish()
"""


def work(tmp_path: Path, name: str, processes: int, resume: str = "-") -> dict[str, torch.Tensor]:
    script, out = tmp_path / "worker.py", tmp_path / name
    script.write_text(WORKER)
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    path = f"{Path(__file__).parent}:{Path(__file__).parent.parent}"
    env = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    run = subprocess.run([*launch, str(script), str(out), resume], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_equal_one_on_the_same_batch_and_resume_each_other(tmp_path):
    one, two = work(tmp_path, "one", 1), work(tmp_path, "two", 2)
    assert all((one[name] - two[name]).abs().max() < 1e-5 for name in one)
    on_one = work(tmp_path, "b", 1, str(tmp_path / "two.dcp"))  # written by two, read by one
    on_two = work(tmp_path, "c", 2, str(tmp_path / "one.dcp"))
    assert all((on_one[name] - on_two[name]).abs().max() < 2e-5 for name in on_one)
    assert (on_one["head.head.weight"] - one["head.head.weight"]).abs().max() > 1e-3


def test_alone_nothing_is_sharded_and_a_mean_is_itself():
    net = tiny_dit()
    assert distributed.shard(net, net.blocks) is net and distributed.world_size() == 1 and distributed.rank() == 0
    assert distributed.share(4) == slice(0, 4)
    assert torch.equal(distributed.mean(torch.ones(2)), torch.ones(2))


def test_a_lora_starts_as_nothing_trains_and_merges_into_plain_weights():
    pytest.importorskip("peft")
    student = tiny_student()
    names = student.net.state_dict().keys()
    x, cond, sigma = clip(), condition(), chunk_levels(student, 9)
    with torch.no_grad():
        before = student.net(x, sigma, cond)
    net = add_lora(student.net, LoraConfig(rank=2))
    assert torch.equal(net(x, sigma, cond), before)
    trained = [p for p in net.parameters() if p.requires_grad]
    optim = torch.optim.SGD(trained, lr=0.1)
    net(x, sigma, cond).square().mean().backward()
    optim.step()
    net.zero_grad()
    net(x, sigma, cond).square().mean().backward()  # B is no longer zero: A trains too
    optim.step()
    assert len(trained) == 2 * 2 * (8 + 2)
    memory = student.new_memory(1)
    with torch.no_grad():
        after, streamed = net(x, sigma, cond), student.velocity(x[:, :3], sigma[:, :3], cond, memory=memory)
        merge_lora(net)
        assert not torch.allclose(after, before) and torch.allclose(net(x, sigma, cond), after, atol=1e-5)
        again = student.velocity(x[:, :3], sigma[:, :3], cond, memory=student.new_memory(1))
    assert torch.allclose(again, streamed, atol=1e-5) and student.net.state_dict().keys() == names
    fresh = tiny_dit(replace(DIT))
    fresh.load_state_dict(student.net.state_dict())


def test_no_rank_is_no_lora():
    net = tiny_dit()
    assert add_lora(net, LoraConfig()) is net and all(p.requires_grad for p in net.parameters())
    with pytest.raises(ValueError, match=r"lora.rank"):
        LoraConfig(rank=-1)
