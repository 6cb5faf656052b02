"""A training program that checkpoints, resumes and is killed: every score follows from its step alone."""

import os
import resource
import time
import warnings
from pathlib import Path

import torch
from torch import nn

import adam_ghost as ag

SAMPLES, BATCH, CHECKPOINT = 60, 6, 25


def batch_of(step):
    return torch.randint(0, SAMPLES, (BATCH,), generator=torch.Generator().manual_seed(step))


def train(folder, steps, made=None):
    """Trains up to ``steps``, from the checkpoint in ``folder`` if one is there; counts the steps in ``made``, a shared value."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = Path(folder)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(SAMPLES, 3, 4)  # of three tokens each
    y = x.sum(-1, keepdim=True).sin()
    saved = folder / "checkpoint.pt"
    writer = ag.LedgerWriter(folder / "ledger", flush_seconds=0.03, restart=not saved.exists())
    run = ag.InRun(model, optimizer, lambda: (model(x[:8]) - y[:8]).square().mean(), ledger=writer, tokens=2)
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        run.load_state_dict(state["run"])
    while run.step < steps:
        ids = batch_of(run.step)
        run.batch(ids)
        (model(x[ids]) - y[ids]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if made is not None:
            made.value += 1
        if run.step % CHECKPOINT == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "run": run.state_dict()}
            torch.save(state, folder / "making.pt")
            os.replace(folder / "making.pt", saved)
    run.close()
    (folder / "done").write_text("")


def warm_up():
    """Imports what the first step would; called before the fork. No backward pass: autograd's threads do not survive one."""
    from adam_ghost.ledger import writer  # noqa: F401

    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.ones(3)
    torch.optim.AdamW([weight]).step()
    model = nn.Linear(3, 1)
    ag.InRun(model, torch.optim.AdamW(model.parameters()), lambda: model(torch.zeros(1, 3))).close()
    torch.func.functional_call(model, dict(model.named_parameters()), torch.zeros(1, 3)).square().mean()


if os.environ.get("ADAM_GHOST_TESTS_WARM_UP"):
    warm_up()


def hold(folder, ready):
    writer = ag.LedgerWriter(folder)
    ready.set()
    time.sleep(60)
    writer.close()


def fill_the_disk(folder, on_error, answer):
    """Writes under a limit on the size of files, which a part soon meets, as on a full disk."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters())
    run = ag.InRun(model, optimizer, lambda: model(torch.ones(2, 3)).sum(), ledger=ag.LedgerWriter(folder, on_error=on_error))
    said, trained, raised = [], 0, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for step in range(60):
                if step == 20:
                    run.ledger.flush()
                    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
                run.batch([f"{step}-{i}" for i in range(200)])
                model(torch.randn(200, 3)).square().mean().backward()
                optimizer.step()
                trained += 1
                if step >= 20:
                    run.ledger.flush()
        except OSError as error:
            raised = str(error)
        said = [str(w.message) for w in caught if "ledger" in str(w.message)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    answer.put((trained, said, raised))
