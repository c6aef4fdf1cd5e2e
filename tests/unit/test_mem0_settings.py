"""Setting up the mem0 backend: what is left open is filled in, what cannot work is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recallq.contract import Scope
from recallq.errors import ConfigurationError
from recallq_worker.backends.mem0 import shapes
from recallq_worker.backends.mem0.settings import Mem0Settings, batch_limit, complete
from recallq_worker.models import ModelSettings

NAMES = ("OPENAI_API_KEY", "OPENAI_BASE_URL", "DASHSCOPE_API_KEY", "MEM0_API_KEY")


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def filled_in(given: dict[str, Any] | None = None, *, infer: bool = True) -> dict[str, Any]:
    return complete(
        given or {},
        ModelSettings.load(),
        store_url="redis://store/0",
        namespace="ns",
        infer=infer,
    )


def test_openai_by_its_own_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    config = filled_in()
    assert config["vector_store"] == {
        "provider": "redis",
        "config": {
            "redis_url": "redis://store/0",
            "collection_name": "ns:mem0",
            "embedding_model_dims": 1536,
        },
    }
    assert config["llm"]["config"] == {
        "model": "gpt-5-mini",
        "api_key": "sk-1",
        "openai_base_url": "https://api.openai.com/v1",
        "max_tokens": 8000,
    }
    assert "embedding_dims" not in config["embedder"]["config"]
    assert batch_limit(config, ModelSettings.load()) == 100


def test_dashscope_by_its_own_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASHSCOPE_API_KEY", "sk-2")
    config = filled_in()
    llm, embedder = config["llm"]["config"], config["embedder"]["config"]
    assert llm["openai_base_url"] == "https://dashscope.aliyuncs.com/compatible-mode/v1"
    assert (llm["model"], llm["api_key"]) == ("qwen-plus", "sk-2")
    assert (embedder["model"], embedder["embedding_dims"]) == ("text-embedding-v4", 1024)
    assert config["vector_store"]["config"]["embedding_model_dims"] == 1024
    assert batch_limit(config, ModelSettings.load()) == 10


def test_two_servers_by_our_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    monkeypatch.setenv("RECALLQ_LLM_MODEL", "llama")
    monkeypatch.setenv("RECALLQ_LLM_BASE_URL", "http://llm:8000/v1")
    monkeypatch.setenv("RECALLQ_EMBEDDING_BASE_URL", "https://dashscope-intl.aliyuncs.com/v1")
    monkeypatch.setenv("RECALLQ_EMBEDDING_API_KEY", "sk-3")
    monkeypatch.setenv("RECALLQ_EMBEDDING_DIMENSIONS", "512")
    config = filled_in()
    assert config["llm"]["config"]["openai_base_url"] == "http://llm:8000/v1"
    assert config["llm"]["config"]["model"] == "llama"
    assert config["embedder"]["config"]["api_key"] == "sk-3"
    assert config["embedder"]["config"]["embedding_dims"] == 512
    assert config["vector_store"]["config"]["embedding_model_dims"] == 512


def test_without_any_key() -> None:
    with pytest.raises(ConfigurationError, match="OPENAI_API_KEY, DASHSCOPE_API_KEY or RECALLQ_"):
        filled_in()


def test_without_an_llm_where_nothing_is_inferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECALLQ_EMBEDDING_API_KEY", "sk-1")
    assert filled_in(infer=False)["llm"]["config"]["api_key"] == "none"
    with pytest.raises(ConfigurationError, match="RECALLQ_LLM_API_KEY"):
        filled_in()


def test_what_the_user_wrote_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    given = {
        "vector_store": {"provider": "pgvector", "config": {"host": "db"}},
        "llm": {"provider": "anthropic", "config": {"model": "claude"}},
        "custom_instructions": "only food",
        "history_db_path": "/var/lib/mem0/history.db",
    }
    config = filled_in(given)
    assert config["vector_store"] == given["vector_store"]
    assert config["llm"] == given["llm"]
    assert config["custom_instructions"] == "only food"
    assert config["embedder"]["provider"] == "openai"


@pytest.mark.parametrize(
    "store",
    [
        {"provider": "qdrant"},
        {"provider": "qdrant", "config": {"path": "/tmp/q"}},
        {"provider": "qdrant", "config": {"host": "127.0.0.1"}},
        {"provider": "qdrant", "config": {"url": None}},
        {"config": {"collection_name": "memories"}},
    ],
)
def test_qdrant_inside_the_process_is_refused(
    monkeypatch: pytest.MonkeyPatch, store: dict[str, Any]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    with pytest.raises(ConfigurationError, match="url of a qdrant server"):
        filled_in({"vector_store": store})
    served = {"provider": "qdrant", "config": {"url": "http://qdrant:6333"}}
    assert filled_in({"vector_store": served})["vector_store"] == served


def test_a_section_that_says_a_part_is_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASHSCOPE_API_KEY", "sk-2")
    config = filled_in(
        {
            "llm": {"provider": "openai", "config": {"temperature": 0}},
            "embedder": {"config": {"model": "text-embedding-v3"}},
            "vector_store": {"provider": "pgvector", "config": {"host": "db"}},
        }
    )
    llm, embedder = config["llm"]["config"], config["embedder"]["config"]
    assert (llm["temperature"], llm["model"], llm["api_key"]) == (0, "qwen-plus", "sk-2")
    assert (embedder["model"], embedder["embedding_dims"]) == ("text-embedding-v3", 1024)


@pytest.mark.parametrize(
    "given", [{"llm": "gpt"}, {"embedder": None}, {"vector_store": {"config": ["a"]}}, {"llm": []}]
)
def test_sections_that_are_none(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    with pytest.raises(ConfigurationError, match="must be an object"):
        filled_in(given)


def test_prompts_do_not_go_where_nobody_sent_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """mem0 prefers OpenRouter to whatever it is told, if it finds a key."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-or")
    with pytest.raises(ConfigurationError, match="OPENROUTER_API_KEY"):
        filled_in()
    meant = {"llm": {"provider": "openai", "config": {"openrouter_base_url": "https://or/v1"}}}
    assert filled_in(meant)["llm"]["config"]["openrouter_base_url"] == "https://or/v1"


def test_the_configuration_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = json.dumps({"llm": {"config": {"api_key": "sk-secret"}}})
    for config in (secret, f"'{secret}'", f"[{secret}]"):
        monkeypatch.setenv("RECALLQ_MEM0_CONFIG", config)
        settings = Mem0Settings.load()
        assert "sk-secret" not in repr(settings)
        if config != secret:
            with pytest.raises(ConfigurationError) as caught:
                settings.given()
            assert "sk-secret" not in str(caught.value)


def test_a_configuration_as_json_or_as_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted = {"custom_instructions": "only food"}
    monkeypatch.setenv("RECALLQ_MEM0_CONFIG", json.dumps(wanted))
    assert Mem0Settings.load().given() == wanted
    path = tmp_path / "mem0.json"
    path.write_text(json.dumps(wanted))
    monkeypatch.setenv("RECALLQ_MEM0_CONFIG", str(path))
    assert Mem0Settings.load().given() == wanted
    monkeypatch.delenv("RECALLQ_MEM0_CONFIG")
    assert Mem0Settings.load().given() == {}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("{nonsense", "not JSON"),
        ("/nowhere/mem0.json", "cannot be read"),
        ('["a"]', "cannot be read"),
    ],
)
def test_a_configuration_that_is_none(
    monkeypatch: pytest.MonkeyPatch, config: str, reason: str
) -> None:
    monkeypatch.setenv("RECALLQ_MEM0_CONFIG", config)
    with pytest.raises(ConfigurationError, match=reason):
        Mem0Settings.load().given()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("RECALLQ_MEM0_MODE", "cloud", "RECALLQ_MEM0_MODE: Input should be 'oss' or 'platform'"),
        ("RECALLQ_MEM0_MODE", "platform", "set MEM0_API_KEY"),
        ("RECALLQ_MEM0_HOST", "api.mem0.ai", "RECALLQ_MEM0_HOST: must start with http"),
        ("RECALLQ_MEM0_INFER", "perhaps", "RECALLQ_MEM0_INFER"),
    ],
)
def test_settings_that_cannot_work(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=reason):
        Mem0Settings.load()


def test_the_platforms_key_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECALLQ_MEM0_MODE", "platform")
    monkeypatch.setenv("MEM0_API_KEY", "m0-secret")
    settings = Mem0Settings.load()
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "m0-secret"
    assert "m0-secret" not in repr(settings)
    monkeypatch.setenv("RECALLQ_EMBEDDING_DIMENSIONS", "many")
    with pytest.raises(ConfigurationError, match="RECALLQ_EMBEDDING_DIMENSIONS"):
        ModelSettings.load()


any_id = st.text(min_size=1, max_size=30).filter(
    lambda text: not any("\ud800" <= each <= "\udfff" for each in text)
)


class TestIds:
    @given(any_id, any_id, any_id, any_id)
    def test_no_two_users_are_one(self, a: str, b: str, c: str, d: str) -> None:
        one, other = Scope(a, b), Scope(c, d)
        assert (shapes.owner(one) == shapes.owner(other)) == (one == other)
        assert shapes.owner(one) != shapes.owner(Scope("default", f"{a}/{b}"))

    @given(any_id)
    def test_mem0_takes_them_and_the_way_back_is_exact(self, name: str) -> None:
        from urllib.parse import unquote

        escaped = shapes.escape(name)
        assert escaped
        assert escaped.strip() == escaped
        assert not any(each.isspace() for each in escaped)
        assert unquote(escaped) == name

    @pytest.mark.parametrize("name", ["alice", "alice@example.com", "用户", "a:b", "{x}", "a-b_c"])
    def test_plain_ids_stay_as_mem0_knows_them(self, name: str) -> None:
        assert shapes.owner(Scope("default", name)) == name
