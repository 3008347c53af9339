"""The PyTorch snippets of the page on practice, where PyTorch is installed.

It can be installed alone: nothing of MXNet is used, and
`python -m pytest -c /dev/null --noconftest tests/test_practice_torch.py` runs.
"""
import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='PyTorch is not installed')
PAGE = Path(__file__).resolve().parent.parent / 'chapters/practice.ipynb'
TEXT = '\n'.join(''.join(cell['source']) for cell in
                 json.loads(PAGE.read_text('utf-8'))['cells']
                 if cell['cell_type'] == 'markdown')
SNIPPETS = {found[1]: found[0] for found in re.finditer(
    r'^# PyTorch: ([^\n]*)\n.*?(?=^```)', TEXT, re.MULTILINE | re.DOTALL)}


def run(name, **names):
    """Run a snippet of the page; return the names that it leaves."""
    names |= {'torch': torch, 'nn': torch.nn, 'copy': copy}
    exec(compile(SNIPPETS[name], name, 'exec'), names)
    return names


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU(),
        torch.nn.Dropout(0.5), torch.nn.Linear(6, 3), torch.nn.BatchNorm1d(3))


def statistics(net):
    return [b.clone() for name, b in net.named_buffers() if 'running' in name]


def same(a, b):
    return all((x == y).all() for x, y in zip(a, b, strict=True))


def test_each_snippet_has_its_test():
    tests = Path(__file__).read_text('utf-8')
    assert len(SNIPPETS) == 15
    for name in SNIPPETS:
        assert f"run('{name}'" in tests.replace("'\n        '", ''), name


def test_evaluate(capsys):
    net, X = model(), torch.randn(50, 4) + 3
    before = statistics(net)
    run('evaluate with batch statistics, dropout off', model=net, X=X,
        score=lambda Y: Y.mean(dim=0).abs().max().item())
    evaluation, batch = map(float, capsys.readouterr().out.split())
    assert evaluation > 0.1 and batch < 1e-5  # normalized by this batch
    assert same(statistics(net), before)


def test_reestimate():
    net, X = model(), torch.randn(500, 4) + 3
    run('re-estimate running statistics, large batches, dropout off',
        model=net, batches=X.split(250))
    assert not net.training
    hidden = net[0](X)
    mean = hidden.mean(dim=0)
    var = torch.stack([part.var(dim=0) for part in hidden.split(250)])
    assert torch.allclose(net[1].running_mean, mean, atol=1e-5)
    assert torch.allclose(net[1].running_var, var.mean(dim=0), atol=1e-4)
    assert abs(net(X).mean()) < 0.1  # as dropout was off


def test_group():
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 16, 3), torch.nn.Sequential(
        torch.nn.BatchNorm2d(16), torch.nn.ReLU()))
    run('group in place of batch normalization')['swap'](net)
    assert isinstance(net[1][0], torch.nn.GroupNorm)
    X = torch.randn(8, 1, 6, 6)
    assert torch.allclose(net(X)[:1], net(X[:1]), atol=1e-6)
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        torch.nn.BatchNorm1d(3)(torch.randn(1, 3))


def test_freeze():
    net, X = model(), torch.randn(8, 4)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    before = statistics(net)
    net.train()(X)  # the symptom
    assert not same(statistics(net), before)
    net = model()
    run('freeze batch norm', model=net)
    net(X).sum().backward()
    assert same(statistics(net), before)
    assert net.training and net[1].weight.grad is None
    assert net[0].weight.grad is not None


def test_accumulation():
    whole, parts, X = model(), model(), torch.randn(8, 4)
    run('k parts move the statistics as far as one batch did', model=parts,
        k=4)
    whole[1](whole[0](X))
    for _ in range(4):
        parts[1](parts[0](X))
    assert torch.allclose(whole[1].running_var, parts[1].running_var)


def test_dropout():
    head = run('dropout behind the last batch norm')['head']
    assert head(torch.randn(5, 64)).shape == (5, 10)


def test_bfloat16():
    net, X = model(), torch.randn(8, 4).bfloat16()
    assert model().bfloat16()[1].running_var.dtype is torch.bfloat16
    run('weights in bfloat16, batch norm in float32', model=net)
    net(X).sum().backward()
    assert net[0].weight.dtype is torch.bfloat16
    assert {b.dtype for b in statistics(net)} == {torch.float32}


def test_decay():
    net = model()
    optimizer = run('weight decay for weights alone', model=net)['optimizer']
    decayed, others = (group['params'] for group in optimizer.param_groups)
    assert [p.ndim for p in decayed] == [2, 2] and len(others) == 6


def test_gamma():
    class Residual(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bn2 = torch.nn.BatchNorm1d(4)

        def forward(self, X):
            return X + self.bn2(X)

    net, X = torch.nn.Sequential(Residual(), Residual()), torch.randn(5, 4)
    run('each residual block starts as the identity', model=net,
        Residual=Residual)
    assert (net(X) == X).all()


def test_sync():
    net = run('statistics of all devices', model=model())['model']
    assert isinstance(net[1], torch.nn.SyncBatchNorm)


def test_ghost():
    layer, X = torch.nn.BatchNorm1d(3), torch.randn(64, 3) + 2
    Y = run('ghost batches of 32, in training alone', layer=layer, X=X)['Y']
    assert Y.view(2, 32, 3).mean(dim=1).abs().max() < 1e-5


def test_gan():
    D = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1),
                            torch.nn.Sigmoid())
    loss = run('real and fake images in batches of their own', D=D,
               real=torch.randn(6, 3), fake=torch.randn(6, 3) + 5,
               criterion=torch.nn.BCELoss())['loss']
    # First moments are hidden in two batches: about twice log 2
    assert abs(loss.item() - 2 * np.log(2)) < 0.3


def test_contrastive():
    seen = []

    def encoder(part):
        seen.append(part)
        return 2 * part

    keys = torch.randn(32, 3)
    k = run('keys in another order, in parts, as if on several devices',
            keys=keys, encoder=encoder)['k']
    assert (k == 2 * keys).all()
    assert [len(part) for part in seen] == [8] * 4
    assert not (torch.cat(seen) == keys).all()


def test_padding():
    layer = torch.nn.BatchNorm1d(3)
    mask = torch.arange(5) < torch.tensor([[2], [5]])
    X = torch.randn(2, 5, 3) + 3
    Y = run('layer is BatchNorm1d(C), X is (N, L, C), mask is (N, L)',
            layer=layer, X=X, mask=mask)['Y']
    assert Y[mask].mean(dim=0).abs().max() < 1e-5
    assert (Y[~mask] == 0).all()


def test_adapt():
    net, X = model().eval(), torch.randn(500, 4) + 3
    before = statistics(net)
    adapted = run('adapt to new images, no labels', model=net,
                  new_images=[X])['adapted']
    assert not adapted.training and same(statistics(net), before)
    assert torch.allclose(adapted[1].running_mean, net[0](X).mean(dim=0),
                          atol=1e-5)
