#!/usr/bin/env python3
"""Which choices make a VSIndexer good: trains variants side by side on the same texts and measures each.

  indexer_ablation.py --model DIR --corpus corpus_train.safetensors --heldout corpus_heldout.safetensors --json OUT

Every text passes the frozen model once; its true column and diagonal sums then teach all variants (VARIANTS below:
each differs from the first in one thing). Afterwards columns and blocks of 64 diagonals are chosen on held-out texts
by one threshold on predicted mass per cost for the whole model, bisected to each density, and the true attention mass
that they cover is measured on every 64th row, exactly (without the kernels' rounding to row tiles). Minutes on a GPU.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
import tqdm

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import study_model

BLOCK = 64       # diagonals are chosen in blocks
SINKS, LOCAL = 16, 128  # always read, as the served default does
BUCKETS = 128    # of offsets, for the positional prior
ROW_STRIDE = 64  # of the rows on which mass is measured


@dataclass(frozen=True)
class Variant:
    name: str
    hidden: int = 512
    loss: str = "kl"           # kl, kl_reverse, mse, cosine: between softmax of the logits and the true shares
    mapping: str = "token"     # slash logit of the token at offset o from the start ("token"), or from the end ("end")
    prior: bool = True         # learnt bias per bucket of offsets
    features: str = "kv"       # k, v or both
    standardise: bool = True   # features to mean 0 and deviation 1
    normalise: bool = True     # K and V of each token to RMS 1 before
    pool: str = "mean"         # of the group's heads: mean, or max (normalised again)
    first_row: float = 0.0     # rows before this share of the text teach nothing
    lengths: tuple = ()        # of texts that it learns from; (): all
    seed: int = 1


BASE = Variant("as shipped (hidden 512, KL, slash by token, prior, K and V, standardised, mean of heads)")
VARIANTS = [
    BASE,
    replace(BASE, name="another seed", seed=2),
    replace(BASE, name="hidden 64", hidden=64),
    replace(BASE, name="hidden 256", hidden=256),
    replace(BASE, name="hidden 1024", hidden=1024),
    replace(BASE, name="loss: KL the other way round", loss="kl_reverse"),
    replace(BASE, name="loss: squared error", loss="mse"),
    replace(BASE, name="loss: cosine", loss="cosine"),
    replace(BASE, name="slash logits counted from the end", mapping="end"),
    replace(BASE, name="no positional prior", prior=False),
    replace(BASE, name="keys only", features="k"),
    replace(BASE, name="values only", features="v"),
    replace(BASE, name="features not standardised", standardise=False),
    replace(BASE, name="features raw (no RMS, not standardised)", standardise=False, normalise=False),
    replace(BASE, name="largest share of the group's heads", pool="max"),
    replace(BASE, name="rows of the last three quarters only", first_row=0.25),
    replace(BASE, name="texts of 1K and 2K only", lengths=(1024, 2048)),
    replace(BASE, name="texts of 8K only", lengths=(8192,)),
]


class Corpus:
    """Token files of training/corpus/make_corpus.py."""

    def __init__(self, path):
        with safetensors.safe_open(path, "pt") as f:
            starts, self.ids = f.get_tensor("starts").tolist(), f.get_tensor("ids")
        ends = [*starts[1:], len(self.ids)]
        self.documents = list(zip(starts, ends, strict=True))

    def texts(self, length):
        """Spans that begin with a document of at least `length` tokens."""
        return [(a, a + length) for a, b in self.documents if b - a >= length]

    def take(self, span, device):
        return self.ids[span[0]:span[1]].to(device, torch.int64)


def buckets(tokens, device):
    return torch.tensor([study_model.Indexer._bucket(t) for t in range(tokens)], device=device)


@dataclass
class Sample:
    """One text as the teacher saw it."""

    k: torch.Tensor     # [layers, groups, n, dim] float32, after RoPE
    v: torch.Tensor
    sums: dict          # first row's share -> (columns, diagonals), each [layers, heads, n]
    rows: torch.Tensor  # true attention of every ROW_STRIDEth row [layers, heads, rows, n] float16, or None


def sheared_sums(p, first_row, n):
    """Sums of p [heads, rows, n] along diagonals: [heads, n] by offset; row r is row first_row + r of the text."""
    heads, rows, _ = p.shape
    # Reversed columns, then each row one element further right: a diagonal becomes a column.
    wide = F.pad(p.flip(-1), (0, rows)).flatten(1)[:, :rows * (n + rows) - rows]
    by_place = wide.view(heads, rows, n + rows - 1).sum(1)
    offsets = torch.arange(n + rows - 1, device=p.device) + first_row - n + 1
    inside = (offsets >= 0) & (offsets < n)
    out = torch.zeros(heads, n, device=p.device)
    out[:, offsets[inside]] = by_place[:, inside]
    return out


def watch(model, ids, first_rows, keep_rows, slab=512):
    """The text's Sample. first_rows: shares of the text whose rows are left out of a set of sums."""
    n, device = len(ids), ids.device
    group = model.heads // model.groups
    kept_k, kept_v, kept_rows = [], [], []
    sums = {share: ([], []) for share in first_rows}
    x = model.embedding[ids]
    for layer in range(model.layers):
        q, k, v = model.project(layer, x)
        kept_k.append(k.float())
        kept_v.append(v.float())
        keys = k.repeat_interleave(group, 0).float()
        totals = {s: torch.zeros(2, model.heads, n, device=device) for s in first_rows}
        rows = []
        for begin in range(0, n, slab):
            end = min(n, begin + slab)
            scores = q[begin:end].transpose(0, 1).float() @ keys.transpose(1, 2) * model.dim ** -0.5
            hidden = torch.arange(n, device=device) > torch.arange(begin, end, device=device)[:, None]
            p = scores.masked_fill_(hidden, -math.inf).softmax(-1)
            for share in first_rows:
                first = max(begin, math.ceil(share * n))
                if first < end:
                    totals[share][0] += p[:, first - begin:].sum(1)
                    totals[share][1] += sheared_sums(p[:, first - begin:], first, n)
            if keep_rows:
                at = torch.arange((ROW_STRIDE - 1 - begin) % ROW_STRIDE, end - begin, ROW_STRIDE, device=device)
                rows.append(p[:, at].half())
        for share in first_rows:
            for kind in range(2):
                sums[share][kind].append(totals[share][kind])
        if keep_rows:
            kept_rows.append(torch.cat(rows, 1))
        attention = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None], is_causal=True,
                                                   enable_gqa=True)[0].transpose(0, 1)
        x = model.finish_layer(layer, x, attention.contiguous())
    stacked = {s: tuple(torch.stack(kind) for kind in pair) for s, pair in sums.items()}
    return Sample(torch.stack(kept_k), torch.stack(kept_v), stacked, torch.stack(kept_rows) if keep_rows else None)


def pooled(sums, groups, how):
    """Shares per KV group [layers, groups, n] from sums per head."""
    by_group = sums.unflatten(1, (groups, -1))
    x = by_group.mean(2) if how == "mean" else by_group.amax(2)
    return x / x.sum(-1, keepdim=True)


class Student:
    def __init__(self, variant, layers, groups, dim, steps, device):
        self.variant, self.steps, self.trained = variant, steps, 0
        generator = torch.Generator().manual_seed(variant.seed)

        def random(*size, deviation):
            return (torch.randn(*size, generator=generator) * deviation).to(device).requires_grad_()
        many, features, hidden = layers * groups, 2 * dim, variant.hidden
        self.w1 = random(many, features, hidden, deviation=features ** -0.5)
        self.b1 = torch.zeros(many, 1, hidden, device=device, requires_grad=True)
        self.w2 = random(many, hidden, 2, deviation=0.3 * hidden ** -0.5)
        self.prior = torch.zeros(many, BUCKETS, device=device, requires_grad=True)
        self.mean = torch.zeros(many, 1, features, device=device)
        self.scale = torch.ones(many, 1, features, device=device)
        for half, part in enumerate("kv"):
            if part not in variant.features:
                self.scale[..., half * dim:(half + 1) * dim] = 0
        self.optimizer = torch.optim.AdamW([self.w1, self.b1, self.w2, self.prior], lr=1e-3, betas=(0.9, 0.98),
                                           weight_decay=0.0, fused=device.type == "cuda")

    def features(self, sample):
        parts = [F.rms_norm(x, x.shape[-1:], eps=1e-6) if self.variant.normalise else x for x in (sample.k, sample.v)]
        return torch.cat(parts, -1).flatten(0, 1)

    def targets(self, sample):
        groups = sample.k.shape[1]
        columns, diagonals = sample.sums[self.variant.first_row]
        return (pooled(columns, groups, self.variant.pool).flatten(0, 1),
                pooled(diagonals, groups, self.variant.pool).flatten(0, 1))

    @torch.no_grad()
    def calibrate(self, samples):
        x = [self.features(s) for s in samples]
        count = sum(f.shape[1] for f in x)
        if self.variant.standardise:
            self.mean = sum(f.sum(1, keepdim=True) for f in x) / count
            variance = sum(f.square().sum(1, keepdim=True) for f in x) / count - self.mean.square()
            self.scale *= 1 / variance.clamp_min(0).sqrt().clamp_min(0.2)
        if self.variant.prior:
            mass, width = torch.zeros_like(self.prior), torch.zeros_like(self.prior)
            for sample in samples:
                _, diagonals = self.targets(sample)
                index = buckets(diagonals.shape[1], diagonals.device).expand_as(diagonals)
                mass.scatter_add_(1, index, diagonals * diagonals.shape[1])
                width.scatter_add_(1, index, torch.ones_like(diagonals))
            prior = torch.log(mass / width.clamp_min(1) + 1e-6)
            for b in range(1, BUCKETS):
                if width[:, b].max() == 0:
                    prior[:, b] = prior[:, b - 1]
            self.prior.copy_(prior)

    def logits(self, sample):
        x = (self.features(sample) - self.mean) * self.scale
        out = F.silu(torch.baddbmm(self.b1, x, self.w1)) @ self.w2
        vertical, slash = out.unbind(-1)
        if self.variant.mapping == "end":
            slash = slash.flip(-1)
        if self.variant.prior:
            slash = slash + self.prior[:, buckets(slash.shape[1], slash.device)]
        return vertical, slash

    def loss(self, sample):
        total = 0.0
        for target, logits in zip(self.targets(sample), self.logits(sample), strict=True):
            log_p = F.log_softmax(logits, -1)
            if self.variant.loss == "kl":
                value = (torch.xlogy(target, target) - target * log_p).sum(-1)
            elif self.variant.loss == "kl_reverse":
                value = (log_p.exp() * (log_p - (target + 1e-7).log())).sum(-1)
            elif self.variant.loss == "mse":
                value = (log_p.exp() - target).square().sum(-1) * target.shape[-1]
            else:
                value = 1 - F.cosine_similarity(log_p.exp(), target, dim=-1)
            total = total + value.sum()
        return total

    def step(self, samples):
        samples = [s for s in samples if not self.variant.lengths or s.k.shape[2] in self.variant.lengths]
        if not samples:
            return
        share = max(0, self.trained - 20) / max(1, self.steps - 20)
        rate = 1e-3 * min(1, (self.trained + 1) / 20) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, share))))
        for part in self.optimizer.param_groups:
            part["lr"] = rate
        self.optimizer.zero_grad()
        for sample in samples:
            (self.loss(sample) / len(samples)).backward()
        self.optimizer.step()
        self.trained += 1


@torch.no_grad()
def covered(sample, vertical, slash, density, heads):
    """(density, mass [layers, heads]) of one threshold on mass per cost of shares [layers, groups, n]."""
    layers, groups, n = vertical.shape
    device = vertical.device
    cost = torch.arange(n, 0, -1, device=device).float()
    per_column = vertical / cost
    blocks = -(-n // BLOCK)

    def in_blocks(x):
        return F.pad(x, (0, blocks * BLOCK - n)).unflatten(-1, (blocks, BLOCK)).sum(-1)
    per_block = in_blocks(slash) / in_blocks(cost)
    rows = torch.arange(ROW_STRIDE - 1, n, ROW_STRIDE, device=device)
    offset = rows[:, None] - torch.arange(n, device=device)
    visible = offset >= 0
    block_of = offset.clamp_min(0) // BLOCK

    def mask(threshold):
        column, block = per_column > threshold, per_block > threshold
        column[..., :SINKS] = True
        block[..., :LOCAL // BLOCK] = True
        for layer in range(layers):
            yield (column[layer][:, None] | block[layer][:, block_of]) & visible

    def density_of(threshold):
        return (sum(m.sum() for m in mask(threshold)) / (visible.sum() * layers * groups)).item()
    low, high = math.log2(1e-4 / n ** 2), math.log2(1e4 / n ** 2)
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if density_of(2 ** middle) > density else (low, middle)
    mass = torch.stack([(sample.rows[layer].float() * m.repeat_interleave(heads // groups, 0)).sum((1, 2)) / len(rows)
                        for layer, m in enumerate(mask(2 ** high))])
    return density_of(2 ** high), mass


def summary(mass):
    flat = mass.flatten().sort().values
    return {"mean": flat.mean().item(), "lowest_tenth": flat[:max(1, len(flat) // 10)].mean().item(),
            "minimum": flat[0].item()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", default="1024,2048,4096,8192", help="of training texts, one of each per step")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--max_seconds", type=float, default=0, help="stop training after this; 0: no limit")
    parser.add_argument("--heldout_length", type=int, default=8192)
    parser.add_argument("--heldout_texts", type=int, default=6)
    parser.add_argument("--densities", default="0.1,0.2")
    parser.add_argument("--variants", help="comma-separated numbers of VARIANTS; default all")
    parser.add_argument("--json")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = True
    model = study_model.StudyModel(args.model, device=device)
    chosen = [VARIANTS[int(i)] for i in args.variants.split(",")] if args.variants else VARIANTS
    lengths = [int(x) for x in args.lengths.split(",")]
    shares = sorted({v.first_row for v in chosen} | {0.0})
    corpus, heldout = Corpus(args.corpus), Corpus(args.heldout)
    generator = torch.Generator().manual_seed(7)
    pools = {n: corpus.texts(n) for n in lengths}

    def draw(n):
        return corpus.take(pools[n][int(torch.randint(len(pools[n]), (1,), generator=generator))], device)
    students = [Student(v, model.layers, model.groups, model.dim, args.steps, device) for v in chosen]

    begin = time.time()
    with torch.no_grad():
        first = [watch(model, draw(n), shares, False) for n in lengths]
    for student in students:
        student.calibrate(first)
    steps = tqdm.tqdm(range(args.steps), desc="training", mininterval=5)
    for _ in steps:
        with torch.no_grad():
            samples = [watch(model, draw(n), shares, False) for n in lengths]
        for student in students:
            student.step(samples)
        if args.max_seconds and time.time() - begin > args.max_seconds:
            break
    seconds = time.time() - begin

    texts = heldout.texts(args.heldout_length)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(7)).tolist()
    texts = [texts[i] for i in order[:args.heldout_texts]]
    densities = [float(x) for x in args.densities.split(",")]
    names = [*(v.name for v in chosen), "oracle: the true sums"]
    mass = {(name, d): [] for name in names for d in densities}
    reached = {key: [] for key in mass}
    kl = {name: [] for name in names}
    for span in tqdm.tqdm(texts, desc="held-out texts"):
        with torch.no_grad():
            sample = watch(model, heldout.take(span, device), shares, True)
            truth = [pooled(x, model.groups, "mean") for x in sample.sums[0.0]]
            predictions = [[x.softmax(-1).view_as(truth[0]) for x in s.logits(sample)] for s in students] + [truth]
        for name, prediction in zip(names, predictions, strict=True):
            kl[name].append([(torch.xlogy(t, t) - t * p.clamp_min(1e-30).log()).sum(-1).mean().item()
                             for t, p in zip(truth, prediction, strict=True)])
            for d in densities:
                got, covers = covered(sample, *prediction, d, model.heads)
                mass[name, d].append(covers)
                reached[name, d].append(got)
    rows = []
    for i, name in enumerate(names):
        row = {"variant": name, "steps": students[i].trained if i < len(students) else None,
               "choices": asdict(chosen[i]) if i < len(chosen) else None,
               "kl": [sum(x) / len(texts) for x in zip(*kl[name], strict=True)], "density": {}}
        for d in densities:
            row["density"][str(d)] = {"reached": sum(reached[name, d]) / len(texts),
                                      **summary(torch.stack(mass[name, d]).mean(0)),
                                      "mean_by_text": [m.mean().item() for m in mass[name, d]]}
        rows.append(row)
        cells = "  ".join(f"{d}: {r['mean']:.4f} / {r['lowest_tenth']:.4f}" for d, r in row["density"].items())
        print(f"{name:88s} KL {row['kl'][0]:.4f} {row['kl'][1]:.4f}  mass {cells}", flush=True)
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                                cwd=os.path.dirname(os.path.abspath(__file__)))
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump({"command": " ".join(sys.argv), "commit": commit.stdout.strip(),
                       "date": time.strftime("%Y-%m-%d"),
                       "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                       "training_seconds": seconds, "heldout_texts": len(texts), "rows": rows}, f, indent=1)
            f.write("\n")


if __name__ == "__main__":
    main()
