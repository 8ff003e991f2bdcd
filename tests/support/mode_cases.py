"""Training loops on which all exact ways through the backward pass are compared."""

import torch
import torch.nn.functional as F
from live_training import Training, adamw, images, normal, plain_sgd, regression, sgd, squared_error, tokens
from torch import nn


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def normalized():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 2))


def deep():
    """Enough layers for block recomputation to pay."""
    layers = [part for _ in range(8) for part in (nn.Linear(6, 6), nn.LayerNorm(6), nn.GELU(), nn.Dropout(0.1))]
    return nn.Sequential(nn.Linear(3, 6), *layers, nn.Linear(6, 2))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2, 2, 2),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        layers = [nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=True) for _ in range(2)]
        self.layers, self.out = nn.Sequential(*layers), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.layers(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent, self.out = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        return self.out(self.recurrent(x)[0][:, -1])


class Tied(nn.Module):
    """A language model whose output weights are those of the embedding, its hidden layer frozen."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(6, 3), nn.Linear(3, 3), nn.Linear(3, 6)
        self.head.weight = self.embedding.weight
        self.hidden.requires_grad_(False)

    def forward(self, sequence):
        return self.head(torch.tanh(self.hidden(self.embedding(sequence))))


class Averaging(nn.Module):
    """A buffer that carries gradients: a running mean of the hidden layer, which the next step subtracts."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(4))
        self.mean: torch.Tensor

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        out = self.second(hidden - self.mean)
        self.mean = 0.7 * self.mean + 0.3 * hidden.mean(0)
        return out


def sequences():
    return [(normal(3, 4, 4, seed=2 * t), normal(3, 2, seed=2 * t + 1)) for t in range(4)]


def cross_entropy(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def next_token(model, sequence):
    return F.cross_entropy(model(sequence)[:, :-1].flatten(0, 1), sequence[:, 1:].flatten())


def weighted(model, batch, meta):
    """A loss with learned weights of the examples and a learned penalty."""
    x, y = batch
    penalty = sum(p.pow(2).sum() for p in model.parameters())
    errors = ((model(x) - y) ** 2).mean(1)
    return (F.softmax(meta["weights"], 0) * errors).sum() + meta["penalty"].exp() * penalty


def stopped(model, batch, meta):
    """A loss of which one factor is taken as a constant."""
    x, y = batch
    out = model(x)
    return (meta["weights"] * ((out - y) ** 2).mean(1) * (meta["penalty"] * out.detach()).cos().mean(1)).sum()


META = {"weights": normal(5, seed=80), "penalty": torch.tensor(-4.0, dtype=torch.float64)}
CASES = {
    "mlp": Training(mlp, sgd, squared_error, regression(4)),
    "weighted": Training(normalized, sgd, weighted, regression(4), META),
    "stopped": Training(mlp, sgd, stopped, regression(4), META),
    "deep": Training(deep, sgd, weighted, regression(3), META),
    "convolutional": Training(convolutional, sgd, cross_entropy, images(3)),
    "transformer": Training(Transformer, sgd, squared_error, sequences()),
    "recurrent": Training(Recurrent, sgd, squared_error, sequences()),
    "tied": Training(Tied, sgd, next_token, tokens(4)),
    "averaging": Training(Averaging, sgd, squared_error, regression(4)),
}


def rmsprop(params):
    return torch.optim.RMSprop(params, lr=0.01, alpha=0.9, eps=1e-2, momentum=0.5, centered=True)


def adagrad(params):
    return torch.optim.Adagrad(params, lr=0.05, lr_decay=0.01, eps=1e-2)


def nadam(params):
    return torch.optim.NAdam(params, lr=0.02, betas=(0.8, 0.9), eps=1e-2, weight_decay=0.02)


OPTIMIZERS = {"plain": plain_sgd, "sgd": sgd, "adamw": adamw, "rmsprop": rmsprop, "adagrad": adagrad, "nadam": nadam}
EVERY = [(case, "sgd") for case in CASES] + [(case, "adamw") for case in CASES]
EVERY += [("mlp", optimizer) for optimizer in ("plain", "rmsprop", "adagrad", "nadam")]
