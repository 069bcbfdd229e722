"A notebook-first research kit for LoRA fine-tuning of language models"
__version__ = "0.1.0"

from typing import TYPE_CHECKING

from .config import (
    DataSource, LoRAConfig, PreferenceConfig, PresetConfigs, RewardConfig, TrainingConfig, show_config, show_presets
)

if TYPE_CHECKING:  # for editors and type checkers; at run time these names are imported when they are asked for
    from .core.machine import kept_folder
    from .data import create_sample_data, load_training_data, prepare_dataset, save_rows
    from .inference.exam import compare_answers
    from .inference.generate import answers, load_for_chat
    from .inference.merging import merge_run
    from .preference import PreferenceTrainer
    from .rewards.check import check_rewards
    from .rewards.trainer import RewardTrainer
    from .runs.pipeline import RunResult, finetune
    from .runs.run import Run
    from .runs.verify import verify_resume
    from .study.report import report
    from .study.sweep import sweep
    from .trainer import LoRATrainer, train_from_meta
    from .ui.board import answers_table, board_figure
    from .ui.form import choose_config
    from .ui.inspect import inspect_data
    from .ui.live import train_live

_lazy = dict(
    LoRATrainer='trainer', train_from_meta='trainer', PreferenceTrainer='preference',
    RewardTrainer='rewards.trainer', check_rewards='rewards.check',
    create_sample_data='data', load_training_data='data', prepare_dataset='data', save_rows='data',
    answers='inference.generate', load_for_chat='inference.generate', compare_answers='inference.exam',
    merge_run='inference.merging', kept_folder='core.machine',
    Run='runs.run', RunResult='runs.pipeline', finetune='runs.pipeline', verify_resume='runs.verify',
    report='study.report', sweep='study.sweep',
    answers_table='ui.board', board_figure='ui.board', choose_config='ui.form', inspect_data='ui.inspect',
    train_live='ui.live',
)
__all__ = [
    'DataSource', 'LoRAConfig', 'LoRATrainer', 'PreferenceConfig', 'PreferenceTrainer', 'PresetConfigs',
    'RewardConfig', 'RewardTrainer', 'Run', 'RunResult', 'TrainingConfig', 'answers', 'answers_table',
    'board_figure', 'check_rewards', 'choose_config', 'compare_answers', 'create_sample_data', 'finetune',
    'inspect_data', 'kept_folder', 'load_for_chat', 'load_training_data', 'merge_run', 'prepare_dataset',
    'report', 'save_rows', 'show_config', 'show_presets', 'sweep', 'train_from_meta', 'train_live',
    'verify_resume',
]


def __getattr__(name: str):
    "Import what needs torch, transformers or datasets only when it is asked for"
    if name not in _lazy:
        raise AttributeError(f"module 'sage_finetune' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f'.{_lazy[name]}', __name__), name)


def __dir__():
    return sorted([*globals(), *_lazy])
