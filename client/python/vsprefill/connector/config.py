"""Settings of a connector: the engine's, and what one request may say otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..channels import TlsOptions


# Presets that every server knows (PresetInfo); what each sets and costs is the server's to say.
SERVER_PRESETS = ("safe", "balanced", "fast")


class ConfigError(ValueError):
    """A setting that cannot be used; the message holds its name, its value and what is allowed."""


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ConfigError(f"{name} {value!r} is not a number in [{low:g}, {high:g}]")
    return value


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} {value!r} is not an integer in [{low}, {high}]")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{name} {value!r} is not a string")
    return value


def _known(what: str, given: Mapping[str, Any], allowed: set[str]) -> None:
    unknown = sorted(repr(key) for key in given if key not in allowed)
    if unknown:
        raise ConfigError(f"{what}: unknown {', '.join(unknown)}; known are {', '.join(sorted(allowed))}")


@dataclass(frozen=True)
class Attention:
    """A method and its parameters, or one of SERVER_PRESETS with parameters that go before its own. "" is the
    server's default.
    """

    method: str = ""
    parameters: Mapping[str, float] = field(default_factory=dict)
    preset: str = ""

    @property
    def exact(self) -> bool:
        """Whether its KV is what the engine would compute itself. Only "dense" promises that."""
        return self.method == "dense"

    @property
    def salt(self) -> str:
        """Names the KV that it makes, so that a prefix cache keeps it apart."""
        name = self.method or (f"preset {self.preset}" if self.preset else "default")
        return "vsprefill:" + ",".join([name, *(f"{k}={v:g}" for k, v in
                                                                    sorted(self.parameters.items()))])

    @classmethod
    def parse(cls, what: str, given: Any) -> Attention:
        """From {"method": ..., "parameters": {...}} or {"preset": ..., "parameters": {...}}, all optional."""
        if not isinstance(given, Mapping):
            raise ConfigError(f"{what} {given!r} is not an object with method and parameters")
        _known(what, given, {"method", "parameters", "preset"})
        preset = _text(f"{what}: preset", given.get("preset", ""))
        if preset and preset not in SERVER_PRESETS:
            raise ConfigError(f"{what}: preset {preset!r} is not one of {', '.join(SERVER_PRESETS)}")
        if preset and given.get("method"):
            raise ConfigError(f"{what}: give either preset or method, not both")
        parameters = given.get("parameters", {})
        if not isinstance(parameters, Mapping):
            raise ConfigError(f"{what}: parameters {parameters!r} is not an object of numbers")
        limit = 1e300
        return cls(_text(f"{what}: method", given.get("method", "")),
                   {_text("parameter", k): _number(f"{what}: {k}", v, -limit, limit) for k, v in parameters.items()},
                   preset)


@dataclass(frozen=True)
class RequestOptions:
    """What one prefill is to be like."""

    attention: Attention
    deadline_seconds: float
    endpoint: str | None = None  # None: the best one
    asked: bool = False  # the caller sent options, so it wants to hear what came of them


@dataclass(frozen=True)
class ConnectorConfig:
    """The engine's settings (vLLM: kv_connector_extra_config); the fields' names are the keys.

    endpoints: HOST:PORT of prefill servers. attention: default method and parameters. presets: named ones for
    requests, beside the servers' own. deadline_seconds: for a load, from its start to its last byte.
    min_prompt_tokens: fewer uncached tokens are computed here. default_on: False loads only for requests that ask for
    it. stripes: connections per load. max_loads: at once, further ones wait. max_attempts: tries per load, over the
    endpoints in turn. poll_seconds: how often servers are asked for their load. breaker_failures, breaker_seconds:
    failed loads in a row that take an endpoint out, and for how long. kv_id: identity of the model where it cannot be
    computed from the model's files. layout: name of the cache's layout where its shape leaves a choice. tls:
    root_certificates, certificate_chain, private_key (paths), server_name. unpin_io: let I/O threads leave the core
    that the engine pins its worker to, for all that the worker's parent process may use. idle_wait_seconds: a step
    that computes nothing waits so long for a load to end; more spares CPU, but a new request may wait as long.
    """

    endpoints: tuple[str, ...]
    attention: Attention = Attention("dense")
    presets: Mapping[str, Attention] = field(default_factory=dict)
    deadline_seconds: float = 60.0
    min_prompt_tokens: int = 256
    default_on: bool = True
    stripes: int = 1
    max_loads: int = 8
    max_attempts: int = 2
    poll_seconds: float = 1.0
    breaker_failures: int = 3
    breaker_seconds: float = 15.0
    kv_id: str = ""
    layout: str = ""
    tls: TlsOptions | None = None
    unpin_io: bool = True
    idle_wait_seconds: float = 0.01

    @classmethod
    def parse(cls, extra: Mapping[str, Any]) -> ConnectorConfig:
        """Raises ConfigError for the first setting that is wrong."""
        _known("kv_connector_extra_config", extra, {f.name for f in fields(cls)})
        endpoints = extra.get("endpoints", ())
        if isinstance(endpoints, str) or not endpoints or not all(isinstance(e, str) and ":" in e for e in endpoints):
            raise ConfigError(f"endpoints {endpoints!r} is not a list of HOST:PORT with at least one")
        if len(set(endpoints)) != len(endpoints):
            raise ConfigError(f"endpoints {endpoints!r} names one twice")
        presets = extra.get("presets", {})
        if not isinstance(presets, Mapping):
            raise ConfigError(f"presets {presets!r} is not an object of name: {{method, parameters}}")
        tls = extra.get("tls")
        if tls is not None:
            if not isinstance(tls, Mapping):
                raise ConfigError(f"tls {tls!r} is not an object")
            _known("tls", tls, {f.name for f in fields(TlsOptions)})
            for name, value in tls.items():
                _text(f"tls: {name}", value)
            try:
                TlsOptions(**tls).credentials()
            except (OSError, ValueError) as error:
                raise ConfigError(f"tls: {error}") from None
        for name in ("default_on", "unpin_io"):
            if not isinstance(extra.get(name, True), bool):
                raise ConfigError(f"{name} {extra[name]!r} is not true or false")

        def integer(name: str, low: int, high: int) -> int:
            return _integer(name, extra.get(name, getattr(cls, name)), low, high)

        def number(name: str, low: float, high: float) -> float:
            return _number(name, extra.get(name, getattr(cls, name)), low, high)

        return cls(
            endpoints=tuple(endpoints),
            attention=Attention.parse("attention", extra["attention"]) if "attention" in extra else cls.attention,
            presets={_text("preset", k): Attention.parse(f"preset {k}", v) for k, v in presets.items()},
            deadline_seconds=number("deadline_seconds", 0.001, 86400),
            min_prompt_tokens=integer("min_prompt_tokens", 1, 2**31),
            default_on=extra.get("default_on", cls.default_on),
            stripes=integer("stripes", 1, 64), max_loads=integer("max_loads", 1, 256),
            max_attempts=integer("max_attempts", 1, 16),
            poll_seconds=number("poll_seconds", 0.01, 3600),
            breaker_failures=integer("breaker_failures", 1, 1000),
            breaker_seconds=number("breaker_seconds", 0, 86400),
            idle_wait_seconds=number("idle_wait_seconds", 0, 1),
            kv_id=_text("kv_id", extra.get("kv_id", "")), layout=_text("layout", extra.get("layout", "")),
            tls=None if tls is None else TlsOptions(**tls), unpin_io=extra.get("unpin_io", cls.unpin_io))

    def for_request(self, params: Any) -> RequestOptions | None:
        """Options of one request; None: it is to be computed here.

        params: what the request says, None or an object with any of enabled, endpoint, method, parameters, preset,
        deadline_seconds. An endpoint must be one of the configured ones, or callers could make the engine connect
        anywhere. Raises ConfigError.
        """
        if params is None:
            return RequestOptions(self.attention, self.deadline_seconds) if self.default_on else None
        if not isinstance(params, Mapping):
            raise ConfigError(f"vsprefill {params!r} is not an object")
        _known("vsprefill", params, {"enabled", "endpoint", "method", "parameters", "preset", "deadline_seconds"})
        if not isinstance(params.get("enabled", True), bool):
            raise ConfigError(f"enabled {params['enabled']!r} is not true or false")
        if not params.get("enabled", True):
            return None
        endpoint = params.get("endpoint")
        if endpoint is not None and endpoint not in self.endpoints:
            raise ConfigError(f"endpoint {endpoint!r} is not one of {', '.join(self.endpoints)}")
        attention = self.attention
        if "preset" in params:
            if "method" in params or "parameters" in params:
                raise ConfigError("give either preset or method and parameters, not both")
            name = _text("preset", params["preset"])
            if name not in {*self.presets, *SERVER_PRESETS}:
                known = ", ".join(sorted({*self.presets, *SERVER_PRESETS}))
                raise ConfigError(f"preset {name!r} is not one of {known}")
            attention = self.presets.get(name) or Attention(preset=name)
        elif "method" in params or "parameters" in params:
            given = {k: params[k] for k in ("method", "parameters") if k in params}
            attention = Attention.parse("vsprefill", {"method": self.attention.method, **given})
        deadline = _number("deadline_seconds", params.get("deadline_seconds", self.deadline_seconds), 0.001, 86400)
        return RequestOptions(attention, deadline, endpoint, asked=True)
