"""How to make and to train the optimizer classes that do not run from their parameters alone with a plain `step()`."""

import pytorch_optimizer as po
import torch

from gimli_compile.coverage import Recipe, default_loss

MATRICES = ((3, 2), (2, 4), (4,))


def muon_groups(params):
    return [
        {"params": [p for p in params if p.dim() > 1], "use_muon": True},
        {"params": [p for p in params if p.dim() == 1], "use_muon": False},
    ]


def wrapping(kind):
    """Makes an optimizer that wraps another."""
    return Recipe(make=lambda model: kind(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)))


def step_with_second_gradient(model, optimizer, batch, meta):
    """Steps as sharpness-aware optimizers want it: a gradient first, then a closure that makes it again elsewhere."""

    def evaluate():
        optimizer.zero_grad()
        loss = default_loss(model, batch)
        loss.backward()
        return loss

    loss = evaluate()
    optimizer.step(evaluate)
    return loss


def step_with_stored_closure(model, optimizer, batch, meta):
    optimizer.set_closure(lambda params, wanted: default_loss(model, wanted), (), batch)
    _, loss = optimizer.step()
    return loss


def step_on_two_objectives(model, optimizer, batch, meta):
    params = dict(model.named_parameters())
    nearness = torch.stack([((params[name] - wanted) ** 2).sum() for name, wanted in batch.items()]).sum()
    smallness = torch.stack([p.abs().sum() for p in params.values()]).sum()
    optimizer.zero_grad()
    optimizer.pc_backward([nearness, smallness])
    optimizer.step()
    return nearness


def step_in_the_backward_pass(model, optimizer, batch, meta):
    loss = default_loss(model, batch)
    optimizer.fused_backward(loss, 0.05)
    return loss


def step_with_scaled_loss(model, optimizer, batch, meta):
    optimizer.zero_grad()
    loss = default_loss(model, batch)
    optimizer.backward(loss)
    optimizer.step()
    return loss


def gradient_seeking_sam(model):
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = po.ProportionScheduler(torch.optim.lr_scheduler.StepLR(base, 100), max_lr=0.05, max_value=0.1)
    return po.GSAM(model.parameters(), base_optimizer=base, model=model, rho_scheduler=schedule)


def weighted_sam(model):
    return po.WSAM(model, model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)


def schedule_free(model):
    optimizer = po.ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    optimizer.train()
    return optimizer


def look_up_loss(model, batch):
    """Looks some rows up, one of them twice: the gradient is sparse, and has the other rows not at all."""
    rows = torch.tensor([0, 2, 2, 3])
    return ((model(rows) - batch["weight"][rows]) ** 2).sum()


SHARPNESS_AWARE = Recipe(
    arguments={"base_optimizer": torch.optim.SGD, "lr": 0.05, "momentum": 0.9}, train_step=step_with_second_gradient
)
MUON = Recipe(groups=muon_groups, shapes=MATRICES)

RECIPES = {
    "torch.optim.LBFGS": Recipe(arguments={"lr": 0.5, "max_iter": 4}),
    "torch.optim.SparseAdam": Recipe(model=lambda: torch.nn.Embedding(5, 3, sparse=True), loss=look_up_loss),
    **{
        f"pytorch_optimizer.{name}": MUON
        for name in ("AdaGO", "AdaMuon", "DistributedMuon", "Muon", "MuonClip", "NorMuon")
    },
    **{f"pytorch_optimizer.{name}": SHARPNESS_AWARE for name in ("SAM", "FriendlySAM", "LookSAM")},
    **{f"pytorch_optimizer.{kind.__name__}": wrapping(kind) for kind in (po.Lookahead, po.OrthoGrad, po.TRAC)},
    "pytorch_optimizer.AdaLOMO": Recipe(make=po.AdaLOMO, train_step=step_in_the_backward_pass),
    "pytorch_optimizer.AdamMini": Recipe(make=po.AdamMini),
    "pytorch_optimizer.BSAM": Recipe(arguments={"num_data": 10}, train_step=step_with_second_gradient),
    "pytorch_optimizer.GSAM": Recipe(make=gradient_seeking_sam, train_step=step_with_stored_closure),
    "pytorch_optimizer.LOMO": Recipe(make=po.LOMO, train_step=step_in_the_backward_pass),
    "pytorch_optimizer.LoRARite": Recipe(shapes=((2, 3), (4, 2))),
    "pytorch_optimizer.Magma": Recipe(
        make=lambda model: po.Magma(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), foreach=True)
    ),
    "pytorch_optimizer.PCGrad": Recipe(
        make=lambda model: po.PCGrad(torch.optim.SGD(model.parameters(), lr=0.05)), train_step=step_on_two_objectives
    ),
    "pytorch_optimizer.Ranger21": Recipe(arguments={"num_iterations": 100}),
    "pytorch_optimizer.SafeFP16Optimizer": Recipe(
        make=lambda model: po.SafeFP16Optimizer(torch.optim.SGD(model.parameters(), lr=0.05)),
        train_step=step_with_scaled_loss,
    ),
    "pytorch_optimizer.ScheduleFreeWrapper": Recipe(make=schedule_free),
    "pytorch_optimizer.SpectralSphere": Recipe(
        shapes=((3, 2),), steps=3
    ),  # a search of a hundred halvings in each step
    "pytorch_optimizer.WSAM": Recipe(make=weighted_sam, train_step=step_with_second_gradient),
}
