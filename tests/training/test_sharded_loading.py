"""Networks that are split among processes are never whole in one: memory is counted while they are made and loaded."""

import ctypes
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ACTIONS, DIT, random_dit
from tiny_ranks import together
from tiny_training import FRAMES, OPTIM, SHAPE, dmd_stage, write_teacher
from torch.profiler import ProfilerActivity, profile

from vidistill import checkpoint, distributed
from vidistill.checkpoint import read_tensors, save_tensors
from vidistill.data.prompts import open_data
from vidistill.data.shards import write_shards
from vidistill.models.layers import DiTConfig, SiteConfig
from vidistill.models.lora import LoraConfig
from vidistill.training import networks

ADAMW = replace(OPTIM, muon="")
ROLES = ("student", "teacher", "critic")
SLACK = 2**20  # bytes of what is no weight
RESIDENT = 2**27  # the same for the operating system, which also holds what the profiler notes


def wide(**settings):
    """The tiny network with blocks so wide that weights outweigh everything else."""
    sites = {"modulation": SiteConfig(dim=4 * len(ACTIONS) + 1)}
    return replace(DIT, **{"width": 512, "layers": 4, "heads": 8, "ffn": 2048, "sites": sites, **settings})


def write_wide(path, dit: DiTConfig, dtype):
    shape = {"frames": FRAMES, "channels": SHAPE.channels, "height": SHAPE.height, "width": SHAPE.width}
    record = {"noise": {"shift": 2.0}, "shape": shape, "codec": None, "card": {}}
    checkpoint.export(path, random_dit(dit), record, dtype)
    return str(path)


def stage(root, teacher, **settings):
    return dmd_stage(root, teacher=teacher, batch=4, optim=ADAMW, critic_optim=ADAMW, **settings)


def made(cfg):
    """The networks of a stage as training makes them."""
    torch.manual_seed(cfg.seed)
    roles, _, _ = networks.make_roles(cfg, open_data(cfg.data))
    networks.prepare(cfg, roles, torch.device("cpu"))
    return {name: getattr(roles, name) for name in ROLES}


def local(x):
    return x.to_local() if distributed.is_sharded(x) else x


class Anonymous(threading.Thread):
    """The memory of this process that is no file's, at most, while inside; looked at every millisecond."""

    def __enter__(self):
        ctypes.CDLL(None).malloc_trim(0)  # what other tests have freed would be taken again, and not be counted
        self.before, self.peak, self.over = self.now(), 0, threading.Event()
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join()

    def now(self):
        (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon")]
        return 1024 * int(line.split()[1])

    def run(self):
        while not self.over.wait(0.001):
            self.peak = max(self.peak, self.now() - self.before)


def allocated(watched, mapped):
    """Bytes that were allocated at once, at most; files of the sizes in `mapped` are mapped, which is counted too."""
    held = peak = 0
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]" and abs(event.nbytes()) not in mapped:
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def load_here(cfg, out, slack):
    """Make the networks, with shards, a tensor and SLACK bytes at most; rank 0 writes what they are, whole.

    `slack` 0: memory is not looked at; RESIDENT: also as the operating system sees it.
    """
    if slack == RESIDENT:  # what is imported when networks are first made is no weight
        made(replace(cfg, teacher=str(write_teacher(out.with_name(f"first-{distributed.rank()}")))))
    with Anonymous() as memory, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        nets = made(cfg)
    params = [p for net in nets.values() for p in net.parameters()]
    whole = sum(p.numel() * p.element_size() for p in params)
    own = sum(local(p).numel() * p.element_size() for p in params)
    assert own < whole / distributed.world_size() + SLACK
    room = own + max(p.numel() * p.element_size() for p in params)
    if slack:
        files = {p.stat().st_size for p in Path(cfg.teacher).parent.glob("*.safetensors")}
        assert own < allocated(watched, files) < room + SLACK
    if slack == RESIDENT:
        assert own / 2 < memory.peak < room + RESIDENT < whole / 2
    state = {f"{name}.{n}": x for name, net in nets.items() for n, x in distributed.whole_state(net).items()}
    if distributed.rank() == 0:
        save_tensors(out, state, {})


def assert_whole(cfg, out, count, slack=SLACK):
    """`count` processes hold, together, bit for bit what one process loads."""
    together(count, load_here, replace(cfg, parallel="shard"), out, slack)
    found, _ = read_tensors(out)
    wanted = {f"{name}.{n}": x for name, net in made(cfg).items() for n, x in net.state_dict().items()}
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert x.dtype == found[name].dtype and torch.equal(x, found[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_process_holds_its_shards_and_one_tensor_at_most(tmp_path, dtype):
    teacher = write_wide(tmp_path / "wide", wide(), dtype)
    assert_whole(stage(tmp_path, teacher, name="split"), tmp_path / "out", 4)


def test_adapters_begin_as_they_do_in_one_process(tmp_path):
    pytest.importorskip("peft")
    teacher = write_wide(tmp_path / "wide", wide(width=64, ffn=128), torch.bfloat16)
    cfg = stage(tmp_path, teacher, lora=LoraConfig(rank=2), critic_lora=LoraConfig(rank=2))
    cfg = replace(cfg, precision="bf16", teacher_precision="bf16")
    assert_whole(cfg, tmp_path / "out", 2)


def test_a_network_that_grows_is_not_made_a_second_time(tmp_path):
    teacher = write_wide(tmp_path / "small", wide(sites={}), torch.float16)
    new = {"modulation": SiteConfig(dim=4 * len(ACTIONS) + 1, zero_init=True)}
    assert_whole(stage(tmp_path, teacher, dit=wide(sites=new)), tmp_path / "out", 4)  # shards of all: 0.75 of one


def test_a_published_folder_is_read_in_slices(tmp_path):
    pytest.importorskip("diffusers")
    from tiny_wan import LENGTH, TEXT, transformer

    folder = tmp_path / "wan"
    net = transformer(num_layers=3).to(torch.bfloat16)
    net.save_pretrained(folder / "transformer", max_shard_size="20KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    tokens = {"tokens": torch.randn(4, LENGTH, TEXT), "latents": torch.randn(4, FRAMES, 16, 4, 4)}
    write_shards(tmp_path / "told", [(tokens, [{}] * 4)], {"given": 0, "fps": 16.0})
    cfg = stage(tmp_path, str(folder), data=str(tmp_path / "told"), dit=replace(DIT, channels=16, sites={}))
    cfg = replace(cfg, schedule=replace(cfg.schedule, given_chunks=0))
    assert_whole(cfg, tmp_path / "out", 2, slack=0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_gigabyte_of_networks_is_loaded_in_shards(tmp_path):
    teacher = write_wide(tmp_path / "large", wide(width=1024, layers=7, ffn=4096), torch.float16)
    assert_whole(stage(tmp_path, teacher), tmp_path / "out", 4, slack=RESIDENT)
