"""Wan's image-to-video networks: what they are shown of a picture, against diffusers' own pipeline."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_wan import IMAGE, TEXT, autoencoder, transformer, write_image_encoder, write_text

from vidistill import checkpoint
from vidistill.codecs.wan import WanCodec
from vidistill.conditioning.condition import Condition, before_text, check_pictured, shown_channels, shown_clip
from vidistill.config import build
from vidistill.data.clips import Clips
from vidistill.data.ode_pairs import trajectories
from vidistill.data.pictures import pictures
from vidistill.data.prompts import Pictures, open_data
from vidistill.data.shards import DataError
from vidistill.io import to_float
from vidistill.sampling import sample
from vidistill.streaming.session import StreamConfig, StreamSession
from vidistill.teachers.image_encoder import ImageEncoder
from vidistill.teachers.wan import Experts
from vidistill.training.config import TrainConfig
from vidistill.training.trainer import Trainer, train

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

FRAMES, HEIGHT, WIDTH = 3, 32, 48  # latents; pixels
LONG = 512  # text tokens, which diffusers' network counts on


@pytest.fixture
def picture():
    return np.random.default_rng(5).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def write_network(folder, kind):
    """One network that is shown CLIP's tokens, or two experts without them; returns diffusers' networks."""
    changes = IMAGE if kind == "clip" else {"in_channels": IMAGE["in_channels"]}
    nets = [transformer(seed, **changes) for seed in range(1 if kind == "clip" else 2)]
    for net, name in zip(nets, ("transformer", "transformer_2"), strict=False):
        net.save_pretrained(folder / name)
    autoencoder().save_pretrained(folder / "vae")
    index = {"transformer": ["diffusers", "WanTransformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return nets


@pytest.mark.parametrize("kind", ["clip", "two experts"])
@torch.no_grad()
def test_guided_steps_from_a_picture_equal_the_pipeline(tmp_path, picture, kind):
    """`WanImageToVideoPipeline` with its own autoencoder and CLIP, against `sample` told the same picture."""
    nets = write_network(tmp_path, kind)
    clip = kind == "clip"
    if clip:
        write_image_encoder(tmp_path)
    rng = torch.Generator().manual_seed(1)
    noise = torch.randn(1, FRAMES, 16, HEIGHT // 8, WIDTH // 8, generator=rng)
    text = [torch.randn(1, LONG, TEXT, generator=rng) for _ in range(2)]
    pipe = diffusers.WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=nets[0],
        transformer_2=None if clip else nets[1],
        boundary_ratio=None if clip else 0.9,
        **(
            {
                "image_encoder": transformers.CLIPVisionModel.from_pretrained(tmp_path / "image_encoder"),
                "image_processor": transformers.CLIPImageProcessor.from_pretrained(tmp_path / "image_processor"),
            }
            if clip
            else {}
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    want = pipe(
        image=Image.fromarray(picture),
        prompt_embeds=text[0],
        negative_prompt_embeds=text[1],
        height=HEIGHT,
        width=WIDTH,
        num_frames=1 + 4 * (FRAMES - 1),
        num_inference_steps=20,
        guidance_scale=3.5,
        latents=noise.transpose(1, 2),
        output_type="latent",
        return_dict=False,
    )[0].transpose(1, 2)

    teacher = checkpoint.load(tmp_path, "teacher")
    assert isinstance(teacher.net, Experts) == (not clip)
    assert clip or teacher.net.boundary == 0.9, "what Wan2.2 says of its image-to-video networks"
    codec = WanCodec.from_pretrained(tmp_path / "vae")
    latents = codec.encode(shown_clip(to_float(picture[None])[None], codec.px_frames(FRAMES)))
    tokens = list(text)
    if clip:
        image = ImageEncoder(tmp_path, offline=True).encode([picture])
        assert image.shape == (1, 257, IMAGE["image_dim"])
        tokens = [before_text(image, x) for x in text]
    cond = Condition(tokens[0], channels=shown_channels(latents, 0, FRAMES), negative=tokens[1])
    sigmas = pipe.scheduler.sigmas[:-1].tolist()
    ours = sample(teacher.net, noise, sigmas, cond, nulls=[cond.null()], scales=[3.5])
    assert (ours - want).abs().max() < 2e-4 * want.abs().max()
    other = Condition(tokens[0], channels=shown_channels(latents.flip(-1), 0, FRAMES), negative=tokens[1])
    changed = sample(teacher.net, noise, sigmas, other, nulls=[cond.null()], scales=[3.5])
    assert (ours - changed).abs().max() > 0.05 * want.abs().max(), "the picture matters"


@torch.no_grad()
def test_what_a_clip_is_shown_does_not_depend_on_its_length(tmp_path, picture):
    autoencoder().save_pretrained(tmp_path)
    codec, px = WanCodec.from_pretrained(tmp_path), to_float(picture[None])[None]
    short, long = (codec.encode(shown_clip(px, codec.px_frames(n))) for n in (3, 12))
    assert torch.allclose(long[:, :3], short, atol=1e-5)
    whole = shown_channels(long, 0, 12)
    assert torch.equal(shown_channels(long, 4, 9), whole[:, 4:9]), "chunk by chunk"
    assert torch.equal(shown_channels(long, 9, 30)[:, -1], whole[:, -1]), "the last one goes on"
    assert whole[:, 0, :4].eq(1).all() and whole[:, 1:, :4].eq(0).all()


@pytest.mark.parametrize(("extra", "image"), [(18, 0), (17, 12), (0, 12), (36, 0)])
def test_condition_channels_of_no_known_kind_are_refused(extra, image):
    with pytest.raises(ValueError, match=rf"somebody.*{extra} condition channels"):
        check_pictured("somebody", 16, extra, image)
    for known in ((0, 0), (17, 0), (20, 0), (20, 12)):
        check_pictured("somebody", 16, *known)


@pytest.fixture(scope="module", params=["clip", "two experts"])
def world(request, tmp_path_factory):
    """A published network and data made of two pictures, whose trajectories it draws."""
    folder = tmp_path_factory.mktemp("i2v")
    write_network(folder / "wan", request.param)
    write_text(folder / "wan")
    lines = []
    for k, prompt in enumerate(("a red fox runs", "two boats")):
        px = np.random.default_rng(k).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(px).save(folder / f"{k}.png")
        lines.append(f"{k}.png\t{prompt}\n")
    (folder / "list.txt").write_text("".join(lines))
    clip = {"image_encoder": str(folder / "wan")} if request.param == "clip" else {}
    if clip:
        write_image_encoder(folder / "wan")
    options = {"negative": "blurred", "tokens": 8, "frames": FRAMES, "size": (HEIGHT, WIDTH)}
    pictures(folder / "data", folder / "list.txt", str(folder / "wan"), **clip, **options)
    sampler = {"clips": 2, "frames": FRAMES, "steps": 4, "guidance": 3.5, "size": (HEIGHT, WIDTH), "at_once": 1}
    trajectories(folder / "paths", str(folder / "wan"), folder / "data", **sampler)
    return folder, request.param


def stage(folder, kind, **more):
    """The settings of a stage on the data of `world`, as a config."""
    network = str(folder / "wan" / ("" if kind == "clip" else "transformer_2"))
    data = Clips(folder / "paths")
    base = {"name": "stage", "objective": "regression", "data": str(folder / "paths"), "init": network, "batch": 2}
    base |= {"codec": str(folder / "wan"), "latent_size": (HEIGHT // 8, WIDTH // 8), "frames": FRAMES, "steps": 2}
    base |= {"out": str(folder / "runs"), "export_dtype": "fp32", "optim": {"lr": 1e-3}}
    base |= {"student": {"chunk": 1, "memory": {"policy": "full", "frames": FRAMES, "phase": "absolute"}}}
    levels = data.meta["levels"]
    base |= {"schedule": {"levels": levels}, "loss": {"levels": levels, "history": "noisy", "guidance": 3.5}}
    return build(TrainConfig, {**base, **more})


def test_a_teacher_samples_what_its_data_show(world):
    """Trajectories hold what the teacher was told, and end where `sample` ends that is told the same."""
    folder, kind = world
    clips, source = Clips(folder / "paths"), open_data(folder / "data")
    assert isinstance(source, Pictures) and source.channels == clips.channels == 20
    batch = clips.latents(2, FRAMES, 0, 0)
    assert batch.given == 0 and batch.cond.tokens.shape == (2, 8 + (257 if kind == "clip" else 0), TEXT)
    again = source.batch(2, FRAMES, (16, HEIGHT // 8, WIDTH // 8), 0, 0)
    assert again.cond.channels.shape == batch.cond.channels.shape == (2, FRAMES, 20, HEIGHT // 8, WIDTH // 8)
    if kind == "clip":
        assert torch.equal(again.cond.tokens[:, :257], again.cond.negative[:, :257]), "the picture is no prompt"
        assert not torch.equal(again.cond.tokens, again.cond.negative)
    with pytest.raises(DataError, match=r"--frames"):
        source.batch(1, FRAMES + 1, (16, HEIGHT // 8, WIDTH // 8), 0, 0)


def test_a_student_learns_and_streams_from_a_picture(world, picture):
    """Regression, then Self Forcing with the published network as teacher; its stream equals the rollout."""
    folder, kind = world
    first = train(stage(folder, kind, name="ode"))
    more = {"objective": "dmd", "data": str(folder / "data"), "init": str(first.with_suffix(""))}
    more |= {"teacher": str(folder / "wan"), "critic_steps": 1, "name": "sf", "ema": 0.5, "steps": 3}
    cfg = stage(folder, kind, **more, critic_init=str(folder / "wan" / ("" if kind == "clip" else "transformer")))
    bundle = checkpoint.load_student(train(cfg))
    assert bundle.net.net.cfg.extra_channels == 20 and bundle.given_frames == 0 and bundle.picture_frames == 1
    codec = checkpoint.load_codec(bundle)
    with pytest.raises(ValueError, match="image"):
        StreamSession(bundle, codec, StreamConfig(pipelined=False))
    made = []
    for shown in (picture, picture[::-1].copy()):
        with StreamSession(bundle, codec, StreamConfig(pipelined=False), image=shown) as session:
            session.set(prompt="a red fox runs")
            latents = torch.cat([x for _, x in zip(range(FRAMES + 2), session.latents(), strict=False)], dim=1)
            assert torch.allclose(latents[:, :FRAMES], session.reference(FRAMES), atol=1e-5)
            made.append(latents)
    assert (made[0] - made[1]).abs().max() > 1e-3, "the picture matters"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": True}, "prompts alone|condition channels"),
        ({"long_frames": 6}, "long_frames"),
        ({"objective": "dmd", "on_policy": False}, "negative prompt"),
    ],
)
def test_what_an_image_to_video_student_cannot_do_is_refused(world, change, message):
    folder, kind = world
    more = {"objective": "dmd", "teacher": str(folder / "wan"), "critic_init": stage(folder, kind).init} | change
    if "long_frames" in change:
        more |= {"student": {"chunk": 1, "memory": {"policy": "window", "frames": 2}}, "data": str(folder / "data")}
    with pytest.raises(ValueError, match=message):
        Trainer(stage(folder, kind, **more))


def test_data_of_other_pictures_is_refused(world, tmp_path):
    folder, kind = world
    with pytest.raises(DataError, match="line 2"):
        (tmp_path / "bad.txt").write_text(f"{folder}/0.png\ta\nnothing\n")
        pictures(tmp_path / "out", tmp_path / "bad.txt", str(folder / "wan"))
    with pytest.raises(DataError, match=r"line 1: .*none\.png"):
        (tmp_path / "bad.txt").write_text("none.png\ta\n")
        pictures(tmp_path / "out", tmp_path / "bad.txt", str(folder / "wan"))
    if kind == "clip":
        (tmp_path / "list.txt").write_text(f"{folder}/0.png\ta red fox\n")
        with pytest.raises(FileNotFoundError, match="image_encoder"):
            pictures(tmp_path / "out", tmp_path / "list.txt", str(folder / "wan"), image_encoder=str(tmp_path))
        options = {"tokens": 8, "frames": FRAMES, "size": (HEIGHT, WIDTH)}
        pictures(tmp_path / "plain", tmp_path / "list.txt", str(folder / "wan"), **options)
        with pytest.raises(DataError, match=r"image tokens.*--image-encoder"):
            trajectories(tmp_path / "paths", str(folder / "wan"), tmp_path / "plain", clips=1, frames=FRAMES, steps=4)
