"""The script for people with a GPU writes the same keys without one."""

import json
from pathlib import Path

import pytest
import verify_gpu


def test_without_a_gpu_the_same_keys_are_written(tmp_path):
    out = tmp_path / "found.json"
    assert verify_gpu.main(["--out", str(out), "--only", "machine", "attention", "step", "bench"]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found.keys() == verify_gpu.SECTIONS.keys()
    assert found["machine"]["device"] == "cpu" and found["machine"]["gpus"] == []
    assert found["step"] == {name: dict.fromkeys(verify_gpu.TAKEN) for name in verify_gpu.OBJECTIVES}
    assert found["bench"].keys() >= {"fps", "chunk_ms_p50"} and set(found["bench"].values()) == {None}
    assert found["attention"]["products/frames"]["ok"] and found["attention"]["xformers/none"]["error"] is None
    assert found["goldens"] is None  # not asked for


def test_a_recorded_case_is_checked_on_the_device(monkeypatch):
    folders = [p for p in verify_gpu.GOLDENS.glob("*/io.safetensors") if p.parent.name == "scheduler"]
    monkeypatch.setattr(Path, "glob", lambda *_: folders)
    assert verify_gpu.goldens("cpu")["scheduler"]["ok"]


def test_what_is_wrong_or_fails_is_said_and_ends_with_1(tmp_path, monkeypatch):
    def broken(device):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(verify_gpu.SECTIONS, "machine", broken)
    monkeypatch.setitem(verify_gpu.SECTIONS, "bench", lambda device: {"fps": {"ok": False}})
    out = tmp_path / "found.json"
    assert verify_gpu.main(["--out", str(out), "--only", "machine", "bench"]) == 1
    assert "no such kernel" in json.loads(out.read_text(encoding="utf-8"))["machine"]["error"]
    assert not verify_gpu.wrong({"a": {"ok": True}, "b": None}) and verify_gpu.wrong({"a": {"ok": False}})


@pytest.mark.slow
def test_bytes_of_a_step_are_planned_without_a_gpu():
    found = verify_gpu.memory("cpu")
    assert found["dmd"]["planned_bytes"] > found["flow"]["planned_bytes"] > 1e9
    assert found["flow"]["measured_bytes"] is None
