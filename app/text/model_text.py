"""Everything about text that belongs to one served model."""

from dataclasses import dataclass

from app.models.entry import ModelEntry
from app.text.chat_template import ChatTemplate
from app.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ModelText:
    """A model's tokenizer, and its chat template where it has one."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None


def load_text(entry: ModelEntry) -> ModelText:
    """Read them from the model's folder. Raises TextError or ChatTemplateError, naming the fault."""
    tokenizer = Tokenizer.load(
        entry.tokenizer_path, bos_token_id=entry.bos_token_id if entry.add_bos else None
    )
    source = entry.chat_template
    if source is None:
        return ModelText(tokenizer, None)
    bos, eos = (
        tokenizer.token_bytes(token_id).decode() if token_id is not None else ""
        for token_id in (entry.bos_token_id, next(iter(entry.eos_token_ids), None))
    )
    return ModelText(tokenizer, ChatTemplate(source, bos_token=bos, eos_token=eos))
