"""Hub ids, through the real client, against a small server on this machine."""

import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

from tests.conftest import ROOT

pytest.importorskip("huggingface_hub")
TINY = ROOT / "checkpoints" / "tiny-gpt-neo"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROMPT = ("-m", "decoders", "generate")


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository, tiny/gpt-neo, whose files lie in TINY; `skip` names those that it does not have."""

    requests: list[str] = []
    skip: tuple[str, ...] = ()

    def files(self):
        return [f for f in sorted(TINY.iterdir()) if f.name not in self.skip]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        Hub.requests.append(self.path)
        if self.path.startswith("/api/models/tiny/gpt-neo"):
            siblings = [{"rfilename": f.name, "size": f.stat().st_size} for f in self.files()]
            info = {"id": "tiny/gpt-neo", "modelId": "tiny/gpt-neo", "sha": COMMIT, "siblings": siblings,
                    "private": False, "tags": [], "downloads": 0, "likes": 0}  # fmt: skip
            tree = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
                for f in self.files()
            ]
            return self.reply(
                json.dumps(tree if "/tree/" in self.path else info).encode(), "application/json"
            )
        name = self.path.split("/resolve/")[-1].split("/")[-1].split("?")[0]
        if "/tiny/gpt-neo/resolve/" in self.path and name in [f.name for f in self.files()]:
            return self.reply((TINY / name).read_bytes(), "application/octet-stream", name)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def reply(self, body: bytes, kind: str, etag: str = "") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{etag}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.requests, Hub.skip = [], ()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run(cache, endpoint, *arguments, offline=False):
    environment = {**os.environ, "HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1",
                   "HF_HUB_OFFLINE": "1" if offline else "0", "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
    environment.pop("HF_TOKEN", None)
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT
    )


def test_online_once_then_offline(hub, tmp_path):
    arguments = (*PROMPT, "tiny/gpt-neo", "Once upon a time", "--max-new-tokens", "5")
    local = run(tmp_path, hub, *PROMPT, str(TINY), "Once upon a time", "--max-new-tokens", "5")
    assert local.returncode == 0 and Hub.requests == [], "a local folder asks nobody"
    online = run(tmp_path, hub, *arguments)
    assert online.returncode == 0, online.stderr
    assert online.stdout == local.stdout
    fetched = [path for path in Hub.requests if "/resolve/" in path]
    assert any("model.safetensors" in path for path in fetched) and not any(
        "loss.png" in path for path in fetched
    )
    asked = len(Hub.requests)
    offline = run(tmp_path, hub, *arguments, offline=True)
    assert offline.returncode == 0, offline.stderr
    assert offline.stdout == local.stdout and len(Hub.requests) == asked, "offline asks nobody"


def test_an_id_that_the_hub_does_not_have(hub, tmp_path):
    found = run(tmp_path, hub, *PROMPT, "tiny/unknown", "Hello")
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith("error: there is no folder tiny/unknown, and the hub did not give it")
    assert found.stderr.count("\n") == 1


def test_offline_without_a_cached_copy(hub, tmp_path):
    found = run(tmp_path, hub, *PROMPT, "tiny/gpt-neo", "Hello", offline=True)
    assert found.returncode == 2 and "did not give it" in found.stderr and Hub.requests == []


def test_a_repository_without_weights(hub, tmp_path):
    Hub.skip = ("model.safetensors",)
    found = run(tmp_path, hub, *PROMPT, "tiny/gpt-neo", "Hello")
    assert found.returncode == 2 and "holds no weights" in found.stderr


def test_without_the_client(tmp_path):
    """The extra is named where the package is not installed."""
    code = "import sys; sys.modules['huggingface_hub'] = None; from decoders.cli import main; "
    found = run(tmp_path, "http://127.0.0.1:9", "-c", code + "sys.exit(main(['inspect', 'tiny/gpt-neo']))")
    assert found.returncode == 2 and "pip install '.[hub]'" in found.stderr


def test_the_tokenizer_alone_fetches_no_weights(hub, tmp_path):
    code = "from decoders import tokenize; print(tokenize.load('tiny/gpt-neo').decode([0]))"
    found = run(tmp_path, hub, "-c", code)
    assert found.returncode == 0, found.stderr
    assert not any("safetensors" in path for path in Hub.requests if "/resolve/" in path)
