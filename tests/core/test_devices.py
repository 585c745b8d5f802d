"""Every tensor lies where the network does. torch's meta device stands for a GPU: it computes nothing, and refuses a
tensor of the CPU beside its own."""

import contextlib
import itertools
from dataclasses import asdict, replace

import pytest
import torch
from tiny_relic import CAMERA, POSED, REMEMBERING, posed_data, posed_teacher
from tiny_talker import talker_stage, write_talker
from tiny_training import DIT, codec_stage, dmd_stage, flow_stage

from vidistill.checkpoint import load_codec, load_student
from vidistill.memory.policies import MemoryConfig
from vidistill.ops.device import named_device
from vidistill.streaming.runtime import SpeedConfig, fast_decoder, for_inference
from vidistill.streaming.session import StreamConfig, StreamSession
from vidistill.training import trainer
from vidistill.training.losses import LossConfig
from vidistill.training.trainer import Trainer

META = torch.device("meta")
TERMS = LossConfig(guidance=2.0, motion=1.0, motion_head=1.0, regression=0.5, target_steps=2)
STAGES = {
    "flow": flow_stage,
    "codec": codec_stage,
    "teacher forcing": lambda root: dmd_stage(root, objective="teacher_forcing", teacher=None, dit=DIT),
    "diffusion forcing": lambda root: dmd_stage(root, objective="diffusion_forcing", teacher=None),
    "all terms": lambda root: dmd_stage(root, loss=TERMS),
    "replayed long streams": lambda root: dmd_stage(root, replay=True, long_frames=16, save_every=3, loss=TERMS),
    "rollouts reused": lambda root: dmd_stage(root, critic_steps=4, critic_reuse=4),
    "recorded clips": lambda root: dmd_stage(root, loss=LossConfig(forcing=1.0, invalid_weight=0.2)),
    "without rollouts": lambda root: dmd_stage(root, on_policy=False),
    "sid": lambda root: dmd_stage(root, objective="sid"),
    "avatar": lambda root: talker_stage(root, loss=LossConfig(guidance=2.0, audio_guidance=3.0)),
    "camera": lambda root: posed_stage(root, teacher=str(root / "teacher")),
    "compressed memory": lambda root: posed_stage(root, objective="diffusion_forcing", teacher=None),
}


def posed_stage(root, **settings):
    posed_data(root)
    posed_teacher(root)
    loss = LossConfig(noisy_chunks=1)
    return dmd_stage(root, dit=POSED, camera=CAMERA, student=REMEMBERING, loss=loss, **settings)


@pytest.fixture
def elsewhere(monkeypatch):
    """A number of the meta device is 1, nothing is true there."""
    for name, value in (("__bool__", False), ("__float__", 1.0), ("item", 1.0)):
        real = getattr(torch.Tensor, name)
        there = lambda x, real=real, value=value: value if x.device == META else real(x)  # noqa: E731
        monkeypatch.setattr(torch.Tensor, name, there)
    monkeypatch.setattr(trainer, "autocast", lambda *_: contextlib.nullcontext())  # unknown there
    monkeypatch.setattr(trainer, "accelerator", lambda: META)


def test_tensors_of_two_devices_do_not_mix():
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(2, device=META) + torch.ones(2)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_where_its_networks_are(tmp_path, elsewhere, stage):
    run = Trainer(STAGES[stage](tmp_path))
    for _ in range(3 if run.cfg.replay else 2):  # both networks' turns; of a stream, a part that goes on
        assert run.step()
    for student_state in run.train_states.values():
        assert {p.device for p in student_state.params} == {META}
        assert any(p.grad is not None and p.grad.device == META for p in student_state.params)


@pytest.mark.parametrize("memory", ["window", "endless"])
@pytest.mark.parametrize("name", ["student", "avatar"])
def test_a_student_streams_where_it_is_asked_to(tmp_path, tiny_student_path, tiny_image, elsewhere, name, memory):
    bundle = load_student(tiny_student_path if name == "student" else write_talker(tmp_path) / "student")
    kept = {"window": MemoryConfig("window", frames=7, sinks=1), "endless": MemoryConfig("endless", 6, history=6)}[
        memory
    ]
    speed = SpeedConfig(device="meta", precision="bf16")
    fast, codec = for_inference(bundle, speed), fast_decoder(load_codec(bundle), speed)
    with StreamSession(fast, codec, StreamConfig(pipelined=False, memory=kept), image=tiny_image) as session:
        latents, made = session.latents(), []
        for prompt in ("a smile", "a frown"):
            if "prompt" in session.takes:
                session.set(prompt=prompt, switch="recache")
            made += itertools.islice(latents, 4)
        assert {x.device for x in made} == {META}
        assert codec.decode_stream(made[-1])[0].device == META
    assert bundle.net.net.device == torch.device("cpu"), "the student itself stays where it is"


@pytest.mark.parametrize("name", ["mps", "hpu", "vulkan", "privateuseone", "tpu", "cuda:99", "cuda:-1", ""])
def test_a_device_that_is_not_here_is_refused_in_a_line(name):
    with pytest.raises(ValueError, match=f"device '{name}'.*auto, cpu") as error:
        SpeedConfig(device=name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 150


def test_a_device_is_named_or_found():
    assert named_device("cpu") == torch.device("cpu")
    assert named_device("auto") == (torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    assert asdict(SpeedConfig()) == {"linears": "plain", "compile": False, "device": "auto", "precision": "fp32"}
    assert replace(SpeedConfig(), device="cpu").where == torch.device("cpu")
