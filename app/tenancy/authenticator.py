"""From the key that a caller shows to who it is.

What the database said of a key is believed for a moment, and only until somebody changes anything: every change leaves
a new word in Redis, which each gateway reads ten times a second. While that word cannot be read, the moment is shorter;
while the database cannot be read, what it said last stands, since nobody can change it either.
"""

import asyncio
import hmac
import ipaddress
import logging
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, replace

from sqlalchemy.exc import SQLAlchemyError

from app.admission.ticket import DEFAULT_TENANT
from app.errors import AuthenticationError, PermissionDeniedError, UnavailableError
from app.tenancy.keys import digest_of, is_well_formed
from app.tenancy.prices import FREE, Price
from app.tenancy.principal import OPERATOR, Principal
from app.tenancy.registry import KeyInForce, Registry
from memory_pool.reservations import AsyncReservations
from memory_pool.store import StoreError

log = logging.getLogger(__name__)

CHANGE_WORD = "changed"
POLL_S = 0.1
"""How long a change may take to reach the other gateways."""
BELIEVED_S = 5.0
"""How long an answer of the database is believed at most."""
BELIEVED_DEAF_S = 1.0
"""The same while Redis cannot be reached."""
BELIEVED_BLIND_S = 300.0
"""The same while the database cannot be reached."""
MAX_BELIEVED = 20_000
"""Keys remembered, at most."""


@dataclass(frozen=True)
class _Belief:
    found: KeyInForce | None
    principal: Principal | None
    read_at: float
    generation: int


class Authenticator:
    """Knows callers by their keys; `operator_keys` are those of the settings."""

    def __init__(
        self,
        registry: Registry,
        words: AsyncReservations,
        *,
        pepper: bytes,
        operator_keys: list[bytes],
        key_required: bool,
    ) -> None:
        self._registry = registry
        self._words = words
        self._pepper = pepper
        self._operator_keys = operator_keys
        self._always_required = key_required
        self._beliefs: OrderedDict[str, _Belief] = OrderedDict()
        self._generation = 0
        self._word: bytes | None = None
        self._hears = False
        self._reloaded_at = 0.0
        self._operator = OPERATOR
        self._prices: dict[str, Price] = {}
        self.key_required = key_required
        """Whether callers must show a key: the settings say so, or there are keys."""

    def price(self, model: str) -> Price:
        """What tokens of a model cost now."""
        return self._prices.get(model, FREE)

    async def identify(self, authorization: bytes, address: str | None, path: str) -> Principal:
        """The caller who shows this `Authorization` header. Raises AuthenticationError, PermissionDeniedError, and
        UnavailableError when the database is away and nothing is remembered."""
        if not self.key_required:
            return self._operator
        scheme, _, shown = authorization.partition(b" ")
        shown = shown.strip()
        if scheme.lower() != b"bearer" or not shown:
            raise AuthenticationError("an API key is needed: send it as 'Authorization: Bearer KEY'")
        # Every key is compared, so that the time taken tells nothing.
        if sum([hmac.compare_digest(shown, known) for known in self._operator_keys]):
            return self._operator
        key = shown.decode("latin-1")
        if not is_well_formed(key):
            raise AuthenticationError("the API key is not valid")
        principal = self._check(await self._look_up(digest_of(key, self._pepper)))
        principal.check_address(address)
        principal.check_path(path)
        return principal

    async def reload(self) -> None:
        """Read what concerns everybody: whether there are keys, prices, the operator's limits."""
        self._reloaded_at = time.monotonic()
        has_keys = await self._registry.has_keys()
        self._prices = await self._registry.prices()
        self._operator = replace(
            OPERATOR, limits=tuple(await self._registry.limits("tenant", DEFAULT_TENANT))
        )
        self.key_required = self._always_required or has_keys

    async def changed(self) -> None:
        """Something was changed in the database: forget what was believed, here and everywhere."""
        self._generation += 1
        await self.reload()
        try:
            await self._words.leave_word(CHANGE_WORD, secrets.token_hex(8))
        except StoreError as error:
            log.warning("other gateways learn of a change only within %s s: %s", BELIEVED_S, error)

    async def run(self) -> None:
        """Listen for changes until cancelled."""
        while True:
            await self._listen()
            await asyncio.sleep(POLL_S)

    async def _listen(self) -> None:
        try:
            word = await self._words.word(CHANGE_WORD)
        except StoreError:
            self._hears = False
        else:
            if not self._hears or word != self._word:
                self._generation += 1
                self._reloaded_at = 0.0
            self._hears, self._word = True, word
        if time.monotonic() - self._reloaded_at >= BELIEVED_S:
            try:
                await self.reload()
            except SQLAlchemyError as error:
                log.warning("the database does not answer: %s", error)

    async def _look_up(self, digest: str) -> _Belief:
        belief, now = self._beliefs.get(digest), time.monotonic()
        believed_s = BELIEVED_S if self._hears else BELIEVED_DEAF_S
        is_current = belief is not None and belief.generation == self._generation
        if belief is not None and is_current and now - belief.read_at < believed_s:
            return belief
        generation = self._generation
        try:
            found = await self._registry.find_key(digest)
        except (SQLAlchemyError, OSError) as error:
            if belief is not None and now - belief.read_at < BELIEVED_BLIND_S:
                return belief
            log.warning("the database does not answer: %s", error)
            raise UnavailableError(
                "keys cannot be checked now; try again shortly", code="keys_unavailable", retry_after_s=1.0
            ) from error
        belief = _Belief(found, None if found is None else _principal(found), now, generation)
        self._beliefs[digest] = belief
        self._beliefs.move_to_end(digest)
        while len(self._beliefs) > MAX_BELIEVED:
            self._beliefs.popitem(last=False)
        return belief

    def _check(self, belief: _Belief) -> Principal:
        found, principal = belief.found, belief.principal
        if found is None or principal is None:
            raise AuthenticationError("the API key is not valid")
        if found.key.revoked_at is not None:
            raise AuthenticationError("the API key was revoked", code="revoked_api_key")
        if principal.expires_at is not None and time.time() >= principal.expires_at:
            raise AuthenticationError("the API key has expired", code="expired_api_key")
        if not found.tenant.is_active or (found.user is not None and not found.user.is_active):
            who = "user" if found.tenant.is_active else "tenant"
            raise PermissionDeniedError(f"the {who} of this API key is suspended", code=f"{who}_suspended")
        return principal


def _principal(found: KeyInForce) -> Principal:
    key = found.key
    return Principal(
        tenant_id=found.tenant.id,
        tenant_name=found.tenant.name,
        user_id=key.user_id,
        key_id=key.id,
        is_admin=key.is_admin,
        weight=found.tenant.weight,
        tier=found.tenant.tier,
        models=None if key.models is None else frozenset(key.models),
        networks=None
        if key.networks is None
        else tuple(ipaddress.ip_network(network) for network in key.networks),
        endpoints=None if key.endpoints is None else tuple(key.endpoints),
        expires_at=key.expires_at,
        limits=found.limits,
    )
