"""Students that hear: what they are told, what future sound cannot change, and what training does with it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SHAPE, random_dit
from tiny_talker import AUDIO, TALKER, talker_stage, write_talker, write_talks
from tiny_training import rolled

from vidistill.checkpoint import load, load_codec, load_student
from vidistill.conditioning.condition import AUDIO_SITE, Condition, branches, reference_channels
from vidistill.data.clips import Clips
from vidistill.data.types import Batch
from vidistill.sampling import guided
from vidistill.streaming.session import StreamConfig, StreamSession
from vidistill.training import validation
from vidistill.training.losses import LossConfig, valid_rollouts
from vidistill.training.trainer import Trainer, train
from vidistill.training.validation import EarlyStopping, ValidationConfig, plateau
from vidistill.worlds.talker import scores

INLINE = StreamConfig(pipelined=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_talker(tmp_path_factory.mktemp("talker"))


@pytest.fixture
def session(folder, tiny_image):
    bundle = load_student(folder / "student")
    with StreamSession(bundle, load_codec(bundle), INLINE, image=tiny_image) as opened:
        yield opened


def speech(frames, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, frames * 1000).astype(np.float32)


def take(session, count):
    frames = session.frames()
    return [next(frames) for _ in range(count)]


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_shows_what_it_hears_and_carries_its_sound(session):
    pcm = speech(60)
    session.set(audio=pcm)
    heard = take(session, 37)
    session.reset()
    silent = take(session, 37)  # the queue holds what was left, later than before
    assert not np.array_equal(heard[20].px, silent[20].px)
    sound = np.concatenate([frame.sound for frame in heard])
    assert np.array_equal(sound, pcm[: len(sound)]) and heard[3].stats["audio_to_lip_ms"] > 0


def test_sound_of_the_future_cannot_change_frames_that_were_shown(folder, tiny_image):
    bundle, shown = load_student(folder / "student"), []
    known = (25 + AUDIO.wait) * AUDIO.samples  # frames 0 to 24: latents 0 to 6, two chunks and the picture
    for seed in (1, 2):
        pcm = speech(60)
        pcm[known:] = speech(60, seed)[known:]
        with StreamSession(bundle, load_codec(bundle), INLINE, image=tiny_image) as session:
            session.set(audio=pcm)
            shown.append(np.stack([frame.px for frame in take(session, 37)]))
    assert np.array_equal(shown[0][:25], shown[1][:25]) and not np.array_equal(shown[0], shown[1])


def test_a_stream_that_hears_equals_a_rollout_told_the_whole_clips_features(folder, session):
    from vidistill.conditioning.audio import clip_features
    from vidistill.conditioning.condition import pack_audio
    from vidistill.rollout import chunk_noise, rollout
    from vidistill.schedules import endless, finite

    pcm, student = speech(60), load_student(folder / "student")
    session.set(audio=pcm)
    given = session._engine.run.given
    streamed = torch.cat([x for _, x in zip(range(3), session.latents(), strict=False)], dim=1)
    audio = pack_audio(torch.from_numpy(clip_features(pcm, 25, AUDIO))[None], 4)
    cond = Condition(torch.zeros(1, 1, 24), {AUDIO_SITE: audio}, reference_channels(given, 0, 7))
    whole = rollout(
        student.net,
        finite(endless(student.schedule), 3),
        noise=chunk_noise(student.net, 1, 0, given),
        cond=cond.frames,
        memory=student.net.new_memory(1, cfg=session.memory_config),
        rng=torch.Generator().manual_seed(0),
        clamped=given,
    )
    with torch.no_grad():
        assert torch.equal(streamed, torch.cat(list(whole), dim=1))


def test_hushing_drops_what_waits_and_keeps_the_memory(session):
    session.set(audio=speech(100))
    take(session, 13)
    before = session._engine.memory.frames
    assert session.queued_audio_s > 4
    session.clear_audio()
    rest = take(session, 24)
    assert session.queued_audio_s == 0 and not rest[-1].sound.any() and rest[-1].run == 0
    assert session._engine.memory.frames[0] == before[0] == 0


def test_a_stream_tells_the_network_the_picture_it_began_with(folder, tiny_image):
    bundle = load_student(folder / "student")
    inputs = []
    for image in (tiny_image, 255 - tiny_image):
        with StreamSession(bundle, load_codec(bundle), INLINE, image=image) as session:
            take(session, 1)
            inputs.append(session.inputs.condition(session.inputs.control, 1, 4).channels)
    assert inputs[0].shape == (1, 3, SHAPE.channels + 1, SHAPE.height, SHAPE.width)
    assert (inputs[0][:, :, -1] == 1).all() and not torch.equal(inputs[0], inputs[1])


def test_sound_of_the_wrong_kind_is_refused(session, tiny_student_path, tiny_image):
    assert session.takes["audio"] == {"kind": "sound", "rate": 16_000, "lookahead_ms": 62.5}
    with pytest.raises(ValueError, match="finite floats"):
        session.set(audio=np.zeros(100, np.int16))
    deaf = load_student(tiny_student_path)
    with (
        StreamSession(deaf, load_codec(deaf), INLINE, image=tiny_image) as other,
        pytest.raises(ValueError, match="no audio"),
    ):
        other.set(audio=speech(1))


# --- guidance ---------------------------------------------------------------------------------------------------------


def condition():
    rng = torch.Generator().manual_seed(1)
    image = torch.randn(2, 1, SHAPE.channels, SHAPE.height, SHAPE.width, generator=rng)
    audio = torch.randn(2, 4, 64, generator=rng)
    tokens = torch.randn(2, 3, 24, generator=rng)
    return Condition(tokens, {AUDIO_SITE: audio}, reference_channels(image, 0, 4))


def test_text_and_audio_are_guided_by_scales_of_their_own():
    net, cond = random_dit(TALKER), condition()
    x, sigma = torch.randn(2, 4, SHAPE.channels, SHAPE.height, SHAPE.width), torch.full((2, 4), 0.5)
    with torch.no_grad():
        c, t, u = (net.velocity(x, sigma, k) for k in (cond, cond.mute(), cond.null()))
        out = guided(net, x, sigma, cond, *branches(cond, 2.0, 5.0))
        assert torch.allclose(out, u + 2 * (t - u) + 5 * (c - t), atol=1e-5) and not torch.allclose(c, t)
        one = guided(net, x, sigma, cond, *branches(cond, 2.0))
        assert torch.allclose(one, u + 2 * (c - u), atol=1e-5)
    assert len(branches(cond, 3.0, 3.0)[0]) == 1 and branches(cond, 1.0) == ([], [])


def test_audio_alone_can_be_dropped_and_the_reference_stays():
    cond = condition()
    muted = cond.mute(torch.tensor([True, False]))
    assert torch.equal(muted.per_frame[AUDIO_SITE][0], cond.per_frame[AUDIO_SITE][0])
    assert not muted.per_frame[AUDIO_SITE][1].any() and muted.tokens is cond.tokens
    assert torch.equal(cond.null().channels, cond.channels)


def test_guidance_follows_its_schedule():
    cfg = LossConfig(guidance=1.0, guidance_schedule=((0, 2.0), (100, 6.0)))
    assert [cfg.at(step).guidance for step in (0, 50, 100, 500)] == [2.0, 4.0, 6.0, 6.0]
    assert LossConfig(guidance=3.0).at(7).guidance == 3.0
    with pytest.raises(ValueError, match="guidance_schedule"):
        LossConfig(guidance_schedule=((10, 1.0), (0, 2.0)))
    with pytest.raises(ValueError, match="guidance_floor"):
        LossConfig(guidance_floor=1.5)


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_stage_learns_from_audio_text_and_reference(tmp_path):
    trainer = Trainer(talker_stage(tmp_path, loss=LossConfig(guidance=2.0, audio_guidance=3.0), critic_steps=1))
    before = [p.detach().clone() for p in trainer.student_state.params]
    logs = [trainer.step() for _ in range(2)]
    assert all(np.isfinite(v) for row in logs for v in row.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.student_state.params, strict=True))
    record = trainer.record()
    assert record["audio"]["kind"] == "mel" and record["text"]["kind"] == "ngrams"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference": False}, "reference=true"),
        ({"curate": {"brightness": (0.9, 1.0)}}, "no clip"),
        ({"init_plateau": -0.1}, "init_plateau"),
    ],
)
def test_a_stage_whose_parts_do_not_fit_says_what_to_do(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        Trainer(talker_stage(tmp_path, **settings))


def test_curation_draws_only_good_clips_and_the_card_counts_the_others(tmp_path):
    trainer = Trainer(talker_stage(tmp_path, curate={"brightness": (0.2, 1.0)}))
    assert trainer.data.kept == [1, 2, 4, 5]
    drawn = {e for step in range(20) for e, _ in trainer.data.windows(8, 7, 0, step, "latents")}
    assert drawn == {1, 2, 4, 5}
    assert trainer.record()["card"]["dropped"] == {"brightness below": 2}


def test_an_init_that_still_learnt_is_refused_and_a_converged_one_is_not(tmp_path):
    assert plateau([1.0] * 8) == 0 and plateau([8, 7, 6, 5, 4, 3, 2, 1]) > 0.5
    stage = talker_stage(tmp_path, init_plateau=0.01)
    path = tmp_path / "student.json"

    def try_init(losses, done=80, **train):
        record = json.loads(path.read_text())
        settings = {"steps": 80, "curriculum": [], "optim": {"decay": 0.0}, **train}
        record["card"] |= {"losses": losses, "train": settings, "steps": done}
        path.write_text(json.dumps(record))
        Trainer(stage)

    try_init([1.0] * 8)
    with pytest.raises(ValueError, match="still learning"):
        try_init([8, 7, 6, 5, 4, 3, 2, 1])
    falling = [8, 7, 6, 5, 1, 1, 1, 1]  # it stood still as soon as its rate fell
    with pytest.raises(ValueError, match="still learning"):
        try_init(falling, optim={"decay": 0.5})
    with pytest.raises(ValueError, match="2 of its 8 logged losses"):
        try_init(falling, optim={"decay": 0.75})
    longer = [1, 1, 1, 1, 8, 7, 6, 5]  # longer clips cost more, and were still being learnt
    try_init([2, 2, 2, 2, 8, 8, 8, 8], curriculum=[[0, 3], [40, 7]])
    try_init([2, 2, 2, 2, 8, 8, 8, 8], done=40, curriculum=[[0, 3], [20, 7]], optim={"decay": 0.5})  # it ended early
    with pytest.raises(ValueError, match="still learning"):
        try_init(longer, curriculum=[[0, 3], [40, 7]])


def test_broken_rollouts_are_told_from_sound_ones_and_teach_less(tmp_path):
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(4, 1, 4, 8, 8, generator=rng) + 0.3 * torch.randn(4, 9, 4, 8, 8, generator=rng).cumsum(1)
    empty, frozen, flickering = (
        real.mean((3, 4), keepdim=True).expand_as(real),
        real[:, :1].expand_as(real),
        real.clone(),
    )
    flickering[:, ::2] += 3.0
    for clip, sound in ((real, 1.0), (empty, 0.0), (frozen, 0.0), (flickering, 0.0)):
        assert (valid_rollouts(clip, real, 1) == sound).all()
    norms = []
    for weight in (1.0, 0.25):
        loss = LossConfig(guidance=1.0, invalid_weight=weight)
        trainer = Trainer(talker_stage(tmp_path, loss=loss, critic_steps=1, data=str(tmp_path / "talks")))
        trainer.data.tensors  # noqa: B018
        batch = trainer.batch(0)
        still = replace(batch, x=batch.x + 50 * torch.arange(batch.x.shape[1]).view(1, -1, 1, 1, 1) ** 2)
        x0 = rolled(trainer, batch, grad=True).x0
        found = trainer.objective.student(
            trainer.roles, x0, still, trainer.loss, trainer.cfg.turn(1, trainer.loss).rng()
        )
        (grad,) = torch.autograd.grad(found.value, x0)
        norms.append(float(grad.norm()))
        assert found.numbers().get("invalid", 1.0) == 1.0  # all clips stand still beside these
    assert norms[1] == pytest.approx(0.25 * norms[0], rel=1e-4)


# --- peaks and diagnosis ----------------------------------------------------------------------------------------------


def test_a_peak_is_the_best_score_and_patience_counts_from_it():
    peak = EarlyStopping()
    assert [peak.update(score, step) for step, score in enumerate((0.1, 0.5, 0.4, 0.3), 1)] == [
        True,
        True,
        False,
        False,
    ]
    assert (peak.score, peak.step) == (0.5, 2) and peak.done(2) and not peak.done(3) and not peak.done(0)


def test_training_ends_after_its_peak_with_the_best_weights(tmp_path, monkeypatch):
    scores = iter((0.2, 0.9, 0.5, 0.4, 0.3))
    monkeypatch.setattr(validation, "judge", lambda *args: next(scores))
    look = ValidationConfig(str(tmp_path / "talks"), clips=2, every=2, score="error", patience=2)
    cfg = talker_stage(tmp_path, validation=look, steps=20, save_every=2, critic_steps=1, out=str(tmp_path / "runs"))
    path = train(cfg)
    rows = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    assert [row["error"] for row in rows if "error" in row] == [0.2, 0.9, 0.5, 0.4]
    assert load(path).record["card"]["steps"] == 4
    assert train(cfg) == path  # nothing goes on after the peak


def test_the_sync_score_prefers_mouths_that_move_and_pictures_that_do_not_flicker(monkeypatch):
    class Pixels:
        decode = staticmethod(lambda x: x)

    rng = torch.Generator().manual_seed(0)
    mouth = torch.rand(2, 24, 2, generator=rng).cumsum(1).sin().abs()
    real = 0.5 * torch.rand(2, 1, 3, 8, 8, generator=rng).expand(-1, 24, -1, -1, -1).clone()
    real[:, :, :2, 0, 0] = mouth
    monkeypatch.setattr(scores, "read_mouth", lambda px: px[:, :, 0, 0, :2])
    held = validation.HeldOut(Batch(real, Condition()), mouth, 0)
    still, noisy = real.clone(), real + 0.3 * torch.rand(real.shape, generator=rng)
    still[:, :, :2, 0, 0] *= 0.3
    noisy[:, :, :2, 0, 0] = mouth
    found = [scores.sync(px, held, Pixels) for px in (real, still, noisy)]
    assert found[0] == pytest.approx(1, abs=1e-4) and found[1] == pytest.approx(0.5, abs=1e-3)
    assert found[2] < found[0] - 0.1
    assert validation.score_of("vidistill.worlds.talker.scores:sync") is scores.sync


def test_the_error_score_prefers_the_recorded_clip(tmp_path):
    write_talks(tmp_path / "talks")
    held = validation.held_out(
        Clips(tmp_path / "talks", reference=True), ValidationConfig(clips=2), 7, torch.device("cpu")
    )
    assert held.mouth.shape == (2, 25, 2)
    clips = Clips(tmp_path / "talks", reference=True)
    for x, mouth, (e, start) in zip(held.batch.x, held.mouth, clips.windows(2, 7, 0, 0, "latents"), strict=True):
        assert torch.equal(mouth, clips.episode("mouth", e)[4 * start : 4 * start + 25].float())
        assert torch.equal(x[1:], clips.episode("latents", e)[start + 1 : start + 7].float())
    assert validation.error_score(held.batch.x, held, None) == 0 > validation.error_score(held.batch.x + 1, held, None)


def test_diagnosis_finds_the_gradient_by_chunk_and_level_and_its_agreement_with_the_truth(tmp_path):
    look = ValidationConfig(str(tmp_path / "talks"), clips=2, diagnose_every=2, levels=(0.2, 0.8))
    trainer = Trainer(talker_stage(tmp_path, validation=look, loss=LossConfig(guidance=1.0)))
    same = validation.diagnose(trainer.roles, trainer.cfg.schedule, trainer.held, trainer.loss, look.levels)
    assert same["chunks"] == [1, 2] and np.allclose(same["norm"], 0) and np.allclose(same["gap"], 0)

    class Truth:  # a critic that stays at the sample, a teacher that knows the recorded clip: as regression would
        def __init__(self, x):
            self.x = x

        def velocity(self, x, sigma, cond):
            return (x - self.x) / sigma.clamp_min(1e-6)[..., None, None, None]

    x = validation.roll(trainer.roles.student, trainer.cfg.schedule, trainer.held)
    roles = replace(trainer.roles, teacher=Truth(trainer.held.batch.x), critic=Truth(x))
    told = validation.diagnose(roles, trainer.cfg.schedule, trainer.held, trainer.loss, look.levels)
    assert np.allclose(told["cosine"], 1, atol=1e-3) and np.min(told["norm"]) > 0.1
    error = (
        (x - trainer.held.batch.x)[:, 1:].unflatten(1, (2, 3)).square().mean((0, 2, 3, 4, 5)).sqrt()
    )  # of each chunk
    assert np.allclose(told["norm"], error.tolist(), rtol=1e-3)
    against = replace(trainer.roles, teacher=Truth(2 * x - trainer.held.batch.x), critic=Truth(x))
    worse = validation.diagnose(against, trainer.cfg.schedule, trainer.held, trainer.loss, look.levels)
    assert np.allclose(worse["cosine"], -1, atol=1e-3)


def test_a_run_that_is_diagnosed_says_so_in_its_journal(tmp_path):
    look = ValidationConfig(str(tmp_path / "talks"), clips=2, diagnose_every=2, levels=(0.5,))
    path = train(talker_stage(tmp_path, validation=look, steps=4, save_every=4, out=str(tmp_path / "runs")))
    rows = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    found = [row["diagnosis"] for row in rows if "diagnosis" in row]
    assert len(found) == 2 and set(found[0]) == {"levels", "chunks", "norm", "gap", "cosine"}


# --- bench and memory -------------------------------------------------------------------------------------------------


def test_a_bench_says_how_late_lips_are_and_batches_three_guidance_branches(folder):
    from vidistill.bench.bench import BenchConfig, bench

    cfg = BenchConfig(rounds=1, chunks=1, inputs=0, warmup_chunks=0, clip_frames=6, clip_steps=2, speech_s=1.5)
    result = bench(folder / "student", cfg, vs=folder / "teacher")
    row = json.loads(result.to_json())
    assert row["audio_lookahead_ms"] == 62.5 and row["audio_to_lip_ms_p95"] > 0
    assert row["vs"]["nfe"] == 2 * 3 and any("audio to lip" in label for label, _ in result.rows())


def test_anchors_never_leave_and_are_turned_to_stay_near_for_any_length():
    from vidistill.memory.cache import KVMemory
    from vidistill.memory.policies import MemoryConfig
    from vidistill.memory.pooling import Pooling
    from vidistill.memory.spec import CacheSpec

    rng = np.random.default_rng(0)
    for sinks, frames, phase in ((9, 15, "relative"), (9, 15, "absolute"), (4, 13, "relative")):
        turned: dict[int, int] = {}

        def rotate(keys, positions, inverse):
            return keys + positions[0, 0]

        cfg = MemoryConfig("window", frames, sinks, phase)
        spec = CacheSpec(
            1, batch=1, heads=1, head_dim=2, grid=(1, 1), rotate=rotate, pooling=Pooling("average", (1, 1))
        )
        memory = KVMemory(cfg, spec)
        kept: list[int] = []
        at = 0
        while at < 300:
            size = int(rng.integers(1, frames - sinks + 1))
            excess = max(0, len(kept) + size - frames)
            rolling = [f for f in kept if f >= sinks]
            kept = [f for f in kept if f < sinks] + rolling[excess:]
            memory.begin(at, size)
            raw = torch.zeros(1, size, 1, 2)
            memory.segments(0, raw, raw + torch.arange(at, at + size).view(1, -1, 1, 1), raw)
            memory.commit()
            kept += range(at, at + size)
            at += size
            assert memory.frames == kept and len(kept) <= frames
            anchors = min(sinks, at - size)
            if phase == "relative" and at > 2 * frames and rolling[excess:]:
                turned = {f: memory._time(f) for f in range(anchors)}
                assert max(turned.values()) == min(f for f in kept if f >= sinks) - 1
            elif phase == "absolute":
                assert all(memory._time(f) == f for f in kept)


def test_a_checkpoint_is_never_chosen_on_clips_of_the_test(tmp_path):
    folder = write_talks(tmp_path / "talks")
    clips = Clips(folder, reference=True)
    held = validation.held_out(clips, ValidationConfig(data="x", clips=2), 7, torch.device("cpu"))
    assert held.origin["data"] == "x" and held.origin["seeds"][0] >= 0
    clips.meta["split"] = "test"
    with pytest.raises(ValueError, match=r"validation\.data"):
        validation.held_out(clips, ValidationConfig(clips=2), 7, torch.device("cpu"))


def test_a_card_says_on_what_its_checkpoint_was_chosen(tmp_path):
    look = ValidationConfig(str(tmp_path / "talks"), clips=2, every=2)
    trainer = Trainer(talker_stage(tmp_path, validation=look))
    assert trainer.record()["card"]["chosen_on"] == "nothing: the last step is kept"
    trainer.peak = replace(trainer.peak, step=2, score=1.0)
    chosen = trainer.record()["card"]["chosen_on"]
    assert chosen["data"] == str(tmp_path / "talks") and len(chosen["seeds"]) == 2
