"""Published checkpoints: names, files, families, step tables, and streaming what was converted."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from published import GOLDENS, publish, same, weights
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_tables import on_table, warp_timestep

from vidistill.bench.cost import NETWORKS, against_papers, named_cost, parameters, policies
from vidistill.cli.convert import convert, student_of
from vidistill.conditioning.condition import Condition, pack_audio
from vidistill.interop.export import export_as
from vidistill.interop.families import FAMILIES, NON_COMMERCIAL, family
from vidistill.interop.formats import read_student, write_student
from vidistill.interop.keys import bare, build, infer_config, ours, to_diffusers_key, to_original, to_ours
from vidistill.interop.lora import Adapter, merge_lora
from vidistill.interop.tables import TableSchedule, diagonal_steps
from vidistill.memory.policies import POLICIES
from vidistill.models.dit import VideoDiT
from vidistill.rollout import rollout
from vidistill.schedules import Pass, endless, finite


def test_what_is_no_published_network_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"patch_embedding\.weight is \[48\]"):
        infer_config({**weights(), "patch_embedding.weight": torch.zeros(48)}, heads=4)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="no weight_map"):
        read_student(tmp_path, "self-forcing")


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["self_forcing_rollout", "livetalk_rollout"])
def test_original_names_map_there_and_back_bit_for_bit(case):
    state = weights(case)
    cfg = infer_config(state, heads=2)
    assert same(to_original(to_ours(state), cfg), state)
    build(to_ours(state), cfg)


def test_diffusers_names_map_there_and_back_bit_for_bit():
    cfg = infer_config(weights(), heads=4)
    theirs = to_original(to_ours(weights()), cfg, "diffusers")
    assert "blocks.0.attn1.to_out.0.weight" in theirs and "blocks.0.norm2.weight" in theirs
    assert infer_config(theirs, heads=4) == cfg
    assert same(to_original(to_ours(theirs), cfg), weights())


def test_every_name_of_an_image_network_has_its_place_in_diffusers():
    for name in (
        "img_emb.proj.1.weight",
        "blocks.3.cross_attn.norm_k_img.weight",
        "head.modulation",
        "blocks.3.modulation",
    ):
        assert ours(to_diffusers_key(name)) == name and to_diffusers_key(name) != name


@pytest.mark.parametrize(
    "wrapped",
    [
        "model.blocks.0.ffn.0.weight",
        "generator.model.blocks.0.ffn.0.weight",
        "model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.ffn.0.weight",
        "_orig_mod.blocks.0.ffn.0.weight",
        "module.model.blocks.0._checkpoint_wrapped_module.ffn.0.weight",
    ],
)
def test_what_training_frameworks_add_to_names_is_removed(wrapped):
    assert bare(wrapped) == "blocks.0.ffn.0.weight"


def test_the_architecture_is_read_from_the_shapes():
    cfg = infer_config(weights("livetalk_rollout"), heads=2)
    assert (cfg.channels, cfg.extra_channels, cfg.layers, cfg.width) == (16, 17, 6, 48)
    site = cfg.sites["hidden"]
    assert (site.dim, site.hidden, site.layers, site.activation) == (96, 16, (2, 3), "norm")


def test_no_weight_is_copied_when_a_network_is_built():
    state = to_ours(weights())
    net = build(state, infer_config(weights(), heads=4))
    assert all(p.data_ptr() == state[name].data_ptr() for name, p in net.named_parameters())


def test_an_unfit_state_lists_missing_unexpected_and_mis_shaped_keys():
    state = weights()
    del state["blocks.1.ffn.2.bias"]
    state["blocks.0.surprise"] = torch.zeros(1)
    state["head.modulation"] = torch.zeros(1, 3, 64)
    with pytest.raises(ValueError) as error:
        build(to_ours(state), infer_config(state, heads=4), "half.safetensors")
    for part in ("half.safetensors", "1 missing (blocks.1.ffn.2.bias)", "1 unexpected (blocks.0.surprise)"):
        assert part in str(error.value)
    assert "head.modulation is [1, 3, 64], expected [1, 2, 64]" in str(error.value)
    assert "Self Forcing family" in str(error.value)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["self-forcing", "causvid", "longlive", "diagonal", "causal-forcing", "rolling-forcing"]
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_published_file_is_read_and_written_back_bit_for_bit(tmp_path, name, suffix):
    state = {key: x.bfloat16() for key, x in weights().items()}
    path = publish(tmp_path / f"in{suffix}", state)
    student = read_student(path, name, allow_pickle=True, heads=4)
    write_student(tmp_path / f"out{suffix}", student)
    if suffix == ".pt":
        back = torch.load(tmp_path / "out.pt", weights_only=True)["generator_ema"]
    else:
        back = load_file(tmp_path / "out.safetensors")
    assert same(back, {"model." + key: x for key, x in state.items()})


@pytest.mark.parametrize("prefix", ["", "model.", "_orig_mod.", "generator.model._fsdp_wrapped_module."])
@pytest.mark.parametrize("name", ["self-forcing", "rolling-forcing"])
def test_conversion_there_and_back_keeps_every_name_and_precision(tmp_path, prefix, name):
    """Published files mix precisions (float32 norms, bf16 products), and carry what their framework wrote."""
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    state = {key: x.to(kinds[i % 3]) for i, (key, x) in enumerate(weights().items())}
    wrapped = {
        key.replace(".ffn.", "._checkpoint_wrapped_module.ffn.") if prefix else key: x for key, x in state.items()
    }
    source = publish(tmp_path / "in.pt", wrapped, "generator", prefix)
    convert(source, name, tmp_path / "ours", size=(64, 64), allow_pickle=True, heads=4)
    export_as(tmp_path / "ours", "self-forcing", tmp_path / "out.pt")
    old, new = (torch.load(p, weights_only=True)["generator"] for p in (source, tmp_path / "out.pt"))
    assert same(old, new)


def test_a_merged_lora_is_written_back_as_the_whole_network_it_became(tmp_path):
    base = publish(tmp_path / "base.pt", weights(), "generator")
    layer = "blocks.0.ffn.2"
    halves = {"A": torch.randn(2, 160), "B": torch.randn(64, 2)}
    lora = {f"base_model.model.model.{layer}.lora_{half}.weight": x for half, x in halves.items()}
    torch.save({"generator_lora": lora}, tmp_path / "lora.pt")
    kw = {"size": (64, 64), "allow_pickle": True, "heads": 4}
    convert(base, "longlive", tmp_path / "ours", lora=tmp_path / "lora.pt", **kw)
    export_as(tmp_path / "ours", "self-forcing", tmp_path / "merged.pt")
    back = torch.load(tmp_path / "merged.pt", weights_only=True)["generator"]
    moved = [key for key, x in back.items() if not torch.equal(x, weights()[key.removeprefix("model.")])]
    assert moved == [f"model.{layer}.weight"]
    want = read_student(base, "longlive", allow_pickle=True, heads=4, lora=tmp_path / "lora.pt").state
    assert same(read_student(tmp_path / "merged.pt", "longlive", allow_pickle=True, heads=4).state, dict(want))


def test_a_file_that_lost_its_last_blocks_is_told_from_a_smaller_network():
    with torch.device("meta"):
        whole = VideoDiT(replace(NETWORKS["wan-1.3b"], layers=28)).state_dict()
    state = to_original(whole, NETWORKS["wan-1.3b"])
    assert infer_config(state).layers == 30
    with pytest.raises(ValueError, match=r"54 missing \(blocks\.28\.modulation"):
        build(to_ours(state), infer_config(state), "first_shards.safetensors")


def test_averaged_weights_are_read_first_and_any_entry_by_name(tmp_path):
    live, average = weights(), {key: x + 1 for key, x in weights().items()}
    torch.save({"generator": live, "generator_ema": average, "critic": live}, tmp_path / "both.pt")
    read = {
        e: read_student(tmp_path / "both.pt", "self-forcing", allow_pickle=True, heads=4, entry=e)
        for e in (None, "generator")
    }
    key = "head.head.bias"
    chunkwise = read_student(tmp_path / "both.pt", "causal-forcing", allow_pickle=True, heads=4)
    assert torch.equal(chunkwise.state[key], live[key])  # its published command reads the live ones
    assert torch.equal(read[None].state[key], average[key]) and torch.equal(read["generator"].state[key], live[key])
    with pytest.raises(ValueError, match=r"no entry 'ema'; it has \['generator', 'generator_ema', 'critic'\]"):
        read_student(tmp_path / "both.pt", "self-forcing", allow_pickle=True, heads=4, entry="ema")


def test_pickles_are_opened_only_when_allowed_and_then_weights_only(tmp_path):
    path = publish(tmp_path / "sf.pt", weights())
    with pytest.raises(ValueError, match="--allow-pickle"):
        read_student(path, "self-forcing", heads=4)
    torch.save({"generator": Path("x")}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="read weights-only"):
        read_student(tmp_path / "code.pt", "self-forcing", allow_pickle=True)


def test_a_folder_of_shards_is_read_whole_and_a_missing_shard_is_named(tmp_path):
    state, index = weights(), {}
    for i, keys in enumerate((list(state)[::2], list(state)[1::2])):
        save_file({k: state[k] for k in keys}, tmp_path / f"part-{i}.safetensors")
        index.update(dict.fromkeys(keys, f"part-{i}.safetensors"))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert len(read_student(tmp_path, "self-forcing", heads=4).state) == len(state)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"part-1.safetensors.*incomplete"):
        read_student(tmp_path, "self-forcing", heads=4)


def test_a_lora_is_merged_into_its_base(tmp_path):
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 64, generator=rng), torch.randn(64, 3, generator=rng)
    layer = "blocks.1.self_attn.q"
    adapter = {
        f"base_model.model.{layer}.lora_A.default.weight": a,
        f"base_model.model.{layer}.lora_B.default.weight": b,
    }
    publish(tmp_path / "base.pt", weights(), "generator")
    torch.save({"generator_lora": adapter, "critic_lora": {}}, tmp_path / "lora.pt")
    student = read_student(tmp_path / "base.pt", "longlive", allow_pickle=True, heads=4, lora=tmp_path / "lora.pt")
    want = weights()[f"{layer}.weight"] + b @ a
    assert torch.allclose(student.state[f"{layer}.weight"], want, atol=1e-5)
    assert torch.equal(student.state["head.head.bias"], weights()["head.head.bias"])
    half = {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    twice = merge_lora(to_ours(weights()), Adapter(half, alpha=6.0))
    assert torch.allclose(twice[f"{layer}.weight"], weights()[f"{layer}.weight"] + 2 * b @ a, atol=1e-5)
    with pytest.raises(ValueError, match=r"blocks\.9.*base checkpoint"):
        merge_lora(to_ours(weights()), Adapter({k.replace("blocks.1", "blocks.9"): x for k, x in half.items()}))
    with pytest.raises(ValueError, match="a LoRA"):
        publish(tmp_path / "only.safetensors", adapter, prefix="")
        read_student(tmp_path / "only.safetensors", "longlive", heads=4)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_file_of_another_kind_says_what_it_looks_like(tmp_path, name):
    other = weights("self_forcing_rollout" if name == "livetalk" else "livetalk_rollout")
    with pytest.raises(ValueError, match=f"not family '{name}'; it looks"):
        read_student(publish(tmp_path / "x.safetensors", other), name, heads=2)
    save_file({"decoder.conv1.weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=rf"is no {name} student.*codec"):
        read_student(tmp_path / "vae.safetensors", name)
    short = dict(list(weights("livetalk_rollout" if name == "livetalk" else "self_forcing_rollout").items()))
    short.pop("blocks.0.self_attn.q.weight")
    with pytest.raises(ValueError, match=r"1 missing \(blocks.0.self_attn.q.weight\)"):
        read_student(publish(tmp_path / "short.safetensors", short), name, heads=2)


def test_a_converted_student_finds_its_codec_and_text_from_any_folder(tmp_path, monkeypatch):
    from vidistill.cli.convert import kept

    monkeypatch.chdir(tmp_path)
    (tmp_path / "wan" / "vae").mkdir(parents=True)
    (tmp_path / "codec.json").write_text("{}")
    assert kept("wan", "sf") == str(tmp_path / "wan") and kept("hf://Wan-AI/Wan", "sf") == "hf://Wan-AI/Wan"
    assert kept("codec", "sf") == "codec" and kept("codec", "deep/sf") == str(tmp_path / "codec")


def test_a_width_that_does_not_say_its_heads_asks_for_them(tmp_path):
    with pytest.raises(ValueError, match=r"width 64 .*--heads"):
        read_student(publish(tmp_path / "x.safetensors", weights()), "self-forcing")


def test_unknown_families_and_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="known: self-forcing"):
        family("sora")
    with pytest.raises(ValueError, match="no checkpoint"):
        read_student(tmp_path / "none.pt", "causvid")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 9)
    with pytest.raises(ValueError, match=r"cut\.safetensors.*damaged"):
        read_student(tmp_path / "cut.safetensors", "causvid")
    (tmp_path / "weights.h5").write_bytes(b"\x89HDF\r\n")
    with pytest.raises(ValueError, match="HDF5"):
        read_student(tmp_path / "weights.h5", "causvid")


# --- families and tables ----------------------------------------------------------------------------------------------


def test_step_lists_are_warped_as_published():
    assert family("self-forcing").timesteps == pytest.approx((1000, 937.5, 833.3333, 625), abs=1e-3)
    assert TableSchedule(shift=8.0).warp_steps([750, 0]) == pytest.approx((960, 0), abs=1e-3)
    assert family("causvid").timesteps == (1000, 757, 522)


def test_diagonal_tells_its_literals_and_draws_noise_at_the_nearest_entries():
    schedule = family("diagonal").schedule()
    assert schedule.timesteps == (
        (1.0, 0.933, 0.733, 0.357),
        (1.0, 0.933, 0.357),
        (1.0, pytest.approx(0.357143, abs=1e-5)),
    )
    assert schedule.steps[0] == pytest.approx((1.0, 0.933063, 0.732616, 0.357143), abs=1e-5)
    assert diagonal_steps((1000.0, 750.0, 625.5))[1] == (1000.0, 933.0, 625.0)


def test_zero_is_not_noise_free_on_a_table():
    assert float(TableSchedule(shift=5.0).sigma(0.0)) == pytest.approx(0.004980, abs=1e-6)


def test_passes_on_a_table_tell_what_they_were_and_noise_what_is_near():
    table = TableSchedule(shift=5.0)
    passes = [Pass(0, (0.733,), (0.0,)), Pass(0, (0.0,), None, commit=True), Pass(0, (0.0,), None, emit=True)]
    step, context, given = on_table(passes, table, noise_context=True)
    assert (
        step.timesteps == (0.733,) and step.sigma == pytest.approx((0.732616,), abs=1e-5) and step.next_sigma == (0.0,)
    )
    assert context.timesteps == (0.0,) and context.sigma == pytest.approx((0.00498,), abs=1e-5)
    assert given.sigma == (0.0,)


def test_score_timesteps_are_shifted_after_drawing_and_clamped():
    assert warp_timestep(torch.tensor([0, 250, 999]), 5.0).tolist() == pytest.approx([20, 625, 980])
    assert warp_timestep(torch.tensor([417]), 1.0).tolist() == [417]


def test_a_non_commercial_licence_is_recorded_and_warned_about(tmp_path, caplog):
    student = read_student(publish(tmp_path / "c.safetensors", weights()), "causvid", heads=4)
    with caplog.at_level(logging.WARNING):
        card = student.card()
    assert "NC" in card["licence"] and card["ancestry"] == ["Wan-AI/Wan2.1-T2V-1.3B: Apache-2.0"]
    assert "CausVid" in caplog.text and "NC" in caplog.text
    caplog.clear()
    heir = replace(student, family=replace(family("diagonal"), ancestry=(f"somebody/base: {NON_COMMERCIAL}",)))
    with caplog.at_level(logging.WARNING):
        heir.card()
    assert "somebody/base" in caplog.text
    caplog.clear()
    replace(student, family=family("self-forcing")).card()
    assert not caplog.text


# --- streaming what was converted -------------------------------------------------------------------------------------

STREAMS = [
    ("self_forcing_rollout", "global", "self-forcing", {}),
    ("longlive_switch_rollout", "single_local12_sink3", "longlive", {}),
    ("diagdistill_rollout", "shipped_local12_sink3", "diagonal", {}),
    ("livetalk_rollout", "window15_sink9", "livetalk", {}),
]


@pytest.mark.parametrize(("case", "variant", "name", "kw"), STREAMS, ids=[s[2] for s in STREAMS])
@torch.no_grad()
def test_a_converted_student_streams_the_recorded_latents(tmp_path, case, variant, name, kw):
    from vidistill.checkpoint import load_student

    config = json.loads((GOLDENS / case / "config.json").read_text())
    io = load_file(GOLDENS / case / "io.safetensors")
    noise, want = io[f"in.{variant}.noise"], io[f"out.{variant}.latents"]
    heads = config.get("num_heads") or config["transformer"]["num_heads"]
    source = publish(tmp_path / "published.pt", weights(case))
    size = (8 * noise.shape[3], 8 * noise.shape[4])
    convert(source, name, tmp_path / "ours", size=size, allow_pickle=True, heads=heads)
    bundle = load_student(tmp_path / "ours")
    student, cond, clamped = bundle.net, Condition(tokens=io["in.prompt_embeds"][:1]), None
    if name == "livetalk":
        cond, clamped = talking(io, variant, noise.shape[1])
    draws = iter(io[f"in.{variant}.renoise.{i}"] for i in range(99))
    parts = rollout(
        student,
        finite(endless(bundle.schedule), student.num_chunks(noise.shape[1])),
        noise=lambda c: noise[:, student.first_frame(c) : student.first_frame(c + 1)],
        cond=lambda start, stop: cond.frames(start, stop),
        memory=student.new_memory(1),
        rng=lambda x: next(draws).reshape(x.shape),
        clamped=clamped,
    )
    assert (torch.cat(list(parts), dim=1) - want).abs().max() < 1e-4
    export_as(tmp_path / "ours", "self-forcing", tmp_path / "again.pt")
    old, new = (torch.load(p, weights_only=True)["generator_ema"] for p in (source, tmp_path / "again.pt"))
    assert same(old, new)


def test_a_converted_avatar_is_shown_a_picture_and_spoken_to(tmp_path):
    from tiny_audio import tiny_wav2vec2

    from vidistill import checkpoint, cli
    from vidistill.codecs.tiny import TinyCodec, TinyCodecConfig
    from vidistill.streaming.session import StreamConfig, StreamSession

    ears = tmp_path / "ears"
    tiny_wav2vec2(ears, width=6)
    codec = TinyCodec(TinyCodecConfig(encoder_widths=(6, 8, 8), decoder_widths=(8, 8, 6))).eval()
    source = publish(tmp_path / "published.safetensors", weights("livetalk_rollout"))
    out = tmp_path / "ours"
    command = ["convert", str(source), str(out), "--family", "livetalk", "--size", "32x64", "--heads", "2"]
    assert cli.main([*command, "--audio", str(ears)]) == 0
    bundle = checkpoint.load_student(out)
    assert bundle.given_frames == 1 and bundle.schedule.given_chunks == 0
    clips = []
    for loud in (0.0, 0.3):
        image = np.full((16, 32, 3), 90, np.uint8)  # this codec makes latents of 4 pixels a side
        with StreamSession(bundle, codec, StreamConfig(pipelined=False), image=image) as session:
            session.set(audio=loud * np.random.default_rng(0).uniform(-1, 1, 48_000).astype(np.float32))
            clips.append(session.record(12))
    assert clips[0].shape == (12, 16, 32, 3) and not np.array_equal(*clips)
    deaf = publish(tmp_path / "deaf.safetensors", weights())
    with pytest.raises(ValueError, match="hears nothing"):
        convert(deaf, "self-forcing", tmp_path / "no", size=(32, 32), heads=4, audio=str(ears))


def test_generate_streams_the_recorded_latents_of_a_converted_student(tmp_path, monkeypatch):
    """The command line from a published file to pictures; only the recorded noise is put in the place of its own."""
    from vidistill import checkpoint, cli, rollout
    from vidistill.codecs.tiny import TinyCodec, TinyCodecConfig
    from vidistill.streaming import session as session_module
    from vidistill.teachers.text_encoder import TextCache

    io = load_file(GOLDENS / "self_forcing_rollout" / "io.safetensors")
    noise, text = io["in.global.noise"], io["in.prompt_embeds"][0]
    source = publish(tmp_path / "published.pt", weights())
    checkpoint.export(
        tmp_path / "codec", TinyCodec(TinyCodecConfig(encoder_widths=(6, 8, 8), decoder_widths=(8, 8, 6))), {}
    )
    shown = ["--size", "64x64", "--heads", "4", "--codec", str(tmp_path / "codec"), "--text", "some/umt5"]
    command = ["convert", str(source), str(tmp_path / "sf"), "--family", "self-forcing", "--allow-pickle", *shown]
    assert cli.main([*command, "--tokens", str(len(text))]) == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = TextCache("some/umt5", tmp_path / "cache" / "vidistill" / "text", length=len(text))
    cache.folder.mkdir(parents=True)
    save_file({"tokens": text.clone()}, cache.path("a recorded prompt"))

    draws = iter(io[f"in.global.renoise.{i}"] for i in range(9))
    drawn = {"rollout.randn_like": lambda x, rng: next(draws).reshape(x.shape)}
    monkeypatch.setattr(rollout, "randn_like", drawn["rollout.randn_like"])
    monkeypatch.setattr("vidistill.diffusion.randn_like", drawn["rollout.randn_like"])
    monkeypatch.setattr(
        "vidistill.streaming.engine.chunk_noise", lambda *_: lambda c: noise[:, 3 * c : 3 * c + 3].clone()
    )
    decoded, decode = [], TinyCodec.decode_stream

    def decode_and_keep(self, latents, state=None):
        decoded.append(latents.clone())
        return decode(self, latents, state)

    monkeypatch.setattr(TinyCodec, "decode_stream", decode_and_keep)
    real = session_module.StreamConfig
    monkeypatch.setattr(
        session_module, "StreamConfig", lambda **kw: real(**kw, pipelined=False)
    )  # no chunk ahead of the last
    out = ["-o", str(tmp_path / "sf.mp4"), "--seconds", str(33 / 16), "--prompt", "a recorded prompt"]
    assert cli.main(["generate", str(tmp_path / "sf"), *out]) == 0
    assert (tmp_path / "sf.mp4").stat().st_size > 0
    assert (torch.cat(decoded, dim=1) - io["out.global.latents"]).abs().max() < 1e-4


def talking(io: dict[str, Tensor], variant: str, frames: int) -> tuple[Condition, Tensor]:
    image = io["in.image_latent"][:, None]
    mask = torch.ones(1, frames, 1, *image.shape[-2:])
    mask[:, 0] = 0
    packed = pack_audio(io[f"in.{variant}.audio_features"], 4)
    channels = torch.cat((image.expand(-1, frames, -1, -1, -1), mask), dim=2)
    return Condition(tokens=io["in.prompt_embeds"], per_frame={"hidden": packed}, channels=channels), image


def test_a_published_network_gets_its_familys_chunks_and_memory(tmp_path):
    published = read_student(publish(tmp_path / "l.safetensors", weights()), "longlive", heads=4)
    student = student_of(published, 8, 8)
    assert (student.cfg.chunk, student.cfg.memory.frames, student.cfg.memory.sinks) == (3, 12, 3)


# --- true size --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "billions"), [("wan-1.3b", 1.42), ("wan-14b", 14.29), ("wan-5b", 5.0)])
def test_networks_of_true_size_have_the_published_number_of_parameters(name, billions):
    assert parameters(NETWORKS[name]) / 1e9 == pytest.approx(billions, rel=0.01)


def test_the_cost_of_true_size_follows_the_papers_arithmetic():
    row = named_cost("wan-1.3b", "self-forcing")
    assert row["tokens_per_frame"] == 1560 and row["nfe_per_chunk"] == [5] * 7
    assert row["kv_bytes"]["full, 21 frames"] == pytest.approx(6.04e9, rel=0.01)
    assert sum(named_cost("wan-1.3b", "diagonal")["nfe_per_chunk"]) == 17
    assert row["gpus"]["H100"]["fps"] > row["gpus"]["A100"]["fps"] > 0
    with pytest.raises(ValueError, match=r"known: wan-1.3b"):
        named_cost("wan-7b")


def test_every_memory_policy_and_layout_has_its_bytes():
    memories = policies(family("self-forcing").memory())
    assert {m.policy for m in memories.values()} == set(POLICIES)
    row = named_cost("wan-14b")["kv_bytes"]
    frame = 2 * 40 * 5120 * 2 * 1560  # keys and values of a latent frame in half precision
    assert row["full, 21 frames"] == 21 * frame and row["window 15, anchors 9"] == (15 + 9 / 2) * frame
    assert 9 * frame < row["compressed, 8 bit"] < row["compressed, 9 + 72"] < 30 * frame
    assert row["endless, 9 + 72"] == row["compressed, 9 + 72"]


def test_flops_of_a_pass_are_those_counted_by_hand():
    row = named_cost("wan-1.3b")
    d, f, layers, tokens, seen = 1536, 8960, 30, 3 * 1560, 21 * 1560
    linear = layers * tokens * 2 * (4 * d * d + 2 * d * d + 2 * d * f)  # q k v o, then q o of the prompt, then ffn
    attention = layers * 4 * tokens * d * (seen + 512)
    assert row["flops_per_pass"] == pytest.approx(linear + attention, rel=0.01)
    assert row["flops_per_chunk"] == 5 * row["flops_per_pass"]
    alone = layers * 4 * tokens * d * (tokens + 512)
    assert row["gpus"]["H100"]["first_chunk_ms"] == pytest.approx(4000 * (linear + alone) / 989e12, rel=0.01)


def test_no_paper_is_faster_than_the_roofline():
    rows = against_papers()
    assert len(rows) >= 5 and all(0.05 < row["ratio"] < 1 for row in rows), rows
    assert all(row["latency_ratio"] > 1 for row in rows if row["published_latency_s"]), rows
