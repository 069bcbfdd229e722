"What a run computes, compared: any split of the batch, packed or not, the reported loss, the same seed, resumed"
import dataclasses
import math
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import Trainer

from quick import few, two_layers
from sage_finetune.training import callbacks
from sage_finetune.config import LoRAConfig, TrainingConfig
from sage_finetune.core.disk import manifest_file, read_json
from sage_finetune.core.run_folder import RunFolder
from sage_finetune.rows.formats import create_sample_data, to_messages
from sage_finetune.rows.tokens import encode
from sage_finetune.trainer import CausalLMTrainer, LoRATrainer, Stopped


# words of the answers, so that no two micro-batches learn equally many tokens
lengths = [1, 19, 3, 7, 12, 2, 5, 16, 9, 4, 11, 6, 1, 14, 8, 3]


class Words(LoRATrainer):
    "Rows whose answers have 1 to 19 words"
    def prepare_data(self):
        talks = [to_messages(dict(question=f'{n} words, number {i}?', answer=' '.join(['word']*n)))
                 for i,n in enumerate(lengths)]
        self.dataset = Dataset.from_list([encode(t, self.tokenizer) for t in talks])

    def setup_trainer(self):
        super().setup_trainer()
        self.trainer.by_length = not self.config.packing # the same order of rows, however they are split


def config(folder, batch=4, accum=1, **more):
    settings = dict(model_name=two_layers, output_dir=folder, max_steps=1, per_device_train_batch_size=batch,
                    gradient_accumulation_steps=accum,
                    learning_rate=1e-3, warmup_ratio=0.0, logging_steps=1, report_to='none', max_length=256,
                    lora=LoRAConfig(r=4, lora_dropout=0.0))
    return TrainingConfig(**(settings | more))


def after(*args, **more):
    "A run, and its trained weights as one vector"
    run = Words(config(*args, **more), quiet=True)
    run.train()
    return run,torch.cat([p.detach().flatten() for p in run.model.parameters() if p.requires_grad])

def gradients(*args, **more):
    "The gradient of the first step, before it is clipped, as one vector"
    run,held = Words(config(*args, **more), quiet=True), []
    run.load_model_and_tokenizer()
    run.apply_lora()
    run.prepare_data()
    run.setup_trainer()
    with torch.no_grad():
        for n,p in run.model.named_parameters():
            if 'lora_B' in n:
                # with B = 0, A would have no gradient
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n)))*.02)
    step = run.trainer.loss_and_gradient_finite
    def keep():
        held.append(torch.cat([p.grad.flatten() for p in run.model.parameters() if p.requires_grad]).clone())
        return step()
    run.trainer.loss_and_gradient_finite = keep
    run.train()
    return held[0]

def logged(run): return [m for m in callbacks.read_metrics(run.folder.metrics) if 'loss' in m]


@pytest.mark.parametrize('batch,accum', few([(1, 4), (2, 2)]))
def test_any_split_of_the_batch_gives_the_same_loss_gradient_and_adapter(batch, accum, tmp_path):
    g4,g = gradients(tmp_path/'g4', max_grad_norm=0), gradients(tmp_path/'g', batch, accum, max_grad_norm=0)
    assert g4.norm()>.01 and (g4-g).abs().max()<=1e-5*max(1, g4.abs().max())
    (whole,w4),(split,w) = after(tmp_path/'4x1', max_steps=4), after(tmp_path/'split', batch, accum, max_steps=4)
    assert (w4-w).abs().max()<=1e-5
    assert max(abs(a['loss']-b['loss']) for a,b in zip(logged(whole), logged(split), strict=True))<=1e-5


def test_packed_or_not_gives_the_same_loss_gradient_and_adapter(tmp_path):
    rows = len(lengths)
    g,packed = (gradients(tmp_path/'g', rows, max_grad_norm=0),
                gradients(tmp_path/'gp', rows, packing=True, max_grad_norm=0))
    assert (g-packed).abs().max()<=1e-5*max(1, g.abs().max())
    (alone,w),(full,wp) = after(tmp_path/'alone', rows), after(tmp_path/'full', rows, packing=True)
    assert len(full.trainer.train_dataset)<rows/2
    assert (w-wp).abs().max()<=1e-5 and abs(logged(alone)[0]['loss']-logged(full)[0]['loss'])<=1e-5


def test_by_document_or_with_a_mask_a_packed_row_gives_the_same(tmp_path, monkeypatch):
    from sage_finetune.base import attention
    from sage_finetune.training import packing
    calls,by_document = [],attention._by_document
    def counted(*args):
        calls.append(1)
        return by_document(*args)
    with monkeypatch.context() as m:
        m.setattr(attention, '_by_document', counted)
        g = gradients(tmp_path/'documents', 4, packing=True, max_grad_norm=0)
    assert len(calls)>=2, 'each of the two layers'
    monkeypatch.setattr(packing, 'use_documents', lambda model, on=True: False)
    masked = gradients(tmp_path/'mask', 4, packing=True, max_grad_norm=0)
    assert (g-masked).abs().max()<=1e-5*max(1, g.abs().max())
    checkpointed = gradients(tmp_path/'twice', 4, packing=True, max_grad_norm=0, gradient_checkpointing=True)
    monkeypatch.undo()
    twice = gradients(tmp_path/'twice_by_document', 4, packing=True, max_grad_norm=0, gradient_checkpointing=True)
    assert (twice-checkpointed).abs().max()<=1e-5*max(1, g.abs().max())


def test_a_budget_of_tokens_gives_the_same_in_any_number_of_passes(tmp_path):
    runs = [after(tmp_path/f'{n}', accum=n, tokens_per_step=256, max_steps=3) for n in (1, 2, 4)]
    places = [b['input_ids'].numel() for b in runs[0][0].trainer.get_train_dataloader()]
    assert max(places)<=256 and len(set(places[:-1]))>0 and sum(places[:-1])>.6*256*(len(places)-1)
    for run,w in runs[1:]: assert (w-runs[0][1]).abs().max()<=1e-5 and run.trainer.state.global_step==3


def test_memory_that_runs_out_under_a_budget_of_tokens_makes_more_passes_of_the_same_steps(tmp_path, monkeypatch):
    whole,w = after(tmp_path/'whole', tokens_per_step=256, max_steps=3)
    compute,left = CausalLMTrainer.compute_loss,[1]
    def full(self, model, inputs, **kw):
        if self.state.global_step==1 and left:
            left.pop()
            raise torch.OutOfMemoryError('simulated')
        return compute(self, model, inputs, **kw)
    monkeypatch.setattr(CausalLMTrainer, 'compute_loss', full)
    run,v = after(tmp_path/'full', tokens_per_step=256, max_steps=3)
    assert run.fitted.gradient_accumulation_steps==2 and (v-w).abs().max()<=1e-5


def test_a_budget_that_the_longest_row_does_not_fit_in_is_refused(tmp_path):
    with pytest.raises(ValueError, match='`tokens_per_step=32` has no room for 1 row.s. of'):
        after(tmp_path, tokens_per_step=32)


@torch.no_grad()
def mean_by_hand(model, rows):
    "-log p of each learned token, row by row, with no code of ours"
    each = []
    model.eval()
    for r in rows:
        ids,labels = (torch.tensor(r[c]) for c in ('input_ids', 'labels'))
        logits = model(input_ids=ids[None]).logits[0, :-1].double()
        each.append(F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction='none')[labels[1:]!=-100])
    return torch.cat(each)


def test_the_reported_loss_is_the_mean_over_learned_tokens(tmp_path):
    # the weights stand still, so the loss of any step can be computed afterwards
    still = dict(learning_rate=1e-12, num_train_epochs=1, max_steps=-1)
    run,_ = after(tmp_path/'steps', 2, 2, logging_steps=3, **still)
    losses = mean_by_hand(run.model, run.dataset)
    order = list(run.trainer._get_train_sampler())
    each = {i: mean_by_hand(run.model, [run.dataset[i]]) for i in order}
    first = torch.cat([each[i] for i in order[:4]])
    two_three = torch.cat([each[i] for i in order[4:12]])
    lines = logged(run)
    steps,rest = -(-len(order)//4),torch.cat([each[i] for i in order[12:]])
    assert [(m['from_step'], m['step']) for m in lines]==[(1, 1), (2, 3), (4, steps)] and steps<6
    assert abs(lines[2]['loss']-rest.mean().item())<1e-5 # the last window, however short
    assert abs(lines[0]['loss']-first.mean().item())<1e-5
    assert abs(lines[1]['loss']-two_three.mean().item())<1e-5 # over the tokens of both steps, not the mean of two means
    means = [torch.cat([each[i] for i in order[a:a+4]]).mean().item() for a in (4, 8)]
    assert abs(sum(means)/2-two_three.mean().item())>1e-4, 'the lengths must differ for this to say something'
    assert len(losses)==sum(n+1 for n in map(len, each.values())) or len(losses)>sum(lengths)


def test_the_loss_of_held_out_rows_is_the_mean_over_learned_tokens(tmp_path):
    run = Words(config(tmp_path/'run', 4), quiet=True)
    run.load_model_and_tokenizer()
    run.apply_lora()
    run.prepare_data()
    run.eval_dataset = run.dataset
    run.setup_trainer()
    assert abs(run.trainer.evaluate()['eval_loss']-mean_by_hand(run.model, run.dataset).mean().item())<1e-5


def test_the_same_seed_gives_the_same_run(tmp_path):
    with_dropout = dict(max_steps=6, lora=LoRAConfig(r=4, lora_dropout=0.2))
    (a,wa),(b,wb),(_,wc) = (after(tmp_path/'a', 2, 2, **with_dropout), after(tmp_path/'b', 2, 2, **with_dropout),
                            after(tmp_path/'c', 2, 2, seed=43, **with_dropout))
    assert torch.equal(wa, wb) and not torch.equal(wa, wc)
    assert [(m['loss'], m['grad_norm'], m['learning_rate']) for m in logged(a)]==[
        (m['loss'], m['grad_norm'], m['learning_rate']) for m in logged(b)]


@pytest.mark.parametrize('rows', [{}, dict(packing=True, max_length=64), dict(tokens_per_step=192)],
                         ids=['padded', 'packed', 'by tokens'])
def test_a_resumed_run_is_bit_exact(rows, tmp_path):
    how = dict(max_steps=7, save_steps=100, lora=LoRAConfig(r=4, lora_dropout=0.2), learning_rate=5e-3) | rows
    whole,w = after(tmp_path/'whole', 2, 2, **how)
    for stop in (3,) if rows else range(1, 7): # at each step, in and between the passes over the rows
        run = Words(config(tmp_path/f'stop{stop}', 2, 2, **how), quiet=True)
        run.load_model_and_tokenizer()
        run.apply_lora()
        run.prepare_data()
        run.setup_trainer()
        run.trainer.stop_requested = lambda: 2 if run.trainer.state.global_step==stop else None
        with pytest.raises(Stopped): run.train()
        again,v = after(tmp_path/f'stop{stop}', 2, 2, **how)
        assert torch.equal(v, w), stop
        assert [(m['step'], m['loss']) for m in logged(again)]==[(m['step'], m['loss']) for m in logged(whole)]


def test_what_is_measured_beside_the_loss(tmp_path):
    run,_ = after(tmp_path/'run', 2, 2, max_steps=4)
    line = logged(run)[-1]
    assert {'loss', 'grad_norm', 'learning_rate', 'learned_tokens_per_second', 'tokens_per_second', 'memory',
            'matmul_share'} <= set(line)
    assert (0<line['learned_tokens_per_second']<line['tokens_per_second'] and line['memory']>2**26
            and line['matmul_share']>0)
    # all tokens over learned tokens, of the whole data set: 4 steps of 4 rows are the 16 rows once
    learned = sum(sum(x!=-100 for x in r['labels'][1:]) for r in run.dataset)
    every = sum(len(r['input_ids']) for r in run.dataset)
    whole,_ = after(tmp_path/'whole', 16)
    line = logged(whole)[-1]
    # padding is not counted
    assert math.isclose(line['tokens_per_second']/line['learned_tokens_per_second'], every/learned, rel_tol=1e-2)


def test_operations_are_counted_as_the_library_does(tmp_path):
    run,_ = after(tmp_path/'run', 2, 2, max_steps=1)
    t = run.trainer
    for rows in ([0], [1, 2, 3]):
        batch = t.data_collator([run.dataset[i] for i in rows])
        assert t.floating_point_ops(batch)==Trainer.floating_point_ops(t, batch)>0
    assert t.floating_point_ops(dict(labels=batch['labels']))==0 and t.state.total_flos>0


def test_measuring_changes_no_bit(tmp_path, monkeypatch):
    from sage_finetune.training import loop
    _,w = after(tmp_path/'with', 2, 2, max_steps=3, lora=LoRAConfig(r=4, lora_dropout=0.2))
    def other_peak(device, dtype): return 1.0
    monkeypatch.setattr(loop, 'matmul_peak', other_peak)
    monkeypatch.setattr(loop, 'peak_memory', lambda device: None)
    _,v = after(tmp_path/'without', 2, 2, max_steps=3, logging_steps=100, lora=LoRAConfig(r=4, lora_dropout=0.2))
    assert torch.equal(v, w)


def compiled(run):
    return sum(type(m).__name__=='OptimizedModule' and 'Layer' in type(m._orig_mod).__name__
               for m in run.trainer.model_wrapped.modules())

@pytest.mark.slow
def test_a_compiled_run_is_the_same_but_for_rounding(tmp_path, monkeypatch):
    from sage_finetune.training import loop
    plain,w = after(tmp_path/'plain', 2, 2, max_steps=3)
    arguments = loop.TrainingArguments
    with monkeypatch.context() as m: # traced and differentiated as always; "inductor" would need a C++ compiler on top
        m.setattr(loop, 'TrainingArguments', lambda **kw: arguments(**kw, torch_compile_backend='aot_eager'))
        m.setattr(loop, 'fields', lambda cls: dataclasses.fields(arguments))
        fast,v = after(tmp_path/'compiled', 2, 2, max_steps=3, torch_compile=True)
    assert compiled(fast)==2, 'each layer'
    assert (w-v).abs().max()<=1e-4 and abs(logged(plain)[-1]['loss']-logged(fast)[-1]['loss'])<=1e-4
    after_it,x = after(tmp_path/'after', 2, 2, max_steps=3)
    assert not compiled(after_it) and torch.equal(x, w), 'the next run is not compiled'


class Heard(Words):
    "Remembers what it says of its adapters"
    def say(self, what): self.__dict__.setdefault('heard', []).extend([str(what)] if 'adapters:' in str(what) else [])

def heard(*args, **more):
    run = Heard(config(*args, **more), quiet=True)
    run.train()
    return run,torch.cat([p.detach().flatten() for p in run.model.parameters() if p.requires_grad])

def test_adapters_computed_together_end_as_those_of_peft_do(tmp_path):
    how = dict(max_steps=3, lora=LoRAConfig(r=4, lora_dropout=.2), save_steps=2)
    together,w = heard(tmp_path/'together', 2, 2, **how)
    peft,v = heard(tmp_path/'peft', 2, 2, fused_lora=False, **how)
    proved, = together.heard # on this model, or by an earlier test on one of the same shape
    where = '(on this model|in this process on a model of the same shape)'
    assert re.fullmatch(r'adapters: 8 layers in 4 products \(q_proj\+k_proj\+v_proj, o_proj\), proved '
                        f'{where} to give the numbers of peft within 1e-06, 7 norms and rotary positions with them',
                        proved)
    assert peft.heard==["adapters: peft's path (`fused_lora=False`)"]
    assert torch.allclose(w, v, atol=2e-5) and not torch.equal(w, v) # B is not normalised, so Adam lifts what is small
    files = lambda run: {f.name: f.stat().st_size for f in (run.folder.checkpoints/'checkpoint-2').iterdir()}
    assert {*files(together)}=={*files(peft)} # a checkpoint knows nothing of it
    assert not any('forward' in vars(m) for m in together.model.modules() if 'lora' in type(m).__module__)

def test_a_run_is_resumed_on_the_other_path(tmp_path):
    begun,_ = heard(tmp_path/'run', 2, 2, max_steps=4, save_steps=2, save_total_limit=None)
    shutil.rmtree(begun.folder.checkpoints/'checkpoint-4')
    for f in (begun.folder.path/'results.json', begun.folder.path/manifest_file): f.unlink(missing_ok=True)
    whole = torch.cat([p.detach().flatten() for p in begun.model.parameters() if p.requires_grad])
    again,w = heard(tmp_path/'run', 2, 2, max_steps=4, save_steps=2, save_total_limit=None, fused_lora=False)
    assert again.trainer.state.global_step==4 and torch.allclose(w, whole, atol=2e-5)


def sums(folder, n=60, **more):
    "A run on `n` sums from a file"
    data = create_sample_data(folder/'sums.jsonl', 'qa', num_samples=n)
    settings = dict(data_path=data, test_size=0.1, max_steps=10, learning_rate=5e-3, logging_steps=10) | more
    run = LoRATrainer(config(folder/'run', 8, **settings), quiet=True)
    return run,run.train()


def test_a_packed_run_reports_how_full_its_rows_are_and_packs_no_held_out_row(tmp_path):
    run,_ = sums(tmp_path, n=200, packing=True, max_steps=-1, num_train_epochs=1)
    report = read_json(run.folder.data_report)['packing']
    assert (report['documents'], report['rows'])==(180, len(run.trainer.train_dataset)) and report['fill']>.9
    assert 'position_ids' not in run.eval_dataset.column_names


@pytest.mark.parametrize('how', few(['load_in_4bit', 'load_in_8bit']))
def test_quantised_runs_learn_on_a_cpu(how, tmp_path):
    plain = sums(tmp_path/'plain', max_steps=1)[1]
    run,result = sums(tmp_path/how, **{how: True})
    assert result.loss_after<result.loss_before and run.model.get_base_model().is_quantized
    # rounding moves the loss a little; a broken kernel moves it to 10
    assert abs(result.loss_before-plain.loss_before)<.2
    assert RunFolder(run.folder.path).state=='trained'
