"""`chat`: what is piped in is answered line by line, by a model that is told what was said before."""

import io
import json

import pytest

from mono_quant_hf.cli import chat
from mono_quant_hf.cli.main import main
from mono_quant_hf.cli.models import chat_inputs
from tests.evaluation.conftest import make_llama, make_tokenizer

TEMPLATE = "{% for message in messages %}{{ message['role'] }} : {{ message['content'] }} {% endfor %}cat"


@pytest.fixture
def talker(tmp_path):
    make_llama().save_pretrained(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def talk(monkeypatch, said, *arguments):
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    return main(["chat", *map(str, arguments)])


def test_a_conversation_that_is_piped_in(talker, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        chat, "chat_inputs", lambda t, messages: asked.append(messages) or chat_inputs(t, messages)
    )
    call = [talker, "--system", "sat", "--max-new-tokens", 5, "--json", tmp_path / "said.json"]
    assert talk(monkeypatch, "the cat\n\n  the dog \n", *call) == 0
    captured = capsys.readouterr()
    found = json.loads((tmp_path / "said.json").read_text())
    roles = [message["role"] for message in found["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert [asked[0][-1]["content"], asked[1][-1]["content"]] == ["the cat", "the dog"]
    assert asked[1] == found["messages"][:-1]
    answers = [message["content"] for message in found["messages"] if message["role"] == "assistant"]
    assert captured.out.split() == [*" ".join(answers).split(), "2", "answers."]
    assert captured.err.count(" tokens in ") == 2


def test_what_does_not_fit_is_forgotten_the_oldest_first(talker, tmp_path, monkeypatch):
    asked = []
    answer = chat.answer_to
    monkeypatch.setattr(
        chat,
        "answer_to",
        lambda inputs, *rest: asked.append(inputs["input_ids"].shape[1]) or answer(inputs, *rest),
    )
    call = [talker, "--max-new-tokens", 20, "--json", tmp_path / "said.json"]
    assert talk(monkeypatch, "the cat sat\n" * 6, *call) == 0
    assert asked[0] < asked[1] and max(asked) <= 64 - 20  # the model has 64 positions
    assert len(json.loads((tmp_path / "said.json").read_text())["messages"]) == 12


def test_a_model_without_a_chat_template(models, monkeypatch, capsys):
    assert talk(monkeypatch, "", models / "float") == 2
    assert "no chat template; use mono-quant-hf generate --raw" in capsys.readouterr().err
