#!/usr/bin/env python3
"""Does a mean correction of what is not read help vertical-slash attention?

  mean_correction_study.py --texts items.texts.jsonl --json FILE

Dense activations of SmolLM2, sampled rows, every head. A selection of columns and blocks of 64 distances per KV group:
true sums, one threshold on mass per pair for the whole model, 16 sinks, 128 nearest tokens, at each density. Relative
error of the attention output, mean over rows and heads, of
  served       softmax over what is read
  true mass    the rest enters with its true mass and the mean value of the unread keys: the best that one mean can do
  group mass   the same with the share that the group leaves unread on average, which an indexer could know
  block means  the unread keys of each block of 128 enter as one pseudo-key, their mean, weighted by their number
               (FlashPrefill V2)
  fixed means  the same with the mean of the block's keys that are no selected columns: what could be computed once for
               all rows
With --logits also the whole model with `served` and `fixed means` in every layer: KL to dense and increase of the
log-perplexity after the first quarter of the text.
Items come from fidelity.py --stage prepare; a text is cut at --tokens.
"""

import argparse
import json
from pathlib import Path

import torch
import tqdm
from study_model import StudyModel

ROOT = Path(__file__).resolve().parents[2]
BAND, BLOCK, SINKS, LOCAL = 64, 128, 16, 128
VARIANTS = ("served", "true mass", "group mass", "block means", "fixed means")


def scores(sums, tokens):
    """Mass per pair of each column [groups, n] and of each block of distances [groups, blocks]."""
    columns, diagonals = sums
    rows = torch.arange(tokens, 0, -1.0)
    pad = -tokens % BAND
    blocks = torch.nn.functional.pad(diagonals, (0, pad)).view(len(diagonals), -1, BAND).sum(-1)
    pairs = torch.nn.functional.pad(rows, (0, pad)).view(-1, BAND).sum(-1)
    return columns / rows, blocks / pairs


def selected_columns(column_scores, threshold):
    columns = column_scores > threshold
    columns[:SINKS] = True
    return columns


def mask(column_scores, block_scores, threshold, positions, tokens):
    """[rows, n] of one group: what the rows read. Distances are the rows' own, not their row tile's."""
    columns = selected_columns(column_scores, threshold)
    blocks = block_scores > threshold
    blocks[: LOCAL // BAND] = True
    distance = positions[:, None] - torch.arange(tokens)
    return (columns[None] | blocks[distance.clamp(min=0) // BAND]) & (distance >= 0)


def threshold_for(density, layers, positions, tokens):
    """One threshold for all layers and groups, by bisection on the sampled rows."""
    visible = float((positions + 1).sum()) * sum(len(c) for c, _ in layers)
    low, high = 1e-9, 1.0
    for _ in range(18):
        middle = (low * high) ** 0.5
        read = sum(int(mask(c, b, middle, positions, tokens).sum()) for columns, blocks in layers
                   for c, b in zip(columns, blocks))
        low, high = (middle, high) if read > density * visible else (low, middle)
    return (low * high) ** 0.5


def row_blocks(x):
    """[rows, n] as [rows, blocks, BLOCK]."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % BLOCK)).view(len(x), -1, BLOCK)


def key_blocks(x):
    """[n, dim] as [blocks, BLOCK, dim]."""
    return torch.nn.functional.pad(x, (0, 0, 0, -len(x) % BLOCK)).view(-1, BLOCK, x.shape[-1])


def outputs(logits, read, columns, visible, k, v, q):
    """Name -> output [heads, rows, dim] of one group, and the dense one. logits [heads, rows, n], float32."""
    dense_p = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    dense = dense_p @ v
    p = dense_p * read
    covered = p.sum(-1, keepdim=True)
    served = p @ v / covered
    unread = (visible & ~read).float()
    mean = unread @ v / unread.sum(-1, keepdim=True).clamp(min=1)
    rest = 1 - covered
    found = {"served": served, "true mass": p @ v + rest * mean}
    share = rest.mean()
    found["group mass"] = (1 - share) * served + share * mean

    chosen = logits.masked_fill(~read, -torch.inf)
    member = row_blocks(unread)
    number = member.sum(-1)

    def with_pseudo_keys(mean_k, mean_v):
        """means [rows or 1, blocks, dim]"""
        pseudo = torch.einsum("hrd,rbd->hrb", q, mean_k.expand(len(unread), -1, -1)) * q.shape[-1] ** -0.5
        both = torch.cat([chosen, pseudo + number.log()], -1).softmax(-1)
        return both[..., : len(k)] @ v + torch.einsum(
            "hrb,rbd->hrd", both[..., len(k):], mean_v.expand(len(unread), -1, -1))

    def means(weights):
        """Of keys and values, by weights [rows or 1, blocks, BLOCK]."""
        total = weights.sum(-1).clamp(min=1)[..., None]
        return (torch.einsum("rbn,bnd->rbd", weights, key_blocks(x)) / total for x in (k, v))

    found["block means"] = with_pseudo_keys(*means(member))
    found["fixed means"] = with_pseudo_keys(*means(row_blocks((~columns).float()[None])))
    return found, dense


def attend(q, k, v, columns, blocks, threshold, means):
    """Attention of one layer over what is selected, with the fixed means where `means`. q [n, heads, dim]."""
    n, heads, dim = q.shape
    per_group = heads // len(k)
    out = torch.empty(n, heads, dim)
    for g in range(len(k)):
        selected = selected_columns(columns[g], threshold)
        weights = row_blocks((~selected).float()[None])
        total = weights.sum(-1).clamp(min=1)[..., None]
        mean_k, mean_v = (torch.einsum("rbn,bnd->rbd", weights, key_blocks(x[g].float()))[0] / total[0] for x in (k, v))
        for begin in range(0, n, 256):
            positions = torch.arange(begin, min(n, begin + 256))
            end = int(positions[-1]) + 1
            last = -(-end // BLOCK)
            rows = q[positions, g * per_group : (g + 1) * per_group].float().transpose(0, 1)
            read = mask(columns[g][:end], blocks[g], threshold, positions, end)
            logits = (rows @ k[g, :end].float().T * dim**-0.5).masked_fill(~read, -torch.inf)
            if means:
                visible = positions[:, None] >= torch.arange(end)
                number = row_blocks((visible & ~read).float()).sum(-1)
                pseudo = rows @ mean_k[:last].T * dim**-0.5 + number.log()
                p = torch.cat([logits, pseudo], -1).softmax(-1)
                found = p[..., :end] @ v[g, :end].float() + p[..., end:] @ mean_v[:last]
            else:
                found = logits.softmax(-1) @ v[g, :end].float()
            out[positions, g * per_group : (g + 1) * per_group] = found.transpose(0, 1)
    return out.to(q.dtype)


def log_probs(model, hidden, positions):
    return torch.nn.functional.linear(hidden[positions], model.head).float().log_softmax(-1)


def whole_model(model, ids, layers, threshold, means, dense):
    """(KL to `dense`, log-perplexity) after the first quarter."""
    x = model.embedding[torch.tensor(ids)]
    for layer, (columns, blocks) in enumerate(layers):
        q, k, v = model.project(layer, x)
        x = model.finish_layer(layer, x, attend(q, k, v, columns, blocks, threshold, means))
    hidden = torch.nn.functional.rms_norm(x, (x.shape[-1],), model.weights["model.norm.weight"], model.eps)
    positions = scored(ids)
    logs = log_probs(model, hidden, positions)
    targets = torch.tensor(ids)[positions + 1]
    return float((dense.exp() * (dense - logs)).sum(-1).mean()), float(-logs.gather(1, targets[:, None]).mean())


def scored(ids):
    return torch.arange(len(ids) // 4, len(ids) - 1, 4)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models/SmolLM2-135M-Instruct"))
    parser.add_argument("--library", default=str(ROOT / "build/bench/eval/libvsp_study.so"))
    parser.add_argument("--texts", required=True, help="items.texts.jsonl")
    parser.add_argument("--count", type=int, default=5, help="texts")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--densities", type=float, nargs="*", default=[0.05, 0.1, 0.2])
    parser.add_argument("--logits", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    model = StudyModel(args.model, args.library)
    per_group = model.heads // model.groups
    with open(args.texts, encoding="utf-8") as f:
        items = [json.loads(line) for _, line in zip(range(args.count), f)]
    errors = {density: {name: [] for name in VARIANTS} for density in args.densities}
    positions = torch.linspace(args.tokens / 4, args.tokens - 1, args.rows).long()
    visible = positions[:, None] >= torch.arange(args.tokens)
    whole = []
    for item in tqdm.tqdm(items, desc="texts"):
        layers, inputs = [], []

        def visit(_layer, _x, q, k, v, layers=layers, inputs=inputs):
            layers.append(scores(model.true_sums(q, k, v), args.tokens))
            inputs.append((q[positions].float(), k.float(), v.float()))

        ids = item["ids"][: args.tokens]
        hidden, _ = model.forward(ids, visit=visit)
        for density in args.densities:
            threshold = threshold_for(density, layers, positions, args.tokens)
            for (columns, blocks), (q, k, v) in zip(layers, inputs):
                for g in range(model.groups):
                    heads = q[:, g * per_group : (g + 1) * per_group].transpose(0, 1)
                    logits = heads @ k[g].T * model.dim**-0.5
                    read = mask(columns[g], blocks[g], threshold, positions, args.tokens)
                    selected = selected_columns(columns[g], threshold)
                    found, dense = outputs(logits, read, selected, visible, k[g], v[g], heads)
                    for name, out in found.items():
                        relative = (out - dense).norm(dim=-1) / dense.norm(dim=-1)
                        errors[density][name].append(float(relative.mean()))
        if args.logits:
            dense = log_probs(model, hidden, scored(ids))
            base = float(-dense.gather(1, torch.tensor(ids)[scored(ids) + 1][:, None]).mean())
            for density in args.densities:
                threshold = threshold_for(density, layers, positions, args.tokens)
                for name, means in (("served", False), ("fixed means", True)):
                    kl, nll = whole_model(model, ids, layers, threshold, means, dense)
                    whole.append({"text": item["id"], "density": density, "variant": name, "kl": kl,
                                  "nll_increase": nll - base})
                    tqdm.tqdm.write(f"{item['id']} {density:.0%} {name}: KL {kl:.4f}, log-perplexity {nll - base:+.4f}")
    rows = []
    print("| density | " + " | ".join(VARIANTS) + " |\n" + "|---" * (1 + len(VARIANTS)) + "|")
    for density, found in errors.items():
        means = {name: sum(values) / len(values) for name, values in found.items()}
        rows.append({"density": density, **means})
        print(f"| {density:.0%} | " + " | ".join(f"{means[name]:.3f}" for name in VARIANTS) + " |")
    if args.json:
        result = {"texts": len(items), "tokens": args.tokens, "rows": rows, "whole": whole}
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
