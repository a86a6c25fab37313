"""The installed command: its help, its subcommands' flags, and where the model may stand."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest

from vllm_kvzip import __version__
from vllm_kvzip.command import main as command

QUICK = """
import sys
from vllm_kvzip.command.main import main
try:
    main(sys.argv[1:])
finally:
    assert not {"torch", "vllm", "transformers"} & set(sys.modules)
"""


def said(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        command.main(list(arguments))
    return stopped.value.code, "".join(capsys.readouterr())


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_load_nothing(flag):
    done = subprocess.run([sys.executable, "-c", QUICK, flag], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = [*command.SUBCOMMANDS] if flag == "--help" else [__version__]
    assert all(word in done.stdout for word in shown)


@pytest.mark.parametrize(
    ("subcommand", "flags"),
    [
        ("profile", ["--model", "--text", "--out", "--overwrite", "--no-surrogate", "--threads"]),
        ("import-scores", ["--model", "--scores", "--out"]),
        ("evaluate", ["--model", "--text", "--max-loss", "--keep-bytes-ratios", "--settings"]),
        ("doctor", ["--model", "--memory-gib", "--prompt-tokens", "--json", "vllm serve"]),
        ("contexts", ["export", "import", "list"]),
    ],
)
def test_subcommands_know_their_flags(capsys, subcommand, flags):
    code, text = said(capsys, subcommand, "--help")
    assert code == 0
    assert f"usage: vllm-kvzip {subcommand}" in text
    assert all(flag in text for flag in flags)


def test_wrong_subcommands_are_refused(capsys):
    for arguments in ([], ["profiles"]):
        code, text = said(capsys, *arguments)
        assert code == 2
        assert "usage: vllm-kvzip" in text


@pytest.mark.parametrize("arguments", [["/no/model"], ["--model", "/no/model"]])
def test_the_model_may_stand_first(capsys, tmp_path, arguments):
    code = command.main(["profile", *arguments, "--out", str(tmp_path / "x.json")])
    assert code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("vllm-kvzip profile: error: --model /no/model cannot be profiled")


def test_a_model_given_twice_is_refused(capsys):
    code, text = said(capsys, "evaluate", "a", "--model=b")
    assert code == 2
    assert "the model is given twice" in text


class Server(BaseHTTPRequestHandler):
    """Answers what a test put into ``answers``; keeps what it was asked in ``asked``."""

    answers: ClassVar = []
    asked: ClassVar = []

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.asked.append((self.path, body, self.headers.get("Authorization")))
        status, answer = self.answers.pop(0)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    do_GET = do_POST

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    Server.answers.clear()
    Server.asked.clear()
    with HTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()
        thread.join()


FILE = {
    "name": "report", "id": "0a1b2c3d", "compressed_tokens": 1024, "blocks_held": 8, "bytes": 999,
    "seconds": 0.5, "send": {"vllm_xargs": {"kvzip_context_tokens": 1024}}, "last_used": 86400,
}  # fmt: skip


def test_contexts_are_exported_imported_and_listed(capsys, server, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    Server.answers += [(200, FILE), (200, FILE), (200, {"contexts": [FILE]})]
    Server.answers += [(200, {"files": [FILE], "bytes": 999, "most_bytes": 5000})]
    assert command.main(["contexts", "export", "0a1b2c3d", "report", "--server", server]) == 0
    assert "report was written: context 0a1b2c3d, 1024 tokens" in capsys.readouterr().out
    assert command.main(["contexts", "import", "report", "--server", server]) == 0
    assert '"kvzip_context_tokens": 1024' in capsys.readouterr().out
    assert command.main(["contexts", "list", "--server", server, "--api-key", "other"]) == 0
    shown = capsys.readouterr().out
    assert "1970-01-02 00:00 | report" in shown
    assert "999 of 5000 bytes in all." in shown
    path = "/v1/kvzip/contexts"
    assert Server.asked == [
        (f"{path}/export", {"id": "0a1b2c3d", "name": "report"}, "Bearer secret"),
        (f"{path}/import", {"name": "report"}, "Bearer secret"),
        (path, None, "Bearer other"),
        (f"{path}/files", None, "Bearer other"),
    ]


def test_a_server_without_a_folder_lists_what_is_cached(capsys, server):
    Server.answers += [(200, {"contexts": [FILE]}), (400, {"error": {"message": "No folder."}})]
    assert command.main(["contexts", "list", "--server", server]) == 0
    shown = capsys.readouterr().out
    assert "0a1b2c3d     |     1024 |        8" in shown
    assert "No folder." in shown


def test_what_a_server_refuses_is_one_line(capsys, server):
    Server.answers += [(400, {"error": {"message": "There is no room."}})]
    Server.answers += [(404, {"error": {"message": "Not Found"}})]
    arguments = ["contexts", "import", "report", "--server"]
    sentences = ["There is no room.", "start the server with VLLM_PLUGINS=kvzip."]
    sentences += ["does not answer"] * 3
    urls = [server, server, "http://127.0.0.1:9", "http://localhost:port", "http://[::1"]
    for url, sentence in zip(urls, sentences, strict=True):
        assert command.main([*arguments, url]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("vllm-kvzip contexts: error: ")
        assert sentence in line
