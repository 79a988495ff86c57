"""Which selection loses least at equal density, and how sensitive each layer and KV group is.

  selection_study.py prepare  --source linux …           tokens, true sums and dense log-probabilities of held-out texts
  selection_study.py curves   --source linux …           error and cost of each layer and group over the threshold
  selection_study.py gains    --source linux --tokens N  what a layer's error does to the output (KL per error)
  selection_study.py allocate --source linux …           scale of thresholds that spends a density where it helps most
  selection_study.py evaluate --source eigen …           perplexity and KL to dense, with --set name=value

Texts are the held-out documents of training/corpus (never seen in distillation). Without --indexer the true sums stand
in for its prediction: the best that any indexer could give. Results: docs/results/selection_defaults.md.
vsprefill-distill --output_scale takes what allocate writes.
Needs: ninja vsp_study; documents.jsonl of training/corpus/fetch_corpus.sh.
"""

import argparse
import json
import math
import os
import sys
import time

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../training/corpus"))
import make_corpus
import study_model

THRESHOLDS = [0.3, 0.6, 1, 1.5, 2, 3, 4, 6, 9, 14, 25]


def rows_path(args, kind, source, suffix):
    return os.path.join(args.work, f"{kind}.{source}.{args.tokens}.{suffix}")


def scored_positions(tokens, stride):
    """The last three quarters of a text: early rows are nearly dense anyway."""
    return torch.arange(tokens // 4, tokens - 1, stride)


def log_probs(model, hidden, positions):
    for part in positions.split(256):
        yield part, F.log_softmax(F.linear(hidden[part], model.head).float(), -1)


def score(model, hidden, ids, reference):
    """Mean negative log-likelihood over every 2nd position, KL to dense and top-1 agreement over every 8th."""
    targets = torch.as_tensor(ids)
    nll = torch.cat([-lp[torch.arange(len(part)), targets[part + 1]]
                     for part, lp in log_probs(model, hidden, scored_positions(len(ids), 2))]).mean().item()
    kl, same = [], []
    for (_, lp), dense in zip(log_probs(model, hidden, scored_positions(len(ids), 8)), reference):
        dense = dense.float()
        kl.append((dense.exp() * (dense - lp)).sum(-1))
        same.append((dense.argmax(-1) == lp.argmax(-1)).float())
    return nll, torch.cat(kl).mean().item(), torch.cat(same).mean().item()


def prepare(args, model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    wanted = set(args.source)
    with open(args.documents, encoding="utf-8") as f:
        for record in map(json.loads, f):
            if record["source"] not in wanted or not make_corpus.is_heldout(record["name"], 0.08):
                continue
            ids = tokenizer(record["text"], add_special_tokens=False, verbose=False)["input_ids"][:args.tokens]
            if len(ids) < args.tokens:
                continue
            wanted.remove(record["source"])
            sums = torch.zeros(model.layers, 2, model.groups, args.tokens)

            def visit(layer, x, q, k, v):
                sums[layer] = model.true_sums(q, k, v)
            hidden, _ = model.forward(ids, visit=visit)
            targets = torch.as_tensor(ids)
            nll = torch.cat([-lp[torch.arange(len(part)), targets[part + 1]]
                             for part, lp in log_probs(model, hidden, scored_positions(len(ids), 2))]).mean().item()
            dense = [lp.half() for _, lp in log_probs(model, hidden, scored_positions(len(ids), 8))]
            torch.save({"ids": ids, "sums": sums, "nll": nll, "dense": dense, "name": record["name"]},
                       rows_path(args, "text", record["source"], "pt"))
            print(f"{record['name']}: {args.tokens} tokens, dense perplexity {math.exp(nll):.3f}", flush=True)
    if wanted:
        sys.exit(f"error: no held-out document of {args.tokens} tokens in {', '.join(sorted(wanted))}")


def load_text(args, source):
    text = torch.load(rows_path(args, "text", source, "pt"), weights_only=True)
    text["logits"] = np.log(np.maximum(text["sums"].numpy(), 1e-12)).astype(np.float32)
    return text


def overrides(args):
    return {name: float(value) for name, value in (item.split("=", 1) for item in args.set)}


def relative_error(model, layer, x, attention, dense, positions, group=None):
    """Squared error of the attention branch over the squared residual stream, mean over positions."""
    difference = attention[positions].float() - dense[positions].float()
    if group is not None:
        share = model.heads // model.groups
        keep = torch.zeros(model.heads, 1)
        keep[group * share:(group + 1) * share] = 1
        difference = difference * keep
    branch = difference.flatten(1) @ model.weights[f"model.layers.{layer}.self_attn.o_proj.weight"].float().t()
    return (branch.pow(2).sum(-1) / x[positions].float().pow(2).sum(-1)).mean().item()


def curves(args, model):
    """[layers, thresholds, groups, (error, density)], each layer's error with its dense input."""
    indexer = study_model.Indexer(args.indexer) if args.indexer else None
    for source in args.source:
        text = load_text(args, source)
        result = np.zeros((model.layers, len(THRESHOLDS), model.groups, 2))
        positions = torch.arange(args.tokens // 4, args.tokens, 8)

        def visit(layer, x, q, k, v):
            logits = indexer(layer, k, v) if indexer else text["logits"][layer]
            dense = model.attend(q, k, v)
            for i, threshold in enumerate(THRESHOLDS):
                pairs = np.zeros(model.groups, np.int64)
                params = study_model.parameters(**{**overrides(args), "threshold": threshold, "last_dense_tokens": 0})
                sparse = model.attend(q, k, v, logits, params, group_pairs=pairs)
                for group in range(model.groups):
                    result[layer, i, group] = (relative_error(model, layer, x, sparse, dense, positions, group),
                                               min(1.0, pairs[group] / (args.tokens * (args.tokens + 1) / 2)))
            print(source, layer, "error x1000", (result[layer, :, :, 0].sum(-1) * 1e3).round(2).tolist(), flush=True)
        model.forward(text["ids"], visit=visit)
        np.save(rows_path(args, "curves", source, "npy"), result)


def gains(args, model):
    """KL to dense per relative error of each layer, at the forced part and little more (threshold 6)."""
    text = load_text(args, args.source[0])
    inputs = []
    model.forward(text["ids"], visit=lambda layer, x, q, k, v: inputs.append(x))
    params = study_model.parameters(**{**overrides(args), "threshold": 6, "last_dense_tokens": 0})
    positions = torch.arange(args.tokens // 4, args.tokens, 8)
    result = np.zeros(model.layers)
    for layer in range(model.layers):
        q, k, v = model.project(layer, inputs[layer])
        sparse = model.attend(q, k, v, text["logits"][layer], params)
        error = relative_error(model, layer, inputs[layer], sparse, model.attend(q, k, v), positions)
        x = model.finish_layer(layer, inputs[layer], sparse)
        for later in range(layer + 1, model.layers):
            x = model.finish_layer(later, x, model.attend(*model.project(later, x)))
        hidden = F.rms_norm(x, (x.shape[-1],), model.weights["model.norm.weight"], model.eps)
        _, kl, _ = score(model, hidden, text["ids"], text["dense"])
        # Two runs in bfloat16 differ by about 0.0015 whatever the layer.
        result[layer] = np.clip(max(0.0, kl - 0.0015) / error, 0.3, 6.0)
        print(f"layer {layer}: error x1000 {error * 1e3:.2f} KL {kl:.4f} gain {result[layer]:.2f}", flush=True)
    np.save(os.path.join(args.work, "gains.npy"), result)


def spend(errors, costs, grid, density):
    """Threshold per layer and group that minimises the summed error at a mean density (Lagrange)."""
    low, high = 1e-9, 1e3
    for _ in range(80):
        price = math.sqrt(low * high)
        best = (errors + price * costs).argmin(-1)
        spent = np.take_along_axis(costs, best[..., None], -1).mean()
        low, high = (price, high) if spent > density else (low, price)
    return grid[best], np.take_along_axis(errors, best[..., None], -1).sum()


def allocate(args, model):
    measured = np.mean([np.load(rows_path(args, "curves", source, "npy")) for source in args.source], 0)
    weight = np.load(os.path.join(args.work, "gains.npy"))
    grid = np.exp(np.linspace(math.log(THRESHOLDS[0]), math.log(THRESHOLDS[-1]), 120))
    interpolate = lambda curve: np.apply_along_axis(
        lambda y: np.interp(np.log(grid), np.log(THRESHOLDS), y), -1, curve.transpose(0, 2, 1))
    errors, costs = interpolate(measured[..., 0]), interpolate(measured[..., 1])
    one = np.abs(costs.mean((0, 1)) - args.density).argmin()
    plain, total = spend(errors, costs, grid, args.density)
    gained, _ = spend(errors * weight[:, None, None], costs, grid, args.density)
    scale = np.clip(np.sqrt(plain * gained) / 4.0, 0.075, 3.0)
    print(f"summed error at density {args.density}: one threshold {errors[..., one].sum():.4f}, allocated {total:.4f}")
    with open(args.scale, "w", encoding="utf-8") as f:
        f.write("[\n" + ",\n".join(json.dumps([round(v, 4) for v in row]) for row in scale.tolist()) + "\n]\n")


def calibrate(args, model, text, knob, target, scale, chunk, indexer_logits):
    """Value of `threshold` or of both taus at which the density is `target`."""
    logits = text["logits"] if indexer_logits is None else indexer_logits
    low, high = (0.05, 60.0) if knob == "threshold" else (0.01, 0.999)
    for _ in range(12):
        middle = math.sqrt(low * high) if knob == "threshold" else (low + high) / 2
        values = {"threshold": middle} if knob == "threshold" else {
            "rule": 1, "tau_vertical": middle, "tau_slash": middle}
        params = study_model.parameters(**{**overrides(args), **values})
        counts = sum(model.count(args.tokens, logits[layer], params, None if scale is None else scale[layer], chunk)
                     for layer in range(model.layers))
        denser_needed = counts[0] / counts[2] < target
        raise_knob = denser_needed != (knob == "threshold")
        low, high = (middle, high) if raise_knob else (low, middle)
    return middle, params


def evaluate(args, model):
    scale = None
    if args.scale == "indexer":
        with safetensors.safe_open(args.indexer, "numpy") as f:
            scale = f.get_tensor("threshold_scale")
    elif args.scale:
        with open(args.scale, encoding="utf-8") as f:
            scale = np.array(json.load(f), np.float32)
    indexer = study_model.Indexer(args.indexer) if args.indexer else None
    for source in args.source:
        text = load_text(args, source)
        start = time.time()
        params, knob = study_model.parameters(**overrides(args)), ""
        if args.calibrate:
            predicted = None
            if indexer:
                predicted = []
                model.forward(text["ids"], visit=lambda layer, x, q, k, v: predicted.append(indexer(layer, k, v)))
            value, params = calibrate(args, model, text, args.calibrate, args.density, scale, args.chunk, predicted)
            knob = f" {args.calibrate} {value:.3f}"
        hidden, counts = model.forward(text["ids"], indexer or text["logits"], params, scale, args.chunk)
        nll, kl, top1 = score(model, hidden, text["ids"], text["dense"])
        unmasked, multiplied, dense = counts.sum(0)
        print(f"{source:16} n {args.tokens}{knob} density {unmasked / dense:.3f} cost_ratio {multiplied / dense:.3f} "
              f"perplexity {100 * math.expm1(nll - text['nll']):+.2f} % KL {kl:.4f} top-1 {top1:.3f} "
              f"({time.time() - start:.0f} s)", flush=True)


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {f.__name__: f for f in (prepare, curves, gains, allocate, evaluate)}
    parser.add_argument("command", choices=commands)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--library", default="build/bench/eval/libvsp_study.so")
    parser.add_argument("--documents", default="build/corpus/documents.jsonl")
    parser.add_argument("--work", default="build/study", help="folder for intermediate files")
    parser.add_argument("--source", nargs="+", default=["linux"], help="sources of the corpus, one text each")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--indexer", default="", help="indexer.safetensors; empty: the true sums")
    parser.add_argument("--scale", default=os.path.join(here, "smollm2_output_scale.json"),
                        help="JSON file (allocate writes it); indexer: the one in --indexer; empty: all 1")
    parser.add_argument("--density", type=float, default=0.09, help="allocate: of the candidates; --calibrate: of all")
    parser.add_argument("--calibrate", choices=["threshold", "tau"], help="evaluate at --density by moving this knob")
    parser.add_argument("--chunk", type=int, default=0, help="tokens per prefill chunk; 0: whole")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="selection parameters")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.makedirs(args.work, exist_ok=True)
    with torch.inference_mode():
        commands[args.command](args, study_model.StudyModel(args.model, args.library))


if __name__ == "__main__":
    main()
