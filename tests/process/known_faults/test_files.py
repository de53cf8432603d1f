"""Bytes that want to be objects, and the files of a model."""

import ast
import json
import pickle
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from bench.stack import ROOT, Stack
from gateway_http.settings import GatewaySettings
from headway.errors import HeadwayError
from scheduler_svc.settings import SchedulerSettings
from tests.gateway.texts import loaded, render
from tests.process.known_faults.conftest import COMPLETION

TRAVERSALS = ("../../etc/passwd", "..%2f..%2fetc%2fpasswd", "/etc/passwd", "a/../../b")


# --- bytes that want to be objects


@pytest.mark.parametrize(
    "fault", ["vllm-cve-2025-32444", "sglang-cve-2026-3059", "tensorrt-cve-2025-33255", "shadowmq"]
)
def test_a_pickle_is_no_message(stack: Stack, alice: httpx.Client, fault: str) -> None:
    bomb = pickle.dumps({"fault": fault, "x": Path("x")})
    assert alice.post("/v1/completions", content=bomb).status_code == 400
    with grpc.insecure_channel(stack.scheduler_address) as channel:
        for method in (
            "SchedulerService/Submit",
            "SchedulerService/Generate",
            "AdminService/GetSnapshot",
        ):
            call: Any = channel.unary_stream(f"/headway.v1.{method}")
            with pytest.raises(grpc.RpcError) as caught:
                list(call(bomb))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        call = channel.stream_stream("/headway.v1.FleetService/Attach")
        with pytest.raises(grpc.RpcError):
            list(call(iter([bomb])))


@pytest.mark.parametrize("package", ["zmq", "pickle", "cloudpickle", "dill", "yaml", "ray", "eval"])
def test_sglang_cve_2026_7301_nothing_here_unpickles_or_runs_text(package: str) -> None:
    for folder in ("scheduler_svc", "executor_svc", "gateway_http", "protos", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = [getattr(node, "module", None) or ""]
                    names += [alias.name for alias in node.names]
                    assert package not in {name.split(".")[0] for name in names}, path
                elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    assert node.func.id not in ("eval", "exec", "compile", "__import__"), path


def test_vllm_cve_2025_47277_everything_listens_on_loopback_unless_told_otherwise() -> None:
    assert GatewaySettings().host == SchedulerSettings().host == "127.0.0.1"
    for settings in (GatewaySettings, SchedulerSettings):
        with pytest.raises(ValueError, match="not loopback"):
            settings(host="0.0.0.0")


# --- files of a model


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"auto_map": {"AutoModel": "evil.Model"}}, id="vllm-cve-2025-66448"),
        pytest.param({"model_type": "vision", "auto_map": {}}, id="vllm-cve-2026-22807"),
        pytest.param({"model_type": "evil--code/repo"}, id="vllm-cve-2026-27893"),
    ],
)
def test_no_code_comes_with_a_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    from executor_svc.torch_engine.files import ModelError
    from executor_svc.torch_engine.model_config import load_spec

    source = json.loads((ROOT / "executor_svc/builtin_model/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(source))
    load_spec(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(source | changes))
    with pytest.raises(ModelError, match=r"auto_map|model_type"):
        load_spec(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("pytorch_model.bin", id="torch-cve-2025-32434"),
        pytest.param("model.pt2", id="torch-cve-2026-4538"),
        pytest.param("model.pkl", id="tensorrt-cve-2026-24142"),
        pytest.param("../../other/model.safetensors", id="triton-cve-2026-24208"),
        pytest.param("/etc/model.safetensors", id="dynamo-cve-2026-47612"),
    ],
)
def test_weights_are_safetensors_of_the_models_own_folder(tmp_path: Path, name: str) -> None:
    from executor_svc.torch_engine.files import ModelError
    from executor_svc.torch_engine.loader import Checkpoint

    folder = tmp_path / "a" / "model"
    folder.mkdir(parents=True)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"w": [1.0]}))
    with pytest.raises(ModelError, match="no such file"):
        Checkpoint(folder, {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(bytes(8))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ModelError, match=r"not a safetensors file|leads out|no such file"):
        Checkpoint(folder, {})


@pytest.mark.parametrize("name", TRAVERSALS)
def test_dynamo_cve_2026_47612_a_models_name_is_no_path(alice: httpx.Client, name: str) -> None:
    assert alice.get(f"/v1/models/{name}").status_code == 404
    response = alice.post("/v1/completions", json=COMPLETION | {"model": name})
    assert response.status_code == 404
    assert "root:" not in response.text


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(
            "{{ ''.__class__.__mro__[1].__subclasses__() }}", id="llama-cpp-cve-2024-34359"
        ),
        pytest.param("{{ '{0.__class__}'.format(1).__class__ }}", id="jinja2-cve-2024-56201"),
        pytest.param("{% set f = '{0.__class__}'.format %}{{ f(1) }}", id="jinja2-cve-2024-56326"),
        pytest.param("{{ ('{0.__class__}' | attr('format'))(1) }}", id="jinja2-cve-2025-27516"),
        pytest.param("{{ cycler.__init__.__globals__.os }}", id="litellm-2949"),
        pytest.param("{% include '/etc/passwd' %}", id="vllm-cve-2026-115911"),
    ],
)
async def test_a_template_gets_nothing_but_its_messages(template: str) -> None:
    try:
        rendered = await render(await loaded(template))
    except HeadwayError as error:
        rendered = error.message
    assert not rendered or rendered.endswith("does not take these messages."), rendered


async def test_litellm_2949_a_message_is_no_template() -> None:
    text = await loaded("{{ messages[0]['content'] }}")
    from gateway_http.text import Chat

    chat = Chat(messages=[{"role": "user", "content": "{{ 7 * 7 }}{% raw %}"}])
    assert await render(text, chat) == "{{ 7 * 7 }}{% raw %}"


def test_litellm_1_82_7_no_file_runs_by_being_installed() -> None:
    for folder in ("scheduler_svc", "executor_svc", "gateway_http", "protos"):
        assert not list((ROOT / folder).rglob("*.pth"))
        assert not list((ROOT / folder).rglob("sitecustomize.py"))
