"""SmolLM2 in PyTorch (bfloat16), for the studies of this folder; attention by this project's CPU kernels (vsp_study),
or, without them, dense by PyTorch on any device.

Only what the studies need: one prompt, whole or in chunks, dense or sparse, hidden states out.
"""

import ctypes
import json
import os

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F

PARAMETERS = {"rule": 0, "threshold": 2.8, "tau_vertical": 0.9, "tau_slash": 0.9, "sink_tokens": 16,
              "local_tokens": 128, "last_dense_tokens": 64, "min_vertical_ratio": 0.0, "min_slash_ratio": 0.0,
              "max_density": 1.0}


def parameters(**overrides):
    """Selection parameters in the order of kernels_c_api.cc."""
    unknown = set(overrides) - set(PARAMETERS)
    if unknown:
        raise ValueError(f"unknown parameters {sorted(unknown)}; known: {', '.join(PARAMETERS)}")
    return np.array(list({**PARAMETERS, **overrides}.values()), np.float64)


def _pointer(array):
    if array is None:
        return None
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()


class StudyModel:
    def __init__(self, directory, library=None, device="cpu"):
        with open(os.path.join(directory, "config.json"), encoding="utf-8") as f:
            config = json.load(f)
        if config["model_type"] != "llama":
            raise ValueError(f"{directory}: model_type {config['model_type']}, expected llama")
        self.directory = directory
        self.layers = config["num_hidden_layers"]
        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.eps = config["rms_norm_eps"]
        self.theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
        weights = safetensors.torch.load_file(os.path.join(directory, "model.safetensors"))
        self.weights = {name: tensor.to(device, torch.bfloat16) for name, tensor in weights.items()}
        self.embedding = self.weights["model.embed_tokens.weight"]
        self.head = self.weights.get("lm_head.weight", self.embedding)
        if library is None:
            return
        self._library = ctypes.CDLL(os.path.abspath(library))
        p, i64, i32, f32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
        self._library.vsp_study_attend.argtypes = [p] * 4 + [i64] * 3 + [i32] * 3 + [f32, p, p, i64, p, p, p, p]
        self._library.vsp_study_sums.argtypes = [p] * 3 + [i64] + [i32] * 3 + [f32, p, p]

    def _weight(self, layer, name):
        return self.weights[f"model.layers.{layer}.{name}.weight"]

    def _norm(self, x, weight):
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)

    def _rotate(self, x):
        half = self.dim // 2
        positions, pairs = (torch.arange(size, device=x.device).float() for size in (len(x), half))
        angles = positions[:, None] / self.theta ** (pairs / half)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x[..., :half].float(), x[..., half:].float()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(torch.bfloat16).contiguous()

    def project(self, layer, x):
        """q [n, heads, dim], k and v [groups, n, dim] of a layer whose input is x."""
        hidden = self._norm(x, self._weight(layer, "input_layernorm"))
        q, k, v = (F.linear(hidden, self._weight(layer, f"self_attn.{part}_proj")).view(len(x), -1, self.dim)
                   for part in "qkv")
        return (self._rotate(q), self._rotate(k).transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous())

    def attend(self, q, k, v, logits=None, params=None, scale=None, chunk=None, counts=None, group_pairs=None):
        """Attention [n, heads, dim]; logits float32 [2, groups, n], scale float32 [groups]."""
        n = len(q)
        out = torch.empty_like(q)
        counts = np.zeros(3, np.int64) if counts is None else counts
        vertical, slash = (None, None) if logits is None else (np.ascontiguousarray(x, np.float32) for x in logits)
        scale = None if scale is None else np.ascontiguousarray(scale, np.float32)
        row = self.heads * self.dim * 2
        for begin in range(0, n, chunk or n):
            end = min(n, begin + (chunk or n))
            status = self._library.vsp_study_attend(
                q.data_ptr() + begin * row, _pointer(k), _pointer(v), out.data_ptr() + begin * row, end - begin, end, n,
                self.heads, self.groups, self.dim, self.dim ** -0.5, _pointer(vertical), _pointer(slash), n,
                _pointer(params), _pointer(scale), _pointer(counts), _pointer(group_pairs))
            if status:
                raise RuntimeError(f"attention failed with kernel status {status}")
        return out

    def count(self, tokens, logits, params, scale=None, chunk=None):
        """Pairs [unmasked, multiplied, dense] of one layer, without computing attention."""
        counts = np.zeros(3, np.int64)
        vertical, slash = (np.ascontiguousarray(x, np.float32) for x in logits)
        scale = None if scale is None else np.ascontiguousarray(scale, np.float32)
        for begin in range(0, tokens, chunk or tokens):
            end = min(tokens, begin + (chunk or tokens))
            status = self._library.vsp_study_attend(
                None, None, None, None, end - begin, end, tokens, self.heads, self.groups, self.dim, 1.0,
                _pointer(vertical), _pointer(slash), tokens, _pointer(params), _pointer(scale), _pointer(counts), None)
            if status:
                raise RuntimeError(f"selection failed with kernel status {status}")
        return counts

    def true_sums(self, q, k, v):
        """Column and diagonal sums of the true attention, float32 [2, groups, n]."""
        sums = torch.zeros(2, self.groups, len(q))
        status = self._library.vsp_study_sums(_pointer(q), _pointer(k), _pointer(v), len(q), self.heads, self.groups,
                                              self.dim, self.dim ** -0.5, _pointer(sums[0]), _pointer(sums[1]))
        if status:
            raise RuntimeError(f"sums failed with kernel status {status}")
        return sums

    def output(self, layer, attention):
        return F.linear(attention.view(len(attention), -1), self._weight(layer, "self_attn.o_proj"))

    def finish_layer(self, layer, x, attention):
        x = x + self.output(layer, attention)
        hidden = self._norm(x, self._weight(layer, "post_attention_layernorm"))
        hidden = F.silu(F.linear(hidden, self._weight(layer, "mlp.gate_proj"))) * F.linear(
            hidden, self._weight(layer, "mlp.up_proj"))
        return x + F.linear(hidden, self._weight(layer, "mlp.down_proj"))

    def forward(self, ids, logits=None, params=None, scale=None, chunk=None, visit=None):
        """Final hidden states and pair counts [layers, 3]. logits: [layers, 2, groups, n] or a function of
        (layer, k, v); scale: [layers, groups]; visit(layer, x, q, k, v) sees each layer's input."""
        counts = np.zeros((self.layers, 3), np.int64)
        x = self.embedding[torch.as_tensor(ids)]
        for layer in range(self.layers):
            q, k, v = self.project(layer, x)
            if visit is not None:
                visit(layer, x, q, k, v)
            chosen = logits(layer, k, v) if callable(logits) else None if logits is None else logits[layer]
            attention = self.attend(q, k, v, chosen, params, None if scale is None else scale[layer], chunk,
                                    counts[layer])
            x = self.finish_layer(layer, x, attention)
        return self._norm(x, self.weights["model.norm.weight"]), counts


class Indexer:
    """indexer.safetensors in float32: logits of one layer from K and V (kernels/indexer.h)."""

    def __init__(self, path):
        self.tensors = {k: v.float() for k, v in safetensors.torch.load_file(path).items()}

    @staticmethod
    def _bucket(offset):
        if offset < 32:
            return offset
        octave = offset.bit_length() - 6
        return min(127, 32 + octave * 8 + ((offset >> octave) - 32) // 4)

    def __call__(self, layer, k, v):
        get = lambda name: self.tensors[f"layers.{layer}.{name}"]
        features = torch.cat([F.rms_norm(x.float(), (x.shape[-1],), eps=1e-6) for x in (k, v)], -1)
        hidden = F.silu(features @ get("w1").transpose(1, 2) + get("b1")[:, None])
        logits = (hidden @ get("w2").transpose(1, 2) + get("b2")[:, None]).permute(2, 0, 1)
        buckets = torch.tensor([self._bucket(t) for t in range(k.shape[1])])
        logits[1] += get("slash_prior")[:, buckets]
        return logits.contiguous().numpy()
