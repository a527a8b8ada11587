"""The faults that a run has to survive: what happens, what must come of it, and the tests that do it."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """`tests`: node ids below tests/."""

    number: int
    what: str
    outcome: str
    tests: tuple[str, ...]


def row(fault: Fault, ended: str, seen: str) -> str:
    command = f"`python tests/faults --only {fault.number}`"
    return f"| {fault.number} | {fault.what} | {fault.outcome} | {command} | {ended} | {seen} |"


HEAD = "| | fault | outcome | reproduced by | job ended after | seen |"
SAVES, STOP, DISK = "faults/test_faults.py", "faults/test_stop.py", "faults/test_disk.py"
WORLDS = "faults/test_world_changes.py"
ONE, READ, LAUNCH = "faults/test_one_rank.py", "faults/test_reading.py", "faults/test_launched.py"
SENTENCE = "test_every_rank_ends_with_one_sentence_that_names_rank_and_cause_and_what_is_kept"

FAULTS = tuple(
    Fault(number, what, outcome, tests)
    for number, (what, outcome, *tests) in enumerate(
        [
            (
                "SIGKILL at every write boundary of a save",
                "the next start takes the newest complete checkpoint and says which; end bit-equal",
                f"{SAVES}::test_killed_at_any_write_boundary_the_run_goes_on_from_the_newest_complete_checkpoint",
            ),
            (
                "a file of the newest checkpoint cut, flipped, missing, unmarked",
                "the digest names the file, the checkpoint before is taken; end bit-equal",
                f"{SAVES}::test_damaged_checkpoints_are_named_and_an_older_one_is_taken",
            ),
            (
                "full disk in a save, or in any other write",
                "all ranks end with code 2 and one sentence; older checkpoints untouched, the state saved if it can be",
                f"{SAVES}::test_a_full_disk_ends_the_run_with_one_sentence_and_leaves_the_older_checkpoint",
                f"{DISK}::test_a_disk_that_fills_up_at_any_write_ends_all_ranks_with_one_sentence",
                f"{DISK}::test_with_room_again_the_run_becomes_what_it_would_have_been",
                f"{DISK}::test_a_real_disk_that_is_full_in_a_step_is_told_and_the_run_goes_on_later",
            ),
            (
                "`latest` empty, garbage, or pointing nowhere",
                "it is a hint for people: the folder is looked through",
                f"{SAVES}::test_damaged_checkpoints_are_named_and_an_older_one_is_taken",
            ),
            (
                "a save still being written when the next is due, at the end, at one or two stop signals",
                "waited for, never two writers; it is finished, and holds its own step",
                "test_saving.py::test_a_checkpoint_holds_its_own_step_whatever_training_does_before_it_is_written",
                "test_saving.py::test_saves_that_fall_behind_training_hold_what_synchronous_ones_do",
                "test_saving.py::test_a_signal_while_a_save_runs_waits_for_it_and_names_what_is_there",
                f"{STOP}::test_a_second_signal_leaves_a_step_but_never_a_save",
                "test_resume.py::test_a_signal_stops_with_code_75_and_the_resumed_run_is_the_uninterrupted_one_bit_for_bit",
            ),
            (
                "the run folder vanishes or moves during a step",
                "one sentence on all ranks, code 2; nothing is begun anew in its place",
                f"{DISK}::test_a_run_folder_that_vanishes_ends_all_ranks_and_is_not_begun_anew",
            ),
            (
                "stopped and resumed, SD-GAN and every SDAKD stage",
                "tensors, optimizers, meters and rows bit-equal to a run that nobody stopped",
                "test_resume.py::test_a_signal_stops_with_code_75_and_the_resumed_run_is_the_uninterrupted_one_bit_for_bit",
                "test_sdakd.py::test_a_killed_run_goes_on_bit_for_bit_and_enters_each_stage_once",
            ),
            (
                "4 ranks, then 2, 3, 1",
                "the weights of one rank, bit for bit",
                f"{WORLDS}::test_each_step_on_another_number_of_ranks_is_the_run_of_one_rank_bit_for_bit",
            ),
            (
                "resumed under another configuration",
                "refused with each key that differs, unless `--allow` names it",
                "test_training.py::test_a_run_folder_of_another_configuration_is_refused_with_the_keys_that_differ",
            ),
            (
                "files of G and D exchanged, or of another width",
                "refused by name and shape before a weight is touched",
                "test_origin.py::test_tensors_of_another_network_are_refused_by_name_and_shape",
            ),
            (
                "killed between two stages of SDAKD",
                "each stage is entered once, the teacher is not trained again",
                "test_sdakd.py::test_a_killed_run_goes_on_bit_for_bit_and_enters_each_stage_once",
            ),
            (
                "SIGTERM or SIGUSR1 to one rank: in a step, save, evaluation, picture, before data, at the start",
                "all ranks stop at the same image with a checkpoint and code 75",
                "test_resume.py::test_a_signal_to_one_rank_stops_all_ranks_at_the_same_image",
                f"{STOP}::test_a_signal_in_long_work_cuts_it_short_and_the_run_that_goes_on_does_it_again",
                f"{STOP}::test_a_signal_at_the_start_ends_it_when_the_first_step_is_far_off",
            ),
            (
                "Slurm takes the job back",
                "requeued on 75, not on success, a user's mistake or again and again; the log is appended to",
                "test_slurm.py",
            ),
            (
                "the time limit comes near",
                "the run stops by itself while there is time to save",
                f"{STOP}::test_a_run_whose_time_is_nearly_up_stops_by_itself_with_a_checkpoint",
                f"{STOP}::test_the_reserve_is_what_saves_and_steps_have_taken",
            ),
            (
                "damaged shards and samples, on one rank or spread over all",
                "replaced, counted together, located; too many end all ranks and name the worst shards",
                "test_stream.py::test_bad_samples_are_replaced_and_no_other_sample_moves",
                "test_stream.py::test_too_many_bad_samples_stop_the_run_and_name_the_worst_shard",
                f"{READ}::test_damage_that_is_spread_over_ranks_is_counted_together",
            ),
            (
                "strange images: cut, CMYK, 16 bits, bombs, HTML",
                "converted, or rejected with a reason; no worker dies",
                "test_image_zoo.py",
            ),
            (
                "no shards, an empty list, fewer samples than a batch",
                "one sentence before anything is loaded, never a wait",
                "test_training.py::test_fewer_samples_than_a_batch_and_a_pattern_that_matches_nothing_are_told",
                "test_stream.py::test_a_missing_shard_is_reported_when_opening_and_replaced_when_reading",
            ),
            (
                "a decoding process killed or stopped, the loader failing, on one rank",
                "rank and worker named, the state saved by all, code 75",
                f"{ONE}::{SENTENCE}[a dead worker]",
                f"{ONE}::{SENTENCE}[data]",
                f"{STOP}::test_what_hangs_is_named_and_the_run_ends_as_worth_another_attempt[worker]",
            ),
            (
                "NaN or Inf in a loss or gradient of one rank",
                "stopped, left out or clamped on all ranks at the same step; its player has not moved",
                f"{SAVES}::test_a_nan_on_one_rank_stops_all_ranks_and_names_rank_terms_and_step",
                f"{SAVES}::test_a_bad_loss_or_gradient_of_either_player_on_either_rank_leaves_its_phase_out_on_both",
                f"{SAVES}::test_steps_that_are_bad_again_and_again_end_the_run_on_all_ranks_together",
            ),
            (
                "fp16, whose overflow would skip one player",
                "there is no fp16: asked for, it is refused by name",
                "test_launcher.py::test_one_process_with_half_precision_ends_with_code_2",
            ),
            (
                "averages under sharding",
                "equal to DDP's under every engine",
                "test_engines.py::test_every_engine_steps_saves_and_loads_as_ddp_and_one_player_at_a_time",
            ),
            (
                "a rank sleeps or is stopped: data, step, collective, metric, with the store",
                "rank, section and stacks named within `timeout`, code 75; no alarm at a slow first step",
                f"{STOP}::test_what_hangs_is_named_and_the_run_ends_as_worth_another_attempt",
                f"{STOP}::test_a_hang_in_a_step_collective_or_metric_a_stopped_store_and_a_killed_worker_are_named_too",
                f"{STOP}::test_nothing_is_alarmed_by_a_slow_first_step_or_a_long_evaluation",
            ),
            (
                "a loss of three terms; the other player's gradients",
                "one optimizer step of one player, no gradient of the other",
                "test_engine.py::test_invariant_5_a_phase_of_three_terms_is_one_step_of_one_player",
            ),
            (
                "metrics on 1, 2, 3 ranks; weights that are missing",
                "the same bits; one sentence with the place before training starts",
                "test_metrics.py::test_every_metric_has_the_same_bits_on_any_number_of_ranks_and_one_failing_rank_stops_all",
                "test_metrics.py::test_missing_inception_weights_name_place_and_command",
            ),
            (
                "hostile checkpoints, pickles, tars and YAML",
                "refused with type and origin; a canary shows that nothing ran",
                "test_safe_pickle.py",
                "test_verify.py::test_members_that_are_sparse_or_links_or_beyond_any_picture_are_refused",
                "test_weights.py::test_a_pickle_that_would_run_code_is_not_run",
            ),
            (
                "memory, a mistake of ours, pictures or evaluation failing on one rank",
                "all ranks end with the same sentence; saved where no player has moved, and then bit-equal",
                *(f"{ONE}::{SENTENCE}[{name}]" for name in ("memory in the first phase", "memory in a later phase")),
                *(f"{ONE}::{SENTENCE}[{name}]" for name in ("a mistake before a phase", "pictures", "evaluation")),
                f"{ONE}::test_the_run_that_goes_on_becomes_the_uninterrupted_one",
            ),
            (
                "a rank killed: in a step, with the store, at the start",
                "the others name it and where it was, and end by themselves with code 75",
                *(f"{ONE}::{SENTENCE}[{name}]" for name in ("killed", "killed with the store", "killed at the start")),
            ),
            (
                "the launcher killed",
                "its ranks end with it; who only has a launcher's variables goes on",
                f"{LAUNCH}",
            ),
            (
                "a file system that fails for a moment, or for good",
                "waited for, longer each time, once and not for each image",
                f"{READ}::test_a_file_system_that_comes_back_costs_no_image",
                f"{READ}::test_a_dead_file_system_is_waited_for_once_and_not_for_each_image",
            ),
        ],
        1,
    )
)
