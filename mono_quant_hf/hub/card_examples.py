"""What a model card shows of the use of a model, by its task: code that runs after the lines that load it."""

from __future__ import annotations

from pathlib import Path

from transformers.models.auto import modeling_auto

from mono_quant_hf.json_files import read_json

from .checkpoint import CheckpointFacts

_CHAT = """\
messages = [{"role": "user", "content": "Why is the sky blue?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=100)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
_TEXT = """\
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"""
_EMBEDDINGS = """\
inputs = tokenizer(["A sentence.", "Another one."], padding=True, return_tensors="pt")
mask = inputs["attention_mask"].unsqueeze(-1)
embeddings = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)  # the mean over the tokens"""
_CLASS_OF_TEXT = """\
inputs = tokenizer("A text.", return_tensors="pt")
print(model.config.id2label[model(**inputs).logits.argmax(-1).item()])"""
_CLASS_OF_PICTURE = """\
from PIL import Image

inputs = processor(Image.open("picture.png").convert("RGB"), return_tensors="pt")
print(model.config.id2label[model(**inputs).logits.argmax(-1).item()])"""

_BY_TASK = {
    ("text-generation", "tokenizer"): _TEXT,
    ("text-classification", "tokenizer"): _CLASS_OF_TEXT,
    ("image-classification", "processor"): _CLASS_OF_PICTURE,
}


def example_of(folder: Path, facts: CheckpointFacts, prepares_inputs: str) -> str:
    """Code that uses the model in a folder, empty where none is known.

    Args:
        prepares_inputs: the name of the variable, "tokenizer" or "processor"; empty without either.
    """
    if prepares_inputs == "tokenizer":
        if facts.task == "text-generation" and _has_chat_template(folder):
            return _CHAT
        if facts.architecture in modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.values():
            return _EMBEDDINGS
    return _BY_TASK.get((facts.task, prepares_inputs), "")


def _has_chat_template(folder: Path) -> bool:
    file = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (
        file.is_file() and "chat_template" in read_json(file)
    )
