"""People who talk: deterministic, their mouths follow the speech, and what is drawn can be read back."""

import numpy as np
import pytest
import torch

pytest.importorskip("espeakng_loader")

from tiny_training import CODEC

from vidistill.codecs.tiny import TinyCodec
from vidistill.conditioning.audio import AudioConfig, clip_features
from vidistill.conditioning.condition import AUDIO_SITE
from vidistill.conditioning.text import NgramConfig, Ngrams
from vidistill.data import clips as clips_module
from vidistill.data import shards as shards_module
from vidistill.data import types
from vidistill.data.clips import filter_clips
from vidistill.worlds.talker import recorder
from vidistill.worlds.talker.face import read_mouth
from vidistill.worlds.talker.recorder import TalkerConfig, correlation, measures, record
from vidistill.worlds.talker.speech import RATE, TRACK, Voice, resample, say

CFG = TalkerConfig(num_frames=65)


@pytest.fixture(scope="module")
def clips():
    return [record(CFG, seed) for seed in (0, 1, 6, types.HELD_OUT_SEED)]


def pixels(clip):
    return clip.frames.astype(np.float32) / 255


def test_a_clip_is_the_same_for_the_same_seed_whatever_was_said_before(clips):
    again = record(CFG, 1)
    assert np.array_equal(again.pcm, clips[1].pcm) and np.array_equal(again.frames, clips[1].frames)
    assert not np.array_equal(clips[0].pcm, clips[1].pcm)


def test_people_and_sentences_of_the_splits_never_meet():
    train, held_out = ([recorder.describe(s)[0] for s in recorder.seeds(split, 60)] for split in ("train", "held_out"))
    assert not any(recorder.is_held_out(look) for look in train) and all(
        recorder.is_held_out(look) for look in held_out
    )
    rng = np.random.default_rng(0)
    said = [{recorder.sentence(rng, held).casefold() for _ in range(60)} for held in (False, True)]
    assert not said[0] & said[1] and min(map(len, said)) > 40
    with pytest.raises(ValueError, match="split"):
        recorder.seeds("games", 1)


def test_the_mouth_that_is_read_is_the_mouth_that_was_drawn(clips):
    for clip in clips:
        opening = read_mouth(pixels(clip))[:, 0]
        assert correlation(opening, clip.mouth[:, 0]) > 0.95, clip.labels
        assert abs(opening - clip.mouth[:, 0]).max() < 0.2


def test_a_face_without_a_mouth_reads_as_shut(clips):
    px = pixels(clips[0]).copy()
    px[:, 30:60] = px[:, 29:30]  # cheeks all the way down
    assert read_mouth(px)[:, 0].max() < 0.05


def test_mouths_open_when_it_sounds_and_shut_for_lips_that_meet(clips):
    spoken = say("ba ma pa, ah, ba ma pa", Voice(speed=120))
    assert spoken.mouth[:, 0].min() < 0.08 and spoken.mouth[:, 0].max() > 0.6
    assert abs(len(spoken.mouth) / TRACK - len(spoken.pcm) / RATE) < 0.05
    assert min(measures(clip, CFG)["sync"] for clip in clips) > 0.5


def test_rounded_vowels_are_narrow_and_spread_ones_wide():
    too, tea = say("oo oo oo oo").mouth, say("ee ee ee ee").mouth
    assert too[:, 1].min() + 0.2 < tea[:, 1].max() and tea[:, 1].max() > 0.7


def test_people_listen_in_between(clips):
    loud = np.abs(clips[0].pcm[: 64 * 1000].astype(float).reshape(-1, 1000)).mean(1)
    quiet = loud < 150
    assert 3 < quiet.sum() < 50 and clips[0].mouth[:64][quiet, 0].mean() < 0.25 * clips[0].mouth[:64][~quiet, 0].mean()


def test_speech_at_another_rate_keeps_its_pitch():
    t = np.arange(22_050) / 22_050
    out = resample(np.sin(2 * np.pi * 440 * t), 22_050, 16_000)
    assert len(out) == 16_000
    assert np.abs(out - np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000))[50:-50].max() < 1e-4


def test_a_voice_that_is_not_there_and_an_empty_text_are_errors():
    with pytest.raises(ValueError, match="no voice"):
        say("hello", Voice("xx-nowhere"))
    with pytest.raises(ValueError, match="to say"):
        say(" ")


def test_clips_last_as_long_as_what_hears_them_looks_ahead():
    audio = AudioConfig(lookahead=6)
    made = list(recorder.record_many(TalkerConfig(num_frames=9, audio=audio), range(3), workers=2))
    assert {len(clip.pcm) for clip in made} == {(9 + audio.wait) * audio.samples}
    assert [clip.seed for clip in made] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"speed.*rise"):
        TalkerConfig(speed=(150, 150))


def test_every_fault_is_found_by_a_measure_and_counted():
    cfg = TalkerConfig(num_frames=49, faults=1.0)
    faulty = [record(cfg, seed) for seed in range(12)]
    sound = [record(TalkerConfig(num_frames=49), seed) for seed in range(4)]
    ranges = {"brightness": (0.2, 1.0), "sharpness": (0.1, 1.0), "speech": (0.1, 1.0), "sync": (0.6, 1.0)}
    kept, dropped = filter_clips([{"measures": measures(c, cfg)} for c in (*sound, *faulty)], ranges, "here")
    assert kept == [0, 1, 2, 3] and sum(dropped.values()) == 16 - len(kept)
    reasons = {fault for fault in ("brightness", "speech", "sync") if f"{fault} below" in dropped}
    assert reasons == {"brightness", "speech", "sync"}
    with pytest.raises(ValueError, match="no measure 'smile'"):
        filter_clips([{"measures": {"sync": 1.0}}], {"smile": (0, 1)}, "here")
    with pytest.raises(ValueError, match="no clip"):
        filter_clips([{"measures": {"sync": 0.1}}], {"sync": (0.5, 1)}, "here")


def test_shards_hold_audio_at_latent_rate_the_mouth_and_the_reference(tmp_path, clips):
    encode = Ngrams(NgramConfig(16, 8)).encode
    shards = list(shards_module.talk_shards(clips, encode, CFG.audio, lambda clip: measures(clip, CFG), 4))
    tensors = shards[0][0]
    assert tensors["audio"].shape == (4, 65, 64) and tensors["mouth"].shape == (4, 65, 2)
    codec = TinyCodec(CODEC)
    meta = {"fps": 16.0, "px_size": 64, "temporal": 4, "audio": {}}
    shards_module.write_shards(tmp_path / "latents", [shards_module.latent_shard(s, codec) for s in shards], meta)
    found = clips_module.Clips(tmp_path / "latents", reference=True, curate={"sync": (-1.0, 1.0)})
    batch = found.latents(3, 5, 0, 0)
    assert batch.cond.per_frame[AUDIO_SITE].shape == (3, 5, 256)
    channels = batch.cond.channels
    assert torch.equal(channels[:, 3, :-1], batch.x[:, 0])
    assert not channels[:, 0, -1].any() and (channels[:, 1:, -1] == 1).all()
    own = torch.from_numpy(clip_features(clips[0].pcm / 32768, 65, AudioConfig()))
    stored = found.episode("audio", 0).float()
    assert torch.allclose(stored[3].view(4, 64), own[9:13], atol=2e-3)
    assert "pcm" not in found.parts[0] and found.meta["described"][0]["measures"]["speech"] > 0
    with pytest.raises(ValueError, match="no clip"):
        clips_module.Clips(tmp_path / "latents", curate={"sync": (2.0, 3.0)})
