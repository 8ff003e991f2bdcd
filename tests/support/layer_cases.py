"""The layers of `torch.nn`, with typical options and tiny inputs away from their kinks."""

from __future__ import annotations

import torch
from layer_measurement import Case, plain_call
from live_training import normal
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import rnn

STEPS = 2


def batches(*shape, extra=lambda step: ()):
    """Returns the batches of normal numbers of a shape, each with what else the layer takes."""
    return [(normal(*shape, seed=10 * step), *extra(step)) for step in range(STEPS)]


def layer(make, *shape, **options):
    return Case(make, batches(*shape), **options)


def integers(high, *shape):
    generator = torch.Generator().manual_seed(4)
    return [(torch.randint(0, high, shape, generator=generator),) for _ in range(STEPS)]


ACTIVATIONS = {
    "ELU": nn.ELU, "Hardshrink": nn.Hardshrink, "Hardsigmoid": nn.Hardsigmoid, "Hardtanh": nn.Hardtanh,
    "Hardswish": nn.Hardswish, "LeakyReLU": nn.LeakyReLU, "LogSigmoid": nn.LogSigmoid, "PReLU": nn.PReLU,
    "PReLU(3)": lambda: nn.PReLU(3), "ReLU": nn.ReLU, "ReLU6": nn.ReLU6, "SELU": nn.SELU, "CELU": nn.CELU,
    "CELU(0.7)": lambda: nn.CELU(0.7), "ELU(0.7)": lambda: nn.ELU(0.7),
    "GELU": nn.GELU, "GELU(tanh)": lambda: nn.GELU("tanh"), "Sigmoid": nn.Sigmoid, "SiLU": nn.SiLU, "Mish": nn.Mish,
    "Softplus": nn.Softplus, "Softplus(2, 1)": lambda: nn.Softplus(2.0, 1.0), "Softshrink": nn.Softshrink,
    "Softsign": nn.Softsign, "Tanh": nn.Tanh, "Tanhshrink": nn.Tanhshrink, "Threshold": lambda: nn.Threshold(0.1, 2.0),
    "Softmin": lambda: nn.Softmin(-1), "Softmax": lambda: nn.Softmax(-1), "LogSoftmax": lambda: nn.LogSoftmax(-1),
    "Hardtanh(-0.3, 0.8)": lambda: nn.Hardtanh(-0.3, 0.8), "Identity": nn.Identity,
    "RReLU(eval)": lambda: nn.RReLU().eval(),
}  # fmt: skip
INPLACE = {
    f"{kind.__name__}(inplace)": lambda kind=kind: kind(inplace=True)
    for kind in (nn.ELU, nn.Hardsigmoid, nn.Hardswish, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Mish, nn.LeakyReLU, nn.Hardtanh)
}
LINEAR = {
    "Linear": layer(lambda: nn.Linear(3, 2), 4, 3),
    "Bilinear": Case(lambda: nn.Bilinear(3, 2, 2), batches(4, 3, extra=lambda t: (normal(4, 2, seed=t),))),
    "Flatten, Unflatten": layer(lambda: nn.Sequential(nn.Flatten(), nn.Unflatten(1, (3, 2))), 2, 2, 3),
    "GLU": layer(nn.GLU, 3, 4),
    "Softmax2d": layer(nn.Softmax2d, 2, 2, 2, 2),
    "CosineSimilarity": Case(nn.CosineSimilarity, batches(3, 4, extra=lambda t: (normal(3, 4, seed=t + 50),))),
    "PairwiseDistance": Case(nn.PairwiseDistance, batches(3, 4, extra=lambda t: (normal(3, 4, seed=t + 50),))),
    "PairwiseDistance(3)": Case(
        lambda: nn.PairwiseDistance(3.0), batches(3, 4, extra=lambda t: (normal(3, 4, seed=t + 50),))
    ),
    "PixelShuffle": layer(lambda: nn.PixelShuffle(2), 1, 4, 2, 2),
    "PixelUnshuffle": layer(lambda: nn.PixelUnshuffle(2), 1, 1, 4, 4),
    "ChannelShuffle": layer(lambda: nn.ChannelShuffle(2), 1, 4, 2, 2),
}

CONVOLUTIONS = {
    "Conv1d": layer(lambda: nn.Conv1d(2, 2, 3, padding=1, stride=2), 2, 2, 5),
    "Conv1d(circular)": layer(lambda: nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"), 2, 2, 5),
    "Conv1d(unbatched)": layer(lambda: nn.Conv1d(2, 2, 3), 2, 5),
    "Conv2d": layer(lambda: nn.Conv2d(2, 2, 3, padding=1), 2, 2, 4, 4),
    "Conv2d(groups, dilation)": layer(lambda: nn.Conv2d(2, 4, 2, groups=2, dilation=2, bias=False), 2, 2, 4, 4),
    "Conv2d(same, reflect)": layer(lambda: nn.Conv2d(1, 2, 3, padding="same", padding_mode="reflect"), 1, 1, 4, 4),
    "Conv3d": layer(lambda: nn.Conv3d(1, 2, 2), 1, 1, 3, 3, 3),
    "ConvTranspose1d": layer(lambda: nn.ConvTranspose1d(2, 2, 3, stride=2, output_padding=1), 2, 2, 4),
    "ConvTranspose2d": layer(lambda: nn.ConvTranspose2d(2, 2, 2, groups=2), 1, 2, 3, 3),
    "ConvTranspose3d": layer(lambda: nn.ConvTranspose3d(1, 2, 2), 1, 1, 2, 2, 2),
    "Unfold": layer(lambda: nn.Unfold(2, padding=1), 1, 2, 3, 3),
    "Fold": layer(lambda: nn.Fold((3, 3), 2), 1, 4, 4),
}


def unpooled(pool, unpool):
    """Pools, then puts the values back where they came from."""
    return lambda _, x: (lambda made: unpool(*made))(pool(x))


def fractional(kind, samples, *options):
    """A fractional pool whose random places are given."""
    return lambda: kind(*options, _random_samples=torch.tensor(samples, dtype=torch.float64))


POOLS = {
    "MaxPool1d": layer(lambda: nn.MaxPool1d(2), 2, 2, 4),
    "MaxPool1d(padding)": layer(lambda: nn.MaxPool1d(3, stride=2, padding=1, ceil_mode=True), 2, 2, 6),
    "MaxPool2d": layer(lambda: nn.MaxPool2d(2), 2, 2, 4, 4),
    "MaxPool2d(overlapping)": layer(lambda: nn.MaxPool2d(3, 1, padding=1), 1, 2, 4, 4),
    "MaxPool2d(dilation, indices)": layer(lambda: nn.MaxPool2d(2, 1, dilation=2, return_indices=True), 1, 2, 4, 4),
    "MaxPool3d": layer(lambda: nn.MaxPool3d(2), 1, 1, 4, 4, 2),
    "MaxUnpool1d": layer(nn.Identity, 1, 2, 4, call=unpooled(nn.MaxPool1d(2, return_indices=True), nn.MaxUnpool1d(2))),
    "MaxUnpool2d": layer(
        nn.Identity, 1, 1, 4, 4, call=unpooled(nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2))
    ),
    "MaxUnpool3d": layer(
        nn.Identity, 1, 1, 2, 4, 2, call=unpooled(nn.MaxPool3d(2, return_indices=True), nn.MaxUnpool3d(2))
    ),
    "AvgPool1d": layer(lambda: nn.AvgPool1d(2), 2, 2, 4),
    "AvgPool2d": layer(lambda: nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), 1, 2, 4, 4),
    "AvgPool3d": layer(lambda: nn.AvgPool3d(2), 1, 1, 4, 2, 2),
    "FractionalMaxPool2d": layer(fractional(nn.FractionalMaxPool2d, [[[0.3, 0.6]]], 2, 3), 1, 1, 5, 5),
    "FractionalMaxPool3d": layer(fractional(nn.FractionalMaxPool3d, [[[0.3, 0.6, 0.4]]], 2, 2), 1, 1, 4, 4, 4),
    "LPPool1d": layer(lambda: nn.LPPool1d(2, 2), 1, 2, 4, change=torch.exp),
    "LPPool2d": layer(lambda: nn.LPPool2d(3, 2), 1, 2, 4, 4, change=torch.exp),
    "LPPool3d": layer(lambda: nn.LPPool3d(2, 2), 1, 1, 2, 2, 4, change=torch.exp),
    "AdaptiveMaxPool1d": layer(lambda: nn.AdaptiveMaxPool1d(2), 1, 2, 5),
    "AdaptiveMaxPool2d": layer(lambda: nn.AdaptiveMaxPool2d((2, None)), 1, 1, 5, 3),
    "AdaptiveMaxPool3d": layer(lambda: nn.AdaptiveMaxPool3d(2), 1, 1, 3, 3, 2),
    "AdaptiveAvgPool1d": layer(lambda: nn.AdaptiveAvgPool1d(2), 1, 2, 5),
    "AdaptiveAvgPool2d": layer(lambda: nn.AdaptiveAvgPool2d((2, None)), 1, 1, 5, 3),
    "AdaptiveAvgPool2d(1)": layer(lambda: nn.AdaptiveAvgPool2d(1), 1, 2, 3, 3),
    "AdaptiveAvgPool3d": layer(lambda: nn.AdaptiveAvgPool3d(2), 1, 1, 3, 3, 2),
}
PADDINGS = {
    f"{kind}Pad{rank}d": layer(lambda kind=kind, rank=rank: getattr(nn, f"{kind}Pad{rank}d")(1), 1, 2, *[3] * rank)
    for kind in ("Reflection", "Replication", "Zero", "Circular")
    for rank in (1, 2, 3)
} | {"ConstantPad2d": layer(lambda: nn.ConstantPad2d((1, 0, -1, 2), 0.7), 1, 1, 3, 3)}
UPSAMPLES = {
    "Upsample(nearest, 1d)": layer(lambda: nn.Upsample(scale_factor=2), 1, 2, 3),
    "Upsample(nearest)": layer(lambda: nn.Upsample(size=(3, 5)), 1, 1, 2, 3),
    "Upsample(nearest-exact)": layer(lambda: nn.Upsample(size=(3, 5), mode="nearest-exact"), 1, 1, 2, 3),
    "Upsample(nearest, 3d)": layer(lambda: nn.Upsample(scale_factor=2), 1, 1, 2, 2, 2),
    "Upsample(linear)": layer(lambda: nn.Upsample(scale_factor=2, mode="linear"), 1, 2, 3),
    "Upsample(bilinear)": layer(lambda: nn.Upsample(size=(3, 5), mode="bilinear", align_corners=True), 1, 1, 2, 3),
    "Upsample(bicubic)": layer(lambda: nn.Upsample(scale_factor=2, mode="bicubic"), 1, 1, 3, 3),
    "Upsample(trilinear)": layer(lambda: nn.Upsample(scale_factor=2, mode="trilinear"), 1, 1, 2, 2, 2),
    "interpolate(antialias)": layer(
        nn.Identity, 1, 1, 4, 4,
        call=lambda _, x: F.interpolate(x, size=(2, 3), mode="bilinear", antialias=True),
    ),
    "interpolate(area)": layer(nn.Identity, 1, 1, 4, 4, call=lambda _, x: F.interpolate(x, size=(2, 2), mode="area")),
}  # fmt: skip
NORMS = {
    "BatchNorm1d": layer(lambda: nn.BatchNorm1d(3), 4, 3),
    "BatchNorm1d(cumulative)": layer(lambda: nn.BatchNorm1d(2, momentum=None), 4, 2, 3),
    "BatchNorm2d": layer(lambda: nn.BatchNorm2d(2), 2, 2, 2, 3),
    "BatchNorm2d(not affine)": layer(lambda: nn.BatchNorm2d(2, affine=False), 2, 2, 2, 3),
    "BatchNorm2d(no statistics)": layer(lambda: nn.BatchNorm2d(2, track_running_stats=False), 2, 2, 2, 3),
    "BatchNorm2d(eval)": layer(lambda: nn.BatchNorm2d(2).eval(), 2, 2, 2, 3),
    "BatchNorm3d": layer(lambda: nn.BatchNorm3d(2), 2, 2, 2, 2, 1),
    "GroupNorm": layer(lambda: nn.GroupNorm(2, 4), 2, 4, 3),
    "GroupNorm(not affine)": layer(lambda: nn.GroupNorm(1, 2, affine=False), 2, 2, 2, 2),
    "InstanceNorm1d": layer(lambda: nn.InstanceNorm1d(2), 2, 2, 4),
    "InstanceNorm2d": layer(lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True), 2, 2, 3, 2),
    "InstanceNorm2d(eval)": layer(lambda: nn.InstanceNorm2d(2, track_running_stats=True).eval(), 2, 2, 3, 2),
    "InstanceNorm3d": layer(lambda: nn.InstanceNorm3d(2, affine=True), 1, 2, 2, 2, 2),
    "LayerNorm": layer(lambda: nn.LayerNorm(4), 3, 4),
    "LayerNorm(two dimensions)": layer(lambda: nn.LayerNorm([2, 3], bias=False), 2, 2, 3),
    "LayerNorm(not affine)": layer(lambda: nn.LayerNorm(4, elementwise_affine=False), 3, 4),
    "LocalResponseNorm": layer(lambda: nn.LocalResponseNorm(2, alpha=0.3), 2, 3, 2),
    "RMSNorm": layer(lambda: nn.RMSNorm(4), 3, 4),
    "RMSNorm(eps)": layer(lambda: nn.RMSNorm([2, 3], eps=1e-3, elementwise_affine=False), 2, 2, 3),
}


def recurrent(kind, *shape, **options):
    return layer(lambda: kind(2, 3, **options), *(shape or (3, 2, 2)))


def with_state(kind, states):
    """A recurrent layer that starts from a given state."""
    return Case(
        lambda: kind(2, 3),
        batches(3, 2, 2, extra=lambda t: tuple(normal(1, 2, 3, seed=t + s) for s in range(states))),
        call=lambda net, x, *state: net(x, state if states == 2 else state[0]),
    )


def packed(kind, **options):
    """A recurrent layer on sequences of several lengths."""

    def call(net, x):
        sequences = rnn.pack_padded_sequence(x, [3, 1], batch_first=True)
        out, state = net(sequences)
        return rnn.pad_packed_sequence(out, batch_first=True)[0], state

    return layer(lambda: kind(2, 3, batch_first=True, **options), 2, 3, 2, call=call)


def unsorted(net, x):
    sequences = rnn.pack_padded_sequence(x, torch.tensor([1, 3]), batch_first=True, enforce_sorted=False)
    out, state = net(sequences)
    return rnn.pad_packed_sequence(out, batch_first=True)[0], state


def repadded(net, x):
    """Pads to more time steps than there are, with a number."""
    out, _ = net(rnn.pack_padded_sequence(x, [3, 1], batch_first=True))
    return rnn.pad_packed_sequence(out, batch_first=True, padding_value=0.5, total_length=4)


KINDS = {"RNN": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU}
RECURRENT = {
    **{name: recurrent(kind) for name, kind in KINDS.items()},
    **{f"{n}(bidirectional, 2 layers)": recurrent(k, bidirectional=True, num_layers=2) for n, k in KINDS.items()},
    **{f"{n}(batch first, no bias)": recurrent(k, 2, 3, 2, batch_first=True, bias=False) for n, k in KINDS.items()},
    **{f"{n}(unbatched)": recurrent(k, 3, 2) for n, k in KINDS.items()},
    **{f"{n}(packed)": packed(k, bidirectional=True) for n, k in KINDS.items()},
    **{f"{n}(given state)": with_state(k, 2 if k is nn.LSTM else 1) for n, k in KINDS.items()},
    "RNN(relu)": recurrent(nn.RNN, nonlinearity="relu"),
    "LSTM(projected)": recurrent(nn.LSTM, proj_size=2),
    "LSTM(packed, unsorted)": layer(lambda: nn.LSTM(2, 3, batch_first=True), 2, 3, 2, call=unsorted),
    "GRU(dropout)": Case(lambda: nn.GRU(2, 3, num_layers=2, dropout=0.4), batches(3, 2, 2), draws=True),
    "RNNCell": layer(lambda: nn.RNNCell(2, 3), 2, 2),
    "LSTMCell": layer(lambda: nn.LSTMCell(2, 3), 2, 2),
    "GRUCell": layer(lambda: nn.GRUCell(2, 3), 2, 2),
}


def attended(net, x):
    return net(x, x, x)


def masked(net, x):
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return net(x, x, x, attn_mask=mask, need_weights=False, is_causal=True)


def padded(net, x):
    ignored = torch.zeros(x.shape[:2], dtype=torch.bool)
    ignored[0, -1] = True
    return net(x, x, x, key_padding_mask=ignored, average_attn_weights=False)


def attention(call=attended, **options):
    return layer(lambda: nn.MultiheadAttention(4, 2, batch_first=True, **options), 2, 3, 4, call=call)


def dot_product(**options):
    def call(_, x):
        return F.scaled_dot_product_attention(x, x.sin(), x.cos(), **options)

    return call


ATTENTION = {
    "MultiheadAttention": attention(),
    "MultiheadAttention(causal)": attention(masked),
    "MultiheadAttention(padded)": attention(padded),
    "MultiheadAttention(no weights)": attention(lambda net, x: net(x, x, x, need_weights=False)[0]),
    "MultiheadAttention(kdim, zero, bias)": layer(
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=3, add_bias_kv=True, add_zero_attn=True),
        3, 2, 4,
        call=lambda net, x: net(x, x[..., :3], x[..., 1:]),
    ),
    "scaled_dot_product_attention": layer(nn.Identity, 2, 2, 3, 2, call=dot_product()),
    "scaled_dot_product_attention(causal)": layer(nn.Identity, 2, 2, 3, 2, call=dot_product(is_causal=True, scale=0.3)),
    "scaled_dot_product_attention(mask)": layer(
        nn.Identity, 2, 2, 3, 2, call=dot_product(attn_mask=torch.tensor([[0.1, 0, 2], [0.3, 1, 0], [0.0, 0, 0.7]]).double())
    ),
    "TransformerEncoderLayer": layer(
        lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True), 2, 3, 4
    ),
    "TransformerEncoder": layer(
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 3, dropout=0.0, activation="gelu", norm_first=True), 1,
            enable_nested_tensor=False,
        ),
        3, 2, 4,
    ),
    "TransformerDecoderLayer": Case(
        lambda: nn.TransformerDecoderLayer(4, 2, 3, dropout=0.0), batches(2, 2, 4, extra=lambda t: (normal(3, 2, 4),))
    ),
    "Transformer": Case(
        lambda: nn.Transformer(4, 2, 1, 1, 3, dropout=0.0, batch_first=True),
        batches(2, 3, 4, extra=lambda t: (normal(2, 2, 4),)),
    ),
}  # fmt: skip

DROPOUTS = {
    "Dropout": layer(lambda: nn.Dropout(0.4), 3, 4, draws=True),
    "Dropout1d": layer(lambda: nn.Dropout1d(0.4), 2, 3, 2, draws=True),
    "Dropout2d": layer(lambda: nn.Dropout2d(0.4), 2, 3, 2, 1, draws=True),
    "Dropout3d": layer(lambda: nn.Dropout3d(0.4), 2, 3, 2, 1, 1, draws=True),
    "AlphaDropout": layer(lambda: nn.AlphaDropout(0.4), 3, 4, draws=True),
    "FeatureAlphaDropout": layer(lambda: nn.FeatureAlphaDropout(0.4), 2, 3, 2, draws=True),
    "RReLU": layer(nn.RReLU, 3, 4, refused="draws from a distribution that depends on tensor values"),
}


def bag(**options):
    places = torch.tensor([0, 2])
    return Case(
        lambda: nn.EmbeddingBag(6, 3, **options), integers(6, 5), call=lambda net, indices: net(indices, places)
    )


EMBEDDINGS = {
    "Embedding": Case(lambda: nn.Embedding(6, 3), integers(6, 2, 3)),
    "Embedding(padding)": Case(
        lambda: nn.Embedding(6, 3, padding_idx=0),
        integers(6, 2, 3),
        call=lambda net, indices: net(indices) * (indices != 0).unsqueeze(-1),
    ),
    "Embedding(max norm)": Case(
        lambda: nn.Embedding(6, 3, max_norm=1.0),
        integers(6, 2, 3),
        refused="changes its parameter 'layer.weight' in place",
    ),
    "Embedding(scaled by frequency)": Case(lambda: nn.Embedding(6, 3, scale_grad_by_freq=True), integers(6, 2, 3)),
    "EmbeddingBag(sum)": bag(mode="sum"),
    "EmbeddingBag(mean)": bag(mode="mean"),
    "EmbeddingBag(max)": bag(mode="max"),
    "EmbeddingBag(padding)": bag(mode="max", padding_idx=2),
    "EmbeddingBag(scaled by frequency)": bag(mode="mean", scale_grad_by_freq=True),
    "EmbeddingBag(sum, matrix)": Case(lambda: nn.EmbeddingBag(6, 3, mode="sum"), integers(6, 2, 3)),
}
SIGNED = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
CLASSES = torch.tensor([2, 0, 1, 2])


def with_signs(loss, x, *rest):
    """Calls a loss whose last argument is a sign for each sample."""
    return loss(x, *rest, SIGNED)


def target(make, function=lambda y: y, *, shape=(4, 3), given=None, change=lambda x: x, call=plain_call, refused=""):
    """A loss whose target is what a function makes of a normal tensor, or is given."""

    def extra(step):
        return (function(normal(*shape, seed=step + 70)),) if given is None else given

    return Case(make, batches(*shape, extra=extra), change=change, call=call, refused=refused)


def probabilities(y):
    return torch.softmax(y, -1)


LOSSES = {
    "L1Loss": target(nn.L1Loss),
    "MSELoss": target(nn.MSELoss),
    "MSELoss(sum)": target(lambda: nn.MSELoss(reduction="sum")),
    "MSELoss(none)": target(lambda: nn.MSELoss(reduction="none")),
    "SmoothL1Loss": target(nn.SmoothL1Loss),
    "SmoothL1Loss(0.3, sum)": target(lambda: nn.SmoothL1Loss(beta=0.3, reduction="sum")),
    "SmoothL1Loss(0)": target(lambda: nn.SmoothL1Loss(beta=0.0)),
    "HuberLoss": target(nn.HuberLoss),
    "HuberLoss(0.6, none)": target(lambda: nn.HuberLoss(delta=0.6, reduction="none")),
    "CrossEntropyLoss": target(nn.CrossEntropyLoss, given=(CLASSES,)),
    "CrossEntropyLoss(weight, smoothing)": target(
        lambda: nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0]), ignore_index=1, label_smoothing=0.1),
        given=(CLASSES,),
    ),
    "CrossEntropyLoss(probabilities)": target(nn.CrossEntropyLoss, probabilities),
    "CrossEntropyLoss(2d)": target(nn.CrossEntropyLoss, shape=(2, 3, 2), given=(CLASSES.reshape(2, 2),)),
    "NLLLoss": target(nn.NLLLoss, given=(CLASSES,), change=lambda x: F.log_softmax(x, -1)),
    "NLLLoss(2d)": target(
        lambda: nn.NLLLoss(torch.tensor([0.5, 1.0, 2.0])), shape=(2, 3, 2), given=(CLASSES.reshape(2, 2),)
    ),
    "NLLLoss(3d)": target(nn.NLLLoss, shape=(1, 3, 2, 2), given=(CLASSES.reshape(1, 2, 2),)),
    "PoissonNLLLoss": target(nn.PoissonNLLLoss, torch.exp),
    "PoissonNLLLoss(full)": target(lambda: nn.PoissonNLLLoss(log_input=False, full=True), torch.exp, change=torch.exp),
    "GaussianNLLLoss": Case(
        nn.GaussianNLLLoss,
        batches(4, 3, extra=lambda t: (normal(4, 3, seed=t + 70),)),
        call=lambda loss, x, y: loss(x, y, x.exp()),
    ),
    "KLDivLoss": target(lambda: nn.KLDivLoss(reduction="sum"), probabilities, change=lambda x: F.log_softmax(x, -1)),
    "KLDivLoss(log target)": target(
        lambda: nn.KLDivLoss(reduction="batchmean", log_target=True),
        lambda y: F.log_softmax(y, -1),
        change=lambda x: F.log_softmax(x, -1),
    ),
    "BCELoss": target(nn.BCELoss, torch.sigmoid, change=torch.sigmoid),
    "BCELoss(weight)": target(lambda: nn.BCELoss(torch.tensor([0.5, 1.0, 2.0])), torch.sigmoid, change=torch.sigmoid),
    "BCEWithLogitsLoss": target(nn.BCEWithLogitsLoss, torch.sigmoid),
    "BCEWithLogitsLoss(weights)": target(
        lambda: nn.BCEWithLogitsLoss(torch.tensor([0.5, 1.0, 2.0]), pos_weight=torch.tensor([2.0, 1.0, 0.5])),
        torch.sigmoid,
    ),
    "MarginRankingLoss": target(
        lambda: nn.MarginRankingLoss(0.1), shape=(4,), given=(normal(4, seed=90),), call=with_signs
    ),
    "HingeEmbeddingLoss": target(lambda: nn.HingeEmbeddingLoss(0.9), shape=(4,), given=(), call=with_signs),
    "MultiLabelMarginLoss": target(
        nn.MultiLabelMarginLoss, given=(torch.tensor([[2, 0, -1], [1, -1, 0], [0, 1, -1], [2, -1, -1]]),)
    ),
    "SoftMarginLoss": target(nn.SoftMarginLoss, shape=(4,), given=(), call=with_signs),
    "MultiLabelSoftMarginLoss": target(
        nn.MultiLabelSoftMarginLoss, given=(torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 0]]).double(),)
    ),
    "CosineEmbeddingLoss": target(lambda: nn.CosineEmbeddingLoss(0.1), given=(normal(4, 3, seed=91),), call=with_signs),
    "MultiMarginLoss": target(nn.MultiMarginLoss, given=(CLASSES,)),
    "MultiMarginLoss(p=2, weight)": target(
        lambda: nn.MultiMarginLoss(p=2, margin=0.7, weight=torch.tensor([0.5, 1.0, 2.0]), reduction="sum"),
        given=(CLASSES,),
    ),
    "MultiMarginLoss(one sample)": target(nn.MultiMarginLoss, shape=(3,), given=(torch.tensor(1),)),
    "TripletMarginLoss": target(nn.TripletMarginLoss, given=(normal(4, 3, seed=92), normal(4, 3, seed=93))),
    "TripletMarginLoss(swap)": target(
        lambda: nn.TripletMarginLoss(p=3, swap=True), given=(normal(4, 3, seed=92), normal(4, 3, seed=93))
    ),
    "TripletMarginWithDistanceLoss": target(
        lambda: nn.TripletMarginWithDistanceLoss(distance_function=nn.CosineSimilarity()),
        given=(normal(4, 3, seed=92), normal(4, 3, seed=93)),
    ),
    "AdaptiveLogSoftmaxWithLoss": Case(
        lambda: nn.AdaptiveLogSoftmaxWithLoss(3, 5, [2], div_value=1.0),
        batches(4, 3, extra=lambda t: (torch.tensor([0, 3, 1, 4]),)),
    ),
    "CTCLoss": target(
        nn.CTCLoss, shape=(4, 2, 3), change=lambda x: F.log_softmax(x, -1),
        given=(torch.tensor([[1, 2], [2, 1]]), torch.tensor([4, 4]), torch.tensor([2, 2])),
        refused="`ctc_loss` has no second derivative",
    ),
}  # fmt: skip


def sampled(**options):
    def call(_, x):
        angle = x.mean() * 0.3
        rows = torch.stack(
            [torch.stack([angle.cos(), -angle.sin(), angle]), torch.stack([angle.sin(), angle.cos(), -angle])]
        )
        grid = F.affine_grid(rows[None], [1, 1, 3, 3], align_corners=False)
        return F.grid_sample(
            x,
            grid * 0.81,
            align_corners=options.get("align_corners", False),
            **{key: value for key, value in options.items() if key != "align_corners"},
        )

    return layer(nn.Identity, 1, 2, 4, 4, call=call)


def sampled_volume(_, x):
    grid = torch.tanh(x[:, :3].permute(0, 2, 3, 4, 1))
    return F.grid_sample(x, grid, align_corners=False)


def norms_of(make):
    return layer(lambda: nn.Sequential(make(nn.Linear(3, 4)), nn.Tanh()), 4, 3)


FUNCTIONS = {
    "grid_sample(bilinear)": sampled(),
    "grid_sample(bicubic)": sampled(mode="bicubic"),
    "grid_sample(nearest)": sampled(mode="nearest"),
    "grid_sample(border, aligned)": sampled(padding_mode="border", align_corners=True),
    "grid_sample(reflection)": sampled(padding_mode="reflection"),
    "grid_sample(3d)": layer(nn.Identity, 1, 3, 2, 2, 2, call=sampled_volume),
    "cdist": layer(nn.Identity, 3, 2, call=lambda _, x: torch.cdist(x, x.sin() + 1)),
    "cdist(of itself)": layer(nn.Identity, 3, 2, call=lambda _, x: torch.cdist(x, x)),
    "cdist(p=1)": layer(nn.Identity, 3, 2, call=lambda _, x: torch.cdist(x, x.sin() + 1, p=1.0)),
    "pdist": layer(nn.Identity, 3, 2, call=lambda _, x: F.pdist(x)),
    "pad_sequence": layer(nn.Identity, 5, 2, call=lambda _, x: rnn.pad_sequence([x[:3], x[3:]], padding_value=0.5)),
    "pack_sequence": layer(lambda: nn.GRU(2, 3), 5, 2, call=lambda net, x: net(rnn.pack_sequence([x[:3], x[3:]]))[1]),
    "pad_packed_sequence(longer)": layer(lambda: nn.GRU(2, 3, batch_first=True), 2, 3, 2, call=repadded),
    "rfft": layer(nn.Identity, 3, 4, call=lambda _, x: torch.fft.rfft(x).abs()),
    "embedding(scaled, padding)": Case(
        lambda: nn.Embedding(6, 3, padding_idx=2, scale_grad_by_freq=True),
        integers(6, 2, 3),
        call=lambda net, indices: net(indices) * (indices != 2).unsqueeze(-1),
    ),
    "dropout attention": Case(
        lambda: nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True), batches(2, 3, 4), call=attended, draws=True
    ),
    "grouped-query attention": layer(
        nn.Identity,
        1,
        4,
        3,
        2,
        call=lambda _, x: F.scaled_dot_product_attention(x, x[:, :2].sin(), x[:, :2].cos(), enable_gqa=True),
    ),
    "normalize": layer(nn.Identity, 3, 2, call=lambda _, x: F.normalize(x)),
    "weight_norm (parametrization)": norms_of(nn.utils.parametrizations.weight_norm),
    "orthogonal (parametrization)": norms_of(
        lambda net: nn.utils.parametrizations.orthogonal(net, orthogonal_map="cayley")
    ),
    "gumbel_softmax": layer(nn.Identity, 3, 4, call=lambda _, x: F.gumbel_softmax(x), draws=True),
    "logsumexp": layer(nn.Identity, 3, 4, call=lambda _, x: torch.logsumexp(x, -1)),
    "layer_norm": layer(nn.Identity, 3, 4, call=lambda _, x: F.layer_norm(x, (4,))),
    "rrelu(given bounds, eval)": layer(nn.Identity, 3, 4, call=lambda _, x: F.rrelu(x, 0.1, 0.3)),
}

CASES = {
    **{name: layer(make, 4, 3) for name, make in (ACTIVATIONS | INPLACE).items()},
    **LINEAR, **CONVOLUTIONS, **POOLS, **PADDINGS, **UPSAMPLES, **NORMS, **RECURRENT, **ATTENTION, **DROPOUTS,
    **EMBEDDINGS, **LOSSES, **FUNCTIONS,
}  # fmt: skip
