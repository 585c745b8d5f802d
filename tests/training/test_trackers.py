"""Who is told of a run: the log always, trackers by name, videos and exports on the way."""

import json
import sys
import types
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from tiny_training import codec_stage, dmd_stage, flow_stage, write_latents

from vidistill import checkpoint
from vidistill.codecs.tiny import TinyCodec, TinyCodecConfig
from vidistill.io import read_video
from vidistill.training.trackers import TRACKERS, read_rows
from vidistill.training.trainer import METRICS, Trainer, train


class Service(types.ModuleType):
    """A module with the functions of wandb and trackio that we call; it remembers them."""

    def __init__(self, name, fails=()):
        super().__init__(name)
        self.calls, self.fails = [], fails

    def __getattr__(self, name):
        if name not in ("init", "log", "Video", "finish"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            if name in self.fails:
                raise ConnectionError("away")
            return name, args

        return call


class Writer:
    """TensorBoard's SummaryWriter, as far as we call it."""

    made: ClassVar[list] = []

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.calls = folder, purge_step, []
        Writer.made.append(self)

    def add_scalar(self, tag, value, step):
        self.calls.append((tag, value, step))

    def add_text(self, tag, text, step):
        self.calls.append((tag, json.loads(text.strip("`\n"))["name"], step))

    def add_image(self, tag, px, step, dataformats):
        assert px.ndim == 3 and dataformats == "HWC"
        self.calls.append((tag, px.shape[-1], step))

    def close(self):
        self.calls.append("close")


@pytest.fixture
def tensorboard(monkeypatch):
    """A stand-in for the package and for torch's writer into it."""
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(Writer, "made", [])
    return Writer.made


@pytest.fixture
def codec(tmp_path):
    small = TinyCodecConfig(latent_channels=4, encoder_widths=(6, 8, 8), decoder_widths=(8, 8, 6))
    checkpoint.export(tmp_path / "codec", TinyCodec(small), {"card": {}})
    return str(tmp_path / "codec")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_is_told_rows_videos_and_the_end(tmp_path, monkeypatch, codec, name):
    service = Service(name)
    monkeypatch.setitem(sys.modules, name, service)
    path = train(dmd_stage(tmp_path, steps=2, log_every=1, sample_every=2, codec=codec, trackers=(name,)))
    names = [call[0] for call in service.calls]
    assert names == ["init", "log", "log", "Video", "log", "finish"]
    started = service.calls[0][2]
    assert started["name"] == "dmd" and started["config"]["objective"] == "dmd" and started["resume"] == "allow"
    rows = read_rows(path.parent / METRICS)
    logged = [call for call in service.calls if call[0] == "log"]
    for row, (_, (numbers,), keys) in zip(rows, logged, strict=False):
        assert keys == {"step": row["step"]} and numbers == {k: v for k, v in row.items() if k != "step"}
    assert "samples" in logged[-1][1][0]


def test_tensorboard_is_told_rows_pictures_and_the_end(tmp_path, tensorboard, codec):
    cfg = flow_stage(
        tmp_path, steps=2, log_every=1, save_every=1, sample_every=1, codec=codec, trackers=("tensorboard",)
    )
    train(replace(cfg, steps=1))
    train(cfg)
    first, second = tensorboard
    assert first.folder == second.folder == str(tmp_path / "runs" / "flow" / "tensorboard")
    assert (first.purge_step, second.purge_step) == (1, 2)  # rows after the state that is resumed are dropped
    assert ("config", "flow", 0) in first.calls and ("samples", 3, 2) in second.calls
    assert {(tag, step) for tag, _, step in second.calls[:-1]} >= {("student/loss", 2), ("s_per_step", 2)}
    assert first.calls[-1] == second.calls[-1] == "close"


def test_a_service_that_is_away_does_not_end_a_run(tmp_path, monkeypatch, caplog):
    service = Service("wandb", fails=("log",))
    monkeypatch.setitem(sys.modules, "wandb", service)
    path = train(flow_stage(tmp_path, steps=3, log_every=1, trackers=("wandb",)))
    assert [call[0] for call in service.calls] == ["init", "log"]
    assert "wandb failed" in caplog.text and len(read_rows(path.parent / METRICS)) == 3


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"vidistill\[{name}\]"):
        Trainer(flow_stage(tmp_path, trackers=(name,)))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"trackers": ("paper",)}, "trackers"),
        ({"sample_every": 5}, "codec"),
        ({"sample_every": -1}, "sample_every"),
        ({"export_every": -1}, "export_every"),
    ],
)
def test_settings_of_reports_that_cannot_work_are_refused(tmp_path, settings, field):
    with pytest.raises(ValueError, match=field):
        flow_stage(tmp_path, **settings)


@pytest.mark.parametrize("make", [flow_stage, dmd_stage])
def test_samples_and_exports_on_the_way_change_nothing_of_the_training(tmp_path, codec, make):
    cfg = make(tmp_path, steps=4, save_every=2, codec=codec)
    plain = train(replace(cfg, name="plain"))
    seen = train(replace(cfg, name="seen", sample_every=2, export_every=2))
    a, b = (checkpoint.read_tensors(path)[0] for path in (plain, seen))
    assert all(torch.equal(a[k], b[k]) for k in a)
    folder = seen.parent
    assert sorted(p.name for p in (folder / "samples").iterdir()) == [
        f"step-{step:08d}{suffix}" for step in (2, 4) for suffix in (".mp4", ".png")
    ]
    frames, fps = read_video(folder / "samples" / "step-00000004.mp4")
    assert len(frames) == 25 and fps == pytest.approx(17.5) and frames.shape[2] == 2 * frames.shape[1]  # two clips
    last, early = (checkpoint.read_tensors(folder / f"seen-{step}.safetensors")[0] for step in (4, 2))
    assert all(torch.equal(last[k], b[k]) for k in b) and not all(torch.equal(early[k], b[k]) for k in b)
    assert checkpoint.load(folder / "seen-2").record["card"]["steps"] == 2


def test_a_codec_that_is_exported_on_the_way_goes_on_with_its_own_latents(tmp_path):
    cfg = codec_stage(tmp_path, steps=4)
    paths = [train(replace(cfg, name=str(every), export_every=every)) for every in (0, 2)]
    a, b = (checkpoint.read_tensors(path)[0] for path in paths)
    assert all(torch.equal(a[k], b[k]) for k in a) and (tmp_path / "runs" / "2" / "2-2.json").is_file()


def test_trajectories_are_sampled_too(tmp_path, codec):
    from vidistill.data.shards import write_shards
    from vidistill.training.losses import LossConfig

    folder = write_latents(tmp_path / "latents", length=7)
    meta = json.loads((folder / "meta.json").read_text())
    clips = torch.randn(4, 3, 7, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    tensors = {"states": clips, "actions": torch.zeros(4, 7, 17)}
    kept = {k: meta[k] for k in ("fps", "actions", "px_size")}
    kept |= {"levels": [1.0, 0.5], "frames": 7, "given": 1}
    write_shards(tmp_path / "paths", [(tensors, [{}] * 4)], kept)
    cfg = dmd_stage(
        tmp_path,
        objective="regression",
        teacher=None,
        data=str(tmp_path / "paths"),
        loss=LossConfig(levels=(1.0, 0.5)),
        steps=1,
        sample_every=1,
        codec=codec,
    )
    assert len(read_video(train(cfg).parent / "samples" / "step-00000001.mp4")[0]) == 25
