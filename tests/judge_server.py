"""A judge at an OpenAI-compatible endpoint, for AlpacaEval's forms and Arena-Hard's: it prefers one side."""

import json
import re
import threading
from http.server import ThreadingHTTPServer

from fake_server import JsonHandler

REFERENCE = "the reference says"
"""Every output of the reference begins like this."""

_RANKING = "[{'model': 'model_%d', 'rank': 1}, {'model': 'model_%d', 'rank': 2}]"
_FORMS = {
    r'"output": """(.*?)"""': ("m", "M"),
    r'"answer": """(.*?)"""': (_RANKING % (1, 2), _RANKING % (2, 1)),
    r"Answer of A:\n(.*?)\n\nAnswer of B:": ("A it is. [[A>>B]]", "B it is. [[B>A]]"),
}
"""Where the first answer stands, and what the judge says if it, or the second one, is better."""


class JudgeServer(ThreadingHTTPServer):
    """
    Args:
        prefers: `"model"`, `"reference"`, or `"silent"`, whose first token is neither m nor M for instructions with the
            word `quiet`; `"broken"` gives those an answer of another form, `"cut"` one that breaks off, and `"down"`
            gives none at all.
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
        form = next(form for form in _FORMS if re.search(form, text, re.DOTALL))
        if self.server.prefers == "down" or (self.server.prefers == "broken" and "quiet" in text):
            return self._send(500 if self.server.prefers == "down" else 200, {"error": {"message": "out of memory"}})
        if self.server.prefers == "cut" and "quiet" in text:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.close_connection = True
            return self.wfile.write(b"{")
        first = re.search(form, text, re.DOTALL).group(1)
        reference_is_first = first.startswith(REFERENCE)
        wins_first = reference_is_first == (self.server.prefers == "reference")
        best, other = _FORMS[form] if wins_first else _FORMS[form][::-1]
        if self.server.prefers == "silent" and "quiet" in text:
            best, other = "The", "Model"
        choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": best}}
        if asked.get("logprobs"):
            top = [{"token": t, "logprob": p, "bytes": None} for t, p in ((best, 0.0), (other, -40.0), ("x", -50.0))]
            choice["logprobs"] = {"content": [top[0] | {"top_logprobs": top[: asked["top_logprobs"]]}]}
        usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
        about = {"id": "1", "object": "chat.completion", "created": 0, "model": asked["model"]}
        self._send(200, about | {"choices": [choice], "usage": usage})
