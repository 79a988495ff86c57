"""Counts of a connector between two reports, as plain data that can be sent, added up and forgotten."""

from __future__ import annotations

from typing import Any

from .loads import LoadResult

Data = dict[str, Any]


def empty() -> Data:
    """loads: one [seconds, server_seconds, bytes, tokens] per loaded cache. tries: "endpoint code" -> count.
    outcomes: of loads. local: why prompts were computed by the engine -> count. handovers: seconds from a load's last
    chunk until the scheduler knows, one per loaded cache."""
    return {"loads": [], "tries": {}, "outcomes": {}, "local": {}, "handovers": []}


def is_empty(data: Data) -> bool:
    return not any(data.values())


def add(data: Data, other: Data) -> None:
    for name in ("loads", "handovers"):
        data[name].extend(other[name])
    for name in ("tries", "outcomes", "local"):
        for key, count in other[name].items():
            data[name][key] = data[name].get(key, 0) + count


def count(data: Data, name: str, key: str) -> None:
    data[name][key] = data[name].get(key, 0) + 1


def record(data: Data, result: LoadResult) -> None:
    count(data, "outcomes", result.outcome)
    for attempt in result.tries:
        count(data, "tries", f"{attempt.endpoint} {attempt.code}")
    if result.outcome == "loaded":
        data["loads"].append([result.seconds, result.server_seconds, result.bytes, result.tokens])


def summary(data: Data) -> dict[str, int | float]:
    """For a log line."""
    loads = data["loads"]
    out: dict[str, int | float] = {
        "Loaded caches": len(loads),
        "Failed loads": data["outcomes"].get("failed", 0),
        "Cancelled loads": data["outcomes"].get("cancelled", 0),
        "Local prefills": sum(data["local"].values()),
    }
    if loads:
        seconds = sorted(load[0] for load in loads)
        out["Avg load time (ms)"] = round(1e3 * sum(seconds) / len(seconds), 1)
        out["P90 load time (ms)"] = round(1e3 * seconds[min(len(seconds) - 1, int(0.9 * len(seconds)))], 1)
        out["Avg MB per load"] = round(sum(load[2] for load in loads) / len(loads) / 2**20, 3)
        out["Tokens"] = sum(load[3] for load in loads)
    return out
