"""
A server that speaks OpenAI's protocol and answers with invented words, with the faults that real ones have.

    python tests/fake_server.py --port 8000 [--fault NAME]

Its answers depend on the prompt, the seed and the number of the choice, and at temperature 0 on the prompt alone.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = (
    "ignores_n",  # returns one choice whatever `n` says
    "greedy",  # ignores the temperature unless `generation_config` says `do_sample`, as `transformers serve` does
    "always_greedy",  # ignores the temperature
    "busy",  # refuses every other request with status 503
    "refuses",  # refuses every request with status 400
    "empty",  # returns no choice
    "dies",  # closes the connection without an answer from the fourth request on
    "exits",  # ends its process at the sixth request
    "crashes",  # ends its process at a prompt with the word "poison", while it is asked for others
    "slow_start",  # is never healthy
    "stalls",  # answers the first request after ten seconds
    "drips",  # answers the first request with a byte in each tenth of a second, for ten seconds
    "no_model",  # offers no model
    "turns_bad",  # returns no choice from the eleventh request on
    "certain",  # gives the same answer again and again to prompts with the word "same"
    "strict",  # refuses settings that OpenAI's protocol does not have; answers prompts with the word "same" greedily
    "wild",  # answers one request in three badly, each time in another of the ways below
    "no_reload",  # as vLLM, refuses new weights
    "no_sleep",  # as vLLM, fails to sleep
    "no_adapter",  # as vLLM, refuses adapters
    "random",  # answers one request in ten badly, and each prompt with the word "poison" in a way of its own
)

DEVICES = {"cpu": ("cpu", False), "gpu": ("cuda", False), "gpu_that_sleeps": ("cuda", True)}
"""What a server that imitates vLLM says of itself: its device, and whether it can sleep."""

BAD_ANSWERS = {  # status, type of the content, body
    "error 500": (500, "application/json", '{"error": {"message": "CUDA error"}}'),
    "refusal": (400, "application/json", '{"error": {"message": "the prompt is longer than the context"}}'),
    "time-out": (408, "application/json", '{"error": {"message": "request timed out"}}'),
    "conflict": (409, "application/json", '{"error": {"message": "conflict"}}'),
    "page": (200, "text/html", "<html>502 Bad Gateway</html>"),
    "half an answer": (200, "application/json", '{"id": "1", "choices": [{"mess'),
    "no choices": (200, "application/json", '{"id": "1", "object": "chat.completion", "created": 0, "model": "fake"}'),
    "null": (200, "application/json", '{"id": "1", "object": "chat.completion", "choices": null}'),
    "no UTF-8": (200, "application/json", '{"id": "\udcff"}'),
    "error with 200": (200, "application/json", '{"error": {"message": "worker died"}}'),
    "choices without text": (
        200,
        "application/json",
        '{"id": "1", "choices": [{"index": 0, "finish_reason": "stop"}]}',
    ),
}
"""What a server answers to every prompt with the word "poison" if the fault is one of these."""


_BAD_SHARE = 0.1  # of the answers of the fault "random"


class FakeServer(ThreadingHTTPServer):
    """Answers on a port of 127.0.0.1 until `close`; `requests` holds what was asked for."""

    daemon_threads = True

    def __init__(
        self,
        port: int = 0,
        fault: str | None = None,
        prompt_tokens: int | None = None,
        token_ids=None,
        vllm: str | None = None,
        model: str = "fake",  # what it serves, if it is vLLM
        offers: tuple[str, ...] = ("fake",),
        host: str = "127.0.0.1",
        first=None,  # called with the handler and each prompt; answers itself if it returns True
    ):
        super().__init__((host, port), _Handler)
        self.vllm, self.model, self.adapters, self.asleep = vllm, model, [], set()  # one of DEVICES, if it is vLLM
        self.offers, self.first = offers, first
        self.lists = ()  # type and text that it lists its models with; `None`: without an end
        self.fault, self.prompt_tokens, self.requests, self.lock = fault, prompt_tokens, [], threading.Lock()
        self.token_ids = token_ids  # makes tokens of a text
        self.random = random.Random(0)
        self.dripped_to_the_end = False
        self.url, self.closing = f"http://127.0.0.1:{self.server_port}/v1", threading.Event()

    def start(self) -> "FakeServer":
        # Asked to stop, it looks up after this many seconds
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class JsonHandler(BaseHTTPRequestHandler):
    """Answers with JSON, and says nothing on the terminal."""

    def _send(self, status: int, value: dict) -> None:
        self.send_text(status, "application/json", json.dumps(value))

    def send_text(self, status: int, kind: str, text: str) -> None:
        body = text.encode(errors="surrogateescape")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        with contextlib.suppress(ConnectionError):  # whoever asked may have given up
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *args):
        pass


class _Handler(JsonHandler):
    def do_GET(self):
        if self.headers["Content-Length"]:  # a real server does not read it, and resets the connection
            return self._send(400, {"detail": "GET has no body"})
        if self.path == "/health":
            self._send(503 if self.server.fault == "slow_start" else 200, {})
        elif self.path == "/server_info?config_format=json":
            if self.server.vllm is None:
                return self._send(404, {"detail": "Not Found"})
            device, sleeps = DEVICES[self.server.vllm]
            config = {"device_config": {"device": device}, "model_config": {"enable_sleep_mode": sleeps}}
            self._send(200, {"vllm_config": config})
        elif self.path == "/openapi.json":
            self._send(200, {"paths": {} if self.server.vllm is None else {"/v1/load_lora_adapter": {}}})
        elif self.server.lists is None:
            self._drip()
        elif self.server.lists:
            self.send_text(200, *self.server.lists)
        else:
            hides = self.server.fault == "random" and self.server.random.random() < _BAD_SHARE
            models = [] if self.server.fault == "no_model" or hides else self.server.offers
            self._send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in models]})
        return None

    def _develop(self, asked):
        """Routes that vLLM has for development. Each request is printed, if it is obeyed."""
        route, fault = self.path.partition("?")[0], self.server.fault
        adapter = asked.get("lora_name")
        if (fault, route) in (("no_reload", "/collective_rpc"), ("no_sleep", "/sleep")):
            return self._send(500, {"error": {"message": "not implemented"}})
        if fault == "no_adapter" and adapter:
            return self._send(400, {"error": {"message": "LoRA rank 4 is greater than max_lora_rank 2"}})
        if route == "/sleep":
            self.server.asleep = {"weights", "kv_cache"}
        if route == "/wake_up":
            self.server.asleep.discard(self.path.partition("tags=")[2])
        if route == "/collective_rpc" and "weights" in self.server.asleep:
            return self._send(500, {"error": {"message": "there is no memory for weights"}})
        if route.endswith("/load_lora_adapter"):
            if adapter in self.server.adapters:
                return self._send(400, {"error": {"message": "it is there already"}})
            self.server.adapters.append(adapter)
        if route.endswith("/unload_lora_adapter"):
            self.server.adapters.remove(adapter)
        what = asked.get("kwargs", {}).get("weights_path") or adapter or ""
        print(f"{self.path} {what}".strip(), flush=True)
        return self._send(200, {"success": True})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.vllm and not self.path.endswith("/completions"):
            return self._develop(asked)
        known = (self.server.model, *self.server.adapters)
        if self.server.vllm and (self.server.asleep or asked["model"] not in known):
            return self._send(404, {"error": {"message": f"The model `{asked['model']}` does not exist."}})
        with self.server.lock:
            self.server.requests.append(asked | {"key": self.headers["Authorization"]})
            number = len(self.server.requests)
        fault = self.server.fault
        prompt = asked.get("prompt") or json.dumps(asked["messages"])
        if self.server.first is not None and self.server.first(self, prompt):
            return None
        if fault == "drips" and number == 1:
            return self._drip()
        if fault in BAD_ANSWERS and "poison" in prompt:
            return self.send_text(*BAD_ANSWERS[fault])
        if fault == "random":
            kinds = [name for name in BAD_ANSWERS if "poison" in prompt or name != "refusal"]
            if "poison" in prompt:
                return self.send_text(*BAD_ANSWERS[kinds[hashlib.sha256(prompt.encode()).digest()[0] % len(kinds)]])
            with self.server.lock:
                is_bad, kind = self.server.random.random() < _BAD_SHARE, self.server.random.choice([*kinds, "hangs up"])
            if is_bad and kind == "hangs up":
                self.close_connection = True
                return None
            if is_bad:
                return self.send_text(*BAD_ANSWERS[kind])
        if fault == "wild" and number % 3 == 0:
            kinds = [name for name in BAD_ANSWERS if name != "refusal"]
            return self.send_text(*BAD_ANSWERS[kinds[number // 3 % len(kinds)]])
        if fault == "busy" and number % 2:
            return self._send(503, {"error": {"message": "busy"}})
        beyond = {"top_k", "min_p", "repetition_penalty", "return_token_ids", "generation_config"}
        if fault == "strict" and beyond & asked.keys():
            return self._send(422, {"error": {"message": "Unexpected keys in the request: top_k"}})
        if fault == "refuses":
            return self._send(400, {"error": {"message": "max_tokens is too large"}})
        if fault == "stalls" and number == 1:
            self.server.closing.wait(10)
        if fault == "exits" and number > 5:
            os._exit(1)
        if fault == "crashes":
            time.sleep(0.05)
            if "poison" in prompt:
                os._exit(1)
        if fault == "dies" and number > 3:
            self.close_connection = True
            return None
        count = {"ignores_n": 1, "empty": 0}.get(fault, asked.get("n", 1))
        count = 0 if fault == "turns_bad" and number > 10 else count
        samples = asked.get("temperature", 1.0) > 0 and fault != "always_greedy"
        samples &= fault not in ("strict", "certain") or "same" not in prompt
        if fault == "greedy":
            samples = json.loads(asked.get("generation_config", "{}")).get("do_sample", False)
        chat = "messages" in asked
        choices = []
        for index in range(count):
            text, reason = _answer(prompt, f"{asked.get('seed')}/{index}" if samples else "greedy")
            content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            if self.server.token_ids is not None and asked.get("return_token_ids"):
                content["token_ids"] = self.server.token_ids(text)
            choices.append({"index": index, "finish_reason": reason} | content)
        prompt_tokens = self.server.prompt_tokens
        usage = {} if prompt_tokens is None else {"usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 9}}
        kind = "chat.completion" if chat else "text_completion"
        return self._send(200, {"id": "1", "object": kind, "created": 0, "model": "fake", "choices": choices} | usage)

    def _drip(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                if self.server.closing.wait(0.1):
                    return
                self.wfile.write(b" ")
            self.server.dripped_to_the_end = True


def _answer(prompt: str, number: str) -> tuple[str, str]:
    """A text, and why it ended: one in eight is cut off."""
    digest = hashlib.sha256(f"{prompt}/{number}".encode()).digest()
    words = [("bees", "honey", "the", "fly", "make", "over", "sweet", "hives")[byte % 8] for byte in digest[:6]]
    return " ".join(words), "length" if digest[6] % 8 == 0 else "stop"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--fault", choices=[*FAULTS, *BAD_ANSWERS])
    parser.add_argument("--exit", type=int, help="end at once with this status")
    parser.add_argument("--vllm", choices=[*DEVICES], help="imitate vLLM on such a device")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("model", nargs="?", default="fake", help="its name, which is printed")
    options = parser.parse_args()
    print(f"model {options.model}", flush=True)
    if options.exit is not None:
        sys.exit(options.exit)
    FakeServer(options.port, options.fault, vllm=options.vllm, model=options.model, host=options.host).start()
    while True:
        time.sleep(1)
