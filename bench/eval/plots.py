"""Plots of bench/eval/report.py's summary: every curve over density, and over measured time beside it."""

import math

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# One look per method in all plots; others get the remaining colours.
COLOURS = {"vsprefill": "#c0392b", "oracle": "#2c3e50", "streaming_llm": "#7f8c8d", "flashprefill": "#2980b9",
           "flashprefill_v2": "#16a0a0", "minference": "#8e44ad", "flexprefill": "#d68910", "xattention": "#27ae60",
           "anchor_attention": "#a0522d", "seer_attention": "#e377c2"}
MARKERS = dict(zip(COLOURS, "os^vD<>Phd", strict=True))


def style(method):
    line = {"color": COLOURS.get(method), "marker": MARKERS.get(method, "*"), "markersize": 4, "linewidth": 1.2}
    if method == "vsprefill":
        line |= {"linewidth": 2.4, "zorder": 5}
    if method == "oracle":
        line |= {"linestyle": "--"}
    return line


def curves(summary, measure):
    """{method: [(wanted, mean, low, high)]}"""
    found = {}
    for row in summary["text"]:
        if row["measure"] == measure:
            found.setdefault(row["method"], []).append((row["wanted"], row["mean"], *row["interval"]))
    return found


def panel(axes, summary, measure, x_of, label, transform=lambda y: y, log=False):
    """One measure over x_of(method, wanted); intervals as thin bars."""
    found = curves(summary, measure)
    drawn = False
    for method, points in found.items():
        placed = [(x_of(method, wanted), transform(mean), transform(low), transform(high))
                  for wanted, mean, low, high in points if x_of(method, wanted) is not None]
        if not placed:
            continue
        drawn = True
        x, y, low, high = (np.array(column) for column in zip(*placed, strict=True))
        order = np.argsort(x)
        line = style(method)
        axes.plot(x[order], y[order], label=method, **line)
        axes.vlines(x, low, high, color=line["color"], linewidth=0.7, alpha=0.6)
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if log and drawn:
        axes.set_yscale("log")
    return drawn


def draw(summary, folder):
    costs = {(c["method"], c["wanted"]): c for c in summary["costs"]}
    dense = summary["dense"]

    def cost(key, scale=1.0):
        def x_of(method, wanted):
            value = costs.get((method, wanted), {}).get(key)
            return None if value is None or scale is None else value / scale
        return x_of
    density, ratio = cost("density"), cost("cost_ratio")
    op = cost("op_seconds", dense["op_seconds"])
    prefill = cost("prefill_seconds", dense["prefill_seconds"])
    served = cost("served_density")

    def percent(nats):
        return 100 * math.expm1(nats)

    def figure(name, rows, columns):
        """rows: [(measure, label, log, transform)]; columns: [(x label, x_of)]"""
        fig, all_axes = plt.subplots(len(rows), len(columns), figsize=(4.3 * len(columns), 3.1 * len(rows)),
                                     squeeze=False, layout="constrained")
        drawn = False
        for r, (measure, label, log, transform) in enumerate(rows):
            for c, (x_label, x_of) in enumerate(columns):
                axes = all_axes[r][c]
                here = panel(axes, summary, measure, x_of, label if c == 0 else "", transform, log)
                if not here:
                    axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
                drawn |= here
                if here and "time" in x_label:
                    axes.set_xscale("log")
                if r == len(rows) - 1:
                    axes.set_xlabel(x_label)
        handles, labels = all_axes[0][0].get_legend_handles_labels()
        if drawn:
            fig.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
            fig.savefig(folder / f"{name}.png", dpi=80)
        plt.close(fig)

    def same(y):
        return y
    figure("mass", [("mass_mean", "mass covered, mean", False, same),
                    ("mass_lowest_tenth", "lowest tenth of heads", False, same),
                    ("error", "relative output error", False, same)],
           [("density (pairs)", density), ("kernel's cost ratio", ratio), ("operation's time ÷ dense", op)])
    figure("logits", [("kl", "KL to dense, nats", True, same),
                      ("nll_increase", "perplexity increase, %", True, percent),
                      ("same_top", "same most likely token", False, same)],
           [("density when served", served), ("prefill time ÷ dense", prefill)])
    tasks_figure(summary, folder, prefill)
    layers_figure(summary, folder)


def tasks_figure(summary, folder, prefill):
    rows = summary["tasks"]["rows"]
    # Densities that a cut-off run asked few prompts at would look like bends of the curves.
    most = max((row["prompts"] for row in rows), default=0)
    rows = [row for row in rows if 2 * row["prompts"] >= most]
    if not rows:
        return
    methods = list(dict.fromkeys(row["method"] for row in rows))
    fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        for ax, x in ((axes[0], [row["density"] for row in own]),
                      (axes[1], [prefill(method, row["wanted"]) for row in own])):
            placed = [(a, 100 * row["retention"], 100 * row["interval"][0], 100 * row["interval"][1])
                      for a, row in zip(x, own, strict=True) if a is not None]
            if not placed:
                continue
            placed.sort()
            xs, ys, low, high = zip(*placed, strict=True)
            line = style(method)
            ax.plot(xs, ys, label=method, **line)
            ax.vlines(xs, low, high, color=line["color"], linewidth=0.7, alpha=0.6)
    axes[0].set_xlabel("density on the prompts")
    axes[0].set_ylabel("retention, %")
    axes[1].set_xlabel("prefill time of the texts ÷ dense")
    if axes[1].lines:
        axes[1].set_xscale("log")
    for ax in axes:
        ax.axhline(98.35, color="black", linewidth=0.6, linestyle=":")
        ax.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    fig.savefig(folder / "tasks.png", dpi=80)
    plt.close(fig)


def layers_figure(summary, folder):
    """Mass and error of each layer at the density nearest to 10 %."""
    layers = summary["by_layer"]
    if not layers:
        return
    wanted = min((w for method in layers.values() for w in method), key=lambda w: abs(float(w) - 0.1))
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    methods = list(layers)
    for method in methods:
        if wanted not in layers[method]:
            continue
        for ax, key in zip(axes, ("mass_by_layer", "error_by_layer", "density_by_layer"), strict=True):
            line = style(method) | {"markersize": 2.5}
            ax.plot(layers[method][wanted][key], label=method, **line)
    for ax, label in zip(axes, ("mass covered, mean", "relative output error", "density"), strict=True):
        ax.set_xlabel(f"layer (wanted density {float(wanted):.2f})")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    fig.savefig(folder / "layers.png", dpi=80)
    plt.close(fig)
