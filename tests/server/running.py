"""A real server in a thread on a free port, for tests, and copies of models with a chat template."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM
from typing import Any

import openai

from ciuic_runtime.devices.spec import Topology
from ciuic_runtime.engine.llm import LLM
from ciuic_runtime.engine.service import EngineService
from ciuic_runtime.server.config import ServerConfig
from ciuic_runtime.server.serve import Server, listening

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@dataclass
class Running:
    url: str
    model: str
    server: Server
    service: EngineService

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    @property
    def idle(self) -> bool:
        """Nothing runs or waits, and nothing is held."""
        stats = self.service.stats()
        return not (stats.running or stats.waiting or stats.kv_blocks_used)


def with_template(source: Path, folder: Path, template: str = TEMPLATE) -> Path:
    shutil.copytree(source, folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    return folder


@contextmanager
def running(llm: LLM, **settings: Any) -> Iterator[Running]:
    config = ServerConfig(**{"port": 0, **settings})
    with listening(config) as address:
        service = EngineService(llm, max_waiting=config.max_waiting)
        urls: list[str] = []
        ready = threading.Event()
        server = Server(service, config, lambda url: (urls.append(url), ready.set()))  # type: ignore[func-returns-value]
        thread = threading.Thread(target=lambda: server.run(sockets=[address]))
        thread.start()
        try:
            assert ready.wait(30), "the server does not come up"
            yield Running(urls[0], config.model_name or Path(llm.model.source).name, server, service)
        finally:
            for _ in range(2):  # what a failed test left running is cancelled
                server.handle_exit(SIGTERM)
            thread.join(30)
            assert not thread.is_alive(), "the server does not end"


def opened(path: Path, here: Topology, **settings: Any) -> LLM:
    given = {"max_model_len": 256, "max_num_seqs": 4, "threads": 1, "serving": True, **settings}
    return LLM(path, devices=here, **given)
