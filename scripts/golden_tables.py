"""Goldens without a transformer: the scheduler's tables and solvers, and the Wan autoencoder, whole and streamed."""

import torch
from golden import Golden
from torch import Tensor
from wan_solvers import solver
from wan_tables import Table, warp_timestep

from vidistill.codecs.wan import WanCodec, WanCodecConfig
from vidistill.diffusion import euler
from vidistill.interop.tables import GRID


def scheduler(golden: Golden) -> None:
    cfg = golden.config
    for shift in cfg["shifts"]:
        name = recorded(golden, "shift", shift)
        with golden.guarded(f"{name}."):
            tables(golden, float(shift), name)
    for run in cfg["solvers"]:
        for kind in run["kinds"]:
            name = recorded(golden, f"{kind}.n{run['steps']}.shift", run["shift"])
            with golden.guarded(f"{name}."):
                solve(golden, name, kind, run["steps"], run["shift"])


def recorded(golden: Golden, prefix: str, number: float) -> str:
    """`prefix` and `number` in the spelling that outputs were recorded under: 5, 5.0 and 2.5 all occur."""
    spellings = [f"{prefix}{said}" for said in (number, f"{number:g}", float(number))]
    return next((name for name in spellings if golden.wanted(f"{name}.")), spellings[0])


def tables(golden: Golden, shift: float, name: str) -> None:
    """One shift's table, look-ups, conversions, and the step lists warped with it."""
    cfg = golden.config
    table = Table(
        shift=shift,
        entries=cfg["num_train_timesteps"],
        lowest=cfg["sigma_min"],
        highest=cfg["sigma_max"],
        drop_end=cfg["extra_one_step"],
    )
    t, x0, eps, v = (golden.given(part)[None] for part in ("t", "x0", "noise", "flow"))
    x = table.add_noise(x0, eps, t)
    golden.compare(f"{name}.sigmas", table.sigmas)
    golden.compare(f"{name}.timesteps", table.timesteps)
    golden.compare(f"{name}.training_weights", table.weights)
    golden.compare(f"{name}.training_weight_at_t", table.weight(t / GRID)[0])
    golden.compare(f"{name}.nearest_index", table.index(t)[0])
    golden.compare(f"{name}.add_noise", x[0])
    golden.compare(f"{name}.flow_to_x0", table.x0(x, v, t)[0])
    golden.compare(f"{name}.x0_to_flow", table.v(x, x0, t.clamp_min(20))[0])
    golden.compare(f"{name}.step", euler(x, x0, v, table.sigma(t), table.after(t), None)[0])
    for label, steps in cfg["warp_lists"].items():
        golden.compare(f"{name}.warp.{label}", list(table.warp_steps(steps)))
    golden.compare(f"{name}.dmd_warp_clamped", warp_timestep(golden.given("dmd_warp_input"), shift))
    for n in cfg["short_steps"]:
        short = Table(shift=shift, entries=n)
        golden.compare(f"{name}.set_timesteps{n}", short.timesteps)
        default = Table(shift=shift, entries=n, lowest=0.003 / 1.002, strength=0.8, drop_end=False)
        golden.compare(f"{name}.default_sigma_min_strength0.8_n{n}", default.sigmas)


def solve(golden: Golden, name: str, kind: str, steps: int, shift: float) -> None:
    """A solver's whole trajectory on an analytic field; multistep solvers are diffusers', at the edge."""
    anchor, x = golden.given("x0")[0], golden.given("noise")[0]
    run = solver(kind, steps, shift)
    golden.compare(f"{name}.sigmas", run.sigmas)
    golden.compare(f"{name}.timesteps", run.timesteps)
    states: list[Tensor] = []
    for t in run.timesteps:
        x = run.step(torch.tanh(x) * (0.3 + t / 1000) - 0.2 * anchor, x)
        states.append(x)
    golden.compare(f"{name}.trajectory", torch.stack(states))


@torch.no_grad()
def wan_vae(golden: Golden) -> None:
    """The autoencoder: whole decode, streamed decode, encode. Our pixels live in [0, 1], the original's in [-1, 1]."""
    cfg = golden.config
    vae = cfg["vae"]
    codec = WanCodec.from_original(
        golden.weights,
        WanCodecConfig(
            latent_channels=vae["z_dim"],
            encoder_width=vae["dim"],
            decoder_width=vae["dim"],
            width_multiples=tuple(vae["dim_mult"]),
            temporal=tuple(vae["temperal_downsample"]),
            num_res_blocks=vae["num_res_blocks"],
            latent_mean=tuple(cfg["latents_mean"]),
            latent_std=tuple(cfg["latents_std"]),
        ),
    )
    latents = golden.given("latents")
    golden.compare("decode.pixel", codec.decode(latents) * 2 - 1)
    mean, std = codec.latent_mean[:, None, None], codec.latent_std[:, None, None]
    golden.compare("decode.raw", raw_decode(codec, latents * std + mean))
    for chunks in cfg["stream_chunks"]:
        with golden.guarded(f"stream.{'_'.join(map(str, chunks))}."):
            stream(golden, codec, latents, chunks)
    for frames in cfg["encode_num_frames"]:
        with golden.guarded(f"encode{frames}."):
            px = golden.given("pixels").transpose(1, 2)[:, : 1 + (frames - 1) // 4 * 4]  # the rest is dropped there
            z = codec.encode((px + 1) / 2)
            golden.compare(f"encode{frames}.latents", z)
            golden.compare(f"encode{frames}.mu", z * std + mean)


def raw_decode(codec: WanCodec, z: Tensor) -> Tensor:
    """Pixels before the clamp."""
    seen: list[Tensor] = []
    hook = codec.vae.decoder.register_forward_hook(lambda _m, _a, out: seen.append(out))
    mean, std = codec.latent_mean[:, None, None], codec.latent_std[:, None, None]
    codec.decode((z - mean) / std)
    hook.remove()
    return torch.cat(seen, dim=2).transpose(1, 2)


def stream(golden: Golden, codec: WanCodec, latents: Tensor, chunks: list[int]) -> None:
    """Chunk after chunk with the state carried over; one that equals the whole decode is recorded by its lengths."""
    name, state, parts, start = "stream." + "_".join(map(str, chunks)), None, [], 0
    for frames in chunks:
        px, state = codec.decode_stream(latents[:, start : start + frames], state)
        parts.append(px)
        start += frames
    golden.compare(f"{name}.frames", [p.shape[1] for p in parts])
    pixel = torch.cat(parts, dim=1) * 2 - 1
    whole = golden.want("decode.pixel")
    if golden.want(f"{name}.pixel") is not None or pixel.shape != whole.shape:
        golden.compare(f"{name}.pixel", pixel)
        return
    worst = float((pixel - whole).abs().max())
    golden.results[f"{name}.pixel"] = ("ok" if worst <= golden.tolerance else "differs", worst, "against decode.pixel")
