"""The receiving side of one prefill, without a transport: messages in, layers and a verified result out.

The sync and the asyncio client, and any other transport, feed the same state machine:

    session = PrefillSession(request)
    session.feed(0, message)      # each message of stripe 0; then those of the others, in any interleaving
    result = session.finish()     # after every stream has ended with OK

Per stripe the grammar is that of docs/kv_wire_format.md; whatever breaks it raises DataLossError, after which
the session is of no use. Threads: stripe 0's first message must be fed before any other; after that one
thread per stripe may feed at once, since a layer belongs to one stripe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .errors import DataLossError
from .kv_cache import Array, ArrayDestination, Destination, KvCache, KvLayout, PrefillResult, Stats
from .ledger import ChunkLedger
from .v1 import prefill_pb2
from .wire import Chunk, parse_event

MakeDestination = Callable[[KvLayout], Destination]


@dataclass
class Layer:
    """A complete layer, each array [kv_heads, tokens, head_dim]; see KvCache."""

    index: int
    keys: Array = field(repr=False)
    values: Array = field(repr=False)


class PrefillSession:
    """See above. make_destination: called once with the accepted layout; None keeps arrays (result is a KvCache)."""

    def __init__(self, request: prefill_pb2.PrefillRequest, make_destination: MakeDestination | None = None) -> None:
        self._request = request
        self._stripes = max(request.stripes, 1)
        self._make_destination = make_destination
        self._accepted: prefill_pb2.Accepted | None = None
        self._accepted_stripes: set[int] = set()
        self._first_token: prefill_pb2.FirstToken | None = None
        self._dones: dict[int, prefill_pb2.Done] = {}
        self._ledger: ChunkLedger | None = None
        self._destination: Destination | None = None

    @property
    def accepted(self) -> bool:
        """The server has taken the request: the other stripes can attach."""
        return self._accepted is not None

    @property
    def first_token(self) -> int | None:
        """The first generated token once it has arrived. Show it, but decode only after finish()."""
        return self._first_token.token_id if self._first_token else None

    def feed(self, stripe: int, message: bytes) -> int | None:
        """Takes one message; returns the layer that it completed, if any."""
        event = parse_event(message)
        if stripe in self._dones:
            raise DataLossError(f"stripe {stripe}: a message after done")
        if isinstance(event, Chunk):
            return self._on_chunk(stripe, event)
        kind = event.WhichOneof("event")
        if kind == "accepted":
            self._on_accepted(stripe, event.accepted)
            return None
        self._require_accepted(stripe, str(kind))
        if kind == "first_token" and stripe == 0 and self._first_token is None:
            self._first_token = event.first_token
        elif kind == "done":
            self._dones[stripe] = event.done
        elif kind is not None:  # None: an event of a newer server
            raise DataLossError(f"stripe {stripe}: unexpected {kind}")
        return None

    def layer(self, index: int) -> Layer:
        """A complete layer. Only without a destination of the caller's."""
        assert isinstance(self._destination, ArrayDestination)
        return Layer(index, self._destination.keys[index], self._destination.values[index])

    def finish(self) -> PrefillResult:
        """Verifies the whole; call it when every stream has ended with OK. Raises DataLossError."""
        missing = sorted(set(range(self._stripes)) - set(self._dones))
        if self._accepted is None or self._ledger is None or missing:
            raise DataLossError(f"stream of stripe {missing[0] if missing else 0} ended before its done event")
        if self._first_token is None:
            raise DataLossError("the stream ended without a first token")
        self._ledger.verify(self._dones[0].manifest)
        token, request = self._first_token, self._request
        result = PrefillResult(
            request_id=request.request_id, attempt=request.attempt, layout=self._ledger.layout,
            method=self._accepted.method, method_parameters=dict(self._accepted.method_parameters),
            first_token=token.token_id, logits=np.array(token.logits, np.float32) if token.logits else None,
            stats=Stats.from_proto(self._dones[0].stats), received_bytes=self._ledger.received_bytes)
        if not isinstance(self._destination, ArrayDestination):
            return result
        return KvCache(**vars(result), token_ids=list(request.token_ids), keys=self._destination.keys,
                       values=self._destination.values)

    def _require_accepted(self, stripe: int, kind: str) -> ChunkLedger:
        if stripe not in self._accepted_stripes or self._ledger is None:
            raise DataLossError(f"stripe {stripe}: {kind} before accepted")
        return self._ledger

    def _on_chunk(self, stripe: int, chunk: Chunk) -> int | None:
        ledger = self._require_accepted(stripe, "kv")
        if chunk.layer % self._stripes != stripe:
            raise DataLossError(f"layer {chunk.layer} on stripe {stripe} of {self._stripes}")
        keys, values = ledger.check(chunk)
        complete = ledger.record(chunk)
        assert self._destination is not None
        self._destination.write(chunk.layer, chunk.token_begin, keys, values)
        return chunk.layer if complete else None

    def _on_accepted(self, stripe: int, accepted: prefill_pb2.Accepted) -> None:
        if stripe in self._accepted_stripes:
            raise DataLossError(f"stripe {stripe}: accepted twice")
        layout, request = KvLayout.from_proto(accepted.layout), self._request
        if (accepted.stripe, max(accepted.stripes, 1)) != (stripe, self._stripes):
            raise DataLossError(f"accepted as stripe {accepted.stripe} of {accepted.stripes}, "
                                f"asked for {stripe} of {self._stripes}")
        if self._ledger is None:
            if stripe != 0:
                raise DataLossError(f"stripe {stripe}: accepted before stripe 0")
            if request.expected_kv_id and layout.kv_id != request.expected_kv_id:
                raise DataLossError(f"accepted with kv_id {layout.kv_id}, asked for {request.expected_kv_id}")
            if (layout.prompt_tokens, layout.start_token) != (len(request.token_ids), request.start_token):
                raise DataLossError(f"accepted tokens [{layout.start_token}, {layout.prompt_tokens}), asked for "
                                    f"[{request.start_token}, {len(request.token_ids)})")
            if request.method.name and accepted.method != request.method.name:
                raise DataLossError(f"accepted with method {accepted.method!r}, asked for {request.method.name!r}")
            self._destination = (self._make_destination or ArrayDestination)(layout)
            self._ledger = ChunkLedger(layout)
            self._accepted = accepted
        elif layout != self._ledger.layout:
            raise DataLossError(f"stripe {stripe} has another layout: {layout}")
        self._accepted_stripes.add(stripe)
