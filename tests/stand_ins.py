"""Programs that stand in for others: of alpaca_eval's command, and of `vllm serve`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# Serves /health after a while, and completions; notes its arguments, its pid and that of a child.
VLLM = """
import http.server, json, os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
told = {"arguments": sys.argv[1:], "pids": [os.getpid(), child.pid]}
pathlib.Path(os.environ["TOLD"]).write_text(json.dumps(told))
ready = time.monotonic() + 0.3

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(200 if self.path == "/health" and time.monotonic() > ready else 503, {})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = "The answer is: " + asked["model"]
        self.reply(200, {"id": "1", "object": "text_completion", "created": 0, "model": asked["model"],
                         "choices": [{"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}]})

    def reply(self, code, body):
        raw = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_):
        pass

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

ALPACA = """#!{python}
import json, os, pathlib, sys
options = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[2:])
begins = ("OPENAI", "HF_", "PYTHONPATH")
environment = {{name: value for name, value in os.environ.items() if name.startswith(begins)}}
client = pathlib.Path(environment.pop("OPENAI_CLIENT_CONFIG_PATH", os.devnull)).read_text()
pathlib.Path({told!r}).write_text(json.dumps([sys.argv[1], options, environment, client]))
{body}
"""
RESULTS = """
site = pathlib.Path(eval(options["output_path"])) / "alpaca_eval_gpt4"
site.mkdir()
site.joinpath("leaderboard.csv").write_text({table!r})
site.joinpath("annotations.json").write_text(json.dumps({annotations!r}))
"""
ANNOTATIONS = [
    {"instruction": "a", "preference": 2.0}, {"instruction": "b", "preference": 1.0},
    {"instruction": "c", "preference": 1.5}, {"instruction": "d", "preference": None},
]  # fmt: skip
TABLE = ",win_rate,standard_error,mode,avg_length,n_total\nmine,50.0,28.9,community,5,3\n"


def stand_in(folder: Path, body: str = "", table: str = TABLE, annotations: Any = ANNOTATIONS) -> str:
    """A command that notes what it was called with, and leaves these results (or does what ``body`` says)."""
    path = folder / "alpaca_eval"
    body = body or RESULTS.format(table=table, annotations=annotations)
    path.write_text(ALPACA.format(python=sys.executable, told=str(folder / "told.json"), body=body))
    path.chmod(0o755)
    return str(path)
