"""Starts, checks and stops the servers that sample completions."""

import logging
import os
import shlex
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..errors import ConfigError, LarPOError
from ..lifetime import end_family
from ..storage import read_json, write_json
from .urls import api_key, check_answer

logger = logging.getLogger(__name__)

_TIME_TO_STOP = 15.0  # seconds that a server gets to exit on its own


class ServerStartError(LarPOError):
    """A server ended before it was ready, or did not get ready in time."""


@dataclass(frozen=True)
class Server:
    """
    A server that was started here.

    Attributes:
        process: Its process, which may have started others.
        port: Where it listens.
    """

    process: subprocess.Popen
    port: int

    @property
    def root(self) -> str:
        """Address of its routes beside OpenAI's."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """Base address of OpenAI's routes."""
        return f"{self.root}/v1"

    def family(self) -> list[psutil.Process]:
        """Its process and all that it started."""
        try:
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


@contextmanager
def running_servers(
    command: str,
    model: str,
    num_servers: int,
    log_folder: Path,
    *,
    health_route: str = "/health",
    start_timeout: float = 900.0,
) -> Iterator[list[Server]]:
    """
    Servers of one model, started from a command and stopped when the context closes.

    Args:
        command: E.g. `vllm serve {model} --port {port}`. `{index}` counts the servers from 0. Words such as
            `CUDA_VISIBLE_DEVICES={index}` in front set the environment.
        model: Folder or hub id.
        num_servers: How many.
        log_folder: Where the output of each server is kept, and the process ids: servers that a killed run has left
            behind are stopped first.
        health_route: Answers with status 200 when the server is ready.
        start_timeout: Seconds until then.

    Yields:
        The servers.

    Raises:
        ServerStartError: If a server ends before it is ready or does not get ready in time.
        LarPOError: If the command cannot be started.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    record = log_folder / "servers.json"
    stop_leftovers(record)
    servers: list[Server] = []
    try:
        for index in range(num_servers):
            port = _free_port({server.port for server in servers})
            words, environment = server_command(command, model=model, port=port, index=index)
            with open(log_folder / f"server_{index}.log", "ab") as log_file:
                try:
                    process = subprocess.Popen(
                        words, stdout=log_file, stderr=log_file, env=os.environ | environment, start_new_session=True
                    )
                except OSError as error:
                    raise LarPOError(f"`server_command` cannot be started: {error}.") from error
            servers.append(Server(process, port))
            write_json(record, [[x.process.pid, _start_time(x.process.pid)] for x in servers])
        for index, server in enumerate(servers):
            log = log_folder / f"server_{index}.log"
            _await_health(server.process, server.root + health_route, start_timeout, log)
        yield servers
    finally:
        for server in servers:
            end_family(server.process.pid, _TIME_TO_STOP)
            server.process.wait()
        record.unlink(missing_ok=True)


def server_command(command: str, **values: object) -> tuple[list[str], dict[str, str]]:
    """
    Words and environment of a server's command.

    Raises:
        ConfigError: If the command lacks `{model}` or `{port}`, or has braces that mean nothing.
    """
    for name in ("{model}", "{port}"):
        if name not in command:
            raise ConfigError(f"`server_command` has no {name}; write e.g. 'vllm serve {{model}} --port {{port}}'.")
    try:
        words = [os.path.expandvars(word).format(**values) for word in shlex.split(command)]
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"`server_command` cannot be read ({error}); it may hold {{model}}, {{port}} and {{index}}."
        ) from None
    environment = {}
    while words and "=" in words[0] and words[0].split("=")[0].isidentifier():
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    return words, environment


def stop_leftovers(record: Path) -> None:
    """Stops servers that a killed process left behind, and no others: process ids are used again in time."""
    if not record.exists():
        return
    for pid, start_time in read_json(record):
        if start_time is not None and _start_time(pid) == start_time:
            logger.warning(f"Stopping the server with process id {pid} that an earlier run left behind.")
            end_family(pid, _TIME_TO_STOP)
    record.unlink()


def check_servers(urls: list[str] | None, command: str | None, api_key_variable: str) -> None:
    """
    Checks what servers need before any time is spent.

    Args:
        urls: Addresses of running servers, which are asked for their models.
        command: What starts servers later.
        api_key_variable: Environment variable with their key.

    Raises:
        ConfigError: If the package openai is missing, or a server does not answer.
    """
    for url in urls or []:
        check_url(url, api_key_variable)
    if urls or command:
        try:
            import openai  # noqa: F401
        except ImportError:
            raise ConfigError("Servers need the package openai: pip install 'trl-larpo[server]'.") from None


def check_url(url: str, api_key_variable: str, timeout: float = 10.0) -> None:
    """
    Asks a running server for its models.

    Raises:
        ConfigError: If it does not answer, or its key cannot be sent.
    """
    key = api_key(api_key_variable)
    try:
        request = urllib.request.Request(url.rstrip("/") + "/models")
        request.add_header("Authorization", f"Bearer {key}")
        check_answer(request, timeout)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`server_urls`: {url} does not answer ({' '.join(str(error).split())}). Start the server, or correct the "
            "address; it ends in /v1 for most servers."
        ) from None


def _await_health(process: subprocess.Popen, url: str, timeout: float, log: Path) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerStartError(f"The server ended with status {process.returncode} before it was ready; see {log}.")
        try:
            check_answer(url, timeout=5)
            return
        except (OSError, ValueError):
            time.sleep(0.5)
    raise ServerStartError(f"The server was not ready after {timeout:.0f} s ({url}); see {log}.")


def _start_time(pid: int) -> float | None:
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None


def _free_port(taken: set[int]) -> int:
    """A port that nothing listens on, nor will one of the servers that were just started."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if port not in taken:
            return port
