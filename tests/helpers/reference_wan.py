"""The originals' causal Wan and its caches once more, from the READMEs of the goldens alone: float64, no vidistill.

Short and slow on purpose. It makes golden folders of other shapes, which `scripts/parity.py` has never seen.
"""

import json
import math

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

EXACT = torch.float64


class Table:
    def __init__(self, shift):
        u = torch.linspace(1, 0, 1001)[:-1]
        self.sigmas = shift * u / (1 + (shift - 1) * u)
        self.timesteps = 1000 * self.sigmas

    def sigma(self, t):
        return self.sigmas[(self.timesteps - t).abs().argmin()].to(EXACT)

    def warp(self, steps):
        return torch.cat((self.timesteps, torch.zeros(1)))[1000 - torch.tensor(steps)].tolist()


def rotate(x, frames, rows, columns):
    """Rotary embedding of `x` [B, S, h, d] for tokens of `frames` in order of frame, row, column."""
    head = x.shape[-1]
    dims = (head - 4 * (head // 6), 2 * (head // 6), 2 * (head // 6))
    grid = torch.cartesian_prod(frames, torch.arange(rows), torch.arange(columns)).to(EXACT)
    waves = [10000.0 ** -(torch.arange(0, dim, 2, dtype=EXACT) / dim) for dim in dims]
    angles = torch.cat([grid[:, i : i + 1] * wave for i, wave in enumerate(waves)], dim=1)[None, :, None]
    a, b = x[..., ::2], x[..., 1::2]
    turned = (a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos())
    return torch.stack(turned, dim=-1).flatten(-2)


def attend(q, k, v):
    shares = (torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", shares, v)


def rms(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def norm(x, weight=None, bias=None):
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)


class Net:
    """The network under its original names; `cache` says what queries see."""

    def __init__(self, weights, arch):
        self.w, self.arch = {name: x.to(EXACT) for name, x in weights.items()}, arch

    def linear(self, x, name):
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def heads(self, x):
        return x.unflatten(-1, (self.arch["num_heads"], -1))

    def qkv(self, name, x, context):
        q, k = (
            rms(self.linear(y, f"{name}.{p}"), self.w[f"{name}.norm_{p}.weight"]) for p, y in (("q", x), ("k", context))
        )
        return [self.heads(y) for y in (q, k, self.linear(context, f"{name}.v"))]

    def times(self, t):
        half = self.arch["freq_dim"] // 2
        angles = t * 10000.0 ** -(torch.arange(half, dtype=EXACT) / half)
        e = F.silu(self.linear(torch.cat((angles.cos(), angles.sin())), "time_embedding.0"))
        e = self.linear(e, "time_embedding.2")
        return e, self.linear(F.silu(e), "time_projection.1").unflatten(-1, (6, -1))

    def __call__(self, x, t, text, start, cache):
        _, p, q = self.arch["patch_size"]
        b, f, c, height, width = x.shape
        rows, columns = height // p, width // q
        tokens = x.to(EXACT).reshape(b, f, c, rows, p, columns, q).permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
        tokens = F.linear(tokens, self.w["patch_embedding.weight"].flatten(1), self.w["patch_embedding.bias"])
        text = F.pad(text.to(EXACT), (0, 0, 0, self.arch["text_len"] - text.shape[1]))
        text = self.linear(F.gelu(self.linear(text, "text_embedding.0"), approximate="tanh"), "text_embedding.2")
        e, e6 = self.times(t)
        for i in range(self.arch["num_layers"]):
            name = f"blocks.{i}"
            shift1, scale1, gate1, shift2, scale2, gate2 = self.w[f"{name}.modulation"][0] + e6
            y = norm(tokens) * (1 + scale1) + shift1
            seen = cache.see(i, *self.qkv(f"{name}.self_attn", y, y), start, rows, columns)
            tokens = tokens + self.linear(attend(*seen).flatten(2), f"{name}.self_attn.o") * gate1
            y = norm(tokens, self.w[f"{name}.norm3.weight"], self.w[f"{name}.norm3.bias"])
            y = attend(*self.qkv(f"{name}.cross_attn", y, text))
            tokens = tokens + self.linear(y.flatten(2), f"{name}.cross_attn.o")
            y = self.linear(norm(tokens) * (1 + scale2) + shift2, f"{name}.ffn.0")
            tokens = tokens + self.linear(F.gelu(y, approximate="tanh"), f"{name}.ffn.2") * gate2
        shift, scale = self.w["head.modulation"][0] + e
        out = self.linear(norm(tokens) * (1 + scale) + shift, "head.head")
        return out.reshape(b, f, rows, columns, p, q, -1).permute(0, 1, 6, 2, 4, 3, 5).reshape(b, f, -1, height, width)


class Cache:
    """Slots of whole frames. `protects`: LongLive's, whose sinks are not written again once they are full."""

    def __init__(self, frames, local, sinks, protects, unrotated):
        self.frames, self.local, self.sinks, self.protects, self.unrotated = frames, local, sinks, protects, unrotated
        self.slots, self.end, self.used = {}, 0, 0

    def begin(self, start, frames, *, again=False, keep=True):
        """Place a chunk; `again`: the newest frames are encoded once more, over their slots."""
        self.rewrites = start > 0 and keep and (again or start + frames <= self.end)
        extend = 0 if again else max(0, start + frames - self.end)
        self.evicted = max(0, self.used + extend - self.frames)
        self.end, self.used = max(self.end, start + frames), self.used + extend - self.evicted
        self.first = self.used - frames

    def see(self, layer, q, k, v, start, rows, columns):
        n, count = rows * columns, q.shape[1] // (rows * columns)
        keys, values = self.slots.get(layer) or [torch.zeros(len(k), self.frames * n, *k.shape[2:], dtype=EXACT)] * 2
        turned = k if self.unrotated else rotate(k, torch.arange(start, start + count), rows, columns)
        write = max(self.first, self.sinks) if self.protects and self.rewrites else self.first
        pair = []
        for old, new in ((keys, turned), (values, v)):
            held, moved = old[:, : self.sinks * n], old[:, (self.sinks + self.evicted) * n :]
            both = F.pad(
                torch.cat((held, moved), dim=1), (0, 0, 0, 0, 0, old.shape[1] - held.shape[1] - moved.shape[1])
            )
            both[:, write * n : self.used * n] = new[:, (write - self.first) * n :]
            pair.append(both)
        self.slots[layer] = pair
        reach = self.frames if self.local < 0 else self.local
        look = [s for s in range(self.used) if s < self.sinks or s >= self.used - reach + self.sinks]
        tokens = torch.cat([torch.arange(s * n, (s + 1) * n) for s in look])
        keys, values = pair[0][:, tokens], pair[1][:, tokens]
        if self.unrotated:
            return (
                rotate(q, torch.arange(self.first, self.used), rows, columns),
                rotate(keys, torch.tensor(look), rows, columns),
                values,
            )
        return rotate(q, torch.arange(start, start + count), rows, columns), keys, values


class Roll:
    """One variant of a golden rollout, as its pipeline ran it: `outputs` by name, `draws` taken in order."""

    def __init__(self, net, config, variant, noise, text, draw, given=None):
        self.net, self.v, self.noise, self.text, self.draw = net, variant, noise, text, draw
        self.table = Table(config["timestep_shift"])
        local, total = variant["local_attn_size"], noise.shape[1] + (0 if given is None else given.shape[1])
        self.frames = total if local < 0 else local
        unrotated = config.get("use_infinite_attention", False)
        self.cache = Cache(self.frames, local, variant["sink_size"], config["case"] != "rollout", unrotated)
        self.calls, self.done, self.outputs, self.prompt = [], [], {}, 0
        self.run(config["case"] == "diagonal_rollout", given)

    def call(self, x, t, start, **place):
        self.cache.begin(start, x.shape[1], **place)
        self.calls.append((t, start, x.shape[1], self.cache.used))
        v = self.net(x, t, self.text(self.prompt), start, self.cache)
        return x.to(EXACT) - self.table.sigma(t) * v

    def run(self, diagonal, given):
        v = self.v
        steps, chunk = v["denoising_step_list"], v["num_frame_per_block"]
        steps = self.table.warp(steps) if v["warp_denoising_step"] else [float(s) for s in steps]
        switches, start, first = list(v.get("switch_frame_indices") or []), 0, v.get("independent_first_frame", False)
        while given is not None and start < given.shape[1]:
            part = given[:, start : start + (1 if first and start == 0 else chunk)]
            self.call(part, 0.0, start)
            self.done.append(part.to(EXACT))
            start += part.shape[1]
        begin, block = start, 0
        while start - begin < self.noise.shape[1]:
            if switches and start >= switches[0]:
                self.switch(start, switches.pop(0))
            x = self.noise[:, start - begin :][:, : 1 if first and start == 0 else chunk].to(EXACT)
            levels = self.levels(steps, block) if diagonal else steps
            for t, after in zip(levels, [*levels[1:], None], strict=True):
                x0 = self.call(x, t, start)
                if after is not None:
                    sigma = self.table.sigma(after)
                    x = (1 - sigma) * x0 + sigma * self.draw(x0)
            if not diagonal:
                self.call(x0, float(v["context_noise"]), start)
            self.done.append(x0)
            start, block = start + x.shape[1], block + 1
        self.finish(steps)

    def levels(self, steps, block):
        ends = float(int(steps[0])), float(int(steps[-1]))
        return {0: [ends[0], 933.0, 733.0, ends[1]], 1: [ends[0], 933.0, ends[1]]}.get(block, steps)

    def switch(self, start, _):
        self.prompt += 1
        if start == 0:
            return
        keep, count = self.v["global_sink"], min(self.frames, start)
        if not keep:
            self.cache.slots = {i: [torch.zeros_like(x) for x in pair] for i, pair in self.cache.slots.items()}
        x = torch.cat(self.done, dim=1)[:, start - count : start]
        self.call(x, float(self.v["context_noise"]), start - count, again=True, keep=keep)

    def finish(self, steps):
        t, start, frames, held = (torch.tensor(column) for column in zip(*self.calls, strict=True))
        keys, values = self.cache.slots[0]
        tokens = keys.shape[1] // self.frames * self.cache.used
        self.outputs = {
            "latents": torch.cat(self.done, dim=1).float(),
            "denoising_step_list": torch.tensor(steps),
            "call_timesteps": t,
            "call_start_frame": start,
            "call_num_frames": frames,
            "call_local_end_frame": held,
            "kv0_final.k": keys[:, :tokens].float().contiguous(),
            "kv0_final.v": values[:, :tokens].float().contiguous(),
        }


def random_weights(arch, seed):
    """Weights of an original network of any size, under its own names."""
    rng, d = torch.Generator().manual_seed(seed), arch["dim"]
    patch = math.prod(arch["patch_size"])
    weights = {"patch_embedding.weight": torch.randn(d, arch["in_dim"], *arch["patch_size"], generator=rng) / 8}
    weights["patch_embedding.bias"] = torch.randn(d, generator=rng) / 10
    linears = {"text_embedding.0": (arch["text_dim"], d), "text_embedding.2": (d, d), "time_embedding.2": (d, d)}
    linears |= {"time_embedding.0": (arch["freq_dim"], d), "time_projection.1": (d, 6 * d)}
    linears["head.head"] = (d, arch["out_dim"] * patch)
    weights["head.modulation"] = torch.randn(1, 2, d, generator=rng) / d**0.5
    for i in range(arch["num_layers"]):
        weights[f"blocks.{i}.modulation"] = torch.randn(1, 6, d, generator=rng) / d**0.5
        for part in ("self_attn", "cross_attn"):
            linears |= {f"blocks.{i}.{part}.{p}": (d, d) for p in "qkvo"}
            for p in "qk":
                weights[f"blocks.{i}.{part}.norm_{p}.weight"] = 1 + torch.randn(d, generator=rng) / 10
        linears |= {f"blocks.{i}.ffn.0": (d, arch["ffn_dim"]), f"blocks.{i}.ffn.2": (arch["ffn_dim"], d)}
        weights[f"blocks.{i}.norm3.weight"] = 1 + torch.randn(d, generator=rng) / 10
        weights[f"blocks.{i}.norm3.bias"] = torch.randn(d, generator=rng) / 10
    for name, (fan_in, fan_out) in linears.items():
        weights[f"{name}.weight"] = torch.randn(fan_out, fan_in, generator=rng) / fan_in**0.5
        weights[f"{name}.bias"] = torch.randn(fan_out, generator=rng) / 10
    return weights


@torch.no_grad()
def write_folder(folder, config, frames, *, given=None, batch=1, seed=0):
    """A golden folder of `config`, whose variants generate `frames[name]` frames after `given[name]` given ones."""
    rng, arch = torch.Generator().manual_seed(seed), config["transformer"]
    weights, io = random_weights(arch, seed), {}
    prompts = io["in.prompt_embeds"] = torch.randn(3, arch["text_len"] - 2, arch["text_dim"], generator=rng)
    for name, variant in config["variants"].items():
        rows = batch if config["case"] == "rollout" else 1
        size = (rows, frames[name], arch["in_dim"], *config["latent_hw"])
        noise = io[f"in.{name}.noise"] = torch.randn(size, generator=rng)
        start = None
        if (given or {}).get(name):
            start = io[f"in.{name}.initial_latent"] = torch.randn(rows, given[name], *size[2:], generator=rng)
        drawn = []

        def draw(x, drawn=drawn):
            drawn.append(torch.randn(x.shape, generator=rng))
            return drawn[-1].to(EXACT)

        whole = config["case"] != "longlive_rollout"
        text = (lambda _, rows=rows: prompts[:rows]) if whole else (lambda row: prompts[row : row + 1])
        roll = Roll(Net(weights, arch), config, variant, noise, text, draw, start)
        io |= {f"in.{name}.renoise.{i}": x.flatten(0, 1) for i, x in enumerate(drawn)}
        io |= {f"out.{name}.{output}": x for output, x in roll.outputs.items()}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: x.contiguous().clone() for name, x in io.items()}, folder / "io.safetensors")
    save_file(weights, folder / "weights.safetensors")
    return folder
