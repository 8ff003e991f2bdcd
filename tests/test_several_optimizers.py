"""Several optimizers in one train step: adversaries, actor and critic, teachers, turns."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from eager_reference import groups_of, projection
from live_training import (
    GRADIENTS,
    Training,
    assert_equal_tensors,
    check_gradients,
    check_recomputation_and_tasks,
    check_values,
    continue_live,
    copied,
    normal,
    run_steps,
    slope_error,
)
from torch import nn
from torch.utils import _pytree as pytree

import gimli_compile as gimli


def adam(params, **options):
    return torch.optim.Adam(params, eps=1e-2, **{"lr": 0.03, "betas": (0.7, 0.9), **options})


def sgd(params, lr=0.05):
    return torch.optim.SGD(params, lr=lr, momentum=0.8)


def pairs(steps, *, size=4):
    return [(normal(size, 2, seed=2 * t), normal(size, 3, seed=2 * t + 1)) for t in range(steps)]


# ---------------------------------------------------------------------- a generator and a discriminator


class Adversaries(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
        self.discriminator = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def of_both(params):
    params = list(params)
    return adam(params[:6]), adam(params[6:], lr=0.02)


def adversarial(model, optimizers, batch):
    """Two backward passes; the gradients of the second reach the discriminator as well and are left there."""
    noise, real = batch
    for_generator, for_discriminator = optimizers
    fake = model.generator(noise)
    for_discriminator.zero_grad()
    caught = F.softplus(model.discriminator(fake.detach())).mean() + F.softplus(-model.discriminator(real)).mean()
    caught.backward()
    for_discriminator.step()
    for_generator.zero_grad()
    passed = F.softplus(-model.discriminator(fake)).mean()
    passed.backward()
    for_generator.step()
    return passed + 0.5 * caught.detach()


# ---------------------------------------------------------------------- an actor and a critic


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.actor, self.critic = nn.Linear(2, 4), nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x):
        hidden = self.trunk(x).tanh()
        return self.actor(hidden).log_softmax(-1), self.critic(hidden)


def with_the_trunk_in_both(params):
    params = list(params)
    return {"actor": sgd(params[:4]), "critic": adam([*params[:2], *params[4:]])}


def joint_loss(model, batch):
    logits, value = model(batch[0])
    advantage = batch[1][:, :1] - value
    return (-logits[:, :1] * advantage.detach()).mean() + 0.5 * advantage.square().mean()


def jointly(model, optimizers, batch):
    for optimizer in optimizers.values():
        optimizer.zero_grad()
    loss = joint_loss(model, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    for optimizer in optimizers.values():
        optimizer.step()
    return loss


def smooth_loss(model, batch):
    logits, value = model(batch[0])
    return (-logits[:, :1] * value).mean() + 0.5 * (batch[1][:, :1] - value).square().mean()


def live_step_of_all(optimizers, evaluate):
    for optimizer in optimizers.values():
        optimizer.zero_grad()
    loss = evaluate()
    loss.backward()
    for optimizer in optimizers.values():
        optimizer.step()
    return loss


# ---------------------------------------------------------------------- taking turns


class Turns(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return self.second(self.first(x).tanh())


def of_first_and_second(params):
    params = list(params)
    return [sgd(params[:2]), adam(params[2:])]


def in_turns(model, optimizers, batch):
    """Every third step trains the other part."""
    first, second = optimizers
    turn = second if int(model.count) % 3 == 1 else first
    model.zero_grad()
    loss = F.mse_loss(model(batch[0]), batch[1])
    loss.backward()
    turn.step()
    model.count += 1
    return loss


CASES = {
    "adversaries": Training(Adversaries, of_both, None, pairs(3), train_step=adversarial),
    "joint": Training(ActorCritic, with_the_trunk_in_both, None, pairs(3), train_step=jointly),
    "joint, by the loss": Training(ActorCritic, with_the_trunk_in_both, smooth_loss, pairs(3), step=live_step_of_all),
    "turns": Training(Turns, of_first_and_second, None, pairs(5), train_step=in_turns),
}
LEARNED = {
    "adversaries": ["groups.0.lr", "groups.1.lr", "groups.1.betas.0"],
    "joint": ["groups.0.lr", "groups.0.momentum", "groups.1.lr", "groups.1.betas.1"],
    "joint, by the loss": ["groups.0.lr", "groups.1.lr"],
    "turns": ["groups.0.lr", "groups.1.lr"],
}


@pytest.mark.parametrize("name", CASES)
def test_values_equal_the_live_loop(name):
    check_values(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_finite_differences(name):
    check_gradients(CASES[name], LEARNED[name])


@pytest.mark.parametrize("name", ["adversaries", "turns"])
def test_a_loop_goes_on_in_the_middle_of_training_and_is_written_back(name):
    training = CASES[name]
    model, optimizers = training.start()
    continue_live(training, model, optimizers)
    fn = training.functionalize(model, optimizers)
    history = run_steps(training, fn, fn.init())
    state = fn.init()
    torch.manual_seed(training.seed)
    for batch in training.batches[:2]:
        state, _ = fn.step(state, batch)
    other, others = training.start()
    fn.load_into(other, others, state)
    for loaded, into in ((other, others), (model, optimizers)):
        fn.load_into(loaded, into, state)
        for t, batch in enumerate(training.batches[2:], 2):
            training.train_step(loaded, into, batch)
            assert_equal_tensors(copied(loaded.named_parameters()), history.params[t])


@pytest.mark.parametrize("name", ["adversaries", "turns"])
def test_tasks_and_recomputation(name):
    check_recomputation_and_tasks(CASES[name])


# ---------------------------------------------------------------------- places


def test_a_collection_of_models_and_of_optimizers():
    """The structures are what the train step gets; nothing else names them."""

    def make():
        torch.manual_seed(5)
        models = {"generator": nn.Linear(2, 3).double(), "discriminator": nn.Linear(3, 1).double()}
        return models, {"g": adam(models["generator"].parameters()), "d": sgd(models["discriminator"].parameters())}

    def step(models, optimizers, batch, meta):
        fake = models["generator"](batch[0])
        optimizers["d"].zero_grad()
        (meta * F.softplus(models["discriminator"](fake.detach()))).mean().backward()
        optimizers["d"].step()
        optimizers["g"].zero_grad()
        loss = F.softplus(-models["discriminator"](fake)).mean()
        loss.backward()
        optimizers["g"].step()
        return loss

    models, optimizers = make()
    fn = gimli.functionalize(models, optimizers, train_step=step)
    state, hyper, meta = fn.init(), fn.hyperparameters(), normal(4, 1).exp()
    for batch in pairs(3):
        state, _ = fn.step(state, batch, hyper, meta)
        step(models, optimizers, batch, meta)
    assert_equal_tensors(
        state.params,
        {f"{key}.{name}": p.detach() for key, model in models.items() for name, p in model.named_parameters()},
    )
    torch.testing.assert_close(
        state.opt_state["g.state.generator.weight.exp_avg"],
        optimizers["g"].state[models["generator"].weight]["exp_avg"],
        rtol=1e-12,
        atol=0,
    )


def test_groups_are_numbered_through_and_found_by_optimizer():
    def optimizers(params):
        params = list(params)
        return {"a": sgd([{"params": params[:2]}, {"params": params[2:4], "lr": 0.3}]), "b": adam(params[4:])}

    training = replace(CASES["joint"], optimizer=optimizers)
    model, live, fn = training.functionalized()
    hyper = fn.hyperparameters()
    assert [float(group["lr"]) for group in hyper] == [0.05, 0.3, 0.03]
    assert hyper["a"][1] is hyper[1]
    assert hyper["b"][0] is hyper[2]
    hyper["b"][0]["lr"] = torch.tensor(0.2, dtype=torch.float64)
    for group, changed in zip(groups_of(live), fn.hyperparameters(), strict=True):
        assert group["lr"] == float(changed["lr"])
    state, _ = fn.step(fn.init(), training.batches[0], hyper)
    live["b"].param_groups[0]["lr"] = 0.2
    jointly(model, live, training.batches[0])
    assert_equal_tensors(state.params, copied(model.named_parameters()))
    mapped = pytree.tree_map(lambda leaf: 2 * leaf, hyper)
    assert float(mapped["a"][1]["lr"]) == 0.6


def test_a_group_for_each_parameter():
    def optimizers(params):
        params = list(params)
        return sgd(params[:2]), adam(params[2:])

    model, live = replace(CASES["joint"], optimizer=optimizers).start()
    fn = gimli.functionalize(model, live, joint_loss, per_parameter=True)
    hyper = fn.hyperparameters()
    assert len(hyper["0"]) == 2
    assert len(hyper["1"]) == 4
    hyper["0"][0]["lr"] = hyper["0"][0]["lr"] * torch.ones_like(model.trunk.weight)
    state, _ = fn.step(fn.init(), pairs(1)[0], hyper)
    expected, _ = fn.step(fn.init(), pairs(1)[0])
    assert_equal_tensors(state.params, expected.params)


@pytest.mark.parametrize("are_stepped", [True, False])
def test_a_scheduler_of_one_of_them(are_stepped):
    """Stepped by the train step, or after all optimizers."""

    def make():
        model, optimizers = CASES["joint"].start()
        return model, optimizers, torch.optim.lr_scheduler.StepLR(optimizers["critic"], step_size=2, gamma=0.3)

    model, optimizers, scheduler = make()

    def step(model, optimizers, batch):
        loss = jointly(model, optimizers, batch)
        scheduler.step()
        return loss

    if are_stepped:
        fn = gimli.functionalize(model, optimizers, train_step=step, scheduler=scheduler)
    else:
        fn = gimli.functionalize(model, optimizers, smooth_loss, scheduler=scheduler)
    state, hyper = fn.init(), fn.hyperparameters()
    assert "groups.1.lr" in state.opt_state
    assert "lr" in hyper["actor"][0]
    assert "lr" not in hyper["critic"][0]
    gamma = hyper.attributes["scheduler.gamma"].requires_grad_()
    state, _ = fn.unroll(state, pairs(5), hyper)
    assert float(state.opt_state["groups.1.lr"].detach()) == pytest.approx(0.03 * 0.3**2, rel=1e-12)

    def trained(offset):
        model, optimizers, live = make()
        live.gamma += offset
        for batch in pairs(5):
            if are_stepped:
                jointly(model, optimizers, batch)
            else:
                live_step_of_all(optimizers, lambda batch=batch, model=model: smooth_loss(model, batch))
            live.step()
        return copied(model.named_parameters())

    assert_equal_tensors(state.params, trained(0.0))
    (slope,) = torch.autograd.grad(projection(state.params), gamma)
    assert slope_error(float(slope), lambda offset: float(projection(trained(offset)))) <= GRADIENTS


# ---------------------------------------------------------------------- what is refused


def test_collections_that_are_none_are_refused():
    model, optimizers = CASES["adversaries"].start()
    with pytest.raises(gimli.InputError, match="holds the same one twice"):
        gimli.functionalize(model, (optimizers[0], optimizers[0]), train_step=adversarial)
    with pytest.raises(gimli.InputError, match="is no optimizer"):
        gimli.functionalize(model, (optimizers[0], 0.1), train_step=adversarial)
    with pytest.raises(gimli.InputError, match="cannot be called 'state'"):
        gimli.functionalize(model, {"state": optimizers[0]}, train_step=adversarial)


def test_a_closure_for_one_of_several_is_refused_without_a_train_step():
    def optimizers(params):
        params = list(params)
        return torch.optim.LBFGS(params[:2]), adam(params[2:])

    model, live = replace(CASES["joint"], optimizer=optimizers).start()
    with pytest.raises(gimli.InputError, match=r"LBFGS, Adam steps with a closure[\s\S]*train_step"):
        gimli.functionalize(model, live, joint_loss)


def test_a_state_is_loaded_into_the_same_structure_only():
    model, optimizers, fn = CASES["joint"].functionalized()
    with pytest.raises(gimli.InputError, match="several in the same structure"):
        fn.load_into(model, tuple(optimizers.values()), fn.init())
    with pytest.raises(gimli.InputError, match="several in the same structure"):
        fn.load_into(model, optimizers["actor"], fn.init())


def test_another_method_of_all_of_them():
    class Averaging(torch.optim.SGD):
        def halve(self):
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.mul_(group["lr"])

    def optimizers(params):
        params = list(params)
        return Averaging(params[:2], lr=0.5), Averaging(params[2:4], lr=0.25), sgd(params[4:])

    training = replace(CASES["joint"], optimizer=optimizers)
    model, live, fn = training.functionalized()
    state = fn.call_optimizer("halve", fn.init())
    for one in live[:2]:
        one.halve()
    assert_equal_tensors(state.params, copied(model.named_parameters()))
    with pytest.raises(gimli.InputError, match="no method 'absent'"):
        fn.call_optimizer("absent", state)
