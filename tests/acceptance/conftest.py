"""A stack for the openai SDK: one model in two dresses.

It is the built-in one, with chat templates that know tools and thoughts. It knows nothing of
either, but under a grammar it cannot but call a tool.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from bench.stack import ROOT, Stack

BUILTIN = ROOT / "executor_svc" / "builtin_model"
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<tool_call>FORMAT</tool_call><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
FORMATS = {"tools": "", "coder": "<function=name>"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Models by the names of FORMATS, whose calls are JSON and XML."""
    models = []
    for name, form in FORMATS.items():
        folder: Path = tmp_path_factory.mktemp(name)
        for path in BUILTIN.glob("*"):
            if path.suffix in (".json", ".safetensors"):
                shutil.copy(path, folder)
        (folder / "chat_template.jinja").write_text(TEMPLATE.replace("FORMAT", form))
        models.append(f"{name}={folder}")
    with Stack.start(engine="torch", executor={"model": ",".join(models)}) as stack:
        yield stack


@pytest.fixture
def sdk(stack: Stack) -> Iterator[openai.OpenAI]:
    url = f"{stack.gateway_url}/v1"
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as sdk:
        yield sdk
