"What is packed and imported: versions, package data, modules in step with notebooks, a light import"
import json, os, re, shutil, subprocess, sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT/'sage_finetune'
HEAVY = 'torch', 'transformers', 'datasets', 'peft', 'ipywidgets', 'matplotlib', 'IPython', 'rich'


@pytest.fixture(scope='module')
def settings():
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def package_files(folder):
    "Files of the package below `folder`, as paths relative to it"
    found = (folder/'sage_finetune').rglob('*')
    return {path.relative_to(folder).as_posix() for path in found if path.is_file() and '__pycache__' not in path.parts}


def copy_project(to):
    "A copy of the sources in which a tool may write"
    skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '_docs', '_proc')
    for folder in 'nbs','sage_finetune': shutil.copytree(ROOT/folder, to/folder, ignore=skip, symlinks=True)
    for path in ROOT.iterdir():
        if path.is_file(): shutil.copy2(path, to)
    return to


def run(*command, folder, **env):
    "Run Python with `command` in `folder`; its output, or a failure that shows it"
    inherited = {key: value for key,value in os.environ.items() if key != 'IN_TEST'}
    done = subprocess.run([sys.executable, *command], cwd=folder, env={**inherited, **env}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_versions_agree(settings):
    written = re.search(r'^__version__ = "(.+)"$', (PACKAGE/'__init__.py').read_text(encoding='utf-8'), re.M)[1]
    assert written == settings['version']
    assert metadata.version(settings['dist_name']) == settings['version'], (
        'installed before the version changed: make setup')
    assert f"## [{settings['version']}]" in (ROOT/'CHANGELOG.md').read_text(encoding='utf-8')


def test_installed_metadata_is_what_settings_say(settings):
    required = metadata.requires(settings['dist_name'])
    plain = {line.split(';')[0].strip() for line in required if 'extra ==' not in line}
    assert {re.split(r'[<>=!~ ]', line)[0] for line in plain} == {
        re.split(r'[<>=!~ ]', item)[0] for item in settings['requirements'].split()}
    scripts = {f'{point.name}={point.value}' for point in metadata.distribution(settings['dist_name']).entry_points
               if point.group == 'console_scripts'}
    assert scripts == set(settings['console_scripts'].split())


def test_every_requirement_is_pinned_for_every_python(settings):
    requirement = pytest.importorskip('packaging.requirements').Requirement
    lines = (ROOT/'constraints.txt').read_text(encoding='utf-8').splitlines()
    pins = [requirement(line) for line in lines if line and line[0] != '#']
    for minor in '3.10','3.11','3.12','3.13':
        here = {pin.name: pin.specifier for pin in pins if not pin.marker
                or pin.marker.evaluate({'python_version': minor})}
        for wanted in map(requirement, (settings['requirements'] + ' ' + settings['dev_requirements']).split()):
            version = str(here[wanted.name]).removeprefix('==')
            assert wanted.specifier.contains(version), f'Python {minor}: {wanted} but constraints.txt has {version}'


def test_build_takes_every_package_file(tmp_path):
    project = copy_project(tmp_path/'project')
    model = project/'sage_finetune/models/sage-tiny'
    model.mkdir(parents=True, exist_ok=True)
    (model/'probe.safetensors').write_bytes(b'weights')
    run('setup.py', '-q', 'build_py', '--build-lib', str(tmp_path/'built'), folder=project)
    assert package_files(tmp_path/'built') == package_files(project)


def test_modules_are_in_step_with_notebooks(tmp_path):
    project = copy_project(tmp_path/'project')
    for path in (project/'sage_finetune').rglob('*.py'):
        if path != project/'sage_finetune'/'__init__.py': path.unlink()
    run('-c', 'from nbdev.export import *; from nbdev.doclinks import nbdev_export; nbdev_export()', folder=project)
    sources = lambda folder: {path.relative_to(folder).as_posix(): path.read_text(encoding='utf-8')
                              for path in folder.rglob('*.py')}
    fresh,kept = sources(project/'sage_finetune'),sources(PACKAGE)
    stale = sorted(name for name in {*fresh, *kept} if fresh.get(name) != kept.get(name))
    assert not stale, f'{stale} differ from what the notebooks export: make sync'


def test_index_of_symbols_matches_modules():
    scope = {}
    exec((PACKAGE/'_modidx.py').read_text(encoding='utf-8'), scope)
    listed = {path for symbols in scope['d']['syms'].values() for _,path in symbols.values()}
    assert listed == {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob('*.py') if path.name[0] != '_'}


def test_import_is_light():
    code = ('import json, sys, sage_finetune; from sage_finetune import LoRAConfig, PresetConfigs, TrainingConfig; '
            'print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))')
    loaded = json.loads(run('-c', code, folder=ROOT).splitlines()[-1])
    assert not set(HEAVY) & set(loaded)


def test_public_names_are_listed():
    code = 'import json, sage_finetune; print(json.dumps([sage_finetune.__all__, dir(sage_finetune)]))'
    offered,listed = json.loads(run('-c', code, folder=ROOT).splitlines()[-1])
    assert set(offered) <= set(listed)
    assert {'LoRATrainer', 'TrainingConfig', 'LoRAConfig', 'PresetConfigs', 'prepare_dataset', 'load_training_data',
            'train_from_meta'} <= set(offered)
