"""What the names of transformers, TRL, PEFT, bitsandbytes, LLaMA-Factory and Axolotl mean.

A name is a synonym of a setting, has values that mean another setting, needs nothing here, or is
refused with the way out. tests/test_names.py holds the libraries' own dataclasses against this.
"""

from collections import defaultdict
from fnmatch import fnmatchcase

from support.errors import UserError

# names that mean the same: a setting, and what others call it
SYNONYMS = """
model: model_name_or_path model_name model_id base_model pretrained_model_name_or_path
revision: model_revision
data: dataset dataset_name train_file data_path repo_ds
eval_data: eval_dataset eval_file validation_file
val_size: val_set_size test_size
max_samples: data_subset train_sample_size max_train_samples
max_eval_samples: eval_sample_size
dtype: torch_dtype
max_length: cutoff_len max_seq_length max_seq_len sequence_len
lora_r: lora_rank r rank
lora_alpha: alpha
lora_dropout: dropout
target_modules: lora_target_modules lora_target
modules_to_save: lora_modules_to_save additional_target
num_train_epochs: num_epochs epochs
per_device_train_batch_size: micro_batch_size train_batch_size batch_size
learning_rate: lr
lr_scheduler_type: lr_scheduler scheduler
optim: optimizer
max_grad_norm: gradient_clipping
gradient_checkpointing: activation_checkpointing use_gradient_checkpointing
eval_strategy: evaluation_strategy
early_stopping_patience: early_stopping_steps
resume: resume_from_checkpoint
attn_implementation: flash_attn
bnb_4bit_quant_type: quant_type
bnb_4bit_use_double_quant: double_quantization use_double_quant use_bnb_nested_quant
bnb_4bit_compute_dtype: compute_dtype
beta: pref_beta
loss_type: pref_loss
rpo_alpha: pref_ftx
desirable_weight: kto_chosen_weight kto_desirable_weight
undesirable_weight: kto_rejected_weight kto_undesirable_weight
ref_model: ref_model_name_or_path
adapter: adapter_name_or_path
hub_model_id: push_to_hub_model_id
report_to: log_with
run_name: wandb_name
"""
ALIASES: dict[str, str] = {}
for line in SYNONYMS.strip().splitlines():
    name, others = line.split(": ")
    ALIASES |= dict.fromkeys(others.split(), name)

# values that mean another setting or value: name, values (* is any) -> setting, value (* is it)
# $NAME is an environment variable; nothing behind the arrow: the default
TRANSLATIONS = """
bf16 true -> dtype bfloat16
fp16 true -> dtype float16
bf16|fp16 false|auto|none ->
dtype|bnb_4bit_compute_dtype bf16|torch.bfloat16 -> = bfloat16
dtype|bnb_4bit_compute_dtype fp16|half|torch.float16 -> = float16
dtype|bnb_4bit_compute_dtype fp32|float|torch.float32 -> = float32
attn_implementation fa2|true|flash_attention*|kernels-community/* -> = flash
attn_implementation false|disabled|none -> = sdpa
flash_attention|use_flash_attention_2 true -> attn_implementation flash
sdp_attention true -> attn_implementation sdpa
eager_attention true -> attn_implementation eager
target_modules all -> = all-linear
lora_target_linear true -> target_modules all-linear
use_peft false -> lora_r 0
use_peft true ->
stage|rl kto -> loss_type kto
rl ipo|orpo|simpo -> loss_type *
rl dpo ->
finetuning_type full -> lora_r 0
finetuning_type lora ->
adapter lora ->
adapter qlora -> load_in_4bit true
quantization_bit 4 -> load_in_4bit true
gradient_checkpointing unsloth|offload -> = true
use_cpu|no_cuda true -> device cpu
use_cpu|no_cuda|lora_target_linear|flash_attention|use_flash_attention_2 false|none ->
sdp_attention|eager_attention|project|wandb_project|trackio_project false|none ->
hub_token|hf_token|push_to_hub_token|cot_prob false|none ->
warmup_steps 0.*[1-9]* -> warmup_ratio *
warmup_ratio|eval_steps|loss_type none ->
resume true|none -> = auto
resume false -> = never
save_strategy|eval_strategy false -> = no
hub_strategy checkpoint|all_checkpoints -> = every_save
init_lora_weights none -> = true
cot_prob * -> recipe_args {"cot": *}
hub_token|hf_token|push_to_hub_token * -> $HF_TOKEN *
project|wandb_project * -> $WANDB_PROJECT *
trackio_project * -> $TRACKIO_PROJECT *
"""
MEANINGS = defaultdict(list)  # {name: [(values, setting, value)]}
for line in TRANSLATIONS.strip().splitlines():
    left, _, right = line.partition(" ->")
    others, values = left.split()
    for name in others.split("|"):
        MEANINGS[name].append((values.split("|"), *right.replace("=", name).split(maxsplit=1)))

# {why nothing needs to be set here: names}. A name may have a value that goes without saying,
# beside those in OFF; any other is answered with the reason
ANSWERS = {
    "rows are packed without padding, and a token sees its own row alone": """
        packing packing_strategy=bfd eval_packing padding_free pad_to_multiple_of group_by_length
        pad_to_sequence_len sample_packing eval_sample_packing neat_packing pad_token
        train_sampling_strategy=random length_column_name=length""",
    "memory depends on micro_batch_tokens, which is halved where it runs out": """
        auto_find_batch_size per_device_eval_batch_size=8 eval_batch_size eval_accumulation_steps
        torch_empty_cache_steps""",
    "the loss never holds all logits; a step's scored tokens divide it once": """
        use_liger_kernel liger_kernel_config unsloth use_unsloth use_logits_to_keep
        average_tokens_across_devices=true""",
    "rows are rendered once, kept on disk, and drawn from there by seed": """
        dataloader_num_workers dataloader_pin_memory=true dataloader_persistent_workers
        dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order=true
        dataset_num_proc preprocessing_num_workers overwrite_cache remove_unused_columns=true
        shuffle_dataset dataset_prepared_path""",
    "the last step of an epoch takes the rows that are left": "dataloader_drop_last drop_last",
    "the reference is scored once, before training": """
        precompute_ref_log_probs precompute_ref_batch_size""",
    "a checkpoint's code is never run": "trust_remote_code",
    "recomputing a block needs no choice": """
        gradient_checkpointing_kwargs activation_checkpointing_kwargs use_cache""",
    "uncompiled: on a CPU 4 % of a step was won, for minutes of compilation": """
        torch_compile torch_compile_backend torch_compile_mode""",
    "4-bit weights are bitsandbytes' uint8": """
        bnb_4bit_quant_storage=uint8 quantization_method llm_int8_threshold=6.0
        llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight""",
    "the command says what is trained": """
        do_train do_eval do_predict stage task_type=causal_lm lora_task_type=causal_lm
        peft_type=lora inference_mode auto_mapping peft_version runtime_config model_type
        tokenizer_type""",
    "the embedding and a head that is tied to it train together": "ensure_weight_tying",
    "template and special tokens are the checkpoint's own": """
        chat_template_path chat_template template eos_token special_tokens use_fast_tokenizer""",
    "max_length bounds a row; the start of its prompt gives way, never its answer": """
        truncation_mode=keep_end max_prompt_length max_completion_length""",
    "the log is what it is": """
        log_level=passive log_level_replica=warning log_on_each_node=true disable_tqdm plot_loss
        logging_nan_inf_filter=true include_num_input_tokens_seen=no skip_memory_metrics=true""",
    "an evaluation comes before the first step, and gives the loss and the rows' metrics": """
        eval_on_start=true include_for_metrics batch_eval_metrics prediction_loss_only
        eval_do_concat_batches=true eval_use_gather_object""",
    "a checkpoint is safetensors and all that an exact resume needs": """
        save_safetensors=true save_on_each_node enable_jit_checkpoint ignore_data_skip
        restore_callback_states_from_checkpoint full_determinism hub_always_push""",
    "dtype decides": "tf32 bf16_full_eval fp16_full_eval half_precision_backend fp16_opt_level=o1",
    "torchrun --nproc_per_node N, in front of the script, sets this": """
        local_rank=-1 ddp_backend ddp_timeout=1800 ddp_find_unused_parameters ddp_bucket_cap_mb
        ddp_broadcast_buffers ddp_static_graph accelerator_config parallelism_config device_map""",
    "torchrun, in front of the script, divides the work, and --sharding base the weights": """
        deepspeed deepspeed_config""",
}
# {the way out: names that are refused}, unless their value is OFF or the one behind the name
REFUSALS = {
    "torchrun --nproc_per_node N, in front of the script, takes its place": """
        fsdp fsdp_config tensor_parallel_size""",
    "nothing is generated while preferences are trained": "use_vllm generate_during_eval",
    "--load_in_4bit is what there is": "load_in_8bit llm_int8_skip_modules quantization_bit",
    "write it behind the source, as org/name:config:split or file@weight": """
        dataset_config dataset_train_split=train dataset_test_split=test dataset_dir=data datasets
        cv_weight arxiv_weight interleave_probs""",
    "--recipe reads a data set's own columns": "dataset_text_field=text dataset_kwargs",
    "a set is read whole, onto disk; --max_samples draws from it": """
        dataset_streaming streaming buffer_size""",
    "README.md's `Where to change what` has a teacher's loss": "teacher_model_name_or_path",
    "--init_lora_weights names a start": """
        loftq_config eva_config corda_config lora_ga_config velora_config layer_replication""",
    "steps are counted: --logging_steps, --eval_steps, --save_steps": """
        logging_strategy=steps saves_per_epoch evals_per_epoch eval_delay""",
    "--seed draws all": "data_seed",
    "it has no counterpart here; leave it out": """
        optim_args optim_target_modules label_smoothing_factor label_names router_aux_loss_coef
        sync_ref_model ref_model_mixup_alpha=0.6 ref_model_sync_steps=512 ref_adapter_name
        model_adapter_name model_init_kwargs lora_target_parameters target_parameters
        ignore_bias_buffers fan_in_fan_out layers_pattern=layers megatron_config
        megatron_core=megatron.core alora_invocation_tokens use_qalora qalora_group_size=16
        monteclora_config lora_bias use_bdlora arrow_config kasa_config trackio_space_id
        trackio_bucket_id trackio_static_space_id hub_revision base_model_name_or_path debug
        finetuning_type bf16 fp16 use_peft""",
}
OFF = {"", "none", "null", "false", "no", "0", "0.0", "[]", "{}", "auto"}


def usual_values(table):
    """{name: (reason, the value that goes without saying, or '')} of ANSWERS or REFUSALS."""
    reasons = {}
    for reason, names in table.items():
        for word in names.split():
            name, _, value = word.partition("=")
            reasons[name] = reason, value
    return reasons


ANSWERED, REFUSED = usual_values(ANSWERS), usual_values(REFUSALS)
REASONS = ANSWERED | REFUSED
FOREIGN = MEANINGS.keys() | REASONS.keys()  # beside synonyms


def translate(name, value, notices):
    """{setting: value} that a name with this value means: itself, another one, several, or none.

    Appends to notices {reason: names} what the user should know. UserError: it is refused.
    """
    word = str(value[0] if isinstance(value, list) and len(value) == 1 else value)
    for values, *meaning in MEANINGS.get(name, ()):
        if any(fnmatchcase(word.lower(), pattern) for pattern in values):
            if not meaning:
                if word.lower() not in OFF:
                    notices["as by default"].append(f"{name} {word}")
                return {}
            setting, result = meaning[0], meaning[1].replace("*", word)
            if setting != name and not setting.startswith("$"):
                notices[f"{setting} {result}"].append(f"{name} {word}")
            return {setting: result}
    if name not in REASONS:
        return {name: value}
    reason, usual = REASONS[name]
    if word.lower() == usual or (word.lower() in OFF and usual != "true"):
        return {}
    if name in REFUSED:
        raise UserError(f"{name} {word[:40]}: {reason}")
    notices[reason].append(name)
    return {}
