"""Which parameters of a test are tried in every run, which in the sweep alone, and which by hand alone."""

from __future__ import annotations

import zlib
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
    """Mark most cases of the tests that take longest for the sweep, so that a run of all tests ends within minutes.

    Of the longest of the sweep, most are marked as exhaustive as well: continuous integration leaves these out.
    """
    seen: Counter[str] = Counter()
    for item in items:
        test = item.nodeid.partition("[")[0].removeprefix("tests/")
        if test in _SHARES and item.get_closest_marker("sweep") is None:
            share = _SHARES[test]
            if not share or seen[test] % share:
                item.add_marker(pytest.mark.sweep)
            seen[test] += 1
        swept = test in _SWEPT and item.get_closest_marker("sweep") is not None
        # By name and not by number: neighbours are one network's, and tests of one cell share its patched model.
        if swept and zlib.crc32(item.nodeid.partition("[")[2].encode()) % _SWEPT[test]:
            item.add_marker(pytest.mark.exhaustive)


_TABLE = """
0
  methods/crossnorm/test_losses.py::test_a_step_compares_with_probability_p
  methods/crossnorm/test_losses.py::test_of_several_views_the_clean_images_alone_are_compared
  methods/crossnorm/test_losses.py::test_without_the_last_unit_the_pooled_features_keep_their_own_statistics
  methods/crossnorm/test_patch.py::test_a_crop_of_tokens
  methods/crossnorm/test_patch.py::test_copies_act_alike_and_apart
  methods/crossnorm/test_patch.py::test_dense_and_plain_positions
  methods/crossnorm/test_patch.py::test_exactly_the_active_number_is_on_with_probability_p
  methods/crossnorm/test_patch.py::test_layers_narrow_and_override
  methods/crossnorm/test_patch.py::test_segmentation_models
  methods/crossnorm/test_patch.py::test_the_choice_follows_the_seed
  methods/crossnorm/test_training_parity.py::test_five_steps_with_consistency
  methods/gam/test_networks.py::test_dense_prediction
  methods/gam/test_source.py::test_an_adaptation_that_goes_on_keeps_the_source_and_says_so
  methods/mixmo/test_criteria.py::test_a_model_and_its_loss_compile_in_one_graph
  methods/mixmo/test_input.py::test_own_pairs_compile
  methods/mixmo/test_masks.py::test_drawing_and_mixing_compile_in_one_graph
  methods/mixmo/test_runs.py::test_compiles_once_in_both_modes
  methods/mixmo/test_runs.py::test_others_see_the_labels_of_the_mixtures_in_one_graph
  methods/rsc/test_default.py::test_stage_numbers_count_what_the_logits_read
  methods/rsc/test_scope.py::test_more_classes_than_channels_compile
  methods/rsc/test_training_parity.py::test_five_steps_of_the_release
  methods/selfnorm/test_patch.py::test_a_block_behind_which_a_class_token_alone_is_read_is_refused
  methods/selfnorm/test_patch.py::test_the_authors_start_warns_on_a_trained_network_once
  methods/taps/test_everywhere.py::test_compiled_passes_that_nobody_fetches_from_do_not_recompile
  methods/taps/test_everywhere.py::test_compiled_taps_give_the_eager_values_and_gradients
  project/test_docstrings.py::test_code_in_docstrings_is_an_example_or_runs_elsewhere
  project/test_examples.py::test_an_example_runs
  project/test_imports.py::test_names_are_found_in_every_way
  system/benchmarks/test_overhead.py::test_a_measurement_goes_on_and_is_not_repeated
  system/benchmarks/test_overhead.py::test_beside_hooks_by_hand
  system/benchmarks/test_studies.py::test_the_engine_is_measured_beside_a_bare_loop
  system/benchmarks/test_zoo.py::test_an_architecture
  system/contract/test_rsc_runs.py::test_start_recompiles_once_and_then_mutes
  system/contract/test_tools.py::test_onnx_is_that_of_the_bare_model
  system/faults/test_disk.py::test_a_killed_process
  system/faults/test_names.py::test_layers_that_are_called_as_grafts_are_stay
  system/properties/test_odd.py::test_most_cases_are_compared
  system/properties/test_stacks.py::test_taken_off_in_any_order
  system/test_threads.py::test_another_thread_runs_models_while_one_patches
  system/trainers/test_dense.py::test_the_backbone_of_a_detector
  system/trainers/test_dense.py::test_what_a_detector_refuses
  system/trainers/test_timm.py::test_from_training_over_merging_to_validation
  system/trainers/test_transformers.py::test_members_in_an_output_that_keeps_its_class
  system/trainers/test_transformers.py::test_where_rsc_goes_by_default
  system/zoo/test_invariants.py::test_what_no_logit_reads_is_seen
  unit/bench/test_overhead.py::test_a_report_says_how_memory_was_allocated
  unit/bench/test_overhead.py::test_compiled_networks_are_all_compiled
  unit/bench/test_overhead.py::test_leaves_the_process_as_it_was
  unit/bench/test_overhead.py::test_measures_a_network_of_clips
  unit/bench/test_overhead.py::test_measures_a_patched_model
  unit/bench/test_overhead.py::test_measures_another_way_to_the_same
  unit/cli/test_commands.py::test_bench_prints_a_table_and_writes_the_same_numbers
  unit/cli/test_commands.py::test_bench_says_how_far_it_is_and_how_long_it_takes_where_no_bar_can_be_drawn
  unit/cli/test_commands.py::test_suggestions_are_one_table
  unit/cli/test_commands.py::test_what_is_suggested_for_small_images_and_for_large_ones
  unit/cli/test_merging.py::test_a_wrapped_runs_averaged_weights
  unit/cli/test_pictures.py::test_classes_are_shown_by_their_names
  unit/cli/test_pictures.py::test_crossnorm_shows_the_exchanged_styles
  unit/cli/test_pictures.py::test_panels_of_every_kind_are_drawn
  unit/cli/test_pictures.py::test_pictures_of_a_model_in_training
  unit/cli/test_pictures.py::test_selfnorm_shows_its_gates
  unit/cli/test_pictures.py::test_taps_show_what_is_recorded
  unit/cli/test_pictures.py::test_trained_gates_are_shown_from_a_saved_model
  unit/cli/test_pictures.py::test_untrained_weights_are_written_into_the_picture_and_signs_are_explained
  unit/cli/test_show.py::test_edges_are_clear_of_boxes
  unit/comparison/test_demo.py::test_a_line_that_does_not_hold_is_marked
  unit/comparison/test_demo.py::test_the_surgery_holds_and_the_pairs_are_compared
  unit/comparison/test_experiment.py::test_all_devices_of_a_folder_are_named
  unit/comparison/test_experiment.py::test_corruptions_are_the_same_for_both_of_a_pair
  unit/graph/grafting/test_changed_reads.py::test_compiled_code_sees_numbers_texts_and_lists
  unit/graph/grafting/test_lookup.py::test_a_large_patched_model_costs_no_more_than_a_small_one
  unit/graph/grafting/test_lookup.py::test_a_loss_of_grafts_that_remember_nothing_costs_the_same_for_a_deep_network
  unit/graph/grafting/test_planning.py::test_positions_are_looked_for_once
  unit/graph/grafting/test_planning.py::test_two_grafts_in_dense_blocks_call_every_unit_once
  unit/graph/runtime/test_labels.py::test_a_compiled_loss_of_an_output_that_it_was_not_compiled_for
  unit/graph/runtime/test_labels.py::test_a_compiled_step_compares_labels_as_it_runs
  unit/graph/runtime/test_labels.py::test_a_compiled_training_without_the_loss_is_told_when_the_mode_changes
  unit/graph/runtime/test_labels.py::test_compiled_code_leaves_the_comparison_to_python_where_it_cannot_tell_the_pass
  unit/graph/runtime/test_labels.py::test_compiled_passes_refuse_where_the_loop_is_ahead
  unit/graph/runtime/test_labels.py::test_compiled_passes_remember_their_labels
  unit/graph/runtime/test_labels.py::test_labels_that_a_compiled_step_writes_to_are_compared
  unit/graph/runtime/test_progress_watch.py::test_compiled_passes_are_counted_where_the_loss_is_asked_for
  unit/graph/structure/test_dense.py::test_both_together_in_either_order_and_taken_off
  unit/graph/structure/test_joins.py::test_an_adapter_is_no_join
  unit/graph/structure/test_sites.py::test_every_second_tensor_that_is_listed_can_be_patched
  unit/graph/tracing/test_compile.py::test_attention_biases_of_timm_are_computed_anew
  unit/io/test_hub.py::test_the_client_against_a_stand_in
  unit/io/test_hub.py::test_without_a_network
  unit/test_extend.py::test_an_installed_package_brings_its_methods
  unit/test_extend.py::test_methods_from_outside_compile_in_one_graph
  unit/test_inspection.py::test_compiled_in_one_graph_and_not_again
  unit/test_training_loss.py::test_a_segmentation_model_with_an_auxiliary_head
2
  methods/crossnorm/test_tensors.py::test_gradient_of_modulation
  methods/crossnorm/test_training_parity.py::test_five_steps_of_crossnorm
  methods/dsu/test_patch.py::test_stages_of_one_position_are_left_out
  methods/gam/test_matching.py::test_it_trains_and_predicts_as_the_network_with_the_formula_typed_in
  methods/gam/test_matching.py::test_what_no_layer_can_take_in_is_not_merged
  methods/gam/test_networks.py::test_backbones
  methods/gam/test_patch.py::test_outside_of_a_step_the_model_is_the_bare_one
  methods/mixmo/test_criteria.py::test_one_value_for_a_batch_cannot_be_weighed
  methods/rsc/test_captured.py::test_a_pass_that_checkpointing_runs_again_mutes_the_same
  methods/rsc/test_default.py::test_what_the_head_reads_is_found_however_it_is_picked
  methods/rsc/test_one_logit.py::test_one_logit_is_two_classes
  methods/rsc/test_probe.py::test_the_closed_form_and_the_general_path_mute_the_same
  methods/rsc/test_probe.py::test_training_is_that_of_a_manually_masked_forward
  methods/selfnorm/test_patch.py::test_parameters_beside_their_block_and_without_weight_decay
  methods/selfnorm/test_patch.py::test_the_pair_runs_in_the_authors_order
  methods/selfnorm/test_patch.py::test_units_take_the_dtype_of_their_model
  methods/selfnorm/test_training_parity.py::test_five_steps_of_the_release
  methods/taps/test_everywhere.py::test_torchvisions_feature_extractor
  methods/test_hooks.py::test_gam_absorbs_nothing_past_a_hook
  methods/test_one_logit.py::test_a_logit_that_was_squeezed_is_one_logit
  project/test_drawings.py::test_everything_lies_within_the_drawing
  project/test_layers.py::test_no_import_runs_up
  project/test_sweeping.py::test_a_test_that_is_thinned_exists
  system/contract/test_exporters.py::test_torchscript_refuses_to_compile_what_is_patched
  system/contract/test_rsc_runs.py::test_checkpointed_regions_are_muted_once
  system/properties/test_volumes.py::test_a_layout_of_another_number_of_dimensions
  system/test_adapters.py::test_a_saved_recipe_repeats_the_placements
  system/test_constructor.py::test_grafts_are_no_part_of_it
  system/test_constructor.py::test_what_cannot_be_proved_is_said
  system/test_mistakes.py::test_gam_without_layers_says_which_there_may_be
  system/test_mistakes.py::test_labels_by_position_are_told_their_name
  system/test_own_arguments.py::test_compiled_calls_do_the_same
  system/test_padding.py::test_defaults_crops_and_labels_are_nothing_else
  system/test_padding.py::test_padding_is_no_position
  system/trainers/test_timm.py::test_a_loss_in_the_place_of_the_scripts
  system/trainers/test_transformers.py::test_the_callback_trains_as_a_loss_by_hand
  system/zoo/test_invariants.py::test_methods_are_in_their_places
  unit/adaptation/test_checkpoint.py::test_a_checkpoint_of_another_run
  unit/adaptation/test_loop.py::test_a_game_that_stands_still_is_seen
  unit/bench/test_overhead.py::test_the_collector_rests_during_the_timings
  unit/cli/test_commands.py::test_errors_are_one_plain_message_and_exit_code_2
  unit/graph/grafting/test_copies.py::test_a_model_and_a_part_of_it_that_are_both_patched_travel
  unit/graph/grafting/test_copies.py::test_copies_behave_the_same_and_share_nothing
  unit/graph/grafting/test_copies.py::test_parameters_of_a_copied_graft_are_those_it_trains
  unit/graph/grafting/test_lookup.py::test_a_part_that_is_inserted_is_told_and_found
  unit/graph/grafting/test_planning.py::test_a_model_is_as_it_was_after_grafts_one_by_one
  unit/graph/grafting/test_planning.py::test_one_by_one_gives_what_together_gives
  unit/graph/runtime/test_labels.py::test_consistency_compares_with_the_batch_of_its_own_pass
  unit/graph/runtime/test_labels.py::test_every_output_is_tied_to_its_pass
  unit/graph/runtime/test_labels.py::test_the_labels_of_a_loss_are_those_of_its_pass
  unit/graph/structure/heads/test_stem_and_classifier.py::test_stems
  unit/graph/structure/test_dense.py::test_crossnorm_replaces_what_all_later_layers_see
  unit/graph/structure/test_joins.py::test_every_form_is_found_once
  unit/graph/structure/test_layout.py::test_layouts_of_backbones
  unit/graph/structure/test_positions.py::test_the_layout_of_a_map_that_is_as_deep_as_wide
  unit/graph/structure/test_positions.py::test_the_new_positions_by_name_and_taken_off
  unit/graph/structure/test_sites.py::test_without_feature_info_stages_are_the_last_maps_of_each_size
  unit/graph/tracing/test_editing.py::test_edits_inside_a_block
  unit/graph/tracing/test_trace.py::test_the_graph_computes_what_the_module_does
  unit/test_api.py::test_a_dry_run_leaves_no_trace
  unit/test_training_loss.py::test_methods_without_a_share_in_the_loss_need_none
  unit/test_wrapped_models.py::test_looking_on_needs_no_unwrapping
3
  methods/crossnorm/test_patch.py::test_neutral_settings_draw_nothing_and_change_no_bit
  methods/gam/test_patch.py::test_a_step_reads_no_value
  methods/mixmo/test_patch.py::test_every_mixing_trains_every_member
  methods/mixmo/test_replaced.py::test_members_of_other_weights_start_again_and_that_is_said
  methods/mixmo/test_training_parity.py::test_five_steps_of_the_release
  methods/rsc/test_default.py::test_branches_that_are_stacked_mix_no_tokens
  methods/taps/test_patch.py::test_values_come_in_the_order_and_by_the_names_asked_for
  methods/test_one_logit.py::test_the_cross_entropy_of_one_logit_is_refused
  methods/test_presets.py::test_a_network_of_another_structure_is_named
  project/test_drawings.py::test_units_are_marked_where_the_plan_puts_them
  system/contract/test_alone.py::test_neutral_settings
  system/contract/test_alone.py::test_taking_it_off
  system/contract/test_alone.py::test_training
  system/contract/test_copies.py::test_merged
  system/contract/test_refusals.py::test_backbones_that_do_not_have_what_it_takes
  system/contract/test_rsc_runs.py::test_both_scopes_are_drawn_in_one_graph
  system/contract/test_unclear.py::test_tracers_of_others_are_told_to_merge_first
  system/contract/test_wrappers.py::test_gradients_accumulate
  system/contract/test_wrappers.py::test_replicas
  system/faults/test_damaged.py::test_a_load_that_fails_half_way_in
  system/faults/test_damaged.py::test_looking_draws_nothing_and_fires_no_hook
  system/test_leaks.py::test_again_and_again_keeps_nothing
  system/test_own_arguments.py::test_a_model_that_takes_its_labels_gets_them
  system/trainers/test_timm.py::test_members_take_every_loss
  system/trainers/test_transformers.py::test_class_maps_where_a_module_holds_map_and_pooling
  unit/cli/test_merging.py::test_a_run_of_timms_script
  unit/graph/runtime/test_progress_watch.py::test_a_schedule_that_nobody_feeds
  unit/graph/runtime/test_parameter_watch.py::test_an_optimiser_that_knows_of_them
  unit/graph/structure/heads/test_pooling.py::test_averages_are_recognised_and_the_rewrite_is_exact
  unit/graph/structure/test_joins.py::test_joins_of_well_known_models
  unit/graph/structure/test_joins.py::test_what_a_residual_join_is
  unit/graph/structure/test_layout.py::test_the_input_size_is_what_the_model_says
  unit/graph/structure/test_positions.py::test_output_is_behind_the_activation_that_follows_the_sum
  unit/graph/structure/test_positions.py::test_the_usual_position_is_that_of_the_networks_blocks
  unit/graph/structure/test_sites.py::test_words_that_miss
  unit/graph/tracing/test_observe.py::test_shapes
  unit/io/test_save_load.py::test_a_folder_stands_for_the_file_in_it
  unit/test_api.py::test_a_failure_at_any_site_leaves_everything_as_it_was
  unit/test_api.py::test_several_or_all_come_off_at_once
  unit/test_training_loss.py::test_a_part_has_its_terms_in_the_loss_of_the_whole
  unit/test_training_loss.py::test_asking_for_the_loss_is_enough
4
  methods/diversification/test_norms.py::test_an_activation_in_a_norm_is_said_and_trains_no_statistics_of_positions
  methods/diversification/test_norms.py::test_norms_have_the_statistics_of_the_pooled_vector
  methods/dsu/test_patch.py::test_places_where_nothing_would_change_are_refused
  methods/gam/test_patch.py::test_losses_are_those_of_the_functions
  methods/gam/test_source.py::test_a_layer_that_is_replaced_afterwards
  methods/mixmo/test_replaced.py::test_evaluation_after_a_new_classifier_moves_no_random_state
  methods/rsc/test_patch.py::test_layouts_agree
  methods/rsc/test_patch.py::test_official
  methods/test_hooks.py::test_rsc_looks_ahead_through_hooks
  methods/test_hooks.py::test_the_diversification_head_refuses_what_acts_on_layers_it_does_not_call
  methods/test_parameter_rules.py::test_members_are_in_the_group_of_their_layer
  methods/test_signals.py::test_a_signal_is_a_map_of_height_one
  system/contract/test_exporters.py::test_torchscript_traces_the_evaluation
  system/contract/test_rsc_runs.py::test_autocast_mutes_what_full_precision_does
  system/contract/test_tools.py::test_autocast
  system/contract/test_tools.py::test_exported
  system/properties/test_odd.py::test_once_wrong
  system/test_adapters.py::test_adapters_merged_unmerged_and_taken_off
  system/test_constructor.py::test_a_recipe_whose_constructor_fails
  system/test_leaks.py::test_a_deleted_model_is_freed_at_once
  system/trainers/test_torchvision_loop.py::test_two_changed_arguments
  system/trainers/test_transformers.py::test_saved_under_the_name_of_its_own_class
  unit/adaptation/test_streams.py::test_a_stream_is_found_again
  unit/graph/grafting/test_changed_reads.py::test_what_a_module_holds
  unit/graph/grafting/test_planning.py::test_a_dry_run_tells_the_units_that_are_there_nothing
  unit/graph/grafting/test_planning.py::test_grafts_beside_each_other_trace_nothing_twice
  unit/graph/structure/heads/test_pooling.py::test_the_pooled_map_is_the_last_before_the_average
  unit/graph/structure/heads/test_tail_layer.py::test_linear_tails
  unit/graph/structure/test_positions.py::test_maps_of_the_logits_are_left_out
  unit/graph/tracing/test_editing.py::test_checkpointing_switched_on_before_or_after
  unit/graph/tracing/test_regions.py::test_what_a_graph_would_not_do_again_is_refused_and_undone
  unit/io/test_backbone_weights.py::test_stock_weights_are_taken_up_and_own_ones_stay
  unit/test_errors.py::test_a_mistake_is_explained_and_touches_nothing
  unit/test_errors.py::test_a_mistake_leaves_earlier_patches_alone
  unit/test_spec.py::test_what_fails_changes_nothing
5
  methods/dsu/test_patch.py::test_the_places_of_the_paper
  system/zoo/test_places.py::test_places
  unit/cli/test_pictures.py::test_of_a_clip_the_middle_frame_is_shown
6
  methods/crossnorm/test_patch.py::test_every_crop_trains
  methods/gam/test_errors.py::test_the_taps_that_the_error_proposes_can_be_merged
  methods/gam/test_matching.py::test_it_merges_exactly
  methods/gam/test_patch.py::test_each_loss_reaches_its_own_side_in_any_order
  methods/mixmo/test_replaced.py::test_a_replaced_layer_is_noticed_before_a_pass
  methods/mixstyle/test_golden.py::test_five_steps_of_training
  methods/rsc/test_captured.py::test_it_predicts_what_the_model_does
  methods/selfnorm/test_patch.py::test_the_start_changes_no_bit_and_then_trains
  methods/selfnorm/test_patch.py::test_units_on_tokens_that_no_prediction_reads_are_left_out
  methods/test_preset_places.py::test_a_preset_is_what_was_published
  system/contract/test_copies.py::test_a_stack_copied_in_other_ways
  system/contract/test_exporters.py::test_a_training_pass_is_recorded_with_its_draws
  system/contract/test_heads.py::test_head_rewrite
  system/contract/test_members.py::test_members
  system/contract/test_refusals.py::test_a_patched_model_refuses
  system/contract/test_refusals.py::test_wrong_places
  system/contract/test_taps.py::test_taps
  system/faults/test_acts.py::test_an_interruption_at_some_lines
  system/faults/test_work.py::test_an_interruption
  system/test_threads.py::test_threads_evaluate_one_model
  system/trainers/test_transformers.py::test_a_classifier_in_the_stock_trainer
  system/trainers/test_transformers.py::test_keywords_that_a_layer_does_not_use
  unit/adaptation/test_checkpoint.py::test_an_interrupted_run_ends_where_a_straight_one_does
  unit/graph/grafting/test_lookup.py::test_asking_costs_as_many_calls_in_a_large_network
  unit/graph/structure/heads/test_classified.py::test_features_are_refused
  unit/graph/structure/test_dense.py::test_selfnorm_replaces_what_all_later_layers_see
  unit/test_training_loss.py::test_a_teacher_in_training_mode_has_no_share_in_the_loss
7
  unit/test_errors.py::test_a_mistake_in_the_labels
8
  methods/crossnorm/test_patch.py::test_authors_numbers_in_a_bottleneck
  methods/mixmo/test_replaced.py::test_members_follow_a_layer_with_the_same_weights
  methods/mixmo/test_start.py::test_evaluation_starts_as_the_bare_network
  methods/mixstyle/test_patch.py::test_it_goes_behind_the_first_stages
  system/contract/test_devices.py::test_nothing_mixes_devices_or_waits_for_one
  system/contract/test_empty.py::test_an_empty_batch_passes
  system/contract/test_loops.py::test_a_loop
  system/contract/test_tools.py::test_channels_last
  system/contract/test_wrappers.py::test_stochastic_weight_averaging
  system/faults/test_disk.py::test_a_checkpoint_on_a_full_disk
  system/faults/test_disk.py::test_a_save_to_a_full_disk
  system/trainers/test_dense.py::test_dense_predictors
  system/trainers/test_timm.py::test_labels_progress_loss_and_optimiser
  system/trainers/test_transformers.py::test_a_classifier_that_computes_its_own_loss
  system/trainers/test_transformers.py::test_accumulated_gradients_are_those_of_one_batch
  unit/graph/grafting/test_planning.py::test_threads_that_call_a_model_see_nothing_of_a_look_at_it
  unit/graph/structure/test_dense.py::test_layers_of_every_form
  unit/io/test_save_load.py::test_a_damaged_file_leaves_the_model_alone
  unit/io/test_save_load.py::test_what_is_wrong_with_the_file_is_a_recipe_error
9
  system/contract/test_copies.py::test_pickled
  system/contract/test_wrappers.py::test_called_with_other_weights
  system/contract/test_wrappers.py::test_exponential_moving_average
  system/contract/test_wrappers.py::test_networks_side_by_side
  system/contract/test_wrappers.py::test_networks_trained_side_by_side
  system/test_constructor.py::test_a_saved_model_is_made_again
  unit/graph/runtime/test_progress_watch.py::test_what_follows_no_schedule
  unit/io/test_backbone_weights.py::test_what_the_readme_says_of_strict_loading
10
  system/properties/test_volumes.py::test_a_network_of_depth_one
  unit/cli/test_early_checks.py::test_mistakes_that_need_no_torch
12
  methods/crossnorm/test_patch.py::test_errors
  methods/gam/test_source.py::test_weights_that_come_after_patching_are_the_source
  system/contract/test_tools.py::test_activation_checkpointing
  system/contract/test_tools.py::test_compiled_in_one_graph
  system/contract/test_tools.py::test_models_of_another_precision
  system/faults/test_damaged.py::test_a_malformed_recipe
  system/test_adapters.py::test_copies_of_a_patched_model_with_adapters_have_its_placements
  unit/adaptation/test_checkpoint.py::test_a_checkpoint_that_is_not_whole_changes_nothing
  unit/graph/runtime/test_labels.py::test_compiled_code_refuses_what_is_no_class
  unit/graph/runtime/test_parameter_watch.py::test_an_optimiser_from_before_the_patch
16
  project/test_readme.py::test_python_blocks_run_in_order
  unit/cli/test_merging.py::test_errors_are_one_plain_message
24
  methods/test_probabilities.py::test_rsc_looks_at_what_stands_before
  system/contract/test_exporters.py::test_onnxruntime_computes_the_same
  unit/graph/structure/test_rest_of_network.py::test_the_rest_computes_what_the_network_does
  unit/graph/tracing/test_regions.py::test_a_patched_forward_sets_what_the_bare_one_sets
40
  unit/graph/structure/test_onward.py::test_every_gate_reaches_the_logits_and_no_more_are_left_out
42
  system/contract/test_alone.py::test_evaluation
72
  system/contract/test_alone.py::test_what_it_leaves_alone
"""


def _read(table: str) -> dict[str, int]:
    shares, share = {}, 0
    for line in table.split():
        if line.isdigit():
            share = int(line)
        else:
            shares[line] = share
    return shares


_SHARES = _read(_TABLE)
"""Of which tests one case in so many is tried in every run, the first among them; 0 is none."""
_SWEPT = _read("""
2
  system/contract/test_copies.py::test_merged
  system/contract/test_heads.py::test_head_rewrite
  system/contract/test_members.py::test_members
  system/contract/test_positions.py::test_the_other_positions
  system/zoo/test_invariants.py::test_methods_are_in_their_places
  system/zoo/test_places.py::test_places
3
  system/contract/test_alone.py::test_evaluation
  system/contract/test_alone.py::test_taking_it_off
  system/contract/test_alone.py::test_training
  system/contract/test_alone.py::test_what_it_leaves_alone
""")
"""Of which tests about one case in so many of the sweep is tried in continuous integration."""
