"""Client of vsprefill: token ids or text in, KV cache and first token out."""

from .aio import AsyncPrefillClient, AsyncPrefillStream
from .channels import TlsOptions
from .client import PrefillClient, PrefillStream
from .errors import (DataLossError, DeadlineError, DuplicateRequestError, InvalidRequestError,
                     ModelMismatchError, OverloadedError, PushDeniedError, RequestCancelledError,
                     ServerUnavailableError, StalledError, UnauthenticatedError, VsprefillError)
from .kv_cache import Destination, KvCache, KvLayout, PrefillResult, Stats, bfloat16_to_float32
from .requests import PushResult
from .retry import NO_RETRY, RetryPolicy
from .session import Layer, PrefillSession

__version__ = "0.2.0"

__all__ = [
    "NO_RETRY", "AsyncPrefillClient", "AsyncPrefillStream", "DataLossError", "DeadlineError", "Destination",
    "DuplicateRequestError", "InvalidRequestError", "KvCache", "KvLayout", "Layer", "ModelMismatchError",
    "OverloadedError", "PrefillClient", "PrefillResult", "PrefillSession", "PrefillStream", "PushDeniedError",
    "PushResult", "RequestCancelledError", "RetryPolicy", "ServerUnavailableError", "StalledError", "Stats",
    "TlsOptions", "UnauthenticatedError", "VsprefillError", "bfloat16_to_float32",
]
