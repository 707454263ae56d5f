"""
One command for a machine with a GPU: is it right, how fast is it, and what does it take?

    python examples/benchmarks/gpu.py --output outputs/gpu.json     # about eight minutes, one GPU of 24 to 80 GB
    python examples/benchmarks/gpu.py --quick                       # the same code with tiny models, on a CPU

It needs torch, transformers, trl, datasets and this package, and no network: weights are random, with the shapes of
models of 135M, 1.5B and 7B. FlashAttention, FlexAttention and peft are measured where they are installed. A section
that no time is left for is named in the table. With matplotlib, a picture is drawn beside the output.

Times are medians of steps: loss and backward pass, policy and reference, without the optimizer. Tokens per second
count distinct tokens, a prompt once for its list. Utilisation is 6 FLOPs for each of them and each parameter of the
policy, and 2 of the reference, attention left out, against a product of large matrices in the same run.
"""

import argparse
import dataclasses
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
import transformers
from datasets import disable_progress_bars
from training_step import (
    ON_GPU,
    SHAPES,
    Bench,
    all_pairs,
    kept_bytes,
    machine,
    make_list,
    matrix_product_flops,
    weights_of,
)
from trl import DPOTrainer

from trl_larpo import ConfigError, LarPOTrainer
from trl_larpo.generation.in_process import generate_completions
from trl_larpo.training.layout_costs import PRICES, Lengths, count_work, flops_of_pair
from trl_larpo.training.passes import Layout

ATTENTIONS = ("sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
LAYOUTS = {
    "separate": {"shared_prompt": "off"},
    "shared": {"shared_prompt": "on"},
    "chunks of 2": {"shared_prompt": "on", "candidate_chunk_size": 2},
    "checkpointed": {"shared_prompt": "on", "gradient_checkpointing": True},
}
HERE = Path(__file__).parent
CONFIGS = HERE.parent / "accelerate_configs"
TRAININGS = {  # name: configuration of accelerate, options of gpu_training.py, the package that it needs
    "plain": (None, [], "torch"),
    "ZeRO-3": (CONFIGS / "zero3.yaml", [], "deepspeed"),
    "ZeRO-3, offloaded": (CONFIGS / "zero3_offload.yaml", [], "deepspeed"),
    "QLoRA in 24 GiB": (None, ["--qlora", "--memory", "24"], "bitsandbytes"),
}
LAUNCH = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--main_process_port", "0",
          "--mixed_precision", "bf16" if ON_GPU else "no"]  # fmt: skip
FORCED = {"parts, masked": Layout.SPLIT, "dense mask": Layout.SHARED}  # shared, and done otherwise than chosen
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of the largest log-probability, and of the gradients' norm


@dataclasses.dataclass
class Plan:
    """What is measured: small for a CPU, or all of it. Lists are prompt/completion/size, in tokens and completions."""

    minutes: float = 8.0
    small: str = "135m"  # shapes: for what is right or wrong,
    medium: str = "1.5b"  # for all sizes of lists,
    large: str = "7b"  # and for the few that matter most
    sizes: tuple[int, ...] = (2, 4, 8, 16)
    prompts: tuple[int, ...] = (64, 384, 1500)
    completions: tuple[int, ...] = (128, 512)
    large_list: tuple[int, int, int] = (1500, 256, 8)
    large_pair: tuple[int, int, int] = (64, 192, 2)
    chunked_list: tuple[int, int, int] = (384, 512, 16)
    chunk_sizes: tuple[int, ...] = (1, 2, 4, 8)
    batch_sizes: tuple[int, ...] = (16, 64, 256)
    trained: str = "1.5b"  # with all weights; the largest shape with LoRA
    trained_list: tuple[int, int, int] = (384, 256, 4)
    new_tokens: int = 128
    matrix: int = 8192
    steps: int = 3


QUICK = Plan(
    minutes=1.0, small="tiny", medium="tiny", large="tiny", sizes=(2, 3), prompts=(8, 24), completions=(6,),
    large_list=(24, 6, 3), large_pair=(8, 6, 2), chunked_list=(24, 6, 4), chunk_sizes=(2,), batch_sizes=(1, 2, 4),
    trained="tiny", trained_list=(24, 6, 3),
    new_tokens=4, matrix=128, steps=1,
)  # fmt: skip


class Table:
    """Collects rows, and prints and saves each when it is known."""

    def __init__(self, plan: Plan, output: Path | None):
        self.plan, self.output, self.rows = plan, output, []
        self.deadline = time.monotonic() + 60 * plan.minutes
        self.peak_flops = 0.0
        self.attentions: list[str] = []  # that can be measured
        self.head = {
            "date": date.today().isoformat(),
            "machine": machine(),
            "versions": {name: __import__(name).__version__ for name in ("transformers", "trl", "trl_larpo")},
            "plan": dataclasses.asdict(plan),
        }

    def add(self, section: str, what: str, **values) -> dict:
        self.rows.append({"section": section, "what": what} | values)
        shown = [f"{_UNITS[name](value):>15}" for name, value in values.items() if name in _UNITS and value is not None]
        print(f"{section:<12} {what:<58}" + " ".join(shown) + f"  {values.get('note', '')}", flush=True)
        self.save()
        return self.rows[-1]

    def save(self) -> dict:
        results = self.head | {"peak_flops": self.peak_flops, "rows": self.rows}
        if self.output:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.output.write_text(json.dumps(results, indent=2) + "\n")
        return results


_UNITS = {
    "seconds": lambda x: f"{x * 1000:.1f} ms",
    "tokens_per_second": lambda x: f"{x:.0f} tokens/s",
    "utilisation": lambda x: f"{x:.1%} used",
    "peak_bytes": lambda x: f"{x / 2**30:.2f} GiB",
    "ratio": lambda x: f"{x:.2f} x",
    "logps": lambda x: f"logps {x:.0e}",
    "gradients": lambda x: f"grads {x:.0e}",
    "flops": lambda x: f"{x / 1e12:.1f} TFLOP/s",
}


def make_bench(shape: str, plan: Plan, dtype: torch.dtype | None = None, lora=False, checkpointing=False) -> Bench:
    options = argparse.Namespace(shape=shape, lora=lora, gradient_checkpointing=checkpointing, steps=plan.steps)
    return Bench(options, **({} if dtype is None else {"dtype": dtype}))


def free() -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def fits(shape: str) -> bool:
    """Whether policy, reference and gradients in bfloat16 and something to work with fit into the GPU."""
    if not ON_GPU:
        return True
    size = SHAPES[shape]
    layer = 3 * size["hidden_size"] * size["intermediate_size"] + 4 * size["hidden_size"] ** 2
    parameters = size["num_hidden_layers"] * layer + 2 * size["vocab_size"] * size["hidden_size"]
    free()
    return torch.cuda.mem_get_info()[0] > 6 * parameters + 10 * 2**30


def attentions(bench: Bench, table: Table, names: list[str]) -> list[str]:
    """Those of some that are installed and train on this device."""
    found = []
    for name in names:
        try:
            trainer = bench.trainer(LarPOTrainer, [make_list(bench.config.vocab_size, 8, 6, 2)], attention=name)
            bench.step(trainer, 0, 1)()
            found.append(name)
        except Exception as error:  # not installed, no backward pass, or not for this card
            table.add("attention", name, note=f"not measured: {' '.join(str(error).split())[:100]}")
    return found


def peak_bytes(bench: Bench, run) -> int:
    """Largest memory during a step; without a GPU, of what autograd keeps for the backward pass."""
    if not ON_GPU:
        return kept_bytes(run, weights_of(bench))
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


def time_step(
    table: Table, bench: Bench, trainer, row: int, size: tuple[int, int, int], section: str, **values
) -> dict:
    """Adds a row: one step on one list of the trainer's dataset."""
    prompt, completion, list_size = size
    checkpointed = ", checkpointed" * values.get("checkpointing", False)
    what = f"{bench.options.shape} {values['attention']} {values['layout']}{checkpointed}, "
    what += f"{list_size} x {prompt}/{completion}"
    values |= {"shape": bench.options.shape, "prompt": prompt, "completion": completion, "list_size": list_size}
    try:
        run = bench.step(trainer, row, row + 1)
        peak = peak_bytes(bench, run)
        [seconds] = median_of_steps(table, run)
    except torch.OutOfMemoryError:
        trainer.model.zero_grad(set_to_none=True)
        free()
        return table.add(section, what, **values, note="out of memory")
    rate = (prompt - 1 + list_size * (completion + 1)) / seconds
    flops = (6 if values.get("without_reference") else 8) * bench.num_parameters * rate
    return table.add(
        section, what, **values, seconds=seconds, tokens_per_second=rate, utilisation=flops / table.peak_flops,
        peak_bytes=peak,
    )  # fmt: skip


def median_of_steps(table: Table, *runs) -> list[float]:
    """Of steps by turns: as many as the plan says, and more where they are short, because the host's time varies."""
    for run in runs:
        run()
    times = [[run() for run in runs] for _ in range(table.plan.steps)]
    while sum(map(sum, times)) < 0.5 * table.plan.steps * len(runs) and len(times) < 5 * table.plan.steps:
        times.append([run() for run in runs])
    return [statistics.median(of_run) for of_run in zip(*times, strict=True)]


def lists_of(bench: Bench, sizes) -> list[dict]:
    return [make_list(bench.config.vocab_size, *size, seed=seed) for seed, size in enumerate(sizes)]


def measure_matrix_product(table: Table) -> None:
    """What the device reaches on a product of large matrices, and what utilisation is a share of."""
    size, dtype = table.plan.matrix, torch.bfloat16 if ON_GPU else torch.float32
    table.peak_flops = matrix_product_flops(dtype, size)
    table.add("matrix", f"product of {size} x {size}, {str(dtype).removeprefix('torch.')}", flops=table.peak_flops)


def check_numbers(table: Table) -> None:
    """Every layout and attention against separate rows with SDPA, and pairs against DPOTrainer."""
    sizes = [(24, 6, 3), (9, 12, 3)]
    for dtype in (torch.bfloat16, torch.float32):
        precision = str(dtype).removeprefix("torch.")
        for lora in (False, True):
            if lora and importlib.util.find_spec("peft") is None:
                table.add("numbers", f"{precision} LoRA", note="not measured: peft is not installed")
                continue
            expected = None
            names = ("sdpa",) if lora else [x for x in ATTENTIONS if x == "sdpa" or x in table.attentions]
            for attention in names:
                for layout in LAYOUTS:
                    bench = make_bench(table.plan.small, table.plan, dtype, lora)
                    what = f"{precision} {attention} {layout}{' LoRA' if lora else ''}"
                    try:
                        found = numbers_of(bench, LarPOTrainer, lists_of(bench, sizes), attention, **LAYOUTS[layout])
                    except (RuntimeError, ConfigError) as error:  # FlashAttention in float32
                        table.add("numbers", what, note=f"not possible: {' '.join(str(error).split())[:80]}")
                        continue
                    if expected is None:
                        expected = found
                        continue
                    _compare(table, what, found, expected, TOLERANCE[dtype])
        bench = make_bench(table.plan.small, table.plan, dtype)
        pairs = [pair for row in lists_of(bench, [(24, 6, 2), (9, 12, 2)]) for pair in all_pairs(row)]
        theirs = numbers_of(bench, DPOTrainer, pairs, "sdpa")
        ours = numbers_of(bench, LarPOTrainer, pairs, "sdpa")
        _compare(table, f"{precision} pairs, against DPOTrainer", ours, theirs, TOLERANCE[dtype])


def numbers_of(bench: Bench, cls, rows: list[dict], attention: str, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the candidates (the loss, of DPOTrainer and pairs) and all gradients of one batch."""
    trainer = bench.trainer(cls, rows, attention, **options)
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))]))
    trainer.model.train()
    trainer.model.zero_grad(set_to_none=True)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = [p.grad.float().flatten().cpu() for p in trainer.model.parameters() if p.grad is not None]
    trainer.model.zero_grad(set_to_none=True)
    if "completions" not in rows[0]:
        return loss.detach()[None], torch.cat(gradients)
    with torch.no_grad():
        return trainer._policy_scorer(trainer.model, batch).logps.float().cpu(), torch.cat(gradients)


def _compare(table: Table, what: str, found, expected, tolerance: float) -> None:
    (logps, gradients), (right, right_gradients) = found, expected
    off = float((logps - right).abs().max() / right.abs().max())
    gradients_off = float((gradients - right_gradients).norm() / right_gradients.norm())
    is_right = off <= tolerance and gradients_off <= tolerance
    table.add("numbers", what, logps=off, gradients=gradients_off, is_right=is_right, note="" if is_right else "WRONG")


def time_large(table: Table) -> None:
    """A long list and a short pair with the largest shape that fits: layouts, and DPOTrainer over all pairs."""
    shape = next((x for x in (table.plan.large, table.plan.medium, table.plan.small) if fits(x)), table.plan.small)
    bench = make_bench(shape, table.plan)
    for size in (table.plan.large_list, table.plan.large_pair):
        [row] = lists_of(bench, [size])
        for checkpointing in (False, True):
            for attention in table.attentions:
                forced = FORCED if attention == "sdpa" and not checkpointing else {}
                for layout in ("shared", "separate", *forced):
                    options = LAYOUTS["shared" if layout in forced else layout]
                    trainer = bench.trainer(
                        LarPOTrainer, [row], attention, gradient_checkpointing=checkpointing, **options
                    )
                    for scorer in (trainer._policy_scorer, trainer._reference_scorer):
                        scorer.layout = forced.get(layout, scorer.layout)
                    time_step(table, bench, trainer, 0, size, "large", attention=attention, layout=layout,
                              checkpointing=checkpointing)  # fmt: skip
            time_against_pairs(table, bench, row, size, checkpointing)


def time_against_pairs(table: Table, bench: Bench, row: dict, size: tuple[int, int, int], checkpointing: bool) -> None:
    """
    Adds two rows, timed by turns: the layout that is chosen by itself, and DPOTrainer over all pairs of the list. Of
    those, two are timed, as they all have the same size.
    """
    shape, (prompt, completion, list_size) = bench.options.shape, size
    pairs = all_pairs(row)
    count = min(2, len(pairs))  # at a time, as with gradient accumulation
    of = f"{', checkpointed' * checkpointing}, {list_size} x {prompt}/{completion}"
    names = {"auto": f"{shape} sdpa auto{of}", "DPOTrainer": f"{shape} DPOTrainer{of}, {len(pairs)} pairs"}
    values = {"shape": shape, "attention": "sdpa", "prompt": prompt, "completion": completion, "list_size": list_size,
              "checkpointing": checkpointing}  # fmt: skip
    options = {"gradient_checkpointing": checkpointing}
    theirs = bench.step(bench.trainer(DPOTrainer, pairs, **options), 0, count)
    ours = bench.step(bench.trainer(LarPOTrainer, [row], **options), 0, 1)
    try:
        seconds = median_of_steps(table, ours, theirs)
    except torch.OutOfMemoryError:
        free()
        table.add("large", names["DPOTrainer"], **values, layout="DPOTrainer", note="out of memory")
        return
    for name, of_step in zip(names, (seconds[0], seconds[1] * len(pairs) / count), strict=True):
        table.add("large", names[name], **values, layout=name, seconds=of_step)


def time_sizes(table: Table) -> None:
    """All sizes of lists with the middle shape."""
    plan, shape = table.plan, table.plan.medium if fits(table.plan.medium) else table.plan.small
    bench = make_bench(shape, plan, checkpointing=True)
    sizes = [(p, c, m) for p in plan.prompts for c in plan.completions for m in plan.sizes]
    for attention in table.attentions:
        for layout in ("shared", "separate"):
            trainer = bench.trainer(LarPOTrainer, lists_of(bench, sizes), attention, **LAYOUTS[layout])
            for row, size in enumerate(sizes):
                if time.monotonic() > table.deadline:
                    table.add("sizes", f"{shape} {attention} {layout}", note="stopped: no time is left")
                    return
                time_step(table, bench, trainer, row, size, "sizes", attention=attention, layout=layout)


def time_chunks(table: Table) -> None:
    """Memory and time by chunk size; without a reference model, as after `precompute_ref_log_probs`."""
    plan, shape = table.plan, table.plan.medium if fits(table.plan.medium) else table.plan.small
    bench = make_bench(shape, plan)
    pair, size = (*plan.chunked_list[:2], 2), plan.chunked_list
    for of_list, chunk_size in [(pair, None), (size, None), *((size, chunk) for chunk in plan.chunk_sizes)]:
        layout = "whole" if chunk_size is None else f"chunks of {chunk_size}"
        trainer = bench.trainer(LarPOTrainer, lists_of(bench, [of_list]), candidate_chunk_size=chunk_size)
        time_step(table, bench, trainer, 0, of_list, "chunks", attention="sdpa", layout=layout)
    row = lists_of(bench, [size])[0] | {"ref_logps": [-100.0] * size[2]}
    trainer = bench.trainer(LarPOTrainer, [row])
    time_step(table, bench, trainer, 0, size, "chunks", attention="sdpa", layout="precomputed", without_reference=True)


def time_sampling(table: Table) -> None:
    """Sampling in this process, by the number of samples at a time."""
    plan, shape = table.plan, table.plan.medium if fits(table.plan.medium) else table.plan.small
    bench = make_bench(shape, plan, lora=True)  # one model
    model = bench.models[0].eval()
    prompts = [row["prompt"] for row in lists_of(bench, [(64, 2, 2)] * max(plan.batch_sizes))]
    generate_completions(model, bench.tokenizer, prompts[:1], num_samples=2, max_new_tokens=2)  # warm-up
    for batch_size in plan.batch_sizes:
        start = time.perf_counter()
        samples = generate_completions(
            model, bench.tokenizer, prompts[: max(1, batch_size // 4)], num_samples=4, batch_size=batch_size,
            max_new_tokens=plan.new_tokens,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        tokens = sum(sample.num_tokens for of_prompt in samples for sample in of_prompt)
        table.add("sampling", f"{shape}, {batch_size} samples at a time, of {plan.new_tokens} tokens",
                  batch_size=batch_size, seconds=seconds, tokens_per_second=tokens / seconds)  # fmt: skip


def time_training(table: Table) -> None:
    """Whole steps, each kind in a process of its own: plain, ZeRO-3, ZeRO-3 offloaded to the CPU, and QLoRA."""
    plan, expected = table.plan, None
    shapes = [shape for shape in (plan.trained, plan.large) if fits(shape)] or [plan.small]
    with tempfile.TemporaryDirectory() as folder:
        for name, (config, flags, package) in TRAININGS.items():
            shape = shapes[-1] if "--qlora" in flags else shapes[0]
            what = f"{shape} {name}, {'/'.join(map(str, plan.trained_list))}"
            if importlib.util.find_spec(package) is None or ("--qlora" in flags and not ON_GPU):
                table.add("training", what, note=f"not measured: {package} is not installed, or there is no GPU")
            elif time.monotonic() > table.deadline:
                table.add("training", what, note="not measured: no time is left")
            else:
                found = run_training(saved_model(shape, Path(folder), plan), config, flags, plan)
                if "note" not in found and "--qlora" not in flags:
                    losses = torch.tensor(found.pop("losses"))
                    expected = losses if expected is None else expected
                    off = float((losses - expected).abs().max() / expected.abs().max())
                    is_right = off <= TOLERANCE[torch.bfloat16 if ON_GPU else torch.float32]
                    found |= {"is_right": is_right, "note": "" if is_right else "WRONG"}
                table.add("training", what, shape=shape, **found)


def saved_model(shape: str, folder: Path, plan: Plan) -> Path:
    """A folder with random weights and the tokenizer."""
    path = folder / shape
    if not path.exists():
        bench = make_bench(shape, plan, lora=True)  # one model
        bench.models[0].save_pretrained(path)
        bench.tokenizer.save_pretrained(path)
        del bench
        free()
    return path


def run_training(model: Path, config: Path | None, flags: list[str], plan: Plan) -> dict:
    """What gpu_training.py finds; a note if it failed."""
    launch = [] if config is None else [*LAUNCH, "--config_file", str(config)]
    size, result = "/".join(map(str, plan.trained_list)), model.with_suffix(".json")
    own = ["--model", str(model), "--list", size, "--steps", str(plan.steps + 1), "--output", str(result), *flags]
    done = subprocess.run(
        [sys.executable, *launch, str(HERE / "gpu_training.py"), *own], capture_output=True, text=True,
        env=os.environ | ({} if ON_GPU else {"DS_ACCELERATOR": "cpu"}),
    )  # fmt: skip
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line] or ["no message"]
        return {"note": f"failed: {lines[0].strip()[:100]}"}
    return json.loads(result.read_text())


def compare_layouts(table: Table) -> None:
    """How many times faster shared prompts are than separate rows, and than DPOTrainer over all pairs."""
    timed = {}
    for row in table.rows:
        if row["section"] in ("large", "sizes") and "seconds" in row:
            names = ("section", "shape", "prompt", "completion", "list_size", "checkpointing")
            size = tuple(row.get(name) for name in names)
            timed[size, row["attention"], row["layout"]] = row
    for (size, attention, layout), row in timed.items():
        others = {"separate rows": (size, attention, "separate"), "DPOTrainer": (size, "sdpa", "DPOTrainer")}
        for name, key in others.items():
            if layout in ("auto", "shared") and key in timed and "seconds" in timed[key]:
                ratio = timed[key]["seconds"] / row["seconds"]
                table.add("ratios", f"{row['what']}: {name} / {layout}", ratio=ratio)


def fit_prices(table: Table) -> None:
    """
    What the choice of layouts should know of this device (`PRICES` in trl_larpo/training/layout_costs.py), by least
    squares over relative errors of the steps in `sizes`; prices below zero are left out.
    """
    kernels = {"sdpa": "mask", "flex_attention": "blocks"}
    for attention in table.attentions:
        rows = [row for row in table.rows if row["section"] == "sizes" and row.get("attention") == attention]
        rows = [row for row in rows if "seconds" in row]
        if len({row["layout"] for row in rows}) < 2:
            continue
        shape, quantities = SHAPES[rows[0]["shape"]], []
        kernel = kernels.get(attention, "lengths")
        shared = {"mask": Layout.PACKED, "blocks": Layout.SHARED}.get(kernel, Layout.SPLIT)
        for row in rows:
            lengths = Lengths([row["prompt"]], [[row["completion"]] * row["list_size"]])
            work = count_work(lengths, Layout.SEPARATE if row["layout"] == "separate" else shared, kernel)
            of_attention = work.pairs * flops_of_pair(argparse.Namespace(**shape))
            quantities.append([1, work.tokens, of_attention, work.is_apart * work.tokens, work.is_apart])
        seconds = torch.tensor([row["seconds"] for row in rows], dtype=torch.float64)
        relative = torch.tensor(quantities, dtype=torch.float64) / seconds[:, None]
        found, kept = torch.zeros(5, dtype=torch.float64), [0, 1, 2, 3, 4]
        while kept:
            solution = torch.linalg.lstsq(relative[:, kept], torch.ones(len(rows), dtype=torch.float64), driver="gelsd")
            if (solution.solution >= 0).all():
                found[kept] = solution.solution
                break
            kept.pop(int(solution.solution.argmin()))
        if found[1] > 0:
            off = (relative @ found - 1).abs().mean()
            flops, apart, batch = (found[2:] / found[1]).tolist()
            launch = f"launch={PRICES['cuda'].launch:g}, launch_apart={PRICES['cuda'].launch_apart}"  # not fitted here
            prices = f"Prices(flops={flops:.2f}, apart={apart:.3f}, batch={batch:.1f}, {launch})"
            table.add("prices", f"{attention}: {prices}", note=f"steps are {off:.0%} off on average")


def draw(results: dict, picture: Path) -> None:
    """Time of the large list by layout, shared rows against separate ones by list size, and memory by chunk size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in results["rows"] if "seconds" in row and "prompt" in row]
    large = [row for row in rows if row["section"] == "large" and row["prompt"] == results["plan"]["large_list"][0]]
    ratios: dict[tuple, dict[int, dict[str, float]]] = {}
    for row in rows:
        if row["section"] == "sizes":
            line = ratios.setdefault((row["attention"], row["prompt"], row["completion"]), {})
            line.setdefault(row["list_size"], {})[row["layout"]] = row["seconds"]
    chunks = [row for row in rows if row["section"] == "chunks"]
    panels = [name for name, has in (("large", large), ("sizes", ratios), ("chunks", chunks)) if has]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(6.2 * len(panels), 4.5), layout="constrained", squeeze=False)
    figure.suptitle(results["machine"], fontsize=10)
    of = dict(zip(panels, axes[0], strict=True))
    if large:
        large.sort(key=lambda row: row["seconds"])
        names = [
            f"{row['layout']}{', checkpointed' * row['checkpointing']}" for row in large if row["layout"] != "auto"
        ]
        times = [row["seconds"] * 1000 for row in large if row["layout"] != "auto"]
        bars = of["large"].barh(names, times, color="#2a6f97")
        of["large"].bar_label(bars, [f" {x:,.0f}" for x in times], fontsize=8)
        prompt, completion, list_size = results["plan"]["large_list"]
        title = f"A list of {list_size}, {prompt}/{completion} tokens, {large[0]['shape']}"
        of["large"].set(title=title, xlabel="ms for a step, log scale", xscale="log")
        of["large"].margins(x=0.15)
        of["large"].invert_yaxis()
    if ratios:
        for (attention, prompt, completion), points in ratios.items():
            line = {n: times["separate"] / times["shared"] for n, times in points.items() if len(times) == 2}
            if line:
                label = f"{attention}, {prompt}/{completion}"
                of["sizes"].plot(*zip(*sorted(line.items()), strict=True), "o-", label=label)
        of["sizes"].axhline(1, color="#999999", linewidth=1)
        of["sizes"].set(title="Separate rows / shared prompts", xlabel="list size", ylabel="time of a step, ratio")
        if of["sizes"].get_legend_handles_labels()[0]:
            of["sizes"].legend(fontsize=7)
    if chunks:
        names = [f"{row['list_size']}, {row['layout']}" for row in chunks]
        bars = of["chunks"].barh(names, [row["peak_bytes"] / 2**30 for row in chunks], color="#2a6f97")
        of["chunks"].bar_label(bars, [f" {row['seconds'] * 1000:,.0f} ms" for row in chunks], fontsize=8)
        prompt, completion = chunks[0]["prompt"], chunks[0]["completion"]
        title = f"Memory by list size and chunks, {prompt}/{completion} tokens, {chunks[0]['shape']}"
        of["chunks"].set(title=title, xlabel="GiB, largest during a step")
        of["chunks"].margins(x=0.15)
        of["chunks"].invert_yaxis()
    for panel in of.values():
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=100)


SECTIONS = {
    "numbers": check_numbers,
    "large": time_large,
    "chunks": time_chunks,
    "sampling": time_sampling,
    "training": time_training,
    "sizes": time_sizes,
}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models: whether the script runs, not how fast")
    parser.add_argument("--minutes", type=float, help="no section begins after that many minutes")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to measure")
    parser.add_argument("--attentions", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS), help="and with which")
    parser.add_argument("--output", type=Path, help="JSON file for the results; the picture is written beside it")
    options = parser.parse_args(argv)
    if not options.quick and not ON_GPU:
        parser.error("no GPU is visible to torch; --quick runs on a CPU")
    plan = QUICK if options.quick else Plan()
    plan = dataclasses.replace(plan, minutes=options.minutes or plan.minutes)
    disable_progress_bars()
    transformers.logging.set_verbosity_error()
    table = Table(plan, options.output)
    print(
        f"{table.head['date']}, {table.head['machine']}, "
        + ", ".join(f"{k} {v}" for k, v in table.head["versions"].items())
    )
    measure_matrix_product(table)
    table.attentions = attentions(make_bench(plan.small, plan), table, options.attentions)
    for name in options.sections:
        if time.monotonic() > table.deadline:
            table.add(name, "", note="not measured: no time is left")
            continue
        start = time.monotonic()
        SECTIONS[name](table)
        free()
        table.add("time", name, seconds=time.monotonic() - start)
    compare_layouts(table)
    fit_prices(table)
    results = table.save()
    if options.output and importlib.util.find_spec("matplotlib"):
        draw(results, options.output.with_suffix(".png"))
    wrong = [row["what"] for row in table.rows if row.get("is_right") is False]
    print(f"{len(wrong)} of {sum('is_right' in row for row in table.rows)} comparisons are wrong: {wrong}")
    return results


if __name__ == "__main__":
    sys.exit(any(row.get("is_right") is False for row in main()["rows"]))
