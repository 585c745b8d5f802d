"""Loading costs one copy of the weights: peak memory of a process of its own against the size of the files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vidistill import checkpoint
from vidistill.interop.keys import build, to_original
from vidistill.models.dit import VideoDiT
from vidistill.models.layers import DiTConfig

DIT = DiTConfig(width=1024, layers=6, heads=8, ffn=4096, text_dim=256, freq_dim=64)  # 210 MB in bf16

CHILD = """
import sys, json, torch
from pathlib import Path
from vidistill import checkpoint
from vidistill.interop.formats import read_student
from vidistill.teachers.load import read_teacher
import vidistill.teachers.wan

def status(key):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if key in line)

ways = {
    "teacher": lambda path: read_teacher(path, dtype="bfloat16").net,
    "student": lambda path: read_student(path, "self-forcing", heads=8).net(),
    "ours": lambda path: checkpoint.load(path, dtype=torch.bfloat16).net,
}
peaks, files = {}, json.loads(sys.argv[1])
_, how, path = files[0]
ways[how](path)  # what is imported then is imported once
for name, how, path in files:
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    net = ways[how](path)
    total = sum(float(p.detach().flatten()[::512].float().sum()) for p in net.parameters())  # touches every page
    peaks[name] = 1024 * (status("VmHWM") - before)
    assert total != 0
    del net
print(json.dumps(peaks))
"""


def state(style: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        empty = VideoDiT(DIT).state_dict()
    ours = {name: torch.full(x.shape, 0.01, dtype=torch.bfloat16) for name, x in empty.items()}
    return to_original(ours, DIT, style)


@pytest.fixture
def files(tmp_path: Path) -> list[tuple[str, str, str]]:
    """(name, how it is loaded, path) of the same weights in every layout."""
    for layout in ("whole/transformer", "sharded/transformer", "original"):
        (tmp_path / layout).mkdir(parents=True)
        (tmp_path / layout / "config.json").write_text(json.dumps({"num_attention_heads": 8, "num_heads": 8}))
    theirs, own = state("diffusers"), state("wan")
    save_file(theirs, tmp_path / "whole/transformer/diffusion_pytorch_model.safetensors")
    save_file(own, tmp_path / "original/model.safetensors")
    names, index = list(theirs), {}
    for i in range(3):
        part = f"part-{i}.safetensors"
        save_file({name: theirs[name] for name in names[i::3]}, tmp_path / "sharded/transformer" / part)
        index.update(dict.fromkeys(names[i::3], part))
    listing = tmp_path / "sharded/transformer/diffusion_pytorch_model.safetensors.index.json"
    listing.write_text(json.dumps({"weight_map": index}))
    from vidistill.interop.keys import to_ours

    checkpoint.export(tmp_path / "ours", build(to_ours(own), DIT), {"card": {}}, torch.bfloat16)
    return [
        ("diffusers", "teacher", str(tmp_path / "whole")),
        ("diffusers, sharded", "teacher", str(tmp_path / "sharded")),
        ("original", "teacher", str(tmp_path / "original")),
        ("published student", "student", str(tmp_path / "original/model.safetensors")),
        ("ours", "ours", str(tmp_path / "ours")),
    ]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_takes_one_copy_of_the_weights(files, tmp_path):
    size = (tmp_path / "original/model.safetensors").stat().st_size
    assert size > 200e6
    command = [sys.executable, "-c", CHILD, json.dumps(files)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    peaks = {name: peak / size for name, peak in json.loads(run.stdout).items()}
    assert len(peaks) == 5 and all(0.7 < peak < 1.3 for peak in peaks.values()), peaks
