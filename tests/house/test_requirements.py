"""What is asked of other packages: as little as is true, beside what Colab has, and each lower bound tried

Resolving and installing need a package registry; without one these tests are skipped and say so.
"""
import importlib.util
import json
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
GIVEN = ROOT.parent/'shared'/'data'
# Of these Colab keeps its own version, whatever is installed beside them
KEPT = 'torch', 'transformers', 'peft', 'datasets', 'numpy', 'accelerate', 'ipywidgets', 'ipykernel', 'tensorboard'
# Extras that cannot be had beside Colab's versions, and what they replace there
REPLACES = dict.fromkeys(('trl', 'full'), {'datasets', 'pyarrow'}) # `full` has `trl` in it
# Where the lowest version is not tried each time, and why
LOWEST_INSTEAD = {'torch': ('2.13.0', 'older builds on the registry bring 3 GB of CUDA libraries; LOWEST_TORCH=2.6.0 '
                            'takes them, as the weekly workflow does')}

# transformers 4.56 skips other rows than it should when it goes on inside an epoch of accumulated steps
RESUMED = """
import tempfile
from sage_finetune import LoRATrainer, TrainingConfig, verify_resume
from sage_finetune.rows.formats import create_sample_data
folder = tempfile.mkdtemp()
config = TrainingConfig(model_name='sage-tiny', data_path=create_sample_data(folder+'/rows.json', 'qa', num_samples=64),
                        output_dir=folder+'/run', test_size=.1, max_steps=12, per_device_train_batch_size=4,
                        gradient_accumulation_steps=2, save_steps=5, save_total_limit=None, report_to='none')
LoRATrainer(config, quiet=True).train()
print('resumed as the same run:', verify_resume(folder+'/run').ok)
"""

spec = importlib.util.spec_from_file_location('colab_tool', ROOT/'tools/colab.py')
colab = importlib.util.module_from_spec(spec)
spec.loader.exec_module(colab)


def settings():
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def requirements(extra=''): return settings()[f'{extra}_requirements' if extra else 'requirements'].split()


EXTRAS = sorted(key.removesuffix('_requirements') for key in settings() if key.endswith('_requirements'))


@pytest.fixture(scope='module')
def uv(tmp_path_factory):
    "The resolver, in a folder of its own"
    folder = tmp_path_factory.mktemp('uv')
    pip = sys.executable, '-m', 'pip', 'install', '-q', '--disable-pip-version-check', '--retries', '1'
    done = subprocess.run([*pip, '--target', str(folder), 'uv'], capture_output=True, text=True)
    if done.returncode: pytest.skip(f'no package registry can be reached: {done.stderr.strip().splitlines()[-1]}')

    def run(*words, **kwargs):
        links = [f'--find-links={place}' for place in os.environ.get('PIP_FIND_LINKS', '').split()]
        return subprocess.run([folder/'bin'/'uv', *words, *links], capture_output=True, text=True, **kwargs)
    return run


def resolved(uv, folder, wanted, *options, kept=()):
    "{package: version} that a resolver chooses; the reason where it finds none"
    (folder/'wanted.in').write_text('\n'.join(wanted)+'\n')
    (folder/'kept.txt').write_text(''.join(f'{name}=={version}\n' for name, version in dict(kept).items()))
    done = uv('pip', 'compile', '-q', '--no-header', '--no-annotate', '-c', folder/'kept.txt', *options,
              folder/'wanted.in')
    if done.returncode: return done.stderr
    lines = [line.split(';')[0].strip() for line in done.stdout.splitlines()]
    return {name.lower(): version for name, version in (line.split('==') for line in lines if '==' in line)}


def test_the_list_of_colab_is_the_one_that_was_given():
    given = sorted(GIVEN.glob('colab-*.txt'))
    if not given: pytest.skip(f'{GIVEN} has no list of Colab: constraints-colab.txt cannot be compared with one')
    text = given[-1].read_text(encoding='utf-8')
    lines = [re.sub(r'\+.*', '', line) for line in text.splitlines() if line and line[0]!='#']
    assert dict(line.split('==') for line in lines)==colab.pins()


@pytest.mark.parametrize('extra', ['', *EXTRAS])
def test_a_requirement_takes_what_colab_has(extra):
    has = {name.lower(): version for name, version in colab.pins().items()}
    refused = [f'{wanted}, and Colab has {has[wanted.name]}' for wanted in map(Requirement, requirements(extra))
               if wanted.name in has and not wanted.specifier.contains(has[wanted.name])]
    assert refused==[]


def test_no_requirement_has_an_upper_bound_and_each_has_a_lower_one():
    for wanted in map(Requirement, (line for extra in ['', *EXTRAS] for line in requirements(extra))):
        assert [bound.operator for bound in wanted.specifier]==['>='], wanted


def test_a_twin_that_is_none_is_told():
    wanted, here = {'torch': '2.11.0', 'peft': '0.20.0', 'ipywidgets': '7.7.1', 'rich': '13.9.4'}, {}
    here = {'torch': '2.13.0+cpu', 'peft': '0.21.2', 'ipywidgets': '-', 'rich': '13.9.4+local'}
    assert colab.differences(wanted, here)==['peft: Colab has 0.20.0, this environment 0.21.2',
                                             'ipywidgets: Colab has 7.7.1, this environment -']


@pytest.mark.slow
@pytest.mark.parametrize('extra', ['', *sorted({*EXTRAS}-{'dev', 'deepspeed', *REPLACES})])
def test_installs_beside_what_colab_has(uv, tmp_path, extra):
    "On Colab's Python, its versions and tensorflow among what is asked for: no conflict, nothing replaced"
    kept, python = colab.pins(), ('--python-version', '3.13')
    there = resolved(uv, tmp_path, kept, *python, kept=kept)
    assert isinstance(there, dict), there
    wanted = requirements()+requirements(extra) if extra else requirements()
    answer = resolved(uv, tmp_path, [*kept, *wanted], *python, kept=kept)
    assert isinstance(answer, dict), answer
    replaced = {name: (version, answer.get(name)) for name, version in there.items() if answer.get(name)!=version}
    added = {name: version for name, version in answer.items() if name not in there}
    print(f'beside {len(there)} packages of Colab: {len(replaced)} replaced, {len(added)} added: {added}')
    assert replaced=={}
    assert {name: answer[name] for name in KEPT}=={name: kept[name] for name in KEPT}


@pytest.mark.slow
@pytest.mark.parametrize('extra', REPLACES)
def test_what_an_extra_replaces_on_colab_is_known(uv, tmp_path, extra):
    kept, python = colab.pins(), ('--python-version', '3.13')
    wanted = [*kept, *requirements(), *requirements(extra)]
    refusal = resolved(uv, tmp_path, wanted, *python, kept=kept)
    assert isinstance(refusal, str) and 'datasets' in refusal, refusal
    free = {name: version for name, version in kept.items() if name not in REPLACES[extra]}
    answer = resolved(uv, tmp_path, wanted, *python, kept=free)
    assert isinstance(answer, dict), answer
    print(f'[{extra}] on Colab: '+', '.join(f'{name} {kept[name]} -> {answer[name]}' for name in REPLACES[extra]))
    assert all(answer[name]!=kept[name] for name in REPLACES[extra])


@pytest.mark.slow
def test_a_bound_above_colab_is_a_conflict(uv, tmp_path):
    "The bounds of before: the resolver refuses them, so its yes is worth something"
    for line, name in ('ipywidgets>=8', 'ipywidgets'), ('tensorboard>=2.21', 'tensorboard'), ('peft>=0.21', 'peft'):
        answer = resolved(uv, tmp_path, [*colab.pins(), line], '--python-version', '3.13', kept=colab.pins())
        assert isinstance(answer, str) and name in answer, (line, answer)


def tried_with_lowest(python, folder, *words):
    "Run the environment's Python outside of the checkout, with an empty home"
    env = {key: value for key, value in os.environ.items() if key not in ('IN_TEST', 'PYTHONPATH')}
    home = folder/'home'
    home.mkdir(exist_ok=True)
    env |= dict(HOME=str(home), SAGE_CACHE=str(home/'cache'), HF_HUB_OFFLINE='1', PYTHONPATH=str(ROOT))
    return subprocess.run([python, *words], cwd=home, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_the_lowest_versions_do(uv, tmp_path):
    "Each requirement at its lower bound: every module is imported, and the whole path from rows to chat runs"
    stand_in = {name: os.environ.get(f'LOWEST_{name.upper()}', version)
                for name, (version, _) in LOWEST_INSTEAD.items()}
    (tmp_path/'instead.txt').write_text(''.join(f'{name}=={version}\n' for name, version in stand_in.items()))
    minor = '.'.join(map(str, sys.version_info[:2]))
    # ipywidgets brings the newest IPython, which asks for a newer psutil than Colab has
    lowest = resolved(uv, tmp_path, [*requirements(), 'ipython>=7.34'], '--resolution', 'lowest-direct',
                      '--python-version', minor, '--override', tmp_path/'instead.txt')
    assert isinstance(lowest, dict), lowest
    for wanted in map(Requirement, requirements()):
        if wanted.name in stand_in: continue
        assert Version(lowest[wanted.name])==Version(next(iter(wanted.specifier)).version), wanted
    python = tmp_path/'venv'/'bin'/'python'
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', tmp_path/'venv'], check=True)
    (tmp_path/'lowest.txt').write_text(''.join(f'{name}=={version}\n' for name, version in lowest.items()))
    done = uv('pip', 'install', '-q', '--python', python, '-r', tmp_path/'lowest.txt')
    assert done.returncode==0, done.stderr
    every = ('import importlib, json, pkgutil, sage_finetune; from importlib import metadata; '
             'names = [m.name for m in pkgutil.walk_packages(sage_finetune.__path__, "sage_finetune.")]; '
             '[importlib.import_module(name) for name in names if not name.endswith("__main__")]; '
             'print(json.dumps({d.metadata["Name"].lower(): d.version for d in metadata.distributions()}))')
    done = tried_with_lowest(python, tmp_path, '-c', every)
    assert done.returncode==0, done.stderr
    have = json.loads(done.stdout.splitlines()[-1])
    print(', '.join(f'{r.name} {have[r.name]}' for r in map(Requirement, requirements())))
    done = tried_with_lowest(python, tmp_path, '-c', 'from sage_finetune.cli import main; main()', 'quickstart', 'code',
                             '--max-facts', '40')
    assert done.returncode==0 and 'sage-finetune chat' in done.stdout, done.stdout+done.stderr
    resumed = tried_with_lowest(python, tmp_path, '-c', RESUMED)
    assert 'resumed as the same run: True' in resumed.stdout, resumed.stdout+resumed.stderr
    curves = tried_with_lowest(python, tmp_path, '-c', 'from torch.utils.tensorboard import SummaryWriter; '
                               'SummaryWriter("logs").add_scalar("loss", 1.5, 1)')
    assert curves.returncode==0, curves.stderr
