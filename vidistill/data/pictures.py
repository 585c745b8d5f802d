"""Pictures with their prompts, as Wan's image-to-video networks are shown them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidistill import checkpoint
from vidistill.conditioning.condition import shown_clip
from vidistill.data.importers.write import Part
from vidistill.data.prompts import IMAGE, SHOWN, digest, write_prompts
from vidistill.data.shards import DataError
from vidistill.distributed import rank
from vidistill.io import read_image, read_text, to_float
from vidistill.ops.device import accelerator
from vidistill.progress import Bar
from vidistill.teachers.image_encoder import ImageEncoder
from vidistill.teachers.text_encoder import TextCache, cache_folder
from vidistill.teachers.wan import WORLD

PER_SHARD = 32  # 4 MB each at 480x832


def pictures(
    out: Path,
    file: Path,
    model: str,
    image_encoder: str | None = None,
    negative: str = "",
    tokens: int = 512,
    frames: int = 21,
    size: tuple[int, int] = (480, 832),
    fps: float = WORLD["fps"],
    part: str = "1/1",
) -> str:
    """Encode pictures and prompts, a line `PICTURE<TAB>PROMPT` of `file` each, into folder `out`; says what is there.

    `model` has Wan's autoencoder, text encoder and tokenizer. `image_encoder`: where CLIP is, for networks that are
    told its tokens, too. `frames`: latents of the clips that are to start from them, `size` their pixels. `part`: the
    share that this process encodes, see `write.Part`; the folder is complete with the last one.
    """
    found, where = read_list(file), accelerator()
    codec: Any = checkpoint.load(model, "codec").net.to(where)
    codec.latent_shape(codec.px_frames(frames), *size)
    clip = ImageEncoder(image_encoder, device=str(where)) if image_encoder else None

    @torch.no_grad()
    def show(numbers: range) -> dict[str, Tensor]:
        rows: dict[str, list[Tensor]] = {SHOWN: [], **({} if clip is None else {IMAGE: []})}
        for k in numbers:
            picture = read_image(found[k][0], size)
            px = shown_clip(to_float(picture[None])[None].to(where), codec.px_frames(frames))
            rows[SHOWN].append(codec.encode(px)[0].half().cpu())
            if clip is not None:
                rows[IMAGE].append(clip.encode([picture])[0].half().cpu())
            bar.update()
        return {name: torch.stack(each) for name, each in rows.items()}

    meta: dict[str, Any] = {
        "source": "pictures",
        **WORLD,
        "fps": fps,
        "codec": model,
        **told_of(clip),
        SHOWN: {"frames": frames, "size": list(size)},
        **digests(found),
    }
    text, own = TextCache(model, cache_folder(), length=tokens, device=str(where)), Part.of(part)
    share = sum(len(found[i * PER_SHARD : (i + 1) * PER_SHARD]) for i in own.share(-(-len(found) // PER_SHARD)))
    with Bar(share, "pictures", "picture", shown=rank() == 0) as bar:
        lines = [prompt for _, prompt in found]
        whole = write_prompts(out, lines, negative, text, meta, part=own, per_shard=PER_SHARD, show=show)
    return f"{out}: {len(found)} pictures" if whole else f"{out}: part {own.index + 1} is written"


def digests(found: Sequence[tuple[Path, str]]) -> dict[str, str]:
    """What tells a list of pictures and prompts from another, as a folder says it."""
    return {"digest": digest([words for _, words in found]), "pictures": digest([path.name for path, _ in found])}


def told_of(clip: ImageEncoder | None) -> Mapping[str, Any]:
    """What data and records say of the tokens of a picture."""
    return {} if clip is None else {IMAGE: {"source": clip.source, **clip.sizes}}


def read_list(file: Path) -> list[tuple[Path, str]]:
    """Pictures, beside `file` or by their full path, and their prompts; DataError for a line that is none."""
    found = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        name, tab, prompt = line.partition("\t")
        path = file.parent / name.strip()
        if not tab or not path.is_file():
            why = f"there is no picture {path}" if tab else "it has no tab"
            raise DataError(f"{file}, line {number}: {why}; write PICTURE, a tab and what is to be seen")
        found.append((path, prompt.strip()))
    return found
