"""Teachers against diffusers' own modules with tiny random weights."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_nets import tiny_ltx
from tiny_wan import autoencoder, transformer, write_wan

from vidistill import checkpoint
from vidistill.codecs.wan import WanCodec
from vidistill.conditioning.condition import Condition
from vidistill.data.ode_pairs import trajectories
from vidistill.diffusion import LatentShape, NoiseSchedule
from vidistill.interop.keys import infer_config, to_original, to_ours
from vidistill.sampling import sample
from vidistill.teachers.load import read_teacher
from vidistill.teachers.text_encoder import TextCache, clean
from vidistill.teachers.wan import Experts

diffusers = pytest.importorskip("diffusers")

TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 20,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 64,
}
IMAGE = {**TINY, "in_channels": 36, "image_dim": 12, "added_kv_proj_dim": 24}
FLOAT = {"dtype": "float32", "height": 32, "width": 64, "frames": 3}


def module(seed=0, **config):
    torch.manual_seed(seed)
    net = diffusers.WanTransformer3DModel(**config).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return net.requires_grad_(False)


def clip(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory):
    pytest.importorskip("transformers")
    return write_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def text_to_video(tmp_path):
    net = module(**TINY)
    net.save_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "WanTransformer3DModel"]}))
    return net, tmp_path


@pytest.mark.parametrize(("frames", "height", "width"), [(3, 4, 8), (1, 6, 6), (5, 8, 4)])
def test_a_text_to_video_network_equals_diffusers(text_to_video, frames, height, width):
    net, folder = text_to_video
    teacher = read_teacher(folder, **FLOAT)
    x, text = clip(2, frames, 16, height, width), clip(2, 7, 20, seed=2)
    t = torch.tensor([900.0, 300.0])
    want = net(x.transpose(1, 2), t, text, return_dict=False)[0].transpose(1, 2)
    got = teacher.net.velocity(x, (t.double() / 1000)[:, None].expand(2, frames), Condition(tokens=text))
    assert (got - want).abs().max() < 5e-5 * want.abs().max().clamp_min(1)
    assert teacher.codec == "wan" and teacher.shape == LatentShape(3, 16, 4, 8)


def test_a_time_per_frame_equals_diffusers_time_per_token(text_to_video):
    net, folder = text_to_video
    x, text = clip(1, 3, 16, 4, 8), clip(1, 7, 20, seed=2)
    t = torch.tensor([[0.0, 500.0, 500.0]])
    want = net(x.transpose(1, 2), t.repeat_interleave(8, 1), text, return_dict=False)[0].transpose(1, 2)
    got = read_teacher(folder, **FLOAT).net.velocity(x, t.double() / 1000, Condition(tokens=text))
    assert (got - want).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("frames", "height", "width", "dtype", "tolerance"),
    [(3, 4, 8, "float32", 1e-4), (1, 6, 6, "float32", 1e-4), (5, 8, 4, "float32", 1e-4), (3, 4, 8, "bfloat16", 0.05)],
)
def test_an_image_to_video_network_equals_diffusers(tmp_path, frames, height, width, dtype, tolerance):
    net = module(**IMAGE)
    net.save_pretrained(tmp_path / "transformer")
    teacher, kind = read_teacher(tmp_path, **{**FLOAT, "dtype": dtype}), getattr(torch, dtype)
    x, first = clip(1, frames, 16, height, width), clip(1, frames, 16, height, width, seed=3)
    text, image = clip(1, 512, 20, seed=2), clip(1, 257, 12, seed=4)
    mask = torch.zeros(1, frames, 4, height, width)
    mask[:, 0] = 1  # of the four pixel frames of a latent: the image is given
    channels = torch.cat((mask, first), dim=2)
    tokens = torch.cat((torch.nn.functional.pad(image, (0, 8)), text), dim=1)
    both = torch.cat((x, channels), dim=2).transpose(1, 2)
    want = net(both, torch.tensor([700.0]), text, image, return_dict=False)[0].transpose(1, 2)
    cond = Condition(tokens=tokens.to(kind), channels=channels.to(kind))
    got = teacher.net.velocity(x.to(kind), torch.full((1, frames), 0.7), cond)
    assert got.dtype == kind and (got.float() - want).abs().max() < tolerance * want.abs().max().clamp_min(1)


def test_the_small_wan_2_2_has_its_own_latents(tmp_path):
    module(**{**TINY, "in_channels": 48, "out_channels": 48}).save_pretrained(tmp_path / "transformer")
    teacher = read_teacher(tmp_path, dtype="float32", height=64, width=96, frames=3)
    assert teacher.shape == LatentShape(3, 48, 4, 6) and teacher.codec == "wan2_2"
    module(**{**TINY, "in_channels": 20, "out_channels": 20}).save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match="20 latent channels"):
        read_teacher(tmp_path, dtype="float32")


def test_half_precision_loads_and_stays_close(text_to_video):
    net, folder = text_to_video
    x, text = clip(1, 3, 16, 4, 8), clip(1, 7, 20, seed=2)
    want = net(x.transpose(1, 2), torch.tensor([500.0]), text, return_dict=False)[0].transpose(1, 2)
    teacher = read_teacher(folder, **{**FLOAT, "dtype": "bfloat16"})
    got = teacher.net.velocity(x.bfloat16(), torch.full((1, 3), 0.5), Condition(tokens=text.bfloat16()))
    assert got.dtype == torch.bfloat16 and (got.float() - want).abs().max() < 0.05 * want.abs().max()


def test_the_original_layout_gives_the_same_network(text_to_video, tmp_path):
    net, folder = text_to_video
    state = net.state_dict()
    original = to_original(to_ours(state), infer_config(state, heads=2))
    (tmp_path / "wan").mkdir()
    save_file({k: v.contiguous() for k, v in original.items()}, tmp_path / "wan" / "model.safetensors")
    (tmp_path / "wan" / "config.json").write_text(json.dumps({"num_heads": 2, "eps": 1e-6}))
    a, b = read_teacher(folder, **FLOAT).net, read_teacher(tmp_path / "wan", **FLOAT).net
    assert a.cfg == b.cfg and all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_two_experts_share_the_levels(tmp_path):
    for seed, name in enumerate(("transformer", "transformer_2")):
        module(seed, **TINY).save_pretrained(tmp_path / name)
    (tmp_path / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.8}))
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"flow_shift": 12.0}))
    teacher = read_teacher(tmp_path, **FLOAT)
    net = teacher.net
    assert isinstance(net, Experts) and net.boundary == 0.8 and teacher.noise.shift == 12.0
    x, cond = clip(2, 3, 16, 4, 8), Condition(tokens=clip(2, 7, 20, seed=2))
    sigma = torch.tensor([[0.9], [0.3]]).expand(2, 3)
    got = net.velocity(x, sigma, cond)
    assert torch.allclose(got[:1], net.high.velocity(x[:1], sigma[:1], Condition(tokens=cond.tokens[:1])), atol=1e-5)
    assert torch.allclose(got[1:], net.low.velocity(x[1:], sigma[1:], Condition(tokens=cond.tokens[1:])), atol=1e-5)
    assert torch.equal(
        net.velocity(x[:1], sigma[:1], cond.map(lambda t: t[:1])),
        net.high.velocity(x[:1], sigma[:1], cond.map(lambda t: t[:1])),
    )


def file_of(x):
    """The file that a tensor's memory is mapped from; "" if it is none's."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= x.data_ptr() < last:
            return name if name.startswith("/") else ""
    return ""


def test_a_hub_id_is_read_from_the_local_cache_without_the_network(tmp_path, monkeypatch):
    """Two experts, their boundary and the scheduler's shift, as from a folder; weights stay in their files."""
    from huggingface_hub import constants

    commit = "0" * 40
    cached = tmp_path / "models--tiny--wan"
    snapshot = cached / "snapshots" / commit
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    for seed, name in enumerate(("transformer", "transformer_2")):
        module(seed, **TINY).save_pretrained(snapshot / name, max_shard_size="20KB")
    assert len(list((snapshot / "transformer").glob("*.safetensors"))) > 1, "sharded"
    (snapshot / "scheduler").mkdir()
    (snapshot / "scheduler" / "scheduler_config.json").write_text(json.dumps({"flow_shift": 3.0}))
    index = {name: ["diffusers", "WanTransformer3DModel"] for name in ("transformer", "transformer_2")}
    index |= {"scheduler": ["diffusers", "UniPCMultistepScheduler"], "boundary_ratio": 0.8}
    (snapshot / "model_index.json").write_text(json.dumps(index))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub, folder = (read_teacher(source, **FLOAT, offline=True) for source in ("tiny/wan", snapshot))
    assert isinstance(hub.net, Experts) and hub.net.boundary == 0.8 and hub.noise.shift == folder.noise.shift == 3.0
    weights = hub.net.state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in folder.net.state_dict().items())
    stored = read_teacher("tiny/wan", dtype="", offline=True)
    assert all(file_of(p).endswith(".safetensors") for p in stored.net.parameters())
    with pytest.raises(FileNotFoundError, match="offline"):
        read_teacher("tiny/other", **FLOAT, offline=True)
    for name in ("transformer_2", "transformer"):  # half a download is no teacher of one network
        (snapshot / name).rename(snapshot / f"no-{name}")
        with pytest.raises(FileNotFoundError, match=rf"tiny/wan.*{name}"):
            read_teacher("tiny/wan", **FLOAT, offline=True)
        with pytest.raises(FileNotFoundError, match=rf"{commit}.*{name}"):
            read_teacher(snapshot, **FLOAT)
    (snapshot / "model_index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tiny/wan.*model_index\.json"):
        read_teacher("tiny/wan", **FLOAT, offline=True)
    with pytest.raises(FileNotFoundError, match="models/wan/14b"):
        read_teacher("models/wan/14b", **FLOAT, offline=True)


@pytest.mark.parametrize("shape", [(3, 4, 8), (2, 8, 4)])
@torch.no_grad()
def test_the_guided_sampler_equals_the_pipelines_loop_with_the_same_scheduler(text_to_video, shape):
    """WanPipeline's loop (conditional and negative pass, u + s (c - u), Euler flow steps) without its text encoder."""
    net, folder = text_to_video
    steps, scale, shift = 50, 5.0, 3.0
    noise = clip(1, shape[0], 16, *shape[1:])
    text, negative = clip(1, 7, 20, seed=2), clip(1, 7, 20, seed=3)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    sigmas = NoiseSchedule(shift=shift).steps(steps)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    assert torch.allclose(scheduler.sigmas[:-1], torch.tensor(sigmas), atol=1e-5)
    x = noise.transpose(1, 2)
    for t in scheduler.timesteps:
        c, u = (net(x, t.expand(1), tokens, return_dict=False)[0] for tokens in (text, negative))
        x = scheduler.step(u + scale * (c - u), t, x, return_dict=False)[0]
    cond = Condition(tokens=text, negative=negative)
    ours = sample(read_teacher(folder, **FLOAT).net, noise, sigmas, cond, nulls=[cond.null()], scales=[scale])
    assert (ours - x.transpose(1, 2)).abs().max() < 2e-3 * x.abs().max()


@pytest.mark.parametrize(
    ("height", "width", "frames", "dtype"),
    [(32, 48, 9, "float32"), (48, 32, 5, "float32"), (16, 64, 1, "float32"), (32, 32, 5, "bfloat16")],
)
@torch.no_grad()
def test_fifty_guided_steps_equal_the_real_pipeline(wan_folder, height, width, frames, dtype):
    """`WanPipeline` itself, from prompts, with its own text encoder and scheduler, against `sample`."""
    import transformers

    kind, scale, length = getattr(torch, dtype), 4.0, 8
    pipe = diffusers.WanPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(wan_folder, subfolder="tokenizer"),
        text_encoder=transformers.UMT5EncoderModel.from_pretrained(wan_folder, subfolder="text_encoder"),
        vae=autoencoder(),
        transformer=transformer().to(kind),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    latent = (1, 1 + (frames - 1) // 4, 16, height // 8, width // 8)
    noise = clip(*latent)
    prompts = {"prompt": "a red fox runs", "negative_prompt": "blurred"}
    want = pipe(
        **prompts,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=50,
        guidance_scale=scale,
        latents=noise.transpose(1, 2),
        max_sequence_length=length,
        output_type="latent",
        return_dict=False,
    )[0].transpose(1, 2)
    text = [
        pipe.encode_prompt(p, do_classifier_free_guidance=False, max_sequence_length=length)[0]
        for p in prompts.values()
    ]
    cond = Condition(tokens=text[0], negative=text[1])
    net = read_teacher(wan_folder, dtype=dtype).net
    sigmas = pipe.scheduler.sigmas[:-1].tolist()
    assert len(sigmas) == 50
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        ours = sample(net, noise, sigmas, cond, nulls=[cond.null()], scales=[scale])
    apart = (ours.float() - want.float()).abs().max() / want.float().abs().max()
    assert apart < (2e-4 if dtype == "float32" else 0.05), float(apart)
    assert (want.float() - noise).abs().max() > 0.1, "the sampler moved"


@pytest.mark.parametrize("kind", ["two experts", "time per token", "image, time per token"])
@torch.no_grad()
def test_fifty_guided_steps_equal_the_pipelines_of_wan_2_2(tmp_path, kind):
    """A14B: experts that change at a level; TI2V-5B: 48 channels, a time per token, the image's tokens at time 0."""
    channels = 16 if kind == "two experts" else 48
    sizes = {**TINY, "in_channels": channels, "out_channels": channels}
    nets = [module(seed, **sizes) for seed in range(2 if kind == "two experts" else 1)]
    for net, name in zip(nets, ("transformer", "transformer_2"), strict=False):
        net.save_pretrained(tmp_path / name)
    (tmp_path / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.875}))
    noise, text = clip(1, 3, channels, 4, 6), [clip(1, 7, 20, seed=seed) for seed in (2, 3)]
    parts = {
        "tokenizer": None,
        "text_encoder": None,
        "vae": autoencoder(channels),
        "transformer": nets[0],
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        "transformer_2": nets[-1] if len(nets) == 2 else None,
        "boundary_ratio": 0.875 if len(nets) == 2 else None,
        "expand_timesteps": channels == 48,
    }
    call = {
        "prompt_embeds": text[0],
        "negative_prompt_embeds": text[1],
        "height": 4 * (8 if channels == 16 else 16),
        "width": 6 * (8 if channels == 16 else 16),
        "num_frames": 9,
        "num_inference_steps": 50,
        "guidance_scale": 4.0,
        "latents": noise.transpose(1, 2),
        "output_type": "latent",
        "return_dict": False,
    }
    given = None
    if kind.startswith("image"):
        parts["vae"].save_pretrained(tmp_path / "vae")
        image = torch.rand(1, 3, call["height"], call["width"], generator=torch.Generator().manual_seed(5))
        given = WanCodec.from_pretrained(tmp_path / "vae").encode(image[:, None])
        pipe = diffusers.WanImageToVideoPipeline(**parts)
        call |= {"image": image}
    else:
        pipe = diffusers.WanPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    want = pipe(**call)[0].transpose(1, 2)
    teacher = read_teacher(tmp_path, dtype="float32")
    cond = Condition(tokens=text[0], negative=text[1])
    sigmas = pipe.scheduler.sigmas[:-1].tolist()
    ours = sample(teacher.net, noise, sigmas, cond, nulls=[cond.null()], scales=[4.0], given=given)
    held = 0 if given is None else 1
    apart = (ours - want)[:, held:].abs().max() / want.abs().max()
    assert isinstance(teacher.net, Experts) == (len(nets) == 2) and apart < 2e-4, float(apart)


def test_a_foreign_family_fits_the_same_door(tmp_path):
    net = tiny_ltx(8, 10)
    net.save_pretrained(tmp_path / "transformer")
    teacher = read_teacher(tmp_path, dtype="float32", height=64, width=96, frames=3)  # its folder says the family
    assert teacher.shape == LatentShape(3, 8, 2, 3, patch=(1, 1, 1))
    x, text = clip(1, 3, 8, 2, 3), clip(1, 5, 10, seed=2)
    sigma = torch.full((1, 3), 0.6)
    with torch.no_grad():
        got = teacher.net.velocity(x, sigma, Condition(tokens=text))
        want = net(
            x.permute(0, 1, 3, 4, 2).reshape(1, 18, 8),
            text,
            torch.tensor([600.0]),
            torch.ones(1, 5),
            num_frames=3,
            height=2,
            width=3,
            rope_interpolation_scale=(8 / 25, 32, 32),
            return_dict=False,
        )[0]
        padded = Condition(tokens=torch.cat((text, torch.zeros(1, 4, 10)), dim=1))
        assert torch.allclose(teacher.net.velocity(x, sigma, padded), got, atol=1e-5)
    assert torch.allclose(got, want.reshape(1, 3, 2, 3, 8).permute(0, 1, 4, 2, 3), atol=1e-5)
    assert sample(teacher.net, x, (1.0, 0.5), Condition(tokens=text)).shape == x.shape


def test_prompts_are_encoded_once_and_read_from_disk_afterwards(tmp_path):
    transformers = pytest.importorskip("transformers")
    calls = []

    class Tokenizer:
        def __call__(self, prompts, max_length=0, **_):
            if not max_length:  # how long a prompt is before it is cut
                return transformers.BatchEncoding({"input_ids": [1] * len(prompts.split())})
            ids = torch.zeros(1, max_length, dtype=torch.long)
            words = prompts[0].split()
            ids[0, : len(words)] = torch.tensor([1 + len(w) for w in words])
            batch = transformers.BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long()})
            return batch

    def encoder(ids, mask):
        calls.append(ids)
        hidden = torch.ones(1, ids.shape[1], 4) * ids[..., None]
        return type("Out", (), {"last_hidden_state": hidden + 1})()

    cache = TextCache("somewhere/umt5", tmp_path, length=6)
    cache._models = (Tokenizer(), encoder)
    tokens = cache.encode(["a  red &amp; fox", "a red & fox", "cat"])
    assert len(calls) == 2 and tokens.shape == (3, 6, 4) and torch.equal(tokens[0], tokens[1])
    assert tokens[2, 1:].eq(0).all() and tokens[2, 0].gt(0).all()
    cache.path("cat").write_bytes(b"cut short")
    assert torch.equal(cache.encode(["cat"])[0], tokens[2]) and len(calls) == 3, "a damaged file is made again"
    cold = TextCache("somewhere/umt5", tmp_path, length=6, offline=True)
    assert torch.equal(cold.encode(["cat"])[0], tokens[2])
    with pytest.raises(FileNotFoundError, match="text_encoder"):
        cold.encode(["never seen"])
    assert clean(" a\n b ") == "a b"


def test_what_cannot_be_loaded_says_why(tmp_path):
    with pytest.raises(ValueError, match="known: wan, ltx"):
        read_teacher("x", "sora")
    with pytest.raises(FileNotFoundError, match=r"safetensors.*transformer"):
        read_teacher(tmp_path)
    with pytest.raises(FileNotFoundError, match="offline"):
        read_teacher("nobody/no-such-model", offline=True)
    with pytest.raises(ValueError, match=r"'float7'.*dtype"):
        read_teacher(tmp_path, dtype="float7")


class Gated(BaseHTTPRequestHandler):
    """A hub whose every repository waits for a licence to be accepted."""

    def do_GET(self):
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_a_licence_that_was_not_accepted_is_named(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub").constants
    server = ThreadingHTTPServer(("127.0.0.1", 0), Gated)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for read in (read_teacher, lambda name: TextCache(name, tmp_path / "text").encode(["a fox"])):
            with pytest.raises(FileNotFoundError, match=r"lab/gated.*licence.*accept it"):
                read("lab/gated")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("channels", "fps"), [(16, 16.0), (48, 24.0)])
def test_a_published_teacher_says_its_world(tmp_path, channels, fps):
    """A student is timed against it, and its clips are played, at the rate it was trained at."""
    module(**{**TINY, "in_channels": channels, "out_channels": channels}).save_pretrained(tmp_path / "transformer")
    assert checkpoint.load(tmp_path, "teacher").record["world"] == {"fps": fps, "temporal": 4}


def test_networks_with_other_condition_channels_are_refused_before_anything_is_made(tmp_path):
    module(**{**TINY, "in_channels": 40}).save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match=r"24 condition channels.*image-to-video"):
        trajectories(tmp_path / "out", str(tmp_path), tmp_path / "data", clips=1)
    assert not (tmp_path / "out").exists()
