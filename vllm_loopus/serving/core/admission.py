"""The knobs of a request in the engine core: parsed when it arrives, carried with it from then on.

The front end has checked them. A request that reaches the core in another way with invalid knobs
gets the model's defaults, and the scheduler ends it with the reason.
"""

from dataclasses import replace

from vllm.v1.request import Request

from vllm_loopus.serving.knobs.request import KnobError, LoopDefaults, RequestKnobs

ATTRIBUTE = "_loopus_knobs"  # of a Request
OWN_SALT = "loopus_own_salt"  # of a request: the cache_salt that it came with
KNOBS_IN_SALT = "|loopus:"  # separates them from the salt that the request came with


def parse_knobs(
    request: Request, defaults: LoopDefaults, own_seed: int | None = None
) -> str | None:
    """Attaches the knobs to a request. Returns why they are invalid; None if they are valid.

    `own_seed`: the engine's, if first states are noise of the request's seed.
    """
    params = request.sampling_params
    given = params.extra_args if params is not None else None
    try:
        knobs, reason = RequestKnobs.of(given, defaults), None
    except KnobError as error:
        knobs, reason = RequestKnobs.of(None, defaults), str(error)
    if own_seed is not None and params is not None and params.seed != own_seed:
        knobs = replace(knobs, seed=params.seed)
    setattr(request, ATTRIBUTE, knobs)
    return reason


def knobs_of(request: Request) -> RequestKnobs:
    """What `parse_knobs` attached."""
    knobs: RequestKnobs = getattr(request, ATTRIBUTE)
    return knobs


def salt(request: Request, last_exited: bool) -> None:
    """Separates the prefix caches of requests whose K/V is not that of their tokens alone: of
    different knobs in `last_exited`, of different seeds of the first state, and of each request
    that replays `guesses`."""
    knobs = knobs_of(request)
    if not hasattr(request, OWN_SALT):  # else the next input of a session, maybe with other knobs
        setattr(request, OWN_SALT, request.cache_salt)
    own: str | None = getattr(request, OWN_SALT)
    if knobs.guesses:
        salted: str | None = f"{own or ''}{KNOBS_IN_SALT}{request.request_id}"
    elif last_exited:
        salted = f"{own or ''}{KNOBS_IN_SALT}{knobs}"
    elif knobs.seed is not None:
        salted = f"{own or ''}{KNOBS_IN_SALT}seed={knobs.seed}"
    elif KNOBS_IN_SALT in (own or ""):  # it must not look like one of the above
        salted = f"{own}{KNOBS_IN_SALT}"
    else:
        salted = own
    if salted == request.cache_salt:
        return
    request.cache_salt = salted
    request.block_hashes = []
    request.update_block_hashes()
