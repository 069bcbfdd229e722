"Print the versions of this environment beside Colab's: `make test-colab` runs it before its tests"
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT/'constraints-colab.txt'
# What another build stands in for, or may be absent, and why
STAND_INS = {
    'torch': "Colab's own build is on no registry",
    'tensorflow': 'for the resolver only: nothing here imports it',
}


def pins(
    path=LIST, # A file of constraints
): # {package: version}
    "The versions that a file of constraints names"
    lines = path.read_text(encoding='utf-8').splitlines()
    return dict(line.split('==') for line in lines if line and line[0]!='#')


def installed(
    name, # Package
): # Its version, or "-"
    "The version of this environment"
    try: return metadata.version(name)
    except metadata.PackageNotFoundError: return '-'


def differences(
    wanted, # {package: version}
    here, # {package: version, or "-"}
): # One line for each version that is another one and may not be
    "What keeps this environment from being Colab's twin"
    return [f'{name}: Colab has {version}, this environment {here[name]}' for name, version in wanted.items()
            if re.sub(r'\+.*', '', here[name])!=version and name not in STAND_INS]


def main(): # Exit status
    "Print a table; status 1 where a version differs that should not"
    wanted = pins()
    here = {name: installed(name) for name in wanted}
    print(f'{"":22}{"Colab":14}here')
    print(f'{"Python":22}{"3.13":14}{platform.python_version()}')
    for name, version in sorted(wanted.items(), key=lambda pin: pin[0].lower()):
        note = f'({STAND_INS[name]})' if name in STAND_INS and here[name].partition('+')[0]!=version else ''
        print(f'{name:22}{version:14}{here[name]:14}{note}'.rstrip())
    wrong = differences(wanted, here)
    for line in wrong: print(f'not as on Colab: {line}')
    print('left out: 04_preference, since TRL from 1.14 on asks for datasets from 4.7 on')
    return int(bool(wrong))


if __name__=='__main__': sys.exit(main())
