"""Graph networks of torch_geometric: batches of features and edges, messages along the edges."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live_training import Training, check_gradients, check_values, normal, sgd
from torch import nn
from torch_geometric import nn as graph_nn
from torch_geometric.nn.pool.glob import global_mean_pool

HYPERS = ("groups.0.lr",)


class Network(nn.Module):
    """Two layers, and if asked a mean over the nodes of each graph."""

    first: Any
    second: Any

    def __init__(self, first, second, *, pooled=False):
        super().__init__()
        self.first, self.second, self.pooled = first, second, pooled

    def forward(self, x, edges, graph: Any = None) -> Any:
        x = self.second(torch.tanh(self.first(x, edges)), edges)
        return global_mean_pool(x, graph, 2) if self.pooled else x


def perceptron(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs))


def gcn():
    options = {"add_self_loops": False}
    return Network(graph_nn.GCNConv(3, 4, **options), graph_nn.GCNConv(4, 2, **options))


def gat():
    options = {"add_self_loops": False}
    return Network(graph_nn.GATConv(3, 2, heads=2, **options), graph_nn.GATConv(4, 2, **options))


def gin():
    return Network(graph_nn.GINConv(perceptron(3, 4)), graph_nn.GINConv(perceptron(4, 2), train_eps=True))


def sage():
    return Network(graph_nn.SAGEConv(3, 4), graph_nn.SAGEConv(4, 2))


def attending():
    return Network(graph_nn.TransformerConv(3, 4), graph_nn.TransformerConv(4, 2))


def pooled():
    return Network(graph_nn.GraphConv(3, 4), graph_nn.GraphConv(4, 2), pooled=True)


def graphs(steps, *, pooled):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "x": normal(6, 3, seed=t),
            "edges": torch.randint(0, 6, (2, 10), generator=generator),
            "graph": torch.tensor([0, 0, 0, 1, 1, 1]) if pooled else None,
            "labels": torch.arange(2 if pooled else 6) % 2,
        }
        for t in range(steps)
    ]


def classification(model, batch):
    return F.cross_entropy(model(batch["x"], batch["edges"], batch["graph"]), batch["labels"])


@pytest.mark.parametrize("make", [gcn, gat, gin, sage, attending, pooled])
def test_a_graph_network_trains_as_live_and_differentiates(make):
    training = Training(make, sgd, classification, graphs(3, pooled=make is pooled))
    check_gradients(training, HYPERS, fn=check_values(training))
