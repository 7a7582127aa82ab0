"""Draft tokens: guesses at what comes next, verified by one step of several rows. Pure.

A draft costs nothing in correctness: each guessed token is compared with the token sampled at its place, whose draw
depends only on the seed, the position and the logits, and the logits of a row depend only on the tokens before it.
What is accepted is therefore what would have been generated anyway, greedy or sampled.
"""


def accepted(draft: list[int], sampled: list[int]) -> int:
    """How many leading draft tokens were right. `sampled[i]` is what the model puts where `draft[i]` was guessed."""
    count = 0
    for guess, token in zip(draft, sampled, strict=False):
        if guess != token:
            break
        count += 1
    return count
