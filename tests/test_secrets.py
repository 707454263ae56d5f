"""Keys, tokens and passwords stay out of files, trackers and requests to others."""

import http.server
import json
import threading
import urllib.request

import pytest
import yaml
from small_run import change_options, larpo_run
from trl import ModelConfig

from trl_larpo import ConfigError, LarPOConfig
from trl_larpo.generation.server_process import check_url
from trl_larpo.generation.urls import _KeepKey
from trl_larpo.redaction import HIDDEN, hide_secrets
from trl_larpo.run.folder import RunFolder
from trl_larpo.run.hidden import environment_of_stages, with_hidden_options
from trl_larpo.run.options import RunConfig, RunTrainingConfig
from trl_larpo.settings import keep_settings
from trl_larpo.storage import read_yaml

SECRET = "s3cr3t-and-long-enough"


@pytest.mark.parametrize("value, expected", [
    ({"token": SECRET, "pad_token": "<pad>", "revision": "main"}, {"token": HIDDEN, "pad_token": "<pad>",
                                                                   "revision": "main"}),
    ({"a": [{"api_key": SECRET}], "token": True}, {"a": [{"api_key": HIDDEN}], "token": True}),
    (f"vllm serve {{model}} --api-key {SECRET} --port 1", f"vllm serve {{model}} --api-key {HIDDEN} --port 1"),
    (f"HF_TOKEN={SECRET} serve --api_key={SECRET}", f"HF_TOKEN={HIDDEN} serve --api_key={HIDDEN}"),
    (f"serve --api-key '{SECRET}' --max-tokens 5", f"serve --api-key {HIDDEN} --max-tokens 5"),
    ("serve --api-key $KEY --port {port}", "serve --api-key $KEY --port {port}"),
    (f"https://me:{SECRET}@host/v1?x=1&api_key={SECRET}#a", f"https://{HIDDEN}@host/v1?x=1&api_key={HIDDEN}#a"),
    (f"curl -H 'Authorization: Bearer {SECRET}'", f"curl -H 'Authorization: Bearer {HIDDEN}'"),
    ('curl -H "Authorization: Bearer $KEY" -H "Accept: a/b"', 'curl -H "Authorization: Bearer $KEY" -H "Accept: a/b"'),
    ({"notify_command": f"curl -sSu :{SECRET} http://a/"}, {"notify_command": HIDDEN}),
    ("docker run --user root:docker vllm", "docker run --user root:docker vllm"),
    (f"https://hooks.slack.com/services/T0/B0/{SECRET}", f"https://hooks.slack.com/services/{HIDDEN}"),
    (f"curl 'https://discord.com/api/webhooks/1/{SECRET}'", f"curl 'https://discord.com/api/webhooks/{HIDDEN}'"),
    (f"https://api.telegram.org/bot12:{SECRET}/sendMessage", f"https://api.telegram.org/bot{HIDDEN}"),
    ("https://hooks.slack.com/services/$PATH_OF_HOOK", "https://hooks.slack.com/services/$PATH_OF_HOOK"),
    ("hf_" + "a" * 30, HIDDEN), ("sk-" + "b" * 30, HIDDEN),
    ("Answer with one token. Keys are 3=c, 4=d", "Answer with one token. Keys are 3=c, 4=d"), (3.5, 3.5),
])  # fmt: skip
def test_what_is_hidden(value, expected):
    assert hide_secrets(value) == expected == hide_secrets(expected)


def test_secrets_are_in_no_file_and_no_tracker_and_reach_the_processes_of_stages(tmp_path, config, monkeypatch):
    secrets = {"model_init_kwargs": {"token": SECRET}, "output_dir": str(tmp_path / "out")}
    folder = RunFolder(
        RunConfig(prompts=[f"https://host/p.jsonl?token={SECRET}"], reward_funcs=["gsm8k"],
                  server_command=f"vllm serve {{model}} --port {{port}} --api-key {SECRET}"),
        config(RunTrainingConfig, **secrets),
        ModelConfig("model"),
    )  # fmt: skip
    folder.path.mkdir()
    folder.save_configuration()
    folder.check_configuration()  # what is hidden is no change
    text = (folder.path / "run.yaml").read_text()
    assert SECRET not in text and text.count(HIDDEN) == 3
    assert SECRET not in str(folder.training.to_dict())
    assert SECRET not in config(LarPOConfig, model_init_kwargs={"token": SECRET}).to_json_string()
    with pytest.raises(ConfigError, match=r"has a secret in it.* pass on the environment variable LARPO_HIDDEN_"):
        with_hidden_options(yaml.safe_load(text))
    for name, value in environment_of_stages(folder).items():
        monkeypatch.setenv(name, value)
    options = with_hidden_options(yaml.safe_load(text))
    assert options["model_init_kwargs"] == {"token": SECRET}
    assert options["server_command"] == folder.options.server_command
    assert options["prompts"] == folder.options.prompts


def test_settings_beside_an_output_have_no_secrets(tmp_path):
    path = tmp_path / "settings.json"
    keep_settings(path, {"prompts": [f"https://host/p.jsonl?sig={SECRET}"]}, "`output`")
    assert SECRET not in path.read_text() and HIDDEN in path.read_text()


def test_stages_need_no_secret_of_the_loop(tmp_path, config):
    """A launcher for several machines that passes no variables on works as before."""
    command = f"curl -u me:{SECRET} http://host"
    options = RunConfig(prompts=["a"], reward_funcs=["gsm8k"], notify_command=command)
    folder = RunFolder(options, config(RunTrainingConfig, output_dir=str(tmp_path / "out")), ModelConfig("model"))
    assert SECRET not in str(folder.configuration()) and environment_of_stages(folder) == {}
    folder.path.mkdir()
    folder.save_configuration()
    assert with_hidden_options(read_yaml(folder.path / "run.yaml"))["notify_command"] == HIDDEN


def test_a_text_that_looks_like_a_hidden_secret_stops_no_stage(tmp_path, config):
    options = RunConfig(prompts=["a"], reward_funcs=["gsm8k"], prompt_template=f"Guess the {HIDDEN} word: {{prompt}}")
    folder = RunFolder(options, config(RunTrainingConfig, output_dir=str(tmp_path / "out")), ModelConfig("model"))
    folder.path.mkdir()
    folder.save_configuration()
    assert environment_of_stages(folder) == {}
    assert with_hidden_options(read_yaml(folder.path / "run.yaml"))["prompt_template"] == options.prompt_template


def test_a_run_that_an_earlier_version_began_without_hiding_is_the_same(tmp_path, config):
    command = f"curl https://hooks.slack.com/services/{SECRET}"
    options = RunConfig(prompts=["a"], reward_funcs=["gsm8k"], notify_command=command)
    folder = RunFolder(options, config(RunTrainingConfig, output_dir=str(tmp_path / "out")), ModelConfig("model"))
    folder.path.mkdir()
    (folder.path / "run.yaml").write_text(yaml.safe_dump(folder._all_options()))
    folder.check_configuration()
    folder.save_configuration()
    assert [path.name for path in folder.path.iterdir()] == ["run.yaml"]
    assert SECRET not in (folder.path / "run.yaml").read_text()


def test_stages_read_a_run_yaml_of_before_hidden_options_were_listed():
    assert with_hidden_options({"seed": 3}) == {"seed": 3}
    assert with_hidden_options({"notify_command": HIDDEN})["notify_command"] == HIDDEN
    with pytest.raises(ConfigError, match="`server_command` has a secret in it"):
        with_hidden_options({"server_command": f"vllm --api-key {HIDDEN}", "seed": 3})


@pytest.mark.slow
def test_processes_of_a_run_get_what_run_yaml_hides(project):
    change_options(project, num_iterations=1, monitor_evals=0, num_processes=1, generation_processes=2)
    assert larpo_run("--model_init_kwargs", json.dumps({"token": SECRET})) == 0
    for path in (project / "out").rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


# Requests


@pytest.fixture
def serve():
    """Starts a server that answers with a status and headers, and keeps the headers of all requests."""
    servers = []

    def start(status=200, headers=None):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked.append(dict(self.headers))
                self.send_response(status if len(server.asked) == 1 else 200)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_redirect_to_another_server_does_not_take_the_key_along(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    other = serve()
    first = serve(302, {"Location": f"{other.url}/models"})
    check_url(first.url, "OPENAI_API_KEY")
    assert SECRET in first.asked[0]["Authorization"] and "Authorization" not in other.asked[0]
    same = serve(302, {"Location": "/v1/models"})
    check_url(same.url, "OPENAI_API_KEY")
    assert len(same.asked) == 2 and SECRET in same.asked[1]["Authorization"]


def test_servers_on_this_machine_are_asked_without_a_proxy(serve, monkeypatch):
    proxy, server = serve(), serve()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy.url)
    check_url(server.url, "OPENAI_API_KEY")
    assert server.asked and not proxy.asked


@pytest.mark.parametrize("other, same", [
    ("https://a.org/v1/models", True), ("https://a.org:443/x", True), ("https://a.org:444/v1", False),
    ("http://a.org/v1", False), ("https://b.org/v1", False), ("https://a.org.b.org/v1", False),
])  # fmt: skip
def test_the_key_stays_with_its_server(other, same):
    request = urllib.request.Request("https://a.org/v1/models", headers={"Authorization": SECRET})
    followed = _KeepKey().redirect_request(request, None, 302, "Found", {}, other)
    assert followed.has_header("Authorization") == same
    request = urllib.request.Request("http://a.org/v1/models", headers={"Authorization": SECRET})
    followed = _KeepKey().redirect_request(request, None, 302, "Found", {}, "https://a.org/v1/models")
    assert followed.has_header("Authorization"), "the same server, encrypted"
