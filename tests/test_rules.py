"""Every rule of rules.md ends with cases that fail without it: which they are, and that they exist.

A rule has broken builds that the simulation sees (:mod:`tests.sim.mutations`), and tests of its
own.  What a simulation has no part in has tests alone: locks of the kernel (10), processes that
host several groups (18), and devices that are others than before, or written to by others (24).
"""

from __future__ import annotations

from importlib import import_module
from unittest import TestCase

from twisted.trial.unittest import SynchronousTestCase

from tests.sim.mutations import MUTATIONS

RULES = range(1, 27)

#: By rule, the names of broken builds.
BROKEN: dict[int, tuple[str, ...]] = {
    1: ("body checksum not checked",),
    2: ("chain not checked", "remains of lost records not cleared"),
    3: ("scan without sync", "replay without sync", "extensions not synced"),
    4: ("failed sync taken for good",),
    5: ("space used again before that is durable", "one superblock slot only"),
    6: ("damage taken for a tear", "void ranges not recorded"),
    7: ("switch not completed at the start", "rolled back history goes on"),
    8: ("resume by number without proof", "resume off by one"),
    9: ("no reserve for control frames",),
    11: (
        "bypass before everything is applied",
        "bypass left without a sync",
        "replayed from the tail",
        "blocks overwritten before it is durable",
        "what is given up is sent",
    ),
    12: (
        "dirty bits not synced",
        "marks forgotten at the start",
        "marks cleared before the mirror has them",
    ),
    13: ("written past a failed log before that is recorded",),
    14: ("chunk read without what is pending", "compared with a mirror that lags"),
    15: (
        "before images behind the overwrite",
        "before images not synced",
        "before images retaken by a replay",
        "restored without a sync",
        "usable before it is restored",
    ),
    16: ("dead device exempt before that is recorded",),
    17: (
        "frames of the last session kept",
        "frames of several paths taken as they come",
        "taken while too much is under way",
    ),
    19: ("requests of lost connections framed",),
    20: ("framed however much is unapplied",),
    21: (
        "degraded before that is durable",
        "degraded ends with the outage",
        "one entry too many",
        "entries of before a crash not counted",
    ),
    22: (
        "replay passes the checkpoint",
        "checkpoint told before it is durable",
        "hashes compared in a replay",
    ),
    23: (
        "answered before the bit is durable",
        "sent before the data device is synced",
        "bits cleared before the secondary has it",
        "lost memory keeps the generation",
    ),
    25: ("trims that leave what was there",),
    26: ("frames that look older not taken",),
}

#: By rule, tests by module (below this package) and name.
TESTS: dict[int, tuple[str, ...]] = {
    1: (
        "storage.test_writelog.test_every_bit",
        "storage.test_logreader.test_misdirected",
        "storage.test_logreader.test_of_another_log",
        "storage.test_logreader.test_two_records_swapped",
        "storage.test_logreader.test_stale_frame_of_an_older_turn",
        "core.test_inbound.test_every_flipped_bit",
    ),
    2: ("storage.test_logreader.test_the_chain_refuses_a_stale_follower",),
    3: ("storage.test_writelog.test_open_syncs_and_drops_the_cache_before_it_reads",),
    4: (
        "storage.test_latch.test_a_failed_sync_is_refused_by_the_next_process",
        "storage.test_latch.test_only_the_operator_clears",
        "daemons.test_supervise.test_failed_devices_are_handed_to_every_later_process",
        "daemons.test_supervise.test_only_the_operators_word_makes_it_forget",
    ),
    5: (
        "storage.test_writelog.test_space_is_reused_only_behind_the_durable_tail",
        "storage.test_writelog.test_both_makes_the_first_durable_before_the_second",
        "groups.test_both_slots.test_either_slot_of_a_checkpoint_may_be_lost",
        "core.test_records.test_slots_never_share_a_physical_block",
    ),
    6: (
        "storage.test_damage.test_under_load",
        "storage.test_damage.test_idle",
        "groups.test_driver.test_void_range_is_durable_before_a_superblock_counts_it",
        "groups.test_outbound.test_frame_is_checked_before_it_is_sent",
    ),
    7: (
        "core.test_generations.test_leaving_is_completed",
        "core.test_generations.test_bounded_by_what_is_needed",
        "core.test_inbound.test_a_switch_leads_to_another_generation",
    ),
    8: (
        "groups.test_outbound.test_another_history_of_the_same_length",
        "groups.test_outbound.test_a_secondary_that_lost_committed_frames",
        "groups.test_outbound.test_a_secondary_that_is_ahead",
        "groups.test_system.test_restored_primary_is_found_out",
    ),
    9: (
        "storage.test_writelog.test_a_full_log_still_takes_control_frames",
        "groups.test_wayout.test_a_break_leaves_room_for_what_must_follow",
    ),
    10: (
        "storage.test_device.test_shared_descriptor",
        "storage.test_device.test_shared_follows_the_device_not_the_path",
    ),
    11: (
        "storage.test_recovery.test_nothing_at_or_below_applied",
        "groups.test_backfresh.test_not_before_all_is_applied",
    ),
    12: (
        "groups.test_bypass.test_dirty_bits_are_durable_before_the_write_is_issued",
        "groups.test_bypass.test_bits_are_cleared_for_a_coherent_mirror_only",
        "groups.test_coherence.test_progress_of_an_earlier_refresh_does_not_count",
    ),
    13: (
        "groups.test_failures.test_break_is_below_the_first_frame_that_is_not_durable",
        "groups.test_failures.test_nothing_is_answered_that_could_not_be_recorded",
        "groups.test_failures.test_the_worst_wins",
    ),
    14: (
        "groups.test_refresh.test_chunk_goes_before_what_came_while_it_waited_for_an_append",
        "groups.test_smart_refresh.test_an_equal_chunk_counts_once_what_was_hashed_is_durable",
    ),
    15: (
        "storage.test_rollback.test_durable_before_the_first_overwrite",
        "storage.test_rollback.test_never_taken_again_by_a_replay",
        "storage.test_rollback.test_given_up_loudly",
        "storage.test_rollback.test_stopped_and_rolled_back",
    ),
    16: (
        "groups.test_failures.test_tail_and_the_other_ldsu_go_on",
        "groups.test_failures.test_group_waits_where_it_cannot_be_recorded",
    ),
    17: (
        "daemons.test_rmd.test_hellos_reach_their_groups",
        "daemons.test_rmd.test_beyond_the_limit_they_wait_in_the_backlog",
        "groups.test_system.test_newer_session_supersedes_the_older",
        "groups.test_driver.test_only_the_latest_attachment_counts",
        "tools.test_rmdreco.test_beside_a_live_rmd",
    ),
    18: (
        "daemons.test_supervise.test_groups_get_a_child_each_while_they_are_few",
        "daemons.test_supervise.test_many_groups_share_children",
    ),
    19: (
        "groups.test_unit.test_dead_connections_requests_are_not_framed",
        "groups.test_unit.test_stale_copy_does_not_overtake_what_waits_for_space",
        "groups.test_bypass.test_requests_of_dead_connections_are_not_written",
        "net.test_nbd.test_hung_up",
    ),
    20: (
        "daemons.test_protection.test_what_is_said_is_so",
        "daemons.test_child.test_who_moves_data_keeps_it",
        "groups.test_unapplied.test_one_bound_for_all",
        "net.test_nbd.test_budget_is_shared_and_returned",
    ),
    21: (
        "groups.test_answering.test_durable_before_the_first_answer",
        "groups.test_answering.test_only_the_applications_entries_count",
        "groups.test_answering.test_a_batch_is_answered_in_part",
    ),
    22: (
        "groups.test_holding.test_a_restart_and_a_replay_stop_at_it",
        "groups.test_holding.test_released_loudly_before_it_is_full",
        "groups.test_holding.test_strict_presses_back",
        "groups.test_holding.test_reads_and_refuses_the_rest",
    ),
    23: (
        "groups.test_memory.test_a_childs_death_loses_nothing",
        "groups.test_memory.test_a_masters_death",
        "daemons.test_held_memory.test_the_next_child_finds_it_as_it_was",
    ),
    24: (
        "groups.test_devices.test_a_change_is_told_and_the_mirror_incoherent",
        "groups.test_devices.test_another_device_is_refused_and_nothing_written",
        "groups.test_devices.test_a_mirror_that_was_written_to_takes_nothing_but_a_refresh",
    ),
    25: (
        "storage.test_device.test_zero_never_asks_for_a_plain_discard",
        "storage.test_apply.test_only_a_trim_may_unmap",
        "groups.test_unit.test_long_zeroes_become_several_entries",
    ),
    26: (
        "core.test_lag.test_never_negative",
        "groups.test_driver_metrics.test_a_clock_that_is_set_back_counts_as_no_time",
        "groups.test_verify.test_it_is_counted_over_a_restart_whatever_the_clock_does",
    ),
}


class RulesTests(SynchronousTestCase):
    def test_each_has_cases(self) -> None:
        self.assertEqual(set(TESTS), set(RULES))
        self.assertEqual(set(RULES) - set(BROKEN), {10, 18, 24})

    def test_broken_builds_exist(self) -> None:
        known = {mutation.name for mutation in MUTATIONS}
        named = {name for names in BROKEN.values() for name in names}
        self.assertEqual(named - known, set())

    def test_tests_exist(self) -> None:
        missing = []
        for name in (name for names in TESTS.values() for name in names):
            place, _, test = name.rpartition(".")
            module = import_module(f"tests.{place}")
            cases = [one for one in vars(module).values() if isinstance(one, type)]
            if not any(issubclass(one, TestCase) and hasattr(one, test) for one in cases):
                missing.append(name)
        self.assertEqual(missing, [])
