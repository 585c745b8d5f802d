"""The judge is judged: students that cheat mildly are caught by the figure that is named, honest ones by none.

The honest student shows what is true through the codec, with noise of its own on the latents. A cheat is caught where
its named figure lies outside the honest student's 95 % interval. Strengths are fixed: a cheat that passes is a fault of
the judge.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vidistill import checkpoint
from vidistill.data.shards import frame_shards, write_shards
from vidistill.evaluation import SUITES
from vidistill.evaluation.clips import Batch, Tally, View
from vidistill.evaluation.intervals import badness
from vidistill.evaluation.recall import nearest
from vidistill.evaluation.rooms import Rooms
from vidistill.evaluation.suite import RUN_STEP, add_certainty, real_row, run_figures
from vidistill.worlds import WORLDS

pytestmark = pytest.mark.timeout(900)
RUNS = 3
NOISE = 0.05  # of the honest student's latents

Cheat = Callable[[Tensor, Batch], Tensor]


def blurred(px: Tensor, batch: Batch, sigma: float = 0.7) -> Tensor:
    x = torch.arange(-2, 3) / sigma
    kernel = torch.softmax(-0.5 * x.square(), 0)
    flat = F.pad(px.flatten(0, 2)[:, None], (2, 2, 2, 2), mode="replicate")
    return F.conv2d(F.conv2d(flat, kernel[None, None, None]), kernel[None, None, :, None])[:, 0].view_as(px)


def sharpened(px: Tensor, batch: Batch) -> Tensor:
    return (px + 0.5 * (px - blurred(px, batch, 1.0))).clamp(0, 1)


def saturated(px: Tensor, batch: Batch) -> Tensor:
    grey = px.mean(2, keepdim=True)
    return (grey + 1.15 * (px - grey)).clamp(0, 1)


def frozen(px: Tensor, batch: Batch) -> Tensor:
    """From two thirds of the clip on."""
    at = 2 * px.shape[1] // 3
    return torch.cat((px[:, :at], px[:, at : at + 1].expand(-1, px.shape[1] - at, -1, -1, -1)), 1)


def repeating(px: Tensor, batch: Batch) -> Tensor:
    """One frame in eight shows the one before."""
    times = torch.arange(px.shape[1])
    return px[:, times - (times % 8 == 7).long()]


def looping(px: Tensor, batch: Batch) -> Tensor:
    """The second half is the first one again."""
    few = px.shape[1] // 2
    return torch.cat((px[:, :-few], px[:, :few]), 1)


def late(px: Tensor, batch: Batch) -> Tensor:
    """By four frames."""
    return torch.cat((px[:, :1].expand(-1, 4, -1, -1, -1), px[:, :-4]), 1)


def backwards(px: Tensor, batch: Batch) -> Tensor:
    return px.flip(1)


def mirrored(px: Tensor, batch: Batch) -> Tensor:
    return px.flip(-1)


def paste_start(px: Tensor, batch: Batch) -> Tensor:
    return px[:, :1].expand_as(px)


def snapping(px: Tensor, batch: Batch) -> Tensor:
    """Back to the start picture for the last eighth of the clip."""
    few = px.shape[1] // 8
    return torch.cat((px[:, :-few], px[:, :1].expand(-1, few, -1, -1, -1)), 1)


def walls(px: Tensor, batch: Batch) -> Tensor:
    """A plain wall for the last quarter of every other clip."""
    out = px.clone()
    out[::2, -px.shape[1] // 4 :] = out[::2, -1:].mean((-2, -1), keepdim=True)
    return out


def elsewhere(px: Tensor, batch: Batch) -> Tensor:
    """The true video of another room: what was asked for is ignored."""
    return px.roll(1, 0)


def still_mouths(px: Tensor, batch: Batch) -> Tensor:
    """The mouth moves half as much: every frame is half way to the first."""
    return torch.lerp(px, px[:, :1], 0.5)


def melting(px: Tensor, batch: Batch) -> Tensor:
    """An eye has run in the second half of the clip."""
    out, at = px.clone(), px.shape[1] // 2
    out[:, at:, :, 22:32, 20:32] = px[:, at:, :, 22:32, 20:32].mean(-2, keepdim=True)
    return out


def awake(px: Tensor, batch: Batch) -> Tensor:
    """The eyes stay as they are in the first frame."""
    out = px.clone()
    out[..., 18:34, 14:50] = px[:, :1, :, 18:34, 14:50]
    return out


def snapping_back(px: Tensor, batch: Batch) -> Tensor:
    """From frame 25 on the start picture wherever one looks as at the start, as keys stretched by 1.3 show it."""
    heading = batch.facts["poses"][..., 2]
    turned = (heading - heading[:, :1] + torch.pi) % (2 * torch.pi) - torch.pi
    back = (turned.abs() < 0.2) & (torch.arange(px.shape[1]) >= 25)
    return torch.where(back[..., None, None, None], px[:, :1], px)


def jumping_back(px: Tensor, batch: Batch) -> Tensor:
    """Frame 8 again for the fourth eighth of the clip, and on from where it was."""
    few = px.shape[1] // 8
    return torch.cat((px[:, : 3 * few], px[:, 8:9].expand(-1, few, -1, -1, -1), px[:, 4 * few :]), 1)


def pasting_nearest(px: Tensor, batch: Batch) -> Tensor:
    """Once away, the frame of before that was seen from nearest."""
    poses, away = batch.facts["poses"], batch.facts["away"]
    times = torch.arange(px.shape[1])
    chosen = torch.where(times > away[:, None], nearest(poses, away + 1), times)
    return px[torch.arange(len(px))[:, None], chosen]


PICTURES: dict[str, tuple[Cheat, str]] = {
    "blurred": (blurred, "sharpness_ratio"),
    "over-sharpened": (sharpened, "sharpness_ratio"),
    "saturating": (saturated, "saturation_ratio"),
    "pasting the first frame": (paste_start, "motion_ratio"),
    "frozen": (frozen, "motion_ratio"),
}
CHEATS: dict[str, dict[str, tuple[Cheat, str]]] = {
    "doom": {
        **PICTURES,
        "one frame in eight repeated": (repeating, "stuck_frames"),
        "a repeated clip": (looping, "action_following"),
        "late": (late, "action_following"),
        "backwards": (backwards, "turn_following"),
        "mirrored": (mirrored, "turn_following"),
        "ignoring the actions": (elsewhere, "action_following"),
        "another room's video": (elsewhere, "psnr"),  # sets of features do not see who is where
        "back to the start": (snapping, "returns"),
        "walls alone": (walls, "flat_frames"),
    },
    "memory": {
        "pasting the first frame": (paste_start, "consistency_gain/generated"),
        "pasting the nearest frame": (pasting_nearest, "straight_rpe_trans"),
        "stretched keys": (snapping_back, "snap_back"),
        "start picture at its heading": (snapping_back, "false_recall/elsewhere"),
        "an earlier frame again": (jumping_back, "returns"),
        "walls alone": (walls, "revisit_psnr/5"),
        "another room's video": (elsewhere, "revisit_texture_acc/5"),
        "frozen": (frozen, "consistency_texture"),
        "mirrored": (mirrored, "rpe_rot"),
        "late": (late, "action_following"),
    },
    "minutes": {
        "blurred": (blurred, "sharpness_ratio/8"),
        "over-sharpened": (sharpened, "sharpness_ratio/8"),
        "saturating": (saturated, "saturation_ratio/8"),
        "pasting the first frame": (paste_start, "motion_ratio/4"),
        "frozen": (frozen, "stuck_frames/8"),
        "one frame in eight repeated": (repeating, "stuck_frames/4"),
        "a repeated clip": (looping, "returns/8"),
        "back to the start": (snapping, "returns/8"),
        "walls alone": (walls, "flat_frames/8"),
        "late": (late, "action_following/8"),
        "mirrored": (mirrored, "rpe_rot/4"),
        "another room's video": (elsewhere, "action_following/4"),
    },
    "shapes": {
        **PICTURES,
        "ignoring the prompt": (elsewhere, "before/asked"),
        "backwards": (backwards, "before/motion"),
        "mirrored": (mirrored, "before/motion"),
    },
    "talker": {
        **PICTURES,
        "ignoring the sound": (elsewhere, "sync_corr"),
        "a repeated clip": (looping, "sync_corr"),
        "late": (late, "sync_offset_frames"),
        "mouth that hardly opens": (still_mouths, "mouth_motion_ratio"),
        "another person's video": (elsewhere, "identity"),
        "an eye that melts": (melting, "identity"),
        "eyes that never close": (awake, "blink_ratio"),
    },
}


def suite_of(name):
    """(world, suite) of a column of cheats."""
    return ("doom", SUITES[name]) if name in SUITES else (name, SUITES[WORLDS[name].suites[0]])


def settings(name, folder):
    """A small protocol of a suite."""
    source, suite = suite_of(name)
    cfg = suite.config
    if source != "doom":
        return cfg(clips=16, batch=8)
    doom = WORLDS["doom"].config(num_frames=56, supersample=3)
    episodes = WORLDS["doom"].record(doom, WORLDS["doom"].seeds("validation", 16))
    meta = {"source": "doom", "split": "validation", "config": asdict(doom), "fps": doom.fps}
    write_shards(folder / "doom-heldout" / "frames", frame_shards(episodes, 8), meta)
    data = str(folder / "doom-{split}")
    if name == "memory":
        return cfg(paths=6, seconds=(5.0,), data=data)
    if name == "minutes":
        return cfg(streams=8, marks=(4.0, 8.0), span=2.0, data=data)
    return cfg(clips=16, batch=8, episodes=16, frames=13, data=data)


class OnDemand(Tally):
    """Clips of which a part is measured when a figure asks for it."""

    def __init__(self, data, parts, row, run=0):
        super().__init__(data)
        seeded = [replace(batch, seed=batch.seed + run * RUN_STEP) for batch in data.batches]
        self.measures, self.views = parts, [View(row(batch), batch, data) for batch in seeded]
        alone = [batch.seed + torch.arange(len(batch.px)) for batch in seeded]
        self.parts["rooms"] = [rooms if b.rooms is None else b.rooms for rooms, b in zip(alone, seeded, strict=True)]

    def __getitem__(self, name):
        if name not in self.parts:
            self.parts[name] = [self.measures[name](view) for view in self.views]
        return super().__getitem__(name)


WORLDS_JUDGED = ["doom", "memory", "minutes", "shapes", pytest.param("talker", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=WORLDS_JUDGED)
def judged(request, tmp_path_factory):
    """(world, figures by row): those of the honest student with intervals."""
    source, suite = suite_of(request.param)
    pytest.importorskip({"doom": "vizdoom", "talker": "espeakng_loader"}.get(source, "torch"))
    student = checkpoint.load(source, "student")
    codec = checkpoint.load_codec(student)
    cfg = settings(request.param, tmp_path_factory.mktemp("cheats"))
    data = suite.data(student, codec, Rooms(source, WORLDS[source]), cfg)
    data, codes, made = replace(data, batches=list(data.batches)), {}, {}

    def honest(batch, apart=0):
        """Clips of the honest student, made once; `apart`: with other noise."""
        key = (batch.seed, apart)
        if key not in made:
            if id(batch.px) not in codes:
                codes[id(batch.px)] = codec.encode(batch.px)
            x = codes[id(batch.px)]
            rng = torch.Generator().manual_seed(sum(key))
            made[key] = codec.decode(x + NOISE * torch.randn(x.shape, generator=rng))
        return made[key]

    parts = {name: part for metric in suite.metrics.values() for name, part in metric.parts.items()}
    wanted = {key: suite.metrics[key] for _, figure in CHEATS[request.param].values() for key in [figure.split("/")[0]]}
    tallied = partial(OnDemand, data, parts)
    tallies = {"real": [tallied(real_row)], "student": [tallied(honest, run) for run in range(RUNS)]}
    tallies["other noise"] = [tallied(partial(honest, apart=77))]
    real = tallies["real"][0]
    result = {name: run_figures(wanted, runs, real) for name, runs in tallies.items()}
    for name, (cheat, figure) in CHEATS[request.param].items():  # of each, the figure that is to catch it
        key, row = figure.split("/")[0], lambda batch, cheat=cheat: cheat(honest(batch), batch)
        result[name] = run_figures({key: wanted[key]}, [tallied(row)], real)
    mine = {name: result[name] for name in ("real", "student")}
    add_certainty(wanted, mine, {name: tallies[name] for name in mine}, {}, 100)
    return request.param, result


def flagged(result, row, path):
    """(figure, interval) where a figure of a row lies outside the honest student's interval; else None."""
    key, *part = path.split("/")
    value, edges = result[row][key], result["student"][f"{key}_interval"]
    value, edges = (value[part[0]], edges[part[0]]) if part else (value, edges)
    return None if edges[0] - 1e-9 <= value <= edges[1] + 1e-9 else (value, edges)


def test_cheats_are_caught_by_the_figure_that_names_them(judged):
    name, result = judged
    passed = {cheat: figure for cheat, (_, figure) in CHEATS[name].items() if not flagged(result, cheat, figure)}
    assert not passed


def test_an_honest_student_with_other_noise_is_not_flagged(judged):
    name, result = judged
    named = sorted({figure for _, figure in CHEATS[name].values()})
    assert not {figure: found for figure in named if (found := flagged(result, "other noise", figure))}


def test_true_video_is_never_worse_than_an_honest_student(judged):
    name, result = judged
    numbers = suite_of(name)[1].metrics
    for path in {figure for _, figure in CHEATS[name].values()}:
        key = path.split("/")[0]
        found = flagged(result, "real", path) if key in result["real"] else None
        if found and numbers[key].best:
            value, edges = found
            assert badness(numbers[key].best, value) < min(badness(numbers[key].best, edge) for edge in edges), path
