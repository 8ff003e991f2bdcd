"""Recurrent layers in elementary operators: those that are fused have no second derivative, packed or on accelerators.

The order of the operators is torch's own, so that values and draws are those of eager.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.nn import functional as F

Tensor = torch.Tensor
State = Sequence[Tensor]
Cell = Callable[[Tensor, State, "_Weights"], State]


@dataclass(frozen=True)
class _Weights:
    """The weights of one layer in one direction."""

    input: Tensor
    hidden: Tensor
    input_bias: Tensor | None = None
    hidden_bias: Tensor | None = None
    projection: Tensor | None = None

    def of_input(self, value: Tensor) -> Tensor:
        return F.linear(value, self.input, self.input_bias)

    def of_hidden(self, value: Tensor) -> Tensor:
        return F.linear(value, self.hidden, self.hidden_bias)


# ---------------------------------------------------------------------- one time step


def _lstm_step(gates: Tensor, state: State, weights: _Weights) -> State:
    hidden, cell = state
    keep_in, forget, new, out = (weights.of_hidden(hidden) + gates).chunk(4, 1)
    cell = forget.sigmoid() * cell + keep_in.sigmoid() * new.tanh()
    hidden = out.sigmoid() * cell.tanh()
    return (hidden if weights.projection is None else hidden @ weights.projection.t()), cell


def _gru_step(gates: Tensor, state: State, weights: _Weights) -> State:
    (hidden,) = state
    reset, update, new = gates.chunk(3, 1)
    hidden_reset, hidden_update, hidden_new = weights.of_hidden(hidden).chunk(3, 1)
    new = (new + hidden_new * (hidden_reset + reset).sigmoid()).tanh()
    return ((hidden - new) * (hidden_update + update).sigmoid() + new,)


def _simple_step(activation: Callable[[Tensor], Tensor]) -> Cell:
    return lambda gates, state, weights: (activation(weights.of_hidden(state[0]) + gates),)


# ---------------------------------------------------------------------- whole sequences


def _run_layer(cell: Cell, inputs: list[Tensor], state: State, weights: _Weights, reverse: bool) -> Any:
    """Runs over the time steps, whose sizes may fall from one to the next; returns outputs and the last state of each.

    A sequence that is shorter keeps its state: in reverse it starts with the state it was given.
    """
    order = range(len(inputs))
    outputs: list[Any] = [None] * len(inputs)
    first = inputs[-1 if reverse else 0].shape[0]
    now: State = tuple(part[:first] if len(part) > first else part for part in state)
    ended: list[State] = []
    for step in reversed(order) if reverse else order:
        count, running = inputs[step].shape[0], now[0].shape[0]
        if reverse and count > running:
            now = tuple(torch.cat([part, start[running:count]]) for part, start in zip(now, state, strict=True))
        if not reverse and count < running:
            ended.append(tuple(part[count:] for part in now))
            now = tuple(part[:count] for part in now)
        now = cell(inputs[step], now, weights)
        outputs[step] = now[0]
    parts = [now, *reversed(ended)]
    return outputs, (tuple(map(torch.cat, zip(*parts, strict=True))) if ended else now)


@dataclass(frozen=True)
class _Options:
    bias: bool
    layers: int
    dropout: float
    train: bool
    bidirectional: bool


def _run(cell: Cell, data: Tensor, sizes: list[int] | None, state: State, flat: Any, options: _Options) -> Any:
    """Runs all layers. `data` leads with time (and the batch), or is packed with the sizes of its time steps."""
    ways = 2 if options.bidirectional else 1
    weights = _grouped(list(flat), options, ways)
    last: list[State] = []
    for layer in range(options.layers):
        made = []
        for way in range(ways):
            index = layer * ways + way
            own = weights[index]
            gates = own.of_input(data)
            steps = list(gates.unbind(0) if sizes is None else gates.split(sizes))
            outputs, end = _run_layer(cell, steps, tuple(part[index] for part in state), own, way == 1)
            made.append(torch.stack(outputs) if sizes is None else torch.cat(outputs))
            last.append(end)
        data = torch.cat(made, -1) if ways == 2 else made[0]
        if options.dropout and options.train and layer < options.layers - 1:
            data = torch.dropout(data, options.dropout, True)
    return data, *(torch.stack(parts) for parts in zip(*last, strict=True))


def _grouped(flat: list[Tensor], options: _Options, ways: int) -> list[_Weights]:
    count = len(flat) // (options.layers * ways)
    made = []
    for start in range(0, len(flat), count):
        own = flat[start : start + count]
        bias = (own[2], own[3]) if options.bias else (None, None)
        made.append(_Weights(own[0], own[1], *bias, own[-1] if count % 2 else None))
    return made


def _layers(cell: Cell) -> Callable[..., Any]:
    """Returns `torch.lstm` and its kin: one form for padded inputs, one for packed ones."""

    def run(first: Tensor, second: Any, third: Any, fourth: Any, *rest: Any) -> Any:
        if isinstance(fourth, (list, tuple)):  # data, batch_sizes, hx, params, has_biases, ...
            bias, layers, dropout, train, bidirectional = rest
            options = _Options(bias, layers, dropout, train, bidirectional)
            return _run(cell, first, list(second.tolist()), _as_state(third), fourth, options)
        layers, dropout, train, bidirectional, batch_first = rest  # input, hx, params, has_biases, ...
        options = _Options(fourth, layers, dropout, train, bidirectional)
        data = first.transpose(0, 1) if batch_first else first
        out, *state = _run(cell, data, None, _as_state(second), third, options)
        return (out.transpose(0, 1) if batch_first else out), *state

    return run


def _as_state(state: Any) -> State:
    return (state,) if isinstance(state, Tensor) else tuple(state)


def _single(cell: Cell) -> Callable[..., Any]:
    """Returns `torch.lstm_cell` and its kin."""

    def run(value: Tensor, state: Any, *flat: Any) -> Any:
        weights = _Weights(*flat)
        made = cell(weights.of_input(value), _as_state(state), weights)
        return made if len(made) > 1 else made[0]

    return run


# ---------------------------------------------------------------------- packed sequences


def _pack(data: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """`torch._pack_padded_sequence`: the time steps one after the other, each with the sequences that reach it.

    What is read of lengths that are a tensor of the batch becomes a guard: other lengths are another program.
    """
    counts = list(lengths.tolist())
    sizes = [sum(count > step for count in counts) for step in range(max(counts))]
    places = [(step, row) for step, size in enumerate(sizes) for row in range(size)]
    steps, rows = (torch.tensor(part, device=data.device) for part in zip(*places, strict=True))
    return data[(rows, steps) if batch_first else (steps, rows)], torch.tensor(sizes)


def _pad(
    data: Tensor, batch_sizes: Tensor, batch_first: bool, padding: float, length: int = -1
) -> tuple[Tensor, Tensor]:
    """`torch._pad_packed_sequence`: looks every place up in the packed data, with the padding at its end."""
    sizes = list(batch_sizes.tolist())
    starts = [0, *accumulate(sizes)]
    total = max(length, len(sizes))
    sizes += [0] * (total - len(sizes))
    places = [
        [starts[step] + row if row < sizes[step] else starts[-1] for row in range(sizes[0])] for step in range(total)
    ]
    table = torch.cat([data, data.new_full((1, *data.shape[1:]), padding)])
    padded = table[torch.tensor(places, device=data.device)]
    lengths = torch.tensor([sum(size > row for size in sizes) for row in range(sizes[0])])
    return (padded.transpose(0, 1) if batch_first else padded), lengths


_VF: Any = torch
RECURRENT_FORMS: dict[Any, Callable[..., Any]] = {
    _VF.lstm: _layers(_lstm_step),
    _VF.gru: _layers(_gru_step),
    _VF.rnn_tanh: _layers(_simple_step(torch.tanh)),
    _VF.rnn_relu: _layers(_simple_step(torch.relu)),
    _VF.lstm_cell: _single(_lstm_step),
    _VF.gru_cell: _single(_gru_step),
    _VF.rnn_tanh_cell: _single(_simple_step(torch.tanh)),
    _VF.rnn_relu_cell: _single(_simple_step(torch.relu)),
    _VF._pack_padded_sequence: _pack,
    _VF._pad_packed_sequence: _pad,
}
