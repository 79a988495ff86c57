"""The report of bench/eval/fidelity.py: results.*.jsonl in, report.json, report.md and plots out."""

import json
import math
from pathlib import Path

import bootstrap
import numpy as np
import tasks

OURS = "vsprefill"
DENSE_LEAST = 0.2  # dense score from which a task counts for retention
# Reached densities may differ from the wanted one by this share before it is said.
DENSITY_SLACK = 0.03
# A method whose least density is this many times the wanted one cannot reach it, and is not compared there.
OUT_OF_REACH = 1.2
LEAST_SAMPLES = 5  # below, an interval says nothing
PLOTS = {"## Mass covered, mean": "mass", "## KL to dense, nats": "logits", "## Tasks": "tasks", "## Cost": "layers"}

# Measure -> (words, format, whether more is better, where in a result it stands).
TEXT_MEASURES = {
    "mass_mean": ("mass covered, mean", "{:.3f}", True, "mass"),
    "mass_lowest_tenth": ("mass covered, lowest tenth of heads", "{:.3f}", True, "mass"),
    "mass_minimum": ("mass covered, worst head", "{:.3f}", True, "mass"),
    "row_lowest_tenth": ("mass covered, lowest tenth of rows", "{:.3f}", True, "mass"),
    "row_minimum": ("mass covered, worst row", "{:.3f}", True, "mass"),
    "error": ("relative output error", "{:.3f}", False, "mass"),
    "kl": ("KL to dense, nats", "{:.4f}", False, "logits"),
    "nll_increase": ("increase of the log-perplexity, nats", "{:+.4f}", False, "logits"),
    "same_top": ("same most likely token", "{:.3f}", True, "logits"),
}


def read_lines(path):
    """The results of one file; a last line that was cut off is left out."""
    with open(path, encoding="utf-8") as f:
        return [json.loads(text) for text in f if text.endswith("\n")]


class Data:
    """Results by (method, wanted density), one value per text or prompt."""

    def __init__(self, folder, decode):
        self.facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        self.plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        self.devices = {}  # stage -> where its results come from; several if it was resumed elsewhere
        self.dense = {}  # item -> line
        self.lines = {}  # (method, wanted) -> {item: line}
        for path in sorted(folder.glob("results.*.jsonl")):
            for line in read_lines(path):
                if line["method"] == "device":
                    found = self.devices.setdefault(path.name.split(".")[1], [])
                    if (where := f"{line['device']}, {line['dtype']}") not in found:
                        found.append(where)
                elif "probe" in path.name:
                    continue  # what dense can do, not what is compared
                elif line["method"] == "dense":
                    self.dense[line["item"]] = line
                else:
                    self.lines.setdefault((line["method"], line["wanted"]), {})[line["item"]] = line
        for line in [*self.dense.values(), *(x for group in self.lines.values() for x in group.values())]:
            if "answer" in line:
                sample = self.facts["samples"][line["item"]]
                text = decode(line["answer"])
                line["score"] = tasks.score(sample["answers"], text)
                line["text"] = text
        order = [method["name"] for method in self.plan["methods"]]
        present = {method for method, _ in self.lines}
        self.methods = [name for name in order if name in present]
        self.densities = sorted({wanted for _, wanted in self.lines})
        self.texts = [item for item in self.facts["texts"] if item in self.dense]
        self.prompts = [item for item in self.facts["samples"] if item in self.dense]

    def value(self, measure, line):
        """One text's value; None where it was not measured."""
        part = line.get(TEXT_MEASURES[measure][3])
        if part is None:
            return None
        if measure == "nll_increase":
            return part["nll"] - self.dense[line["item"]]["logits"]["nll"]
        return part[measure]

    def values(self, measure, method, wanted):
        """{text: value}"""
        found = {}
        for item, line in self.lines.get((method, wanted), {}).items():
            if item in self.facts["texts"]:
                value = self.value(measure, line)
                if value is not None:
                    found[item] = value
        return found

    def mean_of(self, method, wanted, *path, timed=False):
        """Mean over texts (timed: median over those that were) of something in their lines; None where none has it."""
        found = []
        for item, line in self.lines.get((method, wanted), {}).items():
            if item not in self.facts["texts"] or (timed and "op_seconds" not in line):
                continue
            for key in path:
                line = line.get(key) if isinstance(line, dict) else None
            if line is not None:
                found.append(line)
        # A text's first run may pay for libraries and buffers: times are medians.
        return float(np.median(found) if timed else np.mean(found)) if found else None

    def scored(self, method, wanted):
        """{prompt: score}"""
        return {item: line["score"] for item, line in self.lines.get((method, wanted), {}).items() if "score" in line}


def difference_interval(a, b, groups=None):
    """bootstrap.difference_interval; without bounds where there are too few samples."""
    if len(a) < LEAST_SAMPLES:
        return -math.inf, math.inf
    return bootstrap.difference_interval(a, b, groups)


def text_rows(data):
    """Per measure, density and method: mean, interval, difference from VSPrefill with its paired interval."""
    rows = []
    for measure in TEXT_MEASURES:
        for wanted in data.densities:
            ours = data.values(measure, OURS, wanted)
            for method in data.methods:
                theirs = data.values(measure, method, wanted)
                if not theirs:
                    continue
                items = sorted(theirs)
                row = {"measure": measure, "wanted": wanted, "method": method, "texts": len(items),
                       "mean": float(np.mean([theirs[i] for i in items])),
                       "interval": bootstrap.mean_interval([theirs[i] for i in items])}
                both = [i for i in items if i in ours]
                if method != OURS and both:
                    a, b = [theirs[i] for i in both], [ours[i] for i in both]
                    row["difference"] = float(np.mean(a) - np.mean(b))
                    row["difference_interval"] = difference_interval(a, b)
                rows.append(row)
    return rows


def task_rows(data):
    """(dense score by task, retention rows): tasks that dense does count."""
    by_task = {}
    for item in data.prompts:
        by_task.setdefault(data.facts["samples"][item]["task"], []).append(item)
    dense = {task: float(np.mean([data.dense[i]["score"] for i in items])) for task, items in by_task.items()}
    counted = [task for task, score in dense.items() if score >= DENSE_LEAST]
    rows = []
    for wanted in data.densities:
        for method in data.methods:
            scored = data.scored(method, wanted)
            items = [i for task in counted for i in by_task[task] if i in scored]
            if not items:
                continue
            groups = [data.facts["samples"][i]["task"] for i in items]
            present = sorted(set(groups))
            per_task = {task: float(np.mean([scored[i] for i, g in zip(items, groups, strict=True) if g == task]))
                        for task in present}
            dense_here = {task: float(np.mean([data.dense[i]["score"] for i, g in zip(items, groups, strict=True)
                                               if g == task])) for task in present}
            row = {"wanted": wanted, "method": method, "prompts": len(items), "scores": per_task,
                   "retention": sum(per_task.values()) / sum(dense_here.values()),
                   "interval": bootstrap.ratio_interval([scored[i] for i in items],
                                                        [data.dense[i]["score"] for i in items], groups)}
            ours = data.scored(OURS, wanted)
            both = [i for i in items if i in ours]
            if method != OURS and both:
                row["score_difference"] = float(np.mean([scored[i] - ours[i] for i in both]))
                row["score_difference_interval"] = difference_interval(
                    [scored[i] for i in both], [ours[i] for i in both],
                    [data.facts["samples"][i]["task"] for i in both])
            densities = [data.lines[method, wanted][i]["density"] for i in items]
            row["density"] = float(np.mean(densities))
            rows.append(row)
    return {"dense": dense, "counted": counted, "rows": rows}


def cost_rows(data):
    rows = []
    for wanted in data.densities:
        for method in data.methods:
            settings = {line["setting"] for item, line in data.lines[method, wanted].items()
                        if item in data.facts["texts"]} if (method, wanted) in data.lines else set()
            if not settings:
                continue
            plan = next(m for m in data.plan["methods"] if m["name"] == method)
            rows.append({"wanted": wanted, "method": method, "settings": sorted(settings),
                         "parameters": [plan["settings"][s].get("parameters", {}) for s in sorted(settings)],
                         "density": data.mean_of(method, wanted, "mass", "density"),
                         "cost_ratio": data.mean_of(method, wanted, "mass", "cost_ratio"),
                         "served_density": data.mean_of(method, wanted, "logits", "density"),
                         "select_seconds": data.mean_of(method, wanted, "select_seconds", timed=True),
                         "op_seconds": data.mean_of(method, wanted, "op_seconds", timed=True),
                         "prefill_seconds": data.mean_of(method, wanted, "logits", "seconds", timed=True)})
    return rows


def dense_costs(data):
    def median(read):
        found = [read(data.dense[item]) for item in data.texts if "op_seconds" in data.dense[item]]
        found = [value for value in found if value is not None]
        return float(np.median(found)) if found else None
    return {"op_seconds": median(lambda line: line.get("op_seconds")),
            "prefill_seconds": median(lambda line: line.get("logits", {}).get("seconds")),
            "nll": median(lambda line: line.get("logits", {}).get("nll"))}


def verdict(row, better):
    """How VSPrefill stands against the row's method: 'ahead', 'behind', or 'even' where the interval holds 0."""
    low, high = row["difference_interval"] if "difference_interval" in row else row["score_difference_interval"]
    if (high < 0) if better else (low > 0):
        return "ahead"
    if (low > 0) if better else (high < 0):
        return "behind"
    return "even"


def goals(data, text, task, costs):
    """[(goal, density, met, evidence)] of docs/results/fidelity.md's goals."""
    found = []
    reached = {(c["method"], c["wanted"]): c["density"] for c in costs}
    rivals = [m for m in data.methods if m not in (OURS, "oracle")]
    by = {(r["measure"], r["wanted"], r["method"]): r for r in text}

    def against_all(words, wanted, rows, better, difference):
        beyond = [m for m in rows if (reached.get((m, wanted)) or 0) > OUT_OF_REACH * wanted]
        rows = {m: row for m, row in rows.items() if m not in beyond}
        stands = {method: verdict(row, better) for method, row in rows.items()}
        if not stands:
            return
        behind = [m for m, s in stands.items() if s == "behind"]
        even = [m for m, s in stands.items() if s == "even"]
        closest = (max if better else min)(rows, key=lambda m: rows[m][difference])
        low, high = rows[closest][difference + "_interval"]
        evidence = f"closest: {closest}, {rows[closest][difference]:+.4f} [{low:+.4f}, {high:+.4f}]"
        ahead_of_us = rows[closest][difference] > 0 if better else rows[closest][difference] < 0
        if behind:
            met = "no"
            evidence += "; behind " + ", ".join(behind)
        elif even:
            met = "not decided" + (", behind in the mean" if ahead_of_us else ", ahead in the mean")
            evidence += "; intervals touch: " + ", ".join(even)
        else:
            met = "yes"
        off = [m for m in rows if reached.get((m, wanted)) and
               abs(reached[m, wanted] / wanted - 1) > DENSITY_SLACK]
        if off:
            evidence += "; other density: " + ", ".join(f"{m} {reached[m, wanted]:.3f}" for m in off)
        if beyond:
            evidence += "; cannot reach it: " + ", ".join(f"{m} ({reached[m, wanted]:.3f})" for m in beyond)
        found.append({"goal": words, "density": wanted, "met": met, "evidence": evidence})

    for wanted in data.densities:
        for measure in ("mass_mean", "mass_lowest_tenth", "error", "kl", "nll_increase"):
            rows = {m: by[measure, wanted, m] for m in rivals if "difference" in by.get((measure, wanted, m), {})}
            against_all(f"{TEXT_MEASURES[measure][0]}: better than every other method", wanted, rows,
                        TEXT_MEASURES[measure][2], "difference")
        rows = {r["method"]: r for r in task["rows"] if r["wanted"] == wanted and "score_difference" in r and
                r["method"] in rivals}
        prompts = max((row["prompts"] for row in rows.values()), default=0)
        against_all(f"task score ({prompts} prompts): better than every other method", wanted, rows, True,
                    "score_difference")
        ours, oracle = by.get(("mass_mean", wanted, OURS)), by.get(("mass_mean", wanted, "oracle"))
        if ours and oracle:
            ratio = ours["mean"] / oracle["mean"]
            found.append({"goal": "at least 98 % of the mass that the oracle of the true sums covers",
                          "density": wanted, "met": "yes" if ratio >= 0.98 else "no",
                          "evidence": f"{100 * ratio:.1f} %"})
        if wanted >= 0.2:
            rows = [by[("nll_increase", wanted, m)] for m in rivals if ("nll_increase", wanted, m) in by]
            ours = by.get(("nll_increase", wanted, OURS))
            if rows and ours:
                best = min(rows, key=lambda r: r["mean"])
                ratio = math.expm1(ours["mean"]) / math.expm1(best["mean"])
                found.append({"goal": "perplexity increase at most half of the best rival's (stretch)",
                              "density": wanted, "met": "yes" if ratio <= 0.5 else "no",
                              "evidence": f"{ratio:.2f} of {best['method']}'s"})
        ours = next((r for r in task["rows"] if r["wanted"] == wanted and r["method"] == OURS), None)
        if ours and wanted <= 0.2:
            low, high = ours["interval"]
            met = "yes" if ours["retention"] >= 0.9835 else "no"
            found.append({"goal": f"retention at least 98.35 % ({ours['prompts']} prompts)", "density": wanted,
                          "met": met,
                          "evidence": f"{100 * ours['retention']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"})
    return found


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows] + [""]


def markdown(data, summary):
    wanted_names = [f"{100 * d:.0f} %" for d in data.densities]
    by = {(r["measure"], r["wanted"], r["method"]): r for r in summary["text"]}
    kinds = {}
    for item in data.texts:
        kind = data.facts["texts"][item]["kind"]
        kinds[kind] = kinds.get(kind, 0) + 1
    out = [f"# Fidelity of {data.facts['model']}: {data.facts['preset']}", "",
           f"{len(data.texts)} held-out texts of {data.facts['text_tokens']} tokens ("
           + ", ".join(f"{kind} {count}" for kind, count in kinds.items())
           + f"), {len(data.prompts)} prompts; "
           + "; ".join(f"{stage} on {' and '.join(found)}" for stage, found in sorted(data.devices.items())) + ".", "",
           "Cells: mean over texts; `*`: the paired 95 % interval of the difference from vsprefill does not hold 0 "
           "(bold: to vsprefill's disadvantage); `≠`: reached density more than 3 % off. Mass and error are measured "
           "on the activations of dense attention, where each method's knob was set to the density on the same text; "
           "the rest is a whole run of the model.", ""]
    reached = {(c["method"], c["wanted"]): c["density"] for c in summary["costs"]}
    for measure, (words, form, better, _) in TEXT_MEASURES.items():
        if not any(r["measure"] == measure for r in summary["text"]):
            continue
        rows = []
        for method in data.methods:
            cells = [method]
            for wanted in data.densities:
                row = by.get((measure, wanted, method))
                if row is None:
                    cells.append("–")
                    continue
                cell = form.format(row["mean"])
                if "difference" in row and verdict(row, better) != "even":
                    cell = f"**{cell}***" if verdict(row, better) == "behind" else cell + "*"
                density = reached.get((method, wanted))
                if density and abs(density / wanted - 1) > DENSITY_SLACK:
                    cell += " ≠"
                cells.append(cell)
            if any(cell != "–" for cell in cells[1:]):
                rows.append(cells)
        out += [f"## {words[0].upper()}{words[1:]}", ""] + table(["method", *wanted_names], rows)
    task = summary["tasks"]
    if task["dense"]:
        out += ["## Tasks", "", "Dense scores: " + ", ".join(f"{name} {score:.2f}" + (
            "" if name in task["counted"] else " (does not count)") for name, score in task["dense"].items()) + ".", ""]
        rows = []
        by_task = {(r["wanted"], r["method"]): r for r in task["rows"]}
        for method in data.methods:
            cells = [method]
            for wanted in data.densities:
                row = by_task.get((wanted, method))
                if row is None:
                    cells.append("–")
                    continue
                low, high = row["interval"]
                mark = ""
                if "score_difference" in row and verdict(row, True) != "even":
                    mark = "**" if verdict(row, True) == "behind" else "*"
                cells.append(f"{100 * row['retention']:.1f} % [{100 * low:.0f}, {100 * high:.0f}]{mark}")
            if any(cell != "–" for cell in cells[1:]):
                rows.append(cells)
        out += ["Retention: score ÷ dense score, means over tasks. `*` as above (`**`: to vsprefill's disadvantage).",
                ""]
        out += table(["method", *wanted_names], rows)
        for wanted in data.densities:
            rows = [[m] + [number(by_task[wanted, m]["scores"].get(t), 2) for t in task["counted"]]
                    + [f"{by_task[wanted, m]['density']:.3f}"] for m in data.methods if (wanted, m) in by_task]
            prompts = max((r["prompts"] for r in task["rows"] if r["wanted"] == wanted), default=0)
            if rows:
                out += [f"Scores at {100 * wanted:.0f} % ({prompts} prompts):", ""]
                out += table(["method", *task["counted"], "density"], rows)
    out += text_table(data, summary)
    out += ["## Cost", "", "Seconds per text, medians: selection (indexer included) and the whole attention operation "
            "of all layers, alone; and the prefill of the whole model. Dense: operation "
            f"{number(summary['dense']['op_seconds'])}, prefill {number(summary['dense']['prefill_seconds'])}.", ""]
    rows = []
    for c in summary["costs"]:
        rows.append([c["method"], f"{100 * c['wanted']:.0f} %", number(c["density"], 3), number(c["cost_ratio"], 3),
                     number(c["served_density"], 3), number(c["select_seconds"]), number(c["op_seconds"]),
                     number(c["prefill_seconds"]),
                     "; ".join(json.dumps(p).replace('"', "") for p in c["parameters"])])
    out += table(["method", "wanted", "density", "cost ratio", "density when served", "selection", "operation",
                  "prefill", "fixed parameters (beside the defaults)"], rows)
    out += ["## Goals", ""] + table(["goal", "density", "met", "evidence"],
                                    [[g["goal"], f"{100 * g['density']:.0f} %", g["met"], g["evidence"]]
                                     for g in summary["goals"]])
    return "\n".join(out)


def text_table(data, summary):
    """Each text's increase of the perplexity at the density nearest to 15 %."""
    texts = [row for row in summary["by_text"] if row["at"]]
    if not texts:
        return []
    wanted = min(data.densities, key=lambda d: abs(d - 0.15))
    methods = [m for m in data.methods if any(m in row["at"].get(str(wanted), {}) for row in texts)]
    rows = []
    for row in texts:
        at = row["at"].get(str(wanted), {})
        rows.append([row["text"].removeprefix("text/"), f"{math.exp(row['dense_nll']):.2f}"]
                    + [f"{100 * math.expm1(at[m][1]):+.1f} %" if m in at else "–" for m in methods])
    return [f"## Texts, increase of the perplexity at {100 * wanted:.0f} %", ""] + table(
        ["text", "dense", *methods], rows)


def number(value, digits=4):
    return "–" if value is None else f"{value:.{digits}f}"


def by_kind(data):
    """Per kind of text, density and method: mean KL and increase of the log-perplexity."""
    rows = []
    for kind in sorted({fact["kind"] for fact in data.facts["texts"].values()}):
        for wanted in data.densities:
            for method in data.methods:
                row = {"kind": kind, "wanted": wanted, "method": method}
                for measure in ("mass_mean", "error", "kl", "nll_increase"):
                    found = [v for item, v in data.values(measure, method, wanted).items()
                             if data.facts["texts"][item]["kind"] == kind]
                    if found:
                        row[measure] = float(np.mean(found))
                rows.append(row)
    return rows


def by_text(data):
    """Per text: dense log-perplexity, and per density and method KL and increase of the log-perplexity."""
    rows = []
    for item in data.texts:
        row = {"text": item, "kind": data.facts["texts"][item]["kind"],
               "dense_nll": data.dense[item].get("logits", {}).get("nll"), "at": {}}
        for (method, wanted), lines in data.lines.items():
            if item in lines and "logits" in lines[item]:
                row["at"].setdefault(str(wanted), {})[method] = [data.value("kl", lines[item]),
                                                                 data.value("nll_increase", lines[item])]
        rows.append(row)
    return rows


def by_layer(data):
    """{method: {wanted: {measure: [layers]}}}, means over texts."""
    found = {}
    for (method, wanted), lines in data.lines.items():
        parts = [line["mass"] for line in lines.values() if "mass" in line]
        if parts:
            found.setdefault(method, {})[str(wanted)] = {
                key: [round(float(x), 4) for x in np.mean([part[key] for part in parts], axis=0)]
                for key in ("mass_by_layer", "lowest_by_layer", "error_by_layer", "density_by_layer")}
    return found


def rounded(value):
    """Numbers to five significant digits: more is noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def write(folder, decode):
    """Reads DIR/results.*.jsonl (complete or not); writes report.json, report.md and *.png beside it."""
    folder = Path(folder)
    data = Data(folder, decode)
    if not data.dense:
        raise SystemExit(f"error: {folder}: no result yet")
    text, task, costs = text_rows(data), task_rows(data), cost_rows(data)
    summary = {"facts": {key: value for key, value in data.facts.items() if key not in ("texts", "samples")},
               "devices": data.devices, "texts": len(data.texts), "prompts": len(data.prompts), "text": text,
               "tasks": task, "costs": costs, "dense": dense_costs(data), "goals": goals(data, text, task, costs),
               "by_kind": by_kind(data), "by_text": by_text(data), "by_layer": by_layer(data)}
    (folder / "report.json").write_text(json.dumps(rounded(summary), separators=(",", ":")) + "\n", encoding="utf-8")
    import plots
    plots.draw(summary, folder)
    report = markdown(data, summary)
    for heading, plot in PLOTS.items():
        if (folder / f"{plot}.png").exists():
            report = report.replace(f"\n{heading}\n", f"\n{heading}\n\n![{plot}]({plot}.png)\n")
    (folder / "report.md").write_text(report, encoding="utf-8")
    print(f"{folder}/report.md")
