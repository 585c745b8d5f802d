"""What bundled networks do, as a person who plays with them sees it; not what their files hold."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vidistill import StreamConfig, StreamSession, checkpoint, load_codec, load_student, metrics
from vidistill.data.types import Captioned
from vidistill.evaluation.clips import Batch, teacher_row
from vidistill.evaluation.config import SuiteConfig
from vidistill.evaluation.lip_sync import talk_condition, verifier
from vidistill.evaluation.probes import load_probe, read
from vidistill.evaluation.prompt_adherence import batch_of
from vidistill.evaluation.quality import walk_condition
from vidistill.evaluation.verifier import look_at
from vidistill.io import read_image, to_float
from vidistill.worlds import WORLDS, shapes

WALKERS = (
    "doom-selfforcing",
    "doom-diagonal",
    "doom-relic",
    "doom-relic-full",
    "doom-relic-window",
    "doom-tf",
)
SECOND = 18  # frames of doom
SNAP_DB = 6.0  # a picture that comes back by so much is the old one, not one like it


# --- doom -------------------------------------------------------------------------------------------------------------


@functools.cache
def loaded(name):
    student = load_student(name)
    return student, load_codec(student)


@functools.cache
def walked(name, keys, frames, start=3):
    """Frames [T, 3, H, W] of a stream that holds keys ("a+b"; "": none) from a bundled start picture."""
    student, codec = loaded(name)
    image = read_image(checkpoint.start_pictures(name)[start], (64, 64))
    with StreamSession(student, codec, StreamConfig(seed=start, pipelined=False), image=image) as session:
        session.set(action=dict.fromkeys(keys.split("+"), 1.0) if keys else {})
        return to_float(session.record(frames))


def zoom(before, after):
    """By how much pictures [N, 3, H, W] grow around their middle, of 0.8 to 1.2."""
    scales, errors = torch.linspace(0.8, 1.2, 21), []
    for scale in scales:
        grid = F.affine_grid(torch.eye(2, 3).expand(len(before), 2, 3) / scale, before.shape, align_corners=False)
        grown = F.grid_sample(before, grid, align_corners=False, padding_mode="border")
        errors.append(metrics.mse(grown[..., 12:-12, 12:-12], after[..., 12:-12, 12:-12]))
    return scales[torch.stack(errors).argmin(0)]


@pytest.mark.parametrize("name", WALKERS)
def test_the_picture_turns_against_the_turn(name):
    """64 frames are a full turn, and the picture spans 84 degrees: about four of its 64 pixels a frame."""
    for action, way in (("turn_left", 1), ("turn_right", -1)):
        px = walked(name, action, SECOND)
        flow = metrics.horizontal_flow(px[:-1], px[1:])
        assert float(way * flow.median()) == pytest.approx(4, abs=0.7), action


@pytest.mark.parametrize("name", WALKERS)
def test_what_one_walks_towards_grows_and_what_one_leaves_shrinks(name):
    forward, backward = walked(name, "forward", 45)[:SECOND], walked(name, "backward", SECOND)
    assert zoom(forward[3:-2], forward[5:]).mean() > 1.03
    assert zoom(backward[3:-2], backward[5:]).mean() < 0.985
    for px in (forward, backward):
        assert abs(float(metrics.horizontal_flow(px[:-1], px[1:]).median())) < 0.3


@pytest.mark.parametrize("name", WALKERS)
def test_who_stands_still_sees_the_start_picture(name):
    px = walked(name, "", SECOND + 4)
    assert metrics.psnr(px, px[:1]).min() > 20
    assert metrics.motion(px).mean() < 0.02


@pytest.mark.parametrize("name", WALKERS)
def test_who_walks_on_does_not_come_back_to_the_start_picture(name):
    """The start picture leaves the memory's window after some 25 frames, and is remembered beside it by some."""
    px = walked(name, "forward", 45)
    like_the_start = metrics.psnr(px, px[:1])
    assert like_the_start[12:21].max() < 16, "the walk has left the picture"
    assert (like_the_start - like_the_start.cummin(0).values)[20:].max() < SNAP_DB


@pytest.mark.parametrize("name", ["doom-selfforcing", "doom-diagonal"])
def test_what_learned_from_its_own_rollouts_stays_sharp(name):
    """Teacher forcing alone is at 0.2 to 0.4 by then."""
    px = walked(name, "forward", 45)
    assert 0.5 < metrics.sharpness(px[-15:]).mean() / metrics.sharpness(px[0]) < 1.6


# --- drive ------------------------------------------------------------------------------------------------------------

CARS = ("drive-diagonal", "drive-selfforcing")
STARTS = (0, 1, 3)


@pytest.mark.parametrize("name", CARS)
def test_the_world_turns_against_the_wheel_and_only_then(name):
    """The picture turns with the car: what lies ahead of it, in the upper half, moves aside."""

    def aside(keys):
        ahead = [walked(name, keys, SECOND, start)[..., :32, :] for start in STARTS]
        return float(torch.stack([metrics.horizontal_flow(px[:-1], px[1:]).median() for px in ahead]).mean())

    assert aside("gas+steer_left") > 0.8 and aside("gas+steer_right") < -2.5
    assert abs(aside("gas")) < 0.4


@pytest.mark.parametrize("name", CARS)
def test_who_brakes_stays_and_who_gives_gas_leaves(name):
    for start in STARTS:
        stays, leaves = (walked(name, keys, SECOND, start) for keys in ("brake", "gas"))
        assert metrics.psnr(stays[-1:], stays[:1]) > metrics.psnr(leaves[-1:], leaves[:1]) + 3


@pytest.mark.parametrize("name", CARS)
def test_a_drive_keeps_its_sharpness_and_its_colours(name):
    px = walked(name, "gas+steer_left", 85)
    for measure in (metrics.sharpness, metrics.saturation):
        assert 0.6 < measure(px[-17:]).mean() / measure(px[0]) < 1.6


# --- shapes -----------------------------------------------------------------------------------------------------------

LISTENERS = ("shapes-selfforcing", "shapes-diagonal")
ASKED = list(zip(shapes.COLOURS, [*shapes.GROUNDS] * 2, [*shapes.MOTIONS] * 2, strict=False))  # all words of each


def nearest(colour, palette):
    """The name of the colour [3] in [0, 1] that is nearest."""
    return min(palette, key=lambda name: np.linalg.norm(np.array(palette[name]) / 255 - np.asarray(colour)))


def seen(px):
    """(colour, ground, way) that pictures [T, 3, H, W] of one shape on a torus show."""
    ground = px.flatten(2).median(-1).values.median(0).values
    away = (px - ground[:, None, None]).abs().sum(1)
    strong = away >= away.flatten(1).quantile(0.95, dim=1)[:, None, None]
    colour = px.movedim(1, -1)[strong].median(0).values
    turn = torch.exp(2j * math.pi * torch.arange(px.shape[-1]) / px.shape[-1])
    steps = []
    for side in (1, 2):  # columns, rows: the phase of the first harmonic says where the shape is
        at = (away.sum(side) * turn).sum(-1)
        steps.append(float((at[1:] * at[:-1].conj()).angle().mean()) * px.shape[-1] / (2 * math.pi))
    way = min(shapes.MOTIONS, key=lambda name: math.dist(steps, [0.5 * v for v in shapes.MOTIONS[name]]))
    return nearest(colour, shapes.COLOURS), nearest(ground, shapes.GROUNDS), way


def test_a_reader_of_shapes_reads_what_was_drawn():
    for colour, ground, way in ASKED:
        for shape in shapes.ATTRIBUTES["shape"]:
            labels = {"colour": colour, "ground": ground, "motion": way, "shape": shape}
            frames = shapes.draw(shapes.ShapesConfig(num_frames=25), labels, 5)
            assert seen(to_float(frames)) == (colour, ground, way)


def prompted(name, colour, shape, way, ground):
    """What a student shows [T, 3, H, W] of a caption, once it has begun."""
    caption = shapes.caption({"colour": colour, "shape": shape, "motion": way, "ground": ground})
    with StreamSession(*loaded(name), StreamConfig(seed=0, pipelined=False)) as session:
        session.set(prompt=caption)
        return to_float(session.record(33))[8:]


@pytest.mark.parametrize("name", LISTENERS)
def test_shapes_have_the_colour_the_ground_and_the_way_that_were_asked_for(name):
    shown = [seen(prompted(name, colour, "circle", way, ground)) for colour, ground, way in ASKED]
    assert [found[:2] for found in shown] == [asked[:2] for asked in ASKED]
    assert sum(found[2] == asked[2] for found, asked in zip(shown, ASKED, strict=True)) >= len(ASKED) - 1


@pytest.mark.parametrize("name", LISTENERS)
def test_circles_triangles_and_rings_are_told_apart(name):
    """Squares and crosses are not, which README says."""
    probe, shown = load_probe(bundled=WORLDS["shapes"].probe), []
    for shape in ("circle", "triangle", "ring"):
        for colour, ground, way in ASKED:
            found = read(probe, prompted(name, colour, shape, way, ground)[None], 2).labels["shape"]
            shown.append(float((found == shapes.ATTRIBUTES["shape"].index(shape)).float().mean()) > 0.5)
    assert sum(shown) >= 15, "of 18"


# --- talkers ----------------------------------------------------------------------------------------------------------

TALKERS = ("talker-selfforcing", "talker-improved", "talker-init")


@pytest.mark.parametrize("name", TALKERS)
def test_lips_open_with_the_sound_and_close_in_silence(name):
    pytest.importorskip("espeakng_loader")
    from vidistill.worlds.talker.face import read_mouth
    from vidistill.worlds.talker.speech import RATE, TRACK, say

    student, codec = loaded(name)
    said = say("Good morning, my father opened a large orange box.")
    quiet, frames = 24, 48  # of silence before, and in all
    sound = np.concatenate((np.zeros(round(quiet * RATE / 16), np.float32), said.pcm))
    image = read_image(checkpoint.start_pictures("talker")[0], (64, 64))
    with StreamSession(student, codec, StreamConfig(seed=0, pipelined=False), image=image) as session:
        session.set(prompt="a calm person talks", audio=sound)
        shown = to_float(session.record(frames))
    opening = torch.from_numpy(read_mouth(shown.movedim(1, -1).numpy())[:, 0])
    true = torch.from_numpy(said.mouth[:, 0])
    true = F.interpolate(true[None, None], size=round(len(true) / TRACK * 16), mode="linear")[0, 0][: frames - quiet]
    assert opening[4:quiet].mean() < 0.15 and opening[quiet:].quantile(0.9) > 0.35
    corr, offset = metrics.sync(opening[None, quiet : quiet + len(true)], true[None])
    assert corr > 0.6 and abs(offset) <= 1


@pytest.mark.parametrize("name", TALKERS)
def test_who_talks_stays_who_it_was(name):
    student, codec = loaded(name)
    pictures = [read_image(path, (64, 64)) for path in checkpoint.start_pictures("talker")[:3]]
    shown = []
    for image in pictures:
        with StreamSession(student, codec, StreamConfig(seed=0, pipelined=False), image=image) as session:
            session.set(prompt="a calm person talks", audio=np.zeros(1600, np.float32))
            shown.append(to_float(session.record(41))[-8:])
    probe, starts = verifier(), torch.stack([to_float(image) for image in pictures])
    alike = torch.stack(
        [look_at(probe, torch.stack(shown), start.expand(3, -1, -1, -1))[0].mean(1) for start in starts]
    )
    others = alike.masked_fill(torch.eye(3, dtype=torch.bool), 0).amax(0)
    assert (alike.diagonal() > 0.6).all() and (others < 0.4).all()


# --- codecs and teachers ----------------------------------------------------------------------------------------------


@functools.cache
def clips(source, frames=25):
    """Two validation clips [2, T, 3, H, W] of a world, and what was recorded."""
    world = WORLDS[source]
    found = list(world.record(world.config(num_frames=frames), world.seeds("validation", 2)))
    return torch.stack([to_float(clip.frames) for clip in found]), found


NEEDS = {"doom": "vizdoom", "talker": "espeakng_loader", "shapes": "torch"}


@pytest.mark.parametrize("source", NEEDS)
def test_codecs_give_back_what_they_were_shown(source):
    pytest.importorskip(NEEDS[source])
    codec, (px, _) = checkpoint.load(f"{source}-codec").net, clips(source)
    with torch.no_grad():
        made = codec.decode(codec.encode(px))
    assert metrics.psnr(made, px).mean() > 27
    for measure in (metrics.sharpness, metrics.saturation, metrics.motion):
        assert metrics.ratio(float(measure(made).mean()), float(measure(px).mean())) == pytest.approx(1, abs=0.15)


def sampled(name, batch):
    """What a teacher makes of real clips' start picture and condition, in a few guided steps."""
    teacher = checkpoint.load(name, "teacher")
    cfg = SuiteConfig(steps=16, cache="", long_seconds=0.0, precision="fp32")
    with torch.no_grad():
        return teacher_row(teacher, load_codec(teacher), cfg)(batch)


@pytest.mark.parametrize("name", ["doom-teacher", "doom-relic-teacher"])
def test_a_teacher_turns_and_walks_as_it_is_told(name):
    pytest.importorskip("vizdoom")
    from vidistill.worlds.doom.recorder import ACTIONS, DoomConfig, replay

    walks = []
    for action in ("turn_left", "turn_right", "forward", ""):
        held = np.zeros((25, len(ACTIONS)), np.float32)
        held[:, [ACTIONS.index(action)] if action else []] = 1
        walks.append(replay(DoomConfig(num_frames=25), 1_000_018, held))
    told = [torch.from_numpy(np.stack([getattr(walk, part) for walk in walks])) for part in ("actions", "poses")]
    real = torch.stack([to_float(walk.frames) for walk in walks])
    px = sampled(name, Batch(real, functools.partial(walk_condition, *told), 0))
    left, right, ahead, still = (float(metrics.horizontal_flow(x[:-1], x[1:]).median()) for x in px)
    assert left == pytest.approx(4, abs=0.7) and right == pytest.approx(-4, abs=0.7)
    assert max(abs(ahead), abs(still)) < 0.3
    assert zoom(px[2, 3:-2], px[2, 5:]).mean() > 1.01
    assert metrics.flicker(px[3]).mean() < 0.012, "what stands still does not shimmer"


def test_a_teacher_of_cars_turns_the_world_against_the_wheel():
    starts = [to_float(read_image(checkpoint.start_pictures("drive")[k], (64, 64))) for k in STARTS]
    real = torch.stack(starts)[:, None].expand(-1, 25, -1, -1, -1)

    def aside(*keys):
        held = torch.tensor([float(name in keys) for name in ("steer_left", "steer_right", "gas", "brake")])
        actions = held.expand(len(starts), 25, -1)
        px = sampled("drive-teacher", Batch(real, functools.partial(walk_condition, actions, actions[..., :3]), 0))
        ahead = px[:, :SECOND, :, :32]
        return float(metrics.horizontal_flow(ahead[:, :-1], ahead[:, 1:]).median(1).values.mean())

    assert aside("gas", "steer_left") > 0.8 and aside("gas", "steer_right") < -0.8
    assert abs(aside("gas")) < 0.4


def test_a_teacher_of_shapes_shows_what_was_asked_for():
    scenes = [
        Captioned(np.zeros((33, 32, 32, 3), np.uint8), shapes.caption(words), words, 0)
        for words in ({"colour": c, "shape": "circle", "motion": w, "ground": g} for c, g, w in ASKED)
    ]
    px = sampled("shapes-teacher", batch_of(WORLDS["shapes"], scenes, 0))
    right = [sum(a == b for a, b in zip(seen(x), asked, strict=True)) for x, asked in zip(px, ASKED, strict=True)]
    assert sum(right) >= 16, "of 18"


def test_a_teacher_of_talkers_moves_the_lips_with_the_sound():
    pytest.importorskip("espeakng_loader")
    from vidistill.worlds.talker.face import read_mouth

    px, said = clips("talker", 49)
    made = sampled("talker-teacher", Batch(px, functools.partial(talk_condition, said), 0))
    opening = torch.from_numpy(read_mouth(made.movedim(2, -1).numpy())[..., 0])
    corr, offset = metrics.sync(opening, torch.from_numpy(np.stack([clip.mouth[:, 0] for clip in said])))
    assert corr > 0.7 and abs(offset) <= 1
