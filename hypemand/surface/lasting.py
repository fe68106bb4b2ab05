"""Parts of the daemon that only watch and answer: whatever goes wrong in one of them, runs go on."""

from collections.abc import Awaitable, Callable

import structlog
import trio

AGAIN_S = 5.0
"""From the failure of a part to its next beginning."""
_log = structlog.get_logger()


async def keep_up(part: str, serve: Callable[[], Awaitable[None]]) -> None:
    """Have *serve* done until it returns. A bug in it is logged, and it begins anew: no guest and no run has to pay."""
    while True:
        try:
            return await serve()
        except Exception as error:  # noqa: BLE001 - of whatever kind
            _log.exception("internal error; begun anew", part=part, error=str(error))
        await trio.sleep(AGAIN_S)
