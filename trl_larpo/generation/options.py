"""Options of sampling."""

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..options import DTYPES, check_choice, option
from ..set_aside import SetAsideOptions
from .in_process import check_sampling


@dataclass
class GenerationOptions(SetAsideOptions):
    """How completions are sampled, in this process or by servers."""

    num_samples: int = option(10, "Completions sampled for each prompt in each iteration (k in the paper).")
    temperature: list[float] = option([1.0], "Sampling temperature: one, or one for each iteration.")
    top_p: float = option(1.0, "Nucleus sampling threshold, in (0, 1].")
    max_new_tokens: int = option(
        512,
        "Longest completion in tokens. One that is cut off there is marked `finished: false`; `truncated_completions` "
        "says how it is trained on.",
    )
    generation_batch_size: int = option(64, "Completions sampled at the same time by each process.")
    generation_dtype: str = option(
        "auto",
        "Arithmetic of sampling. 'auto': bfloat16 where the hardware has it, else float16 on a GPU, float32 on a CPU.",
        choices=[*DTYPES],
    )
    chat_template_kwargs: dict | str | None = option(
        None,
        'Arguments of the chat template, in sampling, training and evaluation alike, e.g. {"enable_thinking": false}.',
    )
    server_urls: list[str] | None = option(
        None,
        "Base addresses of running OpenAI-compatible servers (vLLM, SGLang, ...), e.g. http://127.0.0.1:8000/v1. "
        "`larpo run` stops after each training, and continues only when they offer its model by its path.",
    )
    server_command: str | None = option(
        None,
        "Command that starts a server of each iteration's model, e.g. 'vllm serve {model} --port {port}'. {index} "
        "counts "
        "the servers; words such as CUDA_VISIBLE_DEVICES={index} in front set the environment.",
    )
    num_servers: int = option(1, "Servers started by `server_command`.")
    server_model: str | None = option(
        None,
        "Name of the model on the servers. None: what {model} stands for in `server_command`; of `server_urls` the one "
        "with the model's path, else the first. If it is given, `larpo run` does not check which model "
        "`server_urls` have.",
    )
    server_health_route: str = option("/health", "Route that answers with status 200 when a started server is ready.")
    server_start_timeout: float = option(900.0, "Seconds that a started server may take until it is ready.")
    server_timeout: float = option(600.0, "Seconds that one request may take.")
    server_patience: float = option(120.0, "Seconds for which a server may fail before it is given up.")
    server_requests_in_flight: int = option(32, "Requests sent to each server at the same time.")
    server_api_key_variable: str = option(
        "OPENAI_API_KEY", "Environment variable with the key of the servers. The key itself is never stored."
    )

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """`chat_template_kwargs`, as they are once the options are checked."""
        assert not isinstance(self.chat_template_kwargs, str)  # JSON of a flag is read when the options are made
        return self.chat_template_kwargs or {}

    @property
    def uses_servers(self) -> bool:
        return bool(self.server_urls or self.server_command)

    def check_generation(self, num_iterations: int = 1) -> None:
        if self.num_samples < 2:
            raise ConfigError(
                f"`num_samples` is {self.num_samples}; a list needs at least 2 completions of each prompt."
            )
        if len(self.temperature) not in (1, num_iterations):
            raise ConfigError(
                f"`temperature` has {len(self.temperature)} numbers for {num_iterations} iterations; give one, or one "
                "for each."
            )
        for value in self.temperature:
            check_sampling(self.num_samples, value, self.top_p, self.max_new_tokens)
        self.check_sampler()

    def check_sampler(self) -> None:
        """Everything but how many samples there are and at which temperature."""
        self.check_set_aside()
        if self.generation_batch_size < 1:
            raise ConfigError(f"`generation_batch_size` is {self.generation_batch_size}; it must be at least 1.")
        check_choice("generation_dtype", self.generation_dtype, DTYPES)
        if self.server_urls and self.server_command:
            raise ConfigError(
                "`server_urls` and `server_command` exclude each other: servers run already, or are started."
            )
        for name in ("num_servers", "server_requests_in_flight"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` is {getattr(self, name)}; it must be at least 1.")
        for name in ("server_timeout", "server_start_timeout"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"`{name}` is {getattr(self, name)}; it must be more than 0 seconds.")
        for url in self.server_urls or []:
            if not url.startswith(("http://", "https://")):
                raise ConfigError(f"`server_urls` has {url!r}; an address starts with http:// or https://.")
            if "@" in url.split("://", 1)[1].split("/")[0]:
                raise ConfigError(
                    "`server_urls` has an address with a password in it, which would be stored. Give the key in the "
                    f"environment variable {self.server_api_key_variable}."
                )
