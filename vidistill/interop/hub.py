"""Checkpoints of ours on the Hugging Face hub: what a model card says of them, and the upload."""

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidistill import __version__, checkpoint
from vidistill.checkpoint import CheckpointError, with_extension
from vidistill.conditioning.controls import shows_picture
from vidistill.interop.export import LAYOUTS, export_as
from vidistill.interop.families import LAYOUT, NON_COMMERCIAL
from vidistill.io import read_json, write_json, write_text

REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
LICENCES = {"Apache-2.0": "apache-2.0", NON_COMMERCIAL: "cc-by-nc-sa-4.0"}  # as cards here say it -> as the hub does
NC = "cc-by-nc"  # how the hub's names of non-commercial licences begin
TRANSPORTS = ("http", "requests", "urllib3")  # packages whose errors are those of the connection
DEEPEST = 10  # parents of parents that are looked up


@dataclass(frozen=True)
class Ancestor:
    """A network that another one was made from. `licence` empty: nothing says it."""

    name: str
    what: str
    licence: str = ""


def publish(
    name: str | Path,
    repo: str,
    *,
    to: str = "ours",
    licence: str | None = None,
    private: bool = False,
    endpoint: str | None = None,
) -> str:
    """Upload a checkpoint of ours with a card to the hub repository ORG/NAME; returns its address.

    `to`: the layout, as in `export_as`. `licence`: the hub's name of one, where the card of the checkpoint says none.
    `endpoint`: another hub. Raises ValueError before anything leaves this machine for a name that is none, an unknown
    or contradicting licence, a hub that is not reached, and a token that is missing or has no rights.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError("publishing needs huggingface_hub: pip install 'vidistill[hub]'") from error
    if not REPO.fullmatch(repo):
        raise ValueError(f"{repo!r} is no repository of the hub: ORG/NAME, of letters, digits, '.', '-' and '_'")
    if to not in LAYOUTS:
        raise ValueError(f"--to {to!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    card = model_card(name, repo, to, licence)
    api = HfApi(endpoint=endpoint)
    with calls(api.endpoint, repo):
        api.whoami()
        url = api.create_repo(repo, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vidistill-publish-") as folder:
        stage(name, to, Path(folder), card)
        with calls(api.endpoint, repo):
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Upload {Path(str(name)).name}")
    return str(url)


@contextlib.contextmanager
def calls(endpoint: str, repo: str) -> Iterator[None]:
    """Errors of calls to the hub as ValueErrors that say what to do."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ValueError("the hub needs a token: log in with `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        raise ValueError(f"the hub refuses {repo}: {reason(error)}; may this token write there?") from error
    except Exception as error:
        if not (isinstance(error, OSError) or type(error).__module__.startswith(TRANSPORTS)):
            raise
        raise ValueError(f"the hub at {endpoint} is not reached ({error}): run the command again online") from error


def reason(error: Exception) -> str:
    """The first line of what the hub said."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def stage(name: str | Path, to: str, folder: Path, card: str) -> None:
    """Fill `folder` with what is uploaded: weights, records without local paths, a codec of ours, the card."""
    path = checkpoint.locate(name)
    out = folder / f"{path.name}{LAYOUTS[to][0]}" if to != "diffusers" else folder / "diffusers"
    export_as(name, to, out)
    if to == "diffusers":
        for item in out.iterdir():
            shutil.move(item, folder / item.name)
        out.rmdir()
    codec = checkpoint.read_record(path).get("codec") or ""
    local = next(
        (p for p in (path.parent / codec, Path(codec)) if codec and with_extension(p, ".json").is_file()), None
    )
    if to == "ours" and local is not None:
        for suffix in (".safetensors", ".json"):
            shutil.copyfile(with_extension(local, suffix), folder / f"{local.name}{suffix}")
    for record in folder.glob("*.json"):
        write_json(record, portable(read_json(record)))
    write_text(folder / "README.md", card)


def portable(value: Any) -> Any:
    """A record in which a path of this machine is the name of what it leads to."""
    if isinstance(value, dict):
        return {key: portable(x) for key, x in value.items()}
    if isinstance(value, list):
        return [portable(x) for x in value]
    if isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("~", "../"))):
        return Path(value).name
    return value


# --- the card ---------------------------------------------------------------------------------------------------------


def lineage(record: Mapping[str, Any], depth: int = DEEPEST) -> Iterator[Ancestor]:
    """What a checkpoint was made from, nearest first; parents whose records are here say theirs in turn."""
    card = record.get("card", {})
    if "source" in card:
        yield Ancestor(card["source"], f"published student, {card.get('checked', LAYOUT)}", card["licence"])
    for text in card.get("ancestry", []):
        source, _, licence = text.rpartition(": ")
        yield Ancestor(source or text, "ancestor", licence if source else "")
    for parent in card.get("parents", []):
        known: dict[str, Any] = {}
        with contextlib.suppress(CheckpointError):
            known = checkpoint.read_record(checkpoint.locate(parent)) if depth else {}
        made = known.get("card", {})
        what = f"{known['kind']}, {made.get('objective', 'converted')}" if known else "parent"
        yield Ancestor(named(parent), what, made.get("licence", ""))
        if known:
            yield from lineage(known, depth - 1)


def named(parent: str) -> str:
    """A hub id as it is, else the last part of a path."""
    return parent.removeprefix("hf://") if parent.startswith("hf://") else Path(parent).name


def licence_of(record: Mapping[str, Any], name: str, given: str | None) -> str:
    """The hub's name of the licence of a checkpoint; ValueError where it is unknown or wider than an ancestor's."""
    family = list(lineage(record))
    own = given or LICENCES.get(record.get("card", {}).get("licence", ""))
    bound = [a.name for a in family if a.licence == NON_COMMERCIAL or a.licence.lower().startswith(NC)]
    if own is None:
        hint = f"; {', '.join(bound)} is non-commercial, and so is what is made from it" if bound else ""
        raise ValueError(f"nothing says under which licence {name} is published: --licence, e.g. apache-2.0{hint}")
    if bound and not own.startswith(NC):
        raise ValueError(
            f"--licence {own}: {name} is made from {', '.join(bound)}, which is non-commercial: {NC}-sa-4.0"
        )
    return own


def model_card(name: str | Path, repo: str, to: str, licence: str | None = None) -> str:
    """The README.md of a hub repository: lineage, licence, figures, and the commands that play it."""
    path = checkpoint.locate(name)
    record, facts = checkpoint.read_record(path), checkpoint.summary(name)
    own, family = licence_of(record, path.name, licence), list(dict.fromkeys(lineage(record)))
    bases = list(dict.fromkeys(a.name for a in family if REPO.fullmatch(a.name)))
    return "\n".join(
        [
            *front(record, own, bases, to),
            f"# {path.name}",
            "",
            f"A {record['kind']} of {facts['parameters']:,} parameters, made with vidistill {__version__}.",
            "",
            *described(facts),
            "## Lineage",
            "",
            *(f"- {a.name}: {a.what}{f' ({a.licence})' if a.licence else ''}" for a in family),
            *([] if family else ["- trained from scratch"]),
            "",
            "## Licence",
            "",
            f"{own}. What it was made from keeps the licences of its own: those that are known stand above.",
            "",
            *figures(record.get("card", {})),
            *commands(path.name, repo, to, record["kind"]),
            "",
        ]
    )


def front(record: Mapping[str, Any], licence: str, bases: list[str], to: str) -> Iterator[str]:
    """The YAML that the hub reads."""
    yield "---"
    yield f"license: {licence}"
    yield f"library_name: {'diffusers' if to == 'diffusers' else 'vidistill'}"
    if record.get("text"):
        dit = checkpoint.parse(record, "the record", needs=False).dit
        yield f"pipeline_tag: {'image' if dit and shows_picture(dit) else 'text'}-to-video"
    if bases:
        yield "base_model:"
        yield from (f"- {base}" for base in bases)
    yield "tags:\n- video-generation\n- distillation\n- autoregressive"
    yield "---\n"


def described(facts: Mapping[str, Any]) -> Iterator[str]:
    """Steps and memory of a student."""
    if "memory" in facts:
        memory = facts["memory"]
        yield f"- evaluations a chunk: {', '.join(map(str, facts['nfe_per_chunk']))}"
        yield f"- memory: {memory['policy']}, {memory['frames']} latent frames, {memory['bytes'] / 1e6:,.1f} MB"
        yield ""


def figures(card: Mapping[str, Any]) -> Iterator[str]:
    """Measured figures as a table."""
    rows = list(flat(card.get("figures", {})))
    if rows:
        yield "## Figures\n"
        yield "| measured | value |\n|---|---|"
        yield from (f"| {key} | {value} |" for key, value in rows)
        yield ""


def flat(value: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    for key, x in value.items():
        if isinstance(x, dict):
            yield from flat(x, f"{before}{key}.")
        else:
            yield before + key, x


def commands(name: str, repo: str, to: str, kind: str) -> Iterator[str]:
    """How it is played, or read by others."""
    folder = repo.split("/")[1]
    yield "## Use\n"
    yield f"```sh\npip install 'vidistill[wan]'\nhf download {repo} --local-dir {folder}"
    if to == "diffusers":
        yield f"vidistill convert {folder} {name}  # our checkpoint again; `transformer` is diffusers' own layout"
    elif to == "self-forcing":
        yield f"vidistill convert {folder}/{name}.pt {name} --family self-forcing --allow-pickle"
    played = f"{folder}/{name}" if to == "ours" else name
    if kind == "student":
        yield f"vidistill generate {played} -o out.mp4 --seconds 5"
    yield "```"
