"""
[`ModelServers`]: servers that are started from a command, and serve one model after another.

Where they can, they stay. They take the weights of the next model, and in between they rest, because other stages need
the devices: on a GPU they sleep and free its memory, on a CPU their processes are suspended. Servers that cannot are
stopped, and started with the next model.
"""

import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import psutil
from transformers import AutoConfig

from ..errors import LarPOError
from ..storage import read_json
from .options import GenerationOptions
from .server_process import Server, ServerStartError, running_servers
from .server_routes import RouteError, ServerRoutes

logger = logging.getLogger(__name__)

RELOADS = ("auto", "always", "never")

_PAUSES = (10, 60, 120)
"""Seconds before servers that do not start are started again."""

_ADAPTER_OF = "adapter_config.json"

_T = TypeVar("_T")


class ModelServers:
    """
    Servers of one model at a time, or of a base with one adapter at a time.

    Args:
        options: With the command that starts them.
        log_folder: Where their output is kept.
        reload: Whether they stay and take the next model's weights: `"auto"` if they can, `"always"`, or `"never"`.
        with_adapters: Whether adapters will be asked for: servers that take none are refused before they sample.
    """

    def __init__(
        self, options: GenerationOptions, log_folder: Path, *, reload: str = "never", with_adapters: bool = False
    ):
        self.options, self.log_folder, self.reload, self.with_adapters = options, log_folder, reload, with_adapters
        self._stack = contextlib.ExitStack()
        self._servers: list[Server] = []
        self._name = self._weights = ""  # what they were started with, and whose weights they have
        self._adapter: str | None = None
        self._stay: dict[Server, bool] | None = None  # whether each sleeps; `None` if one of them cannot stay
        self._resting = False
        self._have_started = False  # once: then the command is right

    def serve(self, model_path: str) -> tuple[list[str], str]:
        """
        Makes the servers serve a model.

        Args:
            model_path: Folder or hub id of a model, or folder of an adapter.

        Returns:
            Their base addresses, and the name of the model there.

        Raises:
            LarPOError: If a server does not start or refuses an adapter, or if it has to stay and cannot.
        """
        base = base_of_adapter(model_path)
        weights = model_path if base is None else base
        if self._servers and not self._take(weights):
            self.close()
        if not self._servers:
            self._start(weights, with_adapters=self.with_adapters or base is not None)
        if base is not None:
            self._take_adapter(model_path)
        urls = [server.url for server in self._servers]
        return urls, self.options.server_model or self._name if base is None else model_path

    def rest(self) -> None:
        """Takes the devices from the servers. Those that cannot stay without are stopped."""
        if not self._servers or self._resting:
            return
        if self._stay is not None and self.are_alive():
            try:
                self._each(self._put_to_rest)
            except RouteError as error:
                self._stop_reloading(error)
            else:
                self._resting = True
                return
        self.close()

    def close(self) -> None:
        """Stops the servers."""
        for server in self._servers:
            _for_each_process(server, psutil.Process.resume)  # one that is suspended does not hear that it has to end
        self._servers, self._adapter, self._stay, self._resting = [], None, None, False
        self._stack.close()

    # Start and stay

    def _start(self, model: str, with_adapters: bool) -> None:
        options, started = self.options, time.monotonic()
        assert options.server_command is not None
        print(f"Starting {options.num_servers} server(s) of {model}; their output is in servers/")
        for pause in (*_PAUSES, None):
            servers = running_servers(
                options.server_command,
                model,
                options.num_servers,
                self.log_folder,
                health_route=options.server_health_route,
                start_timeout=options.server_start_timeout,
            )
            try:
                self._servers = self._stack.enter_context(servers)
                break
            except ServerStartError as error:  # such as for memory of a GPU that is not free yet
                if pause is None or not self._have_started:
                    raise
                logger.warning(f"{error} Servers have started before: trying again in {pause} s.")
                time.sleep(pause)
        self._have_started = True
        self._name = self._weights = model
        print(f"Ready after {time.monotonic() - started:.1f} s")
        if with_adapters:
            self._check_adapters()
        if self.reload != "never":
            try:
                stay = dict(self._each(lambda server: (server, self._routes(server).sleeps())))
                # A base on a CPU keeps its weights, and is only suspended
                if (any(stay.values()) or not with_adapters) and has_tied_head(model):
                    raise RouteError(
                        "vLLM keeps the old output head of a model whose head is tied to the embeddings, so that its "
                        "samples would be neither model's"
                    )
                self._stay = stay
            except RouteError as error:
                if self.reload == "always":
                    raise LarPOError(f"`server_reload` is 'always', and a server cannot stay: {error}.") from None
                self._stop_reloading(error)

    def _take(self, weights: str) -> bool:
        """Whether the servers have the weights of a model, or take them."""
        if not self.are_alive():
            logger.warning("A server has ended: all of them are started again.")
            return False
        if not self._resting and weights == self._weights:
            return True
        if self._stay is None:
            return False
        started = time.monotonic()
        try:
            self._each(lambda server: self._wake(server, weights))
        except RouteError as error:
            self._stop_reloading(error)
            return False
        self._weights, self._resting = weights, False
        self._drop_adapter()
        print(f"Loaded {weights} into {len(self._servers)} running server(s) in {time.monotonic() - started:.1f} s")
        return True

    def _put_to_rest(self, server: Server) -> None:
        if self._stay is not None and self._stay[server]:
            self._routes(server).sleep()
        else:
            _for_each_process(server, psutil.Process.suspend)

    def _wake(self, server: Server, weights: str) -> None:
        routes = self._routes(server)
        sleeps = self._resting and self._stay is not None and self._stay[server]
        if sleeps:
            routes.wake_up("weights")
        elif self._resting:
            _for_each_process(server, psutil.Process.resume)
        if sleeps or weights != self._weights:  # sleep loses them
            routes.load_weights(weights)
        if sleeps:
            routes.wake_up("kv_cache")
        routes.forget_prefixes()

    def _stop_reloading(self, reason: RouteError) -> None:
        """Says, once in a run, why servers are restarted from now on."""
        self.reload, self._stay = "never", None
        logger.warning(f"Servers are restarted for each model, because one cannot stay: {reason}.")

    # Adapters

    def _check_adapters(self) -> None:
        try:
            takes = all(self._each(lambda server: self._routes(server).takes_adapters()))
        except RouteError as error:
            raise LarPOError(f"A server does not say whether it takes adapters: {error}.") from None
        if not takes:
            raise LarPOError(
                "The servers take no adapters, and iterations end with one (`use_peft`). Start vLLM with "
                "`VLLM_ALLOW_RUNTIME_LORA_UPDATING=True` and `--enable-lora`, or set `merge_adapter: true`."
            )

    def _take_adapter(self, folder: str) -> None:
        if folder == self._adapter:
            return
        self._drop_adapter()
        try:
            self._each(lambda server: self._routes(server).load_adapter(folder))
        except RouteError as error:
            raise LarPOError(f"A server does not take the adapter {folder}: {error}.") from None
        self._adapter = folder

    def _drop_adapter(self) -> None:
        folder, self._adapter = self._adapter, None
        if folder is not None:
            with contextlib.suppress(RouteError):  # it only takes room
                self._each(lambda server: self._routes(server).unload_adapter(folder))

    # Servers

    def _routes(self, server: Server) -> ServerRoutes:
        options = self.options
        return ServerRoutes(server, options.server_api_key_variable, timeout=options.server_start_timeout)

    def are_alive(self) -> bool:
        """Whether none of those that were started has ended."""
        return all(server.process.poll() is None for server in self._servers)

    def _each(self, function: Callable[[Server], _T]) -> list[_T]:
        """Calls a function for all servers at the same time."""
        with ThreadPoolExecutor(len(self._servers)) as pool:
            return list(pool.map(function, self._servers))


def base_of_adapter(path: str) -> str | None:
    """The model that an adapter belongs to; `None` if the path is none of an adapter."""
    config = Path(path) / _ADAPTER_OF
    return read_json(config)["base_model_name_or_path"] if config.is_file() else None


def has_tied_head(model: str) -> bool:
    """Whether the output head of a model shares its weights with the embeddings."""
    try:
        return bool(AutoConfig.from_pretrained(model).get_text_config().tie_word_embeddings)
    except (OSError, ValueError):  # it is on the servers alone
        return False


def _for_each_process(server: Server, function: Callable[[psutil.Process], None]) -> None:
    for process in server.family():
        with contextlib.suppress(psutil.NoSuchProcess):
            function(process)
