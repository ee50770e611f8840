"""The unit tests that `make test-fast` leaves out: a test is listed if it takes 2 seconds or more of CPU time."""

from __future__ import annotations

# By file below tests/unit/, without the parameters of tests. `make test ARGS="tests/unit --durations=50"` measures them.
SLOW = {
    "peft_prefix_ext/architectures/test_encoder_decoder_adapters.py": ["test_seq2seq_trainer_trains_and_generates"],
    "peft_prefix_ext/attention/test_attention_functions.py": [
        "test_flex_attention",
        "test_flex_attention_of_rows_with_prefixes_of_their_own",
        "test_flex_attention_with_windows",
    ],
    "peft_prefix_ext/base_model/test_offloaded.py": ["test_as_elsewhere"],
    "peft_prefix_ext/checkpoint/test_atomic_save.py": ["test_what_is_left_is_the_old_adapter_or_the_new_one"],
    "peft_prefix_ext/checkpoint/test_format_properties.py": ["test_any_config_value"],
    "peft_prefix_ext/checkpoint/test_hub.py": [
        "test_a_revision_is_the_one_that_was_asked_for",
        "test_a_revision_that_is_not_there_is_refused",
    ],
    "peft_prefix_ext/cli/test_cli.py": [
        "test_as_a_module_and_without_heavy_imports",
        "test_export_import_compose_verify",
    ],
    "peft_prefix_ext/cli/test_run.py": ["test_what_it_is_for"],
    "peft_prefix_ext/conversion/test_stock_peft.py": ["test_stock_peft_alone_loads_every_export"],
    "peft_prefix_ext/initialization/test_initialization.py": [
        "test_exact_at_step_0_and_saved_without_its_source",
        "test_reports",
    ],
    "peft_prefix_ext/injection/test_threads.py": [
        "test_a_loaded_prefix",
        "test_each_thread_has_rows_of_its_own",
        "test_one_prefix",
    ],
    "peft_prefix_ext/test_registration.py": [
        "test_any_first_import_registers",
        "test_peft_loads_our_adapters_after_a_bare_import",
        "test_reading_checkpoints_imports_neither_peft_nor_transformers_nor_vllm",
    ],
    "peft_prefix_ext/tuner/test_learning_rate.py": [
        "test_what_the_trainer_takes_by_default",
        "test_what_trl_takes_by_default",
    ],
    "vllm_plugin/patches/test_install.py": ["test_without_adapters_nothing_changes"],
}


def is_slow(nodeid: str) -> bool:
    """Returns whether a test is listed."""
    file, _, test = nodeid.partition("[")[0].partition("::")
    return test.rpartition("::")[2] in SLOW.get(file.partition("tests/unit/")[2], [])
