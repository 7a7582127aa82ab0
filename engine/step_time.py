"""How long an engine step takes, learned from the steps that were run.

    seconds = fixed + a · decode rows + b · prefill rows + c · attended tokens

Fitted by least squares in which a step weighs less with every later one (an exponentially weighted average over each
kind of row), on top of a weak prior so that the first steps already give a usable answer. Coefficients are never
negative.
"""

import numpy as np
import numpy.typing as npt

HALF_LIFE_STEPS = 200
MIN_ENOUGH_ROWS = 64
"""Fewer never are: what is learned of a fixed time is vague where all steps are alike."""
_PRIOR_WEIGHT = 0.02


class StepTimeModel:
    """Predicts step times on this machine under its present load.

    The prior, in seconds: `fixed_s` per step, `decode_row_s`, `prefill_row_s` and `attended_token_s` per unit.
    """

    def __init__(
        self,
        fixed_s: float = 3e-3,
        decode_row_s: float = 1e-3,
        prefill_row_s: float = 5e-4,
        attended_token_s: float = 5e-8,
    ) -> None:
        self._prior = np.array([fixed_s, decode_row_s, prefill_row_s, attended_token_s])
        # Units of one typical step, so that the prior pulls on each coefficient alike.
        self._scale = np.array([1.0, 8.0, 128.0, 50_000.0])
        self._gram = np.zeros((4, 4))
        self._moment = np.zeros(4)
        self._coefficients: npt.NDArray[np.float64] | None = self._prior
        self._keep = 0.5 ** (1 / HALF_LIFE_STEPS)

    def observe(self, num_decode: int, num_prefill: int, num_attended: int, seconds: float) -> None:
        """Learn from one step of so many rows, which attended to `num_attended` tokens in all."""
        features = np.array([1.0, num_decode, num_prefill, num_attended]) / self._scale
        # Relative errors count, or long prefill steps would drown the short ones that a TPOT target is about.
        weight = 1.0 / max(seconds, 1e-6) ** 2
        self._gram = self._keep * self._gram + weight * np.outer(features, features)
        self._moment = self._keep * self._moment + weight * seconds * features
        self._coefficients = None

    def predict(self, num_decode: int, num_prefill: int, num_attended: int) -> float:
        """Seconds of a step."""
        features = np.array([1.0, num_decode, num_prefill, num_attended])
        return float(features @ self._solved())

    def prefill_s(self, first_position: int, num_tokens: int) -> float:
        """Seconds that computing tokens from a position on adds to steps that are run anyway."""
        attended = num_tokens * first_position + num_tokens * (num_tokens + 1) // 2
        return self.predict(0, num_tokens, attended) - self.predict(0, 0, 0)

    def enough_prefill_rows(self, num_prompts: int) -> int:
        """Rows from which a prompt, of so many that wait, had better have a step without decode rows to itself.

        Steps take fixed + b · rows seconds. With two prompts of r rows to a step, n of them end after
        (n + 2) / 4 · (fixed + 2 · b · r) on the average, with one to a step after (n + 1) / 2 · (fixed + b · r): sooner
        when b · r is more than n / 2 · fixed.
        """
        fixed_s, _, prefill_row_s, _ = (float(c) for c in self._solved())
        return max(MIN_ENOUGH_ROWS, int(num_prompts / 2 * fixed_s / max(prefill_row_s, 1e-9)))

    def prefill_rows_within(self, seconds: float, num_decode: int, num_attended: int) -> int:
        """How many prefill rows fit beside the decode rows in a step of `seconds`; 0 when not even those fit."""
        room_s = seconds - self.predict(num_decode, 0, num_attended)
        return max(0, int(room_s / max(float(self._solved()[2]), 1e-9)))

    def decode_rows_within(self, seconds: float, attended_per_row: float) -> int:
        """How many sequences can decode together in a step of `seconds`; at least 1."""
        fixed_s, decode_row_s, _, attended_token_s = (float(c) for c in self._solved())
        per_row_s = decode_row_s + attended_per_row * attended_token_s
        return max(1, int((seconds - fixed_s) / max(per_row_s, 1e-9)))

    def _solved(self) -> npt.NDArray[np.float64]:
        if self._coefficients is None:
            prior = self._prior * self._scale
            # The prior is as sure of each coefficient as a few steps of the size it predicts itself.
            strength = _PRIOR_WEIGHT / prior**2
            free = np.ones(4, dtype=bool)
            solution = np.zeros(4)
            gram, moment = self._gram + np.diag(strength), self._moment + strength * prior
            while free.any():
                solution[:] = 0.0
                solution[free] = np.linalg.solve(gram[np.ix_(free, free)], moment[free])
                if (solution >= 0).all():
                    break
                free &= solution > 0
            self._coefficients = solution / self._scale
        return self._coefficients
