"""Small forms of well-known architectures, trained for a few steps: values and gradients against the live eager loop."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live_training import (
    Training,
    adamw,
    check_gradients,
    check_values,
    images,
    normal,
    regression,
    sgd,
    squared_error,
    tokens,
)
from torch import nn

HYPERS = ("groups.0.lr", "groups.0.weight_decay")


def cross_entropy(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


# ---------------------------------------------------------------------- images


def convolution(inputs, outputs, size=3, stride=1, activation: Any = nn.ReLU):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(outputs), activation()
    )


class Residual(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.body = nn.Sequential(
            convolution(inputs, outputs, stride=stride), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip = nn.Identity() if inputs == outputs and stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x):
        return F.relu(self.body(x) + self.skip(x))


def resnet():
    return nn.Sequential(
        convolution(1, 3), Residual(3, 3, 1), Residual(3, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )


class Dense(nn.Module):
    """Each layer sees what all layers before it made."""

    def __init__(self, inputs, growth, count):
        super().__init__()
        self.layers = nn.ModuleList(
            convolution(inputs + index * growth, growth, activation=nn.SiLU) for index in range(count)
        )

    def forward(self, x):
        found = [x]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        return torch.cat(found, 1)


def densenet():
    return nn.Sequential(
        Dense(1, 2, 3), nn.AvgPool2d(2), Dense(7, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 2)
    )


def vgg():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(27, 6), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(6, 2),
    )  # fmt: skip


class UNet(nn.Module):
    """Down, up by a transposed convolution, and across."""

    def __init__(self):
        super().__init__()
        self.enter, self.down = convolution(1, 2), nn.MaxPool2d(2)
        self.middle, self.up = convolution(2, 4), nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.leave, self.out = convolution(4, 2), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        across = self.enter(x)
        coarse = self.middle(self.down(across))
        smooth = F.interpolate(coarse[:, :2], scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.out(self.leave(torch.cat((across, self.up(coarse) + smooth), 1)))


def segmentation(steps):
    return [(x, (x[:, 0] > 0).long()) for x, _ in images(steps)]


class VisionTransformer(nn.Module):
    """Patches, a class token, learned positions and one encoder layer."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 3, stride=3)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, 4)), nn.Parameter(0.1 * torch.randn(1, 5, 4))
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True, norm_first=True)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        patches = self.patches(x).flatten(2).transpose(1, 2)
        sequence = torch.cat((self.token.expand(len(x), -1, -1), patches), 1) + self.positions
        return self.out(self.layer(sequence)[:, 0])


class Mixer(nn.Module):
    """Mixes over patches, then over channels."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 3, 3, stride=3)
        self.norms = nn.ModuleList((nn.LayerNorm(3), nn.LayerNorm(3)))
        self.over_patches = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4))
        self.over_channels = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3))
        self.out = nn.Linear(3, 2)

    def forward(self, x):
        h = self.patches(x).flatten(2).mT
        h = h + self.over_patches(self.norms[0](h).mT).mT
        h = h + self.over_channels(self.norms[1](h))
        return self.out(h.mean(1))


class Excited(nn.Module):
    """A depthwise convolution with squeeze and excitation."""

    def __init__(self):
        super().__init__()
        self.enter, self.depthwise = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm, self.excite, self.out = nn.GroupNorm(2, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = F.silu(self.norm(self.depthwise(F.silu(self.enter(x)))))
        gate = self.excite(h.mean((2, 3))).sigmoid()
        return self.out((h * gate[:, :, None, None]).mean((2, 3)))


# ---------------------------------------------------------------------- sequences


@dataclass
class Output:
    """What some libraries' models return."""

    loss: torch.Tensor | None
    logits: torch.Tensor


class LanguageModel(nn.Module):
    """A recurrent language model with tied embeddings that takes keywords and computes its own loss."""

    def __init__(self):
        super().__init__()
        self.embedding, self.recurrent = nn.Embedding(6, 4), nn.LSTM(4, 4, num_layers=2, batch_first=True, dropout=0.2)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, input_ids, labels=None):
        logits = self.out(self.recurrent(self.embedding(input_ids))[0])
        if labels is None:
            return Output(None, logits)
        return Output(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=0), logits)


class Pretrained(nn.Module):
    """A decoder with tied embeddings, attention kernels, dropout, and a trained correction of frozen projections."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions, self.norm = nn.Embedding(6, 4), nn.Embedding(8, 4), nn.LayerNorm(4)
        self.attend, self.project = nn.Linear(4, 12).requires_grad_(False), nn.Linear(4, 4)
        self.down, self.up = nn.Parameter(0.3 * torch.randn(1, 4)), nn.Parameter(0.3 * torch.randn(12, 1))
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids, labels):
        shape = (*input_ids.shape, 2, 2)
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        h = self.norm(x)
        parts = (self.attend(h) + F.linear(F.linear(h, self.down), self.up)).chunk(3, -1)
        q, k, v = (part.view(shape).transpose(1, 2) for part in parts)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1).transpose(1, 2).flatten(2)
        logits = self.head(x + self.project(h))
        return Output(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits)


class Translating(nn.Module):
    """torch's own encoder and decoder."""

    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(6, 4), nn.Linear(4, 6)
        self.body = nn.Transformer(4, 2, 1, 1, 8, dropout=0.1, batch_first=True)

    def forward(self, input_ids, labels):
        source, target = self.embedding(input_ids), self.embedding(labels)
        mask = nn.Transformer.generate_square_subsequent_mask(labels.shape[1], dtype=source.dtype)
        logits = self.out(self.body(source, target, tgt_mask=mask, tgt_is_causal=True))
        return Output(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits)


class Packing(nn.Module):
    """A recurrent encoder of sequences of different lengths, which come with the batch."""

    def __init__(self, kind):
        super().__init__()
        self.recurrent, self.out = kind(3, 4, batch_first=True, bidirectional=True), nn.Linear(8, 2)

    def forward(self, batch):
        x, lengths = batch
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.recurrent(packed)[0], batch_first=True)
        return self.out(out.sum(1))


def sequences(steps):
    lengths = torch.tensor([[2, 5, 3], [4, 1, 3], [5, 5, 2]])
    return [((normal(3, 5, 3, seed=t), lengths[t % 3]), normal(3, 2, seed=9 + t)) for t in range(steps)]


class Attending(nn.Module):
    """A decoder layer with rotary positions, root-mean-square norms, gated units and a mask from the batch."""

    def __init__(self):
        super().__init__()
        self.embedding, self.project = nn.Embedding(6, 4), nn.Linear(4, 12, bias=False)
        self.norms = nn.ModuleList((nn.RMSNorm(4), nn.RMSNorm(4)))
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.frequencies: Any = nn.Buffer(10.0 ** -torch.arange(2).double(), persistent=False)

    def rotate(self, x):
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * self.frequencies
        angles = torch.cat((angles, angles), -1).to(x.dtype)
        left, right = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-right, left), -1) * angles.sin()

    def forward(self, input_ids, labels, attention_mask=None):
        h = self.embedding(input_ids)
        q, k, v = self.project(self.norms[0](h)).chunk(3, -1)
        allowed = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).tril()
        if attention_mask is not None and not attention_mask.all():
            allowed = allowed & attention_mask[:, None, :].bool()
        scores = (self.rotate(q) @ self.rotate(k).mT / math.sqrt(4)).masked_fill(~allowed, torch.finfo(h.dtype).min)
        h = h + scores.softmax(-1) @ v
        normed = self.norms[1](h)
        logits = F.linear(h + self.down(F.silu(self.gate(normed)) * self.up(normed)), self.embedding.weight)
        return {"loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), "logits": logits}


def keywords(steps, *, masked=False):
    made = []
    for t, sequence in enumerate(tokens(steps)):
        batch = {"input_ids": sequence, "labels": sequence}
        if masked:
            batch["attention_mask"] = torch.ones(3, 4, dtype=torch.long)
            batch["attention_mask"][0, 3:] = t % 2
        made.append(batch)
    return made


def own_loss(model, batch):
    out = model(**batch)
    return out["loss"] if isinstance(out, dict) else out.loss


# ---------------------------------------------------------------------- flows and equations


class Coupling(nn.Module):
    """One affine coupling: half of the values are scaled and shifted by a network of the other half."""

    def __init__(self, flipped):
        super().__init__()
        self.flipped, self.network = flipped, nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4))

    def forward(self, x):
        kept, moved = x.chunk(2, -1) if not self.flipped else x.chunk(2, -1)[::-1]
        scale, shift = self.network(kept).chunk(2, -1)
        scale = torch.tanh(scale)
        parts = (kept, moved * scale.exp() + shift)
        return torch.cat(parts[::-1] if self.flipped else parts, -1), scale.sum(-1)


class Flow(nn.Module):
    """A normalizing flow; returns the log-density of its inputs."""

    def __init__(self):
        super().__init__()
        self.couplings = nn.ModuleList((Coupling(False), Coupling(True)))
        self.mean: Any = nn.Buffer(torch.zeros(4))
        self.spread: Any = nn.Buffer(torch.ones(4))

    def forward(self, x):
        total: Any = 0.0
        for coupling in self.couplings:
            x, logarithm = coupling(x)
            total = total + logarithm
        density = torch.distributions.Independent(torch.distributions.Normal(self.mean, self.spread), 1)
        return density.log_prob(x) + total


class Invertible(nn.Module):
    """A linear flow with the determinant of its matrix, and a normal density with a full covariance."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(4) + 0.1 * torch.randn(4, 4))
        self.mean, self.root = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.eye(4) + 0.1 * torch.randn(4, 4))

    def forward(self, x):
        z = x @ torch.linalg.inv(self.matrix) + torch.linalg.solve(self.root, x.mT).mT * 0.1
        covariance = self.root @ self.root.mT + 0.1 * torch.eye(4, dtype=x.dtype)
        density = torch.distributions.MultivariateNormal(self.mean, covariance)
        return density.log_prob(z) - torch.linalg.slogdet(self.matrix)[1]


class Variational(nn.Module):
    """An autoencoder with a drawn code; returns its loss."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4), nn.Linear(2, 4)

    def forward(self, x):
        mean, spread = self.encode(x).chunk(2, -1)
        posterior = torch.distributions.Normal(mean, F.softplus(spread))
        prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        divergence = torch.distributions.kl_divergence(posterior, prior).mean()
        return F.mse_loss(self.decode(posterior.rsample()), x) + divergence


class Physics(nn.Module):
    """A network that is trained to solve an equation of its own derivatives."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x):
        slope = torch.func.vmap(torch.func.grad(lambda point: self.network(point).squeeze()))(x)
        jacobian = torch.func.jacrev(self.network)(x)
        return ((slope + self.network(x)) ** 2).mean() + jacobian.square().sum() * 0.01


class Generating(nn.Module):
    """A network whose weights another one makes."""

    def __init__(self):
        super().__init__()
        self.maker, self.code, self.layer = nn.Linear(2, 8), nn.Parameter(torch.randn(2)), nn.Linear(3, 2)

    def forward(self, x):
        made = self.maker(self.code)
        weights = {"weight": made[:6].view(2, 3) + self.layer.weight, "bias": made[6:]}
        return torch.func.functional_call(self.layer, weights, (x,))


class Solving(nn.Module):
    """Features with a last layer that is fitted to the batch: a ridge regression."""

    def __init__(self):
        super().__init__()
        self.features = nn.Linear(3, 4)

    def forward(self, batch):
        x, y = batch
        h = self.features(x).tanh()
        gram = h.mT @ h + 0.1 * torch.eye(4, dtype=h.dtype)
        return (h @ torch.linalg.lstsq(gram, h.mT @ y).solution - y).square().mean()


class Equation(nn.Module):
    """A neural differential equation, integrated by the classical Runge-Kutta method."""

    def __init__(self, steps=3):
        super().__init__()
        self.steps, self.slope, self.out = (
            steps,
            nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
            nn.Linear(3, 2),
        )

    def field(self, time, x):
        return self.slope(torch.cat((x, torch.full_like(x[:, :1], time)), 1))

    def forward(self, x):
        h = 1.0 / self.steps
        for index in range(self.steps):
            time = index * h
            first = self.field(time, x)
            second = self.field(time + h / 2, x + h / 2 * first)
            third = self.field(time + h / 2, x + h / 2 * second)
            fourth = self.field(time + h, x + h * third)
            x = x + h / 6 * (first + 2 * second + 2 * third + fourth)
        return self.out(x)


# ---------------------------------------------------------------------- adapters and graphs


class Adapted(nn.Module):
    """A frozen layer with a trained correction of rank one."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 1, bias=False)
        self.up = nn.Linear(1, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + 0.5 * self.up(self.down(x))


def adapted():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    for index in (0, 2):
        model[index] = Adapted(model[index])
    return model


class GraphConvolution(nn.Module):
    """Sums over neighbours, weighted by their degrees and by attention."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.layer, self.attention = nn.Linear(inputs, outputs), nn.Linear(2 * outputs, 1)

    def forward(self, x, edges):
        source, target = edges
        h = self.layer(x)
        degrees = torch.zeros(len(x), dtype=x.dtype).scatter_add_(0, target, torch.ones(len(target), dtype=x.dtype))
        weights = self.attention(torch.cat((h[source], h[target]), 1)).squeeze(1).exp()
        total = torch.zeros(len(x), dtype=x.dtype).index_add_(0, target, weights).clamp(min=1e-9)
        messages = h[source] * (weights / total[target] / degrees[target].sqrt()).unsqueeze(1)
        return h + torch.zeros_like(h).index_add_(0, target, messages)


class GraphNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = GraphConvolution(3, 4), GraphConvolution(4, 2)

    def forward(self, graph):
        return self.second(torch.tanh(self.first(graph["x"], graph["edges"])), graph["edges"])


def graphs(steps):
    edges = torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 2, 4]])
    return [({"x": normal(5, 3, seed=t), "edges": edges, "weights": None}, torch.arange(5) % 2) for t in range(steps)]


class Routed(nn.Module):
    """A mixture of experts that all run, of which the router's best two count."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(3, 3), nn.ModuleList(nn.Linear(3, 2) for _ in range(3))

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(2)
        gates = (F.one_hot(chosen, 3) * (weights / weights.sum(-1, keepdim=True)).unsqueeze(-1)).sum(1)
        return (torch.stack([expert(x) for expert in self.experts], 1) * gates.unsqueeze(-1)).sum(1)


# ---------------------------------------------------------------------- tests


def own_value(model, batch):
    return model(batch)


def trained_only(params):
    return sgd([parameter for parameter in params if parameter.requires_grad])


TRAININGS = {
    "resnet": Training(resnet, sgd, cross_entropy, images(3)),
    "densenet": Training(densenet, adamw, cross_entropy, images(3)),
    "vgg": Training(vgg, sgd, cross_entropy, images(3)),
    "unet": Training(UNet, adamw, cross_entropy, segmentation(3)),
    "vision_transformer": Training(VisionTransformer, sgd, cross_entropy, images(3)),
    "excited": Training(Excited, adamw, cross_entropy, images(3)),
    "mixer": Training(Mixer, adamw, cross_entropy, images(3)),
    "language_model": Training(LanguageModel, sgd, own_loss, keywords(3)),
    "attending": Training(Attending, adamw, own_loss, keywords(3, masked=True)),
    "flow": Training(Flow, adamw, lambda model, x: -model(x).mean(), [normal(5, 4, seed=t) for t in range(3)]),
    "pretrained": Training(Pretrained, trained_only, own_loss, keywords(3)),
    "translating": Training(Translating, sgd, own_loss, keywords(3)),
    "packing": Training(lambda: Packing(nn.LSTM), sgd, squared_error, sequences(3)),
    "packing_gated": Training(lambda: Packing(nn.GRU), adamw, squared_error, sequences(3)),
    "invertible": Training(
        Invertible, sgd, lambda model, x: -model(x).mean(), [normal(5, 4, seed=t) for t in range(3)]
    ),
    "variational": Training(Variational, sgd, own_value, [normal(5, 4, seed=t) for t in range(3)]),
    "physics": Training(Physics, adamw, own_value, [normal(5, 1, seed=t) for t in range(3)]),
    "generating": Training(Generating, sgd, squared_error, regression(3)),
    "solving": Training(Solving, adamw, own_value, regression(3)),
    "equation": Training(Equation, sgd, squared_error, regression(3)),
    "adapted": Training(adapted, trained_only, squared_error, regression(3)),
    "graph": Training(GraphNetwork, sgd, cross_entropy, graphs(3)),
    "routed": Training(Routed, sgd, squared_error, regression(3)),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_values_equal_the_live_loop(name):
    check_values(TRAININGS[name])


@pytest.mark.parametrize("name", TRAININGS)
def test_gradients_equal_differences_of_the_live_loop(name):
    check_gradients(TRAININGS[name], HYPERS)
