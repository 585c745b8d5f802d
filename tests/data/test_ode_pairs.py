"""From a published folder and a list of prompts to a student that streams, without any recorded video."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vidistill import checkpoint
from vidistill.cli.main import main
from vidistill.data import ode_pairs
from vidistill.data import prompts as prompts_module
from vidistill.data.clips import Clips
from vidistill.data.prompts import Prompts, open_data
from vidistill.data.shards import DataError
from vidistill.memory.policies import MemoryConfig
from vidistill.models.lora import LoraConfig
from vidistill.models.student import StudentConfig
from vidistill.schedules import ScheduleConfig
from vidistill.teachers.text_encoder import TextCache
from vidistill.training.config import TrainConfig
from vidistill.training.losses import LossConfig
from vidistill.training.optim import OptimConfig
from vidistill.training.trainer import Trainer, train

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from tiny_nets import tiny_ltx
from tiny_ranks import together
from tiny_training import rolled
from tiny_wan import LENGTH, TEXT, WORDS, write_wan

FRAMES = 6
LEVELS = (1.0, 0.8333333, 0.625)


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return write_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def prompts(wan, tmp_path_factory):
    """A folder of prompts, made by the command line."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "list.txt").write_text("a red fox runs\n\n two boats at night \n")
    args = ["--file", folder / "list.txt", "--text", wan, "--negative", "blurred", "--tokens", LENGTH]
    assert main(["data", "prompts", str(folder / "p"), *map(str, args)]) == 0
    return folder / "p"


@pytest.fixture(scope="module")
def paths(wan, prompts):
    """Trajectories of the teacher under these prompts."""
    out = prompts.with_name("paths")
    levels = ",".join(map(str, LEVELS))
    args = ["--teacher", wan, "--data", prompts, "--clips", 3, "--frames", FRAMES, "--steps", 4, "--levels", levels]
    code = main(["data", "trajectories", str(out), *map(str, args), "--size", "32x48", "--at-once", "2"])
    assert code == 0
    return out


def stage(wan, data, root, **settings):
    memory = MemoryConfig("full", frames=12)
    base = TrainConfig(
        "wan",
        "dmd",
        str(data),
        steps=2,
        batch=2,
        frames=FRAMES,
        latent_size=(4, 6),
        teacher=str(wan),
        codec=str(wan),
        student=StudentConfig(chunk=3, memory=memory),
        schedule=ScheduleConfig(levels=LEVELS),
        loss=LossConfig(guidance=4.0),
        optim=OptimConfig(lr=1e-3),
        critic_optim=OptimConfig(lr=1e-3),
        critic_steps=1,
        out=str(root),
    )
    return replace(base, **settings)


def test_prompts_are_embeddings_on_disk_and_a_batch_depends_on_seed_and_step_alone(wan, prompts, tmp_path):
    data = open_data(prompts)
    assert isinstance(data, Prompts) and len(data) == 2 and data.given == 0 and data.width_of("tokens") == TEXT
    assert [told["caption"] for told in data.meta["described"]] == ["a red fox runs", "two boats at night"]
    batch, again = (data.batch(5, FRAMES, (16, 4, 6), 0, 3) for _ in range(2))
    assert torch.equal(batch.cond.tokens, again.cond.tokens) and batch.x.shape == (5, FRAMES, 16, 4, 6)
    assert {tuple(t.flatten().tolist()) for t in data.batch(64, 1, (1, 1, 1), 0, 0).cond.tokens} == {
        tuple(data.tokens(k).flatten().tolist()) for k in range(2)
    }
    assert batch.cond.null().tokens.equal(data.negative.expand(5, LENGTH, TEXT))
    assert not data.negative.equal(data.tokens(0))
    stored = load_file(prompts / "shard-00000.safetensors")["tokens"]
    assert stored.shape == (2, 5, TEXT), "four words and an end: padding is not stored"
    whole = TextCache(wan, tmp_path, length=LENGTH).encode(["a red fox runs"])
    assert whole.shape == (1, LENGTH, TEXT) and whole[0, 5:].eq(0).all() and whole[0, :5].abs().sum(-1).gt(0).all()
    assert len(open_data(prompts, episodes=1)) == 1


def test_an_embedding_equals_what_transformers_computes(wan, prompts):
    from transformers import AutoTokenizer, UMT5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(wan, subfolder="tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(wan, subfolder="text_encoder").eval()
    ids = tokenizer(["two boats at night"], return_tensors="pt", padding="max_length", max_length=LENGTH)
    with torch.no_grad():
        want = encoder(ids.input_ids, ids.attention_mask).last_hidden_state[0, :5]
    got = open_data(prompts).tokens(1)[:5]
    assert (got - want).abs().max() < 0.02 * want.abs().max()  # stored in bf16


def test_a_second_call_encodes_nothing_and_a_missing_embedding_is_named(wan, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(TextCache, "_load", lambda self: pytest.fail("the encoder was loaded"))
    args = [
        "data",
        "prompts",
        str(prompts),
        "--file",
        "nothing.txt",
        "--text",
        str(wan),
        "--tokens",
        str(LENGTH),
        "--negative",
    ]
    assert main([*args, "blurred"]) == 0 and "is there already (2 episodes)" in capsys.readouterr().out
    assert main([*args, "sharp"]) == 1 and "negative 'blurred' where 'sharp' is asked" in capsys.readouterr().err
    (tmp_path / "others.txt").write_text("three boats\n")
    for flag, value, key in (("--file", tmp_path / "others.txt", "digest"), ("--tokens", LENGTH + 1, "text")):
        assert main([*args, "blurred", flag, str(value)]) == 1 and key in capsys.readouterr().err
    (tmp_path / "meta.json").write_text((prompts / "meta.json").read_text())
    with pytest.raises(DataError, match=r"shard-00000.safetensors is missing"):
        Prompts(tmp_path)
    with pytest.raises(DataError, match=r"prompts.*give"):
        (tmp_path / "empty.txt").write_text("\n")
        prompts_module.prompts(tmp_path / "e", tmp_path / "empty.txt", str(wan))


def test_trajectories_under_prompts_are_the_teachers_guided_samples(wan, prompts, paths):
    clips = Clips(paths)
    assert len(clips) == 3 and clips.given == 0 and clips.width_of("tokens") == TEXT and not clips.width_of("actions")
    assert clips.latent_size == (16, 4, 6) and clips.meta["guidance"] == 5.0 and clips.meta["text"]["length"] == LENGTH
    assert clips.meta["levels"] == pytest.approx(LEVELS, abs=1e-6)
    drawn = clips.trajectories(2, 0, 0)
    assert (
        drawn.x.shape == (2, 4, FRAMES, 16, 4, 6) and drawn.given == 0 and drawn.cond.tokens.shape == (2, LENGTH, TEXT)
    )
    sampled = clips.latents(2, FRAMES, 0, 0)
    assert torch.equal(sampled.x, drawn.x[:, -1]) and torch.equal(sampled.cond.tokens, drawn.cond.tokens)
    with pytest.raises(DataError, match="clips of 6 latents, not 9"):
        clips.latents(2, 9, 0, 0)
    # the sample is what the teacher makes of that noise under the prompt, not under the negative one
    from vidistill.sampling import sample

    teacher, source = checkpoint.load(wan, "teacher"), open_data(prompts)
    batch = source.batch(2, FRAMES, (16, 4, 6), 0, 0)
    noise = torch.randn(batch.x.shape, generator=torch.Generator().manual_seed(0))
    sigmas = clips.meta["sigmas"]
    want = sample(teacher.net, noise, sigmas, batch.cond, nulls=[batch.cond.null()], scales=[5.0])
    assert torch.allclose(clips.episode("states", 0)[-1].float(), want[0], atol=2e-3 * float(want.abs().max()))


def same_files(one, other):
    """Two data folders hold the same shards and the same record."""
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in other.iterdir()) and "meta.json" in names
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def command(kind, out, *args):
    assert main(["data", kind, str(out), *map(str, args)]) == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trajectories_in_parts_and_under_torchrun_are_those_of_one_process(wan, prompts, tmp_path, capsys, precision):
    args = ["--teacher", wan, "--data", prompts, "--clips", 5, "--frames", 3, "--steps", 4, "--size", "32x48"]
    args += ["--at-once", "2", "--precision", precision]
    command("trajectories", tmp_path / "one", *args)
    for part in ("2/2", "1/2"):
        assert not (tmp_path / "parts").exists()
        command("trajectories", tmp_path / "parts", *args, "--part", part)
    together(2, command, "trajectories", tmp_path / "ranks", *args)
    assert "part 2 is written" in capsys.readouterr().out
    assert same_files(tmp_path / "one", tmp_path / "parts") and same_files(tmp_path / "one", tmp_path / "ranks")
    assert len(Clips(tmp_path / "one")) == 5


def test_prompts_in_parts_and_under_torchrun_are_those_of_one_process(wan, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts_module, "PER_SHARD", 3)
    words = WORDS.split()
    lines = [" ".join(words[k % 5 : k % 5 + 1 + k % 4]) for k in range(8)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    args = ["--file", tmp_path / "list.txt", "--text", wan, "--tokens", LENGTH, "--at-once", 2]
    asked = []
    embed = TextCache.embed
    monkeypatch.setattr(TextCache, "embed", lambda self, some: asked.append(len(some)) or embed(self, some))
    command("prompts", tmp_path / "one", *args)
    assert asked == [2, 1, 1, 2, 1, 2], "the third is the negative prompt, a shard is 3"
    for part in ("2/2", "1/2"):
        assert not (tmp_path / "parts").exists()
        command("prompts", tmp_path / "parts", *args, "--part", part)
    together(2, command, "prompts", tmp_path / "ranks", *args)
    assert same_files(tmp_path / "one", tmp_path / "parts") and same_files(tmp_path / "one", tmp_path / "ranks")
    data, cache = open_data(tmp_path / "one"), TextCache(wan, tmp_path / "cache", length=LENGTH)
    for k, line in enumerate(lines):
        torch.testing.assert_close(data.tokens(k), cache.encode([line])[0], rtol=2e-2, atol=2e-2)
    (tmp_path / "list.txt").write_text("\n".join(lines[:-1]))
    command("prompts", tmp_path / "more", *args, "--part", "1/2")
    (tmp_path / "list.txt").write_text("\n".join([*lines[:-1], "a boat"]))
    assert main(["data", "prompts", *map(str, [tmp_path / "more", *args, "--part", "2/2"])]) == 1


def test_prompts_of_an_earlier_version_are_read(wan, prompts, tmp_path):
    lines, cache = ["blurred", "a red fox runs", "two boats at night"], TextCache(wan, tmp_path / "tokens", length=8)
    cache.encode(lines)
    names = [cache.path(line).name for line in lines]
    meta = json.loads((prompts / "meta.json").read_text())
    meta |= {"prompts": lines[1:], "names": names[1:], "negative_name": names[0]}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    old, new = (open_data(folder).batch(4, FRAMES, (16, 4, 6), 0, 3).cond for folder in (tmp_path, prompts))
    torch.testing.assert_close(old.tokens, new.tokens, rtol=2e-2, atol=2e-2)
    assert torch.equal(old.negative, new.negative)
    (tmp_path / "tokens" / names[1]).unlink()
    with pytest.raises(DataError, match="run `vidistill data prompts` again"):
        open_data(tmp_path).tokens(0)


def test_parts_of_two_settings_are_not_merged(wan, prompts, tmp_path, capsys):
    args = ["--teacher", wan, "--clips", 4, "--frames", 3, "--steps", 4, "--size", "32x48", "--at-once", "2"]
    command("trajectories", tmp_path / "t", *args, "--data", prompts, "--part", "1/2")
    (tmp_path / "list.txt").write_text("a red fox")
    command("prompts", tmp_path / "p", "--file", tmp_path / "list.txt", "--text", wan, "--tokens", LENGTH)
    for other in (["--data", tmp_path / "p"], ["--data", prompts, "--seed", 3], ["--data", prompts, "--at-once", "1"]):
        capsys.readouterr()
        assert main(["data", "trajectories", *map(str, [tmp_path / "t", *args, *other, "--part", "2/2"])]) == 1
        assert "ask for the same to go on" in capsys.readouterr().err
    command("trajectories", tmp_path / "t", *args, "--data", prompts, "--part", "2/2")
    assert main(["data", "trajectories", *map(str, [tmp_path / "t", *args, "--data", prompts, "--seed", 3])]) == 1
    assert "seed 0 where 3 is asked" in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["regression", "teacher_forcing"])
def test_a_student_of_a_published_folder_is_initialised_from_its_samples(wan, paths, tmp_path, objective):
    loss = LossConfig(levels=LEVELS)
    trainer = Trainer(stage(wan, paths, tmp_path, objective=objective, teacher=None, init=str(wan), loss=loss))
    before = {n: p.clone() for n, p in trainer.roles.student.named_parameters()}
    assert np.isfinite(trainer.step()["student/loss"])
    moved = [n for n, p in trainer.roles.student.named_parameters() if not torch.equal(p, before[n])]
    assert any("cross_attn.k" in n for n in moved) and any("text_embedding" in n for n in moved)


def test_a_student_learns_from_prompts_alone_and_streams_what_it_is_told(wan, prompts, tmp_path, monkeypatch, capsys):
    cfg = stage(
        wan, prompts, tmp_path / "runs", precision="bf16", teacher_precision="bf16", critic_lora=LoraConfig(rank=2)
    )
    trainer = Trainer(cfg)
    assert next(trainer.roles.teacher.parameters()).dtype == torch.bfloat16
    assert next(trainer.roles.student.parameters()).dtype == torch.float32
    path = train(cfg)
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["text"] == {"kind": "umt5", "source": str(wan), "length": LENGTH} and record["world"] == {
        "fps": 16.0,
        "temporal": 4,
    }
    assert "names" not in record["card"]["data"] and record["codec"] == str(wan)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    films = []
    for prompt in ("a red fox runs", "two boats at night", "a red fox runs"):
        out = tmp_path / f"{len(films)}.mp4"
        told = ["--prompt", prompt, "--seconds", "0.6", "--scale", "1", "-o", str(out)]
        assert main(["generate", str(path), *told]) == 0
        films.append(out.with_suffix(".png").read_bytes())
    assert films[0] == films[2] and films[0] != films[1]
    assert len(list((tmp_path / "cache" / "vidistill" / "text").glob("*.safetensors"))) == 2


def test_long_streams_on_prompts_score_no_frame_as_given(wan, prompts, tmp_path):
    memory = MemoryConfig("window", frames=6, sinks=1)
    cfg = stage(wan, prompts, tmp_path, long_frames=12, student=StudentConfig(chunk=3, memory=memory))
    trainer = Trainer(cfg)
    first = rolled(trainer)
    trainer.step_count = 1
    later = rolled(trainer)
    assert (first.batch.given, later.batch.given) == (0, 0) and later.skipped == 3
    assert torch.equal(first.batch.cond.tokens, later.batch.cond.tokens), "a stream keeps its prompt"
    assert torch.equal(later.x0[:, 1:3], first.x0[:, 4:6])


def test_a_stream_that_goes_on_reads_its_prompt_and_levels_with_the_weights_of_now(wan, prompts, tmp_path):
    memory = MemoryConfig("window", frames=6, sinks=1)
    trainer = Trainer(stage(wan, prompts, tmp_path, long_frames=12, student=StudentConfig(chunk=3, memory=memory)))
    net, read = trainer.roles.student.net, []
    for module in (net.text_embedding, net.time_embedding):
        module.register_forward_hook(lambda module, args, out: read.append((module, out)))
    for step in range(2):
        trainer.step_count = step
        rolled(trainer)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.1)
    for module in (net.text_embedding, net.time_embedding):
        outs = [out for m, out in read if m is module]
        assert len(outs) > 1 and not any(torch.equal(outs[0], out) for out in outs[len(outs) // 2 :])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent_size": (0, 0)}, "set latent_size"),
        ({"objective": "teacher_forcing", "teacher": None}, "alone, clips"),
        ({"on_policy": False}, "alone, clips"),
        ({"loss": LossConfig(forcing=1.0)}, "recorded clips"),
        ({"latent_size": (3, 6)}, "patches of"),
        ({"teacher_precision": "bf16"}, "needs precision=bf16"),
        ({"schedule": ScheduleConfig(levels=LEVELS, given_chunks=1)}, "given_chunks must be 0"),
    ],
)
def test_what_prompts_cannot_train_is_refused(wan, prompts, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        Trainer(stage(wan, prompts, tmp_path, **settings))


def test_a_folder_of_another_family_is_refused_before_the_first_step(wan, prompts, tmp_path):
    tiny_ltx(16, TEXT).save_pretrained(tmp_path / "ltx" / "transformer")
    (tmp_path / "hunyuan").mkdir()
    save_file({"double_blocks.0.img_attn_qkv.weight": torch.zeros(4, 4)}, tmp_path / "hunyuan" / "model.safetensors")
    for settings, message in (
        ({"init": str(tmp_path / "ltx")}, "is a LTX; one network"),
        ({"critic_init": str(tmp_path / "ltx")}, "critic_init"),
        ({"init": str(tmp_path / "hunyuan")}, "HunyuanVideo"),
        ({"teacher": str(tmp_path / "hunyuan"), "init": str(wan)}, "HunyuanVideo"),
    ):
        with pytest.raises(ValueError, match=message):
            train(stage(wan, prompts, tmp_path / "runs", **settings))
    assert not list((tmp_path / "runs").glob("*/*"))


def test_text_of_another_width_is_refused(wan, prompts, tmp_path):
    from tiny_wan import transformer

    transformer(text_dim=12).save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match="12 numbers"):
        Trainer(stage(tmp_path, prompts, tmp_path))
    with pytest.raises(DataError, match=r"listens.*12 numbers"):
        ode_pairs.trajectories(tmp_path / "t", str(tmp_path), prompts, clips=1, frames=3, size=(32, 32))
    with pytest.raises(DataError, match=r"latents.*8 pixels"):
        ode_pairs.trajectories(tmp_path / "t", str(wan), prompts, clips=1, frames=3, size=(30, 32))


# --- one door for published networks ----------------------------------------------------------------------------------


def test_a_folder_is_a_teacher_and_a_codec_of_the_same_door_as_our_own_checkpoints(wan, tmp_path):
    bundle = checkpoint.load(wan, dtype=torch.bfloat16)
    assert bundle.kind == "teacher" and bundle.noise.shift == 5.0 and bundle.record["guidance"] == 5.0
    assert {p.dtype for p in bundle.net.parameters()} == {torch.bfloat16} and bundle.net.cfg.text_dim == TEXT
    codec = checkpoint.load_codec(bundle)
    assert codec.temporal_factor == 4 and codec.latent_channels == 16
    assert not any(p.requires_grad for p in bundle.net.parameters())
    with pytest.raises(checkpoint.CheckpointError, match="vidistill convert"):
        checkpoint.load(wan, "student")
    with pytest.raises(checkpoint.CheckpointError, match=r"safetensors.*transformer"):
        checkpoint.load(tmp_path, "teacher")
    with pytest.raises(checkpoint.CheckpointError, match="no codec"):
        checkpoint.load(tmp_path, "codec")
    with pytest.raises(checkpoint.CheckpointError, match="not bundled"):
        checkpoint.load_codec(replace(bundle, record={"codec": "wan"}))


def test_the_original_layout_trains_through_the_same_door(wan, prompts, tmp_path):

    from vidistill.interop.keys import infer_config, to_original, to_ours

    state = load_file(wan / "transformer" / "diffusion_pytorch_model.safetensors")
    original = to_original(to_ours(state), infer_config(state, heads=2))
    save_file({k: v.contiguous() for k, v in original.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 2, "eps": 1e-6}))
    one, two = (Trainer(stage(folder, prompts, tmp_path / "runs", codec=None)) for folder in (wan, tmp_path))
    assert one.step() == two.step()


def test_a_teacher_of_two_experts_needs_one_network_for_the_critic_and_then_trains(wan, prompts, tmp_path):
    from tiny_wan import transformer

    for seed, name in enumerate(("transformer", "transformer_2")):
        transformer(seed).save_pretrained(tmp_path / name)
    cfg = stage(tmp_path, prompts, tmp_path / "runs", init=str(wan), codec=None)
    with pytest.raises(ValueError, match=r"name.*critic_init"):
        Trainer(cfg)
    logs = Trainer(replace(cfg, critic_init=str(wan))).step()
    assert np.isfinite(logs["student/loss"]) and logs["student/grad_norm"] > 0


def test_a_published_tiny_codec_is_opened_by_its_file_name(tmp_path):

    from vidistill.codecs import build_codec

    codec = build_codec("taew2_1")
    save_file({k: v for k, v in codec.state_dict().items() if "latent_" not in k}, tmp_path / "taew2_1.safetensors")
    opened = checkpoint.load(tmp_path / "taew2_1.safetensors", "codec").net
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), codec.parameters(), strict=True))
