"""Mixed English text that every machine with Python has: explanations, reference, code, and everyday prose.

The Python parts come with the interpreter (PSF licence), so that nothing need be fetched; their wording differs a
little between Python versions, which is why perplexities are only compared within one run.
"""

import argparse
import bisect
import calendar
import csv
import decimal
import difflib
import doctest
import fractions
import heapq
import inspect
import itertools
import locale
import pickle
import random
import statistics
import textwrap
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pydoc_data.topics import topics
from types import ModuleType

_MODULES: tuple[ModuleType, ...] = (
    argparse, bisect, calendar, csv, decimal, difflib, doctest, fractions, heapq, locale, pickle, random,
    statistics, textwrap, threading, zipfile,
)  # fmt: skip

_EVERYDAY = (
    """\
The harbour wakes before the town does. By five the first boats are back, low in the water, and the
gulls have already found them. Marta counts the crates twice, once for the owner and once for herself,
because last winter the two numbers did not agree and she was the one who had to explain it. Her brother
says she worries too much. He also says that the new engine will last twenty years, and it has been in
the yard three times since spring. When the sun comes over the breakwater she pours coffee from the
flask, sits on an upturned crate and watches the ferry turn. Somebody on the upper deck waves. She waves
back, although she cannot see who it is.""",
    """\
Dear Mr Okafor, thank you for your letter of the third of May. We are sorry to hear that the washing
machine you bought from us stopped in the middle of its second week. Our engineer can visit you on
Tuesday morning or on Thursday after two o'clock; please let us know which you prefer. If the fault
cannot be mended on the day we will replace the machine at no cost and take the old one away. You do not
need to keep the packaging. We hope that this is agreeable to you, and we apologise once more for the
trouble. Yours sincerely, Helen Brandt, customer service.""",
    """\
To make soup for four, cut two onions, three carrots and a stick of celery into small pieces and soften
them in butter over a low heat for ten minutes. Add a litre of stock, a bay leaf and a handful of red
lentils, bring everything to the boil, then turn the heat down and leave the pot half covered for half
an hour. Take out the bay leaf. Crush some of the vegetables against the side with a spoon so that the
soup thickens, and add salt only now, since the stock may be salty already. Serve it with bread and a
little lemon juice. It tastes better on the second day.""",
    """\
Why is the sky blue? Sunlight is a mixture of all colours. On its way through the air it meets molecules
that are much smaller than the length of its waves, and such small obstacles scatter short waves far
more strongly than long ones. Blue light has a short wave, red light a long one, so blue is thrown about
in every direction and reaches our eyes from all over the sky, while red goes straight on. In the
evening the light has to cross much more air before it arrives; most of the blue has been scattered away
by then, and what is left looks orange and red.""",
    """\
"You could have called," said Anna. "I did call. Your phone was off." "It was on all day." "Then you
were somewhere without a signal, because I tried at noon and again at three." She put the keys on the
table and thought about it. The tunnel, of course; they had waited almost an hour in the tunnel. "All
right," she said, "I believe you. But next time send a message as well." "I promise. Are you hungry?"
"Very." "Good, because there is far too much rice." They ate by the window and did not talk about the
train again until the dishes were done.""",
    """\
The council met on Monday evening to discuss the bridge. Engineers had reported in March that two of its
six piers were damaged below the water line and that lorries of more than twelve tonnes should no longer
use it. A repair would take eight months and cost about 2.4 million; a new bridge would take three years
and cost eleven. Several members asked how long a repair would last. The answer, between fifteen and
twenty-five years, depended on the floods. After two hours the council voted by nine to four for the
repair, and asked for a second opinion on the piers before any work begins.""",
)


def documents() -> Iterator[str]:
    """Texts of a few hundred to a few thousand words, kinds mixed, always in the same order."""
    explanations = [topics[name] for name in sorted(topics) if len(topics[name]) > 1500]
    references = [text for module in _MODULES for text in _docstrings(module)]
    sources = [inspect.getsource(module) for module in (textwrap, heapq, bisect, fractions)]
    for texts in itertools.zip_longest(_EVERYDAY, explanations, references, sources):
        yield from (text for text in texts if text)


def windows(encode: Callable[[str], list[int]], num_tokens: int, window_tokens: int) -> list[list[int]]:
    """Token windows of at most `window_tokens`, at least 32, out of the documents, `num_tokens` in all if there is
    so much text; a long document gives four windows, so that no single one rules the figure."""
    taken: list[list[int]] = []
    total = 0
    for text in documents():
        tokens = encode(text)
        for begin in range(0, min(len(tokens), 4 * window_tokens), window_tokens):
            window = tokens[begin : begin + min(window_tokens, num_tokens - total)]
            if len(window) >= 32:
                taken.append(window)
                total += len(window)
        if num_tokens - total < 32:
            break
    return taken


def cut(tokens: Sequence[int], window_tokens: int) -> list[list[int]]:
    """A text of one's own in windows; a last one of a single token predicts nothing and is left out."""
    parts = [list(tokens[begin : begin + window_tokens]) for begin in range(0, len(tokens), window_tokens)]
    return [part for part in parts if len(part) > 1]


def _docstrings(module: ModuleType) -> list[str]:
    """The module's own documentation and that of its public classes, longest first."""
    members = [
        value for name, value in inspect.getmembers(module, inspect.isclass) if not name.startswith("_")
    ]
    found = {inspect.getdoc(item) or "" for item in [module, *members]}
    return sorted((text for text in found if len(text) > 600), key=lambda text: (-len(text), text))[:3]
