"""Which parameters of a test are tried in every run, and which in the sweep alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest


def some(values: Iterable[Any], first: int) -> list[Any]:
    """Mark all values but the first few for the sweep."""
    return [
        value if index < first else pytest.param(value, marks=pytest.mark.sweep)
        for index, value in enumerate(values)
    ]


def thin(items: Iterable[pytest.Item]) -> None:
    """Mark most cases of the tests that take longest for the sweep, so that a run of all tests ends within minutes."""
    seen: Counter[str] = Counter()
    for item in items:
        test = item.nodeid.partition("[")[0].removeprefix("tests/")
        if test in _SHARES and item.get_closest_marker("sweep") is None:
            share = _SHARES[test]
            if not share or seen[test] % share:
                item.add_marker(pytest.mark.sweep)
            seen[test] += 1


_THIRD = """
system/test_constructor.py::test_a_saved_model_is_made_again
methods/test_probabilities.py::test_rsc_looks_at_what_stands_before
system/trainers/test_transformers.py::test_class_maps_where_a_module_holds_map_and_pooling
system/trainers/test_transformers.py::test_members_in_an_output_that_keeps_its_class
unit/graph/runtime/test_labels.py::test_compiled_code_refuses_what_is_no_class
system/contract/test_alone.py::test_evaluation
system/contract/test_alone.py::test_taking_it_off
system/contract/test_alone.py::test_training
system/contract/test_alone.py::test_what_it_leaves_alone
unit/cli/test_merging.py::test_a_run_of_timms_script
system/contract/test_copies.py::test_a_stack_copied_in_other_ways
system/contract/test_heads.py::test_head_rewrite
system/contract/test_members.py::test_members
system/contract/test_refusals.py::test_backbones_that_do_not_have_what_it_takes
system/contract/test_rsc_runs.py::test_both_scopes_are_drawn_in_one_graph
system/contract/test_taps.py::test_taps
system/faults/test_acts.py::test_an_interruption_at_some_lines
system/faults/test_damaged.py::test_a_load_that_fails_half_way_in
system/faults/test_damaged.py::test_looking_draws_nothing_and_fires_no_hook
system/faults/test_work.py::test_an_interruption
unit/graph/structure/heads/test_classified.py::test_features_are_refused
unit/graph/structure/test_dense.py::test_selfnorm_replaces_what_all_later_layers_see
unit/graph/structure/test_joins.py::test_joins_of_well_known_models
unit/graph/structure/test_positions.py::test_the_usual_position_is_that_of_the_networks_blocks
methods/crossnorm/test_patch.py::test_every_crop_trains
methods/crossnorm/test_patch.py::test_neutral_settings_draw_nothing_and_change_no_bit
methods/gam/test_errors.py::test_the_taps_that_the_error_proposes_can_be_merged
methods/gam/test_matching.py::test_it_merges_exactly
methods/mixmo/test_replaced.py::test_a_replaced_layer_is_noticed_before_a_pass
methods/rsc/test_captured.py::test_it_predicts_what_the_model_does
methods/rsc/test_default.py::test_branches_that_are_stacked_mix_no_tokens
methods/selfnorm/test_patch.py::test_the_start_changes_no_bit_and_then_trains
methods/selfnorm/test_patch.py::test_units_on_tokens_that_no_prediction_reads_are_left_out
unit/test_api.py::test_a_failure_at_any_site_leaves_everything_as_it_was
unit/test_api.py::test_several_or_all_come_off_at_once
system/test_leaks.py::test_again_and_again_keeps_nothing
methods/test_presets.py::test_a_network_of_another_structure_is_named
unit/io/test_backbone_weights.py::test_what_the_readme_says_of_strict_loading
unit/test_training_loss.py::test_a_teacher_in_training_mode_has_no_share_in_the_loss
system/test_threads.py::test_threads_evaluate_one_model
unit/graph/runtime/test_loss_watch.py::test_what_follows_no_schedule
system/trainers/test_transformers.py::test_a_classifier_in_the_stock_trainer
system/trainers/test_transformers.py::test_keywords_that_a_layer_does_not_use
methods/mixmo/test_training_parity.py::test_five_steps_of_the_release
methods/test_preset_places.py::test_a_preset_is_what_was_published
"""
_FOURTH = """
project/test_imports.py::test_names_are_found_in_every_way
methods/mixmo/test_runs.py::test_compiles_once_in_both_modes
unit/graph/structure/heads/test_tail_layer.py::test_linear_tails
unit/io/test_save_load.py::test_a_damaged_file_leaves_the_model_alone
unit/graph/runtime/test_labels.py::test_a_compiled_loss_of_an_output_that_it_was_not_compiled_for
unit/adaptation/test_checkpoint.py::test_a_checkpoint_that_is_not_whole_changes_nothing
unit/adaptation/test_streams.py::test_a_stream_is_found_again
system/contract/test_devices.py::test_nothing_mixes_devices_or_waits_for_one
system/contract/test_empty.py::test_an_empty_batch_passes
system/contract/test_exporters.py::test_onnxruntime_computes_the_same
system/contract/test_loops.py::test_a_loop
system/contract/test_tools.py::test_activation_checkpointing
system/contract/test_tools.py::test_autocast
system/contract/test_tools.py::test_channels_last
system/contract/test_tools.py::test_compiled_in_one_graph
system/contract/test_tools.py::test_exported
system/contract/test_tools.py::test_models_of_another_precision
system/contract/test_wrappers.py::test_stochastic_weight_averaging
system/faults/test_damaged.py::test_a_malformed_recipe
system/faults/test_disk.py::test_a_checkpoint_on_a_full_disk
system/faults/test_disk.py::test_a_save_to_a_full_disk
unit/graph/structure/test_dense.py::test_layers_of_every_form
unit/graph/structure/test_onward.py::test_every_gate_reaches_the_logits_and_no_more_are_left_out
unit/graph/structure/heads/test_pooling.py::test_the_pooled_map_is_the_last_before_the_average
unit/graph/structure/test_rest_of_network.py::test_the_rest_computes_what_the_network_does
unit/graph/tracing/test_editing.py::test_checkpointing_switched_on_before_or_after
unit/graph/tracing/test_regions.py::test_a_patched_forward_sets_what_the_bare_one_sets
unit/graph/tracing/test_regions.py::test_what_a_graph_would_not_do_again_is_refused_and_undone
methods/crossnorm/test_patch.py::test_errors
methods/diversification/test_norms.py::test_an_activation_in_a_norm_is_said_and_trains_no_statistics_of_positions
methods/diversification/test_norms.py::test_norms_have_the_statistics_of_the_pooled_vector
methods/gam/test_patch.py::test_losses_are_those_of_the_functions
methods/gam/test_source.py::test_a_layer_that_is_replaced_afterwards
methods/gam/test_source.py::test_weights_that_come_after_patching_are_the_source
methods/mixmo/test_replaced.py::test_members_follow_a_layer_with_the_same_weights
methods/mixmo/test_start.py::test_evaluation_starts_as_the_bare_network
methods/rsc/test_patch.py::test_layouts_agree
methods/test_hooks.py::test_rsc_looks_ahead_through_hooks
methods/test_signals.py::test_a_signal_is_a_map_of_height_one
system/test_adapters.py::test_copies_of_a_patched_model_with_adapters_have_its_placements
unit/graph/runtime/test_labels.py::test_compiled_code_refuses_what_is_no_class
system/test_leaks.py::test_a_deleted_model_is_freed_at_once
unit/io/test_backbone_weights.py::test_stock_weights_are_taken_up_and_own_ones_stay
unit/graph/runtime/test_loss_watch.py::test_an_optimiser_from_before_the_patch
system/trainers/test_dense.py::test_dense_predictors
system/trainers/test_timm.py::test_labels_progress_loss_and_optimiser
system/trainers/test_transformers.py::test_a_classifier_that_computes_its_own_loss
system/trainers/test_transformers.py::test_accumulated_gradients_are_those_of_one_batch
"""
_NONE = """
methods/crossnorm/test_losses.py::test_a_step_compares_with_probability_p
methods/crossnorm/test_losses.py::test_without_the_last_unit_the_pooled_features_keep_their_own_statistics
methods/crossnorm/test_patch.py::test_a_crop_of_tokens
methods/crossnorm/test_patch.py::test_copies_act_alike_and_apart
methods/crossnorm/test_patch.py::test_exactly_the_active_number_is_on_with_probability_p
methods/crossnorm/test_patch.py::test_layers_narrow_and_override
methods/crossnorm/test_training_parity.py::test_five_steps_with_consistency
methods/gam/test_networks.py::test_dense_prediction
methods/mixmo/test_criteria.py::test_a_model_and_its_loss_compile_in_one_graph
methods/mixmo/test_input.py::test_own_pairs_compile
methods/mixmo/test_masks.py::test_drawing_and_mixing_compile_in_one_graph
methods/mixmo/test_runs.py::test_others_see_the_labels_of_the_mixtures_in_one_graph
methods/rsc/test_default.py::test_stage_numbers_count_what_the_logits_read
methods/rsc/test_scope.py::test_more_classes_than_channels_compile
methods/selfnorm/test_patch.py::test_a_block_behind_which_a_class_token_alone_is_read_is_refused
methods/selfnorm/test_patch.py::test_the_authors_start_warns_on_a_trained_network_once
methods/taps/test_everywhere.py::test_compiled_passes_that_nobody_fetches_from_do_not_recompile
project/test_examples.py::test_an_example_runs
system/benchmarks/test_overhead.py::test_a_measurement_goes_on_and_is_not_repeated
system/benchmarks/test_overhead.py::test_beside_hooks_by_hand
system/benchmarks/test_studies.py::test_the_engine_is_measured_beside_a_bare_loop
system/benchmarks/test_zoo.py::test_an_architecture
system/contract/test_rsc_runs.py::test_start_recompiles_once_and_then_mutes
system/contract/test_tools.py::test_onnx_is_that_of_the_bare_model
system/faults/test_disk.py::test_a_killed_process
system/faults/test_names.py::test_layers_that_are_called_as_grafts_are_stay
system/properties/test_odd.py::test_most_cases_are_compared
system/test_threads.py::test_another_thread_runs_models_while_one_patches
system/trainers/test_dense.py::test_the_backbone_of_a_detector
system/trainers/test_dense.py::test_what_a_detector_refuses
system/trainers/test_timm.py::test_from_training_over_merging_to_validation
system/trainers/test_transformers.py::test_where_rsc_goes_by_default
system/zoo/test_invariants.py::test_what_no_logit_reads_is_seen
unit/bench/test_overhead.py::test_compiled_networks_are_all_compiled
unit/bench/test_overhead.py::test_measures_another_way_to_the_same
unit/cli/test_commands.py::test_bench_says_how_far_it_is_and_how_long_it_takes_where_no_bar_can_be_drawn
unit/cli/test_commands.py::test_what_is_suggested_for_small_images_and_for_large_ones
unit/cli/test_merging.py::test_a_wrapped_runs_averaged_weights
unit/cli/test_pictures.py::test_classes_are_shown_by_their_names
unit/cli/test_pictures.py::test_pictures_of_a_model_in_training
unit/cli/test_pictures.py::test_selfnorm_shows_its_gates
unit/comparison/test_demo.py::test_a_line_that_does_not_hold_is_marked
unit/comparison/test_demo.py::test_the_surgery_holds_and_the_pairs_are_compared
unit/comparison/test_experiment.py::test_corruptions_are_the_same_for_both_of_a_pair
unit/graph/grafting/test_lookup.py::test_a_large_patched_model_costs_no_more_than_a_small_one
unit/graph/grafting/test_planning.py::test_two_grafts_in_dense_blocks_call_every_unit_once
unit/graph/runtime/test_labels.py::test_a_compiled_step_compares_labels_as_it_runs
unit/graph/runtime/test_labels.py::test_compiled_code_leaves_the_comparison_to_python_where_it_cannot_tell_the_pass
unit/graph/runtime/test_labels.py::test_compiled_passes_refuse_where_the_loop_is_ahead
unit/graph/runtime/test_labels.py::test_compiled_passes_remember_their_labels
unit/graph/runtime/test_labels.py::test_labels_that_a_compiled_step_writes_to_are_compared
unit/graph/structure/test_dense.py::test_both_together_in_either_order_and_taken_off
unit/graph/structure/test_joins.py::test_an_adapter_is_no_join
unit/graph/structure/test_sites.py::test_every_second_tensor_that_is_listed_can_be_patched
unit/graph/tracing/test_compile.py::test_attention_biases_of_timm_are_computed_anew
unit/io/test_hub.py::test_without_a_network
unit/test_extend.py::test_an_installed_package_brings_its_methods
unit/test_training_loss.py::test_a_segmentation_model_with_an_auxiliary_head
"""
_SHARES = {
    **dict.fromkeys(_THIRD.split(), 3),
    **dict.fromkeys(_FOURTH.split(), 4),
    **dict.fromkeys(_NONE.split(), 0),
}
"""Of which tests one case in so many is tried in every run, the first among them; 0 is none."""
