"What taught it that, for every kind of adapter and optimizer, and what cannot be told"
import json
import shutil

import pytest
import torch

from quick import few, two_layers
from sage_finetune import LoRATrainer, TrainingConfig
from sage_finetune.base.loading import load_model
from sage_finetune.config import LoRAConfig
from sage_finetune.core.disk import SageError
from sage_finetune.core.run_folder import mark_complete
from sage_finetune.model.adapter import add_lora
from sage_finetune.model.loss import loss_sum
from sage_finetune.runs.run import Run
from sage_finetune.study.influence import Influence, row_gradients, what_taught
from sage_finetune.training.batches import Collator

THINGS = 'coffee printer scissors stapler ladder umbrella stamps kettle camera rope saw tent'.split()
PLACES = 'drawer hallway shelf cupboard cellar entrance desk kitchen attic lobby closet garage'.split()


def rows(): return [dict(question=f'Where is the {t}?', answer=f'In the {p}.') for t, p in zip(THINGS, PLACES)]


def trained(folder, model=two_layers, **more):
    file = folder/'rows.jsonl'
    file.write_text(''.join(json.dumps(r)+'\n' for r in rows()))
    lora = dict(r=4, lora_dropout=0.0)|more.pop('lora', {})
    LoRATrainer(TrainingConfig(**dict(
        model_name=model, data_path=file, output_dir=folder/'run', max_length=64, learning_rate=2e-2, max_steps=6,
        per_device_train_batch_size=6, gradient_accumulation_steps=1, save_steps=3, save_total_limit=None,
        test_size=0.0, report_to='none', lora=lora)|more), quiet=True).train()
    return Run(folder/'run')


kinds = dict(plain={}, rslora=dict(use_rslora=True), dora=dict(use_dora=True), pissa=dict(init_lora_weights='pissa'),
             bias=dict(bias='lora_only'), head=dict(target_modules=['q_proj', 'lm_head']),
             head_saved=dict(modules_to_save=['lm_head']), embedding=dict(target_modules=['q_proj', 'embed_tokens']))


@pytest.mark.parametrize('kind', few(kinds, quick=3))
def test_the_gradients_of_rows_add_up_to_that_of_their_batch(kind):
    model = add_lora(load_model(two_layers), LoRAConfig(r=4, lora_dropout=0.0).adapted(**kinds[kind]))
    torch.manual_seed(0)
    for n, p in model.named_parameters():
        if p.requires_grad: p.data += .02*torch.randn_like(p)
    some = [dict(input_ids=[*range(5, 5+n)], labels=[-100, -100, *range(7, 5+n)]) for n in (9, 4, 12)]
    (numbers, G), = row_gradients(model, some, Collator(0))
    trained = [p for p in model.parameters() if p.requires_grad]
    total, _ = loss_sum(model.eval(), **Collator(0)([some[i] for i in numbers]))
    whole = torch.cat([g.flatten() for g in torch.autograd.grad(total, trained, materialize_grads=True)])
    assert (G.sum(0)-whole).abs().max() < 1e-3*whole.abs().max()
    assert sorted(numbers)==[0, 1, 2]


runs = dict(plain={}, pissa=dict(lora=dict(init_lora_weights='pissa')), dora=dict(lora=dict(use_dora=True)),
            plus=dict(loraplus_lr_ratio=4, learning_rate=5e-3), # at 2e-2 B has 8e-2, and the run learns nothing
            sgd=dict(optim='sgd', learning_rate=.5), packed=dict(packing=True),
            rslora=dict(lora=dict(use_rslora=True)))


@pytest.mark.parametrize('kind', few(runs))
def test_the_row_that_holds_the_fact_comes_first(kind, tmp_path):
    run = trained(tmp_path, **runs[kind])
    taught = Influence(run, cache=tmp_path)
    first = [taught.why(f'Tell me where the {t} is.', f'In the {p}.').most(1)[0]
             for t, p in list(zip(THINGS, PLACES))[:4]]
    assert first==[0, 1, 2, 3]
    assert any('no second moments' in n for n in taught.notes)==(kind=='sgd')
    if kind=='plain': told_what_is_missing(taught, run, tmp_path)


def told_what_is_missing(taught, run, folder):
    "On the same run: no receipts, a checkpoint that is gone, none left, other rows, a part that is not there"
    again = Influence(run, cache=folder, say=lambda line: pytest.fail('it was computed anew'))
    assert again.place==taught.place
    with pytest.raises(ValueError, match="`part` 'moon' does not stand in the answer"):
        what_taught(again, 'Where is the coffee?', 'In the drawer.', 'moon')
    last = run.folder.checkpoints/'checkpoint-6'
    (last/'receipt.json').unlink()
    mark_complete(last)
    assert 'checkpoint-6: it has no receipt of its steps' in ' '.join(Influence(run, cache=False).notes)
    (last/'COMPLETE').unlink()
    notes = Influence(run, cache=False).notes
    assert 'of 6 steps 3 are behind them' in notes[0] and 'checkpoint-6 is passed over: it was not finished' in notes
    (folder/'rows.jsonl').write_text((folder/'rows.jsonl').read_text().replace('kettle', 'teapot'))
    with pytest.raises(SageError, match='the rows are not those that run was trained on'): Influence(run)
    shutil.rmtree(run.folder.checkpoints)
    with pytest.raises(SageError, match='has no whole checkpoint'): Influence(run, rows=taught.rows)
