"""`finetune` as a step of something larger: many runs at once, no word on standard output, JSON in and out"""
import json, multiprocessing, os, signal, subprocess, sys, threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file

from quick import Forked, few, forked, run_in_fork, two_layers
from sage_finetune.core.run_folder import RunFolder

def settings(folder, name, seed=0, **more):
    data = folder/'rows.jsonl'
    if not data.is_file():
        data.write_text(''.join(json.dumps(dict(question=f'What is {a} + {b}?', answer=str(a+b)))+'\n'
                                for a in range(4) for b in range(4)))
    return dict(model_name=two_layers, data_path=str(data), output_dir=str(folder/name), max_steps=3,
                per_device_train_batch_size=4, gradient_accumulation_steps=1, learning_rate=1e-3,
                seed=seed, test_size=0.2, logging_steps=1, report_to='none',
                lora=dict(r=4, lora_alpha=8, lora_dropout=0.1)) | more

def in_a_process(asked):
    from sage_finetune import finetune
    return finetune(asked).to_dict()

@pytest.mark.parametrize('seeds', few([2, 5]))
def test_many_runs_leave_as_many_sound_folders(tmp_path, seeds):
    """Half of them in this process, six from three threads, and half in two others at once; the same seed, the same
    bits
    """
    from sage_finetune import finetune
    done,faults = {},[]
    def some(names):
        try:
            for n,seed in names: done[n] = finetune(settings(tmp_path, n, seed)).to_dict()
        except BaseException as e: faults.append(e)
    settings(tmp_path, 'first')
    with ProcessPoolExecutor(2, mp_context=forked or multiprocessing.get_context('spawn')) as pool:
        others = {name: pool.submit(in_a_process, settings(tmp_path, name, i%seeds))
                  for i,name in enumerate(f'other-{i}' for i in range(2*seeds))}
        threads = [threading.Thread(target=some, args=([(f'thread-{t}-{i}', (2*t+i)%seeds) for i in range(2)],))
                   for t in range(3)]
        for t in threads: t.start()
        for t in threads: t.join()
        some([(f'here-{i}', i) for i in range(seeds-1)])
        done |= {n: f.result() for n,f in others.items()}
    assert not faults and len(done)==3*seeds+5
    by_seed = {}
    for name,result in done.items():
        folder = RunFolder(tmp_path/name)
        assert (result['status'], result['steps'], folder.state,
                result['output_dir'])==('trained', 3, 'trained', str(folder.path))
        steps = [m['step'] for m in map(json.loads, folder.metrics.read_text().splitlines()) if 'loss' in m]
        assert steps==[1, 2, 3] and not [p for p in folder.path.rglob('.*')]
        record = json.loads(folder.config.read_text())
        by_seed.setdefault(record['seed'], []).append(b''.join(
            v.numpy().tobytes() for _,v in sorted(load_file(folder.lora_weights/'adapter_model.safetensors').items())))
    assert sorted(by_seed)==list(range(seeds))
    for found in by_seed.values(): assert len(found)>=3 and len(set(found))==1
    assert len({found[0] for found in by_seed.values()})==len(by_seed)

def test_nothing_is_printed_and_nothing_of_the_process_is_changed(tmp_path):
    code = ("import os,random,signal,sys,json,torch,numpy\nfrom sage_finetune import finetune\n"
            "asked = json.loads(sys.argv[1])\n"
            "def state(): return dict(os.environ),random.getstate(),torch.get_rng_state().tolist(),"
            "numpy.random.get_state()[1].tolist(),[signal.getsignal(n) for n in (2, "
            "15)],torch.get_default_dtype(),torch.is_grad_enabled(),os.getcwd()\n"
            "before = state(); finetune(asked); assert state()==before")
    words = [sys.executable, '-c', code, json.dumps(settings(tmp_path, 'quiet'))]
    said = (run_in_fork(words, cwd=tmp_path) if forked else
            subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=tmp_path))
    assert (said.returncode, said.stdout, said.stderr)==(0, '', '')

def started(*args):
    start = Forked if forked else subprocess.Popen
    return start([Path(sys.executable).with_name('sage-finetune'), 'run', *args, '--json'],
                 stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def test_the_command_speaks_json_whatever_happens(tmp_path, command):
    run = command('run', '-', '--json', stdin=json.dumps(settings(tmp_path, 'run')))
    out,err = run.stdout,run.stderr
    result = json.loads(out)
    assert ((run.returncode, result['status'], result['steps'], result['rows']['read'])==(0, 'trained', 3, 16)
            and out.count('\n')==1)
    events = [json.loads(line) for line in err.splitlines()]
    # before the first step it is not counted yet
    assert ([e['step'] for e in events if e['kind']=='log' and 'loss' in e]==[1, 2, 3]
            and {e['of'] for e in events if e['kind']=='log'}=={None, 3})
    (tmp_path/'bad.json').write_text(json.dumps(settings(tmp_path, 'bad') | dict(learning_rate=-1)))
    run = command('run', tmp_path/'bad.json', '--json')
    assert (run.returncode==1 and json.loads(run.stdout)['status']=='failed'
            and '`learning_rate` must be above 0, got -1' in json.loads(run.stdout)['error'])

def test_a_terminated_command_says_so_and_goes_on(tmp_path, command):
    asked = tmp_path/'run.json'
    asked.write_text(json.dumps(settings(tmp_path, 'run', max_steps=40, save_steps=100)))
    run = started(asked)
    for line in run.stderr:
        if json.loads(line).get('step')==2:
            run.send_signal(signal.SIGTERM)
            break
    out,_ = run.communicate(timeout=300)
    result = json.loads(out)
    assert ((run.returncode, result['status'])==(143, 'stopped')
            and 'the same command goes on' in result['error'])
    assert RunFolder(tmp_path/'run').state=='stopped'
    run = command('run', asked, '--json')
    assert (run.returncode, json.loads(run.stdout)['steps'])==(0, 40)
