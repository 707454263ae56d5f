"""The benchmark scripts run and draw, on tiny models. Their timings are not looked at."""

import importlib.util
import json
from pathlib import Path

import pytest
import tiny
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_larpo import cli
from trl_larpo.storage import read_jsonl

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_benchmarks_run_and_are_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    training_step, plot = load("training_step"), load("plot")
    output = tmp_path / "results.json"
    options = ["--shape", "tiny", "--steps", "1", "--lengths", "20/6", "--lists", "20/6/3", "--output", str(output)]
    results = training_step.main(["pairs", "lists", "memory", "scaling", *options])
    assert list(results) == ["pairs", "lists", "memory", "scaling"]
    pair, ranked = results["pairs"]["results"][0], results["lists"]["results"][0]
    assert set(pair["seconds"]) == {"DPOTrainer", "LarPOTrainer"}
    assert set(ranked["seconds"]) == {"separate", "shared", "DPOTrainer, all pairs"}
    memory = results["memory"]["results"]
    assert [entry["list_size"] for entry in memory] == [2, 4, 8, 16, 32]
    assert memory[-1]["kept_bytes"]["chunks of 2"] <= 1.25 * memory[0]["kept_bytes"]["whole"]
    assert "list of 3, 20/6, 3 pairs" in capsys.readouterr().out
    plot.main(str(output), str(tmp_path / "results.png"))
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_bad_lengths_are_refused(capsys):
    with pytest.raises(SystemExit):
        load("training_step").main(["lists", "--lists", "20/6"])
    assert "'20/6' is not 3 numbers with / between them" in capsys.readouterr().err


def test_sampling_beside_generate(talkative_model, capsys):
    options = ["--prompts", "6", "--num_samples", "2", "--batch_size", "4", "--max_new_tokens", "30", "--longest", "12"]
    result = load("generation").main(["--model", talkative_model, *options, "--dtype", "float32", "--repeats", "6"])
    assert set(result) == {"generate", "trl-larpo", "ratio"}
    # Both sides sample from the same distribution and count the same way
    lengths = [result[side]["mean_length"] for side in ("generate", "trl-larpo")]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.35) and 2 < lengths[0] < 25
    assert "tokens/s" in capsys.readouterr().out


def test_where_the_time_of_a_run_went(finished_run, capsys):
    result = load("whole_run").main([str(finished_run)])
    selections = [json.loads((finished_run / f"iteration_{i}/selection.json").read_text()) for i in (1, 2)]
    assert result["lists"] == sum(selection["lists"] for selection in selections)
    assert result["samples"] == 48  # 6 prompts, 4 samples, 2 iterations
    assert all(seconds > 0 for stage, seconds in result["seconds"].items() if stage not in ("reward", "select"))
    assert f"{result['lists']} lists in each epoch" in capsys.readouterr().out


def test_memory_of_a_command_is_that_of_the_process_that_works(tmp_path):
    # `larpo run` works in a process that the one which is started watches over
    works = "import time; x = bytearray(10**8); time.sleep(2)"
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {works!r}])"
    peak, own, _ = load("run_folder").measure(["-c", starts], tmp_path, tmp_path / "log")
    assert peak > 1e8 and (own == 0 or 1e8 < own < 4e8)


def test_a_large_run_folder_in_small(tmp_path, monkeypatch, capsys):
    script = load("run_folder")

    def measured(words, folder, log):
        monkeypatch.chdir(folder)
        assert words[0] == "-c" or cli.main(words[2:]) == 0
        return 1e9, 1e9, 1.0

    monkeypatch.setattr(script, "measure", measured)
    output = tmp_path / "folder"
    results = script.main(["--prompts", "20", "--characters", "100", "--output", str(output)])
    assert set(results) == {"import", "resume", "status", "report", "select", "recall"}
    assert len(read_jsonl(output / "run/iteration_1/rewarded.jsonl")) == 20
    assert len(read_jsonl(output / "lists.jsonl")) == 20 and (output / "recall/recall.md").exists()
    assert "report.html" in capsys.readouterr().out


def test_tokenizing_by_turns(tiny_model, capsys):
    options = ["--prompts", "5", "50", "--completions", "2", "3", "--words", "4", "--lists", "2", "--repeats", "1"]
    results = load("tokenization").main(["--model", tiny_model, *options])
    assert set(results) == {(5, 2), (5, 3), (50, 2), (50, 3)}
    assert "ratio" in capsys.readouterr().out


def test_the_estimate_equals_that_of_deepspeed():
    estimate = load("memory_estimate")
    stage2 = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2").estimate_zero2_model_states_mem_needs
    stage3 = pytest.importorskip("deepspeed.runtime.zero.stage3").estimate_zero3_model_states_mem_needs
    for shape in estimate.SHAPES.values():
        for gpus, nodes in ((1, 1), (8, 1), (8, 4)):
            for offload in (False, True):
                cpu, gpu = stage2(shape.params, gpus, nodes, cpu_offload=offload)
                assert estimate.model_states(shape, 2, gpus, nodes, offload) == pytest.approx((gpu, cpu), rel=1e-6)
                cpu, gpu, _ = stage3(shape.params, shape.largest_layer_params, gpus, nodes, offload, offload)
                assert estimate.model_states(shape, 3, gpus, nodes, offload) == pytest.approx((gpu, cpu), rel=1e-6)


def test_the_estimate_knows_the_size_of_models(tiny_model, capsys):
    estimate = load("memory_estimate")
    assert estimate.SHAPES["7B"].params == pytest.approx(7.24e9, rel=0.01)  # Mistral 7B
    assert estimate.SHAPES["70B"].params == pytest.approx(70.6e9, rel=0.01)  # Llama 3 70B
    assert estimate.SHAPES["135M"].params == 134_515_008  # SmolLM2
    shape = estimate.shape_of(tiny_model)
    assert shape.params == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    whole, chunks = (estimate.activations(shape, 100, 50, 32, chunk) for chunk in (None, 2))
    assert chunks < whole / 3
    estimate.main([])
    assert "Computed, not measured." in capsys.readouterr().out
    estimate.main(["--params", "13e9", "--gpus", "16"])
    assert "13.0" in capsys.readouterr().out


def test_the_estimate_knows_the_size_of_a_base_in_4_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    folder = tiny.save_tiny_model(tmp_path, hidden_size=64, intermediate_size=128)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", quantization_config=settings)
    scales = sum(4 * p.quant_state.absmax.numel() for p in model.parameters() if hasattr(p, "quant_state"))
    shape = load("memory_estimate").shape_of(folder)
    assert scales and model.get_memory_footprint() + scales == pytest.approx(shape.bytes_in_4_bits, rel=0.02)


def test_the_script_for_gpus_on_a_cpu(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(FOLDER)
    gpu, output = load("gpu"), tmp_path / "gpu.json"
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no GPU is visible to torch; --quick runs on a CPU" in capsys.readouterr().err
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # tests/distributed has ZeRO-3 with offloading, whose optimizer takes minutes to compile
    for name in [name for name in gpu.TRAININGS if "offloaded" in name]:
        monkeypatch.delitem(gpu.TRAININGS, name)
    gpu.main(["--quick", "--minutes", "60", "--output", str(output)])
    results = json.loads(output.read_text())
    compared = {row["what"]: row["is_right"] for row in results["rows"] if "is_right" in row}
    assert all(compared.values()), compared
    for precision in ("float32", "bfloat16"):
        for what in ("sdpa shared", "sdpa chunks of 2", "sdpa checkpointed LoRA", "pairs, against DPOTrainer"):
            assert f"{precision} {what}" in compared
    if importlib.util.find_spec("deepspeed"):
        assert compared["tiny ZeRO-3, 24/6/3"]
    timed = {row["section"] for row in results["rows"] if "seconds" in row}
    assert timed == {"large", "chunks", "sampling", "training", "sizes", "time"}
    ratios = [row["what"] for row in results["rows"] if row["section"] == "ratios"]
    assert "tiny sdpa shared, 3 x 24/6: DPOTrainer / shared" in ratios
    assert "flash_attention_2" in [row["what"] for row in results["rows"] if "not measured" in row.get("note", "")]
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
