"""Text of one model: tokenizer, chat template, and answers as they grow."""

from app.text.chat_template import ChatTemplate, ChatTemplateError
from app.text.model_text import ModelText, load_text
from app.text.stream import Detokenizer, StopStrings, TextStream
from app.text.tokenizer import TextError, Tokenizer

__all__ = [
    "ChatTemplate",
    "ChatTemplateError",
    "Detokenizer",
    "ModelText",
    "StopStrings",
    "TextError",
    "TextStream",
    "Tokenizer",
    "load_text",
]
