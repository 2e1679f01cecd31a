"""The key sets of older projects' recipes, with values as their authors write them."""

_ZEPHYR_ERA = """
bf16: true
beta: 0.01
do_eval: true
evaluation_strategy: steps
eval_steps: 10000
gradient_accumulation_steps: 8
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: False
hub_model_id: some-model
learning_rate: 1.0e-6
log_level: info
logging_steps: 10
lr_scheduler_type: cosine
max_length: 2048
max_prompt_length: 1800
num_train_epochs: 2
optim: adamw_torch
output_dir: outputs/some-model
per_device_train_batch_size: 2
per_device_eval_batch_size: 8
push_to_hub: false
save_strategy: "steps"
save_steps: 10000
save_total_limit: 1
seed: 42
warmup_ratio: 0.1
"""

_MIXER = """
dataset_mixer:
  somebody/preferences: 1.0
dataset_splits:
- train_prefs
- test_prefs
preprocessing_num_workers: 12
"""

WPO = "model_name_or_path: some/model\ntorch_dtype: null\n" + _MIXER + _ZEPHYR_ERA + 'report_to: "none"\n'

HANDBOOK = """
model_name_or_path: some/model
torch_dtype: null
dataset_mixture:
  datasets:
    - id: somebody/preferences
      config: default
      split: train_prefs
      columns:
        - chosen
        - rejected
      weight: 1.0
    - id: somebody/preferences
      config: default
      split: test_prefs
      columns:
        - chosen
        - rejected
      weight: 1.0
  test_split_size: 2000
  seed: 0
dataset_num_proc: 12
""" + _ZEPHYR_ERA.replace("evaluation_strategy", "eval_strategy").replace("push_to_hub: false", "push_to_hub: true")

HANDBOOK_MIXER = (
    "model_name_or_path: some/model\n"
    + _MIXER
    + _ZEPHYR_ERA
    + "use_flash_attention_2: false\nhub_strategy: end\nloss_type: sigmoid\n"
)

HANDBOOK_QLORA = (
    """
model_name_or_path: some/model
torch_dtype: bfloat16
use_peft: true
load_in_4bit: true
lora_r: 128
lora_alpha: 128
lora_dropout: 0.05
lora_target_modules:
- q_proj
- k_proj
- v_proj
"""
    + _MIXER
    + _ZEPHYR_ERA.replace("adamw_torch", "paged_adamw_32bit")
)

HANDBOOK_APO = """
model_name_or_path: some/model
model_revision: some-branch
torch_dtype: bfloat16
trust_remote_code: true
dataset_mixture:
  datasets:
    - id: somebody/preferences
      config: Preference
      split: train_prefs
      columns:
        - chosen
        - rejected
        - prompt
        - chat_template_kwargs
      weight: 0.5
dataset_num_proc: 12
bf16: true
do_eval: false
eval_strategy: 'no'
gradient_accumulation_steps: 2
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: true
output_dir: outputs/some-model
run_name: some-run
hub_strategy: every_save
learning_rate: 1.0e-06
log_level: info
logging_steps: 1
logging_strategy: steps
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs:
  min_lr_rate: 0.1
max_grad_norm: 0.2
beta: 0.05
loss_type: apo_zero
max_length: 24576
num_train_epochs: 1
overwrite_output_dir: true
per_device_train_batch_size: 1
push_to_hub: true
padding_free: true
save_strategy: steps
save_steps: 0.5
save_total_limit: 1
seed: 42
warmup_ratio: 0.1
"""

SIMPO = (
    """
model_name_or_path: some/model
torch_dtype: null
attn_implementation: flash_attention_2
gamma_beta_ratio: 0.3
run_name: some-run
"""
    + _MIXER
    + _ZEPHYR_ERA.replace("beta: 0.01", "beta: 10").replace("save_total_limit: 1", "save_total_limit: 20")
    + "report_to:\n- none\n"
)

SIMPO_GEMMA = SIMPO.replace("flash_attention_2", "eager") + (
    "chat_template: \"{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    '{% if add_generation_prompt %}<assistant>{% endif %}"\n'
)

SPPO = (
    "model_name_or_path: some/model\ntorch_dtype: null\nloss_type: rpo\n"
    + _MIXER
    + _ZEPHYR_ERA.replace("do_eval: true", 'do_eval: "no"')
    .replace("evaluation_strategy: steps", 'evaluation_strategy: "no"')
    .replace('save_strategy: "steps"\nsave_steps: 10000', 'save_strategy: "epoch"')
    .replace("num_train_epochs: 2", "num_train_epochs: 6")
)

# name -> (command, recipe, overrides that are neither model, data nor hardware but belong to the original's own launch
# script)
RECIPES = {
    "wpo": ("wpo", WPO, []),
    "handbook": ("dpo", HANDBOOK, []),
    "handbook-mixer": ("dpo", HANDBOOK_MIXER, []),
    "handbook-apo": ("dpo", HANDBOOK_APO, ["--model_revision=main"]),
    "simpo": ("dpo", SIMPO, []),
    "simpo-gemma": ("dpo", SIMPO_GEMMA, []),
    "sppo": (
        "sppo",
        SPPO,
        ["--loss_type=sppo", "--beta=0.001", "--optim=rmsprop", "--learning_rate=5.0e-7", "--num_train_epochs=1"],
    ),
}
