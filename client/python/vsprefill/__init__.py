"""Client of vsprefill: token ids or text in, KV cache and first token out."""

from .client import Layer, PrefillClient, PrefillStream, PushResult
from .errors import (DataLossError, DeadlineError, DuplicateRequestError, InvalidRequestError,
                     ModelMismatchError, OverloadedError, PushDeniedError, RequestCancelledError,
                     ServerUnavailableError, StalledError, VsprefillError)
from .kv_cache import KvCache, KvLayout, Stats, bfloat16_to_float32

__version__ = "0.1.0"

__all__ = [
    "DataLossError", "DeadlineError", "DuplicateRequestError", "InvalidRequestError", "KvCache", "KvLayout",
    "Layer", "ModelMismatchError", "OverloadedError", "PrefillClient", "PrefillStream", "PushDeniedError",
    "PushResult", "RequestCancelledError", "ServerUnavailableError", "StalledError", "Stats", "VsprefillError",
    "bfloat16_to_float32",
]
