"""A judge for AlpacaEval at an OpenAI-compatible endpoint: it prefers one side, with token log-probabilities."""

import json
import re
import threading
from http.server import ThreadingHTTPServer

from fake_server import JsonHandler

REFERENCE = "the reference says"
"""Every output of the reference begins like this."""


class JudgeServer(ThreadingHTTPServer):
    """
    Args:
        prefers: `"model"`, `"reference"`, or `"silent"`, whose first token is neither m nor M for instructions with the
            word `quiet`.
    """

    daemon_threads = True

    def __init__(self, prefers: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.prefers, self.requests, self.lock = prefers, [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Handler(JsonHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(asked)
        text = asked["messages"][-1]["content"]
        first, _ = re.findall(r'"output": """(.*?)"""', text, re.DOTALL)
        reference_is_first = first.startswith(REFERENCE)
        wins_first = reference_is_first == (self.server.prefers == "reference")
        best, other = ("m", "M") if wins_first else ("M", "m")
        if self.server.prefers == "silent" and "quiet" in text:
            best, other = "The", "Model"
        top = [{"token": t, "logprob": p, "bytes": None} for t, p in ((best, 0.0), (other, -40.0), ("x", -50.0))]
        choice = {
            "index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": best},
            "logprobs": {"content": [top[0] | {"top_logprobs": top[: asked["top_logprobs"]]}]},
        }  # fmt: skip
        usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
        about = {"id": "1", "object": "chat.completion", "created": 0, "model": asked["model"]}
        self._send(200, about | {"choices": [choice], "usage": usage})
