import json
from pathlib import Path

import pytest

from fireflyds import app
from fireflyds.config import Precision
from fireflyds.errors import UserError
from fireflyds.zero import ds_config, import_json

# As found in projects that train with the Hugging Face Trainer.
HF_PROJECT_CONFIG = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 16,
    "gradient_clipping": 1.0,
    "steps_per_print": 200,
    "bfloat16": {"enabled": "auto"},
    "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    "elasticity": {"enabled": False},
    "communication_data_type": "fp32",
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "contiguous_gradients": True,
        "stage3_max_live_parameters": 1e9,
        "stage3_gather_fp16_weights_on_model_save": True,
    },
}


def _config(tmp_path: Path, document: dict, *overrides: str):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(document))
    return app.compose(
        "train",
        [
            "run=x",
            "model=a/b",
            "data=c/d",
            "optim.steps=3",
            "zero=stage3",
            "zero.offload_optimizer=cpu",
            f"zero.json={file}",
            *overrides,
        ],
    )


def test_equal_settings_are_dropped_and_others_passed_on(tmp_path: Path) -> None:
    document = HF_PROJECT_CONFIG | {"scheduler": "auto"}
    config = ds_config.build_ds_config(_config(tmp_path, document), Precision.fp32, 4)
    assert config["communication_data_type"] == "fp32"
    zero = config["zero_optimization"]
    assert zero["stage3_gather_16bit_weights_on_model_save"] is True
    assert zero["contiguous_gradients"] is True
    assert zero["stage3_max_live_parameters"] == 1e9
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert not {"optimizer", "scheduler", "elasticity", "bfloat16"} & config.keys()
    assert config["gradient_accumulation_steps"] == 4
    notes = import_json.extra_settings(_config(tmp_path, document))[1]
    assert any("gradient_accumulation_steps is left out: it follows from global_batch_size" in note for note in notes)
    assert any("elasticity is left out: DeepSpeed no longer has it, and it is off" in note for note in notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is not supported. Remove the key; give optim.schedule"),
        (
            {"elasticity": {"enabled": True}},
            "elasticity is not supported. Remove the key; a run resumes on any number of GPUs",
        ),
        ({"amp": {"enabled": True}}, "amp is not supported. Remove the key; use hardware.precision"),
        (
            {"curriculum_learning": {"enabled": True}},
            "curriculum_learning is not supported. Remove the key; use data.curriculum",
        ),
        (
            {"gradient_clipping": 0.3},
            "gradient_clipping=0.3, but optim.max_grad_norm=1.0. Give optim.max_grad_norm=0.3",
        ),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu=4, but micro_batch_size=1"),
        ({"fp16": {"enabled": True}}, "fp16.enabled=True, but hardware.precision=fp32"),
        ({"fp16": {"loss_scale": 128}}, "fp16.loss_scale=128: fireflyds sets that section itself"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type=Lamb, but optim.name=adamw"),
        ({"optimizer": {"params": {"lr": 1e-3}}}, "optimizer.params.lr=0.001, but optim.lr=0.0002"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage=2, but zero.stage=3. Give zero.stage=2"),
        (
            {"zero_optimization": {"mics_shard_size": 8}},
            "mics_shard_size is not supported. Remove the key; use zero_hpz_partition_size",
        ),
        (
            {"zero_optimization": {"cpu_offload": True}},
            "cpu_offload is not supported. Remove the key; give zero.offload_optimizer=cpu",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "device=nvme, but zero.offload_optimizer=cpu",
        ),
    ],
)
def test_conflicting_and_unsupported_keys_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    config = _config(tmp_path, HF_PROJECT_CONFIG | {"scheduler": "auto"} | changes, "hardware.precision=fp32")
    with pytest.raises(UserError) as exception:
        import_json.extra_settings(config)
    assert message in str(exception.value)
    assert str(tmp_path / "ds.json") in str(exception.value)


def test_every_key_that_deepspeed_refuses_is_refused_before_it() -> None:
    from deepspeed.runtime import config as deepspeed_config

    removed = [
        *deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS,
        *(f"zero_optimization.{key}" for key in deepspeed_config._REMOVED_ZERO_CONFIG_KEYS),
    ]
    assert len(removed) > 10
    assert set(removed) <= import_json._REMOVED.keys()


def test_a_missing_json_file_is_refused(tmp_path: Path) -> None:
    config = _config(tmp_path, {})
    (tmp_path / "ds.json").unlink()
    with pytest.raises(UserError, match="ds.json: cannot be read as JSON"):
        import_json.extra_settings(config)


# Sections as the documentations of DeepSpeed, transformers, LLaMA-Factory and Firefly show them.
WARMUP_DECAY = {
    "type": "WarmupDecayLR",
    "params": {"total_num_steps": 1000, "warmup_num_steps": 10, "last_batch_iteration": -1},
}
AUTO_WARMUP = {
    "type": "WarmupLR",
    "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
}
ELASTICITY = {
    "enabled": True,
    "max_train_batch_size": 2000,
    "micro_batch_sizes": [2, 4, 6],
    "min_gpus": 1,
    "max_gpus": 10000,
}
COMPRESSION_TRAINING = {
    "weight_quantization": {"shared_parameters": {"enabled": True}, "different_groups": {"wq1": {"modules": ["a"]}}}
}
DATA_EFFICIENCY = {
    "enabled": True,
    "seed": 1234,
    "data_sampling": {"enabled": True, "curriculum_learning": {"enabled": True}},
}
CURRICULUM_LEARNING = {
    "enabled": True,
    "curriculum_type": "seqlen",
    "schedule_config": {"total_curriculum_step": 40000},
}


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        (
            "scheduler",
            WARMUP_DECAY,
            "scheduler is not supported. Remove the key; give optim.schedule and optim.warmup_steps",
        ),
        ("elasticity", ELASTICITY, "elasticity is not supported. Remove the key; a run resumes on any number of GPUs"),
        (
            "compression_training",
            COMPRESSION_TRAINING,
            "compression_training is not supported. Remove the key; quantise after training",
        ),
        (
            "data_efficiency",
            DATA_EFFICIENCY,
            "data_efficiency is not supported. Remove the key; use data.weights and data.curriculum",
        ),
        (
            "curriculum_learning",
            CURRICULUM_LEARNING,
            "curriculum_learning is not supported. Remove the key; use data.curriculum",
        ),
    ],
)
def test_unsupported_nested_sections_are_refused_by_name(
    tmp_path: Path, section: str, value: dict, message: str
) -> None:
    with pytest.raises(UserError) as exception:
        import_json.extra_settings(_config(tmp_path, HF_PROJECT_CONFIG | {"scheduler": "auto", section: value}))
    assert message in str(exception.value)


def test_disabled_and_auto_sections_are_dropped_with_a_note(tmp_path: Path) -> None:
    document = HF_PROJECT_CONFIG | {
        "scheduler": AUTO_WARMUP,
        "elasticity": ELASTICITY | {"enabled": False},
        "data_efficiency": DATA_EFFICIENCY | {"enabled": False},
    }
    settings, notes = import_json.extra_settings(_config(tmp_path, document))
    assert not {"scheduler", "elasticity", "data_efficiency"} & settings.keys()
    assert any("scheduler is left out: auto: this configuration sets the value" in note for note in notes)


def test_the_json_of_a_hugging_face_project_is_accepted_unchanged(tmp_path: Path) -> None:
    """Its optimizer, scheduler and batch sizes come from this project's configuration instead of TrainingArguments."""
    settings, _ = import_json.extra_settings(_config(tmp_path, HF_PROJECT_CONFIG | {"scheduler": AUTO_WARMUP}))
    assert set(settings) == {"communication_data_type", "zero_optimization"}
