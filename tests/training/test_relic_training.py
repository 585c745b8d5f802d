"""Training a student that remembers: poses from data, sites that start without effect, curricula, hybrid forcing."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import ACTIONS, DIT, random_dit
from saved_bytes import SavedBytes
from tiny_relic import CAMERA, MEMORY, POSED, REMEMBERING, SITES, posed_data, posed_teacher
from tiny_training import FRAMES, backward, codec_stage, dmd_stage, flow_stage

from vidistill import checkpoint
from vidistill.checkpoint import load
from vidistill.conditioning.camera import CameraConfig
from vidistill.conditioning.condition import Condition, walked
from vidistill.conditioning.controls import LiveConditions, WorldConfig
from vidistill.config import build
from vidistill.data import ode_pairs
from vidistill.data.clips import Clips
from vidistill.data.shards import DataError
from vidistill.data.types import Episode
from vidistill.diffusion import LatentShape
from vidistill.memory.policies import MemoryConfig
from vidistill.models.dit import extend
from vidistill.models.layers import Block, SelfAttention, SiteConfig
from vidistill.models.student import CausalStudent
from vidistill.ops.attention import use_backend
from vidistill.ops.rope import Yarn, rope_table, rotate
from vidistill.record import Record
from vidistill.sampling import sample
from vidistill.schedules import ScheduleConfig
from vidistill.training.losses import LossConfig
from vidistill.training.on_policy import LongRollout, replayed_backward
from vidistill.training.trainer import Trainer, train
from vidistill.training.validation import ValidationConfig
from vidistill.worlds.doom.recorder import DoomConfig, palindrome, with_palindromes


@pytest.fixture
def root(tmp_path):
    posed_data(tmp_path)
    return tmp_path


def test_trajectories_are_told_what_the_camera_did_and_a_regression_on_them_too(root):
    posed_teacher(root, asdict(CAMERA))
    out = root / "paths"
    ode_pairs.trajectories(out, str(root / "teacher"), root / "latents", clips=2, frames=FRAMES, steps=4, at_once=2)
    made, source = (Clips(folder, camera=CAMERA) for folder in (out, root / "latents"))
    recorded, teacher = source.latents(2, FRAMES, 0, 0), load(root / "teacher")
    noise = torch.randn(recorded.x.shape, generator=torch.Generator().manual_seed(0))
    wanted = sample(teacher.net, noise, teacher.noise.steps(4), recorded.cond, given=recorded.x[:, :1])
    torch.testing.assert_close(made.tensors["states"][:, -1].float(), wanted, atol=2e-3, rtol=2e-3)
    told = made.condition([(0, 0), (1, 0)], FRAMES).per_frame
    assert told.keys() == recorded.cond.per_frame.keys() == {"modulation", "hidden", "qk"}
    assert all(torch.equal(told[site], x) for site, x in recorded.cond.per_frame.items())
    loss = LossConfig(levels=tuple(made.meta["levels"]))
    cfg = dmd_stage(root, objective="regression", teacher=None, init=str(root / "teacher"), data=str(out), loss=loss)
    assert Trainer(replace(cfg, dit=POSED, camera=CAMERA)).step()["student/loss"] > 0


def test_a_camera_needs_recorded_poses(root):
    with pytest.raises(DataError, match="no poses"):
        Clips(root / "plain", camera=CAMERA).latents(1, FRAMES, 0, 0)


@pytest.mark.parametrize("settings", [{}, {"camera": CAMERA, "dit": POSED}], ids=["plain", "camera"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_training_is_watched_with_its_camera_and_with_or_without_an_average(root, settings, ema):
    if settings:
        posed_teacher(root)
    look = ValidationConfig(str(root / "latents"), clips=2, every=2, score="error")
    cfg = dmd_stage(root, **settings)
    path = train(replace(cfg, validation=look, ema=ema, steps=4, save_every=2))
    assert load(path).record["card"]["steps"] in (2, 4)


def test_what_a_training_is_watched_on_lies_where_it_trains(root, monkeypatch):
    monkeypatch.setattr("vidistill.training.trainer.accelerator", lambda: torch.device("meta"))
    look = ValidationConfig(str(root / "latents"), clips=2, every=2, score="error")
    trainer = Trainer(dmd_stage(root, validation=look))
    held = trainer.held.batch
    assert held.x.device.type == "meta" and all(x.device.type == "meta" for x in held.cond.per_frame.values())
    codec = Trainer(codec_stage(root))
    seen = []
    monkeypatch.setattr(codec.roles.student, "forward", lambda px: seen.append(px.device.type) or (px, px))
    monkeypatch.setattr(codec.roles.student, "set_normalisation", lambda mean, std: None)
    codec.roles.student.normalise_on(codec.normalisation_clips())
    assert set(seen) == {"meta"}


def test_poses_turn_queries_and_keys_and_moves_are_added_after_self_attention():
    """Values know nothing of poses; cross-attention and feed-forward see the moves, self-attention does not."""
    layer, x = SelfAttention(DIT), torch.randn(1, 2, 4, DIT.width)
    table = rope_table(torch.cartesian_prod(*map(torch.arange, (2, 2, 2))), DIT.width // DIT.heads)
    told = [layer.project(x, table, key, True, None) for key in (None, torch.randn(1, 2, 1, DIT.width))]
    same = [torch.allclose(a, b) for a, b in zip(*told, strict=True)]
    assert same == [False, False, False, True]

    block, e = Block(replace(DIT, text_dim=8)), torch.randn(1, 2, 6, DIT.width)
    inside, out = torch.randn(1, 2, 1, DIT.width), torch.randn(1, 8, DIT.heads, DIT.width // DIT.heads)
    seen = []
    block.norm3.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    prompt = block.cross_attn.read(torch.randn(1, 3, DIT.width))
    for moves in (None, inside):
        block.after(x, out, e, prompt, moves)
    torch.testing.assert_close(seen[1] - seen[0], inside.expand_as(x))


def test_a_stream_of_other_clips_actions_tells_no_poses(root):
    camera = replace(CAMERA, sites=("view",))
    with pytest.raises(ValueError, match=r"long_frames.*poses"):
        dmd_stage(root, long_frames=13, camera=CAMERA)
    assert dmd_stage(root, long_frames=13, camera=camera).long_frames == 13


def test_a_batch_tells_where_the_camera_was(root):
    clips = Clips(root / "latents", camera=CAMERA)
    batch = clips.latents(3, 5, 0, 0)
    windows = clips.windows(3, 5, 0, 0, "latents")
    poses = torch.stack([clips.tensors["poses"][e, s : s + 5] for e, s in windows])
    want = walked(poses, CAMERA, 4)
    for site in ("hidden", "qk"):
        assert torch.equal(batch.cond.per_frame[site], want[site])
    assert batch.cond.per_frame["qk"].shape == (3, 5, CAMERA.pose_dim)
    assert (batch.cond.per_frame["hidden"][:, 0, -1] == 1).all()  # the first picture: nothing moved yet
    assert "qk" not in Clips(root / "latents").latents(1, 5, 0, 0).cond.per_frame


def test_a_network_gains_sites_without_a_change_and_says_what_must_be_zero():
    net, x = random_dit(DIT), torch.randn(1, 7, 4, 4, 4)
    bigger = extend(net, POSED)
    cond = walked(torch.rand(1, 7, 3), CAMERA, 4) | {"modulation": torch.rand(1, 7, 17)}
    sigma = torch.full((1, 7), 0.5)
    with torch.no_grad():
        want = net(x, sigma, Condition(per_frame={"modulation": cond["modulation"]}))
        assert torch.equal(bigger(x, sigma, Condition(per_frame=cond)), want)
        for p in bigger.sites["qk"].parameters():
            p.add_(0.3)
        assert not torch.allclose(bigger(x, sigma, Condition(per_frame=cond)), want)
    assert extend(net, DIT) is net
    with pytest.raises(ValueError, match=r"dit.sites.hidden.*zero_init"):
        extend(net, replace(POSED, sites={**SITES, "hidden": replace(SITES["hidden"], zero_init=False)}))


def test_a_teacher_is_trained_on_poses_through_a_curriculum_and_streams_need_no_config(root):
    start = root / "start"
    checkpoint.export(
        start, random_dit(DIT), {"shape": {"frames": 7, "channels": 4, "height": 4, "width": 4}, "card": {}}
    )
    stage = flow_stage(
        root,
        init=str(start),
        dit=replace(POSED, yarn=Yarn(2.0, 4)),
        camera=CAMERA,
        frames=7,
        curriculum=((0, 4), (3, 7)),
    )
    trainer = Trainer(stage)
    assert [trainer.batch(s).x.shape[1] for s in (0, 2, 3, 5)] == [4, 4, 7, 7]
    before = {n: p.clone() for n, p in trainer.roles.student.named_parameters() if "sites.qk" in n}
    bundle = load(trainer.run().with_suffix(""))
    after = dict(trainer.roles.student.named_parameters())
    assert any(not torch.equal(p, after[n]) for n, p in before.items())
    assert build(CameraConfig, bundle.record["world"]["camera"]) == CAMERA and bundle.net.cfg.yarn.ratio == 2.0


def test_a_stage_that_starts_from_a_student_gains_its_sites_and_recomputes_its_blocks(root):
    student = CausalStudent(random_dit(DIT), REMEMBERING, LatentShape(7, 4, 4, 4, DIT.patch))
    shape = {"frames": 7, "channels": 4, "height": 4, "width": 4}
    record = {"schedule": {"levels": [1.0]}, "noise": {"shift": 1.0}, "shape": shape, "card": {}}
    checkpoint.export(root / "student", student, record)
    dit = replace(POSED, checkpoint=True)
    stage = flow_stage(
        root,
        objective="teacher_forcing",
        init=str(root / "student"),
        dit=dit,
        camera=CAMERA,
        student=REMEMBERING,
        frames=7,
    )
    trainer = Trainer(stage)
    assert trainer.roles.student.net.cfg == replace(DIT.extend(dit), checkpoint=True)
    assert load(trainer.run().with_suffix("")).net.net.cfg.sites.keys() == POSED.sites.keys()


@pytest.mark.parametrize("objective", ["teacher_forcing", "diffusion_forcing"])
def test_hybrid_forcing_scores_only_the_noisy_end(root, objective):
    stage = flow_stage(
        root,
        objective=objective,
        dit=replace(POSED, pool_factors=(2,)),
        camera=CAMERA,
        student=replace(REMEMBERING, memory=replace(MEMORY, pool="learned")),
        loss=LossConfig(noisy_chunks=1),
        frames=10,
    )
    trainer = Trainer(stage)
    torch.nn.init.normal_(trainer.roles.student.net.head.head.weight, std=0.3)
    batch = trainer.batch(0)
    batch.x.requires_grad_()
    loss = backward(trainer, batch=batch)
    assert batch.x.grad[:, :7].abs().max() > 0 and torch.isfinite(loss.value)
    assert trainer.roles.student.net.pool_weights["2"].grad.abs().max() > 0
    trainer.step()


def test_self_forcing_remembers_is_replayed_and_moves_the_pose_sites(root):
    posed_teacher(root)
    stage = dmd_stage(root, student=REMEMBERING, camera=CAMERA, dit=POSED, replay=True, frames=10, steps=2)
    trainer = Trainer(stage)
    before = trainer.roles.student.net.sites["qk"].embed[0].weight.clone()
    trainer.step(), trainer.step()
    assert not torch.equal(before, trainer.roles.student.net.sites["qk"].embed[0].weight)


@pytest.mark.parametrize("replay", [False, True])
def test_recorded_clips_teach_beside_the_rollout_what_it_never_asks_for(root, replay):
    posed_teacher(root)

    def gradients(**weights):
        loss = LossConfig(guidance=2.0, noisy_chunks=1, **weights)
        memory = {"student": REMEMBERING, "camera": CAMERA, "dit": POSED, "frames": 10}
        trainer = Trainer(dmd_stage(root, loss=loss, replay=replay, **memory))
        logs = backward(trainer).numbers()
        return torch.cat([p.grad.flatten() for p in trainer.roles.student.parameters()]), logs

    (alone, _), (both, logs), (data, _) = (gradients(**w) for w in ({}, {"forcing": 2.0}, {"dmd": 0.0, "forcing": 1.0}))
    assert logs["forcing"] > 0 and data.norm() > 0
    assert torch.allclose(both - alone, 2 * data, atol=1e-4 * float(both.abs().max()))


def test_a_replayed_step_keeps_what_one_chunk_needs_however_long_the_clip(root):
    """Bytes autograd keeps for the student's backward pass: 80 latents against 20, through the compressed memory."""
    posed_data(root, episodes=1, length=79)
    clips = Clips(root / "latents", camera=CAMERA)
    peaks = {}
    for frames in (19, 79):
        memory = MemoryConfig("compressed", frames=6, history=73, pattern=(4,))
        shape = LatentShape(frames, 4, 4, 4)
        student = CausalStudent(random_dit(POSED), replace(REMEMBERING, memory=memory), shape)
        roll = LongRollout(student, ScheduleConfig(levels=(1.0, 0.5), given_chunks=1))
        batch, rng = clips.latents(1, frames, 0, 0), torch.Generator().manual_seed(0)
        sample = roll(batch, rng, grad=False, record=True)
        with use_backend("sdpa"), SavedBytes() as kept:  # products in the open keep their scores too
            replayed_backward(student, sample, torch.ones_like(sample.x0))
        peaks[frames] = kept.peak
    assert peaks[79] < 1.3 * peaks[19]  # the rest is the history itself, which the backward pass reads


@pytest.mark.parametrize(("curriculum", "message"), [(((1, 7),), "from step 0"), (((0, 7), (2, 4)), "longest")])
def test_impossible_curricula_say_what_is_wrong(root, curriculum, message):
    with pytest.raises(ValueError, match=message):
        flow_stage(root, curriculum=curriculum)


def test_a_camera_needs_sites_of_its_size(root):
    with pytest.raises(ValueError, match=r"dit.sites.hidden with dim 7"):
        Trainer(flow_stage(root, camera=CAMERA))


# --- palindromes ----------------------------------------------------------------------------------------------------


def fake_walk(total=21, speed=9.375):
    actions = np.zeros((total, 4), np.float32)
    actions[1:8, 2], actions[8:12, 0], actions[12:, 2] = 1, 1, 1
    poses, blocked = np.zeros((total, 3), np.float32), range(15, 18)
    for t in range(1, total):
        poses[t] = poses[t - 1]
        poses[t, 2] += 0.1 * actions[t, 0]
        if actions[t, 2] and t not in blocked:
            poses[t, :2] += speed / 64 * np.array([np.cos(poses[t, 2]), np.sin(poses[t, 2])])
    frames = np.arange(total, dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(3, -1)
    return Episode(frames, actions, poses, 7, {})


@pytest.mark.parametrize("pivot", [10, 16, 20])
def test_a_palindrome_goes_there_and_back(pivot):
    e = palindrome(DoomConfig(), fake_walk(), pivot)
    shown = e.frames[:, 0, 0, 0].tolist()
    assert len(e.frames) == len(e.actions) == len(e.poses) == 21
    assert shown == [*range(pivot + 1), *range(pivot - 1, 2 * pivot - 21, -1)]
    for k in range(1, 21 - pivot):
        assert np.array_equal(e.poses[pivot + k], e.poses[pivot - k])
        undone = e.actions[pivot - k + 1]
        blocked = pivot - k + 1 in range(15, 18)
        want = undone[[1, 0, 3, 2]] * (0 if blocked else 1)
        assert np.array_equal(e.actions[pivot + k], want)


def test_about_the_share_asked_for_become_palindromes():
    walks = [replace(fake_walk(), seed=k) for k in range(60)]
    got = list(with_palindromes(DoomConfig(), walks, 0.5))
    turned = sum(not np.array_equal(a.frames, b.frames) for a, b in zip(walks, got, strict=True))
    assert 15 < turned < 45
    assert all(a is b for a, b in zip(walks, with_palindromes(DoomConfig(), walks, 0.0), strict=True))
    with pytest.raises(ValueError, match="pivot"):
        palindrome(DoomConfig(), fake_walk(), 5)


# --- streams --------------------------------------------------------------------------------------------------------


def inputs():
    dims = {"modulation": 17, "hidden": 7, "qk": CAMERA.pose_dim}
    dit = replace(POSED, sites={name: SiteConfig(dim) for name, dim in dims.items()})
    return LiveConditions.of(Record("student", dit=dit, world=WorldConfig(actions=ACTIONS, camera=CAMERA)), 4, "cpu")


def test_a_stream_integrates_the_keys_it_is_given_chunk_by_chunk():
    a, b = inputs(), inputs()
    for one in (a, b):
        one.set({"action": {"forward": 1.0, "turn_left": 0.5}})
    whole = a.condition(a.control, 0, 7)
    parts = [b.condition(b.control, lo, hi) for lo, hi in ((0, 1), (1, 4), (4, 7))]
    for site in ("hidden", "qk"):
        joined = torch.cat([p.per_frame[site] for p in parts], 1)
        assert torch.allclose(joined, whole.per_frame[site], atol=1e-6)
    again = b.condition(b.control, 4, 7)
    assert torch.equal(again.per_frame["qk"], parts[2].per_frame["qk"])  # every pass of a chunk hears the same
    assert whole.per_frame["hidden"][0, 0, -1] == 1 and whole.per_frame["hidden"][0, 1:, 0].min() > 0.9


def test_a_speed_gain_takes_a_stream_twice_as_far():
    a, b = inputs(), inputs()
    b.speed_up(2.0)
    for one in (a, b):
        one.set({"action": {"forward": 1.0}})
    near, far = (one.condition(one.control, 0, 4).per_frame["qk"][0, :, 0] for one in (a, b))
    assert torch.allclose(far, 2 * near) and near[-1] > 0


def test_rotary_extension_of_ratio_one_changes_nothing_and_keeps_the_spread_of_attention():
    positions = torch.cat([torch.arange(88.0)[:, None], torch.zeros(88, 2)], 1)
    assert torch.equal(rope_table(positions, 56, yarn=Yarn(1.0)), rope_table(positions, 56))

    def entropy(length, yarn):
        rng = torch.Generator().manual_seed(0)
        q, k = (torch.randn(1, length, 1, 56, generator=rng) for _ in range(2))
        q = k = (q[:, :1] + 0.3 * k).expand(-1, -1, -1, -1)
        table = rope_table(positions[:length], 56, yarn=yarn)
        scores = rotate(q, table)[0, :, 0] @ rotate(k, table)[0, :, 0].T / 56**0.5 * yarn.sharpness
        p = scores.softmax(-1)
        return float(-(p * p.log()).sum(-1).mean() / np.log(length))  # share of the largest possible

    base, longer = entropy(22, Yarn()), entropy(88, Yarn(4.0, 22))
    assert abs(longer / base - 1) < 0.1
