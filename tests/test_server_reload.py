"""Servers that stay between two models: they take new weights, and rest while other stages have the devices."""

import logging
import re
import shlex
import sys
import time
from pathlib import Path

import psutil
import pytest
from transformers import AutoConfig

from trl_larpo import ConfigError, LarPOError
from trl_larpo.generation import server_process
from trl_larpo.generation.model_servers import ModelServers
from trl_larpo.generation.options import GenerationOptions
from trl_larpo.generation.server_routes import check_command
from trl_larpo.storage import write_json

COMMAND = f"{sys.executable} {Path(__file__).with_name('fake_server.py')} --port {{port}} {{model}}"


@pytest.fixture
def start(tmp_path):
    """Makes servers that imitate vLLM on a device, and stops them with the test."""
    made = []

    def make(flags="", num_servers=1, **arguments):
        options = GenerationOptions(server_command=f"{COMMAND} {flags}", num_servers=num_servers)
        made.append(ModelServers(options, tmp_path, **({"reload": "auto"} | arguments)))
        return made[-1]

    yield make
    for servers in made:
        servers.close()


def said(tmp_path, index=0):
    return (tmp_path / f"server_{index}.log").read_text().splitlines()


def processes(servers):
    return [psutil.Process(server.process.pid) for server in servers._servers]


def are_suspended(started):
    return any(x.status() == psutil.STATUS_STOPPED for x in started)


def become_suspended(started):
    """A process goes on for a moment after it was told to stop."""
    until = time.monotonic() + 5
    while not all(are_suspended([x]) for x in started) and time.monotonic() < until:
        time.sleep(0.01)
    return all(are_suspended([x]) for x in started)


SLEEP = ["/sleep?level=2"]
WAKE = ["/wake_up?tags=weights", "/collective_rpc second", "/wake_up?tags=kv_cache", "/reset_prefix_cache"]
LOAD = ["/collective_rpc second", "/reset_prefix_cache"]


@pytest.mark.parametrize(
    "device, asked, asked_again",
    [("gpu_that_sleeps", SLEEP + WAKE, SLEEP + WAKE), ("cpu", LOAD, LOAD[1:])],
)
def test_servers_rest_and_take_the_next_weights(start, tmp_path, device, asked, asked_again):
    servers = start(f"--vllm {device}", num_servers=2)
    urls, name = servers.serve("first")
    started = processes(servers)
    assert servers.serve("first") == (urls, name) == ([x.url for x in servers._servers], "first")
    assert said(tmp_path) == said(tmp_path, 1) == ["model first"]
    for told in (asked, asked_again):
        before = said(tmp_path)
        servers.rest()
        servers.rest()  # once is enough
        assert become_suspended(started) if device == "cpu" else not are_suspended(started)
        assert servers.serve("second") == (urls, name), "the name on the servers stays"
        assert not are_suspended(started)
        assert processes(servers) == started
        assert said(tmp_path) == said(tmp_path, 1) == before + told
    before = said(tmp_path)
    servers.serve("third")  # nothing else needed the devices in between
    assert said(tmp_path) == [*before, "/collective_rpc third", "/reset_prefix_cache"]


def test_a_server_that_has_ended_is_started_again_for_the_same_model(start, caplog):
    servers = start()
    servers.serve("first")
    [old] = processes(servers)
    old.kill()
    old.wait()
    servers.serve("first")
    assert processes(servers)[0].is_running() and "A server has ended" in caplog.text


def test_suspended_servers_hear_that_they_have_to_end(start, monkeypatch):
    """A process that is stopped does not answer SIGTERM, and would be killed after a long wait."""
    states, end = [], server_process.end_family

    def end_family(pid, seconds):
        states.append(psutil.Process(pid).status())
        end(pid, seconds)

    monkeypatch.setattr(server_process, "end_family", end_family)
    servers = start("--vllm cpu")
    servers.serve("first")
    started = processes(servers)
    servers.rest()
    servers.close()
    assert states and psutil.STATUS_STOPPED not in states
    assert not any(process.is_running() for process in started)


CANNOT_STAY = {
    "no vLLM": ("", "it answers /server_info with status 404"),
    "a GPU that is held": ("--vllm gpu", "start it with --enable-sleep-mode"),
    "an open port": ("--vllm cpu --host 0.0.0.0", r"it listens on 0\.0\.0\.0, .* start it with --host 127\.0\.0\.1"),
}


@pytest.mark.parametrize("case", CANNOT_STAY)
def test_servers_that_cannot_stay_are_restarted_and_it_is_said_once(start, tmp_path, caplog, case):
    flags, reason = CANNOT_STAY[case]
    servers = start(flags)
    with caplog.at_level(logging.WARNING, logger="trl_larpo.generation.model_servers"):
        for model in ("first", "second", "third"):
            assert servers.serve(model)[1] == model
            servers.rest()
            assert not servers._servers
    assert said(tmp_path) == ["model first", "model second", "model third"]
    [message] = [record.getMessage() for record in caplog.records]
    assert re.search(f"^Servers are restarted for each model, .*{reason}", message)
    with pytest.raises(LarPOError, match=f"`server_reload` is 'always', and a server cannot stay: .*{reason}"):
        start(flags, reload="always").serve("first")


@pytest.mark.parametrize(
    "device, adapters, stays", [("cpu", False, False), ("cpu", True, True), ("gpu_that_sleeps", True, False)]
)
def test_models_with_a_tied_head_are_restarted(start, tmp_path, caplog, device, adapters, stays):
    """vLLM keeps their old head."""
    model = str(tmp_path / "model")
    AutoConfig.for_model("llama", tie_word_embeddings=True).save_pretrained(model)
    servers = start(f"--vllm {device}", with_adapters=adapters)
    with caplog.at_level(logging.WARNING, logger="trl_larpo.generation.model_servers"):
        servers.serve(model)
    servers.rest()
    assert bool(servers._servers) == stays == ("whose head is tied" not in caplog.text)


@pytest.mark.parametrize("fault, obeyed", [("no_reload", ["/wake_up?tags=weights"]), ("no_sleep", [])])
def test_servers_that_refuse_are_restarted_and_it_is_said_once(start, tmp_path, caplog, fault, obeyed):
    servers = start(f"--vllm gpu_that_sleeps --fault {fault}", reload="always")
    with caplog.at_level(logging.WARNING, logger="trl_larpo.generation.model_servers"):
        for model in ("first", "second", "third"):
            assert servers.serve(model)[1] == model
            servers.rest()
    slept = SLEEP if fault == "no_reload" else []
    assert said(tmp_path) == ["model first", *slept, *obeyed, "model second", "model third"]
    [message] = [record.getMessage() for record in caplog.records]
    assert "with status 500: " in message and "not implemented" in message


def test_after_a_server_has_died_all_are_started_again_and_stay(start, tmp_path):
    servers = start("--vllm cpu", num_servers=2)
    servers.serve("first")
    _kill_one(servers)
    assert servers.serve("second")[1] == "second"
    servers.rest()
    servers.serve("third")
    assert said(tmp_path, 1) == ["model first", "model second", "/collective_rpc third", "/reset_prefix_cache"]
    _kill_one(servers)
    servers.rest()
    assert not servers._servers, "the other one does not hold a device for nothing"


def _kill_one(servers):
    servers._servers[0].process.kill()
    servers._servers[0].process.wait()


def test_servers_that_shall_not_stay_are_asked_nothing(start, tmp_path):
    servers = start("--vllm cpu", reload="never")
    for model in ("first", "second"):
        servers.serve(model)
    assert said(tmp_path) == ["model first", "model second"]


# Adapters


@pytest.fixture
def adapters(tmp_path):
    """Folders of two adapters of one base."""
    folders = [tmp_path / "iteration_1", tmp_path / "iteration_2"]
    for folder in folders:
        folder.mkdir()
        write_json(folder / "adapter_config.json", {"base_model_name_or_path": "base"})
    return [str(folder) for folder in folders]


@pytest.mark.parametrize("device", ["cpu", "gpu_that_sleeps"])
def test_adapters_take_turns_on_one_base(start, tmp_path, adapters, device):
    servers = start(f"--vllm {device}", with_adapters=True)
    assert servers.serve("base")[1] == "base"
    for folder in adapters:
        servers.rest()
        assert servers.serve(folder)[1] == folder == servers.serve(folder)[1]
    told = [line for line in said(tmp_path) if "adapter" in line]
    first, second = adapters
    assert told == [
        f"/v1/load_lora_adapter {first}",
        f"/v1/unload_lora_adapter {first}",
        f"/v1/load_lora_adapter {second}",
    ]
    assert sum(line.startswith("model ") for line in said(tmp_path)) == 1
    weights = [line for line in said(tmp_path) if line.startswith("/collective_rpc")]
    assert weights == (["/collective_rpc base"] * 2 if device != "cpu" else []), "sleep loses those of the base too"


def test_servers_that_are_restarted_take_adapters_too(start, tmp_path, adapters):
    servers = start("--vllm cpu", reload="never", with_adapters=True)
    for folder in adapters:
        assert servers.serve(folder)[1] == folder
        servers.rest()
    assert said(tmp_path) == [x for folder in adapters for x in ("model base", f"/v1/load_lora_adapter {folder}")]


def test_servers_that_take_no_adapters_are_named_before_they_sample(start, adapters):
    with pytest.raises(LarPOError, match=r"The servers take no adapters, .* set `merge_adapter: true`"):
        start(with_adapters=True).serve("base")
    with pytest.raises(LarPOError, match=r"does not take the adapter .*iteration_1: .*status 400: .*max_lora_rank 2"):
        start("--vllm cpu --fault no_adapter").serve(adapters[0])


# Commands

VLLM = "vllm serve {model} --port {port}"


@pytest.mark.parametrize("variable", ["VLLM_SERVER_DEV_MODE=1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"])
def test_routes_for_development_are_open_to_this_machine_alone(monkeypatch, variable):
    with pytest.raises(ConfigError, match=f"with {variable.split('=')[0]}, whoever reaches .* `--host 127.0.0.1`"):
        check_command(f"{variable} {VLLM}")
    with pytest.raises(ConfigError, match="whoever reaches"):
        check_command(f"{variable} {VLLM} --host 0.0.0.0")
    for good in (f"{variable} {VLLM} --host 127.0.0.1", f"{variable} {VLLM} --host=localhost", VLLM):
        check_command(good)
    check_command(f"{variable.split('=')[0]}=0 {VLLM}")
    monkeypatch.setenv(*variable.split("="))
    with pytest.raises(ConfigError, match="whoever reaches"):
        check_command(VLLM)


def test_commands_that_take_no_adapter_are_named():
    good = f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True {VLLM} --host 127.0.0.1 --enable-lora --max-lora-rank 32"
    check_command(good, adapter_rank=32)
    check_command("./my_servers.sh {model} {port}", adapter_rank=64)
    for bad in (
        good.replace("--enable-lora", ""),
        good.replace("--max-lora-rank 32", ""),
        shlex.join(shlex.split(good)[1:]),
    ):
        with pytest.raises(ConfigError, match=r"--enable-lora --max-lora-rank 32`. Start it so, or set `merge_adapter"):
            check_command(bad, adapter_rank=20)
