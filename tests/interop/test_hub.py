"""Publishing, against a hub on the loopback interface that keeps what it is sent."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from published import publish as publish_file
from published import weights
from test_export import both, trained

from vidistill import checkpoint, cli
from vidistill.cli.convert import convert
from vidistill.interop.hub import model_card, portable, publish

pytest.importorskip("huggingface_hub")

REPO = "lab/wan-student"


class Hub(BaseHTTPRequestHandler):
    """The calls of an upload, as huggingface_hub makes them; `server.files` is the repository."""

    def log_message(self, *_):
        pass

    def answer(self, body, code=200):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self):
        if self.path.startswith("/api/whoami"):
            good = self.headers.get("Authorization") == "Bearer hf_good"
            self.answer({"name": "lab", "type": "user"} if good else {"error": "bad token"}, 200 if good else 401)
        else:
            self.answer({"id": REPO, "sha": "0" * 40, "siblings": []}, 404 if self.server.forbid else 200)

    def do_PUT(self):
        self.server.blobs[self.path.rsplit("/", 1)[1]] = self.body()
        self.answer({})

    def do_POST(self):
        body, host = self.body(), f"http://{self.headers['Host']}"
        self.server.calls.append(self.path)
        if self.path == "/api/repos/create":
            if self.server.forbid:
                self.answer({"error": "You don't have the rights to create a model under this namespace"}, 403)
                return
            self.server.made = json.loads(body)
            self.answer({"url": f"{host}/{REPO}", "name": REPO})
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            rows = [{"path": f["path"], "uploadMode": self.mode(f["path"]), "shouldIgnore": False} for f in files]
            self.answer({"files": rows})
        elif self.path.endswith("/objects/batch"):
            upload = lambda oid: {"upload": {"href": f"{host}/put/{oid}"}}  # noqa: E731
            objects = json.loads(body)["objects"]
            self.answer({"transfer": "basic", "objects": [{**o, "actions": upload(o["oid"])} for o in objects]})
        elif "/commit/" in self.path:
            self.commit(body)
            self.answer({"commitOid": "1" * 40, "commitUrl": f"{host}/{REPO}/commit/{'1' * 40}"})
        else:
            self.answer({"errors": [], "warnings": []})

    @staticmethod
    def mode(path):
        return "lfs" if path.endswith((".safetensors", ".pt")) else "regular"

    def commit(self, body):
        for line in body.decode().splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.blobs[value["oid"]]


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.blobs, server.calls, server.forbid, server.made = {}, {}, [], False, {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    yield server
    server.shutdown()
    server.server_close()


def test_a_checkpoint_and_its_card_arrive_as_they_were_sent(tmp_path, hub):
    source = trained(tmp_path / "t")
    url = publish(source, REPO, licence="apache-2.0", private=True, endpoint=hub.address)
    assert url.endswith(REPO) and hub.made["name"] == "wan-student" and hub.made["organization"] == "lab"
    assert set(hub.files) >= {"t.safetensors", "t.json", "README.md"}
    (tmp_path / "down").mkdir()
    for name, content in hub.files.items():
        (tmp_path / "down" / name).write_bytes(content)
    checkpoint.load_student(tmp_path / "down" / "t")
    assert both(tmp_path / "down" / "t") == both(source)


@pytest.mark.parametrize(("to", "name"), [("self-forcing", "t.pt"), ("diffusers", "transformer/config.json")])
def test_other_layouts_are_uploaded_too(tmp_path, hub, to, name):
    publish(trained(tmp_path / "t"), REPO, to=to, licence="apache-2.0", endpoint=hub.address)
    assert name in hub.files and b"license: apache-2.0" in hub.files["README.md"]
    assert (b"library_name: diffusers" in hub.files["README.md"]) == (to == "diffusers")


def test_the_command_line_uploads_only_when_asked(tmp_path, hub, monkeypatch, capsys):
    source = trained(tmp_path / "t")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", hub.address)
    args = ["publish", str(source), REPO, "--licence", "apache-2.0"]
    assert cli.main([*args, "--card"]) == 0 and not hub.calls
    assert "# t" in capsys.readouterr().out
    assert cli.main(args) == 0 and hub.files and capsys.readouterr().out.strip().endswith(REPO)


def test_no_path_of_this_machine_is_uploaded(tmp_path, hub):
    source = trained(tmp_path / "t")
    path = checkpoint.with_extension(source, ".json")
    record = json.loads(path.read_text())
    record["codec"] = str(tmp_path / "models" / "Wan2.1")
    record["card"]["train"] = {"data": [str(tmp_path / "data"), "../elsewhere/clips"]}
    path.write_text(json.dumps(record))
    publish(source, REPO, licence="apache-2.0", endpoint=hub.address)
    sent = json.loads(hub.files["t.json"])
    assert str(tmp_path).encode() not in b"".join(hub.files.values())
    assert sent["codec"] == "Wan2.1" and sent["card"]["train"]["data"] == ["data", "clips"]
    assert portable({"a": ["~/x", "org/name", 3]}) == {"a": ["x", "org/name", 3]}


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_token_without_rights_and_none_at_all_are_named(tmp_path, hub, monkeypatch):
    source = trained(tmp_path / "t")
    hub.forbid = True
    with pytest.raises(ValueError, match=r"lab/wan-student.*403"):
        publish(source, REPO, licence="apache-2.0", endpoint=hub.address)
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    with pytest.raises(ValueError, match="token"):
        publish(source, REPO, licence="apache-2.0", endpoint=hub.address)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="auth login"):
        publish(source, REPO, licence="apache-2.0", endpoint=hub.address)
    assert not hub.files


def test_a_hub_that_is_offline_is_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    with pytest.raises(ValueError, match="not reached"):
        publish(trained(tmp_path / "t"), REPO, licence="apache-2.0", endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize("repo", ["wan", "a/b/c", "../x/y", "lab/", "lab/a b", ""])
def test_a_repository_is_an_owner_and_a_name(tmp_path, hub, repo):
    with pytest.raises(ValueError, match="ORG/NAME"):
        publish(trained(tmp_path / "t"), repo, licence="apache-2.0", endpoint=hub.address)
    assert not hub.calls


def test_a_licence_is_known_and_no_wider_than_an_ancestors(tmp_path, hub):
    with pytest.raises(ValueError, match="--licence"):
        publish(trained(tmp_path / "t"), REPO, endpoint=hub.address)
    source = publish_file(tmp_path / "in.safetensors", weights())
    convert(source, "causvid", tmp_path / "nc", size=(64, 64), heads=4)
    with pytest.raises(ValueError, match=r"tianweiy/CausVid.*non-commercial"):
        publish(tmp_path / "nc", REPO, licence="apache-2.0", endpoint=hub.address)
    publish(tmp_path / "nc", REPO, endpoint=hub.address)
    assert b"license: cc-by-nc-sa-4.0" in hub.files["README.md"]


# --- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_tells_lineage_through_trained_parents_and_figures(tmp_path):
    source = publish_file(tmp_path / "in.safetensors", weights())
    convert(source, "self-forcing", tmp_path / "base", size=(64, 64), heads=4)
    child = trained(tmp_path / "child")
    path = checkpoint.with_extension(child, ".json")
    record = json.loads(path.read_text())
    record["card"]["parents"] = [str(tmp_path / "base"), "hf://Wan-AI/Wan2.1-T2V-14B-Diffusers"]
    record["card"]["figures"] = {"frechet": 1.5, "speed": {"fps": 94}}
    path.write_text(json.dumps(record))
    card = model_card(child, REPO, "ours", "apache-2.0")
    for part in (
        "license: apache-2.0",
        "- guandeh17/Self-Forcing",
        "- Wan-AI/Wan2.1-T2V-14B-Diffusers",
        "- base: student",
        "| frechet | 1.5 |",
        "| speed.fps | 94 |",
        f"hf download {REPO}",
        "vidistill generate wan-student/child",
    ):
        assert part in card, part
    assert str(tmp_path) not in card


def test_a_bundled_student_has_a_card(tmp_path):
    card = model_card("doom", REPO, "ours", "apache-2.0")
    assert "doom-teacher" in card and "fps" in card and "runs/" not in card


def test_a_codec_that_was_trained_here_travels_with_its_student(tmp_path, hub, checkpoints):
    student = next(p for p in checkpoints.glob("*.json") if json.loads(p.read_text())["kind"] == "student")
    codec = json.loads(student.read_text())["codec"]
    publish(student, REPO, licence="apache-2.0", endpoint=hub.address)
    name = Path(codec).name
    assert f"{name}.safetensors" in hub.files and json.loads(hub.files[f"{student.stem}.json"])["codec"] == name
