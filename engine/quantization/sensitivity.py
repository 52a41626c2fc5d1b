"""How much each tensor's quantization moves the model's output, in time linear in the layers.

The KL divergence of the next-token distribution after a small change dW of one weight matrix is, to second
order, half the expected square of the directional derivative of log p(y) along dW, with y drawn from the
model's own distribution (the Fisher information). One forward and one backward pass give G = d log p / dW for
each sequence; with the *actual* rounding error dW of each format,

    KL per token = 1 / (2 S T) * sum over sequences s and rows n of (G_s[n] . dW[n])^2

(errors of different rows are taken as independent, which cuts the noise by the number of rows). The layers
are streamed: the forward pass keeps only the residual stream, the backward pass recomputes one layer at a
time.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

import kernels
from engine.errors import QualityError
from engine.models.layerwise import DecoderLayers, LayerWeights, linear_name, linears, shared_inputs
from engine.quantization.candidates import quantize_all
from engine.quantization.rotation import can_rotate, rotate_heads, rotate_values
from engine.quantization.workspace import HiddenStates, Workspace
from kernels.formats import Format
from kernels.reference import rms_norm

_MICRO_BATCH = 4
_HEAD_ROWS = 256
_MAX_TABLE_ROWS = 16_384  # of an embedding that are tried out; the rest behaves alike
Progress = Callable[[], None]
_Named = Mapping[str, Tensor]
"""By short name of a linear."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One format of one tensor: bytes, and the estimated KL per token (nats) when only it is quantized."""

    format: str
    nbytes: int
    kl: float


@dataclass(frozen=True, slots=True)
class TensorSensitivity:
    """All candidates of a tensor of shape [n, k]."""

    name: str
    n: int
    k: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """plain: in model order, layers from first to last, then embedding and head. rotated: by layer, v_proj
    and o_proj with the layer's values rotated; no entry where they cannot be."""

    plain: list[TensorSensitivity]
    rotated: dict[int, list[TensorSensitivity]]

    def tensors(self, rotated_layers: Collection[int]) -> list[TensorSensitivity]:
        """In model order, with these layers rotated."""
        chosen = {t.name: t for layer in rotated_layers for t in self.rotated[layer]}
        return [chosen.get(t.name, t) for t in self.plain]

    def restricted(self, widths: Collection[int]) -> "Sensitivities":
        """With the candidates of these widths alone."""
        return Sensitivities(
            [_restricted(t, widths) for t in self.plain],
            {layer: [_restricted(t, widths) for t in own] for layer, own in self.rotated.items()},
        )


class SensitivityAnalysis:
    """Runs over a workspace; every layer's result is a file, so that it can be interrupted."""

    def __init__(
        self,
        layers: DecoderLayers,
        tokens: Tensor,
        formats: Sequence[Format],
        workspace: Workspace,
        progress: Progress = lambda: None,
    ) -> None:
        self.layers, self.tokens, self.formats = layers, tokens, list(formats)
        self.workspace, self.progress = workspace, progress
        self.num_layers = layers.config.num_layers
        self.linears, self.shared_inputs = linears(layers.config), shared_inputs(layers.config)
        shape = (*tokens.shape, layers.config.hidden_size)
        self.hidden = HiddenStates(workspace.path("hidden.bin"), self.num_layers + 1, shape)

    def num_steps(self) -> int:
        return 2 * self.num_layers + 2

    def run(self) -> Sensitivities:
        self._forward()
        self._head()
        for layer in reversed(range(self.num_layers)):
            self._backward(layer)
        self._tables()
        tried = [self.workspace.load_json(f"sensitivity-{layer}.json") for layer in range(self.num_layers)]
        tables = self.workspace.load_json("sensitivity-tables.json")
        return Sensitivities(
            [_from_json(item) for layer in tried for item in layer["plain"]] + [*map(_from_json, tables)],
            {i: [*map(_from_json, layer["rotated"])] for i, layer in enumerate(tried) if layer["rotated"]},
        )

    def importance(self, layer: int) -> dict[str, Tensor]:
        """Weights of the tokens by the first linear that shares the input, once `run` is through."""
        return self.workspace.load_tensors(f"importance-{layer}.safetensors")

    @torch.inference_mode()
    def _forward(self) -> None:
        if self.workspace.has("forward.json"):
            for _ in range(self.num_layers):
                self.progress()
            return
        x = self.layers.embed(self.tokens, self.layers.embedding())
        for layer in range(self.num_layers):
            self.hidden[layer] = x
            weights = self.layers.load(layer)
            x = torch.cat([self.layers.forward(layer, weights, part) for part in x.split(_MICRO_BATCH)])
            self.progress()
        self.hidden[self.num_layers] = x
        self.workspace.save_json("forward.json", True)

    @torch.no_grad()
    def _head(self) -> None:
        """Draw the targets; gradient of their log-likelihood at the end of the residual stream."""
        if not self.workspace.has("targets.safetensors"):
            table = self.head_table()
            x = self.hidden[self.num_layers].flatten(0, 1)
            generator = torch.Generator().manual_seed(0)
            gradients, targets = [], []
            for rows in x.split(_HEAD_ROWS):
                rows = rows.requires_grad_()
                with torch.enable_grad():
                    normed = self.final(rows)
                logits = self.layers.logits(normed, table)
                slope = self.layers.logit_slope(logits)
                error, drawn = _draw(logits, generator)
                error *= slope
                gradients.append(torch.autograd.grad(normed, rows, error @ table)[0])
                targets.append(drawn)
            gradient = torch.cat(gradients).view(self.hidden[0].shape)
            self.workspace.save_tensors(f"gradient-{self.num_layers}.safetensors", {"g": gradient})
            self.workspace.save_tensors("targets.safetensors", {"targets": torch.cat(targets)})
        self.progress()

    def _backward(self, layer: int) -> None:
        name = f"sensitivity-{layer}.json"
        if not self.workspace.has(name):
            gradient = self.workspace.load_tensors(f"gradient-{layer + 1}.safetensors")["g"]
            weights = self.layers.load(layer)
            inputs, outputs, below = self._recompute(layer, weights, gradient)
            importance = {names[0]: _token_weight(names, outputs) for names in self.shared_inputs}
            tried = {
                "plain": self._try_plain(layer, weights, inputs, outputs, importance),
                "rotated": self._try_rotated(layer, weights, inputs, outputs, importance),
            }
            self.workspace.save_tensors(f"importance-{layer}.safetensors", importance)
            self.workspace.save_tensors(f"gradient-{layer}.safetensors", {"g": below})
            self.workspace.save_json(name, {k: [_to_json(r) for r in found] for k, found in tried.items()})
            self.workspace.remove(f"gradient-{layer + 1}.safetensors")
        self.progress()

    def _recompute(
        self, layer: int, weights: LayerWeights, gradient: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Inputs [S, T, K] and output gradients [S, T, N] of every linear, gradient at the layer's input."""
        inputs: dict[str, list[Tensor]] = {name: [] for name in self.linears}
        outputs: dict[str, list[Tensor]] = {name: [] for name in self.linears}
        below = []
        for x, g in zip(self.hidden[layer].split(_MICRO_BATCH), gradient.split(_MICRO_BATCH), strict=True):
            x.requires_grad_()
            leaves: dict[str, Tensor] = {}

            def linear(name: str, value: Tensor, leaves: dict[str, Tensor] = leaves) -> Tensor:
                inputs[name].append(value.detach())
                y = functional.linear(value, weights.linears[name])
                leaves[name] = y
                return y

            y = self.layers.forward(layer, weights, x, linear)
            found = torch.autograd.grad(y, [x, *(leaves[n] for n in self.linears)], g)
            below.append(found[0])
            for name, value in zip(self.linears, found[1:], strict=True):
                outputs[name].append(value)
        return (
            {name: torch.cat(parts) for name, parts in inputs.items()},
            {name: torch.cat(parts) for name, parts in outputs.items()},
            torch.cat(below),
        )

    def _try_plain(
        self, layer: int, weights: LayerWeights, inputs: _Named, outputs: _Named, importance: _Named
    ) -> list[TensorSensitivity]:
        results: dict[str, TensorSensitivity] = {}
        for names in self.shared_inputs:
            leader = names[0]
            results |= self._try_formats(layer, names, weights, inputs[leader], outputs, importance[leader])
        return [results[name] for name in self.linears]

    def _try_rotated(
        self, layer: int, weights: LayerWeights, inputs: _Named, outputs: _Named, importance: _Named
    ) -> list[TensorSensitivity]:
        """v_proj and o_proj with the values rotated; empty where they cannot be."""
        width = self.layers.config.head_dim
        if not can_rotate(width):
            return []
        weights = rotate_values(weights, width)
        gradients = {"v_proj": rotate_heads(outputs["v_proj"], width), "o_proj": outputs["o_proj"]}
        mixed = rotate_heads(inputs["o_proj"], width)
        token_weight = importance["q_proj"]  # of all that share the input, as in the quantizing pass
        results = self._try_formats(
            layer, ("v_proj",), weights, inputs["v_proj"], gradients, token_weight
        ) | self._try_formats(layer, ("o_proj",), weights, mixed, gradients, importance["o_proj"])
        return list(results.values())

    @torch.inference_mode()
    def _try_formats(
        self,
        layer: int,
        names: Sequence[str],
        weights: LayerWeights,
        x: Tensor,
        outputs: _Named,
        token_weight: Tensor,
    ) -> dict[str, TensorSensitivity]:
        """Linears that share the input x [S, T, K], by short name. token_weight: [S, T]."""
        hessian = weighted_moment(x, token_weight)
        matrices = [weights.linears[n] for n in names]
        tried = quantize_all(matrices, hessian, [self.formats] * len(names))
        results = {}
        for name, w, quantized in zip(names, matrices, tried, strict=True):
            errors = torch.stack([q.dequantize() - w for q in quantized])
            kl = self._divergences(x, outputs[name], errors)
            results[name] = self._result(linear_name(layer, name), w, kl)
        return results

    def _divergences(self, x: Tensor, g: Tensor, errors: Tensor) -> Tensor:
        """KL per token for errors [F, N, K]."""
        total = torch.zeros(len(errors), dtype=torch.float64)
        for x_s, g_s in zip(x, g, strict=True):
            gradient = g_s.T @ x_s
            for i, error in enumerate(errors):  # one by one: a product of two matrices stays in the cache
                total[i] += (gradient * error).sum(-1).double().square().sum()
        return total / (2 * self.tokens.numel())

    def _result(self, name: str, w: Tensor, kl: Tensor) -> TensorSensitivity:
        n, k = w.shape
        return TensorSensitivity(
            name,
            n,
            k,
            tuple(Candidate(str(f), f.nbytes(n, k), float(v)) for f, v in zip(self.formats, kl, strict=True)),
        )

    @torch.inference_mode()
    def _tables(self) -> None:
        """Embedding and head, which may be one tensor: lookups and logits both see its error."""
        if not self.workspace.has("sensitivity-tables.json"):
            results = [self._try_table(name) for name in self.table_names()]
            self.workspace.save_json("sensitivity-tables.json", [_to_json(r) for r in results])
        self.progress()

    def table_names(self) -> list[str]:
        """Embedding, and head where it is a tensor of its own."""
        return ["model.embed_tokens.weight", *([] if self.layers.is_tied else ["lm_head.weight"])]

    @torch.inference_mode()
    def quantize_tables(self, formats: Mapping[str, str]) -> dict[str, kernels.PackedWeight]:
        """Embedding and head in the given formats; kept, because trials often agree on these large ones."""
        result = {}
        for name in self.table_names():
            file, f = f"{name}-{formats[name]}.safetensors", Format.parse(formats[name])
            if not self.workspace.has(file):
                table, moment = self.layers.tensor(name), self._table_moment(name)
                ((quantized,),) = quantize_all([table], moment, [[f]])
                self.workspace.save_tensors(file, {"packed": kernels.pack(quantized).data})
            data = self.workspace.load_tensors(file)["packed"]
            rows = self.layers.config.vocab_size
            result[name] = kernels.PackedWeight(f, rows, self.layers.config.hidden_size, data)
        return result

    def _table_uses(self, name: str) -> tuple[bool, bool]:
        """Whether a table is read by lookups, and whether it makes logits."""
        is_embedding = name == "model.embed_tokens.weight"
        return is_embedding, self.layers.is_tied or not is_embedding

    def _lookup_gradient(self) -> Tensor:
        """d log p / d embedding row, at every token [S, T, hidden]."""
        return self.workspace.load_tensors("gradient-0.safetensors")["g"] * self.layers.config.embedding_scale

    def _try_table(self, name: str) -> TensorSensitivity:
        table = self.layers.tensor(name)
        vocab, hidden = table.shape
        has_lookups, has_logits = self._table_uses(name)
        lookups = self._lookup_gradient() if has_lookups else None
        targets = self.workspace.load_tensors("targets.safetensors")["targets"].view(self.tokens.shape)
        normed = self.final(self.hidden[self.num_layers])
        hessian = self._table_moment(name)
        rows = torch.randperm(vocab, generator=torch.Generator().manual_seed(0))[:_MAX_TABLE_ROWS]
        if lookups is not None:  # of an embedding the rows that the text never reads cost nothing
            seen = torch.unique(self.tokens)
            rows = torch.unique(torch.cat([rows, seen]))
        is_seen = torch.isin(rows, self.tokens)
        part = table[rows]
        (quantized,) = quantize_all([part], hessian, [self.formats])
        total = torch.zeros(len(self.formats), 2, dtype=torch.float64)
        place = torch.full((vocab,), -1)
        place[rows] = torch.arange(len(rows))
        for s in range(len(self.tokens)):
            g = torch.zeros(len(rows), hidden)
            if has_logits:
                for x, y in zip(normed[s].split(_HEAD_ROWS), targets[s].split(_HEAD_ROWS), strict=True):
                    logits = self.layers.logits(x, table)
                    error = logits.softmax(-1).neg_()
                    error[torch.arange(len(y)), y] += 1
                    error *= self.layers.logit_slope(logits)
                    g += error[:, rows].T @ x
            if lookups is not None:
                g.index_add_(0, place[self.tokens[s]], lookups[s])
            for i, q in enumerate(quantized):
                moved = torch.einsum("nk,nk->n", g, q.dequantize() - part).double().square()
                total[i, 0] += moved[is_seen].sum()
                total[i, 1] += moved[~is_seen].sum()
        # Unseen rows were sampled; seen rows are all there.
        unseen = vocab - int(is_seen.sum())
        scale = unseen / max(len(rows) - int(is_seen.sum()), 1)
        kl = (total[:, 0] + total[:, 1] * scale) / (2 * self.tokens.numel())
        return self._result(name, table, kl)

    def _table_moment(self, name: str) -> Tensor:
        """What an average row's error meets: [hidden, hidden]. Computed once."""
        file = f"moment-{name}.safetensors"
        if not self.workspace.has(file):
            has_lookups, has_logits = self._table_uses(name)
            hidden = self.layers.config.hidden_size
            moment = torch.zeros(hidden, hidden)
            if has_logits:
                table = self.head_table()
                for x in self.final(self.hidden[self.num_layers]).flatten(0, 1).split(_HEAD_ROWS):
                    # Expected square of the logits' gradients, p (1 - p), summed over the rows.
                    logits = self.layers.logits(x, table)
                    p, slope = logits.softmax(-1), self.layers.logit_slope(logits)
                    moment += (x * (p * (1 - p) * slope * slope).sum(-1, keepdim=True)).T @ x
            if has_lookups:
                flat = self._lookup_gradient().flatten(0, 1)
                moment += flat.T @ flat
            self.workspace.save_tensors(file, {"moment": moment / self.tokens.numel()})
        return self.workspace.load_tensors(file)["moment"]

    def head_table(self) -> Tensor:
        return self.layers.embedding() if self.layers.is_tied else self.layers.tensor("lm_head.weight")

    def final(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.layers.final_norm(), self.layers.config.rms_norm_eps)


def _token_weight(names: Sequence[str], outputs: _Named) -> Tensor:
    """How much the model's output depends on linears' outputs at each token, [S, T]."""
    squares = [outputs[n].square().sum(-1) for n in names]
    return torch.stack([s / s.sum().clamp(min=1e-30) for s in squares]).sum(0)


def weighted_moment(x: Tensor, weight: Tensor) -> Tensor:
    """Sum over tokens of weight * x x^T, float32 [K, K], for x [S, T, K] and weight [S, T].

    Of inputs that are all zero, an expert's that no token reached, it is the identity: all count alike.

    Raises QualityError where the activations or gradients are beyond float32.
    """
    total = torch.zeros(x.shape[-1], x.shape[-1])
    for x_s, w_s in zip(x, weight, strict=True):
        total += (x_s * w_s[:, None]).T @ x_s
    if not torch.isfinite(total).all():
        raise QualityError("activations or gradients of the calibration text are not finite in float32")
    return total if total.any() else torch.eye(x.shape[-1])


def _draw(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A target from each row's distribution, and d log p(target) / d logits."""
    p = logits.softmax(-1)
    drawn = torch.multinomial(p, 1, generator=generator).squeeze(1)
    error = p.neg_()
    error[torch.arange(len(drawn)), drawn] += 1
    return error, drawn


def _restricted(tensor: TensorSensitivity, widths: Collection[int]) -> TensorSensitivity:
    kept = tuple(c for c in tensor.candidates if Format.parse(c.format).bits in widths)
    return replace(tensor, candidates=kept)


def _to_json(result: TensorSensitivity) -> dict[str, object]:
    return {
        "name": result.name,
        "n": result.n,
        "k": result.k,
        "candidates": [[c.format, c.nbytes, c.kl] for c in result.candidates],
    }


def _from_json(item: dict[str, list[tuple[str, int, float]]]) -> TensorSensitivity:
    candidates = tuple(Candidate(*c) for c in item["candidates"])
    return TensorSensitivity(str(item["name"]), int(item["n"]), int(item["k"]), candidates)  # type: ignore[call-overload]
