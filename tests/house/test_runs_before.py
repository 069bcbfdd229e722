"""Runs made before the notebooks were moved into wings are listed, talked to, merged and resumed

`tests/data/runs_before.zip` holds two run folders that the commit before that change (cfe8507) trained on 24 small
sums: `finished`, and `stopped` after 5 of its 9 steps.
"""
import json
import zipfile

import pytest
from safetensors.torch import load_file

from layout import ROOT
from sage_finetune.core.run_folder import find_run, list_runs
from sage_finetune.merge_chat import answers, load_for_chat, merge_run
from sage_finetune.trainer import train_from_meta

QUESTIONS = ['What is 12 plus 4?', 'What is 3 plus 5?']


@pytest.fixture
def runs(tmp_path):
    with zipfile.ZipFile(ROOT/'tests'/'data'/'runs_before.zip') as archive: archive.extractall(tmp_path)
    return tmp_path


def said(folder):
    model, tokenizer = load_for_chat(folder)[:2]
    return [a.text for a in answers(model, tokenizer, QUESTIONS, max_new_tokens=16)]


def weights(folder): return load_file(folder/'lora_weights'/'adapter_model.safetensors')


def test_they_are_listed(runs):
    assert [(r.name, r.task, r.model, r.state) for r in list_runs(runs)]==[
        ('finished', 'qa', 'sage-tiny', 'trained'), ('stopped', 'qa', 'sage-tiny', 'stopped')]
    assert round(list_runs(runs)[0].loss, 4)==3.0378


def test_they_are_talked_to_and_merged(runs):
    before = ['Returns a string representing a 1-tuple as a 1-', 'Compare two objects.']
    assert said(runs/'finished')==before
    merge_run(runs/'finished')
    assert find_run('finished', runs).state=='merged'
    assert said(runs/'finished'/'merged_model')==before


def test_a_stopped_one_is_resumed_to_what_the_finished_one_became(runs):
    run = train_from_meta(runs/'stopped', quiet=True)
    assert run.trainer.state.global_step==9
    steps = [json.loads(line).get('step') for line in (runs/'stopped'/'metrics.jsonl').read_text().splitlines()]
    assert steps==sorted(steps) and {2, 4, 6, 8} <= {*steps}
    resumed, finished = weights(runs/'stopped'), weights(runs/'finished')
    assert resumed.keys()==finished.keys()
    assert max(float((resumed[k]-finished[k]).abs().max()) for k in finished)<1e-5


def test_a_finished_one_has_nothing_left_to_train(runs):
    before = (runs/'finished'/'lora_weights'/'adapter_model.safetensors').read_bytes()
    train_from_meta(runs/'finished', quiet=True)
    assert (runs/'finished'/'lora_weights'/'adapter_model.safetensors').read_bytes()==before
