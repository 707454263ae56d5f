"""[`PolicySampler`]: samples candidates of many prompts from a model, in this process or from servers."""

import gc
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..candidates import CandidatePool
from ..pools import StoredPools
from ..preparation import preparing
from ..prompts import Prompt, Row
from ..set_aside import SetAside
from ..shares import share_of
from ..storage import GrowingFile
from ..waiting import wait_for_all
from .in_process import generate_completions
from .model_servers import ModelServers
from .options import GenerationOptions
from .sampling_task import SamplingTask, as_pool
from .server_sampling import ServerSampling

logger = logging.getLogger(__name__)

_BATCHES_PER_UNIT = 4  # at most this many batches are sampled again after a kill


class PolicySampler:
    """
    Samples candidates. The model, or servers of it, stay until another one is asked for or `close` is called.

    Args:
        options: How to sample; of `num_samples` and `temperature` only a task's `kinds` counts.
        seed: Seed of the random numbers.
        log_folder: Where the output of servers is kept.
        use_cpu: Do not use a GPU.
        attn_implementation: As in `from_pretrained`.
        quantization_config: How the model, or the base of an adapter, is quantized in this process. `None`: not.
        server_reload: What servers do between two models, as [`ModelServers`] takes it.
        with_adapters: Whether servers will have to serve adapters.
    """

    def __init__(
        self,
        options: GenerationOptions,
        *,
        seed: int,
        log_folder: Path,
        use_cpu: bool = False,
        attn_implementation: str | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        server_reload: str = "never",
        with_adapters: bool = False,
    ):
        self.options, self.seed, self.log_folder = options, seed, log_folder
        self.use_cpu, self.attn_implementation = use_cpu, attn_implementation
        self.quantization_config = quantization_config
        self._loaded: tuple[str, PreTrainedModel, PreTrainedTokenizerBase] | None = None
        self._servers = ModelServers(options, log_folder, reload=server_reload, with_adapters=with_adapters)

    def rest(self) -> None:
        """Lets go of the devices: of the model, and servers rest or are stopped."""
        if self._loaded is not None:
            self._loaded = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self._servers.rest()

    def close(self) -> None:
        """Lets go of the model and stops servers."""
        self._servers.close()
        self.rest()

    def sample(
        self,
        prompts: list[Prompt],
        task: SamplingTask,
        path: Path,
        on_pools: Callable[[list[CandidatePool]], None] = lambda pools: None,
    ) -> StoredPools:
        """
        Samples candidates of all prompts, each process its share of them.

        Args:
            prompts: The prompts.
            task: What to sample.
            path: Where the whole file will be. What is sampled is saved beside it ([`GrowingFile`]); called again after
                a kill, the rest is sampled.
            on_pools: Called with what this process has sampled and saved, a few prompts at a time.

        Returns:
            The prompts with their candidates, in their order, without those that were set aside ([`SetAside`]), for
            [`finish_samples`]. In processes but the first nothing.

        Raises:
            LarPOError: If no server answers any more, or too many prompts fail.
        """
        state = PartialState()
        file = GrowingFile(path, share=state.process_index, key="prompt_id")
        wait_for_all()  # all have read what is there before any process adds to it
        done = set(file.rows.keys)
        size = len(task.kinds)
        with tqdm(
            total=len(prompts) * size,
            initial=sum(prompt.id in done for prompt in prompts) * size,
            desc=task.description,
            unit=" completions",
            disable=not state.is_main_process,
        ) as progress:
            if state.is_main_process:  # also without servers: what earlier ones have refused is sampled now
                set_aside = SetAside(path, len(prompts), self.options.max_failed_share, "sampled")
            if not self.options.uses_servers:
                self._sample_in_process(prompts, done, task, file, progress, on_pools)
            elif state.is_main_process:
                work = ServerSampling(self._servers, self.options, self.seed, task, file, set_aside, progress, on_pools)
                work.sample(prompts, done)
        file.sync()
        wait_for_all()
        if not state.is_main_process:
            return StoredPools.none()
        return _saved_pools(path, prompts)

    def _sample_in_process(
        self,
        prompts: list[Prompt],
        done: set[str],
        task: SamplingTask,
        file: GrowingFile,
        progress: tqdm,
        on_pools: Callable[[list[CandidatePool]], None],
    ) -> None:
        # What is in a batch can change a result in its last digits: so a unit is sampled in whole or not at all, always
        # with the same prompts in it, whichever process does it
        options = self.options
        size = max(1, _BATCHES_PER_UNIT * options.generation_batch_size // len(task.kinds))
        ordered = sorted(prompts, key=lambda prompt: -len(prompt.text))
        units = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        remaining = [place for place, unit in enumerate(units) if any(prompt.id not in done for prompt in unit)]
        for unit in (units[place] for place in share_of(remaining)):
            with preparing():
                model, tokenizer = self._load(task.model_path, task.revision)
            pools = sample_pools(model, tokenizer, unit, task, options, self.seed, progress)
            new = [pool for pool in pools if pool.prompt.id not in done]
            file.add([pool.to_row() for pool in new])
            on_pools(new)

    def _load(self, path: str, revision: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self._loaded is None or self._loaded[0] != path:
            self._loaded = None  # before the next one is loaded
            device = device_of(self.use_cpu)
            quantized = self.quantization_config is not None
            # Weights are quantized where they are loaded, and such a model is not moved
            where = {"quantization_config": self.quantization_config, "device_map": {"": device}} if quantized else {}
            model = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=generation_dtype(self.options.generation_dtype, device),
                revision=revision,
                attn_implementation=self.attn_implementation,
                **where,
            )
            model = model if quantized else model.to(device)
            self._loaded = (path, model, AutoTokenizer.from_pretrained(path, revision=revision))
        return self._loaded[1:]


def sample_pools(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    task: SamplingTask,
    options: GenerationOptions,
    seed: int,
    progress: tqdm,
) -> list[CandidatePool]:
    """
    Samples candidates with a model that is loaded; nothing is saved.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        task: What to sample.
        options: How to sample.
        seed: Seed of the random numbers.
        progress: A bar to advance, in completions.
    """
    samples = generate_completions(
        model,
        tokenizer,
        [prompt.content for prompt in prompts],
        num_samples=len(task.kinds),
        temperature=task.temperatures,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.generation_batch_size,
        seed=seed,
        keys=[f"{task.key}/{prompt.id}" for prompt in prompts],
        progress=progress,
        chat_template_kwargs=options.template_kwargs,
    )
    return [
        as_pool(tokenizer, prompt, of_prompt, task, options.template_kwargs)
        for prompt, of_prompt in zip(prompts, samples, strict=True)
    ]


def _saved_pools(path: Path, prompts: list[Prompt]) -> StoredPools:
    """What was sampled so far, in the order of the prompts."""
    rows = GrowingFile(path, key="prompt_id").rows
    place_of = {name: place for place, name in enumerate(rows.keys)}
    sampled = [prompt for prompt in prompts if prompt.id in place_of]

    def pool(place: int) -> CandidatePool:
        prompt = sampled[place]
        return CandidatePool(prompt, CandidatePool.from_row(rows[place_of[prompt.id]]).candidates)

    return StoredPools([prompt.id for prompt in sampled], pool)


def finish_samples(path: Path, pools: Iterable[CandidatePool]) -> None:
    """
    Writes the whole file of what was sampled. On the way it counts the completions that ended and whose text alone
    would be tokenised in another way, each once: without responses to other prompts of the file.

    Args:
        path: Of the file.
        pools: The prompts with their candidates, each of which is read once.
    """
    num_ended = num_kept = 0

    def rows() -> Iterator[Row]:
        nonlocal num_ended, num_kept
        for pool in pools:
            for candidate in pool.candidates:
                if candidate.finished and candidate.of_prompt is None:
                    num_ended += 1
                    num_kept += candidate.token_ids is not None
            yield pool.to_row()

    GrowingFile.finish(path, rows())
    if num_kept:
        logger.info(
            f"{num_kept} of {num_ended} completions that ended would be tokenised in another way than they were "
            "sampled: their tokens are kept, and trained on."
        )


def device_of(use_cpu: bool) -> torch.device:
    """Where this process samples."""
    return torch.device("cpu") if use_cpu else PartialState().device


def generation_dtype(name: str, device: torch.device) -> torch.dtype:
    """
    The arithmetic to sample in.

    Args:
        name: Of a dtype; `"auto"`: bfloat16 where the device multiplies such matrices in hardware, else float16 on a
            GPU and float32 on a CPU.
        device: Where the model is.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if fast else torch.float32
