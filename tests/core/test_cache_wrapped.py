"Tensors that are made of others, such as the states of an optimizer in 8 bits"
import torch
from torch.testing._internal.two_tensor import TwoTensor

from sage_finetune.core.cache import leaves, value_digest


def test_a_tensor_of_others_is_told_by_its_parts():
    codes,scale = torch.arange(4.0),torch.ones(4)
    found = leaves(dict(state={0: dict(exp_avg=TwoTensor(codes, scale), step=1)}))
    assert [*found]==['state.0.exp_avg.a', 'state.0.exp_avg.b', 'state.0.step']
    other = leaves(dict(state={0: dict(exp_avg=TwoTensor(codes, 2*scale), step=1)}))
    assert {n for n in found if value_digest(found[n])!=value_digest(other[n])}=={'state.0.exp_avg.b'}
