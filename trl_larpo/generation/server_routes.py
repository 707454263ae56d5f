"""
Routes of vLLM's servers beside OpenAI's protocol: new weights, adapters, sleep.

Whoever reaches their port can use them, to load any file or to stop the server. So they are asked only of servers that
listen on the loopback alone.
"""

import ipaddress
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from ..errors import ConfigError
from .server_errors import without_key
from .server_process import Server, server_command
from .urls import api_key

_DEVELOPMENT_MODE = "VLLM_SERVER_DEV_MODE"
_RUNTIME_ADAPTERS = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


_ADAPTER_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can be told to expect
_DEFAULT_RANK = 16


class RouteError(Exception):
    """A server refuses what it was asked for, does not know it, or does not answer."""


class ServerRoutes:
    """
    The routes of one server.

    Args:
        server: The server.
        api_key_variable: Environment variable that holds its key.
        timeout: Seconds that an answer may take.
    """

    def __init__(self, server: Server, api_key_variable: str, timeout: float):
        self.server, self.api_key_variable, self.timeout = server, api_key_variable, timeout

    def sleeps(self) -> bool:
        """
        Whether the server lets go of its GPU when it is told to sleep; `False` for one that runs on a CPU.

        Raises:
            RouteError: If it takes no weights, or does not let go of its GPU; says why.
        """
        self.check_loopback()
        try:
            config = self._ask("/server_info?config_format=json", method="GET")["vllm_config"]
            on_cpu = config["device_config"]["device"] == "cpu"
            # /sleep answers with status 200 without it too, and frees nothing
            can_sleep = config["model_config"]["enable_sleep_mode"]
        except (KeyError, TypeError):
            raise RouteError("it says neither where it runs nor whether it can sleep") from None
        if not on_cpu and not can_sleep:
            raise RouteError("it holds its GPU as long as it lives; start it with --enable-sleep-mode")
        return not on_cpu

    def check_loopback(self) -> None:
        """
        Raises:
            RouteError: If others than this machine may reach the server, or it cannot be known.
        """
        addresses = set()
        for process in self.server.family():
            try:
                connections = process.net_connections(kind="inet")
            except psutil.Error:  # it has ended, or is not ours to look at
                continue
            listening = (x for x in connections if x.status == psutil.CONN_LISTEN)
            addresses |= {x.laddr.ip for x in listening if x.laddr.port == self.server.port}
        if not addresses or not all(ipaddress.ip_address(address).is_loopback for address in addresses):
            raise RouteError(
                f"it listens on {', '.join(sorted(addresses)) or 'an unknown address'}, where others may reach its "
                "development routes; start it with --host 127.0.0.1"
            )

    def load_weights(self, folder: str) -> None:
        """Loads the weights of another model of the same architecture."""
        arguments = {"method": "reload_weights", "kwargs": {"weights_path": _absolute(folder)}}
        self._ask("/collective_rpc", arguments)

    def forget_prefixes(self) -> None:
        """Empties the cache of prompts, which holds what other weights computed."""
        if not self._ask("/reset_prefix_cache").get("success", True):
            raise RouteError("its prefix cache could not be emptied, and holds what the old weights computed")

    def sleep(self) -> None:
        """Lets go of the GPU's memory, weights included."""
        self._ask("/sleep?level=2")

    def wake_up(self, what: str) -> None:
        """
        Takes memory again.

        Args:
            what: `"weights"`, whose values are lost, or `"kv_cache"`.
        """
        self._ask(f"/wake_up?tags={what}")

    def takes_adapters(self) -> bool:
        """Whether it loads adapters while it runs."""
        return "/v1/load_lora_adapter" in self._ask("/openapi.json", method="GET").get("paths", {})

    def load_adapter(self, folder: str) -> None:
        """Loads a LoRA adapter, whose name on the server is that of its folder."""
        self._ask("/v1/load_lora_adapter", {"lora_name": folder, "lora_path": _absolute(folder)})

    def unload_adapter(self, folder: str) -> None:
        """Makes room for another one."""
        self._ask("/v1/unload_lora_adapter", {"lora_name": folder})

    def _ask(self, route: str, body: dict[str, Any] | None = None, method: str = "POST") -> dict[str, Any]:
        key = api_key(self.api_key_variable)
        # A body that is not asked for stays unread, and then the server resets the connection as it closes it
        data = None if method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.server.root + route, data, method=method)
        request.add_header("Content-Type", "application/json")
        request.add_header("Authorization", f"Bearer {key}")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy reaches the loopback
        try:
            with opener.open(request, timeout=self.timeout) as response:
                answer = response.read().decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            said = without_key(error.read().decode("utf-8", "replace"), key)[:300]
            raise RouteError(
                f"it answers {urllib.parse.urlsplit(route).path} with status {error.code}: {said}"
            ) from None
        except (OSError, ValueError) as error:
            raise RouteError(f"it does not answer {urllib.parse.urlsplit(route).path}: {error}") from None
        try:
            value = json.loads(answer)
        except ValueError:  # some say what they did in a sentence, or nothing
            return {}
        return value if isinstance(value, dict) else {}


def check_command(command: str, adapter_rank: int | None = None) -> None:
    """
    Checks the words of a command, as far as it is vLLM's own.

    Args:
        command: As [`server_command`] reads it.
        adapter_rank: Of the adapter that the servers have to load; `None` if there is none.

    Raises:
        ConfigError: If routes for development are open to other machines, or adapters cannot be loaded.
    """
    words, environment = server_command(command, model="model", port=1, index=0)
    if not words or Path(words[0]).name != "vllm":
        return
    environment = os.environ | environment
    given = _options(words)
    opened = [x for x in (_DEVELOPMENT_MODE, _RUNTIME_ADAPTERS) if _is_true(environment.get(x, ""))]
    if opened and given.get("host") not in _LOOPBACK:
        raise ConfigError(
            f"`server_command`: with {opened[0]}, whoever reaches the port of a server can make it load any file. Add "
            "`--host 127.0.0.1`, or leave the variable out."
        )
    if adapter_rank is None:
        return
    expected = given.get("max-lora-rank", str(_DEFAULT_RANK))
    takes_rank = expected.isdecimal() and adapter_rank <= int(expected)
    if "enable-lora" not in given or not takes_rank or _RUNTIME_ADAPTERS not in opened:
        rank = next((x for x in _ADAPTER_RANKS if x >= adapter_rank), adapter_rank)
        raise ConfigError(
            "`server_command`: iterations end with an adapter (`use_peft`), which vLLM loads if it is started as "
            f"`{_RUNTIME_ADAPTERS}=True vllm serve {{model}} --port {{port}} --host 127.0.0.1 --enable-lora "
            f"--max-lora-rank {rank}`. Start it so, or set `merge_adapter: true`."
        )


def _options(words: list[str]) -> dict[str, str]:
    """Options of a command by name, without the two dashes; of those without a value an empty one."""
    options = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            name, has_value, value = word.removeprefix("--").partition("=")
            options[name.replace("_", "-")] = value if has_value else following
    return options


def _is_true(value: str) -> bool:
    return value.strip().lower() in ("1", "true")


def _absolute(folder: str) -> str:
    """The server may stand in another folder. What is no folder is a hub id."""
    return os.path.abspath(folder) if os.path.isdir(folder) else folder
