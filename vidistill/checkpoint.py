"""Checkpoints that can rebuild what they hold: safetensors for numbers, JSON for the rest, written atomically."""

import difflib
import json
import logging
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vidistill import record as records
from vidistill.codecs import GEOMETRIES, Codec, build_codec, codec_record, open_codec
from vidistill.codecs.tiny import TinyCodec
from vidistill.conditioning.condition import Encode
from vidistill.conditioning.controls import held_names, shows_picture
from vidistill.conditioning.text import NgramConfig, Ngrams
from vidistill.config import ConfigError, build
from vidistill.diffusion import LatentShape, NoiseSchedule
from vidistill.io import is_ours, may_download, picture_files, read_image, read_json, write_json
from vidistill.models.dit import VideoDiT
from vidistill.models.student import CausalStudent
from vidistill.record import FORMAT, Record
from vidistill.schedules import ScheduleConfig, evaluations
from vidistill.teachers.image_encoder import ImageEncoder
from vidistill.teachers.load import read_teacher
from vidistill.teachers.text_encoder import TextCache, cache_folder
from vidistill.tensors import (
    CheckpointError,
    check_header,
    checksum,
    load_into,
    read_tensors,
    save_tensors,
    stored_dtype,
)

log = logging.getLogger("vidistill")

HUB = "hf://"  # what a hub id is written with where a path is expected


@dataclass
class Bundle:
    """A loaded network and the record that rebuilt it. `kind` is one of KINDS; `folder` holds its files."""

    name: str
    kind: str
    net: Any
    record: dict[str, Any]
    folder: Path = Path(".")

    @cached_property
    def spec(self) -> Record:
        """The record, checked and typed."""
        return parse({"kind": self.kind, **self.record}, self.name, needs=False)

    @property
    def shape(self) -> LatentShape:
        return self._part("shape", self.spec.shape)

    @property
    def noise(self) -> NoiseSchedule:
        return self._part("noise", self.spec.noise)

    @property
    def schedule(self) -> ScheduleConfig:
        return self._part("schedule", self.spec.schedule)

    def _part(self, name: str, part: Any) -> Any:
        if part is None:
            raise CheckpointError(f"the record of {self.name} has no {name}")
        return part

    @property
    def given_frames(self) -> int:
        """Latent frames a student is given at the start: whole chunks, or pinned ones inside its first chunk."""
        given = self.spec.given_frames
        return self.net.first_frame(self.schedule.given_chunks) if given is None else given

    @property
    def picture_frames(self) -> int:
        """Latent frames of the picture, or the clip, that a student's clips start from; 0: they start from noise."""
        shown = self.spec.dit is not None and shows_picture(self.spec.dit)
        return 1 if shown else self.given_frames

    def start_image(self, codec: Codec, path: str | Path | None = None) -> np.ndarray | None:
        """The picture at `path`, else a bundled one, uint8 [H, W, 3] at the size of a student that starts from one.

        None for a student that starts from noise, and where no picture is bundled; ValueError for a picture given to a
        student that takes none.
        """
        if not self.picture_frames:
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
    tensors = {n: t.detach().contiguous().cpu() for n, t in tensors.items()}
    bad = [n for n, t in tensors.items() if not t.isfinite().all()]
    if bad:
        raise CheckpointError(f"{path} is not written: {', '.join(bad[:5])} is not finite in {dtype or 'the source'}")
    full = {"format": FORMAT, **describe(net), **record, "sha256": checksum(tensors)}
    parse(json.loads(json.dumps(full)), f"{path} is not written", needs=False)
    info = {"format": FORMAT, "kind": full["kind"], **architecture(full)}
    save_tensors(with_extension(path, ".safetensors"), tensors, info)
    write_json(with_extension(path, ".json"), full)


def with_extension(path: Path, suffix: str) -> Path:
    """`path` with `suffix` added; a dot in its name is part of the name."""
    return path.with_name(path.name + suffix)


def architecture(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a record that weights belong to: written beside them, it shows when another one is put there."""
    return {name: record[name] for name in ("dit", "codec_config") if record.get(name) is not None}


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
    """Short hash of the checkout this runs from, None where this file is not part of one."""
    here = Path(__file__)

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, cwd=here.parent, check=True)
        return done.stdout.decode().strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # else an installed package in somebody else's repository
        return git("rev-parse", "--short", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None


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
    if str(name) in read_json(zoo_folder() / "clone_only.json"):
        raise CheckpointError(f"{name} is a control that installed packages leave out; it is in a clone of the source")
    if not Path(name).name:
        raise CheckpointError(f"no checkpoint {str(name)!r}: give a bundled name, or the path of one")
    if Path(name).exists():
        raise CheckpointError(
            f"{name} is no checkpoint of ours: make one of it with `vidistill convert {name} OUT --family FAMILY`"
        )
    near = difflib.get_close_matches(str(name), names, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"bundled names: {', '.join(names) or 'none'}"
    if len(Path(name).parts) > 1:
        hint = f"a run leaves it when it is finished: train that stage first, or name another; {hint}"
    raise CheckpointError(f"no checkpoint {str(name)!r}: neither a file nor a bundled name; {hint}")


def find_checkpoint(name: str | Path) -> Path | None:
    """Path (without suffix) of a checkpoint of ours on disk: a file of it, or the folder of the run that made it.

    Beside a bundled name only a file that is a record counts: others may be called so, too.
    """
    path = Path(name).with_suffix("") if str(name).endswith((".safetensors", ".json")) else Path(name)
    if not path.name:
        return None
    found = next((p for p in (path, path / path.name) if with_extension(p, ".json").is_file()), None)
    if found and str(name) in zoo_names() and not is_ours(with_extension(found, ".json")):
        log.warning("%s.json here is no checkpoint of ours: taking the bundled %s", found, name)
        return None
    return found


def start_pictures(name: str | Path) -> list[Path]:
    """Picture files a checkpoint's clips can start from.

    NAME-starts beside it or beside its family's name, else the bundled ones of its family or of its codec's.
    """
    path = locate(name)
    families = [path.name.split("-")[0], Path(read_record(path).get("codec") or "").name.split("-")[0]]
    folders = [path.with_name(f"{stem}-starts") for stem in (path.name, families[0])]
    folders += [zoo_folder() / f"{family}-starts" for family in families]
    return next((picture_files(f) for f in folders if f.is_dir()), [])


def load(
    name: str | Path, kind: str | None = None, dtype: torch.dtype | None = torch.float32, offline: bool = False
) -> Bundle:
    """The network of a checkpoint, ready to run, its weights in `dtype`; CheckpointError names what is wrong with it.

    None: weights in the precision they were stored in, mapped from their file and not copied, where it can be mapped.
    Published networks come through the same door: a folder (diffusers' layout, or Wan's own) or `hf://ORG/NAME` is a
    teacher, or a codec if `kind` says so. offline: the hub is not asked; see `load_named`.
    """
    if is_published(name):
        return load_published(str(name), kind, dtype, offline)
    path = locate(name)
    record = read_record(path)
    if kind and record["kind"] != kind:
        raise CheckpointError(f"{name} is a {record['kind']}, a {kind} is needed here")
    tensors = read_weights(path, record)
    with torch.device("meta"):
        net = rebuild(record, f"{path}.json").to(dtype or stored_dtype(tensors))
    load_into(net, tensors, str(path))
    record |= {"world": record.get("world") or {}, "card": record.get("card") or {}}
    return Bundle(path.name, record["kind"], net.eval().requires_grad_(False), record, path.parent)


def load_named(name: str | Path, kind: str | None = None) -> Bundle:
    """What a record or the meta of data names, not the user: it is not downloaded, unless `io.may_download` says so."""
    return load(name, kind, offline=not may_download())


def read_weights(path: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the checkpoint at `path` (without suffix); CheckpointError unless they are those of its record."""
    tensors, info = read_tensors(with_extension(path, ".safetensors"), record.get("sha256"))
    check_architecture(info, record, path)
    return tensors


def check_architecture(info: Mapping[str, Any], record: Mapping[str, Any], path: Path) -> None:
    """CheckpointError if the weights at `path` were saved with another network than its record describes."""
    if not isinstance(info, dict):
        raise CheckpointError(f"{path}.safetensors has a damaged header; restore it or train again")
    saved, said = (
        parse({"kind": record["kind"], **architecture(part)}, str(path), needs=False) for part in (info, record)
    )
    pairs = [("dit", saved.dit, said.dit), ("codec_config", saved.geometry, said.geometry)]
    for part, mine, theirs in pairs:
        other = [] if mine is None or theirs is None else [k for k, v in vars(mine).items() if v != vars(theirs)[k]]
        if other:
            found = f"{part}.{other[0]} is {vars(theirs)[other[0]]} there and {vars(mine)[other[0]]} in the weights"
            raise CheckpointError(f"{path}.json was changed after its weights were saved: {found}; restore it")


def is_published(name: str | Path) -> bool:
    """Whether `name` is a folder, a hub id or a codec file of somebody else; our own checkpoints come first."""
    path = Path(name)
    if find_checkpoint(path):
        return False
    if str(name).startswith(HUB) or (path.is_dir() and str(name) not in zoo_names()):
        return True
    return path.suffix == ".safetensors" and path.stem in GEOMETRIES and path.is_file()


def load_published(name: str, kind: str | None, dtype: torch.dtype | None, offline: bool) -> Bundle:
    """A published teacher or codec as a bundle with the record that training and sampling read."""
    if kind == "student":
        raise CheckpointError(
            f"{name} holds no checkpoint of ours; make a student of a published network with `vidistill convert`"
        )
    try:
        if kind == "codec" or name.endswith(".safetensors"):
            codec: Any = open_codec(name.removeprefix(HUB), offline)
            if codec is None:
                raise CheckpointError(f"{name} holds no codec: no vae/config.json of diffusers")
            return Bundle(Path(name).name, "codec", codec.eval().requires_grad_(False), {"kind": "codec"})
        wanted = "" if dtype is None else str(dtype).removeprefix("torch.")
        teacher = read_teacher(name.removeprefix(HUB), dtype=wanted, offline=offline)
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
    """The record of the checkpoint at `path` (without suffix); CheckpointError if it is damaged or not ours.

    Every value in it has its type and a possible size, see `record.Record`.
    """
    try:
        record = read_json(with_extension(path, ".json"), records.MAX_RECORD)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    parse({"format": None, **record} if isinstance(record, dict) else record, f"{path}.json")
    return dict(record)


def parse(record: Any, where: str, needs: bool = True) -> Record:
    """The typed record; CheckpointError names `where` it is from, and what is missing or impossible."""
    try:
        return records.read(record, needs)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def rebuild(record: Mapping[str, Any], where: str = "this record") -> nn.Module:
    """An untrained network of the architecture in `record`; CheckpointError names `where` it is from."""
    spec = parse(record, where, needs=False)
    try:
        if spec.kind == "codec" and spec.geometry:
            codec: Any = build_codec(spec.geometry)
            return codec
        if spec.kind == "teacher" and spec.dit:
            return VideoDiT(spec.dit)
        if spec.kind == "student" and spec.dit and spec.student and spec.shape:
            return CausalStudent(VideoDiT(spec.dit), spec.student, spec.shape)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{where} does not describe a network that can be built: {error}") from error
    raise CheckpointError(f"{where} lacks {' or '.join(records.NEEDED[spec.kind][:3])}, which a {spec.kind} needs")


def load_teacher(name: str | Path) -> Bundle:
    """A teacher ready to sample: ours, a published folder or hf://ORG/NAME; `bundle.net` is a `Denoiser`."""
    return load(name, "teacher")


def beside(folder: Path, name: str) -> Path | None:
    """The checkpoint `name` that a record in `folder` speaks of: there, or from a folder above, as it was trained."""
    near = (place / name for place in (folder, *folder.resolve().parents))
    return next((path for path in near if with_extension(path, ".json").is_file()), None)


def load_codec(source: str | Path | Bundle) -> Codec:
    """The codec of this name or path; of a bundle, the one its network was trained on, wherever it is loaded from."""
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
    found: Codec = load_named(beside(bundle.folder, name) or name, "codec").net
    return found


def text_encoder(
    record: Mapping[str, Any], folder: str | Path | None = None, offline: bool | None = None
) -> Encode | None:
    """What reads prompts for the network of a record, None if it names no text encoder; nothing is loaded yet.

    folder: where embeddings are kept (default: the user's cache, whatever the record says of it). offline: whether the
    encoder has to be on this machine (default: yes, unless `io.may_download` says otherwise).
    """
    if not record.get("text"):
        return None
    try:
        cfg = records.read_text_config(record["text"])
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    if isinstance(cfg, NgramConfig):
        return Ngrams(cfg).encode
    if cfg.folder and folder is None:
        log.warning("text.folder %s of the record is not used: embeddings are kept in %s", cfg.folder, cache_folder())
    offline = not may_download() if offline is None else offline
    return TextCache(cfg.source, folder or cache_folder(), length=cfg.length, offline=offline).encode


def image_encoder(record: Mapping[str, Any]) -> Callable[[Sequence[np.ndarray]], Tensor] | None:
    """What reads start pictures for the network of a record, None if it is told no tokens of them; nothing is loaded
    yet, nor downloaded, unless `io.may_download` says so."""
    image = record.get("image")
    return ImageEncoder(image["source"], offline=not may_download()).encode if image else None


def takes_audio(name: str | Path) -> bool:
    """Whether a checkpoint hears audio."""
    return bool(read_record(locate(name)).get("audio"))


def takes_prompts(name: str | Path) -> bool:
    """Whether a checkpoint is a student that reads prompts."""
    record = read_record(locate(name))
    return record["kind"] == "student" and text_encoder(record) is not None


def load_student(name: str | Path) -> Bundle:
    """A student ready to stream: `bundle.net` is a CausalStudent, `bundle.schedule` its passes."""
    return load(name, "student")


def summary(name: str | Path) -> dict[str, Any]:
    """What a checkpoint is: kind, sizes, world, schedule with evaluations per chunk, card, whose alias its name is."""
    path = locate(name)
    record = read_record(path)
    spec = parse(record, f"{path}.json", needs=False)
    weights = with_extension(path, ".safetensors")
    with torch.device("meta"):
        net = rebuild(record, f"{path}.json")
    check_header(weights, net)
    row = {
        "kind": record["kind"],
        "parameters": sum(p.numel() for p in net.parameters()),
        "bytes": weights.stat().st_size,
        "card": record.get("card") or {},
        "world": record.get("world") or {},
        "actions": list(held_names(spec.played, spec.dit.sites if spec.dit else ())),
    }
    if str(name) in zoo_names() and path.name != str(name):
        row["alias_of"] = path.name
    if isinstance(net, CausalStudent):
        row["schedule"] = record["schedule"]
        cfg, dit = net.cfg.memory, net.net.cfg
        row["memory"] = cfg.account(net.shape.grid, layers=dit.layers, width=dit.width, heads=dit.heads)
        row["nfe_per_chunk"] = evaluations(build(ScheduleConfig, record["schedule"]), 7)
        row["nfe_7_chunks"] = sum(row["nfe_per_chunk"])
    return row
