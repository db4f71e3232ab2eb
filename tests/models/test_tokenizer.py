"""The tokenizer of a Hugging Face folder: what each of its files decides, and what is said where one is missing."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from ciuic_runtime.devices.errors import InvalidInput
from ciuic_runtime.models.tokenizer import Tokenizer, load_tokenizer

HI = [{"role": "user", "content": "Hi"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{{ eos_token }}"


def byte_level(adds_bos: bool = False) -> tokenizers.Tokenizer:
    """<s> 0, </s> 1, <end> 2, the bytes, and some merges."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True) for t in ("<s>", "</s>", "<end>")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the cat sat on the mat and the hat"] * 5, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def folder(path: Path, backend: tokenizers.Tokenizer | None = None, **files: Any) -> Path:
    (backend or byte_level()).save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_beginning_and_end_are_named_by_the_config(tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "unk_token": None}
    tokenizer = load_tokenizer(folder(tmp_path, tokenizer_config=config))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.vocab_size) == (
        0,
        (1,),
        byte_level().get_vocab_size(),
    )
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.encode("the") == tokenizer.encode("the", add_special=False)
    assert tokenizer.chat_template is None


@pytest.mark.parametrize(
    ("adds_bos", "stated", "expected"),
    [
        (False, None, ()),
        (True, None, (0,)),
        (False, True, (0,)),
        (True, False, ()),
        (True, True, (0,)),
        (False, False, ()),
    ],
)
def test_the_config_decides_about_the_beginning_else_the_tokenizer(
    tmp_path: Path, adds_bos: bool, stated: bool | None, expected: tuple[int, ...]
) -> None:
    config = {"bos_token": "<s>", "add_bos_token": stated}
    tokenizer = load_tokenizer(folder(tmp_path, byte_level(adds_bos), tokenizer_config=config))
    assert tokenizer.prefix == expected
    plain = tokenizer.encode("the cat", add_special=False)
    assert tokenizer.encode("the cat") == [*expected, *plain]
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"


def test_an_end_is_added_where_the_config_says_so(tmp_path: Path) -> None:
    config = {"eos_token": "</s>", "add_eos_token": True}
    tokenizer = load_tokenizer(folder(tmp_path, tokenizer_config=config))
    assert tokenizer.encode("the")[-1] == 1


def test_every_file_may_add_tokens_that_end_a_generation(tmp_path: Path) -> None:
    files = {"generation_config": {"eos_token_id": [2]}, "config": {"eos_token_id": 1, "bos_token_id": 0}}
    tokenizer = load_tokenizer(folder(tmp_path, tokenizer_config={"eos_token": "</s>"}, **files))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (0, (2, 1))


def test_a_tokenizer_alone_is_enough(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder(tmp_path))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.prefix) == (None, (), ())
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"


def test_padding_and_truncation_of_the_file_are_switched_off(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    tokenizer = load_tokenizer(folder(tmp_path, backend))
    text = "a long text that is more than three tokens"
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_a_template_in_the_config(tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    tokenizer = load_tokenizer(folder(tmp_path, tokenizer_config=config))
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.apply_chat_template(HI) == "<s>[user] Hi</s>"
    assert tokenizer.apply_chat_template(HI, bos_token="!") == "![user] Hi</s>"


def test_a_list_of_templates(tmp_path: Path) -> None:
    listed = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools[0].name }}"}]
    tokenizer = load_tokenizer(folder(tmp_path, tokenizer_config={"chat_template": listed}))
    assert tokenizer.apply_chat_template(HI) == "plain"
    assert tokenizer.apply_chat_template(HI, tools=[{"name": "search"}]) == "search"


def test_template_files_come_before_the_config(tmp_path: Path) -> None:
    folder(tmp_path, tokenizer_config={"chat_template": "old"})
    (tmp_path / "chat_template.jinja").write_text("new")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.apply_chat_template(HI) == "new"
    assert tokenizer.apply_chat_template(HI, tools=[{"name": "f"}]) == "tools"


def test_no_template_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no chat template; give the whole prompt"):
        load_tokenizer(folder(tmp_path)).apply_chat_template(HI)
    rag = [{"name": "rag", "template": "x"}]
    with pytest.raises(InvalidInput, match=r"called default \(there are rag\)"):
        load_tokenizer(folder(tmp_path, tokenizer_config={"chat_template": rag})).apply_chat_template(HI)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config": {"bos_token": 5}}, "bos_token is 5"),
        ({"tokenizer_config": {"chat_template": [{"name": "x"}]}}, "entry without a name"),
        ({"tokenizer_config": []}, "not a JSON object"),
        ({"generation_config": {"eos_token_id": ["</s>"]}}, "eos_token_id is"),
        ({"config": {"eos_token_id": -1}}, "eos_token_id is -1"),
    ],
)
def test_nonsense_beside_the_tokenizer_is_named(tmp_path: Path, files: dict[str, Any], expected: str) -> None:
    with pytest.raises(InvalidInput, match=expected):
        load_tokenizer(folder(tmp_path, **files))


@pytest.mark.parametrize(
    "content", ["", "{}", '{"model": {"type": "BPE"}}', "[1, 2", '{"version": "1.0", "model": null}']
)
def test_a_broken_tokenizer_json_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InvalidInput, match=r"tokenizer\.json is not a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_missing_tokenizers_are_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(InvalidInput, match=r"tokenizer\.model but no tokenizer\.json.*save_pretrained"):
        load_tokenizer(tmp_path)
    with pytest.raises(InvalidInput, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InvalidInput, match="neither a folder nor a"):
        load_tokenizer(tmp_path / "notes.txt")


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (marker,))

    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(InvalidInput):
        load_tokenizer(tmp_path)
    assert not marker.exists()


def test_prompts_that_are_no_text_are_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder(tmp_path))
    with pytest.raises(InvalidInput, match="not valid Unicode"):
        tokenizer.encode("a\ud800")
    with pytest.raises(InvalidInput, match="must be a string"):
        tokenizer.encode(5)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="-3"):
        tokenizer.decode([1, -3])


def test_ids_beyond_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder(tmp_path))
    assert tokenizer.decode([*tokenizer.encode("the"), 5000, 2**40]) == "the"
    stream = tokenizer.stream()
    assert stream.push(5000) + stream.finish() == ""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(folder(tmp_path_factory.mktemp("tokenizer")))


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_round_trips(shared: Tokenizer, text: str) -> None:
    assert shared.decode(shared.encode(text), skip_special=False) == text


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 275), max_size=30), skip=st.booleans())
def test_any_ids_stream_as_they_decode(shared: Tokenizer, ids: list[int], skip: bool) -> None:
    """Also where the bytes are no UTF-8: each broken sequence gives the same replacement characters."""
    stream = shared.stream(skip_special=skip)
    assert "".join(map(stream.push, ids)) + stream.finish() == shared.decode(ids, skip_special=skip)
