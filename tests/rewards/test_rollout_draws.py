"How answers are drawn: each token as often as its probability says, and in the memory that is counted for it"
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sage_finetune.rewards.rollout import draw_seed, SeededDraw

scores = torch.tensor([1.0, .5, 0.0, -1.0, -torch.inf, 2.0, 2.0, -3.0])
ways = [dict(), dict(temperature=.5), dict(temperature=3.0), dict(top_k=2), dict(top_k=100), dict(top_p=.6),
        dict(top_k=4, top_p=.7, temperature=1.5), dict(temperature=1e-6)]


def wanted(temperature=1.0, top_k=8, top_p=1.0):
    "The probabilities by hand"
    left = scores.double()/temperature
    left[left<left.topk(min(top_k, 8))[0][-1]] = -torch.inf
    shares = left.softmax(-1)
    ordered,at = shares.sort(descending=True)
    shares[at[ordered.cumsum(0)-ordered>=top_p]] = 0
    return shares/shares.sum()


def p_value(counts, shares):
    "Of a chi-square test"
    expected = counts.sum()*shares
    return torch.special.gammaincc(torch.tensor((len(shares)-1)/2).double(), ((counts-expected)**2/expected).sum()/2)


def drawn(how, dtype=torch.float32, answers=1000, tokens=20):
    "(tokens, answers)"
    draw = SeededDraw([draw_seed(42, 1, 0, 7, k) for k in range(answers)], tokens, **how)
    return torch.stack([draw(None, scores.to(dtype).repeat(answers, 1)).argmax(-1) for _ in range(tokens)])

@pytest.mark.parametrize('how', ways, ids=str)
def test_each_token_is_drawn_as_often_as_its_probability_says(how):
    found,shares = drawn(how),wanted(**how)
    counts = found.flatten().bincount(minlength=len(scores)).double()
    assert counts[shares==0].sum()==0
    assert p_value(counts[shares>0], shares[shares>0])>1e-4
    for one,other in ((found[1:], found[:-1]), (found[:, 1:], found[:, :-1])): # one says nothing of its neighbour
        pairs = torch.stack([one.flatten(), other.flatten()]).double()
        assert abs(torch.corrcoef(pairs)[0, 1])<5/one.numel()**.5

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_scores_of_another_format_draw_the_same(dtype):
    for how in ways: assert torch.equal(drawn(how, dtype, 50, 3), drawn(how, answers=50, tokens=3))


class Held(TorchDispatchMode):
    "Counts the bytes of the tensors that are there at once"
    most = 0

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in out if isinstance(out, (tuple, list)) else [out]: self._see(t.untyped_storage())
        return out

    def _see(self, storage):
        if (at := storage._cdata) in self.sizes: return
        self.sizes[at] = storage.nbytes()
        self.most = max(self.most, sum(self.sizes.values()))
        weakref.finalize(storage, self.sizes.pop, at)

@pytest.mark.parametrize('how', [dict(), dict(top_p=.9), dict(top_k=50), dict(top_k=50, top_p=.9)], ids=str)
def test_a_draw_takes_the_memory_that_is_counted(how):
    "`estimate_memory` counts 40 bytes a score"
    answers,tokens = 8,50_000
    draw,given = SeededDraw([*range(answers)], 1, **how),torch.randn(answers, tokens)
    with Held() as held: draw(None, given)
    assert 20<held.most/answers/tokens<43
