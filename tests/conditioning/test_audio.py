"""Features of sound are causal but for a bounded look-ahead, and a stream's are those of the whole clip."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from tiny_audio import tiny_wav2vec2

from vidistill.conditioning import audio
from vidistill.conditioning.audio import AudioConfig, Track, clip_features, from_pcm16, to_pcm16

CONFIGS = {
    "mel": AudioConfig(),
    "mel that looks two frames ahead": AudioConfig(lookahead=2, hops=4, bands=8),
    "mel without look-ahead": AudioConfig(lookahead=0, context=0),
    "blocks": AudioConfig(block=4, lookahead=1, context=3),
}
FRAMES = 41


def noise(frames, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, frames * 1000).astype(np.float32)


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_sound_beyond_the_look_ahead_changes_no_feature(cfg):
    pcm = noise(FRAMES)
    for frame in (0, 5, 20):
        other = pcm.copy()
        known = (frame + 1 + cfg.wait) * cfg.samples
        other[known:] = noise(FRAMES, 1)[known:]
        was, now = clip_features(pcm, FRAMES, cfg), clip_features(other, FRAMES, cfg)
        assert np.array_equal(was[: frame + 1], now[: frame + 1]) and not np.array_equal(was, now)


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("steps", [(1, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4), (9, 12, 12, 8)])
def test_a_streams_features_are_exactly_those_of_the_whole_clip(cfg, steps):
    pcm, track, parts, at = noise(FRAMES), Track(cfg), [], 0
    for step in steps:
        need = (at + step + cfg.wait) * cfg.samples
        done = (at + cfg.wait) * cfg.samples if at else 0
        track.push(pcm[done:need], 0.0)
        parts.append(track.take(at, at + step))
        at += step
    assert np.array_equal(np.concatenate(parts), clip_features(pcm, at, cfg))


def test_streams_that_hear_at_the_same_time_do_not_hear_each_other(tmp_path):
    cfg = tiny_wav2vec2(tmp_path)
    sounds = [noise(FRAMES, seed) for seed in range(2)]
    alone = [clip_features(pcm, FRAMES, cfg) for pcm in sounds]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda k: clip_features(sounds[k % 2], FRAMES, cfg), range(12)))
    assert all(np.array_equal(together[k], alone[k % 2]) for k in range(12))


def test_wav2vec2_features_are_causal_and_stream(tmp_path):
    cfg, pcm = tiny_wav2vec2(tmp_path), noise(16)
    whole = clip_features(pcm, 12, cfg)
    assert whole.shape == (12, 4 * 16)  # the last state, the embedding and two layers
    track = Track(cfg)
    track.push(pcm, 0.0)
    assert np.array_equal(np.concatenate([track.take(0, 5), track.take(5, 12)]), whole)
    other = pcm.copy()
    other[6000:] = 0.0  # blocks of 4 frames hear 2 frames more
    assert np.array_equal(clip_features(other, 12, cfg)[:4], whole[:4])
    assert not np.array_equal(clip_features(other, 12, cfg)[4:], whole[4:])


def test_features_tell_silence_loudness_and_pitch_apart():
    cfg, t = AudioConfig(), np.arange(8000) / 16_000
    silent, soft, loud, high = (
        clip_features(amp * np.sin(2 * np.pi * hz * t).astype(np.float32), 8, cfg)[4]
        for amp, hz in ((0.0, 300), (0.05, 300), (0.5, 300), (0.5, 3000))
    )
    assert np.allclose(silent, -1) and soft.mean() < loud.mean() and abs(loud).max() < 2
    assert loud[:16].argmax() < high[:16].argmax()


def test_features_rise_by_one_where_sound_gets_e_to_the_sixth_as_powerful():
    cfg, pcm = AudioConfig(), noise(8)
    loud, soft = (clip_features(pcm * math.exp(by / 2), 8, cfg)[4] for by in (6.0, 0.0))
    heard = soft > 0  # far above the floor
    assert heard.any() and np.allclose((loud - soft)[heard], 1.0, atol=0.01)


def test_an_encoder_of_sound_gets_it_without_its_loudness_and_offset(monkeypatch):
    heard = []

    class Listening:
        def feature_extractor(self, x):
            heard.append(x)
            raise StopIteration

    monkeypatch.setattr(audio, "wav2vec2", lambda source: Listening())
    for pcm in (noise(10), 0.3 * noise(10) + 0.2):
        with pytest.raises(StopIteration):
            audio.hidden_states(pcm, AudioConfig("wav2vec2", source="there"))
    assert abs(float(heard[0].mean())) < 1e-5 and abs(float(heard[0].std()) - 1) < 1e-3
    assert np.allclose(*heard, atol=1e-3)


@pytest.mark.parametrize("allowed", [True, False])
def test_an_encoder_is_downloaded_only_where_that_is_allowed(allowed, monkeypatch):
    transformers = pytest.importorskip("transformers")
    asked = []

    def read(source, local_files_only):
        asked.append((source, local_files_only))
        raise OSError("not there")

    monkeypatch.setattr(transformers.Wav2Vec2Model, "from_pretrained", read)
    monkeypatch.setattr(audio, "may_download", lambda: allowed)
    with pytest.raises(OSError, match=r"facebook/wav2vec2-base"):
        audio.wav2vec2("hf://facebook/wav2vec2-base")
    assert asked == [("facebook/wav2vec2-base", not allowed)]


def test_what_is_pushed_late_follows_silence_and_what_waits_can_be_hushed():
    track = Track(AudioConfig())
    track.take(0, 4)  # frames 0 to 3 and the look-ahead, frame 4, are silent now
    track.push(np.full(2500, 0.5, np.float32), when=7.0)
    assert track.waiting == 2500
    track.take(4, 6)
    assert not track.sound(4).any() and (track.sound(5) == 0.5).all() and track.came_at(4) is None
    assert track.came_at(5) == 7.0 and track.waiting == 500
    track.clear_audio()
    track.take(6, 9)
    assert (track.sound(6) == 0.5).all() and not track.sound(7).any()


def test_a_track_of_any_length_holds_a_bounded_piece():
    track = Track(AudioConfig())
    for at in range(0, 2000, 4):
        track.push(np.ones(4000, np.float32), at)
        track.take(at, at + 4)
    frames = audio.KEPT + 32  # that may be asked for again, and what lets go in steps
    assert len(track._held) < frames * track.cfg.samples
    assert len(track._features) < frames and len(track._came) < frames


def test_bands_are_triangles_on_the_mel_scale_that_sum_to_one():
    filters = audio.mel_filters(8, 16_000, 4096)
    hz = np.fft.rfftfreq(4096, 1 / 16_000)
    steps = np.diff(2595 * np.log10(1 + hz[filters.argmax(1)] / 700))  # between the peaks
    assert np.allclose(filters.sum(1), 1) and np.allclose(steps, steps.mean(), rtol=0.05)
    inside = [hz[row > 0][[0, -1]] for row in filters]
    assert all(abs(low - 60) < 8 for low, _ in inside[:1]) and all(abs(high - 7600) < 8 for _, high in inside[-1:])
    peaks = hz[filters.argmax(1)]
    assert all(inside[k][1] == pytest.approx(peaks[k + 1], abs=8) for k in range(7))
    assert all(inside[k + 1][0] == pytest.approx(peaks[k], abs=8) for k in range(7))


def test_pcm_survives_bytes():
    assert to_pcm16(np.array([-3.0, -1.0, 0.0, 1.0, 3.0], np.float32)).tolist() == [-32767, -32767, 0, 32767, 32767]
    pcm = noise(1)
    assert np.abs(from_pcm16(np.frombuffer(to_pcm16(pcm).tobytes(), "<i2")) - pcm).max() < 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "mfcc"}, "mfcc"),
        ({"kind": "wav2vec2"}, "source"),
        ({"rate": 16_001}, "whole samples"),
        ({"hops": 3}, "hops"),
        ({"lookahead": -1}, "lookahead"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(AudioConfig(), **settings)
