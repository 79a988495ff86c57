"""What both clients ask for: arguments to a PrefillRequest, and answers that are no stream."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import errors
from .kv_cache import Stats
from .v1 import kv_pb2, options_pb2, prefill_pb2

_KV_DTYPES = {None: kv_pb2.KV_DTYPE_UNSPECIFIED, "bfloat16": kv_pb2.KV_DTYPE_BFLOAT16,
              "float32": kv_pb2.KV_DTYPE_FLOAT32}


@dataclass
class PushResult:
    """A prefill whose cache went to push targets, all of which verified it."""

    request_id: str
    attempt: int
    first_token: int
    logits: npt.NDArray[np.float32] | None
    stats: Stats
    targets: dict[str, int]  # address -> payload bytes verified there


def load_tokenizer(tokenizer: Any) -> Any:
    """`tokenizer`: None, an object with encode(text), or a model directory (needs the tokenizers package)."""
    if isinstance(tokenizer, (str, Path)):
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
    return tokenizer


def make_request(
    tokenizer: Any, token_ids: Iterable[int] | None, *, text: str | None = None, request_id: str | None = None,
    attempt: int = 0, method: str | None = None, parameters: Mapping[str, float] | None = None,
    preset: str | None = None, kv_dtype: str | None = None, expected_kv_id: str = "", start_token: int = 0,
    stripes: int = 1, want_logits: bool = False, push_targets: Sequence[str] = (),
) -> prefill_pb2.PrefillRequest:
    """The message of a prefill; PrefillClient.stream explains the arguments. Raises ValueError for wrong ones."""
    if (token_ids is None) == (text is None):
        raise ValueError("give either token_ids or text")
    if text is not None:
        if tokenizer is None:
            raise ValueError("text needs a tokenizer: PrefillClient(..., tokenizer=MODEL_DIR)")
        encoded = tokenizer.encode(text)
        token_ids = getattr(encoded, "ids", encoded)
    if kv_dtype not in _KV_DTYPES:
        raise ValueError(f"kv_dtype {kv_dtype!r} not in bfloat16, float32")
    for name, value, low in (("attempt", attempt, 0), ("start_token", start_token, 0), ("stripes", stripes, 1)):
        if not low <= value < 2**32:
            raise ValueError(f"{name} {value} not in [{low}, {2**32})")
    assert token_ids is not None
    return prefill_pb2.PrefillRequest(
        request_id=uuid.uuid4().hex if request_id is None else request_id, attempt=attempt,
        token_ids=[int(i) for i in token_ids],
        method=options_pb2.AttentionMethod(name=method or "", parameters=parameters or {}, preset=preset or ""),
        kv_dtype=_KV_DTYPES[kv_dtype], expected_kv_id=expected_kv_id, start_token=start_token, stripes=stripes,
        want_logits=want_logits, push_targets=push_targets)


class PushAnswer:
    """Collects the events of a prefill with push targets."""

    def __init__(self, request: prefill_pb2.PrefillRequest) -> None:
        self._request = request
        self._first_token: prefill_pb2.FirstToken | None = None
        self._done: prefill_pb2.Done | None = None

    def feed(self, message: bytes) -> None:
        event = prefill_pb2.PrefillEvent.FromString(message)
        kind = event.WhichOneof("event")
        if kind == "first_token":
            self._first_token = event.first_token
        elif kind == "done":
            self._done = event.done

    def finish(self) -> PushResult:
        """Raises DataLossError unless every target has verified its cache."""
        first_token, done, wanted = self._first_token, self._done, self._request.push_targets
        if first_token is None or done is None:
            raise errors.DataLossError("the stream ended before its done event")
        bad = [f"{t.target}: code {t.code} {t.message}" for t in done.targets if t.code != 0]
        if bad or sorted(t.target for t in done.targets) != sorted(wanted):
            raise errors.DataLossError("; ".join(bad) or f"{len(done.targets)} targets of {len(wanted)} reported")
        return PushResult(
            self._request.request_id, self._request.attempt, first_token.token_id,
            np.array(first_token.logits, np.float32) if first_token.logits else None,
            Stats.from_proto(done.stats), {t.target: t.bytes for t in done.targets})
