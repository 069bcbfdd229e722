"Reads what `settings.ini` owns: version, requirements, extras and the console script"
from configparser import ConfigParser
from setuptools import find_packages, setup

ini = ConfigParser(delimiters=['='])
ini.read('settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
extras = {k[:-len('_requirements')]: cfg[k].split() for k in cfg if k.endswith('_requirements')}
setup(
    version=cfg['version'], install_requires=cfg['requirements'].split(), extras_require=extras,
    packages=find_packages(include=[cfg['lib_name'], cfg['lib_name']+'.*']), include_package_data=True,
    entry_points=dict(console_scripts=cfg['console_scripts'].split(),  # a table in pyproject.toml would hide these
                      nbdev=[f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]),
)
