"""Wan's image-to-video networks: what they are shown of a picture, against diffusers' own pipeline."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_wan import IMAGE, TEXT, autoencoder, transformer, write_image_encoder

from vidistill import checkpoint
from vidistill.codecs.wan import WanCodec
from vidistill.conditioning.condition import Condition, before_text, shown_channels, shown_clip
from vidistill.io import to_float
from vidistill.sampling import sample
from vidistill.teachers.image_encoder import ImageEncoder
from vidistill.teachers.wan import Experts

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
