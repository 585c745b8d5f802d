"""Checkpoints that can rebuild what they hold: safetensors for numbers, JSON for the rest, written atomically."""

import difflib
import hashlib
import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vidistill.codecs import GEOMETRIES, Codec, build_codec, codec_record, open_codec
from vidistill.codecs.tiny import TinyCodec
from vidistill.conditioning.condition import Encode
from vidistill.conditioning.text import NgramConfig, Ngrams
from vidistill.config import build
from vidistill.diffusion import LatentShape, NoiseSchedule
from vidistill.io import read_image, read_json, write_atomic, write_json
from vidistill.models.dit import VideoDiT
from vidistill.models.layers import DiTConfig
from vidistill.models.student import CausalStudent, StudentConfig
from vidistill.schedules import ScheduleConfig, evaluations
from vidistill.teachers.load import read_teacher
from vidistill.teachers.text_encoder import TextCache, cache_folder

FORMAT = 1
KINDS = ("codec", "teacher", "student")
HUB = "hf://"  # what a hub id is written with where a path is expected


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which file and why."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """One safetensors file whose header carries `info` as JSON."""
    flat = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    header = {"vidistill": json.dumps(info)}
    header["checksum"] = checksum(flat, header["vidistill"])

    def write(temporary: Path) -> None:
        save_file(flat, temporary, metadata=header)
        read_tensors(temporary)  # what is there stays until this one is known to be whole

    write_atomic(path, write)


def checksum(tensors: Mapping[str, Tensor], info: str) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors on the CPU, and of the text beside them."""
    digest = hashlib.sha256(info.encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        digest.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and info of a file written by `save_tensors`; CheckpointError if it is missing, damaged or foreign.

    Files of earlier versions carry no checksum.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            info = json.loads(header.get("vidistill", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if "checksum" in header and header["checksum"] != checksum(tensors, header.get("vidistill", "")):
            raise ValueError("its checksum is another")
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({error}); restore it or train again") from error
    if info is None:
        raise CheckpointError(f"{path} holds no vidistill checkpoint; foreign files are read by `vidistill convert`")
    return tensors, info


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load float tensors of any precision into `module`; CheckpointError lists what does not fit.

    A module on the meta device takes over tensors that have its precision already: nothing is copied.
    """
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    wrong = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if tensors[name].shape != own[name].shape
    ]
    for label, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", sorted(wrong))):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise CheckpointError(f"{where}: {label} weights: {', '.join(names[:5])}{more}")
    empty = any(x.is_meta for x in own.values())
    module.load_state_dict({name: tensors[name].to(own[name].dtype) for name in own}, assign=empty)


@dataclass
class Bundle:
    """A loaded network and the record that rebuilt it. `kind` is one of KINDS; `folder` holds its files."""

    name: str
    kind: str
    net: Any
    record: dict[str, Any]
    folder: Path = Path(".")

    @property
    def shape(self) -> LatentShape:
        return build(LatentShape, self.record["shape"])

    @property
    def noise(self) -> NoiseSchedule:
        return build(NoiseSchedule, self.record["noise"])

    @property
    def schedule(self) -> ScheduleConfig:
        return build(ScheduleConfig, self.record["schedule"])

    @property
    def given_frames(self) -> int:
        """Latent frames a student is given at the start: whole chunks, or pinned ones inside its first chunk."""
        given: int = self.record.get("given_frames", self.net.first_frame(self.schedule.given_chunks))
        return given

    def start_image(self, codec: Codec, path: str | Path | None = None) -> np.ndarray | None:
        """The picture at `path`, else a bundled one, uint8 [H, W, 3] at the size of a student that starts from one.

        None for a student that starts from noise, and where no picture is bundled; ValueError for a picture given to a
        student that takes none.
        """
        if not self.given_frames:
            if path is not None:
                raise ValueError(f"{self.name} starts from noise and takes no picture ({path}): leave it out")
            return None
        picture = path or next(iter(start_pictures(self.folder / self.name)), None)
        size = (self.shape.height * codec.spatial_factor, self.shape.width * codec.spatial_factor)
        return None if picture is None else read_image(picture, size)


def export(
    path: str | Path, net: nn.Module, record: Mapping[str, Any], dtype: torch.dtype | None = torch.float16
) -> None:
    """Write `net` as PATH.safetensors and PATH.json (record: architecture, provenance, card).

    Weights are stored in `dtype`; None: each in the precision it has.
    """
    path = Path(path)
    tensors = {n: t.to(dtype) if dtype and t.is_floating_point() else t for n, t in net.state_dict().items()}
    bad = [n for n, t in tensors.items() if not t.isfinite().all()]
    if bad:
        raise CheckpointError(f"{path} is not written: {', '.join(bad[:5])} is not finite in {dtype or 'the source'}")
    full = {"format": FORMAT, **describe(net), **record}
    save_tensors(with_extension(path, ".safetensors"), tensors, {"format": FORMAT, "kind": full["kind"]})
    write_json(with_extension(path, ".json"), full)


def with_extension(path: Path, suffix: str) -> Path:
    """`path` with `suffix` added; a dot in its name is part of the name."""
    return path.with_name(path.name + suffix)


def describe(net: nn.Module) -> dict[str, Any]:
    """The part of a record that follows from the network itself."""
    if isinstance(net, TinyCodec):
        return {"kind": "codec", "codec_config": codec_record(net)}
    if isinstance(net, CausalStudent):
        return {
            "kind": "student",
            "dit": asdict(net.net.cfg),
            "student": asdict(net.cfg),
            "shape": asdict(net.shape),
        }
    assert isinstance(net, VideoDiT)
    return {"kind": "teacher", "dit": asdict(net.cfg)}


def git_commit() -> str | None:
    """Short hash of the checkout this runs from, None outside one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def zoo_folder() -> Path:
    return Path(str(resources.files("vidistill") / "zoo"))


def zoo_names() -> dict[str, str]:
    """Bundled names -> file stem; aliases included."""
    folder = zoo_folder()
    names = {p.stem: p.stem for p in sorted(folder.glob("*.json")) if p.stem not in ("aliases", "clone_only")}
    aliases = folder / "aliases.json"
    if aliases.is_file():
        names.update(read_json(aliases))
    return names


def locate(name: str | Path) -> Path:
    """Path (without suffix) of a checkpoint: a bundled name, a file of it, or the folder of its run."""
    if path := find_checkpoint(name):
        return path
    names = zoo_names()
    if str(name) in names:
        return zoo_folder() / names[str(name)]
    if str(name) in json.loads((zoo_folder() / "clone_only.json").read_text()):
        raise CheckpointError(f"{name} is a control that installed packages leave out; it is in a clone of the source")
    near = difflib.get_close_matches(str(name), names, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"bundled names: {', '.join(names) or 'none'}"
    if len(Path(name).parts) > 1:
        hint = f"a run leaves it when it is finished: train that stage first, or name another; {hint}"
    raise CheckpointError(f"no checkpoint {str(name)!r}: neither a file nor a bundled name; {hint}")


def find_checkpoint(name: str | Path) -> Path | None:
    """Path (without suffix) of a checkpoint of ours on disk: a file of it, or the folder of the run that made it."""
    path = Path(name).with_suffix("") if str(name).endswith((".safetensors", ".json")) else Path(name)
    return next((p for p in (path, path / path.name) if with_extension(p, ".json").is_file()), None)


def start_pictures(name: str | Path) -> list[Path]:
    """Picture files (PNG) a checkpoint's clips can start from.

    NAME-starts beside it or beside its family's name, else the bundled ones of its family or of its codec's.
    """
    path = locate(name)
    families = [path.name.split("-")[0], Path(read_record(path).get("codec") or "").name.split("-")[0]]
    folders = [path.with_name(f"{stem}-starts") for stem in (path.name, families[0])]
    folders += [zoo_folder() / f"{family}-starts" for family in families]
    return next((sorted(f.glob("*.png")) for f in folders if f.is_dir()), [])


def load(name: str | Path, kind: str | None = None, dtype: torch.dtype = torch.float32) -> Bundle:
    """The network of a checkpoint, ready to run, its weights in `dtype`; CheckpointError names what is wrong with it.

    Published networks come through the same door: a folder (diffusers' layout, or Wan's own) or `hf://ORG/NAME` is a
    teacher, or a codec if `kind` says so.
    """
    if is_published(name):
        return load_published(str(name), kind, dtype)
    path = locate(name)
    record = read_record(path)
    if kind and record["kind"] != kind:
        raise CheckpointError(f"{name} is a {record['kind']}, a {kind} is needed here")
    tensors, _ = read_tensors(with_extension(path, ".safetensors"))
    with torch.device("meta"):
        net = rebuild(record, f"{path}.json").to(dtype)
    load_into(net, tensors, str(path))
    return Bundle(path.name, record["kind"], net.eval().requires_grad_(False), record, path.parent)


def is_published(name: str | Path) -> bool:
    """Whether `name` is a folder, a hub id or a codec file of somebody else; our own checkpoints come first."""
    path = Path(name)
    if find_checkpoint(path):
        return False
    if str(name).startswith(HUB) or (path.is_dir() and str(name) not in zoo_names()):
        return True
    return path.suffix == ".safetensors" and path.stem in GEOMETRIES and path.is_file()


def load_published(name: str, kind: str | None, dtype: torch.dtype) -> Bundle:
    """A published teacher or codec as a bundle with the record that training and sampling read."""
    if kind == "student":
        raise CheckpointError(
            f"{name} holds no checkpoint of ours; make a student of a published network with `vidistill convert`"
        )
    try:
        if kind == "codec" or name.endswith(".safetensors"):
            codec: Any = open_codec(name.removeprefix(HUB))
            if codec is None:
                raise CheckpointError(f"{name} holds no codec: no vae/config.json of diffusers")
            return Bundle(Path(name).name, "codec", codec.eval().requires_grad_(False), {"kind": "codec"})
        teacher = read_teacher(name.removeprefix(HUB), dtype=str(dtype).removeprefix("torch."))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{name} cannot be loaded: {error}") from error
    record = {
        "kind": "teacher",
        "shape": asdict(teacher.shape),
        "noise": asdict(teacher.noise),
        "guidance": teacher.guidance,
        "world": dict(teacher.world),
        "codec": name if name.startswith(HUB) or (Path(name) / "vae").is_dir() else teacher.codec,
        "card": {"source": teacher.name},
    }
    if isinstance(teacher.net, VideoDiT):
        record["dit"] = asdict(teacher.net.cfg)
    return Bundle(Path(name).name, "teacher", teacher.net, record)


def read_record(path: Path) -> dict[str, Any]:
    """The record of the checkpoint at `path` (without suffix); CheckpointError if it is damaged or not ours."""
    try:
        record = read_json(with_extension(path, ".json"))
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{path}.json has format {found!r}; this version reads {FORMAT}")
    if record.get("kind") not in KINDS:
        raise CheckpointError(f"{path}.json is a {record.get('kind')!r}; networks are {', '.join(KINDS)}")
    return record


def rebuild(record: Mapping[str, Any], where: str = "this record") -> nn.Module:
    """An untrained network of the architecture in `record`; CheckpointError names `where` it is from."""
    try:
        return network(record)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where} does not describe a network that can be built: {error!r}") from error


def network(record: Mapping[str, Any]) -> nn.Module:
    if record["kind"] == "codec":
        codec: Any = build_codec(record["codec_config"])
        return codec
    net = VideoDiT(build(DiTConfig, record["dit"]))
    if record["kind"] == "teacher":
        return net
    return CausalStudent(net, build(StudentConfig, record["student"]), build(LatentShape, record["shape"]))


def load_teacher(name: str | Path) -> Bundle:
    """A teacher ready to sample: ours, a published folder or hf://ORG/NAME; `bundle.net` is a `Denoiser`."""
    return load(name, "teacher")


def load_codec(source: str | Path | Bundle) -> Codec:
    """The codec of this name or path; of a bundle, the one its network was trained on."""
    if not isinstance(source, Bundle):
        codec: Codec = load(source, "codec").net
        return codec
    bundle, name = source, source.record["codec"]
    if not name:
        raise CheckpointError(f"{bundle.name} names no codec: its latents cannot be decoded")
    if name in GEOMETRIES:
        raise CheckpointError(
            f"{bundle.name} says that its codec is {name!r}, which is not bundled: write the path of one, a diffusers "
            f"folder with `vae` or a file such as taew2_1.safetensors, as `codec` into {bundle.name}.json"
        )
    near = bundle.folder / name
    return load_codec(near if with_extension(near, ".json").is_file() else name)


def text_encoder(record: Mapping[str, Any]) -> Encode | None:
    """What reads prompts for the network of a record, None if it names no text encoder; nothing is loaded yet."""
    described = dict(record.get("text") or {})
    if not described:
        return None
    kind = described.pop("kind", None)
    if kind not in ENCODERS:
        raise CheckpointError(f"text encoder {kind!r} is unknown; known: {', '.join(ENCODERS)}")
    return ENCODERS[kind](described)


def takes_audio(name: str | Path) -> bool:
    """Whether a checkpoint hears audio."""
    return bool(read_record(locate(name)).get("audio"))


def takes_prompts(name: str | Path) -> bool:
    """Whether a checkpoint is a student that reads prompts."""
    record = read_record(locate(name))
    return record["kind"] == "student" and text_encoder(record) is not None


ENCODERS: dict[str, Callable[[Mapping[str, Any]], Encode]] = {
    "ngrams": lambda described: Ngrams(build(NgramConfig, described)).encode,
    "umt5": lambda described: TextCache(**{"folder": cache_folder(), **described}).encode,
}


def load_student(name: str | Path) -> Bundle:
    """A student ready to stream: `bundle.net` is a CausalStudent, `bundle.schedule` its passes."""
    return load(name, "student")


def summary(name: str | Path) -> dict[str, Any]:
    """What a checkpoint is: kind, sizes, world, schedule with evaluations per chunk, card, whose alias its name is."""
    path = locate(name)
    record = read_record(path)
    with torch.device("meta"):
        net = rebuild(record, f"{path}.json")
    row = {
        "kind": record["kind"],
        "parameters": sum(p.numel() for p in net.parameters()),
        "bytes": with_extension(path, ".safetensors").stat().st_size,
        "card": record.get("card", {}),
        "world": record.get("world", {}),
    }
    if str(name) in zoo_names() and path.name != str(name):
        row["alias_of"] = path.name
    if record["kind"] == "student":
        schedule = build(ScheduleConfig, record["schedule"])
        row["schedule"] = record["schedule"]
        cfg, dit = net.cfg.memory, net.net.cfg
        row["memory"] = cfg.account(net.shape.grid, layers=dit.layers, width=dit.width, heads=dit.heads)
        row["nfe_per_chunk"] = evaluations(schedule, 7)
        row["nfe_7_chunks"] = sum(row["nfe_per_chunk"])
    return row
