"""The unit tests that `make test-fast` leaves out: a test is listed if it takes 2 seconds or more of CPU time."""

from __future__ import annotations

# By file below tests/unit/, without the parameters of tests. `make test ARGS="tests/unit --durations=50"` measures them.
SLOW = {
    "peft_prefix_ext/architectures/test_encoder_decoder_adapters.py": ["test_seq2seq_trainer_trains_and_generates"],
    "peft_prefix_ext/attention/test_attention_functions.py": [
        "test_flex_attention",
        "test_flex_attention_with_adapter_names",
        "test_flex_attention_with_windows",
    ],
    "peft_prefix_ext/base_model/test_offloaded.py": ["test_equals_a_model_in_memory"],
    "peft_prefix_ext/checkpoint/test_atomic_save.py": ["test_a_killed_save_leaves_the_old_or_the_new_adapter"],
    "peft_prefix_ext/checkpoint/test_format_properties.py": ["test_any_config_value"],
    "peft_prefix_ext/checkpoint/test_hub.py": [
        "test_a_revision_is_the_requested_one",
        "test_a_missing_revision_is_refused",
    ],
    "peft_prefix_ext/cli/test_cli.py": [
        "test_as_a_module_and_without_heavy_imports",
        "test_export_import_compose_verify",
    ],
    "peft_prefix_ext/cli/test_run.py": ["test_a_program_that_never_imports_the_package_loads_an_adapter"],
    "peft_prefix_ext/conversion/test_stock_peft.py": ["test_stock_peft_alone_loads_every_export"],
    "peft_prefix_ext/distillation/reporting/test_evaluation.py": [
        "test_a_prefix_of_no_context_recovers_nothing",
        "test_given_references_and_another_metric",
        "test_the_teacher_recovers_all",
    ],
    "peft_prefix_ext/generation/test_vllm_generator.py": ["test_without_vllm_it_says_what_to_install"],
    "peft_prefix_ext/initialization/test_initialization.py": [
        "test_exact_at_step_0_and_saved_without_its_source",
        "test_reports",
    ],
    "peft_prefix_ext/injection/test_threads.py": [
        "test_a_loaded_prefix",
        "test_each_thread_has_its_own_adapter_names",
        "test_one_prefix",
    ],
    "peft_prefix_ext/test_registration.py": [
        "test_any_first_import_registers",
        "test_peft_loads_our_adapters_after_a_bare_import",
        "test_reading_checkpoints_imports_neither_peft_nor_transformers_nor_vllm",
    ],
    "peft_prefix_ext/tuner/test_learning_rate.py": [
        "test_the_default_of_the_trainer_warns",
        "test_the_default_of_trl_warns",
    ],
    "vllm_plugin/adapters/test_folder_index.py": ["test_a_hundred_thousand_entries"],
    "vllm_plugin/adapters/test_fuzzed_folders.py": ["test_any_folder"],
    "vllm_plugin/patches/test_install.py": ["test_without_adapters_nothing_changes"],
    "vllm_plugin/worker/test_device_memory.py": ["test_a_gpu_worker_is_patched_when_it_is_imported"],
    "vllm_plugin/test_torchvision_on_cpu.py": ["test_torchvision_imports", "test_without_it_torchvision_fails"],
}


def is_slow(nodeid: str) -> bool:
    """Returns whether a test is listed."""
    file, _, test = nodeid.partition("[")[0].partition("::")
    return test.rpartition("::")[2] in SLOW.get(file.partition("tests/unit/")[2], [])
