"""Prompts of `bench speculation`: some whose answers repeat much of them, and some whose answers do not."""

_REPORT = (
    "The harbour office counted 412 ships in March, 37 more than a year before. Most of them carried grain and timber. "
    "Two cranes on the north quay were out of service for nine days, which cost the port about 60 hours of loading. "
    "The new tide gauge was calibrated on 14 March and has agreed with the old one to within two centimetres since. "
    "No accident was reported. The harbour master asks for a third tug before the autumn storms."
)
_LETTER = (
    "Dear Mr Alvarez, thank you for your letter of 3 May about the leaking roof of the library. A roofer will look "
    "at it on Monday morning. Please move the books from the two shelves under the leak and put the buckets back in "
    "place. If the rain gets worse before Monday, call the night desk at extension 5514. Yours sincerely, Ruth Okafor."
)
_CODE = """def total_price(items, rate):
    total = 0
    for item in items:
        if item.count < 0:
            raise ValueError("count must not be negative")
        total = total + item.price * item.count
    total = total + total * rate
    return round(total, 2)
"""
_TABLE = """name,city,born,height_cm
Anna Berg,Oslo,1984,171
Luis Prado,Porto,1979,182
Mina Sato,Nagoya,1991,163
Paul Weber,Bremen,1968,178
Ines Roux,Lyon,1987,169
Tom Hale,Leeds,1975,185
"""

REPEATING = {
    "editing": (
        f"Repeat this text word for word, but write April instead of March:\n\n{_REPORT}",
        f"Repeat this letter word for word, but address it to Mrs Lindqvist:\n\n{_LETTER}",
        f"Write this code again with `total` renamed to `amount` and nothing else changed:\n\n```python\n{_CODE}```",
        f"Write this table again without any change:\n\n{_TABLE}",
    ),
    "summarising": (
        f"Summarise this text. Quote its own sentences:\n\n{_REPORT}",
        f"Summarise this letter. Quote its own sentences:\n\n{_LETTER}",
        f"Which facts does this report state? List each with the words of the report.\n\n{_REPORT}",
        f"Explain this code line by line, and quote each line:\n\n```python\n{_CODE}```",
    ),
}
"""Where guesses from the prompt are often right."""

OTHERS = {
    "chat": (
        "What is the difference between a lake and a sea?",
        "Give me three tips to sleep better.",
        "How do I explain gravity to a child?",
        "Which instruments play in a string quartet?",
    ),
    "stories": (
        "Write a story about a lighthouse keeper who collects lost sounds.",
        "Tell me of a baker who wakes up in a city without bread.",
        "Describe a market on the moon.",
        "Write a dialogue between an old ship and the wind.",
    ),
}
"""Where they are not."""
