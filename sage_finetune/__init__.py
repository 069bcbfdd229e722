__version__ = "0.1.0"

from .config import LoRAConfig, PreferenceConfig, PresetConfigs, TrainingConfig

_lazy = dict(LoRATrainer='trainer', PreferenceTrainer='preference', train_from_meta='trainer', prepare_dataset='data', load_training_data='data',
             train_live='ui.live', choose_config='ui.form', Run='runs.run', show_config='core.display', show_presets='core.display',
             finetune='runs.pipeline', RunResult='runs.pipeline')
__all__ = ['LoRAConfig', 'PreferenceConfig', 'PresetConfigs', 'TrainingConfig', *_lazy]

def __getattr__(name):
    "Import what needs torch, transformers or datasets only when it is asked for"
    if name not in _lazy: raise AttributeError(f"module 'sage_finetune' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f'.{_lazy[name]}', __name__), name)

def __dir__(): return sorted([*globals(), *_lazy])
